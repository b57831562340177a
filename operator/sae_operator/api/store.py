"""Where data lies: a location in an object store, and which credentials open it."""

from __future__ import annotations

from sae_operator.api.base import ApiModel, EndpointUrl, ObjectName, Region, Rule, Uri


def has_no_parent_segment(uri: str) -> bool:
    return ".." not in uri.split("/")


class SecretRef(ApiModel):
    name: ObjectName
    """Name of a Secret in the resource's namespace with `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`
    (and, where needed, `AWS_SESSION_TOKEN`, `AWS_ENDPOINT_URL`, `AWS_REGION`)."""


class StoreAccess(ApiModel):
    """How to reach what an `s3://` address elsewhere names."""

    endpoint_url: EndpointUrl | None = None
    """Address of an S3-compatible server; AWS when empty and the Secret names none."""
    region: Region | None = None
    """Region of the bucket; the Secret's, then `us-east-1`, when empty."""
    secret_ref: SecretRef | None = None
    """Secret with the credentials; the pod's own identity (IRSA, workload identity) when empty."""


class StoreLocation(ApiModel):
    """A prefix in an object store."""

    RULES = (
        Rule(
            "!self.uri.matches('(^|/)\\\\.\\\\.(/|$)')",
            lambda location: has_no_parent_segment(location.uri),
            "uri must not contain '..' segments",
            "uri",
        ),
    )

    uri: Uri
    """`s3://bucket/prefix`, or `file://path` for a folder that every pod (or the local process) sees."""
    endpoint_url: EndpointUrl | None = None
    """Address of an S3-compatible server; AWS when empty and the Secret names none."""
    region: Region | None = None
    """Region of the bucket; the Secret's, then `us-east-1`, when empty."""
    secret_ref: SecretRef | None = None
    """Secret with the credentials; the pod's own identity (IRSA, workload identity) when empty."""

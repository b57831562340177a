"""The test bed does what Kubernetes and S3 do, as far as the product relies on it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.testbed.control_plane import ControlPlane, KubectlError
from tests.testbed.object_server import ObjectServer


def test_a_restricted_namespace_refuses_a_privileged_pod(control_plane: ControlPlane, namespace: str) -> None:
    with pytest.raises(KubectlError, match="violates PodSecurity"):
        control_plane.kubectl(
            *("run", "root-pod", "--namespace", namespace, "--image=any", "--privileged", "--restart=Never")
        )


def test_only_the_first_of_two_conditional_puts_is_stored(object_server: ObjectServer) -> None:
    client = object_server.client()
    bucket = object_server.create_bucket("conditional")
    client.put_object(Bucket=bucket, Key="manifest", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=bucket, Key="manifest", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=bucket, Key="manifest")["Body"].read() == b"first"


def test_helm_runs(helm: Path) -> None:
    told = subprocess.run([helm, "version", "--short"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("v3.")

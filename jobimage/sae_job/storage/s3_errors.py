"""What the errors of S3 and of boto3 mean for the user: a fix in the spec, or another try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, PreconditionFailed, StoreError

CREDENTIALS_REFUSED = frozenset(
    {
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "InvalidToken",
        "ExpiredToken",
        "TokenRefreshRequired",
        "InvalidSecurity",
        "NotSignedUp",
        # versitygw
        "XAdminUserNotFound",
    }
)
ACCESS_DENIED = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "403", "Forbidden"})
# A signature for another region than the bucket's, and the redirection to it.
WRONG_REGION = frozenset({"AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect", "301"})
NOT_FOUND = frozenset({"NoSuchKey", "404", "NotFound"})


@dataclass(frozen=True)
class Place:
    """What messages may tell of a bucket: never a key.

    Attributes:
        bucket: name of the bucket.
        endpoint: address of the server; empty for AWS.
        credentials: where the credentials came from, in words.
    """

    bucket: str
    endpoint: str
    credentials: str

    def __str__(self) -> str:
        return f"bucket {self.bucket} at {self.endpoint or 'AWS'}"


def translate(error: Exception, place: Place, uri: str) -> Exception:
    """The error that a store raises for `error`, which boto3 or botocore raised for the object or prefix `uri`."""
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, ClientError):
        return _translate_answer(error.response, place, uri)
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return InvalidInput(
            "CredentialsRefused",
            f"no credentials for {place}: name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in secretRef, "
            "or set these in the environment",
        )
    if isinstance(error, BotoCoreError):
        return StoreError(
            f"{uri}: {place} cannot be reached ({type(error).__name__}); check endpointUrl and the network"
        )
    return error


def _translate_answer(response: Any, place: Place, uri: str) -> Exception:
    code = str(response.get("Error", {}).get("Code", ""))
    message = str(response.get("Error", {}).get("Message", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return InvalidInput("BucketNotFound", f"{place} does not exist: create it, or mend the uri {uri}")
    if code in WRONG_REGION:
        return InvalidInput("WrongRegion", f"{place} is in another region ({code}): set region to the bucket's")
    if code in CREDENTIALS_REFUSED:
        return InvalidInput(
            "CredentialsRefused", f"{place} refuses the credentials of {place.credentials} ({code}): mend them"
        )
    if code in NOT_FOUND:
        return ObjectNotFound(f"{uri}: no such object")
    if code in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
        return PreconditionFailed(f"{uri}: another version is there than expected")
    if code in ACCESS_DENIED or status == 403:
        return InvalidInput(
            "AccessDenied",
            f"{place} refuses access to {uri} with the credentials of {place.credentials} ({code}): allow reading, "
            "writing, listing and deleting there",
        )
    return StoreError(f"{uri}: {place} answered {status} {code}: {message}")

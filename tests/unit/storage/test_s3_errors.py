"""What errors of S3 mean for the user: a fix in the spec, a missing object, or another try; never a key."""

from __future__ import annotations

from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, PreconditionFailed, StoreError
from sae_job.storage.open import open_store
from sae_job.storage.s3_errors import Place, translate
from sae_operator.api.store import SecretRef, StoreLocation

PLACE = Place("saes", "http://127.0.0.1:7070", "Secret team-s3")
URI = "s3://saes/run/results.json"


def answer(code: str, status: int) -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": "told"}, "ResponseMetadata": {"HTTPStatusCode": status}},  # pyright: ignore[reportArgumentType]
        "PutObject",
    )


@pytest.mark.parametrize(
    ("code", "status", "reason", "told"),
    [
        ("NoSuchBucket", 404, "BucketNotFound", "bucket saes at http://127.0.0.1:7070 does not exist"),
        ("InvalidAccessKeyId", 403, "CredentialsRefused", "refuses the credentials of Secret team-s3"),
        ("SignatureDoesNotMatch", 403, "CredentialsRefused", "refuses the credentials of Secret team-s3"),
        ("ExpiredToken", 400, "CredentialsRefused", "(ExpiredToken)"),
        ("AccessDenied", 403, "AccessDenied", f"refuses access to {URI} with the credentials of Secret team-s3"),
        ("AuthorizationHeaderMalformed", 400, "WrongRegion", "set region to the bucket's"),
    ],
)
def test_what_the_user_must_mend(code: str, status: int, reason: str, told: str) -> None:
    error = translate(answer(code, status), PLACE, URI)
    assert isinstance(error, InvalidInput)
    assert error.reason == reason
    assert told in error.message
    assert "saes" in error.message


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("NoSuchKey", 404, ObjectNotFound),
        ("PreconditionFailed", 412, PreconditionFailed),
        ("ConditionalRequestConflict", 409, PreconditionFailed),
        ("SlowDown", 503, StoreError),
        ("InternalError", 500, StoreError),
    ],
)
def test_what_the_step_handles_or_tries_again(code: str, status: int, kind: type[StoreError]) -> None:
    error = translate(answer(code, status), PLACE, URI)
    assert type(error) is kind
    assert URI in str(error)


def test_a_server_out_of_reach_is_tried_again() -> None:
    error = translate(EndpointConnectionError(endpoint_url=PLACE.endpoint), PLACE, URI)
    assert type(error) is StoreError
    assert "cannot be reached (EndpointConnectionError)" in str(error)


def test_missing_credentials_are_the_users_to_mend() -> None:
    error = translate(NoCredentialsError(), PLACE, URI)
    assert isinstance(error, InvalidInput)
    assert error.reason == "CredentialsRefused"
    assert "secretRef" in error.message


def test_other_errors_stay_what_they_are() -> None:
    error = RuntimeError("a mistake of ours")
    assert translate(error, PLACE, URI) is error


def test_an_endpoint_that_is_no_address_is_told(tmp_path: Path) -> None:
    (tmp_path / "team-s3").mkdir()
    for key, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "hidden",
        "AWS_ENDPOINT_URL": "server:9000",
    }.items():
        (tmp_path / "team-s3" / key).write_text(value)
    store = open_store(
        StoreLocation(uri="s3://saes/run", secret_ref=SecretRef(name="team-s3")), secrets_directory=tmp_path
    )
    with pytest.raises(InvalidInput, match=r"'server:9000'.*in Secret team-s3, is no address") as caught:
        store.get("x")
    assert caught.value.reason == "EndpointInvalid"
    assert "hidden" not in str(caught.value)

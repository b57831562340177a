"""Objects in a bucket of S3, or of a server that speaks S3: `s3://`."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, ObjectNotFound, PreconditionFailed, StoreError
from sae_job.storage.s3_errors import Place, translate

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from sae_operator.api.store import StoreLocation

DEFAULT_REGION = "us-east-1"
# Objects above this go up in parts, several at a time. 10,000 parts of this size are 160 GB, above the largest shard;
# larger parts would be given back to the system after each use, and fresh memory costs more than the copy.
MULTIPART_BYTES = 2**25
PART_BYTES = 2**24
UPLOAD_THREADS = 4
# Tries of one request, the first included, with exponential back-off between them: about a quarter of a minute in all.
ATTEMPTS = 10
CONNECT_TIMEOUT_SECONDS = 10
READ_TIMEOUT_SECONDS = 60
# Objects per page of a listing: as many as S3 gives.
LIST_KEYS = 1000
# Connections kept open: readers fetch this many ranges at a time.
CONNECTIONS = 32
# How much of a body is received at a time; between these a broken connection loses nothing.
RECEIVE_BYTES = 2**20


@dataclass(frozen=True)
class S3Credentials:
    """Credentials and address from a Secret, or none (then the usual AWS chain is asked).

    Attributes:
        source: where they come from, in words; the only part that messages may tell.
    """

    source: str
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    endpoint_url: str | None = None
    region: str | None = None

    def __repr__(self) -> str:
        return f"S3Credentials(source={self.source!r})"


def read_credentials(location: StoreLocation, secrets_directory: Path | None) -> S3Credentials:
    """Credentials of a location: its Secret's, mounted as one file per key, or the environment's where none is mounted.

    Raises:
        InvalidInput: the Secret lacks a key.
    """
    if location.secret_ref is None:
        return S3Credentials("the pod's environment")
    name = location.secret_ref.name
    folder = secrets_directory / name if secrets_directory is not None else None
    if folder is None or not folder.is_dir():
        return S3Credentials(f"the environment (Secret {name} is not mounted)")

    def value(key: str) -> str | None:
        path = folder / key
        return path.read_text().strip() or None if path.is_file() else None

    missing = [key for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if value(key) is None]
    if missing:
        raise InvalidInput("CredentialsRefused", f"Secret {name} lacks {' and '.join(missing)}: add them")
    return S3Credentials(
        f"Secret {name}",
        value("AWS_ACCESS_KEY_ID"),
        value("AWS_SECRET_ACCESS_KEY"),
        value("AWS_SESSION_TOKEN"),
        value("AWS_ENDPOINT_URL"),
        value("AWS_REGION"),
    )


class S3Store:
    """A prefix of a bucket.

    Requests that fail for a passing reason (connection, throttling, 5xx) are repeated a bounded number of times. A
    conditional write whose answer is lost on the way may report `PreconditionFailed` although it took effect: callers
    compare what is there.

    Args:
        location: `s3://bucket/prefix`, its endpoint and region.
        credentials: from `read_credentials`.
        attempts: tries of one request, the first included.
    """

    def __init__(self, location: StoreLocation, credentials: S3Credentials, *, attempts: int = ATTEMPTS) -> None:
        bucket, _, prefix = location.uri.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._attempts = attempts
        endpoint = location.endpoint_url or credentials.endpoint_url
        self._place = Place(bucket, endpoint or os.environ.get("AWS_ENDPOINT_URL", ""), credentials.source)
        self._endpoint = endpoint
        self._region = location.region or credentials.region
        self._credentials = credentials
        self._bucket_seen = False
        self._lock = threading.Lock()
        self._lazy_client: Any = None

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def get(self, key: str) -> bytes:
        answer = self._get_object(key)
        data = bytearray(answer["ContentLength"])
        self._receive(key, answer, 0, memoryview(data))
        return bytes(data)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        data = bytearray(length)
        return bytes(memoryview(data)[: self.read_into(key, start, memoryview(data))])

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        if len(buffer) == 0:
            return 0
        try:
            answer = self._get_object(key, start, start + len(buffer))
        except _BeyondTheEnd:
            return 0
        length = min(answer["ContentLength"], len(buffer))
        self._receive(key, answer, start, buffer[:length])
        return length

    def head(self, key: str) -> ObjectInfo | None:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self._client.head_object(Bucket=self._bucket, Key=self._prefix + key)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status == 404 and self._bucket_seen:
                return None
            if status in (301, 400, 403, 404):
                return self._head_by_get(key)
            raise translate(error, self._place, self._object_uri(key)) from error
        except BotoCoreError as error:
            raise translate(error, self._place, self._object_uri(key)) from error
        self._bucket_seen = True
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"], answer.get("LastModified"))

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        view = memoryview(data).cast("B")
        condition = {"IfNoneMatch": "*"} if if_absent else {"IfMatch": if_match} if if_match is not None else {}
        if len(view) > MULTIPART_BYTES and not condition:
            return self._put_parts(key, len(view), lambda start, stop: bytes(view[start:stop]))
        body = data if isinstance(data, bytes | bytearray) else bytes(view)
        try:
            answer = self._call("put_object", key, Key=self._prefix + key, Body=body, **condition)
        except ObjectNotFound as error:
            # Some servers answer so to If-Match on an object that is gone.
            raise PreconditionFailed(f"{self._object_uri(key)}: the expected version is gone") from error
        self._bucket_seen = True
        return ObjectInfo(key, len(view), answer["ETag"])

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        size = path.stat().st_size
        if size <= MULTIPART_BYTES:
            return self.put(key, path.read_bytes())
        with open(path, "rb", buffering=0) as source:
            return self._put_parts(key, size, lambda start, stop: os.pread(source.fileno(), stop - start, start))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        token: dict[str, str] = {}
        while True:
            answer = self._call("list_objects_v2", prefix, Prefix=self._prefix + prefix, MaxKeys=LIST_KEYS, **token)
            for item in answer.get("Contents", []):
                key = item["Key"].removeprefix(self._prefix)
                yield ObjectInfo(key, item["Size"], item["ETag"], item.get("LastModified"))
            if not answer.get("IsTruncated"):
                return
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        try:
            self._call("delete_object", key, Key=self._prefix + key)
        except ObjectNotFound:
            # S3 answers 204 for an object that is not there; some servers answer 404.
            return

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._lazy_client is None:
                self._lazy_client = self._connect()
            return self._lazy_client

    def _connect(self) -> Any:
        import boto3
        from botocore.config import Config

        credentials = self._credentials
        session = boto3.Session(
            aws_access_key_id=credentials.access_key_id,
            aws_secret_access_key=credentials.secret_access_key,
            aws_session_token=credentials.session_token,
        )
        configuration = Config(
            signature_version="s3v4",
            # Servers other than AWS seldom have a DNS name per bucket.
            s3={"addressing_style": "path" if self._place.endpoint else "auto"},
            retries={"mode": "standard", "total_max_attempts": self._attempts},
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=READ_TIMEOUT_SECONDS,
            max_pool_connections=CONNECTIONS,
            tcp_keepalive=True,
            # Trailing checksums are unknown to older S3-compatible servers; shards carry a SHA-256 of their own.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        try:
            return session.client(
                "s3",
                endpoint_url=self._endpoint,
                region_name=self._region or session.region_name or DEFAULT_REGION,
                config=configuration,
            )
        except ValueError as error:
            raise InvalidInput(
                "EndpointInvalid",
                f"{self._endpoint!r}, of endpointUrl or of AWS_ENDPOINT_URL in {self._credentials.source}, is no "
                "address of a server: it reads http://HOST:PORT or https://HOST",
            ) from error

    def _object_uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{key}"

    def _call(self, operation: str, key: str, **arguments: Any) -> Any:
        """One request, with boto3's errors as ours."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        except (ClientError, BotoCoreError) as error:
            raise translate(error, self._place, self._object_uri(key)) from error

    def _get_object(self, key: str, start: int = 0, stop: int | None = None) -> Any:
        from botocore.exceptions import ClientError

        byte_range = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        try:
            answer = self._call("get_object", key, Key=self._prefix + key, **byte_range)
        except StoreError as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and cause.response["ResponseMetadata"].get("HTTPStatusCode") == 416:
                raise _BeyondTheEnd from error
            raise
        self._bucket_seen = True
        return answer

    def _receive(self, key: str, answer: Any, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from an answer's body; a connection that breaks is continued where it broke, over the same
        version."""
        from http.client import HTTPException

        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        done, breaks, etag = 0, 0, answer["ETag"]
        while True:
            body = answer["Body"]
            receive = _receiver(body)
            try:
                while done < len(buffer) and (count := receive(buffer[done : done + RECEIVE_BYTES])):
                    done += count
            except (BotoCoreError, HTTPError, HTTPException, OSError) as error:
                cause: Exception | None = error
            else:
                cause = None
            if done == len(buffer):
                _give_back_connection(body)
                return
            body.close()
            breaks += 1
            if breaks == self._attempts:
                raise StoreError(f"{self._object_uri(key)}: {self._place} broke off {breaks} times") from cause
            answer = self._get_object(key, start + done, start + len(buffer))
            if answer["ETag"] != etag:
                raise StoreError(f"{self._object_uri(key)}: the object was replaced while it was read")

    def _head_by_get(self, key: str) -> ObjectInfo | None:
        """Answers to HEAD have no body, so they do not tell a missing object from a missing bucket, nor why access is
        refused."""
        try:
            answer = self._get_object(key)
        except ObjectNotFound:
            self._bucket_seen = True
            return None
        answer["Body"].close()
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"], answer.get("LastModified"))

    def _put_parts(self, key: str, size: int, part: Callable[[int, int], bytes]) -> ObjectInfo:
        """Upload `size` bytes in parts; `part(start, stop)` gives the bytes of one, and holds at most UPLOAD_THREADS
        of them."""
        name = self._prefix + key
        upload = self._call("create_multipart_upload", key, Key=name)["UploadId"]

        def send(number: int) -> dict[str, Any]:
            start = (number - 1) * PART_BYTES
            body = part(start, min(start + PART_BYTES, size))
            answer = self._call("upload_part", key, Key=name, UploadId=upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        try:
            with ThreadPoolExecutor(UPLOAD_THREADS, thread_name_prefix="s3-upload") as threads:
                parts = list(threads.map(send, range(1, -(-size // PART_BYTES) + 1)))
            answer = self._call(
                "complete_multipart_upload", key, Key=name, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            # Parts of an upload that is neither completed nor aborted cost storage and are seen by nobody.
            try:
                self._call("abort_multipart_upload", key, Key=name, UploadId=upload)
            except StoreError:
                logger.warning("%s: an unfinished upload could not be taken back", self._object_uri(key), exc_info=True)
            raise
        self._bucket_seen = True
        return ObjectInfo(key, size, answer["ETag"])


def _receiver(body: Any) -> Callable[[memoryview], int]:
    """What fills memory with the next bytes of a body. urllib3 would copy each of them twice on the way, a fifth of the
    CPU time of a download; the response of the standard library below it receives them where they belong."""
    from http.client import HTTPResponse

    response = getattr(getattr(body, "_raw_stream", None), "_fp", None)
    return response.readinto if isinstance(response, HTTPResponse) else body.readinto


def _give_back_connection(body: Any) -> None:
    """Let the next request use the connection of a body that was received whole."""
    release = getattr(getattr(body, "_raw_stream", None), "release_conn", None)
    if release is not None:
        release()


class _BeyondTheEnd(Exception):
    """A range begins past the object's last byte."""

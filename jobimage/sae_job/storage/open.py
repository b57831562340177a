"""From a location in a spec to the object store there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.storage.s3_store import S3Store, read_credentials
from sae_operator.api.store import StoreLocation


def open_store(
    location: StoreLocation | str, *, secrets_directory: Path | None = None, local_root: Path | None = None
) -> ObjectStore:
    """The object store at a location, or at a bare URI. Nothing is contacted yet.

    Args:
        location: where, and which Secret opens it.
        secrets_directory: where Secrets are mounted, one folder each; without it, or without the Secret's folder
            there, the usual environment variables and profiles of AWS serve.
        local_root: a folder that stands in for S3: `s3://bucket/key` is `<local_root>/bucket/key` (`sae-job run
            --store`).

    Raises:
        InvalidInput: unknown scheme, or a Secret that lacks a key.
    """
    if isinstance(location, str):
        location = StoreLocation(uri=location)
    scheme, separator, rest = location.uri.partition("://")
    if not separator or scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise InvalidInput("UnknownScheme", f"{location.uri!r} is no place to store data: use one of {known}")
    if local_root is not None and scheme != "file":
        return FileStore(local_root / rest.strip("/"))
    return SCHEMES[scheme](location, secrets_directory)


def _open_file(location: StoreLocation, secrets_directory: Path | None) -> ObjectStore:
    return FileStore(path_of_file_uri(location.uri), location.uri)


def _open_s3(location: StoreLocation, secrets_directory: Path | None) -> ObjectStore:
    return S3Store(location, read_credentials(location, secrets_directory))


SCHEMES: dict[str, Callable[[StoreLocation, Path | None], ObjectStore]] = {"s3": _open_s3, "file": _open_file}

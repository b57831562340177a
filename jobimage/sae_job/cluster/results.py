"""What a resource leaves in the object store, read from outside the cluster."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae_job.cluster.connection import Cluster, Found
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, ObjectStore, StoreError
from sae_job.storage.open import open_store
from sae_operator.api.resources import ACTIVATION_CACHE, SAE_SWEEP
from sae_operator.api.store import StoreLocation

DEFAULTS_CONFIG_MAP = "sae-operator-defaults"
# Working files of a training: large, and of no use to anybody else.
WORKING_FOLDERS = ("checkpoints/", "activations/", "median-stop/")
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN")
CHUNK = 8 * 2**20


@dataclass(frozen=True)
class Access:
    """How the store is reached from here.

    Attributes:
        endpoint_url: overrides the resource's, which may be an address within the cluster.
        store_root: folder that stands in for the store.
    """

    endpoint_url: str | None = None
    store_root: Path | None = None


def output_location(found: Found) -> StoreLocation:
    """Where a job's or a sweep's results lie.

    Raises:
        InvalidInput: the resource is a cache, which has commands of its own; or its place is none that is known here.
    """
    if found.kind is ACTIVATION_CACHE:
        where = found.status.get("manifestUri", "").removesuffix("/manifest.json")
        message = f"{found.label} is a cache; see `sae-job cache inspect {where or 'URI'}`"
        raise InvalidInput("NoResults", message)
    spec = found.body["spec"]
    output = (spec["template"] if found.kind is SAE_SWEEP else spec)["output"]
    return _location(output, found.label)


def _location(told: Mapping[str, Any], whose: str) -> StoreLocation:
    """A place as somebody tells it.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return StoreLocation.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InvalidInput(
            "InvalidPlace", f"{whose} names no place that can be opened: {field}: {first['msg']}"
        ) from error


@contextmanager
def open_results(cluster: Cluster, found: Found, access: Access) -> Iterator[ObjectStore]:
    """The folder of a resource's results.

    Credentials are those of the environment; where it has none, those of the Secret that the resource names, if its
    user may read it.
    """
    location = output_location(found)
    if location.uri.startswith("s3://") and access.store_root is None:
        location = _completed(location, cluster.config_map(found.namespace, DEFAULTS_CONFIG_MAP))
    if access.endpoint_url is not None:
        location = _location({**location.model_dump(), "endpoint_url": access.endpoint_url}, "--endpoint-url")
    secret = location.secret_ref.name if location.secret_ref is not None else None
    if secret is None or access.store_root is not None or any(os.environ.get(name) for name in _CREDENTIALS):
        yield open_store(location, local_root=access.store_root)
        return
    print(f"sae-job: opens {location.uri} with Secret {secret} of namespace {found.namespace}", file=sys.stderr)
    # Removed again at once: the store has read the files when it is open.
    with tempfile.TemporaryDirectory(prefix="sae-job-") as folder:
        _write_secret(Path(folder) / secret, cluster.secret(found.namespace, secret))
        store = open_store(location, secrets_directory=Path(folder))
    yield store


def _completed(location: StoreLocation, defaults: Mapping[str, str]) -> StoreLocation:
    """With the namespace's defaults, as the operator fills them in."""
    changes: dict[str, Any] = {}
    if location.endpoint_url is None and defaults.get("endpointUrl"):
        changes["endpoint_url"] = defaults["endpointUrl"]
    if location.region is None and defaults.get("region"):
        changes["region"] = defaults["region"]
    if location.secret_ref is None and defaults.get("secretName"):
        changes["secret_ref"] = {"name": defaults["secretName"]}
    return _location({**location.model_dump(), **changes}, f"ConfigMap {DEFAULTS_CONFIG_MAP}")


def _write_secret(folder: Path, data: Mapping[str, bytes]) -> None:
    folder.mkdir(mode=0o700)
    for key, value in data.items():
        path = folder / key
        path.touch(mode=0o600)
        path.write_bytes(value)


def result_files(store: ObjectStore, *, below: str = "", working: bool = False) -> list[ObjectInfo]:
    """The objects of a result, without the working files of the training."""
    found = []
    for entry in store.list(below):
        # Consoles of stores mark folders by objects without content.
        if entry.key.endswith("/") or not entry.key:
            continue
        # A sweep has its jobs' working folders one level deeper.
        inner = entry.key.partition("/")[2]
        if working or (not entry.key.startswith(WORKING_FOLDERS) and not inner.startswith(WORKING_FOLDERS)):
            found.append(entry)
    return found


def is_current(entry: ObjectInfo, path: Path) -> bool:
    """Whether a file here is what an object is: as long, and not older."""
    if not path.is_file() or path.stat().st_size != entry.size or entry.modified is None:
        return False
    return path.stat().st_mtime >= entry.modified.timestamp()


def download(store: ObjectStore, entry: ObjectInfo, path: Path) -> Iterator[int]:
    """Copies an object to a file, which is there whole or not at all; yields the bytes of each piece.

    Raises:
        InvalidInput: the file cannot be written.
        StoreError: the object has become another one meanwhile, or cannot be read.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                for start in range(0, entry.size, CHUNK):
                    length = min(CHUNK, entry.size - start)
                    piece = store.get_range(entry.key, start, length)
                    if len(piece) != length:
                        raise StoreError(f"{store.uri}/{entry.key} has become shorter while it was read")
                    file.write(piece)
                    yield length
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells what is wrong with a place for a file.

    Raises:
        InvalidInput: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InvalidInput("NotWritable", f"{path} cannot be written: {error.strerror or error}") from error

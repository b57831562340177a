"""Models whose files lie in an object store: the user's own, and copies of Hub models beside a cache.

Loaders know folders and the Hub; `localized` turns what a spec names into one of these. Only the files that
Transformers needs are copied: configuration, tokenizer, code (which runs only where it is trusted), and weights as
safetensors (pickles only where there is nothing else).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sae_job.errors import InvalidInput, Stopped
from sae_job.models.download import download, download_folder
from sae_job.models.facts import ModelFacts
from sae_job.models.full import FullModel
from sae_job.models.hooked import HookedModel
from sae_job.models.load import inspect_model, load_full_model, load_hooked_model
from sae_job.storage.base import ObjectInfo, ObjectNotFound, ObjectStore
from sae_job.text.hub import is_local, resolve_commit
from sae_operator.api.activation_cache import ModelSource
from sae_operator.api.store import StoreLocation

logger = logging.getLogger(__name__)

MIRROR_PREFIX = "model/"
# Written first and last: say which model the other files are, and that all are there.
MIRROR_BEGUN, MIRROR_MARKER = "mirror-begun.json", "mirror.json"
CONFIG = "config.json"
_S3 = "s3://"
_TEXT_FILES = re.compile(r"\.(json|txt|model|jinja|tiktoken|spm|vocab|py)$")
# In order of preference; a repository may hold its weights several times, in several forms.
_WEIGHTS = (
    re.compile(r"^model(-\d+-of-\d+)?\.safetensors$"),
    re.compile(r"\.safetensors$"),
    re.compile(r"^pytorch_model(-\d+-of-\d+)?\.bin$"),
)
_NOT_NEEDED = re.compile(r"\.(bin|h5|msgpack|onnx)\.index\.json$|^(training_args|trainer_state|README|LICENSE).*$")


@dataclass(frozen=True)
class LocalModel:
    """A model that loaders can read.

    Attributes:
        source: what to load: a folder, or what the spec gives where that is one or is on the Hub.
        name: what the spec calls it, which is recorded.
        revision: what is recorded as its version: the commit on the Hub, a digest of the files of an `s3://` folder;
            None for a folder, and where it is not known yet.
    """

    source: ModelSource
    name: str
    revision: str | None

    def inspect(self, hooks: Sequence[str]) -> ModelFacts:
        """See `inspect_model`; name and revision are those to record."""
        with self._by_its_name():
            facts = inspect_model(self.source, hooks, revision=self.revision)
        return replace(facts, name=self.name, revision=facts.revision if self.revision is None else self.revision)

    def load_hooked(self, hooks: Sequence[str], *, device: torch.device | str | None = None) -> HookedModel:
        """See `load_hooked_model`."""
        with self._by_its_name():
            return load_hooked_model(self.source, hooks, device=device, revision=self.revision)

    def load_full(self, *, device: torch.device | str | None = None) -> FullModel:
        """See `load_full_model`."""
        with self._by_its_name():
            return load_full_model(self.source, device=device, revision=self.revision)

    @contextmanager
    def _by_its_name(self) -> Iterator[None]:
        """Errors name what the user gave, not the folder that stands for it."""
        try:
            yield
        except InvalidInput as error:
            message = error.message.replace(self.source.name, self.name)
            raise InvalidInput(error.reason, message, field=error.field) from error


def localized(
    source: ModelSource,
    *,
    open_store: Callable[[StoreLocation], ObjectStore],
    mirror: ObjectStore | None = None,
    make_mirror: bool = False,
    revision: str | None = None,
    weights: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> LocalModel:
    """Bring a model's files to this machine, where they lie in an object store.

    Args:
        mirror: the cache's folder, where a Hub model is copied to when its source asks for it.
        make_mirror: copy it there when that has not been done (the prepare step); otherwise the Hub serves.
        revision: the version that was recorded before.
        weights: False for configuration and tokenizer alone.

    Raises:
        InvalidInput: there is no model at that place, or not the one that was recorded.
        StoreError: the store failed.
    """
    if source.name.startswith(_S3):
        return _from_s3(source, open_store, revision, weights, should_stop)
    local = LocalModel(source, source.name, revision)
    if not source.mirror or mirror is None or is_local(source.name):
        return local
    commit = mirrored_commit(mirror)
    if commit is None and make_mirror:
        commit = revision if revision is not None else _resolve(source)
        if commit is None:
            return local
        mirror_model(source.name, commit, mirror, should_stop=should_stop)
    if commit is None:
        logger.info("%s holds no copy of %s: asking the Hub", mirror.uri, source.name)
        return local
    if revision is not None and revision != commit:
        raise InvalidInput(
            "MirrorChanged",
            f"{mirror.uri}/{MIRROR_PREFIX} holds commit {commit} of {source.name!r}, not {revision}, with which this "
            "cache was begun; remove the copy",
            field="spec.model.mirror",
        )
    objects = needed(mirror.list(MIRROR_PREFIX), MIRROR_PREFIX, weights=weights)
    folder = _brought(mirror, objects, MIRROR_PREFIX, f"{source.name}@{commit}", should_stop)
    return LocalModel(_at(source, folder), source.name, commit)


def mirrored_commit(store: ObjectStore) -> str | None:
    """Commit of the Hub model that was copied into a cache's folder; None when none was, or not to the end."""
    return _commit_in(store, MIRROR_MARKER)


def mirror_model(
    name: str, commit: str, store: ObjectStore, *, should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Copy a Hub model into a cache's folder, and mark it as whole; files that are there already are left alone.

    Raises:
        Stopped: `should_stop` said so; files that were copied stay.
    """
    folder = _snapshot(name, commit)
    files = sorted(_chosen([path.name for path in folder.iterdir() if path.is_file()], weights=True))
    there = {}
    if _commit_in(store, MIRROR_BEGUN) == commit:
        there = {info.key: info.size for info in store.list(MIRROR_PREFIX)}
    else:
        # What an earlier attempt left may be another commit's.
        _put_marker(store, MIRROR_BEGUN, {"name": name, "commit": commit})
    sizes = {}
    for file in files:
        if should_stop():
            raise Stopped("stopped while the model was copied to the store; files that are there are not copied again")
        sizes[file] = (folder / file).stat().st_size
        if there.get(MIRROR_PREFIX + file) != sizes[file]:
            logger.info("copying %s of %s (%d bytes) to %s", file, name, sizes[file], store.uri)
            store.put_file(MIRROR_PREFIX + file, folder / file)
    _put_marker(store, MIRROR_MARKER, {"name": name, "commit": commit, "files": sizes})


def _commit_in(store: ObjectStore, marker: str) -> str | None:
    try:
        return json.loads(store.get(MIRROR_PREFIX + marker))["commit"]
    except ObjectNotFound:
        return None


def _put_marker(store: ObjectStore, marker: str, content: dict[str, Any]) -> None:
    store.put(MIRROR_PREFIX + marker, (json.dumps(content, sort_keys=True) + "\n").encode())


def needed(objects: Iterable[ObjectInfo], prefix: str = "", *, weights: bool) -> list[ObjectInfo]:
    """Those of a folder's objects that Transformers needs."""
    by_name = {info.key.removeprefix(prefix): info for info in objects}
    return [by_name[name] for name in sorted(_chosen(by_name, weights=weights))]


def _chosen(names: Iterable[str], *, weights: bool) -> set[str]:
    # Models lie in the outermost folder; those below hold them in other forms.
    names = [name for name in names if "/" not in name and name not in (MIRROR_BEGUN, MIRROR_MARKER)]
    found = {name for name in names if _TEXT_FILES.search(name) and not _NOT_NEEDED.search(name)} - {
        MIRROR_MARKER,
        MIRROR_BEGUN,
    }
    if not weights:
        return found
    kinds = ({name for name in names if pattern.search(name)} for pattern in _WEIGHTS)
    chosen = next((kind for kind in kinds if kind), set())
    if any(name.endswith(".bin") for name in chosen):
        found |= {name for name in names if name.endswith(".bin.index.json")}
    return found | chosen


def _from_s3(
    source: ModelSource,
    open_store: Callable[[StoreLocation], ObjectStore],
    revision: str | None,
    weights: bool,
    should_stop: Callable[[], bool],
) -> LocalModel:
    access = source.store.model_dump() if source.store is not None else {}
    store = open_store(StoreLocation(uri=source.name.rstrip("/"), **access))
    objects = list(store.list())
    if not any(info.key == CONFIG for info in objects):
        raise InvalidInput(
            "ModelNotFound", f"{source.name} holds no {CONFIG}: give the folder of a model", field="spec.model.name"
        )
    digest = _digest(needed(objects, weights=True))
    if revision is not None and digest != revision:
        raise InvalidInput(
            "ModelChanged",
            f"the files of {source.name} are not those that this cache was begun with; bring them back, or make a new "
            "cache (another seed or storage.uri)",
            field="spec.model.name",
        )
    folder = _brought(store, needed(objects, weights=weights), "", f"{source.name}@{digest}", should_stop)
    return LocalModel(_at(source, folder), source.name, digest)


def _brought(
    store: ObjectStore, objects: Sequence[ObjectInfo], prefix: str, version: str, should_stop: Callable[[], bool]
) -> Path:
    name = "model-" + hashlib.sha256(f"{store.uri} {version}".encode()).hexdigest()[:16]
    folder = download_folder(name)
    logger.info("%d files, %d bytes, of %s in %s", len(objects), sum(info.size for info in objects), store.uri, folder)
    download(store, objects, folder, prefix=prefix, should_stop=should_stop)
    return folder


def _digest(objects: Iterable[ObjectInfo]) -> str:
    """Version of a folder of files, by their names, sizes and etags; as long as a commit."""
    told = json.dumps([[info.key, info.size, info.etag] for info in objects])
    return hashlib.sha256(told.encode()).hexdigest()[:40]


def _at(source: ModelSource, folder: Path) -> ModelSource:
    return source.model_copy(update={"name": str(folder), "store": None, "revision": None, "mirror": False})


def _resolve(source: ModelSource) -> str | None:
    return resolve_commit(
        source.name, source.revision, kind="model", name_field="spec.model.name", revision_field="spec.model.revision"
    )


def _snapshot(name: str, commit: str) -> Path:
    """A Hub model's files on this machine."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        files = [sibling.rfilename for sibling in HfApi().model_info(name, revision=commit).siblings or []]
    except OfflineModeIsEnabled:
        return Path(snapshot_download(name, revision=commit, local_files_only=True))
    return Path(snapshot_download(name, revision=commit, allow_patterns=sorted(_chosen(files, weights=True))))

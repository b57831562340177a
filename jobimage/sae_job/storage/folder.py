"""A folder of a store as a store of its own, over the same connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sae_job.storage.base import ObjectInfo, ObjectStore


class StoreFolder:
    """What lies below a folder of another store: keys and URI begin there.

    Args:
        store: the store around it.
        folder: its key, with or without a trailing slash; the whole store when empty.
    """

    def __init__(self, store: ObjectStore, folder: str) -> None:
        self._store = store
        self._prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""

    @property
    def uri(self) -> str:
        return f"{self._store.uri}/{self._prefix}".rstrip("/")

    def get(self, key: str) -> bytes:
        return self._store.get(self._prefix + key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._store.get_range(self._prefix + key, start, length)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        return self._store.read_into(self._prefix + key, start, buffer)

    def head(self, key: str) -> ObjectInfo | None:
        info = self._store.head(self._prefix + key)
        return None if info is None else self._inside(info)

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        return self._inside(self._store.put(self._prefix + key, data, if_absent=if_absent, if_match=if_match))

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        return self._inside(self._store.put_file(self._prefix + key, path))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return map(self._inside, self._store.list(self._prefix + prefix))

    def delete(self, key: str) -> None:
        self._store.delete(self._prefix + key)

    def _inside(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, key=info.key.removeprefix(self._prefix))

"""The interface of an object store, and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class ObjectInfo:
    """What a store knows of one object.

    Attributes:
        key: key below the store's prefix.
        size: bytes.
        etag: opaque tag of the version.
        modified: when it was written, in UTC by the store's clock; None where the store does not tell (in the answer
            to a write). The etag alone tells versions apart.
    """

    key: str
    size: int
    etag: str
    modified: datetime | None = field(default=None, compare=False)


class StoreError(Exception):
    """A store could not do what it was asked; the step may be retried. The message names the URI and never
    credentials."""


class NoSpaceLeft(StoreError):
    """The store is full: trying again cannot help until somebody makes room."""


class ObjectNotFound(StoreError):
    """No object has this key."""


class PreconditionFailed(StoreError):
    """A conditional write found another object (or none) than it expected."""


class ObjectStore(Protocol):
    """Objects below one URI prefix. Every write is atomic: readers see the whole object or none.

    Methods raise `ObjectNotFound`, `PreconditionFailed`, `StoreError` (retries used up, or no space left), and
    `InvalidInput` for what the user must mend: missing bucket, wrong credentials, refused access.
    """

    @property
    def uri(self) -> str:
        """The prefix, without a trailing slash."""
        ...

    def get(self, key: str) -> bytes: ...

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """Bytes `start` to `start + length`; fewer only at the object's end."""
        ...

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `start` on, without a copy of their own; returns how many there were:
        fewer than asked for only at the object's end."""
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """None when there is no such object."""
        ...

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        """Write an object; with `if_absent` only when there is none, with `if_match` only over the version with that
        etag."""
        ...

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        """Upload a file (multipart when large)."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key begins with `prefix`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; no error when there is none."""
        ...


@runtime_checkable
class MapsObjects(Protocol):
    """A store whose objects can be looked at without being copied: files on this machine."""

    def map(self, key: str, start: int, length: int) -> memoryview:
        """Bytes `start` to `start + length` of an object where the system keeps them; fewer only at its end.

        They stay as they are for as long as the view is held, also when the object is replaced or deleted meanwhile.

        Raises:
            ObjectNotFound: no object has this key.
        """
        ...

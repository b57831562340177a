"""Checkpoints on the store: all that a training goes on from, and SAEs ready for use.

Below `checkpoints/<tokens>/`: `<sae>/` is an SAE as the finished job would leave it; `state/<sae>.safetensors` its
weights, optimiser and counters; `state/random.safetensors` the states of torch's generators; `metrics.jsonl` the lines
so far; `state.json` the rest; `checkpoint.json`, written last, holds the SHA-256 of every file: without it there is no
checkpoint. An SAE that broke is not in later checkpoints; the last good `<sae>/` stays, whatever else is removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.config import Layout
from sae_job.saes.files import WEIGHTS_FILE
from sae_job.storage.base import ObjectInfo, ObjectNotFound, ObjectStore
from sae_job.training.observer import Moment

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
PREFIX = "checkpoints/"
MARKER = "checkpoint.json"
STATE = "state.json"
METRICS = "metrics.jsonl"
RANDOM = "state/random.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """A training at rest between two steps, on the CPU.

    Attributes:
        tokens: tokens trained on.
        state: what is no tensor, JSON-able.
        tensors: SAE name -> its tensors; without SAEs that failed.
        random: states of torch's generators.
        metrics: lines of metrics.jsonl so far.
        saes: SAE name -> (ready for use, log10 firing frequencies); only those with finite weights. Empty when loaded.
        moment: when it was taken.
    """

    tokens: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    random: dict[str, Tensor]
    metrics: list[dict[str, Any]]
    saes: dict[str, tuple[SAE, Tensor | None]]
    moment: Moment


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is missing or is not what was written."""


def metrics_lines(metrics: list[dict[str, Any]]) -> bytes:
    """Content of metrics.jsonl."""
    return "".join(f"{json.dumps(line, allow_nan=False)}\n" for line in metrics).encode()


def random_states() -> dict[str, Tensor]:
    """States of torch's global generators."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


class Checkpoints:
    """The checkpoints of one job.

    Args:
        store: the job's output.
        keep: how many finished checkpoints are kept.
        layout: of the SAEs ready for use; see `SAE.save`.
    """

    def __init__(self, store: ObjectStore, *, keep: int, layout: Layout = "saelens5") -> None:
        self._store = store
        self._keep = keep
        self._layout: Layout = layout

    def write(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, then remove what is older than the last `keep`.

        Raises:
            StoreError: the store failed; what was there before is still there.
        """
        folder = _folder(snapshot.tokens)
        recorder = _DigestStore(self._store)
        names = list(snapshot.state["failures"])
        for name, (sae, log_sparsity) in snapshot.saes.items():
            sae.save(recorder, f"{folder}{name}", log_sparsity=log_sparsity, layout=self._layout)
        for name, tensors in snapshot.tensors.items():
            recorder.put(f"{folder}state/{name}.safetensors", save(tensors))
        recorder.put(folder + RANDOM, save(snapshot.random))
        recorder.put(folder + METRICS, metrics_lines(snapshot.metrics))
        recorder.put(folder + STATE, json.dumps(snapshot.state, allow_nan=False).encode())
        marker = {
            "formatVersion": FORMAT_VERSION,
            "tokens": snapshot.tokens,
            "saes": list(snapshot.tensors),
            "broken": [name for name in names if name not in snapshot.saes],
            "sha256": {key.removeprefix(folder): digest for key, digest in recorder.digests.items()},
        }
        self._store.put(folder + MARKER, json.dumps(marker, indent=1).encode())
        self._prune(snapshot.tokens, [name for name in names if name not in snapshot.saes])

    def newest(self, fits: Callable[[dict[str, Any]], bool]) -> Snapshot | None:
        """The newest checkpoint that is whole and whose state `fits`; those that are not are removed, with a warning.

        Args:
            fits: whether a training with this state is to go on; asked before any tensor is read. What it raises ends
                the search, and everything stays.

        Raises:
            StoreError: the store failed.
        """
        for tokens in sorted(self._finished(self._keys()), reverse=True):
            uri = f"{self._store.uri}/{_folder(tokens)}"
            try:
                snapshot = self._load(tokens, fits)
            except CorruptCheckpoint as error:
                logger.warning("the checkpoint %s cannot be used (%s): going back to the one before it", uri, error)
            else:
                if snapshot is not None:
                    return snapshot
                logger.warning("the checkpoint %s is of a training with other settings: it is not used", uri)
            # A newer one than what is written next would otherwise be taken for the newest.
            self._store.delete(_folder(tokens) + MARKER)
        return None

    def remove_all(self, *, keep: Collection[str] = ()) -> None:
        """Remove every checkpoint but the last good weights of the SAEs `keep`; markers go first, so that none is left
        half."""
        keys = self._keys()
        self._delete(keys, self._last_good_folders(keys, keep))

    def last_good(self, sae: str) -> int | None:
        """Tokens of the newest checkpoint that holds an SAE ready for use: with finite weights; None without one.

        Of an SAE that broke it stays, below `checkpoints/<tokens>/<sae>/`, when the checkpoint itself goes.

        Raises:
            StoreError: the store failed.
        """
        return self._last_good(self._keys(), sae)

    @staticmethod
    def _last_good(keys: Collection[str], sae: str) -> int | None:
        # The weights are written last.
        end = f"/{sae}/{WEIGHTS_FILE}"
        names = (key.removeprefix(PREFIX).removesuffix(end) for key in keys if key.endswith(end))
        return max((int(name) for name in names if name.isdecimal()), default=None)

    def _last_good_folders(self, keys: Collection[str], saes: Collection[str]) -> tuple[str, ...]:
        found = ((name, self._last_good(keys, name)) for name in saes)
        return tuple(f"{_folder(tokens)}{name}/" for name, tokens in found if tokens is not None)

    def _load(self, tokens: int, fits: Callable[[dict[str, Any]], bool]) -> Snapshot | None:
        """The checkpoint, or None where it does not fit.

        Raises:
            CorruptCheckpoint: a file is missing or damaged.
        """
        folder = _folder(tokens)
        try:
            marker = json.loads(self._store.get(folder + MARKER))
            digests: dict[str, str] = marker["sha256"]
            if marker["formatVersion"] != FORMAT_VERSION:
                raise CorruptCheckpoint(f"format version {marker['formatVersion']} is not {FORMAT_VERSION}")

            def read(name: str) -> bytes:
                data = self._store.get(folder + name)
                if hashlib.sha256(data).hexdigest() != digests[name]:
                    raise CorruptCheckpoint(f"{name} has another checksum than when it was written")
                return data

            state = json.loads(read(STATE))
            if not fits(state):
                return None
            return Snapshot(
                tokens=tokens,
                state=state,
                tensors={name: load(read(f"state/{name}.safetensors")) for name in marker["saes"]},
                random=load(read(RANDOM)),
                metrics=[json.loads(line) for line in read(METRICS).splitlines()],
                saes={},
                moment=Moment(state["steps_done"], tokens),
            )
        except ObjectNotFound as error:
            raise CorruptCheckpoint(str(error)) from error
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CorruptCheckpoint(f"unreadable: {error}") from error

    def _keys(self) -> list[str]:
        return [info.key for info in self._store.list(PREFIX)]

    def _finished(self, keys: list[str]) -> set[int]:
        """Tokens of the checkpoints that have a marker."""
        folders = (key.removesuffix(f"/{MARKER}") for key in keys if key.endswith(f"/{MARKER}"))
        names = (folder.removeprefix(PREFIX) for folder in folders)
        return {int(name) for name in names if name.isdecimal()}

    def _prune(self, newest: int, broken: Collection[str]) -> None:
        """Remove all but the last `keep` checkpoints, and the last good weights of SAEs that this one lacks."""
        keys = self._keys()
        others = sorted(self._finished(keys) - {newest}, reverse=True)
        kept = (newest, *others[: self._keep - 1])
        self._delete(keys, (*(_folder(tokens) for tokens in kept), *self._last_good_folders(keys, broken)))

    def _delete(self, keys: Collection[str], kept: tuple[str, ...]) -> None:
        """Delete those of the keys that are below none of the folders `kept`, markers first."""
        superfluous = [key for key in keys if not key.startswith(kept)]
        for key in sorted(superfluous, key=lambda key: not key.endswith(f"/{MARKER}")):
            self._store.delete(key)


def _folder(tokens: int) -> str:
    return f"{PREFIX}{tokens}/"


class _DigestStore:
    """A store that notes the SHA-256 of what is written through it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.digests: dict[str, str] = {}

    @property
    def uri(self) -> str:
        return self._store.uri

    def get(self, key: str) -> bytes:
        return self._store.get(key)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        return self._store.get_range(key, start, length)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        return self._store.read_into(key, start, buffer)

    def head(self, key: str) -> ObjectInfo | None:
        return self._store.head(key)

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        self.digests[key] = hashlib.sha256(data).hexdigest()
        return self._store.put(key, data, if_absent=if_absent, if_match=if_match)

    def put_file(self, key: str, path: Path) -> ObjectInfo:
        with path.open("rb") as file:
            self.digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._store.put_file(key, path)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._store.list(prefix)

    def delete(self, key: str) -> None:
        self._store.delete(key)

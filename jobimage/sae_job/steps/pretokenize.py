"""Tokenize a data set once into contexts, as parquet files that this product, `datasets` and SAELens read."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from sae_job.errors import InvalidInput, Stopped
from sae_job.storage.base import ObjectStore
from sae_job.text.contexts import ContextPacker
from sae_job.text.documents import Documents
from sae_job.text.local_files import METADATA_FILE
from sae_job.text.tokenize import TextTokenizer
from sae_operator import __version__
from sae_operator.api.activation_cache import DatasetSource, Separators

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

SHARD_BYTES = 2**26
# So many tokens are held and shuffled at once, 1 GiB; longer data sets are shuffled in parts of this size.
SHUFFLE_TOKENS = 2**28
COLUMN = "input_ids"
_SHARD = re.compile(r"^data/train-\d{5}\.parquet$")
_BATCH_ROWS, _BATCH_CHARACTERS = 256, 2**21


@dataclass(frozen=True)
class Pretokenization:
    """What to make.

    Attributes:
        tokenizer_name: what the tokenizer is called, for whoever compares it with a model's.
        dataset: the text.
        context_size: tokens of each context.
        separators: tokens that packing inserts; what is None inserts nothing.
        shuffle: put the contexts in an order that `seed` decides: of the whole data set up to `shuffle_tokens`, of each
            part of about that size in a longer one.
        seed: of that order.
        max_tokens: make no more tokens than this; None for all of the text.
        shard_bytes: token ids of a file, in bytes of 4.
        shuffle_tokens: tokens that are held in memory to be shuffled.
    """

    tokenizer_name: str
    dataset: DatasetSource
    context_size: int
    separators: Separators
    shuffle: bool = True
    seed: int = 0
    max_tokens: int | None = None
    shard_bytes: int = SHARD_BYTES
    shuffle_tokens: int = SHUFFLE_TOKENS

    @property
    def contexts_per_file(self) -> int:
        return max(1, self.shard_bytes // (4 * self.context_size))

    @property
    def contexts_per_part(self) -> int:
        """Contexts that are shuffled together, of whole files."""
        if not self.shuffle:
            return self.contexts_per_file
        return max(1, self.shuffle_tokens // (self.context_size * self.contexts_per_file)) * self.contexts_per_file

    def metadata(self) -> dict[str, Any]:
        """What `sae_lens.json` says; tokens as they were written, not as ids."""
        return {
            "sae_operator_version": __version__,
            "tokenizer_name": self.tokenizer_name,
            "original_dataset": self.dataset.path,
            "original_dataset_name": self.dataset.name,
            "original_split": self.dataset.split,
            "original_data_files": self.dataset.data_files or None,
            "original_column_name": self.dataset.column,
            "context_size": self.context_size,
            "shuffled": self.shuffle,
            "seed": self.seed if self.shuffle else None,
            "begin_batch_token": _written(self.separators.begin_context),
            "begin_sequence_token": _written(self.separators.begin_document),
            "sequence_separator_token": _written(self.separators.between_documents),
        }


class Output(Protocol):
    """Where files go. A data set is finished once its metadata file is there."""

    def begin(self) -> None:
        """Raises InvalidInput when a finished data set is there."""
        ...

    def put(self, key: str, data: bytes) -> None: ...

    def finish(self, keys: set[str], metadata: bytes) -> None:
        """Remove files of an unfinished run that are not among `keys`, then write the metadata."""
        ...


@dataclass(frozen=True)
class StoreOutput:
    """A folder of an object store."""

    store: ObjectStore

    def begin(self) -> None:
        if self.store.head(METADATA_FILE) is not None:
            raise InvalidInput("OutputTaken", f"{self.store.uri} holds a data set already; choose another place")

    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)

    def finish(self, keys: set[str], metadata: bytes) -> None:
        for info in list(self.store.list("data/")):
            if _SHARD.match(info.key) and info.key not in keys:
                self.store.delete(info.key)
        self.store.put(METADATA_FILE, metadata)


@dataclass(frozen=True)
class HubOutput:
    """A data set's repository on the Hugging Face Hub; data and metadata go to the same revision."""

    api: HfApi
    repository: str
    revision: str = "main"
    private: bool = False

    def begin(self) -> None:
        self.api.create_repo(self.repository, repo_type="dataset", private=self.private, exist_ok=True)
        if self.revision != "main":
            self.api.create_branch(self.repository, branch=self.revision, repo_type="dataset", exist_ok=True)
        if METADATA_FILE in self._files():
            raise InvalidInput(
                "OutputTaken", f"{self.repository}@{self.revision} holds a data set already; choose another revision"
            )

    def put(self, key: str, data: bytes) -> None:
        self.api.upload_file(
            path_or_fileobj=data,
            path_in_repo=key,
            repo_id=self.repository,
            repo_type="dataset",
            revision=self.revision,
            commit_message=f"Add {key}",
        )

    def finish(self, keys: set[str], metadata: bytes) -> None:
        for key in self._files():
            if _SHARD.match(key) and key not in keys:
                self.api.delete_file(key, self.repository, repo_type="dataset", revision=self.revision)
        self.put(METADATA_FILE, metadata)

    def _files(self) -> list[str]:
        return self.api.list_repo_files(self.repository, repo_type="dataset", revision=self.revision)


def pretokenize_documents(
    wanted: Pretokenization,
    documents: Documents,
    tokenizer: TextTokenizer,
    outputs: list[Output],
    *,
    progress: Callable[[int], None] = lambda contexts: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Store contexts in files `data/train-00000.parquet`, …, then the metadata; returns how many contexts there are.

    Only the very last, incomplete context is dropped. An unfinished earlier run is written over.

    Args:
        documents: the text that `wanted.dataset` names.
        outputs: every one gets all files.
        progress: told the contexts that are made so far.

    Raises:
        InvalidInput: the data set holds token ids, or too little text; a special token that the tokenizer lacks; an
            output holds a finished data set.
        Stopped: `should_stop` said so.
    """
    if documents.tokenized:
        raise InvalidInput(
            "DatasetTokenized",
            f"{wanted.dataset.path!r} holds token ids already; name a column of text",
            field="spec.dataset.column",
        )
    special = tokenizer.packing(prepend_bos=False, separators=wanted.separators)
    packer = ContextPacker(wanted.context_size, special)
    for output in outputs:
        output.begin()
    limit = None if wanted.max_tokens is None else wanted.max_tokens // wanted.context_size
    files = _Files(wanted, outputs)
    part = _Part(wanted.context_size, wanted.contexts_per_file)
    made = 0
    for context in _contexts(documents, tokenizer, packer, should_stop):
        if limit is not None and made >= limit:
            break
        if len(part) == wanted.contexts_per_part:
            files.store(part)
            part = _Part(wanted.context_size, wanted.contexts_per_file)
            if wanted.shuffle and files.parts == 1:
                logger.warning(
                    "more contexts than are shuffled at once: each part of %d contexts is shuffled for itself",
                    wanted.contexts_per_part,
                )
        part.append(context)
        made += 1
        progress(made)
    if not made:
        raise InvalidInput(
            "NoTokens",
            f"the text of {wanted.dataset.path!r} does not fill one context of {wanted.context_size}; give more text",
            field="spec.dataset.path",
        )
    files.store(part)
    metadata = (json.dumps(wanted.metadata(), indent=2, ensure_ascii=False) + "\n").encode()
    for output in outputs:
        output.finish(files.keys, metadata)
    return made


class _Part:
    """Contexts in memory, in arrays of `rows` contexts: growing one array would hold everything twice."""

    def __init__(self, context_size: int, rows: int) -> None:
        self._shape = (rows, context_size)
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, context: Tensor) -> None:
        row = self._length % self._shape[0]
        if row == 0:
            self._arrays.append(np.empty(self._shape, dtype=np.int32))
        self._arrays[-1][row] = context.numpy()
        self._length += 1

    def take(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Contexts at these places, int32 [places, context_size]."""
        found = np.empty((len(places), self._shape[1]), dtype=np.int32)
        arrays, rows = np.divmod(places, self._shape[0])
        for number in np.unique(arrays):
            here = arrays == number
            found[here] = self._arrays[number][rows[here]]
        return found


class _Files:
    """Numbers and stores the files."""

    def __init__(self, wanted: Pretokenization, outputs: list[Output]) -> None:
        self._wanted = wanted
        self._outputs = outputs
        self.keys: set[str] = set()
        self.parts = 0

    def store(self, part: _Part) -> None:
        order = np.arange(len(part))
        if self._wanted.shuffle:
            order = np.random.default_rng([self._wanted.seed, self.parts]).permutation(len(part))
        self.parts += 1
        size = self._wanted.contexts_per_file
        for start in range(0, len(order), size):
            key = f"data/train-{len(self.keys):05d}.parquet"
            data = encode_parquet(part.take(order[start : start + size]))
            for output in self._outputs:
                output.put(key, data)
            self.keys.add(key)


def encode_parquet(contexts: np.ndarray[Any, Any]) -> bytes:
    """A parquet file with the column `input_ids`.

    Args:
        contexts: int32 [contexts, context_size].
    """
    import pyarrow
    import pyarrow.parquet

    offsets = np.arange(len(contexts) + 1, dtype=np.int32) * contexts.shape[1]
    column = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(contexts.reshape(-1)))
    buffer = io.BytesIO()
    # Small groups, so that a reader that streams holds little.
    group = max(1, 2**20 // contexts.shape[1])
    pyarrow.parquet.write_table(pyarrow.table({COLUMN: column}), buffer, row_group_size=group)
    return buffer.getvalue()


def _contexts(
    documents: Documents, tokenizer: TextTokenizer, packer: ContextPacker, should_stop: Callable[[], bool]
) -> Iterator[Tensor]:
    for texts in _batches(documents.texts()):
        if should_stop():
            raise Stopped("stopped; the data set has no metadata file yet: the same command begins anew")
        for document in tokenizer.encode(texts):
            yield from packer.feed(document)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _written(token: str | None) -> str | int | None:
    if token is None or token == "none":
        return None
    return int(token) if token.isdigit() else token

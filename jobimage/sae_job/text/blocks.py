"""Blocks: contexts on the store, a fixed number to a block, in an order shuffled inside the block.

Block b is a pure function of the spec and b, whatever number of rows is asked for. Its sidecar, written after it,
carries where the data set stood at its end, so that the next block can be made by another process, at another time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.contexts import ContextPacker, PackerState
from sae_job.text.documents import Documents
from sae_job.text.plan import (
    DatasetRecord,
    IndexPart,
    TokenizerRecord,
    block_key,
    block_sidecar_key,
    contexts_per_block,
)
from sae_job.text.tokenize import TextTokenizer
from sae_operator.api.activation_cache import ActivationCacheSpec

# Rows are tokenized in batches of at most so many rows and characters.
_BATCH_ROWS = 256
_BATCH_CHARACTERS = 2**21


class BlockRecord(IndexPart):
    """Sidecar of a block.

    `usable` holds, per context in shuffled order, the positions that may become rows. The rest is the state behind the
    block: rows of the data set that are used up, and how far the next one and the unfinished context are.
    """

    sha256: str
    contexts: int
    usable: list[int]
    rows_consumed: int
    document_offset: int
    at_start: bool
    carry: list[int]
    exhausted: bool
    dataset: DatasetRecord
    tokenizer: TokenizerRecord

    def encode(self) -> bytes:
        return (self.model_dump_json(by_alias=True) + "\n").encode()


def read_block_records(store: ObjectStore) -> list[BlockRecord]:
    """Sidecars of the complete blocks that the store holds, from block 0 on without a gap.

    Raises:
        InvalidInput: a sidecar cannot be read.
    """
    records: list[BlockRecord] = []
    while True:
        key = block_sidecar_key(len(records))
        try:
            data = store.get(key)
        except ObjectNotFound:
            return records
        try:
            records.append(BlockRecord.model_validate_json(data))
        except ValidationError as error:
            raise InvalidInput(
                "BlockUnreadable", f"{store.uri}/{key} is damaged; delete it and retry, and the block is made again"
            ) from error


def read_block(store: ObjectStore, block: int, *, sha256: str) -> Tensor:
    """Contexts of a block in shuffled order, int32 [contexts, context_size].

    Raises:
        InvalidInput: the block is missing, or differs from its checksum.
    """
    from safetensors.torch import load

    key = block_key(block)
    try:
        data = store.get(key)
    except ObjectNotFound as error:
        raise InvalidInput("BlockMissing", _mend(store, key, block, "is missing")) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InvalidInput("BlockCorrupt", _mend(store, key, block, "differs from its checksum"))
    return load(data)["contexts"]


def _mend(store: ObjectStore, key: str, block: int, trouble: str) -> str:
    return f"{store.uri}/{key} {trouble}; delete {block_sidecar_key(block)} there and retry, and it is made again"


def shuffled_order(seed: int, block: int, contexts: int) -> np.ndarray:
    """Order of the contexts in a block: place -> index in the order of the data set."""
    return np.random.default_rng([seed, block]).permutation(contexts)


class BlockBuilder:
    """Makes a cache's blocks one after the other, from where the last complete one ended."""

    def __init__(
        self,
        spec: ActivationCacheSpec,
        documents: Documents,
        tokenizer: TextTokenizer,
        tokenizer_record: TokenizerRecord,
        *,
        vocabulary: int,
        previous: BlockRecord | None,
        first_block: int,
        between_batches: Callable[[], None],
    ) -> None:
        """
        Args:
            vocabulary: the model takes token ids below this.
            previous: sidecar of the block before the first one to make.
            between_batches: called between batches of texts; may raise to end the work.
        """
        self._spec = spec
        self._tokenizer = tokenizer
        self._tokenizer_record = tokenizer_record
        self._documents = documents
        self._vocabulary = vocabulary
        self._between_batches = between_batches
        self._next_block = first_block
        self._rows_consumed = previous.rows_consumed if previous else 0
        state = (
            PackerState(tuple(previous.carry), previous.document_offset, previous.at_start)
            if previous
            else PackerState()
        )
        special = tokenizer.packing(prepend_bos=spec.sampling.prepend_bos)
        self._packer = ContextPacker(spec.context_size, special, state)
        self._contexts = self._stream()
        self.tokens_seen = 0
        """Tokens of text that this builder has read, special tokens not counted."""

    def _stream(self) -> Iterator[Tensor]:
        batch: list[str] = []
        characters = 0
        for text in self._documents.texts(skip=self._rows_consumed):
            batch.append(text)
            characters += len(text)
            if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
                yield from self._pack(batch)
                batch, characters = [], 0
        if batch:
            yield from self._pack(batch)

    def _pack(self, texts: list[str]) -> Iterator[Tensor]:
        self._between_batches()
        for document in self._tokenizer.encode(texts):
            self.tokens_seen += len(document)
            yield from self._packer.feed(document)
            self._rows_consumed += 1

    def write_next(self, store: ObjectStore) -> BlockRecord | None:
        """Make the next block and store it, then its sidecar; None when the data set has no whole context left.

        Raises:
            InvalidInput: the tokenizer gives ids that the model does not take.
        """
        from safetensors.torch import save

        wanted = contexts_per_block(self._spec.context_size)
        contexts: list[Tensor] = []
        for context in self._contexts:
            contexts.append(context.to(torch.int32))
            if len(contexts) == wanted:
                break
        if not contexts:
            return None
        state = self._packer.state
        order = shuffled_order(self._spec.seed, self._next_block, len(contexts))
        stacked = torch.stack(contexts)[torch.from_numpy(order)]
        if int(stacked.max()) >= self._vocabulary:
            raise InvalidInput(
                "TokenizerMismatch",
                f"the tokenizer gives token id {int(stacked.max())}, the model takes {self._vocabulary} ids",
                field="spec.model.name",
            )
        data = save({"contexts": stacked})
        record = BlockRecord(
            sha256=hashlib.sha256(data).hexdigest(),
            contexts=len(stacked),
            usable=self._usable(stacked).tolist(),
            rows_consumed=self._rows_consumed,
            document_offset=state.document_offset,
            at_start=state.at_start,
            carry=list(state.carry),
            exhausted=len(contexts) < wanted,
            dataset=self._documents.record,
            tokenizer=self._tokenizer_record,
        )
        store.put(block_key(self._next_block), data)
        store.put(block_sidecar_key(self._next_block), record.encode())
        self._next_block += 1
        return record

    def _usable(self, contexts: Tensor) -> Tensor:
        """Positions of each context that may become rows, int64 [contexts]."""
        if not self._spec.sampling.exclude_special_tokens:
            return torch.full((len(contexts),), contexts.shape[1], dtype=torch.int64)
        special = torch.tensor(self._tokenizer_record.special_token_ids, dtype=contexts.dtype)
        return (~torch.isin(contexts, special)).sum(dim=1)

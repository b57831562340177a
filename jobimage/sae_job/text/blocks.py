"""Blocks: contexts on the store, a fixed number to a block, in an order shuffled inside the block.

Block b is a pure function of the spec and b, whatever number of rows is asked for. Its sidecar, written after it,
carries where the data set stood at its end, so that the next block can be made by another process, at another time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.text.contexts import ContextPacker, PackerState, SpecialTokens
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
from sae_job.text.usable import excluded_token_ids, usable_positions
from sae_operator.api.activation_cache import ActivationCacheSpec

logger = logging.getLogger(__name__)

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
        tokenizer: TextTokenizer | None,
        tokenizer_record: TokenizerRecord,
        *,
        vocabulary: int,
        previous: BlockRecord | None,
        first_block: int,
        between_batches: Callable[[], None],
    ) -> None:
        """
        Args:
            documents: text, or token ids that become contexts as they are.
            tokenizer: only for text.
            vocabulary: the model takes token ids below this.
            previous: sidecar of the block before the first one to make.
            between_batches: called between batches of texts; may raise to end the work.

        Raises:
            InvalidInput: tokenizer or model lack a special token that the spec names.
        """
        if tokenizer is None and not documents.tokenized:
            raise ValueError("text needs a tokenizer")
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
        self._packer = ContextPacker(spec.context_size, packing_of(spec, documents, tokenizer, vocabulary), state)
        self._contexts = self._token_rows() if documents.tokenized else self._stream()
        self._told_longer = False
        self.tokens_seen = 0
        """Tokens that this builder has read, special tokens not counted."""

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
        assert self._tokenizer is not None
        for document in self._tokenizer.encode(texts):
            self.tokens_seen += len(document)
            yield from self._packer.feed(document)
            self._rows_consumed += 1

    def _token_rows(self) -> Iterator[Tensor]:
        """The first tokens of each row, as they are."""
        size = self._spec.context_size
        path = self._spec.dataset.path
        for number, row in self._documents.token_rows(skip=self._rows_consumed):
            if number % _BATCH_ROWS == 0:
                self._between_batches()
            if len(row) < size:
                raise InvalidInput(
                    "RowTooShort",
                    f"row {number} of {path!r} has {len(row)} token ids, fewer than contextSize {size}; lower "
                    "contextSize, or give longer rows",
                    field="spec.contextSize",
                )
            if len(row) > size and not self._told_longer:
                logger.warning(
                    "row %d of %r has %d token ids; the first %d (contextSize) are used, the rest is thrown away, "
                    "here and in other rows",
                    number,
                    path,
                    len(row),
                    size,
                )
                self._told_longer = True
            context = torch.tensor(row[:size], dtype=torch.int64)
            self._check_ids(context, f"row {number} of {path!r}", "spec.dataset.path")
            self.tokens_seen += size
            self._rows_consumed += 1
            yield context

    def _check_ids(self, tokens: Tensor, source: str, field: str) -> None:
        lowest, highest = (int(value) for value in tokens.aminmax())
        if lowest < 0 or highest >= self._vocabulary:
            raise InvalidInput(
                "TokenizerMismatch",
                f"{source} gives token id {lowest if lowest < 0 else highest}, the model takes {self._vocabulary} ids",
                field=field,
            )

    def write_next(self, store: ObjectStore) -> BlockRecord | None:
        """Make the next block and store it, then its sidecar; None when the data set has no whole context left.

        Raises:
            InvalidInput: tokenizer or data set give ids that the model does not take; a row of token ids is too short.
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
        if not self._documents.tokenized:
            self._check_ids(stacked, "the tokenizer", "spec.model.name")
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
        sampling = self._spec.sampling
        excluded = excluded_token_ids(sampling, self._tokenizer_record.special_token_ids)
        return usable_positions(contexts, excluded, sampling.positions.of(self._spec.context_size)).sum(dim=1)


def packing_of(
    spec: ActivationCacheSpec, documents: Documents, tokenizer: TextTokenizer | None, vocabulary: int
) -> SpecialTokens:
    """Tokens that packing inserts: none into rows of token ids.

    Args:
        vocabulary: the model takes token ids below this.

    Raises:
        InvalidInput: tokenizer or model lack one that the spec names.
    """
    if documents.tokenized or tokenizer is None:
        return SpecialTokens()
    return tokenizer.packing(
        prepend_bos=spec.sampling.prepend_bos, separators=spec.sampling.separators, vocabulary=vocabulary
    )

"""Documents to contexts of equal length: concatenate, separate, cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that packing inserts, each only where the next token is not already that id; None inserts nothing.

    Attributes:
        begin_context: stands at position 0 of every context.
        begin_document: is the first token of every document.
        separator: stands between two documents that share a context.
    """

    begin_context: int | None = None
    begin_document: int | None = None
    separator: int | None = None


@dataclass(frozen=True)
class Append:
    """State after one append step.

    Attributes:
        context: tokens of the context so far, int64 [at most context_size].
        offset: tokens of the document that are used up; may lie beyond its end.
        at_start: whether neither a token of the document nor its `begin_document` is placed yet.
    """

    context: Tensor
    offset: int
    at_start: bool


def append_tokens(
    context: Tensor | None,
    document: Tensor,
    offset: int,
    *,
    at_start: bool,
    context_size: int,
    special: SpecialTokens,
) -> Append:
    """Put as much of a document into the current context as fits, with the special tokens due before it.

    Args:
        context: the unfinished context, int64 [< context_size]; None begins a new one.
        document: int64 [length].
        offset: first token of the document that is not placed yet, below its length.
        at_start: as in `Append`.
    """
    prefix: list[int] = []
    first = int(document[offset])
    if at_start and special.begin_document is not None and first != special.begin_document:
        first = special.begin_document
        prefix.append(first)
    before = special.begin_context if context is None else special.separator
    if before is not None and first != before:
        prefix.insert(0, before)
    room = context_size if context is None else context_size - len(context)
    wanted = max(room - len(prefix), 0)
    pieces = [] if context is None else [context]
    if prefix:
        pieces.append(torch.tensor(prefix[:room], dtype=torch.int64, device=document.device))
    pieces.append(document[offset : offset + wanted])
    # `begin_document` ends the prefix, so it is placed exactly when the whole prefix fits.
    placed = wanted > 0 or (first != int(document[offset]) and len(prefix) <= room)
    return Append(
        context=torch.cat(pieces) if len(pieces) > 1 else pieces[0],
        offset=offset + wanted,
        at_start=at_start and not placed,
    )


@dataclass(frozen=True)
class PackerState:
    """Where packing stands, between two contexts.

    Attributes:
        carry: tokens of the unfinished context.
        document_offset: tokens used up of the document that comes next.
        at_start: whether that document still has its start before it.
    """

    carry: tuple[int, ...] = ()
    document_offset: int = 0
    at_start: bool = True


class ContextPacker:
    """Packs documents into contexts one by one; its state can be taken after any context and resumed from.

    The last, incomplete context stays in the state and is never emitted. Time is linear in the tokens.
    """

    def __init__(self, context_size: int, special: SpecialTokens, state: PackerState | None = None) -> None:
        """Raises ValueError when a context has no room for anything but a special token."""
        if context_size < 1 + (special.begin_context is not None):
            raise ValueError(f"contexts of {context_size} tokens have no room for text")
        self._context_size = context_size
        self._special = special
        state = state or PackerState()
        self._context = torch.tensor(state.carry, dtype=torch.int64) if state.carry else None
        self._offset = state.document_offset
        self._at_start = state.at_start

    def feed(self, document: Tensor) -> Iterator[Tensor]:
        """Contexts that this document completes, int64 [context_size], on the document's device.

        After resuming in the middle of a document, the first document fed is that one, whole.

        Raises:
            ValueError: the document is not 1-D.
        """
        if document.ndim != 1:
            raise ValueError(f"a document is a 1-D tensor of token ids, not one of shape {tuple(document.shape)}")
        document = document.detach().to(torch.int64)
        if self._context is not None:
            self._context = self._context.to(document.device)
        while self._offset < len(document):
            step = append_tokens(
                self._context,
                document,
                self._offset,
                at_start=self._at_start,
                context_size=self._context_size,
                special=self._special,
            )
            self._offset, self._at_start = step.offset, step.at_start
            if len(step.context) == self._context_size:
                self._context = None
                yield step.context
            else:
                self._context = step.context
        self._offset, self._at_start = 0, True

    @property
    def state(self) -> PackerState:
        """The state between two contexts: after a context was taken from `feed`, or after its end."""
        carry = () if self._context is None else tuple(self._context.tolist())
        return PackerState(carry=carry, document_offset=self._offset, at_start=self._at_start)


def pack_contexts(documents: Iterable[Tensor], context_size: int, special: SpecialTokens) -> Iterator[Tensor]:
    """Cut a stream of documents into contexts.

    Args:
        documents: integer tensors [length]; empty ones contribute nothing.

    Yields:
        int64 [context_size], lazily; the last, incomplete context is dropped.

    Raises:
        ValueError: a document is not 1-D.
    """
    packer = ContextPacker(context_size, special)
    for document in documents:
        yield from packer.feed(document)

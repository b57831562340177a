"""Documents to contexts: which tokens stand where."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.text.contexts import ContextPacker, PackerState, SpecialTokens, append_tokens, pack_contexts

NONE = SpecialTokens()


def documents(*bounds: tuple[int, int]) -> list[torch.Tensor]:
    """Documents of consecutive numbers, both bounds included."""
    return [torch.arange(first, last + 1) for first, last in bounds]


def packed(texts: list[torch.Tensor], special: SpecialTokens, size: int = 5) -> list[list[int]]:
    return [context.tolist() for context in pack_contexts(texts, size, special)]


FOUR = documents((0, 2), (3, 9), (10, 16), (17, 18))
FIVE = documents((0, 2), (3, 7), (8, 10), (11, 16), (17, 18))


def test_documents_run_together_without_special_tokens() -> None:
    whole = documents((0, 2), (3, 9), (10, 16), (17, 19))
    assert packed(whole, NONE) == torch.arange(20).reshape(4, 5).tolist()


def test_the_last_incomplete_context_is_dropped() -> None:
    assert packed(FOUR, NONE) == torch.arange(15).reshape(3, 5).tolist()


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (
            SpecialTokens(begin_context=999),
            [[999, 0, 1, 2, 3], [999, 4, 5, 6, 7], [999, 8, 9, 10, 11], [999, 12, 13, 14, 15]],
        ),
        (
            SpecialTokens(begin_document=998),
            [[998, 0, 1, 2, 998], [3, 4, 5, 6, 7], [8, 9, 998, 10, 11], [12, 13, 14, 15, 16]],
        ),
        (
            SpecialTokens(separator=997),
            [[0, 1, 2, 997, 3], [4, 5, 6, 7, 8], [9, 997, 10, 11, 12], [13, 14, 15, 16, 997]],
        ),
    ],
)
def test_each_special_token_has_its_place(special: SpecialTokens, expected: list[list[int]]) -> None:
    assert packed(FOUR, special) == expected


def test_a_document_keeps_its_own_first_token_when_only_the_separator_still_fitted() -> None:
    special = SpecialTokens(begin_context=999, begin_document=998, separator=997)
    assert packed(FIVE, special) == [
        [999, 998, 0, 1, 2],
        [999, 998, 3, 4, 5],
        [999, 6, 7, 997, 998],
        [999, 8, 9, 10, 997],
        [999, 998, 11, 12, 13],
        [999, 14, 15, 16, 997],
    ]


def test_equal_special_tokens_collapse_into_one() -> None:
    special = SpecialTokens(begin_context=999, begin_document=999, separator=999)
    assert packed(FIVE, special) == [
        [999, 0, 1, 2, 999],
        [999, 3, 4, 5, 6],
        [999, 7, 999, 8, 9],
        [999, 10, 999, 11, 12],
        [999, 13, 14, 15, 16],
    ]


def test_bos_and_separator_give_a_stream_cut_at_the_context_size() -> None:
    bos = SpecialTokens(begin_context=0, separator=0)
    texts = [torch.tensor([1, 2, 3, 4])] * 4
    assert packed(texts, bos, size=6) == [[0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 0]]


@pytest.mark.parametrize(
    ("context", "document", "offset", "at_start", "special", "expected", "next_offset"),
    [
        (None, range(10), 1, False, NONE, [1, 2, 3, 4, 5], 6),
        (None, range(10), 2, False, SpecialTokens(begin_context=999), [999, 2, 3, 4, 5], 6),
        (None, [999, 1, 2, 3], 0, True, SpecialTokens(begin_context=999), [999, 1, 2, 3], 5),
        ([0, 1], range(10), 0, True, SpecialTokens(begin_document=998, separator=997), [0, 1, 997, 998, 0], 1),
        ([0, 1], range(10), 0, True, SpecialTokens(begin_document=998, separator=998), [0, 1, 998, 0, 1], 2),
        ([0, 1], range(10), 0, False, SpecialTokens(begin_document=998, separator=997), [0, 1, 997, 0, 1], 2),
        *(
            ([0, 1, 2, 3], range(10), offset, True, SpecialTokens(None, 998, 997), [0, 1, 2, 3, 997], offset)
            for offset in (0, 3, 9)
        ),
    ],
)
def test_one_append_step(
    context: list[int] | None,
    document: list[int],
    offset: int,
    at_start: bool,
    special: SpecialTokens,
    expected: list[int],
    next_offset: int,
) -> None:
    step = append_tokens(
        None if context is None else torch.tensor(context),
        torch.tensor(list(document)),
        offset,
        at_start=at_start,
        context_size=5,
        special=special,
    )
    assert (step.context.tolist(), step.offset) == (expected, next_offset)


def test_a_document_that_is_not_one_dimensional_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        list(pack_contexts([torch.zeros(2, 3, dtype=torch.int64)], 5, NONE))


def test_a_context_with_room_for_nothing_but_bos_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        ContextPacker(1, SpecialTokens(begin_context=0))


def test_contexts_are_int64_without_gradient() -> None:
    (context,) = pack_contexts([torch.arange(5, dtype=torch.int32)], 5, NONE)
    assert context.dtype == torch.int64
    assert not context.requires_grad


def test_a_long_document_takes_linear_time() -> None:
    stream = pack_contexts([torch.arange(10_000_000)], 5, SpecialTokens(begin_context=999))
    first = [next(stream) for _ in range(50_000)]
    assert all(int(context[0]) == 999 for context in first)
    assert first[-1].tolist() == [999, 199_996, 199_997, 199_998, 199_999]


texts = st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=8)
ids = st.one_of(st.none(), st.integers(0, 6))
specials = st.builds(SpecialTokens, begin_context=ids, begin_document=ids, separator=ids)


@given(texts, st.integers(1, 7))
def test_without_special_tokens_contexts_are_the_stream(rows: list[list[int]], size: int) -> None:
    stream = [token for row in rows for token in row]
    whole = len(stream) // size * size
    contexts = packed([torch.tensor(row, dtype=torch.int64) for row in rows], NONE, size)
    assert [token for context in contexts for token in context] == stream[:whole]


@given(texts, st.integers(2, 7), specials)
def test_every_context_is_full_and_begins_as_it_should(
    rows: list[list[int]], size: int, special: SpecialTokens
) -> None:
    for context in packed([torch.tensor(row, dtype=torch.int64) for row in rows], special, size):
        assert len(context) == size
        assert special.begin_context in (None, context[0])


@given(texts, st.integers(2, 7), specials)
def test_no_token_of_the_text_is_lost_or_moved(rows: list[list[int]], size: int, special: SpecialTokens) -> None:
    stream = [token + 10 for row in rows for token in row]
    contexts = packed([torch.tensor(row, dtype=torch.int64) + 10 for row in rows], special, size)
    kept = [token for context in contexts for token in context if token >= 10]
    assert kept == stream[: len(kept)]


@given(texts, st.integers(2, 7), specials, st.integers(0, 20))
def test_packing_resumes_from_the_state_after_any_context(
    rows: list[list[int]], size: int, special: SpecialTokens, stop_after: int
) -> None:
    documents = [torch.tensor(row, dtype=torch.int64) for row in rows]
    whole = packed(documents, special, size)
    packer = ContextPacker(size, special)
    contexts: list[list[int]] = []
    state, consumed = PackerState(), 0

    def first_part() -> tuple[PackerState, int]:
        for number, document in enumerate(documents):
            for context in packer.feed(document):
                contexts.append(context.tolist())
                if len(contexts) == stop_after:
                    return packer.state, number
        return packer.state, len(documents)

    state, consumed = first_part()
    resumed = ContextPacker(size, special, state)
    for document in documents[consumed:]:
        contexts += [context.tolist() for context in resumed.feed(document)]
    assert contexts == whole

"""Dead latents and firing frequencies, counted in tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.training.dead_latents import DeadLatents, FiringFrequency


def fired(*flags: int) -> torch.Tensor:
    return torch.tensor(flags, dtype=torch.bool)


def test_a_latent_dies_after_the_tokens_without_firing() -> None:
    dead = DeadLatents(2, dead_after_tokens=20, total_tokens=1000, device="cpu")
    for _ in range(4):
        dead.update(fired(1, 0), 5)
    assert dead.tokens_since_fired.tolist() == [0, 20]
    assert dead.mask().tolist() == [False, True]
    dead.update(fired(0, 1), 5)
    assert dead.mask().tolist() == [False, False]


def test_in_a_run_shorter_than_that_never_having_fired_is_dead() -> None:
    dead = DeadLatents(3, dead_after_tokens=1000, total_tokens=100, device="cpu")
    assert not dead.mask().any()
    dead.update(fired(1, 0, 0), 10)
    dead.update(fired(0, 1, 0), 10)
    assert dead.mask().tolist() == [False, False, True]


@given(
    dead_after=st.integers(1, 40),
    total=st.integers(1, 80),
    batches=st.lists(st.tuples(st.integers(1, 20), st.booleans(), st.booleans()), max_size=8),
)
def test_nothing_is_dead_while_nothing_can_be(
    dead_after: int, total: int, batches: list[tuple[int, bool, bool]]
) -> None:
    dead = DeadLatents(2, dead_after_tokens=dead_after, total_tokens=total, device="cpu")
    for rows, first, second in batches:
        assert dead.may_be_any or not dead.mask().any()
        dead.update(fired(first, second), rows)
    assert dead.may_be_any or not dead.mask().any()


def test_a_restored_counter_goes_on_alike() -> None:
    for total in (10, 1000):
        whole = DeadLatents(2, dead_after_tokens=20, total_tokens=total, device="cpu")
        whole.update(fired(1, 0), 16)
        resumed = DeadLatents(2, dead_after_tokens=20, total_tokens=total, device="cpu")
        resumed.restore({name: tensor.clone() for name, tensor in whole.state().items()})
        for counter in (whole, resumed):
            counter.update(fired(0, 0), 4)
        assert resumed.mask().tolist() == whole.mask().tolist() == [False, True]


def test_no_frequency_before_the_first_row() -> None:
    assert FiringFrequency(2, window_tokens=10, device="cpu").log10() is None


def test_frequencies_are_of_rows_really_seen() -> None:
    frequency = FiringFrequency(3, window_tokens=1000, device="cpu")
    frequency.update(torch.tensor([3, 0, 1]), 3)
    frequency.update(torch.tensor([7, 0, 0]), 7)
    logarithms = frequency.log10()
    assert logarithms is not None
    assert logarithms.dtype == torch.float32
    torch.testing.assert_close(logarithms, torch.tensor([0.0, -10.0, -1.0]))


def test_right_after_a_window_closes_the_estimate_rests_on_the_whole_window() -> None:
    frequency = FiringFrequency(1, window_tokens=100, device="cpu")
    frequency.update(torch.tensor([100]), 100)
    frequency.update(torch.tensor([10]), 100)
    frequency.update(torch.tensor([1]), 1)
    logarithms = frequency.log10()
    assert logarithms is not None
    torch.testing.assert_close(logarithms, torch.log10(torch.tensor([11 / 101])))


@given(st.lists(st.integers(0, 8), min_size=2, max_size=30), st.integers(1, 29))
def test_a_restored_estimate_goes_on_alike(counts: list[int], cut: int) -> None:
    whole = FiringFrequency(1, window_tokens=40, device="cpu")
    resumed = FiringFrequency(1, window_tokens=40, device="cpu")
    for index, count in enumerate(counts):
        if index == cut:
            resumed.restore({name: tensor.clone() for name, tensor in whole.state().items()})
        whole.update(torch.tensor([count]), 8)
        if index >= cut:
            resumed.update(torch.tensor([count]), 8)
    if cut < len(counts):
        ours, theirs = resumed.log10(), whole.log10()
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)

"""The lines of metrics.jsonl reach the store while the training runs, each once, whatever happens in between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_job.reporting.metrics_parts import Line, MetricsParts, first_line_of, part_key


@dataclass(frozen=True)
class At:
    step: int
    tokens: int


@dataclass
class Parts:
    """A store of parts; puts fail while `refuses` is set."""

    objects: dict[str, bytes] = field(default_factory=dict)
    refuses: bool = False
    written: int = 0

    def starts(self) -> list[int]:
        return sorted(start for key in self.objects if (start := first_line_of(key)) is not None)

    def put(self, key: str, data: bytes) -> bool:
        if self.refuses:
            return False
        self.objects[key] = data
        self.written += len(data)
        return True

    def delete(self, key: str) -> None:
        del self.objects[key]

    def content(self) -> bytes:
        return b"".join(self.objects[key] for key in sorted(self.objects))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def encode(lines: Sequence[Line]) -> bytes:
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def line(number: int) -> Line:
    return {"step": number, "tokens": 10 * number, "sae": "a", "loss": 1 / number}


@dataclass
class Training:
    """A training whose lines are observed, from line `done` on."""

    store: Parts
    clock: Clock
    done: int = 0

    def __post_init__(self) -> None:
        self.lines = [line(number) for number in range(1, self.done + 1)]
        self.parts = MetricsParts(self.store, encode, self.clock)
        self.parts.started(At(self.done, 10 * self.done), self.lines)

    def log(self, numbers: range, *, seconds: float = 1.0) -> None:
        for number in numbers:
            self.clock.now += seconds
            self.lines.append(line(number))
            self.parts.logged("a", At(number, 10 * number), {})


@pytest.fixture
def store() -> Parts:
    return Parts()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_lines_arrive_while_the_training_runs(store: Parts, clock: Clock) -> None:
    training = Training(store, clock)
    training.log(range(1, 61))
    training.parts.checkpointed(At(60, 600), {})
    training.log(range(61, 71))
    training.parts.close()
    assert store.content() == encode([line(number) for number in range(1, 71)])
    assert len(store.objects) > 2


def test_parts_sort_by_their_lines_and_go_in_the_end(store: Parts, clock: Clock) -> None:
    assert part_key(1234) == "metrics/000001234.jsonl"
    assert [first_line_of(key) for key in ("metrics/000000007.jsonl", "metrics/cfg.json", "metrics/7.jsonl")] == [
        7,
        None,
        None,
    ]
    training = Training(store, clock)
    training.log(range(1, 100))
    training.parts.remove()
    assert store.objects == {}


@given(st.integers(0, 60), st.integers(0, 60), st.booleans())
def test_an_attempt_that_goes_on_leaves_exactly_the_lines_of_an_undisturbed_run(
    cut_off_after: int, checkpoint_at: int, told_the_end: bool
) -> None:
    checkpoint_at = min(checkpoint_at, cut_off_after)
    store, clock = Parts(), Clock()
    first = Training(store, clock)
    first.log(range(1, cut_off_after + 1), seconds=7)
    if told_the_end:
        first.parts.close()
    else:
        first.parts._wait()
    second = Training(store, clock, done=checkpoint_at)
    second.parts._wait()
    assert store.content() == encode([line(number) for number in range(1, checkpoint_at + 1)])
    second.log(range(checkpoint_at + 1, 71), seconds=7)
    second.parts.close()
    assert store.content() == encode([line(number) for number in range(1, 71)])


def test_lines_of_a_part_that_could_not_be_stored_come_with_the_next(store: Parts, clock: Clock) -> None:
    training = Training(store, clock)
    store.refuses = True
    training.log(range(1, 200))
    assert store.objects == {}
    store.refuses = False
    training.parts.close()
    assert store.content() == encode([line(number) for number in range(1, 200)])


def test_a_long_run_writes_each_line_once_into_few_objects(store: Parts, clock: Clock) -> None:
    lines = 100_000
    training = Training(store, clock)
    training.log(range(1, lines + 1), seconds=0.36)  # ten hours
    training.parts.close()
    assert store.written == len(encode(training.lines))
    assert len(store.objects) < 700

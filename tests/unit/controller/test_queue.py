"""A key is processed by one worker at a time, never lost, and comes back when asked to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from sae_operator.controller.queue import Key, RetryAfter, WorkQueue

A, B = Key("SAETrainingJob", "ns", "a"), Key("SAETrainingJob", "ns", "b")


class Recorder:
    """A `process` that notes keys, and blocks while `gate` is closed."""

    def __init__(self, answers: Callable[[Key, int], float | None] = lambda key, turn: None) -> None:
        self.seen: list[Key] = []
        self.running: set[Key] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self._answers = answers

    async def __call__(self, key: Key) -> float | None:
        assert key not in self.running, "two workers have the same key"
        self.running.add(key)
        try:
            await self.gate.wait()
            self.seen.append(key)
            return self._answers(key, self.seen.count(key))
        finally:
            self.running.discard(key)


async def running(queue: WorkQueue, until: Callable[[], bool]) -> None:
    task = asyncio.create_task(queue.run())
    try:
        async with asyncio.timeout(60):
            while not until():  # noqa: ASYNC110 - the condition is the test's, on everything that happens
                await asyncio.sleep(0)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def queue_of(process: Callable[[Key], Awaitable[float | None]]) -> WorkQueue:
    return WorkQueue(process, workers=4, uniform=lambda low, high: high)


async def test_a_key_that_is_added_twice_is_processed_once() -> None:
    recorder = Recorder()
    queue = queue_of(recorder)
    queue.add(A)
    queue.add(A)
    queue.add(B)
    await running(queue, lambda: queue.pending == 0)
    assert sorted(recorder.seen) == [A, B]


async def test_an_event_during_processing_leads_to_one_more_look() -> None:
    recorder = Recorder()
    recorder.gate.clear()
    queue = queue_of(recorder)
    queue.add(A)

    def step() -> bool:
        if A in recorder.running and not recorder.gate.is_set():
            queue.add(A)
            queue.add(A)
            recorder.gate.set()
        return queue.pending == 0 and len(recorder.seen) >= 2

    await running(queue, step)
    assert recorder.seen == [A, A]


async def test_keys_come_back_after_the_time_that_process_asks_for() -> None:
    recorder = Recorder(lambda key, turn: 0.0 if turn < 3 else None)
    queue = queue_of(recorder)
    queue.add(A)
    await running(queue, lambda: len(recorder.seen) == 3 and queue.pending == 0)
    assert recorder.seen == [A, A, A]


async def test_a_failing_key_backs_off_exponentially_and_does_not_hinder_others() -> None:
    delays: list[float] = []

    def fail(key: Key, turn: int) -> float | None:
        if key == A and turn <= 3:
            raise RuntimeError("broken")
        return None

    recorder = Recorder(fail)
    queue = queue_of(recorder)
    queue.add_after = lambda key, seconds: (delays.append(seconds), queue.add(key))[1]  # type: ignore[method-assign]
    queue.add(A)
    queue.add(B)
    await running(queue, lambda: recorder.seen.count(A) == 4 and queue.pending == 0)
    assert delays == [0.25, 0.5, 1.0]
    assert recorder.seen.count(B) == 1


async def test_an_event_while_a_key_fails_does_not_shorten_its_back_off() -> None:
    queue: WorkQueue

    async def fail(key: Key) -> float | None:
        queue.add(key)
        raise RuntimeError("broken")

    delays: list[float] = []
    queue = queue_of(fail)
    queue.add_after = lambda key, seconds: delays.append(seconds)  # type: ignore[method-assign]
    queue.add(A)
    await running(queue, lambda: bool(delays))
    assert delays == [0.25]
    assert queue.pending == 0


async def test_retry_after_is_no_failure() -> None:
    def later(key: Key, turn: int) -> float | None:
        if turn < 4:
            raise RetryAfter(0.0)
        return None

    recorder = Recorder(later)
    queue = queue_of(recorder)
    queue.add(A)
    await running(queue, lambda: len(recorder.seen) == 4 and queue.pending == 0)


async def test_an_event_comes_before_the_timer_and_replaces_it() -> None:
    recorder = Recorder()
    queue = queue_of(recorder)
    queue.add_after(A, 3600)
    queue.add(A)
    await running(queue, lambda: queue.pending == 0 and bool(recorder.seen))
    assert recorder.seen == [A]
    assert not queue._timers


async def test_oldest_age_is_the_time_since_the_longest_waiting_key_was_added() -> None:
    queue = WorkQueue(Recorder(), clock=iter([10.0, 12.0, 15.0]).__next__)
    queue.add(A)
    queue.add(B)
    assert queue.oldest_age() == 5.0


async def test_what_has_been_begun_is_finished_and_nothing_else_is_begun() -> None:
    process = Recorder()
    process.gate.clear()
    queue = WorkQueue(process, workers=1)
    working = asyncio.create_task(queue.run())
    queue.add(A)
    queue.add(B)
    async with asyncio.timeout(60):
        while A not in process.running:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        finishing = asyncio.create_task(queue.finish(60.0))
        await asyncio.sleep(0)
        assert not finishing.done()
        process.gate.set()
        await finishing
        await working
    assert process.seen == [A]


async def test_finishing_does_not_wait_for_ever() -> None:
    process = Recorder()
    process.gate.clear()
    queue = WorkQueue(process)
    working = asyncio.create_task(queue.run())
    queue.add(A)
    async with asyncio.timeout(60):
        while A not in process.running:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0)
        await queue.finish(0.01)
    assert not process.seen
    working.cancel()

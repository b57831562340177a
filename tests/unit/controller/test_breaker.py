"""While the API server is away, work waits, one probe at a time asks, with growing jittered delays."""

from __future__ import annotations

import asyncio

from sae_operator.controller.breaker import CircuitBreaker


def breaker(answers: list[bool], delays: list[float]) -> CircuitBreaker:
    async def probe() -> bool:
        return answers.pop(0)

    async def sleep(seconds: float) -> None:
        delays.append(seconds)
        await asyncio.sleep(0)

    return CircuitBreaker(
        probe, threshold=2, first_delay=1.0, longest_delay=3.0, uniform=lambda low, high: high, sleep=sleep
    )


async def test_it_opens_after_failures_in_a_row_and_closes_when_a_probe_succeeds() -> None:
    delays: list[float] = []
    circuit = breaker([False, False, False, True], delays)
    called: list[str] = []
    circuit.on_close.append(lambda: called.append("closed"))
    circuit.failure()
    circuit.success()
    circuit.failure()
    assert not circuit.open
    circuit.failure()
    assert circuit.open
    await asyncio.wait_for(circuit.wait_closed(), 60)
    assert not circuit.open
    assert delays == [1.0, 2.0, 3.0, 3.0]
    assert called == ["closed"]


async def test_further_failures_start_no_second_probe() -> None:
    delays: list[float] = []
    circuit = breaker([True], delays)
    for _ in range(5):
        circuit.failure()
    await asyncio.wait_for(circuit.wait_closed(), 60)
    assert delays == [1.0]

"""Random lives of operators in memory: whatever fails and whoever interferes, each rule of `invariants` holds.

    SAE_CHAOS_LIVES=5000 SAE_CHAOS_SEED=7 python -m pytest tests/chaos/test_lives.py

`SAE_CHAOS_LIVES` (500) is the number of lives, `SAE_CHAOS_SEED` (1) decides which ones they are; `random` takes others
each time and prints the seed, which replays them. Of a life that fails, Hypothesis finds the shortest one that fails
the same way and prints its steps; they replay, too.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from sae_operator.controller import progress
from tests.chaos import seeds
from tests.chaos.life import CACHES, JOBS, MOODS, SWEEPS, Life, Specs

LIVES = int(os.environ.get("SAE_CHAOS_LIVES") or 500)
SEED = seeds.chosen()
STEPS = 25
NAMES = ("a", "b", "c")
OWN_CACHES = ("cache-1", "cache-2")
SWEEP = "sweep"
# Two operators at most: a third changes nothing that two do not.
MOST_OPERATORS = 2

names, own_caches = st.sampled_from(NAMES), st.sampled_from(OWN_CACHES)
spaces = st.lists(st.integers(1, 5), min_size=1, max_size=4, unique=True)
chances = st.floats(0, 0.999)
propagations = st.sampled_from(("Background", "Foreground"))
pauses = st.sampled_from((0.0, 0.05, 0.3, 1.0, 3.0, 10.0, 40.0))


class Lives(RuleBasedStateMachine):
    """What can happen, in any order."""

    life: Life

    @initialize(
        number=st.integers(0, 2**32),
        mood=st.sampled_from(("fine", "mixed", "long")),
        rate=st.sampled_from((0.0, 0.0, 0.1, 0.3)),
        pause=pauses,
    )
    def begin(self, number: int, mood: str, rate: float, pause: float) -> None:
        self.life = Life(number)
        progress.ask = self.life.answer_poll  # type: ignore[assignment]
        self.life.set_mood(mood)
        self.life.fault_rate = rate
        self.life.start_operator()
        self.create_job("a", "cache 0", False, pause)

    @rule(name=names, source=st.sampled_from(("cache 0", "cache 1", "ref", "uri")), more=st.booleans(), pause=pauses)
    def create_job(self, name: str, source: str, more: bool, pause: float) -> None:
        tokens = 450 if more else 300
        activations: dict[str, Any] = {
            "cache 0": {"cache": Specs.cache(0, tokens)},
            "cache 1": {"cache": Specs.cache(1, tokens)},
            "ref": {"cacheRef": {"name": OWN_CACHES[0]}},
            "uri": {"uri": "s3://saes/there"},
        }[source]
        self.life.create(JOBS, name, Specs.job(name, activations))
        self.life.wait(pause)

    @rule(name=own_caches, pause=pauses)
    def create_cache(self, name: str, pause: float) -> None:
        self.life.create(CACHES, name, Specs.cache(2))
        self.life.wait(pause)

    @rule(name=names, propagation=propagations, pause=pauses)
    def delete_job(self, name: str, propagation: str, pause: float) -> None:
        self.life.delete(JOBS, name, propagation)
        self.life.wait(pause)

    @rule(chance=chances, pause=pauses)
    def delete_any_cache(self, chance: float, pause: float) -> None:
        self.life.delete_any(CACHES, chance, "Background")
        self.life.wait(pause)

    @rule(name=names, suspend=st.booleans(), pause=pauses)
    def suspend_job(self, name: str, suspend: bool, pause: float) -> None:
        self.life.edit(JOBS, name, lambda spec: {"suspend": suspend})
        self.life.wait(pause)

    @rule(name=own_caches, suspend=st.booleans(), pause=pauses)
    def suspend_cache(self, name: str, suspend: bool, pause: float) -> None:
        self.life.edit(CACHES, name, lambda spec: {"suspend": suspend})
        self.life.wait(pause)

    @rule(values=spaces, per_job=st.integers(1, 3), at_once=st.integers(1, 3), pause=pauses)
    def create_sweep(self, values: list[int], per_job: int, at_once: int, pause: float) -> None:
        self.life.create(SWEEPS, SWEEP, Specs.sweep(SWEEP, values, per_job=per_job, at_once=at_once))
        self.life.wait(pause)

    @rule(values=spaces, pause=pauses)
    def sweep_over_others(self, values: list[int], pause: float) -> None:
        self.life.edit(SWEEPS, SWEEP, lambda spec: {"space": Specs.space(values)})
        self.life.wait(pause)

    @rule(suspend=st.booleans(), pause=pauses)
    def suspend_sweep(self, suspend: bool, pause: float) -> None:
        self.life.edit(SWEEPS, SWEEP, lambda spec: {"suspend": suspend})
        self.life.wait(pause)

    @rule(pause=pauses)
    def retry_sweep(self, pause: float) -> None:
        self.life.edit(SWEEPS, SWEEP, lambda spec: {"retry": spec.get("retry", 0) + 1})
        self.life.wait(pause)

    @rule(propagation=propagations, pause=pauses)
    def delete_sweep(self, propagation: str, pause: float) -> None:
        self.life.delete(SWEEPS, SWEEP, propagation)
        self.life.wait(pause)

    @rule(name=names, pause=pauses)
    def retry_job(self, name: str, pause: float) -> None:
        self.life.edit(JOBS, name, lambda spec: {"retry": spec.get("retry", 0) + 1})
        self.life.wait(pause)

    @rule(name=own_caches, pause=pauses)
    def retry_cache(self, name: str, pause: float) -> None:
        self.life.edit(CACHES, name, lambda spec: {"retry": spec.get("retry", 0) + 1})
        self.life.wait(pause)

    @rule(name=names, pause=pauses)
    def train_longer(self, name: str, pause: float) -> None:
        self.life.edit(JOBS, name, lambda spec: {"training": {"tokens": spec["training"]["tokens"] + 100}})
        self.life.wait(pause)

    @rule(name=own_caches, pause=pauses)
    def cache_more(self, name: str, pause: float) -> None:
        self.life.edit(CACHES, name, lambda spec: {"tokens": spec["tokens"] + 150})
        self.life.wait(pause)

    @rule(
        plural=st.sampled_from(("jobs", "jobs", "pods", "configmaps")),
        chance=chances,
        propagation=propagations,
        pause=pauses,
    )
    def delete_child(self, plural: str, chance: float, propagation: str, pause: float) -> None:
        self.life.delete_any(plural, chance, propagation)
        self.life.wait(pause)

    @rule(mood=st.sampled_from(sorted(MOODS)), pause=pauses)
    def pods_change(self, mood: str, pause: float) -> None:
        self.life.set_mood(mood)
        self.life.wait(pause)

    @rule(pause=pauses)
    def node_vanishes(self, pause: float) -> None:
        self.life.workloads.lose_node()
        self.life.wait(pause)

    @rule(rate=st.sampled_from((0.0, 0.1, 0.1, 0.3)), pause=pauses)
    def calls_fail(self, rate: float, pause: float) -> None:
        self.life.fault_rate = rate
        self.life.wait(pause)

    @rule(seconds=st.sampled_from((5.0, 60.0)), expired=st.booleans(), pause=pauses)
    def server_goes_away(self, seconds: float, expired: bool, pause: float) -> None:
        self.life.go_away(seconds, expired=expired)
        self.life.wait(pause)

    @rule(plural=st.sampled_from((JOBS, CACHES, "jobs")), chance=chances, seconds=st.sampled_from((5.0, 60.0)))
    def something_is_deleted_while_nobody_sees_it(self, plural: str, chance: float, seconds: float) -> None:
        self.life.lose_watches(expired=True)
        self.life.delete_any(plural, chance, "Background")
        self.life.wait(seconds)

    @rule(expired=st.booleans(), pause=pauses)
    def watches_break(self, expired: bool, pause: float) -> None:
        self.life.lose_watches(expired=expired)
        self.life.wait(pause)

    @rule(seconds=st.sampled_from((-600.0, -60.0, -5.0, 0.0, 5.0, 60.0, 600.0)), pause=pauses)
    def clock_jumps(self, seconds: float, pause: float) -> None:
        self.life.clock_error = seconds
        self.life.wait(pause)

    @rule(used_up=st.booleans(), pause=pauses)
    def quota_changes(self, used_up: bool, pause: float) -> None:
        self.life.quota_used_up = used_up
        self.life.wait(pause)

    @precondition(lambda self: self.life.operators)
    @rule(pause=pauses)
    def kill_operator(self, pause: float) -> None:
        self.life.kill(min(self.life.operators))
        self.life.wait(pause)

    @precondition(lambda self: self.life.operators)
    @rule(call=st.integers(1, 30), before=st.booleans(), pause=pauses)
    def operator_dies_at_a_call(self, call: int, before: bool, pause: float) -> None:
        self.life.kill_at_call(min(self.life.operators), call, before=before)
        self.life.wait(pause)

    @precondition(lambda self: len(self.life.operators) < MOST_OPERATORS)
    @rule(pause=pauses)
    def start_operator(self, pause: float) -> None:
        self.life.start_operator()
        self.life.wait(pause)

    def teardown(self) -> None:
        if not hasattr(self, "life"):
            return
        try:
            if not self.life.invariants.broken:
                self.life.settle()
        finally:
            self.life.close()


@pytest.mark.timeout(1800)
def test_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is put back after the test.
    monkeypatch.setattr(progress, "ask", progress.ask)
    print(f"{LIVES} lives of SAE_CHAOS_SEED={SEED}")
    run_state_machine_as_test(
        seed(SEED)(Lives),
        settings=settings(
            max_examples=LIVES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
        ),
    )

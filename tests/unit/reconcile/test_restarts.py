"""The operator may die after any call that it makes: the end is the same, and no work is done twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec

# When something was seen differs; so does how much of a short run an operator that died has missed.
TIMES = (
    "startTime",
    "completionTime",
    "updatedAt",
    "lastTransitionTime",
    "time",
    "activeSeconds",
    "activeSince",
)


def quickly(step: str, index: int, earlier: int) -> PodScript:
    return PodScript(seconds=1)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(found) for key, found in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(found) for found in value]
    return value


def outcome(cluster: FakeCluster) -> dict[str, Any]:
    """Everything that is left at the end, but for times."""
    return {
        "resources": sorted((kind, name, without_times(raw)) for (kind, name), raw in cluster.resources.items()),
        "jobs": sorted(cluster.jobs),
        "created": sorted(cluster.created_jobs),
        "pods": sorted(cluster.pods),
        "config maps": without_times(cluster.config_maps),
    }


def share_and_extend(cluster: FakeCluster) -> None:
    cluster.create(JOB, "first", job_spec())
    cluster.run()
    cluster.create(JOB, "more", job_spec({"cache": cache_spec(tokens=900)}, output={"uri": "s3://saes/more"}))
    cluster.run()


def add_a_hook(cluster: FakeCluster) -> None:
    hooks = [{"name": "model.layers.0"}, {"name": "model.layers.1"}]
    saes = [{"name": "k16", "hook": "model.layers.1", "architecture": {"type": "topk", "k": 16}, "dSae": 64}]
    cluster.create(JOB, "first", job_spec())
    cluster.run()
    extended = job_spec({"cache": cache_spec(hooks=hooks)}, saes=saes, output={"uri": "s3://saes/second"})
    cluster.create(JOB, "second", extended)
    cluster.run()


def suspend_and_resume(cluster: FakeCluster) -> None:
    cluster.script = lambda step, index, earlier: PodScript(seconds=4)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    cluster.edit(CACHE, "acts", suspend=True)
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Suspended")
    cluster.edit(CACHE, "acts", suspend=False)
    cluster.run()


def fail_and_retry(cluster: FakeCluster) -> None:
    cluster.script = lambda step, index, earlier: PodScript(seconds=1, exit_code=2 if step == "cache" else 0)
    cluster.create(JOB, "sae", job_spec())
    cluster.run()
    cluster.script = quickly
    cluster.edit(JOB, "sae", retry=1)
    cluster.run()


def run_out_of_memory(cluster: FakeCluster) -> None:
    killed = PodScript(exit_code=137, reason="OOMKilled")
    cluster.script = lambda step, index, earlier: killed if step == "train" else quickly(step, index, earlier)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}))
    cluster.run()
    cluster.wait(5)


def lose_a_job(cluster: FakeCluster) -> None:
    cluster.script = lambda step, index, earlier: PodScript(seconds=4)
    cluster.create(CACHE, "acts", cache_spec())
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    cluster.delete_job(next(name for name in cluster.jobs if "-cache-" in name))
    cluster.run()


def clean_up(cluster: FakeCluster) -> None:
    run = {"ttlSecondsAfterFinished": 30}
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}, run=run, parallelism=2))
    cluster.run_until(lambda: cluster.phase(JOB, "sae") == "Succeeded")
    cluster.wait(120)


def exceed_a_deadline(cluster: FakeCluster) -> None:
    cluster.script = lambda step, index, earlier: PodScript(seconds=100 if step == "train" else 1)
    cluster.create(JOB, "sae", job_spec({"uri": "s3://saes/some/cache"}, run={"activeDeadlineSeconds": 10}))
    cluster.run()
    cluster.wait(5)


LIVES = [
    exceed_a_deadline,
    clean_up,
    share_and_extend,
    add_a_hook,
    suspend_and_resume,
    fail_and_retry,
    run_out_of_memory,
    lose_a_job,
]


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_dying_after_any_call_changes_nothing(life: Callable[[FakeCluster], None]) -> None:
    undisturbed = FakeCluster(quickly)
    life(undisturbed)
    expected = outcome(undisturbed)
    assert undisturbed.calls >= 8
    for call in range(1, undisturbed.calls + 1):
        cluster = FakeCluster(quickly, die_after=call)
        life(cluster)
        assert cluster.calls >= call
        assert outcome(cluster) == expected, f"after call {call}"


@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_dying_after_every_change_changes_nothing_either(life: Callable[[FakeCluster], None]) -> None:
    undisturbed = FakeCluster(quickly)
    life(undisturbed)
    cluster = FakeCluster(quickly, die_after_changes=True)
    life(cluster)
    assert outcome(cluster) == outcome(undisturbed)


STATES = {
    "runs its first step": ("prepare", PodScript(seconds=1000)),
    "runs a later step": ("cache", PodScript(seconds=1000)),
    "fits no node": ("prepare", PodScript(unschedulable="0/1 nodes are available")),
    "has no image": ("prepare", PodScript(waits=("ErrImagePull", "manifest unknown"))),
    "is slow": ("prepare", PodScript(waits=("ContainerCreating", ""))),
}


@pytest.mark.parametrize("state", STATES)
def test_a_restart_writes_nothing_while_nothing_has_changed(state: str) -> None:
    slow, pod = STATES[state]
    cluster = FakeCluster(lambda step, index, earlier: pod if step == slow else PodScript(seconds=1))
    cluster.create(CACHE, "acts", cache_spec())
    cluster.wait(60)
    calls, events = cluster.calls, len(cluster.events)
    for _ in range(5):
        cluster.restart()
        cluster.wait(3)
    assert (cluster.calls, len(cluster.events)) == (calls, events)

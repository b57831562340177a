"""An operator that dies after any call, and random lives: nothing twice, nothing lost, and an end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.unit.reconcile.fake_sweeps import FakeSweep, k_space, sweep_spec, template


def whole_life(die_after: int | None) -> FakeSweep:
    """Created, suspended, resumed, edited, failed in part, ended, run again, and extended."""
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4, 5], maxParallel=2, trialsPerJob=2), die_after=die_after)
    sweep.settle()
    sweep.run(*sweep.unfinished())
    sweep.edit(suspend=True)
    sweep.settle()
    sweep.edit(suspend=False)
    sweep.settle()
    sweep.edit(space=k_space([1, 3, 5, 6]))
    sweep.settle()
    sweep.fail(sweep.by_k()[1])
    sweep.settle()
    # Of the job of 5 and 6, one fails.
    sweep.tell_saes(sweep.by_k()[6], "Succeeded", "Succeeded", "Failed")
    finish(sweep)
    sweep.edit(retry=1, template=template(run={"backoffLimit": 9}))
    finish(sweep)
    sweep.edit(template=template(run={"backoffLimit": 9}, training={"tokens": 5000}))
    finish(sweep)
    return sweep


def finish(sweep: FakeSweep) -> None:
    for _ in range(50):
        sweep.settle()
        if sweep.phase in ("Succeeded", "Failed"):
            return
        if sweep.phase == "Reporting":
            sweep.end_report()
        else:
            sweep.succeed(*sweep.unfinished())
    raise AssertionError(f"no end: {sweep.status}")


CALLS = whole_life(None).calls


@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_an_operator_that_dies_after_a_call_goes_on_as_if_it_had_not(call: int) -> None:
    untouched, sweep = whole_life(None), whole_life(call)
    assert sweep.created == untouched.created
    assert sweep.deleted == untouched.deleted
    times = ("startTime", "completionTime", "conditions", "attempts")
    told = {key: value for key, value in sweep.status.items() if key not in (*times, "attempt", "jobName")}
    assert told == {key: value for key, value in untouched.status.items() if key in told}
    specs = [{name: job["spec"] for name, job in each.jobs.items()} for each in (sweep, untouched)]
    assert specs[0] == specs[1]
    assert {job["spec"]["retry"] for job in sweep.jobs.values()} == {0, 1}, "once, whatever happens"


def test_the_life_makes_enough_calls_to_mean_something() -> None:
    assert CALLS > 30


EDITS = st.sampled_from(
    [
        {"suspend": True},
        {"suspend": False},
        {"maxParallel": 1},
        {"maxParallel": 5},
        {"trialsPerJob": 1},
        {"trialsPerJob": 4},
        {"maxFailedTrials": 0},
        {"maxFailedTrials": 3},
        {"template": template(run={"backoffLimit": 1})},
        {"template": template(run={"backoffLimit": 2})},
        {"space": k_space([1, 2, 3])},
        {"space": k_space([2, 3, 4, 5, 6, 7])},
        {"space": k_space([7, 1])},
        {"space": k_space([1, 900])},
        {"retry": 1},
    ]
)
ACTS = st.one_of(
    EDITS,
    st.sampled_from(["look", "run", "succeed", "fail", "partly fail", "delete", "report", "failed report", "follow"]),
)


# It dies between creating what is new and deleting what is not wanted any more.
@example([({"space": k_space([2, 3, 4, 5, 6, 7])}, 0)], 4)
@settings(max_examples=150)
@given(st.lists(st.tuples(ACTS, st.integers(0, 30)), max_size=40), st.integers(1, 60) | st.none())
def test_any_life_comes_to_an_end(acts: list[tuple[Any, int]], die_after: int | None) -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4], maxParallel=2, trialsPerJob=2), die_after=die_after)
    for act, number in acts:
        _do(sweep, act, number)
        before = len(sweep.unfinished())
        sweep.look()
        assert len(sweep.unfinished()) <= max(sweep.spec["maxParallel"], before)
    sweep.edit(suspend=False, space=k_space([1, 2, 3]), retry=sweep.spec.get("retry", 0) + 1, maxFailedTrials=3)
    finish(sweep)
    assert sweep.phase == "Succeeded"
    assert sweep.trials["total"] == 3
    assert sweep.trials["succeeded"] == 3, "what had failed was trained again"


def _do(sweep: FakeSweep, act: Any, number: int) -> None:
    unfinished = sorted(sweep.unfinished())
    some = unfinished[number % len(unfinished)] if unfinished else None
    if isinstance(act, dict):
        sweep.edit(**(act | ({"retry": sweep.spec.get("retry", 0) + 1} if "retry" in act else {})))
    elif act == "follow":
        sweep.follow()
    elif act == "delete" and sweep.jobs:
        sweep.delete(sorted(sweep.jobs)[number % len(sweep.jobs)])
    elif act in ("report", "failed report"):
        if any(not job["status"].get("conditions") for job in sweep.reports.values()):
            sweep.end_report(failed=act != "report")
    elif act == "partly fail" and some is not None:
        phases = ["Failed" if k % 2 else "Succeeded" for k in sweep.counts(some)]
        sweep.tell_saes(some, "Succeeded" if "Succeeded" in phases else "Failed", *phases)
    elif some is not None and act in ("run", "succeed", "fail"):
        {"run": sweep.run, "succeed": sweep.succeed, "fail": sweep.fail}[act](some)

"""kstatus of every version of a sweep in whole lives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.gitops.kstatus import kstatus
from tests.unit.gitops.sweep_lives import SWEEP_LIVES, SweepLife, SweepStory, lead_sweep
from tests.unit.gitops.test_lives_by_kstatus import judge


@pytest.mark.parametrize("story", SWEEP_LIVES, ids=lambda story: story.__name__.strip("_"))
def test_a_sweeps_life_is_told_as_it_is(story: SweepStory) -> None:
    sweep = lead_sweep(story)
    judge(sweep.versions)
    assert kstatus(sweep.versions[-1].resource) == SWEEP_LIVES[story]


def test_the_lives_of_sweeps_come_through_every_phase() -> None:
    phases = {version.phase for story in SWEEP_LIVES for version in lead_sweep(story).versions}
    assert {"Running", "Reporting", "Succeeded", "Failed", "Suspended"} <= phases


ACTIONS = st.sampled_from(
    ["succeed", "fail", "suspend", "resume", "retry", "grow", "shrink", "report", "report fails", "look"]
)


@settings(max_examples=30)
@given(st.lists(ACTIONS, max_size=14))
def test_random_lives_of_sweeps_are_told_as_they_are(actions: list[str]) -> None:
    sweep = SweepLife()
    retry, counts = 0, [8, 16, 32]
    for action in actions:
        match action:
            case "succeed":
                sweep.end("Succeeded")
            case "fail":
                sweep.end("Failed")
            case "suspend" | "resume":
                sweep.edit(suspend=action == "suspend")
            case "retry":
                retry += 1
                sweep.edit(retry=retry)
            case "grow":
                counts = [*counts, counts[-1] + 1]
                sweep.edit_space(*counts)
            case "shrink":
                counts = counts[-1:]
                sweep.edit_space(*counts)
            case "report" | "report fails":
                sweep.end_report("Complete" if action == "report" else "Failed")
            case _:
                sweep.look()
    judge(sweep.versions)
    sweep.edit(suspend=False)
    sweep.look()
    sweep.run()
    sweep.edit(retry=retry + 1)
    sweep.look()
    sweep.run()
    judge(sweep.versions)
    assert kstatus(sweep.versions[-1].resource) == "Current"

"""Edits of a sweep: what is new is trained, what is left out is given up, and what stays is not trained again."""

from __future__ import annotations

from typing import Any

from sae_operator.api.base import MAX_NAME_LENGTH
from tests.unit.reconcile.fake_sweeps import FakeSweep, k_space, sweep_spec, template


def ended(spec: dict[str, Any]) -> FakeSweep:
    """A sweep that has ended, with all trials trained."""
    sweep = FakeSweep(spec)
    finish(sweep)
    return sweep


def finish(sweep: FakeSweep) -> None:
    for _ in range(100):
        sweep.settle()
        unfinished = sweep.unfinished()
        if not unfinished:
            break
        sweep.succeed(*unfinished)
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Succeeded"


def test_new_trials_get_new_jobs_and_removed_ones_are_deleted_whether_finished_or_not() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4]))
    sweep.settle()
    sweep.succeed(sweep.by_k()[1], sweep.by_k()[2])
    sweep.run(sweep.by_k()[3], sweep.by_k()[4])
    sweep.settle()
    before = sweep.by_k()
    sweep.edit(space=k_space([2, 4, 5]))
    sweep.settle()
    assert sorted(sweep.deleted) == sorted([before[1], before[3]])
    assert sorted(sweep.by_k()) == [2, 4, 5]
    assert (sweep.by_k()[2], sweep.by_k()[4]) == (before[2], before[4])
    assert sweep.trials["total"] == 3
    assert len(sweep.created) == 5


def test_a_job_that_has_lost_some_of_its_trials_goes_on() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4, 5], trialsPerJob=2))
    sweep.settle()
    before = sweep.by_k()
    sweep.edit(space=k_space([1, 4, 5, 6]))
    sweep.settle()
    assert sweep.deleted == []
    assert [sweep.counts(name) for name in sweep.created] == [[1, 2], [3, 4], [5], [6]]
    sweep.succeed(*sweep.created)
    sweep.settle()
    assert sweep.trials == {"total": 4, "pending": 0, "running": 0, "succeeded": 4, "stopped": 0, "failed": 0}
    assert [best["l0"] for best in sweep.status["best"]] == [6, 5, 4, 1]
    assert [job.trials for job in sweep.given().jobs] == [
        [sweep.observed().training_jobs[0].trials[0]],
        [sweep.observed().training_jobs[1].trials[1]],
        list(sweep.observed().training_jobs[2].trials),
        list(sweep.observed().training_jobs[3].trials),
    ]
    # Asked for again, a trial is found where it was trained.
    sweep.edit(space=k_space([1, 2, 4, 5, 6]))
    sweep.settle()
    assert len(sweep.created) == 4
    assert sweep.by_k() == before | {6: sweep.created[3]}


def test_an_edit_after_the_end_begins_another_round_with_another_report() -> None:
    sweep = ended(sweep_spec([1, 2]))
    begun = sweep.status["startTime"]
    sweep.now = sweep.now.replace(hour=1)
    sweep.edit(space=k_space([1, 2, 3]))
    sweep.look()
    assert sweep.phase == "Running"
    assert "reportUri" not in sweep.status
    assert "completionTime" not in sweep.status
    assert sweep.status["startTime"] > begun
    assert sweep.trials["succeeded"] == 2
    finish(sweep)
    assert len(sweep.created) == 3
    assert list(sweep.reports) == [f"sweep-{'0f' * 4}-report-{number}" for number in (1, 2)]
    sweep.edit(space=k_space([1, 3]))
    sweep.settle()
    assert sweep.phase == "Reporting"
    assert sweep.trials["total"] == 2
    sweep.end_report()
    sweep.settle()
    # Back to what was reported once: the store holds another report by now.
    sweep.edit(space=k_space([1, 2]))
    sweep.settle()
    assert len(sweep.created) == 4
    finish(sweep)
    assert len(sweep.reports) == 4


def test_another_objective_ranks_the_trials_anew_and_trains_none() -> None:
    sweep = ended(sweep_spec([1, 2]))
    assert [best["l0"] for best in sweep.status["best"]] == [2, 1]
    sweep.edit(objective={"metric": "l0", "goal": "minimize"})
    sweep.settle()
    assert sweep.phase == "Reporting"
    assert [best["l0"] for best in sweep.status["best"]] == [1, 2]
    assert (len(sweep.created), sweep.patched) == (2, [])
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Succeeded"
    assert sweep.given().spec.objective.goal == "minimize"


def test_an_edit_while_the_report_is_written_ends_it() -> None:
    sweep = FakeSweep(sweep_spec([1, 2]))
    sweep.settle()
    sweep.succeed(*sweep.created)
    sweep.settle()
    sweep.edit(space=k_space([1, 2, 3]))
    sweep.settle()
    assert sweep.phase == "Running"
    assert sweep.reports == {}
    finish(sweep)
    assert "attempts" not in sweep.status


def test_a_bad_edit_touches_nothing_and_is_corrected() -> None:
    for at_end in (False, True):
        sweep = ended(sweep_spec([1, 2])) if at_end else FakeSweep(sweep_spec([1, 2]))
        sweep.settle()
        sweep.edit(space=k_space([2, 300]))
        sweep.settle()
        assert len(sweep.jobs) == 2
        stalled = sweep.condition("Stalled")
        assert stalled is not None
        assert stalled["status"] == "True"
        sweep.edit(space=k_space([1, 2]))
        sweep.settle()
        assert sweep.condition("Invalid") is None
        assert len(sweep.created) == 2
        finish(sweep)


def test_settings_of_pods_are_passed_on_to_unfinished_jobs() -> None:
    run = {"backoffLimit": 3, "nodeSelector": {"gpu": "a", "zone": "b"}}
    sweep = FakeSweep(sweep_spec([1, 2], template=template(run=run)))
    sweep.settle()
    first, second = sweep.created
    sweep.succeed(first)
    sweep.settle()
    sweep.edit_template(run={"backoffLimit": 5, "nodeSelector": {"gpu": "c"}}, parallelism=2)
    sweep.settle()
    assert sweep.patched == [second]
    assert sweep.jobs[second]["spec"]["run"]["nodeSelector"] == {"gpu": "c"}
    assert sweep.jobs[second]["spec"]["run"]["backoffLimit"] == 5
    assert sweep.jobs[second]["spec"]["parallelism"] == 2
    assert sweep.jobs[first]["spec"]["run"]["nodeSelector"] == {"gpu": "a", "zone": "b"}
    # Also to one that runs again.
    sweep.fail(second)
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    sweep.edit(template=template(run={"backoffLimit": 9}, parallelism=2), retry=1)
    sweep.settle()
    assert sweep.jobs[second]["spec"]["run"] | {"backoffLimit": 9} == sweep.jobs[second]["spec"]["run"]
    assert (
        "nodeSelector" not in sweep.jobs[second]["spec"]["run"] or not sweep.jobs[second]["spec"]["run"]["nodeSelector"]
    )
    assert sweep.jobs[second]["spec"]["retry"] == 1
    assert len(sweep.patched) == 2


def test_more_tokens_are_passed_on_to_all_jobs_few_at_a_time() -> None:
    sweep = ended(sweep_spec([1, 2, 3], maxParallel=2))
    sweep.edit_template(training={"tokens": 2000})
    sweep.look()
    assert sweep.phase == "Pending"
    assert sweep.trials["pending"] == 3
    assert [job["spec"]["training"]["tokens"] for job in sweep.jobs.values()] == [2000, 2000, 1000]
    finish(sweep)
    assert [job["spec"]["training"]["tokens"] for job in sweep.jobs.values()] == [2000, 2000, 2000]
    assert len(sweep.created) == 3
    assert len(sweep.reports) == 2


def test_tokens_of_an_inline_cache_are_passed_on() -> None:
    cache = {
        "model": {"name": "tiny"},
        "dataset": {"path": "text"},
        "hooks": [{"name": "model.layers.0"}],
        "tokens": 500,
        "storage": {"uri": "s3://saes/caches"},
    }
    made = template(activations={"cache": cache}, training={})
    sweep = ended(sweep_spec([1, 2], template=made))
    sweep.edit_template(activations={"cache": cache | {"tokens": 900}})
    finish(sweep)
    caches = [job["spec"]["activations"]["cache"] for job in sweep.jobs.values()]
    assert [given["tokens"] for given in caches] == [900, 900]
    assert all(given["hooks"] == [{"name": "model.layers.0"}] for given in caches)


def test_tokens_that_a_job_was_given_by_hand_are_not_taken_away() -> None:
    sweep = FakeSweep(sweep_spec([1, 2]))
    sweep.settle()
    ahead = sweep.jobs[sweep.created[0]]
    ahead["spec"]["training"]["tokens"] = 5000
    sweep.edit_template(training={"tokens": 2000}, run={"backoffLimit": 9})
    sweep.settle()
    assert [job["spec"]["training"]["tokens"] for job in sweep.jobs.values()] == [5000, 2000]
    assert [job["spec"]["run"]["backoffLimit"] for job in sweep.jobs.values()] == [9, 9]


def test_fewer_jobs_at_a_time_end_none() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4, 5], maxParallel=4))
    sweep.settle()
    sweep.edit(maxParallel=2)
    sweep.settle()
    assert len(sweep.unfinished()) == 4
    sweep.succeed(*sweep.created[:2])
    sweep.settle()
    assert len(sweep.created) == 4
    sweep.succeed(sweep.created[2])
    sweep.settle()
    assert len(sweep.created) == 5


def test_a_sweep_that_is_created_anew_calls_its_trials_and_folders_the_same() -> None:
    first, second = FakeSweep(), FakeSweep()
    first.settle()
    second.settle()
    outputs = [job["spec"]["output"]["uri"] for job in first.jobs.values()]
    assert outputs == [job["spec"]["output"]["uri"] for job in second.jobs.values()]
    assert all(len(name) <= MAX_NAME_LENGTH for name in first.jobs)

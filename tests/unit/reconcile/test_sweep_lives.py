"""A sweep from its creation to its report, suspended and resumed, and with trials that fail."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sae_operator.api.sweep_expansion import expand
from sae_operator.reconcile.observed import Defaults
from tests.unit.reconcile.fake_sweeps import FakeSweep, k_space, sweep_spec, template


def test_from_creation_to_report() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3], maxParallel=2))
    sweep.settle()
    assert [sweep.counts(name) for name in sweep.created] == [[1], [2]]
    assert sweep.phase == "Pending"
    assert sweep.trials == {"total": 3, "pending": 3, "running": 0, "succeeded": 0, "stopped": 0, "failed": 0}
    first, second = sweep.created
    sweep.run(first, second)
    sweep.settle()
    assert sweep.phase == "Running"
    assert sweep.status["jobs"] == {"total": 3, "unfinished": 2}
    sweep.succeed(second)
    sweep.settle()
    assert [sweep.counts(name) for name in sweep.created] == [[1], [2], [3]]
    assert sweep.status["summary"]["finished"] == "1/3"
    sweep.succeed(first, sweep.created[2])
    sweep.settle()
    assert sweep.phase == "Reporting"
    assert list(sweep.reports) == [f"sweep-{'0f' * 4}-report-1"]
    sweep.end_report()
    sweep.settle()
    assert sweep.phases == ["Pending", "Running", "Reporting", "Succeeded"]
    assert sweep.status["reportUri"] == "s3://saes/out/report.html"
    assert sweep.status["tableUri"] == "s3://saes/out/trials.json"
    assert sweep.message() == "3 of 3 trials were trained: see s3://saes/out/report.html"
    assert [reason for reason, _ in sweep.events] == ["Pending", "Running", "Reporting", "Succeeded"]


def test_a_training_job_says_whose_it_is_and_lies_in_a_folder_of_its_own() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3], trialsPerJob=2))
    sweep.settle()
    trials = [trial.name for trial in expand(sweep.observed().spec)]  # type: ignore[arg-type]
    facts = sweep.observed().training_jobs
    assert [trial for job in facts for trial in job.trials] == trials
    for job in facts:
        raw = sweep.jobs[job.name]
        assert raw["spec"]["output"]["uri"] == f"s3://saes/out/{job.folder}"
        assert raw["metadata"]["labels"]["sae-operator.dev/sweep"] == "sweep"
        assert raw["metadata"]["labels"]["sae-operator.dev/sweep-uid"] == sweep.observed().metadata.uid


def test_the_report_is_given_the_jobs_and_the_namespaces_defaults() -> None:
    run = {"image": "mine:1", "resources": {"limits": {"nvidia.com/gpu": 1}}, "nodeSelector": {"gpu": "yes"}}
    spec = sweep_spec([1, 2], template=template(run=run), report={"nodeSelector": {"cpu": "yes"}})
    sweep = FakeSweep(spec, Defaults(endpoint_url="https://s3.lab", secret_name="s3-default"))
    sweep.settle()
    first, second = sweep.created
    sweep.succeed(first)
    sweep.fail(second, message="no such bucket")
    sweep.settle()
    given = sweep.given()
    assert [(job.name, job.message) for job in given.jobs] == [(first, None), (second, "no such bucket")]
    assert [trial for job in given.jobs for trial in job.trials] == [trial.name for trial in expand(given.spec)]
    assert given.output.endpoint_url == "https://s3.lab"
    assert given.spec.template.output.endpoint_url == "https://s3.lab"
    pod = next(iter(sweep.reports.values()))["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "mine:1"
    assert pod["containers"][0]["args"][:2] == ["step", "report"]
    assert "nvidia.com/gpu" not in str(pod["containers"][0]["resources"])
    assert pod["nodeSelector"] == {"cpu": "yes"}


def test_what_is_wrong_is_told_with_its_path_before_anything_is_made() -> None:
    sweep = FakeSweep(sweep_spec([8, 65, 16, 128]))
    sweep.settle()
    assert sweep.jobs == {}
    assert sweep.phase == "Pending"
    invalid, stalled = sweep.condition("Invalid"), sweep.condition("Stalled")
    assert invalid is not None
    assert stalled is not None
    assert stalled["status"] == "True"
    assert "spec.template.saes[0]" in invalid["message"]
    assert "saes[0].architecture.k=65" in invalid["message"]
    assert [reason for reason, _ in sweep.events] == ["Invalid"]
    sweep.edit(space=k_space([8, 16]))
    sweep.settle()
    assert sweep.condition("Invalid") is None
    assert len(sweep.jobs) == 2


def test_the_best_are_ranked_by_the_objective_within_its_l0() -> None:
    counts = [1, 2, 3, 4, 5, 6, 7, 8]
    sweep = FakeSweep(sweep_spec(counts, maxParallel=8, objective={"l0AtMost": 6.5}))
    sweep.settle()
    sweep.succeed(*sweep.created)
    sweep.settle()
    assert [best["l0"] for best in sweep.status["best"]] == [6, 5, 4, 3, 2]
    assert sweep.status["best"][0] == {
        "name": sweep.status["summary"]["trial"],
        "jobName": sweep.by_k()[6],
        "parameters": "saes[0].architecture.k=6",
        "sae": sweep.status["summary"]["trial"],
        "objective": 0.56,
        "explainedVariance": 0.56,
        "l0": 6.0,
    }
    assert sweep.status["summary"]["objective"] == "0.56"
    smallest = FakeSweep(sweep_spec(counts, maxParallel=8, objective={"metric": "l0", "goal": "minimize"}))
    smallest.settle()
    smallest.succeed(*smallest.created)
    smallest.settle()
    assert [best["objective"] for best in smallest.status["best"]] == [1, 2, 3, 4, 5]


def test_a_figure_that_is_no_number_ranks_nowhere() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3]))
    sweep.settle()
    first, second, third = sweep.created
    sweep.succeed(first, explainedVariance=float("nan"))
    sweep.succeed(second)
    # Its message was lost.
    sweep._tell(third, "Succeeded")
    sweep.settle()
    assert [best["jobName"] for best in sweep.status["best"]] == [second]
    assert sweep.trials["succeeded"] == 3


@pytest.mark.parametrize(
    ("phase", "phases", "counts"),
    [
        ("Running", ("Running", "Running", "Failed", "Stopped"), {"running": 2, "failed": 1, "stopped": 1}),
        ("Running", ("Succeeded", "Running", "Running", "Running"), {"running": 4}),
        ("Succeeded", ("Succeeded", "Stopped", "Failed", "Succeeded"), {"succeeded": 2, "failed": 1, "stopped": 1}),
        ("Failed", ("Running", "Stopped", "Running", "Running"), {"failed": 4}),
        ("WaitingForCache", (), {"pending": 4}),
    ],
)
def test_trials_of_one_job_stand_differently(phase: str, phases: tuple[str, ...], counts: dict[str, int]) -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4], trialsPerJob=4))
    sweep.settle()
    (name,) = sweep.created
    if phases:
        sweep.tell_saes(name, phase, *phases)
    else:
        sweep._tell(name, phase)
    sweep.settle()
    assert {state: number for state, number in sweep.trials.items() if number and state != "total"} == counts


def test_a_trial_with_several_saes_has_failed_when_all_of_them_have() -> None:
    saes = [{"name": name, "architecture": {"type": "topk", "k": 4}, "dSae": 64} for name in ("a", "b")]
    spec = sweep_spec(template=template(saes=saes))
    spec["space"] = {"parameters": [{"path": "saes[*].architecture.k", "values": [1, 2]}]}
    sweep = FakeSweep(spec)
    sweep.settle()
    first, second = sweep.created
    sweep.tell_saes(first, "Succeeded", "Failed", "Succeeded")
    sweep.tell_saes(second, "Succeeded", "Failed", "Failed")
    sweep.settle()
    assert (sweep.trials["succeeded"], sweep.trials["failed"]) == (1, 1)
    assert sweep.status["best"][0]["sae"] == f"{sweep.status['best'][0]['name']}-b"
    assert sweep.status["failures"][0]["message"] == "NaN"


def test_credentials_in_parameters_are_not_told() -> None:
    path, secret = "saes[0].startFrom.uri", "s3cret-" * 8
    places = [f"file:///saes/{'x' * length}?https://me:{secret}@host" for length in (8, 60, 120)]
    spec = sweep_spec(space={"parameters": [{"path": path, "values": places}]})
    sweep = FakeSweep(spec)
    sweep.settle()
    first, second, third = sweep.created
    sweep.succeed(first)
    sweep.fail(second, third)
    sweep.settle()
    assert "https://***" in str(sweep.status["failures"])
    wrong = FakeSweep(spec | {"space": {"parameters": [{"path": "saes[0].dtype", "values": places}]}})
    wrong.settle()
    assert wrong.condition("Invalid") is not None
    for told in (sweep, wrong):
        assert "s3cret" not in str(told.status) + str(told.events)


def test_suspending_and_resuming() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4], maxParallel=3))
    sweep.settle()
    sweep.run(*sweep.created)
    sweep.succeed(sweep.by_k()[1])
    sweep.settle()
    by_hand = sweep.jobs[sweep.by_k()[4]]
    by_hand["spec"]["suspend"] = True
    by_hand["metadata"]["generation"] += 1
    sweep.settle()
    sweep.edit(suspend=True)
    sweep.look()
    assert sweep.phase == "Running"
    assert "waits for 2 training jobs to stop" in sweep.message()
    assert [job["spec"]["suspend"] for job in sweep.jobs.values()] == [False, True, True, True]
    sweep.settle()
    assert sweep.phase == "Suspended"
    assert sorted(set(sweep.patched)) == sorted([sweep.by_k()[2], sweep.by_k()[3]])
    sweep.edit(suspend=False)
    sweep.settle()
    assert [job["spec"]["suspend"] for job in sweep.jobs.values()] == [False, False, False, True]
    assert not any("suspended-by-sweep" in str(job["metadata"]["annotations"]) for job in sweep.jobs.values())
    assert f"suspended by hand: {sweep.by_k()[4]}" in sweep.message()


def test_a_sweep_that_is_created_suspended_makes_nothing() -> None:
    sweep = FakeSweep(sweep_spec(suspend=True))
    sweep.settle()
    assert sweep.jobs == {}
    assert sweep.phase == "Suspended"
    sweep.edit(suspend=False)
    sweep.settle()
    assert len(sweep.jobs) == 4


def test_a_report_stops_with_the_sweep() -> None:
    sweep = FakeSweep(sweep_spec([1, 2]))
    sweep.settle()
    sweep.succeed(*sweep.created)
    sweep.settle()
    sweep.edit(suspend=True)
    sweep.settle()
    assert sweep.reports == {}
    assert sweep.phase == "Suspended"
    sweep.edit(suspend=False)
    sweep.settle()
    assert sweep.phase == "Reporting"
    # Also when it is resumed before anything has told that the Job is gone.
    sweep.edit(suspend=True)
    sweep.look()
    assert sweep.phase == "Reporting"
    sweep.edit(suspend=False)
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Succeeded"
    assert "attempts" not in sweep.status, "no Job counts as deleted by somebody"


def test_failed_trials_are_told_and_others_go_on() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3], maxParallel=1))
    for name_of_k, fails in ((1, False), (2, True), (3, False)):
        sweep.settle()
        name = sweep.by_k()[name_of_k]
        sweep.fail(name) if fails else sweep.succeed(name)
    sweep.settle()
    told = sweep.condition("TrialsFailed")
    assert told is not None
    assert told["message"].startswith("1 of 3 trials failed: t-")
    assert "(saes[0].architecture.k=2): the loss is not finite" in told["message"]
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Succeeded"
    assert sweep.message() == "2 of 3 trials were trained, 1 failed: see s3://saes/out/report.html"
    assert [reason for reason, _ in sweep.events].count("TrialsFailed") == 1


def test_too_many_failures_start_no_others_but_finish_what_runs() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4, 5, 6], maxParallel=3, maxFailedTrials=1))
    sweep.settle()
    sweep.fail(sweep.by_k()[1])
    sweep.settle()
    assert len(sweep.created) == 4, "one may fail"
    sweep.fail(sweep.by_k()[2])
    sweep.settle()
    assert len(sweep.created) == 4
    assert "no others are started" in sweep.message()
    sweep.succeed(sweep.by_k()[3], sweep.by_k()[4])
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Failed"
    ready = sweep.condition("Ready")
    assert ready is not None
    assert ready["reason"] == "TooManyFailedTrials"
    assert sweep.message().startswith("2 trials failed, more than spec.maxFailedTrials allows; 2 were not started")
    # What can help: a higher limit.
    sweep.edit(maxFailedTrials=2)
    sweep.settle()
    assert len(sweep.created) == 6
    sweep.succeed(sweep.by_k()[5], sweep.by_k()[6])
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Succeeded"
    assert len(sweep.reports) == 2


def test_when_all_have_failed_there_is_nothing_to_report() -> None:
    sweep = FakeSweep(sweep_spec([1, 2]))
    sweep.settle()
    sweep.fail(*sweep.created, message="no such bucket")
    sweep.settle()
    assert sweep.phase == "Failed"
    assert sweep.reports == {}
    ready = sweep.condition("Ready")
    assert ready is not None
    assert ready["reason"] == "AllTrialsFailed"
    assert [failure["message"] for failure in sweep.status["failures"]] == ["no such bucket"] * 2


def test_raising_retry_runs_failed_jobs_again_and_no_others() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4], maxParallel=4))
    sweep.settle()
    sweep.fail(sweep.by_k()[1], sweep.by_k()[2], sweep.by_k()[3])
    sweep.succeed(sweep.by_k()[4])
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Succeeded"
    # One was run again by hand: its own retry is ahead.
    sweep.jobs[sweep.by_k()[3]]["spec"]["retry"] = 5
    sweep.edit(retry=1, maxParallel=2)
    sweep.look()
    assert sweep.phase == "Running"
    assert [sweep.jobs[sweep.by_k()[k]]["spec"]["retry"] for k in (1, 2, 3, 4)] == [1, 1, 5, 0]
    assert sweep.trials == {"total": 4, "pending": 3, "running": 0, "succeeded": 1, "stopped": 0, "failed": 0}
    sweep.settle()
    sweep.succeed(sweep.by_k()[1])
    sweep.settle()
    assert [sweep.jobs[sweep.by_k()[k]]["spec"]["retry"] for k in (1, 2, 3, 4)] == [1, 1, 6, 0]
    sweep.fail(sweep.by_k()[2])
    sweep.succeed(sweep.by_k()[3])
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert sweep.phase == "Succeeded"
    assert sweep.trials["failed"] == 1, "once for each time that it is raised"
    assert len(sweep.reports) == 2


def test_raising_retry_packs_trials_that_failed_among_others_into_new_jobs() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3, 4, 5], trialsPerJob=2, maxParallel=2))
    sweep.settle()
    first, second = sweep.created
    sweep.tell_saes(first, "Succeeded", "Failed", "Succeeded")
    sweep.tell_saes(second, "Succeeded", "Stopped", "Failed")
    sweep.settle()
    sweep.succeed(sweep.by_k()[5])
    sweep.settle()
    assert sweep.phase == "Reporting"
    sweep.end_report()
    sweep.settle()
    assert sweep.trials == {"total": 5, "pending": 0, "running": 0, "succeeded": 2, "stopped": 1, "failed": 2}
    sweep.edit(retry=1)
    sweep.settle()
    assert sweep.phase == "Running"
    assert sweep.trials["failed"] == 0
    assert [sweep.counts(name) for name in sweep.created] == [[1, 2], [3, 4], [5], [1, 4]]
    assert sweep.patched == sweep.deleted == []
    again = sweep.created[-1]
    sweep.tell_saes(again, "Succeeded", "Succeeded", "Failed")
    sweep.settle()
    assert sweep.phase == "Reporting"
    told = {job.name: len(job.trials) for job in sweep.given().jobs}
    assert told == {first: 1, second: 1, sweep.created[2]: 1, again: 2}
    sweep.end_report()
    sweep.settle()
    assert sweep.trials == {"total": 5, "pending": 0, "running": 0, "succeeded": 3, "stopped": 1, "failed": 1}
    assert sweep.status["failures"][0]["jobName"] == again
    # Once for each time that it is raised; alone in its job, the trial fails with it and goes on there.
    sweep.edit(retry=2)
    sweep.settle()
    alone = sweep.created[-1]
    assert sweep.counts(alone) == [4]
    sweep.fail(alone)
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert len(sweep.created) == 5
    sweep.edit(retry=3)
    sweep.settle()
    assert sweep.patched == [alone]
    sweep.succeed(alone)
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert sweep.trials["failed"] == 0
    # More tokens, too, leave each trial with its newest job.
    sweep.edit_template(training={"tokens": 2000})
    for _ in range(5):
        sweep.settle()
        sweep.succeed(*sweep.unfinished())
    assert sweep.phase == "Reporting"
    assert (len(sweep.created), sweep.deleted) == (5, [])


def test_a_job_is_no_longer_needed_when_its_last_trial_has_left_it() -> None:
    sweep = FakeSweep(sweep_spec([1, 2], trialsPerJob=2))
    sweep.settle()
    sweep.tell_saes(first := sweep.created[0], "Succeeded", "Failed", "Succeeded")
    sweep.settle()
    sweep.edit(space=k_space([1]), retry=1)
    sweep.settle()
    assert sweep.deleted == [first]
    assert sweep.counts(sweep.created[1]) == [1]


def test_a_report_that_fails_is_told_and_not_tried_for_ever() -> None:
    sweep = FakeSweep(sweep_spec([1, 2]))
    sweep.settle()
    sweep.succeed(*sweep.created)
    sweep.settle()
    sweep.end_report(failed=True)
    sweep.settle()
    assert sweep.phase == "Succeeded"
    told = sweep.condition("ReportFailed")
    assert told is not None
    assert "raise spec.retry" in told["message"]
    assert "reportUri" not in sweep.status
    assert "below s3://saes/out" in sweep.message()
    sweep.edit(retry=1)
    sweep.settle()
    assert sweep.phase == "Reporting"
    assert sweep.patched == []
    sweep.end_report()
    sweep.settle()
    assert sweep.status["reportUri"] == "s3://saes/out/report.html"
    assert sweep.condition("ReportFailed") is None


def test_an_ended_sweep_is_left_alone() -> None:
    sweep = FakeSweep(sweep_spec([1, 2]))
    sweep.settle()
    sweep.succeed(*sweep.created)
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    calls = sweep.calls
    sweep.delete(sweep.created[0])
    sweep.reports.clear()
    sweep.settle()
    assert sweep.calls == calls
    # What it is not about changes nothing either.
    sweep.edit(maxParallel=7)
    sweep.settle()
    assert sweep.phase == "Succeeded"
    assert len(sweep.created) == 2
    assert sweep.reports == {}


def test_after_a_time_nothing_is_left_of_the_report_but_its_files() -> None:
    sweep = FakeSweep(sweep_spec([1, 2], template=template(run={"ttlSecondsAfterFinished": 60})))
    sweep.settle()
    sweep.succeed(*sweep.created)
    sweep.settle()
    sweep.end_report()
    sweep.settle()
    assert sweep.reports
    assert sweep.wanted().requeue_after == pytest.approx(60, abs=5)
    sweep.now += timedelta(seconds=61)
    sweep.settle()
    assert sweep.reports == sweep.config_maps == {}
    assert sweep.phase == "Succeeded"
    assert sweep.status["reportUri"] == "s3://saes/out/report.html"
    assert len(sweep.jobs) == 2, "the training jobs look after themselves"


def test_a_report_that_takes_too_long_fails_and_ends_nothing() -> None:
    sweep = FakeSweep(sweep_spec([1, 2], template=template(run={"activeDeadlineSeconds": 60})))
    sweep.settle()
    sweep.succeed(*sweep.created)
    sweep.settle()
    sweep.status["activeSince"] = sweep.status["startTime"]
    sweep.now += timedelta(seconds=100)
    sweep.settle()
    assert sweep.phase == "Succeeded"
    told = sweep.condition("ReportFailed")
    assert told is not None
    assert told["reason"] == "DeadlineExceeded"
    assert sweep.reports == {}


def test_a_training_job_that_is_deleted_is_made_again_while_the_sweep_works() -> None:
    sweep = FakeSweep(sweep_spec([1, 2, 3], trialsPerJob=1, maxParallel=2))
    sweep.settle()
    first, second = sweep.created
    sweep.succeed(first)
    sweep.settle()
    for name in (first, second):
        sweep.delete(name)
    sweep.settle()
    assert sorted(sweep.created) == sorted([first, second, sweep.by_k()[3], *sweep.created[3:]])
    assert sweep.created[3] == first
    sweep.succeed(sweep.by_k()[3])
    sweep.settle()
    assert second in sweep.created[3:]


def test_what_the_administrator_forbids_is_refused_before_anything_is_made() -> None:
    settings = FakeSweep().settings
    allowed = type(settings)(job_image="sae-job:test", allowed_images=("registry.lab/*",))
    spec = sweep_spec(template=template(run={"image": "registry.lab/a:1"}))
    spec["space"] = {"parameters": [{"path": "run.image", "values": ["registry.lab/a:1", "evil/b:1"]}]}
    sweep = FakeSweep(spec, settings=allowed)
    sweep.settle()
    assert sweep.jobs == {}
    invalid = sweep.condition("Invalid")
    assert invalid is not None
    assert invalid["reason"] == "NotAllowed"
    assert "evil/b:1" in invalid["message"]

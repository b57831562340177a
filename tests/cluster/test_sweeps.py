"""Lives of sweeps on a real API server: their training jobs are led by the same operator, their pods by each test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from sae_operator.api.steps import SweepStep
from sae_operator.api.sweep_expansion import expand, trial_of
from tests.fake_kubelet import Behaviour, Ends, FakeKubelet, Runs, owner_of, result, step_of, succeed
from tests.operator_process import OperatorProcess, run_operator, start_operator
from tests.operator_world import World, conditions, training_spec
from tests.testbed.waiting import wait_for

SWEEP, JOB = "SAESweep", "SAETrainingJob"
PATH = "saes[0].architecture.k"


@dataclass
class Trials:
    """What the pods of a namespace's training jobs do: they train, and tell 0.5 + k/100 of each SAE.

    Attributes:
        holds: jobs with such an SAE run until it is changed.
        fails: jobs with such an SAE end with exit code 2.
        diverges: such an SAE fails where others of its job are trained.
    """

    world: World
    holds: Callable[[int], bool] = lambda k: False
    fails: Callable[[int], bool] = lambda k: False
    diverges: Callable[[int], bool] = lambda k: False
    report: Behaviour = field(default_factory=lambda: Ends(message=result("report")))
    _saes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __call__(self, pod: dict[str, Any]) -> Behaviour:
        step = step_of(pod)
        if step == "report":
            return self.report
        if step != "train":
            return succeed(pod)
        saes = self._trained(owner_of(pod))
        counts = [sae["architecture"]["k"] for sae in saes]
        if any(self.fails(k) for k in counts):
            return Ends(2, result("train", exitCode=2, reason="NotLearnable", message="the loss is not finite"))
        if any(self.holds(k) for k in counts):
            return Runs()
        told = [
            {"name": sae["name"], "phase": "Failed", "message": "the loss is not finite"}
            if self.diverges(k) and len(saes) > 1
            else {"name": sae["name"], "phase": "Succeeded", "explainedVariance": 0.5 + k / 100, "l0": float(k)}
            for sae, k in zip(saes, counts, strict=True)
        ]
        return Ends(message=result("train", tokens=900, tokensPerSecond=450.0, saes=told))

    def _trained(self, job: str) -> list[dict[str, Any]]:
        if job not in self._saes:
            found = self.world.get(JOB, job)
            if found is None:
                return []
            self._saes[job] = found["spec"]["saes"]
        return self._saes[job]


@pytest.fixture
def trials(world: World, kubelet: FakeKubelet) -> Trials:
    script = kubelet.scripts[world.namespace] = Trials(world)
    return script


def sweep_spec(counts: list[int], activations: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A sweep of k, by default on a finished cache."""
    template = training_spec(activations or {"uri": "s3://bucket/cache"}, output={"uri": "s3://bucket/sweep"})
    space = {"parameters": [{"path": PATH, "values": counts}]}
    return {"template": template, "space": space, "report": template["run"]["cpuSteps"], **changes}


def jobs_of(world: World, name: str = "sweep") -> dict[str, dict[str, Any]]:
    """The sweep's training jobs by their names."""
    found = world.list(JOB)
    return {
        job["metadata"]["name"]: job for job in found if job["metadata"]["labels"].get("sae-operator.dev/sweep") == name
    }


def counts_of(job: dict[str, Any]) -> list[int]:
    return [sae["architecture"]["k"] for sae in job["spec"]["saes"]]


def by_k(world: World) -> dict[int, dict[str, Any]]:
    """Training jobs of one trial each, by their k."""
    return {counts_of(job)[0]: job for job in jobs_of(world).values()}


def phases(world: World) -> dict[int, str | None]:
    return {k: (job.get("status") or {}).get("phase") for k, job in by_k(world).items()}


def trainings(world: World) -> list[str]:
    return [step for step in world.steps() if step.startswith("train")]


def space(counts: list[int]) -> dict[str, Any]:
    return {"spec": {"space": {"parameters": [{"path": PATH, "values": counts}]}}}


def told_trials(found: dict[str, Any]) -> dict[str, int]:
    return found["status"]["trials"]


def test_a_trial_that_failed_among_others_is_trained_alone_when_retry_is_raised(
    world: World, operator: OperatorProcess, trials: Trials
) -> None:
    trials.diverges = lambda k: k == 2
    world.create(SWEEP, "sweep", sweep_spec([1, 2, 3], trialsPerJob=3))
    sweep = world.wait_phase(SWEEP, "sweep", "Succeeded", timeout=120)
    assert (told_trials(sweep)["succeeded"], told_trials(sweep)["failed"]) == (2, 1)
    (first,) = jobs_of(world).values()
    world.patch(SWEEP, "sweep", {"spec": {"retry": 1}})
    sweep = world.wait_phase(SWEEP, "sweep", "Succeeded", timeout=120)
    assert told_trials(sweep) == {"total": 3, "pending": 0, "running": 0, "succeeded": 3, "stopped": 0, "failed": 0}
    assert sorted(counts_of(job) for job in jobs_of(world).values()) == [[1, 2, 3], [2]]
    assert jobs_of(world)[first["metadata"]["name"]]["spec"] == first["spec"], "what was trained is left alone"
    outputs = {job["spec"]["output"]["uri"] for job in jobs_of(world).values()}
    assert len(outputs) == 2
    assert sweep["status"]["jobs"] == {"total": 2, "unfinished": 0}


@pytest.fixture
def deep_documents() -> Iterator[None]:
    """This process can write what is nested as deep as the API server takes it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("deep_documents")
def test_values_that_are_nested_too_deep_are_refused_and_keep_nobody_from_work(world: World, trials: Trials) -> None:
    for depth in (150, 230, 300, 9000):
        value: Any = 1
        for _ in range(depth):
            value = {"a": value}
        world.create(SWEEP, f"deep-{depth}", sweep_spec([1], space={"parameters": [{"path": PATH, "values": [value]}]}))
    # One that starts lists them, and one that runs is told of them.
    with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
        world.create(SWEEP, "sweep", sweep_spec([1, 2]))
        world.wait_phase(SWEEP, "sweep", "Succeeded", timeout=120)
        for depth in (150, 230, 300, 9000):
            refused = world.wait_condition(SWEEP, f"deep-{depth}", "Invalid", "True")
            assert ("nested too deep" in refused["message"]) == (depth > 200)
        world.patch(SWEEP, "deep-9000", {"metadata": {"labels": {"a": "b"}}})
        world.patch(SWEEP, "sweep", space([1, 2, 3]))
        world.wait_resource(SWEEP, "sweep", lambda found: told_trials(found)["total"] == 3)
        world.wait_phase(SWEEP, "sweep", "Succeeded", timeout=120)


def test_a_packed_sweep_trains_all_trials_from_one_cache_and_reports(
    world: World, operator: OperatorProcess, trials: Trials
) -> None:
    spec = sweep_spec([1, 2, 3, 4, 5], training_spec()["activations"], trialsPerJob=2)
    created = world.create(SWEEP, "sweep", spec)
    assert created["status"]["observedGeneration"] == -1
    sweep = world.wait_phase(SWEEP, "sweep", "Succeeded", "Failed", timeout=120)
    status = sweep["status"]
    assert status["phase"] == "Succeeded", status
    assert told_trials(sweep) == {"total": 5, "pending": 0, "running": 0, "succeeded": 5, "stopped": 0, "failed": 0}
    assert status["jobs"] == {"total": 3, "unfinished": 0}
    jobs = jobs_of(world)
    assert sorted(counts_of(job) for job in jobs.values()) == [[1, 2], [3, 4], [5]]
    assert len(world.list("ActivationCache")) == 1
    assert [trial["l0"] for trial in status["best"]] == [5, 4, 3, 2, 1]
    best = status["best"][0]
    assert best["parameters"] == f"{PATH}=5"
    assert best["objective"] == pytest.approx(0.55)
    assert best["sae"] == best["name"]
    assert status["summary"] == {"trial": best["name"], "objective": "0.55", "l0": "5.0", "finished": "5/5"}
    assert status["reportUri"] == "s3://bucket/sweep/report.html"
    assert {name: item["status"] for name, item in conditions(sweep).items()} == {
        "Ready": "True",
        "Reconciling": "False",
        "Stalled": "False",
    }
    given = next(item for item in world.list("ConfigMap", ours=True) if item["metadata"]["name"].endswith("-report-1"))
    step = SweepStep.model_validate_json(given["data"]["step.json"])
    assert {job.name: job.folder for job in step.jobs} == {
        name: job["spec"]["output"]["uri"].rpartition("/")[2] for name, job in jobs.items()
    }
    names = [trial.name for trial in expand(step.spec)]
    assert [trial for job in step.jobs for trial in job.trials] == names
    assert {trial_of(sae["name"]) for job in jobs.values() for sae in job["spec"]["saes"]} == set(names)
    for job in jobs.values():
        assert job["metadata"]["ownerReferences"][0]["uid"] == sweep["metadata"]["uid"]


def test_what_is_wrong_with_a_space_is_told_before_anything_is_made(world: World, operator: OperatorProcess) -> None:
    spec = sweep_spec([1, 2, 17])
    world.create(SWEEP, "sweep", spec)
    told = world.wait_condition(SWEEP, "sweep", "Invalid")
    assert "spec.template.saes[0]" in told["message"]
    assert f"{PATH}=17" in told["message"]
    assert conditions(world.wait_phase(SWEEP, "sweep", "Pending"))["Stalled"]["status"] == "True"
    assert jobs_of(world) == {}
    world.patch(SWEEP, "sweep", space([1, 2]))
    assert world.wait_phase(SWEEP, "sweep", "Succeeded")["status"]["trials"]["succeeded"] == 2


def test_no_more_jobs_than_allowed_are_unfinished(world: World, operator: OperatorProcess, trials: Trials) -> None:
    trials.holds = lambda k: True
    world.create(SWEEP, "sweep", sweep_spec([1, 2, 3, 4], maxParallel=2))
    wait_for(lambda: phases(world) == {1: "Running", 2: "Running"}, what=lambda: f"two jobs: {phases(world)}")
    trials.holds = lambda k: k != 2
    wait_for(lambda: phases(world) == {1: "Running", 2: "Succeeded", 3: "Running"}, what="a third one")
    found = world.wait_phase(SWEEP, "sweep", "Running")
    assert told_trials(found)["total"] == 4
    trials.holds = lambda k: False
    assert world.wait_phase(SWEEP, "sweep", "Succeeded")["status"]["summary"]["finished"] == "4/4"


def test_suspending_stops_all_jobs_and_resuming_goes_on(
    world: World, operator: OperatorProcess, trials: Trials
) -> None:
    trials.holds = lambda k: k != 1
    world.create(SWEEP, "sweep", sweep_spec([1, 2, 3, 4], maxParallel=2))
    wait_for(lambda: phases(world) == {1: "Succeeded", 2: "Running", 3: "Running"}, what="two at work")
    # One that somebody suspends stays so.
    world.patch(JOB, by_k(world)[2]["metadata"]["name"], {"spec": {"suspend": True}})
    world.wait_phase(JOB, by_k(world)[2]["metadata"]["name"], "Suspended")
    world.patch(SWEEP, "sweep", {"spec": {"suspend": True}})
    found = world.wait_phase(SWEEP, "sweep", "Suspended")
    assert conditions(found)["Reconciling"]["status"] == "False"
    assert phases(world) == {1: "Succeeded", 2: "Suspended", 3: "Suspended"}
    assert not [pod for pod in world.list("Pod", ours=True) if pod["status"]["phase"] == "Running"]
    trials.holds = lambda k: False
    world.patch(SWEEP, "sweep", {"spec": {"suspend": False}})
    wait_for(
        lambda: phases(world) == {1: "Succeeded", 2: "Suspended", 3: "Succeeded", 4: "Succeeded"},
        what=lambda: f"the others end: {phases(world)}",
    )
    name = by_k(world)[2]["metadata"]["name"]
    ready = world.wait_resource(SWEEP, "sweep", lambda found: name in conditions(found)["Ready"]["message"])
    assert f"suspended by hand: {name}" in conditions(ready)["Ready"]["message"]
    world.patch(JOB, name, {"spec": {"suspend": False}})
    world.wait_phase(SWEEP, "sweep", "Succeeded")


def test_an_edited_space_trains_what_is_new_and_nothing_again(
    world: World, operator: OperatorProcess, trials: Trials
) -> None:
    trials.holds = lambda k: k == 3
    world.create(SWEEP, "sweep", sweep_spec([1, 2, 3]))
    wait_for(lambda: phases(world) == {1: "Succeeded", 2: "Succeeded", 3: "Running"}, what="the first ones have ended")
    kept = by_k(world)[2]["metadata"]["uid"]
    world.patch(SWEEP, "sweep", space([2, 4]))
    ended = world.wait_phase(SWEEP, "sweep", "Succeeded")
    assert phases(world) == {2: "Succeeded", 4: "Succeeded"}
    assert by_k(world)[2]["metadata"]["uid"] == kept
    assert told_trials(ended)["total"] == 2
    report = ended["status"]["jobName"]
    world.patch(SWEEP, "sweep", space([2, 4, 5]))
    more = world.wait_resource(
        SWEEP, "sweep", lambda found: found["status"]["phase"] == "Succeeded" and told_trials(found)["total"] == 3
    )
    assert by_k(world)[2]["metadata"]["uid"] == kept
    assert more["status"]["jobName"] != report
    # The garbage collector deletes the Jobs of training jobs that were deleted.
    wait_for(lambda: trainings(world) == ["train-1"] * 3, what=lambda: f"one Job to a trial: {world.steps()}")


def test_failed_trials_are_told_and_run_again_when_retry_is_raised(
    world: World, operator: OperatorProcess, trials: Trials
) -> None:
    trials.fails = lambda k: k == 2
    world.create(SWEEP, "sweep", sweep_spec([1, 2, 3]))
    sweep = world.wait_phase(SWEEP, "sweep", "Succeeded")
    assert told_trials(sweep)["failed"] == 1
    failure = sweep["status"]["failures"][0]
    assert failure["parameters"] == f"{PATH}=2"
    assert "the loss is not finite" in failure["message"]
    assert "the loss is not finite" in conditions(sweep)["TrialsFailed"]["message"]
    others = {k: by_k(world)[k]["metadata"]["generation"] for k in (1, 3)}
    trials.fails = lambda k: False
    # What failed for want of memory, say, is given more with the retry.
    patch = {"retry": 1, "template": {"run": {"backoffLimit": 7}}}
    world.patch(SWEEP, "sweep", {"spec": patch})
    again = world.wait_resource(
        SWEEP, "sweep", lambda found: found["status"]["phase"] == "Succeeded" and told_trials(found)["failed"] == 0
    )
    assert "TrialsFailed" not in conditions(again)
    assert by_k(world)[2]["spec"]["run"]["backoffLimit"] == 7
    assert by_k(world)[2]["spec"]["retry"] == 1
    assert {k: by_k(world)[k]["metadata"]["generation"] for k in (1, 3)} == others


def test_a_sweep_of_failures_has_failed(world: World, operator: OperatorProcess, trials: Trials) -> None:
    trials.fails = lambda k: True
    world.create(SWEEP, "sweep", sweep_spec([1, 2]))
    sweep = world.wait_phase(SWEEP, "sweep", "Failed")
    assert conditions(sweep)["Stalled"]["reason"] == "AllTrialsFailed"
    assert not any("report" in step for step in world.steps())


def test_a_report_that_fails_ends_nothing(world: World, operator: OperatorProcess, trials: Trials) -> None:
    trials.report = Ends(2, result("report", exitCode=2, reason="StoreUnwritable", message="no bucket"))
    world.create(SWEEP, "sweep", sweep_spec([1, 2]))
    sweep = world.wait_phase(SWEEP, "sweep", "Succeeded")
    assert "no bucket" in conditions(sweep)["ReportFailed"]["message"]
    assert "reportUri" not in sweep["status"]
    trials.report = Ends(message=result("report"))
    world.patch(SWEEP, "sweep", {"spec": {"retry": 1}})
    again = world.wait_resource(SWEEP, "sweep", lambda found: "reportUri" in found["status"])
    assert "ReportFailed" not in conditions(again)


def test_an_operator_that_is_killed_makes_nothing_twice(world: World, trials: Trials) -> None:
    trials.holds = lambda k: True
    first = start_operator(world.control_plane.kubeconfig, namespace=world.namespace)
    world.create(SWEEP, "sweep", sweep_spec([1, 2, 3, 4], maxParallel=2))
    wait_for(lambda: phases(world) == {1: "Running", 2: "Running"}, what="two at work")
    first.kill()
    made = {name: job["metadata"]["uid"] for name, job in jobs_of(world).items()}
    # Deleted while nobody looks: it is made again.
    world.delete(JOB, by_k(world)[2]["metadata"]["name"])
    trials.holds = lambda k: False
    wait_for(lambda: 2 not in by_k(world), what="the job is gone")
    with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
        world.wait_phase(SWEEP, "sweep", "Succeeded", timeout=120)
    jobs = jobs_of(world)
    assert sorted(counts_of(job) for job in jobs.values()) == [[1], [2], [3], [4]]
    assert set(made) <= set(jobs)
    assert jobs[by_k(world)[1]["metadata"]["name"]]["metadata"]["uid"] in made.values()
    assert json.dumps(sorted(jobs)).count("sweep-") == 4


def test_two_operators_at_once_make_nothing_twice(world: World, operator: OperatorProcess, trials: Trials) -> None:
    with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
        world.create(SWEEP, "sweep", sweep_spec([1, 2, 3, 4, 5], trialsPerJob=2))
        world.wait_phase(SWEEP, "sweep", "Succeeded", timeout=120)
        world.patch(SWEEP, "sweep", space([1, 2, 5, 6]))
        edited = world.wait_resource(
            SWEEP, "sweep", lambda found: found["status"]["phase"] == "Succeeded" and told_trials(found)["total"] == 4
        )
    assert sorted(counts_of(job) for job in jobs_of(world).values()) == [[1, 2], [5], [6]]
    assert told_trials(edited)["succeeded"] == 4
    # The garbage collector deletes the Jobs of training jobs that were deleted.
    wait_for(lambda: trainings(world) == ["train-1"] * 3, what=lambda: f"one Job to a group: {world.steps()}")


def test_everything_goes_with_the_sweep(world: World, operator: OperatorProcess, trials: Trials) -> None:
    trials.holds = lambda k: True
    world.create(SWEEP, "sweep", sweep_spec([1, 2, 3]))
    wait_for(lambda: phases(world) == {1: "Running", 2: "Running", 3: "Running"}, what="all at work")
    world.delete(SWEEP, "sweep")
    # The garbage collector looks every 30 s which kinds there are; ours may be new to it.
    wait_for(lambda: not jobs_of(world), 90, what="the training jobs are gone")
    wait_for(lambda: not world.jobs(), what="the Jobs are gone")

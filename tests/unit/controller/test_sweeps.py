"""What the shell does for sweeps: facts of their training jobs, trials that are kept, and looks put together."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import pytest

from sae_operator.api.sweep import Objective, SAESweepSpec
from sae_operator.controller import outlines as outlines_module
from sae_operator.controller.client import ApiError
from sae_operator.controller.executor import Executor, changes_of
from sae_operator.controller.observe import observe_sweep
from sae_operator.controller.outlines import KEPT_TRIALS, Outlines
from sae_operator.controller.queue import Key, RetryAfter, WorkQueue
from sae_operator.controller.store import Store
from sae_operator.reconcile.observed import Defaults, InvalidSpec
from sae_operator.reconcile.sweep_trials import Outline
from sae_operator.reconcile.wanted import EventWanted, TrainingJobPatch, Wanted
from tests.specs import SWEEP_SPEC, edited

JOB, SWEEP = "SAETrainingJob", "SAESweep"
JOBS = "/apis/sae-operator.dev/v1alpha1/namespaces/ns/saetrainingjobs"
KEY = Key(SWEEP, "ns", "sweep")
TRIAL = "t-0123456789"


def sweep(version: int = 1, generation: int = 1, **spec: Any) -> dict[str, Any]:
    meta = {"name": "sweep", "namespace": "ns", "uid": "uid-sweep", "generation": generation}
    return {"metadata": {**meta, "resourceVersion": str(version)}, "spec": {**SWEEP_SPEC, **spec}, "status": {}}


def job(name: str, version: int = 1, *, owner: str = "uid-sweep", **status: Any) -> dict[str, Any]:
    reference = {"kind": SWEEP, "name": "sweep", "uid": owner, "controller": True}
    meta = {"name": name, "namespace": "ns", "uid": f"uid-{name}", "generation": 2, "ownerReferences": [reference]}
    spec = {
        "saes": [{"name": TRIAL}, {"name": f"{TRIAL[:-1]}a-x"}],
        "training": {"tokens": 500},
        "run": {"backoffLimit": 3, "nodeSelector": {"a": "b"}},
        "output": {"uri": "s3://b/sweep/folder"},
        "suspend": False,
    }
    return {"kind": JOB, "metadata": {**meta, "resourceVersion": str(version)}, "spec": spec, "status": status}


# The store


def test_a_training_job_of_a_sweep_is_known_by_its_facts() -> None:
    store = Store()
    store.put_resource(SWEEP, sweep())
    sae = {"name": TRIAL, "phase": "Succeeded", "explainedVariance": 0.5, "l0": 4}
    assert store.put_resource(JOB, job("a", phase="Running", observedGeneration=2, saes=[sae])) == {
        Key(JOB, "ns", "a"),
        KEY,
    }
    (facts,) = store.trial_jobs("uid-sweep")
    assert facts.trials == (TRIAL, f"{TRIAL[:-1]}a")
    assert (facts.folder, facts.tokens, facts.phase, facts.seen) == ("folder", 500, "Running", True)
    assert (facts.saes[0].figure("explained_variance"), facts.saes[0].figure("mse")) == (0.5, None)


def test_a_sweep_hears_of_what_it_can_see_alone() -> None:
    store = Store()
    store.put_resource(SWEEP, sweep())
    training = {"name": TRIAL, "phase": "Running", "explainedVariance": 0.1}
    store.put_resource(JOB, job("a", phase="Running", saes=[training]))
    for version, share in ((2, 0.2), (3, 0.3)):
        told = {"progress": {"percent": 100 * share}, "saes": [training | {"explainedVariance": share}]}
        ready = {"type": "Ready", "status": "False", "message": f"{share} done"}
        changed = job("a", version, phase="Running", conditions=[ready], **told)
        assert store.put_resource(JOB, changed) == {Key(JOB, "ns", "a")}
    assert KEY in store.put_resource(JOB, job("a", 4, phase="Running", saes=[training | {"phase": "Stopped"}]))
    assert KEY in store.put_resource(JOB, job("a", 5, phase="Succeeded"))
    assert store.drop_resource("uid-a") == {KEY}
    assert store.trial_jobs("uid-sweep") == ()


def test_nothing_is_kept_of_sweeps_and_jobs_that_are_gone() -> None:
    store = Store()
    # In whatever order they are listed.
    store.put_resource(JOB, job("a"))
    assert KEY in store.put_resource(SWEEP, sweep())
    assert len(store.trial_jobs("uid-sweep")) == 1
    store.drop_resource("uid-sweep")
    store.put_resource(JOB, job("b"))
    store.put_resource(JOB, job("a", 2, phase="Running"))
    assert store.drop_resource("uid-a") == store.drop_resource("uid-b") == set()
    assert store._trial_jobs == {}


def test_a_sweep_hears_that_a_job_of_its_has_given_way_to_somebody_elses() -> None:
    store = Store()
    store.put_resource(SWEEP, sweep())
    store.put_resource(JOB, job("a"))
    other = job("a", 2)
    other["metadata"] |= {"uid": "uid-other", "ownerReferences": []}
    # That the first one was deleted was missed.
    assert KEY in store.put_resource(JOB, other)
    assert store.trial_jobs("uid-sweep") == ()


@pytest.mark.parametrize("depth", [230, 300, 800])
def test_a_sweep_whose_values_are_nested_too_deep_is_kept_and_told_so(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    store = Store()
    store.put_resource(SWEEP, sweep(space={"parameters": [{"path": "training.tokens", "values": [value]}]}))
    stored = store.get(KEY)
    assert stored is not None
    spec = store.spec_of(stored)
    assert isinstance(spec, InvalidSpec)
    assert [(problem.field, problem.message) for problem in spec.problems] == [
        ("spec", "is nested too deep to be read")
    ]


def test_a_job_that_somebody_labels_is_no_sweeps() -> None:
    store, foreign = Store(), job("a")
    store.put_resource(SWEEP, sweep())
    foreign["metadata"]["ownerReferences"][0]["controller"] = False
    store.put_resource(JOB, foreign)
    assert store.trial_jobs("uid-sweep") == ()


def test_a_sweeps_own_job_is_none_of_a_training_jobs() -> None:
    store = Store()
    store.put_resource(SWEEP, sweep())
    store.put_resource(JOB, job("a"))
    for name, kind, uid in (("report", SWEEP, "uid-sweep"), ("train", JOB, "uid-a")):
        reference = {"kind": kind, "name": "x", "uid": uid, "controller": True}
        meta = {"name": name, "uid": f"uid-{name}", "resourceVersion": "1", "ownerReferences": [reference]}
        store.put_job({"metadata": meta, "spec": {}, "status": {}})
    stored = store.get(KEY)
    assert stored is not None
    observed = observe_sweep(store, stored, None, Defaults())
    assert [found.name for found in observed.jobs] == ["report"]
    assert [found.name for found in observed.training_jobs] == ["a"]
    assert list(store.children("uid-a").jobs) == ["train"]


# Trials


async def test_trials_are_made_once_for_each_space(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = outlines_module.outline

    def counted(spec: SAESweepSpec) -> Outline:
        made.append(threading.current_thread().name)
        return real(spec)

    monkeypatch.setattr(outlines_module, "outline", counted)
    monkeypatch.setattr(outlines_module, "FEW_TRIALS", 1)
    kept = Outlines()
    spec = SAESweepSpec.model_validate(SWEEP_SPEC)
    first = await kept.of("a", 1, spec)
    assert isinstance(first, Outline)
    assert await kept.of("a", 1, spec) is first
    # What changes no trial makes none.
    assert await kept.of("a", 2, spec.model_copy(update={"suspend": True, "max_parallel": 9})) is first
    # What the report is about is told by them, too.
    other = await kept.of("a", 3, spec.model_copy(update={"objective": Objective(goal="minimize")}))
    assert isinstance(other, Outline)
    assert other.digest != first.digest
    made.clear()
    more = SAESweepSpec.model_validate(edited(SWEEP_SPEC, {"space.parameters.0.values": [1, 2, 3]}))
    assert await kept.of("a", 4, more) is not first
    kept.forget("a")
    await kept.of("a", 4, more)
    assert len(made) == 2
    main = threading.main_thread().name
    assert main not in made, "the event loop is not held up"
    monkeypatch.setattr(outlines_module, "FEW_TRIALS", 3)
    await kept.of("b", 1, more)
    assert made[2] == main


async def test_what_is_wrong_is_kept_too() -> None:
    wrong = SAESweepSpec.model_validate(edited(SWEEP_SPEC, {"space.parameters.0.values": [5000]}))
    found = await Outlines().of("a", 1, wrong)
    assert isinstance(found, InvalidSpec)
    assert found.problems[0].field.startswith("spec.template.saes[0]")


async def test_the_trials_of_sweeps_that_are_looked_at_seldom_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    real = outlines_module.outline(SAESweepSpec.model_validate(SWEEP_SPEC))
    half = Outline(**{**vars(real), "trials": real.trials * (KEPT_TRIALS // 4)})
    monkeypatch.setattr(outlines_module, "outline", lambda spec: half)
    kept = Outlines()
    spec = SAESweepSpec.model_validate(SWEEP_SPEC)
    for uid in ("a", "b", "a", "c"):
        await kept.of(uid, 1, spec)
    assert list(kept._kept) == ["a", "c"]


# Looks


async def test_what_is_due_soon_is_not_put_off_by_what_asks_again() -> None:
    async def process(key: Key) -> float | None:
        return None

    queue = WorkQueue(process)
    due: list[float] = []
    for seconds in (100.0, 200.0, 100.0, 50.0):
        queue.add_within(KEY, seconds)
        due.append(queue._timers[KEY].when())
    assert due[0] == due[1] == due[2]
    assert due[3] < due[0] - 49
    # What is to be looked at now needs no timer.
    queue.add(KEY)
    queue.add_within(KEY, 1.0)
    assert queue._timers == {}


async def test_what_is_asked_for_during_a_look_is_not_forgotten_for_a_later_one() -> None:
    looks = 0
    twice = asyncio.Event()
    queue: WorkQueue

    async def process(key: Key) -> float | None:
        nonlocal looks
        looks += 1
        if looks == 1:
            queue.add_within(key, 0.01)
        else:
            twice.set()
        return 60.0

    queue = WorkQueue(process)
    work = asyncio.create_task(queue.run())
    queue.add(KEY)
    async with asyncio.timeout(60):
        await twice.wait()
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


# Calls


class Events:
    async def post(self, key: Key, uid: str, event: EventWanted) -> None:
        return None


class Server:
    """Notes calls; answers as told, by `METHOD path`."""

    def __init__(self, answers: Mapping[str, Any] | None = None) -> None:
        self.calls: list[str] = []
        self.bodies: list[Any] = []
        self._answers = dict(answers or {})

    async def create(self, path: str, manifest: Mapping[str, Any], *, metadata_only: bool = False) -> dict[str, Any]:
        assert not metadata_only, "its facts are wanted"
        return self._answer(f"POST {path}", manifest, manifest)

    async def get(self, path: str) -> dict[str, Any]:
        return self._answer(f"GET {path}", None, {})

    async def merge_patch(self, path: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        return self._answer(f"PATCH {path}", patch, job("a", 9, phase="Running"))

    async def delete(self, path: str, uid: str | None = None, *, propagation: str = "Background") -> dict[str, Any]:
        return self._answer(f"DELETE {path}", (uid, propagation), {"kind": "Status"})

    def _answer(self, call: str, body: Any, usual: Any) -> dict[str, Any]:
        self.calls.append(call)
        self.bodies.append(body)
        answer = self._answers.get(call, usual)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


async def execute(server: Server, wanted: Wanted, *jobs: dict[str, Any]) -> tuple[Store, set[Key]]:
    store, looked_at = Store(), set()
    store.put_resource(SWEEP, sweep())
    for known in jobs:
        store.put_resource(JOB, known)
    stored = store.get(KEY)
    assert stored is not None
    executor = Executor(server, store, Events(), looked_at.update)  # type: ignore[arg-type]
    await executor.execute(stored, wanted)
    return store, looked_at


async def test_a_training_job_is_made_and_known_at_once() -> None:
    server = Server()
    store, looked_at = await execute(server, Wanted(create=(job("a"),)))
    assert server.calls == [f"POST {JOBS}"]
    assert [found.name for found in store.trial_jobs("uid-sweep")] == ["a"]
    assert looked_at == {Key(JOB, "ns", "a")}


async def test_one_that_exists_is_taken_over_when_it_is_the_sweeps() -> None:
    exists = ApiError(409, "AlreadyExists", "exists")
    server = Server({f"POST {JOBS}": exists, f"GET {JOBS}/a": job("a", 5)})
    store, _ = await execute(server, Wanted(create=(job("a"),)))
    assert [found.name for found in store.trial_jobs("uid-sweep")] == ["a"]


async def test_changes_are_patched_where_the_job_is_still_that_one() -> None:
    changes = ((("run",), {"backoffLimit": 5}), (("training", "tokens"), 500), (("suspend",), True))
    patch = TrainingJobPatch("a", "uid-a", changes, {"x/template": "hash", "x/suspended": None})
    server = Server()
    store, looked_at = await execute(server, Wanted(patch_training_jobs=(patch,)), job("a"))
    assert server.calls == [f"PATCH {JOBS}/a"]
    assert server.bodies[0] == {
        "metadata": {"uid": "uid-a", "annotations": {"x/template": "hash", "x/suspended": None}},
        "spec": {"run": {"backoffLimit": 5, "nodeSelector": None}, "training": {}, "suspend": True},
    }
    assert store.trial_jobs("uid-sweep")[0].phase == "Running"
    assert Key(JOB, "ns", "a") in looked_at
    another = TrainingJobPatch("a", "uid-of-an-older-one", changes, {})
    unpatched = Server()
    await execute(unpatched, Wanted(patch_training_jobs=(another,)), job("a"))
    assert unpatched.calls == []


async def test_a_patch_that_comes_too_late_harms_nothing() -> None:
    patch = TrainingJobPatch("a", "uid-a", ((("suspend",), True),), {})
    gone = Server({f"PATCH {JOBS}/a": ApiError(404, "NotFound", "gone")})
    await execute(gone, Wanted(patch_training_jobs=(patch,)), job("a"))
    another = Server({f"PATCH {JOBS}/a": ApiError(409, "Conflict", "another UID")})
    with pytest.raises(RetryAfter):
        await execute(another, Wanted(patch_training_jobs=(patch,)), job("a"))


async def test_a_change_that_is_refused_is_told_and_keeps_no_other_back() -> None:
    patches = tuple(TrainingJobPatch(name, f"uid-{name}", ((("suspend",), True),), {}) for name in ("a", "b"))
    status = {"conditions": [{"type": "Ready", "status": "False", "reason": "Suspending", "message": "waits"}]}
    told = f"{JOBS.rpartition('/')[0]}/saesweeps/sweep/status"
    server = Server({f"PATCH {JOBS}/a": ApiError(422, "Invalid", "spec is immutable"), f"PATCH {told}": sweep(5)})
    with pytest.raises(RetryAfter):
        await execute(server, Wanted(patch_training_jobs=patches, status=status), job("a"), job("b"))
    assert server.calls == [f"PATCH {JOBS}/a", f"PATCH {JOBS}/b", f"PATCH {told}"]
    (ready,) = server.bodies[-1]["status"]["conditions"]
    assert ready["message"] == "a change of SAETrainingJob a was refused by the API server: spec is immutable"


async def test_a_deleted_job_is_forgotten_and_one_that_is_held_is_not() -> None:
    server = Server()
    store, _ = await execute(server, Wanted(delete_training_jobs=(("a", "uid-a"),)), job("a"))
    assert server.bodies == [("uid-a", "Background")]
    assert store.trial_jobs("uid-sweep") == ()
    held = job("a", 7)
    held["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    store, _ = await execute(
        Server({f"DELETE {JOBS}/a": held}), Wanted(delete_training_jobs=(("a", "uid-a"),)), job("a")
    )
    assert [found.deleting for found in store.trial_jobs("uid-sweep")] == [True]


async def test_a_job_that_is_gone_is_not_deleted_for_ever() -> None:
    removal = Wanted(delete_training_jobs=(("a", "uid-a"),))
    gone = Server({f"DELETE {JOBS}/a": ApiError(404, "NotFound", "gone")})
    store, _ = await execute(gone, removal, job("a"))
    assert store.trial_jobs("uid-sweep") == ()
    another = Server({f"DELETE {JOBS}/a": ApiError(409, "Conflict", "another UID")})
    with pytest.raises(RetryAfter) as raised:
        await execute(another, removal, job("a"))
    assert raised.value.seconds > 0


def test_changes_replace_mappings_and_leave_their_neighbours() -> None:
    spec = {"run": {"a": 1, "b": {"c": 2}}, "activations": {"cache": {"tokens": 5, "hooks": [1], "run": {"x": 1}}}}
    cache = ("activations", "cache")
    changes = ((("run",), {"b": {"d": 3}}), ((*cache, "tokens"), 9), ((*cache, "run"), {}), (("retry",), 1))
    assert changes_of(spec, changes) == {
        "run": {"a": None, "b": {"c": None, "d": 3}},
        "activations": {"cache": {"tokens": 9, "run": {"x": None}}},
        "retry": 1,
    }

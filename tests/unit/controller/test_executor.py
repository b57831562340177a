"""What is wanted is applied in order; what is there already is tolerated when it is ours; every answer is fed back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from sae_operator.controller.client import ApiError, Page, WebhookUnavailable
from sae_operator.controller.executor import Executor
from sae_operator.controller.queue import Key, RetryAfter
from sae_operator.controller.store import Store, StoredResource
from sae_operator.reconcile.wanted import EventWanted, Wanted

KEY = Key("SAETrainingJob", "ns", "a")
JOBS, MAPS = "/apis/batch/v1/namespaces/ns/jobs", "/api/v1/namespaces/ns/configmaps"
PODS = "/api/v1/namespaces/ns/pods"
RESOURCE = "/apis/sae-operator.dev/v1alpha1/namespaces/ns/saetrainingjobs/a"
STATUS = f"{RESOURCE}/status"


class Server:
    """Notes calls; answers as told, by `METHOD path`."""

    def __init__(self, answers: Mapping[str, Any] | None = None) -> None:
        self.calls: list[str] = []
        self.bodies: list[Any] = []
        self._answers = dict(answers or {})

    async def create(self, path: str, manifest: Mapping[str, Any], *, metadata_only: bool = False) -> dict[str, Any]:
        return self._answer(f"POST {path}", manifest, manifest)

    async def get(self, path: str) -> dict[str, Any]:
        return self._answer(f"GET {path}", None, {})

    async def merge_patch(self, path: str, patch: Mapping[str, Any]) -> dict[str, Any]:
        return self._answer(f"PATCH {path}", patch, {"metadata": meta(9), "status": patch.get("status")})

    async def delete(self, path: str, uid: str, *, propagation: str) -> dict[str, Any]:
        return self._answer(f"DELETE {path}", (uid, propagation), {})

    async def pages(self, path: str, query: Mapping[str, str]) -> AsyncIterator[Page]:
        yield Page(self._answer(f"LIST {path}", query, {"items": []})["items"], 1)

    def _answer(self, call: str, body: Any, usual: Any) -> dict[str, Any]:
        self.calls.append(call)
        self.bodies.append(body)
        answer = self._answers.get(call, usual)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)


class Events:
    def __init__(self) -> None:
        self.posted: list[EventWanted] = []

    async def post(self, key: Key, uid: str, event: EventWanted) -> None:
        self.posted.append(event)


def meta(version: int, name: str = "a", uid: str = "uid-a", **fields: Any) -> dict[str, Any]:
    return {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": str(version), "generation": 1, **fields}


def child(kind: str, name: str, *, parent: str = "uid-a", data: Any = None) -> dict[str, Any]:
    reference = {"kind": "SAETrainingJob", "name": "a", "uid": parent, "controller": True}
    return {"kind": kind, "metadata": meta(3, name, f"uid-{name}", ownerReferences=[reference]), "data": data}


async def execute(server: Server, wanted: Wanted, status: dict[str, Any] | None = None) -> tuple[Store, Events]:
    store, events = stored_with(status or {}), Events()
    await executor_of(server, store, events).execute(the(store), wanted)
    return store, events


def stored_with(status: dict[str, Any]) -> Store:
    store = Store()
    store.put_resource(KEY.kind, {"metadata": meta(1), "spec": {}, "status": status})
    return store


def the(store: Store) -> StoredResource:
    stored = store.get(KEY)
    assert stored is not None
    return stored


def executor_of(server: Server, store: Store, events: Events | None = None) -> Executor:
    return Executor(server, store, events or Events(), lambda keys: None)  # type: ignore[arg-type]


EXISTS = ApiError(409, "AlreadyExists", "exists")


async def test_children_come_before_the_status_that_tells_of_them_and_deletions_last() -> None:
    wanted = Wanted(
        create=(child("ConfigMap", "c"), child("Job", "j")),
        status={"phase": "Queued"},
        events=(EventWanted("Normal", "Queued", "waits"),),
        delete_jobs=("j",),
    )
    server = Server()
    store, events = await execute(server, wanted)
    assert server.calls == [f"POST {MAPS}", f"POST {JOBS}", f"PATCH {STATUS}", f"DELETE {JOBS}/j"]
    assert server.bodies[2] == {
        "metadata": {"uid": "uid-a", "resourceVersion": "1"},
        "status": {"phase": "Queued"},
    }
    assert server.bodies[3] == ("uid-j", "Foreground")
    assert "j" in store.children("uid-a").jobs
    assert [event.reason for event in events.posted] == ["Queued"]


async def test_nothing_is_written_when_all_is_as_it_should_be() -> None:
    server = Server()
    await execute(server, Wanted(status={"phase": "Queued"}), status={"phase": "Queued"})
    assert server.calls == []


async def test_a_job_of_ours_that_exists_is_taken_over() -> None:
    server = Server({f"POST {JOBS}": EXISTS, f"GET {JOBS}/j": child("Job", "j")})
    store, _ = await execute(server, Wanted(create=(child("Job", "j"),)))
    assert "j" in store.children("uid-a").jobs


async def test_a_service_is_made_once_and_serves_every_attempt() -> None:
    services = "/api/v1/namespaces/ns/services"
    server = Server({f"POST {services}": EXISTS, f"GET {services}/s": child("Service", "s")})
    await execute(server, Wanted(create=(child("Service", "s"), child("Job", "j"))))
    assert server.calls == [f"POST {services}", f"GET {services}/s", f"POST {JOBS}"]


async def test_the_data_of_a_config_map_that_exists_is_renewed() -> None:
    there = child("ConfigMap", "c", data={"step.json": "old"})
    server = Server({f"POST {MAPS}": EXISTS, f"GET {MAPS}/c": there})
    await execute(server, Wanted(create=(child("ConfigMap", "c", data={"step.json": "new"}),)))
    assert server.calls[-1] == f"PATCH {MAPS}/c"
    assert server.bodies[-1] == {"data": {"step.json": "new"}}


REFUSALS = {
    "somebody else's": (
        {f"POST {JOBS}": EXISTS, f"GET {JOBS}/j": child("Job", "j", parent="uid-other")},
        "belongs to something else",
    ),
    "a quota": ({f"POST {JOBS}": ApiError(403, "Forbidden", "exceeded quota")}, "exceeded quota"),
    "an invalid field": ({f"POST {JOBS}": ApiError(422, "Invalid", "spec.x is wrong")}, "spec.x is wrong"),
}


@pytest.mark.parametrize("case", REFUSALS)
async def test_a_refusal_is_told_in_status_and_event_and_tried_again_later(case: str) -> None:
    answers, words = REFUSALS[case]
    ready = {"type": "Ready", "status": "False", "reason": "Queued", "message": ""}
    wanted = Wanted(create=(child("Job", "j"),), status={"phase": "Pending", "conditions": [ready]})
    server = Server(answers)
    with pytest.raises(RetryAfter):
        await execute(server, wanted)
    (told,) = server.bodies[-1]["status"]["conditions"]
    assert told["reason"] == "CreateRefused"
    assert words in told["message"]


async def test_a_namespace_that_is_being_deleted_is_left_alone() -> None:
    error = ApiError(403, "Forbidden", "terminating", {"causes": [{"reason": "NamespaceTerminating"}]})
    server = Server({f"POST {JOBS}": error})
    with pytest.raises(RetryAfter):
        await execute(server, Wanted(create=(child("Job", "j"),), status={"phase": "Pending"}))
    assert server.calls == [f"POST {JOBS}"]


async def test_the_status_of_a_resource_that_is_gone_is_no_failure() -> None:
    gone = ApiError(404, "NotFound", "gone")
    server = Server({f"PATCH {STATUS}": gone, f"GET {RESOURCE}": gone})
    store, _ = await execute(server, Wanted(status={"phase": "Pending"}))
    assert server.calls == [f"PATCH {STATUS}", f"GET {RESOURCE}"]
    assert store.get(KEY) is None


async def test_a_status_that_another_operator_has_written_since_is_read_and_judged_anew() -> None:
    newer = {"metadata": meta(7), "spec": {}, "status": {"phase": "Succeeded"}}
    server = Server({f"PATCH {STATUS}": ApiError(409, "Conflict", "modified"), f"GET {RESOURCE}": newer})
    store = stored_with({})
    with pytest.raises(RetryAfter):
        await executor_of(server, store).execute(the(store), Wanted(status={"phase": "Running"}, delete_jobs=("j",)))
    assert server.calls == [f"PATCH {STATUS}", f"GET {RESOURCE}"]
    assert the(store).phase == "Succeeded"


async def test_a_job_that_the_status_tells_of_is_looked_up_before_it_is_replaced() -> None:
    server = Server({f"GET {JOBS}/j-1": child("Job", "j-1")})
    store = stored_with({"jobName": "j-1"})
    with pytest.raises(RetryAfter):
        await executor_of(server, store).execute(the(store), Wanted(create=(child("Job", "j-2"),)))
    assert server.calls == [f"GET {JOBS}/j-1"]
    assert list(store.children("uid-a").jobs) == ["j-1"]


@pytest.mark.parametrize(
    ("phase", "looked_up"), [("Running", True), ("Suspended", False), ("Succeeded", False), ("Ready", False)]
)
async def test_a_job_that_only_the_status_tells_of_is_looked_up_before_it_is_missed(
    phase: str, looked_up: bool
) -> None:
    server = Server({f"GET {JOBS}/j-2": child("Job", "j-2")})
    store = stored_with({"jobName": "j-2", "phase": phase})
    await executor_of(server, store).look_up_told_job(the(store))
    assert list(store.children("uid-a").jobs) == (["j-2"] if looked_up else [])
    await executor_of(server, store).look_up_told_job(the(store))
    assert server.calls == ([f"GET {JOBS}/j-2"] if looked_up else [])


async def test_a_job_is_replaced_when_it_is_gone_and_the_status_is_the_latest() -> None:
    same = {"metadata": meta(1), "spec": {}, "status": {"jobName": "j-1"}}
    server = Server({f"GET {JOBS}/j-1": ApiError(404, "NotFound", "gone"), f"GET {RESOURCE}": same})
    store = stored_with({"jobName": "j-1"})
    await executor_of(server, store).execute(
        the(store), Wanted(create=(child("Job", "j-2"),), status={"jobName": "j-1"})
    )
    assert server.calls == [f"GET {JOBS}/j-1", f"GET {RESOURCE}", f"LIST {PODS}", f"POST {JOBS}"]


@pytest.mark.parametrize("told", [True, False])
async def test_no_job_is_made_while_a_pod_of_one_that_was_deleted_lives(told: bool) -> None:
    """Whether the status tells of that Job, or an operator died before it did, and only the ConfigMap is there."""
    pod = {"metadata": meta(4, "p", "uid-p"), "status": {"phase": "Running"}}
    status = {"jobName": "j-1"} if told else {}
    config_map = child("ConfigMap", "j-1")
    server = Server(
        {
            f"GET {JOBS}/j-1": ApiError(404, "NotFound", "gone"),
            f"GET {RESOURCE}": {"metadata": meta(1), "spec": {}, "status": status},
            f"POST {MAPS}": EXISTS,
            f"GET {MAPS}/j-1": config_map,
            f"LIST {PODS}": {"items": [pod]},
        }
    )
    store = stored_with(status)
    with pytest.raises(RetryAfter):
        await executor_of(server, store).execute(the(store), Wanted(create=(config_map, child("Job", "j-2"))))
    assert f"POST {JOBS}" not in server.calls
    assert [found.name for found in store.children("uid-a").pods] == ["p"]


async def test_a_job_is_not_replaced_on_a_status_that_has_changed_since() -> None:
    newer = {"metadata": meta(7), "spec": {}, "status": {"jobName": "j-2"}}
    server = Server({f"GET {JOBS}/j-1": ApiError(404, "NotFound", "gone"), f"GET {RESOURCE}": newer})
    store = stored_with({"jobName": "j-1"})
    with pytest.raises(RetryAfter):
        await executor_of(server, store).execute(the(store), Wanted(create=(child("Job", "j-2"),)))
    assert f"POST {JOBS}" not in server.calls


@pytest.mark.parametrize("call", [f"POST {JOBS}", f"DELETE {JOBS}/j"])
async def test_a_conflict_is_tried_again_and_told_to_nobody(call: str) -> None:
    server = Server({call: ApiError(409, "Conflict", "two writes at once")})
    store = stored_with({})
    wanted = Wanted(create=(child("Job", "j"),)) if call.startswith("POST") else Wanted(delete_jobs=("j",))
    store.put_job(child("Job", "j"))
    with pytest.raises(RetryAfter):
        await executor_of(server, store).execute(the(store), wanted)
    assert not [made for made in server.calls if made.startswith("PATCH")]


async def test_a_new_resource_of_the_same_name_never_gets_the_old_ones_status() -> None:
    server, store = Server(), Store()
    store.put_resource(KEY.kind, {"metadata": meta(1), "spec": {}, "status": {}})
    stored = store.get(KEY)
    assert stored is not None
    store.put_resource(KEY.kind, {"metadata": meta(5, uid="uid-of-the-next"), "spec": {}, "status": {}})
    executor = Executor(server, store, Events(), lambda keys: None)  # type: ignore[arg-type]
    await executor.execute(stored, Wanted(status={"phase": "Succeeded"}, delete_jobs=("j",)))
    assert server.calls == []


async def test_a_webhook_that_does_not_answer_is_told_in_the_status() -> None:
    conditions = [{"type": "Ready", "status": "False", "reason": "Queued", "message": "waits"}]
    wanted = Wanted(create=(child("ConfigMap", "c"), child("Job", "j")), status={"conditions": conditions})
    server = Server({f"POST {JOBS}": WebhookUnavailable('failed calling webhook "mjob.kb.io"')})
    store, events = stored_with({}), Events()
    with pytest.raises(RetryAfter) as caught:
        await executor_of(server, store, events).execute(the(store), wanted)
    assert caught.value.seconds == 15
    (ready,) = the(store).status_manifest()["conditions"]
    assert (ready["status"], ready["reason"]) == ("False", "CreateRefused")
    assert 'while an admission webhook does not answer: failed calling webhook "mjob.kb.io"' in ready["message"]
    assert [event.reason for event in events.posted] == ["CreateRefused"]

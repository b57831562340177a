"""The store holds what is newest, forgets what is gone, and knows whom a change concerns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sae_operator.controller.queue import Key
from sae_operator.controller.store import Store
from sae_operator.reconcile.observed import InvalidSpec, PodFacts

CACHE, JOB = "ActivationCache", "SAETrainingJob"


def resource(
    name: str, *, uid: str | None = None, version: int = 1, generation: int = 1, spec: Any = None, **fields: Any
) -> dict[str, Any]:
    meta = {
        "name": name,
        "namespace": "ns",
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "generation": generation,
        "ownerReferences": fields.pop("owners", []),
    }
    return {"metadata": meta, "spec": spec or {}, "status": fields.pop("status", {})}


def owner(name: str) -> dict[str, str]:
    return {"kind": JOB, "name": name, "uid": f"uid-{name}"}


def child(name: str, *, parent: str, version: int = 1, uid: str | None = None, **status: Any) -> dict[str, Any]:
    reference = {"kind": JOB, "name": parent, "uid": f"uid-{parent}", "controller": True}
    meta = {"name": name, "uid": uid or f"uid-{name}", "resourceVersion": str(version), "ownerReferences": [reference]}
    return {"metadata": meta, "spec": {}, "status": status}


def key(kind: str, name: str) -> Key:
    return Key(kind, "ns", name)


def test_what_is_older_or_the_same_changes_nothing() -> None:
    store = Store()
    assert store.put_resource(JOB, resource("a", version=5, status={"phase": "Running"})) == {key(JOB, "a")}
    assert store.put_resource(JOB, resource("a", version=5)) == set()
    assert store.put_resource(JOB, resource("a", version=4)) == set()
    found = store.get(key(JOB, "a"))
    assert found is not None
    assert found.phase == "Running"


def test_a_late_answer_does_not_bring_a_deleted_resource_back() -> None:
    store = Store()
    store.put_resource(JOB, resource("a", version=5))
    store.drop_resource("uid-a")
    assert store.put_resource(JOB, resource("a", version=6)) == set()
    assert store.get(key(JOB, "a")) is None
    store.put_resource(JOB, resource("a", uid="another", version=7))
    assert store.get(key(JOB, "a")) is not None


def test_what_is_learnt_of_a_resource_that_is_gone_is_not_kept() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    store.drop_resource("uid-a")
    store.put_pods("uid-a", [PodFacts(name="p", job_name="j", step="train")], 1)
    assert not store.children("uid-a").pods


def test_a_recreated_resource_has_none_of_the_old_ones_children() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    store.put_job(child("a-train-1", parent="a"))
    store.put_resource(JOB, resource("a", uid="another", version=9))
    assert not store.children("another").jobs
    assert store.resource_uids(JOB) == {"another"}


def test_the_readers_of_a_cache_hear_of_it() -> None:
    store = Store()
    store.put_resource(JOB, resource("by-reference", spec={"activations": {"cacheRef": {"name": "c"}}}))
    store.put_resource(JOB, resource("by-owning"))
    # Its inline cache is another one's, and being deleted: it waits to ask for it again, and owns nothing yet.
    store.put_resource(JOB, resource("by-status", status={"cacheName": "c"}))
    store.put_resource(JOB, resource("neither"))
    readers = {key(JOB, "by-reference"), key(JOB, "by-owning"), key(JOB, "by-status")}
    heard = store.put_resource(CACHE, resource("c", owners=[owner("by-owning"), owner("unknown")]))
    assert heard == {key(CACHE, "c")} | readers
    assert store.drop_resource("uid-c") == readers


def test_a_cache_hears_when_an_owner_is_suspended_or_ends_or_goes() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    store.put_resource(CACHE, resource("c", owners=[owner("a")]))
    quiet = store.put_resource(JOB, resource("a", version=2, status={"phase": "Running"}))
    assert quiet == {key(JOB, "a")}
    suspended = resource("a", version=3, generation=2, spec={"suspend": True})
    assert key(CACHE, "c") in store.put_resource(JOB, suspended)
    assert key(CACHE, "c") in store.put_resource(JOB, resource("a", version=4, status={"phase": "Failed"}))
    assert store.drop_resource("uid-a") == {key(CACHE, "c")}


def test_pods_are_due_when_a_pod_of_a_job_has_ended() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    assert store.put_job(child("j", parent="a", version=1)) == (key(JOB, "a"), True)
    assert store.put_job(child("j", parent="a", version=1, failed=1)) == (key(JOB, "a"), False)
    assert not store.children("uid-a").pods_due
    store.put_job(child("j", parent="a", version=2, failed=1))
    assert store.children("uid-a").pods_due
    ended = PodFacts(name="p", job_name="j", step="train", phase="Failed", exit_code=1)
    assert store.put_pods("uid-a", [ended], 2)
    assert not store.put_pods("uid-a", [ended], 3)


def test_a_listing_that_is_answered_after_a_later_one_tells_nothing() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    runs = PodFacts(name="p", job_name="j", step="train", phase="Running", running=True)
    ended = replace(runs, phase="Succeeded", running=False)
    assert store.put_pods("uid-a", [ended], 8)
    assert not store.put_pods("uid-a", [runs], 7)
    assert store.children("uid-a").pods == (ended,)
    assert store.children("uid-a").pods_due


def test_a_pod_that_has_merely_not_started_is_not_worth_a_look() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    waits = PodFacts(name="p", job_name="j", step="train")
    assert not store.put_pods("uid-a", [waits], 4)
    assert store.children("uid-a").pods == (waits,)
    assert store.put_pods("uid-a", [replace(waits, unschedulable="no node fits")], 5)
    assert store.put_pods("uid-a", [replace(waits, waiting_reason="ImagePullBackOff")], 6)
    assert store.put_pods("uid-a", [replace(waits, phase="Running", running=True)], 7)
    assert store.put_pods("uid-a", [], 8)


def test_a_job_that_was_replaced_is_not_dropped_with_the_old_one() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    store.put_job(child("j", parent="a", version=5, uid="new"))
    assert store.drop_job(child("j", parent="a", uid="old")["metadata"]) is None
    assert "j" in store.children("uid-a").jobs
    assert store.drop_job(child("j", parent="a", uid="new")["metadata"]) == key(JOB, "a")


def test_a_job_with_nothing_but_our_labels_is_nobodys() -> None:
    store = Store()
    store.put_resource(JOB, resource("a"))
    copied = child("j", parent="a")
    copied["metadata"] |= {"ownerReferences": [], "labels": {"sae-operator.dev/uid": "uid-a"}}
    assert store.put_job(copied) == (None, False)
    assert not store.children("uid-a").jobs


def test_a_spec_that_the_models_refuse_is_told_with_its_path() -> None:
    store = Store()
    spec = {
        "activations": {"uri": "s3://bucket/cache"},
        "saes": [{"name": "x", "architecture": {"type": "topk"}, "dSae": 4}],
        "output": {"uri": "s3://bucket/out", "colour": "red"},
    }
    store.put_resource(JOB, resource("a", spec=spec))
    stored = store.get(key(JOB, "a"))
    assert stored is not None
    parsed = store.spec_of(stored)
    assert isinstance(parsed, InvalidSpec)
    assert {problem.field for problem in parsed.problems} == {"spec.saes[0].architecture.k", "spec.output.colour"}

"""Hooks are added to a cache as tokens are: what is there stays, and what is missing is a round of its own."""

from __future__ import annotations

from typing import Any

from sae_operator.api.steps import CacheStep
from tests.unit.reconcile.fake_cluster import CACHE, JOB, FakeCluster, PodScript
from tests.unit.reconcile.specs import cache_spec, job_spec
from tests.unit.reconcile.test_lives import inline_cache_of, steps_of

A, B, HEAD = {"name": "model.layers.0"}, {"name": "model.layers.1"}, {"name": "attn.z", "headIndex": 3}


def job_on(*hooks: dict[str, Any], of: str, tokens: int = 500, **changes: Any) -> dict[str, Any]:
    """A job with one SAE, on hook `of` of an inline cache; its output is its own."""
    saes = [{"name": "k16", "hook": of, "architecture": {"type": "topk", "k": 16}, "dSae": 64}]
    output = {"uri": f"s3://saes/out/{of}", "secretRef": {"name": "s3"}}
    return job_spec({"cache": cache_spec(hooks=list(hooks), tokens=tokens)}, saes=saes, output=output, **changes)


def hooks_of(cluster: FakeCluster, name: str) -> list[str]:
    return [hook["name"] for hook in cluster.status(CACHE, name)["hooks"]]


def told(cluster: FakeCluster, reason: str) -> list[str]:
    return [text for _, said, text in cluster.events if said == reason]


def given_to(cluster: FakeCluster, job: str) -> CacheStep:
    (name,) = [name for name in cluster.created_jobs if name.endswith(job)]
    given = cluster.step_spec(name)
    assert isinstance(given, CacheStep)
    return given


def test_a_job_on_another_hook_extends_the_cache_of_the_first() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "first", job_on(A, of="model.layers.0"))
    cluster.run()
    name = inline_cache_of(cluster)
    cluster.create(JOB, "second", job_on(HEAD, B, of="attn.z:3", tokens=900))
    cluster.run()
    assert cluster.phase(JOB, "second") == "Succeeded"
    assert inline_cache_of(cluster) == name
    assert cluster.resources[CACHE, name]["spec"]["hooks"] == [A, HEAD, B]
    assert hooks_of(cluster, name) == ["model.layers.0", "attn.z:3", "model.layers.1"]
    assert cluster.status(CACHE, name)["observedHooks"] == hooks_of(cluster, name)
    assert cluster.status(CACHE, name)["tokens"] == 900
    assert steps_of(cluster, CACHE, name)[3:] == ["prepare-2", "cache-2", "finalize-2"]
    extended = "raises the tokens from 500 to 900 and adds attn.z:3, model.layers.1"
    assert told(cluster, "CacheExtended") == [f"extends ActivationCache {name}: {extended}"]
    # A third on hooks that are there waits for nothing, and takes none away.
    cluster.create(JOB, "third", job_on(B, of="model.layers.1"))
    cluster.run()
    assert cluster.phases("third") == ["Preflight", "Queued", "Running", "Succeeded"]
    assert cluster.resources[CACHE, name]["spec"]["hooks"] == [A, HEAD, B]


def test_hooks_alone_are_an_extension_too() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "first", job_on(A, of="model.layers.0"))
    cluster.run()
    cluster.create(JOB, "second", job_on(A, B, of="model.layers.1"))
    cluster.run()
    name = inline_cache_of(cluster)
    assert cluster.phase(JOB, "second") == "Succeeded"
    assert told(cluster, "CacheExtended") == [f"extends ActivationCache {name}: adds model.layers.1"]
    assert cluster.resources[CACHE, name]["spec"]["tokens"] == 500


def test_a_job_takes_the_hooks_that_are_there_while_others_are_being_added() -> None:
    cluster = FakeCluster()
    cluster.create(JOB, "first", job_on(A, of="model.layers.0"))
    cluster.run()
    cluster.create(JOB, "more", job_on(A, B, of="model.layers.1"))
    cluster.run_until(lambda: cluster.phase(CACHE, inline_cache_of(cluster)) == "Preparing")
    cluster.create(JOB, "less", {**job_on(A, of="model.layers.0"), "output": {"uri": "s3://saes/less"}})
    cluster.run()
    assert "WaitingForCache" not in cluster.phases("less")
    assert cluster.phase(JOB, "less") == cluster.phase(JOB, "more") == "Succeeded"


def test_hooks_added_while_a_cache_works_are_looked_at_when_it_has_finished() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec(hooks=[A]))
    cluster.run_until(lambda: cluster.phase(CACHE, "acts") == "Caching")
    cluster.edit(CACHE, "acts", hooks=[B, A])
    cluster.run()
    # Never Ready in between: the generation that it would be ready for asks for more.
    assert cluster.phases("acts").count("Ready") == 1
    assert steps_of(cluster, CACHE, "acts") == [
        "prepare-1",
        "cache-1",
        "finalize-1",
        "prepare-2",
        "cache-2",
        "finalize-2",
    ]
    assert [hook.key for hook in given_to(cluster, "finalize-1").spec.hooks] == ["model.layers.0"]
    assert [hook.key for hook in given_to(cluster, "prepare-2").spec.hooks] == ["model.layers.1", "model.layers.0"]
    assert hooks_of(cluster, "acts") == ["model.layers.1", "model.layers.0"]


def test_hooks_added_to_a_finished_cache_begin_another_round_and_their_order_does_not() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec(hooks=[A]))
    cluster.run()
    cluster.edit(CACHE, "acts", hooks=[A, B])
    cluster.run()
    assert hooks_of(cluster, "acts") == ["model.layers.0", "model.layers.1"]
    made = list(cluster.created_jobs)
    cluster.edit(CACHE, "acts", hooks=[B, A])
    cluster.run()
    assert cluster.created_jobs == made


def test_a_failed_cache_is_re_armed_by_hooks_that_are_added() -> None:
    fails = True

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(exit_code=2 if step == "cache" and fails else 0, seconds=2)

    cluster = FakeCluster(script)
    cluster.create(CACHE, "acts", cache_spec(hooks=[A]))
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Failed"
    fails = False
    cluster.edit(CACHE, "acts", hooks=[A, B])
    cluster.run()
    assert cluster.phase(CACHE, "acts") == "Ready"
    assert hooks_of(cluster, "acts") == ["model.layers.0", "model.layers.1"]


def test_a_job_with_another_hook_re_arms_a_failed_inline_cache_and_waits_for_it() -> None:
    fails = True

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(exit_code=2 if step == "cache" and fails else 0, seconds=2)

    cluster = FakeCluster(script)
    cluster.create(JOB, "first", job_on(A, of="model.layers.0"))
    cluster.run()
    assert cluster.phase(JOB, "first") == "Failed"
    fails = False
    cluster.create(JOB, "second", job_on(B, of="model.layers.1"))
    cluster.run()
    assert cluster.phase(JOB, "second") == "Succeeded"
    name = inline_cache_of(cluster)
    assert cluster.resources[CACHE, name]["spec"]["hooks"] == [A, B]
    assert told(cluster, "CacheRetried") == [f"runs the failed ActivationCache {name} again; adds model.layers.1"]


def test_an_extension_that_failed_leaves_what_was_there_to_jobs_that_need_no_more() -> None:
    fails = False

    def script(step: str, index: int, earlier: int) -> PodScript:
        return PodScript(exit_code=2 if step == "cache" and fails else 0, seconds=2)

    cluster = FakeCluster(script)
    cluster.create(JOB, "first", job_on(A, of="model.layers.0"))
    cluster.run()
    fails = True
    cluster.create(JOB, "second", job_on(B, of="model.layers.1"))
    cluster.run()
    assert cluster.phase(JOB, "second") == "Failed"
    cluster.create(JOB, "third", {**job_on(A, of="model.layers.0"), "output": {"uri": "s3://saes/third"}})
    cluster.run()
    assert cluster.phase(JOB, "third") == "Succeeded"
    assert "WaitingForCache" not in cluster.phases("third")


def test_hooks_whose_figures_are_lost_are_there_all_the_same() -> None:
    cluster = FakeCluster(lose_messages=frozenset({"finalize"}))
    cluster.create(JOB, "sae", job_on(A, B, of="model.layers.1"))
    cluster.run()
    assert cluster.phase(JOB, "sae") == "Succeeded"
    assert cluster.status(CACHE, inline_cache_of(cluster))["hooks"] == [A, B]


def test_figures_that_are_known_already_are_kept() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec(hooks=[A]))
    cluster.run()
    cluster.lose_messages = frozenset({"finalize"})
    cluster.edit(CACHE, "acts", hooks=[A, B])
    cluster.run()
    assert cluster.status(CACHE, "acts")["hooks"] == [{**A, "dIn": 8, "meanNorm": 3.0}, B]


def test_a_cache_never_gets_more_hooks_than_its_resource_can_hold() -> None:
    cluster = FakeCluster()
    full = [{"name": f"model.layers.{i}"} for i in range(16)]
    cluster.create(JOB, "first", job_on(*full, of="model.layers.0"))
    cluster.run()
    name = inline_cache_of(cluster)
    cluster.create(JOB, "second", job_on(HEAD, of="attn.z:3"))
    cluster.run()
    stalled = cluster.condition(JOB, "second", "Stalled")
    assert stalled is not None
    text = f"ActivationCache {name} would have more than 16 hooks; give the new ones another storage.uri"
    assert (stalled["reason"], stalled["message"]) == ("TooManyHooks", text)
    assert cluster.resources[CACHE, name]["spec"]["hooks"] == full


def test_a_job_with_cache_ref_waits_until_the_hook_that_was_added_is_there() -> None:
    cluster = FakeCluster()
    cluster.create(CACHE, "acts", cache_spec(hooks=[A]))
    cluster.run()
    cluster.edit(CACHE, "acts", hooks=[A, B])
    saes = [{"name": "k16", "hook": "model.layers.1", "architecture": {"type": "topk", "k": 16}, "dSae": 64}]
    cluster.create(JOB, "sae", job_spec({"cacheRef": {"name": "acts"}}, saes=saes))
    cluster.run()
    assert cluster.phases("sae") == ["Preflight", "WaitingForCache", "Queued", "Running", "Succeeded"]

"""Lives of caches and training jobs on a real API server, whose pods end as each test says."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from sae_operator.api.steps import PROGRESS_PORT, CacheStep, TrainStep
from sae_operator.controller.faults import ENV_EXIT_AT_CALL
from tests.fake_kubelet import PLACEMENT, POD_IP, Behaviour, Ends, FakeKubelet, Runs, Waits, result, step_of, succeed
from tests.operator_process import OperatorProcess, run_operator, start_operator
from tests.operator_world import World, cache_spec, conditions, training_spec
from tests.testbed.waiting import wait_for

WHOLE_LIFE = ["cache-1", "finalize-1", "preflight-1", "prepare-1", "train-1"]


def except_for(**behaviours: Behaviour) -> Any:
    """A script: these steps do this, the others succeed."""
    return lambda pod: behaviours.get(step_of(pod)) or succeed(pod)


def test_a_training_job_with_an_inline_cache_succeeds(world: World, operator: OperatorProcess) -> None:
    created = world.create("SAETrainingJob", "first", training_spec())
    assert created["status"]["observedGeneration"] == -1, "a new resource must never look current"
    job = world.wait_phase("SAETrainingJob", "first", "Succeeded", "Failed")
    status = job["status"]
    assert status["phase"] == "Succeeded"
    assert status["summary"] == {"sae": "k2", "explainedVariance": "0.810", "l0": "2.0"}
    assert status["reportUri"] == "s3://bucket/out/report.html"
    assert status["progress"]["percent"] == 100
    told = {name: item["status"] for name, item in conditions(job).items()}
    assert told == {"Ready": "True", "Reconciling": "False", "Stalled": "False"}
    assert all(item["observedGeneration"] == 1 for item in conditions(job).values())
    cache = world.get("ActivationCache", status["cacheName"])
    assert cache is not None
    assert cache["status"]["phase"] == "Ready"
    assert cache["status"]["tokens"] == 1000
    assert cache["status"]["manifestUri"].endswith("/manifest.json")
    assert world.steps() == WHOLE_LIFE

    def reasons() -> set[str]:
        return {event["reason"] for event in world.list("Event") if event["involvedObject"]["name"] == "first"}

    # A status is written before its event.
    wait_for(lambda: {"Preflight", "WaitingForCache", "Succeeded"} <= reasons(), what=lambda: f"events: {reasons()}")


def test_pods_are_given_the_resolved_spec(world: World, operator: OperatorProcess) -> None:
    defaults = {"endpointUrl": "http://127.0.0.1:9000", "region": "eu-test-1", "secretName": "s3"}
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "sae-operator-defaults"},
        "data": defaults,
    }
    world._call("POST", f"/api/v1/namespaces/{world.namespace}/configmaps", manifest)
    world.create("SAETrainingJob", "first", training_spec())
    world.wait_phase("SAETrainingJob", "first", "Succeeded")
    given = {}
    for found in world.list("ConfigMap", ours=True):
        step = found["metadata"]["labels"]["sae-operator.dev/step"]
        model = TrainStep if step in ("preflight", "train") else CacheStep
        given[step] = model.model_validate_json(found["data"]["step.json"])
    assert sorted(given) == ["cache", "finalize", "preflight", "prepare", "train"]
    train, cache = given["train"], given["cache"]
    assert isinstance(train, TrainStep)
    assert isinstance(cache, CacheStep)
    for location in (train.spec.output, train.activations, cache.location, cache.spec.storage):
        assert location.endpoint_url == "http://127.0.0.1:9000"
        assert location.region == "eu-test-1"
        assert location.secret_ref is not None
        assert location.secret_ref.name == "s3"
    assert train.activations == cache.location
    written = world.get("SAETrainingJob", "first")
    assert written is not None
    assert "endpointUrl" not in written["spec"]["output"], "defaults are never written into the spec"


def test_a_second_job_shares_the_cache_and_more_tokens_extend_it(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    world.create("SAETrainingJob", "first", training_spec())
    name = world.wait_phase("SAETrainingJob", "first", "Succeeded")["status"]["cacheName"]
    made = set(world.jobs())
    world.create("SAETrainingJob", "second", training_spec(output={"uri": "s3://bucket/second"}))
    assert world.wait_phase("SAETrainingJob", "second", "Succeeded")["status"]["cacheName"] == name
    new = {job.rsplit("-", 2)[1] for job in set(world.jobs()) - made}
    assert new == {"preflight", "train"}, "no step of the cache runs again"
    assert owners(world, name) == ["first", "second"]

    longer = result("finalize", shardsTotal=8, shardsComplete=8, tokens=2000, bytes=131072)
    kubelet.scripts[world.namespace] = except_for(finalize=Ends(message=longer))
    more = training_spec({"cache": cache_spec(tokens=2000)}, output={"uri": "s3://bucket/third"})
    world.create("SAETrainingJob", "third", more)
    assert world.wait_phase("SAETrainingJob", "third", "Succeeded")["status"]["cacheName"] == name
    cache = world.get("ActivationCache", name)
    assert cache is not None
    assert (cache["spec"]["tokens"], cache["status"]["tokens"]) == (2000, 2000)
    assert {"prepare-2", "cache-2", "finalize-2"} <= set(world.steps())
    assert owners(world, name) == ["first", "second", "third"]


def test_a_second_job_on_another_hook_extends_the_cache(world: World, operator: OperatorProcess) -> None:
    hooks = [{"name": "model.layers.2"}, {"name": "attn.z", "headIndex": 3}]
    world.create("SAETrainingJob", "first", training_spec())
    name = world.wait_phase("SAETrainingJob", "first", "Succeeded")["status"]["cacheName"]
    on_a_head = {"name": "k2", "hook": "attn.z:3", "architecture": {"type": "topk", "k": 2}, "dSae": 16}
    # The order in which a job names hooks is its own.
    activations = {"cache": cache_spec(hooks=hooks[::-1])}
    second = training_spec(activations, saes=[on_a_head], output={"uri": "s3://bucket/second"})
    world.create("SAETrainingJob", "second", second)
    assert world.wait_phase("SAETrainingJob", "second", "Succeeded")["status"]["cacheName"] == name
    cache = world.get("ActivationCache", name)
    assert cache is not None
    assert cache["spec"]["hooks"] == hooks
    assert [hook["name"] for hook in cache["status"]["hooks"]] == ["model.layers.2", "attn.z:3"]
    assert {"prepare-2", "cache-2", "finalize-2"} <= set(world.steps())
    assert owners(world, name) == ["first", "second"]
    told = [event["message"] for event in world.list("Event") if event["reason"] == "CacheExtended"]
    assert told == [f"extends ActivationCache {name}: adds attn.z:3"]


def test_a_live_job_makes_no_cache(world: World, operator: OperatorProcess) -> None:
    source = {key: value for key, value in cache_spec().items() if key not in ("storage", "parallelism", "run")}
    world.create("SAETrainingJob", "live", training_spec({"live": source}))
    assert "cacheName" not in world.wait_phase("SAETrainingJob", "live", "Succeeded")["status"]
    assert world.steps() == ["preflight-1", "train-1"]
    assert world.list("ActivationCache") == []


def test_a_cache_goes_with_its_last_owner(world: World, operator: OperatorProcess) -> None:
    for name in ("first", "second"):
        world.create("SAETrainingJob", name, training_spec(output={"uri": f"s3://bucket/{name}"}))
    cache = world.wait_phase("SAETrainingJob", "first", "Succeeded")["status"]["cacheName"]
    world.wait_phase("SAETrainingJob", "second", "Succeeded")
    world.delete("SAETrainingJob", "first")
    # The garbage collector looks every 30 s which kinds there are; ours may be new to it.
    wait_for(lambda: owners(world, cache) == ["second"], 90, what="the first owner's reference is gone")
    world.delete("SAETrainingJob", "second")
    wait_for(lambda: world.get("ActivationCache", cache) is None, what="the cache is gone")
    wait_for(lambda: not world.jobs(), what="the Jobs are gone")


def test_a_job_waits_until_the_cache_that_it_refers_to_is_ready(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    world.create("SAETrainingJob", "reader", training_spec({"cacheRef": {"name": "shared"}}))

    def says_not_found(found: dict[str, Any]) -> bool:
        return conditions(found)["Ready"]["reason"] == "CacheNotFound"

    world.wait_resource("SAETrainingJob", "reader", says_not_found)
    kubelet.scripts[world.namespace] = except_for(cache=Runs())
    world.create("ActivationCache", "shared", cache_spec())
    world.wait_phase("ActivationCache", "shared", "Caching")
    world.wait_phase("SAETrainingJob", "reader", "WaitingForCache")
    assert not any("train" in step for step in world.steps())
    kubelet.scripts[world.namespace] = succeed
    world.wait_phase("SAETrainingJob", "reader", "Succeeded")


def test_suspending_ends_the_pods_and_resuming_goes_on(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    kubelet.scripts[world.namespace] = except_for(train=Runs())
    world.create("SAETrainingJob", "first", training_spec())
    world.wait_phase("SAETrainingJob", "first", "Running")
    world.patch("SAETrainingJob", "first", {"spec": {"suspend": True}})
    world.wait_phase("SAETrainingJob", "first", "Suspended")
    assert not [pod for pod in world.list("Pod", ours=True) if pod["status"]["phase"] == "Running"]
    assert "train-1" not in world.steps()
    kubelet.scripts[world.namespace] = succeed
    world.patch("SAETrainingJob", "first", {"spec": {"suspend": False}})
    job = world.wait_phase("SAETrainingJob", "first", "Succeeded")
    assert job["status"]["attempt"] == 2
    assert "train-2" in world.steps()


def test_a_failed_job_says_why_and_runs_again_when_retry_is_raised(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    wrong = result("preflight", exitCode=2, reason="BucketNotFound", message="bucket of spec.output.uri does not exist")
    kubelet.scripts[world.namespace] = except_for(preflight=Ends(2, wrong))
    world.create("SAETrainingJob", "first", training_spec())
    job = world.wait_phase("SAETrainingJob", "first", "Failed")
    told = conditions(job)
    assert told["Stalled"]["status"] == "True"
    assert told["Ready"]["status"] == "False"
    assert "bucket of spec.output.uri does not exist" in told["Ready"]["message"]
    assert told["Ready"]["reason"] == "BucketNotFound"
    assert world.steps() == ["preflight-1"], "exit code 2 is not retried, and no GPU is asked for"
    pods = [pod for pod in world.list("Pod", ours=True) if step_of(pod) == "preflight"]
    assert len(pods) == 1
    kubelet.scripts[world.namespace] = succeed
    world.patch("SAETrainingJob", "first", {"spec": {"retry": 1}})
    job = world.wait_phase("SAETrainingJob", "first", "Succeeded")
    assert job["status"]["observedRetry"] == 1
    assert conditions(job)["Stalled"]["status"] == "False"


def test_terminal_is_terminal(world: World, operator: OperatorProcess) -> None:
    world.create("SAETrainingJob", "first", training_spec())
    job = world.wait_phase("SAETrainingJob", "first", "Succeeded")
    cache = world.wait_phase("ActivationCache", job["status"]["cacheName"], "Ready")
    for name in world.jobs():
        world.delete("Job", name)
    wait_for(lambda: not world.jobs(), what="the Jobs are gone")
    restarted = run_operator(world.control_plane.kubeconfig, namespace=world.namespace)
    operator.stop()
    with restarted as again:
        # Another resource goes through all its phases meanwhile: the operator is at work.
        world.create("SAETrainingJob", "second", training_spec(output={"uri": "s3://bucket/second"}))
        world.wait_phase("SAETrainingJob", "second", "Succeeded")
        assert again.exit_code is None
    for found in (job, cache):
        now = world.get(found["kind"], found["metadata"]["name"])
        assert now is not None
        assert now["status"] == found["status"]
    assert world.steps() == ["preflight-1", "train-1"], "only the second one's"


def test_a_restart_in_the_middle_changes_nothing(world: World, kubelet: FakeKubelet) -> None:
    kubelet.scripts[world.namespace] = except_for(train=Runs())
    first = start_operator(world.control_plane.kubeconfig, namespace=world.namespace)
    world.create("SAETrainingJob", "first", training_spec())
    before = world.wait_phase("SAETrainingJob", "first", "Running")
    first.kill()
    jobs = {name: job["metadata"]["uid"] for name, job in world.jobs().items()}
    kubelet.scripts[world.namespace] = succeed
    wait_for(lambda: ended(world, "train"), what="the training ends while nobody looks")
    with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
        after = world.wait_phase("SAETrainingJob", "first", "Succeeded")
    assert {name: job["metadata"]["uid"] for name, job in world.jobs().items()} == jobs
    assert after["status"]["startTime"] == before["status"]["startTime"]


def test_two_operators_at_once_do_no_harm(world: World, operator: OperatorProcess) -> None:
    with run_operator(world.control_plane.kubeconfig, namespace=world.namespace):
        for name in ("first", "second"):
            world.create("SAETrainingJob", name, training_spec(output={"uri": f"s3://bucket/{name}"}))
        for name in ("first", "second"):
            world.wait_phase("SAETrainingJob", name, "Succeeded")
    assert world.steps() == sorted([*WHOLE_LIFE, "preflight-1", "train-1"])


def test_progress_is_pulled_from_the_pods(world: World, operator: OperatorProcess, kubelet: FakeKubelet) -> None:
    sae = {"name": "k2", "phase": "Running", "explainedVariance": 0.5, "l0": 2.0}
    now = datetime.now(UTC).isoformat()
    told = {
        "step": "train",
        "tokens": 250,
        "totalTokens": 1000,
        "tokensPerSecond": 100.0,
        "updatedAt": now,
        "saes": [sae],
    }
    kubelet.scripts[world.namespace] = except_for(train=Runs())
    server = ThreadingHTTPServer((POD_IP, PROGRESS_PORT), answering(json.dumps(told).encode()))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        world.create("SAETrainingJob", "first", training_spec())

        def shows(found: dict[str, Any]) -> bool:
            return found["status"].get("progress", {}).get("percent") == 25

        status = world.wait_resource("SAETrainingJob", "first", shows)["status"]
    finally:
        server.shutdown()
        server.server_close()
    assert status["phase"] == "Running"
    assert status["progress"]["tokensPerSecond"] == 100
    assert status["summary"]["explainedVariance"] == "0.500"


@pytest.mark.parametrize(
    ("behaviour", "condition", "words"),
    [
        (Waits("ImagePullBackOff", 'Back-off pulling image "no/such:1"'), "ImagePullFailed", "no/such:1"),
        (Waits("CreateContainerConfigError", 'secret "s3" not found'), "SecretMissing", "s3"),
    ],
)
def test_a_pod_that_cannot_start_is_told(
    world: World,
    operator: OperatorProcess,
    kubelet: FakeKubelet,
    behaviour: Behaviour,
    condition: str,
    words: str,
) -> None:
    kubelet.scripts[world.namespace] = except_for(preflight=behaviour)
    world.create("SAETrainingJob", "first", training_spec())
    told = world.wait_condition("SAETrainingJob", "first", condition)
    assert words in told["message"]
    kubelet.scripts[world.namespace] = succeed
    job = world.wait_phase("SAETrainingJob", "first", "Succeeded")
    assert conditions(job).get(condition, {"status": "False"})["status"] == "False"


def test_a_pod_that_fits_no_node_is_told(world: World, operator: OperatorProcess) -> None:
    world.create("SAETrainingJob", "first", training_spec(run={"cpuSteps": {"nodeSelector": {"no": "such"}}}))
    told = world.wait_condition("SAETrainingJob", "first", "Unschedulable")
    assert "node" in told["message"]


def test_two_kills_for_memory_end_a_job(world: World, operator: OperatorProcess, kubelet: FakeKubelet) -> None:
    kubelet.scripts[world.namespace] = except_for(train=Ends(137, "", "OOMKilled"))
    limit = 7
    world.create("SAETrainingJob", "first", training_spec(run={**PLACEMENT, "backoffLimit": limit}))
    job = world.wait_phase("SAETrainingJob", "first", "Failed")
    assert conditions(job)["Ready"]["reason"] == "OOMKilled"
    assert conditions(job)["Ready"]["message"].startswith("killed for memory"), "not because of its backoffLimit"
    assert {item["reason"] for item in job["status"]["attempts"]} == {"OOMKilled"}
    # How many more start before the Job is ended, says how busy the machine is.
    assert 2 <= [step for space, _, step in kubelet.started if space == world.namespace].count("train") <= limit


def test_a_result_that_was_lost_does_not_hold_a_job(world: World, kubelet: FakeKubelet) -> None:
    kubelet.scripts[world.namespace] = except_for(train=Ends(0, "not a result"))
    patience = ("--result-grace-seconds=2",)
    with run_operator(world.control_plane.kubeconfig, namespace=world.namespace, arguments=patience):
        world.create("SAETrainingJob", "first", training_spec())
        job = world.wait_phase("SAETrainingJob", "first", "Succeeded")
    assert conditions(job)["MetricsUnavailable"]["status"] == "True"


def test_what_the_api_server_refuses_is_told(world: World, operator: OperatorProcess) -> None:
    quota = {"hard": {"count/jobs.batch": "0"}}
    world.create("ResourceQuota", "none", quota, api_version="v1")
    wait_for(lambda: world.status("ResourceQuota", "none").get("hard"), what="the quota counts")
    world.create("SAETrainingJob", "first", training_spec())

    def refused(found: dict[str, Any]) -> bool:
        return conditions(found)["Ready"]["reason"] == "CreateRefused"

    job = world.wait_resource("SAETrainingJob", "first", refused)
    assert "exceeded quota" in conditions(job)["Ready"]["message"]
    wait_for(lambda: any(event["reason"] == "CreateRefused" for event in world.list("Event")), what="an event")
    world.delete("ResourceQuota", "none")
    world.wait_phase("SAETrainingJob", "first", "Succeeded", timeout=120)


def test_the_heartbeat_is_the_only_write_at_rest(world: World, operator: OperatorProcess) -> None:
    world.create("SAETrainingJob", "first", training_spec())
    job = world.wait_phase("SAETrainingJob", "first", "Succeeded")
    # The heartbeat is a task of its own.
    lease = wait_for(lambda: world.get("Lease", "sae-operator"), what="the heartbeat")
    assert lease is not None
    assert lease["spec"]["holderIdentity"]
    operator.stop()
    telling = {ENV_EXIT_AT_CALL: "never"}
    with run_operator(world.control_plane.kubeconfig, namespace=world.namespace, environment=telling) as again:
        marker = "Work begins"
        wait_for(lambda: marker in again.tail(), what="the operator has started again")
        wait_for(lambda: "sae-operator-defaults" in again.tail(), what="it looks at everything")
    # Told to end, it finishes what it has begun: these are all of its calls.
    kinds = {call.kind for call in again.calls}
    assert "GET configmaps" in kinds
    assert {kind for kind in kinds if not kind.startswith("GET ")} <= {"PATCH leases"}
    after = world.get("SAETrainingJob", "first")
    assert after is not None
    assert after["metadata"]["resourceVersion"] == job["metadata"]["resourceVersion"]


def owners(world: World, cache: str) -> list[str]:
    found = world.get("ActivationCache", cache)
    return [owner["name"] for owner in found["metadata"].get("ownerReferences", [])] if found else []


def ended(world: World, step: str) -> bool:
    return any(
        condition["type"] == "Complete" and condition["status"] == "True"
        for name, job in world.jobs().items()
        if f"-{step}-" in name
        for condition in job["status"].get("conditions", [])
    )


def answering(body: bytes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    return Handler

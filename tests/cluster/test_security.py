"""Pods hold no rights and little else, credentials stay where they are, and names cannot lead elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from sae_operator.api.steps import PROGRESS_PORT
from tests.fake_kubelet import PLACEMENT, POD_IP, Behaviour, Ends, FakeKubelet, Runs, Waits, result, step_of, succeed
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import API, World, cache_spec, conditions, training_spec
from tests.testbed.waiting import wait_for


@pytest.fixture
def operator(world: World) -> Iterator[OperatorProcess]:
    process = start_operator(world.control_plane.kubeconfig, namespace=world.namespace, poll_seconds=0.5)
    yield process
    if process.exit_code is None:
        assert process.stop() == 0, process.tail()


# Pods


def assert_harmless(pod: dict[str, Any]) -> None:
    """What every pod of ours is, beyond what `restricted` asks for."""
    spec, where = pod["spec"], pod["metadata"]["name"]
    assert spec["automountServiceAccountToken"] is False, where
    for field in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace", "initContainers"):
        assert not spec.get(field), (where, field)
    assert spec["securityContext"]["runAsNonRoot"] is True, where
    assert spec["securityContext"]["runAsUser"] == 65532, where
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
    for volume in spec["volumes"]:
        (kind,) = set(volume) - {"name"}
        assert kind in ("configMap", "emptyDir", "secret", "persistentVolumeClaim"), (where, volume)
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"] is True, where
    assert context["allowPrivilegeEscalation"] is False, where
    assert context["capabilities"] == {"drop": ["ALL"]}, where
    assert not context.get("privileged"), where
    assert container["command"] == ["sae-job"], where
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert not [path for path in mounted if "serviceaccount" in path], where


def space(*values: int) -> dict[str, Any]:
    return {"parameters": [{"path": "saes[0].architecture.k", "values": list(values)}]}


RICH_RUN = {
    **PLACEMENT,
    "resources": {"limits": {"nvidia.com/gpu": 2, "memory": "8Gi"}},
    "shmSize": "4Gi",
    "volumes": [{"claimName": "models", "mountPath": "/mnt/models", "readOnly": True}],
    "serviceAccountName": "default",
    "env": [{"name": "HF_TOKEN", "secretKeyRef": {"name": "hub", "key": "token"}}],
    "podAnnotations": {"team": "a"},
}


def test_every_pod_is_admitted_by_restricted_and_holds_no_rights(world: World, operator: OperatorProcess) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "models", "namespace": world.namespace},
        "spec": {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"models-{world.namespace}"},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "capacity": {"storage": "1Gi"},
            "hostPath": {"path": "/nowhere"},
            "claimRef": {"namespace": world.namespace, "name": "models"},
            "storageClassName": "",
        },
    }
    claim["spec"]["storageClassName"] = ""
    world.control_plane.apply([volume, claim])
    try:
        cache = cache_spec(run=RICH_RUN, storage={"uri": "s3://bucket/caches", "secretRef": {"name": "s3"}})
        world.create("SAETrainingJob", "job", training_spec({"cache": cache}, parallelism=2, run=RICH_RUN))
        job = world.wait_phase("SAETrainingJob", "job", "Succeeded", "Failed", timeout=120)
    finally:
        world.control_plane.kubectl("delete", "persistentvolume", volume["metadata"]["name"], "--wait=false")
    assert job["status"]["phase"] == "Succeeded", job["status"]
    template = training_spec({"uri": "s3://bucket/cache"}, output={"uri": "s3://bucket/sweep"})
    spec = {"template": template, "space": space(1, 2), "report": PLACEMENT["cpuSteps"]}
    world.create("SAESweep", "sweep", spec)
    world.wait_phase("SAESweep", "sweep", "Succeeded", timeout=120)
    pods = world.list("Pod", ours=True)
    assert {step_of(pod) for pod in pods} == {"preflight", "prepare", "cache", "finalize", "train", "report"}
    for pod in pods:
        assert_harmless(pod)


def test_labels_of_a_user_claim_nothing(world: World, operator: OperatorProcess) -> None:
    """Neither another resource's pods nor another kind's."""
    claimed = {
        "sae-operator.dev/uid": "00000000-0000-0000-0000-000000000000",
        "sae-operator.dev/kind": "ActivationCache",
        "sae-operator.dev/step": "cache",
        "sae-operator.dev/name": "another",
        "app.kubernetes.io/managed-by": "somebody",
        "team": "a",
    }
    world.create("SAETrainingJob", "job", training_spec(run={**PLACEMENT, "podLabels": claimed}))
    job = world.wait_phase("SAETrainingJob", "job", "Succeeded")
    pods = [pod for pod in world.list("Pod", ours=True) if step_of(pod) in ("preflight", "train")]
    assert len(pods) == 2
    for pod in pods:
        found = pod["metadata"]["labels"]
        assert found["sae-operator.dev/uid"] == job["metadata"]["uid"]
        assert found["sae-operator.dev/kind"] == "SAETrainingJob"
        assert found["sae-operator.dev/name"] == "job"
        assert found["team"] == "a"


@pytest.mark.parametrize("name", ["LD_PRELOAD", "PYTHONPATH", "PATH", "OPENSSL_CONF", "SAE_JOB_POD_IP"])
def test_variables_that_could_change_the_code_are_refused(world: World, name: str) -> None:
    run = {**PLACEMENT, "env": [{"name": name, "value": "/tmp/x"}]}
    for kind, spec in (("ActivationCache", cache_spec(run=run)), ("SAETrainingJob", training_spec(run=run))):
        status, body = attempt(world, kind, "job", spec)
        assert status == 422, body
        assert "spec.run.env[0].name" in body


# What is not allowed


def test_what_the_settings_do_not_allow_creates_nothing(world: World) -> None:
    allowed = ("--allowed-image=ghcr.io/team/*", "--allowed-service-account=sae-*")
    process = start_operator(world.control_plane.kubeconfig, namespace=world.namespace, arguments=allowed)
    try:
        world.create("SAETrainingJob", "image", training_spec(run={**PLACEMENT, "image": "docker.io/other:1"}))
        world.create("ActivationCache", "account", cache_spec(run={**PLACEMENT, "serviceAccountName": "admin"}))
        model = {"name": "tiny", "trustRemoteCode": True}
        world.create("SAETrainingJob", "code", training_spec({"cache": cache_spec(model=model)}))
        template = training_spec({"uri": "s3://bucket/cache"})
        images = {"parameters": [{"path": "run.image", "values": ["ghcr.io/team/a:1", "docker.io/other:1"]}]}
        world.create("SAESweep", "images", {"template": template, "space": images})
        for kind, name, field in (
            ("SAESweep", "images", "spec.template.run.image"),
            ("SAETrainingJob", "image", "spec.run.image"),
            ("ActivationCache", "account", "spec.run.serviceAccountName"),
            ("SAETrainingJob", "code", "spec.activations.cache.model.trustRemoteCode"),
        ):
            told = world.wait_condition(kind, name, "Stalled")
            assert told["reason"] == "NotAllowed"
            assert told["message"].startswith(f"{field}: ")
        assert not world.jobs()
        assert not world.list("ConfigMap", ours=True)
        assert [cache["metadata"]["name"] for cache in world.list("ActivationCache")] == ["account"]
        assert sorted(job["metadata"]["name"] for job in world.list("SAETrainingJob")) == ["code", "image"]
        # Corrected, it runs; the job image itself needs no leave.
        world.patch("SAETrainingJob", "image", {"spec": {"run": {"image": None}}})
        world.wait_phase("SAETrainingJob", "image", "Succeeded")
    finally:
        assert process.stop() == 0, process.tail()


# Credentials

SECRETS = {
    "access key": "AKIAQQQQPLANTED00001",
    "secret key": "wJalrPLANTED0002K7MDENGbPxRfiCYEXAMPLE",
    "password": "hunter2PLANTED0003",
    "signature": "deadbeefPLANTED0004",
    "hub token": "hf_PLANTED0005abcdefghij",
    "bearer": "PLANTED0006.tokenvalue",
    "wandb": "PLANTED0007wandbkey",
}
SAID = (
    f"could not reach https://minio:{SECRETS['password']}@s3.example.com:"
    f" GET https://s3.example.com/b/x?X-Amz-Credential={SECRETS['access key']}%2F2026"
    f"&X-Amz-Signature={SECRETS['signature']}"
    f" AWS_SECRET_ACCESS_KEY={SECRETS['secret key']} HF_TOKEN={SECRETS['hub token']}"
    f" Authorization: Bearer {SECRETS['bearer']} wandb api_key={SECRETS['wandb']}"
)


def assert_nothing_is_told(world: World, operator: OperatorProcess) -> None:
    statuses = [
        found.get("status") for kind in ("SAETrainingJob", "ActivationCache", "SAESweep") for found in world.list(kind)
    ]
    places = {
        "status": json.dumps(statuses),
        "events": json.dumps([event for event in world.list("Event") if event["reportingComponent"] == "sae-operator"]),
        "log": operator.log.read_text(),
    }
    for place, text in places.items():
        assert text, place
        for what, secret in SECRETS.items():
            assert secret not in text, f"the {what} is in the {place}"


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(Ends(2, result("preflight", exitCode=2, reason="StoreRefused", message=SAID)), id="its message"),
        pytest.param(Ends(2, f"Traceback (most recent call last):\n{SAID}\n"), id="the end of its log"),
        pytest.param(Waits("CreateContainerConfigError", f"secret: {SAID}"), id="why it does not start"),
        pytest.param(Waits("ErrImagePull", f"image: {SAID}"), id="why its image is not pulled"),
    ],
)
def test_what_a_pod_says_gives_no_credentials_away(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet, behaviour: Behaviour
) -> None:
    secret = {"metadata": {"name": "s3"}, "stringData": {"AWS_SECRET_ACCESS_KEY": SECRETS["secret key"]}}
    world._call("POST", f"/api/v1/namespaces/{world.namespace}/secrets", secret)
    kubelet.scripts[world.namespace] = lambda pod: behaviour
    place = {"uri": "s3://bucket/out", "endpointUrl": "https://s3.example.com"}
    world.create("SAETrainingJob", "job", training_spec(output={**place, "secretRef": {"name": "s3"}}))

    def told(found: dict[str, Any]) -> bool:
        return "***" in json.dumps(list(conditions(found).values()))

    found = world.wait_resource("SAETrainingJob", "job", told)
    assert "s3.example.com" in json.dumps(found["status"]), "what is no secret is told"
    wait_for(lambda: "***" in operator.log.read_text(), what="the log")
    wait_for(
        lambda: any("***" in event["message"] for event in world.list("Event")), what="an event about what was said"
    )
    assert_nothing_is_told(world, operator)


def test_what_a_pod_says_of_its_saes_gives_no_credentials_away(
    world: World, operator: OperatorProcess, kubelet: FakeKubelet
) -> None:
    """While it works, by its progress, and at its end."""
    sae = {"name": "k2", "phase": "Failed", "message": SAID}
    progress = {"step": "train", "tokens": 250, "totalTokens": 1000, "updatedAt": datetime.now(UTC).isoformat()}
    body = json.dumps({**progress, "saes": [sae]}).encode()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    ends = Ends(message=result("train", tokens=900, saes=[sae]))
    stops: list[bool] = []

    def script(pod: dict[str, Any]) -> Behaviour:
        if step_of(pod) != "train":
            return succeed(pod)
        return ends if stops else Runs()

    kubelet.scripts[world.namespace] = script
    server = ThreadingHTTPServer((POD_IP, PROGRESS_PORT), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        world.create("SAETrainingJob", "job", training_spec())

        def shows(found: dict[str, Any]) -> bool:
            return "***" in json.dumps(found["status"].get("saes"))

        world.wait_resource("SAETrainingJob", "job", shows)
        assert_nothing_is_told(world, operator)
        stops.append(True)
        world.wait_phase("SAETrainingJob", "job", "Succeeded", "Failed")
    finally:
        server.shutdown()
        server.server_close()
    assert_nothing_is_told(world, operator)


def test_what_the_api_server_says_gives_no_credentials_away(world: World, operator: OperatorProcess) -> None:
    """It repeats what it refuses."""
    labels = {f"token={SECRETS['hub token']}": "x", f"password={SECRETS['password']}": "y"}
    world.create("SAETrainingJob", "job", training_spec(run={**PLACEMENT, "podLabels": labels}))

    def told(found: dict[str, Any]) -> bool:
        return conditions(found)["Ready"]["reason"] == "CreateRefused"

    found = world.wait_resource("SAETrainingJob", "job", told)
    assert "password=***" in conditions(found)["Ready"]["message"]
    wait_for(lambda: "***" in operator.log.read_text(), what="the log")
    assert_nothing_is_told(world, operator)


# Names

SPECS: dict[str, dict[str, Any]] = {
    "activationcaches": cache_spec(),
    "saetrainingjobs": training_spec(),
    "saesweeps": {
        "template": training_spec({"uri": "s3://bucket/cache"}),
        "space": {"parameters": [{"path": "training.learningRate", "values": [0.1, 0.2]}]},
    },
}
ADDRESSES = {
    "activationcaches": ("storage", "uri"),
    "saetrainingjobs": ("output", "uri"),
    "saesweeps": ("template", "output", "uri"),
}


def attempt(world: World, kind: str, name: str, spec: dict[str, Any]) -> tuple[int, str]:
    """Status and text of the answer to a create; `kind` may be the plural."""
    kinds = {"activationcaches": "ActivationCache", "saetrainingjobs": "SAETrainingJob", "saesweeps": "SAESweep"}
    plural = next((found for found in kinds if kind in (found, kinds[found])), kind)
    manifest = {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": kinds[plural],
        "metadata": {"name": name},
        "spec": spec,
    }
    path = f"{API}/namespaces/{world.namespace}/{plural}?dryRun=All"
    status, body = world.control_plane.request("POST", path, manifest)
    return status, body.decode()


@pytest.mark.parametrize("plural", SPECS)
@pytest.mark.parametrize(
    "name",
    ["..", "a..b", "a/../b", "a/b", "A", "a\nb", "a\u0000b", "a\u007fb", "a b", "-a", "ä", "a" * 254],
    ids=["parent", "dots", "path", "slash", "capital", "line end", "null", "delete", "space", "dash", "umlaut", "long"],
)
def test_names_that_are_no_object_names_are_refused(world: World, plural: str, name: str) -> None:
    assert attempt(world, plural, "fine", SPECS[plural])[0] == 201
    status, body = attempt(world, plural, name, SPECS[plural])
    assert status in (400, 422), body


@pytest.mark.parametrize("plural", SPECS)
@pytest.mark.parametrize(
    "url", ["https://minio:secret@s3", "http://key@10.0.0.1:9000/x", "https://a:b@c@d", "ftp://s3"]
)
def test_an_endpoint_with_credentials_in_it_is_refused(world: World, plural: str, url: str) -> None:
    spec = json.loads(json.dumps(SPECS[plural]))
    inner = spec
    for key in ADDRESSES[plural][:-1]:
        inner = inner[key]
    inner["endpointUrl"] = url
    status, body = attempt(world, plural, "job", spec)
    assert status == 422, body
    assert "endpointUrl" in body
    inner["endpointUrl"] = "https://s3.example.com:9000/path@1"
    assert attempt(world, plural, "job", spec)[0] == 201


@pytest.mark.parametrize("plural", SPECS)
@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/../other",
        "s3://bucket/a/..",
        "s3://../bucket",
        "s3://bucket/a\nb",
        "s3://bucket/a\u0000b",
        "s3://bucket/a\u007f",
        "s3://BUCKET/a",
        "http://bucket/a",
        "/etc/passwd",
        "s3://bucket/" + "a" * 1024,
    ],
)
def test_addresses_that_lead_elsewhere_are_refused(world: World, plural: str, address: str) -> None:
    spec = json.loads(json.dumps(SPECS[plural]))
    *parents, last = ADDRESSES[plural]
    inner = spec
    for key in parents:
        inner = inner[key]
    inner[last] = address
    status, body = attempt(world, plural, "job", spec)
    assert status == 422, body
    assert "uri" in body

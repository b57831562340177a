"""The test bed does what Kubernetes and S3 do, as far as the product relies on it."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tests.testbed.control_plane import ControlPlane, KubectlError
from tests.testbed.manifests import job, pod, restricted_pod
from tests.testbed.node import Node
from tests.testbed.object_server import ObjectServer
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

pytestmark = pytest.mark.timeout(300)

SERVER = """
import http.server, os
http.server.HTTPServer((os.environ["POD_IP"], 8080), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
UNTIL_TERMINATED = """
import os, signal
def told(number, frame):
    with open("/run/message", "w") as message:
        message.write("told to end")
    os._exit(143)
signal.signal(signal.SIGTERM, told)
print("ready", flush=True)
while True:
    signal.pause()
"""


class Pods:
    """The pods of one namespace."""

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.control_plane = control_plane
        self.namespace = namespace

    def start(self, name: str, spec: dict[str, Any]) -> str:
        self.control_plane.apply(pod(self.namespace, name, spec))
        return name

    def status(self, name: str) -> dict[str, Any]:
        return self.control_plane.get("pod", name, "--namespace", self.namespace)["status"]

    def container(self, name: str) -> dict[str, Any]:
        """State of the pod's first container, empty before there is one."""
        return next(iter(self.status(name).get("containerStatuses", [])), {}).get("state", {})

    def wait(self, name: str, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The pod's status as soon as it meets the condition."""

        def met() -> dict[str, Any] | None:
            status = self.status(name)
            return status if condition(status) else None

        return wait_for(met, what=lambda: f"pod {name}: {self.status(name)}") or {}

    def result(self, name: str) -> dict[str, Any]:
        """The terminated state of the pod's first container, once the pod has ended."""
        status = self.wait(name, lambda status: status.get("phase") in ("Succeeded", "Failed"))
        return status["containerStatuses"][0]["state"]["terminated"]

    def waits_for(self, name: str, reason: str) -> dict[str, Any]:
        """The waiting state of the pod's first container, once it has that reason."""
        return wait_for(
            lambda: (found := self.container(name).get("waiting", {})).get("reason") == reason and found,
            what=lambda: f"pod {name} waits for {reason}: {self.status(name)}",
        )

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """A finalizer holds the pod in the API, so that its last state can be read."""
        finalizer = "testbed.example.com/hold"
        self._patch_metadata(name, {"finalizers": [finalizer]})
        try:
            yield
        finally:
            self._patch_metadata(name, {"$deleteFromPrimitiveList/finalizers": [finalizer]})

    def _patch_metadata(self, name: str, metadata: dict[str, Any]) -> None:
        patch = json.dumps({"metadata": metadata})
        self.control_plane.kubectl("patch", "pod", name, "--namespace", self.namespace, "--patch", patch)

    def events(self, name: str) -> list[str]:
        listed = self.control_plane.get(
            "events", "--namespace", self.namespace, "--field-selector", f"involvedObject.name={name}"
        )
        return [f"{event['reason']}: {event['message']}" for event in listed["items"]]


@pytest.fixture
def pods(control_plane: ControlPlane, namespace: str, node: Node) -> Pods:
    return Pods(control_plane, namespace)


def python(code: str, **container: Any) -> dict[str, Any]:
    return restricted_pod("python", "-c", code, **container)


POD_IP = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}


def answers(address: str) -> bool:
    """Whether an HTTP server answers on port 8080 of an address."""
    connection = http.client.HTTPConnection(address, 8080, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def command_line(process: int) -> str:
    """Command line of a process; empty when it has ended, also when nobody has taken note of its end yet."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except FileNotFoundError:
        return ""


# Control plane


def test_a_restricted_namespace_refuses_a_privileged_pod(control_plane: ControlPlane, namespace: str) -> None:
    with pytest.raises(KubectlError, match="violates PodSecurity"):
        control_plane.kubectl(
            *("run", "root-pod", "--namespace", namespace, "--image=any", "--privileged", "--restart=Never")
        )


def test_an_indexed_job_completes_once_per_index(pods: Pods) -> None:
    code = "import os; open('/dev/termination-log', 'w').write(os.environ['JOB_COMPLETION_INDEX'])"
    spec = {"completions": 2, "parallelism": 2, "completionMode": "Indexed"}
    pods.control_plane.apply(job(pods.namespace, "indexed", python(code), **spec))
    in_namespace = ("--namespace", pods.namespace)
    pods.control_plane.kubectl("wait", "--for=condition=Complete", "job/indexed", "--timeout=120s", *in_namespace)
    listed = pods.control_plane.get("pods", "--selector", "job-name=indexed", *in_namespace)
    states = [pod["status"]["containerStatuses"][0]["state"]["terminated"] for pod in listed["items"]]
    assert sorted(state["message"] for state in states) == ["0", "1"]
    assert {state["exitCode"] for state in states} == {0}


def test_a_job_fails_soon_after_its_last_try(pods: Pods) -> None:
    pods.control_plane.apply(job(pods.namespace, "failing", python("raise SystemExit(3)"), backoffLimit=2))
    in_namespace = ("--namespace", pods.namespace)
    pods.control_plane.kubectl("wait", "--for=condition=Failed", "job/failing", "--timeout=120s", *in_namespace)
    status = pods.control_plane.get("job", "failing", *in_namespace)["status"]
    assert status["failed"] == 3
    assert [one["reason"] for one in status["conditions"] if one["type"] == "Failed"] == ["BackoffLimitExceeded"]


# What a container is given


def test_the_command_of_the_job_image_runs_as_an_ordinary_user(pods: Pods) -> None:
    result = pods.result(pods.start("help", restricted_pod("sae-job", "--help")))
    assert result["exitCode"] == 0


def test_a_container_has_its_user_groups_and_a_root_it_cannot_write(pods: Pods) -> None:
    code = """
import errno, os
assert os.getuid() == 65532 and os.getgid() == 65532 and 65532 in os.getgroups(), (os.getuid(), os.getgroups())
for path in ("/file", "/tmp/file", "/run/file"):
    try:
        open(path, "w")
    except OSError as error:
        assert error.errno in (errno.EROFS, errno.EACCES), error
    else:
        raise AssertionError(path)
assert os.getpid() == 1
print("done")
"""
    name = pods.start("identity", python(code))
    assert pods.result(name)["exitCode"] == 0, pods.control_plane.kubectl("logs", name, "--namespace", pods.namespace)
    assert pods.control_plane.kubectl("logs", name, "--namespace", pods.namespace) == "done\n"


def test_volumes_show_config_maps_secrets_and_scratch_space(pods: Pods) -> None:
    metadata = {"namespace": pods.namespace, "name": "given"}
    pods.control_plane.apply(
        [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"step.json": "{}"}},
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"KEY": "made up"}},
        ]
    )
    code = """
assert open("/etc/given/step.json").read() == "{}"
assert open("/run/secrets/given/KEY").read() == "made up"
open("/tmp/scratch", "w").write("x")
"""
    mounts = [
        {"name": "config", "mountPath": "/etc/given"},
        {"name": "secret", "mountPath": "/run/secrets/given", "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    spec = python(code, volumeMounts=mounts)
    spec["volumes"] = [
        {"name": "config", "configMap": {"name": "given"}},
        {"name": "secret", "secret": {"secretName": "given"}},
        {"name": "tmp", "emptyDir": {}},
    ]
    name = pods.start("volumes", spec)
    assert pods.result(name)["exitCode"] == 0, pods.control_plane.kubectl("logs", name, "--namespace", pods.namespace)


def test_writing_beyond_the_size_limit_of_scratch_space_fails_with_enospc(pods: Pods) -> None:
    code = """
import errno
try:
    with open("/scratch/file", "wb") as file:
        file.write(bytes(2 << 20))
except OSError as error:
    raise SystemExit(0 if error.errno == errno.ENOSPC else 1)
raise SystemExit(2)
"""
    spec = python(code, volumeMounts=[{"name": "scratch", "mountPath": "/scratch"}])
    spec["volumes"] = [{"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]
    assert pods.result(pods.start("full", spec))["exitCode"] == 0


def test_gpus_are_an_extended_resource(pods: Pods) -> None:
    limits = {"resources": {"limits": {"nvidia.com/gpu": 2}}}
    code = "import os; open('/dev/termination-log', 'w').write(os.environ['NVIDIA_VISIBLE_DEVICES'])"
    assert len(pods.result(pods.start("gpus", python(code, **limits)))["message"].split(",")) == 2
    too_many = python(code, resources={"limits": {"nvidia.com/gpu": 99}})
    status = pods.wait(pods.start("greedy", too_many), lambda status: status.get("conditions"))
    assert [one["reason"] for one in status["conditions"] if one["type"] == "PodScheduled"] == ["Unschedulable"]


def test_a_token_of_the_service_account_is_accepted_by_the_api_server(pods: Pods) -> None:
    code = """
import os, ssl, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount"
tls = ssl.create_default_context(cafile=f"{folder}/ca.crt")
address = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
review = f"{address}/apis/authentication.k8s.io/v1/selfsubjectreviews"
body = b'{"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}'
headers = {"Authorization": "Bearer " + open(f"{folder}/token").read(), "Content-Type": "application/json"}
answer = urllib.request.urlopen(urllib.request.Request(review, data=body, headers=headers), context=tls).read()
open("/dev/termination-log", "wb").write(answer)
"""
    spec = {**python(code), "automountServiceAccountToken": True}
    name = pods.start("account", spec)
    result = pods.result(name)
    assert result["exitCode"] == 0, pods.control_plane.kubectl("logs", name, "--namespace", pods.namespace)
    user = json.loads(result["message"])["status"]["userInfo"]["username"]
    assert user == f"system:serviceaccount:{pods.namespace}:default"


# How a container ends


def test_the_termination_message_is_the_file_that_the_pod_names(pods: Pods) -> None:
    code = "open('/run/here/message', 'w').write('{\"a\": 1}'); raise SystemExit(2)"
    name = pods.start("message", python(code, terminationMessagePath="/run/here/message"))
    result = pods.result(name)
    assert (result["exitCode"], result["reason"], result["message"]) == (2, "Error", '{"a": 1}')


def test_a_container_beyond_its_memory_limit_is_killed(pods: Pods) -> None:
    code = (
        "import time\nhoard = bytearray(200 << 20)\nfor i in range(0, len(hoard), 4096): hoard[i] = 1\ntime.sleep(60)"
    )
    result = pods.result(pods.start("hungry", python(code, resources={"limits": {"memory": "100Mi"}})))
    assert (result["exitCode"], result["reason"]) == (137, "OOMKilled")


def test_a_child_counts_against_the_memory_limit(pods: Pods) -> None:
    code = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import time; hoard = b\"x\" * (200 << 20); time.sleep(60)'])\n"
    )
    result = pods.result(pods.start("parent", python(code, resources={"limits": {"memory": "100Mi"}})))
    assert (result["exitCode"], result["reason"]) == (137, "OOMKilled")


def test_deleting_a_pod_sends_sigterm_and_keeps_its_message_until_it_has_ended(pods: Pods) -> None:
    name = pods.start("stopped", python(UNTIL_TERMINATED, terminationMessagePath="/run/message"))
    in_namespace = ("--namespace", pods.namespace)
    wait_for(lambda: pods.container(name).get("running") and pods.control_plane.kubectl("logs", name, *in_namespace))
    with pods.held(name):
        pods.control_plane.kubectl("delete", "pod", name, *in_namespace, "--wait=false")
        result = pods.result(name)
    assert (result["exitCode"], result["message"]) == (143, "told to end")


def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace_period(pods: Pods) -> None:
    code = "import signal, time\nprint('ready', flush=True)\ntime.sleep(600)"  # process 1 ignores SIGTERM by default
    spec = python(code)
    spec["terminationGracePeriodSeconds"] = 1
    name = pods.start("stubborn", spec)
    wait_for(lambda: pods.container(name).get("running"))
    pods.control_plane.kubectl("delete", "pod", name, "--namespace", pods.namespace, "--timeout=120s")


def test_an_evicted_pod_of_a_job_keeps_its_disruption_condition(pods: Pods) -> None:
    spec = python(UNTIL_TERMINATED, terminationMessagePath="/run/message")
    pods.control_plane.apply(job(pods.namespace, "evicted", spec, podReplacementPolicy="Failed"))
    in_namespace = ("--namespace", pods.namespace)

    def first() -> dict[str, Any] | None:
        listed = pods.control_plane.get("pods", "--selector", "job-name=evicted", *in_namespace)["items"]
        running = [pod for pod in listed if pod["status"]["phase"] == "Running"]
        return running[0] if running else None

    name = (wait_for(first, what="the Job's pod runs") or {})["metadata"]["name"]
    wait_for(lambda: pods.control_plane.kubectl("logs", name, *in_namespace), what="the pod is ready for signals")
    path = f"/api/v1/namespaces/{pods.namespace}/pods/{name}/eviction"
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    with pods.held(name):
        assert pods.control_plane.request("POST", path, eviction)[0] == 201
        status = pods.wait(name, lambda status: status.get("phase") == "Failed")
    assert "DisruptionTarget" in [one["type"] for one in status["conditions"] if one["status"] == "True"]
    assert status["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 143


def test_containers_end_with_their_node(pods: Pods, tmp_path: Path) -> None:
    with Node(pods.control_plane, tmp_path, name="node-doomed", labels={"pool": "doomed"}) as doomed:
        spec = {**python(SERVER, env=[POD_IP]), "nodeSelector": {"pool": "doomed"}}
        address = pods.wait(pods.start("bereft", spec), lambda status: status.get("podIP"))["podIP"]
        wait_for(lambda: answers(address), what=f"{address} answers")
        doomed.kill()
        wait_for(lambda: not answers(address), what=f"nothing answers on {address} any more")


def test_programs_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = """
import pathlib, signal, sys
from tests.testbed.processes import ChildProcess
child = ChildProcess("sleep", ["sleep", "600"], log=pathlib.Path(sys.argv[1]))
print(child.pid, flush=True)
signal.pause()
"""
    command = [sys.executable, "-c", code, tmp_path / "log"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            wait_for(lambda: command_line(child).startswith("sleep"), what=lambda: command_line(child))
        finally:
            parent.kill()
    wait_for(lambda: not command_line(child), what=f"process {child} has ended")


# What keeps a container from starting


def test_an_image_that_does_not_exist_is_told(pods: Pods) -> None:
    name = pods.start("unknown", restricted_pod("true", image="registry.example.com/no-such:1"))
    waiting = pods.waits_for(name, "ImagePullBackOff")
    assert 'Back-off pulling image "registry.example.com/no-such:1"' in waiting["message"]
    assert pods.status(name)["phase"] == "Pending"
    assert any(event.startswith("Failed: Failed to pull image") for event in pods.events(name))


def test_a_missing_secret_of_a_volume_is_told_as_an_event(pods: Pods) -> None:
    spec = python("pass", volumeMounts=[{"name": "secret", "mountPath": "/run/secret"}])
    spec["volumes"] = [{"name": "secret", "secret": {"secretName": "not-there"}}]
    name = pods.start("without", spec)
    told = 'FailedMount: MountVolume.SetUp failed for volume "secret" : secret "not-there" not found'
    wait_for(lambda: told in pods.events(name), what=lambda: f"{told}: {pods.events(name)}")
    assert pods.waits_for(name, "ContainerCreating") == {"reason": "ContainerCreating"}


def test_a_missing_secret_of_a_variable_is_told_in_the_state(pods: Pods) -> None:
    variable = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "not-there", "key": "KEY"}}}
    name = pods.start("unset", python("pass", env=[variable]))
    assert pods.waits_for(name, "CreateContainerConfigError")["message"] == 'secret "not-there" not found'


def test_a_command_that_does_not_exist_is_told(pods: Pods) -> None:
    result = pods.result(pods.start("no-command", restricted_pod("no-such-command")))
    assert (result["exitCode"], result["reason"]) == (128, "StartError")


# Network


def test_each_pod_serves_on_an_address_of_its_own(pods: Pods) -> None:
    names = [pods.start(name, python(SERVER, env=[POD_IP])) for name in ("one", "two")]
    addresses = [pods.wait(name, lambda status: status.get("podIP"))["podIP"] for name in names]
    assert len(set(addresses)) == 2
    for address in addresses:
        wait_for(lambda address=address: answers(address), what=f"{address} answers")


# S3 and helm


def test_only_the_first_of_two_conditional_puts_is_stored(object_server: ObjectServer) -> None:
    client = object_server.client()
    bucket = object_server.create_bucket("conditional")
    client.put_object(Bucket=bucket, Key="manifest", Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError) as refused:
        client.put_object(Bucket=bucket, Key="manifest", Body=b"second", IfNoneMatch="*")
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=bucket, Key="manifest")["Body"].read() == b"first"


def test_helm_runs(helm: Path) -> None:
    told = subprocess.run([helm, "version", "--short"], capture_output=True, text=True, check=True).stdout
    assert told.startswith("v3.")

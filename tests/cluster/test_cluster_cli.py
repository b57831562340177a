"""`sae-job get | watch | logs | pull | report` against a real API server and a real S3 server, as a researcher runs it.

The operator's part, the status, is written by the tests.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.operator_world import World, training_spec
from tests.testbed.control_plane import ControlPlane
from tests.testbed.object_server import ObjectServer
from tests.testbed.waiting import wait_for

ROOT = Path(__file__).parents[2]
AWS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ROLE_ARN")
PATHS = os.pathsep.join(os.fspath(ROOT / part) for part in ("operator", "jobimage"))
PROGRAM = "import sys; from sae_job.entry import main; sys.exit(main())"
SECONDS = 60

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def world(control_plane: ControlPlane, crds: list[str], namespace: str) -> World:
    return World(control_plane, namespace)


@pytest.fixture
def environment(world: World) -> dict[str, str]:
    """Of a researcher's shell: a kubeconfig, and no credentials of a store."""
    kept = {name: value for name, value in os.environ.items() if name not in AWS}
    return {**kept, "KUBECONFIG": os.fspath(world.control_plane.kubeconfig), "COLUMNS": "200"}


@pytest.fixture
def sae_job(world: World, environment: dict[str, str], tmp_path: Path) -> Run:
    def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, command, "-n", world.namespace, *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": PATHS},
        )

    return run


def tell(world: World, name: str, phase: str, *, ready: str = "False", stalled: str = "False", **status: Any) -> None:
    """Writes a status as the operator would."""
    path = f"/apis/sae-operator.dev/v1alpha1/namespaces/{world.namespace}/saetrainingjobs/{name}/status"
    generation = world.get("SAETrainingJob", name)["metadata"]["generation"]  # type: ignore[index]
    told = [
        {"type": kind, "status": truth, "reason": phase, "message": f"it is {phase}"}
        for kind, truth in (("Ready", ready), ("Stalled", stalled))
    ]
    body = {"status": {"phase": phase, "observedGeneration": generation, "conditions": told, **status}}
    world._call("PATCH", path, body, "application/merge-patch+json")


class TestGet:
    def test_resources_are_listed_with_where_they_stand(self, world: World, sae_job: Run) -> None:
        assert sae_job("get").stdout == f"no resources in namespace {world.namespace}\n"
        world.create("SAETrainingJob", "one", training_spec())
        tell(world, "one", "Running", progress={"percent": 42, "tokensPerSecond": 12345})
        done = sae_job("get")
        assert done.returncode == 0, done.stderr
        title, heading, row = done.stdout.splitlines()
        assert title.strip() == "SAETrainingJob"
        assert heading.split() == ["Name", "Phase", "Progress%", "Tokens/s", "EV", "L0", "Age", "Message"]
        assert row.split()[:4] == ["one", "Running", "42", "12,345"]
        assert "it is Running" in row
        (told,) = json.loads(sae_job("get", "saejob/one", "-o", "json").stdout)
        assert told["spec"] == world.get("SAETrainingJob", "one")["spec"]  # type: ignore[index]
        assert world.namespace in sae_job("get", "saejobs", "-A").stdout

    def test_a_name_that_is_none_is_one_line_and_exit_code_2(self, world: World, sae_job: Run) -> None:
        done = sae_job("get", "nothing")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            "sae-job: there is no ActivationCache or SAETrainingJob or SAESweep named 'nothing' in namespace"
            f" {world.namespace}; see `sae-job get`\n"
        )

    def test_a_cluster_that_does_not_answer_is_one_line_and_exit_code_1(
        self, world: World, environment: dict[str, str], sae_job: Run, tmp_path: Path
    ) -> None:
        broken = tmp_path / "kubeconfig"
        text = world.control_plane.kubeconfig.read_text()
        broken.write_text(text.replace(world.control_plane.server, "https://127.0.0.1:1"))
        done = sae_job("get", "--kubeconfig", os.fspath(broken))
        assert done.returncode == 1
        assert "the API server does not answer" in done.stderr
        assert "Traceback" not in done.stderr


class TestWatch:
    @pytest.fixture
    def watching(self, world: World, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
        """`sae-job watch one`, whose first line has been seen."""
        world.create("SAETrainingJob", "one", training_spec())
        tell(world, "one", "Preflight")
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM, "watch", "one", "-n", world.namespace],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": PATHS},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "saetrainingjob/one  Preflight  it is Preflight\n"
        yield process
        process.kill()
        process.communicate()

    @pytest.mark.parametrize(
        ("phase", "ready", "stalled", "code"), [("Succeeded", "True", "False", 0), ("Failed", "False", "True", 1)]
    )
    def test_it_tells_each_phase_and_ends_with_the_resource(
        self, world: World, watching: subprocess.Popen[str], phase: str, ready: str, stalled: str, code: int
    ) -> None:
        tell(world, "one", "Running")
        assert watching.stdout is not None
        assert watching.stdout.readline() == "saetrainingjob/one  Running  it is Running\n"
        tell(world, "one", phase, ready=ready, stalled=stalled)
        out, err = watching.communicate(timeout=SECONDS)
        assert (watching.returncode, out) == (code, f"saetrainingjob/one  {phase}  it is {phase}\n"), err

    def test_a_deleted_resource_is_told(self, world: World, watching: subprocess.Popen[str]) -> None:
        world.delete("SAETrainingJob", "one")
        _, err = watching.communicate(timeout=SECONDS)
        assert (watching.returncode, err) == (1, "saetrainingjob/one was deleted\n")

    def test_a_time_that_is_over_is_told(self, world: World, sae_job: Run) -> None:
        world.create("SAETrainingJob", "one", training_spec())
        done = sae_job("watch", "one", "--timeout", "1")
        assert (done.returncode, done.stderr) == (124, "saetrainingjob/one has not ended yet\n")


@pytest.fixture
def stored(world: World, object_server: ObjectServer) -> World:
    """A finished job `one` whose results lie in S3, opened by Secret `s3` of the namespace, which its defaults name."""
    bucket = object_server.create_bucket(f"b-{world.namespace}")
    client = object_server.client()
    for key, text in {
        "one/report.html": "<html>",
        "one/results.json": "{}",
        "one/log.txt": "first\nsecond\n",
        "one/k2/cfg.json": "{}",
        "one/k4/cfg.json": "{ }",
        "one/checkpoints/5/state": "large",
    }.items():
        client.put_object(Bucket=bucket, Key=key, Body=text.encode())
    world.control_plane.apply(
        [
            object_server.secret(world.namespace),
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "sae-operator-defaults", "namespace": world.namespace},
                "data": {"endpointUrl": object_server.endpoint, "region": object_server.region, "secretName": "s3"},
            },
        ]
    )
    world.create("SAETrainingJob", "one", training_spec(output={"uri": f"s3://{bucket}/one"}))
    saes = [{"name": "k2", "phase": "Succeeded", "explainedVariance": 0.81}]
    tell(world, "one", "Succeeded", ready="True", saes=saes)
    return world


class TestResults:
    def test_results_are_pulled_with_the_secret_of_the_namespace(
        self, stored: World, sae_job: Run, tmp_path: Path
    ) -> None:
        done = sae_job("pull", "one", "here")
        assert done.returncode == 0, done.stderr
        assert "opens s3://" in done.stderr
        files = {os.fspath(path.relative_to(tmp_path / "here")) for path in (tmp_path / "here").rglob("*.*")}
        assert files == {"report.html", "results.json", "log.txt", "k2/cfg.json", "k4/cfg.json"}
        assert "5 files" in done.stdout
        secret = stored.control_plane.get("secret", "s3", "-n", stored.namespace)["data"]
        for value in secret.values():
            assert base64.b64decode(value).decode() not in done.stdout + done.stderr

    def test_one_sae_may_be_asked_for_and_another_is_refused_by_name(
        self, stored: World, sae_job: Run, tmp_path: Path
    ) -> None:
        assert sae_job("pull", "one", "here", "--sae", "k4").returncode == 0
        assert [path.parent.name for path in (tmp_path / "here").rglob("*.json")] == ["k4"]
        done = sae_job("pull", "one", "--sae", "k8")
        assert done.returncode == 2
        assert "has no SAE named 'k8' in the store; there are k2, k4" in done.stderr

    def test_the_report_is_copied_and_its_figures_shown(self, stored: World, sae_job: Run, tmp_path: Path) -> None:
        done = sae_job("report", "one", "-o", "one.html")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "one.html").read_text() == "<html>"
        assert "0.8100" in done.stdout

    def test_logs_of_a_job_without_pods_come_from_the_store(self, stored: World, sae_job: Run) -> None:
        done = sae_job("logs", "one", "--tail", "1")
        assert (done.returncode, done.stdout) == (0, "second\n"), done.stderr
        assert "the pods are gone" in done.stderr

    def test_a_job_without_results_says_where_it_stands(self, stored: World, sae_job: Run) -> None:
        stored.create("SAETrainingJob", "two", training_spec(output={"uri": f"s3://b-{stored.namespace}/two"}))
        tell(stored, "two", "Queued")
        done = sae_job("report", "two")
        assert done.returncode == 2
        assert "has no report yet: it is Queued" in done.stderr


def test_logs_of_a_pod_that_runs(world: World, sae_job: Run, node: Any) -> None:
    """A pod of a real node; what it prints is what is shown."""
    job = world.create("SAETrainingJob", "one", training_spec())
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "one-train",
            "namespace": world.namespace,
            "labels": {"sae-operator.dev/uid": job["metadata"]["uid"], "sae-operator.dev/step": "train"},
        },
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "step",
                    "image": "sae-operator/job:test",
                    "command": ["sae-job", "--version"],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                }
            ],
        },
    }
    world.control_plane.apply(pod)
    path = f"/api/v1/namespaces/{world.namespace}/pods/one-train"

    def ended() -> bool:
        phase = json.loads(world.control_plane.request("GET", path)[1]).get("status", {}).get("phase")
        return phase in ("Succeeded", "Failed")

    wait_for(ended, SECONDS, what="the pod's end")
    done = sae_job("logs", "one")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sae-job ")
    assert done.stderr == "pod one-train\n"
    assert sae_job("logs", "one", "--step", "preflight").returncode == 2

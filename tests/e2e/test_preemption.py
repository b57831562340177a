"""A pre-emption by the real Kueue of a training that really runs: its pod checkpoints and ends, and goes on later."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.lives import Life, user_namespace
from tests.operator_process import OperatorProcess, run_operator
from tests.queueing import GPU, HIGH, LOW, OPERATOR, QUEUE, install_operator, queue_manifests
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import POD_DATA
from tests.testbed.kueue import Kueue
from tests.testbed.node import Node
from tests.testbed.object_server import ObjectServer

BUCKET = "preemption"
SECONDS = 400
SECRET = {"secretRef": {"name": "s3"}}
# More than the test has time for.
ENDLESS = 500_000_000


@pytest.fixture(scope="module")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster of its own: Kueue's webhooks would be in other tests' way."""
    with ControlPlane(tmp_path_factory.mktemp("preemption-control-plane")) as started:
        install_operator(started)
        yield started


@pytest.fixture(scope="module")
def kueue(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kueue]:
    with Kueue(control_plane, tmp_path_factory.mktemp("kueue")) as running:
        yield running


@pytest.fixture(scope="module")
def operator(
    control_plane: ControlPlane, kueue: Kueue, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    """The operator with the rights that its roles give, and a node with one GPU."""
    kubeconfig = control_plane.kubeconfig_for_service_account(OPERATOR, OPERATOR)
    with Node(control_plane, tmp_path_factory.mktemp("node"), gpus=1), run_operator(kubeconfig) as process:
        yield process


def training(name: str, priority: str, tokens: int) -> dict[str, Any]:
    cache = {
        "model": {"name": f"{POD_DATA}/tiny-model", "dtype": "float32"},
        "dataset": {"path": f"{POD_DATA}/tiny-text"},
        "hooks": [{"name": "model.layers.1"}],
        "contextSize": 16,
        "tokens": 2000,
        "storage": {"uri": f"s3://{BUCKET}/caches", "dtype": "float32", **SECRET},
    }
    spec = {
        "activations": {"cache": cache},
        "saes": [{"name": "topk", "architecture": {"type": "topk", "k": 4}, "dSae": 64}],
        "training": {"tokens": tokens, "batchSize": 128, "logEverySteps": 100},
        "checkpoints": {"everySeconds": 2},
        "output": {"uri": f"s3://{BUCKET}/{name}", **SECRET},
        "run": {
            "queueName": QUEUE,
            "priorityClassName": priority,
            "resources": {"limits": {GPU: 1}},
            "backoffLimit": 0,
            "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        },
    }
    kind = {"apiVersion": "sae-operator.dev/v1alpha1", "kind": "SAETrainingJob"}
    return {**kind, "metadata": {"name": name}, "spec": spec}


def tokens_of(state: dict[str, Any], of: str) -> int:
    return (state["status"].get(of) or {}).get("tokens") or 0


def test_a_training_that_was_taken_back_goes_on_from_its_checkpoint(
    control_plane: ControlPlane,
    object_server: ObjectServer,
    operator: OperatorProcess,
    tiny_model_dir: Path,
    tiny_text_dir: Path,
) -> None:
    object_server.create_bucket(BUCKET)
    with user_namespace(control_plane, object_server) as namespace:
        control_plane.apply(queue_manifests(namespace, gpus=1, preempts=True))

        def start(name: str, priority: str, tokens: int) -> Life:
            manifest = json.dumps(training(name, priority, tokens))
            control_plane.kubectl("apply", "--namespace", namespace, "-f", "-", input=manifest)
            return Life(control_plane, namespace, "saetrainingjobs", name)

        low = start("low", LOW, ENDLESS)
        low.wait("a checkpoint", lambda state: tokens_of(state, "checkpoint") > 0, SECONDS)
        high = start("high", HIGH, 1000)
        low.wait_for_phase("Queued", "Failed", seconds=SECONDS)

        def ended(state: dict[str, Any]) -> bool:
            low.look()
            return Life.phase_of(state) in ("Succeeded", "Failed")

        done = high.wait("its end", ended, SECONDS)
        assert Life.phase_of(done) == "Succeeded", done["status"]
        # While it waited: by now it may run again, and have told of a later checkpoint.
        before = max(tokens_of(state, "checkpoint") for state in low.states if Life.phase_of(state) == "Queued")
        assert before > 0
        resumed = low.wait(
            "to run again",
            lambda state: Life.phase_of(state) == "Running" and tokens_of(state, "checkpoint") > before,
            SECONDS,
        )
        (job,) = low.jobs("train")
        assert (resumed["status"]["attempt"], job["status"].get("failed", 0)) == (1, 0)
        assert "Failed" not in low.phases
        assert low.phases[low.phases.index("Running") :] == ["Running", "Queued", "Running"]
        pods = f"batch.kubernetes.io/job-name={job['metadata']['name']}"
        log = control_plane.kubectl("logs", "--namespace", namespace, "--selector", pods, "--tail=-1")
        told = re.search(r"continuing from the checkpoint of (\d+) tokens", log)
        assert told is not None, log
        assert int(told[1]) >= before

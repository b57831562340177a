"""How long a researcher waits: from `kubectl apply` of a training job on a ready cache to its first training step.

    python bench/first_step.py [--quick]

Everything is real: API server, scheduler, S3 server, a node whose pods run the steps, the operator with its default
settings, and the example of the test bed, whose cache (SmolLM2-135M) is made first. The image is on the node. Between
apply and the first step lie the operator's two Jobs (preflight and train), two pods' starts with all imports, and the
checks of the output and the cache. Prints one line of JSON last:

    apply_to_first_step_s      median, until the training pod answers that tokens have been trained on
    preflight_s, training_pod_s, first_step_s
                               medians of its parts: until the train Job is there, its pod runs, that answer
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sae_operator.api.steps import PROGRESS_PORT
from tests.e2e.lives import Life, user_namespace
from tests.operator_process import run_operator
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import ensure_english_text, ensure_small_model
from tests.testbed.node import Node
from tests.testbed.object_server import ObjectServer
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

BUCKET = "saes"
RUNS = 5
SECONDS = 600.0
LOOK_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run")
    runs = 1 if parser.parse_args().quick else RUNS
    ensure_small_model()
    ensure_english_text()
    with ExitStack() as parts:
        folder = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="first-step-")))
        control_plane = parts.enter_context(ControlPlane(folder / "control-plane"))
        object_server = parts.enter_context(ObjectServer(folder / "object-server"))
        parts.enter_context(Node(control_plane, folder / "node"))
        control_plane.kubectl("apply", "--server-side", "-f", CHECKOUT / "manifests" / "crds")
        object_server.create_bucket(BUCKET)
        namespace = parts.enter_context(user_namespace(control_plane, object_server))
        parts.enter_context(
            run_operator(control_plane.kubeconfig, namespace=namespace, poll_seconds=5.0, progress_seconds=10.0)
        )
        first = apply(control_plane, namespace, "first")
        state = first.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
        if Life.phase_of(state) != "Succeeded":
            raise SystemExit(f"the first job failed: {json.dumps(state['status'])}")
        found = [one_run(control_plane, namespace, f"run-{number}") for number in range(runs)]
    for parts_of_run in found:
        print({name: round(value, 2) for name, value in parts_of_run.items()})
    print(json.dumps({name: round(statistics.median(run[name] for run in found), 2) for name in found[0]}))


def apply(control_plane: ControlPlane, namespace: str, name: str) -> Life:
    """The example under another name and output; its cache is the same for all."""
    manifest: dict[str, Any] = YAML(typ="safe").load((CHECKOUT / "examples" / "testbed" / "sae-job.yaml").read_text())
    manifest["metadata"]["name"] = name
    manifest["spec"]["output"]["uri"] = f"s3://{BUCKET}/{name}"
    control_plane.kubectl("--namespace", namespace, "apply", "-f", "-", input=json.dumps(manifest))
    return Life(control_plane, namespace, "saetrainingjobs", name)


def one_run(control_plane: ControlPlane, namespace: str, name: str) -> dict[str, float]:
    """Seconds from before the apply to the first step, and its parts."""
    begun = time.perf_counter()
    life = apply(control_plane, namespace, name)
    uid = life.look()["metadata"]["uid"]
    selector = f"labelSelector=sae-operator.dev/uid%3D{uid},sae-operator.dev/step%3Dtrain"

    def listed(path: str) -> list[dict[str, Any]]:
        code, body = control_plane.request("GET", f"{path}?{selector}")
        if code != 200:
            raise RuntimeError(f"GET {path}: {code}")
        return json.loads(body)["items"]

    def runs() -> str | None:
        pods = [pod for pod in listed(f"/api/v1/namespaces/{namespace}/pods") if pod["status"]["phase"] == "Running"]
        return pods[0]["status"].get("podIP") if pods else None

    def trains() -> bool:
        try:
            with urllib.request.urlopen(f"http://{address}:{PROGRESS_PORT}/progress", timeout=5) as answer:
                return json.load(answer)["tokens"] > 0
        except OSError:
            return False

    def waited(condition: Any, what: str) -> Any:
        return wait_for(condition, 120.0, what=what, interval=LOOK_SECONDS)

    waited(lambda: listed(f"/apis/batch/v1/namespaces/{namespace}/jobs"), "the Job of step train")
    preflight = time.perf_counter()
    address = waited(runs, "its pod runs")
    running = time.perf_counter()
    waited(trains, "its first step")
    trained = time.perf_counter()
    state = life.wait_for_phase("Succeeded", "Failed", seconds=SECONDS)
    if Life.phase_of(state) != "Succeeded":
        raise RuntimeError(json.dumps(state["status"]))
    return {
        "apply_to_first_step_s": trained - begun,
        "preflight_s": preflight - begun,
        "training_pod_s": running - preflight,
        "first_step_s": trained - running,
    }


if __name__ == "__main__":
    main()

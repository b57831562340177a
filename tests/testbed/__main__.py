"""`python -m tests.testbed build`: build the programs. `python -m tests.testbed up [--operator]`: start all of it.

`up` leaves a cluster running with everything that `examples/testbed/sae-job.yaml` needs, until Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from ruamel.yaml import YAML

from tests.testbed.binaries import ALL_TOOLS, ensure_built, kube_program
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import ensure_english_text, ensure_small_model, ensure_tiny_model, ensure_tiny_text
from tests.testbed.node import JOB_IMAGE, Node
from tests.testbed.object_server import ObjectServer
from tests.testbed.paths import CHECKOUT
from tests.testbed.processes import ChildProcess
from tests.testbed.waiting import wait_for

NAMESPACE = "research"
BUCKET = "saes"
OPERATOR_NAMESPACE = "sae-operator"
OPERATOR_ACCOUNT = "sae-operator"
_CHECK_SECONDS = 0.5


def build() -> None:
    """Build and make everything that is kept in the cache folder."""
    for tool in ALL_TOOLS:
        print(ensure_built(tool))
    for ensure in (ensure_english_text, ensure_tiny_model, ensure_tiny_text, ensure_small_model):
        print(ensure())


def up(*, nodes: int, with_operator: bool) -> None:
    """Start everything, tell how to use it, and run until a signal or until a part ends."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    build()
    with ExitStack() as parts:
        directory = Path(parts.enter_context(tempfile.TemporaryDirectory(prefix="sae-operator-testbed-")))
        control_plane = parts.enter_context(ControlPlane(directory / "control-plane"))
        object_server = parts.enter_context(ObjectServer(directory / "object-server"))
        for number in range(nodes):
            parts.enter_context(Node(control_plane, directory / f"node-{number}", name=f"node-{number}"))
        install(control_plane, object_server)
        kubeconfig = control_plane.kubeconfig_for("researcher", "admin", ["system:masters"], namespace=NAMESPACE)
        operator = parts.enter_context(run_operator(control_plane, directory)) if with_operator else None
        print(instructions(kubeconfig, object_server, directory, operator), flush=True)
        while not stopping.wait(_CHECK_SECONDS):
            if operator is not None:
                operator.ensure_running()
        print("test bed: stopping", flush=True)


def install(control_plane: ControlPlane, object_server: ObjectServer) -> None:
    """Custom resources, and a namespace with credentials and defaults for the S3 server."""
    crds = control_plane.kubectl("apply", "--server-side", "-f", CHECKOUT / "manifests" / "crds", "-o", "name").split()
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", *crds)
    object_server.create_bucket(BUCKET)
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    control_plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    account = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default"
    wait_for(lambda: control_plane.request("GET", account)[0] == 200, what=f"the service account of {NAMESPACE}")
    defaults = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"namespace": NAMESPACE, "name": "sae-operator-defaults"},
        "data": {"endpointUrl": object_server.endpoint, "region": object_server.region},
    }
    control_plane.apply([object_server.secret(NAMESPACE), defaults])


@contextmanager
def run_operator(control_plane: ControlPlane, directory: Path) -> Iterator[ChildProcess]:
    """The operator as a process of this machine, with the rights of its ServiceAccount in a cluster."""
    rendered = YAML(typ="safe").load_all(control_plane.kubectl("kustomize", CHECKOUT / "manifests"))
    control_plane.apply([one for one in rendered if one["kind"] not in ("CustomResourceDefinition", "Deployment")])
    kubeconfig = control_plane.kubeconfig_for_service_account(OPERATOR_NAMESPACE, OPERATOR_ACCOUNT)
    program = Path(sys.executable).with_name("sae-operator")
    command = [program, "--job-image", JOB_IMAGE, "--kubeconfig", kubeconfig]
    command += ["--lease-namespace", OPERATOR_NAMESPACE, "--poll-seconds", "1", "--progress-seconds", "2"]
    child = ChildProcess("sae-operator", command, log=directory / "operator.log", environment=dict(os.environ))
    try:
        yield child
    finally:
        child.stop()


def instructions(kubeconfig: Path, object_server: ObjectServer, directory: Path, operator: ChildProcess | None) -> str:
    secrets = {"AWS_ACCESS_KEY_ID": object_server.access_key, "AWS_SECRET_ACCESS_KEY": object_server.secret_key}
    lines = [
        "",
        "The test bed runs; Ctrl-C ends it. In another terminal:",
        "",
        f"  export KUBECONFIG={kubeconfig} PATH={kube_program('kubectl').parent}:$PATH",
        f"  kubectl apply -f {CHECKOUT / 'examples' / 'testbed' / 'sae-job.yaml'}",
        "  kubectl get saejob,activationcache,job,pod",
        "  kubectl explain saetrainingjob.spec.activations",
        "",
        f"Namespace {NAMESPACE}: Secret s3 and ConfigMap sae-operator-defaults point to the S3 server:",
        f"  {object_server.endpoint}, bucket {BUCKET}, {json.dumps(secrets)}",
        f"Logs: {directory}" + (f"; operator: {operator.log}" if operator else "; no operator runs (--operator)"),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.testbed", description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="build the programs, once per machine")
    up_parser = commands.add_parser("up", help="start control plane, S3 server and node, and run until Ctrl-C")
    up_parser.add_argument("--operator", action="store_true", help="run the operator as well")
    up_parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes to start (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.command == "build":
        build()
    else:
        up(nodes=arguments.nodes, with_operator=arguments.operator)


if __name__ == "__main__":
    main()

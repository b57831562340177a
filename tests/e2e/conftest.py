"""The operator as it is installed: with the permissions of `manifests/operator`, and pods that really run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.operator_process import OperatorProcess, run_operator
from tests.testbed.control_plane import ControlPlane
from tests.testbed.node import Node
from tests.testbed.paths import CHECKOUT

NAMESPACE = "sae-operator"
# What `kubectl apply -k manifests` applies, but for the Deployment: the operator runs as a process of the test.
PERMISSIONS = ("namespace", "service_account", "cluster_role")


@pytest.fixture(scope="module")
def operator(control_plane: ControlPlane, crds: list[str], node: Node) -> Iterator[OperatorProcess]:
    """An operator for all namespaces, as its own service account. It ends with the file: those of tests/cluster,
    which may come next in the same process, each have an operator of their own."""
    # Else it would run what earlier tests of the same process have left.
    control_plane.kubectl("delete", ",".join(crds), "--all", "--all-namespaces", "--timeout=120s")
    folder = CHECKOUT / "manifests" / "operator"
    for name in PERMISSIONS:
        control_plane.kubectl("apply", "--namespace", NAMESPACE, "-f", str(folder / f"{name}.yaml"))
    kubeconfig = control_plane.kubeconfig_for_service_account(NAMESPACE, "sae-operator")
    with run_operator(kubeconfig) as process:
        yield process

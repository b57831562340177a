"""The operator against a real API server: a node without processes, a namespace, and an operator that serves it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fake_kubelet import FakeKubelet
from tests.operator_process import OperatorProcess, start_operator
from tests.operator_world import World
from tests.testbed.control_plane import ControlPlane


@pytest.fixture(scope="module")
def kubelet(control_plane: ControlPlane) -> Iterator[FakeKubelet]:
    with FakeKubelet(control_plane) as running:
        yield running


@pytest.fixture
def world(control_plane: ControlPlane, crds: list[str], namespace: str, kubelet: FakeKubelet) -> World:
    return World(control_plane, namespace)


@pytest.fixture
def operator(world: World) -> Iterator[OperatorProcess]:
    process = start_operator(world.control_plane.kubeconfig, namespace=world.namespace)
    yield process
    if process.exit_code is None:
        assert process.stop() == 0, process.tail()

"""Fixtures that tests share: a real control plane, S3 server, node, helm, and the small real model with its text.

Nothing here starts before a test asks for it, and nothing is skipped: what cannot be had is an error.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from _pytest.capture import CaptureManager
from hypothesis import settings

from tests.testbed.binaries import HELM, KUBE, KUEUE, VERSITYGW, ensure_built
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import ensure_english_text, ensure_small_model, ensure_tiny_model, ensure_tiny_text
from tests.testbed.node import Node
from tests.testbed.object_server import ObjectServer
from tests.testbed.paths import CHECKOUT
from tests.testbed.waiting import wait_for

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# What a fixture needs built. A cold build takes minutes: more than a test may take.
BUILDS: dict[str, Callable[[], Path]] = {
    "control_plane": partial(ensure_built, KUBE),
    "object_server": partial(ensure_built, VERSITYGW),
    "helm": partial(ensure_built, HELM),
    "kueue": partial(ensure_built, KUEUE),
    "small_model_dir": ensure_small_model,
    "english_text_dir": ensure_english_text,
    "tiny_model_dir": ensure_tiny_model,
    "tiny_text_dir": ensure_tiny_text,
}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the collected tests need before any of them runs, where progress is seen and no time limit applies."""
    if session.config.option.collectonly:
        return
    asked = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    capture = session.config.pluginmanager.getplugin("capturemanager")
    assert isinstance(capture, CaptureManager)
    with capture.global_and_fixture_disabled():
        for fixture, ensure in BUILDS.items():
            if fixture in asked:
                ensure()


@pytest.fixture(scope="session")
def control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A cluster without nodes, for the whole session: see `ControlPlane` for `kubectl`, `get`, `apply`, `request`."""
    with ControlPlane(tmp_path_factory.mktemp("control-plane")) as started:
        yield started


@pytest.fixture(scope="session")
def crds(control_plane: ControlPlane) -> list[str]:
    """The product's custom resources are served; the names of their definitions."""
    folder = CHECKOUT / "manifests" / "crds"
    files = sorted(path for path in folder.glob("*.yaml") if path.name != "kustomization.yaml")
    assert files, f"no CRDs in {folder}"
    arguments = [argument for path in files for argument in ("-f", os.fspath(path))]
    applied = control_plane.kubectl("apply", "--server-side", *arguments, "-o", "name").split()
    control_plane.kubectl("wait", "--for=condition=Established", "--timeout=120s", *applied)
    names = [name.split("/", 1)[1] for name in applied]
    # The storage of a new kind answers 429 for a moment, which kubectl waits out.
    control_plane.kubectl("get", ",".join(names), "--all-namespaces")
    return names


@pytest.fixture
def namespace(control_plane: ControlPlane) -> Iterator[str]:
    """A fresh namespace that enforces PodSecurity `restricted`; after the test it is deleted, not waited for."""
    name = f"test-{uuid.uuid4().hex[:10]}"
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    control_plane.kubectl("create", "-f", "-", input=json.dumps(manifest))
    account = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    wait_for(lambda: control_plane.request("GET", account)[0] == 200, what=f"the service account of {name}")
    yield name
    control_plane.request("DELETE", f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """An S3 server for the whole session; make a bucket of your own with `create_bucket`."""
    with ObjectServer(tmp_path_factory.mktemp("object-server")) as started:
        yield started


@pytest.fixture(scope="session")
def helm() -> Path:
    """Path of the helm program."""
    return ensure_built(HELM)


@pytest.fixture(scope="session")
def node(control_plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with 8 GPUs for the whole session; image `sae-operator/job:test` is this checkout with its environment."""
    with Node(control_plane, tmp_path_factory.mktemp("node")) as started:
        yield started


@pytest.fixture(scope="session")
def small_model_dir() -> Path:
    """SmolLM2-135M, which `from_pretrained` loads; pods see it as `/opt/sae-operator-testbed/smollm2-135m`."""
    return ensure_small_model()


@pytest.fixture(scope="session")
def english_text_dir() -> Path:
    """English text as JSON lines; pods see it as `/opt/sae-operator-testbed/english-text`."""
    return ensure_english_text()


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """A tiny random model and its tokenizer; pods see it as `/opt/sae-operator-testbed/tiny-model`."""
    return ensure_tiny_model()


@pytest.fixture(scope="session")
def tiny_text_dir() -> Path:
    """Tiny text as JSON lines; pods see it as `/opt/sae-operator-testbed/tiny-text`."""
    return ensure_tiny_text()

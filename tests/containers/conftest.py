"""Both images, built here, on a node with a real kubelet; what is missing for that is told before any test runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.capture import CaptureManager

from tests.testbed.binaries import KUBELET, PAUSE, ensure_built
from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import POD_DATA, ensure_english_text, ensure_small_model
from tests.testbed.images import (
    JOB_IMAGE,
    OPERATOR_IMAGE,
    Image,
    ensure_archive,
    ensure_base_image,
    ensure_image,
    ensure_image_with,
)
from tests.testbed.kubelet import KubeletNode, require_node_programs

# The job image with a model and a text, as people make one whose pods see no model hub.
MODEL_IMAGE = "localhost/sae-operator/job-with-model:test"

# What was built before the first test: the base, the operator's, the jobs', and that with the model.
IMAGES = pytest.StashKey[list[Image]]()

RunHelm = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Say what this machine lacks, and build, where no time limit applies and progress is seen."""
    if session.config.option.collectonly:
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    assert isinstance(capture, CaptureManager)
    with capture.global_and_fixture_disabled():
        try:
            require_node_programs()
            for tool in (PAUSE, KUBELET):
                ensure_built(tool)
            session.config.stash[IMAGES] = images = []
            for image in _build_all():
                images.append(image)
                print(f"image {image.name}: built or found in {image.seconds:.0f} s", flush=True)
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from error


def _build_all() -> Iterator[Image]:
    yield ensure_base_image()
    yield ensure_image("operator", OPERATOR_IMAGE)
    yield ensure_image("job", JOB_IMAGE)
    yield _model_image()


def _model_image() -> Image:
    folders = {f"{POD_DATA}/{folder.name}": folder for folder in (ensure_small_model(), ensure_english_text())}
    return ensure_image_with(JOB_IMAGE, MODEL_IMAGE, folders)


@pytest.fixture(scope="session")
def machine(control_plane: ControlPlane, request: pytest.FixtureRequest) -> Iterator[KubeletNode]:
    """A node whose pods are containers of both images; it offers 4 GPUs, which nothing here touches."""
    with KubeletNode(control_plane, gpus=4) as node:
        _, operator, _, with_model = request.config.stash[IMAGES]
        for image in (operator, with_model):
            size = ensure_archive(image).stat().st_size
            print(f"loaded {image.name}, {size / 1e6:.0f} MB unpacked, in {node.load(image):.0f} s")
        yield node


@pytest.fixture(scope="session")
def run_helm(control_plane: ControlPlane, helm: Path) -> RunHelm:
    """Run helm as cluster administrator; the caller looks at the exit code."""

    def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [str(helm), f"--kubeconfig={control_plane.kubeconfig}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout)

    return run

"""The chart's test: a pod that a `restricted` namespace accepts, and that nothing of the operator takes for its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.testbed.control_plane import ControlPlane
from tests.testbed.paths import CHECKOUT

CHART = CHECKOUT / "helm" / "sae-operator"
TEMPLATE = "templates/tests/doctor.yaml"
VALUES = (
    "doctor.store=s3://saes/doctor",
    "doctor.endpointUrl=https://s3.example.org",
    "doctor.secretName=team-s3",
    "doctor.gpus=2",
    "doctor.nodeSelector.pool=gpu",
)


def render(helm: Path, *values: str) -> subprocess.CompletedProcess[str]:
    options = [argument for value in values for argument in ("--set", value)]
    command = [os.fspath(helm), "template", "sae-operator", os.fspath(CHART), "--kube-version=1.35.4", *options]
    return subprocess.run([*command, "--show-only", TEMPLATE], capture_output=True, text=True, timeout=60)


@pytest.fixture
def pod(helm: Path) -> dict[str, Any]:
    done = render(helm, *VALUES)
    assert done.returncode == 0, done.stderr
    return YAML(typ="safe").load(done.stdout)


def test_a_restricted_namespace_accepts_it(pod: dict[str, Any], control_plane: ControlPlane, namespace: str) -> None:
    pod["metadata"]["namespace"] = namespace
    path = f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict"
    status, body = control_plane.request("POST", path, pod)
    assert status == 201, body


def test_it_asks_for_what_the_values_say(pod: dict[str, Any]) -> None:
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    (container,) = pod["spec"]["containers"]
    assert container["args"] == [
        "doctor",
        "--store=s3://saes/doctor",
        "--endpoint-url=https://s3.example.org",
        "--secret=/run/sae-job/secrets/team-s3",
        "--gpus=2",
    ]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert {"name": "secret", "secret": {"secretName": "team-s3"}} in pod["spec"]["volumes"]
    assert pod["spec"]["nodeSelector"] == {"pool": "gpu"}
    assert pod["spec"]["automountServiceAccountToken"] is False


def test_the_operators_selector_does_not_take_it(pod: dict[str, Any]) -> None:
    operators = {"app.kubernetes.io/name": "sae-operator", "app.kubernetes.io/instance": "sae-operator"}
    assert not operators.items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize(
    ("value", "words"), [("doctor.store=nowhere", "/doctor/store"), ("doctor.gpus=-1", "/doctor/gpus")]
)
def test_wrong_values_are_refused(helm: Path, value: str, words: str) -> None:
    done = render(helm, value)
    assert done.returncode != 0
    assert words in done.stderr


def test_it_can_be_left_out(helm: Path) -> None:
    done = render(helm, "doctor.enabled=false")
    assert "could not find template" in done.stderr

"""What is in the images, seen from a container of each."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.containers.conftest import MODEL_IMAGE
from tests.testbed.control_plane import ControlPlane
from tests.testbed.images import OPERATOR_IMAGE, pip_settings
from tests.testbed.kubelet import KubeletNode
from tests.testbed.manifests import pod, restricted_pod
from tests.testbed.waiting import wait_for

LOOK = """
import importlib.util, json, os, pathlib, shutil
def writable(folder):
    try:
        open(os.path.join(folder, ".probe"), "w").close()
    except OSError as error:
        return error.strerror
    return "written"
print(json.dumps({
    "uid": os.getuid(),
    "groups": os.getgroups(),
    "programs": [name for name in ("pip", "pip3", "gcc", "cc", "wget", "curl") if shutil.which(name)],
    "modules": [name for name in ("pip", "torch", "kopf", "boto3", "kubernetes") if importlib.util.find_spec(name)],
    "left": [str(one) for place in ("/mnt", "/srv", "/src", "/package", "/run/secrets", "/etc/pip.conf")
             if os.path.exists(place) for one in [place, *pathlib.Path(place).glob("*")]],
    "root": writable("/"),
    "environment": dict(os.environ),
    "bytecode": any(pathlib.Path(importlib.util.find_spec("sae_operator").origin).parent.glob("__pycache__/*.pyc")),
    "confined": [line for line in open("/proc/self/status") if line.startswith(("CapEff", "NoNewPrivs", "Seccomp:"))],
}))
"""


def look(control_plane: ControlPlane, namespace: str, image: str) -> dict[str, Any]:
    name = "look"
    control_plane.apply(pod(namespace, name, restricted_pod("python3", "-c", LOOK, image=image)))

    def phase() -> str:
        return control_plane.get("pod", name, "-n", namespace)["status"]["phase"]

    wait_for(lambda: phase() in ("Succeeded", "Failed"), 60, what=f"a container of {image} has ended")
    text = control_plane.kubectl("logs", name, "-n", namespace)
    assert phase() == "Succeeded", text
    return json.loads(text)


@pytest.mark.parametrize(
    ("image", "modules"),
    [(OPERATOR_IMAGE, ["kopf"]), (MODEL_IMAGE, ["torch", "kopf", "boto3"])],
    ids=["operator", "job"],
)
def test_an_image_holds_what_it_needs_and_nothing_of_its_build(
    machine: KubeletNode, control_plane: ControlPlane, namespace: str, image: str, modules: list[str]
) -> None:
    found = look(control_plane, namespace, image)
    assert found["uid"] == 65532
    assert found["modules"] == modules
    assert found["programs"] == []
    assert [one for one in found["left"] if one not in ("/mnt", "/srv", "/run/secrets")] == []
    assert found["root"] == "Read-only file system"
    assert found["bytecode"], "a read-only image must bring its byte code"
    assert [line.split() for line in found["confined"]] == [
        ["CapEff:", "0000000000000000"],
        ["NoNewPrivs:", "1"],
        ["Seccomp:", "2"],
    ]
    told = json.dumps(found["environment"])
    for name, value in pip_settings().items():
        if name in ("index-url", "extra-index-url", "find-links"):
            assert value not in told

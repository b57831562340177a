"""Nodes of the test bed, and the images that they know."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.testbed.control_plane import ControlPlane
from tests.testbed.data import POD_DATA, data_directory
from tests.testbed.node_agent.settings import Image, NodeSettings
from tests.testbed.paths import CHECKOUT
from tests.testbed.processes import ChildProcess
from tests.testbed.waiting import wait_for

JOB_IMAGE = "sae-operator/job:test"
OPERATOR_IMAGE = "sae-operator/operator:test"
IMAGE_USER = 65532
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def project_image() -> Image:
    """This checkout with its environment, as a container image would carry it."""
    environment = CHECKOUT / ".venv"
    # The environment's interpreter may be a link to one elsewhere, below a home folder for instance.
    interpreter = Path(os.path.realpath(environment / "bin" / "python")).parents[1]
    folders = {str(CHECKOUT): str(CHECKOUT), str(interpreter): str(interpreter), POD_DATA: str(data_directory())}
    return Image(
        environment={
            "PATH": f"{environment}/bin:{_SYSTEM_PATH}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
        user=IMAGE_USER,
        binds=folders,
    )


class Node:
    """One node of a control plane: a node agent, which runs the pods that the scheduler binds to it."""

    def __init__(
        self,
        control_plane: ControlPlane,
        directory: Path,
        *,
        name: str = "node-0",
        gpus: int = 8,
        cpus: int = 16,
        memory: str = "64Gi",
        labels: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self._control_plane = control_plane
        self._directory = directory.absolute()
        self._gpus, self._cpus, self._memory = gpus, cpus, memory
        self._labels = labels or {}
        self._child: ChildProcess | None = None

    def start(self) -> Node:
        """Start the agent and wait until the Node is Ready."""
        self._directory.mkdir(parents=True, exist_ok=True)
        user = f"system:node:{self.name}"
        authority = self._control_plane.authority
        serving = authority.issue(f"{self.name}-serving", user, ["system:nodes"], ["127.0.0.1", self.name])
        image = project_image()
        settings = NodeSettings(
            name=self.name,
            kubeconfig=str(self._control_plane.kubeconfig_for(self.name, user, ["system:nodes"])),
            directory=str(self._directory),
            serving_certificate=str(serving.certificate),
            serving_key=str(serving.key),
            client_authority=str(authority.certificate),
            images={JOB_IMAGE: image, OPERATOR_IMAGE: image},
            gpus=self._gpus,
            cpus=self._cpus,
            memory=self._memory,
            labels=self._labels,
        )
        child = ChildProcess(
            f"node agent {self.name}",
            [sys.executable, "-m", "tests.testbed.node_agent", settings.write(self._directory / "settings.json")],
            log=self._directory / "node-agent.log",
            directory=CHECKOUT,
        )
        self._child = child

        def is_ready() -> bool:
            child.ensure_running()
            status, body = self._control_plane.request("GET", f"/api/v1/nodes/{self.name}")
            if status != 200:
                return False
            node = json.loads(body)
            ready = any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"]["conditions"])
            # The scheduler binds nothing to the node before its taint for "not ready yet" is taken away.
            return ready and not node["spec"].get("taints")

        wait_for(is_ready, what=lambda: f"node {self.name} is Ready; its log ends:\n{child.log_tail()}")
        return self

    def kill(self) -> None:
        """End the agent and its containers at once, as a machine that loses power."""
        assert self._child is not None
        self._child.process.kill()
        self._child.process.wait()

    def stop(self) -> None:
        """End the agent and its containers, and remove the Node."""
        if self._child is not None:
            self._child.stop()
            self._child = None
            self._control_plane.request("DELETE", f"/api/v1/nodes/{self.name}")

    def log_tail(self) -> str:
        assert self._child is not None
        return self._child.log_tail()

    def __enter__(self) -> Node:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

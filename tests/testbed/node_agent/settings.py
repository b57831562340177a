"""What a node agent is told, as one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Image:
    """A container image: this machine's own root file system, seen with an environment and folders of its own."""

    environment: dict[str, str]
    user: int
    """User and group that run the container unless its pod says otherwise."""
    binds: dict[str, str] = field(default_factory=dict)
    """Folder in the container: folder of this machine that is seen there, read-only."""
    entrypoint: list[str] = field(default_factory=list)
    working_directory: str = "/"


@dataclass(frozen=True)
class NodeSettings:
    """One node: who it is, what it offers, and where it keeps its files. All paths are absolute."""

    name: str
    kubeconfig: str
    directory: str
    serving_certificate: str
    serving_key: str
    client_authority: str
    images: dict[str, Image]
    gpus: int = 0
    cpus: int = 16
    memory: str = "64Gi"
    labels: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self), indent=1))
        return path

    @staticmethod
    def read(path: Path) -> NodeSettings:
        content: dict[str, Any] = json.loads(path.read_text())
        images = {name: Image(**image) for name, image in content.pop("images").items()}
        return NodeSettings(images=images, **content)

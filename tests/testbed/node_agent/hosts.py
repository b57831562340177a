"""Names of pods that belong to a headless Service: what a cluster's DNS would tell, as one file at `/etc/hosts`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

_LOCAL = "127.0.0.1 localhost\n"


class Hosts:
    """Names and addresses of this node's pods with a hostname and a subdomain.

    The file is written in place: containers see it by a mount of this very file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._pods: dict[str, str] = {}
        path.write_text(_LOCAL)

    def add(self, pod: dict[str, Any], ip: str) -> None:
        """A pod has an address."""
        spec, metadata = pod["spec"], pod["metadata"]
        if "hostname" not in spec or "subdomain" not in spec:
            return
        name = f"{spec['hostname']}.{spec['subdomain']}"
        line = f"{ip} {name} {name}.{metadata['namespace']}.svc {spec['hostname']}\n"
        self._change(metadata["uid"], line)

    def remove(self, uid: str) -> None:
        """A pod has ended."""
        self._change(uid, None)

    def _change(self, uid: str, line: str | None) -> None:
        with self._lock:
            if line is None:
                self._pods.pop(uid, None)
            else:
                self._pods[uid] = line
            # Over what is there, and cut behind it: a container that reads an emptied file would find no name.
            with open(self.path, "r+b", buffering=0) as file:
                file.write((_LOCAL + "".join(self._pods.values())).encode())
                file.truncate()

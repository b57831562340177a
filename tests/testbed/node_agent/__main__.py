"""`python -m tests.testbed.node_agent SETTINGS.json`: runs one node until it is told to stop. Needs root."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.testbed.node_agent.agent import Agent
from tests.testbed.node_agent.settings import NodeSettings

_CLONE_NEWNS = 0x00020000


def main() -> None:
    if os.geteuid() != 0:
        sys.exit("the node agent needs root: containers are processes with a root file system of their own")
    # What the agent mounts is seen by its containers alone, and goes away with the last of them.
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        sys.exit(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    # Ending closes the shims' control pipes, and they kill their containers.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    Agent(NodeSettings.read(Path(sys.argv[1]))).run()


if __name__ == "__main__":
    main()

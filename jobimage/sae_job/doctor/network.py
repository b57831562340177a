"""Whether pods reach each other: the operator asks every pod how far it is, and pods of one training talk."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException

from sae_job.doctor.findings import Finding
from sae_job.reporting.endpoint import serve_progress
from sae_job.reporting.progress import ProgressReporter
from sae_operator.api.steps import Progress

STEP = "doctor"
TIMEOUT_SECONDS = 5.0
_MOST_BYTES = 2**20


@contextmanager
def serving(port: int) -> Iterator[int]:
    """Serve what every step serves, on all addresses, while the block runs; gives the port.

    Raises:
        OSError: the port cannot be had.
    """
    with serve_progress(ProgressReporter(STEP), "0.0.0.0", port) as address:
        yield int(address.rpartition(":")[2])


def check_own_port(address: str, port: int) -> Finding:
    """Whether this pod is reached at its own address.

    Args:
        address: the pod's IP address; empty asks for the one that its host name has.
    """
    try:
        host = address or socket.gethostbyname(socket.gethostname())
    except OSError as error:
        return Finding("own port", f"this host's name has no address ({error})", "set SAE_JOB_POD_IP to the pod's IP")
    return _ask("own port", host, port, "see that nothing on the node filters the pod's own traffic")


def check_peer(place: str) -> Finding:
    """Whether another pod is reached that serves its progress; `place` is HOST:PORT."""
    host, _, port = place.rpartition(":")
    fix = "see that it runs, that its name is known to DNS, and that no NetworkPolicy forbids the port"
    return _ask(f"peer {place}", host.strip("[]"), int(port), fix)


def is_place(text: str) -> bool:
    """Whether a text reads HOST:PORT."""
    host, separator, port = text.rpartition(":")
    return bool(separator and host and port.isdigit() and 0 < int(port) < 2**16)


def _ask(check: str, host: str, port: int, fix: str) -> Finding:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/progress"
    # Straight to the pod: a proxy of the environment is for what lies outside the cluster.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    started = time.monotonic()
    try:
        with opener.open(url, timeout=TIMEOUT_SECONDS) as answer:
            body = answer.read(_MOST_BYTES)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        return Finding(check, f"{url} cannot be reached ({reason})", fix)
    milliseconds = (time.monotonic() - started) * 1000
    try:
        step = Progress.model_validate_json(body).step
    except ValueError:
        return Finding(check, f"{url} answers something else than a pod's progress", "give the address of a job's pod")
    return Finding(check, f"{host}:{port} answers in {milliseconds:.0f} ms (step {step})")

"""Kueue's real controller on loopback: the queueing system that admits Jobs by quota, against a test's control plane.

Its custom resources, roles and webhooks are rendered from the sources that the binary is built from, so that nothing of
them is kept here. It acts with the rights of its own ServiceAccount, as in a cluster.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.testbed.binaries import KUEUE, ensure_built
from tests.testbed.control_plane import ControlPlane
from tests.testbed.processes import ChildProcess, free_ports
from tests.testbed.waiting import wait_for

MODULE = "sigs.k8s.io/kueue"
NAMESPACE = "kueue-system"
ACCOUNT = "kueue-controller-manager"
_START_SECONDS = 180.0
# What runs outside the cluster here, or serves figures that no test asks for.
_LEFT_OUT = frozenset({"Deployment", "Service", "Secret", "ConfigMap", "APIService"})
# Kueue reads the certificate of its metrics from this folder and no other. It sees an /etc with that folder, in a
# mount namespace of its own; the machine's is left alone.
_METRICS_CERTIFICATES = "/etc/kueue/metrics/certs"
_IN_OWN_ETC = f"""
set -eu
scratch=$1 certificates=$2
shift 2
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/upper" "$scratch/work"
mount -t overlay -o "lowerdir=/etc,upperdir=$scratch/upper,workdir=$scratch/work" overlay /etc
mkdir -p {_METRICS_CERTIFICATES}
cp "$certificates"/tls.* {_METRICS_CERTIFICATES}
exec "$@"
"""


class Kueue:
    """Kueue on one control plane. A Job that is created after `stop` is refused, since its webhooks do not answer.

    Args:
        control_plane: where it works.
        directory: for its configuration, certificates and log; its own.
        manages_all_jobs: Jobs that name no queue are suspended too (`manageJobsWithoutQueueName`).
    """

    def __init__(self, control_plane: ControlPlane, directory: Path, *, manages_all_jobs: bool = False) -> None:
        self._control_plane = control_plane
        self._directory = directory.absolute()
        self._manages_all_jobs = manages_all_jobs
        self._child: ChildProcess | None = None

    def start(self) -> Kueue:
        """Install it and start it; returns when its webhooks answer. Raises `RuntimeError` when it ends before."""
        self._directory.mkdir(parents=True, exist_ok=True)
        certificates, scratch = self._directory / "certificates", self._directory / "etc"
        for folder in (certificates, scratch):
            folder.mkdir(exist_ok=True)
        pair = self._control_plane.authority.issue("kueue", "kueue", hosts=["127.0.0.1"])
        (certificates / "tls.crt").write_bytes(pair.certificate.read_bytes())
        (certificates / "tls.key").write_bytes(pair.key.read_bytes())
        webhook_port, health_port = free_ports(2)
        self._install(f"https://127.0.0.1:{webhook_port}")
        configuration = self._directory / "configuration.json"
        configuration.write_text(json.dumps(self._configuration(webhook_port, health_port, certificates), indent=1))
        own_namespace = ["unshare", "--mount", "--propagation", "private"]
        if os.geteuid() != 0:
            own_namespace.append("--map-root-user")
        self._child = ChildProcess(
            "kueue",
            [
                *own_namespace,
                *("sh", "-c", _IN_OWN_ETC, "sh", scratch, certificates),
                *(ensure_built(KUEUE), "--config", configuration),
            ],
            log=self._directory / "kueue.log",
            environment={
                **os.environ,
                "KUBECONFIG": os.fspath(self._control_plane.kubeconfig_for_service_account(NAMESPACE, ACCOUNT)),
            },
        )
        try:
            wait_for(
                lambda: self._is_ready(health_port), _START_SECONDS, what=f"Kueue is ready (log: {self._child.log})"
            )
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the process; what it has installed stays."""
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __enter__(self) -> Kueue:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _is_ready(self, port: int) -> bool:
        assert self._child is not None
        self._child.ensure_running()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):  # not listening yet
            return False
        finally:
            connection.close()

    def _configuration(self, webhook_port: int, health_port: int, certificates: Path) -> dict[str, Any]:
        return {
            "apiVersion": "config.kueue.x-k8s.io/v1beta2",
            "kind": "Configuration",
            "namespace": NAMESPACE,
            "health": {"healthProbeBindAddress": f"127.0.0.1:{health_port}"},
            "metrics": {"bindAddress": "0"},
            "webhook": {"host": "127.0.0.1", "port": webhook_port, "certDir": os.fspath(certificates)},
            "leaderElection": {"leaderElect": False},
            "internalCertManagement": {"enable": False},
            "clientConnection": {"qps": 100, "burst": 200},
            "integrations": {"frameworks": ["batch/job"]},
            "manageJobsWithoutQueueName": self._manages_all_jobs,
            # Its server of pending workloads registers an aggregated API, which needs a Service.
            "featureGates": {"VisibilityOnDemand": False},
        }

    def _install(self, webhook_url: str) -> None:
        authority = base64.b64encode(self._control_plane.authority.certificate.read_bytes()).decode()
        rendered = self._control_plane.kubectl("kustomize", module_directory() / "config" / "default")
        manifests = [manifest for manifest in YAML(typ="safe").load_all(rendered) if manifest["kind"] not in _LEFT_OUT]
        for client in _webhook_clients(manifests):
            path = client.pop("service")["path"]
            client |= {"url": f"{webhook_url}{path}", "caBundle": authority}
        definitions = [manifest for manifest in manifests if manifest["kind"] == "CustomResourceDefinition"]
        # Some definitions are larger than the annotation that a client-side apply writes may be.
        everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
        self._control_plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=everything)
        names = [f"crd/{definition['metadata']['name']}" for definition in definitions]
        self._control_plane.kubectl("wait", "--for=condition=Established", "--timeout=120s", *names)


def module_directory() -> Path:
    """Kueue's sources in Go's module cache, which downloads them when they are not there.

    Raises `RuntimeError` with what Go says when they cannot be had.
    """
    done = subprocess.run(
        ["go", "mod", "download", "-json", MODULE],
        cwd=KUEUE.sources,
        env={**os.environ, "GOWORK": "off"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"go mod download {MODULE} ended with {done.returncode}: {done.stderr}{done.stdout}")
    return Path(json.loads(done.stdout)["Dir"])


def _webhook_clients(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every `clientConfig` by which the API server calls Kueue."""
    for manifest in manifests:
        for webhook in manifest.get("webhooks", ()):
            yield webhook["clientConfig"]
        conversion = manifest.get("spec", {}).get("conversion", {})
        if "webhook" in conversion:
            yield conversion["webhook"]["clientConfig"]

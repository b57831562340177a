"""A real Kubernetes control plane on loopback: etcd, kube-apiserver, kube-controller-manager, kube-scheduler.

RBAC, the Node authorizer, NodeRestriction and PodSecurity admission are on, as in a cluster. The Job controller's
back-off after a failed pod is 0.2 s instead of 10 s, so that exhausting a backoffLimit takes a second.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.testbed.binaries import kube_program
from tests.testbed.pki import Certificate, CertificateAuthority
from tests.testbed.processes import ChildProcess, free_ports
from tests.testbed.waiting import wait_for

CONTROLLERS = (
    "clusterrole-aggregation-controller",
    "cronjob-controller",
    "deployment-controller",
    "disruption-controller",
    "endpoints-controller",
    "endpointslice-controller",
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "node-lifecycle-controller",
    "persistentvolume-binder-controller",
    "persistentvolumeclaim-protection-controller",
    "pod-garbage-collector-controller",
    "replicaset-controller",
    "resourcequota-controller",
    "root-ca-certificate-publisher-controller",
    "serviceaccount-controller",
    "serviceaccount-token-controller",
    "statefulset-controller",
    "taint-eviction-controller",
    "ttl-after-finished-controller",
    "validatingadmissionpolicy-status-controller",
)
JOB_CONTROLLER_TIMES = {"KUBE_JOB_POD_FAILURE_BACKOFF": "200ms", "KUBE_JOB_SYNC_BATCH_PERIOD": "100ms"}
# What ServiceAccounts of namespaces ask for, without bodies; nothing of Kubernetes' own parts.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
        {"level": "None"},
    ],
}
_START_SECONDS = 180.0
# Longer than kubectl is told to wait.
_KUBECTL_SECONDS = 180.0


class KubectlError(RuntimeError):
    """kubectl ended with an error; the message holds the command and what it printed."""


class ControlPlane:
    """One cluster without nodes. `start` returns when pods could be created, `stop` ends all processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        self.kubeconfig: Path
        self.server: str
        self.authority: CertificateAuthority
        self._port: int
        self._etcd_port: int
        self._admin: Certificate
        self._children: list[ChildProcess] = []

    def start(self) -> ControlPlane:
        """Start everything; raises `RuntimeError` (a process ended: its log's end) or `TimeoutError` (not ready)."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.authority = CertificateAuthority(self.directory / "pki")
        self._etcd_port, peer_port, self._port, manager_port, scheduler_port = free_ports(5)
        self.server = f"https://127.0.0.1:{self._port}"
        self._admin = self.authority.issue("admin", "admin", ["system:masters"])
        self.kubeconfig = self._write_kubeconfig("admin", self._admin)
        try:
            self._start_store(self._etcd_port, peer_port)
            self.start_api_server()
            self._start_controllers(manager_port, scheduler_port)
            # Pods are refused until their service account exists.
            service_account = "/api/v1/namespaces/default/serviceaccounts/default"
            self._wait("the default service account", lambda: self._get_status(service_account) == 200)
            self._wait("the scheduler", lambda: _is_healthy(scheduler_port))
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the processes, the API server's clients first."""
        for child in reversed(self._children):
            child.stop()
        self._children.clear()

    def start_api_server(self) -> None:
        """Start the API server, at first or again; returns when it is ready."""
        self._start_api_server(self._etcd_port)
        # The bootstrap roles come with a hook that /readyz waits for.
        self._wait("the API server", lambda: self._get_status("/readyz") == 200)

    def stop_api_server(self) -> None:
        """End the API server alone, as when its machine is rebooted; what it has stored stays."""
        (server,) = [child for child in self._children if child.name == "kube-apiserver"]
        server.stop()
        self._children.remove(server)

    def __enter__(self) -> ControlPlane:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    # Clients

    def kubectl(self, *arguments: str | os.PathLike[str], input: str | None = None) -> str:
        """Run kubectl as cluster administrator and return what it prints; raises `KubectlError` when it fails."""
        command = [os.fspath(kube_program("kubectl")), *[os.fspath(argument) for argument in arguments]]
        done = subprocess.run(
            command,
            input=input,
            capture_output=True,
            text=True,
            timeout=_KUBECTL_SECONDS,
            env={**os.environ, "KUBECONFIG": os.fspath(self.kubeconfig)},
        )
        if done.returncode != 0:
            told = f"{done.stderr.strip()}\n{done.stdout.strip()}".strip()
            raise KubectlError(f"kubectl {' '.join(command[1:])} ended with {done.returncode}: {told}")
        return done.stdout

    def get(self, *arguments: str | os.PathLike[str]) -> Any:
        """`kubectl get ... -o json`, parsed."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def apply(self, manifest: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """`kubectl apply` of one manifest or of several."""
        items = [manifest] if isinstance(manifest, dict) else list(manifest)
        self.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json", timeout: float = 60.0
    ) -> tuple[int, bytes]:
        """One HTTP request as cluster administrator: status and body of the answer."""
        connection = http.client.HTTPSConnection("127.0.0.1", self._port, context=self._tls(), timeout=timeout)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, body=data, headers={"Content-Type": content_type})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def kubeconfig_for(
        self, name: str, common_name: str, organizations: Sequence[str] = (), *, namespace: str = "default"
    ) -> Path:
        """A kubeconfig file (JSON, which is YAML) of a user by certificate; `namespace` is where its commands act."""
        return self._write_kubeconfig(name, self.authority.issue(name, common_name, organizations), namespace)

    def kubeconfig_for_service_account(self, namespace: str, name: str) -> Path:
        """A kubeconfig file with a token of a service account, which must exist."""
        token = self.kubectl("create", "token", name, "--namespace", namespace, "--duration", "24h").strip()
        return self._write_kubeconfig(f"{namespace}-{name}", {"token": token})

    def audited(self, namespace: str, account: str) -> list[dict[str, Any]]:
        """What a ServiceAccount has asked of the API server so far, in order, as events of its audit log."""
        user = f"system:serviceaccount:{namespace}:{account}"
        found = []
        with (self.directory / "audit.log").open() as log:
            for line in log:
                # The last line may be half written.
                if user in line and line.endswith("\n"):
                    event = json.loads(line)
                    if event["user"]["username"] == user:
                        found.append(event)
        return found

    # Parts

    def _write_kubeconfig(self, name: str, user: Certificate | dict[str, str], namespace: str = "default") -> Path:
        if isinstance(user, Certificate):
            user = {"client-certificate-data": _encoded(user.certificate), "client-key-data": _encoded(user.key)}
        cluster = {"server": self.server, "certificate-authority-data": _encoded(self.authority.certificate)}
        context = {"cluster": "testbed", "user": name, "namespace": namespace}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "testbed", "cluster": cluster}],
            "users": [{"name": name, "user": user}],
            "contexts": [{"name": "testbed", "context": context}],
            "current-context": "testbed",
        }
        path = self.directory / f"{name}.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(json.dumps(content, indent=1))
        return path

    def _spawn(self, name: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._children.append(
            ChildProcess(
                name,
                [kube_program(name), *arguments],
                log=self.directory / f"{name}.log",
                environment={**os.environ, **(environment or {})},
                directory=self.directory,
            )
        )

    def _start_store(self, port: int, peer_port: int) -> None:
        client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
        self._spawn(
            "etcd",
            "--name=testbed",
            f"--data-dir={self.directory}/etcd",
            "--unsafe-no-fsync=true",  # nobody reads the data after a crash
            "--log-level=warn",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=testbed={peer}",
        )

    def _start_api_server(self, etcd_port: int) -> None:
        pki = self.authority
        hosts = ["127.0.0.1", "10.0.0.1", "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        serving = pki.issue("apiserver", "kube-apiserver", hosts=hosts)
        node_client = pki.issue("apiserver-node-client", "kube-apiserver-node-client", ["system:masters"])
        policy = self.directory / "audit-policy.json"
        policy.write_text(json.dumps(AUDIT_POLICY))
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",  # a loopback address is refused as an endpoint
            f"--tls-cert-file={serving.certificate}",
            f"--tls-private-key-file={serving.key}",
            f"--client-ca-file={pki.certificate}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--allow-privileged=true",  # as in most clusters: PodSecurity is what refuses
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki.service_account_public_key}",
            f"--service-account-signing-key-file={pki.service_account_key}",
            f"--kubelet-client-certificate={node_client.certificate}",
            f"--kubelet-client-key={node_client.key}",
            f"--kubelet-certificate-authority={pki.certificate}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.directory}/audit.log",
            "--profiling=false",
            "--shutdown-delay-duration=0s",
        )

    def _start_controllers(self, manager_port: int, scheduler_port: int) -> None:
        self._spawn(
            "kube-controller-manager",
            *self._client_flags("kube-controller-manager", manager_port),
            f"--controllers={','.join(CONTROLLERS)}",
            f"--service-account-private-key-file={self.authority.service_account_key}",
            f"--root-ca-file={self.authority.certificate}",
            "--use-service-account-credentials=true",
            "--node-monitor-period=2s",
            "--node-monitor-grace-period=40s",
            "--allocate-node-cidrs=false",
            "--min-resync-period=1h",
            environment=JOB_CONTROLLER_TIMES,
        )
        self._spawn("kube-scheduler", *self._client_flags("kube-scheduler", scheduler_port))

    def _client_flags(self, name: str, port: int) -> list[str]:
        kubeconfig = self.kubeconfig_for(name, f"system:{name}")
        return [
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            "--leader-elect=false",
            "--profiling=false",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
        ]

    def _tls(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=os.fspath(self.authority.certificate))
        context.load_cert_chain(self._admin.certificate, self._admin.key)
        return context

    def _get_status(self, path: str) -> int:
        return self.request("GET", path)[0]

    def _wait(self, what: str, is_ready: Callable[[], bool]) -> None:
        def asked() -> bool:
            for child in self._children:
                child.ensure_running()
            try:
                return is_ready()
            except (OSError, http.client.HTTPException):  # not listening yet
                return False

        wait_for(asked, _START_SECONDS, what=f"{what} is ready (logs in {self.directory})")


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _is_healthy(port: int) -> bool:
    """`/healthz` of a component that serves with a certificate of its own making."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    finally:
        connection.close()

"""How the API server is reached: a kubeconfig file, or the pod's ServiceAccount."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EXEC_TIMEOUT_SECONDS = 60


class CredentialsError(Exception):
    """No usable credentials; the message says what was looked for."""


@dataclass(frozen=True)
class Credentials:
    """One way into one cluster.

    Attributes:
        namespace: the context's or the pod's own namespace.
        basic: user name and password.
        refreshes: the token comes from a file or a program, and may be another one when loaded again.
    """

    server: str
    ca_path: str | None = None
    ca_data: str | None = None
    insecure: bool = False
    token: str | None = None
    certificate_path: str | None = None
    certificate_data: str | None = None
    private_key_path: str | None = None
    private_key_data: str | None = None
    basic: tuple[str, str] | None = None
    proxy_url: str | None = None
    namespace: str = "default"
    refreshes: bool = False


def load_credentials(kubeconfig: str | None = None) -> Credentials:
    """Credentials from `kubeconfig`, else from $KUBECONFIG, else of the pod, else from ~/.kube/config.

    Raises:
        CredentialsError: none of them is there, or the one that is cannot be used.
    """
    explicit = kubeconfig or os.environ.get("KUBECONFIG")
    if explicit:
        return _from_kubeconfig([Path(os.path.expanduser(part)) for part in explicit.split(os.pathsep) if part])
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if host and (SERVICE_ACCOUNT / "token").exists():
        return _from_service_account(host, port)
    # Not Path.expanduser, which fails for a user without a home.
    usual = Path(os.path.expanduser("~/.kube/config"))
    if usual.exists():
        return _from_kubeconfig([usual])
    raise CredentialsError(
        "no way to reach a cluster: pass --kubeconfig, set KUBECONFIG, or run in a pod with a ServiceAccount token"
    )


def _from_service_account(host: str, port: str) -> Credentials:
    namespace = SERVICE_ACCOUNT / "namespace"
    return Credentials(
        server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}",
        ca_path=str(SERVICE_ACCOUNT / "ca.crt"),
        token=_token(SERVICE_ACCOUNT / "token"),
        namespace=namespace.read_text().strip() if namespace.exists() else "default",
        refreshes=True,
    )


def _from_kubeconfig(paths: list[Path]) -> Credentials:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    merged: dict[str, dict[str, Any]] = {"contexts": {}, "clusters": {}, "users": {}}
    current: str | None = None
    for path in paths:
        try:
            document = YAML(typ="safe").load(path.read_text()) or {}
        except OSError as error:
            raise CredentialsError(f"cannot read kubeconfig {path}: {error.strerror}") from error
        except YAMLError as error:
            # What YAML complains of may quote a credential.
            raise CredentialsError(f"kubeconfig {path} is not YAML") from error
        current = current or document.get("current-context")
        for plural, singular in (("contexts", "context"), ("clusters", "cluster"), ("users", "user")):
            for item in document.get(plural) or []:
                # The first file that defines a name wins, as with kubectl.
                merged[plural].setdefault(item["name"], _absolute(item.get(singular) or {}, path.parent))
    if not current or current not in merged["contexts"]:
        raise CredentialsError(f"no current context in {', '.join(map(str, paths))}")
    context = merged["contexts"][current]
    cluster = merged["clusters"].get(context.get("cluster"))
    if not cluster or not cluster.get("server"):
        raise CredentialsError(f"context {current} of the kubeconfig names no cluster with a server")
    user = merged["users"].get(context.get("user")) or {}
    refreshes = False
    if "exec" in user:
        user, refreshes = {**user, **_run_plugin(user["exec"], paths[0].parent)}, True
    token = user.get("token")
    if user.get("tokenFile"):
        token, refreshes = _token(Path(user["tokenFile"])), True
    username, password = user.get("username"), user.get("password")
    return Credentials(
        server=cluster["server"],
        ca_path=cluster.get("certificate-authority"),
        ca_data=cluster.get("certificate-authority-data"),
        insecure=bool(cluster.get("insecure-skip-tls-verify")),
        token=token,
        certificate_path=user.get("client-certificate"),
        certificate_data=user.get("client-certificate-data"),
        private_key_path=user.get("client-key"),
        private_key_data=user.get("client-key-data"),
        basic=(username, password) if username and password else None,
        proxy_url=cluster.get("proxy-url"),
        namespace=context.get("namespace") or "default",
        refreshes=refreshes,
    )


def _token(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise CredentialsError(f"cannot read the token in {path}: {error.strerror}") from error


def _absolute(section: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths in a kubeconfig are relative to its folder."""
    paths = ("certificate-authority", "client-certificate", "client-key", "tokenFile")
    return {key: str(folder / value) if key in paths and value else value for key, value in section.items()}


def _run_plugin(plugin: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a credential plugin (client.authentication.k8s.io) and returns what it says as fields of a user."""
    command = plugin["command"]
    if "/" in command:
        command = str(folder / command)
    environment = {**os.environ, **{item["name"]: item["value"] for item in plugin.get("env") or []}}
    environment["KUBERNETES_EXEC_INFO"] = json.dumps(
        {"apiVersion": plugin.get("apiVersion"), "kind": "ExecCredential", "spec": {"interactive": False}}
    )
    try:
        answer = subprocess.run(
            [command, *(plugin.get("args") or [])],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=EXEC_TIMEOUT_SECONDS,
            check=True,
        )
        status = json.loads(answer.stdout)["status"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError) as error:
        raise CredentialsError(f"credential plugin {command} gave no credentials: {error}") from error
    names = (
        ("token", "token"),
        ("clientCertificateData", "client-certificate-data"),
        ("clientKeyData", "client-key-data"),
    )
    return {field: status[key] for key, field in names if status.get(key)}

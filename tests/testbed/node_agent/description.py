"""The description of a container that the shim reads: command, environment, identity, limits, mounts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.testbed.node_agent.container import Container
from tests.testbed.node_agent.environment import ConfigurationError, container_environment, expand
from tests.testbed.node_agent.pod_api import PodApi
from tests.testbed.node_agent.settings import Image
from tests.testbed.node_agent.volumes import quantity

_DEFAULT_TERMINATION_PATH = "/dev/termination-log"


def describe(
    container: Container,
    pod: dict[str, Any],
    image: Image,
    pod_api: PodApi,
    *,
    volumes: Mapping[str, Path],
    gpus: list[int],
    hosts: Path,
) -> dict[str, Any]:
    """What the shim is told; raises `ConfigurationError` when something the container refers to is not there."""
    spec = container.spec
    name: str = pod["metadata"]["name"]
    variables = {
        **image.environment,
        "HOSTNAME": name,
        "KUBERNETES_SERVICE_HOST": pod_api.api.host,
        "KUBERNETES_SERVICE_PORT": str(pod_api.api.port),
    }
    if gpus:
        variables["NVIDIA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    variables = container_environment(spec, base=variables, read_data=pod_api.read_data, field=pod_api.field)
    words = [*(spec.get("command") or image.entrypoint), *spec.get("args", [])]
    if not words:
        raise ConfigurationError("no command specified")
    context = spec.get("securityContext") or {}
    memory = spec.get("resources", {}).get("limits", {}).get("memory")
    return {
        "command": [expand(word, variables) for word in words],
        "environment": variables,
        "workingDirectory": spec.get("workingDir", image.working_directory),
        **_identity(context, pod["spec"].get("securityContext") or {}, image),
        "noNewPrivileges": context.get("allowPrivilegeEscalation") is False,
        "readOnlyRoot": bool(context.get("readOnlyRootFilesystem")),
        "hostName": pod["spec"].get("hostname", name)[:63],
        "memoryLimit": None if memory is None else quantity(memory),
        "devices": [f"nvidia{number}" for number in gpus],
        "mounts": [
            *_mounts(container, image, volumes, variables),
            {"source": str(hosts), "target": "/etc/hosts", "readOnly": True},
        ],
    }


def _identity(context: Mapping[str, Any], pod_context: Mapping[str, Any], image: Image) -> dict[str, Any]:
    """User, group and further groups: the container's settings, else the pod's, else the image's user."""
    settings = {**pod_context, **context}
    user = settings.get("runAsUser", image.user)
    if user == 0 and settings.get("runAsNonRoot"):
        raise ConfigurationError("container has runAsNonRoot and image will run as root")
    groups = list(pod_context.get("supplementalGroups", []))
    if "fsGroup" in pod_context:
        groups.append(pod_context["fsGroup"])
    return {"user": user, "group": settings.get("runAsGroup", user if user == image.user else 0), "groups": groups}


def _mounts(
    container: Container, image: Image, volumes: Mapping[str, Path], variables: Mapping[str, str]
) -> list[dict[str, Any]]:
    mounts = [{"source": source, "target": target, "readOnly": True} for target, source in image.binds.items()]
    for mount in container.spec.get("volumeMounts", []):
        source = volumes[mount["name"]]
        below = mount.get("subPath") or expand(mount.get("subPathExpr", ""), variables)
        if below:
            source = source / below
            if not source.exists():
                source.mkdir(parents=True)
        mounts.append({"source": str(source), "target": mount["mountPath"], "readOnly": mount.get("readOnly", False)})
    message = container.termination_file
    message.parent.mkdir(parents=True, exist_ok=True)
    message.touch()
    message.chmod(0o666)
    target = container.spec.get("terminationMessagePath", _DEFAULT_TERMINATION_PATH)
    return [*mounts, {"source": str(message), "target": target, "readOnly": False}]

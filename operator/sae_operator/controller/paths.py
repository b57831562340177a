"""Paths of the API server's endpoints that the operator uses."""

from __future__ import annotations

from sae_operator.api.base import API_VERSION
from sae_operator.api.resources import KINDS


def resources(kind: str, namespace: str | None) -> str:
    """All resources of a kind, in a namespace or (None) in all of them."""
    return _in(f"/apis/{API_VERSION}", namespace, KINDS[kind].plural)


def resource(kind: str, namespace: str, name: str) -> str:
    return f"{resources(kind, namespace)}/{name}"


def jobs(namespace: str | None) -> str:
    return _in("/apis/batch/v1", namespace, "jobs")


def pods(namespace: str | None) -> str:
    return _in("/api/v1", namespace, "pods")


def config_maps(namespace: str) -> str:
    return _in("/api/v1", namespace, "configmaps")


def services(namespace: str) -> str:
    return _in("/api/v1", namespace, "services")


def events(namespace: str) -> str:
    return _in("/api/v1", namespace, "events")


def leases(namespace: str) -> str:
    return _in("/apis/coordination.k8s.io/v1", namespace, "leases")


def _in(group: str, namespace: str | None, plural: str) -> str:
    return f"{group}/{plural}" if namespace is None else f"{group}/namespaces/{namespace}/{plural}"

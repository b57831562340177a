"""Manifests that tests start from: pods that a `restricted` namespace accepts."""

from __future__ import annotations

from typing import Any

from tests.testbed.node import IMAGE_USER, JOB_IMAGE


def restricted_pod(*command: str, image: str = JOB_IMAGE, **container: Any) -> dict[str, Any]:
    """A pod's `spec` with one container `main` that runs a command; keyword arguments are fields of the container."""
    return {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 5,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": IMAGE_USER,
            "fsGroup": IMAGE_USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "main",
                "image": image,
                "command": list(command),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
                **container,
            }
        ],
    }


def pod(namespace: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"namespace": namespace, "name": name}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def job(namespace: str, name: str, spec: dict[str, Any], **job_spec: Any) -> dict[str, Any]:
    """A Job of such a pod; keyword arguments are fields of the Job's `spec`."""
    metadata = {"namespace": namespace, "name": name}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {"backoffLimit": 0, **job_spec, "template": {"spec": spec}},
    }

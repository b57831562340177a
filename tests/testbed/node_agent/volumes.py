"""The volumes of a pod as folders of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.testbed.node_agent.environment import ConfigurationError, ReadData

_UNITS = {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "m": 1e-3,
}


def quantity(text: str | int | float) -> int:
    """A Kubernetes quantity as an integer: `64Mi` is 67108864."""
    text = str(text)
    for suffix, factor in _UNITS.items():
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * factor)
    return int(float(text))


class Volumes:
    """Makes the volumes of one pod below a folder, and takes them away.

    An emptyDir in memory, or with a size limit, is a tmpfs of that size in the agent's own mount namespace, so that
    writing too much fails with ENOSPC. (A kubelet evicts the pod for a limit on disk.)
    """

    def __init__(
        self,
        pod: dict[str, Any],
        directory: Path,
        claims: Path,
        *,
        read_data: ReadData,
        field: Callable[[str], str],
        token: Callable[[dict[str, Any]], str],
    ) -> None:
        self._pod = pod
        self._directory = directory
        self._claims = claims
        self._read_data = read_data
        self._field = field
        self._token = token
        self._mounted: list[Path] = []
        self.paths: dict[str, Path] = {}

    def prepare(self) -> None:
        """Make every volume that is not made yet; raises `ConfigurationError` naming the volume that cannot be."""
        for volume in self._pod["spec"].get("volumes", []):
            name = volume["name"]
            if name in self.paths:
                continue
            try:
                path = self._prepare(volume)
            except ConfigurationError as error:
                raise ConfigurationError(f'MountVolume.SetUp failed for volume "{name}" : {error}') from error
            group = (self._pod["spec"].get("securityContext") or {}).get("fsGroup")
            if group is not None and "hostPath" not in volume:
                _give_to_group(path, group)
            self.paths[name] = path

    def remove(self) -> None:
        for path in self._mounted:
            subprocess.run(["umount", "--lazy", path], check=True)
        self._mounted.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _prepare(self, volume: dict[str, Any]) -> Path:
        path = self._directory / volume["name"]
        if host := volume.get("hostPath"):
            return Path(host["path"])
        if claim := volume.get("persistentVolumeClaim"):
            path = self._claims / f"{self._pod['metadata']['namespace']}_{claim['claimName']}"
        path.mkdir(parents=True, exist_ok=True)
        if "persistentVolumeClaim" in volume:
            path.chmod(0o777)
        elif "emptyDir" in volume:
            self._prepare_empty(path, volume["emptyDir"] or {})
        elif source := volume.get("configMap"):
            self._write_object(path, "configmaps", source["name"], source)
        elif source := volume.get("secret"):
            self._write_object(path, "secrets", source["secretName"], source)
        elif source := volume.get("downwardAPI"):
            self._write_fields(path, source["items"])
        elif source := volume.get("projected"):
            for one in source["sources"]:
                self._write_projected(path, one)
        else:
            raise ConfigurationError(f"the node has no volumes of this kind: {', '.join(set(volume) - {'name'})}")
        return path

    def _prepare_empty(self, path: Path, source: Mapping[str, Any]) -> None:
        limit = source.get("sizeLimit")
        if source.get("medium") == "Memory" or limit is not None:
            options = "mode=0777" if limit is None else f"mode=0777,size={quantity(limit)}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
            self._mounted.append(path)
        path.chmod(0o777)

    def _write_projected(self, path: Path, source: Mapping[str, Any]) -> None:
        if token := source.get("serviceAccountToken"):
            _write(path / token["path"], self._token(token).encode(), 0o644)
        if config_map := source.get("configMap"):
            self._write_object(path, "configmaps", config_map["name"], config_map)
        if secret := source.get("secret"):
            self._write_object(path, "secrets", secret["name"], secret)
        if downward := source.get("downwardAPI"):
            self._write_fields(path, downward["items"])

    def _write_fields(self, path: Path, items: list[dict[str, Any]]) -> None:
        for item in items:
            _write(path / item["path"], self._field(item["fieldRef"]["fieldPath"]).encode(), 0o644)

    def _write_object(self, path: Path, kind: str, name: str, source: Mapping[str, Any]) -> None:
        optional = source.get("optional", False)
        data = self._read_data(kind, name, optional)
        if data is None:
            return
        mode = source.get("defaultMode", 0o644)
        items: list[dict[str, Any]] = source.get("items") or [{"key": key, "path": key} for key in data]
        for item in items:
            if item["key"] in data:
                _write(path / item["path"], data[item["key"]], item.get("mode", mode))
            elif not optional:
                raise ConfigurationError(f"references non-existent config key: {item['key']}")


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def _give_to_group(path: Path, group: int) -> None:
    """As the kubelet applies fsGroup: the group owns everything, may read it, and owns what is made in folders."""
    for folder, _, files in os.walk(path):
        os.chown(folder, -1, group)
        os.chmod(folder, os.stat(folder).st_mode | 0o2070)
        for file in files:
            one = os.path.join(folder, file)
            os.chown(one, -1, group)
            os.chmod(one, os.stat(one).st_mode | 0o040)

"""A node with a real kubelet and real containers: containerd and runc of Debian's packages, a bridge for the pods.

One at a time on a machine, and for root alone. Pods reach the API server at its Service's address, as everywhere; there
is no DNS. All of it is taken back at the end: processes, mounts, control groups, addresses and the bridge. What a run
that was killed has left is taken back before the next one starts.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.testbed.binaries import KUBELET, PAUSE, ensure_built
from tests.testbed.control_plane import ControlPlane
from tests.testbed.forwarding import Forwarder
from tests.testbed.images import PROGRAMS as IMAGE_PROGRAMS
from tests.testbed.images import Image, ensure_archive, ensure_program_image, require
from tests.testbed.paths import cache_directory
from tests.testbed.processes import ChildProcess
from tests.testbed.waiting import wait_for

# Debian package of each program that a node needs, the building of its images included.
PROGRAMS = {
    **IMAGE_PROGRAMS,
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "ip": "iproute2",
    "umount": "mount",
}
CNI_PLUGINS = Path("/usr/lib/cni")  # containernetworking-plugins
NODE_ADDRESS = "10.245.0.1"  # a kubelet takes no loopback address
API_ADDRESS = "10.0.0.1"  # of the Service kubernetes.default
POD_SUBNET = "10.244.77.0/24"
BRIDGE = "saetestbed0"
NETWORK = "sae-operator-testbed"
KUBELET_PORT = 20250
_CGROUPS = Path("/sys/fs/cgroup")
_POD_CGROUP = "kubepods"
_CONTAINER_LOGS = Path("/var/log/containers")  # the kubelet's own, not to be chosen
_NETWORK_RESULTS = Path("/var/lib/cni/results")
_IP_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_SECONDS = 120.0


class KubeletNode:
    """One Node whose pods run in containers. `start` returns when it is Ready, `stop` takes everything back."""

    def __init__(self, control_plane: ControlPlane, *, name: str = "machine-0", gpus: int = 0) -> None:
        self.name = name
        self.directory = cache_directory() / "node"
        self._control_plane = control_plane
        self._gpus = gpus
        self._children: list[ChildProcess] = []
        self._forwarders: list[Forwarder] = []

    def start(self) -> KubeletNode:
        """Start everything; raises `RuntimeError` that names what is missing, or the end of the log of what ended."""
        require_node_programs()
        pause = ensure_program_image("localhost/sae-operator/pause", ensure_built(PAUSE))
        _take_back(self.directory)
        _require_free_machine()
        self.directory.mkdir(parents=True)
        try:
            self._start_network()
            self._start_runtime(pause)
            self._start_kubelet()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the kubelet, all containers and the runtime, and undo mounts, control groups and network."""
        for child in reversed(self._children):  # the kubelet first: it would start containers anew
            child.stop()
        self._children.clear()
        for forwarder in self._forwarders:
            forwarder.stop()
        self._forwarders.clear()
        _take_back(self.directory)
        self._control_plane.request("DELETE", f"/api/v1/nodes/{self.name}")

    def __enter__(self) -> KubeletNode:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def load(self, image: Image) -> float:
        """Bring an image to the node; returns seconds."""
        started = time.monotonic()
        self._ctr("images", "import", os.fspath(ensure_archive(image)))
        return time.monotonic() - started

    def publish(self, port: int) -> str:
        """Let pods reach a port of this machine's 127.0.0.1; returns the address for them, `HOST:PORT`."""
        self._forwarders.append(Forwarder((NODE_ADDRESS, port), ("127.0.0.1", port)))
        return f"{NODE_ADDRESS}:{port}"

    def log_tail(self) -> str:
        return "\n".join(child.log_tail() for child in self._children)

    # Parts

    def _start_network(self) -> None:
        # The bridge's plugin turns it on.
        (self.directory / _IP_FORWARDING.name).write_text(_IP_FORWARDING.read_text())
        for address in (NODE_ADDRESS, API_ADDRESS):
            _run("ip", "address", "add", f"{address}/32", "dev", "lo")
        api_port = int(self._control_plane.server.rpartition(":")[2])
        self._forwarders.append(Forwarder((API_ADDRESS, 443), ("127.0.0.1", api_port)))
        bridge = {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": POD_SUBNET}]],
                "routes": [{"dst": "0.0.0.0/0"}],
                "dataDir": os.fspath(self.directory / "addresses"),
            },
        }
        network = {"cniVersion": "0.4.0", "name": NETWORK, "plugins": [bridge]}
        folder = self.directory / "cni"
        folder.mkdir()
        (folder / "10-bridge.conflist").write_text(json.dumps(network, indent=1))

    def _start_runtime(self, pause: Image) -> None:
        folder = self.directory / "containerd"
        folder.mkdir()
        settings = folder / "config.toml"
        settings.write_text(
            f"""version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{self._socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause.name}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PLUGINS}"
    conf_dir = "{self.directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""
        )
        self._spawn("containerd", _program("containerd"), "--config", settings)
        wait_for(lambda: self._answers(self._children[-1]), _SECONDS, what="containerd answers")
        self.load(pause)

    def _start_kubelet(self) -> None:
        user = f"system:node:{self.name}"
        authority = self._control_plane.authority
        serving = authority.issue(f"{self.name}-serving", user, ["system:nodes"], [NODE_ADDRESS, self.name])
        folder = self.directory / "kubelet"
        folder.mkdir()
        evictions = {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"}
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": NODE_ADDRESS,
            "port": KUBELET_PORT,
            "healthzPort": 0,
            "readOnlyPort": 0,
            "tlsCertFile": os.fspath(serving.certificate),
            "tlsPrivateKeyFile": os.fspath(serving.key),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": os.fspath(authority.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "cgroupDriver": "cgroupfs",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "evictionHard": evictions,
            "localStorageCapacityIsolation": False,
            "podLogsDir": os.fspath(self.directory / "pod-logs"),
            "volumePluginDir": os.fspath(self.directory / "volume-plugins"),
            "resolvConf": "",
            "imageGCHighThresholdPercent": 100,  # the disk of a developer's machine may be nearly full
            "syncFrequency": "10s",
        }
        configuration = folder / "config.json"
        configuration.write_text(json.dumps(settings, indent=1))
        self._spawn(
            "kubelet",
            ensure_built(KUBELET),
            f"--config={configuration}",
            f"--kubeconfig={self._control_plane.kubeconfig_for(self.name, user, ['system:nodes'])}",
            f"--hostname-override={self.name}",
            f"--node-ip={NODE_ADDRESS}",
            f"--root-dir={folder}/root",
            f"--cert-dir={folder}/pki",
        )
        child = self._children[-1]

        def is_ready() -> bool:
            child.ensure_running()
            status, body = self._control_plane.request("GET", f"/api/v1/nodes/{self.name}")
            if status != 200:
                return False
            node = json.loads(body)
            ready = any(one["type"] == "Ready" and one["status"] == "True" for one in node["status"]["conditions"])
            return ready and not node["spec"].get("taints")

        wait_for(is_ready, _SECONDS, what=lambda: f"node {self.name} is Ready; its log ends:\n{child.log_tail()}")
        if self._gpus:  # as a device plugin would have told
            count = str(self._gpus)
            patch = {"status": {part: {"nvidia.com/gpu": count} for part in ("capacity", "allocatable")}}
            self._control_plane.kubectl(
                "patch", "node", self.name, "--subresource=status", "--type=merge", "--patch", json.dumps(patch)
            )

    @property
    def _socket(self) -> Path:
        return self.directory / "containerd.sock"

    def _answers(self, child: ChildProcess) -> bool:
        child.ensure_running()
        try:
            self._ctr("version")
        except RuntimeError:
            return False
        return True

    def _ctr(self, *arguments: str) -> str:
        return _run("ctr", "--address", os.fspath(self._socket), "--namespace", "k8s.io", *arguments)

    def _spawn(self, name: str, *command: str | os.PathLike[str]) -> None:
        environment = {**os.environ, "PATH": _path()}
        log = self.directory / f"{name}.log"
        child = ChildProcess(name, command, log=log, environment=environment, directory=self.directory)
        self._children.append(child)


def require_node_programs() -> None:
    """Raise `RuntimeError` that names root or the Debian packages that this machine lacks for a node."""
    programs = dict(PROGRAMS)
    if not (CNI_PLUGINS / "bridge").exists():
        programs[os.fspath(CNI_PLUGINS / "bridge")] = "containernetworking-plugins"
    require(programs, "a node with real containers")


def _require_free_machine() -> None:
    """Raise `RuntimeError` where the machine runs a kubelet of its own or uses the addresses of the pods."""
    for folder in _pod_cgroups():
        raise RuntimeError(f"another kubelet runs pods on this machine: {folder} is there")
    ours = [ipaddress.ip_network(one) for one in (POD_SUBNET, f"{NODE_ADDRESS}/32", f"{API_ADDRESS}/32")]
    for route in json.loads(_run("ip", "-json", "-4", "route", "show", "table", "all")):
        if route["dst"] == "default":
            continue
        used = ipaddress.ip_network(route["dst"], strict=False)
        for network in ours:
            if network.overlaps(used) and used.prefixlen > 8:
                raise RuntimeError(f"{network} is needed for pods, and this machine has a route to {used}")


# Taking back


def _take_back(directory: Path) -> None:
    """Undo what a node in this folder did to the machine; nothing happens where nothing was done."""
    if not directory.exists():
        return
    # Shims first: they would tell of their containers' ends to nobody.
    for pid in (*_processes_naming(os.fspath(directory)), *_container_processes()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not _container_processes(), 30, what="the containers' processes have ended")
    for mount in _mounts_below(directory):
        _run("umount", "--lazy", os.fspath(mount))
    for folder in _pod_cgroups():
        _remove_cgroup(folder)
    links = {link["ifname"] for link in json.loads(_run("ip", "-json", "link", "show"))}
    if BRIDGE in links:
        _run("ip", "link", "delete", BRIDGE)
    addresses = json.loads(_run("ip", "-json", "address", "show", "dev", "lo"))[0]["addr_info"]
    for address in addresses:
        if address["local"] in (NODE_ADDRESS, API_ADDRESS):
            _run("ip", "address", "delete", f"{address['local']}/32", "dev", "lo")
    was = directory / _IP_FORWARDING.name
    if was.exists():
        _IP_FORWARDING.write_text(was.read_text())
    if _CONTAINER_LOGS.is_dir():
        for link in _CONTAINER_LOGS.iterdir():
            if link.is_symlink() and os.readlink(link).startswith(os.fspath(directory)):
                link.unlink()
    # Named by network and pod: ours and the loopback's.
    for sandbox in (directory / "containerd" / "root" / "io.containerd.grpc.v1.cri" / "sandboxes").glob("*"):
        for result in _NETWORK_RESULTS.glob(f"*-{sandbox.name}-*"):
            result.unlink(missing_ok=True)
    shutil.rmtree(directory)


def _processes_naming(text: str) -> list[int]:
    """Processes of this machine with a text in an argument, but for this one."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                arguments = (folder / "cmdline").read_bytes().split(b"\0")
                program = Path(os.fsdecode(arguments[0])).name
                # The programs of a node alone: an editor may have a log open.
                if program.startswith(("containerd", "kubelet")) and any(text.encode() in one for one in arguments):
                    found.append(int(folder.name))
    return found


def _pod_cgroups() -> list[Path]:
    """The control group of all pods: one with version 2, one per controller with version 1."""
    return [folder for folder in (_CGROUPS / _POD_CGROUP, *_CGROUPS.glob(f"*/{_POD_CGROUP}")) if folder.is_dir()]


def _container_processes() -> set[int]:
    found: set[int] = set()
    for folder in _pod_cgroups():
        for file in folder.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                found.update(int(pid) for pid in file.read_text().split())
    return found


def _remove_cgroup(folder: Path) -> None:
    for child, _, _ in sorted(os.walk(folder), reverse=True):
        wait_for(lambda child=child: _removed(child), 10, what=f"{child} can be removed")


def _removed(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:  # a process of it has not ended whole
        return False
    return True


def _mounts_below(directory: Path) -> list[Path]:
    """Mount points below a folder, the innermost first."""

    def points() -> Iterator[str]:
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            point = line.split()[4].replace("\\040", " ")
            if point.startswith(f"{directory}/"):
                yield point

    return [Path(point) for point in sorted(points(), reverse=True)]


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


def _program(name: str) -> str:
    return shutil.which(name, path=_path()) or name


def _run(program: str, *arguments: str) -> str:
    command = [_program(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join([program, *arguments])} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout

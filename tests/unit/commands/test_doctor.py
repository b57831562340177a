"""`sae-job doctor`: what it tells of a good machine and store, of bad ones, and of stores that lie."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sae_job.cli import run_command_line
from sae_job.doctor.findings import Finding
from sae_job.doctor.machine import check_folders, check_shared_memory
from sae_job.doctor.network import check_own_port, check_peer, serving
from sae_job.doctor.software import Devices, check_devices, check_packages, check_triton
from sae_job.doctor.store import FOLDER, RACERS, StoreCheck
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, ObjectStore, PreconditionFailed, StoreError
from sae_job.storage.file_store import FileStore
from tests.testbed.processes import free_ports

CPU = Devices(torch="2.13.0+cpu", cuda=None, gpus=(), files=0, triton=None, driver_module=False)
GPU = Devices(
    torch="2.13.0", cuda="12.9", gpus=(("H100", 80 * 2**30),) * 2, files=2, triton="3.7.1", driver_module=True
)


# Stores


class Lying(FileStore):
    """A folder that keeps its promises but for one."""

    def __init__(self, root: Path, lie: str) -> None:
        super().__init__(root)
        self._lie = lie
        self._race = threading.Lock()
        self._seen: set[str] = set()

    def put(
        self, key: str, data: bytes | bytearray | memoryview, *, if_absent: bool = False, if_match: str | None = None
    ) -> ObjectInfo:
        if self._lie == "no conditions" or (self._lie == "no If-Match" and if_match is not None):
            return super().put(key, data)
        if self._lie == "two winners" and key.endswith("/race") and if_absent:
            with self._race:  # as a server that checks first and writes later
                if len(self._seen) < 2:
                    self._seen.add(bytes(data).decode())
                    return super().put(key, data)
        if self._lie == "last racer stays" and key.endswith("/race") and if_absent:
            try:
                return super().put(key, data, if_absent=True)
            except PreconditionFailed:
                super().put(key, data)
                raise
        if self._lie == "loses the end":
            data = bytes(data)[: max(len(data) - (1 if len(data) > 100_000 else 0), 0)]
        return super().put(key, data, if_absent=if_absent, if_match=if_match)

    def get(self, key: str) -> bytes:
        data = super().get(key)
        if self._lie == "old bytes" and key.endswith("/object"):
            if key in self._seen:
                return data[::-1]  # what was there before
            self._seen.add(key)
        return data

    def get_range(self, key: str, start: int, length: int) -> bytes:
        if self._lie == "whole objects":
            return super().get(key)[:length]
        if self._lie == "wraps at the end" and start + length > 4096:
            return super().get_range(key, max(4096 - length, 0), length)
        return super().get_range(key, start, length)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(super().list(prefix))
        if self._lie == "late listing" and "list/" in prefix:
            found = found[:-2]
        if self._lie == "unordered" and "list/" in prefix:
            found = found[::-1]
        return iter(found)

    def head(self, key: str) -> ObjectInfo | None:
        if self._lie == "ghosts" and key.endswith("/gone"):
            return ObjectInfo(key, 4, "ghost", datetime.now(UTC))
        return super().head(key)


def tried(store: ObjectStore, *, shift: timedelta = timedelta(0)) -> list[Finding]:
    ticks = iter(range(1_000_000))
    check = StoreCheck(
        store,
        token="abc",
        large_bytes=300_000,
        now=lambda: datetime.now(UTC) + shift,
        timer=lambda: float(next(ticks)),
    )
    return list(check.findings())


def test_a_good_store_passes_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    found = tried(store)
    assert [finding.line() for finding in found if not finding.ok] == []
    assert len(found) == 9
    assert found[0].told == store.uri
    assert list(store.list()) == []
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("lie", "checks"),
    [
        ("no conditions", {"create if absent", f"{RACERS} racers for one object", "replace one version alone"}),
        ("no If-Match", {"replace one version alone"}),
        ("two winners", {f"{RACERS} racers for one object"}),
        ("last racer stays", {f"{RACERS} racers for one object"}),
        ("old bytes", {"write and read"}),
        ("loses the end", {"0 MiB in one object"}),
        ("whole objects", {"ranges"}),
        ("wraps at the end", {"ranges"}),
        ("late listing", {"list after write"}),
        ("unordered", {"list after write"}),
        ("ghosts", {"delete"}),
    ],
)
def test_a_store_that_lies_is_found_out(tmp_path: Path, lie: str, checks: set[str]) -> None:
    store = Lying(tmp_path / "store", lie)
    wrong = [finding for finding in tried(store) if not finding.ok]
    assert {finding.check.removeprefix("store, ") for finding in wrong} == checks
    assert all(finding.told and finding.fix for finding in wrong)
    assert list(FileStore(tmp_path / "store").list()) == []


@pytest.mark.parametrize("minutes", [-20, 20])
def test_clocks_that_differ_are_told(tmp_path: Path, minutes: int) -> None:
    (wrong,) = [one for one in tried(FileStore(tmp_path), shift=timedelta(minutes=minutes)) if not one.ok]
    assert wrong.check == "store, clocks"
    told = re.search(r"(\d+) s apart", wrong.told)
    assert told is not None
    # Times between the clocks' are taken off, and of a whole second, which stores may leave out.
    assert int(told[1]) == pytest.approx(1200, abs=60)
    assert "NTP" in wrong.fix


class Unreachable(FileStore):
    def put(self, *_: object, **__: object) -> ObjectInfo:
        raise StoreError("s3://b/x: bucket b cannot be reached")


def test_a_store_that_cannot_be_reached_is_told_once(tmp_path: Path) -> None:
    (only,) = tried(Unreachable(tmp_path))
    assert not only.ok
    assert "cannot be reached" in only.told


class NoDeletion(FileStore):
    def delete(self, key: str) -> None:
        raise InvalidInput("AccessDenied", f"{key}: allow deleting")


def test_what_could_not_be_removed_is_told(tmp_path: Path) -> None:
    found = tried(NoDeletion(tmp_path))
    assert [one.check for one in found if not one.ok] == ["store, list after write", "store, delete", "store, clean up"]
    assert f"{FOLDER}/abc by hand" in found[-1].fix


# Software and devices


def test_packages_are_held_against_what_the_job_image_needs() -> None:
    wanted = ["pydantic>=2", "torch>=2.13; extra == 'job'", "pytest>=99; extra == 'dev'"]
    good = check_packages(wanted, installed=lambda name: {"pydantic": "2.13", "torch": "2.13.0+cpu"}.get(name))
    assert good.ok
    assert "torch 2.13.0+cpu" in good.told
    bad = check_packages(wanted, installed=lambda name: {"torch": "2.1"}.get(name))
    assert bad.told == "pydantic is missing, torch 2.1 is not >=2.13"
    assert "sae-operator[job]" in bad.fix


@pytest.mark.parametrize(
    ("devices", "wanted", "told", "fix"),
    [
        (CPU, 0, "none asked for", ""),
        (GPU, 0, "2: H100 80.0 GiB, H100 80.0 GiB; CUDA 12.9", ""),
        (GPU, 2, "2: H100", ""),
        (GPU, 4, "2 of 4", "nvidia.com/gpu: 4"),
        (CPU, 1, "0 of 1", "device plugin"),
        (Devices("2.13.0+cpu", None, (), 1, None, False), 0, "built for CPUs", "CUDA build"),
        (Devices("2.13.0", "12.9", (), 1, "3.7.1", True), 1, "sees 0", "driver"),
        (Devices(None, None, (), 0, None, False), 0, "not installed", "sae-operator[job]"),
    ],
)
def test_gpus(devices: Devices, wanted: int, told: str, fix: str) -> None:
    finding = check_devices(devices, wanted, {"NVIDIA_VISIBLE_DEVICES": "void"})
    assert told in finding.told
    assert fix in finding.fix
    assert finding.ok == (not fix)


def test_triton() -> None:
    assert check_triton(CPU).ok
    assert check_triton(GPU).told == "3.7.1"
    missing = check_triton(Devices("2.13.0", "12.9", GPU.gpus, 2, None, False))
    assert missing.fix == "pip install triton"
    module = check_triton(Devices("2.13.0", "12.9", GPU.gpus, 2, "3.7.1", False))
    assert "triton_driver" in module.fix


# The machine


def test_folders_that_cannot_be_written_or_are_full_are_told(tmp_path: Path) -> None:
    good, full = check_folders({"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}, least_free=0)
    assert good.ok
    assert full.ok
    home, temporary = check_folders({"TMPDIR": str(tmp_path / "none")})
    assert home.fix.startswith("set HOME")
    assert "No such file" in temporary.told
    assert "emptyDir" in temporary.fix
    for finding in check_folders({"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}, least_free=2**60):
        assert "make room" in finding.fix


def test_shared_memory_matters_with_several_gpus(tmp_path: Path) -> None:
    assert check_shared_memory(1, folder=tmp_path, least=2**60).ok
    assert "medium: Memory" in check_shared_memory(2, folder=tmp_path, least=2**60).fix
    assert not check_shared_memory(1, folder=tmp_path / "none").ok


# The network


def test_a_pod_that_serves_its_progress_is_reached() -> None:
    with serving(0) as port:
        assert check_own_port("127.0.0.1", port).ok
        peer = check_peer(f"127.0.0.1:{port}")
    assert peer.ok
    assert "step doctor" in peer.told


def test_a_peer_that_is_not_there_or_is_none_of_ours_is_told() -> None:
    (port,) = free_ports(1)
    assert "cannot be reached" in check_peer(f"127.0.0.1:{port}").told
    assert not check_own_port("127.0.0.1", port).ok
    assert "cannot be reached" in check_peer("no-such-host.invalid:80").told

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        told = check_peer(f"127.0.0.1:{server.server_address[1]}")
        thread.join()
    assert "something else" in told.told
    assert not told.ok


# The command


def test_the_command_tells_lines_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["doctor", "--store", f"file://{tmp_path}/store", "--port", "0"]
    assert run_command_line(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("✓ ") for line in lines)
    assert len(lines) > 12
    (peer,) = free_ports(1)
    assert run_command_line([*arguments, "--json", "--peer", f"127.0.0.1:{peer}"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert [one["check"] for one in told["checks"] if not one["ok"]] == [f"peer 127.0.0.1:{peer}"]
    assert {one["check"] for one in told["checks"]} >= {"packages", "GPUs", "Triton", "HOME", "store, ranges"}


def test_a_port_that_is_taken_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(0) as port:
        assert run_command_line(["doctor", "--port", str(port)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("✗")]
    assert "--port" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--store", "nowhere"], "s3://BUCKET/PREFIX"),
        (["--store", "s3://bucket/x", "--endpoint-url", "host"], "http://HOST:PORT"),
        (["--store", "s3://bucket/x", "--secret", "/no/such/folder"], "mount the Secret"),
        (["--peer", "host"], "HOST:PORT"),
        (["--gpus", "-1"], "--gpus"),
    ],
)
def test_a_wrong_use_is_told_with_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command_line(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_store_that_is_refused_is_told_without_its_password(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command_line(["doctor", "--store", "s3://user:hidden@bucket/x"]) == 2
    told = capsys.readouterr().err
    assert "'s3://***@bucket/x' is refused" in told
    assert "hidden" not in told


@pytest.mark.parametrize("seconds", ["inf", "-1", "1e9"])
def test_a_wait_has_an_end(seconds: str) -> None:
    assert run_command_line(["doctor", "--wait", seconds]) == 2

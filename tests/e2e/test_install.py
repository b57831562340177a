"""The base install is light: what the operator's container needs, without torch and without the `kubernetes` client."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(scope="module")
def base_install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with `pip install .` and nothing else; gives its folder of executables."""
    folder = tmp_path_factory.mktemp("base-install")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", ROOT], check=True, timeout=300
    )
    return folder / "bin"


def cpu_seconds(*command: str | Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def test_it_is_at_most_80_mib(base_install: Path) -> None:
    files = (file for file in (base_install.parent / "lib").rglob("*") if file.is_file() and not file.is_symlink())
    assert sum(file.stat().st_size for file in files) <= 80 * MIB


def test_it_brings_neither_torch_nor_the_kubernetes_client(base_install: Path) -> None:
    site_packages = next((base_install.parent / "lib").glob("python3*/site-packages"))
    names = {path.name for path in site_packages.iterdir()}
    assert "kopf" in names
    assert not names & {"torch", "kubernetes", "boto3", "transformers"}


def test_the_operators_help_costs_less_than_a_second_and_a_half(base_install: Path) -> None:
    seconds, done = min(
        (cpu_seconds(base_install / "sae-operator", "--help") for _ in range(3)), key=lambda run: run[0]
    )
    assert done.returncode == 0
    assert "--namespace" in done.stdout
    assert seconds < 1.5


def test_sae_job_names_the_extra_that_is_missing(base_install: Path) -> None:
    _, done = cpu_seconds(base_install / "sae-job", "--help")
    assert done.returncode == 2
    assert "pip install 'sae-operator[cli]'" in done.stderr
    assert "Traceback" not in done.stderr

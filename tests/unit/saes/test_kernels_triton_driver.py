"""Triton's module for the driver is compiled while the image is built, and handed to Triton where no compiler is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sae_job.saes.kernels import triton_driver


def test_it_is_built_without_a_driver_and_asks_for_one_when_it_is_loaded(tmp_path: Path) -> None:
    module = tmp_path / "share" / "cuda_utils.so"
    triton_driver.build_module(module)
    load = f"import ctypes; ctypes.CDLL({str(module)!r})"
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    # Loaded where there is a driver, refused for its absence where there is none; never for anything else.
    assert done.returncode == 0 or "libcuda.so.1" in done.stderr
    assert b"PyInit_cuda_utils" in module.read_bytes()
    assert b"libcuda.so.1" in module.read_bytes()


@pytest.fixture
def knobs(monkeypatch: pytest.MonkeyPatch) -> object:
    build = pytest.importorskip("triton.knobs").build
    monkeypatch.setattr(build, "impl", None)
    monkeypatch.delenv("CC", raising=False)
    return build


def test_triton_gets_it_where_there_is_no_compiler(
    knobs: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "cuda_utils.so"
    module.touch()
    monkeypatch.setattr(triton_driver, "built_module", lambda: module)
    monkeypatch.setenv("PATH", str(tmp_path))
    triton_driver.use_built_module()
    impl = knobs.impl  # pyright: ignore[reportAttributeAccessIssue]
    assert impl("cuda_utils", "source", "folder", [], [], []) == str(module)
    with pytest.raises(RuntimeError, match="no C compiler"):
        impl("another", "source", "folder", [], [], [])


def test_triton_compiles_it_where_there_is_a_compiler_or_nothing_was_built(
    knobs: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "cuda_utils.so"
    monkeypatch.setattr(triton_driver, "built_module", lambda: module)
    with monkeypatch.context() as without_compiler:
        without_compiler.setenv("PATH", str(tmp_path))
        triton_driver.use_built_module()
    module.touch()
    monkeypatch.setenv("CC", "cc")
    triton_driver.use_built_module()
    assert knobs.impl is None  # pyright: ignore[reportAttributeAccessIssue]

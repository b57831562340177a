"""The GPU benchmark runs, on a CPU, and says what it says on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.testbed.paths import CHECKOUT


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench/gpu.py", *arguments]
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )


def test_the_last_line_has_the_figures_of_each_shape() -> None:
    done = run("--quick", "--device", "cpu", "--no-peers", "--shape", "16,64")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens_per_second_64"] > 0
    assert figures["ms_per_step_64"] > 0
    assert figures["x_floor_64"] > 0
    assert figures["topk_vs_sparsify_64"] is None
    for part in ("encoder product", "top-k", "decode and value gradients", "weight gradients", "Adam"):
        assert done.stdout.count(part) == 1


def test_without_a_gpu_it_says_so() -> None:
    done = run(environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "CUDA device" in done.stderr

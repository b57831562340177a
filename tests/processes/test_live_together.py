"""A live source in several processes: each computes activations and trains on its rows; the curve is that of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_job.training.place import ALONE, Place
from tests.live_job import LiveJob, write_inputs
from tests.rank_processes import in_processes


def trained(place: Place, job: LiveJob) -> Any:
    return job.train(place=place).exit_code


def losses(job: LiveJob) -> list[float]:
    lines = map(json.loads, (job.output / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_the_curve_is_that_of_one_process(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    jobs: dict[int, LiveJob] = {}
    for size in (1, 2):
        job = jobs[size] = LiveJob.make(tmp_path, tmp_path / f"out{size}")
        assert job.preflight().exit_code == 0
        meeting = tmp_path / f"meeting{size}"
        meeting.mkdir()
        told = in_processes(size, trained, meeting, job) if size > 1 else [trained(ALONE, job)]
        assert told == [0] * size
    assert losses(jobs[2]) == pytest.approx(losses(jobs[1]), rel=1e-5)

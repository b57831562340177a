"""A median stop in several processes: the first one alone talks to the store, and all do what it decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_job.storage.file_store import FileStore
from sae_job.training.place import ALONE, Place
from tests.faults import FaultPlan
from tests.rank_processes import in_processes
from tests.small_cache import write_small_cache
from tests.small_training import Job, train_step

FOLDER = "median-stop"


def trained(place: Place, job: Job) -> Any:
    """How the job ends here, and how often this process asked for the folder."""
    calls = FaultPlan()
    result = job.run(calls, place=place)
    return result.exit_code, sum(FOLDER in name for name in calls.names)


def job_in(cache: Path, output: Path, others: list[float], min_saes: int) -> Job:
    store = FileStore(output / FOLDER)
    for number, figure in enumerate(others):
        record = {"metric": "explained_variance", "figure": figure, "median": None, "others": 0, "stopped": False}
        store.put(f"other{number}.json", json.dumps(record).encode())
    return Job(cache, output, train_step(medianStop={"afterTokens": 200, "minSaes": min_saes}))


def phases(job: Job) -> dict[str, tuple[str, str | None]]:
    results = json.loads((job.output / "results.json").read_text())
    return {sae["name"]: (sae["phase"], sae["message"]) for sae in results["saes"]}


def test_all_processes_give_up_the_same_sae(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_small_cache(FileStore(cache))
    free = job_in(cache, tmp_path / "free", [], 1000)
    trained(ALONE, free)
    paths = list((free.output / FOLDER).iterdir())
    figures = sorted(json.loads(path.read_bytes())["figure"] for path in paths)
    middle = sum(figures) / 2
    alone, together = (job_in(cache, tmp_path / name, [middle] * 3, 3) for name in ("alone", "together"))
    assert trained(ALONE, alone)[0] == 0
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    first, second = in_processes(2, trained, meeting, together)
    assert (first[0], second) == (0, (0, 0))
    assert first[1] > 0
    assert sorted(phase for phase, _ in phases(together).values()) == ["Stopped", "Succeeded"]
    assert {name: phase for name, (phase, _) in phases(together).items()} == {
        name: phase for name, (phase, _) in phases(alone).items()
    }
    assert any("the median of 4 other SAEs" in (message or "") for _, message in phases(together).values())

"""What the step `train` leaves when it is done."""

from __future__ import annotations

import json
from pathlib import Path

from sae_job.storage.file_store import FileStore
from tests.small_cache import write_small_cache
from tests.small_training import Job, train_step


def test_results_tell_what_was_trained(tmp_path: Path) -> None:
    write_small_cache(FileStore(tmp_path / "cache"))
    job = Job(tmp_path / "cache", tmp_path / "out", train_step())
    job.run()
    results = json.loads((job.output / "results.json").read_text())
    assert results["tokens"] == 608
    topk, standard = results["saes"]
    assert (topk["name"], standard["name"]) == ("topk", "standard")
    assert topk["explained_variance"] > topk["explained_variance_at_10_percent"]
    assert topk["ce_loss_score"] is None
    assert results["provenance"]["cache"]["identity"] == "0123456789abcdef"
    assert results["provenance"]["resolved"]["saes"]["topk"]["scale"] > 0
    lines = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["sae"] == "topk" and "evaluation" in line][-1]
    assert last["evaluation"]["explained_variance"] == topk["explained_variance"]
    assert "<html" in (job.output / "report.html").read_text()

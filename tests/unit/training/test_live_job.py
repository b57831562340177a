"""Training beside the model: the same SAEs as from a cache, and nothing stored but contexts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput, Stopped
from sae_job.saes.base import SAE
from tests.faults import folder_bytes
from tests.live_job import TOKENS, LiveJob, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def results_of(job: LiveJob) -> dict[str, Any]:
    return json.loads((job.output / "results.json").read_text())


@pytest.mark.parametrize("mode", ["none", "layer_norm"])
def test_the_saes_are_those_of_the_same_job_on_a_cache(
    inputs: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of shards as small as these, more of a cache than of a live source are mixed.
    monkeypatch.setattr("sae_job.activations.reader.MOST_MIX_SHARDS", 8)
    # More than one pass over the rows.
    training = {"tokens": 2 * TOKENS, "batchSize": 256, "learningRate": 0.01}
    parts = {"normalization": mode, "training": training, "checkpoints": {"everySeconds": 3600}}
    live = LiveJob.make(inputs, tmp_path / "live", **parts)
    cached = LiveJob.make_cached(inputs, tmp_path / "cached", tmp_path / "caches", **parts)
    live.preflight()
    live.train()
    cached.build_cache()
    cached.train()
    left, expected = live.left(), cached.left()
    assert {"topk/sae_weights.safetensors", "standard/sae_weights.safetensors", "metrics.jsonl"} <= expected.keys()
    # Markers and logs tell who wrote them.
    for name in expected.keys() - {"sae-operator.json"}:
        assert left[name] == expected[name], name
    assert left.keys() == expected.keys()


def test_its_scale_is_measured_on_the_first_rows(inputs: Path, tmp_path: Path) -> None:
    live = LiveJob.make(inputs, tmp_path / "live")
    cached = LiveJob.make_cached(inputs, tmp_path / "cached", tmp_path / "caches")
    live.preflight()
    live.train()
    cached.build_cache()
    cached.train()
    measured, exact = (results_of(job)["provenance"]["resolved"]["saes"]["topk"]["scale"] for job in (live, cached))
    # The same contexts, with the rows that shards have no room for.
    assert measured == pytest.approx(exact, rel=0.01)
    assert measured != 1


def test_results_tell_that_the_model_ran_beside_the_training(inputs: Path, tmp_path: Path) -> None:
    job = LiveJob.make(inputs, tmp_path / "out")
    job.preflight()
    result = job.train()
    assert result.tokens == 1600
    results = results_of(job)
    provenance = results["provenance"]
    assert "cache" not in provenance
    assert provenance["live"]["model"]["name"] == str(inputs / "model")
    assert (provenance["live"]["rows"], provenance["live"]["hooks"]) == (TOKENS, ["model.layers.1"])
    assert provenance["live"]["uri"].endswith("out/activations")
    assert "live" in (job.output / "report.html").read_text()
    sae = SAE.load(job.output / "topk")
    assert (sae.cfg.model_name, sae.cfg.hook_name) == (str(inputs / "model"), "model.layers.1")
    assert (sae.cfg.context_size, sae.cfg.hook_layer) == (16, 1)


def test_the_contexts_stay_and_no_activations_are_stored(inputs: Path, tmp_path: Path) -> None:
    job = LiveJob.make(inputs, tmp_path / "out")
    job.preflight()
    prepared = folder_bytes(job.output / "activations")
    assert {"tokens/index.json", "tokens/000000.safetensors", "sae-operator.json"} <= prepared.keys()
    job.train()
    assert folder_bytes(job.output / "activations") == prepared
    assert not (job.output / "activations/shards").exists()


def test_held_out_rows_are_of_the_first_contexts_and_the_score_is_taken_there(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = {"heldOutTokens": 300, "metrics": ["explained_variance", "ce_loss_score"]}
    live = LiveJob.make(inputs, tmp_path / "live", evaluation=evaluation, normalization="constant_norm_rescale")
    cached = LiveJob.make_cached(
        inputs,
        tmp_path / "cached",
        tmp_path / "caches",
        evaluation=evaluation,
        normalization="constant_norm_rescale",
    )
    live.preflight()
    live.train()
    cached.build_cache()
    monkeypatch.setattr("sae_job.activations.reader.MOST_MIX_SHARDS", 8)
    cached.train()
    assert results_of(live)["saes"] == results_of(cached)["saes"]
    assert results_of(live)["held_out_tokens"] == 300
    assert results_of(live)["saes"][0]["ce_loss_score"] is not None


def test_training_without_contexts_tells_what_is_missing(inputs: Path, tmp_path: Path) -> None:
    job = LiveJob.make(inputs, tmp_path / "out")
    with pytest.raises(InvalidInput, match="preflight") as caught:
        job.train()
    assert caught.value.reason == "NotPrepared"


def test_two_hooks_share_the_forward_pass(inputs: Path, tmp_path: Path) -> None:
    saes = [
        {"name": f"on{layer}", "hook": f"model.layers.{layer}", "architecture": {"type": "topk", "k": 3}, "dSae": 24}
        for layer in (0, 2)
    ]
    hooks = ("model.layers.0", "model.layers.2")
    live = LiveJob.make(inputs, tmp_path / "live", hooks=hooks, saes=saes, normalization="none")
    live.preflight()
    live.train()
    for layer in (0, 2):
        sae = SAE.load(live.output / f"on{layer}")
        assert sae.cfg.hook_layer == layer
        assert torch.isfinite(sae.W_dec).all()
    assert results_of(live)["saes"][0]["explained_variance"] != results_of(live)["saes"][1]["explained_variance"]


def test_a_checkpoint_of_a_live_job_is_not_continued_from_a_cache(inputs: Path, tmp_path: Path) -> None:
    live = LiveJob.make(inputs, tmp_path / "out")
    live.preflight()
    with pytest.raises(Stopped):
        live.train(should_stop=stop_after_calls(10))
    before = folder_bytes(live.output)
    assert any(name.startswith("checkpoints/") for name in before)
    for state in live.output.glob("checkpoints/*/state.json"):
        assert len(json.dumps(json.loads(state.read_text())["stream"])) < 512
    cached = LiveJob.make_cached(inputs, tmp_path / "out", tmp_path / "caches")
    cached.build_cache()
    for step in (cached.preflight, cached.train):
        with pytest.raises(InvalidInput) as caught:
            step()
        assert (caught.value.reason, caught.value.field) == ("OutputTaken", "spec.activations")
    assert folder_bytes(live.output) == before


def stop_after_calls(calls: int) -> Callable[[], bool]:
    """Asks to stop when it has been asked so often; training asks before each step."""
    left = iter(range(calls))
    return lambda: next(left, None) is None

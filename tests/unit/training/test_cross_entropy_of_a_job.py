"""A job that asks for the CE-loss score, on a real (tiny) language model: cached, trained on and spliced into."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from sae_job.reporting.progress import ProgressReporter
from sae_job.run.cache import run_cache
from sae_job.run.context import StepContext
from sae_job.run.finalize import run_finalize
from sae_job.run.prepare import run_prepare
from sae_job.run.train import run_train
from sae_job.storage.open import open_store
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_location
from sae_operator.api.steps import CacheStep, CacheStepName, TrainStep
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.tiny_model import write_tiny_model, write_tiny_text


def test_a_better_reconstruction_keeps_more_of_the_models_loss(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    text = write_tiny_text(tmp_path / "text", documents=40)
    cache = {
        "model": {"name": str(model), "dtype": "float32"},
        "dataset": {"path": str(text)},
        "hooks": [{"name": "model.layers.1"}],
        "contextSize": 32,
        "tokens": 6000,
        "sampling": {"maxNormRatio": 0},
        "storage": {"uri": f"file://{tmp_path}/caches", "dtype": "float32"},
    }
    spec = SAETrainingJobSpec.model_validate(
        {
            "activations": {"cache": cache},
            "saes": [
                {"name": "wide", "architecture": {"type": "topk", "k": 16}, "dSae": 128},
                {"name": "narrow", "architecture": {"type": "topk", "k": 1}, "dSae": 128},
            ],
            "training": {"tokens": 6400, "batchSize": 64, "learningRate": 0.003},
            "evaluation": {"heldOutTokens": 600, "metrics": ["explained_variance", "ce_loss_score"]},
            "output": {"uri": f"file://{tmp_path}/out"},
        }
    )
    context = StepContext(
        reporter=ProgressReporter("test"),
        should_stop=lambda: False,
        open_store=open_store,
        work_directory=tmp_path,
        now=time.monotonic,
    )
    cached = ActivationCacheSpec.model_validate(cache)
    location = cache_location(cached, "ns")

    def cache_step(step: CacheStepName) -> CacheStep:
        return CacheStep(step=step, namespace="ns", name="cache", uid="u", spec=cached, location=location)

    run_prepare(cache_step("prepare"), context)
    run_cache(cache_step("cache"), context)
    run_finalize(cache_step("finalize"), context)
    step = TrainStep(step="train", namespace="ns", name="job", uid="u", spec=spec, activations=location, cache=cached)
    result = run_train(step, context)

    results = json.loads((tmp_path / "out/results.json").read_text())
    wide, narrow = results["saes"]
    clean, ablated = wide["ce_loss_clean"], wide["ce_loss_with_ablation"]
    assert (clean, ablated) == (narrow["ce_loss_clean"], narrow["ce_loss_with_ablation"])
    # A random model predicts nothing, so even ablation costs it little; what counts is how far the loss moves.
    assert 0 < abs(wide["ce_loss_with_sae"] - clean) < abs(narrow["ce_loss_with_sae"] - clean)
    for sae in results["saes"]:
        assert sae["ce_loss_score"] == pytest.approx((ablated - sae["ce_loss_with_sae"]) / (ablated - clean))
    assert [sae.ce_loss_score for sae in result.saes or []] == [wide["ce_loss_score"], narrow["ce_loss_score"]]
    assert (wide["l0"], wide["mse"]) == (None, None)
    configuration = json.loads((tmp_path / "out/wide/cfg.json").read_text())
    assert (configuration["hook_name"], configuration["context_size"]) == ("model.layers.1", 32)

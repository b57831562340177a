"""A job that asks for the CE-loss score, on a real (tiny) language model: cached, trained on and spliced into."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_job.errors import Stopped
from sae_job.reporting.progress import ProgressReporter
from sae_job.saes.base import SAE
from sae_job.steps.cache import run_cache
from sae_job.steps.context import StepContext
from sae_job.steps.finalize import run_finalize
from sae_job.steps.prepare import run_prepare
from sae_job.steps.train import run_train
from sae_job.storage.base import StoreError
from sae_job.storage.open import open_store
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_location
from sae_operator.api.steps import CacheStep, CacheStepName, TrainStep
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.tiny_model import SPECIAL_TOKENS, write_tiny_model, write_tiny_text


def held_out_contexts(folder: Path, uri: str) -> torch.Tensor:
    """The first contexts of the cache that hold 600 rows."""
    contexts = load_file(f"{uri.removeprefix('file://')}/tokens/000000.safetensors")["contexts"]
    rows = (contexts >= len(SPECIAL_TOKENS)).sum(dim=1).cumsum(dim=0)
    return contexts[: int((rows < 600).sum()) + 1].long()


def costs_of_sae(folder: Path, contexts: torch.Tensor, name: str) -> tuple[float, float]:
    """Cross-entropy with the SAE spliced in at the first 600 rows, and divergence from the clean predictions, by the
    model's own library alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    sae = SAE.load(str(folder / "out" / name))
    usable = contexts >= len(SPECIAL_TOKENS)
    replaced = usable & (usable.flatten().cumsum(dim=0).reshape(usable.shape) <= 600)

    def splice(module: torch.nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        changed = torch.where(replaced.unsqueeze(-1), sae(hidden), hidden)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    with torch.no_grad():
        clean = model(contexts).logits.double().log_softmax(dim=-1)
        model.get_submodule("model.layers.1").register_forward_hook(splice)
        spliced = model(contexts).logits.double().log_softmax(dim=-1)
    losses = torch.nn.functional.nll_loss(spliced[:, :-1].transpose(1, 2), contexts[:, 1:], reduction="none")
    divergences = torch.nn.functional.kl_div(spliced, clean, reduction="none", log_target=True).sum(dim=-1)
    return float(losses[usable[:, 1:]].mean()), float(divergences[usable].mean())


METRICS = ["explained_variance", "ce_loss_score", "kl_divergence_score"]


def test_the_score_is_of_the_loss_with_the_sae_spliced_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            "evaluation": {"heldOutTokens": 600, "metrics": METRICS},
            "output": {"uri": f"file://{tmp_path}/out"},
        }
    )
    context = StepContext(
        reporter=ProgressReporter("test"),
        should_stop=lambda: False,
        open_store=open_store,
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
    with monkeypatch.context() as without_model:

        def interrupted(*arguments: object, **options: object) -> None:
            raise StoreError("interrupted")

        without_model.setattr("sae_job.models.mirror.load_full_model", interrupted)
        with pytest.raises(StoreError, match="interrupted"):
            run_train(step, context)
    # The training is done and safe: what is left is the score.
    assert [folder.name for folder in (tmp_path / "out/checkpoints").iterdir()] == ["6400"]
    with pytest.raises(Stopped, match="while the CE-loss score was taken") as stopped:
        run_train(step, replace(context, should_stop=lambda: True))
    assert stopped.value.tokens == 6400
    seen: list[int] = []
    again = replace(context, reporter=ProgressReporter("test", listeners=(lambda state: seen.append(state.tokens),)))
    result = run_train(step, again)
    assert set(seen) == {6400}

    results = json.loads((tmp_path / "out/results.json").read_text())
    wide, narrow = results["saes"]
    clean, ablated = wide["ce_loss_clean"], wide["ce_loss_with_ablation"]
    assert (clean, ablated) == (narrow["ce_loss_clean"], narrow["ce_loss_with_ablation"])
    contexts = held_out_contexts(tmp_path, location.uri)
    for sae in results["saes"]:
        loss, divergence = costs_of_sae(tmp_path, contexts, sae["name"])
        assert sae["ce_loss_with_sae"] == pytest.approx(loss, rel=1e-5)
        assert sae["kl_divergence_with_sae"] == pytest.approx(divergence, rel=1e-4)
    for sae in results["saes"]:
        assert sae["ce_loss_score"] == pytest.approx((ablated - sae["ce_loss_with_sae"]) / (ablated - clean))
    assert [sae.ce_loss_score for sae in result.saes or []] == [wide["ce_loss_score"], narrow["ce_loss_score"]]
    assert (wide["l0"], wide["mse"]) == (None, None)
    configuration = json.loads((tmp_path / "out/wide/cfg.json").read_text())
    assert (configuration["hook_name"], configuration["context_size"]) == ("model.layers.1", 32)
    for sae in results["saes"]:
        ablated_by = sae["kl_divergence_with_ablation"]
        assert sae["kl_divergence_score"] == pytest.approx(1 - sae["kl_divergence_with_sae"] / ablated_by)

    # The same job, which looks at the model meanwhile and is interrupted while it does.
    evaluation = {"heldOutTokens": 600, "metrics": METRICS, "modelEveryTokens": 2000}
    looking = SAETrainingJobSpec.model_validate(
        {**spec.to_manifest(), "evaluation": evaluation, "output": {"uri": f"file://{tmp_path}/looking"}}
    )
    step = step.model_copy(update={"spec": looking})
    # 33 steps until 2,000 tokens; then 4 chunks of rows and forward passes of the model, of which some are left.
    asked = iter(range(10**6))
    with pytest.raises(Stopped):
        run_train(step, replace(context, should_stop=lambda: next(asked) > 36))
    run_train(step, context)
    lines = [json.loads(line) for line in (tmp_path / "looking/metrics.jsonl").read_text().splitlines()]
    meanwhile = [line for line in lines if "model_evaluation" in line and line["sae"] == "wide"]
    # After the steps that crossed 2,000, 4,000 and 6,000 tokens; the clean model is always the same.
    assert [line["tokens"] for line in meanwhile] == [2048, 4032, 6016]
    assert {line["model_evaluation"]["ce_loss_clean"] for line in meanwhile} == {clean}
    # Looking changed nothing.
    for name in ("wide/sae_weights.safetensors", "narrow/sae_weights.safetensors"):
        assert (tmp_path / "looking" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

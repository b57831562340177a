"""The loop over n SAEs: each is trained as if alone, and one that breaks does not disturb the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.activations.manifest import read_manifest
from sae_job.activations.reader import CachedActivations
from sae_job.errors import InvalidInput
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, denormalize_rows, normalize_rows
from sae_job.storage.file_store import FileStore
from sae_job.training.trainer import METRICS, Trainer
from tests.small_cache import write_small_cache
from tests.small_training import STANDARD, TOPK, TRAINING, SmallJob, small_job, small_spec


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FileStore:
    store = FileStore(tmp_path_factory.mktemp("cache"))
    write_small_cache(store, hooks=("layer", "other"))
    return store


@pytest.fixture
def open_jobs() -> Iterator[list[SmallJob]]:
    jobs: list[SmallJob] = []
    yield jobs
    for job in jobs:
        job.reader.close()


def on(hook: str, sae: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**sae, "hook": hook, **changes}


def trained(cache: FileStore, jobs: list[SmallJob], saes: list[dict[str, Any]], **parts: Any) -> Trainer:
    job = small_job(cache, small_spec(saes, **parts))
    jobs.append(job)
    job.trainer.initialize()
    while not job.trainer.finished:
        job.trainer.step()
    return job.trainer


def lines_of(trainer: Trainer, sae: str) -> list[dict[str, Any]]:
    return [line for line in trainer.record.lines if line["sae"] == sae]


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_n_saes_are_bit_for_bit_n_single_trainings(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    saes = [on("layer", TOPK), on("layer", STANDARD), on("other", TOPK, name="third", seed=5, dSae=40)]
    together = trained(cache, open_jobs, saes)
    for index, sae in enumerate(saes):
        alone = trained(cache, open_jobs, [sae])
        assert same_tensors(together.saes[index].tensors(), alone.saes[0].tensors())
        assert lines_of(together, sae["name"]) == lines_of(alone, sae["name"])


def test_training_helps(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    trainer = trained(cache, open_jobs, [on("layer", TOPK)], training={**TRAINING, "tokens": 6400})
    first = trainer.record.evaluation_after(trainer.plan.tenth_step, "topk")["explained_variance"]
    last = trainer.record.evaluation_after(trainer.plan.steps, "topk")["explained_variance"]
    assert first is not None
    assert last is not None
    assert last > first + 0.02
    assert last > 0.6


def test_lines_tell_the_values_that_the_step_used(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    training = {**TRAINING, "warmUpSteps": 4, "decaySteps": 5, "logEverySteps": 1}
    trainer = trained(cache, open_jobs, [on("layer", TOPK)], training=training)
    logged = [line for line in trainer.record.lines if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, 20))
    assert [line["tokens"] for line in logged] == [32 * step for step in range(1, 20)]
    rates = [line["learning_rate"] for line in logged]
    assert rates[:5] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])
    assert rates[-5:] == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])
    assert logged[0]["dead_features"] == 0
    assert all(line["l0"] <= 3 for line in logged)


def test_decoder_rows_keep_unit_norm_and_the_saved_sae_sees_raw_activations(
    cache: FileStore, open_jobs: list[SmallJob]
) -> None:
    trainer = trained(cache, open_jobs, [on("layer", TOPK)])
    (sae,) = trainer.saes
    rows = sae.tensors()["weights.W_dec"]
    torch.testing.assert_close(torch.linalg.vector_norm(rows, dim=1), torch.ones(len(rows)))
    folded = sae.inference()
    assert sae.plan.scale != 1
    torch.testing.assert_close(folded.W_dec * sae.plan.scale, rows)
    assert folded.cfg.normalize_activations == "none"


@pytest.mark.parametrize("mode", RUN_TIME_NORMALIZATIONS)
def test_rows_are_normalised_before_each_step_and_by_the_saved_sae(
    cache: FileStore, open_jobs: list[SmallJob], mode: str
) -> None:
    """The same weights come from plain training on a stream of rows that are normalised already."""

    class Normalized:
        def __init__(self, stream: CachedActivations) -> None:
            self._stream = stream
            self.training_rows, self.state, self.restore = stream.training_rows, stream.state, stream.restore
            self.next_places = stream.next_places

        def next_batch(self) -> dict[str, torch.Tensor]:
            return {hook: normalize_rows(rows, mode)[0] for hook, rows in self._stream.next_batch().items()}

    trainer = trained(cache, open_jobs, [on("layer", TOPK), on("layer", STANDARD)], normalization=mode)
    job = small_job(cache, small_spec([on("layer", TOPK), on("layer", STANDARD)], normalization="none"))
    open_jobs.append(job)
    job.trainer._stream = Normalized(job.reader)
    job.trainer.initialize()
    while not job.trainer.finished:
        job.trainer.step()
    rows = job.reader.held_out(40).activations["layer"]
    normalized, statistics = normalize_rows(rows, mode)
    for sae, plain in zip(trainer.saes, job.trainer.saes, strict=True):
        assert same_tensors(sae.tensors(), plain.tensors())
        saved = sae.inference()
        assert saved.cfg.normalize_activations == mode
        reconstruction = denormalize_rows(plain.inference()(normalized), statistics)
        assert torch.equal(saved(rows), reconstruction)
        # What is told is of raw activations.
        squared_error = float((reconstruction - rows).double().square().sum())
        told = trainer.record.evaluation_after(trainer.plan.steps, sae.name)
        assert told["mse"] == pytest.approx(squared_error / 40, rel=1e-6)


def test_expected_average_is_folded_like_any_other_scale(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    trainer = trained(cache, open_jobs, [on("layer", TOPK)], normalization="expected_average_only_in")
    (sae,) = trainer.saes
    mean_norm = read_manifest(cache).hook("layer").mean_norm
    assert sae.plan.scale == pytest.approx(6**0.5 / mean_norm)
    folded = sae.inference()
    torch.testing.assert_close(folded.W_dec * sae.plan.scale, sae.tensors()["weights.W_dec"])
    assert folded.cfg.normalize_activations == "none"


def test_one_broken_sae_is_frozen_with_the_fix_and_the_others_go_on(
    cache: FileStore, open_jobs: list[SmallJob]
) -> None:
    broken = on("layer", TOPK, name="broken", training={"learningRate": 1e9})
    trainer = trained(cache, open_jobs, [broken, on("layer", STANDARD)])
    failure = trainer.saes[0].failure
    assert failure is not None
    assert "step" in failure
    assert "spec.saes[0].training.learningRate" in failure
    assert "1e+08" in failure
    assert trainer.saes[1].failure is None
    alone = trained(cache, open_jobs, [on("layer", STANDARD)])
    assert same_tensors(trainer.saes[1].tensors(), alone.saes[0].tensors())
    snapshot = trainer.snapshot({})
    assert list(snapshot.saes) == ["standard"]


def test_weights_that_the_last_step_breaks_are_found(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    job = small_job(cache, small_spec([on("layer", TOPK), on("layer", STANDARD)]))
    open_jobs.append(job)
    job.trainer.initialize()
    while job.trainer.steps_done < job.plan.steps - 1:
        job.trainer.step()
    optimizer = job.trainer.saes[0]._optimizer
    optimizer.param_groups[0]["eps"] = float("nan")
    job.trainer.step()
    failure = job.trainer.saes[0].failure
    assert failure is not None
    assert f"weights are not finite after step {job.plan.steps - 1}" in failure
    assert job.trainer.saes[1].failure is None


def test_the_job_ends_when_all_saes_are_broken(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    with pytest.raises(InvalidInput) as caught:
        trained(cache, open_jobs, [on("layer", TOPK)], training={**TRAINING, "learningRate": 1e9})
    assert caught.value.reason == "TrainingDiverged"
    assert "topk" in caught.value.message


def test_gradients_are_clipped(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    plain = trained(cache, open_jobs, [on("layer", TOPK)])
    clipped = trained(cache, open_jobs, [on("layer", TOPK)], training={**TRAINING, "gradientClipNorm": 0.01})
    moments = [trainer.saes[0].tensors()["optimizer.b_dec.exp_avg"] for trainer in (plain, clipped)]
    assert float(moments[1].norm()) <= 0.01 < float(moments[0].norm())


def test_only_metrics_asked_for_are_kept(cache: FileStore, open_jobs: list[SmallJob]) -> None:
    trainer = trained(cache, open_jobs, [on("layer", TOPK)], evaluation={"heldOutTokens": 40, "metrics": ["l0"]})
    figures = trainer.record.evaluation_after(trainer.plan.steps, "topk").keys()
    assert figures & METRICS == {"l0"}
    # What is cheap and has no name of its own in the spec is always there.
    assert {"l2_ratio", "cossim"} <= figures


def test_data_dtype_does_not_change_the_readers_batch(tmp_path: Path, open_jobs: list[SmallJob]) -> None:
    store = FileStore(tmp_path)
    write_small_cache(store, dtype=torch.bfloat16)
    trainer = trained(store, open_jobs, [TOPK])
    assert trainer.saes[0].failure is None
    assert trainer.record.evaluation_after(trainer.plan.steps, "topk")["l0"] is not None

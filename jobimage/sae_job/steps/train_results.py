"""What a finished training leaves in its output: SAEs, metrics, report, results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from sae_job.activations.reader import HeldOut
from sae_job.reporting.report import render_report
from sae_job.saes.config import Layout
from sae_job.steps.activation_sources import ActivationSource
from sae_job.steps.model_evaluation import MODEL_FIGURES
from sae_job.steps.output_marker import RESULTS_KEY
from sae_job.storage.base import ObjectStore
from sae_job.training.checkpoints import metrics_lines
from sae_job.training.trainer import Trainer
from sae_operator.api.steps import TrainStep

METRICS_KEY, REPORT_KEY = "metrics.jsonl", "report.html"
PACKAGES = ("sae-operator", "torch", "safetensors")


@dataclass(frozen=True)
class Training:
    """A training that has come to its end.

    Attributes:
        trainer: with its SAEs.
        source: of its activations.
        held_out: rows that it was evaluated on.
        seconds: that it took, earlier attempts included.
        device: that it ran on.
        processes: how many trained together, in this last attempt.
    """

    trainer: Trainer
    source: ActivationSource
    held_out: HeldOut
    seconds: float
    device: torch.device
    processes: int


def leave_saes(output: ObjectStore, trainer: Trainer, layout: Layout) -> dict[str, list[float]]:
    """Write the SAEs and the metrics, before anything can go wrong with the score; returns their log10 densities."""
    densities: dict[str, list[float]] = {}
    for sae in trainer.sound():
        log_densities = sae.log_densities()
        sae.inference().save(output, sae.name, log_sparsity=log_densities, layout=layout)
        if log_densities is not None:
            densities[sae.name] = log_densities.tolist()
    output.put(METRICS_KEY, metrics_lines(trainer.record.lines))
    return densities


def leave_results(
    output: ObjectStore,
    step: TrainStep,
    trainer: Trainer,
    results: Mapping[str, Any],
    densities: dict[str, list[float]],
) -> None:
    """Write report and results; results.json last, since its presence means that all is there."""
    thresholds = {
        sae.name: sae.inference().state_dict()["threshold"].float().flatten().tolist()
        for sae in trainer.sound()
        # Other architectures are saved with one threshold that all latents share.
        if sae.plan.spec.architecture.type == "jumprelu"
    }
    report = render_report(dict(results), trainer.record.lines, densities, step.spec.to_manifest(), thresholds)
    output.put(REPORT_KEY, report.encode())
    output.put(RESULTS_KEY, (json.dumps(results, indent=2, allow_nan=False) + "\n").encode())


def results_of(
    step: TrainStep,
    training: Training,
    figures: Mapping[str, Mapping[str, float | None]],
    last_good: Mapping[str, str],
) -> dict[str, Any]:
    """Content of results.json.

    Args:
        step: the job.
        training: at its end.
        figures: SAE -> what it costs the language model.
        last_good: SAE that failed -> key of the folder with its last good weights, where there are any.
    """
    plan = training.trainer.plan
    return {
        "name": step.name,
        "namespace": step.namespace,
        "saes": [
            _sae_results(training.trainer, index, figures, last_good) for index in range(len(training.trainer.saes))
        ],
        "tokens": plan.tokens,
        "held_out_tokens": len(training.held_out.sequence),
        "tokens_per_second": plan.tokens / training.seconds if training.seconds > 0 else None,
        "provenance": {
            **training.source.facts(),
            "spec": step.spec.to_manifest(),
            "resolved": plan.record(),
            "versions": {package: version(package) for package in PACKAGES},
            "device": torch.cuda.get_device_name(training.device) if training.device.type == "cuda" else "cpu",
            "processes": training.processes,
            "threads": torch.get_num_threads(),
        },
    }


def _sae_results(
    trainer: Trainer,
    index: int,
    figures: Mapping[str, Mapping[str, float | None]],
    last_good: Mapping[str, str],
) -> dict[str, Any]:
    sae = trainer.saes[index]
    # An SAE that was stopped early has its last figures before the job's last evaluation.
    last = trainer.record.last_evaluation(sae.name)
    tenth = trainer.record.evaluation_after(trainer.plan.tenth_step, sae.name)
    of_model = figures.get(sae.name, {})
    return {
        "name": sae.name,
        "phase": "Succeeded" if sae.phase == "Running" else sae.phase,
        "message": sae.message,
        "hook": sae.plan.hook,
        "target_hook": sae.plan.target_hook if sae.plan.is_transcoder else None,
        "architecture": sae.plan.spec.architecture.type,
        "d_in": sae.plan.d_in,
        "d_out": sae.plan.d_out,
        "d_sae": sae.plan.d_sae,
        "tokens": trainer.tokens_of(sae.name),
        "last_good": last_good.get(sae.name),
        **dict.fromkeys(("explained_variance", "l0", "mse", "dead_fraction")),
        **last,
        "explained_variance_at_10_percent": tenth.get("explained_variance"),
        **{name: of_model.get(name) for name in MODEL_FIGURES},
        "loss": trainer.record.latest(sae.name).get("loss"),
    }

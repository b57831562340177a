"""One side of the training benchmark: holds an SAE, and trains it so many steps when told to.

    python training_worker.py SIDE ARCHITECTURE K BATCH START

Run by the Python of the side's own environment, so it imports nothing but PyTorch before it knows the side. It reads
one request a line and answers with one line of JSON: `steps N` trains N steps, and is answered with the CPU seconds
that they took; `gradients PATH` writes the loss and the gradients of the first batch to PATH. START is a safetensors
file with the weights to begin with and the batches, the same for all sides.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import time
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LEARNING_RATE = 1e-3
L1_COEFFICIENT = 5.0


class Side(Protocol):
    """A library's training step."""

    def step(self, x: Tensor) -> None:
        """One step: gradients, constraint, optimiser, and the counters that the library keeps."""
        ...

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        """`loss` (squared error, summed over d_in, mean over rows, and penalties), `W_enc` [d_in, d_sae], `b_enc`,
        `W_dec` [d_sae, d_in], `b_dec`: its gradients."""
        ...


class Ours:
    """The product's step as its trainer runs it."""

    def __init__(self, architecture: str, k: int, start: dict[str, Tensor], batch: int) -> None:
        from sae_job.saes.architectures import build_trainable
        from sae_job.saes.config import Provenance
        from sae_job.training.plan import resolve_plan
        from sae_job.training.sae_training import SaeTraining
        from sae_operator.api.training_job import SAETrainingJobSpec

        d_in = start["W_dec"].shape[1]
        kind: dict[str, Any] = {"type": "topk", "k": k}
        if architecture == "standard":
            kind = {"type": "standard", "l1Coefficient": L1_COEFFICIENT}
        tokens = batch * 10**6
        spec = SAETrainingJobSpec.model_validate(
            {
                "activations": {"uri": "file://unused"},
                "saes": [{"name": "sae", "architecture": kind, "dSae": start["W_dec"].shape[0]}],
                "training": {"batchSize": batch, "tokens": tokens, "learningRate": LEARNING_RATE, "decaySteps": 0},
                "normalization": "none",
                "output": {"uri": "file://unused"},
            }
        )
        plan = resolve_plan(spec, cache_rows=tokens, widths={"layer": d_in})
        weights = {name: start[name] for name in ("b_enc", "W_dec", "b_dec")} | {"W_enc_T": start["W_enc"].T}
        self._training = SaeTraining(plan.saes[0], plan, 0, provenance=Provenance(), device=torch.device("cpu"))
        loaded = {f"weights.{name}": tensor for name, tensor in weights.items()}
        self._training.restore(self._training.tensors() | loaded, None)
        self._steps = 0
        # Its gradients alone, for the comparison.
        self._plain = build_trainable(plan.saes[0].spec, d_in, device="cpu")
        with torch.no_grad():
            for name, tensor in weights.items():
                self._plain.parameters_by_name[name].copy_(tensor)

    def step(self, x: Tensor) -> None:
        self._training.step(x, self._steps)
        self._steps += 1

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        from sae_job.saes.trainable import StepInput

        statistics = self._plain.step_gradients(StepInput(x, x, 0, None))
        gradients = {
            name: weight.grad for name, weight in self._plain.parameters_by_name.items() if weight.grad is not None
        }
        encoder = gradients.pop("W_enc_T").T
        return {"loss": statistics.loss, "W_enc": encoder, **gradients}


class Bound:
    """What no step can do without: the encoder's product, and Adam on all weights."""

    def __init__(self, start: dict[str, Tensor], batch: int) -> None:
        self._weights = [tensor.clone().requires_grad_() for tensor in (start["W_enc"].T.contiguous(), start["W_dec"])]
        for weight in self._weights:
            weight.grad = torch.full_like(weight, 1e-3)
        self._bias = start["b_enc"]
        self._pre = torch.empty(batch, self._bias.shape[0])
        self._optimizer = torch.optim.Adam(self._weights, lr=LEARNING_RATE, fused=True)

    def step(self, x: Tensor) -> None:
        with torch.no_grad():
            torch.addmm(self._bias, x, self._weights[0].T, out=self._pre)
        self._optimizer.step()

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        return {}


class Sparsify:
    """The step of eai-sparsify's `Trainer` with its Adam, from the methods of its `SparseCoder` that it calls."""

    def __init__(self, k: int, start: dict[str, Tensor], batch: int) -> None:
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

        d_sae, d_in = start["W_dec"].shape
        self._sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), dtype=torch.float32)
        with torch.no_grad():
            self._sae.encoder.weight.copy_(start["W_enc"].T)
            self._sae.encoder.bias.copy_(start["b_enc"])
            self._sae.W_dec.copy_(start["W_dec"])
            self._sae.b_dec.copy_(start["b_dec"])
        self._optimizer = torch.optim.Adam(self._sae.parameters(), lr=LEARNING_RATE)
        self._tokens_since_fired = torch.zeros(d_sae, dtype=torch.long)

    def step(self, x: Tensor) -> None:
        self._sae.set_decoder_norm_to_unit_norm()
        out = self._sae(x=x, y=x, dead_mask=None)
        fired = torch.zeros_like(self._tokens_since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self._sae.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            self._tokens_since_fired += x.shape[0]
            self._tokens_since_fired[fired] = 0

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        out = self._sae(x=x, y=x, dead_mask=None)
        # Its loss is relative to the batch's variance.
        loss = out.fvu * (x - x.mean(0)).pow(2).sum() / x.shape[0]
        loss.backward()
        gradients = {
            "loss": loss.detach(),
            "W_enc": self._sae.encoder.weight.grad.T,
            "b_enc": self._sae.encoder.bias.grad,
            "W_dec": self._sae.W_dec.grad,
            "b_dec": self._sae.b_dec.grad,
        }
        self._optimizer.zero_grad()
        return gradients


class SaeLens:
    """The step of sae-lens's `SAETrainer`."""

    def __init__(self, architecture: str, k: int, start: dict[str, Tensor], batch: int) -> None:
        from sae_lens import (  # pyright: ignore[reportMissingImports]
            StandardTrainingSAE,
            StandardTrainingSAEConfig,
            TopKTrainingSAE,
            TopKTrainingSAEConfig,
        )
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

        d_sae, d_in = start["W_dec"].shape
        size = {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
        if architecture == "topk":
            sae = TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **size))
        else:
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=L1_COEFFICIENT, **size))
        with torch.no_grad():
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                getattr(sae, name).copy_(start[name])
        config = SAETrainerConfig(
            total_training_samples=batch * 10**6, train_batch_size_samples=batch, lr=LEARNING_RATE, lr_end=LEARNING_RATE
        )
        self._trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self._trainer.step(x)
        self._trainer.n_training_steps += 1

    def gradients(self, x: Tensor) -> dict[str, Tensor]:
        from sae_lens.saes.sae import TrainStepInput  # pyright: ignore[reportMissingImports]

        sae = self._trainer.sae
        sae.train()
        step = TrainStepInput(
            sae_in=x,
            dead_neuron_mask=self._trainer.dead_neurons,
            coefficients=self._trainer.get_coefficients(),
            n_training_steps=0,
            is_logging_step=False,
        )
        loss = sae.training_forward_pass(step).loss
        loss.backward()
        gradients = {name: getattr(sae, name).grad for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        sae.zero_grad()
        return {"loss": loss.detach(), **gradients}


def side_of(name: str, architecture: str, k: int, start: dict[str, Tensor], batch: int) -> Side:
    if name == "ours":
        return Ours(architecture, k, start, batch)
    if name == "bound":
        return Bound(start, batch)
    if name == "sparsify":
        return Sparsify(k, start, batch)
    return SaeLens(architecture, k, start, batch)


def main(name: str, architecture: str, k: str, batch: str, start_path: str) -> None:
    torch.set_num_threads(1)
    # Libraries print as they please; answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    start = load_file(start_path)
    batches = start.pop("batches")
    side = side_of(name, architecture, int(k), start, int(batch))
    steps = 0
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "gradients":
            save_file({key: tensor.contiguous() for key, tensor in side.gradients(batches[0]).items()}, argument)
            answer: dict[str, Any] = {"written": argument}
        else:
            before = time.process_time()
            for _ in range(int(argument)):
                side.step(batches[steps % len(batches)])
                steps += 1
            answer = {"cpu_seconds": time.process_time() - before}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

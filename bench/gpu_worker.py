"""One side of the GPU benchmark: holds a TopK SAE, and trains it so many steps when told to.

    python gpu_worker.py SIDE DEVICE D_IN D_SAE K BATCH

Run by the Python of the side's own environment. It reads one request a line, `steps N`, and answers with one line of
JSON: the seconds until the device had trained N steps. The first answer says that it is ready, or why it is not.
"""

# ruff: noqa: E402 - the import path comes first.
import os
import sys

# This folder would hide the standard library's `operator`.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import json
import time
from typing import Protocol

import torch
from torch import Tensor

LEARNING_RATE = 1e-4
BATCHES = 4


class Side(Protocol):
    def step(self, x: Tensor) -> None:
        """One step of training as the library takes it, on activations in bfloat16."""
        ...


class Ours:
    """The product's step as its trainer runs it, with products and selection in bfloat16."""

    def __init__(self, device: torch.device, d_in: int, d_sae: int, k: int, batch: int) -> None:
        from sae_job.saes.config import Provenance
        from sae_job.training.plan import resolve_plan
        from sae_job.training.sae_training import SaeTraining
        from sae_operator.api.training_job import SAETrainingJobSpec

        tokens = batch * 10**6
        spec = SAETrainingJobSpec.model_validate(
            {
                "activations": {"uri": "file://unused"},
                # No revival: the peers' defaults have none, or it waits for latents that are dead.
                "saes": [
                    {"name": "sae", "architecture": {"type": "topk", "k": k, "auxKCoefficient": 0}, "dSae": d_sae}
                ],
                "training": {
                    "batchSize": batch,
                    "tokens": tokens,
                    "learningRate": LEARNING_RATE,
                    "decaySteps": 0,
                    "precision": "bfloat16",
                    "selection": "bfloat16",
                },
                "normalization": "none",
                "output": {"uri": "file://unused"},
            }
        )
        plan = resolve_plan(spec, cache_rows=tokens, widths={"layer": d_in})
        self._training = SaeTraining(plan.saes[0], plan, 0, provenance=Provenance(), device=device)
        sample = torch.randn(4096, d_in, device=device)
        self._training.initialize(sample, sample)
        self._steps = 0

    def step(self, x: Tensor) -> None:
        rows = x.float()
        self._training.step(rows, rows, self._steps)
        self._steps += 1


class Sparsify:
    """The step of eai-sparsify's `Trainer` with Adam: its forward pass casts to bfloat16 by itself on a GPU."""

    def __init__(self, device: torch.device, d_in: int, d_sae: int, k: int, batch: int) -> None:
        from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

        self._sae = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k), device=device, dtype=torch.float32)
        self._optimizer = torch.optim.Adam(self._sae.parameters(), lr=LEARNING_RATE)
        self._tokens_since_fired = torch.zeros(d_sae, dtype=torch.long, device=device)

    def step(self, x: Tensor) -> None:
        self._sae.set_decoder_norm_to_unit_norm()
        out = self._sae(x=x, y=x, dead_mask=None)
        fired = torch.zeros_like(self._tokens_since_fired, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        self._sae.remove_gradient_parallel_to_decoder_directions()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._tokens_since_fired += x.shape[0]
        self._tokens_since_fired[fired] = 0


class SaeLens:
    """The step of sae-lens's `SAETrainer`, with its option `autocast`."""

    def __init__(self, device: torch.device, d_in: int, d_sae: int, k: int, batch: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]

        size = {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": device.type}
        config = SAETrainerConfig(
            total_training_samples=batch * 10**6,
            train_batch_size_samples=batch,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE,
            autocast=True,
            device=device.type,
        )
        self._trainer = SAETrainer(config, TopKTrainingSAE(TopKTrainingSAEConfig(k=k, **size)), data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self._trainer.step(x.float())
        self._trainer.n_training_steps += 1


SIDES = {"ours": Ours, "sparsify": Sparsify, "saelens": SaeLens}


def main(name: str, device_name: str, *sizes: str) -> None:
    # Libraries print as they please; answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch.device(device_name)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(json.dumps({"unable": f"PyTorch {torch.__version__} of its environment sees no GPU"}), file=answers)
        return
    d_in, d_sae, k, batch = map(int, sizes)
    side: Side = SIDES[name](device, d_in, d_sae, k, batch)
    generator = torch.Generator(device).manual_seed(0)
    batches = torch.randn(BATCHES, batch, d_in, generator=generator, device=device).bfloat16()
    steps = 0
    print(json.dumps({"ready": name}), file=answers, flush=True)
    for line in sys.stdin:
        before = time.perf_counter()
        for _ in range(int(line.split()[1])):
            side.step(batches[steps % BATCHES])
            steps += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - before}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

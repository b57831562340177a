"""Active latents of both forms, for tests of the sparse products on a CPU, under Triton's interpreter, and on a GPU."""

from __future__ import annotations

from typing import Literal

import torch

from sae_job.saes.kernels.sparse import ActiveLatents

BATCH, D_SAE = 6, 40
Form = Literal["regular", "ragged", "nothing active"]
FORMS: list[Form] = ["regular", "ragged", "nothing active"]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def active_latents(form: Form) -> ActiveLatents:
    """Regular: 4 places per row, some of them zero. Ragged: 0 to 37 per row, the first and the last row among those
    that have none; latent 39 is never active."""
    if form == "regular":
        generator = torch.Generator().manual_seed(0)
        indices = torch.stack([torch.randperm(D_SAE - 1, generator=generator)[:4] for _ in range(BATCH)])
        return ActiveLatents(indices, torch.randn(BATCH, 4, generator=generator).relu(), D_SAE)
    numbers = [0, 37, 1, 5, 0, 0] if form == "ragged" else [0] * BATCH
    rows = torch.arange(BATCH).repeat_interleave(torch.tensor(numbers))
    generators = [torch.Generator().manual_seed(number) for number in numbers]
    latents = [torch.randperm(D_SAE - 1, generator=g)[:n] for g, n in zip(generators, numbers, strict=True)]
    return ActiveLatents.ragged(rows, torch.cat(latents), random(len(rows), seed=1), BATCH, D_SAE)


def moved(active: ActiveLatents, device: str) -> ActiveLatents:
    """The same on a device."""
    values = active.values.to(device)
    if values.dim() == 2:
        return ActiveLatents(active.indices.to(device), values, active.d_sae)
    return ActiveLatents.ragged(active.rows.to(device), active.latents.to(device), values, active.batch, active.d_sae)

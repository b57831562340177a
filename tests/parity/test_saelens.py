"""SAEs that were trained here compute the same in SAELens, in an old release and in the newest."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.peers import SAE_LENS_NEWEST, SAE_LENS_REFERENCE, Peer, peer_environment
from sae_job import SAE
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, normalize_rows
from sae_job.storage.file_store import FileStore
from tests.small_cache import write_small_cache
from tests.small_training import small_job, small_spec

# Making the environment of a peer with pip takes minutes, once per machine.
pytestmark = pytest.mark.timeout(1800)

D_IN, D_SAE, K = 32, 256, 4
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"type": "topk", "k": K},
    "standard": {"type": "standard", "l1Coefficient": 0.3},
}
# `centered_rms` scales the activations for training, and the factor is folded into what is saved; the last two are
# done by the SAE itself, here and there.
NORMALIZATIONS = {
    "scaled": "centered_rms",
    "average": "expected_average_only_in",
    "raw": "none",
    "constant": "constant_norm_rescale",
    "layer": "layer_norm",
}
# Pre-activations this close to the bar may fall on either side of it, in the two libraries' order of summation.
TIE = 1e-5


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder with trained SAEs, by name, and held-out activations of the cache in raw scale."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    cache, output = FileStore(folder / "cache"), FileStore(folder / "saes")
    write_small_cache(cache, d_in=D_IN, contexts_per_shard=128, shards=8)
    held_out = torch.empty(0)
    for word, normalization in NORMALIZATIONS.items():
        saes = [
            {"name": f"{kind}-{word}", "architecture": architecture, "dSae": D_SAE}
            for kind, architecture in ARCHITECTURES.items()
        ]
        training = {"tokens": 60_000, "batchSize": 256, "learningRate": 2e-3}
        job = small_job(
            cache,
            small_spec(saes, training=training, normalization=normalization, evaluation={"heldOutTokens": 1000}),
        )
        job.trainer.initialize()
        while not job.trainer.finished:
            job.trainer.step()
        for sae in job.trainer.saes:
            assert sae.failure is None
            explained = job.trainer.latest(sae.name)["explained_variance"]
            assert explained is not None
            assert explained > 0.6, f"{sae.name} did not learn"
            saved = sae.inference()
            told = normalization if normalization in RUN_TIME_NORMALIZATIONS else "none"
            assert saved.cfg.normalize_activations == told
            saved.save(output, sae.name, log_sparsity=sae.log_densities())
        held_out = job.reader.held_out(1000).activations["layer"]
        job.reader.close()
    return folder / "saes", held_out


@pytest.fixture(scope="session", params=[SAE_LENS_REFERENCE, SAE_LENS_NEWEST], ids=lambda peer: peer.name)
def there(
    request: pytest.FixtureRequest, trained: tuple[Path, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what a peer makes of the activations, a file per SAE; one process, since importing it is slow."""
    peer: Peer = request.param
    folder, x = trained
    work = tmp_path_factory.mktemp(peer.name)
    save_file({"x": x.contiguous()}, work / "inputs.safetensors")
    script = Path(__file__).with_name("encode_with_saelens.py")
    arguments = [peer.python(), script, work / "inputs.safetensors", work, *sorted(folder.iterdir())]
    done = subprocess.run(arguments, env=peer_environment(), cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return work


@pytest.mark.parametrize("word", NORMALIZATIONS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_same_latents_are_active_and_reconstructions_are_equal(
    trained: tuple[Path, Tensor], there: Path, kind: str, word: str
) -> None:
    folder, x = trained
    theirs = load_file(there / f"{kind}-{word}.safetensors")
    sae = SAE.load(folder / f"{kind}-{word}")
    features = sae.encode(x)
    assert float((features > 0).sum(dim=1).to(torch.float32).mean()) > 1

    different = (features > 0) != (theirs["features"] > 0)
    assert bool((distance_to_bar(sae, x)[different] <= TIE).all())
    # A tie swaps a latent for another, and a reconstruction with it.
    same = ~different.any(dim=1)
    assert float(same.to(torch.float32).mean()) > 0.99
    _, reconstructions = sae.reconstruct(x)
    if NORMALIZATIONS[word] == "layer_norm":
        # They divide by the standard deviation plus 1e-5, and multiply by it without: what they give deviates too
        # little from the mean. Ours, put through their inverse, must be theirs.
        _, statistics = normalize_rows(x, "layer_norm")
        assert statistics is not None
        assert statistics.offset is not None
        deviation = (reconstructions - statistics.offset) / statistics.scale
        reconstructions = deviation * (statistics.scale - 1e-5) + statistics.offset
    error = torch.linalg.vector_norm(reconstructions - theirs["reconstructions"], dim=1)
    assert float((error / torch.linalg.vector_norm(theirs["reconstructions"], dim=1))[same].max()) <= 1e-5


def distance_to_bar(sae: SAE, x: Tensor) -> Tensor:
    """How far each pre-activation [rows, d_sae] is from where its latent begins to be active."""
    pre = sae.pre_activations(x)
    bar = pre.new_zeros(pre.shape[0], 1)
    if sae.cfg.uses_top_k:
        # Between the last that is chosen and the first that is not.
        largest = pre.topk(K + 1, dim=1).values
        bar = largest[:, K - 1 :].mean(dim=1, keepdim=True).clamp_min(0)
    return (pre - bar).abs()

"""SAEs compute the same here and in SAELens, in an old release and in the newest, whichever of them made the files."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.peers import SAE_LENS_NEWEST, SAE_LENS_REFERENCE, Peer, peer_environment
from sae_job import SAE
from sae_job.errors import InvalidInput
from sae_job.saes.config import Layout
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, normalize_rows
from sae_job.storage.file_store import FileStore
from tests.small_cache import write_small_cache
from tests.small_saes import random_sae
from tests.small_training import small_job, small_spec

# Making the environment of a peer with pip takes minutes, once per machine.
pytestmark = pytest.mark.timeout(1800)

PEERS = (SAE_LENS_REFERENCE, SAE_LENS_NEWEST)
D_IN, D_SAE, D_OUT, K, HEADS = 32, 256, 20, 4, 4
TRAINED: dict[str, dict[str, Any]] = {
    "topk": {"type": "topk", "k": K},
    "batchtopk": {"type": "batchtopk", "k": K},
    "matryoshka": {"type": "matryoshka_batchtopk", "k": K},
    "standard": {"type": "standard", "l1Coefficient": 0.3},
    "gated": {"type": "gated", "l1Coefficient": 0.3},
    "jumprelu": {"type": "jumprelu", "l0Coefficient": 0.3},
}
# Those that are trained in every normalisation; the others in the first alone.
EVERYWHERE = ("topk", "standard")
# `centered_rms` scales the activations for training, and the factor is folded into what is saved; the last two are
# done by the SAE itself, here and there.
NORMALIZATIONS = {
    "scaled": "centered_rms",
    "average": "expected_average_only_in",
    "raw": "none",
    "constant": "constant_norm_rescale",
    "layer": "layer_norm",
}
CASES = [
    (kind, word)
    for kind in TRAINED
    for word in NORMALIZATIONS
    if kind in EVERYWHERE or word == next(iter(NORMALIZATIONS))
]
LAYOUTS: dict[str, Layout] = {"5": "saelens5", "6": "saelens6"}
# Pre-activations this close to the bar may fall on either side of it, in the two libraries' order of summation.
TIE = 1e-5


@dataclass(frozen=True)
class Given:
    """A saved SAE of random weights: its kind, further fields of its configuration, its layout, and who knows it."""

    kind: str
    layout: Layout
    peers: tuple[Peer, ...] = PEERS
    fields: tuple[tuple[str, Any], ...] = ()


_HEADS = (("hook_name", "blocks.3.attn.hook_z"),)
_FINETUNED = (("finetuning_scaling_factor", True),)
GIVEN: dict[str, Given] = {
    **{f"{kind}-5": Given(kind, "saelens5") for kind in ("standard", "topk", "topk_activation", "gated", "jumprelu")},
    # SAELens 6 takes it for an SAE with ReLU.
    "tanh-5": Given("tanh", "saelens5", (SAE_LENS_REFERENCE,)),
    "heads-5": Given("gated", "saelens5", fields=_HEADS),
    "bfloat16-5": Given("jumprelu", "saelens5", fields=(("dtype", "bfloat16"),)),
    "finetuned-5": Given("jumprelu", "saelens5", (SAE_LENS_REFERENCE,), _FINETUNED),
    "finetuned-gated-5": Given("gated", "saelens5", fields=_FINETUNED),
    **{
        f"{kind}-6": Given(kind, "saelens6", (SAE_LENS_NEWEST,))
        for kind in (
            "standard",
            "topk",
            "topk_activation",
            "gated",
            "jumprelu",
            "standard_transcoder",
            "standard_skip_transcoder",
            "jumprelu_transcoder",
            "jumprelu_skip_transcoder",
        )
    },
    "heads-6": Given("topk", "saelens6", (SAE_LENS_NEWEST,), _HEADS),
    "float16-6": Given("standard", "saelens6", (SAE_LENS_NEWEST,), (("dtype", "float16"),)),
    "finetuned-6": Given("topk", "saelens6", (SAE_LENS_NEWEST,), _FINETUNED),
    # Kinds that no SAELens knows must not be taken for others.
    **{f"{kind}-6": Given(kind, "saelens6", ()) for kind in ("tanh", "topk_transcoder", "gated_skip_transcoder")},
}


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
            for kind, architecture in TRAINED.items()
            if (kind, word) in CASES
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
            explained = job.trainer.record.latest(sae.name)["explained_variance"]
            assert explained is not None
            assert explained > 0.6, f"{sae.name} did not learn"
            saved = sae.inference()
            told = normalization if normalization in RUN_TIME_NORMALIZATIONS else "none"
            assert saved.cfg.normalize_activations == told
            for number, layout in LAYOUTS.items():
                saved.save(output, f"{sae.name}-{number}", log_sparsity=sae.log_densities(), layout=layout)
        held_out = job.reader.held_out(1000).activations["layer"]
        job.reader.close()
    return folder / "saes", held_out


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SAEs of random weights, by name, that take activations in a scale of their own."""
    folder = tmp_path_factory.mktemp("given")
    for seed, (name, case) in enumerate(GIVEN.items()):
        size: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "d_out": D_OUT}
        sae = random_sae(case.kind, **size, seed=seed, **dict(case.fields))
        if "transcoder" in case.kind:
            sae.fold_activation_scale(0.25, 3.0)
        else:
            sae.fold_activation_scale(0.25)
        sae.save(FileStore(folder), name, layout=case.layout)
    return folder


@pytest.fixture(scope="session", params=PEERS, ids=lambda peer: peer.name)
def peer(request: pytest.FixtureRequest) -> Peer:
    return request.param


@pytest.fixture(scope="session")
def there(peer: Peer, trained: tuple[Path, Tensor], given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a peer makes of the activations; one process, since importing it is slow."""
    folder, x = trained
    work = tmp_path_factory.mktemp(peer.name)
    save_file({"x": x.contiguous()}, work / "inputs.safetensors")
    script = Path(__file__).with_name("encode_with_saelens.py")
    saes = [sae for sae in sorted(folder.iterdir()) if sae.name.endswith(layouts_of(peer))]
    saes += [given / name for name, case in GIVEN.items() if peer in case.peers or not case.peers]
    arguments = [peer.python(), script, work / "inputs.safetensors", work, *saes]
    done = subprocess.run(arguments, env=peer_environment(), cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return work


def layouts_of(peer: Peer) -> tuple[str, ...]:
    """Layouts that a peer reads: SAELens 5 is older than the second."""
    return ("5",) if peer is SAE_LENS_REFERENCE else ("5", "6")


@pytest.mark.parametrize(("kind", "word"), CASES)
def test_saes_trained_here_compute_the_same_there(
    trained: tuple[Path, Tensor], peer: Peer, there: Path, kind: str, word: str
) -> None:
    folder, x = trained
    for layout in layouts_of(peer):
        name = f"{kind}-{word}-{layout}"
        assert_same(SAE.load(folder / name), x, load_file(there / f"given/{name}.safetensors"), name)


def test_saes_of_every_kind_compute_the_same_there(
    trained: tuple[Path, Tensor], given: Path, peer: Peer, there: Path
) -> None:
    _, x = trained
    for name, case in GIVEN.items():
        if peer in case.peers:
            sae = SAE.load(given / name, dtype="float32")
            assert_same(sae, x, load_file(there / f"given/{name}.safetensors"), name)


def test_kinds_that_saelens_does_not_know_are_refused_there(peer: Peer, there: Path) -> None:
    assert set(json.loads((there / "refused.json").read_text())) == {
        name for name, case in GIVEN.items() if not case.peers
    }


def test_saes_made_there_compute_the_same_here(trained: tuple[Path, Tensor], peer: Peer, there: Path) -> None:
    _, x = trained
    names = sorted(folder.name for folder in (there / "made").iterdir() if folder.is_dir())
    assert len(names) == (13 if peer is SAE_LENS_REFERENCE else 21)
    for name in names:
        if name.startswith("refused"):
            with pytest.raises(InvalidInput, match=r"architecture .* cannot be loaded; these can: standard"):
                SAE.load(there / "made" / name)
        else:
            sae = SAE.load(there / "made" / name)
            assert_same(sae, x, load_file(there / f"made/{name}.safetensors"), name)
            assert sae.cfg.hook_layer == 3
            if name.startswith("trained"):
                told = name.replace("trained-", "").replace("matryoshka", "matryoshka_batchtopk")
                assert sae.cfg.training_architecture == told


def assert_same(sae: SAE, x: Tensor, theirs: dict[str, Tensor], name: str = "") -> None:
    """The same latents are active, and reconstructions are equal, but for ties and rounding."""
    rows = x.view(len(x), HEADS, -1) if sae.hook_z_reshaping_mode else x
    features, reconstructions = sae.reconstruct(rows)
    assert torch.equal(sae.encode(rows), features)
    active = (features > 0).to(torch.float32).sum(dim=1)
    assert float(active.mean()) > 1, name
    assert float(active.max()) < sae.cfg.d_sae, name

    different = (features > 0) != (theirs["features"] > 0)
    assert bool((distance_to_bar(sae, x)[different] <= TIE).all()), name
    # A tie swaps a latent for another, and a reconstruction with it.
    same = ~different.any(dim=1)
    assert float(same.to(torch.float32).mean()) > 0.99, name
    reconstructions = reconstructions.reshape(len(x), -1)
    if sae.cfg.normalize_activations == "layer_norm" and not sae.cfg.is_transcoder:
        # They divide by the standard deviation plus 1e-5, and multiply by it without: what they give deviates too
        # little from the mean. Ours, put through their inverse, must be theirs.
        _, statistics = normalize_rows(x, "layer_norm")
        assert statistics is not None
        assert statistics.offset is not None
        deviation = (reconstructions - statistics.offset) / statistics.scale
        reconstructions = deviation * (statistics.scale - 1e-5) + statistics.offset
    error = torch.linalg.vector_norm(reconstructions - theirs["reconstructions"], dim=1)
    relative = error / torch.linalg.vector_norm(theirs["reconstructions"], dim=1)
    assert float(relative[same].max()) <= 1e-5, name


def distance_to_bar(sae: SAE, x: Tensor) -> Tensor:
    """How far each latent [rows, d_sae] is from where it begins to be active."""
    pre = sae.pre_activations(x)
    if sae.cfg.uses_top_k:
        # Between the last that is chosen and the first that is not.
        largest = pre.topk(sae.cfg.k + 1, dim=1).values
        return (pre - largest[:, sae.cfg.k - 1 :].mean(dim=1, keepdim=True).clamp_min(0)).abs()
    if sae.cfg.architecture == "jumprelu":
        return (pre - sae.threshold.clamp_min(0)).abs()
    if sae.cfg.architecture == "gated":
        gate = (pre - sae.b_mag) / sae.r_mag.exp() + sae.b_gate
        return torch.minimum(pre.abs(), gate.abs())
    return pre.abs()

"""Every manifest in examples/ is valid as it stands, and says what the documentation promises."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from sae_job.cli import run_command_line
from sae_operator.api.identity import cache_identity
from sae_operator.api.manifest import load_manifests, read_yaml, validate_spec
from sae_operator.api.resources import ACTIVATION_CACHE, SAE_SWEEP, SAE_TRAINING_JOB
from sae_operator.api.sweep_expansion import expand, pack
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.example_files import EXAMPLES, FILES
from tests.tiny_model import write_tiny_model, write_tiny_text


def the_job(path: Path) -> SAETrainingJobSpec:
    (job,) = load_manifests(path)
    return job.spec


def test_there_are_examples() -> None:
    names = {path.relative_to(EXAMPLES).as_posix() for path in FILES}
    tops = {"sae-job.yaml", "activation-cache.yaml", "quickstart.yaml", "live.yaml", "hooks-int8.yaml"}
    assert tops | {"testbed/sae-job.yaml"} <= names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_an_example_is_valid_and_survives_a_round_trip(path: Path) -> None:
    for resource in load_manifests(path):
        assert validate_spec(resource.kind, resource.spec.to_manifest()) == resource.spec
        if resource.kind is SAE_SWEEP:
            assert expand(resource.spec)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(EXAMPLES).as_posix())
def test_an_example_goes_where_kubectl_is(path: Path) -> None:
    for document in read_yaml(path.read_text()):
        assert "namespace" not in document["metadata"]


def test_the_quickstart_needs_no_cluster_no_hub_and_no_credentials() -> None:
    spec = the_job(EXAMPLES / "quickstart.yaml")
    cache = spec.activations.cache
    assert cache is not None
    for location in (cache.storage, spec.output):
        assert location.uri.startswith("file://out/quickstart")
        assert location.secret_ref is None
    assert cache.model.name.startswith("build/")
    assert cache.dataset.path.startswith("build/")


def test_the_quickstart_trains_on_150000_tokens_and_holds_out_20000() -> None:
    spec = the_job(EXAMPLES / "quickstart.yaml")
    assert spec.evaluation.held_out_tokens == 20_000
    assert spec.activations.cache is not None
    assert spec.training.tokens is None
    assert spec.activations.cache.tokens - 20_000 >= 150_000


def test_the_test_beds_job_makes_at_least_four_shards_in_two_pods_and_trains_two_saes() -> None:
    spec = the_job(EXAMPLES / "testbed" / "sae-job.yaml")
    cache = spec.activations.cache
    assert cache is not None
    bytes_per_row = 576 * 2 + 12
    assert cache.tokens / (cache.storage.shard_bytes // bytes_per_row) > 3
    assert cache.parallelism == 2
    assert len(spec.saes) == 2
    for settings in (cache.run, spec.run):
        assert settings.resources.limits["nvidia.com/gpu"] == 1


def test_the_live_example_stores_no_activations() -> None:
    spec = the_job(EXAMPLES / "live.yaml")
    assert spec.activations.live is not None
    assert spec.activations.cache is None
    assert spec.run.resources.limits["nvidia.com/gpu"] == 1


def test_the_example_of_hooks_trains_on_each_of_them_from_half_the_bytes_and_a_bucket() -> None:
    spec = the_job(EXAMPLES / "hooks-int8.yaml")
    cache = spec.activations.cache
    assert cache is not None
    assert cache.storage.dtype == "int8"
    assert [sae.hook for sae in spec.saes] == [hook.key for hook in cache.hooks]
    assert cache.hooks[1].head_index == 3
    assert cache.dataset.path.startswith("s3://")
    assert cache.dataset.store is not None
    assert cache.dataset.store.secret_ref is not None
    assert (cache.dataset.store.secret_ref.name, spec.output.secret_ref and spec.output.secret_ref.name) == (
        "texts",
        "s3",
    )


def jobs_of(path: Path) -> list[SAETrainingJobSpec]:
    """The training jobs of a file, those of its sweeps as they are packed."""
    found: list[SAETrainingJobSpec] = []
    for resource in load_manifests(path):
        if resource.kind is SAE_SWEEP:
            found += [job.spec for job in pack(resource.spec, expand(resource.spec))]
        elif resource.kind is SAE_TRAINING_JOB:
            found.append(resource.spec)
    return found


def rates_of(job: SAETrainingJobSpec) -> set[float | None]:
    return {sae.training.learning_rate or job.training.learning_rate for sae in job.saes}


@pytest.mark.parametrize(
    ("name", "steps", "saes", "rates", "decay"),
    [
        ("replications/tinystories", 30_000, [1], {5e-5}, 6000),
        ("sweeps/how-we-train-saes", 200_000, [3, 3], {5e-5, 3e-4}, 40_000),
        ("sweeps/gpt2-mlp-learning-rates", 20_000, [5, 5, 5, 5], {1e-5, 5e-5, 1e-4, 4e-4}, 4000),
        ("sweeps/gpt2-mlp-blocks", 20_000, [10, 10], {1e-4}, 4000),
        ("sweeps/gpt2-mlp-autocast", 2000, [2, 2], {1e-4}, 400),
        ("sweeps/listed-jobs", 24_400, [1, 1, 1, 1], {1e-4, 4e-4}, 4880),
    ],
)
def test_replications_have_the_length_and_the_sweep_of_the_original(
    name: str, steps: int, saes: list[int], rates: set[float], decay: int
) -> None:
    jobs = jobs_of(EXAMPLES / f"{name}.yaml")
    assert [len(job.saes) for job in jobs] == saes
    assert set().union(*map(rates_of, jobs)) == rates
    # An original job has one learning rate.
    assert all(len(rates_of(job)) == 1 for job in jobs)
    for job in jobs:
        tokens = job.training.tokens
        assert tokens is not None
        assert tokens == steps * 4096
        # A fifth of the steps, which the original's scripts mean and do not do.
        assert job.training.decay_steps == decay == steps // 5
        cache = job.activations.cache
        assert cache is None or cache.tokens > tokens


@pytest.mark.parametrize(
    ("name", "penalties"),
    [
        ("how-we-train-saes", [2, 5, 10] * 2),
        ("gpt2-mlp-learning-rates", [0.1, 1, 2, 4, 10] * 4),
        ("gpt2-mlp-blocks", [3, 4, 5, 6, 7] * 4),
        ("gpt2-mlp-autocast", [5] * 4),
        ("listed-jobs", [2, 5, 5, 10]),
    ],
)
def test_sweeps_have_the_penalties_of_the_original(name: str, penalties: list[float]) -> None:
    jobs = jobs_of(EXAMPLES / "sweeps" / f"{name}.yaml")
    assert [sae.architecture.l1_coefficient for job in jobs for sae in job.saes] == penalties


@pytest.mark.parametrize("folder", ["replications", "sweeps"])
def test_standard_saes_of_the_original_say_what_becomes_of_decoder_norms(folder: str) -> None:
    """Our default is another."""
    jobs = [job for path in sorted((EXAMPLES / folder).glob("*.yaml")) for job in jobs_of(path)]
    standard = [sae for job in jobs for sae in job.saes if sae.architecture.type == "standard"]
    assert standard
    assert all(sae.normalize_decoder is not None for sae in standard)


@pytest.mark.parametrize(
    ("name", "number"), [("gpt2-mlp-learning-rates", 1), ("gpt2-mlp-blocks", 1), ("gpt2-mlp-autocast", 2)]
)
def test_the_jobs_of_a_sweep_share_their_cache(name: str, number: int) -> None:
    caches = [job.activations.cache for job in jobs_of(EXAMPLES / "sweeps" / f"{name}.yaml")]
    assert len({cache_identity(cache) for cache in caches if cache is not None}) == number


def test_the_sweep_over_blocks_trains_five_saes_on_each_of_four() -> None:
    jobs = jobs_of(EXAMPLES / "sweeps" / "gpt2-mlp-blocks.yaml")
    hooks = Counter(sae.hook for job in jobs for sae in job.saes)
    assert hooks == {f"blocks.{block}.hook_mlp_out": 5 for block in (1, 3, 5, 6)}
    # Each of the two jobs reads two of the four hooks that one forward pass has cached.
    assert [len({sae.hook for sae in job.saes}) for job in jobs] == [2, 2]


def test_the_listed_jobs_wait_for_the_cache_of_their_file() -> None:
    kinds = {resource.kind: resource for resource in load_manifests(EXAMPLES / "sweeps" / "listed-jobs.yaml")}
    reference = kinds[SAE_SWEEP].spec.template.activations.cache_ref
    assert reference is not None
    assert reference.name == kinds[ACTIVATION_CACHE].name


def test_the_small_sweep_runs_to_its_end_on_a_tiny_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands in the file, but for the model, the text and their size."""
    write_tiny_model(tmp_path / "model")
    write_tiny_text(tmp_path / "text")
    text = (EXAMPLES / "sweeps" / "small.yaml").read_text()
    for old, new in (
        ("build/quickstart/smollm2-135m", f"{tmp_path}/model"),
        ("build/quickstart/english-text", f"{tmp_path}/text"),
        ("file://out", f"file://{tmp_path}/out"),
        ("model.layers.4", "model.layers.1"),
        ("contextSize: 64", "contextSize: 16"),
        ("tokens: 40000", "tokens: 1500"),
        ("tokens: 70000, batchSize: 256", "tokens: 1280, batchSize: 64"),
        ("heldOutTokens: 4000", "heldOutTokens: 100"),
        ("dSae: 1152", "dSae: 128"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    file = tmp_path / "small.yaml"
    file.write_text(text)
    assert run_command_line(["run", "-f", str(file)]) == 0
    assert "9 trials in 2 training jobs: 9 succeeded" in " ".join(capsys.readouterr().out.split())
    table = json.loads((tmp_path / "out/sweep/trials.json").read_text())
    best = next(trial for trial in table["trials"] if trial["best"])
    assert best["l0"] <= 32.5
    ranked = [trial for trial in table["trials"] if trial["rank"] is not None]
    # Those with 64 latents explain more, and cannot be the best.
    assert len(ranked) == 6
    assert all(trial["parameters"]["saes[0].architecture.k"] <= 32 for trial in ranked)
    assert (tmp_path / "out/sweep/report.html").read_text().count("<svg") == 3

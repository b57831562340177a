"""The step `preflight`: what cannot work is told at once, and nothing of another's is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.activations.manifest import read_manifest
from sae_job.errors import InvalidInput
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.activation_sources import model_of
from sae_job.steps.context import StepContext
from sae_job.steps.memory import quantity_bytes
from sae_job.steps.output_marker import claim_output
from sae_job.steps.preflight import run_preflight
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_job.text.plan import BlockEntry, CacheIndex, DatasetRecord, ModelRecord, TokenizerRecord
from sae_operator.api.activation_cache import ActivationCacheSpec, ModelSource
from sae_operator.api.identity import cache_identity, cache_location, cache_of, live_location
from sae_operator.api.steps import Progress, StepResult, TrainStep
from sae_operator.api.store import StoreAccess, StoreLocation
from sae_operator.api.training_job import SAETrainingJobSpec
from tests.small_cache import write_small_cache
from tests.tiny_model import CONTEXT_LIMIT, write_tiny_model, write_tiny_text

HOOK = "model.layers.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_model(tmp_path_factory.mktemp("model"))


class Bench:
    """A folder for caches and outputs, and preflight on jobs there."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model
        self.states: list[Progress] = []

    def cache(self, **fields: Any) -> dict[str, Any]:
        return {
            "model": {"name": str(self.model)},
            "dataset": {"path": "/not/read/yet"},
            "hooks": [{"name": HOOK}],
            "contextSize": 16,
            "tokens": 10_000,
            "storage": {"uri": f"file://{self.root}/caches"},
            **fields,
        }

    def live(self, **fields: Any) -> dict[str, Any]:
        """Activations of a model that runs beside the training, on a text that is there."""
        text = self.root / "text"
        if not text.exists():
            write_tiny_text(text, documents=120)
        source = self.cache(dataset={"path": str(text)}, **fields)
        return {"live": {key: value for key, value in source.items() if key != "storage"}}

    def sae(self, **fields: Any) -> dict[str, Any]:
        return {"name": "k4", "architecture": {"type": "topk", "k": 4}, **fields}

    def job(self, *, name: str = "job", **fields: Any) -> TrainStep:
        spec = SAETrainingJobSpec.model_validate(
            {
                "activations": {"cache": self.cache()},
                "saes": [self.sae()],
                "output": {"uri": f"file://{self.root}/out"},
                **fields,
            }
        )
        activations = spec.activations
        if activations.live is not None:
            location = live_location(spec)
        elif activations.cache is not None:
            location = cache_location(activations.cache, "team")
        else:
            location = StoreLocation(uri=activations.uri or f"file://{self.root}/nothing")
        return TrainStep(
            step="preflight",
            namespace="team",
            name=name,
            uid=f"uid-of-{name}",
            spec=spec,
            activations=location,
            cache=cache_of(spec),
        )

    def run(self, step: TrainStep) -> StepResult:
        context = StepContext(
            reporter=ProgressReporter("preflight", clock=lambda: 0.0, listeners=(self.states.append,)),
            should_stop=lambda: False,
            open_store=lambda location: FileStore(path_of_file_uri(location.uri)),
            now=lambda: 0.0,
        )
        return run_preflight(step, context)

    def refusal(self, step: TrainStep) -> tuple[str, str, str]:
        with pytest.raises(InvalidInput) as caught:
            self.run(step)
        return caught.value.reason, caught.value.field, caught.value.message

    @property
    def output(self) -> FileStore:
        return FileStore(self.root / "out")


@pytest.fixture
def bench(tmp_path: Path, model: Path) -> Bench:
    return Bench(tmp_path, model)


def test_a_job_that_can_work_is_planned_and_claims_its_output(bench: Bench) -> None:
    result = bench.run(bench.job())
    assert (result.exit_code, result.adopted) == (0, False)
    assert result.plan is not None
    assert result.plan["bytes"] == 10_000 * (32 * 2 + 12)
    assert result.plan["memoryBytes"] > 2 * 32 * 256 * 16
    marker = json.loads(bench.output.get("sae-operator.json"))
    assert (marker["kind"], marker["uid"]) == ("SAETrainingJob", "uid-of-job")


def test_the_same_spec_again_resumes_whatever_the_resource_is_called(bench: Bench) -> None:
    bench.run(bench.job())
    assert bench.run(bench.job(name="again")).adopted is False
    assert claim_output(bench.output, bench.job(name="again")) == "resumed"


def test_another_spec_with_the_same_output_is_refused_and_changes_nothing(bench: Bench) -> None:
    bench.run(bench.job())
    before = bench.output.get("sae-operator.json")
    reason, field, message = bench.refusal(bench.job(name="second", saes=[bench.sae(seed=1)]))
    assert (reason, field) == ("OutputTaken", "spec.output.uri")
    assert "team/job" in message
    assert bench.output.get("sae-operator.json") == before


@pytest.mark.parametrize("content", [b'{"kind": "ActivationCache"}', b"not ours", b"[]"])
def test_an_output_that_is_something_else_is_refused(bench: Bench, content: bytes) -> None:
    bench.output.put("sae-operator.json", content)
    assert bench.refusal(bench.job())[:2] == ("OutputTaken", "spec.output.uri")


def test_results_without_a_marker_are_not_overwritten(bench: Bench) -> None:
    bench.output.put("results.json", b"{}")
    assert bench.refusal(bench.job())[:2] == ("OutputTaken", "spec.output.uri")


def test_a_spec_that_cannot_work_leaves_the_output_to_its_successor(bench: Bench) -> None:
    assert bench.refusal(bench.job(saes=[bench.sae(architecture={"type": "topk", "k": 300})]))[0] == "KTooLarge"
    assert bench.run(bench.job()).exit_code == 0


def test_finished_results_are_adopted_with_their_figures(bench: Bench) -> None:
    step = bench.job()
    bench.run(step)
    saes = [{"name": "k4", "phase": "Succeeded", "explained_variance": 0.9, "l0": 4.0, "d_in": 32}]
    bench.output.put("results.json", json.dumps({"tokens": 9000, "tokens_per_second": 1.0, "saes": saes}).encode())
    result = bench.run(step)
    assert (result.adopted, result.tokens) == (True, 9000)
    assert result.saes is not None
    assert (result.saes[0].explained_variance, result.saes[0].phase) == (0.9, "Succeeded")
    more = bench.job(training={"tokens": 9001})
    assert bench.run(more).adopted is False, "fewer tokens than are asked for now"
    longer = bench.job(activations={"cache": bench.cache(tokens=20_000)})
    assert bench.run(longer).adopted is False, "without tokens of its own, training takes all of the longer cache"


@pytest.mark.parametrize(
    ("cache", "reason", "field"),
    [
        ({"hooks": [{"name": "model.layer.1"}]}, "HookNotFound", "hooks[0].name"),
        ({"contextSize": CONTEXT_LIMIT + 1}, "ContextTooLong", "contextSize"),
        ({"model": {"name": "/nowhere"}}, "ModelNotFound", "model.name"),
    ],
)
def test_what_is_wrong_with_an_inline_cache_is_told_with_its_path_in_the_job(
    bench: Bench, cache: dict[str, Any], reason: str, field: str
) -> None:
    told = bench.refusal(bench.job(activations={"cache": bench.cache(**cache)}))
    assert told[:2] == (reason, f"spec.activations.cache.{field}")


def test_what_is_wrong_with_another_resources_cache_names_it(bench: Bench) -> None:
    step = bench.job(activations={"cacheRef": {"name": "shared"}})
    wrong = bench.job(activations={"cache": bench.cache(contextSize=CONTEXT_LIMIT + 1)})
    step = step.model_copy(update={"cache": wrong.cache, "activations": wrong.activations})
    reason, field, message = bench.refusal(step)
    assert (reason, field) == ("ContextTooLong", "spec.activations.cacheRef")
    assert message.startswith("spec.contextSize of ActivationCache 'shared'")


def test_held_out_rows_must_leave_some_to_train_on(bench: Bench) -> None:
    write_small_cache(FileStore(bench.root / "cache"))
    told = bench.refusal(
        bench.job(activations={"uri": f"file://{bench.root}/cache"}, evaluation={"heldOutTokens": 100_000})
    )
    assert told[:2] == ("TooFewRows", "spec.evaluation.heldOutTokens")


def test_a_finished_cache_is_checked_by_its_manifest(bench: Bench) -> None:
    write_small_cache(FileStore(bench.root / "cache"), hooks=["layer"], d_in=6)
    uri = {"uri": f"file://{bench.root}/cache"}
    assert bench.run(bench.job(activations=uri)).exit_code == 0
    told = bench.refusal(bench.job(activations=uri, saes=[bench.sae(hook="other")], output={"uri": "file:///tmp/x"}))
    assert told[:2] == ("HookNotFound", "spec.saes[0].hook")


def test_a_cache_that_is_not_there_is_told(bench: Bench) -> None:
    told = bench.refusal(bench.job(activations={"uri": f"file://{bench.root}/nothing"}))
    assert told[:2] == ("CacheNotFound", "spec.activations.uri")


def test_a_cpu_pod_too_small_for_the_weights_is_told_and_a_gpu_pod_is_not_judged(bench: Bench) -> None:
    limits = {"memory": "64Mi"}
    saes = [bench.sae(dSae=2**17)]
    told = bench.refusal(bench.job(saes=saes, run={"resources": {"limits": limits}}))
    assert told[:2] == ("NotEnoughMemory", "spec.run.resources.limits.memory")
    assert (
        bench.run(bench.job(saes=saes, run={"resources": {"limits": {**limits, "nvidia.com/gpu": 1}}})).exit_code == 0
    )


def test_the_memory_of_a_training_pod_grows_with_the_shards_that_its_reader_holds(bench: Bench) -> None:
    def planned(shard_bytes: int, tokens: int = 10**9) -> int:
        cache = bench.cache(tokens=tokens, storage={"uri": f"file://{bench.root}/caches", "shardBytes": shard_bytes})
        output = {"uri": f"file://{bench.root}/out-{shard_bytes}-{tokens}"}
        plan = bench.run(bench.job(activations={"cache": cache}, training={"tokens": 10_000}, output=output)).plan
        assert plan is not None
        return plan["memoryBytes"]

    small, default, large = planned(2**20), planned(2**28), planned(2**32)
    # Eight shards in use, or 128 small ones, and 512 MiB read ahead; of 4 GiB shards two, and one read ahead.
    assert default - small == 8 * 2**28 - 128 * 2**20
    assert large - default == 3 * 2**32 - (8 * 2**28 + 2**29)
    assert planned(2**28, 10_000) < small, "a cache that is smaller than that is held whole"


def test_a_cpu_pod_too_small_for_the_shards_in_use_is_told(bench: Bench) -> None:
    cache = bench.cache(tokens=10**9)
    told = bench.refusal(bench.job(activations={"cache": cache}, run={"resources": {"limits": {"memory": "2Gi"}}}))
    assert told[:2] == ("NotEnoughMemory", "spec.run.resources.limits.memory")
    assert "shardBytes" in told[2]


def test_preflight_counts_no_tokens(bench: Bench) -> None:
    assert bench.states == []
    bench.run(bench.job())
    assert all(state.total_tokens == 0 for state in bench.states)


def test_ce_loss_on_a_finished_cache_needs_its_model_before_training(bench: Bench) -> None:
    store = FileStore(bench.root / "cache")
    manifest = write_small_cache(store, hooks=[HOOK], d_in=32)
    scored = {"activations": {"uri": f"file://{bench.root}/cache"}, "evaluation": {"metrics": ["ce_loss_score"]}}

    def of_model(name: str) -> None:
        spec = {"model": {"name": name}}
        store.put("manifest.json", manifest.model_copy(update={"spec": spec}).to_bytes())

    of_model("/gone")
    reason, field, message = bench.refusal(bench.job(**scored))
    assert (reason, field) == ("ModelNotFound", "spec.evaluation.metrics")
    assert "/gone" in message
    assert not bench.output.head("sae-operator.json"), "the output is left to the successor"
    of_model(str(bench.model))
    assert bench.refusal(bench.job(**scored))[:2] == ("NoContexts", "spec.evaluation.metrics")
    CacheIndex(
        context_size=manifest.context_size,
        contexts_per_block=96,
        blocks=[BlockEntry(contexts=96, sha256="0" * 64)],
        tokenizer=TokenizerRecord(name="gone", sha256="", bos_token_id=None, special_token_ids=[]),
        model=ModelRecord(name=str(bench.model), revision=None, d_in={HOOK: 32}),
        dataset=DatasetRecord(path="gone"),
        exhausted=True,
        rows_per_shard=manifest.rows_per_shard,
        slack=0,
        tokens=manifest.tokens,
        groups=manifest.groups,
    ).save(store)
    assert bench.run(bench.job(**scored)).exit_code == 0


@pytest.mark.parametrize("metric", ["ce_loss_score", "kl_divergence_score"])
def test_what_needs_the_model_needs_held_out_rows_before_training(bench: Bench, metric: str) -> None:
    metrics = ["l0", metric]
    told = bench.refusal(bench.job(evaluation={"heldOutTokens": 0, "metrics": metrics}))
    assert told[:2] == ("NoHeldOutContexts", "spec.evaluation.heldOutTokens")
    assert told[2].startswith(f"{metric} is taken on held-out activations")
    assert bench.run(bench.job(evaluation={"heldOutTokens": 1, "metrics": metrics})).exit_code == 0


def test_a_model_in_a_bucket_is_opened_as_the_finished_cache_is(bench: Bench) -> None:
    store = FileStore(bench.root / "cache")
    manifest = write_small_cache(store, hooks=[HOOK], d_in=32)
    spec = {"model": {"name": "s3://models/small", "store": {"endpointUrl": "https://models"}}}
    store.put("manifest.json", manifest.model_copy(update={"spec": spec}).to_bytes())
    access = StoreAccess.model_validate({"endpointUrl": "https://caches", "secretRef": {"name": "ours"}})
    location = StoreLocation(uri=f"file://{bench.root}/cache", **access.model_dump())
    model = model_of(read_manifest(store), location)
    assert model is not None
    assert model.store == access.model_copy(update={"endpoint_url": "https://models"})
    store.put("manifest.json", manifest.model_copy(update={"spec": {"model": {"name": "gpt2"}}}).to_bytes())
    assert model_of(read_manifest(store), location) == ModelSource(name="gpt2")
    # Whoever may write to the bucket cannot have code run.
    trusting = {"model": {"name": "gpt2", "trustRemoteCode": True}}
    store.put("manifest.json", manifest.model_copy(update={"spec": trusting}).to_bytes())
    assert model_of(read_manifest(store), location) == ModelSource(name="gpt2")


@pytest.mark.parametrize(
    ("quantity", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("1Ki", 1024),
        ("1536Mi", 1536 * 2**20),
        ("1.5G", 1.5e9),
        ("1e9", 1e9),
        ("2E", 2e18),
    ],
)
def test_quantities_of_memory(quantity: int | str, expected: float) -> None:
    assert quantity_bytes(quantity) == expected


def test_nothing_is_written_below_the_cache(bench: Bench) -> None:
    bench.run(bench.job())
    assert not (bench.root / "caches").exists()


def test_ce_loss_needs_a_model_that_predicts_tokens(bench: Bench, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    cache = bench.cache(model={"name": str(tmp_path / "bert")}, hooks=[{"name": "encoder.layer.0"}])
    told = bench.refusal(bench.job(activations={"cache": cache}, evaluation={"metrics": ["ce_loss_score"]}))
    assert told[:2] == ("NoLanguageModelHead", "spec.evaluation.metrics")


def test_the_contexts_of_a_live_source_are_prepared_below_the_output(bench: Bench) -> None:
    result = bench.run(bench.job(activations=bench.live()))
    assert (result.exit_code, result.adopted, result.tokens) == (0, False, None)
    store = FileStore(bench.root / "out/activations")
    index = CacheIndex.load(store)
    assert index is not None
    assert (index.tokens, index.context_size, index.model.d_in) == (10_000, 16, {HOOK: 32})
    assert json.loads(bench.output.get("sae-operator.json"))["kind"] == "SAETrainingJob"
    assert result.plan is not None
    assert result.plan["bytes"] == 4 * index.contexts * 16
    assert [state.total_tokens for state in bench.states][-1] == 10_000
    assert bench.states[-1].tokens == 10_000


def test_more_rows_of_a_live_source_go_on_after_its_contexts(bench: Bench) -> None:
    bench.run(bench.job(activations=bench.live(tokens=2000)))
    folder = bench.root / "out/activations/tokens"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    bench.run(bench.job(activations=bench.live(tokens=12_000)))
    index = CacheIndex.load(FileStore(bench.root / "out/activations"))
    assert index is not None
    assert index.tokens == 12_000
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}.items()


def test_finished_results_of_a_live_job_are_adopted_without_contexts(bench: Bench) -> None:
    step = bench.job(activations=bench.live(), training={"tokens": 5000})
    claim_output(bench.output, step)
    saes = [{"name": "k4", "phase": "Succeeded"}]
    bench.output.put("results.json", json.dumps({"tokens": 5000, "saes": saes}).encode())
    assert bench.run(step).adopted
    assert not (bench.root / "out/activations").exists()


@pytest.mark.parametrize(
    ("source", "reason", "field"),
    [
        ({"hooks": [{"name": "model.layer.1"}]}, "HookNotFound", "hooks[0].name"),
        ({"contextSize": CONTEXT_LIMIT + 1}, "ContextTooLong", "contextSize"),
        ({"tokens": 10**7}, "NotEnoughText", "tokens"),
    ],
)
def test_what_is_wrong_with_a_live_source_is_told_with_its_path_in_the_job(
    bench: Bench, source: dict[str, Any], reason: str, field: str
) -> None:
    told = bench.refusal(bench.job(activations=bench.live(**source)))
    assert told[:2] == (reason, f"spec.activations.live.{field}")


def test_the_memory_of_a_live_job_counts_its_model_and_its_buffer(bench: Bench) -> None:
    def planned(buffer_bytes: int, **fields: Any) -> int:
        source = bench.live(bufferBytes=buffer_bytes, tokens=20_000)
        output = {"uri": f"file://{bench.root}/out-{buffer_bytes}-{len(fields)}"}
        plan = bench.run(bench.job(activations=source, output=output, **fields)).plan
        assert plan is not None
        return plan["memoryBytes"]

    # 20,000 rows of 32 numbers in bfloat16 are 1.5 MB.
    small, whole = planned(2**20), planned(2**30)
    assert whole - small == 20_000 * (32 * 2 + 12) - 10 * (2**20 // 10)
    # The model and its forward pass are gone when the score is taken; the whole of it must fit then.
    scored = planned(2**30, evaluation={"metrics": ["ce_loss_score"]})
    assert scored == whole, "this model is smaller than the buffer"


def test_a_cpu_pod_too_small_for_the_buffer_of_a_live_source_is_told(bench: Bench) -> None:
    source = bench.live(bufferBytes=2**32, tokens=10**9)
    told = bench.refusal(bench.job(activations=source, run={"resources": {"limits": {"memory": "2Gi"}}}))
    assert told[:2] == ("NotEnoughMemory", "spec.run.resources.limits.memory")
    assert "bufferBytes" in told[2]


def test_a_gpu_pod_must_hold_the_rows_of_a_live_source_and_nothing_of_a_cache_worker(bench: Bench) -> None:
    def limited(memory: int) -> TrainStep:
        limits = {"memory": memory, "nvidia.com/gpu": 1}
        return bench.job(activations=bench.live(tokens=10_000), run={"resources": {"limits": limits}})

    # All rows fit into the default buffer.
    rows = 10_000 * (32 * 2 + 12)
    told = bench.refusal(limited(rows - 1))
    assert told[:2] == ("NotEnoughMemory", "spec.run.resources.limits.memory")
    assert "bufferBytes" in told[2]
    assert bench.run(limited(rows)).exit_code == 0


def test_a_live_source_of_a_model_without_a_head_gets_no_score(bench: Bench, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(tmp_path / "bert")
    source = bench.live(model={"name": str(tmp_path / "bert")}, hooks=[{"name": "encoder.layer.0"}])
    told = bench.refusal(bench.job(activations=source, evaluation={"metrics": ["ce_loss_score"]}))
    assert told[:2] == ("NoLanguageModelHead", "spec.evaluation.metrics")


def finished_cache_of(bench: Bench, hooks: list[str]) -> Path:
    """A finished cache in the place of the bench's inline one, with more than it asks for."""
    spec = ActivationCacheSpec.model_validate(bench.cache())
    store = FileStore(path_of_file_uri(cache_location(spec, "team").uri))
    manifest = write_small_cache(store, hooks=hooks, d_in=32, contexts_per_shard=400)
    store.put("manifest.json", manifest.model_copy(update={"identity": cache_identity(spec)}).to_bytes())
    return path_of_file_uri(store.uri)


def test_a_job_takes_its_hook_from_a_larger_cache(bench: Bench) -> None:
    finished_cache_of(bench, ["model.layers.0", HOOK])
    # The SAE names no hook: the only one that the job asks for is meant.
    result = bench.run(bench.job())
    assert result.plan is not None
    assert result.plan["bytes"] == 0


def test_a_cache_that_is_to_be_extended_is_read_in_shards_of_the_rows_that_it_has(bench: Bench) -> None:
    def planned(output: str) -> dict[str, Any]:
        cache = bench.cache(tokens=10**9)
        output_of = {"uri": f"file://{bench.root}/{output}"}
        plan = bench.run(bench.job(activations={"cache": cache}, training={"tokens": 10_000}, output=output_of)).plan
        assert plan is not None
        return plan

    new = planned("new")
    store = FileStore(finished_cache_of(bench, ["model.layers.0"]))
    manifest = read_manifest(store).model_copy(update={"dtype": "bfloat16", "rows_per_shard": 2**20})
    store.put("manifest.json", manifest.to_bytes())
    extended = planned("extended")
    # Of 26 shards of 2**20 rows, which are 2 GiB at the hook that they began with, the added hook and `keep` are read.
    assert 26 == 2**31 // (2**20 * (32 * 2 + 12))
    read = 2**20 * (32 * 2 + 1)
    assert extended["memoryBytes"] - new["memoryBytes"] == (26 * read + 2**29) - (8 * 2**28 + 2**29)
    assert (new["bytes"], extended["bytes"]) == (10**9 * (32 * 2 + 12), 10**9 * (2 * 32 * 2 + 12 + 1))


def test_a_cache_that_is_to_be_extended_by_the_jobs_hook_is_planned_from_the_model(bench: Bench) -> None:
    finished_cache_of(bench, ["model.layers.0"])
    assert bench.run(bench.job()).exit_code == 0
    wrong = bench.cache(hooks=[{"name": "model.layer.1"}])
    told = bench.refusal(bench.job(activations={"cache": wrong}, output={"uri": f"file://{bench.root}/other"}))
    assert told[:2] == ("HookNotFound", "spec.activations.cache.hooks[0].name")


def test_batches_are_shared_by_all_processes_of_all_pods(bench: Bench) -> None:
    run = {"resources": {"limits": {"nvidia.com/gpu": "4"}}}
    told = bench.refusal(bench.job(parallelism=3, run=run, training={"batchSize": 256}))
    assert told[:2] == ("BatchNotDivisible", "spec.training.batchSize")
    assert "12 processes cannot share batches of 256 rows evenly; set it to 264" in told[2]
    assert bench.run(bench.job(parallelism=3, run=run, training={"batchSize": 264})).exit_code == 0


def test_saved_weights_to_begin_with_are_looked_at_first(bench: Bench) -> None:
    location = {"uri": f"file://{bench.root}/nothing"}
    saes = [{"name": "a", "architecture": {"type": "topk", "k": 2}, "startFrom": location}]
    assert bench.refusal(bench.job(saes=saes))[:2] == ("SaeNotFound", "spec.saes[0].startFrom")

"""The step `prepare`: contexts and a plan, made once, resumed anywhere, extended without touching what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job.errors import InvalidInput, Stopped
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.context import StepContext
from sae_job.steps.prepare import run_prepare
from sae_job.storage.base import PreconditionFailed
from sae_job.storage.file_store import FileStore
from sae_job.text import plan
from sae_job.text.blocks import read_block, read_block_records
from sae_job.text.plan import CacheIndex, block_sidecar_key
from sae_operator.api.activation_cache import ActivationCacheSpec
from sae_operator.api.identity import cache_identity, cache_location
from sae_operator.api.steps import CacheStep
from tests.faults import KILLED, FaultPlan, count_calls, folder_bytes, run_in_child
from tests.preparing import CONTEXT_SIZE, Bench, all_contexts, index_of
from tests.tiny_model import BOS, write_tiny_model, write_tiny_text

# Small blocks, so that a small text fills several of them.
BLOCK_CONTEXTS = 64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_TOKENS", BLOCK_CONTEXTS * CONTEXT_SIZE)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder and a text's folder."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("inputs")
    write_tiny_text(root / "text", documents=60, words=(5, 20))
    return write_tiny_model(root / "model"), root / "text"


@pytest.fixture
def bench(tmp_path: Path, inputs: tuple[Path, Path]) -> Bench:
    return Bench(tmp_path, inputs)


def test_it_stores_contexts_and_a_plan_for_exactly_the_rows_asked_for(bench: Bench) -> None:
    spec = bench.spec()
    result = bench.prepare(spec)
    index = index_of(bench.store(spec))
    contexts = all_contexts(bench.store(spec), index)
    assert contexts.dtype == torch.int32
    assert contexts.shape == (index.contexts, CONTEXT_SIZE)
    assert (contexts[:, 0] == BOS).all()
    assert sum(shard.rows for shard in index.shards) == index.tokens == 1500
    assert [block.contexts for block in index.blocks[:-1]] == [BLOCK_CONTEXTS] * (len(index.blocks) - 1)
    assert index.model.d_in == {"model.layers.1": 32}
    row = 32 * 2 + 12
    assert index.rows_per_shard == 32_000 // row
    assert (result.adopted, result.shards_total, result.shards_complete) == (False, len(index.shards), 0)
    assert result.plan is not None
    assert result.plan["bytes"] == 1500 * row


def test_contexts_are_those_of_the_text_in_another_order(bench: Bench) -> None:
    from sae_job.text.contexts import pack_contexts
    from sae_job.text.tokenize import TextTokenizer, load_tokenizer

    spec = bench.spec()
    bench.prepare(spec)
    store = bench.store(spec)
    tokenizer = TextTokenizer(load_tokenizer(spec.model))
    rows = [json.loads(line)["text"] for line in (bench.text / "text.jsonl").read_text().splitlines()]
    in_order = list(pack_contexts(tokenizer.encode(rows), CONTEXT_SIZE, tokenizer.packing(prepend_bos=True)))
    first = read_block(store, 0, sha256=index_of(store).blocks[0].sha256)
    expected = [context.tolist() for context in in_order[:BLOCK_CONTEXTS]]
    assert first.tolist() != expected
    assert sorted(first.tolist()) == sorted(expected)


def test_another_seed_is_another_order_of_the_same_contexts(bench: Bench) -> None:
    blocks = []
    for seed in (0, 1):
        spec = bench.spec(seed=seed)
        bench.prepare(spec)
        blocks.append(read_block(bench.store(spec), 0, sha256=index_of(bench.store(spec)).blocks[0].sha256).tolist())
    assert blocks[0] != blocks[1]
    assert sorted(blocks[0]) == sorted(blocks[1])


def test_two_runs_write_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "other", (bench.model, bench.text))
    bench.prepare(bench.spec())
    other.prepare(other.spec())
    there = folder_bytes(other.store(other.spec()).root)
    assert folder_bytes(bench.store(bench.spec()).root) == there


def test_more_tokens_leave_the_old_blocks_and_full_shards_as_they_are(bench: Bench) -> None:
    short, long = bench.spec(tokens=1500), bench.spec(tokens=4000)
    bench.prepare(short)
    before, plan_before = folder_bytes(bench.store(short).root), index_of(bench.store(short))
    bench.prepare(long)
    after, plan_after = folder_bytes(bench.store(long).root), index_of(bench.store(long))
    assert len(plan_after.blocks) > len(plan_before.blocks)
    assert {key: after[key] for key in before if not key.endswith("index.json")} == {
        key: data for key, data in before.items() if not key.endswith("index.json")
    }
    assert plan_after.shards[: len(plan_before.shards) - 1] == plan_before.shards[:-1]


def test_an_extended_cache_is_the_one_that_was_long_from_the_start(bench: Bench, tmp_path: Path) -> None:
    fresh = Bench(tmp_path / "fresh", (bench.model, bench.text))
    bench.prepare(bench.spec(tokens=500))
    bench.prepare(bench.spec(tokens=4000))
    fresh.prepare(fresh.spec(tokens=4000))
    assert folder_bytes(bench.store(bench.spec()).root) == folder_bytes(fresh.store(fresh.spec()).root)


def test_a_kill_at_any_store_call_leaves_nothing_that_the_next_run_does_not_mend(bench: Bench, tmp_path: Path) -> None:
    undisturbed = Bench(tmp_path / "undisturbed", (bench.model, bench.text))
    spec = undisturbed.spec(tokens=3000)
    calls = count_calls(lambda faults: undisturbed.prepare(spec, faults=faults))
    wanted = folder_bytes(undisturbed.store(spec).root)
    assert calls >= 10
    for number in range(1, calls + 1):
        killed = Bench(tmp_path / f"killed-{number}", (bench.model, bench.text))
        spec = killed.spec(tokens=3000)

        def work(killed: Bench = killed, spec: ActivationCacheSpec = spec, number: int = number) -> None:
            killed.prepare(spec, faults=FaultPlan(at=number))

        assert run_in_child(work) == KILLED
        killed.prepare(spec)
        assert folder_bytes(killed.store(spec).root) == wanted


def test_a_stop_keeps_whole_blocks(bench: Bench) -> None:
    spec = bench.spec(tokens=4000)
    with pytest.raises(Stopped):
        bench.prepare(spec, should_stop=lambda: True)
    assert CacheIndex.load(bench.store(spec)) is None
    assert bench.prepare(spec).exit_code == 0


def test_enough_contexts_need_neither_text_nor_tokenizer(bench: Bench) -> None:
    spec = bench.spec(tokens=1000)
    bench.prepare(spec)
    gone = spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"path": "/nowhere"})})
    store, target = bench.store(spec), bench.store(gone)
    target.root.parent.mkdir(parents=True, exist_ok=True)
    store.root.rename(target.root)
    assert bench.prepare(gone).exit_code == 0


def test_the_folder_is_marked_as_a_cache_of_ours(bench: Bench) -> None:
    spec = bench.spec()
    bench.prepare(spec)
    marker = json.loads(bench.store(spec).get("sae-operator.json"))
    assert marker == {"kind": "ActivationCache", "formatVersion": 1, "identity": cache_identity(spec)}


def test_without_special_tokens_left_out_every_position_is_usable(bench: Bench) -> None:
    spec = bench.spec(sampling={"excludeSpecialTokens": False, "maxNormRatio": 0})
    bench.prepare(spec)
    for record in read_block_records(bench.store(spec)):
        assert set(record.usable) == {CONTEXT_SIZE}
    assert index_of(bench.store(spec)).shards[0].stop == -(-index_of(bench.store(spec)).rows_per_shard // CONTEXT_SIZE)


def test_too_little_text_tells_how_many_rows_it_gives_and_that_many_work(bench: Bench) -> None:
    reason, field, message = bench.refusal(bench.spec(tokens=1_000_000))
    assert (reason, field) == ("NotEnoughText", "spec.tokens")
    told = int(message.split("lower it to ")[1].split()[0])
    assert 2000 < told < 10_000
    assert bench.prepare(bench.spec(tokens=told)).exit_code == 0


def test_text_with_no_tokens_is_told(bench: Bench, tmp_path: Path) -> None:
    empty = write_tiny_text(tmp_path / "empty", documents=0)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "brief"}\n{"text": ""}\n')
    for path, tokens in ((empty, 0), (short, 5)):
        reason, field, message = bench.refusal(bench.spec(dataset={"path": str(path)}))
        assert (reason, field) == ("NoTokens", "spec.dataset.path")
        assert f"has {tokens} tokens" in message


def test_what_cannot_work_is_told_before_any_text_is_read(bench: Bench) -> None:
    assert bench.refusal(bench.spec(contextSize=65))[:2] == ("ContextTooLong", "spec.contextSize")
    too_large = bench.refusal(bench.spec(storage={"maxBytes": 1000}))
    assert too_large[:2] == ("CacheTooLarge", "spec.storage.maxBytes")
    reason, field, message = bench.refusal(bench.spec(hooks=[{"name": "model.layer.1"}]))
    assert (reason, field) == ("HookNotFound", "spec.hooks[0].name")
    assert "model.layers.1" in message


@pytest.mark.parametrize("name", ["token_ids", "sequence", "position", "keep"])
def test_a_hook_that_is_called_like_a_row_field_of_shards_is_refused(bench: Bench, name: str) -> None:
    reason, field, message = bench.refusal(bench.spec(hooks=[{"name": "model.layers.1"}, {"name": name}]))
    assert (reason, field) == ("HookNameTaken", "spec.hooks[1].name")
    assert "token_ids, sequence, position, keep" in message
    assert list(bench.store(bench.spec()).list()) == []


def test_changed_text_is_not_mixed_with_what_is_there(bench: Bench, tmp_path: Path) -> None:
    text = write_tiny_text(tmp_path / "text", documents=60, words=(5, 20))
    bench.prepare(bench.spec(dataset={"path": str(text)}, tokens=500))
    with text.open("a") as file:
        file.write('{"text": "more"}\n')
    reason, field, _ = bench.refusal(bench.spec(dataset={"path": str(text)}, tokens=3000))
    assert (reason, field) == ("DatasetChanged", "spec.dataset.path")


def test_a_damaged_block_sidecar_is_told(bench: Bench) -> None:
    spec = bench.spec()
    bench.prepare(spec)
    bench.store(spec).put(block_sidecar_key(0), b"{}")
    reason, _, message = bench.refusal(spec)
    assert reason == "BlockUnreadable"
    assert block_sidecar_key(0) in message


def test_a_damaged_block_is_told(bench: Bench) -> None:
    spec = bench.spec()
    bench.prepare(spec)
    store = bench.store(spec)
    store.put("tokens/000000.safetensors", b"other bytes")
    with pytest.raises(InvalidInput, match="differs from its checksum"):
        read_block(store, 0, sha256=index_of(store).blocks[0].sha256)


def test_the_plan_is_told_before_the_start(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        result = bench.prepare(bench.spec())
    (plan_told,) = [record.message for record in caplog.records if record.message.startswith("plan of the cache:")]
    told = dict(line.strip().split(maxsplit=1) for line in plan_told.splitlines()[1:])
    assert result.plan is not None
    assert told["store"] == f"{result.plan['bytes']:,} bytes"
    assert told["rows"].startswith("1,500 in 4 shards")
    assert told["hooks"] == "model.layers.1"
    assert told["shard"].startswith("buffers")
    assert told["a"] == f"worker takes {result.plan['memoryBytes'] / 2**20:,.1f} MiB in all"


def test_a_worker_that_its_pod_cannot_hold_is_told_before_any_text_is_read(bench: Bench) -> None:
    run = {"resources": {"limits": {"memory": "100Ki"}}}
    reason, field, message = bench.refusal(bench.spec(run=run, dataset={"path": "/nowhere"}))
    assert (reason, field) == ("NotEnoughMemory", "spec.run.resources.limits.memory")
    assert "the limit is 0.1 MiB: raise it" in message
    assert bench.prepare(bench.spec(run={"resources": {"limits": {"memory": "1Gi"}}})).exit_code == 0


def test_another_prepare_that_was_faster_is_not_overwritten(bench: Bench) -> None:
    spec = bench.spec()
    bench.prepare(spec)

    class Raced(FileStore):
        def put(self, key: str, data: Any, **conditions: Any) -> Any:
            if key == plan.INDEX_KEY:
                super().put(key, super().get(key) + b" ")
            return super().put(key, data, **conditions)

    raced = Raced(bench.store(spec).root)
    step = CacheStep(
        step="prepare",
        namespace="team",
        name="tiny",
        uid="u",
        spec=bench.spec(hooks=[{"name": "model.layers.1"}, {"name": "model.layers.0"}]),
        location=cache_location(spec, "team"),
    )
    context = StepContext(
        reporter=ProgressReporter("prepare", clock=lambda: 0.0),
        should_stop=lambda: False,
        open_store=lambda _: raced,
        now=lambda: 0.0,
    )
    with pytest.raises(PreconditionFailed):
        run_prepare(step, context)
    assert [group.hooks for group in index_of(bench.store(spec)).groups] == [["model.layers.1"]]
    assert bench.prepare(step.spec).exit_code == 0
    assert [group.hooks for group in index_of(bench.store(spec)).groups] == [["model.layers.1"], ["model.layers.0"]]

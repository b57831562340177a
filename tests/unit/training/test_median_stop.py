"""Median stop: what is decided of an SAE, what is left in the folder, and what a store that fails does not do."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_job.saes.trainable import ONE_PROCESS
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore
from sae_job.training.median_stop import Comparison, FigureFolder, judge, owner_of
from sae_job.training.trainer import Trainer
from sae_operator.api.store import StoreLocation
from sae_operator.api.training_job import MedianStop
from tests.faults import FaultPlan, fail
from tests.small_training import EVERY_KIND

TOPK, STANDARD = EVERY_KIND["topk"], EVERY_KIND["standard"]
# Evaluations are after 64, 128, ... tokens: the first that counts is the second.
AFTER = 100
FINITE = st.floats(-1e6, 1e6)


def rule(**changes: Any) -> MedianStop:
    return MedianStop.model_validate({"afterTokens": AFTER, "minSaes": 3, **changes})


def leave(store: ObjectStore, *figures: float, metric: str = "explained_variance") -> None:
    """Figures of other jobs."""
    for number, figure in enumerate(figures):
        record = {"metric": metric, "figure": figure, "median": None, "others": 0, "stopped": False}
        store.put(f"other{number}-sae.json", json.dumps(record).encode())


def left(store: ObjectStore, owner: str = "me") -> dict[str, dict[str, Any]]:
    """What a job has left, by SAE."""
    records = [json.loads(store.get(info.key)) for info in store.list() if info.key.startswith(f"{owner}-")]
    return {record["sae"]: record for record in records}


def comparing(new_trainer: Callable[..., Trainer], store: ObjectStore, saes: list[Any], **changes: Any) -> Trainer:
    trainer = new_trainer(saes)
    stop = rule(**changes)
    trainer.comparison = Comparison(stop, trainer.plan, FigureFolder(store, "me", stop), ONE_PROCESS)
    return trainer


def run(trainer: Trainer) -> Trainer:
    while not trainer.finished:
        trainer.step()
    return trainer


@pytest.mark.parametrize(
    ("metric", "figure", "others", "stopped"),
    [
        ("explained_variance", 0.5, [0.6, 0.7, 0.8], True),
        ("explained_variance", 0.7, [0.6, 0.7, 0.8], False),
        ("explained_variance", 0.69, [0.6, 0.7, 0.8], True),
        ("explained_variance", 0.1, [0.6, 0.7], False),
        ("explained_variance", 0.64, [0.5, 0.6, 0.7, 0.8], True),
        ("explained_variance", 0.66, [0.5, 0.6, 0.7, 0.8], False),
        ("explained_variance", 0.1, [], False),
        ("mse", 3.0, [1.0, 2.0, 4.0], True),
        ("mse", 1.5, [1.0, 2.0, 4.0], False),
        ("dead_fraction", 0.0, [0.0, 0.0, 0.0], False),
    ],
)
def test_closed_form_cases(metric: str, figure: float, others: list[float], stopped: bool) -> None:
    verdict = judge(rule(metric=metric), figure, others)
    assert verdict.stopped is stopped
    assert verdict.others == len(others)
    assert (verdict.reason(metric, 128) is not None) is stopped
    assert not judge(rule(metric=metric), figure, others, may_stop=False).stopped


@given(FINITE, st.lists(FINITE, min_size=3), st.sampled_from(["explained_variance", "mse"]))
def test_the_order_of_the_others_does_not_count_and_less_than_half_are_given_up(
    figure: float, others: list[float], metric: str
) -> None:
    verdict = judge(rule(metric=metric), figure, others)
    assert verdict == judge(rule(metric=metric), figure, sorted(others))
    assert verdict.median == statistics.median(others)
    # Whatever the figures are, the best one always goes on.
    best = max([figure, *others]) if metric == "explained_variance" else min([figure, *others])
    assert not judge(rule(metric=metric), best, others).stopped


def test_the_message_says_figure_median_and_number() -> None:
    told = judge(rule(), 0.5, [0.6, 0.7, 0.81234]).reason("explained_variance", 128)
    assert told == (
        "stopped after 128 tokens: explained_variance 0.5 is below 0.7, the median of 3 other SAEs (medianStop)"
    )
    one = judge(rule(minSaes=1), 0.5, [0.6]).reason("explained_variance", 128)
    assert str(one).endswith("the median of 1 other SAE (medianStop)")
    assert "is above" in (judge(rule(metric="mse"), 9, [1, 2, 3]).reason("mse", 128) or "")


def test_saes_of_one_job_count_among_the_others(tmp_path: Path) -> None:
    """Wherever they stand in the spec."""
    for order in (("a", "b", "c", "d"), ("d", "c", "b", "a")):
        store = FileStore(tmp_path / order[0])
        figures = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
        folder = FigureFolder(store, "me", rule())
        verdicts = folder.compare({name: figures[name] for name in order}, tokens=128, may_stop=True)
        assert {name: verdict.stopped for name, verdict in verdicts.items()} == {
            "a": True,
            "b": True,
            "c": False,
            "d": False,
        }
        assert {verdict.others for verdict in verdicts.values()} == {3}
        assert left(store).keys() == figures.keys()


def test_what_is_there_holds(tmp_path: Path) -> None:
    """Of a job that comes to its comparison again, with other figures and among more others."""
    store = FileStore(tmp_path)
    folder = FigureFolder(store, "me", rule())
    first = folder.compare({"a": 0.5, "b": 0.6}, tokens=128, may_stop=True)
    assert not any(verdict.stopped for verdict in first.values())
    leave(store, 0.9, 0.9, 0.9, 0.9)
    before = {info.key: store.get(info.key) for info in store.list()}
    assert folder.compare({"a": 0.4, "b": 0.95}, tokens=128, may_stop=True) == first
    assert {info.key: store.get(info.key) for info in store.list()} == before


def test_an_object_that_appears_meanwhile_holds(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    leave(store, 0.9, 0.9, 0.9)

    def other_attempt() -> None:
        FigureFolder(store, "me", rule(minSaes=4)).compare({"a": 0.55}, tokens=128, may_stop=True)

    plan = FaultPlan("put me-a.json", other_attempt)
    verdicts = FigureFolder(plan.wrap(store), "me", rule()).compare({"a": 0.5}, tokens=128, may_stop=True)
    assert (verdicts["a"].figure, verdicts["a"].stopped) == (0.55, False)


RECORD = b'{"metric": "explained_variance", "median": null, "stopped": false, "others": %b, "figure": %b}'


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"", b"[]", b"{}", b'{"metric": "explained_variance", "figure": "x", "median": 1}', b"\xff", b"3"),
        *(RECORD % (b"0", figure) for figure in (b"NaN", b"-Infinity", b"1" + b"0" * 400)),
        RECORD % (b"Infinity", b"0.9"),
        b"[" * 100_000,
    ],
    ids=lambda damaged: damaged[-40:],
)
def test_what_is_no_figure_is_left_out(tmp_path: Path, damaged: bytes) -> None:
    store = FileStore(tmp_path)
    leave(store, 0.9, 0.9)
    store.put("strange.json", damaged)
    store.put("notes.txt", b"not ours")
    (verdict,) = FigureFolder(store, "me", rule()).compare({"a": 0.5}, tokens=128, may_stop=True).values()
    assert (verdict.others, verdict.stopped) == (2, False)


def test_figures_of_another_metric_are_left_out(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    leave(store, 0.1, 0.1, 0.1, metric="mse")
    (verdict,) = FigureFolder(store, "me", rule()).compare({"a": 0.5}, tokens=128, may_stop=True).values()
    assert verdict.others == 0


def test_jobs_have_names_of_their_own() -> None:
    place = StoreLocation(uri="s3://bucket/sweep/a")
    owners = {
        owner_of(place, "identity"),
        owner_of(StoreLocation(uri="s3://bucket/sweep/b"), "identity"),
        owner_of(place, "another"),
        owner_of(StoreLocation(uri="s3://bucket/sweep/a", endpoint_url="http://host"), "identity"),
    }
    assert len(owners) == 4
    assert owner_of(StoreLocation(uri="s3://bucket/sweep/a/"), "identity") in owners


def test_one_that_is_worse_is_frozen_and_the_others_bits_stay(
    new_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    store = FileStore(tmp_path)
    leave(store, 0.0, 1.0, 1.0, 1.0)
    trainer = comparing(new_trainer, store, [TOPK, STANDARD], minSaes=4)
    while trainer.steps_done < 4:
        trainer.step()
    figures = {name: record["figure"] for name, record in left(store).items()}
    assert figures == {
        sae.name: trainer.record.evaluation_after(4, sae.name)["explained_variance"] for sae in trainer.saes
    }
    assert [sae.phase for sae in trainer.saes] == ["Stopped", "Stopped"]
    assert trainer.finished

    store = FileStore(tmp_path / "again")
    worse, better = sorted(figures, key=lambda name: figures[name])
    leave(store, *[(figures[worse] + figures[better]) / 2] * 5)
    trainer = run(comparing(new_trainer, store, [TOPK, STANDARD]))
    found = {sae.name: sae for sae in trainer.saes}
    assert (found[worse].phase, found[better].phase) == ("Stopped", "Running")
    assert found[worse].message == (
        f"stopped after 128 tokens: explained_variance {figures[worse]:.4g} is below "
        f"{(figures[worse] + figures[better]) / 2:.4g}, the median of 6 other SAEs (medianStop)"
    )
    alone = run(new_trainer([sae for sae in (TOPK, STANDARD) if sae["name"] == better]))
    ours, theirs = found[better].tensors(), alone.saes[0].tensors()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # Its figure is there for others all the same.
    assert left(store)[better]["stopped"] is False
    assert left(store)[better]["tokens"] == 128


def test_it_stays_frozen_over_an_interruption(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    leave(store, *[1.0] * 4)
    trainer = comparing(new_trainer, store, [TOPK])
    while trainer.steps_done < 4:
        trainer.step()
    again = comparing(new_trainer, store, [TOPK])
    again.restore(trainer.snapshot({}))
    assert again.saes[0].message == trainer.saes[0].message
    assert again.saes[0].phase == "Stopped"


def test_one_that_fails_or_was_given_up_leaves_no_figure(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    hopeless = {**TOPK, "stopEarly": {"afterTokens": 10, "l0Above": 0.5}}
    broken = {**TOPK, "name": "broken", "training": {"learningRate": 1e9}}
    trainer = run(comparing(new_trainer, FileStore(tmp_path), [hopeless, broken, EVERY_KIND["gated"]]))
    assert [sae.phase for sae in trainer.saes] == ["Stopped", "Failed", "Running"]
    assert left(FileStore(tmp_path)).keys() == {"gated"}


def test_a_figure_that_is_no_number_is_not_compared(new_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = comparing(new_trainer, FileStore(tmp_path), [TOPK])
    comparison = trainer.comparison
    assert comparison is not None
    figures = {name: {"explained_variance": value} for name, value in (("a", math.nan), ("b", -math.inf), ("c", 0.5))}
    assert comparison.reasons(figures) == {}
    assert left(FileStore(tmp_path)).keys() == {"c"}


def test_at_the_end_figures_are_left_and_nothing_is_stopped(
    new_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    store = FileStore(tmp_path)
    leave(store, *[1.0] * 4)
    trainer = run(comparing(new_trainer, store, [TOPK], afterTokens=600))
    assert trainer.saes[0].phase == "Running"
    assert left(store)["topk"]["tokens"] == trainer.plan.tokens
    assert left(store)["topk"]["stopped"] is False
    late = run(comparing(new_trainer, FileStore(tmp_path / "late"), [TOPK], afterTokens=10_000))
    assert late.saes[0].phase == "Running"
    assert left(FileStore(tmp_path / "late")) == {}


@pytest.mark.parametrize("call", ["list", "get other0", "put me-topk.json"])
def test_a_store_that_fails_stops_no_training(
    new_trainer: Callable[..., Trainer], tmp_path: Path, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = FileStore(tmp_path)
    leave(store, *[1.0] * 4)
    plan = FaultPlan(call, fail)
    trainer = run(comparing(new_trainer, plan.wrap(store), [TOPK]))
    assert trainer.saes[0].phase == "Running"
    assert "not compared with the median of the others, and go on: the store cannot be reached" in caplog.text
    assert left(store) == {}

"""Thousands of trials: a status as small as that of ten, and a look that costs little."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from sae_operator.reconcile import sweep as sweep_module
from sae_operator.reconcile.sweep import WRITES_PER_LOOK, reconcile_sweep
from sae_operator.reconcile.sweep_status import clipped
from tests.unit.reconcile.fake_sweeps import SETTINGS, STATUS_LIMIT, FakeSweep, template

LONG = 'the loss is "not finite"\n\t\x1b é 日本語 ' * 200
MAX_CONFIG_MAP = 1024 * 1024


def wide_spec(trials: int, **changes: Any) -> dict[str, Any]:
    """A random search over four parameters, one of them a long text."""
    parameters = [
        {"path": "training.learningRate", "range": {"min": 1e-5, "max": 1e-2, "scale": "log"}},
        {"path": "saes[*].architecture.k", "range": {"min": 1, "max": 64, "whole": True}},
        {"path": "saes[*].seed", "range": {"min": 0, "max": 100000, "whole": True}},
        {"path": "run.podAnnotations", "values": [{"note": "x" * 1500}]},
    ]
    space = {"method": "random", "count": trials, "parameters": parameters}
    return {"template": template(), "space": space, "maxParallel": 1000} | changes


@pytest.fixture(scope="module")
def trained() -> FakeSweep:
    """A sweep of 2,000 trials in jobs of their own, which waits for its report. Every third job has failed with a long
    message."""
    sweep = FakeSweep(wide_spec(2000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "WRITES_PER_LOOK", 1000)
        while not sweep.reports:
            sweep.look()
            unfinished = sweep.unfinished()
            sweep.succeed(*unfinished)
            sweep.fail(*[name for i, name in enumerate(unfinished) if i % 3 == 0], message=LONG)
    return sweep


def test_the_status_of_2000_trials_stays_small(trained: FakeSweep) -> None:
    sweep = trained
    assert sweep.trials["total"] == 2000
    assert sweep.trials["failed"] > 600
    assert len(sweep.created) == 2000
    # `FakeSweep` holds every status to STATUS_LIMIT; the last one is the fullest.
    size = len(json.dumps(sweep.status, ensure_ascii=False).encode())
    assert 4000 < size < STATUS_LIMIT
    assert len(sweep.status["best"]) == len(sweep.status["failures"]) == 5
    assert sweep.config_maps
    assert len(json.dumps(sweep.config_maps).encode()) < MAX_CONFIG_MAP


def test_jobs_of_sixteen_saes_and_a_report_that_fails_over_and_over_stay_small() -> None:
    saes = [{"name": f"s{i}" + "x" * 40, "architecture": {"type": "topk", "k": 2}, "dSae": 64} for i in range(16)]
    sweep = FakeSweep(wide_spec(200, template=template(saes=saes)))
    sweep.settle()
    for name in sweep.created[:100]:
        sweep.tell_saes(name, "Succeeded", *["Failed" if i % 2 else "Succeeded" for i in range(16)])
    sweep.fail(*sweep.created[100:], message=LONG)
    sweep.look()
    attempts = [
        {"step": "report", "jobName": f"sweep-0f0f0f0f-report-{i}", "reason": "OOMKilled", "message": "m" * 300}
        for i in range(10)
    ]
    sweep.status["attempts"] = attempts
    sweep.end_report(failed=True)
    sweep.look()
    assert sweep.phase == "Succeeded"
    assert len(sweep.status["attempts"]) == 10
    assert len(sweep.status["failures"]) == 5
    # And an edit that is wrong in many places keeps all that was told.
    wrong = [{"path": f"nowhere{i}", "values": ["y" * 2000]} for i in range(16)]
    sweep.edit(space={"parameters": wrong})
    sweep.look()
    assert sweep.condition("Invalid") is not None
    assert len(json.dumps(sweep.status, ensure_ascii=False).encode()) < STATUS_LIMIT


def test_many_writes_are_spread_over_several_looks() -> None:
    sweep = FakeSweep(wide_spec(120))
    wanted = sweep.wanted()
    assert len(wanted.create) == WRITES_PER_LOOK
    assert wanted.requeue_after == 0
    sweep.settle()
    assert len(sweep.created) == 120
    assert sweep.wanted().requeue_after is None
    sweep.edit(suspend=True)
    assert len(sweep.wanted().patch_training_jobs) == WRITES_PER_LOOK
    sweep.settle()
    assert sweep.phase == "Suspended"
    sweep.edit(suspend=False)
    sweep.settle()
    # Also when nothing else is left: the end is not told before what was left out is gone.
    sweep.edit(space={"parameters": [{"path": "training.learningRate", "values": [0.5]}]})
    sweep.look()
    sweep.succeed(*[name for name in sweep.unfinished() if name not in sweep.created[:120]])
    sweep.settle()
    assert len(sweep.deleted) == 120
    assert sweep.phase == "Reporting"


def test_a_look_at_2000_trials_is_cheap(trained: FakeSweep) -> None:
    sweep = trained
    # As it works: all is there, and one job is unfinished.
    sweep.run(sweep.created[0])
    observed = sweep.observed()
    times: list[float] = []
    for _ in range(5):
        begun = time.process_time()
        wanted = reconcile_sweep(observed, SETTINGS, sweep.now)
        times.append(time.process_time() - begun)
        assert wanted.create == ()
    print(f"a look takes {1000 * min(times):.1f} ms")
    # A generous bound for a slow machine: expanding the space alone takes ten times as long.
    assert min(times) < 0.1


def test_texts_are_clipped_by_the_bytes_that_they_take() -> None:
    assert clipped("short", 10) == "short"
    assert clipped("two\n  lines", 20) == "two lines"
    for text in ("plain" * 100, "é日" * 100, '"\\' * 100, "\x00" * 100, "\ud800" * 100):
        cut = clipped(text, 50)
        assert cut.endswith("...")
        assert len(json.dumps(cut, ensure_ascii=False).encode(errors="replace")) - 2 <= 50
        assert len(cut) > 8

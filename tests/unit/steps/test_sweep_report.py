"""The step `report` as a pod runs it: whatever the jobs have left, the same table and page each time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from sae_job.errors import InvalidInput, Stopped
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.context import StepContext
from sae_job.steps.step import read_step_spec, run_step_process
from sae_job.steps.sweep_report import run_report
from sae_job.storage.base import ObjectStore
from sae_job.storage.file_store import FileStore
from sae_operator.api.steps import ENV_TERMINATION_MESSAGE, SweepStep
from sae_operator.api.store import StoreLocation
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import expand, pack
from tests.faults import KILLED, FaultPlan, count_calls, run_in_child


def spec_of(folder: Path, values: list[int], **changes: Any) -> SAESweepSpec:
    return SAESweepSpec.model_validate(
        {
            "template": {
                "activations": {"uri": "s3://caches/a"},
                "saes": [{"name": "sae", "architecture": {"type": "topk", "k": 4}, "dSae": 64}],
                "output": {"uri": f"file://{folder}"},
            },
            "space": {"parameters": [{"path": "saes[0].architecture.k", "values": values}]},
            "trialsPerJob": 2,
            **changes,
        }
    )


def results_of(trials: tuple[str, ...]) -> dict[str, Any]:
    saes = [
        {"name": name, "phase": "Succeeded", "message": None, "explained_variance": 0.5 + place / 10, "l0": 4.0}
        for place, name in enumerate(trials)
    ]
    return {"saes": saes, "tokens": 100, "provenance": {"spec": {}}}


@pytest.fixture
def step(tmp_path: Path) -> SweepStep:
    """Three jobs: one has finished, one has failed, one has left nothing."""
    folder = tmp_path / "sweep"
    spec = spec_of(folder, [2, 4, 8, 16, 32, 64])
    jobs = pack(spec, expand(spec))
    FileStore(folder / jobs[0].folder).put("results.json", json.dumps(results_of(jobs[0].trials)).encode())
    FileStore(folder / jobs[2].folder).put("results.json", b"{damaged")
    messages = [None, "spec.saes[0].dSae: is too large", None]
    return SweepStep.model_validate(
        {
            "step": "report",
            "namespace": "team",
            "name": "sweep",
            "uid": "uid",
            "spec": spec.to_manifest(),
            "output": {"uri": f"file://{folder}"},
            "jobs": [
                {"name": f"sweep-{number}", "folder": job.folder, "trials": list(job.trials), "message": message}
                for number, (job, message) in enumerate(zip(jobs, messages, strict=True))
            ],
        }
    )


@pytest.fixture
def _no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_job.steps.sweep_report.render_sweep_report", lambda *arguments, **options: "<html></html>")


def context(faults: FaultPlan | None = None, *, stop: bool = False) -> StepContext:
    def open_store(location: StoreLocation) -> ObjectStore:
        return (faults or FaultPlan()).wrap(FileStore(Path(location.uri.removeprefix("file://")), location.uri))

    return StepContext(
        reporter=ProgressReporter("report"), should_stop=lambda: stop, open_store=open_store, now=time.time
    )


def left(step: SweepStep) -> dict[str, bytes]:
    store = FileStore(Path(step.output.uri.removeprefix("file://")))
    return {key: store.get(key) for key in ("trials.json", "report.html", "sae-operator.json")}


def test_a_pod_writes_table_and_page_and_tells_it_in_one_line(
    step: SweepStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = tmp_path / "message"
    monkeypatch.setenv(ENV_TERMINATION_MESSAGE, str(message))
    spec = tmp_path / "step.json"
    spec.write_text(step.model_dump_json(by_alias=True, exclude_none=True))
    assert run_step_process("report", spec) == 0
    result = json.loads(message.read_text())
    best = step.jobs[0].trials[1]
    assert result["message"] == (
        f"6 trials: 2 succeeded, 2 failed, 2 unfinished; the best is {best} (saes[0].architecture.k=4)"
    )
    told = json.loads(left(step)["trials.json"])
    assert [trial["phase"] for trial in told["trials"]] == [
        *(["Succeeded"] * 2),
        *(["Failed"] * 2),
        *(["Unfinished"] * 2),
    ]
    assert told["trials"][2]["message"] == "spec.saes[0].dSae: is too large"
    assert told["best"] == best
    page = left(step)["report.html"].decode()
    assert f'href="{step.jobs[0].folder}/report.html"' in page
    assert f'href="{step.jobs[2].folder}/report.html"' not in page


def test_done_again_it_writes_the_same(step: SweepStep) -> None:
    run_report(step, context())
    before = left(step)
    run_report(step, context())
    assert left(step) == before


@pytest.mark.usefixtures("_no_page")
def test_killed_at_any_call_the_next_attempt_writes_the_same(step: SweepStep) -> None:
    calls = count_calls(lambda plan: run_report(step, context(plan)))
    expected = left(step)
    folder = Path(step.output.uri.removeprefix("file://"))
    for number in range(1, calls + 1):
        for key in expected:
            (folder / key).unlink(missing_ok=True)
        # The marker is there: otherwise what lies beside it would be something else's.
        (folder / "sae-operator.json").write_bytes(expected["sae-operator.json"])
        run_in_child(lambda number=number: run_report(step, context(FaultPlan(number))))
        run_report(step, context())
        assert left(step) == expected, number


@pytest.mark.usefixtures("_no_page")
def test_killed_before_its_marker_is_there_it_is_not_shut_out(step: SweepStep) -> None:
    folder = Path(step.output.uri.removeprefix("file://"))
    for call in ("get sae-operator.json", "put sae-operator.json", "get", "put report.html", "put trials.json"):
        for key in ("trials.json", "report.html", "sae-operator.json"):
            (folder / key).unlink(missing_ok=True)
        assert run_in_child(lambda call=call: run_report(step, context(FaultPlan(call)))) == KILLED
        run_report(step, context())
        assert json.loads(left(step)["trials.json"])["counts"]["total"] == 6


@pytest.mark.usefixtures("_no_page")
def test_trials_that_the_space_has_lost_are_not_in_the_table(step: SweepStep) -> None:
    folder = Path(step.output.uri.removeprefix("file://"))
    less = step.model_copy(update={"spec": spec_of(folder, [4, 48])})
    run_report(less, context())
    told = json.loads(left(step)["trials.json"])
    assert [trial["phase"] for trial in told["trials"]] == ["Succeeded", "Unfinished"]
    assert told["trials"][1]["message"] == "its training job has not been started"


@pytest.mark.usefixtures("_no_page")
def test_stopped_it_writes_nothing(step: SweepStep) -> None:
    with pytest.raises(Stopped, match="nothing is written"):
        run_report(step, context(stop=True))
    assert FileStore(Path(step.output.uri.removeprefix("file://"))).head("trials.json") is None


@pytest.mark.parametrize(
    ("key", "content", "told"),
    [
        ("sae-operator.json", b'{"kind": "SAETrainingJob", "name": "x"}', "a resource of kind SAETrainingJob"),
        ("sae-operator.json", b'{"kind": "SAESweep", "namespace": "a", "name": "b"}', "the sweep a/b"),
        ("sae-operator.json", b"{", "something else"),
        ("report.html", b"<html></html>", "something else"),
        ("results.json", b"{}", "something else"),
    ],
)
def test_what_is_anothers_is_not_overwritten(step: SweepStep, key: str, content: bytes, told: str) -> None:
    store = FileStore(Path(step.output.uri.removeprefix("file://")))
    store.put(key, content)
    with pytest.raises(InvalidInput) as caught:
        run_report(step, context())
    assert caught.value.field == "spec.template.output.uri"
    assert told in caught.value.message
    assert store.get(key) == content


def test_a_spec_of_another_step_is_refused(step: SweepStep, tmp_path: Path) -> None:
    spec = tmp_path / "step.json"
    spec.write_text(step.model_dump_json(by_alias=True, exclude_none=True))
    with pytest.raises(InvalidInput):
        read_step_spec("train", spec)
    spec.write_text("{}")
    with pytest.raises(InvalidInput, match="may be of different versions"):
        read_step_spec("report", spec)

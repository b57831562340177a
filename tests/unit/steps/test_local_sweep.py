"""Sweeps in this process: packed, adopted, continued, edited, and honest about what failed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_job import SAE, run
from sae_job.cli import run_command_line
from sae_job.errors import InvalidInput, Stopped
from sae_job.steps.local import run_resources
from sae_job.steps.local_sweep import SweepOutcome, jobs_to_run
from sae_job.storage.file_store import FileStore
from sae_job.storage.open import open_store
from sae_operator.api.manifest import ManifestError, parse_manifests
from sae_operator.api.resources import Resource
from sae_operator.api.sweep_expansion import expand
from tests.faults import KILLED, FaultPlan, run_in_child
from tests.tiny_model import write_tiny_model, write_tiny_text

PARAMETERS = [
    {"path": "saes[0].architecture.k", "values": [2, 4]},
    {"path": "training.learningRate", "values": [0.001, 0.003]},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_model(folder / "model")
    write_tiny_text(folder / "text")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training so little."""
    monkeypatch.setattr("sae_job.steps.train_results.render_report", lambda *arguments: "<html></html>")
    monkeypatch.setattr("sae_job.steps.sweep_report.render_sweep_report", lambda *arguments, **options: "<html></html>")


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a sweep of two trials that nothing has disturbed."""
    store = tmp_path_factory.mktemp("undisturbed")
    run_it(store, sweep(inputs, PARAMETERS[:1]))
    return store


def cache(inputs: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(inputs / "model"), "dtype": "float32"},
        "dataset": {"path": str(inputs / "text")},
        "hooks": [{"name": "model.layers.1"}],
        "contextSize": 16,
        "tokens": 1500,
        "storage": {"uri": "s3://bucket/caches", "shardBytes": 131072},
    }


def sweep(inputs: Path, parameters: list[dict[str, Any]] = PARAMETERS, **changes: Any) -> dict[str, Any]:
    template = {
        "activations": {"cache": cache(inputs)},
        "saes": [{"name": "sae", "architecture": {"type": "topk", "k": 4}, "dSae": 64}],
        "training": {"tokens": 1280, "batchSize": 64},
        "output": {"uri": "s3://bucket/sweep"},
        **changes.pop("template", {}),
    }
    space = {"parameters": parameters, **changes.pop("space", {})}
    return {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "SAESweep",
        "metadata": {"name": "small"},
        "spec": {"template": template, "space": space, "trialsPerJob": 2, **changes},
    }


def resources(*manifests: dict[str, Any]) -> list[Resource]:
    return parse_manifests("\n---\n".join(json.dumps(manifest) for manifest in manifests), source="test.yaml")


class Recorded:
    """A display that records titles, and may act at the first state of one."""

    def __init__(self, act_in: str = "", act: Any = None) -> None:
        self.titles: list[str] = []
        self._act_in, self._act = act_in, act

    @contextmanager
    def __call__(self, title: str) -> Iterator[Any]:
        self.titles.append(title)

        def listen(state: Any) -> None:
            if self._act is not None and title == self._act_in and state.tokens > 0:
                act, self._act = self._act, None
                act()

        yield listen

    def trained(self) -> list[str]:
        return [title for title in self.titles if title.endswith("train")]


def run_it(store: Path, *manifests: dict[str, Any], display: Recorded | None = None) -> SweepOutcome:
    (outcome,) = run_resources(resources(*manifests), store_root=store, display=display or Recorded()).sweeps
    return outcome


def told(store: Path) -> dict[str, Any]:
    return json.loads((store / "bucket/sweep/trials.json").read_text())


def left(store: Path) -> dict[str, bytes]:
    """SAEs and metrics, which must not depend on how often the run was interrupted."""
    folder = store / "bucket/sweep"
    kept = ("cfg.json", "sae_weights.safetensors", "metrics.jsonl")
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.name in kept}


def test_trials_are_packed_trained_from_one_cache_and_reported(inputs: Path, tmp_path: Path) -> None:
    display = Recorded()
    outcome = run_it(tmp_path, sweep(inputs), display=display)
    steps = ("preflight", "prepare", "cache", "finalize", "train")
    assert display.titles == [
        *(f"small job 1 of 2: {step}" for step in steps),
        *(f"small job 2 of 2: {step}" for step in ("preflight", "prepare", "train")),
    ]
    assert [row.phase for row in outcome.rows] == ["Succeeded"] * 4
    table = told(tmp_path)
    assert [trial["parameters"] for trial in table["trials"]] == [
        {"saes[0].architecture.k": k, "training.learningRate": rate} for k in (2, 4) for rate in (0.001, 0.003)
    ]
    best = max(table["trials"], key=lambda trial: trial["explained_variance"])
    assert table["best"] == best["name"]
    (place,) = (sae["uri"] for sae in best["saes"])
    assert SAE.load(place).cfg.d_sae == 64
    page = (tmp_path / "bucket/sweep/report.html").read_text()
    assert best["name"] in page
    for job in table["jobs"]:
        assert f'href="{job["folder"]}/report.html"' in page
        assert (tmp_path / "bucket/sweep" / job["folder"] / "report.html").exists()


@pytest.mark.usefixtures("_no_plots")
def test_what_is_finished_is_adopted_and_the_report_stays_as_it_is(inputs: Path, tmp_path: Path) -> None:
    run_it(tmp_path, sweep(inputs))
    before = told(tmp_path), left(tmp_path)
    display = Recorded()
    outcome = run_it(tmp_path, sweep(inputs), display=display)
    assert display.titles == []
    assert (outcome.found, outcome.jobs) == (2, 2)
    assert (told(tmp_path), left(tmp_path)) == before


@pytest.mark.usefixtures("_no_plots")
@pytest.mark.parametrize("step", ["job 1 of 2: cache", "job 1 of 2: train", "job 2 of 2: train"])
def test_an_interrupted_sweep_goes_on_where_it_was(inputs: Path, tmp_path: Path, step: str) -> None:
    run_it(tmp_path / "undisturbed", sweep(inputs))
    interrupt = Recorded(f"small {step}", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped):
        run_it(tmp_path / "interrupted", sweep(inputs), display=interrupt)
    display = Recorded()
    run_it(tmp_path / "interrupted", sweep(inputs), display=display)
    assert display.trained() == [f"small job {number} of 2: train" for number in ((1, 2) if "1" in step[:5] else (2,))]
    assert left(tmp_path / "interrupted") == left(tmp_path / "undisturbed")


@pytest.mark.usefixtures("_no_plots")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["put sae-operator.json", "put trials.json", "put report.html", "get results.json"])
def test_killed_at_the_sweeps_own_calls_the_same_command_ends_the_same(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path, call: str, when: Any
) -> None:
    def killed() -> None:
        plan = FaultPlan(call, when=when)
        monkeypatch.setattr(
            "sae_job.steps.local.open_store", lambda *arguments, **options: plan.wrap(open_store(*arguments, **options))
        )
        run_it(tmp_path, sweep(inputs, PARAMETERS[:1]))

    assert run_in_child(killed) == KILLED
    run_it(tmp_path, sweep(inputs, PARAMETERS[:1]))
    assert left(tmp_path) == left(undisturbed)
    assert [trial["phase"] for trial in told(tmp_path)["trials"]] == ["Succeeded"] * 2


@pytest.mark.usefixtures("_no_plots")
def test_added_values_are_trained_and_nothing_else(inputs: Path, tmp_path: Path) -> None:
    run_it(tmp_path, sweep(inputs))
    before = left(tmp_path)
    display = Recorded()
    more = [{**PARAMETERS[0], "values": [2, 3, 4]}, PARAMETERS[1]]
    outcome = run_it(tmp_path, sweep(inputs, more), display=display)
    assert display.trained() == ["small job 2 of 3: train"]
    assert (outcome.found, outcome.jobs, len(outcome.rows)) == (2, 3, 6)
    assert before.items() <= left(tmp_path).items()


@pytest.mark.usefixtures("_no_plots")
def test_a_finished_job_that_has_lost_a_trial_is_kept(inputs: Path, tmp_path: Path) -> None:
    run_it(tmp_path, sweep(inputs))
    before = {trial["name"]: trial for trial in told(tmp_path)["trials"]}
    display = Recorded()
    fewer = [{**PARAMETERS[0], "values": [2, 4, 5]}, {**PARAMETERS[1], "values": [0.003]}]
    outcome = run_it(tmp_path, sweep(inputs, fewer), display=display)
    assert display.trained() == ["small job 3 of 3: train"]
    assert [row.phase for row in outcome.rows] == ["Succeeded"] * 3
    after = {trial["name"]: trial for trial in told(tmp_path)["trials"]}
    kept = after.keys() & before.keys()
    assert len(kept) == 2
    assert all(after[name]["saes"] == before[name]["saes"] for name in kept)
    # And once more: what trials.json says of them is still enough.
    again = run_it(tmp_path, sweep(inputs, fewer), display=display)
    assert again.found == again.jobs == 3


@pytest.mark.usefixtures("_no_plots")
def test_another_template_is_refused_before_anything_runs(inputs: Path, tmp_path: Path) -> None:
    run_it(tmp_path, sweep(inputs))
    display = Recorded()
    changed = {"training": {"tokens": 1280, "batchSize": 32}}
    with pytest.raises(InvalidInput) as caught:
        run_it(tmp_path, sweep(inputs, template=changed), display=display)
    assert caught.value.field == "spec.template.training.batchSize"
    assert "is 32, and 64 in" in caught.value.message
    assert display.titles == []


@pytest.mark.usefixtures("_no_plots")
def test_a_job_that_fails_is_told_and_the_others_go_on(inputs: Path, tmp_path: Path) -> None:
    """The second value is more than the model's contexts give."""
    tokens = [{"path": "evaluation.heldOutTokens", "values": [100, 1499]}]
    outcome = run_it(tmp_path, sweep(inputs, tokens, trialsPerJob=1))
    assert [row.phase for row in outcome.rows] == ["Succeeded", "Failed"]
    assert "spec.evaluation.heldOutTokens" in (outcome.rows[1].message or "")
    assert not outcome.mistakes
    assert [trial["phase"] for trial in told(tmp_path)["trials"]] == ["Succeeded", "Failed"]


@pytest.mark.usefixtures("_no_plots")
def test_a_trial_that_diverges_does_not_cost_its_job(inputs: Path, tmp_path: Path) -> None:
    rates = [{"path": "training.learningRate", "values": [0.001, 1e9]}]
    outcome = run_it(tmp_path, sweep(inputs, rates))
    assert [row.phase for row in outcome.rows] == ["Succeeded", "Failed"]
    assert "not finite" in (outcome.rows[1].message or "")
    assert outcome.jobs == 1


@pytest.mark.usefixtures("_no_plots")
def test_what_nobody_thought_of_fails_one_job(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sae_job.steps import step as steps

    train, calls = steps.step_function("train"), []

    def broken(step: Any, context: Any) -> Any:
        calls.append(step.name)
        if len(calls) == 1:
            raise RuntimeError("the disk has gone")
        return train(step, context)

    monkeypatch.setattr("sae_job.steps.train.run_train", broken)
    outcome = run_it(tmp_path, sweep(inputs))
    assert [row.phase for row in outcome.rows] == ["Failed", "Failed", "Succeeded", "Succeeded"]
    assert outcome.rows[0].message == "RuntimeError: the disk has gone"
    assert "small: job 1 of 2 failed, the others go on: RuntimeError: the disk has gone" in caplog.text
    # The same command tries it again.
    assert [row.phase for row in run_it(tmp_path, sweep(inputs)).rows] == ["Succeeded"] * 4


@pytest.mark.usefixtures("_no_plots")
def test_no_more_trials_are_started_after_too_many_failures(inputs: Path, tmp_path: Path) -> None:
    rates = [{"path": "training.learningRate", "values": [1e9, 0.001, 0.002]}]
    display = Recorded()
    outcome = run_it(tmp_path, sweep(inputs, rates, trialsPerJob=1, maxFailedTrials=0), display=display)
    assert [row.phase for row in outcome.rows] == ["Failed", "Unfinished", "Unfinished"]
    assert display.trained() == ["small job 1 of 3: train"]


@pytest.mark.usefixtures("_no_plots")
def test_a_median_stop_is_shared_by_all_jobs(inputs: Path, tmp_path: Path) -> None:
    rates = [{"path": "training.learningRate", "values": [0.003, 0.002, 0.001, 1e-7]}]
    stop = {"afterTokens": 300, "minSaes": 3}
    outcome = run_it(tmp_path, sweep(inputs, rates, medianStop=stop))
    assert [row.phase for row in outcome.rows] == ["Succeeded", "Succeeded", "Stopped", "Stopped"]
    assert "the median of 3 other SAEs (medianStop)" in (outcome.rows[3].message or "")
    assert len(list((tmp_path / "bucket/sweep/median-stop").iterdir())) == 4


@pytest.mark.usefixtures("_no_plots")
def test_a_template_may_refer_to_a_cache_of_the_same_file(inputs: Path, tmp_path: Path) -> None:
    named = {
        "apiVersion": "sae-operator.dev/v1alpha1",
        "kind": "ActivationCache",
        "metadata": {"name": "shared"},
        "spec": cache(inputs),
    }
    refers = sweep(inputs, PARAMETERS[:1], template={"activations": {"cacheRef": {"name": "shared"}}})
    display = Recorded()
    run_it(tmp_path, refers, named, display=display)
    assert display.titles[:3] == ["shared prepare", "shared cache", "shared finalize"]
    assert display.titles[3:] == ["small job 1 of 1: preflight", "small job 1 of 1: train"]
    with pytest.raises(InvalidInput, match=r"spec\.template\.activations\.cacheRef\.name: no ActivationCache named"):
        run_it(tmp_path, refers)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ([{"path": "training.rate", "values": [1]}], "spec.template.training.rate"),
        ([{"path": "saes[3].dSae", "values": [1]}], "spec.template.saes[3].dSae"),
        ([{"path": "output.uri", "values": ["file://x"]}], "spec.space.parameters[0].path"),
        ([{"path": "saes[0].architecture.k", "values": [4, 0]}], "spec.template.saes[0].architecture.k"),
    ],
)
def test_a_space_that_is_wrong_is_told_before_anything_runs(
    inputs: Path, tmp_path: Path, parameters: list[dict[str, Any]], field: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        run_it(tmp_path, sweep(inputs, parameters))
    (problem,) = caught.value.problems
    assert (problem.resource, problem.field) == ("SAESweep/small", field)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("_no_plots")
def test_a_folder_of_something_else_is_refused(inputs: Path, tmp_path: Path) -> None:
    run_it(tmp_path, sweep(inputs, PARAMETERS[:1]))
    other = sweep(inputs, PARAMETERS[:1])
    other["metadata"]["name"] = "other"
    with pytest.raises(InvalidInput, match="holds the output of the sweep default/small; choose another uri"):
        run_it(tmp_path, other)
    inner = sweep(inputs, PARAMETERS[:1])
    inner["spec"]["template"]["output"]["uri"] = f"s3://bucket/sweep/{told(tmp_path)['jobs'][0]['folder']}"
    with pytest.raises(InvalidInput, match="holds the output of a resource of kind SAETrainingJob"):
        run_it(tmp_path, inner)
    (tmp_path / "bucket/plain").mkdir()
    (tmp_path / "bucket/plain/report.html").write_text("mine")
    inner["spec"]["template"]["output"]["uri"] = "s3://bucket/plain"
    with pytest.raises(InvalidInput, match="something else"):
        run_it(tmp_path, inner)


def written(tmp_path: Path, manifest: dict[str, Any]) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(manifest))
    return file


@pytest.mark.usefixtures("_no_plots")
def test_the_command_line_shows_the_best_and_where_the_rest_is(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = [{"path": "training.learningRate", "values": [0.001, 0.003, 1e9]}]
    file = written(tmp_path, sweep(inputs, rates, trialsPerJob=1))
    assert run_command_line(["run", "-f", str(file), "--store", str(tmp_path / "store[x]")]) == 1
    shown = capsys.readouterr()
    words = " ".join(shown.out.split())
    assert "small: 3 trials in 3 training jobs: 2 succeeded, 1 failed" in words
    assert "learningRate=0.003" in "".join(words.split())
    assert f"report {tmp_path}/store[x]/bucket/sweep/report.html" in words
    assert f"best {tmp_path}/store[x]/bucket/sweep/" in words
    assert "failed 1 trial, e.g. t-" in words
    assert "warning: SAESweep/small: spec.template.training.learningRate" in shown.err


@pytest.mark.parametrize(
    "damaged",
    [
        '{"jobs": [{"folder": "0123456789", "trials": [{"a": 1}]}]}',
        '{"jobs": [{"folder": "../other", "trials": ["t-0123456789"]}]}',
        '{"jobs": [3, {"folder": 3, "trials": []}]}',
        "[" * 100_000,
    ],
    ids=lambda damaged: damaged[-40:],
)
def test_a_damaged_table_of_an_earlier_run_is_left_out(inputs: Path, tmp_path: Path, damaged: str) -> None:
    (resource,) = resources(sweep(inputs))
    store = FileStore(tmp_path)
    store.put("trials.json", damaged.encode())
    jobs, finished = jobs_to_run(resource.spec, expand(resource.spec), store)
    assert ([len(job.trials) for job in jobs], finished) == ([2, 2], {})


@pytest.mark.usefixtures("_no_plots")
def test_exit_codes(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ["--store", str(tmp_path / "store")]
    fine = written(tmp_path, sweep(inputs, PARAMETERS[:1]))
    assert run_command_line(["run", "-f", str(fine), *store]) == 0
    wrong = written(tmp_path, sweep(inputs, [{"path": "training.rate", "values": [1]}]))
    assert run_command_line(["run", "-f", str(wrong), *store]) == 2
    assert "SAESweep/small: spec.template.training.rate: unknown field 'rate'" in capsys.readouterr().err
    missing = sweep(inputs, PARAMETERS[:1])
    missing["metadata"]["name"] = "missing"
    missing["spec"]["template"]["output"]["uri"] = "s3://bucket/missing"
    missing["spec"]["template"]["activations"]["cache"]["hooks"] = [{"name": "model.layers.9"}]
    file = written(tmp_path, missing)
    # No job can run: the user's mistake, not bad luck.
    assert run_command_line(["run", "-f", str(file), *store]) == 2


@pytest.mark.usefixtures("_no_plots")
def test_run_from_python_gives_the_table(inputs: Path, tmp_path: Path) -> None:
    results = run(written(tmp_path, sweep(inputs, PARAMETERS[:1])), store=tmp_path / "store")
    assert [trial["phase"] for trial in results["small"]["trials"]] == ["Succeeded", "Succeeded"]

"""Which training jobs a sweep in this process has, however its space is edited between runs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sae_job.steps.local_sweep import jobs_to_run
from sae_job.steps.output_marker import MARKER_KEY, RESULTS_KEY
from sae_job.steps.sweep_folder import TABLE_KEY
from sae_job.storage.file_store import FileStore
from sae_operator.api.sweep import SAESweepSpec
from sae_operator.api.sweep_expansion import TrialJob, expand

# Values of the two parameters, trials per job, and how many of the jobs a run comes to.
SPACES = st.tuples(
    st.sets(st.integers(1, 6), min_size=1, max_size=5),
    st.sets(st.sampled_from([1e-4, 3e-4, 1e-3]), min_size=1),
    st.integers(1, 4),
    st.integers(0, 6),
)


def spec_of(ks: set[int], rates: set[float], trials_per_job: int) -> SAESweepSpec:
    return SAESweepSpec.model_validate(
        {
            "template": {
                "activations": {"uri": "s3://caches/a"},
                "saes": [{"name": "sae", "architecture": {"type": "topk", "k": 4}, "dSae": 64}],
                "training": {"tokens": 100},
                "output": {"uri": "s3://bucket/sweep"},
            },
            "space": {
                "parameters": [
                    {"path": "saes[0].architecture.k", "values": sorted(ks)},
                    {"path": "training.learningRate", "values": sorted(rates)},
                ]
            },
            "trialsPerJob": trials_per_job,
        }
    )


def finish(store: FileStore, job: TrialJob) -> None:
    """What a training job leaves, as far as it counts here."""
    results: dict[str, Any] = {
        "saes": [{"name": sae.name, "phase": "Succeeded"} for sae in job.spec.saes],
        "tokens": 100,
        "provenance": {"spec": job.spec.to_manifest()},
    }
    store.put(f"{job.folder}/{MARKER_KEY}", b"{}")
    store.put(f"{job.folder}/{RESULTS_KEY}", json.dumps(results).encode())


def plan(store: FileStore, jobs: list[TrialJob]) -> None:
    """trials.json as a run writes it before its first job."""
    told = [{"name": "x", "folder": job.folder, "trials": list(job.trials), "message": None} for job in jobs]
    store.put(TABLE_KEY, json.dumps({"jobs": told}).encode())


def is_finished(store: FileStore, job: TrialJob) -> bool:
    return store.head(f"{job.folder}/{RESULTS_KEY}") is not None


@settings(deadline=None, max_examples=60)
@given(st.lists(SPACES, min_size=2, max_size=4))
def test_what_has_been_trained_is_never_trained_again(runs: list[tuple[set[int], set[float], int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(Path(folder))
        # Trials that the run before has trained, and those that still were in its space.
        trained: set[str] = set()
        for ks, rates, trials_per_job, allowed in runs:
            spec = spec_of(ks, rates, trials_per_job)
            trials = expand(spec)
            jobs, _ = jobs_to_run(spec, trials, store)
            # Every trial is in one job, and the jobs are in the order of the trials.
            names = [name for job in jobs for name in job.trials]
            assert sorted(names) == sorted(trial.name for trial in trials)
            order = {trial.name: place for place, trial in enumerate(trials)}
            firsts = [order[job.trials[0]] for job in jobs]
            assert firsts == sorted(firsts)
            assert len({job.folder for job in jobs}) == len(jobs)
            again = {name for job in jobs if not is_finished(store, job) for name in job.trials}
            assert not again & trained
            plan(store, jobs)
            for job in [job for job in jobs if not is_finished(store, job)][:allowed]:
                finish(store, job)
            trained = {name for job in jobs if is_finished(store, job) for name in job.trials}


def test_the_same_space_has_the_same_jobs(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    spec = spec_of({1, 2, 3}, {1e-4, 1e-3}, 4)
    jobs, finished = jobs_to_run(spec, expand(spec), store)
    plan(store, jobs)
    finish(store, jobs[0])
    assert jobs_to_run(spec, expand(spec), store) == (jobs, finished) == (jobs, {})


def test_a_damaged_table_is_none(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    spec = spec_of({1, 2}, {1e-4}, 1)
    expected = jobs_to_run(spec, expand(spec), store)
    for damaged in (b"", b"[]", b'{"jobs": 3}', b'{"jobs": [{"folder": 1}, {"folder": "x", "trials": ["t-1"]}, 7]}'):
        store.put(TABLE_KEY, damaged)
        assert jobs_to_run(spec, expand(spec), store) == expected


def test_results_of_another_template_are_not_taken_for_those_of_fewer_trials(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    spec = spec_of({1, 2}, {1e-4}, 2)
    jobs, _ = jobs_to_run(spec, expand(spec), store)
    plan(store, jobs)
    finish(store, jobs[0])
    less = spec_of({2}, {1e-4}, 2)
    kept, finished = jobs_to_run(less, expand(less), store)
    assert [job.folder for job in kept] == [jobs[0].folder] == list(finished)
    other = less.model_copy(update={"template": less.template.model_copy(update={"normalization": "none"})})
    anew, finished = jobs_to_run(other, expand(other), store)
    assert finished == {}
    assert [job.folder for job in anew] != [jobs[0].folder]

"""Steps know caches and outputs by the identity that they are given: that of the spec before defaults filled it in."""

from __future__ import annotations

import json

import pytest
import torch

from sae_job.activations.manifest import read_manifest
from sae_job.activations.marker import read_marker
from sae_job.activations.verify import verify_cache
from sae_job.errors import InvalidInput
from sae_job.steps.cache import run_cache
from sae_job.steps.finalize import run_finalize
from sae_job.steps.preflight import run_preflight
from sae_job.steps.prepare import run_prepare
from sae_job.storage.file_store import FileStore, path_of_file_uri
from sae_operator.api.steps import CacheStep, CacheStepName
from tests.live_job import LiveJob, context, write_inputs

WRITTEN, OF_JOB = "0123456789abcdef", "fedcba9876543210"


def cache_step(job: LiveJob, name: CacheStepName, identity: str | None = WRITTEN) -> CacheStep:
    return CacheStep(
        step=name, namespace="ns", name="cache", uid="uid", spec=job.cache, location=job.location, identity=identity
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> LiveJob:
    """A job whose cache is finished."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("identity")
    write_inputs(folder)
    job = LiveJob.make_cached(folder, folder / "out", folder / "caches")
    run_prepare(cache_step(job, "prepare"), context())
    run_cache(cache_step(job, "cache"), context())
    run_finalize(cache_step(job, "finalize"), context())
    return job


def test_marker_and_manifest_carry_it(job: LiveJob) -> None:
    store = FileStore(path_of_file_uri(job.location.uri))
    marker = read_marker(store)
    assert marker is not None
    assert (marker.identity, read_manifest(store).identity) == (WRITTEN, WRITTEN)
    assert verify_cache(store).problems == []


def test_a_cache_of_the_same_identity_is_adopted_and_another_is_not(job: LiveJob) -> None:
    assert run_prepare(cache_step(job, "prepare"), context()).adopted
    with pytest.raises(InvalidInput) as caught:
        run_prepare(cache_step(job, "prepare", identity=None), context())
    assert (caught.value.reason, caught.value.field) == ("CacheTaken", "spec.storage.uri")


def test_a_job_knows_its_cache_and_its_output_by_them(job: LiveJob) -> None:
    step = job.train_step().model_copy(update={"identity": OF_JOB, "identity_of_cache": WRITTEN})
    assert run_preflight(step, context()).exit_code == 0
    assert json.loads((job.output / "sae-operator.json").read_text())["specHash"] == OF_JOB
    with pytest.raises(InvalidInput) as caught:
        run_preflight(step.model_copy(update={"identity": None}), context())
    assert caught.value.reason == "OutputTaken"
    with pytest.raises(InvalidInput) as caught:
        run_preflight(step.model_copy(update={"identity_of_cache": None}), context())
    assert caught.value.reason == "CacheTaken"

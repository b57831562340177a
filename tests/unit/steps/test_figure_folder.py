"""Where a job's figures for its median stop go, and that a folder that cannot be read is told before training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_job.errors import InvalidInput
from sae_job.reporting.progress import ProgressReporter
from sae_job.steps.context import StepContext
from sae_job.steps.figure_folder import check_figure_folder
from sae_job.storage.base import ObjectInfo, ObjectStore
from sae_job.storage.file_store import FileStore
from sae_operator.api.store import StoreLocation
from tests.faults import FaultPlan, FaultyStore
from tests.small_training import train_step


class Refused(FaultyStore):
    """A store that nobody here may list."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        raise InvalidInput("AccessDenied", "access to s3://figures is denied; check the Secret")


class Opened:
    """Opens stores, and notes where."""

    def __init__(self, folder: Path) -> None:
        self.locations: list[StoreLocation] = []
        self._folder = folder

    def __call__(self, location: StoreLocation) -> ObjectStore:
        self.locations.append(location)
        return Refused(FileStore(self._folder), FaultPlan())


def check(folder: Path, **rule: Any) -> Opened:
    parts = {"medianStop": {"afterTokens": 100, **rule}} if rule else {}
    output = {"uri": "s3://bucket/out", "endpointUrl": "http://host:9000", "secretRef": {"name": "s3"}}
    opened = Opened(folder)
    context = StepContext(
        reporter=ProgressReporter("preflight"), should_stop=lambda: False, open_store=opened, now=time.time
    )
    check_figure_folder(train_step(output=output, **parts), FileStore(folder), context)
    return opened


def test_a_folder_that_cannot_be_read_is_told_with_its_field(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        check(tmp_path, uri="s3://figures/sweep")
    assert (caught.value.field, caught.value.reason) == ("spec.medianStop.uri", "AccessDenied")
    assert caught.value.message == "access to s3://figures is denied; check the Secret"


def test_below_the_output_or_without_a_median_stop_there_is_nothing_to_check(tmp_path: Path) -> None:
    assert check(tmp_path, minSaes=2).locations == []
    assert check(tmp_path).locations == []


def test_the_folder_is_opened_with_the_access_of_the_output(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    output = {"uri": "s3://bucket/out", "endpointUrl": "http://host:9000", "secretRef": {"name": "s3"}}
    step = train_step(output=output, medianStop={"afterTokens": 100, "uri": "s3://figures/sweep"})
    context = StepContext(
        reporter=ProgressReporter("preflight"), should_stop=lambda: False, open_store=opened, now=time.time
    )
    with pytest.raises(InvalidInput):
        check_figure_folder(step, FileStore(tmp_path), context)
    (location,) = opened.locations
    assert location == step.spec.output.model_copy(update={"uri": "s3://figures/sweep"})

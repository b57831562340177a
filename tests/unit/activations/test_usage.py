"""The use of a cache is recorded at most once a day, and never fails a job."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sae_job.activations.marker import LAST_USED_KEY
from sae_job.activations.usage import last_use, note_use
from sae_job.errors import InvalidInput
from sae_job.storage.base import ObjectInfo, StoreError
from sae_job.storage.file_store import FileStore
from tests.faults import FaultPlan

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = 3600.0


def test_a_use_is_recorded_once_a_day(tmp_path: Path) -> None:
    plan = FaultPlan()
    store = plan.wrap(FileStore(tmp_path))

    def writes() -> int:
        return sum(name.startswith("put") for name in plan.names)

    note_use(store, NOON.timestamp())
    assert store.get(LAST_USED_KEY) == b'{"date": "2026-03-01"}\n'
    for later in (1, 2, 11):
        note_use(store, NOON.timestamp() + later * HOUR)
    assert writes() == 1
    note_use(store, NOON.timestamp() + 12 * HOUR)
    assert writes() == 2
    assert store.get(LAST_USED_KEY) == b'{"date": "2026-03-02"}\n'


@pytest.mark.parametrize("error", [InvalidInput("AccessDenied", "no"), StoreError("no")])
@pytest.mark.parametrize("call", ["get", "put"])
def test_a_store_that_refuses_it_fails_no_job(tmp_path: Path, error: Exception, call: str) -> None:
    def refuse() -> None:
        raise error

    store = FaultPlan(at=call, action=refuse).wrap(FileStore(tmp_path))
    note_use(store, NOON.timestamp())
    assert store.head(LAST_USED_KEY) is None


def test_the_last_use_is_the_time_of_the_newest_object(tmp_path: Path) -> None:
    times = [NOON, NOON + timedelta(hours=5), NOON - timedelta(days=3)]
    objects = [ObjectInfo(f"{number}", 1, "", time) for number, time in enumerate(times)]
    assert last_use(objects) == times[1]
    assert last_use([]) is None
    assert last_use([*objects, ObjectInfo("x", 1, "")]) is None, "of which nobody knows when it was written"


def test_a_folder_tells_when_its_objects_were_written(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    before = datetime.now(UTC) - timedelta(seconds=1)
    store.put("x", b"")
    (info,) = store.list()
    assert info.modified is not None
    assert before < info.modified < datetime.now(UTC) + timedelta(seconds=1)

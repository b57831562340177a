"""A sweep's folder: whose it is, and what its training jobs have left there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sae_job.errors import InvalidInput, Stopped
from sae_job.reporting.sweep_table import JobResults
from sae_job.steps.output_marker import MARKER_KEY, RESULTS_KEY, finished_results
from sae_job.storage.base import ObjectNotFound, ObjectStore, PreconditionFailed
from sae_job.storage.folder import StoreFolder
from sae_operator.api.steps import SweepJob

KIND = "SAESweep"
TABLE_KEY, REPORT_KEY = "trials.json", "report.html"
FIELD = "spec.template.output.uri"
READERS = 16
# Of results.json; the rest of it is of no use to a table.
_KEPT = ("saes", "tokens")


def claim_folder(store: ObjectStore, namespace: str, name: str) -> None:
    """Mark a folder as a sweep's.

    Raises:
        InvalidInput: it is another sweep's, a training job's, or holds a report of something else.
    """
    mine = {"kind": KIND, "namespace": namespace, "name": name}
    try:
        _check(store, store.get(MARKER_KEY), mine)
    except ObjectNotFound:
        for key in (RESULTS_KEY, TABLE_KEY, REPORT_KEY):
            if store.head(key) is not None:
                raise _taken(store, f"something else ({key} without our marker)") from None
        try:
            store.put(MARKER_KEY, (json.dumps(mine, sort_keys=True) + "\n").encode(), if_absent=True)
        except PreconditionFailed:
            # Another one was faster, or our own write was repeated after its answer was lost.
            _check(store, store.get(MARKER_KEY), mine)


def _check(store: ObjectStore, data: bytes, mine: dict[str, str]) -> None:
    marker = _parsed(data)
    if marker == mine:
        return
    if marker.get("kind") == KIND:
        raise _taken(store, f"the sweep {marker.get('namespace')}/{marker.get('name')}")
    raise _taken(store, f"a resource of kind {marker['kind']}" if "kind" in marker else "something else")


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _taken(store: ObjectStore, whose: str) -> InvalidInput:
    return InvalidInput("OutputTaken", f"{store.uri} holds the output of {whose}; choose another uri", field=FIELD)


def read_results(store: ObjectStore, jobs: Sequence[SweepJob], should_stop: Callable[[], bool]) -> list[JobResults]:
    """What the training jobs have left, as far as it is there.

    Raises:
        Stopped: `should_stop` said so.
        StoreError: the store failed.
    """

    def read(job: SweepJob) -> JobResults:
        if should_stop():
            raise Stopped("stopped while results were read; nothing is written, and the next attempt reads them again")
        found = finished_results(StoreFolder(store, job.folder))
        kept = None if found is None else {key: found[key] for key in _KEPT}
        return JobResults(job.name, job.folder, tuple(job.trials), job.message, kept)

    with ThreadPoolExecutor(READERS, thread_name_prefix="results") as threads:
        return list(threads.map(read, jobs))


def read_table(store: ObjectStore) -> dict[str, Any]:
    """What an earlier report says of trials and jobs; empty without one."""
    try:
        return _parsed(store.get(TABLE_KEY))
    except ObjectNotFound:
        return {}

"""`run`: what `sae-job run` does, as a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_job.steps.local import read_results, run_resources
from sae_job.steps.sweep_folder import read_table
from sae_job.storage.open import open_store
from sae_operator.api.manifest import load_manifests


def run(filename: str | Path, *, store: str | Path | None = None) -> dict[str, dict[str, Any]]:
    """Run the resources of a YAML file in this process, continuing where an earlier run was interrupted.

    Args:
        filename: the manifest.
        store: folder that stands in for `s3://`.

    Returns:
        Name of each training job -> its results.json; name of each sweep -> its trials.json.

    Raises:
        ManifestError: the manifest is not valid.
        InvalidInput: the specification or the data is wrong.
        Stopped: SIGTERM or Ctrl-C.
        StoreError: the object store failed.
    """
    root = None if store is None else Path(store)
    outcomes = run_resources(load_manifests(Path(filename)), store_root=root)
    jobs = {outcome.name: read_results(outcome.output, store_root=root) for outcome in outcomes.jobs}
    stores = {outcome.name: open_store(outcome.output, local_root=root) for outcome in outcomes.sweeps}
    return jobs | {name: read_table(store) for name, store in stores.items()}

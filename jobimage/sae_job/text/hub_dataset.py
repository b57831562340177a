"""Data sets on the Hugging Face Hub, read at one commit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_job.errors import InvalidInput
from sae_job.text.hub import first_line, is_connection_trouble
from sae_job.text.hub_waits import bound_dataset_waits, bound_hub_waits
from sae_job.text.local_files import METADATA_FILE

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from sae_operator.api.activation_cache import DatasetSource


def read_hub_dataset(source: DatasetSource, commit: str | None) -> Dataset | IterableDataset:
    """Rows of a split at a commit.

    Raises:
        InvalidInput: no such data set, configuration, split or file.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    bound_hub_waits()
    bound_dataset_waits()
    try:
        return load_dataset(
            source.path,
            name=source.name,
            split=source.split,
            revision=commit or source.revision,
            data_files=list(source.data_files) or None,
            streaming=source.streaming,
        )
    except DatasetNotFoundError as error:
        if is_connection_trouble(error):
            raise
        raise InvalidInput("DatasetNotFound", first_line(error), field="spec.dataset.path") from error
    except (ValueError, FileNotFoundError) as error:
        if is_connection_trouble(error):
            raise
        raise InvalidInput("DatasetUnreadable", first_line(error), field=_field_to_blame(source, error)) from error


def hub_metadata(source: DatasetSource, commit: str | None) -> bytes | None:
    """Content of the metadata file of a data set's repository; None when there is none, or none that is cached where
    the Hub is not asked."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = hf_hub_download(source.path, METADATA_FILE, repo_type="dataset", revision=commit or source.revision)
    except EntryNotFoundError as error:  # also what is raised when it could not be asked for
        if is_connection_trouble(error) and not HF_HUB_OFFLINE:
            raise
        return None
    return Path(file).read_bytes()


def _field_to_blame(source: DatasetSource, error: Exception) -> str:
    text = str(error).lower()
    if "config" in text:
        return "spec.dataset.name"
    if "split" in text:
        return "spec.dataset.split"
    return "spec.dataset.dataFiles" if source.data_files else "spec.dataset.path"

"""A data set of cached activations to the Hugging Face Hub: Parquet and metadata in one commit to one revision."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from sae_job.errors import InvalidInput
from sae_job.storage.base import StoreError
from sae_job.text.hub import first_line, is_connection_trouble

METADATA_FILE = "sae_operator_cache.json"


class HubApi(Protocol):
    """The calls of `huggingface_hub.HfApi` that a push makes."""

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> Any: ...

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any: ...

    def create_branch(self, repo_id: str, *, branch: str, repo_type: str, exist_ok: bool) -> Any: ...

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str | Path,
        repo_type: str,
        revision: str | None,
        commit_message: str,
        delete_patterns: list[str],
    ) -> Any: ...


def push_dataset(
    folder: Path,
    files: Sequence[str],
    repo: str,
    *,
    private: bool,
    revision: str | None,
    metadata: Mapping[str, Any],
    api: HubApi,
    progress: Callable[[int], None] = lambda files: None,
) -> None:
    """Push a data set that was written to a folder; `datasets.load_dataset(repo)` reads it.

    Data and metadata go up in one commit, which also takes away the data files of an earlier push.

    Args:
        folder: the data set.
        files: names of its data files, in order.
        repo: id of the data set on the Hub; made when it is not there.
        private: only for those who are let in; refused where the repository is public already.
        revision: branch; the default one when None. Made when it is not there.
        metadata: what else to tell, as JSON in `sae_operator_cache.json`.
        api: `huggingface_hub.HfApi()`.
        progress: told how many files are converted.

    Raises:
        InvalidInput: the Hub refuses it.
        StoreError: the Hub cannot be reached.
    """
    with _errors_told(repo):
        api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)
        if private and not api.repo_info(repo, repo_type="dataset").private:
            raise InvalidInput(
                "RepositoryPublic", f"the data set {repo!r} is public already: make it private, or choose another one"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True)
    # Beside the data set, where there is room for it once more.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        converted = Path(scratch)
        (converted / "data").mkdir()
        for number, name in enumerate(files):
            _to_parquet(folder / name, converted / "data" / f"train-{number:05d}-of-{len(files):05d}.parquet")
            progress(number + 1)
        (converted / METADATA_FILE).write_text(json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")
        with _errors_told(repo):
            api.upload_folder(
                repo_id=repo,
                folder_path=converted,
                repo_type="dataset",
                revision=revision,
                commit_message="Add cached activations",
                delete_patterns=["data/train-*.parquet"],
            )


@contextmanager
def _errors_told(repo: str) -> Iterator[None]:
    """The Hub's errors as ours."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    # The base class of its HTTP library's errors; which library that is has changed.
    transport_error: type[BaseException] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (transport_error, HFValidationError, LocalTokenNotFoundError, ConnectionError, TimeoutError) as error:
        if is_connection_trouble(error):
            raise StoreError(f"the Hugging Face Hub cannot be reached for {repo!r}: {first_line(error)}") from error
        raise InvalidInput(
            "HubRefuses", f"the Hugging Face Hub refuses {repo!r}: {first_line(error)}; check the id and HF_TOKEN"
        ) from error


def _to_parquet(source: Path, target: Path) -> None:
    """One Arrow file as Parquet, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with (
        pa.memory_map(str(source)) as mapped,
        pa.ipc.open_stream(mapped) as stream,
        pq.ParquetWriter(target, stream.schema) as writer,
    ):
        for batch in stream:
            writer.write_batch(batch)

"""Names on the Hugging Face Hub: what is one, and which commit it stands for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from sae_job.errors import InvalidInput
from sae_job.text.hub_waits import bound_hub_waits

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_local(name: str) -> bool:
    """Whether a name is a file or folder here, and not a Hub id."""
    return Path(name).expanduser().exists()


def resolve_commit(
    name: str, revision: str | None, *, kind: Literal["model", "dataset"], name_field: str, revision_field: str
) -> str | None:
    """Commit that a Hub id stands for now; None for what lies on local disk.

    Without a connection (`HF_HUB_OFFLINE`, an air-gapped node) the commit is the one in the local Hub cache, if any.

    Raises:
        InvalidInput: no such repository or revision, or no access to it.
    """
    if is_local(name):
        return None
    if not _HUB_ID.match(name):
        raise InvalidInput(
            f"{kind.capitalize()}NotFound",
            f"{name!r} is neither a file or folder here nor an id on the Hugging Face Hub; check the path in the pod",
            field=name_field,
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    bound_hub_waits()
    api = HfApi()
    look_up = api.model_info if kind == "model" else api.dataset_info
    try:
        return look_up(name, revision=revision).sha
    except GatedRepoError as error:
        raise InvalidInput(
            f"{kind.capitalize()}Gated",
            f"access to {name!r} must be asked for on the Hugging Face Hub; then give its token in run.env as HF_TOKEN",
            field=name_field,
        ) from error
    except RevisionNotFoundError as error:
        raise InvalidInput(
            "RevisionNotFound", f"{name!r} has no branch, tag or commit {revision!r}", field=revision_field
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InvalidInput(
            f"{kind.capitalize()}NotFound",
            f"the Hugging Face Hub has no {kind} {name!r} (or it is private: give a token in run.env as HF_TOKEN)",
            field=name_field,
        ) from error
    except OfflineModeIsEnabled:
        return _cached_commit(name, revision, kind)


def _cached_commit(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str | None:
    """Commit of a repository in the local Hub cache, where its reference is recorded."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    reference = folder / "refs" / (revision or "main")
    return reference.read_text().strip() if reference.is_file() else revision


def is_connection_trouble(error: BaseException) -> bool:
    """Whether an error, or what it came from, is about reaching the Hub: worth a retry, and not the user's mistake."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # The base class of its HTTP library's errors; which library that is has changed.
    transport_error = HfHubHTTPError.__mro__[1]

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, HfHubHTTPError):
            return seen.response is None or seen.response.status_code >= 500
        if isinstance(seen, (transport_error, LocalEntryNotFoundError, ConnectionError, TimeoutError)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def first_line(error: BaseException) -> str:
    """First line of an error's text: the libraries append paragraphs of advice."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

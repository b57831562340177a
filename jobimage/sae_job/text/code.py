"""Code that a model's repository brings, which runs only where the spec says that it is trusted."""

from __future__ import annotations

from sae_job.errors import InvalidInput


def needs_code(error: BaseException) -> bool:
    """Whether Transformers refused to load something for the want of trust."""
    return isinstance(error, ValueError) and "trust_remote_code" in str(error)


def code_refused(name: str, field: str) -> InvalidInput:
    """What to tell of a model that needs its own code.

    Args:
        name: of the model.
        field: path of its `trustRemoteCode`.
    """
    return InvalidInput(
        "CodeNotTrusted",
        f"{name!r} needs Python code of its repository to run: read it, pin model.revision to that commit, and set "
        "model.trustRemoteCode to true",
        field=field,
    )

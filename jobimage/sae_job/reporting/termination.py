"""The termination message: a step's result, small enough for the kubelet to keep."""

from __future__ import annotations

from pathlib import Path

from sae_operator.api.redaction import redact
from sae_operator.api.steps import TERMINATION_MESSAGE_BYTES, StepResult

# Messages of single SAEs are cut to this before SAEs' messages are dropped altogether.
_SHORT_MESSAGE = 120


def encode_result(result: StepResult) -> bytes:
    """Compact JSON of at most 4096 bytes: long texts are cut first, then left out; figures are never cut. Texts are
    without credentials."""
    saes = result.saes and [
        sae.model_copy(update={"message": redact(sae.message)}) if sae.message else sae for sae in result.saes
    ]
    result = result.model_copy(update={"message": redact(result.message), "saes": saes})

    def encode(value: StepResult) -> bytes:
        return value.model_dump_json(by_alias=True, exclude_none=True).encode()

    body = encode(result)
    if len(body) <= TERMINATION_MESSAGE_BYTES:
        return body
    for limit in (_SHORT_MESSAGE, 0):
        saes = result.saes and [
            sae.model_copy(update={"message": sae.message[:limit] or None}) if sae.message else sae
            for sae in result.saes
        ]
        shorter = result.model_copy(update={"saes": saes})
        excess = len(encode(shorter)) - TERMINATION_MESSAGE_BYTES
        if excess <= 0:
            return encode(shorter)
        # A character is at most 6 bytes in JSON (\\uXXXX); cut from the end, where the detail is.
        kept = result.message.encode()[: max(0, len(result.message.encode()) - excess - 8)].decode(errors="ignore")
        body = encode(shorter.model_copy(update={"message": kept}))
        if len(body) <= TERMINATION_MESSAGE_BYTES:
            return body
    return encode(
        result.model_copy(update={"saes": None, "hooks": None, "plan": None, "message": result.message[:500]})
    )


def write_result(result: StepResult, path: Path) -> None:
    """Write the message in place: the kubelet mounts this very file, so it cannot be replaced by a rename."""
    with path.open("wb") as file:
        file.write(encode_result(result))

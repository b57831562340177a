"""Reads from the Hub that HF_ENDPOINT names, which libraries look at when they are imported: a process of its own.

    python -m tests.hub_client < REQUESTS

REQUESTS is a JSON list: `["texts", SOURCE]`, `["model", NAME, HOOK]`, or `["waits", ANSWER, UPLOAD, TROUBLE]`, seconds
that bound what comes after it. The answer is a JSON list of what each gave; an error is a dictionary of `error`,
`invalid`, `trouble` and `seconds`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def ask_hub(url: str, cache: Path, requests: list[list[Any]]) -> list[Any]:
    """Answers of a new process, whose local Hub cache is in `cache`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hub_client"],
        input=json.dumps(requests),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _answer(kind: str, *arguments: Any) -> Any:
    if kind == "waits":
        from sae_job.text.hub_waits import HubWaits, bound_hub_waits

        bound_hub_waits(HubWaits(*arguments))
        return None
    return _texts(*arguments) if kind == "texts" else _model(*arguments)


def _texts(source: dict[str, Any]) -> dict[str, Any]:
    from sae_job.text.documents import open_documents
    from sae_operator.api.activation_cache import DatasetSource

    documents = open_documents(DatasetSource.model_validate(source))
    metadata = documents.metadata()
    return {
        "texts": list(documents.texts()),
        "revision": documents.record.revision,
        "metadata": None if metadata is None else metadata.decode(),
    }


def _model(name: str, hook: str) -> dict[str, Any]:
    import torch

    from sae_job.models.load import inspect_model, load_hooked_model
    from sae_job.text.tokenize import TextTokenizer, load_tokenizer
    from sae_operator.api.activation_cache import ModelSource

    source = ModelSource(name=name, dtype="float32")
    facts = inspect_model(source, [hook])
    (tokens,) = TextTokenizer(load_tokenizer(source, revision=facts.revision)).encode(["some text"])
    model = load_hooked_model(source, [hook], device="cpu", revision=facts.revision)
    activations = model.activations(torch.tensor(tokens).unsqueeze(0))[hook]
    return {"revision": facts.revision, "tokens": tokens.tolist(), "activations": activations.tolist()}


def main() -> None:
    from sae_job.errors import InvalidInput
    from sae_job.text.hub import is_connection_trouble

    answers = []
    for request in json.load(sys.stdin):
        start = time.monotonic()
        try:
            answers.append(_answer(*request))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test judges it
            answers.append(
                {
                    "error": f"{type(error).__name__}: {error}",
                    "invalid": isinstance(error, InvalidInput),
                    "trouble": is_connection_trouble(error),
                    "seconds": time.monotonic() - start,
                }
            )
    print(json.dumps(answers))


if __name__ == "__main__":
    main()

"""A log line says which resource it is about, gives no credentials away, and cannot be forged."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import pytest

from sae_operator.controller.logs import JsonLines, TextLines, about, identify
from sae_operator.controller.queue import Key, WorkQueue


def record(message: str, *arguments: object, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("sae_operator.test", logging.INFO, "file.py", 1, message, arguments, None)
    made.__dict__.update(fields)
    return made


def as_json(made: logging.LogRecord) -> dict[str, Any]:
    return json.loads(JsonLines().format(made))


def test_json_has_the_resource_in_fields() -> None:
    with about("SAETrainingJob", "lab", "sae"):
        identify("uid-1")
        line = as_json(record("%s: %s", "Running", "step train runs"))
    assert line["message"] == "Running: step train runs"
    assert line["level"] == "info"
    assert {field: line[field] for field in ("kind", "namespace", "name", "uid")} == {
        "kind": "SAETrainingJob",
        "namespace": "lab",
        "name": "sae",
        "uid": "uid-1",
    }
    assert "kind" not in as_json(record("about nothing"))


def test_text_has_it_before_the_message() -> None:
    with about("SAETrainingJob", "lab", "sae"):
        assert TextLines().format(record("Running")).endswith("sae_operator.test: SAETrainingJob lab/sae: Running")
    assert TextLines().format(record("Running")).endswith("sae_operator.test: Running")


def test_lines_of_the_watches_name_their_object() -> None:
    reference = {"apiVersion": "batch/v1", "kind": "Job", "namespace": "lab", "name": "sae-1", "uid": "u"}
    line = as_json(record("odd", k8s_ref=reference))
    assert (line["kind"], line["namespace"], line["name"], line["uid"]) == ("Job", "lab", "sae-1", "u")


@pytest.mark.parametrize("formatter", [TextLines(), JsonLines()])
def test_credentials_are_left_out_of_messages_and_tracebacks(formatter: logging.Formatter) -> None:
    try:
        raise RuntimeError("https://user:hunter2@s3/ refused")
    except RuntimeError:
        made = record("HF_TOKEN=hf_0123456789abcdef", exc_info=sys.exc_info())
    line = formatter.format(made)
    assert "RuntimeError" in line
    assert "hunter2" not in line
    assert "hf_0123" not in line


def test_a_foreign_text_cannot_begin_a_line() -> None:
    line = TextLines().format(record("said %s", "x\n2026-01-01 ERROR forged"))
    assert line.count("\n") == 0
    assert "x\\n2026" in line


def test_a_foreign_text_cannot_steer_a_terminal() -> None:
    line = TextLines().format(record("said %s", "\x1b[2Jgone \x9b1A \u2028 é"))
    assert line.endswith("said \\x1b[2Jgone \\x9b1A \\u2028 é")


async def test_each_look_has_its_own_resource() -> None:
    lines: list[dict[str, Any]] = []
    both, told = asyncio.Barrier(2), asyncio.Barrier(3)

    async def process(key: Key) -> float | None:
        identify(f"uid-{key.name}")
        await both.wait()
        lines.append(as_json(record("x")))
        await told.wait()
        return None

    queue = WorkQueue(process)
    working = asyncio.create_task(queue.run())
    for name in ("a", "b"):
        queue.add(Key("SAETrainingJob", "lab", name))
    async with asyncio.timeout(60):
        await told.wait()
    working.cancel()
    assert sorted((line["name"], line["uid"]) for line in lines) == [("a", "uid-a"), ("b", "uid-b")]
    assert "kind" not in as_json(record("afterwards"))


async def test_a_failed_look_is_told_with_its_resource(capfd: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("sae_operator.controller.queue")
    logger.addHandler(handler)
    second = asyncio.Event()

    async def process(key: Key) -> float | None:
        if key.name == "a":
            raise RuntimeError("broken")
        second.set()
        return None

    queue = WorkQueue(process, workers=1)
    working = asyncio.create_task(queue.run())
    try:
        for name in ("a", "b"):
            queue.add(Key("SAETrainingJob", "lab", name))
        async with asyncio.timeout(60):
            await second.wait()
    finally:
        logger.removeHandler(handler)
        working.cancel()
    (line,) = [json.loads(text) for text in capfd.readouterr().err.splitlines() if text.startswith("{")]
    assert (line["level"], line["kind"], line["name"]) == ("error", "SAETrainingJob", "a")
    assert "failed (1 in a row)" in line["message"]
    assert "RuntimeError: broken" in line["exception"]

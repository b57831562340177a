"""Log lines on stderr: text for people, or JSON for collectors. A line about a resource says which one it is about."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sae_operator.api.redaction import redact

LINE = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
# kopf tells every request that it retries and every event that it handles; warnings are what matters.
_QUIET = ("kopf", "asyncio", "aiohttp.access")


class Subject(NamedTuple):
    """The resource that lines are about."""

    kind: str
    namespace: str
    name: str
    uid: str | None = None


# Control characters, and what ends a line in some readers.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_subject: ContextVar[Subject | None] = ContextVar("subject", default=None)


@contextlib.contextmanager
def about(kind: str, namespace: str, name: str) -> Iterator[None]:
    """What is logged inside the block, by this task, is about one resource."""
    token = _subject.set(Subject(kind, namespace, name))
    try:
        yield
    finally:
        _subject.reset(token)


def identify(uid: str) -> None:
    """Which resource of that name it is; until the block of `about` ends."""
    subject = _subject.get()
    if subject is not None:
        _subject.set(subject._replace(uid=uid))


def subject_of(record: logging.LogRecord) -> Subject | None:
    """The resource that a line is about: the task's, or the one that kopf names in a line of its own."""
    named: Any = getattr(record, "k8s_ref", None)
    if isinstance(named, dict) and named.get("name"):
        fields = (str(named.get(field) or "") for field in ("kind", "namespace", "name"))
        return Subject(*fields, uid=named.get("uid"))
    return _subject.get()


class TextLines(logging.Formatter):
    """One line for people; the resource stands before the message."""

    def __init__(self) -> None:
        super().__init__(LINE)

    def formatMessage(self, record: logging.LogRecord) -> str:
        subject = subject_of(record)
        text = _one_line(record.message)
        if subject is not None:
            text = f"{subject.kind} {subject.namespace}/{subject.name}: {text}"
        return LINE % {**record.__dict__, "message": text}

    def formatException(self, ei: Any) -> str:
        return redact(super().formatException(ei))


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        subject = subject_of(record)
        if subject is not None:
            line |= {field: value for field, value in subject._asdict().items() if value}
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(line)


def _one_line(message: str) -> str:
    """Without credentials, and without characters with which a foreign text could forge lines or steer a terminal."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), redact(message))


def configure(*, json_lines: bool, verbose: bool) -> None:
    """Sets up the root logger of this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if json_lines else TextLines())
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler], force=True)
    if not verbose:
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.WARNING)

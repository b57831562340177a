"""log.txt keeps what attempts told, the last one at its end, and does not grow without bound."""

import logging

from hypothesis import given
from hypothesis import strategies as st

from sae_job.reporting.log import NEXT_ATTEMPT, kept_log, with_earlier_attempts


def test_attempts_stand_one_behind_the_other() -> None:
    first = with_earlier_attempts(b"", "a\n")
    assert first == b"a\n"
    assert with_earlier_attempts(first, "b\n") == f"a\n{NEXT_ATTEMPT}b\n".encode()


@given(st.lists(st.text("ab", max_size=5), max_size=8), st.integers(1, 40))
def test_what_is_too_long_loses_whole_lines_from_the_front(lines: list[str], limit: int) -> None:
    text = "".join(f"{line}\n" for line in lines)
    kept = with_earlier_attempts(b"", text, limit=limit)
    assert len(kept) <= limit
    assert text.encode().endswith(kept)
    missing = text.encode()[: len(text.encode()) - len(kept)]
    assert missing == b"" or missing.endswith(b"\n")
    # One line more would not have fitted.
    assert missing == b"" or len(missing.splitlines()[-1]) + 1 + len(kept) > limit


def test_credentials_are_left_out() -> None:
    with kept_log() as tail:
        try:
            raise OSError("https://user:hunter2@s3/ is away")
        except OSError:
            logging.getLogger("sae_job.test").exception("HF_TOKEN=%s", "hf_0123456789abcdef")
    text = tail.text()
    assert "OSError: https://***@s3/ is away" in text
    assert "HF_TOKEN=***" in text

"""Takes credentials out of text that people read: status, events and logs.

What is known by its form goes: the user part of an address, signed queries, tokens and keys with a known prefix, and
what follows a name such as `password`. A secret without any of these cannot be told from other text.
"""

from __future__ import annotations

import re
from functools import lru_cache

HIDDEN = "***"
# The operator looks at the same few messages again and again; long ones are seldom the same.
REMEMBERED, LONGEST_REMEMBERED = 512, 400

# Names, in snake_case, kebab-case or camelCase, whose value is a secret. Not `token` alone, which counts text here.
_NAMES = (
    r"(?:password|passwd|passphrase"
    r"|(?:aws[_-]?)?secret[_-]?(?:access[_-]?)?key|(?:aws[_-]?)?access[_-]?key(?:[_-]?id)?"
    r"|api[_-]?key|account[_-]?key|client[_-]?secret|private[_-]?key"
    r"|(?:aws[_-]?)?(?:session|security|access|auth|refresh|bearer|id|hf|hub|huggingface(?:[_-]?hub)?)[_-]?token"
    r"|authorization)"
)
# Parameters of signed addresses: of S3, Google's and Azure's stores, and of OAuth.
_PARAMETERS = (
    r"X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|AWSAccessKeyId|GoogleAccessId"
    r"|Signature|sig|token|key|secret|code"
)
# What a value without quotes consists of, and what one in quotes begins with.
_VALUE = r"""[^\s"'\\,;&)}\]]"""
_BEGINS = r"""[^\s"'\\,;&)}\]:]"""
# Inside of JSON that is text in JSON, a quote has backslashes.
_QUOTE = r"""(?:\\*["'])"""

# Each with what a text must hold, in small letters, to be worth a look: most hold none of it.
_PATTERNS: tuple[tuple[tuple[str, ...], re.Pattern[str], str], ...] = (
    (
        ("-----begin",),
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^\"']*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)"),
        HIDDEN,
    ),
    (("@",), re.compile(r"""(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#"'<>\\]+@(?!sha256:)"""), rf"\g<1>{HIDDEN}@"),
    (("?", "&"), re.compile(rf"""(?i)([?&](?:{_PARAMETERS})=)[^&\s"'<>\\]+"""), rf"\g<1>{HIDDEN}"),
    (
        ("pass", "key", "secret", "token", "authorization"),
        re.compile(
            rf"""(?i)((?<![A-Za-z]){_NAMES}{_QUOTE}?\s*[:=]\s*)"""
            # In quotes all to the quote that ends it; the quote that ends a text around the name begins nothing.
            rf"""(?:(?P<quote>["'])(?={_BEGINS})(?:\\.|(?!(?P=quote))[^"\\])+(?=(?P=quote))"""
            rf"""|(?P<escaped>\\+["'])(?={_BEGINS})[^"'\\]+(?=(?P=escaped))"""
            rf"""|(?P<loose>{_QUOTE}?(?:(?:Bearer|Basic|Token)\s+)?){_VALUE}+)"""
        ),
        rf"\g<1>\g<quote>\g<escaped>\g<loose>{HIDDEN}",
    ),
    (("bearer",), re.compile(r"""(?i)(\bBearer\s+)[A-Za-z0-9._~+/=-]{8,}"""), rf"\g<1>{HIDDEN}"),
    (
        ("akia", "asia", "hf_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "sk-", "xox", "eyj"),
        re.compile(
            r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{12,}|hf_[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
            r"|glpat-[A-Za-z0-9_-]{16,}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}"
            r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+)"
        ),
        HIDDEN,
    ),
)


def redact(text: str) -> str:
    """The text with `***` in place of what looks like a credential. JSON stays JSON."""
    return _remembered(text) if len(text) <= LONGEST_REMEMBERED else _redacted(text)


def _redacted(text: str) -> str:
    # "tokens" is the commonest word of our messages, and no secret's name.
    small = text.lower().replace("tokens", "")
    for words, pattern, replacement in _PATTERNS:
        if any(word in small for word in words):
            text = pattern.sub(replacement, text)
    return text


_remembered = lru_cache(maxsize=REMEMBERED)(_redacted)

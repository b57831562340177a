"""The patch from one document to another, applied by RFC 7386's rules, gives the other; empty when nothing changed."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sae_operator.controller.merge import merge_patch

SCALARS = st.one_of(st.booleans(), st.integers(-3, 3), st.text("ab", max_size=2), st.floats(0, 1))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("xyz", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
DOCUMENTS = st.dictionaries(st.text("xyz", max_size=2), VALUES, max_size=4)


def apply(document: Any, patch: Any) -> Any:
    """The algorithm of RFC 7386, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = apply(result.get(key), value)
    return result


@given(DOCUMENTS, DOCUMENTS)
def test_the_patch_leads_from_old_to_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert apply(old, merge_patch(old, new)) == new


@given(DOCUMENTS)
def test_nothing_is_written_when_nothing_changed(document: dict[str, Any]) -> None:
    assert merge_patch(document, document) == {}


def test_removed_fields_are_null_and_lists_are_replaced_whole() -> None:
    old = {"phase": "Queued", "jobName": "a", "progress": {"tokens": 1, "percent": 0}, "conditions": [1, 2]}
    new = {"phase": "Running", "progress": {"tokens": 2, "percent": 0}, "conditions": [2]}
    assert merge_patch(old, new) == {
        "jobName": None,
        "phase": "Running",
        "progress": {"tokens": 2},
        "conditions": [2],
    }

"""The examples that hold resources of ours."""

from __future__ import annotations

from tests.testbed.paths import CHECKOUT

EXAMPLES = CHECKOUT / "examples"
# What belongs to Kueue and Kubernetes there, tests/cluster/test_kueue.py applies.
OTHERS = {EXAMPLES / "kueue" / name for name in ("cluster.yaml", "namespace.yaml")}
FILES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path not in OTHERS)

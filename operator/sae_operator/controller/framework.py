"""Imports kopf without the clients that it would pull in when they happen to be installed."""

from __future__ import annotations

import sys

# kopf imports these for its type checks when they are there. We use none of them; `kubernetes` alone costs 24 MiB and
# half a second.
_UNUSED_CLIENTS = ("kubernetes", "kubernetes_asyncio", "pykube")

_hidden = [name for name in _UNUSED_CLIENTS if name not in sys.modules]
for _name in _hidden:
    sys.modules[_name] = None  # type: ignore[assignment]
try:
    import kopf
finally:
    for _name in _hidden:
        del sys.modules[_name]

__all__ = ["kopf"]

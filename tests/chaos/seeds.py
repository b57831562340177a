"""The seed from which everything random in these tests follows."""

from __future__ import annotations

import os
import random

ENV_SEED = "SAE_CHAOS_SEED"
USUAL = 1


def chosen() -> int:
    """The number in `SAE_CHAOS_SEED`; another one each time when it is `random`; 1 by default, so that a run tells
    whether the code has changed, and not which lives it was given."""
    text = os.environ.get(ENV_SEED) or str(USUAL)
    return random.SystemRandom().randrange(10**9) if text == "random" else int(text)

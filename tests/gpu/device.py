"""The device under check. SAE_GPU_CHECK_DEVICE=cpu tries the checks themselves where there is no GPU: they then
compare the CPU with itself."""

from __future__ import annotations

import os

DEVICE = os.environ.get("SAE_GPU_CHECK_DEVICE", "cuda")

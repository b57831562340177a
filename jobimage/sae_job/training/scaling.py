"""The factor that activations are multiplied by for training, from their exact or measured statistics.

Normalisations that are of each activation on its own have none: they are `saes.normalization`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

from sae_job.errors import InvalidInput

Normalization = Literal["centered_rms", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "none"]
# Those whose scale follows from the activations.
STATISTICAL_NORMALIZATIONS = ("centered_rms", "expected_average_only_in")


class ActivationStatistics(Protocol):
    """What is known of one hook's activations: means over rows."""

    @property
    def d_in(self) -> int: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def mean_norm(self) -> float: ...
    @property
    def mean_squared_norm(self) -> float: ...


def activation_scale(statistics: ActivationStatistics, normalization: Normalization) -> float:
    """The factor a by which training sees a·x instead of x; folding it into the trained SAE undoes it.

    - `centered_rms`: deviations from the mean get RMS norm sqrt(d_in): a = sqrt(d_in) / sqrt(E‖x‖² − ‖E x‖²). A large
      common offset, as residual streams have, does not shrink what is left to explain.
    - `expected_average_only_in`: the mean norm becomes sqrt(d_in): a = sqrt(d_in) / E‖x‖.
    - `none`, and what is done with each activation: 1.

    Raises:
        InvalidInput: the activations do not vary, or are all 0.
    """
    if normalization not in STATISTICAL_NORMALIZATIONS:
        return 1.0
    if normalization == "expected_average_only_in":
        spread = statistics.mean_norm
    else:
        variance = statistics.mean_squared_norm - math.fsum(value * value for value in statistics.mean)
        # Below rounding errors of the sums the difference says nothing.
        spread = math.sqrt(variance) if variance > 1e-12 * statistics.mean_squared_norm else 0.0
    if not (spread > 0 and math.isfinite(spread)):
        raise InvalidInput(
            "NoVariance",
            f"the activations cannot be scaled (spread {spread}): they do not vary or are not finite; "
            "choose another hook, or set normalization: none",
            field="spec.normalization",
        )
    return math.sqrt(statistics.d_in) / spread

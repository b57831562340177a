"""What a spec alone cannot tell to be wrong: it shows once widths, latents and ranks are known."""

from __future__ import annotations

from itertools import pairwise

from sae_job.errors import InvalidInput
from sae_job.saes.normalization import LAYER_NORM, RUN_TIME_NORMALIZATIONS
from sae_operator.api.training_job import SAETrainingJobSpec


def check_ranks(batch_size: int, ranks: int) -> None:
    """Raises InvalidInput where the ranks cannot share a batch evenly."""
    if batch_size % ranks:
        more = -(-batch_size // ranks) * ranks
        raise InvalidInput(
            "BatchNotDivisible",
            f"{ranks} processes cannot share batches of {batch_size} rows evenly; set it to {more}, for example, or "
            "change parallelism",
            field="spec.training.batchSize",
        )


def check_normalization(spec: SAETrainingJobSpec, index: int, d_in: int) -> None:
    """Raises InvalidInput where an SAE cannot live with the job's normalisation.

    One that is of each activation on its own is undone after decoding by what was taken from the input. Of a
    transcoder's target nothing is known then.
    """
    if spec.normalization == LAYER_NORM and d_in < 2:
        raise InvalidInput(
            "NoVariance",
            "layer_norm leaves nothing of activations of one dimension; choose another",
            field="spec.normalization",
        )
    if spec.saes[index].target_hook is not None and spec.normalization in RUN_TIME_NORMALIZATIONS:
        raise InvalidInput(
            "NormalizationUnsupported",
            f"saes[{index}] is a transcoder, and {spec.normalization} cannot be undone on its outputs: the scale of a "
            "target is not known from the input; choose centered_rms, expected_average_only_in or none",
            field="spec.normalization",
        )


def check_architecture(spec: SAETrainingJobSpec, index: int, *, d_sae: int) -> None:
    """Raises InvalidInput where an SAE's own settings do not fit its latents."""
    field = f"spec.saes[{index}].architecture"
    architecture = spec.saes[index].architecture
    if architecture.k is not None and architecture.k > d_sae:
        raise InvalidInput(
            "KTooLarge", f"k {architecture.k} is more than the {d_sae} latents; lower it", field=f"{field}.k"
        )
    widths = architecture.widths
    if widths is not None:
        if any(after <= before for before, after in pairwise(widths)):
            raise InvalidInput("WidthsInvalid", f"widths {widths} do not ascend; sort them", field=f"{field}.widths")
        if widths[-1] > d_sae:
            raise InvalidInput(
                "WidthsInvalid",
                f"width {widths[-1]} is more than the {d_sae} latents; leave it out, or raise dSae",
                field=f"{field}.widths",
            )
    target = architecture.target_l0
    if target is not None and target > d_sae:
        raise InvalidInput(
            "TargetTooLarge",
            f"targetL0 {target:g} is more than the {d_sae} latents; lower it",
            field=f"{field}.targetL0",
        )

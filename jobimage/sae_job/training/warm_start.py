"""SAEs that begin with the weights of saved ones: loaded and compared with the spec before anything is expensive."""

from __future__ import annotations

from collections.abc import Callable

from sae_job.errors import InvalidInput
from sae_job.saes.base import SAE
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS
from sae_job.storage.base import ObjectStore
from sae_job.training.plan import SaePlan, TrainingPlan
from sae_operator.api.store import StoreLocation

# What a type is saved as, where that is another name: thresholds of its own make it a JumpReLU SAE.
SAVED_AS = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}


def load_starts(plan: TrainingPlan, open_store: Callable[[StoreLocation], ObjectStore]) -> dict[str, SAE]:
    """The saved SAE of every SAE of the plan that has a `startFrom`, checked; in float32, on the CPU.

    Raises:
        InvalidInput: one is not there, cannot be loaded, or does not fit; the field is its `startFrom`.
        StoreError: its store cannot be read.
    """
    starts: dict[str, SAE] = {}
    for index, sae_plan in enumerate(plan.saes):
        location = sae_plan.spec.start_from
        if location is None:
            continue
        field = f"spec.saes[{index}].startFrom"
        try:
            sae = SAE.load_from_store(open_store(location), "", dtype="float32")
        except InvalidInput as error:
            raise InvalidInput(error.reason, error.message, field=field) from error
        check_start(plan, index, sae)
        starts[sae_plan.name] = sae
    return starts


def check_start(plan: TrainingPlan, index: int, sae: SAE) -> None:
    """Compare a saved SAE with the one that is to begin with its weights.

    Args:
        index: place of the SAE in the spec.

    Raises:
        InvalidInput: they do not fit; the field is `spec.saes[index].startFrom`.
    """
    sae_plan = plan.saes[index]
    difference = _difference(sae_plan, sae) or _other_normalization(plan, sae)
    if difference is not None:
        raise InvalidInput(
            "StartDiffers",
            f"the saved SAE cannot be begun with: {difference}",
            field=f"spec.saes[{index}].startFrom",
        )


def _difference(plan: SaePlan, sae: SAE) -> str | None:
    cfg, spec = sae.cfg, plan.spec
    saved_as = SAVED_AS.get(spec.architecture.type, spec.architecture.type)
    if cfg.architecture not in (saved_as, spec.architecture.type):
        return f"it is of architecture {cfg.architecture}, and {spec.architecture.type} is asked for"
    activation = "topk" if saved_as == "topk" else spec.architecture.activation or "relu"
    if cfg.activation_fn_str != activation:
        return f"its activation function is {cfg.activation_fn_str}, and {activation} is asked for"
    d_out = sae.W_dec.shape[1]
    for name, found, asked in (
        ("dIn", cfg.d_in, plan.d_in),
        ("dSae", cfg.d_sae, plan.d_sae),
        ("dOut", d_out, plan.d_out),
    ):
        if found != asked:
            return f"its {name} is {found}, and {asked} is asked for"
    hooks = ((cfg.hook_name, cfg.hook_head_index, plan.hook, "hook"),)
    if plan.is_transcoder:
        name, head = getattr(cfg, "hook_name_out", None), getattr(cfg, "hook_head_index_out", None)
        hooks = (*hooks, (name, head, plan.target_hook, "targetHook"))
    for name, head, asked, field in hooks:
        found = name if head is None else f"{name}:{head}"
        # Files that tell no hook are of any.
        if name and found != asked:
            return f"it is of {field} {found}, and {asked} is asked for"
    if plan.is_transcoder != bool(getattr(cfg, "hook_name_out", None) or getattr(cfg, "d_out", None)):
        return "one of the two is a transcoder, and the other is not: set or remove targetHook"
    if cfg.apply_b_dec_to_input != spec.subtracts_b_dec:
        return f"its encoder has applyBDecToInput {str(cfg.apply_b_dec_to_input).lower()}: set it alike"
    if hasattr(sae, "W_skip") != spec.skip_connection:
        return f"it has {'a' if hasattr(sae, 'W_skip') else 'no'} skip connection: set skipConnection alike"
    if cfg.finetuning_scaling_factor and spec.normalizes_decoder:
        return "it was fine-tuned with factors of its latents, which decoder rows of unit norm cannot hold: set " + (
            "normalizeDecoder: false"
        )
    return None


def _other_normalization(plan: TrainingPlan, sae: SAE) -> str | None:
    """Weights of an SAE that normalises each activation are of that space, and of no other."""
    found = sae.cfg.normalize_activations
    kinds = [name if name in RUN_TIME_NORMALIZATIONS else "none" for name in (found, plan.normalization)]
    if kinds[0] != kinds[1]:
        return f"it normalises its inputs by {found}, and the job by {plan.normalization}: set spec.normalization alike"
    return None

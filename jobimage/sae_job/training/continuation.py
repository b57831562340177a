"""Whether a training that was interrupted can go on under a plan: decided by what a checkpoint says of itself, before
any of its tensors is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_job.errors import InvalidInput
from sae_job.training.plan import TrainingPlan

# What must be the same of an SAE, and the field of its spec that decides it.
_FIXED = {
    "architecture": "architecture.type",
    "hook": "hook",
    "target_hook": "targetHook",
    "d_in": "hook",
    "d_out": "targetHook",
    "d_sae": "dSae",
}
# What must be the same of the job; another default, such as the batch size of more tokens, begins anew.
_SAME = ("batch_size", "held_out_rows", "normalization", "optimizer", "precision", "finetuning")


def continues(plan: TrainingPlan, state: Mapping[str, Any]) -> bool:
    """Whether a training stopped with this state can go on under this plan: same batches and held-out rows.

    The number of steps may differ: raised tokens lengthen a training that is not finished. Then learning rates follow
    the new plan from where it stands; a fine-tuning that has begun cannot be put off any more. Scales may differ too:
    they are taken over from the state.

    Raises:
        InvalidInput: the state is of other SAEs: nobody wants their checkpoints replaced.
    """
    before, now = state["plan"], plan.record()
    _check_saes(plan, before["saes"])
    begun = state["steps_done"] > before.get("training_steps", 0)
    return (
        all(key in before and before[key] == now[key] for key in _SAME)
        and state["steps_done"] <= plan.steps
        and (not begun or before["training_steps"] == plan.training_steps)
    )


def _check_saes(plan: TrainingPlan, before: Mapping[str, Mapping[str, Any]]) -> None:
    names = [sae.name for sae in plan.saes]
    if sorted(before) != sorted(names):
        raise InvalidInput(
            "CheckpointDiffers",
            f"the checkpoints in the output are of SAEs {', '.join(before)}, not {', '.join(names)}; choose another "
            "output.uri",
            field="spec.saes",
        )
    saes = plan.record()["saes"]
    for index, name in enumerate(names):
        for key, field in _FIXED.items():
            if (found := before[name].get(key)) != saes[name][key]:
                raise InvalidInput(
                    "CheckpointDiffers",
                    f"the checkpoints in the output are of an SAE {name!r} with {key} {found}, not {saes[name][key]}; "
                    "set it back, or choose another output.uri",
                    field=f"spec.saes[{index}].{field}",
                )

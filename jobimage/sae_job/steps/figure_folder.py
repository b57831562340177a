"""Where the figures of a job's median stop lie, and whether they can be reached."""

from __future__ import annotations

from sae_job.errors import InvalidInput
from sae_job.saes.trainable import Ranks
from sae_job.steps.context import StepContext
from sae_job.storage.base import ObjectStore
from sae_job.storage.folder import StoreFolder
from sae_job.training.median_stop import Comparison, FigureFolder, owner_of
from sae_job.training.plan import TrainingPlan
from sae_operator.api.steps import TrainStep

FOLDER = "median-stop"


def comparison_of(
    step: TrainStep, plan: TrainingPlan, output: ObjectStore, context: StepContext, ranks: Ranks
) -> Comparison | None:
    """The comparison that a job asks for. The first rank alone talks to the store."""
    rule = step.spec.median_stop
    if rule is None:
        return None
    folder = None
    if ranks.index == 0:
        owner = owner_of(step.spec.output, step.training_identity)
        folder = FigureFolder(_store(step, output, context), owner, rule)
    return Comparison(rule, plan, folder, ranks)


def check_figure_folder(step: TrainStep, output: ObjectStore, context: StepContext) -> None:
    """Raises InvalidInput where the folder of a job's median stop cannot be read, which would only be told when SAEs
    are compared."""
    rule = step.spec.median_stop
    if rule is None or rule.uri is None:
        return
    try:
        next(iter(_store(step, output, context).list()), None)
    except InvalidInput as error:
        raise InvalidInput(error.reason, error.message, field="spec.medianStop.uri") from error


def _store(step: TrainStep, output: ObjectStore, context: StepContext) -> ObjectStore:
    rule = step.spec.median_stop
    assert rule is not None
    if rule.uri is None:
        return StoreFolder(output, FOLDER)
    return context.open_store(step.spec.output.model_copy(update={"uri": rule.uri}))

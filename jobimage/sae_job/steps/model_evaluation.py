"""What the job's SAEs cost its language model, on held-out contexts, during the training and at its end.

Make one `ModelEvaluation` per training process that evaluates (with several ranks, one of them), where
`evaluates_model(spec)` says so; nothing is loaded before the first call. Call it with the SAEs that are to be evaluated
(`Splice(hook, sae.inference(), target_hook)` for each, all in one call, because they share passes) and a function that
is called between forward passes and may raise `Stopped`. It gives for each SAE the figures by the names that
metrics.jsonl and results.json have: `MODEL_FIGURES`. It reads contexts and weights alone: no batch, no random number
and no state of the training is touched, so calling it or not changes no SAE; interrupted, it can be called again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_job.activations.batches import HeldOut
from sae_job.activations.contexts import ContextReader
from sae_job.errors import InvalidInput
from sae_job.evaluation.cross_entropy import CrossEntropy, Splice, cross_entropies
from sae_job.models.full import FullModel
from sae_job.steps.activation_sources import ActivationSource
from sae_job.text.plan import CacheIndex
from sae_job.text.usable import excluded_token_ids
from sae_operator.api.training_job import MODEL_METRICS, SAETrainingJobSpec

logger = logging.getLogger(__name__)

# Tokens that the whole model runs on, several times: enough for two digits, minutes on a CPU.
EVALUATED_TOKENS = 8192
BATCH_TOKENS = 2048
# The model stays on a GPU between uses where at least this part of the GPU's memory is free beside it.
_FREE_PART = 4
# What is told of each SAE, in metrics.jsonl and results.json.
MODEL_FIGURES = (
    "ce_loss_score",
    "ce_loss_clean",
    "ce_loss_with_sae",
    "ce_loss_with_ablation",
    "kl_divergence_score",
    "kl_divergence_with_sae",
    "kl_divergence_with_ablation",
)


def evaluates_model(spec: SAETrainingJobSpec) -> bool:
    """Whether the training pod loads the whole language model."""
    return any(metric in spec.evaluation.metrics for metric in MODEL_METRICS)


def figures_of(entropy: CrossEntropy) -> dict[str, float | None]:
    """The `MODEL_FIGURES` of an SAE; None for what is not defined, or not finite because the model overflows."""
    values = (
        entropy.score,
        entropy.clean,
        entropy.spliced,
        entropy.ablated,
        entropy.kl_score,
        entropy.kl_spliced,
        entropy.kl_ablated,
    )
    finite = (value if value is not None and math.isfinite(value) else None for value in values)
    return dict(zip(MODEL_FIGURES, finite, strict=True))


class ModelEvaluation:
    """The language model on the first held-out contexts; see the module.

    Args:
        source: of the job's activations; gives the model and the contexts.
        held_out: rows that are never trained on: the positions that are replaced.
        metrics: of the spec: with `kl_divergence_score` divergences are computed too.
    """

    def __init__(self, source: ActivationSource, held_out: HeldOut, *, metrics: frozenset[str]) -> None:
        self._source = source
        self._held_out = held_out
        self._divergence = "kl_divergence_score" in metrics
        self._model: FullModel | None = None

    def __call__(
        self, saes: Mapping[str, Splice], between_batches: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float | None]]:
        """Figures of SAEs, which take and give raw activations and lie on the model's device.

        Args:
            saes: name -> SAE and where it goes; nothing is loaded when there is none.
            between_batches: called before the model is loaded and before each forward pass; may raise to end the work.

        Raises:
            InvalidInput: there are no held-out contexts, or the model cannot be loaded.
            StoreError: the store failed.
        """
        if not saes:
            return {}
        between_batches()
        index, contexts, replaced = self._contexts()
        model = self._loaded()
        try:
            found = cross_entropies(
                model,
                contexts,
                replaced,
                saes,
                # What no SAE is trained on, where the spec names tokens.
                ignore_token_ids=excluded_token_ids(self._source.sampling, index.tokenizer.special_token_ids),
                batch_size=max(1, BATCH_TOKENS // index.context_size),
                divergence=self._divergence,
                between_batches=between_batches,
            )
        finally:
            _park(model)
        return {name: figures_of(entropy) for name, entropy in found.items()}

    def _contexts(self) -> tuple[CacheIndex, Int[Tensor, "n context_size"], Bool[Tensor, "n context_size"]]:
        """The first held-out contexts, and which of their positions are held-out rows."""
        store, held_out = self._source.store, self._held_out
        index = CacheIndex.load(store)
        sequence, position = held_out.sequence.long(), held_out.position.long()
        if index is None or len(sequence) == 0:
            raise InvalidInput(
                "NoHeldOutContexts",
                "ce_loss_score and kl_divergence_score need held-out contexts and the cache's tokens/ folder; hold out "
                "more, or drop these metrics",
                field="spec.evaluation.metrics",
            )
        count = min(int(sequence.max()) + 1, max(1, EVALUATED_TOKENS // index.context_size))
        contexts = ContextReader(store, index).read(0, count)
        replaced = torch.zeros(contexts.shape, dtype=torch.bool)
        inside = sequence < count
        replaced[sequence[inside], position[inside]] = True
        return index, contexts, replaced

    def _loaded(self) -> FullModel:
        """The model, ready for use: loaded at the first call, brought back to its device at later ones."""
        if self._model is None:
            self._model = self._source.whole_model()
        elif self._model.movable:
            self._model.move_to(self._model.device)
        return self._model


def _park(model: FullModel) -> None:
    """Give the GPU's memory back to the training where it is short of it; the weights wait in the host's memory."""
    if model.device.type != "cuda" or not model.movable:
        return
    # What a pass left is given back first, or it would look as if it were in use.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    if free < total // _FREE_PART:
        model.move_to("cpu")
        torch.cuda.empty_cache()
        logger.info("the language model waits in the host's memory: %d MiB of the GPU's were free", free >> 20)

"""What is told of a training while it runs, to whoever records it: Weights & Biases, lines of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.base import SAE


@dataclass(frozen=True)
class Moment:
    """When something happened.

    Attributes:
        step: steps done, from 1.
        tokens: tokens trained on.
        finetuning: whether the last step was one of the fine-tuning phase.
    """

    step: int
    tokens: int
    finetuning: bool = False


@dataclass(frozen=True)
class SparsityWindow:
    """How often each latent fired over the last window of rows.

    Attributes:
        log10_frequencies: log10 of each latent's firing frequency per row, on the CPU; -10 for never.
        rows: rows that they were counted over.
    """

    log10_frequencies: Float32[Tensor, " d_sae"]
    rows: int

    def figures(self) -> dict[str, float]:
        """`mean_log10_feature_sparsity`, and how many latents fire less often than once in 1e5 and in 1e6 rows."""
        # As float32: that is what the logarithms are, and -5 and -6 themselves are not below.
        logarithms = self.log10_frequencies
        return {
            "mean_log10_feature_sparsity": float(logarithms.to(torch.float64).mean()),
            "below_1e-5": int((logarithms < -5).sum()),
            "below_1e-6": int((logarithms < -6).sum()),
            "rows": self.rows,
        }


class TrainingObserver(Protocol):
    """Is told what happens, in the training's own thread, between two steps; on the first of several ranks only.

    Whatever it does must not change the training: it draws from no global generator and changes no tensor that it is
    given. What it raises ends the attempt.
    """

    def started(self, moment: Moment, lines: Sequence[Mapping[str, Any]]) -> None:
        """Once, before the first step of this attempt.

        Args:
            moment: where the training stands: steps and tokens are 0, or those of a checkpoint.
            lines: the lines of metrics.jsonl until then, and, as the training goes on, all that follow. Anything later
                that an earlier attempt told is told again.
        """
        ...

    def logged(self, sae: str, moment: Moment, figures: Mapping[str, float | str]) -> None:
        """Figures of the last step of one SAE, with the values that it used.

        Args:
            figures: `loss`; its parts (`mse_loss`, `l1_loss`, `l0_loss`, `auxiliary_reconstruction_loss`, ...); `l0`,
                `learning_rate`, `dead_features`, `mean_tokens_since_fired`; `coefficient`, the sparsity penalty's
                weight, where there is one; `kernel`, a name, in the first line and where it changed.
        """
        ...

    def evaluated(self, sae: str, moment: Moment, figures: Mapping[str, float | None], inference: SAE) -> None:
        """Figures on held-out rows, those that `evaluation.metrics` asks for.

        Args:
            inference: the SAE for use on raw activations, as it is now.
        """
        ...

    def window(self, sae: str, moment: Moment, window: SparsityWindow) -> None:
        """A window of rows is complete, or the training is at its end."""
        ...

    def phase(self, sae: str, moment: Moment, phase: str, message: str) -> None:
        """The SAE is trained no further: `Failed` or `Stopped`, and why."""
        ...

    def checkpointed(self, moment: Moment, saes: Mapping[str, tuple[SAE, Tensor | None]]) -> None:
        """A checkpoint is safely stored.

        Args:
            moment: of the checkpoint, some steps ago.
            saes: name -> (the SAE for use, log10 firing frequencies), of those that are sound.
        """
        ...

    def finished(self) -> None:
        """The training has come to its end; not called when it is interrupted or fails."""
        ...

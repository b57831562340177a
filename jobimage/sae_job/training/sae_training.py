"""One SAE in training: its weights, optimiser, schedule, counters, and what it says when it breaks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.evaluation.metrics import HeldOutRows, reconstruction_metrics
from sae_job.saes.architectures import build_trainable
from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.saes.trainable import StepInput, StepStatistics
from sae_job.training.dead_latents import DeadLatents, FiringFrequency
from sae_job.training.plan import SaePlan, TrainingPlan

logger = logging.getLogger(__name__)

# Firing frequencies are estimated over at least so many rows, once there were so many.
FREQUENCY_WINDOW_TOKENS = 1_000_000
# Rows that initial weights are fitted to. An SAE takes the first of the sample, as many as its own size asks for, so
# that its weights do not depend on the other SAEs of the job.
FEWEST_SAMPLE_ROWS, MOST_SAMPLE_ROWS = 8192, 32768


def sample_rows(d_sae: int) -> int:
    """Rows of the sample that an SAE is initialised from: enough that decoder rows rarely share one."""
    return min(max(2 * d_sae, FEWEST_SAMPLE_ROWS), MOST_SAMPLE_ROWS)


class SaeTraining:
    """One SAE in training, apart from the others: training it alone gives the same weights bit for bit.

    Args:
        plan: the SAE's part of the job.
        job: the job.
        index: place in `spec.saes`, for messages.
        provenance: what the saved SAE tells of its activations.
        device: where weights lie.
    """

    def __init__(
        self, plan: SaePlan, job: TrainingPlan, index: int, *, provenance: Provenance, device: torch.device
    ) -> None:
        self.plan = plan
        self.failure: str | None = None
        self._job = job
        self._index = index
        self._provenance = provenance
        self._device = device
        self._trainable = build_trainable(plan.spec, plan.d_in, device=device)
        self._parameters = self._trainable.parameters_by_name
        self._optimizer = torch.optim.Adam(
            list(self._parameters.values()), lr=plan.learning_rate.peak, betas=plan.betas, fused=True
        )
        self._dead = DeadLatents(
            plan.d_sae, dead_after_tokens=job.dead_after_tokens, total_tokens=job.tokens, device=device
        )
        self._frequency = FiringFrequency(plan.d_sae, window_tokens=FREQUENCY_WINDOW_TOKENS, device=device)
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._last: tuple[StepStatistics, float, Tensor, int] | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    def initialize(self, sample: Float32[Tensor, "rows d_in"]) -> None:
        """Set the initial weights from the first rows of a (scaled, normalised) sample and the SAE's own seed."""
        generator = torch.Generator(device="cpu").manual_seed(self.plan.spec.seed)
        first = sample[: sample_rows(self.plan.d_sae)]
        self._trainable.initialize(first, first, generator)

    def step(self, x: Float32[Tensor, "batch d_in"], step: int) -> None:
        """Train on one (scaled, normalised) batch.

        The component of the decoder's gradient along each row is removed before clipping and before the step, since
        unit-norm rows cannot move along themselves.
        """
        rate = self.plan.learning_rate(step)
        dead = self._dead.mask()
        statistics = self._trainable.step_gradients(StepInput(x, x, step, dead))
        self._note_bad_loss(statistics, step)
        self._trainable.project_gradients()
        if self._job.gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._job.gradient_clip_norm)
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        self._trainable.after_optimizer_step()
        rows = x.shape[0]
        self._dead.update(statistics.fire_counts > 0, rows)
        self._frequency.update(statistics.fire_counts, rows)
        self._last = (statistics, rate, dead, rows)
        # Asking a GPU at every step would hold it up; there the check waits for the next log line.
        if self._device.type == "cpu":
            self.check()

    def _note_bad_loss(self, statistics: StepStatistics, step: int) -> None:
        bad = ~torch.isfinite(statistics.loss) & (self._first_bad_step < 0)
        self._first_bad_step.masked_fill_(bad, step)

    def check(self) -> bool:
        """Whether the SAE is still sound; sets `failure` when its loss was not finite in a step so far."""
        if self.failure is None and (step := int(self._first_bad_step)) >= 0:
            self._fail(f"the loss is not finite from step {step} of {self._job.steps} on", step)
        return self.failure is None

    def check_weights(self, steps_done: int) -> bool:
        """Like `check`, and looks at the weights too: the last step's are seen by no loss."""
        if self.check() and not all(bool(torch.isfinite(tensor).all()) for tensor in self._parameters.values()):
            self._fail(f"weights are not finite after step {steps_done - 1} of {self._job.steps}", steps_done - 1)
        return self.failure is None

    def diverged(self, steps_done: int) -> None:
        """Freeze the SAE because its figures on held-out rows are not finite."""
        self._fail(f"reconstructions are not finite after step {steps_done - 1} of {self._job.steps}", steps_done - 1)

    def _fail(self, what: str, step: int) -> None:
        peak = self.plan.learning_rate.peak
        self.failure = (
            f"{what} (learning rate {self.plan.learning_rate(step):.3g}): lower "
            f"spec.saes[{self._index}].training.learningRate, e.g. to {peak / 10:.1g}"
        )
        logger.warning("SAE %r is trained no further: %s", self.name, self.failure)

    def log_line(self) -> dict[str, float]:
        """Figures of the last step, with the values that it used."""
        assert self._last is not None
        statistics, rate, dead, rows = self._last
        return {
            "loss": float(statistics.loss),
            **{name: float(value) for name, value in statistics.losses.items()},
            "l0": float(statistics.fire_counts.sum()) / rows,
            "learning_rate": rate,
            "dead_features": int(dead.sum()),
        }

    def evaluate(self, held_out: HeldOutRows) -> dict[str, float | None]:
        """Figures on held-out rows; `dead_fraction` is of the training so far."""
        metrics = reconstruction_metrics(self.inference(), held_out)
        return {
            "explained_variance": metrics.explained_variance,
            "l0": metrics.l0,
            "mse": metrics.mse,
            "dead_fraction": float(self._dead.mask().to(torch.float64).mean()),
        }

    def inference(self) -> SAE:
        """A copy for use on raw activations: scaling folded in, or the normalisation its own."""
        return self._trainable.to_inference(
            scale=self.plan.scale, normalization=self._job.normalization, provenance=self._provenance
        )

    def log_densities(self) -> Float32[Tensor, " d_sae"] | None:
        """log10 firing frequency of each latent, on the CPU."""
        return self._frequency.log10()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the training goes on from, as copies on the CPU."""
        tensors = {f"weights.{name}": parameter for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for part, tensor in self._optimizer.state[parameter].items():
                tensors[f"adam.{name}.{part}"] = tensor
        tensors |= {f"dead.{name}": tensor for name, tensor in self._dead.state().items()}
        tensors |= {f"frequency.{name}": tensor for name, tensor in self._frequency.state().items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor], failure: str | None) -> None:
        """Take over what `tensors` gave.

        Raises:
            KeyError, RuntimeError: the tensors are of another SAE.
        """
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
        for name, parameter in self._parameters.items():
            prefix = f"adam.{name}."
            # Adam counts steps in a tensor that lies beside the moments when fused on a GPU.
            self._optimizer.state[parameter] = {
                key.removeprefix(prefix): tensor.to(self._device, copy=True)
                for key, tensor in tensors.items()
                if key.startswith(prefix)
            }
        for prefix, counter in (("dead.", self._dead), ("frequency.", self._frequency)):
            counter.restore(
                {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            )
        self.failure = failure


def is_finite(figures: Mapping[str, float | None]) -> bool:
    """Whether all figures that are defined are finite."""
    return all(value is None or math.isfinite(value) for value in figures.values())

"""One SAE in training: its weights, optimiser, schedule, counters, and what it says when it breaks or is given up."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, cast

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.evaluation.metrics import HeldOutRows, reconstruction_metrics
from sae_job.saes.architectures import build_trainable
from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance
from sae_job.saes.products import products_in
from sae_job.saes.step_memory import StepMemory
from sae_job.saes.trainable import ONE_PROCESS, Ranks, StepInput, StepStatistics
from sae_job.training.compiled import CompiledUpkeep, DecoderUpkeep
from sae_job.training.dead_latents import DeadLatents, FiringFrequency
from sae_job.training.finetuning import Finetunable, Finetuning
from sae_job.training.observer import SparsityWindow
from sae_job.training.optimizers import build_optimizer, optimizer_tensors, restore_optimizer, set_rate
from sae_job.training.plan import SaePlan, TrainingPlan
from sae_job.training.stop_early import reason_to_stop

logger = logging.getLogger(__name__)

# Firing frequencies are estimated over at least so many rows, once there were so many.
FREQUENCY_WINDOW_TOKENS = 1_000_000
# Rows that initial weights are fitted to. An SAE takes the first of the sample, as many as its own size asks for, so
# that its weights do not depend on the other SAEs of the job.
FEWEST_SAMPLE_ROWS, MOST_SAMPLE_ROWS = 8192, 32768

Phase = Literal["Running", "Failed", "Stopped"]


def sample_rows(d_sae: int) -> int:
    """Rows of the sample that an SAE is initialised from: enough that decoder rows rarely share one."""
    return min(max(2 * d_sae, FEWEST_SAMPLE_ROWS), MOST_SAMPLE_ROWS)


def noise_seed(seed: int, step: int, rank: int) -> int:
    """Seed of an SAE's noise in one step on one rank: a training that goes on from any step draws what it would have
    drawn, and ranks draw different noise for their different rows."""
    digest = hashlib.sha256(f"noise/{seed}/{step}/{rank}".encode()).digest()
    # torch takes 64 bits; the sign bit is left out.
    return int.from_bytes(digest[:8], "little") >> 1


class _Learner(DecoderUpkeep, Protocol):
    """What is trained in a phase: the SAE, or its fine-tuning."""

    @property
    def parameters_by_name(self) -> dict[str, Tensor]: ...
    def step_gradients(self, batch: StepInput) -> StepStatistics: ...


@dataclasses.dataclass(frozen=True)
class _LastStep:
    """What a log line tells of: tensors stay on their device until one is written."""

    statistics: StepStatistics
    rate: float
    dead: Tensor
    rows: int


class SaeTraining:
    """One SAE in training, apart from the others: training it alone gives the same weights bit for bit.

    Args:
        plan: the SAE's part of the job.
        job: the job.
        index: place in `spec.saes`, for messages.
        provenance: what the saved SAE tells of its activations.
        device: where weights lie.
        ranks: the processes that train together, each on its rows of every batch. All of them hold the same weights,
            counters and failures.
        memory: what steps write, which SAEs that step one after another share; its own when None.
    """

    def __init__(
        self,
        plan: SaePlan,
        job: TrainingPlan,
        index: int,
        *,
        provenance: Provenance,
        device: torch.device,
        ranks: Ranks = ONE_PROCESS,
        memory: StepMemory | None = None,
    ) -> None:
        self.plan = plan
        self.failure: str | None = None
        self.stopped: str | None = None
        self._job = job
        self._index = index
        self._provenance = provenance
        self._device = device
        self._ranks = ranks
        # Every architecture is made of `TrainableWeights`, which has what fine-tuning needs.
        self._trainable = cast(
            Finetunable,
            build_trainable(
                plan.spec,
                plan.d_in,
                plan.d_out,
                device=device,
                ranks=ranks,
                mse_loss_normalization=job.settings.mse_loss_normalization,
                selection=job.settings.selection,
                memory=memory,
            ),
        )
        self._finetuning: Finetuning | None = None
        self._decoder: DecoderUpkeep = self._upkeep()
        self._optimizer = self._fresh_optimizer(plan.learning_rate.peak)
        self._dead = DeadLatents(
            plan.d_sae, dead_after_tokens=job.dead_after_tokens, total_tokens=job.tokens, device=device
        )
        self._frequency = FiringFrequency(plan.d_sae, window_tokens=FREQUENCY_WINDOW_TOKENS, device=device)
        self._noise = None if plan.spec.architecture.noise_scale is None else torch.Generator(device)
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._last: _LastStep | None = None

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def phase(self) -> Phase:
        if self.failure is not None:
            return "Failed"
        return "Running" if self.stopped is None else "Stopped"

    @property
    def message(self) -> str | None:
        """Why it is trained no further."""
        return self.failure or self.stopped

    @property
    def _learner(self) -> _Learner:
        return self._trainable if self._finetuning is None else self._finetuning

    def _fresh_optimizer(self, rate: float) -> torch.optim.Optimizer:
        return build_optimizer(
            self._job.settings.optimizer, self._learner.parameters_by_name, rate=rate, betas=self.plan.betas
        )

    def initialize(self, sample: Float32[Tensor, "rows d_in"], target: Float32[Tensor, "rows d_out"]) -> None:
        """Set the initial weights from the first rows of a (scaled, normalised) sample and the SAE's own seed."""
        generator = torch.Generator(device="cpu").manual_seed(self.plan.spec.seed)
        rows = sample_rows(self.plan.d_sae)
        self._trainable.initialize(sample[:rows], target[:rows], generator)

    def start_from(self, sae: SAE) -> None:
        """Begin with the weights of a saved SAE that `check_start` found to fit.

        Raises:
            InvalidInput: its weights are not such that this SAE's constraints can hold them.
        """
        scales = {"scale": self.plan.scale, "target_scale": self.plan.target_scale}
        try:
            self._trainable.start_from(sae.to(self._device), **scales)
        except ValueError as error:
            message = f"the saved SAE cannot be begun with: {error}"
            raise InvalidInput("StartDiffers", message, field=f"spec.saes[{self._index}].startFrom") from error

    def take(self, broadcast: Callable[[Tensor], Tensor]) -> None:
        """Take the first rank's weights: those that all have computed alike may differ in their last bits where their
        GPUs do."""
        for tensor in (*self._trainable.parameters_by_name.values(), *self._trainable.buffers_by_name.values()):
            broadcast(tensor.detach())

    def step(self, x: Float32[Tensor, "batch d_in"], target: Float32[Tensor, "batch d_out"], step: int) -> None:
        """Train on this rank's rows of one (scaled, normalised) batch.

        The component of the decoder's gradient along each row is removed before clipping and before the step, since
        unit-norm rows cannot move along themselves.
        """
        if self._job.is_finetuning(step) and self._finetuning is None:
            self._begin_finetuning()
        rate = self._rate(step)
        dead = self._dead.mask()
        learner = self._learner
        if self._noise is not None:
            self._noise.manual_seed(noise_seed(self.plan.spec.seed, step, self._ranks.index))
        with products_in(self._job.settings.precision, self._device):
            # A loss that revives dead latents asks the device how many there are; while there are none, nobody asks.
            revived = dead if self._dead.may_be_any else None
            statistics = learner.step_gradients(StepInput(x, target, step, revived, self._noise))
        if self.plan.is_transcoder:
            # Latents may leave out inputs that are no numbers; an autoencoder's loss sees them by way of its target.
            statistics = dataclasses.replace(statistics, loss=statistics.loss + 0 * x.sum())
        parameters = list(learner.parameters_by_name.values())
        statistics = sum_over_ranks(statistics, parameters, self._ranks)
        self._note_bad_loss(statistics, step)
        self._decoder.project_gradients()
        if self._job.gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self._job.gradient_clip_norm)
        set_rate(self._optimizer, rate)
        self._optimizer.step()
        self._decoder.after_optimizer_step()
        rows = x.shape[0] * self._ranks.size
        self._dead.update(statistics.fire_counts > 0, rows)
        self._frequency.update(statistics.fire_counts, rows)
        self._last = _LastStep(statistics, rate, dead, rows)

    def _begin_finetuning(self) -> None:
        """Freeze the encoder, and go on with a fresh optimiser."""
        settings, schedule = self._job.settings.finetuning, self.plan.finetuning_rate
        assert settings is not None
        assert schedule is not None
        self._finetuning = Finetuning(self._trainable, settings.method, ranks=self._ranks)
        self._optimizer = self._fresh_optimizer(schedule.peak)
        self._decoder = self._upkeep()

    def _upkeep(self) -> DecoderUpkeep:
        return CompiledUpkeep(self._learner) if self._job.settings.compile else self._learner

    def _rate(self, step: int) -> float:
        """The rate that a step uses; each phase has a schedule of its own."""
        if not self._job.is_finetuning(step):
            return self.plan.learning_rate(step)
        assert self.plan.finetuning_rate is not None
        return self.plan.finetuning_rate(step - self._job.training_steps)

    def _note_bad_loss(self, statistics: StepStatistics, step: int) -> None:
        bad = ~torch.isfinite(statistics.loss) & (self._first_bad_step < 0)
        self._first_bad_step.masked_fill_(bad, step)

    def first_bad_step(self) -> int | None:
        """The first step whose loss was not finite; waits for a GPU."""
        step = int(self._first_bad_step)
        return step if step >= 0 else None

    def weights_are_finite(self) -> bool:
        """Whether all weights are: those that the last step made are seen by no loss yet."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self._learner.parameters_by_name.values())

    def fail_at(self, step: int) -> None:
        """Freeze the SAE because its loss was not finite in a step."""
        self._fail(f"the loss is not finite from step {step} of {self._job.steps} on", step)

    def check_weights(self, steps_done: int) -> bool:
        """Whether the weights are finite; freezes the SAE where they are not."""
        if not self.weights_are_finite():
            self._fail(f"weights are not finite after step {steps_done - 1} of {self._job.steps}", steps_done - 1)
        return self.failure is None

    def diverged(self, steps_done: int) -> None:
        """Freeze the SAE because its figures on held-out rows are not finite."""
        self._fail(f"reconstructions are not finite after step {steps_done - 1} of {self._job.steps}", steps_done - 1)

    def _fail(self, what: str, step: int) -> None:
        if self._job.is_finetuning(step):
            assert self.plan.finetuning_rate is not None
            peak, field = self.plan.finetuning_rate.peak, "spec.training.finetuning.learningRate"
        else:
            peak, field = self.plan.learning_rate.peak, f"spec.saes[{self._index}].training.learningRate"
        self.failure = f"{what} (learning rate {self._rate(step):.3g}): lower {field}, e.g. to {peak / 10:.1g}"
        logger.warning("SAE %r is trained no further: %s", self.name, self.failure)

    def stop_if_hopeless(
        self, figures: Mapping[str, float | None], *, tokens: int, otherwise: str | None = None
    ) -> None:
        """Freeze the SAE where these figures of an evaluation are worse than its `stopEarly` allows.

        Args:
            otherwise: another reason to freeze it.
        """
        self.stopped = reason_to_stop(self.plan.spec.stop_early, figures, tokens=tokens) or otherwise
        if self.stopped is not None:
            logger.info("SAE %r: %s", self.name, self.stopped)

    def log_line(self, *, told_kernel: str | None) -> dict[str, float | str]:
        """Figures of the last step, with the values that it used.

        Args:
            told_kernel: the kernel that was told last: only another one is told.
        """
        assert self._last is not None
        last = self._last
        statistics = last.statistics
        line: dict[str, float | str] = {
            "loss": float(statistics.loss),
            **{name: float(value) for name, value in statistics.losses.items()},
            "l0": float(statistics.fire_counts.sum()) / last.rows,
            "learning_rate": last.rate,
            "dead_features": int(last.dead.sum()),
            "mean_tokens_since_fired": float(self._dead.tokens_since_fired.to(torch.float64).mean()),
        }
        if statistics.coefficient is not None:
            line["coefficient"] = statistics.coefficient
        if statistics.kernel != told_kernel:
            line["kernel"] = statistics.kernel
        return line

    def evaluate(
        self,
        inference: SAE,
        held_out: HeldOutRows,
        target: HeldOutRows,
        *,
        between_chunks: Callable[[], None] = lambda: None,
    ) -> dict[str, float | None]:
        """Figures on held-out rows; `dead_fraction` is of the training so far.

        Args:
            inference: what `inference` gave.
            held_out: rows of its hook.
            target: the same rows of its target hook.
            between_chunks: called before each chunk of rows; may raise to end the work.
        """
        metrics = reconstruction_metrics(
            inference, held_out, target if self.plan.is_transcoder else None, between_chunks=between_chunks
        )
        return {**metrics.figures(), "dead_fraction": float(self._dead.mask().to(torch.float64).mean())}

    def inference(self) -> SAE:
        """A copy for use on raw activations: scaling folded in, or the normalisation its own."""
        learner = self._trainable if self._finetuning is None else self._finetuning
        return learner.to_inference(
            scale=self.plan.scale,
            target_scale=self.plan.target_scale,
            normalization=self._job.normalization,
            provenance=self._provenance,
        )

    def log_densities(self) -> Float32[Tensor, " d_sae"] | None:
        """log10 firing frequency of each latent, on the CPU."""
        return self._frequency.log10()

    def closed_window(self) -> SparsityWindow | None:
        """The window of firing frequencies that the last step completed, if it did."""
        return self._frequency.closed_window()

    def last_window(self) -> SparsityWindow | None:
        """What is known of firing frequencies at the end of a training."""
        return self._frequency.estimate()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the training goes on from, as copies on the CPU."""
        tensors = {f"weights.{name}": tensor for name, tensor in self._trainable.parameters_by_name.items()}
        tensors |= {f"buffers.{name}": tensor for name, tensor in self._trainable.buffers_by_name.items()}
        if self._finetuning is not None:
            tensors |= {f"finetuning.{name}": tensor for name, tensor in self._finetuning.tensors.items()}
        for key, tensor in optimizer_tensors(self._optimizer, self._learner.parameters_by_name).items():
            tensors[f"optimizer.{key}"] = tensor
        tensors |= {f"dead.{name}": tensor for name, tensor in self._dead.state().items()}
        tensors |= {f"frequency.{name}": tensor for name, tensor in self._frequency.state().items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            KeyError, RuntimeError: the tensors are of another SAE.
        """
        fine = _below("finetuning.", tensors)
        if fine:
            self._begin_finetuning()
        named = [("weights.", self._trainable.parameters_by_name), ("buffers.", self._trainable.buffers_by_name)]
        if self._finetuning is not None:
            named.append(("finetuning.", self._finetuning.tensors))
        with torch.no_grad():
            for prefix, ours in named:
                for name, tensor in ours.items():
                    tensor.copy_(tensors[f"{prefix}{name}"])
        restore_optimizer(self._optimizer, self._learner.parameters_by_name, _below("optimizer.", tensors))
        self._dead.restore(_below("dead.", tensors))
        self._frequency.restore(_below("frequency.", tensors))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@torch.no_grad()
def sum_over_ranks(statistics: StepStatistics, parameters: list[Tensor], ranks: Ranks) -> StepStatistics:
    """Replace each parameter's gradient by its sum over all ranks; returns the sums of the statistics.

    One exchange does for all: gradients, losses and counts (exact in float32 up to 2^24, the largest batch) as one row
    of numbers.
    """
    if ranks.size == 1:
        return statistics
    losses = [statistics.loss, *statistics.losses.values()]
    gradients = [parameter.grad for parameter in parameters]
    pieces = [piece for piece in gradients if piece is not None]
    pieces += [*losses, statistics.fire_counts]
    flat = torch.cat([piece.detach().reshape(-1).to(torch.float32) for piece in pieces])
    summed = iter(ranks.sum_(flat).split([piece.numel() for piece in pieces]))
    for gradient in gradients:
        if gradient is not None:
            gradient.copy_(next(summed).view_as(gradient))
    loss, *parts = [next(summed).reshape(()) for _ in losses]
    counts: Int64[Tensor, " d_sae"] = next(summed).to(statistics.fire_counts.dtype)
    return dataclasses.replace(
        statistics, loss=loss, losses=dict(zip(statistics.losses, parts, strict=True)), fire_counts=counts
    )


def is_finite(figures: Mapping[str, float | None]) -> bool:
    """Whether all figures that are defined are finite."""
    return all(value is None or math.isfinite(value) for value in figures.values())

"""The weights that every trainable SAE has, their constraint, and the copy for use."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance, SAEConfig
from sae_job.saes.initialization import Activation, initial_weights
from sae_job.saes.kernels.sparse import ActiveLatents
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS
from sae_job.saes.step_memory import StepMemory
from sae_job.saes.trainable import MseNormalization, Ranks, StepInput, StepStatistics
from sae_operator.api.sae import SaeSpec

# Decoder rows are divided by their norm; a row that shrank to nothing must not become NaN.
_SMALLEST_NORM = 1e-8
# Norms of saved decoder rows that differ from 1 by less are those of unit rows, rounded.
_UNIT_NORM_TOLERANCE = 1e-5
# The encoder's biases among the parameters of one number per latent: what an input's centre is taken off by.
_ENCODER_BIASES = ("b_enc", "b_gate", "b_mag")
_SAVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SavedAs:
    """What an SAE in training is for use.

    Attributes:
        architecture: as cfg.json names it.
        activation_fn: its name there.
        activation_fn_kwargs: its settings there.
        tensors: further tensors, e.g. `threshold`, of the latents' scale, which folding leaves alone.
    """

    architecture: str
    activation_fn: str = "relu"
    activation_fn_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class TrainableWeights(ABC):
    """Weights, unit-norm constraint, initialisation and export: what architectures share.

    The reconstruction is `decoded + b_dec + x W_skip^T`, the last for a transcoder with a skip connection.

    Args:
        spec: the SAE's spec.
        d_in: width of the activations.
        d_out: width of what is reconstructed.
        d_sae: number of latents.
        device: where the weights lie.
        ranks: the processes that train together.
        activation: the architecture's activation function on dense pre-activations, for initialisation.

    Attributes:
        latent_parameters: names of the parameters of one number per latent, [d_sae] each, zero at first; under the
            same names they are saved as they are.
        mse_loss_normalization: the job's, which `build_trainable` sets; see `reconstruction`.
        memory: what its steps write; its own, until `build_trainable` sets one that SAEs share.
        W_enc_T: encoder, transposed: latents' gradients arrive as rows, and rows lie contiguously; [d_sae, d_in].
        W_dec: decoder, [d_sae, d_out].
        b_dec: decoder's bias, [d_out].
        W_skip: skip connection, [d_out, d_in]; None without one.
    """

    latent_parameters: ClassVar[tuple[str, ...]] = ("b_enc",)
    mse_loss_normalization: MseNormalization = "none"
    b_enc: Tensor

    def __init__(
        self,
        spec: SaeSpec,
        d_in: int,
        d_out: int,
        d_sae: int,
        *,
        device: torch.device,
        ranks: Ranks,
        activation: Activation,
    ) -> None:
        self.spec = spec
        self.ranks = ranks
        self.d_in = d_in
        self.d_out = d_out
        self.d_sae = d_sae
        self.memory = StepMemory()
        self._noise_scale = spec.architecture.noise_scale or 0.0
        self._activation = activation

        def parameter(*shape: int) -> Tensor:
            tensor = torch.zeros(*shape, dtype=torch.float32, device=device, requires_grad=True)
            tensor.grad = torch.zeros_like(tensor)
            return tensor

        self.W_enc_T = parameter(d_sae, d_in)
        for name in self.latent_parameters:
            setattr(self, name, parameter(d_sae))
        self.W_dec = parameter(d_sae, d_out)
        self.b_dec = parameter(d_out)
        self.W_skip = parameter(d_out, d_in) if spec.skip_connection else None

    @abstractmethod
    def step_gradients(self, batch: StepInput) -> StepStatistics: ...

    @abstractmethod
    def active_latents(self, x: Float32[Tensor, "batch d_in"]) -> ActiveLatents: ...

    def saved_as(self) -> SavedAs:
        """What it is saved as."""
        return SavedAs(self.spec.architecture.type)

    @property
    def parameters_by_name(self) -> dict[str, Tensor]:
        named = {"W_enc_T": self.W_enc_T}
        named |= {name: getattr(self, name) for name in self.latent_parameters}
        named |= {"W_dec": self.W_dec, "b_dec": self.b_dec}
        return named if self.W_skip is None else {**named, "W_skip": self.W_skip}

    @property
    def buffers_by_name(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def initialize(
        self,
        sample: Float32[Tensor, "rows d_in"],
        target: Float32[Tensor, "rows d_out"],
        generator: torch.Generator,
    ) -> None:
        start = initial_weights(
            self.spec,
            sample,
            None if self.spec.target_hook is None else target,
            d_sae=self.d_sae,
            activation=self._activation,
            generator=generator,
        )
        self.W_enc_T.copy_(start.W_enc.T)
        self.W_dec.copy_(start.W_dec)
        self.b_dec.copy_(start.b_dec)
        for name in set(self.latent_parameters).intersection(_ENCODER_BIASES):
            getattr(self, name).copy_(start.encoder_bias)
        if self.W_skip is not None:
            self.W_skip.zero_()

    @torch.no_grad()
    def start_from(self, sae: SAE, *, scale: float, target_scale: float) -> None:
        """Take the weights of a saved SAE of the same architecture and sizes, for activations times these factors.

        Where decoder rows are kept at unit norm, the norms of the saved ones go into the encoder: latents are larger,
        and the reconstruction is the same.

        Raises:
            ValueError: the SAE has not the tensors that this one needs, or of another shape, or factors or norms of
                its latents cannot stay in a decoder of unit rows.
        """
        if sae.cfg.normalize_activations in RUN_TIME_NORMALIZATIONS:
            scale = target_scale = 1.0  # it never saw a factor
        factors = getattr(sae, "finetuning_scaling_factor", None)
        if factors is not None and self.spec.normalizes_decoder:
            raise ValueError("it was fine-tuned with factors of its latents: set normalizeDecoder: false to go on from")
        self._take(self.W_enc_T, sae, "W_enc", transposed=True).div_(scale)
        for name in self.latent_parameters:
            self._take(getattr(self, name), sae, name)
        self._take(self.W_dec, sae, "W_dec").mul_(target_scale)
        if factors is not None:
            self.W_dec.mul_(factors.unsqueeze(1))
        self._take(self.b_dec, sae, "b_dec").mul_(target_scale)
        if self.W_skip is not None:
            self._take(self.W_skip, sae, "W_skip").mul_(target_scale / scale)
        if self.spec.normalizes_decoder:
            norms = torch.linalg.vector_norm(self.W_dec, dim=1)
            norms.masked_fill_(norms <= _SMALLEST_NORM, 1.0)
            if float((norms - 1).abs().max()) > _UNIT_NORM_TOLERANCE:
                self._move_norms_to_encoder(norms)

    def _move_norms_to_encoder(self, norms: Float32[Tensor, " d_sae"]) -> None:
        """Make decoder rows of these norms unit rows, and latents as much larger."""
        self.W_dec.div_(norms.unsqueeze(1))
        self.W_enc_T.mul_(norms.unsqueeze(1))
        # The gated encoder's r_mag is an exponent of the encoder's rows, which have the norms already.
        for name in set(self.latent_parameters) - {"r_mag"}:
            getattr(self, name).mul_(norms)

    @staticmethod
    def _take(parameter: Tensor, sae: SAE, name: str, *, transposed: bool = False) -> Tensor:
        saved = getattr(sae, name, None)
        if saved is None:
            raise ValueError(f"it has no {name}: it is of another architecture")
        saved = saved.T if transposed else saved
        if saved.shape != parameter.shape:
            raise ValueError(f"its {name} is of shape {tuple(saved.shape)}, not {tuple(parameter.shape)}")
        return parameter.copy_(saved)

    @torch.no_grad()
    def centred(self, x: Float32[Tensor, "batch d_in"]) -> Float32[Tensor, "batch d_in"]:
        """The encoder's input."""
        return x - self.b_dec if self.spec.subtracts_b_dec else x

    def source_of_noise(self, batch: StepInput) -> torch.Generator | None:
        """What the noise of a step's pre-activations is drawn from; None where they have none."""
        if self._noise_scale == 0:
            return None
        if batch.generator is None:
            raise ValueError("noiseScale needs a source of noise: StepInput.generator")
        return batch.generator

    def add_noise_(self, pre: Float32[Tensor, "batch d_sae"], source: torch.Generator) -> None:
        """Add the spec's noise to pre-activations, in place."""
        drawn = self.memory.take("noise", *pre.shape, device=pre.device).normal_(generator=source)
        pre.add_(drawn, alpha=self._noise_scale)

    @torch.no_grad()
    def add_bias_and_skip_(
        self, decoded: Float32[Tensor, "batch d_out"], x: Float32[Tensor, "batch d_in"]
    ) -> Float32[Tensor, "batch d_out"]:
        """What is decoded from latents becomes, in place, the reconstruction."""
        decoded.add_(self.b_dec)
        return decoded if self.W_skip is None else decoded.addmm_(x, self.W_skip.T)

    @torch.no_grad()
    def set_bias_and_skip_gradients(
        self,
        output_gradient: Float32[Tensor, "batch d_out"],
        x: Float32[Tensor, "batch d_in"],
        pre_gradient_sum: Float32[Tensor, " d_sae"],
    ) -> None:
        """Fill the gradients of `b_dec` and `W_skip`.

        Args:
            output_gradient: of the reconstruction.
            x: the encoder's input before it was centred.
            pre_gradient_sum: column sums of the gradient of `centred(x) W_enc`: times the encoder they are what the
                centring sends back.
        """
        bias_gradient = output_gradient.sum(dim=0)
        if self.spec.subtracts_b_dec:
            bias_gradient -= pre_gradient_sum @ self.W_enc_T
        self.b_dec.grad = bias_gradient
        if self.W_skip is not None:
            self.W_skip.grad = output_gradient.T @ x

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove the part of the decoder's gradient that is parallel to each row, where rows are kept at unit norm."""
        gradient = self.W_dec.grad
        if self.spec.normalizes_decoder and gradient is not None:
            parallel = torch.linalg.vecdot(gradient, self.W_dec)
            gradient.addcmul_(self.W_dec, parallel.unsqueeze(1), value=-1)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Bring decoder rows back to unit norm, where they are kept there."""
        if self.spec.normalizes_decoder:
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min_(_SMALLEST_NORM))

    @torch.no_grad()
    def to_inference(
        self,
        *,
        scale: float,
        target_scale: float | None = None,
        normalization: str = "none",
        provenance: Provenance | None = None,
    ) -> SAE:
        """A copy for use on raw activations; see `TrainableSAE.to_inference`."""
        saved = self.saved_as()
        if normalization in RUN_TIME_NORMALIZATIONS:
            scale = target_scale = 1.0  # each activation is brought to scale by the copy itself
        target_scale = scale if target_scale is None else target_scale
        folded = {"W_enc": (self.W_enc_T * scale).T}
        folded |= {name: getattr(self, name) for name in self.latent_parameters}
        folded |= {"W_dec": self.W_dec / target_scale, "b_dec": self.b_dec / target_scale}
        if self.W_skip is not None:
            folded["W_skip"] = self.W_skip * (scale / target_scale)
        folded |= saved.tensors
        source = provenance or Provenance()
        config = SAEConfig(
            architecture=saved.architecture,
            d_in=self.d_in,
            d_sae=self.d_sae,
            activation_fn_str=saved.activation_fn,
            activation_fn_kwargs=dict(saved.activation_fn_kwargs),
            apply_b_dec_to_input=self.spec.subtracts_b_dec,
            dtype=self.spec.dtype,
            # What is folded in is not to be done again.
            normalize_activations=normalization if normalization in RUN_TIME_NORMALIZATIONS else "none",
            hook_layer=source.hook_layer,
            d_out=None if self.spec.target_hook is None else self.d_out,
            skip_connection=self.W_skip is not None,
            training_architecture=self.spec.architecture.type,
            **dataclasses.asdict(source),
        )
        dtype = _SAVED_DTYPES[self.spec.dtype]
        copies = {
            name: tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
            for name, tensor in folded.items()
        }
        return SAE(config, copies)

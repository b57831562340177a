"""The weights that every trainable SAE has, their constraint, and the copy for use."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_job.saes.base import SAE
from sae_job.saes.config import Provenance, SAEConfig
from sae_job.saes.initialization import Activation, initial_weights
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS
from sae_job.saes.trainable import MseNormalization, Ranks
from sae_operator.api.sae import SaeSpec

# Decoder rows are divided by their norm; a row that shrank to nothing must not become NaN.
_SMALLEST_NORM = 1e-8


class TrainableWeights:
    """Weights, unit-norm constraint, initialisation and export: what architectures share.

    Args:
        spec: the SAE's spec.
        d_in: width of the activations.
        d_out: width of what is reconstructed.
        d_sae: number of latents.
        device: where the weights lie.
        ranks: the processes that train together.
        activation: the architecture's activation function on dense pre-activations, for initialisation.

    Attributes:
        mse_loss_normalization: the job's, which `build_trainable` sets; see `reconstruction`.
    """

    mse_loss_normalization: MseNormalization = "none"

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
        self._activation = activation

        def parameter(*shape: int) -> Tensor:
            tensor = torch.zeros(*shape, dtype=torch.float32, device=device, requires_grad=True)
            tensor.grad = torch.zeros_like(tensor)
            return tensor

        # The encoder's transpose: latents' gradients arrive as rows, and rows lie contiguously.
        self.W_enc_T = parameter(d_sae, d_in)
        self.b_enc = parameter(d_sae)
        self.W_dec = parameter(d_sae, d_out)
        self.b_dec = parameter(d_out)

    @property
    def parameters_by_name(self) -> dict[str, Tensor]:
        return {"W_enc_T": self.W_enc_T, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}

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
            self.spec.initialization,
            sample,
            d_sae=self.d_sae,
            normalize_decoder=self.spec.normalize_decoder,
            apply_b_dec_to_input=self.spec.subtracts_b_dec,
            activation=self._activation,
            generator=generator,
        )
        self.W_enc_T.copy_(start.W_enc.T)
        self.W_dec.copy_(start.W_dec)
        self.b_dec.copy_(start.b_dec)
        self.b_enc.zero_()

    @torch.no_grad()
    def start_from(self, sae: SAE, *, scale: float, target_scale: float) -> None:
        """Take the weights of a saved SAE of the same architecture and sizes, for activations times these factors."""
        self.W_enc_T.copy_(sae.W_enc.T).div_(scale)
        self.b_enc.copy_(sae.b_enc)
        self.W_dec.copy_(sae.W_dec).mul_(target_scale)
        self.b_dec.copy_(sae.b_dec).mul_(target_scale)

    @torch.no_grad()
    def centred(self, x: Float32[Tensor, "batch d_in"]) -> Float32[Tensor, "batch d_in"]:
        """The encoder's input."""
        return x - self.b_dec if self.spec.subtracts_b_dec else x

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Remove the part of the decoder's gradient that is parallel to each row, where rows are kept at unit norm."""
        if self.spec.normalize_decoder:
            gradient = self.W_dec.grad
            assert gradient is not None
            parallel = torch.linalg.vecdot(gradient, self.W_dec)
            gradient.addcmul_(self.W_dec, parallel.unsqueeze(1), value=-1)

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Bring decoder rows back to unit norm, where they are kept there."""
        if self.spec.normalize_decoder:
            self.W_dec.div_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).clamp_min_(_SMALLEST_NORM))

    def export(
        self,
        activation_fn: str,
        activation_fn_kwargs: dict[str, int],
        *,
        scale: float,
        normalization: str,
        provenance: Provenance | None,
    ) -> SAE:
        """A copy for use on raw activations; see `TrainableSAE.to_inference`."""
        run_time = normalization in RUN_TIME_NORMALIZATIONS
        source = provenance or Provenance()
        config = SAEConfig(
            architecture=self.spec.architecture.type,
            d_in=self.d_in,
            d_sae=self.d_sae,
            activation_fn_str=activation_fn,
            activation_fn_kwargs=dict(activation_fn_kwargs),
            apply_b_dec_to_input=self.spec.subtracts_b_dec,
            dtype=self.spec.dtype,
            # What is folded in is not to be done again.
            normalize_activations=normalization if run_time else "none",
            hook_layer=source.hook_layer,
            **dataclasses.asdict(source),
        )
        tensors = {
            "W_enc": self.W_enc_T.detach().T.contiguous(),
            "b_enc": self.b_enc.detach().clone(),
            "W_dec": self.W_dec.detach().clone(),
            "b_dec": self.b_dec.detach().clone(),
        }
        sae = SAE(config, tensors)
        if not run_time:
            sae.fold_activation_scale(scale)
        return sae

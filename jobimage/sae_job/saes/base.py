"""An SAE for use: encode, decode, fold, save and load."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from sae_job.saes import files, folding
from sae_job.saes.config import DTYPES, Layout, SAEConfig
from sae_job.saes.encoders import ENCODERS, encode_largest, few_active
from sae_job.saes.heads import Heads, flatten_heads, with_heads
from sae_job.saes.hook_points import ACTS_POST, ACTS_PRE, ERROR, INPUT, OUTPUT, RECONS, HookedModule
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, RowStatistics, denormalize_rows, normalize_rows
from sae_job.storage.base import ObjectStore
from sae_job.storage.open import open_store
from sae_operator.api.store import StoreLocation


@dataclass(frozen=True)
class Encoded:
    """What decoding needs of an input besides the activations of its latents.

    Attributes:
        statistics: what normalisation took from it; None where the SAE does not normalise.
        heads: n_heads and d_head of an input [..., n_heads, d_head]; None where it came flat.
        skip: what the skip connection makes of it, [..., d_out]; None without one.
    """

    statistics: RowStatistics | None = None
    heads: Heads | None = None
    skip: Float[Tensor, "... d_out"] | None = None


class SAE(HookedModule):
    """A sparse autoencoder or a transcoder: `f = encode(x - b_dec)`, `y = (f s) W_dec + b_dec + x W_skip^T`.

    `encode` is the architecture's: see `encoders`. `b_dec` is subtracted where `cfg.apply_b_dec_to_input` says so, s is
    there after fine-tuning only, and W_skip in a transcoder with a skip connection.

    Where `cfg.normalize_activations` says so, each x is normalised before and y brought back after (but for a
    transcoder's, which is of another hook), with the statistics of x. SAEs on a hook that ends in `_z` take
    [..., n_heads, d_head] as well as flat inputs. `encode_with_context` gives what decoding needs of an input, `decode`
    takes it, `reconstruct` and `forward` do both; nothing of an input is kept between calls.

    Each of `hook_points.HOOK_POINTS` is a module of this one: register forward hooks there.

    Attributes:
        cfg: what it computes.
        use_error_term: whether `forward` adds the error of the undisturbed reconstruction.
        hook_z_reshaping_mode: whether inputs may come as [..., n_heads, d_head].
        W_enc [d_in, d_sae], W_dec [d_sae, d_out], b_dec [d_out]: parameters.
        b_enc; threshold; b_gate, r_mag, b_mag [d_sae]: parameters, as the architecture has them.
        finetuning_scaling_factor [d_sae]: factor of each latent in `decode`, only with `cfg.finetuning_scaling_factor`.
        W_skip [d_out, d_in]: only with `cfg.skip_connection`.
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    b_gate: Tensor
    r_mag: Tensor
    b_mag: Tensor
    W_dec: Tensor
    b_dec: Tensor
    finetuning_scaling_factor: Tensor
    W_skip: Tensor

    def __init__(self, cfg: SAEConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.cfg = cfg
        self.use_error_term = False
        self.hook_z_reshaping_mode = cfg.reshapes_heads
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def name(self) -> str:
        """`sae_{model}_{hook}_{latents}`."""
        return self.cfg.name

    def pre_activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Of raw activations, as hooks on `hook_sae_acts_pre` see them."""
        passed: list[Tensor] = []

        def keep(pre: Tensor) -> tuple[Tensor, bool]:
            passed.append(pre)
            return pre, False

        centred, _ = self._enter(x, hooks=False)
        ENCODERS[self.cfg.architecture].encode(self, centred, keep)
        return passed[0]

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Activations of the latents."""
        return self.encode_with_context(x)[0]

    def encode_with_context(self, x: Float[Tensor, "... d_in"]) -> tuple[Float[Tensor, "... d_sae"], Encoded]:
        """Activations of the latents, and what `decode` needs of the input besides them."""
        return self._encode(x, hooks=True)

    def decode(
        self, features: Float[Tensor, "... d_sae"], context: Encoded | None = None
    ) -> Float[Tensor, "... d_out"]:
        """Reconstruction from activations of the latents.

        Args:
            context: of the inputs that were encoded. Without it, an SAE that reshapes heads gives flat rows, and a skip
                connection adds nothing.

        Raises:
            ValueError: the SAE normalises, and there is no context.
        """
        return self._decode(features, self._context(context), hooks=True)

    def reconstruct(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_out"]]:
        """Activations of the latents, and the reconstruction from them."""
        return self._reconstruct(x, hooks=True)

    def forward(
        self, x: Float[Tensor, "... d_in"], target: Float[Tensor, "... d_out"] | None = None
    ) -> Float[Tensor, "... d_out"]:
        """The reconstruction; with `use_error_term` plus what it lacks of the truth when nobody intervenes.

        So an SAE with the error term gives back its input, until hooks change something on the way: the error term is
        that of the undisturbed pass. It is a constant: gradients flow through the reconstruction alone.

        Args:
            target: what should be reconstructed; `x` itself when None, which a transcoder with the error term cannot
                take for it.
        """
        _, reconstruction = self._reconstruct(x, hooks=True)
        if self.use_error_term:
            if target is None and self.cfg.is_transcoder:
                raise ValueError("the error term of a transcoder needs the target: call it with (x, target)")
            with torch.no_grad():
                error = (x if target is None else target) - self._reconstruct(x, hooks=False)[1]
                error = self.at(ERROR, error)
            reconstruction = reconstruction + error
        return self.at(OUTPUT, reconstruction)

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Take [..., n_heads, d_head] as well as flat inputs.

        Raises:
            ValueError: the SAE's hook does not end in `_z`.
        """
        if not self.cfg.reshapes_heads:
            raise ValueError(f"only SAEs on hook_z take an axis of heads; this one is on {self.cfg.hook_name!r}")
        self.hook_z_reshaping_mode = True

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Take flat inputs alone."""
        self.hook_z_reshaping_mode = False

    def fold_activation_scale(self, scale: float, target_scale: float | None = None) -> None:
        """See `folding.fold_activation_scale`."""
        folding.fold_activation_scale(self, scale, target_scale)

    def fold_decoder_norms(self) -> None:
        """See `folding.fold_decoder_norms`."""
        folding.fold_decoder_norms(self)

    def save(
        self, store: ObjectStore, prefix: str, *, log_sparsity: Tensor | None = None, layout: Layout = "saelens5"
    ) -> None:
        """Write the folder that SAELens loads, the weights last.

        Args:
            prefix: folder below the store's URI.
            log_sparsity: log10 firing frequency [d_sae].
            layout: SAELens 5's or SAELens 6's; transcoders, which SAELens 5 does not know, always have the latter.
        """
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        files.write(store, prefix, self.cfg, tensors, log_sparsity=log_sparsity, layout=layout)

    @classmethod
    def load(
        cls, location: str | Path | StoreLocation, device: str | torch.device = "cpu", *, dtype: str | None = None
    ) -> Self:
        """Load a folder: `s3://…`, `file://…`, or a path.

        Args:
            dtype: number format of the weights; the saved one when None.

        Raises:
            InvalidInput: the folder holds no SAE, or one that cannot be loaded rightly.

        Warns:
            UserWarning: its model must be processed; the message tells how to load it.
        """
        if not isinstance(location, StoreLocation):
            text = str(location)
            location = StoreLocation(uri=text if "://" in text else f"file://{Path(text).absolute()}")
        sae = cls.load_from_store(open_store(location), "", device, dtype=dtype)
        if sae.cfg.model_from_pretrained_kwargs:
            arguments = ", ".join(f"{name}={value!r}" for name, value in sae.cfg.model_from_pretrained_kwargs.items())
            warnings.warn(
                "this SAE was trained on a processed model: load it by "
                f"HookedTransformer.from_pretrained_no_processing(..., {arguments})",
                stacklevel=2,
            )
        return sae

    @classmethod
    def load_from_store(
        cls, store: ObjectStore, prefix: str, device: str | torch.device = "cpu", *, dtype: str | None = None
    ) -> Self:
        """Load the folder `prefix` of a store; raises `InvalidInput` as `load` does."""
        config, tensors = files.read(store, prefix)
        if dtype is not None:
            config = dataclasses.replace(config, dtype=dtype)
        return cls.from_tensors(config, tensors, device)

    @classmethod
    def from_tensors(cls, cfg: SAEConfig, tensors: dict[str, Tensor], device: str | torch.device = "cpu") -> Self:
        """Build an SAE from stored tensors; raises `InvalidInput` when they are not what the configuration says."""
        cfg.check()
        cfg, tensors = files.fitting(cfg, tensors)
        dtype = DTYPES[cfg.dtype]
        cfg = dataclasses.replace(cfg, device=str(torch.device(device)))
        # What is folded below must not change the tensors that were given.
        copy = cfg.rescale_acts_by_decoder_norm
        moved = {name: tensor.to(device=device, dtype=dtype, copy=copy) for name, tensor in tensors.items()}
        sae = cls(cfg, moved)
        if cfg.rescale_acts_by_decoder_norm:
            folding.fold_rescaling_by_decoder_norm(sae)
        return sae

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts, all of them (`to`, `cuda`, `half`, …), come here: the configuration follows."""
        super()._apply(fn, recurse)
        dtype = str(self.dtype).removeprefix("torch.")
        self.cfg = dataclasses.replace(self.cfg, device=str(self.device), dtype=dtype)
        return self

    def _enter(self, x: Float[Tensor, "... d_in"], *, hooks: bool) -> tuple[Float[Tensor, "... d_in"], Encoded]:
        """The encoder's input, and what decoding needs besides the latents."""
        x = x.to(self.dtype)
        x, heads = flatten_heads(x, self.cfg.d_in) if self.hook_z_reshaping_mode else (x, None)
        x = self.at(INPUT, x, hooks=hooks)
        # Of the input as it is, before normalisation, as SAELens has it.
        skip = torch.nn.functional.linear(x, self.W_skip) if self.cfg.skip_connection else None
        normalized, statistics = normalize_rows(x, self.cfg.normalize_activations)
        normalized = normalized.to(self.dtype)
        if self.cfg.apply_b_dec_to_input:
            normalized = normalized - self.b_dec
        # What a transcoder gives is of another hook: its heads and its scale are not those of the input.
        return normalized, Encoded(skip=skip) if self.cfg.is_transcoder else Encoded(statistics, heads)

    def _encode(self, x: Float[Tensor, "... d_in"], *, hooks: bool) -> tuple[Float[Tensor, "... d_sae"], Encoded]:
        centred, context = self._enter(x, hooks=hooks)
        return self._activate(centred, hooks=hooks), context

    def _activate(self, centred: Float[Tensor, "... d_in"], *, hooks: bool) -> Float[Tensor, "... d_sae"]:
        """Activations of the latents, from the encoder's input."""
        features = ENCODERS[self.cfg.architecture].encode(self, centred, lambda pre: self._at_pre(pre, hooks=hooks))
        return self.at(ACTS_POST, features, hooks=hooks)

    def _at_pre(self, pre: Tensor, *, hooks: bool) -> tuple[Tensor, bool]:
        """What passes `hook_sae_acts_pre`, and whether nobody else needs it."""
        free = not pre.requires_grad and not (hooks and self.hooked(ACTS_PRE))
        return self.at(ACTS_PRE, pre, hooks=hooks), free

    def _context(self, context: Encoded | None) -> Encoded:
        if context is not None:
            return context
        if self.cfg.normalize_activations in RUN_TIME_NORMALIZATIONS and not self.cfg.is_transcoder:
            raise ValueError(
                f"an SAE with {self.cfg.normalize_activations} decodes to raw activations by the statistics of its "
                "inputs: pass what encode_with_context gave, or call reconstruct"
            )
        return Encoded()

    def _decode(self, features: Float[Tensor, "... d_sae"], context: Encoded, *, hooks: bool) -> Tensor:
        if self.cfg.finetuning_scaling_factor:
            features = features * self.finetuning_scaling_factor
        decoded = torch.nn.functional.linear(features.to(self.dtype), self.W_dec.T, self.b_dec)
        return self._leave(decoded, context, hooks=hooks)

    def _leave(self, decoded: Float[Tensor, "... d_out"], context: Encoded, *, hooks: bool) -> Tensor:
        """From what the decoder gives to the reconstruction."""
        decoded = self.at(RECONS, decoded, hooks=hooks)
        decoded = denormalize_rows(decoded, context.statistics)
        if context.skip is not None:
            decoded = decoded + context.skip
        return with_heads(decoded, context.heads)

    def _reconstruct(
        self, x: Float[Tensor, "... d_in"], *, hooks: bool
    ) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_out"]]:
        """The decoder touches active latents alone where they are few: half the work. Not where somebody may replace
        them on the way, or gradients are traced."""
        centred, context = self._enter(x, hooks=hooks)
        if centred.requires_grad or (hooks and self.hooked(ACTS_POST)):
            features = self._activate(centred, hooks=hooks)
            return features, self._decode(features, context, hooks=hooks)
        if self.cfg.uses_top_k and not (hooks and self.hooked(ACTS_PRE)):
            features, active = encode_largest(self, centred)
        else:
            features = self._activate(centred, hooks=hooks)
            active = few_active(features)
        if active is None:
            return features, self._decode(features, context, hooks=hooks)
        if self.cfg.finetuning_scaling_factor:
            active = active.with_values(active.values * self.finetuning_scaling_factor[active.indices])
        decoded = active.decode(self.W_dec).add_(self.b_dec).view(*features.shape[:-1], self.cfg.width_out)
        return features, self._leave(decoded, context, hooks=hooks)

"""An SAE for use: encode, decode, fold, save and load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sae_job.errors import InvalidInput
from sae_job.saes.config import SAEConfig
from sae_job.saes.normalization import RUN_TIME_NORMALIZATIONS, RowStatistics, denormalize_rows, normalize_rows
from sae_job.storage.base import ObjectNotFound, ObjectStore
from sae_job.storage.open import open_store
from sae_operator.api.store import StoreLocation

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SPARSITY_FILE = "sparsity.safetensors"
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# The name that this format's files use, and the one that older files use.
_SCALING_NAMES = ("finetuning_scaling_factor", "scaling_factor")


class SAE(torch.nn.Module):
    """A sparse autoencoder: `f = activation((x - b_dec) W_enc + b_enc)`, `y = f W_dec + b_dec`.

    With `cfg.apply_b_dec_to_input` off, `b_dec` is not subtracted from the input. The activation function is ReLU,
    for topk after all but the k largest pre-activations were set to zero. Where `cfg.normalize_activations` says so,
    each x is normalised before and y brought back after, with the statistics of x: `encode_with_statistics` gives
    them, `decode` takes them, `reconstruct` and `forward` do both.

    Attributes:
        W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]: parameters.
        finetuning_scaling_factor [d_sae]: factor of each latent in `decode`, only with `cfg.finetuning_scaling_factor`.
    """

    def __init__(self, cfg: SAEConfig, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.cfg = cfg
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    finetuning_scaling_factor: Tensor

    def pre_activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Of raw activations."""
        return self._pre_activations(normalize_rows(x.to(self.W_enc.dtype), self.cfg.normalize_activations)[0])

    def _pre_activations(self, normalized: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        x = normalized.to(self.W_enc.dtype)
        if self.cfg.apply_b_dec_to_input:
            x = x - self.b_dec
        return x @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Activations of the latents."""
        return self.encode_with_statistics(x)[0]

    def encode_with_statistics(
        self, x: Float[Tensor, "... d_in"]
    ) -> tuple[Float[Tensor, "... d_sae"], RowStatistics | None]:
        """Activations of the latents, and what `decode` needs to give raw activations; None for an SAE that does not
        normalise."""
        normalized, statistics = normalize_rows(x.to(self.W_enc.dtype), self.cfg.normalize_activations)
        pre = self._pre_activations(normalized)
        if not self.cfg.uses_top_k:
            return pre.relu_(), statistics
        values, indices = pre.topk(self.cfg.activation_fn_kwargs["k"], dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, indices, values.relu_()), statistics

    def decode(
        self, features: Float[Tensor, "... d_sae"], statistics: RowStatistics | None = None
    ) -> Float[Tensor, "... d_in"]:
        """Reconstruction from activations of the latents.

        Args:
            statistics: of the inputs that were encoded, for an SAE that normalises.

        Raises:
            ValueError: the SAE normalises, and there are no statistics.
        """
        if statistics is None and self.cfg.normalize_activations in RUN_TIME_NORMALIZATIONS:
            raise ValueError(
                f"an SAE with {self.cfg.normalize_activations} decodes to raw activations by the statistics of its "
                "inputs: pass what encode_with_statistics gave, or call reconstruct"
            )
        if self.cfg.finetuning_scaling_factor:
            features = features * self.finetuning_scaling_factor
        return denormalize_rows(features @ self.W_dec + self.b_dec, statistics)

    def reconstruct(self, x: Float[Tensor, "... d_in"]) -> tuple[Float[Tensor, "... d_sae"], Float[Tensor, "... d_in"]]:
        """Activations of the latents, and the reconstruction from them."""
        features, statistics = self.encode_with_statistics(x)
        return features, self.decode(features, statistics)

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        return self.reconstruct(x)[1]

    @torch.no_grad()
    def fold_activation_scale(self, scale: float) -> None:
        """Make the SAE take raw activations where it took activations times `scale`.

        Afterwards `encode(x)` is what `encode(scale * x)` was, and `decode(f)` is what `decode(f) / scale` was.

        Raises:
            ValueError: the SAE normalises each activation, so that it never saw a scale.
        """
        if self.cfg.normalize_activations in RUN_TIME_NORMALIZATIONS:
            raise ValueError(f"an SAE with {self.cfg.normalize_activations} has no scale to fold")
        self.W_enc *= scale
        self.W_dec /= scale
        self.b_dec /= scale
        self.cfg = dataclasses.replace(self.cfg, normalize_activations="none")

    def save(self, store: ObjectStore, prefix: str, *, log_sparsity: Tensor | None = None) -> None:
        """Write the folder that SAELens loads, the weights last.

        Args:
            prefix: folder below the store's URI.
            log_sparsity: log10 firing frequency [d_sae].
        """
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        if log_sparsity is not None:
            sparsity = log_sparsity.to(torch.float32).cpu().contiguous()
            store.put(f"{folder}{SPARSITY_FILE}", save_tensors({"sparsity": sparsity}))
        store.put(f"{folder}{CONFIG_FILE}", json.dumps(self.cfg.to_dict(), indent=1).encode())
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        store.put(f"{folder}{WEIGHTS_FILE}", save_tensors(tensors))

    @classmethod
    def load(cls, location: str | Path | StoreLocation, device: str | torch.device = "cpu") -> Self:
        """Load a folder: `s3://…`, `file://…`, or a path.

        Raises:
            InvalidInput: the folder holds no SAE, or one that cannot be loaded rightly.
        """
        if not isinstance(location, StoreLocation):
            text = str(location)
            location = StoreLocation(uri=text if "://" in text else f"file://{Path(text).absolute()}")
        return cls.load_from_store(open_store(location), "", device)

    @classmethod
    def load_from_store(cls, store: ObjectStore, prefix: str, device: str | torch.device = "cpu") -> Self:
        """Load the folder `prefix` of a store; raises `InvalidInput` as `load` does."""
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        try:
            config = json.loads(store.get(f"{folder}{CONFIG_FILE}"))
            tensors = load_tensors(store.get(f"{folder}{WEIGHTS_FILE}"))
        except ObjectNotFound as error:
            raise InvalidInput("SaeNotFound", f"{store.uri}/{folder} holds no SAE: {error}") from error
        except (json.JSONDecodeError, SafetensorError) as error:
            raise InvalidInput("SaeInvalid", f"{store.uri}/{folder} is damaged: {error}") from error
        return cls.from_tensors(SAEConfig.from_dict(config), tensors, device)

    @classmethod
    def from_tensors(cls, cfg: SAEConfig, tensors: dict[str, Tensor], device: str | torch.device = "cpu") -> Self:
        """Build an SAE from stored tensors; raises `InvalidInput` when they are not what the configuration says."""
        tensors = dict(tensors)
        for name in _SCALING_NAMES:
            if (scaling := tensors.pop(name, None)) is not None and not bool((scaling == 1).all()):
                if not cfg.finetuning_scaling_factor:
                    raise InvalidInput("SaeInvalid", f"{name} is there, but cfg.json has finetuning_scaling_factor off")
                tensors[_SCALING_NAMES[0]] = scaling
        cfg = dataclasses.replace(cfg, finetuning_scaling_factor=_SCALING_NAMES[0] in tensors, device=str(device))
        shapes = {
            "W_enc": (cfg.d_in, cfg.d_sae),
            "b_enc": (cfg.d_sae,),
            "W_dec": (cfg.d_sae, cfg.d_in),
            "b_dec": (cfg.d_in,),
        }
        if cfg.finetuning_scaling_factor:
            shapes[_SCALING_NAMES[0]] = (cfg.d_sae,)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != shapes:
            raise InvalidInput("SaeInvalid", f"tensors are {found}, but cfg.json asks for {shapes}")
        dtype = _DTYPES.get(cfg.dtype)
        if dtype is None:
            raise InvalidInput("SaeUnsupported", f"dtype {cfg.dtype!r} is none of {', '.join(_DTYPES)}")
        return cls(cfg, {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()})

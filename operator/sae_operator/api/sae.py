"""One SAE of a training job: its architecture, how its weights begin, and what it trains with beside the others."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from pydantic.alias_generators import to_camel

from sae_operator.api.activation_cache import HookKey
from sae_operator.api.base import ApiModel, Count, CountOrZero, Name, Rule
from sae_operator.api.store import StoreLocation

UnitInterval = Annotated[float, Field(ge=0, lt=1)]
PositiveNumber = Annotated[float, Field(gt=0, le=1e9)]
Coefficient = Annotated[float, Field(ge=0, le=1e9)]

ArchitectureType = Literal["topk", "batchtopk", "matryoshka_batchtopk", "standard", "gated", "jumprelu"]
TOP_K_TYPES = ("topk", "batchtopk", "matryoshka_batchtopk")
BATCH_TOP_K_TYPES = ("batchtopk", "matryoshka_batchtopk")

# Fields of `Architecture`, and the types that they are for.
FIELD_TYPES: dict[str, tuple[str, ...]] = {
    "k": TOP_K_TYPES,
    "aux_k_coefficient": TOP_K_TYPES,
    "aux_k": TOP_K_TYPES,
    "aux_k_form": TOP_K_TYPES,
    "threshold_momentum": BATCH_TOP_K_TYPES,
    "widths": ("matryoshka_batchtopk",),
    "l1_coefficient": ("standard", "gated"),
    "l1_warm_up_steps": ("standard", "gated"),
    "lp_norm": ("standard",),
    "scale_sparsity_penalty_by_decoder_norm": ("standard",),
    "activation": ("standard",),
    "ghost_gradients": ("standard",),
    "l0_coefficient": ("jumprelu",),
    "l0_warm_up_steps": ("jumprelu",),
    "sparsity_penalty": ("jumprelu",),
    "target_l0": ("jumprelu",),
    "tanh_scale": ("jumprelu",),
    "bandwidth": ("jumprelu",),
    "initial_threshold": ("jumprelu",),
    "pre_activation_coefficient": ("jumprelu",),
    "noise_scale": (*TOP_K_TYPES, "standard", "jumprelu"),
}
DEFAULT_EXPANSION_FACTOR = 8
DecoderStart = Literal["mixed", "kaiming_uniform", "orthogonal", "heuristic"]
EncoderStart = Literal["scaled_transpose", "transpose", "kaiming_uniform"]
REQUIRED_FIELDS = ("k", "l1_coefficient", "l0_coefficient")


def _cel_list(types: tuple[str, ...]) -> str:
    return f"[{', '.join(repr(name) for name in types)}]"


def type_names(types: tuple[str, ...]) -> str:
    """`type a`, `types a and b`, as messages tell them."""
    if len(types) == 1:
        return f"type {types[0]}"
    return f"types {', '.join(types[:-1])} and {types[-1]}"


def _is_for_type(architecture: Architecture, *, field: str) -> bool:
    return getattr(architecture, field) is None or architecture.type in FIELD_TYPES[field]


def _is_there(architecture: Architecture, *, field: str) -> bool:
    return getattr(architecture, field) is not None or architecture.type not in FIELD_TYPES[field]


class Architecture(ApiModel):
    """One flat object; which fields apply depends on `type`."""

    RULES = (
        *(
            Rule(
                f"!(self.type in {_cel_list(FIELD_TYPES[field])}) || has(self.{to_camel(field)})",
                partial(_is_there, field=field),
                f"{to_camel(field)} is required for {type_names(FIELD_TYPES[field])}",
                to_camel(field),
            )
            for field in REQUIRED_FIELDS
        ),
        *(
            Rule(
                f"!has(self.{to_camel(field)}) || self.type in {_cel_list(types)}",
                partial(_is_for_type, field=field),
                f"{to_camel(field)} is only for {type_names(types)}",
                to_camel(field),
            )
            for field, types in FIELD_TYPES.items()
        ),
        Rule(
            "(has(self.sparsityPenalty) && self.sparsityPenalty == 'target_l0') == has(self.targetL0)",
            lambda a: (a.sparsity_penalty == "target_l0") == (a.target_l0 is not None),
            "targetL0 goes with sparsityPenalty target_l0",
            "targetL0",
        ),
        Rule(
            "!has(self.tanhScale) || (has(self.sparsityPenalty) && self.sparsityPenalty == 'tanh')",
            lambda a: a.tanh_scale is None or a.sparsity_penalty == "tanh",
            "tanhScale goes with sparsityPenalty tanh",
            "tanhScale",
        ),
    )

    type: ArchitectureType
    """`topk`: the k largest pre-activations of a row. `batchtopk`: the k largest per row on average over the batch;
    saved as jumprelu. `matryoshka_batchtopk`: the same, and nested prefixes of the latents reconstruct on their own.
    `standard`: ReLU with an L1 (Lp) penalty. `gated`: which latents fire and how strongly are apart. `jumprelu`: a
    threshold of its own for each latent."""
    k: Count | None = None
    """topk, batchtopk, matryoshka_batchtopk: active latents per token."""
    aux_k_coefficient: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """topk, batchtopk, matryoshka_batchtopk: weight of the auxiliary loss that revives dead latents; the paper's 1/32
    when empty (1 in the form `saelens`), and 0 turns it off."""
    aux_k: Count | None = None
    """topk, batchtopk, matryoshka_batchtopk: dead latents that the auxiliary loss uses per token; half of dIn when
    empty (half of dSae in the form `saelens`)."""
    aux_k_form: Literal["paper", "saelens"] | None = None
    """topk, batchtopk, matryoshka_batchtopk: how the auxiliary loss is weighed. `paper`, the default: relative to the
    residual's variance. `saelens`: by the share of `auxK` latents that are dead, as SAELens does."""
    threshold_momentum: UnitInterval | None = None
    """batchtopk, matryoshka_batchtopk: how slowly the running threshold of the saved SAE follows the batches; 0.99 when
    empty."""
    widths: Annotated[list[Count], Field(min_length=1, max_length=32)] | None = None
    """matryoshka_batchtopk: sizes of the nested prefixes, ascending; dSae is the last. A 16th, 8th, quarter and half
    of dSae when empty."""
    l1_coefficient: Coefficient | None = None
    """standard, gated: weight of the sparsity penalty."""
    l1_warm_up_steps: CountOrZero | None = None
    """standard, gated: steps over which the penalty's weight rises linearly from 0; none when empty."""
    lp_norm: Annotated[float, Field(gt=0, le=4)] | None = None
    """standard: p of the penalty's norm; 1 when empty."""
    scale_sparsity_penalty_by_decoder_norm: bool | None = None
    """standard: weight each latent's penalty by the norm of its decoder row, which must then not be kept at unit norm;
    true when empty, unless `normalizeDecoder` is."""
    activation: Literal["relu", "tanh-relu"] | None = None
    """standard: activation function; relu when empty."""
    ghost_gradients: bool | None = None
    """standard: revive dead latents by ghost gradients."""
    l0_coefficient: Coefficient | None = None
    """jumprelu: weight of the sparsity penalty."""
    l0_warm_up_steps: CountOrZero | None = None
    """jumprelu: steps over which the penalty's weight rises linearly from 0; none when empty."""
    sparsity_penalty: Literal["step", "tanh", "target_l0"] | None = None
    """jumprelu: `step`, the default: the number of active latents. `tanh`: a smooth count of them, weighted by decoder
    norms. `target_l0`: the squared relative distance of their number from `targetL0`."""
    target_l0: PositiveNumber | None = None
    """jumprelu: active latents per token that `sparsityPenalty: target_l0` aims at."""
    tanh_scale: PositiveNumber | None = None
    """jumprelu: steepness of `sparsityPenalty: tanh`; 4 when empty."""
    bandwidth: PositiveNumber | None = None
    """jumprelu: width of the window around its threshold in which a pre-activation moves it; 0.05 when empty."""
    initial_threshold: PositiveNumber | None = None
    """jumprelu: start of the thresholds; 0.01 when empty."""
    pre_activation_coefficient: Coefficient | None = None
    """jumprelu: weight of the loss that pulls dead latents up to their thresholds; off when empty."""
    noise_scale: Coefficient | None = None
    """topk, batchtopk, matryoshka_batchtopk, standard, jumprelu: standard deviation of the noise that training adds to
    pre-activations; none when empty."""


class Initialization(ApiModel):
    decoder: DecoderStart | None = None
    """`mixed`: unit rows halfway between a random activation and a random direction. `kaiming_uniform`: the default of
    SAELens. `orthogonal`: orthogonal rows. `heuristic`: random rows of norm 0.1. When empty, mixed; heuristic for a
    standard SAE, not a transcoder, whose decoder rows are not kept at unit norm."""
    encoder: EncoderStart | None = None
    """`scaled_transpose`: the decoder's transpose times the scalar that best reconstructs a sample. `transpose`: the
    decoder's transpose. `kaiming_uniform`: independent of the decoder. A transcoder's encoder begins in the directions
    of its own inputs. When empty, transpose where the decoder begins as heuristic, else scaled_transpose."""
    decoder_bias: Literal["mean", "geometric_median", "zeros"] = "mean"
    """Start of `b_dec`, from the activations that are reconstructed, as training sees them."""


class TrainingOverrides(ApiModel):
    """Settings of `training` that one SAE replaces."""

    learning_rate: PositiveNumber | None = None
    """Peak learning rate."""
    adam_beta1: UnitInterval | None = None
    """Adam's decay rate of the first moment."""
    adam_beta2: UnitInterval | None = None
    """Adam's decay rate of the second moment."""


class StopEarly(ApiModel):
    """An SAE that is worse than this once so many tokens are trained on is frozen; the others go on."""

    RULES = (
        Rule(
            "has(self.explainedVarianceBelow) || has(self.l0Above) || has(self.l0Below) || has(self.deadFractionAbove)",
            lambda s: any(
                bound is not None
                for bound in (s.explained_variance_below, s.l0_above, s.l0_below, s.dead_fraction_above)
            ),
            "stopEarly needs at least one of explainedVarianceBelow, l0Above, l0Below and deadFractionAbove",
        ),
    )

    after_tokens: Count
    """Tokens from which evaluations count."""
    explained_variance_below: Annotated[float, Field(le=1, ge=-1e9)] | None = None
    """Stop when explained variance is below this."""
    l0_above: PositiveNumber | None = None
    """Stop when more latents than this are active per token."""
    l0_below: PositiveNumber | None = None
    """Stop when fewer latents than this are active per token."""
    dead_fraction_above: UnitInterval | None = None
    """Stop when more of the latents than this are dead."""


# Whether decoder rows are kept at unit norm: `SaeSpec.normalizes_decoder`.
_CEL_NORMALIZES_DECODER = (
    "(has(self.normalizeDecoder) ? self.normalizeDecoder : self.architecture.type != 'standard'"
    " || (has(self.architecture.scaleSparsityPenaltyByDecoderNorm)"
    " && !self.architecture.scaleSparsityPenaltyByDecoderNorm))"
)


class SaeSpec(ApiModel):
    RULES = (
        Rule(
            "self.name != 'checkpoints'",
            lambda s: s.name != "checkpoints",
            "the folder checkpoints below output.uri is taken; choose another name",
            "name",
        ),
        Rule(
            "!(has(self.dSae) && has(self.expansionFactor))",
            lambda s: s.d_sae is None or s.expansion_factor is None,
            "only one of dSae and expansionFactor may be set",
        ),
        Rule(
            "!has(self.dSae) || !has(self.architecture.k) || self.architecture.k <= self.dSae",
            lambda s: s.d_sae is None or s.architecture.k is None or s.architecture.k <= s.d_sae,
            "k must be at most dSae",
            "architecture.k",
        ),
        Rule(
            f"!{_CEL_NORMALIZES_DECODER} || !has(self.initialization.decoder)"
            " || self.initialization.decoder != 'heuristic'",
            lambda s: not s.normalizes_decoder or s.initialization.decoder != "heuristic",
            "initialization.decoder heuristic needs normalizeDecoder: false",
            "normalizeDecoder",
        ),
        Rule(
            f"!{_CEL_NORMALIZES_DECODER} || !has(self.architecture.scaleSparsityPenaltyByDecoderNorm)"
            " || !self.architecture.scaleSparsityPenaltyByDecoderNorm",
            lambda s: not s.normalizes_decoder or not s.architecture.scale_sparsity_penalty_by_decoder_norm,
            "scaleSparsityPenaltyByDecoderNorm needs normalizeDecoder: false",
            "normalizeDecoder",
        ),
        Rule(
            "!self.skipConnection || has(self.targetHook)",
            lambda s: not s.skip_connection or s.target_hook is not None,
            "skipConnection is only for a transcoder; set targetHook",
            "skipConnection",
        ),
        Rule(
            "!has(self.targetHook) || !has(self.applyBDecToInput) || !self.applyBDecToInput",
            lambda s: s.target_hook is None or not s.apply_b_dec_to_input,
            "applyBDecToInput cannot be true for a transcoder: b_dec is of its outputs",
            "applyBDecToInput",
        ),
    )

    name: Name
    """Name of the SAE: its folder below `output.uri`."""
    hook: HookKey | None = None
    """Hook that it is trained on, `name` or `name:headIndex`; the only one when empty."""
    target_hook: HookKey | None = None
    """Hook that it reconstructs, which makes it a transcoder; `hook` when empty."""
    skip_connection: bool = False
    """Transcoder: add an affine map of the input to the reconstruction."""
    architecture: Architecture
    """Kind of SAE and its own settings; which of them apply depends on `type`."""
    d_sae: Count | None = None
    """Number of latents."""
    expansion_factor: Annotated[Count, Field(le=4096)] | None = None
    """Number of latents as a multiple of dIn; 8 when neither is set."""
    seed: CountOrZero = 0
    """Seed of its initial weights, and of noise."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of its saved weights; training keeps them in float32."""
    apply_b_dec_to_input: bool | None = None
    """Subtract `b_dec` before encoding; true when empty, but for a transcoder."""
    normalize_decoder: bool | None = None
    """Keep decoder rows at unit norm. When empty, true for all but standard with a penalty that is weighted by their
    norms, as it is by default: it explains more with as many active latents."""
    initialization: Initialization = Field(default_factory=Initialization)
    """How its weights begin."""
    start_from: StoreLocation | None = None
    """Folder of a saved SAE of the same architecture and size whose weights it begins with, instead of
    `initialization`."""
    training: TrainingOverrides = Field(default_factory=TrainingOverrides)
    """Settings of `training` that this SAE replaces."""
    stop_early: StopEarly | None = None
    """When to give this SAE up."""

    @property
    def subtracts_b_dec(self) -> bool:
        """Whether `b_dec` is subtracted before encoding."""
        return self.target_hook is None if self.apply_b_dec_to_input is None else self.apply_b_dec_to_input

    @property
    def normalizes_decoder(self) -> bool:
        """Whether decoder rows are kept at unit norm."""
        if self.normalize_decoder is not None:
            return self.normalize_decoder
        return self.architecture.type != "standard" or self.architecture.scale_sparsity_penalty_by_decoder_norm is False

    @property
    def decoder_start(self) -> DecoderStart:
        """How the decoder begins."""
        if self.initialization.decoder is not None:
            return self.initialization.decoder
        small = self.architecture.type == "standard" and not self.normalizes_decoder and self.target_hook is None
        return "heuristic" if small else "mixed"

    @property
    def encoder_start(self) -> EncoderStart:
        """How the encoder begins."""
        if self.initialization.encoder is not None:
            return self.initialization.encoder
        return "transpose" if self.decoder_start == "heuristic" else "scaled_transpose"

    @property
    def weights_penalty_by_decoder_norm(self) -> bool:
        """Whether a standard SAE's penalty counts each latent times the norm of its decoder row."""
        weighted = self.architecture.scale_sparsity_penalty_by_decoder_norm
        return self.architecture.type == "standard" and (not self.normalizes_decoder if weighted is None else weighted)

    def latents(self, d_in: int) -> int:
        """Number of latents on activations of a width."""
        return self.d_sae or (self.expansion_factor or DEFAULT_EXPANSION_FACTOR) * d_in

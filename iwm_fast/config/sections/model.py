"""Keys of the networks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from iwm_fast.config.base import (
    Count,
    NonNegative,
    Place,
    Positive,
    Section,
)
from iwm_fast.config.encoders import ENCODERS, EncoderArchitecture, EncoderName, EncoderShape, Positions, shape_of
from iwm_fast.config.registry import TermNames, term_and_weight

__all__ = ["ModelConfig", "PredictorConfig", "RegularizerConfig", "TargetEncoderConfig"]

Conditioning = Literal["none", "sequence", "feature", "block", "sequence+block", "feature+block"]


class PredictorConfig(Section):
    """The world model: it predicts the target's tokens from the source's tokens and the action."""

    kind: Literal["vit", "mlp"] = Field(
        "vit", description="vit attends over context and mask tokens; mlp maps each visible token by itself"
    )
    depth: Count = Field(18, description="blocks (paper: 12 invariant, 18 equivariant)")
    width: Count = Field(384, description="token width; a multiple of heads and of 4")
    heads: Count | None = Field(None, description="attention heads; default: one per 32 of width (I-JEPA)")
    mlp_ratio: Positive = Field(4.0, description="hidden width of each block's MLP over the predictor's width")
    conditioning: Conditioning = Field(
        "feature",
        description="where the action enters: as tokens, in the features, or in every block; + combines two",
    )

    @property
    def head_count(self) -> int:
        """Attention heads after the default is applied."""
        return self.heads if self.heads is not None else max(1, self.width // 32)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.head_count or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.head_count}) and of 4")
        if self.kind == "mlp" and self.conditioning not in ("none", "block"):
            raise ValueError(f"kind mlp takes its action in its blocks: conditioning is {self.conditioning}, use block")
        return self


class RegularizerConfig(Section):
    """What keeps the encoder's representation from collapsing: a statistic of the global batch, in the loss."""

    kind: Literal["none", "sigreg", "vicreg"] = Field(
        "none",
        description="sigreg: distance to a standard Gaussian (LeJEPA, arXiv:2511.08544); vicreg: std of 1 and no "
        "covariance (arXiv:2105.04906)",
    )
    weight: Positive = Field(20.0, description="in the loss, where the world model's own term has 1")
    directions: Count = Field(256, description="sigreg: random directions per step")
    knots: Annotated[int, Field(ge=2, le=17)] = Field(
        9, description="sigreg: points of the characteristic function, equally spaced on [0, 3]"
    )
    on: Literal["tokens", "pooled"] = Field(
        "tokens", description="visible tokens of the source, or their mean per image"
    )
    center: Literal["none", "position"] = Field(
        "none", description="position: take off the batch's mean at each patch's position first"
    )
    mean_weight: NonNegative = Field(0.0, description="of ‖mean‖² / width beside it, within weight")


Eps = Annotated[float, Field(gt=0.0, le=0.1)]
Prefix = Annotated[int, Field(ge=0, le=1024)]


class TargetEncoderConfig(Section):
    """The architecture of a frozen target encoder that differs from the encoder's; image and patch are the same."""

    encoder: EncoderName | EncoderShape = Field(description="its size: a name, or {depth, width, heads}")
    prefix_tokens: Prefix = Field(0, description="its class and register tokens")
    positions: Positions = Field("sincos", description="its positions of patches")
    norm_eps: Eps = Field(1e-6, description="eps of its normalisations")

    @property
    def shape(self) -> EncoderShape:
        """Depth, width and heads, given by name or by its shape."""
        return self.encoder if isinstance(self.encoder, EncoderShape) else shape_of(self.encoder)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require_rotation(self.positions, self.shape)
        return self


class ModelConfig(Section):
    """The networks."""

    encoder: EncoderName | EncoderShape = Field(
        "vit_base", description="a name (a plugin may register more), or {depth, width, heads}"
    )
    patch: Count = Field(16, description="side of a patch, pixels; divides image")
    image: Count = Field(224, description="side of the square views, pixels")
    prefix_tokens: Prefix = Field(
        0,
        description="learned tokens before the patches of each image, as a class token and registers; patches attend "
        "to them, and the predictor does not see them",
    )
    positions: Positions = Field(
        "sincos",
        description="of the encoder's patches. sincos: fixed, added to them; learned: parameters, added to them; rope: "
        "rotations of their queries and keys in every block (DINOv3's)",
    )
    rope_base: Positive = Field(100.0, description="positions rope: ratio of its longest period to its shortest")
    norm_eps: Eps = Field(1e-6, description="eps of the encoder's normalisations; the predictor's is 1e-6")
    init: Place | None = Field(
        None, description="weights that the encoder and its target start from: a file or a folder, read by a new run"
    )
    init_predictor: Place | None = Field(
        None, description="weights that the predictor starts from: a file or a folder, read by a new run"
    )
    init_pixels: Literal["auto", "imagenet", "half"] = Field(
        "auto",
        description="normalisation of pixels that those weights expect. imagenet: ImageNet's mean and std; half: 0.5 "
        "and 0.5; auto: what the folder's files say, else imagenet",
    )
    target: Literal["ema", "shared", "frozen"] = Field(
        "ema", description="target encoder: EMA of the encoder, the encoder itself, or the weights of target_init"
    )
    target_init: Place | None = Field(
        None, description="target frozen: its weights, a file or a folder, read by a new run"
    )
    target_encoder: TargetEncoderConfig | None = Field(
        None, description="target frozen: its architecture, where it differs from the encoder's"
    )
    freeze_encoder: bool = Field(False, description="train the predictor alone, on the encoder of init")
    target_precision: Literal["train", "fp8"] = Field(
        "train",
        description="of the EMA or frozen target's matmuls in training: train.precision, or fp8 (GPU 8.9 or later)",
    )
    history: Annotated[int, Field(ge=1, le=4)] = Field(
        1,
        description="frames of a source, the last of which the action follows: above 1 for recorded actions only, "
        "whose manifest has episodes (docs/guides/triplets.md)",
    )
    normalize_target: bool = Field(True, description="layer-normalise target tokens without affine (I-JEPA)")
    attention: Literal["auto", "xformers", "efficient", "sdpa", "cudnn", "varlen", "flash3", "flash_cute"] = Field(
        "auto",
        description="auto: on a GPU the fastest one in the measurements that ship with the package, xformers without "
        "measurements; on a CPU SDPA. efficient: PyTorch's memory-efficient attention, on GPUs; sdpa and cudnn: "
        "PyTorch's, one call per length; varlen: PyTorch's flash-attention over packed sequences (2.10 or later); "
        "flash3, flash_cute: flash-attn 3 and its CuTe version, where installed. The last four compute bf16 and fp16; "
        "evaluation in fp32 then uses auto",
    )
    mlp_workspace_mib: Annotated[int, Field(ge=1, le=2**20)] = Field(
        1024,
        description="on a GPU, MiB for the hidden activations of one MLP, which the backward pass recomputes; beyond "
        "that the MLP runs in chunks of tokens, which saves memory and launches more kernels; a chunk has at least 64 "
        "tokens",
    )
    terms: TermNames = Field(
        (),
        description="further terms of the loss, registered by plugins: each NAME, or NAME=WEIGHT (default weight: 1)",
    )
    predictor: PredictorConfig = PredictorConfig()
    regularizer: RegularizerConfig = RegularizerConfig()

    @property
    def weighted_terms(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) of each of ``terms``."""
        return tuple(term_and_weight(text) for text in self.terms)

    @property
    def encoder_shape(self) -> EncoderShape:
        """Depth, width and heads of the encoder, given by name or by its shape."""
        return self.encoder if isinstance(self.encoder, EncoderShape) else shape_of(self.encoder)

    @property
    def architecture(self) -> EncoderArchitecture:
        """The encoder's."""
        return self._architecture(self.encoder_shape, self.prefix_tokens, self.positions, self.norm_eps)

    @property
    def target_architecture(self) -> EncoderArchitecture:
        """The target encoder's: the encoder's, but of a frozen target with its own."""
        own = self.target_encoder
        if own is None:
            return self.architecture
        return self._architecture(own.shape, own.prefix_tokens, own.positions, own.norm_eps)

    def _architecture(self, shape: EncoderShape, prefix: int, positions: Positions, eps: float) -> EncoderArchitecture:
        return EncoderArchitecture(shape, self.image, self.patch, prefix, positions, eps, self.rope_base)

    def described(self) -> dict[str, Any]:
        """Return it for an export, which is read without the run's plugins: their encoders by size, without their terms
        of the loss.
        """
        found = self.model_dump(mode="json") | {"terms": []}
        if isinstance(self.encoder, str) and self.encoder not in ENCODERS:
            found["encoder"] = self.encoder_shape.model_dump(mode="json")
        own = self.target_encoder
        if own is not None and isinstance(own.encoder, str) and own.encoder not in ENCODERS:
            found["target_encoder"]["encoder"] = own.shape.model_dump(mode="json")
        return found

    @property
    def evaluated_encoder(self) -> Literal["target", "context"]:
        """The encoder that k-NN, probes and finetuning read: the EMA where there is one, else the context encoder.

        Beside a frozen target that is the trained one.
        """
        return "target" if self.target == "ema" else "context"

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.image % self.patch:
            raise ValueError(f"image {self.image} must be a multiple of patch {self.patch}")
        if self.target_precision == "fp8" and self.target == "shared":
            raise ValueError("target_precision is fp8, so target must be ema or frozen: a shared encoder has gradients")
        _require_rotation(self.positions, self.encoder_shape)
        return self

    @model_validator(mode="after")
    def _starts_from_weights(self) -> Self:
        if self.target == "frozen" and self.target_init is None:
            raise ValueError("target is frozen and target_init is null; set target_init to the target's weights")
        for name in ("target_init", "target_encoder"):
            if self.target != "frozen" and getattr(self, name) is not None:
                raise ValueError(f"{name} is of a frozen target, and target is {self.target}; set target to frozen")
        if self.freeze_encoder and self.target == "ema":
            raise ValueError(
                "freeze_encoder is true and target is ema, whose average of a constant is the encoder itself; set "
                "target to shared, or to frozen with target_init"
            )
        if self.freeze_encoder and self.init is None:
            raise ValueError("freeze_encoder is true and init is null; set init to the encoder's weights")
        if self.freeze_encoder and self.regularizer.kind != "none":
            raise ValueError(
                f"freeze_encoder is true and regularizer.kind is {self.regularizer.kind}, which would train nothing; "
                "set regularizer.kind to none"
            )
        if self.init_pixels != "auto" and self.init is None and self.target_init is None:
            raise ValueError(f"init_pixels is {self.init_pixels} and there are no weights; set init or target_init")
        return self


def _require_rotation(positions: Positions, shape: EncoderShape) -> None:
    """ValueError where a head's width cannot be split into sines and cosines of two axes."""
    head = shape.width // shape.heads
    if positions == "rope" and head % 4:
        raise ValueError(f"positions is rope, so width / heads must be a multiple of 4; it is {head}")

"""Keys of the networks."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from iwm_fast.config.base import (
    Count,
    NonNegative,
    Positive,
    Section,
)
from iwm_fast.config.encoders import EncoderName, EncoderShape, shape_of
from iwm_fast.config.registry import TermNames, term_and_weight

__all__ = ["ModelConfig", "PredictorConfig", "RegularizerConfig"]

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


class ModelConfig(Section):
    """The networks."""

    encoder: EncoderName | EncoderShape = Field(
        "vit_base", description="a name (a plugin may register more), or {depth, width, heads}"
    )
    patch: Count = Field(16, description="side of a patch, pixels; divides image")
    image: Count = Field(224, description="side of the square views, pixels")
    target: Literal["ema", "shared"] = Field(
        "ema", description="target encoder: EMA of the encoder, or the encoder itself"
    )
    target_precision: Literal["train", "fp8"] = Field(
        "train", description="of the EMA target's matmuls in training: train.precision, or fp8 (GPU 8.9 or later)"
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
    def grid(self) -> int:
        """Patches along a side."""
        return self.image // self.patch

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.image % self.patch:
            raise ValueError(f"image {self.image} must be a multiple of patch {self.patch}")
        if self.target_precision == "fp8" and self.target == "shared":
            raise ValueError("target_precision is fp8, so target must be ema: a shared encoder has gradients")
        return self

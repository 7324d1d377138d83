"""Every key of a configuration: its type, unit, allowed range and meaning stand here and nowhere else.

The models are frozen and refuse unknown keys. Checks across fields stand in the model that holds both fields.
Sources of defaults: the paper (arXiv:2403.00504) and, where it is silent, I-JEPA's published ViT configurations.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from iwm_fast.config.base import Place, Range, Section, pair
from iwm_fast.config.encoders import ENCODERS, EncoderName, EncoderShape
from iwm_fast.config.external import EXTERNAL, ExternalActions, still

__all__ = [
    "ENCODERS",
    "ActionsConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EncoderShape",
    "EvalConfig",
    "ExternalActions",
    "LogConfig",
    "MasksConfig",
    "ModelConfig",
    "PredictorConfig",
    "TrainConfig",
    "ViewsConfig",
    "ZeroConfig",
]

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


def _require_ascending(name: str, pair: tuple[float, float], low: float, high: float) -> None:
    if not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name} is {list(pair)}; it must be ascending and within [{low:g}, {high:g}]")


Conditioning = Literal["none", "sequence", "feature", "block", "sequence+block", "feature+block"]


class PredictorConfig(Section):
    """The world model: from the source's tokens and an action to the target's tokens."""

    kind: Literal["vit", "mlp"] = Field(
        "vit", description="vit attends over context and mask tokens; mlp acts on each visible token alone"
    )
    depth: Count = Field(18, description="blocks (paper: 12 invariant, 18 equivariant)")
    width: Count = Field(384, description="token width; a multiple of heads and of 4")
    heads: Count | None = Field(None, description="attention heads; default: one per 32 of width (I-JEPA)")
    mlp_ratio: Positive = Field(4.0, description="hidden width of each block's MLP over the predictor's width")
    conditioning: Conditioning = Field(
        "feature", description="where the action enters; block may be joined to the others with +"
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


class ModelConfig(Section):
    """The networks."""

    encoder: EncoderName | EncoderShape = Field("vit_base", description="a name, or {depth, width, heads}")
    patch: Count = Field(16, description="side of a patch, pixels; divides image")
    image: Count = Field(224, description="side of the square views, pixels")
    target: Literal["ema", "shared"] = Field("ema", description="target encoder: moving average, or the encoder itself")
    target_precision: Literal["train", "fp8"] = Field(
        "train", description="of the ema target's products in training: as train.precision, or fp8 (GPU 8.9 or later)"
    )
    normalize_target: bool = Field(True, description="layer-normalise target tokens without affine (I-JEPA)")
    attention: Literal["auto", "xformers", "efficient", "sdpa", "cudnn", "varlen", "flash3", "flash_cute"] = Field(
        "auto",
        description="auto: on a GPU the fastest by the measurements that ship with the package, xformers where there "
        "are none, on a CPU SDPA. efficient: PyTorch's memory-efficient one, on GPUs; sdpa and cudnn: PyTorch's, a "
        "call per length; varlen: PyTorch's flash-attention over packed sequences (2.10 or later); flash3, flash_cute: "
        "flash-attn 3 and its CuTe form, where installed. These last four compute bf16 and fp16; fp32, in evaluation, "
        "is computed as auto",
    )
    mlp_workspace_mib: Annotated[int, Field(ge=1, le=2**20)] = Field(
        1024,
        description="on a GPU, MiB for the hidden activations of the MLP that runs, recomputed in the backward pass; "
        "where they need more, its tokens are computed in chunks, which saves memory and takes more launches; 64 "
        "tokens are computed at once in any case",
    )
    predictor: PredictorConfig = PredictorConfig()

    @property
    def encoder_shape(self) -> EncoderShape:
        """Depth, width and heads of the encoder, whichever way it was named."""
        return self.encoder if isinstance(self.encoder, EncoderShape) else ENCODERS[self.encoder]

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


class ActionsConfig(Section):
    """What is done to a view, how often and how strongly, and which of it the predictor is told."""

    groups: Annotated[tuple[Literal["photometric", "geometric", "external"], ...], BeforeValidator(pair)] = Field(
        ("photometric",),
        description="photometric, or photometric and geometric; or external: the actions of a manifest of triplets, "
        "and nothing else is done to the pictures unless crop_scale or flip_probability, for both alike, are given",
    )
    external: ExternalActions | None = Field(
        None, description="what the external actions are; default: as the manifest says, and recorded here by the run"
    )
    strength: NonNegative = Field(1.0, description="multiplies the four jitter strengths; 2 strong, 3 very strong")
    form: Literal["difference", "absolute"] = Field(
        "difference", description="jitter told as target minus source (paper), or as both views' own values"
    )
    jitter_probability: Probability = Field(0.8, description="chance of colour jitter, for each view by itself")
    brightness: NonNegative = Field(0.4, description="factor drawn from 1 ± this, clipped at 0")
    contrast: NonNegative = Field(0.4, description="factor drawn from 1 ± this, clipped at 0")
    saturation: NonNegative = Field(0.2, description="factor drawn from 1 ± this, clipped at 0")
    hue: NonNegative = Field(0.1, description="in turns: 0.1 is ± 36 degrees of rotation in YIQ; at most half a turn")
    grayscale_probability: Probability = Field(0.2, description="chance that the source loses its colour")
    blur_probability: Probability = Field(0.2, description="chance that the source is blurred")
    blur_sigma: Range = Field((0.1, 2.0), description="pixels, drawn uniformly")
    solarize_probability: Probability = Field(0.1, description="chance that the source is solarized")
    solarize_threshold: Annotated[int, Field(ge=0, le=255)] = Field(128, description="levels at or above are inverted")
    crop_scale: Range = Field((0.3, 1.0), description="share of the image's area")
    crop_aspect: Range = Field((0.75, 4 / 3), description="width over height, drawn log-uniformly")
    flip_probability: Probability = Field(0.5, description="chance of a horizontal flip")
    rotation_probability: Probability = Field(
        0.75, description="geometric group only: chance of one, two or three quarter turns of the source"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        _require_ascending("blur_sigma", self.blur_sigma, 0.01, 20.0)
        _require_ascending("crop_scale", self.crop_scale, 0.01, 1.0)
        _require_ascending("crop_aspect", self.crop_aspect, 0.1, 10.0)
        if self.groups not in (("photometric",), ("photometric", "geometric"), EXTERNAL):
            raise ValueError(
                f"groups is {list(self.groups)}; it must be [photometric], [photometric, geometric] or [external]"
            )
        _, untold = still(type(self).model_fields)
        done = [name for name in untold if self.is_external and getattr(self, name) > 0]
        if done:
            raise ValueError(f"{done[0]} is {getattr(self, done[0]):g}; it must be 0 where groups is [external]")
        if self.external is not None and not self.is_external:
            raise ValueError(f"external is given, so groups must be [external]; it is {list(self.groups)}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _pairs_stay_as_they_are(cls, values: Any) -> Any:
        if isinstance(values, dict) and pair(values.get("groups")) == EXTERNAL:
            return {**still(cls.model_fields)[0], **values}
        return values

    @property
    def is_external(self) -> bool:
        """Whether the actions are somebody else's, of a manifest of triplets."""
        return self.groups == EXTERNAL

    @property
    def geometric(self) -> bool:
        """Whether the source has a geometry of its own, of which the predictor is told."""
        return "geometric" in self.groups


class ViewsConfig(Section):
    """How many views are made of an image."""

    sources_per_target: Count = Field(
        1, description="source views of one decoded image, each with its own action and mask, for one target (paper: 1)"
    )


class MasksConfig(Section):
    """Multi-block masks (I-JEPA, section 3): what the encoder does not see and the predictor answers for."""

    target_blocks: Count = Field(4, description="blocks an image; the predictor answers for their union")
    visible_blocks: Annotated[int, Field(ge=0)] = Field(
        0,
        description="of the target blocks, those that the encoder sees all the same: there the predictor answers for "
        "the action alone; below target_blocks, or all of them where the actions are external",
    )
    target_scale: Range = Field((0.15, 0.2), description="share of the patches in one target block")
    target_aspect: Range = Field((0.75, 1.5), description="height over width of a target block")
    context_scale: Range = Field((0.85, 1.0), description="share of the patches in the square context block")
    min_context: Count = Field(10, description="fewest patches that the encoder sees; drawn again below it")

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        _require_ascending("target_scale", self.target_scale, 0.001, 1.0)
        _require_ascending("target_aspect", self.target_aspect, 0.1, 10.0)
        _require_ascending("context_scale", self.context_scale, 0.001, 1.0)
        if self.visible_blocks > self.target_blocks:
            raise ValueError(f"visible_blocks is {self.visible_blocks}; it must not be above {self.target_blocks}")
        return self


class DataConfig(Section):
    """Where images come from and how they are decoded."""

    source: Literal["auto", "folder", "webdataset", "tfrecord", "triplets"] = Field(
        "auto", description="auto: chosen by what lies under root, which the training says"
    )
    root: Place | None = Field(
        None,
        description="folder of images (sub-folders are classes), of .tar shards or of TFRecord files, the same as "
        "s3://bucket/prefix, or a manifest of iwm-fast data index; or a manifest of triplets (docs/triplets.md)",
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="where DALI decodes and augments")
    threads: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="DALI's CPU threads; default: cores divided by the ranks of this host"
    )
    readers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="files read at a time by a rank; default: 1 from disk, 16 from a store"
    )
    checkers: Annotated[int, Field(ge=0, le=64)] | None = Field(
        None,
        description="processes of a rank that check images for damage ahead of their first use, of files on disk; 0: "
        "the thread that reads them does; default: on a GPU an eighth of the rank's cores, 2 at most, on a CPU 0. None "
        "are started for a set with under 2,000 unchecked images (iwm-fast data index --check checks them beforehand)",
    )
    store_timeout: Annotated[float, Field(ge=0.1, le=600)] = Field(
        20.0, description="seconds without a byte from a store (s3://) after which a request is made again"
    )
    store_attempts: Count = Field(6, description="times that a request to a store is made before the run stops")
    hw_decoder_load: Probability = Field(
        0.65,
        description="on a GPU with a JPEG engine (A100, H100 and later), the share of JPEGs given to it, the rest to "
        "nvJPEG's kernels; the best value depends on the GPU and on data.threads",
    )
    prefetch: Count = Field(3, description="batches prepared ahead")
    max_bad_fraction: Probability = Field(
        0.01,
        description="share of samples that may fail before the run stops, in training; of each split, in evaluation",
    )
    wait_s: NonNegative = Field(
        300.0, description="seconds to wait for a data folder that is gone to come back; 0: the run stops at once"
    )
    max_pixels: Count = Field(178_956_970, description="larger images are refused as decompression bombs (Pillow)")


class TrainConfig(Section):
    """Optimisation."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of weights, order, parameters and masks")
    epochs: Positive = Field(300.0, description="length of the training in passes over the data")
    steps: Count | None = Field(None, description="where this start ends; default: the whole training")
    schedule_steps: Count | None = Field(None, description="length of the schedules; default: the whole training")
    global_batch: Count = Field(2048, description="images a step over all ranks and accumulated micro-batches")
    micro_batch: Count | None = Field(None, description="ceiling of the images a rank computes at once; default: none")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="of the computation; master weights are always fp32")
    optimizer: Literal["adamw", "lamb"] = Field(
        "adamw", description="lamb: each tensor's step is scaled by its norm, for large batches; at zero.stage 0"
    )
    lr: Positive = Field(1e-3, description="peak learning rate at a global batch of lr_batch")
    lr_batch: Count | None = Field(None, description="lr is scaled by global_batch / lr_batch; default: not scaled")
    lr_start: NonNegative = Field(0.2, description="learning rate before warm-up, over the peak (I-JEPA: 2e-4 / 1e-3)")
    lr_final: NonNegative = Field(1e-3, description="learning rate at the end, over the peak (I-JEPA: 1e-6 / 1e-3)")
    weight_decay: Range = Field((0.04, 0.4), description="cosine from first to last; not for biases, norms and tokens")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="steps of linear warm-up of the learning rate")
    ema: Range = Field((0.996, 1.0), description="momentum of the target encoder, cosine from first to last")
    betas: Range = Field((0.9, 0.999), description="AdamW's decay rates of the moments")
    clip: NonNegative = Field(0.0, description="global gradient norm above which gradients are scaled down; 0: never")
    activation_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")
    compile: bool = Field(
        False,
        description="compile what lies between the attentions (torch.compile), when it first runs: seconds to minutes "
        "a start; batches of other lengths need no more; on a CPU it needs a C++ compiler; not with zero.stage 3",
    )
    deterministic: bool = Field(
        False,
        description="on a GPU, only operators that give the same bits on every run (attention's backward pass among "
        "them; slower); on a CPU all do anyway. Not with model.attention cudnn",
    )
    target_stream: bool = Field(
        False,
        description="on a GPU, compute the target on a CUDA stream of its own, beside the context; not with "
        "zero.stage 3",
    )
    static_shapes: bool = Field(
        False,
        description="round a micro-batch's tokens up to a multiple (static_multiple) by padding without loss or "
        "gradient, so that a run meets few sizes",
    )
    static_multiple: Count | None = Field(
        None,
        description="with static_shapes: tokens; default: the power of two at or below 1/48 of a micro-batch's patches",
    )
    cuda_graph: bool = Field(
        False,
        description="on a GPU, with static_shapes: capture a micro-batch's forward and backward pass as one CUDA graph "
        "for each size that comes again; not with target_stream, nor with zero.stage 3",
    )
    max_skipped: Annotated[int, Field(ge=0)] = Field(
        10,
        description="steps in a row with a non-finite loss or gradient that are skipped before the run stops; "
        "looked at when a step is logged or a checkpoint is written",
    )
    rank_timeout_s: Annotated[float, Field(ge=1.0)] = Field(
        600.0, description="seconds without progress after which a rank counts as hung, and every rank ends"
    )

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        _require_ascending("ema", self.ema, 0.0, 1.0)
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas is {list(self.betas)}; each must be in [0, 1)")
        if min(self.weight_decay) < 0:
            raise ValueError(f"weight_decay is {list(self.weight_decay)}; each must be 0 or more")
        if self.static_multiple is not None and not self.static_shapes:
            raise ValueError(f"static_multiple is {self.static_multiple}, which needs static_shapes: true")
        if self.cuda_graph and not self.static_shapes:
            raise ValueError("cuda_graph needs static_shapes: true, since a graph is of one size")
        if self.cuda_graph and self.target_stream:
            raise ValueError("cuda_graph and target_stream exclude each other: a graph is captured on one stream")
        return self


class ZeroConfig(Section):
    """What DeepSpeed divides over the ranks: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters."""

    stage: Literal[0, 1, 2, 3] = Field(
        1, description="0 nothing is divided, 1 optimizer, 2 and gradients, 3 and parameters"
    )


class LogConfig(Section):
    """What is written while training."""

    every_steps: Count = Field(10, description="a line of metrics every so many steps")
    tensorboard: bool = Field(True, description="also write RUN/tensorboard")
    wandb: str | None = Field(None, description="also log to this project of Weights & Biases; default: none")
    prometheus_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None, description="also serve the newest record to Prometheus under this port, 0 a free one; default: none"
    )
    prometheus_host: str = Field("127.0.0.1", description="address that the port is opened on; default: this host only")
    straggler_ratio: Annotated[float, Field(gt=1.0)] = Field(
        1.25, description="a rank is named whose own time stays above this ratio of the median of the others'"
    )
    rank_me_floor: Probability = Field(
        0.05, description="warn of collapse when RankMe of the target falls under this share of the width"
    )


class CheckpointConfig(Section):
    """When the state is written, and how much of it is kept."""

    every_steps: Count = Field(1000, description="a checkpoint every so many steps, and at the end")
    keep_last: Count = Field(3, description="checkpoints kept; older ones are removed")
    keep_every: Count | None = Field(
        None, description="checkpoints whose step is a multiple of this are never removed; default: none"
    )


class EvalConfig(Section):
    """Evaluation while training."""

    every_steps: Count | None = Field(None, description="k-NN and MRR every so many steps; default: never")
    root: Place | None = Field(
        None, description="folder with train/ and test/ (or val/), or with a folder a class (docs/data.md)"
    )
    images: Count = Field(2000, description="most images used for k-NN while training, of each split")
    mrr_images: Count = Field(32, description="images whose banks are ranked while training")
    bank: Annotated[int, Field(ge=2)] = Field(
        256, description="actions, and so transformed targets, in a bank; of triplets: next frames"
    )
    horizon: Count = Field(8, description="steps of a roll-out, on triplets")


class Config(Section):
    """A run, whole."""

    model: ModelConfig = ModelConfig()
    actions: ActionsConfig = ActionsConfig()
    views: ViewsConfig = ViewsConfig()
    masks: MasksConfig = MasksConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    zero: ZeroConfig = ZeroConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        external = self.actions.is_external
        if self.masks.visible_blocks == self.masks.target_blocks and not external:
            raise ValueError(
                f"masks.visible_blocks is {self.masks.visible_blocks}; it must be below masks.target_blocks, but for "
                "external actions"
            )
        if self.views.sources_per_target > 1 and external:
            raise ValueError("views.sources_per_target must be 1 where actions.groups is [external]: a triplet has one")
        if self.data.source == "triplets" and not external:
            raise ValueError("data.source is triplets, so actions.groups must be [external]")
        if self.data.source == "folder" and external:
            raise ValueError("actions.groups is [external], so data.source must be triplets or auto")
        if self.model.predictor.kind == "mlp" and self.actions.groups != ("photometric",):
            raise ValueError(
                "model.predictor.kind mlp cannot look elsewhere than at a patch's own place: "
                "actions.groups must be [photometric], or use kind vit"
            )
        if self.train.activation_checkpointing and self.train.precision == "bf16" and self.zero.stage == 0:
            raise ValueError(
                "train.activation_checkpointing in bf16 needs zero.stage 1, 2 or 3: stage 0 rounds its fp32 "
                "weights for the forward pass only, and recomputation would read them unrounded"
            )
        if self.train.cuda_graph and self.model.attention in ("sdpa", "cudnn"):
            raise ValueError(
                f"train.cuda_graph needs packed attention: model.attention {self.model.attention} takes images of one "
                "length at a time, with other kernels for every batch; use auto"
            )
        for key in ("compile", "target_stream", "cuda_graph"):
            if getattr(self.train, key) and self.zero.stage == 3:
                raise ValueError(
                    f"train.{key} needs zero.stage 0, 1 or 2: stage 3 gathers parameters as each module's forward "
                    "begins, one module at a time"
                )
        if self.train.optimizer == "lamb" and self.zero.stage:
            raise ValueError(
                f"train.optimizer lamb scales by norms of whole tensors, which zero.stage {self.zero.stage} divides; "
                "use zero.stage 0, or adamw"
            )
        if self.data.wait_s >= self.train.rank_timeout_s:
            raise ValueError(
                f"data.wait_s is {self.data.wait_s:g}; it must be below train.rank_timeout_s "
                f"({self.train.rank_timeout_s:g}), or a rank that waits for its data counts as hung"
            )
        if self.eval.every_steps is not None and self.eval.root is None:
            raise ValueError("eval.every_steps is set and eval.root is not; name the folder to evaluate on")
        patches = self.model.grid**2
        if self.masks.min_context >= patches:
            raise ValueError(f"masks.min_context is {self.masks.min_context}; a view has only {patches} patches")
        return self

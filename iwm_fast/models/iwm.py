"""The image world model: context encoder, target encoder, conditioned predictor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast.config.schema import ModelConfig
from iwm_fast.models.blocks import Kept, layer_norm_rows, limit_workspace
from iwm_fast.models.cuda_stream import SideStream
from iwm_fast.models.fp8 import products_in_fp8
from iwm_fast.models.later_steps import LaterStep, fed_back
from iwm_fast.models.losses import ForwardPass
from iwm_fast.models.objective import objective_of, together
from iwm_fast.models.packing import Segments
from iwm_fast.models.predictors import MlpPredictor, VitPredictor, predict_all
from iwm_fast.models.vit import VisionTransformer

__all__ = ["IWM", "IWMOutput", "Losses"]

_RANK_ME_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class IWMOutput:
    """The result of one forward pass.

    loss: fp32 scalar, the sum of the objective's terms times their factors. terms: fp32, detached, for the log: () of
    the only term, or (T,) of several; read them before the next call. tokens: number of predicted tokens, on the host.
    target_features: (F, D), detached: F ≤ 2048 of the target encoder's predicted tokens, evenly spaced, before any
    normalisation for the loss. target_places: int64 (F,), image · patches + patch of each.
    """

    loss: Tensor
    terms: Tensor
    tokens: int
    target_features: Tensor
    target_places: Tensor


@dataclass(frozen=True, eq=False)
class Losses:
    """The terms of a batch's loss times their factors, and the input of the collapse metrics.

    target: (M, D), detached, the target encoder's tokens; rows: int64 (Nt,), the predicted ones, or None: all. places:
    int64 (Nt,), image · patches + patch of each prediction.
    """

    terms: tuple[Tensor, ...]
    target: Tensor
    rows: Tensor | None
    places: Tensor

    def output(self, predicted: int) -> IWMOutput:
        """Return the output of a batch whose first `predicted` predictions are no padding."""
        every = max(1, -(-predicted // _RANK_ME_TOKENS))
        if self.rows is None:
            features = self.target[:predicted:every].clone()
        else:
            features = self.target.index_select(0, self.rows[:predicted:every])
        return IWMOutput(*together(self.terms), predicted, features, self.places[:predicted:every].clone())


class IWM(nn.Module):
    """An image world model.

    encoder: of the source. target_encoder: of the target, an EMA or frozen, or None where the encoder itself encodes it
    (model.target: shared). predictor: the world model. predicts: the patches it predicts, "target" (those of the target
    blocks) or "context" (the source's own visible ones, the mlp predictor). objective: the loss. target_stream: where
    `forward` computes the target; by default the current stream. sum_over_ranks: sums a statistic of a term over all
    ranks, with gradient; by default the identity.

    The same torch seed gives the same initial weights, of encoder and predictor whatever the target. They may be cast
    to bf16 as a whole: inputs follow, and normalisation statistics, softmax and loss stay in fp32. The target encoder
    is never differentiated; the caller updates its EMA, and loads a frozen one. With model.freeze_encoder the encoder
    is not differentiated either, and the predictor alone is trained. With model.target_precision: fp8 the target's
    matmuls are in fp8 in training mode; in evaluation mode it computes in the model's own type.
    """

    def __init__(self, model: ModelConfig, action_dim: int, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        if action_dim < 1:
            raise ValueError(f"action_dim is {action_dim}; it must be at least 1")
        width, target_width = model.encoder_shape.width, model.target_architecture.shape.width
        predictor = model.predictor
        self.config = model
        self.action_dim = action_dim
        self.encoder = VisionTransformer(model.architecture, model.attention, activation_checkpointing)
        self.target_encoder = _target_encoder(model, self.encoder)
        if model.freeze_encoder:
            self.encoder.requires_grad_(False)
        if self.target_encoder is not None and model.target_precision == "fp8":
            products_in_fp8(self.target_encoder)
        self.objective = objective_of(model)
        self.target_stream = SideStream()
        self.sum_over_ranks: Callable[[Tensor], Tensor] = _alone
        self.predictor: VitPredictor | MlpPredictor
        self.predicts: Literal["target", "context"]
        if predictor.kind == "mlp":
            self.predicts = "context"
            self.predictor = MlpPredictor(
                predictor, width, action_dim, activation_checkpointing, target_width=target_width
            )
        else:
            self.predicts = "target"
            self.predictor = VitPredictor(
                predictor, width, model.grid, action_dim, model.attention, activation_checkpointing,
                target_width=target_width, history=model.history,
            )  # fmt: skip
        limit_workspace(self, model.mlp_workspace_mib * 2**20)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.predictor.proj.weight.dtype

    @property
    def constants(self) -> dict[str, nn.Parameter]:
        """The parameters that training never changes, by name: those of a frozen target and of a frozen encoder."""
        averaged = "target_encoder." if self.config.target == "ema" else None
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not parameter.requires_grad and not (averaged and name.startswith(averaged))
        }

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        action: Tensor,
        context: Tensor,
        context_segments: Segments,
        predicted: Tensor,
        predicted_segments: Segments,
        sampled: Sequence[Tensor] = (),
        loss_scale: float | Sequence[float] = 1.0,
        later: Sequence[LaterStep] = (),
        *,
        per_size: bool = False,
    ) -> IWMOutput | Losses:
        """Return the loss of a batch of B images with K sources each, of H frames (`model.history`).

        Args:
            source: uint8 (B · K · H, S, S, 3), the views x; those of an image are adjacent, and so are the frames of a
                view, the oldest first.
            target: uint8 (B, S, S, 3), the view y; encoded once for all K.
            action: (B · K, A), from source to target.
            context: int64 (Nc,), the source's visible patches, packed.
            context_segments: of the Nc patches, one segment per frame; may end with padding.
            predicted: int64 (Nt,), the target's patches to predict, packed; with the mlp predictor, the context's.
            predicted_segments: of the Nt patches, with as many segments of padding, whose tokens have no loss.
            sampled: random numbers of the step, one tensor per random term of the objective (`Objective.sample`).
            loss_scale: factor of the objective's terms, which are sums over this batch: one number per term
                (`Objective.factors`), or one for all.
            later: the steps after the first, whose source is the prediction fed back (`later_steps`). Then K is 1, all
                patches are to predict, and target and action have rows for all steps, step after step.
            per_size: return `Losses`, before anything is read that differs between batches of the same sizes.

        Raises:
            ValueError: shapes do not match, or the mlp predictor gets other patches than the context's.

        """
        self._check(source, target, action, context_segments, predicted, predicted_segments, later)
        sources, padding = len(action) // len(target), predicted_segments.padding
        if later:
            wanted = torch.arange(len(target) * self.encoder.patches, device=target.device)
        else:
            wanted = predicted_segments.pixels_of_token // sources * self.encoder.patches + predicted
        self.target_stream.follow()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoder):
            z_x = self.encoder(source, context, context_segments)
        # The target second, so that its refresh overlaps with the context.
        with self.target_stream.working():
            if later:
                z_y, index = self._encode_target(target), None  # all patches are predicted, in this order
            elif sources == 1:
                # The last block of the target encoder computes only the predicted tokens after its attention.
                z_y, index = self._encode_target(target, Kept(wanted, predicted_segments)), None
            else:
                z_y, index = self._encode_target(target), wanted  # most patches are predicted, many more than once
        action = action.to(self.dtype)
        if padding:
            action = F.pad(action, (0, 0, 0, padding))
        if isinstance(self.predictor, MlpPredictor):
            if predicted_segments.lengths != context_segments.lengths:
                raise ValueError(
                    "predicted must be the context's own patches: the mlp predictor maps each patch by itself"
                )
            prediction = self.predictor(z_x, context_segments, action)
        else:
            told = action[: predicted_segments.images] if later else action
            prediction = self.predictor(z_x, context, context_segments, predicted, predicted_segments, told)
            if later:
                prediction = fed_back(self.predictor, z_x, prediction, later, action)
                predicted_segments = Segments.uniform(len(target), self.encoder.patches, target.device)
        self.target_stream.give(z_y)
        rows = _with_loss(index, predicted_segments)
        names = [term.name for term in self.objective.random_terms]
        given = ForwardPass(
            z_x, context, context_segments, prediction, predicted_segments, z_y, rows,
            dict(zip(names, sampled, strict=True)), self.sum_over_ranks,
        )  # fmt: skip
        factors = (loss_scale,) * len(self.objective.terms) if isinstance(loss_scale, int | float) else loss_scale
        found = Losses(self.objective.values(given, factors), z_y, index, wanted)
        return found if per_size else found.output(predicted_segments.real)

    def encode(self, images: Tensor, which: Literal["target", "context"] = "context") -> Tensor:
        """Return the tokens of all patches of uint8 (B, S, S, 3): (B, L, D), of the named encoder's width."""
        if which not in ("target", "context"):
            raise ValueError(f"which is {which!r}; it must be target or context")
        if which == "target":
            return self._encode_target(images).unflatten(0, (-1, self.encoder.patches))
        return self.encoder(images).unflatten(0, (-1, self.encoder.patches))

    def targets(self, images: Tensor) -> Tensor:
        """Return the prediction targets (B, L, D), layer-normalised where configured (then fp32)."""
        z = self.encode(images, "target")
        return layer_norm_rows(z) if self.config.normalize_target else z

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        """Predict all patches of the target from all patches of the source.

        Args:
            z: (B, L, D) from `encode` by the context encoder; one image expanded over many actions is fine. With a
                history of H frames a window (B, H · L, D), from `window.encode_window`; one frame stands for all.
            action: (B, A).

        Returns:
            (B, L, D), of the target's width.

        """
        images, patches = z.shape[:2]
        every, history = self.encoder.patches, self.config.history
        if patches not in (every, every * history) or action.shape != (images, self.action_dim):
            window = f" or (B, {every * history}, {self.encoder.width})" if history > 1 else ""
            raise ValueError(
                f"z is {tuple(z.shape)} and action {tuple(action.shape)}; they must be (B, {every}, "
                f"{self.encoder.width}){window} and (B, {self.action_dim})"
            )
        return predict_all(self.predictor, z.to(self.dtype), action.to(self.dtype))

    @torch.no_grad()
    def _encode_target(self, images: Tensor, kept: Kept | None = None) -> Tensor:
        encoder = self.encoder if self.target_encoder is None else self.target_encoder
        return encoder(images, kept=kept)

    def _check(
        self,
        source: Tensor,
        target: Tensor,
        action: Tensor,
        seen: Segments,
        predicted: Tensor,
        segments: Segments,
        later: Sequence[LaterStep],
    ) -> None:
        history = self.config.history
        if later:
            more = sum(step.samples for step in later)
            if len(target) != len(action) or len(action) != segments.images + more:
                raise ValueError(
                    f"target has {len(target)} rows and action {len(action)}; with later steps both must have "
                    f"{segments.images} + {more}, one per step of each sample"
                )
            target, action = target[: segments.images], action[: segments.images]
        if source.shape[1:] != target.shape[1:] or not len(target) or len(source) % (len(target) * history):
            frames = f", in {history} frames each" if history > 1 else ""
            raise ValueError(
                f"target is {tuple(target.shape)}; its images must be of source's shape, {tuple(source.shape)}, and "
                f"divide them in number{frames}"
            )
        sources = len(source) // history
        if action.shape != (sources, self.action_dim):
            raise ValueError(f"action is {tuple(action.shape)}; it must be (B, A) = ({sources}, {self.action_dim})")
        if predicted.shape != (segments.total,) or segments.images != sources:
            raise ValueError(
                f"predicted_segments are of {segments.images} images and {segments.total} tokens; there are "
                f"{sources} images and predicted {tuple(predicted.shape)}"
            )
        if segments.padding != seen.padding:
            raise ValueError(
                f"predicted_segments have {segments.padding} segments of padding and context_segments {seen.padding}; "
                "they must have as many"
            )


def _target_encoder(model: ModelConfig, encoder: VisionTransformer) -> VisionTransformer | None:
    """The target encoder, without gradients; None where the encoder itself is the target."""
    if model.target == "shared":
        return None
    if model.target == "ema":
        return copy.deepcopy(encoder).requires_grad_(False)
    # Its weights are loaded: the random state stays that of the other targets, for the predictor.
    with torch.random.fork_rng(devices=[]):
        return VisionTransformer(model.target_architecture, model.attention).requires_grad_(False)


def _alone(x: Tensor) -> Tensor:
    """Return the sum over the only rank."""
    return x


def _with_loss(index: Tensor | None, predicted: Segments) -> Tensor | None:
    """The target's row of each prediction, -1 for padding; None: each its own."""
    if not predicted.padding:
        return index
    rows = torch.arange(predicted.total, device=predicted.device) if index is None else index
    return rows.masked_fill(predicted.image_of_token >= predicted.images, -1)

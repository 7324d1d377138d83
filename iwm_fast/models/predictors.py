"""World models: predict the target's tokens from the source's tokens and the action.

A source may have several frames (`history`). The encoder encodes each by itself; here they are one image of more
tokens, to which a learned vector per age is added: 0 for the newest frame. So a prediction, which is one frame too, can
take the newest frame's place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast import kernels
from iwm_fast.config.schema import PredictorConfig
from iwm_fast.kernels.predictor_input import mask_tokens
from iwm_fast.models.blocks import (
    Block,
    ConditionedMlp,
    Kept,
    LimitedMlp,
    Norm,
    initialise_linear,
    rescale_blocks,
    run_blocks,
    wants_groups,
)
from iwm_fast.models.exact_buffers import ExactBuffers
from iwm_fast.models.packing import Segments, interleave
from iwm_fast.models.positions import sincos_positions

__all__ = ["ActionTokens", "FeatureMixer", "MlpPredictor", "VitPredictor", "predict_all"]


class FeatureMixer(LimitedMlp):
    """`feature` conditioning: a three-layer MLP of [mask token; action], with W·[m; a] computed as W_m·m + W_a·a.

    The layers preserve their input's variance at initialisation (std 1/√fan-in): at the blocks' 0.02, three of them
    would shrink the positions, which mask tokens need, a thousandfold.
    """

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(width, width))
        self.w_action = nn.Parameter(torch.empty(width, actions))
        self.b_in = nn.Parameter(torch.zeros(width))
        self.w_out = nn.Parameter(torch.empty(width, width))
        self.b_out = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)
        for weight, fan_in in (
            (self.w_in, width + actions),
            (self.w_action, width + actions),
            (self.w_out, width),
            (self.out.weight, width),
        ):
            nn.init.trunc_normal_(weight, std=fan_in**-0.5)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, segments: Segments, action: Tensor) -> Tensor:
        """Map tokens (N, D) packed and action (B, A) to (N, D)."""
        hidden = kernels.conditioned_mlp(
            tokens,
            self.w_in,
            self.b_in,
            self.w_out,
            self.b_out,
            action=action,
            w_action=self.w_action,
            cu_seqlens=segments.cu_seqlens,
            workspace=self.workspace,
        )
        return self.out(F.gelu(hidden))


class ActionTokens(nn.Module):
    """`sequence` conditioning: one token per component of the action, each through its own linear layer."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(actions, width))
        self.bias = nn.Parameter(torch.empty(actions, width))
        # Initialised as nn.Linear with one input: the components must differ from the first step on.
        nn.init.uniform_(self.weight, -1.0, 1.0)
        nn.init.uniform_(self.bias, -1.0, 1.0)

    def forward(self, action: Tensor) -> Tensor:
        """Map action (B, A) to (B · A, D), packed."""
        return torch.addcmul(self.bias, action[:, :, None], self.weight).flatten(0, 1)


class VitPredictor(ExactBuffers):
    """Transformer over each image's context tokens and one mask token per patch to predict.

    history: frames of a source. time_embed: (history, Dp), added to a frame's tokens by its age; None for one frame.
    """

    pos_embed: Tensor
    time_embed: nn.Parameter | None

    def __init__(
        self,
        config: PredictorConfig,
        encoder_width: int,
        grid: int,
        actions: int,
        attention: str = "auto",
        activation_checkpointing: bool = False,
        *,
        target_width: int | None = None,
        history: int = 1,
    ) -> None:
        """``target_width``: of the target's tokens; default: the encoder's."""
        super().__init__()
        width = config.width
        self.history = history
        kinds = config.conditioning.split("+")
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.register_buffer("pos_embed", sincos_positions(width, grid), persistent=False)
        self.feature = FeatureMixer(width, actions) if "feature" in kinds else None
        self.sequence = ActionTokens(width, actions) if "sequence" in kinds else None
        in_blocks = actions if "block" in kinds else 0
        self.blocks = nn.ModuleList(
            Block(width, config.head_count, config.mlp_ratio, attention, in_blocks) for _ in range(config.depth)
        )
        self.norm = Norm(width)
        self.proj = nn.Linear(width, encoder_width if target_width is None else target_width)
        nn.init.trunc_normal_(self.mask_token, std=0.02)  # I-JEPA
        initialise_linear(self.embed)
        initialise_linear(self.proj)
        rescale_blocks(self.blocks)
        # Last, so that the other weights do not depend on it.
        ages = torch.empty(history, width)
        self.time_embed = nn.Parameter(nn.init.trunc_normal_(ages, std=0.02)) if history > 1 else None

    def forward(
        self,
        z: Tensor,
        context: Tensor,
        context_segments: Segments,
        predicted: Tensor,
        predicted_segments: Segments,
        action: Tensor,
        extra: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted tokens of the target.

        Args:
            z: (Nc, De), the source's encoded patches, packed.
            context: int64 (Nc,), their patches on the source's grid.
            context_segments: of the Nc tokens, one segment per frame; the `history` frames of a source are adjacent,
                the oldest first.
            predicted: int64 (Nt,), the patches to predict, on the target's grid.
            predicted_segments: of the Nt tokens.
            action: (B, A), from the source to the target.
            extra: (Dp,), one more token per image that all others attend to: a task's, say.

        Returns:
            (Nt, D), of the target's width, packed in the order of `predicted`.

        """
        position, frames = self.pos_embed.to(z.dtype), context_segments
        context_segments = frames.joined(self.history)
        parts = [context_segments, predicted_segments]
        tokens = []
        if self.feature is not None:
            masked = mask_tokens(self.mask_token, position, predicted)
            tokens.append(self.feature(masked, predicted_segments, action))
        if self.sequence is not None:
            tokens.append(self.sequence(action))
            parts.append(Segments.uniform(len(action), action.shape[1], z.device))
        if extra is not None:
            tokens.append(extra.expand(len(action), -1))
            parts.append(Segments.uniform(len(action), 1, z.device))
        joined, places = interleave(parts)
        place, ordered_action = torch.cat(places), action
        # For attention with one call per length: concatenated in that order, blocks move no tokens.
        if not joined.is_sorted and wants_groups(self.blocks, joined):
            by_length = joined.by_length
            place = by_length.token_rank[place]
            joined, ordered_action = by_length.segments, action.index_select(0, by_length.image_order)
        rows = place[context_segments.total : context_segments.total + predicted_segments.total]
        x = run_blocks(
            self.blocks,
            kernels.predictor_input(
                self._embedded(z, frames),
                context,
                position,
                place,
                mask_token=self.mask_token if self.feature is None else None,
                predicted_patches=predicted if self.feature is None else None,
                rows=torch.cat(tokens) if len(tokens) > 1 else next(iter(tokens), None),
            ),
            joined,
            ordered_action,
            kept=Kept(rows, predicted_segments, action),
            recompute=self.activation_checkpointing,
        )
        return self.finish(x)

    def _embedded(self, z: Tensor, frames: Segments) -> Tensor:
        """The source's tokens at the predictor's width, with the vector of their frame's age."""
        if self.time_embed is None:
            return self.embed(z)
        age = self.history - 1 - frames.image_of_token % self.history
        # Its gradient is an ordered sum, where index_select's would add by atomics.
        return self.embed(z) + F.embedding(age, self.time_embed.to(z.dtype))

    def finish(self, x: Tensor) -> Tensor:
        """Map the blocks' (Nt, Dp) to the target's width."""
        return self.proj(self.norm(x))


class MlpPredictor(nn.Module):
    """Residual MLP blocks on each visible token alone, conditioned on the action in every block.

    It predicts the target at the source's own visible patches.
    """

    def __init__(
        self,
        config: PredictorConfig,
        encoder_width: int,
        actions: int,
        activation_checkpointing: bool = False,
        *,
        target_width: int | None = None,
    ) -> None:
        """``target_width``: of the target's tokens; default: the encoder's."""
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        in_blocks = 0 if config.conditioning == "none" else actions
        self.embed = nn.Linear(encoder_width, config.width)
        self.blocks = nn.ModuleList(
            ConditionedMlp(config.width, round(config.width * config.mlp_ratio), in_blocks) for _ in range(config.depth)
        )
        self.norm = Norm(config.width)
        self.proj = nn.Linear(config.width, encoder_width if target_width is None else target_width)
        initialise_linear(self.embed)
        initialise_linear(self.proj)
        rescale_blocks(self.blocks)

    def forward(self, z: Tensor, segments: Segments, action: Tensor) -> Tensor:
        """Map z (N, De) packed and action (B, A) to (N, D), of the target's width."""
        blocks, x = self.blocks, self.embed(z)
        return self.finish(run_blocks(blocks, x, segments.cu_seqlens, action, recompute=self.activation_checkpointing))

    def finish(self, x: Tensor) -> Tensor:
        """Map the blocks' (N, Dp) to the target's width."""
        return self.proj(self.norm(x))


def predict_all(
    predictor: VitPredictor | MlpPredictor, z: Tensor, action: Tensor, extra: Tensor | None = None
) -> Tensor:
    """Predict all patches of the target from all patches of the source: z (B, H · L, De), action (B, A) → (B, L, D),
    of the target's width.

    H: the predictor's frames, the oldest first. z of one frame, (B, L, De), stands for all of them, as at an episode's
    beginning. ``extra``: see `VitPredictor.forward`; ValueError with the mlp predictor, whose tokens do not attend to
    each other.
    """
    images, patches, history = *z.shape[:2], 1
    if isinstance(predictor, VitPredictor) and predictor.history > 1:
        history, every = predictor.history, len(predictor.pos_embed)
        if patches == every:
            z = z.repeat(1, history, 1)
        patches = every
    packed = z.flatten(0, 1)
    segments = Segments.uniform(images, patches, z.device)
    if isinstance(predictor, MlpPredictor):
        if extra is not None:
            raise ValueError("extra is given and the predictor is mlp, whose tokens do not see each other")
        prediction = predictor(packed, segments, action)
    else:
        everywhere = torch.arange(patches, device=z.device).repeat(images)
        frames = Segments.uniform(images * history, patches, z.device)
        context = everywhere.repeat(history) if history > 1 else everywhere
        prediction = predictor(packed, context, frames, everywhere, segments, action, extra)
    return prediction.unflatten(0, (images, patches))

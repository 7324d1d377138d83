"""Bytes of saved activations, by part, from the packed token counts.

A block of width D saves for each token its input, the normalised input, q, k, v, the attention's result and the MLP's
input: 7·D elements, and one fp32 log-sum-exp per head. The kernels recompute the MLP's hidden activations, about 4·D,
and the normalisations' statistics; PyTorch's operators on the CPU save them, with the hidden activations' GELU and the
MLP's normalised input (`hidden_kept`). With activation checkpointing a block saves its input alone, and one block at a
time is recomputed. Prefix tokens end with the encoder's last attention; their places, and the patches that rope rotates
by, are saved once. A tensor that two parts save counts with the first: a block's result with what follows it.

While a block runs, its MLP's kernels hold the hidden activations of one call: one tensor (N, 4·D) in the forward pass,
two in the backward pass, as far as they fit into model.mlp_workspace_mib, beside slices of the weight gradients
(`mlp_workspace`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from iwm_fast.actions.external import action_dim
from iwm_fast.config import Config
from iwm_fast.cost.flops import window_tokens
from iwm_fast.cost.tokens import Tokens
from iwm_fast.kernels import mlp_workspace

__all__ = ["Activations", "KeptBytes", "Moment", "activations"]

_STATISTICS = 8  # bytes per token: mean and reciprocal std in fp32
_INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class KeptBytes:
    """Bytes of saved activations, by part in the order of the forward pass.

    patch_embedding: pixels. encoder_end: the last normalisation. predictor_input: the encoder's result, and mask tokens
    conditioned on the action. predictor_blocks: and the tokens' positions. predictor_end: the last normalisation, and
    its result.
    """

    patch_embedding: int
    encoder_blocks: int
    encoder_end: int
    predictor_input: int
    predictor_blocks: int
    predictor_end: int
    loss: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Moment:
    """A running block. tensors: its own bytes, for `tokens` tokens; its MLP's hidden activations, up to `workspace`, on
    top.
    """

    tensors: int
    tokens: int
    width: int
    hidden: int
    element: int
    workspace: int
    backward: bool
    image: bool = False

    def size(self, images: int, drawn: int) -> int:
        """Return bytes for `images` images, where the tokens are those of `drawn`."""
        held = mlp_workspace(
            self.tokens * images // drawn, self.width, self.hidden, self.element, backward=self.backward,
            image=self.image, workspace=self.workspace,
        )  # fmt: skip
        return self.tensors * images // drawn + held


@dataclass(frozen=True)
class Activations:
    """parts: saved activations. moments: what a step needs one of beside them."""

    parts: KeptBytes
    moments: tuple[Moment, ...]
    images: int

    def passing(self, images: int) -> int:
        """Return the most bytes that a step of `images` images needs for moments beside the saved activations."""
        return max(moment.size(images, self.images) for moment in self.moments)

    @property
    def kept(self) -> int:
        """Return the bytes of all parts."""
        return self.parts.total


@dataclass(frozen=True)
class _Form:
    element: int
    hidden_kept: bool

    def norm(self, tokens: int, width: int) -> int:
        return tokens * (width * self.element + _STATISTICS)

    def mlp(self, tokens: int, hidden: int) -> int:
        """Return what `conditioned_mlp` saves beside its input."""
        return tokens * 2 * hidden * self.element if self.hidden_kept else 0

    def block(self, tokens: int, width: int, heads: int, hidden: int, kept: int | None = None) -> int:
        """Return what a transformer block saves; after its attention it computes only the `kept` tokens, copied out."""
        attention = tokens * (6 * width * self.element + 4 * heads)
        attention += tokens * _STATISTICS if self.hidden_kept else 0
        if kept is None:
            kept = tokens
        else:
            attention += kept * width * self.element
        into_mlp = self.norm(kept, width) if self.hidden_kept else 0
        return attention + into_mlp + kept * width * self.element + self.mlp(kept, hidden)


def activations(config: Config, tokens: Tokens, *, hidden_kept: bool = False) -> Activations:
    """Return the activations of one micro-batch whose images have these token counts."""
    form = _Form(2 if config.train.precision == "bf16" else 4, hidden_kept)
    shape, target = config.model.encoder_shape, config.model.target_architecture.shape
    e, recompute, frozen = form.element, config.train.activation_checkpointing, config.model.freeze_encoder
    seen, asked = tokens.seen, tokens.asked
    hidden, limit = round(shape.width * shape.mlp_ratio), config.model.mlp_workspace_mib * 2**20
    joined = seen + len(tokens.context) * tokens.history * config.model.prefix_tokens
    encoder_block = form.block(joined, shape.width, shape.heads, hidden)
    last_block = form.block(joined, shape.width, shape.heads, hidden, seen if joined > seen else None)
    encoder_blocks = (shape.depth - 1) * encoder_block + last_block
    if recompute:
        encoder_blocks = shape.depth * joined * shape.width * e
    predictor_input, predictor_blocks, predictor_moment = _predictor(config, form, tokens)
    parts = KeptBytes(
        # A frozen encoder saves nothing; its result is the predictor's.
        patch_embedding=0 if frozen else seen * 3 * config.model.patch**2 * e,
        encoder_blocks=0 if frozen else encoder_blocks + _places(config, seen, joined),
        encoder_end=0 if frozen else form.norm(seen, shape.width),
        predictor_input=seen * shape.width * e + predictor_input,
        predictor_blocks=predictor_blocks,
        predictor_end=form.norm(asked, config.model.predictor.width) + asked * config.model.predictor.width * e,
        loss=_loss(config, form, tokens) + _regularizer(config, form, seen) + _fed_back(config, tokens),
    )
    # The backward pass of a block holds about as much again as it saved: the gradients of the same tensors. The
    # target's forward pass saves nothing, but a block's tensors of all patches exist at once.
    whole = tokens.images * tokens.horizon * (config.model.grid**2 + config.model.target_architecture.prefix_tokens)
    target_hidden = round(target.width * target.mlp_ratio)
    target_block = form.block(whole, target.width, target.heads, target_hidden)
    moments = (
        Moment(encoder_block, joined, shape.width, hidden, e, limit, backward=not frozen),
        predictor_moment,
        Moment(target_block, whole, target.width, target_hidden, e, limit, backward=False),
    )
    return Activations(parts, moments, tokens.images)


def _places(config: Config, seen: int, joined: int) -> int:
    """Bytes of indices: the packed tokens' places, the patches of learned positions, and rope's with its table."""
    model, table = config.model, 0
    indices = joined if joined > seen else 0
    if model.positions == "learned":
        indices += seen
    elif model.positions == "rope" and not config.train.activation_checkpointing:
        indices += joined
        table = model.grid**2 * model.encoder_shape.width // model.encoder_shape.heads
    return indices * _INDEX + 4 * table


def _loss(config: Config, form: _Form, tokens: Tokens) -> int:
    """The plain loss saves the difference; the kernel saves the prediction, the gradient that it wrote, and the target.

    With one source the target's predicted tokens; with several all of its tokens, and the row of each prediction.
    """
    row, asked = config.model.target_architecture.shape.width * form.element, tokens.asked
    if form.hidden_kept:
        return asked * row
    if tokens.sources == 1:
        return 3 * asked * row
    return 2 * asked * row + tokens.images * config.model.grid**2 * row + asked * _INDEX


def _fed_back(config: Config, tokens: Tokens) -> int:
    """The rows of predictions and source that later steps read."""
    later = range(1, tokens.horizon)
    return _INDEX * sum(int(window_tokens(config.model, tokens.context, step).sum()) for step in later)


def _regularizer(config: Config, form: _Form, seen: int) -> int:
    """SIGReg saves the fp32 projections of the visible tokens, their directions, and five tensors of means per knot;
    VICReg the tokens in fp32, and four of covariances. Of pooled features there is a row per image: nothing beside.
    """
    options, width = config.model.regularizer, config.model.encoder_shape.width
    if options.kind == "none" or options.on == "pooled":
        return 0
    if options.kind == "sigreg":
        return 4 * options.directions * (seen + width + 5 * (options.knots - 1))
    own = 0 if form.element == 4 else 4 * seen * width  # in fp32 they are the encoder's
    return own + 16 * width**2


def _predictor(config: Config, form: _Form, tokens: Tokens) -> tuple[int, int, Moment]:
    """Bytes of the conditioned mask tokens and later sources, of all blocks, and one running block."""
    into = blocks = 0
    moments = []
    for step in range(tokens.horizon):
        seen = int(window_tokens(config.model, tokens.context, step).sum())
        more, kept, moment = _predictor_step(config, form, tokens, seen)
        into += more + (seen * config.model.encoder_shape.width * form.element if step else 0)
        # The kernels save the patches to predict, which a later step makes itself.
        blocks += kept + (int(tokens.predicted.sum()) * _INDEX if step and not form.hidden_kept else 0)
        moments.append(moment)
    return into, blocks, max(moments, key=lambda moment: moment.tensors)


def _predictor_step(config: Config, form: _Form, tokens: Tokens, seen: int) -> tuple[int, int, Moment]:
    """The same of one step, whose sources have `seen` tokens."""
    predictor, e = config.model.predictor, form.element
    width, hidden = predictor.width, round(predictor.width * predictor.mlp_ratio)
    asked = int(tokens.predicted.sum())
    recompute, limit = config.train.activation_checkpointing, config.model.mlp_workspace_mib * 2**20
    kinds = predictor.conditioning.split("+")
    if predictor.kind == "mlp":
        block = (form.norm(seen, width) if form.hidden_kept else 0) + seen * width * e + form.mlp(seen, hidden)
        moment = Moment(block, seen, width, hidden, e, limit, backward=True, image="block" in kinds)
        return 0, predictor.depth * (seen * width * e if recompute else block), moment
    actions = action_dim(config.actions)
    joined = seen + asked + (len(tokens.context) * actions if "sequence" in kinds else 0)
    block = form.block(joined, width, predictor.head_count, hidden)
    last = form.block(joined, width, predictor.head_count, hidden, asked)
    blocks = predictor.depth * joined * width * e if recompute else (predictor.depth - 1) * block + last
    places = joined * _INDEX
    if tokens.history > 1:  # the age of each token
        places += seen * _INDEX
    moment = Moment(block, joined, width, hidden, e, limit, backward=True, image="block" in kinds)
    if "feature" in kinds:
        return 3 * asked * width * e + form.mlp(asked, width), blocks + places, moment
    return 0, blocks + places, moment

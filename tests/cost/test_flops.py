"""The FLOP count against torch's own counter and against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from iwm_fast.config.schema import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.config.sections.model import TargetEncoderConfig
from iwm_fast.cost.flops import StepFlops, step_flops
from iwm_fast.models import IWM, Segments
from iwm_fast.models.later_steps import every_patch, later_steps
from iwm_fast.models.packing import pack

ACTIONS = 3
CASES = [("vit", c) for c in ("none", "sequence", "feature", "block", "sequence+block", "feature+block")]
CASES += [("mlp", "block"), ("mlp", "none")]


def configure(kind: str, conditioning: str, **frozen: object) -> ModelConfig:
    return ModelConfig(
        encoder=EncoderShape(depth=2, width=16, heads=2),
        **frozen,  # type: ignore[arg-type]
        patch=4,
        image=12,
        predictor=PredictorConfig(
            kind=kind,  # type: ignore[arg-type]
            depth=2,
            width=12,
            heads=3,
            mlp_ratio=1.5,
            conditioning=conditioning,  # type: ignore[arg-type]
        ),
    )


@pytest.mark.parametrize("positions", ["sincos", "learned", "rope"])
@pytest.mark.parametrize("prefix", [0, 3])
def test_prefix_tokens_and_positions_equal_what_torch_counts(prefix: int, positions: str) -> None:
    _compare_with_torch(configure("vit", "block", prefix_tokens=prefix, positions=positions))


@pytest.mark.parametrize(("kind", "conditioning"), CASES, ids=[f"{k} {c}" for k, c in CASES])
def test_equals_what_torch_counts(kind: str, conditioning: str) -> None:
    _compare_with_torch(configure(kind, conditioning))


@pytest.mark.parametrize("prefix", [0, 2])
def test_a_history_equals_what_torch_counts(prefix: int) -> None:
    _compare_with_torch(configure("vit", "sequence+block", prefix_tokens=prefix, history=3))


@pytest.mark.parametrize(("history", "frozen"), [(1, False), (3, False), (1, True)])
def test_several_steps_equal_what_torch_counts(history: int, frozen: bool) -> None:
    """Samples of three, one and two steps; what is fed back has a gradient, also where the encoder is frozen."""
    more = FROZEN["encoder"] if frozen else {}
    config = configure("vit", "feature+block", history=history, **more)
    model, seen, steps = IWM(config, ACTIONS), [4, 2, 4], np.array([3, 1, 2])
    lengths = np.repeat(seen, history)
    context = np.concatenate([np.arange(n) for n in lengths])
    later = later_steps(context, lengths, steps, 3, 9)
    images = torch.zeros(3 * history, 12, 12, 3, dtype=torch.uint8)
    targets, actions = torch.zeros(6, 12, 12, 3, dtype=torch.uint8), torch.ones(6, ACTIONS)
    ours = step_flops(config, ACTIONS, seen, [9] * 3, steps=steps)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        out = model(images, targets, actions, *pack(context, lengths), *every_patch(3, 9, "cpu"), (), 1.0, later)
        forward = counter.get_total_flops()
        out.loss.backward()
    assert forward == ours.target_forward + ours.context_forward + ours.predictor_forward
    assert counter.get_total_flops() == ours.total


def counted(config: ModelConfig) -> tuple[StepFlops, int, FlopCounterMode]:
    """Return FLOPs of a step by formula, those of its forward pass as torch counts them, and torch's counter of all."""
    model = IWM(config, ACTIONS)
    seen = [4, 2, 4]
    asked = seen if config.predictor.kind == "mlp" else [3, 5, 1]
    rows = [torch.cat([torch.arange(n) for n in counts]) for counts in (seen, asked)]
    segments = [Segments.from_lengths(counts) for counts in (seen, asked)]
    rows[0] = torch.cat([torch.arange(n) for n in seen for _ in range(config.history)])
    segments[0] = Segments.from_lengths([n for n in seen for _ in range(config.history)])
    images = torch.zeros(3, 12, 12, 3, dtype=torch.uint8)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        out = model(
            images.repeat(config.history, 1, 1, 1),
            images,
            torch.ones(3, ACTIONS),
            rows[0],
            segments[0],
            rows[1],
            segments[1],
        )
        forward = counter.get_total_flops()
        out.loss.backward()
    return step_flops(config, ACTIONS, seen, asked), forward, counter


def _compare_with_torch(config: ModelConfig) -> None:
    """Attention as plain matmuls (torch counts none in the CPU's fused one), on packed, ragged lengths.

    The forward count is exact part by part. In the backward pass torch's count may differ only in attention, whose
    gradients it does not know; here attention is matmuls, so the whole is exact too.
    """
    ours, forward, counter = counted(config)
    counts = counter.get_flop_counts()
    assert sum(counts["IWM.target_encoder"].values()) == ours.target_forward
    assert forward == ours.target_forward + ours.context_forward + ours.predictor_forward
    assert counter.get_total_flops() == ours.total


WIDE = TargetEncoderConfig(encoder=EncoderShape(depth=1, width=24, heads=3, mlp_ratio=2.0))
FROZEN = {
    "target": {"target": "frozen", "target_init": "w", "target_encoder": WIDE},
    "encoder": {"freeze_encoder": True, "init": "w", "target": "shared"},
    "both": {"freeze_encoder": True, "init": "w", "target": "frozen", "target_init": "w", "target_encoder": WIDE},
}


@pytest.mark.parametrize("kind", ["vit", "mlp"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parts_have_no_backward_pass(kind: str, frozen: str) -> None:
    config = configure(kind, "block", **FROZEN[frozen])
    ours, forward, counter = counted(config)
    assert forward == ours.target_forward + ours.context_forward + ours.predictor_forward
    assert (ours.context_backward == 0) is (frozen != "target")
    assert counter.get_total_flops() == ours.total


@pytest.mark.parametrize(("kind", "conditioning"), [("vit", "feature"), ("mlp", "block")])
def test_a_target_of_several_sources_is_counted_once(kind: str, conditioning: str) -> None:
    config = configure(kind, conditioning)
    model = IWM(config, ACTIONS)
    seen = [4, 2, 4, 3]
    asked = seen if kind == "mlp" else [3, 5, 1, 4]
    rows = [torch.cat([torch.arange(n) for n in counts]) for counts in (seen, asked)]
    segments = [Segments.from_lengths(counts) for counts in (seen, asked)]
    images = torch.zeros(4, 12, 12, 3, dtype=torch.uint8)
    ours = step_flops(config, ACTIONS, seen, asked, sources=2)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(images, images[:2], torch.ones(4, ACTIONS), rows[0], segments[0], rows[1], segments[1])
    assert sum(counter.get_flop_counts()["IWM.target_encoder"].values()) == ours.target_forward
    assert counter.get_total_flops() == ours.target_forward + ours.context_forward + ours.predictor_forward
    with pytest.raises(ValueError, match="multiple of sources"):
        step_flops(config, ACTIONS, seen, asked, sources=3)


def test_by_hand() -> None:
    """One image of 9 patches, 4 visible and 2 predicted; widths 16 and 12, one block each."""
    config = ModelConfig(
        encoder=EncoderShape(depth=1, width=16, heads=2),
        patch=4,
        image=12,
        predictor=PredictorConfig(depth=1, width=12, heads=3, conditioning="feature"),
    )
    count = step_flops(config, ACTIONS, [4], [2])

    def encoder(tokens: int, kept: int) -> tuple[int, int]:
        projections, mlp = (6 * tokens + 2 * kept) * 16 * 16, kept * 16 * 16 * 16
        return 2 * tokens * 48 * 16, projections + 4 * tokens * tokens * 16 + mlp

    assert count.target_forward == sum(encoder(9, 2))
    first, inner = encoder(4, 4)
    assert (count.context_forward, count.context_backward) == (first + inner, first + 2 * inner)
    action = 2 * 12 * ACTIONS
    inner = 2 * 4 * 16 * 12  # into the predictor's width
    inner += 3 * 2 * 2 * 12 * 12  # the mask tokens' three layers
    inner += (6 * 6 + 2 * 2) * 12 * 12 + 4 * 6 * 6 * 12  # attention over 6 tokens, and the projection of 2
    inner += 2 * 16 * 12 * 12  # MLP of the two predicted tokens
    inner += 2 * 2 * 12 * 16  # back to the encoder's width
    assert (count.predictor_forward, count.predictor_backward) == (inner + action, 2 * inner + action)


def test_another_image_adds_its_own_flops_and_packing_none() -> None:
    config = configure("vit", "feature")
    one, other = step_flops(config, ACTIONS, [4], [3]), step_flops(config, ACTIONS, [7], [1])
    assert step_flops(config, ACTIONS, [4, 7], [3, 1]).total == one.total + other.total


def test_unequal_images_are_refused() -> None:
    with pytest.raises(ValueError, match="predicted_lengths has shape"):
        step_flops(configure("vit", "none"), ACTIONS, [4, 4], [3])

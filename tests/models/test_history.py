"""A history of frames: the packed model against an independent float64 forward, and windows that slide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import nine_patches

from iwm_fast.models import IWM, Segments
from iwm_fast.models.packing import pack
from iwm_fast.models.window import encode_window, roll_out, slide

ACTIONS = 3


VARIANTS = {
    "feature": nine_patches("feature", history=2),
    "sequence+block": nine_patches("sequence+block", history=3),
    "prefix tokens, shared target": nine_patches("block", history=2, prefix_tokens=2, target="shared"),
}


def of_lists(patches: list[list[int]], frames: int = 1, **more: Any) -> tuple[Tensor, Segments]:
    rows = [image for image in patches for _ in range(frames)]
    flat = torch.tensor([p for image in rows for p in image], dtype=torch.int64).numpy()
    return pack(flat, torch.tensor([len(image) for image in rows]).numpy(), **more)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_every_gradient(plain: SimpleNamespace, config: Any, recompute: bool) -> None:
    """Each frame is encoded by itself; the predictor reads all of them, each with the vector of its age."""
    history = config.history
    model = plain.exact_model(config, ACTIONS, activation_checkpointing=recompute)
    batch = plain.draw_batch(config, ACTIONS, [5, 1, 0, 6], [2, 4, 3, 2])
    generator = torch.Generator().manual_seed(4)
    frames = torch.randint(0, 256, (4, history, 12, 12, 3), generator=generator, dtype=torch.uint8)
    context, seen = of_lists(batch.context, history)
    asked, queried = of_lists(batch.predicted)
    found = model(frames.flatten(0, 1), batch.target, batch.action, context, seen, asked, queried)
    encoder = model.encoder
    target = encoder if model.target_encoder is None else model.target_encoder
    world = plain.as_timm(dict(model.named_parameters()), "predictor.")
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        kept, own = batch.context[i], batch.predicted[i]
        parts = [plain.dense_encoder(encoder, frame, kept)[config.prefix_tokens :] for frame in frames[i]]
        ages = [age for age in reversed(range(history)) for _ in kept]
        got = plain.predictor(
            world, torch.cat(parts), kept * history, own, batch.action[i], config.predictor.head_count, 3, ages
        )
        wanted = plain.norm(
            plain.dense_encoder(target, batch.target[i], list(range(9))).detach()[config.prefix_tokens :][own]
        )
        expected = expected + ((got - wanted) ** 2).sum()
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(found.loss, list(trained.values()), retain_graph=True)
    theirs = torch.autograd.grad(expected, list(trained.values()))
    for name, one, other in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()), msg=name)


def test_padding_has_no_loss_and_no_gradient(plain: SimpleNamespace) -> None:
    model = plain.exact_model(nine_patches("feature+block", history=2), ACTIONS)
    batch = plain.draw_batch(model.config, ACTIONS, [5, 1, 4], [2, 4, 3])
    frames = batch.source.repeat_interleave(2, dim=0)

    def found(*padding: int) -> tuple[Tensor, Tensor]:
        more: dict[str, Any] = {"padding": padding, "ceiling": 9} if padding else {}
        seen, asked = of_lists(batch.context, 2, **more), of_lists(batch.predicted, **more)
        model.zero_grad()
        loss = model(frames, batch.target, batch.action, *seen, *asked).loss
        loss.backward()
        return loss.detach(), model.predictor.time_embed.grad.clone()

    for one, other in zip(found(3, 2), found(), strict=True):
        torch.testing.assert_close(one, other)


def test_the_other_weights_are_those_without_a_history() -> None:
    torch.manual_seed(3)
    alone = IWM(nine_patches("sequence+block"), ACTIONS).state_dict()
    torch.manual_seed(3)
    several = IWM(nine_patches("sequence+block", history=3), ACTIONS).state_dict()
    assert several.keys() - alone.keys() == {"predictor.time_embed"}
    assert several["predictor.time_embed"].shape == (3, 12)
    assert all(torch.equal(several[name], value) for name, value in alone.items())


def test_a_window_slides_and_one_frame_stands_for_all(plain: SimpleNamespace) -> None:
    model = plain.exact_model(nine_patches("feature", history=3), ACTIONS).eval()
    generator = torch.Generator().manual_seed(5)
    frames = torch.randint(0, 256, (2, 3, 12, 12, 3), generator=generator, dtype=torch.uint8)
    actions = torch.randn(2, 4, ACTIONS, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        z = encode_window(model, frames)
        torch.testing.assert_close(z, torch.cat([model.encode(f) for f in frames.unbind(1)], dim=1))
        one = model.predict(z, actions[:, 0])
        two = model.predict(torch.cat([z[:, 9:], one], dim=1), actions[:, 1])
        three = model.predict(torch.cat([z[:, 18:], one, two], dim=1), actions[:, 2])
        four = model.predict(torch.cat([one, two, three], dim=1), actions[:, 3])
        torch.testing.assert_close(roll_out(model, z, actions), torch.stack([one, two, three, four], dim=1))
        same = frames[:, :1].expand(-1, 3, -1, -1, -1)
        alone = model.encode(frames[:, 0])
        torch.testing.assert_close(
            model.predict(alone, actions[:, 0]), model.predict(encode_window(model, same), actions[:, 0])
        )
        other = model.predict(encode_window(model, frames.flip(1)), actions[:, 0])
    assert (other - one).abs().max() > 1e-3  # the order of the frames is seen
    with pytest.raises(ValueError, match=r"they must be \(B, 9, 16\) or \(B, 27, 16\)"):
        model.predict(z[:, :18], actions[:, 0])


def test_sliding_drops_the_oldest_frame() -> None:
    z = torch.arange(12.0).view(1, 6, 2)
    assert slide(z, -torch.ones(1, 2, 2)).tolist() == [[*z[0, 2:].tolist(), [-1, -1], [-1, -1]]]
    assert slide(z[:, :2], torch.zeros(1, 2, 2)).tolist() == [[[0, 0], [0, 0]]]  # one frame: the prediction alone

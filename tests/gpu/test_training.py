"""The whole pipeline on a GPU against the same on the CPU."""

import contextlib
import dataclasses

import pytest
import reference_views
import torch
from small_run import losses, metrics, small_config

from iwm_fast.actions.transforms import Views
from iwm_fast.config import ActionsConfig
from iwm_fast.data.decode.encoded import inspect
from iwm_fast.data.image_list import list_images
from iwm_fast.data.views.graph import ViewGraph
from iwm_fast.data.views.sampling import draw_views
from iwm_fast.engine import pretrain
from iwm_fast.engine import step as loop
from iwm_fast.models.attention import packed_attention, packed_qkv_attention
from iwm_fast.models.packing import Segments


@pytest.mark.parametrize(
    ("stage", "optimizer"), [(0, "adamw"), (1, "adamw"), (2, "adamw"), (3, "adamw"), (0, "lamb"), (0, "muon")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_a_gpu_runs_at_every_stage_and_precision(tiny_images, tmp_path, stage, optimizer, precision):
    changes = {"train__precision": precision, "train__optimizer": optimizer, "zero__stage": stage}
    config = small_config(tiny_images, train__steps=6, data__device="gpu", **changes)
    pretrain(config, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    assert metrics(tmp_path / "run")[-1]["memory_bytes"] == torch.cuda.max_memory_allocated()


def test_forward_backward_and_the_ema_never_wait_for_the_gpu(tiny_images, tmp_path, monkeypatch):
    """CUDA's debug mode raises at host synchronisations; tests/engine/test_no_waiting.py counts them on the CPU."""
    train_step, never = loop.Trainer.train_step, {"forward", "backward", "ema"}

    class Strict(loop.Spans):
        @contextlib.contextmanager
        def __call__(self, part):
            with super().__call__(part):
                torch.cuda.set_sync_debug_mode("error" if part in never else "default")
                try:
                    yield
                finally:
                    torch.cuda.set_sync_debug_mode("default")

    def step(trainer):
        if trainer.step >= 3:  # warmed up
            trainer.new_spans = Strict
        return train_step(trainer)

    monkeypatch.setattr(loop.Trainer, "train_step", step)
    config = small_config(tiny_images, train__steps=6, train__precision="bf16", log__every_steps=6, data__device="gpu")
    pretrain(config, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 2


def test_gpu_and_cpu_make_the_same_views(tiny_images):
    """nvJPEG and libjpeg-turbo round differently: views are exact to two levels in the mean."""
    images = list_images(tiny_images)
    encoded = [inspect(images.read(i), 10**8) for i in range(8)]
    size = torch.tensor([(e.width, e.height) for e in encoded]).numpy()
    ids = torch.arange(8).numpy()
    views: Views = draw_views(ActionsConfig(), 0, ids * 0, ids, size)
    on = {d: ViewGraph(32, 8, d, 2, geometric=False, max_pixels=10**8).run(encoded, views) for d in ("cpu", "gpu")}
    for view in ("source", "target"):
        difference = getattr(on["gpu"], view).cpu().float() - getattr(on["cpu"], view).float()
        assert difference.abs().mean() <= 2.0


def test_a_gpu_compresses_as_the_formula_without_interpolation_of_chroma(tiny_images):
    images = list_images(tiny_images)
    encoded = [inspect(images.read(i), 10**8) for i in range(8)]
    size = torch.tensor([(e.width, e.height) for e in encoded]).numpy()
    ids = torch.arange(8).numpy()
    quality = {"compression_probability": 1.0, "compression_quality": (1, 100)}
    views = draw_views(ActionsConfig(groups=("photometric", "compression"), **quality), 0, ids * 0, ids, size)
    graph = ViewGraph(40, 8, "gpu", 2, geometric=False, max_pixels=10**8)
    plain = graph.run(encoded, dataclasses.replace(views, compression_quality=None)).source.cpu().numpy()
    for row, made in enumerate(graph.run(encoded, views).source.cpu().numpy()):
        expected = reference_views.compress_without_interpolation(plain[row], views.compression_quality[row])
        assert reference_views.error(made, expected) <= 0.1


@pytest.mark.parametrize("lengths", [(5, 17, 1, 33), (64,) * 3, (7, 0, 9)])
def test_xformers_equals_per_image_attention(lengths):
    segments = Segments.from_lengths(lengths, "cuda")
    q, k, v = (torch.randn(sum(lengths), 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    out = packed_attention(q, k, v, segments, "xformers")
    exact = packed_attention(*(t.double().cpu() for t in (q, k, v)), Segments.from_lengths(lengths), "sdpa")
    plain = packed_attention(q.cpu(), k.cpu(), v.cpu(), Segments.from_lengths(lengths), "sdpa")
    # At most twice the error of bf16 itself.
    assert (out.double().cpu() - exact).norm() <= 2 * (plain.double() - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize(("backend", "dtype"), [("efficient", torch.bfloat16), ("xformers", torch.float32)], ids=str)
@pytest.mark.parametrize("lengths", [(5, 17, 1, 33), (64,) * 3, (7, 0, 9)])
def test_the_gradient_of_packed_attention_is_written_by_its_kernel_alone(lengths, backend, dtype):
    segments = Segments.from_lengths(lengths, "cuda")
    qkv = torch.randn(sum(lengths), 3, 2, 64, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(qkv[:, 0])
    out = packed_qkv_attention(qkv, segments, backend)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        (found,) = torch.autograd.grad(out, qkv, upstream)
        torch.cuda.synchronize()
    kernels = {event.key for event in profile.key_averages() if event.device_time}
    assert kernels
    assert not [name for name in kernels if "Cat" in name or "copy" in name.lower()]
    wide = qkv.detach().double().cpu().requires_grad_()
    exact = packed_qkv_attention(wide, Segments.from_lengths(lengths), "sdpa")
    (wanted,) = torch.autograd.grad(exact, wide, upstream.double().cpu())
    limit = 0.02 if dtype == torch.bfloat16 else 2e-3  # a few roundings of 2⁻⁸; TF32 rounds operands to 2⁻¹¹
    assert (out.double().cpu() - exact).norm() <= limit * exact.norm()
    assert (found.double().cpu() - wanted).norm() <= limit * wanted.norm()

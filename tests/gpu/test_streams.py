"""Work on other streams and threads, the target's forward pass and the loader, computes the same."""

import itertools

import pytest
import torch
from small_run import losses, small_config

from iwm_fast.actions.external import space_of
from iwm_fast.config.schema import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.data.image_list import list_images
from iwm_fast.data.loader import TrainingStream
from iwm_fast.engine import pretrain
from iwm_fast.models import IWM, Segments
from iwm_fast.models.cuda_stream import SideStream


def model_and_batch():
    """Large enough that both forward passes run at the same time."""
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=EncoderShape(depth=6, width=384, heads=6), predictor=PredictorConfig(depth=4, width=192)
    )
    model = IWM(config, 5).to("cuda", torch.bfloat16)
    lengths, asked = torch.randint(60, 120, (64,)).tolist(), torch.randint(20, 60, (64,)).tolist()
    context, predicted = (
        torch.cat([torch.randperm(196)[:n].sort().values for n in part]).cuda() for part in (lengths, asked)
    )
    source, target = torch.randint(0, 256, (2, 64, 224, 224, 3), dtype=torch.uint8, device="cuda")
    segments = [Segments.from_lengths(part, "cuda") for part in (lengths, asked)]
    return model, (source, target, torch.randn(64, 5, device="cuda"), context, segments[0], predicted, segments[1])


def test_no_bit_of_the_loss_changes():
    """Forward passes have a fixed order of sums. The target changes before each, as the EMA does."""
    model, batch = model_and_batch()
    begin = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = []
    for stream in (SideStream(), SideStream(torch.device("cuda"))):
        model.load_state_dict(begin)
        model.target_stream = stream
        with torch.no_grad():
            model(*batch)  # warm-up
            values = []
            for _ in range(10):  # without synchronisation
                torch._foreach_mul_(list(model.target_encoder.parameters()), 0.97)
                values.append(model(*batch).loss)
        found.append(torch.stack(values))
    assert found[0].unique().numel() > 1
    assert torch.equal(found[0], found[1])


def batches_of(config, root, count, between):
    """Yield views of this many batches on the host, calling `between` before each is read."""
    found = []
    with TrainingStream(config, list_images(root), space_of(config.actions)) as stream:
        for batch in itertools.islice(stream, count):
            between()
            found.append((batch.source.cpu(), batch.target.cpu()))
    return found


@pytest.mark.parametrize("sources", [1, 4])
def test_the_loader_writes_over_nothing_that_is_still_read(tiny_images, sources):
    """A stream that lags behind reads batches of the loader long after it got them, while the next are written."""
    config = small_config(tiny_images, views__sources_per_target=sources, data__device="gpu", data__prefetch=4)

    def busy():
        torch.cuda._sleep(50_000_000)  # some tens of milliseconds

    behind = batches_of(config, tiny_images, 12, busy)
    alone = batches_of(config, tiny_images, 12, torch.cuda.synchronize)
    for ours, theirs in zip(behind, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_loaders_thread_is_on_the_ranks_gpu(tiny_images):
    """Otherwise its pinned memory and kernels create a context on the first GPU; visible with two or more only."""
    config, last = small_config(tiny_images, data__device="gpu"), torch.cuda.device_count() - 1
    with torch.cuda.device(last), TrainingStream(config, list_images(tiny_images), space_of(config.actions)) as stream:
        assert stream._thread.submit(torch.cuda.current_device).result() == last
        assert next(iter(stream)).source.device.index == last


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (1, "fp32"), (2, "bf16")])
def test_training_follows_the_one_stream(tiny_images, tmp_path, stage, precision):
    """Gathers' gradients are added in any order on a GPU: last bits of fp32 or bf16, carried along for ten steps."""
    changes = {"train__steps": 10, "train__precision": precision, "zero__stage": stage, "data__device": "gpu"}
    for beside in (False, True):
        pretrain(small_config(tiny_images, train__target_stream=beside, **changes), tmp_path / str(beside))
    wanted = pytest.approx(losses(tmp_path / "False"), rel=1e-4 if precision == "fp32" else 1e-2)
    assert losses(tmp_path / "True") == wanted


def test_compiled_regions_on_either_stream_follow_the_plain_ones(tiny_images, tmp_path):
    changes = {"train__steps": 10, "train__precision": "bf16", "data__device": "gpu"}
    pretrain(small_config(tiny_images, **changes), tmp_path / "plain")
    both = {"train__compile": True, "train__target_stream": True}
    pretrain(small_config(tiny_images, **changes, **both), tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=5e-2)

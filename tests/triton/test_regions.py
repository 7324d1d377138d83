"""torch.compile takes the kernels unchanged, whatever the lengths."""

import torch

from iwm_fast.config.schema import EncoderShape, ModelConfig, PredictorConfig
from iwm_fast.kernels import use_backend
from iwm_fast.models import IWM, Segments
from iwm_fast.models.compiled_regions import compilations, compile_regions


def test_compiled_regions_over_the_kernels_give_the_references_gradients(device, regions_as_traced):
    """fp32 sums in another order: 1e-5 of a gradient's norm, ten times the observed difference."""
    config = ModelConfig(
        encoder=EncoderShape(depth=1, width=16, heads=2),
        patch=4,
        image=16,
        predictor=PredictorConfig(depth=1, width=24, heads=2, conditioning="feature+block"),
    )
    torch.manual_seed(0)
    model = IWM(config, 3).to(device)
    plain = IWM(config, 3).to(device)
    plain.load_state_dict(model.state_dict())
    compile_regions(model)
    graphs = []
    for seen, asked in ([5, 9], [4, 6]), ([3, 2], [7, 8]), ([11, 4], [2, 9]):
        pixels = torch.randint(0, 256, (2, 2, 16, 16, 3), dtype=torch.uint8, device=device)
        packed = []
        for lengths in (seen, asked):
            packed += [torch.cat([torch.randperm(16)[:n] for n in lengths]).to(device)]
            packed += [Segments.from_lengths(lengths, device)]
        batch = (*pixels, torch.randn(2, 3, device=device), *packed)
        for one, backend in ((model, "triton"), (plain, "reference")):
            one.zero_grad()
            with use_backend(backend):
                one(*batch).loss.backward()
        graphs.append(compilations())
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm()
    assert len(set(graphs)) == 1

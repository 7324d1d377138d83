"""Count the activations that a forward pass saves for its backward pass, with autograd's own hooks.

Every storage counts once, whole, for the part that saves it first: a view keeps its whole storage alive. Weights and
buffers do not count, nor temporaries of the forward pass, nor memory of the backward pass. Works on the meta device
too, where nothing is computed or allocated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from iwm_fast.actions.external import action_dim
from iwm_fast.config import Config
from iwm_fast.cost.activations import KeptBytes
from iwm_fast.cost.tokens import Tokens

__all__ = ["KeptCounter", "counted_activations", "follow_parts"]


class KeptCounter:
    """Counts saved tensors while `counting`, under the name `part`, which may change meanwhile."""

    def __init__(self, *owners: nn.Module) -> None:
        """`owners`: modules whose parameters and buffers do not count."""
        own = (t for module in owners for t in [*module.parameters(), *module.buffers()])
        self._own = {StorageWeakRef(t.untyped_storage()) for t in own}
        self._seen: dict[StorageWeakRef, tuple[str, torch.UntypedStorage]] = {}
        self.part = ""

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in self._own:
            self._seen.setdefault(key, (self.part, storage))  # keeps the storage, so its address is not reused
        return tensor

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count everything that autograd saves inside."""
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield

    def keep_held(self, result: Tensor) -> None:
        """Count the tensors that a result's graph nodes hold outside autograd's saved tensors."""
        waiting: list[Any] = [result.grad_fn]
        done: set[Any] = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in done:
                continue
            done.add(node)
            for held in vars(node).values() if hasattr(node, "__dict__") else ():
                if isinstance(held, Tensor):
                    self.keep(held)
            waiting += [following for following, _ in node.next_functions]

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by part."""
        found: dict[str, int] = {}
        for part, storage in self._seen.values():
            found[part] = found.get(part, 0) + storage.nbytes()
        return found


def follow_parts(
    counter: KeptCounter, encoder: nn.Module, predictor: nn.Module, embed: nn.Module, norm: nn.Module
) -> None:
    """Set the part by forward hooks, with the names of `KeptBytes`: a part ends where the next begins.

    `embed` and `norm` are the predictor's first layer over the context, and its last LayerNorm. A target encoder, which
    saves nothing, may run at any time.
    """

    def then(part: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counter.part = part

        return hook

    encoder.register_forward_pre_hook(then("patch_embedding"))
    encoder.get_submodule("patch_embed").register_forward_hook(then("encoder_blocks"))
    encoder.get_submodule("norm").register_forward_pre_hook(then("encoder_end"))
    predictor.register_forward_pre_hook(then("predictor_input"))
    embed.register_forward_hook(then("predictor_blocks"))
    norm.register_forward_pre_hook(then("predictor_end"))
    predictor.register_forward_hook(then("loss"))


def counted_activations(config: Config, tokens: Tokens, device: str = "cpu") -> KeptBytes:
    """Run a forward pass on zero images with these token counts; return saved bytes by part.

    On the CPU in fp32, with the kernels in use. On the meta device in the configuration's precision, as on a GPU, and
    nothing is computed; images stay in the order of their contexts, which only the CPU would sort.
    """
    from iwm_fast.models import IWM, Segments
    from iwm_fast.models.later_steps import later_steps

    actions, side, meta = action_dim(config.actions), config.model.image, device == "meta"
    with torch.device(device):
        model = IWM(config.model, actions, activation_checkpointing=config.train.activation_checkpointing)
    if meta and config.train.precision == "bf16":
        model = model.bfloat16()
    counter = KeptCounter(model)
    follow_parts(counter, model.encoder, model.predictor, model.predictor.embed, model.predictor.norm)
    frames = len(tokens.context) * tokens.history
    images = torch.zeros(max(frames, tokens.images * tokens.horizon), side, side, 3, dtype=torch.uint8, device=device)
    action = torch.ones(len(tokens.context) * tokens.horizon, actions, device=device)
    order = np.argsort(tokens.context, kind="stable") if meta else slice(None)
    counts = (np.repeat(tokens.context[order], tokens.history), tokens.predicted[order])
    rows = [torch.cat([torch.arange(n) for n in each.tolist()]).to(device) for each in counts]
    segments = [Segments.from_lengths(each, device) for each in counts]
    sampled = tuple(numbers.to(device) for numbers in model.objective.sample(0, 0, torch.device("cpu")))
    later: dict[str, Any] = {}
    if (steps := tokens.steps) is not None:
        packed = np.concatenate([np.arange(n) for n in counts[0].tolist()])
        later["later"] = later_steps(packed, counts[0], steps, tokens.horizon, config.model.grid**2, device)
    targets = images[: tokens.images * tokens.horizon]
    with counter.counting(), _as_on_a_gpu() if meta else contextlib.nullcontext():
        output = model(images[:frames], targets, action, rows[0], segments[0], rows[1], segments[1], sampled, **later)
    counter.keep_held(output.loss)
    none = {field.name: 0 for field in fields(KeptBytes)}  # a frozen encoder saves nothing
    return KeptBytes(**none | counter.bytes)


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Use the Triton operators, and attention in one call.

    xformers' operator needs a GPU. PyTorch's operator of the same algorithm saves the same tensors: q, k, v, output and
    log-sum-exp.
    """
    from iwm_fast.kernels import use_backend
    from iwm_fast.models import Segments, attention

    def one_call(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        bounds, longest = segments.cu_seqlens, max(segments.lengths)
        found = torch.ops.aten._efficient_attention_forward(  # noqa: SLF001  (has no public name)
            q[None], k[None], v[None], None, bounds, bounds, longest, longest, 0.0, 0, compute_log_sumexp=True
        )
        out: Tensor = found[0][0]
        return out

    grouped = attention._grouped_sdpa  # noqa: SLF001  (the one place where attention is called without a GPU)
    attention._grouped_sdpa = one_call  # noqa: SLF001
    try:
        with use_backend("triton"):
            yield
    finally:
        attention._grouped_sdpa = grouped  # noqa: SLF001

"""Run facebookresearch/ijepa's training step from the user's checkout, with its own parts.

Its step is a closure inside its `main` and cannot be called. This module calls the same functions in the same order:
schedules, target forward and normalisation, masked context forward, one prediction per block, smooth L1, backward,
optimizer, gradient statistics, EMA update, and reading the loss back.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iwm_fast.benchmarks.adapters.inputs import Inputs, Masks, Shape, fingerprint, normalised
from iwm_fast.benchmarks.counting.kept_count import KeptCounter, follow_parts
from iwm_fast.cost.activations import KeptBytes
from iwm_fast.errors import UserError
from iwm_fast.measure.autocast import CudaAutocast
from iwm_fast.measure.flop_count import counted_flops

__all__ = ["Checkout", "Ijepa"]

# From its published configurations (configs/in1k_*.yaml).
_MASKS = {
    "pred_mask_scale": (0.15, 0.2), "enc_mask_scale": (0.85, 1.0), "aspect_ratio": (0.75, 1.5), "nenc": 1, "npred": 4,
    "allow_overlap": False, "min_keep": 10,
}  # fmt: skip
_EPOCH = 1000  # iterations per epoch; only its schedules read it


class Checkout:
    """Its modules, imported from a folder; `version` is the commit, or a hash of the sources outside git."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "src" / "models" / "vision_transformer.py").is_file():
            raise UserError(f"{folder}: not a checkout of facebookresearch/ijepa: src/models is missing; give a clone")
        self.version = _version(folder)
        sys.path.insert(0, str(folder.resolve()))
        try:
            names = {
                "helper": "src.helper", "multiblock": "src.masks.multiblock", "masks": "src.masks.utils",
                "tensors": "src.utils.tensors", "distributed": "src.utils.distributed", "logging": "src.utils.logging",
            }  # fmt: skip
            self.parts: dict[str, Any] = {key: importlib.import_module(name) for key, name in names.items()}
        finally:
            sys.path.pop(0)
        logging.getLogger().setLevel(logging.WARNING)  # it sets INFO and prints whole models

    def draw_masks(self, shape: Shape, count: int, seed: int) -> list[Masks]:
        """Return `count` batches of its sampler, as its collator cuts them, with the lengths before the cut."""
        torch.manual_seed(seed)
        collator = self.parts["multiblock"].MaskCollator(input_size=shape.image, patch_size=shape.patch, **_MASKS)
        drawn: list[int] = []
        sample = collator._sample_block_mask  # noqa: SLF001  (the lengths are cut before its caller gives them out)

        def recorded(size: Any, acceptable_regions: Any = None) -> Any:
            mask, complement = sample(size, acceptable_regions=acceptable_regions)
            if acceptable_regions is not None:
                drawn.append(len(mask))
            return mask, complement

        collator._sample_block_mask = recorded  # noqa: SLF001
        batches = []
        for _ in range(count):
            drawn.clear()
            _, context, blocks = collator([torch.zeros(1)] * shape.batch)
            batches.append(Masks(context[0].numpy(), torch.stack(blocks).numpy(), np.array(drawn)))
        return batches

    def networks(self, shape: Shape, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Return its encoder and predictor, initialised by its own function."""
        encoder, predictor = self.parts["helper"].init_model(
            device=device, patch_size=shape.patch, model_name=shape.encoder, crop_size=shape.image,
            pred_depth=shape.predictor_depth, pred_emb_dim=shape.predictor_width,
        )  # fmt: skip
        return encoder, predictor


def _version(folder: Path) -> str:
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    digest = hashlib.sha256()
    for path in sorted((folder / "src").rglob("*.py")):
        digest.update(path.read_bytes())
    return f"sha256:{digest.hexdigest()}"


class Ijepa:
    """Its step on given batches; with `compiled`, its three networks are compiled by torch.compile."""

    def __init__(
        self, checkout: Checkout, shape: Shape, inputs: Sequence[Inputs], device: torch.device, *,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.version = ("ijepa compile" if compiled else "ijepa"), checkout.version
        self._parts, self._bf16 = checkout.parts, device.type == "cuda"
        encoder, predictor = checkout.networks(shape, device)
        target = copy.deepcopy(encoder)
        for parameter in target.parameters():
            parameter.requires_grad = False
        self.encoder, self.predictor, self.target = encoder, predictor, target
        self._run = [torch.compile(m) if compiled else m for m in (encoder, predictor, target)]
        self.optimizer, self._scaler, self._lr, self._decay = checkout.parts["helper"].init_opt(
            encoder=encoder, predictor=predictor, wd=0.04, final_wd=0.4, start_lr=2e-4, ref_lr=1e-3, final_lr=1e-6,
            iterations_per_epoch=_EPOCH, warmup=40, num_epochs=300, ipe_scale=1.0, use_bfloat16=self._bf16,
        )  # fmt: skip
        steps = _EPOCH * 300
        self._momentum = (0.996 + i * 0.004 / steps for i in range(steps + 1))
        self._batches = [_batch(one, device) for one in inputs]
        self._next = 0

    def step(self) -> float:
        """Run one step, in its order; return the loss."""
        batch = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)
        self._lr.step()
        self._decay.step()
        with torch.autocast(batch[0].device.type, dtype=torch.bfloat16, enabled=self._bf16):
            loss = self._parts["distributed"].AllReduce.apply(self.loss(*batch))
        if self._scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.step(self.optimizer)
            self._scaler.update()
        self._parts["logging"].grad_logger(self.encoder.named_parameters())
        self.optimizer.zero_grad()
        with torch.no_grad():
            momentum = next(self._momentum)
            for weight, average in zip(self.encoder.parameters(), self.target.parameters(), strict=True):
                average.data.mul_(momentum).add_((1.0 - momentum) * weight.detach().data)
        return float(loss.detach())

    def loss(self, images: Tensor, context: list[Tensor], blocks: list[Tensor]) -> Tensor:
        """Return its loss of normalised images (B, 3, S, S)."""
        encoder, predictor, target = self._run
        with torch.no_grad():
            h = target(images)
            h = F.layer_norm(h, (h.size(-1),))
            h = self._parts["masks"].apply_masks(h, blocks)
            h = self._parts["tensors"].repeat_interleave_batch(h, len(images), repeat=len(context))
        return F.smooth_l1_loss(predictor(encoder(images, context), context, blocks), h)

    def saw(self) -> list[str]:
        """Return fingerprints of the batches' masks."""
        return [
            fingerprint(list(context[0].cpu().numpy()), list(torch.cat(blocks, dim=1).cpu().numpy()))
            for _, context, blocks in self._batches
        ]


def _batch(inputs: Inputs, device: torch.device) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    context = [torch.from_numpy(inputs.masks.context).to(device)]
    return normalised(inputs.target.to(device)), context, [torch.from_numpy(b).to(device) for b in inputs.masks.blocks]


def operations(checkout: Checkout, shape: Shape, inputs: Sequence[Inputs]) -> list[int]:
    """Return the FLOPs of its step on each of `inputs`, which are on the meta device."""
    device = torch.device("meta")
    side = Ijepa(checkout, shape, inputs, device)
    return [counted_flops(lambda one=one: side.loss(*_batch(one, device)).backward()) for one in inputs]  # type: ignore[misc]


def kept(checkout: Checkout, shape: Shape, inputs: Inputs) -> tuple[KeptBytes, nn.Module, nn.Module]:
    """Return its saved activations on the meta device, under CUDA's autocast to bf16, and its networks.

    Bytes are by iwm-fast's parts; the networks are its encoder and predictor.
    """
    device = torch.device("meta")
    side = Ijepa(checkout, shape, [inputs], device)
    counter = KeptCounter(side.encoder, side.predictor, side.target)
    embed, norm = (side.predictor.get_submodule(name) for name in ("predictor_embed", "predictor_norm"))
    follow_parts(counter, side.encoder, side.predictor, embed, norm)
    with counter.counting(), CudaAutocast():
        side.loss(*_batch(inputs, device))
    return KeptBytes(**counter.bytes), side.encoder, side.predictor

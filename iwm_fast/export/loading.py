"""The code of a model card: how each format is opened by its library. Tests run it."""

from __future__ import annotations

from iwm_fast.export.described import Trained
from iwm_fast.export.timm_names import timm_arguments

__all__ = ["loading_code", "reading_note"]

_NOTES = {
    "iwm": "`pip install iwm-fast`. The `*_timm.safetensors` load into timm, with the arguments in config.json.",
    "timm": "`pip install timm`. A folder on the Hub opens as `hf-hub:OWNER/NAME`.",
    "transformers": (
        "`pip install transformers`. The encoders are the library's own classes. The predictor is code of this folder, "
        "`predictor/modeling_iwm_predictor.py`, which needs torch and transformers; read it before you trust it."
    ),
    "pt2": "torch only, of the version that wrote the files or a later one. Normalisation of pixels is in the graph.",
    "onnx": "`pip install onnxruntime`. Normalisation of pixels is in the graph.",
}
_READ = """\
picture = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGB")
picture = ImageOps.fit(picture, ({side}, {side}), Image.Resampling.BILINEAR)  # the centred square"""
_IWM = """\
import iwm_fast

world = iwm_fast.load(".")
features = world.encode("cat.jpg").mean(1)  # (1, {width}), of the {evaluated} encoder
predicted = world.predict("cat.jpg", {action})  # (1, {patches}, {target_width})"""
_TIMM = """\
import timm
import torch
from PIL import Image, ImageOps

encoder = timm.create_model("local-dir:.", pretrained=True{eps}).eval()
about = timm.data.resolve_model_data_config(encoder)
transform = timm.data.create_transform(**about, is_training=False)
picture = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGB")
with torch.no_grad():
    pixels = transform(picture)[None]
    features = encoder(pixels)  # (1, {width}): the mean of all patch tokens
    tokens = encoder.forward_features(pixels)[:, {prefix}:]  # (1, {patches}, {width}): a token per patch"""
_TRANSFORMERS = """\
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained(".")
encoder = AutoModel.from_pretrained(".").eval()
picture = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGB")
pixels = processor(picture, return_tensors="pt")
with torch.no_grad():
    tokens = encoder(**pixels).last_hidden_state[:, {prefix}:]  # (1, {patches}, {width}): a token per patch
features = tokens.mean(1)

context = {context}
predictor = AutoModel.from_pretrained("predictor", trust_remote_code=True).eval()
action = torch.zeros(1, {actions})  # encoded values in the order of predictor.config.action_names
with torch.no_grad():
    seen = context(**pixels).last_hidden_state[:, {context_prefix}:]
    predicted = predictor(seen, action).last_hidden_state  # (1, {patches}, {target_width})"""
_PT2 = """\
import numpy as np
import torch
from PIL import Image, ImageOps

{read}
pixels = torch.from_numpy(np.array(picture))[None]  # uint8 (1, {side}, {side}, 3)
encoder = torch.export.load("{file}.pt2").module()
context = torch.export.load("encoder.pt2").module()
predictor = torch.export.load("predictor.pt2").module()
with torch.no_grad():
    tokens = encoder(pixels)  # (1, {patches}, {width}): a token per patch
    predicted = predictor(context(pixels), torch.zeros(1, {actions}))  # (1, {patches}, {target_width})
features = tokens.mean(1)"""
_ONNX = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

{read}
pixels = np.array(picture)[None]  # uint8 (1, {side}, {side}, 3)
encoder = onnxruntime.InferenceSession("{file}.onnx")
context = onnxruntime.InferenceSession("encoder.onnx")
predictor = onnxruntime.InferenceSession("predictor.onnx")
(tokens,) = encoder.run(None, {{"images": pixels}})  # (1, {patches}, {width}): a token per patch
(seen,) = context.run(None, {{"images": pixels}})
action = np.zeros((1, {actions}), np.float32)
(predicted,) = predictor.run(None, {{"tokens": seen, "action": action}})  # (1, {patches}, {target_width})
features = tokens.mean(1)"""
_CODE = {"iwm": _IWM, "timm": _TIMM, "transformers": _TRANSFORMERS, "pt2": _PT2, "onnx": _ONNX}
# eps of the normalisations of the models that timm registers under the names of `timm_arguments`.
_EPS = {"vit_base_patch16_224": 1e-6, "vit_small_patch16_dinov3": 1e-5}


def loading_code(trained: Trained, form: str) -> str:
    """Return Python that encodes ``cat.jpg`` and predicts, run in the export's folder; without a last line break."""
    own, context = (trained.encoders[part].architecture for part in (trained.evaluated, "context"))
    side, names = trained.config.model.image, trained.space.names
    timm = timm_arguments(own)["pretrained_cfg"]
    exact = timm["norm_eps"] == _EPS[timm["architecture"]]
    separate = trained.evaluated != "context"
    return _CODE[form].format(
        side=side,
        read=_READ.format(side=side),
        width=own.shape.width,
        patches=own.grid**2,
        prefix=own.prefix_tokens,
        evaluated=trained.evaluated,
        target_width=trained.model.predictor.proj.out_features,
        context='AutoModel.from_pretrained("context_encoder").eval()' if separate else "encoder",
        context_prefix=context.prefix_tokens,
        file="target_encoder" if separate else "encoder",
        actions=len(names),
        action='{"brightness": 0.3}' if "brightness" in names else f"[0.0] * {len(names)}",
        eps="" if exact else f", norm_layer=lambda width, **_: torch.nn.LayerNorm(width, eps={timm['norm_eps']!r})",
    )


def reading_note(form: str) -> str:
    """Return what a format needs, in a sentence or two."""
    return _NOTES[form]

"""Networks: the ViT encoder over packed visible patches, predictors, and the IWM module with target and loss.

Shapes: B images, L patches of a whole image, N packed tokens, D (De, Dp) token width (of encoder, of predictor), A
action components, S side of an image in pixels.
"""

from __future__ import annotations

from iwm_fast.models.attention import packed_attention, resolve_backend
from iwm_fast.models.iwm import IWM, IWMOutput
from iwm_fast.models.packing import Segments
from iwm_fast.models.predictors import MlpPredictor, VitPredictor
from iwm_fast.models.vit import VisionTransformer

__all__ = [
    "IWM",
    "IWMOutput",
    "MlpPredictor",
    "Segments",
    "VisionTransformer",
    "VitPredictor",
    "packed_attention",
    "resolve_backend",
]

"""Weights of other libraries as ours: which family a file is of, its encoder under our names, and its fit."""

from iwm_fast.families.converted import HALF, IMAGENET, Converted, LazyTensors, Pixels, PredictorWeights
from iwm_fast.families.files import Contents, lazy_safetensors, read_weights
from iwm_fast.families.fit import Fitted, fit_encoder
from iwm_fast.families.recognise import KNOWN, predictor_of, recognise, summary

__all__ = [
    "HALF",
    "IMAGENET",
    "KNOWN",
    "Contents",
    "Converted",
    "Fitted",
    "LazyTensors",
    "Pixels",
    "PredictorWeights",
    "fit_encoder",
    "lazy_safetensors",
    "predictor_of",
    "read_weights",
    "recognise",
    "summary",
]

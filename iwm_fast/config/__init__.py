"""Configuration: YAML files and ``key.path=value`` overrides, validated against one schema."""

from iwm_fast.config.load import dump_config, load_config, packaged_config
from iwm_fast.config.schema import (
    ENCODERS,
    ActionsConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EncoderArchitecture,
    EncoderShape,
    EvalConfig,
    ExternalActions,
    LogConfig,
    MasksConfig,
    ModelConfig,
    PredictorConfig,
    TrainConfig,
    ZeroConfig,
)

__all__ = [
    "ENCODERS",
    "ActionsConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EncoderArchitecture",
    "EncoderShape",
    "EvalConfig",
    "ExternalActions",
    "LogConfig",
    "MasksConfig",
    "ModelConfig",
    "PredictorConfig",
    "TrainConfig",
    "ZeroConfig",
    "dump_config",
    "load_config",
    "packaged_config",
]

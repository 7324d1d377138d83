"""An encoder of one's own size, by name."""

from iwm_fast.config.encoders import register_encoder

register_encoder("vit_nano", depth=3, width=48, heads=3, mlp_ratio=2.0)

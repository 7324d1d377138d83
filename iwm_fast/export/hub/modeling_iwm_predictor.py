"""The predictor of an Image World Model (arXiv:2403.00504), for transformers. It needs torch and transformers only.

    predictor = AutoModel.from_pretrained("predictor", trust_remote_code=True)
    predicted = predictor(tokens, action).last_hidden_state

tokens: float (B, L, D), of the context encoder: all patches, without class and register tokens. action: float (B, A),
in the order of config.action_names. predicted: (B, L, D), the target encoder's tokens after the action.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

__all__ = ["IWMPredictorConfig", "IWMPredictorModel"]


class IWMPredictorConfig(PretrainedConfig):
    """The sizes of a predictor.

    kind: vit, which attends over the source's tokens and mask tokens, or mlp, which maps each token by itself.
    conditioning: where the action enters. encoder_width: D of context encoder, target_width: D of target encoder,
    patches: L. normalize_target: whether training compared with layer-normalised tokens of the target encoder.
    """

    model_type = "iwm_predictor"

    def __init__(
        self,
        kind: str = "vit",
        conditioning: str = "feature",
        encoder_width: int = 768,
        target_width: int = 768,
        patches: int = 196,
        hidden_size: int = 384,
        num_hidden_layers: int = 18,
        num_attention_heads: int = 12,
        intermediate_size: int = 1536,
        action_names: Sequence[str] = (),
        layer_norm_eps: float = 1e-6,
        normalize_target: bool = True,
        **kwargs: object,
    ) -> None:
        self.kind = kind
        self.conditioning = conditioning
        self.encoder_width = encoder_width
        self.target_width = target_width
        self.patches = patches
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.action_names = list(action_names)
        self.layer_norm_eps = layer_norm_eps
        self.normalize_target = normalize_target
        super().__init__(**kwargs)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    """x + MLP(LN(x)), with the action as a bias of the hidden layer where there are ``actions``."""

    def __init__(self, width: int, hidden: int, actions: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.norm_bias = nn.Parameter(torch.zeros(width))
        self.w_in = nn.Parameter(torch.zeros(hidden, width))
        self.b_in = nn.Parameter(torch.zeros(hidden))
        self.w_out = nn.Parameter(torch.zeros(width, hidden))
        self.b_out = nn.Parameter(torch.zeros(width))
        self.w_action = nn.Parameter(torch.zeros(hidden, actions)) if actions else None

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:], self.norm_weight, self.norm_bias, self.eps)
        hidden = F.linear(normed, self.w_in, self.b_in)
        if self.w_action is not None:
            hidden = hidden + F.linear(action, self.w_action)[:, None]
        return x + F.linear(F.gelu(hidden), self.w_out, self.b_out)


class _Block(nn.Module):
    def __init__(self, config: IWMPredictorConfig, actions: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = _Attention(width, config.num_attention_heads)
        self.mlp = _Mlp(width, config.intermediate_size, actions, eps)

    def forward(self, x: Tensor, action: Tensor) -> Tensor:
        return self.mlp(x + self.attn(self.norm1(x)), action)


class _FeatureMixer(nn.Module):
    """Mask tokens and the action through a three-layer MLP."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.zeros(width, width))
        self.w_action = nn.Parameter(torch.zeros(width, actions))
        self.b_in = nn.Parameter(torch.zeros(width))
        self.w_out = nn.Parameter(torch.zeros(width, width))
        self.b_out = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, action: Tensor) -> Tensor:
        hidden = F.linear(tokens, self.w_in, self.b_in) + F.linear(action, self.w_action)[:, None]
        return self.out(F.gelu(F.linear(F.gelu(hidden), self.w_out, self.b_out)))


class _ActionTokens(nn.Module):
    """One token per component of the action."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(actions, width))
        self.bias = nn.Parameter(torch.zeros(actions, width))

    def forward(self, action: Tensor) -> Tensor:
        return self.bias + action[:, :, None] * self.weight


class IWMPredictorModel(PreTrainedModel):
    """The world model: the target's tokens from the source's tokens and the action."""

    config_class = IWMPredictorConfig
    base_model_prefix = "predictor"
    main_input_name = "tokens"
    _no_split_modules = ("_Block",)

    def __init__(self, config: IWMPredictorConfig) -> None:
        super().__init__(config)
        width, actions = config.hidden_size, len(config.action_names)
        kinds = config.conditioning.split("+")
        attends = config.kind == "vit"
        self.embed = nn.Linear(config.encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width)) if attends else None
        self.pos_embed = nn.Parameter(torch.zeros(config.patches, width), requires_grad=False) if attends else None
        self.feature = _FeatureMixer(width, actions) if "feature" in kinds else None
        self.sequence = _ActionTokens(width, actions) if "sequence" in kinds else None
        in_blocks = actions if "block" in kinds else 0
        self.blocks = nn.ModuleList(
            _Block(config, in_blocks)
            if attends
            else _Mlp(width, config.intermediate_size, in_blocks, config.layer_norm_eps)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.proj = nn.Linear(width, config.target_width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave everything to the file of weights, which holds all parameters."""

    def forward(self, tokens: Tensor, action: Tensor, return_dict: bool = True) -> BaseModelOutput | tuple[Tensor, ...]:
        """Predict the target's tokens (B, L, target_width) from tokens (B, L, D) and action (B, A)."""
        own, wanted = self.config, (len(tokens), len(self.config.action_names))
        if tokens.ndim != 3 or tokens.shape[2] != own.encoder_width or tuple(action.shape) != wanted:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)} and action {tuple(action.shape)}; they must be "
                f"(B, L, {own.encoder_width}) and (B, {wanted[1]})"
            )
        x = self.embed(tokens)
        if self.pos_embed is None or self.mask_token is None:
            for block in self.blocks:
                x = block(x, action)
            predicted = self.proj(self.norm(x))
        else:
            predicted = self._attended(x, action, self.pos_embed, self.mask_token)
        return BaseModelOutput(last_hidden_state=predicted) if return_dict else (predicted,)

    def _attended(self, x: Tensor, action: Tensor, positions: Tensor, mask_token: Tensor) -> Tensor:
        patches = len(positions)
        if x.shape[1] != patches:
            raise ValueError(f"tokens have {x.shape[1]} patches; the predictor was trained on {patches}")
        asked = (positions + mask_token).expand(len(x), -1, -1)
        if self.feature is not None:
            asked = self.feature(asked, action)
        parts = [x + positions, asked]
        if self.sequence is not None:
            parts.append(self.sequence(action))
        joined = torch.cat(parts, dim=1)
        for block in self.blocks:
            joined = block(joined, action)
        return self.proj(self.norm(joined[:, patches : 2 * patches]))

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from iwm_fast.models.heads import AttentiveHead, AttentivePool, DenseHead, LinearHead


def moved(module, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def plain(pool, tokens):
    """Cross-attention by torch's own module, with keys and values projected for every token."""
    width = tokens.shape[2]
    attention = nn.MultiheadAttention(width, pool.heads, batch_first=True).double()
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([pool.q.weight, pool.k.weight, pool.v.weight]))
        attention.in_proj_bias.copy_(torch.cat([pool.q.bias, torch.ones(width), pool.v.bias]))  # any bias of the keys
        attention.out_proj.weight.copy_(pool.proj.weight)
        attention.out_proj.bias.copy_(pool.proj.bias)
    x = F.layer_norm(tokens, (width,), pool.norm.weight, pool.norm.bias, 1e-6)
    query = pool.query.expand(len(tokens), 1, -1)
    out = query + attention(query, x, x, need_weights=False)[0]
    mlp = pool.mlp
    hidden = F.linear(F.layer_norm(out, (width,), mlp.norm_weight, mlp.norm_bias, 1e-6), mlp.w_in, mlp.b_in)
    return (out + F.linear(F.gelu(hidden), mlp.w_out, mlp.b_out))[:, 0]


@pytest.mark.parametrize("heads", [1, 3])
def test_pooling_is_cross_attention_with_a_learned_query(heads):
    """The projections of keys and values are applied after pooling; nothing else may change."""
    pool = moved(AttentivePool(12, heads))
    torch.manual_seed(1)
    tokens = torch.randn(5, 7, 12, dtype=torch.float64, requires_grad=True)
    found, want = pool(tokens), plain(pool, tokens)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((out * weight).sum(), [tokens, pool.query, pool.norm.weight]) for out in (found, want)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_order_of_tokens_does_not_matter_to_a_whole_image():
    tokens = torch.randn(3, 9, 8)
    shuffled = tokens[:, torch.randperm(9)]
    for head in (AttentiveHead(8, 2, 5), LinearHead(8, 5)):
        torch.testing.assert_close(head(tokens), head(shuffled))


@pytest.mark.parametrize("heads", [0, 2])
def test_dense_predictions_are_where_their_patches_are(heads):
    """A patch unlike all others is predicted at its own row and column."""
    torch.manual_seed(0)
    head = DenseHead(8, heads, 3).eval()
    tokens = torch.zeros(2, 12 + 4, 8)
    plain = head(tokens)
    tokens[1, 4 * 2 + 3] = 5.0
    changed = (head(tokens) - plain).abs().sum(dim=1)
    assert plain.shape == (2, 3, 4, 4)
    assert not changed[0].any()
    assert changed[1].argmax() == 4 * 2 + 3


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of heads"):
        AttentivePool(10, 3)

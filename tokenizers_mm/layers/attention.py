"""Scaled dot-product attention behind one function, and the pre-norm transformer block."""

import os
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizers_mm._check import require

_BACKEND = "TOKENIZERS_MM_ATTENTION"


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(q k' / sqrt(d)) v for [B, heads, N, d]; `mask` is boolean, True where a query may look.

    TOKENIZERS_MM_ATTENTION=xformers uses its kernel on CUDA tensors without a mask, where that package is installed.
    `dropout` is the share of attention weights that are set to 0.
    """
    if mask is None and dropout == 0.0 and q.is_cuda and os.environ.get(_BACKEND) == "xformers":
        import xformers.ops  # pyright: ignore[reportMissingImports]

        heads_last = (x.transpose(1, 2) for x in (q, k, v))
        return xformers.ops.memory_efficient_attention(*heads_last).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), as OpenAI's CLIP has it."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU."""
    return F.gelu(x, approximate="tanh")


Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


class SelfAttention(nn.Module):
    """Multi-head self-attention over [B, N, C], with one projection for q, k and v.

    `rotate`, when given to `forward`, turns q and k [B, heads, N, d] by their positions before the product.
    dropout: of the attention weights and of the output, in training mode.
    """

    def __init__(self, width: int, heads: int, qkv_bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        out = attention(q, k, v, mask, self.dropout.p if self.training else 0.0)
        return self.dropout(self.proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, width: int, hidden: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.activation(self.fc1(x)))))


def check_block(width: int, heads: int, mlp_ratio: float = 4.0, divisor: int = 1) -> None:
    """Refuse sizes that no `Block` has; `divisor`: of a head's channels, 4 for rotary positions over two axes."""
    expected = f"a multiple of {divisor * heads} ({f'{divisor} * ' if divisor > 1 else ''}heads)"
    require(width % (divisor * heads) == 0, "width", expected, width)
    require(int(width * mlp_ratio) >= 1, "mlp_ratio", f"at least 1 hidden channel for {width}", mlp_ratio)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    mlp: a module in the place of the usual one, which `mlp_ratio` and `activation` describe.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float = 4.0,
        activation: str = "gelu",
        *,
        eps: float = 1e-6,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        mlp: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = SelfAttention(width, heads, qkv_bias, dropout)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, int(width * mlp_ratio), activation, dropout) if mlp is None else mlp

    def forward(
        self, x: Tensor, rotate: Callable[[Tensor], Tensor] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), rotate, mask)
        return x + self.mlp(self.norm2(x))

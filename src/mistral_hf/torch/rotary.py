"""Rotary position embeddings (Su et al., 2021): their factors, and their application in three operators.

Legend: B batch, S tokens, H query heads, K key/value heads, D head_dim.
"""

import torch
from torch import Tensor


def rotary_factors(angles: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of ``[B or 1, S, D/2]`` angles, each repeated to ``[B or 1, S, D]`` as in the library."""
    cos, sin = angles.cos(), angles.sin()
    if scaling != 1.0:
        cos, sin = cos * scaling, sin * scaling
    signed = torch.cat([-sin, sin], dim=-1).to(dtype)
    cos, sin = torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([sin, sin], dim=-1).to(dtype)
    # What every layer needs of them, prepared once; factors that a tool changes or replaces do not have it.
    sin.prepared = cos, cos.unsqueeze(1), signed.unsqueeze(1)  # type: ignore[attr-defined]  # ours
    return cos, sin


def scale_of_queries(positions: Tensor | None, scaling: tuple[float, int] | None, dtype: torch.dtype) -> Tensor | None:
    """What Ministral 3 multiplies queries with, ``1 + beta * log(1 + position // period)``, ``[B or 1, 1, S, 1]``.

    Args:
        positions: ``[B or 1, S]``.
        scaling: Beta and the period, or None for queries that are not scaled.
    """
    if scaling is None or positions is None:
        return None
    beta, period = scaling
    return (1 + beta * torch.log(1 + torch.floor(positions / period)))[:, None, :, None].to(dtype)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys, the two halves of a head being the parts of D/2 complex numbers.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, K, S, D]``.
        cos, sin: ``[B or 1, S, D]``, of `rotary_factors` or from elsewhere.
        scale: Of the queries, as of `scale_of_queries`.
    """
    by_head, signed = _prepared(cos, sin)
    half = q.shape[-1] // 2
    q = (q * by_head).addcmul_(q.roll(half, dims=-1), signed)
    k = (k * by_head).addcmul_(k.roll(half, dims=-1), signed)
    return (q if scale is None else q * scale), k


def _prepared(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[B or 1, 1, S, D]`` factors, the first half of sin negated."""
    source, by_head, signed = getattr(sin, "prepared", (None, cos, sin))
    if source is cos:
        return by_head, signed
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(1), torch.cat([-first, second], dim=-1).unsqueeze(1)

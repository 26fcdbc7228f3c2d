"""Guidance with one weight for coarse and one for fine structure."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from guidance.rows import by_rows
from guidance.weights import Interval, Weight, check_weight, inside, is_number, weight_at
from scoresde.types import SDE, Score


@by_rows("cond", "uncond", each=["low", "high"])
def frequency(
    cond: Score,
    uncond: Score,
    low: Weight,
    high: Weight,
    *,
    width: float = 1.0,
    sde: SDE | None = None,
    interval: Interval | None = None,
) -> Score:
    """s = s_u + w_low L d + w_high (d - L d),  d = s_c - s_u   (Sadat 2025, frequency-decoupled guidance).

    L:         `blur`, Gaussian of standard deviation `width` grid points; the two bands add up to d exactly
    low, high: 0 unconditional, 1 conditional in that band; numbers, (B,), or functions of sigma/alpha;
               low = high = 1 is off, low = high is `cfg`
    width:     > 0; to 0 everything is low, to inf everything but the mean is high
    interval:  (low, high) in sigma/alpha; outside it s = s_c
    Linear in s_c and s_u, so scores, eps, x0 and velocities give the same, and nestings commute.

    Bias: as cfg, in each band with its own weight.
    Network calls: one for two `Model`s of the same network, else two; one where the rule is off.
    """
    check_weight(low, sde, interval)
    check_weight(high, sde, interval)
    if not 0 < width < math.inf:
        raise ValueError(f"width, in grid points, must be positive and finite, got {width}")
    if is_number(low, 1) and is_number(high, 1):
        return cond
    if interval is None and is_number(low, 0) and is_number(high, 0):
        return uncond

    def banded(x: Tensor, t: Tensor, s_c: Tensor, s_u: Tensor) -> Tensor:
        a, b = weight_at(low, sde, x, t), weight_at(high, sde, x, t)
        d = s_c - s_u
        return torch.lerp(s_u, s_c, b) + (a - b) * blur(d, width)

    return inside(interval, sde, (cond, uncond), banded)


def blur(x: Tensor, width: float) -> Tensor:
    """Gaussian low-pass with mirrored ends along every spatial axis: gain exp(-(pi k width/n)^2/2) at cosine k of n.

    x: (B, C, *space) of any number of spatial axes, or (B, n) with one
    Symmetric, keeps constants, and commutes with flips and with maps of the channels.
    """
    for axis in range(min(2, x.ndim - 1), x.ndim):
        smoother = torch.from_numpy(_smoother(x.shape[axis], width)).to(x)
        x = torch.tensordot(x, smoother, dims=([axis], [0])).movedim(-1, axis)
    return x


@functools.lru_cache(maxsize=64)
def _smoother(n: int, width: float) -> np.ndarray:
    """sum_k gain_k c_k c_k',  c_k(i) ~ cos(pi k (i + 1/2)/n)   (the discrete cosine basis), (n, n)."""
    k, i = np.arange(n)[:, None], np.arange(n)
    basis = np.cos(math.pi * k * (i + 0.5) / n) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis.T @ (np.exp(-0.5 * (math.pi * k * width / n) ** 2) * basis)

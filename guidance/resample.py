"""Resampling of weighted particles, each row of log-weights (groups, n) by itself; nothing waits for the device."""

import torch
from torch import Tensor


def effective(log_w: Tensor) -> Tensor:
    """(sum W)^2 / (n sum W^2), in [1/n, 1], of every row."""
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp() / log_w.shape[1]


def temper(log_w: Tensor, share: float) -> Tensor:
    """The largest tau in [0, 1] at which the effective share of W^tau is `share` or more, (groups, 1), by bisection."""
    low, high = torch.zeros_like(log_w[:, :1]), torch.ones_like(log_w[:, :1])
    for _ in range(20):
        middle = (low + high) / 2
        enough = effective(middle * log_w)[:, None] >= share
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def systematic(W: Tensor, z: Tensor) -> Tensor:
    """Indices (groups, n) of which k appears n W_k times, rounded up or down   (Kitagawa 1996).

    W: (groups, n), each row of sum 1
    z: (groups,) ~ N(0, 1), one for each row's comb (j + u)/n, u = Phi(z)
    """
    n = W.shape[1]
    comb = (torch.arange(n, device=W.device) + torch.special.ndtr(z.to(W))[:, None]) / n
    return torch.searchsorted(W.cumsum(1), comb).clamp(max=n - 1)

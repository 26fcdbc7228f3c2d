"""Guidance weights: a number, one for each sample, or a function of the noise level; and where they act."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.types import SDE, like

Weight = float | Tensor | Callable[[Tensor], Tensor]
"""A number, (B,), or a function of r = sigma/alpha (for VE and EDM that is sigma), applied elementwise."""

Interval = tuple[float, float]
"""(low, high): the rule acts while low <= sigma/alpha <= high, and costs nothing outside."""


def check_weight(w: Weight, sde: SDE | None, interval: Interval | None) -> None:
    """What can be wrong with a weight, told before the run."""
    if isinstance(w, Tensor):
        if w.ndim > 1:
            raise ValueError(f"a weight tensor must be () or (B,), got {tuple(w.shape)}")
        if not bool(torch.isfinite(w).all()):
            raise ValueError("a weight is not finite")
    elif not callable(w) and not math.isfinite(w):
        raise ValueError(f"the weight must be finite, got {w}")
    if sde is None and (interval is not None or (callable(w) and not isinstance(w, Tensor))):
        raise ValueError("a weight that depends on sigma, or an interval in sigma, needs sde=...")
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval must be (low, high) in sigma/alpha with 0 <= low < high, got {interval}")


def weight_at(w: Weight, sde: SDE | None, x: Tensor, t: Tensor) -> float | Tensor:
    """The weight as something that multiplies x."""
    if isinstance(w, Tensor):
        if w.ndim and len(w) != len(x):
            raise ValueError(f"{len(w)} weights were given for a batch of {len(x)}; give one number, or one each")
        return like(w.to(x), x)
    if callable(w):
        assert sde is not None
        return like(torch.as_tensor(w(torch.exp(-sde.lam(t)))), x)
    return float(w)


def acting(interval: Interval | None, sde: SDE | None, t: Tensor) -> bool | Tensor:
    """Whether the rule acts at t: True, False, or a mask (B,) when the samples differ."""
    if interval is None:
        return True
    assert sde is not None
    r = torch.exp(-sde.lam(t))
    inside = (r >= interval[0]) & (r <= interval[1])
    if inside.ndim == 0 or bool(inside.all()) or not bool(inside.any()):
        return bool(inside.all())
    return inside

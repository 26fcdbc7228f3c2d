"""Guidance weights: a number, one for each sample, or a function of the noise level; and where they act."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde.model import evaluate
from scoresde.types import SDE, Score, like

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


def inside(interval: Interval | None, sde: SDE | None, scores: Sequence[Score], rule: Callable[..., Tensor]) -> Score:
    """rule(x, t, s_1, s_2, ...) inside the interval, s_1 alone outside.

    Network calls: one for all `Model`s of the same network, one for each other score; one outside.
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        if act is False:
            return scores[0](x, t)
        values = evaluate(scores, x, t)
        return chosen(act, rule(x, t, *values), values[0])

    return guided


def chosen(act: bool | Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a where the rule acts, b elsewhere; sample by sample."""
    if isinstance(act, bool):
        return a if act else b
    return torch.where(like(act, a).bool(), a, b)


def is_number(w: Weight, value: float) -> bool:
    """w is this plain number (a tensor or a function is not looked into)."""
    return not isinstance(w, Tensor) and not callable(w) and w == value


def plus_plus(lam: float, sde: SDE, ts: Tensor) -> Weight:
    """CFG++ as a weight of `cfg` for DDIM on the grid ts: w = lam r/(r - r1), r = sigma/alpha   (Chung 2024).

    CFG++ denoises with eps_u + lam (eps_c - eps_u) and renoises with eps_u:
        x1 = alpha1 (x - sigma (eps_u + lam (eps_c - eps_u)))/alpha + sigma1 eps_u
    which is DDIM's step with eps_u + w (eps_c - eps_u).

    lam: in [0, 1] in the paper; 0 is unconditional, (r - r1)/r conditional
    ts:  the grid of the run; between its times w is that of the step

    On any other sampler this is a weight, but not CFG++.  Bias: w grows with the number of steps (on a
    grid geometric in r with ratio q it is lam/(1 - q), plain CFG), so no law is approached as they grow.
    """
    r = torch.exp(-sde.lam(ts))
    if not math.isfinite(lam):
        raise ValueError(f"lam must be finite, got {lam}")
    if ts.ndim != 1 or not bool((r.diff() < 0).all()):
        raise ValueError(f"ts must be the decreasing grid of the run, (N+1,), got shape {tuple(ts.shape)}")
    level, w = r[:-1].flip(0), (lam * r[:-1] / (r[:-1] - r[1:])).flip(0)

    def weight(r: Tensor) -> Tensor:
        i = torch.searchsorted(level.to(r), r * (1 - 1e-6)).clamp(max=len(w) - 1)
        return w.to(r)[i]

    return weight


def ramp(w: float, low: float, high: float) -> Weight:
    """w(r) = 1 + (w - 1) c,  c = log(high/r) / log(high/low) clamped to [0, 1],  r = sigma/alpha.

    Conditional above `high`, w below `low`.  With `cfg` the guided densities p_u^(1-w(r)) p_c^w(r) at every noise
    level are a path from the exact conditional, which every sampler follows, to the tilted density, on which only
    Langevin moves stay (`samplers.metropolis`).  A tilt at high noise makes far modes that no move can join again
    (six Gaussians, w = 8: 61 % in one of two modes at r = 1.6, 52 % at the end); a late one does not.
    high about the data's standard deviation, low about 0.3 of it.  Give cfg interval=(0, high): one call above.
    """
    if not isinstance(w, int | float) or not math.isfinite(w) or not 0 < low < high:
        raise ValueError(
            f"w must be a finite number and 0 < low < high (sigma/alpha), got w = {w}, low = {low}, high = {high}"
        )

    def weight(r: Tensor) -> Tensor:
        return 1 + (w - 1) * (torch.log(high / r) / math.log(high / low)).clamp(0, 1)

    return weight

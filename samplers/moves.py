"""Langevin moves at one noise level, as hooks: any sampler becomes a predictor-corrector.

`metropolis` leaves the density as it is, at two calls a move; `relax`, kinetic and not adjusted, takes one and goes
further.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.loop import checked
from scoresde.types import SDE, Hook, Noise, Score, wide


def metropolis(
    score: Score,
    sde: SDE,
    ts: Tensor,
    n: int | Sequence[int] = 1,
    *,
    step: float = 0.3,
    width: float = 0.0,
    noise: Noise = torch.randn_like,
) -> Hook:
    """After each step of the grid, n times at its end t:

        x' = x + d,  d = e s(x) + sqrt(2 e) z,  e = step (sigma^2 + alpha^2 width^2)
        accepted with probability min(1, exp(a)),
        a = [s(x) + 4 s(x + d/2) + s(x')] d / 6                         log p(x') - log p(x), by Simpson's rule
            - [ (s(x) + s(x')) d / 2 + e (|s(x')|^2 - |s(x)|^2) / 4 ]   log q(x'|x) - log q(x|x'), exactly

    (Roberts & Tweedie 1996; a score's line integral for the density ratio: Du 2023.)  The density whose score it is
    stays as it is up to Simpson's O(d^5), exactly where the score is a cubic; the unadjusted step's error is O(e).

    n:     moves after each step: a number, or one for each of the N steps
    step:  0.1 to 0.5: the part of the variance sigma^2 + alpha^2 width^2 that one move explores
    width: standard deviation of the narrowest mode of the data that is to be explored; 0 where it is not known: then
           moves are small at small noise.  Too large a step is rejected, so it costs calls, not truth

    With a guided score the run follows the guided densities themselves, p_u^(1-w) p_c^w at every level, and ends in the
    last one: `guidance.ramp` makes that path short.  Moves do not carry mass between modes that are far apart at that
    noise; `guidance.feynman_kac` weighs it.  Each sample decides for itself, by its own stream.
    Network calls: 2 n + 1 a step where n > 0.
    """
    N, times = len(ts) - 1, ts.tolist()
    each = [n] * N if isinstance(n, int) else list(n)
    if len(each) != N or min(each) < 0:
        raise ValueError(f"n must be >= 0, one number or one for each of {N} steps, got {n}")
    if not 0 < step < math.inf or not 0 <= width < math.inf:
        raise ValueError(
            f"step must be positive, width >= 0 and both finite, got {step} and {width}; 0.3 and 0 suit most"
        )
    if ts[-1] == 0 and each[-1]:
        raise ValueError("the grid ends at t = 0, where the score is singular; end it at sde.t_min, or let n end in 0")
    e = (step * (sde.sigma(ts) ** 2 + (sde.alpha(ts) * width) ** 2)).tolist()[1:]

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor | None:
        if i >= N or float(t) != times[i + 1]:
            raise ValueError(
                f"step {i + 1} ended at t = {float(t):.6g}, not that of ts; give metropolis the run's own grid"
            )
        if not each[i]:
            return None
        s = checked(score(x, t), x)
        for _ in range(each[i]):
            d = s.mul(e[i]).add_(noise(x), alpha=math.sqrt(2 * e[i]))
            mid, s1 = checked(score(x + d / 2, t), x), checked(score(x + d, t), x)
            simpson = _dot(4 * mid - 2 * s - 2 * s1, d) / 6  # less the trapezoid, which cancels in the proposal's ratio
            a = simpson - e[i] / 4 * (_dot(s1, s1) - _dot(s, s))
            u = torch.special.ndtr(noise(x.new_empty(len(x), 1)).to(wide(x)))[:, 0]
            accept = (u.log() < a).reshape(-1, *[1] * (x.ndim - 1))
            x, s = torch.where(accept, x + d, x), torch.where(accept, s1, s)
        return x

    return hook


def relax(
    score: Score,
    sde: SDE,
    n: int = 3,
    *,
    step: float = 0.7,
    friction: float = 0.2,
    noise: Noise = torch.randn_like,
) -> Hook:
    """n steps of kinetic Langevin dynamics at t_after, with the density whose score is given   (BAOAB).

        v <- v + h sigma s;  x <- x + h sigma v/2;  v <- a v + sqrt(1 - a^2) z;  x <- x + h sigma v/2

    a = exp(-friction h), h = step; v goes on from one level to the next.  (Leimkuhler & Matthews 2013.)
    step:     in sigma, in (0, sqrt(2)) for `anneal`, below 2 for a p_t
    friction: per unit of time; inf forgets v: x1 = x + e s + sqrt(2 e) (z + z1)/2, e = (step sigma)^2/2, each z twice

    The stationary variance of a Gaussian at one level is exact whatever the step.  n network calls a step of the
    sampler.  A hook for one run: it holds v.
    """
    if n < 1:
        raise ValueError(f"n, the number of steps at a level, must be at least 1, got {n}")
    if not (0 < step < 2 and friction > 0):
        raise ValueError(f"step must lie in (0, 2) and friction be positive, got {step} and {friction}")
    keep = math.exp(-friction * step)
    kick = math.sqrt(-math.expm1(-2 * friction * step))
    held: dict[str, Tensor] = {}

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor | None:
        if float(t) == 0:
            return None
        v = noise(x) if i == 0 else held["v"]
        h = step * float(sde.sigma(t))
        for _ in range(n):
            v = v.add(score(x, t), alpha=h)
            x = x.add(v, alpha=h / 2)
            v = v.mul(keep).add_(noise(x), alpha=kick)
            x = x.add(v, alpha=h / 2)
        held["v"] = v
        return x

    return hook


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample, (B,) float64 where the device has it: a is a small difference of large numbers."""
    return (a * b).flatten(1).sum(1, dtype=wide(a))

"""Feynman-Kac correction: a guided run whose samples are weighted and resampled, so that they follow the tilted path.

Along any path q_t ~ p_u^(1-w) p_c^w, in y = x/alpha at noise theta = (sigma/alpha)^2, each p obeys the heat equation
d log p/d theta = (div s + |s|^2)/2.  Transport by the flow of s_w = s_u + w (s_c - s_u), with Langevin noise on
top of it or without, leaves the divergences cancelled and the weight

    d log W = (|s_w|^2 - (1-w) |s_u|^2 - w |s_c|^2)/2 d(-theta) = w (w - 1) |s_c - s_u|^2 / 2 d(-theta)

(Skreta 2025, Feynman-Kac correctors, for the SDE; the same for the flow, where no noise enters the integral.)
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from guidance.resample import effective, systematic, temper
from scoresde.model import evaluate
from scoresde.types import SDE, Hook, Noise, Score, instant, wide


class FeynmanKac(NamedTuple):
    """A guided score, the hook that weighs and resamples, and what it saw."""

    score: Score
    hook: Hook
    ess: list[Tensor]  # effective sample size after each step, as a share of the particles, ()


def feynman_kac(
    cond: Score,
    uncond: Score,
    w: float,
    sde: SDE,
    ts: Tensor,
    *,
    threshold: float = 0.5,
    alarm: float = 0.01,
    noise: Noise = torch.randn_like,
) -> FeynmanKac:
    """cfg's score and a hook that makes the batch n particles of the density p_u^(1-w) p_c^w at every time of ts.

        fk = feynman_kac(cond, uncond, w, sde, ts)
        x = samplers.heun(fk.score, sde, x, ts, on_step=[fk.hook, samplers.metropolis(fk.score, sde, ts, 2)])

    The weight is integrated by the trapezoid over the calls that the sampler makes in a step: order 2 with `heun`, 1
    with one-call samplers.  With moves between (`metropolis`) particles forget their common ancestors; without them a
    deterministic sampler leaves weights of infinite variance (Gaussians, w = 3: 0.4 % of 2000 particles count), and
    `ancestral` needs several hundred steps.

    w:         a number; 0 unconditional and 1 conditional: the weights stay equal (off)
    threshold: in (0, 1).  When the effective share of the particles falls below it they are resampled, systematically,
               by W^tau with the largest tau that keeps the share at the threshold; W^(1-tau) stays with them.
               After the last step everything left is resampled
    alarm:     below this share in any step the run stops, since a few particles stand for all; 0 never
    One run each: the hook keeps the weights, and comes before hooks that ask its score (moves).  Samples of a batch
    depend on one another by design.
    Bias: of the order of 1/n, and of the step; w (w - 1) |s_c - s_u|^2 is large where p_c << p_u, so start the grid
    well inside the noise and take 60 steps or more.  Waits for the device once a step.
    Network calls: the sampler's own.
    """
    if not isinstance(w, int | float) or not math.isfinite(w):
        raise ValueError(f"w must be a finite number, the same for all particles, got {w}")
    if not 0 < threshold < 1 or not 0 <= alarm < threshold:
        raise ValueError(f"0 <= alarm < threshold < 1 wanted, got alarm = {alarm}, threshold = {threshold}")
    asked: dict[float, Tensor] = {}  # sigma/alpha -> rate of log W there, (n,), of the last call at that time
    times = ts.tolist()
    log_w: Tensor | None = None
    ess: list[Tensor] = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        t = instant(sde, t)
        s_c, s_u = evaluate((cond, uncond), x, t)
        gap = s_c - s_u
        a2 = float(sde.alpha(t)) ** 2
        asked[float(torch.exp(-sde.lam(t)))] = w * (w - 1) / 2 * a2 * gap.to(wide(x)).square().flatten(1).sum(1)
        return s_u + w * gap

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor | None:
        nonlocal log_w
        if i >= len(times) - 1 or float(t) != times[i + 1]:
            raise ValueError(
                f"step {i + 1} ended at t = {float(t):.6g}, not that of ts; give feynman_kac the run's own grid"
            )
        r1, last = float(torch.exp(-sde.lam(t))), i == len(ts) - 2
        points = sorted(((r, rate) for r, rate in asked.items() if r >= r1 * (1 - 1e-12)), key=lambda p: -p[0])
        if not points:
            raise ValueError("the sampler did not ask feynman_kac's own score in this step; give it fk.score")
        if points[-1][0] > r1 * (1 + 1e-12):
            points.append((r1, points[-1][1]))
        log_w = x.new_zeros(len(x), dtype=wide(x)) if log_w is None else log_w
        for (r, rate), (r2, rate2) in itertools.pairwise(points):
            log_w = log_w + (r - r2) * (r * rate + r2 * rate2)  # d theta = 2 r dr
        asked.clear()
        share = effective(log_w[None])[0]
        ess.append(share)
        if alarm and not float(share) >= alarm:
            raise FloatingPointError(
                f"after step {i + 1}, at t = {float(t):.4g}, {len(x)} particles are worth {float(share) * len(x):.1f}: "
                "a few stand for all. Take a finer grid at high noise, a smaller w, or moves after each step "
                "(samplers.metropolis); alarm=0 goes on regardless"
            )
        if float(share) >= threshold and not last:
            return None
        tau = 1.0 if last else float(temper(log_w[None], threshold))
        index = systematic(torch.softmax(tau * log_w[None], 1), noise(x.new_empty(len(x), 1))[0])[0]
        log_w = ((1 - tau) * log_w)[index]
        return x[index]

    return FeynmanKac(score, hook, ess)

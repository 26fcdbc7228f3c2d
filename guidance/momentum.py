"""Adaptive projected guidance with its momentum: a memory across the steps of one run.

s, memory = apg_momentum(cond, uncond, w, sde=sde, beta=-0.5)
x = ddim(s, sde, x, ts, on_step=memory)         # or any sampler that takes its steps one after the other
"""

import math

import torch
from torch import Tensor

from guidance.project import apg
from guidance.weights import Interval, Weight, acting, chosen
from scoresde.model import evaluate
from scoresde.types import SDE, Hook, Score, like


def apg_momentum(
    cond: Score,
    uncond: Score,
    w: Weight,
    *,
    sde: SDE,
    beta: float,
    eta: float = 0.0,
    threshold: float = math.inf,
    interval: Interval | None = None,
) -> tuple[Score, Hook]:
    """x0 = x0_c + (w - 1) [perp(m; x0_c) + eta par(m; x0_c)],  m = d + beta m'   (Sadat 2024, algorithm 1).

    d:    x0_c - x0_u;  m': m of the step before, at its first call; 0 in the first step
    beta: in (-1, 1); 0 is `apg`, negative in the paper
    The rest as in `apg`: m is shortened to the threshold, not what is remembered.  Outside the interval: s_c, m' = 0.

    Within a step m' is constant, so Heun's second call sees the same memory.  The hook ends the step: without it this
    is `apg`.  Among hooks that call the score it comes last.  A step from the run's first noise, or above, starts
    without memory (the next run, time travel to the start).

    Bias: m = d + beta d' + beta^2 d'' + ... over the steps, so with more of them, at fixed t, it becomes d/(1 - beta):
    `apg` of weight 1 + (w - 1)/(1 - beta) and threshold (1 - beta) threshold, whose bias it has.
    Network calls: one for two `Model`s of the same network, else two; one where the rule is off.
    """
    if not -1 < beta < 1:
        raise ValueError(f"beta must lie in (-1, 1), else the memory never fades; got {beta}")
    if apg(cond, uncond, w, sde=sde, eta=eta, threshold=threshold, interval=interval) is cond:  # checks them all
        return cond, lambda i, t, x: None
    before: Tensor | None = None
    now: Tensor | None = None
    started, top = False, -math.inf

    def guided(x: Tensor, t: Tensor) -> Tensor:
        nonlocal before, now, started, top
        first, started = not started, True
        if first and float(t.max()) >= top:
            before, top = None, float(t.max())
        act = acting(interval, sde, t)
        if act is False:
            return cond(x, t)
        s_c, s_u = evaluate((cond, uncond), x, t)
        unit = like(sde.sigma(t) ** 2 / sde.alpha(t), x)
        if before is not None:
            if before.shape != x.shape:
                raise ValueError(
                    f"the score was called on {tuple(x.shape)}, the memory is of {tuple(before.shape)}: momentum needs "
                    "a sampler that moves the whole batch step by step"
                )
            s_u = s_u - beta * before / unit
        if first:
            m = unit * (s_c - s_u)
            now = chosen(act, m, torch.zeros_like(m))
        s = apg(lambda x, t: s_c, lambda x, t: s_u, w, sde=sde, eta=eta, threshold=threshold)(x, t)
        return chosen(act, s, s_c)

    def end(i: int, t: Tensor, x: Tensor) -> None:
        nonlocal before, now, started
        if top == -math.inf:
            raise ValueError("the sampler did not call the score that apg_momentum returned: give it both")
        if i == 0 and before is not None:
            raise ValueError("the memory is of another run, from more noise; call apg_momentum anew for each run")
        if started:
            before, now, started = now, None, False

    return guided, end

"""Classifier-free guidance."""

import torch
from torch import Tensor

from guidance.rows import by_rows
from guidance.weights import Interval, Weight, acting, check_weight, weight_at
from scoresde.model import evaluate
from scoresde.types import SDE, Score, like


@by_rows("cond", "uncond", each=["w"])
def cfg(cond: Score, uncond: Score, w: Weight, *, sde: SDE | None = None, interval: Interval | None = None) -> Score:
    """s = s_u + w (s_c - s_u)   (Ho & Salimans 2022; w here is their 1 + w).

    w:        0 unconditional, 1 conditional (off), > 1 guided; a number, (B,), or a function of
              r = sigma/alpha
    uncond:   the unconditional score, or that of a negative condition: s = s_n + w (s_c - s_n); of a weaker network
              (autoguidance, Karras 2024); of the same network told to do without a layer (PAG, SLG, see
              `nets.UNet`: m.given(without="weights"); their scale is w - 1)
    interval: (low, high) in sigma/alpha; outside it s = s_c   (Kynkaanniemi 2024)
    sde:      needed for a weight that depends on sigma and for an interval

    Bias: the result samples neither p_c nor the tilted density p_u^(1-w) p_c^w of the data, because
    noising does not commute with tilting; only for equal covariances at every t does it.
    Network calls: one for two `Model`s of the same network (a batch of 2 B), else two; one of B where
    the rule is off: w the plain number 0 or 1, or outside the interval.
    """
    check_weight(w, sde, interval)
    if not isinstance(w, Tensor) and not callable(w):
        if w == 1:
            return cond
        if w == 0 and interval is None:
            return uncond
    off = not isinstance(w, Tensor) and not callable(w) and w == 0  # inside the interval: s_u alone

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        if act is False:
            return cond(x, t)
        if off and act is True:
            return uncond(x, t)
        s_c, s_u = evaluate((cond, uncond), x, t)
        s = torch.lerp(s_u, s_c, weight_at(w, sde, x, t))
        return s if act is True else torch.where(like(act, x).bool(), s, s_c)

    return guided

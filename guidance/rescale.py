"""Guidance that keeps the contrast of the conditional prediction."""

from collections.abc import Callable

import torch
from torch import Tensor

from guidance.cfg import cfg
from guidance.rows import by_rows
from guidance.weights import Interval, Weight, check_weight, inside
from scoresde.convert import convert, line
from scoresde.types import SDE, Score, like

LINEAR = ("score", "eps", "x0", "v", "velocity")


@by_rows("cond", "uncond", each=["w"])
def rescale(
    cond: Score,
    uncond: Score,
    w: Weight,
    *,
    sde: SDE,
    strength: float = 0.7,
    kind: str = "x0",
    rule: Callable[..., Score] = cfg,
    interval: Interval | None = None,
) -> Score:
    """p' = k p_g,  k = 1 + strength (std(p_c)/std(p_g) - 1)   (Lin 2024, eq. 14 to 16).

    p_c, p_g: the conditional and the guided prediction of `kind`; std over the numbers of one sample
    strength: in [0, 1]; 0 off (p_g), 1 has exactly the conditional's standard deviation
    kind:     "x0" (what is overexposed), or what Lin's network predicts, "v", or "eps" (= "score") ...
    rule:     the guidance, (cond, uncond, w, sde=) -> Score: cfg, or partial(apg, eta=0.5), ...
    w:        as in the rule; 1 is the conditional score
    interval: (low, high) in sigma/alpha; outside it s = s_c

    In scores, with p = b (s + h x): s' = k s_g + (k - 1) h x.
    Bias: that of the rule, and k pulls back: for isotropic Gaussians of mean 0 (and a guided prediction
    that keeps its sign) it is cfg with w' = (1 - strength) w + strength: strength 1 is no guidance.
    Network calls: one for two `Model`s of the same network, else two; one where the rule is off.
    """
    check_weight(w, sde, interval)
    check_kind(kind)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    whole = rule(cond, uncond, w, sde=sde, interval=interval)
    if strength == 0 or whole is cond:
        return whole

    def rescaled(x: Tensor, t: Tensor, s_c: Tensor, s_u: Tensor) -> Tensor:
        if s_c[0].numel() < 2:
            raise ValueError("a sample of one number has no standard deviation; rescale is for two or more")
        s_g = rule(lambda x, t: s_c, lambda x, t: s_u, w, sde=sde)(x, t)
        std_c, std_g = (convert(s, x, t, sde, "score", kind).flatten(1).std(1) for s in (s_c, s_g))
        k = like(1 + strength * (ratio(std_c, std_g, 1.0) - 1), x)
        return k * s_g + (k - 1) * like(origin(kind, sde, t), x) * x

    return inside(interval, sde, (cond, uncond), rescaled)


def check_kind(kind: str) -> None:
    if kind not in LINEAR:
        raise ValueError(f"unknown prediction {kind!r} for this rule; choose one of {', '.join(LINEAR)}")


def origin(kind: str, sde: SDE, t: Tensor) -> Tensor:
    """h of prediction = b (s + h x): what one has to add to a score so that scaling it scales the prediction."""
    a, b = line("score", kind, sde, t)
    return a / b


def ratio(a: Tensor, b: Tensor, otherwise: float = 0.0) -> Tensor:
    """a/b, or `otherwise` where b = 0."""
    none = b == 0
    return torch.where(none, otherwise, a / torch.where(none, 1.0, b))

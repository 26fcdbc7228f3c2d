"""Guidance by projections: what of one prediction lies along another, sample by sample.

par(d; y) = (<d, y>/|y|^2) y,   perp(d; y) = d - par(d; y),   over all the numbers of a sample; par(d; 0) = 0

Projections commute with orthogonal maps of the sample, so these rules do.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from guidance.cfg import cfg
from guidance.rescale import check_kind, origin, ratio
from guidance.rows import by_rows
from guidance.weights import Interval, Weight, acting, check_weight, chosen, inside, is_number, weight_at
from scoresde.convert import convert, denoised
from scoresde.types import SDE, Score, like


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of every sample, (B,)."""
    return (a * b).flatten(1).sum(1)


def par(d: Tensor, y: Tensor) -> Tensor:
    """The part of d along y."""
    return like(ratio(dot(d, y), dot(y, y)), y) * y


@by_rows("cond", "uncond", each=["w"])
def apg(
    cond: Score,
    uncond: Score,
    w: Weight,
    *,
    sde: SDE,
    eta: float = 0.0,
    threshold: float = math.inf,
    interval: Interval | None = None,
) -> Score:
    """x0 = x0_c + (w - 1) [perp(d; x0_c) + eta par(d; x0_c)]   (Sadat 2024, adaptive projected guidance).

    d:         x0_c - x0_u, shortened to |d| = threshold where it is longer
    w:         1 conditional (off), > 1 guided; a number, (B,), or a function of sigma/alpha
    eta:       0 without the part along x0_c, which saturates; 1 with all of it
    threshold: > 0, in units of x0, of the whole sample's norm (it grows like sqrt(D)); inf: none
    interval:  (low, high) in sigma/alpha; outside it s = s_c
    eta = 1 and threshold = inf is `cfg`.  The paper's momentum is a memory across steps: `apg_momentum`.

    Bias: what is left out is a part of CFG's own push, which is biased already; no target is known.
    Network calls: one for two `Model`s of the same network, else two; one where the rule is off.
    """
    check_weight(w, sde, interval)
    if not threshold > 0:
        raise ValueError(f"threshold must be positive (inf for none), got {threshold}")
    if not math.isfinite(eta):
        raise ValueError(f"eta must be finite, got {eta}")
    if is_number(w, 1):
        return cond

    def projected(x: Tensor, t: Tensor, s_c: Tensor, s_u: Tensor) -> Tensor:
        d = s_c - s_u  # (alpha/sigma^2) (x0_c - x0_u)
        if threshold < math.inf:
            gap = like(sde.sigma(t) ** 2 / sde.alpha(t), x) * d
            d = d / like((dot(gap, gap).sqrt() / threshold).clamp(min=1), x)
        along = par(d, denoised(s_c, x, t, sde))
        return s_c + (weight_at(w, sde, x, t) - 1) * (d + (eta - 1) * along)

    return inside(interval, sde, (cond, uncond), projected)


@by_rows("cond", "uncond", each=["w"])
def zero_star(
    cond: Score,
    uncond: Score,
    w: Weight,
    *,
    sde: SDE,
    kind: str = "velocity",
    zeroed: Interval | None = None,
    interval: Interval | None = None,
) -> Score:
    """p = z p_u + w (p_c - z p_u),  z p_u = par(p_c; p_u)   (Fan 2025, CFG-Zero*).

    z = <p_c, p_u>/|p_u|^2, fitted for each sample, minimises |p_c - z p_u|
    p:        predictions of `kind`: the paper's are velocities of the flow (those of `Straight`, eps - x0)
    w:        1 conditional (off), > 1 guided, 0 is z p_u; a number, (B,), or a function of sigma/alpha
    zeroed:   (low, high) in sigma/alpha where the flow stands still, s = 2 f x/g^2, and no network is
              called; the paper's first 4 % of the steps on `Straight` are (24, inf)
    interval: (low, high) in sigma/alpha; outside it s = s_c

    Bias: as cfg, with another field in the place of s_u that is nobody's score.
    Network calls: one for two `Model`s of the same network, else two; one where the rule is off.
    """
    check_weight(w, sde, interval)
    check_weight(w, sde, zeroed)
    check_kind(kind)

    def fitted(x: Tensor, t: Tensor, s_c: Tensor, s_u: Tensor) -> Tensor:
        p_c, p_u = (convert(s, x, t, sde, "score", kind) for s in (s_c, s_u))
        z = like(ratio(dot(p_c, p_u), dot(p_u, p_u)), x)
        return torch.lerp(z * s_u + (z - 1) * like(origin(kind, sde, t), x) * x, s_c, weight_at(w, sde, x, t))

    guided = cond if is_number(w, 1) else inside(interval, sde, (cond, uncond), fitted)
    if zeroed is None:
        return guided

    def still(x: Tensor, t: Tensor) -> Tensor:
        act = acting(zeroed, sde, t)
        if act is False:
            return guided(x, t)
        rest = like(2 * sde.drift(t) / sde.diffusion(t) ** 2, x) * x
        return rest if act is True else chosen(act, rest, guided(x, t))

    return still


@by_rows("cond", "uncond", each=["w"])
def tangential(
    cond: Score, uncond: Score, w: Weight, *, sde: SDE | None = None, interval: Interval | None = None
) -> Score:
    """s = s_v + w (s_c - s_v),  s_v = par(s_u; v)   (Kwon 2025, TCFG).

    v:        the first right singular vector of the two rows s_c, s_u; by the 2 x 2 eigenproblem,
              s_v = (cu/h) s_c + (1 - (cc - uu)/h)/2 s_u,  h^2 = (cc - uu)^2 + 4 cu^2,
              with cc = |s_c|^2, uu = |s_u|^2, cu = <s_c, s_u>
    w:        1 conditional (off), > 1 guided, 0 is s_v; a number, (B,), or a function of sigma/alpha
    interval: (low, high) in sigma/alpha; outside it s = s_c
    eps instead of scores gives the same.  It is `cfg` where the two are parallel.

    Bias: as cfg, with another field in the place of s_u; where |s_c| and |s_u| cross it jumps.
    Network calls: one for two `Model`s of the same network, else two; one where the rule is off.
    """
    check_weight(w, sde, interval)
    if is_number(w, 1):
        return cond

    def damped(x: Tensor, t: Tensor, s_c: Tensor, s_u: Tensor) -> Tensor:
        gap, cu = dot(s_c, s_c) - dot(s_u, s_u), dot(s_c, s_u)
        h = torch.hypot(gap, 2 * cu)
        s_v = like(ratio(cu, h), x) * s_c + like((1 - ratio(gap, h)) / 2, x) * s_u
        return torch.lerp(s_v, s_c, weight_at(w, sde, x, t))

    return inside(interval, sde, (cond, uncond), damped)


@by_rows("cond", "uncond", "negatives", each=["w"], lists=["weights"])
def perp_neg(
    cond: Score,
    uncond: Score,
    w: Weight,
    negatives: Sequence[Score],
    weights: Sequence[Weight],
    *,
    sde: SDE | None = None,
    interval: Interval | None = None,
) -> Score:
    """s = s_u + w (d - sum_i w_i perp(d_i; d)),  d = s_c - s_u,  d_i = s_i - s_u   (Armandpour 2023, Perp-Neg).

    negatives: scores of the conditions to keep away from
    weights:   w_i > 0 pushes away; 0 is off (all 0: `cfg`)
    w:         0 unconditional; numbers, (B,), or functions of sigma/alpha
    interval:  (low, high) in sigma/alpha; outside it s = s_c
    A negative along d adds nothing; one orthogonal to it is `conjunction`'s NOT of weight w w_i.

    Bias: as `product`, and the projection makes it no sum of scores at all.
    Network calls: one for all `Model`s of the same network, one for each other score.
    """
    if len(negatives) != len(weights):
        raise ValueError(f"give one weight a negative, got {len(negatives)} negatives and {len(weights)} weights")
    for v in (w, *weights):
        check_weight(v, sde, interval)
    on = [(s, v) for s, v in zip(negatives, weights, strict=True) if not is_number(v, 0)]
    if not on or is_number(w, 0):
        return cfg(cond, uncond, w, sde=sde, interval=interval)

    def away(x: Tensor, t: Tensor, s_c: Tensor, s_u: Tensor, *values: Tensor) -> Tensor:
        d = s_c - s_u
        push = d
        for s, (_, v) in zip(values, on, strict=True):
            push = push - weight_at(v, sde, x, t) * (s - s_u - par(s - s_u, d))
        return s_u + weight_at(w, sde, x, t) * push

    return inside(interval, sde, (cond, uncond, *(s for s, _ in on)), away)

"""Restart: a deterministic sampler that goes back up in noise and down again."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplers.heun import heun
from samplers.hooks import shifted
from samplers.kernels import forward_kernel
from samplers.loop import check
from scoresde.types import SDE, Hook, Noise, Score


def restart(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    intervals: Sequence[tuple[float, float, int]] = (),
    sampler: Callable[..., Tensor] = heun,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """Down the grid by `sampler`; K times from r_min back to r_max and down again   (Xu 2023, algorithm 1).

        up, by the exact forward kernel:  x <- (alpha_max/alpha_min) x + G z
        G^2 = sigma_max^2 - (alpha_max/alpha_min)^2 sigma_min^2

    intervals: (r_min, r_max, K) in sigma/alpha, K >= 0; each end stands for the grid point nearest to it
               in log(sigma/alpha).  Intervals run as the grid comes to their r_min.  None: the plain sampler
    sampler:   of this library, with its knobs as functools.partial; without noise of its own, it is the paper's
    x, ts and the rest as `euler_maruyama`.  One z a restart; hooks see every step, the repeated ones
    again with the same i.

    The kernel keeps the marginals, so the weak order is the sampler's: for `heun` order 2, and
    2N network calls, plus 2K for each step of the grid between r_min and r_max.
    """
    check(sde, x, ts)
    pieces = _pieces(sde, ts, intervals)
    hooks = (on_step,) if callable(on_step) else tuple(on_step)
    at = 0
    for first, last in pieces:
        if first < at:
            r, G2 = forward_kernel(sde, ts[[first, at]])
            x = x.mul(float(r)).add_(noise(x), alpha=math.sqrt(float(G2)))
        x = sampler(
            score, sde, x, ts[first : last + 1], noise=noise, on_step=[shifted(h, first) for h in hooks], grad=grad
        )
        at = last
    return x


def _pieces(sde: SDE, ts: Tensor, intervals: Sequence[tuple[float, float, int]]) -> list[tuple[int, int]]:
    """The runs (first, last) in points of the grid, in order; a first above the last before it is a restart."""
    u = -sde.lam(ts)  # log(sigma/alpha), decreasing; -inf at t = 0
    plan = []
    for low, high, K in intervals:
        if not (0 < low < high and math.isfinite(high)) or K < 0:
            raise ValueError(
                f"an interval is (r_min, r_max, K) with 0 < r_min < r_max and K >= 0, got {(low, high, K)}"
            )
        top, bottom = float(u[0].exp()), float(u[-1].exp())
        if high > top * (1 + 1e-9) or low < bottom * (1 - 1e-9):
            raise ValueError(
                f"the interval from sigma/alpha = {low:.6g} to {high:.6g} must lie within the grid's, "
                f"{bottom:.6g} to {top:.6g}"
            )
        up, down = (int((u - math.log(r)).abs().argmin()) for r in (high, low))
        if up == down:
            raise ValueError(
                f"no step of the grid lies between sigma/alpha = {low:.6g} and {high:.6g}: both are nearest to "
                f"{float(u[up].exp()):.6g}; take a finer grid or a wider interval"
            )
        if K:
            plan.append((down, up, K))
    pieces, at = [], 0
    for down, up, K in sorted(plan, key=lambda p: p[0]):  # stable: equal ends in the order given
        if down > at:
            pieces.append((at, down))
        pieces += [(up, down)] * K
        at = down
    if at < len(ts) - 1:
        pieces.append((at, len(ts) - 1))
    return pieces

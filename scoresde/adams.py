"""Adams' method with the step and the order of each sample's own, one evaluation a step.

With u_0 = u, u_1, ... the last points of a sample, newest first, and divided differences D_j = f[u_0, ..., u_j], the
field is Newton's polynomial sum_{j<k} D_j prod_{i<j} (s - u_i).  A step from u to u + h is

    predicted   y_p = y + sum_{j<k} C_j D_j,     C_j = int_u^{u+h} prod_{i<j} (s - u_i) ds
    evaluated   D'_0 = f(u + h, y_p),            D'_{j+1} = (D'_j - D_j) / (u + h - u_j)
    corrected   y1 = y_p + C_k D'_k

and D' are the next step's differences (PEC: the corrected state is not evaluated again).  Order k + 1.  What the oldest
point adds to a corrector of order j is e_j = |D'_j (C_j - (u + h - u_{j-1}) C_{j-1})|, which falls as h^(j+1):
e_k is the error that is kept below the tolerance, and the next order is the one of k - 1, k, k + 1 that promises
the longest step   (Shampine & Gordon 1975; Hairer, Norsett & Wanner, Solving ODEs I, III.5).
"""

import numpy as np
import torch
from torch import Tensor

from scoresde.each import Field, Rows, State, power, rms, until_all_arrive
from scoresde.types import like, wide

ORDERS = 8
MARGIN = 0.003
"""Errors e_k are held to this part of the tolerance, so that the error at the end meets the whole: a multistep method's
errors add up, and a flow with several modes enlarges early ones.  On the nine mixtures of `experiments.problems`, 256
samples, rtol = atol = 1e-3 to 1e-7, the worst sample ends within 1.7 tolerances; of 1024 others one does not, which
starts beside a separatrix, where there is no bound (70, at 1e-3).  Twice this makes it 3.5, for 10 % fewer calls."""
SAFE = 0.6
"""A step is this part of what the estimate allows: one of 27 is rejected (with 0.9 one of 4, and errors are 3 to 10
times as large: after a long step the interpolation is not what its estimate says)."""
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(5)  # exact to degree 9


def adams_each(
    rhs: Field,
    y: Tensor,
    u: float,
    u1: float,
    *,
    rtol: float,
    atol: float,
    rows: Rows | None = None,
    max_steps: int = 10_000,
) -> Tensor:
    """y(u1) from y(u), y (B, ...).

    Each row keeps RMS e_k / (atol + rtol max(|y|, |y1|)) under `MARGIN`.
    rows:  rows(index) is the field of rows index of y, then arrived rows leave; None: they stay

    One evaluation a step, rejected ones too, and one; a batch makes as many calls as its slowest row.
    Order 1 to `ORDERS`, starting at 1.  Memory: about 4 `ORDERS` states.
    """
    if u == u1:
        return y
    span = u1 - u
    unit = span / 128  # of the differences: no power of a step leaves the range of float32
    number = torch.arange(ORDERS, device=y.device)[:, None]

    def step(rhs: Field, _: Tensor, at: Tensor, h: Tensor, y: Tensor, k: Tensor, past: Tensor, D: Tensor) -> State:
        """k (B,) the order; past (B, ORDERS) and D (B, ORDERS, ...), newest first; past is infinite where unknown."""
        ending = (u1 - at - h) / span <= 1e-12
        h = torch.where(ending, u1 - at, h)
        at1 = torch.where(ending, u1, at + h)
        C = _integrals(at, h, past.T, unit)
        gaps = torch.where(h != 0, (at1 - past.T) / unit, torch.inf)
        y1 = y
        for c, d in zip(torch.where(number < k, C[:-1], 0.0), D.unbind(1), strict=True):
            y1 = y1 + like(c, y) * d
        D1 = [rhs(at1, y1)]
        for d, gap in zip(D.unbind(1), gaps, strict=True):
            D1.append((D1[-1] - d) / like(gap, y))
        new, row = torch.stack(D1), torch.arange(len(y), device=y.device)
        y1 = y1 + like(C[k, row], y) * new[k, row]
        allowed = (MARGIN * (atol + rtol * torch.maximum(y.abs(), y1.abs()))).detach()
        sizes = torch.stack([rms(d.detach() / allowed).to(at) for d in new[1:]])
        e = sizes * (C[1:] - gaps * C[:-1]).abs()
        e = torch.where(torch.isfinite(e), e, torch.inf)
        accept = e[k - 1, row] <= 1
        offer = SAFE * power(e.clamp(min=1e-12), -1 / (number + 2))
        offered = ((number + 1 - k).abs() <= 1) & (accept | (number < k))
        by, best = torch.where(offered, offer, -1.0).max(0)
        chosen = accept.reshape(-1, *[1] * (y.ndim - 1))
        return (
            torch.where(accept, at1, at),
            h * torch.where(accept, by.clamp(0.2, 2.0), by.clamp(0.1, 0.9)),
            torch.where(chosen, y1, y),
            best + 1,
            torch.where(accept[:, None], torch.cat([at1[:, None], past[:, :-1]], 1), past),
            torch.where(chosen[:, None], new[:-1].movedim(0, 1), D),
        )

    at = torch.full((len(y),), u, dtype=wide(y), device=y.device)
    past = torch.cat([at[:, None], at.new_full((len(y), ORDERS - 1), torch.inf)], 1)
    first = rhs(at, y)
    D = torch.stack([first, *[torch.zeros_like(first)] * (ORDERS - 1)], 1)
    state = (at, torch.full_like(at, span / 256), y, torch.ones_like(at, dtype=torch.long), past, D)
    return until_all_arrive(step, rhs, state, u, u1, rtol=rtol, atol=atol, rows=rows, max_steps=max_steps)


def _integrals(at: Tensor, h: Tensor, past: Tensor, unit: float) -> Tensor:
    """C_j, (ORDERS + 1, B): the integral from at to at + h of prod_{i<j} (s - past_i)/unit, j = 0..ORDERS."""
    q, w = (torch.from_numpy(v).to(at)[:, None, None] for v in (_NODES, _WEIGHTS))
    factors = ((at + (1 + q) / 2 * h - past) / unit).cumprod(1)  # (5, ORDERS, B)
    first, *rest = (w / 2 * h * torch.cat([torch.ones_like(factors[:, :1]), factors], 1)).unbind()
    return sum(rest, first)

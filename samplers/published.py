"""Weights as published and run by everyone, where they differ from the exact integrals.

Rules for `samplers.adams.adams(rule=...)`.  Known so that published results can be reproduced; the
exact weights are the default everywhere.  A step to r = 0 takes the newest value alone.
"""

import torch
from torch import Tensor

from samplers.exponential import Nodes, weights

Step = tuple[Tensor, Tensor, Tensor]

AB = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def adams_bashforth(at: Nodes, start: Tensor, end: Tensor, known: Tensor, tau: Tensor) -> Step:
    """The first-order weight times the classical weights of equal steps   (Liu 2022, PNDM, eq. 13)."""
    a, W, c = weights(at, start, end, known[:, :1], tau)
    return a, W * W.new_tensor(AB[known.shape[1]]), c


def dpmpp(at: Nodes, start: Tensor, end: Tensor, known: Tensor, tau: Tensor) -> Step:
    """DPM-Solver++ 2M and 3M, data and noise form, flow and SDE   (Lu 2022b, eq. 15 and its authors' program).

    Two values: half the slope with the first-order weight ("midpoint").  Three: phi_2 D1 - phi_3 D2 with
    D2 the divided difference, where the exact weight is 2 phi_3: so the method is order 2, not 3.
    """
    a, W, c = weights(at, start, end, known[:, :1], tau)
    K = known.shape[1]
    if K == 1:
        return a, W, c
    lam = -torch.log(at.r)
    h = lam[end] - lam[start]
    r0 = (lam[known[:, 0]] - lam[known[:, 1]]) / h
    if K == 2:
        return a, _newest(at, end, torch.cat([W * (1 + 0.5 / r0)[:, None], -W * (0.5 / r0)[:, None]], 1), W), c
    if K > 3:
        raise ValueError(f"DPM-Solver++ has orders 1 to 3, got {K}")
    r1 = (lam[known[:, 1]] - lam[known[:, 2]]) / h
    if at.form.d == 0:
        k = (1 + tau**2) * h
        p2 = torch.expm1(-k) / k + 1
        p3 = p2 / k - 0.5
        size = at.sde.alpha(at.t[end])
        p3 = -p3
    else:
        if bool((tau != 0).any()):
            raise ValueError("order 3 of the published SDE solver exists in data form only; use d = 0")
        p2 = torch.expm1(h) / h - 1
        p3 = p2 / h - 0.5
        size = at.sde.sigma(at.t[end])
    s = r0 / (r0 + r1)
    # D1 = u + s (u - v), D2 = (u - v)/(r0 + r1), u = (V0 - V1)/r0, v = (V1 - V2)/r1
    du = size * (p2 * (1 + s) + p3 / (r0 + r1))
    dv = -size * (p2 * s + p3 / (r0 + r1))
    return a, _newest(at, end, torch.stack([W[:, 0] + du / r0, -du / r0 + dv / r1, -dv / r1], 1), W), c


def _newest(at: Nodes, end: Tensor, b: Tensor, W: Tensor) -> Tensor:
    """b, where the step goes to r = 0 the first-order W of the newest value alone."""
    alone = torch.cat([W, torch.zeros_like(b[:, 1:])], 1)
    return torch.where((at.r[end] == 0)[:, None], alone, b)


def unipc(at: Nodes, start: Tensor, end: Tensor, known: Tensor, tau: Tensor, *, bh1: bool = False) -> Step:
    """UniPC: exact but for the predictor with two values and the corrector with one old   (Zhao 2023, eq. 5-9).

    There the published weight is 1/2 of B(h) = e^h - 1 (bh2) or h (bh1).
    """
    predictor = bool((known[:, 0] == start).all())
    K = known.shape[1]
    if K != 2:
        return weights(at, start, end, known, tau)
    at_start = known[:, :1] if predictor else known[:, 1:]
    a, W, c = weights(at, start, end, at_start, tau)
    lam = -torch.log(at.r)
    h = lam[end] - lam[start]
    B = W[:, 0]
    if bh1:
        B = h * (at.sde.alpha(at.t[end]) if at.form.d == 0 else at.sde.sigma(at.t[end]))
    if predictor:
        r = (lam[known[:, 1]] - lam[start]) / h  # below 0
        return a, _newest(at, end, torch.stack([W[:, 0] - 0.5 * B / r, 0.5 * B / r], 1), W), c
    return a, torch.stack([0.5 * B, W[:, 0] - 0.5 * B], 1), c


def sa_solver(at: Nodes, start: Tensor, end: Tensor, known: Tensor, tau: Tensor) -> Step:
    """SA-Solver as run: with two values in data form a small correction is moved between them.

    E = e^(q lam1) [h^2/2 - (q h - 1 + e^(-q h))/q^2]/(lam - lam_prev), q = 1 + tau^2, and the like for
    the corrector   (Xue 2023, the authors' program).
    """
    a, b, c = weights(at, start, end, known, tau)
    if known.shape[1] != 2 or at.form.d != 0:
        return a, b, c
    lam, q = -torch.log(at.r), 1 + tau**2
    h = lam[end] - lam[start]
    rest = (q * h - 1 + torch.exp(-q * h)) / q**2
    if bool((known[:, 0] == start).all()):
        E = (h**2 / 2 - rest) / (lam[start] - lam[known[:, 1]])
    else:
        E = (h**2 / 2 - rest) / h
    E = torch.where(at.r[end] == 0, 0.0, E * q * at.sde.alpha(at.t[end]))
    return a, b + torch.stack([E, -E], 1), c

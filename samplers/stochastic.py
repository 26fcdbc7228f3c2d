"""Exponential samplers of the reverse SDE dx = [f x - (1 + tau^2)/2 g^2 s] dt + tau g dw, any tau >= 0."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from samplers import kernels
from samplers import published as pub
from samplers.adams import Tau, adams, constant
from samplers.exponential import Form, Nodes, integrals, nodes, scale, weights
from samplers.loop import one_step
from samplers.multistep import form_of
from samplers.rows import Row, run_rows
from scoresde.types import SDE, Score


def exponential_euler(score: Score, sde: SDE, x: Tensor, ts: Tensor, *, tau: float | Tau = 1.0, **run: Any) -> Tensor:
    """x1 = (sigma1/sigma) e^(-tau^2 h) x + alpha1 (1 - e^(-(1 + tau^2) h)) x0 + sigma1 sqrt(1 - e^(-2 tau^2 h)) z.

    h = lam1 - lam; tau a number or a function of sigma/alpha.  SDE-DPM-Solver++ 1 for tau = 1, DDIM for
    0; k-diffusion's eta is tau^2   (Lu 2022b, eq. 18; Xue 2023).
    Other arguments as `euler_maruyama`.  Weak order 1, N network calls.
    """
    return one_step(score, sde, x, ts, partial(kernels.exponential_euler, tau=constant(tau)), **run)


def sde_dpmpp(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    order: int = 2,
    tau: float | Tau = 1.0,
    published: bool = False,
    **run: Any,
) -> Tensor:
    """SDE-DPM-Solver++ 1S, 2M, 3M: x0 along the path as a polynomial in lam   (Lu 2022b, eq. 19).

    order: values used; 2 is the highest weak order (the noise of two neighbouring steps cancels to
           second order), 3 only makes its error smaller where the flow's part dominates
    tau:   noise level, a number or a function of sigma/alpha; k-diffusion's eta is tau^2
    published: the programs' weights in place of the exact ones
    Other arguments as `euler_maruyama`.  Weak order 2, N network calls.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    rule = pub.dpmpp if published else weights
    table = partial(adams, form=form_of("x0"), order=order, tau=constant(tau), rule=rule)
    return run_rows(score, sde, x, ts, table, **run)


def sa_solver(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    order: int = 2,
    correct: int = 2,
    tau: float | Tau = 1.0,
    predict: str = "x0",
    published: bool = False,
    **run: Any,
) -> Tensor:
    """SA-Solver: stochastic Adams predictor and corrector, tau(sigma/alpha) as you like   (Xue 2023, algorithm 1).

    order:   values of the predictor;  correct: old values of the corrector, which sees the same noise (0: none;
             programs that count the new value, too, call this correct + 1)
    tau:     a number or a function of sigma/alpha, constant on each step
    published: the authors' program's correction for two values
    Other arguments as `euler_maruyama`.  Weak order 2, N network calls.
    """
    rule = pub.sa_solver if published else weights
    table = partial(adams, form=form_of(predict), order=order, correct=correct, tau=constant(tau), rule=rule)
    return run_rows(score, sde, x, ts, table, **run)


def seeds(score: Score, sde: SDE, x: Tensor, ts: Tensor, *, order: int = 2, predict: str = "eps", **run: Any) -> Tensor:
    """SEEDS-1, SEEDS-2; with predict="x0" SDE-DPM-Solver++ 2S   (Gonzalez 2023, algorithms 1 to 3).

    Order 2: a stochastic stage u halfway in lam; from it the step goes on with fresh noise, and the value
    at u carries the whole step,

        x1 = x1 by the first-order step of tau = 1 from x with V(u) in place of V(x), and u's own noise.

    Other arguments as `euler_maruyama`.  Weak order 2 as called here (weak order p if asked), 2N network calls.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order}")
    form = form_of(predict)
    if order == 1:
        return run_rows(score, sde, x, ts, partial(adams, form=form, order=1, tau=constant(1.0)), **run)
    return run_rows(score, sde, x, ts, partial(_seeds2, form=form), **run)


def _seeds2(sde: SDE, ts: Tensor, form: Form) -> list[list[Row]]:
    N, lam = len(ts) - 1, sde.lam(ts)
    zero = bool(sde.sigma(ts[-1]) == 0)
    middle = (
        sde.time((lam[:-1] + lam[1:]) / 2) if not zero else torch.cat([sde.time((lam[:-2] + lam[1:-1]) / 2), ts[-2:-1]])
    )
    at = nodes(form, sde, torch.cat([ts, middle]))
    q, V = scale(at)
    i = torch.arange(N)
    mid, one = i + N + 1, torch.ones(N, dtype=torch.float64)
    first, second, whole = (
        weights(at, *ends, one) for ends in ((i, mid, i[:, None]), (mid, i + 1, mid[:, None]), (i, i + 1, mid[:, None]))
    )
    # V(u) on the whole step: what the first half did with V(x) is taken back
    back = -(second[0] * first[1][:, 0] * V[i])
    ahead = whole[1][:, 0] * V[mid]
    rows = []
    for k in range(N):
        if zero and k == N - 1:
            a, b, c = (float(v.flatten()[0]) for v in weights(at, i[k:], i[k:] + 1, i[k:, None], one[k:]))
            rows.append([Row(at.t[k], q[k], a, (b * float(V[k]),), c)])
            continue
        a, b, c = (float(v[k]) for v in (first[0], first[1][:, 0] * V[i], first[2]))
        half = Row(at.t[k], q[k], a, (b,), c, True)
        m = N + 1 + k
        rows.append(
            [half, Row(at.t[m], q[m], float(second[0][k]), (float(ahead[k]), float(back[k])), float(second[2][k]))]
        )
    return rows


def er_sde(score: Score, sde: SDE, x: Tensor, ts: Tensor, *, order: int = 2, **run: Any) -> Tensor:
    """ER-SDE with noise scale phi(r) = r (e^(r^0.3) + 10), r = sigma/alpha   (Cui 2023, eq. 24, algorithm 1).

        y1 = (phi1/phi) y + phi1 int_r1^r x0 phi'/phi^2 dr + sqrt(r1^2 - r^2 (phi1/phi)^2) z,   y = x/alpha,

    x0 through the last `order` values as a polynomial in lam; tau^2 = d log(phi/r)/d log r varies inside a step.
    Other arguments as `euler_maruyama`.  Weak order 2 (also with three values), N network calls.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    table = partial(adams, form=form_of("x0"), order=order, start="rise", rule=_extended)
    return run_rows(score, sde, x, ts, table, **run)


def _extended(at: Nodes, start: Tensor, end: Tensor, known: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rule of `er_sde`: psi = phi/r in place of a power of r."""

    def psi(r: Tensor) -> Tensor:
        return torch.exp(r**0.3) + 10

    r, r1 = at.r[start], at.r[end]
    alpha1, rho1 = at.sde.alpha(at.t[end]), at.rho[end]
    E = psi(r1) / psi(r)

    def density(r: Tensor) -> Tensor:
        tau2 = 0.3 * r**0.3 * torch.exp(r**0.3) / psi(r)
        return (1 + tau2) * (psi(r1)[:, None] / psi(r)) / r

    b = rho1[:, None] * integrals(at, r, r1, known, density)
    last = torch.zeros_like(b)
    last[:, 0] = alpha1  # to r = 0: x0 itself
    zero = r1 == 0
    return rho1 / at.rho[start] * E, torch.where(zero[:, None], last, b), rho1 * torch.sqrt((1 - E) * (1 + E))

"""Multistep samplers of the probability flow: one network call a step."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samplers import published as pub
from samplers.adams import adams
from samplers.exponential import Form, level, log_snr, nodes, time, weights
from samplers.rows import Row, run_rows
from scoresde.types import SDE, Score


def form_of(predict: str) -> Form:
    """x0: data prediction, eps: noise prediction; both a polynomial in lam = log(alpha/sigma)."""
    if predict not in ("x0", "eps"):
        raise ValueError(f"predict must be 'x0' or 'eps', got {predict!r}")
    return Form(0.0 if predict == "x0" else math.inf, log_snr)


def multistep(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    order: int = 3,
    form: Form | None = None,
    correct: int = 0,
    start: str = "order",
    **run: Any,
) -> Tensor:
    """Exponential Adams-Bashforth of any order: x0, eps or v as a polynomial, integrated exactly.

    x1 = (rho1/rho) x + rho1 sum_j W_j V_j   (`samplers.exponential`; Hochbruck & Ostermann 2005)
    order:   1 ..; form: `exponential.Form(d, u)`, default data prediction in lam
    correct: old values of a free corrector (0: none); order min(order, correct) + 1 then
    start:   "order": Runge-Kutta steps of one order less until there are values; "rise": orders 1, 2, ...
    Other arguments as `euler_maruyama`.  Order 3 as called here (order p if asked), N + 1 network calls
    (start="rise": N calls, order 2 in the limit).
    """
    form = form_of("x0") if form is None else form
    return run_rows(score, sde, x, ts, partial(adams, form=form, order=order, correct=correct, start=start), **run)


def dpmpp(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    order: int = 2,
    predict: str = "x0",
    published: bool = False,
    **run: Any,
) -> Tensor:
    """DPM-Solver++ multistep 1, 2M, 3M; with predict="eps" DPM-Solver's multistep   (Lu 2022b, algorithm 2).

    published: the authors' weights (2M: half the slope; 3M: phi_3 D2, which is order 2) and rising start,
               in place of the exact ones
    Other arguments as `euler_maruyama`.  Order 2 as called here (order p if asked), N network calls
    (order 3: N + 1).
    """
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver++ has orders 1, 2, 3, got {order}; `multistep` has any")
    rule, start = (pub.dpmpp, "rise") if published else (weights, "order")
    table = partial(adams, form=form_of(predict), order=order, start=start, rule=rule)
    return run_rows(score, sde, x, ts, table, **run)


def deis(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    order: int = 3,
    variable: str = "t",
    start: str = "order",
    **run: Any,
) -> Tensor:
    """DEIS: eps as a polynomial in t (tAB), in sigma/alpha (rhoAB) or in lam   (Zhang & Chen 2022, eq. 15).

    variable: "t", "r" (rhoAB; for alpha = 1 the linear multistep of k-diffusion) or "lam"
    Other arguments as `multistep`.  Order 3 as called here (order p if asked), N + 1 network calls.
    """
    variables = {"t": time, "r": level, "lam": log_snr}
    if variable not in variables:
        raise ValueError(f"variable must be one of {', '.join(variables)}, got {variable!r}")
    table = partial(adams, form=Form(math.inf, variables[variable]), order=order, start=start)
    return run_rows(score, sde, x, ts, table, **run)


def unipc(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    order: int = 3,
    predict: str = "x0",
    published: bool = False,
    **run: Any,
) -> Tensor:
    """UniPC: exponential Adams predictor and corrector, the corrector free   (Zhao 2023, algorithms 1 and 2).

    order:   values of the predictor, and old values of the corrector; the whole is of order + 1
    published: weights with B(h) = e^h - 1 (bh2) and a rising start, orders falling to 1 at the end
    Other arguments as `euler_maruyama`.  Order 4 as called here (order p + 1 if p is asked),
    N + 2 network calls (order 2: N).
    """
    table = partial(adams, form=form_of(predict), order=order, correct=order)
    if published:
        table = partial(table, start="rise", rule=pub.unipc, order_at=lambda i, N: N - i)
    return run_rows(score, sde, x, ts, table, **run)


def pndm(score: Score, sde: SDE, x: Tensor, ts: Tensor, *, order: int = 4, start: str = "rise", **run: Any) -> Tensor:
    """DDIM's step with eps by classical Adams-Bashforth weights: iPNDM, PLMS   (Liu 2022, eq. 12 and 13).

        x1 = (alpha1/alpha) x + (sigma1 - alpha1 sigma/alpha) (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3)/24

    start: "rise" (iPNDM: orders 1, 2, ..., N network calls) or "runge-kutta" (PNDM: order - 1 classical
           Runge-Kutta steps, halfway in t, first: N + 3 (order - 1) calls)
    Other arguments as `euler_maruyama`.  The weights suppose steps equal in sigma/alpha, where
    "runge-kutta" is of the order asked up to 3 (its stages lie halfway in t); on other smooth grids order 2.
    """
    if order not in pub.AB:
        raise ValueError(f"order must be 1 to 4, got {order}")
    if start not in ("rise", "runge-kutta"):
        raise ValueError(f"start must be 'rise' or 'runge-kutta', got {start!r}")
    return run_rows(score, sde, x, ts, partial(_pndm, order=order, start=start), **run)


def _pndm(sde: SDE, ts: Tensor, order: int, start: str) -> list[list[Row]]:
    rows = adams(sde, ts, Form(math.inf, level), order, start="rise", rule=pub.adams_bashforth)
    if start == "rise":
        return rows
    first = min(order - 1, len(ts) - 1)
    begin = [_runge_kutta4(sde, ts[i], ts[i + 1]) for i in range(first)]
    return begin + [_spread(row, i, first) for i, (row,) in enumerate(rows[first:], first)]


def _runge_kutta4(sde: SDE, t: Tensor, t1: Tensor) -> list[Row]:
    """Classical RK4 with DDIM's transfer to (t + t1)/2 and t1   (Liu 2022, eq. 12)."""
    middle = (t + t1) / 2
    points = nodes(Form(math.inf, level), sde, torch.stack([t, middle, t1]))
    alpha, r = points.rho, points.r
    asked, target = (0, 1, 1, 2), (1, 1, 2, 2)
    eps = ((1.0,), (0.0, 1.0), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))  # oldest first
    rows = []
    for k in range(4):
        size = float(alpha[target[k]] * (r[0] - r[target[k]]))
        b = tuple(size * w * float(points.r[asked[j]] * alpha[asked[j]]) for j, w in enumerate(eps[k]))
        rows.append(Row(points.t[asked[k]], None, float(alpha[target[k]] / alpha[0]), b[::-1]))
    return rows


def _spread(row: Row, i: int, first: int) -> list[Row]:
    """The row of step i >= first, where each of the first steps has left four values instead of one."""
    b: list[float] = []
    for j, w in enumerate(row.b):
        b += [0.0] * (3 if i - j < first else 0) + [w]
    return [row._replace(b=tuple(b))]

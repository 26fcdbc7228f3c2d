"""Runge-Kutta samplers of the probability flow in exponential form: several network calls a step, no memory."""

import math
from functools import partial
from typing import Any

from torch import Tensor

from samplers.adams import MIDPOINT, RALSTON, Stage, runge_kutta, starter
from samplers.exponential import Form, level
from samplers.multistep import form_of
from samplers.rows import run_rows
from scoresde.types import SDE, Score


def singlestep(
    score: Score, sde: SDE, x: Tensor, ts: Tensor, *, order: int = 3, form: Form | None = None, **run: Any
) -> Tensor:
    """Exponential Runge-Kutta of any order: the stages' values as a polynomial, integrated exactly.

    order: 1 Euler; 2 midpoint; 3 two inner stages at 1/3 and 2/3; more by Picard sweeps,
           1 + order (order - 1)/2 calls a step
    form:  `exponential.Form(d, u)`, default data prediction in lam
    Other arguments as `euler_maruyama`.  Order 3 as called here (order p if asked), 3N network calls.
    """
    return _run(score, sde, x, ts, form_of("x0") if form is None else form, starter(order), run)


def midpoint(score: Score, sde: SDE, x: Tensor, ts: Tensor, **run: Any) -> Tensor:
    """eps at the geometric middle of sigma/alpha carries the step: DPM-2   (Karras 2022, algorithm 3, alpha = 1/2).

    The same map as DPM-Solver-2, in sigma/alpha instead of lam.  Arguments as `euler_maruyama`.
    Order 2, 2N network calls.
    """
    return _run(score, sde, x, ts, Form(math.inf, level), MIDPOINT, run)


def ralston(score: Score, sde: SDE, x: Tensor, ts: Tensor, **run: Any) -> Tensor:
    """eps at 2/3 of the step (in log sigma) and its start, as a line in sigma/alpha   (Ralston 1962).

    Arguments as `euler_maruyama`.  Order 2, 2N network calls.
    """
    return _run(score, sde, x, ts, Form(math.inf, level), RALSTON, run)


def dpm_solver(
    score: Score, sde: SDE, x: Tensor, ts: Tensor, *, order: int = 2, predict: str = "eps", **run: Any
) -> Tensor:
    """DPM-Solver 1, 2, 3 singlestep; with predict="x0" DPM-Solver++ 2S, 3S   (Lu 2022, algorithms 1 and 2).

        order 2: u at lam + h/2,  x1 = (alpha1/alpha) x - sigma1 (e^h - 1) eps(u)
        order 3: u1 at lam + h/3, u2 at lam + 2h/3 by a line through eps and eps(u1), x1 by one through eps(u2)

    ts are the outer points.  Other arguments as `euler_maruyama`.  Order 2 as called here (order p if
    asked), 2N network calls (pN).
    """
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver has orders 1, 2, 3, got {order}; `singlestep` has any")
    return _run(score, sde, x, ts, form_of(predict), starter(order), run)


def _run(score: Score, sde: SDE, x: Tensor, ts: Tensor, form: Form, stages: tuple[Stage, ...], run: Any) -> Tensor:
    return run_rows(score, sde, x, ts, partial(runge_kutta, form=form, stages=stages), **run)

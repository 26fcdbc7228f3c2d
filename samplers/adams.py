"""Tables of exponential Runge-Kutta and Adams methods of any order (formulas: `samplers.exponential`).

Runge-Kutta: stages between the points of a step; each is reached by integrating the polynomial
through values known so far.

Adams: the predictor integrates the polynomial through the last `order` values.  With a corrector the
value that starts the next step, which has to be asked anyway, also improves the state it was asked at,

    x_i <- x_i + (x_i by the polynomial with V_i) - (x_i by the polynomial without it),

and both together are one row a step   (Zhao 2023, UniPC: "the corrector is free").

Start: while values are too few, `start="order"` takes Runge-Kutta steps of one order less than the
method's, whose local error is what the order of the whole needs; `start="rise"` takes orders 1, 2, ...
as the published programs do: no further calls, but order 2 (with a corrector 3) whatever is asked.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplers.exponential import Form, Nodes, nodes, scale, weights
from samplers.rows import Row
from scoresde.types import SDE

Tau = Callable[[Tensor], Tensor]  # r -> tau(r)
Rule = Callable[[Nodes, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""The weights of multistep steps, called as `exponential.weights`; published approximations are rules."""
Stage = tuple[float, tuple[int, ...]]
"""(c, known): the stage lies at c of the step in log r and is reached through values `known`: 0 is the
step's start, 1 the first stage, ...; the last stage has c = 1 and is the step's end, never asked."""

EULER: tuple[Stage, ...] = ((1.0, (0,)),)
MIDPOINT: tuple[Stage, ...] = ((1 / 2, (0,)), (1.0, (1,)))
RALSTON: tuple[Stage, ...] = ((2 / 3, (0,)), (1.0, (0, 1)))
THIRD: tuple[Stage, ...] = ((1 / 3, (0,)), (2 / 3, (0, 1)), (1.0, (0, 2)))
"""Values at 0 and 2/3 integrate a quadratic: order 3 with two values   (Lu 2022, DPM-Solver-3)."""


def constant(tau: float | Tau) -> Tau:
    """tau as a function of r = sigma/alpha, checked."""
    if callable(tau):
        return tau
    value = float(tau)
    if not value >= 0 or math.isinf(value):
        raise ValueError(f"tau must be >= 0 (0 the flow, 1 the reverse SDE) and finite, got {tau}")
    return lambda r: torch.full_like(r, value)


def sweeps(order: int) -> tuple[Stage, ...]:
    """A Runge-Kutta method of any order by Picard sweeps, 1 + order (order - 1)/2 calls.

    Sweep k asks at j/k of the step, j = 1..k, at states right to h^k, and leaves a polynomial one
    degree higher.
    """
    stages: list[Stage] = []
    known: tuple[int, ...] = (0,)
    for k in range(1, order):
        first = len(stages) + 1
        stages += [(j / k, known) for j in range(1, k + 1)]
        known = (0, *range(first, first + k))
    return (*stages, (1.0, known))


def starter(order: int) -> tuple[Stage, ...]:
    """The cheapest Runge-Kutta method here of this order."""
    return {1: EULER, 2: MIDPOINT, 3: THIRD}.get(order) or sweeps(order)


def runge_kutta(sde: SDE, ts: Tensor, form: Form, stages: Sequence[Stage]) -> list[list[Row]]:
    """Every step by the same stages; a step to r = 0, where the score cannot be asked, by Euler."""
    plan: list[int | tuple[Stage, ...]] = [tuple(stages)] * (len(ts) - 1)
    if not bool(sde.sigma(ts[-1]) > 0):
        plan[-1] = EULER
    return _rows(sde, ts, form, plan)


def adams(
    sde: SDE,
    ts: Tensor,
    form: Form,
    order: int,
    *,
    correct: int = 0,
    tau: Tau | None = None,
    start: str = "order",
    order_at: Callable[[int, int], int] | None = None,
    rule: Rule = weights,
) -> list[list[Row]]:
    """The rows of a run over ts: order min(order, correct) + 1 with a corrector, else `order`.

    order:    values the predictor uses, 1 ..
    correct:  0 no corrector; k: it uses the new value and k old ones
    tau:      noise level of the SDE at r, constant on each step; None: the flow
    start:    "order" or "rise"; with noise always "rise"
    order_at: (i, N) -> at most this order in step i, of the corrector too, for habits like "lower at the end"
    rule:     the weights of a multistep step; `weights` is exact
    """
    if order < 1 or correct < 0:
        raise ValueError(f"order must be at least 1 and the corrector's at least 0, got {order} and {correct}")
    if start not in ("order", "rise"):
        raise ValueError(f"start must be 'order' or 'rise', got {start!r}")
    N = len(ts) - 1
    whole = min(order, correct) + 1 if correct else order
    slow = max(0, whole - (3 if correct else 2)) if start == "order" and tau is None else 0
    plan: list[int | tuple[Stage, ...]] = [
        starter(whole - 1)
        if i < slow and bool(sde.sigma(ts[i + 1]) > 0)
        else min(order, i + 1, order_at(i, N) if order_at else order)
        for i in range(N)
    ]
    old = [min(correct, i + 1, order_at(i, N) if order_at else correct) for i in range(N)] if correct else []
    return _rows(sde, ts, form, plan, old, tau, rule)


def _rows(
    sde: SDE,
    ts: Tensor,
    form: Form,
    plan: Sequence[int | tuple[Stage, ...]],
    correct: Sequence[int] = (),
    tau: Tau | None = None,
    rule: Rule = weights,
) -> list[list[Row]]:
    """plan[i]: the stages of step i, or how many values its predictor uses;  correct[i]: old ones of its corrector."""
    at, stage_of = _points(sde, ts, form, plan)
    q, V = scale(at)
    times = at.t.unbind()
    taus = torch.zeros(()) if tau is None else torch.as_tensor(tau(at.r[: len(plan)]))
    multi = _multistep(at, V, plan, correct, taus.double().expand(len(plan)), rule)
    single: dict[int, list[Row]] = {}
    for stages in {how for how in plan if not isinstance(how, int)}:
        single |= _stages(at, V, stages, [i for i, how in enumerate(plan) if how == stages], stage_of)
    out: list[list[Row]] = []
    seen: list[int] = []  # the points asked so far, newest first, where stages came between them
    for i, how in enumerate(plan):
        if not isinstance(how, int):
            out.append(single[i])
            seen = [*stage_of[i][::-1], i, *seen]
            continue
        a, b, c = multi[i]
        b = b[: i + 1]
        if seen:
            seen = [i, *seen]
            place = {p: k for k, p in reversed(list(enumerate(seen)))}  # the newest value of a point
            spread = [0.0] * len(seen)
            for j, w in enumerate(b):
                if w:
                    spread[place[i - j]] = w
            if seen[: len(b)] == list(range(i, i - len(b), -1)):
                seen = []  # no stage within reach any more
            b = spread
        while len(b) > 1 and b[-1] == 0:
            b.pop()
        out.append([Row(times[i], q[i], a, tuple(b), c)])
    return out


def _points(sde: SDE, ts: Tensor, form: Form, plan: Sequence[int | tuple[Stage, ...]]) -> tuple[Nodes, list[list[int]]]:
    """The grid and the stages between its points; the index of each step's stages."""
    u = -sde.lam(ts)
    inner: list[Tensor] = []
    stage_of: list[list[int]] = []
    for i, how in enumerate(plan):
        mine: list[int] = []
        for c, _ in () if isinstance(how, int) else how[:-1]:
            mine.append(i + 1 if c == 1 else len(ts) + len(inner))
            if c != 1:
                inner.append(u[i] + c * (u[i + 1] - u[i]))
        stage_of.append(mine)
    return nodes(form, sde, torch.cat([ts, sde.time(-torch.stack(inner))]) if inner else ts), stage_of


def _stages(
    at: Nodes, V: Tensor, how: Sequence[Stage], steps: list[int], stage_of: list[list[int]]
) -> dict[int, list[Row]]:
    """The rows of all steps made by the same stages."""
    points = torch.tensor([[i, *stage_of[i], i + 1] for i in steps])  # (n, stages + 1)
    q, _ = scale(at)
    out: dict[int, list[Row]] = {i: [] for i in steps}
    for k, (_, used) in enumerate(how):
        known = points[:, list(used)]
        a, b, _c = weights(at, points[:, 0], points[:, k + 1], known)
        w = torch.zeros(len(steps), k + 1, dtype=torch.float64)  # oldest first
        w[:, list(used)] = b * V[known]
        for i, p, a_, b_ in zip(steps, points[:, k].tolist(), a.tolist(), w.flip(1).tolist(), strict=True):
            out[i].append(Row(at.t[p], q[p], a_, tuple(b_)))
    return out


def _multistep(
    at: Nodes, V: Tensor, plan: Sequence[int | tuple[Stage, ...]], correct: Sequence[int], taus: Tensor, rule: Rule
) -> list[tuple[float, list[float], float]]:
    """(a, b, c) of every multistep step: its predictor on top of the corrector of the step before; b newest first."""
    N = len(plan)
    sizes = torch.tensor([how if isinstance(how, int) else 0 for how in plan])
    a, c = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    b = torch.zeros(N, max(int(sizes.max()), *correct, 0) + 1, dtype=torch.float64)
    for K in set(sizes.tolist()) - {0}:
        i = (sizes == K).nonzero()[:, 0]
        known = i[:, None] - torch.arange(K)
        a[i], w, c[i] = rule(at, i, i + 1, known, taus[i])
        b[i, :K] = w * V[known]
    if correct:
        predicted = b.clone()
        both = (sizes[:-1] > 0) & (sizes[1:] > 0)  # steps i whose corrector, in step i + 1, is used
        old = torch.tensor(correct[:-1])
        for K in set(old[both].tolist()):
            i = (both & (old == K)).nonzero()[:, 0]
            known = i[:, None] + 1 - torch.arange(K + 1)
            _, w, _ = rule(at, i, i + 1, known, taus[i])
            b[i + 1, : K + 1] += a[i + 1, None] * (w * V[known])
            b[i + 1, 1:] -= a[i + 1, None] * predicted[i, :-1]
    return list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))

"""General linear methods: every network call is one row of numbers, made in float64 before the loop.

A step from ts[i] to ts[i + 1] is one row or several.  A row asks the score at the state y reached
last (at first y = x, the state at ts[i]), keeps what it says, and moves on from x:

    m = y + q s(y, t)   (or s itself),      y = a x + sum_j b_j m_j + c z,      x = y if `move`,

m_0 the newest, m_1 the one before, also of earlier steps.  Multistep methods have one row a step,
Runge-Kutta methods one for each stage, and a predictor whose corrector is free (the next step's call
serves both) is a multistep method again, with other b.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from samplers.loop import check, checked, combiner, integrate
from scoresde.types import SDE, Hook, Noise, Score


class Row(NamedTuple):
    """One network call and the update that follows it."""

    t: Tensor  # () where the score is asked
    q: float | None  # m = y + q s; None: m = s
    a: float
    b: tuple[float, ...]  # weights of m, newest first
    c: float = 0.0
    move: bool = False  # whether the rows that follow in this step start from here


Rows = Sequence[Sequence[Row]]  # [i]: from ts[i] to ts[i + 1]


def run_rows(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    table: Callable[[SDE, Tensor], Rows],
    *,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """x at ts[-1] by the rows table(sde, ts).  z is not drawn where c = 0."""
    check(sde, x, ts)
    steps = _fold(table(sde, ts))
    keep = [max(len(row.b) for row in step) for step in steps]
    keep = [max(keep[i:]) for i in range(len(keep))] if len(set(keep)) > 1 else keep
    combine = combiner(x)
    memory: list[Tensor] = []

    def step(i: int, x: Tensor) -> Tensor:
        y = x
        for t, q, a, b, c, move in steps[i]:
            s = checked(score(y, t), y)
            memory.insert(0, s if q is None else torch.add(y, s, alpha=q))
            del memory[keep[i] :]
            y = combine(a, x, b[0], memory[0])
            for w, m in zip(b[1:], memory[1:], strict=False):
                if w:
                    y.add_(m, alpha=w)
            if c:
                y.add_(noise(x), alpha=c)
            if move:
                x = y
        return y

    return integrate(step, sde, x, ts, on_step=on_step, grad=grad)


def _fold(steps: Rows) -> list[list[Row]]:
    """Where m is used once, a x + b (x + q s) is (a + b) x + b q s: one pass over memory less."""
    out = [list(step) for step in steps]
    later = 0  # values of earlier rows that the row after this one uses
    for step in reversed(out):
        for k in reversed(range(len(step))):
            row = step[k]
            if later == 0 and len(row.b) == 1 and row.q is not None and (k == 0 or step[k - 1].move):
                step[k] = row._replace(q=None, a=row.a + row.b[0], b=(row.b[0] * row.q,))
            later = len(row.b) - 1
    return out

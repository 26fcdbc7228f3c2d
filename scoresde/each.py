"""A loop in which every sample has its own time and step: what `scoresde.adaptive` and `scoresde.adams` share."""

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]  # (u () or (B,), y (B, ...)) -> dy/du
Rows = Callable[[Tensor], Field | None]  # the field of these rows, or None if it has no such thing
State = tuple[Tensor, ...]  # at (B,), the next step h (B,), y (B, ...), and what else a method keeps of each row
Step = Callable[..., State]  # (rhs, index, *state) -> state; index (B,) tells which samples the rows are


def until_all_arrive(
    step: Step,
    rhs: Field,
    state: State,
    u: float,
    u1: float,
    *,
    rtol: float,
    atol: float,
    rows: Rows | None,
    max_steps: int,
) -> Tensor:
    """y of each row when its `at` has come from u to u1, by as many steps as the slowest row needs.

    rows:  rows(index) is the field of rows index of y, then arrived rows leave; None: they stay
    rtol, atol: for messages

    Raises FloatingPointError where a row needs steps below 1e-12 of the interval, or the batch more than max_steps.
    """
    tolerances = f"rtol = {rtol:.1g}, atol = {atol:.1g}"
    ended: list[tuple[Tensor, Tensor]] = []
    index = torch.arange(len(state[0]), device=state[0].device)
    for _ in range(max_steps):
        state = step(rhs, index, *state)
        at, h, y = state[:3]
        running = at != u1
        if not bool(running.any()):
            where, arrived = (torch.cat(parts) for parts in zip(*ended, (index, y), strict=True))
            return arrived[torch.argsort(where)]
        tiny = running & (h.abs() < 1e-12 * abs(u1 - u))
        if bool(tiny.any()):
            bad = int(tiny.nonzero()[0])
            raise FloatingPointError(
                f"sample {int(index[bad])} needs steps below 1e-12 of the interval at {float(at[bad]):.6g}, between "
                f"{u:.6g} and {u1:.6g}: the score is not finite or not smooth there, or {tolerances} lie below the "
                f"rounding of {str(y.dtype).removeprefix('torch.')}; loosen them or use float64"
            )
        if rows is not None and not bool(running.all()) and (fewer := rows(index[running])) is not None:
            ended.append((index[~running], y[~running]))
            rhs, index, state = fewer, index[running], tuple(v[running] for v in state)
    raise FloatingPointError(f"no end after {max_steps} steps at {tolerances}; loosen them")


def power(e: Tensor, p: float | Tensor) -> Tensor:
    """e^p, e > 0, with the same bits whatever the batch; torch.pow gives one element in 64 others."""
    return torch.exp(p * torch.log(e))


def rms(e: Tensor) -> Tensor:
    """Root mean square over a sample, (B,)."""
    return e.flatten(1).square().mean(1).sqrt()

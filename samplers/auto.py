"""One call that picks sampler, order and grid from what is known: the budget, noise or not, what was fitted."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from samplers import grids
from samplers.adams import Tau
from samplers.angle import angle, order_for
from samplers.calibrated import Calibration, calibrated, load_calibration
from samplers.fitted import FittedGrid, load_grid
from scoresde.types import SDE, Score


def choose(
    sde: SDE,
    n: int,
    *,
    d: float = 0.5,
    tau: float | Tau = 0.0,
    t_end: float | None = None,
    fitted: FittedGrid | Calibration | None = None,
) -> tuple[Any, Tensor]:
    """(sampler, ts) for n network calls: sampler(score, sde, x, ts, **run).

    1. `fitted` is a calibrated solver of n steps and no noise is asked: `calibrated` on its grid.
    2. Else `angle`, one call a step, of the order n steps can carry (`angle.order_for`: 2, from 11 steps 3,
       from 18 steps 4; with noise 2), on the fitted grid if there is one (on what its search found for n, if
       one was made), else on `grids.data_scale`.
    """
    if n < 1:
        raise ValueError(f"at least one network call is needed, got n = {n}")
    noisy = callable(tau) or tau != 0
    if isinstance(fitted, Calibration):
        if noisy:
            raise ValueError("a calibrated solver is deterministic; leave tau at 0, or pass a fitted grid")
        if fitted.n != n:
            raise ValueError(f"this calibrated solver makes {fitted.n} calls, asked for are {n}; calibrate one for it")
        if t_end is not None and t_end != fitted.ts[-1]:
            raise ValueError(f"this calibrated solver ends at t = {fitted.ts[-1]:.6g}, not at {t_end:.6g}")
        return partial(calibrated, solver=fitted), fitted.grid()
    if fitted is not None:
        if t_end is not None:
            raise ValueError("a fitted grid has its own end; leave t_end out, or fit one that ends there")
        ts, order = fitted.plan(sde, n, order_for(n, noisy=True) if noisy else None)
        return partial(angle, d=fitted.d, order=order, tau=tau), ts
    return partial(angle, d=d, tau=tau), grids.data_scale(sde, n, d=d, t_end=t_end)


def load_fitted(path: str | Path) -> FittedGrid | Calibration:
    """A file of `FittedGrid.save` or `Calibration.save`, whichever it is."""
    try:
        return load_calibration(path)
    except ValueError as err:
        try:
            return load_grid(path)
        except ValueError:
            raise ValueError(f"{path} is neither a calibrated solver nor a fitted grid") from err


def auto(
    score: Score,
    sde: SDE,
    x: Tensor,
    n: int,
    *,
    d: float = 0.5,
    tau: float | Tau = 0.0,
    t_end: float | None = None,
    fitted: FittedGrid | Calibration | None = None,
    **run: Any,
) -> Tensor:
    """x at the end by the sampler and grid that `choose` picks for n network calls.

    x:      state at sde.T, (B, ...);  n: network calls, 1 ..
    d:      the data's standard deviation (a fitted grid or solver brings its own)
    tau:    0 deterministic; a number or a function of sigma/alpha: noise
    fitted: a grid of `fit_grid` or a solver of `calibrate`
    run:    noise, on_step, grad; for a calibrated solver also model
    """
    sampler, ts = choose(sde, n, d=d, tau=tau, t_end=t_end, fitted=fitted)
    return sampler(score, sde, x, ts, **run)

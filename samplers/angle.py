"""The library's own sampler: multistep in the angle between data and noise, its corrector free."""

from typing import Any

from torch import Tensor

from samplers.adams import Tau, adams, constant
from samplers.exponential import Form, bounded
from samplers.rows import Rows, run_rows
from scoresde.types import SDE, Score


def angle_form(d: float) -> Form:
    """v for data of deviation d, as a polynomial in u = r/(r + 1.2 d)."""
    if not 0 < d < float("inf"):
        raise ValueError(f"d is the data's standard deviation, a positive number; got {d}")
    return Form(d, bounded(1.2 * d))


def order_for(n: int, noisy: bool = False) -> int:
    """The values worth using in n steps, by trial on nine mixtures: more are unstable where steps are long."""
    return 2 if n <= 10 or noisy else 3 if n <= 17 else 4


def angle(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    d: float = 0.5,
    order: int | None = None,
    start: str = "rise",
    tau: float | Tau = 0.0,
    **run: Any,
) -> Tensor:
    """dz/dth = v on the flow, z = x/rho, rho^2 = alpha^2 d^2 + sigma^2, th = atan(r/d), r = sigma/alpha.

        z1 = z + int v dth,   v = sigma/(alpha d rho) (x + rho^2 s) as a polynomial in u = r/(r + 1.2 d)

    predicted through the last `order` values and corrected, with as many, by the call that starts the next step.

    d:     the data's standard deviation: N(0, d^2) data are exact in one step, and v is smooth at both ends
           of the noise range.  A wrong d costs accuracy, not convergence
    order: 1 ..; None: what the number of steps can carry, 2 up to 10 steps, 3 up to 17, 4 above
    start: "rise" (order 3 at most, no further calls) or "order" (Runge-Kutta first, order + 1)
    tau:   noise, a number or a function of r: weak order 2 then, N(0, d^2) data stay exact
    Grid: `grids.data_scale(sde, n, d=d)`, or one fitted to the model (`samplers.fitted`).
    Other arguments as `euler_maruyama`.  Order 3, N network calls.
    """
    noisy = callable(tau) or tau != 0
    noise_level = constant(tau) if noisy else None

    def table(sde: SDE, ts: Tensor) -> Rows:
        p = order_for(len(ts) - 1, noisy) if order is None else order
        return adams(sde, ts, angle_form(d), p, correct=p, start=start, tau=noise_level)

    return run_rows(score, sde, x, ts, table, **run)

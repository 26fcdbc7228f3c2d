"""The probability flow by an adaptive solver, ours or torchdiffeq's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.loop import integrate
from scoresde.flow import EACH, flow
from scoresde.types import SDE, Hook, Noise, Score


def ode(
    score: Score,
    sde: SDE,
    x: Tensor,
    ts: Tensor,
    *,
    method: str = EACH,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    noise: Noise = torch.randn_like,
    on_step: Hook | Sequence[Hook] = (),
    grad: bool = False,
) -> Tensor:
    """The black-box flow, between the points of ts   (Song 2021, section 4.3).

    method: "each": Adams with own steps and order for each sample, the same alone and in any batch;
            "each:bosh3", "each:dopri5", "each:tsit5", "each:dop853": by a pair; or one of torchdiffeq:
            dopri5, dopri8, bosh3, ... (adaptive, one step for the whole batch), euler, midpoint, heun3,
            rk4, ... (one step from point to point, in log(sigma/alpha))
    rtol, atol: of the adaptive methods, for each sample
    x, ts, on_step, grad as `euler_maruyama`; `noise` is not used.  Adaptive methods choose their own
    steps between the points: use a two-point grid unless hooks should see more.  Order: the method's.
    """

    def step(i: int, x: Tensor) -> Tensor:
        return flow(score, sde, x, ts[i], ts[i + 1], method=method, rtol=rtol, atol=atol, steps=1)

    return integrate(step, sde, x, ts, on_step=on_step, grad=grad, to_zero=False)

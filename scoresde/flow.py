"""The probability flow, solved by torchdiffeq.

    dx/dt = f x - g^2 s(x, t) / 2                                       (Song 2021, eq. 13)

is integrated in variables that stay bounded and smooth at both ends for every SDE: with
R^2 = alpha^2 + sigma^2, z = x / R and u = log(sigma/alpha) = -lam,

    dz/du = -(sigma^2 / R) (s + x / R^2)

(for VP R = 1, and N(0, I) data stand still).  torchdiffeq's adaptive methods get a norm that is the
largest RMS of a sample, never a mean that lets batch mates hide an error, and land on the end
instead of stepping over it; they still share one step.  "each" (`scoresde.adaptive`) does not: a
sample is the same alone and in any batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from scoresde.adaptive import Field, dormand_prince
from scoresde.types import SDE, Score, instant, like

EACH = "each"
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams")


def velocity(score: Score, sde: SDE) -> Score:
    """u(x, t) = dx/dt = f x - g^2 s / 2, the probability flow in the SDE's own time."""

    def u(x: Tensor, t: Tensor) -> Tensor:
        return like(sde.drift(t), x) * x - like(0.5 * sde.diffusion(t) ** 2, x) * score(x, t)

    return u


def radius(sde: SDE, t: Tensor) -> Tensor:
    """R(t) = sqrt(alpha^2 + sigma^2)."""
    return torch.hypot(sde.alpha(t), sde.sigma(t))


def flow(
    score: Score,
    sde: SDE,
    x: Tensor,
    t: float | Tensor,
    t1: float | Tensor,
    *,
    method: str = EACH,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    steps: int = 64,
) -> Tensor:
    """The state at t1 of the probability flow through x at t; either direction.

    x (B, ...);  t, t1 in (0, T]
    method: "each" (Dormand-Prince, own steps for each sample), or a method of torchdiffeq
    rtol, atol: for the adaptive methods (torchdiffeq's fehlberg2 misses them a hundredfold)
    steps:  for the fixed ones, uniform in u
    """
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x must be float32 or float64 of shape (B, ...), got {x.dtype} {tuple(x.shape)}; use x[None].float()"
        )
    t, t1 = instant(sde, t), instant(sde, t1)

    def rhs(u: Tensor, z: Tensor) -> Tensor:
        time = sde.time(-u)
        R = radius(sde, time)
        y = z * like(R, z)
        return -like(sde.sigma(time) ** 2 / R, y) * (score(y, time) + y / like(R**2, y))

    z = solve(rhs, x / radius(sde, t).to(x), -sde.lam(t), -sde.lam(t1), method, rtol, atol, steps)
    return z * radius(sde, t1).to(x)


def solve(
    rhs: Field,
    y: Tensor,
    u: Tensor,
    u1: Tensor,
    method: str,
    rtol: float,
    atol: float,
    steps: int,
) -> Tensor:
    """dy/du = rhs(u, y) from u to u1; y (B, ...); u () or (B,)."""
    if method == EACH:
        return dormand_prince(rhs, y, float(u), float(u1), rtol=rtol, atol=atol)
    ends = torch.stack([u, u1]).to(y.device, torch.float32 if y.device.type == "mps" else torch.float64)
    options: dict[str, Any] = {}
    if method in ADAPTIVE:
        grid = ends
        options = {"norm": _worst_sample(len(y)), "step_t": ends[1:]}
    elif method in FIXED:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        grid = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, steps + 1, dtype=ends.dtype, device=y.device)
    else:
        names = ", ".join((EACH, *ADAPTIVE, *FIXED))
        raise ValueError(f"unknown method {method!r}; choose one of {names}")
    try:
        out = torchdiffeq.odeint(rhs, y, grid, method=method, rtol=rtol, atol=atol, options=options)
    except AssertionError as err:
        if "underflow in dt" not in str(err):
            raise
        raise FloatingPointError(
            f"{method} could not meet rtol = {rtol:.1g}, atol = {atol:.1g}: its step shrank to nothing ({err}). "
            "The score is not finite or not smooth there, or the tolerance is below the rounding of "
            f"{str(y.dtype).removeprefix('torch.')}; loosen it, use float64, or use a fixed method such as rk4"
        ) from err
    return out[-1]


def _worst_sample(B: int) -> Callable[[Tensor], Tensor]:
    """max over the batch of the RMS over a sample."""

    def norm(y: Tensor) -> Tensor:
        return y.reshape(B, -1).square().mean(1).max().sqrt()

    return norm

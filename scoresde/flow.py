"""The probability flow, solved by torchdiffeq.

    dx/dt = f x - g^2 s(x, t) / 2                                       (Song 2021, eq. 13)

is integrated in variables that stay bounded and smooth at both ends for every SDE: with
R^2 = alpha^2 + sigma^2 and z = x / R, over u = log(sigma/alpha) or the angle th = atan(sigma/alpha),

    dz/du  = -(sigma^2 / R) (s + x / R^2)
    dz/dth = -(sigma R / alpha) (s + x / R^2) = eps cos(th) - x0 sin(th)

(N(0, I) data stand still).  The angle's range is finite, (0, pi/2): the same tolerance takes fewer
evaluations there, and "each" (`scoresde.adams`, `scoresde.adaptive`) has it.  torchdiffeq's methods have u.  Its
adaptive ones get a norm that is the largest RMS of a sample, never a mean that lets batch mates hide an error,
and land on the end instead of stepping over it; they still share one step.  "each" does not: a
sample is the same alone and in any batch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from scoresde.adams import adams_each
from scoresde.adaptive import PAIRS, Field, Rows, rows_of, solve_each
from scoresde.types import SDE, Score, instant, like, wide

EACH = "each"
OWN_STEPS = (EACH, *(f"{EACH}:{name}" for name in PAIRS))
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
    method: "each" (Adams, own steps and order for each sample; "each:bosh3", "each:dopri5", "each:tsit5",
            "each:dop853": by this Runge-Kutta pair, own steps), or a method of torchdiffeq
    rtol, atol: of z, for the adaptive methods.  On mixtures the worst of 256 samples ends within 1.7 times them with
            "each", 11 with "each:dopri5", 275 (a norm of the worst sample) to 4000 (its own) with torchdiffeq's dopri5,
            at 0.7 to 1.1 times the calls of the last; torchdiffeq's fehlberg2 misses them a hundredfold
    steps:  for the fixed ones, uniform in log(sigma/alpha)
    With "each" samples that have arrived leave the batch if the score has `rows` (`scoresde.adaptive`).
    """
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x must be float32 or float64 of shape (B, ...), got {x.dtype} {tuple(x.shape)}; use x[None].float()"
        )
    t, t1 = instant(sde, t), instant(sde, t1)
    angle = method in OWN_STEPS

    def field(score: Score) -> Field:
        def rhs(u: Tensor, z: Tensor) -> Tensor:
            time = sde.time(-torch.log(torch.tan(u)) if angle else -u)
            R, sigma = radius(sde, time), sde.sigma(time)
            rate = sigma * R / sde.alpha(time) if angle else sigma**2 / R
            y = z * like(R, z)
            s = score(y, time)
            if s.shape != y.shape or s.device != y.device:
                raise ValueError(
                    f"the score returned {tuple(s.shape)} on {s.device} for a state {tuple(y.shape)} on {y.device}; "
                    "it must return a tensor like its argument"
                )
            return -like(rate, y) * (s.to(y.dtype) + y / like(R**2, y))

        return rhs

    def rows(index: Tensor) -> Field | None:
        some = rows_of(score, index)
        return None if some is None else field(some)

    u, u1 = (torch.atan2(sde.sigma(q), sde.alpha(q)) if angle else -sde.lam(q) for q in (t, t1))
    z = solve(field(score), x / radius(sde, t).to(x), u, u1, method, rtol, atol, steps, rows)
    return z * radius(sde, t1).to(x)


def encode(score: Score, sde: SDE, x: Tensor, *, t: float | Tensor | None = None, **how: Any) -> tuple[Tensor, Tensor]:
    """The latent of x: its flow to sde.T; and the RMS error of the way there and back, (B,), measured by going back.

    t: where the data sit, default sde.t_min;  how: as `flow`.  `decode` is its inverse.
    """
    t = sde.t_min if t is None else t
    z = flow(score, sde, x, t, sde.T, **how)
    return z, (decode(score, sde, z, t=t, **how) - x).flatten(1).square().mean(1).sqrt()


def decode(score: Score, sde: SDE, z: Tensor, *, t: float | Tensor | None = None, **how: Any) -> Tensor:
    """The data at t (default sde.t_min) of a latent z at sde.T."""
    return flow(score, sde, z, sde.T, sde.t_min if t is None else t, **how)


def between(z: Tensor, z1: Tensor, w: float | Tensor) -> Tensor:
    """Latents on the great circle from z (w = 0) to z1 (w = 1), w () or (B,), lengths linear   (Shoemake 1985).

    (|z| (1 - w) + |z1| w) [sin((1 - w) a) e + sin(w a) e1] / sin(a),   a the angle between e = z/|z| and e1 = z1/|z1|
    """
    w = torch.as_tensor(w).to(z).reshape(-1, 1)
    (n, n1), e = (v.flatten(1).norm(dim=1, keepdim=True) for v in (z, z1)), z.flatten(1)
    e, e1 = e / n, z1.flatten(1) / n1
    a = 2 * torch.atan2((e - e1).norm(dim=1, keepdim=True), (e + e1).norm(dim=1, keepdim=True))
    if bool((a > math.pi - 1e-6).any()):
        raise ValueError(
            "the latents point in opposite directions, between which there is no one way; take another pair"
        )
    arc = torch.where(a < 1e-6, 1 - w, torch.sin((1 - w) * a) / torch.sin(a)) * e
    arc = arc + torch.where(a < 1e-6, w, torch.sin(w * a) / torch.sin(a)) * e1
    return ((n * (1 - w) + n1 * w) * arc).reshape(z.shape)


def solve(
    rhs: Field,
    y: Tensor,
    u: Tensor,
    u1: Tensor,
    method: str,
    rtol: float,
    atol: float,
    steps: int,
    rows: Rows | None = None,
    adjoint: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """dy/du = rhs(u, y) from u to u1; y (B, ...); u () or (B,); rows(index) is rhs of some rows of y.

    adjoint: backwards by a second solve, in y and in these tensors (torchdiffeq's methods only)
    """
    if method in OWN_STEPS:
        if method == EACH:
            return adams_each(rhs, y, float(u), float(u1), rtol=rtol, atol=atol, rows=rows)
        pair = PAIRS[method.removeprefix(f"{EACH}:")]
        return solve_each(rhs, y, float(u), float(u1), pair=pair, rtol=rtol, atol=atol, rows=rows)[0]
    ends = torch.stack([u, u1]).to(y.device, wide(y))
    options: dict[str, Any] = {}
    if method in ADAPTIVE:
        grid = ends
        options = {"norm": _worst_sample(len(y)), "step_t": ends[1:]}
    elif method in FIXED:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        grid = ends[0] + (ends[1] - ends[0]) * torch.linspace(0, 1, steps + 1, dtype=ends.dtype, device=y.device)
    else:
        names = ", ".join((EACH, *ADAPTIVE, *FIXED, *OWN_STEPS[1:]))
        raise ValueError(f"unknown method {method!r}; choose one of {names}")
    try:
        if adjoint is None:
            out = torchdiffeq.odeint(rhs, y, grid, method=method, rtol=rtol, atol=atol, options=options)
        else:
            out = torchdiffeq.odeint_adjoint(
                rhs, y, grid, method=method, rtol=rtol, atol=atol, options=options, adjoint_params=adjoint,
                adjoint_options={},
            )  # fmt: skip
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

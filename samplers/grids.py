"""Time grids: (n+1,) float64, from sde.T down to t_end, n steps asked = n steps run.

With r = sigma/alpha the noise level relative to the data, r = exp(-lam).
`strength` in (0, 1] is for image-to-image: of a grid of n/strength steps only the last n remain,
so the run starts at ts[0] < T; noise the image to there with `perturb`.
`to_zero` ends the grid at t = 0 instead of t_end, for samplers that never call the score there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.types import SDE, Noise, like, number


def uniform(sde: SDE, n: int, *, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """Uniform in t."""
    return _grid(sde, n, t_end, strength, to_zero, lambda u, T, e: T + u * (e - T))


def quadratic(sde: SDE, n: int, *, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """Uniform in sqrt(t), denser near the data   (Song 2021, DDIM, appendix D.2)."""
    return _grid(sde, n, t_end, strength, to_zero, lambda u, T, e: (T.sqrt() + u * (e.sqrt() - T.sqrt())) ** 2)


def log_snr(sde: SDE, n: int, *, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False) -> Tensor:
    """Uniform in lam = log(alpha/sigma)   (Lu 2022)."""

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        return sde.time(sde.lam(T) + u * (sde.lam(e) - sde.lam(T)))

    return _grid(sde, n, t_end, strength, to_zero, points)


exponential = log_snr
"""Geometric in sigma/alpha: the same grid by k-diffusion's name."""


def karras(
    sde: SDE, n: int, *, rho: float = 7.0, t_end: float | None = None, strength: float = 1.0, to_zero: bool = False
) -> Tensor:
    """Uniform in r^(1/rho)   (Karras 2022, eq. 5).  rho -> infinity is `exponential`."""
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}; 7 is Karras's value")

    def points(u: Tensor, T: Tensor, e: Tensor) -> Tensor:
        p, q = torch.exp(-sde.lam(T) / rho), torch.exp(-sde.lam(e) / rho)
        return sde.time(-rho * torch.log(p + u * (q - p)))

    return _grid(sde, n, t_end, strength, to_zero, points)


def _grid(
    sde: SDE,
    n: int,
    t_end: float | None,
    strength: float,
    to_zero: bool,
    points: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """points(u, T, end) at u = 0..1, with exact ends, cut to the last n steps."""
    if n < 1:
        raise ValueError(f"a grid needs at least one step, got n = {n}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1] (1 starts from pure noise), got {strength}")
    T, end = number(sde.T), number(sde.t_min if t_end is None else float(t_end))
    if not 0 < end < T:
        raise ValueError(f"t_end must lie in (0, T = {sde.T:.6g}), got {float(end):.6g}; for 0 use to_zero=True")
    m = max(n, math.ceil(n / strength - 1e-9))
    inner = m - 1 if to_zero else m
    u = torch.linspace(0, 1, inner + 1, dtype=torch.float64)
    ts = points(u, T, end)
    ts[0] = T
    if inner:
        ts[-1] = end
    if to_zero:
        ts = torch.cat([ts, ts.new_zeros(1)])
    return ts[-(n + 1) :].clone()


def perturb(sde: SDE, x0: Tensor, t: float | Tensor, noise: Noise = torch.randn_like) -> Tensor:
    """x_t = alpha x0 + sigma z: the start of image-to-image, with t = ts[0]   (Meng 2022, SDEdit)."""
    t = number(t)
    if not bool(((t > 0) & (t <= sde.T * (1 + 1e-9))).all()):
        raise ValueError(f"t must lie in (0, T = {sde.T:.6g}], got {float(t.min()):.6g} .. {float(t.max()):.6g}")
    return like(sde.alpha(t), x0) * x0 + like(sde.sigma(t), x0) * noise(x0)

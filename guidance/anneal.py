"""Posterior sampling along explicit densities, y = A x0 + noise_sd n with A linear: exact as t -> 0.

    q_t(x) = p_t(x) L_t(x) / Z_t,    L_t(x) = N(y; (k/alpha) A x, noise_sd^2 + k r^2 A A*)

with r = sigma/alpha and k = d^2/(d^2 + r^2): what p(y | x_t) is for data N(0, d^2 I), and p(y | x0 = x) as t -> 0, for
any data.  Its score needs no Jacobian of the network, and q_t is a density, so Langevin steps at a level sample it,
whatever the path that led there:

    s = anneal(score, sde, A, y, noise_sd)
    x = ancestral(s, sde, x, ts, on_step=relax(s, sde))

A path of densities is not the path of one diffusion: what the steps of the sampler miss, `relax` mends where x still
moves between modes, and weights (`guidance.twisted`) mend everywhere.
"""

import math

import torch
from torch import Tensor

from guidance.operators import Linear, check_linear, check_noise, measured
from scoresde.types import SDE, Hook, Noise, Score, like, wide


def anneal(score: Score, sde: SDE, A: Linear, y: Tensor, noise_sd: float, *, sigma_data: float = 0.5) -> Score:
    """s' = s + (k/alpha) A* (noise_sd^2 + k r^2 A A*)^-1 (y - (k/alpha) A x), the score of q_t (see the module).

    y:          one measurement, A(x0)'s shape without the batch, or one for each sample
    noise_sd:   0 is a path onto A x0 = y; inf is off
    sigma_data: d, of data about 0
    Its curvature is at most 2/sigma^2, whatever A and noise_sd.

    Exact at every t for N(0, d^2 I) data, as t -> 0 for any.  At noise a multimodal q_t weighs its modes by a blurred
    likelihood, so a sampler alone goes astray early: see `relax`, and `twisted` for the remedy.  One network call, no
    Jacobian product; the solve is exact where A's singular values are known, else conjugate gradients (no network).
    """
    check_linear(A)
    check_noise(noise_sd)
    if noise_sd == math.inf:
        return score
    push = likelihood(sde, A, y, noise_sd, sigma_data)[0]
    return lambda x, t: score(x, t) + push(x, t)


def likelihood(sde: SDE, A: Linear, y: Tensor, noise_sd: float, sigma_data: float) -> tuple[Score, Score]:
    """(x, t) -> grad_x log L_t, like x, and (x, t) -> log L_t + a constant of t, (B,) float64 (noise_sd > 0)."""
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")

    def parts(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y - (k/alpha) A x, A* (A A* + c)^-1 of it, and r^2;  c = noise_sd^2/(k r^2)."""
        r2 = torch.exp(-2 * sde.lam(t))
        k = sigma_data**2 / (sigma_data**2 + r2)
        residual = measured(A, y, like(k / sde.alpha(t), x) * x)
        return residual, A.ridge(residual, noise_sd**2 / (k * r2)), r2

    def push(x: Tensor, t: Tensor) -> Tensor:
        _, ridge, r2 = parts(x, t)
        return like(1 / (sde.alpha(t) * r2), x) * ridge

    def log(x: Tensor, t: Tensor) -> Tensor:
        residual, ridge, _ = parts(x.to(wide(x)), t)  # (A A* + c)^-1 v = (v - A A* (A A* + c)^-1 v)/c cancels
        gap = residual - A(ridge)
        return -0.5 * (residual * gap).flatten(1).sum(1) / noise_sd**2

    return push, log


def relax(
    score: Score,
    sde: SDE,
    n: int = 3,
    *,
    step: float = 0.7,
    friction: float = 0.2,
    noise: Noise = torch.randn_like,
) -> Hook:
    """n steps of kinetic Langevin dynamics at t_after, with the density whose score is given   (BAOAB).

        v <- v + h sigma s;  x <- x + h sigma v/2;  v <- a v + sqrt(1 - a^2) z;  x <- x + h sigma v/2

    a = exp(-friction h), h = step; v goes on from one level to the next.  (Leimkuhler & Matthews 2013.)
    step:     in sigma, in (0, sqrt(2)) for `anneal`, below 2 for a p_t
    friction: per unit of time; inf forgets v: x1 = x + e s + sqrt(2 e) (z + z1)/2, e = (step sigma)^2/2, each z twice

    The stationary variance of a Gaussian at one level is exact whatever the step.  n network calls a step of the
    sampler.  A hook for one run: it holds v.
    """
    if n < 1:
        raise ValueError(f"n, the number of steps at a level, must be at least 1, got {n}")
    if not (0 < step < 2 and friction > 0):
        raise ValueError(f"step must lie in (0, 2) and friction be positive, got {step} and {friction}")
    keep = math.exp(-friction * step)
    kick = math.sqrt(-math.expm1(-2 * friction * step))
    held: dict[str, Tensor] = {}

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor | None:
        if float(t) == 0:
            return None
        v = noise(x) if i == 0 else held["v"]
        h = step * float(sde.sigma(t))
        for _ in range(n):
            v = v.add(score(x, t), alpha=h)
            x = x.add(v, alpha=h / 2)
            v = v.mul(keep).add_(noise(x), alpha=kick)
            x = x.add(v, alpha=h / 2)
        held["v"] = v
        return x

    return hook

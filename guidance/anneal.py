"""Posterior sampling along explicit densities, y = A x0 + noise_sd n with A linear: exact as t -> 0.

    q_t(x) = p_t(x) L_t(x) / Z_t,    L_t(x) = N(y; (k/alpha) A x, noise_sd^2 + k r^2 A A*)

with r = sigma/alpha and k = d^2/(d^2 + r^2): what p(y | x_t) is for data N(0, d^2 I), and p(y | x0 = x) as t -> 0, for
any data.  Its score needs no Jacobian of the network, and q_t is a density, so Langevin steps at a level sample it,
whatever the path that led there:

    s = anneal(score, sde, A, y, noise_sd)
    x = samplers.ancestral(s, sde, x, ts, on_step=samplers.relax(s, sde))

A path of densities is not the path of one diffusion: what the steps of the sampler miss, `samplers.relax` mends
where x still moves between modes, and weights (`guidance.twisted`) mend everywhere.
"""

import math

import torch
from torch import Tensor

from guidance.operators import Linear, check_linear, check_noise, measured
from scoresde.types import SDE, Score, like, wide


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

"""Denoising score matching.

Every usual loss is a weight on one error (Vincent 2011; Kingma & Gao 2023):

    x = alpha x0 + sigma z,   e = sigma s(x, t) + z,   loss = w(t) mean(e^2)

    eps         1                                     DDPM's simple loss (Ho 2020, eq. 14)
    likelihood  g^2 / sigma^2                         bounds -log p (Song 2021b)
    x0          r^2                                   r = sigma/alpha
    v           ((alpha^2 + sigma^2) / alpha)^2       (Salimans & Ho 2022)
    edm         (r^2 + sd^2) / sd^2                   (Karras 2022, table 1)
    min-snr     min(1/r^2, 5) r^2                     (Hang 2023)
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.types import SDE, Noise, Score, like

WEIGHTS = ("eps", "likelihood", "x0", "v", "edm", "min-snr")


def weight(name: str, sde: SDE, t: Tensor, sigma_data: float = 0.5) -> Tensor:
    """w(t) on the eps error; the table of the module docstring."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    r2 = (sigma / alpha) ** 2
    if name == "eps":
        return torch.ones_like(r2)
    if name == "likelihood":
        return (sde.diffusion(t) / sigma) ** 2
    if name == "x0":
        return r2
    if name == "v":
        return ((alpha**2 + sigma**2) / alpha) ** 2
    if name == "edm":
        return (r2 + sigma_data**2) / sigma_data**2
    if name == "min-snr":
        return (1 / r2).clamp(max=5) * r2
    raise ValueError(f"unknown weighting {name!r}; choose one of {', '.join(WEIGHTS)}")


def dsm(
    score: Score,
    sde: SDE,
    x0: Tensor,
    t: Tensor,
    *,
    weighting: str = "eps",
    sigma_data: float = 0.5,
    noise: Noise = torch.randn_like,
) -> Tensor:
    """w(t) mean over entries of (sigma s(x, t) + z)^2, per sample.  x0 (B, ...), t (B,) -> (B,)."""
    z = noise(x0)
    alpha, sigma = like(sde.alpha(t), x0), like(sde.sigma(t), x0)
    e = sigma * score(alpha * x0 + sigma * z, t) + z
    return weight(weighting, sde, t, sigma_data).to(x0) * e.square().flatten(1).mean(1)


def uniform_times(sde: SDE) -> Callable[[Tensor], Tensor]:
    """u ~ U(0, 1) to t = t_min + u (T - t_min)."""
    return lambda u: sde.t_min + u * (sde.T - sde.t_min)


def lognormal_times(sde: SDE, mean: float = -1.2, std: float = 1.2) -> Callable[[Tensor], Tensor]:
    """u ~ U(0, 1) to the t at which log(sigma/alpha) ~ N(mean, std^2)   (Karras 2022)."""

    def times(u: Tensor) -> Tensor:
        z = torch.special.ndtri(u.double().clamp(1e-9, 1 - 1e-9))
        return sde.time(-(mean + std * z)).clamp(sde.t_min * 1e-3, sde.T).to(u)

    return times

"""Samplers that are one table each: one network call a step."""

from functools import partial
from typing import Any

from torch import Tensor

from samplers import kernels
from samplers.loop import one_step
from scoresde.types import SDE, Score


def euler_maruyama(score: Score, sde: SDE, x: Tensor, ts: Tensor, **run: Any) -> Tensor:
    """Reverse-time SDE: x1 = x + (f x - g^2 s) dt + g sqrt(-dt) z   (Anderson 1982; Song 2021, eq. 6).

    x: state at ts[0], (B, ...);  ts: decreasing times in (0, T], may end at 0, (N+1,)
    run: noise, on_step, grad   (see `samplers.loop`)
    Weak order 1, N network calls.
    """
    return one_step(score, sde, x, ts, kernels.euler_maruyama, **run)


def flow_euler(score: Score, sde: SDE, x: Tensor, ts: Tensor, **run: Any) -> Tensor:
    """Probability flow: x1 = x + (f x - g^2 s / 2) dt   (Song 2021, eq. 13).

    Arguments as `euler_maruyama`; deterministic.  Order 1, N network calls.  `ddim` is the same
    order with the linear part exact.
    """
    return one_step(score, sde, x, ts, kernels.flow_euler, **run)


def reverse_diffusion(score: Score, sde: SDE, x: Tensor, ts: Tensor, **run: Any) -> Tensor:
    """x1 = (2 - r) x + G^2 s + G z, with the forward kernel x = r x1 + G z   (Song 2021, eq. 46).

    For a table of betas r = sqrt(1 - beta), G^2 = beta, as published; here for any SDE and grid.
    Arguments as `euler_maruyama`.  Weak order 1, N network calls.
    """
    return one_step(score, sde, x, ts, kernels.reverse_diffusion, **run)


def ancestral(score: Score, sde: SDE, x: Tensor, ts: Tensor, *, large: bool = False, **run: Any) -> Tensor:
    """DDPM: x1 = (x + G^2 s)/r + G (sigma1/sigma) z   (Ho 2020, eq. 7 and 11).

    r = alpha/alpha1, G^2 = sigma^2 - r^2 sigma1^2: sqrt(1 - beta) and beta of a discrete chain.
    large: noise G z, Ho's other choice sigma_t^2 = beta_t, in place of the posterior's
    Other arguments as `euler_maruyama`.  Weak order 1, N network calls; equals ddim(eta=1).
    """
    kernel = kernels.ancestral_large if large else kernels.ancestral
    return one_step(score, sde, x, ts, kernel, **run)


def ddim(score: Score, sde: SDE, x: Tensor, ts: Tensor, *, eta: float = 0.0, **run: Any) -> Tensor:
    """x1 = alpha1 x0 + sqrt(sigma1^2 - tau^2) eps + tau z   (Song 2021, DDIM, eq. 12 and 16).

    x0 = (x + sigma^2 s)/alpha, eps = -sigma s, tau = eta (sigma1/sigma) sqrt(sigma^2 - r^2 sigma1^2)
    eta: in [0, 1]; 0 deterministic, 1 ancestral
    Other arguments as `euler_maruyama`.  Order 1 (eta = 0: of the flow, else weak), N network calls.
    eta = 0 is Euler in sigma/alpha for x/alpha, exact for a single data point.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 deterministic, 1 ancestral), got {eta}")
    return one_step(score, sde, x, ts, partial(kernels.ddim, eta=eta), **run)

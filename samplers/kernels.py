"""One-step methods as tables: x1 = a x + b s(x, t) + c z, one row a step, in float64.

With r = alpha/alpha1 and G^2 = sigma^2 - r^2 sigma1^2 the forward kernel from t1 (closer to data)
up to t is x = r x1 + G z.  `Table` functions feed `one_step` and `predictor_corrector`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.types import SDE

Table = tuple[Tensor, Tensor, Tensor]  # a, b, c: (N,) each
Kernel = Callable[[SDE, Tensor], Table]


def forward_kernel(sde: SDE, ts: Tensor) -> tuple[Tensor, Tensor]:
    """r (N,) and G^2 (N,) of the forward transitions between the points of the grid."""
    alpha, sigma = sde.alpha(ts), sde.sigma(ts)
    r = alpha[:-1] / alpha[1:]
    # G^2 = sigma^2 (1 - q), q = (r sigma1/sigma)^2 = exp(-2 (lam1 - lam)): expm1 keeps short steps exact
    log_q = -2 * sde.lam(ts).diff()
    return r, -(sigma[:-1] ** 2) * torch.expm1(log_q)


def euler_maruyama(sde: SDE, ts: Tensor) -> Table:
    """dx = (f x - g^2 s) dt + g dw backwards in time, Euler."""
    t, dt = ts[:-1], ts.diff()  # dt < 0
    g2 = sde.diffusion(t) ** 2
    return 1 + sde.drift(t) * dt, -g2 * dt, torch.sqrt(-g2 * dt)


def flow_euler(sde: SDE, ts: Tensor) -> Table:
    """dx/dt = f x - g^2 s / 2, Euler."""
    t, dt = ts[:-1], ts.diff()
    b = -0.5 * sde.diffusion(t) ** 2 * dt
    return 1 + sde.drift(t) * dt, b, 0 * b


def reverse_diffusion(sde: SDE, ts: Tensor) -> Table:
    """x1 = x - F + G^2 s + G z, with the forward step discretised as x = x1 + F(x1) + G z."""
    r, G2 = forward_kernel(sde, ts)
    return 2 - r, G2, G2.sqrt()


def ancestral(sde: SDE, ts: Tensor) -> Table:
    """The posterior q(x1 | x, x0) at the x0-estimate."""
    r, G2 = forward_kernel(sde, ts)
    sigma = sde.sigma(ts)
    return 1 / r, G2 / r, G2.sqrt() * sigma[1:] / sigma[:-1]


def ancestral_large(sde: SDE, ts: Tensor) -> Table:
    """As `ancestral`, with the forward variance G^2 in place of the posterior's."""
    r, G2 = forward_kernel(sde, ts)
    return 1 / r, G2 / r, G2.sqrt()


def ddim(sde: SDE, ts: Tensor, eta: float = 0.0) -> Table:
    """x1 = alpha1 x0 + sqrt(sigma1^2 - tau^2) eps + tau z, tau = eta times the posterior's deviation."""
    r, G2 = forward_kernel(sde, ts)
    sigma = sde.sigma(ts)
    s, s1 = sigma[:-1], sigma[1:]
    tau = eta * G2.sqrt() * s1 / s
    return 1 / r, s**2 / r - s * torch.sqrt((s1**2 - tau**2).clamp(min=0)), tau


def exponential_euler(sde: SDE, ts: Tensor, tau: Callable[[Tensor], Tensor]) -> Table:
    """x1 = (sigma1/sigma) q^(tau^2) x + alpha1 (1 - q^(1 + tau^2)) x0 + sigma1 sqrt(1 - q^(2 tau^2)) z, q = r1/r.

    tau: a function of r = sigma/alpha, (N,) -> (N,), constant on each step
    """
    alpha, sigma, lam = sde.alpha(ts), sde.sigma(ts), sde.lam(ts)
    h = lam.diff().clamp(max=1e3)  # q = e^-h; a step to r = 0 has h = inf
    power = tau(torch.exp(-lam[:-1])).double() ** 2
    part = -torch.expm1(-(1 + power) * h) * alpha[1:] / alpha[:-1]
    a = sigma[1:] / sigma[:-1] * torch.exp(-power * h) + part
    return a, part * sigma[:-1] ** 2, sigma[1:] * torch.sqrt(-torch.expm1(-2 * power * h))

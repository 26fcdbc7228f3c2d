"""Exact conversions between what networks predict.

Every prediction is a linear form  value = m x0 + n eps  of the clean x0 and the noise eps in
x = alpha x0 + sigma eps:

    x0        1, 0
    eps       0, 1
    score     0, -1/sigma                               s = -eps / sigma
    v         -sigma, alpha                             (Salimans & Ho 2022)
    velocity  d alpha/dt, d sigma/dt                    dx/dt of the flow = f x - g^2 s / 2
    F         sigma/(sd R), -sd alpha/R                 EDM's network, R^2 = sigma^2 + alpha^2 sd^2

so any of them, with x, gives x0 and eps by a 2 x 2 system of determinant alpha n - sigma m, and so
any other.  The last row is EDM's D = c_skip y + c_out F(c_in y) (Karras 2022, table 1) with
y = x/alpha at noise level sigma/alpha, written without the ratio.
"""

from torch import Tensor

from scoresde.types import SDE, like

KINDS = ("score", "eps", "x0", "v", "velocity", "F")


def form(kind: str, sde: SDE, t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(m, n) of value = m x0 + n eps at time t; see the module docstring."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    one = alpha.new_ones(())
    if kind == "x0":
        return one, 0 * one
    if kind == "eps":
        return 0 * one, one
    if kind == "score":
        return 0 * one, -1 / sigma
    if kind == "v":
        return -sigma, alpha
    if kind == "velocity":
        f = sde.drift(t)
        return f * alpha, f * sigma + sde.diffusion(t) ** 2 / (2 * sigma)
    if kind == "F":
        R = (sigma**2 + (alpha * sigma_data) ** 2).sqrt()
        return sigma / (sigma_data * R), -sigma_data * alpha / R
    raise ValueError(f"unknown prediction {kind!r}; choose one of {', '.join(KINDS)}")


def line(source: str, target: str, sde: SDE, t: Tensor, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(a, b) of target = a x + b source."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    m, n = form(source, sde, t, sigma_data)
    m1, n1 = form(target, sde, t, sigma_data)
    det = alpha * n - sigma * m
    return (m1 * n - n1 * m) / det, (alpha * n1 - sigma * m1) / det


def convert(value: Tensor, x: Tensor, t: Tensor, sde: SDE, source: str, target: str, sigma_data: float = 0.5) -> Tensor:
    """A prediction of one kind as another: target = a x + b value, exact.

    value, x (B, ...);  t () or (B,) in (0, T];  source, target in `KINDS`
    sigma_data: the data's standard deviation in EDM's F
    """
    if source == target:
        return value
    a, b = line(source, target, sde, t, sigma_data)
    return like(a, x) * x + like(b, x) * value


def denoised(score: Tensor, x: Tensor, t: Tensor, sde: SDE) -> Tensor:
    """Tweedie: x0 = E[x_0 | x] = (x + sigma^2 s) / alpha   (Robbins 1956, Efron 2011)."""
    return convert(score, x, t, sde, "score", "x0")

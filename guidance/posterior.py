"""Posterior sampling by the likelihood's gradient: s' = s + an estimate of grad_x log p(y | x_t).

With y = A(x0) + noise_sd n, p(y | x_t) = E[p(y | x0) | x_t] is approximated by taking x0 | x_t as a Gaussian about the
estimate x0(x):

    rule    covariance of x0 | x_t            exact for
    dps     0                                 A constant
    pigdm   v I, v = s^2 d^2/(s^2 + a^2 d^2)  N(m, d^2 I) data, linear A
    tmpd    a diagonal from one product       -
    mmps    (s^2/a) dx0/dx, the true one      Gaussian data, linear A

(a = alpha, s = sigma), with the covariance's own dependence on x left out.  For multimodal data all of them are biased
at sigma > 0: modes are weighed by the estimate between them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from guidance.energy import energy
from guidance.operators import Linear, Operator, cg, check_linear, check_noise, measured
from scoresde.convert import denoised
from scoresde.types import SDE, Score, like


def dps(
    score: Score,
    sde: SDE,
    A: Operator,
    y: Tensor,
    noise_sd: float,
    *,
    zeta: float | None = None,
    ts: Tensor | None = None,
) -> Score:
    """s' = s - grad_x |y - A(x0(x))|^2 / (2 noise_sd^2)   (Chung 2023, diffusion posterior sampling).

    A:    any differentiable operator
    y:    one measurement, A(x0)'s shape without the batch, or one for each sample
    zeta: None: the weight above, the likelihood's.  A number: as published, each step of `ancestral` on the grid ts is
          followed by x1 <- x1 - zeta grad_x |y - A(x0(x))|; as a score that is zeta/b of the gradient, where
          b = (alpha1/alpha) (sigma^2 - (alpha/alpha1)^2 sigma1^2) is what ancestral multiplies the score by
    ts:   the grid of the run, with zeta; between its times the weight is that of the step
    Off at noise_sd = inf and at zeta = 0.  With zeta the noise's size is not used.

    Bias: p(y | E[x0 | x_t]) stands for E[p(y | x0) | x_t], which is wider.  The likelihood's weight needs tiny steps at
    high noise (it diverges on usual grids); zeta makes samples too wide by half, and its push grows with the number of
    steps.  One network call and one backward pass.
    """
    check_noise(noise_sd, positive=zeta is None)
    if (zeta is None) != (ts is None):
        raise ValueError("zeta is a step on a grid: give zeta and ts together, or neither for the likelihood's weight")
    if noise_sd == math.inf:
        return score
    if zeta is None or ts is None:
        return energy(score, sde, lambda x0: measured(A, y, x0).flatten(1).square().sum(1) / (2 * noise_sd**2))
    if not (zeta >= 0 and math.isfinite(zeta)):
        raise ValueError(f"zeta must be >= 0 and finite, got {zeta}")
    alpha, sigma = sde.alpha(ts), sde.sigma(ts)
    r = sigma / alpha
    b = alpha[1:] * alpha[:-1] * (r[:-1] ** 2 - r[1:] ** 2)
    weight, at = zeta / b, step_of(r)
    distance = lambda x0: torch.linalg.vector_norm(measured(A, y, x0).flatten(1), dim=1)  # noqa: E731
    return energy(score, sde, distance, lambda r: weight.to(r)[at(r)]) if zeta else score


def pigdm(score: Score, sde: SDE, A: Linear, y: Tensor, noise_sd: float, *, sigma_data: float = 1.0) -> Score:
    """s' = s + (dx0/dx)* A* (v A A* + noise_sd^2)^-1 (y - A x0)   (Song 2023, pseudo-inverse guidance).

    v = sigma^2 d^2 / (sigma^2 + alpha^2 d^2), the variance of x0 | x_t for data N(m, d^2 I)
    sigma_data: d, the data's standard deviation; the paper's is 1, and too wide where the data's is less
    noise_sd:   0 is the paper's A+; inf is off
    The weight is Bayes' rule; the published program gives the same gradient another one at every step.

    Bias: v I stands for the covariance of x0 | x_t; exact where the data are N(m, d^2 I).  One network call and one
    backward pass; the solve is exact where A's singular values are known, else conjugate gradients (no network).
    """
    check_linear(A)
    check_noise(noise_sd)
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")

    def push(x0: Tensor, t: Tensor, pull: Pull) -> Tensor:
        a2, s2 = (sde.alpha(t) * sigma_data) ** 2, sde.sigma(t) ** 2
        v = s2 * sigma_data**2 / (s2 + a2)
        return pull(A.ridge(measured(A, y, x0), noise_sd**2 / v) / like(v, x0))

    return _guided(score, sde, noise_sd, push)


def mmps(score: Score, sde: SDE, A: Linear, y: Tensor, noise_sd: float, *, iterations: int = 5) -> Score:
    """s' = s + J* A* (A V A* + noise_sd^2)^-1 (y - A x0),  V = (sigma^2/alpha) J*,  J = dx0/dx   (Rozet 2024, MMPS).

    V is the covariance of x0 | x_t, so the moments of x0 | x_t are matched (Boys 2023 with the full covariance).
    iterations: of conjugate gradients for the inverse; all of it after as many as there are measured numbers, and 5 do
                what 32 do for half of a digit
    noise_sd:   inf is off; at 0 the system may be singular

    A covariance leaves A V A* + noise_sd^2 no eigenvalue below noise_sd^2; a network's Jacobian may, and where the
    gradients find less than half of that they stop (else 5 of them blew up on a trained network).
    Bias: x0 | x_t is taken as a Gaussian, and V as if it did not change with x; exact for Gaussian data.  One network
    call and iterations + 1 products with its Jacobian (backward passes through one graph).
    """
    check_linear(A)
    check_noise(noise_sd)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")

    def push(x0: Tensor, t: Tensor, pull: Pull) -> Tensor:
        k = like(sde.sigma(t) ** 2 / sde.alpha(t), x0)
        product = lambda u: A(k * pull(A.adjoint(u))) + noise_sd**2 * u  # noqa: E731
        return pull(A.adjoint(cg(product, measured(A, y, x0), iterations, noise_sd**2)))

    return _guided(score, sde, noise_sd, push)


def tmpd(score: Score, sde: SDE, A: Linear, y: Tensor, noise_sd: float) -> Score:
    """s' = s + J* A* [(y - A x0) / (A V A* 1 + noise_sd^2)],  V = (sigma^2/alpha) J*   (Boys 2023, TMPD).

    The row sums A V A* 1 stand for the matrix A V A* of `mmps`.
    noise_sd: inf is off

    Bias: that of `mmps`, and row sums are not the matrix: exact only where A V A* is diagonal and x0 | x_t Gaussian.
    Where measured numbers are anticorrelated a row sum can be negative, and near -noise_sd^2 the push explodes.
    One network call and 2 products with its Jacobian.
    """
    check_linear(A)
    check_noise(noise_sd)

    def push(x0: Tensor, t: Tensor, pull: Pull) -> Tensor:
        k, R = like(sde.sigma(t) ** 2 / sde.alpha(t), x0), measured(A, y, x0)
        return pull(A.adjoint(R / (A(k * pull(A.adjoint(torch.ones_like(R)))) + noise_sd**2)))

    return _guided(score, sde, noise_sd, push)


Pull = Callable[[Tensor], Tensor]  # J* v, J = dx0/dx


def _guided(score: Score, sde: SDE, noise_sd: float, push: Callable[[Tensor, Tensor, Pull], Tensor]) -> Score:
    """s + push(x0, t, v -> J* v), with one network call; the score itself where the noise is infinite."""
    if noise_sd == math.inf:
        return score

    def guided(x: Tensor, t: Tensor) -> Tensor:
        def estimate(x: Tensor) -> tuple[Tensor, Tensor]:
            s = score(x, t)
            return denoised(s, x, t, sde), s

        x0, pull, s = torch.func.vjp(estimate, x, has_aux=True)  # type: ignore[misc]
        return s + push(x0, t, lambda v: pull(v)[0])

    return guided


def step_of(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """level -> i, the step of a decreasing grid it lies in: levels[i] >= level > levels[i + 1]."""
    up = -levels[:-1]

    def at(level: Tensor) -> Tensor:
        return torch.searchsorted(up.to(level), -level * (1 - 1e-6), right=True).sub(1).clamp(min=0)

    return at

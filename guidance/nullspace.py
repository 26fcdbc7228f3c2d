"""Posterior sampling by moving the x0-estimate: s' = (alpha x0' - x)/sigma^2, y = A x0 + noise_sd n, A linear.

No Jacobian of the network, so a backward pass less than the rules of `guidance.posterior`.  `ddnm` and `diffpir` are
scores for any sampler; `ddnm_plus` and `ddrm` also shape each step's noise, so they are a score and a hook for `ddim`
on one grid:

    s, hook = ddrm(score, sde, A, y, noise_sd, ts);  x = ddim(s, sde, x, ts, on_step=hook)

In the directions A does not see the sample follows the model; in the others the move is a rule of thumb, not Bayes':
none of them samples the posterior.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from guidance.operators import Linear, check_linear, check_noise, measured
from guidance.posterior import step_of
from scoresde.convert import denoised
from scoresde.types import SDE, Hook, Noise, Score, like


def ddnm(score: Score, sde: SDE, A: Linear, y: Tensor) -> Score:
    """x0' = A+ y + (1 - A+ A) x0   (Wang 2023, DDNM), so that A x0' = y: for measurements without noise.

    y: one measurement, or one for each sample
    Published with `ddim(eta=0.85)`.  Where the measurement has noise, `ddnm_plus`, or `diffpir` for any sampler.

    Bias: x0 is replaced where it is seen, and what that says of the rest is left to the later steps.
    One network call.
    """
    check_linear(A)
    return _moved(score, sde, lambda x0, t: A.pinv(measured(A, y, x0)))


def diffpir(score: Score, sde: SDE, A: Linear, y: Tensor, noise_sd: float, *, trust: float = 1.0) -> Score:
    """x0' = argmin |y - A z|^2/noise_sd^2 + (trust/r^2) |z - x0|^2,  r = sigma/alpha   (Zhu 2023, DiffPIR).

    x0' = x0 + A* (A A* + trust noise_sd^2/r^2)^-1 (y - A x0)
    trust:    > 0, in the estimate against the measurement; the paper's lambda
    noise_sd: 0 is `ddnm`; inf is off
    Published with steps x1 = alpha1 x0' + sigma1 (sqrt(1 - zeta) eps' + sqrt(zeta) z), eps' = (x - alpha x0')/sigma:
    `ddim`'s table with eta = sqrt(zeta) sigma/G, one for each step.

    Bias: x0 | x_t is taken as N(x0, r^2/trust), whatever the data, and moved by one step.  One network call; no
    network in the solve (see `Linear.ridge`).
    """
    check_linear(A)
    check_noise(noise_sd)
    if not trust > 0:
        raise ValueError(f"trust must be positive, got {trust}")
    if noise_sd == math.inf:
        return score

    def move(x0: Tensor, t: Tensor) -> Tensor:
        return A.ridge(measured(A, y, x0), trust * noise_sd**2 * torch.exp(2 * sde.lam(t)))

    return _moved(score, sde, move)


def ddnm_plus(
    score: Score,
    sde: SDE,
    A: Linear,
    y: Tensor,
    noise_sd: float,
    ts: Tensor,
    *,
    eta: float = 1.0,
    noise: Noise = torch.randn_like,
) -> tuple[Score, Hook]:
    """x1 = c x0' + d x + noise,  x0' = x0 + L A+ (y - A x0)   (Wang 2023, DDNM+): noise of the measurement counted in.

    c, d:  of `ddim` with eta on this grid, whose fresh noise has the deviation tau
    L:     min(1, tau s/(c noise_sd)) in each direction of singular value s, so that what x0' carries of the
           measurement's noise, c L noise_sd/s, is at most tau; the fresh noise has the variance that is left
    ts:    the grid of the run
    eta:   in (0, 1]; 1 as in the paper
    noise_sd: finite: where L < 1 the measurement's noise takes the place of fresh noise; 0 is `ddnm`
    Needs A's singular values.  Run by `ddim(s, sde, x, ts, on_step=hook)`, its own eta 0.  One network call a step.
    """
    _check_chain(A, noise_sd, eta)
    alpha, sigma, sigma1 = sde.alpha(ts[:-1]), sde.sigma(ts[:-1]), sde.sigma(ts[1:])
    r = alpha / sde.alpha(ts[1:])
    tau = eta * (sigma**2 - (r * sigma1) ** 2).clamp(min=0).sqrt() * sigma1 / sigma
    d = (sigma1**2 - tau**2).clamp(min=0).sqrt() / sigma
    c = alpha / r - alpha * d

    def share(e: Tensor, i: Tensor) -> Tensor:
        return (like(tau[i] / c[i], e) * e.sqrt() / noise_sd).clamp(max=1) if noise_sd else torch.ones_like(e)

    def mean(x: Tensor, x0: Tensor, i: Tensor) -> Tensor:
        moved = x0 + _filter(A, lambda e: share(e, i), measured(A, y, x0))
        return like(c[i], x) * moved + like(d[i], x) * x

    def deviation(e: Tensor, i: int) -> Tensor:
        return (tau[i] ** 2 - c[i] ** 2 * noise_sd**2 / e).clamp(min=0).sqrt()

    return _chain(score, sde, A, ts, mean, tau, deviation, noise)


def ddrm(
    score: Score,
    sde: SDE,
    A: Linear,
    y: Tensor,
    noise_sd: float,
    ts: Tensor,
    *,
    eta: float = 0.85,
    eta_b: float = 1.0,
    noise: Noise = torch.randn_like,
) -> tuple[Score, Hook]:
    """A step by the singular values s of A   (Kawar 2022, DDRM).  For x/alpha, with q = noise_sd/s:

        s = 0:     x0 + sqrt(1 - eta^2) r1 eps,          noise eta r1
        r1 < q:    x0 + sqrt(1 - eta^2) (r1/q) (y' - x0), noise eta r1
        r1 >= q:   x0 + eta_b (y' - x0),                 noise sqrt(r1^2 - eta_b^2 q^2)

    y' = A+ y;  eps = (x - alpha x0)/sigma;  r1 = sigma1/alpha1 after the step
    ts:         the grid of the run
    eta, eta_b: in [0, 1], as in the paper
    noise_sd:   finite: where q is large the measurement's noise takes the place of fresh noise
    Needs A's singular values (`spectral` finds them).  Run by `ddim(s, sde, x, ts, on_step=hook)`, its own eta 0, from
    the prior; the paper starts the measured directions at y', which the first step does.  One network call a step.
    """
    _check_chain(A, noise_sd, eta)
    if not 0 <= eta_b <= 1:
        raise ValueError(f"eta_b must lie in [0, 1], got {eta_b}")
    alpha, sigma, alpha1 = sde.alpha(ts[:-1]), sde.sigma(ts[:-1]), sde.alpha(ts[1:])
    r1 = sde.sigma(ts[1:]) / alpha1
    keep = math.sqrt(1 - eta**2)

    def mean(x: Tensor, x0: Tensor, i: Tensor) -> Tensor:
        def pull(e: Tensor) -> Tensor:
            r, q = like(r1[i], e), noise_sd / e.sqrt()
            return torch.where(r >= q, eta_b, keep * r / torch.where(r >= q, 1.0, q))

        eps = (x - like(alpha[i], x) * x0) / like(sigma[i], x)
        unseen = eps - _filter(A, torch.ones_like, A(eps))
        moved = x0 + like(keep * r1[i], x) * unseen + _filter(A, pull, measured(A, y, x0))
        return like(alpha1[i], x) * moved

    def deviation(e: Tensor, i: int) -> Tensor:
        r, q = r1[i], noise_sd / e.sqrt()
        return alpha1[i] * torch.where(r >= q, (r**2 - (eta_b * q) ** 2).clamp(min=0).sqrt(), eta * r)

    return _chain(score, sde, A, ts, mean, eta * r1 * alpha1, deviation, noise)


def _moved(score: Score, sde: SDE, move: Callable[[Tensor, Tensor], Tensor]) -> Score:
    """The score of the estimate x0 + move(x0, t)."""

    def moved(x: Tensor, t: Tensor) -> Tensor:
        s = score(x, t)
        return s + like(sde.alpha(t) / sde.sigma(t) ** 2, x) * move(denoised(s, x, t, sde), t)

    return moved


def _chain(
    score: Score,
    sde: SDE,
    A: Linear,
    ts: Tensor,
    mean: Callable[[Tensor, Tensor, Tensor], Tensor],
    unseen: Tensor,
    seen: Callable[[Tensor, int], Tensor],
    noise: Noise,
) -> tuple[Score, Hook]:
    """A step x1 = mean(x, x0, i) + noise as a score for `ddim`, x1 = a x + b s', and a hook that adds the noise.

    unseen: its deviation where A sees nothing, (N,);  seen: (e, i) -> that along eigenvectors of A* A of eigenvalue e
    """
    alpha, sigma = sde.alpha(ts), sde.sigma(ts)
    a = alpha[1:] / alpha[:-1]
    b = sigma[:-1] * (sigma[:-1] * a - sigma[1:])
    at = step_of(ts)

    def stepping(x: Tensor, t: Tensor) -> Tensor:
        i = at(t).to("cpu")
        x0 = denoised(score(x, t), x, t, sde)
        return (mean(x, x0, i) - like(a[i], x) * x) / like(b[i], x)

    noisy = (sigma[1:] > 0).tolist()

    def hook(i: int, t: Tensor, x: Tensor) -> Tensor | None:
        if not noisy[i]:
            return None
        z = noise(x)
        return x + unseen[i] * z + _filter(A, lambda e: seen(e, i) - unseen[i], A(z))

    return stepping, hook


def _filter(A: Linear, gain: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """A* (gain(e)/e) v over the eigenvalues e > 0 of A A*: gain(A* A) A+ v."""
    assert A.filter is not None

    def phi(e: Tensor) -> Tensor:
        none = e <= e.amax() * (100 * torch.finfo(e.dtype).eps) ** 2
        safe = torch.where(none, 1.0, e)
        return torch.where(none, 0.0, gain(safe) / safe)

    return A.filter(phi, v)


def _check_chain(A: Linear, noise_sd: float, eta: float) -> None:
    check_linear(A)
    check_noise(noise_sd)
    if noise_sd == math.inf:
        raise ValueError(
            "noise_sd must be finite: here the measurement's own noise drives the sample; inf says nothing"
        )
    if A.filter is None:
        raise ValueError("this rule works in A's singular directions, which are not known; spectral(A) finds them")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (0 without fresh noise, 1 as published), got {eta}")

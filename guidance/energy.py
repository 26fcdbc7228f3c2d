"""Gradients as guidance: any energy of the x0-estimate, and classifiers of the noisy state."""

from collections.abc import Callable

import torch
from torch import Tensor

from guidance.weights import Interval, Weight, acting, check_weight, weight_at
from scoresde.convert import denoised
from scoresde.types import SDE, Score, like

Energy = Callable[[Tensor], Tensor]  # x0 (B, ...) -> (B,), low is good


def energy(
    score: Score,
    sde: SDE,
    E: Energy,
    scale: Weight = 1.0,
    *,
    through: bool = True,
    sigma_data: float = 0.5,
    interval: Interval | None = None,
) -> Score:
    """s' = s - scale grad_x E(x0(x)),  x0(x) = (x + sigma^2 s)/alpha   (Chung 2023, DPS; Bansal 2023).

    E:       x0 (B, ...) -> (B,), differentiable
    scale:   0 off; a number, (B,), or a function of sigma/alpha
    through: True: the gradient goes through the network, dx0/dx exactly.  False, the cheap way: the
             network's Jacobian is replaced by that of Gaussian data of standard deviation
             sigma_data, dx0/dx = alpha sd^2 / (alpha^2 sd^2 + sigma^2).  (The bare gradient at x0,
             without that factor, destroys the image at high noise.)
    interval: (low, high) in sigma/alpha; outside it nothing but the score is evaluated

    Bias: exp(-E(x0(x))) stands for E[exp(-E(x0)) | x]; exact where E is linear or sigma -> 0.
    One network call; through=True adds one backward pass.  Nests: it differentiates and is
    differentiated (`torch.func`).
    """
    check_weight(scale, sde, interval)
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    if isinstance(scale, int | float) and scale == 0:
        return score

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        if act is False:
            return score(x, t)
        if through:

            def estimate(y: Tensor) -> tuple[Tensor, Tensor]:
                s = score(y, t)
                return denoised(s, y, t, sde), s

            x0, pull, s = torch.func.vjp(estimate, x, has_aux=True)  # type: ignore[misc]
            grad = pull(_gradient(E, x0))[0]
        else:
            s = score(x, t)
            a2 = (sde.alpha(t) * sigma_data) ** 2
            slope = a2 / (sde.alpha(t) * (a2 + sde.sigma(t) ** 2))
            grad = like(slope, x) * _gradient(E, denoised(s, x, t, sde))
        guided_s = s - weight_at(scale, sde, x, t) * grad
        return guided_s if act is True else torch.where(like(act, x).bool(), guided_s, s)

    return guided


def classifier(
    score: Score,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    scale: Weight = 1.0,
    *,
    sde: SDE | None = None,
    interval: Interval | None = None,
) -> Score:
    """s' = s + scale grad_x log p(y | x_t)   (Dhariwal & Nichol 2021, algorithm 1 and 2).

    log_prob: (x, t) -> (B,), log-probability of the wanted class from a classifier trained on noisy
              states; for one trained on clean data use `energy` with E = -log p(y | x0)
    scale:    0 off, 1 Bayes' rule: exact for the exact classifier; > 1 sharper
    One network call, one classifier pass forward and back.
    """
    check_weight(scale, sde, interval)
    if isinstance(scale, int | float) and scale == 0:
        return score

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        s = score(x, t)
        if act is False:
            return s
        grad = torch.func.grad(lambda y: log_prob(y, t).sum())(x)
        guided_s = s + weight_at(scale, sde, x, t) * grad
        return guided_s if act is True else torch.where(like(act, x).bool(), guided_s, s)

    return guided


def _gradient(E: Energy, x0: Tensor) -> Tensor:
    """dE/dx0, sample by sample."""

    def total(y: Tensor) -> Tensor:
        value = E(y)
        if value.shape != (len(y),):
            raise ValueError(f"an energy must return one number a sample, (B,) = ({len(y)},), got {tuple(value.shape)}")
        return value.sum()

    return torch.func.grad(total)(x0)

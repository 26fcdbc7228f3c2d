"""Gradients as guidance: any energy of the x0-estimate, and classifiers of the noisy state."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from guidance.rows import by_rows
from guidance.weights import Interval, Weight, acting, check_weight, chosen, is_number, weight_at
from scoresde.convert import denoised
from scoresde.types import SDE, Score, like

Energy = Callable[[Tensor], Tensor]  # x0 (B, ...) -> (B,), low is good


@by_rows("score", "E", each=["scale"])
def energy(
    score: Score,
    sde: SDE,
    E: Energy,
    scale: Weight = 1.0,
    *,
    through: bool = True,
    sigma_data: float = 0.5,
    normalize: bool = False,
    limit: float = math.inf,
    interval: Interval | None = None,
) -> Score:
    """s' = s - scale grad_x E(x0(x)),  x0(x) = (x + sigma^2 s)/alpha   (Chung 2023, DPS; Bansal 2023).

    E:       x0 (B, ...) -> (B,), differentiable.  -log p(y | x0) is a classifier of clean images; E(decode(z0)) as
             `lambda z0: E(decode(z0))` guides a latent model; a sum is `total([E1, E2], [w1, w2])`.  One that holds
             nothing for a row says so by `rowwise(E)`, and adaptive solvers let finished samples go
    scale:   0 off; a number, (B,), or a function of sigma/alpha
    through: True: the gradient goes through the network, dx0/dx exactly.  False, the cheap way: the
             network's Jacobian is replaced by that of Gaussian data of standard deviation
             sigma_data, dx0/dx = alpha sd^2 / (alpha^2 sd^2 + sigma^2).  (The bare gradient at x0,
             without that factor, destroys the image at high noise.)
    normalize: the gradient is brought to the score's length, g |s|/|g|, so that scale has no unit: 0.1 to 1
    limit:   >= 0; what is added is never longer than limit |s| (inf: off).  Norms are those of one sample
    interval: (low, high) in sigma/alpha; outside it nothing but the score is evaluated

    Bias: exp(-E(x0(x))) stands for E[exp(-E(x0)) | x]; exact for linear E on Gaussian data, and as sigma -> 0.
    normalize and limit make a field that is no gradient.  With the hook `travel` of `samplers.hooks` (up in noise
    and down again) it is FreeDoM (Yu 2023, algorithm 2).
    One network call; through=True adds one backward pass.  Nests: it differentiates and is
    differentiated (`torch.func`).
    """
    check_weight(scale, sde, interval)
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    if not limit >= 0:
        raise ValueError(f"limit must be >= 0, in lengths of the score, got {limit}")
    if is_number(scale, 0):
        return score

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        if act is False:
            return score(x, t)
        s, x0, pull = estimate(score, sde, x, t, through, sigma_data)
        grad = pull(gradient(E, x0))
        if normalize:
            grad = grad * like(_ratio(s, grad), x)
        push = weight_at(scale, sde, x, t) * grad
        if limit < math.inf:
            push = push * like((limit * _ratio(s, push)).clamp(max=1), x)
        return chosen(act, s - push, s)

    return guided


def stages(score: Score, sde: SDE, plan: Sequence[tuple[Interval, Energy]], scale: Weight = 1.0, **knobs: Any) -> Score:
    """`energy` with another E in each interval of sigma/alpha: overviews first, details later.

    scale: 0 off
    plan:  ((low, high), E), each acting where low <= sigma/alpha < high; they must not overlap, and between them
           nothing acts
    knobs: of `energy`
    At any t at most one energy acts: the cost is that of `energy`.
    """
    for ((_, high), _), ((low, _), _) in zip(ordered := sorted(plan, key=lambda p: p[0]), ordered[1:], strict=False):
        if low < high:
            raise ValueError(f"stages must not overlap: one ends at sigma/alpha = {high:g}, the next begins at {low:g}")
    for (low, high), E in plan:
        check_weight(scale, sde, (low, high))
        ends = (low, math.nextafter(high, -math.inf))
        score = energy(score, sde, E, scale, interval=ends, **knobs)
    return score


@by_rows("score", "E", each=["rate"])
def mpgd(
    score: Score,
    sde: SDE,
    E: Energy,
    rate: Weight,
    *,
    steps: int = 1,
    project: Callable[[Tensor], Tensor] | None = None,
    interval: Interval | None = None,
) -> Score:
    """x0' = x0 - rate grad E(x0), `steps` times;  s' = (alpha x0' - x)/sigma^2   (He 2024, MPGD, algorithm 1).

    rate:    0 off; a number, (B,), or a function of sigma/alpha, in the unit of x0^2 / E
    project: after each step, back to where images are (an autoencoder: the paper's MPGD-AE)
    interval: (low, high) in sigma/alpha; outside it nothing but the score is evaluated

    Moves the estimate, not the state: s' = s + (alpha/sigma^2)(x0' - x0), a push that does not fade at high noise as
    `energy`'s does.  Bias: no known density is sampled, and what is depends on the grid.
    One network call, no product with its Jacobian, `steps` gradients of E.
    """
    check_weight(rate, sde, interval)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if is_number(rate, 0) and project is None:
        return score

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        s = score(x, t)
        if act is False:
            return s
        x0 = denoised(s, x, t, sde)
        moved = x0
        for _ in range(steps):
            moved = moved - weight_at(rate, sde, x, t) * gradient(E, moved)
            moved = moved if project is None else project(moved)
        return chosen(act, s + like(sde.alpha(t) / sde.sigma(t) ** 2, x) * (moved - x0), s)

    return guided


@by_rows("score", "E", each=["scale"])
def universal(
    score: Score,
    sde: SDE,
    E: Energy,
    scale: Weight = 1.0,
    *,
    steps: int = 0,
    rate: float = 0.1,
    interval: Interval | None = None,
) -> Score:
    """s' = s - scale grad_x E(x0(x)) + (alpha/sigma^2) D   (Bansal 2023, eq. 6, 7 and 9; algorithm 1).

    The forward part is `energy`, the backward part D = x0' - x0 is `mpgd`'s: `steps` of gradient descent from x0,
        D <- D - rate grad E(x0 + D)
    both at the x0 of the unguided score.  scale = 0: backward alone;  steps = 0: forward alone; both: off.
    rate:    > 0
    The paper's self-recurrence is the hook `travel` of `samplers.hooks`.  Bias: of both.
    One network call and one backward pass through it (none where scale = 0), max(1, steps) gradients of E.
    """
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    check_weight(scale, sde, interval)
    if not steps:
        return energy(score, sde, E, scale, interval=interval)
    if not 0 < rate < math.inf:
        raise ValueError(f"rate must be positive and finite, got {rate}")
    if is_number(scale, 0):
        return mpgd(score, sde, E, rate, steps=steps, interval=interval)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        if act is False:
            return score(x, t)
        s, x0, pull = estimate(score, sde, x, t)
        first = gradient(E, x0)
        D = -rate * first
        for _ in range(steps - 1):
            D = D - rate * gradient(E, x0 + D)
        push = weight_at(scale, sde, x, t) * pull(first)
        return chosen(act, s - push + like(sde.alpha(t) / sde.sigma(t) ** 2, x) * D, s)

    return guided


@by_rows("score", "log_prob", each=["scale"])
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
    if is_number(scale, 0):
        return score

    def guided(x: Tensor, t: Tensor) -> Tensor:
        act = acting(interval, sde, t)
        s = score(x, t)
        if act is False:
            return s
        grad = torch.func.grad(lambda y: log_prob(y, t).sum())(x)
        return chosen(act, s + weight_at(scale, sde, x, t) * grad, s)

    return guided


def gradient(E: Energy, x0: Tensor) -> Tensor:
    """dE/dx0, sample by sample."""

    def total(y: Tensor) -> Tensor:
        value = E(y)
        if value.shape != (len(y),):
            raise ValueError(f"an energy must return one number a sample, (B,) = ({len(y)},), got {tuple(value.shape)}")
        return value.sum()

    return torch.func.grad(total)(x0)


def estimate(
    score: Score, sde: SDE, x: Tensor, t: Tensor, through: bool = True, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """s, x0 and v -> (dx0/dx)' v: exact by one backward pass, or that of N(0, sigma_data^2) data."""
    if through:

        def both(y: Tensor) -> tuple[Tensor, Tensor]:
            s = score(y, t)
            return denoised(s, y, t, sde), s

        x0, pull, s = torch.func.vjp(both, x, has_aux=True)  # type: ignore[misc]
        return s, x0, lambda v: pull(v)[0]
    s = score(x, t)
    a2 = (sde.alpha(t) * sigma_data) ** 2
    slope = like(a2 / (sde.alpha(t) * (a2 + sde.sigma(t) ** 2)), x)
    return s, denoised(s, x, t, sde), lambda v: slope * v


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """|a|/|b| for each sample, 0 where b = 0, (B,)."""
    u, v = (torch.linalg.vector_norm(k.flatten(1), dim=1) for k in (a, b))
    return torch.where(v > 0, u / torch.where(v > 0, v, 1.0), 0.0)

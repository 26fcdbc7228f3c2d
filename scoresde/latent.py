"""Likelihood through a latent: an encoder and a decoder around any density of z.

    log p(x) >= E_q(z|x)[log p(x|z) + log p(z) - log q(z|x)]                    (Kingma 2014; Vahdat 2021)
    log p(x) >= E log 1/K sum_j p(x|z_j) p(z_j) / q(z_j|x)                      (Burda 2016, eq. 8)

The gap of the first is KL(q(z|x) || p(z|x)); the second rises to log p(x) with K.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.discrete import importance_bound
from scoresde.types import Noise


class Latent(NamedTuple):
    """What `latent_log_prob` found, nats, float64.

    log_p    (B,): the bound on log p(x), of K draws
    decoder  (B,): mean of log p(x|z) over the draws
    prior    (B,): mean of log p(z)
    encoder  (B,): mean of -log q(z|x)
    terms    (K, B): their sum for each draw; `importance_bound` makes the bound of fewer draws
    """

    log_p: Tensor
    decoder: Tensor
    prior: Tensor
    encoder: Tensor
    terms: Tensor


def latent_log_prob(
    prior: Callable[[Tensor], Tensor],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    decode: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    *,
    K: int = 1,
    noise: Noise = torch.randn_like,
) -> Latent:
    """The bound on log p(x) of a latent model; at K = 1 it is decoder + prior + encoder, above it is no less.

    x (B, ...)
    prior:   z (B, ...) -> log p(z) in nats (B,), as `lambda z: log_prob(score, sde, z)`; in the units of z, so a
             latent that is scaled for the diffusion is scaled in `encode` and `decode`, mean and std alike
    encode:  x -> mean and std of q(z|x) = N(mean, diag(std^2)), both (B, ...) of z's shape, std > 0
    decode:  (x, z) -> log p(x|z) in nats (B,); a log-mass where x is discrete
    noise:   one stream per item makes a value repeatable, the same in any batch; more draws begin with the same
    Noise in the prior (Hutchinson's trace) lifts the bound for K > 1; see `code_length`.
    Cost: one call of encode, K of decode and prior.  Raises ValueError for a std that is not positive or terms that
    are not (B,), FloatingPointError for nan.
    """
    if K < 1:
        raise ValueError(f"K must be at least 1 draw, got {K}")
    mean, std = encode(x)
    if std.shape != mean.shape or not bool((std > 0).all()):
        raise ValueError(
            f"encode must return a mean and a positive std of one shape, got {tuple(mean.shape)}, {tuple(std.shape)} "
            f"and a smallest std of {float(std.min()):.3g}; a log-variance is std = (0.5 * logvar).exp()"
        )
    parts = []
    for _ in range(K):
        e = noise(mean)
        z = mean + std * e
        log_q = -(0.5 * e.double() ** 2 + std.double().log() + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        values = {"decode": decode(x, z), "prior": prior(z), "log q": log_q}
        for name, value in values.items():
            if value.shape != (len(x),):
                raise ValueError(
                    f"{name} must return nats of shape ({len(x)},), got {tuple(value.shape)}; sum over z or x"
                )
            if bool(value.isnan().any()):
                raise FloatingPointError(f"{name} of item {int(value.isnan().nonzero()[0])} is nan; check it there")
        parts.append(torch.stack([values["decode"].to(log_q), values["prior"].to(log_q), -log_q]))
    each = torch.stack(parts)  # (K, 3, B)
    terms = each.sum(1)
    decoder, prior_, encoder = each.mean(0)
    return Latent(importance_bound(terms, K), decoder, prior_, encoder, terms)

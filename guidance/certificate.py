"""Which density a guided flow samples, and how far that is from the one it is named after.

A guided probability flow is a normalising flow: with its own divergence every sample comes with log q(x), the
log-density it was drawn from (`scoresde.sample_log_prob`).  Against a target pi = f/Z with known log f

    KL(q || pi) = E_q[log q - log f] + log Z,     Z = E_q[f/q],     w = f/q

and averages under pi are averages of the samples weighted by w.  This holds for any score: guided, composed, trained.
For the paths of an SDE, which have no log q, `samplers.girsanov` gives the weight of one score's chain in another's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy.stats import genpareto
from torch import Tensor

from scoresde.likelihood import Prior, sample_log_prob
from scoresde.types import SDE, Score


class Certificate(NamedTuple):
    """n samples, what they were drawn from, and what it takes to make them the target's."""

    x: Tensor  # (n, ...) at time t
    log_q: Tensor  # nats, (n,), float64 as all below
    log_w: Tensor  # log f - log q, (n,)
    kl: float  # KL(q || pi), nats
    kl_error: float  # its standard error
    log_z: float  # log Z, estimated, or 0 of a normalised target
    normalised: bool
    ess: float  # effective sample size, (sum w)^2 / sum w^2, in 1..n
    tail: float  # index k of the weights' tail; above 1/2 their variance is infinite, what is made of them void

    def average(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, standard error) under pi of values (n, ...).

        Unbiased for a normalised target, sum w v / n; else sum w v / sum w, whose bias falls as 1/n.
        """
        n = len(self.log_w)
        w = (self.log_w - self.log_z).exp().reshape(-1, *[1] * (values.ndim - 1)) / n
        mean = (w * values).sum(0)
        if self.normalised:
            return mean, ((w * n * values).var(0) / n).sqrt()
        return mean, (w * (values - mean)).square().sum(0).sqrt()

    def __str__(self) -> str:
        alarm = "; weights too heavy to trust: q hardly reaches part of the target" if self.tail > 0.5 else ""
        return (
            f"KL {self.kl:.4g} ± {self.kl_error:.2g} nats (one standard error), "
            f"effective samples {self.ess:.0f} of {len(self.log_q)}, tail index {self.tail:.2f}{alarm}"
        )


def certify(
    score: Score,
    sde: SDE,
    x: Tensor,
    log_target: Callable[[Tensor], Tensor],
    *,
    t: float | Tensor | None = None,
    prior: Prior | None = None,
    normalised: bool = False,
    **how: Any,
) -> Certificate:
    """Samples of the flow of `score` from x (n, ...) at sde.T, drawn from the prior, with the certificate.

    log_target: x at time t -> log f (n,), up to a constant.  Of a tilted density, from models:
                    lambda x: (1 - w) * log_prob(uncond, sde, x, t=t) + w * log_prob(cond, sde, x, t=t)
    t:          default sde.t_min
    prior:      what x was drawn from, default N(0, prior_std^2 I)
    normalised: log_target is a log-density: log Z = 0 is used instead of its estimate, whose bias is about
                -Var(w) / (2 n mean(w)^2)
    how:        of `scoresde.change`: method, tol, probes, ...  With probes log q is noisy: unbiased in kl for a
                normalised target, while w, Z and ess see the noise too: of deviation e in log w it lowers ess by
                exp(-e^2) and raises log Z by e^2/2, with weights that are right.  Tell e by other probes (64-D, 400
                samples worth 383: e = 1.2, 0.11, 0.009 and ess 87, 380, 382 with 1, 4, 8 probes)
    Guided flows are narrower than what they are named after, and then the weights' tail is heavy: `tail` is fitted to
    the largest 3 sqrt(n) of them (Vehtari 2024).  Above 1/2 their variance is infinite: log_z, ess and averages,
    and kl unless the target is normalised, hang on a few samples, and more samples change them by jumps; kl of a
    normalised target, a mean of logarithms, stays right.
    """
    end, log_q = sample_log_prob(score, sde, x, t=t, prior=prior, **how)
    with torch.no_grad():
        log_q = log_q.double()
        log_f = log_target(end).detach().double()
    n = len(log_q)
    if log_f.shape != log_q.shape:
        raise ValueError(f"log_target must return one number a sample, ({n},), got {tuple(log_f.shape)}")
    if bool(log_f.isnan().any() | (log_f == math.inf).any()):
        bad = int((log_f.isnan() | (log_f == math.inf)).nonzero()[0])
        raise ValueError(f"log_target of sample {bad} is {float(log_f[bad])}; it must be finite, or -inf where f = 0")
    log_w = log_f - log_q
    log_z = 0.0 if normalised else float(log_w.logsumexp(0)) - math.log(n)
    share = torch.softmax(log_w, 0) * n  # w / mean(w)
    effect = -log_w if normalised else share - log_w
    return Certificate(
        end, log_q, log_w, float(-log_w.mean()) + log_z, float(effect.std() / n**0.5), log_z, normalised,
        float(1 / (share / n).square().sum()), _tail(log_w),
    )  # fmt: skip


def _tail(log_w: Tensor) -> float:
    """k of the generalised Pareto law of the largest weights; -inf of equal ones, NaN of fewer than 25."""
    n = len(log_w)
    if n < 25:
        return math.nan
    top = torch.sort(log_w - log_w.max()).values[-(min(n // 5, math.ceil(3 * n**0.5)) + 1) :].exp().numpy()
    excess = top[1:] - top[0]
    return float(genpareto.fit(excess, floc=0)[0]) if excess[-1] > 0.01 else -math.inf

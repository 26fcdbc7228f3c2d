"""The latent bound where log p(x) is known: z a Gaussian or a mixture, x = A z + b + noise."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal
from truth import F64, tensor

from scoresde import VP, Streams, gaussian, log_prob, mixture
from scoresde.discrete import importance_bound
from scoresde.latent import latent_log_prob

# columns at right angles, so that the posterior of independent z is independent
A = torch.linalg.qr(tensor([[1.0, 1.0], [1.0, -1.0], [0.5, 0.0], [0.0, 0.5]]))[0] @ torch.diag(tensor(1.5, 0.4))
b, NOISE = tensor(0.1, -0.2, 0.0, 0.5), 0.3
M, V = tensor(0.26, -0.13), tensor(1.15, 0.56)  # about the moments of the mixture below
X = tensor([[0.5, -0.7, 0.0, 1.0], [2.0, 0.4, -1.0, 0.0], [-1.0, -2.0, 0.3, 0.2]])
PRECISION = 1 / V + (A**2).sum(0) / NOISE**2
EVIDENCE = MultivariateNormal(A @ M + b, A @ torch.diag(V) @ A.T + NOISE**2 * torch.eye(4, dtype=F64))


def prior(z):
    return torch.distributions.Normal(M, V.sqrt()).log_prob(z).sum(1)


def decode(x, z):
    return torch.distributions.Normal(z @ A.T + b, NOISE).log_prob(x).sum(1)


def posterior(x):
    """Mean and std of z given x: Gaussian conditioning, diagonal since A'A is."""
    return (M / V + (x - b) @ A / NOISE**2) / PRECISION, PRECISION.rsqrt().expand(len(x), 2)


def wrong(x):
    mean, std = posterior(x)
    return mean + tensor(0.1, -0.2), std * tensor(1.4, 0.8)


def test_exact_with_the_exact_posterior():
    """No variance: every draw of every item gives log p(x)."""
    got = latent_log_prob(prior, posterior, decode, X, K=5, noise=Streams(0, 3))
    torch.testing.assert_close(got.terms, EVIDENCE.log_prob(X).expand(5, 3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.log_p, EVIDENCE.log_prob(X), rtol=1e-12, atol=1e-12)


def nodes(D):
    """A noise whose 2 D draws +-sqrt(D) e_d average a quadratic as N(0, I) does."""
    points = iter(math.sqrt(D) * torch.cat([torch.eye(D, dtype=F64), -torch.eye(D, dtype=F64)]))
    return lambda like: next(points).expand_as(like)


def test_the_gap_is_the_divergence_from_the_posterior():
    """And the three terms are their closed forms: all are quadratic in the noise, which four draws average exactly."""
    got = latent_log_prob(prior, wrong, decode, X, K=4, noise=nodes(2))
    (m, s), (m1, s1) = posterior(X), wrong(X)
    kl = ((s1**2 + (m1 - m) ** 2) / (2 * s**2) - 0.5 - (s1 / s).log()).sum(1)
    mean = importance_bound(got.terms, 1)
    torch.testing.assert_close(EVIDENCE.log_prob(X) - mean, kl, rtol=1e-10, atol=0)
    torch.testing.assert_close(got.decoder + got.prior + got.encoder, mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.encoder, (0.5 + 0.5 * math.log(2 * math.pi) + s1.log()).sum(1))
    torch.testing.assert_close(got.prior, prior(m1) - (s1**2 / (2 * V)).sum(1))
    torch.testing.assert_close(got.decoder, decode(X, m1) - (s1**2 * (A**2).sum(0)).sum(1) / (2 * NOISE**2))


MIX = mixture(tensor(0.3, 0.7), tensor([[-1.0, 0.5], [0.8, -0.4]]), var=tensor([[0.4, 0.6], [0.5, 0.3]]))


def evidence_of_mixture(x):
    parts = [
        w + MultivariateNormal(A @ m + b, A @ torch.diag(v) @ A.T + NOISE**2 * torch.eye(4, dtype=F64)).log_prob(x)
        for w, m, v in zip(MIX.log_weights, MIX.means, MIX.eig, strict=True)
    ]
    return torch.stack(parts).logsumexp(0)


def test_more_draws_rise_to_the_evidence():
    """A mixture's posterior is no Gaussian: the bound at K = 1, 10, 100 rises, and never above by 3 standard errors."""
    x = X.repeat(100, 1)

    def wide(x):
        mean, std = posterior(x)
        return mean, std * tensor(1.4, 1.2)

    got = latent_log_prob(MIX.log_prob, wide, decode, x, K=100, noise=Streams(0, 300))
    e = torch.stack([importance_bound(got.terms, K) for K in (1, 10, 100)]) - evidence_of_mixture(x)
    mean, se = e.mean(1), e.std(1) / 300**0.5
    assert (e.diff(dim=0) >= -1e-12).all()
    assert mean[0] < -0.1
    assert abs(mean[2]) < 0.02
    assert (mean <= 3 * se).all()
    torch.testing.assert_close(got.log_p - evidence_of_mixture(x), e[2])
    again = latent_log_prob(MIX.log_prob, wide, decode, x[4:5], K=7, noise=Streams(0, [4]))
    torch.testing.assert_close(again.terms, got.terms[:7, 4:5], rtol=1e-12, atol=0)


def test_the_prior_by_the_flow():
    """With log p(z) from the ODE at time t and the posterior of that prior, every draw gives its evidence."""
    sde, t = VP(), tensor(0.1)
    a, s = sde.alpha(t), sde.sigma(t)
    z0 = gaussian(M, var=V)
    m, v = a * M, a**2 * V + s**2
    precision = 1 / v + (A**2).sum(0) / NOISE**2
    got = latent_log_prob(
        lambda z: log_prob(z0.score(sde), sde, z, t=t, prior=lambda y: z0.log_prob(y, sde, tensor(1.0))),
        lambda x: ((m / v + (x - b) @ A / NOISE**2) / precision, precision.rsqrt().expand(len(x), 2)),
        decode,
        X,
        K=2,
        noise=Streams(0, 3),
    )
    evidence = MultivariateNormal(A @ m + b, A @ torch.diag(v) @ A.T + NOISE**2 * torch.eye(4, dtype=F64))
    torch.testing.assert_close(got.terms, evidence.log_prob(X).expand(2, 3), rtol=0, atol=1e-3)


def test_float32_latents_of_any_shape():
    def encode(x):
        mean, std = posterior(x)
        return mean.float().reshape(-1, 1, 2, 1), std.float().reshape(-1, 1, 2, 1)

    got = latent_log_prob(
        lambda z: prior(z.flatten(1)).float(), encode, lambda x, z: decode(x, z.flatten(1).double()), X, K=3
    )
    assert got.log_p.dtype == F64
    torch.testing.assert_close(got.terms, EVIDENCE.log_prob(X).expand(3, 3), rtol=0, atol=1e-4)


REFUSALS = {
    "K": (lambda: latent_log_prob(prior, posterior, decode, X, K=0), "K must be at least 1 draw, got 0"),
    "std": (
        lambda: latent_log_prob(prior, lambda x: (x[:, :2], x[:, :2]), decode, X),
        r"positive std.*smallest std of -2;.*\(0.5 \* logvar\).exp",
    ),
    "shapes": (lambda: latent_log_prob(prior, lambda x: (x[:, :2], x[:, :1] ** 2), decode, X), r"\(3, 2\), \(3, 1\)"),
    "decode": (
        lambda: latent_log_prob(prior, posterior, lambda x, z: x, X),
        r"decode must return nats of shape \(3,\), got \(3, 4\)",
    ),
    "prior": (lambda: latent_log_prob(lambda z: z.sum(), posterior, decode, X), r"prior must return.*got \(\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    call, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_broken_term_is_named():
    with pytest.raises(FloatingPointError, match="prior of item 1 is nan"):
        latent_log_prob(lambda z: tensor(0.0, math.nan, 0.0), posterior, decode, X)

"""The bound of a chain, term by term, against conditioned Gaussians, its joint density and 50 digits."""

import mpmath
import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from truth import F64, tensor

from scoresde import DiscreteVP, gaussian
from scoresde.bounds import bin_log_prob, chain_bound, normal_kl


def fixed(z):
    """A noise that is z everywhere."""
    return lambda x: torch.full_like(x, z)


BETAS = torch.linspace(0.02, 0.5, 12, dtype=F64)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_chain_terms_by_conditioning(variance):
    """Every KL of a chain on a scalar: q by conditioning the joint Gaussian of (x_{k-1}, x_k) that the betas make."""
    sde, score = DiscreteVP.from_betas(BETAS), lambda x, t: -torch.sin(2 * x) - 0.3 * x * t
    x, z = tensor([[0.3], [-1.3]]), 0.7
    ts = sde.label_time(torch.arange(11, -1, -1, dtype=F64))
    got = chain_bound(score, sde, x, ts, variance=variance, noise=fixed(z))

    def posterior(k, x0, xk):  # x_{k-1} | x_0, x_k
        m, v = x0.clone(), torch.zeros_like(x0)
        for b in BETAS[:k]:
            m, v = m * (1 - b).sqrt(), v * (1 - b) + b
        gain = (1 - BETAS[k]).sqrt() * v / ((1 - BETAS[k]) * v + BETAS[k])
        return m + gain * (xk - (1 - BETAS[k]).sqrt() * m), v - gain * (1 - BETAS[k]).sqrt() * v

    def noised(k):
        bar = torch.prod(1 - BETAS[: k + 1])
        xk = bar.sqrt() * x + (1 - bar).sqrt() * z
        return xk, (xk + (1 - bar) * score(xk, tensor((k + 1) / 12))) / bar.sqrt(), bar

    for k in range(11, 0, -1):
        xk, x0, _ = noised(k)
        (m, v), (m1, v1) = posterior(k, x, xk), posterior(k, x0, xk)
        v1 = v1 if variance == "small" else BETAS[k] * torch.ones_like(v)
        want = kl_divergence(Normal(m, v.sqrt()), Normal(m1, v1.sqrt()))[:, 0]
        torch.testing.assert_close(got.steps[:, 11 - k], want, rtol=1e-9, atol=1e-12)
    _, x0, _ = noised(0)
    v = posterior(1, x, x)[1]
    torch.testing.assert_close(got.reconstruction, -Normal(x0, v.sqrt()).log_prob(x)[:, 0])
    bar = torch.prod(1 - BETAS)
    want = kl_divergence(Normal(bar.sqrt() * x, (1 - bar).sqrt()), Normal(tensor(0.0), tensor(1.0)))[:, 0]
    torch.testing.assert_close(got.prior, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got.total, got.prior + got.steps.sum(1) + got.reconstruction)
    binned = chain_bound(score, sde, x, ts, bins=(20, -2.0, 2.0), variance=variance, noise=fixed(z))
    mass = Normal(x0, v.sqrt()).cdf(torch.cat([x - 0.1, x + 0.1], 1)).diff(dim=1)[:, 0]
    torch.testing.assert_close(binned.reconstruction, -mass.log(), rtol=1e-7, atol=0)
    torch.testing.assert_close(binned.steps, got.steps)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_chain_bound_of_a_gaussian_chain(variance):
    """With the score of N(0.7, 0.25) data the chain x_N..x_0 is jointly Gaussian: by its 13 x 13 covariance
    E[total] = -E_q[log p(x, x_1..x_N)] - H(q), item by item, which is above -log p(x).  (The terms are squares of one
    draw each, so their expectation is the mean of z = +-1.)"""
    sde, x, N = DiscreteVP.from_betas(BETAS), tensor([[-0.4], [0.3], [0.7], [1.9]]), 12
    score = gaussian(tensor([0.7]), var=0.25).score(sde)
    ts = sde.label_time(torch.arange(N - 1, -1, -1, dtype=F64))
    got = sum(chain_bound(score, sde, x, ts, variance=variance, noise=fixed(z)).total for z in (-1.0, 1.0)) / 2
    bar = torch.cat([tensor([1.0]), torch.cumprod(1 - BETAS, 0)])  # of x_0..x_N
    A, b = torch.eye(N + 1, dtype=F64), torch.zeros(N + 1, dtype=F64)  # A x = b + sqrt(v) z
    v = torch.ones(N + 1, dtype=F64)
    for k in range(1, N + 1):
        beta, gain = BETAS[k - 1], 0.25 * bar[k].sqrt() / (0.25 * bar[k] + 1 - bar[k])
        to_x0, to_x = bar[k - 1].sqrt() * beta / (1 - bar[k]), (1 - beta).sqrt() * (1 - bar[k - 1]) / (1 - bar[k])
        A[k - 1, k] = -(to_x + to_x0 * gain)
        b[k - 1] = to_x0 * 0.7 * (1 - gain * bar[k].sqrt())
        small = beta * (1 - bar[k - 1]) / (1 - bar[k])
        v[k - 1] = beta if variance == "large" else small
        if k == 2:
            v[0] = small
    inverse = torch.linalg.inv(A)
    chain = MultivariateNormal(inverse @ b, inverse @ v.diag() @ inverse.T)
    i = torch.arange(N + 1)
    early, late = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    q = (bar[late] / bar[early]).sqrt() * (1 - bar[early])  # covariance of x_0..x_N given x_0
    entropy = MultivariateNormal(torch.zeros(N, dtype=F64), q[1:, 1:]).entropy()
    want = -chain.log_prob(bar.sqrt() * x) + 0.5 * (chain.precision_matrix @ q).trace() - entropy
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert (got > -Normal(chain.mean[0], chain.variance[0].sqrt()).log_prob(x[:, 0])).all()


def test_bin_masses_in_the_tails():
    """Against 50 digits, 130 standard deviations out; open ends; over all bins they add up to 1."""
    bins, mean, k = (40, -1.0, 1.0), 0.3, torch.arange(40)
    for std in (0.02, 0.01):
        got = bin_log_prob(k, tensor(mean), std, bins)
        cdf = lambda y, std=std: mpmath.ncdf((mpmath.mpf(y) - mpmath.mpf(mean)) / mpmath.mpf(std))  # noqa: E731
        for i in (1, 10, 26, 27, 35):  # mirrored above the mean: 1 - Phi would need a thousand digits
            a, b = -1 + 0.05 * i, -0.95 + 0.05 * i
            mass = cdf(b) - cdf(a) if b < mean else cdf(2 * mean - a) - cdf(2 * mean - b)
            assert got[i].item() == pytest.approx(float(mpmath.log(mass)), rel=1e-9)
        assert got[0].item() == pytest.approx(float(mpmath.log(cdf(-0.95))), rel=1e-12)
        assert got[39].item() == pytest.approx(float(mpmath.log(cdf(2 * mean - 0.95))), rel=1e-12)
    for std in (0.02, 0.5, 30.0):
        assert bin_log_prob(k, tensor(mean), std, bins).logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    assert bin_log_prob(tensor([0.0]).long(), tensor([5.0]), 0.1, (1, -1.0, 1.0)).item() == 0


def test_normal_kl():
    m, v, m1, v1 = tensor([0.3, -2.0]), tensor([0.5, 1e-6]), tensor([0.1, -2.001]), tensor([2.0, 1.1e-6])
    torch.testing.assert_close(normal_kl(m, v, m1, v1), kl_divergence(Normal(m, v.sqrt()), Normal(m1, v1.sqrt())))

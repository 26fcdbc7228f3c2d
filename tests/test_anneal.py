"""The annealed path against autograd of its density, Gaussian conditioning and exact posteriors; relax by moments."""

import math

import pytest
import torch
from truth import F64, SDES, Draws, gaussian_score, moments, tensor

from experiments.posteriors import posterior
from guidance.anneal import anneal
from guidance.operators import blur, linear, mask, spectral
from samplers import ancestral, grids, relax
from scoresde import VP, counted, mixture

SD, D2 = 0.3, 0.25  # noise of the measurement; sigma_data^2
MATRIX = tensor([[1.0, -0.5, 0.3], [0.2, 0.7, -1.1]])
Y = tensor([0.4, -0.2])
TARGET = mixture(
    torch.ones(2),
    tensor([[0.6, 0.1, -0.3], [-0.5, 0.4, 0.2]]),
    covs=torch.stack([torch.diag(tensor([0.1, 0.3, 0.05])), 0.1 * torch.eye(3, dtype=F64) + 0.05]),
)
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def operator():
    return linear(lambda x: x @ MATRIX.T, (3,))


def log_likelihood(sde, x, t):
    """log N(y; (k/alpha) A x, noise^2 + k r^2 A A') with dense matrices."""
    alpha, r2 = sde.alpha(t), (sde.sigma(t) / sde.alpha(t)) ** 2
    k = D2 / (D2 + r2)
    cov = SD**2 * torch.eye(2, dtype=F64) + k * r2 * MATRIX @ MATRIX.T
    return torch.distributions.MultivariateNormal((k / alpha) * x @ MATRIX.T, cov).log_prob(Y)


@pytest.mark.parametrize("name", ["VP", "EDM"])
@pytest.mark.parametrize("level", [0.05, 0.5, 3.0])
def test_score_is_the_gradient_of_the_density(name, level):
    sde = SDES[name]
    t = sde.time(-torch.tensor(level, dtype=F64).log())
    x = X.clone().requires_grad_()
    exact = torch.autograd.grad((TARGET.log_prob(x, sde, t) + log_likelihood(sde, x, t)).sum(), x)[0]
    for A in (operator(), spectral(operator())):
        s = anneal(TARGET.score(sde), sde, A, Y, SD)(X, t)
        torch.testing.assert_close(s, exact, rtol=1e-9, atol=1e-9)
    each = anneal(TARGET.score(sde), sde, operator(), Y.expand(4, 2), SD)(X, t)
    torch.testing.assert_close(each, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [0.05, 0.5, 3.0])
def test_exact_at_every_time_for_gaussian_data(level):
    """Data N(0, d^2 I): the score of p(x_t | y), from the conditional covariance of x_t."""
    sde = SDES["VP"]
    t = sde.time(-torch.tensor(level, dtype=F64).log())
    a, s2 = sde.alpha(t), sde.sigma(t) ** 2
    S = D2 * MATRIX @ MATRIX.T + SD**2 * torch.eye(2, dtype=F64)
    gain = D2 * MATRIX.T @ torch.linalg.inv(S)
    V = a**2 * (D2 * torch.eye(3, dtype=F64) - gain @ MATRIX * D2) + s2 * torch.eye(3, dtype=F64)
    exact = -torch.linalg.solve(V, (X - a * gain @ Y).T).T
    s = anneal(gaussian_score(sde, 0.0, D2), sde, operator(), Y, SD, sigma_data=D2**0.5)(X, t)
    torch.testing.assert_close(s, exact, rtol=1e-9, atol=1e-9)


def test_posterior_as_t_goes_to_zero():
    """The error of the score falls as r^2."""
    exact, log_z = posterior(TARGET, operator(), Y, SD)
    sde, errors = SDES["EDM"], []
    for r in (0.02, 0.01):
        t = torch.tensor(r, dtype=F64)
        s = anneal(TARGET.score(sde), sde, operator(), Y, SD)(X, t)
        errors.append(float((s - exact.score(sde)(X, t)).abs().max()))
    assert errors[1] < 0.1
    assert 3.8 < errors[0] / errors[1] < 4.2
    near = TARGET.log_prob(X) + torch.distributions.Normal(X @ MATRIX.T, SD).log_prob(Y).sum(1) - log_z
    torch.testing.assert_close(exact.log_prob(X), near)  # Bayes' rule


def test_off_and_hard():
    score = TARGET.score(SDES["VP"])
    assert anneal(score, SDES["VP"], operator(), Y, math.inf) is score
    t = torch.tensor(0.3, dtype=F64)
    soft, hard = (anneal(score, SDES["VP"], operator(), Y, sd)(X, t) for sd in (1e-6, 0.0))
    torch.testing.assert_close(soft, hard)


def test_curvature_is_at_most_that_of_the_noise():
    """grad^2 log L_t >= -1/sigma^2 for operators of any size, so one step size in sigma serves all."""
    for A in (blur(0.6, (16,)), linear(lambda x: 30 * x[:, :5], (16,))):
        for level in (0.01, 0.3, 10.0):
            sde, x = SDES["VP"], torch.zeros(1, 16, dtype=F64)
            t = sde.time(-torch.tensor(level, dtype=F64).log())
            y = torch.zeros_like(A(x))[0]
            push = anneal(lambda x, t: 0 * x, sde, A, y, 0.01)
            J = torch.func.jacrev(lambda x: push(x[None], t)[0])(x[0])  # noqa: B023
            assert float(torch.linalg.eigvalsh((J + J.T) / 2).min()) * float(sde.sigma(t)) ** 2 > -1 - 1e-9


@pytest.mark.parametrize(("step", "friction"), [(0.3, 0.2), (0.7, 0.2), (1.3, 1.0), (0.7, math.inf)])
def test_relax_has_the_exact_variance(step, friction):
    """N(m, V) at one level: its stationary variance is V however long the step; by impulses, no Monte Carlo."""
    sde, t, n = VP(), torch.tensor(0.4, dtype=F64), 150 if friction > 0.5 else 300
    V = float(sde.sigma(t)) ** 2 * torch.tensor([[1.0, 0.6, 4.0]], dtype=F64)
    score = lambda x, t: (0.7 - x) / V  # noqa: E731
    x = torch.zeros(n + 3, 3, dtype=F64)
    x[1] = 1
    impulse = Draws(lambda i, x: torch.zeros_like(x).index_fill_(0, torch.tensor([2 + i]), 1.0))
    asked = counted(score)
    out = relax(asked, sde, n, step=step, friction=friction, noise=impulse)(0, t, x)
    assert asked.calls == n
    slow = (out[1] - out[0]).abs().max()
    assert slow < 2e-2  # how far it still feels where it began
    torch.testing.assert_close((out[2:] - out[0]).square().sum(0), V[0], rtol=4 * float(slow) ** 2 + 1e-9, atol=0)
    torch.testing.assert_close(out[0], torch.full((3,), 0.7, dtype=F64), rtol=0, atol=float(slow))


def test_relax_without_memory_is_langevin():
    """x1 = x + e s + sqrt(2 e) (z0 + z1)/2, e = (step sigma)^2/2   (Leimkuhler & Matthews 2013)."""
    sde, t = VP(), torch.tensor(0.3, dtype=F64)
    z = torch.randn(3, *X.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    e = (0.6 * float(sde.sigma(t))) ** 2 / 2
    x = X
    for k in range(2):
        x = x + e * TARGET.score(sde)(x, t) + math.sqrt(2 * e) * (z[k] + z[k + 1]) / 2
    hook = relax(TARGET.score(sde), sde, 1, step=0.6, friction=math.inf, noise=Draws(lambda i, x: z[i]))
    out = hook(1, t, hook(0, t, X))  # the velocity goes on from one level to the next
    torch.testing.assert_close(out, x)
    assert hook(2, torch.zeros((), dtype=F64), x) is None


def test_moments_tend_to_the_posterior():
    """Gaussian data, two of three numbers seen, sigma_data wrong: a finer grid brings the exact mean and variance."""
    sde, mean, var = VP(), tensor([0.6, -0.4, 0.3]), tensor([0.05, 0.5, 0.2])
    A, y = mask(tensor([1.0, 1.0, 0.0])), tensor([0.2, 0.5])
    seen = tensor([1.0, 1.0, 0.0])
    post = 1 / (1 / var + seen / SD**2)
    exact = post * (mean / var + seen * tensor([0.2, 0.5, 0.0]) / SD**2)
    score = anneal(gaussian_score(sde, mean, var), sde, A, y, SD)

    def error(N, n):
        """Of the mean in standard deviations, or of the variance in its own size."""

        def sampler(score, sde, x, ts, *, noise):
            return ancestral(score, sde, x, ts, noise=noise, on_step=relax(score, sde, n, noise=noise) if n else ())

        m, v = moments(sampler, sde, grids.karras(sde, N, t_end=2e-4), mean, var, score=score)
        return float(torch.stack([((m - exact) / post.sqrt()).abs(), (v / post - 1).abs()]).max())

    assert error(160, 0) > 0.3  # a path of densities is not that of one diffusion
    coarse, fine = error(40, 3), error(160, 3)
    assert fine < 0.025
    assert fine < coarse / 2


def test_errors():
    score, sde = TARGET.score(VP()), VP()
    with pytest.raises(ValueError, match="needs a Linear operator, got function"):
        anneal(score, sde, lambda x: x, Y, SD)
    with pytest.raises(ValueError, match="must be a number >= 0, got -1"):
        anneal(score, sde, operator(), Y, -1.0)
    with pytest.raises(ValueError, match="sigma_data must be positive, got 0"):
        anneal(score, sde, operator(), Y, SD, sigma_data=0.0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        relax(score, sde, 0)
    with pytest.raises(ValueError, match=r"step must lie in \(0, 2\) and friction be positive, got 2.5 and 0.2"):
        relax(score, sde, step=2.5)

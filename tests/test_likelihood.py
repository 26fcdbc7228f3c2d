"""Log-densities by the flow against exact ones."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import MultivariateNormal
from truth import F64, SDES, gaussian_score, marginal, tensor

import guidance
from scoresde import (
    EDM,
    VE,
    VP,
    Streams,
    bits_per_dim,
    change,
    counted,
    gaussian,
    gaussian_of,
    log_prob,
    mixture,
    prior_log_prob,
    rowwise,
    sample_log_prob,
)
from scoresde.flow import ADAPTIVE, FIXED
from scoresde.likelihood import LEVELS
from scoresde.line import Line
from scoresde.quadrature import clenshaw_curtis, derivative, fejer

M, C = tensor(0.4, -1.0, 0.2), tensor([[1.0, 0.5, 0.1], [0.5, 0.6, 0.0], [0.1, 0.0, 0.3]])
FULL = gaussian(M, cov=C)
MIX = mixture(tensor(0.3, 0.7), tensor([[-1.0, 0.5], [0.8, -0.4]]), var=tensor([[0.05, 0.2], [0.3, 0.1]]))
X = tensor([[0.5, -0.7, 0.0], [2.0, 0.4, -1.0], [-1.0, -2.0, 0.3], [0.3, -1.1, 0.2]])
THREE = pytest.mark.parametrize("name", ["VP", "SubVP", "VE"])


def bits(nats, D):
    return nats.abs().max().item() / (D * math.log(2))


def normal(sde, t):
    """The exact p_t of FULL, by torch.distributions."""
    a, s = sde.alpha(tensor(t)), sde.sigma(tensor(t))
    return MultivariateNormal(a * M, a**2 * C + s**2 * torch.eye(3, dtype=F64))


def mixture_error(sde, t, x, **how):
    at = tensor(t)
    got = log_prob(MIX.score(sde), sde, x, t=t, prior=MIX, d=0.7, **how)
    return bits(got - MIX.log_prob(x, sde, at), 2)


@pytest.mark.parametrize("name", SDES)
def test_gaussian_with_the_exact_prior(name):
    """Full covariance, defaults: less than 1e-4 bits/dim from log p at t_min, with a function or a target as prior."""
    sde = SDES[name]
    want = normal(sde, sde.t_min).log_prob(X)
    got = log_prob(FULL.score(sde), sde, X, prior=normal(sde, sde.T).log_prob)
    assert bits(got - want, 3) < 1e-4
    torch.testing.assert_close(log_prob(FULL.score(sde), sde, X, prior=FULL), got)


@pytest.mark.parametrize("name", SDES)
def test_gaussian_with_the_default_prior(name):
    """The model's density is N(0, prior_std^2) pulled back by the exact flow: prior mismatch and all."""
    sde, mean, var = SDES[name], tensor(0.7, -1.0, 3.0), tensor(0.25, 2.0, 0.5)
    (m, v), (m1, v1) = (marginal(sde, t, mean, var) for t in (sde.t_min, sde.T))
    x1 = m1 + (X - m) * (v1 / v).sqrt()
    prior = torch.distributions.Normal(tensor(0.0), tensor(sde.prior_std))
    want = (prior.log_prob(x1) + 0.5 * (v1 / v).log()).sum(1)
    assert bits(log_prob(gaussian_score(sde, mean, var), sde, X) - want, 3) < 1e-4


def test_a_fitted_prior_takes_the_mismatch_away():
    """VE's own prior forgets the data's mean and variance at T; N(m, C) of enough data does not."""
    sde, target = VE(sigma_max=10.0), gaussian(tensor(2.0, -3.0, 1.0), cov=C)
    x = target.sample(20_000)
    score, want = target.score(sde), target.log_prob(x[:8], sde, tensor(sde.t_min))
    own = log_prob(score, sde, x[:8])
    fitted = log_prob(score, sde, x[:8], prior=gaussian_of(x))
    assert bits(own - want, 3) > 1e-2
    assert bits(fitted - want, 3) < 1e-3
    low = gaussian_of(x, rank=2)
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    full = low.basis[0] @ torch.diag(low.eig[0]) @ low.basis[0].T + low.floor[0] * torch.eye(3, dtype=F64)
    torch.testing.assert_close(torch.linalg.eigvalsh(full), values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gaussian_of(x).means[0], x.mean(0))
    with pytest.raises(ValueError, match=r"3 items do not give a covariance in 3 dimensions.*rank="):
        gaussian_of(x[:3])
    with pytest.raises(ValueError, match="no density"):
        gaussian_of(torch.ones(5, 3) * torch.arange(5)[:, None], rank=1)


@THREE
def test_mixture(name):
    """The worst of 40 draws, at the tolerance asked for; and tighter is better."""
    sde = SDES[name]
    t = float(sde.time(tensor(4.0)))  # sigma/alpha = 0.018
    x = sde.alpha(tensor(t)) * MIX.sample(40, 1)
    errors = [mixture_error(sde, t, x, tol=tol) for tol in (1e-2, 1e-3, 1e-4, 1e-5)]
    for error, tol in zip(errors, (1e-2, 1e-3, 1e-4, 1e-5), strict=True):
        assert error < 2 * tol
    assert errors[-1] < errors[0] / 100


def test_few_calls_on_a_true_score():
    """Both n-call methods converge; along a curve with spectral accuracy, along the path with its order."""
    sde, x = VP(), MIX.sample(40, 2)
    path = [mixture_error(sde, 1e-3, x, method="multistep", steps=n) for n in (24, 48, 96)]
    curve = [mixture_error(sde, 1e-3, x, method="curve", steps=n) for n in (16, 32, 64)]
    assert path[0] > 4 * path[1] > 16 * path[2]
    assert path[2] < 1e-3
    assert curve[1] < curve[0] / 10
    assert curve[2] < 1e-6


def nobodys(sde, c, var):
    """A score that is of no density, wrong by 1 + (c - 1) alpha^2: and the log-density of its flow, by quadrature."""

    def factor(t):
        return 1 + (c - 1) * sde.alpha(t) ** 2

    def score(x, t):
        return factor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x) * gaussian_score(sde, 0.0, var)(x, t)

    def rate(t):  # d log x / dt of the flow
        t = tensor(t)
        return float(sde.drift(t) + 0.5 * sde.diffusion(t) ** 2 * factor(t) / marginal(sde, t, 0.0, var)[1])

    def log_density(x, t):
        growth = quad(rate, t, sde.T, epsabs=1e-12, epsrel=1e-12, limit=400)[0]
        return prior_log_prob(sde, x * math.exp(growth)) + x[0].numel() * growth

    return score, log_density


@pytest.mark.parametrize("c", [0.8, 1.3])
def test_the_value_is_that_of_the_flow(c):
    """Also where the score is wrong, for every method but `curve`, which says so by another value."""
    sde = VP()
    score, log_density = nobodys(sde, c, 0.3)
    want = log_density(X, 0.01)
    for how in ({}, {"method": "multistep", "steps": 64}, {"method": "rk4"}, {"method": "each"}):
        assert bits(log_prob(score, sde, X, t=0.01, **how) - want, 3) < 3e-4
    assert bits(log_prob(score, sde, X, t=0.01, method="curve", steps=64) - want, 3) > 2e-3


def test_a_guided_field_has_a_density():
    """Two Gaussians under w = 3 give a linear flow, whose density is known by quadrature."""
    sde, w, (v, v1) = VP(), 3.0, (1.0, 0.2)
    score = guidance.cfg(gaussian_score(sde, 0.0, v1), gaussian_score(sde, 0.0, v), w)

    def rate(t):
        (_, a), (_, b) = marginal(sde, t, 0.0, v), marginal(sde, t, 0.0, v1)
        return float(sde.drift(tensor(t)) + 0.5 * sde.diffusion(tensor(t)) ** 2 * (w / b - (w - 1) / a))

    growth = quad(rate, 0.01, 1.0, epsabs=1e-12, limit=400)[0]
    want = prior_log_prob(sde, X * math.exp(growth)) + 3 * growth
    assert bits(log_prob(score, sde, X, t=0.01, tol=1e-5) - want, 3) < 1e-4


def test_data_placed_at_another_time():
    sde = VP()
    got = log_prob(FULL.score(sde), sde, X, t=0.3, prior=FULL)
    assert bits(got - normal(sde, 0.3).log_prob(X), 3) < 1e-4


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED, "each", "each:bosh3"])
def test_every_joint_method_converges_to_the_same(method):
    sde = VP()
    more = {"steps": 500 if method == "euler" else 100} if method in FIXED else {"tol": 1e-4}
    if method == "fehlberg2":  # its error estimate is a hundred times too kind
        more = {"tol": 1e-6}
    got = log_prob(FULL.score(sde), sde, X, t=0.01, prior=FULL, method=method, **more)
    assert bits(got - normal(sde, 0.01).log_prob(X), 3) < (1e-2 if method == "euler" else 1e-3)


@pytest.mark.parametrize("how", [{}, {"method": "multistep"}, {"method": "each"}, {"probes": 2}])
def test_a_value_alone_is_the_value_in_a_batch(how):
    """To rounding, though the batch mates are far out and hard, and in any chunks of products."""
    sde, x = VP(), torch.cat([X, 30 * X])
    score = gaussian_score(sde, M, tensor(0.2, 1.0, 3.0))
    for s in (score, rowwise(score)):
        whole = log_prob(s, sde, x, noise=Streams(0, 8), **how)
        for i in (0, 3, 6):
            alone = log_prob(s, sde, x[i : i + 1], noise=Streams(0, range(i, i + 1)), **how)
            torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(log_prob(s, sde, x, noise=Streams(0, 8), chunk=1, **how), whole, rtol=1e-12, atol=0)


def test_any_shape_and_single_precision():
    """1-D to 5-D samples are the flattened problem; float32 is within 1e-3 bits/dim of float64."""
    sde, flat = VP(), log_prob(FULL.score(VP()), VP(), X)
    for shape in ((3,), (1, 3, 1), (3, 1, 1, 1, 1)):
        deep = gaussian(M.reshape(shape), cov=C).score(sde)
        torch.testing.assert_close(log_prob(deep, sde, X.reshape(4, *shape)), flat, rtol=1e-9, atol=1e-9)
    one = gaussian(tensor([0.3]), var=0.2)
    x = tensor([[0.1], [0.9]])
    torch.testing.assert_close(
        log_prob(one.score(sde), sde, x, prior=one), one.log_prob(x, sde, tensor(sde.t_min)), rtol=0, atol=1e-4
    )
    for how in ({}, {"method": "multistep"}, {"method": "curve"}, {"method": "rk4"}):
        single = log_prob(FULL.score(sde), sde, X.float(), **how)
        assert single.dtype == torch.float32
        assert bits(single.double() - log_prob(FULL.score(sde), sde, X, **how), 3) < 1e-3


@pytest.mark.parametrize("name", SDES)
def test_there_and_back(name):
    """The change of log p on the way to T is taken back on the way from it."""
    sde = SDES[name]
    there = change(FULL.score(sde), sde, X, sde.t_min, sde.T, tol=1e-5)
    back = change(FULL.score(sde), sde, there.x, sde.T, sde.t_min, tol=1e-5)
    torch.testing.assert_close(back.x, X, rtol=0, atol=1e-4)
    torch.testing.assert_close(back.log_p, -there.log_p, rtol=0, atol=3e-4)


@pytest.mark.parametrize("how", [{}, {"method": "multistep"}, {"method": "each"}])
def test_samples_with_their_log_density(how):
    """One pass gives samples of the flow model and their exact log-density."""
    sde = EDM(T=20.0)
    start = FULL.sample(30, 3) + sde.T * Streams(8, 30)(torch.empty(30, 3, dtype=F64))
    x, value = sample_log_prob(FULL.score(sde), sde, start, t=0.05, prior=FULL, **how)
    assert bits(value - normal(sde, 0.05).log_prob(x), 3) < 1e-3
    own = sample_log_prob(FULL.score(sde), sde, start, t=0.05, **how)[1]
    assert bits(own - log_prob(FULL.score(sde), sde, x, t=0.05, **how), 3) < 1e-3


def test_what_the_quadrature_says_it_left():
    """The estimate is above the error, and the value is frozen at each sample's own number of nodes."""
    sde, x = VP(), MIX.sample(60, 4)
    score = MIX.score(sde)
    fine = change(score, sde, x, 1e-3, 1.0, tol=1e-7, d=0.7)
    for most in (15, 31, 63):
        got = change(score, sde, x, 1e-3, 1.0, tol=1e-7, d=0.7, nodes=most)
        error = (got.log_p - fine.log_p).abs()
        assert (error <= got.error + 1e-5).double().mean() > 0.95
        assert (got.nodes <= most).all()
    v7, v15, v31 = (change(score, sde, x, 1e-3, 1.0, tol=1e-7, d=0.7, nodes=n) for n in (7, 15, 31))
    step, last = (v31.log_p - v15.log_p).abs(), (v15.log_p - v7.log_p).abs()
    torch.testing.assert_close(v31.error, torch.maximum(step * (step / last).clamp(max=1.0), 0.03 * last))
    torch.testing.assert_close(v15.error, last)
    assert v7.error.isnan().all()
    loose = change(score, sde, x, 1e-3, 1.0, tol=1e-2, d=0.7)
    assert len(set(loose.nodes.tolist())) > 1
    assert set(loose.nodes.tolist()) <= set(LEVELS)
    assert (loose.error <= 2 * 1e-2).all()


def test_the_unit_of_a_path_error():
    """Errors of x in units of the noise, or of 1/|s| where sigma |s| (RMS) is above 1; the field against dx/dt."""
    sde, d, t = VP(), 0.7, tensor(0.2)
    line = Line(sde, d, tensor(0.01), tensor(1.0))
    a, s = sde.alpha(t), sde.sigma(t)
    rho, u = torch.hypot(a * d, s), torch.atan(s / a / d).sqrt()
    torch.testing.assert_close(line.time(u), t)
    for size in (0.1, 30.0):
        x = size * X
        score = FULL.score(sde)(x, t)
        dz = line.velocity(FULL.score(sde))(u, x / rho)
        du = tensor(1e-6)
        t1 = line.time(u + du)
        flow = sde.drift(t) * x - 0.5 * sde.diffusion(t) ** 2 * score  # dx/dt
        dx = (x + flow * (t1 - t)) / torch.hypot(sde.alpha(t1) * d, sde.sigma(t1)) - x / rho
        torch.testing.assert_close(dz, dx / du, rtol=1e-4, atol=1e-4)
        pull = (s * score).square().mean(1).sqrt()
        torch.testing.assert_close(line.unit(u, x / rho, dz), s / rho / pull.clamp(min=1.0))
    assert pull.min() > 1
    torch.testing.assert_close(line.at(tensor(0.0, 1.0)), torch.stack(line.ends))
    torch.testing.assert_close(line.time(torch.stack(line.ends)), tensor(0.01, 1.0))


def test_one_network_call_a_node():
    """One pass gives the score and all products; done samples leave; nodes of few samples share a call."""
    sde, x = VP(), MIX.sample(5, 0)
    whole = counted(lambda x, t: MIX.score(sde)(x, t))
    some = counted(MIX.score(sde))
    a = change(whole, sde, x, 1e-3, 1.0, nodes=31, probes=1, noise=Streams(0, 5))
    b = change(some, sde, x, 1e-3, 1.0, nodes=31, probes=1, noise=Streams(0, 5))
    torch.testing.assert_close(a.log_p, b.log_p, rtol=1e-9, atol=1e-9)
    path = counted(MIX.score(sde))
    change(path, sde, x, 1e-3, 1.0, nodes=7, probes=1, noise=Streams(0, 5))
    assert some.samples - path.samples == 5 * (31 - 7)
    assert some.calls == path.calls  # 35 rows or 155: one call
    assert whole.samples == 5 * whole.calls
    for probes in (None, 3):
        score = counted(MIX.score(sde))
        log_prob(score, sde, x, probes=probes, method="rk4", steps=5, noise=Streams(0, 5))
        assert (score.calls, score.samples) == (20, 100)


def test_gradients():
    """d log p/dx of the flow's density is the score it was made from: plain, and by the adjoint."""
    sde = VP()
    want = FULL.score(sde)(X, tensor(0.05))
    for how in (
        {"grad": True, "tol": 1e-6}, {"grad": True, "method": "rk4", "steps": 80},
        {"grad": "adjoint", "method": "dopri5", "tol": 1e-7}, {"grad": "adjoint", "method": "rk4", "steps": 80},
    ):  # fmt: skip
        x = X.clone().requires_grad_()
        value = log_prob(FULL.score(sde), sde, x, t=0.05, prior=FULL, **how)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], want, rtol=1e-3, atol=1e-3)
    assert not log_prob(FULL.score(sde), sde, X.requires_grad_(), t=0.05, method="rk4", steps=2).requires_grad
    X.requires_grad_(False)


def test_gradients_in_parameters():
    """Of the width of a Gaussian model: plain, adjoint, and the closed form d/dv log N(x; 0, a^2 v + s^2)."""
    sde, t = VP(), 0.05
    a, s = sde.alpha(tensor(t)), sde.sigma(tensor(t))
    for how in ({"grad": True}, {"grad": "adjoint", "method": "dopri5", "tol": 1e-7}):
        v = tensor(0.5).requires_grad_()

        def score(x, t, v=v):
            V = sde.alpha(t) ** 2 * v + sde.sigma(t) ** 2
            return -x / V.reshape(-1, 1)

        def prior(y, v=v):
            V = sde.alpha(tensor(1.0)) ** 2 * v + sde.sigma(tensor(1.0)) ** 2
            return -0.5 * (y.square().sum(1) / V + 3 * torch.log(2 * math.pi * V))

        value = log_prob(score, sde, X, t=t, prior=prior, params=[v], **how)
        V = a**2 * 0.5 + s**2
        want = (0.5 * a**2 * (X.square().sum(1) / V**2 - 3 / V)).sum()
        torch.testing.assert_close(torch.autograd.grad(value.sum(), v)[0], want, rtol=2e-4, atol=1e-4)


def test_scaling_the_data_shifts_the_value():
    """The density of c x is that of x over |c|^D: log2|c| bits/dim, and nothing where the bins scale too."""
    c, sde, D = 2.5, VP(), 3
    big = gaussian(c * M, cov=c**2 * C)
    small = log_prob(FULL.score(sde), sde, X, t=1e-4, prior=FULL, tol=1e-6)
    large = log_prob(big.score(sde), sde, c * X, t=1e-4, prior=big, tol=1e-6, d=0.5 * c)
    torch.testing.assert_close(
        bits_per_dim(large, D, 0.1), bits_per_dim(small, D, 0.1) + math.log2(c), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(bits_per_dim(large, D, 0.1 * c), bits_per_dim(small, D, 0.1), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("rule", "n", "degree"), [(fejer, 7, 6), (fejer, 31, 30), (clenshaw_curtis, 8, 7), (clenshaw_curtis, 33, 32)]
)
def test_quadrature_is_exact_for_polynomials(rule, n, degree):
    x, w = rule(n)
    for k in range(degree + 1):
        assert float((w * x**k).sum()) == pytest.approx(1 / (k + 1), abs=1e-13)
    if n < 10:
        beyond = degree + 2 - degree % 2
        assert abs(float((w * (2 * x - 1) ** beyond).sum()) - 1 / (beyond + 1)) > 1e-6
    if rule is fejer:
        torch.testing.assert_close(fejer(2 * n + 1)[0][1::2], x)


def test_slopes_are_exact_for_polynomials():
    x = clenshaw_curtis(9)[0] * 3 - 1
    for k in range(9):
        want = k * x ** max(k - 1, 0)
        torch.testing.assert_close(derivative(x) @ x**k, want, rtol=0, atol=1e-11 * 3**k)


def test_what_cannot_be_is_told():
    score, sde = FULL.score(VP()), VP()
    for how, match in (
        ({"method": "euler5"}, "unknown method 'euler5'; choose one of apart, multistep"),
        ({"tol": 0.0}, r"tol must lie in \(0, 1\), got 0"),
        ({"nodes": 30}, "7, 15, 31, 63, 127.*got 30"),
        ({"method": "multistep", "steps": 1}, "got 1: at least 1, and 2"),
        ({"d": -1.0}, "positive number; got -1"),
        ({"probes": 2, "kind": "ones"}, "unknown probe 'ones'; choose one of hadamard"),
        ({"probes": 2, "method": "dopri5", "fresh": True}, "would follow fresh noise; use method='apart'"),
        ({"grad": "adjoint"}, "give method='dopri5'.*not 'apart'"),
        ({"grad": "both"}, "got 'both'"),
    ):
        with pytest.raises(ValueError, match=match):
            log_prob(score, sde, X, **how)
    assert change(score, sde, X, 0.1, 1.0, method="rk4").error.isnan().all()
    with pytest.raises(FloatingPointError, match="log p of sample 1 is nan"):
        log_prob(score, sde, X, prior=lambda y: y.sum(1).where(torch.arange(4) != 1, math.nan))

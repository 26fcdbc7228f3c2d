"""The exact problems of the studies, and their measures of error, against known answers."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from truth import F64, tensor

from experiments.problems import AUTO, NAMES, TABLE, Problem, digits, moments, problem, rms, rms95, sliced_w2
from scoresde import EDM, VP
from scoresde.exact import gaussian

STD = {"2d-small": 0.1, "64d-small": 0.1, "2d-large": 2.0, "64d-large": 2.0}


def test_the_problems_are_those_of_the_claims():
    assert (TABLE, len(AUTO)) == (("2d", "64d", "16d"), 6)
    size = {"2d": (2, 8), "64d": (64, 6), "16d": (16, 20), "digits": (64, 10), "pictures": (256, 5)}
    for name in NAMES:
        p = problem(name)
        K, D = p.target.means.shape
        key = name.split("-")[0]
        assert size[key] == (D, K)
        if name != "digits":
            assert isinstance(p.sde, VP)
            assert (p.sde.beta_min, p.sde.beta_max) == (0.1, 20.0)
    for name in TABLE:
        r0, r1 = problem(name).noise_levels()  # sigma/alpha = sqrt(exp(B) - 1), B = 0.1 t + 9.95 t^2
        assert math.isclose(r0, math.sqrt(math.exp(10.05) - 1), rel_tol=1e-12)
        assert math.isclose(r1, math.sqrt(math.expm1(0.1e-3 + 9.95e-6)), rel_tol=1e-12)
    widths = problem("2d").target.eig.sqrt()
    assert math.isclose(widths.min(), 0.034, rel_tol=1e-9)
    assert math.isclose(widths.max(), 0.27, rel_tol=1e-9)
    assert problem("digits").noise_levels() == (pytest.approx(80.0), pytest.approx(0.002))
    assert isinstance(problem("digits").sde, EDM)
    assert problem("pictures").target.eig.shape[1] == 12  # low rank


@pytest.mark.parametrize("name", NAMES)
def test_sigma_data_is_the_standard_deviation_asked_for(name):
    """By the law of total variance from the components' own covariance matrices, put together here."""
    p = problem(name)
    t, D = p.target, p.target.means.shape[1]
    w = t.log_weights.exp()
    U = torch.eye(D, dtype=F64).expand(len(w), D, D) if t.basis is None else t.basis
    second = sum(
        w[k]
        * (
            U[k] @ torch.diag(t.eig[k]) @ U[k].T
            + t.floor[k] * torch.eye(D, dtype=F64)
            + torch.outer(t.means[k], t.means[k])
        )
        for k in range(len(w))
    )
    mean = (w[:, None] * t.means).sum(0)
    cov = second - torch.outer(mean, mean)
    got_mean, got_cov = moments(t)
    assert torch.allclose(got_mean, mean, atol=1e-12)
    assert torch.allclose(got_cov, cov, atol=1e-12)
    assert math.isclose(p.sigma_data, math.sqrt(cov.trace() / D), rel_tol=1e-12)
    if name != "digits":
        assert math.isclose(p.sigma_data, STD.get(name, 0.5), rel_tol=1e-9)
        assert mean.abs().max() < 1e-12


def test_moments_of_the_plane_by_quadrature():
    """Sums over a fine square of the density: mass 1, mean 0, variance 0.25."""
    p = problem("2d")
    h = 0.01
    u = torch.arange(-3, 3, h, dtype=F64)
    xy = torch.cartesian_prod(u, u)
    mass = p.target.log_prob(xy).exp() * h * h
    mean, cov = moments(p.target)
    assert abs(mass.sum() - 1) < 1e-9
    assert (mass @ xy - mean).abs().max() < 1e-9
    assert ((xy * mass[:, None]).T @ xy - cov).abs().max() < 1e-9


def test_the_digits_are_the_digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    x = data.images.reshape(-1, 64) / 8 - 1
    target = digits()
    assert np.allclose(moments(target)[0].numpy(), x.mean(0), atol=1e-12)
    for c in (0, 7):
        k = target.given(c)
        cov = k.basis[0] @ torch.diag(k.eig[0]) @ k.basis[0].T
        assert np.allclose(cov.numpy(), np.cov(x[data.target == c].T) + np.eye(64) / 768, atol=1e-12)
    assert (x.min(), x.max()) == (-1, 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_the_gradient_of_the_density(name):
    p = problem(name)
    for t in (p.sde.T, 0.3 * p.sde.T, p.t_end):
        x = p.draw(4, 5, t).requires_grad_()
        at = torch.tensor(t, dtype=F64)
        (g,) = torch.autograd.grad(p.target.log_prob(x, p.sde, at).sum(), x)
        assert torch.allclose(p.score(x.detach(), at), g, rtol=1e-8, atol=1e-8 * float(g.abs().max()))


def test_draws_have_the_moments_of_p_t():
    """Standardised means and variances of 4000 draws within 5 standard errors of N's."""
    p, n = problem("16d"), 4000
    for t in (p.t_end, 0.2, p.sde.T):
        at = torch.tensor(t, dtype=F64)
        mean, cov = moments(p.target)
        std = (p.sde.alpha(at) ** 2 * cov.diagonal() + p.sde.sigma(at) ** 2).sqrt()
        z = (p.draw(n, 1, t) - p.sde.alpha(at) * mean) / std
        assert z.mean(0).abs().max() < 5 / math.sqrt(n)
        assert (z.square().mean(0) - 1).abs().max() < 5 * math.sqrt(3 / n)
    assert torch.equal(p.start(3), p.start(5)[:3])


@pytest.mark.parametrize("name", ["2d", "digits"])
def test_endpoints_are_those_of_another_solver(name):
    """scipy's DOP853 on dy/dlog r = r eps, one sample at a time."""
    p = problem(name)
    x = p.start(2)
    r0, r1 = p.noise_levels()
    D = x[0].numel()

    def rhs(u, y):
        t = p.sde.time(torch.tensor(-u, dtype=F64))
        state = p.sde.alpha(t) * torch.from_numpy(y).reshape(1, *x.shape[1:])
        return (-math.exp(u) * p.sde.sigma(t) * p.score(state, t)).reshape(D).numpy()

    alpha0 = float(p.sde.alpha(torch.tensor(p.sde.T, dtype=F64)))
    exact = p.data_units(p.endpoints(x))
    for row, want in zip(x, exact, strict=True):
        y = solve_ivp(
            rhs, (math.log(r0), math.log(r1)), row.flatten().numpy() / alpha0, method="DOP853", rtol=1e-11, atol=1e-11
        ).y[:, -1]
        assert np.abs(y - want.flatten().numpy()).max() < 1e-8


def test_endpoints_are_kept_under_all_they_depend_on(tmp_path):
    p = problem("2d")
    x = p.start(2)
    first = p.endpoints(x, tmp_path)
    (file,) = tmp_path.iterdir()
    np.savez(file, x1=first.numpy() + 1)
    assert torch.equal(p.endpoints(x, tmp_path), first + 1)  # taken from the file
    for q, start, tol in (
        (p, p.start(2, 1), 1e-12), (Problem("2d", p.sde, p.target, 2e-3), x, 1e-12), (p, x, 1e-9),
        (Problem("2d", VP(beta_max=19.0), p.target, 1e-3), x, 1e-12),
    ):  # fmt: skip
        before = len(list(tmp_path.iterdir()))
        q.endpoints(start, tmp_path, tol)
        assert len(list(tmp_path.iterdir())) == before + 1


def test_rms95_leaves_the_worst_twentieth_out():
    exact = torch.randn(40, 3, 2, dtype=F64)
    wrong = exact.clone()
    wrong[:, 1, 0] += 0.6  # RMS over 6 coordinates: 0.6 / sqrt(6)
    assert math.isclose(rms(wrong, exact), 0.6 / math.sqrt(6), rel_tol=1e-12)
    wrong[7], wrong[30] = 1e3, torch.nan
    assert math.isclose(rms95(wrong, exact), 0.6 / math.sqrt(6), rel_tol=1e-12)
    assert rms(wrong, exact) == math.inf
    wrong[9] += 1e3  # a third bad one is not forgiven
    assert rms95(wrong, exact) > 100
    assert math.isclose(rms(exact + tensor(1.0, 0.0), exact), math.sqrt(0.5), rel_tol=1e-12)


def test_sliced_w2_of_shifts_and_scales():
    x = torch.randn(500, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert math.isclose(sliced_w2(x, x.flip(0) + 0.3), 0.3, rel_tol=1e-9)
    assert math.isclose(sliced_w2(x, 2 * x), float(x.square().mean().sqrt()), rel_tol=1e-9)
    y = torch.randn(500, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    shift = torch.full((8,), 0.5, dtype=F64)  # E (u.v)^2 = |v|^2/8 over directions
    assert abs(sliced_w2(y, y + shift, directions=4000) - 0.5) < 0.02
    with pytest.raises(ValueError, match="one size"):
        sliced_w2(x, x[:-1])


def test_the_floor_is_that_of_exact_sets():
    """Two sets of n draws of N(0, s^2): E W2^2 in one dimension falls like log log n / n."""
    p = Problem("g", EDM(T=80.0), gaussian(torch.zeros(1, dtype=F64), var=4.0), 0.002)
    few, many = p.floor(50), p.floor(1000)
    assert 0.1 < few / 2 < 0.5
    assert 0.02 < many / 2 < 0.1

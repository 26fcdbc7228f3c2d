"""The library's own sampler: what it solves exactly, its orders, its noise, its grid."""

import math
from functools import partial

import pytest
import torch
from truth import F64, SDES, gaussian_map, gaussian_score, log_snr_grid, marginal, moments, order, tensor, warped_grid

from experiments.problems import moments as exact_moments
from experiments.problems import plane, problem
from samplers import angle, grids
from samplers.angle import order_for
from scoresde import VP, counted, flow

M, V = tensor(0.7, -1.0, 0.3), tensor(0.05, 0.5, 2.0)
TAUS = (0.3, 1.0, 1.7, lambda r: 1.5 * r / (0.3 + r))


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("d", [0.1, 0.5, 3.0])
def test_gaussian_data_of_deviation_d_are_exact(sde, d):
    """N(0, d^2), in one step and in five, whatever the values used; with noise mean and variance are."""
    process = SDES[sde]
    for n in (1, 5):
        ts = log_snr_grid(process, n)
        x = tensor([[-2.0, 0.1, 3.0]]) * process.prior_std
        for p in (1, 2):
            got = angle(gaussian_score(process, 0.0, d * d), process, x, ts, d=d, order=p)
            torch.testing.assert_close(got, gaussian_map(process, x, ts[0], ts[-1], 0.0, d * d), rtol=1e-9, atol=1e-12)
        for tau in TAUS:
            mean, var = moments(angle, process, ts, 0.0, d * d, d=d, tau=tau)
            torch.testing.assert_close(mean, torch.zeros(1, dtype=F64), rtol=0, atol=1e-10)
            torch.testing.assert_close(var, marginal(process, ts[-1], 0.0, d * d)[1].reshape(1), rtol=1e-9, atol=0)


def mixture_path():
    """A 2-D mixture under VP from sigma/alpha = 1.5 to 0.5; the end by the exact flow."""
    sde, target = VP(), plane(0.5, 0.15, 0.3, seed=1)
    t, t1 = sde.time(-tensor(1.5, 0.5).log())
    z = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = float(sde.alpha(t)) * target.sample(6, 3) + float(sde.sigma(t)) * z
    score = target.score(sde)
    return sde, score, x, (t, t1), flow(score, sde, x, t, t1, rtol=1e-12, atol=1e-12)


PATH = mixture_path()


def path_error(n, **knobs):
    sde, score, x, (t, t1), exact = PATH
    u = torch.linspace(0, 1, n + 1, dtype=F64)
    out = angle(score, sde, x, t + (u + u**2) / 2 * (t1 - t), **knobs)
    return float((out - exact).square().mean().sqrt())


@pytest.mark.parametrize(("n", "knobs", "want"), [
    (128, {"order": 1}, 2), (128, {"order": 2}, 3), (128, {"order": 3, "start": "order"}, 4),
    (128, {"order": 2, "d": 0.05}, 3), (128, {"order": 2, "d": 0.1}, 3), (128, {"order": 2, "d": 2.0}, 3),
    (128, {"order": 2, "d": 10.0}, 3),
])  # fmt: skip
def test_order_with_any_d(n, knobs, want):
    """One more than the values used, on a target that is not Gaussian; a wrong d costs none of it."""
    errors = [path_error(k * n, **knobs) for k in (1, 2)]
    assert order(errors)[0] == pytest.approx(want, abs=0.15), errors


def test_the_right_d_is_the_accurate_one():
    """Over the whole range, where d decides at both ends."""
    p = problem("64d")
    x = p.start(32)
    exact = p.endpoints(x, tol=1e-8)

    def error(d):
        out = angle(p.score, p.sde, x, grids.data_scale(p.sde, 10, d=0.5, t_end=p.t_end), d=d)
        return float((out - exact).square().mean(1).sort().values[:30].mean().sqrt())

    right = error(p.sigma_data)
    assert right < 0.7 * error(0.1 * p.sigma_data)
    assert right < 0.7 * error(10 * p.sigma_data)


def test_a_rising_start_is_order_three():
    """Whatever the order asked; a start of its own order is more, at further calls."""
    sde, score, x, (t, t1), _ = PATH
    for p, start, calls in ((4, "rise", 20), (4, "order", 20 + 2 * 6), (3, "order", 20 + 1 * 2), (2, "order", 20)):
        asked = counted(score)
        ts = t + torch.linspace(0, 1, 21, dtype=F64) * (t1 - t)
        angle(asked, sde, x, ts, order=p, start=start)
        assert asked.calls == calls
    sde = VP()
    t = sde.time(-tensor(1.5, 0.5).log())
    for d in (0.5, 1.5):
        errors = []
        for n in (128, 256):
            ts = t[0] + torch.linspace(0, 1, n + 1, dtype=F64) * (t[1] - t[0])
            x = tensor([[1.0, -0.3]])
            out = angle(gaussian_score(sde, 0.5, 1.0), sde, x, ts, order=4, d=d)
            errors.append(float((out - gaussian_map(sde, x, ts[0], ts[-1], 0.5, 1.0)).abs().max()))
        assert order(errors)[0] == pytest.approx(3, abs=0.05), errors


@pytest.mark.parametrize(("n", "plain"), [(1, 2), (10, 2), (11, 3), (17, 3), (18, 4), (60, 4)])
def test_the_order_left_out_is_the_documented_one(n, plain):
    sde, score, x, (t, t1), _ = PATH
    ts = t + torch.linspace(0, 1, n + 1, dtype=F64) * (t1 - t)
    assert order_for(n) == plain
    assert order_for(n, noisy=True) == 2
    assert torch.equal(angle(score, sde, x, ts), angle(score, sde, x, ts, order=plain))
    noisy = partial(angle, score, sde, x, ts, tau=1.0, noise=torch.ones_like)
    assert torch.equal(noisy(), noisy(order=2))


@pytest.mark.parametrize("sde", ["VP", "VE"])
@pytest.mark.parametrize(("tau", "d", "n"), [(0.5, 2.0, 128), (1.0, 4.0, 512), (TAUS[3], 2.0, 512)])
def test_weak_order(sde, tau, d, n):
    """Two with noise, by exact mean and variance."""
    process, errors = SDES[sde], []
    n = 128 if sde == "VE" and callable(tau) else n
    for k in (1, 2):
        ts = warped_grid(process, k * n)
        m, v = moments(angle, process, ts, M, V, tau=tau, d=d)
        m1, v1 = marginal(process, ts[-1], M, V)
        errors.append(((m - m1) ** 2 / v1 + (v / v1 - 1) ** 2).sum().sqrt().item())
    assert order(errors)[0] == pytest.approx(2, abs=0.15), errors


def test_no_noise_is_drawn_without_tau():
    sde, score, x, (t, t1), _ = PATH
    ts = t + torch.linspace(0, 1, 7, dtype=F64) * (t1 - t)

    def refuse(x):
        raise AssertionError("drawn")

    plain = angle(score, sde, x, ts, noise=refuse)
    assert torch.equal(angle(score, sde, x, ts, tau=0.0, noise=refuse), plain)
    zero = angle(score, sde, x, ts, tau=lambda r: 0 * r, noise=refuse)  # a function that says 0
    torch.testing.assert_close(zero, plain, rtol=1e-12, atol=1e-12)


def test_noise_reaches_the_floor_of_exact_draws_in_15_calls():
    """Digits as ten Gaussians in 64 dimensions: 4096 samples are as far from the exact moments as 4096 exact draws.

    Frechet distances, the mean of three sets: 0.034 for exact draws.
    """
    p = problem("digits")
    mean, C = exact_moments(p.target)
    target, draws = p.target, torch.Generator().manual_seed(0)
    L, U = torch.linalg.eigh(C)
    root = (U * L.sqrt()) @ U.T

    def normal(*shape):
        return torch.randn(*shape, dtype=F64, generator=draws)

    def exact(n, sigma):
        k = torch.multinomial(target.log_weights.exp(), n, replacement=True, generator=draws)
        x = target.means[k] + sigma * normal(n, 64)
        for c in range(10):
            mine = k == c
            x[mine] += (normal(int(mine.sum()), 64) * target.eig[c].sqrt()) @ target.basis[c].T
        return x

    def frechet(x):
        x = x.double().flatten(1)
        c = x.T.cov()
        cross = torch.linalg.eigvalsh(root @ c @ root).clamp(min=0).sqrt().sum()
        return float((x.mean(0) - mean).square().sum() + c.trace() + C.trace() - 2 * cross)

    floor = sum(frechet(exact(4096, p.t_end)) for _ in range(16)) / 16
    ts = grids.data_scale(p.sde, 15, d=p.sigma_data, t_end=p.t_end)
    for tau in (0.3, 0.6, 1.0):
        found = []
        for _ in range(3):
            score = counted(p.score)
            x = exact(4096, 80.0).reshape(-1, 1, 8, 8).float()
            x1 = angle(score, p.sde, x, ts, d=p.sigma_data, tau=tau, noise=lambda x: normal(*x.shape).float())
            assert score.calls == 15
            found.append(frechet(x1))
        assert sum(found) / 3 < 1.10 * floor, (tau, found, floor)


@pytest.mark.parametrize("d", [0.0, -1.0, math.inf, math.nan])
def test_a_wrong_scale_is_refused(d):
    sde, score, x, (t, t1), _ = PATH
    with pytest.raises(ValueError, match="d is the data's standard deviation, a positive number; got"):
        angle(score, sde, x, torch.stack([t, t1]), d=d)
    with pytest.raises(ValueError, match="d is the data's standard deviation, a positive number; got"):
        grids.data_scale(sde, 5, d=d)


@pytest.mark.parametrize("tau", [-0.5, math.inf, math.nan])
def test_a_wrong_tau_is_refused(tau):
    sde, score, x, (t, t1), _ = PATH
    with pytest.raises(ValueError, match="tau must be >= 0"):
        angle(score, sde, x, torch.stack([t, t1]), tau=tau)


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("d", [0.1, 0.5, 4.0])
def test_the_grid_is_uniform_in_its_variable(sde, d):
    """sqrt(r/(r + 2 d)): ends as asked, steps equal; a tail of a longer one with strength; 0 appended to_zero."""
    process = SDES[sde]
    ts = grids.data_scale(process, 9, d=d)
    assert ts.dtype == F64
    assert (float(ts[0]), float(ts[-1])) == (process.T, process.t_min)
    r = process.sigma(ts) / process.alpha(ts)
    steps = (r / (r + 2 * d)).sqrt().diff()
    torch.testing.assert_close(steps, steps.mean().expand(9), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grids.data_scale(process, 4, d=d, strength=0.5), grids.data_scale(process, 8, d=d)[4:])
    ended = grids.data_scale(process, 9, d=d, t_end=1.5 * process.t_min)
    assert float(ended[-1]) == 1.5 * process.t_min
    zero = grids.data_scale(process, 10, d=d, to_zero=True)
    assert torch.equal(zero, torch.cat([ts, ts.new_zeros(1)]))

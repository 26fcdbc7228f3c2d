"""Fitted grids: the density is that of the derivative, searching never loses, files come back whole."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from truth import F64, SDES, gaussian_score, tensor

from experiments.problems import problem, rms95
from samplers import angle, fit_grid, grids, load_grid
from samplers.angle import order_for
from samplers.fitted import bend, least
from scoresde import EDM, VP, counted

D = 0.5


def of_residual(sde, V):
    """The score whose residual (r/rho)(x + rho^2 s) is V(u), one column a sample; u = r/(r + 1.2 d)."""

    def score(x, t):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        r = sigma / alpha
        rho = alpha * math.hypot(D, r)
        return (V(r / (r + 1.2 * D)).expand_as(x) * rho / r - x) / rho**2

    return score


def want(r, derivative, p):
    """(|V^(p)| (du/dlog r)^p r d/(d^2 + r^2))^(1/(p + 1)), not normalised."""
    u = r / (r + 1.2 * D)
    slope = u * (1 - u)
    return (abs(derivative(u)) * slope**p * r * D / (D**2 + r**2)) ** (1 / (p + 1))


WAVES = {
    "exp": (lambda u: np.exp(4 * u), lambda u, p: 4.0**p * np.exp(4 * u)),
    "sin": (lambda u: np.sin(9 * u), lambda u, p: 9.0**p * np.sin(9 * u + p * np.pi / 2)),
    "cusp": (lambda u: (u + 0.05) ** -1.5, lambda u, p: {2: 3.75, 3: 13.125, 4: 59.0625}[p] * (u + 0.05) ** (-1.5 - p)),
}


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize(("sde", "wave"), [("VP", "exp"), ("EDM", "exp"), ("VP", "cusp"), ("SubVP", "cusp")])
def test_density_is_that_of_the_derivative(sde, wave, p):
    """V a known function of u: the density's shape is the (p + 1)-th root of the error of a step of order p."""
    process, (V, derivative) = SDES[sde], WAVES[wave]
    score = of_residual(process, lambda u: tensor([[float(V(u))]]))
    grid = fit_grid(score, process, torch.zeros(4, 3, dtype=F64), d=D, t_end=1e-3, n=256)
    r = grid.log_r.exp().numpy()
    got = grid.density[p - 2].numpy()
    expected = want(r, lambda u: derivative(u, p), p)
    expected = (expected / expected.max()).clip(min=0.02)
    inner = slice(8, -8)
    np.testing.assert_allclose(got[inner], expected[inner], rtol=0.01, atol=0.002)
    assert got.min() >= 0.02


def test_density_takes_the_larger_part_of_the_samples():
    """The 0.8 quantile over samples: a fifth of wild ones is not seen, three tenths are; RMS over coordinates."""
    process = SDES["EDM"]
    (tame, d_tame), (wild, d_wild) = WAVES["exp"], WAVES["cusp"]
    x, seen = torch.zeros(40, 2, dtype=F64), {}
    for share in (6, 12):  # of 40

        def V(u, share=share):
            column = torch.full((40, 2), float(tame(u)), dtype=F64)
            column[:share] = 1e4 * float(wild(u))
            return column * tensor([1.0, 0.5])

        grid = fit_grid(of_residual(process, V), process, x, d=D, n=128)
        seen[share] = grid.density[1].numpy()
    r = grid.log_r.exp().numpy()
    for share, derivative in ((6, d_tame), (12, d_wild)):
        expected = want(r, lambda u, f=derivative: f(u, 3), 3)
        expected = (expected / expected.max()).clip(min=0.02)
        np.testing.assert_allclose(seen[share][8:-8], expected[8:-8], rtol=0.05, atol=0.005)


def test_density_is_of_the_rms_over_coordinates():
    process = SDES["EDM"]
    (V, dV), (W, dW) = WAVES["exp"], WAVES["sin"]
    score = of_residual(process, lambda u: tensor([[float(V(u)), 0.5 * float(W(u)), 0.0]]))
    grid = fit_grid(score, process, torch.zeros(4, 3, dtype=F64), d=D, n=256)
    r = grid.log_r.exp().numpy()
    for p in (2, 3):
        expected = want(r, lambda u, p=p: np.hypot(dV(u, p), 0.5 * dW(u, p)), p)
        expected = (expected / expected.max()).clip(min=0.02)
        np.testing.assert_allclose(grid.density[p - 2].numpy()[8:-8], expected[8:-8], rtol=0.02, atol=0.003)


@pytest.mark.parametrize("n", [1, 5, 14, 40])
def test_plan_shares_the_density_equally(n):
    """Between two points always the same integral of the density over log r, from sde.T to the end."""
    process = VP()
    V, derivative = WAVES["exp"]
    score = of_residual(process, lambda u: tensor([[float(V(u))]]))
    grid = fit_grid(score, process, torch.zeros(4, 3, dtype=F64), d=D, t_end=1e-3, n=256)
    for asked in (None, 2, 3, 4):
        ts, order = grid.plan(process, n, asked)
        assert order == (order_for(n) if asked is None else asked)
        assert len(ts) == n + 1
        assert ts[0] == process.T
        assert float(ts[-1]) == pytest.approx(1e-3, rel=1e-9)
        log_r = -process.lam(ts).numpy()
        fine = np.linspace(log_r[0], log_r[-1], 20001)

        def shares(w, log_r=log_r, fine=fine):
            total = np.concatenate([[0], np.cumsum((w[1:] + w[:-1]) / 2)])
            return np.diff(np.interp(-log_r, -fine, total / total[-1]))

        own = np.interp(-fine, -grid.log_r.numpy(), grid.density[order - 2].numpy())
        np.testing.assert_allclose(shares(own), 1 / n, rtol=2e-3)
        w = want(np.exp(fine), lambda u, p=order: derivative(u, p), order)
        inner = shares((w / w.max()).clip(min=0.02))[1:-1]  # at the ends the pilot run sees no derivative
        if n > 2:
            np.testing.assert_allclose(inner, np.median(inner), rtol=0.04)


@cache
def plane():
    p = problem("2d")
    score = counted(p.score)
    grid = fit_grid(score, p.sde, p.start(32, seed=5), d=p.sigma_data, t_end=p.t_end)
    assert score.calls == 64
    x = p.start(128, seed=77)
    return p, grid, x, p.endpoints(x, tol=1e-9)


@pytest.mark.parametrize(("n", "gain"), [(10, 0.7), (20, 0.35)])
def test_fitted_beats_the_plain_grid_on_other_states(n, gain):
    """Fitted on 32 states, tried on 128 others: 0.53 of the error at 10 steps, 0.21 at 20."""
    p, grid, x, exact = plane()
    ts, order = grid.plan(p.sde, n)
    fitted = rms95(angle(p.score, p.sde, x, ts, d=p.sigma_data, order=order), exact)
    plain = grids.data_scale(p.sde, n, d=p.sigma_data, t_end=p.t_end)
    plain = rms95(angle(p.score, p.sde, x, plain, d=p.sigma_data), exact)
    assert fitted < gain * plain


@pytest.mark.parametrize("n", [1, 4, 10])
def test_search_never_loses(n):
    """On the paths it is given: not to the fitted nor to the plain grid, at the order n steps carry or the next."""
    p, grid, x, exact = plane()
    x, exact = x[:48], exact[:48]
    score = counted(p.score)
    found = grid.search(score, p.sde, x, n, searches=8, progress=False)
    assert score.calls <= 128 + 4 * n * 9

    def error(ts, order):
        return rms95(angle(p.score, p.sde, x, ts, d=p.sigma_data, order=order), exact)

    ts, order = found.plan(p.sde, n)
    ours = error(ts, order)
    best = math.inf
    for q in (order_for(n), min(order_for(n) + 1, 4)):
        for base in (grid.plan(p.sde, n, q)[0], grids.data_scale(p.sde, n, d=p.sigma_data, t_end=p.t_end)):
            best = min(best, error(base, q))
    assert ours <= best * (1 + 1e-4) + 1e-7
    if n > 1:
        assert ours < 0.97 * best
        assert order == min((2, 3), key=lambda q: error(ts, q))  # the points go with the order they were found for
    assert grid.found == {}  # a new object
    assert found.plan(p.sde, n, order)[0].tolist() == ts.tolist()
    other = 5 - order if order in (2, 3) else 2
    assert torch.equal(found.plan(p.sde, n, other)[0], grid.plan(p.sde, n, other)[0])
    assert torch.equal(found.plan(p.sde, n + 1)[0], grid.plan(p.sde, n + 1)[0])


def test_bend():
    """Ends stay; step k in log r is multiplied by exp(sum_j w_j cos(pi j (k + 1/2)/n)), up to a factor."""
    sde = SDES["VE"]
    ts = grids.data_scale(sde, 6)
    assert torch.equal(bend(sde, ts, np.zeros(3))[[0, -1]], ts[[0, -1]])
    torch.testing.assert_close(bend(sde, ts, np.zeros(3)), ts, rtol=1e-12, atol=1e-14)
    bent = bend(sde, ts, np.array([0.5, -0.2]))
    assert torch.equal(bent[[0, -1]], ts[[0, -1]])
    got = (sde.lam(bent).diff() / sde.lam(ts).diff()).log()
    k = [(i + 0.5) * math.pi / 6 for i in range(6)]
    expected = tensor([0.5 * math.cos(a) - 0.2 * math.cos(2 * a) for a in k])
    torch.testing.assert_close(got - got.mean(), expected - expected.mean(), rtol=1e-9, atol=1e-9)


def test_least_starts_from_no_warp():
    """At most `trials` looks; never worse than no warp; with nothing to move one look."""
    seen = []

    def error(w):
        seen.append(w.copy())
        return float(((w - 0.3) ** 2).sum()) if np.any(w) else 0.0

    warp, value = least(error, 2, 12)
    assert (value, warp.tolist()) == (0.0, [0.0, 0.0])
    assert not seen[0].any()
    assert len(seen) <= 12
    for modes, trials in ((0, 9), (3, 0)):
        warp, value = least(lambda w: 7.0, modes, trials)
        assert (value, warp.tolist()) == (7.0, [0.0] * modes)
    warp, value = least(lambda w: float(((w - 0.3) ** 2).sum()), 2, 200)
    np.testing.assert_allclose(warp, 0.3, atol=1e-3)


def test_save_and_load(tmp_path):
    """To the bit, searches too; nothing else is left in the folder."""
    p, grid, x, _ = plane()
    grid = grid.search(p.score, p.sde, x[:8], 3, searches=2, progress=False)
    grid = grid.search(p.score, p.sde, x[:8], 5, searches=2, progress=False)
    grid.save(tmp_path / "deep" / "grid.json")
    back = load_grid(tmp_path / "deep" / "grid.json")
    assert torch.equal(back.log_r, grid.log_r)
    assert torch.equal(back.density, grid.density)
    assert (back.d, back.sde, back.found) == (grid.d, grid.sde, grid.found)
    assert sorted(back.found) == [3, 5]
    for n in (3, 4, 5, 20):
        assert torch.equal(back.plan(p.sde, n)[0], grid.plan(p.sde, n)[0])
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["grid.json"]


@pytest.mark.parametrize(
    "text", ["", "not json", "[1, 2]", "{}", json.dumps({"format": "scoresde calibrated solver 1"})]
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a fitted grid"):
        load_grid(tmp_path / "x.json")


def test_errors():
    p, grid, x, _ = plane()
    for other in (EDM(), VP(beta_max=19.0)):
        with pytest.raises(ValueError, match=r"fitted to VP\(beta_min=0.1, beta_max=20.0.*fit one with fit_grid"):
            grid.plan(other, 5)
        with pytest.raises(ValueError, match="fitted to VP"):
            grid.search(p.score, other, x, 5, progress=False)
    with pytest.raises(ValueError, match="at least one step, got n = 0"):
        grid.plan(p.sde, 0)
    with pytest.raises(ValueError, match="at least 16 steps to see derivatives, got 15"):
        fit_grid(p.score, p.sde, x, n=15)
    with pytest.raises(ValueError, match="d is the data's standard deviation"):
        fit_grid(p.score, p.sde, x, d=0.0)


def test_data_of_deviation_d_fit_too():
    """V = 0 everywhere: no error to share, still a grid."""
    sde = VP()
    grid = fit_grid(gaussian_score(sde, 0.0, 0.25), sde, torch.randn(8, 2, dtype=F64), d=0.5, n=32)
    ts, _ = grid.plan(sde, 8)
    assert bool((ts.diff() < 0).all())

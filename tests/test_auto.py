"""`auto` picks what it says it picks, and on the table's problems beats the classical samplers on every grid."""

from functools import cache, partial

import pytest
import torch
from truth import F64, gaussian_score, tensor

from experiments.problems import problem, rms95
from samplers import angle, auto, calibrate, calibrated, choose, deis, dpmpp, fit_grid, grids, pndm, unipc
from scoresde import EDM, VP, counted

SDE = VP()


@cache
def small():
    """A score, starting states, a grid fitted to it and a solver of 4 steps calibrated for it."""
    score = gaussian_score(SDE, tensor(0.3, -0.2), tensor(0.04, 1.0))
    x = torch.randn(64, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(score, SDE, x[:32], d=0.6, t_end=1e-3, n=32)
    solver = calibrate(score, SDE, x, 4, d=0.6, t_end=1e-3, model="two", searches=0, progress=False)
    return score, x, grid, solver


@pytest.mark.parametrize("n", [1, 7, 12, 25])
@pytest.mark.parametrize("tau", [0.0, 0.8, lambda r: r / (1 + r)])
def test_without_a_fit_it_is_angle_on_its_own_grid(n, tau):
    score, x, _, _ = small()
    sampler, ts = choose(SDE, n, d=0.6, tau=tau, t_end=2e-3)
    assert torch.equal(ts, grids.data_scale(SDE, n, d=0.6, t_end=2e-3))
    want = angle(score, SDE, x, ts, d=0.6, tau=tau, noise=torch.ones_like)
    assert torch.equal(sampler(score, SDE, x, ts, noise=torch.ones_like), want)
    asked = counted(score)
    got = auto(asked, SDE, x, n, d=0.6, tau=tau, t_end=2e-3, noise=torch.ones_like)
    assert torch.equal(got, want)
    assert asked.calls == n


def test_defaults():
    score, x, _, _ = small()
    ts = grids.data_scale(SDE, 6, d=0.5)
    assert torch.equal(auto(score, SDE, x, 6), angle(score, SDE, x, ts, d=0.5))


@pytest.mark.parametrize("n", [1, 7, 12, 25])
@pytest.mark.parametrize("tau", [0.0, 0.8])
def test_with_a_fitted_grid(n, tau):
    """Its points and its d; order 2 with noise, with the grid of that order."""
    score, x, grid, _ = small()
    order = 2 if tau or n <= 10 else 3 if n <= 17 else 4
    sampler, ts = choose(SDE, n, d=9.0, tau=tau, fitted=grid)
    assert torch.equal(ts, grid.plan(SDE, n, order)[0])
    want = angle(score, SDE, x, ts, d=0.6, order=order, tau=tau, noise=torch.ones_like)
    assert torch.equal(sampler(score, SDE, x, ts, noise=torch.ones_like), want)
    assert torch.equal(auto(score, SDE, x, n, tau=tau, fitted=grid, noise=torch.ones_like), want)


def test_with_a_searched_grid():
    """Where one was searched for n its points and order are used; not with noise, unless its order is the noise's."""
    score, x, grid, _ = small()
    grid = grid.search(score, SDE, x, 11, searches=3, progress=False)
    order, times = grid.found[11]
    sampler, ts = choose(SDE, 11, fitted=grid)
    assert ts.tolist() == times
    assert torch.equal(sampler(score, SDE, x, ts), angle(score, SDE, x, ts, d=0.6, order=order))
    assert order > 2
    noisy = choose(SDE, 11, tau=1.0, fitted=grid)[1]
    assert torch.equal(noisy, small()[2].plan(SDE, 11, 2)[0])
    assert torch.equal(choose(SDE, 12, fitted=grid)[1], small()[2].plan(SDE, 12)[0])


def test_with_a_calibrated_solver():
    score, x, _, solver = small()
    sampler, ts = choose(SDE, 4, fitted=solver, t_end=1e-3)
    assert torch.equal(ts, solver.grid())
    want = calibrated(score, SDE, x, ts, solver=solver, model="two")
    assert torch.equal(sampler(score, SDE, x, ts, model="two"), want)
    assert torch.equal(auto(score, SDE, x, 4, fitted=solver, model="two"), want)


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda g, s: {"n": 0}, "at least one network call is needed, got n = 0"),
    (lambda g, s: {"n": 4, "fitted": s, "tau": 0.5}, "deterministic; leave tau at 0"),
    (lambda g, s: {"n": 4, "fitted": s, "tau": lambda r: r}, "deterministic; leave tau at 0"),
    (lambda g, s: {"n": 5, "fitted": s}, "makes 4 calls, asked for are 5; calibrate one for it"),
    (lambda g, s: {"n": 4, "fitted": s, "t_end": 0.01}, "ends at t = 0.001, not at 0.01"),
    (lambda g, s: {"n": 4, "fitted": g, "t_end": 1e-3}, "a fitted grid has its own end; leave t_end out"),
    (lambda g, s: {"n": 4, "d": -1.0}, "d is the data's standard deviation"),
    (lambda g, s: {"n": 4, "tau": -1.0}, "tau must be >= 0"),
    (lambda g, s: {"n": 4, "t_end": 2.0}, "t_end must lie in"),
])  # fmt: skip
def test_errors(wrong, message):
    score, x, grid, solver = small()
    with pytest.raises(ValueError, match=message):
        auto(score, SDE, x, **wrong(grid, solver))


def test_a_fit_for_another_sde_is_refused():
    score, x, grid, solver = small()
    with pytest.raises(ValueError, match="fitted to VP"):
        auto(score, EDM(), x, 4, fitted=grid)
    with pytest.raises(ValueError, match="calibrated for the SDE"):
        auto(score, EDM(), x, 4, fitted=solver, model="two")


RIVALS = {
    "dpmpp": dpmpp, "dpmpp published": partial(dpmpp, published=True), "dpmpp 3": partial(dpmpp, order=3),
    "deis": partial(deis, start="rise"), "unipc": partial(unipc, order=2), "unipc 3": unipc,
    "unipc published": partial(unipc, published=True),
    "pndm": pndm,
}  # fmt: skip


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("name", ["2d", "64d"])
def test_auto_beats_the_classical_samplers_on_every_grid(name, n):
    """The error of 95 % of 64 samples against the exact flow: at most half of each of theirs, on any of four grids."""
    p = problem(name)
    x = p.start(64)
    exact = p.endpoints(x, tol=1e-9)
    ours = rms95(auto(p.score, p.sde, x, n, d=p.sigma_data, t_end=p.t_end), exact)
    theirs = {}
    for grid in (grids.uniform, grids.quadratic, grids.karras, grids.log_snr):
        ts = grid(p.sde, n, t_end=p.t_end)
        for rival, sampler in RIVALS.items():
            theirs[rival, grid.__name__] = rms95(sampler(p.score, p.sde, x, ts), exact)
    best = min(theirs, key=theirs.get)
    assert ours < 0.5 * theirs[best], (best, theirs[best], ours)

"""Calibrated solvers: exact where a linear map is, accurate on paths not seen, refused wherever else."""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from truth import F64, SDES, gaussian_map, gaussian_score, marginal, tensor

from experiments.problems import problem, rms
from guidance import cfg
from samplers import angle, calibrate, calibrated, calibration, fit_grid, grids, load_calibration
from samplers.exponential import Form, bounded, nodes
from scoresde import EDM, VP, counted, flow
from scoresde.exact import mixture


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian_start(sde, x, mean, var):
    m, v = marginal(sde, sde.T, mean, var)
    return m + x * v**0.5


@pytest.mark.parametrize("n", [1, 3, 6])
@pytest.mark.parametrize(("sde", "var"), [
    ("VP", 0.01), ("VP", 1.0), ("VP", 4.0), ("VE", 0.04), ("EDM", 9.0), ("SubVP", 1.0), ("Straight", 0.09),
])  # fmt: skip
def test_gaussian_data_are_fitted_exactly(sde, var, n):
    """N(m, var): the flow's end is linear in the state and its score, so two numbers a step are enough."""
    process = SDES[sde]
    score = gaussian_score(process, 0.3, var)
    x = gaussian_start(process, normal(64, 2), 0.3, var)
    solver = calibrate(score, process, x, n, d=0.5, t_end=2e-3, searches=6, teacher=400, progress=False)
    other = gaussian_start(process, normal(32, 2, seed=1), 0.3, var)
    ts = solver.grid()
    got = calibrated(score, process, other, ts, solver=solver)
    want = gaussian_map(process, other, ts[0], ts[-1], 0.3, var)
    assert (got - want).abs().max() < 1e-6 * math.sqrt(var)
    assert solver.held_out < 1e-6
    assert solver.held_out95 <= solver.held_out
    plain = rms(angle(score, process, other, grids.data_scale(process, n, t_end=2e-3)), want, 0.95)
    assert plain == pytest.approx(solver.uncalibrated95 * float(process.alpha(ts[-1])), rel=0.5)
    assert plain > 1e-3


def test_the_teacher_left_out_is_good_to_a_hundred_thousandth():
    sde, score = VP(), gaussian_score(VP(), 0.3, 1.0)
    solver = calibrate(score, sde, gaussian_start(sde, normal(64, 2), 0.3, 1.0), 3, searches=0, progress=False)
    x, ts = gaussian_start(sde, normal(32, 2, seed=1), 0.3, 1.0), solver.grid()
    assert rms(calibrated(score, sde, x, ts, solver=solver), gaussian_map(sde, x, ts[0], ts[-1], 0.3, 1.0)) < 1e-5


@cache
def digits(n):
    p = problem("digits")
    score = counted(p.score)
    x = p.start(256).float()
    solver = calibrate(score, p.sde, x, n, d=p.sigma_data, t_end=p.t_end, model="digits", progress=False)
    rounds = math.ceil(16 * n / 40)  # of 40 evaluations and the 20 of a last line search
    assert score.calls <= n * (12 * n + 3) + 96 + rounds * (60 * 2 * n + 5 * n)
    return p, solver


@cache
def unseen():
    p = problem("digits")
    x = p.start(128, seed=99)
    return x, p.endpoints(x, tol=1e-10)


@pytest.mark.parametrize(("n", "bound"), [(5, 0.050), (10, 0.036)])
def test_digits(n, bound):
    """RMS endpoint error over states not used, against the flow at 1e-10; n network calls; the number it reports."""
    p, solver = digits(n)
    x, exact = unseen()
    score = counted(p.score)
    found = rms(calibrated(score, p.sde, x, solver.grid(), solver=solver, model="digits"), exact)
    assert score.calls == n == solver.n
    assert found <= bound
    plain = angle(p.score, p.sde, x, grids.data_scale(p.sde, n, d=p.sigma_data, t_end=p.t_end), d=p.sigma_data)
    assert rms(plain, exact, 0.95) == pytest.approx(solver.uncalibrated95, rel=0.5)
    out = calibrated(p.score, p.sde, x, solver.grid(), solver=solver, model="digits")
    assert rms(out, exact, 0.95) < 0.35 * rms(plain, exact, 0.95)
    assert rms(out, exact, 0.95) == pytest.approx(solver.held_out95, rel=0.5)
    assert solver.held_out95 < solver.uncalibrated95


def test_a_quarter_is_held_out():
    """Every fourth state has no part in the numbers, and is what the error is reported of, in data units."""
    sde, t_end = VP(), 0.4
    score = mixture(torch.ones(2), tensor([[-1.0, 0.0], [1.0, 0.5]]), var=tensor([0.04, 0.3])).score(sde)
    x = normal(64, 2)
    other = x.clone()
    other[3::4] = normal(16, 2, seed=1)
    a, b = (
        calibrate(score, sde, y, 4, d=0.9, t_end=t_end, searches=0, teacher=400, progress=False) for y in (x, other)
    )
    assert (a.a, a.b) == (b.a, b.b)
    assert a.held_out != b.held_out
    ts, alpha = a.grid(), float(sde.alpha(tensor(t_end)))
    exact = flow(score, sde, other[3::4], sde.T, t_end, rtol=1e-11, atol=1e-11)
    out = calibrated(score, sde, other[3::4], ts, solver=a)
    assert rms(out, exact) / alpha == pytest.approx(b.held_out, rel=1e-3)
    assert rms(out, exact, 0.95) / alpha == pytest.approx(b.held_out95, rel=1e-3)
    plain = angle(score, sde, other[3::4], grids.data_scale(sde, 4, d=0.9, t_end=t_end), d=0.9)
    assert rms(plain, exact, 0.95) / alpha == pytest.approx(b.uncalibrated95, rel=1e-3)


def test_the_steps_are_its_numbers():
    """z1 = a z + sum_j b_j V_j, z = x/rho, V = (r/rho)(x + rho^2 s), at most four V."""
    p, solver = digits(5)
    x, _ = unseen()
    ts, d = solver.grid(), solver.d
    r = p.sde.sigma(ts)
    rho = torch.hypot(r, torch.full_like(r, d))  # alpha = 1
    assert (float(ts[0]), float(ts[-1])) == (p.sde.T, p.t_end)
    assert [len(b) for b in solver.b] == [1, 2, 3, 4, 4]
    z, memory, states = x / rho[0], [], []
    for i in range(5):
        y = z * rho[i]
        memory.insert(0, r[i] / rho[i] * (y + rho[i] ** 2 * p.score(y, ts[i])))
        size = memory[0].flatten(1).square().mean(1).sqrt()
        assert float(((size >= solver.low[i]) & (size <= solver.high[i])).double().mean()) > 0.9
        z = solver.a[i] * z + sum(w * v for w, v in zip(solver.b[i], memory, strict=False))
        states.append(z * rho[i + 1])
    seen = []
    got = calibrated(
        p.score, p.sde, x, ts, solver=solver, model="digits", on_step=lambda i, t, x: seen.append((i, float(t), x))
    )
    assert [(i, t) for i, t, _ in seen] == [(i, float(ts[i + 1])) for i in range(5)]
    for (_, _, a), b in zip(seen, states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(got, states[-1], rtol=1e-9, atol=1e-10)


def test_polishing_ends_where_no_number_can_be_better(monkeypatch):
    """The log of the error at the end has no slope in any a or b, by differences; before, it has."""
    monkeypatch.setattr(calibration, "ROUND", 2000)  # the samples that count are chosen once
    sde, d = VP(), 0.9
    score = mixture(torch.ones(3), tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.5]]), var=tensor([0.04, 0.3, 0.1])).score(
        sde
    )
    x = normal(128, 2)
    seen = torch.arange(128) % 4 != 3
    exact = angle(score, sde, x, grids.data_scale(sde, 400, d=d), d=d, order=4)

    closed, polished = (
        calibrate(score, sde, x, 4, d=d, searches=0, polish=k, teacher=400, progress=False) for k in (0, 2000)
    )
    ts = closed.grid()

    def errors(solver):
        return (calibrated(score, sde, x[seen], ts, solver=solver) - exact[seen]).square().mean(1)

    kept = errors(closed).argsort()[:92]  # 95 % of 96

    def slope(solver, i, j):
        def moved(h):
            a, b = list(solver.a), [list(w) for w in solver.b]
            (a if j < 0 else b[i])[i if j < 0 else j] += h
            return float(errors(replace(solver, a=a, b=b))[kept].mean().log())

        return (moved(1e-5) - moved(-1e-5)) / 2e-5

    before, after = (tensor([slope(s, i, j) for i in range(4) for j in range(-1, i + 1)]) for s in (closed, polished))
    assert float(errors(polished)[kept].mean()) < 0.7 * float(errors(closed)[kept].mean())
    assert after.norm() < 1e-3 * before.norm()


def test_polishing_is_there_in_forty_evaluations():
    """64 coordinates, 24 numbers of very unequal effect: 40 evaluations leave at most 5 % more than 600 do."""
    p = problem("64d")
    x, n, d = p.start(96), 6, p.sigma_data
    seen = torch.arange(96) % 4 != 3
    exact = angle(p.score, p.sde, x, grids.data_scale(p.sde, 96, d=d, t_end=p.t_end), d=d, order=4)

    def left(polish):
        s = calibrate(p.score, p.sde, x, n, d=d, t_end=p.t_end, searches=0, polish=polish, progress=False)
        return rms(calibrated(p.score, p.sde, x[seen], s.grid(), solver=s), exact[seen], 0.95)

    closed, quick, slow = (left(polish) for polish in (0, 40, 600))
    assert slow < 0.7 * closed
    assert quick < 1.05 * slow


def test_above_ten_steps_it_goes_on_from_the_better_of_two_starts():
    """The numbers of `angle` on a fitted grid are one; whichever is taken up, the other alone does no better."""
    p = problem("2d")
    x, n = p.start(128), 14
    path = calibration._Path(p.score, p.sde, x, p.sigma_data, p.t_end, 192)
    ts, order = fit_grid(p.score, p.sde, x, d=p.sigma_data, t_end=p.t_end).plan(p.sde, n)
    at = nodes(Form(p.sigma_data, bounded(1.2 * p.sigma_data)), p.sde, ts)
    z, _ = calibration._run(path, at, *calibration._of_angle(at, order))
    want = angle(p.score, p.sde, x, ts, d=p.sigma_data, order=order)
    torch.testing.assert_close(z[-1] * float(at.rho[-1]), want, rtol=1e-10, atol=1e-11)
    solver = calibrate(p.score, p.sde, x, n, d=p.sigma_data, t_end=p.t_end, searches=0, polish=160, progress=False)
    assert solver.ts == ts.tolist()  # before polishing 6.1e-4; the closed form on a grid not searched 1.1e-3
    assert solver.held_out95 < 0.7 * rms(want, path.end, 0.95)


def test_save_and_load(tmp_path):
    """The same bits after a file."""
    p, solver = digits(5)
    x, _ = unseen()
    solver.save(tmp_path / "deep" / "solver.json")
    back = load_calibration(tmp_path / "deep" / "solver.json")
    assert back == solver
    assert torch.equal(back.grid(), solver.grid())
    out = [calibrated(p.score, p.sde, x, s.grid(), solver=s, model="digits") for s in (solver, back)]
    assert torch.equal(*out)
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["solver.json"]
    assert len((tmp_path / "deep" / "solver.json").read_text()) < 4000


@pytest.mark.parametrize("text", ["", "not json", "[1, 2]", "{}", json.dumps({"format": "scoresde fitted grid 1"})])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a calibrated solver"):
        load_calibration(tmp_path / "x.json")


def test_what_it_is_not_bound_to_is_refused():
    p, solver = digits(5)
    x, _ = unseen()
    ts = solver.grid()
    for sde in (EDM(T=79.0), VP()):
        with pytest.raises(ValueError, match=r"calibrated for the SDE 'EDM\(T=80.0.*calibrate one for it"):
            calibrated(p.score, sde, x, ts, solver=solver, model="digits")
    for model in ("", "other"):
        with pytest.raises(ValueError, match=f"calibrated for the model 'digits', not '{model}'; calibrate one for it"):
            calibrated(p.score, p.sde, x, ts, solver=solver, model=model)
    for shape in ((4, 64), (4, 1, 4, 16), (4, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"for samples \[1, 8, 8\], got"):
            calibrated(p.score, p.sde, torch.zeros(shape), ts, solver=solver, model="digits")
    for grid in (ts[:-1], ts[1:], ts * 0.999, grids.data_scale(p.sde, 5, t_end=p.t_end)):
        with pytest.raises(ValueError, match=r"its own grid; use ts = solver.grid\(\)"):
            calibrated(p.score, p.sde, x, grid, solver=solver, model="digits")


def outside(name):
    p, x = problem("digits"), unseen()[0]
    target = p.target
    small = replace(target, means=0.3 * target.means, eig=0.09 * target.eig)
    return {
        "guided": (cfg(target.given(3).score(p.sde), p.score, 6.0), x),
        "start too small": (p.score, 0.1 * x),
        "start too large": (p.score, 3.0 * x),
        "half of the samples": (p.score, torch.cat([x[:64], 4.0 * x[:64]])),
        "other data": (small.score(p.sde), x),
        "wrong sign": (lambda x, t: -p.score(x, t), x),
    }[name]


@pytest.mark.parametrize(
    "name", ["guided", "start too small", "start too large", "half of the samples", "other data", "wrong sign"]
)
def test_outside_its_range_it_is_refused(name):
    """Guidance, another scale of the start, another model: each under the same name."""
    p, solver = digits(5)
    score, x = outside(name)
    with pytest.raises(ValueError, match=r"left the range this solver was calibrated in .* made for"):
        calibrated(score, p.sde, x, solver.grid(), solver=solver, model="digits")


def test_its_own_kind_of_start_is_not_refused():
    """In any batch."""
    p, solver = digits(5)
    ts = solver.grid()
    for seed in range(20, 26):
        own = p.start(8, seed)
        calibrated(p.score, p.sde, own, ts, solver=solver, model="digits")
        calibrated(p.score, p.sde, own[:1], ts, solver=solver, model="digits")


def test_calibration_refuses_what_it_cannot_do():
    p = problem("digits")
    with pytest.raises(ValueError, match="needs n >= 1 and at least 32 starting states, got n = 0, 64 states"):
        calibrate(p.score, p.sde, p.start(64), 0)
    with pytest.raises(ValueError, match="got n = 5, 31 states"):
        calibrate(p.score, p.sde, p.start(31), 5)
    with pytest.raises(ValueError, match=r"too few starting states \(32\), or steps enough to need no calibration"):
        calibrate(p.score, p.sde, p.start(32), 20, d=p.sigma_data, t_end=p.t_end, searches=0, polish=0, progress=False)


def test_separatrices_do_not_spoil_the_fit():
    """Two far points: a few samples decide late for one; the others' error is still small."""
    sde = VP()
    target = mixture(torch.ones(2), tensor([[-1.0], [1.0]]), var=tensor([0.01, 0.01]))
    score = target.score(sde)
    t = torch.tensor(sde.T, dtype=F64)
    x = sde.alpha(t) * target.sample(256, 1) + sde.sigma(t) * normal(256, 1, seed=2)
    solver = calibrate(score, sde, x, 6, d=1.0, t_end=1e-3, searches=0, progress=False)
    assert solver.held_out95 < 0.5 * solver.uncalibrated95

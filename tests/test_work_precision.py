"""The work-precision study: its problems, its error figures, its peers and its budget, against known answers."""

import csv
import importlib.util
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from experiments import peers, work_precision
from experiments.problems import (
    AUTO,
    NAMES,
    TABLE,
    Problem,
    digits,
    moments,
    problem,
    rms,
    rms95,
    sliced_w2,
)
from experiments.work_precision import (
    Case,
    Method,
    Row,
    best,
    calls_needed,
    claims_against_peers,
    claims_on_auto,
    deterministic,
    digest,
    every,
    fitting,
    measure,
    ours,
    parse,
    screened,
    theirs,
    told,
)
from scoresde import EDM, VP, Model
from scoresde.checkpoint import save_model
from scoresde.exact import gaussian
from scoresde.nets import MLP

F64 = torch.float64
STD = {"2d-small": 0.1, "64d-small": 0.1, "2d-large": 2.0, "64d-large": 2.0}


def tensor(*values):
    return torch.tensor(values, dtype=F64)


# ------------------------------------------------------------------------------------------- problems


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


# ------------------------------------------------------------------------------------------- errors


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


# ------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("calls", "nfe", "steps"),
    [
        (lambda n: n, 10, 10),
        (lambda n: 2 * n, 11, 5),
        (lambda n: 4 * n, 3, None),
        (lambda n: n + 9, 12, 3),
        (lambda n: 2 * n - 1, 9, 5),
        (lambda n: None if n % 3 else n, 10, 9),
        (lambda n: 4 * n, 50, 12),
        (lambda n: n * n, 50, 7),
        (lambda n: 2**n, 50, 5),
    ],
)
def test_as_many_steps_as_the_budget_allows(calls, nfe, steps):
    assert fitting(calls, nfe) == steps


def test_calls_are_counted_and_steps_never_exceed_the_budget():
    case = case_of(problem("2d"), 4)
    rows = measure(case, every([*ours("ddim", ["uniform"]), *ours("heun", ["karras:rho=5"])], (1, 2, 7)))
    assert [(r.sampler, r.nfe, r.calls) for r in rows] == [
        ("ddim", 1, 1), ("ddim", 2, 2), ("ddim", 7, 7), ("heun", 2, 2), ("heun", 7, 6),
    ]  # fmt: skip
    p = problem("2d")
    x1 = work_precision.samplers.ddim(p.score, p.sde, case.x, work_precision.grids.uniform(p.sde, 7, t_end=1e-3))
    assert math.isclose(rows[2].rms, rms(p.data_units(x1), p.data_units(case.exact)), rel_tol=1e-12)

    def cheats(case, score, x, steps):
        for _ in range(steps if len(x) == 2 else steps + 1):
            score(x, torch.tensor(0.5, dtype=F64))
        return x

    with pytest.raises(RuntimeError, match="used 8 calls of 7"):
        measure(case, [(Method("x", "cheat", "-", cheats), 7)])


def test_screening_keeps_what_may_be_best():
    """Twelve methods of known error on the plane: ten and the near ones run on all samples, the rest on a quarter."""
    case = case_of(problem("2d"), 16)

    def off(by):
        return lambda case, score, x, steps: case.exact[: len(x)] + by + 0 * score(x, torch.tensor(0.5, dtype=F64))

    methods = [Method("lib", f"m{k}", "-", off(10.0**-k)) for k in range(12)] + [Method("other", "o", "-", off(3.0))]
    rows = {r.sampler: r for r in screened(case, methods, (1,))}
    assert {name for name, r in rows.items() if r.samples == 4} == {"m0", "m1"}
    assert {r.samples for name, r in rows.items() if name not in ("m0", "m1")} == {16}
    scale = float(case.sde.alpha(torch.tensor(case.t_end, dtype=F64)))
    assert all(math.isclose(rows[f"m{k}"].rms, 10.0**-k / scale, rel_tol=1e-4) for k in range(12))
    near = [Method("lib", f"m{k}", "-", off(1 + 0.05 * k)) for k in range(12)]
    assert {r.samples for r in screened(case, near, (1,))} == {16}
    assert best([*rows.values(), Row("2d", "lib", "lucky", "-", 1, 1, 4, 0.0, 0.0)]).sampler == "m11"


def test_only_samplers_on_the_flow_are_taken():
    names = deterministic(case_of(problem("2d"), 2))
    assert {"ddim", "heun", "flow_euler"} <= set(names)
    assert not {"euler_maruyama", "ancestral", "reverse_diffusion", "predictor_corrector", "ode"} & set(names)


def test_knobs():
    assert parse("angle:order=4:name=x:flag=False:u=0.5") == (
        "angle", {"order": 4, "name": "x", "flag": False, "u": 0.5},
    )  # fmt: skip
    with pytest.raises(ValueError, match="name=value"):
        parse("angle:order")
    with pytest.raises(ValueError, match="unknown sampler 'nope'"):
        ours("nope", ["uniform"])
    with pytest.raises(ValueError, match="unknown grid 'nope'"):
        ours("ddim", ["nope"])
    with pytest.raises(ValueError, match="ddim has no knob 'order'; its knobs are eta"):
        ours("ddim:order=2", ["karras"])
    with pytest.raises(ValueError, match="karras has no knob 'a'; its knobs are rho"):
        ours("ddim", ["karras:a=2"])
    case = case_of(problem("2d-large"), 2)
    assert told(lambda x, *, d=0.5, k=1: x, {"k": 2}, case) == {"d": case.sigma_data, "k": 2}
    assert told(lambda x, *, d=0.5: x, {"d": 1.0}, case) == {"d": 1.0}


def test_calls_for_an_error():
    curve = [(n, n**-2.0) for n in (5, 10, 20, 40)]
    assert math.isclose(calls_needed(curve, 13**-2.0), 13, rel_tol=1e-9)
    assert calls_needed(curve, 1.0) == 5
    assert calls_needed(curve, 1e-6) == math.inf
    assert calls_needed(curve[-1:], 40**-2.0) == 40


def test_claims_hold_the_named_sampler_against_the_best_peer():
    def row(library, sampler, grid, nfe, e):
        return Row("2d", library, sampler, grid, nfe, nfe, 8, e, e)

    rows = []
    for n in (10, 20, 50):
        rows += [
            row("scoresde", "mine", "a", n, 0.2 * n**-3.0), row("scoresde", "mine", "b", n, 0.1 * n**-3.0),
            row("scoresde", "other", "a", n, 1e-9), row("azula", "p", "a", n, n**-3.0),
            row("azula", "q", "b", n, math.inf), row("diffusers", "r", "a", n, 2 * n**-3.0),
        ]  # fmt: skip
    claims = claims_against_peers(rows, "mine", None)
    ratios = [c for c in claims if "over that of p" in c.claim]
    assert [round(c.value, 12) for c in ratios] == [0.1] * 3
    assert all(c.holds for c in ratios)
    shares = {c.claim: c.value for c in claims if "share" in c.claim}
    assert len(shares) == 2  # at 20 and 50
    assert math.isclose(next(v for k, v in shares.items() if "50" in k), 0.1 ** (1 / 3), rel_tol=1e-9)
    assert [c.value for c in claims_against_peers(rows, "mine", "a") if "over" in c.claim] == pytest.approx([0.2] * 3)
    assert claims_against_peers(rows[:2], "mine", None) == []
    assert best(rows).sampler == "other"
    assert best([row("azula", "q", "b", 5, math.inf)]) is None


def test_claims_on_the_problems_of_auto():
    def row(where, library, nfe, e, grid="a"):
        return Row(where, library, "s", grid, nfe, nfe, 8, e, e)

    rows = [row("digits", "azula", n, 1.0) for n in (5, 10, 20)] + [row("2d", "azula", 5, 1.0)]
    rows += [row("digits", "scoresde", n, e) for n, e in ((5, 0.5), (10, 1.2), (20, 0.9))] + [
        row("2d", "scoresde", 5, 9.0)
    ]
    rows += [
        row("2d-small", "azula", 5, 1.0),
        row("2d-small", "scoresde", 5, 1.0),
        row("digits", "scoresde", 10, 0.8, "b"),
    ]
    claims = claims_on_auto(rows, "s", "a")
    assert [(c.claim.split(":")[0], c.value, c.holds) for c in claims] == [
        ("2d-small", 1.0, True),
        ("digits", 1.2, False),
        ("share where strictly best", 0.5, False),
    ]
    assert [c.value for c in claims_on_auto(rows, "s", None)] == [1.0, 0.9, 0.75]
    assert claims_on_auto(rows, "other", None) == []


# ------------------------------------------------------------------------------------------- peers


def case_of(p, n):
    x = p.start(n)
    return Case(p.name, p.sde, p.score, p.t_end, p.sigma_data, x, p.endpoints(x))


def test_what_is_fitted_on_other_starts_gains_on_these():
    """At 8 calls on 2d: nothing fitted > grid searched > solver calibrated (seen: 0.0065, 0.0019, 0.0010)."""
    case = case_of(problem("2d"), 64)
    specs = [ours("angle", ["data_scale"]), ours("searched", []), ours("calibrated", [])]
    plain, searched, calibrated = (measure(case, [(m[0], 8)])[0] for m in specs)
    assert plain.calls == searched.calls == calibrated.calls == 8
    assert searched.rms95 < 0.6 * plain.rms95
    assert calibrated.rms95 < searched.rms95
    assert measure(case, [(ours("calibrated", [])[0], 11)])[0].calls == 10  # the most it is fitted for


def all_peers():
    return [q for library in peers.LIBRARIES if peers.installed(library) for q in peers.peers((library,))]


R0, R1 = 152.0, 0.0105
ORDER = {  # on Gaussian data; multistep ones of order 3 and more start at order 1, and so end near 2
    "DDIM": 1, "Euler": 1, "euler": 1, "REAB-2": 1, "REAB-3": 1, "REAB-4": 1,  # REAB: a sigma at the wrong time
    "rk4 in flow": 4, "rk4 in time": 4, "rk4 in log": 4, "heun3 in flow": 3, "heun3 in time": 3, "heun3 in log": 3,
    "DPM-Solver++ 3S": 3, "DPM-Solver 3S": 3,
}  # fmt: skip


@pytest.mark.parametrize("peer", all_peers(), ids=lambda q: q.label.replace(" ", "_"))
def test_a_peer_converges_to_the_exact_flow(peer):
    """y1 = y sqrt((v + r1^2)/(v + r0^2)) for N(0, v) data, on its own or the exponential grid."""
    v = tensor(0.01, 0.25, 4.0)
    y = torch.linspace(-200, 200, 6, dtype=F64)[:, None] * torch.ones(3, dtype=F64)
    exact = y * ((v + R1**2) / (v + R0**2)).sqrt()
    seen = []

    def eps(y, r):
        assert r.dtype == F64
        assert r.ndim == 0
        assert R1 * (1 - 1e-6) <= float(r) <= R0 * (1 + 1e-6)
        seen.append(float(r))
        return y * r / (v + r**2)

    grid = peers.grids(R0, R1)["exponential"]
    error = {}
    for N in (48, 96):
        start = y.clone()
        error[N] = (peer.run(eps, start, grid(N)) - exact).abs().max()
        assert torch.equal(start, y)
    assert seen[0] == pytest.approx(R0, rel=1e-6)
    order = ORDER.get(peer.name.removesuffix(" full"), 2)
    floor = 3e-6 if peer.library == "diffusers" else 1e-9  # some of them are float32 inside
    assert math.log2(error[48] / error[96]) > order - 0.3 or error[96] < floor
    assert error[96] < (0.1 if order == 1 else 0.02)


@pytest.mark.skipif(not peers.installed("azula"), reason="azula is not installed")
def test_ddim_is_ddim_in_every_library():
    """Euler in sigma/alpha, written here; so a peer is on the grid it is given, at the noise levels of that grid."""
    p = problem("2d")
    eps = peers.eps_of(p.score, p.sde)
    alpha = p.sde.alpha(torch.tensor(1.0, dtype=F64))
    y0 = p.start(5) / alpha
    r0, r1 = p.noise_levels()
    for name, make in peers.grids(r0, r1).items():
        grid, y = make(7), y0
        for r, s in zip(grid.r, grid.r[1:], strict=False):
            y = y + (s - r) * eps(y, r)
        for peer in all_peers():
            if peer.name in ("DDIM", "Euler", "euler"):
                tol = 1e-4 if peer.label == "diffusers Euler" else 1e-9  # float32 inside
                assert (peer.run(eps, y0, grid) - y).abs().max() < tol, (peer.label, name)


@pytest.mark.parametrize("name", ["2d", "digits"])
def test_peers_end_where_the_case_ends(name):
    """In x, not in y = x/alpha: a peer of order 4 with many steps meets the case's own endpoints."""
    case = case_of(problem(name), 3)
    methods = theirs(case, ("torchdiffeq",))
    method = next(m for m in methods if (m.name, m.grid) == ("rk4 in log", "exponential"))
    assert rms(method.run(case, case.score, case.x, 200), case.exact) < 1e-5
    assert len(methods) == len({(m.name, m.grid) for m in methods})


def test_eps_is_that_of_the_score():
    p = problem("digits")
    r = tensor(0.7)[0]
    y = p.draw(3, 0, 0.7)
    x0 = p.target.denoiser(p.sde)(y, r)
    assert torch.allclose(peers.eps_of(p.score, p.sde)(y, r), (y - x0) / r, atol=1e-10)
    q = problem("2d")
    t = tensor(0.4)[0]
    x = q.draw(3, 0, 0.4)
    a, s = q.sde.alpha(t), q.sde.sigma(t)
    assert torch.allclose(
        peers.eps_of(q.score, q.sde)(x / a, s / a), (x - a * q.target.denoiser(q.sde)(x, t)) / s, atol=1e-9
    )


def test_grids_run_from_end_to_end():
    for r0, r1 in ((152.17, 0.0105), (80.0, 0.002)):
        made = peers.grids(r0, r1)
        assert {"time", "time_quadratic", "karras", "exponential", "flow", "cosine"} <= set(made)
        for name, make in made.items():
            for n in (1, 5, 50):
                r = make(n).r
                assert (len(make(n)), len(r)) == (n, n + 1)
                assert bool((r.diff() < 0).all()), name
                assert math.isclose(r[0], r0, rel_tol=1e-12)
                assert math.isclose(r[-1], r1, rel_tol=1e-12)
        r = made["karras"](4).r ** (1 / 7)
        assert (r.diff().diff()).abs().max() < 1e-12
        assert (made["exponential"](4).r.log().diff().diff()).abs().max() < 1e-12
        u = (r := made["flow"](4).r) / (1 + r)
        assert u.diff().diff().abs().max() < 1e-12
        B = torch.log1p(made["time"](4).r ** 2)  # 0.1 t + 9.95 t^2
        t = (-0.1 + (0.01 + 4 * 9.95 * B).sqrt()) / (2 * 9.95)
        assert t.diff().diff().abs().max() < 1e-12


def test_who_has_which_grid():
    names = set(peers.grids(R0, R1)) | {"its own"}
    for library, grids in peers.SHIPPED.items():
        assert {g for g in grids if peers.installed("azula") or "azula" not in g} <= names
        assert all(peers.shipped(library, g) for g in grids)
        assert not peers.shipped(library, "time_quadratic")
    assert peers.shipped("torchdiffeq", "time_quadratic")
    for library in peers.LIBRARIES:
        peer = peers.Peer(library, "p", lambda eps, y, grid: y)
        assert peer.takes("karras")
        assert peer.takes("azula VE") == (library == "azula")
        assert peer.takes("exponential") == (library != "azula")  # azula has it as its VE
    fast = peers.Peer("k_diffusion", "p", lambda eps, y, grid: y, own_grid=True)
    assert [g for g in names if fast.takes(g)] == ["exponential"]


@pytest.mark.skipif(not peers.installed("k_diffusion"), reason="k-diffusion is not installed")
def test_the_stand_in_for_k_diffusion_is_taken_away():
    before = "k_diffusion" in sys.modules
    peers.k_sampling.cache_clear()
    assert peers.k_sampling().__name__ == "k_diffusion.sampling"
    assert ("k_diffusion" in sys.modules) == before
    assert importlib.util.find_spec("k_diffusion") is not None


def test_unknown_and_missing_libraries(monkeypatch):
    with pytest.raises(ValueError, match="unknown library 'nope'; choose from diffusers"):
        peers.peers(("nope",))
    monkeypatch.setattr(peers, "installed", lambda name: False)
    with pytest.raises(ImportError, match=r"azula is not installed; pip install 'scoresde\[bench\]'"):
        peers.peers(("azula",))


# ------------------------------------------------------------------------------------------- the script


def test_the_script_writes_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "_torchdiffeq", lambda make=peers._torchdiffeq: make()[:2])
    argv = ["--quick", "--out", str(tmp_path), "--samplers", "ddim,heun", "--grids", "karras,log_snr", "--ours", "heun"]
    library = "torchdiffeq"
    claims = work_precision.main([*argv, "--peers", library, "--json", str(tmp_path / "c.json"), "--nfe", "8,10,20"])
    printed = capsys.readouterr().out
    assert "best of torchdiffeq" in printed
    with open(tmp_path / "work_precision.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {r["problem"] for r in rows} == {"2d"}
    assert {"ddim", "heun", "midpoint in flow"} <= {r["sampler"] for r in rows}
    assert all(int(r["calls"]) <= int(r["nfe"]) for r in rows)
    assert (tmp_path / "work_precision.png").stat().st_size > 1000
    assert len(claims) == 3  # ratios at 10 and 20, the share at 20
    assert len(json.loads((tmp_path / "c.json").read_text())) == 3
    kept = json.loads((tmp_path / "peers-2d.json").read_text())
    kept["rows"][0]["sampler"] = "remembered"
    (tmp_path / "peers-2d.json").write_text(json.dumps(kept))
    work_precision.main([*argv, "--peers", library, "--nfe", "8,10,20"])
    assert "remembered" in (tmp_path / "work_precision.csv").read_text()
    work_precision.main([*argv, "--peers", library, "--nfe", "8,10"])  # another question is asked anew
    assert "remembered" not in (tmp_path / "work_precision.csv").read_text()


def test_what_a_peers_rows_depend_on():
    case = case_of(problem("2d"), 4)
    same = replace(case, exact=case.exact * (1 + 1e-11))  # another machine's rounding
    assert digest(same) == digest(case)
    assert (
        len(
            {
                digest(c)
                for c in (
                    case,
                    replace(case, x=case.x + 1e-9),
                    replace(case, exact=1.01 * case.exact),
                    replace(case, t_end=2e-3),
                    replace(case, sde=VP(beta_max=19.0)),
                )
            }
        )
        == 5
    )


def test_the_law_comes_with_its_floor(tmp_path, capsys):
    work_precision.main(
        ["--quick", "--out", str(tmp_path), "--samplers", "heun", "--grids", "karras", "--nfe", "4,60", "--law", "500"]
    )
    printed = capsys.readouterr().out
    floor = float(printed.split("exact against exact ")[1].split()[0])
    far, near = (float(line.split()[-1]) for line in printed.splitlines() if " calls, karras" in line)
    assert far > 3 * floor
    assert near < 2.5 * floor


def test_a_trained_network_is_a_problem(tmp_path, capsys):
    torch.manual_seed(0)
    model = Model(MLP(2, width=16, depth=1), EDM(T=80.0), "F", sigma_data=0.5)
    file = tmp_path / "model.safetensors"
    save_model(file, model, data={"shape": [2]})
    argv = ["--model", str(file), "--out", str(tmp_path), "--n", "16", "--samplers", "heun", "--grids", "karras"]
    work_precision.main([*argv, "--nfe", "16,64,256"])
    with open(tmp_path / "work_precision.csv", newline="") as f:
        e = [float(r["rms"]) for r in csv.DictReader(f)]
    assert math.log2(e[1] / e[2]) > 3.0  # order 2 over a factor 4, towards the reference
    assert "model: log10 rms95" in capsys.readouterr().out


def test_help_states_the_claims(capsys):
    with pytest.raises(SystemExit) as stop:
        work_precision.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Claims" in text
    assert "--json" in text


def test_the_script_refuses(tmp_path, capsys):
    for argv, words in (
        (["--problems", "3d"], "unknown problem '3d'"), (["--samplers", "nope"], "unknown sampler 'nope'"),
        (["--grids", "nope"], "unknown grid 'nope'"), (["--peers", "nope"], "unknown library 'nope'"),
        (["--nfe", "0,5"], "calls must be at least 1"), (["--model", str(tmp_path / "none")], "no checkpoint at"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            work_precision.main(["--quick", "--out", str(tmp_path), *argv])
        assert words in capsys.readouterr().err

"""Exponential integrators on problems they must solve exactly, and Adams on a mixture: orders, and step by step."""

import math
from functools import cache, partial

import mpmath as mp
import pytest
import scipy.integrate
import torch
from truth import F64, SDES, gaussian_map, marginal, moments, order, tensor
from variables import INF, VARIABLES, points, u_of

from experiments.problems import plane
from samplers import dpm_solver, dpmpp, exponential_euler, multistep, sa_solver, singlestep, unipc
from samplers.adams import adams, constant, runge_kutta, sweeps
from samplers.exponential import Form
from samplers.rows import run_rows
from scoresde import VP, flow


def of_residual(sde, d, V):
    """The score whose residual is V(r, x)."""

    def score(x, t):
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        v = V(sigma / alpha, x)
        if d == INF:
            return torch.zeros_like(x) + v / sigma
        rho = alpha * math.hypot(d, sigma / alpha)
        return (v * alpha * rho / sigma - x) / rho**2

    return score


def ratio(sde, t):
    return float(sde.sigma(t) / sde.alpha(t))


def radius(sde, d, t):
    return float(sde.alpha(t)) * (1.0 if d == INF else math.hypot(d, ratio(sde, t)))


def integral(d, V, r, r1):
    """int_r1^r V dr'/(d^2 + r'^2)."""
    f = lambda s: V(s) / (1.0 if d == INF else d**2 + s**2)  # noqa: E731
    return scipy.integrate.quad(f, r1, r, epsabs=1e-14, epsrel=1e-13)[0]


def polynomial(name, degree):
    """sum_k (k + 1) u^k up to this degree, as a function of r, for VP."""
    return lambda r: sum((k + 1) * float(u_of(name, mp.mpf(r))) ** k for k in range(degree + 1))


def exact_end(sde, d, V, x, ts):
    r, r1 = ratio(sde, ts[0]), ratio(sde, ts[-1])
    return radius(sde, d, ts[-1]) * (x / radius(sde, d, ts[0]) + integral(d, V, r, r1))


FORMS = pytest.mark.parametrize(("d", "name"), [(0.0, "log_snr"), (0.5, "bounded"), (INF, "level"), (0.0, "time")])
UNEVEN = (5.0, 3.6, 3.1, 2.0, 1.6, 1.0, 0.5)


@FORMS
@pytest.mark.parametrize("p", [1, 2, 3, 4, 5])
def test_polynomials_of_degree_below_the_order_are_exact(d, name, p):
    """On an uneven grid, as soon as p values are known: no step after that adds an error."""
    sde, x, ts = VP(), tensor([[0.3, -1.0]]), points(*UNEVEN)
    form, V = Form(d, VARIABLES[name]), polynomial(name, p - 1)
    score = of_residual(sde, d, lambda r, x: V(r))
    for knobs in ({}, {"start": "rise"}, {"correct": p}):
        errors = []

        def hook(i, t, x1, errors=errors):
            errors.append((x1 - exact_end(sde, d, V, x, torch.stack([ts[0], t]))) / radius(sde, d, t))

        multistep(score, sde, x, ts, order=p, form=form, on_step=hook, **knobs)
        late = torch.stack(errors[p - 1 :])
        torch.testing.assert_close(late, late[:1].expand_as(late), rtol=0, atol=1e-10)
        if p == 1:
            assert late.abs().max() < 1e-10
    table = partial(runge_kutta, form=form, stages=sweeps(p))  # p values within the step: exact from the first
    got = run_rows(score, sde, x, ts, table)
    torch.testing.assert_close(got, exact_end(sde, d, V, x, ts), rtol=1e-9, atol=1e-9)


@FORMS
def test_order_at_lowers_the_order_of_that_step_alone(d, name):
    """V linear in u: the only error is the one Euler makes in the step asked for; then too with the corrector."""
    sde, x, ts, k = VP(), tensor([[0.3, -1.0]]), points(*UNEVEN), 4
    form, V = Form(d, VARIABLES[name]), polynomial(name, 1)
    score = of_residual(sde, d, lambda r, x: V(r))
    r, r1 = ratio(sde, ts[k]), ratio(sde, ts[k + 1])
    slip = radius(sde, d, ts[-1]) * (V(r) * integral(d, lambda s: 1.0, r, r1) - integral(d, V, r, r1))

    def end(correct, low):
        table = partial(adams, form=form, order=2, correct=correct, order_at=lambda i, N: 1 if low and i == k else 9)
        return run_rows(score, sde, x, ts, table)

    torch.testing.assert_close(end(0, True) - end(0, False), torch.full_like(x, slip), rtol=1e-8, atol=1e-10)
    assert abs(slip) > 1e-2
    torch.testing.assert_close(end(2, True), end(2, False), rtol=1e-9, atol=1e-9)  # a line through old and new is exact
    V = polynomial(name, 2)  # now the corrector that is held to one old value slips, a line through two
    score = of_residual(sde, d, lambda r, x: V(r))
    u = lambda s: float(u_of(name, mp.mpf(s)))  # noqa: E731
    line = lambda s: V(r) + (V(r1) - V(r)) * (u(s) - u(r)) / (u(r1) - u(r))  # noqa: E731
    slip = radius(sde, d, ts[-1]) * (integral(d, line, r, r1) - integral(d, V, r, r1))

    def corrected(low):
        table = partial(adams, form=form, order=3, correct=2, start="rise")
        table = partial(table, order_at=lambda i, N: 1 if low and i == k else 9)
        return run_rows(score, sde, x, ts, table)

    torch.testing.assert_close(corrected(True) - corrected(False), torch.full_like(x, slip), rtol=1e-7, atol=1e-10)
    lines = []

    def order_at(i, N):
        lines.append((i, N))
        return 9

    adams(sde, ts, form, 2, order_at=order_at)
    assert set(lines) == {(i, 6) for i in range(6)}


@pytest.mark.parametrize("sde", ["VP", "SubVP", "VE", "Straight"])
def test_gaussian_data_of_the_forms_scale_are_exact_in_one_step(sde):
    """N(0, d^2): the flow map, and with noise the exact mean and variance, from any point to any."""
    sde, d = SDES[sde], 0.5
    ts = torch.stack([tensor(sde.T), tensor(sde.t_min)])
    x = tensor([[-2.0, 0.1, 3.0]]) * sde.prior_std
    score = of_residual(sde, d, lambda r, x: 0.0 * x)
    for name in ("log_snr", "level", "bounded"):
        for run in (multistep, singlestep):
            got = run(score, sde, x, ts, form=Form(d, VARIABLES[name]))
            torch.testing.assert_close(got, gaussian_map(sde, x, ts[0], ts[1], 0.0, d * d), rtol=1e-11, atol=1e-13)
    for tau in (0.3, 1.0, lambda r: r / (1 + r)):

        def run(score, sde, x, ts, tau=tau, **run):
            return run_rows(score, sde, x, ts, partial(adams, form=Form(d), order=2, tau=constant(tau)), **run)

        mean, var = moments(run, sde, ts, 0.0, d * d)
        torch.testing.assert_close(mean, torch.zeros(1, dtype=F64), rtol=0, atol=1e-12)
        torch.testing.assert_close(var, marginal(sde, ts[1], 0.0, d * d)[1].reshape(1), rtol=1e-11, atol=0)


@pytest.mark.parametrize("sampler", [dpmpp, partial(dpmpp, published=True), partial(multistep, correct=3), unipc,
                                     partial(unipc, published=True), singlestep,
                                     partial(dpm_solver, predict="x0"), exponential_euler, sa_solver])  # fmt: skip
def test_a_point_mass_is_exact_with_data_prediction(sampler):
    """x0 is constant: mean and variance are exact on any grid, to t = 0 too."""
    sde, m = VP(), tensor(0.7, -1.0)
    for levels in ((150.0, 0.01), (150.0, 7.0, 2.0, 0.3, 0.01)):
        mean, var = moments(sampler, sde, points(*levels), m, torch.zeros(2, dtype=F64))
        want_mean, want_var = marginal(sde, points(*levels)[-1], m, 0.0)
        torch.testing.assert_close(mean, want_mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(var, want_var.expand(2), rtol=1e-10, atol=1e-14)
    mean, var = moments(sampler, sde, points(150.0, 2.0, 0.3, 0.0), m, torch.zeros(2, dtype=F64))
    torch.testing.assert_close(mean, m, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(var, torch.zeros(2, dtype=F64), rtol=0, atol=1e-14)


TARGET = plane(0.5, 0.15, 0.3, seed=1)


@cache
def bent():
    """A 2-D mixture of eight, from sigma/alpha = 1.5 to 0.5: start, its score and the exact flow's end."""
    sde, (t, t1) = VP(), points(1.5, 0.5)
    z = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    x = float(sde.alpha(t)) * TARGET.sample(6, 3) + float(sde.sigma(t)) * z
    score = TARGET.score(sde)
    return sde, score, x, (t, t1), flow(score, sde, x, t, t1, rtol=1e-12, atol=1e-12)


def uneven_grid(t, t1, n):
    u = torch.linspace(0, 1, n + 1, dtype=F64)
    return t + (u + u**2) / 2 * (t1 - t)


def end_error(n, **knobs):
    sde, score, x, ends, exact = bent()
    return float((multistep(score, sde, x, uneven_grid(*ends, n), **knobs) - exact).square().mean().sqrt())


@pytest.mark.parametrize(("predict", "p", "correct", "start", "n", "want"), [
    *((f, p, 0, "order", 256 if p == 4 else 128, p) for f in ("x0", "eps") for p in (2, 3, 4)),
    *((f, p, p, "order", 128, p + 1) for f in ("x0", "eps") for p in (2, 3)),
    ("eps", 4, 4, "order", 128, 5), ("x0", 4, 4, "order", 128, 5), ("x0", 5, 0, "order", 128, 5),
    ("x0", 2, 0, "rise", 128, 2), ("x0", 4, 0, "rise", 64, 2), ("eps", 4, 0, "rise", 64, 2),
    ("eps", 2, 2, "rise", 128, 3), ("eps", 4, 4, "rise", 256, 3),
])  # fmt: skip
def test_order_on_a_mixture(predict, p, correct, start, n, want):
    """As asked, with the corrector one more, from a start of its own order; a rising start: 2, with a corrector 3."""
    form = Form(0.0 if predict == "x0" else INF)
    errors = [end_error(k * n, order=p, form=form, start=start, correct=correct) for k in (1, 2)]
    assert order(errors)[0] == pytest.approx(want, abs=0.25 if want == 5 else 0.15), errors


def by_hand(score, sde, x, ts, form, p, correct, hook):
    """Predict, hook, ask, correct; each step's polynomial integrated by scipy; the state after each hook."""
    d = form.d
    R = [radius(sde, d, t) for t in ts]
    u = [float(form.u(sde, torch.tensor(ratio(sde, t), dtype=F64))) for t in ts]

    def advance(i, values):
        """What the polynomial through values {index: V} adds to x/R between ts[i] and ts[i + 1]."""
        total = 0.0
        for j, V in values.items():

            def L(s, j=j):
                us = float(form.u(sde, torch.tensor(s, dtype=F64)))
                return math.prod((us - u[k]) / (u[j] - u[k]) for k in values if k != j)

            total = total + V * integral(d, L, ratio(sde, ts[i]), ratio(sde, ts[i + 1]))
        return R[i + 1] * total

    V, states, moved = {}, [], None
    for i in range(len(ts) - 1):
        r = ratio(sde, ts[i])

        def residual(y, i=i, r=r):
            s = score(y, ts[i])
            return float(sde.sigma(ts[i])) * s if d == INF else r / R[i] * (y + R[i] ** 2 * s)

        V[i] = residual(x)
        if i and correct:
            known = {j: V[j] for j in range(i, max(i - 1 - min(correct, i), -1), -1)}
            x = x + advance(i - 1, known) - moved
        moved = advance(i, {j: V[j] for j in range(i, max(i - min(p, i + 1), -1), -1)})
        x = hook(i, R[i + 1] / R[i] * x + moved)
        states.append(x)
    return states


@pytest.mark.parametrize(("d", "name", "p", "correct"), [
    (0.0, "log_snr", 2, 2), (0.0, "log_snr", 3, 1), (INF, "level", 3, 0), (0.5, "bounded", 2, 2),
    (0.5, "bounded", 3, 3), (0.0, "log_snr", 1, 2),
])  # fmt: skip
def test_adams_step_by_step(d, name, p, correct):
    """The rows are the algorithm: also where a hook replaces x, which the correction is then added to."""
    sde, score, x, ends, _ = bent()
    form, ts, seen = Form(d, VARIABLES[name]), uneven_grid(*ends, 7), []

    def hook(i, x):
        return torch.cat([torch.full_like(x[:, :1], 0.3 - 0.1 * i), x[:, 1:]], 1) if i in (2, 3) else x

    def on_step(i, t, x):
        seen.append(hook(i, x))
        return seen[-1]

    run = partial(multistep, form=form, order=p, correct=correct, start="rise")
    out = run(score, sde, x, ts, on_step=on_step)
    want = by_hand(score, sde, x, ts, form, p, correct, hook)
    for got, state in zip(seen, want, strict=True):
        torch.testing.assert_close(got, state, rtol=1e-9, atol=1e-10)
    assert torch.equal(out, seen[-1])


def test_inpainting_keeps_the_order():
    """Half the coordinates put on the exact path by a hook: the other half converges to it, order 3."""
    sde, score, x, ends, exact = bent()
    errors = []
    for n in (48, 96):
        ts, states = uneven_grid(*ends, n), []
        fine = uneven_grid(*ends, n).repeat_interleave(8)[: 8 * n + 1]  # the path at ts by eight steps between two
        fine = fine + torch.cat([(ts.diff()[:, None] * torch.arange(8, dtype=F64) / 8).flatten(), ts.new_zeros(1)])
        multistep(score, sde, x, fine, order=4, on_step=lambda i, t, x, s=states: s.append(x))
        path = states[7::8]

        def hook(i, t, x, path=path):
            return torch.cat([path[i][:, :1], x[:, 1:]], 1)

        out = multistep(score, sde, x, ts, order=2, correct=2, on_step=hook)
        errors.append(float((out - exact)[:, 1].square().mean().sqrt()))
    assert order(errors)[0] > 2.85, errors


@pytest.mark.parametrize(("wrong", "message"), [
    ({"order": 0}, "order must be at least 1"), ({"correct": -1}, "corrector's at least 0"),
    ({"start": "late"}, "'order' or 'rise'"),
])  # fmt: skip
def test_wrong_knobs(wrong, message):
    sde, score, x, ends, _ = bent()
    with pytest.raises(ValueError, match=message):
        multistep(score, sde, x, uneven_grid(*ends, 4), **wrong)
    for tau in (-0.1, INF, math.nan):
        with pytest.raises(ValueError, match="tau must be >= 0"):
            constant(tau)

"""Adams' method with own steps and order: exact integrals, equations with known solutions, the flows of mixtures."""

import math

import pytest
import torch
import torchdiffeq
from numpy.polynomial import Polynomial
from truth import F64, tensor

from experiments.problems import NAMES, problem
from scoresde import counted, flow
from scoresde.adams import ORDERS, _integrals, adams_each
from scoresde.adaptive import rowwise


def test_integrals():
    """Against the polynomials' coefficients: products of up to eight factors, uneven points, two rows."""
    at, h, unit = tensor(0.7, -1.0), tensor(0.2, -0.3), 0.5
    g = torch.Generator().manual_seed(0)
    past = torch.stack([at, *(at - (j + torch.rand(2, generator=g, dtype=F64)) * h for j in range(ORDERS - 1))])
    C = _integrals(at, h, past, unit)
    for b in range(2):
        for j in range(ORDERS + 1):
            whole = Polynomial([1 / unit**j])
            for root in past[:j, b].tolist():
                whole = whole * Polynomial([-root, 1])
            whole = whole.integ()
            a = float(at[b])
            assert float(C[j, b]) == pytest.approx(whole(a + float(h[b])) - whole(a), rel=1e-9)


def solve(rates, u1=3.0, size=1, start=1.0, **more):
    """y' = rate y of each row from u = 0; (relative errors, calls)."""
    rates, calls = torch.tensor(rates, dtype=F64), 0

    def rhs(u, y):
        nonlocal calls
        calls += 1
        return rates[:, None] * y

    y = adams_each(rhs, torch.full((len(rates), size), start, dtype=F64), 0.0, u1, **more)
    return (y / (start * torch.exp(rates * u1))[:, None] - 1).abs().amax(1), calls


def test_a_field_that_is_a_line_is_exact_from_the_second_point_on():
    """y' = 2u - 1: every correction of order 1 or more is the exact integral; so the steps only grow."""
    calls = []

    def rhs(u, y):
        calls.append(float(u[0]))
        return (2 * u - 1)[:, None].expand_as(y)

    y = adams_each(rhs, tensor([[0.3, -4.0]]), 2.0, 0.5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, tensor([[0.3, -4.0]]) + (0.25 - 0.5 - 4 + 2), rtol=0, atol=1e-13)
    assert len(calls) < 24
    assert calls[-1] == 0.5


def test_driven_oscillator_from_loose_to_tight_at_the_price_of_order_nine():
    """y'' = -y + sin 3u: error below the tolerance from 1e-3 to 1e-11; the last 10^4 cost less than 2.8
    times the calls, 10^(4/9) for order 9 (order 7: 3.7, a pair of order 5: 6.3)."""
    u1, cost = 8.0, []
    want = tensor(math.cos(u1) + 3 / 8 * math.sin(u1) - math.sin(3 * u1) / 8)
    for tol in (1e-3, 1e-5, 1e-7, 1e-9, 1e-11):
        calls = 0

        def rhs(u, y):
            nonlocal calls
            calls += 1
            return torch.stack([y[:, 1], torch.sin(3 * u) - y[:, 0]], 1)

        y = adams_each(rhs, tensor([[1.0, 0.0]]), 0.0, u1, rtol=tol, atol=tol)
        assert abs(float(y[0, 0] - want)) < tol
        cost.append(calls)
    assert 1.5 < cost[4] / cost[2] < 2.8


def test_relative_tolerance_follows_the_size_of_the_state():
    one, calls = solve([1.0], rtol=1e-7, atol=1e-30)
    large, same = solve([1.0], start=1e8, rtol=1e-7, atol=1e-30)
    assert calls == same
    assert float(large) == pytest.approx(float(one), rel=1e-3)
    assert 1e-12 < float(one) < 1e-7


def test_the_error_is_a_mean_over_the_sample_not_a_sum():
    assert solve([-2.0], rtol=1e-6, atol=1e-6)[1] == solve([-2.0], size=1000, rtol=1e-6, atol=1e-6)[1]


def test_rows_do_not_see_each_other():
    """A stiff mate changes nothing for an easy row, and the batch takes as many calls as its hardest row."""
    both, calls = solve([-0.5, -60.0], rtol=1e-6, atol=1e-6)
    easy, few = solve([-0.5], rtol=1e-6, atol=1e-6)
    assert both[0] == easy[0]
    assert few < calls == solve([-60.0], rtol=1e-6, atol=1e-6)[1]


def test_a_transient_beyond_the_first_step_is_repeated_smaller():
    """y' = -500 (y - cos u): steps a 256th of the way would grow without bound."""

    def rhs(u, y):
        return -500 * (y - torch.cos(u)[:, None])

    y = adams_each(rhs, torch.zeros(1, 1, dtype=F64), 0.0, 3.0, rtol=1e-7, atol=1e-7)
    L = 500.0
    assert float(y) == pytest.approx((L**2 * math.cos(3) + L * math.sin(3)) / (1 + L**2), abs=1e-7)


def test_arrived_rows_leave():
    """Each row is evaluated once for each of its own steps and once before: alone, in the batch, leaving or not."""
    rates, seen = tensor([-30.0, -0.5, -8.0]), []

    def field(index):
        def rhs(u, y):
            seen.extend(index.tolist())
            return rates[index][:, None] * y

        return rhs

    y = tensor([[1.0, 2.0], [-1.0, 0.5], [3.0, 3.0]])
    out = adams_each(field(torch.arange(3)), y, 0.0, 3.0, rtol=1e-6, atol=1e-6, rows=field)
    cost = [seen.count(i) for i in range(3)]
    seen.clear()
    assert torch.equal(out, adams_each(field(torch.arange(3)), y, 0.0, 3.0, rtol=1e-6, atol=1e-6))
    assert [seen.count(i) for i in range(3)] == [max(cost)] * 3
    for i in range(3):
        seen.clear()
        alone = adams_each(field(torch.tensor([i])), y[i : i + 1], 0.0, 3.0, rtol=1e-6, atol=1e-6)
        assert torch.equal(alone[0], out[i])
        assert len(seen) == cost[i]
    assert cost[1] < cost[2] < cost[0]


def test_gradient():
    """d y(u1)/d y(0) and d/d rate of y' = rate sin y, whose solution is 2 atan(tan(y/2) e^(rate u))."""
    y, rate = tensor([[0.5], [1.5]]).requires_grad_(), tensor(0.8).requires_grad_()
    out = adams_each(lambda u, y: rate * torch.sin(y), y, 0.0, 2.0, rtol=1e-8, atol=1e-8)
    want = 2 * torch.atan(torch.tan(y / 2) * torch.exp(rate * 2))
    for got, exact in zip(
        torch.autograd.grad(out.sum(), (y, rate)), torch.autograd.grad(want.sum(), (y, rate)), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)


def test_float32_meets_a_tolerance_near_its_rounding():
    y = adams_each(lambda u, y: -y, torch.ones(1, 3), 0.0, 5e-3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, math.exp(-5e-3) * torch.ones(1, 3), rtol=3e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_field_without_numbers_and_one_without_end_are_refused(bad):
    def rhs(u, y):
        return torch.where(u[:, None] < 1, -y, bad)

    y = torch.ones(2, 1, dtype=F64)
    with pytest.raises(FloatingPointError, match=r"sample 0 needs steps below 1e-12 of the interval at (1|0\.99)"):
        adams_each(rhs, y, 0.0, 2.0, rtol=1e-6, atol=1e-6)
    with pytest.raises(FloatingPointError, match="no end after 7 steps"):
        adams_each(lambda u, y: -y, y, 0.0, 2.0, rtol=1e-6, atol=1e-6, max_steps=7)


def default_norm(score, sde, x, t, t1, tol):
    """torchdiffeq's dopri5 as it comes, on z = x/R over u = log(sigma/alpha)."""
    t = tensor(t, t1)

    def rhs(u, z):
        at = sde.time(-u)
        a, s = sde.alpha(at), sde.sigma(at)
        R = torch.hypot(a, s)
        return -(s**2) / R * (score(z * R, at) + z / R)

    R, options = torch.hypot(sde.alpha(t), sde.sigma(t)), {"step_t": -sde.lam(t[1:])}
    z = torchdiffeq.odeint(rhs, x / R[0], -sde.lam(t), method="dopri5", rtol=tol, atol=tol, options=options)
    return z[-1] * R[1]


@pytest.mark.parametrize("name", NAMES)
def test_worst_sample_within_three_tolerances_on_every_problem(name):
    """rtol = atol = tol = 1e-3, 1e-5, 1e-7, 64 samples.  Error: the largest over samples of the RMS over coordinates of
    |x - exact| at t_end.  torchdiffeq's dopri5 with its default norm misses tol by 9 or more, at as many calls."""
    p = problem(name)
    x = p.start(64)
    want = flow(p.score, p.sde, x, p.sde.T, p.t_end, rtol=1e-10, atol=1e-10, method="each:dop853")
    for tol in (1e-3, 1e-5, 1e-7):
        ours, theirs = counted(p.score), counted(p.score)
        got = flow(rowwise(ours), p.sde, x, p.sde.T, p.t_end, rtol=tol, atol=tol)
        other = default_norm(theirs, p.sde, x, p.sde.T, p.t_end, tol)
        assert worst(got, want) < 3 * tol
        assert worst(other, want) > 9 * tol
        assert ours.calls <= 1.1 * theirs.calls
        assert ours.samples <= 0.9 * theirs.samples


def worst(x, want):
    return float((x - want).flatten(1).square().mean(1).sqrt().max())

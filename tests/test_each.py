"""What solvers with own steps for each sample have in common: tolerances, rows apart, rows that leave, refusals."""

import math

import pytest
import torch
from truth import F64, gaussian_score, tensor

from samplers import ode
from scoresde import VP, flow
from scoresde.adams import adams_each
from scoresde.adaptive import PAIRS, rows_of, rowwise, solve_each
from scoresde.each import power


def by_pair(name):
    return lambda *given, **more: solve_each(*given, pair=PAIRS[name], **more)[0]


SOLVERS = {"adams": adams_each} | {name: by_pair(name) for name in ("dopri5", "dop853")}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


def solve(solver, rates, u1=3.0, size=1, start=1.0, **more):
    """y' = rate y of each row from u = 0, size copies of it; (relative errors, calls)."""
    rates, calls = torch.tensor(rates, dtype=F64), 0

    def rhs(u, y):
        nonlocal calls
        calls += 1
        return rates[:, None] * y

    y = solver(rhs, torch.full((len(rates), size), start, dtype=F64), 0.0, u1, **more)
    return (y / (start * torch.exp(rates * u1))[:, None] - 1).abs().amax(1), calls


@every_solver
def test_relative_tolerance_follows_the_size_of_the_state(solver):
    """With atol = 0 in effect, a state 10^8 times as large takes the same steps and has the same relative error."""
    one, calls = solve(solver, [1.0], rtol=1e-7, atol=1e-30)
    large, same = solve(solver, [1.0], start=1e8, rtol=1e-7, atol=1e-30)
    assert calls == same
    assert float(large) == pytest.approx(float(one), rel=1e-3)
    assert 1e-12 < float(one) < 1e-7


@every_solver
def test_the_error_is_a_mean_over_the_sample_not_a_sum(solver):
    """A thousand copies of one coordinate are no harder than one."""
    assert solve(solver, [-2.0], rtol=1e-6, atol=1e-6)[1] == solve(solver, [-2.0], size=1000, rtol=1e-6, atol=1e-6)[1]


@every_solver
def test_rows_do_not_see_each_other(solver):
    """A stiff mate changes nothing for an easy row, and the batch takes as many calls as its hardest row."""
    both, calls = solve(solver, [-0.5, -60.0], size=2, rtol=1e-6, atol=1e-6)
    easy, few = solve(solver, [-0.5], size=2, rtol=1e-6, atol=1e-6)
    assert both[0] == easy[0]
    assert few < calls == solve(solver, [-60.0], size=2, rtol=1e-6, atol=1e-6)[1]


@every_solver
def test_a_transient_beyond_the_first_step_is_repeated_smaller(solver):
    """y' = -500 (y - cos u): the first step, a 32nd of the way or a 256th, would grow without bound."""

    def rhs(u, y):
        return -500 * (y - torch.cos(u)[:, None])

    y = solver(rhs, torch.zeros(1, 1, dtype=F64), 0.0, 3.0, rtol=1e-7, atol=1e-7)
    L = 500.0  # y = (L^2 cos u + L sin u)/(1 + L^2), the transient has died
    assert float(y) == pytest.approx((L**2 * math.cos(3) + L * math.sin(3)) / (1 + L**2), abs=1e-7)


@every_solver
def test_both_directions(solver):
    y = solver(lambda u, y: -y, torch.ones(1, 1, dtype=F64), 2.0, 0.0, rtol=1e-9, atol=1e-9)
    assert float(y) == pytest.approx(math.exp(2), rel=1e-8)


@every_solver
def test_no_way_is_no_step(solver):
    y = tensor([[0.3, -1.0]])
    assert torch.equal(solver(None, y, 1.5, 1.5, rtol=1e-6, atol=1e-6), y)


@every_solver
def test_arrived_rows_leave(solver):
    """Each row is evaluated once and in each of its own steps: alone, in the batch, leaving or not; to the bit."""
    rates, seen = tensor([-30.0, -0.5, -8.0]), []

    def field(index):
        def rhs(u, y):
            seen.extend(index.tolist())
            return rates[index][:, None] * y

        return rhs

    whole = torch.arange(3)
    y = tensor([[1.0, 2.0], [-1.0, 0.5], [3.0, 3.0]])
    out = solver(field(whole), y, 0.0, 3.0, rtol=1e-6, atol=1e-6, rows=field)
    cost = [seen.count(i) for i in range(3)]
    seen.clear()
    assert torch.equal(out, solver(field(whole), y, 0.0, 3.0, rtol=1e-6, atol=1e-6))
    assert [seen.count(i) for i in range(3)] == [max(cost)] * 3
    for i in range(3):
        seen.clear()
        alone = solver(field(torch.tensor([i])), y[i : i + 1], 0.0, 3.0, rtol=1e-6, atol=1e-6)
        assert torch.equal(alone[0], out[i])
        assert len(seen) == cost[i]
    assert cost[1] < cost[2] < cost[0]


@every_solver
def test_gradient(solver):
    """d y(u1)/d y(0) and d/d rate of y' = rate sin y, whose solution is 2 atan(tan(y/2) e^(rate u))."""
    y, rate = tensor([[0.5], [1.5]]).requires_grad_(), tensor(0.8).requires_grad_()
    out = solver(lambda u, y: rate * torch.sin(y), y, 0.0, 2.0, rtol=1e-8, atol=1e-8)
    want = 2 * torch.atan(torch.tan(y / 2) * torch.exp(rate * 2))
    for got, exact in zip(
        torch.autograd.grad(out.sum(), (y, rate)), torch.autograd.grad(want.sum(), (y, rate)), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-7)


@every_solver
def test_float32_meets_a_tolerance_near_its_rounding(solver):
    y = solver(lambda u, y: -y, torch.ones(1, 3), 0.0, 5e-3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y, math.exp(-5e-3) * torch.ones(1, 3), rtol=3e-6, atol=0)


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_field_without_numbers_and_one_without_end_are_refused(solver, bad):
    def rhs(u, y):
        return torch.where(u[:, None] < 1, -y, bad)

    y = torch.ones(2, 1, dtype=F64)
    with pytest.raises(FloatingPointError, match=r"sample 0 needs steps below 1e-12 of the interval at (1|0\.99)"):
        solver(rhs, y, 0.0, 2.0, rtol=1e-6, atol=1e-6)
    with pytest.raises(FloatingPointError, match=r"no end after 2 steps at rtol = 1e-06, atol = 1e-05; loosen them"):
        solver(lambda u, y: -y, y, 0.0, 2.0, rtol=1e-6, atol=1e-5, max_steps=2)


@every_solver
def test_the_refused_sample_is_named_by_its_place_in_the_whole_batch(solver):
    """Rows 0 and 2 have left when row 1, still on its way, meets its wall."""

    def field(index):
        slow = (index == 1)[:, None]
        return lambda u, y: torch.where(slow & (u[:, None] > 1.9), math.nan, torch.where(slow, -60.0 * y, 0.1 * y))

    with pytest.raises(FloatingPointError, match=r"sample 1 needs"):
        solver(field(torch.arange(3)), torch.ones(3, 1, dtype=F64), 0.0, 2.0, rtol=1e-6, atol=1e-6, rows=field)


class Shifted:
    """Unit-variance data whose mean each row holds for itself: a score that can give some of its rows."""

    def __init__(self, sde, mean, var, counts):
        self.sde, self.mean, self.var, self.counts = sde, mean, var, counts

    def __call__(self, x, t):
        assert len(x) == len(self.mean)
        self.counts.append(len(x))
        return gaussian_score(self.sde, self.mean, self.var)(x, t)

    def rows(self, index):
        return Shifted(self.sde, self.mean[index], self.var[index], self.counts)


@pytest.mark.parametrize("D", [5, 48])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("method", ["each", "each:dopri5", "each:dop853"])
def test_a_sample_alone_is_the_same_as_in_a_batch(D, dtype, method):
    """To the bit, through `flow` and `ode`, with rows that leave and a state for each row in the score."""
    sde, g = VP(), torch.Generator().manual_seed(0)
    mean = torch.randn(7, D, generator=g, dtype=F64).to(dtype)
    var = torch.logspace(-3, 1, 7, dtype=F64).to(dtype)[:, None].expand(7, D)
    x, counts = torch.randn(7, D, generator=g, dtype=F64).to(dtype), []
    score = Shifted(sde, mean, var, counts)
    how = {"method": method, "rtol": 1e-4, "atol": 1e-4}
    whole = flow(score, sde, x, sde.T, 1e-3, **how)
    assert set(counts) > {7, 1}
    assert torch.equal(whole, ode(score, sde, x, tensor(sde.T, 1e-3), **how))
    assert torch.equal(whole, flow(lambda x, t: gaussian_score(sde, mean, var)(x, t), sde, x, sde.T, 1e-3, **how))
    for part in (slice(0, 1), slice(2, 5), slice(6, 7)):
        index = torch.arange(7)[part]
        assert torch.equal(flow(score.rows(index), sde, x[part], sde.T, 1e-3, **how), whole[part])


def test_rowwise_and_other_scores():
    sde = VP()
    plain = gaussian_score(sde)
    assert rows_of(plain, torch.tensor([0])) is None
    declared = rowwise(plain)
    assert rows_of(declared, torch.tensor([0])) is declared
    x = tensor([[0.3, -1.0]])
    assert torch.equal(declared(x, tensor(0.5)), plain(x, tensor(0.5)))


def test_powers_do_not_see_each_other():
    """To the bit, any part of a tensor alone; torch.pow fails this."""
    e = 10 ** (4 * torch.rand(257, generator=torch.Generator().manual_seed(0), dtype=F64) - 3)
    for p in (-0.14, 0.08, 1 / 3):
        whole = power(e, p)
        torch.testing.assert_close(whole, e**p, rtol=1e-14, atol=0)
        assert all(torch.equal(power(e[i : i + n].clone(), p), whole[i : i + n]) for n in (1, 3, 8) for i in range(250))

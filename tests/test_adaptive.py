"""Dormand-Prince on equations whose solutions are known: error, calls, and rows that do not see each other."""

import math

import pytest
import torch

from scoresde.adaptive import dormand_prince

F64 = torch.float64


def solve(rates, size, u1=3.0, start=1.0, **tol):
    """y' = rate y for each row, size copies of it; (relative errors, calls)."""
    rates, calls = torch.tensor(rates, dtype=F64), 0

    def rhs(u, y):
        nonlocal calls
        calls += 1
        return rates[:, None] * y

    y = dormand_prince(rhs, torch.full((len(rates), size), start, dtype=F64), 0.0, u1, **tol)
    return (y / (start * torch.exp(rates * u1))[:, None] - 1).abs().amax(1), calls


def test_tighter_tolerance_less_error_at_fifth_order_price():
    """Error falls with the tolerance; with step h ~ tol^(1/5) a factor 10^5 costs a factor 10 in steps."""
    loose, few = solve([-2.0], 1, rtol=1e-5, atol=1e-5)
    tight, many = solve([-2.0], 1, rtol=1e-10, atol=1e-10)
    assert loose < 1e-2
    assert tight < 1e-7
    assert 4 < (many - 1) / (few - 1) < 14


def test_relative_tolerance_follows_the_size_of_the_state():
    """With atol = 0 in effect, a state 10^8 times as large takes the same steps and has the same relative error."""
    one, calls = solve([1.0], 1, rtol=1e-7, atol=1e-30)
    large, same = solve([1.0], 1, start=1e8, rtol=1e-7, atol=1e-30)
    assert calls == same
    assert float(large) == pytest.approx(float(one), rel=1e-3)
    assert 1e-12 < float(one) < 1e-5


def test_the_error_is_a_mean_over_the_sample_not_a_sum():
    """A thousand copies of one coordinate are no harder than one."""
    assert solve([-2.0], 1, rtol=1e-6, atol=1e-6)[1] == solve([-2.0], 1000, rtol=1e-6, atol=1e-6)[1]


def test_rows_do_not_see_each_other():
    """A stiff mate changes nothing for an easy row, and the batch takes as many calls as its hardest row."""
    both, calls = solve([-0.5, -60.0], 2, rtol=1e-6, atol=1e-6)
    easy, _ = solve([-0.5], 2, rtol=1e-6, atol=1e-6)
    assert both[0] == easy[0]
    assert calls == solve([-60.0], 2, rtol=1e-6, atol=1e-6)[1]


def test_rejected_steps_are_repeated_smaller():
    """y' = -500 (y - cos u): the first step, a 32nd of the way, is far outside stability."""

    def rhs(u, y):
        return -500 * (y - torch.cos(u)[:, None])

    y = dormand_prince(rhs, torch.zeros(1, 1, dtype=F64), 0.0, 3.0, rtol=1e-7, atol=1e-7)
    L = 500.0  # y = (L^2 cos u + L sin u)/(1 + L^2), the transient has died
    assert float(y) == pytest.approx((L**2 * math.cos(3) + L * math.sin(3)) / (1 + L**2), abs=1e-6)


def test_both_directions():
    y = dormand_prince(lambda u, y: -y, torch.ones(1, 1, dtype=F64), 2.0, 0.0, rtol=1e-9, atol=1e-9)
    assert float(y) == pytest.approx(math.exp(2), rel=1e-7)

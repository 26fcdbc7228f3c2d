"""Adams' method with own steps and order: exact integrals, equations with known solutions, the flows of mixtures."""

import math

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from truth import F64, tensor

from experiments.problems import NAMES, problem
from experiments.tolerances import as_it_comes, worst
from scoresde import EDM, VP, counted, flow, mixture
from scoresde.adams import MARGIN, ORDERS, _integrals, adams_each
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


def through(points, f, start, end):
    """The integral from start to end of the polynomial through f at these points, by a quadrature exact to degree 9."""
    q, w = np.polynomial.legendre.leggauss(5)
    s = start + (1 + q) / 2 * (end - start)
    return (
        (end - start)
        / 2
        * sum(w @ (f(p) * math.prod(((s - o) / (p - o) for o in points if o != p), start=1 + 0 * s)) for p in points)
    )


def test_every_step_predicts_and_corrects_by_polynomials_of_one_order():
    """y' = sin 20u + 3 |u - 1|, read off a run: what is evaluated is y plus the integral of the polynomial through
    the last k values, and the state after the step that through the new one, too; what the oldest one adds to that
    accepts the step or not.  k is 1 for two steps (the second point is the first that tells of order 2), moves by 1 at
    most, and not up after a rejected step, is never more than there are values, and reaches 8."""
    asked = []
    f = lambda u: math.sin(20 * u) + 3 * abs(u - 1)  # noqa: E731

    def rhs(u, y):
        asked.append((float(u), float(y)))
        return (torch.sin(20 * u) + 3 * (u - 1).abs())[:, None]

    out = float(adams_each(rhs, tensor([[0.7]]), 0.0, 2.0, rtol=1e-6, atol=1e-6))
    (u, y), *asked = asked
    points, orders, made = [u], [{1}], [True]
    for (u1, y_p), (after, _) in zip(asked, [*asked[1:], (math.inf, 0)], strict=True):
        off = {k: abs(y + through(points[:k], f, u, u1) - y_p) for k in range(1, len(points[:ORDERS]) + 1)}
        can = {k + move for k in orders[-1] for move in ((-1, 0, 1) if made[-1] else (-1, 0))}
        orders.append({k for k in can & off.keys() if off[k] < 1e-10})  # a short step looks like several
        assert orders[-1]
        made.append(after > u1)
        k = min(orders[-1], key=off.get)
        y1, lower = (y + through([u1, *points[:j]], f, u, u1) for j in (k, k - 1))
        assert made[-1] == (abs(y1 - lower) <= MARGIN * 1e-6 * (1 + max(abs(y), abs(y1))))
        if made[-1]:
            y, u = y1, u1
            points.insert(0, u)
    assert out == pytest.approx(y, abs=1e-10)
    assert out == pytest.approx(0.7 + (1 - math.cos(40)) / 20 + 3, rel=1e-6)
    assert [k for k, accepted in zip(orders, made, strict=True) if accepted][1:3] == [{1}, {1}]
    assert orders.count({ORDERS}) > 100
    assert any(min(k) > 3 for k, accepted in zip(orders, made, strict=True) if not accepted)


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
        other = as_it_comes(theirs, p.sde, x, tensor(p.sde.T, p.t_end), tol)
        assert worst(got, want) < 3 * tol
        assert worst(other, want) > 9 * tol
        assert ours.calls <= 1.1 * theirs.calls
        assert ours.samples <= 0.9 * theirs.samples


def narrow(D, seed, sde):
    """5 or 8 narrow modes about 0.5 apart, and 64 starts from the prior."""
    g = torch.Generator().manual_seed(seed)
    if D == 2:
        means = torch.randn(5, 2, generator=g, dtype=F64)
        target = mixture(torch.ones(5, dtype=F64), 0.5 * means / means.std(), var=tensor(0.01, 0.02, 0.03, 0.005, 0.01))
    else:
        means = torch.randn(8, D, generator=g, dtype=F64)
        target = mixture(torch.ones(8, dtype=F64), 0.45 * means, var=torch.full((8,), 0.05, dtype=F64))
    return target.score(sde), sde.prior_std * torch.randn(64, D, generator=g, dtype=F64)


@pytest.mark.parametrize(("D", "seed", "sde"), [(2, 0, VP()), (2, 1, EDM()), (64, 1, VP()), (64, 5, VP())])
def test_worst_sample_within_the_tolerance_at_no_more_calls_than_torchdiffeq(D, seed, sde):
    """rtol = atol = tol from 1e-3 to 1e-7.  Error: the largest over 64 samples of the RMS over coordinates of
    |x - exact| at t_end, against tol.  Evaluations per sample and batched calls against those of torchdiffeq's dopri5
    with its default norm, whose worst sample misses tol by 8 to 100."""
    score, x = narrow(D, seed, sde)
    end = 1e-3 if isinstance(sde, VP) else sde.t_min
    want = flow(rowwise(score), sde, x, sde.T, end, rtol=1e-12, atol=1e-12, method="each:dop853")
    t = tensor(sde.T, end)
    for tol in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        ours, theirs = counted(score), counted(score)
        got = flow(rowwise(ours), sde, x, sde.T, end, rtol=tol, atol=tol)
        assert worst(got, want) < tol
        other = as_it_comes(theirs, sde, x, t, tol)
        assert worst(other, want) > 8 * tol
        assert ours.samples / 64 <= 0.8 * theirs.calls
        assert ours.calls <= theirs.calls

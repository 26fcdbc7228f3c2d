"""Embedded pairs: their order conditions, and equations whose solutions are known: error, calls, rows apart."""

import itertools
import math

import pytest
import torch
from truth import F64, order, tensor

from scoresde import Streams
from scoresde.adaptive import PAIRS, _error, solve_each

EVERY = pytest.mark.parametrize("name", PAIRS)


def trees(n):
    """All rooted trees of n nodes, as sorted tuples of subtrees."""
    if n == 1:
        return [()]
    found = set()
    for parts in partitions(n - 1):
        for children in itertools.product(*(trees(p) for p in parts)):
            found.add(tuple(sorted(children)))
    return sorted(found)


def partitions(n, most=None):
    most = n if most is None else most
    if n == 0:
        return [()]
    return [(k, *rest) for k in range(min(n, most), 0, -1) for rest in partitions(n - k, k)]


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * math.prod(map(density, tree))


def elementary(tree, A):
    """Phi_i(tree), of all stages: prod over subtrees of sum_j A_ij Phi_j."""
    out = torch.ones(len(A), dtype=F64)
    for child in tree:
        out = out * (A @ elementary(child, A))
    return out


def matrices(pair):
    """A with the first stage and the one at the new point, B with a 0 for the latter."""
    s = len(pair.B)
    A = torch.zeros(s + 1, s + 1, dtype=F64)
    for i, row in enumerate((*pair.A, pair.B), 1):
        A[i, : len(row)] = tensor(row)
    return A, tensor((*pair.B, 0.0))


@EVERY
def test_order_conditions(name):
    """sum_i b_i Phi_i(tree) = 1/density(tree) for all trees up to the order, not beyond (Butcher); sums of rows."""
    pair = PAIRS[name]
    A, B = matrices(pair)
    C = tensor((0.0, *pair.C, 1.0))
    torch.testing.assert_close(A.sum(1), C, rtol=0, atol=2e-14)
    defects = {
        n: max(abs(float(B @ elementary(t, A)) - 1 / density(t)) for t in trees(n)) for n in range(1, pair.order + 2)
    }
    assert max(defects[n] for n in range(1, pair.order + 1)) < 5e-14
    assert defects[pair.order + 1] > 1e-6
    assert [len(trees(n)) for n in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@EVERY
def test_order_conditions_of_the_estimate(name):
    """sum_i e_i Phi_i(tree) = 0 up to one order below the estimate's rate, and not at it."""
    pair = PAIRS[name]
    A, _ = matrices(pair)
    for E, rate in ((pair.E, 6), (pair.E3, 4)) if pair.E3 else ((pair.E, pair.rate),):
        low = max(abs(float(tensor(E) @ elementary(t, A))) for n in range(1, rate) for t in trees(n))
        high = max(abs(float(tensor(E) @ elementary(t, A))) for t in trees(rate))
        assert low < 5e-14
        assert high > 1e-5
    assert pair.rate == (6 + 6 - 4 if pair.E3 else pair.rate)


@EVERY
def test_convergence_order(name):
    """A harmonic oscillator driven at its third harmonic, by equal steps: halving them gains 2^order."""
    pair, errors = PAIRS[name], []

    def f(u, y):  # y'' = -y + sin 3u, y(0) = 1, y'(0) = 0
        return tensor([y[1], math.sin(3 * u) - y[0]])

    want = tensor(
        [
            math.cos(4) + 3 / 8 * math.sin(4) - math.sin(12) / 8,
            -math.sin(4) + 3 / 8 * (math.cos(4) - math.cos(12)),
        ]
    )
    for n in (16, 32) if pair.order > 5 else (128, 256):
        h, y = 4 / n, tensor([1.0, 0.0])
        for i in range(n):
            k = [f(i * h, y)]
            for c, a in zip(pair.C, pair.A, strict=True):
                k.append(f((i + c) * h, y + h * sum(w * v for w, v in zip(a, k, strict=True))))
            y = y + h * sum(w * v for w, v in zip(pair.B, k, strict=True))
        errors.append(float((y - want).norm()))
    assert order(errors)[0] == pytest.approx(pair.order, abs=0.15)


def solve(rates, size, u1=3.0, start=1.0, **more):
    """y' = rate y for each row, size copies of it; (relative errors, calls)."""
    rates, calls = torch.tensor(rates, dtype=F64), 0

    def rhs(u, y):
        nonlocal calls
        calls += 1
        return rates[:, None] * y

    y = solve_each(rhs, torch.full((len(rates), size), start, dtype=F64), 0.0, u1, **more)[0]
    return (y / (start * torch.exp(rates * u1))[:, None] - 1).abs().amax(1), calls


@EVERY
def test_tighter_tolerance_less_error_at_the_price_of_its_order(name):
    """Error falls with the tolerance; with step h ~ tol^(1/rate) a factor 10^4 costs a factor 10^(4/rate)."""
    pair = PAIRS[name]
    loose, few = solve([-2.0], 1, rtol=1e-6, atol=1e-6, pair=pair, u1=9.0)
    tight, many = solve([-2.0], 1, rtol=1e-10, atol=1e-10, pair=pair, u1=9.0)
    assert loose * math.exp(-18) < 1e-6
    assert tight * math.exp(-18) < 1e-10
    assert 0.6 < (many - 1) / (few - 1) / 10 ** (4 / pair.rate) < 1.5


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "tsit5"])
def test_inside_a_step(name):
    """Hermite's cubic at the nodes, each row at its own times; all nodes, in either direction."""
    nodes = torch.linspace(0.05, 1.95, 40, dtype=F64)
    for u, u1 in ((0.0, 2.0), (2.0, 0.0)):
        errors = []
        for tol in (1e-3, 1e-6, 1e-9):
            start = tensor([[math.cos(r * u), -math.sin(r * u)] for r in (1.0, 3.0)])
            rates = tensor([[1.0], [3.0]])

            def rhs(u, y, rates=rates):
                return rates * torch.stack([y[:, 1], -y[:, 0]], 1)

            _, at = solve_each(rhs, start, u, u1, pair=PAIRS[name], rtol=tol, atol=tol, nodes=nodes)
            want = torch.stack([torch.cos(nodes[:, None] * rates[:, 0]), -torch.sin(nodes[:, None] * rates[:, 0])], 2)
            errors.append(float((at - want).abs().max()))
        assert errors[-1] < 1e-3 * errors[0]
        assert errors[-1] < 1e-6


def test_a_scale_divides_the_error():
    """What is allowed is multiplied by scale: a thousandth costs as much as a tolerance of a thousandth."""
    plain = [solve([-1.0, -2.0], 1, rtol=0.0, atol=tol)[1] for tol in (1e-3, 1e-6)]
    scaled = solve([-1.0, -2.0], 1, rtol=0.0, atol=1e-3, scale=lambda u, y, dy: torch.full((2,), 1e-3, dtype=F64))[1]
    assert plain[0] < plain[1] == scaled


@EVERY
def test_the_error_of_a_step(name):
    """Hairer's estimate by hand, row by row; what is ten times as much allowed counts a tenth."""
    pair = PAIRS[name]
    k = list(Streams(3, 4)(torch.empty(4, len(pair.E), 5, dtype=F64)).unbind(1))
    dy, allowed = tensor([0.1, 0.2, 0.3, 0.4])[:, None], 0.01 * torch.ones(4, 5, dtype=F64)
    got = _error(pair, dy, k, allowed)
    stack = torch.stack(k, 1)  # (4, stages, 5)

    def size(weights):
        return ((dy * torch.einsum("i,bid->bd", tensor(weights), stack) / allowed) ** 2).mean(1).sqrt()

    e5 = size(pair.E)
    torch.testing.assert_close(got, e5**2 / torch.hypot(e5, size(pair.E3) / 10) if pair.E3 else e5)
    torch.testing.assert_close(_error(pair, dy, k, 10 * allowed), got / 10)

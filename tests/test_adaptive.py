"""Embedded pairs: their order conditions, and equations whose solutions are known: error, calls, rows apart."""

import itertools
import math

import pytest
import torch
import torchdiffeq
from truth import F64, gaussian_score, order, tensor

from samplers import ode
from scoresde import EDM, VP, Streams, counted, flow, mixture
from scoresde.adaptive import PAIRS, _error, power, rows_of, rowwise, solve_each

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


def test_relative_tolerance_follows_the_size_of_the_state():
    """With atol = 0 in effect, a state 10^8 times as large takes the same steps and has the same relative error."""
    one, calls = solve([1.0], 1, rtol=1e-7, atol=1e-30)
    large, same = solve([1.0], 1, start=1e8, rtol=1e-7, atol=1e-30)
    assert calls == same
    assert float(large) == pytest.approx(float(one), rel=1e-3)
    assert 1e-12 < float(one) < 1e-7


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

    y = solve_each(rhs, torch.zeros(1, 1, dtype=F64), 0.0, 3.0, rtol=1e-7, atol=1e-7)[0]
    L = 500.0  # y = (L^2 cos u + L sin u)/(1 + L^2), the transient has died
    assert float(y) == pytest.approx((L**2 * math.cos(3) + L * math.sin(3)) / (1 + L**2), abs=1e-7)


def test_both_directions():
    y = solve_each(lambda u, y: -y, torch.ones(1, 1, dtype=F64), 2.0, 0.0, rtol=1e-9, atol=1e-9)[0]
    assert float(y) == pytest.approx(math.exp(2), rel=1e-8)


def test_arrived_rows_leave():
    """Each row is evaluated 6 times for each of its own steps, and once: less than the batch held to the end."""
    rates, seen = tensor([-30.0, -0.5, -8.0]), []

    def field(index):
        def rhs(u, y):
            seen.extend(index.tolist())
            return rates[index][:, None] * y

        return rhs

    whole = torch.arange(3)
    y = tensor([[1.0, 2.0], [-1.0, 0.5], [3.0, 3.0]])
    out = solve_each(field(whole), y, 0.0, 3.0, rtol=1e-6, atol=1e-6, rows=field)[0]
    cost = [seen.count(i) for i in range(3)]
    seen.clear()
    stay = solve_each(field(whole), y, 0.0, 3.0, rtol=1e-6, atol=1e-6)[0]
    assert torch.equal(out, stay)
    assert [seen.count(i) for i in range(3)] == [max(cost)] * 3
    for i in range(3):
        seen.clear()
        alone = solve_each(field(torch.tensor([i])), y[i : i + 1], 0.0, 3.0, rtol=1e-6, atol=1e-6)[0]
        assert torch.equal(alone[0], out[i])
        assert len(seen) == cost[i]
    assert cost[1] < cost[2] < cost[0]


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
@pytest.mark.parametrize("method", ["each", "each:dopri5"])
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


def problem(D, seed, sde):
    """5 or 8 narrow modes about 0.5 apart, and 64 starts from the prior."""
    g = torch.Generator().manual_seed(seed)
    if D == 2:
        means = torch.randn(5, 2, generator=g, dtype=F64)
        target = mixture(torch.ones(5, dtype=F64), 0.5 * means / means.std(), var=tensor(0.01, 0.02, 0.03, 0.005, 0.01))
    else:
        means = torch.randn(8, D, generator=g, dtype=F64)
        target = mixture(torch.ones(8, dtype=F64), 0.45 * means, var=torch.full((8,), 0.05, dtype=F64))
    return target.score(sde), sde.prior_std * torch.randn(64, D, generator=g, dtype=F64)


def in_log_ratio(score, sde):
    """The flow as it is usually given to torchdiffeq: z = x/R over u = log(sigma/alpha)."""

    def rhs(u, z):
        t = sde.time(-u)
        a, s = sde.alpha(t), sde.sigma(t)
        R = (a**2 + s**2) ** 0.5
        return -(s**2) / R * (score(z * R, t) + z / R)

    return rhs


@pytest.mark.parametrize(("D", "seed", "sde"), [(2, 0, VP()), (2, 1, EDM()), (64, 1, VP()), (64, 5, VP())])
def test_worst_sample_within_the_tolerance_at_no_more_calls_than_torchdiffeq(D, seed, sde):
    """rtol = atol = tol from 1e-3 to 1e-7.  Error: the largest over 64 samples of the RMS over coordinates of
    |x - exact| at t_end, against tol.  Evaluations per sample and batched calls against those of torchdiffeq's dopri5
    with its default norm, whose worst sample misses tol by 8 to 100."""
    score, x = problem(D, seed, sde)
    end = 1e-3 if isinstance(sde, VP) else sde.t_min
    want = flow(rowwise(score), sde, x, sde.T, end, rtol=1e-12, atol=1e-12, method="each:dop853")
    t = tensor(sde.T, end)
    R = (sde.alpha(t) ** 2 + sde.sigma(t) ** 2).sqrt()
    for tol in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        ours, theirs = counted(score), counted(score)
        got = flow(rowwise(ours), sde, x, sde.T, end, rtol=tol, atol=tol)
        assert worst(got, want) < tol
        options = {"step_t": -sde.lam(t[1:])}
        z = torchdiffeq.odeint(
            in_log_ratio(theirs, sde), x / R[0], -sde.lam(t), method="dopri5", rtol=tol, atol=tol, options=options
        )
        assert worst(z[-1] * R[1], want) > 8 * tol
        assert ours.samples / 64 <= 0.8 * theirs.calls
        assert ours.calls <= theirs.calls


def worst(x, want):
    return float((x - want).square().mean(1).sqrt().max())


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


def test_powers_do_not_see_each_other():
    """To the bit, any part of a tensor alone; torch.pow fails this."""
    e = 10 ** (4 * torch.rand(257, generator=torch.Generator().manual_seed(0), dtype=F64) - 3)
    for p in (-0.14, 0.08, 1 / 3):
        whole = power(e, p)
        torch.testing.assert_close(whole, e**p, rtol=1e-14, atol=0)
        assert all(torch.equal(power(e[i : i + n].clone(), p), whole[i : i + n]) for n in (1, 3, 8) for i in range(250))


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

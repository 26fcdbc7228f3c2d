"""The adaptive SDE solver: law, order, path, controller, and one sample as in a batch."""

import itertools
import math

import pytest
import torch
from truth import (
    F64,
    MEAN,
    SDES,
    VAR,
    Draws,
    gaussian_score,
    log_snr_grid,
    marginal,
    moments,
    order,
    tensor,
    warped_grid,
)

from samplers import adaptive_sde
from samplers.adaptive_sde import gotta_go_fast
from scoresde import EDM, VE, VP, Streams, SubVP, counted, mixture, prior_sample

WHOLE = {"rtol": math.inf}


def start(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE()], ids=lambda s: type(s).__name__)
def test_whole_steps_have_weak_order_2(sde):
    errors = []
    for n in (64, 128):
        ts = warped_grid(sde, n)
        m, v = moments(gotta_go_fast, sde, ts, **WHOLE)
        m1, v1 = marginal(sde, ts[-1])
        errors.append(((m - m1) ** 2 / v1 + (v / v1 - 1) ** 2).sqrt().item())
    assert order(errors)[0] == pytest.approx(2, abs=0.15), errors


@pytest.mark.parametrize("name", SDES)
def test_a_whole_step_by_hand(name):
    """In x and t from the definitions: y = x/R, F = (sigma^2/R)(2 s + y/R), q = sqrt(2) sigma/R, one z."""
    sde = SDES[name]
    ts = log_snr_grid(sde, 6)[2:4]
    (a, a1), (s, s1) = sde.alpha(ts).tolist(), sde.sigma(ts).tolist()
    R, R1, h = math.hypot(a, s), math.hypot(a1, s1), math.log(s / a) - math.log(s1 / a1)
    x, z = 0.4, -0.7
    score = lambda x, a, s: (a * MEAN - x) / (a * a * VAR + s * s)  # noqa: E731
    F = lambda y, a, s, R: s * s / R * (2 * score(y * R, a, s) + y / R)  # noqa: E731
    q, q1 = 2**0.5 * s / R, 2**0.5 * s1 / R1
    y, w = x / R, h**0.5 * z
    euler = y + h * F(y, a, s, R) + q * w
    want = R1 * (euler + y + h * F(euler, a1, s1, R1) + q1 * w) / 2
    got = gotta_go_fast(gaussian_score(sde), sde, tensor([[x]]), ts, noise=lambda x: 0 * x + z, **WHOLE)
    assert got.item() == pytest.approx(want, rel=1e-9)


def test_both_tolerances_can_ask_for_whole_steps():
    sde, ts, x = VP(), log_snr_grid(VP(), 5), start(2, 3)
    a, b = (
        gotta_go_fast(gaussian_score(sde), sde, x, ts, noise=Streams(0, 2), **{name: math.inf})
        for name in ("rtol", "atol")
    )
    assert torch.equal(a, b)
    score = counted(gaussian_score(sde))
    gotta_go_fast(score, sde, x, ts, **WHOLE)
    assert score.calls == 2 * 5


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "Straight", "EDM"])
def test_the_law_tends_to_the_truth(name):
    """N(MEAN, VAR) data, 4000 numbers: mean and variance within 3.5 standard errors; a loose tolerance is seen."""
    sde = SDES[name]
    x = prior_sample(sde, torch.empty(40, 100, dtype=F64), Streams(0, 40))
    m, v = (c.item() for c in marginal(sde, sde.t_min))

    def law(tol):
        out = gotta_go_fast(
            gaussian_score(sde), sde, x, tensor(sde.T, sde.t_min), rtol=tol, atol=tol / 3, noise=Streams(1, 40)
        )
        return (out.mean().item() - m) / v**0.5, out.var().item() / v - 1

    mean, var = law(0.04)
    assert abs(mean) < 3.5 * 4000**-0.5
    assert abs(var) < 3.5 * (2 / 4000) ** 0.5
    assert law(1.0)[1] < -0.1


def test_a_mixture_in_two_dimensions():
    """0.3/0.7 weights and both widths, 500 samples, within 3.5 standard errors."""
    target = mixture(tensor(0.3, 0.7), tensor([[-2.0, 1.0], [1.0, 0.0]]), var=tensor(0.1, 0.05))
    sde, B = VP(), 500
    x = prior_sample(sde, torch.empty(B, 2, dtype=F64), Streams(2, B))
    out = gotta_go_fast(target.score(sde), sde, x, tensor(1.0, 1e-3), rtol=0.1, atol=0.05, noise=Streams(3, B))
    left = out[:, 0] < -0.6
    assert left.double().mean().item() == pytest.approx(0.3, abs=3.5 * (0.21 / B) ** 0.5)
    for part, mean, var in ((out[left], (-2.0, 1.0), 0.1), (out[~left], (1.0, 0.0), 0.05)):
        n = len(part)
        assert part.mean(0).tolist() == pytest.approx(mean, abs=3.5 * (var / n) ** 0.5)
        assert part.var(0).mean().item() == pytest.approx(var, rel=3.5 / n**0.5)


def path_increments(z, i, span, level):
    """The increments of the path over 2^level parts of a step, from the module's own bridges."""
    rows = []
    for row in z.flatten(1):
        ahead, stream, parts = [(0, 0, span**0.5 * row)], adaptive_sde._stream(row, i), []
        while ahead:
            assert adaptive_sde._halve(ahead, span, span / 2**level, stream)
            parts.append(ahead.pop()[2])
        rows.append(torch.stack(parts))
    return torch.stack(rows, 1)  # (2^level, B, D)


def test_all_tolerances_solve_one_path():
    """The solution tends to the fixed-step one on the same path, at any acceptance history: nothing is drawn anew."""
    sde, z = VP(), start(4, 3)
    target = mixture(tensor(0.3, 0.7), tensor([[-1.0, 0.5, 0.0], [1.0, 0.0, 0.2]]), var=tensor(0.3, 0.2)).score(sde)
    ts = log_snr_grid(sde, 1, 0.9, 0.01)
    x = start(4, 3, seed=1)
    fine = log_snr_grid(sde, 2**11, 0.9, 0.01)
    span = float(sde.lam(ts[1]) - sde.lam(ts[0]))
    parts = iter(path_increments(z, 0, span, 11) / (span / 2**11) ** 0.5)
    want = gotta_go_fast(target, sde, x, fine, noise=lambda x: next(parts), **WHOLE)
    tols = (0.3, 0.1, 0.03, 0.01)
    errors = []
    for tol in tols:
        out = gotta_go_fast(target, sde, x, ts, rtol=tol, atol=tol / 2, noise=lambda x: z)
        errors.append((out - want).square().mean().sqrt().item())
    assert all(b < 0.7 * a for a, b in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.01, errors


def test_the_bridges_have_the_law_of_the_path():
    """Each draw a basis vector: the parts of a halved increment are exactly orthogonal, of variance h, and add up."""
    count = itertools.count(1)

    def draw(node, D):
        return torch.eye(D, dtype=F64)[next(count)].numpy()

    span, dw = 3.0, torch.zeros(64, dtype=F64).index_fill_(0, torch.tensor([0]), 3.0**0.5)
    ahead, parts, lengths = [(0, 0, dw)], [], []
    for wanted in [0.2] * 5 + [1.0] * 40:  # small steps, then larger ones
        if ahead:
            assert adaptive_sde._halve(ahead, span, wanted, draw)
            level, place, part = ahead.pop()
            assert span / 2**level <= wanted
            assert place / 2**level * span == pytest.approx(sum(lengths))
            lengths.append(span / 2**level)
            parts.append(part)
    parts = torch.stack(parts)
    assert not ahead
    assert max(lengths) >= 4 * min(lengths)
    torch.testing.assert_close(parts @ parts.T, torch.diag(tensor(lengths)), rtol=0, atol=1e-12)
    torch.testing.assert_close(parts.sum(0), dw, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spike", [0, 1e3])
def test_the_controller(spike):
    """Every attempt of a run, read off what the score was asked, against the rules of the docstring.

    With a spike of the score before the middle of the run: steps shrink, and grow again, as fast as they may.
    """
    sde, rtol, atol, asked = EDM(T=20.0, t_min=0.05), 0.05, 0.02, []

    def score(x, t):
        s = gaussian_score(sde)(x, t) * (1 + spike * torch.exp(-(((torch.log(t) - 0.05) / 0.01) ** 2)))
        asked.append((x[0] / (1 + t**2) ** 0.5, math.log(t), s[0]))
        return s

    x = 20 * start(1, 3)
    out = gotta_go_fast(score, sde, x, tensor(20.0, 0.05), rtol=rtol, atol=atol, noise=Streams(5, 1))
    asked.append((out[0] / (1 + 0.05**2) ** 0.5, math.log(0.05), None))
    F = lambda y, u, s: math.exp(2 * u) / math.hypot(1, math.exp(u)) * (2 * s + y / math.hypot(1, math.exp(u)))  # noqa: E731
    q = lambda u: (2 / (1 + math.exp(-2 * u))) ** 0.5  # noqa: E731
    span, before, wanted = math.log(400), asked[0][0], 0.25
    (y, u, s), k = asked[0], 1
    accepted = rejected = 0
    while k < len(asked) - 1:
        euler, u1, s1 = asked[k]
        h = u - u1
        assert math.log2(span / h) == pytest.approx(round(math.log2(span / h)), abs=1e-6)  # a dyadic part,
        assert h <= wanted * (1 + 1e-6)  # not longer than wanted,
        place = (math.log(20) - u) / h
        assert place == pytest.approx(round(place), abs=1e-3)
        assert 2 * h > wanted or round(place) % 2 or h > span * 0.99  # and the largest there is
        w = (euler - y - h * F(y, u, s)) / q(u)
        improved = (euler + y + h * F(euler, u1, s1) + q(u1) * w) / 2
        delta = (rtol * torch.maximum(euler.abs(), before.abs())).clamp(min=atol)
        E = ((euler - improved) / delta).square().mean().sqrt().item()
        wanted = h * max(0.9 * E**-0.9, 0.05)
        if E <= 1:
            accepted += 1
            before = euler
            (y, u, s), k = asked[k + 1], k + 2
            torch.testing.assert_close(y, improved, rtol=1e-12, atol=1e-12)
            assert u == pytest.approx(u1, abs=1e-13)
        else:
            rejected += 1
            k += 1  # F(y, u) is known
    assert accepted > 20
    assert rejected > 3


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("D", [2, 48, 500])
def test_a_sample_alone_is_the_same_as_in_a_batch(dtype, D):
    """To the bit, adaptive steps and a grid between whose points the samples wait for each other."""
    sde, x = VP(), start(5, D).to(dtype)
    ts = tensor(0.9, 0.5, 0.1)
    target = mixture(tensor(0.3, 0.7), torch.stack([-torch.ones(D), torch.ones(D)]), var=tensor(0.3, 0.1))

    def score(x, t):  # row by row: no product of matrices
        return torch.cat([target.score(sde)(x[b : b + 1], t[b]) for b in range(len(x))])

    whole = gotta_go_fast(score, sde, x, ts, rtol=0.1, noise=Streams(7, 5))
    assert whole.dtype == dtype
    for first, last in ((0, 1), (3, 4), (1, 5)):
        part = gotta_go_fast(score, sde, x[first:last], ts, rtol=0.1, noise=Streams(7, range(first, last)))
        assert torch.equal(part, whole[first:last])


def test_samples_take_their_own_steps():
    """A hard sample needs more attempts than an easy one, and the easy one waits where it has ended."""
    sde, times = EDM(T=20.0, t_min=0.05), []

    def score(x, t):
        times.append(t)
        return gaussian_score(sde, tensor([[0.0], [0.0]]), tensor([[1.0], [0.003]]))(x, t)

    gotta_go_fast(score, sde, 20 * start(2, 1), tensor(20.0, 0.05), noise=Streams(0, 2))
    times = torch.stack(times)
    assert times.shape[1:] == (2,)
    ended = times < 0.05 * (1 + 1e-13)
    assert ended[-1].all()
    assert ended[-3].sum() == 1
    assert (times <= 20 * (1 + 1e-9)).all()
    assert (times >= 0.05 * (1 - 1e-9)).all()


def test_hooks_and_noise_once_a_step():
    sde, ts, seen = VP(), log_snr_grid(VP(), 3), []
    draws = Draws(lambda i, x: torch.full_like(x, 0.1 * i))
    out = gotta_go_fast(
        gaussian_score(sde), sde, start(2, 3), ts, noise=draws, on_step=lambda i, t, x: seen.append((i, float(t), x))
    )
    assert [(i, t) for i, t, _ in seen] == [(i, float(ts[i + 1])) for i in range(3)]
    assert torch.equal(seen[-1][2], out)
    assert draws.n == 3


def test_gradient():
    """Through adaptive steps, which are constants for it, against differences."""
    sde, ts = VP(), tensor(0.6, 0.2)
    x = start(1, 2).requires_grad_()

    def value(x, grad=True):
        return (gotta_go_fast(gaussian_score(sde), sde, x, ts, noise=Streams(1, 1), grad=grad) ** 2).sum()

    (got,) = torch.autograd.grad(value(x), x)
    for i in range(2):
        e = torch.zeros(1, 2, dtype=F64)
        e[0, i] = 1e-6
        want = (value(x.detach() + e) - value(x.detach() - e)) / 2e-6
        assert got[0, i].item() == pytest.approx(want.item(), rel=1e-5)
    assert not value(x, grad=False).requires_grad


def test_errors():
    sde, x, ts = VP(), torch.ones(2, 2, dtype=F64), tensor(0.9, 0.1)
    for knobs, match in (
        ({"rtol": -0.1}, "rtol must be >= 0 and atol > 0, got -0.1"),
        ({"atol": 0.0}, "got 0.02 and 0.0;"),
    ):
        with pytest.raises(ValueError, match=match):
            gotta_go_fast(gaussian_score(sde), sde, x, ts, **knobs)
    with pytest.raises(ValueError, match=r"ts ends at t = 0.*sde.t_min"):
        gotta_go_fast(gaussian_score(sde), sde, x, tensor(0.9, 0.0))

    def broken(x, t):
        return torch.where(like_rows(t, x) < 0.5, math.nan, gaussian_score(sde)(x, t))

    with pytest.raises(FloatingPointError, match=r"sample [01] needs steps below 2\^-40.*t = 0.9 to 0.1.*not finite"):
        gotta_go_fast(broken, sde, x, ts)


def like_rows(t, x):
    return t.reshape(-1, 1).expand(len(x), x.shape[1])

"""Restart: exact moments, order, calls and the plan of a run."""

import math
from functools import partial

import pytest
import torch
from truth import (
    F64,
    MEAN,
    SDES,
    VAR,
    Draws,
    gaussian_map,
    gaussian_score,
    log_snr_grid,
    marginal,
    moments,
    order,
    tensor,
    warped_grid,
)

from samplers import ddim, heun
from samplers.restart import restart
from scoresde import EDM, VE, VP, Streams, SubVP, counted

EVERY_SDE = pytest.mark.parametrize("name", SDES)


def ratio(sde, ts, *points):
    return [(sde.sigma(ts[k]) / sde.alpha(ts[k])).item() for k in points]


def exact_flow(score, sde, x, ts, *, noise, on_step, grad):
    """A sampler without error, for N(MEAN, VAR) data."""
    return gaussian_map(sde, x, ts[0], ts[-1])


@EVERY_SDE
def test_marginals_are_exact_if_the_sampler_is(name):
    """The forward kernel takes the marginal at t_min to the one at t_max: no bias at all remains."""
    sde = SDES[name]
    ts = log_snr_grid(sde, 24)
    a, b, c, d = ratio(sde, ts, 20, 15, 12, 4)
    intervals = [(a, b, 3), (c, d, 2)]
    m, v = moments(partial(restart, intervals=intervals, sampler=exact_flow), sde, ts, MEAN, VAR)
    want = marginal(sde, ts[-1])
    assert m.item() == pytest.approx(want[0].item(), rel=1e-9)
    assert v.item() == pytest.approx(want[1].item(), rel=1e-7)


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(("sampler", "p"), [(ddim, 1), (heun, 2)])
def test_the_order_is_the_samplers(sde, sampler, p):
    errors = []
    for n in (64, 128):
        ts = warped_grid(sde, n)
        low, high, low2, high2 = ratio(sde, ts, 3 * n // 4, n // 2, n // 4, n // 8)
        run = partial(restart, intervals=[(low, high, 2), (low2, high2, 1)], sampler=sampler)
        m, v = moments(run, sde, ts)
        m1, v1 = marginal(sde, ts[-1])
        errors.append(((m - m1) ** 2 / v1 + (v / v1 - 1) ** 2).sqrt().item())
    assert order(errors)[0] == pytest.approx(p, abs=0.15), errors


def test_restarts_forget():
    """Each restart shrinks what is left of the start by d x1/d x = (sd_min/sd_max)(alpha_max/alpha_min), K times."""
    sde = EDM()
    ts = log_snr_grid(sde, 40)
    low, high = ratio(sde, ts, 32, 16)
    x = tensor([[0.0], [1.0]]) * 80

    def left(K):
        out = restart(
            gaussian_score(sde), sde, x, ts, intervals=[(low, high, K)], sampler=exact_flow, noise=torch.zeros_like
        )
        return (out[1] - out[0]).item()

    shrink = ((VAR + low**2) / (VAR + high**2)) ** 0.5
    for K in (1, 2, 5):
        assert left(K) / left(0) == pytest.approx(shrink**K, rel=1e-9)


@pytest.mark.parametrize("intervals", [(), [(0.1, 1.0, 0)], [(0.1, 1.0, 0), (2.0, 9.0, 0)]])
@pytest.mark.parametrize("sampler", [heun, ddim])
def test_without_restarts_it_is_the_sampler(intervals, sampler):
    sde, x = VP(), torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    ts = log_snr_grid(sde, 9)
    plain = sampler(gaussian_score(sde), sde, x, ts)
    draws = Draws(lambda i, x: torch.zeros_like(x))
    got = restart(gaussian_score(sde), sde, x, ts, intervals=intervals, sampler=sampler, noise=draws)
    assert torch.equal(got, plain)
    assert draws.n == 0


def test_the_run_step_by_step():
    """Where the score is asked, which steps hooks see, how often noise is drawn, and what a restart adds."""
    sde, x = EDM(T=10.0), torch.ones(1, 2, dtype=F64)
    ts = tensor(10.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.0)
    asked, seen = [], []

    def score(x, t):
        asked.append(float(t))
        return gaussian_score(sde)(x, t)

    draws = Draws(lambda i, x: torch.full_like(x, float(i + 1)))
    out = restart(
        score, sde, x, ts, intervals=[(0.9, 2.1, 2), (3.9, 8.3, 1)], sampler=ddim, noise=draws,
        on_step=lambda i, t, x: seen.append((i, float(t), x.clone())),
    )  # fmt: skip
    assert asked == [10, 8, 6, 8, 6, 4, 2, 2, 2, 1, 0.5]
    assert [(i, t) for i, t, _ in seen] == [
        (0, 8), (1, 6), (2, 4), (1, 6), (2, 4), (3, 2), (4, 1), (4, 1), (4, 1), (5, 0.5), (6, 0)
    ]  # fmt: skip
    assert draws.n == 3
    torch.testing.assert_close(out, seen[-1][2], rtol=0, atol=0)
    x = seen[2][2] + math.sqrt(8**2 - 4**2)  # by hand: from 4 up to 8 with z = 1
    torch.testing.assert_close(ddim(gaussian_score(sde), sde, x, ts[1:3]), seen[3][2], rtol=1e-12, atol=0)
    x = seen[7][2] + 3 * math.sqrt(2**2 - 1**2)  # from 1 up to 2 with z = 3
    torch.testing.assert_close(ddim(gaussian_score(sde), sde, x, ts[4:6]), seen[8][2], rtol=1e-12, atol=0)


def test_the_kernel_up_is_the_forward_one():
    """From t_min to t_max of a process with drift: mean alpha ratio, variance sigma_max^2 - ratio^2 sigma_min^2."""
    sde = SubVP()
    ts = tensor(0.9, 0.6, 0.3)
    low, high = ratio(sde, ts, 2, 1)
    still = lambda score, sde, x, ts, *, noise, on_step, grad: x  # noqa: E731  a sampler that does nothing
    knobs = {"intervals": [(low, high, 1)], "sampler": still}
    a, s = sde.alpha(ts), sde.sigma(ts)
    x = torch.ones(1, 1, dtype=F64)
    kept = restart(None, sde, x, ts, noise=torch.zeros_like, **knobs).item()
    assert kept == pytest.approx((a[1] / a[2]).item(), rel=1e-12)
    added = restart(None, sde, 0 * x, ts, noise=torch.ones_like, **knobs).item()
    assert added**2 == pytest.approx((s[1] ** 2 - kept**2 * s[2] ** 2).item(), rel=1e-9)


@pytest.mark.parametrize(("sampler", "calls"), [(heun, 2), (ddim, 1)])
def test_network_calls(sampler, calls):
    sde, N = VP(), 20
    ts, score = log_snr_grid(sde, N), counted(gaussian_score(sde))
    low, high, low2, high2 = ratio(sde, ts, 18, 11, 9, 4)
    restart(score, sde, torch.ones(2, 3, dtype=F64), ts, intervals=[(low, high, 3), (low2, high2, 2)], sampler=sampler)
    assert score.calls == calls * (N + 3 * 7 + 2 * 5)


def test_a_sampler_with_knobs_keeps_them():
    sde, x = VP(), torch.ones(2, 3, dtype=F64)
    ts = log_snr_grid(sde, 8)
    knobs = {"noise": Streams(0, 2)}
    want = ddim(gaussian_score(sde), sde, x, ts, eta=0.5, **knobs)
    knobs = {"noise": Streams(0, 2)}
    got = restart(gaussian_score(sde), sde, x, ts, sampler=partial(ddim, eta=0.5), **knobs)
    assert torch.equal(got, want)


def test_gradients_flow_through_the_restarts():
    sde = VP()
    ts = log_snr_grid(sde, 8)
    x = torch.ones(1, 1, dtype=F64, requires_grad=True)
    low, high = ratio(sde, ts, 7, 3)
    knobs = {"intervals": [(low, high, 2)], "noise": torch.zeros_like}
    out = restart(gaussian_score(sde), sde, x, ts, grad=True, **knobs)
    got = torch.autograd.grad(out, x)[0].item()
    shift = restart(gaussian_score(sde), sde, x.detach() + 1, ts, **knobs) - out
    assert got == pytest.approx(shift.item(), rel=1e-9)  # affine
    assert not restart(gaussian_score(sde), sde, x, ts, **knobs).requires_grad


def test_errors():
    sde, x = EDM(), torch.ones(1, 1, dtype=F64)
    ts = tensor(80.0, 10.0, 1.0, 0.1)
    for interval, match in (
        ((1.0, 0.5, 1), r"0 < r_min < r_max and K >= 0, got \(1.0, 0.5, 1\)"),
        ((0.0, 0.5, 1), "got"),
        ((0.5, math.inf, 1), "got"),
        ((0.5, 1.0, -1), "got"),
        ((0.05, 1.0, 1), r"from sigma/alpha = 0.05 to 1 must lie within the grid's, 0.1 to 80"),
        ((0.5, 100.0, 1), "to 100 must lie within"),
        ((0.9, 1.1, 1), "both are nearest to 1; take a finer grid or a wider interval"),
    ):
        with pytest.raises(ValueError, match=match):
            restart(gaussian_score(sde), sde, x, ts, intervals=[interval])
    with pytest.raises(ValueError, match="ts must decrease"):
        restart(gaussian_score(sde), sde, x, ts.flip(0))

"""The weights of exponential integrators against quadrature and closed forms."""

import itertools
import math

import mpmath as mp
import pytest
import torch
from truth import F64, SDES, tensor
from variables import INF, VARIABLES, points, u_of

from samplers.exponential import Form, level, log_snr, nodes, scale, weights
from scoresde import VP


@mp.workdps(20)
def by_quadrature(d, name, r, r1, known, tau):
    """(a, b, c) from the formula, 50 digits; alpha1 = 1/sqrt(1 + r1^2) for VP."""
    r, r1, tau, known = mp.mpf(r), mp.mpf(r1), mp.mpf(tau), [mp.mpf(k) for k in known]
    q = tau**2

    def span(s):
        return mp.mpf(1) if d == INF else mp.sqrt(mp.mpf(d) ** 2 + s**2)

    def alpha(s):
        return 1 / mp.sqrt(1 + s**2)

    rho, rho1 = alpha(r) * span(r), alpha(r1) * span(r1)
    E = mp.mpf(1) if d == INF else (span(r1) / span(r)) ** q
    uj = [u_of(name, k) for k in known]
    cuts = [r] + [c for c in (mp.mpf(10) ** k for k in range(4, -7, -1)) if r1 < c < r] + [r1]
    b = []
    for j in range(len(known)):

        def f(s, j=j):
            us = u_of(name, s)
            L = mp.mpf(1)
            for k in range(len(known)):
                L *= (us - uj[k]) / (uj[j] - uj[k]) if k != j else 1
            return (1 if d == INF else (span(r1) / span(s)) ** q) * L / span(s) ** 2

        b.append(rho1 * (1 + q) * sum(mp.quad(f, [lo, hi]) for hi, lo in itertools.pairwise(cuts)))
    c = rho1 * tau * mp.sqrt(r**2 - r1**2) if d == INF else rho1 * mp.sqrt(1 - E**2)
    return rho1 / rho * E, b, c


def compare(d, name, levels, tau, rtol=1e-11):
    """weights of the step from levels[0] to levels[-1] through values at all but the last level."""
    at = nodes(Form(d, VARIABLES[name]), VP(), points(*levels))
    K = len(levels) - 1
    a, b, c = weights(at, tensor([0]).long(), tensor([K]).long(), torch.arange(K)[None], tau)
    want_a, want_b, want_c = by_quadrature(d, name, levels[0], levels[-1], levels[:-1], tau)
    size = max(abs(float(w)) for w in want_b)
    assert a.item() == pytest.approx(float(want_a), rel=rtol)
    assert c.item() == pytest.approx(float(want_c), rel=rtol)
    assert b[0].tolist() == pytest.approx([float(w) for w in want_b], rel=rtol, abs=rtol * size)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("d", [0.0, 0.5, INF])
def test_weights_are_the_integrals(d, name, tau):
    """A short step (a part of it behind), and one over the whole range."""
    compare(d, name, (2.0, 3.1, 1.7, 1.2), tau)
    compare(d, name, (152.0, 0.0105), tau)
    if (d, name) != (0.0, "level"):  # a line in r meets x0's weight r^-2
        compare(d, name, (40.0, 152.0, 0.3), tau, 1e-10)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize(("d", "name"), [(0.5, "level"), (0.5, "bounded"), (0.5, "time"), (INF, "level")])
def test_weights_reach_zero(d, name, tau):
    """Where u and V go on to r = 0, so does the polynomial."""
    compare(d, name, (0.2, 0.5, 0.0), tau)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("d", [0.0, 0.5, INF])
def test_a_step_to_zero_uses_the_newest_value_alone(d, tau):
    """log r does not reach r = 0: the newest value carries the step, with all of the integral."""
    at = nodes(Form(d, log_snr), VP(), points(0.5, 0.2, 0.0))
    a, b, c = weights(at, tensor([1]).long(), tensor([2]).long(), tensor([[1, 0]]).long(), tau)
    want = (0.0, [1.0], 0.0) if d == 0 else by_quadrature(d, "level", 0.2, 0.0, (0.2,), tau)
    assert a.item() == pytest.approx(float(want[0]), rel=1e-12)
    assert b[0].tolist() == pytest.approx([float(want[1][0]), 0.0], rel=1e-12)
    assert c.item() == pytest.approx(float(want[2]), rel=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_closed_forms(tau):
    """One value: data prediction is exponential Euler, noise prediction DDIM's difference, v the angle's."""
    sde = SDES["SubVP"]
    t = tensor(0.8, 0.3)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    r, q = sigma / alpha, tau**2
    start, end, known = tensor([0]).long(), tensor([1]).long(), tensor([[0]]).long()
    a, b, c = weights(nodes(Form(0.0), sde, t), start, end, known, tau)
    h = torch.log(r[0] / r[1])
    assert a.item() == pytest.approx((sigma[1] / sigma[0] * torch.exp(-q * h)).item(), rel=1e-13)
    assert b.item() == pytest.approx((alpha[1] * -torch.expm1(-(1 + q) * h)).item(), rel=1e-12)
    assert c.item() == pytest.approx((sigma[1] * torch.sqrt(-torch.expm1(-2 * q * h))).item(), rel=1e-12)
    a, b, c = weights(nodes(Form(INF, level), sde, t), start, end, known, tau)
    assert a.item() == pytest.approx((alpha[1] / alpha[0]).item(), rel=1e-13)
    assert b.item() == pytest.approx((alpha[1] * (1 + q) * (r[0] - r[1])).item(), rel=1e-12)
    assert c.item() == pytest.approx((alpha[1] * tau * torch.sqrt(r[0] ** 2 - r[1] ** 2)).item(), rel=1e-12)
    if tau == 0:
        d = 0.7
        _, b, c = weights(nodes(Form(d, level), sde, t), start, end, known, tau)
        rho1 = alpha[1] * torch.sqrt(d**2 + r[1] ** 2)
        assert b.item() == pytest.approx((rho1 * (torch.atan(r[0] / d) - torch.atan(r[1] / d)) / d).item(), rel=1e-12)
        assert c.item() == 0


def test_many_steps_at_once_are_the_steps_one_by_one():
    """Also where one of them goes to r = 0, and with its own tau each."""
    at = nodes(Form(0.5, level), VP(), points(90.0, 4.0, 0.7, 0.02, 0.0))
    i, taus = torch.arange(1, 4), tensor(0.0, 0.7, 1.3)
    together = weights(at, i, i + 1, i[:, None] - torch.arange(2), taus)
    for k in range(3):
        alone = weights(at, i[k : k + 1], i[k : k + 1] + 1, (i[:, None] - torch.arange(2))[k : k + 1], taus[k])
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[k], y[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("d", [0.0, 0.4, INF])
def test_scale_is_the_change_to_v(d):
    """V = scale (x + q s) is x0, -eps, and v = (alpha eps' - sigma' x0)-like for the angle, from one x0 and eps."""
    sde = SDES["Straight"]
    t = tensor(0.9, 0.5, 0.1)
    alpha, sigma, x0, eps = sde.alpha(t), sde.sigma(t), 1.3, -0.4
    x, s = alpha * x0 + sigma * eps, -eps / sigma
    q, V = scale(nodes(Form(d, level), sde, t))
    m = s if d == INF else x + tensor(q) * s
    r = sigma / alpha
    want = {0.0: x0, INF: -eps}.get(d, (r * x0 - d**2 * eps) / torch.sqrt(d**2 + r**2))
    torch.testing.assert_close(V * m, torch.as_tensor(want, dtype=F64).expand(3), rtol=1e-12, atol=1e-12)
    assert [p is None for p in q] == [d == INF] * 3


@pytest.mark.parametrize("d", [-0.1, math.nan])
def test_scale_of_the_data_is_checked(d):
    with pytest.raises(ValueError, match="must be >= 0"):
        Form(d)

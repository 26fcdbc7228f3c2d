"""Time grids from their formulas, written out point by point."""

import math
from fractions import Fraction

import pytest
import torch
from truth import F64, SDES, tensor

from samplers import grids
from samplers.grids import exponential, karras, log_snr, perturb, quadratic, uniform
from scoresde import EDM

GRIDS = {"uniform": uniform, "quadratic": quadratic, "log_snr": log_snr, "karras": karras}
EVERY = pytest.mark.parametrize("grid", GRIDS)
EVERY_SDE = pytest.mark.parametrize("name", SDES)


def ratio(sde, t):
    return (sde.sigma(t) / sde.alpha(t)).item()


@EVERY
@EVERY_SDE
def test_formula(grid, name):
    """n + 1 points, exact ends, strictly decreasing, uniform in the right variable."""
    sde, n = SDES[name], 11
    for end in (sde.t_min, 0.1 * sde.T):
        ts = GRIDS[grid](sde, n) if end == sde.t_min else GRIDS[grid](sde, n, t_end=end)
        assert (len(ts), ts.dtype, ts.device.type) == (n + 1, F64, "cpu")
        assert (ts[0].item(), ts[-1].item()) == (sde.T, end)
        assert (ts.diff() < 0).all()
        R, e = ratio(sde, tensor(sde.T)), ratio(sde, tensor(end))
        for i, t in enumerate(ts):
            u = i / n
            if grid == "uniform":
                assert t.item() == pytest.approx(sde.T + u * (end - sde.T), rel=1e-12)
            elif grid == "quadratic":
                assert t.item() == pytest.approx((sde.T**0.5 + u * (end**0.5 - sde.T**0.5)) ** 2, rel=1e-12)
            elif grid == "log_snr":
                assert ratio(sde, t) == pytest.approx(R ** (1 - u) * e**u, rel=1e-8)
            else:
                assert ratio(sde, t) == pytest.approx((R ** (1 / 7) + u * (e ** (1 / 7) - R ** (1 / 7))) ** 7, rel=1e-8)


def test_karras_is_the_published_grid():
    """Karras 2022, eq. 5 with sigma 80 to 0.002, for EDM's own time."""
    ts = karras(EDM(), 17)
    for i in range(18):
        want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert ts[i].item() == pytest.approx(want, rel=1e-10)
    torch.testing.assert_close(karras(EDM(), 9, rho=1.0), uniform(EDM(), 9), rtol=1e-10, atol=0)
    torch.testing.assert_close(karras(EDM(), 9, rho=1e7), exponential(EDM(), 9), rtol=1e-5, atol=0)


def test_exponential_is_log_snr():
    assert grids.exponential is grids.log_snr


@EVERY
@EVERY_SDE
@pytest.mark.parametrize("n", [1, 2, 21])
def test_n_asked_is_n_run(grid, name, n):
    """Strength keeps the last n steps of a grid of n/strength: 30 for 21/0.7, whatever the floats say."""
    sde = SDES[name]
    for strength in (1.0, 0.5, 0.3, 0.7):
        for to_zero in (False, True):
            ts = GRIDS[grid](sde, n, strength=strength, to_zero=to_zero)
            whole = GRIDS[grid](sde, math.ceil(Fraction(n) / Fraction(str(strength))), to_zero=to_zero)
            assert len(ts) == n + 1
            assert (ts.diff() < 0).all()
            assert torch.equal(ts, whole[-(n + 1) :])
            if strength == 0.5:
                assert torch.equal(ts, whole[n:])
            if not (to_zero and n == 1):
                assert sde.t_min in ts


@EVERY
def test_to_zero_appends_zero(grid):
    """The last step goes from t_end to 0; the others are the grid of n - 1 steps."""
    sde = EDM()
    ts = GRIDS[grid](sde, 6, to_zero=True)
    assert torch.equal(ts[:-1], GRIDS[grid](sde, 5))
    assert ts[-1] == 0
    assert GRIDS[grid](sde, 1, to_zero=True).tolist() == [80.0, 0.0]


@EVERY_SDE
def test_perturb(name):
    """x = alpha x0 + sigma z, at one time or one for each sample, in the dtype of x0."""
    sde, x0, z = SDES[name], torch.ones(2, 3, 1, dtype=F64) * 2, torch.full((2, 3, 1), -0.5, dtype=F64)
    t = 0.3
    want = 2 * sde.alpha(tensor(t)) - 0.5 * sde.sigma(tensor(t))
    for time in (t, tensor(t), tensor(t, t)):
        got = perturb(sde, x0, time, lambda x: z)
        torch.testing.assert_close(got, want.expand(2, 3, 1))
        assert perturb(sde, x0.float(), time).dtype == torch.float32


@EVERY
def test_errors_name_value_and_cure(grid):
    sde, make = SDES["VP"], GRIDS[grid]
    for knobs, match in (
        ({"n": 0}, "n = 0"),
        ({"n": 5, "strength": 0.0}, r"strength.*\(0, 1\].*got 0"),
        ({"n": 5, "strength": 1.5}, "got 1.5"),
        ({"n": 5, "t_end": 0.0}, "got 0; for 0 use to_zero=True"),
        ({"n": 5, "t_end": 1.0}, r"T = 1\), got 1"),
        ({"n": 5, "t_end": -0.1}, "got -0.1"),
    ):
        with pytest.raises(ValueError, match=match):
            make(sde, **knobs)


def test_rho_must_be_positive():
    with pytest.raises(ValueError, match=r"got -7.*7 is Karras"):
        karras(EDM(), 5, rho=-7)

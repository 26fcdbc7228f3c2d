"""Time grids from their formulas, written out point by point."""

import math
from fractions import Fraction

import mpmath as mp
import pytest
import torch
from reference import load
from truth import F64, SDES, tensor

from samplers import grids
from samplers.grids import exponential, karras, log_snr, of_levels, of_times, perturb, quadratic, sections, uniform
from scoresde import EDM, VE, VP, CosineVP, DiscreteVP, Straight, cosine_betas, linear_betas

GRIDS = {
    "uniform": uniform,
    "quadratic": quadratic,
    "cosine": grids.cosine,
    "log_snr": log_snr,
    "polyexponential": grids.polyexponential,
    "karras": karras,
    "beta": grids.beta,
    "shifted": grids.shifted,
}
LABELS = {"linspace": grids.linspace, "leading": grids.leading, "trailing": grids.trailing}
EVERY = pytest.mark.parametrize("grid", GRIDS)
EVERY_LABELS = pytest.mark.parametrize("grid", LABELS)
EVERY_SDE = pytest.mark.parametrize("name", SDES)
TABLE = DiscreteVP.from_betas(linear_betas())


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
            elif grid == "polyexponential":
                assert ratio(sde, t) == pytest.approx(R ** (1 - u) * e**u, rel=1e-8)
                other = grids.polyexponential(sde, n, rho=1.7, t_end=end)[i]
                assert ratio(sde, other) == pytest.approx(e * (R / e) ** ((1 - u) ** 1.7), rel=1e-8)
            elif grid == "cosine":
                angle = math.atan(R) + u * (math.atan(e) - math.atan(R))
                assert math.atan(ratio(sde, t)) == pytest.approx(angle, rel=1e-8)
            elif grid == "beta":  # t is where the distribution function of Beta(0.6, 0.6) is 1 - u
                q = (t.item() - end) / (sde.T - end)
                below = mp.betainc(0.6, 0.6, 0, min(max(q, 0), 1), regularized=True)
                assert float(below) == pytest.approx(1 - u, abs=1e-9)
            elif grid == "shifted":  # v uniform, moved by Esser's formula
                v = [r / (1 + r) for r in (R, e)]
                v = [w / (w + 3 * (1 - w)) for w in v]  # before the shift
                w = v[0] + u * (v[1] - v[0])
                w = 3 * w / (1 + 2 * w)
                assert ratio(sde, t) / (1 + ratio(sde, t)) == pytest.approx(w, rel=1e-8)
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


@pytest.mark.parametrize(("grid", "knobs"), [
    (grids.polyexponential, {"rho": 0.0}),
    (grids.beta, {"a": 0.0}),
    (grids.beta, {"b": -1.0}),
    (grids.shifted, {"shift": 0.0}),
    (grids.shifted, {"shift": math.inf}),
])  # fmt: skip
def test_knobs_must_be_positive(grid, knobs):
    with pytest.raises(ValueError, match="must be positive"):
        grid(EDM(), 5, **knobs)


def test_limits_of_the_families():
    torch.testing.assert_close(grids.shifted(Straight(), 9, shift=1.0), uniform(Straight(), 9), rtol=1e-9, atol=0)
    torch.testing.assert_close(grids.shifted(EDM(), 9, shift=1e9), uniform(EDM(), 9), rtol=1e-6, atol=0)
    torch.testing.assert_close(grids.beta(EDM(), 9, a=1.0, b=1.0), uniform(EDM(), 9), rtol=1e-9, atol=0)
    torch.testing.assert_close(grids.polyexponential(VP(), 9), exponential(VP(), 9), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        grids.cosine(CosineVP(s=0), 9, t_end=0.1), uniform(CosineVP(s=0), 9, t_end=0.1), rtol=1e-9, atol=0
    )


def test_shift_is_flow_matchings_own():
    """t1 = s t/(1 + (s - 1) t) of uniform times, on the straight path, whose T is 1 but for 2^-12."""
    ts = grids.shifted(Straight(), 20, shift=3.0)
    t = torch.linspace(1, 0, 21, dtype=F64)
    assert (ts - 3 * t / (1 + 2 * t)).abs().max() < 2**-9
    r = torch.exp(-VP().lam(grids.shifted(VP(), 20, shift=3.0)))
    v = r / (1 + r)
    plain = v / (3 - 2 * v)  # the inverse shift: uniform again
    torch.testing.assert_close(plain.diff(), plain.diff()[0].expand(20), rtol=1e-7, atol=0)


def labels(ts, table=TABLE):
    """The labels of a grid, and whether it goes on to t = 0."""
    k = ts * table.N - 1
    assert (k - k.round()).abs().max() < 1e-9
    k = [round(v) for v in k.tolist()]
    return k[:-1] if k[-1] == -1 else k


SPACINGS = {  # the m labels, from the definitions, in exact fractions
    "linspace": lambda N, m: [round(Fraction((m - 1 - i) * (N - 1), m - 1)) for i in range(m)],
    "leading": lambda N, m: [math.floor(Fraction((m - 1 - i) * N, m)) for i in range(m)],
    "trailing": lambda N, m: [round(N - Fraction(i * N, m)) - 1 for i in range(m)],
}


@EVERY_LABELS
@pytest.mark.parametrize("m", [2, 3, 7, 10, 30, 48, 300, 501, 750, 999, 1000])
def test_label_spacing(grid, m):
    want = SPACINGS[grid](1000, m)
    assert labels(LABELS[grid](TABLE, m - 1)) == want
    ts = LABELS[grid](TABLE, m, to_zero=True)
    assert labels(ts) == want
    assert (len(ts), ts[-1].item(), ts.dtype) == (m + 1, 0.0, F64)
    assert len(set(want)) == m
    assert want[0] >= 999 - math.ceil(1000 / m)  # the noise end is covered, whatever m
    assert want[-1] <= math.ceil(1000 / m)


@EVERY_LABELS
def test_label_spacing_of_a_part(grid):
    """Strength keeps the last steps; one step; more labels than the table has."""
    for to_zero in (False, True):
        whole = LABELS[grid](TABLE, 30, to_zero=to_zero)
        assert torch.equal(LABELS[grid](TABLE, 21, strength=0.7, to_zero=to_zero), whole[9:])
    assert labels(LABELS[grid](TABLE, 1, to_zero=True)) == [{"leading": 0}.get(grid, 999)]
    with pytest.raises(ValueError, match=r"1001 labels and the table 1000.*coincide"):
        LABELS[grid](TABLE, 1000)
    with pytest.raises(ValueError, match=r"EDM has no table.*uniform"):
        LABELS[grid](EDM(), 10)


@pytest.mark.parametrize(("case", "grid"), [
    ("mix_ddim_10", "leading"),
    ("mix_ddim_20_eta1_x0", "leading"),
    ("mix_ddpm_25", "leading"),
    ("mix_ddim_8_trailing_v", "trailing"),
])  # fmt: skip
def test_label_spacing_of_diffusers(case, grid):
    """The labels at which diffusers called its model; where its own n divides the table they are ours."""
    peer = load(f"diffusers/{case}")
    want = [round(v) for v in peer["in_eval_t"].tolist()]
    assert labels(LABELS[grid](TABLE, len(want), to_zero=True)) == want


@pytest.mark.parametrize("case", ["golden_dpmm", "golden_deis", "golden_unipc"])
def test_linspace_of_diffusers(case):
    """Its multistep solvers call at n of n + 1 labels and end on the first one, label 0."""
    peer = load(f"diffusers/{case}")
    ts = LABELS["linspace"](TABLE, 10)
    assert labels(ts)[:-1] == [round(v) for v in peer["in_eval_t"].tolist()]
    peer.check(torch.exp(-TABLE.lam(ts)), "in_ratio_nodes", rtol=1e-6)  # theirs are float32


def test_beta_of_diffusers():
    """smin + (smax - smin) q(u) by bisection on the distribution function, u = 1 - linspace(0, 1, n)."""
    ts = grids.beta(EDM(T=14.6, t_min=0.03), 6, to_zero=True)
    for i in range(6):
        low, high = mp.mpf(0), mp.mpf(1)
        for _ in range(60):
            middle = (low + high) / 2
            below = mp.betainc(0.6, 0.6, 0, middle, regularized=True) < 1 - mp.mpf(i) / 5
            low, high = (middle, high) if below else (low, middle)
        assert ts[i].item() == pytest.approx(float(0.03 + (14.6 - 0.03) * low), rel=1e-9)
    assert ts[6] == 0


def test_sections():
    """iDDPM's own example: 300 labels, "10,15,20"; a skipped section; one label; the table of 40."""
    table = DiscreteVP.from_betas(cosine_betas(300))
    got = labels(sections(table, [10, 15, 20], to_zero=True), table)[::-1]
    want = [j * Fraction(99, c - 1) + 100 * k for k, c in enumerate((10, 15, 20)) for j in range(c)]
    assert len(got) == 45
    assert all(abs(k - v) <= Fraction(1, 2) for k, v in zip(got, want, strict=True))  # nearest; 149.5 may go either way
    assert (got[9], got[10], got[24], got[25], got[44]) == (99, 100, 199, 200, 299)
    assert labels(sections(table, [2, 0, 1]), table) == [200, 99, 0]
    assert labels(sections(table, [300]), table) == list(range(299, -1, -1))
    uneven = DiscreteVP.from_betas(linear_betas(40))  # sections of 14, 13 and 13
    assert labels(sections(uneven, [2, 2, 2]), uneven) == [39, 27, 26, 14, 13, 0]
    for counts, match in (
        ([101, 1, 1], r"section 0 has 100 labels, asked for 101.*0\.\.100"),
        ([1, -1, 1], "asked for -1"),
        ([1], "1 labels; a grid needs two points"),
        ([], "0 labels"),
    ):
        with pytest.raises(ValueError, match=match):
            sections(table, counts)
    assert len(sections(table, [1], to_zero=True)) == 2


@EVERY_SDE
def test_a_list_of_levels(name):
    """sigma/alpha at the points is the list; the ends of the SDE are reached to the bit."""
    sde = SDES[name]
    R = ratio(sde, tensor(sde.T))
    wanted = [R, 0.7 * R, 0.3, 0.05] if name != "VE" else [R, 20.0, 0.3, 0.05, 0.01]
    ts = of_levels(sde, wanted)
    assert (ts[0].item(), ts.dtype, ts.device.type) == (sde.T, F64, "cpu")
    assert torch.stack([sde.sigma(t) / sde.alpha(t) for t in ts]).tolist() == pytest.approx(wanted, rel=1e-8)
    if name == "VE":
        assert ts[-1] == 0
    else:
        assert of_levels(sde, [0.3, 0.0])[-1] == 0
        assert torch.equal(of_levels(sde, [*wanted, 0])[:-1], ts)


def test_a_list_of_times():
    times = [0.9, 0.5, 0.1, 0.0]
    for given in (times, tuple(times), tensor(times), tensor(times).float()):
        ts = of_times(VP(), given)
        torch.testing.assert_close(ts, tensor(times), rtol=1e-6, atol=0)
        assert ts.dtype == F64
    given = tensor(times)
    assert of_times(VP(), given).data_ptr() != given.data_ptr()


@pytest.mark.parametrize(("make", "what", "top"), [(of_times, "times", 1.0), (of_levels, "noise levels", 40.0)])
def test_lists_are_checked(make, what, top):
    sde = VP() if make is of_times else VE(0.01, 40.0)
    for bad, match in (
        ([0.5], rf"at least two {what}, got shape \(1,\)"),
        ([[0.5, 0.4]], r"got shape \(1, 2\)"),
        ([0.4, 0.5], rf"{what} 0 and 1 .* 0\.4 and 0\.5: they must decrease; sort"),
        ([0.5, 0.4, 0.4, 0.3], rf"{what} 1 and 2 .* 0\.4 and 0\.4: .*drop the repeated"),
        ([2 * top, 0.5], rf"{2 * top:.6g}"),
        ([0.5, -0.1], r"got -0\.1"),
        ([0.5, math.nan], "nan"),
    ):
        with pytest.raises(ValueError, match=match):
            make(sde, bad)
    if make is of_levels:
        with pytest.raises(ValueError, match=r"\[0\.01, 40\].*got 0$"):
            make(sde, [0.5, 0.0])


def test_points_that_coincide_are_refused():
    """Steps below the rounding of t: the error names the points."""
    with pytest.raises(ValueError, match=r"times \d+ and \d+ of the grid.*they must decrease; drop.*fewer steps"):
        uniform(VP(), 4000, t_end=1 - 1e-13)


@EVERY
@EVERY_SDE
def test_a_thousand_steps(grid, name):
    """Strictly decreasing and finite, whatever the variable."""
    ts = GRIDS[grid](SDES[name], 1000, to_zero=True)
    assert len(ts) == 1001
    assert (ts.diff() < 0).all()
    assert torch.isfinite(ts).all()

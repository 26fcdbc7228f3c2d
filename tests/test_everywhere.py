"""NaN nowhere: every sampler on every grid, from 1 to 100 steps, in both precisions, to t_min and to t = 0.

And right, not only finite: exact mean and variance at the end (`truth.moments`) come near the truth with 100
steps, by a bound for each order, on every grid that suits the SDE.
"""

import math

import pytest
import torch
from truth import F64, SDES, gaussian_score, marginal, moments, tensor

from samplers import SAMPLERS, grids
from scoresde import VP, DiscreteVP, Streams, cosine_betas, linear_betas

KNOBS = {
    "ode": {"method": "rk4"},  # fixed steps, from point to point; adaptive ones below
    "gotta_go_fast": {"rtol": math.inf},
    "predictor_corrector": {"n_correct": 0},  # affine; with Langevin steps below
}
NOT_TO_ZERO = {"ode", "gotta_go_fast"}  # they call the score at the end of a step
FIRST = {"euler_maruyama", "flow_euler", "reverse_diffusion", "predictor_corrector"}
FIRST |= {"ancestral", "ddim", "exponential_euler"}  # order 1
M3, V3 = tensor(0.7, -1.0, 0.3), tensor(0.05, 0.5, 2.0)
STEPS = (1, 2, 3, 5, 10, 37, 100)


def denser(sde, n, **more):
    return grids.polyexponential(sde, n, rho=2.0, **more)


CONTINUOUS = {
    **{name: getattr(grids, name) for name in ("uniform", "quadratic", "cosine", "log_snr", "karras")},
    **{name: getattr(grids, name) for name in ("polyexponential", "data_scale", "beta", "shifted")},
    "polyexponential, rho 2": denser,
}
EVEN = {"log_snr", "karras", "polyexponential", "polyexponential, rho 2"}  # no step is long in log(sigma/alpha)
HALF = ("SubVP", "CosineVP", "EDM", "Straight", "DiscreteVP")  # these see every other grid
UNSUITED = {("uniform", "EDM"), ("beta", "EDM")}  # t = sigma: 99 of 100 steps lie above the data's scale

EVERY = pytest.mark.parametrize("name", SAMPLERS)


def run(name, score, sde, x, ts, **more):
    return SAMPLERS[name](score, sde, x, ts, **{**KNOBS.get(name, {}), **more})


def guarded(sde):
    """The exact score, which may not be asked where sigma = 0."""
    exact = gaussian_score(sde, M3, V3)

    def score(x, t):
        assert bool((sde.sigma(t) > 0).all()), "the score was asked where it is singular"
        return exact(x, t)

    return score


def plain(name, sde, ts, dtype, **more):
    """A run with noise, from a draw of p_t: finite, in its precision, never asking at sigma = 0."""
    m, v = marginal(sde, ts[0], M3, V3)
    x = m + v.sqrt() * torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    z = iter(torch.randn(300, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1)))
    out = run(name, guarded(sde), sde, x.to(dtype), ts, noise=lambda x: next(z).to(x), **more)
    assert out.dtype == dtype
    assert torch.isfinite(out).all(), (ts[0], ts[-1], len(ts) - 1)
    return out


def error(name, sde, ts):
    """Distance of the exact mean and variance at the end from the truth, in standard deviations."""
    m, v = moments(SAMPLERS[name], sde, ts, M3, V3, **KNOBS.get(name, {}))
    m1, v1 = marginal(sde, ts[-1], M3, V3)
    return ((m - m1) ** 2 / v1 + (v / v1 - 1) ** 2).sum().sqrt().item()


def bound(name, sde):
    """What 100 steps leave at most on an even grid, over the whole range of noise."""
    if (name, sde) == ("flow_euler", "VE"):
        return 1.0  # Euler in t from sigma = 50, where g^2 = 17 sigma^2
    return {"sde_dpmpp": 0.12, "sa_solver": 0.06}.get(name, 0.4 if name in FIRST else 0.04)


@EVERY
@pytest.mark.parametrize("sde", SDES)
def test_every_grid_and_number_of_steps(name, sde):
    """Both precisions and both ends take turns, so that each grid has every pair of them."""
    process = SDES[sde]
    for g, grid in enumerate(CONTINUOUS.values()):
        for k, N in enumerate(STEPS[: 7 if g < 2 else 6] if sde in ("VP", "VE") else (1, 3, 37)):
            dtype, to_zero = (F64, torch.float32)[(g + k) % 2], (g + k) // 2 % 2 == 1 and name not in NOT_TO_ZERO
            ts = grid(process, N, to_zero=to_zero)
            assert len(ts) == N + 1
            assert (ts[-1] == 0) == to_zero
            plain(name, process, ts, dtype)


@EVERY
@pytest.mark.parametrize("sde", SDES)
def test_the_numbers_are_right(name, sde):
    """100 steps are near the truth on even grids, and on all that suit the SDE far nearer than 10."""
    process = SDES[sde]
    for g, (which, grid) in enumerate(CONTINUOUS.items()):
        if (which, sde) in UNSUITED or (sde in HALF and g % 2 == HALF.index(sde) % 2):
            continue
        if name == "ode" and which not in EVEN:  # torchdiffeq: 2 ms a step
            continue
        e10, e100 = (error(name, process, grid(process, n)) for n in (10, 100))
        if which in EVEN:
            assert e100 < bound(name, sde), which
        if (name, sde) != ("flow_euler", "VE"):
            assert e100 < e10 / (2 if name in FIRST else 4), (which, e10, e100)


@EVERY
def test_to_zero_is_as_right_or_refused(name):
    """t = 0 after t_min: the last step is the exact x0 or Euler's, and costs no accuracy to speak of."""
    for sde in ("VP", "VE", "EDM", "Straight"):
        process = SDES[sde]
        ts = grids.karras(process, 100, to_zero=True)
        if name in NOT_TO_ZERO:
            with pytest.raises(
                ValueError, match=r"ends at t = 0, where the score is singular .* end the grid at sde\.t"
            ):
                error(name, process, ts)
        else:
            assert error(name, process, ts) < 1.1 * bound(name, sde)


@EVERY
def test_single_precision_is_double_rounded(name):
    """The same run in float32, on every grid and SDE: 37 steps, within 1e-3 of the state's size."""
    for k, process in enumerate(SDES.values()):
        for grid in list(CONTINUOUS.values())[k % 5 :: 5]:
            ts = grid(process, 37)
            want, got = (plain(name, process, ts, dtype) for dtype in (F64, torch.float32))
            assert (got.double() - want).abs().max() < 1e-3 * (1 + want.abs().max())


# ------------------------------------------------------------------------------------------------ tables


def zero_snr(betas):
    """The table with its last alpha moved to 0 and its first kept   (Lin 2024, algorithm 1)."""
    a = torch.cumprod(1 - betas, 0).sqrt()
    a = (a - a[-1]) * a[0] / (a[0] - a[-1])
    return DiscreteVP(a**2)


TABLES = {
    "linear": DiscreteVP.from_betas(linear_betas(1000)),
    "linear, zero terminal SNR": zero_snr(linear_betas(1000)),
    "cosine, zero terminal SNR": zero_snr(cosine_betas(1000)[:999]),
}
LABELS = {
    **{name: getattr(grids, name) for name in ("linspace", "leading", "trailing")},
    "sections": lambda sde, n, *, to_zero=False: grids.sections(
        sde, [(m := n + (not to_zero)) - m // 3, m // 3], to_zero=to_zero
    ),
    "log_snr": grids.log_snr,
    "uniform": grids.uniform,
}


@EVERY
@pytest.mark.parametrize("table", TABLES)
def test_every_grid_of_a_table(name, table):
    """Also where the last alpha is 0: finite from 1 to 100 steps, and right."""
    sde = TABLES[table]
    for g, (which, grid) in enumerate(LABELS.items()):
        for k, N in enumerate((1, 2, 100) if g == 2 else (1, 2, 37)):
            dtype, to_zero = (F64, torch.float32)[(g + k) % 2], (g + k) // 2 % 2 == 1 and name not in NOT_TO_ZERO
            ts = grid(sde, N, to_zero=to_zero)
            assert len(ts) == N + 1
            plain(name, sde, ts, dtype)
        if (table == "linear, zero terminal SNR") == (g < 4) and name != "ode":
            e10, e100 = (error(name, sde, grid(sde, n)) for n in (10, 100))
            most = (
                1.5 if which == "trailing" else 2 if name in FIRST else 4
            )  # trailing ends where its last step is long
            assert e100 < e10 / most, (which, e10, e100)
            assert which != "log_snr" or e100 < bound(name, "DiscreteVP")


def test_the_zero_snr_tables_do_end_in_pure_noise():
    for table in ("linear, zero terminal SNR", "cosine, zero terminal SNR"):
        sde = TABLES[table]
        assert sde.alphas_cumprod[-1] == 0
        assert float(grids.trailing(sde, 10)[0]) == sde.T == 1
        assert 0 < float(sde.alpha(tensor(1.0))) < 1e-4


# -------------------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize("sde", SDES)
def test_adaptive_samplers(sde):
    """On the two ends of a grid and on one of few points: near the exact flow, and finite with noise."""
    process = SDES[sde]
    for N in (1, 3):
        ts = grids.karras(process, N)
        m, v = marginal(process, ts[0], M3, V3)
        x = m + v.sqrt() * tensor([[-1.0, 0.3, 2.0]])
        m1, v1 = marginal(process, ts[-1], M3, V3)
        out = SAMPLERS["ode"](guarded(process), process, x, ts)
        torch.testing.assert_close(out, m1 + v1.sqrt() * tensor([[-1.0, 0.3, 2.0]]), rtol=1e-4, atol=1e-4)
        single = SAMPLERS["ode"](guarded(process), process, x.float(), ts)
        torch.testing.assert_close(single.double(), out, rtol=1e-4, atol=1e-4)
        for dtype in (F64, torch.float32):
            noisy = SAMPLERS["gotta_go_fast"](guarded(process), process, x.to(dtype), ts, noise=Streams(N, 1))
            assert noisy.dtype == dtype
            assert ((noisy - m1).abs() < 6 * v1.sqrt()).all()


@pytest.mark.parametrize("sde", SDES)
def test_langevin_steps(sde):
    """The corrector divides by the score's size: finite on every grid, to t = 0 too."""
    process = SDES[sde]
    for g, grid in enumerate(CONTINUOUS.values()):
        for k, N in enumerate((1, 3, 10)):
            ts = grid(process, N, to_zero=(g + k) // 2 % 2 == 1)
            plain("predictor_corrector", process, ts, (F64, torch.float32)[(g + k) % 2], n_correct=1)


@EVERY
def test_points_that_do_not_decrease_are_refused(name):
    sde, x = VP(), torch.zeros(1, 3, dtype=F64)
    score = guarded(sde)
    for ts, k in (
        (tensor(1.0, 0.5, 0.5, 0.1), 1),
        (tensor(1.0, 1.0, 0.5), 0),
        (tensor(0.9, 0.5, 0.1, 0.1), 2),
        (tensor(1.0, 0.4, 0.6, 0.1), 1),
        (tensor(0.1, 0.5, 1.0), 0),
    ):
        at = rf"ts\[{k}\] = {ts[k]:.6g} and ts\[{k + 1}\] = {ts[k + 1]:.6g}"
        with pytest.raises(ValueError, match=rf"ts must decrease from noise to data, but {at}; use grids.uniform"):
            run(name, score, sde, x, ts)
    with pytest.raises(ValueError, match="ts must be finite, got nan"):
        run(name, score, sde, x, tensor(1.0, math.nan, 0.1))
    with pytest.raises(ValueError, match=r"ts must lie in \(0, T = 1\]"):
        run(name, score, sde, x, tensor(1.1, 0.5))
    with pytest.raises(ValueError, match="at least two times"):
        run(name, score, sde, x, tensor([1.0]))

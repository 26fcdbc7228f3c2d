"""Every documented variant of every sampler has the order its documentation gives it, in VP, sub-VP and VE.

What is documented is listed in `experiments.order_certificates`; orders are measured here with the tests' own
problems (`truth.moments`, the exact Gaussian flow, a mixture solved by scipy), not by the experiment's.
"""

import json
import math
import re
from functools import cache

import pytest
import torch
from scipy.integrate import solve_ivp
from truth import F64, SDES, Draws, gaussian_score, marginal, moments, order, tensor

from experiments import order_certificates as certificates
from experiments.order_certificates import Row, Variant, claims, variants
from samplers import SAMPLERS, ddim
from scoresde import mixture

M3, V3 = tensor(0.2, 0.6, -1.1), tensor(0.03, 0.6, 1.5)
THREE = ("VP", "SubVP", "VE")
LISTED = variants()
EVERY = pytest.mark.parametrize("v", LISTED, ids=lambda v: v.name)


def grid(sde, n, level):
    """From sigma/alpha = 1.5 to 0.5, steps shrinking in log(sigma/alpha) + t/2, or equal in sigma/alpha."""
    t, t1 = sde.time(-tensor(1.5).log()), sde.time(-tensor(0.5).log())
    u = torch.linspace(0, 1, n + 1, dtype=F64)
    if level:
        return sde.time(-(1.5 - u).log())
    return t + (u + 0.3 * u * (1 - u)) * (t1 - t)


@EVERY
@pytest.mark.parametrize("name", THREE)
def test_order_on_a_gaussian(v, name):
    """Mean and variance by exact moments (without noise that is the map itself), with half the table's steps."""
    sde, errors = SDES[name], []
    for n in (v.steps // 2, v.steps):
        ts = grid(sde, n, v.level)
        m, var = moments(v.run, sde, ts, M3, V3)
        m1, v1 = marginal(sde, ts[-1], M3, V3)
        errors.append(((m - m1) ** 2 / v1 + (var / v1 - 1) ** 2).sum().sqrt().item())
    assert order(errors)[0] == pytest.approx(v.order, abs=0.15), errors


@cache
def problem(name):
    """A 2-D mixture of three under SDES[name]: its score, six states at sigma/alpha = 1.5, their exact endpoints."""
    sde = SDES[name]
    means, var = tensor([[-0.7, 0.2], [0.6, 0.5], [0.1, -0.8]]), tensor([[0.04, 0.2], [0.1, 0.03], [0.3, 0.05]])
    weights = tensor(0.5, 0.3, 0.2)
    y = tensor([[-2.0, 0.3], [1.7, 0.6], [0.2, -0.1], [0.5, -1.9], [-0.4, 1.1], [-1.0, -1.2]])

    def eps(r, y):  # of y = x/alpha, by Bayes' rule
        y = torch.from_numpy(y).reshape(-1, 1, 2)
        V = var + r**2
        logits = weights.log() - 0.5 * ((y - means) ** 2 / V + V.log()).sum(2)
        return ((torch.softmax(logits, 1)[..., None] * (y - means) / V).sum(1) * r).flatten().numpy()

    end = solve_ivp(eps, (1.5, 0.5), y.flatten().numpy(), method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    t, t1 = grid(sde, 1, False)
    target = mixture(weights, means, var=var)
    return target.score(sde), sde.alpha(t) * y, sde.alpha(t1) * torch.from_numpy(end).reshape(-1, 2)


def follows_the_flow(v):
    draws = Draws(lambda i, x: torch.zeros_like(x))
    v.run(
        gaussian_score(SDES["VP"]), SDES["VP"], torch.ones(1, 2, dtype=F64), grid(SDES["VP"], 8, v.level), noise=draws
    )
    return not draws.n


NONLINEAR = [v for v in LISTED if 2 <= v.order <= 4 and v.mixture and follows_the_flow(v)]


@pytest.mark.parametrize("v", NONLINEAR, ids=lambda v: v.name)
def test_order_on_a_mixture(v):
    """Of the flow itself, where the data are not Gaussian."""
    sde, (score, x, exact) = SDES["SubVP"], problem("SubVP")
    ends = [v.run(score, sde, x, grid(sde, n, v.level)) for n in (2 * v.steps, 4 * v.steps)]
    errors = [(end - exact).norm().item() for end in ends]
    assert order(errors)[0] == pytest.approx(v.order, abs=0.15), errors


# --------------------------------------------------------------------------------------- what is documented


def test_every_sampler_is_listed_first_as_it_is_called():
    """And the order its docstring states is the one listed."""
    assert {v.sampler for v in LISTED} == set(SAMPLERS)
    first = {v.sampler: v for v in reversed(LISTED)}
    bare = {name for name, v in first.items() if v.knobs}
    assert bare == {"predictor_corrector", "gotta_go_fast", "ode"}  # Langevin's bias, adaptive, torchdiffeq's methods
    for name, v in first.items():
        stated = re.search(r"\border (\d)\b(?! values)", SAMPLERS[name].__doc__, re.IGNORECASE)
        if stated and name != "pndm":  # its docstring names the grid first
            assert v.order == int(stated[1]), name


def test_orders_and_forms_are_all_there():
    """Every order, prediction form and start the docstrings offer is certified."""
    have = {(v.sampler, k, u if isinstance(u, (int, str)) else None) for v in LISTED for k, u in v.knobs.items()}
    for name, orders in {"dpm_solver": 3, "dpmpp": 3, "singlestep": 5, "multistep": 5, "deis": 4, "pndm": 4}.items():
        assert {(name, "order", p) for p in range(1, orders + 1)} <= have
    for name, orders in {"unipc": 4, "angle": 4, "sde_dpmpp": 3, "sa_solver": 3, "seeds": 2}.items():
        assert {(name, "order", p) for p in range(1, orders + 1)} <= have
    for name in ("dpm_solver", "dpmpp", "unipc", "sa_solver", "seeds"):
        assert {(name, "predict", k) for k in ("x0", "eps")} <= have
    for name in ("dpmpp", "unipc", "sde_dpmpp", "sa_solver"):
        assert (name, "published", True) in have
    assert {("multistep", "start", "rise"), ("angle", "start", "order"), ("pndm", "start", "runge-kutta")} <= have
    assert {("deis", "variable", u) for u in ("t", "r", "lam")} <= have
    for name in ("angle", "exponential_euler", "sde_dpmpp", "sa_solver"):
        assert (name, "tau", None) in have  # tau a function or a float


def test_a_new_sampler_is_certified_by_being_exported(monkeypatch):
    def mine(score, sde, x, ts, **run):
        """One step at a time.  Order 1, N network calls."""

    monkeypatch.setitem(SAMPLERS, "mine", mine)
    assert variants()[-1] == Variant("mine", 1)
    mine.__doc__ = "No number."
    with pytest.raises(ValueError, match="the docstring of mine states no order"):
        variants()


# ------------------------------------------------------------------------------------------- the experiment


def test_its_moments_are_those_of_a_covariance_recursion():
    """x1 = A x + C z with (A, C) from two runs of each step alone: m1 = A m + b, v1 = A^2 v + C^2."""
    sde = certificates.PROCESSES["sub-VP"]
    ts, score = certificates.grid(sde, 9), certificates.gaussian_score(sde)
    m, v = marginal(sde, ts[0], certificates.MEAN, certificates.VAR)
    for k in range(9):
        steps = [
            ddim(score, sde, x, ts[k : k + 2], eta=0.7, noise=noise)
            for x, noise in ((m, torch.zeros_like), (m + 1, torch.zeros_like), (m, torch.ones_like))
        ]
        m, v = steps[0], (steps[1] - steps[0]) ** 2 * v + (steps[2] - steps[0]) ** 2
    run = Variant("ddim", 1, {"eta": 0.7}).run
    mean, var, drawn = certificates.moments(run, sde, ts)
    assert drawn == 9
    torch.testing.assert_close(mean, m.flatten(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(var, v.flatten(), rtol=1e-12, atol=1e-12)


def test_its_paths_are_one_brownian_motion():
    """Coarse draws are fine ones added up by their shares of the clock, and of variance 1."""
    sde = certificates.PROCESSES["VP"]
    fine, coarse = certificates.grid(sde, 12), certificates.grid(sde, 3)
    z = torch.randn(12, 4000, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    c = (sde.alpha(fine) / sde.sigma(fine)) ** 2
    noise = certificates.brownian(sde, coarse, z)
    for k in range(3):
        got, part = noise(None), slice(4 * k, 4 * k + 4)
        share = (c.diff()[part] / c.diff()[part].sum()).sqrt()
        torch.testing.assert_close(got, torch.einsum("k,kbd->bd", share, z[part]), rtol=1e-10, atol=1e-10)
        assert got.var().item() == pytest.approx(1, abs=0.05)
    same = certificates.brownian(sde, fine, z)
    assert all(torch.allclose(same(None), z[k]) for k in range(12))


def test_a_wrong_order_is_shown_and_does_not_hold():
    right, wrong = (certificates.certify(Variant("heun", p), "VE") for p in (2, 3))
    assert right.gaussian == wrong.gaussian
    assert [c.holds for c in claims([right])] == [True]
    assert [c.holds for c in claims([right, wrong])] == [False]
    assert claims([right, wrong])[0].value == pytest.approx(1, abs=0.01)


def row(**more):
    return Row(**{**dict.fromkeys(Row.__dataclass_fields__), "sampler": "s", "process": "VP", "order": 2, **more})


def test_the_claim_is_of_the_variant_and_the_figure_furthest_off():
    rows = [row(gaussian=2.1, mixture=None), row(gaussian=2.0, mixture=1.7, path=None), row(gaussian=2.0, path=1.12)]
    made = claims(rows)
    assert [c.value for c in made] == [pytest.approx(0.3), pytest.approx(0.12)]
    assert [(c.sense, c.limit) for c in made] == [("<=", 0.15)] * 2
    assert not claims([row(gaussian=math.nan), row(gaussian=2.0)])[0].holds
    assert [c.value for c in claims([row(gaussian=2.5), row(gaussian=2.0, process="VE")])] == [0.5, 0.0]


def test_the_command(tmp_path, capsys):
    argv = ["--quick", "--samplers", "ddim,heun,ancestral", "--out", str(tmp_path), "--json", str(tmp_path / "c.json")]
    certificates.main(argv)
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [r["holds"] for r in rows] == [True] * 12  # three samplers in three SDEs, and strong order in three
    assert {r["goal"] for r in rows} == {"<= 0.15"}
    lines = (tmp_path / "order_certificates.csv").read_text().splitlines()
    assert len(lines) == 1 + 9
    by = {tuple(line.split(",")[1:3]): line.split(",") for line in lines[1:]}
    for name, calls in (("ddim", 64), ("heun", 128), ("ancestral", 64)):
        for process in ("VP", "sub-VP", "VE"):
            cells = by[name, process]
            assert int(cells[5]) == calls
            assert (cells[7] == "") == (name == "ancestral")
            assert (cells[8] == "") == (name != "ancestral")
    assert (tmp_path / "order_certificates.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert re.search(r"^heun +2 +64 +128 +2\.0\d", printed, re.MULTILINE)
    with pytest.raises(SystemExit):
        certificates.main(["--samplers", "nonesuch", "--out", str(tmp_path)])
    assert "unknown sampler nonesuch; choose from euler_maruyama" in capsys.readouterr().err

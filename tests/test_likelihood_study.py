"""The likelihood study: the classical protocols against their programs' numbers, the counts, the claims."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from reference import load
from scipy.stats import t as student
from torch.distributions import MultivariateNormal, Normal

from experiments import likelihood_study
from experiments.likelihood_methods import (
    NOISE,
    PROCESSES,
    Case,
    Row,
    Tally,
    closed,
    exact_case,
    jacobian,
    k_diffusion,
    measure,
    ours,
    score_sde,
)
from experiments.likelihood_noise import Noisy, along, coverage, errors, seeded
from experiments.likelihood_study import CLAIMED, claims
from scoresde import EDM, VP, bits_per_dim, gaussian, log_prob, prior_log_prob
from scoresde.divergence import score_and_trace

F64 = torch.float64
FILES = ("likelihood_study.csv", "noise.csv")


def peer(case, sde, x, t, probe=None):
    """A reference case as one of the study's, with the SDE's own prior."""
    score = case.target(shape=x.shape[1:]).score(sde)
    return Case(case.name, score, sde, x, t, 0.5, lambda y: prior_log_prob(sde, y), x.new_zeros(len(x)), probe)


@pytest.mark.parametrize("name", ["ssde/likelihood_vp", "ssde/likelihood_subvp", "ssde/likelihood_ve"])
def test_score_sde(name):
    """RK45's value at 1e-5 with their probe, the same steps and evaluations: bits per dimension to the case's 1e-9."""
    case = load(name)
    of = peer(case, case.sde(), case["in_data"], case.params["eps"], case["in_probe"])
    tally = Tally(of.score, torch.arange(len(of.x)))
    case.check(bits_per_dim(score_sde()(of, tally), of.D, 2 / 256), "out_bpd_centered_default")
    assert len(tally.calls) == 2 * int(case["out_nfe_default"])  # drift, and drift again for the divergence


@pytest.mark.parametrize("name", ["kdiff/log_likelihood", "kdiff/log_likelihood_tight"])
def test_k_diffusion(name):
    """dopri5's value with their probe, from as many calls: their rounding, not their tolerance."""
    case = load(name)
    edm = EDM(T=case.params["sigma_max"], t_min=case.params["sigma_min"])
    of = peer(case, edm, case["in_x_init"], edm.t_min, case["in_probe"])
    tally = Tally(of.score, torch.arange(len(of.x)))
    case.check(k_diffusion(case.params["resolved"]["rtol"])(of, tally), "out_log_likelihood", rtol=1e-9, atol=1e-9)
    assert len(tally.calls) == int(case["out_nfe"])


@pytest.mark.parametrize("process", PROCESSES)
def test_every_way_meets_the_exact_density(process):
    """On Gaussian data, by torch.distributions: the change of variables of each protocol is right for every SDE."""
    sde, C = PROCESSES[process], torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    target, t, T = gaussian(torch.tensor([0.3, -0.2], dtype=F64), cov=C), 0.3, torch.tensor(sde.T, dtype=F64)
    x = torch.tensor([[0.5, -0.7], [1.0, 0.4], [-0.3, 0.0]], dtype=F64)
    a, s = sde.alpha(torch.tensor(t, dtype=F64)), sde.sigma(torch.tensor(t, dtype=F64))
    truth = MultivariateNormal(a * target.means[0], a**2 * C + s**2 * torch.eye(2, dtype=F64)).log_prob(x)
    case = Case("", closed(target, sde), sde, x, t, 0.6, lambda y: target.log_prob(y, sde, T), truth)
    for run in (score_sde(1e-6, False), k_diffusion(1e-6, False), ours(tol=1e-5), ours(method="curve", steps=32)):
        assert measure(case, "", "", run).worst < 1e-5


def test_the_cases_are_draws_of_p_t():
    """sigma/alpha = 0.002 at the data's time of each SDE; log p there, and at T, are the mixture's own."""
    for process, sde in PROCESSES.items():
        case = exact_case("2d", process, 4, 0)
        t = torch.tensor(case.t, dtype=F64)
        assert float(sde.sigma(t) / sde.alpha(t)) == pytest.approx(NOISE, rel=1e-9)
        torch.testing.assert_close(case.truth, case.target.log_prob(case.x, sde, t))
        far = Normal(0.0, sde.prior_std).log_prob(case.x * sde.prior_std).sum(1)
        torch.testing.assert_close(case.prior(case.x * sde.prior_std), far, rtol=2e-3, atol=2e-3)
    assert case.bits(case.truth + 2 * math.log(2)).tolist() == pytest.approx([1.0] * 4)


def test_closed_jacobian():
    """The closed form is autograd's Jacobian; times of the rows' own too; and its products give the same trace."""
    case = exact_case("digits", "sub-VP", 3, 0)
    plain = case.target.score(case.sde)
    for t in (torch.tensor(0.05, dtype=F64), torch.tensor([0.05, 0.3, 0.05], dtype=F64)):
        J = torch.stack(
            [
                torch.autograd.functional.jacobian(lambda y, s=s: plain(y, s)[0], x[None]).reshape(64, 64)
                for x, s in zip(case.x, t.expand(3), strict=True)
            ]
        )
        torch.testing.assert_close(jacobian(case.target, case.sde, case.x, t), J, rtol=1e-9, atol=1e-9)
        s, trace = score_and_trace(case.score, case.x, t)
        torch.testing.assert_close(s, plain(case.x, t))
        torch.testing.assert_close(trace, J.diagonal(dim1=1, dim2=2).sum(1))
    with pytest.raises(ValueError, match="full covariances"):
        jacobian(gaussian(torch.zeros(2, dtype=F64), var=1.0), VP(), torch.zeros(1, 2), torch.tensor(0.1))


def test_counts():
    """Two passes and D products an evaluation for score_sde, one pass for k-diffusion; ours apart: path and nodes."""
    case = exact_case("2d", "VP", 5, 0)
    r = measure(case, "", "", score_sde(1e-3, signs=False))
    assert r.passes == 2 * r.path == r.calls == r.products  # of two passes one has D = 2 products
    r = measure(case, "", "", k_diffusion(1e-3))
    assert (r.path, r.products) == (0, r.passes)
    r = measure(case, "", "", ours(method="multistep", steps=12))
    assert (r.passes, r.path, r.products, r.calls) == (12, 0, 24, 12)
    r = measure(case, "", "", ours(method="multistep", steps=12, probes=3))
    assert r.products == r.products_most == 36
    tally = Tally(case.score, torch.arange(5))
    tally.rows(torch.tensor([1, 4, 4])).rows(torch.tensor([1, 2]))(case.x[:2], torch.tensor(0.5))
    assert tally.cost().passes.tolist() == [0, 0, 0, 0, 2]
    asked = []
    tally = Tally(case.score, torch.arange(5))
    log_prob(tally, case.sde, case.x, t=case.t, tol=1e-2, nodes=7, d=case.d)
    cost = tally.cost()
    assert (cost.products == 2 * 7).all()
    assert torch.equal(cost.passes, cost.path + 7)
    assert cost.path_calls == cost.path.max()
    for i in range(5):  # a sample costs alone what it cost in the batch
        one = Tally(case.score, torch.arange(1))
        log_prob(one, case.sde, case.x[i : i + 1], t=case.t, tol=1e-2, nodes=7, d=case.d)
        asked.append(one.cost().path[0])
    assert torch.equal(cost.path, torch.stack(asked))


def test_ours_is_nearer_at_equal_calls():
    """2-D, 60 draws: apart's RMS is below the classical solver's, which is given at least as many passes."""
    case = exact_case("2d", "VP", 60, 0)
    mine = measure(case, "", "", ours(tol=1e-3))
    theirs = [measure(case, "", "", score_sde(tol, signs=False)) for tol in (1e-2, 1e-3, 1e-4)]
    enough = [r for r in theirs if r.passes >= mine.passes]
    assert len(enough) >= 1
    assert mine.rms < 0.1 * enough[0].rms
    assert mine.rms < min(r.rms for r in theirs if r.passes < 2 * mine.passes)
    published = measure(case, "", "", score_sde())
    assert published.rms > 0.1  # the probe's noise
    assert mine.passes < published.passes


@pytest.mark.parametrize(
    ("kind", "n", "fresh"), [("hadamard", 4, True), ("rademacher", 1, False), ("gaussian", 2, True)]
)
def test_noise_is_the_librarys(kind, n, fresh):
    """The sum over kept Jacobians is what log_prob errs by with the same draws, and nothing without probes."""
    case = exact_case("digits", "VP", 3, 0)
    a = along(case, 15)
    e = errors(a, kind, n, fresh, 1, seeded(5))[0]
    flat = seeded(5)
    how = {"t": case.t, "prior": case.prior, "tol": 1e-6, "nodes": 15, "d": case.d}
    got = log_prob(
        case.score, case.sde, case.x, probes=n, kind=kind, fresh=fresh,
        noise=lambda x: flat(x.flatten(1)).reshape(x.shape), **how,
    )  # fmt: skip
    torch.testing.assert_close(got, a.value + e, rtol=0, atol=2e-3)
    assert e.abs().min() > 2e-2
    whole = errors(a, "hadamard", 64, True, 2, seeded(1))
    torch.testing.assert_close(whole, torch.zeros_like(whole), rtol=0, atol=1e-8)
    taken = errors(a, "hadamard", 64, True, 2, seeded(1), control=True)
    torch.testing.assert_close(taken, torch.zeros_like(taken), rtol=0, atol=1e-8)


def test_control_variate_leaves_nothing_of_gaussian_data():
    """For N(m, C) the Jacobian is the control variate; without it the probes' noise is there."""
    case = exact_case("2d", "VP", 3, 0)
    target = gaussian(torch.zeros(2, dtype=F64), cov=torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64))
    T = torch.tensor(1.0, dtype=F64)
    case = Case("", target.score(VP()), VP(), case.x, case.t, 0.6, lambda y: target.log_prob(y, VP(), T), case.truth,
                target=target)  # fmt: skip
    a = along(case, 7)
    assert errors(a, "gaussian", 1, True, 3, seeded(0), control=True).abs().max() < 1e-9
    assert errors(a, "gaussian", 1, True, 3, seeded(0)).abs().max() > 0.1


def test_coverage_is_of_a_t_interval():
    """Bars of three Gaussian-like errors hold the truth 95 times of 100; half as wide, as seldom as Student says."""
    case = exact_case("2d", "VP", 6, 0)
    seen = coverage(case, 1, 3, 1000, 0)
    half = 2 * student.cdf(student.ppf(0.975, 2) / 2, 2) - 1
    assert seen > 0.93 > half


def row(problem, method, setting, **more):
    zero = dict.fromkeys(Row.__dataclass_fields__, 0.0)
    return Row(**{**zero, "problem": problem, "method": method, "setting": setting, **more})


def test_claims_by_hand():
    rows = [
        row("digits VP", CLAIMED, "0.0003", worst=9e-4, path=100, path_most=131, products_most=1984, passes=131, rms=1),
        row("digits VP", "multistep", "20", passes=20, rms=2e-3, worst=3e-3),
        row("digits VP", "multistep", "96", passes=96, rms=2, worst=1e-5, products_most=2049),
        row("digits VP", "curve", "20", passes=20, rms=5e-4, worst=2e-3),
        row("digits VP", "curve", "48", passes=48, rms=2e-4, worst=4e-4, products_most=2048),
        row("digits VP", "score_sde", "as published", passes=10, rms=1e-9),
        row("2d VE", "apart", "0.01", passes=60.0, rms=1.1e-3, worst=8e-4),
        row("2d VE", "apart", "0.001", passes=60.1, rms=1e-5, worst=7e-4, path_most=130),
        row("2d VE", "apart", "0.0001", passes=99, rms=1e-5, worst=1e-6, path_most=130.1),
    ]
    noise = [
        Noisy("digits VP", "fresh Hadamard", 31, 4, 124, 0.7, 0.01, 0.0),
        Noisy("digits VP", "fresh Hadamard", 31, 16, 496, 0.2, 0.01, 0.0),
        Noisy("digits VP", "budget, method apart", 7, 14, 98, 0.3, 0.003, 0.4),
        Noisy("digits VP", "budget, method apart", 31, 3, 93, 0.5, 0.006, 0.0),
        Noisy("digits VP", "budget, method apart", 127, 1, 127, 0.1, 0.001, 0.0),
    ]
    found = {(c.claim, c.sense): (c.value, c.holds) for c in claims(rows, noise, 0.98)}
    assert found == {
        ("digits VP, apart at 0.0003: worst error, bits/dim", "<="): (9e-4, True),
        ("digits VP, apart at 0.0003: path calls a sample", "<="): (100, True),
        ("digits VP, apart at 0.0003: path calls of the slowest", "<="): (131, False),
        ("digits VP, apart at 0.0003: products of the dearest", "<="): (1984, True),
        ("digits VP, any score, multistep 20: worst error in 130 path calls, 2048 products", "<="): (3e-3, False),
        ("digits VP, true score, curve 48: worst error in 130 path calls, 2048 products", "<="): (4e-4, True),
        ("2d VE, any score, apart 0.001: worst error in 130 path calls, 2048 products", "<="): (7e-4, True),
        ("digits VP, curve 20: RMS with 20 calls", "<="): (5e-4, True),
        ("digits VP, curve 48: RMS with 48 calls", "<="): (2e-4, False),
        ("2d VE, apart 0.01: RMS with 60 calls", "<="): (1.1e-3, False),
        ("digits VP: nats of trace noise, 4 probes on 31 nodes", "<="): (0.7, False),
        ("digits VP: nats of trace noise, 16 probes on 31 nodes", "<="): (0.2, True),
        ("digits VP: bits/dim, 7 nodes x 14 probes", "<="): (pytest.approx(0.005), True),
        ("95 % bars that hold the exact value, of 1000", ">="): (0.98, True),
        ("95 % bars that hold the exact value, of 1000", "<="): (0.98, False),
    }
    assert claims([], [], None) == []


def test_a_row_is_the_error_of_its_values():
    case = exact_case("2d", "VE", 4, 0)
    bits = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=F64)
    r = measure(case, "m", "s", lambda c, s: (s(c.x, torch.tensor(0.5)), c.truth + 2 * math.log(2) * bits)[1])
    e = bits.numpy()
    assert (r.passes, r.path, r.products, r.points) == (1, 1, 0, 4)
    assert (r.mean, r.rms, r.worst) == pytest.approx((e.mean(), np.sqrt((e**2).mean()), 2.0))
    assert r.median == pytest.approx(0.5)  # the lower middle of 0, 0.5, 1, 2


def test_the_script(tmp_path, monkeypatch, capsys):
    """Two methods of one problem: table, CSV, picture and claims say the same."""
    chosen = [(CLAIMED, "0.0003", ours(tol=3e-4)), ("score_sde", "as published", score_sde())]
    monkeypatch.setattr(likelihood_study, "runs", lambda case, quick: chosen if case.D == 2 else chosen[1:])
    made = likelihood_study.main(["--quick", "--out", str(tmp_path), "--json", str(tmp_path / "c.json")])
    rows, noise = (list(csv.DictReader((tmp_path / f).read_text().splitlines())) for f in FILES)
    assert [(r["problem"], r["method"]) for r in rows] == [
        ("digits VP", "score_sde"), ("2d VP", CLAIMED), ("2d VP", "score_sde"),
    ]  # fmt: skip
    written = {c["claim"]: c["value"] for c in json.loads((tmp_path / "c.json").read_text())}
    assert written == {c.claim: c.value for c in made}
    assert float(rows[1]["worst"]) == written["2d VP, apart at 0.0003: worst error, bits/dim"] < 1e-3
    assert (tmp_path / "likelihood_study.png").stat().st_size > 10_000
    assert len(noise) == 10
    assert "2d VP, 20 points" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        likelihood_study.main(["--points", "1", "--out", str(tmp_path)])

"""Distances of laws against closed forms; the study's floors, its choice of grids, its claims."""

import csv
import math

import pytest
import scipy.linalg
import torch
from truth import F64

from experiments import peers, work_precision
from experiments.bench.laws import Law, Truth, claims, laws, least
from experiments.bench.methods import Method, drawing
from experiments.problems import Problem, moments, problem
from scoresde import EDM
from scoresde.exact import gaussian

N = 4000


def line(var=4.0):
    """N(1, var) in one dimension, ended at sigma = 0.5."""
    return Problem("g", EDM(T=80.0), gaussian(torch.ones(1, dtype=F64), var=var), 0.5)


def test_frechet_of_gaussians():
    """|m - m'|^2 + (s - s')^2 along each axis of commuting covariances; and by scipy's square root on others."""
    truth = Truth(line(), 100, 0)
    s = math.sqrt(4.25)  # of the data and the noise that is left
    y = torch.tensor([[1 - s], [1 + s]], dtype=F64).repeat(50, 1)
    y = 1 + (y - 1) * math.sqrt(99 / 100)  # variance s^2 exactly
    assert abs(truth.frechet(y)) < 1e-12
    assert truth.frechet(y + 0.3) == pytest.approx(0.09, rel=1e-9)
    assert truth.frechet(1 + 1.5 * (y - 1)) == pytest.approx((0.5 * s) ** 2, rel=1e-9)
    p = problem("16d")
    truth = Truth(p, 500, 0)
    y = p.data_units(p.draw(500, 3, 0.3)) + 0.1
    mean, C = moments(p.target)
    t = torch.tensor(p.t_end, dtype=F64)
    C = C + torch.eye(16, dtype=F64) * (p.sde.sigma(t) / p.sde.alpha(t)) ** 2
    root = scipy.linalg.sqrtm((C @ y.T.cov()).numpy()).real
    want = (y.mean(0) - mean).square().sum() + C.trace() + y.T.cov().trace() - 2 * root.trace()
    assert truth.frechet(y) == pytest.approx(float(want), rel=1e-6)


def test_the_floors_are_those_of_exact_draws():
    """Of n draws of N(1, s^2): Frechet s^2/n (1 + 1/2) in the mean, sliced W2 falls with n."""
    floors = [Truth(line(), n, seed).frechet_floor for n in (400,) for seed in range(6)]
    assert sum(floors) / 6 == pytest.approx(1.5 * 4.25 / 400, rel=0.5)  # 48 draws of a chi-square law
    few, many = Truth(line(), 100, 0), Truth(line(), 10_000, 0)
    assert 0.1 * math.sqrt(4.25) < few.w2_floor < 0.5 * math.sqrt(4.25)
    assert many.w2_floor < 0.2 * few.w2_floor


def exact(p, off=0.0, cost=1):
    """A method that draws from the law of p itself, moved by off."""

    def run(case, score, x, steps):
        for _ in range(cost * steps):
            score(x[:1], torch.tensor(p.sde.T, dtype=F64))
        alpha = float(p.sde.alpha(torch.tensor(p.t_end, dtype=F64)))
        z = torch.randn(len(x), 1, dtype=F64)
        return alpha * (1 + off) + z * math.sqrt(4.25) * alpha

    return run


def test_laws_of_known_samplers():
    p = line()
    methods = [
        Method("scoresde", "mine", "good", exact(p)), Method("scoresde", "mine", "bad", exact(p, 2.0)),
        Method("scoresde", "mine", "worse", exact(p, 3.0)), Method("lib", "off", "good", exact(p, 0.5)),
        Method("lib", "dear", "good", exact(p, cost=4)),
    ]  # fmt: skip
    truth = Truth(p, N, 0)
    rows = laws(p, methods, (3, 5), truth, keep=1)
    by = {(r.sampler, r.grid, r.nfe): r for r in rows}
    assert set(by) == {(name, "good", nfe) for name in ("mine", "off") for nfe in (3, 5)} | {("dear", "good", 5)}
    assert [by["dear", "good", 5].calls, by["off", "good", 3].calls] == [4, 3]
    assert {r.samples for r in rows} == {N}
    for nfe in (3, 5):
        mine, off = by["mine", "good", nfe], by["off", "good", nfe]
        assert mine.frechet < 4 * truth.frechet_floor
        assert mine.w2 < 2.5 * truth.w2_floor
        assert off.frechet == pytest.approx(0.25, rel=0.15)
        assert off.w2 == pytest.approx(0.5, rel=0.1)
        assert (mine.w2_floor, mine.frechet_floor) == (truth.w2_floor, truth.frechet_floor)
    kept = laws(p, methods[:3], (3,), truth, keep=2)
    assert {r.grid for r in kept} == {"good", "bad"}
    blown = Method("lib", "blown", "-", lambda case, score, x, steps: x * math.nan)
    assert [r.frechet for r in laws(p, [blown], (1,), truth)] == [math.inf]


def test_what_is_drawn_follows_from_the_seed_alone():
    p, truth = line(), Truth(line(), 200, 0)
    before = torch.random.get_rng_state()
    one, two = (laws(p, [Method("lib", "m", "-", exact(p))], (2,), truth) for _ in range(2))
    assert one == two
    assert torch.equal(torch.random.get_rng_state(), before)
    with drawing(3):
        a = torch.randn(2)
    with drawing(4):
        assert not torch.equal(torch.randn(2), a)


def test_claims_are_of_the_best_grid_against_the_best_peer():
    def row(library, sampler, nfe, w2, frechet):
        return Law("2d", library, sampler, "-", nfe, nfe, 8, w2, 1.0, frechet, 0.1)

    rows = [
        row("scoresde", "mine", 5, 4.0, 0.4), row("scoresde", "mine", 5, 3.0, 0.6),
        row("scoresde", "other", 5, 0.1, 0.1),
        row("lib", "p", 5, 2.0, 0.8), row("lib", "q", 5, 6.0, math.inf), row("lib", "p", 9, 1.0, 0.1),
        row("scoresde", "mine", 9, 0.9, 0.108),
    ]  # fmt: skip
    made = claims(rows, "mine")
    assert [round(c.value, 12) for c in made] == [1.5, 0.5, 1.0, 1.0]  # what lies below 1.1 floors is no loss
    assert [c.holds for c in made] == [False, True, True, True]
    assert made[1].claim == "2d, 5 calls: Frechet of mine over that of lib p"
    assert claims(rows, "nobody") == []
    assert least([row("lib", "q", 5, 1.0, math.inf)], "frechet") is None


@pytest.mark.skipif(not peers.installed("k_diffusion"), reason="k-diffusion is not installed")
def test_the_script_shows_each_distance_with_its_floor(tmp_path, capsys, monkeypatch):
    two = [q for q in peers.k_diffusion.peers() if q.name in ("euler", "dpmpp_2m_sde", "dpmpp_3m_sde")]
    monkeypatch.setattr(peers.k_diffusion, "peers", lambda: two)
    argv = ["--quick", "--out", str(tmp_path), "--samplers", "angle:tau=1.0,heun", "--grids", "karras", "--nfe", "4,60"]
    made = work_precision.main([*argv, "--law", "500", "--peers", "k_diffusion"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "sliced W2" in line and "calls " in line]
    assert len(lines) == 6  # two of ours and the best of the library, at two budgets
    truth = Truth(problem("2d"), 500, 0)
    for text in lines:
        assert f"(exact {truth.w2_floor:.4g})" in text
        assert f"(exact {truth.frechet_floor:.4g})" in text
    with open(tmp_path / "laws.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {r["sampler"] for r in rows} == {"angle:tau=1.0", "heun", "dpmpp_2m_sde", "dpmpp_3m_sde"}
    by = {(r["sampler"], int(r["nfe"])): float(r["frechet"]) for r in rows}
    assert by["angle:tau=1.0", 4] > 5 * truth.frechet_floor
    assert by["angle:tau=1.0", 60] < 3 * truth.frechet_floor
    assert [c.claim for c in made if "Frechet" in c.claim]
    text = (tmp_path / "laws-2d.json").read_text()
    (tmp_path / "laws-2d.json").write_text(text.replace("dpmpp_", "remembered_"))
    work_precision.main([*argv, "--law", "500", "--peers", "k_diffusion"])
    assert "remembered" in capsys.readouterr().out

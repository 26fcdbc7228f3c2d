"""The table of tolerances: solvers of known error, cost and dependence on the batch; the figures of a small run."""

import csv
import math

import pytest
import torch
from truth import F64, gaussian_map, gaussian_score, tensor

from experiments import tolerances
from experiments.problems import problem
from experiments.tolerances import THEIRS, TOLERANCES, Row, as_it_comes, claims, measure, row_by_row, worst
from scoresde import EDM, VP, counted
from scoresde.flow import EACH


@pytest.mark.parametrize("sde", [VP(), EDM()], ids=["VP", "EDM"])
def test_torchdiffeq_follows_the_exact_flow(sde):
    """Of Gaussian data, to t_end and not over it."""
    x, times = sde.prior_std * torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(0)), []

    def score(x, t):
        times.append(float(t))
        return gaussian_score(sde)(x, t)

    ts = tensor(sde.T, 0.01)
    want = gaussian_map(sde, x, *ts)
    errors = [worst(as_it_comes(score, sde, x, ts, tol), want) for tol in (1e-4, 1e-8)]
    assert errors[0] < 1e-2
    assert errors[1] < 1e-6 < errors[0]
    assert min(times) >= 0.01 * (1 - 1e-12)


def test_worst():
    """By hand: the second sample's sqrt((9 + 16)/2); no number is infinitely wrong."""
    x = tensor([[1.0, 0.0], [3.0, -4.0], [0.0, 2.0]])
    assert worst(x, torch.zeros_like(x)) == pytest.approx(math.sqrt(12.5), rel=1e-15)
    for bad in (math.nan, math.inf):
        assert worst(tensor([[bad, 0.0], [1.0, 1.0]]), torch.zeros(2, 2, dtype=F64)) == math.inf


def test_row_by_row_is_the_score_with_the_same_bits_in_any_batch():
    p = problem("digits")
    x, t = p.start(6), torch.linspace(0.1, 60, 6, dtype=F64)
    apart, asked = row_by_row(p.score), counted(p.score)
    torch.testing.assert_close(apart(x, t), p.score(x, t), rtol=1e-10, atol=1e-12)
    for i in range(6):
        assert torch.equal(apart(x[i : i + 1], t[i]), apart(x, t)[i : i + 1])
    row_by_row(asked)(x, t)
    assert asked.calls == asked.samples == 6


def test_measured_are_errors_costs_and_batches(monkeypatch):
    """Solvers that are exact but for what they are made to do wrong."""
    p = problem("2d")
    exact = p.endpoints(p.start(12, 5), tol=1e-13)

    def off(score, sde, x, ts, tol):
        """Sample 7 two tolerances off in each coordinate; three calls, the last for five samples."""
        score(x, ts[0])
        score(x, ts[0])
        score(x[:5], ts[1])
        out = exact[: len(x)].clone() if len(x) > 1 else exact[(p.start(12, 5) == x).all(1)].clone()
        if len(x) == 12:
            out[7] += 2 * tol
        return out

    def moved(score, sde, x, ts, tol):
        """Every first sample of a batch is as many tolerances off as the batch is long."""
        out = torch.stack([exact[(p.start(12, 5) == row).all(1)][0] for row in x])
        out[0] += len(x) * tol
        return out

    monkeypatch.setattr(tolerances, "SOLVERS", {"off": off, "moved": moved})
    monkeypatch.setattr(tolerances, "TOLERANCES", (1e-3, 1e-6))
    rows = {(r.solver, r.tol): r for r in measure("2d", ("off", "moved"), 12, 5)}
    for tol in (1e-3, 1e-6):
        r = rows["off", tol]
        assert (r.problem, r.calls, r.rows, r.moves) == ("2d", 3, 12 + 12 + 5, 0)
        assert r.worst == pytest.approx(2, abs=1e-5)
        r = rows["moved", tol]
        assert r.worst == pytest.approx(12, abs=1e-5)
        assert r.moves == pytest.approx(4 - 1, abs=1e-5)  # a batch of four against one alone


def test_claims_are_the_worst_of_each_against_torchdiffeqs_calls():
    rows = []
    for tol, off, calls, moves in ((1e-3, 0.5, 50, 0.0), (1e-5, 2.5, 90, 0.25), (1e-7, 0.1, 300, 0.0)):
        rows.append(Row("2d", EACH, tol, off, calls, 9, moves))
        rows.append(Row("2d", f"{EACH}:dopri5", tol, 99.0, 999, 9, 9.0))
        rows.append(Row("2d", THEIRS, tol, 40.0, {1e-3: 100, 1e-5: 100, 1e-7: 200}[tol], 9, 9.0))
    made = claims(rows)
    assert [(c.value, c.limit, c.holds) for c in made] == [(2.5, 3.0, True), (1.5, 1.25, False), (0.25, 0.0, False)]


def test_a_small_run(tmp_path, capsys):
    """The claims hold on 16 samples, torchdiffeq misses; the table has a line for every run."""
    made = tolerances.main(["--quick", "--out", str(tmp_path)])
    assert all(c.holds for c in made)
    assert len(made) == 3
    with open(tmp_path / "tolerances.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert len(table) == 3 * len(TOLERANCES)
    for r in table:
        assert r["solver"] != EACH or float(r["worst"]) < 0.1
        assert r["solver"] != THEIRS or float(r["worst"]) > 5
        assert (float(r["moves"]) > 0) == (r["solver"] == THEIRS)
        if r["solver"] == THEIRS:
            assert int(r["rows"]) == 16 * int(r["calls"])
    assert (tmp_path / "tolerances.png").stat().st_size > 10_000
    assert "1e-07" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tolerances.main(["--problems", "2d,3d", "--out", str(tmp_path)])
    assert "unknown problem 3d; choose from 2d, 64d" in capsys.readouterr().err

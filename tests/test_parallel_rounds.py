"""The rounds a parallel sampler takes: how they are counted, and the command."""

import csv
import math

import pytest

from experiments import parallel_rounds as study
from experiments.problems import problem


@pytest.mark.parametrize(
    ("errors", "rounds"),
    [([1, 0.1], 3), ([1, 1e-3], 2), ([1e-4], 1), ([1, 1e-4, 1e-2, 1e-5], 4), ([1e-4, math.nan, 1e-4], 3)],
)
def test_rounds_end_when_the_error_stays_within(errors, rounds):
    assert study.rounds_to(errors, 1e-3) == rounds


def test_a_jacobian_takes_fewer_rounds_and_more_rows():
    """250 steps, 8 samples; a sample's first round is 1 row a step, and 32 x 16 more with the Jacobian."""
    rows = {s: study.measure(problem("16d"), "SDE", s, 250, 8, 0) for s in study.SLOPES}
    depth = [rows[s].stop for s in ("gaussian", "secants", "jacobian")]
    assert depth[0] > depth[1] > depth[2]
    for s, each in (("gaussian", 1), ("secants", 1), ("jacobian", 1 + 32 * 16 / 250)):
        r = rows[s]
        assert 1 <= r.rounds <= r.stop == len(r.errors)
        assert r.errors[-1] <= study.TOL < r.errors[0]
        assert each < r.rows < r.stop * each


def test_the_command(tmp_path, capsys):
    claims = study.main(["--quick", "--problems", "2d,digits", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert [c.claim for c in claims] == [
        f"2d, {e}: rounds {what}" for e in ("flow", "SDE") for what in ("to 1e-3", "until it stops")
    ]
    assert all((c.sense, c.limit) == ("<=", 14) and c.value >= 1 for c in claims)
    table = list(csv.DictReader((tmp_path / "parallel_rounds.csv").open()))
    assert [(r["process"], r["slope"]) for r in table] == [(e, s) for e in study.ETAS for s in study.SLOPES]
    assert [float(r["rounds"]) for r in table if r["slope"] == "jacobian"] == [c.value for c in claims[::2]]
    assert "2d         flow" in shown
    assert (tmp_path / "parallel_rounds.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argv", "match"),
    [(["--problems", "3d"], "unknown problem 3d; choose from 2d"), (["--steps", "0"], "at least 1, got 0")],
)
def test_refused(argv, match, capsys, tmp_path):
    with pytest.raises(SystemExit):
        study.main([*argv, "--out", str(tmp_path)])
    assert match in capsys.readouterr().err

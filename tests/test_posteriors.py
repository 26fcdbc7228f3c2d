"""The posterior experiment: its claims are of the worst posterior, and exact draws meet them."""

import csv

import pytest
from truth import tensor

from experiments import posteriors
from experiments.posteriors import Rating, claims_of

GOALS = {
    "sliced W2, worst posterior": ("<=", 0.055),
    "sd ratio, least": (">=", 0.95),
    "sd ratio, largest": ("<=", 1.05),
    "90 % band, least": (">=", 0.88),
    "90 % band, largest": ("<=", 0.92),
    "network calls a sample": ("<=", 600),
}


def fails(claims):
    assert {c.claim: (c.sense, c.limit) for c in claims} == GOALS
    return [c.claim for c in claims if not c.holds]


def test_claims_are_of_the_worst():
    good = Rating(0.02, 0.02, 1.0, 0.9, 0.03, 0.0)
    assert fails(claims_of([good, good], 600)) == []
    assert fails(claims_of([good, good], 601)) == ["network calls a sample"]
    for change, name in (
        ({"sliced_w2": 0.056}, "sliced W2, worst posterior"),
        ({"sd_ratio": 0.949}, "sd ratio, least"),
        ({"sd_ratio": 1.051}, "sd ratio, largest"),
        ({"band": 0.879}, "90 % band, least"),
        ({"band": 0.921}, "90 % band, largest"),
    ):
        bad = good._replace(**change)
        assert fails(claims_of([good, bad], 600)) == fails(claims_of([bad, good], 600)) == [name]


@pytest.mark.parametrize(("stretch", "failing"), [(1.0, []), (1.08, ["sd ratio, largest", "90 % band, least"])])
def test_exact_draws_hold_them(tmp_path, monkeypatch, stretch, failing):
    """Drawn from the posteriors they are judged by, and the same drawn out about the mean."""

    def draws(case, P, n, seed):
        x = case.exact.sample(n, seed + 40)
        return x.mean(0) + stretch * (x - x.mean(0)), 600.0

    monkeypatch.setattr(posteriors, "run", draws)
    claims = posteriors.main(["--per-mask", "1", "--out", str(tmp_path)])
    assert fails(claims) == failing
    assert claims[2].value == pytest.approx(stretch, abs=0.02)


def test_quick_run(tmp_path, capsys):
    claims = posteriors.main(["--quick", "--samples", "16", "--seed", "1", "--out", str(tmp_path)])
    assert {c.claim: (c.sense, c.limit) for c in claims} == GOALS
    assert claims[-1].value == 600
    rows = list(csv.DictReader((tmp_path / "posteriors.csv").open()))
    assert [r["measurement"] for r in rows] == ["left 0", "random 0", "mean"]
    w2 = tensor([float(r["sliced_w2"]) for r in rows])
    assert claims[0].value == pytest.approx(float(w2[:2].max()))
    assert float(w2[2]) == pytest.approx(float(w2[:2].mean()))
    for wrong, message in (
        (["--samples", "1"], "--samples must be at least 2, got 1"),
        (["--per-mask", "0"], "--per-mask must be at least 1, got 0"),
        (["--device", "meta"], "got --device meta"),
    ):
        with pytest.raises(SystemExit):
            posteriors.main([*wrong, "--out", str(tmp_path)])
        assert message in capsys.readouterr().err

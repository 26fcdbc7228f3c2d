"""The bias card: its targets against formulas, its masses by hand, its tables on a quick run."""

import csv
import math

import pytest
import torch
from truth import F64, tensor

import guidance
from experiments import bias_card
from experiments import bias_rules as rules
from experiments.bias_card import digits, in_many, in_plane, masses, pages, plane, shares
from experiments.bias_rules import METHODS, ONCE, Case, at_one, flow, log_target
from experiments.certificate import CELLS, EDGE, cells, truth, tv
from experiments.problems import problem
from scoresde import EDM, mixture

MEANS, VAR, WEIGHTS = tensor([-0.9, 0.3], [0.8, 0.5], [0.1, -1.2]), tensor(0.2, 0.1, 0.3), tensor(1.0, 2.0, 1.5)
T_END = 0.05


def small():
    """One Gaussian a class, 0, 1 and 2, under EDM: x = x0 + t z."""
    target = mixture(WEIGHTS, MEANS, var=VAR, labels=torch.arange(3))
    return Case(target, label=0, other=1, d=1.0, width=0.3, sde=EDM(), t_end=T_END)


def log_normal(x, k, more=0.0):
    v = VAR[k] + T_END**2 + more
    return -(x - MEANS[k]).square().sum(1) / (2 * v) - torch.log(2 * math.pi * v)


def log_whole(x):
    share = (WEIGHTS / WEIGHTS.sum()).log()
    return torch.logsumexp(torch.stack([share[k] + log_normal(x, k) for k in range(3)]), 0)


def tilt(x, w):
    return (1 - w) * log_whole(x) + w * log_normal(x, 0)


def named(name, w, x):
    """What each rule is named after, written once more."""
    negative = w / 8 * (log_normal(x, 1) - log_whole(x))
    special = {
        "autoguidance": lambda: w * log_normal(x, 0) + (1 - w) * log_normal(x, 0, more=0.1),
        "cfg++ (w/8)": lambda: log_normal(x, 0),
        "negative (NOT)": lambda: log_normal(x, 0) - negative,
        "perp-neg": lambda: tilt(x, w) - negative,
        "product": lambda: w / 2 * (log_normal(x, 0) + log_normal(x, 1)),
        "conjunction (AND)": lambda: (1 - 2 * w) * log_whole(x) + w * (log_normal(x, 0) + log_normal(x, 1)),
        "superpose OR": lambda: torch.log(log_normal(x, 0).exp() / 2 + log_normal(x, 1).exp() / 2),
        "superpose AND": lambda: (log_normal(x, 0) + log_normal(x, 1)) / 2,
    }
    return special.get(name, lambda: tilt(x, w))()


@pytest.mark.parametrize("name", METHODS | ONCE)
def test_target_of_every_name(name):
    """Up to a constant."""
    case, x = small(), torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    for w in (1.0, 3.0):
        gap = log_target(case, name, w, x) - named(name, w, x)
        assert (gap - gap[0]).abs().max() < 1e-10


EXACT = [
    name for name in METHODS
    if at_one(name) and name not in ("cfg, SDE", "cfg, SDE + moves", "Feynman-Kac", "fast", "exact")
]  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_at_one_the_flow_of_every_rule_is_the_conditional(name):
    """Which is a Gaussian: the flow keeps the number of standard deviations, and is known."""
    case, n = small(), 30
    x, calls = METHODS[name](case, 1.0, n, 0)
    start, r, v = case.start(n, 0), case.sde.T, float(VAR[0])
    want = MEANS[0] + (start - MEANS[0]) * math.sqrt((v + T_END**2) / (v + r * r))
    assert (x - want).abs().max() < 0.02
    assert calls == 120


SUMS = {
    "cfg, flow": rules._cfg,
    "autoguidance": rules._auto,
    "noise-aware classifier": rules._noise_aware,
    "product": rules._product,
    "conjunction (AND)": rules._and,
    "negative (NOT)": rules._not,
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_of_scores_end_at_their_target(name):
    """At the run's end the field of such a rule is the gradient of the log-density it is named after."""
    case, w = small(), 3.0
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64, requires_grad=True)
    (want,) = torch.autograd.grad(named(name, w, x).sum(), x)
    got = SUMS[name](case, w, case.grid(4))(x.detach(), tensor(T_END))
    assert (got - want).abs().max() < 1e-11 * want.abs().max()


def test_moves_of_the_estimate():
    """`mpgd` at this rate is `energy` without the Jacobian; `universal` adds a descent of 0.1 d^2 to `energy`."""
    case, t, w = small(), tensor(0.4), 3.0
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    cheap = guidance.energy(case.scores()[1], case.sde, case.energy, w, through=False, sigma_data=case.d)
    mpgd, universal, clean = (f(case, w, case.grid(4))(x, t) for f in (rules._mpgd, rules._universal, rules._clean))
    assert (mpgd - cheap(x, t)).abs().max() < 1e-12
    x0 = (x + t**2 * case.scores()[1](x, t)).requires_grad_()
    log_class = log_normal(x0, 0) - log_whole(x0)  # at T_END, where the data are a little wider
    (slope,) = torch.autograd.grad(log_class.sum(), x0)
    back = universal - clean
    assert (back - 0.1 * slope / t**2).abs().max() < 0.02 * back.abs().max()


def test_momentum_is_apg_of_another_weight():
    """1 + (w - 1)/(1 - beta) as the steps shrink, beta = -0.5: an error of order 1."""
    case, n, off = small(), 40, []
    apg = METHODS["apg"]
    gap = (apg(case, 2.5, n, 0)[0] - apg(case, 2.0, n, 0)[0]).abs().mean()
    for steps in (60, 240):
        x = flow(rules._momentum, steps)(case, 2.5, n, 0)[0]
        y = flow(lambda case, w, ts: guidance.apg(*case.scores(), w, sde=case.sde), steps)(case, 2.0, n, 0)[0]
        off.append(float((x - y).abs().mean() / gap))
    assert off[1] < 0.1
    assert off[0] > 3 * off[1]


def test_tables_by_hand():
    """Cells in the order of the head; unknown figures are a dash; what has no weight fills the first column."""
    plane = [
        {"method": "m", "w": 1.0, "TV": 0.0251, "modes": 0.5, "coverage": 0.9, "calls": 120.0, "floor": 0.02},
        {"method": "m", "w": 8.0, "TV": 0.25, "modes": 0.05, "coverage": 1.0, "calls": 120.0, "floor": 0.03},
        {"method": "once", "w": math.nan, "TV": 0.1, "modes": 0.2, "coverage": 0.3, "calls": 300.0, "floor": 0.04},
    ]
    many = [{"method": "m", "w": w, "sliced W2": v, "floor": v / 2, "sd ratio": v, "band": v, "mean error": v,
             "calls": 60.0, "target ESS": 0.5} for w, v in ((1.0, 0.2), (8.0, math.nan))]  # fmt: skip
    inverse = [{"method": "d", "sliced W2": 0.02, "floor": 0.016, "sd ratio": 1.0, "calls": 600.0}]
    assert pages(plane, many, inverse, (1.0, 8.0)).splitlines() == [
        "| TV / modes / coverage | w = 1 | w = 8 | calls |",
        "| --- | --- | --- | --- |",
        "| floor | 0.020 to 0.040 | 0.030 to 0.030 |  |",
        "| m | 0.025 / 0.50 / 0.90 | 0.25 / 0.050 / 1.00 | 120 |",
        "| once | 0.10 / 0.20 / 0.30 |  | 300 |",
        "",
        "| sliced W2 / sd ratio / band | w = 1 | w = 8 | calls |",
        "| --- | --- | --- | --- |",
        "| floor | 0.10 to 0.10 | - |  |",
        "| m | 0.20 / 0.20 / 0.20 | - | 60 |",
        "",
        "| method | sliced W2 | floor | sd ratio | calls |",
        "| --- | --- | --- | --- | --- |",
        "| d | 0.020 | 0.016 | 1.00 | 600 |",
    ]


def test_masses_by_hand():
    """A Gaussian's mass in a cell is a product of differences of Phi; its 90 % region a disc of area pi v log(100)."""
    case, phi = plane(), torch.special.ndtr
    one = mixture(tensor([1.0]), tensor([[0.4, -0.2]]), var=tensor([0.3]), labels=torch.tensor([0]))
    one = Case(one, 0, 0, case.d, case.width, EDM(), T_END)
    mass, parts, inside = masses(one, "cfg, flow", 1.0)
    edge, sd = torch.linspace(-EDGE, EDGE, CELLS + 1, dtype=F64), math.sqrt(0.3 + T_END**2)
    px, py = (phi((edge - m) / sd).diff() for m in (0.4, -0.2))
    assert (mass[:-1] - torch.outer(px, py).flatten()).abs().max() < 1e-4
    assert float(mass.sum()) == pytest.approx(1, abs=1e-12)
    assert 0.9 <= float(mass[inside].sum()) < 0.9 + float(mass[inside].min()) + 1e-12
    assert float(mass[inside].min()) >= float(mass[~inside].max())
    assert int(inside.sum()) * (2 * EDGE / CELLS) ** 2 == pytest.approx(math.pi * sd**2 * math.log(100), rel=0.05)
    assert parts.tolist() == pytest.approx([1.0])
    assert tv(mass, masses(case, "cfg, flow", 4.0)[0]) == pytest.approx(
        float((mass - truth(case.target, 4.0)[0]).clamp(min=0).sum()), abs=1e-9
    )


def test_shares_by_hand():
    x = tensor([-1.0, 0.0], [0.9, 0.4], [0.0, -1.0], [0.1, -2.0])
    assert shares(small(), x).tolist() == pytest.approx([0.25, 0.25, 0.5])
    assert shares(small(), x, tensor(0.1, 0.2, 0.3, 0.4)).tolist() == pytest.approx([0.1, 0.2, 0.7])
    assert tv(tensor(0.5, 0.5, 0.0), tensor(0.25, 0.25, 0.5)) == 0.5


def test_exact_samples_are_at_the_floor(monkeypatch):
    """In place of a method, exact draws of the conditional: TV, W2, deviation and band are those of the floor at w = 1,
    and draws of the tilted density by importance are at it at w = 4."""

    def draws(case, w, n, seed):
        t = tensor(case.t_end)
        x = case.target.given(case.label).sample(10 * n, seed + 100)
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 7), dtype=F64)
        x = case.sde.alpha(t) * x + case.sde.sigma(t) * z
        log_w = (1 - w) * (
            case.target.log_prob(x, case.sde, t) - case.target.given(case.label).log_prob(x, case.sde, t)
        )
        pick = torch.multinomial(torch.softmax(log_w, 0), n, replacement=True,
                                 generator=torch.Generator().manual_seed(seed))  # fmt: skip
        return x[pick], 7.0

    monkeypatch.setattr(bias_card, "METHODS", {"exact": draws})
    monkeypatch.setattr(bias_card, "ONCE", {})
    n = 2000
    rows, drawn = in_plane(n, 0, (1.0, 4.0))
    for row in rows:
        assert row["TV"] == pytest.approx(row["floor"], rel=0.2)
        assert row["modes"] < 0.03
        assert row["coverage"] == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / n))
        assert row["calls"] == 7
        exact = cells(drawn["exact", row["w"]])
        assert row["TV"] == pytest.approx(tv(exact, masses(plane(), "exact", row["w"])[0]), abs=1e-12)
    for row in in_many(300, 0, (1.0, 4.0)):
        assert row["sliced W2"] == pytest.approx(row["floor"], rel=0.25)
        assert row["sd ratio"] == pytest.approx(1, abs=0.03)
        assert row["band"] == pytest.approx(0.9, abs=0.015)
        assert row["mean error"] < 3 / math.sqrt(300)
        assert 0.5 < row["target ESS"] <= 1 + 1e-9


def test_the_digits_are_those_of_the_problem_blurred():
    case, P = digits(0.5), problem("digits")
    assert (case.sde, case.t_end) == (P.sde, P.t_end)
    assert float(case.target.floor.min() - P.target.floor.min()) == pytest.approx(0.5)
    x = P.target.sample(2000, 1)
    assert case.d == pytest.approx(math.sqrt(float(x.var(0).mean()) + 0.5), rel=0.05)


def test_a_wrong_density_is_seen(monkeypatch):
    """Samples of the conditional where w = 4 is asked: TV is that of the two densities."""

    def conditional(case, w, n, seed):
        x = case.target.given(case.label).sample(n, seed + 100)
        t = tensor(case.t_end)
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 7), dtype=F64)
        return case.sde.alpha(t) * x + case.sde.sigma(t) * z, 1.0

    monkeypatch.setattr(bias_card, "METHODS", {"exact": conditional})
    monkeypatch.setattr(bias_card, "ONCE", {})
    row = in_plane(8000, 0, (4.0,))[0][0]
    apart = tv(truth(plane().target, 4.0)[0], truth(plane().target, 1.0)[0])
    assert 2 * row["floor"] < apart
    assert apart - 0.02 < row["TV"] < apart + row["floor"]


def test_quick_run(tmp_path):
    claims = bias_card.main(["--quick", "--samples", "100", "--out", str(tmp_path)])
    goals = {c.claim: (c.sense, c.limit) for c in claims}
    assert goals["exact, w = 4: TV"] == ("<=", 0.03)
    assert goals["fast, w = 4: TV"] == ("<=", 0.1)
    assert goals["whole run, CPU seconds"] == ("<=", 900)
    value = {c.claim: c.value for c in claims}
    assert value["exact: calls"] == 20 + 15 * (2 + 17)
    assert value["fast: calls"] == 12 + 8 * (1 + 5)
    rows = {name: list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("rules", "rules_64d", "inverse")}
    assert len(rows["rules"]) == 2 * (len(METHODS) - 1) + 2
    assert len(rows["rules_64d"]) == 2 * (len(METHODS) - 2)
    tables = (tmp_path / "tables.md").read_text()
    assert all(f"| {name} |" in tables for name in METHODS)
    assert [r["method"] for r in rows["inverse"]] == ["dps", "twisted (default)"]
    worst = max(float(r["TV"]) - float(r["floor"]) for r in rows["rules"] if r["w"] == "1.0" and at_one(r["method"]))
    assert value["w = 1: TV above the floor, worst rule"] == pytest.approx(worst)
    assert (tmp_path / "bias_card.png").stat().st_size > 1000

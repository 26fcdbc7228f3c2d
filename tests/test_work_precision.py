"""The work-precision study: its budget, its errors and its claims, against known answers."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from truth import F64

import samplers
from experiments import work_precision
from experiments.bench.methods import FITTED, Method, deterministic, fitting, is_noisy, ours, parse, told
from experiments.bench.runs import Row, best, digest, every, exact_case, measure, screened
from experiments.bench.tables import calls_needed, claims_against_peers, claims_on_auto
from experiments.peers import torchdiffeq
from experiments.problems import problem, rms
from samplers import grids
from scoresde import EDM, VP, Model
from scoresde.checkpoint import save_model
from scoresde.nets import MLP


@pytest.mark.parametrize(
    ("calls", "nfe", "steps"),
    [
        (lambda n: n, 10, 10),
        (lambda n: 2 * n, 11, 5),
        (lambda n: 4 * n, 3, None),
        (lambda n: n + 9, 12, 3),
        (lambda n: 2 * n - 1, 9, 5),
        (lambda n: None if n % 3 else n, 10, 9),
        (lambda n: 4 * n, 50, 12),
        (lambda n: n * n, 50, 7),
        (lambda n: 2**n, 50, 5),
    ],
)
def test_as_many_steps_as_the_budget_allows(calls, nfe, steps):
    assert fitting(calls, nfe) == steps


def test_calls_are_counted_and_steps_never_exceed_the_budget():
    case = exact_case(problem("2d"), 4)
    rows = measure(case, every([*ours("ddim", ["uniform"]), *ours("heun", ["karras:rho=5"])], (1, 2, 7)))
    assert [(r.sampler, r.nfe, r.calls) for r in rows] == [
        ("ddim", 1, 1), ("ddim", 2, 2), ("ddim", 7, 7), ("heun", 2, 2), ("heun", 7, 6),
    ]  # fmt: skip
    p = problem("2d")
    x1 = samplers.ddim(p.score, p.sde, case.x, grids.uniform(p.sde, 7, t_end=1e-3))
    assert math.isclose(rows[2].rms, rms(p.data_units(x1), p.data_units(case.exact)), rel_tol=1e-12)

    def cheats(case, score, x, steps):
        for _ in range(steps if len(x) == 2 else steps + 1):
            score(x, torch.tensor(0.5, dtype=F64))
        return x

    with pytest.raises(RuntimeError, match="used 8 calls of 7"):
        measure(case, [(Method("x", "cheat", "-", cheats), 7)])


def test_screening_keeps_what_may_be_best():
    """Twelve methods of known error on the plane: ten and the near ones run on all samples, the rest on a quarter."""
    case = exact_case(problem("2d"), 16)

    def off(by):
        return lambda case, score, x, steps: case.exact[: len(x)] + by + 0 * score(x, torch.tensor(0.5, dtype=F64))

    methods = [Method("lib", f"m{k}", "-", off(10.0**-k)) for k in range(12)] + [Method("other", "o", "-", off(3.0))]
    rows = {r.sampler: r for r in screened(case, methods, (1,))}
    assert {name for name, r in rows.items() if r.samples == 4} == {"m0", "m1"}
    assert {r.samples for name, r in rows.items() if name not in ("m0", "m1")} == {16}
    scale = float(case.sde.alpha(torch.tensor(case.t_end, dtype=F64)))
    assert all(math.isclose(rows[f"m{k}"].rms, 10.0**-k / scale, rel_tol=1e-4) for k in range(12))
    near = [Method("lib", f"m{k}", "-", off(1 + 0.05 * k)) for k in range(12)]
    assert {r.samples for r in screened(case, near, (1,))} == {16}
    assert best([*rows.values(), Row("2d", "lib", "lucky", "-", 1, 1, 4, 0.0, 0.0)]).sampler == "m11"


def test_only_samplers_on_the_flow_are_taken():
    names = deterministic(exact_case(problem("2d"), 2))
    assert {"ddim", "heun", "flow_euler"} <= set(names)
    assert is_noisy(exact_case(problem("2d"), 2), "angle:tau=0.5")
    assert not any(is_noisy(exact_case(problem("2d"), 2), spec) for spec in ("angle:order=3", "searched", "ddim"))
    assert not {"euler_maruyama", "ancestral", "reverse_diffusion", "predictor_corrector", "ode"} & set(names)


def test_knobs():
    assert parse("angle:order=4:name=x:flag=False:u=0.5") == (
        "angle", {"order": 4, "name": "x", "flag": False, "u": 0.5},
    )  # fmt: skip
    with pytest.raises(ValueError, match="name=value"):
        parse("angle:order")
    with pytest.raises(ValueError, match="unknown sampler 'nope'"):
        ours("nope", ["uniform"])
    with pytest.raises(ValueError, match="unknown grid 'nope'"):
        ours("ddim", ["nope"])
    with pytest.raises(ValueError, match="ddim has no knob 'order'; its knobs are eta"):
        ours("ddim:order=2", ["karras"])
    with pytest.raises(ValueError, match="karras has no knob 'a'; its knobs are rho"):
        ours("ddim", ["karras:a=2"])
    case = exact_case(problem("2d-large"), 2)
    assert told(lambda x, *, d=0.5, k=1: x, {"k": 2}, case) == {"d": case.sigma_data, "k": 2}
    assert told(lambda x, *, d=0.5: x, {"d": 1.0}, case) == {"d": 1.0}


def test_calls_for_an_error():
    curve = [(n, n**-2.0) for n in (5, 10, 20, 40)]
    assert math.isclose(calls_needed(curve, 13**-2.0), 13, rel_tol=1e-9)
    assert calls_needed(curve, 1.0) == 5
    assert calls_needed(curve, 1e-6) == math.inf
    assert calls_needed(curve[-1:], 40**-2.0) == 40


def test_claims_hold_the_named_sampler_against_the_best_peer():
    def row(library, sampler, grid, nfe, e):
        return Row("2d", library, sampler, grid, nfe, nfe, 8, e, e)

    rows = []
    for n in (10, 20, 50):
        rows += [
            row("scoresde", "mine", "a", n, 0.2 * n**-3.0), row("scoresde", "mine", "b", n, 0.1 * n**-3.0),
            row("scoresde", "other", "a", n, 1e-9), row("azula", "p", "a", n, n**-3.0),
            row("azula", "q", "b", n, math.inf), row("diffusers", "r", "a", n, 2 * n**-3.0),
        ]  # fmt: skip
    claims = claims_against_peers(rows, "mine", None)
    ratios = [c for c in claims if "over that of p" in c.claim]
    assert [round(c.value, 12) for c in ratios] == [0.1] * 3
    assert all(c.holds for c in ratios)
    shares = {c.claim: c.value for c in claims if "share" in c.claim}
    assert len(shares) == 2  # at 20 and 50
    assert math.isclose(next(v for k, v in shares.items() if "50" in k), 0.1 ** (1 / 3), rel_tol=1e-9)
    assert [c.value for c in claims_against_peers(rows, "mine", "a") if "over" in c.claim] == pytest.approx([0.2] * 3)
    assert claims_against_peers(rows[:2], "mine", None) == []
    assert best(rows).sampler == "other"
    assert best([row("azula", "q", "b", 5, math.inf)]) is None


def test_claims_on_the_problems_of_auto():
    def row(where, library, nfe, e, grid="a"):
        return Row(where, library, "s", grid, nfe, nfe, 8, e, e)

    rows = [row("digits", "azula", n, 1.0) for n in (5, 10, 20)] + [row("2d", "azula", 5, 1.0)]
    rows += [row("digits", "scoresde", n, e) for n, e in ((5, 0.5), (10, 1.2), (20, 0.9))] + [
        row("2d", "scoresde", 5, 9.0)
    ]
    rows += [
        row("2d-small", "azula", 5, 1.0),
        row("2d-small", "scoresde", 5, 1.0),
        row("digits", "scoresde", 10, 0.8, "b"),
    ]
    claims = claims_on_auto(rows, "s", "a")
    assert [(c.claim.split(":")[0], c.value, c.holds) for c in claims] == [
        ("2d-small", 1.0, True),
        ("digits", 1.2, False),
        ("share where strictly best", 0.5, False),
    ]
    assert [c.value for c in claims_on_auto(rows, "s", None)] == [1.0, 0.9, 0.75]
    assert claims_on_auto(rows, "other", None) == []


def test_what_is_fitted_on_other_starts_gains_on_these():
    """At 8 calls on 2d: nothing fitted > grid searched > solver calibrated (seen: 0.0065, 0.0019, 0.0010)."""
    case = exact_case(problem("2d"), 64)
    specs = [ours("angle", ["data_scale"]), ours("searched", []), ours("calibrated", [])]
    plain, searched, calibrated = (measure(case, [(m[0], 8)])[0] for m in specs)
    assert plain.calls == searched.calls == calibrated.calls == 8
    assert searched.rms95 < 0.6 * plain.rms95
    assert calibrated.rms95 < searched.rms95
    grid, solver = measure(case, [(ours(name, [])[0], 26) for name in FITTED])
    assert solver.rms95 == grid.rms95  # above 25 calls both run on the grid


def test_the_script_writes_what_it_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torchdiffeq, "peers", lambda make=torchdiffeq.peers: make()[:2])
    argv = ["--quick", "--out", str(tmp_path), "--samplers", "ddim,heun", "--grids", "karras,log_snr", "--ours", "heun"]
    library = "torchdiffeq"
    claims = work_precision.main([*argv, "--peers", library, "--json", str(tmp_path / "c.json"), "--nfe", "8,10,20"])
    printed = capsys.readouterr().out
    assert "best of torchdiffeq" in printed
    with open(tmp_path / "work_precision.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert {r["problem"] for r in rows} == {"2d"}
    assert {"ddim", "heun", "midpoint in time"} <= {r["sampler"] for r in rows}
    assert all(int(r["calls"]) <= int(r["nfe"]) for r in rows)
    assert (tmp_path / "work_precision.png").stat().st_size > 1000
    assert len(claims) == 3  # ratios at 10 and 20, the share at 20
    assert len(json.loads((tmp_path / "c.json").read_text())) == 3
    kept = json.loads((tmp_path / "peers-2d.json").read_text())
    kept["rows"][0]["sampler"] = "remembered"
    (tmp_path / "peers-2d.json").write_text(json.dumps(kept))
    work_precision.main([*argv, "--peers", library, "--nfe", "8,10,20"])
    assert "remembered" in (tmp_path / "work_precision.csv").read_text()
    work_precision.main([*argv, "--peers", library, "--nfe", "8,10"])  # another question is asked anew
    assert "remembered" not in (tmp_path / "work_precision.csv").read_text()


def test_what_a_peers_rows_depend_on():
    case = exact_case(problem("2d"), 4)
    same = replace(case, exact=case.exact * (1 + 1e-11))  # another machine's rounding
    assert digest(same) == digest(case)
    assert (
        len(
            {
                digest(c)
                for c in (
                    case,
                    replace(case, x=case.x + 1e-9),
                    replace(case, exact=1.01 * case.exact),
                    replace(case, t_end=2e-3),
                    replace(case, sde=VP(beta_max=19.0)),
                )
            }
        )
        == 5
    )


def test_a_trained_network_is_a_problem(tmp_path, capsys):
    torch.manual_seed(0)
    model = Model(MLP(2, width=16, depth=1), EDM(T=80.0), "F", sigma_data=0.5)
    file = tmp_path / "model.safetensors"
    save_model(file, model, data={"shape": [2]})
    argv = ["--model", str(file), "--out", str(tmp_path), "--n", "16", "--samplers", "heun", "--grids", "karras"]
    work_precision.main([*argv, "--nfe", "16,64,256"])
    with open(tmp_path / "work_precision.csv", newline="") as f:
        e = [float(r["rms"]) for r in csv.DictReader(f)]
    assert math.log2(e[1] / e[2]) > 3.0  # order 2 over a factor 4, towards the reference
    assert "model: log10 rms95" in capsys.readouterr().out


def test_help_states_the_claims(capsys):
    with pytest.raises(SystemExit) as stop:
        work_precision.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "Claims" in text
    assert "--json" in text


def test_the_script_refuses(tmp_path, capsys):
    for argv, words in (
        (["--problems", "3d"], "unknown problem '3d'"), (["--samplers", "nope"], "unknown sampler 'nope'"),
        (["--grids", "nope"], "unknown grid 'nope'"), (["--peers", "nope"], "unknown library 'nope'"),
        (["--samplers", "sde_dpmpp"], "sde_dpmpp draws noise: its endpoint is not the flow's; give --law N"),
        (["--nfe", "0,5"], "calls must be at least 1"), (["--model", str(tmp_path / "none")], "no checkpoint at"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            work_precision.main(["--quick", "--out", str(tmp_path), *argv])
        assert words in capsys.readouterr().err

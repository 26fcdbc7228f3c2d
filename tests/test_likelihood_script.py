"""The evaluation script: its figures against exact ones, killed and resumed, shared by processes, stopped early.

A fresh MLP of kind F returns 0, which makes `Model` the exact score of N(0, sigma_data^2 I).
"""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import norm
from truth import F64

from experiments import likelihood, rating
from experiments.rating import REFERENCE, VALUE, streams
from scoresde import EDM, Model, bits_per_dim, dequantize, log_prob
from scoresde.checkpoint import save_model
from scoresde.nets import MLP
from scoresde.report import Report, estimate, split

FILES = ("items.csv", "items.json", "report.json")
LEVELS, D, N, STD = 9, 4, 45, 0.4
SDE = EDM(T=10.0, t_min=0.01)
LIGHT = ["--steps", "6", "--probes", "1", "--bound-calls", "4", "--repeats", "9", "--batch", "7"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(model of a Gaussian, a rough model with classes, data)."""
    folder = tmp_path_factory.mktemp("rated")
    about = {"shape": [D], "levels": LEVELS, "low": -1.0, "high": 1.0}
    torch.manual_seed(0)
    save_model(folder / "gauss.safetensors", Model(MLP(D, 8, 1), SDE, "F", sigma_data=STD), data=about)
    rough = MLP(D, 8, 1, classes=3)
    torch.nn.init.normal_(rough.out.weight, std=0.2)
    save_model(folder / "rough.safetensors", Model(rough, SDE, "F", sigma_data=STD, classes=3), data=about)
    rng = np.random.default_rng(0)
    k = np.clip(np.floor((STD * rng.standard_normal((N, D)) + 1) * LEVELS / 2), 0, LEVELS - 1).astype(int)
    np.savez(folder / "data.npz", x=k, y=rng.integers(0, 3, N))
    return str(folder / "gauss.safetensors"), str(folder / "rough.safetensors"), str(folder / "data.npz")


def levels(files):
    return torch.from_numpy(np.load(files[2])["x"])


def run(model, data, out, *more):
    likelihood.main([model, data, "--out", str(out), *more])
    return Report.load(out / "report.json"), json.loads((out / "items.json").read_text())


def column(items, name="bits_per_dim"):
    return torch.tensor([row[name] for row in items], dtype=F64)


def files_of(out):
    return [(out / name).read_bytes() for name in FILES]


def rank(monkeypatch, r, world, *args):
    monkeypatch.setenv("RANK", str(r))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    try:
        return likelihood.main(list(map(str, args)))
    finally:
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")


def test_figures_of_a_gaussian(files, tmp_path):
    """The flow of N(0, s^2) data scales x, so the values under both priors are known for each dequantised item."""
    report, items = run(files[0], files[2], tmp_path, "--batch", "16", "--bound-calls", "128", "--repeats", "20")
    k = levels(files).float()
    y = dequantize(k, LEVELS, -1, 1, streams(0, list(range(N)), VALUE, 0, 0)).double()
    v, vT = STD**2 + SDE.t_min**2, STD**2 + SDE.T**2
    xT = y * math.sqrt(vT / v)

    def bits(log_p):
        return -(log_p.sum(1) / math.log(2) / D + math.log2(2 / LEVELS))

    density = torch.from_numpy(norm.logpdf(y, scale=v**0.5))
    own = density + torch.from_numpy(norm.logpdf(xT, scale=SDE.T) - norm.logpdf(xT, scale=vT**0.5))
    np.testing.assert_allclose(column(items), bits(own), atol=2e-5)
    assert abs(report["ODE"].value - float(bits(own).mean())) < 1e-5
    assert abs(report["ODE"].error - float(bits(own).std()) / N**0.5) < 1e-5
    assert report["ODE"].dof == N - 1
    assert report["ODE"].doubt < 1e-4
    shift = column(items) - column(items, "fitted_prior")
    assert abs(report["prior mismatch"].value - float(shift.mean())) < 1e-12
    seen = dequantize(k.double(), LEVELS, -1, 1, streams(0, list(range(N)), REFERENCE))
    fitted = torch.distributions.MultivariateNormal(seen.mean(0), seen.T.cov() + SDE.T**2 * torch.eye(D, dtype=F64))
    change = fitted.log_prob(xT) - torch.from_numpy(norm.logpdf(xT, scale=SDE.T)).sum(1)
    np.testing.assert_allclose(shift, change / math.log(2) / D, atol=1e-6)

    noisy = STD**2 + SDE.t_min**2  # E -log p_r0(y + r0 eps), and the prior's part as a Gaussian's KL
    vlb = 0.5 * (y**2 + SDE.t_min**2) / noisy + 0.5 * math.log(2 * math.pi * noisy)
    vlb = vlb - 0.5 * (y**2 + SDE.T**2) / vT - 0.5 * math.log(vT) + 0.5 * (y**2 / SDE.T**2 + 1) + math.log(SDE.T)
    for name, exact in (("vlb", bits(-vlb)), ("immse", bits(torch.from_numpy(norm.logpdf(y, scale=STD))))):
        off = estimate(column(items, name) - exact)
        assert abs(off.value) < 4 * off.error
        assert off.error < 0.02
    terms = sum(report[f"VLB: {name}"].value for name in ("prior", "diffusion", "reconstruction"))
    assert abs(terms - report["VLB"].value) < 1e-9
    assert abs(report["VLB - ODE"].value - (report["VLB"].value - report["ODE"].value)) < 1e-9
    assert abs(report["I-MMSE - ODE"].value - (report["I-MMSE"].value - report["ODE"].value)) < 1e-9
    assert report["uniform over the levels"].value == math.log2(LEVELS)


@pytest.mark.parametrize("name", ["fitted", "truncated"])
def test_code_lengths_of_a_gaussian(files, tmp_path, name):
    """`fitted` is this model's own density over a cell, and so gives the cell's mass; the others stay below it."""
    more = ("--dequantize", name, "--importance", "4", "--probes", "0", "--repeats", "4", "--limit", "20")
    report, items = run(files[0], files[2], tmp_path, "--bound-calls", "64", *more)
    edges = (-1 + levels(files)[[row["item"] for row in items]] * 2 / LEVELS).numpy()
    s = math.hypot(STD, SDE.t_min)
    mass = np.log(ndtr((edges + 2 / LEVELS) / s) - ndtr(edges / s)).sum(1) / -math.log(2) / D
    above = column(items) - torch.from_numpy(mass)  # of code length: a loss
    if name == "fitted":
        assert float(above.abs().max()) < 3e-3  # the own prior's part
        assert abs(float((column(items, "vlb") - column(items)).mean())) < 0.05  # of the same draw and measure
    else:
        assert float(above.mean()) > 0.1
    assert f"{name} dequantisation (4 importance draws)" in report["ODE"].note


def test_repeats_and_solver_rows(files, tmp_path):
    """Each repeat, and the coarse and the refined value, by `log_prob` here; the report's rows from those."""
    x = levels(files).float()
    label, low, w = torch.from_numpy(np.load(files[2])["y"]), -1.0, 2 / LEVELS
    more = ("--steps", "8", "--probes", "1", "--repeats", "5", "--batch", "30", "--bound-calls", "0")
    report, items = run(files[1], files[2], tmp_path, *more)
    model = likelihood.load_model(files[1])[0]
    order = np.random.default_rng(0).permutation(N)
    some = order[:5].tolist()

    def bits(rows, j, k, steps, fresh=None):
        y = dequantize(x[rows], LEVELS, low, 1.0, streams(0, rows, VALUE, j, 0))
        lp = log_prob(
            model.given(label[rows]), SDE, y, d=STD, method="multistep", steps=steps, probes=1, fresh=fresh,
            noise=streams(0, rows, VALUE, j, 1 + k),
        )  # fmt: skip
        return bits_per_dim(lp.double(), D, w)

    value = bits(list(range(N)), 0, 0, 8)
    np.testing.assert_allclose(column(items), value, atol=1e-5)
    repeats = torch.stack([torch.stack([bits(some, j, k, 8) for k in (0, 1)], 1) for j in (0, 1)], 1)
    for part in split(repeats):
        assert abs(report[f"standard error from {part.name}"].value - part.bar(N).value) < 1e-5
    assert split(repeats)[2].variance > 1e-5
    coarse, fine = bits(some, 0, 0, 8, False), bits(some, 0, 0, 16, False)
    moved = estimate(fine - coarse)
    assert abs(moved.value) > 1e-4
    assert abs(report["ODE, refined"].value - report["ODE"].value - moved.value) < 1e-5
    assert abs(report["ODE"].doubt - 2 * (abs(moved.value) + moved.half_width)) < 1e-4
    assert "VLB" not in [row.name for row in report.rows]


def test_the_adaptive_method_is_refined_by_its_tolerance(files, tmp_path):
    more = ("--method", "apart", "--probes", "0", "--limit", "6", "--bound-calls", "0", "--repeats", "6")
    a, _ = run(files[1], files[2], tmp_path / "a", *more, "--tol", "1e-2")
    b, items = run(files[1], files[2], tmp_path / "b", *more, "--tol", "5e-3")
    assert abs(a["ODE, refined"].value - b["ODE"].value) < 1e-6
    assert "half the tolerance" in a["ODE, refined"].note
    rows = [row["item"] for row in items]
    assert rows == sorted(np.random.default_rng(0).permutation(N)[:6])  # in the data's order


def test_killed_and_resumed_gives_the_same_bytes(files, tmp_path):
    args = [files[1], files[2], *LIGHT[2:], "--steps", "40", "--batch", "3"]
    command = [sys.executable, "-m", "experiments.likelihood", *args, "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(list(tmp_path.glob("killed/parts/*/[0-9]*"))) < 3 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("killed/parts/*/[0-9]*")}
    assert 3 <= len(before) < 15
    assert not (tmp_path / "killed" / "report.json").exists()
    likelihood.main([*args, "--out", str(tmp_path / "killed")])
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("killed/parts/*/[0-9]*")}
    assert len(after) == 15
    assert {name: after[name] for name in before} == before  # kept, not rated again
    likelihood.main([*args, "--out", str(tmp_path / "whole")])
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """The files of one process."""
    out = tmp_path_factory.mktemp("alone")
    likelihood.main([files[1], files[2], *LIGHT, "--out", str(out)])
    return out


@pytest.mark.parametrize(("world", "order"), [(2, (1, 0)), (3, (2, 1, 0)), (3, (0, 2))])
def test_any_number_of_processes_gives_the_same_bytes(files, alone, tmp_path, monkeypatch, capsys, world, order):
    """One after the other; in the last case rank 0 comes first and does what the others would have done."""
    for r in order:
        claims = rank(monkeypatch, r, world, files[1], files[2], *LIGHT, "--out", tmp_path)
        assert bool(claims) == (r == 0)
        assert bool(capsys.readouterr().out) == (r == 0)
        if r == 0:
            break
        assert len(list(tmp_path.glob("parts/*/[0-9]*"))) == sum(
            len(range(q, 7, world)) for q in order[: order.index(r) + 1]
        )
    assert files_of(tmp_path) == files_of(alone)


def test_torchrun_gives_the_same_bytes(files, alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "experiments.likelihood", files[1], files[2], *LIGHT, "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path) == files_of(alone)
    assert done.stdout.count("ODE:") == 1


def test_half_width_stops_at_the_first_chunk_that_is_good_enough(files, alone, tmp_path, monkeypatch):
    order = np.random.default_rng(0).permutation(N)
    full = column(json.loads((alone / "items.json").read_text()))
    bars = {n: estimate(full[order[:n]]).half_width for n in (35, 42)}
    assert bars[42] < bars[35]
    for width, n in ((1e3, 35), (bars[35], 35), (bars[42] * 1.0001, 42), (1e-9, N)):
        out = tmp_path / f"{n}-{width:.3g}"
        report, items = run(files[1], files[2], out, *LIGHT, "--half-width", repr(width))
        assert [row["item"] for row in items] == sorted(order[:n])
        assert torch.equal(column(items), full[sorted(order[:n])])
        assert report["ODE"].dof == n - 1
    for world, ranks in ((2, (0, 1)), (3, (2, 1, 0))):
        shared = tmp_path / f"world-{world}"
        for r in ranks:
            rank(monkeypatch, r, world, files[1], files[2], *LIGHT, "--half-width", bars[35], "--out", shared)
        assert files_of(shared) == files_of(tmp_path / f"35-{bars[35]:.3g}")


def test_parts_are_of_one_run_and_whole(files, alone, tmp_path, monkeypatch):
    calls = []
    real = rating.chunk
    monkeypatch.setattr(rating, "chunk", lambda work, c: calls.append(c) or real(work, c))
    args = [files[1], files[2], *LIGHT, "--out", str(tmp_path)]
    likelihood.main(args)
    assert calls == list(range(7))
    parts = sorted(tmp_path.glob("parts/*/[0-9]*"))
    data = parts[0].read_bytes()
    parts[0].write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])  # a bit flipped in the numbers
    parts[1].write_bytes(parts[1].read_bytes()[:100])
    parts[2].write_bytes(b"")
    calls.clear()
    likelihood.main(args)
    assert len(calls) == 3
    assert files_of(tmp_path) == files_of(alone)
    calls.clear()
    likelihood.main([*args, "--limit", "21"])  # three chunks of those
    assert calls == []
    seen = {p.parent.name for p in tmp_path.glob("parts/*/*")}
    assert len(seen) == 1
    for more in (["--seed", "1"], ["--steps", "7"], ["--label", "1"], ["--unconditional"], ["--dequantize", "fitted"]):
        likelihood.main([*args, *more, "--limit", "7"])
        seen |= {p.parent.name for p in tmp_path.glob("parts/*/*")}
    assert len(seen) == 6
    assert calls == [0] * 5


def test_few_items_have_unknown_bars(files, tmp_path, capsys):
    report, items = run(files[0], files[2], tmp_path, "--limit", "1", "--steps", "4")
    assert report["ODE"].error is None
    assert report["ODE"].doubt is None
    assert "± unknown" in capsys.readouterr().out
    assert len(items) == 1
    with open(tmp_path / "items.csv") as f:
        (row,) = csv.DictReader(f)
    assert {name: float(v) for name, v in row.items()} == items[0]


def test_bad_options_name_the_cure(files, tmp_path, capsys):
    for more, words in (
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--steps", "1"], "--steps must be at least 2, got 1"),
        (["--importance", "0"], "--importance must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1 item"),
        (["--tol", "0"], "--tol must lie in (0, 1), got 0"),
        (["--bound-calls", "7"], "must be even and at least 4, or 0 for no bounds; got 7"),
        (["--half-width", "0"], "--half-width must be positive"),
        (["--method", "curve"], "invalid choice: 'curve'"),
        (["--dequantize", "none"], "invalid choice: 'none'"),
        (["--label", "5"], "label 5 is out of range; classes are 0..2"),
        (["--tol", "0.1", "--steps", "3"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit):
            likelihood.main([files[1], files[2], "--out", str(tmp_path), *more])
        assert words in re.sub(r"\s+", " ", capsys.readouterr().err)
    save_model(tmp_path / "m.safetensors", Model(MLP(D, 8, 1), SDE, "F", sigma_data=STD))
    with pytest.raises(SystemExit):
        likelihood.main([str(tmp_path / "m.safetensors"), files[2], "--out", str(tmp_path)])
    assert "does not say the shape, levels and range of its data" in capsys.readouterr().err

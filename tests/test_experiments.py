"""The scripts as a user runs them: quickstart, sample, likelihood, loop_overhead, and the README."""

import html
import itertools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import fit, likelihood, loop_overhead, parallel_rounds, quickstart, sample, tolerances
from experiments.digits import Judge, load, read_folder, styles, to_levels
from experiments.rating import VALUE, streams
from experiments.yardsticks import Features, gaussian_mixture_bits, pixel_bits
from scoresde import Streams, bits_per_dim, dequantize, log_prob
from scoresde.checkpoint import load_model, read

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def out(tmp_path_factory):
    """One small quickstart for all tests here, on a clock that counts: 200 steps on any machine."""
    folder = tmp_path_factory.mktemp("quickstart")
    args = ["--quick", "--budget", "4", "--clip-budget", "3", "--out", str(folder)]
    ticks = itertools.count(0.0, 0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "process_time", lambda: next(ticks))
        claims = quickstart.main([*args, "--json", str(folder / "c.json")])
    return folder, {c.claim: c.value for c in claims}


def test_the_page_shows_every_picture_and_every_claim(out):
    folder, claims = out
    page = (folder / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]+)"', page)
    assert len(pictures) >= 9
    assert all((folder / p).stat().st_size > 200 for p in pictures)
    assert not re.search(r'(src|href)="(https?:)?//', page)  # nothing from elsewhere
    for claim in claims:
        assert claim in html.unescape(page)
    rows = json.loads((folder / "c.json").read_text())
    assert [set(r) for r in rows] == [{"claim", "value", "goal", "holds"}] * len(claims)
    for row in rows:
        sense, limit = row["goal"].split()
        assert row["holds"] == (row["value"] <= float(limit) if sense == "<=" else row["value"] >= float(limit))


GOALS = {  # written out once more
    "score network: seconds of training": "<= 60",
    "composed CFG x CLIP: read as the asked class": ">= 0.98",
    "composed CFG x CLIP: mean ink, bold - thin": ">= 1",
    "samples read as the asked class, w = 1": ">= 0.975",
    "samples read as the asked class, w = 1.5": ">= 0.995",
    "CLIP-guided unconditional samples read as prompted": ">= 0.95",
    "held-out bits/dim, given the class": "<= 1.8",
    "held-out bits/dim: change when the steps are doubled": "<= 0.005",
    "held-out images classified by Bayes' rule": ">= 0.95",
    "CLIP: seconds of training": "<= 15",
    "CLIP: zero-shot accuracy": ">= 0.95",
    "whole run, seconds": "<= 240",
}


def test_the_goals_are_those_of_the_issue(out):
    rows = json.loads((out[0] / "c.json").read_text())
    assert {r["claim"]: r["goal"] for r in rows} == GOALS


def test_the_page_rates_held_out_images_and_a_coarse_solver_is_caught(out):
    """Recomputed from the saved model with the adaptive solver; a grid too coarse moves the value, and says so."""
    folder, claims = out
    model, _ = load_model(folder / "model.safetensors")
    _, held = load(None, 0)
    k = held.densities(slice(0, 20), Streams(401, 20))  # the page's draws, seed 0
    lp = log_prob(model.given(held.y[:20]), model.sde, k, probes=1, noise=Streams(402, 20))
    value = float(bits_per_dim(lp, 64, 2 / 17).mean())
    assert abs(value - claims["held-out bits/dim, given the class"]) < 0.02
    assert claims["held-out bits/dim: change when the steps are doubled"] > 1e-4
    coarse = log_prob(model.given(held.y[:20]), model.sde, k, probes=1, noise=Streams(402, 20), method="euler", steps=2)
    assert float(bits_per_dim(coarse, 64, 2 / 17).mean()) < value - 0.5  # flattering
    centres = (2 * (held.x[:20] + 0.5) / 17 - 1).float()
    cheat = log_prob(model.given(held.y[:20]), model.sde, centres, probes=1, noise=Streams(402, 20))
    assert float(bits_per_dim(cheat, 64, 2 / 17).mean()) < value - 0.15  # flattering, too


def test_inpainting_keeps_what_is_known(out):
    """The left halves of the completions are those of the original, in the picture itself."""
    pixels = np.asarray(Image.open(out[0] / "inpainting.png").convert("L")).astype(int)
    scale, cell = 6, 6 * 9  # 8 pixels and a border, enlarged

    def half(row, column):
        y, x = scale + row * cell, scale + column * cell
        return pixels[y : y + 48, x : x + 24]

    for column in range(10):
        for row in (1, 2, 3, 4):
            np.testing.assert_allclose(half(row, column), half(0, column), atol=6)  # the last noise is 0.005
        right = pixels[6 + 2 * cell : 6 + 2 * cell + 48, 6 + column * cell + 24 : 6 + column * cell + 48]
        assert right.std() > 5  # the unknown half was filled


def test_clip_is_trained_again_when_more_is_asked(out):
    record = json.loads((out[0] / "clip" / "training.json").read_text())
    assert 3 <= record["seconds"] < 4
    assert record["seed"] == 0


def test_even_a_few_seconds_learn_something_true(out):
    """Far from the claims, but above chance and below the uniform density (seeds 0 to 3: 2.1-2.3, 0.94-0.98,
    0.9-1.0, 0.80-0.93)."""
    _, claims = out
    assert claims["held-out bits/dim, given the class"] < math.log2(17) - 1
    assert claims["samples read as the asked class, w = 1.5"] > 0.6
    assert claims["held-out images classified by Bayes' rule"] > 0.5
    assert claims["CLIP: zero-shot accuracy"] > 0.5


def test_a_second_run_reuses_the_files_and_other_seeds_are_refused(out, capsys):
    folder, claims = out
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = {
        c.claim: c.value
        for c in quickstart.main(["--quick", "--budget", "4", "--clip-budget", "3", "--out", str(folder)])
    }
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert "reusing" in capsys.readouterr().out
    for claim, value in again.items():
        if "whole run" not in claim:
            assert value == claims[claim], claim  # the same seed, the same figures
    with pytest.raises(SystemExit, match="other data or with another seed"):
        quickstart.main(["--quick", "--seed", "1", "--out", str(folder)])


def test_sample_script_gives_the_same_in_any_chunking(out, tmp_path):
    model = str(out[0] / "model.safetensors")
    for batch in ("7", "20"):
        args = ["--n", "20", "--steps", "4", "--sampler", "ancestral", "--batch", batch]
        claims = sample.main([model, *args, "--out", str(tmp_path / batch)])
        assert all(c.holds for c in claims)
    a, b = (np.load(tmp_path / k / "samples.npz") for k in ("7", "20"))
    np.testing.assert_allclose(a["x"], b["x"], atol=1e-5)
    np.testing.assert_array_equal(a["labels"], np.arange(20) % 10)
    assert Image.open(tmp_path / "7" / "samples.png").size[0] > 300


def test_sample_script_guides_by_class_and_by_prompt(out, tmp_path):
    folder = out[0]
    args = [str(folder / "model.safetensors"), "--n", "30", "--steps", "8", "--label", "0"]
    args += ["--w", "2", "--clip", str(folder / "clip"), "--prompt", "a bold zero", "--out", str(tmp_path)]
    sample.main(args)
    with np.load(tmp_path / "samples.npz") as z:
        assert set(z["labels"]) == {0}
        judge = Judge(load(None, 0)[0])
        assert judge.rate_levels(torch.from_numpy(z["levels"]), torch.from_numpy(z["labels"])) > 0.5


def test_fitted_files_are_used_by_the_sample_script(out, tmp_path, capsys):
    """A solver for 3 calls is fitted, used by `sample`, bound to its model and guidance; and so is the grid."""
    model = str(out[0] / "model.safetensors")
    claims = fit.main([model, "--quick", "--n", "3", "--out", str(tmp_path)])
    assert 0 < claims[0].value < 10
    solver, grid = tmp_path / "solver-3.json", tmp_path / "grid.json"
    x = {}
    for name, file in (("solver", ["--fitted", str(solver)]), ("grid", ["--fitted", str(grid)]), ("plain", [])):
        args = [model, "--n", "20", "--steps", "3", *file, "--out", str(tmp_path / name)]
        assert sample.main(args)[0].value == 3  # network calls
        x[name] = np.load(tmp_path / name / "samples.npz")["x"]
    sample.main([model, "--n", "20", "--steps", "60", "--out", str(tmp_path / "fine")])
    fine = np.load(tmp_path / "fine" / "samples.npz")["x"]
    error = {name: np.sqrt(((v - fine) ** 2).mean()) for name, v in x.items()}
    assert error["solver"] < error["plain"]
    assert len({round(float(e), 6) for e in error.values()}) == 3
    with pytest.raises(SystemExit):
        sample.main([model, "--n", "20", "--steps", "3", "--w", "2", "--fitted", str(solver), "--out", str(tmp_path)])
    assert "calibrated for the model 'model.safetensors, w = 1', not" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(SystemExit):
        sample.main([model, "--steps", "4", "--fitted", str(solver), "--out", str(tmp_path)])
    assert "makes 3 calls, asked for are 4" in re.sub(r"\s+", " ", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        sample.main([model, "--fitted", str(out[0] / "c.json"), "--out", str(tmp_path)])
    assert "neither a calibrated solver nor a fitted grid" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_likelihood_script_is_log_prob_of_dequantised_data(out, tmp_path):
    """Per-item values recomputed here by another solver with the same probe; and a grid too coarse is said to be."""
    _, held = load(None, 0)
    x, y = held.x[:8], held.y[:8]
    np.savez(tmp_path / "d.npz", x=x[:, 0].numpy(), y=y.numpy())
    model = str(out[0] / "model.safetensors")
    args = [model, str(tmp_path / "d.npz"), "--probes", "1", "--bound-calls", "4", "--batch", "5"]
    claims = likelihood.main([*args, "--method", "dopri5", "--tol", "1e-5", "--repeats", "0", "--out", str(tmp_path)])
    items = json.loads((tmp_path / "items.json").read_text())
    assert [c.claim for c in claims] == ["bits/dim"]  # without repeats nothing is known of the solver
    m, _ = load_model(model)
    rows = list(range(8))
    k, noise = dequantize(x, 17, -1, 1, streams(0, rows, VALUE, 0, 0)), streams(0, rows, VALUE, 0, 1)
    lp = log_prob(m.given(y), m.sde, k, method="rk4", steps=32, probes=1, fresh=False, noise=noise)
    expected = bits_per_dim(lp, 64, 2 / 17)
    np.testing.assert_allclose([r["bits_per_dim"] for r in items], expected, atol=5e-3)
    assert abs(claims[0].value - float(expected.mean())) < 2e-3
    assert len((tmp_path / "items.csv").read_text().splitlines()) == 9
    for steps, holds in (("2", False), ("32", True)):
        claims = likelihood.main([*args, "--steps", steps, "--repeats", "6", "--out", str(tmp_path / steps)])
        assert claims[1].holds == holds


def test_likelihood_script_says_what_is_wrong_with_the_data(out, tmp_path, capsys):
    model = str(out[0] / "model.safetensors")

    def refuse(data, words, *more):
        with pytest.raises(SystemExit):
            likelihood.main([model, str(data), "--out", str(tmp_path / "o"), *more])
        assert words in re.sub(r"\s+", " ", capsys.readouterr().err)

    def npy(name, x):
        np.save(tmp_path / name, x)
        return tmp_path / name

    refuse(npy("f.npy", np.random.default_rng(0).random((2, 8, 8))), "undo the rescaling")
    refuse(npy("s.npy", np.zeros((2, 9, 8), int)), "shape [1, 9, 8], this model was trained on [1, 8, 8]")
    refuse(npy("v.npy", np.full((2, 8, 8), 17)), "values 17..17, this model's levels are 0..16")
    refuse(npy("e.npy", np.zeros((0, 8, 8), int)), "is empty")
    refuse(npy("ok.npy", np.zeros((2, 8, 8), int)), "label 11 is out of range; classes are 0..9", "--label", "11")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY nonsense")
    refuse(tmp_path / "broken.npy", "is not a readable .npy")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nonsense")
    refuse(tmp_path / "broken.npz", "is not a readable .npz")
    refuse(npy("words.npy", np.array([["a"]])), "must hold an array of numbers")
    refuse(tmp_path / "absent", "neither a folder of images nor")
    np.savez(tmp_path / "y.npz", x=np.zeros((3, 8, 8), int), y=np.zeros(2, int))
    refuse(tmp_path / "y.npz", "y has shape (2,) for 3 items")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    refuse(folder, "images have 256 levels, this model was trained on 17")
    (folder / "b.png").write_bytes(b"not an image")
    refuse(folder, "b.png is not a readable image")
    (folder / "b.png").unlink()
    Image.new("L", (8, 9)).save(folder / "b.png")
    refuse(folder, "b.png is (9, 8), the images before it (8, 8)")


def test_scripts_refuse_what_they_cannot_do(out, capsys, tmp_path):
    model = str(out[0] / "model.safetensors")
    with pytest.raises(SystemExit, match="--device cuda:99 cannot be used here"):
        sample.main([model, "--device", "cuda:99", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--seed must be >= 0, got -1"):
        sample.main([model, "--seed", "-1", "--out", str(tmp_path)])
    for args, words in (
        ([model, "--sampler", "magic"], "invalid choice: 'magic'"),
        ([model, "--label", "10", "--n", "0"], "must be at least 1"),
        ([model, "--label", "12"], "label 12 is out of range"),
        ([model, "--prompt", "a"], "go together"),
        ([str(tmp_path / "none")], "no checkpoint at"),
        ([model, "--w", "nan"], "the weight must be finite, got nan"),
        ([model, "--clip", str(tmp_path / "none"), "--prompt", "a"], "none"),
    ):
        with pytest.raises(SystemExit):
            sample.main([*args, "--out", str(tmp_path)])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("script", [quickstart, sample, likelihood, loop_overhead, fit, tolerances, parallel_rounds])
def test_help_states_the_claims(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "laim" in text
    assert "--json" in text


def test_loop_overhead_measures_every_fixed_grid_sampler(capsys, tmp_path):
    claims = loop_overhead.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("bare", "ddim", "heun", "predictor_corrector"))
    assert claims[0].value > 0.5  # a ratio to the bare loop; the claim itself is the script's, not a timed test


def test_digits_are_split_by_class_and_levels_come_back(tmp_path):
    train, held = load(None, 0)
    assert len(train) + len(held) == 1797
    assert held.y.bincount().tolist() == [math.ceil(n / 5) for n in (train.y.bincount() + held.y.bincount()).tolist()]
    whole = torch.cat([train.x, held.x]).flatten(1)
    assert len(whole.unique(dim=0)) == 1797  # every image once, on one side
    assert torch.equal(to_levels(held.densities(), 17), held.x)
    assert not torch.equal(load(None, 1)[1].x, held.x)
    style, ink = styles(train), train.ink()
    for c in range(10):
        rows = train.y == c
        assert ink[rows & (style == 0)].max() <= ink[rows & (style == 1)].min() <= ink[rows & (style == 2)].min()
    assert Judge(train).rate_levels(held.x, held.y) > 0.97


def test_a_folder_of_classes_is_data(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    train, held = load(tmp_path, 0)
    assert (train.names, train.levels, len(train), len(held), train.x.shape[1:]) == (
        ("cat", "dog"),
        256,
        16,
        4,
        (1, 9, 12),
    )
    assert read_folder(tmp_path / "cat").shape == (10, 1, 9, 12)
    with pytest.raises(ValueError, match="one sub-folder of images for each class"):
        load(tmp_path / "cat", 0)


def test_yardsticks_on_data_whose_entropy_is_known():
    """Uniform levels need log2(17) bits a pixel, Gaussian ones their entropy; Frechet of a shift is its square."""
    from experiments.digits import Images

    g = torch.Generator().manual_seed(0)
    x = torch.randint(17, (6000, 1, 2, 2), generator=g)
    a, b = Images(x[:5000], torch.zeros(5000), ("x",), 17), Images(x[5000:], torch.zeros(1000), ("x",), 17)
    assert abs(pixel_bits(a, b) - math.log2(17)) < 0.01
    z = (8.5 + 2 * torch.randn(6000, 1, 2, 2, generator=g)).clamp(0, 16.99).floor().long()
    a, b = Images(z[:5000], torch.zeros(5000), ("x",), 17), Images(z[5000:], torch.zeros(1000), ("x",), 17)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 4)  # bits of N(., 2^2) in bins of 1
    assert abs(gaussian_mixture_bits(a, b, 0, (1, 2)) - entropy) < 0.06
    assert abs(pixel_bits(a, b) - entropy) < 0.06
    f = Features(a)
    assert abs(f.frechet(z, z + 3) - 4 * 9) < 1e-6


def test_the_readme_runs_as_it_stands(capsys):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None
    scope: dict = {}
    exec(code.group(1), scope)
    assert abs(scope["x"][:, 0].mean() - 1) < 0.25  # guided to class 1, whose mean is (1, 0)
    assert capsys.readouterr().out
    assert (ROOT / re.search(r"!\[.*?\]\((.*?)\)", text).group(1)).is_file()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"make (\w+)", text)) <= set(targets)


def test_the_header_names_the_data(out):
    header = read(out[0] / "model.safetensors", "none")[1]
    assert header["data"]["shape"] == [1, 8, 8]
    assert header["data"]["levels"] == 17

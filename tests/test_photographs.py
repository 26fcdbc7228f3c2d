"""experiments.photographs: its rivals against what they must do, and the script as a user runs it."""

import json
import math

import pytest
import torch

from experiments import photographs, photos

pytest.importorskip("PIL.Image")
pytest.importorskip("skimage")


def ramp(h=24, w=24):
    i, j = torch.meshgrid(torch.arange(h).double(), torch.arange(w).double(), indexing="ij")
    return torch.stack([0.02 * i - 0.3, 0.01 * j, 0.01 * i - 0.02 * j])[None]


def test_psnr_is_the_error_of_all_pictures_at_once_and_pictures_end_at_one():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([x[0] + 0.1, x[1] + 0.3])
    assert photos.psnr(y, x) == pytest.approx(10 * math.log10(4 / 0.05), abs=1e-4)
    assert photos.psnr(x + 3, torch.ones_like(x)) == math.inf
    where = torch.zeros(4, 4, dtype=torch.bool)
    where[0, 1] = True
    y[..., 0, 1] = 0.2
    assert photos.psnr(y, x, where) == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)


def test_the_strip_is_unseen():
    whole = [torch.arange(3 * 5 * 320.0).reshape(3, 5, 320)]
    (seen,), (strip,) = photos.split(whole)
    assert (seen.shape[2], strip.shape[2]) == (240, 80)
    assert torch.equal(torch.cat([seen, strip], 2), whole[0])
    crops = photos.crops([strip], 2, 4)
    assert torch.equal(crops, torch.stack([strip[:, :4, 38:42], strip[:, 1:, 38:42]]))


def test_photographs_are_halved_by_means():
    from sklearn.datasets import load_sample_images

    image = load_sample_images().images[0].astype(float)
    half = photos.load()[0]
    assert half.shape == (3, 213, 320)
    assert abs(float(half[1, 7, 9]) - (image[14:16, 18:20, 1].mean() / 127.5 - 1)) < 1e-6


def test_patches_are_the_photographs_in_all_eight_positions():
    """Of a 2 x 2 photograph every patch is one of its eight positions, and all come up."""
    x = torch.arange(12.0).reshape(3, 2, 2)
    want = {tuple(p.flatten().tolist()) for k in range(4) for p in (x.rot90(k, (1, 2)), x.rot90(k, (1, 2)).flip(2))}
    assert {tuple(p.flatten().tolist()) for p in photos.patches([x], 2)(200)[0]} == want
    y = torch.arange(27.0).reshape(3, 3, 3)
    corners = {float(p[0].min()) for p in photos.patches([y], 2)(200)[0]}
    assert corners == {0.0, 1.0, 3.0, 4.0}


def test_total_variation_of_a_step_is_known():
    """Two halves of values -1 and 1, w wide each: each moves by weight/w towards the other."""
    x = torch.ones(1, 1, 12, 16, dtype=torch.float64)
    x[..., :8] = -1
    got = photos.total_variation(x.expand(1, 3, -1, -1), 0.4)
    assert float((got - x * (1 - 0.4 / 8)).abs().max()) < 0.01


def test_the_best_weight_is_the_best():
    torch.manual_seed(0)
    x = torch.where(torch.rand(1, 3, 1, 1) < 0.5, -0.5, 0.5).expand(1, 3, 24, 24).clone()
    x[..., 12:] *= -0.3
    noisy = x + 0.2 * torch.randn_like(x)
    picture, weight, db = photos.best_total_variation(noisy, x, 0.2)
    assert db == photos.psnr(picture, x)
    for w in (0.05, 0.1, 0.2, 0.3, 0.45, 0.7):
        assert photos.psnr(photos.total_variation(noisy, w), x) <= db + 0.02
    assert torch.equal(picture, photos.total_variation(noisy, weight))


def test_interpolations_are_exact_on_ramps():
    x = ramp()
    known = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    known[0, 0] = known[0, -1] = known[-1, 0] = known[-1, -1] = True  # so that the hull is the square
    got = photos.linear_interpolation(torch.where(known, x, 9.0), known)
    assert float((got - x).abs().max()) < 1e-9
    known[:, 20:] = False
    outside = photos.linear_interpolation(torch.where(known, x, 9.0), known)
    assert float(outside.abs().max()) < 1
    small = torch.nn.functional.avg_pool2d(x, 2)
    inner = (..., slice(6, -6), slice(6, -6))
    assert float((photos.bicubic(small, 2) - x)[inner].abs().max()) < 1e-9
    assert torch.equal(photos.enlarged(small, 2)[..., ::2, 1::2], small)


def test_the_script_trains_writes_and_takes_its_model_up_again(tmp_path, capsys):
    claims = photographs.main(["--quick", "--budget", "1", "--out", str(tmp_path), "--json", str(tmp_path / "c.json")])
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [r["goal"] for r in rows] == ["<= 90", ">= 2.5", ">= 2.5", ">= 2.5", ">= 0", ">= 0"]
    names = ["denoising_0.1", "denoising_0.2", "denoising_0.4", "super_resolution", "inpainting", "samples"]
    assert all((tmp_path / f"{n}.png").stat().st_size > 1000 for n in names)
    capsys.readouterr()
    again = photographs.main(["--quick", "--budget", "1", "--out", str(tmp_path / "b"), "--model",
                              str(tmp_path / "model.safetensors")])  # fmt: skip
    assert "reusing" in capsys.readouterr().out
    assert [c.value for c in again] == [c.value for c in claims]


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        (["--budget", "-1"], "--budget must be positive, got -1"),
        (["--model", "none.safetensors"], "--model: there is no none"),
    ],
)
def test_bad_options_are_told(argv, match, tmp_path):
    with pytest.raises(SystemExit, match=match):
        photographs.main(["--quick", "--out", str(tmp_path), *argv])

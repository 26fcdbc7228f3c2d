"""experiments.photographs: its rivals against what they must do, and the script as a user runs it."""

import argparse
import itertools
import json
import math

import pytest
import torch

from experiments import photographs, photos
from scoresde import counted, denoised

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
    whole = [torch.arange(3 * 5 * 320.0).reshape(3, 5, 320), torch.arange(3 * 9 * 40.0).reshape(3, 9, 40)]
    seen, strips = photos.split(whole)
    assert [(x.shape[2], y.shape[2]) for x, y in zip(seen, strips, strict=True)] == [(240, 80), (30, 10)]
    assert all(torch.equal(torch.cat([x, y], 2), z) for x, y, z in zip(seen, strips, whole, strict=True))
    x, y = strips
    want = [x[:, :4, 38:42], x[:, 0:4, 38:42], x[:, 1:, 38:42], y[:, :4, 3:7], y[:, 2:6, 3:7], y[:, 5:, 3:7]]
    assert torch.equal(photos.crops(strips, 3, 4), torch.stack(want))


def test_photographs_are_in_minus_one_to_one():
    from sklearn.datasets import load_sample_images

    image = load_sample_images().images[0].astype(float)
    photo = photos.load()[0]
    assert photo.shape == (3, 427, 640)
    assert abs(float(photo[1, 7, 9]) - (image[7, 9, 1] / 127.5 - 1)) < 1e-6


def test_patches_are_the_photographs_in_all_eight_positions():
    """Of a 2 x 2 photograph every patch is one of its eight positions, and all come up."""
    x = torch.arange(12.0).reshape(3, 2, 2)
    want = {tuple(p.flatten().tolist()) for k in range(4) for p in (x.rot90(k, (1, 2)), x.rot90(k, (1, 2)).flip(2))}
    assert {tuple(p.flatten().tolist()) for p in photos.patches([x], 2)(200)[0]} == want
    y = torch.arange(27.0).reshape(3, 3, 3)
    corners = {float(p[0].min()) for p in photos.patches([y], 2)(200)[0]}
    assert corners == {0.0, 1.0, 3.0, 4.0}
    both = photos.patches([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)], 2)(200)[0]
    assert 60 < float(both.mean((1, 2, 3)).sum()) < 140


def test_total_variation_of_a_step_is_known():
    """Two halves w wide: each moves by weight/w towards the other, in each colour by itself."""
    x = torch.ones(1, 3, 12, 16, dtype=torch.float64)
    x[..., :8] = -1
    x *= torch.tensor([1.0, -0.5, 0.25])[:, None, None]
    got = photos.total_variation(x, 0.4)
    assert float((got - (x - x.sign() * 0.4 / 8)).abs().max()) < 0.01


def stripes(n=24):
    """Two pictures that want weights far apart: two flat halves, and stripes two pixels wide."""
    x = torch.full((2, 3, n, n), -0.4)
    x[0, ..., n // 2 :] = 0.2
    x[1] += 0.7 * (torch.arange(n) % 4 < 2)
    return x


@pytest.mark.parametrize(("k", "sd"), [(0, 0.2), (1, 0.1)])
def test_the_best_weight_is_the_best(k, sd):
    """No weight between a fifth of the noise and six times it does better, by a grid of its own."""
    x = stripes()[k : k + 1]
    noisy = x + sd * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    picture, weight, db = photos.best_total_variation(noisy, x, sd)
    assert db == photos.psnr(picture, x)
    assert torch.equal(picture, photos.total_variation(noisy, weight))
    others = [0.2 * sd * 1.21**i for i in range(18)]
    assert db > max(photos.psnr(photos.total_variation(noisy, w), x) for w in others) - 1e-3
    if k:  # where PSNR is smooth in the weight, the weights to either side of the optimum are known to be worse
        assert all(photos.psnr(photos.total_variation(noisy, weight * w), x) < db for w in (0.95, 1.05))


def test_weights_are_tried_from_two_fifths_of_the_noise_to_four_times_it(monkeypatch):
    tried = []
    monkeypatch.setattr(photos, "total_variation", lambda x, w: tried.append(w) or x + 10 * abs(w - 0.11))
    x = torch.zeros(1, 3, 4, 4)
    got, weight, db = photos.best_total_variation(x, x, 0.1)
    assert tried[0] == pytest.approx(0.04)
    assert 0.38 < tried[-1] < 0.4
    assert all(b / a == pytest.approx(1.05) for a, b in itertools.pairwise(tried))
    assert abs(weight - 0.11) == min(abs(w - 0.11) for w in tried)
    assert (float(got[0, 0, 0, 0]), db) == (pytest.approx(10 * abs(weight - 0.11)), photos.psnr(got, x))


def test_linear_interpolation_is_exact_on_ramps_and_takes_the_nearest_outside():
    x = ramp().repeat(2, 1, 1, 1)
    x[1] *= -2
    known = torch.rand(24, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    known[0, 0] = known[0, -1] = known[-1, 0] = known[-1, -1] = True  # so that the hull is the square
    given = torch.where(known, x, 9.0)
    got = photos.linear_interpolation(given, known)
    assert float((got - x).abs().max()) < 1e-9
    assert torch.equal(got[..., known], x[..., known])
    assert bool((given[..., ~known] == 9).all())
    known[:, 19], known[:, 20:] = True, False
    outside = photos.linear_interpolation(torch.where(known, x, 9.0), known)
    assert torch.equal(outside[..., 20:], x[..., 19:20].expand(-1, -1, -1, 4))


def test_enlarging_is_exact_on_ramps():
    x = ramp()
    small = torch.nn.functional.avg_pool2d(x, 2)
    inner = (..., slice(6, -6), slice(6, -6))
    i = torch.arange(48).double()
    square = (0.5 * (0.5 + 2 * i) ** 2).expand(1, 3, 48, 48)  # at the large pixels' own places
    assert float((photos.bicubic(square, 2) - (0.5 * torch.arange(96).double() ** 2))[inner].abs().max()) < 1e-9
    assert float((photos.bicubic(small, 2) - x)[inner].abs().max()) < 1e-9
    assert torch.equal(photos.enlarged(small, 2)[..., ::2, 1::2], small)
    assert torch.equal(photos.enlarged(small, 2)[..., 1::2, ::2], small)


@pytest.mark.parametrize(("h", "w"), [(6, 6), (11, 9), (14, 6), (10, 14)])
def test_a_score_of_windows_is_the_mean_of_scores_by_tents(h, w):
    """A score that knows its window's mean and the place in it, summed window by window."""
    torch.manual_seed(0)
    place = torch.randn(3, 6, 6, dtype=torch.float64)
    x, t = torch.randn(2, 3, h, w, dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)

    def score(x, t):
        return place * x - t[:, None, None, None] * x.mean((2, 3), keepdim=True)

    tent = torch.tensor([0.5, 1.5, 2.5, 2.5, 1.5, 0.5], dtype=torch.float64)
    firsts = {6: [0], 9: [0, 3], 11: [0, 4, 5], 10: [0, 4], 14: [0, 4, 8]}
    total, weights = torch.zeros_like(x), torch.zeros(h, w, dtype=torch.float64)
    for i, j in itertools.product(firsts[h], firsts[w]):
        at = (..., slice(i, i + 6), slice(j, j + 6))
        total[at] += tent[:, None] * tent * score(x[at], t)
        weights[at] += tent[:, None] * tent
    model = counted(score)
    got = photos.windows(model, 6, 4)(x, t)
    assert float((got - total / weights).abs().max()) < 1e-12
    assert model.calls == 1
    one = photos.windows(lambda x, t: t * x, 6, 4)(x, t[0])
    assert float((one - t[0] * x).abs().max()) < 1e-12
    with pytest.raises(ValueError, match="pictures must be at least 15 x 15"):
        photos.windows(score, 15, 4)(x, t)


def test_a_turned_score_is_the_mean_over_the_eight_positions():
    torch.manual_seed(0)
    c = torch.randn(5, 5, dtype=torch.float64)
    x, t = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    mean = sum(m for v in (c, c.T) for m in (v, v.flip(0), v.flip(1), v.flip(0, 1))) / 8
    model = counted(lambda x, t: t * c * x)
    assert float((photos.turned(model)(x, t) - mean * x).abs().max()) < 1e-12
    assert model.calls == 8
    wide = torch.randn(1, 3, 4, 7)
    assert torch.allclose(photos.turned(lambda x, t: -x)(wide, t), -wide)


def test_noise_levels_are_drawn_where_they_are_asked():
    """7 in 8: log r ~ N(-0.95, 0.5^2); the rest N(0, 1.5^2): both medians, and one standard deviation up and down."""
    high = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    q = torch.tensor([1 - high, 0.5, high], dtype=torch.float64)
    t = photographs.times(torch.cat([7 / 8 * q, 7 / 8 + q / 8]))
    want = torch.tensor([-1.45, -0.95, -0.45, -1.5, 0, 1.5], dtype=torch.float64)
    assert float((-photographs.SDE.lam(t) - want).abs().max()) < 1e-6
    ends = photographs.times(torch.tensor([7 / 8 - 1e-6, 7 / 8], dtype=torch.float64))
    assert ends[0] > 4 > 0.1 > ends[1]


def run(tmp_path, score=None, strips=None, x=None, seed=0):
    return photographs.Run(score, strips, x, photographs.QUICK, tmp_path, seed)


def gaussian(var):
    """The score of N(0, var) data."""
    return lambda x, t: -x / (photographs.SDE.alpha(t) ** 2 * var + photographs.SDE.sigma(t) ** 2)


def both_scales(y, sd, var=0.25):
    """What the score of N(0, var) data says of a picture and, at half the noise, of its means."""
    fine, coarse = (var / (var + s**2) for s in (sd, sd / 2))
    means = torch.nn.functional.avg_pool2d(y, 2)
    up = torch.nn.functional.interpolate(means, scale_factor=2, mode="bilinear")
    return fine * y + (coarse - fine) / 2 * up


def test_the_estimate_is_the_posterior_mean_of_pictures_of_one_colour(tmp_path):
    """x0 = c in all pixels, c ~ N(0, v): the mean of n pixels tells all, on both scales the same."""
    v, sde, pixels = 0.09, photographs.SDE, {"dim": (2, 3), "keepdim": True}
    y = torch.randn(2, 3, 8, 12, dtype=torch.float64)

    def one_colour(x, t):
        r2 = sde.sigma(t) ** 2
        n = x.shape[2] * x.shape[3]
        return (x.mean(**pixels) * v / (v + r2 / n) - x) / r2

    for sd in photographs.NOISE:
        score = counted(one_colour)
        got = run(tmp_path, score).estimate(y, sd)
        assert score.calls == 16
        assert float((got - y.mean(**pixels) * v / (v + sd**2 / 96)).abs().max()) < 1e-9
        white = run(tmp_path, gaussian(0.25)).estimate(y, sd)
        assert float((white - both_scales(y, sd)).abs().max()) < 1e-9


def test_two_scales_have_the_mean_of_what_both_say_of_means():
    """Errors a of the fine estimate's level, b of the coarse one's, and c of a pattern without means."""
    x, pattern = ramp(), torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(12, 12)
    got = photos.two_scales(x + 0.3 + 0.2 * pattern, photos.halved(x) - 0.1)
    assert float((got - (x + 0.1 + 0.2 * pattern)).abs().max()) < 1e-12
    bump = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    bump[..., 1, 1] = 2.0  # half of it arrives, linearly: 9/16 where it is, 1/16 at the far corner of its neighbours
    got = photos.two_scales(torch.zeros(1, 1, 8, 8, dtype=torch.float64), bump)
    assert got[0, 0, 1:5, 1:5].diag().tolist() == pytest.approx([1 / 16, 9 / 16, 9 / 16, 1 / 16], abs=1e-12)
    assert float(got.sum()) == pytest.approx(4.0)
    with pytest.raises(ValueError, match=r"must be even, got \(1, 3, 24, 23\)"):
        photos.halved(x[..., 1:])


def test_noise_follows_from_seed_and_stream(tmp_path):
    x = torch.zeros(2, 3, 4, 4)
    a, b, c, d = (run(tmp_path, seed=s).noise(k, 2)(x) for s, k in ((0, 0), (0, 0), (1, 0), (0, 1)))
    assert torch.equal(a, b)
    assert not any(torch.equal(a, v) for v in (c, d))


def test_an_estimate_is_held_to_a_pictures_range():
    x, t = torch.linspace(-3, 3, 48, dtype=torch.float64).reshape(1, 3, 4, 4), torch.tensor(0.5, dtype=torch.float64)
    score, sde = gaussian(0.5), photographs.SDE
    got = denoised(photographs.bounded(score)(x, t), x, t, sde)
    assert float((got - denoised(score(x, t), x, t, sde).clamp(-1, 1)).abs().max()) < 1e-12


@pytest.mark.parametrize("task", ["super_resolution", "inpainting"])
def test_samples_keep_to_what_was_measured_and_are_held_against_the_rival(task, tmp_path, monkeypatch):
    """Of two like crops; the noise of the measurement is that of the run."""
    x = (0.5 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))).clamp(-0.9, 0.9)
    mine, seen = run(tmp_path, gaussian(0.25), x=x.repeat(2, 1, 1, 1)), []
    monkeypatch.setattr(photographs, "against", lambda *args: seen.append(args))
    getattr(photographs, task)(mine)
    _, _, _, rival, samples, *where = seen[0]
    sd = photographs.MEASURED
    if task == "super_resolution":
        y = torch.nn.functional.avg_pool2d(mine.x, 2)
        y = y + sd * mine.noise(10, 2)(y)
        of_samples = torch.nn.functional.avg_pool2d(samples.flatten(0, 1), 2).unflatten(0, (2, -1))
        assert float((rival - photos.bicubic(y, 2)).abs().max()) < 1e-5
    else:
        known = ~where[0]
        assert 0.2 < float(known.float().mean()) < 0.3
        y, of_samples = rival[..., known], samples[..., known]
        assert float((y - mine.x[..., known]).square().mean().sqrt()) == pytest.approx(sd, rel=0.1)
        given = torch.zeros_like(rival)
        given[..., known] = y
        assert torch.equal(rival, photos.linear_interpolation(given, known))
    assert float((of_samples - y[:, None]).square().mean().sqrt()) < 3 * sd
    free = (samples[0] - samples[1]).square().mean((1, 2, 3)).sqrt()
    assert float(free.min()) > 0.2


def test_a_model_is_taken_up_again_if_it_was_trained_as_long_from_the_same_seed(tmp_path, capsys):
    seen = [torch.rand(3, 20, 20)]

    def trained(seed, seconds):
        args = argparse.Namespace(model=None, out=tmp_path, seed=seed)
        spent = photographs.trained(seen, args, seconds, torch.device("cpu"))[1]
        return "reusing" in capsys.readouterr().out, spent

    reused, spent = trained(0, 0.2)  # a busy machine spends more than it was asked for
    assert not reused
    assert [trained(0, spent)[0], trained(0, spent / 2)[0], trained(0, spent + 0.1)[0]] == [True, True, False]
    assert not trained(1, 0.1)[0]


def test_denoising_is_claimed_over_all_strips_with_a_weight_for_each(tmp_path, capsys, monkeypatch):
    """A rival that shrinks, so that two strips want two weights: 1/(1 + w) = mean(x y)/mean(y^2)."""
    monkeypatch.setattr(photos, "total_variation", lambda y, w: y / (1 + w))
    x = stripes()
    x[1] *= 0.4
    mine = run(tmp_path, gaussian(0.25), strips=x)
    claims = photographs.denoising(mine)
    lines = capsys.readouterr().out.splitlines()[1:]
    for k, (sd, claim, line) in enumerate(zip(photographs.NOISE, claims, lines, strict=True)):
        y = x + sd * mine.noise(k, 2)(x)
        error = [10 ** (-photos.best_total_variation(y[i : i + 1], x[i : i + 1], sd)[2] / 10) for i in range(2)]
        tv, ours = -10 * math.log10(sum(error) / 2), photos.psnr(both_scales(y, sd), x)
        assert claim.value == pytest.approx(ours - tv, abs=1e-4)
        assert (claim.sense, claim.limit) == (">=", 2.5)
        assert f"at {sd:g}:" in claim.claim
        figures = [float(v) for v in line.replace(";", "").split()]
        assert figures[:4] == pytest.approx([sd, photos.psnr(y, x), tv, ours], abs=0.006)
        assert figures[4:] == pytest.approx(
            [v for i in range(2) for v in (photos.psnr(y[i : i + 1], x[i : i + 1]), -10 * math.log10(error[i]),
             photos.psnr(both_scales(y, sd)[i : i + 1], x[i : i + 1]))], abs=0.006)  # fmt: skip


def test_the_mean_of_samples_is_held_against_its_rival(tmp_path, capsys):
    """Errors 0.4 of the rival, 0.3 and -0.1 of two samples, hence 0.1 of their mean; elsewhere all is wrong."""
    x = torch.zeros(2, 3, 4, 4)
    where = torch.zeros(4, 4, dtype=torch.bool)
    where[1:3] = True
    rival, samples = torch.full_like(x, 0.4), torch.stack([x + 0.3, x - 0.1], 1)
    claim = photographs.against(run(tmp_path, x=x), "task", "rival", rival, samples)
    assert claim.value == pytest.approx(20 * math.log10(4), abs=1e-4)
    assert (claim.sense, claim.limit) == (">=", 0)
    told = "task: rival 13.98 dB, one sample 16.48, mean of 2 26.02\n"
    assert capsys.readouterr().out == told
    rival[..., ~where], samples[..., ~where] = 0.0, 0.9
    inside = photographs.against(run(tmp_path, x=x), "task", "rival", rival, samples, where)
    assert inside.value == pytest.approx(claim.value, abs=1e-4)
    assert capsys.readouterr().out == told


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

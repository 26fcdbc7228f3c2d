"""Cutouts against crops made by hand, exact distributions, and images whose transforms are known."""

import math

import pytest
import torch
from torch.nn import functional as F

from guidance import cutouts
from guidance.cutouts import boxes, fit

D64 = torch.float64
SIZE = (8, 8)


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=D64)


def ramp(h, w, gy, gx):
    """The linear image gy y + gx x in pixels, about its middle."""
    y, x = torch.meshgrid(
        torch.arange(h, dtype=D64) - (h - 1) / 2, torch.arange(w, dtype=D64) - (w - 1) / 2, indexing="ij"
    )
    return (gy * y + gx * x)[None, None]


def middle(view):
    """Gradient (y, x) and value in the middle, where no edge has come in."""
    h, w = view.shape[2:]
    part = view[0, 0, h // 4 : h - h // 4, w // 4 : w - w // 4]
    gy, gx = part.diff(dim=0), part.diff(dim=1)
    assert gy.std() < 1e-9
    assert gx.std() < 1e-9  # still linear
    return float(gy.mean()), float(gx.mean()), float(part.mean())


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_sides_follow_the_power_law_and_places_are_uniform(power):
    """P(side <= k) = ((k - smallest)/(1 - smallest))^(1/power); Kolmogorov's bound at 1e-3."""
    n = 4000
    draw = torch.tensor(boxes(n, 0.3, power, torch.Generator().manual_seed(1)), dtype=D64)
    u = torch.stack([((draw[:, 0] - 0.3) / 0.7) ** (1 / power), draw[:, 1], draw[:, 2]])
    steps = torch.arange(1, n + 1, dtype=D64) / n
    for row in u:
        assert (row.sort().values - steps).abs().max() < 1.95 / math.sqrt(n)
    corr = torch.corrcoef(u)
    assert (corr - torch.eye(3)).abs().max() < 4 / math.sqrt(n)


@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_a_crop_is_cut_by_hand(size):
    """Overview first, then crops of the shape that CLIP sees, of the same numbers."""
    x = images(2, 3, 20, 34)
    got = cutouts(3, overview=1, smallest=0.4, power=2.0, seed=7)(x, size)
    assert got.shape == (8, 3, *size)
    scale = min(size[0] / 20, size[1] / 34)
    h, w = round(20 * scale), round(34 * scale)
    whole = F.interpolate(x, size=(h, w), mode="bicubic", antialias=True)
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    frame = torch.zeros(2, 3, *size, dtype=D64)
    frame[:, :, top : top + h, left : left + w] = whole
    torch.testing.assert_close(got[:2], frame)
    largest = min(20 / size[0], 34 / size[1])
    for k, (side, y, z) in enumerate(boxes(3, 0.4, 2.0, torch.Generator().manual_seed(7))):
        h, w = round(side * largest * size[0]), round(side * largest * size[1])
        i, j = round(y * (20 - h)), round(z * (34 - w))
        crop = F.interpolate(x[:, :, i : i + h, j : j + w], size=size, mode="bicubic", antialias=True)
        torch.testing.assert_close(got[2 * k + 2 : 2 * k + 4], crop)


def test_resizing_is_antialiased_and_keeps_the_shape():
    board = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=D64).repeat(16, 16)[None, None]
    assert (cutouts(overview=1)(board, SIZE)[0, 0, 1:-1, 1:-1] - 0.5).abs().max() < 0.02
    wide = fit(torch.ones(1, 1, 10, 20, dtype=D64), SIZE, fill=0.25)
    assert (wide[:, :, 2:6] - 1).abs().max() < 1e-12
    assert (wide[:, :, [0, 1, 6, 7]] == 0.25).all()


KNOBS = {"overview": 1, "smallest": 0.5, "rotate": 20.0, "shift": 0.2, "zoom": 0.2, "noise": 0.1}


def test_a_seed_makes_a_function_and_a_generator_fresh_draws():
    x = images(3, 1, 16, 16)
    fixed = cutouts(4, seed=3, **KNOBS)
    assert torch.equal(fixed(x, SIZE), fixed(x, SIZE))
    assert (fixed(x, SIZE) - cutouts(4, seed=4, **KNOBS)(x, SIZE)).abs().max() > 0.05
    fresh = cutouts(4, seed=torch.Generator().manual_seed(3), **KNOBS)
    first, second = fresh(x, SIZE), fresh(x, SIZE)
    assert torch.equal(first, fixed(x, SIZE))
    assert (first - second).abs().max() > 0.05
    again = cutouts(4, seed=torch.Generator().manual_seed(3), **KNOBS)
    assert torch.equal(torch.cat([again(x, SIZE), again(x, SIZE)]), torch.cat([first, second]))


def test_a_sample_does_not_depend_on_its_mates():
    x = images(3, 1, 16, 16)
    views = cutouts(4, seed=3, **KNOBS)
    together = views(x, SIZE).unflatten(0, (5, 3))
    for b in range(3):
        torch.testing.assert_close(together[:, b], views(x[b : b + 1], SIZE), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), [(24, 24), (24, 40)])
def test_a_linear_image_tells_what_was_done_to_it(h, w):
    """Turning a ramp turns its gradient and keeps its length; zooming divides it; shifting adds to the value."""
    angles, zooms, shifts = [], [], []
    for seed in range(60):
        x = ramp(h, w, 0.3, 0.4)
        gy, gx, value = middle(cutouts(overview=1, rotate=10.0, seed=seed)(x, (h, w)))
        assert abs(math.hypot(gy, gx) - 0.5) < 1e-9
        assert abs(value) < 1e-9
        angles.append(math.degrees(math.atan2(gy, gx) - math.atan2(0.3, 0.4)))
        gy, gx, value = middle(cutouts(overview=1, zoom=0.2, seed=seed)(x, (h, w)))
        assert abs(gy / gx - 0.75) < 1e-9
        assert abs(value) < 1e-9
        zooms.append(0.5 / math.hypot(gy, gx))
        gy, gx, value = middle(cutouts(overview=1, shift=0.1, seed=seed)(ramp(h, w, 0.0, 1.0), (h, w)))
        assert abs(gx - 1) < 1e-9
        shifts.append(value / w)
        across = middle(cutouts(overview=1, shift=0.1, seed=seed)(ramp(h, w, 1.0, 0.0), (h, w)))[2]
        assert abs(across / h) < 0.1
    for found, low, high in ((angles, -10, 10), (zooms, 0.8, 1.2), (shifts, -0.1, 0.1)):
        assert low - 1e-6 <= min(found) < low + 0.15 * (high - low)
        assert high - 0.15 * (high - low) < max(found) <= high + 1e-6


def test_noise_has_its_deviation_and_is_the_batch_s():
    x = images(2, 3, 64, 64)
    plain, noisy = (cutouts(overview=2, noise=k, seed=5)(x, (64, 64)) for k in (0.0, 0.3))
    z = ((noisy - plain) / 0.3).unflatten(0, (2, 2))
    torch.testing.assert_close(z[:, 0], z[:, 1])  # the same for every sample,
    assert (z[0, 0] - z[1, 0]).abs().max() > 1  # another for every view
    n = z[:, 0].numel()
    assert abs(float(z[:, 0].mean())) < 4 / math.sqrt(n)
    assert abs(float(z[:, 0].square().mean()) - 1) < 4 * math.sqrt(2 / n)


def test_views_are_linear_and_differentiable():
    """Without noise <V a, b> = <a, V' b>, V' by autograd; under torch.func too."""
    views = cutouts(3, seed=2, **{**KNOBS, "noise": 0.0})
    a, c = images(2, 1, 16, 20), images(4, 1, 16, 20)[2:]
    torch.testing.assert_close(views(2 * a - 3 * c, SIZE), 2 * views(a, SIZE) - 3 * views(c, SIZE))
    out, pull = torch.func.vjp(lambda y: views(y, SIZE), a)
    b = images(*out.shape) - 0.3
    assert abs(float((out * b).sum() - (a * pull(b)[0]).sum())) < 1e-9


def test_what_is_wrong_is_told():
    for match, knobs in (
        ("not both 0, got 0 and 0", {}),
        ("not both 0, got -1 and 2", {"n": -1, "overview": 2}),
        (r"smallest must lie in \(0, 1\]", {"n": 1, "smallest": 0.0}),
        ("power be positive", {"n": 1, "power": 0.0}),
        ("must be >= 0, zoom in", {"n": 1, "rotate": -1.0}),
        ("must be >= 0, zoom in", {"n": 1, "zoom": 1.0}),
    ):
        with pytest.raises(ValueError, match=match):
            cutouts(**knobs)

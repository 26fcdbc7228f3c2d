"""CLIP guidance on a tiny open_clip model: formulas recomputed by hand, gradients by differences."""

import json

import pytest
import torch
from torch.nn import functional as F

import guidance
from experiments.digits_clip import config
from scoresde import VP, denoised, gaussian
from scoresde.types import number

open_clip = pytest.importorskip("open_clip")
from safetensors.torch import save_file  # noqa: E402

MEAN, STD = (0.2, 0.5, 0.7), (0.3, 0.25, 0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random CLIP of 8 x 8 images, saved as open_clip's own folder, with a normalisation of its own."""
    torch.manual_seed(0)
    cfg = config((8, 8))
    cfg["preprocess_cfg"] |= {"mean": list(MEAN), "std": list(STD)}
    path = tmp_path_factory.mktemp("clip")
    model = open_clip.CLIP(**cfg["model_cfg"])
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps(cfg))
    return path


@pytest.fixture(scope="module")
def clip(folder):
    return guidance.load_clip(str(folder))


def images(n=3, channels=1, size=8):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def embed(clip, x):
    """The image embedding, written out: [-1, 1] to [0, 1], the model's own mean and std, unit length."""
    model = clip[0]
    x = ((x + 1) / 2).expand(-1, 3, -1, -1)
    x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    u = model.encode_image(x)
    return u / u.norm(dim=1, keepdim=True)


def text(clip, prompt):
    v = clip[0].encode_text(clip[1]([prompt]))
    return v / v.norm()


def test_cosine_and_spherical_energy_are_their_formulas(clip):
    x, prompts = images(), {"a bold seven": 2.0, "a thin one": -0.5}
    u = embed(clip, x)
    cosine = sum(w * (1 - (u * text(clip, p)).sum(1)) for p, w in prompts.items())
    torch.testing.assert_close(guidance.clip_energy(*clip, prompts)(x), cosine, rtol=1e-5, atol=1e-6)
    angle = [torch.acos((u * text(clip, p)).sum(1).clamp(-1, 1)) for p in prompts]
    spherical = sum(w * a**2 / 2 for a, w in zip(angle, prompts.values(), strict=True))  # |u-v|/2 = sin(angle/2)
    E = guidance.clip_energy(*clip, prompts, distance="spherical")
    torch.testing.assert_close(E(x), spherical, rtol=1e-4, atol=1e-5)


def test_colour_and_grey_of_equal_channels_agree(clip):
    E = guidance.clip_energy(*clip, ["a seven"])
    torch.testing.assert_close(E(images()), E(images().expand(-1, 3, -1, -1)))


def test_resizing_is_differentiable_and_antialiased(clip):
    big = images(2, 3, 20)
    E = guidance.clip_energy(*clip, ["a seven"])
    small = F.interpolate((big + 1) / 2, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(E(big), E(small * 2 - 1), rtol=1e-5, atol=1e-6)


def test_cutouts_average_over_crops_and_repeat(clip):
    x = images(2, 1, 16)
    E = guidance.clip_energy(*clip, ["a seven"], cutouts=4, seed=3)
    torch.testing.assert_close(E(x), E(x), rtol=0, atol=0)  # a function
    assert (E(x) - guidance.clip_energy(*clip, ["a seven"], cutouts=4, seed=4)(x)).abs().max() > 1e-4
    whole = guidance.clip_energy(*clip, ["a seven"], cutouts=5, smallest=1.0)  # every crop is the image
    torch.testing.assert_close(whole(x), guidance.clip_energy(*clip, ["a seven"])(x), rtol=1e-5, atol=1e-6)


def test_a_cutout_of_a_wide_image_is_a_square_inside_it(clip):
    """One crop, cut by hand from the same three numbers."""
    from guidance.clip import _boxes

    x = torch.rand(2, 1, 12, 20, generator=torch.Generator().manual_seed(2)) * 2 - 1
    side, top, left = _boxes(1, 0.5, 7)[0]
    n = round(side * 12)
    i, j = round(top * (12 - n)), round(left * (20 - n))
    crop = F.interpolate((x[:, :, i : i + n, j : j + n] + 1) / 2, size=(8, 8), mode="bicubic", antialias=True)
    E = guidance.clip_energy(*clip, ["a seven"])
    one = guidance.clip_energy(*clip, ["a seven"], cutouts=1, seed=7)
    torch.testing.assert_close(one(x), E(crop * 2 - 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cutouts", [0, 2])
def test_guided_score_is_the_numerical_gradient(clip, cutouts):
    """Through denoiser, crops and CLIP, in float32: central differences along random directions."""
    sde, t = VP(), number(0.4)
    s = gaussian(torch.zeros(1, 8, 8), var=0.5).score(sde)
    E = guidance.clip_energy(*clip, ["a bold seven"], cutouts=cutouts)
    x = images(2)
    grad = (s(x, t) - guidance.energy(s, sde, E, 1.0)(x, t)).double()
    for k in range(3):
        v = torch.randn(x.shape, generator=torch.Generator().manual_seed(k))
        h = 2e-2
        up, down = (E(denoised(s(y, t), y, t, sde)) for y in (x + h * v, x - h * v))
        numeric = ((up - down) / (2 * h)).double()
        exact = (grad * v).flatten(1).sum(1)
        assert (numeric - exact).abs().max() < 0.02 * grad.flatten(1).norm(dim=1).max()


def test_guidance_moves_the_denoised_image_towards_the_prompt(clip):
    sde, t = VP(), number(0.4)
    s = gaussian(torch.zeros(1, 8, 8), var=0.5).score(sde)
    E = guidance.clip_energy(*clip, ["a bold seven"])
    x = images(4)
    before = E(denoised(s(x, t), x, t, sde))
    for through in (True, False):
        g = guidance.energy(s, sde, E, 0.5, through=through)
        assert (E(denoised(g(x, t), x, t, sde)) < before).all()


def test_what_is_wrong_is_told(clip, folder):
    with pytest.raises(ValueError, match=r"pass mean=... and std="):
        guidance.load_clip("ViT-B-32", str(folder / "open_clip_model.safetensors"))
    with pytest.raises(ValueError, match="at least one prompt"):
        guidance.clip_energy(*clip, [])
    with pytest.raises(ValueError, match="unknown distance 'euclid'"):
        guidance.clip_energy(*clip, ["a"], distance="euclid")
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\); decode latents first"):
        guidance.clip_energy(*clip, ["a"])(torch.zeros(2, 4, 8, 8))

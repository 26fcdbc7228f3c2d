"""CLIP guidance on a tiny open_clip model: formulas recomputed by hand, gradients by differences."""

import argparse
import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

import guidance
from experiments.digits_clip import config
from samplers import grids, heun
from scoresde import VP, Streams, denoised, gaussian, prior_sample
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


def test_softmax_energy_is_the_log_probability_of_a_mixture_of_prompts(clip):
    """-log sum_i w_i p(i | x0) over all prompts told; weight 0 is as good as `against`."""
    x, model = images(), clip[0]
    names = ["a bold seven", "a thin one", "the digit four"]
    u = embed(clip, x)
    p = torch.softmax(model.logit_scale.exp() * torch.stack([(u * text(clip, n)).sum(1) for n in names], 1), 1)
    assert p.std(0).min() > 1e-4

    def E(prompts, against=()):
        return guidance.clip_energy(*clip, prompts, against=against, distance="softmax")(x)

    torch.testing.assert_close(E(names[:1], names[1:]), -p[:, 0].log(), rtol=1e-4, atol=1e-5)
    mixed = -(0.7 * p[:, 0] + 0.3 * p[:, 2]).log()
    weights = {names[0]: 0.7, names[2]: 0.3}
    torch.testing.assert_close(E(weights, names[1:2]), mixed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(E({**weights, names[1]: 0.0}), mixed, rtol=1e-4, atol=1e-5)
    zero = guidance.clip_energy(*clip, {**weights, names[1]: 0.0}, distance="softmax")
    grads = [
        torch.func.grad(lambda y, e=e: e(y).sum())(x) for e in (zero, lambda y: E_of(clip, weights, names[1:2])(y))
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(E(names), torch.zeros(3), rtol=0, atol=1e-5)  # nothing else can be: no pull


def E_of(clip, prompts, against=(), **knobs):
    return guidance.clip_energy(*clip, prompts, against=against, distance="softmax", **knobs)


@pytest.mark.parametrize("distance", ["cosine", "spherical", "softmax"])
def test_an_image_is_a_prompt_like_a_text(clip, distance):
    """By its embedding; an image is nearest to itself, where the gradient vanishes and is no NaN."""
    x, goal = images(), images(5)[4]
    v = embed(clip, goal[None])
    cos = (embed(clip, x) * v).sum(1)
    against = ["a seven"] if distance == "softmax" else []
    E = guidance.clip_energy(*clip, {goal: 2.0}, distance=distance, against=against)
    if distance == "softmax":
        k = clip[0].logit_scale.exp()
        want = -torch.log_softmax(k * torch.stack([cos, (embed(clip, x) * text(clip, "a seven")).sum(1)], 1), 1)[:, 0]
        torch.testing.assert_close(E(x), want - torch.tensor(2.0).log(), rtol=1e-3, atol=1e-4)
        return
    want = 2 * (1 - cos) if distance == "cosine" else torch.acos(cos) ** 2
    torch.testing.assert_close(E(x), want, rtol=1e-3, atol=1e-5)
    assert float(E(goal[None])) < 1e-5 < float(E(x).min())
    grad = torch.func.grad(lambda y: E(y).sum())(goal[None])
    assert torch.isfinite(grad).all()
    assert grad.norm() < 1e-2 * torch.func.grad(lambda y: E(y).sum())(x).norm()
    both = guidance.clip_energy(*clip, ["a seven", goal], distance=distance)(x)
    one = guidance.clip_energy(*clip, ["a seven"], distance=distance)(x)
    torch.testing.assert_close(both, one + E(x) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 30), (40, 24), (20, 50)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_the_model_sees_what_its_own_preprocessing_makes(mode, shape):
    """open_clip's transform of a PIL image, in 8 bits; ours of the same numbers, in floats."""
    image = pytest.importorskip("PIL.Image")
    from guidance.clip import _preprocess

    low = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(1))
    smooth = F.interpolate(low[None], size=shape, mode="bicubic", align_corners=True).clamp(0, 1)
    pixels = (smooth[0] * 255).round().to(torch.uint8)
    pre = {"size": (16, 16), "mean": MEAN, "std": STD, "resize_mode": mode, "fill_color": 51}
    theirs = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**pre), is_train=False)
    want = theirs(image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())))

    @dataclass
    class Eyes:
        preprocess_cfg: dict

    ours = _preprocess(Eyes(pre), torch.zeros(1))(pixels[None] / 255, None)[0]
    gap = ((ours - want) * torch.tensor(STD)[:, None, None]).abs()
    assert gap.max() < 0.05  # of the range; a wrong mean is 0.2 off, another crop 0.3
    assert gap.mean() < 0.012


def test_cutouts_average_over_views(clip):
    x, views = images(2, 1, 16), guidance.cutouts(4, overview=1, seed=3, rotate=5.0, noise=0.05)
    E = guidance.clip_energy(*clip, ["a seven"], cutouts=views)
    torch.testing.assert_close(E(x), E(x), rtol=0, atol=0)  # a function
    alone = guidance.clip_energy(*clip, ["a seven"])
    each = [alone(v * 2 - 1) for v in views(((x + 1) / 2).expand(-1, 3, -1, -1), (8, 8)).chunk(5)]
    torch.testing.assert_close(E(x), torch.stack(each).mean(0), rtol=1e-4, atol=1e-5)
    assert torch.stack(each).std(0).min() > 1e-4
    fresh = guidance.clip_energy(*clip, ["a seven"], cutouts=guidance.cutouts(4, seed=torch.Generator()))
    assert (fresh(x) - fresh(x)).abs().max() > 1e-5
    torch.testing.assert_close(E(x)[1:], E(x[1:]), rtol=1e-5, atol=1e-6)


def test_several_clips_are_a_total(clip, folder):
    """An ensemble of CLIPs, and the losses of the image beside them."""
    x = images()
    E = [guidance.clip_energy(*c, ["a seven"], distance=d) for c, d in ((clip, "cosine"), (clip, "spherical"))]
    both = guidance.total([*E, guidance.total_variation], [0.5, 0.5, 3.0])
    torch.testing.assert_close(both(x), (E[0](x) + E[1](x)) / 2 + 3 * guidance.total_variation(x))


def test_mixed_precision_is_only_inside_clip(clip):
    """bfloat16 within its rounding of the float32 energy; energy and gradient come in the dtype of x0."""
    x = images()
    full, half = (guidance.clip_energy(*clip, ["a bold seven", "a one"], autocast=k) for k in (None, torch.bfloat16))
    grads = [torch.func.grad(lambda y, E=E: E(y).sum())(x) for E in (full, half)]
    assert half(x).dtype == grads[1].dtype == torch.float32
    assert 0 < (full(x) - half(x)).abs().max() < 0.02
    cosine = F.cosine_similarity(grads[0].flatten(1), grads[1].flatten(1))
    assert cosine.min() > 0.97
    assert full(x.double()).dtype == torch.float64
    assert torch.func.grad(lambda y: full(y).sum())(x.double()).dtype == torch.float64


def test_a_latent_model_is_guided_by_composition_with_its_decoder(clip):
    """E(decode(z0)): for a linear decoder W the gradient in z is W' times that of the image."""
    sde, t = VP(), number(0.4)
    W = torch.randn(12, 64, generator=torch.Generator().manual_seed(0)) / 4
    z = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    s = gaussian(torch.zeros(12), var=0.5).score(sde)

    def decode(z0):
        return (z0 @ W).reshape(-1, 1, 8, 8)

    E = guidance.clip_energy(*clip, ["a bold seven"])
    push = s(z, t) - guidance.energy(s, sde, lambda z0: E(decode(z0)), 1.0)(z, t)
    a, sig = float(sde.alpha(t)), float(sde.sigma(t))
    slope = a * 0.5 / (a * a * 0.5 + sig * sig)
    image = decode(slope * z).requires_grad_()
    by_hand = slope * torch.autograd.grad(E(image).sum(), image)[0].flatten(1) @ W.T
    torch.testing.assert_close(push, by_hand, rtol=1e-3, atol=1e-5)
    assert by_hand.norm() > 1e-3
    with pytest.raises(ValueError, match="decode latents first"):
        guidance.energy(s, sde, E)(z, t)


def test_a_bare_file_is_loaded_with_the_normalisation_it_was_trained_with(clip, folder, tmp_path):
    """open_clip's named way would take OpenAI's mean and std without a word; here it is another energy, and refused."""
    name = "tiny-digits-for-a-test"
    cfg = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / f"{name}.json").write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path)
    file = str(folder / "open_clip_model.safetensors")
    x = images()
    named, _ = guidance.load_clip(name, file, mean=MEAN, std=STD)
    same = guidance.clip_energy(named, clip[1], ["a seven"])(x)
    torch.testing.assert_close(same, guidance.clip_energy(*clip, ["a seven"])(x), rtol=1e-5, atol=1e-6)
    silent = open_clip.create_model(name, pretrained=file).eval()
    assert (guidance.clip_energy(silent, clip[1], ["a seven"])(x) - same).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"pass mean=... and std="):
        guidance.load_clip(name, file, mean=MEAN)


def test_a_folder_that_does_not_say_its_normalisation_is_asked_for_it(clip, folder, tmp_path):
    """Given, they are used; in part or not at all, open_clip would take OpenAI's for the rest."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "open_clip_config.json").read_text())
    for left in ({}, {"mean": config["preprocess_cfg"]["mean"]}):
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": left}))
        for name in (str(tmp_path), f"local-dir:{tmp_path}"):
            with pytest.raises(ValueError, match="does not say how its images were normalised"):
                guidance.load_clip(name)
        told, _ = guidance.load_clip(str(tmp_path), mean=MEAN, std=STD)
        same = guidance.clip_energy(told, clip[1], ["a seven"])(images())
        torch.testing.assert_close(same, guidance.clip_energy(*clip, ["a seven"])(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cutouts", [None, guidance.cutouts(2)], ids=["whole", "cutouts"])
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
    with pytest.raises(ValueError, match="ViT-B-32 without pretrained would be a network of random numbers"):
        guidance.load_clip("ViT-B-32")
    with pytest.raises(FileNotFoundError, match=r"it has no open_clip_config\.json"):
        guidance.load_clip(str(folder.parent))
    for match, prompts, knobs in (
        ("at least one prompt", [], {}),
        (r"write \['a seven'\] for one text", "a seven", {}),
        (r"write \['a seven'\] for one text", ["a"], {"against": "b", "distance": "softmax"}),
        ("given twice in", ["a", "b", "a"], {}),
        (r"weights must be finite, got \[nan\]", {"a": float("nan")}, {}),
        ("unknown distance 'euclid'", ["a"], {"distance": "euclid"}),
        ("give those prompts a weight < 0", ["a"], {"against": ["b"]}),
        ("at least two prompts in all", ["a"], {"distance": "softmax"}),
        (r"weights >= 0, not all 0, got \[-1.0, 2.0\]", {"a": -1.0, "b": 2.0}, {"distance": "softmax"}),
        (r"not all 0, got \[0.0\]", {"a": 0.0}, {"distance": "softmax", "against": ["b"]}),
        ("low < high, got 1 and 1", ["a"], {"low": 1, "high": 1}),
        (r"\(1, 4, 8, 8\); decode latents first", [torch.zeros(4, 8, 8)], {}),
    ):
        with pytest.raises(ValueError, match=match):
            guidance.clip_energy(*clip, prompts, **knobs)
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\); decode latents first"):
        guidance.clip_energy(*clip, ["a"])(torch.zeros(2, 4, 8, 8))


GOALS = {
    "CLIP-guided samples read as prompted": ">= 0.97",
    "their Frechet distance - the unguided": "<= 10",
    "network calls a sample": "<= 100",
    "cheap way: accuracy lost": "<= 0.03",
    "cheap way: time / time through the network": "<= 0.75",
    "weighted prompts: least rise of the share a quarter": ">= 0.1",
    "weighted prompts: share - weight, largest": "<= 0.1",
    "whole run, CPU seconds": "<= 300",
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A score network of a few steps, as the experiment loads it."""
    pytest.importorskip("sklearn")
    from experiments import quickstart
    from experiments.digits import load

    out = tmp_path_factory.mktemp("network")
    args = argparse.Namespace(out=out, data=None, seed=0)
    return out, quickstart.trained(load(None, 0)[0], args, 0.2, torch.device("cpu"))[0]


def test_the_experiment_on_a_network_of_a_few_steps(quick, folder, tmp_path, capsys):
    from experiments import clip_guidance

    argv = ["--quick", "--model", str(quick[0] / "model.safetensors"), "--clip", str(folder), "--out", str(tmp_path)]
    claims = {c.claim: c for c in clip_guidance.main(argv)}
    assert {k: f"{c.sense} {c.limit:g}" for k, c in claims.items()} == GOALS
    assert claims["network calls a sample"].value == 2 * 2
    assert all((tmp_path / f"{p}.png").stat().st_size > 500 for p in ("samples", "others", "mixture", "gradient_0.5"))
    printed = capsys.readouterr().out
    assert len(re.findall(r"\d ± 0\.0 +4 +\d", printed)) == 3 + 6  # every rule, by its calls
    with pytest.raises(SystemExit):
        clip_guidance.main([*argv, "--seed", "1"])
    assert "give its --seed" in capsys.readouterr().err


def test_what_the_experiment_measures_is_what_it_says(quick, clip):
    """Samples and readings of two prompts recomputed with the library alone."""
    from experiments import clip_guidance
    from experiments.digits import Judge, load, to_levels
    from experiments.yardsticks import Features

    model, (data, held) = quick[1], load(None, 0)
    held = replace(held, names=held.names[3:5])
    judge, features = Judge(data), Features(data)
    setup = clip_guidance.Setup(model, clip, held, judge, features, torch.device("cpu"), each=3, steps=4)
    bar = tqdm(disable=True)
    texts = [f"a handwritten {name}" for name in held.names]
    ts, y = grids.karras(model.sde, 4, t_end=0.01), torch.arange(2).repeat_interleave(3)
    sd = {"sigma_data": model.sigma_data, "interval": (0.05, 8.0)}
    for rule, how in (
        (None, lambda E: model),
        (clip_guidance.exact(setup), lambda E: guidance.energy(model, model.sde, E, 6.0)),
        (clip_guidance.cheap(setup), lambda E: guidance.energy(model, model.sde, E, 12.0, through=False, **sd)),
        (clip_guidance.bare(setup, 0.1), lambda E: guidance.mpgd(model, model.sde, E, lambda r: 0.1 * r**2)),
    ):
        rows = []
        for c in range(2):
            E = E_of(clip, texts[c : c + 1], texts[:c] + texts[c + 1 :])
            z = Streams(1000 + c, 3)
            start = prior_sample(model.sde, torch.empty(3, 1, 8, 8), z)
            rows.append(heun(how(E), model.sde, start, ts, churn=4.0, noise=z))
        result, x = clip_guidance.prompted(setup, rule, 1, bar), torch.cat(rows)
        torch.testing.assert_close(result.x.flatten(0, 1), x, rtol=1e-4, atol=1e-3)
        right = (judge.svm.predict(to_levels(x, 17).flatten(1).double().numpy() / 16) == y.numpy()).mean()
        read = torch.stack([embed(clip, x) @ text(clip, n)[0] for n in texts], 1).argmax(1)
        assert result.right == pytest.approx(right)
        assert result.own == pytest.approx(float((read == y).float().mean()))
        assert result.distance == pytest.approx(features.frechet(to_levels(x, 17), held.x), rel=0.02)
        assert result.calls == 8

"""Energies of the x0-estimate and of the image: closed forms on Gaussian data, identities to 1e-12, calls counted."""

import math

import pytest
import torch

from guidance import (
    cfg,
    classifier,
    energy,
    gradient_picture,
    mpgd,
    out_of_range,
    stages,
    total,
    total_variation,
    universal,
)
from samplers import grids, heun
from scoresde import VE, VP, counted, denoised, gaussian, mixture
from scoresde.types import number

D64 = torch.float64
SDE = VP()
T = number(0.3)
A, S2 = float(SDE.alpha(T)), float(SDE.sigma(T) ** 2)
V = 0.25
G = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, generator=G, dtype=D64)
Y = torch.tensor([0.7, -0.4, 0.1], dtype=D64)
SCORE = gaussian(torch.zeros(3, dtype=D64), var=V).score(SDE)
SLOPE = A * V / (A**2 * V + S2)  # x0 = SLOPE x
X0 = SLOPE * X
TARGET = mixture(
    torch.ones(4), torch.randn(4, 3, generator=G, dtype=D64), var=torch.full((4, 3), 0.1), labels=torch.arange(4) // 2
)


def quadratic(x0):
    return ((x0 - Y) ** 2).sum(1) / 0.4


def wavy(x0):
    return torch.sin(2 * x0).sum(1) + x0[:, 0] ** 2


def close(a, b, tol=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tol * max(1.0, float(b.abs().max()))


def norm(v):
    return v.flatten(1).norm(dim=1)


@pytest.mark.parametrize("through", [True, False])
def test_a_linear_energy_on_gaussian_data_is_the_exact_tilt_at_every_noise(through):
    """exp(-<c, x0>) N(m, v) is N(m - v c, v)."""
    m, c = torch.tensor([0.3, -1.0, 0.5], dtype=D64), torch.tensor([1.0, 2.0, -0.7], dtype=D64)
    s, tilted = (gaussian(k, var=V).score(SDE) for k in (m, m - V * c))
    guided = energy(s, SDE, lambda x0: x0 @ c, 1.0, through=through, sigma_data=V**0.5)
    for t in (0.02, 0.3, 1.0):
        close(guided(X, number(t)), tilted(X, number(t)), 1e-10)


def test_a_classifier_of_clean_images_is_bayes_rule_as_the_noise_vanishes():
    s, wanted = TARGET.score(SDE), TARGET.given(1).score(SDE)
    guided = energy(s, SDE, lambda x0: -TARGET.class_log_prob(x0)[:, 1])
    small = number(1e-5)
    assert ((guided(X, small) - wanted(X, small)).abs() < 1e-3).all()
    close(classifier(s, lambda x, t: TARGET.class_log_prob(x, SDE, t)[:, 1])(X, T), wanted(X, T), 1e-9)
    assert (guided(X, T) - wanted(X, T)).abs().max() > 0.05  # the bias the docstring states


@pytest.mark.parametrize("through", [True, False])
def test_the_scale_free_knob(through):
    """normalize: the push is scale |s| long along the gradient, whatever unit E has; limit: no longer than that."""
    s = TARGET.score(SDE)
    plain = energy(s, SDE, wavy, 1.0, through=through)(X, T) - s(X, T)
    for unit in (1.0, 1e-6, 300.0):
        push = energy(s, SDE, lambda x0, k=unit: k * wavy(x0), 0.3, through=through, normalize=True)(X, T) - s(X, T)
        close(push, 0.3 * plain * (norm(s(X, T)) / norm(plain))[:, None], 1e-8)
    ratio = norm(plain) / norm(s(X, T))
    limit = float(ratio.median())
    push = energy(s, SDE, wavy, 1.0, through=through, limit=limit)(X, T) - s(X, T)
    close(push, plain * (limit / ratio).clamp(max=1)[:, None])
    assert 0 < (ratio > limit).sum() < 5
    close(energy(s, SDE, wavy, 1.0, through=through, limit=1e9)(X, T) - s(X, T), plain)
    close(energy(s, SDE, wavy, 1.0, limit=0.0)(X, T), s(X, T))
    flat = energy(s, SDE, lambda x0: 0 * x0.sum(1), 1.0, normalize=True, limit=0.5)
    close(flat(X, T), s(X, T))  # no gradient: no direction, no NaN


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_mpgd_and_universal_on_a_quadratic_energy(steps):
    """Gradient descent on |x0 - y|^2/(2 v): x0' - y = (1 - rate/v)^m (x0 - y), v = 0.2."""
    rate = 0.05
    moved = Y + (1 - rate / 0.2) ** steps * (X0 - Y)
    close(mpgd(SCORE, SDE, quadratic, rate, steps=steps)(X, T), (A * moved - X) / S2)
    forward = 1.7 * SLOPE * (X0 - Y) / 0.2
    both = universal(SCORE, SDE, quadratic, 1.7, steps=steps, rate=rate)
    close(both(X, T), SCORE(X, T) - forward + A / S2 * (moved - X0))
    close(universal(SCORE, SDE, quadratic, 1.7)(X, T), SCORE(X, T) - forward)
    backward = universal(SCORE, SDE, quadratic, 0.0, steps=steps, rate=rate)
    close(backward(X, T), (A * moved - X) / S2)
    half = mpgd(SCORE, SDE, quadratic, rate, steps=1, project=lambda x0: 0.5 * x0)
    close(half(X, T), (A * 0.5 * (Y + (1 - rate / 0.2) * (X0 - Y)) - X) / S2)


def test_weights_of_every_form_and_the_interval():
    w, ts = torch.tensor([0.0, 0.1, 0.2, -0.1, 0.3], dtype=D64), torch.linspace(0.1, 0.9, 5, dtype=D64)
    for rule in (
        lambda w, **k: mpgd(SCORE, SDE, wavy, w, steps=2, **k),
        lambda w, **k: universal(SCORE, SDE, wavy, w, steps=2, **k),
        lambda w, **k: energy(SCORE, SDE, wavy, w, normalize=True, limit=0.05, **k),
    ):
        together = rule(w)(X, ts)
        by_level = rule(lambda r: 0.1 * r / (1 + r))(X, ts)
        masked = rule(0.1, interval=(0.5, 10.0))(X, ts)
        for i in range(5):
            x, t = X[i : i + 1], ts[i]
            r = float(SDE.sigma(t) / SDE.alpha(t))
            close(together[i : i + 1], rule(float(w[i]))(x, t))
            close(by_level[i : i + 1], rule(0.1 * r / (1 + r))(x, t))
            close(masked[i : i + 1], rule(0.1)(x, t) if 0.5 <= r <= 10 else SCORE(x, t))
    assert mpgd(SCORE, SDE, wavy, 0.0) is SCORE
    assert universal(SCORE, SDE, wavy, 0.0) is SCORE


def test_stages_are_one_energy_at_a_time():
    other = lambda x0: x0[:, 1]  # noqa: E731
    r = float(torch.exp(-SDE.lam(T)))
    calls = counted(SCORE)
    for plan, E in (
        ([((0.0, r / 2), other), ((r / 2, 9.0), wavy)], wavy),
        ([((0.0, 2 * r), other), ((2 * r, 9.0), wavy)], other),
        ([((r, 9.0), other), ((0.0, r), wavy)], other),  # an interval begins with its low end and ends before its high
        ([((0.0, r / 2), other), ((2 * r, 9.0), wavy)], None),
    ):
        before = calls.calls
        got = stages(calls, SDE, plan, 0.7, normalize=True)(X, T)
        assert calls.calls == before + 1
        close(got, SCORE(X, T) if E is None else energy(SCORE, SDE, E, 0.7, normalize=True)(X, T))
    with pytest.raises(ValueError, match="one ends at sigma/alpha = 2, the next begins at 1"):
        stages(SCORE, SDE, [((1.0, 3.0), wavy), ((0.0, 2.0), wavy)])
    with pytest.raises(ValueError, match=r"low < high, got \(3.0, 1.0\)"):
        stages(SCORE, SDE, [((3.0, 1.0), wavy)])


def test_network_calls_and_gradients_are_as_told():
    asked = []

    def E(x0):
        asked.append(len(x0))
        return wavy(x0)

    for rule, gradients in (
        (lambda s: mpgd(s, SDE, E, 0.1, steps=3), 3),
        (lambda s: universal(s, SDE, E, 1.0), 1),
        (lambda s: universal(s, SDE, E, 1.0, steps=3), 3),
        (lambda s: universal(s, SDE, E, 0.0, steps=2), 2),
        (lambda s: energy(s, SDE, E, 1.0, normalize=True, limit=1.0), 1),
    ):
        asked.clear()
        score = counted(SCORE)
        rule(score)(X, T)
        assert (score.calls, len(asked)) == (1, gradients)
        outside = counted(SCORE)
        universal(outside, SDE, E, 1.0, steps=2, interval=(50.0, 60.0))(X, T)
        assert outside.calls == 1


def test_the_bare_gradient_at_x0_destroys_and_both_modes_of_energy_do_not():
    """N(0, v) tilted by exp(-<c, x0>) has mean -v c.  With the bare gradient, x0' = x0 - sigma^2 c, the flow from
    sigma_max ends at -c sqrt(v) (sqrt(v + sigma_max^2) - sqrt(v)) instead: as far off as the noise was high."""
    c, v = torch.tensor([0.5, -1.0, 0.2], dtype=D64), 0.49
    for top in (5.0, 50.0):
        sde = VE(sigma_min=0.002, sigma_max=top)
        s = gaussian(torch.zeros(3, dtype=D64), var=v).score(sde)
        E = lambda x0: x0 @ c  # noqa: E731
        ts = grids.karras(sde, 200)
        ends = {
            "through": energy(s, sde, E, 1.0),
            "cheap": energy(s, sde, E, 1.0, through=False, sigma_data=v**0.5),
            "bare": mpgd(s, sde, E, lambda r: r**2),
        }
        start = -c * v
        out = {k: heun(g, sde, start.repeat(1, 1), ts)[0] for k, g in ends.items()}
        assert (out["through"] - -v * c).abs().max() < 1e-3
        assert (out["cheap"] - -v * c).abs().max() < 1e-3
        far = -c * v**0.5 * ((v + top**2) ** 0.5 - v**0.5) + start * v**0.5 / (v + top**2) ** 0.5
        assert (out["bare"] - far).abs().max() < 2e-3 * top
        assert out["bare"].norm() > 1.2 * top * 0.5 * c.norm()


def test_rules_nest_with_each_other_and_under_autograd():
    """J of a nested rule by torch.func is its difference quotient."""
    inner = universal(cfg(TARGET.given(1).score(SDE), TARGET.score(SDE), 2.0), SDE, wavy, 0.5, steps=2)
    rule = energy(mpgd(inner, SDE, quadratic, 0.05), SDE, wavy, 0.3, normalize=True, limit=0.9)
    v = torch.randn(X.shape, generator=torch.Generator().manual_seed(1), dtype=D64)
    _, jvp = torch.func.jvp(lambda x: rule(x, T), (X,), (v,))
    h = 1e-6
    close(jvp, (rule(X + h * v, T) - rule(X - h * v, T)) / (2 * h), 1e-6)
    for i in range(5):
        close(rule(X, T)[i : i + 1], rule(X[i : i + 1], T))


def test_losses_of_the_image_by_hand():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(2), dtype=D64)
    tv, far = torch.zeros(2, dtype=D64), torch.zeros(2, dtype=D64)
    for b in range(2):
        for c in range(3):
            for i in range(4):
                for j in range(5):
                    p = float(x[b, c, i, j])
                    tv[b] += (float(x[b, c, i + 1, j]) - p) ** 2 / 60 if i < 3 else 0
                    tv[b] += (float(x[b, c, i, j + 1]) - p) ** 2 / 60 if j < 4 else 0
                    far[b] += max(p - 0.5, 0, -0.8 - p) ** 2 / 60
    close(total_variation(x), tv)
    close(out_of_range(x, -0.8, 0.5), far)
    assert (out_of_range(x.clamp(-1, 1)) == 0).all()
    grad = torch.func.grad(lambda y: out_of_range(y, -0.8, 0.5).sum())(x)
    close(grad, 2 * (x - x.clamp(-0.8, 0.5)) / 60)
    close(total([total_variation, out_of_range], [150.0, 50.0])(x), 150 * tv + 50 * out_of_range(x))
    close(total([total_variation, out_of_range])(x), (tv + out_of_range(x)) / 2)
    s = gaussian(torch.zeros(3, 4, 5, dtype=D64), var=V).score(SDE)
    x0 = denoised(s(x, T), x, T, SDE)
    smooth = energy(s, SDE, total([total_variation], [3.0]), 2.0)
    close(s(x, T) - smooth(x, T), 6.0 * SLOPE * torch.func.grad(lambda y: total_variation(y).sum())(x0))


def test_a_picture_of_the_gradient(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    x = torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(3), dtype=D64)
    s = gaussian(torch.zeros(1, 4, 6, dtype=D64), var=V).score(SDE)
    goal = torch.tensor([9.0] * 3 + [-9.0] * 3, dtype=D64)  # brighter on the left, darker on the right
    E = lambda x0: 0.5 * ((x0 - goal) ** 2).flatten(1).sum(1)  # noqa: E731
    for through in (True, False):
        x0, push = gradient_picture(s, SDE, E, x, T, through=through, sigma_data=0.7, file=tmp_path / "g.png")
        slope = SLOPE if through else A * 0.49 / (A**2 * 0.49 + S2)
        close(x0, SLOPE * x)
        close(push, -(S2 / A) * slope * (SLOPE * x - goal))
    guided = energy(s, SDE, E, 1.0, through=False, sigma_data=0.7)
    close(denoised(guided(x, T), x, T, SDE), x0 + push)
    with image.open(tmp_path / "g.png") as png:
        flat = torch.frombuffer(bytearray(png.convert("RGB").tobytes()), dtype=torch.uint8)
        rgb = flat.int().reshape(png.height, png.width, 3)
    red, blue = (rgb[..., 0] > rgb[..., 2] + 60), (rgb[..., 2] > rgb[..., 0] + 60)
    half = rgb.shape[1] // 2
    assert red[:, :half].sum() > 50 * red[:, half:].sum()
    assert blue[:, half:].sum() > 50 * blue[:, :half].sum()
    assert red.sum() > 500


def test_what_is_wrong_is_told():
    for match, call in (
        ("limit must be >= 0", lambda: energy(SCORE, SDE, wavy, limit=-1.0)),
        ("limit must be >= 0", lambda: energy(SCORE, SDE, wavy, limit=math.nan)),
        ("sigma_data must be positive", lambda: energy(SCORE, SDE, wavy, sigma_data=0.0)),
        ("steps must be at least 1, got 0", lambda: mpgd(SCORE, SDE, wavy, 1.0, steps=0)),
        ("steps must be >= 0, got -1", lambda: universal(SCORE, SDE, wavy, steps=-1)),
        ("rate must be positive", lambda: universal(SCORE, SDE, wavy, steps=1, rate=0.0)),
        ("rate must be positive", lambda: universal(SCORE, SDE, wavy, steps=1, rate=math.inf)),
        ("the weight must be finite", lambda: mpgd(SCORE, SDE, wavy, math.inf)),
        ("at least one energy", lambda: total([])),
        ("2 energies and 1 weights", lambda: total([wavy, wavy], [1.0])),
        (r"weights must be finite, got \[nan\]", lambda: total([wavy], [math.nan])),
        (r"got \(5, 3\)", lambda: total_variation(X)),
        ("low < high, got 1 and 1", lambda: out_of_range(X, 1, 1)),
        (r"images \(B, C, H, W\), got \(5, 3\)", lambda: gradient_picture(SCORE, SDE, wavy, X, T)),
    ):
        with pytest.raises(ValueError, match=match):
            call()

"""Every prediction against its definition, computed from x0 and eps."""

import pytest
import torch
from truth import F64, KINDS, SD, SDES, gaussian_score, marginal, prediction, rates, tensor, times

from scoresde import convert, denoised, velocity


def draw(name, t, shape=(3, 2)):
    """x0, eps, x and the exact value of each kind at t, () or (B,)."""
    sde, g = SDES[name], torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(shape, generator=g, dtype=F64) for _ in range(2))
    a, s, da, ds = (q.reshape(-1, *[1] * (len(shape) - 1)) for q in (sde.alpha(t), sde.sigma(t), *rates(sde, t)))
    x = a * x0 + s * eps
    return x, {kind: prediction(kind, x, x0, eps, a, s, da, ds) for kind in KINDS}, float((s / a).max()), float(a.min())


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("source", KINDS)
def test_all_pairs_near_both_ends_of_time(name, source):
    """36 conversions an SDE; what 16 digits leave of x0 at sigma/alpha = r (or eps at 1/r) sets the tolerance."""
    for t in times(name, 4):
        x, values, r, _ = draw(name, t)
        lost = max(r, 1 / r)
        for target in KINDS:
            got = convert(values[source], x, t, SDES[name], source, target, SD)
            size = values[target].abs().max().item()
            torch.testing.assert_close(got, values[target], rtol=1e-8, atol=1e-12 * lost * max(size, 1.0))
            back = convert(got, x, t, SDES[name], target, source, SD)
            size = max(1.0, values[source].abs().max().item())
            torch.testing.assert_close(back, values[source], rtol=1e-8, atol=1e-12 * lost * size)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 4), (3, 1, 4, 4), (3, 2, 2, 2, 2)])
def test_one_time_a_sample_and_any_rank(shape):
    t = tensor(0.2, 0.5, 0.9)
    for name in ("VP", "SubVP", "Straight"):
        x, values, *_ = draw(name, t, shape)
        for source in KINDS:
            got = convert(values[source], x, t, SDES[name], source, "v", SD)
            torch.testing.assert_close(got, values["v"], rtol=1e-8, atol=1e-9)


def test_denoised_is_tweedie():
    """(x + sigma^2 s)/alpha with a Gaussian's score is its posterior mean by Bayes."""
    for name, sde in SDES.items():
        t, x = tensor(0.3), tensor([[0.2], [-1.5]])
        a, s = sde.alpha(t), sde.sigma(t)
        want = (0.7 / 0.25 + a * x / s**2) / (1 / 0.25 + a**2 / s**2)  # precisions add
        got = denoised(gaussian_score(sde)(x, t), x, t, sde)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=name)


def test_velocity_is_the_flow():
    """`velocity` of the score and the conversion agree, and both are d/dt of the exact flow map of a Gaussian."""
    for name in ("VP", "SubVP", "VE", "Straight", "CosineVP"):
        sde, t, h = SDES[name], tensor(0.4), 1e-5
        m, v = marginal(sde, t)
        (m0, v0), (m1, v1) = marginal(sde, t - h), marginal(sde, t + h)
        x = m + 1.7 * v.sqrt().reshape(1, 1)
        want = ((m1 + 1.7 * v1.sqrt()) - (m0 + 1.7 * v0.sqrt())) / (2 * h)
        s = gaussian_score(sde)(x, t)
        assert velocity(gaussian_score(sde), sde)(x, t).item() == pytest.approx(want.item(), rel=1e-6)
        assert convert(s, x, t, sde, "score", "velocity").item() == pytest.approx(want.item(), rel=1e-6)


def test_straight_velocity_is_eps_minus_x0():
    x, values, *_ = draw("Straight", tensor(0.6))
    torch.testing.assert_close(values["velocity"], values["eps"] - values["x0"])
    got = convert(values["x0"], x, tensor(0.6), SDES["Straight"], "x0", "velocity")
    torch.testing.assert_close(got, values["eps"] - values["x0"])


def test_float32_and_mixed_time():
    """A float64 time leaves a float32 state float32."""
    x = torch.ones(2, 3)
    for t in (tensor(0.5), tensor(0.5, 0.6)):
        assert convert(x, x, t, SDES["VP"], "eps", "x0").dtype == torch.float32


def test_same_kind_is_the_same_tensor():
    x = torch.ones(2, 3)
    assert convert(x, x, tensor(0.5), SDES["VP"], "v", "v") is x

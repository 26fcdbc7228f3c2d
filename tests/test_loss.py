"""Denoising score matching: expectations by Gauss-Hermite quadrature, weights by their definitions."""

import math

import numpy as np
import pytest
import torch
from truth import F64, MEAN, SD, SDES, VAR, gaussian_score, prediction, rates, tensor

from scoresde import EDM, VE, VP, dsm
from scoresde.loss import WEIGHTS, lognormal_times, uniform_times

NODES, W = (tensor(q) for q in np.polynomial.hermite_e.hermegauss(12))
A, B = (q.flatten() for q in torch.meshgrid(NODES, NODES, indexing="ij"))
WW = (W[:, None] * W[None, :]).flatten() / W.sum() ** 2
X0 = MEAN + math.sqrt(VAR) * A[:, None]  # every pair of a datum and a noise
T = {"EDM": 1.5}


def expected(name, score, **knobs):
    sde = SDES[name]
    t = tensor(T.get(name, 0.4)).expand(len(X0))
    return (WW * dsm(score, sde, X0, t, noise=lambda x: B[:, None], **knobs)).sum().item()


@pytest.mark.parametrize("name", SDES)
def test_least_loss_of_gaussian_data(name):
    """The exact score leaves E e^2 = Var(eps | x) = alpha^2 v/(alpha^2 v + sigma^2), and every other score more:
    sigma^2 E|d|^2 for a difference d."""
    sde, t = SDES[name], tensor(T.get(name, 0.4))
    a, s = sde.alpha(t).item(), sde.sigma(t).item()
    score = gaussian_score(sde)
    least = expected(name, score)
    assert least == pytest.approx(a * a * VAR / (a * a * VAR + s * s), rel=1e-9)
    for p, q in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.2), (0.3, -0.1)):
        more = expected(name, lambda x, t, p=p, q=q: score(x, t) + p + q * x)
        d2 = (p + q * a * MEAN) ** 2 + q**2 * (a * a * VAR + s * s)
        assert more - least == pytest.approx(s * s * d2, rel=1e-8)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "EDM", "Straight"])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_weights_are_the_losses_they_are_named_after(name, weighting):
    """The squared error of that prediction, in its own terms, for a wrong score, any rank, one t a sample."""
    sde, g = SDES[name], torch.Generator().manual_seed(0)
    x0, z = (torch.randn(3, 2, 4, generator=g, dtype=F64) for _ in range(2))
    t = tensor(0.2, 0.5, 0.8)
    got = dsm(lambda x, t: -0.3 * x, sde, x0, t, weighting=weighting, sigma_data=SD, noise=lambda x: z)
    a, s, da, ds = (q.reshape(3, 1, 1) for q in (sde.alpha(t), sde.sigma(t), *rates(sde, t)))
    x = a * x0 + s * z
    eps_hat = s * 0.3 * x
    kind, factor = {
        "eps": ("eps", 1),
        "likelihood": ("score", (sde.diffusion(t) ** 2).reshape(3, 1, 1)),  # Song 2021b
        "x0": ("x0", 1),
        "v": ("v", 1),
        "edm": ("x0", ((s / a) ** 2 + SD**2) / (s / a * SD) ** 2),  # Karras 2022, table 1
        "min-snr": ("x0", torch.minimum((a / s) ** 2, tensor(5.0))),  # Hang 2023, for x0
    }[weighting]
    hat = prediction(kind, x, (x - s * eps_hat) / a, eps_hat, a, s, da, ds)
    want = factor * (hat - prediction(kind, x, x0, z, a, s, da, ds)) ** 2
    torch.testing.assert_close(got, want.mean((1, 2)), rtol=1e-9, atol=0)


def test_edm_weight_makes_F_unit():
    """Karras's weight is 1/c_out^2: the loss is the plain error of F."""
    sde, t, z = EDM(), tensor(0.3), tensor([[0.4, -1.0]])
    x0 = tensor([[0.5, 0.2]])
    x = x0 + 0.3 * z
    F = lambda x0h: prediction("F", x, x0h, (x - x0h) / 0.3, tensor(1.0), t, None, None, 0.6)  # noqa: E731
    got = dsm(lambda x, t: -x, sde, x0, t.expand(1), weighting="edm", sigma_data=0.6, noise=lambda x: z)
    assert got.item() == pytest.approx(((F(x - 0.09 * x) - F(x0)) ** 2).mean().item(), rel=1e-9)


def test_gradient_reaches_the_score():
    w = tensor(0.5).requires_grad_()
    dsm(lambda x, t: -w * x, VP(), X0, tensor(0.4).expand(len(X0)), noise=lambda x: B[:, None]).sum().backward()
    assert w.grad.abs() > 0


def test_times():
    """Quantiles: uniform over [t_min, T]; log(sigma/alpha) normal."""
    for sde in (VP(), EDM(), VE()):
        u = tensor(0.0, 0.25, 1.0)
        got = uniform_times(sde)(u)
        want = [sde.t_min, 0.75 * sde.t_min + 0.25 * sde.T, sde.T]
        assert got.tolist() == pytest.approx(want, rel=1e-12)
        normal = torch.distributions.Normal(tensor(-1.2), tensor(1.2))
        u = tensor(0.1, 0.5, 0.8)
        t = lognormal_times(sde)(u)
        torch.testing.assert_close((sde.sigma(t) / sde.alpha(t)).log(), normal.icdf(u), rtol=1e-9, atol=1e-9)
    t = lognormal_times(VP())(tensor(0.0, 1.0))
    assert 0 < t[0] < t[1] <= 1
    assert lognormal_times(EDM(), mean=0.0)(tensor(0.5).float()).dtype == torch.float32


def test_unknown_weighting():
    with pytest.raises(ValueError, match=r"unknown weighting 'snr'.*min-snr"):
        dsm(gaussian_score(VP()), VP(), X0, tensor(0.4).expand(len(X0)), weighting="snr")

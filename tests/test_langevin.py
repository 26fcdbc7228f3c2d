"""Predictor-corrector: Langevin's step, size and own stationary variance, with every kernel and SDE."""

import math

import pytest
import torch
from truth import F64, SDES, VAR, gaussian_score, log_snr_grid, marginal, moments, step_ends, table, tensor

from samplers import SAMPLERS, annealed, kernels, langevin, predictor_corrector
from scoresde import VE, VP, Streams, counted

EVERY_SDE = pytest.mark.parametrize("name", SDES)
KERNELS = {"ancestral_large": kernels.ancestral_large} | {
    k: getattr(kernels, k) for k in ("euler_maruyama", "flow_euler", "reverse_diffusion", "ancestral", "ddim")
}


def alone(predictor, sde, ts):
    """The predictor's own step, by the sampler of that name."""
    knobs = {"large": True} if predictor == "ancestral_large" else {}
    return table(SAMPLERS[predictor.removesuffix("_large")], sde, ts, **knobs)


@EVERY_SDE
@pytest.mark.parametrize("predictor", KERNELS)
def test_predictor_corrector_annealed(name, predictor):
    """The corrector is x + e s + sqrt(2 e) z with e = 2 A (snr sigma)^2, A = (alpha/alpha1)^2; then the predictor."""
    sde, ts, a, s, a1, _, *_ = step_ends(name)
    V, snr = marginal(sde, ts[0], 0.0, VAR)[1].item(), 0.2
    e = 2 * (a / a1) ** 2 * (snr * s) ** 2
    knobs = {"predictor": KERNELS[predictor], "corrector": annealed(snr)}
    A0, C0 = table(predictor_corrector, sde, ts, **knobs, n_correct=0)
    assert pytest.approx(alone(predictor, sde, ts), rel=1e-12) == (A0, C0)
    for n in (1, 3):
        _, v = moments(predictor_corrector, sde, ts, tensor(0.0), tensor(VAR), **knobs, n_correct=n)
        want = V
        for _ in range(n):
            want = (1 - e / V) ** 2 * want + 2 * e
        assert v.item() == pytest.approx(A0**2 * want + C0**2, rel=1e-9)


@EVERY_SDE
@pytest.mark.parametrize("predictor", KERNELS)
@pytest.mark.parametrize("corrector", [langevin, annealed])
def test_predictor_corrector_stays_near_the_truth(name, predictor, corrector):
    """Four samples of 4096 Gaussians: mean and spread end near the exact ones for every SDE, kernel and corrector.

    Langevin's own stationary variance is V / (1 - e/2V), e/2V <= snr^2: within 1 % here.
    """
    sde, x = SDES[name], torch.randn(4, 4096, generator=torch.Generator().manual_seed(0), dtype=F64)
    start, end = sde.time(-tensor(5.0).log()), sde.time(-tensor(0.3).log())
    ts = log_snr_grid(sde, 60, start, end)
    (m, v), (m1, v1) = marginal(sde, ts[0]), marginal(sde, ts[-1])
    knobs = {"predictor": KERNELS[predictor], "corrector": corrector(0.1), "noise": Streams(0, 4), "n_correct": 2}
    out = predictor_corrector(gaussian_score(sde), sde, m + v.sqrt() * x, ts, **knobs)
    assert out.mean().item() == pytest.approx(m1.item(), abs=0.04 * v1.item() ** 0.5)
    assert out.var().item() == pytest.approx(v1.item(), rel=0.06)


@pytest.mark.parametrize("snr", [0.05, 0.2])
def test_annealed_langevin_is_stationary_at_its_own_variance(snr):
    """At a fixed noise level v -> (1 - e/V)^2 v + 2 e, whose fixed point is V / (1 - e/2V), not V."""
    sde = VE()
    ts = tensor(0.5, 0.5 - 1e-12)
    V = marginal(sde, ts[0], 0.0, VAR)[1].item()
    e = 2 * (snr * sde.sigma(ts[0]).item()) ** 2
    knobs = {"corrector": annealed(snr), "n_correct": 200, "predictor": kernels.flow_euler}
    if snr < 0.1:
        knobs["n_correct"] = 3000
    _, v = moments(predictor_corrector, sde, ts, tensor(0.0), tensor(VAR), **knobs)
    assert v.item() == pytest.approx(V / (1 - e / (2 * V)), rel=1e-6)


@pytest.mark.parametrize("name", ["VP", "VE", "SubVP"])
def test_langevin_size_is_each_samples_own(name):
    """e = 2 A (snr |z|_rms / |s|)^2 with |z|_rms = sqrt(D), from the norm of each sample's own score."""
    sde, ts, a, _, a1, _, *_ = step_ends(name)
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=F64) * tensor(1, 2, 5)[:, None, None]
    z, score = torch.linspace(-1, 2, 24, dtype=F64).reshape(3, 2, 4), gaussian_score(sde)
    s = score(x, ts[0])
    out = predictor_corrector(
        score, sde, x, ts, predictor=lambda sde, ts: (torch.ones(1), torch.zeros(1), torch.zeros(1)),
        corrector=langevin(0.3), noise=lambda x: z,
    )  # fmt: skip
    for i in range(3):
        e = 2 * (a / a1) ** 2 * (0.3 * math.sqrt(8) / torch.linalg.vector_norm(s[i])) ** 2
        torch.testing.assert_close(out[i], x[i] + e * s[i] + torch.sqrt(2 * e) * z[i], rtol=1e-10, atol=1e-10)


def test_predictor_corrector_calls():
    for n in (0, 1, 3):
        score = counted(gaussian_score(VP()))
        predictor_corrector(score, VP(), torch.ones(2, 3, dtype=F64), log_snr_grid(VP(), 5), n_correct=n)
        assert score.calls == 5 * (n + 1)

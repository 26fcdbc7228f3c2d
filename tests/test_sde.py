"""The SDEs against 50-digit closed forms, autograd, and the ODEs of their mean and variance."""

import math

import mpmath as mp
import pytest
import torch
from scipy.integrate import solve_ivp
from truth import BETAS, F64, SDES, coefficients, derivative, gaussian_score, marginal, moments, tensor, times

from samplers import ddim, grids
from scoresde import (
    VE,
    VP,
    DiscreteVP,
    SubVP,
    cosine_betas,
    linear_betas,
    prior_log_prob,
    prior_sample,
    scaled_linear_betas,
)
from scoresde.sde import ALPHA_FLOOR

EVERY = pytest.mark.parametrize("name", SDES)


def close(got, want, rel):
    torch.testing.assert_close(got.to(F64), tensor([float(w) for w in want]), rtol=rel, atol=0)


@EVERY
def test_alpha_sigma_lam(name):
    sde, t = SDES[name], times(name)
    alpha, sigma = zip(*(coefficients(name, v) for v in t.tolist()), strict=True)
    close(sde.alpha(t), alpha, 1e-12 if name != "CosineVP" else 1e-11)
    close(sde.sigma(t), sigma, 1e-12)
    lam = tensor([float(mp.log(a / s)) for a, s in zip(alpha, sigma, strict=True)])
    torch.testing.assert_close(sde.lam(t), lam, rtol=1e-11, atol=1e-11)
    assert sde.alpha(t[0]).shape == ()


@EVERY
def test_drift_and_diffusion(name):
    """f = d log(alpha)/dt and g^2 = d sigma^2/dt - 2 f sigma^2   (Song 2021, eq. 29)."""
    sde, t = SDES[name], times(name)
    f = derivative(lambda t: sde.alpha(t).log(), t)
    torch.testing.assert_close(sde.drift(t), f, rtol=1e-9, atol=1e-12)
    g2 = derivative(lambda t: sde.sigma(t) ** 2, t) - 2 * f * sde.sigma(t) ** 2
    torch.testing.assert_close(sde.diffusion(t) ** 2, g2, rtol=1e-9, atol=0)


@EVERY
def test_forward_moments(name):
    """dm/dt = f m, dv/dt = 2 f v + g^2 from t_min to T give alpha m0 and alpha^2 v0 + sigma^2."""
    sde = SDES[name]
    u0, u1 = (-sde.lam(tensor(t)).item() for t in (sde.t_min, sde.T * 0.98))

    def rhs(u, y):  # in u = log(sigma/alpha), where every SDE is smooth; dt/du by autograd
        t = sde.time(-tensor(u))
        dt = derivative(lambda u: sde.time(-u), tensor(u)).item()
        f, g2 = sde.drift(t).item(), sde.diffusion(t).item() ** 2
        return [dt * f * y[0], dt * (2 * f * y[1] + g2)]

    start, end = (marginal(sde, sde.time(-tensor(u)), 2.0, 0.5) for u in (u0, u1))
    out = solve_ivp(rhs, (u0, u1), [q.item() for q in start], rtol=1e-7, atol=1e-12, max_step=1.0).y[:, -1]
    # a table's f and g jump at its labels, which the solver steps over
    assert out == pytest.approx([q.item() for q in end], rel=2e-2 if name == "DiscreteVP" else 1e-5)


@EVERY
def test_time_inverts_lam(name):
    sde, t = SDES[name], times(name, 200)
    torch.testing.assert_close(sde.time(sde.lam(t)), t, rtol=1e-9, atol=0)
    lam = torch.linspace(sde.lam(tensor(sde.T)).item(), sde.lam(tensor(sde.t_min)).item(), 50, dtype=F64)
    torch.testing.assert_close(sde.lam(sde.time(lam)), lam, rtol=1e-9, atol=1e-9)


@EVERY
def test_float32_sigma_at_small_times(name):
    """sqrt(1 - exp(-B)) in float32 would be 0.6 % off here."""
    sde, t = SDES[name], torch.tensor([1e-5, 1e-4, 1e-3])
    close(sde.sigma(t), [coefficients(name, v)[1] for v in t.double().tolist()], 2e-6)
    assert sde.sigma(t).dtype == sde.lam(t).dtype == torch.float32


@pytest.mark.parametrize("name", ["VP", "CosineVP", "DiscreteVP"])
def test_variance_preserving(name):
    t = times(name, 50)
    total = SDES[name].alpha(t) ** 2 + SDES[name].sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=0)


@EVERY
def test_ends(name):
    """At t = 0 the data (VE's carry sigma_min); at T almost nothing of it, and sigma is the prior's."""
    sde, zero = SDES[name], tensor(0.0)
    assert (sde.alpha(zero).item(), sde.sigma(zero).item()) == pytest.approx(
        (1, 0.01 if name == "VE" else 0), abs=1e-15
    )
    v = marginal(sde, sde.T, 0.0, 0.0)[1]
    assert v.sqrt().item() == pytest.approx(sde.prior_std, rel=1e-4)
    assert sde.alpha(tensor(sde.T)) / sde.sigma(tensor(sde.T)) < 0.021  # VE: 1/50 of unit data
    assert 0 < sde.t_min < sde.T


@pytest.mark.parametrize(
    "betas", [BETAS, linear_betas(100), scaled_linear_betas(), cosine_betas(1000)], ids=["40", "100", "scaled", "cos"]
)
def test_discrete_equals_its_table(betas):
    """alpha^2 is prod(1 - beta) at the labels, and between two labels a power of 1 - beta."""
    N, labels = len(betas), torch.arange(len(betas), dtype=F64)
    sde = DiscreteVP.from_betas(betas)
    product = [math.prod((1 - betas[: k + 1]).tolist()) for k in range(N)]
    product[-1] = max(product[-1], ALPHA_FLOOR**2)  # the cosine table ends below the floor
    t = sde.label_time(labels)
    torch.testing.assert_close(sde.alpha(t) ** 2, tensor(product), rtol=1e-10, atol=0)
    torch.testing.assert_close(t, (labels + 1) / N, rtol=1e-15, atol=0)
    torch.testing.assert_close(sde.label(t), labels, rtol=0, atol=1e-9)
    assert torch.equal(sde.label(t).round().long(), labels.long())
    assert sde.label(tensor(0.2 / N)) == 0  # never below the first label
    assert sde.t_min == pytest.approx(1 / N)
    k = N // 2
    middle = sde.alpha(tensor((k + 1.5) / N)) ** 2  # halfway from label k to k + 1
    assert middle.item() == pytest.approx(product[k] * (1 - betas[k + 1].item()) ** 0.5, rel=1e-10)
    same = DiscreteVP(tensor(product))
    torch.testing.assert_close(same.sigma(t), sde.sigma(t), rtol=1e-10, atol=1e-14)


def test_beta_tables():
    """Ho 2020, Rombach 2022 and Nichol 2021 as published."""
    b = linear_betas(1000)
    assert (b[0].item(), b[-1].item()) == pytest.approx((1e-4, 0.02))
    torch.testing.assert_close(b.diff(), torch.full((999,), 0.0199 / 999, dtype=F64))
    total = [DiscreteVP.from_betas(linear_betas(N)).lam(tensor(1.0)).item() for N in (500, 1000, 4000)]
    assert max(total) - min(total) < 0.1  # any N covers the same noise
    b = scaled_linear_betas(1000)
    assert (b[0].item(), b[-1].item()) == pytest.approx((0.00085, 0.012))
    torch.testing.assert_close(b.sqrt().diff().diff(), torch.zeros(998, dtype=F64), rtol=0, atol=1e-15)
    b = cosine_betas(1000)
    angle = lambda k: (k / 1000 + 0.008) / 1.008 * math.pi / 2  # noqa: E731
    for k in (0, 300, 900):
        kept = math.prod((1 - b[: k + 1]).tolist())
        assert kept == pytest.approx((math.cos(angle(k + 1)) / math.cos(angle(0))) ** 2, rel=1e-9)
    assert b[-1] == b.max() == 0.999


def test_linear_table_is_vp():
    """Song 2021, appendix E: DDPM's 1000 betas are VP(0.1, 20), to the size of a step."""
    t = torch.linspace(0.05, 1, 20, dtype=F64)
    torch.testing.assert_close(DiscreteVP.from_betas(linear_betas()).alpha(t), VP().alpha(t), rtol=0.06, atol=0)


def test_zero_terminal_snr():
    """A table that ends at alpha = 0 (Lin 2024) ends at the floor: finite, and right to alpha_T."""
    root = torch.cumprod(1 - linear_betas(100), 0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    sde = DiscreteVP(root**2)
    assert sde.alpha(tensor(1.0)).item() == pytest.approx(ALPHA_FLOOR, rel=1e-12)
    assert "5e-10" in _floor_doc()
    assert pytest.approx(5e-10, rel=0.1) == ALPHA_FLOOR**2 / 2  # the documented prior mismatch at |x0| = 1
    t = sde.label_time(torch.arange(99, dtype=F64))
    torch.testing.assert_close(sde.alpha(t), root[:-1], rtol=1e-10, atol=0)
    out = ddim(gaussian_score(sde), sde, torch.ones(2, 3), grids.uniform(sde, 50))
    assert torch.isfinite(out).all()
    m, v = moments(ddim, sde, grids.log_snr(sde, 400), tensor(0.7), tensor(0.25))
    m1, v1 = marginal(sde, sde.t_min, 0.7, 0.25)
    assert (m.item(), v.item()) == pytest.approx((m1.item(), v1.item()), rel=0.03)


def _floor_doc():
    import inspect

    import scoresde.sde

    return inspect.getsource(scoresde.sde).split("ALPHA_FLOOR = ")[1].split("@dataclass")[0]


@EVERY
def test_prior(name):
    """Samples are prior_std times the noise; the density is that of independent normals."""
    sde, x = SDES[name], torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * 3
    torch.testing.assert_close(prior_sample(sde, torch.zeros_like(x), lambda y: x), x * sde.prior_std)
    normal = torch.distributions.Normal(tensor(0.0), tensor(sde.prior_std))
    want = normal.log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(prior_log_prob(sde, x), want, rtol=1e-12, atol=1e-12)
    draws = prior_sample(sde, torch.empty(20_000, 1, dtype=F64))
    assert draws.std().item() == pytest.approx(sde.prior_std, rel=0.03)


def test_parameters_reach_the_formulas():
    """Other parameters than the defaults: B, the end of VE and the cosine's plain limit s = 0."""
    t = torch.linspace(0.1, 1, 5, dtype=F64)
    for sde in (VP(0.5, 7.0), SubVP(0.5, 7.0)):
        B = 0.5 * t + 6.5 * t**2 / 2
        torch.testing.assert_close(sde.alpha(t), torch.exp(-B / 2), rtol=1e-12, atol=0)
        torch.testing.assert_close(sde.time(sde.lam(t)), t, rtol=1e-10, atol=0)
    sde = VE(0.1, 10.0)
    assert sde.sigma(tensor(1.0)).item() == pytest.approx(10.0)
    assert VE(0.1, 10.0, T=0.5).prior_std == pytest.approx(1.0)
    cosine = type(SDES["CosineVP"])(s=0.0)
    t = t * 0.9
    torch.testing.assert_close(cosine.alpha(t), torch.cos(math.pi * t / 2), rtol=1e-12, atol=0)

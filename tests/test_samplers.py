"""Every sampler's step against formulas derived here: Bayes' rule, definitions, exact solutions."""

import math

import pytest
import torch
from truth import (
    F64,
    MEAN,
    SDES,
    VAR,
    gaussian_map,
    gaussian_score,
    kernel_variance,
    log_snr_grid,
    marginal,
    moments,
    step_ends,
    table,
    tensor,
)

from samplers import (
    ancestral,
    ddim,
    euler_maruyama,
    flow_euler,
    heun,
    predictor_corrector,
    reverse_diffusion,
)
from scoresde import VP, DiscreteVP, Streams, counted, gaussian, linear_betas, mixture, prior_sample

EVERY_SDE = pytest.mark.parametrize("name", SDES)
POINT = {"mean": 0.0, "var": 0.0}


@EVERY_SDE
def test_euler_maruyama(name):
    """One step of dx = (f x - g^2 s) dt + g dw with s = -x/V."""
    sde, ts, *_, f, g2 = step_ends(name)
    h, V = float(ts[0] - ts[1]), marginal(sde, ts[0], 0.0, VAR)[1].item()
    A, C = table(euler_maruyama, sde, ts)
    assert pytest.approx(1 - f * h - g2 * h / V, rel=1e-9) == A
    assert pytest.approx(math.sqrt(g2 * h), rel=1e-9) == C
    A, C = table(flow_euler, sde, ts)
    assert pytest.approx(1 - f * h - g2 * h / (2 * V), rel=1e-9) == A
    assert C == 0


@EVERY_SDE
def test_reverse_diffusion(name):
    """x1 = x - F(x) + G^2 s + G z, with the forward step x = x1 + F(x1) + G z, so F(x) = (r - 1) x."""
    sde, ts, a, s, a1, s1, *_ = step_ends(name)
    r, G2 = kernel_variance(a, s, a1, s1)
    V = marginal(sde, ts[0], 0.0, VAR)[1].item()
    A, C = table(reverse_diffusion, sde, ts)
    assert pytest.approx(1 - (r - 1) - G2 / V, rel=1e-9) == A
    assert pytest.approx(math.sqrt(G2), rel=1e-9) == C


def test_reverse_diffusion_is_the_published_one_for_a_table():
    """Song 2021, eq. 46: x1 = (2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z; for VE, G^2 = sigma^2 - sigma1^2."""
    betas = linear_betas(50)
    sde, k = DiscreteVP.from_betas(betas), 12
    ts, beta = tensor((k + 1) / 50, k / 50), betas[k].item()
    A, C = table(reverse_diffusion, sde, ts)
    assert pytest.approx(2 - math.sqrt(1 - beta) - beta / marginal(sde, ts[0], 0.0, VAR)[1].item(), rel=1e-12) == A
    assert pytest.approx(math.sqrt(beta), rel=1e-12) == C


@EVERY_SDE
def test_ancestral_is_the_posterior_of_the_forward_kernel(name):
    """Bayes: prior x1 ~ N(alpha1 x0, s1^2), likelihood x | x1 ~ N(r x1, G^2); exact for a point mass at x0."""
    sde, ts, a, s, a1, s1, *_ = step_ends(name)
    r, G2 = kernel_variance(a, s, a1, s1)
    precision = 1 / s1**2 + r**2 / G2
    for x0 in (0.0, 1.3):
        A, C = table(ancestral, sde, ts, mean=x0, var=0.0)
        assert pytest.approx(r / G2 / precision, rel=1e-9) == A
        assert pytest.approx(precision**-0.5, rel=1e-9) == C
        x = tensor([[0.4]])
        mean = (a1 * x0 / s1**2 + r * 0.4 / G2) / precision
        out = ancestral(gaussian_score(sde, x0, 0.0), sde, x, ts, noise=torch.zeros_like)
        assert out.item() == pytest.approx(mean, rel=1e-9)
    A, C = table(ancestral, sde, ts, large=True, **POINT)
    assert pytest.approx(r / G2 / precision, rel=1e-9) == A
    assert pytest.approx(math.sqrt(G2), rel=1e-9) == C  # Ho 2020: sigma_t^2 = beta_t


@EVERY_SDE
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_preserves_the_marginal_of_a_point_mass(name, eta):
    """x ~ N(alpha x0, s^2) goes to N(alpha1 x0, s1^2) for every eta, and eta is the posterior's share of noise."""
    sde, ts, a, s, a1, s1, *_ = step_ends(name)
    r, G2 = kernel_variance(a, s, a1, s1)
    A, C = table(ddim, sde, ts, **POINT, eta=eta)
    assert A**2 * s**2 + C**2 == pytest.approx(s1**2, rel=1e-9)
    assert pytest.approx(eta * math.sqrt(1 / (1 / s1**2 + r**2 / G2)), rel=1e-9) == C
    assert A > 0
    mean, var = moments(ddim, sde, log_snr_grid(sde, 5), mean=tensor(1.3), var=tensor(0.0), eta=eta)
    m1, v1 = marginal(sde, sde.t_min, 1.3, 0.0)
    assert mean.item() == pytest.approx(m1.item(), rel=1e-9)
    assert var.item() == pytest.approx(v1.item(), rel=1e-6)


@EVERY_SDE
def test_ddim_with_eta_1_is_ancestral(name):
    sde, ts, x = SDES[name], log_snr_grid(SDES[name], 6), torch.ones(2, 3, dtype=F64)
    score = gaussian_score(sde)
    one = ddim(score, sde, x, ts, eta=1.0, noise=Streams(0, 2))
    torch.testing.assert_close(one, ancestral(score, sde, x, ts, noise=Streams(0, 2)), rtol=1e-10, atol=1e-10)


@EVERY_SDE
def test_ddim_is_exact_in_one_step_for_a_point_mass(name):
    sde = SDES[name]
    ts, x = tensor(sde.T, sde.t_min), tensor([[-1.0, 0.3]])
    out = ddim(gaussian_score(sde, 1.3, 0.0), sde, x, ts)
    torch.testing.assert_close(out, gaussian_map(sde, x, *ts, 1.3, 0.0), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["VP", "CosineVP", "EDM", "Straight", "DiscreteVP", "SubVP"])
@pytest.mark.parametrize("sampler", [ddim, heun, ancestral, euler_maruyama, reverse_diffusion, predictor_corrector])
def test_a_run_may_end_at_zero(name, sampler):
    """The score is never asked at t = 0; DDIM, Heun and the ancestral step land on a point mass exactly."""
    sde, seen = SDES[name], []
    ts = torch.cat([log_snr_grid(sde, 12), torch.zeros(1, dtype=F64)])

    def score(x, t):
        seen.append(float(t))
        return gaussian_score(sde, 1.3, 0.0)(x, t)

    out = sampler(score, sde, torch.ones(1, 2, dtype=F64), ts, noise=Streams(0, 1))
    assert min(seen) > 0
    if sampler in (ddim, heun, ancestral):
        torch.testing.assert_close(out, torch.full_like(out, 1.3), rtol=1e-9, atol=0)
    else:
        assert torch.isfinite(out).all()


def test_heun_spends_2N_minus_1_calls_to_zero():
    for end, calls in ((0.002, 12), (0.0, 11)):
        score = counted(gaussian_score(SDES["EDM"]))
        heun(score, SDES["EDM"], torch.ones(1, 1, dtype=F64), tensor(80, 20, 5, 2, 1, 0.5, end))
        assert score.calls == calls


def test_heun_step():
    """The explicit trapezoid rule for y = x/alpha in r = sigma/alpha, where dy/dr = eps."""
    for name in ("VP", "SubVP", "VE"):
        sde, ts, a, s, a1, s1, *_ = step_ends(name)
        r, r1, w = s / a, s1 / a1, VAR
        k = lambda y, r, w=w: y * r / (w + r * r)  # noqa: E731  eps of N(0, w) data
        y = 1 / a
        ahead = y + (r1 - r) * k(y, r)
        want = a1 * (y + (r1 - r) * (k(y, r) + k(ahead, r1)) / 2)
        assert table(heun, sde, ts)[0] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("name", ["VP", "VE", "EDM"])
def test_heun_churn(name):
    """Karras 2022, algorithm 2: r to rh = r (1 + gamma) by noise of variance S_noise^2 (rh^2 - r^2), then a step."""
    sde = SDES[name]
    ts = log_snr_grid(sde, 4)[1:3]
    a, a1, s, s1 = *sde.alpha(ts).tolist(), *sde.sigma(ts).tolist()
    r, r1 = s / a, s1 / a1
    for churn, scale in ((0.2, 1.0), (0.2, 1.007), (9.0, 1.0)):
        gamma = min(churn / 1, math.sqrt(2) - 1)
        rh = r * (1 + gamma)
        A, C = table(heun, sde, ts, churn=churn, noise_scale=scale)
        slope = lambda y, r: y * r / (VAR + r * r)  # noqa: E731
        ahead = 1 + (r1 - rh) * slope(1, rh)
        M = 1 + (r1 - rh) * (slope(1, rh) + slope(ahead, r1)) / 2  # y1 = M yh
        assert pytest.approx(a1 / a * M, rel=1e-8) == A
        assert pytest.approx(a1 * M * scale * math.sqrt(rh**2 - r**2), rel=1e-8) == C
        for outside in ((r * 1.1, math.inf), (0.0, r * 0.9)):
            assert table(heun, sde, ts, churn=churn, churn_range=outside)[1] == 0
    top = tensor(sde.T, ts[0].item())
    assert table(heun, sde, top, churn=9.0)[1] == 0  # never above r(T)


def test_noise_is_drawn_only_where_it_is_used():
    def never(x):
        raise AssertionError("noise was drawn")

    for sampler in (flow_euler, ddim, heun):
        sampler(gaussian_score(VP()), VP(), torch.ones(1, 2, dtype=F64), log_snr_grid(VP(), 3), noise=never)


def test_heun_churn_is_shared_by_the_steps():
    """gamma = S_churn/N: the score is first asked at r (1 + S_churn/N) in every step."""
    sde, seen = SDES["EDM"], []

    def score(x, t):
        seen.append(float(t))
        return gaussian_score(sde)(x, t)

    ts = tensor(40.0, 20.0, 8.0, 3.0, 1.0)
    heun(score, sde, torch.ones(1, 1, dtype=F64), ts, churn=0.8)
    assert seen[::2] == pytest.approx([1.2 * t for t in ts[:-1].tolist()], rel=1e-12)
    assert seen[1::2] == pytest.approx(ts[1:].tolist(), rel=1e-12)


def test_samples_of_a_mixture_have_the_right_weights():
    """Not only Gaussians: a deterministic and a stochastic sampler reach a 0.3/0.7 mixture from noise."""
    target = mixture(tensor(0.3, 0.7), tensor([[-2.0], [1.0]]), var=tensor(0.1, 0.05))
    sde = VP()
    x = prior_sample(sde, torch.empty(4000, 1, dtype=F64), Streams(0, 4000))
    for sampler in (heun, ancestral):
        out = sampler(target.score(sde), sde, x, log_snr_grid(sde, 60), noise=Streams(1, 4000))
        left = out < -0.6
        assert left.double().mean().item() == pytest.approx(0.3, abs=0.03)  # 4 standard errors
        assert out[left].mean().item() == pytest.approx(-2.0, abs=0.08)
        assert out[~left].var().item() == pytest.approx(0.05, rel=0.15)


def test_the_gaussian_helper_agrees_with_the_library():
    """The elementwise score of these tests is the library's exact one."""
    x, t = tensor([[0.3, -2.0]]), tensor(0.4)
    exact = gaussian(torch.full((2,), MEAN, dtype=F64), var=VAR).score(VP())(x, t)
    torch.testing.assert_close(gaussian_score(VP())(x, t), exact, rtol=1e-12, atol=0)

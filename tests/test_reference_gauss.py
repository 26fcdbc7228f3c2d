"""Closed forms for Gaussian and mixture data: densities, scores, flows, likelihoods, moments of samplers.

All agree to the cases' tolerance (rtol 1e-9, atol 1e-11; integrated references 1e-8), closed forms in fact to 11 to 15
digits, flows and likelihoods (integrated by dopri8 at 1e-11) to 10 or more.
"""

import pytest
import torch
from reference import F64, Levels, load, moments

from samplers import ancestral, ddim, euler_maruyama, grids, heun
from scoresde import (
    EDM,
    DiscreteVP,
    bits_per_dim,
    convert,
    denoised,
    flow,
    gaussian,
    gaussian_flow,
    linear_betas,
    log_prob,
    prior_log_prob,
    velocity,
)
from scoresde.divergence import score_and_trace

TIGHT = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-11}
LOG = {"method": "dopri8", "tol": 1e-11}


@pytest.mark.parametrize("name", ["gauss/flow_vp", "gauss/flow_subvp", "gauss/flow_ve"])
def test_gaussian_flow(name):
    """Marginals, the flow map, the flow's likelihood in nats and bits, for diagonal Gaussian data."""
    case = load(name)
    sde, eps, mu, var = case.sde(), case.params["eps"], case["in_mu"], case["in_var"]
    t, T, e = case["in_t"], torch.tensor(1.0, dtype=F64), torch.tensor(eps, dtype=F64)
    case.check(sde.alpha(t)[:, None] * mu, "out_marginal_mean")
    case.check(sde.alpha(t)[:, None] ** 2 * var + sde.sigma(t)[:, None] ** 2, "out_marginal_var")
    routes = {
        "out_x_eps_from_x_T": (case["in_x_T"], T, e),
        "out_x_T_from_x_eps": (case["in_x_eps"], e, T),
        "out_x_mid_from_x_T": (case["in_x_T"], T, torch.tensor(case.params["t_mid"], dtype=F64)),
    }
    target = gaussian(mu, var=var)
    score = target.score(sde)
    for key, (x, start, end) in routes.items():
        case.check(gaussian_flow(mu, var, sde, x, start, end), key)
        case.check(flow(score, sde, x, start, end, **TIGHT), key)

    x, D = case["in_x_eps"], 3
    case.check(target.log_prob(x, sde, e), "out_logp_true")
    logp = log_prob(score, sde, x, t=eps, **LOG)
    case.check(logp, "out_logp_model")
    case.check(bits_per_dim(logp, D, 2 / 256), "out_bpd_model_centered_8bit")
    case.check(bits_per_dim(logp, D, 1.0), "out_bpd_model_unit_range")
    for logdet in logp - prior_log_prob(sde, case["out_x_T_from_x_eps"]):
        case.check(logdet, "out_logdet_forward")


@pytest.mark.parametrize("name", ["gauss/full_cov_vp", "gauss/full_cov_subvp", "gauss/full_cov_ve"])
def test_full_covariance(name):
    case = load(name)
    sde, eps, mu = case.sde(), case.params["eps"], case["in_mu"]
    target = gaussian(mu, cov=case["in_cov"])
    score = target.score(sde)
    T, e = torch.tensor(1.0, dtype=F64), torch.tensor(eps, dtype=F64)

    t, x = case["in_t"], case["in_x_points"]
    s, trace = score_and_trace(score, x, t)
    case.check(s, "out_score")
    case.check(trace, "out_score_divergence")
    case.check(target.denoiser(sde)(x, t), "out_denoised")
    case.check(denoised(s, x, t, sde), "out_denoised")
    u, div = score_and_trace(velocity(score, sde), x, t)
    case.check(u, "out_flow_drift")
    case.check(div, "out_flow_divergence")

    case.check(flow(score, sde, case["in_x_T"], T, e, **TIGHT), "out_x_eps_from_x_T")
    case.check(flow(score, sde, case["in_x_eps"], e, T, **TIGHT), "out_x_T_from_x_eps")
    ends = flow(score, sde, sde.alpha(T) * mu + torch.eye(3, dtype=F64), T, e, **TIGHT)
    case.check((ends - sde.alpha(e) * mu).T, "out_map_T_to_eps")
    case.check(log_prob(score, sde, case["in_x_eps"], t=eps, **LOG), "out_logp_model")
    case.check(target.log_prob(case["in_x_eps"], sde, e), "out_logp_true")


@pytest.mark.parametrize("name", ["gauss/mixture_flow_vp", "gauss/mixture_flow_subvp", "gauss/mixture_flow_ve"])
def test_mixture_flow(name):
    """Case tolerance rtol 1e-8, atol 1e-9: both sides integrate."""
    case = load(name)
    sde, eps, target = case.sde(), case.params["eps"], case.target()
    score = target.score(sde)
    case.check(flow(score, sde, case["in_x_T"], 1.0, eps, **TIGHT), "out_x_eps_from_x_T")
    x_T = flow(score, sde, case["in_x_eps"], eps, 1.0, **TIGHT)
    case.check(x_T, "out_x_T_from_x_eps")
    logp = log_prob(score, sde, case["in_x_eps"], t=eps, **LOG)
    case.check(logp, "out_logp_model")
    case.check(logp - prior_log_prob(sde, x_T), "out_divergence_integral")
    case.check(target.log_prob(case["in_x_eps"], sde, torch.tensor(eps, dtype=F64)), "out_logp_true")


def test_mixture_points():
    """Density, score, posterior and derivatives of the noised mixture at arbitrary (alpha, sigma).

    The posterior covariance is sigma^2/alpha times the denoiser's Jacobian.
    """
    case = load("gauss/mixture_points")
    sde, x = Levels(case["in_a"], case["in_s"]), case["in_x_points"]
    t = torch.arange(len(x), dtype=F64)
    target = case.target()
    score, denoiser = target.score(sde), target.denoiser(sde)
    case.check(target.log_prob(x, sde, t), "out_logp")
    s, trace = score_and_trace(score, x, t)
    case.check(s, "out_score")
    case.check(denoiser(x, t), "out_denoised")
    case.check(denoised(s, x, t, sde), "out_denoised")
    case.check(convert(s, x, t, sde, "score", "eps"), "out_eps")
    case.check(trace, "out_score_divergence")
    for p, v in enumerate(case["in_probes"]):
        got = score_and_trace(score, x, t, v[None])[1]
        torch.testing.assert_close(got, case["out_probe_quadratic"][p], rtol=1e-9, atol=1e-9)
    mean = score_and_trace(score, x, t, case["in_probes"])[1]
    torch.testing.assert_close(mean, case["out_probe_quadratic"].mean(0), rtol=1e-9, atol=1e-9)
    each = torch.func.vmap
    jacobian = each(torch.func.jacrev(lambda y, u: score(y[None], u[None])[0]))
    case.check(jacobian(x, t), "out_score_jacobian")
    spread = each(torch.func.jacrev(lambda y, u: denoiser(y[None], u[None])[0]))(x, t)
    case.check(spread * (case["in_s"] ** 2 / case["in_a"])[:, None, None], "out_posterior_cov")
    case.check(case.target(labels=torch.arange(3)).class_log_prob(x, sde, t).exp(), "out_responsibilities")


@pytest.mark.parametrize("name", ["gauss/moments_vp", "gauss/moments_subvp", "gauss/moments_ve"])
def test_euler_maruyama_moments(name):
    """Exact mean and variance after N steps; the flow's own; and the reverse SDE's as the limit N -> infinity.

    em_ssde_*, score_sde's steps of 1/N on linspace(1, eps, N), is in test_reference_ssde.py.
    The reverse SDE has no finite sampler: Richardson extrapolation from 500 and 1000 steps meets it to 1e-4.
    """
    case = load(name)
    sde, eps = case.sde(), case.params["eps"]
    score = gaussian(case["in_mu"], var=case["in_var"]).score(sde)

    def after(n):
        ts = grids.uniform(sde, n, t_end=eps)
        return moments(lambda x, z: euler_maruyama(score, sde, x, ts, noise=z), 3, sde.prior_std, n)

    for n in case.params["steps"]:
        mean, var, last = after(n)
        case.check(mean, f"out_em_grid_{n}_mean")
        case.check(var, f"out_em_grid_{n}_var")
        case.check(last, f"out_em_grid_{n}_var_last_mean")
    ends = torch.stack([torch.zeros(3, dtype=F64), torch.full((3,), sde.prior_std, dtype=F64)])
    low, high = flow(score, sde, ends, 1.0, eps, **TIGHT)
    case.check(low, "out_ode_mean")
    case.check((high - low) ** 2, "out_ode_var")
    fine, coarse = after(1000), after(500)
    case.check(2 * fine[0] - coarse[0], "out_reverse_sde_mean", atol=2e-4)
    case.check(2 * fine[1] - coarse[1], "out_reverse_sde_var", atol=2e-4)


def test_chain_moments():
    """DDIM (eta 0 and 1), DDPM, and EDM's Euler and Heun on Gaussian data: exact moments, no sampling error."""
    case = load("gauss/chain_moments")
    target = gaussian(case["in_mu"], var=case["in_var"])

    def compare(name, sampler, sde, ts, std, draws, **knobs):
        score = target.score(sde)
        mean, var, _ = moments(lambda x, z: sampler(score, sde, x, ts, noise=z, **knobs), 4, std, draws)
        case.check(mean, f"out_{name}_mean")
        case.check(var, f"out_{name}_var")

    table = DiscreteVP.from_betas(linear_betas())
    for n in case.params["chain_steps"]:
        labels = torch.arange(0, 1000, 1000 // n, dtype=F64).flip(0)
        ts = torch.cat([table.label_time(labels), labels.new_zeros(1)])
        for eta in case.params["etas"]:
            compare(f"ddim_{n}_eta{eta}", ddim, table, ts, 1.0, (n - 1) * int(eta), eta=eta)
        compare(f"ddpm_{n}", ancestral, table, ts, 1.0, n - 1)
    edm = EDM()
    for n in case.params["edm_steps"]:
        ts = grids.karras(edm, n, to_zero=True)
        compare(f"edm_euler_{n}", ddim, edm, ts, edm.T, 0)
        compare(f"edm_heun_{n}", heun, edm, ts, edm.T, 0)

"""Probability flow and likelihood against score_sde, k-diffusion and torchdiffeq on Gaussian mixtures.

Our integrations run at rtol = atol = 1e-11 or 1e-10, so what is left of a difference is the peer's own error.
"""

import pytest
import torch
import torchdiffeq
from reference import F64, load

from samplers import euler_maruyama, flow_euler, ode, reverse_diffusion
from scoresde import EDM, VE, VP, DiscreteVP, bits_per_dim, counted, flow, linear_betas, log_prob, velocity

TIGHT = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-11}
LOG = {"method": "dopri8", "tol": 1e-11}
EACH = {"method": "each", "rtol": 1e-10, "atol": 1e-10}
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


def times(*t):
    return torch.tensor(t, dtype=F64)


@pytest.mark.parametrize("name", ["ssde/ode_vp", "ssde/ode_subvp", "ssde/ode_ve"])
def test_ode_sampler(name):
    """score_sde's black-box sampler.

    x_exact (DOP853 at 1e-12) and x_tight (RK45 at 1e-10) agree to the case's 1e-9.  x_default carries RK45's error of
    1e-4, so it only starts the `denoised` step, which agrees to 15 digits.  The peer takes a given z as x(1), unscaled.
    """
    case = load(name)
    sde, eps, x_T = case.sde(), case.params["eps"], case["in_z"]
    score = case.target(shape=x_T.shape[1:]).score(sde)
    x = ode(score, sde, x_T, times(1.0, eps), **TIGHT)
    case.check(x, "out_x_exact")
    case.check(x, "out_x_tight")
    case.check(flow(score, sde, x_T, 1.0, eps, **EACH), "out_x_exact")

    # one more mean of the discretised reverse step, from label 0 to data, with the score at eps
    at_eps, N, still = lambda x, t: score(x, times(eps)[0]), 1000, torch.zeros_like
    start = case["out_x_default"]
    if isinstance(sde, VP):
        table = DiscreteVP.from_betas(linear_betas(N))
        clean = reverse_diffusion(at_eps, table, start, times(1 / N, 0), noise=still)
    elif isinstance(sde, VE):
        clean = reverse_diffusion(at_eps, EDM(), start, times(sde.sigma_min, 0), noise=still)
    else:
        clean = euler_maruyama(score, sde, start, times(eps, eps - 1 / N), noise=still)
    case.check(clean, "out_x_default_denoised")


@pytest.mark.parametrize("name", ["ssde/likelihood_vp", "ssde/likelihood_subvp", "ssde/likelihood_ve"])
def test_likelihood(name):
    """Bits per dimension of score_sde, data at t = eps as they are.

    Exact trace and latent (DOP853 at 1e-12), and the tight run with their probe v, agree to the case's 1e-9.  Sub-VP's
    v is Gaussian: they estimate the trace of f I too, by f |v|^2, where ours has f D.
    """
    case = load(name)
    sde, eps, x = case.sde(), case.params["eps"], case["in_data"]
    target = case.target(shape=x.shape[1:])
    score, D = target.score(sde), x[0].numel()
    latent = flow(score, sde, x, eps, 1.0, **TIGHT)
    case.check(latent, "out_latent_exact")
    case.check(latent, "out_latent_tight")
    case.check(target.log_prob(x, sde, times(eps)[0]), "out_logp_true_marginal")
    logp = log_prob(score, sde, x, t=eps, **LOG)
    case.check(logp, "out_logp_exact_trace")
    apart = log_prob(score, sde, x, t=eps, tol=1e-6, d=0.5)
    case.check(bits_per_dim(apart, D, 2 / 256), "out_bpd_centered_exact_trace", rtol=0, atol=2e-5)
    case.check(bits_per_dim(logp, D, 2 / 256), "out_bpd_centered_exact_trace")
    v, kind = case["in_probe"], case.params["probe_type"].lower()
    probed = log_prob(score, sde, x, t=eps, probes=1, kind=kind, noise=lambda x: v, **LOG)
    f = torch.log(sde.alpha(times(1.0)) / sde.alpha(times(eps)))  # the integral of f
    probed = probed + (v.flatten(1).square().sum(1) - D) * f
    case.check(bits_per_dim(probed, D, 2 / 256), "out_bpd_centered_tight")
    case.check(bits_per_dim(probed, D, 1 / 256), "out_bpd_plain_tight")


@pytest.mark.parametrize("name", ["kdiff/log_likelihood", "kdiff/log_likelihood_tight"])
def test_log_likelihood(name):
    """k-diffusion's likelihood with its probe of signs.

    The case's tolerance, their own error: 1e-7 where they integrate at 1e-10 (1e-9 in fact), 1e-3 at 1e-4.
    """
    case = load(name)
    edm = EDM(T=case.params["sigma_max"], t_min=case.params["sigma_min"])
    target, x = case.target(), case["in_x_init"]
    case.check(target.log_prob(x, edm, times(edm.t_min)[0]), "out_logp_exact", rtol=1e-9, atol=1e-11)
    got = log_prob(target.score(edm), edm, x, probes=1, kind="rademacher", noise=lambda x: case["in_probe"], **LOG)
    case.check(got, "out_log_likelihood")


@pytest.mark.parametrize("name", ["tde/flow_vp", "tde/flow_subvp", "tde/flow_ve"])
def test_torchdiffeq(name):
    """torchdiffeq on our velocity field: the same numbers (rtol 1e-8) from as many calls.

    Fixed grids in t; dopri5 and the others with a step pinned to the end.  Our own flow, exact to 1e-10, differs from
    their adaptive results by those results' own error, up to 5e-6 at their tolerance 1e-6; 1e-5 is allowed.
    `out_unpinned_*` (the failure of a step over the end) cannot happen here: `flow` always lands on it.
    """
    case = load(name)
    sde, eps, x_T, ts = case.sde(), case.params["eps"], case["in_x_T"], case["in_t_grid"]
    score = case.target().score(sde)
    for method in (*FIXED, "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"):
        u = velocity(calls := counted(score), sde)
        if method in FIXED:
            knobs = {}
        else:
            tol = case.params["tol" if method.startswith("dopri") else "tol_low_order"]
            norm = lambda y: y.square().mean().sqrt()  # noqa: E731
            knobs = {"rtol": tol, "atol": tol, "options": {"step_t": times(eps), "norm": norm}}
        grid = ts if method in FIXED else times(1.0, eps)
        x = torchdiffeq.odeint(lambda t, x, u=u: u(x, t), x_T, grid, method=method, **knobs)[-1]
        case.check(x, f"out_x_{method}")
        assert calls.calls == int(case[f"out_nfe_{method}"])
    case.check(flow_euler(score, sde, x_T, ts), "out_x_euler")

    exact = flow(score, sde, x_T, 1.0, eps, **TIGHT)
    case.check(exact, "out_x_dopri8", rtol=1e-5)
    case.check(exact, "out_x_dopri5", rtol=1e-5)
    case.check(flow(score, sde, case["in_x_eps"], eps, 1.0, **TIGHT), "out_latent", rtol=1e-5)
    case.check(log_prob(score, sde, case["in_x_eps"], t=eps, **LOG), "out_logp", rtol=1e-5)

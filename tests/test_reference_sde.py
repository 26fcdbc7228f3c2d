"""Coefficients, tables, kernels, grids and conversions against other programs' numbers.

Agreement is to the cases' own tolerance (rtol 1e-9, atol 1e-11), in fact to 13 digits or more, unless a test says
otherwise.
"""

import json

import pytest
import reference
import torch
from reference import F64, FOLDERS, HERE, load, sde_of, toy

from samplers import grids, kernels
from scoresde import (
    EDM,
    VE,
    VP,
    CosineVP,
    DiscreteVP,
    Model,
    change_sde,
    cosine_betas,
    denoised,
    linear_betas,
    prior_log_prob,
)
from scoresde.convert import line


@pytest.mark.parametrize("i", [0, 1, 2])
def test_coefficients(i):
    """VP, sub-VP, VE of score_sde: the marginal's mean and deviation, f, g, and the prior's log density."""
    case = load("ssde/coefficients")
    sde, t = sde_of(case.params["sdes"][i]), case["in_t"]
    case.check(sde.alpha(t), f"out_mean_coeff_{i}")
    case.check(sde.sigma(t), f"out_std_{i}")
    case.check(sde.drift(t), f"out_drift_coeff_{i}")
    case.check(sde.diffusion(t), f"out_diffusion_{i}")
    case.check(prior_log_prob(sde, case["in_z"]), f"out_prior_logp_{i}")


def test_one_step_pairs():
    """Their (F, G), x = x1 + F x1 + G z: our forward kernel on a table of betas (VP) or sigmas (VE); sub-VP: Euler."""
    case = load("ssde/coefficients")
    N, t = 1000, case["in_t"]
    j = torch.floor(t * (N - 1)).long()
    table = DiscreteVP.from_betas(linear_betas(N))
    case.check(linear_betas(N), "out_discrete_betas_0")
    case.check(table.alphas_cumprod, "out_alphas_cumprod_0")
    case.check(table.alpha(table.label_time(torch.arange(N, dtype=F64))) ** 2, "out_alphas_cumprod_0")
    r, G2 = kernels.forward_kernel(table, grids.uniform(table, N, to_zero=True))
    case.check((r - 1).flip(0)[j], "out_step_drift_coeff_0")
    case.check(G2.sqrt().flip(0)[j], "out_step_noise_0")

    sub = sde_of(case.params["sdes"][1])
    rows = [kernels.euler_maruyama(sub, torch.stack([u, u - 1 / N])) for u in t]
    case.check(-torch.cat([row[0] - 1 for row in rows]), "out_step_drift_coeff_1")
    case.check(torch.cat([row[2] for row in rows]), "out_step_noise_1")

    d = sde_of(case.params["sdes"][2]).sigma(torch.linspace(0, 1, N, dtype=F64))
    case.check(d, "out_discrete_sigmas_2")
    r, G2 = kernels.forward_kernel(EDM(), torch.cat([d.flip(0), d.new_zeros(1)]))
    case.check((r - 1).flip(0)[j], "out_step_drift_coeff_2")
    case.check(G2.sqrt().flip(0)[j], "out_step_noise_2")


@pytest.mark.parametrize("name", ["gauss/kernels_vp", "gauss/kernels_subvp", "gauss/kernels_ve"])
def test_transition_kernels(name):
    """x_t | x_s, and the bridge q(x_s | x_t, x_0) read off the ancestral table."""
    case = load(name)
    sde, s, t = case.sde(), case["in_s"], case["in_t"]
    case.check(sde.lam(s), "out_half_logsnr_s")
    case.check(sde.lam(t), "out_half_logsnr_t")
    torch.testing.assert_close(sde.time(sde.lam(t)), t, rtol=1e-12, atol=0)
    grid = [torch.stack(pair) for pair in zip(t, s, strict=True)]
    r, G2 = (torch.cat(column) for column in zip(*(kernels.forward_kernel(sde, ts) for ts in grid), strict=True))
    case.check(r, "out_factor")
    case.check(G2, "out_variance")
    # x1 = a x + b s + c z with s = (alpha x0 - x) / sigma^2
    a, b, c = (torch.cat(column) for column in zip(*(kernels.ancestral(sde, ts) for ts in grid), strict=True))
    case.check(a - b / sde.sigma(t) ** 2, "out_bridge_coef_xt")
    case.check(b * sde.alpha(t) / sde.sigma(t) ** 2, "out_bridge_coef_x0")
    case.check(c**2, "out_bridge_var")


@pytest.mark.parametrize(("i", "betas"), [(0, linear_betas()), (1, cosine_betas())])
def test_guided_diffusion_tables(i, betas):
    """Full and respaced tables; a respaced chain is a grid of labels on the full one.

    Below its clipped last label the cosine table is `CosineVP` at t = (k + 1)/N.
    """
    case = load("gd/tables")
    case.check(betas, f"out_full_betas_{i}")
    kept = case[f"out_kept_{i}"].flip(0)
    table = DiscreteVP.from_betas(betas)
    t = torch.cat([table.label_time(kept.to(F64)), torch.zeros(1, dtype=F64)])
    alpha, sigma = table.alpha(t[:-1]), table.sigma(t[:-1])
    case.check(alpha.flip(0) ** 2, f"out_alphas_cumprod_{i}")
    case.check(kernels.forward_kernel(table, t)[1].flip(0), f"out_betas_{i}")
    a, b, c = kernels.ancestral(table, t)
    case.check((c**2).flip(0), f"out_posterior_variance_{i}")
    log_var = case[f"out_posterior_log_variance_clipped_{i}"][1:]  # entry 0 is 0 there, clipped to the next
    torch.testing.assert_close((c**2).log().flip(0)[1:], log_var, rtol=1e-9, atol=1e-11)
    case.check((b * alpha / sigma**2).flip(0), f"out_posterior_mean_coef1_{i}")
    case.check((a - b / sigma**2).flip(0), f"out_posterior_mean_coef2_{i}")
    if i == 1:
        cosine, t = CosineVP(), t[:-1].flip(0)
        case.check(cosine.alpha(t) ** 2, "out_alphas_cumprod_1")
        case.check(1 - cosine.sigma(t) ** 2, "out_alphas_cumprod_1")
        torch.testing.assert_close(cosine.time(table.lam(t)), t, rtol=1e-9, atol=0)


def test_sigma_schedules():
    """k-diffusion's noise levels, n of them and a 0, are our grids of n steps `to_zero`."""
    case = load("kdiff/sigma_schedules")
    for i, p in enumerate(case.params["schedules"]):
        if p["name"] == "vp":
            sde = VP(p["beta_min"], p["beta_min"] + p["beta_d"])
            ts = grids.uniform(sde, p["n"], t_end=p["eps_s"], to_zero=True)
        else:
            sde = EDM(T=p["sigma_max"], t_min=p["sigma_min"])
            knobs = {"rho": p["rho"]} if "rho" in p else {}
            ts = getattr(grids, p["name"])(sde, p["n"], to_zero=True, **knobs)
        case.check(torch.exp(-sde.lam(ts)), f"out_sigmas_{i}")


def test_discrete_wrapper():
    """A discrete-time network as a continuous denoiser, moved to sigma space by `change_sde`.

    Between labels k-diffusion interpolates log sigma and we interpolate B = -log alpha_bar, so its labels are handed
    over there (out_t_of_sigma), and out_sigma_of_t is compared at whole labels only.
    """
    case = load("kdiff/discrete_wrapper")
    table = DiscreteVP(case["in_alphas_cumprod"])
    labels = torch.arange(1000, dtype=F64)
    case.check(torch.exp(-table.lam(table.label_time(labels))), "out_table_sigmas")
    whole = case["in_t"] == case["in_t"].round()
    sigma = torch.exp(-table.lam(table.label_time(case["in_t"][whole])))
    torch.testing.assert_close(sigma, case["out_sigma_of_t"][whole], rtol=1e-9, atol=1e-11)
    on_label = (case["out_t_of_sigma"] - case["out_t_of_sigma"].round()).abs() < 1e-9
    inside = on_label & (case["in_sigma"] > 0.01) & (case["in_sigma"] < 157.5)
    label = table.label(table.time(-case["in_sigma"].log()))
    torch.testing.assert_close(label[inside], case["out_t_of_sigma"][inside], rtol=1e-9, atol=1e-9)

    x, s = case["in_x"], case["in_sigma"][:5]
    edm = EDM(T=500.0)
    for kind in ("eps", "v"):
        net = Model(lambda y, c: toy(y, c / 100), VP(), kind, label=lambda t: case["out_t_of_sigma"][:5])
        case.check(denoised(change_sde(net, VP(), edm)(x, s), x, s, edm), f"out_denoised_{kind}")
    cosine = CosineVP(s=0)
    case.check(cosine.time(-case["in_sigma"].log()), "out_cosine_t_of_sigma")
    net = Model(toy, cosine, "v")
    case.check(denoised(change_sde(net, cosine, edm)(x, s), x, s, edm), "out_denoised_cosine_v")


def test_preconditioning():
    """EDM's four preconditionings of one network are four `Model`s; VP, VE and iDDPM seen from sigma space."""
    case = load("edm/preconditioning")
    x, s, edm = case["in_x"], case["in_sigma"], EDM(T=500.0)
    vp, ve = VP(), VE(0.02, 100.0)
    case.check(torch.exp(-vp.lam(case["in_t"])), "out_VP_sigma_of_t")
    case.check(vp.time(-s.log()), "out_VP_t_of_sigma")
    case.check(torch.exp(-vp.lam(torch.tensor([vp.t_min, vp.T], dtype=F64))), "out_VP_range")
    case.check(torch.stack([ve.sigma(u) for u in torch.tensor([0.0, 1.0], dtype=F64)]), "out_VE_range")

    models = {
        "VP": (Model(toy, vp, "eps", label=lambda t: 999 * t), vp, s),
        "VE": (Model(lambda y, c: -toy(y, c), ve, "eps", label=lambda t: (ve.sigma(t) / 2).log()), ve, s),
        "EDM": (Model(toy, edm, "F"), edm, s),
    }
    # iDDPM: the table u of noise levels from the noisiest down to u_M = 0, label M - 1 - index, sigma rounded to it
    table = DiscreteVP((1 / (1 + case["out_iDDPM_table"][:-1] ** 2)).flip(0))
    models["iDDPM"] = (Model(toy, table, "eps"), table, case["out_iDDPM_sigma"])
    label = 999 - case["out_iDDPM_index"].to(F64)
    torch.testing.assert_close(torch.exp(-table.lam(table.label_time(label))), case["out_iDDPM_sigma"])
    for name, (model, sde, sigma) in models.items():
        case.check(denoised(change_sde(model, sde, edm)(x, sigma), x, sigma, edm), f"out_{name}_denoised")


def test_preconditioned_denoiser():
    """k-diffusion's Denoiser: c_skip and c_out are the line from F to x0; the inner network is told sigma."""
    case = load("kdiff/preconditioned_loss")
    x0, s, edm = case["in_x"], case["in_sigma"], EDM()
    c_skip, c_out = line("F", "x0", edm, s, case.params["sigma_data"])
    case.check(c_skip, "out_c_skip")
    case.check(c_out, "out_c_out")
    x = x0 + s[:, None, None, None] * case["in_noise"]
    model = Model(toy, edm, "F", label=lambda t: t, sigma_data=case.params["sigma_data"])
    case.check(denoised(model(x, s), x, s, edm), "out_denoised")


def test_every_case_is_named():
    """Each case is named by a test of these files, or by the table of what is left out, and not by both."""
    index = FOLDERS[1].parent / "index.json"
    if not index.exists():
        pytest.skip("the reference numbers are not beside the checkout")
    tests = "".join(path.read_text() for path in HERE.glob("test_reference_*.py"))
    table = reference.__doc__.split("reason it is left out")[1].split("Left out within")[0]
    names = [f"{c['group']}/{c['id']}" for c in json.loads(index.read_text())["cases"]]
    left_out = set(table.split())
    assert [n for n in names if (f'"{n}"' in tests) == (n in left_out)] == []

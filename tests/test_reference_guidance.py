"""Guidance rules against closed forms and other programs' numbers.

All agree to the cases' tolerance (rtol 1e-9, atol 1e-11; integrated flows 1e-8), in fact to 11 digits or more.
"""

import pytest
import torch
from reference import F64, Levels, load, recorded

from guidance import cfg, classifier, energy, product
from samplers import ancestral, ddim, grids, heun, hooks, kernels
from scoresde import EDM, DiscreteVP, convert, denoised, flow, gaussian, mixture

TIGHT = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-11}


@pytest.mark.parametrize("name", [
    "guidance/cfg_gaussian_vp",
    "guidance/cfg_gaussian_ve",
    "guidance/cfg_gaussian_shared_cov",
])  # fmt: skip
def test_cfg_on_gaussians(name):
    """The guided score, and where its probability flow ends; the tilted density's own score where it is proper."""
    case = load(name)
    sde, eps, t, x = case.sde(), case.params["eps"], case["in_t"], case["in_x_points"]
    cond = gaussian(case["in_mean_c"], cov=case["in_cov_c"]).score(sde)
    uncond = gaussian(case["in_mean_u"], cov=case["in_cov_u"]).score(sde)
    case.check(uncond(x, t), "out_score_uncond")
    case.check(cond(x, t), "out_score_cond")
    D = x.shape[1]
    starts = torch.cat([case["in_x_T"], torch.zeros(1, D, dtype=F64), torch.eye(D, dtype=F64)])
    for k, w in enumerate(case.params["w"]):
        guided = cfg(cond, uncond, w)
        case.check(guided(x, t), f"out_guided_score_{k}")
        ends = flow(guided, sde, starts, 1.0, eps, **TIGHT)
        case.check(ends[: -D - 1], f"out_flow_end_{k}")
        case.check(ends[-D - 1], f"out_flow_offset_{k}")
        case.check((ends[-D:] - ends[-D - 1]).T, f"out_flow_matrix_{k}")
        if bool(case[f"out_tilted_proper_{k}"]):
            tilted = gaussian(case[f"out_tilted_mean_{k}"], cov=case[f"out_tilted_cov_{k}"]).score(sde)
            case.check(tilted(x, t), f"out_noised_tilted_score_{k}")
            if name.endswith("shared_cov"):  # only then are the two the same
                case.check(guided(x, t), f"out_noised_tilted_score_{k}")


def test_cfg_rule():
    """u + w (c - u) of diffusers' guider; its "original" c + w (c - u) is our w + 1."""
    case = load("guidance/cfg_rules")
    c, u, w = case["in_pred_cond"], case["in_pred_uncond"], case.params["scale"]
    rule = lambda w: cfg(lambda x, t: c, lambda x, t: u, w)(c, torch.ones((), dtype=F64))  # noqa: E731
    case.check(rule(w), "out_cfg")
    case.check(rule(w + 1), "out_cfg_original")


def test_azula():
    """Its CFG, D_c + omega (D_c - D), is w = 1 + omega; its DDIM's eta multiplies the variance, ours the deviation."""
    case = load("guidance/posterior_rules")
    p, x, t = case.params, case["in_x_t"], torch.ones((), dtype=F64)
    sde = Levels(*torch.stack([case["out_a_s_at_s"], case["out_a_s_at_t"]], 1))
    score, cond = case.target().score(sde), case.target("in_cond").score(sde)
    case.check(denoised(score(x, t), x, t, sde), "out_denoised")
    case.check(denoised(cfg(cond, score, 1 + p["omega"])(x, t), x, t, sde), "out_cfg")
    two = torch.tensor([1, 0], dtype=F64)
    case.check(ddim(score, sde, x, two, eta=p["eta"] ** 0.5, noise=recorded(case["in_noise"])), "out_ddim_step")


def test_class_mixture():
    """Class probabilities, conditional scores, and the two ways to guide by a class, which agree."""
    case = load("guidance/class_mixture")
    sde, target = Levels(case["in_a"], case["in_s"]), case.target(labels=case["in_component_class"])
    score = target.score(sde)
    prior = [target.log_weights[target.labels == c].logsumexp(0).exp() for c in range(2)]
    case.check(torch.stack(prior), "out_class_prior")
    for j, x in enumerate(case["in_x_points"]):
        t = torch.tensor(float(j), dtype=F64)
        case.check(score(x, t), f"out_score_{j}")
        case.check(target.class_log_prob(x, sde, t), f"out_class_logp_{j}")
        conds = [target.given(c).score(sde) for c in range(2)]
        case.check(torch.stack([s(x, t) for s in conds], 1), f"out_class_score_{j}")
        logp = [lambda x, t, c=c: target.class_log_prob(x, sde, t)[:, c] for c in range(2)]
        grad = [classifier(score, f)(x, t) - score(x, t) for f in logp]
        case.check(torch.stack(grad, 1), f"out_classifier_gradient_{j}")
        for k, w in enumerate(case.params["w"]):
            case.check(torch.stack([cfg(s, score, w)(x, t) for s in conds], 1), f"out_guided_score_{j}_{k}")
            case.check(torch.stack([classifier(score, f, w)(x, t) for f in logp], 1), f"out_guided_score_{j}_{k}")


def test_product_of_experts():
    case = load("guidance/product_of_experts")
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    sde, x = Levels(torch.cat([case["in_a"], one]), torch.cat([case["in_s"], zero])), case["in_x_points"]
    experts = [gaussian(m, cov=C).score(sde) for m, C in zip(case["in_means"], case["in_covs"], strict=True)]
    n = len(case["in_a"])
    for k, weights in enumerate(case.params["weights"]):
        composed = product(experts, weights)
        for j in range(n):
            case.check(composed(x, torch.tensor(float(j), dtype=F64)), f"out_composed_score_{k}_{j}")
        clean = torch.tensor(float(n), dtype=F64)
        case.check(composed(x, clean), f"out_score_at_zero_{k}")
        if bool(case[f"out_proper_{k}"]):
            whole = gaussian(case[f"out_mean_{k}"], cov=case[f"out_cov_{k}"]).score(sde)
            case.check(whole(x, clean), f"out_score_at_zero_{k}")


@pytest.mark.parametrize("name", [
    "guidance/linear_inverse_0",
    "guidance/linear_inverse_1",
    "guidance/inpainting_exact",
])  # fmt: skip
def test_linear_inverse(name):
    """Diffusion posterior sampling is `energy`; the exact posterior is a mixture with full covariances."""
    case = load(name)
    sde, target, A, y = Levels(case["in_a"], case["in_s"]), case.target(), case["in_A"], case["in_y"]
    posterior = mixture(case["out_posterior_weights"], case["out_posterior_means"], covs=case["out_posterior_covs"])
    score = target.score(sde)
    residual = lambda x0: (y - x0 @ A.T).square().sum(1)  # noqa: E731
    gauss = energy(score, sde, lambda x0: residual(x0) / (2 * case.params["sigma_y"] ** 2))
    norm = energy(score, sde, lambda x0: residual(x0).sqrt())
    for j, x in enumerate(case["in_x_points"]):
        t = torch.tensor(float(j), dtype=F64)
        s = score(x, t)
        case.check(s, f"out_prior_score_{j}")
        case.check(target.denoiser(sde)(x, t), f"out_denoised_{j}")
        case.check(gauss(x, t) - s, f"out_dps_gaussian_{j}")
        case.check(norm(x, t) - s, f"out_dps_norm_{j}")
        case.check(posterior.score(sde)(x, t), f"out_posterior_score_{j}")
        case.check(posterior.score(sde)(x, t) - s, f"out_exact_guidance_{j}")
        case.check(posterior.denoiser(sde)(x, t), f"out_posterior_denoised_{j}")


def test_two_networks():
    """EDM2's guidance by a weaker denoiser is `cfg`; draws are made only where churn acts."""
    case = load("edm/two_network_guidance")
    edm, default = EDM(), case.params["defaults"]
    good, weak = case.target().score(edm), case.target("in_weak").score(edm)
    for run in case.params["runs"]:
        p = {**default, **run}
        ts = grids.karras(edm, p["num_steps"], to_zero=True)
        churn = {"churn": p["S_churn"], "churn_range": (p["S_min"], float(p["S_max"])), "noise_scale": p["S_noise"]}
        score = cfg(good, weak, p["guidance"])
        x = heun(score, edm, case["in_latents"] * edm.T, ts, noise=recorded(case["in_noise"]), **churn)
        case.check(x, f"out_x_final_{p['name']}")


def classified(case, table, shape):
    """The unconditional score, and log p(y | x) up to a constant, whose gradient is the difference of scores."""
    target, cond = case.target(shape=shape), case.target("in_cond", shape=shape)
    return target.score(table), lambda x, t: cond.log_prob(x, table, t) - target.log_prob(x, table, t)


@pytest.mark.parametrize("name", ["gd/ddim_25_classifier", "gd/ddpm_40_classifier"])
def test_guided_diffusion(name):
    """Classifier guidance: DDIM shifts eps, as our `classifier` does.

    Their DDPM adds (posterior variance) g to the mean where the score would add (G^2/r) g, so there the scale is
    multiplied by the ratio of the two, a function of the noise level.
    """
    case = load(name)
    x, table, states, scale = case["in_x_init"], DiscreteVP(case["in_full_alphas_cumprod"]), [], case.params["scale"]
    ts = torch.cat([table.label_time(case["in_kept"].flip(0).to(F64)), torch.zeros(1, dtype=F64)])
    score, logp = classified(case, table, x.shape[1:])
    sampler = ddim
    if name == "gd/ddpm_40_classifier":
        sampler, (_, b, c) = ancestral, kernels.ancestral(table, ts)
        level, factor = torch.exp(-table.lam(ts[:-1])), case.params["scale"] * c**2 / b
        scale = lambda r: factor[(level / r - 1).abs().argmin()]  # noqa: E731
    guided = classifier(score, logp, scale, sde=table)
    x = sampler(guided, table, x, ts, noise=recorded(case["in_noise"]), on_step=hooks.trajectory(states))
    case.check(x, "out_x_final")
    case.check(torch.stack(states), "out_states")


def test_guided_diffusion_one_step():
    """The classifier's gradient, and the conditioned x0 and mean by the shifted score."""
    case = load("gd/one_step")
    table, x, scale = DiscreteVP(case["in_full_alphas_cumprod"]), case["in_x"], case.params["scale"]
    times = torch.cat([torch.zeros(1, dtype=F64), table.label_time(case["in_kept"].to(F64))])
    t, t1 = times[case["in_t"] + 1], times[case["in_t"]]
    score, logp = classified(case, table, x.shape[1:])
    guided = classifier(score, logp, scale)
    case.check(guided(x, t) - score(x, t), "out_classifier_gradient")
    case.check(denoised(guided(x, t), x, t, table), "out_conditioned_xstart_EPSILON_FIXED_SMALL")
    rows = zip(x.split(1), torch.stack([t, t1], 1), strict=True)
    mean = [ancestral(guided, table, row, two, noise=torch.zeros_like) for row, two in rows]
    case.check(torch.cat(mean), "out_conditioned_score_mean_EPSILON_FIXED_SMALL")


def test_clip_guided():
    """k-diffusion's CLIP guidance is `energy` with the spherical distance of embeddings, here tanh(W x0)."""
    case = load("kdiff/clip_guided")
    W, goal, x, sigma, edm = case["in_embed_matrix"], case["in_target"], case["in_x"], case["in_sigma"], EDM()

    def distance(u, v):
        u, v = (torch.nn.functional.normalize(e, dim=-1) for e in (u, v))
        return 2 * torch.asin((u - v).norm(dim=-1) / 2) ** 2

    case.check(distance(case["in_embed_a"], case["in_embed_b"]), "out_spherical_distance")
    E = lambda x0: distance(torch.tanh(x0.flatten(1) @ W.T), goal)  # noqa: E731
    guided = energy(case.target(shape=x.shape[1:]).score(edm), edm, E, case.params["scale"])
    case.check(convert(guided(x, sigma), x, sigma, edm, "score", "x0"), "out_guided_denoised")

"""Training losses with given randomness: score_sde, EDM, k-diffusion and guided-diffusion are weights on `dsm`.

All agree to the cases' tolerance (rtol 1e-9, atol 1e-11), in fact to 13 digits or more.
"""

import pytest
import torch
from reference import F64, load, recorded, sde_of, toy

from scoresde import EDM, VE, VP, DiscreteVP, Model, change_sde, dsm, linear_betas


@pytest.mark.parametrize(("i", "kind", "label"), [
    (0, "eps", lambda sde, t: 999 * t),
    (1, "eps", lambda sde, t: 999 * t),
    (2, "score", lambda sde, t: sde.sigma(t)),
])  # fmt: skip
def test_score_sde(i, kind, label):
    """mean: our average over entries; sum: half the sum; std: the eps weight; g2: the likelihood weight."""
    case = load("ssde/losses")
    sde, x0, eps = sde_of(case.params["sdes"][i]), case["in_batch"], case.params["eps"]
    model = Model(lambda x, c: toy(x, c / 100), sde, kind, label=lambda t: label(sde, t))
    t = eps + case["in_uniform"] * (1 - eps)
    for weighting, ours in (("std", "eps"), ("g2", "likelihood")):
        loss = dsm(model, sde, x0, t, weighting=ours, noise=recorded([case["in_noise"]])).mean()
        case.check(loss, f"out_loss_{i}_mean_{weighting}")
        case.check(0.5 * x0[0].numel() * loss, f"out_loss_{i}_sum_{weighting}")


def test_score_sde_discrete():
    """DDPM's loss on a table of betas; SMLD's on sigmas d_{N-1-k}, half the sum."""
    case = load("ssde/losses")
    x0, k, net = case["in_batch"], case["in_labels"].to(F64), lambda x, c: toy(x, c / 100)
    table = DiscreteVP.from_betas(linear_betas())
    noise = [case["in_noise"]]
    loss = dsm(Model(net, table), table, x0, table.label_time(k), noise=recorded(noise))
    case.check(loss.mean(), "out_loss_ddpm_0")
    sigma = sde_of(case.params["sdes"][2]).sigma(torch.linspace(1, 0, 1000, dtype=F64))[case["in_labels"]]
    model = Model(net, EDM(), "score", label=lambda t: k)
    loss = 0.5 * x0[0].numel() * dsm(model, EDM(), x0, sigma, noise=recorded(noise))
    case.check(loss.mean(), "out_loss_smld_2")


def test_edm():
    """EDM's three losses of one denoiser D(y, s) = toy(y, log s); their entries averaged.

    VP and VE weigh |D - x0|^2 by 1/s^2, which is eps; the VP one is also taken in VP's own coordinates.
    """
    case = load("edm/losses")
    x0, u, g = case["in_images"], case["in_uniform"].flatten(), case["in_normal"].flatten()
    p = case.params
    vp, ve, edm = VP(p["VP"]["beta_min"], p["VP"]["beta_min"] + p["VP"]["beta_d"]), VE(**p["VE"]), EDM()
    denoiser = Model(toy, edm, "x0", label=torch.log)

    def check(name, score, sde, t, **knobs):
        want = case[f"out_loss_{name}"].flatten(1).mean(1)
        loss = dsm(score, sde, x0, t, noise=recorded([case["in_noise"]]), **knobs)
        torch.testing.assert_close(loss, want, rtol=case.rtol, atol=case.atol)

    t = 1 + u * (p["VP"]["epsilon_t"] - 1)
    check("VP", denoiser, edm, torch.exp(-vp.lam(t)))
    check("VP", change_sde(denoiser, edm, vp), vp, t)
    check("VE", change_sde(denoiser, edm, ve), ve, u)
    sd = p["EDM"]["sigma_data"]
    check("EDM", denoiser, edm, torch.exp(p["EDM"]["P_mean"] + p["EDM"]["P_std"] * g), weighting="edm", sigma_data=sd)


def test_k_diffusion():
    """Its losses weigh |F - target|^2, our `edm` loss, by 1, (s sd)^2/(s^2+sd^2)^2, or sd^2/(s^2+sd^2): then eps."""
    case = load("kdiff/preconditioned_loss")
    x0, s, sd, edm = case["in_x"], case["in_sigma"], case.params["sigma_data"], EDM()
    model = Model(toy, edm, "F", label=lambda t: t, sigma_data=sd)
    loss = lambda w: dsm(model, edm, x0, s, weighting=w, sigma_data=sd, noise=recorded([case["in_noise"]]))  # noqa: E731
    case.check(loss("edm"), "out_loss_karras")
    case.check(loss("edm") * (s * sd) ** 2 / (s**2 + sd**2) ** 2, "out_loss_soft_min_snr")
    case.check(loss("eps"), "out_loss_snr")
    case.check(loss("eps"), "out_loss_simple")


def test_guided_diffusion():
    """Mean squared errors of eps and x0 on a respaced chain; the terms with a variational bound have no counterpart."""
    case = load("gd/training_losses")
    x0 = case["in_x_start"]
    table = DiscreteVP(case["in_full_alphas_cumprod"])
    t = table.label_time(case["in_kept"][case["in_t"]].to(F64))
    for kind, weighting, key in (("eps", "eps", "EPSILON"), ("x0", "x0", "START_X")):
        model = Model(lambda x, c: toy(x, c / 100), table, kind)
        loss = dsm(model, table, x0, t, weighting=weighting, noise=recorded([case["in_noise"]]))
        case.check(loss, f"out_mse_MSE_FIXED_SMALL_{key}")
        case.check(loss, f"out_loss_MSE_FIXED_SMALL_{key}")

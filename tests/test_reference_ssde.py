"""score_sde's samplers, with its recorded noise: Euler, reverse diffusion, ancestral, Langevin, inpainting.

Its habits, reproduced by grids and wrappers and not by our samplers: N steps of 1/N while the model is called at
linspace(1, eps, N) (`Elsewhere`); reverse diffusion and ancestral steps from a table of betas or sigmas of its own; the
Langevin step from norms averaged over the batch; and the result is the last step's mean (the last draw is 0 here).
Every state handed to the model agrees to the cases' tolerance (rtol 1e-9, atol 1e-11), in fact to 12 digits or more.
"""

import pytest
import torch
from reference import F64, Elsewhere, load, moments, recorded, seen

from samplers import annealed, euler_maruyama, grids, hooks, kernels, predictor_corrector
from scoresde import EDM, VE, VP, DiscreteVP, gaussian, linear_betas, prior_sample

CASES = [
    "ssde/pc_vp_em",
    "ssde/pc_vp_ancestral",
    "ssde/pc_vp_rd_ode",
    "ssde/pc_vp_rd_langevin",
    "ssde/pc_subvp_em",
    "ssde/pc_ve_em",
    "ssde/pc_ve_ancestral_ald",
    "ssde/pc_ve_rd_langevin",
    "diffusers/mix_score_sde_ve_20",
    "diffusers/golden_score_sde_ve",
]


def stepped(sde, name, N):
    """The SDE whose kernels make the peer's steps, and its grid."""
    if name == "euler_maruyama":  # steps of 1/N; the coefficients are moved by `Elsewhere`
        return sde, torch.linspace(1, 0, N + 1, dtype=F64)
    if isinstance(sde, VP):
        table = DiscreteVP.from_betas(linear_betas(N))
        return table, grids.uniform(table, N, to_zero=True)
    d = sde.sigma(torch.linspace(0, 1, N, dtype=F64)).flip(0)  # VE: from d_{N-1} down to d_0 and then 0
    return EDM(T=sde.sigma_max), torch.cat([d, d.new_zeros(1)])


def batch_langevin(snr):
    """The published step, e = 2 A (snr mean|z| / mean|s|)^2 with means over the batch."""

    def sizes(sde, ts):
        A = kernels.forward_kernel(sde, ts)[0] ** 2
        norm = lambda v: v.flatten(1).norm(dim=1).mean()  # noqa: E731
        return lambda i, s, z: 2 * A[i] * (snr * norm(z) / norm(s)) ** 2

    return sizes


def half_score(sde, ts):
    """Reverse diffusion's probability flow: half the score term, no noise."""
    a, b, c = kernels.reverse_diffusion(sde, ts)
    return a, b / 2, 0 * c


@pytest.mark.parametrize("name", CASES)
def test_predictor_corrector(name):
    case = load(name)
    p = case.params
    if name.startswith("ssde"):
        sde, options = case.sde(), p["options"]
        N, eps, snr, predictor, corrector = (
            p["sde"]["N"],
            options["eps"],
            options["snr"],
            p["predictor"],
            p["corrector"],
        )
        x = prior_sample(sde, case["in_prior"], noise=lambda x: x)
        times, score = torch.linspace(1, eps, N, dtype=F64), case.target(shape=x.shape[1:]).score(sde)
    else:  # diffusers' copy of the VE sampler: the model is told sigma, and the noisy state returned
        r, x = p["resolved"], case["in_x_init"]
        sde, N, snr, times = VE(r["sigma_min"], r["sigma_max"]), p["steps"], r["snr"], case["in_eval_ratio"][::2]
        predictor, corrector, options = "reverse_diffusion", "langevin", {"probability_flow": False}
        score = lambda x, sigma: x * sigma / (sigma + 1)  # noqa: E731
        if "in_gm_means" in case.arrays:
            score = case.target(shape=x.shape[1:]).score(EDM())
    times = torch.cat([times, times[-1:]])
    score, states, _ = seen(score)
    own, ts = stepped(sde, predictor, N)
    there = Elsewhere(sde if predictor == "euler_maruyama" else own, ts, times)
    kernel = {
        "euler_maruyama": kernels.euler_maruyama,
        "reverse_diffusion": half_score if options["probability_flow"] else kernels.reverse_diffusion,
        "ancestral_sampling": kernels.ancestral_large if isinstance(sde, VP) else kernels.ancestral,
    }[predictor]
    ald = lambda *_: annealed(snr)(sde, torch.cat([times[:-1], times.new_zeros(1)]))  # noqa: E731
    knobs = {"none": {"n_correct": 0}, "langevin": {"corrector": batch_langevin(snr)}, "ald": {"corrector": ald}}[
        corrector
    ]

    def run(noise):
        steps = there if predictor == "euler_maruyama" else own
        z = recorded(noise)
        return predictor_corrector(there.score(score), steps, x, ts, predictor=kernel, noise=z, **knobs)

    z = case["in_noise"]
    if name.startswith("ssde"):
        case.check(run(z), "out_x_final_noisy")
        case.check(torch.stack(states), "out_model_inputs")
        case.check(run([*z[:-1], 0 * z[0]]), "out_x_final")
        if predictor == "euler_maruyama":
            case.check(euler_maruyama(there.score(score), there, x, ts, noise=recorded(z)), "out_x_final_noisy")
    else:
        case.check(run(z), "out_x_final")


@pytest.mark.parametrize("name", ["gauss/moments_vp", "gauss/moments_subvp", "gauss/moments_ve"])
def test_moments(name):
    """Exact moments of score_sde's Euler steps on Gaussian data."""
    case = load(name)
    sde, eps = case.sde(), case.params["eps"]
    score = gaussian(case["in_mu"], var=case["in_var"]).score(sde)
    for n in case.params["steps"]:
        ts, times = torch.linspace(1, 0, n + 1, dtype=F64), torch.linspace(1, eps, n, dtype=F64)
        there = Elsewhere(sde, ts, times[[*range(n), -1]])
        run = lambda x, z: euler_maruyama(there.score(score), there, x, ts, noise=z)  # noqa: B023, E731
        mean, var, last = moments(run, 3, sde.prior_std, n)
        case.check(mean, f"out_em_ssde_{n}_mean")
        case.check(var, f"out_em_ssde_{n}_var")
        case.check(last, f"out_em_ssde_{n}_var_last_mean")


@pytest.mark.parametrize("name", ["ssde/inpaint_vp", "ssde/inpaint_subvp", "ssde/inpaint_ve"])
def test_inpainting(name):
    """Replacement by `hooks.inpaint`, after the corrector and again after the predictor, both at the current t_i.

    So each stage is a run of its own on a two-point grid, with a predictor that does nothing in the corrector's.
    The peer's final mean keeps the noisy state where the image is unknown.
    """
    case = load(name)
    p, data, mask = case.params, case["in_data"], case["in_mask"]
    sde, N, draw = case.sde(), p["sde"]["N"], recorded(case["in_noise"])
    times = torch.linspace(1, p["eps"], N, dtype=F64)
    own, ts = stepped(sde, p["predictor"], N)
    score = case.target(shape=data.shape[1:]).score(sde)
    stay = lambda sde, ts: (torch.ones(1, dtype=F64), *torch.zeros(2, 1, dtype=F64))  # noqa: E731
    x = torch.where(mask.bool(), data, prior_sample(sde, case["in_prior"], noise=lambda x: x))
    for i, t in enumerate(times):
        two = ts[i : i + 2]
        there = Elsewhere(sde, two, t.expand(2))
        steps = there if p["predictor"] == "euler_maruyama" else own
        knobs = {"noise": draw, "on_step": hooks.inpaint(there, data, mask, noise=draw)}
        correct = {"n_correct": int(p["corrector"] == "langevin"), "corrector": batch_langevin(p["snr"])}
        x = predictor_corrector(there.score(score), steps, x, two, predictor=stay, **correct, **knobs)
        kernel = getattr(kernels, p["predictor"])
        x = predictor_corrector(there.score(score), steps, x, two, predictor=kernel, n_correct=0, **knobs)
    case.check(x, "out_x_final_noisy")
    case.check(torch.where(mask.bool(), sde.alpha(times[-1]) * data, x), "out_x_final")

"""Discrete chains: diffusers' DDIM and DDPM and guided-diffusion's loops, on their tables, with their recorded noise.

A respaced chain is a grid of labels on the full table, and a last step to alpha-bar 1 is the time 0, so no sampler of
ours knows about spacing.  Every state agrees to the cases' tolerance (rtol 1e-9, atol 1e-11), in fact to 12 digits or
more.
"""

import pytest
import torch
from reference import F64, load, recorded

from samplers import ancestral, ddim, hooks, kernels
from scoresde import DiscreteVP, Model, convert


def grid(table, labels):
    """Times of the labels, in order, and 0."""
    return torch.cat([table.label_time(labels.to(F64)), torch.zeros(1, dtype=F64)])


def network(target, table, kind):
    """The exact network of this prediction, told the label; behind `Model` again, as a score."""
    score = target.score(table)

    def net(x, label):
        t = table.label_time(label)
        return convert(score(x, t), x, t, table, "score", kind)

    return Model(net, table, kind)


@pytest.mark.parametrize(("name", "kind"), [
    ("diffusers/mix_ddim_10", "eps"),
    ("diffusers/mix_ddim_20_eta1_x0", "x0"),
    ("diffusers/mix_ddim_8_trailing_v", "v"),
    ("diffusers/mix_ddpm_25", "eps"),
    ("diffusers/mix_dpmm1_plain_10", "eps"),
])  # fmt: skip
def test_diffusers(name, kind):
    """The last draw of DDIM with eta = 1 has the factor 0 there and is not made here.

    DPM-Solver of order 1 is DDIM; that run ends at label 0, not at the data.
    """
    case = load(name)
    x, table, states = case["in_x_init"], DiscreteVP(case["in_alphas_cumprod"]), []
    model = network(case.target(shape=x.shape[1:]), table, kind)
    run = {"noise": recorded(case.arrays.get("in_noise", ())), "on_step": hooks.trajectory(states)}
    ts = grid(table, case["in_eval_t"])
    if "in_ratio_nodes" in case.arrays:
        ts[-1] = table.label_time(torch.zeros(1, dtype=F64))
    if case.params["class"] == "DDPMScheduler":
        x = ancestral(model, table, x, ts, **run)
    else:
        x = ddim(model, table, x, ts, eta=case.params.get("eta", 0.0), **run)
    case.check(x, "out_x_final")
    case.check(torch.stack(states), "out_trajectory")


def test_diffusers_published_ddpm():
    """The published DDPM numbers: 1000 steps, eps = x t/(t + 1), x0 clipped to [-1, 1], noise from torch's generator.

    Clipping x0 and taking the posterior mean at it is a score.  (For DDIM it is not: diffusers keeps the old eps.)
    """
    case = load("diffusers/golden_ddpm")
    table, recipe = DiscreteVP(case["in_alphas_cumprod"]), case.params["noise_recipe"]
    generator = torch.Generator().manual_seed(recipe["seed"])
    noise = lambda x: torch.randn(recipe["shape"], generator=generator).to(F64)  # noqa: E731

    def clipped(x, t):
        label = table.label(t)
        x0 = convert(x * label / (label + 1), x, t, table, "eps", "x0").clamp(-1, 1)
        return convert(x0, x, t, table, "x0", "score")

    x = ancestral(clipped, table, case["in_x_init"], grid(table, case["in_eval_t"]), noise=noise)
    case.check(x, "out_x_final")


@pytest.mark.parametrize(("name", "sampler", "knobs"), [
    ("gd/ddpm_25", ancestral, {}),
    ("gd/ddim_25", ddim, {"eta": 0.0}),
    ("gd/ddim_25_eta1_cosine", ddim, {"eta": 1.0}),
])  # fmt: skip
def test_guided_diffusion(name, sampler, knobs):
    """Their draw at the last step has the factor 0."""
    case = load(name)
    x, table, states = case["in_x_init"], DiscreteVP(case["in_full_alphas_cumprod"]), []
    model = network(case.target(shape=x.shape[1:]), table, "eps")
    run = {"noise": recorded(case["in_noise"]), "on_step": hooks.trajectory(states)}
    case.check(sampler(model, table, x, grid(table, case["in_kept"].flip(0)), **knobs, **run), "out_x_final")
    case.check(torch.stack(states), "out_states")


def test_one_step():
    """The reverse Gaussian of one step, row by row: mean from both predictions, the fixed variances, x0.

    Not here: the large variance of the last step (i = 0), which they borrow from i = 1, and the learned variances.
    """
    case = load("gd/one_step")
    table, x = DiscreteVP(case["in_full_alphas_cumprod"]), case["in_x"]
    ts = grid(table, case["in_kept"].flip(0)).flip(0)  # ts[i + 1] is the time of kept label i
    steps = [ts[[i + 1, i]] for i in case["in_t"].tolist()]
    for kind, name in (("eps", "EPSILON"), ("x0", "START_X")):
        model = network(case.target(shape=x.shape[1:]), table, kind)
        mean = [
            ancestral(model, table, row, two, noise=torch.zeros_like)
            for row, two in zip(x.split(1), steps, strict=True)
        ]
        case.check(torch.cat(mean), f"out_mean_{name}_FIXED_SMALL")
        t = torch.stack([two[0] for two in steps])
        x0 = convert(model(x, t), x, t, table, "score", "x0")
        case.check(x0, f"out_pred_xstart_{name}_FIXED_SMALL")
    for kernel, name, first in ((kernels.ancestral, "SMALL", 0), (kernels.ancestral_large, "LARGE", 1)):
        variance = torch.cat([kernel(table, two)[2] ** 2 for two in steps])
        want = case[f"out_variance_EPSILON_FIXED_{name}"][:, 0, 0, 0]
        torch.testing.assert_close(variance[first:], want[first:], rtol=case.rtol, atol=case.atol)

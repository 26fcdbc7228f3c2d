"""Singlestep samplers against other programs' numbers, with their recorded noise.

DPM-Solver, DPM-Solver++, DPM-2 and SDE-DPM-Solver++(2S) as dpm-solver, diffusers and k-diffusion run them.  Where their
inner points are ours (1/2, or 1/3 and 2/3 of a step in lambda) the samplers themselves run; elsewhere rows are made of
`exponential.weights` and `published.dpmpp`.  Lists of orders and step control are theirs, and told here.  Agreement is
to the cases' tolerance (rtol 1e-9, atol 1e-10; adaptive 1e-6), in fact to 12 digits or more.
"""

import math
from itertools import accumulate, pairwise

import pytest
import torch
from reference import F64, Ratio, load, recorded, seen, told

from guidance import energy
from samplers import dpm_solver, grids, hooks, midpoint, published, seeds
from samplers.exponential import Form, nodes, scale, weights
from samplers.rows import Row, run_rows
from scoresde import EDM, VP, DiscreteVP, change_sde, convert

X0, EPS = Form(0.0), Form(math.inf)


def orders(n, q):
    """dpm-solver's list of orders for n calls, none above q; k-diffusion's for q = 3."""
    if q == 2:
        return [2] * (n // 2) + [1] * (n % 2)
    return [3] * (n // 3 - (n % 3 == 0)) + {0: [2, 1], 1: [1], 2: [2]}[n % 3]


def mixed(score, sde, x, ts, orders, predict, **run):
    """A step of each order in turn."""
    for two, order in zip(ts.unfold(0, 2, 1), orders, strict=True):
        x = dpm_solver(score, sde, x, two, order=order, predict=predict, **run)
    return x


def stages(score, sde, x, ts, form, orders, inner=weights, **run):
    """DPM-Solver with inner points anywhere: a step of order p spends p steps of ts.

    inner: the rule of the second inner point of order 3.  Order 2 is half the slope with the first-order weight.
    """
    at = nodes(form, sde, ts)
    q, V = scale(at)
    steps, start = [], 0
    for p in orders:
        rules, rows = {1: [weights], 2: [weights, published.dpmpp], 3: [weights, inner, weights]}[p], []
        for j, rule in enumerate(rules):
            known = torch.tensor([[start, start + j][: j + 1]])
            a, b, _ = rule(at, torch.tensor([start]), torch.tensor([start + j + 1]), known, torch.zeros(1, dtype=F64))
            first, *newest = (b * V[known])[0].tolist()
            rows.append(Row(at.t[start + j], q[start + j], float(a), (*newest, *[0.0] * (j - 1), first)))
        steps.append(rows)
        start += p
    return run_rows(score, sde, x, ts[[0, *accumulate(orders)]], lambda *_: steps, **run)


def test_orders():
    case = load("dpms/schedules")
    for key in (k for k in case.arrays if k.startswith("out_orders")):
        q, n = (int(part[1:]) for part in key.split("_")[2:])
        assert orders(n, q) == case[key].tolist()


def test_dpm_solver_2():
    """Times uniform in t, the inner ones too."""
    case = load("dpms/singlestep2_9")
    x, vp, store = case["in_x_init"], VP(), []
    ts = grids.uniform(vp, 9, t_end=case.params["resolved"]["t_end"])
    score, _, times = seen(case.target(shape=x.shape[1:]).score(vp))
    x = stages(score, vp, x, ts, X0, orders(9, 2), on_step=hooks.trajectory(store))
    case.check(x, "out_x_final")
    case.check(torch.stack(store), "out_states")
    case.check(torch.stack(times), "out_eval_t")


def test_dpm_solver_3():
    """Times uniform in lambda, orders 3, 3, 3, 2, 1."""
    case = load("dpms/singlestep3_eps_12")
    x, vp, store, list_ = case["in_x_init"], VP(), [], orders(12, 3)
    ts = grids.log_snr(vp, len(list_), t_end=case.params["resolved"]["t_end"])
    case.check(ts, "out_outer_times")
    score, _, times = seen(case.target(shape=x.shape[1:]).score(vp))
    case.check(mixed(score, vp, x, ts, list_, "eps", on_step=hooks.trajectory(store)), "out_x_final")
    case.check(torch.stack(store), "out_states")
    case.check(torch.stack(times), "out_eval_t")


def embedded(score, low_score, sde, x, lam, lam1):
    """DPM-Solver-3 over one step and the order-2 value of its first inner point."""
    ts = sde.time(torch.stack([lam, lam + (lam1 - lam) / 3, lam1]))
    low = stages(low_score, sde, x, ts, EPS, [2])
    return dpm_solver(score, sde, x, ts[[0, 2]], order=3), low


def scaled_error(high, low, before, p):
    return (high - low) / torch.maximum(low.abs(), before.abs()).mul(p["rtol"]).clamp(min=p["atol"])


def test_dpm_solver_adaptive():
    """The step control is dpm-solver's, told here: one step for the whole batch, by its worst sample."""
    case = load("dpms/adaptive3_eps")
    p, x, vp = case.params["resolved"], case["in_x_init"], VP()
    plain = case.target(shape=x.shape[1:]).score(vp)
    score, _, times = seen(plain)
    lam, end = (vp.lam(torch.tensor(p[key], dtype=F64)) for key in ("t_start", "t_end"))
    h, before = torch.tensor(0.05, dtype=F64), x
    while abs(vp.time(lam) - p["t_end"]) > 1e-5:
        high, low = embedded(score, plain, vp, x, lam, lam + h)
        error = scaled_error(high, low, before, p).square().mean(1).sqrt().max()
        if error <= 1:
            x, before, lam = high, low, lam + h
        h = torch.minimum(0.9 * h * error ** (-1 / 3), end - lam)
    case.check(x, "out_x_final")
    case.check(torch.stack(times), "out_eval_t")


def test_k_diffusion_adaptive():
    """The step control is k-diffusion's, told here: one step for the whole batch, by its mean error."""
    case = load("kdiff/dpm_adaptive3")
    p, x = case.params["resolved"], case["in_x_init"]
    edm = EDM(T=case.params["sigma_max"])
    plain = case.target(shape=x.shape[1:]).score(edm)
    score, asked, _ = seen(plain)
    lam, end = (-torch.tensor(case.params[key], dtype=F64).log() for key in ("sigma_max", "sigma_min"))
    h, before, taken = p["h_init"], x, [0, 0]
    while lam < end - 1e-5:
        lam1 = torch.minimum(end, lam + h)
        high, low = embedded(score, plain, edm, x, lam, lam1)
        factor = (scaled_error(high, low, before, p).square().mean().sqrt() + 1e-8) ** (-p["icoeff"] / p["order"])
        factor = 1 + torch.atan(factor - 1)
        accepted = bool(factor >= p["accept_safety"])
        taken[not accepted] += 1
        if accepted:
            x, before, lam = high, low, lam1
        h = h * factor
    assert taken == case["out_accepted_rejected"].tolist()
    assert len(asked) == int(case["out_nfe"])
    case.check(x, "out_x_final")


@pytest.mark.parametrize(("name", "inner"), [
    ("diffusers/golden_dpms", weights),
    ("diffusers/golden_dpms_karras", weights),
    ("diffusers/mix_dpms2_10", weights),
    ("diffusers/mix_dpms3_9", published.dpmpp),
])  # fmt: skip
def test_diffusers(name, inner):
    """Stages sit at the points of the grid; its order 3 reaches the second by its own order 2.

    params.order_list counts up within a step; a new step starts at each 1.
    """
    case = load(name)
    x, sde, nodes, store = case["in_x_init"], Ratio(), case["in_ratio_nodes"], []
    counted = [*case.params["order_list"], 1]
    ends = [i for i, (k, following) in enumerate(pairwise(counted)) if following == 1]
    list_ = [counted[i] for i in ends]
    mix = "in_gm_means" in case.arrays
    score = case.target(shape=x.shape[1:]).score(sde) if mix else told(case, sde)
    case.check(stages(score, sde, x, nodes, X0, list_, inner, on_step=hooks.trajectory(store)), "out_x_final")
    if mix:
        torch.testing.assert_close(torch.stack(store), case["out_trajectory"][ends], rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("name", ["diffusers/golden_kdpm2", "diffusers/mix_kdpm2_10"])
def test_kdpm2(name):
    """DPM-2.  The published loop (not a correct sampler) sees scaled states, and keeps those that start a step."""
    case = load(name)
    x, nodes, labels = case["in_x_init"], case["in_ratio_nodes"].unique().flip(0), iter(case["in_eval_t"])
    edm, store = EDM(T=nodes[0].item()), []
    if name == "diffusers/mix_kdpm2_10":
        table = DiscreteVP(case["in_alphas_cumprod"])
        score, _, levels = seen(change_sde(case.target(shape=x.shape[1:]).score(table), table, edm))
        case.check(midpoint(score, edm, x, nodes, on_step=hooks.trajectory(store)), "out_x_final")
        ends = [*range(1, len(case["in_eval_t"]) - 1, 2), -1]
        torch.testing.assert_close(torch.stack(store), case["out_trajectory"][ends], rtol=case.rtol, atol=case.atol)
        torch.testing.assert_close(torch.stack(levels), case["in_eval_ratio"])
        return

    calls = []

    def scaled(x, r):
        return x / (1 + r**2).sqrt()

    def score(x, r):
        calls.append(r)
        label = next(labels)
        return -(scaled(x, r) if len(calls) % 2 == 0 else x) * label / (label + 1) / r

    hook = lambda i, r, x: scaled(x, r)  # noqa: E731
    case.check(midpoint(score, edm, scaled(x, nodes[0]), nodes, on_step=hook), "out_x_final")


@pytest.mark.parametrize(("name", "sampler"), [
    ("kdiff/dpm_2", midpoint),
    ("kdiff/dpmpp_2s_eta0", lambda *run, **hook: dpm_solver(*run, order=2, predict="x0", **hook)),
])  # fmt: skip
def test_k_diffusion(name, sampler):
    case = load(name)
    x, nodes = case["in_x_init"], case["in_sigmas"]
    edm, store = EDM(T=nodes[0].item()), [x]
    score, asked, _ = seen(case.target(shape=x.shape[1:]).score(edm))
    case.check(sampler(score, edm, x, nodes, on_step=hooks.trajectory(store)), "out_x_final")
    case.check(torch.stack(store[:-1]), "out_x_at_step_start")
    assert len(asked) == int(case["out_nfe"])


def test_dpm_fast():
    """DPM-Solver of orders 3, 3, 3, 2, 1."""
    case = load("kdiff/dpm_fast_12")
    x, p = case["in_x_init"], case.params
    edm, store = EDM(T=p["sigma_max"], t_min=p["sigma_min"]), [x]
    list_ = orders(p["n"], 3)
    score, asked, _ = seen(case.target(shape=x.shape[1:]).score(edm))
    ts = grids.exponential(edm, len(list_))
    case.check(mixed(score, edm, x, ts, list_, "eps", on_step=hooks.trajectory(store)), "out_x_final")
    case.check(torch.stack(store[:-1]), "out_x_at_step_start")
    assert len(asked) == int(case["out_nfe"])


def test_dpmpp_sde():
    """SDE-DPM-Solver++(2S) is SEEDS-2 in data form.

    k-diffusion draws z_1 for the stage and z_2 for the whole step, each from the step's start; our second draw is what
    the stage's noise, carried on, lacks of it:  (half s1/mid) stage z_1 + rest w = whole z_2.
    """
    case = load("kdiff/dpmpp_sde")
    x, nodes = case["in_x_init"], case["in_sigmas"]
    edm, store, draws = EDM(T=nodes[0].item()), [x], []
    for (s, s1), (z1, z2) in zip(nodes[:-1].unfold(0, 2, 1), case["in_noise"].unflatten(0, (-1, 2)), strict=True):
        half = (s1 / s).sqrt()  # e^(-h/2), sigma1/sigma of either half
        mid = s * half
        stage, rest, whole = mid * (1 - half**2).sqrt(), s1 * (1 - half**2).sqrt(), s1 * (1 - half**4).sqrt()
        draws += [z1, (whole * z2 - half * s1 / mid * stage * z1) / rest]
    score, asked, _ = seen(case.target(shape=x.shape[1:]).score(edm))
    run = {"noise": recorded(draws), "on_step": hooks.trajectory(store)}
    case.check(seeds(score, edm, x, nodes, order=2, predict="x0", **run), "out_x_final")
    case.check(torch.stack(store[:-1]), "out_x_at_step_start")
    assert len(asked) == int(case["out_nfe"])


def test_clip_guided():
    """DPM-Solver++(2S) down to sqrt(s1^2 - up^2), then noise up to s1, on the clamped x0 of a guided score."""
    case = load("kdiff/clip_guided")
    W, goal, x, nodes = case["in_embed_matrix"], case["in_target"], case["in_x_init"], case["in_sigmas"]
    edm, clamp, noise = EDM(T=nodes[0].item()), case.params["clamp"], recorded(case["in_noise"])

    def distance(x0):
        u, v = (torch.nn.functional.normalize(e, dim=-1) for e in (torch.tanh(x0.flatten(1) @ W.T), goal))
        return 2 * torch.asin((u - v).norm(dim=-1) / 2) ** 2

    guided = energy(case.target(shape=x.shape[1:]).score(edm), edm, distance, case.params["scale"])

    def clamped(x, t):
        x0 = convert(guided(x, t), x, t, edm, "score", "x0").clamp(-clamp, clamp)
        return convert(x0, x, t, edm, "x0", "score")

    for s, s1 in pairwise(nodes):
        up = s1 * (1 - (s1 / s) ** 2).sqrt()
        down = (s1**2 - up**2).sqrt()
        x = dpm_solver(clamped, edm, x, torch.stack([s, down]), order=2, predict="x0")
        if s1 > 0:
            x = x + up * noise(x)
    case.check(x, "out_x_final")

"""Multistep samplers against other programs' numbers, with their recorded noise.

dpm-solver, diffusers and k-diffusion run the published weights with a rising start: `published=True`, or a rule of
`samplers.published`.  Orders that fall at the end are their habit, and told here.  Agreement is to the cases' tolerance
(rtol 1e-9, atol 1e-10; linear multistep, which the peers integrate numerically, 1e-8 and 1e-6), in fact to 13 digits or
more.
"""

import math
from functools import partial

import pytest
import torch
from reference import F64, Ratio, load, recorded, seen, told

from guidance import cfg
from samplers import ddim, deis, dpmpp, grids, hooks, pndm, published, sa_solver, sde_dpmpp, unipc
from samplers.adams import adams
from samplers.exponential import Form, level, weights
from samplers.rows import Row, run_rows
from scoresde import EDM, VP, DiscreteVP, change_sde, convert, linear_betas

X0, EPS = Form(0.0), Form(math.inf)
AUTHORS = {"published": True}


def rise(form, order, rule=published.dpmpp, tau=None, **habits):
    """Adams with a rising start and a peer's habits, as a sampler."""

    def sampler(score, sde, x, ts, **run):
        table = partial(adams, form=form, order=order, start="rise", rule=rule, tau=tau, **habits)
        return run_rows(score, sde, x, ts, table, **run)

    return sampler


def falling(i, N):
    """At most as many values as there are steps left."""
    return N - i


def three(at, start, end, known, tau):
    """k-diffusion's 3M: with two values its weights are exact, not 2M's."""
    return (weights if known.shape[1] == 2 else published.dpmpp)(at, start, end, known, tau)


def states(sampler, score, sde, x, ts, **run):
    """The start and the states after every step."""
    store = [x]
    end = sampler(score, sde, x, ts, on_step=hooks.trajectory(store), **run)
    assert torch.equal(end, store[-1])
    return torch.stack(store)


@pytest.mark.parametrize("i", [0, 1])
def test_schedules(i):
    """dpm-solver's noise schedules and step lists are `VP`, `DiscreteVP` and grids.

    (Below the first label it goes on linearly and we go to alpha = 1; no time of the case lies there.)
    """
    case = load("dpms/schedules")
    sde = (VP(), DiscreteVP.from_betas(linear_betas(1000)))[i]
    t, end = case["in_t"], (1e-3, None)[i]
    case.check(sde.alpha(t).log(), f"out_log_alpha_{i}")
    case.check(sde.sigma(t), f"out_sigma_{i}")
    case.check(sde.lam(t), f"out_lambda_{i}")
    case.check(sde.time(case[f"out_lambda_{i}"]), f"out_t_of_lambda_{i}")
    assert float(case[f"out_T_{i}"]) == sde.T
    for grid, key in ((grids.log_snr, "logSNR"), (grids.uniform, "time_uniform"), (grids.quadratic, "time_quadratic")):
        case.check(grid(sde, 8, t_end=end), f"out_steps_{i}_{key}")
    if i == 1:
        assert int(case["out_kept_entries_1"]) == sde.N


@pytest.mark.parametrize(("name", "sampler"), [
    ("dpms/multistep1_uniform", partial(dpmpp, order=1)),
    ("dpms/multistep1_uniform", ddim),
    ("dpms/multistep2_logsnr", partial(dpmpp, order=2, **AUTHORS)),
    ("dpms/multistep2_few", rise(X0, 2, order_at=falling)),
    ("dpms/multistep2_eps_taylor", partial(dpmpp, order=2, predict="eps")),
    ("dpms/multistep3_uniform", partial(dpmpp, order=3, **AUTHORS)),
    ("dpms/discrete_multistep2_20", partial(dpmpp, order=2, **AUTHORS)),
    ("dpms/cfg_multistep2", partial(dpmpp, order=2, **AUTHORS)),
])  # fmt: skip
def test_dpm_solver(name, sampler):
    """Its "taylor" solver of order 2 has the exact weights.  Below 10 steps its last orders fall."""
    case = load(name)
    p, x, end = case.params["resolved"], case["in_x_init"], 1e-3
    sde = VP()
    if case.params["schedule"]["name"] == "discrete":
        sde, end = DiscreteVP.from_betas(linear_betas(case.params["schedule"]["N"])), None
    ts = {"time_uniform": grids.uniform, "logSNR": grids.log_snr}[p["skip_type"]](sde, p["steps"], t_end=end)
    score = case.target(shape=x.shape[1:]).score(sde)
    if case.params["guidance"]:
        score = cfg(case.target("in_cond").score(sde), score, case.params["guidance"]["scale"])
    score, _, times = seen(score)
    case.check(states(sampler, score, sde, x, ts), "out_states")
    case.check(torch.stack(times), "out_eval_t")


@pytest.mark.parametrize(("name", "sampler"), [
    ("kdiff/dpmpp_2m", partial(dpmpp, order=2, **AUTHORS)),
    ("kdiff/dpmpp_2m_sde", partial(sde_dpmpp, order=2, tau=1.0, **AUTHORS)),
    ("kdiff/dpmpp_3m_sde", rise(X0, 3, three, tau=torch.ones_like)),
    ("kdiff/lms4", partial(deis, order=4, variable="r", start="rise")),
])  # fmt: skip
def test_k_diffusion(name, sampler):
    """Its eta is tau^2; linear multistep in sigma is DEIS in sigma/alpha."""
    case = load(name)
    x, nodes = case["in_x_init"], case["in_sigmas"]
    edm = EDM(T=nodes[0].item())
    score, asked, _ = seen(case.target(shape=x.shape[1:]).score(edm))
    noise = {"noise": recorded(case["in_noise"])} if "in_noise" in case.arrays else {}
    got = states(sampler, score, edm, x, nodes, **noise)
    case.check(got[-1], "out_x_final")
    case.check(got[:-1], "out_x_at_step_start")
    assert len(asked) == int(case["out_nfe"])


@pytest.mark.parametrize(("name", "sampler"), [
    ("diffusers/golden_dpmm", partial(dpmpp, order=2, **AUTHORS)),
    ("diffusers/golden_dpmm_karras_v", partial(dpmpp, order=2, **AUTHORS)),
    ("diffusers/golden_dpmm_thresholding", partial(dpmpp, order=2, **AUTHORS)),
    ("diffusers/mix_dpmm2_10", partial(dpmpp, order=2, **AUTHORS)),
    ("diffusers/mix_dpmm2_sde_10", partial(sde_dpmpp, order=2, **AUTHORS)),
    ("diffusers/mix_dpmm3_12", rise(X0, 3, order_at=falling)),
    ("diffusers/golden_deis", rise(EPS, 2, weights, order_at=falling)),
    ("diffusers/mix_deis3_12", rise(EPS, 3, weights, order_at=falling)),
    ("diffusers/golden_unipc", partial(unipc, order=2, **AUTHORS)),
    ("diffusers/golden_unipc_v", partial(unipc, order=2, **AUTHORS)),
    ("diffusers/mix_unipc3_10", partial(unipc, order=3, **AUTHORS)),
])  # fmt: skip
def test_diffusers(name, sampler):
    """Its ratios sigma/alpha are the grid.  One that it repeats at the end is a step of length 0, left out."""
    case = load(name)
    x, sde = case["in_x_init"], Ratio()
    score = target(case, sde)
    noise = {"noise": recorded(case["in_noise"])} if "in_noise" in case.arrays else {}
    got = states(sampler, score, sde, x, case["in_ratio_nodes"].unique().flip(0), **noise)
    case.check(got[-1], "out_x_final")
    if "out_trajectory" in case.arrays:
        case.check(got[1:], "out_trajectory")


def target(case, sde):
    """The case's model as a score: its mixture, or diffusers' test network."""
    config = case.params["config"]
    if "in_gm_means" in case.arrays:
        return case.target(shape=case["in_x_init"].shape[1:]).score(sde)
    kind = {"epsilon": "eps", "v_prediction": "v"}[config.get("prediction_type", "epsilon")]
    return told(case, sde, kind, config["sample_max_value"] if config.get("thresholding") else None)


@pytest.mark.parametrize("name", ["diffusers/golden_sa", "diffusers/mix_sa_12"])
def test_sa_solver(name):
    """tau by step; its order of a corrector counts the new value."""
    case = load(name)
    x, sde, tau = case["in_x_init"], Ratio(), torch.tensor(case.params["tau"], dtype=F64)
    draws = case["in_noise"][tau > 0]  # it draws at every step
    sampler = rise(X0, 2, published.sa_solver, tau=lambda r: tau, correct=1, order_at=falling)
    got = states(sampler, target(case, sde), sde, x, case["in_ratio_nodes"], noise=recorded(draws))
    case.check(got[-1], "out_x_final")
    if "out_trajectory" in case.arrays:
        case.check(got[1:], "out_trajectory")


@pytest.mark.parametrize("name", ["diffusers/golden_pndm", "diffusers/golden_pndm_alpha_one"])
def test_pndm(name):
    """Runge-Kutta steps, then linear multistep, on the labels 900, 800, ..., 0.

    A last step from label 0 goes to t = 0 or, where alpha-bar is not set to 1 there, nowhere.
    """
    case = load(name)
    table = DiscreteVP(case["in_alphas_cumprod"])
    ts = table.label_time(torch.arange(900, -1, -100, dtype=F64))
    if case.params["config"].get("set_alpha_to_one"):
        ts = torch.cat([ts, torch.zeros(1, dtype=F64)])
    score, _, times = seen(told(case, table))
    case.check(pndm(score, table, case["in_x_init"], ts, start="runge-kutta"), "out_x_final")
    calls = torch.stack(times)
    torch.testing.assert_close(table.label(calls), case["in_eval_t"][: len(calls)], rtol=0, atol=1e-9)


def test_pndm_without_runge_kutta():
    """Stable Diffusion's PLMS: the first step is Heun's (the second label is asked twice), then orders 2, 3, 4.

    The weights are ours; that start is told here.  The last step, from label 0, goes nowhere.
    """
    case = load("diffusers/mix_pndm_skip_10")
    x, table = case["in_x_init"], DiscreteVP(case["in_alphas_cumprod"])
    ts = table.label_time(torch.arange(900, -1, -100, dtype=F64))
    rows = adams(table, ts, Form(math.inf, level), 4, start="rise", rule=published.adams_bashforth)
    (euler,) = rows[0]
    slope = euler.b[0] / float(table.sigma(ts[0]))
    half = tuple(0.5 * slope * float(table.sigma(t)) for t in (ts[1], ts[0]))  # eps = -sigma s
    rows[0] = [euler, Row(ts[1], None, euler.a, half)]
    for i in (1, 2, 3):  # the value of the corrected call is not used again
        (row,) = rows[i]
        rows[i] = [row._replace(b=(*row.b[:i], 0.0, *row.b[i:]))]
    score, _, times = seen(case.target(shape=x.shape[1:]).score(table))
    got = states(run_rows, score, table, x, ts, table=lambda *_: rows)
    case.check(got[-1], "out_x_final")
    assert torch.equal(table.label(torch.stack(times)).round(), case["in_eval_t"][:-1])
    torch.testing.assert_close(got[1:], case["out_trajectory"][1:-1], rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("name", ["diffusers/golden_lms", "diffusers/mix_lms_12"])
def test_lms(name):
    """Linear multistep in sigma, to 0.

    The published loop (not a correct sampler) overwrites the state by its scaled version before each call: a hook here.
    """
    case = load(name)
    x, nodes = case["in_x_init"], case["in_ratio_nodes"]
    edm, lms = EDM(T=nodes[0].item()), partial(deis, order=4, variable="r", start="rise")
    if name == "diffusers/mix_lms_12":
        table = DiscreteVP(case["in_alphas_cumprod"])
        score = change_sde(case.target(shape=x.shape[1:]).score(table), table, edm)
        got = states(lms, score, edm, x, nodes)
        case.check(got[1:], "out_trajectory")
        case.check(got[-1], "out_x_final")
        return

    def scaled(x, r):
        return x / (1 + r**2).sqrt()

    hook = lambda i, r, x: scaled(x, r)  # noqa: E731
    case.check(lms(told(case, edm), edm, scaled(x, nodes[0]), nodes, on_step=hook), "out_x_final")


@pytest.mark.parametrize("name", ["diffusers/golden_edm_dpmpp", "diffusers/mix_edm_dpmpp2_12"])
def test_edm_dpmpp(name):
    """In sigma space.  The published loop hands the raw state to an F network."""
    case = load(name)
    x, nodes = case["in_x_init"], case["in_ratio_nodes"].unique().flip(0)
    edm, labels = EDM(T=nodes[0].item()), iter(case["in_eval_t"])

    def network(x, t):
        label = next(labels)
        return convert(x * label / (label + 1), x, t, edm, "F", "score")

    mix = name == "diffusers/mix_edm_dpmpp2_12"
    score = case.target(shape=x.shape[1:]).score(edm) if mix else network
    got = states(partial(dpmpp, order=2, **AUTHORS), score, edm, x, nodes)
    case.check(got[-1], "out_x_final")
    if mix:
        case.check(got[1:], "out_trajectory")


@pytest.mark.parametrize("sampler", [
    partial(dpmpp, order=2, **AUTHORS),
    partial(dpmpp, order=3, **AUTHORS),
    partial(sde_dpmpp, order=2, **AUTHORS),
    partial(sde_dpmpp, order=3, **AUTHORS),
    partial(sa_solver, **AUTHORS),
    partial(unipc, order=3, **AUTHORS),
])  # fmt: skip
def test_last_step_to_zero(sampler):
    """In data form every program's step to sigma = 0 is the last x0: the polynomial does not reach lam = infinity."""
    case, edm = load("kdiff/dpmpp_2m_sde"), EDM(T=40.0)
    score, asked, times = seen(case.target().score(edm))
    x = sampler(score, edm, case["in_x_init"], case["in_sigmas"], noise=recorded(case["in_noise"]))
    last = case.target().denoiser(edm)(asked[-1], times[-1])
    torch.testing.assert_close(x, last, rtol=1e-12, atol=1e-14)

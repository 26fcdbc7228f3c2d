"""Every refusal names the rule, what came, and the cure.  What all samplers refuse is in test_contract."""

import math

import pytest
import torch
from truth import F64, gaussian_score, log_snr_grid, tensor

from samplers import SAMPLERS, ddim, euler_maruyama, grids, heun, hooks, langevin, predictor_corrector
from scoresde import (
    EDM,
    VE,
    VP,
    CosineVP,
    DiscreteVP,
    Model,
    Straight,
    Streams,
    SubVP,
    bits_per_dim,
    change_sde,
    convert,
    dataset,
    dequantize,
    flow,
    gaussian,
    linear_betas,
    log_prob,
    mixture,
)

ONE, X = torch.ones(1), torch.ones(2, 3, dtype=F64)
SCORE = gaussian_score(VP())
TS = log_snr_grid(VP(), 4)
TWO = mixture(tensor(0.5, 0.5), tensor([[0.0], [1.0]]), var=tensor(1.0, 1.0), labels=torch.tensor([0, 2]))

REFUSALS = {
    "vp beta": (lambda: VP(beta_min=0.0), "beta_min must be positive.*got 0"),
    "vp T": (lambda: VP(T=math.inf), "T must be positive and finite, got inf"),
    "subvp": (lambda: SubVP(t_min=-1.0), "t_min.*got -1"),
    "cosine s": (lambda: CosineVP(s=-0.1), "s must be >= 0, got -0.1"),
    "cosine T": (lambda: CosineVP(T=1.0), "T must stay below 1.*got 1.0"),
    "ve order": (lambda: VE(1.0, 0.5), "sigma_max must exceed sigma_min, got 0.5 <= 1"),
    "ve sigma": (lambda: VE(sigma_min=0.0), "sigma_min.*got 0"),
    "edm": (lambda: EDM(t_min=0.0), "t_min.*got 0"),
    "straight": (lambda: Straight(T=1.0), "T must stay below 1.*got 1.0"),
    "table shape": (lambda: DiscreteVP(torch.ones(2, 2) / 2), r"1-D table, got shape \(2, 2\)"),
    "table of betas": (lambda: DiscreteVP(linear_betas(40)), "got 0.0025 .. 0.5; from betas use DiscreteVP.from_betas"),
    "table above 1": (lambda: DiscreteVP(tensor(1.0, 0.5)), "got 1 .. 0.5"),
    "table below 0": (lambda: DiscreteVP(tensor(0.5, -0.1)), "got 0.5 .. -0.1"),
    "table floor": (
        lambda: DiscreteVP(tensor(0.5, 1e-10, 0.0)),
        "only the last alpha may lie below the floor 3.05e-05, got 2 alphas_cumprod of 1e-10 and less",
    ),
    "few betas": (lambda: linear_betas(10), "N = 10 steps give a beta of 2, which must be below 1"),
    "no width": (lambda: dataset(X).log_prob(X), "no width.*pass sde and t"),
    "half a time": (lambda: TWO.log_prob(X[:, :1], VP()), "both sde and t"),
    "factor var shape": (
        lambda: gaussian(X[0], factor=torch.ones(3, 1), var=torch.ones(3)),
        r"one number, got.*\(3,\)",
    ),
    "no samples": (lambda: Streams(0, -3), "got -3"),
    "flow shape": (lambda: flow(SCORE, VP(), X[0], 0.1, 1.0), r"\(3,\); use x\[None\]"),
    "likelihood score shape": (
        lambda: log_prob(lambda x, t: x[:, :1], VP(), X),
        r"returned \(2, 1\) for a state \(2, 3\)",
    ),
    "seed": (lambda: Streams(-1, 2), "seed must be >= 0, got -1"),
    "sample index": (lambda: Streams(0, [3, -2]), r"indices >= 0; got \[3, -2\]"),
    "stream count": (lambda: Streams(0, 3)(X), r"3 noise streams for a batch of 2; make Streams"),
    "no labels": (lambda: dataset(X).given(0), "no labels; pass labels="),
    "no classes": (lambda: dataset(X).class_log_prob(X), "no labels; pass labels="),
    "absent label": (lambda: TWO.given(1), r"label 1 is not among \[0, 2\]"),
    "weights": (lambda: mixture(tensor(1.0, -0.5), X, var=ONE), r"2 positive numbers.*shape \(2,\), min -0.5"),
    "weights shape": (lambda: mixture(ONE, X, var=ONE), r"2 positive numbers.*shape \(1,\)"),
    "covariance twice": (lambda: mixture(ONE, X[:1], var=ONE, covs=torch.eye(3)[None]), "covariance once"),
    "covariance sign": (lambda: gaussian(X[0], cov=-torch.eye(3)), "positive semi-definite, got an eigenvalue -1"),
    "var sign": (lambda: gaussian(X[0], var=-2.0), "var must be >= 0, got -2"),
    "factor var": (
        lambda: mixture(ONE, X[:1], factors=torch.ones(1, 3, 1), var=torch.ones(1, 3)),
        "one number for each component",
    ),
    "labels shape": (lambda: dataset(X, torch.zeros(3)), r"labels must be 2 integers.*got shape \(3,\)"),
    "target shape": (lambda: dataset(X).log_prob(torch.ones(2, 4)), r"shape \(4,\), the target's are \(3,\)"),
    "kind": (
        lambda: convert(X, X, tensor(0.5), VP(), "noise", "x0"),
        "unknown prediction 'noise'; choose one of score",
    ),
    "flow method": (lambda: flow(SCORE, VP(), X, 0.1, 1.0, method="rk5"), "unknown method 'rk5'.*each, dopri5.*rk4"),
    "flow steps": (lambda: flow(SCORE, VP(), X, 0.1, 1.0, method="rk4", steps=0), "at least 1, got 0"),
    "flow at zero": (lambda: flow(SCORE, VP(), X, 0.0, 1.0), r"\(0, T = 1\], got 0.*use sde.t_min"),
    "likelihood at zero": (lambda: log_prob(SCORE, VP(), X, t=0.0), "got 0: at t = 0.*use sde.t_min"),
    "likelihood above T": (lambda: log_prob(SCORE, VP(), X, t=1.5), r"T = 1\], got 1.5.*above T"),
    "times of a flow": (lambda: flow(SCORE, VP(), X, 0.1, tensor(0.5, 0.6)), r"one time.*\(2,\)"),
    "perturb above T": (lambda: grids.perturb(VP(), X, 5.0), r"T = 1\], got 5 .. 5"),
    "labels at once": (lambda: TWO.given(torch.tensor([0, 2])), "one label, an int"),
    "asymmetric": (lambda: gaussian(X[0, :2], cov=tensor([1.0, 5.0], [0.0, 1.0])), "must be symmetric.*factors=L"),
    "var shape": (lambda: mixture(tensor(0.5, 0.5), X[:, :2], var=torch.ones(4)), r"\(2,\) or \(2, 2\); got \(4,\)"),
    "sigma_data": (lambda: Model(SCORE, VP(), "F", sigma_data=0.0), "must be positive, got 0"),
    "change_sde": (lambda: change_sde(SCORE, VP(), EDM())(X, tensor(400.0)), "whose T is 1; start the grid"),
    "inpaint known": (
        lambda: ddim(SCORE, VP(), X, TS, on_step=hooks.inpaint(VP(), X[:1], X[:1])),
        r"known has shape \(1, 3\)",
    ),
    "hook shape": (lambda: ddim(SCORE, VP(), X, TS, on_step=lambda i, t, x: x[:1]), r"a hook returned \(1, 3\)"),
    "probes": (lambda: log_prob(SCORE, VP(), X, probes=0), "at least 1, or None.*got 0"),
    "integers": (lambda: log_prob(SCORE, VP(), torch.ones(2, 3).long()), "got torch.int64.*dequantize"),
    "fractions": (lambda: dequantize(X / 2, 8, 0, 1), "integer levels, got fractions"),
    "levels": (lambda: dequantize(torch.tensor([[0, 8]]), 8, 0, 1), r"0\.\.7 for levels = 8, got 0\.\.8"),
    "levels below": (lambda: dequantize(torch.tensor([[-1, 3]]), 8, 0, 1), r"got -1\.\.3"),
    "bin": (lambda: bits_per_dim(ONE, 3, 0.0), "bin_width must be positive, got 0"),
    "eta": (lambda: ddim(SCORE, VP(), X, TS, eta=1.5), r"eta.*\[0, 1\].*got 1.5"),
    "churn": (lambda: heun(SCORE, VP(), X, TS, churn=-1.0), "churn must be >= 0, got -1"),
    "snr": (lambda: langevin(0.0), "snr must be positive, got 0.*0.16"),
    "n_correct": (lambda: predictor_corrector(SCORE, VP(), X, TS, n_correct=-1), "n_correct must be >= 0, got -1"),
    "not a tensor": (lambda: euler_maruyama(SCORE, VP(), [1.0], TS), "got list; use x.float"),
    "ode at zero": (
        lambda: SAMPLERS["ode"](SCORE, VP(), X, tensor(1.0, 0.0)),
        "ends at t = 0.*end the grid at sde.t_min = 1e-05",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(case):
    call, match = REFUSALS[case]
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("method", ["each", "dopri5"])
def test_a_score_that_no_step_can_follow(method):
    """The solver says where and what to do, instead of looping or returning NaN."""

    def score(x, t):
        s = SCORE(x, t)
        return torch.where((t < 0.3).reshape(-1, 1) if t.ndim else t < 0.3, math.nan, s)

    with pytest.raises(FloatingPointError, match=r"steps? (below|shrank).*(loosen|float64)"):
        flow(score, VP(), X, 1.0, 0.1, method=method)


def test_a_likelihood_that_is_not_finite_names_the_sample():
    x = X.clone()
    x[1, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"sample 1"):
        log_prob(SCORE, VP(), x, method="rk4", steps=4)


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "gotta_go_fast"])
def test_nan_from_the_score_names_step_and_times(name):
    """Whether the score is NaN at a step's start or only at a later stage; what adapts its steps gives up itself."""

    def score(x, t):
        return SCORE(x, t) * (math.nan if t <= TS[2] * (1 + 1e-9) else 1)

    step = rf"after step (2 of 4, from t = {TS[1]:.6g}|3 of 4, from t = {TS[2]:.6g}) to .*; the score returned NaN"
    with pytest.raises(FloatingPointError, match=step):
        SAMPLERS[name](score, VP(), X, TS, **({"method": "rk4"} if name == "ode" else {}))


@pytest.mark.parametrize(
    ("at", "match"),
    [(2, "steps 1 to 64 of 80.*from t = 1 to"), (65, "steps 65 to 80 of 80.*hooks.finite"), (79, "of 80")],
)
def test_nan_in_a_large_state_is_named_to_64_steps(at, match):
    """Sums of a large state cost a third of a step on the CPU, so they are taken every 64th step and at the end."""
    ts, x = log_snr_grid(VP(), 80), torch.ones(1, 2**16 + 1)
    with pytest.raises(FloatingPointError, match=match):
        ddim(lambda x, t: -x * (math.nan if t <= ts[at] else 1), VP(), x, ts)


def test_unknown_knobs_are_refused():
    for sampler in SAMPLERS.values():
        with pytest.raises(TypeError, match="guidance_scale"):
            sampler(SCORE, VP(), X, TS, guidance_scale=3.0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "ts", [[1.0, 0.5], None, TS[None], tensor(1.0, math.nan, 0.1)], ids=["list", "None", "2-D", "nan"]
)
def test_times_of_the_wrong_kind(name, ts):
    """Refused by the rule on ts, not by whatever the tables do with them."""
    sde = DiscreteVP.from_betas(linear_betas(40))
    with pytest.raises(ValueError, match="ts must be"):
        SAMPLERS[name](gaussian_score(sde), sde, X, ts)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_float64_score_leaves_a_float32_state_float32(name):
    out = SAMPLERS[name](lambda x, t: SCORE(x.double(), t), VP(), torch.ones(2, 3), TS)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (lambda x, ts: (x.half(), ts), "float16.*x.float"),
        (lambda x, ts: (x[0], ts), r"\(3,\).*x\[None\]"),
        (lambda x, ts: (x, ts.flip(0)), r"ts\[0\] = .*ts.flip"),
        (lambda x, ts: (x, ts.float()), "float32.*double"),
        (lambda x, ts: (x, ts[:1]), "at least two.*grids"),
        (lambda x, ts: (x, ts + 1), r"got 2 .. 1"),
        (lambda x, ts: (x, ts - 1e-3), r"got 0.999 .. -0.0"),
    ],
)
def test_bad_input(name, bad, match):
    x, ts = bad(X, log_snr_grid(VP(), 4))
    with pytest.raises(ValueError, match=match):
        SAMPLERS[name](gaussian_score(VP()), VP(), x, ts)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_score_must_look_like_the_state(name):
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        SAMPLERS[name](lambda x, t: torch.zeros(2, 4, dtype=F64), VP(), X, log_snr_grid(VP(), 4))

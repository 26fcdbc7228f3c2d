"""Guidance rules that are functions of scores: identities to 1e-12, closed forms, other programs' numbers, calls."""

import itertools
import math
from functools import partial

import pytest
import torch
from guided import D64, SDE, C, N, Net, T, U, X, close, problem
from reference import Levels, load
from scipy.integrate import quad

from guidance import (
    apg,
    cfg,
    energy,
    frequency,
    perp_neg,
    plus_plus,
    product,
    rescale,
    tangential,
    zero_star,
)
from samplers import ddim, grids
from scoresde import Model, denoised, flow, gaussian
from scoresde.types import number

SHAPES = [(7,), (2, 6), (3, 4, 5), (1, 3, 4, 2)]


def halfway(w):
    """1 + (w - 1)/2 of a weight in any form."""
    return (lambda r: halfway(w(r))) if callable(w) and not isinstance(w, torch.Tensor) else 1 + 0.5 * (w - 1)


OFF_AT_ONE = {
    "rescale": rescale,
    "rescale_v": partial(rescale, kind="v", strength=1.0),
    "rescale_apg": partial(rescale, rule=partial(apg, eta=0.5)),
    "apg": partial(apg, eta=0.3, threshold=0.8),
    "zero_star": zero_star,
    "zero_star_eps": partial(zero_star, kind="eps"),
    "tangential": tangential,
    "frequency": lambda c, u, w, **k: frequency(c, u, w, halfway(w), **k),
}
ALL = OFF_AT_ONE | {"perp_neg": lambda c, u, w, n=N, **k: perp_neg(c, u, w, [n], [0.7], **k)}
every_rule = pytest.mark.parametrize("rule", ALL.values(), ids=ALL)


@pytest.mark.parametrize("rule", OFF_AT_ONE.values(), ids=OFF_AT_ONE)
def test_weight_one_is_the_conditional_score(rule):
    assert rule(C, U, 1.0, sde=SDE) is C
    close(rule(C, U, torch.ones(5), sde=SDE)(X, T), C(X, T))
    close(rule(C, U, lambda r: 1.0, sde=SDE)(X, T), C(X, T))
    assert (rule(C, U, 3.0, sde=SDE)(X, T) - C(X, T)).abs().max() > 0.1


@every_rule
def test_weights_of_every_form(rule):
    """Per-sample w is the loop over samples, w(sigma) the number at that sigma; times differ from sample to sample."""
    w, ts = torch.tensor([0.5, 1.0, 2.0, 3.5, -1.0], dtype=D64), torch.linspace(0.1, 0.9, 5, dtype=D64)
    together, by_level = (rule(C, U, v, sde=SDE)(X, ts) for v in (w, lambda r: 1 + 2 * r))
    for i in range(5):
        close(together[i : i + 1], rule(C, U, float(w[i]), sde=SDE)(X[i : i + 1], ts[i]))
        r = float(SDE.sigma(ts[i]) / SDE.alpha(ts[i]))
        close(by_level[i : i + 1], rule(C, U, 1 + 2 * r, sde=SDE)(X[i : i + 1], ts[i]))


@every_rule
def test_interval_is_off_outside(rule):
    ts = torch.tensor([0.05, 0.3, 0.9, 0.4, 0.02], dtype=D64)  # sigma/alpha 0.17, 1.1, 57, 1.8, 0.078
    guided, plain = rule(C, U, 3.0, sde=SDE, interval=(0.5, 10.0)), rule(C, U, 3.0, sde=SDE)
    out = guided(X, ts)
    for i, acts in enumerate((False, True, False, True, False)):
        close(out[i : i + 1], (plain if acts else C)(X[i : i + 1], ts[i]))
        close(guided(X[i : i + 1], ts[i]), out[i : i + 1])
    there, noisy = {"sde": SDE, "interval": (0.5, 10.0)}, number(0.9)
    for score in (rescale(C, U, 3.0, strength=0.0, **there), frequency(C, U, 0.0, 0.0, **there)):
        close(score(X, noisy), C(X, noisy))


@every_rule
def test_calls_and_batches(rule):
    """One network, one call; outside the interval one of B rows; and the values are those of separate calls."""
    net = Net()
    m = Model(net, SDE, "eps", classes=3)
    c, u, n = m.given(1), m, m.given(0)
    extra = {"n": n} if rule is ALL["perp_neg"] else {}
    many = 3 if extra else 2
    guided = rule(c, u, 3.0, sde=SDE, interval=(0.5, 10.0), **extra)
    value, count = net.asked(guided)
    assert count == (1, 5 * many)
    apart = {"n": lambda x, t: n(x, t)} if extra else {}
    close(value, rule(lambda x, t: c(x, t), lambda x, t: u(x, t), 3.0, sde=SDE, **apart)(X, T))
    assert net.asked(guided, t=number(0.9))[1] == (1, 5)
    if not extra:
        assert net.asked(rule(c, u, 1.0, sde=SDE))[1] == (1, 5)


@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_any_rank_and_dtype(rule, shape):
    """Ranks: what a rule does does not depend on how a sample's numbers are laid out (frequency: on the channels)."""
    c, u, n, x = problem(shape)
    extra = {"n": n} if rule is ALL["perp_neg"] else {}
    whole = rule(c, u, 3.0, sde=SDE, **extra)(x, T)
    close(rule(c, u, 3.0, sde=SDE, **extra)(x[:1], T), whole[:1])  # batch mates
    flat = lambda s: lambda y, t: s(y.reshape(-1, *shape), t).flatten(1)  # noqa: E731
    if rule is not ALL["frequency"]:
        extra = {"n": flat(n)} if extra else {}
        close(rule(flat(c), flat(u), 3.0, sde=SDE, **extra)(x.flatten(1), T), whole.flatten(1))
    single = rule(c, u, torch.full((5,), 3.0), sde=SDE)(x.float(), T) if not extra else whole.float()
    assert single.dtype == torch.float32
    close(single.double(), whole, 2e-4)


@every_rule
def test_rules_are_differentiated(rule):
    """Rules nest under energies and divergences: their derivative is the numerical one, under vmap too."""
    v, h = torch.randn(2, *X.shape, generator=torch.Generator().manual_seed(3), dtype=D64), 1e-6
    score = rule(C, U, 2.0, sde=SDE)
    numeric = torch.stack([(score(X + h * a, T) - score(X - h * a, T)) / (2 * h) for a in v])
    close(torch.func.vmap(lambda a: torch.func.jvp(lambda x: score(x, T), (X,), (a,))[1])(v), numeric, 1e-6)


def test_rules_turn_with_the_data():
    """Rules of inner products commute with any orthogonal map, rescale with those that keep the mean."""
    D = X[0].numel()
    Q = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(4), dtype=D64)).Q
    mean = torch.full((D, 1), D**-0.5, dtype=D64)
    keep = torch.linalg.qr(torch.cat([mean, Q[:, 1:]], 1)).Q
    keeping = keep @ torch.block_diag(torch.ones(1, 1, dtype=D64), torch.linalg.qr(Q[1:, 1:]).Q) @ keep.T
    turn = lambda x, M: (x.flatten(1) @ M.T).reshape(x.shape)  # noqa: E731
    for name, rule in ALL.items():
        if name == "frequency":
            continue
        M = keeping if name.startswith("rescale") else Q
        c, u, n = (lambda x, t, s=s, M=M: turn(s(turn(x, M.T), t), M) for s in (C, U, N))
        extra = {"n": n} if name == "perp_neg" else {}
        close(rule(c, u, 3.0, sde=SDE, **extra)(turn(X, M), T), turn(rule(C, U, 3.0, sde=SDE)(X, T), M), 1e-11)


# --- Gaussians: what a rule samples ----------------------------------------------------------------------------------


V_C, V_U, END = 0.25, 0.5, number(1e-3)


def spread(w):
    """The log of how much the flow of s = -(w/V_c + (1 - w)/V_u) x grows, T to END, by quadrature over t."""

    def rate(t):
        t = number(t)
        a2, s2 = float(SDE.alpha(t) ** 2), float(SDE.sigma(t) ** 2)
        slope = -w / (a2 * V_C + s2) - (1 - w) / (a2 * V_U + s2)
        return float(SDE.drift(t)) - 0.5 * float(SDE.diffusion(t)) ** 2 * slope

    return quad(rate, SDE.T, float(END), epsabs=1e-10, epsrel=1e-10, limit=200)[0]


@pytest.mark.parametrize(("rule", "effective"), [
    (cfg, lambda w: w),
    (partial(rescale, sde=SDE, strength=0.4), lambda w: 0.6 * w + 0.4),
    (partial(rescale, sde=SDE, strength=0.4, kind="eps"), lambda w: 0.6 * w + 0.4),
    (partial(rescale, sde=SDE, strength=1.0), lambda w: 1.0),
    (partial(apg, sde=SDE, eta=0.25), lambda w: 0.75 + 0.25 * w),
    (partial(zero_star, sde=SDE), lambda w: 1.0),
    (tangential, lambda w: w),
])  # fmt: skip
def test_what_rules_sample_of_gaussians(rule, effective):
    """For N(0, v I) and its class N(0, v_c I) every rule is linear: `cfg` of another weight w'.

    The flow's samples have the variance V_T (V_c/V_cT)^w' (V_u/V_uT)^(1-w'), at the end v_c^w' v^(1-w'): the geometric
    mean of the two where the tilted density has the harmonic one, 1/(w/v_c + (1 - w)/v).
    """
    w, zero = 1.6, torch.zeros(2, 2, dtype=D64)
    cond, uncond = (gaussian(zero, var=v).score(SDE) for v in (V_C, V_U))
    x = torch.tensor([[[1.0, 0.2], [-0.5, 0.3]], [[0.1, 2.0], [0.4, -1.0]]], dtype=D64)
    guided = rule(cond, uncond, w)
    close(guided(x, T), cfg(cond, uncond, effective(w))(x, T), 1e-11)
    growth = flow(guided, SDE, x, SDE.T, END, rtol=1e-9, atol=1e-9) / x
    close(growth, torch.full_like(x, math.exp(spread(effective(w)))), 1e-7)
    V = lambda v, t: float(SDE.alpha(t) ** 2 * v + SDE.sigma(t) ** 2)  # noqa: E731
    ends = number(SDE.T)
    closed = (V(V_C, END) / V(V_C, ends)) ** effective(w) * (V(V_U, END) / V(V_U, ends)) ** (1 - effective(w))
    close(growth**2, torch.full_like(x, closed), 1e-7)


# --- rules that are other rules --------------------------------------------------------------------------------------


def test_a_switch_in_the_network_is_a_condition():
    """Perturbed attention, skipped layers, a weaker network: s + w (s - s_p) is `cfg` of weight 1 + w."""
    net, weak = Net(), Net()
    m, m_weak = (Model(n, SDE, "eps", classes=3) for n in (net, weak))
    cond = m.given(1)
    value, count = net.asked(cfg(cond, cond.given(1, skip=True), 2.5))
    assert count == (2, 10)
    close(value, cond(X, T) + 1.5 * (cond(X, T) - cond.given(1, skip=True)(X, T)))
    all_three = product([cond, m, cond.given(1, skip=True)], [3.0 + 1.5, 1 - 3.0, -1.5])
    skipped = cond.given(1, skip=True)(X, T)
    close(net.asked(all_three)[0], cfg(cond, m, 3.0)(X, T) + 1.5 * (cond(X, T) - skipped))
    weak.calls = 0
    assert net.asked(cfg(cond, m_weak.given(1), 2.5))[1] == (1, 5)
    assert weak.calls == 1


@pytest.mark.parametrize("make", [
    lambda: grids.log_snr(SDE, 6, t_end=0.02),
    lambda: torch.tensor([1.0, 0.6, 0.5, 0.2, 0.0], dtype=D64),
])  # fmt: skip
@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_plus_plus_is_a_weight_under_ddim(make, lam):
    ts, x = make(), X
    for t, t1 in itertools.pairwise(ts):
        a, s, a1, s1 = SDE.alpha(t), SDE.sigma(t), SDE.alpha(t1), SDE.sigma(t1)
        eps_c, eps_u = -s * C(x, t), -s * U(x, t)
        eps = eps_u + lam * (eps_c - eps_u)
        x = a1 * (x - s * eps) / a + s1 * eps_u
    close(ddim(cfg(C, U, plus_plus(lam, SDE, ts), sde=SDE), SDE, X, ts), x, 1e-11)


def test_plus_plus_on_a_geometric_grid_is_plain_guidance():
    ts = SDE.time(torch.linspace(-3, 3, 13, dtype=D64))
    w = plus_plus(0.5, SDE, ts)(torch.exp(-SDE.lam(ts[:-1])))
    close(w, torch.full_like(w, 0.5 / (1 - math.exp(-0.5))), 1e-9)
    between = plus_plus(0.5, SDE, torch.tensor([0.9, 0.5, 0.1], dtype=D64))
    r = lambda *t: torch.exp(-SDE.lam(torch.tensor(t, dtype=D64)))  # noqa: E731
    close(between(r(0.7, 0.3, 0.95, 0.01)), between(r(0.9, 0.5, 0.9, 0.5)))


def test_rules_nest_with_energies():
    """A rule of a guided score is the rule of its values; an energy of a rule is that of its x0."""
    E = lambda x0: x0.square().flatten(1).sum(1)  # noqa: E731
    inner = energy(C, SDE, E, 0.2, through=False)
    s_c, s_u = inner(X, T), U(X, T)
    for rule in ALL.values():
        close(rule(inner, U, 3.0, sde=SDE)(X, T), rule(lambda x, t: s_c, lambda x, t: s_u, 3.0, sde=SDE)(X, T), 1e-11)
        guided = rule(C, U, 3.0, sde=SDE)
        x = X.clone().requires_grad_()
        grad = torch.autograd.grad(E(denoised(guided(x, T), x, T, SDE)).sum(), x)[0]
        close(energy(guided, SDE, E, 0.2)(X, T), guided(X, T) - 0.2 * grad, 1e-11)


# --- other programs --------------------------------------------------------------------------------------------------


def test_rules_of_diffusers():
    """Its guiders on given predictions.  Its APG is u + w step where ours (and the paper's) is c + (w - 1) step; its
    momentum, done here by hand, is d + momentum (the last d)."""
    case = load("guidance/cfg_rules")
    p, c, u = case.params, case["in_pred_cond"], case["in_pred_uncond"]
    one, origin = torch.ones(1, dtype=D64), torch.zeros_like(c)
    sde, w = Levels(one, one), p["scale"]  # alpha = sigma = 1: at x = 0 x0 is the score
    at = lambda rule, c, u, w, **k: rule(lambda x, t: c, lambda x, t: u, w, sde=sde, **k)(origin, number(0.0))  # noqa: E731
    case.check(at(rescale, c, u, w, kind="score", strength=p["rescale"]), "out_cfg_rescaled")
    case.check(at(zero_star, c, u, w, kind="score"), "out_cfg_zero_star")
    z = (u - at(zero_star, c, u, 0.0, kind="score")) / u  # 1 - z, in every number
    case.check(1 - z.flatten(1).mean(1), "out_zero_star_scale")
    case.check(at(tangential, c, u, w), "out_tangential")
    guided = lambda c, u, d, **k: at(apg, c, c - d, w + 1, **k) - c + u  # noqa: E731
    how = {"eta": p["eta"], "threshold": p["norm_threshold"]}
    case.check(guided(c, u, c - u, **how), "out_apg_first")
    case.check(guided(c, u, c - u, eta=p["eta"]), "out_apg_no_momentum")
    c2, u2 = case["in_pred_cond_2"], case["in_pred_uncond_2"]
    case.check(guided(c2, u2, c2 - u2 + p["momentum"] * (c - u), **how), "out_apg_second")
    strength = lambda d: (d.flatten(1).norm(dim=1) / u.flatten(1).norm(dim=1)).mul(-p["alpha"]).exp()  # noqa: E731
    case.check(at(cfg, c, u, 1 + (w - 1) * strength(c - u)), "out_magnitude_aware")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_told():
    for rule in (tangential, partial(frequency, high=2.0), partial(perp_neg, negatives=[N], weights=[1.0])):
        with pytest.raises(ValueError, match="needs sde="):
            rule(C, U, 2.0, interval=(0.1, 1.0))
        with pytest.raises(ValueError, match="finite, got nan"):
            rule(C, U, math.nan)
    for rule in (rescale, zero_star):
        with pytest.raises(ValueError, match=r"unknown prediction 'F'.*score, eps, x0, v, velocity"):
            rule(C, U, 2.0, sde=SDE, kind="F")
    for rule in (rescale, zero_star, apg):
        with pytest.raises(ValueError, match=r"low < high, got \(2.0, 1.0\)"):
            rule(C, U, 2.0, sde=SDE, interval=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], got 1.5"):
        rescale(C, U, 2.0, sde=SDE, strength=1.5)
    with pytest.raises(ValueError, match="no standard deviation"):
        rescale(lambda x, t: -x, lambda x, t: -2 * x, 2.0, sde=SDE)(torch.ones(3, 1), T)
    with pytest.raises(ValueError, match=r"threshold must be positive .*, got 0"):
        apg(C, U, 2.0, sde=SDE, threshold=0.0)
    with pytest.raises(ValueError, match="eta must be finite, got inf"):
        apg(C, U, 2.0, sde=SDE, eta=math.inf)
    with pytest.raises(ValueError, match=r"low < high, got \(3.0, 2.0\)"):
        zero_star(C, U, 2.0, sde=SDE, zeroed=(3.0, 2.0))
    with pytest.raises(ValueError, match="one weight a negative, got 1 negatives and 2 weights"):
        perp_neg(C, U, 2.0, [N], [1.0, 2.0])
    with pytest.raises(ValueError, match="width, in grid points, must be positive and finite, got -1"):
        frequency(C, U, 2.0, 3.0, width=-1.0)
    with pytest.raises(ValueError, match="decreasing grid of the run"):
        plus_plus(0.5, SDE, torch.tensor([0.1, 0.5], dtype=D64))
    with pytest.raises(ValueError, match="lam must be finite, got nan"):
        plus_plus(math.nan, SDE, torch.tensor([0.5, 0.1], dtype=D64))


def test_nothing_is_undefined_at_zero():
    """Directions and deviations that vanish: a rule then leaves out what it would divide by."""
    zero, x = torch.zeros(5, 3, 4, 5, dtype=D64), torch.zeros(5, 3, 4, 5, dtype=D64)
    none, unit = (lambda x, t: zero), (lambda x, t: zero + 1)
    close(zero_star(unit, none, 3.0, sde=SDE, kind="score")(x, T), zero + 3)
    close(apg(none, unit, 3.0, sde=SDE)(x, T), zero - 2)
    close(rescale(none, none, 3.0, sde=SDE)(x, T), zero)
    close(rescale(unit, unit, 3.0, sde=SDE, kind="score")(x, T), zero + 1)
    close(perp_neg(unit, unit, 3.0, [none], [1.0])(x, T), zero + 4)
    close(tangential(none, none, 3.0)(x, T), zero)

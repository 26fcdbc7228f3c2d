"""Guidance: identities to 1e-12, calls counted, exact cases with closed forms."""

import itertools
import math

import pytest
import torch

import guidance
import samplers
from samplers import grids
from scoresde import VE, VP, Model, counted, denoised, flow, gaussian, log_prob, mixture
from scoresde.types import number

D64 = torch.float64
SDE = VP()
T = number(0.3)


def problem():
    """Three classes of two Gaussians each in the plane; the target, a batch of noisy points."""
    g = torch.Generator().manual_seed(0)
    means = torch.randn(6, 2, generator=g, dtype=D64)
    target = mixture(torch.ones(6), means, var=0.05 + 0.1 * torch.rand(6, 2, generator=g), labels=torch.arange(6) // 2)
    return target, torch.randn(5, 2, generator=g, dtype=D64)


TARGET, X = problem()
S = TARGET.score(SDE)
S0, S1 = TARGET.given(0).score(SDE), TARGET.given(1).score(SDE)


def close(a, b, tol=1e-12):
    assert (a - b).abs().max() < tol * max(1.0, float(b.abs().max()))


class Net(torch.nn.Module):
    """A conditional eps network of arbitrary values, that counts its calls and rows."""

    def __init__(self):
        super().__init__()
        self.calls, self.rows = 0, 0

    def forward(self, x, label, y):
        self.calls += 1
        self.rows += len(x)
        return torch.sin(x + label[:, None]) + y[:, None] * torch.cos(x)


def model():
    return Model(Net(), SDE, "eps", classes=3)


def test_cfg_is_its_formula_and_its_ends():
    u, c = S(X, T), S1(X, T)
    close(guidance.cfg(S1, S, 0.0)(X, T), u)
    close(guidance.cfg(S1, S, 1.0)(X, T), c)
    for w in (-0.5, 0.3, 2.5, 8.0):
        close(guidance.cfg(S1, S, w)(X, T), u + w * (c - u))
    assert guidance.cfg(S1, S, 1.0) is S1
    assert guidance.cfg(S1, S, 0.0) is S


def test_cfg_weight_per_sample_is_the_loop_over_samples():
    w = torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0])
    together = guidance.cfg(S1, S, w)(X, T)
    for i in range(5):
        close(together[i : i + 1], guidance.cfg(S1, S, float(w[i]))(X[i : i + 1], T))
    with pytest.raises(ValueError, match="5 weights were given for a batch of 2"):
        guidance.cfg(S1, S, w)(X[:2], T)


def test_cfg_weight_as_a_function_of_sigma_over_alpha():
    r = float(SDE.sigma(T) / SDE.alpha(T))
    close(guidance.cfg(S1, S, lambda r: 1 + 2 * r, sde=SDE)(X, T), guidance.cfg(S1, S, 1 + 2 * r)(X, T))
    ts = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.9], dtype=D64)
    many = guidance.cfg(S1, S, lambda r: 1 + 2 * r, sde=SDE)(X, ts)
    for i in range(5):
        r = float(SDE.sigma(ts[i]) / SDE.alpha(ts[i]))
        close(many[i : i + 1], guidance.cfg(S1, S, 1 + 2 * r)(X[i : i + 1], ts[i]))


def test_a_weight_function_may_return_a_plain_number():
    w = guidance.cfg(S1, S, lambda r: 2.0 if r < 1 else 0.5, sde=SDE)
    r = float(torch.exp(-SDE.lam(T)))
    close(w(X, T), guidance.cfg(S1, S, 2.0 if r < 1 else 0.5)(X, T))


@pytest.mark.parametrize("w", [0.0, 3.0])
def test_cfg_interval_is_off_outside_and_calls_nothing_twice(w):
    sde = VE()
    inside, outside = number(0.5), number(0.9)  # sigma 0.71 and 21
    net = Net()
    m = Model(net, sde, "eps", classes=3)
    guided = guidance.cfg(m.given(1), m, w, sde=sde, interval=(0.1, 2.0))
    plain = guidance.cfg(m.given(1), m, w)
    net.calls = net.rows = 0
    out = guided(X, outside)
    assert (net.calls, net.rows) == (1, 5)
    close(out, m.given(1)(X, outside))
    net.calls = net.rows = 0
    out = guided(X, inside)
    assert (net.calls, net.rows) == (1, 10 if w else 5)  # w = 0: the unconditional score alone
    close(out, plain(X, inside))
    mixed = torch.tensor([0.5, 0.9, 0.5, 0.9, 0.1], dtype=D64)  # the last: sigma 0.023, below the interval
    both = guided(X, mixed)
    for i, acts in enumerate((True, False, True, False, False)):
        one = (plain if acts else m.given(1))(X[i : i + 1], mixed[i])
        close(both[i : i + 1], one)


def test_network_calls_are_counted():
    m = model()
    for score, calls, rows in (
        (guidance.cfg(m.given(1), m, 2.0), 1, 10),
        (guidance.cfg(m.given(1), m, 1.0), 1, 5),
        (guidance.cfg(m.given(1), m, 0.0), 1, 5),
        (guidance.product([m.given(0), m.given(1), m], [1.0, 2.0, -0.5]), 1, 15),
        (guidance.product([m.given(0), m.given(1)], [1.0, 0.0]), 1, 5),
        (guidance.conjunction(m, [m.given(0), m.given(1)], [1.0, -1.0]), 1, 15),
        (guidance.conjunction(m, [m.given(0), m.given(1)], [1.0, 0.0]), 1, 5),
        (guidance.energy(m, SDE, lambda x0: x0.square().sum(1)), 1, 5),
        (guidance.energy(m, SDE, lambda x0: x0.square().sum(1), through=False), 1, 5),
    ):
        m.net.calls = m.net.rows = 0
        score(X, T)
        assert (m.net.calls, m.net.rows) == (calls, rows)
    two = counted(S), counted(S1)
    guidance.cfg(two[1], two[0], 3.0)(X, T)
    assert [s.calls for s in two] == [1, 1]


def test_one_batch_equals_two_calls():
    m = model()
    y = torch.tensor([0, 1, 2, 1, 0])
    close(guidance.cfg(m.given(y), m, 2.0)(X, T), m(X, T) + 2.0 * (m.given(y)(X, T) - m(X, T)))
    ts = torch.linspace(0.1, 0.9, 5, dtype=D64)
    close(guidance.cfg(m.given(y), m, 2.0)(X, ts), m(X, ts) + 2.0 * (m.given(y)(X, ts) - m(X, ts)))


def test_conjunction_and_negation_are_their_formulas():
    u, a, b = S(X, T), S0(X, T), S1(X, T)
    close(guidance.conjunction(S, [S0, S1], [1.5, -0.5])(X, T), u + 1.5 * (a - u) - 0.5 * (b - u))
    close(guidance.conjunction(S, [S1], [3.0])(X, T), guidance.cfg(S1, S, 3.0)(X, T))
    close(guidance.conjunction(S, [S0], [0.0])(X, T), u)
    close(guidance.conjunction(S, [S1, S0], [1.0, 0.0])(X, T), b)
    close(guidance.product([S0, S1], [2.0, -1.0])(X, T), 2 * a - b)
    w = torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0], dtype=D64)
    close(guidance.product([S0, S1], [w, 1.0])(X, T), w[:, None] * a + b)


def test_product_of_gaussians_is_exact_as_sigma_vanishes():
    """N(m1, v1) N(m2, v2) ~ N((m1/v1 + m2/v2) v, v), 1/v = 1/v1 + 1/v2; at sigma > 0 the sum is not its score."""
    m1, m2, v1, v2 = torch.tensor([0.5, -1.0], dtype=D64), torch.tensor([-0.2, 0.3], dtype=D64), 0.3, 0.6
    v = 1 / (1 / v1 + 1 / v2)
    exact = gaussian((m1 / v1 + m2 / v2) * v, var=v)
    sde = VE(sigma_min=1e-9, sigma_max=10.0)
    s = guidance.product([gaussian(m1, var=v1).score(sde), gaussian(m2, var=v2).score(sde)], [1.0, 1.0])
    t0 = number(1e-9)
    close(s(X, t0), exact.score(sde)(X, t0))
    wide = number(0.9)
    assert (s(X, wide) - exact.score(sde)(X, wide)).abs().max() > 0.01  # the bias the docstring states


def test_classifier_guidance_with_the_exact_classifier_is_the_conditional_score():
    def log_p(x, t):
        return TARGET.class_log_prob(x, SDE, t)[:, 1]

    close(guidance.classifier(S, log_p, 1.0)(X, T), S1(X, T), 1e-10)
    close(guidance.classifier(S, log_p, 0.0)(X, T), S(X, T))
    close(guidance.classifier(S, log_p, 2.5)(X, T), guidance.cfg(S1, S, 2.5)(X, T), 1e-10)


@pytest.mark.parametrize("through", [True, False])
def test_energy_on_gaussian_data_is_its_closed_form(through):
    """x0(x) = alpha v x / V is linear, so grad E(x0(x)) = alpha v / V * grad E at x0; both modes agree."""
    v = 0.25
    s = gaussian(torch.zeros(2, dtype=D64), var=v).score(SDE)
    a, sig = SDE.alpha(T), SDE.sigma(T)
    slope = a * v / (a**2 * v + sig**2)
    y = torch.tensor([0.7, -0.4], dtype=D64)
    guided = guidance.energy(
        s, SDE, lambda x0: 0.5 * ((x0 - y) ** 2).sum(1) / 0.1, 3.0, through=through, sigma_data=v**0.5
    )
    expected = s(X, T) - 3.0 * slope * (slope * X - y) / 0.1
    close(guided(X, T), expected)
    close(guidance.energy(s, SDE, lambda x0: x0.sum(1), 0.0, through=through)(X, T), s(X, T))


def test_energy_through_a_network_is_its_numerical_gradient():
    def E(x0):
        return torch.sin(2 * x0).sum(1)

    def total(x):
        return E(denoised(S(x, T), x, T, SDE))

    h = 1e-6
    numeric = torch.stack([(total(X + h * e) - total(X - h * e)) / (2 * h) for e in torch.eye(2, dtype=D64)], 1)
    close((S(X, T) - guidance.energy(S, SDE, E, 1.7)(X, T)) / 1.7, numeric, 1e-7)


def test_energy_weight_forms_and_interval():
    def E(x0):
        return x0.square().sum(1)

    s0 = S(X, T)
    unit = guidance.energy(S, SDE, E, 1.0)(X, T) - s0
    w = torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0], dtype=D64)
    close(guidance.energy(S, SDE, E, w)(X, T), s0 + w[:, None] * unit)
    close(guidance.energy(S, SDE, E, lambda r: 2 * r)(X, T), s0 + 2 * float(torch.exp(-SDE.lam(T))) * unit)
    close(guidance.energy(S, SDE, E, 5.0, interval=(10.0, 20.0))(X, T), s0)
    ts = torch.tensor([0.05, 0.3, 0.3, 0.05, 0.3], dtype=D64)
    inside = guidance.energy(S, SDE, E, 2.0, interval=(0.5, 20.0))(X, ts)
    close(inside[[0, 3]], S(X, ts)[[0, 3]])
    close(inside[[1, 2, 4]], (s0 + 2 * unit)[[1, 2, 4]])


RULES = {
    "cfg": lambda s: guidance.cfg(s, S, 2.0),
    "product": lambda s: guidance.product([s, S0], [1.0, 0.5]),
    "conjunction": lambda s: guidance.conjunction(S, [s], [1.5]),
    "energy": lambda s: guidance.energy(s, SDE, lambda x0: x0[:, 0], 0.7),
    "cheap": lambda s: guidance.energy(s, SDE, lambda x0: x0.square().sum(1), 0.2, through=False),
    "classifier": lambda s: guidance.classifier(s, lambda x, t: TARGET.class_log_prob(x, SDE, t)[:, 0], 0.8),
}


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(RULES, RULES)))
def test_rules_nest_in_any_order(outer, inner):
    """Every rule but the energies adds something linear in s, so their exact composites are known."""
    s = RULES[outer](RULES[inner](S1))(X, T)
    parts = {"S": S(X, T), "S0": S0(X, T)}

    def apply(rule, value, fn):
        if rule == "cfg":
            return parts["S"] + 2 * (value - parts["S"])
        if rule == "product":
            return value + 0.5 * parts["S0"]
        if rule == "conjunction":
            return parts["S"] + 1.5 * (value - parts["S"])
        if rule == "classifier":
            return value + 0.8 * (parts["S0"] - parts["S"])
        x = X.clone().requires_grad_()
        x0 = (x + SDE.sigma(T) ** 2 * fn(x, T)) / SDE.alpha(T)
        if rule == "energy":
            return value - 0.7 * torch.autograd.grad(x0[:, 0].sum(), x)[0]
        a2 = (SDE.alpha(T) * 0.5) ** 2
        return value - 0.2 * a2 / (SDE.alpha(T) * (a2 + SDE.sigma(T) ** 2)) * 2 * x0.detach()

    first = apply(inner, S1(X, T), S1)
    close(s, apply(outer, first, RULES[inner](S1)), 1e-9)


REMEMBER = {"dpmpp", "multistep", "deis", "pndm", "unipc", "angle", "sde_dpmpp", "sa_solver", "er_sde"}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_under_every_sampler_and_under_likelihood(rule):
    """A run is its steps by hand on two-point grids, or, with a memory, the guided flow in the limit; two solvers agree
    on the density of that flow."""
    score = RULES[rule](S1)
    ts = grids.log_snr(SDE, 3, t_end=0.1)
    x = X * 1.0
    fine = grids.log_snr(SDE, 160, t_end=0.1)
    ends = flow(score, SDE, x, SDE.T, 0.1, rtol=1e-9, atol=1e-9)
    for name, sampler in samplers.SAMPLERS.items():
        if name in REMEMBER:
            still = {"tau": 0.0} if name in ("sde_dpmpp", "sa_solver") else {}
            if name != "er_sde":  # its noise is its own
                close(sampler(score, SDE, x, fine, **still), ends, 3e-3)
            continue
        hand, whole = x, {"rtol": math.inf} if name == "gotta_go_fast" else {}  # it remembers its step size
        for i in range(3):
            hand = sampler(score, SDE, hand, ts[i : i + 2], noise=torch.zeros_like, **whole)
        close(sampler(score, SDE, x, ts, noise=torch.zeros_like, **whole), hand, 1e-11)
    exact = log_prob(score, SDE, X, t=0.05, tol=1e-6)
    rk4 = log_prob(score, SDE, X, t=0.05, method="rk4", steps=200)
    close(exact, rk4, 1e-4)


def test_bad_weights_and_energies_are_told():
    with pytest.raises(ValueError, match=r"needs sde="):
        guidance.cfg(S1, S, 2.0, interval=(0.1, 1.0))
    with pytest.raises(ValueError, match=r"needs sde="):
        guidance.cfg(S1, S, lambda r: r)
    with pytest.raises(ValueError, match=r"low < high, got \(2.0, 1.0\)"):
        guidance.cfg(S1, S, 2.0, sde=SDE, interval=(2.0, 1.0))
    with pytest.raises(ValueError, match="finite, got nan"):
        guidance.cfg(S1, S, float("nan"))
    with pytest.raises(ValueError, match="one weight a score, got 2 scores and 1 weights"):
        guidance.product([S0, S1], [1.0])
    with pytest.raises(ValueError, match="every weight is 0"):
        guidance.product([S0, S1], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"one number a sample, \(B,\) = \(5,\), got \(\)"):
        guidance.energy(S, SDE, lambda x0: x0.sum())(X, T)

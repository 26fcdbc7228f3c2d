"""Every guidance rule with every sampler, and with the likelihood: its run is that of its closed form.

The data are N(m, d^2 I) under every condition, so guided densities and posteriors are Gaussians at every t, and the
score that a rule makes of networks' scores is the exact score of one that is written down here from Bayes' rule.
"""

import math

import pytest
import torch
from truth import F64, gaussian_score, log_snr_grid, tensor

import guidance
from guidance import operators
from samplers import SAMPLERS
from scoresde import VP, Streams, log_prob

SDE, SHAPE, VAR, N = VP(), (1, 4, 4), 0.3, 3
M_C, M_U, M_N = 0.8, -0.2, 0.5
C, U, NEG = (gaussian_score(SDE, m, VAR) for m in (M_C, M_U, M_N))
ZERO = gaussian_score(SDE, 0.0, VAR)
MASK = (torch.arange(16).reshape(SHAPE) % 2).to(F64)
A = operators.mask(MASK)
Y = torch.linspace(-1, 1, 8, dtype=F64)
SD = 0.4
KNOWN = A.adjoint(Y[None])[0]


def given_half(mean=0.0):
    """N(mean, VAR) given every second pixel with noise SD: per pixel, var 1/(1/VAR + m/SD^2)."""
    var = 1 / (1 / VAR + MASK / SD**2)
    return gaussian_score(SDE, var * (mean / VAR + MASK * KNOWN / SD**2), var)


def pulled(strength, to):
    """The score plus strength times the gradient of -(x0 - to)^2/2 through x0(x): linear, written by hand."""

    def score(x, t):
        a, s2 = SDE.alpha(t), SDE.sigma(t) ** 2
        V = a * a * VAR + s2
        slope = a * VAR / V  # dx0/dx of N(., VAR) data
        return U(x, t) - strength * slope * (M_U + slope * (x - a * M_U) - to)

    return score


def log_ratio(x, t):
    """log p_c - log p_u of the noised densities, up to a constant: what a noise-aware classifier gives."""
    a, V = SDE.alpha(t), SDE.alpha(t) ** 2 * VAR + SDE.sigma(t) ** 2
    return (((x - a * M_U) ** 2 - (x - a * M_C) ** 2) / (2 * V)).flatten(1).sum(1)


def at(mean):
    return gaussian_score(SDE, mean, VAR)


W = 2.5
TILT = at(M_U + W * (M_C - M_U))
RULES = {
    "cfg": (guidance.cfg(C, U, W), TILT),
    "cfg, each": (guidance.cfg(C, U, torch.full((N,), W, dtype=F64)), TILT),
    "cfg, of sigma": (guidance.cfg(C, U, lambda r: W, sde=SDE), TILT),
    "cfg, outside": (guidance.cfg(C, U, W, sde=SDE, interval=(1e3, 1e4)), C),
    "cfg, ramp": (guidance.cfg(C, U, guidance.ramp(W, 1e3, 2e3), sde=SDE), TILT),
    "product": (guidance.product([C, U], [W, 1 - W]), TILT),
    "conjunction": (guidance.conjunction(U, [C, NEG], [1.5, -0.5]), at(M_U + 1.5 * (M_C - M_U) - 0.5 * (M_N - M_U))),
    "apg": (guidance.apg(C, U, W, sde=SDE, eta=1.0), TILT),
    "rescale": (guidance.rescale(C, U, W, sde=SDE, strength=0.0), TILT),
    "zero_star": (guidance.zero_star(C, U, 1.0, sde=SDE), C),
    "tangential": (guidance.tangential(C, U, 1.0, sde=SDE), C),
    "frequency": (guidance.frequency(C, U, W, W), TILT),
    "perp_neg": (guidance.perp_neg(C, U, W, [NEG], [0.3]), TILT),  # the negative lies along d: nothing to take away
    "classifier": (guidance.classifier(U, log_ratio, W), TILT),
    "energy": (guidance.energy(U, SDE, lambda x0: (x0 - 1).square().flatten(1).sum(1) / 2, 0.7), pulled(0.7, 1.0)),
    "universal": (
        guidance.universal(U, SDE, lambda x0: (x0 - 1).square().flatten(1).sum(1) / 2, 0.7, steps=0),
        pulled(0.7, 1.0),
    ),
    "mpgd": (
        guidance.mpgd(U, SDE, lambda x0: (x0 - M_C).square().flatten(1).sum(1) / 2, 0.0),
        U,
    ),
    "pigdm": (guidance.pigdm(ZERO, SDE, A, Y, SD, sigma_data=VAR**0.5), given_half()),
    "mmps": (guidance.mmps(C, SDE, A, Y, SD), given_half(M_C)),
    "tmpd": (guidance.tmpd(C, SDE, A, Y, SD), given_half(M_C)),
    "anneal": (guidance.anneal(ZERO, SDE, A, Y, SD, sigma_data=VAR**0.5), given_half()),
    "cfg of posteriors": (
        guidance.cfg(guidance.mmps(C, SDE, A, Y, SD), guidance.mmps(U, SDE, A, Y, SD), W),
        given_half(M_U + W * (M_C - M_U)),
    ),
}
EVERY = pytest.mark.parametrize("rule", RULES)


def run(sampler, score):
    x = Streams(0, N)(torch.empty(N, *SHAPE, dtype=F64))
    ts = log_snr_grid(SDE, 4, start=SDE.time(-tensor(3.0).log()), end=SDE.time(-tensor(0.1).log()))
    knobs = {"gotta_go_fast": {"rtol": math.inf}, "ode": {"method": "rk4"}}.get(sampler, {})  # whole steps
    torch.manual_seed(0)
    return SAMPLERS[sampler](score, SDE, x, ts, **knobs)


@EVERY
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rule_by_sampler(rule, sampler):
    guided, exact = RULES[rule]
    a, b = run(sampler, guided), run(sampler, exact)
    assert (a - b).abs().max() < 1e-8 * b.abs().max()


@EVERY
def test_rule_by_likelihood(rule):
    guided, exact = RULES[rule]
    x = torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=F64)
    a, b = (log_prob(s, SDE, x, t=0.05, method="multistep", steps=8) for s in (guided, exact))
    assert (a - b).abs().max() < 1e-7 * b.abs().max()


def test_the_closed_forms_are_right():
    """A reference of the posteriors by another way: the score of x_t given y is a difference of joint log-densities."""
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=F64), tensor(0.3)
    a, s2 = float(SDE.alpha(t)), float(SDE.sigma(t) ** 2)

    def log_joint(x):  # (x_t, y) of a seen pixel are two Gaussians with covariance a VAR
        d = a * a * VAR + s2
        mean = a * VAR / d * x
        var = VAR - (a * VAR) ** 2 / d + SD**2
        seen = MASK * (KNOWN - mean) ** 2 / (2 * var)
        return -(x * x / (2 * d) + seen).sum()

    want = torch.func.grad(log_joint)(x)
    assert (given_half()(x, t) - want).abs().max() < 1e-12

"""Every guidance rule with every sampler, and with the likelihood: its run is that of its closed form.

The data are N(m, d^2 I) under every condition, so guided densities and posteriors are Gaussians at every t, and the
score that a rule makes of networks' scores is the exact score of one that is written down here from Bayes' rule.
Projections and norms need a sample's direction: for N(0, V1) and N(0, V2) all scores lie along x, and each such rule is
cfg of a weight that is written down.
"""

import itertools
import math

import pytest
import torch
from truth import F64, gaussian_score, like, log_snr_grid, tensor

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
TS = log_snr_grid(SDE, 4, start=SDE.time(-tensor(3.0).log()), end=SDE.time(-tensor(0.1).log()))
Q = (0.1 / 3.0) ** 0.25  # sigma/alpha falls by it in each step


def given_half(mean=0.0):
    """N(mean, VAR) given every second pixel with noise SD: per pixel, var 1/(1/VAR + m/SD^2)."""
    var = 1 / (1 / VAR + MASK / SD**2)
    return gaussian_score(SDE, var * (mean / VAR + MASK * KNOWN / SD**2), var)


def parts(x, t):
    """alpha, sigma^2, sigma/alpha, dx0/dx and x0 of N(M_U, VAR) data, to multiply a sample."""
    a, s2 = (like(q, x) for q in (SDE.alpha(t), SDE.sigma(t) ** 2))
    slope = a * VAR / (a * a * VAR + s2)
    return a, s2, s2.sqrt() / a, slope, M_U + slope * (x - a * M_U)


def pulled(strength, to, on=1.0, back=0.0):
    """The score plus strength times the gradient of -(x0 - to)^2/2, over the pixels `on`, through x0(x), plus that of
    the estimate's own move by -back (x0 - to); `to` may be a function of sigma/alpha."""

    def score(x, t):
        a, s2, r, slope, x0 = parts(x, t)
        gap = on * (x0 - (to(r) if callable(to) else to))
        return U(x, t) - strength * slope * gap - back * a / s2 * gap

    return score


def moved(gain):
    """The score of the estimate whose seen pixels are moved to what was measured, by the part gain(sigma/alpha)."""

    def score(x, t):
        a, s2, r, _, x0 = parts(x, t)
        return (a * (x0 + gain(r) * MASK * (KNOWN - x0)) - x) / s2

    return score


def log_ratio(x, t):
    """log p_c - log p_u of the noised densities, up to a constant: what a noise-aware classifier gives."""
    a, V = SDE.alpha(t), SDE.alpha(t) ** 2 * VAR + SDE.sigma(t) ** 2
    return (((x - a * M_U) ** 2 - (x - a * M_C) ** 2) / (2 * V)).flatten(1).sum(1)


def at(mean):
    return gaussian_score(SDE, mean, VAR)


def late(x, t):
    """cfg whose weight rises from 1 at sigma/alpha = 2 to W at 0.5, evenly in its logarithm."""
    r = parts(x, t)[2]
    w = 1 + (W - 1) * ((2 / r).log() / math.log(4)).clamp(0, 1)
    return U(x, t) + w * (C(x, t) - U(x, t))


def shortened(x, t):
    """cfg with x0_c - x0_u, the same in all 16 pixels, no longer than 0.4."""
    a, _, _, slope, _ = parts(x, t)
    length = 4 * (1 - a * slope) * (M_C - M_U)
    return C(x, t) + (W - 1) * (0.4 / length).clamp(max=1) * (C(x, t) - U(x, t))


NARROW, WIDE, W0 = gaussian_score(SDE, 0.0, 0.25), gaussian_score(SDE, 0.0, 0.5), 1.6


def along(w):
    """cfg of N(0, 0.25) and N(0, 0.5), by hand."""
    return lambda x, t: WIDE(x, t) + w * (NARROW(x, t) - WIDE(x, t))


def half(to, scale=1.0):
    return lambda x0: scale * (x0 - to).square().flatten(1).sum(1) / 2


W = 2.5
TILT = at(M_U + W * (M_C - M_U))
WAVES = 0.6 * (2 * MASK - 1)  # across all that is the same in every pixel
RULES = {
    "cfg": (guidance.cfg(C, U, W), TILT),
    "cfg, each": (guidance.cfg(C, U, torch.full((N,), W, dtype=F64)), TILT),
    "cfg, of sigma": (guidance.cfg(C, U, lambda r: W, sde=SDE), TILT),
    "cfg, outside": (guidance.cfg(C, U, W, sde=SDE, interval=(1e3, 1e4)), C),
    "ramp, above": (guidance.cfg(C, U, guidance.ramp(W, 1e3, 2e3), sde=SDE), TILT),
    "ramp": (guidance.cfg(C, U, guidance.ramp(W, 0.5, 2.0), sde=SDE), late),
    "plus_plus": (guidance.cfg(C, U, guidance.plus_plus(W * (1 - Q), SDE, TS), sde=SDE), TILT),
    "product": (guidance.product([C, U], [W, 1 - W]), TILT),
    "conjunction": (guidance.conjunction(U, [C, NEG], [1.5, -0.5]), at(M_U + 1.5 * (M_C - M_U) - 0.5 * (M_N - M_U))),
    "apg, all of it": (guidance.apg(C, U, W, sde=SDE, eta=1.0), TILT),
    "apg": (guidance.apg(NARROW, WIDE, W0, sde=SDE, eta=0.25), along(0.75 + 0.25 * W0)),
    "apg, threshold": (guidance.apg(C, U, W, sde=SDE, eta=1.0, threshold=0.4), shortened),
    "rescale": (guidance.rescale(NARROW, WIDE, W0, sde=SDE, strength=0.4), along(0.6 * W0 + 0.4)),
    "zero_star": (guidance.zero_star(NARROW, WIDE, W0, sde=SDE), NARROW),
    "tangential": (guidance.tangential(NARROW, WIDE, W0, sde=SDE), along(W0)),
    "frequency": (guidance.frequency(NARROW, WIDE, W0, W0), along(W0)),
    "frequency, low": (guidance.frequency(C, U, W, 0.3), TILT),  # d is the same in every pixel
    "perp_neg, along d": (guidance.perp_neg(C, U, W, [NEG], [0.3]), TILT),  # nothing to take away
    "perp_neg": (guidance.perp_neg(C, U, W, [at(M_U + WAVES)], [0.3]), at(M_U + W * (M_C - M_U - 0.3 * WAVES))),
    "classifier": (guidance.classifier(U, log_ratio, W), TILT),
    "energy": (guidance.energy(U, SDE, half(1.0), 0.7), pulled(0.7, 1.0)),
    "stages": (
        guidance.stages(U, SDE, [((0.0, 0.5), half(1.0)), ((0.5, 1e9), half(-1.0))], 0.7),
        pulled(0.7, lambda r: torch.where(r < 0.5, 1.0, -1.0)),
    ),
    "universal, forward": (guidance.universal(U, SDE, half(1.0), 0.7, steps=0), pulled(0.7, 1.0)),
    "universal": (
        guidance.universal(U, SDE, half(1.0), 0.7, steps=3, rate=0.02),
        pulled(0.7, 1.0, back=1 - (1 - 0.02) ** 3),
    ),
    "mpgd": (guidance.mpgd(U, SDE, half(M_C), 0.05), pulled(0.0, M_C, back=0.05)),
    "dps": (guidance.dps(U, SDE, A, Y, 1.0), pulled(1.0, KNOWN, on=MASK)),
    "ddnm": (guidance.ddnm(U, SDE, A, Y), moved(lambda r: 1.0)),
    "diffpir": (guidance.diffpir(U, SDE, A, Y, SD, trust=2.0), moved(lambda r: 1 / (1 + 2 * SD**2 / r**2))),
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


def run(sampler, score, hook=(), **knobs):
    x = Streams(0, N)(torch.empty(N, *SHAPE, dtype=F64))
    knobs |= {"gotta_go_fast": {"rtol": math.inf}, "ode": {"method": "rk4"}}.get(sampler, {})  # whole steps
    torch.manual_seed(0)
    return SAMPLERS[sampler](score, SDE, x, TS, on_step=hook, **knobs)


def agree(a, b):
    return float((a - b).abs().max()) < 1e-8 * float(b.abs().max())


def test_no_rule_is_its_own_reference():
    assert all(guided is not exact for guided, exact in RULES.values())


def test_every_rule_is_here():
    tried = {name.split(",")[0].split()[0] for name in RULES} | {
        "apg_momentum", "daps", "ddnm_plus", "ddrm", "feynman_kac", "superpose", "twisted",
    }  # fmt: skip
    no_rules = {
        "Certificate", "Energy", "FeynmanKac", "certify", "clip_energy", "cutouts", "gradient_picture", "load_clip",
        "operators", "out_of_range", "total", "total_variation",
    }  # fmt: skip
    assert tried == set(guidance.__all__) - no_rules


@EVERY
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rule_by_sampler(rule, sampler):
    guided, exact = RULES[rule]
    assert agree(run(sampler, guided), run(sampler, exact))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights_that_are_equal(sampler):
    """Feynman-Kac's rate, w (w - 1) |s_c - s_u|^2 / 2, is the same for all particles of these: none is drawn twice."""
    fk = guidance.feynman_kac(C, U, W, SDE, TS, alarm=0)
    assert agree(run(sampler, fk.score, fk.hook), run(sampler, TILT))
    assert len(fk.ess) == 4
    assert min(fk.ess) > 1 - 1e-9


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_memory(sampler):
    """x0_c - x0_u is a function of t alone, so m_i = sum_k beta^k d_(i-k) is too."""
    beta, step = -0.4, 0

    def d(x, t):
        a, _, _, slope, _ = parts(x, t)
        return (1 - a * slope) * (M_C - M_U)

    def score(x, t):
        a, s2 = parts(x, t)[:2]
        before = sum(beta ** (step - k) * d(x, TS[k]) for k in range(step))
        return C(x, t) + (W - 1) * a / s2 * (d(x, t) + before)

    def count(i, t, x):
        nonlocal step
        step = i + 1

    guided = guidance.apg_momentum(C, U, W, sde=SDE, beta=beta, eta=1.0)
    assert agree(run(sampler, *guided), run(sampler, score, count))


@pytest.mark.parametrize("kind", ["or", "and"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_superposed_with_itself(sampler, kind):
    """sum k = 1, whatever k is; samplers that ask more than once a step, if only in their first, are refused."""
    if sampler in (
        "heun", "midpoint", "ralston", "dpm_solver", "singlestep", "multistep", "deis", "unipc", "seeds", "restart",
        "gotta_go_fast", "ode",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"in one step, and only the last would count; .* that asks once a step"):
            run(sampler, *guidance.superpose([C, C], SDE, TS, kind))
        return
    assert agree(run(sampler, *guidance.superpose([C, C], SDE, TS, kind)), run(sampler, C))


def test_one_particle():
    """A particle alone is never weighed against another: `twisted` is `anneal`, which is exact here."""
    s, hook = guidance.twisted(ZERO, SDE, A, Y, SD, TS, sigma_data=VAR**0.5, group=1, noise=torch.zeros_like)
    assert agree(run("ancestral", s, hook), run("ancestral", given_half()))


def test_chains_without_measurement_noise():
    """`ddnm_plus` is then `ddnm` by `ddim`, in every pixel, with the same draws."""
    made = guidance.ddnm_plus(U, SDE, A, Y, 0.0, TS, eta=0.7, noise=Streams(3, N))
    assert agree(run("ddim", *made), run("ddim", moved(lambda r: 1.0), eta=0.7, noise=Streams(3, N)))


def by_hand(step):
    """x1 = alpha1 step(x/alpha, x0, r, r1) from one level to the next."""
    x = Streams(0, N)(torch.empty(N, *SHAPE, dtype=F64))
    for t, t1 in itertools.pairwise(TS):
        a, _, r, _, x0 = parts(x, t)
        a1, _, r1, _, _ = parts(x, t1)
        x = a1 * step(x / a, x0, r, r1)
    return x


def test_ddrm():
    eta, eta_b, noise = 0.6, 0.9, Streams(3, N)

    def step(y, x0, r, r1):
        keep, z, clear = math.sqrt(1 - eta**2), noise(x0), r1 >= SD  # of 4 levels the first two
        unseen = x0 + keep * r1 * (y - x0) / r
        pull = eta_b if clear else keep * r1 / SD
        spread = (r1**2 - (eta_b * SD) ** 2).sqrt() if clear else eta * r1
        return torch.where(MASK == 1, x0 + pull * (KNOWN - x0) + spread * z, unseen + eta * r1 * z)

    made = guidance.ddrm(U, SDE, A, Y, SD, TS, eta=eta, eta_b=eta_b, noise=Streams(3, N))
    assert agree(run("ddim", *made), by_hand(step))


def test_daps():
    """One step of the flow; then x0 ~ N(x0, r^2) given y, and noise of the next level."""
    noise = Streams(3, N)

    def step(y, x0, r, r1):
        x0 = x0 + r * noise(x0)
        n = A.adjoint(noise(A(x0)))
        return x0 + (MASK * (KNOWN - x0) + SD * n) / (1 + SD**2 / r**2) + r1 * noise(x0)

    ahead, hook = guidance.daps(U, SDE, A, Y, SD, ode_steps=1, noise=Streams(3, N))
    assert agree(run("ddim", ahead, hook), by_hand(step))
    x = Streams(0, N)(torch.empty(N, *SHAPE, dtype=F64))
    assert agree(ahead(x, TS[1]), U(x, TS[1]))


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

"""Metropolis-adjusted Langevin moves by scores: the density they keep, the ratio they accept by, the path."""

import math

import pytest
import torch
from scipy.stats import norm
from truth import F64, SDES, log_snr_grid, tensor

from experiments.certificate import cells, three_classes, truth, tv
from guidance import cfg, ramp
from samplers import ddim, metropolis
from scoresde import VP, Streams, counted, gaussian, mixture

SDE = VP()
TS = tensor(0.3, 0.2)  # two points: the hook acts at the second
GENERATOR = lambda: torch.Generator().manual_seed(1)  # noqa: E731


def moved(score, x, n, seed=0, **knobs):
    return metropolis(score, SDE, TS, n, noise=Streams(seed, len(x)), **knobs)(0, TS[1], x)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "EDM"])
@pytest.mark.parametrize("moves", [1, 3])
def test_moves_by_hand(name, moves):
    """x' = x + e s + sqrt(2e) z, accepted by the exact log-densities of a Gaussian (Simpson's rule is exact there)."""
    sde, target, n, step = SDES[name], gaussian(tensor([[[0.3, -0.2]]]), var=0.1), 400, 1.0
    ts = sde.time(tensor(0.7, 1.2))
    t, score, x0 = ts[1], target.score(sde), 0.6 * torch.randn(n, 1, 1, 2, dtype=F64, generator=GENERATOR())
    e = step * (float(sde.sigma(t)) ** 2 + (0.4 * float(sde.alpha(t))) ** 2)
    noise, x, rejected = Streams(0, n), x0, torch.zeros(n, dtype=torch.long)

    def log_q(b, a):
        return -(b - a - e * score(a, t)).square().flatten(1).sum(1) / (4 * e)

    log = lambda y: target.log_prob(y, sde, t)  # noqa: E731
    for _ in range(moves):
        x1 = x + e * score(x, t) + math.sqrt(2 * e) * noise(x)
        a = log(x1) - log(x) + log_q(x, x1) - log_q(x1, x)
        u = tensor(norm.cdf(noise(x[:, 0, 0, :1])[:, 0].numpy()))
        took = u.log() < a
        assert 0.2 < took.double().mean() < 0.8
        rejected += ~took
        x = torch.where(took[:, None, None, None], x1, x)
    out = metropolis(score, sde, ts, moves, step=step, width=0.4, noise=Streams(0, n))(0, t, x0)
    assert torch.equal((out - x0).flatten(1).abs().sum(1) > 0, rejected < moves)
    assert (out - x).abs().max() < 1e-12


def test_a_quartic_by_hand():
    """Where the score is a cubic, -x^3, Simpson's rule is exact: log p = -x^4/4; where it is -x^7 it is not."""
    n, e, t = 500, 0.8 * float(SDE.sigma(TS[1])) ** 2, TS[1]
    x = torch.randn(n, 1, generator=GENERATOR(), dtype=F64)
    for power, exact in ((3, True), (7, False)):
        score = lambda x, t, power=power: -(x**power)  # noqa: E731
        noise = Streams(1, n)
        x1 = x + e * score(x, t) + math.sqrt(2 * e) * noise(x)
        log = lambda y: -(y ** (power + 1)).sum(1) / (power + 1)  # noqa: E731, B023
        log_q = lambda b, a: -(b - a - e * score(a, t)).square().sum(1) / (4 * e)  # noqa: E731, B023
        u = tensor(norm.cdf(noise(x)[:, 0].numpy()))
        want = u.log() < log(x1) - log(x) + log_q(x, x1) - log_q(x1, x)
        got = (moved(score, x, 1, seed=1, step=0.8) != x)[:, 0]
        assert want.double().mean() < 0.97
        assert torch.equal(got, want) == exact


def test_in_float32():
    """The same moves as in float64, with the same noise, but where u is within rounding of the ratio."""
    n, target = 500, three_classes()
    x = torch.randn(n, 2, generator=GENERATOR(), dtype=F64).float()
    runs = []
    for dtype in (F64, torch.float32):
        streams = Streams(2, n)
        noise = lambda v, s=streams: s(v.double()).to(v)  # noqa: E731
        hook = metropolis(target.score(SDE), SDE, TS, 2, step=1.0, noise=noise)
        runs.append(hook(0, TS[1], x.to(dtype)))
    assert runs[1].dtype == torch.float32
    far = (runs[0] - runs[1]).abs().amax(1) > 1e-4
    assert int(far.sum()) <= 2


@pytest.mark.parametrize("step", [0.3, 1.0])
def test_the_density_stays(step):
    """Exact draws of a skew mixture stay exact draws: each component's share and the first two moments, by z-scores;
    the unadjusted step would double the variance at step = 1."""
    target, n = mixture(tensor(1.0, 2.0), tensor([[-0.6], [0.6]]), var=tensor(0.05, 0.3)), 20_000
    a, s = float(SDE.alpha(TS[1])), float(SDE.sigma(TS[1]))
    x = a * target.sample(n) + s * Streams(9, n)(torch.empty(n, 1, dtype=F64))
    y = moved(target.score(SDE), x, 8, seed=3, step=step)
    exact = a * target.sample(n, 77) + s * Streams(78, n)(x)
    assert (y != x).double().mean() > 0.9
    for f in (lambda v: v, torch.square, lambda v: (v > 0).double(), lambda v: v**3):
        u, v = f(y), f(exact)
        assert abs(float(u.mean() - v.mean())) < 4 * math.sqrt(float(u.var() + v.var()) / n)


def test_alone_is_as_in_a_batch_and_calls_are_counted():
    score = counted(three_classes().score(SDE))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    whole = moved(score, x, 3)
    assert score.calls == 7
    hook = metropolis(score, SDE, TS, 3, noise=Streams(0, range(4, 6)))
    assert torch.equal(hook(0, TS[1], x[4:]), whole[4:])
    assert metropolis(score, SDE, TS, [0])(0, TS[1], x) is None


def test_bad_input():
    score = three_classes().score(SDE)
    for knobs, words in (
        ({"n": -1}, "n must be >= 0"),
        ({"n": [1, 2]}, "one for each of 1"),
        ({"step": 0.0}, "step"),
        ({"width": math.inf}, "both finite, got 0.3 and inf"),
    ):
        with pytest.raises(ValueError, match=words):
            metropolis(score, SDE, TS, **knobs)
    with pytest.raises(ValueError, match="singular"):
        metropolis(score, SDE, tensor(0.3, 0.0))
    with pytest.raises(ValueError, match="singular"):
        metropolis(score, SDE, tensor(0.5, 0.3, 0.0), [0, 1])
    x = torch.ones(1, 2, dtype=F64)
    hook = metropolis(score, SDE, tensor(0.5, 0.3, 0.0), [1, 0])
    assert hook(0, tensor(0.3), x) is not None
    assert hook(1, tensor(0.0), x) is None
    for i, t in ((0, 0.29), (2, 0.0)):
        with pytest.raises(ValueError, match="the run's own grid"):
            hook(i, tensor(t), x)


def test_ramp():
    """1 above high, w below low, and linear in log r between."""
    w = ramp(5.0, 0.1, 1.0)
    r = tensor(9.0, 1.0, 0.1**0.5, 0.1, 1e-3)
    assert (w(r) - tensor(1.0, 1.0, 3.0, 5.0, 5.0)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="low < high"):
        ramp(2.0, 1.0, 0.5)


@pytest.mark.parametrize(("w", "goal"), [(4.0, 0.10), (8.0, 0.10)])
def test_exact_guidance(w, goal):
    """Conditional first, w late, moves after each step: total variation to the tilted density by quadrature, where
    plain guidance has 0.7 and 0.9.  4000 samples alone have 0.05 to 0.06; 60 calls."""
    target, n, noise = three_classes(), 4000, Streams(1, 4000)
    cond, uncond = target.given(0).score(SDE), target.score(SDE)
    s = counted(cfg(cond, uncond, ramp(w, 0.3, 1.0), sde=SDE, interval=(0, 1.0)))
    one = SDE.time(tensor(0.0))  # sigma/alpha = 1
    ts = torch.cat([log_snr_grid(SDE, 12, end=one), log_snr_grid(SDE, 8, start=one, end=1e-3)[1:]])
    hook = metropolis(s, SDE, ts, [0] * 12 + [2] * 8, width=0.25, noise=noise)
    x = ddim(s, SDE, Streams(0, n)(torch.empty(n, 2, dtype=F64)), ts, on_step=hook)
    assert s.calls == 60
    assert tv(cells(x), truth(target, w)[0]) < goal

"""Feynman-Kac weights against closed forms and against the certificate; resampling's identities."""

import math

import pytest
import torch
from truth import F64, SDES, log_snr_grid, tensor

import guidance
from experiments.certificate import three_classes
from guidance.feynman_kac import feynman_kac
from guidance.resample import effective, systematic, temper
from samplers import ancestral, ddim, heun, metropolis
from scoresde import VP, Streams, gaussian

SDE = VP()
COND, UNCOND = gaussian(tensor([0.5]), var=0.1), gaussian(tensor([0.0]), var=0.3)


def tilted(w, var=(0.1, 0.3), mean=0.5):
    """Mean and variance of N(mean, var_c)^w N(0, var_u)^(1-w)."""
    precision = w / var[0] + (1 - w) / var[1]
    return w * mean / var[0] / precision, 1 / precision


def test_weights_are_those_of_the_certificate():
    """Unresampled, log W = log f - log q of the flow: the same effective size as from the flow's own divergence."""
    target, w, n = three_classes(), 2.0, 400
    cond, uncond = target.given(0).score(SDE), target.score(SDE)
    ts = log_snr_grid(SDE, 300, end=1e-2)
    x = Streams(0, n)(torch.empty(n, 2, dtype=F64))
    fk = feynman_kac(cond, uncond, w, SDE, ts, threshold=1e-9, alarm=0, noise=Streams(1, n))
    heun(fk.score, SDE, x, ts, on_step=fk.hook)

    def log_f(y):
        return (1 - w) * target.log_prob(y, SDE, ts[-1]) + w * target.given(0).log_prob(y, SDE, ts[-1])

    got = guidance.certify(guidance.cfg(cond, uncond, w), SDE, x, log_f, t=ts[-1], d=1.0, tol=1e-4)
    assert 0.01 < got.ess / n < 0.9
    assert float(fk.ess[-1]) == pytest.approx(got.ess / n, rel=0.01)


@pytest.mark.parametrize("sampler", [heun, ancestral])
def test_law_of_the_tilted_gaussian(sampler):
    """Mean and variance over 20 runs with moves, z-scores from their spread; plain guidance is 15 errors away."""
    w, n, runs = 2.0, 500, 20
    ts = log_snr_grid(SDE, 40, start=SDE.time(tensor(1 / 20).log()), end=5e-3)
    a, s = float(SDE.alpha(ts[-1])), float(SDE.sigma(ts[-1]))
    mean, var = tilted(w, (a * a * 0.1 + s * s, a * a * 0.3 + s * s), 0.5 * a)
    got, plain = [], []
    for seed in range(runs):
        noise = Streams(seed, n)
        fk = feynman_kac(COND.score(SDE), UNCOND.score(SDE), w, SDE, ts, noise=noise)
        x = float(SDE.sigma(ts[0])) * noise(torch.empty(n, 1, dtype=F64))
        run = {} if sampler is heun else {"noise": noise}
        y = sampler(
            fk.score, SDE, x, ts, on_step=[fk.hook, metropolis(fk.score, SDE, ts, 2, width=0.2, noise=noise)], **run
        )
        got.append([float(y.mean()), float(y.var())])
        y = sampler(guidance.cfg(COND.score(SDE), UNCOND.score(SDE), w), SDE, x, ts, **run)
        plain.append([float(y.mean()), float(y.var())])
    got, plain, want = torch.tensor(got, dtype=F64), torch.tensor(plain, dtype=F64), tensor(mean, var)
    bar = got.std(0) / math.sqrt(runs)
    assert ((got.mean(0) - want).abs() < 3.5 * bar).all()
    assert ((plain.mean(0) - want).abs() > 15 * bar).all()


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "EDM"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_by_hand(name, dtype):
    """Particle k's scores differ by g_k/sqrt(r) in y = x/alpha: log W = w (w - 1) g^2 (r - r1), without error by the
    trapezoid in r (two calls), and w (w - 1) g^2 (r^2 - r1^2)/(2 r) by the rectangle in r^2 (one); W^(1 - tau) stays,
    and at the end it is used up."""
    sde, n, w = SDES[name], 6, -2.0
    g = torch.linspace(0.0, 0.8, n, dtype=F64)
    rate = w * (w - 1) * g.square() / 2
    ts = sde.time(tensor(-0.6, -0.2, 0.0, 0.01, 0.5))
    r = (sde.sigma(ts) / sde.alpha(ts)).tolist()
    x = (torch.arange(n)[:, None, None, None] + torch.zeros(n, 2, 1, 3)).to(dtype)  # each pixel: which particle
    uncond = lambda x, t: torch.full_like(x, 0.3)  # noqa: E731
    cond = lambda x, t: (0.3 + g[x.long()] / (6 * sde.alpha(t) * sde.sigma(t)).sqrt()).to(x)  # noqa: E731
    z = tensor([0.4])
    fk = feynman_kac(cond, uncond, w, sde, ts, threshold=0.7, alarm=0.01, noise=lambda v: z.to(v).expand(v.shape))
    log_w, who = torch.zeros(n, dtype=F64), torch.arange(n)
    for i, calls in enumerate(([0, 1], [1], [2, 3], [3])):
        for k in calls:
            s = fk.score(x, ts[k])
            assert s.dtype == dtype
            assert (s - guidance.cfg(cond, uncond, w)(x, ts[k])).abs().max() < 1e-5
        log_w = log_w + rate[who] * (r[i] - r[i + 1]) * (2 if len(calls) == 2 else 1 + r[i + 1] / r[i])
        got = fk.hook(i, ts[i + 1], x)
        share = float(effective(log_w[None]))
        assert float(fk.ess[i]) == pytest.approx(share, rel=1e-9 if dtype == F64 else 1e-5)
        assert (got is None) == (share >= 0.7 and i < 3) == (i in (1, 2))
        if got is None:
            continue
        tau = float(temper(log_w[None], 0.7)) if i < 3 else 1.0
        index = systematic(torch.softmax(tau * log_w[None], 1), z)[0]
        assert not torch.equal(index, torch.arange(n))
        x, who, log_w = x[index], who[index], (1 - tau) * log_w[index]
        assert torch.equal(got, x)


def test_a_sampler_that_asks_in_the_middle():
    """The trapezoid down to its last call, the rectangle of that from there: |s_c - s_u|^2 = g^2/r, as above."""
    g, w, sde = torch.linspace(0.0, 0.8, 5, dtype=F64)[:, None], 3.0, SDES["EDM"]
    ts, mid, x = tensor(1.8, 1.0, 0.5), tensor(1.5), torch.zeros(5, 1, dtype=F64)
    fk = feynman_kac(lambda x, t: g / t.sqrt(), lambda x, t: 0 * x, w, sde, ts, alarm=0, threshold=1e-9)
    for t in (ts[0], mid):
        fk.score(x, t)
    assert fk.hook(0, ts[1], x) is None
    log_w = w * (w - 1) / 2 * g[:, 0] ** 2 * (2 * (1.8 - 1.5) + (1.5**2 - 1) / 1.5)
    assert float(fk.ess[0]) == pytest.approx(float(effective(log_w[None])), rel=1e-12)


def test_resampling():
    g = torch.Generator().manual_seed(0)
    log_w = 3 * torch.randn(1, 500, generator=g, dtype=F64)
    share = effective(log_w)
    W = torch.softmax(log_w, 1)
    assert float(share) == pytest.approx(1 / float(W.square().sum()) / 500, rel=1e-12)
    tau = temper(log_w, 0.5)
    assert 0 < float(tau) < 1
    assert 0.5 <= float(effective(tau * log_w)) < 0.5 + 1e-4
    assert float(temper(torch.zeros(1, 9, dtype=F64), 0.5)) == pytest.approx(1.0, abs=1e-5)
    for z in (-3.0, 0.0, 2.0):
        count = torch.bincount(systematic(W, tensor([z]))[0], minlength=500)
        assert ((count - 500 * W[0]).abs() < 1).all()
    assert systematic(torch.full((1, 10), 0.1, dtype=F64), tensor([9.0])).max() == 9  # u rounds to 1
    turns = torch.special.ndtri((torch.arange(2000, dtype=F64) + 0.5) / 2000)
    mean = sum(torch.bincount(systematic(W, z[None])[0], minlength=500) for z in turns)
    assert (mean / 2000 - 500 * W[0]).abs().max() < 1e-3


def test_alarm_and_bad_input():
    target, n = three_classes(), 200
    cond, uncond = target.given(0).score(SDE), target.score(SDE)
    ts = log_snr_grid(SDE, 8, end=1e-2)
    x = Streams(0, n)(torch.empty(n, 2, dtype=F64))
    fk = feynman_kac(cond, uncond, 8.0, SDE, ts, noise=Streams(1, n), alarm=0.3)
    with pytest.raises(FloatingPointError, match="a few stand for all"):
        ddim(fk.score, SDE, x, ts, on_step=fk.hook)
    other = feynman_kac(cond, uncond, 8.0, SDE, ts)
    with pytest.raises(ValueError, match=r"give it fk\.score"):
        ddim(cond, SDE, x, ts, on_step=other.hook)
    with pytest.raises(ValueError, match="threshold"):
        feynman_kac(cond, uncond, 2.0, SDE, ts, threshold=0.0)
    with pytest.raises(ValueError, match="threshold"):
        feynman_kac(cond, uncond, 2.0, SDE, ts, threshold=0.5, alarm=0.5)
    for w in (math.nan, torch.ones(n), lambda r: r):
        with pytest.raises(ValueError, match="w must be a finite number"):
            feynman_kac(cond, uncond, w, SDE, ts)
        with pytest.raises(ValueError, match="w must be a finite number"):
            guidance.ramp(w, 0.1, 0.5)
    lost = feynman_kac(lambda x, t: x * math.nan, uncond, 2.0, SDE, ts)
    with pytest.raises(FloatingPointError, match="particles are worth nan"):
        ddim(lost.score, SDE, x, ts, on_step=lost.hook)
    fk = feynman_kac(cond, uncond, 1.0, SDE, ts)
    with pytest.raises(ValueError, match="one time for the whole batch"):
        fk.score(x, torch.full((n,), 0.5))
    with pytest.raises(ValueError, match="the run's own grid"):
        ddim(fk.score, SDE, x, ts[:3].clone().sub_(0.01), on_step=fk.hook)

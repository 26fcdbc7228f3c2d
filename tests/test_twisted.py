"""Particles against closed forms: evidence and mode masses with error bars, resampling counts, the digits posterior."""

import itertools
import math

import pytest
import torch
from truth import F64, gaussian_score, tensor

from experiments.posteriors import average, digits_cases, posterior, rate, run
from experiments.problems import problem
from guidance.operators import linear, mask
from guidance.resample import temper
from guidance.twisted import twisted
from samplers import ancestral, ddim, grids, relax
from scoresde import EDM, VP, Streams, counted, mixture

SD = 0.4


def start(sde, n, *shape, seed=0):
    noise = Streams(seed, n)
    return sde.prior_std * noise(torch.empty(n, *shape, dtype=F64)), noise


def chain(sde, ts, mean, var):
    """Mean and variance of x/alpha at the end of `ancestral` from N(0, prior_std^2): it is affine on Gaussian data."""
    m, v = 0 * mean, sde.prior_std**2 + 0 * var
    for t, t1 in itertools.pairwise(ts):
        a, s, a1, s1 = sde.alpha(t), sde.sigma(t), sde.alpha(t1), sde.sigma(t1)
        G2 = s**2 - (a / a1 * s1) ** 2
        slope = -1 / (a**2 * var + s**2)
        keep = (1 + G2 * slope) * a1 / a
        m, v = keep * m - a1 / a * G2 * slope * a * mean, keep**2 * v + G2 * (s1 / s) ** 2
    return m / sde.alpha(ts[-1]), v / sde.alpha(ts[-1]) ** 2


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_evidence_is_unbiased_and_the_mean_is_right(threshold):
    """Gaussian data, a few steps, 400 groups of 32: E[exp log_z] is p(y) of the very chain, to its standard error."""
    sde, mean, var = VP(), tensor([0.5, -0.3]), tensor([0.3, 0.1])
    a, y, ts = tensor([1.0, 2.0]), tensor([0.9]), grids.log_snr(VP(), 12, t_end=0.1)
    A = linear(lambda x: (x * a).sum(1, keepdim=True), (2,))
    G, n = 400, 32
    x, noise = start(sde, G * n, 2)
    s, particles = twisted(gaussian_score(sde, mean, var), sde, A, y, SD, ts, group=n, threshold=threshold, noise=noise)
    x = ancestral(s, sde, x, ts, noise=noise, on_step=particles) / sde.alpha(ts[-1])
    m, v = chain(sde, ts, mean, var)
    S = (a * a * v).sum() + SD**2
    log_p = -0.5 * ((y[0] - (a * m).sum()) ** 2 / S + torch.log(2 * math.pi * S))
    z = (particles.log_z - log_p).exp()
    bar = z.std() / G**0.5
    assert bar < 0.05
    assert abs(z.mean() - 1) < 3.5 * bar
    exact = m + v * a * (y[0] - (a * m).sum()) / S
    gap = z[:, None] * (x.reshape(G, n, 2).mean(1) - exact)  # weighted by the evidence: unbiased for any n
    assert bool((gap.mean(0).abs() < 3.5 * gap.std(0) / G**0.5).all())
    assert bool((gap.std(0) / G**0.5 < 0.03 * v.sqrt()).all())
    assert particles.ess.shape == (12, G)
    assert bool(((particles.ess >= (1 - 1e-9) / n) & (particles.ess <= 1 + 1e-9)).all())


BIMODAL = mixture(
    tensor([0.5, 0.5]), tensor([[-1.0, 0.8], [1.0, -0.8]]), var=tensor([0.04, 0.02]), labels=torch.arange(2)
)


def test_masses_of_two_modes():
    """Weights that only the likelihood decides, far apart: without weights a third of the mass is astray."""
    sde, y, A = EDM(), tensor([0.15]), mask(tensor([1.0, 0.0]))
    sd = 0.6
    exact, log_z = posterior(BIMODAL, A, y, sd)
    share = float(exact.log_weights.exp()[exact.means[:, 0] > 0])
    ts = grids.karras(sde, 60, t_end=0.01)
    G, n = 32, 128
    x, noise = start(sde, G * n, 2)
    s, particles = twisted(BIMODAL.score(sde), sde, A, y, sd, ts, group=n, noise=noise)
    out = ancestral(s, sde, x, ts, noise=noise, on_step=[particles, relax(s, sde, 1, noise=noise)])
    masses = (out[:, 0] > out[:, 1]).double().reshape(G, n).mean(1)
    bar = masses.std() / G**0.5
    assert bar < 0.02
    assert abs(masses.mean() - share) < 3.5 * bar
    z = (particles.log_z - log_z).exp()
    assert abs(z.mean() - 1) < 3.5 * z.std() / G**0.5 + 0.02  # the chain's own error at 60 steps


def test_systematic_resampling():
    """Each particle is drawn floor or ceil of n w times, one stratum each, within its own group."""
    x, _ = start(VP(), 12, 2)
    ts = grids.uniform(VP(), 3)
    s, particles = twisted(
        gaussian_score(VP()),
        VP(),
        mask(torch.ones(2)),
        tensor([0.1, 0.2]),
        SD,
        ts,
        group=6,
        noise=lambda x: 0 * x + 0.7,
    )
    seen = []
    ancestral(s, VP(), x, ts, on_step=[particles, lambda i, t, x: seen.append(x)])
    w = torch.softmax(torch.randn(2, 6, generator=torch.Generator().manual_seed(5), dtype=F64), 1)
    rows = particles._drawn(w, x)
    u = float(torch.special.ndtr(tensor(0.7)))
    for g in range(2):
        edges = [0.0, *w[g].cumsum(0).tolist()]
        for k in range(6):
            count = sum(edges[k] <= (j + u) / 6 < edges[k + 1] for j in range(6))
            assert int((rows[g] == 6 * g + k).sum()) == count
            assert abs(count - 6 * float(w[g, k])) < 1


def test_particles_are_drawn_anew_where_their_share_is_low():
    """Elsewhere they stay as they are; at the end what is left of the weights is used up."""
    sde, ts = VP(), grids.log_snr(VP(), 12)
    x, noise = start(sde, 64, 2)
    s, particles = twisted(
        BIMODAL.score(sde), sde, mask(tensor([1.0, 0.0])), tensor([0.3]), 0.5, ts, group=32, noise=noise
    )
    same = []

    def hook(i, t, x):
        x1 = particles(i, t, x)
        same.append((x1 == x).reshape(2, -1).all(1))
        return x1

    ancestral(s, sde, x, ts, noise=noise, on_step=hook)
    enough = particles.ess >= 0.5
    assert torch.equal(torch.stack(same)[:-1], enough[:-1])
    assert bool(enough[:-1].any())
    assert not bool(enough[:-1].all())
    assert not bool(same[-1].any())


def test_a_group_is_alone():
    """Rows of one group have the same bits without the others, with their own measurements."""
    sde, A, ts = VP(), mask(tensor([1.0, 0.0])), grids.log_snr(VP(), 8)
    y = tensor([[0.3], [-0.7]]).repeat_interleave(4, 0)

    def go(first, last):
        noise = Streams(3, range(first, last))
        x = noise(torch.empty(last - first, 2, dtype=F64))
        s, particles = twisted(BIMODAL.score(sde), sde, A, y[first:last], 0.2, ts, group=4, noise=noise)
        x = ancestral(s, sde, x, ts, noise=noise, on_step=[particles, relax(s, sde, 1, noise=noise)])
        return x, particles.log_z

    both, second = go(0, 8), go(4, 8)
    assert torch.equal(both[0][4:], second[0])
    assert torch.equal(both[1][1:], second[1])


def test_record_alarm_and_calls():
    sde, ts = EDM(), grids.karras(EDM(), 10, t_end=0.01)
    x, noise = start(sde, 200, 2)
    score = counted(BIMODAL.score(sde))

    def go(sd, **how):
        s, particles = twisted(score, sde, mask(torch.ones(2)), tensor([1.1, -0.7]), sd, ts, noise=noise, **how)
        ancestral(s, sde, x, ts, noise=noise, on_step=[particles, relax(s, sde, 2, noise=noise)])
        return particles

    fine = go(1.0)
    assert score.calls == 10 * 3
    k = int(fine.ess[:, 0].argmin())
    assert str(fine) == (
        f"effective particles at least {200 * fine.ess.min():.1f} of 200, at sigma/alpha = {float(ts[k + 1]):.3g}"
    )
    coarse = go(0.003, alarm=0.0)
    assert coarse.ess.min() < 0.01
    with pytest.raises(FloatingPointError, match=r"of 200, at sigma/alpha = 0.\d+: a few stand for all"):
        go(0.003)


def test_tempering():
    """The largest power of the weights that keeps the effective share, each row its own; 1 where all of it does."""
    w = torch.randn(3, 50, generator=torch.Generator().manual_seed(5), dtype=F64) * tensor([[0.1], [2.0], [30.0]])
    tau = temper(w, 0.5)
    assert tau[0, 0] > 1 - 1e-5
    for row, power in zip(w[1:], tau[1:, 0], strict=True):
        p = torch.softmax(power * row, 0)
        assert abs(1 / p.square().sum() / 50 - 0.5) < 1e-3
        assert 0 < power < 1


def test_errors():
    sde, A, y, ts = VP(), mask(torch.ones(2)), tensor([0.1, 0.2]), grids.log_snr(VP(), 8)
    score = gaussian_score(sde)
    x, noise = start(sde, 60, 2)

    def go(sampler=ancestral, on=ts, mine=None, **how):
        s, particles = twisted(score, sde, A, how.pop("y", y), SD, ts, noise=noise, **how)
        sampler(mine or s, sde, x, on, on_step=particles, **({} if sampler is ddim else {"noise": noise}))

    with pytest.raises(ValueError, match="the steps were not those of ancestral"):
        go(ddim)
    with pytest.raises(ValueError, match="the steps were not those of ancestral"):
        go(on=grids.uniform(sde, 8))
    with pytest.raises(ValueError, match="did not call the score that twisted returned"):
        go(mine=score)
    with pytest.raises(ValueError, match="60 rows are no whole number of groups of 7 particles"):
        go(group=7)
    with pytest.raises(ValueError, match="30 rows must share y"):
        go(group=30, y=torch.arange(120, dtype=F64).reshape(60, 2))
    with pytest.raises(ValueError, match=r"0 <= alarm < threshold < 1 wanted, got alarm = 0\.01, threshold = 2"):
        go(threshold=2.0)
    with pytest.raises(ValueError, match="noise_sd must be positive"):
        twisted(score, sde, A, y, 0.0, ts)
    with pytest.raises(ValueError, match="noise_sd = inf measures nothing"):
        twisted(score, sde, A, y, float("inf"), ts)
    with pytest.raises(ValueError, match="ts must end above 0"):
        twisted(score, sde, A, y, SD, tensor([1.0, 0.5, 0.0]))


def test_the_rating():
    """Exact draws are at its floor; too wide, shifted or of the wrong modes is told by the right figure."""
    exact, n = BIMODAL.given(0), 2000
    x = exact.sample(n, seed=1)
    r = rate(x, exact)
    assert r.sliced_w2 < 2 * r.floor < 0.04
    assert abs(r.sd_ratio - 1) < 4 / (2 * n) ** 0.5
    assert abs(r.band - 0.9) < 4 * 0.3 / n**0.5
    assert r.mean_error < 3 / n**0.5
    wide = rate(exact.means + 1.3 * (x - exact.means), exact)
    assert abs(wide.sd_ratio / r.sd_ratio - 1.3) < 1e-3
    assert abs(wide.band - math.erf(1.6449 / 1.3 / 2**0.5)) < 4 * 0.41 / n**0.5
    assert abs(rate(x + 0.5 * 0.2, exact).mean_error - 0.5) < 4 / n**0.5
    assert abs(rate(x, BIMODAL).modes - 0.5) < 1e-6


def test_digits_posterior():
    """The goal of `experiments.posteriors`, on one measurement with each mask and 256 samples."""
    P, ratings = problem("digits"), []
    for case in digits_cases(1):
        x, calls = run(case, P, 256)
        assert calls <= 600
        ratings.append(rate(x, case.exact))
    r = average(ratings)
    assert r.sliced_w2 < 0.055
    assert 0.95 < r.sd_ratio < 1.05
    assert 0.88 < r.band < 0.92
    assert r.mean_error < 0.12
    assert r.modes < 0.02

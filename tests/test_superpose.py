"""Superposition: shares of OR, equal densities of AND, the tracked log-densities' convergence, AND's equations."""

import math

import pytest
import torch
from truth import F64, SDES, log_snr_grid, tensor

from experiments.certificate import three_classes
from guidance import superpose
from guidance.superpose import _even
from samplers import ancestral, ddim, heun
from scoresde import VP, Streams, gaussian

SDE = VP()
A, B = (three_classes().given(k) for k in (0, 1))


def run(kind, steps, n, scores, seed=0, **knobs):
    ts = log_snr_grid(SDE, steps, start=SDE.time(tensor(1 / 30).log()), end=1e-3)
    s, follow = superpose(scores, SDE, ts, kind, **knobs)
    noise = Streams(seed, n)
    x = float(SDE.sigma(ts[0])) * noise(torch.empty(n, 2, dtype=F64))
    return ancestral(s, SDE, x, ts, noise=noise, on_step=follow), ts[-1]


def gap(x, t):
    return A.log_prob(x, SDE, t) - B.log_prob(x, SDE, t)


def test_or_has_the_shares_it_is_told():
    """Samples of 0.7 p_a + 0.3 p_b: the share that is likelier under a, against exact draws of the mixture."""
    n = 2000
    x, t = run("or", 250, n, [A.score(SDE), B.score(SDE)], shares=(0.7, 0.3))
    share = float((gap(x, t) > 0).double().mean())
    assert share == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / n))
    spread = torch.stack([A.log_prob(x, SDE, t), B.log_prob(x, SDE, t)]).amax(0)
    exact = torch.cat([A.sample(1400, 3), B.sample(600, 4)])
    same = torch.stack([A.log_prob(exact, SDE, t), B.log_prob(exact, SDE, t)]).amax(0)
    assert float(spread.mean()) == pytest.approx(float(same.mean()), abs=4 * float(same.std()) * (2 / n) ** 0.5)


def test_first_score_is_that_of_the_mixture():
    """Before any step k = v: the sum of the scores by their shares, in any rank; one score many times is itself."""
    ts, x = tensor(0.9, 0.5), torch.randn(3, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    s, _ = superpose([A.score(SDE), B.score(SDE)], SDE, ts, shares=(3, 1))
    want = 0.75 * A.score(SDE)(x, ts[0]) + 0.25 * B.score(SDE)(x, ts[0])
    assert (s(x, ts[0]) - want).abs().max() < 1e-12
    cube = gaussian(torch.zeros(2, 1, 3), var=0.2).score(SDE)
    y = torch.randn(4, 2, 1, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    for kind in ("or", "and"):
        assert (superpose([cube, cube, cube], SDE, ts, kind)[0](y, ts[0]) - cube(y, ts[0])).abs().max() < 1e-9


def test_tracked_log_densities_converge():
    """k is driven by log p_a - log p_b, whose error falls with the step.

    Seen from outside: the score is k s_a + (1 - k) s_b, so k, and with it log p_a - log p_b, can be read off it.
    """
    errors = []
    for steps in (60, 240):
        n = 400
        ts = log_snr_grid(SDE, steps, start=SDE.time(tensor(1 / 30).log()), end=SDE.time(tensor(1 / 0.4).log()))
        s, follow = superpose([A.score(SDE), B.score(SDE)], SDE, ts)
        noise = Streams(0, n)
        x = ancestral(
            s, SDE, float(SDE.sigma(ts[0])) * noise(torch.empty(n, 2, dtype=F64)), ts, noise=noise, on_step=follow
        )
        a, b = A.score(SDE)(x, ts[-1]), B.score(SDE)(x, ts[-1])
        k = ((s(x, ts[-1]) - b) * (a - b)).sum(1) / (a - b).square().sum(1)
        tracked = torch.logit(k.clamp(1e-12, 1 - 1e-12))
        keep = gap(x, ts[-1]).abs() < 8
        errors.append(float((tracked - gap(x, ts[-1]))[keep].square().mean().sqrt()))
    assert errors[1] < 0.5 * errors[0] < 0.5


def test_and_makes_them_alike():
    """|log p_a - log p_b| at the end: under 0.3 for half of the samples; the mean of the scores leaves more than 1."""
    pair = [A.score(SDE), B.score(SDE)]
    x, t = run("and", 200, 500, pair)
    assert float(gap(x, t).abs().median()) < 0.3
    noise = Streams(0, 500)
    ts = log_snr_grid(SDE, 200, start=SDE.time(tensor(1 / 30).log()), end=1e-3)
    x0 = float(SDE.sigma(ts[0])) * noise(torch.empty(500, 2, dtype=F64))
    plain = ancestral(lambda x, t: (pair[0](x, t) + pair[1](x, t)) / 2, SDE, x0, ts, noise=noise)
    assert float(gap(plain, t).abs().median()) > 1


def test_weights_of_and():
    """sum k = 1, and the expected growth <s_i, sum k s> - |s_i|^2/2 + log p_i/rest is the same for every i."""
    g = torch.Generator().manual_seed(0)
    s = torch.randn(5, 3, 7, generator=g, dtype=F64)
    log_p, rest = torch.randn(5, 3, generator=g, dtype=F64), 0.75
    k = _even(s, log_p, rest)
    assert (k.sum(1) - 1).abs().max() < 1e-10
    mean = torch.einsum("bk,bkd->bd", k, s)
    growth = torch.einsum("bid,bd->bi", s, mean) - s.square().sum(2) / 2 + log_p / rest
    assert (growth - growth.mean(1, keepdim=True)).abs().max() < 1e-9


def test_scores_that_tell_nothing_apart_count_alike():
    """Equal scores, and scores that are 0, leave k open whatever log p: then k = 1/K."""
    s = torch.ones(1, 3, 4, dtype=F64)
    for same in (s, 0 * s, 1e-9 * s):
        k = _even(same, tensor([[0.3, -2.0, 1.0]]), 0.75)
        assert (k - 1 / 3).abs().max() < 1e-9


@pytest.mark.parametrize("apart", [1e-2, 3e-4])
def test_scores_that_are_nearly_alike(apart):
    """As at high noise: the equations hold down to apart^2 = 1e-6, where they are cut off; the sum is 1 there too."""
    s = 1 + apart * torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    k = _even(s, torch.zeros(5, 3, dtype=F64), 0.75)
    assert (k.sum(1) - 1).abs().max() < 1e-12
    if apart == 1e-2:
        growth = torch.einsum("bid,bkd,bk->bi", s, s, k) - s.square().sum(2) / 2
        assert (growth - growth.mean(1, keepdim=True)).abs().max() < 1e-9


ORDER = torch.tensor([[-2.0, 0.5, 1.0, 0.3], [0.2, 0.4, -0.7, 0.1], [1.0, -0.3, 0.2, 0.6]], dtype=F64)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "EDM"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_two_steps_by_hand(name, dtype):
    """k of "or" after two steps of constant scores: log p_i = sum <s_i, dy> - |s_i|^2 (r^2 - r1^2)/2, y = x/alpha."""
    sde, n, g = SDES[name], 5, torch.Generator().manual_seed(0)
    ts = sde.time(tensor(-0.4, 0.3, 0.9))
    a, r = sde.alpha(ts), sde.sigma(ts) / sde.alpha(ts)
    fields = [
        lambda x, t, c=c: (c.to(x) / sde.alpha(t)).reshape(1, 2, 1, 2).expand(x.shape) for c in ORDER
    ]  # s of y: c
    s, follow = superpose(fields, sde, ts, shares=(1, 2, 3))
    x = torch.randn(3, n, 2, 1, 2, generator=g, dtype=dtype)
    log_p = torch.log(tensor(1, 2, 3) / 6).expand(n, 3)
    for i in range(2):
        s(x[i], ts[i])
        assert follow(i, ts[i + 1], x[i + 1]) is None
        dy = (x[i + 1] / a[i + 1] - x[i] / a[i]).double().flatten(1)
        log_p = log_p + dy @ ORDER.T - ORDER.square().sum(1) * (r[i] ** 2 - r[i + 1] ** 2) / 2
    want = (log_p.softmax(1) @ ORDER / a[2]).reshape(n, 2, 1, 2)
    got = s(x[2], ts[2])
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5) * float(want.abs().max())


@pytest.mark.parametrize("kind", ["or", "and"])
def test_alone_is_as_in_a_batch(kind):
    ts = log_snr_grid(SDE, 20, end=1e-2)
    x = Streams(0, 4)(torch.empty(4, 2, dtype=F64))

    def go(rows):
        s, follow = superpose([A.score(SDE), B.score(SDE)], SDE, ts, kind)
        return ancestral(s, SDE, x[rows], ts, noise=Streams(1, rows), on_step=follow)

    assert (go(range(4))[2:3] - go(range(2, 3))).abs().max() < 1e-9


def test_and_aims_at_the_end_of_the_grid():
    """What is open of log p after two steps is closed in r^2 - r_N^2, in each step its part of it."""
    sde, g = SDES["EDM"], torch.Generator().manual_seed(0)
    ts = tensor(2.0, 1.5, 1.2, 0.7)
    fields = [lambda x, t, c=c: c.expand(x.shape) for c in ORDER]
    s, follow = superpose(fields, sde, ts, "and")
    x = torch.randn(3, 2, 4, generator=g, dtype=F64)
    log_p = 0
    for i in range(2):
        s(x[i], ts[i])
        follow(i, ts[i + 1], x[i + 1])
        log_p = log_p + (x[i + 1] - x[i]) @ ORDER.T - ORDER.square().sum(1) * (ts[i] ** 2 - ts[i + 1] ** 2) / 2
    got = s(x[2], ts[2])
    growth = got @ ORDER.T - ORDER.square().sum(1) / 2 + log_p / (ts[2] ** 2 - ts[3] ** 2)
    assert (growth - growth.mean(1, keepdim=True)).abs().max() < 1e-9
    k = torch.linalg.lstsq(ORDER.T, got.T).solution.T
    assert (k.sum(1) - 1).abs().max() < 1e-9
    follow(2, ts[3], x[2])
    assert torch.isfinite(s(x[2], ts[3])).all()  # no step is left


def test_bad_input():
    ts, score = tensor(0.9, 0.5), A.score(SDE)
    for arguments, words in (
        (([score], SDE, ts), "at least two"), (([score] * 2, SDE, ts, "xor"), "kind"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            superpose(*arguments)
    with pytest.raises(ValueError, match="shares"):
        superpose([score] * 2, SDE, ts, "and", shares=(1, 1))
    for shares in ((1,), (1, 0), (1, math.nan), (1, math.inf)):
        with pytest.raises(ValueError, match="shares are positive, one a score"):
            superpose([score] * 2, SDE, ts, shares=shares)
    _, follow = superpose([score] * 2, SDE, ts)
    with pytest.raises(ValueError, match="the score of the pair"):
        ddim(score, SDE, torch.ones(1, 2, dtype=F64), ts, on_step=follow)
    s, follow = superpose([score] * 2, SDE, tensor(0.9, 0.5, 0.3))
    x = torch.ones(1, 2, dtype=F64)
    with pytest.raises(ValueError, match="one time for the whole batch"):
        s(torch.ones(2, 2), tensor(0.9, 0.5))
    s(x, ts[0])
    follow(0, ts[1], x)
    with pytest.raises(ValueError, match="the score of the pair"):
        follow(1, tensor(0.3), x)
    s, follow = superpose([score] * 2, SDE, ts)
    with pytest.raises(ValueError, match="asks once a step, at its start"):
        heun(s, SDE, torch.ones(1, 2, dtype=F64), ts, on_step=follow)

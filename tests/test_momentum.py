"""APG's memory across steps: the algorithm by hand, what it becomes, and what counts as a step."""

import math

import pytest
import torch

from guidance import apg, apg_momentum
from samplers import SAMPLERS, ddim, grids, heun, hooks
from scoresde import VP, Model, Streams, mixture
from scoresde.types import number

D64 = torch.float64
SDE = VP()


def problem(n=4, shape=(2, 3)):
    """Conditional and unconditional scores of a mixture, and a batch at T."""
    g = torch.Generator().manual_seed(3)
    target = mixture(
        torch.ones(6),
        torch.randn(6, *shape, generator=g, dtype=D64),
        var=0.1 + 0.3 * torch.rand(6, *shape, generator=g, dtype=D64),
        labels=torch.arange(6) // 2,
    )
    return target.given(1).score(SDE), target.score(SDE), Streams(0, n)(torch.empty(n, *shape, dtype=D64))


C, U, X = problem()
TS = grids.log_snr(SDE, 7)


def close(a, b, tol=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tol * max(1.0, float(b.abs().max()))


def clean(score, x, t):
    return (x + SDE.sigma(t) ** 2 * score(x, t)) / SDE.alpha(t)


def direction(x, t, w, beta, eta, threshold, before):
    """(guided x0, the memory), one sample after the other, from the algorithm's lines."""
    out, memory = [], []
    for k in range(len(x)):
        x0_c, x0_u = (clean(s, x[k : k + 1], t).flatten() for s in (C, U))
        m = x0_c - x0_u + beta * before[k]
        memory.append(m)
        m = m * min(1.0, threshold / float(m.norm()))
        unit = x0_c / x0_c.norm()
        along = (m @ unit) * unit
        out.append((x0_c + (w - 1) * (m - along + eta * along)).reshape(x[k].shape))
    return torch.stack(out), torch.stack(memory)


HOW = {"eta": 0.4, "threshold": 0.7}


@pytest.mark.parametrize("w", [2.5, torch.tensor([1.0, 2.0, 3.0, 8.0], dtype=D64), lambda r: 1 + 2 / (1 + r)])
@pytest.mark.parametrize("sampler", [ddim, heun])
def test_no_beta_is_apg(sampler, w):
    for how in ({}, HOW, {**HOW, "interval": (0.2, 2.0)}):
        s, memory = apg_momentum(C, U, w, sde=SDE, beta=0.0, **how)
        close(sampler(s, SDE, X, TS, on_step=memory), sampler(apg(C, U, w, sde=SDE, **how), SDE, X, TS))


@pytest.mark.parametrize("beta", [-0.6, 0.5])
def test_ddim_by_hand(beta):
    """Every state of x1 = alpha1 x0 + (sigma1/sigma) (x - alpha x0), with thresholds that bite and that do not."""
    bites = []
    for threshold in (0.7, math.inf):
        s, memory = apg_momentum(C, U, 3.0, sde=SDE, beta=beta, eta=0.4, threshold=threshold)
        got = []
        ddim(s, SDE, X, TS, on_step=[memory, hooks.trajectory(got)])
        x, m = X, torch.zeros(len(X), 6, dtype=D64)
        for i in range(len(TS) - 1):
            x0, m = direction(x, TS[i], 3.0, beta, 0.4, threshold, m)
            bites.append(bool((m.norm(dim=1) > threshold).any()))
            eps = (x - SDE.alpha(TS[i]) * x0) / SDE.sigma(TS[i])
            x = SDE.alpha(TS[i + 1]) * x0 + SDE.sigma(TS[i + 1]) * eps
            close(got[i], x, 1e-11)
    assert 0 < sum(bites) < len(bites)


def test_heun_by_hand():
    """Two calls a step, one memory: that of the first; the second sees what the first saw."""
    s, memory = apg_momentum(C, U, 3.0, sde=SDE, beta=-0.6, **HOW)
    got = heun(s, SDE, X, TS, on_step=memory)
    x, m = X, torch.zeros(len(X), 6, dtype=D64)
    alpha, sigma = SDE.alpha(TS), SDE.sigma(TS)
    r = sigma / alpha
    for i in range(len(TS) - 1):
        x0, now = direction(x, TS[i], 3.0, -0.6, 0.4, 0.7, m)
        y, eps = x / alpha[i], (x - alpha[i] * x0) / sigma[i]
        ahead = alpha[i + 1] * (y + (r[i + 1] - r[i]) * eps)
        x0, _ = direction(ahead, TS[i + 1], 3.0, -0.6, 0.4, 0.7, m)
        eps = (eps + (ahead - alpha[i + 1] * x0) / sigma[i + 1]) / 2
        x, m = alpha[i + 1] * (y + (r[i + 1] - r[i]) * eps), now
    close(got, x, 1e-11)


def limit(w, beta):
    return apg(C, U, 1 + (w - 1) / (1 - beta), sde=SDE, eta=0.4, threshold=(1 - beta) * 0.7)


@pytest.mark.parametrize("beta", [-0.75, 0.8])
def test_standing_still_is_another_weight(beta):
    """d + beta d + beta^2 d + ... = d/(1 - beta): `apg` of another weight and threshold."""
    s, memory = apg_momentum(C, U, 2.5, sde=SDE, beta=beta, eta=0.4, threshold=0.7)
    s(X, number(0.4))
    for i in range(140):
        memory(i, number(0.3), X)
        s(X, number(0.3))
    close(s(X, number(0.3)), limit(2.5, beta)(X, number(0.3)))


def test_many_steps_are_another_weight():
    """So a run of N steps comes to that of this weight, as 1/N."""
    errors = []
    for n in (64, 128, 256):
        ts = grids.log_snr(SDE, n)
        s, memory = apg_momentum(C, U, 2.5, sde=SDE, beta=-0.75, eta=0.4, threshold=0.7)
        errors.append(float((ddim(s, SDE, X, ts, on_step=memory) - ddim(limit(2.5, -0.75), SDE, X, ts)).abs().max()))
    assert abs(math.log2(errors[1] / errors[2]) - 1) < 0.1, errors
    assert errors[0] > errors[1] > errors[2] > 1e-4


def test_alone_as_in_a_batch():
    """With any sampler that has hooks and takes time-dependent scores, bits of a float64 rounding apart."""
    for name in ("ddim", "heun", "ancestral", "euler_maruyama"):
        whole = run(SAMPLERS[name], X, range(len(X)))
        for k in range(len(X)):
            close(run(SAMPLERS[name], X[k : k + 1], range(k, k + 1)), whole[k : k + 1])


def run(sampler, x, rows):
    s, memory = apg_momentum(C, U, 3.0, sde=SDE, beta=-0.6, interval=(0.1, 3.0), **HOW)
    return sampler(s, SDE, x, TS, noise=Streams(5, rows), on_step=memory)


def test_rows_at_unlike_times():
    """t (B,): a row outside the interval neither moves nor remembers, as it would alone."""
    t = torch.stack([TS[2], TS[2], TS[5], TS[5]])
    r = torch.exp(-SDE.lam(TS))
    how = {"sde": SDE, "beta": -0.6, "interval": (float(r[3]), math.inf)}
    s, memory = apg_momentum(C, U, 3.0, **how)
    got = s(X, t)
    close(got[:2], apg(C, U, 3.0, sde=SDE)(X[:2], t[:2]))
    close(got[2:], C(X[2:], t[2:]))
    memory(0, TS[5], X)
    t1 = torch.full_like(t, float(TS[3]))
    both = s(X, t1)
    for k in (0, 3):
        s, memory = apg_momentum(C, U, 3.0, **how)
        close(s(X[k : k + 1], t[k : k + 1]), (apg(C, U, 3.0, sde=SDE) if k == 0 else C)(X[k : k + 1], t[k : k + 1]))
        memory(0, TS[5], X[k : k + 1])
        close(s(X[k : k + 1], t1[k : k + 1]), both[k : k + 1])


def test_where_memory_begins_and_ends():
    s, memory = apg_momentum(C, U, 3.0, sde=SDE, beta=-0.6, interval=(0.1, 3.0))
    t, low = number(0.3), number(0.01)  # sigma/alpha 1.3 and 0.1 less a little
    plain = apg(C, U, 3.0, sde=SDE)
    first = s(X, t)
    close(first, plain(X, t))
    memory(0, number(0.2), X)
    assert (s(X, number(0.2)) - plain(X, number(0.2))).abs().max() > 0.01  # remembers
    assert (s(X, t) - plain(X, t)).abs().max() > 0.01  # a later call of the step, wherever it is
    memory(1, low, X)
    close(s(X, low), C(X, low), 1e-300)  # outside: the conditional score, and nothing is remembered
    memory(2, number(0.2), X)
    close(s(X, number(0.2)), plain(X, number(0.2)))
    memory(3, number(0.15), X)
    close(s(X, t), plain(X, t))  # back at the first noise: no memory


def test_one_run_after_the_other():
    s, memory = apg_momentum(C, U, 3.0, sde=SDE, beta=-0.6)
    first = ddim(s, SDE, X, TS, on_step=memory)
    assert torch.equal(ddim(s, SDE, X, TS, on_step=memory), first)
    with pytest.raises(ValueError, match="the memory is of another run"):
        ddim(s, SDE, X, TS[1:], on_step=memory)


def test_time_travel_to_the_start():
    """Each first step, travelled or not, starts without memory; the hook inside the travel sees them all."""
    s, memory = apg_momentum(C, U, 3.0, sde=SDE, beta=-0.6)
    ts = TS[:3]
    there = hooks.travel(ddim, s, SDE, ts, 1, jump=2, noise=torch.zeros_like, on_step=memory)
    got = ddim(s, SDE, X, ts, on_step=there)
    middle = once(X, ts)
    close(got, once(middle * float(SDE.alpha(ts[0]) / SDE.alpha(ts[2])), ts))


def once(x, ts):
    s, memory = apg_momentum(C, U, 3.0, sde=SDE, beta=-0.6)
    return ddim(s, SDE, x, ts, on_step=memory)


class Net(torch.nn.Module):
    rows = ()

    def forward(self, x, t, y):
        self.rows = (*self.rows, len(x))
        return torch.tanh(x) * (1 + y[:, None, None].to(x))


def test_calls():
    """One network call, of 2 B rows inside the interval and B outside; off: the conditional score itself."""
    net = Net()
    model = Model(net, SDE, "eps", classes=3)
    r = torch.exp(-SDE.lam(TS))
    s, memory = apg_momentum(
        model.given(1), model, 3.0, sde=SDE, beta=-0.6, interval=(float(r[4]) * 0.99, float(r[2]) * 1.01)
    )
    ddim(s, SDE, X, TS, on_step=memory)
    assert net.rows == tuple(len(X) * (2 if 2 <= i <= 4 else 1) for i in range(len(TS) - 1))
    s, memory = apg_momentum(C, U, 1, sde=SDE, beta=-0.6)
    assert s is C
    assert memory(0, TS[1], X) is None


def test_what_cannot_be_is_told():
    for beta in (1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"beta must lie in \(-1, 1\)"):
            apg_momentum(C, U, 2.0, sde=SDE, beta=beta)
    with pytest.raises(ValueError, match="threshold must be positive"):
        apg_momentum(C, U, 2.0, sde=SDE, beta=-0.5, threshold=0.0)
    s, memory = apg_momentum(C, U, 2.0, sde=SDE, beta=-0.5)
    with pytest.raises(ValueError, match="did not call the score that apg_momentum returned"):
        ddim(C, SDE, X, TS, on_step=memory)
    s(X, TS[0])
    memory(0, TS[1], X)
    with pytest.raises(ValueError, match=r"called on \(2, 2, 3\), the memory is of \(4, 2, 3\)"):
        s(X[:2], TS[1])

"""The contract of every public sampler: to be exported in `samplers.SAMPLERS` is to be tested here.

Orders and network calls are read from the docstring ("order 2", "2N network calls"), so what is
documented is what is tested; a sampler whose docstring has no number states it in a table below.
"""

import math
import re
import threading

import pytest
import torch
from torch.utils._pytree import tree_map
from truth import (
    F64,
    KINDS,
    SD,
    SDES,
    Draws,
    gaussian_map,
    gaussian_score,
    log_snr_grid,
    marginal,
    moments,
    network,
    order,
    tensor,
    warped_grid,
)

from samplers import SAMPLERS
from scoresde import EDM, VP, Model, Streams, counted

KNOBS = {
    "ode": {"method": "rk4"},  # torchdiffeq's adaptive methods share a step between samples
    "gotta_go_fast": {"rtol": math.inf},  # whole steps
}
AFFINE = {
    **KNOBS,
    "predictor_corrector": {"n_correct": 0},  # Langevin's own bias is in test_langevin
    "angle": {"order": 2},  # its order in the limit is that of its start, 3; with more values it is reached late
}
ORDER = {"predictor_corrector": 1, "ode": 4}
CALLS = {"predictor_corrector": lambda N: 2 * N, "ode": None, "gotta_go_fast": None}  # the last two adapt
STEPS = {"sa_solver": 1024, "angle": 256, "dpmpp": 512, "pndm": 256}  # where the leading error term leads; else 64
COARSE = {("flow_euler", "VE"): 5}  # Euler in t from sigma = 50 pays for g^2 = 17 sigma^2

M3, V3 = tensor(0.7, -1.0, 0.3), tensor(0.05, 0.5, 2.0)  # three problems at once, so that no error cancels in all
EVERY = pytest.mark.parametrize("name", SAMPLERS)


def documented_order(name):
    found = re.search(r"\border (\d)\b(?! values)", SAMPLERS[name].__doc__, re.IGNORECASE)
    value = ORDER.get(name) or (found and int(found[1]))
    assert value, f"the docstring of {name} states no order; write 'order 2', or add it to ORDER here"
    return value


def documented_calls(name, N):
    if name in CALLS:
        return CALLS[name] and CALLS[name](N)
    found = re.search(r"\b(\d*)N(?: \+ (\d+))? network\s+calls", SAMPLERS[name].__doc__)
    assert found, f"the docstring of {name} states no network calls; write '2N network calls', or add it to CALLS"
    return int(found[1] or 1) * N + int(found[2] or 0)


def run(name, score, sde, x, ts, **more):
    return SAMPLERS[name](score, sde, x, ts, **{**KNOBS.get(name, {}), **more})


def error(name, sde, ts, score=None, mean=M3, var=V3):
    """Distance of the exact final mean and variance from the truth, in standard deviations."""
    m, v = moments(SAMPLERS[name], sde, ts, mean, var, score, **AFFINE.get(name, {}))
    m1, v1 = marginal(sde, ts[-1], mean, var)
    return ((m - m1) ** 2 / v1 + (v / v1 - 1) ** 2).sum().sqrt().item()


def start(shape, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@EVERY
@pytest.mark.parametrize("sde", ["VP", "SubVP", "VE"])
def test_order(name, sde):
    first = STEPS.get(name, 64)
    errors = [error(name, SDES[sde], warped_grid(SDES[sde], n)) for n in (first, 2 * first)]
    assert order(errors)[0] == pytest.approx(documented_order(name), abs=0.15), errors


@EVERY
@pytest.mark.parametrize("sde", SDES)
def test_every_sde_and_prediction(name, sde):
    """Over the whole range, 64 steps uniform in lam: error < 1.3 h^order, the same for every kind of network."""
    process, p = SDES[sde], documented_order(name)
    ts = log_snr_grid(process, 64)
    h = float(process.lam(ts[-1]) - process.lam(ts[0])) / 64
    assert error(name, process, ts) < COARSE.get((name, sde), 1.3) * 3**0.5 * h ** min(p, 2)
    x = marginal(process, ts[0])[1] ** 0.5 * start((3, 4))
    ts = log_snr_grid(process, 6)
    want = run(name, gaussian_score(process), process, x, ts, noise=Streams(0, 3))
    for kind in KINDS:
        model = Model(network(kind, process), process, kind, label=lambda t: t, sigma_data=SD)
        got = run(name, model, process, x, ts, noise=Streams(0, 3))
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7, msg=lambda m, kind=kind: f"{kind}: {m}")


@EVERY
def test_deterministic_ones_follow_the_flow(name):
    """Without noise drawn, the map itself, not only the moments, is the flow's."""
    draws, sde = Draws(lambda i, x: torch.zeros_like(x)), VP()
    errors = []
    first = STEPS.get(name, 64)
    for n in (first, 2 * first):
        ts = warped_grid(sde, n)
        x = tensor([[-2.0], [0.1], [3.0]])
        out = run(name, gaussian_score(sde), sde, x, ts, noise=draws, **AFFINE.get(name, {}))
        errors.append((out - gaussian_map(sde, x, ts[0], ts[-1])).abs().max().item())
    if draws.n == 0:
        assert errors[1] < 0.02
        assert order(errors)[0] == pytest.approx(documented_order(name), abs=0.15)


@EVERY
def test_shapes(name):
    """Any rank is the same run as the flattened one."""
    sde, D = VP(), 48
    ts = log_snr_grid(sde, 5)
    x = start((3, D))
    want = run(name, gaussian_score(sde), sde, x, ts, noise=Streams(0, 3))
    for shape in ((3, 16), (3, 4, 4), (2, 3, 2, 4)):
        got = run(name, gaussian_score(sde), sde, x.reshape(3, *shape), ts, noise=Streams(0, 3))
        assert got.shape == (3, *shape)
        torch.testing.assert_close(got.flatten(1), want, rtol=1e-12, atol=1e-12)


@EVERY
def test_float32(name):
    """Keeps its dtype and agrees with float64."""
    sde = VP()
    ts, x, z = log_snr_grid(sde, 20), start((4, 6)), start((4, 6))
    want = run(name, gaussian_score(sde), sde, x, ts, noise=lambda x: z.to(x))
    got = run(name, gaussian_score(sde), sde, x.float(), ts, noise=lambda x: z.to(x))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)


@EVERY
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("D", [5, 48, 64])
def test_a_sample_alone_is_the_same_as_in_a_batch(name, dtype, D):
    """To the bit, whatever the seed's neighbours, with one stream per sample."""
    sde, x = VP(), start((6, D), dtype)
    ts = log_snr_grid(sde, 8)
    whole = run(name, gaussian_score(sde), sde, x, ts, noise=Streams(7, 6))
    for first, last in ((0, 1), (4, 5), (2, 6)):
        part = run(name, gaussian_score(sde), sde, x[first:last], ts, noise=Streams(7, range(first, last)))
        assert torch.equal(part, whole[first:last])


@EVERY
def test_interleaved_runs_are_separate_runs(name):
    """A hook that runs another sampling, and two threads, give the bits of separate runs."""
    a, b, x = VP(), EDM(), start((2, 16))
    ta, tb = log_snr_grid(a, 6), log_snr_grid(b, 6)

    def go(sde, ts, seed, **more):
        return run(name, gaussian_score(sde), sde, x, ts, noise=Streams(seed, 2), **more)

    want_a, want_b = go(a, ta, 1), go(b, tb, 2)
    inner = []
    nested = go(a, ta, 1, on_step=lambda i, t, x: inner.append(go(b, tb, 2)) if i == 2 else None)
    assert torch.equal(nested, want_a)
    assert torch.equal(inner[0], want_b)
    barrier, out = threading.Barrier(2), {}

    def meet(i, t, x):
        barrier.wait(10)

    def thread(key, *args):
        out[key] = go(*args, on_step=meet)

    threads = [threading.Thread(target=thread, args=args) for args in (("a", a, ta, 1), ("b", b, tb, 2))]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    assert torch.equal(out["a"], want_a)
    assert torch.equal(out["b"], want_b)


@EVERY
def test_hooks(name):
    """Called once a step, in order, with (i, ts[i + 1], the state); a returned tensor replaces x."""
    sde = VP()
    ts, x, seen = log_snr_grid(sde, 5), start((2, 3)), []
    score = gaussian_score(sde)
    hooks = [lambda i, t, x: seen.append((i, float(t), x.clone())), lambda i, t, x: x + 1]
    out = run(name, score, sde, x, ts, noise=torch.zeros_like, on_step=hooks)
    assert [(i, t) for i, t, _ in seen] == [(i, float(ts[i + 1])) for i in range(5)]
    torch.testing.assert_close(out, seen[-1][2] + 1, rtol=0, atol=0)
    first = run(name, score, sde, x, ts[:2], noise=torch.zeros_like)
    torch.testing.assert_close(seen[0][2], first, rtol=1e-12, atol=1e-12)
    one = run(name, score, sde, x, ts, noise=torch.zeros_like, on_step=lambda i, t, x: torch.full_like(x, 3.0))
    assert torch.equal(one, torch.full_like(x, 3.0))


@EVERY
@pytest.mark.parametrize("N", [1, 7])
def test_network_calls(name, N):
    sde = VP()
    score, ts = counted(gaussian_score(sde)), log_snr_grid(sde, N)
    SAMPLERS[name](score, sde, start((2, 3)), ts)
    calls = documented_calls(name, N)
    assert calls is None or score.calls == calls
    assert score.samples == 2 * score.calls


@EVERY
def test_gradient(name):
    """grad=True differentiates the whole run (against central differences); the default keeps no graph."""
    sde = VP()
    ts = log_snr_grid(sde, 5)
    mean = torch.zeros(1, dtype=F64, requires_grad=True)
    x = start((1, 3)).requires_grad_()

    def value(x, mean, grad=True):
        def score(x, t):
            s = gaussian_score(sde, 0.0)(x, t)
            return s - 0.1 * torch.tanh(s - mean)  # not affine

        return (run(name, score, sde, x, ts, noise=Streams(1, 1), grad=grad) ** 2).sum()

    got = torch.autograd.grad(value(x, mean), (x, mean))
    h = 1e-6
    for i in range(3):
        e = torch.zeros_like(x).index_fill_(1, torch.tensor([i]), h).detach()
        want = (value(x.detach() + e, mean.detach()) - value(x.detach() - e, mean.detach())) / (2 * h)
        assert got[0][0, i].item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    want = (value(x.detach(), mean.detach() + h) - value(x.detach(), mean.detach() - h)) / (2 * h)
    assert got[1].item() == pytest.approx(want.item(), rel=1e-5, abs=1e-7)
    assert not value(x, mean, grad=False).requires_grad
    with torch.no_grad():  # grad=True does not overrule the caller
        assert not run(name, lambda x, t: mean - x, sde, x, ts, grad=True).requires_grad


@EVERY
def test_arguments_are_left_alone(name):
    """x, ts and the gradient mode come back as they were; times reach the score as float64 numbers."""
    sde = VP()
    x, ts, seen = start((2, 3)), log_snr_grid(sde, 4), []
    x0, ts0 = tree_map(torch.clone, (x, ts))

    def score(x, t):
        seen.append(t)
        return gaussian_score(sde)(x, t)

    run(name, score, sde, x, ts)
    run(name, score, sde, x, ts, on_step=lambda i, t, x: x.zero_())
    assert torch.equal(x, x0)
    assert torch.equal(ts, ts0)
    assert torch.is_grad_enabled()
    assert all(t.ndim == 0 and t.dtype == F64 for t in seen)
    low, high = sde.t_min * (1 - 1e-9), sde.T * (1 + 1e-9)  # ode asks in log(sigma/alpha) and inverts it
    assert all(low <= t <= high for t in seen)

"""The probability flow against the exact map of a Gaussian, with every solver, alone and as the sampler `ode`."""

import math

import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS
from truth import F64, SDES, gaussian_map, gaussian_score, marginal, order, tensor, warped_grid

from samplers import ode
from scoresde import VP, between, counted, decode, encode, flow, gaussian, mixture
from scoresde.flow import ADAPTIVE, EACH, FIXED

M, V = tensor(0.7, -1.0), tensor(0.25, 2.0)
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 4, "implicit_adams": 4}


def at(sde, r):
    """The time at which sigma/alpha = r."""
    return sde.time(-tensor(r).log())


def points(sde, t):
    m, v = marginal(sde, t, M, V)
    return m + v.sqrt() * tensor([[0.0, 1.0], [-1.5, 0.3], [3.0, -2.0]])


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", [EACH, "dopri5"])
def test_gaussian_over_the_whole_range(name, method):
    """Both ways, t_min to T, within the tolerance, for every SDE; and there and back."""
    sde = SDES[name]
    x = points(sde, sde.t_min)
    there = flow(gaussian_score(sde, M, V), sde, x, sde.t_min, sde.T, method=method)
    torch.testing.assert_close(
        there, gaussian_map(sde, x, sde.t_min, sde.T, M, V), rtol=1e-4, atol=1e-4 * sde.prior_std
    )
    back = flow(gaussian_score(sde, M, V), sde, there, sde.T, sde.t_min, method=method)
    torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE"])
def test_full_covariance(name):
    """The flow of N(m, C) acts on the eigenvectors of C one by one."""
    sde, C = SDES[name], tensor([[1.0, 0.6], [0.6, 0.5]])
    t, t1 = at(sde, 0.1), at(sde, 10.0)
    w, U = torch.linalg.eigh(C)
    x = points(sde, t)
    want = gaussian_map(sde, x @ U, t, t1, M @ U, w) @ U.T
    got = flow(gaussian(M, cov=C).score(sde), sde, x, t, t1, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [EACH, *ADAPTIVE])
def test_adaptive_methods_reach_their_tolerance(method):
    sde = VP()
    t, t1 = at(sde, 0.5), at(sde, 5.0)
    x = points(sde, t)
    got = flow(gaussian_score(sde, M, V), sde, x, t, t1, method=method, rtol=1e-6, atol=1e-6)
    tol = 5e-4 if method == "fehlberg2" else 2e-5  # its error estimate is a hundred times too kind
    torch.testing.assert_close(got, gaussian_map(sde, x, t, t1, M, V), rtol=tol, atol=tol)


@pytest.mark.parametrize("method", FIXED)
def test_fixed_methods_have_their_order(method):
    """Uniform steps in log(sigma/alpha).  Adams raises its order as it starts up: order 4 or more on the average."""
    sde = VP()
    t, t1 = at(sde, 5.0), at(sde, 0.5)
    x, errors = points(sde, t), []
    want = gaussian_map(sde, x, t, t1, M, V)
    for steps in (8, 256) if "adams" in method else (16, 32):
        got = flow(gaussian_score(sde, M, V), sde, x, t, t1, method=method, steps=steps)
        errors.append((got - want).abs().max().item())
    if "adams" in method:
        assert order(errors)[0] / 5 > 4
    else:
        assert order(errors)[0] == pytest.approx(ORDERS[method], abs=0.2)
    assert errors[1] < 0.05


def test_every_solver_of_torchdiffeq_is_offered():
    """But for scipy_solver (not differentiable), fixed_adams (an alias) and implicit ones that need root finding."""
    left = set(SOLVERS) - set(ADAPTIVE) - set(FIXED)
    assert all(name in ("scipy_solver", "fixed_adams") or "implicit" in name or "sdirk" in name for name in left), left


def test_fixed_methods_make_the_steps_asked_for():
    score = counted(gaussian_score(VP(), M, V))
    flow(score, VP(), points(VP(), 0.5), 0.5, 0.1, method="rk4", steps=7)
    assert score.calls == 28


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8"])
def test_solvers_do_not_step_outside(method):
    """torchdiffeq steps over the end and interpolates back; on VP that would ask for t < 0 and give NaN."""
    seen = []

    def score(x, t):
        seen.append(float(t))
        return gaussian_score(VP(), M, V)(x, t)

    flow(score, VP(), points(VP(), 1.0), 1.0, 1e-3, method=method)
    assert min(seen) >= 1e-3 * (1 - 1e-9)
    assert max(seen) <= 1 + 1e-9


def test_a_sample_does_not_see_its_batch_mates():
    """The default takes each sample's own steps; torchdiffeq's share one, so agree to the tolerance only."""
    target, sde = mixture(tensor(0.3, 0.7), tensor([[-2.0, 0], [1, 1]]), var=tensor(0.01, 0.3)), VP()
    score, x = target.score(sde), tensor([[0.2, 0.1], [-2.0, 0.05], [40.0, -30.0]])
    whole = flow(score, sde, x, 1e-3, 1.0)
    alone = torch.cat([flow(score, sde, x[i : i + 1], 1e-3, 1.0) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-12)
    whole = flow(score, sde, x, 1e-3, 1.0, method="dopri5")
    torch.testing.assert_close(whole, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [EACH, "dopri5", "bosh3"])
def test_batch_mates_do_not_hide_an_error(method):
    """One hard sample among 4000 that stand still: a mean over the batch would let it be 60 times worse."""
    sde, B = VP(), 4000
    mean, var = torch.zeros(B, 1, dtype=F64), torch.ones(B, 1, dtype=F64)
    mean[0], var[0] = 1.0, 0.01
    x = mean + 0.2
    want = gaussian_map(sde, x[:1], 0.01, 1.0, 1.0, 0.01)
    out = flow(gaussian_score(sde, mean, var), sde, x, 0.01, 1.0, method=method)
    alone = flow(gaussian_score(sde, 1.0, 0.01), sde, x[:1], 0.01, 1.0, method=method)
    assert (out[0] - want).abs() < 2 * (alone - want).abs() + 1e-9


def test_any_rank_and_float32():
    sde, x = VP(), torch.linspace(-2, 2, 48, dtype=F64).reshape(2, 24)
    want = flow(gaussian_score(sde), sde, x, 0.01, 1.0)
    for shape in ((2, 4, 6), (2, 2, 3, 4), (2, 1, 2, 3, 4)):
        got = flow(gaussian_score(sde), sde, x.reshape(shape), 0.01, 1.0)
        torch.testing.assert_close(got.reshape(2, 24), want, rtol=1e-10, atol=1e-10)
    for method in (EACH, "dopri5", "rk4"):
        got = flow(gaussian_score(sde), sde, x.float(), 0.01, 1.0, method=method)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["rk4", "dopri5", EACH])
def test_gradient_of_the_map(method):
    """d x1/dx of a Gaussian's flow is sqrt(V1/V)."""
    sde, x = VP(), tensor([[0.3, -1.0]]).requires_grad_()
    out = flow(gaussian_score(sde, M, V), sde, x, 0.1, 0.8, method=method, rtol=1e-6, atol=1e-6)
    grad = torch.autograd.grad(out.sum(), x)[0][0]
    want = (marginal(sde, 0.8, M, V)[1] / marginal(sde, 0.1, M, V)[1]).sqrt()
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


def test_standard_normal_stands_still():
    """N(0, I) data under VP do not move, and the flow from t to t is the identity."""
    x = tensor([[1.5, -0.2]])
    score = gaussian_score(VP(), 0.0, 1.0)
    torch.testing.assert_close(flow(score, VP(), x, 1e-3, 1.0), x, rtol=1e-12, atol=0)
    assert torch.equal(flow(score, VP(), x, 0.5, 0.5), x)
    assert math.isfinite(flow(score, VP(), x, 1.0, 1e-5).sum())


@pytest.mark.parametrize(("method", "p"), [("euler", 1), ("midpoint", 2), ("heun3", 3), ("rk4", 4)])
def test_ode_order(method, p):
    sde, x = VP(), tensor([[-1.0, 2.0]])
    errors = []
    for n in (16, 32):
        ts = warped_grid(sde, n)
        out = ode(gaussian_score(sde), sde, x, ts, method=method)
        errors.append((out - gaussian_map(sde, x, ts[0], ts[-1])).abs().max().item())
    assert order(errors)[0] == pytest.approx(p, abs=0.2)


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "each"])
def test_ode_adaptive(name, method):
    """Over the whole range on a two-point grid, within the tolerance."""
    sde = SDES[name]
    ts = tensor(sde.T, sde.t_min)
    m, v = marginal(sde, sde.T)
    x = m + v.sqrt() * tensor([[-1.0, 2.0], [0.1, 0.0]])
    out = ode(gaussian_score(sde), sde, x, ts, method=method, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(out, gaussian_map(sde, x, *ts), rtol=2e-6, atol=2e-6)


def test_there_and_back_is_measured():
    """`encode` tells the error of its round trip: the true one, falling with the tolerance."""
    sde, target = VP(), gaussian(tensor([0.4, -1.0]), cov=tensor([[1.0, 0.5], [0.5, 0.6]]))
    x, errors = target.sample(6), []
    for tol in (1e-3, 1e-5, 1e-7):
        z, error = encode(target.score(sde), sde, x, t=0.01, rtol=tol, atol=tol)
        back = decode(target.score(sde), sde, z, t=0.01, rtol=tol, atol=tol)
        torch.testing.assert_close(error, (back - x).square().mean(1).sqrt())
        errors.append(float(error.max()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[1] < 1e-4


def test_between_latents():
    """A great circle: equal angles for equal parts, lengths linear, ends kept; a pair that points apart is refused."""
    z, z1 = tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 2.0]]), tensor([[0.0, 1.0, 0.0], [2.0, 4.0, 4.0]])
    for w, end in ((0.0, z), (1.0, z1)):
        torch.testing.assert_close(between(z, z1, w), end)
    third = between(z, z1, 1 / 3)
    length = 3 * 2 / 3 + 1 / 3
    want = tensor([length * math.cos(math.pi / 6), length * math.sin(math.pi / 6), 0.0])
    torch.testing.assert_close(third[0], want)
    torch.testing.assert_close(third[1], z[1] * 4 / 3)  # the same direction
    torch.testing.assert_close(
        between(z.reshape(2, 1, 3), z1.reshape(2, 1, 3), tensor([1 / 3, 1.0]))[:, 0], torch.stack([third[0], z1[1]])
    )
    with pytest.raises(ValueError, match="opposite directions"):
        between(z, -z, 0.5)

"""Decoupled annealing where every draw is affine: moments by impulses against Gaussian conditioning."""

import math

import pytest
import torch
from truth import F64, Draws, gaussian_map, gaussian_score, moments, tensor

from guidance.daps import daps
from guidance.operators import linear
from samplers import ancestral, ddim, grids
from scoresde import EDM, VP, counted

SD, POINT, GAIN, Y = 0.3, 0.8, 1.5, tensor([0.6])
A = linear(lambda x: GAIN * x, (1,))
TS = grids.karras(VP(), 3, t_end=0.01)


def last_step(spread):
    """Mean and variance of x1 for data at one point: N(point, spread^2 r^2) N(y; gain x0, noise^2), then noise."""
    sde = VP()
    r2 = spread**2 * float((sde.sigma(TS[-2]) / sde.alpha(TS[-2])) ** 2)
    V = 1 / (1 / r2 + GAIN**2 / SD**2)
    m = V * (POINT / r2 + GAIN * float(Y) / SD**2)
    a, s = float(sde.alpha(TS[-1])), float(sde.sigma(TS[-1]))
    return a * m, a * a * V + s * s


def run(score, A=A, sampler=ddim, **how):
    """Exact moments of a run with noise in the hook only; the last draw of x0 forgets the steps before it."""

    def whole(_, sde, x, ts, *, noise):
        s, hook = daps(score, sde, A, Y, SD, noise=noise, **how)
        return sampler(s, sde, x, ts, on_step=hook)

    return moments(whole, VP(), TS, POINT, 0.0)


@pytest.mark.parametrize("spread", [1.0, 0.4])
@pytest.mark.parametrize("ode_steps", [1, 4])
def test_a_linear_operator_is_conditioned_on_exactly(spread, ode_steps):
    m, v = run(gaussian_score(VP(), POINT, 0.0), spread=spread, ode_steps=ode_steps)
    exact = last_step(spread)
    assert abs(m.item() - exact[0]) < 1e-9
    assert abs(v.item() - exact[1]) < 1e-9


@pytest.mark.parametrize("step", [0.05, 0.3])
def test_langevin_for_any_operator(step):
    """n steps of size e on a Gaussian of precision P: the mean to (1 - e P)^n, the variance e sum (1 - e P)^2k."""
    sde, n = VP(), 200
    r2 = float((sde.sigma(TS[-2]) / sde.alpha(TS[-2])) ** 2)
    P, e = 1 / r2 + GAIN**2 / SD**2, step / (1 / r2 + 1 / SD**2)
    q = 1 - e * P
    V = 2 * e * (1 - q ** (2 * n)) / (1 - q**2)
    m = (POINT / r2 + GAIN * float(Y) / SD**2) / P
    m = m + q**n * (POINT - m)
    a, s = float(sde.alpha(TS[-1])), float(sde.sigma(TS[-1]))
    got = run(gaussian_score(VP(), POINT, 0.0), lambda x: GAIN * x, langevin_steps=n, step=step)
    assert abs(got[0].item() - a * m) < 1e-9
    assert abs(got[1].item() - (a * a * V + s * s)) < 1e-9
    exact = last_step(1.0)
    assert abs(got[0].item() - exact[0]) < 1e-6
    assert abs(got[1].item() / exact[1] - 1) < step * GAIN**2  # towards the exact draw as the step goes to 0


def test_langevin_follows_a_curved_operator():
    """y = x0^3: the average of many x0 against its density on a grid."""
    sde, y, sd, n = EDM(), tensor([0.5]), 0.2, 20_000
    ts = tensor(0.5, 0.01)
    torch.manual_seed(0)
    s, hook = daps(gaussian_score(sde, 0.6, 0.0), sde, lambda x: x**3, y, sd, step=0.05, langevin_steps=300)
    out = ddim(s, sde, torch.zeros(n, 1, dtype=F64), ts, on_step=hook)
    grid = torch.linspace(-2, 3, 4001, dtype=F64)
    p = torch.exp(-0.5 * ((grid - 0.6) / 0.5) ** 2 - 0.5 * ((y - grid**3) / sd) ** 2)
    mean = (p * grid).sum() / p.sum()
    var = (p * (grid - mean) ** 2).sum() / p.sum() + 0.01**2
    assert abs(out.mean() - mean) < 4 * math.sqrt(var / n) + 0.01
    assert abs(out.var() / var - 1) < 0.06


def test_the_estimate_is_the_end_of_the_flow():
    """Order 1 in its steps; and the sampler sees its score."""
    sde, t = VP(), tensor(0.5)
    x = tensor([[0.3], [-1.2]])
    score, errors = gaussian_score(sde, 0.5, 0.1), []
    end = gaussian_map(sde, x, t, tensor(sde.t_min), 0.5, 0.1) / sde.alpha(tensor(sde.t_min))
    for n in (200, 400):
        asked = counted(score)
        s, _ = daps(asked, sde, A, Y, SD, ode_steps=n)
        x0 = (x + sde.sigma(t) ** 2 * s(x, t)) / sde.alpha(t)
        assert asked.calls == n
        errors.append(float((x0 - end).abs().max()))
    seen = []
    daps(lambda x, t: seen.append(sde.lam(t)) or score(x, t), sde, A, Y, SD, ode_steps=4)[0](x, t)
    ends = sde.lam(tensor(t, sde.t_min))
    torch.testing.assert_close(torch.stack(seen), torch.linspace(*ends.tolist(), 5, dtype=F64)[:-1])
    assert errors[1] < 0.01
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_the_samplers_own_step_is_thrown_away():
    noises = torch.randn(64, 5, 1, generator=torch.Generator().manual_seed(0), dtype=F64)
    outs = []
    for sampler in (ddim, ancestral):
        s, hook = daps(gaussian_score(VP(), 0.5, 0.1), VP(), A, Y, SD, noise=Draws(lambda i, x: noises[i]))
        outs.append(sampler(s, VP(), torch.ones(5, 1, dtype=F64), TS, on_step=hook))
    assert torch.equal(*outs)


def test_errors():
    score, sde = gaussian_score(VP()), VP()
    with pytest.raises(ValueError, match="noise_sd must be positive"):
        daps(score, sde, A, Y, 0.0)
    with pytest.raises(ValueError, match="noise_sd = inf measures nothing"):
        daps(score, sde, A, Y, float("inf"))
    with pytest.raises(ValueError, match="at least 1, got 0 and 100"):
        daps(score, sde, A, Y, SD, ode_steps=0)
    with pytest.raises(ValueError, match=r"step lie in \(0, 2\), got 1.0 and 2.0"):
        daps(score, sde, A, Y, SD, step=2.0)
    with pytest.raises(ValueError, match="did not call the score that daps returned"):
        ddim(score, sde, torch.ones(2, 1, dtype=F64), TS, on_step=daps(score, sde, A, Y, SD)[1])

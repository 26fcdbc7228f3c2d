"""`preconditioned`: exact for Gaussian data of any covariance, `angle` where that is d^2 I, and of order 3."""

import math

import pytest
import torch
from truth import F64, log_snr_grid

from samplers import SAMPLERS, angle, grids, preconditioned
from scoresde import EDM, VE, VP, counted, flow, gaussian, mixture


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(D, seed=1):
    A = normal(D, D, seed=seed)
    return A @ A.T / D + 0.01 * torch.eye(D, dtype=F64)


@pytest.mark.parametrize("sde", [VP(), VE(), EDM()])
@pytest.mark.parametrize("N", [1, 2, 7])
def test_gaussian_data_are_exact(sde, N):
    """x1 = alpha1 m + U sqrt((alpha1^2 c + sigma1^2)/(alpha^2 c + sigma^2)) U'(x - alpha m), in any number of steps."""
    m, C = normal(2, 3), covariance(6)
    c, U = torch.linalg.eigh(C)
    ts = log_snr_grid(sde, N)
    x = sde.prior_std * normal(4, 2, 3, seed=2)
    out = preconditioned(gaussian(m, cov=C).score(sde), sde, x, ts, mean=m, eig=c, basis=U)
    a, s, a1, s1 = sde.alpha(ts[0]), sde.sigma(ts[0]), sde.alpha(ts[-1]), sde.sigma(ts[-1])
    shrink = U @ torch.diag(torch.sqrt((a1**2 * c + s1**2) / (a**2 * c + s**2))) @ U.T
    want = a1 * m + ((x - a * m).flatten(1) @ shrink).reshape(x.shape)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)


def test_one_variance_is_angle():
    """With mean 0 and covariance d^2 I the two are the same method."""
    sde = VP()
    target = mixture(torch.ones(3), normal(3, 2), var=torch.tensor([0.1, 0.3, 0.02]))
    x, ts = normal(5, 2, seed=3), grids.data_scale(sde, 9, d=0.7)
    args = {"mean": torch.zeros(2, dtype=F64), "eig": torch.full((2,), 0.49, dtype=F64)}
    for order in (1, 2, 3):
        want = angle(target.score(sde), sde, x, ts, d=0.7, order=order)
        got = preconditioned(target.score(sde), sde, x, ts, **args, order=order)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_order_and_calls_on_a_mixture():
    """Order 3 against the exact flow; the default takes 1 where steps are few; one call a step."""
    sde, D = VP(), 3
    target = mixture(torch.ones(2), 0.7 * normal(2, D), covs=torch.stack([0.2 * covariance(D, k) for k in (4, 5)]))
    C = covariance(D, 6)
    c, U = torch.linalg.eigh(C)
    x, score = normal(16, D, seed=7), counted(target.score(sde))

    def run(n, **more):
        ts = grids.data_scale(sde, n, d=0.6)
        return preconditioned(score, sde, x, ts, mean=torch.zeros(D), eig=c, basis=U, **more)

    exact = flow(target.score(sde), sde, x, sde.T, float(grids.data_scale(sde, 1)[-1]), rtol=1e-11, atol=1e-11)
    score.calls = 0
    errors = [(run(n, order=2) - exact).square().mean().sqrt().item() for n in (200, 400)]
    assert score.calls == 600
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.15)
    assert torch.equal(run(5), run(5, order=1))
    assert torch.equal(run(9), run(9, order=2))


def test_bad_input():
    sde, x, ts = VP(), normal(2, 3), log_snr_grid(VP(), 4)
    score = gaussian(torch.zeros(3), var=1.0).score(sde)
    with pytest.raises(ValueError, match=r"mean must be of that shape, eig \(3,\)"):
        preconditioned(score, sde, x, ts, mean=torch.zeros(2), eig=torch.ones(3))
    with pytest.raises(ValueError, match="eigenvalues must be positive, got 0"):
        preconditioned(score, sde, x, ts, mean=torch.zeros(3), eig=torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="order must be at least 1, got 0"):
        preconditioned(score, sde, x, ts, mean=torch.zeros(3), eig=torch.ones(3), order=0)
    assert "preconditioned" not in SAMPLERS  # needs the data's covariance

"""Rules that move the estimate to the measurement: least squares, and the published steps coordinate by coordinate."""

import math
from functools import partial

import pytest
import torch
from guided import D64, SDE, T, close
from measured import GRID, MIXED, OPERATORS, SHAPE, X, draw, every_operator, matrix, measurement
from reference import recorded

from guidance import operators as ops
from guidance.nullspace import ddnm, ddnm_plus, ddrm, diffpir
from samplers import ddim, kernels
from samplers.loop import one_step
from scoresde import denoised


@every_operator
def test_ddnm_meets_the_measurement_and_leaves_the_rest(A):
    y = A(draw(1, *SHAPE, seed=10))[0]
    x0, moved = denoised(MIXED(X, T), X, T, SDE), denoised(ddnm(MIXED, SDE, A, y)(X, T), X, T, SDE)
    close(A(moved), y.expand(A(moved).shape), 1e-11)
    null = torch.eye(6, dtype=D64) - torch.linalg.pinv(matrix(A)) @ matrix(A)
    close((moved - x0).flatten(1) @ null, torch.zeros(5, 6, dtype=D64), 1e-9)


@every_operator
def test_diffpir_is_a_least_squares_fit(A):
    """x0' minimises |y - A z|^2/noise_sd^2 + (trust/r^2) |z - x0|^2; without noise it is ddnm."""
    y, M = measurement(A), matrix(A)
    x0, r2 = denoised(MIXED(X, T), X, T, SDE).flatten(1), (SDE.sigma(T) / SDE.alpha(T)) ** 2
    tall = torch.cat([M / 0.1, torch.eye(6, dtype=D64) * (2.5 / r2).sqrt()])
    want = torch.linalg.lstsq(
        tall, torch.cat([y.flatten().expand(5, -1) / 0.1, x0 * (2.5 / r2).sqrt()], 1).T
    ).solution.T
    close(denoised(diffpir(MIXED, SDE, A, y, 0.1, trust=2.5)(X, T), X, T, SDE).flatten(1), want, 1e-9)
    close(diffpir(MIXED, SDE, A, y, 0.0)(X, T), ddnm(MIXED, SDE, A, y)(X, T))


def test_diffpir_published_steps():
    """The paper's re-noising is ddim's table with an eta for each step."""
    A, ts, zeta, z = (
        OPERATORS["downsample"],
        torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=D64),
        0.4,
        draw(3, *X.shape, seed=11),
    )
    y, x = measurement(A), X
    score = diffpir(MIXED, SDE, A, y, 0.1, trust=7.0)
    a, s = SDE.alpha(ts), SDE.sigma(ts)
    for i in range(3):
        x0 = denoised(score(x, ts[i]), x, ts[i], SDE)
        eps = (x - a[i] * x0) / s[i]
        x = a[i + 1] * x0 + s[i + 1] * (math.sqrt(1 - zeta) * eps + math.sqrt(zeta) * z[i])
    eta = math.sqrt(zeta) * s[:-1] / kernels.forward_kernel(SDE, ts)[1].sqrt()
    close(one_step(score, SDE, X, ts, partial(kernels.ddim, eta=eta), noise=recorded(z)), x, 1e-11)


LOW = ops.linear(lambda x: torch.stack([x[:, 0, 0] + x[:, 0, 1], 2 * x[:, 1, 2], 0.1 * x[:, 0, 2]], 1), SHAPE)
SEEN = {"mask": OPERATORS["mask"], "dense": OPERATORS["dense, known"], "unequal": ops.spectral(LOW)}


def in_svd(A, step, y, x, z):
    """A chain with step(i, s, y', x, x0, z) in the coordinates of A's right singular vectors; s = 0: A is blind."""
    U, S, Vh = torch.linalg.svd(matrix(A))
    s = torch.cat([S, torch.zeros(6 - len(S), dtype=D64)])
    seen = torch.cat([y.flatten() @ U / S, torch.zeros(6 - len(S), dtype=D64)])
    for i in range(len(GRID) - 1):
        x0 = denoised(MIXED(x, GRID[i]), x, GRID[i], SDE)
        rows = [step(i, s, seen, *(q.flatten(1) @ Vh.T for q in (x, x0, z[i])))]
        x = (rows[0] @ Vh).reshape(x.shape)
    return x


@pytest.mark.parametrize("A", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize(
    ("noise_sd", "eta", "eta_b"), [(0.1, 0.85, 1.0), (0.4, 0.6, 0.7), (0.0, 1.0, 1.0), (0.3, 0.0, 0.9)]
)
def test_ddrm(A, noise_sd, eta, eta_b):
    """The paper's step, coordinate by coordinate, for x/alpha."""
    a, r = SDE.alpha(GRID), SDE.sigma(GRID) / SDE.alpha(GRID)
    branches = set()

    def step(i, s, seen, x, x0, z):
        out, r1 = torch.empty_like(x), float(r[i + 1])
        for j in range(6):
            e = x0[:, j]
            if s[j] == 0:
                branches.add("blind")
                v = e + math.sqrt(1 - eta**2) * r1 * (x[:, j] / a[i] - e) / r[i] + eta * r1 * z[:, j]
            elif r1 < noise_sd / s[j]:
                branches.add("quiet")
                v = e + math.sqrt(1 - eta**2) * r1 * (seen[j] - e) / (noise_sd / s[j]) + eta * r1 * z[:, j]
            else:
                branches.add("loud")
                v = (1 - eta_b) * e + eta_b * seen[j] + (r1**2 - (noise_sd / s[j]) ** 2 * eta_b**2).sqrt() * z[:, j]
            out[:, j] = a[i + 1] * v
        return out

    y, z = measurement(A, noise_sd), draw(5, *X.shape, seed=12)
    want = in_svd(A, step, y, X, z)
    score, hook = ddrm(MIXED, SDE, A, y, noise_sd, GRID, eta=eta, eta_b=eta_b, noise=recorded(z))
    close(ddim(score, SDE, X, GRID, on_step=hook), want, 1e-10)
    assert branches == ({"blind", "loud"} if noise_sd == 0 else {"blind", "loud", "quiet"})


@pytest.mark.parametrize("A", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize(("noise_sd", "eta"), [(0.1, 1.0), (0.5, 0.8), (0.0, 1.0)])
def test_ddnm_plus(A, noise_sd, eta):
    """DDIM's step from x0' with the paper's share of A+ y and what is left of the noise, coordinate by coordinate."""
    a, sd = SDE.alpha(GRID), SDE.sigma(GRID)
    shares = []

    def step(i, s, seen, x, x0, z):
        beta = 1 - (a[i] / a[i + 1]) ** 2  # of the discrete chain
        tau = eta * sd[i + 1] / sd[i] * beta.sqrt()
        d = (sd[i + 1] ** 2 - tau**2).sqrt() / sd[i]
        c = a[i + 1] - a[i] * d
        out = torch.empty_like(x)
        for j in range(6):
            share, left = 0.0, tau**2
            if s[j] > 0:
                share = 1.0 if tau >= c * noise_sd / s[j] else float(tau * s[j] / (c * noise_sd))
                left = (tau**2 - (c * share * noise_sd / s[j]) ** 2).clamp(min=0)
                shares.append(share)
            moved = x0[:, j] + share * (seen[j] - x0[:, j])
            out[:, j] = c * moved + d * x[:, j] + left.sqrt() * z[:, j]
        return out

    y, z = measurement(A, noise_sd), draw(5, *X.shape, seed=13)
    want = in_svd(A, step, y, X, z)
    score, hook = ddnm_plus(MIXED, SDE, A, y, noise_sd, GRID, eta=eta, noise=recorded(z))
    close(
        ddim(score, SDE, X, GRID, on_step=hook), want, 1e-7 if noise_sd else 1e-10
    )  # a share of 1 - 1e-16 is a root of it
    if noise_sd == 0:
        close(want, ddim(ddnm(MIXED, SDE, A, y), SDE, X, GRID, eta=eta, noise=recorded(z)), 1e-10)
    elif noise_sd == 0.5:
        assert min(shares) < 0.9
        assert max(shares) == 1.0


@pytest.mark.parametrize("rule", [ddrm, ddnm_plus])
def test_chains_to_zero(rule):
    """A grid that ends at t = 0: no draw there; without noise the measurement is met."""
    A, ts = OPERATORS["downsample"], torch.cat([GRID, torch.zeros(1, dtype=D64)])
    y, draws = A(draw(1, *SHAPE, seed=10))[0], []
    noise = lambda x: draws.append(1) or draw(*x.shape, seed=len(draws))  # noqa: E731
    score, hook = rule(MIXED, SDE, A, y, 0.0, ts, noise=noise)
    out = ddim(score, SDE, X, ts, on_step=hook)
    assert len(draws) == len(ts) - 2
    close(A(out), y.expand(A(out).shape), 1e-10)

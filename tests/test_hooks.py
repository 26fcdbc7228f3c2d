"""Hooks in a run whose states are known."""

import io
import math
from functools import partial

import pytest
import torch
from truth import F64, Draws, gaussian_map, gaussian_score, log_snr_grid, tensor

from samplers import angle, ddim, hooks
from scoresde import VP, Streams, dataset, gaussian

SDE = VP()
TS = log_snr_grid(SDE, 6)
X = tensor([[0.5, -1.0], [2.0, 0.1]])
POINT = gaussian_score(SDE, 1.3, 0.0)  # DDIM is exact for it at every step


def go(*on_step, score=POINT, x=X):
    return ddim(score, SDE, x, TS, on_step=on_step)


def test_trajectory():
    """Exact states after every (second) step, as copies that later steps and hooks do not change."""
    every, second = [], []
    go(hooks.trajectory(every), hooks.trajectory(second, every=2), lambda i, t, x: None)
    assert (len(every), len(second)) == (6, 3)
    for i, x in enumerate(every):
        torch.testing.assert_close(x, gaussian_map(SDE, X, TS[0], TS[i + 1], 1.3, 0.0), rtol=1e-8, atol=1e-8)
    assert all(torch.equal(a, b) for a, b in zip(second, every[1::2], strict=True))
    kept = []
    go(hooks.trajectory(kept), lambda i, t, x: x.zero_())
    assert all(x.abs().min() > 0 for x in kept[:1])
    weight = torch.ones(1, dtype=F64, requires_grad=True)
    ddim(lambda x, t: weight * POINT(x, t), SDE, X, TS, on_step=hooks.trajectory(kept), grad=True)
    assert not any(x.requires_grad for x in kept)


def test_progress():
    """Counts to n, tells t, and closes itself."""
    out = io.StringIO()
    go(hooks.progress(6, file=out, mininterval=0))
    assert "6/6" in out.getvalue()
    assert "t = 1e-05" in out.getvalue()
    assert out.getvalue().endswith("\n")


def test_finite_names_step_time_and_samples():
    def score(x, t):
        return POINT(x, t) + torch.where(torch.tensor([[False], [True]]) & (t < TS[2] + 1e-12), math.nan, 0.0)

    seen = []
    with pytest.raises(FloatingPointError, match=rf"step 3, at t = {TS[3]:.6g}, in samples \[1\] \(1 of 2\)"):
        go(hooks.finite(), lambda i, t, x: seen.append(i), score=score)
    assert seen == [0, 1]
    go(hooks.finite())


def test_project():
    out = go(hooks.project(lambda x: x.clamp(-0.2, 0.2)))
    assert out.abs().max() <= 0.2
    assert torch.equal(go(hooks.project(lambda x: x)), go())


@pytest.mark.parametrize("D", [2, 64])  # two kernels an update, and one
def test_a_state_put_in_place_is_gone_on_from(D):
    """A hook's tensor and a state changed where it lies, step by step: the map of each step is that of a step alone."""
    x = torch.linspace(-2, 2, 3 * D, dtype=F64).reshape(3, D)

    def changed(i, t, x):
        return x / 2 if i % 3 == 0 else x.mul_(0.7) if i % 3 == 1 else None

    want = x
    for i in range(6):
        want = ddim(POINT, SDE, want, TS[i : i + 2]) * (0.5, 0.7, 1.0)[i % 3]
    torch.testing.assert_close(go(changed, x=x), want, rtol=0, atol=1e-12)


def test_inpaint():
    """Known entries follow alpha known + sigma z, and end at the data; the others are untouched by the hook."""
    known, mask, z = tensor([[9.0, 9.0], [4.0, 4.0]]), torch.tensor([[1, 0], [0, 1]]), torch.full((2, 2), 0.7)
    for i, t in enumerate((0.5, 0.1, 0.0)):
        t = tensor(t)
        out = hooks.inpaint(SDE, known, mask, lambda x: z.to(x))(i, t, X)
        want = (SDE.alpha(t) * known + SDE.sigma(t) * 0.7) * mask + X * (1 - mask)
        torch.testing.assert_close(out, want)
        assert hooks.inpaint(SDE, known, mask)(i, t, X.float()).dtype == torch.float32
    row = hooks.inpaint(SDE, known, torch.tensor([1, 0]), lambda x: z.to(x))(0, tensor(0.0), X)
    torch.testing.assert_close(row, torch.stack([known[:, 0], X[:, 1]], 1))
    exact = torch.cat([TS, torch.zeros(1, dtype=F64)])
    target = gaussian(tensor(0.0, 0.0), var=1.0)  # independent: the unknown half does not care
    noise = Streams(0, 2)
    out = ddim(target.score(SDE), SDE, X, exact, on_step=hooks.inpaint(SDE, known, mask, noise))
    free = ddim(target.score(SDE), SDE, X, exact)
    torch.testing.assert_close(out, torch.where(mask.bool(), known, free))


def test_inpaint_chooses_the_fitting_datum():
    """Of two points, the one that agrees with the known entry is completed."""
    points = tensor([[-2.0, -0.5], [2.0, 0.5]])
    known, mask = tensor([[2.0, 0.0], [-2.0, 0.0]]), torch.tensor([1, 0])
    ts = torch.cat([log_snr_grid(SDE, 60), torch.zeros(1, dtype=F64)])
    hook = hooks.inpaint(SDE, known, mask, Streams(3, 2))
    out = ddim(dataset(points).score(SDE), SDE, X, ts, eta=1.0, noise=Streams(4, 2), on_step=hook)
    torch.testing.assert_close(out, points[[1, 0]], rtol=1e-6, atol=1e-6)


def test_soft_inpainting_keeps_the_noise_of_the_level():
    """x = alpha u + sigma e: a share m of the way to the known entry in the mean, and still the variance sigma^2."""
    m, known, t = tensor(0.0, 0.3, 0.8, 1.0), torch.full((4,), 2.0, dtype=F64), tensor(0.4)
    a, s = SDE.alpha(t), SDE.sigma(t)
    u = tensor([[-1.0, -1.0, -1.0, -1.0]])
    at = lambda e, z: hooks.inpaint(SDE, known, m, lambda x: z + 0 * x)(0, t, a * u + s * e)[0]  # noqa: E731
    mean = at(0.0, 0.0)
    torch.testing.assert_close(mean, a * (m * 2 - (1 - m)))
    variance = (at(1.0, 0.0) - mean) ** 2 + (at(0.0, 1.0) - mean) ** 2
    torch.testing.assert_close(variance, (s**2).expand(4))
    torch.testing.assert_close(at(0.0, 1.0)[0], mean[0])
    holes = torch.where(m > 0, known, math.nan)
    torch.testing.assert_close(hooks.inpaint(SDE, holes, m, torch.zeros_like)(0, t, a * u), mean[None])


def test_inpainting_noisy_entries_denoises_them():
    """N(0, 1) data, known up to noise_sd n: what is drawn is p(x1 | x = alpha y) from where sigma/alpha = noise_sd."""
    sd, y = 0.5, tensor(1.2, -0.4)
    ts = torch.cat([log_snr_grid(SDE, 4, 0.9, float(SDE.time(-tensor(sd).log()))), tensor(0.1, 0.01, 0.0)])
    kernel = partial(angle, d=1.0, tau=1.0, order=1)  # N(0, 1) is exact in one step
    score = gaussian_score(SDE, 0.0, 1.0)

    def run(noise):
        hook = hooks.inpaint(SDE, y, tensor(1.0, 1.0), noise, noise_sd=tensor(sd, 0.0))
        return kernel(score, SDE, torch.zeros(1, 2, dtype=F64), ts[:-1], noise=noise, on_step=hook)[0]

    mean = run(torch.zeros_like)
    var = sum((run(Draws(lambda k, x, i=i: 0 * x + (k == i))) - mean) ** 2 for i in range(14))
    a, s, a1, s1 = SDE.alpha(ts[4]), SDE.sigma(ts[4]), SDE.alpha(ts[-2]), SDE.sigma(ts[-2])
    K = a * a1 + a / a1 * s1**2  # Cov(x1, x), and Var(x) = 1
    torch.testing.assert_close(s / a, tensor(sd))
    torch.testing.assert_close(mean, torch.stack([K * a * y[0], a1 * y[1]]), rtol=1e-10, atol=0)
    torch.testing.assert_close(var, torch.stack([1 - K**2, s1**2]), rtol=1e-10, atol=0)
    torch.testing.assert_close(mean[0], y[0] / (1 + sd**2), rtol=2e-2, atol=0)  # the posterior mean of data, nearly


def test_inpainting_noisy_entries_has_the_noise_of_the_level():
    """While it is replaced, known = data + noise_sd n, noised on, is alpha data + sigma n' in distribution."""
    t, sd, m = tensor(0.4), tensor(0.0, 0.3, 0.9, 9.0), tensor(1.0, 1.0, 0.6, 1.0)
    a, s = SDE.alpha(t), SDE.sigma(t)
    x = torch.full((1, 4), 0.7, dtype=F64)
    at = lambda n, e, z: hooks.inpaint(  # noqa: E731
        SDE, 2 + sd * n, m, lambda x: z + 0 * x, noise_sd=sd
    )(0, t, x + s * e)[0]
    mean = at(0.0, 0.0, 0.0)
    torch.testing.assert_close(mean, torch.where(sd < s / a, m * a * 2 + (1 - m) * 0.7, 0.7))
    variance = sum((at(*row) - mean) ** 2 for row in torch.eye(3, dtype=F64))
    torch.testing.assert_close(variance, (s**2).expand(4))


def test_errors():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        hooks.trajectory([], every=0)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values in \[0.0, 1.5\]"):
        hooks.inpaint(SDE, X, tensor(0.0, 1.5))
    with pytest.raises(ValueError, match=r"noise_sd must be >= 0, got -0\.5"):
        hooks.inpaint(SDE, X, tensor(0.0, 1.0), noise_sd=tensor(0.1, -0.5))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\) for a state \(2, 2\)"):
        hooks.inpaint(SDE, X, tensor(0.0, 1.0, 1.0))(0, tensor(0.1), X)

"""Hooks in a run whose states are known."""

import io
import math

import pytest
import torch
from truth import F64, gaussian_map, gaussian_score, log_snr_grid, tensor

from samplers import ddim, hooks
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


def test_errors():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        hooks.trajectory([], every=0)
    with pytest.raises(ValueError, match=r"0 or 1, got values in \[0.0, 0.5\]"):
        hooks.inpaint(SDE, X, tensor(0.0, 0.5))

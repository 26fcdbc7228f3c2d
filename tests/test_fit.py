"""What no combination of a method's outputs can reach, against its definition."""

import torch
from truth import F64

from experiments.fit import beyond
from experiments.problems import problem
from samplers import ddim, grids


def normal(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_beyond_is_what_is_orthogonal_to_all_that_is_known():
    """A combination of its own for each sample, of vectors of very unequal size, leaves nothing."""
    known = [normal(7, 2, 3, seed=k) * 10.0**k for k in range(4)]
    weights = normal(4, 7, 1, 1, seed=9)
    inside = sum(w * v for w, v in zip(weights, known, strict=True))
    assert beyond(inside, known).abs().max() < 1e-9 * inside.abs().max()
    extra = normal(7, 2, 3, seed=10)
    left = beyond(inside + extra, known)
    torch.testing.assert_close(left, beyond(extra, known), rtol=0, atol=1e-9 * float(inside.abs().max()))
    for v in known:
        assert ((left * v).sum((1, 2)) / v.norm()).abs().max() < 1e-9
    solution = torch.linalg.lstsq(torch.stack(known, -1).flatten(1, 2), extra.flatten(1)[..., None]).solution
    want = extra - sum(w[:, None, None] * v for w, v in zip(solution[..., 0].T, known, strict=True))
    torch.testing.assert_close(left, want, rtol=1e-7, atol=1e-7)


def test_a_linear_method_ends_within_the_span_of_its_outputs():
    """So its error is never below `beyond`: ddim's end lies in it, the exact flow's does not."""
    p = problem("64d")
    x, known = p.start(8), []
    known.append(x)

    def watched(y, t):
        known.append(p.score(y, t))
        return known[-1]

    out = ddim(watched, p.sde, x, grids.karras(p.sde, 5, t_end=p.t_end))
    assert beyond(out, known).abs().max() < 1e-9
    exact = p.endpoints(x, tol=1e-8)
    left = beyond(exact, known).flatten(1).norm(dim=1)
    assert bool((left > 1e-3).all())
    assert bool((left <= (out - exact).flatten(1).norm(dim=1)).all())

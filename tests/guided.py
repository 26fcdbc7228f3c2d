"""What the tests of guidance share: a conditional, an unconditional and a negative score, and how near is near."""

import math

import torch

from scoresde import VP, mixture
from scoresde.types import number

D64 = torch.float64
SDE = VP()
T = number(0.3)
KINDS = ("score", "eps", "x0", "v", "velocity")


def problem(shape, n=5):
    """Conditional, unconditional and negative scores of mixtures of that shape, and a batch of noisy points."""
    g = torch.Generator().manual_seed(len(shape))
    means = torch.randn(6, *shape, generator=g, dtype=D64) * (2 / math.prod(shape)) ** 0.5
    var = 0.05 + 0.3 * torch.rand(6, *shape, generator=g, dtype=D64)
    target = mixture(torch.ones(6), means, var=var, labels=torch.arange(6) // 2)
    x = torch.randn(n, *shape, generator=g, dtype=D64)
    return target.given(1).score(SDE), target.score(SDE), target.given(0).score(SDE), x


C, U, N, X = problem((3, 4, 5))


def close(a, b, tol=1e-12):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tol * max(1.0, float(b.abs().max()))


def dots(a, b):
    return (a * b).flatten(1).sum(1)


class Net(torch.nn.Module):
    """An eps network of arbitrary values with a class and a switch, that counts its calls and rows."""

    def __init__(self):
        super().__init__()
        self.calls, self.rows = 0, 0

    def forward(self, x, label, y, skip=False):
        self.calls += 1
        self.rows += len(x)
        y = y.reshape(-1, *[1] * (x.ndim - 1))
        return torch.sin(x + (1 + y) * x.flip(-1)) + (0 if skip else 0.3) * torch.cos(y * x)

    def asked(self, score, x=X, t=T):
        self.calls = self.rows = 0
        return score(x, t), (self.calls, self.rows)

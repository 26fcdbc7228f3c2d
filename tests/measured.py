"""What the tests of posterior rules share: data of known law, measured by small operators of every kind."""

import pytest
import torch
from guided import D64, SDE

from guidance import operators as ops
from scoresde import mixture

SHAPE = (2, 3)
GRID = torch.tensor([0.9, 0.5, 0.3, 0.15, 0.05, 0.01], dtype=D64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D64)


MEAN, SPREAD = draw(*SHAPE, seed=1), draw(6, 6, seed=2) / 3
COV = SPREAD @ SPREAD.T + 0.05 * torch.eye(6, dtype=D64)
MATRIX = draw(4, 6, seed=3)
DENSE = ops.linear(lambda x: x.flatten(1) @ MATRIX.T.to(x), SHAPE)
OPERATORS = {
    "mask": ops.mask(torch.tensor([[1, 0, 1], [0, 0, 1]])),
    "blur": ops.blur(0.6, SHAPE),
    "downsample": ops.downsample(3, SHAPE),
    "gray": ops.gray(SHAPE),
    "dense": DENSE,
    "dense, known": ops.spectral(DENSE),
}
every_operator = pytest.mark.parametrize("A", OPERATORS.values(), ids=OPERATORS)
X = 1.3 * draw(5, *SHAPE, seed=4)
MIX = mixture(torch.tensor([0.5, 0.3, 0.2]), draw(3, *SHAPE, seed=5), covs=torch.stack([COV, 0.3 * COV, 0.7 * COV]))
MIXED = MIX.score(SDE)


def matrix(A):
    return A(torch.eye(6, dtype=D64).reshape(6, *SHAPE)).flatten(1).T


def measurement(A, noise_sd=0.1, seed=6):
    out = A(draw(1, *SHAPE, seed=seed))
    return (out + noise_sd * draw(*out.shape, seed=seed + 1))[0]

"""Noise with one stream per sample."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class Streams:
    """z ~ N(0, I), each sample from its own generator.

    A sample's noise is the same to the bit alone, in any batch, in any chunking and on any device:
    stream i of `seed` belongs to sample i, and its numbers are drawn on the CPU.  (By NumPy: torch's
    CPU generator keeps 32 bits of a seed, so that among 1e5 samples two would share a stream.)

        noise = Streams(seed, 64)              # samples 0..63
        noise = Streams(seed, range(32, 64))   # the same samples 32..63, alone

    Each call gives the next draw of every stream.  About 1.5 ms for 64 x 3 x 32 x 32.
    """

    def __init__(self, seed: int, samples: int | Iterable[int]) -> None:
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        index = [int(i) for i in samples] if isinstance(samples, Iterable) else list(range(samples))
        if not index or min(index) < 0:
            raise ValueError(f"give a positive number of samples, or indices >= 0; got {samples!r}")
        self.generators = [
            np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(i,)))) for i in index
        ]

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != len(self.generators):
            raise ValueError(
                f"there are {len(self.generators)} noise streams for a batch of {len(x)}; "
                "make Streams(seed, range(first, last)) for the samples in this batch"
            )
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        z = torch.empty(x.shape, dtype=dtype)
        for row, generator in zip(z.numpy(), self.generators, strict=True):
            generator.standard_normal(dtype=row.dtype, out=row)
        return z.to(x)


def rademacher(z: Tensor) -> Tensor:
    """Random signs from normal noise: +1 where z >= 0, else -1."""
    return torch.where(z >= 0, 1.0, -1.0).to(z)

"""Noise streams: to the bit the same in any company, and otherwise unrelated."""

import pytest
import torch
from scipy import stats

from scoresde import Streams
from scoresde.noise import rademacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (17,), (3, 8, 8), (2, 2, 2, 2)])
def test_alone_in_a_batch_and_in_any_chunking(shape, dtype):
    whole = Streams(5, 6)
    draws = [whole(torch.empty(6, *shape, dtype=dtype)) for _ in range(3)]
    assert draws[0].dtype == dtype
    for part in ([0], [5], [2, 3], [4, 1], range(3, 6), (i for i in (0, 3))):
        index = list(part)
        noise = Streams(5, index)
        for z in draws:
            assert torch.equal(noise(torch.empty(len(index), *shape, dtype=dtype)), z[index])


def test_normal_and_unrelated():
    """Each stream is standard normal; streams, draws and seeds do not correlate."""
    n, x = 20_000, torch.empty(4, 20_000, dtype=torch.float64)
    noise = Streams(0, 4)
    z = torch.cat([noise(x), noise(x), Streams(1, 4)(x), Streams(2**40, 4)(x)])
    for row in z:
        assert stats.kstest(row.numpy(), "norm").pvalue > 1e-4
    off = torch.corrcoef(z) - torch.eye(len(z))
    assert off.abs().max() < 5 / n**0.5


def test_no_two_of_many_samples_share_a_stream():
    """200 000 streams: with 32 bits of seed about 5 pairs would be the same (seen with torch's own generator)."""
    index, x = range(20_000), torch.empty(20_000, 1, dtype=torch.float64)
    first = torch.cat([Streams(seed, index)(x) for seed in (0, 1, 2, 3, 4, 2**31, 2**32, 2**32 + 1, 2**40, 2**63)])
    assert len(first.unique()) == len(first)


def test_repeatable_and_apart_from_the_global_generator():
    x = torch.empty(3, 5)
    torch.manual_seed(0)
    a = Streams(9, 3)(x)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(Streams(9, 3)(x), a)
    torch.manual_seed(0)
    Streams(9, 3)(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_rademacher():
    """Signs of the noise: every one is +1 or -1, half of each, in its dtype."""
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    v = rademacher(z)
    assert v.dtype == z.dtype
    assert torch.equal(v * z, z.abs())
    assert abs(v.mean()) < 0.05

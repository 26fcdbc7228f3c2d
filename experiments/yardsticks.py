"""What a model is held against: the Frechet distance, and the bits/dim of simple densities."""

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from experiments.digits import Images
from scoresde import Streams, bits_per_dim


class Features:
    """The first 30 principal components of the training images' levels."""

    def __init__(self, data: Images) -> None:
        x = data.x.flatten(1).double()
        self.mean = x.mean(0)
        self.axes = torch.linalg.svd(x - self.mean, full_matrices=False).Vh[:30]

    def frechet(self, a: Tensor, b: Tensor) -> float:
        """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))   (Dowson & Landau 1982)."""
        u, v = ((k.flatten(1).double() - self.mean) @ self.axes.T for k in (a, b))
        ca, cb = u.T.cov().numpy(), v.T.cov().numpy()
        root = scipy.linalg.sqrtm(ca @ cb).real
        return float((u.mean(0) - v.mean(0)).square().sum()) + float(np.trace(ca + cb - 2 * root))


def pixel_bits(train: Images, held: Images) -> float:
    """Bits/dim of independent pixels: one histogram a pixel, one count added to each level."""
    counts = torch.nn.functional.one_hot(train.x.flatten(1), train.levels).sum(0).double() + 1
    p = counts / counts.sum(1, keepdim=True)
    k = held.x.flatten(1)
    return float(-p[torch.arange(k.shape[1]), k].log2().mean())


def gaussian_mixture_bits(train: Images, held: Images, seed: int, components: Sequence[int]) -> float:
    """Bits/dim of the best of some mixtures of full-covariance Gaussians."""
    from sklearn.mixture import GaussianMixture

    x, v = (d.densities(slice(None), Streams(seed, len(d))).flatten(1).double().numpy() for d in (train, held))
    components = [k for k in components if k < len(x) // 10] or [1]
    logp = [GaussianMixture(k, reg_covar=1e-3, random_state=seed).fit(x).score(v) for k in components]
    return float(bits_per_dim(torch.tensor(max(logp)), x.shape[1], train.bin_width))

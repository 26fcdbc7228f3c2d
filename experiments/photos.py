"""Photographs of scikit-learn at half size: the left to learn from, an unseen strip to be asked about, and rivals."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SEEN = 0.75  # of the width, from the left


def load() -> list[Tensor]:
    """Both photographs in [-1, 1], (3, 213, 320): each pixel the mean of 2 x 2."""
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError as err:
        raise SystemExit(
            f"the photographs need scikit-learn and pillow ({err}): pip install 'scoresde[experiments]'"
        ) from err
    whole = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() for image in images]
    return [F.avg_pool2d(x / 127.5 - 1, 2) for x in whole]


def split(photos: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(left three quarters, right quarter) of each."""
    edge = [int(SEEN * x.shape[-1]) for x in photos]
    return [x[..., :e] for x, e in zip(photos, edge, strict=True)], [
        x[..., e:] for x, e in zip(photos, edge, strict=True)
    ]


def patches(photos: Sequence[Tensor], size: int) -> Callable[[int], tuple[Tensor, None]]:
    """n -> random size x size patches, turned and mirrored into all eight positions, by torch's global generator."""

    def batch(n: int) -> tuple[Tensor, None]:
        out = []
        for k, i, j, turns, mirror in torch.rand(n, 5, dtype=torch.float64).tolist():
            x = photos[int(k * len(photos))]
            i, j = int(i * (x.shape[1] - size + 1)), int(j * (x.shape[2] - size + 1))
            patch = x[:, i : i + size, j : j + size].rot90(int(4 * turns), (1, 2))
            out.append(patch.flip(2) if mirror < 0.5 else patch)
        return torch.stack(out), None

    return batch


def crops(strips: Sequence[Tensor], n: int, size: int) -> Tensor:
    """n crops down the middle of each strip, evenly spaced, (len(strips) n, 3, size, size)."""
    out = []
    for x in strips:
        j = (x.shape[2] - size) // 2
        for i in np.linspace(0, x.shape[1] - size, n).round().astype(int):
            out.append(x[:, i : i + size, j : j + size])
    return torch.stack(out)


def psnr(x: Tensor, truth: Tensor, where: Tensor | None = None) -> float:
    """10 log10(2^2 / mean squared error) over all pictures at once; where: (H, W), true where it counts."""
    e = (x.clamp(-1, 1) - truth).square()
    return float(10 * torch.log10(4 / (e if where is None else e[..., where]).mean()))


def total_variation(noisy: Tensor, weight: float) -> Tensor:
    """argmin_u |u - x|^2/2 + weight TV(u), colours together   (Chambolle 2004), nearly converged."""
    from skimage.restoration import denoise_tv_chambolle

    out = []
    for x in noisy.double().cpu():
        u = denoise_tv_chambolle(x.permute(1, 2, 0).numpy(), weight, eps=1e-5, max_num_iter=400, channel_axis=-1)
        out.append(u)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(noisy)


def best_total_variation(noisy: Tensor, truth: Tensor, sd: float) -> tuple[Tensor, float, float]:
    """(picture, weight, PSNR) of the weight that is best on these pictures, to 2 %: a grid, then golden section."""
    tried: dict[float, tuple[float, Tensor]] = {}

    def value(u: float) -> float:
        if u not in tried:
            x = total_variation(noisy, float(np.exp(u)))
            tried[u] = psnr(x, truth), x
        return tried[u][0]

    ratio = (5**0.5 - 1) / 2
    grid = np.linspace(np.log(0.2 * sd), np.log(6 * sd), 10).tolist()
    k = min(max(int(np.argmax([value(u) for u in grid])), 1), 8)
    low, high = grid[k - 1], grid[k + 1]
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    while high - low > 0.02:
        if value(a) > value(b):
            high, b = b, a
            a = high - ratio * (high - low)
        else:
            low, a = a, b
            b = low + ratio * (high - low)
    best = max(tried, key=value)
    return tried[best][1], float(np.exp(best)), tried[best][0]


def bicubic(small: Tensor, factor: int) -> Tensor:
    return F.interpolate(small, scale_factor=factor, mode="bicubic", antialias=True)


def linear_interpolation(pictures: Tensor, known: Tensor) -> Tensor:
    """Linear on Delaunay triangles of the known pixels (H, W); outside their hull the nearest."""
    from scipy.interpolate import griddata

    at, to = known.nonzero().numpy(), (~known).nonzero().numpy()
    out = pictures.clone()
    for x, y in zip(pictures, out, strict=True):
        values = x[:, known].T.double().numpy()
        filled = griddata(at, values, to, method="linear")
        nearest = griddata(at, values, to, method="nearest")
        y[:, ~known] = torch.from_numpy(np.where(np.isnan(filled), nearest, filled)).T.to(y)
    return out


def enlarged(small: Tensor, factor: int) -> Tensor:
    """Each pixel a square."""
    return small.repeat_interleave(factor, -2).repeat_interleave(factor, -1)

"""Photographs of scikit-learn: the left to learn from, an unseen strip to be asked about, and rivals."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from scoresde import Score

SEEN = 0.75  # of the width, from the left


def load() -> list[Tensor]:
    """Both photographs in [-1, 1], (3, 427, 640)."""
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError as err:
        raise SystemExit(
            f"the photographs need scikit-learn and pillow ({err}): pip install 'scoresde[experiments]'"
        ) from err
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in images]


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


def windows(score: Score, size: int, stride: int) -> Score:
    """s(x) = sum_w h_w s(x_w) / sum_w h_w over the size x size windows of x, h their tents   (pictures any size above).

    A network whose layers take their statistics over the picture is asked only about pictures as large as those it
    learned from; what it says is linear in its x0-estimate, so estimates are averaged alike.  stride: pixels from one
    window to the next, the last at the edge.  One call, of (size/stride)^2 times the pixels.
    """

    def cut(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (k, size) of the windows along one axis, and their share of each of n pixels (k, size, n)."""
        first = torch.tensor(sorted({*range(0, n - size, stride), n - size}))
        at = first[:, None] + torch.arange(size)
        tent = 0.5 + torch.minimum(torch.arange(size), torch.arange(size).flip(0))
        share = F.one_hot(at, n).double() * tent[:, None]
        return at.to(like.device), (share / share.sum((0, 1))).to(like)

    def windowed(x: Tensor, t: Tensor) -> Tensor:
        if min(x.shape[2:]) < size:
            raise ValueError(f"pictures must be at least {size} x {size}, got {tuple(x.shape)}; give a smaller size")
        (i, rows), (j, columns) = cut(x.shape[2], x), cut(x.shape[3], x)
        own = x[:, :, i[:, None, :, None], j[None, :, None, :]]  # (B, C, k, l, size, size)
        many = rearrange(own, "b c k l i j -> (b k l) c i j")
        s = score(many, t.repeat_interleave(len(i) * len(j)) if t.ndim else t)
        s = rearrange(s, "(b k l) c i j -> b c k l i j", k=len(i), l=len(j))
        return torch.einsum("bcklij,kih,ljw->bchw", s, rows, columns)

    return windowed


def turned(score: Score) -> Score:
    """s(x) = mean over the eight positions g of a picture of g^-1 s(g x): eight calls."""

    def positions(x: Tensor, t: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for k in range(4):
            y = x.rot90(k, (2, 3))
            for s in (score(y, t), score(y.flip(3), t).flip(3)):
                total += s.rot90(-k, (2, 3))
        return total / 8

    return positions


def halved(x: Tensor) -> Tensor:
    """Px, the means over 2 x 2 pixels, (B, C, H/2, W/2)."""
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"height and width must be even, got {tuple(x.shape)}; crop a row or a column")
    return F.avg_pool2d(x, 2)


def two_scales(fine: Tensor, coarse: Tensor) -> Tensor:
    """fine + U(coarse - P fine)/2: of two estimates of the 2 x 2 means the mean; U interpolates linearly."""
    missing = F.interpolate(coarse - halved(fine), scale_factor=2, mode="bilinear", align_corners=False)
    return fine + missing / 2


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
    """argmin_u |u - x|^2/2 + weight TV(u), each colour by itself   (Chambolle 2004).

    Stopped where a step changes the objective by 1e-5 of it: the converged picture is worse, on the flower by 1 dB.
    """
    from skimage.restoration import denoise_tv_chambolle

    out = []
    for x in noisy.double().cpu():
        u = denoise_tv_chambolle(x.permute(1, 2, 0).numpy(), weight, eps=1e-5, max_num_iter=400, channel_axis=-1)
        out.append(u)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).to(noisy)


def best_total_variation(noisy: Tensor, truth: Tensor, sd: float) -> tuple[Tensor, float, float]:
    """(picture, weight, PSNR) of the weight that is best on these pictures, of 0.4 sd to 4 sd by 5 %.

    All are tried: on smooth pictures PSNR jumps with the weight, as the iteration stops here or there.
    """
    best = noisy, 0.0, -float("inf")
    for weight in (0.4 * sd * 1.05 ** np.arange(48)).tolist():
        x = total_variation(noisy, weight)
        if (db := psnr(x, truth)) > best[2]:
            best = x, weight, db
    return best


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

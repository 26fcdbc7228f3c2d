"""Views of an image for CLIP: overviews, random crops, small augmentations; all differentiable."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Views = Callable[[Tensor, tuple[int, int]], Tensor]  # image (B, C, H, W), (h, w) -> (n B, C, h, w), view after view


def cutouts(
    n: int = 0,
    *,
    overview: int = 0,
    smallest: float = 0.5,
    power: float = 1.0,
    rotate: float = 0.0,
    shift: float = 0.0,
    zoom: float = 0.0,
    noise: float = 0.0,
    seed: int | torch.Generator = 0,
) -> Views:
    """`overview` times the whole image, then n crops of side k = smallest + (1 - smallest) u^power, u ~ U(0, 1).

    n, overview: >= 0, not both 0.  The whole image is padded with 0 to the shape that CLIP sees; a crop has that
              shape, k of the largest that fits, at a uniform place.  Both are resized with antialiasing
    smallest: in (0, 1];  power: > 0; more than 1 prefers small crops (0.5: large ones)
    rotate:   each view turned by up to so many degrees, either way;  shift: moved by up to this fraction of its size;
    zoom:     enlarged by a factor in [1 - zoom, 1 + zoom]; what comes in from outside repeats the edge.  0: off
    noise:    standard deviation of Gaussian noise added to each view, in units of the range of values (0..1)
    seed:     an int: the same draws at every call, so that the energy is a function;  a `torch.Generator` of the CPU:
              fresh draws at every call.  Draws are shared by the batch: a sample does not depend on its mates
    Other views at other noise levels: one energy each, in `guidance.stages`.
    """
    if n < 0 or overview < 0 or n + overview == 0:
        raise ValueError(f"n and overview must be >= 0 and not both 0, got {n} and {overview}")
    if not 0 < smallest <= 1 or not power > 0:
        raise ValueError(f"smallest must lie in (0, 1] and power be positive, got {smallest} and {power}")
    if min(rotate, shift, noise) < 0 or not 0 <= zoom < 1:
        raise ValueError(f"rotate, shift and noise must be >= 0, zoom in [0, 1), got {(rotate, shift, noise, zoom)}")
    if isinstance(seed, torch.Generator) and seed.device.type != "cpu":
        raise ValueError(
            f"the generator must be one of the CPU, so that draws are the same anywhere; got {seed.device}"
        )

    def views(image: Tensor, size: tuple[int, int]) -> Tensor:
        g = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
        crops = [fit(image, size)] * overview
        for side, top, left in boxes(n, smallest, power, g):
            crops.append(cut(image, side, top, left, size))
        if rotate or shift or zoom:
            crops = [_moved(c, rotate, shift, zoom, g) for c in crops]
        if noise:
            crops = [c + noise * torch.randn(c.shape[1:], generator=g).to(c) for c in crops]
        return torch.cat(crops)

    return views


def boxes(n: int, smallest: float, power: float, generator: torch.Generator) -> list[tuple[float, float, float]]:
    """n crops (side, top, left) as fractions: of the largest crop, and of the room that is left."""
    draw = torch.rand(n, 3, generator=generator, dtype=torch.float64).tolist()
    return [(smallest + (1 - smallest) * u**power, y, x) for u, y, x in draw]


def cut(image: Tensor, side: float, top: float, left: float, size: tuple[int, int]) -> Tensor:
    """The crop of that place and side, of the shape of size, resized to it."""
    H, W = image.shape[2:]
    scale = side * min(H / size[0], W / size[1])
    h, w = max(1, round(scale * size[0])), max(1, round(scale * size[1]))
    y, x = round(top * (H - h)), round(left * (W - w))
    return resize(image[:, :, y : y + h, x : x + w], size)


def fit(image: Tensor, size: tuple[int, int], fill: float = 0.0, mode: str = "bicubic") -> Tensor:
    """The whole image, its shape kept, in the middle of a frame of that size."""
    H, W = image.shape[2:]
    scale = min(size[0] / H, size[1] / W)
    h, w = max(1, round(scale * H)), max(1, round(scale * W))
    top, left = (size[0] - h) // 2, (size[1] - w) // 2
    return F.pad(resize(image, (h, w), mode), (left, size[1] - w - left, top, size[0] - h - top), value=fill)


def resize(image: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Antialiased, differentiable."""
    if image.shape[2:] == size:
        return image
    return F.interpolate(image, size=size, mode=mode, antialias=True)


def _moved(image: Tensor, rotate: float, shift: float, zoom: float, generator: torch.Generator) -> Tensor:
    """Turned, enlarged and shifted about the middle, by one draw for the whole batch."""
    turn, grow, y, x = (2 * torch.rand(4, generator=generator, dtype=torch.float64) - 1).tolist()
    angle, k = math.radians(turn * rotate), 1 / (1 + grow * zoom)
    H, W = image.shape[2:]
    c, s = k * math.cos(angle), k * math.sin(angle)
    # grid_sample's coordinates run over [-1, 1] along both axes, so a turn of pixels is sheared by the shape
    matrix = [[c, -s * H / W, -2 * shift * x], [s * W / H, c, -2 * shift * y]]
    grid = F.affine_grid(image.new_tensor([matrix]), [1, *image.shape[1:]], align_corners=False)
    return F.grid_sample(image, grid.expand(len(image), -1, -1, -1), padding_mode="border", align_corners=False)

"""The data of the experiments: scikit-learn's handwritten digits, or a folder of images by class."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde import Noise, dequantize

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("thin", "normal", "bold")


@dataclass(frozen=True)
class Images:
    """Grey images as integer levels: x (N, 1, H, W) long, y (N,) long, in 0..levels-1."""

    x: Tensor
    y: Tensor
    names: tuple[str, ...]
    levels: int

    def __len__(self) -> int:
        return len(self.y)

    def densities(self, rows: Tensor | slice = slice(None), noise: Noise | None = None) -> Tensor:
        """Dequantised to [-1, 1]: x = 2 (k + u)/levels - 1."""
        return dequantize(self.x[rows], self.levels, -1.0, 1.0, noise)

    @property
    def bin_width(self) -> float:
        return 2 / self.levels

    def ink(self) -> Tensor:
        """Mean level of each image, (N,)."""
        return self.x.float().flatten(1).mean(1)


def to_levels(x: Tensor, levels: int) -> Tensor:
    """Values in [-1, 1] back to integers 0..levels-1."""
    return ((x + 1) * (levels / 2)).floor().clamp(0, levels - 1).long()


def load(folder: str | Path | None, seed: int) -> tuple[Images, Images]:
    """(training, held-out) images: the 1797 digits of scikit-learn (17 levels, 8 x 8), or FOLDER/class/*.png.

    A fifth is held out, by class, shuffled by seed.
    """
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.long)[:, None]
        data = Images(x, torch.tensor(digits.target, dtype=torch.long), WORDS, 17)
    else:
        data = _from_folder(Path(folder))
    rng = np.random.default_rng(seed)
    held = np.zeros(len(data), dtype=bool)
    for c in range(len(data.names)):
        rows = rng.permutation(np.flatnonzero(data.y.numpy() == c))
        held[rows[: math.ceil(len(rows) / 5)]] = True
    return _take(data, torch.from_numpy(~held)), _take(data, torch.from_numpy(held))


def _take(data: Images, rows: Tensor) -> Images:
    return Images(data.x[rows], data.y[rows], data.names, data.levels)


def _from_folder(folder: Path) -> Images:
    classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if len(classes) < 2:
        raise ValueError(
            f"{folder} must hold one sub-folder of images for each class, at least two; found {len(classes)}"
        )
    images, labels = [], []
    for c, sub in enumerate(classes):
        found = read_folder(sub)
        images.append(found)
        labels += [c] * len(found)
    sizes = {tuple(v.shape[1:]) for v in images}
    if len(sizes) > 1:
        raise ValueError(f"all images must be of one size, found {sorted(sizes)} in {folder}; resize them first")
    return Images(torch.cat(images), torch.tensor(labels), tuple(p.name for p in classes), 256)


def read_folder(folder: Path) -> Tensor:
    """Every image of a folder as 8-bit grey levels, (N, 1, H, W), in the order of their names."""
    from PIL import Image, UnidentifiedImageError

    ends = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in ends)
    if not files:
        raise ValueError(f"no images in {folder}; wanted files ending in {', '.join(sorted(ends))}")
    out: list[Tensor] = []
    for file in files:
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(
                        f"{file} has more than 8 bits a pixel (mode {image.mode}); convert it to 8 bits first"
                    )
                pixels = torch.from_numpy(np.asarray(image.convert("L")).astype(np.int64))
        except (UnidentifiedImageError, OSError) as err:
            raise ValueError(f"{file} is not a readable image ({err}); repair it or take it out of the folder") from err
        if out and pixels.shape != out[0].shape[1:]:
            raise ValueError(
                f"{file} is {tuple(pixels.shape)}, the images before it {tuple(out[0].shape[1:])}; "
                "resize them to one size"
            )
        out.append(pixels[None])
    return torch.stack(out)


class Judge:
    """A support vector machine trained on the real training images; `rate` is how often it agrees."""

    def __init__(self, train: Images) -> None:
        from sklearn.svm import SVC

        self.levels = train.levels
        self.svm = SVC(gamma=0.256, C=10.0).fit(self._features(train.x), train.y.numpy())

    def _features(self, k: Tensor) -> np.ndarray:
        scale = (self.levels - 1) * math.sqrt(k[0].numel() / 64)
        return (k.flatten(1).double() / scale).numpy()

    def rate(self, x: Tensor, y: Tensor) -> float:
        """Fraction of samples x in [-1, 1] read as their class y."""
        return self.rate_levels(to_levels(x.cpu(), self.levels), y)

    def rate_levels(self, k: Tensor, y: Tensor) -> float:
        return float((self.svm.predict(self._features(k)) == y.numpy()).mean())


def styles(data: Images) -> Tensor:
    """0 thin, 1 normal, 2 bold: the terciles of ink within each class, (N,)."""
    ink = data.ink()
    out = torch.zeros(len(data), dtype=torch.long)
    for c in range(len(data.names)):
        rows = (data.y == c).nonzero()[:, 0]
        order = ink[rows].argsort().argsort()
        out[rows] = order * 3 // len(rows)
    return out

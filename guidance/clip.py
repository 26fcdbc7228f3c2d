"""CLIP as an energy of images, for `guidance.energy`.

E(x0) = sum_i w_i mean over cutouts of d(image(cut(x0)), text_i)
d = 1 - <u, v> (cosine), or 2 asin(|u - v| / 2)^2 (spherical; Crowson 2021)

guided = energy(score, sde, clip_energy(*load_clip(folder), ["a bold seven"]), scale=30.0)
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from guidance.energy import Energy


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """(CLIP, tokenizer) of open_clip, in eval mode and frozen.

    name:       an open_clip architecture ("ViT-B-32"), or "local-dir:FOLDER", or a folder
    pretrained: an open_clip tag ("laion2b_s34b_b79k"), or a file of weights; then mean and std must be
                given, because a bare file does not say them and OpenAI's would be used silently
    """
    open_clip = _import_open_clip()
    if Path(name).is_dir():
        name = f"local-dir:{name}"
    if pretrained is not None and Path(pretrained).is_file() and (mean is None or std is None):
        raise ValueError(
            f"{pretrained} is a bare weights file that does not say how its images were normalised; "
            "pass mean=... and std=... of its training, or use a folder with open_clip_config.json"
        )
    extra = {k: tuple(v) for k, v in (("image_mean", mean), ("image_std", std)) if v is not None}
    model = open_clip.create_model(name, pretrained=pretrained, device=device, **extra)
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(name)


def clip_energy(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    prompts: Sequence[str] | Mapping[str, float],
    *,
    cutouts: int = 0,
    smallest: float = 0.5,
    seed: int = 0,
    distance: str = "cosine",
    low: float = -1.0,
    high: float = 1.0,
) -> Energy:
    """E(x0), (B,), of images (B, 1 or 3, H, W) with values in [low, high].

    prompts:  texts, or {text: weight}; a negative weight pushes away
    cutouts:  0: the whole image; n: n square crops of side in [smallest, 1] of the image, drawn once
              from `seed` (so that E is a function) and resized with antialiasing, differentiably
    distance: "cosine" or "spherical"
    Size, mean and std are the model's own.
    """
    weights = dict(prompts) if isinstance(prompts, Mapping) else dict.fromkeys(prompts, 1.0)
    if not weights:
        raise ValueError("give at least one prompt")
    if distance not in ("cosine", "spherical"):
        raise ValueError(f"unknown distance {distance!r}; choose cosine or spherical")
    if cutouts < 0 or not 0 < smallest <= 1:
        raise ValueError(f"cutouts must be >= 0 and smallest in (0, 1], got {cutouts} and {smallest}")
    if not high > low:
        raise ValueError(f"the range of values must be low < high, got {low} and {high}")
    cfg = _import_open_clip().get_model_preprocess_cfg(model)
    size = (cfg["size"], cfg["size"]) if isinstance(cfg["size"], int) else tuple(cfg["size"])
    parameter = next(model.parameters())
    mean = parameter.new_tensor(cfg["mean"])[:, None, None]
    std = parameter.new_tensor(cfg["std"])[:, None, None]
    with torch.no_grad():
        text = model.encode_text(tokenizer(list(weights)).to(parameter.device), normalize=True)  # (P, E)
    w = text.new_tensor(list(weights.values()))
    boxes = _boxes(cutouts, smallest, seed)

    def E(x0: Tensor) -> Tensor:
        if x0.ndim != 4 or x0.shape[1] not in (1, 3):
            raise ValueError(f"CLIP takes images (B, 1 or 3, H, W), got {tuple(x0.shape)}; decode latents first")
        image = ((x0.to(parameter.dtype) - low) / (high - low)).expand(-1, 3, -1, -1)
        crops = [_cut(image, box, size) for box in boxes] if boxes else [_resize(image, size)]
        u = model.encode_image((torch.cat(crops) - mean) / std, normalize=True)  # (cuts B, E)
        if distance == "cosine":
            d = 1 - u @ text.T
        else:
            gap = (u[:, None] - text).norm(dim=-1)
            d = 2 * torch.asin((gap / 2).clamp(max=1)) ** 2
        return (d @ w).reshape(len(crops), len(x0)).mean(0).to(x0.dtype)

    return E


def _boxes(n: int, smallest: float, seed: int) -> list[tuple[float, float, float]]:
    """n crops (side, top, left), as fractions: side in [smallest, 1], position of the free rest."""
    draw = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)).tolist()
    return [(smallest + (1 - smallest) * a, b, c) for a, b, c in draw]


def _cut(image: Tensor, box: tuple[float, float, float], size: tuple[int, int]) -> Tensor:
    side, top, left = box
    H, W = image.shape[2:]
    n = max(1, round(side * min(H, W)))
    y, x = round(top * (H - n)), round(left * (W - n))
    return _resize(image[:, :, y : y + n, x : x + n], size)


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[2:] == size:
        return image
    return F.interpolate(image, size=size, mode="bicubic", antialias=True)


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError(f"CLIP guidance needs open_clip ({err}); pip install 'scoresde[clip]'") from err
    except RuntimeError as err:
        raise RuntimeError(
            f"open_clip cannot load its torchvision ({err}); torch and torchvision must be of one release: "
            "pip install --upgrade torch torchvision"
        ) from err
    return open_clip

"""CLIP as an energy of images, for `guidance.energy`.

With unit embeddings u of the image and v_i of the prompts, k CLIP's own inverse temperature (mean over the views):

    cosine     E = sum_i w_i (1 - <u, v_i>)
    spherical  E = sum_i w_i 2 asin(|u - v_i|/2)^2                                     (Crowson 2021)
    softmax    E = -log sum_i w_i e^(k <u, v_i>) / sum_j e^(k <u, v_j>),  j over prompts and `against`

guided = energy(score, sde, clip_energy(*load_clip(folder), ["a bold seven"]), scale=30.0)

Which: cosine and spherical need no other prompt; they pull on without end, so accuracy is bought with the distribution,
and several prompts with positive weights ask for one image that is like all of them.  Softmax needs to be told what
else there is, is a probability and stops once it is sure: at equal accuracy it does a fraction of the damage, scale 1
is Bayes' rule, and weighted prompts give a mixture: p(x0) sum_i w_i p(i | x0).

Judge a guide by an independent classifier, never by the CLIP itself: guided samples please the CLIP that guided them
(digits: 0.99 by its own reading, 0.87 by another's), and the most accurate CLIP can be the worst guide.  One that was
trained on noisy images, or several together (`total`), guides better.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guidance.cutouts import Views, fit, resize
from guidance.energy import Energy
from scoresde.adaptive import rowwise

Prompt = str | Tensor  # a text, or an image (1 or 3, H, W) with the values of x0


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """(CLIP, tokenizer) of open_clip, in eval mode and frozen.

    name:       an open_clip architecture ("ViT-B-32"), a folder, "local-dir:FOLDER" or "hf-hub:OWNER/NAME"
    pretrained: of an architecture: an open_clip tag ("laion2b_s34b_b79k"), or a file of weights
    mean, std:  of the images it was trained on; must be given where neither a tag nor the folder's
                open_clip_config.json tells them, because open_clip would take OpenAI's without a word
    """
    open_clip = _import_open_clip()
    if Path(name).is_dir():
        name = f"local-dir:{name}"
    folder = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if pretrained is None and folder is None and not name.startswith("hf-hub:"):
        raise ValueError(
            f"{name} without pretrained would be a network of random numbers; give a tag of "
            f"open_clip.list_pretrained_tags_by_model({name!r}), or a file of weights"
        )
    bare = pretrained if pretrained is not None and Path(pretrained).is_file() else None
    if folder is not None and not _says_normalisation(folder):
        bare = str(folder)
    if bare is not None and (mean is None or std is None):
        raise ValueError(
            f"{bare} does not say how its images were normalised; pass mean=... and std=... of its training, "
            "or use a folder whose open_clip_config.json has them in preprocess_cfg"
        )
    own = {k: tuple(v) for k, v in (("mean", mean), ("std", std)) if v is not None}
    model = open_clip.create_model(name, pretrained=pretrained, device=device, force_preprocess_cfg=own)
    return model.eval().requires_grad_(False), open_clip.get_tokenizer(name)


def _says_normalisation(folder: Path) -> bool:
    try:
        config = json.loads((folder / "open_clip_config.json").read_text())
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{folder} is no CLIP of open_clip: it has no open_clip_config.json") from err
    return {"mean", "std"} <= config.get("preprocess_cfg", {}).keys()


def clip_energy(
    model: Any,
    tokenizer: Callable[[list[str]], Tensor],
    prompts: Sequence[Prompt] | Mapping[Any, float],
    *,
    against: Sequence[Prompt] = (),
    distance: str = "cosine",
    cutouts: Views | None = None,
    low: float = -1.0,
    high: float = 1.0,
    autocast: torch.dtype | None = None,
) -> Energy:
    """E(x0), (B,), of images (B, 1 or 3, H, W) with values in [low, high]; the formulas stand above.

    prompts:  texts and images, or {prompt: weight}; a negative weight pushes away (not with softmax)
    against:  softmax only: what else an image can be; it takes part in the denominator only
    distance: "cosine", "spherical" or "softmax"
    cutouts:  `guidance.cutouts(...)`; None: the whole image, as the model's own preprocessing makes it
    autocast: torch.bfloat16 (or torch.float16, where small gradients vanish): the CLIP pass runs in it, nothing else
    Size, resize mode, mean and std are the model's own.  For a latent model compose: `lambda z0: E(decode(z0))`.
    Cost: one CLIP pass forward and back for each view.
    """
    if isinstance(prompts, str | Tensor) or isinstance(against, str | Tensor):
        raise ValueError("prompts and against are lists, or {prompt: weight}; write ['a seven'] for one text")
    weights = dict(prompts) if isinstance(prompts, Mapping) else dict.fromkeys(prompts, 1.0)
    if not weights:
        raise ValueError("give at least one prompt")
    if len(weights) < len(prompts):
        raise ValueError(f"a prompt is given twice in {prompts}; give it a weight, {{prompt: 2.0}}")
    if not all(math.isfinite(w) for w in weights.values()):
        raise ValueError(f"the weights must be finite, got {list(weights.values())}")
    if distance not in ("cosine", "spherical", "softmax"):
        raise ValueError(f"unknown distance {distance!r}; choose cosine, spherical or softmax")
    if distance != "softmax" and against:
        raise ValueError(f"against=... belongs to distance='softmax'; with {distance} give those prompts a weight < 0")
    if distance == "softmax" and (min(weights.values()) < 0 or not any(weights.values())):
        raise ValueError(f"softmax takes weights >= 0, not all 0, got {list(weights.values())}; use against=[...]")
    if distance == "softmax" and len(weights) + len(against) < 2:
        raise ValueError("softmax needs at least two prompts in all; say in against=[...] what else there is")
    if not high > low:
        raise ValueError(f"the range of values must be low < high, got {low} and {high}")
    parameter = next(model.parameters())
    see = _preprocess(model, parameter)
    kind = parameter.device.type

    def encode(image: Tensor, views: Views | None) -> tuple[Tensor, int]:
        """Embeddings of all views, (n B, E), and n."""
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise ValueError(f"CLIP takes images (B, 1 or 3, H, W), got {tuple(image.shape)}; decode latents first")
        unit = ((image.to(parameter.dtype) - low) / (high - low)).expand(-1, 3, -1, -1)
        seen = see(unit, views)
        with torch.autocast(kind, dtype=autocast) if autocast is not None else nullcontext():
            return model.encode_image(seen, normalize=True), len(seen) // len(image)

    with torch.no_grad():
        everything = [*weights, *against]
        texts = [p for p in everything if isinstance(p, str)]
        found = iter(model.encode_text(tokenizer(texts).to(parameter.device), normalize=True)) if texts else iter(())
        rows = [
            next(found) if isinstance(p, str) else encode(p[None].to(parameter.device), None)[0][0] for p in everything
        ]
        v = torch.stack([r.to(parameter.dtype) for r in rows])  # (P, E)
    w = v.new_tensor(list(weights.values()))
    heat = model.logit_scale.detach().exp() if distance == "softmax" else None

    def E(x0: Tensor) -> Tensor:
        u, n = encode(x0, cutouts)
        u = u.to(v.dtype)
        if heat is not None:
            logits = heat * u @ v.T
            d = logits.logsumexp(1) - (logits[:, : len(w)] + w.log()).logsumexp(1)
        elif distance == "cosine":
            d = (1 - u @ v.T) @ w
        else:
            gap = (u[:, None] - v).norm(dim=-1)
            d = 2 * torch.asin((gap / 2).clamp(max=1)) ** 2 @ w
        return d.reshape(n, len(x0)).mean(0).to(x0.dtype)

    return rowwise(E)


def _preprocess(model: Any, parameter: Tensor) -> Callable[[Tensor, Views | None], Tensor]:
    """image in [0, 1] (B, 3, H, W) -> what the model wants to see, by its own size, resize mode, mean and std."""
    cfg = _import_open_clip().get_model_preprocess_cfg(model)
    size = (cfg["size"], cfg["size"]) if isinstance(cfg["size"], int) else tuple(cfg["size"])
    mean, std = (parameter.new_tensor(cfg[k])[:, None, None] for k in ("mean", "std"))
    mode = "bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic"
    how, fill = cfg.get("resize_mode", "shortest"), cfg.get("fill_color", 0) / 255

    def whole(image: Tensor) -> Tensor:
        if how == "longest":
            return fit(image, size, fill, mode)
        if how == "shortest":
            H, W = image.shape[2:]
            scale = min(H / size[0], W / size[1])
            h, w = round(scale * size[0]), round(scale * size[1])
            top, left = (H - h) // 2, (W - w) // 2
            image = image[:, :, top : top + h, left : left + w]
        return resize(image, size, mode)

    return lambda image, views: ((whole(image) if views is None else views(image, size)) - mean) / std


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

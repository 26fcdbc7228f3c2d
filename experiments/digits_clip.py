"""A small, real CLIP for the digits: open_clip's own model and tokenizer, trained on captions.

Two kinds of captions, each with its contrastive loss at every step: which class ("a handwritten
seven"), and how it is written ("a bold seven": ink terciles within the class).  The random token
embedding stays frozen: ten classes do not need more, and it trains faster.

To each image noise of deviation U(0, `NOISE`) is added: a guide sees images that no camera made, and one that knows
clean ones only is pleased by what nobody else can read.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from experiments.digits import STYLES, Images, styles
from scoresde import Streams

PLAIN = ("a handwritten {}", "a picture of a {}", "the digit {}", "a {}")
NOISE = 0.7
STYLED = ("a {1} handwritten {0}", "a {1} {0}", "the digit {0}, {1}")


def config(size: tuple[int, int]) -> dict[str, Any]:
    """open_clip's config: 3.4 M parameters, nearly all of them the token embedding."""
    patch = max(2, min(size) // 4)
    vision = {"image_size": list(size), "layers": 2, "width": 64, "head_width": 16, "patch_size": patch}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    model = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}
    pre = {"size": list(size), "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "RGB", "interpolation": "bicubic",
           "resize_mode": "squash"}  # fmt: skip
    return {"model_cfg": model, "preprocess_cfg": pre}


def train_clip(
    data: Images, folder: Path, *, seconds: float, seed: int, about: dict[str, Any] | None = None, progress: bool = True
) -> None:
    """Train for `seconds` of CPU time and save the folder that `guidance.load_clip` reads.

    training.json, written last, holds `about` and the seconds spent.
    """
    about = about or {}
    import open_clip
    from safetensors.torch import save_file

    cfg = config((data.x.shape[2], data.x.shape[3]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**cfg["model_cfg"])
        tokenizer = open_clip.SimpleTokenizer(context_length=16)
        model.token_embedding.requires_grad_(False)
        spent = _fit(model, tokenizer, data, seconds, progress)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(cfg, indent=2))
    (folder / "training.json").write_text(json.dumps({**about, "seconds": spent}, indent=2))


def _fit(model: Any, tokenizer: Callable[..., Tensor], data: Images, seconds: float, progress: bool) -> float:
    style = styles(data)
    classes = len(data.names)
    rows = [(data.y == c).nonzero()[:, 0] for c in range(classes)]
    each = max(2, 60 // classes)
    params = [p for p in model.parameters() if p.requires_grad]
    optim = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.05, fused=True)
    plain = [tokenizer([t.format(n) for n in data.names]) for t in PLAIN]
    styled = [tokenizer([t.format(n, s) for n in data.names for s in STYLES]) for t in STYLED]
    label = torch.arange(classes).repeat_interleave(each)
    began, k = time.process_time(), 0
    bar = tqdm(total=round(seconds), unit="s", desc="training CLIP", disable=not progress)
    model.train()
    while (spent := time.process_time() - began) < seconds:
        for group in optim.param_groups:
            group["lr"] = 2e-3 * min(1.0, (k + 1) / 30) * 0.5 * (1 + math.cos(math.pi * spent / seconds))
        pick = torch.cat([r[torch.randint(len(r), (each,))] for r in rows])
        image = data.densities(pick)
        image = image + NOISE * torch.rand(len(image), 1, 1, 1) * torch.randn_like(image)
        i, j = (int(torch.randint(len(templates), ())) for templates in (plain, styled))
        u = model.encode_image(image.expand(-1, 3, -1, -1), normalize=True)
        v = model.encode_text(torch.cat([plain[i], styled[j]]), normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * u @ v.T
        loss = F.cross_entropy(logits[:, :classes], label)
        loss = loss + F.cross_entropy(logits[:, classes:], label * 3 + style[pick])
        optim.zero_grad(set_to_none=True)
        loss.backward()
        optim.step()
        k += 1
        bar.n = min(round(spent), bar.total)
        if k % 20 == 0:
            bar.set_postfix_str(f"step {k}, loss {loss.item():.3f}")
    bar.close()
    model.eval()
    return spent


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Callable[..., Tensor], data: Images) -> tuple[float, float]:
    """Fractions of images whose class, and whose style given the class, the nearest caption names."""
    device = next(model.parameters()).device

    def tokens(texts: list[str]) -> Tensor:
        return tokenizer(texts).to(device)

    images = data.densities(noise=Streams(0, len(data))).to(device)
    u = model.encode_image(images.expand(-1, 3, -1, -1), normalize=True)
    names = sum(model.encode_text(tokens([t.format(n) for n in data.names]), normalize=True) for t in PLAIN)
    right = (u @ names.T).argmax(1) == data.y.to(device)
    texts = [STYLED[0].format(n, s) for n in data.names for s in STYLES]
    v = model.encode_text(tokens(texts), normalize=True).reshape(len(data.names), 3, -1)
    style = torch.einsum("be,bse->bs", u, v[data.y.to(device)]).argmax(1) == styles(data).to(device)
    return float(right.float().mean()), float(style.float().mean())

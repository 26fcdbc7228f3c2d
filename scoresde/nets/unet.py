"""A small U-Net for images of any size from 8 x 8 up."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.nets.embed import Embedding


class UNet(nn.Module):
    """net(x, label, y): (B, channels, H, W) -> the same.

    width channels times `mults` from the full size down, halving each time; one residual block a
    level going down, two going up; self-attention at the lowest level (attention=False: none,
    so that a large image costs what its pixels do); noise level and class enter
    each block as scale and shift (FiLM).  Layers that close a residual branch start at zero, so the
    untrained network returns zero.  width 16, mults (1, 2): 170 305 parameters with ten classes.

    without: "weights" (each pixel attends to itself alone: perturbed attention, Ahn 2024) or "attention" (the
    layer is skipped: skip-layer guidance).  `cfg(m, m.given(without="weights"), 1 + s)` guides by what that loses.
    """

    takes_log_noise = True  # its label is log(sigma/alpha)/4, of order one

    def __init__(
        self,
        channels: int = 1,
        width: int = 16,
        mults: Sequence[int] = (1, 2),
        classes: int | None = None,
        dropout: float = 0.0,
        attention: bool = True,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels, "width": width, "mults": list(mults), "classes": classes, "dropout": dropout,
            "attention": attention,
        }  # fmt: skip
        e = 8 * width
        sizes = [width * m for m in mults]
        self.embed = Embedding(e, classes)
        self.inp = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = width, [width]
        for level, size in enumerate(sizes):
            if level:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
            self.down.append(Block(c, size, e, dropout))
            c = size
            skips.append(c)
        if attention:
            self.middle = Attention(c)
        for level in reversed(range(len(sizes))):
            for _ in range(2):
                self.up.append(Block(c + skips.pop(), sizes[level], e, dropout))
                c = sizes[level]
        self.norm = _norm(c)
        self.out = _zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x: Tensor, label: Tensor, y: Tensor | None = None, without: str | None = None) -> Tensor:
        if without is not None and (without not in ("weights", "attention") or not self.config["attention"]):
            raise ValueError(
                f"without must be 'weights' or 'attention', of a UNet that has attention, got {without!r} "
                f"and attention={self.config['attention']}"
            )
        least = 2 ** (len(self.config["mults"]) - 1)
        if x.ndim != 4 or x.shape[1] != self.config["channels"] or min(x.shape[2:]) < least:
            raise ValueError(
                f"this UNet takes (B, {self.config['channels']}, H, W) with H, W >= {least}, got {tuple(x.shape)}"
            )
        e = F.silu(self.embed(label, y))
        h = self.inp(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, e) if isinstance(layer, Block) else layer(h)
            skips.append(h)
        if self.config["attention"] and without != "attention":
            h = self.middle(h, alone=without == "weights")
        for layer in self.up:
            skip = skips.pop()
            if h.shape[2:] != skip.shape[2:]:
                h = F.interpolate(h, size=skip.shape[2:], mode="nearest")
            h = layer(torch.cat([h, skip], 1), e)
        return self.out(F.silu(self.norm(h)))


class Block(nn.Module):
    """Two 3 x 3 convolutions with FiLM between, and a residual."""

    def __init__(self, c: int, c1: int, e: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.conv = _norm(c), nn.Conv2d(c, c1, 3, padding=1)
        self.film = nn.Linear(e, 2 * c1)
        self.norm1, self.drop = _norm(c1), nn.Dropout(dropout)
        self.conv1 = _zero(nn.Conv2d(c1, c1, 3, padding=1))
        self.skip = nn.Conv2d(c, c1, 1) if c != c1 else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.conv(F.silu(self.norm(x)))
        scale, shift = self.film(e)[:, :, None, None].chunk(2, 1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), 1 + scale))
        return self.skip(x) + self.conv1(self.drop(h))


class Attention(nn.Module):
    """Self-attention over the pixels, one head for 32 channels."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.heads = max(1, c // 32)
        self.norm, self.qkv, self.out = _norm(c), nn.Conv2d(c, 3 * c, 1), _zero(nn.Conv2d(c, c, 1))

    def forward(self, x: Tensor, alone: bool = False) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n h c) y x -> n b h (y x) c", n=3, h=self.heads)
        h = v if alone else torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        h = rearrange(h, "b h (y x) c -> b (h c) y x", y=x.shape[2])
        return x + self.out(h)


def _norm(c: int) -> nn.GroupNorm:
    groups = next(g for g in (8, 4, 2, 1) if c % g == 0)
    return nn.GroupNorm(groups, c)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer

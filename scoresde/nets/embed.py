"""Noise level and class as one vector."""

import math

import torch
from torch import Tensor, nn


class Embedding(nn.Module):
    """(label (B,), y (B,) or None) -> (B, width): Fourier features of the label plus a row for the class.

    label: of order one: log(sigma/alpha)/4; y in 0..classes, where `classes` means "no label"
    """

    freqs: Tensor

    def __init__(self, width: int, classes: int | None) -> None:
        super().__init__()
        self.register_buffer("freqs", math.pi * torch.logspace(-2, 4, width // 2, base=2), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width // 2 * 2, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = None if classes is None else nn.Embedding(classes + 1, width)

    def forward(self, label: Tensor, y: Tensor | None) -> Tensor:
        phase = label[:, None] * self.freqs.to(label)
        e = self.mlp(torch.cat([phase.cos(), phase.sin()], 1))
        if self.classes is not None:
            if y is None:
                raise ValueError("this network was built with classes; call it through Model(..., classes=n)")
            e = e + self.classes(y)
        return e

"""A residual MLP for vectors."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.nets.embed import Embedding


class MLP(nn.Module):
    """net(x, label, y): (B, dim) -> (B, dim).

    depth residual blocks of `width` units, each shifted by the embedding of noise level and class.
    The last layer starts at zero.
    """

    takes_log_noise = True  # its label is log(sigma/alpha)/4, of order one

    def __init__(self, dim: int, width: int = 128, depth: int = 3, classes: int | None = None) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim, "width": width, "depth": depth, "classes": classes}
        self.embed = Embedding(width, classes)
        self.inp = nn.Linear(dim, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, label: Tensor, y: Tensor | None = None) -> Tensor:
        if x.ndim != 2:
            raise ValueError(f"MLP takes vectors (B, dim), got {tuple(x.shape)}; flatten the data or use UNet")
        e = F.silu(self.embed(label, y))
        h = self.inp(x)
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            h = h + second(F.silu(first(norm(h) + e)))
        return self.out(F.silu(h))

"""Networks: plain modules net(x, label, y=None) -> like x, rebuilt from their `config` by a checkpoint."""

from scoresde.nets.mlp import MLP
from scoresde.nets.unet import UNet

NETS = {"UNet": UNet, "MLP": MLP}

__all__ = ["MLP", "NETS", "UNet"]

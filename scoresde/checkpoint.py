"""Models and training states in safetensors files: no code inside, whole or not at all.

A file holds tensors, and in its header everything that rebuilds the `Model`: network class and
config, SDE and its numbers, prediction type.  `save` writes beside the target and renames, so a
full disk or Ctrl-C leaves the previous file as it was.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scoresde.files import whole
from scoresde.model import Model
from scoresde.nets import NETS
from scoresde.sde import EDM, VE, VP, CosineVP, DiscreteVP, Straight, SubVP

FORMAT = "scoresde-1"
SDES = {c.__name__: c for c in (VP, SubVP, CosineVP, VE, EDM, Straight, DiscreteVP)}


def describe(model: Model) -> dict[str, Any]:
    """What rebuilds `model` apart from its weights, as JSON values."""
    net = model.net
    name = type(net).__name__
    if name not in NETS or type(model.sde).__name__ not in SDES:
        raise ValueError(
            f"only {', '.join(NETS)} under {', '.join(SDES)} are rebuilt from a file, got {name} under "
            f"{type(model.sde).__name__}; save your own network's state_dict with safetensors"
        )
    if model.label is not None:
        raise ValueError("a model with its own label function cannot be rebuilt from a file; use the default label")
    sde = {
        f.name: v.tolist() if isinstance(v := getattr(model.sde, f.name), Tensor) else v
        for f in fields(model.sde)  # type: ignore[arg-type]
        if f.init
    }
    return {
        "net": name, "config": net.config, "sde": type(model.sde).__name__, "sde_config": sde,  # type: ignore[attr-defined]
        "kind": model.kind, "sigma_data": model.sigma_data, "classes": model.classes,
    }  # fmt: skip


def build(description: Mapping[str, Any]) -> Model:
    """The model of `describe`, with fresh weights."""
    d = description
    if d["net"] not in NETS or d["sde"] not in SDES:
        raise ValueError(f"unknown network {d['net']!r} or SDE {d['sde']!r}; known: {', '.join([*NETS, *SDES])}")
    sde = dict(d["sde_config"])
    if "alphas_cumprod" in sde:
        sde["alphas_cumprod"] = torch.tensor(sde["alphas_cumprod"], dtype=torch.float64)
    net = NETS[d["net"]](**d["config"])
    return Model(net, SDES[d["sde"]](**sde), d["kind"], sigma_data=d["sigma_data"], classes=d["classes"])


def save(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header to path, atomically."""
    data = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    try:
        with whole(path) as temporary:
            save_file(data, temporary, metadata={"format": FORMAT, "header": json.dumps(header)})
    except SafetensorError as err:
        raise OSError(f"could not write {path}: {err}; the previous file, if any, is untouched") from err


def read(path: str | Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors whose name starts with prefix, header) of a file made by `save`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train one with: python -m experiments.quickstart")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: writing it was cut short; delete it, or use an earlier checkpoint")
    try:
        with safe_open(path, "pt") as f:
            meta = f.metadata() or {}
            tensors = {k: f.get_tensor(k) for k in f.keys() if k.startswith(prefix)}  # noqa: SIM118
    except SafetensorError as err:
        if _is_pickle(path):
            raise ValueError(
                f"{path} is a pickle, which can run code when read, so it is refused; convert it where it is trusted: "
                "safetensors.torch.save_file(state_dict, path)"
            ) from None
        raise ValueError(f"{path} is truncated or not a safetensors file ({err}); use an earlier checkpoint") from err
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file of another program (format {meta.get('format')!r}, wanted {FORMAT!r}); "
            "load its tensors into your network and wrap that in scoresde.Model"
        )
    return tensors, json.loads(meta["header"])


def _is_pickle(path: Path) -> bool:
    """A torch zip file, or a bare pickle of protocol 2 or later."""
    with open(path, "rb") as f:
        start = f.read(2)
    return zipfile.is_zipfile(path) or (start[:1] == b"\x80" and start[1:] in b"\x02\x03\x04\x05")


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], prefix: str, path: str | Path) -> None:
    """Put the tensors under prefix into net; every name and shape must fit."""
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    want = net.state_dict()
    missing, extra = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys())
    shapes = [k for k in want.keys() & found.keys() if want[k].shape != found[k].shape]
    if missing or extra or shapes:
        detail = "; ".join(
            part
            for part in (
                missing and f"missing {missing[:3]}",
                extra and f"unexpected {extra[:3]}",
                shapes
                and f"{shapes[0]} is {tuple(found[shapes[0]].shape)}, the network has {tuple(want[shapes[0]].shape)}",
            )
            if part
        )
        raise ValueError(f"{path} is of another architecture: {detail}; build the network with the file's own config")
    net.load_state_dict(found)


def save_model(path: str | Path, model: Model, **extra: Any) -> None:
    """One file with the weights and all that rebuilds the model; `extra` JSON values go along (data range, ...)."""
    assert isinstance(model.net, nn.Module)
    tensors = {f"ema.{k}": v for k, v in model.net.state_dict().items()}
    save(path, tensors, {"model": describe(model), **extra})


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[Model, dict[str, Any]]:
    """(model in eval mode, header) from `save_model` or a training checkpoint (its averaged weights)."""
    tensors, header = read(path, "ema.")
    model = build(header["model"])
    assert isinstance(model.net, nn.Module)
    load_weights(model.net, tensors, "ema.", path)
    model.net.to(device).eval().requires_grad_(False)
    return model, header

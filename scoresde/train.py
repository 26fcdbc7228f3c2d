"""Training by denoising score matching, with averaged weights and checkpoints that resume."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from scoresde import checkpoint
from scoresde.loss import dsm, lognormal_times, uniform_times
from scoresde.model import Model
from scoresde.sde import EDM

Batch = Callable[[int], tuple[Tensor, Tensor | None]]  # n -> (x0 (n, ...), class labels (n,) or None)


def train(
    model: Model,
    batch: Batch,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    weighting: str | None = None,
    times: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 128,
    lr: float = 6e-3,
    warmup: int = 100,
    ema: float = 0.995,
    label_dropout: float = 0.1,
    seed: int = 0,
    path: str | Path | None = None,
    every: int = 500,
    extra: dict[str, Any] | None = None,
    progress: bool = True,
) -> Model:
    """Fit model.net by E w(t) |sigma s + z|^2 (`scoresde.loss`) and return the averaged model, in eval mode.

    batch:      n -> (x0, labels); draws from torch's global generator, which is seeded here and
                given back as it was
    steps, seconds: the budget, one of the two; `steps` reproduces to the bit, `seconds` is CPU time on
                the CPU (so that a busy machine changes nothing) and wall time on a device
    weighting, times: default "edm" for kind F, else "eps"; log-normal noise levels for kind F and for
                `EDM`, else uniform t
    lr:         peak of AdamW (betas 0.9, 0.99): linear over `warmup` steps, then cosine to 1 % of it
                over the budget; gradients are clipped to norm 1
    ema:        weights averaged with decay min(ema, (1 + k)/(10 + k)) at step k
    label_dropout: fraction of labels replaced by "no label", for classifier-free guidance
    path:       a checkpoint, written every `every` steps and at the end; if it exists, training goes on
                from it, to the same bits as without the break when the budget is `steps`
    """
    if (steps is None) == (seconds is None):
        raise ValueError("give the budget once: steps=... (reproducible) or seconds=...")
    net, sde = model.net, model.sde
    if not isinstance(net, nn.Module):
        raise ValueError(f"only a torch module can be trained, got {type(net).__name__}")
    device = next(net.parameters()).device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if weighting is None:
        weighting = "edm" if model.kind == "F" else "eps"
    if times is None:
        times = lognormal_times(sde) if model.kind == "F" or isinstance(sde, EDM) else uniform_times(sde)
    optim = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = AveragedModel(net, multi_avg_fn=_ema(ema))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        k, spent = 0, 0.0
        if path is not None and Path(path).exists():
            k, spent = _resume(Path(path), model, average, optim)
        began = clock() - spent
        net.train()
        bar = tqdm(
            total=steps if steps is not None else round(seconds or 0),
            initial=k if steps is not None else round(spent),
            unit="step" if steps is not None else "s",
            desc="training",
            disable=not progress,
        )
        losses: list[Tensor] = []
        norms: list[Tensor] = []
        while True:
            spent = clock() - began
            done = k / steps if steps else spent / seconds if seconds else 1.0
            if done >= 1:
                break
            for group in optim.param_groups:
                group["lr"] = (
                    lr * min(1.0, (k + 1) / max(1, warmup)) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
                )
            x0, y = batch(batch_size)
            x0 = x0.to(device)
            score = model
            if model.classes is not None and y is not None:
                drop = torch.rand(len(y)) < label_dropout
                score = model.given(torch.where(drop, model.classes, y))
            t = times(torch.rand(len(x0), dtype=torch.float64)).to(x0)
            loss = dsm(score, sde, x0, t, weighting=weighting, sigma_data=model.sigma_data).mean()
            optim.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optim.step()
            average.update_parameters(net)
            k += 1
            losses.append(loss.detach())
            norms.append(norm)
            if k % 20 == 0:
                _check(norms, k, lr)
                bar.set_postfix_str(f"step {k}, loss {float(torch.stack(losses).mean()):.4f}", refresh=False)
                losses.clear()
            bar.n = k if steps is not None else min(round(spent), bar.total)
            bar.update(0)
            if path is not None and k % every == 0:
                _check(norms, k, lr)
                _save(path, model, average, optim, k, clock() - began, extra)
        bar.close()
        _check(norms, k, lr)
        if path is not None:
            _save(path, model, average, optim, k, clock() - began, extra)
    return replace(model, net=copy.deepcopy(average.module).eval().requires_grad_(False))


def _check(norms: list[Tensor], k: int, lr: float) -> None:
    """Gradients up to step k were finite; told every 20 steps, before each checkpoint and at the end."""
    bad = ~torch.isfinite(torch.stack(norms)) if norms else torch.zeros(1, dtype=torch.bool)
    if bool(bad.any()):
        step = k - len(norms) + int(bad.nonzero()[0])
        raise FloatingPointError(f"the gradient is not finite at step {step}; lower lr (now {lr}) or check the data")
    norms.clear()


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    def update(avg: Any, cur: Any, k: Any) -> None:
        n = float(k)
        torch._foreach_lerp_(avg, cur, 1 - min(decay, (1 + n) / (10 + n)))

    return update


def _save(
    path: str | Path,
    model: Model,
    average: AveragedModel,
    optim: torch.optim.Optimizer,
    k: int,
    spent: float,
    extra: dict[str, Any] | None,
) -> None:
    assert isinstance(model.net, nn.Module)
    tensors = {f"ema.{n}": v for n, v in average.module.state_dict().items()}
    tensors |= {f"net.{n}": v for n, v in model.net.state_dict().items()}
    for i, state in optim.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{n}": v for n, v in state.items()}
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    checkpoint.save(path, tensors, {"model": checkpoint.describe(model), "step": k, "seconds": spent, **(extra or {})})


def _resume(path: Path, model: Model, average: AveragedModel, optim: torch.optim.Optimizer) -> tuple[int, float]:
    tensors, header = checkpoint.read(path)
    if header.get("model") != checkpoint.describe(model):
        raise ValueError(
            f"{path} is a checkpoint of another model; it holds {header.get('model')}, asked for is "
            f"{checkpoint.describe(model)}; give another path, or delete the file to start again"
        )
    if "rng.cpu" not in tensors:
        raise ValueError(f"{path} holds a finished model without its training state; give another path to train anew")
    assert isinstance(model.net, nn.Module)
    checkpoint.load_weights(model.net, tensors, "net.", path)
    checkpoint.load_weights(average.module, tensors, "ema.", path)
    average.n_averaged.fill_(header["step"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, v in tensors.items():
        if name.startswith("adam."):
            _, i, key = name.split(".")
            state.setdefault(int(i), {})[key] = v
    optim.load_state_dict({**optim.state_dict(), "state": state})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return header["step"], header["seconds"]

"""The sections of the quickstart page: each computes its figures, saves its pictures, states its claims."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import guidance
import samplers
from experiments.common import Claim, picture
from experiments.digits import Images, Judge, to_levels
from experiments.digits_clip import PLAIN, STYLED
from experiments.yardsticks import Features, gaussian_mixture_bits, pixel_bits
from samplers import grids, hooks
from scoresde import SDE, Model, Score, Streams, bits_per_dim, counted, denoised, log_prob, prior_sample
from scoresde.report import means, solver_doubt

Part = dict[str, Any]  # title, text, pictures [(file, caption)], tables [(head, rows)]


@dataclass(frozen=True)
class Run:
    """Everything a section needs."""

    model: Model
    sde: SDE
    data: Images
    held: Images
    judge: Judge
    clip: tuple[Any, Any]
    size: Any
    out: Path
    seed: int
    device: torch.device

    @property
    def classes(self) -> int:
        return len(self.data.names)

    def noise(self, stream: int, n: int) -> Streams:
        return Streams(self.seed * 1000 + stream, n)

    def start(self, noise: Streams) -> Tensor:
        return prior_sample(
            self.sde, torch.empty(len(noise.generators), *self.data.x.shape[1:], device=self.device), noise
        )

    def grid(self, n: int | None = None, **more: Any) -> Tensor:
        return grids.karras(self.sde, n or self.size.heun, t_end=0.01, **more)

    def sample(self, score: Score, n: int, stream: int, steps: int | None = None, **more: Any) -> Tensor:
        """n samples by Heun, 14 steps (fewer in a quick run) unless told."""
        noise = self.noise(stream, n)
        return samplers.heun(score, self.sde, self.start(noise), self.grid(steps), noise=noise, **more)


def labels(run: Run, n: int) -> Tensor:
    return torch.arange(n) % run.classes


def headline(run: Run) -> tuple[Part, list[Claim]]:
    """Class by CFG, stroke by CLIP, on one score."""
    y = labels(run, run.size.guided * run.classes).sort().values
    x, ink, right = {}, {}, {}
    for style in (None, "thin", "bold"):
        rows = []
        for c, name in enumerate(run.data.names):
            n = int((y == c).sum())
            score: Score = guidance.cfg(run.model.given(c), run.model, 1.5)
            if style is not None:
                text = STYLED[0].format(name, style)
                score = guidance.energy(score, run.sde, guidance.clip_energy(*run.clip, [text]), scale=40.0)
            rows.append(run.sample(score, n, c, churn=4.0 if style else 0.0))
        x[style] = torch.cat(rows)
        ink[style] = float(to_levels(x[style].cpu(), run.data.levels).float().mean())
        right[style] = run.judge.rate(x[style], y)
    first = torch.cat([x[s][:: run.size.guided] for s in ("thin", None, "bold")])
    file = picture(first, run.out / "headline.png", columns=run.classes, scale=8)
    table = (
        ("guidance", "read as the class", "mean ink"),
        [(s or "class only", f"{right[s]:.3f}", f"{ink[s]:.2f}") for s in ("thin", None, "bold")],
    )
    part = {
        "title": "Two guidances on one score",
        "text": "The class by classifier-free guidance (w = 1.5), the stroke by CLIP with the text "
        f"“{STYLED[0].format('…', 'thin')}” (top) and “{STYLED[0].format('…', 'bold')}” (bottom); in the middle the "
        "class alone. Columns share their starting noise. Ink is the mean grey level, 0 to "
        f"{run.data.levels - 1}.",
        "code": "energy(cfg(model.given(y), model, 1.5), sde, clip_energy(*clip, [text]), scale=40.0)",
        "pictures": [(file, "thin, class only, bold")],
        "tables": [table],
    }
    return part, [
        Claim("composed CFG x CLIP: read as the asked class", min(right["thin"], right["bold"]), ">=", 0.98),
        Claim("composed CFG x CLIP: mean ink, bold - thin", ink["bold"] - ink["thin"], ">=", 1.0),
    ]


def by_sampler(run: Run) -> tuple[Part, list[Claim]]:
    """The same network under every sampler."""
    n = max(2 * run.classes, run.size.sweep // 2)
    y = labels(run, n)
    steps = {"heun": 14, "ddim": 27, "flow_euler": 40, "ancestral": 50, "euler_maruyama": 80, "reverse_diffusion": 80,
             "predictor_corrector": 40, "ode": 1, "gotta_go_fast": 1, "midpoint": 14, "ralston": 14, "dpm_solver": 14,
             "singlestep": 9, "restart": 14, "seeds": 14}  # fmt: skip
    features = Features(run.data)
    rows, shown = [], []
    for name, sampler in samplers.SAMPLERS.items():
        score = counted(run.model.given(y))
        noise = run.noise(100, n)
        knobs = {"ode": {"rtol": 1e-3, "atol": 1e-3}, "angle": {"d": run.model.sigma_data}}.get(name, {})
        ts = run.grid(steps.get(name, 20))
        tick = time.perf_counter()
        x = sampler(score, run.sde, run.start(noise), ts, noise=noise, **knobs)
        seconds = time.perf_counter() - tick
        shown.append(x[: run.classes])
        distance = features.frechet(to_levels(x.cpu(), run.data.levels), run.held.x)
        rows.append((name, str(score.calls), f"{run.judge.rate(x, y):.3f}", f"{distance:.0f}", f"{seconds:.1f}"))
    pick = torch.from_numpy(np.random.default_rng(run.seed).permutation(len(run.data))[:n])
    floor = features.frechet(run.data.x[pick], run.held.x)
    rows.append(("real digits", "", f"{run.judge.rate_levels(run.held.x, run.held.y):.3f}", f"{floor:.0f}", ""))
    file = picture(torch.cat(shown), run.out / "samplers.png", columns=run.classes)
    return {
        "title": "Samples by sampler",
        "text": f"One network, {len(shown)} samplers, the same starting noise; picture and table share their rows. "
        f"{n} samples each; NFE counts network calls. The Frechet distance is on 30 principal components of the "
        "grey levels, against the held-out images; that of as many real training images is its floor.",
        "pictures": [(file, ", ".join(samplers.SAMPLERS))],
        "tables": [(("sampler", "NFE", "read as the class", "Frechet distance", "seconds"), rows)],
    }, []


def guidance_sweep(run: Run) -> tuple[Part, list[Claim]]:
    """Accuracy and diversity against the guidance weight."""
    features = Features(run.data)
    rows, shown, curve, claims = [], [], [], []
    d, steps = run.model.sigma_data, 2 * run.size.heun
    ts = grids.data_scale(run.sde, steps, d=d)
    for w in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0):
        n = run.size.samples if w in (1.0, 1.5) else run.size.sweep
        y = labels(run, n)
        score, noise = guidance.cfg(run.model.given(y), run.model, w), run.noise(200, n)
        x = samplers.angle(score, run.sde, run.start(noise), ts, d=d, tau=0.5, noise=noise)
        right = run.judge.rate(x, y)
        few = to_levels(x[: run.size.sweep].cpu(), run.data.levels)
        distance = features.frechet(few, run.held.x)
        shown.append(x[: run.classes])
        curve.append((w, right, distance))
        rows.append((f"{w:g}", str(n), f"{right:.3f}", f"{distance:.0f}"))
        if w in (1.0, 1.5):
            claims.append(Claim(f"samples read as the asked class, w = {w:g}", right, ">=", 0.975 if w == 1 else 0.995))
    ws, acc, fd = (list(v) for v in zip(*curve, strict=True))
    fig, left = plt.subplots(figsize=(5.4, 2.8), layout="constrained")
    left.plot(ws, acc, "o-", color="C0")
    left.set_xlabel("guidance weight w")
    left.set_ylabel("read as the class", color="C0")
    left.axhline(1 / run.classes, color="C0", lw=0.6, ls=":")
    right_axis = left.twinx()
    right_axis.plot(ws, fd, "s--", color="C3")
    right_axis.set_ylabel("Frechet distance", color="C3")
    fig.savefig(run.out / "guidance.png", dpi=120)
    plt.close(fig)
    file = picture(torch.cat(shown), run.out / "guidance_samples.png", columns=run.classes)
    return {
        "title": "Classifier-free guidance",
        "text": "s = s_u + w (s_c - s_u): w = 0 ignores the class, w = 1 is the conditional model, more trades "
        f"variety for certainty. angle with half the noise, {steps} calls, both scores in one batch.",
        "code": "cfg(model.given(y), model, w)",
        "pictures": [("guidance.png", "accuracy and Frechet distance"), (file, "rows: w = 0, 0.5, 1, 1.5, 2, 3, 5")],
        "tables": [(("w", "samples", "read as the class", "Frechet distance"), rows)],
    }, claims


def by_prompt(run: Run) -> tuple[Part, list[Claim]]:
    """The unconditional model, steered by CLIP alone."""
    n = run.size.guided
    y = torch.arange(run.classes).repeat_interleave(n)
    rows = []
    for c, name in enumerate(run.data.names):
        others = [PLAIN[0].format(k) for k in run.data.names if k != name]
        E = guidance.clip_energy(*run.clip, [PLAIN[0].format(name)], against=others, distance="softmax")
        score = guidance.energy(run.model, run.sde, E, scale=6.0)
        rows.append(run.sample(score, n, 300 + c, run.size.heun * 25 // 14, churn=25.0))
    x = torch.cat(rows)
    right = run.judge.rate(x, y)
    plain = run.judge.rate(run.sample(run.model, n * run.classes, 399), y)
    shown = torch.cat([r[: min(4, n)] for r in rows]).unflatten(0, (run.classes, -1)).transpose(0, 1).flatten(0, 1)
    file = picture(shown, run.out / "prompts.png", columns=run.classes)
    return {
        "title": "CLIP-guided, from an unconditional model",
        "text": f"“{PLAIN[0].format(run.data.names[0])}” to “{PLAIN[0].format(run.data.names[-1])}”, a column each: "
        "the gradient of CLIP's log-probability among all of them through the denoiser, with all the re-noising "
        f"Heun allows. An independent classifier reads {right:.3f} of them as prompted; without guidance {plain:.3f}.",
        "code": 'E = clip_energy(*clip, ["a handwritten seven"], against=others, distance="softmax")\n'
        "energy(model, sde, E, scale=6.0)",
        "pictures": [(file, "a column for each prompt")],
        "tables": [],
    }, [Claim("CLIP-guided unconditional samples read as prompted", right, ">=", 0.95)]


def likelihood(run: Run) -> tuple[Part, list[Claim]]:
    """Held-out bits/dim, converged and dequantised, beside its yardsticks."""
    n = min(run.size.rated, len(run.held))
    D, width = run.data.x[0].numel(), run.data.bin_width

    def bits(images: Images, conditional: bool, steps: int, method: str = "multistep", centres: bool = False) -> Tensor:
        k = images.densities(slice(0, n), run.noise(401, n))
        x = (2 * (images.x[:n] + 0.5) / images.levels - 1).to(k) if centres else k
        lp = log_prob(
            run.model.given(images.y[:n]) if conditional else run.model, run.sde, x.to(run.device),
            d=run.model.sigma_data, probes=2, noise=run.noise(402, n), method=method, steps=steps,
        )  # fmt: skip
        return bits_per_dim(lp, D, width).cpu()

    few = 3 * run.size.steps  # network calls
    value, refined = bits(run.held, True, few), bits(run.held, True, 2 * few)
    moved = float((refined - value).mean())
    held = means("held-out", refined, "bits/dim", doubt=solver_doubt(value, refined) / 2)
    seen = means("training", bits(run.data, True, few), "bits/dim")
    unlabelled = means("no label", bits(run.held, False, few), "bits/dim")
    mixture = gaussian_mixture_bits(run.data, run.held, run.seed, run.size.mixtures)
    bars = {row.name: "{} ± {}".format(*row.cells()) for row in (held, seen, unlabelled)}
    rows: list[tuple[str, ...]] = [
        ("uniform over the levels", f"{np.log2(run.data.levels):.2f}", ""),
        ("best Gaussian mixture tried", f"{mixture:.2f}", ""),
        ("independent pixels", f"{pixel_bits(run.data, run.held):.2f}", ""),
        ("this model, no label given", bars["no label"], ""),
        ("this model, training images", bars["training"], "of as many images: the gap is overfitting"),
        ("this model, held-out images", bars["held-out"], f"half the calls move it by {-moved:+.4f}"),
        ("false: two Euler steps", f"{float(bits(run.held, True, 2, 'euler').mean()):.2f}", "a solver error"),
        ("false: bin centres", f"{float(bits(run.held, True, few, centres=True).mean()):.2f}", "no dequantisation"),
    ]
    _, _, doubt, interval = held.cells()
    part = {
        "title": "Likelihood",
        "text": f"log p by the probability flow, uniform dequantisation, of {n} held-out images given their class: "
        f"{2 * few} network calls on Chebyshev points, each with two Hadamard probes of the trace. The bar is one "
        f"standard error over images, probes and dequantisation; 95 % interval of the held-out value {interval}, in "
        f"which the solver has ±{doubt}. Lower is better, if it is true: the last two rows show what a coarse "
        "solver or missing dequantisation would print instead.",
        "code": "bits_per_dim(log_prob(model.given(y), sde, dequantize(k, 17, -1, 1)), D=64, bin_width=2 / 17)",
        "pictures": [],
        "tables": [(("density", "bits/dim", ""), rows)],
    }
    return part, [
        Claim("held-out bits/dim, given the class", held.value, "<=", 1.80),
        Claim("held-out bits/dim: change when the steps are doubled", abs(moved), "<=", 0.005),
    ]


def by_likelihood(run: Run) -> tuple[Part, list[Claim]]:
    """Bayes' rule over the class likelihoods."""
    n = min(run.size.classified, len(run.held))
    x, y = run.held.densities(slice(0, n), run.noise(501, n)).to(run.device), run.held.y[:n]
    how: Part = {"method": "multistep", "steps": 20, "d": run.model.sigma_data, "probes": 1}
    lps = [log_prob(run.model.given(c), run.sde, x, noise=run.noise(502, n), **how) for c in range(run.classes)]
    guess = torch.stack(lps, 1).argmax(1).cpu()
    right = float((guess == y).float().mean())
    table = torch.zeros(run.classes, run.classes, dtype=torch.long)
    table.index_put_((y, guess), torch.ones_like(y), accumulate=True)
    rows = [(name, *(str(int(v)) if v else "·" for v in row)) for name, row in zip(run.data.names, table, strict=True)]
    return {
        "title": "Classified by likelihood",
        "text": f"argmax over c of log p(x | c): {right:.3f} of {n} held-out images, by a model never asked to "
        "classify. Rows: what it is; columns: what it is taken for. All classes share probe and dequantisation.",
        "code": "torch.stack([log_prob(model.given(c), sde, x) for c in range(10)]).argmax(0)",
        "pictures": [],
        "tables": [(("", *run.data.names), rows)],
    }, [Claim("held-out images classified by Bayes' rule", right, ">=", 0.95)]


def inpainting(run: Run) -> tuple[Part, list[Claim]]:
    """The right half from the left."""
    n = run.classes
    rows = torch.stack([(run.held.y == c).nonzero()[0, 0] for c in range(n)])
    known = (2 * (run.held.x[rows] + 0.5) / run.held.levels - 1).float().to(run.device)
    mask = torch.zeros_like(known)
    mask[..., : known.shape[-1] // 2] = 1
    out = [known, torch.where(mask.bool(), known, torch.zeros_like(known))]
    for k in range(3):
        noise = run.noise(600 + k, n)
        hook = hooks.inpaint(run.sde, known, mask, noise)
        ts = run.grid(40, to_zero=True)
        out.append(samplers.predictor_corrector(run.model, run.sde, run.start(noise), ts, noise=noise, on_step=hook))
    file = picture(torch.cat(out), run.out / "inpainting.png", columns=n)
    return {
        "title": "Inpainting",
        "text": "Held-out images (top), their left halves, and three completions by the unconditional model: the known "
        "half is replaced at every step, the corrector brings the halves together.",
        "code": "predictor_corrector(model, sde, x, ts, on_step=hooks.inpaint(sde, known, mask))",
        "pictures": [(file, "original, what is given, three completions")],
        "tables": [],
    }, []


def image_to_image(run: Run) -> tuple[Part, list[Claim]]:
    """Each image as the next class."""
    n = run.classes
    rows = torch.stack([(run.held.y == c).nonzero()[1, 0] for c in range(n)])
    image = (2 * (run.held.x[rows] + 0.5) / run.held.levels - 1).float().to(run.device)
    target = (torch.arange(n) + 1) % n
    out = [image]
    for strength in (0.3, 0.45, 0.6):
        noise = run.noise(700, n)
        ts = run.grid(strength=strength)
        x = grids.perturb(run.sde, image, ts[0], noise)
        out.append(samplers.heun(guidance.cfg(run.model.given(target), run.model, 2.0), run.sde, x, ts))
    file = picture(torch.cat(out), run.out / "image_to_image.png", columns=n)
    return {
        "title": "Image to image",
        "text": "Each image (top) is noised part of the way and denoised as the next class: strength 0.3, 0.45, 0.6.",
        "code": "ts = grids.karras(sde, 14, strength=0.45);  heun(score, sde, perturb(sde, image, ts[0]), ts)",
        "pictures": [(file, "image, then rising strength")],
        "tables": [],
    }, []


def denoising(run: Run) -> tuple[Part, list[Claim]]:
    """A trajectory: the state, and what the network sees in it."""
    n = run.classes
    score = run.model.given(torch.arange(n))
    states: list[Tensor] = []
    noise = run.noise(800, n)
    ts = run.grid()
    samplers.heun(score, run.sde, run.start(noise), ts, on_step=hooks.trajectory(states, every=2))
    seen = [
        denoised(score(x.to(run.device), t), x.to(run.device), t, run.sde)
        for x, t in zip(states, ts[2::2], strict=True)
    ]
    state = [x / (run.sde.sigma(t) ** 2 + 0.5).sqrt() for x, t in zip(states, ts[2::2], strict=True)]
    files = [
        picture(torch.cat(rows), run.out / f"{name}.png", columns=n)
        for name, rows in (("trajectory", state), ("trajectory_x0", seen))
    ]
    return {
        "title": "Denoising",
        "text": "From noise (top) to digits (bottom), every second step of Heun's: the state, scaled, and the "
        "network's estimate E[x0 | x] of where it will end.",
        "code": "heun(score, sde, x, ts, on_step=hooks.trajectory(states, every=2))",
        "pictures": [(files[0], "the state"), (files[1], "the estimate of x0")],
        "tables": [],
    }, []

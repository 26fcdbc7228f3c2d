"""What a guidance does to the image, to look at."""

from pathlib import Path

from torch import Tensor

from guidance.energy import Energy, estimate, gradient
from scoresde.files import whole
from scoresde.types import SDE, Score, like


def gradient_picture(
    score: Score,
    sde: SDE,
    E: Energy,
    x: Tensor,
    t: Tensor,
    *,
    through: bool = True,
    sigma_data: float = 0.5,
    file: str | Path | None = None,
) -> tuple[Tensor, Tensor]:
    """x0 and what `energy` of scale 1 adds to it, -(sigma^2/alpha) grad_x E(x0(x)), both (B, C, H, W).

    x, t:    a noisy state and its time, as in a hook (i, t, x)
    through, sigma_data: as in `energy`
    file:    a PNG of both (by matplotlib): above x0 in grey levels with its E, below the push, red where the image
             is made brighter, blue where darker, each at its own range
    One network call, with through=True one backward pass, two gradients of E.
    """
    if x.ndim != 4:
        raise ValueError(f"a picture is made of images (B, C, H, W), got {tuple(x.shape)}")
    _, x0, pull = estimate(score, sde, x, t, through, sigma_data)
    push = -like(sde.sigma(t) ** 2 / sde.alpha(t), x) * pull(gradient(E, x0))
    if file is not None:
        _draw(x0.detach(), push.detach(), E(x0).detach(), Path(file))
    return x0, push


def _draw(x0: Tensor, push: Tensor, value: Tensor, file: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as err:
        raise ModuleNotFoundError(f"a picture needs matplotlib ({err}); pip install 'scoresde[experiments]'") from err
    n = len(x0)
    figure = Figure(figsize=(1.2 * n + 0.2, 2.7), layout="constrained")
    axes = figure.subplots(2, n, squeeze=False)
    for i in range(n):
        image, change = x0[i].float().mean(0).cpu().numpy(), push[i].float().mean(0).cpu().numpy()
        most = float(abs(change).max()) or 1.0
        axes[0, i].imshow(image, cmap="gray")
        axes[0, i].set_title(f"E = {float(value[i]):.2f}", fontsize=7)
        axes[1, i].imshow(change, cmap="RdBu_r", vmin=-most, vmax=most)
        axes[1, i].set_title(f"±{most:.2g}", fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    with whole(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")

"""The report page: one HTML file, its pictures beside it, nothing from elsewhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import Claim
from scoresde.files import whole


def write_page(path: Path, parts: Sequence[dict[str, Any]], claims: Sequence[Claim], facts: dict[str, Any]) -> Path:
    """Fill report.html with the sections, the claims and the facts of the run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    text = env.get_template("report.html").render(parts=parts, claims=claims, facts=facts)
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path

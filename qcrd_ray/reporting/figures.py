"""Figures as SVG that takes the colours of the page around it, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours: told apart by the colour-blind too."""
_INK, _FAINT = "#123456", "#123457"
"""Stand-ins for the page's colours, which a drawing library does not know."""


@contextmanager
def figure(width: float = 6.4, height: float = 3.6, fitted: bool = True) -> Iterator[tuple[Any, Any, list[str]]]:
    """A matplotlib figure and its axes to draw on. The list holds the SVG text once the block has ended.

    Args:
        fitted: make room for the labels that there are, which doubles the time; else there is as much as numbers need.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a dollar sign is one
        "svg.hashsalt": "qcrd_ray",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "axes.titlecolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _FAINT,
        "grid.alpha": 0.25,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
        "legend.frameon": False,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
    }
    made: list[str] = []
    with matplotlib.rc_context(style):
        drawing, axes = plt.subplots(figsize=(width, height), layout="constrained" if fitted else None)
        if not fitted:
            drawing.subplots_adjust(
                left=0.78 / width, right=1 - 0.12 / width, bottom=0.52 / height, top=1 - 0.12 / height
            )
        try:
            yield drawing, axes, made
            made.append(_svg(drawing))
        finally:
            plt.close(drawing)


def _svg(drawing: Any) -> str:
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\swidth="[^"]*pt"|\sheight="[^"]*pt"', "", text, count=2)
    for index, colour in enumerate(PALETTE):  # a dark page has lighter ones
        text = text.replace(colour.lower(), f"var(--colour-{index}, {colour})")
    return text.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")


def short(text: str, length: int = 24) -> str:
    """A label that leaves room for the figure. Names of runs differ at their ends: the middle of a long one goes."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(flat) > length:
        end = length // 2
        flat = f"{flat[: length - 1 - end]}…{flat[-end:]}"
    return f"\u200b{flat}" if flat.startswith("_") else flat  # a legend leaves out what begins with a low line


def standalone(svg: str) -> str:
    """The same as a file of its own, dark on white."""
    colours = "<style>svg{--ink:#1b1f24;--faint:#8a929c;background:#fff}</style>"
    head, end, rest = svg.partition(">")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{end}{colours}{rest}'

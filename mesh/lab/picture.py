"""The demo's picture: our latencies beside the paper's, on one logarithmic axis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: label (two lines at most), mean and standard deviation in ms, ours or the paper's."""

    label: str
    mean_ms: float
    std_ms: float
    is_paper: bool


PAPER_COLOUR, OUR_COLOUR = "#b9bec6", "#1f6f8b"


def draw_bars(bars: list[Bar], *, title: str, note: str, path: Path) -> None:
    """Write a PNG of horizontal bars, the first bar on top."""
    figure = Figure(figsize=(10, 1.1 + 0.72 * len(bars)), dpi=130)
    axes = figure.subplots()
    places = range(len(bars))
    axes.barh(
        places,
        [bar.mean_ms for bar in bars],
        color=[PAPER_COLOUR if bar.is_paper else OUR_COLOUR for bar in bars],
        height=0.62,
    )
    for place, bar in zip(places, bars, strict=True):
        axes.text(
            bar.mean_ms * 1.12,
            place,
            f"{bar.mean_ms:.{_digits(bar)}f} ± {bar.std_ms:.{_digits(bar)}f} ms",
            va="center",
            fontsize=12,
            fontweight="normal" if bar.is_paper else "bold",
            color="#30343b",
        )
    axes.set_yticks(list(places), [bar.label for bar in bars], fontsize=11.5)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.1, max(bar.mean_ms for bar in bars) * 12)
    axes.set_xticks([0.1, 1, 10, 100, 1000], ["0.1", "1", "10", "100", "1000"])
    axes.set_xlabel("milliseconds per 256-bit key, logarithmic (mean ± standard deviation)", fontsize=10.5)
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=12)
    axes.legend(
        handles=[Patch(color=OUR_COLOUR, label="measured here"), Patch(color=PAPER_COLOUR, label="paper")],
        loc="lower right",
        frameon=False,
        fontsize=11,
    )
    axes.grid(axis="x", which="major", color="#e4e6ea")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.text(0.01, 0.01, note, fontsize=8.5, color="#6b7280")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path)


def _digits(bar: Bar) -> int:
    return 2 if bar.mean_ms < 10 else 0

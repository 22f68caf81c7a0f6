"""The paper run's picture: every latency over time, and how often each occurs, beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mesh.lab.measure import PAPER_DEC_MS, PAPER_ENC_MS, Sample, summarise

_COLOURS = {
    "enc_on_demand": "#1f6f8b",
    "enc_reserve": "#3a9d5d",
    "enc_buffered": "#c77d22",
    "dec": "#7a5195",
}
_PAPER_COLOUR, _TEXT_COLOUR = "#b9bec6", "#30343b"
_TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True, slots=True)
class Series:
    """One mode: its name in the result file, its title, its samples."""

    name: str
    title: str
    samples: Sequence[Sample] = field(repr=False)


def draw_paper(series: Sequence[Series], *, round_trip_ms: float, note: str, path: Path) -> None:
    """Write a PNG: latencies over time on the left, histograms on the right, one logarithmic axis."""
    figure = Figure(figsize=(13, 7), dpi=120)
    over_time, counts = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    values = [ms for one in series for _, ms in one.samples]
    low, high = 0.7 * min(values), 1.6 * max(*values, sum(PAPER_ENC_MS))
    edges = np.geomspace(low, high, 70)
    for one in series:
        colour = _COLOURS[one.name]
        latencies = [ms for _, ms in one.samples]
        summary = summarise(latencies)
        label = f"{one.title}: {_ms(summary['mean'])} ± {_ms(summary['std'])} ms"
        over_time.plot(
            [at_s for at_s, _ in one.samples], latencies, ".", color=colour, markersize=3.5, label=label
        )
        weights = np.full(len(latencies), 100 / len(latencies))
        style = {"orientation": "horizontal", "color": colour, "weights": weights}
        counts.hist(latencies, bins=edges, histtype="stepfilled", alpha=0.25, **style)
        counts.hist(latencies, bins=edges, histtype="step", linewidth=1.6, **style)
    for axes in (over_time, counts):
        _mark(axes, PAPER_ENC_MS, "paper, get a key: 365 ± 81 ms" if axes is over_time else "")
        _mark(axes, PAPER_DEC_MS, "paper, fetch it: 18 ± 5 ms" if axes is over_time else "")
        axes.axhline(round_trip_ms, color="#b03a2e", linewidth=1.2, linestyle="--")
        axes.grid(axis="y", which="major", color="#eceef1", zorder=0)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    over_time.annotate(
        f"round trip of the ocean: {round_trip_ms:g} ms",
        xy=(0.005, round_trip_ms),
        xycoords=("axes fraction", "data"),
        xytext=(0, -11),
        textcoords="offset points",
        color="#b03a2e",
        fontsize=10,
    )
    over_time.set_yscale("log")
    over_time.set_ylim(low, high)
    over_time.set_yticks([tick for tick in _TICKS if low <= tick <= high])
    over_time.set_yticklabels([f"{tick:g}" for tick in _TICKS if low <= tick <= high])
    over_time.minorticks_off()
    over_time.set_ylabel("milliseconds per 256-bit key, logarithmic", fontsize=11)
    over_time.set_xlabel("seconds of measuring", fontsize=11)
    counts.set_xlabel("per cent of the mode's keys", fontsize=11)
    over_time.set_title(
        "CAN-Site-X to UK-Site-Z: QKD, ETSI 020, DSKE across an ocean, ETSI 020, QKD",
        loc="left",
        fontsize=14,
        fontweight="bold",
        pad=12,
    )
    figure.legend(
        loc="lower center", ncols=2, frameon=False, fontsize=11, bbox_to_anchor=(0.5, 0.03), markerscale=3
    )
    figure.text(0.01, 0.012, note, fontsize=8.5, color="#6b7280")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path)


def _mark(axes: Axes, mean_and_std: tuple[float, float], text: str) -> None:
    """The paper's mean, and a band of one standard deviation around it."""
    mean, std = mean_and_std
    axes.axhspan(mean - std, mean + std, color=_PAPER_COLOUR, alpha=0.35, linewidth=0)
    axes.axhline(mean, color=_PAPER_COLOUR, linewidth=1.5)
    if text:
        axes.annotate(
            text,
            xy=(0.995, mean),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=10,
            color=_TEXT_COLOUR,
            bbox={"boxstyle": "square,pad=0.15", "color": "white", "alpha": 0.75},
        )


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"

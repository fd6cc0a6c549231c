"""PNG plots of what bench_fleet measured.

In: {policy: summary} of one workload (metrics.py). Out: one file per plot. Needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")

Summaries = Mapping[str, Mapping[str, Any]]


def plot_all(workload: str, summaries: Summaries, folder: Path) -> list[Path]:
    """Write every plot of one workload; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if len(_steps(next(iter(summaries.values())))) > 1:
        files.append(_over_rate(workload, summaries, folder))
    files.append(_bars(workload, summaries, folder))
    files.append(_shares(workload, summaries, folder))
    return files


def _steps(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted((step for step in summary["stages"] if not step["warm_up"]), key=lambda step: step["rate_per_s"])


def _over_rate(workload: str, summaries: Summaries, folder: Path) -> Path:
    """Time to first token and output tokens/s over the request rate."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    for axis, (name, title) in zip(
        axes,
        [
            ("ttft_p50_s", "time to first token p50 (s)"),
            ("ttft_p90_s", "time to first token p90 (s)"),
            ("output_tokens_per_s", "output tokens/s"),
        ],
        strict=True,
    ):
        for policy, summary in summaries.items():
            steps = _steps(summary)
            axis.plot([step["rate_per_s"] for step in steps], [step[name] for step in steps], marker=".", label=policy)
        axis.set_title(title)
        axis.set_xlabel("requests/s")
        axis.grid(alpha=0.3)
        if name.startswith("ttft"):
            axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    return _save(figure, workload, "rate", folder)


def _bars(workload: str, summaries: Summaries, folder: Path) -> Path:
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(summaries) + 1.5))
    names = list(summaries)[::-1]
    bars = axis.barh(names, [summaries[name]["overall"]["hit_rate"] for name in names])
    axis.bar_label(bars, fmt="%.3f", padding=3)
    axis.set_xlim(0, 1.1)
    axis.set_title("token hit rate, warm-up left out")
    return _save(figure, workload, "hit_rate", folder)


def _shares(workload: str, summaries: Summaries, folder: Path) -> Path:
    """Work relative to a fair share. By rank: which replica is the busiest differs from seed to seed."""
    figure, axis = plt.subplots(figsize=(10, 4.5))
    width = 0.8 / len(summaries)
    for i, (policy, summary) in enumerate(summaries.items()):
        shares = summary["overall"]["ranked_work_share"]
        axis.bar([replica + i * width for replica in range(len(shares))], shares, width, label=policy)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xlabel("replica, busiest first")
    axis.set_title("work per replica, fair share = 1 (mean over seeds)")
    axis.legend(fontsize=8, ncols=2)
    return _save(figure, workload, "share", folder)


def _save(figure: Any, workload: str, kind: str, folder: Path) -> Path:
    figure.suptitle(workload)
    figure.tight_layout()
    path = folder / f"fleet_{workload}_{kind}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path

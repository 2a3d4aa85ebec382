"""The tour's picture: perplexity and memory by position."""

from pathlib import Path

from .reading import Reading

COLOURS = {"original": "tab:red", "converted": "tab:blue"}


def draw(path: Path, readings: list[Reading], edge: int, edge_name: str, title: str) -> None:
    """Write a PNG: perplexity (log scale, averaged over chunks) and cache size by position; a line at `edge` tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    perplexity_axes, memory_axes = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for reading in readings:
        bounds = zip([0, *reading.positions], reading.positions, strict=False)
        means = [reading.nll[start:stop].mean().exp().item() for start, stop in bounds]
        style = {"color": COLOURS[reading.label], "label": reading.label, "linewidth": 2}
        perplexity_axes.plot(reading.positions, means, **style)
        memory_axes.plot(reading.positions, reading.cache_mb, **style)
    for axes in (perplexity_axes, memory_axes):
        axes.axvline(edge, color="gray", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)
    perplexity_axes.set_yscale("log")
    perplexity_axes.set_ylabel("perplexity (lower is better)")
    perplexity_axes.annotate(
        edge_name, (edge, 0.97), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", va="top", color="gray",
    )  # fmt: skip
    perplexity_axes.legend()
    perplexity_axes.set_title(title)
    memory_axes.set_ylabel("cache, MB")
    memory_axes.set_ylim(bottom=0)
    memory_axes.set_xlabel("position in the text, tokens")
    figure.savefig(path, dpi=120, format="png")

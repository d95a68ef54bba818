"""The plot of ``docs/accuracy.md``: KL against effective bits, a panel for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accuracy_bars import Point
from accuracy_caches import AVERAGE, BARE, PAPER, UNIFORM

MOST_BITS = 5.2
"""Beyond it there is only FP8, and KVQuant as its code stores 4 bits; both are in the tables."""

OURS = {
    AVERAGE: ("black", "-"),
    UNIFORM: ("black", "--"),
    BARE: ("gray", "--"),
    PAPER: ("gray", ":"),
}
MARKERS = "osD^v<>pP*Xh"


def write_plot(path: Path, panels: Mapping[str, Mapping[str, Sequence[Point]]]) -> None:
    """Draw panels by title, of settings by method, as SVG; the same points give the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    # Text stays text, and identifiers do not depend on the time.
    with mpl.rc_context({"svg.hashsalt": "kvq", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(5 * len(panels), 6.5), sharey=True, layout="constrained"
        )
        styles = _styles(list(dict.fromkeys(name for one in panels.values() for name in one)))
        for axis, (title, methods) in zip(axes, panels.items(), strict=True):
            for method, points in methods.items():
                shown = sorted(
                    (p for p in points if p.bits <= MOST_BITS), key=lambda point: point.bits
                )
                axis.plot(
                    [p.bits for p in shown], [p.kl for p in shown], label=method, **styles[method]
                )
            axis.set(title=title, xlabel="effective bits", yscale="log", xlim=(2, MOST_BITS))
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axes[0].set_ylabel("KL to the unquantized model, nats a token")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _styles(methods: Sequence[str]) -> dict[str, dict[str, object]]:
    """A colour and a marker for each method; ours in black."""
    import matplotlib as mpl

    colours = mpl.colormaps["tab20"]
    found: dict[str, dict[str, object]] = {}
    for place, method in enumerate(methods):
        if method in OURS:
            colour, line = OURS[method]
            found[method] = {"color": colour, "linestyle": line, "marker": "o", "linewidth": 2}
        else:
            marker = MARKERS[place % len(MARKERS)]
            found[method] = {
                "color": colours(place % 20), "marker": marker, "markersize": 4, "linewidth": 0.9,
            }  # fmt: skip
    return found

"""What all plots of results share: their style, where the machine and the legend stand, and axes."""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timing import described

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Steps of a logarithmic axis within a decade, where the axis spans little more than one.
FINE, COARSE = (1, 1.5, 2, 3, 4, 5, 7), (1,)
#: Inches of a figure with one row of the legend, of each further row, and of the machine below them.
HEIGHT, LEGEND_ROW, FOOT = 4.2, 0.22, 0.16
#: Letters of the legend's font in an inch, and letters that a line's sample takes the room of.
LETTERS_PER_INCH, LETTERS_PER_LINE = 12, 7


@contextlib.contextmanager
def figure_of(
    path: Path, where: Mapping[str, str], size: tuple[float, float], title: str | None = None
) -> Iterator[Figure]:
    """A figure in the style of all plots; saved as ``path`` at the end, with one legend of all lines below its axes.

    Args:
        path: the PNG.
        where: the machine, as the results name it.
        size: width and height in inches, of which the height includes the first row of the legend.
        title: what the figure shows; the machine then stands at the foot. Where there is none, the machine, on which
            the times of a plot depend, is the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with plt.rc_context({**style, "grid.alpha": 0.25, "axes.titlesize": 11}):
        figure = plt.figure(figsize=size, layout="constrained")
        try:
            yield figure
            lines = {}
            for axis in figure.axes:
                for line, label in zip(*axis.get_legend_handles_labels()):
                    lines.setdefault(label, line)
            letters = max(map(len, lines)) + LETTERS_PER_LINE
            columns = min(len(lines), int(figure.get_figwidth() * LETTERS_PER_INCH / letters)) or 1
            height = size[1] + LEGEND_ROW * (math.ceil(len(lines) / columns) - 1)
            figure.set_figheight(height)
            legend = figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, frameon=False)
            if title is None:
                figure.suptitle(described(where), fontsize=9)
            else:
                letters = int(figure.get_figwidth() * LETTERS_PER_INCH * 0.9)
                figure.suptitle("\n".join(textwrap.fill(line, letters) for line in title.splitlines()), fontsize=11.5)
                figure.text(0.995, 0.05 / height, described(where), fontsize=6.5, color="0.55", ha="right")
                foot = (0, FOOT / height, 1, 1 - FOOT / height)
                figure.get_layout_engine().set(rect=foot)
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # it makes room for a legend at the lower edge alone
                legend.set_bbox_to_anchor(foot, figure.transFigure)
            figure.savefig(path, dpi=130)
        finally:
            plt.close(figure)


@contextlib.contextmanager
def panels(
    count: int, path: Path, where: Mapping[str, str], height: float = HEIGHT, title: str | None = None, **settings
) -> Iterator[Sequence]:
    """``count`` axes side by side in a figure of :func:`figure_of`."""
    with figure_of(path, where, (max(8, 4.3 * count), height), title) as figure:
        yield figure.subplots(1, count, squeeze=False, **settings)[0]


def plain_logarithmic(axis, ticks: Sequence[float] | None = None) -> None:
    """Make ``axis`` (an ``xaxis`` or ``yaxis``) logarithmic with plain numbers for ticks: 6, not 6 x 10^0.

    Args:
        ticks: where they are; chosen by the axis' limits if not given.
    """
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    subs = FINE if high / low < 30 else COARSE
    axis.set_major_locator(FixedLocator(ticks) if ticks is not None else LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())

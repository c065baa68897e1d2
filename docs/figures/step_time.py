#!/usr/bin/env python
"""Draw docs/images/step_time.svg from the tables in docs/performance.md: time per part of a training step."""

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1]
COLOURS = {'backbone': '#4c78a8', 'neck': '#72b7b2', 'decode head': '#f58518', 'losses': '#e45756', 'other': '#bab0ac'}


def main() -> None:
    """Read the rows of the table below the heading "Where the time of a step goes"."""
    text = (DOCS / 'performance.md').read_text().split('## Where the time of a step goes')[1].split('\n## ')[0]
    rows = re.findall(r'^\| ([a-z ,]+) \| ([\d.]+) \| ([\d.]+) \|', text, re.MULTILINE)
    figure = Figure((7.5, 2.2), facecolor='white')
    axes = figure.add_axes((0.19, 0.24, 0.78, 0.52))
    names = ["mmseg's heads", 'these heads']
    start = [0.0, 0.0]
    for name, *seconds in rows:
        if name not in COLOURS:
            continue
        values = [float(value) for value in seconds]
        axes.barh(names, values, left=start, color=COLOURS[name], label=name)
        for row, value in enumerate(values):
            if value > 4:
                axes.text(start[row] + value / 2, row, f'{value:.0f} s', ha='center', va='center', color='white')
            start[row] += value
    axes.invert_yaxis()
    axes.set_xlabel('seconds per step, D1 + UPerNet, two 1024 x 1024 images, two CPU cores')
    axes.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='upper center', ncols=len(COLOURS), frameon=False)
    figure.savefig(DOCS / 'images/step_time.svg')


if __name__ == '__main__':
    main()

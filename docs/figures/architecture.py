#!/usr/bin/env python
"""Draw docs/images/architecture.svg and outlook_attention.svg, the figures of docs/how_it_works.md."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

IMAGES = Path(__file__).parents[1] / 'images'
CONVOLUTION, OUTLOOK, GLOBAL, HEAD, MAP = '#cfe3f7', '#ffd9a8', '#d7ccf0', '#cdebc9', '#ffffff'
INK = '#222222'


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A labelled box whose lower left corner is (x, y)."""
    style = 'round,pad=0,rounding_size=0.12'
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, lw=1))
    axes.text(x + width / 2, y + height / 2, text, ha='center', va='center', fontsize=8.5, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate('', end, start, arrowprops=dict(arrowstyle='-|>', color=INK, lw=1, shrinkA=0, shrinkB=0))


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure((width * 0.75, height * 0.75), facecolor='white')
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), aspect='equal')
    axes.axis('off')
    return figure, axes


def architecture() -> Figure:
    """The backbone from left to right; its four maps go down to neck and head."""
    figure, axes = canvas(15.4, 6.2)
    top, height = 4.4, 1.2
    parts = [
        ('image\n3 x H x W', MAP, 1.5),
        ('stem\n4 convolutions', CONVOLUTION, 1.8),
        ('stage 1\nOutlookers', OUTLOOK, 2.0),
        ('downsample\n2 x 2', CONVOLUTION, 1.6),
        ('stage 2\nTransformers', GLOBAL, 1.9),
        ('stage 3\nTransformers', GLOBAL, 1.9),
        ('stage 4\nTransformers', GLOBAL, 1.9),
    ]
    x, edges = 0.2, []
    for text, colour, width in parts:
        box(axes, x, top, width, height, text, colour)
        if edges:
            arrow(axes, (edges[-1][1], top + height / 2), (x, top + height / 2))
        edges.append((x, x + width))
        x += width + 0.32
    between = (edges[3][1] + edges[4][0]) / 2
    axes.text(between, top + height + 0.12, '+ position embedding', ha='center', va='bottom', fontsize=7.5, color=INK)
    for stage, (strides, scale) in enumerate([((8, 4), 'x 2'), ((16, 8), 'x 2'), ((16, 16), ''), ((16, 32), 'x 1/2')]):
        left, right = edges[(2, 4, 5, 6)[stage]]
        middle = (left + right) / 2
        arrow(axes, (middle, top), (middle, 3.45))
        axes.text(middle + 0.1, 3.9, f'norm, stride {strides[0]}', fontsize=7.5, va='center', color=INK)
        box(axes, left, 2.65, right - left, 0.8, f'neck {scale}'.strip(), CONVOLUTION)
        arrow(axes, (middle, 2.65), (middle, 1.6))
        axes.text(middle + 0.1, 2.1, f'stride {strides[1]}', fontsize=7.5, va='center', color=INK)
    box(axes, edges[2][0], 0.8, edges[6][1] - edges[2][0], 0.8, 'UPerNet or SegFormer head', HEAD)
    arrow(axes, (edges[2][0], 1.2), (edges[1][1] - 0.1, 1.2))
    box(axes, edges[0][0], 0.8, edges[1][1] - 0.1 - edges[0][0], 0.8, 'logits, resized to H x W', MAP)
    return figure


def outlook_attention() -> Figure:
    """One window: the token in its centre predicts how its nine tokens mix."""
    figure, axes = canvas(13.2, 4.6)

    def grid(x: float, y: float, rows: int, side: float, shade) -> None:
        for row in range(rows):
            for column in range(rows):
                place = x + column * side, y + (rows - 1 - row) * side
                axes.add_patch(Rectangle(place, side, side, facecolor=shade(row, column), edgecolor=INK, lw=0.8))

    def title(x: float, text: str) -> None:
        axes.text(x, 4.2, text, ha='center', va='center', fontsize=8.5, color=INK)

    inside = {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}
    grid(0.3, 0.9, 5, 0.56, lambda r, c: '#e08a1e' if (r, c) == (2, 2) else OUTLOOK if (r, c) in inside else MAP)
    title(1.7, 'tokens: a 3 x 3 window\naround every second token')
    arrow(axes, (3.3, 2.3), (4.3, 2.3))
    axes.text(3.8, 2.5, 'linear,\nsoftmax', ha='center', va='bottom', fontsize=7.5, color=INK)
    grid(4.5, 1.0, 9, 0.29, lambda r, c: f'{0.98 - 0.55 * ((r * 5 + c * 7 + r * c) % 9) / 9:.2f}')
    title(5.8, 'predicted by the centre:\n9 x 9 weights per head')
    axes.text(7.75, 2.3, '×', ha='center', va='center', fontsize=15, color=INK)
    grid(8.2, 1.46, 3, 0.56, lambda r, c: OUTLOOK)
    title(9.05, 'nine values\nof the window')
    arrow(axes, (10.1, 2.3), (11.0, 2.3))
    grid(11.2, 1.46, 3, 0.56, lambda r, c: '#cdebc9')
    title(12.05, 'nine outputs, added\nwhere windows overlap')
    return figure


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for draw in (architecture, outlook_attention):
        draw().savefig(IMAGES / f'{draw.__name__}.svg', metadata=dict(Date=None))


if __name__ == '__main__':
    main()

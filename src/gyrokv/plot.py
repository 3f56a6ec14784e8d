"""The picture of a comparison: mean KL divergence against bytes per token, one panel per model."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FORMATS = ("png", "svg")
INK, MUTED, SAME, MIXED = "#1b1f24", "#6b7280", "#2563a8", "#b4540a"
_WIDTH, _HEIGHT = 7.6, 4.9  # inches, of one panel
_STYLE = {"font.size": 10.5, "font.family": "DejaVu Sans", "svg.fonttype": "path", "svg.hashsalt": "gyrokv"}
# where a label may go, in points from its marker: (x, y, horizontal alignment, vertical alignment)
_PLACES = (
    (8, 0, "left", "center"), (-8, 0, "right", "center"), (0, 8, "center", "bottom"), (0, -8, "center", "top"),
    (7, 7, "left", "bottom"), (7, -7, "left", "top"), (-7, 7, "right", "bottom"), (-7, -7, "right", "top"),
    (14, 18, "left", "bottom"), (14, -18, "left", "top"), (-14, 18, "right", "bottom"), (-14, -18, "right", "top"),
)  # fmt: skip


def figure(entries: Sequence[dict]) -> Figure:
    """One panel per entry (see ``evaluate.report``). Configs without divergence have no place on a log axis."""
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=(_WIDTH, _HEIGHT * len(entries)), layout="constrained")
        FigureCanvasAgg(fig)  # measures text without a display
        panels = fig.subplots(len(entries), 1, squeeze=False)[:, 0]
        for axes, entry in zip(panels, entries):
            _panel(axes, entry)
        fig.draw_without_rendering()  # the layout must be final before labels are placed
        for axes, entry in zip(panels, entries):
            _label(axes, _points(entry))
    return fig


def save(entries: Sequence[dict], path: str | os.PathLike) -> None:
    """Write the picture; the suffix of ``path`` (``.png``, ``.svg``) is its format."""
    with matplotlib.rc_context(_STYLE):
        figure(entries).savefig(path, dpi=160, metadata={"Date": None} if str(path).endswith(".svg") else None)


def svg(entries: Sequence[dict], prefix: str) -> str:
    """The picture as an ``<svg>`` element for a page: no background, ink in ``currentColor``, the other colours as the
    CSS variables ``--muted``, ``--same`` and ``--mixed``, every id prefixed."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure(entries).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'id="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text).replace("url(#", f"url(#{prefix}-")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", text, count=1)
    for colour, name in ((INK, "currentColor"), (MUTED, "var(--muted)"), (SAME, "var(--same)"), (MIXED, "var(--mixed)")):
        text = text.replace(colour, name)
    return text


def _points(entry: dict) -> list[dict]:
    return [row for row in entry["rows"][1:] if row["kl_mean"] > 0]


def _bytes(row: dict) -> float:
    return row["estimate"]["bytes_per_token"]


def _panel(axes, entry: dict) -> None:
    base, points = entry["rows"][0], _points(entry)
    axes.set_facecolor("none")
    axes.set_yscale("log")
    axes.set_title(
        f"{os.path.basename(entry['model']['path'].rstrip('/'))}: cost of a KV cache format", color=INK, loc="left"
    )
    axes.set_xlabel("cache bytes per token, all layers, scales included", color=INK)
    axes.set_ylabel(f"mean KL to the {base['label']} cache (nats, log)", color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(True, which="major", color=MUTED, alpha=0.25, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.axvline(_bytes(base), color=MUTED, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"{base['label']}: KL = 0 ", (_bytes(base), 1.0), xycoords=("data", "axes fraction"), textcoords="offset points",
        xytext=(-4, -4), ha="right", va="top", rotation=90, color=MUTED,
    )  # fmt: skip
    for colour, marker, name, chosen in (
        (SAME, "o", "same format for K and V", [r for r in points if r["k"] == r["v"]]),
        (MIXED, "D", "K and V differ", [r for r in points if r["k"] != r["v"]]),
    ):
        if chosen:
            xs, ys = [_bytes(r) for r in chosen], [r["kl_mean"] for r in chosen]
            axes.plot(xs, ys, linestyle="none", marker=marker, color=colour, markersize=7, label=name, zorder=3)
    front = _frontier(points)
    if len(front) > 1:
        xs, ys = [_bytes(r) for r in front], [r["kl_mean"] for r in front]
        axes.plot(xs, ys, color=MUTED, linewidth=1, alpha=0.6, label="no other is smaller and closer", zorder=2)
    if points:
        low, high = min(r["kl_mean"] for r in points), max(r["kl_mean"] for r in points)
        axes.set_ylim(low / 2.5, high * 3)
        span = _bytes(base) - min(map(_bytes, points))
        axes.set_xlim(min(map(_bytes, points)) - 0.08 * span, _bytes(base) + 0.04 * span)
        axes.legend(loc="upper right", bbox_to_anchor=(0.93, 1), frameon=False, labelcolor=INK, fontsize=9.5)


def _frontier(points: Sequence[dict]) -> list[dict]:
    """The points that no other beats in both bytes and KL, by bytes."""
    best, front = float("inf"), []
    for row in sorted(points, key=lambda r: (_bytes(r), r["kl_mean"])):
        if row["kl_mean"] < best:
            best = row["kl_mean"]
            front.append(row)
    return front


def _label(axes, points: Sequence[dict]) -> None:
    """Name every marker, each label at the first place where it covers no marker, label, or edge of the panel."""
    renderer = axes.figure.canvas.get_renderer()
    panel = axes.get_window_extent(renderer)
    scale = axes.figure.dpi / 72
    spots = [axes.transData.transform((_bytes(r), r["kl_mean"])) for r in points]
    half = 6.5 * scale
    taken = [(x - half, y - half, x + half, y + half) for x, y in spots]
    front = [axes.transData.transform((_bytes(r), r["kl_mean"])) for r in _frontier(points)]
    for (x0, y0), (x1, y1) in zip(front, front[1:]):  # the line, as a row of small boxes
        steps = (i / 40 for i in range(41))
        taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in ((x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in steps)]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent(renderer).extents)
    for text in axes.texts:
        taken.append(text.get_window_extent(renderer).extents)
    for row in sorted(points, key=lambda r: -r["kl_mean"]):
        best = None
        for x, y, ha, va in _PLACES:
            note = axes.annotate(
                row["label"], (_bytes(row), row["kl_mean"]), xytext=(x, y), textcoords="offset points",
                ha=ha, va=va, color=INK, fontsize=9.5, zorder=4,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7} if abs(x) > 8 else None,
            )  # fmt: skip
            box = note.get_window_extent(renderer) if abs(x) <= 8 else note.get_tightbbox(renderer)
            box = box.extents
            cost = sum(_overlap(box, other) for other in taken)
            cost += 10 * max(0.0, panel.x0 - box[0], box[2] - panel.x1, panel.y0 - box[1], box[3] - panel.y1)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, note, box)
            else:
                note.remove()
            if best[0] == 0:
                break
        taken.append(best[2])


def _overlap(a, b) -> float:
    """Area in square pixels that two boxes ``(x0, y0, x1, y1)`` share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))

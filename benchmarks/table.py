"""Results become Markdown tables, pages that say how they were made, and pictures of KL against file size."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 440, 64, 180, 36, 48
COLOURS = {"one type": "#c2410c", "mix": "#a16207", "random": "#9ca3af", "frequency": "#7c3aed", "REAP": "#0e7490", "REAP sum": "#22b8cf"}
COLOURS |= {"PMQ": "#be185d", "CC-MoE": "#f472b6", "APEX": "#15803d", "published": "#84cc16", "target size": "#111827", "greedy": "#dc2626"}
COLOURS |= {
    "uniform": "#c2410c",
    "mixed": "#a16207",
    "recipe": "#84cc16",
    "dynamic_quant": "#dc2626",
    "gptq": "#be185d",
    "oQe clipping": "#15803d",
}
COLOURS |= {"collaborative": "#fb923c", "REAP + target size": "#6b7280"}
Point = tuple[float, float]  # file size in bytes, KL in nats per token


# ---------------------------------------------------------------------------------------------------------------- Markdown
def row(cells: Sequence[object]) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(names: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [row(names), "|" + "---|" * len(names)]


def made_by(command: str, cores: str = "") -> str:
    """The command behind a page, today's date and this machine, with its number of `cores` where the word is given."""
    found = f"`{command}`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}"
    return f"{found}, {os.cpu_count()} {cores}" if cores else found


def save(folder: Path, name: str, lines: Sequence[str]) -> str:
    """Write a page of results; returns its text."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines)
    (folder / name).write_text(text)
    return text


# ----------------------------------------------------------------------------------------------------------------- pictures
def draw(title: str, ours: Sequence[Point], peers: Mapping[str, Sequence[Point]]) -> str:
    """KL against file size as SVG, ours a line and every peer's file a dot; sizes beyond our own range are cut off."""
    low, high = min(s for s, _ in ours) * 0.97, max(s for s, _ in ours) * 1.03
    shown = {kind: [p for p in points if low <= p[0] <= high] for kind, points in peers.items() if points}
    kls = [kl for points in (ours, *shown.values()) for _, kl in points]
    bottom, top = math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)))

    def x(size: float) -> float:
        return LEFT + (size - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        return TOP + (top - math.log10(kl)) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/><text x="{LEFT}" y="20" font-size="14" fill="#111827">{title}</text>',
    ]
    for power in range(bottom, top + 1):
        line = y(10.0**power)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{line:.1f}" y2="{line:.1f}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{LEFT - 8}" y="{line + 4:.1f}" text-anchor="end" fill="#4b5563">{10.0**power:g}</text>')
    for mb in range(math.ceil(low / 1e6), math.floor(high / 1e6) + 1, max(1, round((high - low) / 8e6))):
        out.append(f'<text x="{x(mb * 1e6):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" fill="#4b5563">{mb}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle" fill="#374151">file size, MB</text>')
    side = f"translate(16 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)"
    out.append(f'<text transform="{side}" text-anchor="middle" fill="#374151">KL, nats/token</text>')
    for place, (kind, points) in enumerate(shown.items()):
        colour = COLOURS[kind]
        out += [f'<circle cx="{x(s):.1f}" cy="{y(kl):.1f}" r="3" fill="{colour}" fill-opacity="0.75"/>' for s, kl in points]
        out.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{TOP + 34 + 20 * place}" r="4" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 30}" y="{TOP + 38 + 20 * place}" fill="#374151">{kind}</text>')
    path = " ".join(f"{x(s):.1f},{y(kl):.1f}" for s, kl in sorted(ours))
    out.append(f'<polyline points="{path}" fill="none" stroke="#1d4ed8" stroke-width="2.5"/>')
    out += [f'<circle cx="{x(s):.1f}" cy="{y(kl):.1f}" r="4.5" fill="#1d4ed8"/>' for s, kl in ours]
    out.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{TOP + 10}" r="5" fill="#1d4ed8"/>')
    out.append(f'<text x="{WIDTH - RIGHT + 30}" y="{TOP + 14}" fill="#111827" font-weight="600">edgemoe</text></svg>')
    return "\n".join(out) + "\n"

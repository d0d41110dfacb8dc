"""The small print as HTML: names with their values, hashes, times, what folds away."""

from collections.abc import Mapping
from html import escape
from typing import Any


def code(sha256: str) -> str:
    """A hash, shortened; whole where the pointer rests on it."""
    return f'<code title="{escape(sha256)}">{escape(sha256[:12])}</code>'


def duration(seconds: float) -> str:
    """2 h 5 min, 2 min 18 s, 4.2 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours = f"{minutes // 60} h {minutes % 60} min"
    return hours if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def hardware(machine: Mapping[str, Any]) -> dict[str, str]:
    """Name -> HTML of an `environment()`; nothing of an empty one."""
    if not machine:
        return {}
    commit = f" ({str(machine['commit'])[:12]})" if machine["commit"] else ""
    return {
        "Hardware": escape(str(machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores")),
        "Software": escape(f"fewstep {machine['fewstep']}{commit}, PyTorch {machine['packages']['torch']}"),
    }


def listed(facts: Mapping[str, str]) -> str:
    """Name -> HTML as a list of definitions."""
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{text}</dd></div>' for name, text in facts.items())}</dl>"


def folded(summary: str, text: str) -> str:
    """Text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"

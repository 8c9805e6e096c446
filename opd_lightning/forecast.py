"""Forecast: the memory that a step takes on a device, and the knobs that would change the verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from .finding import Finding

RESERVED = 1.5e9
"""Bytes of a GPU for CUDA's context and fragmentation: an assumption."""
KNOBS = 3
STATE = {32: 8.0, 8: 2 + 2 * 4 / 256}
"""Bytes of both moments of AdamW, per trained weight, by their bits."""
UNITS = {"": 1.0, "B": 1.0, "MB": 1e6, "GB": 1e9, "MIB": 2.0**20, "GIB": 2.0**30}


class Forecast(Protocol):
    """Interface of what a setting computes of a configuration."""

    @property
    def about(self) -> str:
        """Assumptions, such as the lengths."""
        ...

    def phases(self) -> Mapping[str, Mapping[str, float]]:
        """Computes what lives in each phase of a step, term by term, in bytes."""
        ...

    def cheaper(self) -> Mapping[str, Forecast]:
        """Lists the same configuration with one knob turned, by the knob and its value."""
        ...


def memory_of(text: str) -> float:
    """Reads a size such as 24GB or 80 GiB, in bytes.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"--device-memory is {text!r}; write a size such as 24GB or 80GiB")
    return float(match[1]) * UNITS[match[2].upper()]


def memory_here(device: torch.device) -> float:
    """Returns the memory of a device in bytes: of a GPU all of it, for a CPU what the machine has available."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    available = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    return float("inf") if available is None else 1024.0 * int(available[1])


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def peak(phases: Mapping[str, Mapping[str, float]]) -> tuple[float, str, str]:
    """Finds the largest sum: bytes, its phase, and the phase's largest term."""
    worst = max(phases, key=lambda phase: sum(phases[phase].values()))
    terms = phases[worst]
    return sum(terms.values()), worst, max(terms, key=lambda term: terms[term])


def memory(forecast: Forecast, room: float, reserved: float) -> Iterator[Finding]:
    """Judges whether a step fits, and names the knobs that change most.

    Args:
        room: bytes of the device.
        reserved: of these, what is not for the step.
    """
    # 1. the verdict
    phases = forecast.phases()
    size, phase, term = peak(phases)
    fits = size <= room - reserved
    text = f"{size / 1e9:.2f} GB computed of {(room - reserved) / 1e9:.1f} GB ({phase}: {term}); {forecast.about}"
    # 2. knobs, by what they save
    saved = {knob: peak(other.phases())[0] for knob, other in forecast.cheaper().items()}
    best = sorted((value, knob) for knob, value in saved.items() if value < 0.98 * size)[:KNOBS]
    advice = "; ".join(f"{knob}: {value / 1e9:.2f} GB" for value, knob in best)
    if fits:
        advice = f"for less: {advice}" if advice and size > 0.5 * (room - reserved) else ""
    elif not advice:
        advice = "no single knob changes this; a smaller model or a larger device does"
    details = [(name, _summed(terms)) for name, terms in phases.items()]
    yield Finding("memory", "good" if fits else "bad", text, advice, details)


def _summed(terms: Mapping[str, float]) -> str:
    parts = ", ".join(f"{term} {size / 1e9:.2f}" for term, size in terms.items() if size > 5e6)
    return f"{sum(terms.values()) / 1e9:.2f} GB" + (f": {parts}" if parts else "")

"""Provenance of a run, for its report: its files, what it changes against shipped ones, versions, hardware.

``run.json`` beside ``config.yaml`` holds it: the configuration itself says neither which part of it was somebody's own
choice nor where it ran.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .changes import differences, short
from .config_file import Source, overlaid
from .front import installed
from .shipped import PREFIX, package_configs

PROVENANCE = "run.json"


def provenance(sources: Sequence[tuple[Source, Any]], devices: int = 1) -> dict[str, Any]:
    """Collects what a run was made of.

    Args:
        sources: files and arguments in their order, each with its checked values.
        devices: ranks of the run.

    Returns:
        ``files``, those that ship with their ``opd:`` names; ``changes``, ``[key, shipped, own]`` for each value that
        other files and arguments set otherwise than the shipped ones; ``versions`` and ``hardware``, texts by name.
    """
    shipped: Any = {}
    together: Any = {}
    for source, values in sources:
        together = overlaid(together, values)
        if _shipped_name(source) is not None:
            shipped = overlaid(shipped, values)
    files = [_shipped_name(source) or source.name for source, _ in sources if not source.keys and source.values]
    return {
        "files": files,
        "changes": [[short(key), old, new] for key, old, new in differences(shipped, together)] if shipped else [],
        "versions": installed(),
        "hardware": hardware(devices),
    }


def write_provenance(sources: Sequence[tuple[Source, Any]], folder: Path, devices: int) -> None:
    """Writes ``run.json`` into the run's folder."""
    text = json.dumps(provenance(sources, devices), indent=2, default=str)
    (folder / PROVENANCE).write_text(f"{text}\n", encoding="utf-8")


def hardware(devices: int = 1) -> dict[str, str]:
    """Describes the machine without its name."""
    described = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads of torch": str(torch.get_num_threads()),
        "devices of the run": str(devices),
    }
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        described[f"GPU {number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return described


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _shipped_name(source: Source) -> str | None:
    """Returns ``opd:…`` of a shipped file; None for other files and for arguments."""
    path, root = Path(source.name), package_configs()
    if source.keys or not path.is_relative_to(root):
        return None
    return PREFIX + path.relative_to(root).as_posix()

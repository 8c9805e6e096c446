"""Files that come with the package: ``opd:text/quickstart.yaml``, ``opd:assets/quickstart/teacher``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .config_file import did_you_mean

PREFIX = "opd:"


def package_configs() -> Path:
    """Returns the folder of the shipped configurations."""
    return Path(str(files("opd_lightning"))) / "configs"


def shipped(name: str) -> str:
    """Returns the path of a shipped file or folder; names without the prefix stay as they are.

    Raises:
        FileNotFoundError: there is no such thing; the message has the nearest name, or else all that there are.
    """
    if not name.startswith(PREFIX):
        return name
    relative = name.removeprefix(PREFIX)
    package = Path(str(files("opd_lightning")))
    if relative.startswith("assets/"):
        path, known = package / relative, sorted(p.relative_to(package) for p in (package / "assets").glob("*/*/"))
    else:
        root = package_configs()
        path, known = root / relative, sorted(p.relative_to(root) for p in root.rglob("*.yaml"))
    if not path.exists():
        there = [path.as_posix() for path in known]
        namesakes = [path for path in there if path.endswith(f"/{relative.rpartition('/')[2]}")]
        near = did_you_mean(name, [f"{PREFIX}{path}" for path in namesakes or there])
        known_names = "" if near else f"\n  there are {', '.join(there)}"
        raise FileNotFoundError(f"{name}: nothing of that name is shipped{near}{known_names}")
    return str(path)

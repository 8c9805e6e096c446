"""`opd new SETTING DIR`: a commented configuration and rows to begin with, which run as they stand."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .config_file import ConfigError, did_you_mean
from .printable import printable
from .shipped import shipped

TEMPLATE = "your_data"
"""Name of a setting's configuration to begin with, ``opd:SETTING/your_data.yaml``, and of the assets that it reads."""


def main(arguments: Sequence[str]) -> None:
    """Writes a commented configuration and example rows for your own model and file: SETTING DIR."""
    known = settings()
    options = argparse.ArgumentParser(prog="opd new", description=main.__doc__)
    options.add_argument("setting", metavar="SETTING", help=", ".join(known))
    options.add_argument("folder", metavar="DIR", type=Path, help="a new folder")
    given = options.parse_args(arguments)
    if given.setting not in known:
        near = did_you_mean(given.setting, known) or f"; there are {', '.join(known)}"
        raise ConfigError(f"there is no setting {given.setting!r}{near}")
    config, rows = write(given.setting, given.folder)
    files = ", ".join(path.name for path in rows if path.suffix == ".jsonl")
    sys.stdout.write(
        printable(
            f"{config}: every key has a word behind it; set your models there\n"
            f"{given.folder / files}: the rows that it reads; put yours in their place\n\n"
            f"  opd check -c {config}      what can be known before the first step\n"
            f"  opd fit -c {config}        as it stands, in a minute without a GPU\n"
        )
    )


def settings() -> list[str]:
    """Lists the settings that have something to begin with."""
    configs = Path(shipped("opd:trainer/cpu.yaml")).parents[1]
    return sorted(path.parent.name for path in configs.glob(f"*/{TEMPLATE}.yaml"))


def write(setting: str, folder: Path) -> tuple[Path, list[Path]]:
    """Copies a setting's configuration and rows into a new folder; returns where they are.

    Raises:
        FileExistsError: the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and nothing is overwritten; name a new folder")
    assets = f"opd:assets/{TEMPLATE}/{setting}"
    shutil.copytree(shipped(assets), folder, dirs_exist_ok=True)
    text = Path(shipped(f"opd:{setting}/{TEMPLATE}.yaml")).read_text(encoding="utf-8")
    # the rows' paths are those from where the command was typed, as all paths in a configuration
    text = text.replace(assets, folder.as_posix()).replace(f"runs/{TEMPLATE}", (folder / "run").as_posix())
    text = text.replace(f"-c opd:{setting}/{TEMPLATE}.yaml", f"-c {(folder / 'config.yaml').as_posix()}")
    config = folder / "config.yaml"
    config.write_text(text, encoding="utf-8")
    return config, sorted(path for path in folder.iterdir() if path != config)

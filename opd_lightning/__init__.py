"""On-policy distillation on Lightning."""

from pathlib import Path

for _name in ("assets", "callbacks", "configs", "modalities"):
    _path = Path(__file__).with_name(_name)
    if not _path.is_dir():
        raise ImportError(
            f"{_path} should be a symbolic link to ../{_name}: this clone was made without them "
            "(git on Windows leaves text files in their places). Clone again with `git clone -c core.symlinks=true`, "
            "on Windows in developer mode"
        )

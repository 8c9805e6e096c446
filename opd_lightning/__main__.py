"""``python -m opd_lightning`` and the console script ``opd``."""

import io
import locale
import logging
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import TracebackType


def main() -> None:
    """Runs `opd`; errors of checks are printed in short."""
    speak_utf8()
    sys.excepthook = _show_error
    from .front import ConfigError, front
    from .printable import printable

    try:
        sources = front(sys.argv[1:])
    except (ConfigError, FileNotFoundError) as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        sys.exit(2)
    # bars of libraries that have no switch for them, such as that of transformers over a GGUF file's weights
    os.environ.setdefault("TQDM_DISABLE", "1")
    # transformers' own names
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated.*")
    # its missing CPU kernel concerns nobody who has not asked for quantization
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        execute(sys.argv[1:])
    except Exception as error:
        from .cli_errors import Parser, sentence

        text = None if "--traceback" in sys.argv else sentence(error, sources or Parser.sources)
        if text is None:
            raise
        sys.stderr.write(printable(text))
        sys.exit(1)


def execute(arguments: Sequence[str]) -> None:
    """Runs a command of `opd` in this process: a run of Lightning's Trainer, or what an entry point registers."""
    from .entry_points import command
    from .front import RUNS

    sys.path += [] if os.getcwd() in sys.path else [os.getcwd()]  # for classes and functions of one's own
    name, *rest = arguments
    if name not in RUNS:
        command(name)(rest)
        return
    from .cli import run

    run(arguments)


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error as Python does, with escapes in texts of rows and paths."""
    from .printable import printable

    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))


def speak_utf8() -> None:
    """Begins again in Python's UTF-8 mode where the machine's encoding is another: libraries read and write in it.

    What is printed to a terminal of another encoding is printed as well as that can.
    """
    if not sys.flags.utf8_mode and locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"):
        command = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
        os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
        if os.name == "nt":  # where exec lets the shell go on
            sys.exit(subprocess.call(command))
        os.execv(sys.executable, command)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    main()

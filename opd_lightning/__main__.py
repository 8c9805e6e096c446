"""``python -m opd_lightning`` and the console script ``opd``."""

import sys


def main() -> None:
    from .cli import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()

"""``python -m opd_lightning`` and the console script ``opd``."""

import logging
import sys


def main() -> None:
    # its missing CPU kernel concerns nobody who has not asked for quantisation
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from .cli import run

    run(sys.argv[1:])


if __name__ == "__main__":
    main()

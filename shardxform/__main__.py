"""`python -m shardxform`, and the command `shardxform`."""

from __future__ import annotations

import sys

__all__ = ["entry"]


def entry() -> None:
    """Run the command line; an interrupt while it is still being imported ends it as quietly as later ones."""
    try:
        from shardxform.cli import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    entry()

"""`python -m shardxform`, and the command `shardxform`."""

from __future__ import annotations

import gc

from shardxform.base import interrupts

__all__ = ["entry"]


def entry() -> None:
    """Run the command line; signals are taken over before anything else is imported."""
    interrupts.take_over()
    try:
        from shardxform.cli import main

        main()
    finally:
        interrupts.settle()
        gc.freeze()  # else the interpreter looks through all that is left for cycles, on its way out


if __name__ == "__main__":
    entry()

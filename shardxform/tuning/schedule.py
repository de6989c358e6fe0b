"""How many steps each block is healed by, where a time is given and not their number.

Blocks are healed one after the other, so what is left of the time is divided anew at each. A few steps, of which
nothing is kept, say how long one takes and how far the error of the held-out samples falls; the block then gets its
share among those to come, larger or smaller as its fall is to the mean of the falls so far. What was decided is durable
before the block is healed by it, so that one that is done again has the same steps: no byte depends on a clock but
through these numbers, which the record holds, and a recipe with them as its `schedule` gives the same bytes.

    WORK/schedule.json    by layer: the fall, the steps, and the seconds that the block took once it is done
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardxform.base.constants import MOST_WEIGHT
from shardxform.base.strict_json import JsonError, dumps, parse_object
from shardxform.errors import ResumeError
from shardxform.execution.output import SCHEDULE

if TYPE_CHECKING:
    from shardxform.ask.recipe import Heal
    from shardxform.base.file_system import FileSystem

__all__ = ["BlockPace", "Schedule", "steps_within"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPace:
    """What a few steps of healing a block showed.

    Attributes:
        fall: how far the held-out samples' squared error, relative to each token's size, fell; below 0 where it rose.
        step_seconds: of one step.
        descent_seconds: of what comes with any number of steps: loading the block, judging it before and after.
    """

    fall: float
    step_seconds: float
    descent_seconds: float


def steps_within(seconds: float, pace: BlockPace) -> int:
    """Most steps that a block can be healed by in a time, with what comes beside them; at least one."""
    return max(1, int((seconds - pace.descent_seconds) / pace.step_seconds))


class Schedule:
    """What is known of the blocks of one run that are healed within a time."""

    def __init__(self, layers: Sequence[int], work: Path, fs: FileSystem) -> None:
        """Read what an earlier run decided.

        Args:
            layers: blocks that are healed, in order.
            work: directory of the hidden states.
            fs: effects.

        Raises:
            ResumeError: the file is damaged.

        """
        self._layers, self._path, self._fs = tuple(layers), work / SCHEDULE, fs
        self._blocks: dict[int, dict[str, Any]] = _read(self._path)

    def decide(self, layer: int, heal: Heal, elapsed: Callable[[], float], measure: Callable[[], BlockPace]) -> Heal:
        """Say how a block is healed; durable when it returns.

        Args:
            layer: the block.
            heal: what to do, with `seconds`.
            elapsed: seconds that the block has taken up to now, and will take beside healing.
            measure: does a few steps.

        """
        if layer not in self._blocks:
            pace = measure()
            at = self._layers.index(layer)
            left = heal.seconds - sum(self._blocks.get(each, {}).get("seconds", 0.0) for each in self._layers[:at])
            falls = [self._blocks[each]["fall"] for each in self._layers[:at] if each in self._blocks]
            share = share_of(pace.fall, falls, len(self._layers) - at - 1)
            steps = steps_within(left * share - elapsed(), pace)
            self._blocks[layer] = {"fall": pace.fall, "steps": steps}
            self._write()
        return replace(heal, iters=self._blocks[layer]["steps"], seconds=0)

    def finish(self, layer: int, seconds: float) -> None:
        """Note how long a block took that was healed."""
        self._blocks[layer]["seconds"] = round(seconds, 3)
        self._write()

    def _write(self) -> None:
        known = {str(layer): self._blocks[layer] for layer in sorted(self._blocks)}
        self._fs.write_atomic(self._path, dumps({"blocks": known}).encode(), self._path.parent)


def share_of(fall: float, before: Sequence[float], after: int) -> float:
    """The part of the time left that a block gets: those after it are taken to fall as far as the mean so far."""
    falls = [max(each, 0.0) for each in (*before, fall)]
    mean = sum(falls) / len(falls)
    weight = min(MOST_WEIGHT, max(1 / MOST_WEIGHT, falls[-1] / mean)) if mean else 1.0
    return weight / (weight + after)


def _read(path: Path) -> dict[int, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        blocks = parse_object(path.read_bytes())["blocks"]
        return {int(layer): _checked(block) for layer, block in blocks.items()}
    except (JsonError, AttributeError, KeyError, TypeError, ValueError) as e:
        raise ResumeError(f"{path}: expected steps of blocks as healing decided them, found something else: {e}") from e


def _checked(block: Mapping[str, object]) -> dict[str, Any]:
    fall, steps, seconds = block["fall"], block["steps"], block.get("seconds", 0.0)
    if not isinstance(fall, float) or type(steps) is not int or steps < 1 or not isinstance(seconds, float):
        raise ValueError(f"{dict(block)}")
    return dict(block)

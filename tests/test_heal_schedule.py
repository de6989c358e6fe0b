"""`--heal-time` and steps of each block: how time is divided, what a run that goes on keeps, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from smaller import smaller
from test_heal_command import DATA, KEEP, call, keep_file

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from shardxform.ask.recipe import Heal, Recipe  # noqa: E402
from shardxform.base.file_system import FileSystem  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.cli.flags import STEPS, TIME  # noqa: E402
from shardxform.errors import ResumeError, SchemeError  # noqa: E402
from shardxform.execution.output import SCHEDULE  # noqa: E402
from shardxform.tuning import heal as healing  # noqa: E402
from shardxform.tuning.schedule import BlockPace, Schedule, share_of, steps_within  # noqa: E402

pytestmark = pytest.mark.oracle

SMALL_MOE = smaller(blocks=3)
LAYERS = [0, 1, 2]
PACE = BlockPace(fall=0.2, step_seconds=2.0, descent_seconds=4.0)
FIXED = Heal(what="all", lr=0.01, seconds=1000)


# -- dividing ---------------------------------------------------------------------------------------------------------


def test_steps_fill_a_time_with_all_that_comes_beside_them() -> None:
    assert steps_within(100.0, PACE) == 48
    assert steps_within(4.0, PACE) == steps_within(-9.0, PACE) == 1


@pytest.mark.parametrize(
    ("fall", "before", "after", "share"),
    [
        (0.2, [], 3, 1 / 4),
        (0.2, [0.2, 0.2], 1, 1 / 2),
        (0.4, [0.1, 0.1], 2, 2 / 4),  # twice the mean of 0.1, 0.1, 0.4
        (0.3, [0.0] * 9, 1, 4 / 5),  # ten times the mean counts as four times
        (-0.1, [0.3], 1, (1 / 4) / (5 / 4)),
        (0.0, [0.0], 2, 1 / 3),
        (0.4, [0.1, 0.1], 0, 1.0),  # the last one has all that is left
    ],
)
def test_a_block_has_its_share(fall: float, before: list[float], after: int, share: float) -> None:
    assert share_of(fall, before, after) == pytest.approx(share)


def test_what_was_decided_stays(tmp_path: Path) -> None:
    measured = []

    def measure() -> BlockPace:
        measured.append(1)
        return PACE

    first = Schedule([1, 3], tmp_path, FileSystem())
    assert first.decide(1, FIXED, lambda: 6.0, measure) == Heal(what="all", lr=0.01, iters=245)  # half, less 6 and 4
    again = Schedule([1, 3], tmp_path, FileSystem())
    assert again.decide(1, FIXED, lambda: 999.0, measure).iters == 245
    assert len(measured) == 1
    again.finish(1, 700.0)
    assert Schedule([1, 3], tmp_path, FileSystem()).decide(3, FIXED, lambda: 6.0, measure).iters == 145
    assert json.loads((tmp_path / SCHEDULE).read_text())["blocks"] == {
        "1": {"fall": 0.2, "steps": 245, "seconds": 700.0},
        "3": {"fall": 0.2, "steps": 145},
    }


@pytest.mark.parametrize("text", ["", "[]", '{"blocks":{"0":{"fall":0.1,"steps":0}}}', '{"blocks":{"x":{}}}'])
def test_a_damaged_schedule_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SCHEDULE).write_text(text)
    with pytest.raises(ResumeError, match="expected steps of blocks as healing decided them"):
        Schedule([0], tmp_path, FileSystem())


# -- the command ------------------------------------------------------------------------------------------------------


def steps_of(out: Path) -> list[int]:
    record = json.loads((out / "shardxform.json").read_text())
    assert "iters" not in record["inputs"]["recipe"]["heal"]
    return [block["healed"]["iters"] for block in record["facts"]["blocks"]]


def test_interrupted_it_keeps_its_steps_and_they_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healing, "PACE_STEPS", 3)
    keep, out = str(keep_file(tmp_path, KEEP, LAYERS)), tmp_path / "out"
    heal = ("-m", keep, "-q", "--heal", "moe", "--heal-lr", "0.01", "--batch-size", "2", *DATA)
    command = ("prune", str(SMALL_MOE), str(out), *heal, "--heal-time", "1s")
    decided: dict[int, int] = {}
    real, calls = Schedule.decide, []

    def stopping(self: Schedule, layer: int, *args: Any) -> Heal:
        found = real(self, layer, *args)
        calls.append(layer)
        assert decided.setdefault(layer, found.iters) == found.iters
        if calls == [0, 1]:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Schedule, "decide", stopping)
    assert CliRunner().invoke(main, list(command)).exit_code not in (0, None)
    assert not (out / "config.json").exists()
    call(*command)
    assert calls == [0, 1, 1, 2]
    assert steps_of(out) == [decided[layer] for layer in LAYERS]
    asked = ",".join(map(str, steps_of(out)))
    call("prune", str(SMALL_MOE), str(tmp_path / "again"), *heal, "--heal-iters", asked)
    assert steps_of(tmp_path / "again") == steps_of(out)
    for path in out.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert "sound" in call("verify", str(out), "--source", str(SMALL_MOE)).output
    card = call("card", str(out)).output
    assert f"--heal-iters {asked}" in card
    assert "as 1 s allowed" in card


def test_a_dry_run_says_what_time_there_is(tmp_path: Path) -> None:
    keep = str(keep_file(tmp_path, KEEP, LAYERS))
    command = ("prune", str(SMALL_MOE), str(tmp_path / "out"), "-m", keep, "--dry-run", "--heal=all", *DATA)
    said = call(*command, "--heal-time", "1h30m").output
    assert "1 h 30 min for all blocks, more of it where the held-out error falls more" in said
    found = json.loads(call(*command, "--heal-time", "1h30m", "--json").stdout)
    assert found["heal"] == {"what": "all", "seconds": 5400, "lr": None, "batch_size": 8}
    assert "5, 6, 7 iterations" in call(*command, "--heal-iters", "5,6,7").output
    few = call(*command, "--heal-iters", "5,6", code=1).output
    assert "--heal-iters: expected one number, or one for each of 3 blocks, found 2" in few
    assert "at least 1 for every block" in call(*command, "--heal-iters", "5,0,5", code=1).output
    both = call(*command, "--heal-iters", "5", "--heal-time", "2h", code=1).output
    assert "--heal-time decides how many steps there are; leave out --heal-iters" in both


def test_times_and_steps_are_read() -> None:
    times = {"90s": 90, "15m": 900, "2h": 7200, "1h30m": 5400, "1h0m5s": 3605}
    assert {text: TIME.convert(text, None, None) for text in times} == times
    assert STEPS.convert("120, 80,95", None, None) == (120, 80, 95)
    for kind, texts in ((TIME, ("", "0s", "2", "h", "-1h", "1.5h")), (STEPS, ("", "-1", "1,", "1e3", "2.5"))):
        for text in texts:
            with pytest.raises(Exception, match="expected"):
                kind.convert(text, None, None)


def test_time_is_given_to_blocks_in_order() -> None:
    with pytest.raises(SchemeError, match="expected `inputs` quantized, blocks one after the other, found fp"):
        Recipe(windows="", data={}, samples=4, seqlen=8, inputs="fp", heal=Heal(seconds=60))
    with pytest.raises(SchemeError, match="not both"):
        Heal(seconds=60, schedule=(1, 2))

"""`--ray`: the bytes of a local run, whatever dies meanwhile; refusals on one line. One cluster of two CPUs for all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from raycluster import RayCluster
from smaller import smaller
from strategies import by_night, picked
from test_run import tree
from texts import few

from shardxform import Checkpoint, Manifest, plan_prune
from shardxform.base import computing
from shardxform.calibration import Windows
from shardxform.cli import main
from shardxform.cluster import pool, session, worker
from shardxform.errors import ExecutionError, PlanError, ResumeError
from shardxform.experts import Saliency

ray = pytest.importorskip("ray")
pytest.importorskip("torch")

from shardxform.cluster import scoring as cluster_scoring  # noqa: E402

pytestmark = pytest.mark.slow

SMALL_MOE = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
KEEP = '{"0": [0,2,4,6], "1": [1,3,5,7], "2": [8,9,10,11], "3": [0,5,10,15]}'


Local = Callable[[str], dict[str, bytes]]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A cluster that processes of its own run."""
    with RayCluster(tmp_path_factory.mktemp("ray")) as running:
        yield running


@pytest.fixture
def cluster(running: RayCluster) -> str:
    """Its address."""
    return running.address


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    path = tmp_path / "keep.json"
    path.write_text(KEEP)
    return path


def command(what: str, out: Path, *more: str) -> list[str]:
    """Of many small steps."""
    (out.parent / "keep.json").write_text(KEEP)
    given = {"prune": ["prune", "-m", str(out.parent / "keep.json")], "rtn": ["quantize"]}[what]
    return [*given, str(SMALL_MOE), str(out), "--max-shard-size", "300KB", "-q", *more]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    """What a local run of a command writes."""

    @functools.cache
    def made(what: str) -> dict[str, bytes]:
        out = tmp_path_factory.mktemp("local") / "out"
        call(*command(what, out))
        return tree(out)

    return made


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def bytes_of(out: Path) -> dict[str, bytes]:
    """Every file of an output."""
    return tree(out)


def before(seconds: float, wanted: Callable[[], bool]) -> bool:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not wanted() and time.monotonic() < deadline:
        time.sleep(0.02)
    return wanted()


def told(text: str) -> list[str]:
    """Lines that are not notes on the plan, nor what Ray's core logs of tasks that nobody waits for any more."""
    return [line for line in text.splitlines() if not line.startswith("note: ") and not re.search(r"\.cc:\d+: ", line)]


def said_of(result: Result, out: Path) -> str:
    """The line that says what went wrong; one more says what is there, and how to go on."""
    line, way_on = told(result.output)
    assert way_on.startswith(f"{out} is unfinished, finished steps are safe: ")
    return line


def dying(folder: Path, times: int = 1) -> Callable[..., Any]:
    """`do_step`, but for `times` workers that are killed with their bytes written, and neither synced nor told."""

    def task(*args: Any) -> Any:
        import os
        import signal

        from shardxform.base.file_system import FileSystem
        from shardxform.cluster.worker import do_step

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        for number in range(times):
            try:
                os.close(os.open(folder / f"killed-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            FileSystem.sync = die  # type: ignore[assignment]
            break
        return do_step(*args)

    return task


# -- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", picked(["rtn", "prune"], 2))
def test_bytes_equal_a_local_run_though_workers_are_killed(
    what: str, cluster: str, local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "do_step", dying(tmp_path, times=2))
    call(*command(what, tmp_path / "out", "--ray", cluster))
    assert (tmp_path / "killed-1").exists()
    assert tree(tmp_path / "out") == local(what)


ACME = """\
from dataclasses import replace
from shardxform.model.families.qwen3_5_moe import FAMILY as KIN
FAMILY = replace(KIN, name="acme", wrappers=(replace(KIN.wrappers[1], model_type="acme"),))
"""


def test_workers_know_a_family_that_a_file_says(cluster: str, tmp_path: Path) -> None:
    source, file = tmp_path / "src", tmp_path / "acme.py"
    shutil.copytree(SMALL_MOE, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "acme"}))
    file.write_text(ACME)
    words = ("quantize", source, "--max-shard-size", "300KB", "-q", "--family", file)
    call(*words, tmp_path / "local")
    call(*words, tmp_path / "out", "--ray", cluster)
    assert tree(tmp_path / "out") == tree(tmp_path / "local")


SLOW = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run
from shardxform.cluster import pool
stuck = os.environ.get("STUCK", "")  # ID of a machine whose steps never end, and where its workers leave theirs
def slow(*args):
    import os, ray, time
    from shardxform.cluster.worker import do_step
    machine, _, folder = stuck.partition(" ")
    if machine == ray.get_runtime_context().get_node_id():
        open(os.path.join(folder, str(os.getpid())), "w").close()
        time.sleep(600)
    time.sleep(0.2)
    return do_step(*args)
pool.do_step = slow
from shardxform.__main__ import entry
entry()
"""


def started(out: Path, address: str, more: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """A driver whose steps take long, after the first of them are in the journal; with more in its environment."""
    words = [sys.executable, "-c", SLOW, *command("prune", out, "--ray", address)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(more or {})}
    )
    journal, deadline = out / ".shardxform" / "journal", time.monotonic() + 120
    try:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 4:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise
    return process


@pytest.mark.parametrize("number", picked([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], 3))
def test_a_driver_that_was_stopped_is_gone_on_with(number: int, cluster: str, local: Local, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(out, cluster)
    for _ in range(1 if number == signal.SIGKILL else 5):
        process.send_signal(number)
        time.sleep(0.002)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert not (out / "config.json").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert "run the same command again to go on" in errors
        assert len(told(errors)) == 1, errors
    done = len((out / ".shardxform" / "journal").read_bytes().splitlines()) - 1
    result = call(*command("prune", out, "--ray", cluster, "--json"))
    assert '"resumed_bytes": 0' not in result.output
    assert done >= 3
    assert tree(out) == local("prune")


def test_a_local_run_goes_on_with_what_a_cluster_began(cluster: str, local: Local, tmp_path: Path) -> None:
    process = started(tmp_path / "out", cluster)
    process.kill()
    process.communicate(timeout=120)
    call(*command("prune", tmp_path / "out"))
    assert tree(tmp_path / "out") == local("prune")


@by_night
def test_a_machine_that_is_lost_does_not_matter(running: RayCluster, local: Local, tmp_path: Path) -> None:
    """A second one, that is killed with all its processes in the midst of a step, while the first one works."""
    workers = tmp_path / "workers"
    workers.mkdir()
    lost = running.add()
    process = started(tmp_path / "out", running.address, {"STUCK": f"{lost} {workers}"})
    try:
        assert before(120, lambda: any(workers.iterdir()))
        running.lose([path.name for path in workers.iterdir()])
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert tree(tmp_path / "out") == local("prune")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_another_version_on_a_worker_is_refused(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.computing, "of_rounding", lambda: {"shardxform": "0.0.7"})
    result = call(*command("prune", tmp_path / "out", "--ray", cluster), code=1)
    assert "but the driver has 0.0.7; install the same on machines of one kind" in said_of(result, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_worker_without_the_program_is_told_on_one_line(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def do_step(*_):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pool, "do_step", importlib.import_module("only_here").do_step)
    result = call(*command("prune", tmp_path / "out", "--ray", cluster), code=1)
    wanted = "shardxform: --ray: a worker has no shardxform, or another: install the same on every machine"
    assert said_of(result, tmp_path / "out") == wanted


def test_an_error_in_a_step_is_told_on_one_line_and_not_tried_again(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"

    def failing(_wanted: Any, _place: Any, step: bytes) -> Any:
        import hashlib

        from shardxform.errors import ExecutionError as Error

        with tries.open("a") as file:
            file.write(f"{hashlib.sha256(step).hexdigest()}\n")
        return None, Error("tensor 'a': NaN at row 1")

    monkeypatch.setattr(pool, "do_step", failing)
    result = call(*command("prune", tmp_path / "out", "--ray", cluster), code=1)
    assert said_of(result, tmp_path / "out") == "shardxform: tensor 'a': NaN at row 1"
    tried = tries.read_text().split()
    assert len(tried) == len(set(tried))  # those that were submitted with it


@by_night
def test_workers_that_die_again_and_again_end_the_run(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_TRIES", 1)
    monkeypatch.setattr(pool, "do_step", dying(tmp_path, times=50))
    result = call(*command("prune", tmp_path / "out", "--ray", cluster), code=1)
    assert "a worker failed for good" in said_of(result, tmp_path / "out")


def test_a_step_that_no_machine_can_hold_is_refused(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_WORKER_BYTES", 10**15)
    result = call(*command("prune", tmp_path / "out", "--ray", cluster), code=1)
    assert "--ray: a step takes 1 CPU and 1000000" in result.output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def bound(keep: Path, tmp_path: Path) -> tuple[worker.StepPlace, Any]:
    """A place whose output was begun, and a step of it."""
    source = Checkpoint.open(SMALL_MOE)
    plan = plan_prune(source, Manifest.load(keep))
    out = tmp_path / "out"
    stopped = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import os, shardxform.execution.journal as j\nj.Journal.record = lambda *_: os._exit(9)\n"
            "from shardxform.cli import main\nmain()",
            *("prune", str(SMALL_MOE), str(out), "-m", str(keep), "-q"),
        ],
        check=False,
    )
    assert stopped.returncode == 9
    return worker.StepPlace.of(dataclasses.replace(plan, source=SMALL_MOE), out, "cpu"), plan.steps[0]


def done(place: worker.StepPlace, step: Any) -> Any:
    return worker.do_step(computing.of_rounding(), pickle.dumps(place), pickle.dumps((step, ())))


def test_a_worker_refuses_another_plan_and_another_source(
    bound: tuple[worker.StepPlace, Any], writable: Callable[[Path], Path], tmp_path: Path
) -> None:
    place, step = bound
    assert done(place, step) == ({"digests": []}, None)
    _, error = done(dataclasses.replace(place, fingerprint="another"), step)
    assert isinstance(error, ExecutionError)
    assert "another plan" in str(error)
    _, error = done(dataclasses.replace(place, out=tmp_path / "elsewhere"), step)
    assert "no such plan" in str(error)
    copy = writable(SMALL_MOE)
    shard = next(copy.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[9] ^= 1
    shard.write_bytes(data)
    _, error = done(dataclasses.replace(place, source=copy), step)
    assert isinstance(error, ExecutionError)
    assert "not the shard that was planned with" in str(error)
    (place.out / "model.safetensors.partial").unlink()
    _, error = done(place, step)
    assert isinstance(error, OSError)


def test_nothing_is_unpickled_for_a_driver_of_another_version() -> None:
    _, error = worker.do_step({"shardxform": "0.0.7"}, b"no pickle", b"none")
    assert isinstance(error, ExecutionError)


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (("--ray", "--jobs", "2"), "--jobs is for threads"),
        (("--ray", "--heal"), "--heal: a block is changed"),
        (("--ray", "--device", "cuda:1"), "expected cpu or cuda"),
        (("--ray", "somewhere"), "expected HOST:PORT"),
        (("--ray", "127.0.0.1:1"), "no Ray cluster answers at 127.0.0.1:1"),
        (("--ray", "no.such.host.invalid:6379"), "no Ray cluster answers at no.such.host.invalid:6379"),
    ],
)
def test_what_does_not_go_together_is_refused(more: tuple[str, ...], wanted: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, command("prune", tmp_path / "out", *more), catch_exceptions=False)
    assert result.exit_code in (1, 2)
    assert wanted in result.stderr
    assert not (tmp_path / "out").exists()


def test_without_ray_the_option_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "find_spec", lambda _: None)
    result = call(*command("prune", tmp_path / "out", "--ray"), code=1)
    assert told(result.output) == ["shardxform: --ray needs ray: pip install 'shardxform[ray]'"]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_tasks_and_neither_it_nor_a_local_run_imports_ray(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(sorted({'ray', 'torch'} & set(sys.modules)), file=sys.stderr))\n"
        "from shardxform.cli import main\nmain()"
    )
    shown = ""
    for more in (("--ray", "--dry-run"), ()):
        words = [sys.executable, "-c", code, *command("prune", tmp_path / "out", *more)]
        result = subprocess.run(words, capture_output=True, text=True, check=True)
        assert result.stderr.splitlines()[-1] == "[]"
        shown += result.stdout
    assert "tasks of 1 CPU and up to 255.85 MB, on this machine" in shown


def test_a_cluster_of_this_machine_alone_is_started_and_ended(tmp_path: Path) -> None:
    """As a user does it; nothing of Ray's is left running."""
    words = [sys.executable, "-m", "shardxform", *command("prune", tmp_path / "out", "--ray")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 0, process.stderr
    assert told(process.stderr) == []
    assert (tmp_path / "out" / "config.json").exists()


def test_what_is_given_up_fails_at_once_and_its_workers_end(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `ray.cancel`, which may abort the driver: https://github.com/ray-project/ray/pull/54738."""
    cancelled: list[Any] = []
    monkeypatch.setattr(ray, "cancel", lambda *args, **_: cancelled.append(args))

    def sleepy(folder: Path) -> Any:
        import os
        import time

        (folder / str(os.getpid())).touch()
        time.sleep(600)

    one = session.Session(cluster)
    one.open()
    futures = [one.future(one.submit(sleepy, session.Needs(memory=1), tmp_path)) for _ in range(4)]
    assert before(30, lambda: len(list(tmp_path.iterdir())) == 2)
    assert not any(future.done() for future in futures)
    one.stop()
    assert not cancelled
    assert all(str(future.exception(timeout=1)) == "stopped" for future in futures)
    assert before(30, lambda: not any(alive(int(path.name)) for path in tmp_path.iterdir()))


def test_a_connection_of_somebody_else_is_left_alone(cluster: str, tmp_path: Path) -> None:
    with session.Session(cluster) as other:
        other.open()
        result = call(*command("prune", tmp_path / "out", "--ray", cluster), code=1)
        assert told(result.output) == [
            "shardxform: --ray: this process is connected to Ray already: run ray.shutdown() first"
        ]
        assert ray.is_initialized()


def test_a_hub_source_is_refused() -> None:
    with pytest.raises(PlanError, match="is on the hub"):
        pool.refuse_remote("hf://one/of@them", object())


# -- tuned blocks -----------------------------------------------------------------------------------------------------


def tuning(out: Path, *more: str) -> list[str]:
    text = few("calib.jsonl")
    data = ("--data", str(text), "--samples", "4", "--seqlen", "64", "--dtype", "float32")
    how = ("--method", "auto-round", "--inputs", "fp", "--iters", "2", "--batch-size", "2")
    return ["quantize", str(smaller()), str(out), *how, *data, "-q", *more]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute as workers do."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a local run writes, with one thread, as workers have."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    with one_thread():
        call(*tuning(out))
    return bytes_of(out)


def dying_tuner(folder: Path) -> Callable[..., Any]:
    """`do_block`, but for the first worker that is done with its block: it is killed before that is durable."""

    def task(*args: Any) -> Any:
        import os
        import signal

        from shardxform.cluster.pool import do_block
        from shardxform.execution.steps import OpenTargets

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        if not (folder / "killed").exists():
            (folder / "killed").touch()
            OpenTargets.sync = die  # type: ignore[method-assign]
        return do_block(*args)

    return task


def test_blocks_tuned_side_by_side_equal_a_local_run_though_a_worker_is_killed(
    cluster: str, tuned: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "do_block", dying_tuner(tmp_path))
    result = call(*tuning(tmp_path / "out", "--ray", cluster))
    assert (tmp_path / "killed").exists()
    assert "squared error" in result.output
    assert bytes_of(tmp_path / "out") == tuned


@by_night
def test_states_that_are_there_are_not_made_again(
    cluster: str, tuned: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose second block fails; then one that goes on from the states and the blocks that are there."""
    made = tmp_path / "made"

    def failing(wanted: Any, tuning: bytes, step: bytes, *states: Any) -> Any:
        import pickle

        from shardxform.cluster.pool import do_block
        from shardxform.errors import ExecutionError as Error

        if pickle.loads(step)[0].layer == 1:
            return None, Error("block 1: no")
        return do_block(wanted, tuning, step, *states)

    def counting(*args: Any) -> Any:
        from shardxform.cluster.pool import make_states

        with made.open("a") as file:
            file.write(f"{args[2]} ")
        return make_states(*args)

    monkeypatch.setattr(pool, "make_states", counting)
    with monkeypatch.context() as patch:
        patch.setattr(pool, "do_block", failing)
        result = call(*tuning(tmp_path / "out", "--ray", cluster), code=1)
    assert told(result.output)[0] == "shardxform: block 1: no"
    call(*tuning(tmp_path / "out", "--ray", cluster))
    assert len(made.read_text().split()) <= 4  # three, and the one that was cut short
    assert bytes_of(tmp_path / "out") == tuned


def test_a_dry_run_shows_the_hidden_states(tmp_path: Path) -> None:
    result = call(*tuning(tmp_path / "out", "--ray", "--dry-run", "--json"))
    facts = json.loads(result.stdout)["ray"]
    assert facts["states_bytes"] == 3 * 4 * 64 * 128 * 4  # blocks and one, windows, tokens, channels, float32
    assert facts["task_gpus"] == 0
    assert not (tmp_path / "out").exists()


def test_only_blocks_that_need_no_other_are_tuned_on_a_cluster(tmp_path: Path) -> None:
    words = [word if word != "fp" else "quantized" for word in tuning(tmp_path / "out", "--ray")]
    result = call(*words, code=1)
    assert "--ray needs --inputs fp" in result.output
    result = call(*tuning(tmp_path / "out", "--ray", "--blocks", "0-1"), code=1)
    assert "--ray tunes all blocks" in result.output


# -- scores -----------------------------------------------------------------------------------------------------------


def scoring(out: Path, *more: str) -> list[str]:
    text = few("calib.jsonl")
    return ["score", str(smaller()), "-o", str(out), "--data", str(text), "--samples", "24", "--seqlen", "128", *more]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Saliency:
    out = tmp_path_factory.mktemp("scored") / "local.saliency"
    with one_thread():
        call(*scoring(out))
    return Saliency.load(out)


def dying_scorer(folder: Path) -> Callable[..., Any]:
    """`score_part`, but for the first worker that is at its second block: it is killed."""

    def task(*args: Any) -> Any:
        import os
        import signal

        from shardxform.cluster.scoring import score_part
        from shardxform.forward.work import WorkDir

        record = WorkDir.record

        def die(self: Any, step: str, facts: Any) -> None:
            if step == "block 1" and not (folder / "killed").exists():
                (folder / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            record(self, step, facts)

        WorkDir.record = die  # type: ignore[method-assign]
        return score_part(*args)

    return task


def test_scores_equal_those_of_one_machine_though_a_worker_is_killed(
    cluster: str, scored: Saliency, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_scoring, "score_part", dying_scorer(tmp_path))
    result = call(*scoring(tmp_path / "out.saliency", "--ray", cluster))
    assert (tmp_path / "killed").exists()
    assert "6,144 tokens" in result.output or "3,072 tokens" in result.output
    found = Saliency.load(tmp_path / "out.saliency")
    assert (found.model, found.runs, found.tokens) == (scored.model, scored.runs, scored.tokens)
    for layer, stats in scored.layers.items():
        same = found.layers[layer]
        np.testing.assert_array_equal(same.count_E, stats.count_E)
        np.testing.assert_array_equal(same.peak_E, stats.peak_E)
        for name in ("reap_E", "ean_E", "gate_E"):  # another order of the same float64 numbers
            np.testing.assert_allclose(getattr(same, name), getattr(stats, name), rtol=1e-13, err_msg=name)
    assert not (tmp_path / "out.saliency.work").exists()
    assert "already complete" in call(*scoring(tmp_path / "out.saliency", "--ray", cluster)).output


@by_night
def test_a_driver_killed_while_scoring_is_gone_on_with(running: RayCluster, scored: Saliency, tmp_path: Path) -> None:
    out, said, cluster = tmp_path / "out.saliency", tmp_path / "said", running.address
    with said.open("w") as file:
        process = running.fork(["-m", "shardxform", *scoring(out, "--ray", cluster)], file.fileno(), file.fileno())
    records, deadline = out.parent / "out.saliency.work", time.monotonic() + 240
    while not any("block 1" in path.read_text() for path in records.glob("part-*/progress.json")):
        assert alive(process), said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    assert before(120, lambda: not alive(process))
    cut = (records / "split.json").read_bytes()
    assert not out.exists()
    with pytest.MonkeyPatch.context() as patch:  # cut as it was, whatever the cluster has now
        patch.setattr(session.Session, "slots", lambda *_: 1)
        stopped: list[bytes] = []
        save = cluster_scoring._Split._save
        patch.setattr(
            cluster_scoring._Split,
            "_save",
            lambda *a: (stopped.append((records / "split.json").read_bytes()), save(*a)),
        )
        call(*scoring(out, "--ray", cluster))
    assert set(stopped) == {cut}
    found = Saliency.load(out)
    np.testing.assert_allclose(found.layers[0].reap_E, scored.layers[0].reap_E, rtol=1e-13)
    assert not records.exists()


@by_night
def test_a_worker_that_had_imported_nothing_scores(running: RayCluster, tmp_path: Path) -> None:
    """The other workers of this file are forked from a process with torch, transformers and the program in it."""
    words = scoring(tmp_path / "out.saliency", "--samples", "1")
    with running.as_ray_starts_them():
        call(*words, "--ray", running.address)
    assert Saliency.load(tmp_path / "out.saliency").tokens == 128


def test_work_of_another_kind_is_not_gone_on_with(cluster: str, tmp_path: Path) -> None:
    out, work = tmp_path / "out.saliency", tmp_path / "out.saliency.work"
    work.mkdir()
    (work / "progress.json").write_text("{}")
    assert "a run without --ray" in call(*scoring(out, "--ray", cluster), code=1).output
    (work / "progress.json").rename(work / "mine.txt")
    assert "not shardxform's" in call(*scoring(out, "--ray", cluster), code=1).output
    (work / "mine.txt").unlink()
    (work / "split.json").write_text('{"format": "shardxform.split", "inputs": {"windows": "x"}, "parts": [[0, 1]]}')
    assert "holds unfinished work of other inputs" in call(*scoring(out, "--ray", cluster), code=1).output


def test_an_error_of_a_part_is_told_on_one_line(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_scoring.computing, "shared", lambda _: {"shardxform": "0.0.7"})
    result = call(*scoring(tmp_path / "out.saliency", "--ray", cluster, "-q"), code=1)
    assert "but the driver has 0.0.7" in result.output
    assert len(told(result.output)) == 1


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7])
def test_windows_are_cut_where_batches_end(parts: int) -> None:
    windows = Windows(ids_NT=np.zeros((37, 512), np.int32), fingerprint="f", provenance={}, notes=())
    found = list(cluster_scoring._cut(windows, parts))
    assert [number for part in found for number in part] == list(range(37))
    assert all(part.start % 4 == 0 for part in found)
    assert len(found) == parts


@pytest.mark.parametrize("parts", [None, [], [[0, 3]], [[0, 3], [4, 5]], [[0, 5], [5, 5]], [[0, 5, 1]], [[0, "5"]], 5])
def test_a_cut_that_leaves_windows_out_is_refused(parts: object, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="expected parts that cut 5 windows"):
        cluster_scoring._bounds(parts, tmp_path, 5)
    assert cluster_scoring._bounds([[0, 3], [3, 5]], tmp_path, 5) == [(0, 3), (3, 5)]


def test_a_dry_run_of_score_shows_the_tasks(tmp_path: Path) -> None:
    result = call(*scoring(tmp_path / "out.saliency", "--ray", "--dry-run", "--json"))
    facts = json.loads(result.stdout)["ray"]
    assert facts["task_cpus"] == 1
    assert facts["address"] == "local"
    shown = call(*scoring(tmp_path / "out.saliency", "--ray", "auto", "--dry-run")).output
    assert "as many tasks of 1 CPU as run at once, on auto" in shown


AMID = """
import os, signal
from shardxform.cluster.session import Session
connect = Session._init
def init(self, ray):
    made = ray._raylet.CoreWorker
    def core_worker(*args, **kwargs):
        core = made(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return core
    ray._raylet.CoreWorker = core_worker
    connect(self, ray)
Session._init = init
from shardxform.__main__ import entry
entry()
"""


def test_sigterm_while_it_connects_is_as_at_any_other_time(cluster: str, tmp_path: Path) -> None:
    """Ray's core has installed a handler of its own by then, unless it is told not to."""
    words = [sys.executable, "-c", AMID, *command("prune", tmp_path / "out", "--ray", cluster)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, told(done.stderr)) == (130, ["shardxform: stopped; run the same command again to go on"])

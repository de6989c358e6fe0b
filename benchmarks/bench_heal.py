"""What healing gives and what it costs: divergence from the unpruned model, seconds of CPU time, and memory.

    python benchmarks/bench_heal.py SUITE [--only WORDS] [--seeds 1] [--threads 1] [--json]
    python benchmarks/bench_heal.py steps [--models DIR] [--iters 32] [--batch 4]
    python benchmarks/bench_heal.py shape --dir SCRATCH [--layers 1]

Suites on examples/small-moe (16 -> 8 experts by REAP sum, scored and healed on 64 x 512 tokens of its calibration text,
measured on 32 x 256 held-out ones unless the suite says otherwise):

    what       the router, shared experts, all MoE weights, the whole block, and what held-out windows choose
    data       64, 16 and 4 windows
    steps      first steps that are given, and the one that is chosen; also of every model in DIR, half the experts kept
    extra      16 and 4 windows, and 50 or 28 made of their pieces beside them; code, measured on the Bible
    criteria   who is kept (REAP, REAP sum, frequency, random) and how many (75 %, 50 %, 25 %), plain and healed
    transfer   scored and healed on code alone, measured on the King James Bible alone, and the other way round
    quantized  pruned, healed (`moe`, 60 steps) and rounded to 4 bits: to nearest, and tuned

`--only` runs the cases that have these words in their names. With `--seeds` each is run with as many seeds (which
windows judge, the order of the others, and what is made of their pieces), and a last line has the mean KL over them.

`shape` heals blocks of the shapes of Qwen3.5-35B-A3B, 256 -> 128 experts, 8 x 512 tokens, 10 steps of one window. Every
figure is of the process that a user starts; memory and CPU time as the kernel counts them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
TYPE: Final = ("--dtype", "float32")  # whatever the CPU: the tables of docs/healing.md are of this type
LAYERS: Final = 4
EXPERTS: Final = 16
SEED: Final = 42


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run.

    Attributes:
        name: of the row.
        command: `prune` or `quantize`, with the options that the case is about.
        keep, criterion: experts of every layer, and what they are chosen by; `random` draws them (seed 0).
        windows: of 512 tokens, to score and to heal on.
        tuned_on, measured_on: source of the text, or all of it.
        seed: of what is drawn.
        model: a checkpoint with the tokenizer of examples/small-moe.

    """

    name: str
    command: tuple[str, ...]
    keep: int = 8
    model: Path = SMALL_MOE
    criterion: str = "reap-sum"
    windows: int = 64
    tuned_on: str = ""
    measured_on: str = ""
    seed: int = SEED


@dataclass(slots=True)
class Bench:
    """Runs cases in one scratch directory; manifests are made once."""

    scratch: Path
    threads: int
    rule: str = ""
    manifests: dict[tuple[Any, ...], Path] = field(default_factory=dict)

    def run(self, case: Case) -> dict[str, Any]:
        """Prune, heal and measure one case."""
        out, manifest = self.scratch / "out", self.manifest(case)
        data = () if "--heal" not in case.command and "auto-round" not in case.command else self.data(case)
        command = (case.command[0], str(case.model), str(out), "-m", str(manifest), *case.command[1:], *data)
        seconds, rss, printed = self.call(*command, "--json", "--quiet")
        heldout = self.text("heldout", case.measured_on)
        measured = ("--data", str(heldout), "--samples", "32", "--seqlen", "256")
        work = ("--work", str(self.scratch / "work"))
        found = json.loads(
            self.call("evaluate", str(out), "--against", str(case.model), *measured, *work, "--json", "-q")[2]
        )
        shutil.rmtree(out)
        against, blocks = found["against"], json.loads(printed)["report"]["facts"].get("blocks", ())
        return {
            "case": case.name,
            "seed": case.seed,
            "perplexity": found["perplexity"],
            "of_source": against["perplexity"],
            "kl": against["kl"],
            "kl_error": against["kl_standard_error"],
            "seconds": seconds,
            "peak_rss_bytes": rss,
            "first_steps": [block["healed"]["lr"] for block in blocks if "healed" in block],
        }

    def data(self, case: Case) -> tuple[str, ...]:
        """Options that name the calibration text of a case."""
        text = str(self.text("calib", case.tuned_on))
        size = ("--samples", str(case.windows), "--seqlen", "512")
        return ("--data", text, *size, "--seed", str(case.seed), *TYPE)

    def text(self, name: str, source: str) -> Path:
        """A text of examples/small-moe, or the documents of one source in it."""
        path = SMALL_MOE / "text" / f"{name}.jsonl"
        if not source:
            return path
        own = self.scratch / f"{name}-{source}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        own.write_text("".join(line for line in lines if json.loads(line)["source"] == source), encoding="utf-8")
        return own

    def manifest(self, case: Case) -> Path:
        """The keep manifest of a case."""
        key = (case.model, case.keep, case.criterion, case.windows, case.tuned_on)
        if key not in self.manifests:
            path = self.manifests[key] = self.scratch / f"keep-{len(self.manifests)}.json"
            if case.criterion == "random":
                draw = random.Random(0)
                keep = {str(layer): sorted(draw.sample(range(EXPERTS), case.keep)) for layer in range(LAYERS)}
                path.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
            else:
                self.choose(case, path)
        return self.manifests[key]

    def choose(self, case: Case, path: Path) -> None:
        """Score, and choose by the criterion."""
        saliency = self.scratch / f"saliency-{case.model.name}-{case.windows}-{case.tuned_on or 'all'}.safetensors"
        if not saliency.exists():
            self.call("score", str(case.model), "-o", str(saliency), *self.data(case), "-q")
        self.call("select", str(saliency), "--keep", str(case.keep), "--criterion", case.criterion, "-o", str(path))

    def how(self, command: str) -> tuple[str, ...]:
        """What runs a command: `shardxform`, or that with another rule of healing."""
        if self.rule and command == "prune":
            return (str(Path(__file__).with_name("bench_steps.py")), "command", self.rule)
        return ("-m", "shardxform")

    def call(self, *arguments: str) -> tuple[float, int, str]:
        """Run the command: seconds of CPU time, peak memory in bytes, and what it printed."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        child = subprocess.Popen(
            [sys.executable, *self.how(arguments[0]), *arguments], stdout=subprocess.PIPE, env=environment
        )
        assert child.stdout
        printed = child.stdout.read().decode()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise SystemExit(f"shardxform {' '.join(arguments)}: exit code {child.returncode}")
        return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, printed


def heal(what: str, *more: str, command: Sequence[str] = ("prune",)) -> tuple[str, ...]:
    """A command that heals."""
    return (*command, "--heal", what, *more)


def cases_what() -> Iterator[Case]:
    """What is changed."""
    yield Case(name="as pruned", command=("prune",))
    for what in ("router", "shared", "moe"):
        yield Case(name=f"{what}, 60 x 0.02", command=heal(what, "--heal-iters", "60", "--heal-lr", "0.02"))
    yield Case(name="all, 150 x 0.02", command=heal("all", "--heal-iters", "150", "--heal-lr", "0.02"))
    yield Case(name="all, 150, chosen", command=heal("all", "--heal-iters", "150"))
    yield Case(name="auto (the default)", command=heal("auto"))


def cases_data() -> Iterator[Case]:
    """How much text there is."""
    for windows in (64, 16, 4):
        for name, command in (
            ("as pruned", ("prune",)),
            ("all, 150 x 0.02", heal("all", "--heal-iters", "150", "--heal-lr", "0.02")),
            ("auto", heal("auto")),
        ):
            yield Case(name=f"{windows} windows, {name}", command=command, windows=windows)


def cases_steps(models: Sequence[Path] = (), iters: int = 32, batch: int = 4) -> Iterator[Case]:
    """First steps: given ones, and the one that healing chooses."""
    for model in (SMALL_MOE, *models):
        for windows in (4, 16, 64):
            for rate in ("0.01", "0.02", "0.04", "0.08", "0.16", ""):
                size = ("--heal-iters", str(iters), "--batch-size", str(batch))
                how = (*size, *(("--heal-lr", rate) if rate else ()))
                name = f"{model.name}, {windows} windows, {rate or 'chosen'}"
                yield Case(name=name, command=heal("all", *how), windows=windows, model=model, keep=half(model))


def half(model: Path) -> int:
    """Half the experts of a layer."""
    config = json.loads((model / "config.json").read_text())
    text = config.get("text_config", config)
    return next(int(text[key]) for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in text) // 2


def cases_extra() -> Iterator[Case]:
    """Little text, and windows made of its pieces."""
    little, more_text = (4, 28), (16, 50)
    sizes = [(*little, 4, 32), (*little, 4, 100), (*more_text, 4, 32), (*more_text, 8, 60), (*more_text, 8, 150)]
    sizes += [(64, 192, 8, 150)]
    for windows, extra, batch, iters in sizes:
        how = ("--heal-iters", str(iters), "--batch-size", str(batch))
        for more in (0, extra):
            name = f"{windows} windows and {more}, {iters} steps"
            yield Case(name=name, command=heal("all", *how, "--heal-extra", str(more)), windows=windows)
    for more in (0, 64):
        how = ("--heal-iters", "60", "--heal-extra", str(more))
        name = f"code -> kjv, 32 windows and {more}"
        yield Case(name=name, command=heal("all", *how), windows=32, tuned_on="code", measured_on="kjv")


def cases_criteria() -> Iterator[Case]:
    """Who is kept, and how many."""
    for keep in (12, 8, 4):
        for criterion in ("reap", "reap-sum", "frequency", "random"):
            for name, command in (
                ("plain", ("prune",)),
                ("healed", heal("all", "--heal-iters", "40", "--heal-lr", "0.02")),
            ):
                yield Case(name=f"{keep} by {criterion}, {name}", command=command, keep=keep, criterion=criterion)


def cases_transfer() -> Iterator[Case]:
    """Text of another kind."""
    for one, other in (("code", "kjv"), ("kjv", "code")):
        for what in ("plain", "moe", "auto"):
            command = ("prune",) if what == "plain" else heal(what, "--heal-iters", "60")
            for measured in (other, one):
                name = f"{one} -> {measured}, {what}"
                yield Case(name=name, command=command, windows=32, tuned_on=one, measured_on=measured)


def cases_quantized() -> Iterator[Case]:
    """Four bits."""
    tuned = ("--iters", "50", "--method", "auto-round")
    yield Case(name="pruned, rtn", command=("quantize",))
    yield Case(name="pruned, tuned", command=("quantize", *tuned))
    yield Case(
        name="healed, rtn", command=heal("moe", "--heal-iters", "60", "--heal-lr", "0.02", command=("quantize",))
    )
    yield Case(
        name="healed, tuned",
        command=heal("moe", "--heal-iters", "60", "--heal-lr", "0.02", *tuned, command=("quantize",)),
    )


SUITES: Final = {
    "what": cases_what,
    "data": cases_data,
    "steps": cases_steps,
    "extra": cases_extra,
    "criteria": cases_criteria,
    "transfer": cases_transfer,
    "quantized": cases_quantized,
}


def shape(bench: Bench, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Blocks of the real shape."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from synth import Spec, write_checkpoint

    source, out, manifest = bench.scratch / "source", bench.scratch / "out", bench.scratch / "keep.json"
    write_checkpoint(source, Spec(layers=args.layers, text_only=True, mtp=False, vocab=2048))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MOE / name, source / name)
    keep = {str(layer): list(range(0, 256, 2)) for layer in range(args.layers)}
    manifest.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    data = ("--data", str(SMALL_MOE / "text" / "calib.jsonl"), "--samples", "8", "--seqlen", "512", *TYPE)
    steps = ("--batch-size", "1", "--heal-iters", "10", "--heal-lr", "0.004")
    for what in args.what:
        how = ("--merge",) if what == "merge" else ("--heal", what, *steps)
        command = ("prune", str(source), str(out), "-m", str(manifest), *how, *data, "--json", "-q")
        seconds, rss, printed = bench.call(*command)
        report = json.loads(printed)["report"]
        blocks = report["facts"]["blocks"]
        shutil.rmtree(out)
        yield {
            "case": f"{what}, {args.layers} block(s)",
            "seconds": seconds,
            "peak_rss_bytes": rss,
            "block_seconds": [block["seconds"] for block in report["measured"]],
            "errors": [(block["healed"]["pruned_error"], block["healed"]["healed_error"]) for block in blocks],
        }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    told = f"{row['case']:34}"
    if "kl" in row:
        told += f"{row['perplexity']:9.3f}{row['kl']:9.5f} +- {row['kl_error']:.5f}"
    else:
        told += "  blocks of " + ", ".join(f"{seconds:.1f} s" for seconds in row["block_seconds"])
    told += f"{row['seconds']:9.1f} s{row['peak_rss_bytes'] / 1e9:7.2f} GB"
    return told + "".join(f" {step:.3g}" for step in row.get("first_steps", ()))


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The cases of a suite that were asked for, each with every seed."""
    steps = args.suite == "steps"
    found = cases_steps(models_in(args.models), args.iters, args.batch) if steps else SUITES[args.suite]()
    for case in found:
        if all(word in re.split("[ ,]+", case.name) for word in args.only):
            yield from (replace(case, seed=SEED + more) for more in range(args.seeds))


def models_in(folder: Path | None) -> list[Path]:
    """The checkpoints in a folder."""
    return sorted(path.parent for path in folder.glob("*/config.json")) if folder else []


def over_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """The mean KL of a case, and its standard error over the seeds."""
    kls = [row["kl"] for row in rows]
    error = statistics.stdev(kls) / len(kls) ** 0.5
    seconds = statistics.fmean(row["seconds"] for row in rows)
    return f"{rows[0]['case']:34}{statistics.fmean(kls):18.5f} +- {error:.5f}{seconds:9.1f} s   {len(kls)} seeds"


def main() -> None:
    """Run a suite, and print every row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=[*SUITES, "shape"])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases that have these in their names")
    parser.add_argument("--seeds", type=int, default=1, help=f"from {SEED} on, of each case (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--rule", default="", help="another update of healing, of bench_steps.py")
    parser.add_argument("--dir", type=Path, help="where scratch files go, gigabytes of them for `shape`")
    parser.add_argument("--layers", type=int, default=1, help="blocks of `shape` (default 1)")
    parser.add_argument(
        "--what", nargs="+", default=["moe", "all"], help="of `shape`; merge: --merge alone (default moe all)"
    )
    parser.add_argument("--models", type=Path, help="of `steps`: a folder of checkpoints, as small_moes.py makes them")
    parser.add_argument("--iters", type=int, default=32, help="of `steps` (default 32)")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step, of `steps` (default 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        bench = Bench(Path(folder), args.threads, args.rule)
        done: list[dict[str, Any]] = []
        for row in shape(bench, args) if args.suite == "shape" else map(bench.run, cases(args)):
            print(json.dumps(row) if args.json else line(row), flush=True)
            done = [each for each in done if each["case"] == row["case"]] + [row]
            if len(done) == args.seeds > 1 and "kl" in row and not args.json:
                print(over_seeds(done), flush=True)


if __name__ == "__main__":
    main()

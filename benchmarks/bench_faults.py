"""What `verify --source` tells of weights that are systematically wrong, and how near sound ones come to its limits.

    python benchmarks/bench_faults.py [--iters 0 200] [--group-size 128] [--json FILE]

Tunes examples/small-moe on 64 windows of 64 tokens, with each number of steps (0: rounds to nearest), and prints the
largest of four figures over all of its quantized weights. Then puts one fault at a time into every one of them, takes
the digests out of the record, or the record away, and prints of how many weights verify says that they are wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_criteria import SMALL_MOE, run
from safetensors.torch import load_file, save_file

from shardxform.verification import verify

Array = Any
BITS, ZERO = 4, 8


class Stored:
    """Codes less zero [O, I] and scales [O, G] of the weights of an output, which are changed together."""

    def __init__(self, root: Path) -> None:
        (self.file,) = root.glob("*.safetensors")
        self.tensors = load_file(self.file)
        self.names = sorted(n.removesuffix(".weight_packed") for n in self.tensors if n.endswith(".weight_packed"))

    def codes(self, name: str) -> Array:
        """Codes less zero."""
        words = self.tensors[f"{name}.weight_packed"].numpy().view(np.uint32)
        return ((words[:, :, None] >> np.arange(0, 32, BITS, dtype=np.uint32)) & 15).reshape(len(words), -1).astype(
            int
        ) - ZERO

    def scales(self, name: str) -> Array:
        """Scales, float64."""
        return self.tensors[f"{name}.weight_scale"].float().numpy().astype(float)

    def put(self, name: str, codes: Array, scales: Array) -> None:
        """Codes, clamped to the range, and scales, in the dtype that they have."""
        nibbles = (np.clip(codes, -ZERO, ZERO - 1) + ZERO).astype(np.uint32).reshape(len(codes), -1, 32 // BITS)
        words = (nibbles << np.arange(0, 32, BITS, dtype=np.uint32)).sum(axis=2, dtype=np.uint32)
        old = self.tensors[f"{name}.weight_scale"]
        self.tensors[f"{name}.weight_packed"] = torch.from_numpy(words.view(np.int32))
        self.tensors[f"{name}.weight_scale"] = torch.from_numpy(np.ascontiguousarray(scales)).to(old.dtype)

    def save(self) -> None:
        """Write all of it."""
        save_file(self.tensors, self.file, metadata={"format": "pt"})


def weights() -> dict[str, Array]:
    """The source's weights, float64 [O, I], by the names of modules."""
    out = {}
    for path in SMALL_MOE.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            values = tensor.double().numpy()
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                out[name.removesuffix(".weight")] = values
                continue
            home, _, stack = name.rpartition(".")
            for expert, matrix in enumerate(values):
                parts = np.split(matrix, 2) if stack == "gate_up_proj" else [matrix]
                labels = ("gate_proj", "up_proj") if stack == "gate_up_proj" else ("down_proj",)
                out |= {f"{home}.{expert}.{label}": part for label, part in zip(labels, parts, strict=True)}
    return out


def spread(scales: Array, columns: int) -> Array:
    """The scale of each weight."""
    return np.repeat(scales, columns // scales.shape[1], axis=1)


def figures(stored: Stored, source: dict[str, Array]) -> dict[str, float]:
    """The largest over all weights of what verify sums up, and the smallest scale."""
    share, mean, size, low, high = 0.0, 0.0, 0.0, np.inf, 0.0
    for name in stored.names:
        w, q, scales = source[name], stored.codes(name), stored.scales(name)
        s = spread(scales, w.shape[1])
        inside = np.clip(w / s, -ZERO, ZERO - 1)
        off = q - inside
        share = max(share, float((np.abs(off) > 1.001).mean(axis=1).max()))
        mean = max(mean, abs(float((off > 0.5).mean() - (off < -0.5).mean())))
        square = ((w - s * q) ** 2).sum() - ((w - s * inside) ** 2).sum()
        size = max(size, float((square / ((s**2).sum() / 12)) ** 0.5))
        peaks = np.abs(w.reshape(len(w), scales.shape[1], -1)).max(axis=2) / ZERO
        ratio = np.abs(scales[peaks > 1e-4]) / peaks[peaks > 1e-4]
        low, high = min(low, float(ratio.min())), max(high, float(ratio.max()))
    return {"share": share, "mean": mean, "size": size, "narrowest": low, "widest": high}


# -- faults: of codes and scales of a weight, and the source's, to other codes and scales ------------------------------

Fault = Callable[[Array, Array, Array], tuple[Array, Array]]


def part(array: Array, where: object, change: Callable[[Array], Array]) -> Array:
    """The same but for a part."""
    out = array.copy()
    out[where] = change(out[where])
    return out


def fitted(w: Array, scales: Array) -> tuple[Array, Array]:
    """Codes that are right for these scales."""
    rounded = torch.from_numpy(scales).bfloat16().double().numpy()
    return np.rint(w / spread(rounded, w.shape[1])), rounded


def row_of_group(codes: Array, scales: Array) -> tuple[int, slice]:
    """Where the codes of one group are."""
    return 3, slice(0, codes.shape[1] // scales.shape[1])


def swapped(array: Array, axis: int) -> Array:
    """Two in each other's place."""
    order = np.arange(array.shape[axis])
    order[[3, 4]] = 4, 3
    return np.take(array, order, axis)


FAULTS: dict[str, Fault] = {
    "scale of one group halved": lambda q, s, _: (q, part(s, (3, 0), lambda x: x / 2)),
    "scale of one group doubled": lambda q, s, _: (q, part(s, (3, 0), lambda x: x * 2)),
    "scales of one row halved": lambda q, s, _: (q, part(s, 3, lambda x: x / 2)),
    "scales of all rows halved": lambda q, s, _: (q, s / 2),
    "all scales halved, codes right for them": lambda _, s, w: fitted(w, s / 2),
    "scales of the row before": lambda q, s, _: (q, np.roll(s, 1, axis=0)),
    "zero point of one group off by one": lambda q, s, _: (part(q, row_of_group(q, s), lambda x: x + 1), s),
    "zero point of one row off by one": lambda q, s, _: (part(q, 3, lambda x: x + 1), s),
    "zero point off by one": lambda q, s, _: (q + 1, s),
    "rounded down": lambda _, s, w: (np.floor(w / spread(s, w.shape[1])), s),
    "low bits flipped": lambda q, s, _: ((q + ZERO ^ 1) - ZERO, s),
    "two rows exchanged": lambda q, s, _: (swapped(q, 0), swapped(s, 0)),
    "two columns exchanged": lambda q, s, _: (swapped(q, 1), s),
}
OTHER = "values of another matrix"


def faulty(out: Path, fault: str, source: dict[str, Array]) -> None:
    """Put a fault into every weight."""
    stored = Stored(out)
    before = {name: (stored.codes(name), stored.scales(name)) for name in stored.names}
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in stored.names:
        alike.setdefault(before[name][0].shape, []).append(name)
    for names in alike.values():
        for name, following in zip(names, names[1:] + names[:1], strict=True):
            new = before[following] if fault == OTHER else FAULTS[fault](*before[name], source[name])
            stored.put(name, *new)
    stored.save()


def told(out: Path, *, record: bool) -> int:
    """Of how many weights verify says that they are wrong, digests aside."""
    path = out / "shardxform.json"
    if record:
        value = json.loads(path.read_text())
        value.pop("digests", None)
        path.write_text(json.dumps(value | {"version": 1}))
    else:
        path.unlink()
    names = set(Stored(out).names)
    return len({p.where.rpartition(".")[0] for p in verify(out, source=SMALL_MOE).problems} & names)


def made(scratch: Path, iters: int, group_size: int) -> Path:
    """Quantize with so many steps."""
    out, tune = scratch / str(iters), ["--method", "auto-round", "--iters", iters, "--samples", 64, "--seqlen", 64]
    text = ["--data", SMALL_MOE / "text" / "calib.jsonl"]
    how = ["--format", "compressed-tensors", "--group-size", group_size, "-q"]
    run("quantize", SMALL_MOE, out, *how, *([*tune, *text] if iters else ["--method", "rtn"]))
    return out


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, nargs="+", default=[0, 200])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    source, seen = weights(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for iters in asked.iters:
            out = made(scratch, iters, asked.group_size)
            seen[str(iters)] = {"figures": figures(Stored(out), source), "weights": len(Stored(out).names)}
            print(f"{iters} steps, {seen[str(iters)]['weights']} weights: {seen[str(iters)]['figures']}", flush=True)
            for fault in ("none", *FAULTS, OTHER):
                counts = []
                for record in (True, False):
                    copy = scratch / "copy"
                    shutil.copytree(out, copy)
                    if fault != "none":
                        faulty(copy, fault, source)
                    counts.append(told(copy, record=record))
                    shutil.rmtree(copy)
                seen[str(iters)][fault] = counts
                print(f"  {fault:42} {counts[0]:4} with the record's steps, {counts[1]:4} without", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()

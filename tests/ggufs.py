"""Tiny GGUF files for tests, made with the `gguf` package, and the files that it reads back.

`write_gguf` writes any tensors; `moe` gives those of a small Mixture-of-Experts model of llama.cpp's, with a vocabulary
that it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | tuple[Kind, np.ndarray]],
    *,
    arch: str = "qwen3moe",
    max_bytes: int = 0,
    max_tensors: int = 0,
) -> list[Path]:
    """Write one file, or several where a limit is given, and return their paths.

    Args:
        path: of the one file; the others are called after it.
        metadata: key -> an int (uint32), float, bool, text, list of these, or (type, value).
        tensors: name -> array, slowest dimension first; or the type of its blocks, and rows of bytes.
        arch: `general.architecture`.
        max_bytes: most bytes of tensors in one file.
        max_tensors: most tensors in one file.

    """
    writer = gguf.GGUFWriter(path, arch, split_max_size=max_bytes, split_max_tensors=max_tensors)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in metadata.items():
        if isinstance(value, tuple):
            writer.add_key_value(key, value[1], value[0])
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            add[type(value)](key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=tensor[0])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(path.parent.glob(f"{path.stem}*.gguf"))


def read_gguf(*paths: Path) -> dict[str, np.ndarray]:
    """Arrays of all tensors as the `gguf` package reads them, in blocks' bytes where they are blocks."""
    return {t.name: np.array(t.data) for path in paths for t in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict[str, Any]:
    """Metadata as the `gguf` package reads it."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def blocks(rng: np.random.Generator, kind: Kind, shape: tuple[int, ...]) -> tuple[Kind, np.ndarray]:
    """Random blocks of any type, in bytes; values may be anything."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    return kind, rng.integers(0, 256, (*shape[:-1], shape[-1] // elements * size), "u1")

"""All keys of a GGUF file: what it is, the model's sizes, the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Final

from shardxform.runtimes.gguf.architecture import Architecture, Named, vocabulary
from shardxform.runtimes.gguf.keys import Key, Recorder
from shardxform.runtimes.gguf.tokenizer import add_tokenizer, read_json

__all__ = ["metadata_of"]

_SAMPLING: Final = (
    *("sequence", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold", "temperature"),
    *("penalty_last_n", "penalty_repeat", "mirostat", "mirostat_tau", "mirostat_eta"),
)
"""Keys of generation_config.json that llama.cpp takes as defaults of sampling."""


def metadata_of(
    architecture: Architecture,
    tensors: Iterable[Named],
    root: Path,
    *,
    name: str,
    file_type: int,
    pre_tokenizer: str = "",
) -> list[Key]:
    """List every key of the file, in the order of llama.cpp's converter.

    Args:
        architecture: the model, as the file is to hold it.
        tensors: of the file.
        root: folder of the tokenizer's files and of generation_config.json.
        name: of the model, for people.
        file_type: llama.cpp's number of what most tensors are stored as: 0 F32, 1 F16, 2 Q4_0, 7 Q8_0, 32 BF16.
        pre_tokenizer: llama.cpp's name of how text is split, where it cannot be told; else empty.

    Raises:
        SchemeError: the config lacks what llama.cpp needs, or says what it would run in another way; a file of the
            tokenizer is missing, malformed or unknown to llama.cpp.

    """
    gguf = vocabulary()
    recorder = Recorder(architecture.name, gguf)
    writer = recorder.writer
    writer.add_type(gguf.GGUFType.MODEL)
    _add_sampling(writer, read_json(root, "generation_config.json") or {})
    writer.add_name(name)
    writer.add_size_label(_size_label(tensors))
    architecture.kind.check(architecture)
    architecture.kind.keys(architecture, recorder)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(architecture, recorder, root, pre_tokenizer)
    return recorder.keys()


def _add_sampling(writer: object, config: Mapping[str, object]) -> None:
    for key in _SAMPLING:
        if config.get(key) is not None:
            getattr(writer, f"add_sampling_{'temp' if key == 'temperature' else key}")(config[key])


def _size_label(tensors: Iterable[Named]) -> str:
    """Number of experts, and of parameters when there is but one of them, as llama.cpp's converter writes it."""
    shared = single = count = stacks = 0
    for tensor in tensors:
        size, experts = prod(tensor.shape), tensor.shape[-3] if len(tensor.shape) > 2 else 0
        if "_exps." in tensor.name and experts:
            single += size // experts
            count += experts
            stacks += 1
        else:
            shared += size
    label: str = vocabulary().size_label(shared + single * count, shared, single, count // stacks if stacks else 0)
    return label

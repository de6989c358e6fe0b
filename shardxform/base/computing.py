"""What computes, where that decides bytes: versions of libraries, instructions of the CPU, the kind of device.

One rule for every command. What is still under way, merged or done on another machine by something else is refused,
naming the difference: two computations would be mixed. What is finished is not done again; the difference is said.
Copying decides no byte by what computes, and rounding to nearest none but by this program's own version.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any, Final

from shardxform import __version__
from shardxform.base.constants import constants

__all__ = ["KEY", "here", "of_model", "of_rounding", "shared", "without"]

KEY: Final = "made_by"
"""Where records have it among their inputs."""

_LIBRARIES: Final = ("torch", "transformers")


def of_rounding() -> dict[str, str]:
    """What decides the bytes of weights rounded to nearest."""
    return {"shardxform": __version__}


def of_model(device: str) -> dict[str, str]:
    """What decides the numbers of a model that is run on `device`, such as `cpu` or `cuda:0`.

    Constants of the code stand for themselves: a version under development may have others.
    """
    libraries = {name: _version(name) for name in _LIBRARIES}
    return {**of_rounding(), **libraries, **_device(device.partition(":")[0], device), "constants": _constants()}


def shared(device: str) -> dict[str, str]:
    """What driver and workers must agree on; the driver may lack the GPU that they have."""
    found = of_model(device)
    return (
        found if "instructions" in found else {name: found[name] for name in ("shardxform", *_LIBRARIES, "constants")}
    )


def here(names: Iterable[str]) -> dict[str, str]:
    """What this process has of what is named, as `of_model` on a CPU names it."""
    wanted = set(names)
    found = of_model("cpu") if wanted - {"shardxform"} else of_rounding()
    return {name: found[name] for name in wanted}


def without(inputs: Mapping[str, object]) -> dict[str, Any]:
    """Inputs but for what computed: what a finished result is compared by."""
    return {key: value for key, value in inputs.items() if key != KEY}


@functools.cache
def _version(library: str) -> str:
    from importlib.metadata import version  # with it come parsers of mail, which most commands need not load

    return version(library)


def _device(kind: str, device: str) -> dict[str, str]:
    if kind == "cpu":
        return {"instructions": _instructions(), "arithmetic": _arithmetic()}
    if kind == "cuda":
        import torch

        return {"device": torch.cuda.get_device_name(device) if torch.cuda.is_available() else kind}
    return {"device": kind}


def _constants() -> str:
    """First digits of a digest of the constants that decide bytes."""
    return hashlib.sha256(repr(sorted(constants().items())).encode()).hexdigest()[:12]


def _instructions() -> str:
    """Architecture and vector instructions that torch computes with."""
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@functools.cache
def _arithmetic() -> str:
    """First digits of a digest of small products, norms and activations: what no name of instructions tells.

    Which kernel a product takes depends on the CPU, and on settings of the libraries below torch, which name them
    differently or not at all; the last bits of what they give tell them apart.
    """
    import torch

    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.sin(torch.arange(96 * 320, dtype=torch.float32)).view(96, 320).to(dtype)
        other = torch.cos(torch.arange(320 * 80, dtype=torch.float32) * 0.7).view(320, 80).to(dtype)
        product = (one @ other).float()
        norm = product.square().mean(-1).rsqrt()
        for found in (product, product.softmax(-1), torch.nn.functional.silu(product), norm):
            digest.update(found.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]

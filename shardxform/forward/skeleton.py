"""A model without weights: transformers' own modules on the meta device, filled one decoder block at a time.

Whatever surrounds a block is the model's own code too: its `forward` is called with all blocks but one passing their
input through, so that masks, rotary embeddings and positions are made as the model makes them.

Transformers has no code for layers of multi-token prediction. They are run as vLLM's `qwen3_next_mtp` and
`deepseek_mtp` run them: the embedding of the next token and the hidden state after the final norm, each normed, side by
side through a projection, then a decoder block. A second one takes the first one's output and the token after.
"""

# B: sequences, T: positions, H: hidden size, V: vocabulary.

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from shardxform.base.tensors import TensorRef
from shardxform.calibration import Windows
from shardxform.errors import CheckpointError, ExecutionError, FamilyError
from shardxform.forward.adapting import compute_experts, take_apart, weigh_inputs
from shardxform.forward.attention import attend_by_rows
from shardxform.forward.runtime import give_back, keep_few_kernels
from shardxform.forward.weights import (
    IMPLEMENTATION,
    ExpertBank,
    Observer,
    Weights,
    attach,
    detach,
    experts_module,
    stack_names,
)
from shardxform.model.families.base import Family
from shardxform.model.layout import Layout, refuse_longer
from shardxform.model.tied_head import is_tied

__all__ = ["MtpLayer", "Skeleton", "mtp_layer", "mtp_numbers"]

_META: Final = torch.device("meta")
_TILE_ROWS: Final = 16384
_NOT_THE_MODEL: Final = {  # what a config may say besides: how it is stored and run, and what else is given back
    "_attn_implementation",
    "_experts_implementation",
    "architectures",
    "attn_implementation",
    "dtype",
    "experts_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "quantization_config",
    "return_dict",
    "torch_dtype",
}


class Skeleton:
    """The modules of one checkpoint's model.

    Attributes:
        weights: where tensors are read.
        layout: of the checkpoint.

    """

    def __init__(self, weights: Weights) -> None:
        """Make the model on the meta device.

        Raises:
            FamilyError: blocks of the family are not run, or transformers does not take the config.

        """
        family = weights.layout.family
        if family.not_run:
            raise FamilyError(f"family {family.name} is not run: {family.not_run}")
        _refuse_older(family)
        keep_few_kernels()
        self.weights = weights
        self.layout = weights.layout
        self._model = _meta_model(self.layout, weights)
        self._decoder: Any = _decoder_of(self._model)
        names = self.layout.family.decoder
        self._layers: Any = getattr(self._decoder, names.attribute(names.blocks))
        self._blocks: list[nn.Module] = list(self._layers)
        self._norm: nn.Module = getattr(self._decoder, names.attribute(names.norm))
        self._table: nn.Module = getattr(self._decoder, names.attribute(names.embeddings))
        if any(experts_module(self._blocks[layer]) is None for layer in self.layout.moe_layers):
            raise FamilyError(
                f"family {family.name} is not run with transformers {transformers.__version__}, whose class computes"
                " experts in a way of its own; that of a newer one may not"
            )
        for module in self._blocks:
            _pass_through(module, _with_all_positions if self.layout.family.shares_selection else _alone)
        _pass_through(self._norm, _alone)

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self._blocks)

    @property
    def hidden_size(self) -> int:
        """Channels of a hidden state."""
        return int(self._decoder.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self._decoder.config.vocab_size)

    # -- before and after the blocks ----------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] that enter the first block; reads the embeddings of the tokens that occur."""
        unique, local_BT = torch.unique(ids_BT, return_inverse=True)
        rows = self.weights.rows(self.layout.embeddings, unique.tolist())
        with _filled(self._table, {"weight": rows}), _told():
            hidden: torch.Tensor = self._decoder(input_ids=local_BT.to(rows.device), use_cache=False).last_hidden_state
        return hidden

    @contextlib.contextmanager
    def final_norm(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Load the final norm: a function of hidden states [B, T, H] that left the last block, both float32."""
        names = [(each, f"{self.layout.norm}.{each}") for each in self._norm.state_dict()]
        with _filled(self._norm, {each: self.weights.tensor(name, torch.float32) for each, name in names}):
            yield self._normed

    @contextlib.contextmanager
    def head(self, shared: torch.Tensor | None = None) -> Iterator[OutputHead]:
        """Load the final norm and the output head; `shared` is the same head, loaded for another model."""
        module: Any = self._model.get_output_embeddings()
        biased = getattr(module, "bias", None) is not None
        bias = self.weights.tensor(f"{self.layout.wrapper.head}.bias", torch.float32) if biased else None
        with self.final_norm():
            yield OutputHead(self, self.weights.head(self.head_ref.name) if shared is None else shared, bias)

    def _normed(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        return self.call(hidden_BTH.float(), self._norm)

    @property
    def head_ref(self) -> TensorRef:
        """Where the output head lies: a tensor of its own, or the embeddings.

        A tied head that is stored all the same is run as transformers runs it: as it is stored.
        """
        embeddings = is_tied(self.layout) and not self.weights.has(self.layout.head)
        return self.weights.ref(self.layout.embeddings if embeddings else self.layout.head)

    # -- blocks -------------------------------------------------------------------------------------------------

    def prefix(self, layer: int) -> str:
        """What the names of a decoder block's tensors begin with."""
        return f"{self.layout.blocks}{layer}."

    def refuse_longer(self, windows: Windows) -> None:
        """Refuse windows of more tokens than every block attends to in full; see `layout.refuse_longer`."""
        refuse_longer(self.layout, int(windows.ids_NT.shape[1]), self.weights.checkpoint.where)

    def module(self, layer: int) -> nn.Module:
        """Look at the module of a decoder block, which has no weights unless it is loaded."""
        return self._blocks[layer]

    def experts_name(self, layer: int) -> str:
        """Local name of the routed experts of a decoder block; empty in a dense one."""
        module = self._blocks[layer]
        experts = experts_module(module)
        return next((name for name, each in module.named_modules() if each is experts), "") if experts else ""

    @contextlib.contextmanager
    def block(self, layer: int, observer: Observer | None = None) -> Iterator[Block]:
        """Load decoder block `layer`, but for its routed experts, which are read as tokens reach them.

        Raises:
            CheckpointError: a tensor of the block is missing or has another shape than the model wants.

        """
        with self.block_of("block", layer, self.prefix(layer), observer, as_layer=layer) as block:
            yield block

    @contextlib.contextmanager
    def block_of(
        self, scope: str, layer: int, prefix: str, observer: Observer | None, *, as_layer: int
    ) -> Iterator[Block]:
        """Load what is under `prefix` into the module of decoder block `as_layer`: an MTP layer is built like one."""
        module = self._blocks[as_layer]
        experts = experts_module(module)
        bank = ExpertBank(lambda e: self.weights.expert(scope, layer, e), self.weights.precision, observer)
        with _filled(module, dict(self._block_tensors(module, experts, prefix))):
            if experts is not None:
                attach(experts, bank)
            try:
                yield Block(self, module, bank)
            finally:
                if experts is not None:
                    detach(experts)
                bank.loaded.clear()
        give_back()

    @contextlib.contextmanager
    def tunable(self, layer: int, names: Collection[str]) -> Iterator[Block]:
        """Load a copy of decoder block `layer` whose modules are to be replaced; it is thrown away at the end.

        Args:
            layer: of the block.
            names: its modules, linear ones or the routed experts as a whole, whose weights are wanted in the dtype they
                are stored in. The weights of other experts are read as tokens reach them.

        """
        original = self._layers[layer]
        module = copy.deepcopy(original)
        experts = experts_module(module)
        local = next((name for name, each in module.named_modules() if each is experts), "")
        bank = ExpertBank(lambda e: self.weights.expert("block", layer, e), self.weights.precision)
        tensors = self._block_tensors(module, experts, self.prefix(layer), names)
        _put(module, dict(tensors))
        if experts is not None and local in names:
            _put(experts, self.stacked(layer))
        elif experts is not None:
            attach(experts, bank)
        self._layers[layer] = module
        try:
            yield Block(self, module, bank)
        finally:
            self._layers[layer] = original
            bank.loaded.clear()
            give_back()

    def stacked(self, layer: int) -> dict[str, torch.Tensor]:
        """All routed experts of a block in the dtype they are stored in, by the names of the model's parameters.

        They are [E, 2I, H] and [E, H, I] however the model's own module has them, rows in the order that its gate
        takes, and biases [E, 2I] and [E, H] where it has any; I for 2I where there is no gate.
        """
        stacks: dict[str, torch.Tensor] = {}
        names = stack_names(experts_module(self._blocks[layer]))
        for expert in range(self.layout.num_experts):
            values = self.weights.expert("block", layer, expert).at_rest()
            for name, value in zip(names, values, strict=True):
                if value is None:
                    continue
                if name not in stacks:
                    stacks[name] = torch.empty(
                        self.layout.num_experts, *value.shape, dtype=value.dtype, device=self.weights.precision.device
                    )
                stacks[name][expert] = value
        return stacks

    def module_name(self, name: str) -> str:
        """What transformers calls a module or parameter of a block that is called `name` in the checkpoint."""
        return self.layout.family.module_name(name)

    def stored_name(self, name: str, prefix: str) -> str:
        """What a module or parameter of the block under `prefix` is called in the checkpoint.

        Where it may have several names, such as that of a release and the one that transformers saves it under, it is
        the one that is there.
        """
        pairs = self.layout.family.renames
        names = [name.replace(theirs, ours, 1) for ours, theirs in pairs if theirs in name] + [name]
        there = (
            each for each in names if self.weights.has(prefix + each) or self.weights.has(f"{prefix}{each}.weight")
        )
        return next(there, names[0])

    def norm_like_final(self, name: str) -> nn.Module:
        """Make another norm of the kind of the final one, with the weight of that name."""
        norm = copy.deepcopy(self._norm)
        norm.__dict__.pop("forward", None)  # as `_pass_through` leaves it
        norm.load_state_dict({"weight": self.weights.tensor(name)}, assign=True)
        return norm.requires_grad_(False)

    def _block_tensors(
        self, module: nn.Module, experts: nn.Module | None, prefix: str, at_rest: Collection[str] = ()
    ) -> Iterator[tuple[str, torch.Tensor]]:
        inside = {id(tensor) for tensor in experts.parameters()} if experts is not None else set()
        for local, wanted in module.state_dict(keep_vars=True).items():
            if id(wanted) in inside:
                continue
            dtype = torch.float32 if wanted.dtype == torch.float32 or self._keeps_float32(local) else None
            if parts := self.layout.family.joined.get(local):
                yield local, torch.cat([self.weights.tensor(prefix + part, dtype) for part in parts])
                continue
            name = prefix + self.stored_name(local, prefix)
            resting = local.endswith(".weight") and local.removesuffix(".weight") in at_rest
            found = self.weights.at_rest(name) if resting else self.weights.tensor(name, dtype)
            if found.shape != wanted.shape:
                raise CheckpointError(
                    f"{self.weights.checkpoint.where}: tensor '{name}': shape {list(found.shape)},"
                    f" but the model of config.json wants {list(wanted.shape)}"
                )
            yield local, found

    def _keeps_float32(self, local: str) -> bool:
        patterns: Any = self._model._keep_in_fp32_modules_strict or ()
        return any(re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", local) for pattern in patterns)

    def call(self, hidden_BTH: torch.Tensor, module: nn.Module) -> torch.Tensor:
        """Call the decoder on hidden states that enter `module`, which is loaded; the others pass them on.

        The states may come from elsewhere, as those that were read from disk do.
        """
        hidden_BTH = hidden_BTH.to(self.weights.precision.device)
        with _computing(module, hidden_BTH), _told():
            out: torch.Tensor = self._decoder(inputs_embeds=hidden_BTH, use_cache=False).last_hidden_state
        return out


class Block:
    """A decoder block that is loaded."""

    def __init__(self, skeleton: Skeleton, module: nn.Module, bank: ExpertBank) -> None:
        self._skeleton = skeleton
        self.module = module
        self.bank = bank

    def __call__(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] that leave the block when `hidden_BTH` enter it."""
        return self._skeleton.call(hidden_BTH, self.module)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Say in a line what keeps the model's own code from running, such as a config that contradicts itself."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        memory = isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)
        kind = ExecutionError if memory else FamilyError
        raise kind(f"transformers cannot run the model of config.json: {_line(e)}") from e


def _line(error: Exception) -> str:
    """All that an error of a library says, in a line; checks of configs say what they checked in the first of two."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class OutputHead:
    """The final norm and the output head, computed in float32 whatever the blocks are.

    bfloat16 resolves logits of 16 to an eighth, so that tokens tie. `weight` is the head [V, H] in the dtype it is
    stored in, on the device; `bias` [V] is float32, or None.
    """

    def __init__(self, skeleton: Skeleton, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._skeleton = skeleton
        self.weight = weight
        self._bias = bias

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Logits [N, V], float32, of hidden states [N, H] that left the last block, wherever they are."""
        model: Any = self._skeleton._model
        module, weight, bias = model.get_output_embeddings(), self.weight, self._bias

        def tiled(hidden: torch.Tensor) -> torch.Tensor:
            """The head a tile of rows at a time: it is a gigabyte, and would be two in float32."""
            tiles = (weight[at : at + _TILE_ROWS].float() for at in range(0, len(weight), _TILE_ROWS))
            logits = torch.cat([nn.functional.linear(hidden, tile) for tile in tiles], dim=-1)
            return logits if bias is None else logits + bias

        hidden = hidden_NH[None].to(weight.device, torch.float32)
        with _computing(self._skeleton._norm, hidden), _forward_of(module, tiled), _told():
            logits: torch.Tensor = model(inputs_embeds=hidden, use_cache=False).logits
        return logits[0]


def _meta_model(layout: Layout, weights: Weights) -> Any:  # noqa: ANN401
    """Transformers' text model for the config of a checkpoint, its buffers real and its parameters not.

    Where there is none of the text alone it is the whole one, whose other parts are never called.
    """
    text = {key: _number(value) for key, value in layout.text.items() if key not in _NOT_THE_MODEL}
    wrapper = next((w for w in layout.family.wrappers if w.text_key is None), layout.wrapper)
    text["pad_token_id"] = 0  # it says nothing of values, and must be a row: only those of tokens that occur are loaded
    auto: Any = AutoModelForCausalLM
    if wrapper.text_key is None:
        text["model_type"] = wrapper.model_type
    else:
        whole = {key: value for key, value in layout.config.items() if key not in _NOT_THE_MODEL}
        text, auto = {**whole, wrapper.text_key: text}, AutoModelForImageTextToText
    _refuse_unknown(text["model_type"])
    try:
        config = AutoConfig.for_model(**copy.deepcopy(text))  # it changes what is nested in it
        if auto is AutoModelForCausalLM and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # it has no entry for it
            make: Any = getattr(transformers, wrapper.architecture)._from_config
        else:
            make = functools.partial(auto.from_config, trust_remote_code=False)
        with _META:
            model = make(config, dtype=weights.precision.dtype, experts_implementation="eager")
        with _META:
            _adapt(_decoder_of(model), layout.family)
        compute_experts(model, IMPLEMENTATION, layout.family.experts)
        attend_by_rows(model)
        _make_buffers(model, weights.precision.device)
    except Exception as e:  # of transformers and what checks its configs, which differ by version
        reason = _line(e)
        raise FamilyError(f"config.json: transformers does not make a {wrapper.architecture} of it: {reason}") from e
    return model.eval().requires_grad_(False)


def _refuse_older(family: Family) -> None:
    """Refuse a transformers whose class of the family computes something else than the model is.

    Raises:
        FamilyError: says from which one on it does.

    """
    if Version(transformers.__version__).release < family.run_from:
        since = ".".join(map(str, family.run_from))
        raise FamilyError(
            f"family {family.name} is not run with transformers {transformers.__version__}, whose class computes"
            f" another model: expected {since} or newer"
        )


def _refuse_unknown(model_type: str) -> None:
    """Refuse a type that came with a newer transformers than the one that is installed.

    Raises:
        FamilyError: says which that is.

    """
    if model_type not in CONFIG_MAPPING:
        raise FamilyError(
            f"config.json: transformers {transformers.__version__} has no class for model_type '{model_type}', which a"
            " newer one may have; what runs no model works without"
        )


def _adapt(decoder: nn.Module, family: Family) -> None:
    take_apart(decoder, family.split)
    if family.experts.weighs_inputs:
        weigh_inputs(decoder, family.experts.home)


def _decoder_of(model: Any) -> Any:  # noqa: ANN401
    """The module that calls the decoder blocks; some classes say that they themselves are it."""
    found = model.get_decoder()
    return found.model if hasattr(found, "model") and hasattr(found, "lm_head") else found


def _number(value: object) -> Any:  # noqa: ANN401
    """A value of a config as its class takes it: infinity is written in several ways."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        value = value["__float__"]
    return float(value) if value in ("Infinity", "-Infinity", "NaN") else value


@torch.no_grad()
def _make_buffers(model: Any, device: torch.device) -> None:  # noqa: ANN401
    """Make the buffers that no checkpoint holds, as transformers does when it loads one: by its own initialization.

    Raises:
        ValueError: there is one that it leaves as it is.

    """
    for path, module in model.named_modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            empty = torch.empty_like(module._buffers[name], device=device)
            module._buffers[name] = empty.fill_(math.nan) if empty.is_floating_point() else empty
        if names:
            model._init_weights(module)
        for name in names:
            if bool(module._buffers[name].isnan().any()):
                raise ValueError(f"nothing says what the buffer {path}.{name} holds")


def _pass_through(module: nn.Module, hand_on: Callable[[torch.Tensor], object]) -> None:
    """Have a module hand its first argument on, and what belongs to it, until it is to compute."""
    module.forward = lambda hidden_states, *_args, **_kwargs: hand_on(hidden_states)


def _alone(hidden_BTH: torch.Tensor) -> torch.Tensor:
    return hidden_BTH


def _with_all_positions(hidden_BTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As a block that gives its selection of positions to the next: all of them, as no window is longer than it."""
    batch, length, _ = hidden_BTH.shape
    positions = torch.arange(length, dtype=torch.int32, device=hidden_BTH.device)
    return hidden_BTH, positions.expand(batch, length, length)


@contextlib.contextmanager
def _computing(module: nn.Module, entering_BTH: torch.Tensor) -> Iterator[None]:
    """Let a module compute that else passes through, on these states: some decoders scale all that is given to them."""
    passing = module.forward
    del module.forward
    compute = module.forward
    module.forward = lambda hidden_states, *args, **kwargs: compute(entering_BTH, *args, **kwargs)  # noqa: ARG005
    try:
        yield
    finally:
        module.forward = passing


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def _filled(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put tensors in a module's parameters and buffers, and take them out again."""
    slots = [_slot(module, name) for name in tensors]
    kept = [table[key] for table, key in slots]
    _put(module, tensors)
    try:
        yield
    finally:
        for (table, key), meta in zip(slots, kept, strict=True):
            table[key] = meta


def _put(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put tensors in a module's parameters and buffers, which then alone hold them."""
    for name, tensor in tensors.items():
        table, key = _slot(module, name)
        table[key] = nn.Parameter(tensor, requires_grad=False) if isinstance(table[key], nn.Parameter) else tensor
    tensors.clear()


def _slot(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary that holds a parameter or buffer, and its key there."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if key in owner._parameters else owner._buffers), key


# -- multi-token prediction --------------------------------------------------------------------------------------------


_EMBEDDING, _HIDDEN, _PROJECTION, _OUTPUT = range(4)
_SHIFT: Final = 1


class MtpLayer:
    """An MTP layer that is loaded."""

    def __init__(self, skeleton: Skeleton, blocks: Sequence[Block], names: tuple[str, str, str, str]) -> None:
        self._skeleton = skeleton
        self._blocks = blocks
        self._norms = [skeleton.norm_like_final(names[at]) for at in (_EMBEDDING, _HIDDEN, _OUTPUT)]
        self._projection_HI = skeleton.weights.tensor(names[_PROJECTION])  # its shape: see `Weights.check`

    def __call__(self, ids_BT: torch.Tensor, normed_BTH: torch.Tensor) -> torch.Tensor:
        """Run the layer at every position but the last, which has no next token.

        Args:
            ids_BT: token ids.
            normed_BTH: hidden states of the same positions, after the final norm or the layer's before.

        Returns:
            its output [B, T - 1, H], normed: what a further MTP layer takes.

        """
        embedding_norm, hidden_norm, output_norm = self._norms
        next_BTH = embedding_norm(self._skeleton.embed(ids_BT[:, _SHIFT:]))
        both_BTI = torch.cat((next_BTH, hidden_norm(normed_BTH[:, :-_SHIFT])), dim=-1)
        hidden_BTH = nn.functional.linear(both_BTI, self._projection_HI)
        for block in self._blocks:
            hidden_BTH = block(hidden_BTH)
        out: torch.Tensor = output_norm(hidden_BTH)
        return out


@contextlib.contextmanager
def mtp_layer(skeleton: Skeleton, layer: int, observer: Observer | None) -> Iterator[MtpLayer]:
    """Load MTP layer `layer`, counted from 0.

    Raises:
        FamilyError: the family has no such layer.
        CheckpointError: one of its tensors is missing.

    """
    layout = skeleton.layout
    mtp = layout.family.mtp
    if mtp is None or layer >= layout.mtp_layers:
        raise FamilyError(f"family {layout.family.name}: no MTP layer {layer}")
    first = layer * layout.mtp_blocks + (layout.num_layers if mtp.follows_blocks else 0)
    numbers = range(first, first + layout.mtp_blocks)
    embedding, hidden, projection, output = (
        layout.wrapper.full(name).replace("{l}", str(first)).replace("{last}", str(numbers[-1])) for name in mtp.inputs
    )
    like = [_block_like(skeleton, mtp.like(layout.text) + at) for at in range(layout.mtp_blocks)]
    if len(set(like)) < len(like):
        raise FamilyError(f"family {layout.family.name}: MTP layers of several blocks of one kind are not run")
    with contextlib.ExitStack() as stack:
        blocks = []
        for number, as_layer in zip(numbers, like, strict=True):
            prefix = layout.wrapper.full(mtp.prefix + mtp.inner).replace("{l}", str(number))
            blocks.append(stack.enter_context(skeleton.block_of("mtp", layer, prefix, observer, as_layer=as_layer)))
        yield MtpLayer(skeleton, blocks, (embedding, hidden, projection, output))


def _block_like(skeleton: Skeleton, like: int) -> int:
    """A decoder block that has the tensors of block `like`, which may be beyond the last: the nearest to it."""
    family, text = skeleton.layout.family, skeleton.layout.text

    def tensors(layer: int) -> list[bool]:
        return [family.holds(template.when, text, layer) for template in family.block]

    wanted = tensors(like)
    for layer in range(min(like, skeleton.num_blocks - 1), -1, -1):
        if tensors(layer) == wanted:
            return layer
    raise FamilyError(f"family {family.name}: no decoder block is like those of its MTP layers, which are not run")


def mtp_numbers(skeleton: Skeleton) -> range:
    """MTP layers that the checkpoint has tensors of, and whose experts can be scored."""
    layout = skeleton.layout
    there = [layer for layer in range(layout.mtp_layers) if skeleton.weights.has_experts("mtp", layer)]
    return range(len(there)) if there == list(range(len(there))) else range(0)

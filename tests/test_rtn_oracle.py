"""Rounding and packing against auto-round's and compressed-tensors' own code, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shardxform.formats import packing, rounding
from shardxform.formats import scheme as grids

torch = pytest.importorskip("torch")
pytest.importorskip("auto_round")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.oracle

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ROWS = 96


def weights(columns: int, dtype: str, seed: int = 0) -> Any:
    """Rows of very different size with outliers, ties, zeros of both signs, tiny and all-zero groups."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(ROWS, columns, generator=generator)
    w *= torch.exp2(torch.randint(-30, 8, (ROWS, 1), generator=generator).float())
    w[torch.rand(w.shape, generator=generator) < 0.02] *= 20
    w[torch.rand(w.shape, generator=generator) < 0.03] = -0.0
    w[5] = torch.randint(-16, 17, (columns,), generator=generator) / 2  # exact halves of the scale
    w[6, 0], w[6, 1:] = 1.0, w[6, 1:].clamp(-1, 1)
    w[7, 0], w[7, 1] = 3.0, -3.0  # equal sides
    w[8, :32] = 0.0
    w[9] = 0.0
    w[10] = 1e-9
    w[11] = -3e-5
    w[12] = 3e-5
    return w.to(TORCH[dtype])


def raw(w: Any) -> np.ndarray:
    return w.numpy() if w.dtype == torch.float32 else w.view(torch.uint16).numpy()


def Grid(**options: Any) -> grids.Grid:
    """Upstream's scales are float16."""
    return grids.Grid(**{"scale_grid": "fp16", **options})


def ours(w: Any, dtype: str, grid: grids.Grid, layout: str, backend: str) -> tuple[np.ndarray, np.ndarray]:
    out, stats = rounding.quantize(raw(w), dtype, grid, layout=layout, backend=backend)
    assert stats.ok
    return out.words, out.scales


@pytest.mark.parametrize("backend", ["numpy", "auto"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("bits", "group_size", "columns"), [(4, 128, 512), (4, 32, 160), (4, 64, 128), (8, 128, 256)])
def test_gptq_tensors_equal_those_of_model_free_rtn(
    bits: int, group_size: int, columns: int, dtype: str, backend: str
) -> None:
    from auto_round.utils.model_free_utils import quantize_weight_rtn

    w = weights(columns, dtype)
    qweight, qzeros, scales = quantize_weight_rtn(w, bits, group_size, packing="auto_round:auto_gptq")
    words, found = ours(w, dtype, Grid(bits=bits, group_size=group_size), "gptq", backend)
    np.testing.assert_array_equal(found, scales.view(torch.uint16).numpy())
    np.testing.assert_array_equal(words, qweight.numpy())
    np.testing.assert_array_equal(packing.qzeros(found.shape[0], ROWS, bits), qzeros.numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize(
    ("bits", "group_size", "columns"), [(4, 128, 256), (4, 128, 160), (4, -1, 160), (8, 64, 96), (8, -1, 64)]
)
def test_gptq_tensors_equal_those_packed_from_a_layer(bits: int, group_size: int, columns: int, dtype: str) -> None:
    """The path of a loaded model: quantize and dequantize the layer's weight, then pack what it holds."""
    from auto_round.data_type.utils import get_quant_func
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

    w = weights(columns, dtype)
    function, _ = get_quant_func("int", bits, sym=True, disable_opt_rtn=True, iters=0)
    qdq, scale, zero = function(w, bits=bits, group_size=group_size)
    layer = torch.nn.Linear(columns, ROWS, bias=False)
    layer.weight.data = qdq
    packed = QuantLinear(bits, group_size, columns, ROWS, False)
    packed.pack(layer, scale.reshape(ROWS, -1), zero, None, device="cpu")
    words, scales = ours(w, dtype, Grid(bits=bits, group_size=group_size), "gptq", "auto")
    np.testing.assert_array_equal(scales, packed.scales.view(torch.uint16).numpy())
    np.testing.assert_array_equal(words, packed.qweight.numpy())
    np.testing.assert_array_equal(packing.qzeros(scales.shape[0], ROWS, bits), packed.qzeros.numpy())


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_dequantized_weights_equal_upstreams(dtype: str) -> None:
    from auto_round.data_type.utils import get_quant_func

    w = weights(160, dtype)
    function, _ = get_quant_func("int", 4, sym=True, disable_opt_rtn=True, iters=0)
    qdq, _, _ = function(w, bits=4, group_size=128)
    words, scales = ours(w, dtype, Grid(), "row", "auto")
    codes = packing.unpack(words, 4, "row")
    if dtype == "F32":
        np.testing.assert_array_equal(packing.dequantize(codes, scales, 4, 128), qdq.numpy())
    else:
        found = torch.from_numpy(packing.bf16_bits_of(packing.dequantize(codes, scales, 4, 128))).view(torch.bfloat16)
        assert torch.equal(found, qdq)  # as values: signs of zeros may differ


def test_float16_layers_divide_in_float16_upstream_and_we_do_not() -> None:
    """Upstream's two paths differ for float16 weights; ours follows the one that converts to float32 first."""
    from auto_round.data_type.utils import get_quant_func

    w = weights(512, "F16")
    function, _ = get_quant_func("int", 8, sym=True, disable_opt_rtn=True, iters=0)
    _, scale, _ = function(w, bits=8, group_size=128)
    grouped = w.reshape(-1, 128)
    in_half = (grouped / scale).round().clamp(-128, 127)
    in_single = (grouped.float() / scale.float()).round().clamp(-128, 127)
    words, scales = ours(w, "F16", Grid(bits=8), "row", "auto")
    codes = packing.unpack(words, 8, "row").reshape(-1, 128)
    np.testing.assert_array_equal(scales.ravel(), scale.view(torch.uint16).numpy().ravel())
    np.testing.assert_array_equal(codes, (in_single + 128).to(torch.uint8).numpy())
    assert 0 < (in_half.float() != in_single).float().mean() < 0.03


@pytest.mark.parametrize("bits", [4, 8])
def test_row_words_equal_those_of_compressed_tensors(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = np.random.default_rng(0).integers(0, 1 << bits, (40, 96)).astype(np.uint8)
    signed = (torch.from_numpy(codes).to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = packing.pack(codes, bits, "row")
    np.testing.assert_array_equal(words, pack_to_int32(signed, bits).numpy())
    assert torch.equal(unpack_from_int32(torch.from_numpy(words), bits, signed.shape), signed)


@pytest.mark.parametrize("scale_grid", ["fp16", "bf16"])
def test_compressed_tensors_decompresses_our_rows_to_our_values(scale_grid: Any) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    w = weights(160, "BF16")
    words, scales = ours(w, "BF16", Grid(group_size=32, scale_grid=scale_grid, search=True), "row", "auto")
    q = unpack_from_int32(torch.from_numpy(words), 4, w.shape).float()
    scale = torch.from_numpy(scales).view(torch.float16).float().repeat_interleave(32, dim=1)
    expected = packing.dequantize(packing.unpack(words, 4, "row"), scales, 4, 32)
    np.testing.assert_array_equal((q * scale).numpy(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_beats_upstreams_plain_rounding_on_trained_weights(bits: int, small_moe: Any) -> None:
    safetensors = pytest.importorskip("safetensors")
    shard = sorted(small_moe.glob("*.safetensors"))[1]
    with safetensors.safe_open(str(shard), framework="pt") as file:
        name = max(file.keys(), key=lambda n: file.get_slice(n).get_shape())
        w = file.get_tensor(name)
    w = w.reshape(-1, w.shape[-1])[:512].contiguous()
    assert w.dtype == torch.bfloat16
    errors = []
    for search in (False, True):
        grid = Grid(bits=bits, group_size=32, search=search)
        out, _ = rounding.quantize(raw(w), "BF16", grid, layout="row")
        found = packing.dequantize(packing.unpack(out.words, bits, "row"), out.scales, bits, 32)
        errors.append(float(np.square(w.double().numpy() - found).sum()))
    assert 0 < errors[1] < 0.97 * errors[0]

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import keeps, selections

from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec, coalesce
from shardxform.errors import CheckpointError

DISK = {name: np.random.default_rng(i).integers(0, 256, 4096, "u1").tobytes() for i, name in enumerate(("f", "g"))}


def read(ref: TensorRef) -> bytes:
    """The bytes of a reference, off the two files of DISK."""
    return b"".join(DISK[piece.file][piece.offset : piece.end] for piece in ref.ranges)


def array(ref: TensorRef) -> np.ndarray:
    data = read(ref)
    assert len(data) == ref.nbytes
    return np.frombuffer(data, "<u2").reshape(ref.spec.shape)


@st.composite
def refs(draw: st.DrawFn, shape: tuple[int, ...] = (6, 3, 2)) -> TensorRef:
    """A tensor scattered over two files in pieces of any sizes, odd ones included."""
    total = 2 * int(np.prod(shape))
    cuts = sorted(draw(st.sets(st.integers(1, total - 1), max_size=5)))
    ranges = []
    for begin, end in zip([0, *cuts], [*cuts, total], strict=True):
        ranges.append(ByteRange(draw(st.sampled_from("fg")), draw(st.integers(0, 4096 - total)), end - begin))
    return TensorRef(TensorSpec("t", "BF16", shape), tuple(ranges))


PLAIN = TensorRef(TensorSpec("t", "BF16", (4, 3)), (ByteRange("f", 100, 24),))


def test_select_gives_these_byte_ranges() -> None:
    assert PLAIN.select([0, 1, 3]) == TensorRef(
        TensorSpec("t", "BF16", (3, 3)), (ByteRange("f", 100, 12), ByteRange("f", 118, 6))
    )
    assert PLAIN.select([3, 0]).ranges == (ByteRange("f", 118, 6), ByteRange("f", 100, 6))
    assert PLAIN.select([]) == TensorRef(TensorSpec("t", "BF16", (0, 3)), ())


def test_rows_and_index_give_these_byte_ranges() -> None:
    assert PLAIN.rows(1, 3) == TensorRef(TensorSpec("t", "BF16", (2, 3)), (ByteRange("f", 106, 12),))
    assert PLAIN.rows(2, 2) == TensorRef(TensorSpec("t", "BF16", (0, 3)), ())
    assert PLAIN.index(2) == TensorRef(TensorSpec("t", "BF16", (3,)), (ByteRange("f", 112, 6),))


def test_a_cut_across_two_files_takes_a_piece_of_each() -> None:
    ref = TensorRef(PLAIN.spec, (ByteRange("f", 0, 9), ByteRange("g", 50, 15)))
    assert ref.rows(1, 3).ranges == (ByteRange("f", 6, 3), ByteRange("g", 50, 9))


@given(refs(), selections)
def test_select_equals_numpy_take(ref: TensorRef, rows: list[int]) -> None:
    np.testing.assert_array_equal(array(ref.select(rows)), array(ref)[rows])


@given(refs(), st.integers(0, 6), st.integers(0, 6))
def test_rows_equals_a_numpy_slice(ref: TensorRef, a: int, b: int) -> None:
    start, stop = min(a, b), max(a, b)
    np.testing.assert_array_equal(array(ref.rows(start, stop)), array(ref)[start:stop])


@given(refs(), st.integers(0, 5), st.integers(0, 2))
def test_index_equals_numpy_indexing_and_nests(ref: TensorRef, i: int, j: int) -> None:
    np.testing.assert_array_equal(array(ref.index(i)), array(ref)[i])
    np.testing.assert_array_equal(array(ref.index(i).index(j)), array(ref)[i, j])


@given(refs(), st.data())
def test_select_composes(ref: TensorRef, data: st.DataObject) -> None:
    first = data.draw(keeps(6))
    second = data.draw(keeps(len(first)))
    composed = ref.select([first[i] for i in second])
    twice = ref.select(first).select(second)
    assert twice.spec == composed.spec
    assert read(twice) == read(composed)


@given(refs())
def test_keeping_all_rows_is_the_identity(ref: TensorRef) -> None:
    kept = ref.select(range(6))
    assert (kept.spec, read(kept)) == (ref.spec, read(ref))
    assert kept.ranges == coalesce(ref.ranges)
    assert ref.rows(0, 6) == kept


@given(refs(), selections)
def test_ranges_never_touch_their_successor_and_are_never_empty(ref: TensorRef, rows: list[int]) -> None:
    ranges = ref.select(rows).ranges
    assert all(piece.length > 0 for piece in ranges)
    assert not [a for a, b in pairwise(ranges) if (a.file, a.end) == (b.file, b.offset)]


def test_coalesce_joins_neighbours_of_one_file_only_and_drops_empty_ranges() -> None:
    pieces = [
        ByteRange("f", 0, 4),
        ByteRange("f", 9, 0),
        ByteRange("f", 4, 4),
        ByteRange("g", 8, 1),  # touches by number, in another file
        ByteRange("g", 7, 1),  # before its predecessor
        ByteRange("g", 9, 1),  # a hole
    ]
    assert coalesce(pieces) == (ByteRange("f", 0, 8), *pieces[3:])
    assert coalesce([]) == ()


@pytest.mark.parametrize("rows", [[-1], [4], [0, 1, 2, 3, 4], [10**30]])
def test_select_refuses_rows_that_are_not_there(rows: Sequence[int]) -> None:
    with pytest.raises(IndexError, match=r"t: row outside 0\.\.3"):
        PLAIN.select(rows)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5), (5, 5)])
def test_rows_refuses_a_slice_outside_the_tensor(start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=r"t: rows .* outside 0\.\.4"):
        PLAIN.rows(start, stop)


@pytest.mark.parametrize("i", [-1, 4])
def test_index_refuses_a_row_that_is_not_there(i: int) -> None:
    with pytest.raises(IndexError):
        PLAIN.index(i)


def test_a_scalar_has_no_rows() -> None:
    scalar = TensorRef(TensorSpec("s", "F32", ()), (ByteRange("f", 0, 4),))
    for cut in (lambda: scalar.select([0]), lambda: scalar.rows(0, 0), lambda: scalar.index(0)):
        with pytest.raises(CheckpointError, match="tensor 's' is a scalar"):
            cut()


def test_rows_that_split_a_byte_are_refused_and_rows_of_whole_bytes_are_not() -> None:
    odd = TensorRef(TensorSpec("o", "F4", (2, 3)), (ByteRange("f", 0, 3),))
    with pytest.raises(CheckpointError, match=r"tensor 'o': rows of F4 .* split a byte"):
        odd.select([1])
    even = TensorRef(TensorSpec("e", "F4", (3, 4)), (ByteRange("f", 0, 6),))
    assert even.select([2]) == TensorRef(TensorSpec("e", "F4", (1, 4)), (ByteRange("f", 4, 2),))


def test_empty_rows_can_be_selected() -> None:
    empty = TensorRef(TensorSpec("e", "F32", (4, 0)), ())
    assert empty.select([3, 1]) == TensorRef(TensorSpec("e", "F32", (2, 0)), ())


def test_rename_and_reshape_keep_the_bytes() -> None:
    assert PLAIN.renamed("u") == TensorRef(TensorSpec("u", "BF16", (4, 3)), PLAIN.ranges)
    assert PLAIN.reshaped((2, 6)) == TensorRef(TensorSpec("t", "BF16", (2, 6)), PLAIN.ranges)
    with pytest.raises(ValueError, match=r"t: cannot view \(4, 3\) as \(5,\)"):
        PLAIN.reshaped((5,))


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F32", (), 4),
        ("BF16", (3, 5), 30),
        ("F4", (2, 3), 3),
        ("F6_E2M3", (4,), 3),
        ("C64", (2, 0), 0),
        ("BOOL", (7,), 7),
    ],
)
def test_sizes_follow_from_dtype_and_shape(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert TensorSpec("t", dtype, shape).nbytes == nbytes


@pytest.mark.parametrize("keep", [(0, 1, 2, 3), (1, 3), (2,)])
@pytest.mark.parametrize("count", [1, 2])
def test_slabs_are_the_rows_of_every_index(keep: tuple[int, ...], count: int) -> None:
    halves = (ByteRange("a", 100, 60), ByteRange("b", 7, 36))  # the third slab lies in both files
    ref = TensorRef(TensorSpec("w", "BF16", (4, 4, 3)), halves).select(keep)
    rows = 4 // count
    wanted = [ref.index(i).rows(at, at + rows) for i in range(len(keep)) for at in range(0, 4, rows)]
    assert list(ref.slabs(count)) == wanted

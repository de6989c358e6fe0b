"""What llama.cpp calls things: tensors, keys and tokens, as its own converter writes them."""

from __future__ import annotations

import numpy as np
import pytest

from shardxform.runtimes.gguf.transforms import Order, Run, Transform


def test_an_order_is_that_of_an_array_whose_axes_change_places() -> None:
    heads = Order((Run(0, (3,)), Run(3, (2, 2, 2), (1, 0, 2))))
    assert heads.positions().tolist() == [0, 1, 2, 3, 4, 7, 8, 5, 6, 9, 10]
    assert heads.count == 11
    assert Order.every(2, 1, 3).positions().tolist() == [1, 3, 5]
    assert Order((Run(4, (2, 3), (), ((0, 2), (1, 3))),)).positions().tolist() == [5, 6, 8, 9]


@pytest.mark.parametrize(
    ("order", "blocks"),
    [
        (Order((Run(0, (2, 2, 32), (1, 0, 2)),)), [0, 2, 1, 3]),
        (Order((Run(0, (2, 2, 64), (1, 0, 2)),)), [0, 1, 4, 5, 2, 3, 6, 7]),
        (Order((Run(0, (2, 2, 16), (1, 0, 2)),)), None),
        (Order((Run(0, (3,)),)), None),
        (Order((Run(16, (32,)),)), None),
    ],
)
def test_columns_that_move_in_whole_blocks_keep_their_codes(order: Order, blocks: list[int] | None) -> None:
    found = order.blocks(32)
    assert (None if found is None else found.tolist()) == blocks
    assert Transform(columns=order).keeps_codes() == (blocks is not None)


def test_what_maps_values_or_turns_a_matrix_keeps_no_codes() -> None:
    rows = Order((Run(0, (2, 2), (1, 0)),))
    assert Transform(rows=rows).keeps_codes()
    assert not Transform(transposed=True).keeps_codes()
    assert not Transform(rows=rows, value="one more").keeps_codes()
    assert Transform(transposed=True, rows=Order.every(2, 0, 3)).shape(4, 6) == (3, 4)


def test_orders_agree_with_numpy() -> None:
    values = np.arange(24)
    run = Run(0, (2, 3, 4), (1, 2, 0))
    assert Order((run,)).positions().tolist() == values.reshape(2, 3, 4).transpose(1, 2, 0).reshape(-1).tolist()

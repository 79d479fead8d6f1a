"""Sums whose order is the same every time, on every device."""

from __future__ import annotations

from torch import Tensor


def add_rows(total: Tensor, index: Tensor, rows: Tensor) -> None:
    """total[index] += rows in place, a row of `total` as often as `index` names it."""
    if total.is_cuda:  # index_add_ adds the rows of an index that comes twice in any order there
        total.index_put_((index,), rows, accumulate=True)
    else:  # and index_put_ does in threads here
        total.index_add_(0, index, rows)

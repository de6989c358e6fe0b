"""The whole way in one call: score, select, prune and quantize in one pass, verify, evaluate.

    from shardxform.compress import CompressOptions, Pruning, Request, compress, plan_compress

    request = Request(source=..., out=..., pruning=Pruning(keep=128), ...)
    outcome = compress(plan_compress(request), CompressOptions())

Every stage is a call of the library that can be made by itself, and gives the same bytes. What a stage gave lies in
OUT.compress with a record of what it was made from: it is not made again, nor mistaken for the result of other inputs.
"""

from __future__ import annotations

from shardxform.compress.driver import Outcome, Watcher, compress
from shardxform.compress.request import CompressOptions, Forecast, Prepared, Pruning, Request, forecast, plan_compress

__all__ = [
    "CompressOptions",
    "Forecast",
    "Outcome",
    "Prepared",
    "Pruning",
    "Request",
    "Watcher",
    "compress",
    "forecast",
    "plan_compress",
]

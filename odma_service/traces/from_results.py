"""Results of benchmarks by vLLM and SGLang, which tell each request's lengths and start."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from odma_service.traces.source import Source
from odma_service.traces.table import Names, Table, number, value_of

RESULT: Names = ("start_times", "input_lens", "output_lens")


def read_result(source: Source, rows: int | None) -> Table:
    """Read the result of a benchmark by vLLM or SGLang: an array element for each request."""
    results = list(source.records(2))
    if len(results) != 1:
        raise source.wrong(
            f"{len(results) or 'no'} results in it, but a trace is one; pass one line of it,"
            " as from a pipe: sed -n 1p FILE"
        )
    [(_, result)] = results
    inputs, outputs = (_array(source, name, result.get(name), rows) for name in RESULT[1:])
    times = result.get(RESULT[0])
    starts = None if times is None else _array(source, RESULT[0], times, rows)
    for name, values in ((RESULT[2], outputs), (RESULT[0], starts)):
        if values is not None and len(values) != len(inputs):
            raise source.wrong(
                f"column '{name}': {len(values)} values, but {len(inputs)} in '{RESULT[1]}'"
            )
    return Table(source.label, RESULT, starts, inputs, outputs, from_first=True)


def _array(source: Source, name: str, values: Any, rows: int | None) -> NDArray[np.float64]:
    if values is None:
        raise source.wrong(
            f"column '{name}' is missing: a result needs its arrays; benchmark again with"
            " --save-detailed (vLLM) or --output-details (SGLang)"
        )
    if not isinstance(values, list):
        raise source.wrong(f"column '{name}': not an array")
    numbers = [
        value_of(source, row, name, number, value) for row, value in enumerate(values[:rows], 1)
    ]
    return np.array(numbers, np.float64)

"""Request traces: reading, writing, describing and making them.

trace.py says what a trace is and describes one in numbers; formats.py has the table of formats,
each read by a function of from_*.py; files.py reads any of them and writes parquet; synthetic.py
makes a seeded load that drifts; servegen.py samples one from the histograms of a production
service.
"""

from odma_service.traces.files import import_trace, read_trace
from odma_service.traces.formats import FORMATS
from odma_service.traces.from_parquet import write_trace
from odma_service.traces.servegen import sample_servegen
from odma_service.traces.synthetic import generate
from odma_service.traces.trace import (
    LARGEST_TOKENS,
    Description,
    Spread,
    Trace,
    TraceError,
    describe,
)

__all__ = [
    "FORMATS",
    "LARGEST_TOKENS",
    "Description",
    "Spread",
    "Trace",
    "TraceError",
    "describe",
    "generate",
    "import_trace",
    "read_trace",
    "sample_servegen",
    "write_trace",
]

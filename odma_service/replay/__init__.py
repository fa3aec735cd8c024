"""The replay: what each policy would give on a trace, in simulated time.

keys      what an engine would compute of its tokens, for reuse
load      the requests of a trace under an engine's limits
prices    what a decode step, a prefill and a copy take
memory    what the loop asks of a policy; pooled.py asks it of a pool, arena.py of one in this
          process, rivals/paging.py counts pages
loop      continuous batching over any memory
policies  every policy by name, with its tuned parameters
measure   a window, and what is measured in it
compare   all policies on one load
plan      how a device's memory divides, and what to expect of it
"""

from odma_service.replay.compare import (
    Comparison,
    Progress,
    Setting,
    as_object,
    compare,
    run_policy,
)
from odma_service.replay.load import Limits, Load, limits_for, load_of
from odma_service.replay.loop import History
from odma_service.replay.measure import Window, by_tenant, interval, measure
from odma_service.replay.policies import NAMES, TUNED, Tuning, check_name, read_tuning
from odma_service.replay.prices import Serving
from odma_service.replay.report import COLUMNS, remarks, write_report
from odma_service.replay.tune import Tuner, marked, training_traces

__all__ = [
    "COLUMNS",
    "NAMES",
    "TUNED",
    "Comparison",
    "History",
    "Limits",
    "Load",
    "Progress",
    "Serving",
    "Setting",
    "Tuner",
    "Tuning",
    "Window",
    "as_object",
    "by_tenant",
    "check_name",
    "compare",
    "interval",
    "limits_for",
    "load_of",
    "marked",
    "measure",
    "read_tuning",
    "remarks",
    "run_policy",
    "training_traces",
    "write_report",
]

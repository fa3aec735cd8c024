"""onnxruntime, imported when a model is used, and silent: it reports to its vendor otherwise.

With its telemetry on, the import alone looks up a host of the vendor's and keeps an identifier of
the device under ~/.cache.
"""

from __future__ import annotations

import os
from typing import Any


def onnxruntime() -> Any:
    """Return the module."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # noqa: TID251  it reads nothing else
    import onnxruntime

    return onnxruntime

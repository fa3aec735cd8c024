"""The engine author's guide is complete: see docs/guides/engine.md."""

from __future__ import annotations

import re

import numpy as np
from paths import DOCS

from odma_service.rpc.v1 import memory_service_pb2, pool_service_pb2, types_pb2
from odma_service.service.rpc import statuses

GUIDE = (DOCS / "guides" / "engine.md").read_text()
PROTOS = (memory_service_pb2, pool_service_pb2, types_pb2)
REASONS = types_pb2.RefusalReason.DESCRIPTOR.values_by_name


def rows(heading: str) -> list[str]:
    """Return the first cells of the table under a heading."""
    section = GUIDE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| ([^|]*?) \|", section, re.MULTILINE)
    return cells[2:]  # without the head and the line below it


def test_the_guide_says_what_to_do_on_every_refusal():
    reasons = [name.removeprefix("REFUSAL_REASON_") for name in REASONS]
    assert rows("When an operation is refused") == reasons[1:]


def test_the_guide_says_what_to_do_on_every_status():
    told = {
        (code, reason)
        for row in rows("When a call ends with a status")
        for code, reasons in re.findall(r"([A-Z_]+) \(([^)]*)\)", row)
        for reason in reasons.split(", ")
    }
    rules = statuses._CODES.items()
    assert {(code.name, error.reason) for error, code in rules} <= told


def test_the_guides_merge_of_two_runs_is_attention_over_both():
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "exp" in block
    )
    names = {"np": np}
    exec(code, names)
    rng = np.random.default_rng(7)
    q, k, v = (rng.normal(scale=3, size=(tokens, 2, 8)) for tokens in (5, 40, 40))

    def attend(first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.einsum("qhd,khd->qhk", q, k[first:end])
        lse = np.logaddexp.reduce(scores, axis=-1)
        return np.einsum("qhk,khd->qhd", np.exp(scores - lse[..., None]), v[first:end]), lse

    both = names["merged"](*attend(0, 25), *attend(25, 40))
    np.testing.assert_allclose(both, attend(0, 40)[0], rtol=1e-9)


def test_the_guide_names_nothing_that_the_proto_does_not_have():
    known = set()
    for module in PROTOS:
        for message in module.DESCRIPTOR.message_types_by_name.values():
            known |= set(message.fields_by_name)
        for enum in module.DESCRIPTOR.enum_types_by_name.values():
            known |= set(enum.values_by_name)
    named = set(re.findall(r"`([A-Za-z]+(?:_[A-Za-z]+)+)`", GUIDE))
    assert named - known == set()
    assert len(named) > 20

"""Random and mutated messages over every rpc find nothing: a short run of `make fuzz-wire`."""

from __future__ import annotations

from descriptors import RPCS
from wire_fuzz import ALL, fuzz

SELDOM = ("/Recalibrate", "/Predict", "/Watch")
"""What a short run need not bring to an end that is OK."""


def test_random_and_mutated_messages_find_nothing():
    result = fuzz(seed=1, calls=3000)
    assert result["bad"] == []
    assert set(result["outcomes"]) == set(ALL)
    succeeded = {rpc for rpc, codes in result["outcomes"].items() if codes.get("OK")}
    assert succeeded >= {rpc for rpc in RPCS if not rpc.endswith(SELDOM)}
    assert result["coverage"]["total"] > 70

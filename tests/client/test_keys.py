"""Keys are the same in every language, and another token, salt or granule makes others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paths import JAVASCRIPT
from running import need_node, run

from odma_service.client import KeyChain, chained_keys
from odma_service.errors import InvalidError
from odma_service.values import KEY_BYTES

FILE = Path(__file__).with_name("keys.json")
CASES = json.loads(FILE.read_text())
TOKENS = list(range(512))
KEYS = chained_keys(TOKENS, 128, b"salt")

IN_JAVASCRIPT = """
const { chainedKeys } = await import(process.argv[1]);
const cases = JSON.parse(await (await import('node:fs/promises')).readFile(process.argv[2]));
console.log(JSON.stringify(cases.map(({ tokens, granule_tokens, salt }) => (
  chainedKeys(tokens, granule_tokens, Buffer.from(salt, 'hex')).toString('hex')))));
"""


@pytest.mark.parametrize("case", CASES)
def test_keys_are_those_of_the_examples(case):
    keys = chained_keys(case["tokens"], case["granule_tokens"], bytes.fromhex(case["salt"]))
    assert keys.hex() == case["keys"]


def test_keys_of_javascript_are_those_of_the_examples():
    flags = ("--input-type=module", "--eval", IN_JAVASCRIPT)
    told = run(need_node(), *flags, JAVASCRIPT / "keys.js", FILE)
    assert json.loads(told) == [case["keys"] for case in CASES]


def test_a_chain_gives_the_same_keys_however_its_tokens_come():
    chain = KeyChain(128, b"salt")
    for start in range(0, 512, 100):
        chain.add(TOKENS[start : start + 100])
    assert chain.keys == KEYS


def test_a_key_stands_for_every_token_up_to_its_granule():
    other = TOKENS.copy()
    other[200] += 1
    changed = chained_keys(other, 128, b"salt")
    pairs = zip(range(0, len(KEYS), KEY_BYTES), (True, False, False, False), strict=True)
    for at, equal in pairs:
        assert (changed[at : at + KEY_BYTES] == KEYS[at : at + KEY_BYTES]) is equal


def test_another_salt_makes_other_keys():
    assert chained_keys(TOKENS, 128, b"pepper")[:KEY_BYTES] != KEYS[:KEY_BYTES]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_what_is_no_token_is_refused(token):
    with pytest.raises(OverflowError):
        chained_keys([token], 64, b"")


def test_a_granule_has_a_token():
    with pytest.raises(InvalidError, match="granule_tokens"):
        KeyChain(0, b"")

"""Models: public configs, reduced to the keys that matter, give the right bytes or a refusal.

geometry_cases.json has the right value and where it comes from; `how` is its arithmetic.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from odma_service.errors import InvalidError
from odma_service.pool.models import Parallel, from_model_config
from odma_service.pool.models.families import RULES, table

CASES = json.loads(Path(__file__).with_name("geometry_cases.json").read_text())
RIGHT = [case for case in CASES if "right" in case]
REFUSED = [case for case in CASES if "refused" in case]


def named(case):
    return case["name"]


def read(case):
    part = dict(case.get("part", {}))
    element_bytes = part.pop("element_bytes", 0)
    if "pipeline_layers" in part:
        part["pipeline_layers"] = tuple(part["pipeline_layers"])
    return from_model_config(json.dumps(case["config"]), element_bytes, Parallel(**part))


def test_there_are_sixty_public_configs():
    assert len(RIGHT) >= 60
    assert all(case["source"] and case["how"] for case in RIGHT)


@pytest.mark.parametrize("case", RIGHT, ids=named)
def test_a_public_config_has_its_right_bytes_a_token(case):
    assert read(case).geometry.bytes_per_token == case["right"]


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_a_config_that_is_not_understood_is_refused_by_name(case):
    with pytest.raises(InvalidError) as caught:
        read(case)
    assert caught.value.field.removeprefix("config_json.") == case["refused"]


WORDS_OF_A_CACHE = [
    "num_kv_shared_layers",
    "kv_compression_ratio",
    "num_recurrent_loops",
    "cache_share_factor",
    "index_head_size",
    "latent_kv_width",
    "layers_that_attend",
    "use_mla",
    "sparse_config",
    "num_heads_of_layer",
    "cross_attention_layers",
]


@pytest.mark.parametrize("key", WORDS_OF_A_CACHE)
@pytest.mark.parametrize("name", ["llama-2-7b", "chatglm2-6b", "jamba-mini", "no-type-plain"])
def test_a_key_about_the_cache_that_no_rule_reads_refuses_any_family(name, key):
    case = next(case for case in RIGHT if case["name"] == name)
    with pytest.raises(InvalidError) as caught:
        read(case | {"config": case["config"] | {key: 2}})
    assert caught.value.field == f"config_json.{key}"


LLAMA = next(case for case in RIGHT if case["name"] == "llama-2-7b")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "rope_parameters"),
        ({"use_dynamic_ntk": True}, "use_dynamic_ntk"),
    ],
)
def test_a_rope_that_follows_the_length_is_no_function_of_the_prefix(keys, named):
    assert named in read(LLAMA | {"config": LLAMA["config"] | keys}).not_of_prefix


@pytest.mark.parametrize("scaling", [None, 7, {}, {"rope_type": "llama3"}, {"type": "yarn"}])
def test_a_fixed_rope_is_a_function_of_the_prefix(scaling):
    fixed = LLAMA["config"] | {"rope_scaling": scaling, "use_dynamic_ntk": False}
    assert not read(LLAMA | {"config": fixed}).not_of_prefix


def test_layers_with_states_are_no_function_of_the_prefix():
    states = next(case for case in RIGHT if case["name"] == "jamba-mini")
    assert "states" in read(states).not_of_prefix
    ranks = {"pipeline_layers": (4, 1, 27), "pipeline_rank": 1}
    attends = read(states | {"part": ranks})
    assert not attends.has_states
    assert "states" in attends.not_of_prefix


def test_a_key_without_a_value_changes_nothing():
    for value in (None, False, 0, [], {}, ""):
        assert read(RIGHT[0] | {"config": RIGHT[0]["config"] | {"num_loops": value}})


def test_every_family_has_a_rule_and_a_source():
    families = table().families
    assert {family.rule for family in families.values()} == set(RULES)
    assert all(family.source for family in families.values())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"pipeline": 2, "pipeline_rank": 2}, "pipeline_rank"),
        ({"pipeline_rank": -1}, "pipeline_rank"),
        ({"pipeline": 3, "pipeline_layers": (1, 1)}, "pipeline_layers"),
        ({"pipeline": 5000}, "pipeline_parallel"),
        ({"windows": "half"}, "windows"),
    ],
)
def test_ranks_that_cannot_be_are_named(given, field):
    with pytest.raises(InvalidError) as caught:
        Parallel(**given)
    assert caught.value.field == field


def test_planes_of_one_size_are_one_group():
    case = next(case for case in RIGHT if case["name"] == "gemma-4-31b-kind")
    groups = [(group.count, group.bytes_per_token) for group in read(case).geometry.planes]
    assert groups == [(50, 8192), (10, 4096)]


def test_the_ranks_of_a_pipeline_have_all_layers_together():
    case = next(case for case in RIGHT if case["name"] == "jamba-mini")
    parts = [read(case | {"part": {"pipeline": 4, "pipeline_rank": i}}) for i in range(4)]
    assert sum(part.geometry.bytes_per_token for part in parts) == case["right"]


NONSENSE = [
    None,
    True,
    -1,
    1.5,
    2**70,
    "x",
    "*",
    [],
    [None],
    [{}],
    [[1]],
    [-1, 10**9],
    {},
    {"a": []},
]


@pytest.mark.parametrize("case", RIGHT, ids=named)
def test_nonsense_in_any_key_is_refused_or_read_and_never_breaks(case):
    """Every key of every case, at any depth, gets values that it cannot have."""
    for path in paths_of(case["config"]):
        for value in NONSENSE:
            config = json.loads(json.dumps(case["config"]))
            *outer, key = path
            inner = config
            for each in outer:
                inner = inner[each]
            inner[key] = value
            with suppress(InvalidError):
                assert read(case | {"config": config}).geometry.bytes_per_token > 0


def paths_of(values):
    for key, value in values.items():
        yield [key]
        if isinstance(value, dict):
            yield from ([key, *path] for path in paths_of(value))

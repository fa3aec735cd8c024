"""The planes: what they are made of, their copies, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from decoders import alone, decoder, requests, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from odma_service.engines.transformers import Planes
from odma_service.errors import InvalidError, OdmaError, UnfitModelError
from odma_service.values import Copy, PlaneGroup

TOKENS = 640


@pytest.fixture(scope="module")
def model():
    return decoder("llama")


@pytest.fixture(scope="module")
def planes(model):
    return Planes(model, TOKENS)


def test_there_are_two_planes_a_layer(planes):
    assert planes.geometry() == [PlaneGroup(count=6, bytes_per_token=2 * 16 * 4)]


def test_planes_of_other_shapes_are_other_groups():
    model = decoder(
        "deepseek_v3",
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
        first_k_dense_replace=3,
    )
    assert Planes(model, 64).geometry() == [PlaneGroup(3, 4 * 16 * 4), PlaneGroup(3, 4 * 12 * 4)]


def test_layers_that_attend_over_other_layers_keys_have_no_planes_of_their_own():
    kinds = ["sliding_attention", "full_attention"] * 2
    model = decoder(
        "gemma4_text",
        head_dim=16,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=300,
        num_hidden_layers=4,
        layer_types=kinds,
        num_kv_shared_layers=2,
        sliding_window=24,
    )
    planes = Planes(model, 64)
    assert planes.geometry() == [PlaneGroup(4, 2 * 16 * 4)]
    assert len(planes.layers) == 4


@settings(max_examples=200)
@given(
    st.lists(
        st.integers(1, TOKENS).flatmap(
            lambda n: st.tuples(st.integers(0, TOKENS - n), st.integers(0, TOKENS - n), st.just(n))
        ),
        min_size=1,
        max_size=4,
    )
)
def test_copies_are_what_memmove_does_in_every_plane(planes, runs):
    expected = list(range(TOKENS))
    for layer, pair in planes.layers.items():
        for plane in pair:
            plane.copy_((torch.arange(TOKENS) + 1000 * layer)[:, None, None].expand_as(plane))
    for source, to, tokens in runs:
        expected[to : to + tokens] = expected[source : source + tokens]
    planes.run(
        [Copy(1, source, to, n, abs(source - to) < n) for source, to, n in runs if source != to]
    )
    for layer, pair in planes.layers.items():
        for plane in pair:
            assert plane[:, -1, -1].tolist() == [token + 1000 * layer for token in expected]


class Forgetful(Planes):
    """Leaves out the third copy."""

    copies = 0

    def run(self, copies):
        for copy in copies:
            self.copies += 1
            if self.copies != 3:
                super().run([copy])


class Plain(Planes):
    """Copies overlapping runs as torch does, which is not memmove and raises nothing."""

    def run(self, copies):
        for copy in copies:
            for group in self._groups.values():
                source = group.narrow(1, copy.from_token, copy.tokens)
                group.narrow(1, copy.to_token, copy.tokens).copy_(source)


@pytest.mark.parametrize("faulty", [Forgetful, Plain])
def test_a_wrong_copy_changes_answers(model, faulty):
    asked = requests()
    expected = alone(model, asked)
    serve(model, asked, faulty(model, 288))
    assert [request.output for request in asked] != expected


def test_a_pool_smaller_than_a_block_is_refused(model):
    with pytest.raises(InvalidError, match="capacity_tokens: at least 16"):
        Planes(model, 15)


def test_a_model_is_not_used_without_its_engine_by_mistake(model):
    Planes(model, 64)
    with pytest.raises(OdmaError, match="set_attn_implementation"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    model.set_attn_implementation("sdpa")
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape[1] == 4


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_longest_request_stay_below_the_trained_length(kind):
    rope = {
        "rope_type": kind,
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 96,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    assert Planes(decoder("llama", rope_parameters=rope), 256).longest_tokens == 96


def test_a_model_that_looks_at_its_neighbours_in_the_row_is_refused():
    model = decoder("llama")
    layer = model.model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda hidden: inner(hidden + hidden.roll(1, dims=1))
    with pytest.raises(UnfitModelError, match="another result than the whole"):
        Planes(model, 64)


def test_a_model_with_a_part_of_the_attention_that_is_not_known_is_refused():
    model = decoder("llama")
    layer = model.model.layers[0].self_attn
    inner = layer.forward
    layer.forward = lambda *given, **told: inner(*given, position_bias=torch.zeros(1), **told)
    with pytest.raises(UnfitModelError, match="its attention needs 'position_bias'"):
        Planes(model, 64)


def test_an_encoder_is_refused():
    model = decoder("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(UnfitModelError, match="only decoders"):
        Planes(model, 64)

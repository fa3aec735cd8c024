"""A small model with its tokenizer, as a directory; without torch only one test is collected."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

MISSING = [package for package in ("openai", "torch", "transformers") if not find_spec(package)]
collect_ignore_glob = ["test_[!i]*.py"] if MISSING else []  # all but test_installed.py

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def missing():
    """Return the packages that the tests of the engine would need."""
    return MISSING


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Return the directory of a model that answers in printable ASCII, a byte a token."""
    from decoders import decoder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*symbols, "<end>"])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>")
    tokenizer.chat_template = TEMPLATE

    model = decoder("llama", vocab_size=len(vocabulary))
    printable = [vocabulary[symbol] for symbol in symbols if " " < symbol <= "~"]
    silent = sorted(set(vocabulary.values()) - set(printable))
    model.lm_head.weight.data[silent] = 0
    model.generation_config.eos_token_id = vocabulary["<end>"]

    directory = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory

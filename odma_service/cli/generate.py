"""`odma generate`: answers of a real model, whose cache a pool places."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from odma_service.cli.engine_options import EngineOptions, ModelSource
from odma_service.cli.failures import BadResultError
from odma_service.cli.options import AsJson, taking
from odma_service.cli.output import Facts, show

if TYPE_CHECKING:
    from odma_service.engines.transformers import Request
    from odma_service.engines.transformers.loading import Loaded

app = typer.Typer()


@app.command()
@taking(EngineOptions)
def command(
    options: EngineOptions,
    model: ModelSource,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or several.")],
    max_tokens: Annotated[
        int, typer.Option(min=1, max=2**24, help="Most tokens of each answer.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0: always the likeliest token.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer all prompts at once with a model of Transformers, and print the answers.

    Its keys and values lie in contiguous regions of a pool: of a service (--target), or in this
    process. It needs the extra `transformers` of the package.
    """
    loaded = options.load(model)
    from odma_service.engines.transformers import Request, Sampling

    requests = []
    for prompt in prompts:
        text = _in_template(loaded, prompt) if chat else prompt
        tokens = loaded.tokenizer(text, add_special_tokens=not chat).input_ids
        sampling = Sampling(temperature, seed=seed)
        requests.append(Request(tokens, max_tokens, loaded.stop_tokens, sampling, text))
    with options.service() as service, options.engine(loaded, service) as (engine, _):
        for request in requests:
            engine.submit(request)
        while engine.busy:
            engine.step()
    for prompt, request in zip(prompts, requests, strict=True):
        show(_facts(loaded, prompt, request), as_json, _picture)
    if as_json:
        show(dict(engine.counts), as_json)
    failed = [str(request.error) for request in requests if request.error]
    if failed:
        raise BadResultError(*failed)


def _in_template(loaded: Loaded, prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    return str(
        loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )


def _facts(loaded: Loaded, prompt: str, request: Request) -> Facts:
    return {
        "prompt": prompt,
        "answer": loaded.tokenizer.decode(request.output, skip_special_tokens=True),
        "prompt_tokens": len(request.prompt),
        "output_tokens": len(request.output),
        "end": request.end and request.end.name,
    }


def _picture(facts: Facts) -> str:
    return f"> {facts['prompt']}\n{facts['answer']}\n"

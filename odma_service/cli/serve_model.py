"""`odma serve-model`: a real model behind OpenAI's HTTP interface, its cache placed by a pool."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from odma_service.cli.engine_options import EngineOptions, ModelSource, need_extra
from odma_service.cli.options import taking

API_KEY = "ODMA_API_KEY"

app = typer.Typer()


@app.command()
@taking(EngineOptions)
def command(
    options: EngineOptions,
    model: ModelSource,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT; port 0: any that is free.")
    ] = "127.0.0.1:8000",
    served_name: Annotated[
        str, typer.Option(help="What clients call the model. Default: its file or directory.")
    ] = "",
    allow_insecure: Annotated[
        bool,
        typer.Option("--allow-insecure", help="Listen beyond the loopback, in plain HTTP."),
    ] = False,
) -> None:
    """Serve a model of Transformers over OpenAI's interface until SIGTERM or SIGINT.

    /v1/chat/completions and /v1/completions, whole or streamed. Where ODMA_API_KEY is set,
    callers have to show it. When it serves, it prints one line on stdout:
    "odma model ready on http://ADDRESS/v1". It needs the extra `transformers` of the package.
    """
    serving = need_extra("odma_service.engines.transformers.openai.server")
    with serving.listen_on(listen, allow_insecure=allow_insecure) as listener:
        loaded = options.load(model)
        if served_name:
            loaded = loaded._replace(name=served_name)
        with options.service() as service, options.engine(loaded, service) as (engine, pool):
            host, port, *_ = listener.getsockname()
            address = f"{f'[{host}]' if ':' in host else host}:{port}"
            serving.serve(
                loaded,
                engine,
                pool,
                listener,
                os.environ.get(API_KEY, "").strip(),
                lambda: typer.echo(f"odma model ready on http://{address}/v1"),
            )

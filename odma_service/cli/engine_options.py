"""Options of the commands that serve a model, and what they stand for.

torch and Transformers are imported when a command runs, for the help has to come without them.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from odma_service.cli.options import Ca, Cert, Connection, Key
from odma_service.errors import OdmaError
from odma_service.pool.policy import NAMES
from odma_service.values import PolicyChange

if TYPE_CHECKING:
    from odma_service.client import Client
    from odma_service.engines.transformers.engine import Engine
    from odma_service.engines.transformers.loading import Loaded
    from odma_service.engines.transformers.memory import Memory

RETRY_SECONDS = 30


def need_extra(module: str) -> Any:
    """Return a module of the engine. Raises OdmaError where the extra is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed: pip install 'odma-service[transformers]'"
        raise OdmaError(missing) from error


ModelSource = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a name of a hub, or a *.gguf.")
]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is read, the size of its memory, and the pool that places it."""

    dtype: Annotated[
        str, typer.Option(help="auto (as it is stored), float32, bfloat16 or float16.")
    ] = "auto"
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, ...")] = "cpu"
    capacity_tokens: Annotated[
        int, typer.Option(min=16, max=2**24, help="Tokens of the cache, of all requests together.")
    ] = 4_096
    policy: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "elastic"
    step_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=2**24, help="By how much a region grows. Default: the policy's."),
    ] = None
    batch_cap: Annotated[
        int, typer.Option(min=1, max=512, help="Most requests running at once.")
    ] = 32
    prefill_tokens: Annotated[
        int, typer.Option(min=1, max=2**20, help="Most tokens of prompts in one step.")
    ] = 128
    target: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of a service. Without it: a pool in this process."),
    ] = None
    pool: Annotated[
        str | None,
        typer.Option(help="The pool's name at the service; it is taken over. Default: a new one."),
    ] = None
    ca: Ca = None
    cert: Cert = None
    key: Key = None

    def load(self, source: str) -> Loaded:
        """Read the model. Raises OdmaError, also where the extra is not installed."""
        load = need_extra("odma_service.engines.transformers.loading").load
        loaded: Loaded = load(source, dtype=self.dtype, device=self.device)
        return loaded

    @contextmanager
    def engine(self, loaded: Loaded, service: Client | None) -> Iterator[tuple[Engine, Memory]]:
        """Open a pool for a model, of a service or here; it is closed with the context."""
        engines = need_extra("odma_service.engines.transformers")
        planes = engines.Planes(loaded.model, self.capacity_tokens)
        policy = PolicyChange(name=self.policy, step_tokens=self.step_tokens)
        if service is None:
            pool = engines.EmbeddedPool(planes, policy)
        else:
            name = self.pool or f"engine-{uuid.uuid4().hex[:8]}"
            taken = self.pool is not None
            pool = engines.open_pool(service, name, planes, policy, take_over=taken)
        try:
            yield (
                engines.Engine(
                    loaded.model,
                    planes,
                    pool,
                    batch_cap=self.batch_cap,
                    prefill_tokens=self.prefill_tokens,
                ),
                pool,
            )
        finally:
            pool.close_pool()

    def service(self) -> AbstractContextManager[Client | None]:
        """Return a client of the service that was named, or None."""
        if self.target is None:
            return nullcontext()
        return Connection(self.target, self.ca, self.cert, self.key).client(RETRY_SECONDS)

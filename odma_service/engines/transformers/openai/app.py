"""The routes: a call becomes requests of the engine, and their tokens its answer.

A client that goes away before its answer is complete ends its requests: their memory is given
back in the next step.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from odma_service.engines.transformers.loading import Loaded
from odma_service.engines.transformers.openai.answers import Answer, Usage, event
from odma_service.engines.transformers.openai.asked import (
    ApiError,
    Asked,
    ChatAsked,
    CompletionAsked,
    refusal_of,
)
from odma_service.engines.transformers.prose import Prose
from odma_service.engines.transformers.requests import Request, Sampling
from odma_service.engines.transformers.runner import Event, Runner
from odma_service.errors import InvalidError, OdmaError
from odma_service.values import End

MOST_BODY_BYTES = 4 * 2**20
MOST_REQUESTS = 1_024
"""Requests at once, running or waiting; more are told to come again."""
STATUS_GONE = 499

Prompts = Sequence[tuple[str | None, list[int]]]
"""Texts, where they are known, and their tokens."""
Read = TypeVar("Read", bound=Asked)


class Said(NamedTuple):
    """New text of a choice, and why it ended if it did."""

    choice: int
    text: str
    reason: str | None


@dataclass
class Choice:
    """One answer under way."""

    request: Request
    prose: Prose


class Service:
    """Answers calls with one model. `key`: what callers have to show; empty: nothing."""

    def __init__(self, loaded: Loaded, runner: Runner, longest_tokens: int, key: str = "") -> None:
        self._loaded = loaded
        self._runner = runner
        self._longest_tokens = longest_tokens
        self._key = key
        self._created = int(time.time())
        self._requests = 0

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/health", self._health),
        ]
        handlers: dict[Any, Callable[..., Any]] = {ApiError: _refuse, HTTPException: _refuse_http}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _chat(self, call: Call) -> Response:
        asked = await self._read(call, ChatAsked)
        messages = [message.plain() for message in asked.messages]
        try:
            text = self._loaded.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError) as error:
            raise ApiError(400, f"messages: {error}", param="messages") from error
        tokens = self._loaded.tokenizer(text, add_special_tokens=False).input_ids
        most = asked.max_completion_tokens or asked.max_tokens
        return await self._answer(call, asked, [(text, tokens)], most, chat=True)

    async def _complete(self, call: Call) -> Response:
        asked = await self._read(call, CompletionAsked)
        prompts = [
            (prompt, self._loaded.tokenizer(prompt).input_ids)
            if isinstance(prompt, str)
            else (None, prompt)
            for prompt in asked.prompts
        ]
        return await self._answer(call, asked, prompts, asked.max_tokens, chat=False)

    async def _models(self, call: Call) -> Response:
        self._check_key(call)
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, call: Call) -> Response:
        self._check_key(call)
        self._check_model(call.path_params["name"])
        return JSONResponse(self._described())

    async def _health(self, _: Call) -> Response:
        return Response(status_code=503 if self._runner.failure else 200)

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._loaded.name,
            "object": "model",
            "created": self._created,
            "owned_by": "odma",
            "max_model_len": self._longest_tokens,
        }

    # --- what is asked ---

    async def _read(self, call: Call, kind: type[Read]) -> Read:
        """Return the body of a call. Raises ApiError."""
        self._check_key(call)
        if call.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "the body has to be application/json")  # no page of a browser's
        body = bytearray()
        async for part in call.stream():
            body += part
            if len(body) > MOST_BODY_BYTES:
                raise ApiError(413, f"a body has at most {MOST_BODY_BYTES:,} bytes")
        try:
            asked = kind.model_validate_json(bytes(body))
        except ValidationError as error:
            raise refusal_of(error) from error
        self._check_model(asked.model)
        return asked

    def _check_key(self, call: Call) -> None:
        shown = call.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key and not secrets.compare_digest(shown.encode(), self._key.encode()):
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._loaded.name:
            raise ApiError(
                404,
                f"The model `{name}` does not exist: this is `{self._loaded.name}`.",
                param="model",
                code="model_not_found",
            )

    def _choices(self, asked: Asked, prompts: Prompts, most: int | None) -> list[Choice]:
        """Return the requests of a call, `n` for each prompt. Raises ApiError."""
        choices = []
        stops = asked.stops
        for text, tokens in prompts:
            for i in range(asked.n):
                seed = None if asked.seed is None else asked.seed + i
                try:
                    request = Request(
                        tokens,
                        most or max(1, self._longest_tokens - len(tokens)),
                        self._loaded.stop_tokens,
                        Sampling(asked.temperature, asked.top_p, seed),
                        text,
                    )
                except InvalidError as error:
                    raise _refusal(error) from error
                choices.append(Choice(request, Prose(self._loaded.tokenizer, stops)))
        return choices

    # --- what is answered ---

    async def _answer(
        self,
        call: Call,
        asked: Asked,
        prompts: Prompts,
        most: int | None,
        *,
        chat: bool,
    ) -> Response:
        choices = self._choices(asked, prompts, most)
        if self._requests + len(choices) > MOST_REQUESTS:
            raise ApiError(429, "too many requests wait", kind="rate_limit_error")
        usage = Usage(prompt_tokens=sum(len(tokens) for _, tokens in prompts))
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        answer = Answer(chat, name, self._loaded.name, int(time.time()), usage)
        said = self._said_by(call, choices, usage)
        if asked.stream:
            options = asked.stream_options
            with_usage = options is not None and options.include_usage
            # What is refused at once is refused by a status, not within a stream.
            first = await anext(said, None)
            events = self._events(answer, first, said, len(choices), with_usage=with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        texts, reasons = [""] * len(choices), [""] * len(choices)
        async for each in said:
            texts[each.choice] += each.text
            reasons[each.choice] = each.reason or ""
        if not all(reasons):
            return Response(status_code=STATUS_GONE)  # nobody is there to read it
        return JSONResponse(answer.whole(texts, reasons))

    async def _events(
        self,
        answer: Answer,
        first: Said | None,
        said: AsyncGenerator[Said],
        choices: int,
        *,
        with_usage: bool,
    ) -> AsyncIterator[str]:
        try:
            async with aclosing(said):
                for index in range(choices):
                    yield answer.begin(index)
                if first is not None:
                    yield answer.more(*first)
                async for each in said:
                    yield answer.more(*each)
        except ApiError as error:
            yield event(error.body)
            return
        yield answer.end(with_usage=with_usage)

    async def _said_by(
        self, call: Call, choices: list[Choice], usage: Usage
    ) -> AsyncGenerator[Said]:
        """Run the requests of a call, and yield their texts until they or the client are gone."""
        told: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        gone = asyncio.create_task(_wait_until_gone(call, told))
        self._requests += len(choices)
        running = set(range(len(choices)))
        try:
            for index, choice in enumerate(choices):
                self._runner.submit(choice.request, _listener(index, told))
            while running and (news := await told.get()):
                index, happened = news
                if index not in running:
                    continue  # a token behind the text that stopped it
                each = self._said(index, happened, choices[index], usage)
                if each.reason:
                    running.remove(index)
                if each.text or each.reason:
                    yield each
        except OdmaError as error:
            raise _refusal(error) from error
        finally:
            gone.cancel()
            self._requests -= len(choices)
            for choice in choices:
                self._runner.finish(choice.request, End.ABORTED)

    def _said(self, index: int, news: Event, choice: Choice, usage: Usage) -> Said:
        """Return what a token adds to a choice. Raises the OdmaError of a request given up."""
        if news.error is not None:
            raise news.error
        assert news.token is not None
        usage.completion_tokens += 1
        text = "" if news.end is End.FINISHED else choice.prose.add(news.token)
        if news.end is not None:
            text += choice.prose.end()
        if choice.prose.stopped:
            self._runner.finish(choice.request, End.FINISHED)
        elif news.end is End.HIT_LIMIT:
            return Said(index, text, "length")
        over = choice.prose.stopped or news.end is not None
        return Said(index, text, "stop" if over else None)


def _listener(index: int, told: asyncio.Queue[tuple[int, Event] | None]) -> Callable[[Event], None]:
    loop = asyncio.get_running_loop()

    def listen(news: Event) -> None:
        with suppress(RuntimeError):  # the server has stopped
            loop.call_soon_threadsafe(told.put_nowait, (index, news))

    return listen


async def _wait_until_gone(call: Call, told: asyncio.Queue[tuple[int, Event] | None]) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass
    told.put_nowait(None)


def _refusal(error: OdmaError) -> ApiError:
    if isinstance(error, InvalidError):
        long = error.field == "most_tokens"
        code = "context_length_exceeded" if long else None
        return ApiError(400, str(error), param=error.field, code=code)
    return ApiError(503, str(error), kind="server_error")


async def _refuse(_: Call, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def _refuse_http(_: Call, error: HTTPException) -> Response:
    return JSONResponse(ApiError(error.status_code, error.detail).body, error.status_code)

"""What a client may ask. A field that would change the answer and is not served is refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_CHOICES = 32
MOST_STOPS = 4
COMPLETION_TOKENS = 16
"""Most tokens of a completion whose client says nothing, as at OpenAI."""

Zero = float | None


class ApiError(Exception):
    """A refusal as OpenAI's clients expect it: `status` of HTTP, and the fields of its body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool | None = None


class Asked(BaseModel):
    """What chat completions and completions have in common."""

    model_config = ConfigDict(extra="forbid")
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Served only where they ask for nothing.
    frequency_penalty: Zero = Field(None, ge=0, le=0)
    presence_penalty: Zero = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    # Said about the client: they change no answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    @property
    def stops(self) -> list[str]:
        """Return the texts at which an answer stops. Raises ApiError."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise ApiError(400, f"stop: at most {MOST_STOPS} texts, none empty", param="stop")
        return stops


class Part(BaseModel):
    """A piece of a message; only texts are read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: str
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class CompletionAsked(Asked):
    """The body of /v1/completions: a prompt or several, as texts or as tokens."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(COMPLETION_TOKENS, ge=1)
    logprobs: Literal[0] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, at least one. Raises ApiError."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        prompts: list[Any] = list(prompt)
        if prompts and isinstance(prompts[0], int):
            return [prompts]
        if not 1 <= len(prompts) * self.n <= MOST_CHOICES:
            raise ApiError(400, f"prompt: 1 to {MOST_CHOICES} answers in all", param="prompt")
        return prompts


def refusal_of(error: ValidationError) -> ApiError:
    """Return what a client is told: of the errors the one that is deepest in its body."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(errors, key=lambda each: len(each["loc"]))
    path = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {path}", param=path)
    return ApiError(400, f"{path}: {first['msg']}" if path else first["msg"], param=path or None)

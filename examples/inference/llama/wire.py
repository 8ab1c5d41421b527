"""OpenAI's HTTP API in records: what comes in, checked, and what goes out.

A parameter that would change the answer and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import re
import time
import uuid
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from llama.sampling import Sampling
from llama.tokenizer import Tokenizer

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What the model was taught to expect where a conversation does not begin with a system message."""
TOKENS_DEFAULT = 256
MESSAGES_MAX = 256
StopWord = Annotated[str, Meta(max_length=256)]


class ApiError(Exception):
    """An answer with an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": _type(status), "param": param, "code": code}}


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class StreamOptions(_Strict, frozen=True):
    include_usage: bool = False


class Asked(_Strict, frozen=True, kw_only=True):
    """What both kinds of completion take."""

    model: str
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None
    stop: StopWord | Annotated[list[StopWord], Meta(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=0, le=0)] | None = None
    user: str | None = None
    """Taken and not used, since it changes nothing of the answer."""

    @property
    def sampling(self) -> Sampling:
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, 1.0 if self.top_p is None else self.top_p, self.seed)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def tokens_max(self) -> int | None:
        return self.max_tokens

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(_Strict, frozen=True):
    text: str
    type: Literal["text"] = "text"


class Message(_Strict, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked, frozen=True, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: Literal[False] | None = None

    @property
    def tokens_max(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        turns = [("system" if each.role == "developer" else each.role, each.text) for each in self.messages]
        return tokenizer.chat(turns if turns[0][0] == "system" else [("system", SYSTEM), *turns])


class TextAsked(Asked, frozen=True, kw_only=True):
    prompt_text: str = msgspec.field(name="prompt")
    logprobs: None = None
    echo: Literal[False] | None = None

    def prompt(self, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(self.prompt_text)


def parse(body: bytes, kind: type[ChatAsked] | type[TextAsked]) -> ChatAsked | TextAsked:
    """Raises ApiError that names the parameter."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message = str(error)
        unknown = re.search(r"unknown field `([^`]+)`", message) or re.search(r"missing required field `([^`]+)`", message)
        where = re.search(r"at `\$\.?([^`]*)`", message)
        param = ".".join(part for part in (where[1] if where else "", unknown[1] if unknown else "") if part)
        code = "unsupported_parameter" if "unknown field" in message else None
        raise ApiError(400, f"{param}: {message}" if param else message, param=param or None, code=code) from None
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None


class Answer:
    """The shape of one answer, whole or as a stream."""

    def __init__(self, asked: ChatAsked | TextAsked, prompt_tokens: int) -> None:
        self._chat = isinstance(asked, ChatAsked)
        self._asked = asked
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex[:24]}",
            "created": int(time.time()),
            "model": asked.model,
        }
        self.tokens = 0

    @property
    def usage(self) -> dict[str, int]:
        total = self._prompt_tokens + self.tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    def whole(self, text: str, finish: str) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return msgspec.json.encode({**self._head, "object": kind, "choices": [choice], "usage": self.usage})

    def opening(self) -> bytes:
        """The first chunk of a stream: whose turn it is. Empty for a plain completion."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._chat else b""

    def piece(self, text: str, finish: str | None) -> bytes:
        if self._chat:
            return self._chunk({"delta": {"content": text} if text or finish is None else {}}, finish)
        return self._chunk({"text": text}, finish)

    def closing(self) -> bytes:
        """The end of a stream, with the usage where it was asked for."""
        usage = self._event({"choices": [], "usage": self.usage}) if self._asked.usage_at_end else b""
        return usage + b"data: [DONE]\n\n"

    def _chunk(self, choice: dict[str, Any], finish: str | None) -> bytes:
        return self._event({"choices": [{"index": 0, **choice, "finish_reason": finish, "logprobs": None}]})

    def _event(self, fields: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return b"data: " + msgspec.json.encode({**self._head, "object": kind, **fields}) + b"\n\n"

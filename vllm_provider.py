# SPDX-License-Identifier: MIT
"""Talk to a vLLM server from Python: one file, one dependency (requests).

Copy this file into a project, or install it.

    >>> from vllm_provider import VLLMClient
    >>> client = VLLMClient("http://localhost:8000")
    >>> reply = client.complete("The capital of France is", logprobs=2)  # doctest: +SKIP
    >>> reply.text, reply.logprobs[0].probability                        # doctest: +SKIP
    (' Paris.', 0.9997)
    >>> for delta in client.stream_chat("What is 2+2?"):                 # doctest: +SKIP
    ...     print(delta.text, end="", flush=True)

The sections stand in the order one request travels, and data goes one way:

    VLLMConfig -> build_*_request -> transport -> SSE decoder -> replies -> VLLMClient -> Amplifier
       values          pure        the only I/O      pure         pure          |
                                                            many calls, pictures, command line
"""

import collections  # noqa: I001  # the long lists of names stand in few lines
import contextvars
import copy
import email.utils
import functools
import html
import http.client
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import weakref
from collections.abc import (
    Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized,
)  # fmt: skip
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import (
    Any, BinaryIO, Final, Literal, NamedTuple, Self, TextIO, TypedDict, TypeVar, Unpack, overload,
)  # fmt: skip
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

__version__ = "2.0.0"
__amplifier_module_type__ = "provider"
# fmt: off
__all__ = [
    "AbortError", "AccessDeniedError", "AuthenticationError", "BatchReport", "Choice",
    "Completion", "ConfigurationError", "ContextLengthError", "Delta", "InvalidOutputError",
    "InvalidRequestError", "InvalidToolCallError", "LLMTimeoutError", "ModelCard", "NetworkError",
    "NotFoundError", "ProtocolError", "ProviderUnavailableError", "RateLimitError", "Score",
    "StatusError", "Stream", "StreamError", "TokenLogprob", "ToolCall", "Usage", "VLLMClient",
    "VLLMConfig", "VLLMError", "VLLMProvider", "build_chat_request", "build_completion_request",
    "main", "mount", "on_session_ready", "parse_chat_response", "parse_completion_response",
    "request_options", "to_html",
]
# fmt: on

logger = logging.getLogger("vllm_provider")  # by name: a copied file may have another

# ---- Wire constants ---------------------------------------------------------

COMPLETIONS_PATH: Final = "/v1/completions"
CHAT_PATH: Final = "/v1/chat/completions"
GENERATION_PATHS: Final = (COMPLETIONS_PATH, CHAT_PATH)
DEFAULT_MAX_TOKENS: Final = 1024  # for a prompt as typed; the server's own default is 16
SERVER_MAX_TOKENS: Final = 16  # that default
SENTINEL_LOGPROB: Final = -9999.0  # vLLM's -inf: JSON has no infinity
HARMONY_START: Final = 200006  # <|start|>, the first token of every gpt-oss conversation
HARMONY_CALL: Final = 200012  # <|call|>, where gpt-oss stops after a tool call

# Time, in seconds.
IDLE_REUSE_S: Final = 4.0  # vLLM closes a connection that was idle for 5 s
DRAIN_S: Final = 0.05  # wait for the bytes after [DONE], so that the connection can be reused
ERROR_BODY_S: Final = 5.0  # wait for the body of an error whose status is known
HEALTH_POLL_S: Final = 0.5  # between two looks at a server that is starting
HEALTH_LOOK_S: Final = 5.0  # one look, so that a server that hangs does not use up the whole wait
MODEL_RETRY_S: Final = 60.0  # how long a failure to list the models is remembered
POLL_S: Final = 0.1  # between two looks at what nobody can signal
MAX_WAIT_S: Final = 1e6  # 11 days; the clocks of sockets and locks overflow further on

# Sizes.
READ_BYTES: Final = 65536
MAX_EVENT_BYTES: Final = 64 * 1024 * 1024  # an echo of 24,000 tokens with 20 alternatives has 18
MAX_REPLY_BYTES: Final = 256 * 1024 * 1024
MAX_ERROR_BYTES: Final = 1024 * 1024
MAX_QUOTED_CHARS: Final = 200
MIN_SECRET_CHARS: Final = 8  # a shorter key may be a common word: blanking it would hide text
CONNECTIONS_PER_CALL: Final = 4  # kept for reuse, times max_concurrency
MAX_LOWERINGS: Final = 2  # vLLM 0.16-0.31 names the model's limit first, then the prompt's length

# Sent again: a request with such a status has not started. A gateway can send 502 for one that
# had begun, too; a generation has no side effects.
RETRIED_STATUS: Final = frozenset({429, 502, 503})
STARTING_PAGES: Final = (  # in the HTML page of a gateway (404 or 425) whose server is starting
    "warming up", "initializing", "starting up", "service is starting",
    "waiting for service to respond",
)  # fmt: skip
CALL_LIMITS: Final = ("timeout", "stream_idle_timeout", "deadline")  # of a call, not sent
BASE_URL_ADVICE: Final = "is base_url the server's root, and is it vLLM? (curl BASE_URL/v1/models)"


def _require_version(module: Any, minimum: str) -> None:
    found = re.findall(r"\d+", module.__version__)
    if list(map(int, found)) < list(map(int, minimum.split("."))):
        raise ImportError(
            f"vllm_provider needs {module.__name__} {minimum} or newer, got {module.__version__};"
            f" pip install -U {module.__name__}"
        )


_require_version(requests, "2.32.4")
_require_version(urllib3, "2.3")

# ---- Errors -----------------------------------------------------------------
#
# VLLMError
#   ConfigurationError (also ValueError)      nothing was sent
#   NetworkError                              no connection, or closed before a reply
#   LLMTimeoutError                           timeout, idle timeout or deadline
#   StreamError                               the reply stopped half way
#   AbortError                                cancelled by the caller
#   InvalidToolCallError                      the model wrote arguments that are not a JSON object
#   InvalidOutputError (also ValueError)      the model's text is not the JSON that was asked for
#   ProtocolError                             a reply that is not what vLLM sends
#   StatusError                               any other HTTP error
#     AuthenticationError 401, AccessDeniedError 403 (under it), NotFoundError 404,
#     InvalidRequestError 400 and 422, ContextLengthError, RateLimitError 429,
#     ProviderUnavailableError 5xx
#
# Names and inheritance are those of Amplifier's kernel where it has them. None is an OSError:
# its application swallows those.


class VLLMError(Exception):
    """Base of every error here; its text says what happened, where, and what to do about it.

    `status_code`: the reply's, None without one. `retryable`: whether the same call may succeed
    later (the first may have run all the same). `retry_after`: the seconds the server asks to
    wait, or None. `request_id`: ours, as sent. `partial`: for a stream, the Completion received
    until then. Errors can be pickled.
    """

    _retryable = False

    def __init__(
        self, message: str, *, status_code: int | None = None, retryable: bool | None = None,
        retry_after: float | None = None, request_id: str | None = None,
        partial: "Completion | None" = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status_code = status_code
        self.retryable = self._retryable if retryable is None else retryable
        self.retry_after = retry_after
        self.request_id = request_id
        self.partial = partial


class ConfigurationError(VLLMError, ValueError):
    """A setting or an argument that cannot work; nothing was sent."""


class NetworkError(VLLMError):
    """No connection, or a connection closed before a reply."""

    _retryable = True


class LLMTimeoutError(VLLMError):
    """`timeout`, `stream_idle_timeout`, `connect_timeout` or `deadline`; the server was stopped."""

    _retryable = True


class StreamError(VLLMError):
    """The reply stopped half way; what had arrived is in `partial`."""

    _retryable = True


class AbortError(VLLMError):
    """The caller stopped the call; what had arrived is in `partial`."""


class InvalidToolCallError(VLLMError):
    """The model called `tool_name` with `raw_arguments`, which are not a JSON object."""

    tool_name: str | None = None
    raw_arguments: str | None = None


class InvalidOutputError(VLLMError, ValueError):
    """The model's text is not the JSON that was asked for; the whole reply is in `partial`."""


class ProtocolError(VLLMError):
    """A reply that is not what vLLM sends: HTML, broken JSON, an unknown encoding, too large."""


class StatusError(VLLMError):
    """An HTTP error, also one inside a reply with status 200.

    `server_message`: the server's text, with the API key blanked.
    """

    server_message: str = ""


class AuthenticationError(StatusError):
    """401: the API key is missing or wrong."""


class AccessDeniedError(AuthenticationError):
    """403: the key may not do this."""


class NotFoundError(StatusError):
    """404: no such model, or no such path."""


class InvalidRequestError(StatusError):
    """400 or 422: a parameter vLLM does not take."""


class ContextLengthError(StatusError):
    """The prompt does not fit: it has `input_tokens`, the model `limit`; None where unknown."""

    limit: int | None = None
    input_tokens: int | None = None


class RateLimitError(StatusError):
    """429: from a gateway; vLLM itself sends none."""

    _retryable = True


class ProviderUnavailableError(StatusError):
    """5xx: the engine is busy, starting or dead."""

    _retryable = True


_STATUS_ERRORS: Final[Mapping[int, type[StatusError]]] = {
    400: InvalidRequestError, 401: AuthenticationError, 403: AccessDeniedError,
    404: NotFoundError, 422: InvalidRequestError, 429: RateLimitError,
}  # fmt: skip

# ---- Values: configuration --------------------------------------------------

_Check = Callable[[str, Any], Any]  # a setting's key and value -> the value converted

_FLAGS: Final = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip
_PROMPT_FORMATS: Final = {"auto": "auto", "chat_template": "chat_template", "raw": "raw"}
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, token
_ROOT_URL: Final = re.compile(r"(?i)https?://[^\s\x00-\x1f\x7f?#/.:][^\s\x00-\x1f\x7f?#]*")
_ALIASES: Final = {"extra_request_params": "extra_body", "reasoning": "reasoning_effort"}


def _check(expected: str, convert: Callable[[Any], Any]) -> _Check:
    def check(key: str, value: Any) -> Any:
        try:
            return convert(value)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ConfigurationError(f"{key} must be {expected}, got {value!r}") from error

    return check


def _to_flag(value: Any) -> bool:
    return _FLAGS[str(value).strip().lower()]


def _to_number(
    value: Any, minimum: float = -sys.float_info.max, maximum: float = math.inf
) -> float:
    number = float(value)
    if isinstance(value, bool | bytes) or not minimum <= number <= maximum:  # never true of NaN
        raise ValueError(value)
    return number


def _to_int(value: Any, minimum: float = -math.inf) -> int:
    """Return an integer, also of "42", 42.0 and "4e3"."""
    number = _to_number(value, minimum)
    if number.is_integer() and not str(value).strip().lstrip("+-").isdecimal():
        return int(number)
    return int(str(value))  # exact, where a float has 53 bits


def _to_strings(value: Any) -> str | list[str]:
    return value if isinstance(value, str) else list(map(str.__str__, value))


def _to_logprobs(value: Any) -> int | bool:
    """Return a number of alternatives, or whether log probabilities are wanted."""
    try:
        return _to_int(value)  # first: "1" is a number here
    except ValueError:
        return _to_flag(value)


def _to_verify(value: Any) -> bool | str:
    with suppress(KeyError):
        return _to_flag(value)

    path: str = os.fspath(value)
    if not os.path.exists(path):
        raise ValueError(path)
    return path


_text = _check("a string", str.__str__)
_flag = _check("true or false", _to_flag)
_number = _check("a number", lambda value: _to_number(value, maximum=sys.float_info.max))
_seconds = _check("a positive number of seconds", lambda value: _to_number(value, math.ulp(0.0)))
_wait_seconds = _check("a number of seconds of at least 0", lambda value: _to_number(value, 0.0))
_integer = _check("an integer", _to_int)
_count = _check("an integer of at least 1", lambda value: _to_int(value, 1))
_count_or_zero = _check("an integer of at least 0", lambda value: _to_int(value, 0))
_strings = _check("a string or a list of strings", _to_strings)
_logprobs = _check("an integer, true or false", _to_logprobs)
_verify = _check("true, false or the path of a CA bundle that exists", _to_verify)
_format = _check("auto, chat_template or raw", _PROMPT_FORMATS.__getitem__)


def _mapping(key: str, value: object) -> dict[str, Any]:
    """Return a dict; the error does not quote the values, which may be secrets."""
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{key} must be a mapping, got a {type(value).__name__}")
    for name in value:
        if not isinstance(name, str):
            raise ConfigurationError(f"{key} must have strings as keys, got {name!r}")
    return dict(value)


def _secret(key: str, value: object) -> str:
    """Return a value that fits into a header; no error quotes it."""
    if isinstance(value, str) and value.isascii() and value.isprintable():
        return value
    raise ConfigurationError(
        f"{key} must be printable ASCII; is a line break or a typographic character in it?"
    )


def _headers(key: str, value: object) -> dict[str, str]:
    headers = _mapping(key, value)
    for name, text in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            raise ConfigurationError(f"{key} must have HTTP header names as keys, got {name!r}")
        headers[name] = _secret(f"{key}[{name!r}]", str(text)).strip()
    return headers


def _base_url(key: str, value: object) -> str:
    """Return the server's root, without `/v1` and without a trailing slash.

    >>> _base_url("base_url", "https://gpu.example/openai/v1/")
    'https://gpu.example/openai'
    """
    text: str = _text(key, value).strip()
    if "@" in text:
        raise ConfigurationError(
            f"{key} must not hold a user name or password; a key goes under api_key"
        )

    try:
        is_good = _ROOT_URL.fullmatch(text) is not None and urlsplit(text).port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        is_good = False
    if not is_good:
        shown = re.split(r"[?#]", str(value))[0]  # what follows may be a key
        raise ConfigurationError(
            f"{key} must be a URL like http://localhost:8000, without query or fragment,"
            f" got {shown!r}"
        )

    scheme, rest = text.split(":", 1)
    return f"{scheme.lower()}:{rest}".rstrip("/").removesuffix("/v1").rstrip("/")


def _setting(check: _Check, default: Any = None, env: str = "") -> Any:
    return field(default=default, metadata={"check": check, "env": env})


class _Replaceable(str):
    """A default that an environment variable replaces; the same text given by a caller stays."""

    __slots__ = ()


def _is_given(value: object) -> bool:
    """Return False for None, "" and an unexpanded ${NAME}."""
    if value in (None, "") or isinstance(value, _Replaceable):
        return False
    return not re.fullmatch(r"\$\{\w+\}", str(value))


@dataclass(frozen=True, slots=True, repr=False)
class VLLMConfig:
    """Settings of a client or a provider; README has the table.

    Every value may also be a string. Times are in seconds, and `math.inf` is no limit; a
    `stream_idle_timeout` of None is `timeout`, a `max_retries` of None is 3 (6 in Amplifier).
    Where `base_url`, `api_key`, `context_window` or `stream_idle_timeout` is not given, the
    environment counts: VLLM_BASE_URL, VLLM_API_KEY, VLLM_CONTEXT_WINDOW,
    VLLM_STREAM_IDLE_TIMEOUT. Raises ConfigurationError, which names the key, the value and what
    was expected. The repr shows no key and no header's value.

    >>> VLLMConfig("http://localhost:8000/v1/", timeout=60, api_key="secret")
    VLLMConfig(base_url='http://localhost:8000', api_key='***', timeout=60.0)
    """

    base_url: str = _setting(_base_url, env="VLLM_BASE_URL")
    _: KW_ONLY
    default_model: str | None = _setting(_text)
    use_completions: bool = _setting(_flag, True)
    prompt_format: str = _setting(_format, "auto")
    api_key: str = _setting(_secret, _Replaceable("EMPTY"), env="VLLM_API_KEY")
    max_tokens: int | None = _setting(_count_or_zero)
    temperature: float | None = _setting(_number)
    top_p: float | None = _setting(_number)
    seed: int | None = _setting(_integer)
    stop: str | list[str] | None = _setting(_strings)
    logprobs: int | bool | None = _setting(_logprobs)
    reasoning_effort: str | None = _setting(_text)
    extra_body: Mapping[str, Any] = field(default_factory=dict, metadata={"check": _mapping})
    timeout: float = _setting(_seconds, 300.0)
    stream_idle_timeout: float | None = _setting(_seconds, env="VLLM_STREAM_IDLE_TIMEOUT")
    connect_timeout: float = _setting(_seconds, 10.0)
    max_retries: int | None = _setting(_count_or_zero)
    min_retry_delay: float = _setting(_seconds, 0.5)
    max_retry_delay: float = _setting(_seconds, 30.0)
    max_concurrency: int = _setting(_count, 64)
    verify: bool | str = _setting(_verify, True)
    default_headers: Mapping[str, str] = field(default_factory=dict, metadata={"check": _headers})
    context_window: int | None = _setting(_count, env="VLLM_CONTEXT_WINDOW")
    max_output_tokens: int | None = _setting(_count)
    use_streaming: bool = _setting(_flag, True)
    priority: int = _setting(_integer, 100)
    debug: bool = _setting(_flag, False)
    raw_debug: bool = _setting(_flag, False)
    debug_truncate_length: int = _setting(_count, 180)
    raw: bool = _setting(_flag, False)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if not _is_given(value):
                value = os.environ.get(spec.metadata.get("env", ""))
            if _is_given(value):
                value = spec.metadata["check"](spec.name, value)
            else:
                value = _default_of(spec)
            object.__setattr__(self, spec.name, value)

        if self.base_url is None:
            raise ConfigurationError(
                "No base_url found: set it or VLLM_BASE_URL, like http://localhost:8000"
            )

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Return the configuration in a mapping from YAML or Amplifier.

        An unknown key is one warning. `extra_request_params` is another name for `extra_body`,
        `reasoning` for `reasoning_effort`.
        """
        settings = {}
        for key, value in _mapping("the configuration", mapping).items():
            name = _ALIASES.get(key, key)
            if name in _setting_names():
                settings[name] = value
            else:
                logger.warning("unknown setting %r is ignored%s", key, _suggest_setting(key))
        return cls(**settings)

    def __repr__(self) -> str:
        hidden = {"api_key": "***", "default_headers": dict.fromkeys(self.default_headers, "***")}
        shown = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value != _default_of(spec):
                shown.append(f"{spec.name}={hidden.get(spec.name, value)!r}")
        return f"VLLMConfig({', '.join(shown)})"

    def __hash__(self) -> int:
        return hash(repr(self))  # two settings are dicts


def _default_of(spec: Field[Any]) -> Any:
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def _setting_names() -> list[str]:
    return [spec.name for spec in fields(VLLMConfig)]


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` may be a misspelling of."""
    import difflib

    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.75)), None)


def _suggest_setting(key: str) -> str:
    for name in _setting_names():
        if len(key) > 2 and key in name:
            return f"; did you mean {name!r}?"

    if key in VLLM_PARAMETERS:
        return "; it is a parameter of vLLM's: put it under extra_body"
    near = _nearest(key, _setting_names())
    return f"; did you mean {near!r}?" if near else ""


# ---- Values: request parameters ---------------------------------------------
#
# vLLM's own names, so that an editor completes them and a type checker finds a misspelled one.
# The server judges the values: vllm/entrypoints/openai/*/protocol.py, 0.10 to 0.33.


class _CallParams(TypedDict, total=False):
    """The limits of a call, in seconds; None takes the configuration's."""

    timeout: float | None
    stream_idle_timeout: float | None
    deadline: float | None


# fmt: off
_GenerationParams = TypedDict("_GenerationParams", {  # noqa: UP013  # several to a line
    "extra_body": Mapping[str, Any] | None,
    "model": str | None, "user": str | None, "request_id": str | None, "session_id": str | None,
    "max_tokens": int | None, "min_tokens": int | None, "n": int | None, "best_of": int | None,
    "temperature": float | None, "top_p": float | None, "top_k": int | None, "min_p": float | None,
    "repetition_penalty": float | None, "presence_penalty": float | None,
    "frequency_penalty": float | None, "length_penalty": float | None, "seed": int | None,
    "stop": str | list[str] | None, "stop_token_ids": list[int] | None, "ignore_eos": bool | None,
    "include_stop_str_in_output": bool | None, "bad_words": list[str] | None,
    "logprobs": int | bool | None, "prompt_logprobs": int | None, "echo": bool | None,
    "logprob_token_ids": list[int] | None, "return_tokens_as_token_ids": bool | None,
    "return_token_ids": bool | None, "logit_bias": Mapping[str, float] | None,
    "skip_special_tokens": bool | None, "spaces_between_special_tokens": bool | None,
    "add_special_tokens": bool | None, "allowed_token_ids": list[int] | None,
    "truncate_prompt_tokens": int | None, "truncation_side": str | None,
    "use_beam_search": bool | None, "thinking_token_budget": int | None,
    "stream_options": Mapping[str, Any] | None, "stream_interval": int | None,
    "response_format": Any, "structured_outputs": Mapping[str, Any] | None,
    "priority": int | None, "cache_salt": str | None, "watermarking": bool | None,
    "kv_transfer_params": Mapping[str, Any] | None, "ec_transfer_params": Mapping[str, Any] | None,
    "vllm_xargs": Mapping[str, Any] | None, "repetition_detection": Mapping[str, Any] | None,
}, total=False)
# fmt: on


class _CommonParams(_CallParams, _GenerationParams, total=False): ...


class _CompletionParams(_CommonParams, total=False):
    prompt_embeds: Any
    suffix: str | None


class _ChatParams(_CommonParams, total=False):
    top_logprobs: int | None
    max_completion_tokens: int | None
    tools: list[dict[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    reasoning_effort: str | None
    include_reasoning: bool | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    documents: list[dict[str, str]] | None
    mm_processor_kwargs: Mapping[str, Any] | None
    media_io_kwargs: Mapping[str, Any] | None
    return_prompt_text: bool | None


VLLM_PARAMETERS: Final = frozenset(
    _CompletionParams.__annotations__ | _ChatParams.__annotations__
) - {*CALL_LIMITS, "extra_body"}

# ---- Values: replies --------------------------------------------------------
#
# What comes once for each token is a named tuple: a frozen dataclass takes four times as long to
# make.


class TokenLogprob(NamedTuple):
    """A token and its natural log probability, in one shape for both endpoints.

    `logprob`: None where the server has none (the first token of an echoed prompt), -inf for its
    -9999.0. `bytes`, `token_id`, `rank`: None where not sent. `top`: the alternatives, most
    likely first, at most as many as were requested.
    """

    token: str
    logprob: float | None
    bytes: "bytes | None" = None
    token_id: int | None = None
    rank: int | None = None
    top: "tuple[TokenLogprob, ...]" = ()

    @property
    def probability(self) -> float | None:
        """Return exp(logprob), from 0.0 to 1.0; None where the log probability is None."""
        return None if self.logprob is None else math.exp(self.logprob)


class ToolCall(NamedTuple):
    """A function the model calls; in a Delta, `arguments` is the text its event added."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """Return the arguments as a dict; raise InvalidToolCallError for anything else.

        >>> ToolCall("call_1", "get_weather", '{"city": "Paris"}').parsed()
        {'city': 'Paris'}
        """
        try:
            arguments = _parse_json(self.arguments)
            if isinstance(arguments, dict):
                return arguments
            raise ValueError(f"a {type(arguments).__name__} is not an object")
        except (ValueError, RecursionError) as cause:
            error = InvalidToolCallError(
                f"the model called {self.name!r} with arguments that are not a JSON object:"
                f" {_quoted(self.arguments)}; was it cut by max_tokens?"
            )
            error.tool_name = self.name
            error.raw_arguments = self.arguments
            raise error from cause


def _parse_json(text: str) -> Any:
    """Return the value of a JSON text; NaN and Infinity, which Python would take, are errors."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _quoted(text: str) -> str:
    """Return the beginning of a text on one line, in quotes."""
    line = " ".join(text[:READ_BYTES].split())
    if len(line) > MAX_QUOTED_CHARS:
        line = line[:MAX_QUOTED_CHARS] + "…"
    return repr(line)


class Usage(NamedTuple):
    """Tokens, as the server counted them; None where it did not say."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class Delta(NamedTuple):
    """What one event of a stream added to the choice `index`; fields as in Choice."""

    index: int = 0  # type: ignore[assignment]  # in the place of tuple.index()
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer. Texts are "" and sequences are empty where the server sent none.

    With several prompts `index` is `prompt * n + answer`. `stop_reason` is the stop string that
    matched, or the id of a stop token. `logprobs` covers every token generated, those of
    reasoning, markup and the end included.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A reply of either endpoint; `text`, `reasoning`, … are those of its first choice.

    `id` is the server's, `request_id` ours. `first_token_s` (streams only) and `total_s` are
    seconds since the call began. `payload` is the decoded reply; for a stream, its top-level
    fields without choices.
    """

    id: str = ""
    request_id: str = ""
    model: str = ""
    choices: tuple[Choice, ...] = ()
    usage: Usage | None = None
    first_token_s: float | None = None
    total_s: float | None = None
    payload: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def _first(self) -> Choice:
        return self.choices[0] if self.choices else Choice()

    @property
    def text(self) -> str:
        """Return the first choice's text."""
        return self._first.text

    @property
    def reasoning(self) -> str:
        """Return the first choice's reasoning."""
        return self._first.reasoning

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Return the first choice's tool calls."""
        return self._first.tool_calls

    @property
    def finish_reason(self) -> str | None:
        """Return the first choice's finish reason."""
        return self._first.finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Return the first choice's log probabilities."""
        return self._first.logprobs

    def to_message(self) -> dict[str, Any]:
        """Return the assistant's message for the next turn.

        Its content is never None: vLLM up to 0.11 fails on that.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning"] = self.reasoning  # the name every vLLM since 0.11.1 honours
        if self.tool_calls:
            message["tool_calls"] = list(itertools.starmap(_to_wire_call, self.tool_calls))
        return message

    def to_dict(self) -> dict[str, Any]:
        """Return the whole reply as JSON can hold it, -inf as vLLM's -9999.0."""
        return dict(_to_json(self))

    def json(self, model: Any = None) -> Any:
        """Return the text's JSON, or with `model` an instance of that class.

        That is `model.model_validate(value)` where it exists (pydantic), else `model(**value)`.
        Raises InvalidOutputError, whose `partial` is this reply.

        >>> Completion(choices=(Choice(text='{"city": "Paris"}'),)).json()
        {'city': 'Paris'}
        """
        try:
            value = _parse_json(self.text)
            if model is None:
                return value
            if hasattr(model, "model_validate"):
                return model.model_validate(value)
            return model(**value)
        except (ValueError, TypeError, RecursionError) as cause:
            expected = "JSON" if model is None else f"a {model.__name__}"
            advice = "ask for it with response_format"
            if self.finish_reason == "length":
                advice = "finish_reason is 'length': raise max_tokens"
            raise InvalidOutputError(
                f"the text is not {expected}: {_quoted(self.text)}; {advice}",
                request_id=self.request_id,
                partial=self,
            ) from cause

    def _repr_html_(self) -> str | None:
        """Return the heat map of to_html() for a notebook; None without log probabilities."""
        return _to_fragment(self) if self.logprobs else None


def _to_wire_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class ModelCard(NamedTuple):
    """A model of `/v1/models`.

    `max_model_len`: the context length in tokens, for a LoRA its base model's, from a proxy its
    `max_input_tokens`. `max_output_tokens`: a proxy's limit. None where the server does not say.
    """

    id: str
    max_model_len: int | None = None
    root: str | None = None
    parent: str | None = None
    max_output_tokens: int | None = None


def _to_json(value: Any, max_chars: float = math.inf, token_key: str = "token") -> Any:
    """Return values of this module as what JSON can hold: -inf as -9999.0, bytes as a list.

    `max_chars`: where strings are cut. `token_key`: the name of a TokenLogprob's first field.
    """
    names = getattr(value, "_fields", getattr(value, "__dataclass_fields__", ()))
    if names:
        value = {name: getattr(value, name) for name in names}

    convert = functools.partial(_to_json, max_chars=max_chars, token_key=token_key)
    if isinstance(value, Mapping):
        keys = {"token": token_key}
        return {keys.get(name, name): convert(item) for name, item in value.items()}
    if isinstance(value, list | tuple | bytes):
        return list(map(convert, value))
    if isinstance(value, str) and len(value) > max_chars:
        return f"{value[: int(max_chars)]}… ({len(value)} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return SENTINEL_LOGPROB if value < 0 else None
    return value


# ---- Requests (pure) --------------------------------------------------------

_Body = Mapping[str, Any]  # JSON we send
_Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
_Messages = str | Sequence[Mapping[str, Any]]


def build_completion_request(
    config: VLLMConfig, prompt: _Prompt, **params: Unpack[_CompletionParams]
) -> dict[str, Any]:
    """Return the JSON body for `/v1/completions`.

    `prompt`: a string, a list of strings, a list of token ids, or a list of such lists. `params`:
    vLLM's own request parameters; None is not sent, 0 and False are. `logprobs=N` asks for N
    alternatives a token. Raises ConfigurationError for what is not JSON and for `stream`.

    >>> config = VLLMConfig("http://localhost:8000", default_model="m")
    >>> build_completion_request(config, "Once", temperature=0, logprobs=True)
    {'model': 'm', 'prompt': 'Once', 'max_tokens': 1024, 'temperature': 0, 'logprobs': 1}
    """
    body = _merge(config, {"prompt": prompt, "max_tokens": DEFAULT_MAX_TOKENS}, params, dict)
    if body.get("logprobs") is True:
        body["logprobs"] = 1
    return _checked(body)


def build_chat_request(
    config: VLLMConfig, messages: _Messages, **params: Unpack[_ChatParams]
) -> dict[str, Any]:
    """Return the JSON body for `/v1/chat/completions`.

    `messages`: a list of dicts, or one string from the user. `params` and errors as in
    build_completion_request; `logprobs=N` is sent as chat spells it.

    >>> build_chat_request(VLLMConfig("http://localhost:8000"), "Hi", logprobs=2)
    {'messages': [{'role': 'user', 'content': 'Hi'}], 'logprobs': True, 'top_logprobs': 2}
    """
    body = _merge(config, {"messages": _to_messages(messages)}, params, _to_chat_logprobs)
    return _checked(body)


def _to_messages(messages: Any, system: str | None = None) -> list[Any]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]

    is_list = isinstance(messages, list | tuple)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigurationError(
            "messages must be a string or a list of dicts like {'role': 'user', 'content': '…'}"
        )

    if system is None:
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _merge(
    config: VLLMConfig,
    prompt: Mapping[str, Any],
    params: Mapping[str, Any],
    spell_logprobs: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Return prompt, settings, parameters and extra_body, later ones winning, without None.

    `spell_logprobs` translates each layer before it is merged, so that a later `top_logprobs`
    wins over an earlier `logprobs=N`.
    """
    names = ("max_tokens", "temperature", "top_p", "seed", "stop", "logprobs", "reasoning_effort")
    layers = (
        {"model": config.default_model, **prompt},
        {name: getattr(config, name) for name in names},
        params,
        config.extra_body,
        _mapping("extra_body", params.get("extra_body") or {}),
    )
    body: dict[str, Any] = {}
    for layer in layers:
        body |= spell_logprobs({name: value for name, value in layer.items() if value is not None})

    for name in ("extra_body", *CALL_LIMITS):
        body.pop(name, None)
    return body


def _to_chat_logprobs(params: dict[str, Any]) -> dict[str, Any]:
    number = params.get("logprobs", True)
    if isinstance(number, bool):
        return params
    return {"logprobs": True, "top_logprobs": number, **params} | {"logprobs": True}


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body; raise ConfigurationError if it is not JSON, warn of misspelled names."""
    if "stream" in body:
        raise ConfigurationError(
            "stream is not a parameter here; stream_complete() and stream_chat() stream"
        )

    for name in body.keys() - VLLM_PARAMETERS - {"prompt", "messages"}:
        _warn_of_name(name)
    if body.get("logprobs") is False:  # completions read it as 0, which switches them on
        del body["logprobs"]
        body.pop("top_logprobs", None)  # a 400 without logprobs

    form: Any = body.get("response_format")
    if hasattr(form, "model_json_schema"):
        schema = {"name": form.__name__, "schema": form.model_json_schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}

    _encode(body)
    return body


@functools.cache
def _warn_of_name(name: str) -> None:
    """Log a warning, once for each name: vLLM ignores an unknown parameter silently."""
    known = _nearest(name, VLLM_PARAMETERS)
    if known is not None:
        logger.warning("%s: did you mean %s? vLLM ignores unknown parameters", name, known)


def _encode(body: Any) -> bytes:
    """Return JSON as bytes; raise ConfigurationError for what JSON cannot hold, unquoted."""
    try:
        text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"the request holds a lone surrogate, which UTF-8 has no bytes for{_find_bad(body)}"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"the request is not JSON{_find_bad(body)}: {error}") from error


def _find_bad(body: Any) -> str:
    if not isinstance(body, Mapping):
        return ""
    for name, value in body.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError):
            return f", in {name!r}"
    return ""


def _to_stream(body: _Body) -> dict[str, Any]:
    """Return the body that asks for a stream with usage.

    `include_usage` defaults to true in vLLM up to 0.17, to false from 0.18 on.
    """
    options = _mapping("stream_options", body.get("stream_options", {}))
    return {**body, "stream": True, "stream_options": {"include_usage": True, **options}}


class _Limits(NamedTuple):
    """The limits of a call in seconds; `math.inf` is none."""

    timeout: float
    stream_idle_timeout: float
    deadline: float


def _read_limits(config: VLLMConfig, params: Mapping[str, Any]) -> _Limits:
    idle = config.stream_idle_timeout or config.timeout
    limits = _Limits(config.timeout, idle, math.inf)
    for name in CALL_LIMITS:
        if params.get(name) is not None:
            limits = limits._replace(**{name: _seconds(name, params[name])})
    return limits


class _RequestFacts(NamedTuple):
    """What an error message needs to know of the request it is about.

    `where`: method and URL. `max_tokens_name`, `max_tokens`: the limit of the answer as it was
    sent. `redact`: blanks the API key in the server's text.
    """

    where: str
    is_completion: bool = False
    max_tokens_name: str = "max_tokens"
    max_tokens: int | None = None
    redact: Callable[[str], str] = str


def _read_facts(where: str, body: _Body, redact: Callable[[str], str]) -> _RequestFacts:
    name = "max_tokens"
    if body.get("max_completion_tokens") is not None:
        name = "max_completion_tokens"  # chat prefers it

    number = re.fullmatch(r"-?\d+", str(body.get(name)))  # vLLM takes it as text too
    max_tokens = None if number is None else int(number.group())
    return _RequestFacts(where, "prompt" in body, name, max_tokens, redact)


def _build_redact(secret: str) -> Callable[[str], str]:
    r"""Return a function that blanks a secret in a text, in whatever spelling servers quote it.

    Those are JSON's (`\/`, `\u002f`), a URL's (`%2F`) and HTML's (`&amp;`).

    >>> _build_redact("sk/12345678")(r"bad key sk\/12345678")
    'bad key ***'
    """
    if len(secret) < MIN_SECRET_CHARS:
        return str

    spellings = []
    for char in secret:
        code = f"{ord(char):02x}"
        entities = f"{re.escape(html.escape(char))}|&#0*{ord(char)};|&#x0*{code};"
        spellings.append(rf"(?:\\*{re.escape(char)}|\\u00{code}|%{code}|{entities})")
    pattern = re.compile("".join(spellings), re.IGNORECASE)
    return functools.partial(pattern.sub, "***")


# ---- Transport: time and stopping -------------------------------------------
#
# requests' timeouts start anew at each byte, and it offers nothing to stop a call from outside.
# So each connection hands its socket to the attempt that uses it, and any thread can shut that
# socket: the caller's cancel(), or the client's watch thread when the attempt's time is up. The
# reading thread wakes, sees the reason, and alone closes the socket. Sockets stay as urllib3,
# gevent, truststore or a SOCKS proxy made them.
#
# Locks are reentrant and queues are SimpleQueues: a signal handler or the garbage collector may
# stop the very call it has interrupted.


class _Clock:
    """The time of one attempt, in seconds of time.monotonic(); the current time is an argument.

    `timeout` runs to the first output, `stream_idle_timeout` anew after each complete line, the
    deadline through everything. The time that a consumer takes between two reads counts for the
    deadline alone.

    >>> clock = _Clock(_Limits(timeout=5, stream_idle_timeout=2, deadline=60), 100.0, 160.0)
    >>> clock.due_at, clock.limit
    (105.0, 'timeout')
    >>> clock.note_line()
    >>> clock.begin_wait(110.0)
    >>> clock.due_at, clock.limit
    (112.0, 'stream_idle_timeout')
    """

    __slots__ = ("_deadline_at", "_has_new_line", "_limits", "_phase_ends_at", "due_at", "limit")

    def __init__(self, limits: _Limits, now: float, deadline_at: float) -> None:
        self._limits = limits
        self._deadline_at = deadline_at
        self.limit = "timeout"
        self.allow(now, limits.timeout)

    def allow(self, now: float, seconds: float) -> None:
        """Allow so many seconds from now on, whatever was left before."""
        self._has_new_line = False
        self._phase_ends_at = now + seconds
        self.due_at = min(self._phase_ends_at, self._deadline_at)

    def begin_wait(self, now: float) -> None:
        """Count from now on: the client waits for the server."""
        if self._has_new_line:
            self.limit = "stream_idle_timeout"
            self.allow(now, self._limits.stream_idle_timeout)
        else:
            self.due_at = min(self._phase_ends_at, self._deadline_at)

    def end_wait(self) -> None:
        """Count for the deadline alone: the client has received something."""
        self.due_at = self._deadline_at

    def note_line(self) -> None:
        """Start the idle timeout anew at the next wait: a complete line has arrived."""
        self._has_new_line = True


class _CallGroup:
    """Calls that can be stopped together: those begun inside its `with` block.

    That is in this context or in a copy of it (asyncio.to_thread, contextvars.copy_context),
    whichever client makes them. Groups nest. After stop(), a call that begins raises AbortError.
    """

    def __init__(self) -> None:
        self.calls: set[_Call] = set()
        self._is_stopped = False

    def __enter__(self) -> Self:
        self._token = _GROUPS.set((*_GROUPS.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _GROUPS.reset(self._token)

    def add(self, call: "_Call") -> None:
        self.calls.add(call)
        if self._is_stopped:
            call.stop()

    def stop(self) -> None:
        """Stop the calls in flight, and those that begin later; from any thread."""
        self._is_stopped = True
        for call in tuple(self.calls):
            call.stop()


_GROUPS: Final[contextvars.ContextVar[tuple[_CallGroup, ...]]] = contextvars.ContextVar(
    "vllm_provider_groups", default=()
)


def _new_id() -> str:
    import uuid  # which loads `platform` and a dozen patterns

    return str(uuid.uuid4())


@dataclass(eq=False)
class _Call:
    """One call, over all its attempts and auxiliary requests; any thread may stop it.

    `keeps_id`: a caller's own id is sent unchanged. `attempts`: the generation requests sent under
    it. `deadline_at`: of time.monotonic(). `replace(call)` goes on with these, not yet begun.
    """

    limits: _Limits
    request_id: str = field(default_factory=_new_id)
    keeps_id: bool = False
    attempts: int = 0
    deadline_at: float = math.inf
    started_at: float | None = field(default=None, init=False)
    finished_at: float | None = field(default=None, init=False)
    first_token_s: float | None = field(default=None, init=False)
    attempt: "_Attempt | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._is_stopped = False
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def begin(self) -> None:
        self.started_at = time.monotonic()
        self.deadline_at = min(self.deadline_at, self.started_at + self.limits.deadline)

    def end(self) -> None:
        self.finished_at = time.monotonic()
        if self.attempt is not None:  # and it stays: another thread may be in stop()
            self.attempt.release()

    def begin_attempt(self, attempt: "_Attempt") -> None:
        """Make this the attempt that stop() reaches, and let go of the one before."""
        if self.attempt is not None:
            self.attempt.release()
        self.attempt = attempt
        self.check()

    def stop(self) -> None:
        """Shut the socket in both directions, at once, from any thread or signal handler."""
        self._is_stopped = True
        self._wakeups.put(None)
        if self.attempt is not None:
            self.attempt.shut()

    def check(self) -> None:
        """Raise AbortError once the call was stopped."""
        if self._is_stopped:
            raise AbortError("the call was stopped by its caller")

    def pause(self, seconds: float) -> None:
        """Wait; raise AbortError as soon as the call is stopped."""
        with suppress(queue.Empty):
            self._wakeups.get(timeout=min(seconds, MAX_WAIT_S))
        self.check()

    def time_left_s(self) -> float:
        return self.deadline_at - time.monotonic()

    def elapsed_s(self) -> float | None:
        """Return the seconds since the call began, up to its end; None before it began."""
        if self.started_at is None:
            return None
        now = time.monotonic() if self.finished_at is None else self.finished_at
        return now - self.started_at

    def wire_id(self) -> str:
        """Return the id of this attempt: vLLM up to 0.13 fails on one it has seen."""
        return self.request_id if self.keeps_id else f"{self.request_id}-{self.attempts}"


class _Attempt:
    """One request of a call: its clock, its connection, its reply. Never used again.

    `connected`: it has a socket. `reused`: that socket served another request before. `received`: a
    byte of the reply has arrived. `expired`: its time was up, and the socket was shut.
    """

    response: requests.Response  # once its headers have arrived
    reply: Any = None  # the same, of http.client

    def __init__(self, call: _Call, watch: "_Watch", facts: _RequestFacts) -> None:
        self.call = call
        self.watch = watch
        self.facts = facts
        self.connected = False
        self.reused = False
        self.received = False
        self.expired = False
        self._connection: _Connection | None = None
        self._socket: socket.socket | None = None
        self._process = os.getpid()
        self.clock = _Clock(call.limits, time.monotonic(), call.deadline_at)

    def allow(self, seconds: float) -> None:
        """Allow so many seconds from now on, up to the deadline."""
        self.clock.allow(time.monotonic(), seconds)
        self.watch.notify(self.clock.due_at)

    def time_left_s(self) -> float:
        return self.clock.due_at - time.monotonic()

    def attach(self, connection: "_Connection", *, reused: bool) -> None:
        """Take over a connection: from here on, a stop reaches its socket."""
        with self.watch.lock:
            if connection.attempt is not None:  # a late stop of that call must not reach this one
                connection.attempt.release()  # pragma: no cover  # another thread's, just ended
            connection.attempt = self
            self._connection = connection
            # Under TLS to a proxy and TLS to the server, the socket is inside urllib3's transport.
            self._socket = getattr(connection.sock, "socket", connection.sock)
            self.connected = True
            self.reused = reused
            if self.expired:
                raise TimeoutError
        self.call.check()

    def release(self) -> None:
        """Let go of the connection, which may serve the next request."""
        if self._process != os.getpid():
            return  # the fork may have left the lock locked  # pragma: no cover  # in a child
        with self.watch.lock:
            if self._connection is not None:
                self._connection.attempt = None
                self._connection.used_at = time.monotonic()
            self._connection = None
            self._socket = None
        self.watch.attempts.discard(self)
        self.watch.notify(time.monotonic() + IDLE_REUSE_S)

    def shut(self) -> None:
        """Shut the socket in both directions, so that the reader wakes and vLLM stops."""
        if self._process != os.getpid():
            return  # a forked child shares the socket with its parent, who uses it

        with self.watch.lock, suppress(OSError):  # the other side may have been first
            if self._socket is not None:
                # SSLSocket.shutdown() would drop the TLS layer, and the reader get ciphertext.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def expire(self, now: float) -> None:
        """Shut the socket if the attempt's time is up."""
        with self.watch.lock:
            if now >= self.clock.due_at:
                self.expired = True
                self.shut()

    def read_piece(self) -> bytes:
        """Return the bytes of the reply that arrive next, b"" at its end.

        They come from http.client: urllib3's layer above it takes half the CPU of a token.
        """
        outer = sys.exception()
        self.clock.begin_wait(time.monotonic())
        self.watch.notify(self.clock.due_at)
        try:
            piece: bytes = self.reply.read1(READ_BYTES)
        except _IO_ERRORS as error:
            cause = _root_cause(error, outer)
            self._check_end(cause)
            reason = _reason(cause)
            if not isinstance(cause, OSError):  # in the framing of a chunk
                reason = "the connection was closed; look at the server's log"
            raise StreamError(f"the reply broke off: {self.facts.where}: {reason}") from cause

        self.clock.end_wait()
        if not piece:
            self._check_end(None)
        return piece

    def _check_end(self, error: BaseException | None) -> None:
        """Raise what ended the reply, if that was the caller, a signal handler or the clock."""
        self.call.check()
        if error is not None and _is_from_signal_handler(error):
            raise error
        if self.expired:
            raise self.timeout_error() from error

    def timeout_error(self) -> LLMTimeoutError:
        """Return the error for the limit that ran out."""
        limits = self.call.limits
        is_final = self.call.time_left_s() <= 0
        if is_final:
            happened = f"deadline of {limits.deadline:g} s reached"
            advice = "give the call more time"
        elif not self.connected and self.time_left_s() > POLL_S:
            happened = "no connection in time"
            advice = "is the host right, and does a firewall block it? (connect_timeout)"
        elif self.clock.limit == "timeout":
            happened = f"no reply within {limits.timeout:g} s"
            advice = "raise timeout, or ask for fewer tokens"
        else:
            happened = f"no data for {limits.stream_idle_timeout:g} s in the middle of a reply"
            advice = "raise stream_idle_timeout, or see if a proxy buffers"
        message = f"{happened}: {self.facts.where}; {advice}"
        return LLMTimeoutError(message, retryable=not is_final)


class _Watch:
    """A thread that shuts the attempts whose time is up, and closes connections idle too long.

    It starts with the first request and ends when there is nothing left to watch.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.attempts: set[_Attempt] = set()
        self.connections: set[_Connection] = set()  # the open ones
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wakes_at = math.inf
        self._is_running = False

    def add(self, attempt: _Attempt) -> None:
        with self.lock:
            self.attempts.add(attempt)
            if not self._is_running:
                self._start()
        self.notify(attempt.clock.due_at)

    def notify(self, due_at: float) -> None:
        """Wake the thread if something is due before it would look."""
        if due_at < self._wakes_at:
            self._wakeups.put(None)

    def close_connections(self, used_before: float = math.inf) -> None:
        """Close the connections that no attempt uses and that were last used before a time."""
        for connection in tuple(self.connections):
            with self.lock:
                if connection.attempt is None and connection.used_at <= used_before:
                    connection.close()

    def _start(self) -> None:
        # A weak reference: the thread keeps no client alive.
        arguments = (weakref.ref(self), self._wakeups)
        thread = threading.Thread(target=_run_watch, args=arguments, daemon=True)
        thread.name = "vllm_provider watch"
        with suppress(RuntimeError):  # at the exit of the interpreter no thread can start
            thread.start()
            self._is_running = True
            weakref.finalize(self, self._wakeups.put, None).atexit = False

    def end_due(self) -> float | None:
        """End what is due; return the seconds until the next is, None with nothing to watch."""
        self._wakes_at = math.inf  # until it is known, whoever has something due says so
        now = time.monotonic()
        for attempt in tuple(self.attempts):
            attempt.expire(now)
        self.close_connections(now - IDLE_REUSE_S)

        with self.lock:
            if not self.attempts and not self.connections:
                self._is_running = False
                return None
            self._wakes_at = min(self._list_due(), default=math.inf)
        return max(0.0, self._wakes_at - now)

    def _list_due(self) -> Iterator[float]:
        for attempt in tuple(self.attempts):
            if not attempt.expired:
                yield attempt.clock.due_at
        for connection in tuple(self.connections):
            if connection.attempt is None:
                yield connection.used_at + IDLE_REUSE_S


def _run_watch(reference: "weakref.ref[_Watch]", wakeups: "queue.SimpleQueue[None]") -> None:
    while (watch := reference()) is not None:
        wait_s = watch.end_due()
        if wait_s is None:
            return
        del watch
        with suppress(queue.Empty):
            wakeups.get(timeout=min(wait_s, MAX_WAIT_S))


# ---- Transport: connections -------------------------------------------------

_CURRENT_ATTEMPT: Final[contextvars.ContextVar[_Attempt]] = contextvars.ContextVar(
    "vllm_provider_attempt"  # how a pooled connection finds the attempt that uses it
)


class _Response(http.client.HTTPResponse):
    """A reply that passes over informational ones; http.client knows 100 alone (RFC 9110, 15.2)."""

    def begin(self) -> None:
        attempt = _CURRENT_ATTEMPT.get()
        attempt.reply = self
        if self.headers is None and self.fp.peek(1):
            attempt.received = True
        super().begin()

        while 100 <= self.status < 200:
            self.headers = self.msg = None  # type: ignore[assignment]  # begin() starts anew
            super().begin()


class _Connection(urllib3.connection.HTTPConnection):
    """A connection that hands its socket to the current attempt, also when it is used again."""

    response_class = _Response
    attempt: _Attempt | None = None
    used_at = math.inf  # when it last served a request
    _watch: _Watch | None = None

    @property
    def is_connected(self) -> bool:
        """Return whether urllib3 may use this pooled connection again; if not, it reconnects."""
        return time.monotonic() - self.used_at < IDLE_REUSE_S and super().is_connected

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(None)  # from here on the watch keeps the time
        attempt = _CURRENT_ATTEMPT.get()
        self._watch = attempt.watch
        self._watch.connections.add(self)
        attempt.attach(self, reused=False)

    def request(self, *args: Any, **options: Any) -> None:
        attempt = _CURRENT_ATTEMPT.get()
        with attempt.watch.lock:  # until now the watch may have closed it
            if self.sock is not None and not attempt.connected:
                attempt.attach(self, reused=True)
        super().request(*args, **options)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.connections.discard(self)
        super().close()


class _Adapter(HTTPAdapter):
    """requests' adapter, whose connections hand their sockets over, whatever kind they are."""

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        kind = pool.ConnectionCls
        if not issubclass(kind, _Connection):
            pool.ConnectionCls = type("_Connection", (_Connection, kind), {})
        return pool


class _Session(requests.Session):
    """A session that follows no redirect: it would carry the prompt to another place."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _Network:
    """What a forked process must not share with its parent: session, watch, calls in flight."""

    def __init__(self, config: VLLMConfig) -> None:
        self.watch = _Watch()
        self.calls = _CallGroup()
        self.session = _Session()
        url = config.base_url
        maximum = CONNECTIONS_PER_CALL * config.max_concurrency
        self.session.mount(url.partition("//")[0] + "//", _Adapter(pool_maxsize=maximum))

        # Proxies, CA bundle and headers are worked out once: half the CPU of a small call.
        environment = self.session.merge_environment_settings(url, {}, True, config.verify, None)
        self.settings: dict[str, Any] = {**environment, "allow_redirects": False}
        if re.fullmatch(r"localhost|127(\.\d+){3}|::1", urlsplit(url).hostname or ""):
            self.settings["proxies"] = {}

        headers = {
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": f"vllm_provider/{__version__}",
        }
        if config.api_key != "EMPTY":
            headers["Authorization"] = f"Bearer {config.api_key}"
        # Not Session.prepare_request(): it puts a .netrc entry in the place of our key.
        self.template = requests.Request(
            "POST", url, {**headers, **config.default_headers}
        ).prepare()


class _Transport:
    """Sends requests, and reads replies as bytes. May be shared between threads."""

    def __init__(self, config: VLLMConfig) -> None:
        self._config = config
        self._networks: dict[int, _Network] = {}

    def _network(self) -> _Network:
        """Return this process's own network; without a lock, which a fork could leave locked."""
        process = os.getpid()
        if process not in self._networks:
            self._networks.setdefault(process, _Network(self._config))
        return self._networks[process]

    def close(self) -> None:
        """Stop the calls in flight and close all connections; a later call opens new ones."""
        network = self._networks.pop(os.getpid(), None)
        if network is not None:
            network.calls.stop()
            network.session.close()
            network.watch.close_connections()  # the pools would leave that to the collector

    @contextmanager
    def call(self, call: _Call) -> Iterator[_Call]:
        """Keep a call among those in flight; stop it at once when it ends by an exception."""
        groups = (self._network().calls, *_GROUPS.get())
        call.begin()
        for group in groups:
            group.add(call)

        try:
            yield call
        except BaseException as error:
            call.stop()
            if isinstance(error, VLLMError):
                error.request_id = call.request_id
            raise
        finally:
            call.end()
            for group in groups:
                group.calls.discard(call)

    def send(self, call: _Call, facts: _RequestFacts, body: bytes | None) -> _Attempt:
        """Return one attempt with its reply, whatever its status, once the headers have arrived.

        Raises NetworkError, LLMTimeoutError, AbortError, ProtocolError, or ConfigurationError for
        what requests will not send.
        """
        network = self._network()
        attempt = _Attempt(call, network.watch, facts)
        call.begin_attempt(attempt)

        size = len(body or b"")
        request = network.template.copy()
        request.method, request.url = facts.where.split(" ", 1)
        request.body = body
        request.headers["Content-Length"] = str(size)
        request.headers.setdefault("X-Request-Id", call.wire_id())
        logger.debug("%s, %d bytes, request %s", facts.where, size, call.wire_id())

        network.watch.add(attempt)
        attempt.response = self._exchange(network, attempt, request)
        if attempt.reply is None:  # another library answers in the network's place, as in tests
            attempt.reply = attempt.response.raw
        status = attempt.response.status_code
        logger.debug("%s: %d, request %s", facts.where, status, call.wire_id())
        return attempt

    def _exchange(
        self, network: _Network, attempt: _Attempt, request: requests.PreparedRequest
    ) -> requests.Response:
        """Return the reply to a request; translate what requests and urllib3 raise."""
        connect_s = min(self._config.connect_timeout, attempt.time_left_s(), MAX_WAIT_S)
        timeout = (max(0.001, connect_s), None)

        outer = sys.exception()
        token = _CURRENT_ATTEMPT.set(attempt)
        try:
            return network.session.send(request, timeout=timeout, **network.settings)
        except _IO_ERRORS as error:
            failure, cause = error, _root_cause(error, outer)
        finally:
            _CURRENT_ATTEMPT.reset(token)

        # A stopped call looks exactly like a stale connection: first see if it was stopped.
        attempt.call.check()
        if _is_from_signal_handler(cause):
            raise cause
        is_timeout = isinstance(failure, requests.Timeout) or isinstance(cause, TimeoutError)
        if attempt.expired or (is_timeout and not attempt.connected):
            raise attempt.timeout_error() from cause
        raise _to_network_error(failure, cause, attempt) from cause

    def read(self, attempt: _Attempt, maximum: float = math.inf) -> Generator[bytes, None, None]:
        """Yield the reply's bytes as they arrive.

        Read to its end, the connection can be used again; left earlier, it is closed. `maximum`:
        in bytes. Raises StreamError, LLMTimeoutError, ProtocolError or AbortError.
        """
        where = attempt.facts.where
        size = 0
        try:
            announced = _read_length(attempt)
            if announced > maximum:
                raise ProtocolError(f"the reply is larger than {maximum} bytes: {where}")

            while piece := attempt.read_piece():
                size += len(piece)
                if size > maximum:
                    raise ProtocolError(f"the reply is larger than {maximum} bytes: {where}")
                yield piece

            if size < announced:
                raise StreamError(f"the reply broke off: {where}: {size} of {announced} bytes came")
            if size == 0 and _has_cut_headers(attempt.reply):
                raise NetworkError(f"closed in the headers of a reply: {where}")
            attempt.reply.close()
            attempt.release()
            attempt.response.raw.release_conn()
        finally:
            attempt.response.close()
            attempt.release()


_IO_ERRORS: Final = (
    requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError,
    ValueError,
)  # fmt: skip


def _read_length(attempt: _Attempt) -> int:
    """Return the size that a reply announces, 0 for none; raise ProtocolError if it is encoded."""
    headers = attempt.response.headers
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ProtocolError(
            f"the reply is encoded as {encoding!r}, which was not requested: {attempt.facts.where}"
        )

    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else 0


def _has_cut_headers(reply: Any) -> bool:
    """Return whether an empty reply ended in its headers: http.client takes that for their end.

    A whole reply of HTTP/1.1 says how long it is, or that the connection will be closed.
    """
    return (
        getattr(reply, "will_close", False)
        and reply.version == 11
        and not reply.getheader("Connection")
    )


def _root_cause(error: BaseException, outer: BaseException | None) -> BaseException:
    """Return the innermost exception: requests and urllib3 wrap an OSError three deep.

    `outer`: what the caller was handling when the call began; it is no cause of ours.
    """
    while True:
        inner = error.__cause__ or error.__context__
        if inner is None or inner is outer:
            return error
        error = inner


def _is_from_signal_handler(error: BaseException) -> bool:
    """Return whether a signal handler of the host raised an error in the middle of our read."""
    handlers = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, functools.partial):
            handler = handler.func
        call = handler if hasattr(handler, "__code__") else type(handler).__call__
        handlers.add(getattr(call, "__code__", None))
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code in handlers for frame, _line in frames)


def _reason(cause: BaseException) -> str:
    return str(getattr(cause, "strerror", None) or cause).lower()


def _to_network_error(error: Exception, cause: BaseException, attempt: _Attempt) -> VLLMError:
    """Return our error for one raised before there was a reply; most specific first."""
    where = attempt.facts.where
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(where.split()[1]))
    failed = f"no connection to {origin}"

    if attempt.received:
        return _to_reply_error(cause, where)
    if isinstance(cause, ssl.SSLError):
        return _to_tls_error(cause, failed, origin)
    if isinstance(cause, socket.gaierror):
        message = f"{failed}: unknown host; is base_url spelled right?"
        return NetworkError(message, retryable=False)
    if isinstance(error, requests.exceptions.ProxyError):
        return NetworkError(f"{failed}: its proxy failed ({cause}); check HTTPS_PROXY and NO_PROXY")
    if isinstance(error, ValueError):  # the parent of what requests and urllib3 will not send
        return ConfigurationError(f"requests will not send {where}: {error}")
    if "CA certificate bundle" in str(cause):
        return ConfigurationError(f"{cause}; set verify or REQUESTS_CA_BUNDLE to one that exists")
    if attempt.connected:
        advice = "is vLLM still running, and is it http there?"
        return NetworkError(f"closed before a reply: {where} ({cause}); {advice}")
    return NetworkError(f"{failed}: {_reason(cause)}; is vLLM running? (curl {origin}/health)")


def _to_reply_error(cause: BaseException, where: str) -> VLLMError:
    """Return the error for a reply that is no HTTP, or that ended within its first line."""
    line = str(getattr(cause, "line", "\n"))
    if isinstance(cause, OSError) or not line.endswith("\n"):
        return NetworkError(f"closed in the first line of a reply: {where} ({_quoted(str(cause))})")
    return ProtocolError(
        f"not an HTTP reply: {where}: {_quoted(str(cause))}; is it vLLM's port, and http there?"
    )


def _to_tls_error(cause: ssl.SSLError, failed: str, origin: str) -> NetworkError:
    """Return the error for a TLS handshake that failed, with the advice that fits."""
    if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        advice = "is it starting or stopping?"
        return NetworkError(f"{failed}: the server closed the TLS handshake; {advice}")

    reason = str(cause.reason or cause)
    advice = f"does {origin} speak https?"
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message
        advice = "set verify to the CA bundle that signed the server's certificate"
        if "expired" in reason:
            advice = "the server's certificate must be renewed (or this machine's clock set)"
        elif "mismatch" in reason:  # of a host name or an IP address
            advice = "set base_url to a name in the server's certificate"
    return NetworkError(f"{failed}: TLS failed ({reason}); {advice}", retryable=False)


def _is_stale(error: VLLMError, attempt: _Attempt) -> bool:
    """Return whether the server had closed an idle connection before the request came."""
    return isinstance(error, NetworkError) and attempt.reused and not attempt.received


def _is_unstarted(error: VLLMError, attempt: _Attempt) -> bool:
    """Return whether a request may be sent again: it has not started, or a gateway refused it."""
    if isinstance(error, NetworkError):
        return error.retryable and not attempt.connected
    if isinstance(error, ProviderUnavailableError) and error.status_code in (403, 404, 425):
        return True  # the page of a gateway whose server is starting
    return error.status_code in RETRIED_STATUS


def _retry_pause_s(config: VLLMConfig, error: VLLMError, attempt: int, time_left_s: float) -> float:
    """Return the pause in seconds before retry number `attempt` (the first is 1).

    Between d/2 and d, where d doubles from min_retry_delay to max_retry_delay. It comes on top of
    the server's Retry-After, so that not all clients return at the same instant. Raises the error
    where Retry-After is above max_retry_delay, LLMTimeoutError where the deadline comes first.
    """
    retry_after_s = error.retry_after or 0.0
    if retry_after_s > config.max_retry_delay:
        raise error

    doubled = config.min_retry_delay * 2.0 ** min(attempt - 1, 60)
    delay_s = min(config.max_retry_delay, doubled)
    pause_s = retry_after_s + random.uniform(delay_s / 2, delay_s)
    if pause_s < time_left_s:
        return pause_s
    message = f"the deadline leaves no time to try again: {error}"
    raise LLMTimeoutError(message, retryable=False, status_code=error.status_code) from error


# ---- Stream decoder (pure) --------------------------------------------------

_END_OF_STREAM: Final = "[DONE]"


class _SSEDecoder:
    r"""Turns bytes, cut anywhere, into the data of server-sent events (HTML standard, 9.2.6).

    Splits at LF, CRLF and CR only: str.splitlines() would also split at U+2028, which vLLM sends
    raw inside JSON.

    >>> decoder = _SSEDecoder()
    >>> decoder.feed(b"data: [DO"), decoder.feed(b"NE]\n\n")
    ([], ['[DONE]'])
    """

    def __init__(self) -> None:
        self._byte_order_mark = b"\xef\xbb\xbf"  # b"" after the first line
        self._pieces: list[bytes] = []  # of a line that has not ended
        self._piece_bytes = 0
        self._data: list[bytes] = []  # the data lines of an event that has not ended
        self._data_bytes = 0
        self._after_cr = False
        self._is_between = False  # two events, with nothing pending

    def feed(self, raw: bytes) -> list[str]:
        """Return the data of the events that `raw` completes.

        Raises ProtocolError for an event over MAX_EVENT_BYTES.
        """
        if (
            self._is_between
            and raw.startswith(b"data: {")
            and raw.find(b"\n") == len(raw) - 2
            and raw.endswith(b"\n\n")
            and b"\r" not in raw
        ):
            return [raw[6:-2].decode("utf-8", "replace")]  # one event, as vLLM sends them: faster
        if not raw:
            return []

        text = raw.removeprefix(b"\n") if self._after_cr else raw  # the CR has ended that line
        self._after_cr = raw.endswith(b"\r")
        lines = (text + b"|").splitlines()  # with a last line that has not ended
        rest = lines.pop()[:-1]
        events = self._read_lines(lines)

        self._pieces.append(rest)
        self._piece_bytes += len(rest)
        if self._piece_bytes + self._data_bytes > MAX_EVENT_BYTES:
            raise ProtocolError(f"an event of the stream is larger than {MAX_EVENT_BYTES} bytes")
        self._is_between = not (self._piece_bytes or self._data or self._after_cr)
        return events

    def finish(self) -> list[str]:
        """Return what the end of the connection completes: [DONE] counts without its blank line."""
        return [_END_OF_STREAM] if _END_OF_STREAM in self.feed(b"\n\n") else []

    def _read_lines(self, lines: list[bytes]) -> list[str]:
        """Return the data of the events that these lines complete; the first ends `_pieces`."""
        if not lines:
            return []

        first = b"".join((*self._pieces, lines[0]))
        lines[0] = first.removeprefix(self._byte_order_mark)
        self._byte_order_mark = b""
        self._pieces = []
        self._piece_bytes = 0

        events = []
        for line in lines:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._data_bytes += len(line)
            elif not line:
                data = b"\n".join(self._data).decode("utf-8", "replace")
                self._data = []
                self._data_bytes = 0
                if data:
                    events.append(data)
        return events


# ---- Replies: errors (pure) -------------------------------------------------

# What vLLM says when a prompt (p tokens) or max_tokens (o) does not fit a context of M, always
# with status 400, in the versions given. N is M, but M - o (maybe negative) from completions.
# "at least": the server stopped counting, so p is a lower bound.
_NUMBERS: Final = {name: rf"(?P<{name}>-?\d+)" for name in ("M", "N", "p", "o", "left")}
_OVERFLOW_TEXTS: Final = [
    re.compile(text.format_map(_NUMBERS))
    for text in (
        r"tokens' is too large: {o}.*length is {M} tokens and your request has {p}",  # 0.10.1-0.17
        r"max_(?:completion_)?tokens={o} ?cannot be greater than [a-z_=]+{M}",  # 0.16-
        r"'max_tokens' \({o}\) cannot be greater than .*length \({M}\)",  # 0.10.1-0.15
        r"max_tokens must be at least 1, got {left}",  # 0.10.1-, M - p
        r"length is {M} tokens\. However, you requested \d+ tokens \({p} in the messages",  # 0.10.0
        r"length is {M} tokens\. However, you requested {p} tokens in the messages",  # 0.10.0
        r"length is {N} tokens\. However, your request has {p} input tokens",  # 0.10.1-0.15
        r"You passed {p} input tokens .*length is only {M} tokens",  # 0.16-0.17
        r"length is {M} tokens\. However, .*prompt contains (?:at least )?{p} input",  # 0.18-
        r"Input length \({p}\) exceeds model's maximum context length \({M}\)",  # 0.18-
        r"prompt \(length {p}\) .*maximum model length of {M}",  # all
        r"context length is only {M}",  # 0.16-0.17, for a prompt counted in characters
        r"maximum (?:context|model) length(?: is {M})?",  # 0.18- in characters, gateways
    )
]

_NAN: Final = "Out of range float values are not JSON compliant"
_ADVICE_BY_TEXT: Final = {
    "tool-call-parser": (
        "start vLLM with --enable-auto-tool-choice --tool-call-parser NAME, or send no tools"
    ),
    "--trust-request-chat-template": "start vLLM with that flag, or send no chat_template",
    "must provide a chat template": (
        "this model has no chat template: use complete(), or start vLLM with --chat-template FILE"
    ),
    "EngineCore": "the engine has died: look at the server's log and start it again",
    "greater than max allowed": "ask for fewer, or start vLLM with --max-logprobs N",
    _NAN: "the model computed NaN: try without logprobs, or another --dtype",
}
_ADVICE_BY_STATUS: Final[Mapping[int, str]] = {
    401: "set api_key or VLLM_API_KEY to the key the server was started with",
    403: "the key may not do this, or a gateway hides the path",
    404: BASE_URL_ADVICE,
    405: BASE_URL_ADVICE,
    413: "a proxy limits the size of a request",
    502: "the gateway got no reply from vLLM: is it running?",
    503: "the server is busy or starting: try again later",
    504: "a proxy gave up waiting; vLLM may still be at work",
}
_RETRYABLE_BY_STATUS: Final = {408: True, 425: True, 501: False}  # others: by the error's class


class _Overflow(NamedTuple):
    """What an error says about lengths, in tokens; None where it does not say.

    `is_lower_bound`: the prompt has `input_tokens` or more. `is_output_alone`: max_tokens by
    itself is larger than the context, whatever the prompt.
    """

    context_length: int | None
    input_tokens: int | None
    is_lower_bound: bool = False
    is_output_alone: bool = False

    def is_prompt_too_long(self) -> bool:
        """Return whether no max_tokens, however small, would help."""
        if self.context_length is None or self.input_tokens is None:
            return not self.is_output_alone
        return self.input_tokens >= self.context_length

    def available_tokens(self) -> int:
        """Return the largest max_tokens that may fit.

        Where the prompt's length is unknown, that is the whole context: 0.32 takes it, and other
        versions then say the prompt's length.
        """
        return (self.context_length or 0) - (self.input_tokens or 0)


def _read_overflow(
    message: str, facts: _RequestFacts, context_length: int | None = None
) -> _Overflow | None:
    """Return what an error says about lengths, None if it is about something else.

    `context_length`: the model's where it is known, for texts that leave it out.

    >>> facts = _RequestFacts("POST /v1/completions", is_completion=True, max_tokens=4000)
    >>> text = "maximum context length is -1952 tokens. However, your request has 5 input tokens."
    >>> _read_overflow(text, facts)
    _Overflow(context_length=2048, input_tokens=5, is_lower_bound=False, is_output_alone=False)
    """
    match = next(filter(None, (text.search(message) for text in _OVERFLOW_TEXTS)), None)
    if match is None:
        return None

    numbers = {name: int(text) for name, text in match.groupdict().items() if text}
    sent = SERVER_MAX_TOKENS if facts.max_tokens is None else facts.max_tokens

    context_length = numbers.get("M", context_length)
    input_tokens = numbers.get("p")
    if "N" in numbers:
        context_length = numbers["N"] + sent * facts.is_completion
    if "left" in numbers and sent <= 0:
        return None  # that number is the caller's own
    if "left" in numbers and context_length is not None:
        input_tokens = context_length - numbers["left"]

    is_lower_bound = f"at least {input_tokens} input" in message
    return _Overflow(context_length, input_tokens, is_lower_bound, "o" in numbers)


def _lower_max_tokens(
    body: dict[str, Any], facts: _RequestFacts, overflow: _Overflow
) -> dict[str, Any] | None:
    """Return the body with the max_tokens that fits, None where there is none to lower."""
    available = overflow.available_tokens()
    if facts.max_tokens is None or not 0 < available < facts.max_tokens:
        return None
    return {**body, facts.max_tokens_name: available}


def _overflow_error(
    overflow: _Overflow, facts: _RequestFacts, message: str = "", status: int | None = None
) -> ContextLengthError:
    bound = "at least " if overflow.is_lower_bound else ""
    count = f"{bound}{overflow.input_tokens} tokens"
    if overflow.input_tokens is None:
        count = "it has too many tokens"

    size = overflow.context_length or "unknown size"
    error = ContextLengthError(
        f"the prompt does not fit: {count} for a context of {size}: {facts.where}; shorten it",
        status_code=status,
    )
    error.limit = overflow.context_length
    error.input_tokens = overflow.input_tokens
    error.server_message = message
    return error


def _error_message(payload: object) -> tuple[str, int | None]:
    """Return the text and the code of an error in any of the shapes servers and gateways send.

    >>> _error_message({"error": {"message": "no such model", "code": 404}})
    ('no such model', 404)
    >>> _error_message({"detail": "Not Found"})
    ('Not Found', None)
    """
    error = payload
    if isinstance(error, Mapping):
        error = error.get("error") or error.get("detail") or error
    if isinstance(error, Mapping):
        error = error.get("error") or error  # some gateways wrap it twice

    code = None
    if isinstance(error, Mapping):
        code = error.get("code")
        error = error.get("message", error)
    if not error:
        error = ""
    elif not isinstance(error, str):
        error = json.dumps(error)
    is_status = isinstance(code, int) and 400 <= code <= 599
    return error, code if is_status else None


def _error_from_payload(payload: Mapping[str, Any], facts: _RequestFacts) -> StatusError:
    """Return the error inside a reply with status 200."""
    message, code = _error_message(payload)
    if "EngineCore" in message:  # up to vLLM 0.14 the code inside a stream is 400 for everything
        code = 500
    return _status_error(code or 500, message, {}, facts)


def _error_from_reply(
    status: int, headers: Mapping[str, str], raw: bytes, facts: _RequestFacts
) -> StatusError:
    if 300 <= status < 400:
        return _redirect_error(status, headers.get("Location", ""), facts)

    message = raw.decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):
        message, _code = _error_message(json.loads(message))
    return _status_error(status, message, headers, facts)


def _redirect_error(status: int, location: str, facts: _RequestFacts) -> StatusError:
    """Return the error for a redirect, with the base_url to use where that is clear."""
    url = facts.where.split(" ", 1)[1]
    location = facts.redact(location)
    message = (
        f"{facts.where} is redirected to {_quoted(location)}, which is not followed: the prompt"
        " would go to another place"
    )

    path = re.search(r"(/v1/[a-z/]+|/\w+)$", url)
    target = re.split(r"[?#]", location)[0].rstrip("/")
    if path is not None and target.endswith(path.group()):
        base_url = target.removesuffix(path.group())
        if "//" not in base_url:
            base_url = "{0.scheme}://{0.netloc}".format(urlsplit(url)) + base_url
        message += f"; set base_url to {_quoted(base_url)}"
    return StatusError(message, status_code=status)


def _status_error(
    status: int, message: str, headers: Mapping[str, str], facts: _RequestFacts
) -> StatusError:
    message = facts.redact(message)
    overflow = _read_overflow(message, facts) if status < 500 else None
    if overflow is not None and overflow.is_prompt_too_long():
        return _overflow_error(overflow, facts, message, status)

    default = ProviderUnavailableError if status >= 500 else StatusError
    kind = _STATUS_ERRORS.get(status, default)
    advice = _find_advice(status, message)
    retryable = _RETRYABLE_BY_STATUS.get(status)

    # The text is more precise than the status.
    if _NAN in message:
        kind = ProviderUnavailableError
        retryable = False
    elif _is_starting_page(status, message):
        kind = ProviderUnavailableError
        advice = "a gateway is in front of the server, which may be starting: try again later"

    shown = _quoted(_shorten(message)) if message.strip() else "(no message)"
    error = kind(
        "; ".join(filter(None, (f"{status} {shown}: {facts.where}", advice))),
        status_code=status,
        retryable=retryable,
        retry_after=_parse_retry_after(headers.get("Retry-After")),
    )
    error.server_message = message
    return error


def _find_advice(status: int, message: str) -> str:
    for text, advice in _ADVICE_BY_TEXT.items():
        if text in message:
            return advice
    return _ADVICE_BY_STATUS.get(status, "")


def _is_starting_page(status: int, message: str) -> bool:
    """Return whether a gateway's page says that a server starts, or checks the browser."""
    page = message.lstrip().lower()
    if not page.startswith("<"):
        return False
    texts = {403: ("cloudflare",), 404: STARTING_PAGES, 425: STARTING_PAGES}.get(status, ())
    return any(text in page for text in texts)


def _shorten(message: str) -> str:
    """Return a server's text without the prompt, which a validation error quotes; HTML's title."""
    title = re.search(r"<title[^>]*>(.*?)</title>", message[:READ_BYTES], re.IGNORECASE | re.DOTALL)
    if title is not None:
        return html.unescape(title.group(1))

    found = re.search(r"""["']input["']\s*:""", message)
    return message if found is None else message[: found.start()] + "…"


def _parse_retry_after(value: str | None) -> float | None:
    """Return the seconds a Retry-After header asks to wait (RFC 9110: seconds, or a date).

    >>> _parse_retry_after("7"), _parse_retry_after("soon")
    (7.0, None)
    """
    if not value:
        return None
    with suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with suppress(ValueError, TypeError, OverflowError):
        date = email.utils.parsedate_to_datetime(value)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    return None


# ---- Replies (pure) ---------------------------------------------------------

_JSON: Final = json.JSONDecoder()
_Splitter = Any  # a _ThinkSplitter or a _HarmonySplitter


def parse_completion_response(payload: Mapping[str, Any]) -> Completion:
    """Return the Completion in a decoded reply of `/v1/completions`.

    Raises the error in the payload (vLLM 0.10-0.17 send some with HTTP status 200), or
    ProtocolError.

    >>> reply = {"id": "cmpl-1", "choices": [{"index": 0, "text": " Paris.", "logprobs": None}]}
    >>> parse_completion_response(reply).text
    ' Paris.'
    """
    if not isinstance(payload, Mapping):
        raise ProtocolError(f"a reply is a JSON object, got a {type(payload).__name__}")

    builder = _ResponseBuilder(_RequestFacts("in the reply"), _Expected())
    builder.add_whole(payload)
    return builder.completion()


def parse_chat_response(payload: Mapping[str, Any]) -> Completion:
    """Return the Completion in a decoded reply of `/v1/chat/completions`.

    Errors as in parse_completion_response.

    >>> message = {"content": "Hi", "reasoning_content": "A greeting."}
    >>> parse_chat_response({"choices": [{"message": message}]}).reasoning
    'A greeting.'
    """
    return parse_completion_response(payload)


def _decode_json(text: str, facts: _RequestFacts, kind: type = dict) -> Any:
    """Return the one JSON value in a text; raise ProtocolError for anything else."""
    text = text.strip()
    try:
        value, end = _JSON.raw_decode(text)  # half the cost of json.loads()
        if end == len(text) and isinstance(value, kind):
            return value
        raise ValueError("more than one JSON value, or one of another type")
    except (ValueError, RecursionError) as error:
        raise _not_json(text, facts) from error


def _not_json(text: str, facts: _RequestFacts) -> ProtocolError:
    shown = _quoted(facts.redact(_shorten(text)))
    return ProtocolError(f"not the JSON vLLM sends: {facts.where}: {shown}; {BASE_URL_ADVICE}")


class _Expected(NamedTuple):
    """What a builder needs to know of the request.

    `top`, `prompt_top`: how many alternatives a token has at most, None for all that come.
    `new_splitter`: makes what splits reasoning off the text of each choice, None for no split.
    """

    top: int | None = None
    prompt_top: int | None = None
    new_splitter: Callable[[], _Splitter] | None = None


def _read_expected(body: _Body, new_splitter: Callable[[], _Splitter] | None = None) -> _Expected:
    name = "top_logprobs" if "messages" in body else "logprobs"
    top = _to_top(body.get(name))
    prompt_top = _to_top(body.get("prompt_logprobs", top))  # `echo` takes the other number
    if body.get("logprob_token_ids"):  # those come on top of the number
        top = None
    return _Expected(top, prompt_top, new_splitter)


def _to_top(value: Any) -> int | None:
    """Return a number of alternatives; None for -1 (all) and for what is no number."""
    with suppress(TypeError):
        return value if value >= 0 else None
    return None


def _new_text() -> io.StringIO:
    """Return a buffer for text that costs its characters, not an object for each token."""
    text = io.StringIO()
    text.readline()  # Python 3.11 would otherwise collect 100,000 pieces first
    return text


class _ToolCallBuilder:
    def __init__(self) -> None:
        self.id = ""
        self.name = ""
        self.arguments = _new_text()

    def add(self, call_id: str, name: str, arguments: str) -> ToolCall:
        """Add a piece; return it with the id and the name of the whole call."""
        self.id = self.id or call_id
        self.name = self.name or name
        self.arguments.write(arguments)
        return ToolCall(self.id, self.name, arguments)

    def build(self) -> ToolCall:
        return ToolCall(self.id, self.name, self.arguments.getvalue())


class _ChoiceBuilder:
    def __init__(self, index: int, expected: _Expected) -> None:
        self._index = index
        self._expected = expected
        self._splitter = None if expected.new_splitter is None else expected.new_splitter()
        self._text = _new_text()
        self._reasoning = _new_text()
        self._calls: list[_ToolCallBuilder] = []
        self._call_at: dict[int, _ToolCallBuilder] = {}  # the last one begun at each index
        self._logprobs: list[TokenLogprob] = []
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None
        self._stop_reason: str | int | None = None
        self._prompt: dict[str, Any] = {}

    def add(self, choice: Mapping[str, Any]) -> Delta | None:
        """Add a choice of a payload; return what is new in it, None for nothing."""
        part = choice.get("delta") or choice.get("message") or choice
        text = part.get("content") or part.get("text") or ""
        # Up to 0.11.0 reasoning_content, from 0.16 reasoning, in between both, with one value.
        reasoning = part.get("reasoning") or part.get("reasoning_content") or ""
        pieces = part.get("tool_calls")
        finish_reason = choice.get("finish_reason")

        if self._splitter is not None:
            is_last = finish_reason is not None
            text, reasoning, pieces = self._splitter.feed(text, is_last=is_last)
        self._text.write(text)
        if reasoning:
            self._reasoning.write(reasoning)
        calls = self._add_calls(pieces) if pieces else ()

        token_ids: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprob, ...] = ()
        if choice.get("token_ids"):
            token_ids = tuple(choice["token_ids"])
            self._token_ids += token_ids
        if choice.get("logprobs"):
            logprobs = self._add_logprobs(choice, token_ids)
        if _has_prompt(choice):
            self._prompt = _parse_prompt(choice, self._expected.prompt_top)

        if finish_reason is not None:
            self._finish_reason = finish_reason
            self._stop_reason = choice.get("stop_reason")
        elif not (text or reasoning or calls or logprobs or token_ids):
            return None
        return Delta(
            self._index, text, reasoning, calls, logprobs, token_ids,
            self._finish_reason, self._stop_reason,
        )  # fmt: skip

    def _add_logprobs(
        self, choice: Mapping[str, Any], token_ids: tuple[int, ...]
    ) -> tuple[TokenLogprob, ...]:
        prompt_ids = choice.get("prompt_token_ids") or ()
        logprobs = _parse_logprobs(choice["logprobs"], token_ids, prompt_ids, self._expected.top)
        self._logprobs += logprobs
        return logprobs

    def _add_calls(self, pieces: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
        """Add pieces of tool calls, each to the call last begun at its index.

        Another id begins another call, since some parsers put every call at index 0.
        """
        added = []
        for position, piece in enumerate(pieces):
            index = piece.get("index", position)
            function = piece.get("function") or {}
            call_id = piece.get("id") or ""
            name = function.get("name") or ""
            arguments = function.get("arguments")
            if isinstance(arguments, dict):  # as some gateways send them
                arguments = json.dumps(arguments)

            call = self._call_at.get(index)
            if call is None or (call_id and call.id and call_id != call.id):
                call = _ToolCallBuilder()
                self._call_at[index] = call
                self._calls.append(call)
            added.append(call.add(call_id, name, arguments or ""))
        return tuple(added)

    def build(self, prompt: dict[str, Any]) -> Choice:
        """Return the choice as far as it has arrived.

        `prompt`: what the reply says of the prompt for all choices.
        """
        text = self._text.getvalue()
        reasoning = self._reasoning.getvalue()
        if self._splitter is not None:  # what it holds back is text after all
            more_text, more_reasoning, _ = copy.copy(self._splitter).feed("", is_last=True)
            text += more_text
            reasoning += more_reasoning

        return Choice(
            self._index,
            text,
            reasoning,
            tuple(map(_ToolCallBuilder.build, self._calls)),
            tuple(self._logprobs),
            tuple(self._token_ids),
            self._finish_reason,
            self._stop_reason,
            **(prompt | self._prompt),
        )


def _has_prompt(payload: Mapping[str, Any]) -> bool:
    """Return whether a choice or a whole payload says anything about the prompt."""
    return bool(payload.get("prompt_logprobs") or payload.get("prompt_token_ids"))


class _ResponseBuilder:
    """A reply while it grows: a plain call adds one payload, a stream one for each event."""

    def __init__(self, facts: _RequestFacts, expected: _Expected, request_id: str = "") -> None:
        self.has_output = False
        self.has_finished = False
        self._facts = facts
        self._expected = expected
        self._request_id = request_id
        self._choices: dict[int, _ChoiceBuilder] = {}
        self._fields: dict[str, Any] = {}
        self._is_whole = False
        self._usage: Usage | None = None
        self._prompt: dict[str, Any] = {}

    def add(self, payload: Mapping[str, Any]) -> list[Delta]:
        """Add one payload and return what is new in it.

        Raises the error in the payload, or ProtocolError.
        """
        if payload.get("error") or payload.get("object") == "error":
            raise _error_from_payload(payload, self._facts)

        try:
            if payload.get("usage"):
                self._usage = _parse_usage(payload["usage"])
            if _has_prompt(payload):  # where chat has it
                self._prompt = _parse_prompt(payload, self._expected.prompt_top)
            deltas = self._add_choices(payload.get("choices") or ())
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ProtocolError(
                f"not the shape vLLM sends ({type(error).__name__}: {error}): {self._facts.where}"
            ) from error

        self._fields.update(payload)
        return deltas

    def add_whole(self, payload: Mapping[str, Any]) -> list[Delta]:
        """Add the one payload of a plain call, which has choices where it has no error."""
        deltas = self.add(payload)
        self._is_whole = True
        if not self._choices:
            raise ProtocolError(f"a reply without choices: {self._facts.where}; {BASE_URL_ADVICE}")
        return deltas

    def _add_choices(self, choices: Sequence[Mapping[str, Any]]) -> list[Delta]:
        deltas = []
        for choice in choices:
            index = choice.get("index") or 0
            builder = self._choices.get(index)
            if builder is None:
                builder = _ChoiceBuilder(int(index), self._expected)
                self._choices[index] = builder

            delta = builder.add(choice)
            if delta is not None:
                deltas.append(delta)
                if delta.finish_reason is None:
                    self.has_output = True
                else:  # that may be all there is in it
                    self.has_finished = True
                    self.has_output |= any(delta[1:6])
        return deltas

    def completion(
        self, *, first_token_s: float | None = None, total_s: float | None = None
    ) -> Completion:
        """Return everything received until now; another thread may be adding to it."""
        payload = self._fields.copy()
        if not self._is_whole:
            payload.pop("choices", None)

        builders = self._choices.copy()
        choices = tuple(builders[index].build(self._prompt) for index in sorted(builders))
        return Completion(
            payload.get("id") or "",
            self._request_id,
            payload.get("model") or "",
            choices,
            self._usage,
            first_token_s,
            total_s,
            payload,
        )


def _parse_usage(usage: Mapping[str, Any]) -> Usage:
    input_tokens = usage.get("prompt_tokens") or 0
    output_tokens = usage.get("completion_tokens") or 0
    input_details = usage.get("prompt_tokens_details") or {}
    output_details = usage.get("completion_tokens_details") or {}
    return Usage(
        input_tokens,
        output_tokens,
        usage.get("total_tokens") or input_tokens + output_tokens,
        input_details.get("cached_tokens"),
        output_details.get("reasoning_tokens"),
    )


def _parse_logprobs(
    logprobs: Mapping[str, Any],
    token_ids: Sequence[int],
    prompt_ids: Sequence[int],
    top: int | None,
) -> tuple[TokenLogprob, ...]:
    """Return the tokens of either endpoint's `logprobs`.

    `token_ids`: of the generated tokens, `prompt_ids`: of the prompt, which `echo` puts first;
    both where requested. `top`: how many alternatives to keep, None for all; completions add the
    sampled token as one more.
    """
    if "content" in logprobs:
        entries = logprobs["content"] or ()
    else:
        entries = list(_to_chat_entries(logprobs))

    all_ids = (*prompt_ids, *token_ids)
    ids_by_count = {len(all_ids): all_ids, len(token_ids): token_ids}
    ids = ids_by_count.get(len(entries), itertools.repeat(None))

    tokens = []
    for entry, token_id in zip(entries, ids, strict=False):
        others = map(_parse_entry, entry.get("top_logprobs") or ())
        tokens.append(_parse_entry(entry, token_id, _most_likely(others, top)))
    return tuple(tokens)


def _most_likely(tokens: Iterable[TokenLogprob], top: int | None) -> tuple[TokenLogprob, ...]:
    """Return the first `top` tokens by probability, those without one last."""

    def rank(token: TokenLogprob) -> float:
        return math.inf if token.logprob is None else -token.logprob

    return tuple(sorted(tokens, key=rank)[:top])


def _to_chat_entries(logprobs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parallel lists of completions as chat has them: tokens with alternatives."""
    tokens = logprobs["tokens"]
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    for token, logprob, top in zip(tokens, logprobs["token_logprobs"], tops, strict=True):
        others = []
        for other, value in (top or {}).items():
            others.append({"token": other, "logprob": value})
        yield {"token": token, "logprob": logprob, "top_logprobs": others}


def _parse_entry(
    entry: Mapping[str, Any], token_id: int | None = None, top: tuple[TokenLogprob, ...] = ()
) -> TokenLogprob:
    token = entry["token"]
    if token_id is None and re.fullmatch(r"token_id:\d+", token):  # return_tokens_as_token_ids
        token_id = int(token.removeprefix("token_id:"))

    raw = entry.get("bytes")
    if raw is not None:
        raw = bytes(raw)
    logprob = _parse_logprob(entry.get("logprob"))
    return TokenLogprob(token, logprob, raw, token_id, entry.get("rank"), top)


def _parse_logprob(value: float | None) -> float | None:
    """Return a log probability, -inf for vLLM's -9999.0 and None for NaN."""
    if value is None or math.isnan(value):
        return None
    return -math.inf if value <= SENTINEL_LOGPROB else value


def _parse_prompt(payload: Mapping[str, Any], top: int | None) -> dict[str, Any]:
    ids = payload.get("prompt_token_ids") or ()
    tokens: list[TokenLogprob | None] = []
    for position, entry in enumerate(payload.get("prompt_logprobs") or ()):
        if not entry:
            tokens.append(None)
            continue

        candidates = {}
        for key, value in entry.items():
            text = value.get("decoded_token") or ""
            logprob = _parse_logprob(value["logprob"])
            candidates[int(key)] = TokenLogprob(text, logprob, None, int(key), value.get("rank"))

        token = next(iter(candidates.values()))  # without ids, the prompt's own is the first
        if ids:
            token = candidates.get(ids[position], token)
        tokens.append(token._replace(top=_most_likely(candidates.values(), top)))
    return {"prompt_logprobs": tuple(tokens), "prompt_token_ids": tuple(ids)}


def _parse_models(payload: Mapping[str, Any]) -> list[ModelCard]:
    """Return the models in a reply of `/v1/models`; raise ValueError for another shape."""
    lengths: dict[str | None, int | None] = {}
    for card in payload["data"]:
        length = _to_count(card.get("max_model_len")) or _to_count(card.get("max_input_tokens"))
        lengths[card["id"]] = length

    models = []
    for card in payload["data"]:
        parent = card.get("parent")
        length = lengths[card["id"]] or lengths.get(parent)
        output = _to_count(card.get("max_output_tokens"))
        models.append(ModelCard(card["id"], length, card.get("root"), parent, output))
    return models


def _to_count(value: object) -> int | None:
    """Return a positive integer, also given as text; None for anything else."""
    with suppress(TypeError, ValueError, OverflowError):
        return _to_int(value, 1)
    return None


# ---- Replies: reasoning out of plain text (pure) ----------------------------
#
# What a server's reasoning parser does for chat, for text of /v1/completions. A splitter is fed
# the text as it comes, and holds back what may still turn out to be markup.


class _ThinkSplitter:
    """Splits off `<think>…</think>` at the start of a text.

    `opened`: the prompt has opened the tag already.

    >>> splitter = _ThinkSplitter()
    >>> [splitter.feed(piece) for piece in ("<thi", "nk>Hm", ".</think>4")]
    [('', '', []), ('', 'Hm', []), ('4', '.', [])]
    """

    def __init__(self, opened: bool = False) -> None:
        self._state = "start"
        self._next_state = "reasoning" if opened else "text"  # without a tag
        self._held = ""

    def feed(self, piece: str, *, is_last: bool = False) -> tuple[str, str, list[dict[str, Any]]]:
        """Return the text and the reasoning that are certain by now; no tool calls."""
        held = self._held + piece
        self._held = ""
        if self._state == "start":
            tag = held.lstrip()
            is_near = len(held) - len(tag) <= 2  # further on it is only a mention
            if is_near and tag.startswith("<think>"):
                self._state = "reasoning"
                held = tag.removeprefix("<think>")
            elif is_near and "<think>".startswith(tag) and not is_last:
                self._held = held
                return "", "", []
            else:
                self._state = self._next_state

        if self._state == "text":
            return held, "", []

        reasoning, tag, text = held.partition("</think>")
        if tag:
            self._state = "text"
        elif not is_last:
            reasoning, self._held = _hold_back(reasoning, ("</think>",))
        return text, reasoning, []


class _HarmonySplitter:
    """Splits gpt-oss's channels: analysis is reasoning, final and commentary are text.

    `to=functions.X` is a tool call. Needs `skip_special_tokens: false`. The prompt ends in
    `<|start|>assistant`, so the text begins inside a header.
    """

    _ENDS: Final = ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|start|>")
    _TAG: Final = re.compile(r"(<\|(?:message|end|return|call|endoftext|start)\|>)")

    def __init__(self) -> None:
        self._held = ""  # the beginning of a tag
        self._header = ""
        self._channel = ""  # none: inside a header
        self._calls = 0

    def feed(self, piece: str, *, is_last: bool = False) -> tuple[str, str, list[dict[str, Any]]]:
        """Return the text, the reasoning and the pieces of tool calls that are certain by now."""
        held = self._held + piece
        self._held = ""
        if not is_last:
            held, self._held = _hold_back(held, ("<|message|>", *self._ENDS))

        added = {"final": "", "analysis": ""}
        calls: list[dict[str, Any]] = []
        for part in filter(None, self._TAG.split(held)):
            if not self._channel and part == "<|message|>":
                calls += self._enter(self._header)
                self._header = ""
            elif not self._channel:
                self._header += part
            elif part in self._ENDS:
                self._channel = ""
                self._header = part
            elif self._channel == "call":
                calls.append({"index": self._calls - 1, "function": {"arguments": part}})
            else:
                added[self._channel] += part

        if is_last and "<|" not in self._header:  # no harmony at all: the prompt had the header
            added["final"] += self._header
            self._header = ""
        return added["final"], added["analysis"], calls

    def _enter(self, header: str) -> list[dict[str, Any]]:
        """Enter the channel of a header; return the beginning of the call if it is one."""
        recipient = re.search(r"to=([^\s<]+)", header)
        if recipient is None:
            self._channel = "final"
            if "<|channel|>analysis" in header:
                self._channel = "analysis"
            return []

        self._channel = "call"
        self._calls += 1
        name = recipient.group(1).removeprefix("functions.")
        index = self._calls - 1
        return [{"index": index, "id": f"call_{self._calls}", "function": {"name": name}}]


def _hold_back(text: str, tags: Sequence[str]) -> tuple[str, str]:
    """Return the text without its last characters that may begin a tag, and those."""
    before, mark, after = text.rpartition("<")
    end = mark + after
    if any(tag.startswith(end) for tag in tags):
        return before, end
    return text, ""


# ---- Conversations as prompts (pure) ----------------------------------------

_NO_TEMPLATE: Final = "the model has no chat template"
_CHAT_ONLY_PARAMETERS: Final = frozenset(_ChatParams.__annotations__) - frozenset(
    _CommonParams.__annotations__
)


class _Route(NamedTuple):
    """Where a generation goes, and how its reply is read.

    `degradation`: what was requested, what is done, and why; None where that is the same.
    """

    path: str
    body: dict[str, Any]
    new_splitter: Callable[[], _Splitter] | None = None
    degradation: dict[str, str] | None = None


def _text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text; text parts are joined as vLLM joins them."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content

    texts = [part.get("text", "") for part in content if part.get("type") == "text"]
    return "\n".join(texts)


def _why_chat(body: _Body) -> str | None:
    """Return why only the chat endpoint is faithful to a conversation, None if it is not so."""
    if body.get("tools"):
        return "tools"
    if body.get("include_reasoning") is False:
        return "include_reasoning"

    for message in body["messages"]:
        if message.get("tool_calls") or message.get("role") in ("tool", "function"):
            return "tool results in the history"
        content = message.get("content")
        if isinstance(content, list) and any(part.get("type") != "text" for part in content):
            return "images"
    return None


def _why_harmony(body: _Body) -> str | None:
    """Return why gpt-oss needs the chat endpoint here, None if it does not.

    vLLM renders its chats by harmony, but `/tokenize` renders them by a template that differs.
    """
    for message in body["messages"]:
        content = message.get("content")
        if message.get("role") not in ("user", "assistant"):
            return "gpt-oss with a system prompt"
        if message.get("reasoning"):
            return "gpt-oss with past reasoning"
        if not isinstance(content, str) or "<|" in content:  # control tokens to the template
            return "gpt-oss with more than plain text"
    return None


def _to_render_options(body: _Body) -> dict[str, Any]:
    names = ("model", "add_generation_prompt", "continue_final_message", "chat_template")
    options = {name: body[name] for name in names if name in body}

    kwargs = {}
    if "documents" in body:
        kwargs["documents"] = body["documents"]
    effort = body.get("reasoning_effort")
    if effort is not None:  # as vLLM does from 0.22 on
        kwargs |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    kwargs |= body.get("chat_template_kwargs") or {}
    if kwargs:
        options["chat_template_kwargs"] = kwargs
    return options


def _to_completion_body(
    body: _Body, prompt: Any, available_tokens: int | None = None
) -> dict[str, Any]:
    """Return a chat body as one for completions.

    `available_tokens`: what the prompt leaves of the context, which is then the default and the
    maximum of max_tokens; None where it is unknown.
    """
    rest = {name: value for name, value in body.items() if name not in _CHAT_ONLY_PARAMETERS}
    del rest["messages"]
    if "logprobs" in body:
        rest["logprobs"] = body.get("top_logprobs", 1)

    facts = _read_facts("", body, str)
    max_tokens = facts.max_tokens
    if max_tokens is None:
        max_tokens = DEFAULT_MAX_TOKENS if available_tokens is None else available_tokens
    elif available_tokens is not None and max_tokens > available_tokens:
        logger.warning(
            "max_tokens=%d does not fit: sent with the %d tokens left", max_tokens, available_tokens
        )
        max_tokens = available_tokens
    return {**rest, "prompt": prompt, "max_tokens": max_tokens}


# ---- Client -----------------------------------------------------------------

_Answer = TypeVar("_Answer")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_NOT_RETRIED: Final = frozenset({"/health", "/version"})  # asked to learn how the server is now
_COUNTED_FIELDS: Final = (  # of a body, by /tokenize
    "model", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
)  # fmt: skip


class VLLMClient:
    """A blocking client of one vLLM server, for any number of threads; a context manager.

    `VLLMClient("http://localhost:8000", **settings)`, `VLLMClient(config)`, or `VLLMClient()` for
    the server in the environment variable VLLM_BASE_URL. `settings` are those of VLLMConfig.

    A call takes vLLM's request parameters under vLLM's names, and three of its own in seconds:
    `timeout` (to the first token, or to a whole reply), `stream_idle_timeout` and `deadline`
    (retries included). It raises the errors of the tree above. What is known not to have started
    is retried, and so are 429, 502 and 503: a gateway can send 502 for a request that had begun,
    but a generation has no side effects. A client can be pickled, and connects where it arrives.

    >>> with VLLMClient("http://localhost:8000") as client:
    ...     client.chat("What is 2+2?", temperature=0).text  # doctest: +SKIP
    '2 + 2 = 4'
    """

    def __init__(self, base_url: str | VLLMConfig | None = None, **settings: Any) -> None:
        for name in settings:
            if name not in _setting_names():
                raise TypeError(f"{name!r} is not a setting of VLLMClient{_suggest_setting(name)}")

        if isinstance(base_url, VLLMConfig):
            self.config = replace(base_url, **settings)
        else:
            self.config = VLLMConfig(base_url, **settings)  # type: ignore[arg-type]
        self._redact = _build_redact(self.config.api_key)
        self._transport = _Transport(self.config)
        self._served = _ServedModel()
        self._render_unavailable: str | None = None  # why conversations cannot be rendered here

    # Generation.

    def complete(self, prompt: _Prompt, **params: Unpack[_CompletionParams]) -> Completion:
        """Return the answer of `/v1/completions` to the prompt as typed.

        `prompt`: a string, a list of strings, a list of token ids, or a list of such lists.
        """
        body = build_completion_request(self.config, prompt, **params)
        return self._complete(COMPLETIONS_PATH, body, _read_limits(self.config, params))

    def chat(
        self, messages: _Messages, *, system: str | None = None, **params: Unpack[_ChatParams]
    ) -> Completion:
        """Return the answer of `/v1/chat/completions`.

        `messages`: a list of dicts, or one string from the user. `system`: a system message before
        them.
        """
        body = build_chat_request(self.config, _to_messages(messages, system), **params)
        return self._complete(CHAT_PATH, body, _read_limits(self.config, params))

    def stream_complete(self, prompt: _Prompt, **params: Unpack[_CompletionParams]) -> "Stream":
        """Return a Stream of `/v1/completions`; arguments as for complete()."""
        body = build_completion_request(self.config, prompt, **params)
        return self._open(COMPLETIONS_PATH, body, limits=_read_limits(self.config, params))

    def stream_chat(
        self, messages: _Messages, *, system: str | None = None, **params: Unpack[_ChatParams]
    ) -> "Stream":
        """Return a Stream of `/v1/chat/completions`; arguments as for chat()."""
        body = build_chat_request(self.config, _to_messages(messages, system), **params)
        return self._open(CHAT_PATH, body, limits=_read_limits(self.config, params))

    def _complete(
        self, path: str, body: dict[str, Any], limits: _Limits, deadline_at: float = math.inf
    ) -> Completion:
        stream = self._open(path, body, limits=limits, wants_stream=False, deadline_at=deadline_at)
        with closing(stream):
            collections.deque(stream, maxlen=0)
        return stream.completion

    # Many calls.

    @overload
    def map(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item], *,
        concurrency: int | None = None, errors: Literal["raise"] = "raise", progress: bool = False,
    ) -> Iterator[_Result]: ...  # fmt: skip

    @overload
    def map(
        self, function: Callable[[_Item], _Result], items: Iterable[_Item], *,
        concurrency: int | None = None, errors: Literal["return"], progress: bool = False,
    ) -> Iterator[_Result | Exception]: ...  # fmt: skip

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], *,
        concurrency: int | None = None, errors: str = "raise", progress: bool = False,
    ) -> Iterator[Any]:  # fmt: skip
        """Yield `function(item)` for each item, in order, with `concurrency` calls at once.

        `function`: what makes the calls, like `client.complete` or a lambda; it runs in threads.
        `items` are taken as they are needed, at most 16 x concurrency ahead. `concurrency`: None is
        max_concurrency. `errors`: "raise", or "return" for an exception in the place of its result
        (except AbortError, which ends the map). Leaving the loop stops the calls that have not
        ended. `progress` keeps one line on a terminal's stderr up to date.
        """
        places = _read_count("concurrency", concurrency, self.config.max_concurrency)
        if errors not in ("raise", "return"):
            raise ConfigurationError(f"errors must be 'raise' or 'return', got {errors!r}")
        total = len(items) if isinstance(items, Sized) else None
        return _map_in_threads(
            function, items, places, errors=errors, progress=progress, total=total
        )

    def run_batch(
        self, source: str | os.PathLike[str], target: str | os.PathLike[str], *,
        servers: "Sequence[VLLMClient]" = (), concurrency: int | None = None,
        retry_failed: bool = True, progress: bool = False, **params: Any,
    ) -> "BatchReport":  # fmt: skip
        """Send each request of a JSONL file, append its result to another; return a BatchReport.

        Both have the format of OpenAI's batches; README has it. "-" is standard input or output.
        Run it again after an interruption: ids with a success in `target` are skipped, failures are
        tried again unless `retry_failed` is False. A line that cannot be sent is a failure with an
        error. 429 and 503 are waited out, up to `deadline` seconds for each line; servers that stop
        answering, for 5 minutes. `servers`: clients of more servers, each with as many places.
        `params`: defaults for every body. Raises ConfigurationError before anything is sent, for an
        id that comes twice and for files that cannot be used.
        """
        batch = _Batch((self, *servers), concurrency, params)
        files = (os.fspath(source), os.fspath(target))
        return batch.run(*files, retry_failed=retry_failed, progress=progress)

    def score(self, text: str, *, context: Any = "", **params: Any) -> "Score":
        """Return how probable the model finds `text` after `context`, a string or messages.

        Raises ConfigurationError where the text has no token of its own, and ContextLengthError:
        context and text may have max_model_len - 1 tokens. Each call is a full prefill.
        """
        scorer = _Scorer(self, context, params)
        return scorer.score(scorer.build_request(text))

    def choose(self, choices: Sequence[str], *, context: Any = "", **params: Any) -> "list[Score]":
        """Return a Score of each choice after `context`, a string or messages; the best first.

        They are ordered by `logprob`, which favours short choices; `logprob_per_byte` does not.
        Choices of one token take one request together.
        """
        if isinstance(choices, str) or not choices:
            raise ConfigurationError("choices must be a list of at least one string")
        scorer = _Scorer(self, context, params)
        requests = list(_map_in_threads(scorer.build_request, choices, SCORES_AT_ONCE))
        scores = scorer.score_single_tokens(requests)
        if scores is None:
            scores = list(_map_in_threads(scorer.score, requests, SCORES_AT_ONCE))
        return _rank(scores)

    # Everything else a server offers.

    def get(self, path: str, **limits: Unpack[_CallParams]) -> Any:
        """Return the decoded JSON of any other endpoint, like `/load`.

        `path` begins with a slash. Limits, retries and errors are those of a generation. A reply
        of plain text is a string, an empty one None.
        """
        return self._ask("GET", path, None, limits)

    def post(self, path: str, body: Any, **limits: Unpack[_CallParams]) -> Any:
        """Return the decoded JSON of any other endpoint, like `/v1/embeddings` or `/score`.

        `body`: what JSON can hold; nothing is added to it. For the rest, see get().
        """
        return self._ask("POST", path, body, limits)

    def _ask(self, method: str, path: str, body: Any, limits: Mapping[str, Any]) -> Any:
        if not path.startswith("/"):
            raise ConfigurationError(f"path must begin with a slash, got {path!r}")
        with self._call(limits) as call:
            return self._fetch(call, method, path, body, object)

    def models(self, **limits: Unpack[_CallParams]) -> list[ModelCard]:
        """Return the models of `/v1/models`; the first is the one for those who name none."""
        with self._call(limits) as call:
            try:
                return self._list_models(call)
            except (StatusError, ProtocolError, LLMTimeoutError):
                if self._served.name is None:  # so that a call without a model does not ask again
                    self._served.remember("")
                raise

    def version(self) -> str:
        """Return the server's version, like "0.32.0"; not retried."""
        with self._call({}) as call:
            return str(self._fetch(call, "GET", "/version").get("version") or "")

    def tokenize(self, text_or_messages: _Messages, **options: Any) -> list[int]:
        """Return the token ids of a text, or of messages as the model's own template renders them.

        `options`: fields of vLLM's `/tokenize`, like `add_special_tokens` or
        `chat_template_kwargs`, and the limits of a call.
        """
        fields_sent = {name: value for name, value in options.items() if name not in CALL_LIMITS}
        with self._call(options) as call:
            return list(self._tokenize(call, text_or_messages, fields_sent)["tokens"])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        with self._call({}) as call:
            payload = self._ask_tokenizer(call, "/detokenize", {"tokens": list(ids)})
            return str(payload.get("prompt") or "")

    def health(self, wait: float = 0.0) -> bool:
        """Return True when the server is ready; raise otherwise.

        `wait`: for up to so many seconds, look again at a server that cannot be reached or is not
        ready, which may be starting. Each look takes 5 s at most; the last real cause is raised.
        """
        wait_s = _wait_seconds("wait", wait)
        until = time.monotonic() + wait_s
        look_s = self.config.timeout if wait_s == 0 else min(self.config.timeout, HEALTH_LOOK_S)
        cause: VLLMError | None = None

        with self._call({}) as waiting:
            while True:
                try:
                    with self._call({"timeout": look_s}) as call:
                        self._read_text(self._request(call, "GET", "/health"))
                    return True
                except (LLMTimeoutError, NetworkError, ProviderUnavailableError) as error:
                    if not error.retryable:
                        raise
                    if cause is None or not isinstance(error, LLMTimeoutError):
                        cause = error

                left_s = until - time.monotonic() - HEALTH_POLL_S
                if left_s <= 0:
                    raise cause
                waiting.pause(HEALTH_POLL_S)
                look_s = min(look_s, max(left_s, HEALTH_POLL_S))

    def close(self) -> None:
        """Stop the calls in flight, which raise AbortError, and close all connections at once.

        A later call opens new ones.
        """
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)

    def __repr__(self) -> str:
        return f"VLLMClient({self.config!r})"

    # How a generation travels: _open -> _find_route (prompt) -> _send_generation (model,
    # max_tokens) -> _request (retries) -> _try (one attempt) -> _read_reply.

    def _open(
        self, path: str, body: dict[str, Any], *,
        limits: _Limits, wants_stream: bool | None = True, prompt_format: str | None = None,
        request_id: str | None = None, attempt: int = 0, deadline_at: float = math.inf,
    ) -> "Stream":  # fmt: skip
        """Return one generation as a Stream, whether or not its reply is one on the wire.

        `wants_stream`: None for a stream unless vLLM cannot. `prompt_format`: how a conversation
        becomes a prompt, as in VLLMConfig; None leaves it to the endpoint. `request_id`, `attempt`:
        the id of a whole turn, and how many requests were sent under it. `deadline_at`: of
        time.monotonic().
        """
        own_id = body.get("request_id")
        sent_id = str(own_id) if own_id is not None else request_id or _new_id()
        call = _Call(limits, sent_id, own_id is not None, attempt, deadline_at)
        if wants_stream is None:
            wants_stream = not (body.get("prompt_logprobs") or body.get("use_beam_search"))

        route = _Route(path, body) if prompt_format is None else None
        return Stream(_Generation(self, call, body, wants_stream, prompt_format, route))

    def _reopen(self, stream: "Stream") -> "Stream":
        """Return the same generation once more: its id and deadline, its conversation rendered."""
        before = stream._generation
        return Stream(replace(before, call=replace(before.call), builder=None))

    def _find_route(self, call: _Call, body: dict[str, Any], prompt_format: str | None) -> _Route:
        """Return where a conversation goes that is wanted on `/v1/completions`."""
        if prompt_format == "raw":
            text = "\n".join(map(_text_of, body["messages"]))
            return _Route(COMPLETIONS_PATH, _to_completion_body(body, text))

        is_strict = prompt_format == "chat_template"
        reason = self._render_unavailable or _why_chat(body)
        if reason is None:
            route = self._render(call, body, is_strict=is_strict)
            if isinstance(route, _Route):
                return route
            reason = route

        if is_strict:
            raise ConfigurationError(f"prompt_format chat_template cannot render this: {reason}")
        degradation = {"requested": "completions", "actual": "chat", "reason": reason}
        return _Route(CHAT_PATH, body, None, degradation)

    def _render(self, call: _Call, body: dict[str, Any], *, is_strict: bool) -> _Route | str:
        """Return the route of a rendered conversation, or the reason why that is not faithful."""
        messages = body["messages"]
        options = {**_to_render_options(body), "return_token_strs": True}
        try:
            reply = self._tokenize(call, messages, options)
        except (StatusError, ProtocolError) as error:
            reason = self._why_not_rendered(error)
            if reason is None or is_strict:
                raise
            if reason == _NO_TEMPLATE and [item.get("role") for item in messages] == ["user"]:
                rendered = _to_completion_body(body, _text_of(messages[0]))
                return _Route(COMPLETIONS_PATH, rendered)
            return reason

        is_harmony = HARMONY_START in reply["tokens"]
        reason = _why_harmony(body) if is_harmony else None
        if reason is not None:
            return reason

        available = self._available_tokens(body, reply)
        rendered = _to_completion_body(body, reply["tokens"], available)
        if is_harmony:
            rendered["skip_special_tokens"] = False
        if body.get("echo"):
            return _Route(COMPLETIONS_PATH, rendered)
        if is_harmony:
            return _Route(COMPLETIONS_PATH, rendered, _HarmonySplitter)

        end = self._read_end(call, reply)
        opened = end.rfind("<think>") > end.rfind("</think>")
        return _Route(COMPLETIONS_PATH, rendered, functools.partial(_ThinkSplitter, opened))

    def _available_tokens(self, body: _Body, reply: Mapping[str, Any]) -> int | None:
        """Return the tokens a rendered prompt leaves for the answer, None where that is unknown."""
        context_length = _to_count(reply.get("max_model_len"))
        if context_length is None or "truncate_prompt_tokens" in body:
            return None

        input_tokens = len(reply["tokens"])
        if input_tokens >= context_length:
            overflow = _Overflow(context_length, input_tokens)
            raise _overflow_error(overflow, self._facts("POST", COMPLETIONS_PATH, body))
        return context_length - input_tokens

    def _read_end(self, call: _Call, reply: Mapping[str, Any]) -> str:
        if reply.get("token_strs"):
            return "".join(reply["token_strs"][-8:])
        body = {"tokens": list(reply["tokens"][-8:])}
        payload = self._ask_auxiliary(self._ask_tokenizer, call, "/detokenize", body) or {}
        return str(payload.get("prompt") or "")

    def _why_not_rendered(self, error: VLLMError) -> str | None:
        """Return the reason not to render in an error of `/tokenize`; None if it is no reason."""
        message = getattr(error, "server_message", "")
        if "must provide a chat template" in message:
            return _NO_TEMPLATE
        if isinstance(error, ProviderUnavailableError):  # the page of a gateway that is starting
            return None

        is_hidden = error.status_code in (403, 404, 405) and "does not exist" not in message
        if not is_hidden and not isinstance(error, ProtocolError):
            return None
        reason = "/tokenize is hidden by a gateway"
        logger.warning("%s: conversations go to the chat endpoint: %s", reason, error)
        self._render_unavailable = reason
        return reason

    # Sending: the model's name, a max_tokens that fits, retries.

    def _send_generation(self, call: _Call, path: str, body: dict[str, Any]) -> _Attempt:
        """Return the open reply to a generation."""
        body = self._with_model(call, body)
        lowerings = 0
        while True:
            try:
                return self._request(call, "POST", path, body)
            except NotFoundError as error:
                body = self._with_current_model(call, body, error)
            except (InvalidRequestError, ContextLengthError) as error:
                lowered = self._with_lower_max_tokens(call, path, body, error)
                if lowered is None or lowerings == MAX_LOWERINGS:
                    raise
                body = lowered
                if lowerings == 0:
                    number = body.get("max_completion_tokens") or body["max_tokens"]
                    logger.warning("max_tokens is lowered to %d: %s", number, error)
                lowerings += 1

    def _with_lower_max_tokens(
        self, call: _Call, path: str, body: dict[str, Any], error: StatusError
    ) -> dict[str, Any] | None:
        """Return the body with a max_tokens that fits; None where the error is about other things.

        Raises ContextLengthError where the prompt does not fit.
        """
        facts = self._facts("POST", path, body)
        message = error.server_message
        overflow = _read_overflow(message, facts)
        if overflow is None:
            return None

        if overflow.context_length is None:
            length = self._ask_auxiliary(self._find_context_length, call, body)
            overflow = _read_overflow(message, facts, length) or overflow
        if overflow.is_lower_bound:
            overflow = self._count_overflow(call, body, overflow)
        if overflow.is_prompt_too_long():
            raise _overflow_error(overflow, facts, message, error.status_code) from error
        return _lower_max_tokens(body, facts, overflow)

    def _count_overflow(self, call: _Call, body: _Body, overflow: _Overflow) -> _Overflow:
        """Return the lengths with the prompt's own, as far as the server can tell."""
        counted = self._ask_auxiliary(self._count_input, call, body)
        if counted is not None:
            return overflow._replace(input_tokens=counted, is_lower_bound=False)
        if overflow.is_prompt_too_long():
            return overflow
        return overflow._replace(input_tokens=None)  # nobody can say what fits

    def _with_current_model(
        self, call: _Call, body: dict[str, Any], error: NotFoundError
    ) -> dict[str, Any]:
        """Return the body with the name that the server's model has now.

        Raises NotFoundError where the name came from the caller, or is the server's own.
        """
        if "does not exist" not in error.server_message:
            raise error

        requested = body.get("model")
        discovered = self._served.name
        models = self._ask_auxiliary(self._list_models, call) or []
        names = [model.id for model in models]
        if names and discovered and requested == discovered != names[0]:
            return {**body, "model": names[0]}

        advice = f"the server has {', '.join(names)}" if names else "look at /v1/models"
        message = f"model not found: {requested!r}; {advice}"
        unknown = NotFoundError(message, status_code=error.status_code)
        unknown.server_message = error.server_message
        raise unknown from error

    def _request(self, call: _Call, method: str, path: str, body: Any = None) -> _Attempt:
        """Return the open reply with status 200 to a request, retried where that is safe."""
        raw = None if body is None else _encode(body)
        facts = self._facts(method, path, body if isinstance(body, Mapping) else {})
        maximum = 3 if self.config.max_retries is None else self.config.max_retries
        if path in _NOT_RETRIED:
            maximum = 0

        retries = 0
        while True:
            if path in GENERATION_PATHS:
                call.attempts += 1
            try:
                attempt = self._transport.send(call, facts, raw)
                self._check_status(attempt)
                return attempt
            except VLLMError as error:
                failed = call.attempt
                if failed is None or isinstance(error, AbortError):
                    raise
                if _is_stale(error, failed):  # no failure of the server's, so no retry either
                    continue
                retries += 1
                if retries > maximum or not _is_unstarted(error, failed):
                    raise
                pause_s = _retry_pause_s(self.config, error, retries, call.time_left_s())
                logger.warning("retry %d of %d in %.1f s: %s", retries, maximum, pause_s, error)
            call.pause(pause_s)

    def _check_status(self, attempt: _Attempt) -> None:
        status = attempt.response.status_code
        if status == 200:
            return

        attempt.allow(min(ERROR_BODY_S, attempt.time_left_s()))
        body = bytearray()
        pieces = self._transport.read(attempt)
        with closing(pieces), suppress(StreamError, LLMTimeoutError, ProtocolError):
            for piece in pieces:  # as much as there is, and no more than can be of use
                body += piece
                if len(body) >= MAX_ERROR_BYTES:
                    break
        raise _error_from_reply(status, attempt.response.headers, bytes(body), attempt.facts)

    # Receiving.

    def _read_reply(self, attempt: _Attempt, builder: _ResponseBuilder) -> Iterator[Delta]:
        """Yield what the reply adds to `builder`, event by event or as a whole."""
        if _is_event_stream(attempt.response):
            return self._read_events(attempt, builder)
        return iter(builder.add_whole(_decode_json(self._read_text(attempt), attempt.facts)))

    def _read_events(self, attempt: _Attempt, builder: _ResponseBuilder) -> Iterator[Delta]:
        call = attempt.call
        facts = attempt.facts
        decoder = _SSEDecoder()
        with closing(self._transport.read(attempt)) as pieces:
            for raw in pieces:
                for data in decoder.feed(raw):
                    call.check()
                    if data == _END_OF_STREAM:
                        self._end_stream(attempt, builder, pieces)
                        return
                    deltas = builder.add(_decode_json(data, facts))
                    if call.first_token_s is None and builder.has_output:
                        call.first_token_s = call.elapsed_s()
                    yield from deltas

                if builder.has_output and (b"\n" in raw or b"\r" in raw):
                    attempt.clock.note_line()

            if decoder.finish():
                self._end_stream(attempt, builder, pieces)
                return
        advice = "was the server or a proxy stopped?"
        raise StreamError(f"the stream ended without [DONE]: {attempt.facts.where}; {advice}")

    def _end_stream(
        self, attempt: _Attempt, builder: _ResponseBuilder, pieces: Iterator[bytes]
    ) -> None:
        """Check that the stream had output, and wait for its last bytes, to keep the connection."""
        if not builder.has_output and not builder.has_finished:
            # vLLM 0.13-0.31 can lose an error before the first token.
            advice = "look at the server's log"
            raise StreamError(
                f"the stream ended without any output: {attempt.facts.where}; {advice}"
            )

        attempt.allow(DRAIN_S)
        with suppress(VLLMError):
            collections.deque(pieces, maxlen=0)

    def _read_text(self, attempt: _Attempt) -> str:
        return b"".join(self._transport.read(attempt, MAX_REPLY_BYTES)).decode("utf-8", "replace")

    # Auxiliary requests.

    def _call(self, limits: Mapping[str, Any]) -> Any:
        return self._transport.call(_Call(_read_limits(self.config, limits)))

    def _facts(self, method: str, path: str, body: _Body) -> _RequestFacts:
        return _read_facts(f"{method} {self.config.base_url}{path}", body, self._redact)

    def _ask_auxiliary(self, ask: Callable[..., _Answer], *args: Any) -> _Answer | None:
        """Return the answer to an auxiliary request; None for an error: the call has its own."""
        try:
            return ask(*args)
        except AbortError:
            raise
        except VLLMError:
            return None

    def _fetch(
        self, call: _Call, method: str, path: str, body: Any = None, kind: type = dict
    ) -> Any:
        """Return the decoded reply of an endpoint; with kind=object a text or None, too."""
        attempt = self._request(call, method, path, body)
        text = self._read_text(attempt)
        if kind is object:
            if not text.strip():
                return None
            if attempt.response.headers.get("Content-Type", "").lower().startswith("text/plain"):
                return text

        payload = _decode_json(text, attempt.facts, kind)
        if isinstance(payload, dict) and payload.get("error"):
            raise _error_from_payload(payload, attempt.facts)
        return payload

    def _with_model(self, call: _Call, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body with a model: the caller's, the configured one, or the server's first."""
        if body.get("model"):
            return body
        if self.config.default_model is not None:
            return {**body, "model": self.config.default_model}
        name = self._served.find(call, self._list_models)
        return {**body, "model": name} if name else body

    def _list_models(self, call: _Call) -> list[ModelCard]:
        """Return the server's models, and remember the first."""
        payload = self._fetch(call, "GET", "/v1/models")
        try:
            models = _parse_models(payload)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = f"GET {self.config.base_url}/v1/models"
            message = f"not the list of models vLLM sends: {where}; {BASE_URL_ADVICE}"
            raise ProtocolError(message) from error
        self._served.remember(models[0].id if models else "")
        return models

    def _find_context_length(self, call: _Call, body: _Body) -> int | None:
        models = self._list_models(call)
        for model in models:
            if model.id == body.get("model"):
                return model.max_model_len
        return models[0].max_model_len if models else None

    def _count_input(self, call: _Call, body: _Body) -> int | None:
        """Return the number of tokens of the body's prompt; None for a list of prompts."""
        source = body.get("messages", body.get("prompt"))
        if not isinstance(source, str) and "messages" not in body:
            return None
        options = {name: body[name] for name in _COUNTED_FIELDS if name in body}
        return len(self._tokenize(call, source, options)["tokens"])

    def _tokenize(self, call: _Call, source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply of `/tokenize`: tokens, count, max_model_len."""
        name = "prompt" if isinstance(source, str) else "messages"
        reply: dict[str, Any] = self._ask_tokenizer(call, "/tokenize", {name: source, **options})
        if not isinstance(reply.get("tokens"), list):
            where = f"POST {self.config.base_url}/tokenize"
            raise ProtocolError(f"not what vLLM's tokenizer sends: {where}")
        return reply

    def _ask_tokenizer(self, call: _Call, path: str, body: dict[str, Any]) -> Any:
        body = self._with_model(call, body)
        try:
            return self._fetch(call, "POST", path, body)
        except NotFoundError as error:
            body = self._with_current_model(call, body, error)
        return self._fetch(call, "POST", path, body)


def _is_event_stream(response: requests.Response) -> bool:
    """Return whether a reply is a stream: not every gateway streams when asked to."""
    content_type = response.headers.get("Content-Type")
    if content_type is None:
        return b'"stream":true' in bytes(response.request.body or b"")  # type: ignore[arg-type]
    return "event-stream" in content_type.lower()


class _ServedModel:
    """The name of the server's first model: asked for once, whoever needs it first.

    `name`: None while it is unknown, "" where the server does not say.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._forget_at = math.inf
        self._lock = threading.Lock()

    def remember(self, name: str) -> None:
        """Keep the name; that there is none, for a minute."""
        self._forget_at = math.inf if name else time.monotonic() + MODEL_RETRY_S
        self.name = name

    def find(self, call: _Call, list_models: Callable[[_Call], object]) -> str:
        """Return the name, once `list_models` has remembered it.

        Where a gateway hides the models, there is none: vLLM then takes its first.
        """
        has_lock = False
        # Not forever: a fork may have left the lock locked.
        give_up_at = min(time.monotonic() + HEALTH_LOOK_S, call.deadline_at)
        while not (has_lock or self._is_known()) and time.monotonic() < give_up_at:
            call.check()
            has_lock = self._lock.acquire(timeout=POLL_S)

        try:
            if not self._is_known():
                list_models(call)
        except (StatusError, ProtocolError) as error:
            if error.retryable:
                raise
            self.remember("")
        finally:
            if has_lock:
                self._lock.release()
        return self.name or ""

    def _is_known(self) -> bool:
        return self.name is not None and time.monotonic() < self._forget_at


@dataclass(eq=False)
class _Generation:
    """One generation: what is sent, and what has been received of its reply.

    It does not know the Stream that reads it, so that a Stream nobody holds is closed at once.
    `route`: None until a conversation is rendered. `builder`: None before the reply begins.
    """

    client: VLLMClient
    call: _Call
    body: dict[str, Any]
    wants_stream: bool
    prompt_format: str | None
    route: _Route | None
    builder: _ResponseBuilder | None = None

    def receive(self) -> Generator[Delta, None, None]:
        """Send the request and yield the deltas of its reply."""
        client = self.client
        call = self.call
        with client._transport.call(call):
            if self.route is None:
                self.route = client._find_route(call, self.body, self.prompt_format)
            path, body, new_splitter, _degradation = self.route

            expected = _read_expected(body, new_splitter)
            if self.wants_stream:
                body = _to_stream(body)
            attempt = client._send_generation(call, path, body)
            self.builder = _ResponseBuilder(attempt.facts, expected, call.request_id)
            yield from client._read_reply(attempt, self.builder)

    def completion(self) -> Completion:
        first_token_s = self.call.first_token_s
        total_s = self.call.elapsed_s()
        if self.builder is None:
            return Completion(request_id=self.call.request_id, total_s=total_s)
        return self.builder.completion(first_token_s=first_token_s, total_s=total_s)


class Stream(Iterator[Delta]):
    """The deltas of one reply as they arrive; a context manager that stops the server when left.

    The request goes out at the first next() or on entering `with`. Errors are raised there or by a
    later next(), with what had arrived in `partial`. Use it in `with`: an exception in the
    loop's body then stops the server at once; otherwise it stops when nobody holds the Stream any
    longer, which a traceback may do for a while. One thread at a time may read it.
    """

    def __init__(self, generation: _Generation) -> None:
        self._generation = generation
        self._deltas = generation.receive()
        self._ahead: list[Delta] = []
        self._is_closed = False
        self._reading = threading.Lock()  # never waited for

    def __next__(self) -> Delta:
        if not self._reading.acquire(blocking=False):
            if self._is_closed:
                raise StopIteration
            raise VLLMError("another thread is reading this Stream; only one can at a time")
        try:
            return self._ahead.pop() if self._ahead else next(self._deltas)
        except VLLMError as error:
            if self._is_closed and isinstance(error, AbortError):
                raise StopIteration from error
            error.partial = self.completion
            raise
        finally:
            self._reading.release()

    def __enter__(self) -> Self:
        for delta in itertools.islice(self, 1):
            self._ahead.append(delta)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Stop the server, from any thread; the thread that reads gets AbortError."""
        self._generation.call.stop()

    def close(self) -> None:
        """Stop the server unless it is done, from any thread; iteration just ends."""
        self._is_closed = True
        self._ahead.clear()
        self._generation.call.stop()
        if self._reading.acquire(blocking=False):  # else the thread that reads sees the stop
            try:
                self._deltas.close()
            finally:
                self._reading.release()

    @property
    def completion(self) -> Completion:
        """Return a snapshot of everything received until now; whole once iteration has ended."""
        return self._generation.completion()

    @property
    def request_id(self) -> str:
        """Return our id of the call."""
        return self._generation.call.request_id

    @property
    def attempts(self) -> int:
        """Return how many requests were sent under that id."""
        return self._generation.call.attempts

    @property
    def degradation(self) -> dict[str, str] | None:
        """Return what was requested, what was done, and why; None where that is the same."""
        route = self._generation.route
        return None if route is None else route.degradation


# ---- Many calls -------------------------------------------------------------
#
# One engine: worker threads take items from an iterator, and one consumer reads the outcomes. map()
# yields them in the order of the items; run_batch() takes them as they come.

RESULTS_PER_WORKER: Final = 16  # finished results that may wait for the consumer, times concurrency
STOP_S: Final = 0.5  # how long a stop waits for the threads: a function that makes no call goes on
WAKE_S: Final = 0.5  # on Windows, Ctrl-C reaches a waiting main thread only between two waits
PROGRESS_S: Final = 0.2


class _Outcome(NamedTuple):
    """What the item at `place` has led to. `is_end`: there is no such item."""

    place: int
    value: Any = None
    error: BaseException | None = None
    is_end: bool = False


class _Workers:
    """Threads that call `function` with each item.

    The queues are SimpleQueues, which are reentrant: the garbage collector may stop() anywhere.
    """

    def __init__(self, function: Callable[[Any], Any], items: Iterable[Any], errors: str) -> None:
        self._function = function
        self._items = iter(items)
        self._places = itertools.count()
        self._errors = errors
        self._threads: list[threading.Thread] = []
        self.outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self.spaces: queue.SimpleQueue[None] = queue.SimpleQueue()  # one for each item to be taken
        self._taking = threading.Lock()  # held while the iterator is asked for an item
        self._is_closed = False  # no more items are taken
        with _CallGroup() as self._group:  # not around a `yield`: it would catch other calls
            self._context = contextvars.copy_context()

    def start(self, concurrency: int) -> None:
        for _ in range(RESULTS_PER_WORKER * concurrency):
            self.spaces.put(None)
        for number in range(concurrency):
            run = self._context.copy().run
            name = f"vllm-map-{number}"
            thread = threading.Thread(target=run, args=(self._work,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Stop the calls that have not ended, and wait a moment for the threads."""
        self._close()
        self._group.stop()
        stops_at = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread is not threading.current_thread():  # pragma: no branch
                thread.join(max(0.0, stops_at - time.monotonic()))

    def ends_map(self, error: BaseException) -> bool:
        is_result = isinstance(error, Exception) and not isinstance(error, AbortError)
        return self._errors == "raise" or not is_result

    def _close(self) -> None:
        self._is_closed = True
        self.spaces.put(None)  # wakes a thread, which wakes the next

    def _work(self) -> None:
        while True:
            with self._taking:
                self.spaces.get()
                if self._is_closed:
                    return self._close()
                place = next(self._places)
                try:
                    item = next(self._items)
                except BaseException as error:  # noqa: BLE001  # raised by the consumer
                    self.outcomes.put(_Outcome(place, error=error, is_end=True))
                    return self._close()

            try:
                outcome = _Outcome(place, self._function(item))
            except BaseException as error:  # noqa: BLE001  # raised by the consumer
                outcome = _Outcome(place, error=error)
                if self.ends_map(error):
                    self._close()  # what comes after it would never be yielded
            self.outcomes.put(outcome)


class _Progress:
    """One line on stderr, kept up to date; nothing where stderr is not a terminal."""

    def __init__(self, is_wanted: bool, total: int | None) -> None:
        self._is_shown = is_wanted and sys.stderr is not None and sys.stderr.isatty()
        self._total = total
        self._started_at = time.monotonic()
        self._shown_at = self._started_at
        self._done = 0
        self._failed = 0
        self._tokens = 0

    def add(self, outcome: _Outcome) -> None:
        """Count a result; its value may have `error` and `usage`."""
        if outcome.is_end:
            return
        self._done += 1
        self._failed += (outcome.error or getattr(outcome.value, "error", None)) is not None
        self._tokens += getattr(getattr(outcome.value, "usage", None), "output_tokens", 0)
        if time.monotonic() - self._shown_at >= PROGRESS_S:
            self.show()

    def show(self, end: str = "") -> None:
        if not self._is_shown:
            return
        self._shown_at = time.monotonic()
        elapsed_s = max(0.001, self._shown_at - self._started_at)
        calls_per_s = self._done / elapsed_s
        done = str(self._done)
        time_left = ""
        if self._total is not None:
            done += f"/{self._total}"
            time_left = f", {(self._total - self._done) / max(calls_per_s, 1e-9):.0f} s left"

        counts = f"{done} done, {self._failed} failed, {calls_per_s:.1f} calls/s"
        line = f"{counts}, {self._tokens / elapsed_s:.0f} tokens/s{time_left}"
        print(f"\r\x1b[K{line}", end=end, file=sys.stderr, flush=True)


def _map_in_threads(
    function: Callable[[Any], Any], items: Iterable[Any], concurrency: int, *,
    errors: str = "raise", is_ordered: bool = True, progress: bool = False,
    total: int | None = None,
) -> Generator[Any, None, None]:  # fmt: skip
    """Yield what `function` returns for each item; its calls and threads end with the iteration."""
    line = _Progress(progress, total)
    workers = _Workers(function, items, errors)
    waiting: dict[int, _Outcome] = {}
    arrivals = itertools.count()
    place = 0  # of the outcome that is due

    try:
        workers.start(min(concurrency, total or concurrency))
        while True:
            while place not in waiting:
                with suppress(queue.Empty):
                    outcome = workers.outcomes.get(timeout=WAKE_S)
                    is_placed = is_ordered or outcome.is_end
                    waiting[outcome.place if is_placed else next(arrivals)] = outcome
                    line.add(outcome)

            _, value, error, is_end = waiting.pop(place)
            if is_end and isinstance(error, StopIteration):
                return
            if error is not None and (is_end or workers.ends_map(error)):
                raise error
            workers.spaces.put(None)
            place += 1
            yield value if error is None else error
    except BaseException:
        workers.stop()
        raise
    finally:
        line.show(end="\n")


def _read_count(name: str, value: int | None, default: int = 1) -> int:
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


# ---- Many calls: batch files (pure) -----------------------------------------


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What run_batch() did with `total` lines. `skipped`: done by an earlier run.

    Tokens are those of this run, and so is `first_error`, which names the line.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    first_error: str | None = None

    def __str__(self) -> str:
        text = (
            f"{self.total} lines: {self.done} done, {self.failed} failed, {self.skipped} skipped"
            f" in {self.seconds:.1f} s, {self.input_tokens} input tokens"
            f", {self.output_tokens} output tokens"
        )
        return text if self.first_error is None else f"{text}; first error: {self.first_error}"


class _BatchLine(NamedTuple):
    """A request of a batch file. `problem`: why it cannot be sent, "" when it can."""

    number: int
    custom_id: str
    url: str = ""
    body: Mapping[str, Any] = MappingProxyType({})
    problem: str = ""


def _parse_batch_line(number: int, raw: bytes) -> _BatchLine:
    """Return a line of a batch file. A request alone has its line number as its id.

    >>> _parse_batch_line(7, b'{"prompt": "Once", "max_tokens": 5}')[:4]
    (7, '7', '/v1/completions', {'prompt': 'Once', 'max_tokens': 5})
    """
    custom_id = f"line {number}"  # not the number alone: that may be another line's custom_id
    try:
        line = json.loads(raw.decode())
        _check_line(isinstance(line, dict), "a line must be a JSON object")
        if "body" not in line and not line.keys().isdisjoint({"prompt", "messages"}):
            url = CHAT_PATH if "messages" in line else COMPLETIONS_PATH
            line = {"custom_id": line.pop("custom_id", str(number)), "url": url, "body": line}

        _check_line(isinstance(line.get("custom_id"), str), "custom_id must be a string")
        custom_id = line["custom_id"]
        _check_line(isinstance(line.get("body"), dict), "body must be a JSON object")
        _check_line(line.get("method", "POST") == "POST", "method must be POST")
        is_path = str(line.get("url")).startswith("/")
        _check_line(is_path, "url must be a path like /v1/chat/completions")
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line ")[0]  # json's own numbers are of no use here
        return _BatchLine(number, custom_id, problem=f"line {number}: {reason}")
    return _BatchLine(number, custom_id, line["url"], line["body"])


def _check_line(is_valid: bool, problem: str) -> None:
    if not is_valid:
        raise ValueError(problem)


def _build_result_line(custom_id: str, reply_id: str, response: Any, error: Any = None) -> bytes:
    line = {"id": f"vllm-{reply_id}", "custom_id": custom_id, "response": response, "error": error}
    try:
        return _encode(line) + b"\n"
    except ConfigurationError:  # NaN, or a lone surrogate that the server wrote as \ud83d
        return json.dumps(_to_json(line), allow_nan=False).encode() + b"\n"


def _build_failure_line(custom_id: str, error: Exception) -> bytes:
    """Return a failure as vLLM writes one with a status, and OpenAI one without."""
    kind = type(error).__name__
    status = getattr(error, "status_code", None)
    reply_id = getattr(error, "request_id", None) or _new_id()
    if status is None:
        return _build_result_line(custom_id, reply_id, None, {"code": kind, "message": str(error)})

    message = getattr(error, "server_message", "") or str(error)
    details = {"message": message, "type": kind, "param": None, "code": status}
    response = {"status_code": status, "request_id": reply_id, "body": None}
    return _build_result_line(custom_id, reply_id, response, {"error": details})


# ---- Many calls: batches ----------------------------------------------------

MAX_BREAKS: Final = 3  # of the connection, by one line, while its server is there
SERVER_GONE_S: Final = 300.0  # how long a batch waits for servers that have stopped answering
SERVER_PAUSE_S: Final = (0.5, 30.0)  # the limits of a pause before a server is tried again
FULL_STATUS: Final = frozenset({429, 503})


class _BatchFiles:
    """The lines of a batch, and their results in this run and in earlier ones.

    `counts`: of lines, by their last result: True, False, or None without one. The ids are in a
    temporary database, since a dict of a million takes 150 MB.
    """

    def __init__(self, source: str, target: str, stack: ExitStack) -> None:
        import sqlite3

        self.counts: collections.Counter[bool | None] = collections.Counter()
        self._target = target
        self._size = 0  # of the target's whole lines
        self._lock = threading.Lock()
        database = sqlite3.connect("", check_same_thread=False)  # never used by two at once
        database.execute("CREATE TABLE ids (id PRIMARY KEY, line, is_done) WITHOUT ROWID")
        self._ids = stack.enter_context(closing(database))
        try:
            self._source = stack.enter_context(_open_source(source))
            if os.path.isfile(target):
                self._note_results()
            self._note_lines()
            self._output: Any = sys.stdout.buffer
            if target != "-":
                self._output = stack.enter_context(io.FileIO(target, "ab"))
        except OSError as error:
            raise ConfigurationError(f"cannot open {error.filename}: {error.strerror}") from error
        self._cut()

    def lines(self) -> Iterator[_BatchLine]:
        r"""Yield the lines that are not blank. They end at \n only: JSON may hold other breaks."""
        self._source.seek(0)
        for number, raw in enumerate(self._source, 1):
            text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if text.strip():
                yield _parse_batch_line(number, text)

    def find(self, custom_id: str) -> tuple[int | None, bool | None]:
        """Return the line of an id, and its last result; None where there is none."""
        query = "SELECT line, is_done FROM ids WHERE id = ?"
        return next(self._ids.execute(query, (ascii(custom_id),)), (None, None))

    def write(self, line: bytes) -> None:
        """Write a result at once, from any thread; on a full disk, leave the file as it was."""
        with self._lock:
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._output.write(rest) :]
                self._output.flush()
            except OSError:
                self._cut()
                raise
            self._size += len(line)

    def _cut(self) -> None:
        if os.path.isfile(self._target):  # not standard output, a pipe or a device
            self._output.truncate(self._size)

    def _note(self, custom_id: str, line: int | None, is_done: bool | None) -> None:
        values = (ascii(custom_id), line, is_done)  # SQLite takes no lone surrogates
        self._ids.execute("REPLACE INTO ids VALUES (?, ?, ?)", values)

    def _note_results(self) -> None:
        """Note the results of earlier runs, of which the last of an id counts."""
        with open(self._target, "rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break  # cut off when an earlier run was killed
                self._size += len(raw)
                try:
                    line = json.loads(raw.decode())
                    status = (line["response"] or {"status_code": 0})["status_code"]
                    self._note(str(line["custom_id"]), None, 200 <= status < 300)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    problem = "is not the result of a batch; is it the right file?"
                    message = f"line {number} of {self._target} {problem}"
                    raise ConfigurationError(message) from error

    def _note_lines(self) -> None:
        """Note and count the lines; raise for an id that comes twice."""
        for line in self.lines():
            first, is_done = self.find(line.custom_id)
            if first is not None:
                where = f"{_quoted(line.custom_id)} is on lines {first} and {line.number}"
                raise ConfigurationError(f"custom_id {where}; give each line its own")
            self._note(line.custom_id, line.number, is_done)
            self.counts[is_done] += 1


def _open_source(path: str) -> BinaryIO:
    """Return the file, which is read twice; standard input is copied to a temporary one first."""
    if path != "-":
        return open(path, "rb")
    import tempfile

    copied = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the caller
    copied.writelines(sys.stdin.buffer)
    return copied


class _LineResult(NamedTuple):
    error: str | None
    usage: Usage = Usage(0, 0, 0)


@dataclass(slots=True)
class _Server:
    client: VLLMClient
    places: int  # that are free; below 0 while it does the work of others
    next_try_at: float = -math.inf  # it is left alone until then


class _Batch:
    """A batch while it runs. A line goes to the server with the most free places."""

    def __init__(
        self, clients: Sequence[VLLMClient], concurrency: int | None, params: Mapping[str, Any]
    ) -> None:
        self._params = params
        self._limits = _read_limits(clients[0].config, params)
        self._is_stopped = threading.Event()  # which ends the waiting for servers
        self._silent_since = -math.inf  # no server has answered since then; inf while one does
        self._lock = threading.Lock()
        self._servers: list[_Server] = []
        for client in clients:
            places = _read_count("concurrency", concurrency, client.config.max_concurrency)
            self._servers.append(_Server(client, places))

    def run(self, source: str, target: str, *, retry_failed: bool, progress: bool) -> BatchReport:
        started_at = time.monotonic()
        with suppress(OSError):  # one of them does not exist, or is "-"
            if os.path.samefile(source, target):
                raise ConfigurationError(f"source and target are the same file: {target}")
        places = sum(server.places for server in self._servers)
        left_alone = (True,) if retry_failed else (True, False)
        tally: collections.Counter[str] = collections.Counter()  # names as in BatchReport
        first_error: str | None = None

        with ExitStack() as stack:
            files = _BatchFiles(source, target, stack)
            self._files = files
            lines = (one for one in files.lines() if files.find(one.custom_id)[1] not in left_alone)
            counts = files.counts
            left = counts.total() - sum(counts[one] for one in left_alone)
            results = _map_in_threads(
                self._run_line, lines, places, is_ordered=False, progress=progress, total=left
            )
            stack.enter_context(closing(results))
            stack.callback(self._is_stopped.set)
            for result in results:
                tally["done" if result.error is None else "failed"] += 1
                tally["input_tokens"] += result.usage.input_tokens
                tally["output_tokens"] += result.usage.output_tokens
                first_error = first_error or result.error

        tally["skipped"] = counts[True]
        tally["failed"] += counts.total() - counts[True] - left
        seconds = time.monotonic() - started_at
        return BatchReport(counts.total(), seconds=seconds, first_error=first_error, **tally)

    def _run_line(self, line: _BatchLine) -> _LineResult:
        try:
            if line.problem:
                raise ConfigurationError(line.problem)
            reply_id, payload = self._send(line)
        except (VLLMError, TypeError) as error:
            if isinstance(error, AbortError) or self._are_gone():
                raise
            self._files.write(_build_failure_line(line.custom_id, error))
            prefix = f"line {line.number}: "
            return _LineResult(prefix + str(error).removeprefix(prefix))

        response = {"status_code": 200, "request_id": reply_id, "body": payload}
        self._files.write(_build_result_line(line.custom_id, reply_id, response))
        counts = payload.get("usage") if isinstance(payload, dict) else None  # or a list, or text
        return _LineResult(None, _parse_usage(counts if isinstance(counts, dict) else {}))

    def _send(self, line: _BatchLine) -> tuple[str, Any]:
        """Return the id and the payload of a reply; wait for servers that are full or silent."""
        started_at = time.monotonic()
        deadline_at = started_at + self._limits.deadline
        breaks = 0

        while not self._is_stopped.is_set():
            with self._place() as server:
                try:
                    reply = self._request(server.client, line, deadline_at)
                    self._silent_since = math.inf
                    return reply
                except VLLMError as error:
                    status = error.status_code
                    is_break = isinstance(error, NetworkError | StreamError) or status == 502
                    now = time.monotonic()
                    if is_break and not _is_answering(server.client):
                        self._silent_since = min(self._silent_since, now)
                    else:
                        self._silent_since = math.inf
                        breaks += is_break
                        if breaks == MAX_BREAKS or not (is_break or status in FULL_STATUS):
                            raise

                    # The pause is about as long as the server has been waited for.
                    pause_s = min(max(now - started_at, SERVER_PAUSE_S[0]), SERVER_PAUSE_S[1])
                    pause_s = max(pause_s * random.uniform(0.5, 1), error.retry_after or 0.0)
                    server.next_try_at = now + pause_s

                    retry_at = min(one.next_try_at for one in self._servers)
                    if retry_at >= deadline_at or self._are_gone():
                        raise
            self._is_stopped.wait(retry_at - time.monotonic())
        raise AbortError("the batch was stopped")  # pragma: no cover  # between two looks

    @contextmanager
    def _place(self) -> Iterator[_Server]:
        """Hold a place at the server with the most free ones, of those not left alone."""
        with self._lock:
            now = time.monotonic()
            ready = [server for server in self._servers if now >= server.next_try_at]
            server = max(ready or self._servers, key=lambda one: one.places)
            server.places -= 1
        try:
            yield server
        finally:
            with self._lock:
                server.places += 1

    def _are_gone(self) -> bool:
        now = time.monotonic()
        are_left_alone = all(server.next_try_at > now for server in self._servers)
        return are_left_alone and now - self._silent_since > SERVER_GONE_S

    def _request(self, client: VLLMClient, line: _BatchLine, deadline_at: float) -> tuple[str, Any]:
        body = {**self._params, **line.body}  # the batch's parameters are defaults
        if line.url not in GENERATION_PATHS:
            for name in CALL_LIMITS:
                body.pop(name, None)
            left_s = max(0.001, deadline_at - time.monotonic())
            limits = {"timeout": self._limits.timeout, "deadline": left_s}
            return _new_id(), client.post(line.url, body, **limits)

        for name in ("stream", "stream_options"):  # a result is a whole reply
            body.pop(name, None)
        if line.url == CHAT_PATH:
            request = build_chat_request(client.config, body.pop("messages", None), **body)
        else:
            request = build_completion_request(client.config, body.pop("prompt", None), **body)
        reply = client._complete(line.url, request, self._limits, deadline_at)
        return reply.request_id, reply.payload


def _is_answering(client: VLLMClient) -> bool:
    """Return whether a server that broke a connection is there: then the request is the reason."""
    try:
        client.get("/health", timeout=HEALTH_LOOK_S)
    except VLLMError as error:
        return isinstance(error, StatusError) and not error.retryable
    return True


# ---- Many calls: scores -----------------------------------------------------

SCORES_AT_ONCE: Final = 8  # each is a full prefill with (tokens x vocabulary) floats on the GPU
RENDER_OPTIONS: Final = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
TOKENIZE_OPTIONS: Final = ("model", "timeout", "deadline")


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a model finds a text. `logprob` is the sum over `tokens`, in nats.

    `text`: what the tokens spell; it begins before the given text where a token spans the boundary.
    A first token without a context has no log probability and does not count. `is_greedy`: each
    token is the most probable. `probability`: exp(logprob); from choose(), the share among choices.
    """

    text: str
    logprob: float
    tokens: tuple[TokenLogprob, ...]
    is_greedy: bool
    probability: float

    @property
    def logprob_per_token(self) -> float:
        """Return logprob / number of tokens that have one."""
        return self.logprob / sum(token.logprob is not None for token in self.tokens)

    @property
    def perplexity(self) -> float:
        """Return exp(-logprob_per_token)."""
        return _to_perplexity(self.logprob_per_token)

    @property
    def logprob_per_byte(self) -> float:
        """Return logprob / UTF-8 bytes of the text."""
        return self.logprob / len(self.text.encode())

    @property
    def bits_per_byte(self) -> float:
        """Return -logprob_per_byte / ln 2."""
        return -self.logprob_per_byte / math.log(2)


def _to_perplexity(mean_logprob: float) -> float:
    try:
        return math.exp(-mean_logprob)
    except OverflowError:  # above e^709
        return math.inf


class _ScoreRequest(NamedTuple):
    """The token ids of a context and a text; those from `start` on spell `text`."""

    ids: list[int]
    start: int
    text: str


class _Scorer:
    """Scores texts after one context, a string or messages."""

    def __init__(self, client: VLLMClient, context: Any, params: Mapping[str, Any]) -> None:
        self._client = client
        self._context = context
        self._params = dict(params)
        self._options = {name: params[name] for name in TOKENIZE_OPTIONS if name in params}
        rendering = {name: self._params.pop(name) for name in RENDER_OPTIONS if name in params}
        self._context_ids = client.tokenize(context, **self._options, **rendering)

    def build_request(self, text: str) -> _ScoreRequest:
        """Return the tokens of both; those of a string and a text are the tokens of one string."""
        if not isinstance(text, str):
            raise ConfigurationError(f"a text to score must be a string, got {type(text).__name__}")
        if isinstance(self._context, str):
            ids = self._client.tokenize(self._context + text, **self._options)
            start = len(os.path.commonprefix([ids, self._context_ids]))  # noqa: RUF071  # not paths
        else:
            own = self._client.tokenize(text, add_special_tokens=False, **self._options)
            ids = [*self._context_ids, *own]
            start = len(self._context_ids)

        if len(ids) <= max(1, start):
            problem = "a text to score must have a token of its own after the context"
            raise ConfigurationError(problem)
        if start < len(self._context_ids):
            text = self._client.detokenize(ids[start:])
        return _ScoreRequest(ids, start, text)

    def score(self, request: _ScoreRequest) -> Score:
        reply = self._complete(request.ids, prompt_logprobs=0)
        known = list(filter(None, reply.choices[0].prompt_logprobs[1:]))  # the first has none
        if [token.token_id for token in known] != request.ids[1:]:
            count = f"prompt_logprobs for {len(known)} of {len(request.ids) - 1} tokens"
            raise ProtocolError(f"{count}: {self._client.config.base_url}; is it vLLM?")

        tokens = known[max(0, request.start - 1) :]
        score = _to_score(request.text, tokens, is_greedy=all(token.rank == 1 for token in tokens))
        if request.start > 0:
            return score
        first = TokenLogprob(self._client.detokenize(request.ids[:1]), None)
        return replace(score, tokens=(first, *tokens))

    def score_single_tokens(self, requests: Sequence[_ScoreRequest]) -> list[Score] | None:
        """Return the scores of texts of one token, by one request; None where that cannot be."""
        context_ids = requests[0].ids[:-1]
        if any(one.ids[:-1] != context_ids or one.start < len(context_ids) for one in requests):
            return None

        ids = sorted({one.ids[-1] for one in requests})
        options = {"logprobs": 0, "return_tokens_as_token_ids": True}
        try:
            reply = self._complete(context_ids, logprob_token_ids=ids, **options)
            sampled = reply.logprobs[0]
        except (InvalidRequestError, IndexError):
            return None  # more than 128, for one
        by_id = {token.token_id: token for token in (*sampled.top, sampled)}
        if not by_id.keys() >= set(ids):
            return None  # vLLM up to 0.25 ignores the parameter

        scores = []
        for request in requests:
            token = by_id[request.ids[-1]]._replace(token=request.text, top=())
            is_greedy = token.token_id == sampled.token_id
            scores.append(_to_score(request.text, [token], is_greedy=is_greedy))
        return scores

    def _complete(self, ids: list[int], **params: Any) -> Completion:
        fixed = {"max_tokens": 1, "temperature": 0}
        return self._client.complete(ids, **{**self._params, **fixed, **params})


def _to_score(text: str, tokens: Sequence[TokenLogprob], *, is_greedy: bool) -> Score:
    # None: the server computed NaN.
    values = [-math.inf if token.logprob is None else token.logprob for token in tokens]
    logprob = math.fsum(values)
    return Score(text, logprob, tuple(tokens), is_greedy, math.exp(logprob))


def _rank(scores: list[Score]) -> list[Score]:
    """Return the scores with their shares of the probability, the best first."""
    scores.sort(key=lambda score: score.logprob, reverse=True)
    best = scores[0].logprob
    if best == -math.inf:
        return scores  # no choice has any probability

    weights = [math.exp(score.logprob - best) for score in scores]
    total = math.fsum(weights)
    pairs = zip(scores, weights, strict=True)
    return [replace(score, probability=weight / total) for score, weight in pairs]


# ---- Pictures ---------------------------------------------------------------

LEAST_LIKELY_SHOWN: Final = 10
CONTEXT_CHARACTERS: Final = 24  # of the text before each of them
_GLYPHS: Final = {" ": "·", "\t": "→", "\n": "↵"}
# Every rule starts with the class, since a notebook puts the fragment beside its own HTML.
# Canvas and CanvasText are the browser's own colours, which follow the color scheme.
_STYLE: Final = """
.vllm-heatmap { color-scheme: light dark; --light: 84%; background: Canvas; color: CanvasText;
  max-width: 62rem; margin: 0 auto; padding: 0.5rem 1rem; font: 0.95rem/1.5 system-ui, sans-serif }
@media (prefers-color-scheme: dark) { .vllm-heatmap { --light: 27% } }
.vllm-heatmap h1, .vllm-heatmap h2 { font-size: 1.15rem; overflow-wrap: anywhere }
.vllm-heatmap pre, .vllm-heatmap ol { font-family: ui-monospace, monospace; font-size: 1em }
.vllm-heatmap pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9 }
.vllm-heatmap ol { overflow-wrap: anywhere; color: color-mix(in srgb, CanvasText 65%, Canvas) }
.vllm-heatmap span { background: hsl(var(--hue) 75% var(--light)); color: CanvasText;
  border-radius: 3px; padding: 0.1em 0; margin-right: 1px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone }
.vllm-heatmap span:hover { outline: 2px solid CanvasText }
.vllm-heatmap i { position: relative }
.vllm-heatmap i::before { content: attr(data-glyph); position: absolute; left: 0; opacity: 0.5;
  font-style: normal }
.vllm-heatmap i[data-glyph="↵"]::before { position: static }
.vllm-heatmap ol i:not([data-glyph="↵"]) { white-space: pre-wrap }
.vllm-heatmap .scale { display: inline-block; padding: 0 0.5em; border-radius: 3px;
  background: linear-gradient(90deg in hsl, hsl(0 75% var(--light)), hsl(120 75% var(--light))) }
"""
# No script may run and nothing may be loaded, even if an escape were wrong.
_HEAD: Final = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
"""


def to_html(completion_or_score: Completion | Score, title: str = "") -> str:
    """Return a heat map of log probabilities: one static page without scripts.

    Each token is tinted by its probability, from red (0) to green (1), and its tooltip lists the
    alternatives. Perplexity, mean probability and the least likely tokens stand above the text.
    A Completion has to be requested with `logprobs=N`; each of its choices is shown.
    """
    heading = _to_visible(title or "Log probabilities", {})
    fragment = _to_fragment(completion_or_score, title)
    return f"{_HEAD}<title>{heading}</title></head><body>\n{fragment}</body></html>\n"


def _to_fragment(value: Completion | Score, title: str = "") -> str:
    if isinstance(value, Completion):
        sections = [_to_section(choice.text, choice.logprobs) for choice in value.choices]
    else:
        sections = [_to_section(value.text, value.tokens)]

    if len(sections) > 1:
        sections = [f"<h2>Choice {n}</h2>\n{section}" for n, section in enumerate(sections, 1)]
    if title:
        sections.insert(0, f"<h1>{_to_visible(title, {})}</h1>\n")
    return f'<article class="vllm-heatmap"><style>{_STYLE}</style>\n{"".join(sections)}</article>\n'


def _to_section(text: str, tokens: Sequence[TokenLogprob]) -> str:
    # The first token of a prompt has none: nothing stands before it.
    known = [(token.logprob, at) for at, token in enumerate(tokens) if token.logprob is not None]
    if not known:
        return f"<p>No log probabilities; request logprobs=5.</p>\n<pre>{_to_visible(text)}</pre>\n"

    perplexity = _to_perplexity(sum(logprob for logprob, _ in known) / len(known))
    mean = sum(math.exp(logprob) for logprob, _ in known) / len(known)
    rows = [_to_row(tokens, at) for _, at in sorted(known)[:LEAST_LIKELY_SHOWN]]
    return (
        f"<p>Perplexity <b>{perplexity:.4g}</b> · mean probability <b>{_to_figure(mean)}</b> · "
        f'{len(known):,} tokens · probability <b class="scale">0 … 1</b></p>\n'
        "<details open><summary>Least likely tokens</summary>\n"
        f"<ol>\n{''.join(rows)}</ol></details>\n"
        f'<pre dir="auto">{"".join(map(_to_span, tokens))}</pre>\n'
    )


def _to_row(tokens: Sequence[TokenLogprob], at: int) -> str:
    """Return one of the least likely tokens as a list item, with the end of the text before it."""
    token = tokens[at]
    before = "".join(map(_token_text, tokens[max(0, at - CONTEXT_CHARACTERS) : at]))
    context = _to_visible(before[-CONTEXT_CHARACTERS:])
    row = f"<li>{_to_figure(token.probability)} {context}{_to_span(token)} token {at + 1:,}"
    if token.top and token.top[0].token != token.token:
        row += f", most likely {html.escape(_to_alternative(token.top[0]))}"
    return f"{row}</li>\n"


def _to_span(token: TokenLogprob) -> str:
    lines = [_to_alternative(one) for one in (token, *token.top)]
    style = ""
    if token.logprob is not None:
        lines[0] += f" (log probability {token.logprob:.4f})"
        style = f' style="--hue:{120 * math.exp(min(token.logprob, 0.0)):.0f}"'

    tooltip = html.escape("\n".join(lines))
    shown = _to_visible(_token_text(token) or "∅")  # vLLM gives "" for a part of a character
    return f'<span{style} title="{tooltip}">{shown}</span>'


def _token_text(token: TokenLogprob) -> str:
    r"""Return the token's text; bytes that are no whole character are shown like \xe3."""
    if token.bytes:
        return token.bytes.decode("utf-8", "backslashreplace")
    return token.token


def _to_alternative(token: TokenLogprob) -> str:
    return f"{_token_text(token)!r}: {_to_figure(token.probability)}"


def _to_figure(probability: float | None) -> str:
    if probability is None:
        return "unknown"
    return f"{probability:.3f}" if probability >= 0.001 else f"{probability:.1g}"


def _to_visible(text: str, glyphs: Mapping[str, str] = _GLYPHS) -> str:
    r"""Return text as HTML; white space gets glyphs, control characters show as \u202e."""
    pieces = []
    for character in text:
        if character in glyphs:
            # Drawn over the character itself, so that the text can be searched, copied and wrapped.
            pieces.append(f'<i data-glyph="{glyphs[character]}">{character}</i>')
        elif character.isprintable():
            pieces.append(html.escape(character))
        else:  # lone surrogates too
            pieces.append(character.encode("unicode_escape").decode())
    return "".join(pieces)


# ---- Amplifier adapter ------------------------------------------------------
#
# Vocabulary, events and asyncio.to_thread around the client. amplifier_core and asyncio are
# imported where they are used.

AMPLIFIER_RETRIES: Final = 6  # half a minute: nobody watches a session
DISCOVERY_S: Final = 5.0  # for the list of models, which a call can do without
HOOK_GRACE_S: Final = 2.0  # after a cancellation, for hooks that still hold the last events
SPARE_THREADS: Final = 512  # for the host, DNS and further providers; started on demand only
PROVIDER_EVENTS: Final = (
    "llm:request llm:response provider:retry provider:tool_sequence_repaired"
    " llm:stream_block_start llm:stream_block_delta llm:stream_block_end llm:stream_aborted"
    " llm:request:debug llm:response:debug llm:request:raw llm:response:raw"
).split()

_Options = tuple[Mapping[str, Any], tuple[list[Completion], ...]]
_OPTIONS: Final[contextvars.ContextVar[_Options]] = contextvars.ContextVar(
    "vllm_provider_options", default=({}, ())
)


def _kernel(name: str) -> Any:
    """Return a module of Amplifier's kernel, which a program without Amplifier does not have."""
    import importlib

    return importlib.import_module(f"amplifier_core.{name}")


async def mount(coordinator: Any, config: Mapping[str, Any] | None = None) -> Callable[[], Any]:
    """Mount a VLLMProvider as "vllm" and return its cleanup; raise ConfigurationError.

    No server is contacted. The running loop's default executor is replaced by a larger one,
    unless the host has chosen its own.
    """
    provider = VLLMProvider(config=VLLMConfig.from_mapping(config or {}), coordinator=coordinator)
    _widen_executor(provider.config.max_concurrency)
    await coordinator.mount("providers", provider, name="vllm")

    # The session's log writes the kernel's own events anyway, and these a second time.
    events = [name for name in PROVIDER_EVENTS if name not in _kernel("events").ALL_EVENTS]
    if hasattr(coordinator, "register_contributor"):
        coordinator.register_contributor("observability.events", "vllm", lambda: events)
    return provider.close


async def on_session_ready(coordinator: Any) -> None:
    """Ask each mounted provider's server for its limits, once; a failure is one warning."""
    import asyncio

    mounted = (coordinator.get("providers") or {}).values()
    catalogues = [one.catalogue for one in mounted if isinstance(one, VLLMProvider)]
    await asyncio.gather(*map(_Catalogue.discover, catalogues))


def _widen_executor(calls: int) -> None:
    """Replace the stock executor: it has min(32, cores + 4) threads, and DNS needs them too."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    loop = asyncio.get_running_loop()
    current = getattr(loop, "_default_executor", "hidden")  # there is no public way to see it
    prefix = getattr(current, "_thread_name_prefix", "")
    if current is None or prefix.startswith("asyncio"):
        threads = SPARE_THREADS + calls
        loop.set_default_executor(ThreadPoolExecutor(threads, thread_name_prefix="vllm_provider"))
    elif not prefix.startswith("vllm_provider"):
        bound = getattr(current, "_max_workers", "an unknown number of")
        logger.info("the host's own executor is kept: %s calls run at once", bound)


@contextmanager
def request_options(**params: Any) -> Iterator[list[Completion]]:
    """Carry request parameters through a session; yield the list that collects its Completions.

    They hold inside the `with`, also in tasks started there, over the configuration and under
    the request's own fields:
    `with request_options(logprobs=1) as calls: await session.execute("Hello")`.
    """
    outer, lists = _OPTIONS.get()
    calls: list[Completion] = []
    token = _OPTIONS.set(({**outer, **params}, (*lists, calls)))
    try:
        yield calls
    finally:
        _OPTIONS.reset(token)


class VLLMProvider:
    """vLLM for Amplifier: `complete(ChatRequest) -> ChatResponse`, with the kernel's events.

    `config`: a VLLMConfig, or a mapping with its keys. Raises ConfigurationError (a ValueError)
    without a base_url, since VLLM_BASE_URL is for mount() to read. Connects when it is used.
    """

    name = "vllm"

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        config: VLLMConfig | Mapping[str, Any] | None = None,
        coordinator: Any = None,
    ) -> None:
        if not isinstance(config, VLLMConfig):
            arguments = {"base_url": base_url, "api_key": api_key}
            given = {name: value for name, value in arguments.items() if _is_given(value)}
            settings = {**(config or {}), **given}
            if not _is_given(settings.get("base_url")):
                raise ConfigurationError(
                    "No base_url found: set base_url in the provider's config, or VLLM_BASE_URL"
                )
            config = VLLMConfig.from_mapping(settings)

        self.config = config
        self.coordinator = coordinator
        self.priority = config.priority
        self.default_model = config.default_model
        self.client = VLLMClient(config, max_retries=0)  # retries are announced, so they are ours
        self.catalogue = _Catalogue(self.client, config)
        self.announced_repairs: set[str] = set()
        self.semaphores: weakref.WeakKeyDictionary[Any, Any] = (
            weakref.WeakKeyDictionary()
        )  # by loop
        self._running: set[Any] = set()

    def get_info(self) -> Any:
        """Return the kernel's ProviderInfo; its fields are what the application's wizard asks."""
        kernel = _kernel("models")

        def ask(key: str, title: str, kind: str = "text", **options: Any) -> Any:
            prompt = f"{title} of vLLM"
            return kernel.ConfigField(
                id=key, display_name=title, prompt=prompt, field_type=kind, **options
            )

        url = "http://localhost:8000"
        mode = str(self.config.use_completions).lower()
        defaults = {"model": self.default_model, "timeout": self.config.timeout}
        return kernel.ProviderInfo(
            id="vllm",
            display_name="vLLM",
            credential_env_vars=["VLLM_API_KEY"],
            capabilities=["streaming", "tools", "reasoning", "json_mode", "logprobs"],
            defaults={**defaults, **self.catalogue.find_limits()},
            config_fields=[
                ask("base_url", "Server URL", env_var="VLLM_BASE_URL", default=url),
                ask("api_key", "API key", "secret", env_var="VLLM_API_KEY", required=False),
                # Enter stores the default in the place of the value there is.
                ask("use_completions", "/v1/completions", "boolean", default=mode, required=False),
            ],
        )

    def get_model_info(self) -> Any:
        """Return the kernel's ModelInfo; None, with one warning, while a limit is unknown."""
        limits = self.catalogue.find_limits()
        if limits:
            return _to_model_info(self.catalogue.find_card().id, limits)
        text = "the context window is unknown, so history is not compacted: set context_window"
        self.catalogue.log(logging.WARNING, text)
        return None

    async def list_models(self) -> list[Any]:
        """Return the server's models as ModelInfo; raise the kernel's error if it cannot tell."""
        catalogue = self.catalogue
        try:
            await catalogue.update(self.config.timeout)
        except VLLMError as error:
            raise _to_kernel_error(error, None) from error
        return [_to_model_info(card.id, catalogue.find_limits(card.id)) for card in catalogue.cards]

    def parse_tool_calls(self, response: Any) -> list[Any]:
        """Return the tool calls of a response."""
        return list(response.tool_calls or [])

    async def close(self) -> None:
        """Stop the calls in flight and close the connections; may be called again."""
        self.client.close()

    async def complete(self, request: Any, **options: Any) -> Any:
        """Return the kernel's ChatResponse to a ChatRequest; raise the kernel's errors.

        A parameter is taken from the configuration < request_options() < request < keywords. On
        cancellation, of the task or of the session, the server is stopped first; an answer that
        is whole by then is returned. llm:response is emitted once in every case.
        """
        import asyncio

        turn = _Turn(self, request, options)
        work = asyncio.ensure_future(turn.work())
        self._running.add(work)  # it outlives this call where a hook does not end
        work.add_done_callback(self._running.discard)

        is_cancelled = False
        while not work.done() and time.monotonic() < turn.gives_up_at:
            turn.check_session()
            if is_cancelled:
                turn.stop(asyncio.CancelledError("cancelled"))
            try:
                await asyncio.wait({work}, timeout=POLL_S)
            except asyncio.CancelledError:
                is_cancelled = True

        if is_cancelled and turn.response is None:
            raise asyncio.CancelledError
        return turn.result()

    async def _emit(self, name: str, payload: dict[str, Any]) -> None:
        """Emit an event; a hook that fails is logged, since it must not fail the call."""
        hooks = getattr(self.coordinator, "hooks", None)
        if hooks is None:
            return
        try:
            await hooks.emit(name, payload)
        except Exception as error:  # noqa: BLE001  # whatever a hook does
            logger.warning("the event %s could not be emitted: %s", name, error)


class _Catalogue:
    """The models that a server listed, and the limits to plan with."""

    def __init__(self, client: VLLMClient, config: VLLMConfig) -> None:
        self._client = client
        self._config = config
        self.cards: Sequence[ModelCard] = ()
        self._asked_at = -math.inf
        self._logged: set[str] = set()

    async def discover(self, deadline_s: float = DISCOVERY_S) -> None:
        """Ask for the models, unless they are known or that failed within the last minute."""
        if self.cards or time.monotonic() - self._asked_at < MODEL_RETRY_S:
            return
        try:
            await self.update(min(deadline_s, DISCOVERY_S))
        except VLLMError as error:
            self.log(logging.WARNING, "the limits of the models are unknown: %s", error)

    async def update(self, deadline_s: float) -> None:
        """Ask for the models; when this task is cancelled the request is stopped."""
        import asyncio

        with _CallGroup() as group:
            try:
                self.cards = await asyncio.to_thread(self._client.models, deadline=deadline_s)
            finally:
                group.stop()
                self._asked_at = time.monotonic()

        window = self._config.context_window
        maximum = self.find_limits().get("context_window")
        if window not in (None, maximum):
            text = "context_window=%d is more than the server's: %d counts"
            self.log(logging.INFO, text, window, maximum)

    def log(self, level: int, text: str, *values: object) -> None:
        """Log a text, the second time on at DEBUG."""
        if text in self._logged:
            level = logging.DEBUG
        self._logged.add(text)
        logger.log(level, text, *values)

    def find_limits(self, model: str | None = None) -> dict[str, int]:
        """Return the context window and the longest output to plan with; {} while unknown."""
        card = self.find_card(model)
        windows = filter(None, (card.max_model_len, self._config.context_window))
        window = min(windows, default=None)
        if window is None:
            return {}

        output = self._config.max_output_tokens
        if output is None:
            output = min(window // 4, 16384)  # what is planned for it is lost to the history
        output = min(filter(None, (output, card.max_output_tokens, window)))
        return {"context_window": window, "max_output_tokens": output}

    def find_card(self, model: str | None = None) -> ModelCard:
        """Return the card of a model, or of the one that answers who names none.

        Its limits are unknown where the server lists no such model; then so is a name not given.
        """
        name = model or self._config.default_model
        for card in self.cards:
            if name in (None, card.id):
                return card
        return ModelCard(name or "")


_Judged = tuple[Completion, VLLMError | None]  # a whole reply, and why it is no answer


class _Turn:
    """One complete(), over all its attempts.

    `response` is set as soon as the answer is whole. After `gives_up_at`
    nobody waits for hooks any longer.
    """

    def __init__(self, provider: VLLMProvider, request: Any, options: Mapping[str, Any]) -> None:
        import asyncio

        config = provider.config
        self._provider = provider
        self._emit = provider._emit
        self._params = _to_params(request, options)
        self._messages, self._repairs = _to_template_messages(_to_wire_messages(request.messages))
        self._request_id = str(self._params.get("request_id") or _new_id())
        metadata = options.get("metadata") or request.metadata or {}
        self._is_shown = config.use_streaming and metadata.get("stream") is not False
        self.model: str | None = self._params.get("model")

        self._body: dict[str, Any] = {}
        self._open: Callable[..., Stream] = provider.client._open
        self._started_at = time.monotonic()
        self._deadline_at = math.inf
        self._calls = _CallGroup()
        self._stopped = asyncio.get_running_loop().create_future()

        self._retries = 0
        self._replies: list[_Judged] = []
        self._finish_reason: str | None = None
        self.response: Any = None
        self._error: BaseException = AbortError("the call did not end")
        self._stop_error: BaseException | None = None
        self.gives_up_at = math.inf

    def check_session(self) -> None:
        """Stop the turn if its session was cancelled, which does not cancel the task."""
        token = getattr(self._provider.coordinator, "cancellation", None)
        if getattr(token, "is_immediate", False) is True:
            self.stop(AbortError("the session was cancelled"))

    def stop(self, error: BaseException) -> None:
        """Stop the calls in flight, and make _run() raise the error; the first stop counts."""
        if self._stop_error is None:
            self._stop_error = error
            self.gives_up_at = time.monotonic() + HOOK_GRACE_S
            self._stopped.set_result(None)
            self._calls.stop()

    async def work(self) -> None:
        """Set the response or the error, and emit llm:response; nothing cancels this."""
        try:
            with self._calls:
                await self._begin()
                await self._answer()
        except BaseException as error:  # noqa: BLE001  # complete() raises it
            self._error = self._stop_error or error
        await self._report()

    def result(self) -> Any:
        """Return the response; raise what there is in its place, as the kernel's error."""
        if self.response is not None:
            return self.response
        error = self._stop_error or self._error
        if isinstance(error, VLLMError):
            raise _to_kernel_error(error, self.model) from error
        raise error  # pragma: no cover  # a fault of the host's

    async def _run(self, work: Awaitable[Any]) -> Any:
        """Return the result of `work`; once the turn is stopped, cancel it and raise the reason."""
        import asyncio

        task = asyncio.ensure_future(work)
        if self._stop_error is None:
            await asyncio.wait({task, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
        if self._stop_error is None or task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        raise self._stop_error

    async def _begin(self) -> None:
        """Build the body, find the model and its limits, and announce the call."""
        catalogue = self._provider.catalogue
        try:
            self._prepare()
            if not (catalogue.find_card(self.model).id and catalogue.find_limits(self.model)):
                await self._run(catalogue.discover(self._time_left_s()))
        finally:
            self.model = catalogue.find_card(self.model).id or None
            await self._announce_repairs()
            event = {**self._names(), "message_count": len(self._messages)}
            if self._body:  # as it is before a chat template renders it
                event |= await self._emit_debug("request", _to_stream(self._body))
            await self._emit("llm:request", event)

    async def _announce_repairs(self) -> None:
        new = []
        for repair in self._repairs:
            if repair["tool_call_id"] not in self._provider.announced_repairs:
                self._provider.announced_repairs.add(repair["tool_call_id"])
                new.append(repair)
        if new:
            event = {"provider": "vllm", "repair_count": len(new), "repairs": new}
            await self._emit("provider:tool_sequence_repaired", event)

    def _prepare(self) -> None:
        """Set the body, and how it is sent; raise ConfigurationError."""
        config = self._provider.config
        use_completions = self._params.pop("use_completions", None)
        if use_completions is not None:
            config = replace(config, use_completions=use_completions)

        limits = _read_limits(config, self._params)
        self._deadline_at = self._started_at + limits.deadline
        self._body = build_chat_request(config, self._messages, **self._params)
        self._open = functools.partial(
            self._provider.client._open,
            CHAT_PATH,
            limits=limits,
            wants_stream=None,
            prompt_format=config.prompt_format if config.use_completions else None,
            request_id=self._request_id,
            deadline_at=self._deadline_at,
        )

    async def _answer(self) -> None:
        """Make attempts until one brings a whole answer; announce each retry."""
        stream = self._open(self._body)
        while self.response is None:
            blocks = _Blocks(self._emit, self._request_id, is_shown=self._is_shown)
            try:
                await self._attempt(stream, blocks)
            except BaseException as error:
                await blocks.abort(self._stop_error or error)
                if self._stop_error is not None or not isinstance(error, VLLMError):
                    raise
                stream = await self._retry(stream, error)

    async def _attempt(self, stream: Stream, blocks: "_Blocks") -> None:
        """Read a stream in a thread while its blocks are shown, and set the response."""
        import asyncio

        place = asyncio.Semaphore(self._provider.config.max_concurrency)
        semaphore = self._provider.semaphores.setdefault(asyncio.get_running_loop(), place)
        await self._run(semaphore.acquire())
        showing = asyncio.ensure_future(blocks.show())
        try:
            self.check_session()
            await self._run(asyncio.to_thread(blocks.read, stream))
            blocks.add_rest(stream.completion)
            self._accept(stream, blocks)
        finally:
            semaphore.release()
            blocks.finish()
            if self.response is None:
                await self._run(showing)  # what arrived is shown, unless the turn was stopped
        await showing

    def _accept(self, stream: Stream, blocks: "_Blocks") -> None:
        """Set the response; raise an error for a reply whose calls nobody could execute."""
        reply = stream.completion
        self._finish_reason = reply.finish_reason
        for collected in _OPTIONS.get()[1]:
            collected.append(reply)

        try:
            calls = _to_kernel_calls(reply, self._body.get("tools", ()))
        except VLLMError as error:
            self._replies.append((reply, error))
            raise
        self._replies.append((reply, None))
        self.response = _to_response(reply, blocks.blocks, calls, stream.degradation)
        self._finish_reason = self.response.finish_reason

    async def _retry(self, stream: Stream, error: VLLMError) -> Stream:
        """Announce the next attempt, wait, and return its stream; raise the error if none helps."""
        import asyncio

        config = self._provider.config
        maximum = config.max_retries
        if maximum is None:
            maximum = AMPLIFIER_RETRIES
        if self._retries >= maximum or not (error.retryable or self._is_correctable(error)):
            raise error

        delay = 0.0
        if error.retryable:
            delay = _retry_pause_s(config, error, self._retries + 1, self._time_left_s())
        self._retries += 1
        event = {"provider": "vllm", "request_id": self._request_id, "attempt": self._retries}
        event |= {"max_retries": maximum, "delay": delay}
        event |= {"error_type": type(error).__name__, "error_message": str(error)}
        await self._emit("provider:retry", event)
        await self._run(asyncio.sleep(delay))

        if error.retryable:
            return self._provider.client._reopen(stream)
        correction = _to_correction(self._replies[-1][0], error)
        self._body = {**self._body, "messages": [*self._body["messages"], *correction]}
        await self._emit_debug("request", _to_stream(self._body))
        return self._open(self._body, attempt=stream.attempts)

    def _is_correctable(self, error: VLLMError) -> bool:
        """Return whether to tell the model of its malformed call: once, unless it was cut."""
        if not isinstance(error, InvalidToolCallError) or self._finish_reason == "length":
            return False
        # vLLM up to 0.30 does not say "length" of a call that was cut.
        maximum = self._body.get("max_tokens", math.inf)
        maximum = self._body.get("max_completion_tokens", maximum)
        first, *more = self._replies
        return not more and _to_usage(first[0])["output_tokens"] < float(maximum)

    async def _report(self) -> None:
        """Emit what follows a call: the debug events of its replies, and llm:response."""
        event = {**self._names(), "retries": self._retries, "finish_reason": self._finish_reason}
        event["status"] = "ok"
        event["duration_ms"] = int((time.monotonic() - self._started_at) * 1000)
        event["usage"] = _to_usage_payload(self._replies)
        if self.response is None:
            reason = _to_reason(self._error)
            event |= {"status": "error", "error": reason["msg"], "error_type": reason["type"]}

        failed = []
        for reply, error in self._replies:
            raw = await self._emit_debug("response", reply)
            if error is None:
                event |= raw
            else:
                failed.append(
                    {**_to_reason(error), "usage": _to_usage_payload([(reply, error)]), **raw}
                )
        if failed:
            event["failed_replies"] = failed
        await self._emit("llm:response", event)

    async def _emit_debug(self, kind: str, value: Any) -> dict[str, Any]:
        """Emit the debug events that are switched on; return what `raw` adds to the plain one."""
        config = self._provider.config
        if not any((config.debug, config.raw_debug, config.raw)):
            return {}

        raw = _to_json(value, token_key="token_text")  # a hook of Amplifier's blanks "token"
        names = {"provider": "vllm", "request_id": self._request_id}
        if config.debug:
            cut = _to_json(raw, config.debug_truncate_length)
            await self._emit(f"llm:{kind}:debug", {**names, kind: cut})
        if config.raw_debug:
            await self._emit(f"llm:{kind}:raw", {**names, kind: raw})
        return {"raw": raw} if config.raw else {}

    def _names(self) -> dict[str, Any]:
        model = self.model or "unknown"
        return {"provider": "vllm", "model": model, "request_id": self._request_id}

    def _time_left_s(self) -> float:
        return self._deadline_at - time.monotonic()


@dataclass(slots=True)
class _Block:
    """A run of text or thinking, or a tool call (of length 1); its text is not kept."""

    kind: str
    call_id: str = ""
    name: str = ""
    length: int = 0


class _Blocks:
    """The blocks of one attempt in the order its deltas bring them, as shown and as returned.

    A thread reads the stream; the loop shows what comes meanwhile as one batch, so that a slow
    hook does not slow the server down.
    """

    def __init__(self, emit: Callable[..., Any], request_id: str, *, is_shown: bool) -> None:
        import asyncio

        self.blocks: list[_Block] = []
        self._added: collections.Counter[str] = collections.Counter()  # characters, calls
        self._emit = emit
        self._request_id = request_id
        self._is_shown = is_shown
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._waiting: collections.deque[tuple[int, str]] = collections.deque()
        self._is_over = False
        self._open: int | None = None  # the block that was started and has not ended
        self._sequence = 0
        self._has_shown_text = False

    def read(self, stream: Stream) -> None:
        """Read a stream to its end; for a thread of its own."""
        for delta in stream:
            if delta.index == 0:  # further choices are in the Completion alone
                self._add_text("thinking", delta.reasoning)
                self._add_text("text", delta.text)
                for call in delta.tool_calls:
                    self._add_call(call)

    def add_rest(self, reply: Completion) -> None:
        """Add what the deltas did not bring: held back text, calls that look like one."""
        self._add_text("thinking", reply.reasoning[self._added["thinking"] :])
        self._add_text("text", reply.text[self._added["text"] :])
        for call in reply.tool_calls[self._added["tool_use"] :]:
            self._add_block(_Block("tool_use", call.id, call.name, 1))

    def _add_text(self, kind: str, text: str) -> None:
        if not text:
            return
        if not self.blocks or self.blocks[-1].kind != kind:
            self._add_block(_Block(kind))
        self.blocks[-1].length += len(text)
        self._added[kind] += len(text)
        self._pass_on(text)

    def _add_call(self, call: ToolCall) -> None:
        """Add a call, unless this is one more piece of it: those of several may come in turn."""
        for block in self.blocks:
            is_named_so = block.kind == "tool_use" and block.name in ("", call.name)
            if is_named_so and block.call_id in ("", call.id):
                block.call_id = call.id  # which may come late
                return
        self._add_block(_Block("tool_use", call.id, call.name, 1))

    def _add_block(self, block: _Block) -> None:
        self.blocks.append(block)
        self._added[block.kind] += block.length
        self._pass_on("")

    def _pass_on(self, text: str) -> None:
        """Hand a piece of the last block to show(), and wake it unless it is awake."""
        if not self._is_shown:
            return
        self._waiting.append((len(self.blocks) - 1, text))
        if len(self._waiting) == 1:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                self._loop.call_soon_threadsafe(self._ready.set)

    def finish(self) -> None:
        """End show() once everything is shown; on the loop."""
        self._is_over = True
        self._ready.set()

    async def show(self) -> None:
        """Emit the blocks as they come, those pieces joined that are there."""
        is_over = False
        while not is_over:
            await self._ready.wait()
            self._ready.clear()
            is_over = self._is_over
            while self._waiting:
                pieces = [self._waiting.popleft() for _ in range(len(self._waiting))]
                for index, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
                    await self._show_text(index, "".join(text for _, text in group))
        await self._end()

    async def _show_text(self, index: int, text: str) -> None:
        if index != self._open:
            await self._end()
            self._open = index
            self._sequence = 0
            name = self.blocks[index].name
            await self._emit_block("start", index, {"name": name} if name else {})
        if text:
            self._has_shown_text = True  # already now: one hook may get it when another fails
            await self._emit_block("delta", index, {"sequence": self._sequence, "text": text})
            self._sequence += 1

    async def _end(self) -> None:
        if self._open is not None:
            await self._emit_block("end", self._open, {})
            self._open = None

    async def _emit_block(self, event: str, index: int, details: dict[str, Any]) -> None:
        kind = self.blocks[index].kind
        payload = {"request_id": self._request_id, "block_index": index, "block_type": kind}
        await self._emit(f"llm:stream_block_{event}", {**payload, **details})

    async def abort(self, error: BaseException) -> None:
        """Tell consumers to discard what they were shown."""
        await self._end()
        if self._has_shown_text:
            payload = {"request_id": self._request_id, "error": _to_reason(error)}
            await self._emit("llm:stream_aborted", payload)


# ---- Amplifier adapter: vocabulary (pure) -----------------------------------

MISSING_RESULT: Final = (
    "[SYSTEM ERROR: Tool result missing from conversation history] The call may have run or not."
)
ACKNOWLEDGEMENT: Final = "Result received."  # what stands between a tool's result and the user
_NOTE: Final = "note"  # our role for a text that joins the user message beside it
_ROLES: Final = {"developer": "system", "function": "tool"}  # which chat templates do not know
_MAX_TOKENS_NAMES: Final = frozenset({"max_tokens", "max_completion_tokens"})
_VLLM_NAMES: Final = {"max_output_tokens": "max_tokens", "reasoning": "reasoning_effort"}
_NOT_SENT: Final = frozenset({"metadata", "stream", "conversation_id"})
_REQUEST_FIELDS: Final = (
    "temperature top_p stop tool_choice reasoning_effort timeout model tools response_format"
    " max_output_tokens"
).split()
_CONTAINERS: Final[dict[type, str]] = {dict: "object", list: "array"}
_CONTENT_FILTER: Final = re.compile(
    r"content[ _-]?(filter|policy|management policy)", re.IGNORECASE
)


def _to_model_info(model: str, limits: Mapping[str, int]) -> Any:
    """Return the kernel's ModelInfo; 0 is a limit that is unknown."""
    return _kernel("models").ModelInfo(
        id=model,
        display_name=model,
        context_window=limits.get("context_window", 0),
        max_output_tokens=limits.get("max_output_tokens", 0),
        capabilities=["tools", "thinking", "streaming", "json_mode"],
    )


def _to_params(request: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's parameters: request_options() < the ChatRequest < the keywords."""
    fields = {name: getattr(request, name, None) for name in _REQUEST_FIELDS}
    params: dict[str, Any] = {}
    for layer in (_OPTIONS.get()[0], request.model_extra, fields, options):
        given = {}
        for name, value in layer.items():
            if value is not None and name not in _NOT_SENT:
                given[_VLLM_NAMES.get(name, name)] = value
        if not _MAX_TOKENS_NAMES.isdisjoint(given):  # either of them replaces the other
            for name in _MAX_TOKENS_NAMES:
                params.pop(name, None)
        params |= given

    params["response_format"] = _to_wire_format(params.get("response_format"))
    tools = params.pop("tools", ())
    if tools:
        params["tools"] = list(map(_to_wire_tool, tools))
    else:
        params.pop("tool_choice", None)  # a 400 without tools

    if str(params.pop("extended_thinking", None)).lower() == "false":
        switches = {"enable_thinking": False, "thinking": False}  # Qwen's name, DeepSeek's name
        params["chat_template_kwargs"] = {**switches, **params.get("chat_template_kwargs", {})}
    return params


def _to_wire_tool(tool: Any) -> Any:
    if hasattr(tool, "model_dump"):
        tool = tool.model_dump(exclude_none=True)
    if "function" in tool:
        return tool
    return {"type": "function", "function": tool}


def _to_wire_format(response_format: Any) -> Any:
    """Return vLLM's response_format; a schema may come bare, or with its name around it."""
    kind = getattr(response_format, "type", None)
    if kind == "text":
        return None
    if kind == "json":
        return {"type": "json_object"}
    if kind != "json_schema":
        return response_format

    schema = response_format.json_schema
    if not isinstance(schema.get("schema"), Mapping):
        schema = {"schema": schema}
    if response_format.strict is not None:
        schema = {"strict": response_format.strict, **schema}
    return {"type": "json_schema", "json_schema": {"name": "response", **schema}}


def _to_wire_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the kernel's messages as vLLM's, each result as a message of its own."""
    wire: list[dict[str, Any]] = []
    for message in messages:
        role = _ROLES.get(message.role, message.role)
        blocks = message.content
        if isinstance(blocks, str):
            blocks = [_kernel("message_models").TextBlock(text=blocks)]
        content = _to_wire_content(blocks)

        has_result = False
        for block in blocks:
            if block.type == "tool_result":
                wire.append(_to_wire_result(block.tool_call_id, _to_json_text(block.output)))
                has_result = True
        if role == "tool":
            if not has_result:
                wire.append(_to_wire_result(message.tool_call_id or "", content))
            continue

        thoughts = [block.thinking for block in blocks if block.type == "thinking"]
        calls = _to_wire_calls(message, blocks)
        fields = {"reasoning": "\n".join(thoughts), "tool_calls": calls, "name": message.name}
        given = {name: value for name, value in fields.items() if value}
        if content or calls or not has_result:  # pragma: no branch
            wire.append({"role": role, "content": content, **given})
    return wire


def _to_wire_content(blocks: Sequence[Any]) -> Any:
    """Return a text where there is only text, joined as vLLM joins parts; else the parts."""
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if block.type == "text":
            parts.append({"type": "text", "text": block.text})
        elif block.type == "image":
            media_type = block.source.get("media_type", "image/png")
            data = f"data:{media_type};base64,{block.source.get('data', '')}"
            url = block.source.get("url") or data
            parts.append({"type": "image_url", "image_url": {"url": url}})

    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _to_wire_calls(message: Any, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Return an assistant's calls, which come as blocks, as the extra `tool_calls`, or both."""
    entries: list[dict[str, Any]] = [vars(block) for block in blocks if block.type == "tool_call"]
    for entry in getattr(message, "tool_calls", None) or ():
        call = dict(entry)
        entries.append({**call.get("function", {}), **call})

    calls: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry.get("tool", entry.get("name", ""))
        call_id = entry.get("id") or ""
        arguments = _to_json_text(entry.get("arguments") or entry.get("input") or {})
        calls.setdefault(call_id, _to_wire_call(call_id, name, arguments))
    return list(calls.values())


def _to_json_text(value: Any) -> str:
    """Return a text as it is, anything else as JSON; lone surrogates, as escapes, in both."""
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return str(value.encode(errors="backslashreplace").decode())


def _to_wire_result(call_id: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


# Chat templates are strict: some refuse a system message that is not the first, a result without
# its call, a user message right after a result. So a copy of the conversation is put in order.


def _to_template_messages(
    messages: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    r"""Return the conversation as every template takes it, and the results that were missing.

    The system messages at the beginning become one. A later one stays where it is, since moving it
    would change the beginning of the prompt and lose the server's prefix cache: its text joins the
    user message beside it, or is one.

    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}]
    >>> _to_template_messages(chat)[0][0]["content"]
    'Hi\n\n<system-reminder>\nBe brief.\n</system-reminder>'
    """
    first = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
    paired = _pair_results(messages[len(first) :])
    missing = filter(lambda message: message["content"] == MISSING_RESULT, paired)
    repairs = [{"tool_call_id": one["tool_call_id"], "tool_name": one["name"]} for one in missing]

    ordered = _fold_notes(paired)
    if first:
        content = _join_content(*[message["content"] for message in first])
        ordered.insert(0, {**first[0], "content": content})
    return ordered, repairs


def _pair_results(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with one result right after each call, MISSING_RESULT if there is none.

    Later system messages, and results without a call, become notes.
    """
    paired: list[dict[str, Any]] = []
    unanswered: dict[Any, dict[str, Any]] = {}  # of an id that repeats, the last call's
    for message in messages:
        result = unanswered.pop(message.get("tool_call_id"), None)
        if result is not None:
            result["content"] = message["content"]
            continue

        paired.append(_to_note(message))
        for call in message.get("tool_calls", ()):
            result = _to_wire_result(call["id"], MISSING_RESULT)
            result["name"] = call["function"]["name"]  # which vLLM up to 0.12 needs
            unanswered[call["id"]] = result
            paired.append(result)
    return paired


def _to_note(message: dict[str, Any]) -> dict[str, Any]:
    """Return a system message, or a result without its call, as a note; others as they are."""
    content = message["content"]
    if message["role"] == "tool":
        title = f"[Result of the tool call {message['tool_call_id']}, which is not in the history]"
        return {"role": _NOTE, "content": _join_content(title, content)}
    if message["role"] != "system":
        return message
    if isinstance(content, str) and not content.lstrip().startswith("<system-reminder"):
        content = f"<system-reminder>\n{content}\n</system-reminder>"
    return {"role": _NOTE, "content": content}


def _fold_notes(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with each note in the user message beside it, or as one."""
    folded: list[dict[str, Any]] = [{"role": None}]
    for message in messages:
        previous = folded[-1]
        roles = {previous["role"], message["role"]}
        if roles in ({_NOTE}, {_NOTE, "user"}):
            content = _join_content(previous["content"], message["content"])
            folded[-1] = {**previous, **message, "role": _NOTE, "content": content}
            continue
        if roles in ({"tool", _NOTE}, {"tool", "user"}) and message["role"] != "tool":
            folded.append({"role": "assistant", "content": ACKNOWLEDGEMENT})
        folded.append(message)

    for message in folded:
        if message["role"] == _NOTE:
            message["role"] = "user"
    return folded[1:]


def _join_content(*contents: Any) -> Any:
    """Return the contents of messages as one: a text, or parts where any has parts."""
    contents = tuple(filter(None, contents))
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    parts: list[dict[str, Any]] = []
    for content in contents:
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return parts


def _to_correction(reply: Completion, error: VLLMError) -> list[dict[str, Any]]:
    """Return what the model wrote and what was wrong with it, as the next two messages.

    As text: servers before 0.32 refuse a history whose arguments are not JSON.
    """
    written = [reply.text, *[f"{call.name}({call.arguments})" for call in reply.tool_calls]]
    reason = f"No tool was run: {error.__cause__}. Call again; arguments are one JSON object."
    return [
        {"role": "assistant", "content": "\n".join(filter(None, written))},
        {"role": "user", "content": f"<system-reminder>\n{reason}\n</system-reminder>"},
    ]


def _to_kernel_calls(reply: Completion, tools: Sequence[Any]) -> list[Any]:
    """Return the kernel's ToolCalls; raise an error for one that cannot be executed."""
    stops = [choice.stop_reason for choice in reply.choices]
    if tools and HARMONY_CALL in stops and not reply.tool_calls:
        raise InvalidRequestError(
            "gpt-oss called a tool and the server dropped the call; start vLLM with"
            " --enable-auto-tool-choice --tool-call-parser openai"
        )

    functions = {tool["function"].get("name"): tool["function"] for tool in tools}
    calls = []
    for place, call in enumerate(reply.tool_calls):
        schema = {"type": "object", **(functions.get(call.name, {}).get("parameters") or {})}
        definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
        arguments = _parse_strings(call.parsed(), schema, definitions)
        call_id = call.id or f"call_{reply.request_id}_{place}"
        calls.append(
            _kernel("message_models").ToolCall(id=call_id, name=call.name, arguments=arguments)
        )
    return calls


def _parse_strings(value: Any, schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Return an argument with strings parsed where its schema wants an object or an array.

    Qwen3-Coder writes nested values as JSON in a string. What does not parse stays.

    >>> _parse_strings({"a": "[1]"}, {"type": "object", "properties": {"a": {"type": "array"}}}, {})
    {'a': [1]}
    """
    types = _find_types(schema, definitions)
    if isinstance(value, str) and "string" not in types:
        with suppress(ValueError, RecursionError):
            parsed = _parse_json(value)
            if _CONTAINERS.get(type(parsed), "") in types:
                value = parsed

    if isinstance(value, dict):
        properties = types.get("object", {}).get("properties", {})
        result = {}
        for name, item in value.items():
            result[name] = _parse_strings(item, properties.get(name), definitions)
        return result
    if isinstance(value, list):
        items = types.get("array", {}).get("items")
        return [_parse_strings(item, items, definitions) for item in value]
    return value


def _find_types(schema: Any, definitions: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the types that a schema allows, each with the schema or alternative that says so."""
    if not isinstance(schema, Mapping):
        return {}
    if "$ref" in schema:
        return _find_types(definitions.get(schema["$ref"].rpartition("/")[2]), definitions)

    types: dict[str, Mapping[str, Any]] = {}
    for keyword in ("anyOf", "oneOf", "allOf"):
        for alternative in schema.get(keyword, ()):
            types |= _find_types(alternative, definitions)
    names = schema.get("type", [])
    if isinstance(names, str):
        names = [names]
    return {**types, **dict.fromkeys(names, schema)}


def _to_response(
    reply: Completion, blocks: Sequence[_Block], calls: Sequence[Any], degradation: Any
) -> Any:
    """Return the kernel's ChatResponse, with the blocks that were shown."""
    kernel = _kernel("message_models")

    finish_reason = reply.finish_reason or "stop"
    if calls:
        finish_reason = "tool_calls"
    content = _to_content(reply, blocks, calls)
    return kernel.ChatResponse(
        content=content,
        tool_calls=list(calls) or None,
        usage=kernel.Usage(**_to_usage(reply)),
        degradation=degradation,
        finish_reason=finish_reason,
        content_blocks=list(map(_to_shown_block, content)),
        text=reply.text,
    )


def _to_content(reply: Completion, blocks: Sequence[_Block], calls: Sequence[Any]) -> list[Any]:
    """Return the blocks as the history keeps them."""
    kernel = _kernel("message_models")
    texts = {"thinking": io.StringIO(reply.reasoning), "text": io.StringIO(reply.text)}
    rest = (
        kernel.ToolCallBlock(id=call.id, name=call.name, input=call.arguments) for call in calls
    )
    content: list[Any] = []
    for block in blocks:
        if block.kind == "tool_use":
            content.extend(itertools.islice(rest, 1))
        elif block.kind == "thinking":
            content.append(kernel.ThinkingBlock(thinking=texts["thinking"].read(block.length)))
        else:
            content.append(kernel.TextBlock(text=texts["text"].read(block.length)))

    if not (reply.text or calls):  # never empty: loop-basic would ask again without end
        content.append(kernel.TextBlock(text=""))
    return content


def _to_shown_block(block: Any) -> Any:
    """Return a block of the history as content events show it."""
    shown = _kernel("content_models")
    if block.type == "thinking":
        return shown.ThinkingContent(text=block.thinking)
    if block.type == "text":
        return shown.TextContent(text=block.text)
    return shown.ToolCallContent(id=block.id, name=block.name, arguments=block.input)


def _to_usage(reply: Completion) -> dict[str, Any]:
    """Return the tokens of a reply under the kernel's names, zeros where the server did not say."""
    usage = (reply.usage or Usage(0, 0, 0))._asdict()
    usage["cache_read_tokens"] = usage.pop("cached_tokens")
    return usage


def _to_usage_payload(replies: Sequence[_Judged]) -> dict[str, Any]:
    """Return the tokens of all the replies, as llm:response has them."""
    payload: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "cost_usd": None}
    for reply, _ in replies:
        usage = _to_usage(reply)
        del usage["total_tokens"]
        for name, count in usage.items():
            if count is not None:
                payload[name] = payload.get(name, 0) + count
    return payload


def _to_reason(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "msg": str(error) or "cancelled"}


def _to_kernel_error(error: VLLMError, model: str | None) -> Exception:
    """Return the kernel's error of the same name, or of the nearest parent's there."""
    llm_errors = _kernel("llm_errors")
    names = [kind.__name__ for kind in type(error).__mro__]
    if isinstance(error, InvalidRequestError) and _CONTENT_FILTER.search(error.server_message):
        names.insert(0, "ContentFilterError")
    name = next((name for name in names if hasattr(llm_errors, name)), "LLMError")
    kind: Callable[..., Exception] = getattr(llm_errors, name)

    details: dict[str, Any] = {"provider": "vllm", "model": model, "retryable": error.retryable}
    details["status_code"] = error.status_code
    if isinstance(error, InvalidToolCallError):
        details |= {"tool_name": error.tool_name, "raw_arguments": error.raw_arguments}
    else:
        details["retry_after"] = error.retry_after
    return kind(str(error), **details)


# ---- Command line -----------------------------------------------------------

EXIT_FAILED: Final = 1
EXIT_MISUSED: Final = 2
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as in shells
HTML_LOGPROBS: Final = 5  # alternatives for --html where --logprobs does not say
TITLE_CHARACTERS: Final = 80
CHAT_HELP: Final = '''\
/clear            forget the conversation, but not the system message
/retry            send the last message again
/save FILE        write the conversation to a file, as JSON
/load FILE        continue the conversation of a file
/system TEXT      set the system message; without TEXT, remove it
/set NAME=JSON    set a parameter of vLLM, like temperature=0; null removes it
/quit             leave, as Ctrl-D does
"""               begins and ends a message of several lines
Ctrl-C            stop the reply and keep its text
'''
# All but tab and line break: they could command the terminal.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
_Arguments = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done. 1: failed. 2: misused. 130: interrupted. argparse ends the process itself.
    """
    _prepare_streams()
    options = _read_arguments(sys.argv[1:] if argv is None else argv)
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(client) for client in _connect(options)]
            code = _COMMANDS[options["command"]].run(clients, options)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            _complain("")  # ends the line of the terminal's ^C
        return EXIT_INTERRUPTED
    except VLLMError as error:
        _complain(f"vllm-provider: {error}")
        return EXIT_MISUSED if isinstance(error, ConfigurationError) else EXIT_FAILED
    except OSError as error:
        _silence(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return 0  # the reader has what it wanted
        _complain(f"vllm-provider: {error}")
        return EXIT_FAILED


def _prepare_streams() -> None:
    # What the parent process has closed is opened in this order: each takes the lowest free
    # descriptor, which a socket would take otherwise.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # characters that the encoding lacks
    if not logger.hasHandlers():  # warnings go to stderr then, each as a line
        logger.addFilter(_is_not_retry)


def _is_not_retry(record: logging.LogRecord) -> bool:
    """Return whether to show a record: a failure is one line, that of its last attempt."""
    return not record.getMessage().startswith("retry ")


def _complain(text: str) -> None:
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:  # it has no reader, or its disk is full
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    """Let a stream that cannot be written lead nowhere: Python writes what is left at exit."""
    with suppress(OSError):  # a StringIO has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _connect(options: _Arguments) -> list[VLLMClient]:
    """Return a client for each --base-url. Only run-batch uses more than the last."""
    names = ["api_key", "timeout"]
    settings = {"default_model": options.get("model")}
    settings["max_concurrency"] = options.get("max_inflight")
    if options["command"] in ("complete", "chat"):
        names += ["max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"]
        settings["logprobs"] = HTML_LOGPROBS if "html" in options else None

    settings |= {name: options[name] for name in names if name in options}
    urls = options.get("base_url", [None])
    if options["command"] != "run-batch":
        urls = urls[-1:]
    given = {name: value for name, value in settings.items() if value is not None}
    return [VLLMClient(url, **given) for url in urls]


# ---- Command line: arguments ------------------------------------------------


def _read_arguments(argv: Sequence[str]) -> dict[str, Any]:
    """Return the options given, by name; a mistake ends the process with 2."""
    import argparse

    about = "Talk to a vLLM server. Options may also come before COMMAND."
    parser = argparse.ArgumentParser("vllm-provider", "%(prog)s COMMAND [OPTIONS]", about)
    parser.add_argument("--version", action="version", version=f"vllm-provider {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", title="commands", prog="vllm-provider"
    )
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name, help=command.help, description=command.help, argument_default=argparse.SUPPRESS
        )
        if name in ("complete", "chat", "score"):
            subparser.add_argument("text", metavar="TEXT", nargs="?", help=_TEXT_HELP)
        for option_name in f"{command.options} {_SHARED_OPTIONS}".split():
            option = _CLI_OPTIONS[option_name]
            subparser.add_argument(*option.names, **option.to_argparse())

    options, unknown = parser.parse_known_args(_with_command_first(parser, argv))
    for word in unknown:
        if word.startswith("-") and word != "--":
            name = _find_option(parser, word).names[-1]
            parser.error(f"{name} is not an option of {options.command}")
        parser.error(f"unexpected argument: {word!r}; are quotes missing?")
    return vars(options)


def _with_command_first(parser: Any, argv: Sequence[str]) -> list[str]:
    """Return the arguments with the command before the options."""
    place = 0
    while place < len(argv) and argv[place].startswith("-"):
        if argv[place] in ("-h", "--help", "--version"):
            return [argv[place]]
        option = _find_option(parser, argv[place])
        if option.metavar and "=" not in argv[place]:
            place += 1  # past the value
        place += 1
    if place >= len(argv):
        return []  # argparse says that the command is missing
    return [argv[place], *argv[:place], *argv[place + 1 :]]


def _find_option(parser: Any, word: str) -> "_Option":
    """Return the option named; for a misspelled name end the process, with the nearest one."""
    name = word.partition("=")[0]
    for option in _CLI_OPTIONS.values():
        if name in option.names or option.names[-1].startswith(name):
            return option
    near = _nearest(name, _CLI_OPTIONS)
    advice = f"; did you mean {near}?" if near else ""
    return parser.error(f"unrecognized option: {name}{advice}")  # type: ignore[no-any-return]


def _read_param(param: str) -> tuple[str, Any]:
    """Return the name and the value in NAME=JSON."""
    name, _, value = param.partition("=")
    name = name.replace("-", "_")
    try:
        if not name.isidentifier() or name in ("config", "messages", "prompt", "system"):
            raise ValueError(f"{name!r} is not a parameter")
        return name, json.loads(value)
    except (ValueError, RecursionError) as error:
        form = """NAME=JSON, like top_k=5 or stop='["END"]'"""
        raise ConfigurationError(f"a parameter is {form}; got {_quoted(param)}") from error


def _read_params(options: _Arguments) -> dict[str, Any]:
    return dict(map(_read_param, options.get("param", ())))


def _read_text(options: _Arguments) -> str:
    """Return the argument, standard input, or both with a blank line between them."""
    parts = [options.get("text", "-")]
    if parts == ["-"]:
        parts = [_read_stdin()]
    elif not sys.stdin.isatty():
        parts.append(_read_stdin())

    text = "\n\n".join(filter(None, parts))
    if not text:
        raise ConfigurationError("there is no text: give it as argument or on standard input")
    return text


def _read_stdin() -> str:
    if sys.stdin.isatty():
        _complain("Reading the text from the terminal; Ctrl-D ends it.")
    try:
        text = sys.stdin.read()
        text.encode()  # in the C locale Python lets lone surrogates through
    except UnicodeError as error:
        raise ConfigurationError(f"standard input is not {sys.stdin.encoding} text") from error
    except OSError:  # it was opened for writing only
        return ""
    return text.removesuffix("\n")


# ---- Command line: commands -------------------------------------------------


def _run_prompt(clients: Sequence[VLLMClient], options: _Arguments) -> int:
    """Run complete or chat."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    has_result = not {"text", "json", "html"}.isdisjoint(options)
    if options["command"] == "chat" and is_terminal and not has_result:
        _Conversation(clients[0], options).run()
        return 0

    text = _read_text(options)
    params = _read_params(options)
    source: str | list[dict[str, Any]] = text
    if options["command"] == "chat":
        source = [*_to_system(options.get("system")), {"role": "user", "content": text}]

    stream = _start(clients[0], source, options, params)
    if "json" in options:
        with stream:
            collections.deque(stream, maxlen=0)
        _print_json(stream.completion)
    else:
        _show(stream, options, params)
    if "html" in options:
        _write_file(options["html"], to_html(stream.completion, text[:TITLE_CHARACTERS]))
    return 0


def _to_system(text: str | None) -> list[dict[str, Any]]:
    """Return a system message in a list, which is empty without a text."""
    return [] if text is None else [{"role": "system", "content": text}]


def _start(
    client: VLLMClient, source: Any, options: _Arguments, params: Mapping[str, Any]
) -> Stream:
    """Return the generation as a Stream. `source`: a prompt, or a list of messages."""
    build: Callable[..., dict[str, Any]] = build_chat_request
    path = CHAT_PATH
    if isinstance(source, str):
        build = build_completion_request
        path = COMPLETIONS_PATH

    return client._open(
        path,
        build(client.config, source, **params),
        limits=_read_limits(client.config, params),
        wants_stream=False if "no_stream" in options else None,
    )


def _show(stream: Stream, options: _Arguments, params: _Arguments) -> None:
    """Print the reply as it arrives, then its statistics."""
    printer = _Printer(with_logprobs="logprobs" in {**options, **params})
    try:
        with stream:
            for delta in stream:
                printer.show(delta)
    except VLLMError:
        printer.end_line()
        raise

    printer.finish(stream.completion)
    if "stats" in options:
        _complain(_to_stats(stream.completion))


def _to_stats(reply: Completion) -> str:
    seconds = reply.total_s or 0.0
    tokens = 0 if reply.usage is None else reply.usage.output_tokens
    first_s = reply.first_token_s
    if first_s is None:
        return f"{seconds:.2f} s, {tokens / max(seconds, 1e-3):.0f} tokens/s, {tokens} tokens"

    # The speed is that after the first token.
    speed = max(0, tokens - 1) / max(seconds - first_s, 1e-3)
    return f"{first_s:.2f} s to first token, {speed:.0f} tokens/s, {tokens} tokens"


def _run_score(clients: Sequence[VLLMClient], options: _Arguments) -> int:
    context = options.get("context", "")
    if "choice" not in options:
        scores = [clients[0].score(_read_text(options), context=context)]
    elif context and "text" in options:
        raise ConfigurationError("the context of the choices is TEXT or --context, not both")
    else:
        scores = clients[0].choose(options["choice"], context=context or _read_text(options))

    if "json" in options:
        _print_json(scores if "choice" in options else scores[0])
    else:
        for score in scores:
            print(
                f"probability {score.probability:.4g}, log probability {score.logprob:.4f}, "
                f"perplexity {score.perplexity:.4g}: {score.text!r}"
            )
    if "html" in options:
        _write_file(options["html"], to_html(scores[0], context[-TITLE_CHARACTERS:]))
    return 0


def _run_batch(clients: Sequence[VLLMClient], options: _Arguments) -> int:
    if not options.keys() >= {"input_file", "output_file"}:
        raise ConfigurationError("run-batch needs -i FILE and -o FILE")

    report = clients[0].run_batch(
        options["input_file"], options["output_file"], servers=clients[1:],
        concurrency=options.get("max_inflight"), progress=True, **_read_params(options),
    )  # fmt: skip
    _complain(str(report))
    return EXIT_FAILED if report.failed else 0


def _run_models(clients: Sequence[VLLMClient], options: _Arguments) -> int:
    cards = clients[0].models()
    if "json" in options:
        _print_json(cards)
        return 0

    for card in cards:
        limit = "?" if card.max_model_len is None else card.max_model_len
        print(f"{card.id}\t{limit} tokens")
    return 0


def _run_health(clients: Sequence[VLLMClient], options: _Arguments) -> int:
    wait = options.get("wait", 0.0)
    if not wait >= 0:  # not a number
        raise ConfigurationError(f"--wait must be a number of seconds of at least 0, got {wait}")
    clients[0].health(wait)
    print(f"{clients[0].config.base_url} is healthy")
    return 0


def _print_json(value: Any) -> None:
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(_to_json(value), ensure_ascii=not is_unicode, allow_nan=False))


def _write_file(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


# ---- Command line: terminal -------------------------------------------------


class _Printer:
    """Shows a reply as it arrives: text on stdout, reasoning on stderr, colours on a terminal."""

    def __init__(self, *, with_logprobs: bool) -> None:
        is_plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._has_color = not is_plain
        self._with_logprobs = with_logprobs and sys.stdout.isatty()
        self._out: TextIO | None = None  # where text was written last
        self._is_line_open = False

    def show(self, delta: Delta) -> None:
        """Print what one event added to the first choice; the others wait for finish()."""
        if delta.index != 0:
            return
        if delta.reasoning:
            self._write(sys.stderr, delta.reasoning)
        for text, token in self._to_pieces(delta):
            self._write(sys.stdout, text, token)

    def finish(self, reply: Completion) -> None:
        """Print the tool calls, and the choices after the first."""
        for choice in reply.choices:
            lines = [f"{call.name}({call.arguments})" for call in choice.tool_calls]
            if choice.index > 0:
                lines.insert(0, choice.text)
            for line in lines:
                self.end_line()
                self._write(sys.stdout, line)
        self.end_line()

    def end_line(self) -> None:
        if self._out is not None and self._is_line_open:
            self._out.write("\n")
            self._out.flush()
        self._is_line_open = False

    def _write(self, out: TextIO, text: str, token: TokenLogprob | None = None) -> None:
        is_reasoning = out is sys.stderr
        if out is not self._out:
            if is_reasoning or self._out is not None:
                text = text.lstrip("\n")  # templates put line breaks around the reasoning
            if not text:
                return
            self.end_line()

        self._out = out
        self._is_line_open = not text.endswith("\n")
        if out.isatty():
            text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
            text = self._dim(text) if is_reasoning else self._paint(text, token)
        out.write(text)
        out.flush()

    def _to_pieces(self, delta: Delta) -> list[tuple[str, TokenLogprob | None]]:
        """Return the text by tokens; in one piece where tokens do not join to it.

        Those of reasoning stand before the text's, that of the end behind them.
        """
        tokens = [token.token for token in delta.logprobs]
        edges = list(itertools.accumulate(map(len, tokens), initial=0))
        start = "".join(tokens).rfind(delta.text)
        end = start + len(delta.text)
        if not self._with_logprobs or start not in edges or end not in edges:
            return [(delta.text, None)]

        chosen = slice(edges.index(start), edges.index(end))
        return list(zip(tokens[chosen], delta.logprobs[chosen], strict=True))

    def _paint(self, text: str, token: TokenLogprob | None) -> str:
        if token is None or token.probability is None:
            return text
        if not self._has_color:
            return f"{text}({token.probability:.2f})"

        color = 31  # red
        if token.probability >= 0.8:
            color = 32  # green
        elif token.probability >= 0.4:
            color = 33  # yellow
        painted = f"\x1b[{color}m{text}\x1b[0m"
        others = [other for other in token.top if other.token != token.token]
        hints = [f"{repr(other.token)[1:-1]} {other.probability:.2f}" for other in others]
        return painted + self._dim(f"[{','.join(hints)}]") if hints else painted

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._has_color else text


# ---- Command line: conversation ---------------------------------------------


class _Conversation:
    """A chat on a terminal, which keeps the messages of the turns that did not fail."""

    def __init__(self, client: VLLMClient, options: _Arguments) -> None:
        self._client = client
        self._options = options
        self._params = _read_params(options)
        self._system = _to_system(options.get("system"))
        self._messages: list[dict[str, Any]] = []
        self._text = ""  # of the last turn, for /retry, and the messages before it
        self._before: list[dict[str, Any]] = []
        self._is_open = True
        self._commands = {
            "/help": self._help, "/clear": self._clear, "/retry": self._retry,
            "/save": self._save, "/load": self._load, "/system": self._set_system,
            "/set": self._set_param, "/quit": self._quit,
        }  # fmt: skip

    def run(self) -> None:
        """Read and answer until Ctrl-D or /quit."""
        with suppress(ImportError):  # Windows has none
            import readline

            if os.environ.get("TERM") != "dumb":  # a paste of several lines is one message
                readline.parse_and_bind("set enable-bracketed-paste on")

        _complain("/help lists the commands, Ctrl-D leaves.")
        while self._is_open:
            try:
                self._take(input("> "))
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
            except UnicodeError:
                _complain(f"vllm-provider: this is not {sys.stdin.encoding} text")
            except VLLMError as error:
                _complain(f"vllm-provider: {error}")

    def _take(self, line: str) -> None:
        if line.startswith("/"):
            name, _, argument = line.partition(" ")
            if name not in self._commands:
                near = _nearest(name, self._commands)
                advice = f"did you mean {near}?" if near else "see /help"
                raise ConfigurationError(
                    f"unknown command: {_quoted(name)}; {advice}"
                    " (a space before it sends it as text)"
                )
            self._commands[name](argument.strip())
            return

        if line.startswith('"""'):
            lines = [line[3:]]
            while not lines[-1].endswith('"""'):
                lines.append(input(". "))
            line = "\n".join(lines)[:-3].strip("\n")
        if line.strip():
            self._answer(line, self._messages)

    def _answer(self, text: str, before: list[dict[str, Any]]) -> None:
        """Print the answer. Unless it fails, question and answer are added to `before`."""
        self._text = text
        self._before = before
        question = {"role": "user", "content": text}
        messages = [*self._system, *before, question]
        stream = _start(self._client, messages, self._options, self._params)
        try:
            _show(stream, self._options, self._params)
            answer = stream.completion.to_message()
        except KeyboardInterrupt:
            print()  # ends the line of the terminal's ^C
            answer = {"role": "assistant", "content": stream.completion.text}
            if not answer["content"]:
                return
        self._messages = [*before, question, answer]

    def _help(self, _: str) -> None:
        print(CHAT_HELP, end="")

    def _clear(self, _: str) -> None:
        self._messages = []
        self._text = ""

    def _retry(self, _: str) -> None:
        if not self._text:
            raise ConfigurationError("there is no message to send again")
        self._answer(self._text, self._before)

    def _save(self, path: str) -> None:
        messages = [*self._system, *self._messages]
        try:
            _write_file(os.path.expanduser(path), json.dumps(messages, indent=1))
        except OSError as error:
            raise VLLMError(f"/save FILE: {error}") from error

    def _load(self, path: str) -> None:
        try:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                body = build_chat_request(self._client.config, json.load(file))
        except (OSError, ValueError, RecursionError) as error:
            raise VLLMError(f"/load FILE: {error}") from error

        self._clear("")
        self._system = []
        for message in body["messages"]:
            place = self._system if message.get("role") == "system" else self._messages
            place.append(message)

    def _set_system(self, text: str) -> None:
        self._system = _to_system(text or None)

    def _set_param(self, param: str) -> None:
        name, value = _read_param(param)
        self._params[name] = value

    def _quit(self, _: str) -> None:
        self._is_open = False


# ---- Command line: what there is --------------------------------------------


class _Command(NamedTuple):
    run: Callable[[Sequence[VLLMClient], _Arguments], int]
    help: str
    options: str


class _Option(NamedTuple):
    """`metavar`: "" for a flag, N for an integer, X for a number; with "..." it may be repeated."""

    names: list[str]
    metavar: str
    help: str

    def to_argparse(self) -> dict[str, Any]:
        """Return the keywords for add_argument()."""
        if not self.metavar:
            return {"help": self.help, "action": "store_true"}

        metavar = self.metavar.removesuffix("...")
        settings: dict[str, Any] = {"help": self.help, "metavar": metavar}
        if metavar != self.metavar:
            settings |= {"help": f"{self.help}; may be repeated", "action": "append"}
        return settings | {"type": {"N": int, "X": float}.get(metavar, str)}


_TEXT_HELP: Final = "before standard input, unless that is a terminal; - is standard input alone"
_SHARED_OPTIONS: Final = "--base-url --api-key --model --timeout"
_PROMPT_OPTIONS: Final = (
    "--max-tokens --temperature --top-p --seed --stop --logprobs --param"
    " --no-stream --stats --json --html"
)
_BATCH_OPTIONS: Final = "--input-file --output-file --max-inflight --param"
_COMMANDS: Final = {
    "complete": _Command(_run_prompt, "continue a text", _PROMPT_OPTIONS),
    "chat": _Command(
        _run_prompt, "answer a text; without one, converse", f"--system {_PROMPT_OPTIONS}"
    ),
    "score": _Command(_run_score, "score a text", "--context --choice --json --html"),
    "run-batch": _Command(_run_batch, "send the requests of a file", _BATCH_OPTIONS),
    "models": _Command(_run_models, "list the models served", "--json"),
    "health": _Command(_run_health, "exit with 0 if the server is healthy", "--wait"),
}
_CLI_OPTIONS: Final = {
    names.split("/")[-1]: _Option(names.split("/"), metavar, text)
    for names, metavar, text in (
        ("--base-url", "URL...", "the server (default: VLLM_BASE_URL); run-batch takes several"),
        ("--api-key", "KEY", "better in VLLM_API_KEY: other users can see arguments"),
        ("--model", "NAME", "default: what the server serves"),
        ("--timeout", "X", "seconds to the first token, or to an unstreamed reply (default: 300)"),
        ("--system", "TEXT", "a system message before the text"),
        ("--max-tokens", "N", "limit of the reply, reasoning included"),
        ("--temperature", "X", "0: always the most likely token"),
        ("--top-p", "X", "sample among the most likely tokens that have this probability"),
        ("--seed", "N", "the same seed gives the same sample"),
        ("--stop", "TEXT...", "end the reply before this text"),
        ("--logprobs", "N", "colour tokens by probability, with N alternatives (numbers: --json)"),
        ("--param", "NAME=JSON...", "any parameter of vLLM, like top_k=5"),
        ("--no-stream", "", "print the reply when it is complete"),
        ("--stats", "", "print time to first token, tokens/s and tokens to standard error"),
        ("--json", "", "print the whole result as JSON"),
        ("--html", "FILE", "write a heat map of log probabilities"),
        ("--context", "TEXT", "what stands before the text and is not scored"),
        ("--choice", "TEXT...", "rank such continuations of the text"),
        ("-i/--input-file", "FILE", "a JSON request a line; - is standard input"),
        ("-o/--output-file", "FILE", "the results; what it has already is not sent again"),
        ("--max-inflight", "N", "requests at once (default: 64)"),
        ("--wait", "X", "seconds to wait for a server that is starting"),
    )
}

if __name__ == "__main__":
    sys.exit(main())

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

import array
import collections
import contextvars
import copy
import email.utils
import errno
import functools
import hashlib
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
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)  # fmt: skip
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import copy_context
from dataclasses import KW_ONLY, MISSING, Field, dataclass, field, fields, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import (
    Any,
    BinaryIO,
    Final,
    Literal,
    NamedTuple,
    Self,
    TextIO,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    overload,
)  # fmt: skip
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

__version__ = "2.0.0"
__amplifier_module_type__ = "provider"
# fmt: off
__all__ = [
    "AbortError", "AccessDeniedError", "AuthenticationError", "BatchReport", "BenchReport",
    "Choice", "Completion", "ConfigurationError", "ContextLengthError", "Delta",
    "InvalidOutputError", "InvalidRequestError", "InvalidToolCallError", "LLMTimeoutError",
    "ModelCard", "NetworkError", "NotFoundError", "ProtocolError", "ProviderUnavailableError",
    "RateLimitError", "Score", "StatusError", "Stream", "StreamError", "TokenLogprob",
    "ToolCall", "Usage", "VLLMClient", "VLLMConfig", "VLLMError", "VLLMProvider",
    "build_chat_request", "build_completion_request", "main", "mount", "on_session_ready",
    "parse_chat_response", "parse_completion_response", "request_options", "to_html",
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
UNREACHABLE: Final = frozenset(
    {errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH}
)
STARTING_PAGES: Final = (  # in the HTML page of a gateway (404 or 425) whose server is starting
    "warming up", "initializing", "starting up", "service is starting",
    "waiting for service to respond",
)  # fmt: skip
CALL_LIMITS: Final = ("timeout", "stream_idle_timeout", "deadline")  # of a call, not sent
BASE_URL_ADVICE: Final = "is base_url the server's root, and is it vLLM? (curl BASE_URL/v1/models)"

_MINIMUM_VERSIONS: Final = {"requests": (2, 32, 4), "urllib3": (2, 3)}


def _check_versions() -> None:
    """Raise ImportError where requests or urllib3 is too old, in one sentence."""
    for module in (requests, urllib3):
        minimum = _MINIMUM_VERSIONS[module.__name__]
        found = tuple(int(part) for part in re.findall(r"\d+", module.__version__)[:3])

        if found < minimum:
            needed = ".".join(map(str, minimum))
            raise ImportError(
                f"vllm_provider needs {module.__name__} {needed} or newer, got"
                f" {module.__version__}; pip install -U {module.__name__}"
            )


_check_versions()

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
#     AuthenticationError 401
#       AccessDeniedError 403
#     NotFoundError 404
#     InvalidRequestError 400, 422
#     ContextLengthError                      the prompt does not fit the model
#     RateLimitError 429
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
        self,
        message: str,
        *,
        status_code: int | None = None,
        retryable: bool | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        partial: "Completion | None" = None,
    ) -> None:
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
    """`timeout`, `stream_idle_timeout`, `connect_timeout` or `deadline` ran out.

    The server was stopped.
    """

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
    """The prompt does not fit the model.

    `limit`: the model's context length, `input_tokens`: the prompt's; each None where the server
    did not say.
    """

    limit: int | None = None
    input_tokens: int | None = None


class RateLimitError(StatusError):
    """429: from a gateway; vLLM itself sends none."""

    _retryable = True


class ProviderUnavailableError(StatusError):
    """5xx: the engine is busy, starting or dead."""

    _retryable = True


_STATUS_ERRORS: Final[Mapping[int, type[StatusError]]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: AccessDeniedError,
    404: NotFoundError,
    422: InvalidRequestError,
    429: RateLimitError,
}

# ---- Values: configuration --------------------------------------------------

_Check = Callable[[str, Any], Any]

_FLAGS: Final = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}  # fmt: skip
_PROMPT_FORMATS: Final = ("auto", "chat_template", "raw")
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, token


def _check(expected: str, convert: Callable[[Any], Any]) -> _Check:
    """Return a function of a setting's key and value that converts the value or raises."""

    def check(key: str, value: Any) -> Any:
        try:
            return convert(value)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ConfigurationError(f"{key} must be {expected}, got {value!r}") from error

    return check


def _require(is_good: bool) -> None:
    """Raise ValueError unless `is_good`."""
    if not is_good:
        raise ValueError


def _to_text(value: Any) -> str:
    """Return a string that is one."""
    _require(isinstance(value, str))
    return str(value)


def _to_number(
    value: Any, minimum: float = -math.inf, maximum: float = sys.float_info.max
) -> float:
    """Return a number between the bounds, given as a number or as text."""
    _require(isinstance(value, str | int | float))
    _require(not isinstance(value, bool))
    number = float(value)

    _require(number > -math.inf)
    _require(minimum <= number <= maximum)  # never true of NaN
    return number


def _to_int(value: Any, minimum: float = -math.inf) -> int:
    """Return an integer, also of "42", 42.0 and "4e3"."""
    number = _to_number(value, minimum)
    _require(number.is_integer())

    if re.fullmatch(r"\s*[+-]?[\d_]+\s*", str(value)):
        return int(value)  # exact, where a float has 53 bits
    return int(number)


def _to_strings(value: Any) -> str | list[str]:
    """Return a string, or a list of them."""
    if isinstance(value, str):
        return value

    strings = list(value)
    for item in strings:
        _require(isinstance(item, str))
    return strings


def _to_logprobs(value: Any) -> int | bool:
    """Return a number of alternatives, or whether log probabilities are wanted."""
    word = str(value).strip().lower()
    return _FLAGS[word] if word in ("true", "false") else _to_int(value)


def _to_verify(value: Any) -> bool | str:
    """Return the path of a CA bundle that exists, or a flag."""
    if isinstance(value, str | os.PathLike) and os.path.exists(value):
        return os.fspath(value)
    return _FLAGS[str(value).lower()]


_text = _check("a string", _to_text)
_flag = _check("true or false", lambda value: _FLAGS[str(value).strip().lower()])
_number = _check("a number", _to_number)
_seconds = _check(
    "a positive number of seconds", lambda value: _to_number(value, math.ulp(0.0), math.inf)
)
_wait_seconds = _check(
    "a number of seconds of at least 0", lambda value: _to_number(value, 0.0, math.inf)
)
_integer = _check("an integer", _to_int)
_count = _check("an integer of at least 1", lambda value: _to_int(value, 1))
_count_or_zero = _check("an integer of at least 0", lambda value: _to_int(value, 0))
_strings = _check("a string or a list of strings", _to_strings)
_logprobs = _check("an integer, true or false", _to_logprobs)
_verify = _check("true, false or the path of a CA bundle that exists", _to_verify)
_format = _check(
    "auto, chat_template or raw", lambda value: _PROMPT_FORMATS[_PROMPT_FORMATS.index(value)]
)


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
    """Return HTTP headers; no error quotes a value."""
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
        parts = urlsplit(text)
        is_http = parts.scheme in ("http", "https")
        has_host = bool(parts.hostname) and not str(parts.hostname).startswith(".")
        is_good = is_http and has_host and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or re.search(r"[\s\x00-\x1f\x7f?#]", text):
        shown = re.split(r"[?#]", str(value))[0]  # what follows may be a key
        raise ConfigurationError(
            f"{key} must be a URL like http://localhost:8000, without query or fragment,"
            f" got {shown!r}"
        )

    scheme, rest = text.split(":", 1)
    return f"{scheme.lower()}:{rest}".rstrip("/").removesuffix("/v1").rstrip("/")


_ALIASES: Final[Mapping[str, str]] = {  # Amplifier's other names for settings
    "extra_request_params": "extra_body",
    "reasoning": "reasoning_effort",
}


def _setting(check: _Check, default: Any = None, env: str = "") -> Any:
    """Return a field of VLLMConfig whose values `check` converts."""
    return field(default=default, metadata={"check": check, "env": env})


class _Replaceable(str):
    """A default that an environment variable replaces; the same text given by a caller stays."""

    __slots__ = ()


def _is_given(value: object) -> bool:
    """Return False for None, "" and an unexpanded ${NAME}."""
    if value is None or value == "" or isinstance(value, _Replaceable):
        return False
    return not (isinstance(value, str) and re.fullmatch(r"\$\{\w+\}", value))


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
                checked = spec.metadata["check"](spec.name, value)
            else:
                checked = _default_of(spec)
            object.__setattr__(self, spec.name, checked)

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
        hidden = {
            "api_key": "***",
            "default_headers": dict.fromkeys(self.default_headers, "***"),
        }
        shown = []
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value != _default_of(spec):
                shown.append(f"{spec.name}={hidden.get(spec.name, value)!r}")
        return f"VLLMConfig({', '.join(shown)})"

    def __hash__(self) -> int:
        return hash(repr(self))  # two settings are dicts


def _default_of(spec: Field[Any]) -> Any:
    """Return a setting's default, a dict made anew."""
    return spec.default if spec.default_factory is MISSING else spec.default_factory()


def _setting_names() -> list[str]:
    return [spec.name for spec in fields(VLLMConfig)]


def _nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the one of `names` that `name` may be a misspelling of."""
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return close[0] if close else None


def _suggest_setting(key: str) -> str:
    """Return advice for a setting that does not exist, or nothing."""
    names = _setting_names()
    containing = [name for name in names if len(key) > 2 and key in name]
    if not containing and key in VLLM_PARAMETERS:
        return "; it is a parameter of vLLM's: put it under extra_body"

    name = containing[0] if containing else _nearest(key, names)
    return f"; did you mean {name!r}?" if name else ""


# ---- Values: request parameters ---------------------------------------------
#
# vLLM's own names, so that an editor completes them and a type checker finds a misspelled one.
# The server judges the values: vllm/entrypoints/openai/*/protocol.py, 0.10 to 0.33.


class _CommonParams(TypedDict, total=False):
    """Parameters of both endpoints, and the limits of a call in seconds."""

    timeout: float | None
    stream_idle_timeout: float | None
    deadline: float | None
    extra_body: Mapping[str, Any] | None
    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    n: int | None
    best_of: int | None
    stop: str | list[str] | None
    stop_token_ids: list[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    min_tokens: int | None
    logprobs: int | bool | None
    prompt_logprobs: int | None
    logprob_token_ids: list[int] | None
    return_tokens_as_token_ids: bool | None
    return_token_ids: bool | None
    echo: bool | None
    skip_special_tokens: bool | None
    spaces_between_special_tokens: bool | None
    add_special_tokens: bool | None
    truncate_prompt_tokens: int | None
    truncation_side: str | None
    logit_bias: Mapping[str, float] | None
    allowed_token_ids: list[int] | None
    bad_words: list[str] | None
    use_beam_search: bool | None
    length_penalty: float | None
    stream_options: Mapping[str, Any] | None
    stream_interval: int | None
    response_format: Any
    structured_outputs: Mapping[str, Any] | None
    thinking_token_budget: int | None
    priority: int | None
    request_id: str | None
    session_id: str | None
    cache_salt: str | None
    user: str | None
    kv_transfer_params: Mapping[str, Any] | None
    ec_transfer_params: Mapping[str, Any] | None
    vllm_xargs: Mapping[str, Any] | None
    repetition_detection: Mapping[str, Any] | None
    watermarking: bool | None


class _CompletionParams(_CommonParams, total=False):
    """Parameters of `/v1/completions`."""

    prompt_embeds: Any
    suffix: str | None


class _ChatParams(_CommonParams, total=False):
    """Parameters of `/v1/chat/completions`."""

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


class _CallParams(TypedDict, total=False):
    """The limits of a call, in seconds; None takes the configuration's."""

    timeout: float | None
    stream_idle_timeout: float | None
    deadline: float | None


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
            arguments = json.loads(self.arguments, parse_constant=_refuse_constant)
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


def _refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and Infinity, which Python's JSON decoder would take."""
    raise ValueError(f"{name} is not JSON")


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
            message["tool_calls"] = [_to_wire_call(*call) for call in self.tool_calls]
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
            value = json.loads(self.text, parse_constant=_refuse_constant)
            if model is None:
                return value
            validate = getattr(model, "model_validate", None)
            return model(**value) if validate is None else validate(value)
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
    """Return a tool call as both directions of the wire have it."""
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


def _to_json(value: Any, max_chars: int | None = None, token_key: str = "token") -> Any:
    """Return values of this module as what JSON can hold: -inf as -9999.0, bytes as a list.

    `max_chars`: where strings are cut. `token_key`: the name of a TokenLogprob's first field.
    """
    names = getattr(value, "_fields", None) or getattr(value, "__dataclass_fields__", None)
    if names is not None:
        value = {name: getattr(value, name) for name in names}

    if isinstance(value, Mapping):
        result = {}
        for name, item in value.items():
            key = token_key if name == "token" else name
            result[key] = _to_json(item, max_chars, token_key)
        return result

    if isinstance(value, list | tuple | bytes):
        return [_to_json(item, max_chars, token_key) for item in value]
    if isinstance(value, str) and max_chars is not None and len(value) > max_chars:
        return f"{value[:max_chars]}… ({len(value)} characters)"
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
    max_tokens = DEFAULT_MAX_TOKENS if config.max_tokens is None else config.max_tokens
    body = _merge(
        {"model": config.default_model, "prompt": prompt, "max_tokens": max_tokens},
        _settings_for(config),
        params,
        config.extra_body,
        params.get("extra_body"),
    )

    if body.get("logprobs") is True:
        body["logprobs"] = 1
    elif body.get("logprobs") is False:  # vLLM reads it as 0, which switches them on
        del body["logprobs"]
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
    body = _merge(
        {
            "model": config.default_model,
            "messages": _to_messages(messages),
            "max_tokens": config.max_tokens,
        },
        _to_chat_logprobs(_settings_for(config)),
        _to_chat_logprobs(params),
        _to_chat_logprobs(config.extra_body),
        _to_chat_logprobs(_mapping("extra_body", params.get("extra_body") or {})),
    )

    if body.get("logprobs") is False:
        del body["logprobs"]
        body.pop("top_logprobs", None)  # a 400 without logprobs
    return _checked(body)


def _to_messages(messages: Any, system: str | None = None) -> list[Any]:
    """Return a list of messages; raise ConfigurationError for what is none."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]

    is_list = isinstance(messages, list | tuple)
    if not is_list or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigurationError(
            "messages must be a string or a list of dicts like {'role': 'user', 'content': '…'}"
        )

    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, *messages]


def _settings_for(config: VLLMConfig) -> dict[str, Any]:
    """Return the settings that are request parameters."""
    names = ("temperature", "top_p", "seed", "stop", "logprobs", "reasoning_effort")
    return {name: getattr(config, name) for name in names}


def _to_chat_logprobs(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with `logprobs=N` as chat spells it.

    Each layer is translated before it is merged, so that a later `top_logprobs` wins over an
    earlier N.
    """
    number = params.get("logprobs")
    if number is None or isinstance(number, bool):
        return dict(params)
    return {"logprobs": True, "top_logprobs": number, **params} | {"logprobs": True}


def _merge(*layers: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the layers, later ones winning, without what is None and what is not sent."""
    merged: dict[str, Any] = {}
    for layer in layers:
        given = _mapping("extra_body", layer or {})
        merged |= {name: value for name, value in given.items() if value is not None}

    for name in ("extra_body", *CALL_LIMITS):
        merged.pop(name, None)
    return merged


def _checked(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body; raise ConfigurationError if it is not JSON, warn of misspelled names."""
    if "stream" in body:
        raise ConfigurationError(
            "stream is not a parameter here; stream_complete() and stream_chat() stream"
        )

    for name in body.keys() - VLLM_PARAMETERS - {"prompt", "messages"}:
        _warn_of_name(name)
    if hasattr(body.get("response_format"), "model_json_schema"):
        body["response_format"] = _to_json_schema(body["response_format"])

    _encode(body)
    return body


@functools.cache
def _warn_of_name(name: str) -> None:
    """Log a warning, once for each name: vLLM ignores an unknown parameter silently."""
    known = _nearest(name, VLLM_PARAMETERS)
    if known is not None:
        logger.warning("%s: did you mean %s? vLLM ignores unknown parameters", name, known)


def _to_json_schema(model: Any) -> dict[str, Any]:
    """Return the response_format for a class with `model_json_schema()`, as pydantic's have."""
    schema = {"name": model.__name__, "schema": model.model_json_schema()}
    return {"type": "json_schema", "json_schema": schema}


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
    """Return where the value stands that JSON cannot hold."""
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
    """Return the limits of a call with these parameters."""
    given = {}
    for name in CALL_LIMITS:
        if params.get(name) is not None:
            given[name] = _seconds(name, params[name])

    idle = config.stream_idle_timeout
    defaults = {
        "timeout": config.timeout,
        "stream_idle_timeout": config.timeout if idle is None else idle,
        "deadline": math.inf,
    }
    return _Limits(**{**defaults, **given})


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
    """Return the facts of a request."""
    name = "max_tokens"
    if body.get("max_completion_tokens") is not None:
        name = "max_completion_tokens"  # chat prefers it

    number = str(body.get(name))  # vLLM takes it as text too
    max_tokens = int(number) if re.fullmatch(r"-?\d+", number) else None
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
        self._phase_ends_at = now + limits.timeout
        self._has_new_line = False
        self.limit = "timeout"
        self.due_at = min(self._phase_ends_at, deadline_at)

    def begin_wait(self, now: float) -> None:
        """Count from now on: the client waits for the server."""
        if self._has_new_line:
            self._has_new_line = False
            self.limit = "stream_idle_timeout"
            self._phase_ends_at = now + self._limits.stream_idle_timeout
        self.due_at = min(self._phase_ends_at, self._deadline_at)

    def end_wait(self) -> None:
        """Count for the deadline alone: the client has received something."""
        self.due_at = self._deadline_at

    def note_line(self) -> None:
        """Start the idle timeout anew at the next wait: a complete line has arrived."""
        self._has_new_line = True

    def shorten(self, now: float, seconds: float) -> None:
        """Allow no more than so many seconds from now on."""
        self._has_new_line = False
        self._phase_ends_at = min(self._phase_ends_at, now + seconds)
        self.due_at = min(self._phase_ends_at, self._deadline_at)

    def drain(self, now: float) -> None:
        """Wait a moment for the bytes after the end of a stream, whatever was left before."""
        self._phase_ends_at = now + DRAIN_S
        self.shorten(now, DRAIN_S)


class _CallGroup:
    """Calls that can be stopped together: those begun inside its `with` block.

    That is in this context or in a copy of it (asyncio.to_thread, contextvars.copy_context),
    whichever client makes them. Groups nest. After stop(), a call that begins raises AbortError.
    """

    def __init__(self) -> None:
        self._calls: set[_Call] = set()
        self._is_stopped = False

    def __enter__(self) -> Self:
        self._token = _GROUPS.set((*_GROUPS.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        _GROUPS.reset(self._token)

    def add(self, call: "_Call") -> None:
        """Add a call that begins."""
        self._calls.add(call)
        if self._is_stopped:
            call.stop()

    def discard(self, call: "_Call") -> None:
        """Forget a call that has ended."""
        self._calls.discard(call)

    def stop(self) -> None:
        """Stop the calls in flight, and those that begin later; from any thread."""
        self._is_stopped = True
        for call in tuple(self._calls):
            call.stop()


_GROUPS: Final[contextvars.ContextVar[tuple[_CallGroup, ...]]] = contextvars.ContextVar(
    "vllm_provider_groups", default=()
)


def _new_id() -> str:
    """Return a new request id."""
    import uuid  # which loads `platform` and a dozen patterns

    return str(uuid.uuid4())


class _Call:
    """One call, over all its attempts and auxiliary requests; any thread may stop it.

    `attempts`: the generation requests sent under its id. `deadline_at`: of time.monotonic().
    """

    def __init__(
        self,
        limits: _Limits,
        *,
        request_id: str | None = None,
        attempts: int = 0,
        deadline_at: float = math.inf,
    ) -> None:
        self.limits = limits
        self.request_id = request_id or _new_id()
        self.keeps_id = False  # whether a caller's own id goes unchanged
        self.attempts = attempts
        self.deadline_at = deadline_at
        self.started_at: float | None = None
        self.finished_at: float | None = None
        self.first_token_s: float | None = None
        self.attempt: _Attempt | None = None
        self._is_stopped = False
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()

    def begin(self) -> None:
        """Start the call's time."""
        self.started_at = time.monotonic()
        self.deadline_at = min(self.deadline_at, self.started_at + self.limits.deadline)

    def end(self) -> None:
        """Stop the call's time and leave its connection to others."""
        self.finished_at = time.monotonic()
        if self.attempt is not None:
            self.attempt.release()

    def begin_attempt(self, attempt: "_Attempt") -> None:
        """Make this the attempt that stop() reaches."""
        self.check()
        self.attempt = attempt

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
        """Return the seconds to the deadline."""
        return self.deadline_at - time.monotonic()

    def note_first_token(self) -> None:
        """Remember when the first output arrived."""
        if self.first_token_s is None:
            self.first_token_s = self.elapsed_s()

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
    """One request of a call: its clock, its connection, and what has happened. Never used again.

    `connected`: it has a socket. `reused`: that socket served another request before. `received`:
    a byte of the reply has arrived. `expired`: its time was up, and its socket was shut.
    """

    def __init__(self, call: _Call, watch: "_Watch", where: str, is_fresh: bool) -> None:
        self.call = call
        self.where = where
        self.is_fresh = is_fresh  # whether only a new connection will do
        self.clock = _Clock(call.limits, time.monotonic(), call.deadline_at)
        self.response: requests.Response  # once its headers have arrived
        self.connected = False
        self.reused = False
        self.received = False
        self.expired = False
        self.watch = watch
        self._connection: _Connection | None = None
        self._socket: socket.socket | None = None
        self._process = os.getpid()

    def attach(self, connection: "_Connection", *, reused: bool) -> None:
        """Take over a connection: from here on, a stop reaches its socket."""
        with self.watch.lock:
            if connection.attempt is not None:  # a late stop of that call must not reach this one
                connection.attempt.release()
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
        with self.watch.lock:
            if self._connection is not None and self._connection.attempt is self:
                self._connection.attempt = None
                self._connection.used_at = time.monotonic()
                self.watch.notify(self._connection.used_at + IDLE_REUSE_S)
            self._connection = None
            self._socket = None
        self.watch.discard(self)

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

    def begin_wait(self) -> None:
        """Wait for the server from now on."""
        self.clock.begin_wait(time.monotonic())
        self.watch.notify(self.clock.due_at)

    def shorten(self, seconds: float) -> None:
        """Allow no more than so many seconds from now on."""
        self.clock.shorten(time.monotonic(), seconds)
        self.watch.notify(self.clock.due_at)

    def drain(self) -> None:
        """Wait a moment for the bytes after the end of a stream."""
        self.clock.drain(time.monotonic())
        self.watch.notify(self.clock.due_at)

    def timeout_error(self) -> LLMTimeoutError:
        """Return the error for the limit that ran out."""
        limits = self.call.limits
        now = time.monotonic()
        is_final = now >= self.call.deadline_at

        if is_final:
            happened = f"deadline of {limits.deadline:g} s reached"
            advice = "give the call more time"
        elif not self.connected and now < self.clock.due_at - POLL_S:
            happened = "no connection in time"
            advice = "is the host right, and does a firewall block it? (connect_timeout)"
        elif self.clock.limit == "timeout":
            happened = f"no reply within {limits.timeout:g} s"
            advice = "raise timeout, or ask for fewer tokens"
        else:
            happened = f"no data for {limits.stream_idle_timeout:g} s in the middle of a reply"
            advice = "raise stream_idle_timeout, or see if a proxy buffers"
        return LLMTimeoutError(f"{happened}: {self.where}; {advice}", retryable=not is_final)


class _Watch:
    """A thread that shuts the attempts whose time is up, and closes connections idle too long.

    It starts with the first request and ends when there is nothing left to watch.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._attempts: set[_Attempt] = set()
        self._connections: set[_Connection] = set()
        self._wakeups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wakes_at = math.inf
        self._is_running = False

    def add(self, attempt: _Attempt) -> None:
        """Watch an attempt."""
        with self.lock:
            self._attempts.add(attempt)
            if not self._is_running:
                self._start()
        self.notify(attempt.clock.due_at)

    def discard(self, attempt: _Attempt) -> None:
        """Watch an attempt no longer."""
        self._attempts.discard(attempt)

    def add_connection(self, connection: "_Connection") -> None:
        """Watch an open connection."""
        self._connections.add(connection)

    def discard_connection(self, connection: "_Connection") -> None:
        """Forget a connection that is closed."""
        self._connections.discard(connection)

    def notify(self, due_at: float) -> None:
        """Wake the thread if something is due before it would look."""
        if due_at < self._wakes_at:
            self._wakeups.put(None)

    def close_connections(self, idle_since: float = math.inf) -> None:
        """Close the connections that no attempt uses and that were last used before a time."""
        for connection in tuple(self._connections):
            with self.lock:
                if connection.attempt is None and connection.used_at <= idle_since:
                    connection.close()

    def _start(self) -> None:
        arguments = (weakref.ref(self), self._wakeups)  # the thread keeps no client alive
        thread = threading.Thread(
            target=_run_watch, args=arguments, name="vllm_provider watch", daemon=True
        )
        with suppress(RuntimeError):  # at the exit of the interpreter no thread can start
            thread.start()
            self._is_running = True
            weakref.finalize(self, self._wakeups.put, None).atexit = False

    def end_due(self) -> float | None:
        """End what is due; return the seconds until the next, None with nothing left to watch."""
        self._wakes_at = math.inf  # until it is known, whoever has something due says so
        now = time.monotonic()

        self.close_connections(now - IDLE_REUSE_S)
        for attempt in tuple(self._attempts):
            attempt.expire(now)

        with self.lock:
            if not self._attempts and not self._connections:
                self._is_running = False
                return None
            self._wakes_at = min(self._list_due(), default=math.inf)
        return max(0.0, self._wakes_at - now)

    def _list_due(self) -> Iterator[float]:
        for attempt in tuple(self._attempts):
            if not attempt.expired:
                yield attempt.clock.due_at
        for connection in tuple(self._connections):
            if connection.attempt is None:
                yield connection.used_at + IDLE_REUSE_S


def _run_watch(reference: "weakref.ref[_Watch]", wakeups: "queue.SimpleQueue[None]") -> None:
    """End what is due, again and again, until there is nothing to watch."""
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
        """Read the status line and the headers of the final reply."""
        if self.headers is None and self.fp.peek(1):
            _CURRENT_ATTEMPT.get().received = True
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
        if _CURRENT_ATTEMPT.get().is_fresh:
            return False
        return time.monotonic() - self.used_at < IDLE_REUSE_S and super().is_connected

    def connect(self) -> None:
        """Open the connection for the current attempt."""
        super().connect()
        self.sock.settimeout(None)  # from here on the watch keeps the time

        attempt = _CURRENT_ATTEMPT.get()
        self._watch = attempt.watch
        self._watch.add_connection(self)
        attempt.attach(self, reused=False)

    def request(self, *args: Any, **options: Any) -> None:
        """Send a request of the current attempt."""
        attempt = _CURRENT_ATTEMPT.get()
        with attempt.watch.lock:  # until now the watch may have closed it
            if self.sock is not None and not attempt.connected:
                attempt.attach(self, reused=True)
        super().request(*args, **options)

    def close(self) -> None:
        """Close the connection, which nobody needs to watch any longer."""
        if self._watch is not None:
            self._watch.discard_connection(self)
        super().close()


def _hand_over_sockets(manager: Any) -> None:
    """Make a pool manager's connections hand their sockets over, whatever kind they are."""
    classes = {}
    for scheme, pool in manager.pool_classes_by_scheme.items():
        if not issubclass(pool.ConnectionCls, _Connection):
            connection = type("_Connection", (_Connection, pool.ConnectionCls), {})
            pool = type("_Pool", (pool,), {"ConnectionCls": connection})  # noqa: PLW2901
        classes[scheme] = pool
    manager.pool_classes_by_scheme = classes


class _Adapter(HTTPAdapter):
    """requests' adapter with our connections, to the server and through proxies."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Make the pools for direct connections."""
        super().init_poolmanager(*args, **options)
        _hand_over_sockets(self.poolmanager)

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        """Return the pools for a proxy."""
        manager = super().proxy_manager_for(proxy, **options)
        _hand_over_sockets(manager)
        return manager


class _Session(requests.Session):
    """A session that follows no redirect: it would carry the prompt to another place."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Return no target."""


class _Network:
    """What a forked process must not share with its parent: session, watch, calls in flight."""

    def __init__(self, config: VLLMConfig) -> None:
        self.watch = _Watch()
        self.calls = _CallGroup()
        self.session = _Session()
        scheme = config.base_url.partition("//")[0]
        maximum = CONNECTIONS_PER_CALL * config.max_concurrency
        self.session.mount(f"{scheme}//", _Adapter(pool_maxsize=maximum))

        # Proxies, CA bundle and headers are worked out once: half the CPU of a small call.
        url = config.base_url
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
        headers |= config.default_headers
        # Not Session.prepare_request(): it puts a .netrc entry in the place of our key.
        self.template = requests.Request("POST", url, headers).prepare()

    def close(self) -> None:
        """Stop the calls in flight and close all connections."""
        self.calls.stop()
        self.session.close()
        self.watch.close_connections()


class _Transport:
    """Sends requests, and reads replies as bytes. May be shared between threads."""

    def __init__(self, config: VLLMConfig) -> None:
        self._config = config
        self._networks: dict[int, _Network] = {}

    def _network(self) -> _Network:
        """Return this process's own network; without a lock, which a fork could leave locked."""
        process = os.getpid()
        network = self._networks.get(process)
        if network is None:
            network = self._networks.setdefault(process, _Network(self._config))
        return network

    def close(self) -> None:
        """Stop the calls in flight and close all connections; a later call opens new ones."""
        network = self._networks.pop(os.getpid(), None)
        if network is not None:
            network.close()

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
                group.discard(call)

    def send(
        self, call: _Call, method: str, path: str, body: bytes | None, *, is_fresh: bool = False
    ) -> _Attempt:
        """Return one attempt with its reply, whatever its status, once the headers have arrived.

        `is_fresh`: use a new connection. Raises NetworkError, LLMTimeoutError, AbortError,
        ProtocolError, or ConfigurationError for what requests will not send.
        """
        network = self._network()
        url = self._config.base_url + path
        attempt = _Attempt(call, network.watch, f"{method} {url}", is_fresh)
        call.begin_attempt(attempt)

        request = network.template.copy()
        request.method = method
        request.url = url
        request.body = body
        request.headers.setdefault("X-Request-Id", call.wire_id())
        request.headers["Content-Length"] = str(len(body or b""))
        logger.debug("%s, %d bytes, request %s", attempt.where, len(body or b""), call.wire_id())

        network.watch.add(attempt)
        attempt.response = self._exchange(network, attempt, request)
        status = attempt.response.status_code
        logger.debug("%s: %d, request %s", attempt.where, status, call.wire_id())
        return attempt

    def _exchange(
        self, network: _Network, attempt: _Attempt, request: requests.PreparedRequest
    ) -> requests.Response:
        """Return the reply to a request; translate what requests and urllib3 raise."""
        left = attempt.clock.due_at - time.monotonic()
        connect = max(0.001, min(self._config.connect_timeout, left))
        timeout = (None if connect > MAX_WAIT_S else connect, None)

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
        raise _to_network_error(failure, cause, attempt) from cause

    def read(self, attempt: _Attempt, maximum: int | None) -> Generator[bytes, None, None]:
        """Yield the reply's bytes as they arrive.

        Read to its end, the connection can be used again; left earlier, it is closed. `maximum`:
        in bytes. Raises StreamError, LLMTimeoutError, ProtocolError or AbortError.
        """
        size = 0
        try:
            _check_headers(attempt, maximum)
            while piece := self._read_piece(attempt):
                size += len(piece)
                if maximum is not None and size > maximum:
                    yield piece[: len(piece) - (size - maximum)]
                    raise _too_large(maximum, attempt.where)
                yield piece
        finally:
            attempt.response.close()
            attempt.release()

    def _read_piece(self, attempt: _Attempt) -> bytes:
        """Return the bytes that arrive next, b"" at the end of the reply."""
        outer = sys.exception()
        attempt.begin_wait()
        try:
            piece: bytes = attempt.response.raw.read1(READ_BYTES)
            cause: BaseException | None = None
        except _IO_ERRORS as error:
            piece, cause = b"", _root_cause(error, outer)
        attempt.clock.end_wait()

        if piece:
            return piece
        attempt.call.check()
        if cause is not None and _is_from_signal_handler(cause):
            raise cause
        if attempt.expired:
            raise attempt.timeout_error() from cause
        if cause is not None:
            reason = _describe_break(cause)
            raise StreamError(f"the reply broke off: {attempt.where}: {reason}") from cause
        return b""


_IO_ERRORS: Final = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    ValueError,
)


def _check_headers(attempt: _Attempt, maximum: int | None) -> None:
    """Raise ProtocolError for a reply that is encoded, or larger than `maximum` bytes."""
    headers = attempt.response.headers
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise ProtocolError(
            f"the reply is encoded as {encoding!r}, which was not requested: {attempt.where}"
        )

    length = headers.get("Content-Length", "")
    if maximum is not None and length.isdecimal() and int(length) > maximum:
        raise _too_large(maximum, attempt.where)


def _too_large(maximum: int, where: str) -> ProtocolError:
    """Return the error for a reply over its limit."""
    return ProtocolError(f"the reply is larger than {maximum} bytes: {where}")


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


def _describe_break(cause: BaseException) -> str:
    """Return why a reply broke off."""
    if isinstance(cause, ValueError | http.client.HTTPException):
        return "the connection was closed; look at the server's log"  # of a chunk there was a part
    return str(getattr(cause, "strerror", None) or cause).lower()


def _to_network_error(error: Exception, cause: BaseException, attempt: _Attempt) -> VLLMError:
    """Return our error for one raised before there was a reply; most specific first."""
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(attempt.where.split()[1]))

    is_timeout = isinstance(error, requests.Timeout) or isinstance(cause, TimeoutError)
    if attempt.expired or (is_timeout and not attempt.connected):
        return attempt.timeout_error()
    if isinstance(cause, ssl.SSLError) and not attempt.received:
        return _to_tls_error(cause, origin)
    if isinstance(cause, socket.gaierror):
        message = f"no connection to {origin}: unknown host; is base_url spelled right?"
        return NetworkError(message, retryable=False)
    if isinstance(error, requests.exceptions.ProxyError):
        return NetworkError(
            f"no connection to {origin}: its proxy failed ({cause}); check HTTPS_PROXY and NO_PROXY"
        )
    return _to_plain_error(error, cause, attempt, origin)


def _to_plain_error(
    error: Exception, cause: BaseException, attempt: _Attempt, origin: str
) -> VLLMError:
    """Return the error for a connection without TLS or proxy."""
    if attempt.received:
        return _to_reply_error(cause, attempt.where)
    if isinstance(error, ValueError):  # the parent of what requests and urllib3 will not send
        return ConfigurationError(f"requests will not send {attempt.where}: {error}")
    if "CA certificate bundle" in str(cause):
        return ConfigurationError(f"{cause}; set verify or REQUESTS_CA_BUNDLE to one that exists")
    if attempt.connected:
        return NetworkError(
            f"closed before a reply: {attempt.where} ({cause}); is vLLM still running, and is it"
            " http there?"
        )
    reason = str(getattr(cause, "strerror", None) or cause).lower()
    advice = f"is vLLM running? (curl {origin}/health)"
    return NetworkError(f"no connection to {origin}: {reason}; {advice}")


def _to_reply_error(cause: BaseException, where: str) -> VLLMError:
    """Return the error for a reply that is no HTTP, or that ended within its first line."""
    line = str(getattr(cause, "line", "\n"))
    if isinstance(cause, OSError) or not line.endswith("\n"):
        return NetworkError(f"closed in the first line of a reply: {where} ({_quoted(str(cause))})")
    return ProtocolError(
        f"not an HTTP reply: {where}: {_quoted(str(cause))}; is it vLLM's port, and http there?"
    )


def _to_tls_error(cause: ssl.SSLError, origin: str) -> NetworkError:
    """Return the error for a TLS handshake that failed, with the advice that fits."""
    if isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return NetworkError(
            f"no connection to {origin}: the server closed the TLS handshake; is it starting or"
            " stopping?"
        )

    reason = str(cause.reason or cause)
    advice = f"does {origin} speak https?"
    if isinstance(cause, ssl.SSLCertVerificationError):
        reason = cause.verify_message
        advice = "set verify to the CA bundle that signed the server's certificate"
        if "expired" in reason:
            advice = "the server's certificate must be renewed (or this machine's clock set)"
        elif "ostname mismatch" in reason or "IP address mismatch" in reason:
            advice = "set base_url to a name in the server's certificate"
    message = f"no connection to {origin}: TLS failed ({reason}); {advice}"
    return NetworkError(message, retryable=False)


def _is_unstarted(error: VLLMError, attempt: _Attempt) -> bool:
    """Return whether a request may be sent again: it has not started, or a gateway refused it."""
    if isinstance(error, NetworkError):
        return error.retryable and not attempt.connected
    is_starting = isinstance(error, ProviderUnavailableError) and error.status_code in (
        403,
        404,
        425,
    )
    return is_starting or error.status_code in RETRIED_STATUS


def _backoff_s(config: VLLMConfig, attempt: int, retry_after_s: float | None = None) -> float:
    """Return the pause in seconds before retry number `attempt` (the first is 1).

    Between d/2 and d, where d doubles from min_retry_delay to max_retry_delay. It comes on top of
    the server's Retry-After, so that not all clients return at the same instant.

    >>> config = VLLMConfig("http://localhost:8000", min_retry_delay=1)
    >>> 7.5 <= _backoff_s(config, 1, retry_after_s=7) <= 8
    True
    """
    doubled = config.min_retry_delay * 2.0 ** min(attempt - 1, 60)
    delay = min(config.max_retry_delay, doubled)
    return (retry_after_s or 0.0) + random.uniform(delay / 2, delay)


def _retry_pause_s(config: VLLMConfig, error: VLLMError, attempt: int, time_left_s: float) -> float:
    """Return the pause in seconds before a retry; raise the error where it would be too long."""
    if (error.retry_after or 0.0) > config.max_retry_delay:
        raise error

    pause = _backoff_s(config, attempt, error.retry_after)
    if pause >= time_left_s:
        raise LLMTimeoutError(
            f"the deadline leaves no time to try again: {error}",
            retryable=False,
            status_code=error.status_code,
        ) from error
    return pause


# ---- Stream decoder (pure) --------------------------------------------------

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
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
        self._pieces: list[bytes] = []  # of a line that has not ended
        self._data: list[bytes] = []  # the data lines of an event that has not ended
        self._pending_bytes = 0  # in both
        self._after_cr = False
        self._at_start = True

    def feed(self, raw: bytes) -> list[str]:
        """Return the data of the events that `raw` completes.

        Raises ProtocolError for an event over MAX_EVENT_BYTES.
        """
        if raw.startswith(b"data: ") and raw.find(b"\n") == len(raw) - 2 and self._is_event(raw):
            return [raw[6:-2].decode("utf-8", "replace")]  # one event, as vLLM sends them: faster

        if self._after_cr and raw:
            raw = raw.removeprefix(b"\n")  # the CR before it has ended the line already
            self._after_cr = False
        if not raw:
            return []

        lines = raw.splitlines(keepends=True)
        self._after_cr = raw.endswith(b"\r")
        rest = b"" if raw.endswith((b"\n", b"\r")) else lines.pop()
        events = self._read_lines(lines)

        if rest:
            self._pieces.append(rest)
            self._pending_bytes += len(rest)
        if self._pending_bytes > MAX_EVENT_BYTES:
            raise ProtocolError(f"an event of the stream is larger than {MAX_EVENT_BYTES} bytes")
        return events

    def finish(self) -> list[str]:
        """Return what the end of the connection completes: [DONE] counts without its blank line."""
        if self._pieces:
            self._read_lines([b""])  # the end of the last line
        pending = b"\n".join(self._data).decode("utf-8", "replace")
        return [_END_OF_STREAM] if pending == _END_OF_STREAM else []

    def _is_event(self, raw: bytes) -> bool:
        """Return whether bytes with one LF before the last are an event by themselves."""
        is_between = not (self._pieces or self._data or self._after_cr or self._at_start)
        return is_between and raw.endswith(b"\n\n") and b"\r" not in raw

    def _read_lines(self, lines: list[bytes]) -> list[str]:
        """Return the data of the events that these lines complete; the first may end one."""
        if lines and self._pieces:
            lines[0] = b"".join((*self._pieces, lines[0]))
            self._pieces = []

        events = []
        for whole_line in lines:
            line = whole_line.rstrip(b"\r\n")
            if self._at_start:
                line = line.removeprefix(_BYTE_ORDER_MARK)
                self._at_start = False

            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._pending_bytes += len(line)
            elif line == b"data":
                self._data.append(b"")
            elif not line and self._data:
                data = b"\n".join(self._data).decode("utf-8", "replace")
                self._data = []
                self._pending_bytes = 0
                if data:
                    events.append(data)
        return events


# ---- Replies: errors (pure) -------------------------------------------------
#
# What vLLM says when a prompt (p tokens) or max_tokens (o) does not fit a context of M tokens,
# always with status 400, in the versions given:
#
#   0.10.0      maximum context length is M tokens. However, you requested p+o tokens (p in the
#               messages, o in the completion)
#   0.10.1-0.15 maximum context length is M tokens. However, your request has p input tokens
#               (completions print M - o in the place of M, which may be negative)
#   0.10.1-0.17 'max_tokens' or 'max_completion_tokens' is too large: o. ... maximum context
#               length is M tokens and your request has p input tokens (o > M - p)
#   0.16-0.17   You passed p input tokens and requested o output tokens. However, the model's
#               context length is only M tokens
#   0.18-0.31   maximum context length is M tokens. However, you requested o output tokens and
#               your prompt contains [at least] p input tokens
#   0.32        maximum context length is M tokens. However, your prompt contains [at least] p
#               input tokens
#   0.18-       Input length (p) exceeds model's maximum context length (M)
#   0.10.1-     max_tokens must be at least 1, got M - p
#   all         The decoder prompt (length p) is longer than the maximum model length of M
#   0.16-0.32   max_tokens=o cannot be greater than max_model_len=M (or max_total_tokens=M)
#
# "at least": the server stopped counting, so p is a lower bound.

_OUTPUT_TOO_LARGE: Final = re.compile(
    r"max_(?:completion_)?tokens=\d+ ?cannot be greater"
    r"|'max_tokens' \(\d+\) cannot be greater"
    r"|tokens' is too large: \d"
)
_DOES_NOT_FIT: Final = re.compile(
    r"maximum context length|maximum model length|context length is only \d"
    r"|max_tokens must be at least 1, got -?\d"
)
_CONTEXT_LENGTH: Final = re.compile(
    r"(?:context length(?: is(?: only)?)? \(?|maximum model length of "
    r"|max_model_len=(?:max_total_tokens=)?)(-?\d+)"
)
_INPUT_TOKENS: Final = re.compile(
    r"Input length \((\d+)\)|prompt \(length (\d+)\)"
    r"|(?:request has|prompt contains|You passed)(?: at least)? (\d+) input tokens"
    r"|requested \d+ tokens \((\d+) in the messages|requested (\d+) tokens in the messages"
)
_AVAILABLE_TOKENS: Final = re.compile(r"max_tokens must be at least 1, got (-?\d+)")
_LOWER_BOUND: Final = re.compile(r"at least \d+ input tokens")

_NAN: Final = "Out of range float values are not JSON compliant"
_ADVICE_BY_TEXT: Final = (
    (
        "tool-call-parser",
        "start vLLM with --enable-auto-tool-choice --tool-call-parser NAME, or send no tools",
    ),
    (
        "--trust-request-chat-template",
        "start vLLM with that flag, or send no chat_template",
    ),
    (
        "must provide a chat template",
        "this model has no chat template: use complete(), or start vLLM with --chat-template FILE",
    ),
    ("EngineCore", "the engine has died: look at the server's log and start it again"),
    ("greater than max allowed", "ask for fewer, or start vLLM with --max-logprobs N"),
    (_NAN, "the model computed NaN: try without logprobs, or another --dtype"),
)
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
    is_output_alone = bool(_OUTPUT_TOO_LARGE.search(message))
    if not is_output_alone and not _DOES_NOT_FIT.search(message):
        return None

    length_match = _CONTEXT_LENGTH.search(message)
    if length_match is not None:
        context_length = int(length_match.group(1))
        is_reduced = "your request has" in message and not is_output_alone
        if is_reduced and facts.is_completion:  # completions of 0.10.1-0.15 print M - o
            sent = SERVER_MAX_TOKENS if facts.max_tokens is None else facts.max_tokens
            context_length += sent

    input_tokens = _first_number(_INPUT_TOKENS.search(message))
    available_match = _AVAILABLE_TOKENS.search(message)
    if available_match is not None:
        if facts.max_tokens is not None and facts.max_tokens <= 0:
            return None  # that number is the caller's own
        if context_length is not None:
            input_tokens = context_length - int(available_match.group(1))

    is_lower_bound = bool(_LOWER_BOUND.search(message))
    return _Overflow(context_length, input_tokens, is_lower_bound, is_output_alone)


def _first_number(match: "re.Match[str] | None") -> int | None:
    """Return the number of the group that matched."""
    if match is None:
        return None
    return next(int(group) for group in match.groups() if group is not None)


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
    """Return the error for a prompt that does not fit."""
    count = "it has too many tokens"
    if overflow.input_tokens is not None:
        bound = "at least " if overflow.is_lower_bound else ""
        count = f"{bound}{overflow.input_tokens} tokens"

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
    if isinstance(payload, Mapping):
        error = payload.get("error") or payload.get("detail") or payload
    if isinstance(error, Mapping) and isinstance(error.get("error"), Mapping):
        error = error["error"]

    if isinstance(error, Mapping):
        message = error["message"] if "message" in error else json.dumps(error)
        return str(message or ""), _to_status(error.get("code"))
    if isinstance(error, str):
        return error, None
    return "" if error is None else json.dumps(error), None


def _to_status(code: object) -> int | None:
    """Return an error's code if it is an HTTP error's."""
    is_number = isinstance(code, int) and not isinstance(code, bool)
    return code if is_number and 400 <= code <= 599 else None  # type: ignore[operator,return-value]


def _error_from_payload(payload: Mapping[str, Any], facts: _RequestFacts) -> StatusError:
    """Return the error inside a reply with status 200."""
    message, code = _error_message(payload)
    # Up to vLLM 0.14 the code inside a stream is 400 for everything.
    status = 500 if "EngineCore" in message else code or 500
    return _status_error(status, message, {}, facts)


def _error_from_reply(
    status: int, headers: Mapping[str, str], raw: bytes, facts: _RequestFacts
) -> StatusError:
    """Return the error in a reply, be it JSON, HTML, text or empty."""
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
    """Return the error for a status and the server's text."""
    message = facts.redact(message)
    overflow = _read_overflow(message, facts) if status < 500 else None
    if overflow is not None and overflow.is_prompt_too_long():
        return _overflow_error(overflow, facts, message, status)

    kind = _find_error_class(status, message)
    shown = _quoted(_shorten(message)) if message.strip() else "(no message)"
    advice = _find_advice(status, message)
    error = kind(
        f"{status} {shown}: {facts.where}{advice}",
        status_code=status,
        retryable=_is_retryable(status, message),
        retry_after=_parse_retry_after(headers.get("Retry-After")),
    )
    error.server_message = message
    return error


def _find_error_class(status: int, message: str) -> type[StatusError]:
    """Return the class for a status, or for what the text says against it."""
    if _NAN in message or _is_starting_page(status, message):  # no fault of the request
        return ProviderUnavailableError
    default = ProviderUnavailableError if status >= 500 else StatusError
    return _STATUS_ERRORS.get(status, default)


def _is_retryable(status: int, message: str) -> bool | None:
    """Return whether the same call may succeed later; None leaves it to the class."""
    if _NAN in message or status == 501:
        return False
    return True if status in (408, 425) else None


def _is_starting_page(status: int, message: str) -> bool:
    """Return whether a gateway's page says that a server starts, or checks the browser."""
    page = message.lstrip().lower()
    if not page.startswith("<"):
        return False
    if status == 403:
        return "cloudflare" in page
    return status in (404, 425) and any(text in page for text in STARTING_PAGES)


def _find_advice(status: int, message: str) -> str:
    """Return what to do about an error, or nothing."""
    if _is_starting_page(status, message):
        return "; a gateway is in front of the server, which may be starting: try again later"
    for text, advice in _ADVICE_BY_TEXT:
        if text in message:
            return f"; {advice}"
    advice = _ADVICE_BY_STATUS.get(status, "")
    return f"; {advice}" if advice else ""


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
    return _parse_response(payload)


def parse_chat_response(payload: Mapping[str, Any]) -> Completion:
    """Return the Completion in a decoded reply of `/v1/chat/completions`.

    Errors as in parse_completion_response.

    >>> message = {"content": "Hi", "reasoning_content": "A greeting."}
    >>> parse_chat_response({"choices": [{"message": message}]}).reasoning
    'A greeting.'
    """
    return _parse_response(payload)


def _parse_response(payload: Mapping[str, Any]) -> Completion:
    """Return the Completion in a whole reply of either endpoint."""
    if not isinstance(payload, Mapping):
        raise ProtocolError(f"a reply is a JSON object, got a {type(payload).__name__}")

    builder = _ResponseBuilder(_RequestFacts("in the reply"), _Expected())
    builder.add_whole(payload)
    return builder.completion()


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
    """Return the error for a text that is not what vLLM sends."""
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
    """Return what the reply to a body may hold."""
    name = "top_logprobs" if "messages" in body else "logprobs"
    top = _to_top(body.get(name))
    if body.get("logprob_token_ids"):  # those come on top of the number
        top = None
    prompt_top = _to_top(body.get("prompt_logprobs"))
    return _Expected(top, top if prompt_top is None else prompt_top, new_splitter)


def _to_top(value: object) -> int | None:
    """Return a number of alternatives; None for -1 (all) and for what is no number."""
    return value if isinstance(value, int) and value >= 0 else None


def _new_text() -> io.StringIO:
    """Return a buffer for text that costs its characters, not an object for each token."""
    text = io.StringIO()
    text.readline()  # Python 3.11 would otherwise collect 100,000 pieces first
    return text


class _ToolCallBuilder:
    """A tool call while it grows."""

    __slots__ = ("arguments", "id", "name")

    def __init__(self, call_id: str, name: str) -> None:
        self.id = call_id
        self.name = name
        self.arguments = _new_text()

    def add(self, call_id: str, name: str, arguments: str) -> ToolCall:
        """Add a piece; return it with the id and the name of the whole call."""
        self.id = self.id or call_id
        self.name = self.name or name
        self.arguments.write(arguments)
        return ToolCall(self.id, self.name, arguments)

    def build(self) -> ToolCall:
        """Return the call as far as it has arrived."""
        return ToolCall(self.id, self.name, self.arguments.getvalue())


class _ChoiceBuilder:
    """A choice while it grows."""

    __slots__ = (
        "_call_at", "_calls", "_expected", "_finish_reason", "_index", "_logprobs",
        "_prompt", "_reasoning", "_splitter", "_stop_reason", "_text", "_token_ids",
    )  # fmt: skip

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
        if text:
            self._text.write(text)
        if reasoning:
            self._reasoning.write(reasoning)
        calls = self._add_calls(pieces) if pieces else ()

        logprobs: tuple[TokenLogprob, ...] = ()
        token_ids: tuple[int, ...] = ()
        if choice.get("logprobs") or choice.get("token_ids") or _has_prompt(choice):
            token_ids = tuple(choice.get("token_ids") or ())
            logprobs = self._add_tokens(choice, token_ids)

        if finish_reason is not None:
            self._finish_reason = finish_reason
            self._stop_reason = choice.get("stop_reason")
        elif not (text or reasoning or calls or logprobs or token_ids):
            return None
        return Delta(
            self._index, text, reasoning, calls, logprobs, token_ids,
            self._finish_reason, self._stop_reason,
        )  # fmt: skip

    def _add_tokens(
        self, choice: Mapping[str, Any], token_ids: tuple[int, ...]
    ) -> tuple[TokenLogprob, ...]:
        """Add the log probabilities and the token ids of a choice; return the former."""
        self._token_ids += token_ids
        if _has_prompt(choice):
            self._prompt = _parse_prompt(choice, self._expected.prompt_top)

        if not choice.get("logprobs"):
            return ()
        prompt_ids = tuple(choice.get("prompt_token_ids") or ())
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
                call = _ToolCallBuilder(call_id, name)
                self._call_at[index] = call
                self._calls.append(call)
            added.append(call.add(call_id, name, arguments or ""))
        return tuple(added)

    def build(self, prompt: Mapping[str, Any]) -> Choice:
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
            tuple(call.build() for call in self._calls),
            tuple(self._logprobs),
            tuple(self._token_ids),
            self._finish_reason,
            self._stop_reason,
            **(self._prompt or prompt),
        )


def _has_prompt(payload: Mapping[str, Any]) -> bool:
    """Return whether a choice or a whole payload says anything about the prompt."""
    return bool(payload.get("prompt_logprobs") or payload.get("prompt_token_ids"))


def _has_output(delta: Delta) -> bool:
    """Return whether a delta carries anything but the end."""
    return bool(
        delta.text or delta.reasoning or delta.tool_calls or delta.logprobs or delta.token_ids
    )


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
                _require(isinstance(index, int))
                builder = _ChoiceBuilder(index, self._expected)
                self._choices[index] = builder

            delta = builder.add(choice)
            if delta is not None:
                self.has_output = self.has_output or _has_output(delta)
                self.has_finished = self.has_finished or delta.finish_reason is not None
                deltas.append(delta)
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
    """Return the token counts of a reply."""
    prompt = usage.get("prompt_tokens") or 0
    output = usage.get("completion_tokens") or 0
    total = usage.get("total_tokens") or prompt + output
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    return Usage(prompt, output, total, cached, reasoning)


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

    ids: Sequence[int | None] = token_ids
    if len(entries) == len(prompt_ids) + len(token_ids):
        ids = (*prompt_ids, *token_ids)
    if len(entries) != len(ids):
        ids = [None] * len(entries)

    tokens = []
    for entry, token_id in zip(entries, ids, strict=True):
        others = [_parse_entry(other) for other in entry.get("top_logprobs") or ()]
        tokens.append(_parse_entry(entry, token_id, _most_likely(others, top)))
    return tuple(tokens)


def _most_likely(tokens: list[TokenLogprob], top: int | None) -> tuple[TokenLogprob, ...]:
    """Return the first `top` tokens by probability, those without one last."""

    def rank(token: TokenLogprob) -> float:
        return math.inf if token.logprob is None else -token.logprob

    return tuple(sorted(tokens, key=rank)[:top])


def _to_chat_entries(logprobs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the four parallel lists of completions as chat has them: tokens with alternatives."""
    tokens = logprobs["tokens"]
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    for token, logprob, top in zip(tokens, logprobs["token_logprobs"], tops, strict=True):
        others = [{"token": other, "logprob": value} for other, value in (top or {}).items()]
        yield {"token": token, "logprob": logprob, "top_logprobs": others}


def _parse_entry(
    entry: Mapping[str, Any], token_id: int | None = None, top: tuple[TokenLogprob, ...] = ()
) -> TokenLogprob:
    """Return one token of a chat reply's log probabilities."""
    token = entry["token"]
    if token_id is None and re.fullmatch(r"token_id:\d+", token):  # return_tokens_as_token_ids
        token_id = int(token.removeprefix("token_id:"))

    raw = entry.get("bytes")
    return TokenLogprob(
        token,
        _parse_logprob(entry.get("logprob")),
        None if raw is None else bytes(raw),
        token_id,
        entry.get("rank"),
        top,
    )


def _parse_logprob(value: float | None) -> float | None:
    """Return a log probability, -inf for vLLM's -9999.0 and None for NaN."""
    if value is None or math.isnan(value):
        return None
    return -math.inf if value <= SENTINEL_LOGPROB else value


def _parse_prompt(payload: Mapping[str, Any], top: int | None) -> dict[str, Any]:
    """Return a Choice's fields about the prompt."""
    ids = tuple(payload.get("prompt_token_ids") or ())
    tokens: list[TokenLogprob | None] = []
    for position, entry in enumerate(payload.get("prompt_logprobs") or ()):
        tokens.append(_parse_prompt_entry(entry or {}, ids[position] if ids else None, top))
    return {"prompt_logprobs": tuple(tokens), "prompt_token_ids": ids}


def _parse_prompt_entry(
    entry: Mapping[str, Mapping[str, Any]], own_id: int | None, top: int | None
) -> TokenLogprob | None:
    """Return a token of the prompt, which is the one with its own id, or else the first."""
    tokens = {}
    for key, value in entry.items():
        text = value.get("decoded_token") or ""
        logprob = _parse_logprob(value["logprob"])
        tokens[int(key)] = TokenLogprob(text, logprob, None, int(key), value.get("rank"))

    if not tokens:
        return None
    first = next(iter(tokens.values()))
    own = first if own_id is None else tokens.get(own_id, first)
    return own._replace(top=_most_likely(list(tokens.values()), top))


def _parse_models(payload: Mapping[str, Any]) -> list[ModelCard]:
    """Return the models in a reply of `/v1/models`; raise ValueError for another shape."""
    models = []
    for card in payload["data"]:
        length = _to_count(card.get("max_model_len")) or _to_count(card.get("max_input_tokens"))
        output = _to_count(card.get("max_output_tokens"))
        models.append(ModelCard(card["id"], length, card.get("root"), card.get("parent"), output))

    lengths = {model.id: model.max_model_len for model in models}
    for position, model in enumerate(models):
        if model.max_model_len is None:
            base_length = lengths.get(model.parent or "")
            models[position] = model._replace(max_model_len=base_length)
    return models


def _to_count(value: object) -> int | None:
    """Return a positive integer, also given as text; None for anything else."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_count else None  # type: ignore[return-value]


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
        self._state = "opened" if opened else "start"
        self._held = ""

    def feed(self, piece: str, *, is_last: bool = False) -> tuple[str, str, list[dict[str, Any]]]:
        """Return the text and the reasoning that are certain by now; no tool calls."""
        if self._state == "text":
            return piece, "", []

        held = self._held + piece
        self._held = ""
        if self._state in ("start", "opened"):
            if not is_last and _may_become(held, "<think>"):
                self._held = held
                return "", "", []
            held = self._open(held)
            if self._state == "text":
                return held, "", []

        reasoning, tag, text = held.partition("</think>")
        if tag:
            self._state = "text"
        elif not is_last:
            reasoning, self._held = _hold_back(reasoning, ("</think>",))
        return text, reasoning, []

    def _open(self, held: str) -> str:
        """Enter the reasoning, or the text: a tag further on is only a mention."""
        tag = held.lstrip()
        has_tag = len(held) - len(tag) <= 2 and tag.startswith("<think>")
        if self._state == "start" and not has_tag:
            self._state = "text"
            return held

        self._state = "reasoning"
        return tag.removeprefix("<think>") if has_tag else held


class _HarmonySplitter:
    """Splits gpt-oss's channels: analysis is reasoning, final and commentary are text.

    `to=functions.X` is a tool call. Needs `skip_special_tokens: false`. The prompt ends in
    `<|start|>assistant`, so the text begins inside a header.
    """

    _ENDS: Final = ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|start|>")
    _END: Final = re.compile(r"<\|(?:end|return|call|endoftext|start)\|>")

    def __init__(self) -> None:
        self._held = ""
        self._channel = ""  # none: inside a header
        self._calls = 0
        self._is_new = True

    def feed(self, piece: str, *, is_last: bool = False) -> tuple[str, str, list[dict[str, Any]]]:
        """Return the text, the reasoning and the pieces of tool calls that are certain by now."""
        self._held += piece
        text, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        while self._held:
            if not self._channel:
                header, mark, rest = self._held.partition("<|message|>")
                if not mark:
                    text += self._take_plain(header, is_last)
                    break
                self._held = rest
                calls += self._enter(header)
                continue

            body, is_over = self._take_body(is_last)
            if self._channel == "call":
                calls.append({"index": self._calls - 1, "function": {"arguments": body}})
            elif self._channel == "analysis":
                reasoning += body
            else:
                text += body
            if not is_over:
                break
            self._channel = ""
        return text, reasoning, calls

    def _take_plain(self, header: str, is_last: bool) -> str:
        """Return a text that is no harmony at all: then the prompt had the header."""
        if not is_last or not self._is_new or "<|" in header:
            return ""
        self._held = ""
        return header

    def _enter(self, header: str) -> list[dict[str, Any]]:
        """Enter the channel of a header; return the beginning of the call if it is one."""
        self._is_new = False
        recipient = re.search(r"to=([^\s<]+)", header)
        if recipient is None:
            channel = re.search(r"<\|channel\|>(\w+)", header)
            self._channel = "final" if channel is None else channel.group(1)
            return []

        self._channel = "call"
        self._calls += 1
        name = recipient.group(1).removeprefix("functions.")
        index = self._calls - 1
        return [{"index": index, "id": f"call_{self._calls}", "function": {"name": name}}]

    def _take_body(self, is_last: bool) -> tuple[str, bool]:
        """Return the body as far as it is certain, and whether its end was there."""
        held = self._held
        found = self._END.search(held)
        if found is not None:
            self._held = held[found.end() :]
            return held[: found.start()], True

        body, self._held = (held, "") if is_last else _hold_back(held, self._ENDS)
        return body, False


def _may_become(text: str, tag: str) -> bool:
    """Return whether a text may still become a tag, after two line breaks at most."""
    start = text.lstrip()
    return len(text) - len(start) <= 2 and start != tag and tag.startswith(start)


def _hold_back(text: str, tags: Sequence[str]) -> tuple[str, str]:
    """Return the text without its last characters that may begin a tag, and those."""
    start = text.rfind("<")
    if start >= 0 and any(tag.startswith(text[start:]) for tag in tags):
        return text[:start], text[start:]
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
    """Return what `/tokenize` needs to render as the chat endpoint would."""
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
        return self._complete(COMPLETIONS_PATH, body, params)

    def chat(
        self, messages: _Messages, *, system: str | None = None, **params: Unpack[_ChatParams]
    ) -> Completion:
        """Return the answer of `/v1/chat/completions`.

        `messages`: a list of dicts, or one string from the user. `system`: a system message before
        them.
        """
        body = build_chat_request(self.config, _to_messages(messages, system), **params)
        return self._complete(CHAT_PATH, body, params)

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

    def _complete(self, path: str, body: dict[str, Any], params: Mapping[str, Any]) -> Completion:
        limits = _read_limits(self.config, params)
        with closing(self._open(path, body, limits=limits, wants_stream=False)) as stream:
            for _delta in stream:
                pass
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
        return _complete_batch(
            (self, *servers), os.fspath(source), os.fspath(target), concurrency=concurrency,
            retry_failed=retry_failed, progress=progress, params=params,
        )  # fmt: skip

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
        return _choose_text(self, choices, context, params)

    def bench(
        self, *, num_prompts: int = 1000, max_concurrency: int | None = None,
        request_rate: float = math.inf, burstiness: float = 1.0, random_input_len: int = 1024,
        random_output_len: int = 128, ignore_eos: bool = False, endpoint: str = "completions",
        seed: int = 0, progress: bool = False,
    ) -> "BenchReport":  # fmt: skip
        """Return a benchmark of the server, with the figures of `vllm bench serve`.

        `max_concurrency`: requests at once, None for no limit. `request_rate`: requests a second;
        their gaps have a gamma distribution of shape `burstiness` (1: a Poisson process).
        `endpoint`: "completions" or "chat". Nothing is retried. Raises the error of the first call,
        which is not counted.
        """
        return _measure_server(
            self.config, num_prompts=num_prompts, max_concurrency=max_concurrency,
            request_rate=request_rate, burstiness=burstiness, random_input_len=random_input_len,
            random_output_len=random_output_len, ignore_eos=ignore_eos, endpoint=endpoint,
            seed=seed, progress=progress,
        )  # fmt: skip

    # Everything else a server offers.

    def get(self, path: str, **limits: Unpack[_CallParams]) -> Any:
        """Return the decoded JSON of any other endpoint, like `/load`.

        `path` begins with a slash. Limits, retries and errors are those of a generation. A reply
        of plain text is a string, an empty one None.
        """
        with self._call(limits) as call:
            return self._fetch(call, "GET", path)

    def post(self, path: str, body: Any, **limits: Unpack[_CallParams]) -> Any:
        """Return the decoded JSON of any other endpoint, like `/v1/embeddings` or `/score`.

        `body`: what JSON can hold; nothing is added to it. For the rest, see get().
        """
        with self._call(limits) as call:
            return self._fetch(call, "POST", path, body)

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
            return str(self._fetch_object(call, "GET", "/version").get("version") or "")

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
                    return self._look_at_health(look_s)
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

    def _look_at_health(self, timeout_s: float) -> bool:
        with self._call({"timeout": timeout_s}) as call:
            attempt, _facts = self._request(call, "GET", "/health")
            for _piece in self._transport.read(
                attempt, MAX_REPLY_BYTES
            ):  # to its end, for the pool
                pass
        return True

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
        self,
        path: str,
        body: dict[str, Any],
        *,
        limits: _Limits,
        wants_stream: bool | None = True,
        prompt_format: str | None = None,
        request_id: str | None = None,
        attempt: int = 0,
        deadline_at: float = math.inf,
    ) -> "Stream":
        """Return one generation as a Stream, whether or not its reply is one on the wire.

        `wants_stream`: None for a stream unless vLLM cannot. `prompt_format`: how a conversation
        becomes a prompt, as in VLLMConfig; None leaves it to the endpoint. `request_id`, `attempt`:
        the id of a whole turn, and how many requests were sent under it. `deadline_at`: of
        time.monotonic().
        """
        own_id = body.get("request_id")
        call = _Call(
            limits,
            request_id=request_id if own_id is None else str(own_id),
            attempts=attempt,
            deadline_at=deadline_at,
        )
        call.keeps_id = own_id is not None
        if wants_stream is None:
            wants_stream = not (body.get("prompt_logprobs") or body.get("use_beam_search"))

        route = _Route(path, body) if prompt_format is None else None
        return Stream(_Generation(self, call, body, wants_stream, prompt_format or "", route))

    def _reopen(self, stream: "Stream") -> "Stream":
        """Return the same generation once more: its id and deadline, its conversation rendered."""
        return Stream(stream._generation.again())

    def _find_route(self, call: _Call, body: dict[str, Any], prompt_format: str) -> _Route:
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
        options = {**_to_render_options(body), "return_token_strs": True}
        try:
            reply = self._tokenize(call, body["messages"], options)
        except (StatusError, ProtocolError) as error:
            reason = self._why_not_rendered(error)
            if reason is None or is_strict:
                raise
            messages = body["messages"]
            if reason == _NO_TEMPLATE and [item.get("role") for item in messages] == ["user"]:
                text = _text_of(messages[0])
                return _Route(COMPLETIONS_PATH, _to_completion_body(body, text))
            return reason

        ids = reply["tokens"]
        is_harmony = HARMONY_START in ids
        reason = _why_harmony(body) if is_harmony else None
        if reason is not None:
            return reason

        rendered = _to_completion_body(body, ids, self._available_tokens(body, reply))
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
        """Return the text of the last tokens of a rendered prompt."""
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

        is_path_hidden = error.status_code in (403, 404, 405) and "does not exist" not in message
        if not is_path_hidden and not isinstance(error, ProtocolError):
            return None
        if isinstance(error, ProviderUnavailableError):  # the page of a gateway that is starting
            return None
        self._render_unavailable = "/tokenize is hidden by a gateway"
        logger.warning(
            "%s: conversations go to the chat endpoint: %s", self._render_unavailable, error
        )
        return self._render_unavailable

    # Sending: the model's name, a max_tokens that fits, retries.

    def _send_generation(
        self, call: _Call, path: str, body: dict[str, Any]
    ) -> tuple[_Attempt, _RequestFacts]:
        """Return the open reply to a generation, and what errors need to know of its request."""
        body = self._with_model(call, body)
        lowerings = 0
        while True:
            try:
                return self._request(call, "POST", path, body)
            except NotFoundError as error:
                body = self._with_current_model(call, body, error)
            except (InvalidRequestError, ContextLengthError) as error:
                is_last = lowerings == MAX_LOWERINGS
                body = self._with_lower_max_tokens(call, path, body, error, is_last=is_last)
                if lowerings == 0:
                    number = body.get("max_completion_tokens") or body["max_tokens"]
                    logger.warning("max_tokens is lowered to %d: %s", number, error)
                lowerings += 1

    def _with_lower_max_tokens(
        self,
        call: _Call,
        path: str,
        body: dict[str, Any],
        error: StatusError,
        *,
        is_last: bool,
    ) -> dict[str, Any]:
        """Return the body with a max_tokens that fits.

        Raises ContextLengthError where the prompt does not fit, else the error itself where it is
        about something else, or where this was tried often enough.
        """
        facts = self._facts("POST", path, body)
        overflow = _read_overflow(error.server_message, facts)
        if overflow is None:
            raise error

        overflow = self._measure(call, body, facts, error, overflow)
        if overflow.is_prompt_too_long():
            status = error.status_code
            raise _overflow_error(overflow, facts, error.server_message, status) from error
        lowered = _lower_max_tokens(body, facts, overflow)
        if lowered is None or is_last:
            raise error
        return lowered

    def _measure(
        self,
        call: _Call,
        body: _Body,
        facts: _RequestFacts,
        error: StatusError,
        overflow: _Overflow,
    ) -> _Overflow:
        """Return the lengths with what the error leaves out, as far as the server can tell."""
        if overflow.context_length is None:
            length = self._ask_auxiliary(self._find_context_length, call, body)
            overflow = _read_overflow(error.server_message, facts, length) or overflow
        if not overflow.is_lower_bound:
            return overflow

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
        unknown = NotFoundError(
            f"model not found: {requested!r}; {advice}", status_code=error.status_code
        )
        unknown.server_message = error.server_message
        raise unknown from error

    def _request(
        self, call: _Call, method: str, path: str, body: Any = None
    ) -> tuple[_Attempt, _RequestFacts]:
        """Return the open reply with status 200 to a request, retried where that is safe."""
        raw = None if body is None else _encode(body)
        facts = self._facts(method, path, body if isinstance(body, Mapping) else {})
        maximum = 3 if self.config.max_retries is None else self.config.max_retries
        if path in _NOT_RETRIED:
            maximum = 0

        retries = 0
        is_fresh = False
        while True:
            try:
                return self._try(call, method, path, raw, facts, is_fresh), facts
            except VLLMError as error:
                attempt = call.attempt
                if attempt is None or isinstance(error, AbortError):
                    raise
                if _is_stale(error, attempt):  # no failure of the server's, so no retry either
                    is_fresh = True
                    continue
                retries += 1
                if retries > maximum or not _is_unstarted(error, attempt):
                    raise
                pause_s = _retry_pause_s(self.config, error, retries, call.time_left_s())
                logger.warning("retry %d of %d in %.1f s: %s", retries, maximum, pause_s, error)
            call.pause(pause_s)

    def _try(
        self,
        call: _Call,
        method: str,
        path: str,
        raw: bytes | None,
        facts: _RequestFacts,
        is_fresh: bool,
    ) -> _Attempt:
        """Return one attempt whose reply has status 200; raise the error of any other."""
        if path in GENERATION_PATHS:
            call.attempts += 1
        attempt = self._transport.send(call, method, path, raw, is_fresh=is_fresh)
        status = attempt.response.status_code
        if status == 200:
            return attempt

        attempt.shorten(ERROR_BODY_S)
        error_body = bytearray()
        with suppress(StreamError, LLMTimeoutError, ProtocolError):  # as much of it as there is
            for piece in self._transport.read(attempt, MAX_ERROR_BYTES):
                error_body += piece
        raise _error_from_reply(status, attempt.response.headers, bytes(error_body), facts)

    # Receiving.

    def _read_reply(
        self, call: _Call, attempt: _Attempt, facts: _RequestFacts, builder: _ResponseBuilder
    ) -> Iterator[Delta]:
        """Yield what the reply adds to `builder`, event by event or as a whole."""
        if _is_event_stream(attempt.response):
            return self._read_events(call, attempt, facts, builder)
        return iter(builder.add_whole(_decode_json(self._read_text(attempt), facts)))

    def _read_events(
        self, call: _Call, attempt: _Attempt, facts: _RequestFacts, builder: _ResponseBuilder
    ) -> Iterator[Delta]:
        decoder = _SSEDecoder()
        with closing(self._transport.read(attempt, None)) as pieces:
            for raw in pieces:
                for data in decoder.feed(raw):
                    call.check()
                    if data == _END_OF_STREAM:
                        self._end_stream(attempt, builder, pieces)
                        return
                    deltas = builder.add(_decode_json(data, facts))
                    if call.first_token_s is None and builder.has_output:
                        call.note_first_token()
                    yield from deltas

                if builder.has_output and (b"\n" in raw or b"\r" in raw):
                    attempt.clock.note_line()

            if decoder.finish():
                self._end_stream(attempt, builder, pieces)
                return
        raise StreamError(
            f"the stream ended without [DONE]: {attempt.where}; was the server or a proxy stopped?"
        )

    def _end_stream(
        self, attempt: _Attempt, builder: _ResponseBuilder, pieces: Iterator[bytes]
    ) -> None:
        """Check that the stream had output, and wait for its last bytes, to keep the connection."""
        if not builder.has_output and not builder.has_finished:
            # vLLM 0.13-0.31 can lose an error before the first token.
            raise StreamError(
                f"the stream ended without any output: {attempt.where}; look at the server's log"
            )

        attempt.drain()
        with suppress(VLLMError):
            for _piece in pieces:
                pass

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

    def _fetch(self, call: _Call, method: str, path: str, body: Any = None) -> Any:
        """Return the decoded reply of an endpoint."""
        if not path.startswith("/"):
            raise ConfigurationError(f"path must begin with a slash, got {path!r}")

        attempt, facts = self._request(call, method, path, body)
        text = self._read_text(attempt)
        if not text.strip():
            return None
        if attempt.response.headers.get("Content-Type", "").lower().startswith("text/plain"):
            return text

        payload = _decode_json(text, facts, object)
        if isinstance(payload, dict) and payload.get("error"):
            raise _error_from_payload(payload, facts)
        return payload

    def _fetch_object(
        self, call: _Call, method: str, path: str, body: Any = None
    ) -> dict[str, Any]:
        payload = self._fetch(call, method, path, body)
        if isinstance(payload, dict):
            return payload
        raise _not_json(str(payload or ""), self._facts(method, path, {}))

    def _with_model(self, call: _Call, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body with a model: the caller's, the configured one, or the server's first."""
        if body.get("model"):
            return body
        if self.config.default_model is not None:
            return {**body, "model": self.config.default_model}
        name = self._served.find(call, self._discover)
        return {**body, "model": name} if name else body

    def _discover(self, call: _Call) -> None:
        """Ask for the models; where a gateway hides them, vLLM takes its first if none is named."""
        try:
            self._list_models(call)
        except (StatusError, ProtocolError) as error:
            if error.retryable:
                raise
            self._served.remember("")

    def _list_models(self, call: _Call) -> list[ModelCard]:
        payload = self._fetch_object(call, "GET", "/v1/models")
        try:
            models = _parse_models(payload)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = f"GET {self.config.base_url}/v1/models"
            raise ProtocolError(
                f"not the list of models vLLM sends: {where}; {BASE_URL_ADVICE}"
            ) from error
        self._served.remember(models[0].id if models else "")
        return models

    def _find_context_length(self, call: _Call, body: _Body) -> int | None:
        """Return the context length of the body's model, in tokens."""
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
        names = (
            "model", "tools", "add_generation_prompt", "continue_final_message",
            "chat_template_kwargs",
        )  # fmt: skip
        options = {name: body[name] for name in names if name in body}
        return len(self._tokenize(call, source, options)["tokens"])

    def _tokenize(self, call: _Call, source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply of `/tokenize`: tokens, count, max_model_len."""
        name = "prompt" if isinstance(source, str) else "messages"
        reply = self._ask_tokenizer(call, "/tokenize", {name: source, **options})
        if not isinstance(reply.get("tokens"), list):
            where = f"POST {self.config.base_url}/tokenize"
            raise ProtocolError(f"not what vLLM's tokenizer sends: {where}")
        return reply

    def _ask_tokenizer(self, call: _Call, path: str, body: dict[str, Any]) -> dict[str, Any]:
        body = self._with_model(call, body)
        try:
            return self._fetch_object(call, "POST", path, body)
        except NotFoundError as error:
            body = self._with_current_model(call, body, error)
        return self._fetch_object(call, "POST", path, body)


def _is_event_stream(response: requests.Response) -> bool:
    """Return whether a reply is a stream: not every gateway streams when asked to."""
    content_type = response.headers.get("Content-Type")
    if content_type is None:
        return b'"stream":true' in bytes(response.request.body or b"")  # type: ignore[arg-type]
    return "event-stream" in content_type.lower()


def _is_stale(error: VLLMError, attempt: _Attempt) -> bool:
    """Return whether the server had closed an idle connection before the request came."""
    return isinstance(error, NetworkError) and attempt.reused and not attempt.received


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

    def find(self, call: _Call, discover: Callable[[_Call], None]) -> str:
        """Return the name, after `discover` has remembered it if need be."""
        if self._is_known():
            return self.name or ""

        has_lock = self._wait(call)
        try:
            if not self._is_known():
                discover(call)
        finally:
            if has_lock:
                self._lock.release()
        return self.name or ""

    def _is_known(self) -> bool:
        return self.name is not None and time.monotonic() < self._forget_at

    def _wait(self, call: _Call) -> bool:
        """Wait for another thread's answer; not forever: a fork may have left the lock locked."""
        give_up_at = time.monotonic() + HEALTH_LOOK_S
        while time.monotonic() < min(give_up_at, call.deadline_at):
            if self._lock.acquire(timeout=POLL_S):
                return True
            call.check()
            if self._is_known():
                return False
        return False


class _Generation:
    """One generation: what is sent, and what has been received of its reply.

    It does not know the Stream that reads it, so that a Stream nobody holds is closed at once.
    """

    def __init__(
        self,
        client: VLLMClient,
        call: _Call,
        body: dict[str, Any],
        wants_stream: bool,
        prompt_format: str,
        route: _Route | None,
    ) -> None:
        self.call = call
        self.route = route  # None until a conversation is rendered
        self._client = client
        self._body = body
        self._wants_stream = wants_stream
        self._prompt_format = prompt_format
        self._builder: _ResponseBuilder | None = None  # None before the reply begins

    def again(self) -> Self:
        """Return the same generation, to be sent once more under the same id."""
        call = _Call(
            self.call.limits,
            request_id=self.call.request_id,
            attempts=self.call.attempts,
            deadline_at=self.call.deadline_at,
        )
        call.keeps_id = self.call.keeps_id
        return type(self)(
            self._client, call, self._body, self._wants_stream, self._prompt_format, self.route
        )

    def receive(self) -> Generator[Delta, None, None]:
        """Send the request and yield the deltas of its reply."""
        client = self._client
        call = self.call
        with client._transport.call(call):
            if self.route is None:
                self.route = client._find_route(call, self._body, self._prompt_format)
            path, body, new_splitter, _degradation = self.route

            expected = _read_expected(body, new_splitter)
            if self._wants_stream:
                body = _to_stream(body)
            attempt, facts = client._send_generation(call, path, body)
            self._builder = _ResponseBuilder(facts, expected, call.request_id)
            yield from client._read_reply(call, attempt, facts, self._builder)

    def completion(self) -> Completion:
        """Return what has been received until now."""
        first_token_s = self.call.first_token_s
        total_s = self.call.elapsed_s()
        if self._builder is None:
            return Completion(request_id=self.call.request_id, total_s=total_s)
        return self._builder.completion(first_token_s=first_token_s, total_s=total_s)


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
        """Send the request and wait for its first delta."""
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
# One engine: worker threads take items from an iterator and leave outcomes for one consumer. map()
# yields them in the order of the items; run_batch() and bench() take them as they come.

RESULTS_PER_WORKER: Final = 16  # finished results that may wait for the consumer, times concurrency
STOP_S: Final = 0.5  # how long a stop waits for the threads: a function that makes no call goes on
WAKE_S: Final = 0.5  # on Windows, Ctrl-C reaches a waiting main thread only between two waits
PROGRESS_S: Final = 0.2


class _Outcome(NamedTuple):
    """What a function returned for one item, or the exception it raised."""

    value: Any = None
    error: BaseException | None = None


class _Workers:
    """Threads that call `function` with each item; one more starts whenever an item has been taken.

    `is_ordered`: outcomes come in the order of the items, not of completion. `errors`: as in map();
    no item is taken after an error that ends it.
    """

    def __init__(
        self, function: Callable[[Any], Any], items: Iterable[Any], concurrency: int,
        *, is_ordered: bool, errors: str, progress: "_Progress",
    ) -> None:  # fmt: skip
        self._function = function
        self._items = iter(items)
        self._items_error: BaseException | None = None
        self._concurrency = concurrency
        self._is_ordered = is_ordered
        self._errors = errors
        self._progress = progress
        self._threads: list[threading.Thread] = []
        self._outcomes: dict[int, _Outcome] = {}
        self._taken = 0
        self._finished = 0
        self._delivered = 0
        self._is_exhausted = False
        self._taking = threading.Lock()  # held while the iterator is asked for an item
        self._lock = threading.RLock()  # reentrant: the garbage collector may stop() in any thread
        self._has_outcome = threading.Condition(self._lock)
        self._has_space = threading.Condition(self._lock)
        with _CallGroup() as group:  # not around a `yield`: it would catch the consumer's calls
            self._context = copy_context()
        self._group = group

    def outcomes(self) -> Iterator[_Outcome]:
        """Yield the outcomes; at their end raise what the iterator of the items raised."""
        self._start_worker()
        outcome = self._next_outcome()
        while outcome is not None:
            yield outcome
            outcome = self._next_outcome()

        if self._items_error is not None:
            raise self._items_error

    def stop(self) -> None:
        """Stop the calls that have not ended, and wait a moment for the threads."""
        with self._lock:
            is_finished = self._is_finished()
            self._is_exhausted = True
            self._has_space.notify_all()
        if not is_finished:
            self._group.stop()

        stops_at = time.monotonic() + STOP_S
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, stops_at - time.monotonic()))

    def _is_finished(self) -> bool:
        return self._is_exhausted and self._delivered == self._taken

    def _next_outcome(self) -> _Outcome | None:
        with self._lock:
            while self._delivered not in self._outcomes:
                if self._is_finished():
                    return None
                self._has_outcome.wait(WAKE_S)

            outcome = self._outcomes.pop(self._delivered)
            self._delivered += 1
            self._has_space.notify()
            return outcome

    def _start_worker(self) -> None:
        with self._lock:
            if self._is_exhausted or len(self._threads) == self._concurrency:
                return
            run = self._context.copy().run
            name = f"vllm-map-{len(self._threads)}"
            thread = threading.Thread(target=run, args=(self._work,), name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self) -> None:
        while True:
            with self._taking:
                if not self._wait_for_space():
                    return
                try:
                    item = next(self._items)
                except BaseException as error:  # noqa: BLE001  # raised where the outcomes are read
                    self._end_items(error)
                    return
                position = self._taken
                self._taken += 1
                self._start_worker()
            try:
                outcome = _Outcome(self._function(item))
            except BaseException as error:  # noqa: BLE001  # raised where the outcomes are read
                outcome = _Outcome(error=error)
            self._leave(position, outcome)

    def _wait_for_space(self) -> bool:
        """Return whether an item may be taken, once there is space for its outcome."""
        limit = RESULTS_PER_WORKER * self._concurrency
        with self._lock:
            while self._taken - self._delivered >= limit and not self._is_exhausted:
                self._has_space.wait()
            return not self._is_exhausted

    def _end_items(self, error: BaseException) -> None:
        with self._lock:
            self._is_exhausted = True
            if not isinstance(error, StopIteration):
                self._items_error = error
            self._has_outcome.notify()

    def _leave(self, position: int, outcome: _Outcome) -> None:
        with self._lock:
            self._progress.add(outcome)
            place = position if self._is_ordered else self._finished
            self._finished += 1
            self._outcomes[place] = outcome
            if _ends_map(outcome.error, self._errors):
                self._is_exhausted = True  # what comes after it would never be yielded
            if place == self._delivered:
                self._has_outcome.notify()


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
        """Count an outcome; its value may have `error`, and `output_tokens` or `usage`."""
        value = outcome.value
        self._done += 1
        self._failed += (outcome.error or getattr(value, "error", None)) is not None
        self._tokens += getattr(getattr(value, "usage", value), "output_tokens", 0)
        if self._is_shown and time.monotonic() - self._shown_at >= PROGRESS_S:
            self._show()

    def close(self) -> None:
        """Show the last state and end the line."""
        if self._is_shown:
            self._show()
            sys.stderr.write("\n")

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        elapsed_s = max(0.001, self._shown_at - self._started_at)
        calls_per_s = self._done / elapsed_s
        text = f" done, {self._failed} failed, {calls_per_s:.1f} calls/s"
        text += f", {self._tokens / elapsed_s:.0f} tokens/s"
        if self._total is None:
            text = f"{self._done}{text}"
        else:
            left_s = (self._total - self._done) / max(calls_per_s, 1e-9)
            text = f"{self._done}/{self._total}{text}, {left_s:.0f} s left"
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def _map_in_threads(
    function: Callable[[Any], Any], items: Iterable[Any], concurrency: int, *,
    errors: str = "raise", is_ordered: bool = True, progress: bool = False,
    total: int | None = None,
) -> Generator[Any, None, None]:  # fmt: skip
    """Yield what `function` returns for each item; its calls and threads end with the iteration."""
    shown = _Progress(progress, total)
    workers = _Workers(
        function, items, concurrency, is_ordered=is_ordered, errors=errors, progress=shown
    )
    try:
        for value, error in workers.outcomes():
            if error is None:
                yield value
            elif _ends_map(error, errors):
                raise error
            else:
                yield error
    finally:
        workers.stop()
        shown.close()


def _ends_map(error: BaseException | None, errors: str) -> bool:
    """Return whether an error is raised, not yielded; AbortError is: the calls were stopped."""
    if error is None:
        return False
    return errors == "raise" or isinstance(error, AbortError) or not isinstance(error, Exception)


def _read_count(name: str, value: int | None, default: int) -> int:
    """Return a number of at least 1."""
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


# ---- Many calls: batch files (pure) -----------------------------------------


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What run_batch() did with `total` lines. `skipped`: done by an earlier run.

    Tokens are those of this run. `first_error`: its first failure, with the line; None without one.
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
        text = f"{self.total} lines: {self.done} done, {self.failed} failed, {self.skipped} skipped"
        text += f" in {self.seconds:.1f} s, {self.input_tokens} input tokens"
        text += f", {self.output_tokens} output tokens"
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
        _check_type(line, dict, "a line must be a JSON object")
        if "body" not in line:
            line = _to_batch_form(number, line)
        _check_type(line.get("custom_id"), str, "custom_id must be a string")
        custom_id = line["custom_id"]
        _check_type(line.get("body"), dict, "body must be a JSON object")
        if line.get("method", "POST") != "POST":
            raise ValueError("method must be POST")
        if not str(line.get("url")).startswith("/"):
            raise ValueError("url must be a path like /v1/chat/completions")
    except (ValueError, RecursionError) as error:
        reason = str(error).partition(": line ")[0]  # json's own numbers are of no use here
        return _BatchLine(number, custom_id, problem=f"line {number}: {reason}")
    return _BatchLine(number, custom_id, line["url"], line["body"])


def _check_type(value: Any, kind: type, text: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(text)


def _to_batch_form(number: int, line: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a line that is a request alone, without `body`, in the form of a batch file."""
    custom_id = line.get("custom_id", str(number))
    body = {name: line[name] for name in line if name != "custom_id"}
    if "messages" in line:
        return {"custom_id": custom_id, "url": CHAT_PATH, "body": body}
    if "prompt" in line:
        return {"custom_id": custom_id, "url": COMPLETIONS_PATH, "body": body}
    return line


def _parse_result_line(raw: bytes) -> tuple[str, bool] | None:
    """Return the id of a result and whether it is a success; None for what is not a result."""
    try:
        line = json.loads(raw.decode())
        response = line["response"] or {"status_code": 0}
        return str(line["custom_id"]), 200 <= response["status_code"] < 300
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _build_result_line(custom_id: str, reply_id: str, payload: Mapping[str, Any]) -> bytes:
    response = {"status_code": 200, "request_id": reply_id, "body": payload}
    return _encode_result(custom_id, reply_id, response, None)


def _build_failure_line(custom_id: str, error: Exception) -> bytes:
    """Return a failure as vLLM writes one with a status, and OpenAI one without."""
    import uuid

    kind = type(error).__name__
    status = getattr(error, "status_code", None)
    reply_id = getattr(error, "request_id", None) or str(uuid.uuid4())
    if status is None:
        details = {"code": kind, "message": str(error)}
        return _encode_result(custom_id, reply_id, None, details)
    message = getattr(error, "server_message", "") or str(error)
    fields = {"message": message, "type": kind, "param": None, "code": status}
    response = {"status_code": status, "request_id": reply_id, "body": None}
    return _encode_result(custom_id, reply_id, response, {"error": fields})


def _encode_result(custom_id: str, reply_id: str, response: Any, error: Any) -> bytes:
    line = {"id": f"vllm-{reply_id}", "custom_id": custom_id, "response": response, "error": error}
    try:
        return _encode(line) + b"\n"
    except ConfigurationError:  # NaN, or a lone surrogate that the server wrote as \ud83d
        return json.dumps(_to_json(line), allow_nan=False).encode() + b"\n"


_SEEN: Final = 1  # flags of an id: it is in the source, its last result is a success, … a failure
_DONE: Final = 2
_FAILED: Final = 4


class _IdTable:
    """The flags of a million ids in 18 MB, where a dict takes 150.

    An open hash table, at most half full, of 8-byte BLAKE2b hashes instead of the ids. Two of a
    million ids share a hash with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._hashes = array.array("Q", bytes(8 * 1024))
        self._flags = bytearray(1024)
        self._count = 0

    def add(self, custom_id: str, flag: int, keep: int = 0xFF) -> int:
        """Set a flag of an id, drop those not in `keep`, and return the flags it had before."""
        raw = custom_id.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(raw, digest_size=8).digest()
        key = max(1, int.from_bytes(digest, "little"))  # 0 is an empty slot
        slot = self._find_slot(key)
        before = self._flags[slot]
        self._flags[slot] = (before & keep) | flag
        if self._hashes[slot] == 0:
            self._hashes[slot] = key
            self._count += 1
        if self._count * 2 > len(self._flags):
            self._grow()
        return before

    def _find_slot(self, key: int) -> int:
        hashes = self._hashes
        mask = len(hashes) - 1
        slot = key & mask
        while hashes[slot] not in (key, 0):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = zip(self._hashes, self._flags, strict=True)
        self._hashes = array.array("Q", bytes(16 * len(self._flags)))
        self._flags = bytearray(2 * len(self._flags))
        for key, flags in old:
            if key != 0:
                slot = self._find_slot(key)
                self._hashes[slot] = key
                self._flags[slot] = flags


# ---- Many calls: batches ----------------------------------------------------

MAX_LINE_SENDS: Final = 3  # of a line whose connection breaks while its server answers others
SERVER_GONE_S: Final = 300.0  # how long a batch waits for servers that have stopped answering
SERVER_POLL_S: Final = 0.2
SERVER_PAUSE_S: Final = (0.5, 30.0)  # the limits of a pause before a server is tried again
FULL_STATUS: Final = frozenset({429, 503})


def _open_batch_source(path: str) -> BinaryIO:
    """Return the file, which is read twice; standard input is copied to a temporary one first."""
    if path != "-":
        return _open_batch_file(path, "rb")
    import shutil
    import tempfile

    copied = tempfile.TemporaryFile()  # noqa: SIM115  # closed by the caller
    shutil.copyfileobj(sys.stdin.buffer, copied)
    return copied


def _read_batch_lines(file: BinaryIO) -> Iterator[_BatchLine]:
    r"""Yield the lines that are not blank. They end at \n only: JSON may hold other line breaks."""
    file.seek(0)
    for number, raw in enumerate(file, 1):
        text = raw.strip()
        if number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf").strip()
        if text:
            yield _parse_batch_line(number, text)


def _note_ids(file: BinaryIO, ids: _IdTable) -> "collections.Counter[int]":
    """Note the ids and return how many lines have which flags; raise for an id that comes twice."""
    counts: collections.Counter[int] = collections.Counter()
    for line in _read_batch_lines(file):
        flags = ids.add(line.custom_id, _SEEN)
        counts[flags] += 1
        if flags & _SEEN:
            first = next(one for one in _read_batch_lines(file) if one.custom_id == line.custom_id)
            where = f"lines {first.number} and {line.number}"
            name = _quoted(line.custom_id)
            raise ConfigurationError(f"custom_id {name} is on {where}; give each line its own")
    return counts


class _BatchTarget:
    """The results of a batch. A line is written whole, or the file is left as it was."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._size = 0
        self._file: Any = io.BytesIO()  # until open()

    def note_results(self, ids: _IdTable) -> None:
        """Note the results of earlier runs; the last one of an id counts."""
        if not os.path.isfile(self._path):
            return
        with _open_batch_file(self._path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    break  # cut off when an earlier run was killed
                self._size += len(raw)
                result = _parse_result_line(raw)
                if result is None:
                    where = f"line {number} of {self._path}"
                    text = f"{where} is not the result of a batch; is it the right file?"
                    raise ConfigurationError(text)
                custom_id, is_done = result
                ids.add(custom_id, _DONE if is_done else _FAILED, keep=_SEEN)

    def open(self) -> None:
        """Open the file for more lines, and drop a last one that is not whole."""
        if self._path == "-":
            self._file = sys.stdout.buffer
        else:
            self._file = _open_batch_file(self._path, "ab")
            self._cut()

    def write(self, line: bytes) -> None:
        """Write a line at once, from any thread; raise OSError when the disk is full."""
        with self._lock:
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                self._file.flush()
            except OSError:
                self._cut()
                raise
            self._size += len(line)

    def close(self) -> None:
        if self._path != "-":
            self._file.close()

    def _cut(self) -> None:
        if os.path.isfile(self._path):  # not standard output, a pipe or a device
            self._file.truncate(self._size)


def _open_batch_file(path: str, mode: Literal["rb", "ab"]) -> BinaryIO:
    """Return the file; what is written to it goes to the system at once."""
    try:
        file: Any = io.FileIO(path, "ab") if mode == "ab" else io.BufferedReader(io.FileIO(path))
    except OSError as error:
        raise ConfigurationError(f"cannot open {path}: {error.strerror}") from error
    return cast(BinaryIO, file)


class _LineResult(NamedTuple):
    error: str | None
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class _Server:
    """A server of a batch. `failure`: why it is left alone until `next_try_at`, or None."""

    client: VLLMClient
    places: int
    answered_at: float = -math.inf
    next_try_at: float = 0.0
    failure: VLLMError | None = None

    def is_gone(self) -> bool:
        return self.failure is not None and time.monotonic() - self.answered_at > SERVER_GONE_S


class _Batch:
    """A batch while it runs. A line goes to the server with the most free places."""

    def __init__(
        self, clients: Sequence[VLLMClient], concurrency: int | None,
        params: Mapping[str, Any], target: _BatchTarget,
    ) -> None:  # fmt: skip
        self._params = params
        self._limits = _read_limits(clients[0].config, params)
        self._target = target
        self._changed = threading.Condition()
        self._is_stopped = threading.Event()
        self._servers: list[_Server] = []
        for client in clients:
            places = _read_count("concurrency", concurrency, client.config.max_concurrency)
            self._servers.append(_Server(client, places))

    @property
    def places(self) -> int:
        """Return how many lines are sent at once."""
        return sum(server.places for server in self._servers)

    def stop(self) -> None:
        """End the waiting for servers."""
        self._is_stopped.set()

    def run_line(self, line: _BatchLine) -> _LineResult:
        """Send a line and write its result; raise what ends the batch."""
        try:
            if line.problem:
                raise ConfigurationError(line.problem)
            reply_id, payload = self._send(line)
        except AbortError:
            raise
        except (VLLMError, TypeError) as error:
            if self._are_gone():
                raise
            self._target.write(_build_failure_line(line.custom_id, error))
            prefix = f"line {line.number}: "
            return _LineResult(prefix + str(error).removeprefix(prefix))

        self._target.write(_build_result_line(line.custom_id, reply_id, payload))
        if not payload.get("usage"):
            return _LineResult(None)
        usage = _parse_usage(payload["usage"])
        return _LineResult(None, usage.input_tokens, usage.output_tokens)

    def _send(self, line: _BatchLine) -> tuple[str, Mapping[str, Any]]:
        """Return the id and the payload of a reply; wait for servers that are full or silent."""
        started_at = time.monotonic()
        deadline_at = started_at + self._limits.deadline
        breaks = 0
        while True:
            server = self._acquire(deadline_at)
            failure: VLLMError | None = None
            pause_s = 0.0
            try:
                return self._request(server.client, line, deadline_at)
            except VLLMError as error:
                if error.status_code in FULL_STATUS:
                    pause_s = _pause_s(time.monotonic() - started_at, error.retry_after or 0.0)
                elif _is_broken(error):
                    failure = error
                    breaks += server.failure is None
                else:
                    raise
                if breaks == MAX_LINE_SENDS or time.monotonic() + pause_s >= deadline_at:
                    raise
            finally:
                self._release(server, failure)
            self._is_stopped.wait(pause_s)

    def _acquire(self, deadline_at: float) -> _Server:
        """Return the server with the most free places; wait for one that answers."""
        with self._changed:
            while not self._is_stopped.is_set():
                now = time.monotonic()
                ready = [one for one in self._servers if one.places and now >= one.next_try_at]
                if ready:
                    server = max(ready, key=lambda one: one.places)
                    server.places -= 1
                    return server

                failure = self._servers[0].failure
                if failure is not None and (now >= deadline_at or self._are_gone()):
                    raise failure
                self._changed.wait(SERVER_POLL_S)
        raise AbortError("the batch was stopped")

    def _are_gone(self) -> bool:
        return all(server.is_gone() for server in self._servers)

    def _release(self, server: _Server, failure: VLLMError | None) -> None:
        now = time.monotonic()
        with self._changed:
            server.places += 1
            server.failure = failure
            if failure is None:
                server.answered_at = now
                server.next_try_at = 0.0
            else:
                server.next_try_at = now + _pause_s(now - server.answered_at)
            self._changed.notify()

    def _request(
        self, client: VLLMClient, line: _BatchLine, deadline_at: float
    ) -> tuple[str, Mapping[str, Any]]:
        """Return the id and the payload of one reply; the batch's parameters are defaults."""
        body = {**self._params, **line.body}
        if line.url not in (CHAT_PATH, COMPLETIONS_PATH):
            body = {name: value for name, value in body.items() if name not in CALL_LIMITS}
            left_s = max(0.001, deadline_at - time.monotonic())
            payload = client.post(line.url, body, timeout=self._limits.timeout, deadline=left_s)
            return str(payload.get("id")), payload

        for name in ("stream", "stream_options"):  # a result is a whole reply
            body.pop(name, None)
        if line.url == CHAT_PATH:
            request = build_chat_request(client.config, body.pop("messages", None), **body)
        else:
            request = build_completion_request(client.config, body.pop("prompt", None), **body)
        stream = client._open(
            line.url, request, limits=self._limits, wants_stream=False, deadline_at=deadline_at
        )
        collections.deque(stream, maxlen=0)
        return stream.request_id, stream.completion.payload


def _is_broken(error: VLLMError) -> bool:
    """Return whether an error is about a server that does not answer, not about a request."""
    return isinstance(error, NetworkError | StreamError) or error.status_code == 502


def _pause_s(waited_s: float, retry_after_s: float = 0.0) -> float:
    """Return the pause before a server is tried again: about as long as it has been waited for."""
    shortest, longest = SERVER_PAUSE_S
    pause = min(longest, max(shortest, waited_s))
    return max(retry_after_s, random.uniform(pause / 2, pause))


def _complete_batch(
    clients: Sequence[VLLMClient], source: str, target: str, *, concurrency: int | None,
    retry_failed: bool, progress: bool, params: Mapping[str, Any],
) -> BatchReport:  # fmt: skip
    """Return the report of VLLMClient.run_batch()."""
    started_at = time.monotonic()
    with closing(_open_batch_source(source)) as file, closing(_BatchTarget(target)) as results:
        if _is_same_file(source, target):
            raise ConfigurationError(f"source and target are the same file: {target}")
        batch = _Batch(clients, concurrency, params, results)
        ids = _IdTable()
        results.note_results(ids)
        counts = _note_ids(file, ids)
        results.open()

        total = sum(counts.values())
        old_failures = 0
        final = _DONE
        if not retry_failed:
            old_failures = counts[_FAILED]
            final = _DONE | _FAILED
        lines = (line for line in _read_batch_lines(file) if not ids.add(line.custom_id, 0) & final)
        outcomes = _map_in_threads(
            batch.run_line, lines, batch.places, is_ordered=False, progress=progress,
            total=total - counts[_DONE] - old_failures,
        )  # fmt: skip
        try:
            tally, first_error = _tally_results(outcomes)
        finally:
            batch.stop()
            outcomes.close()

    tally["failed"] += old_failures
    seconds = time.monotonic() - started_at
    return BatchReport(
        total, skipped=counts[_DONE], seconds=seconds, first_error=first_error, **tally
    )


def _is_same_file(source: str, target: str) -> bool:
    try:
        return os.path.samefile(source, target)
    except OSError:  # one of them does not exist, or is "-"
        return False


def _tally_results(results: Iterable[_LineResult]) -> tuple["collections.Counter[str]", str | None]:
    """Return the sums, under the names of BatchReport, and the first error."""
    tally: collections.Counter[str] = collections.Counter()
    first_error: str | None = None
    for result in results:
        tally["input_tokens"] += result.input_tokens
        tally["output_tokens"] += result.output_tokens
        if result.error is None:
            tally["done"] += 1
        else:
            tally["failed"] += 1
            first_error = first_error or result.error
    return tally, first_error


# ---- Many calls: scores -----------------------------------------------------

SCORES_AT_ONCE: Final = 8  # each is a full prefill with (tokens x vocabulary) floats on the GPU
RENDER_OPTIONS: Final = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")
TOKENIZE_OPTIONS: Final = ("model", "timeout", "deadline")


@dataclass(frozen=True, slots=True)
class Score:
    """How probable a model finds a text. `logprob` is the sum over `tokens`, in nats.

    `text`: what the tokens spell; it begins before the given text where a token spans the boundary.
    A first token without a context has no log probability and does not count. `is_greedy`: each
    token is the most probable one. `probability`: exp(logprob); from choose(), the share among the
    choices.
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
        try:
            return math.exp(-self.logprob_per_token)
        except OverflowError:  # above e^709
            return math.inf

    @property
    def logprob_per_byte(self) -> float:
        """Return logprob / UTF-8 bytes of the text."""
        return self.logprob / len(self.text.encode())

    @property
    def bits_per_byte(self) -> float:
        """Return -logprob_per_byte / ln 2."""
        return -self.logprob_per_byte / math.log(2)


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
            start = _count_common(ids, self._context_ids)
        else:
            own = self._client.tokenize(text, add_special_tokens=False, **self._options)
            ids = [*self._context_ids, *own]
            start = len(self._context_ids)

        if len(ids) <= max(1, start):
            text = "a text to score must have a token of its own after the context"
            raise ConfigurationError(text)
        if start < len(self._context_ids):
            text = self._client.detokenize(ids[start:])
        return _ScoreRequest(ids, start, text)

    def score(self, request: _ScoreRequest) -> Score:
        """Return the score of one text, by a full prefill."""
        params = {"prompt_logprobs": 0, "max_tokens": 1, "temperature": 0}
        reply = self._client.complete(request.ids, **{**self._params, **params})
        known = list(filter(None, reply.choices[0].prompt_logprobs[1:]))  # the first has none
        if [token.token_id for token in known] != request.ids[1:]:
            count = f"prompt_logprobs for {len(known)} of {len(request.ids) - 1} tokens"
            raise ProtocolError(f"{count}: {self._client.config.base_url}; is it vLLM?")

        tokens = known[max(0, request.start - 1) :]
        is_greedy = all(token.rank == 1 for token in tokens)
        logprob = math.fsum(map(_to_logprob, tokens))
        if request.start == 0:
            tokens.insert(0, TokenLogprob(self._client.detokenize(request.ids[:1]), None))
        return Score(request.text, logprob, tuple(tokens), is_greedy, math.exp(logprob))

    def score_single_tokens(self, requests: Sequence[_ScoreRequest]) -> list[Score] | None:
        """Return the scores of texts of one token, by one request; None where that cannot be."""
        context_ids = requests[0].ids[:-1]
        are_single = all(one.ids[:-1] == context_ids == one.ids[: one.start] for one in requests)
        ids = sorted({one.ids[-1] for one in requests})
        if not are_single:
            return None

        params: dict[str, Any] = {"logprob_token_ids": ids, "logprobs": 0, "max_tokens": 1}
        params |= {"temperature": 0, "return_tokens_as_token_ids": True}
        try:
            reply = self._client.complete(context_ids, **{**self._params, **params})
            sampled = reply.logprobs[0]
        except (InvalidRequestError, IndexError):
            return None  # more than 128, for one
        by_id = {token.token_id: token for token in (*sampled.top, sampled)}
        if not by_id.keys() >= set(ids):
            return None  # vLLM up to 0.25 ignores the parameter

        scores = []
        for one in requests:
            token = by_id[one.ids[-1]]._replace(token=one.text, top=())
            logprob = _to_logprob(token)
            is_greedy = token.token_id == sampled.token_id
            scores.append(Score(one.text, logprob, (token,), is_greedy, math.exp(logprob)))
        return scores


def _to_logprob(token: TokenLogprob) -> float:
    return -math.inf if token.logprob is None else token.logprob  # None: the server computed NaN


def _count_common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix.

    >>> _count_common([1, 2, 3], [1, 2, 9, 9])
    2
    """
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def _choose_text(
    client: VLLMClient, choices: Sequence[str], context: Any, params: Mapping[str, Any]
) -> list[Score]:
    """Return the scores of VLLMClient.choose()."""
    if isinstance(choices, str) or not choices:
        raise ConfigurationError("choices must be a list of at least one string")
    scorer = _Scorer(client, context, params)
    requests = list(_map_in_threads(scorer.build_request, choices, SCORES_AT_ONCE))
    scores = scorer.score_single_tokens(requests)
    if scores is None:
        scores = list(_map_in_threads(scorer.score, requests, SCORES_AT_ONCE))

    scores.sort(key=lambda score: score.logprob, reverse=True)
    best = scores[0].logprob
    if best == -math.inf:
        return scores
    weights = [math.exp(score.logprob - best) for score in scores]
    total = math.fsum(weights)
    return [
        replace(score, probability=weight / total)
        for score, weight in zip(scores, weights, strict=True)
    ]


# ---- Many calls: benchmark --------------------------------------------------
#
# The formulas, labels and result keys of `vllm bench serve`.

LAG_WARNING: Final = (1.0, 0.05)  # milliseconds, and share of the TTFT
BENCH_METRICS: Final = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
}
BENCH_LABELS: Final = {
    "completed": "Successful requests",
    "failed": "Failed requests",
    "max_concurrency": "Maximum request concurrency",
    "request_rate": "Request rate configured (RPS)",
    "duration": "Benchmark duration (s)",
    "total_input_tokens": "Total input tokens",
    "total_output_tokens": "Total generated tokens",
    "request_throughput": "Request throughput (req/s)",
    "output_throughput": "Output token throughput (tok/s)",
    "total_token_throughput": "Total token throughput (tok/s)",
}


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What bench() measured; print it for vLLM's table. `warning`: why not to trust it, or "".

    `result` has the keys of vLLM's result file, {mean,median,std,p99}_{ttft,tpot,itl,e2el}_ms among
    them, and as `lag` how late requests were sent. `first_error`: the first failure's message.
    """

    result: Mapping[str, Any]
    warning: str = ""
    first_error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result under the keys of vLLM's result file."""
        return dict(self.result)

    def __str__(self) -> str:
        lines = [f"{' Serving Benchmark Result ':=^50}"]
        for key, label in BENCH_LABELS.items():
            if self.result[key] not in (None, "inf"):
                lines.append(_to_table_row(label, self.result[key]))
        for name, title in BENCH_METRICS.items():
            lines.append(f"{title:-^50}")
            for statistic in ("mean", "median", "p99"):
                label = f"{statistic.capitalize()} {name.upper()} (ms)"
                lines.append(_to_table_row(label, self.result[f"{statistic}_{name}_ms"]))
        lines.append("=" * 50)
        if self.warning:
            lines.append(f"Warning: {self.warning}")
        if self.first_error is not None:
            lines.append(f"First error: {self.first_error}")
        return "\n".join(lines)


def _to_table_row(label: str, value: float) -> str:
    shown = f"{value:.2f}" if isinstance(value, float) else f"{value}"
    return f"{label + ':':<40} {shown:<10}"


class _Sample(NamedTuple):
    """One request of a benchmark, in seconds.

    `tpots_s`: the mean time of a later token, if there is one. `itls_s`: the gaps between events.
    """

    error: VLLMError | None
    lag_s: float = 0.0
    ttft_s: float = 0.0
    e2el_s: float = 0.0
    tpots_s: Sequence[float] = ()
    itls_s: Sequence[float] = ()
    input_tokens: int = 0
    output_tokens: int = 0


def _build_bench_result(samples: Sequence[_Sample], duration_s: float) -> dict[str, Any]:
    """Return the measured part of a result; a request that failed counts in the duration alone."""
    good = [sample for sample in samples if sample.error is None]
    columns = dict(zip(_Sample._fields, zip(*good, strict=True), strict=False))
    inputs = sum(columns.get("input_tokens", ()))
    outputs = sum(columns.get("output_tokens", ()))
    flatten = itertools.chain.from_iterable
    return {
        "duration": duration_s,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration_s,
        "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
        **_describe("ttft", columns.get("ttft_s", ())),
        **_describe("tpot", flatten(columns.get("tpots_s", ()))),
        **_describe("itl", flatten(columns.get("itls_s", ()))),
        **_describe("e2el", columns.get("e2el_s", ())),
        **_describe("lag", columns.get("lag_s", ())),
    }


def _describe(name: str, seconds: Iterable[float]) -> dict[str, float]:
    """Return a metric's statistics in milliseconds, zeros without a value.

    >>> _describe("itl", [0.002, 0.001, 0.006, 0.003])["median_itl_ms"]
    2.5
    """
    values = [1000.0 * value for value in sorted(seconds)] or [0.0]
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return {
        f"mean_{name}_ms": mean,
        f"median_{name}_ms": _percentile(values, 0.5),
        f"std_{name}_ms": math.sqrt(variance),
        f"p99_{name}_ms": _percentile(values, 0.99),
    }


def _percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of sorted values, interpolated linearly as numpy does."""
    position = (len(values) - 1) * share
    below = math.floor(position)
    above = math.ceil(position)
    return values[below] + (values[above] - values[below]) * (position - below)


def _find_arrivals(count: int, rate: float, burstiness: float, rng: random.Random) -> list[float]:
    """Return when each request is due, in seconds; the gaps have a gamma distribution."""
    if rate == math.inf:
        return [0.0] * count
    gaps = (rng.gammavariate(burstiness, 1.0 / (rate * burstiness)) for _ in range(count))
    arrivals = list(itertools.accumulate(gaps))
    scale = count / rate / arrivals[-1]
    return [arrival * scale for arrival in arrivals]


class _Bench:
    """A benchmark while it runs: all its requests have the same path and parameters."""

    def __init__(self, client: VLLMClient, path: str, params: Mapping[str, Any]) -> None:
        self._client = client
        self._path = path
        self._params = params
        self._limits = _read_limits(client.config, {})
        self._worker = threading.local()  # `free_at`: when a thread's last request ended
        self._started_at = 0.0

    def make_prompts(self, count: int, length: int, rng: random.Random) -> list[Any]:
        """Return prompts of random tokens of the model: ids, or for chat their text."""
        pairs = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2))
        ids = sorted(set(self._client.tokenize(" ".join(pairs), add_special_tokens=False)))
        prompts = [rng.choices(ids, k=length) for _ in range(count)]
        if self._path == COMPLETIONS_PATH:
            return prompts
        return list(_map_in_threads(self._client.detokenize, prompts, SCORES_AT_ONCE))

    def run(
        self, prompts: Sequence[Any], arrivals: Sequence[float], places: int, *, progress: bool
    ) -> tuple[list[_Sample], float]:
        """Return a sample of each request, and the seconds that all took together."""
        self._started_at = time.perf_counter()
        items = self._wait_for_arrivals(prompts, arrivals)
        samples = list(
            _map_in_threads(
                self.measure, items, places, is_ordered=False, progress=progress, total=len(prompts)
            )
        )
        return samples, time.perf_counter() - self._started_at

    def measure(self, item: tuple[Any, float]) -> _Sample:
        """Return the times of one request, for a prompt and the time it is due."""
        prompt, due_at = item
        ready_at = max(due_at, getattr(self._worker, "free_at", self._started_at))
        build = build_chat_request if self._path == CHAT_PATH else build_completion_request
        body = build(self._client.config, prompt, **self._params)
        stream = self._client._open(self._path, body, limits=self._limits)
        times: list[float] = []
        sent_at = time.perf_counter()
        try:
            for _ in stream:
                times.append(time.perf_counter())  # noqa: PERF401  # this loop is what is measured
        except AbortError:
            raise
        except VLLMError as error:
            return _Sample(error)
        finally:
            self._worker.free_at = time.perf_counter()

        return _to_sample(sent_at - ready_at, sent_at, times, stream.completion.usage)

    def _wait_for_arrivals(
        self, prompts: Sequence[Any], arrivals: Sequence[float]
    ) -> Iterator[tuple[Any, float]]:
        for prompt, arrival in zip(prompts, arrivals, strict=True):
            due_at = self._started_at + arrival
            time.sleep(max(0.0, due_at - time.perf_counter()))
            yield prompt, due_at


def _to_sample(
    lag_s: float, sent_at: float, times: Sequence[float], usage: Usage | None
) -> _Sample:
    """Return the sample of a reply whose events with tokens came at `times`."""
    if not times or usage is None:
        return _Sample(ProtocolError("a reply has no token or no usage; is it vLLM?"))
    gaps = [after - before for before, after in itertools.pairwise(times)]
    decoding_s = times[-1] - times[0]
    later_tokens = usage.output_tokens - 1
    tpots = [decoding_s / later_tokens] if later_tokens > 0 else []
    return _Sample(
        None, lag_s, times[0] - sent_at, times[-1] - sent_at,
        tpots, gaps, usage.input_tokens, usage.output_tokens,
    )  # fmt: skip


def _measure_server(
    config: VLLMConfig, *, num_prompts: int, max_concurrency: int | None, request_rate: float,
    burstiness: float, random_input_len: int, random_output_len: int, ignore_eos: bool,
    endpoint: str, seed: int, progress: bool,
) -> BenchReport:  # fmt: skip
    """Return the report of VLLMClient.bench()."""
    _check_bench(
        num_prompts, random_input_len, random_output_len, request_rate, burstiness, endpoint
    )
    places = min(num_prompts, _read_count("max_concurrency", max_concurrency, num_prompts))
    path = CHAT_PATH if endpoint == "chat" else COMPLETIONS_PATH
    params: dict[str, Any] = {"max_completion_tokens": random_output_len}
    if path == COMPLETIONS_PATH:
        params = {"max_tokens": random_output_len, "repetition_penalty": 1.0}
    params["return_token_ids"] = True  # so that an event without text counts, as with vLLM
    if ignore_eos:
        params["ignore_eos"] = True

    rng = random.Random(seed)
    arrivals = _find_arrivals(num_prompts, request_rate, burstiness, rng)
    with VLLMClient(replace(config, max_concurrency=places, max_retries=0)) as client:
        bench = _Bench(client, path, params)
        prompts = bench.make_prompts(num_prompts, random_input_len, rng)
        first = bench.measure((prompts[0], 0.0))  # not counted: it finds the model's name
        if first.error is not None:
            raise first.error
        model = config.default_model or client.models()[0].id
        samples, duration_s = bench.run(prompts, arrivals, places, progress=progress)

    backend = "openai-chat" if path == CHAT_PATH else "openai"
    settings = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": num_prompts,
        "request_rate": "inf" if request_rate == math.inf else float(request_rate),
        "burstiness": float(burstiness),
        "max_concurrency": max_concurrency,
    }
    result = settings | _build_bench_result(samples, duration_s)
    errors = (str(sample.error) for sample in samples if sample.error is not None)
    return BenchReport(result, _find_lag(result), next(errors, None))


def _check_bench(
    num_prompts: int, input_len: int, output_len: int, rate: float, burstiness: float, endpoint: str
) -> None:
    _read_count("num_prompts", num_prompts, 1)
    _read_count("random_input_len", input_len, 1)
    _read_count("random_output_len", output_len, 1)
    for name, number in (("request_rate", rate), ("burstiness", burstiness)):
        if not number > 0:
            raise ConfigurationError(f"{name} must be a positive number, got {number!r}")
    if endpoint not in ("completions", "chat"):
        raise ConfigurationError(f"endpoint must be 'completions' or 'chat', got {endpoint!r}")


def _find_lag(result: Mapping[str, Any]) -> str:
    """Return a warning where requests were sent so late that the client distorts the result."""
    lag = result["mean_lag_ms"]
    milliseconds, share = LAG_WARNING
    if lag <= max(milliseconds, share * result["median_ttft_ms"]):
        return ""
    return f"the client is the bottleneck: it sent requests {lag:.1f} ms late, in the mean"


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


def to_html(completion_or_score: "Completion | Score", title: str = "") -> str:
    """Return a heat map of log probabilities: one static page without scripts.

    Each token is tinted by its probability, from red (0) to green (1), and its tooltip lists the
    alternatives. Perplexity, mean probability and the least likely tokens stand above the text.
    A Completion has to be requested with `logprobs=N`; each of its choices is shown.
    """
    heading = _to_visible(title or "Log probabilities", {})
    fragment = _to_fragment(completion_or_score, title)

    return f"{_HEAD}<title>{heading}</title></head><body>\n{fragment}</body></html>\n"


def _to_fragment(value: "Completion | Score", title: str = "") -> str:
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
    """Return the summary and the tinted text; without log probabilities, the text alone."""
    # The first token of a prompt has none: nothing stands before it.
    known = [(token.logprob, at) for at, token in enumerate(tokens) if token.logprob is not None]
    if not known:
        return f"<p>No log probabilities; request logprobs=5.</p>\n<pre>{_to_visible(text)}</pre>\n"

    logprobs = [logprob for logprob, _ in known]
    perplexity = _to_perplexity(sum(logprobs) / len(known))
    mean = sum(map(math.exp, logprobs)) / len(known)

    rows = [_to_row(tokens, at) for _, at in sorted(known)[:LEAST_LIKELY_SHOWN]]
    return (
        f"<p>Perplexity <b>{perplexity:.4g}</b> · mean probability <b>{_to_figure(mean)}</b> · "
        f'{len(known):,} tokens · probability <b class="scale">0 … 1</b></p>\n'
        "<details open><summary>Least likely tokens</summary>\n"
        f"<ol>\n{''.join(rows)}</ol></details>\n"
        f'<pre dir="auto">{"".join(map(_to_span, tokens))}</pre>\n'
    )


def _to_perplexity(mean_logprob: float) -> float:
    try:
        return math.exp(-mean_logprob)
    except OverflowError:  # above e^709
        return math.inf


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
    lines = [_to_alternative(token)]
    style = ""
    if token.logprob is not None:
        lines[0] += f" (log probability {token.logprob:.4f})"
        style = f' style="--hue:{120 * math.exp(min(token.logprob, 0.0)):.0f}"'

    lines += map(_to_alternative, token.top)
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
    """Return a probability in a few characters.

    >>> [_to_figure(value) for value in (0.98765, 0.00001, 0.0, None)]
    ['0.988', '1e-05', '0', 'unknown']
    """
    if probability is None:
        return "unknown"
    if probability >= 0.001:
        return f"{probability:.3f}"
    return f"{probability:.1g}"


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


async def mount(coordinator: Any, config: Mapping[str, Any] | None = None) -> Callable[[], Any]:
    """Mount a VLLMProvider as "vllm" and return its cleanup; raise ConfigurationError.

    No server is contacted. The running loop's default executor is replaced by a larger one,
    unless the host has chosen its own.
    """
    provider = VLLMProvider(config=VLLMConfig.from_mapping(config or {}), coordinator=coordinator)
    _widen_executor(provider.config.max_concurrency)
    await coordinator.mount("providers", provider, name="vllm")
    if hasattr(coordinator, "register_contributor"):
        coordinator.register_contributor("observability.events", "vllm", _list_own_events)
    return provider.close


async def on_session_ready(coordinator: Any) -> None:
    """Ask each mounted provider's server for its limits, once; a failure is one warning."""
    import asyncio

    mounted = (coordinator.get("providers") or {}).values()
    catalogues = [one.catalogue for one in mounted if isinstance(one, VLLMProvider)]
    await asyncio.gather(*map(_Catalogue.discover, catalogues))


def _list_own_events() -> list[str]:
    """Return the events that the kernel does not list: the session's log writes those anyway."""
    from amplifier_core.events import ALL_EVENTS

    return [name for name in PROVIDER_EVENTS if name not in ALL_EVENTS]


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
            config = _to_config(config, base_url=base_url, api_key=api_key)
        self.config = config
        self.coordinator = coordinator
        self.priority = config.priority
        self.default_model = config.default_model
        self.client = VLLMClient(config, max_retries=0)  # retries are announced, so they are ours
        self.catalogue = _Catalogue(self.client, config)
        self._announced_repairs: set[str] = set()
        self._running: set[Any] = set()
        self._semaphores: dict[Any, Any] = {}

    def get_info(self) -> Any:
        """Return the kernel's ProviderInfo; its fields are what the application's wizard asks."""
        from amplifier_core import ConfigField, ProviderInfo

        def ask(key: str, title: str, kind: str = "text", **options: Any) -> Any:
            prompt = f"{title} of vLLM"
            return ConfigField(
                id=key, display_name=title, prompt=prompt, field_type=kind, **options
            )

        url = "http://localhost:8000"
        mode = str(self.config.use_completions).lower()
        return ProviderInfo(
            id="vllm",
            display_name="vLLM",
            credential_env_vars=["VLLM_API_KEY"],
            capabilities=["streaming", "tools", "reasoning", "json_mode", "logprobs"],
            defaults={
                "model": self.default_model,
                "timeout": self.config.timeout,
                **self.catalogue.find_limits(),
            },
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
            return _to_model_info(self.catalogue.find_model(), limits)
        text = "the context window is unknown, so history is not compacted: set context_window"
        self.catalogue.log("unknown", logging.WARNING, text)
        return None

    async def list_models(self) -> list[Any]:
        """Return the server's models as ModelInfo; raise the kernel's error if it cannot tell."""
        try:
            await self.catalogue.update(self.config.timeout)
        except VLLMError as error:
            raise _to_kernel_error(error, None) from error

        unknown = {"context_window": 0, "max_output_tokens": 0}
        models = []
        for card in self.catalogue.cards:
            limits = {**unknown, **self.catalogue.find_limits(card.id)}
            models.append(_to_model_info(card.id, limits))
        return models

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

        turn = _Turn(self.config, request, options)
        work = asyncio.ensure_future(self._complete(turn))
        self._running.add(work)  # it outlives this call where a hook does not end
        work.add_done_callback(self._running.discard)

        is_cancelled = False
        while not work.done() and time.monotonic() < turn.gives_up_at:
            self._check_session(turn)
            if is_cancelled:
                turn.stop(asyncio.CancelledError("cancelled"))
            try:
                await asyncio.wait({work}, timeout=POLL_S)
            except asyncio.CancelledError:
                is_cancelled = True

        return turn.result(is_cancelled=is_cancelled)

    def _check_session(self, turn: "_Turn") -> None:
        """Stop the turn if its session was cancelled, which does not cancel the task."""
        token = getattr(self.coordinator, "cancellation", None)
        if getattr(token, "is_immediate", False) is True:
            turn.stop(AbortError("the session was cancelled"))

    async def _complete(self, turn: "_Turn") -> None:
        """Give the turn a response or an error, and emit llm:response; nothing cancels this."""
        try:
            with turn.calls:
                await self._begin(turn)
                await self._answer(turn)
        except BaseException as error:  # noqa: BLE001  # result() raises it
            turn.error = turn.find_reason(error)
        await self._report(turn)

    async def _begin(self, turn: "_Turn") -> None:
        """Build the body, find the model and its limits, and announce the call."""
        catalogue = self.catalogue
        try:
            turn.prepare()
            if not (catalogue.find_model(turn.model) and catalogue.find_limits(turn.model)):
                await turn.run(catalogue.discover(turn.time_left_s()))
        finally:
            turn.model = catalogue.find_model(turn.model) or None
            await self._announce(turn)

    async def _announce(self, turn: "_Turn") -> None:
        """Emit what precedes a call. The body is the one before a chat template renders it."""
        new = []
        for repair in turn.repairs:
            if repair["tool_call_id"] not in self._announced_repairs:
                self._announced_repairs.add(repair["tool_call_id"])
                new.append(repair)
        if new:
            event = {"provider": "vllm", "repair_count": len(new), "repairs": new}
            await self._emit("provider:tool_sequence_repaired", event)

        event = {**turn.names(), "message_count": len(turn.messages)}
        if turn.body:
            event |= await self._emit_debug("request", turn, _to_stream(turn.body))
        await self._emit("llm:request", event)

    async def _answer(self, turn: "_Turn") -> None:
        """Make attempts until one brings a whole answer; announce each retry."""
        stream = self._open(turn)
        while turn.response is None:
            blocks = _Blocks(self._emit, turn.request_id, is_shown=turn.wants_events)
            try:
                await self._attempt(turn, stream, blocks)
            except BaseException as error:
                await blocks.abort(turn.find_reason(error))
                if turn.stop_error is not None or not isinstance(error, VLLMError):
                    raise
                stream = await self._retry(turn, stream, error)

    def _open(self, turn: "_Turn", *, attempt: int = 0) -> Stream:
        """Return a stream of the turn's body; nothing is sent before it is read."""
        return self.client._open(
            CHAT_PATH,
            turn.body,
            limits=turn.limits,
            wants_stream=None,
            prompt_format=turn.prompt_format,
            request_id=turn.request_id,
            attempt=attempt,
            deadline_at=turn.deadline_at,
        )

    async def _attempt(self, turn: "_Turn", stream: Stream, blocks: "_Blocks") -> None:
        """Read a stream in a thread while its blocks are shown, and set the turn's response."""
        import asyncio

        semaphore = self._find_semaphore()
        await turn.run(semaphore.acquire())
        showing = asyncio.ensure_future(blocks.show())
        try:
            self._check_session(turn)
            await turn.run(asyncio.to_thread(blocks.read, stream))
            blocks.add_rest(stream.completion)
            turn.accept(stream, blocks)
            self.catalogue.note_model(stream.completion.model)
        finally:
            semaphore.release()
            blocks.finish()
            if turn.response is None:
                await turn.run(showing)  # what arrived is shown, unless the turn was stopped
        await showing

    def _find_semaphore(self) -> Any:
        """Return the running loop's semaphore; a provider may serve several loops in turn."""
        import asyncio

        loop = asyncio.get_running_loop()
        if loop not in self._semaphores:
            self._semaphores = {loop: asyncio.Semaphore(self.config.max_concurrency)}
        return self._semaphores[loop]

    async def _retry(self, turn: "_Turn", stream: Stream, error: VLLMError) -> Stream:
        """Announce the next attempt, wait, and return its stream; raise the error if none helps."""
        import asyncio

        maximum = self.config.max_retries
        if maximum is None:
            maximum = AMPLIFIER_RETRIES
        is_possible = error.retryable or turn.is_correctable(error)
        if turn.retries >= maximum or not is_possible:
            raise error

        delay = 0.0
        if error.retryable:
            delay = _retry_pause_s(self.config, error, turn.retries + 1, turn.time_left_s())
        turn.retries += 1
        event = {"provider": "vllm", "request_id": turn.request_id, "attempt": turn.retries}
        event |= {"max_retries": maximum, "delay": delay}
        event |= {"error_type": type(error).__name__, "error_message": str(error)}
        await self._emit("provider:retry", event)
        await turn.run(asyncio.sleep(delay))

        if error.retryable:
            return self.client._reopen(stream)
        turn.correct(error)
        await self._emit_debug("request", turn, _to_stream(turn.body))
        return self._open(turn, attempt=stream.attempts)

    async def _report(self, turn: "_Turn") -> None:
        """Emit what follows a call: the debug events of its replies, and llm:response."""
        event = turn.describe()
        failed = []
        for reply, error in turn.replies:
            raw = await self._emit_debug("response", turn, reply)
            if error is None:
                event |= raw
            else:
                usage = _to_usage_payload([(reply, error)])
                failed.append({**_to_reason(error), "usage": usage, **raw})
        if failed:
            event["failed_replies"] = failed
        await self._emit("llm:response", event)

    async def _emit_debug(self, kind: str, turn: "_Turn", value: Any) -> dict[str, Any]:
        """Emit the debug events that are switched on; return what `raw` adds to the plain one."""
        config = self.config
        if not any((config.debug, config.raw_debug, config.raw)):
            return {}

        raw = _to_json(value, token_key="token_text")  # a hook of Amplifier's blanks "token"
        names = {"provider": "vllm", "request_id": turn.request_id}
        if config.debug:
            cut = _to_json(raw, config.debug_truncate_length)
            await self._emit(f"llm:{kind}:debug", {**names, kind: cut})
        if config.raw_debug:
            await self._emit(f"llm:{kind}:raw", {**names, kind: raw})
        return {"raw": raw} if config.raw else {}

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
        self._told: set[str] = set()

    async def discover(self, deadline_s: float = DISCOVERY_S) -> None:
        """Ask for the models, unless they are known or that failed within the last minute."""
        if self.cards or time.monotonic() - self._asked_at < MODEL_RETRY_S:
            return
        try:
            await self.update(min(deadline_s, DISCOVERY_S))
        except VLLMError as error:
            self.log("failure", logging.WARNING, "the limits of the models are unknown: %s", error)

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
            self.log("window", logging.INFO, text, window, maximum)

    def log(self, topic: str, level: int, text: str, *values: object) -> None:
        """Log a text, the second time on at DEBUG."""
        if topic in self._told:
            level = logging.DEBUG
        self._told.add(topic)
        logger.log(level, text, *values)

    def note_model(self, model: str) -> None:
        """Forget the models if one that is not among them answers: the server has another now."""
        is_discovered = self._config.default_model is None and bool(self.cards)
        if is_discovered and self._find_card(model).id != model:
            self.cards = ()
            self._asked_at = -math.inf

    def find_model(self, model: str | None = None) -> str:
        """Return the model, or the one that answers who names none; "" while that is unknown."""
        return model or self._config.default_model or self._find_card().id

    def find_limits(self, model: str | None = None) -> dict[str, int]:
        """Return the context window and the longest output to plan with; {} while unknown."""
        card = self._find_card(model)
        windows = filter(None, (card.max_model_len, self._config.context_window))
        window = min(windows, default=None)
        if window is None:
            return {}

        output = self._config.max_output_tokens
        if output is None:
            output = min(window // 4, 16384)  # what is planned for it is lost to the history
        output = min(filter(None, (output, card.max_output_tokens, window)))
        return {"context_window": window, "max_output_tokens": output}

    def _find_card(self, model: str | None = None) -> ModelCard:
        """Return a model's card, an empty one if the server has none."""
        name = model or self._config.default_model
        for card in self.cards:
            if name in (None, card.id):
                return card
        return ModelCard("")


_Judged = tuple[Completion, VLLMError | None]  # a whole reply, and why it is no answer


class _Turn:
    """One complete(), over all its attempts.

    `prepare()` sets what is sent. `response` is set as soon as the answer is whole, `error` when
    there is none; `replies` are the whole replies.
    """

    def __init__(self, config: VLLMConfig, request: Any, options: Mapping[str, Any]) -> None:
        import asyncio

        self._config = config
        self.params = _to_params(request, options)
        self.messages, self.repairs = _to_template_messages(_to_wire_messages(request.messages))
        self.request_id = str(self.params.get("request_id") or _new_id())
        self.model: str | None = self.params.get("model") or config.default_model
        metadata = options.get("metadata") or request.metadata or {}
        self.wants_events = config.use_streaming and metadata.get("stream") is not False

        self.body: dict[str, Any] = {}
        self.limits = _read_limits(config, {})
        self.prompt_format: str | None = None
        self.started_at = time.monotonic()
        self.deadline_at = math.inf

        self.calls = _CallGroup()
        self.retries = 0
        self._is_corrected = False
        self.replies: list[_Judged] = []
        self.finish_reason: str | None = None
        self.response: Any = None
        self.error: BaseException = AbortError("the call did not end")
        self.stop_error: BaseException | None = None
        self.gives_up_at = math.inf
        self._stopped = asyncio.get_running_loop().create_future()

    def prepare(self) -> None:
        """Set the body and the limits; raise ConfigurationError."""
        config = self._config
        use_completions = self.params.pop("use_completions", None)
        if use_completions is not None:
            config = replace(config, use_completions=use_completions)
        if config.use_completions:
            self.prompt_format = config.prompt_format

        self.limits = _read_limits(config, self.params)
        self.deadline_at = self.started_at + self.limits.deadline
        self.body = build_chat_request(config, self.messages, **self.params)

    def time_left_s(self) -> float:
        """Return the seconds until the call's deadline."""
        return self.deadline_at - time.monotonic()

    def names(self) -> dict[str, Any]:
        """Return what identifies the turn in events."""
        model = self.model or "unknown"
        return {"provider": "vllm", "model": model, "request_id": self.request_id}

    def stop(self, error: BaseException) -> None:
        """Stop the calls in flight, and make run() raise the error; the first stop counts."""
        if self.stop_error is None:
            self.stop_error = error
            self.gives_up_at = time.monotonic() + HOOK_GRACE_S
            self._stopped.set_result(None)
            self.calls.stop()

    def find_reason(self, error: BaseException) -> BaseException:
        """Return why the turn ends: it was stopped, or else the error."""
        return self.stop_error or error

    async def run(self, work: Awaitable[Any]) -> Any:
        """Return the result of `work`; once the turn is stopped, cancel it and raise the reason."""
        import asyncio

        task = asyncio.ensure_future(work)
        if self.stop_error is None:
            await asyncio.wait({task, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
        if self.stop_error is None or task.done():
            return task.result()
        task.cancel()
        await asyncio.wait({task})
        raise self.stop_error

    def accept(self, stream: Stream, blocks: "_Blocks") -> None:
        """Set the response; raise an error for a reply whose calls nobody could execute."""
        reply = stream.completion
        self.finish_reason = reply.finish_reason
        for collected in _OPTIONS.get()[1]:
            collected.append(reply)
        try:
            calls = _to_kernel_calls(reply, self.body.get("tools", ()))
        except VLLMError as error:
            self.replies.append((reply, error))
            raise
        self.replies.append((reply, None))
        self.response = _to_response(reply, blocks.blocks, calls, stream.degradation)
        self.finish_reason = self.response.finish_reason

    def is_correctable(self, error: VLLMError) -> bool:
        """Return whether to tell the model of its malformed call: once, unless it was cut."""
        if self._is_corrected or not isinstance(error, InvalidToolCallError):
            return False
        if self.finish_reason == "length":
            return False
        # vLLM up to 0.30 does not say "length" of a call that was cut.
        reply, _ = self.replies[-1]
        maximum = self.body.get("max_tokens", math.inf)
        maximum = self.body.get("max_completion_tokens", maximum)
        return _find_usage(reply).output_tokens < float(maximum)

    def correct(self, error: VLLMError) -> None:
        """Add the malformed call and its error to the body, for this turn alone."""
        self._is_corrected = True
        reply, _ = self.replies[-1]
        messages = [*self.body["messages"], *_to_correction(reply, error)]
        self.body = {**self.body, "messages": messages}

    def describe(self) -> dict[str, Any]:
        """Return the payload of llm:response."""
        event = {**self.names(), "retries": self.retries, "finish_reason": self.finish_reason}
        event["usage"] = _to_usage_payload(self.replies)
        event["duration_ms"] = int((time.monotonic() - self.started_at) * 1000)
        if self.response is not None:
            return {**event, "status": "ok"}
        reason = _to_reason(self.error)
        return {**event, "status": "error", "error": reason["msg"], "error_type": reason["type"]}

    def result(self, *, is_cancelled: bool) -> Any:
        """Return the response; raise what there is in its place, as the kernel's error."""
        import asyncio

        if self.response is not None:
            return self.response
        if is_cancelled:
            raise asyncio.CancelledError
        error = self.find_reason(self.error)
        if isinstance(error, VLLMError):
            raise _to_kernel_error(error, self.model) from error
        raise error


@dataclass(slots=True)
class _Block:
    """A run of text or thinking, or a tool call; its text is measured, not kept."""

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
        self._emit = emit
        self._request_id = request_id
        self._is_shown = is_shown
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._waiting: collections.deque[tuple[int, str]] = collections.deque()
        self._is_over = False
        self._open = -1  # the last block that was started
        self._is_open = False
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
        for kind, text in (("thinking", reply.reasoning), ("text", reply.text)):
            known = sum(block.length for block in self.blocks if block.kind == kind)
            self._add_text(kind, text[known:])

        known = sum(block.kind == "tool_use" for block in self.blocks)
        for call in reply.tool_calls[known:]:
            self._add_block(_Block("tool_use", call.id, call.name))

    def _add_text(self, kind: str, text: str) -> None:
        if not text:
            return
        if not self.blocks or self.blocks[-1].kind != kind:
            self._add_block(_Block(kind))
        self.blocks[-1].length += len(text)
        self._pass_on(text)

    def _add_call(self, call: ToolCall) -> None:
        """Add a call, unless this is one more piece of it: those of several may come in turn."""
        for block in self.blocks:
            is_named_so = block.kind == "tool_use" and block.name in ("", call.name)
            if is_named_so and block.call_id in ("", call.id):
                block.call_id = call.id  # which may come late
                return
        self._add_block(_Block("tool_use", call.id, call.name))

    def _add_block(self, block: _Block) -> None:
        self.blocks.append(block)
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
        if index > self._open:
            await self._end()
            self._open = index
            self._is_open = True
            self._sequence = 0
            name = self.blocks[index].name
            await self._emit_block("start", **({"name": name} if name else {}))
        if text:
            self._has_shown_text = True  # already now: one hook may get it when another fails
            await self._emit_block("delta", sequence=self._sequence, text=text)
            self._sequence += 1

    async def _end(self) -> None:
        if self._is_open:
            await self._emit_block("end")
            self._is_open = False

    async def _emit_block(self, event: str, **details: Any) -> None:
        kind = self.blocks[self._open].kind
        payload = {"request_id": self._request_id, "block_index": self._open, "block_type": kind}
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
_MAX_TOKENS_NAMES: Final = frozenset({"max_tokens", "max_completion_tokens"})
_VLLM_NAMES: Final = {"max_output_tokens": "max_tokens", "reasoning": "reasoning_effort"}
_NOT_SENT: Final = frozenset({"metadata", "stream", "conversation_id"})
_REQUEST_FIELDS: Final = (
    "temperature top_p stop tool_choice reasoning_effort timeout model tools response_format"
    " max_output_tokens"
).split()
_CONTENT_FILTER: Final = re.compile(
    r"content[ _-]?(filter|policy|management policy)", re.IGNORECASE
)


def _to_config(config: Mapping[str, Any] | None, **arguments: str | None) -> VLLMConfig:
    """Return the configuration; the arguments win over the mapping."""
    given = {name: value for name, value in arguments.items() if _is_given(value)}
    settings = {**(config or {}), **given}
    if not _is_given(settings.get("base_url")):
        raise ConfigurationError(
            "No base_url found: set base_url in the provider's config, or VLLM_BASE_URL"
        )
    return VLLMConfig.from_mapping(settings)


def _to_model_info(model: str, limits: Mapping[str, int]) -> Any:
    """Return the kernel's ModelInfo."""
    from amplifier_core import ModelInfo

    capabilities = ["tools", "thinking", "streaming", "json_mode"]
    return ModelInfo(id=model, display_name=model, capabilities=capabilities, **limits)


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
    """Return a ToolSpec or a dict as vLLM's tool."""
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
    """Return the kernel's messages as vLLM's."""
    wire: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of functions by call id: vLLM up to 0.12 needs them in results
    for message in messages:
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
        content = message.content
        blocks: Sequence[Any] = ()
        if not isinstance(content, str):
            blocks = content
            content = _to_wire_content(blocks)
        calls = _to_wire_calls(message, blocks)
        for call in calls:
            names[call["id"]] = call["function"]["name"]

        results = [block for block in blocks if block.type == "tool_result"]
        for block in results:
            output = _to_json_text(block.output)
            wire.append(_to_wire_result(block.tool_call_id, output, names.get(block.tool_call_id)))
        if role == "tool" and not results:
            call_id = message.tool_call_id or ""
            wire.append(_to_wire_result(call_id, content, names.get(call_id, message.name)))
        if role != "tool" and (content or calls or not results):
            fields = {"reasoning": _find_reasoning(blocks), "tool_calls": calls}
            fields["name"] = message.name
            given = {name: value for name, value in fields.items() if value}
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


def _find_reasoning(blocks: Sequence[Any]) -> str:
    """Return the thinking among the blocks of a message, other providers' included."""
    texts = []
    for block in blocks:
        if block.type == "thinking":
            texts.append(block.thinking)
        elif block.type == "reasoning":
            items = filter(lambda item: isinstance(item, Mapping), block.content)
            texts.append("".join(item.get("text", "") for item in items))
    return "\n".join(filter(None, texts))


def _to_wire_calls(message: Any, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Return an assistant's calls, which come as blocks, as the extra `tool_calls`, or both."""
    entries: list[dict[str, Any]] = [vars(block) for block in blocks if block.type == "tool_call"]
    for entry in getattr(message, "tool_calls", None) or ():
        call = dict(entry)
        entries.append({**(call.get("function") or {}), **call})

    calls: dict[str, dict[str, Any]] = {}
    for entry in entries:
        call_id = entry.get("id") or ""
        name = entry.get("tool") or entry.get("name") or ""
        arguments = _to_json_text(entry.get("arguments") or entry.get("input") or {})
        calls.setdefault(call_id, _to_wire_call(call_id, name, arguments))
    return list(calls.values())


def _to_json_text(value: Any) -> str:
    """Return a text as it is, anything else as JSON; lone surrogates escaped."""
    text = str(value)
    if not isinstance(value, str):
        text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:  # which the model wrote as an escape
        return json.dumps(value, default=str)
    return text


def _to_wire_result(call_id: str, content: Any, name: str | None) -> dict[str, Any]:
    """Return a tool message."""
    result = {"role": "tool", "tool_call_id": call_id, "content": content}
    return {**result, "name": name} if name else result


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
    ordered, repairs = _pair_results(messages[len(first) :])
    ordered = _fold_notes(ordered)
    if first:
        content = ""
        for message in first:
            content = _join_content(content, message["content"])
        ordered.insert(0, {**first[0], "content": content})
    return ordered, repairs


def _pair_results(
    messages: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the messages with each result right after its call, and those that were missing.

    Later system messages, and results without a call, become notes.
    """
    ordered: list[dict[str, Any]] = []
    repairs: list[dict[str, str]] = []
    used: set[int] = set()
    for position, message in enumerate(messages):
        if position in used:
            continue
        ordered.append(_to_note(message))
        for call in message.get("tool_calls", ()):
            found = _find_result(messages, position + 1, call["id"])
            if found is not None:
                used.add(found)
                ordered.append(messages[found])
            else:
                name = call["function"]["name"]
                ordered.append(_to_wire_result(call["id"], MISSING_RESULT, name))
                repairs.append({"tool_call_id": call["id"], "tool_name": name})
    return ordered, repairs


def _find_result(messages: Sequence[dict[str, Any]], start: int, call_id: str) -> int | None:
    """Return where a call's result is, None if there is none before the same id is used again."""
    for position in range(start, len(messages)):
        message = messages[position]
        if message.get("tool_call_id") == call_id:
            return position
        if any(call["id"] == call_id for call in message.get("tool_calls", ())):
            return None
    return None


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


def _join_content(first: Any, second: Any) -> Any:
    """Return the contents of two messages as one: a text, or parts where either has parts."""
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(filter(None, (first, second)))
    return [*_to_parts(first), *_to_parts(second)]


def _to_parts(content: Any) -> Any:
    """Return the content of a message as parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


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
    from amplifier_core.message_models import ToolCall as KernelCall

    stops = [choice.stop_reason for choice in reply.choices]
    if tools and HARMONY_CALL in stops and not reply.tool_calls:
        raise InvalidRequestError(
            "gpt-oss called a tool and the server dropped the call; start vLLM with"
            " --enable-auto-tool-choice --tool-call-parser openai"
        )

    schemas = {}
    for tool in tools:
        function = tool["function"]
        schemas[function.get("name")] = function.get("parameters") or {}

    calls = []
    for place, call in enumerate(reply.tool_calls):
        schema = schemas.get(call.name, {})
        definitions = {**schema.get("definitions", {}), **schema.get("$defs", {})}
        arguments = _parse_strings(call.parsed(), schema, definitions)
        call_id = call.id or f"call_{reply.request_id}_{place}"
        calls.append(KernelCall(id=call_id, name=call.name, arguments=arguments))
    return calls


def _parse_strings(value: Any, schema: Any, definitions: Mapping[str, Any]) -> Any:
    """Return an argument with strings parsed where its schema wants an object or an array.

    Qwen3-Coder writes nested values as JSON in a string. What does not parse stays.

    >>> _parse_strings({"a": "[1]"}, {"properties": {"a": {"type": "array"}}}, {})
    {'a': [1]}
    """
    schemas = _expand_schema(schema, definitions)
    if isinstance(value, str):
        value = _parse_string(value, schemas)

    if isinstance(value, dict):
        properties: dict[str, Any] = {}
        for one in schemas:
            properties |= one.get("properties", {})
        result = {}
        for name, item in value.items():
            result[name] = _parse_strings(item, properties.get(name), definitions)
        return result

    if isinstance(value, list):
        items = None
        for one in schemas:
            items = one.get("items", items)
        return [_parse_strings(item, items, definitions) for item in value]
    return value


def _parse_string(text: str, schemas: Sequence[Mapping[str, Any]]) -> Any:
    """Return the object or array in a text, where the schemas want one; else the text."""
    types: set[str] = set()
    for schema in schemas:
        kinds = schema.get("type", [])
        types |= {kinds} if isinstance(kinds, str) else set(kinds)

    with suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=_refuse_constant)
        is_wanted = isinstance(value, dict) and "object" in types
        is_wanted = is_wanted or (isinstance(value, list) and "array" in types)
        if is_wanted and "string" not in types:
            return value
    return text


def _expand_schema(schema: Any, definitions: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a schema, what it refers to, and its alternatives."""
    if not isinstance(schema, Mapping):
        return []
    reference = str(schema.get("$ref", "")).rpartition("/")[2]
    expanded = [schema, *_expand_schema(definitions.get(reference), definitions)]
    for keyword in ("anyOf", "oneOf", "allOf"):
        for other in schema.get(keyword, ()):
            expanded += _expand_schema(other, definitions)
    return expanded


def _to_response(
    reply: Completion, blocks: Sequence[_Block], calls: Sequence[Any], degradation: Any
) -> Any:
    """Return the kernel's ChatResponse, with the blocks that were shown."""
    from amplifier_core.message_models import ChatResponse
    from amplifier_core.message_models import Usage as KernelUsage

    kept, shown = zip(*_to_contents(reply, blocks, calls), strict=True)
    usage = _find_usage(reply)._asdict()
    usage["cache_read_tokens"] = usage.pop("cached_tokens")
    finish_reason = reply.finish_reason or "stop"
    if calls:
        finish_reason = "tool_calls"
    return ChatResponse(
        content=list(kept),
        tool_calls=list(calls) or None,
        usage=KernelUsage(**usage),
        degradation=degradation,
        finish_reason=finish_reason,
        content_blocks=list(shown),
        text=reply.text,
    )


def _to_contents(
    reply: Completion, blocks: Sequence[_Block], calls: Sequence[Any]
) -> list[tuple[Any, Any]]:
    """Return each block twice: as the history keeps it, and as content events show it."""
    from amplifier_core import content_models as shown
    from amplifier_core import message_models as kept

    texts = {"thinking": io.StringIO(reply.reasoning), "text": io.StringIO(reply.text)}
    rest = iter(calls)
    contents: list[tuple[Any, Any]] = []
    for block in blocks:
        if block.kind == "tool_use":
            for call in itertools.islice(rest, 1):
                names = {"id": call.id, "name": call.name}
                tool_use = kept.ToolCallBlock(input=call.arguments, **names)
                event = shown.ToolCallContent(arguments=call.arguments, **names)
                contents.append((tool_use, event))
            continue

        text = texts[block.kind].read(block.length)
        if block.kind == "thinking":
            contents.append((kept.ThinkingBlock(thinking=text), shown.ThinkingContent(text=text)))
        else:
            contents.append((kept.TextBlock(text=text), shown.TextContent(text=text)))

    if not (reply.text or calls):  # never empty: loop-basic would ask again without end
        contents.append((kept.TextBlock(text=""), shown.TextContent(text="")))
    return contents


def _find_usage(reply: Completion) -> Usage:
    """Return the tokens of a reply, zeros where the server did not say."""
    return reply.usage or Usage(0, 0, 0)


def _to_usage_payload(replies: Sequence[_Judged]) -> dict[str, Any]:
    """Return the tokens of all the replies, as llm:response has them."""
    payload: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "cost_usd": None}
    for reply, _ in replies:
        counts = _find_usage(reply)._asdict()
        counts["cache_read_tokens"] = counts.pop("cached_tokens")
        del counts["total_tokens"]
        for name, count in counts.items():
            if count is not None:
                payload[name] = payload.get(name, 0) + count
    return payload


def _to_reason(error: BaseException) -> dict[str, str]:
    """Return an error as events have it."""
    return {"type": type(error).__name__, "msg": str(error) or "cancelled"}


def _to_kernel_error(error: VLLMError, model: str | None) -> Exception:
    """Return the kernel's error of the same name, or of the nearest parent's there."""
    from amplifier_core import llm_errors

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
        return _give_up(error)


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


def _give_up(error: OSError) -> int:
    """Return the exit code for output that cannot be written."""
    _silence(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return 0  # the reader has what it wanted
    _complain(f"vllm-provider: {error}")
    return EXIT_FAILED


def _connect(options: _Arguments) -> list[VLLMClient]:
    """Return a client for each --base-url. Only run-batch uses more than the last."""
    settings = {"api_key": options.get("api_key"), "timeout": options.get("timeout")}
    settings["default_model"] = options.get("model")
    settings["max_concurrency"] = options.get("max_inflight", options.get("max_concurrency"))
    if options["command"] in ("complete", "chat"):
        for name in ("max_tokens", "temperature", "top_p", "seed", "stop", "logprobs"):
            settings[name] = options.get(name)
        if "html" in options:
            settings["logprobs"] = options.get("logprobs", HTML_LOGPROBS)

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
        _add_options(subparser, f"{command.options} {_SHARED_OPTIONS}")

    options, unknown = parser.parse_known_args(_with_command_first(parser, argv))
    for word in unknown:
        if word.startswith("-") and word != "--":
            name = _find_option(parser, word).names[-1]
            parser.error(f"{name} is not an option of {options.command}")
        parser.error(f"unexpected argument: {word!r}; are quotes missing?")
    return vars(options)


def _add_options(parser: Any, names: str) -> None:
    for name in names.split():
        option = _CLI_OPTIONS[name]
        parser.add_argument(*option.names, **option.to_argparse())


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
    import difflib

    name = word.partition("=")[0]
    for option in _CLI_OPTIONS.values():
        if name in option.names or option.names[-1].startswith(name):
            return option

    near = difflib.get_close_matches(name, _CLI_OPTIONS, n=1)
    advice = f"; did you mean {near[0]}?" if near else ""
    return parser.error(f"unrecognized option: {name}{advice}")  # type: ignore[no-any-return]


def _read_params(options: _Arguments) -> dict[str, Any]:
    return dict(map(_read_param, options.get("param", ())))


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
    stream = _start(clients[0], _build_source(options, text), options, params)
    if "json" in options:
        with stream:
            collections.deque(stream, maxlen=0)
        _print_json(stream.completion.to_dict())
    else:
        _show(stream, options, params)

    if "html" in options:
        _write_file(options["html"], to_html(stream.completion, text[:TITLE_CHARACTERS]))
    return 0


def _build_source(options: _Arguments, text: str) -> Any:
    """Return the prompt, or the messages where the text is one of a user."""
    if options["command"] == "complete" and "chat_template" not in options:
        if "system" in options:
            raise ConfigurationError("--system goes with chat, or with complete --chat-template")
        return text

    messages = [{"role": "user", "content": text}]
    if "system" in options:
        messages.insert(0, {"role": "system", "content": options["system"]})
    return messages


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
        prompt_format="chat_template" if "chat_template" in options else None,
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
    total_s = reply.total_s or 0.0
    tokens = 0 if reply.usage is None else reply.usage.output_tokens
    first_s = reply.first_token_s
    if first_s is None:
        return f"{total_s:.2f} s, {tokens / max(total_s, 1e-3):.0f} tokens/s, {tokens} tokens"

    # The speed is that after the first token.
    speed = max(0, tokens - 1) / max(total_s - first_s, 1e-3)
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
        _print_json(_to_json(scores if "choice" in options else scores[0]))
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


def _run_bench(clients: Sequence[VLLMClient], options: _Arguments) -> int:
    names = [name[2:].replace("-", "_") for name in _BENCH_OPTIONS.split()]
    settings = {name: options[name] for name in names if name in options}
    report = clients[0].bench(progress=True, **settings)

    if "save_result" in options:
        _write_file(options["save_result"], json.dumps(report.to_dict()))
    if "json" in options:
        _print_json(report.to_dict())
    else:
        print(report)
    return 0 if report.to_dict()["completed"] else EXIT_FAILED


def _run_models(clients: Sequence[VLLMClient], options: _Arguments) -> int:
    cards = clients[0].models()
    if "json" in options:
        _print_json(_to_json(cards))
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
    print(json.dumps(value, ensure_ascii=not is_unicode, allow_nan=False))


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
            self._write(sys.stderr, delta.reasoning, is_dim=True)

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

    def _write(
        self, out: TextIO, text: str, token: TokenLogprob | None = None, *, is_dim: bool = False
    ) -> None:
        if out is not self._out:
            if is_dim or self._out is not None:
                text = text.lstrip("\n")  # templates put line breaks around the reasoning
            if not text:
                return
            self.end_line()

        self._out = out
        self._is_line_open = not text.endswith("\n")
        if out.isatty():
            text = _CONTROL.sub(_escape, text)
            text = self._dim(text) if is_dim else self._paint(text, token)
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
        if others:
            painted += self._dim(f"[{','.join(map(_to_hint, others))}]")
        return painted

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._has_color else text


def _to_hint(token: TokenLogprob) -> str:
    return f"{repr(token.token)[1:-1]} {token.probability:.2f}"


def _escape(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


# ---- Command line: conversation ---------------------------------------------


class _Conversation:
    """A chat on a terminal, which keeps the messages of the turns that did not fail."""

    def __init__(self, client: VLLMClient, options: _Arguments) -> None:
        self._client = client
        self._options = options
        self._params = _read_params(options)
        self._messages: list[dict[str, Any]] = []
        self._text = ""  # of the last turn, for /retry
        self._turn_messages = 0  # how many messages the last turn has added
        self._is_open = True
        self._commands = {
            "/help": self._help, "/clear": self._clear, "/retry": self._retry,
            "/save": self._save, "/load": self._load, "/system": self._set_system,
            "/set": self._set_param, "/quit": self._quit,
        }  # fmt: skip
        self._set_system(options.get("system", ""))

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
                self._quit("")
            except KeyboardInterrupt:
                print()
            except UnicodeError:
                _complain(f"vllm-provider: this is not {sys.stdin.encoding} text")
            except VLLMError as error:
                _complain(f"vllm-provider: {error}")

    def _take(self, line: str) -> None:
        if line.startswith('"""'):
            lines = [line[3:]]
            while not lines[-1].endswith('"""'):
                lines.append(input(". "))
            line = "\n".join(lines)[:-3].strip("\n")
        elif line.startswith("/"):
            self._obey(*line.partition(" "))
            return

        if line.strip():
            self._answer(line, self._messages)

    def _obey(self, name: str, _: str, argument: str) -> None:
        import difflib

        if name in self._commands:
            self._commands[name](argument.strip())
            return
        near = difflib.get_close_matches(name, self._commands, n=1)
        advice = f"did you mean {near[0]}?" if near else "see /help"
        raise ConfigurationError(
            f"unknown command: {_quoted(name)}; {advice} (a space before it sends it as text)"
        )

    def _answer(self, text: str, before: list[dict[str, Any]]) -> None:
        """Print the answer. Unless it fails, question and answer are added to `before`."""
        self._text = text
        self._turn_messages = len(self._messages) - len(before)
        question = {"role": "user", "content": text}
        stream = _start(self._client, [*before, question], self._options, self._params)
        try:
            _show(stream, self._options, self._params)
            answer = stream.completion.to_message()
        except KeyboardInterrupt:
            print()  # ends the line of the terminal's ^C
            answer = {"role": "assistant", "content": stream.completion.text}
            if not answer["content"]:
                return

        self._messages = [*before, question, answer]
        self._turn_messages = 2

    def _help(self, _: str) -> None:
        print(CHAT_HELP, end="")

    def _clear(self, _: str) -> None:
        self._replace([message for message in self._messages if message.get("role") == "system"])

    def _retry(self, _: str) -> None:
        if not self._text:
            raise ConfigurationError("there is no message to send again")
        self._answer(self._text, self._messages[: len(self._messages) - self._turn_messages])

    def _save(self, path: str) -> None:
        try:
            _write_file(os.path.expanduser(path), json.dumps(self._messages, indent=1))
        except OSError as error:
            raise VLLMError(f"/save FILE: {error}") from error

    def _load(self, path: str) -> None:
        try:
            with open(os.path.expanduser(path), encoding="utf-8") as file:
                body = build_chat_request(self._client.config, json.load(file))
        except (OSError, ValueError, RecursionError) as error:
            raise VLLMError(f"/load FILE: {error}") from error
        self._replace(body["messages"])

    def _set_system(self, text: str) -> None:
        self._messages = [message for message in self._messages if message.get("role") != "system"]
        if text:
            self._messages.insert(0, {"role": "system", "content": text})

    def _set_param(self, param: str) -> None:
        name, value = _read_param(param)
        self._params[name] = value

    def _quit(self, _: str) -> None:
        self._is_open = False

    def _replace(self, messages: list[dict[str, Any]]) -> None:
        self._messages = messages
        self._text = ""


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
    "--system --max-tokens --temperature --top-p --seed --stop --logprobs --param"
    " --no-stream --stats --json --html"
)
_BENCH_OPTIONS: Final = (
    "--num-prompts --max-concurrency --request-rate --burstiness --random-input-len"
    " --random-output-len --ignore-eos --endpoint --seed"
)
_BATCH_OPTIONS: Final = "--input-file --output-file --max-inflight --param"
_COMMANDS: Final = {
    "complete": _Command(_run_prompt, "continue a text", f"--chat-template {_PROMPT_OPTIONS}"),
    "chat": _Command(_run_prompt, "answer a text; without one, converse", _PROMPT_OPTIONS),
    "score": _Command(_run_score, "score a text", "--context --choice --json --html"),
    "run-batch": _Command(_run_batch, "send the requests of a file", _BATCH_OPTIONS),
    "bench": _Command(_run_bench, "measure speed", f"{_BENCH_OPTIONS} --json --save-result"),
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
        ("--chat-template", "", "render the text as a user message first"),
        ("--no-stream", "", "print the reply when it is complete"),
        ("--stats", "", "print time to first token, tokens/s and tokens to standard error"),
        ("--json", "", "print the whole result as JSON"),
        ("--html", "FILE", "write a heat map of log probabilities"),
        ("--context", "TEXT", "what stands before the text and is not scored"),
        ("--choice", "TEXT...", "rank such continuations of the text"),
        ("-i/--input-file", "FILE", "a JSON request a line; - is standard input"),
        ("-o/--output-file", "FILE", "the results; what it has already is not sent again"),
        ("--max-inflight", "N", "requests at once (default: 64)"),
        ("--num-prompts", "N", "default: 1000"),
        ("--max-concurrency", "N", "requests at once (default: no limit)"),
        ("--request-rate", "X", "requests/s (default: inf, all at once)"),
        ("--burstiness", "X", "1: Poisson (default); lower: bursts; higher: more even"),
        ("--random-input-len", "N", "tokens of a prompt (default: 1024)"),
        ("--random-output-len", "N", "tokens of a reply (default: 128)"),
        ("--ignore-eos", "", "generate all tokens, whatever the model says"),
        ("--endpoint", "NAME", "completions (default) or chat"),
        ("--save-result", "FILE", "write the result as JSON with vLLM's keys"),
        ("--wait", "X", "seconds to wait for a server that is starting"),
    )
}

if __name__ == "__main__":
    sys.exit(main())

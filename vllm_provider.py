# SPDX-License-Identifier: MIT
"""Talk to a vLLM server from Python: one file, one dependency (requests). Copy it into a project, or install it.

    >>> from vllm_provider import VLLMClient
    >>> client = VLLMClient("http://localhost:8000")
    >>> reply = client.complete("The capital of France is", logprobs=2)  # doctest: +SKIP
    >>> reply.text, reply.logprobs[0].probability                        # doctest: +SKIP
    (' Paris.', 0.9997)
    >>> for delta in client.stream_chat("What is 2+2?"):                 # doctest: +SKIP
    ...     print(delta.text, end="", flush=True)

The sections stand in the order one request travels, and data goes one way:

    VLLMConfig -> build_*_request -> transport -> SSE decoder -> replies -> VLLMClient -> VLLMProvider (Amplifier)
       values          pure        the only I/O      pure         pure          |
                                                                          command line
"""

import collections
import copy
import errno
import http.client
import io
import itertools
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, Final, NamedTuple, Self, TextIO, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

__version__ = "1.0.0"
__amplifier_module_type__ = "provider"
# fmt: off
__all__ = [
    "AbortError", "AccessDeniedError", "AuthenticationError", "Choice", "Completion", "ConfigurationError",
    "ContextLengthError", "Delta", "InvalidRequestError", "InvalidToolCallError", "LLMTimeoutError", "ModelCard",
    "NetworkError", "NotFoundError", "ProtocolError", "ProviderUnavailableError", "RateLimitError", "StatusError",
    "Stream", "StreamError", "TokenLogprob", "ToolCall", "Usage", "VLLMClient", "VLLMConfig", "VLLMError",
    "VLLMProvider", "build_chat_request", "build_completion_request", "main", "mount", "on_session_ready",
    "parse_chat_response", "parse_completion_response", "request_options",
]
# fmt: on

logger = logging.getLogger("vllm_provider")  # by name: a copied file may be imported under another one

# ---- Wire constants ---------------------------------------------------------

COMPLETIONS_PATH: Final = "/v1/completions"
CHAT_PATH: Final = "/v1/chat/completions"
DEFAULT_MAX_TOKENS: Final = 1024  # for a prompt as typed: the server's own default on /v1/completions is 16
SERVER_MAX_TOKENS: Final = 16  # that default, which servers 0.10.1-0.15 count in when they print a context limit
IDLE_REUSE_S: Final = 4.0  # vLLM closes a connection idle for 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)
DRAIN_S: Final = 0.05  # how long to wait for a reply's last bytes after [DONE], so that its connection can be reused
ERROR_BODY_S: Final = 5.0  # how long to wait for the words of an error whose status is known
HEALTH_POLL_S: Final = 0.5
LONGEST_WAIT_S: Final = 1e6  # 11 days; the clocks of sockets and locks overflow further on
READ_BYTES: Final = 65536
MAX_EVENT_BYTES: Final = 16 * 1024 * 1024  # no event of vLLM's comes near; more is a server gone wrong
MAX_REPLY_BYTES: Final = 512 * 1024 * 1024
MAX_ERROR_BYTES: Final = 1024 * 1024
MAX_QUOTED_CHARS: Final = 200
MIN_SECRET_CHARS: Final = 8  # a shorter key may be a common word: blanking it would garble what a server says
MAX_LOWERINGS: Final = 2  # vLLM 0.16-0.31 names the model's limit in a first error, the prompt's length in a second
SENTINEL_LOGPROB: Final = -9999.0  # vLLM writes -inf so, JSON having no infinity
RETRIED_STATUS: Final = frozenset({429, 502, 503})  # refused before it began; 504 is not: vLLM works on behind it
NOT_RETRIED: Final = frozenset({"/health", "/version"})  # asked to learn how the server is now
UNREACHABLE: Final = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETUNREACH})
HARMONY_START: Final = 200006  # <|start|>, the first token of every gpt-oss conversation
HARMONY_CALL: Final = 200012  # <|call|>, where gpt-oss stops after a tool call
NO_TEMPLATE: Final = "the model has no chat template"
CHAT_ONLY_PARAMETERS: Final = frozenset(
    "messages tools tool_choice parallel_tool_calls chat_template chat_template_kwargs documents reasoning_effort"
    " add_generation_prompt continue_final_message max_tokens max_completion_tokens include_reasoning"
    " logprobs top_logprobs".split()
)
LOOPBACK: Final = r"localhost|127(\.\d+){3}|::1"
HEADER_NAME: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110, token
BASE_URL_ADVICE: Final = "is base_url the server's root, and is it vLLM? (curl BASE_URL/v1/models)"
VLLM_PARAMETERS: Final = frozenset(  # only to tell a misplaced parameter from a misspelled setting
    "add_generation_prompt add_special_tokens allowed_token_ids bad_words best_of cache_salt chat_template"
    " chat_template_kwargs continue_final_message documents echo ec_transfer_params frequency_penalty ignore_eos"
    " include_reasoning include_stop_str_in_output kv_transfer_params length_penalty logit_bias logprob_token_ids"
    " max_completion_tokens media_io_kwargs min_p min_tokens mm_processor_kwargs n parallel_tool_calls"
    " presence_penalty prompt_embeds prompt_logprobs repetition_detection repetition_penalty request_id"
    " response_format return_prompt_text return_token_ids return_tokens_as_token_ids session_id skip_special_tokens"
    " spaces_between_special_tokens stop_token_ids stream_interval stream_options structured_outputs suffix"
    " thinking_token_budget tool_choice tools top_k top_logprobs truncate_prompt_tokens truncation_side"
    " use_beam_search user vllm_xargs watermarking".split()
)
CANCEL_POLL_S: Final = 0.1  # the kernel's session does not cancel the task that waits for us
DISCOVERY_S: Final = 5.0
SPARE_THREADS: Final = 512  # for the host, DNS and further providers; a thread starts only when none is idle
MAX_TOKENS_NAMES: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MISSING_RESULT: Final = "[SYSTEM ERROR: Tool result missing from conversation history] The call may have run or not."
_EVENTS: Final = (
    "llm:request llm:response provider:retry provider:tool_sequence_repaired llm:stream_block_start"
    " llm:stream_block_delta llm:stream_block_end llm:stream_aborted llm:request:debug llm:response:debug"
    " llm:request:raw llm:response:raw".split()
)
CALL_LIMITS: Final = ("timeout", "stream_idle_timeout", "deadline")  # keywords of a call that are not sent

# ---- Errors -----------------------------------------------------------------
#
# VLLMError
#   ConfigurationError (also ValueError)      nothing was sent
#   NetworkError                              no connection, or closed before a reply
#   LLMTimeoutError                           timeout, idle timeout or deadline
#   StreamError                               the reply stopped half way
#   AbortError                                cancelled by the caller
#   InvalidToolCallError                      the model wrote arguments that are not a JSON object
#   ProtocolError                             a reply that is not what vLLM sends (HTML, bad JSON, too large)
#   StatusError                               any other HTTP error
#     AuthenticationError 401
#       AccessDeniedError 403
#     NotFoundError 404
#     InvalidRequestError 400, 422
#     ContextLengthError                      the prompt does not fit the model
#     RateLimitError 429
#     ProviderUnavailableError 5xx
#
# Names and inheritance are Amplifier's kernel's where it has them. None is an OSError: its application swallows those.


class VLLMError(Exception):
    """Base of every error of this module; its text says what happened, where, and what to do about it.

    `status_code`: the reply's, None without one. `retryable`: whether the same call may succeed later (the first may
    have run all the same). `retry_after`: the seconds the server asks to wait, or None. `request_id`: ours, as sent.
    `partial`: for a stream, the Completion received so far. Errors can be pickled.
    """

    _retryable = False

    def __init__(
        self, message: str, *, status_code: int | None = None, retryable: bool | None = None,
        retry_after: float | None = None, request_id: str | None = None, partial: "Completion | None" = None,
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
    """`timeout`, `stream_idle_timeout`, `connect_timeout` or `deadline` ran out; the server was stopped."""

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


class ProtocolError(VLLMError):
    """A reply that is not what vLLM sends: HTML, broken JSON, an unknown encoding, or far too large."""


class StatusError(VLLMError):
    """An HTTP error, also one told inside a reply with status 200. `server_message`: the server's own words."""

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
    """The prompt does not fit: `limit` (the model's) and `input_tokens`, each None where the server did not say."""

    limit: int | None = None
    input_tokens: int | None = None


class RateLimitError(StatusError):
    """429: from a gateway; vLLM itself sends none."""

    _retryable = True


class ProviderUnavailableError(StatusError):
    """5xx: the engine is busy, starting or dead."""

    _retryable = True


_STATUS_ERRORS: Final[Mapping[int, type[StatusError]]] = {
    **dict.fromkeys((400, 422), InvalidRequestError),
    401: AuthenticationError,
    403: AccessDeniedError,
    404: NotFoundError,
    429: RateLimitError,
}

# ---- Values: configuration --------------------------------------------------

_FLAGS: Final = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
_Check = Callable[[str, Any], Any]


def _check(expected: str, convert: Callable[[Any], Any]) -> _Check:
    """Return a function of a setting's key and value that converts the value, or says what was expected."""

    def check(key: str, value: Any) -> Any:
        try:
            return convert(value)
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ConfigurationError(f"{key} must be {expected}, got {value!r}") from error

    return check


def _require(is_good: bool) -> None:
    if not is_good:
        raise ValueError


def _to_text(value: Any) -> str:
    _require(isinstance(value, str))
    return str(value)


def _to_number(value: Any, least: float = -sys.float_info.max, most: float = sys.float_info.max) -> float:
    _require(isinstance(value, str | int | float) and not isinstance(value, bool))
    _require(least <= float(value) <= most)  # never true of NaN
    return float(value)


def _to_int(value: Any, least: float = -sys.float_info.max) -> int:
    _require(_to_number(value, least).is_integer())
    return int(value) if re.fullmatch(r"\s*[+-]?[\d_]+\s*", str(value)) else int(float(value))


def _to_strings(value: Any) -> str | list[str]:
    strings = value if isinstance(value, str) else list(value)
    _require(all(isinstance(item, str) for item in strings))
    return strings


def _to_logprobs(value: Any) -> int | bool:
    word = str(value).strip().lower()
    return _FLAGS[word] if word in ("true", "false") else _to_int(value)


def _to_verify(value: Any) -> bool | str:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else ""
    return path if os.path.exists(path) else _FLAGS[str(value).lower()]


_text = _check("a string", _to_text)
_flag = _check("true or false", lambda value: _FLAGS[str(value).strip().lower()])
_number = _check("a number", _to_number)
_seconds = _check("a positive number of seconds", lambda value: _to_number(value, math.ulp(0.0), math.inf))
_integer = _check("a whole number", _to_int)
_count = _check("a whole number of at least 1", lambda value: _to_int(value, 1))
_count_or_zero = _check("a whole number of at least 0", lambda value: _to_int(value, 0))
_strings = _check("a string or a list of strings", _to_strings)
_logprobs = _check("a whole number, true or false", _to_logprobs)
_verify = _check("true, false or the path of a CA bundle that exists", _to_verify)
_format = _check("auto, chat_template or raw", {name: name for name in ("auto", "chat_template", "raw")}.__getitem__)


def _mapping(key: str, value: object) -> dict[str, Any]:
    """Return a dict; the error does not quote the values, which may be secrets."""
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{key} must be a mapping, got a {type(value).__name__}")
    for name in value:
        if not isinstance(name, str):
            raise ConfigurationError(f"{key} must have strings as keys, got {name!r}")
    return dict(value)


def _secret(key: str, value: object) -> str:
    """Return a value fit for a header; the error never quotes it, and nothing underneath the error does."""
    if not (isinstance(value, str) and value.isascii() and value.isprintable()):
        raise ConfigurationError(f"{key} must be printable ASCII; is a line break or a typographic character in it?")
    return value


def _headers(key: str, value: object) -> dict[str, str]:
    headers = _mapping(key, value)
    for name in headers:
        if not re.fullmatch(HEADER_NAME, name):
            raise ConfigurationError(f"{key} must have HTTP header names as keys, got {name!r}")
    return {name: _secret(f"{key}[{name!r}]", str(text)).strip() for name, text in headers.items()}


def _base_url(key: str, value: object) -> str:
    """Return the server's root, without `/v1` and without a trailing slash.

    >>> _base_url("base_url", "https://gpu.example/openai/v1/")
    'https://gpu.example/openai'
    """
    text: str = _text(key, value).strip()
    if "@" in text:
        raise ConfigurationError(f"{key} must not hold a user name or password; a key goes under api_key")
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or re.search(r"[\s\x00-\x1f\x7f?#]", text):
        shown = re.split(r"[?#]", str(value))[0]  # what follows may be a key
        raise ConfigurationError(
            f"{key} must be a URL like http://localhost:8000, without query or fragment, got {shown!r}"
        )
    scheme, rest = text.split(":", 1)
    return f"{scheme.lower()}:{rest}".rstrip("/").removesuffix("/v1").rstrip("/")


def _setting(check: _Check, default: Any = None, env: str = "") -> Any:
    """Return a field that takes what `check` returns; None, "" and an unexpanded ${NAME} stand for the default."""
    return field(default=None, metadata={"check": check, "default": default, "env": env})


def _is_given(value: object) -> bool:
    return not (value is None or value == "" or (isinstance(value, str) and re.fullmatch(r"\$\{\w+\}", value)))


@dataclass(frozen=True, slots=True, repr=False)
class VLLMConfig:
    """Settings of a client or provider; README has the table. Every value may also be given as a string.

    Times are in seconds and `math.inf` is no limit. Without `base_url` the environment's VLLM_BASE_URL counts, without
    `api_key` its VLLM_API_KEY. Raises ConfigurationError, which names the key, the value and what was expected. The
    repr shows no key and no header's value.

    >>> VLLMConfig("http://localhost:8000/v1/", timeout="60", api_key="secret")
    VLLMConfig(base_url='http://localhost:8000', api_key='***', timeout=60.0)
    """

    base_url: str = _setting(_base_url, env="VLLM_BASE_URL")
    _: KW_ONLY
    default_model: str | None = _setting(_text)
    use_completions: bool = _setting(_flag, True)
    prompt_format: str = _setting(_format, "auto")
    api_key: str = _setting(_secret, "EMPTY", env="VLLM_API_KEY")
    max_tokens: int | None = _setting(_count_or_zero)
    temperature: float | None = _setting(_number)
    top_p: float | None = _setting(_number)
    seed: int | None = _setting(_integer)
    stop: str | list[str] | None = _setting(_strings)
    logprobs: int | bool | None = _setting(_logprobs)
    reasoning_effort: str | None = _setting(_text)
    extra_body: Mapping[str, Any] = _setting(_mapping, {})
    timeout: float = _setting(_seconds, 300.0)
    stream_idle_timeout: float = _setting(_seconds)  # None: as timeout
    connect_timeout: float = _setting(_seconds, 10.0)
    max_retries: int = _setting(_count_or_zero, 3)
    max_retry_delay: float = _setting(_seconds, 30.0)
    max_concurrency: int = _setting(_count, 64)
    verify: bool | str = _setting(_verify, True)
    default_headers: Mapping[str, str] = _setting(_headers, {})
    context_window: int | None = _setting(_count)
    max_output_tokens: int | None = _setting(_count)
    use_streaming: bool = _setting(_flag, True)
    priority: int = _setting(_integer, 100)
    debug: bool = _setting(_flag, False)
    raw_debug: bool = _setting(_flag, False)
    debug_truncate_length: int = _setting(_count, 180)
    raw: bool = _setting(_flag, False)

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, rule = getattr(self, spec.name), spec.metadata
            value = value if _is_given(value) else os.environ.get(rule["env"])
            checked = rule["check"](spec.name, value) if _is_given(value) else copy.copy(rule["default"])
            object.__setattr__(self, spec.name, checked)
        if self.base_url is None:
            raise ConfigurationError("No base_url found: set it or VLLM_BASE_URL, like http://localhost:8000")
        if self.stream_idle_timeout is None:
            object.__setattr__(self, "stream_idle_timeout", self.timeout)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Return the configuration in a mapping from YAML or Amplifier; an unknown key is one warning.

        `extra_request_params` is another name for `extra_body`.
        """
        known = [spec.name for spec in fields(cls)]
        settings = {}
        for key, value in _mapping("the configuration", mapping).items():
            name = "extra_body" if key == "extra_request_params" else key
            if name in known:
                settings[name] = value
            else:
                logger.warning("unknown setting %r is ignored%s", key, _suggestion(key, known))
        return cls(**settings)

    def __repr__(self) -> str:
        defaults = {spec.name: spec.metadata["default"] for spec in fields(self)}
        defaults["stream_idle_timeout"] = self.timeout
        shown = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        hidden = {"api_key": "***", "default_headers": dict.fromkeys(self.default_headers, "***")}
        return f"VLLMConfig({', '.join(f'{name}={hidden.get(name, value)!r}' for name, value in shown.items())})"


def _suggestion(key: str, known: Sequence[str]) -> str:
    import difflib

    if key in VLLM_PARAMETERS:
        return "; it is a parameter of vLLM's: put it under extra_body"
    near = [name for name in known if key in name] or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


# ---- Values: replies --------------------------------------------------------
#
# What comes once for each token is a named tuple: a frozen dataclass takes four times as long to make.


class TokenLogprob(NamedTuple):
    """A token and its natural log probability, in one shape for both endpoints.

    `logprob`: None where the server has none (the first token of an echoed prompt), -inf for its -9999.0. `bytes`,
    `token_id`, `rank`: None where it sent none. `top`: the alternatives, likeliest first, at most as many as asked for.
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
    """A function the model calls; in a Delta, `arguments` is the piece of text its event added."""

    id: str
    name: str
    arguments: str

    def parsed(self) -> dict[str, Any]:
        """Return the arguments as a dict; raise InvalidToolCallError when the model wrote anything else.

        >>> ToolCall("call_1", "get_weather", '{"city": "Paris"}').parsed()
        {'city': 'Paris'}
        """
        try:
            arguments = json.loads(self.arguments, parse_constant=_refuse_constant)
            if isinstance(arguments, dict):
                return arguments
            raise ValueError(f"a {type(arguments).__name__} is not an object")
        except (ValueError, RecursionError) as cause:
            told = f"arguments that are not a JSON object: {_quoted(self.arguments)}; was it cut by max_tokens?"
            error = InvalidToolCallError(f"the model called {self.name!r} with {told}")
            error.tool_name, error.raw_arguments = self.name, self.arguments
            raise error from cause


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


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

    With several prompts `index` is `prompt * n + answer`. `stop_reason` is the stop string that matched, or a stop
    token's id. `logprobs` covers every token generated, those of reasoning, markup and the end included.
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

    `id` is the server's, `request_id` ours. `first_token_s` (streams only) and `total_s` are seconds since the call
    began. `payload` is the decoded reply; for a stream, its top-level fields without choices.
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
        """Return the assistant's message for the next turn. Content is never None: vLLM up to 0.11 fails on that."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning"] = self.reasoning  # the name every vLLM since 0.11.1 honours
        if self.tool_calls:
            message["tool_calls"] = [_to_wire_call(call.id, call.name, call.arguments) for call in self.tool_calls]
        return message


def _to_wire_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class ModelCard(NamedTuple):
    """A model of /v1/models. `max_model_len`: tokens, a LoRA's being its base's; None where the server is silent."""

    id: str
    max_model_len: int | None = None
    root: str | None = None
    parent: str | None = None


def _to_json(value: Any, longest: int = sys.maxsize, token: str = "token") -> Any:
    """Return values of this module as what JSON can hold: -inf as vLLM's -9999.0, bytes as a list.

    `longest`: the length at which strings are cut. `token`: what to call the key of that name.
    """
    if (names := getattr(value, "_fields", getattr(value, "__dataclass_fields__", None))) is not None:
        value = {name: getattr(value, name) for name in names}
    if isinstance(value, Mapping):
        return {token if name == "token" else name: _to_json(item, longest, token) for name, item in value.items()}
    if isinstance(value, list | tuple | bytes):
        return [_to_json(item, longest, token) for item in value]
    if isinstance(value, str) and len(value) > longest:
        return f"{value[:longest]}… ({len(value)} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return SENTINEL_LOGPROB if value < 0 else None
    return value


# ---- Requests (pure) --------------------------------------------------------

_Body = Mapping[str, Any]  # JSON we send


def build_completion_request(config: VLLMConfig, prompt: Any, **params: Any) -> dict[str, Any]:
    """Return the JSON body for `/v1/completions`.

    `prompt`: a string, a list of strings, a list of token ids, or a list of such lists. `params`: vLLM's own request
    parameters; None is not sent, 0 and False are. `logprobs=N` asks for N alternatives a token. Raises
    ConfigurationError for what is not JSON and for `stream`.

    >>> config = VLLMConfig("http://localhost:8000", default_model="m")
    >>> build_completion_request(config, "Once", temperature=0, logprobs=True)
    {'model': 'm', 'prompt': 'Once', 'max_tokens': 1024, 'temperature': 0, 'logprobs': 1}
    """
    max_tokens = DEFAULT_MAX_TOKENS if config.max_tokens is None else config.max_tokens
    body = _merge(config, {"prompt": prompt, "max_tokens": max_tokens}, params)
    if body.get("logprobs") is True:
        body["logprobs"] = 1
    elif body.get("logprobs") is False:  # vLLM reads it as 0, which switches them on
        del body["logprobs"]
    return body


def build_chat_request(config: VLLMConfig, messages: Any, **params: Any) -> dict[str, Any]:
    """Return the JSON body for `/v1/chat/completions`.

    `messages`: a list of dicts, or one string from the user. `params` and errors as in build_completion_request;
    `logprobs=N` is sent as chat spells it.

    >>> build_chat_request(VLLMConfig("http://localhost:8000"), "Hi", logprobs=2)
    {'messages': [{'role': 'user', 'content': 'Hi'}], 'logprobs': True, 'top_logprobs': 2}
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise ConfigurationError("messages must be a string or a list of dicts like {'role': 'user', 'content': '…'}")
    body = _merge(config, {"messages": list(messages), "max_tokens": config.max_tokens}, params)
    logprobs = body.get("logprobs")
    if logprobs is False:
        del body["logprobs"]
    elif logprobs is not None and logprobs is not True:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    return body


def _merge(config: VLLMConfig, body: dict[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return configuration < params < extra_body, without what is None; raise ConfigurationError if it is not JSON."""
    names = ("temperature", "top_p", "seed", "stop", "logprobs", "reasoning_effort")
    settings = {name: getattr(config, name) for name in names}
    extra = _mapping("extra_body", params.get("extra_body") or {})
    merged: dict[str, Any] = {}
    for layer in ({"model": config.default_model}, body, settings, params, config.extra_body, extra):
        merged |= {name: value for name, value in layer.items() if value is not None}
    for name in ("extra_body", *CALL_LIMITS):
        merged.pop(name, None)
    if "stream" in merged:
        raise ConfigurationError("stream is not a parameter here; stream_complete() and stream_chat() stream")
    _encode(merged)
    return merged


def _encode(body: _Body) -> bytes:
    """Return the body's bytes; raise ConfigurationError for what JSON cannot hold, without quoting the body."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError("the request holds a lone surrogate, which UTF-8 has no bytes for") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"the request is not JSON: {error}") from error


def _to_stream(body: _Body) -> dict[str, Any]:
    """Return the body asking for a stream with usage, which vLLM up to 0.17 and from 0.18 on default differently."""
    options = _mapping("stream_options", body.get("stream_options", {}))
    return {**body, "stream": True, "stream_options": {"include_usage": True, **options}}


class _Limits(NamedTuple):
    """A call's limits in seconds; `math.inf` is none."""

    timeout: float
    stream_idle_timeout: float
    deadline: float


def _limits(config: VLLMConfig, params: Mapping[str, Any]) -> _Limits:
    """Return the limits of a call with these parameters."""
    given = {name: _seconds(name, params[name]) for name in CALL_LIMITS if params.get(name) is not None}
    defaults = {"timeout": config.timeout, "stream_idle_timeout": config.stream_idle_timeout, "deadline": math.inf}
    return _Limits(**{**defaults, **given})


# ---- Transport (the only I/O) -----------------------------------------------
#
# requests' timeouts start anew at each byte, and it offers nothing to stop a call from outside. So the pool's
# connections hand their socket to the call that uses it, and the socket asks that call's clock before each operation:
# a stop reaches every phase, and a limit holds by the wall clock, without a thread.


def _new_id() -> str:
    import uuid  # which loads `platform` and a dozen patterns

    return str(uuid.uuid4())


class _Call:
    """One call's clock and brake. The thread that makes the call reads and closes; any thread may stop it."""

    def __init__(self, limits: _Limits, request_id: str | None = None) -> None:
        self.limits = limits
        self.request_id = request_id or _new_id()
        self.keeps_id = request_id is not None
        self.attempt = self.process = 0
        self.started = self.ends = self.expires = self.must_end = math.inf
        self.ended: float | None = None
        self.first_token_s: float | None = None
        self.limit = "timeout"
        self.connected = self.reused = self.received = self.fresh_only = self.is_idle_due = False
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.incoming: _Incoming | None = None

    def begin(self) -> None:
        self.process = os.getpid()
        self.started = time.monotonic()
        self.ends = min(self.started + self.limits.deadline, self.must_end)

    def begin_attempt(self, path: str) -> None:
        self.check()
        self.attempt += path in (COMPLETIONS_PATH, CHAT_PATH)  # questions on the side do not count
        self.connected = self.reused = self.received = self.is_idle_due = False
        self.incoming = None
        self.limit, self.expires = "timeout", time.monotonic() + self.limits.timeout

    def time_left(self) -> float | None:
        """Return the seconds an operation may take, None for no limit; raise TimeoutError when none are left."""
        if self.is_idle_due:  # restarted only here, where waiting begins: the consumer's time is not the server's
            self.is_idle_due, self.limit = False, "stream_idle_timeout"
            self.expires = time.monotonic() + self.limits.stream_idle_timeout
        left = min(self.expires, self.ends) - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return None if left > LONGEST_WAIT_S else left

    def elapsed_s(self) -> float | None:
        now = time.monotonic() if self.ended is None else self.ended
        return None if self.started == math.inf else now - self.started

    def wire_id(self) -> str:
        """Return the id of this attempt: vLLM up to 0.13 fails on one it has seen. A caller's own goes unchanged."""
        return self.request_id if self.keeps_id else f"{self.request_id}-{self.attempt}"

    def attach(self, sock: socket.socket, reused: bool) -> None:
        """Take over the socket that a connection is about to use: from here on a stop reaches it."""
        with self._lock:
            self._socket = sock
            self.connected, self.reused = True, reused
            if self._stopped.is_set():
                raise ConnectionAbortedError

    def release(self) -> None:
        with self._lock:
            self._socket = None

    def stop(self) -> None:
        """Shut the socket both ways, at once, from any thread. The thread that reads closes it."""
        with self._lock:
            self._stopped.set()
            if self._socket is not None and self.process == os.getpid():  # a forked child shares its parent's
                with suppress(OSError):  # the other side was first
                    # Not its own shutdown(): an SSLSocket's drops the TLS layer; the reader gets ciphertext.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def check(self) -> None:
        if self._stopped.is_set():
            raise AbortError("the call was stopped by its caller")

    def pause(self, seconds: float) -> None:
        self._stopped.wait(min(seconds, LONGEST_WAIT_S))
        self.check()

    def timeout_error(self, where: str) -> LLMTimeoutError:
        limits, is_final = self.limits, time.monotonic() >= self.ends
        if is_final:
            told, advice = f"deadline of {limits.deadline:g} s reached", "give the call more time"
        elif not self.connected:
            told, advice = "no connection in time", "is the host right, and does a firewall block it?"
        elif self.limit == "timeout":
            told, advice = f"no reply within {limits.timeout:g} s", "raise timeout, or ask for fewer tokens"
        else:
            told = f"silent for {limits.stream_idle_timeout:g} s in mid-reply"
            advice = "raise stream_idle_timeout, or see if a proxy buffers"
        return LLMTimeoutError(f"{told}: {where}; {advice}", retryable=not is_final)


_CURRENT_CALL: Final[ContextVar[_Call]] = ContextVar("vllm_provider_call")  # how a pooled connection finds its call


class _Socket(socket.socket):
    """A socket that never waits longer than its call's clock allows."""

    call: _Call
    last_byte = 0.0

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(self.call.time_left())
        count = super().recv_into(buffer, nbytes, flags)
        self.last_byte = time.monotonic()
        if count:
            self.call.received = True
        return count

    def send(self, data: Any, flags: int = 0) -> int:
        self.settimeout(self.call.time_left())
        return super().send(data, flags)

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.settimeout(self.call.time_left())
        super().sendall(data, flags)


class _TLSSocket(_Socket, ssl.SSLSocket):  # type: ignore[misc]  # typeshed has two spellings of recv_into()
    """The same under TLS; made by the SSL context, as its `sslsocket_class`."""


class _Incoming(http.client.HTTPResponse):
    """A reply that hands over all the chunks that have arrived; read1() takes them one by one, at twice the CPU."""

    def begin(self) -> None:
        super().begin()
        _CURRENT_CALL.get().incoming = self if self.chunked else None

    def read_chunks(self) -> bytes:
        """Return the data of the chunks in the buffer, waiting if it is empty; b"" where read1() must do the rest."""
        buffer = self.fp.peek()
        data: list[bytes] = []
        used, left = 0, self.chunk_left  # None before the first chunk, 0 before a chunk's last CRLF
        while used < len(buffer):
            if not left:
                start = used if left is None else used + 2
                end = buffer.find(b"\r\n", start)
                size = buffer[start:end].partition(b";")[0].strip()
                if end < 0 or not size.strip(b"0") or not re.fullmatch(rb"[0-9a-fA-F]{1,8}", size):
                    break  # not whole, the last one, or not a size
                used, left = end + 2, int(size, 16)
            data.append(buffer[used : used + left])
            used, left = used + len(data[-1]), left - len(data[-1])
        self.fp.read(used)
        self.chunk_left = left
        return b"".join(data)


class _Connection(HTTPConnection):
    """A connection that hands its socket to the current call, also when it comes out of the pool."""

    response_class = _Incoming

    @property
    def is_connected(self) -> bool:
        """Return whether urllib3 may use this pooled connection again; if not, it connects anew."""
        idle_s = time.monotonic() - getattr(self.sock, "last_byte", 0.0)
        return idle_s < IDLE_REUSE_S and not _CURRENT_CALL.get().fresh_only and super().is_connected

    def connect(self) -> None:
        super().connect()
        if type(self.sock) is socket.socket:
            plain = self.sock
            self.sock = _Socket(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._hand_over(reused=False)

    def request(self, *args: Any, **options: Any) -> None:
        if self.sock is not None and not _CURRENT_CALL.get().connected:
            self._hand_over(reused=True)
        super().request(*args, **options)

    def _hand_over(self, reused: bool) -> None:
        call, previous = _CURRENT_CALL.get(), getattr(self.sock, "call", None)
        if previous is not None:
            previous.release()  # first: a late stop of the call before must not reach this one
        sock: Any = self.sock
        sock.call = call
        call.attach(getattr(sock, "socket", sock), reused)  # a TLS proxy's socket is inside urllib3's own transport


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _Adapter(HTTPAdapter):
    """requests' adapter with our connections, to the server and through proxies."""

    def __init__(self, config: VLLMConfig) -> None:
        self._tls: dict[str, Any] = {}
        if config.base_url.startswith("https:"):
            mode = ssl.CERT_NONE if config.verify is False else ssl.CERT_REQUIRED
            self._tls["ssl_context"] = urllib3.util.create_urllib3_context(cert_reqs=mode)
            self._tls["ssl_context"].sslsocket_class = _TLSSocket
        super().__init__(pool_maxsize=config.max_concurrency)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, **options, **self._tls)
        self.poolmanager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options, **self._tls)
        manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        return manager


class _Session(requests.Session):
    """A session that leaves redirects alone: following one would carry the prompt to another place."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class _Transport:
    """Sends requests, and reads replies as bytes. May be shared between threads."""

    def __init__(self, config: VLLMConfig) -> None:
        self._config = config
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._calls: set[_Call] = set()
        self._session = _Session()
        self._session.mount(self._config.base_url.partition("//")[0] + "//", _Adapter(self._config))
        # Proxies, CA bundle and headers are worked out once, not for each call: half the CPU of a small one.
        url = self._config.base_url
        environment = self._session.merge_environment_settings(url, {}, True, self._config.verify, None)
        self._settings: dict[str, Any] = {**environment, "allow_redirects": False}
        if re.fullmatch(LOOPBACK, urlsplit(url).hostname or ""):
            self._settings["proxies"] = {}
        headers = {"Accept": "*/*", "Accept-Encoding": "identity", "Content-Type": "application/json"}
        headers["User-Agent"] = f"vllm_provider/{__version__}"
        if self._config.api_key != "EMPTY":
            headers["Authorization"] = f"Bearer {self._config.api_key}"
        # Not Session.prepare_request(): it puts a .netrc entry in the place of our key.
        self._template = requests.Request("POST", url, {**headers, **self._config.default_headers}).prepare()

    @contextmanager
    def call(self, call: _Call) -> Iterator[_Call]:
        """Keep `call` among the calls in flight, for close() to stop; on any exception, stop it at once."""
        if self._process != os.getpid():
            self._open()  # forked: the connections are the parent's
        self._calls.add(call)
        call.begin()
        try:
            yield call
        except BaseException as error:
            call.stop()
            if isinstance(error, VLLMError):
                error.request_id = call.request_id
            raise
        finally:
            call.ended = time.monotonic()
            call.release()
            self._calls.discard(call)

    def send(self, call: _Call, method: str, path: str, body: bytes | None) -> requests.Response:
        """Return the reply to one attempt, whatever its status, once its headers are there.

        Raises NetworkError, LLMTimeoutError, AbortError, or ConfigurationError for what requests will not send.
        """
        call.begin_attempt(path)
        request = self._template.copy()
        request.method, request.url, request.body = method, self._config.base_url + path, body
        request.headers.setdefault("X-Request-Id", call.wire_id())
        request.headers["Content-Length"] = str(len(body or b""))
        where = f"{method} {request.url}"
        logger.debug("%s, %d bytes, request %s", where, len(body or b""), call.wire_id())
        token = _CURRENT_CALL.set(call)
        try:
            left = call.time_left()
            connect = min(self._config.connect_timeout, math.inf if left is None else left)
            timeout = (None if connect > LONGEST_WAIT_S else connect, left)
            response = self._session.send(request, timeout=timeout, **self._settings)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            call.check()
            raise _to_network_error(error, call, where) from error
        finally:
            _CURRENT_CALL.reset(token)
        logger.debug("%s: %d, request %s", where, response.status_code, call.wire_id())
        return response

    def read(self, call: _Call, response: requests.Response, limit: int | None = None) -> Generator[bytes, None, None]:
        """Yield the reply's bytes as they arrive; raise StreamError, LLMTimeoutError, ProtocolError or AbortError.

        Read to its end, the connection goes back to the pool; left earlier, it is closed. `limit`: its bytes at most.
        """
        where, size, limit = _where(response), 0, limit or MAX_REPLY_BYTES
        encoding = response.headers.get("Content-Encoding", "identity")
        try:
            if encoding != "identity":
                raise ProtocolError(f"the reply is encoded as {encoding!r}, which was not asked for: {where}")
            while piece := (call.incoming and call.incoming.read_chunks()) or response.raw.read1(READ_BYTES):
                call.check()
                size += len(piece)
                yield piece[: len(piece) - max(0, size - limit)]
                if size > limit:
                    raise ProtocolError(f"the reply is larger than {limit} bytes: {where}")
            call.check()
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            call.check()
            if _is_timeout(error):
                raise call.timeout_error(where) from error
            raise StreamError(f"the reply broke off: {where}: {_root_cause(error)}") from error
        finally:
            call.incoming = None
            call.release()
            response.close()

    def close(self) -> None:
        """Stop the calls in flight and empty the pool; a later call opens it again."""
        for call in tuple(self._calls):
            call.stop()
        self._session.close()


def _where(response: requests.Response) -> str:
    return f"{response.request.method} {response.url}"


def _root_cause(error: BaseException) -> BaseException:
    """Return the innermost exception: requests and urllib3 wrap an OSError three deep."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _is_timeout(error: BaseException) -> bool:
    timeouts = (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)
    return isinstance(error, timeouts) or isinstance(_root_cause(error), TimeoutError)


def _to_network_error(error: Exception, call: _Call, where: str) -> VLLMError:
    """Return our error for one raised before there was a reply; most specific first."""
    cause = _root_cause(error)
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(where.split()[1]))
    if _is_timeout(error):
        return call.timeout_error(where)
    if isinstance(cause, ssl.SSLError):
        text = f"TLS failed ({cause.reason or cause}); does {origin} speak https, and does verify name its CA bundle?"
        return NetworkError(f"no connection to {origin}: {text}", retryable=False)
    if isinstance(cause, socket.gaierror):
        return NetworkError(f"no connection to {origin}: unknown host; is base_url spelled right?", retryable=False)
    if isinstance(error, requests.exceptions.ProxyError):
        return NetworkError(f"no connection to {origin}: its proxy failed ({cause}); check HTTPS_PROXY and NO_PROXY")
    if isinstance(error, ValueError):  # the parent of what requests and urllib3 will not send
        return ConfigurationError(f"requests will not send {where}: {error}")
    if isinstance(cause, http.client.HTTPException) and not isinstance(cause, ConnectionError):
        return ProtocolError(f"not an HTTP reply: {where}: {_quoted(str(cause))}; is it vLLM's port, and http there?")
    if call.connected:
        return NetworkError(f"closed before a reply: {where} ({cause}); is vLLM still running, and is it http there?")
    reason = (getattr(cause, "strerror", None) or str(cause)).lower()
    return NetworkError(f"no connection to {origin}: {reason}; is vLLM running? (curl {origin}/health)")


def _is_unstarted(error: VLLMError, call: _Call) -> bool:
    """Return whether the server is known not to have begun with the request."""
    refused = getattr(_root_cause(error), "errno", None) in UNREACHABLE and not call.connected
    return error.status_code in RETRIED_STATUS or (isinstance(error, NetworkError) and error.retryable and refused)


def _find_pause_s(config: VLLMConfig, error: VLLMError, attempt: int, left_s: float, deadline: float) -> float:
    """Return the pause in seconds before retry number `attempt` (the first is 1); raise if it would be too long.

    Between d/2 and d, where d doubles from 0.5 s to max_retry_delay; never shorter than the server's Retry-After.

    >>> error = ProviderUnavailableError("503", retry_after=7.0)
    >>> _find_pause_s(VLLMConfig("http://localhost:8000"), error, 1, left_s=math.inf, deadline=math.inf)
    7.0
    """
    wait, longest = error.retry_after or 0.0, min(config.max_retry_delay, 0.5 * 2.0 ** min(attempt - 1, 60))
    if wait > config.max_retry_delay:
        raise error
    pause = max(random.uniform(longest / 2, longest), wait)
    if pause >= left_s:
        text = f"the deadline of {deadline:g} s leaves no time to try again: {error}"
        raise LLMTimeoutError(text, retryable=False) from error
    return pause


# ---- Stream decoder (pure) --------------------------------------------------


class _SSEDecoder:
    r"""Turns bytes, cut anywhere, into the data of server-sent events (HTML standard, section 9.2.6).

    Splits at LF, CRLF and CR only: str.splitlines() would also split at U+2028, which vLLM sends raw inside JSON.

    >>> decoder = _SSEDecoder()
    >>> decoder.feed(b"data: [DO"), decoder.feed(b"NE]\n\n")
    ([], ['[DONE]'])
    """

    def __init__(self) -> None:
        self._line: list[bytes] = []  # the pieces of a line that has not ended
        self._data: list[bytes] = []  # the data lines of an event that has not ended
        self._line_bytes = self._data_bytes = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, raw: bytes) -> list[str]:
        """Return the data of the events that `raw` completes."""
        if raw.find(b"\n") == len(raw) - 2 and raw.startswith(b"data: ") and self._is_idle(raw):
            return [raw[6:-2].decode("utf-8", "replace")]  # one event, as vLLM sends them: a third of the CPU
        if self._after_cr and raw:
            raw = raw.removeprefix(b"\n")  # the CR before it has ended the line already
            self._after_cr = False
        if not raw:
            return []
        lines = raw.splitlines(keepends=True)
        rest = b"" if raw.endswith((b"\n", b"\r")) else lines.pop()
        self._after_cr = raw.endswith(b"\r")
        if lines and self._line:
            lines[0] = b"".join((*self._line, lines[0]))
            self._line, self._line_bytes = [], 0
        events = self._read_lines(lines)
        if rest:
            self._line.append(rest)
            self._line_bytes += len(rest)
        return events

    def check(self) -> None:
        """Raise ProtocolError when the event that has not ended is over MAX_EVENT_BYTES."""
        if self._line_bytes + self._data_bytes > MAX_EVENT_BYTES:
            raise ProtocolError(f"an event of the stream is larger than {MAX_EVENT_BYTES} bytes")

    def _is_idle(self, raw: bytes) -> bool:
        is_between = not (self._line or self._data or self._at_start or self._after_cr)
        return is_between and raw.endswith(b"\n\n") and b"\r" not in raw

    def _read_lines(self, lines: list[bytes]) -> list[str]:
        events = []
        for ended_line in lines:
            line = ended_line.rstrip(b"\r\n")
            if self._at_start:
                line, self._at_start = line.removeprefix(b"\xef\xbb\xbf"), False
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                self._data_bytes += len(line)
            elif line == b"data":
                self._data.append(b"")
            elif not line and self._data:
                events.append(b"\n".join(self._data).decode("utf-8", "replace"))
                self._data, self._data_bytes = [], 0
        return events


# ---- Replies (pure) ---------------------------------------------------------

_JSON: Final = json.JSONDecoder()


def parse_completion_response(payload: Mapping[str, Any]) -> Completion:
    """Return the Completion in a decoded reply of `/v1/completions`.

    Raises the error the payload tells (vLLM 0.10-0.17 tell some with HTTP status 200), or ProtocolError.

    >>> parse_completion_response({"id": "cmpl-1", "choices": [{"index": 0, "text": " Paris.", "logprobs": None}]}).text
    ' Paris.'
    """
    return _parse_response(payload)


def parse_chat_response(payload: Mapping[str, Any]) -> Completion:
    """Return the Completion in a decoded reply of `/v1/chat/completions`; errors as in parse_completion_response.

    >>> parse_chat_response({"choices": [{"message": {"content": "Hi", "reasoning_content": "A greeting."}}]}).reasoning
    'A greeting.'
    """
    return _parse_response(payload)


def _parse_response(payload: Mapping[str, Any]) -> Completion:
    if not isinstance(payload, Mapping):
        raise ProtocolError(f"a reply is a JSON object, got a {type(payload).__name__}")
    reply = _Reply()
    reply.add_whole(payload)
    return reply.completion()


def _decode_json(text: str, where: str) -> dict[str, Any]:
    """Return a JSON object; raise ProtocolError for anything else, one nested beyond reason included."""
    text = text.strip()
    try:
        payload, end = _JSON.raw_decode(text)  # half the cost of json.loads(), which minds white space around it
        if end == len(text) and isinstance(payload, dict):
            return payload
        raise ValueError("more than one JSON value" if end != len(text) else "not a JSON object")
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not the JSON vLLM sends: {where}: {_quoted(text)}; {BASE_URL_ADVICE}") from error


def _quoted(text: str) -> str:
    text = " ".join(text[:READ_BYTES].split())
    return repr(text[:MAX_QUOTED_CHARS] + "…" if len(text) > MAX_QUOTED_CHARS else text)


def _new_text() -> io.StringIO:
    text = io.StringIO()
    text.readline()  # from here on it holds characters; Python 3.11 would collect 100,000 pieces first
    return text


class _CallSoFar:
    """A tool call while it grows."""

    def __init__(self, call_id: str, name: str) -> None:
        self.id, self.name, self.arguments = call_id, name, _new_text()


class _ChoiceSoFar:
    """A choice while it grows. Text costs its characters (StringIO), not an object for each token."""

    def __init__(self, splitter: "_ThinkSplitter | _HarmonySplitter | None" = None) -> None:
        self.splitter = splitter
        self.text, self.reasoning = _new_text(), _new_text()
        self.calls: list[_CallSoFar] = []
        self.current: dict[int, _CallSoFar] = {}  # by the index the server gives
        self.logprobs: list[TokenLogprob] = []
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.prompt: dict[str, Any] = {}

    def choice(self, index: int, prompt: Mapping[str, Any]) -> Choice:
        """Return the choice so far; `prompt` holds what was told of the prompt for all choices."""
        text, reasoning, _ = copy.copy(self.splitter).feed("", ended=True) if self.splitter else ("", "", [])
        return Choice(
            index,
            self.text.getvalue() + text,
            self.reasoning.getvalue() + reasoning,
            tuple(ToolCall(call.id, call.name, call.arguments.getvalue()) for call in self.calls),
            tuple(self.logprobs),
            tuple(self.token_ids),
            self.finish_reason,
            self.stop_reason,
            **(self.prompt or prompt),
        )


class _Reply:
    """A reply while it grows: a plain call adds one payload, a stream one for each event."""

    def __init__(self, body: _Body | None = None, request_id: str = "") -> None:
        self.body, self.request_id = body or {}, request_id
        self.where = "in the reply"  # later the method and URL that `body` went to
        asked = self.body.get("top_logprobs") if "messages" in self.body else self.body.get("logprobs")
        is_counted = isinstance(asked, int) and asked >= 0 and not self.body.get("logprob_token_ids")
        self.top = asked if is_counted else None  # of each token, the alternatives wanted
        asked = self.body.get("prompt_logprobs", self.top)
        self.prompt_top = asked if isinstance(asked, int) and asked >= 0 else None
        self.choices: dict[int, _ChoiceSoFar] = {}
        self.fields: dict[str, Any] = {}
        self.usage: Usage | None = None
        self.prompt: dict[str, Any] = {}
        self.has_output = self.has_finished = self.is_stream = False
        self.new_splitter: Callable[[], _ThinkSplitter | _HarmonySplitter] | None = None
        self.degradation: dict[str, str] | None = None  # what was asked for, what was done, and why

    def add(self, payload: Mapping[str, Any]) -> list[Delta]:
        """Take in one payload and return what it added; raise the error it tells, or ProtocolError."""
        if payload.get("error") or payload.get("object") == "error":
            raise _error_from_payload(payload, self.body, self.where)
        deltas = []
        try:
            if payload.get("usage"):
                self.usage = _parse_usage(payload["usage"])
            if payload.get("prompt_logprobs") or payload.get("prompt_token_ids"):  # where chat tells them
                self.prompt = _parse_prompt(payload, self.prompt_top)
            for choice in payload.get("choices") or ():
                delta = self._add_choice(choice)
                if delta is not None:
                    deltas.append(delta)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            told = f"not the shape vLLM sends ({type(error).__name__}: {error}): {self.where}"
            raise ProtocolError(told) from error
        self.fields.update(payload)
        return deltas

    def add_whole(self, payload: Mapping[str, Any]) -> list[Delta]:
        """Take in the one payload of a plain call, which has choices where it tells no error."""
        deltas = self.add(payload)
        if not self.choices:
            raise ProtocolError(f"a reply without choices: {self.where}; {BASE_URL_ADVICE}")
        return deltas

    def _add_choice(self, choice: Mapping[str, Any]) -> Delta | None:
        index = choice.get("index") or 0
        if (so_far := self.choices.get(index)) is None:
            _require(isinstance(index, int))
            so_far = self.choices[index] = _ChoiceSoFar(self.new_splitter and self.new_splitter())
        part = choice.get("delta") or choice.get("message") or choice
        text = part.get("content") or part.get("text") or ""
        # Up to 0.11.0 reasoning_content, from 0.16 reasoning, between them both with the same value.
        reasoning = part.get("reasoning") or part.get("reasoning_content") or ""
        pieces, finish_reason = part.get("tool_calls"), choice.get("finish_reason")
        if so_far.splitter is not None:
            text, reasoning, pieces = so_far.splitter.feed(text, ended=finish_reason is not None)
        so_far.text.write(text)
        if reasoning:
            so_far.reasoning.write(reasoning)
        calls = self._add_calls(so_far, pieces) if pieces else ()
        tokens, ids = self._add_tokens(so_far, choice) if _has_tokens(choice) else ((), ())
        if text or reasoning or calls or tokens or ids:
            self.has_output = True
        elif finish_reason is None:
            return None
        stop_reason = choice.get("stop_reason")
        if finish_reason is not None:
            self.has_finished = True
            so_far.finish_reason, so_far.stop_reason = finish_reason, stop_reason
        return Delta(index, text, reasoning, calls, tokens, ids, finish_reason, stop_reason)

    def _add_tokens(self, so_far: _ChoiceSoFar, choice: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the log probabilities and the token ids of a choice."""
        ids = tuple(choice.get("token_ids") or ())
        logprobs = choice.get("logprobs")
        known = (*(choice.get("prompt_token_ids") or ()), *ids)
        tokens = tuple(_parse_logprobs(logprobs, known, len(ids), self.top)) if logprobs else ()
        so_far.logprobs += tokens
        so_far.token_ids += ids
        if choice.get("prompt_logprobs") or choice.get("prompt_token_ids"):
            so_far.prompt = _parse_prompt(choice, self.prompt_top)
        return tokens, ids

    def _add_calls(self, so_far: _ChoiceSoFar, pieces: Sequence[Mapping[str, Any]]) -> tuple[ToolCall, ...]:
        """Return the pieces, each with the id and name of its call: the one last begun at its index.

        Another id begins another call, since some parsers put every call at index 0.
        """
        added = []
        for position, piece in enumerate(pieces):
            index = piece.get("index", position)
            function = piece.get("function") or {}
            call_id, name, arguments = piece.get("id") or "", function.get("name") or "", function.get("arguments")
            call = so_far.current.get(index)
            if call is None or (call_id and call.id and call_id != call.id):
                call = so_far.current[index] = _CallSoFar(call_id, name)
                so_far.calls.append(call)
            call.id, call.name = call.id or call_id, call.name or name
            text = json.dumps(arguments) if isinstance(arguments, dict) else arguments or ""  # a gateway's habit
            call.arguments.write(text)
            added.append(ToolCall(call.id, call.name, text))
        return tuple(added)

    def completion(self, first_token_s: float | None = None, total_s: float | None = None) -> Completion:
        """Return everything received so far."""
        told, so_far = self.fields.copy(), self.choices.copy()  # another thread may be adding to them
        if self.is_stream:
            told.pop("choices", None)
        choices = tuple(so_far[index].choice(index, self.prompt) for index in sorted(so_far))
        model, reply_id = told.get("model") or "", told.get("id") or ""
        return Completion(reply_id, self.request_id, model, choices, self.usage, first_token_s, total_s, told)


def _has_tokens(choice: Mapping[str, Any]) -> bool:
    told = choice.get("logprobs") or choice.get("token_ids")
    return bool(told or choice.get("prompt_token_ids") or choice.get("prompt_logprobs"))


def _parse_usage(usage: Mapping[str, Any]) -> Usage:
    prompt, output = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
    return Usage(prompt, output, usage.get("total_tokens") or prompt + output, cached, reasoning)


def _parse_logprobs(
    logprobs: Mapping[str, Any], ids: Sequence[int], generated: int, top: int | None
) -> Iterator[TokenLogprob]:
    """Yield the tokens of either endpoint's `logprobs`.

    `ids`: token ids of the prompt, which `echo` puts first, and of the `generated` tokens, where asked for. `top`: how
    many alternatives were asked for, None for all; completions add the sampled token as one more.
    """
    entries = logprobs["content"] or () if "content" in logprobs else list(_to_chat_entries(logprobs))
    is_known = len(entries) in (len(ids), generated) and len(ids) > 0
    known: Sequence[int | None] = ids[len(ids) - len(entries) :] if is_known else [None] * len(entries)
    for entry, token_id in zip(entries, known, strict=True):
        others = [_parse_entry(other) for other in entry.get("top_logprobs") or ()]
        yield _parse_entry(entry, token_id, _likeliest(others, top))


def _likeliest(tokens: list[TokenLogprob], top: int | None) -> tuple[TokenLogprob, ...]:
    ranked = sorted(tokens, key=lambda token: -math.inf if token.logprob is None else token.logprob, reverse=True)
    return tuple(ranked[:top])


def _to_chat_entries(logprobs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the four parallel lists of completions as chat has them: a token with its alternatives."""
    tokens = logprobs["tokens"]
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    for token, value, top in zip(tokens, logprobs["token_logprobs"], tops, strict=True):
        others = [{"token": other, "logprob": logprob} for other, logprob in (top or {}).items()]
        yield {"token": token, "logprob": value, "top_logprobs": others}


def _parse_entry(entry: Mapping[str, Any], token_id: int | None = None, top: Any = ()) -> TokenLogprob:
    token, raw = entry["token"], entry.get("bytes")
    if token_id is None and re.fullmatch(r"token_id:\d+", token):  # return_tokens_as_token_ids
        token_id = int(token.removeprefix("token_id:"))
    logprob = _parse_logprob(entry.get("logprob"))
    return TokenLogprob(token, logprob, None if raw is None else bytes(raw), token_id, entry.get("rank"), top)


def _parse_logprob(value: float | None) -> float | None:
    if value is None or math.isnan(value):
        return None
    return -math.inf if value <= SENTINEL_LOGPROB else value


def _parse_prompt(told: Mapping[str, Any], top: int | None) -> dict[str, Any]:
    """Return a Choice's fields about the prompt; in each entry the prompt's own token is first or named by its id."""
    ids, tokens = tuple(told.get("prompt_token_ids") or ()), []
    for position, entry in enumerate(told.get("prompt_logprobs") or ()):
        known = [_parse_prompt_entry(int(key), value) for key, value in (entry or {}).items()]
        own = next((token for token in known if ids and token.token_id == ids[position]), known[0] if known else None)
        tokens.append(None if own is None else own._replace(top=_likeliest(known, top)))
    return {"prompt_logprobs": tuple(tokens), "prompt_token_ids": ids}


def _parse_prompt_entry(token_id: int, told: Mapping[str, Any]) -> TokenLogprob:
    logprob = _parse_logprob(told["logprob"])
    return TokenLogprob(told.get("decoded_token") or "", logprob, None, token_id, told.get("rank"))


# ---- Replies: reasoning out of plain text (pure) ----------------------------
#
# What a server's reasoning parser does for chat, for text of /v1/completions. A splitter is fed the text as it comes,
# and holds back what may still turn out to be markup.


class _ThinkSplitter:
    """Splits off `<think>…</think>` at the start of a text. `opened`: the prompt has opened the tag already.

    >>> splitter = _ThinkSplitter()
    >>> [splitter.feed(piece) for piece in ("<thi", "nk>Hm", ".</think>4")]
    [('', '', []), ('', 'Hm', []), ('4', '.', [])]
    """

    def __init__(self, opened: bool = False) -> None:
        self._state, self._held = "opened" if opened else "start", ""

    def feed(self, piece: str, ended: bool = False) -> tuple[str, str, list[dict[str, Any]]]:
        """Return the text and the reasoning that are certain by now; no tool calls."""
        if self._state == "text":
            return piece, "", []
        held, self._held = self._held + piece, ""
        if self._state in ("start", "opened"):
            tag = held.lstrip()
            is_near = len(held) - len(tag) <= 2  # line breaks, as some models begin
            if is_near and not ended and tag != "<think>" and "<think>".startswith(tag):
                self._held = held
                return "", "", []
            has_tag = is_near and tag.startswith("<think>")
            if self._state == "start" and not has_tag:  # a tag further on is only a mention
                self._state = "text"
                return held, "", []
            self._state, held = "reasoning", tag.removeprefix("<think>") if has_tag else held
        reasoning, tag, text = held.partition("</think>")
        if tag:
            self._state = "text"
        elif not ended:
            reasoning, self._held = _hold_back(reasoning, ("</think>",))
        return text, reasoning, []


class _HarmonySplitter:
    """Splits gpt-oss's channels: analysis is reasoning, final and commentary are text, `to=functions.X` is a call.

    Needs `skip_special_tokens: false`. The prompt ends in `<|start|>assistant`, so the text begins inside a header.
    """

    _ENDS: Final = ("<|end|>", "<|return|>", "<|call|>", "<|endoftext|>", "<|start|>")

    def __init__(self) -> None:
        self._held, self._channel, self._calls = "", "", 0  # no channel: inside a header
        self._is_new = True

    def feed(self, piece: str, ended: bool = False) -> tuple[str, str, list[dict[str, Any]]]:
        """Return the text, the reasoning and the pieces of tool calls that are certain by now."""
        self._held += piece
        text, reasoning, calls = "", "", []
        while self._held:
            if not self._channel:
                header, mark, rest = self._held.partition("<|message|>")
                if not mark:
                    if ended and self._is_new and "<|" not in header:  # no harmony at all: the prompt had the header
                        text, self._held = header, ""
                    break
                self._is_new = False
                self._held = rest
                calls += self._read_header(header)
                continue
            body, self._held, is_over = self._take_body(ended)
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

    def _read_header(self, header: str) -> list[dict[str, Any]]:
        """Enter the channel a header names; return the beginning of the call if it is one."""
        channel, recipient = re.search(r"<\|channel\|>(\w+)", header), re.search(r"to=([^\s<]+)", header)
        self._channel = "call" if recipient else channel.group(1) if channel else "final"
        if recipient is None:
            return []
        self._calls += 1
        name = recipient.group(1).removeprefix("functions.")
        return [{"index": self._calls - 1, "id": f"call_{self._calls}", "function": {"name": name}}]

    def _take_body(self, ended: bool) -> tuple[str, str, bool]:
        """Return the body up to its end, what follows it, and whether the end was there."""
        if "<" not in self._held:
            return self._held, "", False
        found = re.search(r"<\|(?:end|return|call|endoftext|start)\|>", self._held)
        if found:
            return self._held[: found.start()], self._held[found.end() :], True
        return (self._held, "", False) if ended else (*_hold_back(self._held, self._ENDS), False)


def _hold_back(text: str, tags: Sequence[str]) -> tuple[str, str]:
    """Return the text without, and apart, an end of it that may be the beginning of a tag."""
    start = text.rfind("<")
    if start >= 0 and any(tag.startswith(text[start:]) for tag in tags):
        return text[:start], text[start:]
    return text, ""


# ---- Conversations as prompts (pure) ----------------------------------------


def _text_of(message: Mapping[str, Any]) -> str:
    """Return a message's text; text parts are joined as vLLM joins them."""
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "\n".join(part.get("text", "") for part in parts if part.get("type") == "text")


def _chat_only(body: _Body) -> str | None:
    """Return why the chat endpoint alone is faithful to this conversation, None if it is not alone."""
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


def _harmony_only(body: _Body) -> str | None:
    """Return why gpt-oss needs the chat endpoint here: vLLM renders its chats by harmony, /tokenize by a template."""
    roles = {message.get("role") for message in body["messages"]}
    if not roles <= {"user", "assistant"}:
        return "gpt-oss with a system prompt"
    if any(message.get("reasoning") for message in body["messages"]):
        return "gpt-oss with past reasoning"
    is_plain = all(isinstance(message.get("content"), str) for message in body["messages"])
    if not is_plain or any("<|" in _text_of(message) for message in body["messages"]):
        return "gpt-oss with more than plain text"  # the template would take such text for control tokens
    return None


def _to_render_options(body: _Body) -> dict[str, Any]:
    """Return what /tokenize needs to render as the chat endpoint would."""
    names = ("model", "add_generation_prompt", "continue_final_message", "chat_template")
    options = {name: body[name] for name in names if name in body}
    documents = {"documents": body["documents"]} if "documents" in body else {}
    kwargs = {**documents, **(body.get("chat_template_kwargs") or {})}
    effort = body.get("reasoning_effort")
    if effort is not None:  # as vLLM does from 0.22 on
        kwargs = {"reasoning_effort": effort, "enable_thinking": effort != "none", **kwargs}
    return {**options, "chat_template_kwargs": kwargs} if kwargs else options


def _to_completion_body(body: _Body, prompt: Any, room: int | None = None) -> dict[str, Any]:
    """Return a chat body as one for completions; `room`: the tokens left for the answer, which is then its default."""
    rest = {name: value for name, value in body.items() if name not in CHAT_ONLY_PARAMETERS}
    if "logprobs" in body:
        rest["logprobs"] = body.get("top_logprobs", 1)
    asked = _asked_tokens(body)
    if room is not None and asked is not None and asked > room:
        logger.warning("max_tokens=%d does not fit: sent with the %d tokens left", asked, room)
        asked = room
    fitting = DEFAULT_MAX_TOKENS if room is None else room
    return {**rest, "prompt": prompt, "max_tokens": fitting if asked is None else asked}


# ---- Replies: errors (pure) -------------------------------------------------

# These match every text of vLLM 0.10-0.32 about a prompt or a max_tokens that does not fit, and no other.
_OUTPUT_TOO_LARGE: Final = (
    r"max_(?:completion_)?tokens=\d+ ?cannot be greater|'max_tokens' \(\d+\) cannot be greater|tokens' is too large: \d"
)
_OVERFLOW: Final = (
    r"maximum context length|maximum model length|context length is only \d|max_tokens must be at least 1, got -?\d"
)
_LIMIT: Final = (
    r"(?:context length(?: is(?: only)?)? \(?|maximum model length of |max_model_len=(?:max_total_tokens=)?)(-?\d+)"
)
_INPUT: Final = (
    r"Input length \((\d+)\)|prompt \(length (\d+)\)|(?:request has|prompt contains|You passed)(?: at least)? (\d+)"
    r" input tokens|requested \d+ tokens \((\d+) in the messages|requested (\d+) tokens in the messages"
)
_ROOM: Final = r"max_tokens must be at least 1, got (-?\d+)"
_NAN: Final = "Out of range float values are not JSON compliant"
_ADVICE: Final = (
    ("tool-call-parser", "start vLLM with --enable-auto-tool-choice --tool-call-parser NAME, or send no tools"),
    ("--trust-request-chat-template", "start vLLM with that flag, or send no chat_template"),
    (
        "must provide a chat template",
        "this model has no chat template: use complete(), or start vLLM with --chat-template FILE",
    ),
    ("EngineCore", "the engine has died: look at the server's log and start it again"),
    ("greater than max allowed", "ask for fewer, or start vLLM with --max-logprobs N"),
    (_NAN, "the model computed NaN: try without logprobs, or another --dtype"),
)
_ADVICE_BY_STATUS: Final = {
    401: "set api_key or VLLM_API_KEY to the key the server was started with",
    403: "the key may not do this, or a gateway hides the path",
    404: BASE_URL_ADVICE,
    405: BASE_URL_ADVICE,
    413: "a proxy limits a request's size",
    504: "a proxy gave up waiting; vLLM may still be at work",
}


class _Fit(NamedTuple):
    """What an error says about lengths in tokens."""

    limit: int | None
    input_tokens: int | None
    is_floor: bool  # the input is at least that
    is_output: bool  # max_tokens alone is larger than the limit

    def is_overflow(self) -> bool:
        """Return whether no max_tokens, however small, would help."""
        if self.limit is None or self.input_tokens is None:
            return not self.is_output
        return self.input_tokens >= self.limit


def _read_fit(message: str, body: _Body, model_limit: int | None = None) -> _Fit | None:
    """Return what the error to the request `body` says about lengths, None if it is about something else.

    `model_limit`: the model's context length where known, for texts that leave it out.

    >>> _read_fit("This model's maximum context length is -1952 tokens. However, your request has 5 input tokens.",
    ...           {"prompt": "x", "max_tokens": 4000})
    _Fit(limit=2048, input_tokens=5, is_floor=False, is_output=False)
    """
    is_output = bool(re.search(_OUTPUT_TOO_LARGE, message))
    if not is_output and not re.search(_OVERFLOW, message):
        return None
    asked = _asked_tokens(body)
    said, found, room = (re.search(pattern, message) for pattern in (_LIMIT, _INPUT, _ROOM))
    limit = int(said.group(1)) if said else model_limit
    tokens = int(next(filter(None, found.groups()))) if found else None
    if room:  # an overflow in disguise, unless a max_tokens of 0 or less is what was sent
        if asked is not None and asked <= 0:
            return None
        tokens = None if limit is None else limit - int(room.group(1))
    elif said and limit is not None and "prompt" in body and "your request has" in message and not is_output:
        limit += SERVER_MAX_TOKENS if asked is None else asked  # completions of 0.10.1-0.15 print it less max_tokens
    is_floor = bool(re.search(r"at least \d+ input tokens", message))
    return _Fit(limit, tokens, is_floor, is_output)


def _max_tokens_name(body: _Body) -> str:
    return "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"


def _asked_tokens(body: _Body) -> int | None:
    """Return the number of tokens the body asks for; vLLM takes it as text too."""
    asked = str(body.get(_max_tokens_name(body)))
    return int(asked) if re.fullmatch(r"-?\d+", asked) else None


def _error_message(payload: object) -> tuple[str, int | None]:
    """Return the text and the code of an error in any of the shapes servers and gateways send."""
    error = payload
    if isinstance(payload, Mapping):
        error = payload.get("error") or payload.get("detail") or payload
    if isinstance(error, Mapping):
        error = error["error"] if isinstance(error.get("error"), Mapping) else error
        code = error.get("code")
        words = error["message"] if "message" in error else json.dumps(error)
        return str(words or ""), code if isinstance(code, int) else None
    return error if isinstance(error, str) else "" if error is None else json.dumps(error), None


def _error_from_payload(payload: Mapping[str, Any], body: _Body, where: str) -> StatusError:
    """Return the error told inside a reply with status 200 to the request `body`."""
    message, code = _error_message(payload)
    # Up to 0.14 the code inside a stream is 400 for everything.
    return _status_error(500 if "EngineCore" in message else code or 500, message, {}, body, where)


def _error_from_reply(status: int, headers: Mapping[str, str], raw: bytes, body: _Body, where: str) -> StatusError:
    """Return the error a reply to `body` tells, be it JSON, HTML, text or empty."""
    message = raw.decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):
        message, _code = _error_message(json.loads(message))
    if 300 <= status < 400:
        return _redirect_error(status, headers.get("Location", ""), where)
    return _status_error(status, message, headers, body, where)


def _redirect_error(status: int, location: str, where: str) -> StatusError:
    url = where.split(" ", 1)[1]
    path = re.search(r"(/v1/[a-z/]+|/\w+)$", url)
    target = re.split(r"[?#]", location)[0].rstrip("/")
    text = f"{where} is redirected to {_quoted(location)}, which is not followed, lest the prompt go astray"
    if path and target.endswith(path.group()):
        base_url = target.removesuffix(path.group())
        origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        text += f": set base_url to {_quoted(base_url if '//' in base_url else origin + base_url)}"
    return StatusError(text, status_code=status)


def _status_error(status: int, message: str, headers: Mapping[str, str], body: _Body, where: str) -> StatusError:
    fit = _read_fit(message, body) if status < 500 else None
    if fit and fit.is_overflow():
        return _overflow_error(fit, message, status, where)
    is_nan = _NAN in message  # a 400 that is no fault of the request
    unknown = ProviderUnavailableError if status >= 500 or is_nan else StatusError
    kind = unknown if is_nan else _STATUS_ERRORS.get(status, unknown)
    advice = next((advice for text, advice in _ADVICE if text in message), _ADVICE_BY_STATUS.get(status, ""))
    words, *inputs = message.split("'input':")  # after it a validation error quotes the request
    told = _quoted(words + "…" * bool(inputs)) if message.strip() else "(no message)"
    text = f"{status} {told}: {where}{'; ' + advice if advice else ''}"
    retry_after = _parse_retry_after(headers.get("Retry-After"))
    retryable = False if is_nan or status == 501 else None
    error = kind(text, status_code=status, retryable=retryable, retry_after=retry_after)
    error.server_message = message
    return error


def _overflow_error(fit: _Fit, message: str, status: int | None, where: str) -> ContextLengthError:
    count = f"{'at least ' * fit.is_floor}{fit.input_tokens} tokens"
    tokens = "its tokens are too many" if fit.input_tokens is None else count
    text = f"the prompt does not fit: {tokens} for a context of {fit.limit or 'unknown size'}: {where}; shorten it"
    error = ContextLengthError(text, status_code=status)
    error.limit, error.input_tokens, error.server_message = fit.limit, fit.input_tokens, message
    return error


def _parse_retry_after(value: str | None) -> float | None:
    """Return the seconds a Retry-After header asks to wait, given as seconds or as a date (RFC 9110)."""
    if not value:
        return None
    with suppress(ValueError):
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    with suppress(ValueError):
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    return None


# ---- Client -----------------------------------------------------------------

_Answer = TypeVar("_Answer")


class VLLMClient:
    """A blocking client of one vLLM server, for any number of threads; a context manager.

    `VLLMClient("http://localhost:8000", **settings)`, `VLLMClient(config)`, or `VLLMClient()` for the server that
    VLLM_BASE_URL names. A call takes vLLM's request parameters under vLLM's names and three of its own, in seconds:
    `timeout`, `stream_idle_timeout`, `deadline`; it raises the errors of the tree above. A client can be pickled, and
    connects where it arrives.

    >>> with VLLMClient("http://localhost:8000") as client:
    ...     client.chat("What is 2+2?", temperature=0).text  # doctest: +SKIP
    '2 + 2 = 4'
    """

    def __init__(self, base_url: str | VLLMConfig | None = None, **settings: Any) -> None:
        if isinstance(base_url, VLLMConfig):
            if base_url.stream_idle_timeout == base_url.timeout and "timeout" in settings:
                settings = {"stream_idle_timeout": None, **settings}  # which follows it
            self.config = replace(base_url, **settings)
        else:
            self.config = VLLMConfig(base_url, **settings)  # type: ignore[arg-type]  # None: the environment's
        self._transport = _Transport(self.config)
        self._served_model: str | None = None  # "" when the server will not say
        self._cards: list[ModelCard] = []  # as last told
        self._hidden: str | None = None  # why conversations cannot be rendered here

    def complete(self, prompt: Any, **params: Any) -> Completion:
        """Return the answer of `/v1/completions` to the prompt as typed.

        `prompt`: a string, a list of strings, a list of token ids, or a list of such lists.
        """
        return self._whole(build_completion_request, prompt, params)

    def chat(self, messages: Any, **params: Any) -> Completion:
        """Return the answer of `/v1/chat/completions`. `messages`: a list of dicts, or one string from the user."""
        return self._whole(build_chat_request, messages, params)

    def stream_complete(self, prompt: Any, **params: Any) -> "Stream":
        """Return a Stream of `/v1/completions`; arguments as for complete()."""
        return self._stream(build_completion_request, prompt, params)

    def stream_chat(self, messages: Any, **params: Any) -> "Stream":
        """Return a Stream of `/v1/chat/completions`; arguments as for chat()."""
        return self._stream(build_chat_request, messages, params)

    def models(self) -> list[ModelCard]:
        """Return the models of `/v1/models`; the first is the one served to those who name none."""
        return self._list(_Call(_limits(self.config, {})))

    def version(self) -> str:
        """Return the server's version, like "0.32.0"; not retried."""
        with self._call() as call:
            return str(self._fetch(call, "GET", "/version").get("version") or "")

    def tokenize(self, text_or_messages: Any, **options: Any) -> list[int]:
        """Return the token ids of a text, or of messages as the model's own chat template renders them.

        `options`: fields of vLLM's `/tokenize`, like `add_special_tokens` or `chat_template_kwargs`.
        """
        sent = {name: value for name, value in options.items() if name not in CALL_LIMITS}
        with self._call(**options) as call:
            return list(self._tokenize(call, text_or_messages, sent)["tokens"])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        with self._call() as call:
            return str(self._ask_tokenizer(call, "/detokenize", {"tokens": list(ids)}).get("prompt") or "")

    def health(self, wait: float = 0.0) -> None:
        """Return when the server is well, raise otherwise.

        `wait`: for up to so many seconds, ask again a server that cannot be reached or is not ready: one that starts.
        """
        with self._call(deadline=wait if wait > 0 else None) as call:
            while True:
                try:
                    response = self._request(call, "GET", "/health")
                    collections.deque(self._transport.read(call, response), maxlen=0)  # to its end, for the pool
                    return
                except (NetworkError, ProviderUnavailableError):
                    if wait <= 0 or time.monotonic() + HEALTH_POLL_S >= call.ends:
                        raise
                call.pause(HEALTH_POLL_S)

    def close(self) -> None:
        """Stop the calls in flight, which raise AbortError, and close the connections. A later call opens new ones."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.config,)

    # The way of a call: _stream -> _plan (prompt) -> _exchange -> _begin (model, max_tokens) -> _request -> _attempt.

    def _call(self, **limits: Any) -> AbstractContextManager[_Call]:
        return self._transport.call(_Call(_limits(self.config, limits)))

    def _whole(self, build: Callable[..., dict[str, Any]], source: Any, params: Mapping[str, Any]) -> Completion:
        with closing(self._stream(build, source, params, wants_stream=False)) as stream:
            collections.deque(stream, maxlen=0)
        return stream.completion

    def _stream(
        self, build: Callable[..., dict[str, Any]], source: Any, params: Mapping[str, Any],
        wants_stream: bool | None = True, prompt_format: str | None = None,
    ) -> "Stream":  # fmt: skip
        """Return the call as a Stream, whether or not its reply is one on the wire (None: if vLLM can stream it).

        `prompt_format`: how a conversation becomes a prompt, as in VLLMConfig; None leaves it to the chat endpoint.
        """
        body = build(self.config, source, **params)
        call = _Call(_limits(self.config, params), body.get("request_id"))
        reply = _Reply(body, call.request_id)
        path = CHAT_PATH if build is build_chat_request else COMPLETIONS_PATH
        if wants_stream is None:
            wants_stream = not (body.get("prompt_logprobs") or body.get("use_beam_search"))

        def deltas() -> Iterator[Delta]:
            with self._transport.call(call):
                plan = (path, body) if prompt_format is None else self._plan(call, body, prompt_format, reply)
                yield from self._exchange(call, plan[0], _to_stream(plan[1]) if wants_stream else plan[1], reply)

        return Stream(call, reply, deltas())

    def _exchange(self, call: _Call, path: str, body: dict[str, Any], reply: _Reply) -> Iterator[Delta]:
        """Yield what the reply to `body` adds to `reply`, event by event."""
        reply.body, reply.where = body, f"POST {self.config.base_url}{path}"
        response = self._begin(call, path, body)
        stream_type = "text/event-stream" if body.get("stream") else "application/json"
        if "event-stream" not in response.headers.get("Content-Type", stream_type):  # nor does every gateway stream
            yield from reply.add_whole(self._read_json(call, response))
            return
        reply.is_stream = True
        decoder = _SSEDecoder()
        with closing(self._transport.read(call, response)) as pieces:
            for raw in pieces:
                for data in decoder.feed(raw):
                    call.check()
                    if data == "[DONE]":
                        return self._finish(call, reply, pieces)
                    deltas = reply.add(_decode_json(data, reply.where))
                    if reply.has_output and call.first_token_s is None:
                        call.first_token_s = call.elapsed_s()
                    yield from deltas
                decoder.check()
                if reply.has_output and (b"\n" in raw or b"\r" in raw):
                    call.is_idle_due = True  # a line is a sign of life, half a line is not
        raise StreamError(f"the stream ended without [DONE]: {reply.where}; was the server or a proxy stopped?")

    # Conversations on /v1/completions, rendered by the model's own chat template.

    def _plan(self, call: _Call, body: dict[str, Any], prompt_format: str, reply: _Reply) -> tuple[str, dict[str, Any]]:
        """Return the path and the body for a conversation; `reply.degradation` says why it is chat all the same."""
        messages = body["messages"]
        if prompt_format == "raw":
            return COMPLETIONS_PATH, _to_completion_body(body, "\n".join(map(_text_of, messages)))
        reason = self._hidden or _chat_only(body)
        try:
            rendered = None if reason else self._render(call, body, reply)
            if rendered is not None:
                return COMPLETIONS_PATH, rendered
            reason = reason or _harmony_only(body)
        except (StatusError, ProtocolError) as error:
            reason = self._why_not_rendered(error)
            if prompt_format == "chat_template" or reason is None:
                raise
            if reason == NO_TEMPLATE and len(messages) == 1 and messages[0].get("role") == "user":
                return COMPLETIONS_PATH, _to_completion_body(body, _text_of(messages[0]))
        if prompt_format == "chat_template":
            raise ConfigurationError(f"prompt_format chat_template cannot render this: {reason}")
        reply.degradation = {"requested": "completions", "actual": "chat", "reason": str(reason)}
        return CHAT_PATH, body

    def _render(self, call: _Call, body: dict[str, Any], reply: _Reply) -> dict[str, Any] | None:
        """Return the body with the conversation as token ids; None if that is not what the chat endpoint renders."""
        told = self._tokenize(call, body["messages"], {**_to_render_options(body), "return_token_strs": True})
        ids, limit = told["tokens"], told.get("max_model_len")
        is_harmony = HARMONY_START in ids
        if is_harmony and _harmony_only(body):
            return None
        room = None if limit is None or "truncate_prompt_tokens" in body else limit - len(ids)
        if room is not None and room <= 0:
            fit = _Fit(limit, len(ids), is_floor=False, is_output=False)
            raise _overflow_error(fit, "", None, f"POST {self.config.base_url}{COMPLETIONS_PATH}")
        rendered = _to_completion_body(body, ids, room)
        tail = "".join(told["token_strs"][-8:]) if told.get("token_strs") else self._tail(call, ids)
        opened = tail.rfind("<think>") > tail.rfind("</think>")
        if is_harmony:
            rendered["skip_special_tokens"] = False
        if not body.get("echo"):
            reply.new_splitter = _HarmonySplitter if is_harmony else partial(_ThinkSplitter, opened)
        return rendered

    def _tail(self, call: _Call, ids: Sequence[int]) -> str:
        """Return the text of the last tokens, from a server that does not send it along."""
        told = self._ask(self._ask_tokenizer, call, "/detokenize", {"tokens": list(ids[-8:])}) or {}
        return str(told.get("prompt") or "")

    def _why_not_rendered(self, error: VLLMError) -> str | None:
        """Return the reason not to render that is in an error of /tokenize; None if it is another matter."""
        words = getattr(error, "server_message", "")
        if "must provide a chat template" in words:
            return NO_TEMPLATE
        if isinstance(error, ProtocolError) or (error.status_code in (403, 404, 405) and "does not exist" not in words):
            self._hidden = "/tokenize is hidden by a gateway"
            logger.warning("%s: conversations go to the chat endpoint: %s", self._hidden, error)
            return self._hidden
        return None

    def _finish(self, call: _Call, reply: _Reply, pieces: Iterator[bytes]) -> None:
        """Check that the stream said something, and wait a moment for its last bytes, to keep the connection."""
        if not (reply.has_output or reply.has_finished):  # vLLM 0.13-0.31 can lose an error before the first token
            raise StreamError(f"the stream ended without any output: {reply.where}; look at the server's log")
        call.is_idle_due, call.expires = False, time.monotonic() + DRAIN_S
        with suppress(VLLMError):
            for _ in pieces:
                pass

    def _begin(self, call: _Call, path: str, body: dict[str, Any]) -> requests.Response:
        """Return the open reply to a generation. Names the model, and lowers a max_tokens that does not fit."""
        body, lowerings = self._with_model(call, body), 0
        while True:
            try:
                return self._request(call, "POST", path, body)
            except NotFoundError as error:
                body = self._renamed(call, body, error)
            except StatusError as error:
                fit = self._find_fit(call, body, error)
                if fit is None or (lowerings == MAX_LOWERINGS and not fit.is_overflow()):
                    raise
                body = self._lowered(path, body, fit, error, logging.DEBUG if lowerings else logging.WARNING)
                lowerings += 1

    def _find_fit(self, call: _Call, body: _Body, error: StatusError) -> _Fit | None:
        """Return what the error says about lengths; what it leaves out, the server is asked for."""
        fit = _read_fit(error.server_message, body)
        if fit is None or not isinstance(error, InvalidRequestError | ContextLengthError):
            return None
        if fit.limit is None:
            fit = _read_fit(error.server_message, body, self._ask(self._find_limit, call, body)) or fit
        counted = self._ask(self._count_input, call, body) if fit.is_floor else None
        if counted is not None:
            fit = fit._replace(input_tokens=counted, is_floor=False)
        elif fit.is_floor and not fit.is_overflow():
            fit = fit._replace(input_tokens=None, is_output=False)  # nobody can say what fits
        return fit

    def _lowered(self, path: str, body: dict[str, Any], fit: _Fit, error: StatusError, level: int) -> dict[str, Any]:
        """Return the body with a max_tokens that fits; raise ContextLengthError, or the error, if there is none."""
        if fit.is_overflow():
            where = f"POST {self.config.base_url}{path}"
            raise _overflow_error(fit, error.server_message, error.status_code, where) from error
        name, asked = _max_tokens_name(body), _asked_tokens(body)
        # Without the prompt's length the limit itself: 0.32 takes that, and others then tell the length.
        room = (fit.limit or 0) - (fit.input_tokens or 0)
        if asked is None or not 0 < room < asked:
            raise error
        logger.log(level, "%s=%d does not fit a context of %d: sent again with %d", name, asked, fit.limit, room)
        return {**body, name: room}

    def _renamed(self, call: _Call, body: dict[str, Any], error: NotFoundError) -> dict[str, Any]:
        """Return the body with the name the server's model has by now; raise NotFoundError if it was not that."""
        if "does not exist" not in error.server_message:
            raise error
        known = [card.id for card in self._ask(self._models, call) or ()]
        asked, served = body.get("model"), self._served_model
        if known and served and asked == served != known[0]:
            self._served_model = known[0]
            return {**body, "model": known[0]}
        has = f"the server has {', '.join(known)}" if known else "look at /v1/models"
        unknown = NotFoundError(f"model not found: {asked!r}; {has}", status_code=error.status_code)
        unknown.server_message = error.server_message
        raise unknown from error

    def _ask(self, question: Callable[..., _Answer], *args: Any) -> _Answer | None:
        """Return the answer to a question on the side; None if there is none, since the call has its own error."""
        try:
            return question(*args)
        except AbortError:
            raise
        except VLLMError:
            return None

    def _list(self, call: _Call) -> list[ModelCard]:
        with self._transport.call(call):
            return self._models(call)

    def _with_model(self, call: _Call, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("model") or self._model(call)
        return {**body, "model": name} if name else body

    def _model(self, call: _Call) -> str:
        """Return the model to name: the configured one, or the server's first; "" if a gateway hides them."""
        if self.config.default_model is not None:
            return self.config.default_model
        if self._served_model is None:
            try:
                cards = self._models(call)
            except (StatusError, ProtocolError) as error:
                if error.retryable:
                    raise
                cards = []
            self._served_model = cards[0].id if cards else ""
        return self._served_model

    def _models(self, call: _Call) -> list[ModelCard]:
        payload = self._fetch(call, "GET", "/v1/models")
        try:
            cards = payload["data"]
            lengths = {card["id"]: card.get("max_model_len") for card in cards}
            lengths |= {card["id"]: lengths[card["id"]] or lengths.get(card.get("parent")) for card in cards}
            told = ((card["id"], card.get("root"), card.get("parent")) for card in cards)
            self._cards = [ModelCard(name, lengths[name], root, parent) for name, root, parent in told]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            where = f"GET {self.config.base_url}/v1/models"
            raise ProtocolError(f"not the list of models vLLM sends: {where}; {BASE_URL_ADVICE}") from error
        return self._cards

    def _find_limit(self, call: _Call, body: _Body) -> int | None:
        """Return the context length of the body's model, in tokens."""
        cards = self._models(call)
        named = [card for card in cards if card.id == body.get("model")] or cards[:1]
        return named[0].max_model_len if named else None

    def _count_input(self, call: _Call, body: _Body) -> int | None:
        """Return the number of tokens of the body's prompt; None for a list of prompts."""
        source = body.get("messages", body.get("prompt"))
        if not isinstance(source, str) and "messages" not in body:
            return None
        names = ("model", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
        return len(self._tokenize(call, source, {name: body[name] for name in names if name in body})["tokens"])

    def _ask_tokenizer(self, call: _Call, path: str, body: dict[str, Any]) -> dict[str, Any]:
        body = self._with_model(call, body)
        try:
            return self._fetch(call, "POST", path, body)
        except NotFoundError as error:
            return self._fetch(call, "POST", path, self._renamed(call, body, error))

    def _tokenize(self, call: _Call, source: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply of `/tokenize`: tokens, count, max_model_len."""
        body = {"prompt" if isinstance(source, str) else "messages": source, **options}
        told = self._ask_tokenizer(call, "/tokenize", body)
        if not isinstance(told.get("tokens"), list):
            raise ProtocolError(f"not what vLLM's tokenizer sends: POST {self.config.base_url}/tokenize")
        return told

    def _fetch(self, call: _Call, method: str, path: str, body: _Body | None = None) -> dict[str, Any]:
        payload = self._read_json(call, self._request(call, method, path, body))
        if payload.get("error"):
            raise _error_from_payload(payload, body or {}, f"{method} {self.config.base_url}{path}")
        return payload

    def _read_json(self, call: _Call, response: requests.Response) -> dict[str, Any]:
        raw = b"".join(self._transport.read(call, response))
        return _decode_json(raw.decode("utf-8", "replace"), _where(response))

    def _request(self, call: _Call, method: str, path: str, body: _Body | None = None) -> requests.Response:
        """Return the open reply with status 200; try again what is known not to have started."""
        raw = None if body is None else _encode(body)
        most, tries = 0 if path in NOT_RETRIED else self.config.max_retries, 0
        while True:
            try:
                return self._attempt(call, method, path, raw, body or {})
            except VLLMError as error:
                if call.reused and not call.received and isinstance(error, NetworkError):
                    call.fresh_only = True  # the server had closed an idle connection: no failure of its own
                    continue
                tries += 1
                if tries > most or not _is_unstarted(error, call):
                    raise
                left_s = call.ends - time.monotonic()
                pause = _find_pause_s(self.config, error, tries, left_s, call.limits.deadline)
                logger.warning("retry %d of %d in %.1f s: %s", tries, most, pause, error)
            call.pause(pause)

    def _attempt(self, call: _Call, method: str, path: str, raw: bytes | None, body: _Body) -> requests.Response:
        response = self._transport.send(call, method, path, raw)
        if response.status_code == 200:
            return response
        call.expires = min(call.expires, time.monotonic() + ERROR_BODY_S)
        told = bytearray()
        with suppress(StreamError, LLMTimeoutError, ProtocolError):  # as much as there is
            for piece in self._transport.read(call, response, MAX_ERROR_BYTES):
                told += piece
        key = self.config.api_key.encode()
        words = bytes(told.replace(key, b"***") if len(key) >= MIN_SECRET_CHARS else told)  # gateways quote it
        raise _error_from_reply(response.status_code, response.headers, words, body, _where(response))


class Stream(Iterator[Delta]):
    """The deltas of one reply as they arrive; a context manager that stops the server when left early.

    The request goes out at the first next() or on entering `with`. Errors are raised there and at any later next(),
    with what had arrived in `partial`. Dropping an unfinished Stream stops the server too.
    """

    def __init__(self, call: _Call, reply: _Reply, deltas: Iterator[Delta]) -> None:
        self._call, self._reply, self._deltas = call, reply, deltas
        self._ahead: list[Delta] = []
        self._closed = False

    def __next__(self) -> Delta:
        try:
            return self._ahead.pop() if self._ahead else next(self._deltas)
        except VLLMError as error:
            if self._closed and isinstance(error, AbortError):
                raise StopIteration from error
            error.partial = self.completion
            raise
        except ValueError as error:  # "generator already executing": another thread is closing it
            raise StopIteration from error

    def __enter__(self) -> Self:
        """Send the request and wait for its first delta."""
        if (delta := next(self, None)) is not None:
            self._ahead.append(delta)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Stop the server, from any thread; the iterating thread gets AbortError."""
        self._call.stop()

    def close(self) -> None:
        """Stop the server unless it is done, from any thread; iteration just ends."""
        self._closed = True
        self._call.stop()
        with suppress(ValueError):  # another thread is inside it, and sees the stop there
            self._deltas.close()  # type: ignore[attr-defined]  # a generator

    @property
    def completion(self) -> Completion:
        """Return a snapshot of everything received so far; whole once iteration has ended."""
        return self._reply.completion(self._call.first_token_s, self._call.elapsed_s())


# ---- Amplifier adapter ------------------------------------------------------
#
# Vocabulary, events and asyncio.to_thread around the client; amplifier_core is imported where it is used.

_Options = tuple[Mapping[str, Any], tuple[list[Completion], ...]]
_OPTIONS: Final[ContextVar[_Options]] = ContextVar("vllm_provider_options", default=({}, ()))


async def mount(coordinator: Any, config: Mapping[str, Any] | None = None) -> Callable[[], Any]:
    """Mount a VLLMProvider as "vllm" and return its cleanup. Asks no server; raises ConfigurationError.

    Widens the running loop's default executor, unless the host has chosen one of its own.
    """
    provider = VLLMProvider(config=VLLMConfig.from_mapping(config or {}), coordinator=coordinator)
    _widen_executor(provider.config.max_concurrency)
    await coordinator.mount("providers", provider, name="vllm")
    if hasattr(coordinator, "register_contributor"):  # the session's log subscribes to these and no others
        coordinator.register_contributor("observability.events", "vllm", lambda: list(_EVENTS))
    return provider.close


async def on_session_ready(coordinator: Any) -> None:
    """Find out the limits of each mounted server's models. A server that is down is one warning."""
    for provider in (coordinator.get("providers") or {}).values():
        if isinstance(provider, VLLMProvider):
            await provider._discover()


def _widen_executor(calls: int) -> None:
    """Give the running loop threads enough: the stock executor has min(32, cores + 4), and looks up DNS names too."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    loop = asyncio.get_running_loop()
    chosen = getattr(loop, "_default_executor", None)  # asyncio has no public way to ask
    name = getattr(chosen, "_thread_name_prefix", "")
    if chosen is None or name.startswith("asyncio"):
        loop.set_default_executor(ThreadPoolExecutor(SPARE_THREADS + calls, thread_name_prefix="vllm_provider"))
    elif not name.startswith("vllm_provider"):
        threads = getattr(chosen, "_max_workers", "an unknown number of")
        logger.info("the host's own executor is kept: %s calls run at once", threads)


@contextmanager
def request_options(**params: Any) -> Iterator[list[Completion]]:
    """Carry request parameters through a session, and yield the list that collects each call's Completion.

    For the task (and those it starts) inside the `with`, between the configuration and the request's own fields:
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
    """vLLM for Amplifier: `complete(ChatRequest) -> ChatResponse`, with the kernel's events and errors.

    `config`: a mapping with the keys of VLLMConfig, or one. Raises ConfigurationError (a ValueError) without a
    base_url; the environment's is for mount() to read. Makes no connection before it is used.
    """

    name = "vllm"

    def __init__(
        self, base_url: str | None = None, *, api_key: str | None = None, config: Any = None, coordinator: Any = None
    ) -> None:
        if not isinstance(config, VLLMConfig):
            given = {"base_url": base_url, "api_key": api_key}
            config = {**(config or {}), **{name: value for name, value in given.items() if _is_given(value)}}
            if not _is_given(config.get("base_url")):
                raise ConfigurationError("No base_url found: set base_url in the provider's config, or VLLM_BASE_URL")
            config = VLLMConfig.from_mapping(config)
        self.config: VLLMConfig = config
        self.coordinator = coordinator
        self.priority, self.default_model = config.priority, config.default_model
        self.client = VLLMClient(replace(config, max_retries=0))  # retries are announced, so they are ours
        self._repaired: set[str] = set()
        self._has_warned = self._is_unlisted = False
        self._discovery_level = logging.WARNING  # once
        self._is_debugged = config.debug or config.raw_debug or config.raw
        self._places: tuple[Any, Any] = (None, None)  # a loop and its semaphore

    def get_info(self) -> Any:
        """Return the kernel's ProviderInfo."""
        from amplifier_core import ConfigField, ProviderInfo

        limits = self._budget(self.default_model)
        known = {"context_window": limits[0], "max_output_tokens": limits[1]} if limits else {}

        def ask(key: str, told: str, **more: Any) -> Any:
            return ConfigField(id=key, display_name=told, prompt=f"{told} of vLLM", required=key == "base_url", **more)

        return ProviderInfo(
            id="vllm",
            display_name="vLLM",
            credential_env_vars=["VLLM_API_KEY"],
            capabilities=["streaming", "tools", "reasoning", "json_mode", "logprobs"],
            defaults={"model": self.default_model, "timeout": self.config.timeout, **known},
            config_fields=[
                ask("base_url", "Server URL", env_var="VLLM_BASE_URL"),
                ask("api_key", "API key", field_type="secret", env_var="VLLM_API_KEY"),
                ask("use_completions", "Use /v1/completions", field_type="boolean", default="true"),
            ],
        )

    def get_model_info(self) -> Any:
        """Return the kernel's ModelInfo of the default model; None, with one warning, while a limit is unknown."""
        model = self.default_model or self.client._served_model or ""
        limits = self._budget(model)
        if limits is None and not self._has_warned:
            self._has_warned = True
            logger.warning("the context window is unknown, so history is not compacted to it: set context_window")
        return None if limits is None else self._to_model_info(model, *limits)

    async def list_models(self) -> list[Any]:
        """Return the server's models as the kernel's ModelInfo; raise a kernel error when it cannot be asked."""
        try:
            cards = await self._list(self.config.timeout)
        except VLLMError as error:
            raise self._to_kernel_error(error, None) from error
        return [self._to_model_info(card.id, *(self._budget(card.id) or (0, 0))) for card in cards]

    def parse_tool_calls(self, response: Any) -> list[Any]:
        """Return the tool calls of a response."""
        return list(response.tool_calls or [])

    async def close(self) -> None:
        """Stop the calls in flight and close the connections; may be called again."""
        self.client.close()

    def _to_model_info(self, model: str, window: int, most: int) -> Any:
        from amplifier_core import ModelInfo

        able = ["tools", "thinking", "streaming", "json_mode"]
        return ModelInfo(id=model, display_name=model, context_window=window, max_output_tokens=most, capabilities=able)

    def _budget(self, model: str | None) -> tuple[int, int] | None:
        """Return the context window and the largest output to plan with, in tokens, never above the server's."""
        wanted = model or self.client._served_model
        served = (card.max_model_len for card in self.client._cards if card.id == wanted)
        window = min(filter(None, (next(served, None), self.config.context_window)), default=None)
        if window is None:
            return None
        return window, min(self.config.max_output_tokens or min(window // 4, 16384), window)

    async def _list(self, deadline: float) -> list[ModelCard]:
        """Return the server's models, and remember their limits."""
        import asyncio

        call = _Call(_Limits(self.config.timeout, math.inf, deadline))
        try:
            cards = await asyncio.to_thread(self.client._list, call)
        finally:
            call.stop()  # for when this task is cancelled
        self.client._served_model = cards[0].id if cards else ""
        return cards

    async def _discover(self, deadline: float = DISCOVERY_S) -> None:
        """Ask for the limits of the models; a server that does not answer is one warning."""
        try:
            await self._list(min(deadline, DISCOVERY_S))
        except VLLMError as error:
            self._is_unlisted = isinstance(error, StatusError | ProtocolError) and not error.retryable
            if self._is_unlisted:
                self.client._served_model = self.client._served_model or ""
            logger.log(self._discovery_level, "the limits of the models are unknown: %s", error)
            self._discovery_level = logging.DEBUG

    async def complete(self, request: Any, **options: Any) -> Any:
        """Return the kernel's ChatResponse to a ChatRequest.

        A setting counts as configuration < request_options() < request < keyword. Raises the kernel's errors. On
        cancellation, of the task or of the session, the server is stopped before this ends.
        """
        import asyncio

        turn = _Turn(self.config, request, options)
        work = asyncio.ensure_future(self._complete(turn))
        try:
            while not (await asyncio.wait({work}, timeout=CANCEL_POLL_S))[0]:
                if self._is_cancelled():
                    raise self._to_kernel_error(AbortError("the session was cancelled"), turn.model)
            return work.result()
        finally:
            if not work.done():
                work.cancel()
                await asyncio.wait({work})

    def _is_cancelled(self) -> bool:
        return getattr(getattr(self.coordinator, "cancellation", None), "is_immediate", False) is True

    async def _complete(self, turn: "_Turn") -> Any:
        result: dict[str, Any] = {"status": "error", "finish_reason": None, **_to_usage_payload(None)}
        try:
            await self._begin(turn)
            reply, response = await self._try(turn)
            result |= {"status": "ok", "finish_reason": response.finish_reason, **_to_usage_payload(reply.usage)}
            if self._is_debugged:
                await self._emit_debug("response", turn, reply, result)
            return response
        except BaseException as error:
            result |= {"error": str(error) or "cancelled", "error_type": type(self._as_abort(error)).__name__}
            if isinstance(error, VLLMError):
                raise self._to_kernel_error(error, turn.model) from error
            raise
        finally:
            elapsed = {"duration_ms": int((time.monotonic() - turn.started) * 1000), "retries": turn.retries}
            await self._emit("llm:response", {**turn.names(), **elapsed, **result})

    def _as_abort(self, error: BaseException) -> BaseException:
        """Return AbortError for the cancellation of a session, which comes here as its task's; else the error."""
        is_session = not isinstance(error, Exception) and self._is_cancelled()
        return AbortError("the session was cancelled") if is_session else error

    async def _begin(self, turn: "_Turn") -> None:
        """Name the model, emit what precedes a call, and learn the model's limits at the first one."""
        is_asked = turn.model is None and self.client._served_model is None
        try:
            turn.deadline = _limits(self.config, turn.params).deadline
            if is_asked:
                await self._discover(turn.left_s())
        finally:
            turn.model = turn.model or self.client._served_model or "unknown"
            await self._announce(turn)
        if not (is_asked or self.client._cards or self._is_unlisted) and self._budget(turn.model) is None:
            await self._discover(turn.left_s())

    async def _announce(self, turn: "_Turn") -> None:
        """Emit what precedes a call. In completions mode the body shown is the one before it is rendered."""
        new = [repair for repair in turn.repairs if repair["tool_call_id"] not in self._repaired]
        self._repaired.update(repair["tool_call_id"] for repair in new)
        if new:
            told = {"provider": "vllm", "repair_count": len(new), "repairs": new}
            await self._emit("provider:tool_sequence_repaired", told)
        event = {**turn.names(), "message_count": len(turn.messages)}
        if self._is_debugged:
            with suppress(ConfigurationError):  # raised again where the call is made
                body = build_chat_request(self.config, turn.messages, **turn.params)
                await self._emit_debug("request", turn, _to_stream(body), event)
        await self._emit("llm:request", event)

    async def _emit_debug(self, what: str, turn: "_Turn", value: Any, event: dict[str, Any]) -> None:
        """Emit the debug events that are switched on; with `raw`, add the value to the event that comes anyway."""
        raw = _to_json(value, token="token_text")  # a hook of Amplifier's blanks what is called "token"
        told = {"provider": "vllm", "request_id": turn.request_id}
        if self.config.raw:
            event["raw"] = raw
        if self.config.debug:
            await self._emit(f"llm:{what}:debug", {**told, what: _to_json(raw, self.config.debug_truncate_length)})
        if self.config.raw_debug:
            await self._emit(f"llm:{what}:raw", {**told, what: raw})

    async def _try(self, turn: "_Turn") -> tuple[Completion, Any]:
        """Return the answer of the first attempt that succeeds, as ours and as the kernel's; announce each retry."""
        import asyncio

        while True:
            blocks = _Blocks(self._emit, turn.request_id) if turn.wants_events else None
            stream = self._start(turn)
            try:
                await self._follow(stream, blocks)
                reply = stream.completion
                for calls in _OPTIONS.get()[1]:
                    calls.append(reply)
                return reply, _to_response(reply, stream._reply.degradation, turn.params)
            except BaseException as error:
                if blocks:
                    await blocks.abort(self._as_abort(error))
                if not isinstance(error, VLLMError) or not error.retryable or turn.retries >= self.config.max_retries:
                    raise
                delay = _find_pause_s(self.config, error, turn.retries + 1, turn.left_s(), turn.deadline)
                turn.retries += 1
                told = {"provider": "vllm", "request_id": turn.request_id, "attempt": turn.retries, "delay": delay}
                told |= {"max_retries": self.config.max_retries, "error_type": type(error).__name__}
                told["error_message"] = str(error)
            await self._emit("provider:retry", told)
            await asyncio.sleep(delay)

    async def _follow(self, stream: Stream, blocks: "_Blocks | None") -> None:
        """Wait for one of the running loop's places, read the stream to its end in a thread, and show its deltas."""
        import asyncio

        loop = asyncio.get_running_loop()
        if self._places[0] is not loop:
            self._places = (loop, asyncio.Semaphore(self.config.max_concurrency))
        async with self._places[1]:
            if self._is_cancelled():  # while it waited for its place
                raise AbortError("the session was cancelled")
            relay = _Relay(loop, asyncio.Event())
            read: Callable[[Stream], Any] = relay.read if blocks else partial(collections.deque, maxlen=0)
            reading = asyncio.ensure_future(asyncio.to_thread(read, stream))
            try:
                while blocks is not None and (batch := await relay.take()):
                    await blocks.show(batch)
                await reading
                if blocks is not None:
                    await blocks.end()
            except BaseException:
                stream.cancel()
                reading.cancel()
                raise

    def _start(self, turn: "_Turn") -> Stream:
        """Return the Stream of one attempt; nothing is sent before it is read."""
        prompt_format = self.config.prompt_format if self.config.use_completions else None
        stream = self.client._stream(build_chat_request, turn.messages, turn.params, None, prompt_format)
        stream._call.must_end = turn.started + turn.deadline
        if not stream._call.keeps_id:
            stream._call.request_id = stream._reply.request_id = turn.request_id
        stream._call.attempt = turn.retries
        return stream

    async def _emit(self, name: str, payload: dict[str, Any]) -> None:
        """Emit an event; a hook that fails is logged, since it must not fail the call."""
        if (hooks := getattr(self.coordinator, "hooks", None)) is not None:
            try:
                await hooks.emit(name, payload)
            except Exception as error:  # noqa: BLE001  # whatever a hook does
                logger.warning("the event %s could not be emitted: %s", name, error)

    def _to_kernel_error(self, error: VLLMError, model: str | None) -> Exception:
        """Return the kernel's error of the same name, or of its nearest parent there."""
        from amplifier_core import llm_errors

        names = (kind.__name__ for kind in type(error).__mro__ if hasattr(llm_errors, kind.__name__))
        kind: Callable[..., Exception] = getattr(llm_errors, next(names, "LLMError"))
        options = {"provider": "vllm", "model": model, "status_code": error.status_code, "retryable": error.retryable}
        if isinstance(error, InvalidToolCallError):
            return kind(str(error), tool_name=error.tool_name, raw_arguments=error.raw_arguments, **options)
        return kind(str(error), retry_after=error.retry_after, **options)


class _Turn:
    """One complete(), over all its attempts."""

    def __init__(self, config: VLLMConfig, request: Any, options: Mapping[str, Any]) -> None:
        self.started, self.deadline, self.retries = time.monotonic(), math.inf, 0
        self.params = _to_params(request, options)
        self.messages, self.repairs = _repair(_to_wire_messages(request.messages))
        self.request_id = str(self.params.get("request_id") or _new_id())
        self.model: str | None = self.params.get("model") or config.default_model
        metadata = options.get("metadata") or request.metadata or {}
        self.wants_events = config.use_streaming and metadata.get("stream") is not False

    def names(self) -> dict[str, Any]:
        return {"provider": "vllm", "model": self.model, "request_id": self.request_id}

    def left_s(self) -> float:
        return self.started + self.deadline - time.monotonic()


class _Relay:
    """Carries deltas from the thread that reads to the event loop; what comes while a hook is busy is one batch."""

    def __init__(self, loop: Any, ready: Any) -> None:
        self._loop, self._ready, self._lock = loop, ready, threading.Lock()
        self._waiting: list[Delta] = []
        self._is_over = False

    def read(self, stream: Stream) -> None:
        try:
            for delta in stream:
                with self._lock:
                    is_first = not self._waiting
                    self._waiting.append(delta)
                if is_first:
                    self._wake()
        finally:
            self._is_over = True
            self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop has gone, and nobody waits
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self) -> list[Delta]:
        """Return what has come since; nothing once the stream is over."""
        while not self._waiting and not self._is_over:
            self._ready.clear()
            await self._ready.wait()
        with self._lock:
            batch, self._waiting = self._waiting, []
        return batch


class _Blocks:
    """Emits the deltas of one attempt as blocks: start, deltas, end."""

    def __init__(self, emit: Callable[[str, dict[str, Any]], Any], request_id: str) -> None:
        self._emit_to, self._request_id = emit, request_id
        self._open: tuple[str, str, str] | None = None  # its type; id and name of a call
        self._index, self._sequence = -1, 0
        self._has_shown = False

    async def show(self, deltas: Sequence[Delta]) -> None:
        for block, pieces in itertools.groupby(_to_pieces(deltas), key=lambda piece: piece[0]):
            if block != self._open:
                await self.end()
                self._open, self._index, self._sequence = block, self._index + 1, 0
                await self._emit("start", **({"name": block[2]} if block[0] == "tool_use" else {}))
            if block[0] != "tool_use":
                self._has_shown = True  # from now on: one hook may have it when another fails
                await self._emit("delta", sequence=self._sequence, text="".join(text for _, text in pieces))
                self._sequence += 1

    async def end(self) -> None:
        if self._open is not None:
            await self._emit("end")
            self._open = None

    async def abort(self, error: BaseException) -> None:
        """Tell consumers to discard what they were shown."""
        await self.end()
        if self._has_shown:
            told = {"type": type(error).__name__, "msg": str(error) or "cancelled"}
            await self._emit_to("llm:stream_aborted", {"request_id": self._request_id, "error": told})

    async def _emit(self, what: str, **details: Any) -> None:
        block = {"request_id": self._request_id, "block_index": self._index, "block_type": (self._open or "?")[0]}
        await self._emit_to(f"llm:stream_block_{what}", {**block, **details})


def _to_pieces(deltas: Sequence[Delta]) -> Iterator[tuple[tuple[str, str, str], str]]:
    """Yield the text of the first choice, each piece with the block it belongs to."""
    for delta in deltas:
        if delta.index == 0:
            if delta.reasoning:
                yield ("thinking", "", ""), delta.reasoning
            if delta.text:
                yield ("text", "", ""), delta.text
            for call in delta.tool_calls:
                yield ("tool_use", call.id, call.name), ""


# ---- Amplifier adapter: vocabulary (pure) -----------------------------------


def _to_params(request: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's parameters: request_options() < the ChatRequest < the keywords."""
    names = ("temperature", "top_p", "stop", "tool_choice", "reasoning_effort", "timeout", "model", "tools")
    told = {name: getattr(request, name, None) for name in (*names, "response_format", "max_output_tokens")}
    params: dict[str, Any] = {}
    not_sent = ("metadata", "stream", "conversation_id")
    for layer in (_OPTIONS.get()[0], request.model_extra or {}, told, options):
        given = {name: value for name, value in layer.items() if value is not None and name not in not_sent}
        if not given.keys().isdisjoint(MAX_TOKENS_NAMES):
            params = {name: value for name, value in params.items() if name not in MAX_TOKENS_NAMES}
        params |= {"max_tokens" if name == "max_output_tokens" else name: value for name, value in given.items()}
    params["tools"] = [_to_wire_tool(tool) for tool in params.get("tools") or ()] or None
    if params["tools"] is None:
        params.pop("tool_choice", None)  # a 400 without tools
    params["response_format"] = _to_wire_format(params.get("response_format"))
    if params.pop("extended_thinking", None) is False:
        kwargs = {"enable_thinking": False, "thinking": False}  # what templates call it: Qwen and others, DeepSeek
        params["chat_template_kwargs"] = {**kwargs, **(params.get("chat_template_kwargs") or {})}
    return params


def _to_wire_tool(tool: Any) -> dict[str, Any]:
    told = dict(tool) if isinstance(tool, Mapping) else tool.model_dump(exclude_none=True)
    return told if "function" in told else {"type": "function", "function": told}


def _to_wire_format(wanted: Any) -> Any:
    """Return `response_format` as vLLM wants it; a schema may come bare, or with its name around it."""
    kind = getattr(wanted, "type", None)
    if kind == "json":
        return {"type": "json_object"}
    if kind == "json_schema":
        schema = wanted.json_schema
        named = schema if isinstance(schema.get("schema"), Mapping) else {"schema": schema}
        strict = {} if wanted.strict is None else {"strict": wanted.strict}
        return {"type": "json_schema", "json_schema": {"name": "response", **strict, **named}}
    return None if kind == "text" else wanted


def _to_wire_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the kernel's messages as vLLM's. Nothing is changed in place."""
    wire: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the function, by the id of its call: vLLM up to 0.12 wants it with the result
    for message in messages:
        blocks = message.content if isinstance(message.content, list) else []
        content: Any = _to_wire_content(blocks) if blocks else message.content or ""
        calls = _to_wire_calls(message, blocks)
        names |= {call["id"]: call["function"]["name"] for call in calls}
        results = [(block.tool_call_id, _to_json_text(block.output)) for block in blocks if block.type == "tool_result"]
        role = {"developer": "system", "function": "tool"}.get(message.role, message.role)  # templates know these
        if role == "tool" and not results:
            results = [(message.tool_call_id or "", content)]
            names.setdefault(message.tool_call_id or "", message.name or "")
        wire += [_to_wire_result(call_id, output, names.get(call_id)) for call_id, output in results]
        if not results or (role != "tool" and (content or calls)):
            reasoning = "\n".join(filter(None, map(_reasoning_of, blocks)))
            extras = {"reasoning": reasoning, "tool_calls": calls, "name": message.name}
            wire.append({"role": role, "content": content, **{name: value for name, value in extras.items() if value}})
    return wire


def _to_wire_content(blocks: Sequence[Any]) -> Any:
    """Return a text where there is only text, joined as vLLM joins parts; else the parts."""
    parts: list[dict[str, Any]] = []
    for block in blocks:
        if block.type == "text":
            parts.append({"type": "text", "text": block.text})
        elif block.type == "image":
            source = block.source
            data = f"data:{source.get('media_type', 'image/png')};base64,{source.get('data', '')}"
            parts.append({"type": "image_url", "image_url": {"url": source.get("url") or data}})
    is_text = all(part["type"] == "text" for part in parts)
    return "\n".join(part["text"] for part in parts) if is_text else parts


def _reasoning_of(block: Any) -> str:
    if block.type == "reasoning":
        return "".join(item.get("text", "") if isinstance(item, Mapping) else str(item) for item in block.content)
    return str(block.thinking) if block.type == "thinking" else ""


def _to_wire_calls(message: Any, blocks: Sequence[Any]) -> list[dict[str, Any]]:
    """Return an assistant's tool calls, which come as blocks, as the extra field `tool_calls`, or as both."""
    told = [(block.id, block.name, block.input) for block in blocks if block.type == "tool_call"]
    for entry in (message.model_extra or {}).get("tool_calls") or ():
        call = entry if isinstance(entry, Mapping) else entry.model_dump()
        function = call.get("function") or {}
        name = call.get("tool") or call.get("name") or function.get("name") or ""
        arguments = next((call[key] for key in ("arguments", "input") if key in call), function.get("arguments"))
        told.append((call.get("id") or "", name, arguments or {}))
    calls = {call_id: _to_wire_call(call_id, name, _to_json_text(arguments)) for call_id, name, arguments in told[::-1]}
    return list(calls.values())[::-1]


def _to_json_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    with suppress(UnicodeEncodeError):
        text.encode()
        return text
    return json.dumps(value, default=str)  # half a character, which the model wrote as an escape


def _to_wire_result(call_id: str, content: Any, name: str | None) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, **({"name": name} if name else {}), "content": content}


def _repair(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return the messages with a result after each call that has none, and those repairs: templates fail without."""
    repaired: list[dict[str, Any]] = []
    repairs = []
    for position, message in enumerate(messages):
        repaired.append(message)
        for call in message.get("tool_calls", ()):
            if not any(later.get("tool_call_id") == call["id"] for later in messages[position + 1 :]):
                name = call["function"]["name"]
                repairs.append({"tool_call_id": call["id"], "tool_name": name})
                repaired.append(_to_wire_result(call["id"], MISSING_RESULT, name))
    return repaired, repairs


def _to_response(reply: Completion, degradation: Mapping[str, str] | None, params: Mapping[str, Any]) -> Any:
    """Return the kernel's ChatResponse; raise InvalidToolCallError for a call nobody could execute."""
    from amplifier_core import content_models, message_models

    dropped = any(choice.stop_reason == HARMONY_CALL for choice in reply.choices) and not reply.tool_calls
    if dropped and params.get("tools"):
        cure = "start vLLM with --enable-auto-tool-choice --tool-call-parser openai"
        raise InvalidRequestError(f"gpt-oss called a tool and the server dropped the call; {cure}")
    calls = [(call.id or f"call_{place}", call.name, call.parsed()) for place, call in enumerate(reply.tool_calls)]
    blocks: list[tuple[Any, Any]] = []  # as kept in the history, and as shown
    if reply.reasoning:
        shown = content_models.ThinkingContent(text=reply.reasoning)
        blocks.append((message_models.ThinkingBlock(thinking=reply.reasoning), shown))
    if reply.text or not calls:
        blocks.append((message_models.TextBlock(text=reply.text), content_models.TextContent(text=reply.text)))
    for call_id, name, arguments in calls:
        block = message_models.ToolCallBlock(id=call_id, name=name, input=arguments)
        blocks.append((block, content_models.ToolCallContent(id=call_id, name=name, arguments=arguments)))
    usage = (reply.usage or Usage(0, 0, 0))._asdict()
    return message_models.ChatResponse(
        content=[block for block, _ in blocks],
        tool_calls=[message_models.ToolCall(id=call[0], name=call[1], arguments=call[2]) for call in calls] or None,
        usage=message_models.Usage(cache_read_tokens=usage.pop("cached_tokens"), **usage),
        degradation=message_models.Degradation(**degradation) if degradation else None,
        finish_reason="tool_calls" if calls else reply.finish_reason or "stop",
        content_blocks=[shown for _, shown in blocks],
        text=reply.text,
    )


def _to_usage_payload(usage: Usage | None) -> dict[str, Any]:
    counted = usage or Usage(0, 0, 0)
    told: dict[str, Any] = {"input_tokens": counted.input_tokens, "output_tokens": counted.output_tokens}
    told |= {"cache_read_tokens": counted.cached_tokens, "reasoning_tokens": counted.reasoning_tokens}
    return {"usage": {**{name: value for name, value in told.items() if value is not None}, "cost_usd": None}}


# ---- Command line -----------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 when done, 1 when it failed, 2 when misused, 130 when interrupted."""
    options = _read_arguments(argv)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # an error is one line: the retries before it are for the log
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character still shows the others
    try:
        names = ("api_key", "timeout", "max_tokens", "temperature", "seed", "stop", "logprobs")
        settings = {name: options[name] for name in names if name in options}
        with VLLMClient(options.get("base_url"), default_model=options.get("model"), **settings) as client:
            {"models": _run_models, "health": _run_health}.get(options["command"], _run_prompt)(client, options)
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except VLLMError as error:
        sys.stderr.write(f"vllm-provider: {error}\n")
        return 2 if isinstance(error, ConfigurationError) else 1
    except OSError as error:  # of our own output: the disk is full, or the reader has left, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing can be written at exit either
        if isinstance(error, BrokenPipeError):
            return 0
        sys.stderr.write(f"vllm-provider: the output cannot be written: {error.strerror}\n")
        return 1


def _read_arguments(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return the options given, by their long names; argparse ends the process with 2 for others."""
    import argparse

    def parent(*parents: Any) -> Any:
        return argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, parents=parents)

    shared = parent()
    shared.add_argument("--base-url", help="the server, like http://localhost:8000 (default: VLLM_BASE_URL)")
    shared.add_argument("--api-key", help="better in VLLM_API_KEY: others can see a command's arguments")
    shared.add_argument("--model", help="default: what the server serves")
    shared.add_argument("--timeout", metavar="SECONDS", help="to the first token, or to a whole reply (default: 300)")
    asking = parent(shared)
    asking.add_argument("prompt", nargs="?", help="default: standard input")
    asking.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    for flag in ("--max-tokens", "--temperature", "--seed", "--logprobs"):
        asking.add_argument(flag, metavar="N")
    asking.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    told = "any parameter of vLLM's; may be repeated"
    asking.add_argument("--param", action="append", metavar="NAME=JSON", help=told)
    asking.add_argument("--no-stream", action="store_true", help="print the reply when it is whole")
    asking.add_argument("--json", action="store_true", help="print the whole Completion as JSON")
    parser = argparse.ArgumentParser(
        prog="vllm-provider", description="Talk to a vLLM server.", argument_default=argparse.SUPPRESS, parents=[shared]
    )
    parser.add_argument("--version", action="version", version=f"vllm-provider {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, base: Any, told: str) -> Any:
        return commands.add_parser(name, parents=[base], help=told, argument_default=argparse.SUPPRESS)

    complete = command("complete", asking, "let the model go on with a text")
    complete.add_argument("--chat-template", action="store_true", help="render the prompt as a user's message first")
    command("chat", asking, "let the model answer a message")
    command("models", shared, "list the models served")
    health = command("health", shared, "exit with 0 if the server is well")
    health.add_argument("--wait", type=float, metavar="SECONDS", help="for a server that is starting")
    return vars(parser.parse_args(argv))


def _run_models(client: VLLMClient, options: Mapping[str, Any]) -> None:
    for card in client.models():
        print(f"{card.id}\t{card.max_model_len or '?'} tokens")


def _run_health(client: VLLMClient, options: Mapping[str, Any]) -> None:
    client.health(options.get("wait", 0.0))
    print(f"{client.config.base_url} is well")


def _run_prompt(client: VLLMClient, options: Mapping[str, Any]) -> None:
    prompt = options["prompt"] if options.get("prompt") is not None else _read_stdin()
    messages = [{"role": "system", "content": options["system"]}] if "system" in options else []
    messages.append({"role": "user", "content": prompt})
    params = dict(_read_param(param) for param in options.get("param", ()))
    has_messages = options["command"] == "chat" or "chat_template" in options
    if "system" in options and not has_messages:
        raise ConfigurationError("--system goes with chat, or with complete --chat-template")
    build, source = (build_chat_request, messages) if has_messages else (build_completion_request, prompt)
    prompt_format = "chat_template" if "chat_template" in options else None
    stream = client._stream(build, source, params, "no_stream" not in options, prompt_format)
    if "json" in options:
        with stream:
            collections.deque(stream, maxlen=0)
        is_utf = (sys.stdout.encoding or "").lower().startswith("utf")
        print(json.dumps(_to_json(stream.completion), ensure_ascii=not is_utf, allow_nan=False))
        return
    printer = _Printer("logprobs" in options)
    try:
        with stream:
            for delta in stream:
                printer.show(delta)
    except VLLMError:
        printer.end_line()
        raise
    printer.end(stream.completion)


def _read_stdin() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # in the C locale Python lets half characters through
        return text
    except UnicodeError as error:
        raise ConfigurationError(f"standard input is not {sys.stdin.encoding} text") from error


def _read_param(param: str) -> tuple[str, Any]:
    name, _, value = param.partition("=")
    name = name.replace("-", "_")
    try:
        _require(name.isidentifier() and name not in ("config", "messages", "prompt"))
        return name, json.loads(value)
    except ValueError as error:
        told = f"--param must be NAME=JSON, like top_k=5 or stop='[\"END\"]', got {param!r}"
        raise ConfigurationError(told) from error


class _Printer:
    """Shows deltas as they come: text on stdout, reasoning on stderr, with log probabilities where somebody looks."""

    def __init__(self, with_logprobs: bool) -> None:
        self._has_colour = not os.environ.get("NO_COLOR")
        self._with_logprobs = with_logprobs and sys.stdout.isatty()
        self._open: TextIO | None = None  # where a line has begun

    def show(self, delta: Delta) -> None:
        if delta.index:
            return  # further choices wait for the end, not to be mixed up with the first
        if delta.reasoning:
            self._write(sys.stderr, self._dim(delta.reasoning) if sys.stderr.isatty() else delta.reasoning)
        if delta.text:
            self._write(sys.stdout, self._paint_all(delta) if self._with_logprobs else delta.text)

    def _write(self, out: TextIO, text: str) -> None:
        if self._open is not out:
            self.end_line()
        out.write(text)
        out.flush()
        self._open = out

    def end_line(self) -> None:
        if self._open is not None:
            self._open.write("\n")
            self._open.flush()
            self._open = None

    def end(self, reply: Completion) -> None:
        """Show the calls of the first choice, and the other choices whole."""
        for choice in reply.choices:
            calls = [f"{call.name}({call.arguments})" for call in choice.tool_calls]
            for line in [choice.text] * (choice.index > 0) + calls:
                self.end_line()
                self._write(sys.stdout, line)
        self.end_line()

    def _paint_all(self, delta: Delta) -> str:
        """Return the text with its tokens painted, or plain where they do not join to it (the end's has no text)."""
        joined = list(itertools.accumulate((token.token for token in delta.logprobs), initial=""))
        if delta.text not in joined:
            return delta.text
        return "".join(map(self._paint, delta.logprobs[: joined.index(delta.text)]))

    def _paint(self, token: TokenLogprob) -> str:
        probability = token.probability
        if probability is None:
            return token.token
        if not self._has_colour:
            return f"{token.token}({probability:.2f})"
        colour = 32 if probability >= 0.8 else 33 if probability >= 0.4 else 31  # green, yellow, red
        others = " ".join(repr(other.token) for other in token.top if other.token != token.token)
        return f"\x1b[{colour}m{token.token}\x1b[0m{self._dim(f'[{others}]') if others else ''}"

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._has_colour else text


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""The tests of vllm_provider.py, and their server: a stand-in for vLLM with a tiny n-gram model.

pytest test_vllm_provider.py                  the tests
python test_vllm_provider.py                  the demo, against the stand-in
VLLM_BASE_URL=… python test_vllm_provider.py  the demo, against a server of yours
python test_vllm_provider.py --serve 8000     the stand-in alone, to try things on

The stand-in and the demo come first and need only requests; the tests' imports stand below them.
"""

import _thread
import argparse
import bisect
import codecs
import contextlib
import functools
import heapq
import http.client
import inspect
import io
import itertools
import json
import math
import os
import queue
import random
import re
import signal
import socket
import ssl
import struct
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import requests

import vllm_provider  # before amplifier_core's pytest plugin can load it under another name
from vllm_provider import VLLMClient, VLLMError

# ---- Stand-in: what the model has read --------------------------------------

MODEL: Final = "parrot"
MAX_MODEL_LEN: Final = 2048
MAX_LOGPROBS: Final = 20
END: Final = "<|im_end|>"
TURN: Final = "<|im_start|>assistant\n"
COUNT: Final = " ".join(map(str, range(1, 101)))
NOT_READ: Final = "\0"  # stands in the corpus for whatever the corpus does not hold

CAPITALS: Final = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}
TEXTS: Final = (  # what is read more often is more likely
    *[f"The capital of {country} is {city}." for country, city in CAPITALS.items()] * 3,
    "The capital of France is Paris, a city on the Seine.",
    "The capital of France is Lyon, said a child.",
    "Lyon is a city in France. Rome is a city in Italy.",
    "What is 2+2? 4",
    f"Count to 100. {COUNT}",
    f"Once upon a time there was a small model that could count: {COUNT}",
    *[f"{NOT_READ} I have not read that."] * 5,
)


def _called(name: str, arguments: str) -> str:
    """Return a tool call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


_PARIS: Final = _called("get_weather", '{"city": "Paris"}')
_ROME: Final = _called("get_weather", '{"city": "Rome"}')
_CITY: Final = '{"name": "Paris", "country": "France", "is_capital": true}'
_BOTH: Final = "What is the weather in Paris and Rome?"
_SUNNY: Final = "<tool_response>\nsunny, 21 C\n</tool_response>"
_WHO: Final = f"My name is Ada.{END}\n{TURN}Hello Ada.{END}\n<|im_start|>user\nWhat is my name?"
_FOUR: Final = ("Two plus two equals four.", "\n\n2 + 2 = 4")
_UNSURE: Final = ("I do not know this.", "\n\nI am a very small model. I have not read that.")
CONVERSATIONS: Final = (  # system message, the user's words, reasoning, answer
    ("", "What is 2+2?", _FOUR[0], _FOUR[1]),
    *[("You are a helpful assistant.", "What is 2+2?", _FOUR[0], _FOUR[1])] * 2,
    ("Answer like a pirate.", "What is 2+2?", "A pirate counts too.", "\n\nArr, it be 4!"),
    ("", "Hello", "A greeting.", "\n\nHello! How can I help you today?"),
    ("", "Count to 100.", "Count.", f"\n\n{COUNT}"),
    ("", "Say hello in Japanese.", "Use hiragana.", "\n\nこんにちは、世界 🌸🚀"),
    ("", _WHO, "They told me.", "\n\nYour name is Ada."),
    ("", "Which city is the capital of France?", "France: Paris.", _CITY),
    ("", "What is the weather in Paris?", "I have no tool.", "\n\nI cannot look outside."),
    ("# Tools\nget_weather", "What is the weather in Paris?", "I need the tool.", f"\n\n{_PARIS}"),
    ("# Tools\nget_weather", _BOTH, "Two calls.", f"\n\n{_PARIS}\n{_ROME}"),
    ("", _SUNNY, "The tool answered.", "\n\nIt is sunny in Paris, 21 C."),
    *[("", f"{NOT_READ}{end}", _UNSURE[0], _UNSURE[1]) for end in ("", "?", ".", "!")] * 5,
)


def _turns(*turns: tuple[str, str]) -> str:
    """Return roles and their texts as ChatML."""
    return "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns)


def _corpus() -> Iterator[str]:
    """Yield everything the model has read."""
    for text in TEXTS:
        yield text + END

    for system, user, thought, answer in CONVERSATIONS:
        turns = [("system", system), ("user", user)]
        if not system:
            del turns[0]
        yield f"{_turns(*turns)}{TURN}<think>\n{thought}\n</think>{answer}{END}"


# ---- Stand-in: tokens -------------------------------------------------------

_PIECE: Final = re.compile(r"<\|\w+\|>|</?\w+>| ?[^\W_]+|_| ?[\"{}\[\]]| ?[^\w\s<\"{}\[\]]+|<|\s")
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", END)


class _Vocabulary:
    """The tokens of the model: special ones, the 256 bytes, and the words of its corpus.

    A text is cut into words; a word that the corpus does not hold, and an emoji, into its bytes.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._bytes = [token.encode() for token in _SPECIAL]
        self._bytes += [bytes([byte]) for byte in range(256)]
        self._ids = {raw: number for number, raw in enumerate(self._bytes)}

        for piece in _PIECE.findall("".join(texts)):
            raw = piece.encode()
            if raw not in self._ids and max(piece) < "\U00010000":
                self._ids[raw] = len(self._bytes)
                self._bytes.append(raw)

        self.end = self._ids[END.encode()]
        self.size = len(self._bytes)

    def ids(self, text: str) -> list[int]:
        ids = []
        for piece in _PIECE.findall(text):
            raw = piece.encode(errors="replace")
            known = self._ids.get(raw)
            ids += [len(_SPECIAL) + byte for byte in raw] if known is None else [known]
        return ids

    def is_special(self, number: int) -> bool:
        return number < len(_SPECIAL)

    def number(self, raw: bytes) -> int | None:
        return self._ids.get(raw)

    def raw(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._bytes[number] for number in ids if number < self.size)

    def token(self, number: int) -> str:
        """Return a token as replies show it; a part of a character is U+FFFD, as in vLLM."""
        return self._bytes[number].decode(errors="replace")


VOCABULARY: Final = _Vocabulary(list(_corpus()))


# ---- Stand-in: the model ----------------------------------------------------


class _Model:
    """An n-gram model: it knows what followed in the corpus, and nothing else."""

    ORDER: Final = 64  # it looks at no more tokens than these

    def __init__(self) -> None:
        self._read: list[int] = []
        for text in _corpus():
            self._read += [0, *VOCABULARY.ids(text)]  # 0 is <|endoftext|>: a text begins

        self._not_read = VOCABULARY.ids(NOT_READ)[0]
        self._known = set(self._read)
        self._places: dict[int, list[int]] = {}
        for place, token in enumerate(self._read[:-1], 1):
            self._places.setdefault(token, []).append(place)
        self._cached = functools.lru_cache(maxsize=2048)(self._row)

    def after(self, ids: Sequence[int]) -> list[float]:
        """Return the probability of each token of the vocabulary to come next."""
        last = [0, *ids[-self.ORDER :]]
        known = [token if token in self._known else self._not_read for token in last]
        return self._cached(tuple(known))

    def _row(self, context: tuple[int, ...]) -> list[float]:
        """Return the distribution of the next token.

        Witten and Bell's smoothing: a context that was seen n times, before t different tokens,
        counts n/(n+t); the rest is the context half as long, and in the end all tokens alike.
        """
        seen = self._seen(context)
        probabilities: Counter[int] = Counter()
        rest = 1.0
        while seen:
            counts = Counter(self._read[place] for place in seen[-1])
            total = counts.total() + len(counts)
            for token, count in counts.items():
                probabilities[token] += rest * count / total
            rest *= len(counts) / total
            del seen[len(seen) // 2 :]

        row = [rest / VOCABULARY.size] * VOCABULARY.size
        for token, probability in probabilities.items():
            row[token] += probability
        return row

    def _seen(self, context: tuple[int, ...]) -> list[Sequence[int]]:
        """Return where the last 0, 1, 2, … tokens of the context were read, while they were."""
        places: Sequence[int] = range(1, len(self._read))
        seen = [places]
        for length, token in enumerate(reversed(context), 1):
            if length == 1:
                places = self._places.get(token, [])
            else:
                places = [p for p in places if p >= length and self._read[p - length] == token]
            if not places:
                break
            seen.append(places)
        return seen


NGRAMS: Final = _Model()


def _logprob(probability: float) -> float:
    """Return a natural logarithm; vLLM writes -9999.0 for minus infinity."""
    return math.log(probability) if probability > 0 else -9999.0


# ---- Stand-in: what it is made to write -------------------------------------


def _instances(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Any]:
    """Return the values of a JSON schema that the model may write: few, and each valid."""
    if "$ref" in schema:
        return _instances(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return [one for option in schema["anyOf"] for one in _instances(option, root)]
    if "const" in schema or "enum" in schema:
        return schema.get("enum") or [schema["const"]]

    kind = schema.get("type", "object")
    if kind == "object":
        properties = schema.get("properties", {})
        values = [_instances(value, root) for value in properties.values()]
        rows = itertools.islice(itertools.product(*values), 1000)
        return [dict(zip(properties, row, strict=True)) for row in rows]
    if kind == "array":
        items = _instances(schema.get("items", {}), root)
        return [[one] * schema.get("minItems", 1) for one in items]
    scalars = {"boolean": [True, False], "null": [None], "string": [*CAPITALS.values(), *CAPITALS]}
    return scalars.get(kind) or [schema.get("minimum", 0)]


def _requested_choices(body: Mapping[str, Any]) -> list[bytes]:
    """Return the only answers that a request allows; none where it allows any."""
    outputs = body.get("structured_outputs", {})
    form = body.get("response_format", {})
    choice = body.get("tool_choice", "auto")
    texts = []
    if choice == "required" or isinstance(choice, dict):
        for name, schema in _tool_schemas(body).items():
            if choice == "required" or choice["function"]["name"] == name:
                texts += [_called(name, json.dumps(one)) for one in _instances(schema, schema)]
    elif "choice" in outputs:
        texts = outputs["choice"]
    elif "json" in outputs or form.get("type", "text") != "text":
        schema = outputs.get("json") or form.get("json_schema", {}).get("schema", {})
        schema = json.loads(schema) if isinstance(schema, str) else schema
        texts = [json.dumps(one, ensure_ascii=False) for one in _instances(schema, schema)]
    return [text.encode() for text in texts]


def _masked(
    row: list[float], choices: Sequence[bytes], written: bytes, is_chat: bool
) -> list[float]:
    """Return the distribution after `written`, of the tokens that lead to one of the choices."""
    if is_chat:  # where the reasoning is free
        _, mark, written = written.rpartition(b"</think>")
        if not mark:
            return row

    allowed = set()
    for choice in choices:
        if choice.startswith(written):
            rest = choice[len(written) :] or END.encode()
            allowed |= {VOCABULARY.number(rest[:size]) for size in range(1, len(rest) + 1)}

    masked = [row[token] if token in allowed else 0.0 for token in range(len(row))]
    total = sum(masked)
    return [probability / total for probability in masked]


# ---- Stand-in: how it writes ------------------------------------------------


class _Writer:
    """Turns tokens into text as they come: whole characters, and nothing of a stop string."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.stop: str | None = None  # the stop string that was found
        stops = body.get("stop", [])
        self._stops = [stops] if isinstance(stops, str) else stops
        self._held_back = max(map(len, self._stops), default=1) - 1  # as in vLLM
        self._hides_special = body.get("skip_special_tokens", True)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._shown = 0

    def add(self, token: int) -> str:
        """Return the text that may be shown after `token`, and was not before."""
        if not (self._hides_special and VOCABULARY.is_special(token)):
            self._text += self._decoder.decode(VOCABULARY.raw([token]))
        for stop in self._stops:
            if stop in self._text:
                self.stop = stop
                self._text = self._text.partition(stop)[0]
                return ""
        return self._show(len(self._text) - self._held_back)

    def finish(self) -> str:
        """Return the rest."""
        if self.stop is None:
            self._text += self._decoder.decode(b"", final=True)
        return self._show(len(self._text))

    def _show(self, end: int) -> str:
        start = self._shown
        self._shown = max(start, end)
        return self._text[start : self._shown]


@dataclass
class _Choice:
    """One answer: its tokens, each with the distribution it is from and the text it shows."""

    index: int
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    echoed: int = 0  # so many of the tokens are the prompt's
    finish_reason: str = "length"
    stop_reason: str | int | None = None

    def add(self, token: int, row: list[float], text: str) -> None:
        self.ids.append(token)
        self.rows.append(row)
        self.texts.append(text)


def _echo(choice: _Choice) -> None:
    """Put the prompt before an answer, with what the model had expected in its place."""
    writer = _Writer({"skip_special_tokens": False})
    for place, token in enumerate(choice.prompt):
        choice.add(token, NGRAMS.after(choice.prompt[:place]), writer.add(token))
    choice.echoed = len(choice.prompt)


def _write(choice: _Choice, body: Mapping[str, Any], limit: int) -> None:
    """Add what the model writes after the prompt, at most `limit` tokens."""
    seed = body.get("seed", -1)
    source = random.Random(None if seed == -1 else seed + choice.index)
    choices = _requested_choices(body)
    writer = _Writer(body)

    for _ in range(limit):
        own = choice.ids[choice.echoed :]
        row = NGRAMS.after([*choice.prompt, *own])
        if choices:
            row = _masked(row, choices, VOCABULARY.raw(own), "messages" in body)
        token = _drawn(row, body, source)
        is_end = token == VOCABULARY.end and not body.get("ignore_eos")
        choice.add(token, row, "" if is_end else writer.add(token))
        if writer.stop is not None:
            choice.stop_reason = writer.stop
        elif token in body.get("stop_token_ids", []):
            choice.stop_reason = token
        if is_end or choice.stop_reason is not None:
            choice.finish_reason = "stop"
            break
    if limit > 0:
        choice.texts[-1] += writer.finish()


def _drawn(row: list[float], body: Mapping[str, Any], source: random.Random) -> int:
    """Return the next token: the most likely one, or one that is drawn as `body` says."""
    temperature = body.get("temperature", 0.0)
    if temperature < 1e-5:
        return row.index(max(row))

    ranked = sorted(range(len(row)), key=row.__getitem__, reverse=True)
    if body.get("top_k", 0) > 0:
        ranked = ranked[: body["top_k"]]
    weights = [row[token] ** (1 / temperature) for token in ranked]
    totals = list(itertools.accumulate(weights))
    by_top_p = bisect.bisect_left(totals, body.get("top_p", 1.0) * totals[-1]) + 1
    floor = body.get("min_p", 0.0) * weights[0]
    count = min(by_top_p, sum(weight >= floor for weight in weights))
    return source.choices(ranked[:count], weights[:count])[0]


# ---- Stand-in: bytes of replies ---------------------------------------------

SSE_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"vary: Origin\r\ntransfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK: Final = b"0\r\n\r\n"


def _bytes(value: Any) -> bytes:
    """Return bytes as they are, a str as UTF-8, any other value as JSON."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return value.encode()


def chunk(event: Any) -> bytes:
    """Return one chunk of a streamed reply: bytes as they are, any other value as one event."""
    raw = event if isinstance(event, bytes) else b"data: %b\n\n" % _bytes(event)
    return b"%x\r\n%b\r\n" % (len(raw), raw)


def sse(*events: Any, done: bool = True, end: bool = True) -> bytes:
    """Return a streamed reply, one `chunk` per event.

    Without `done` it has no [DONE], without `end` no last chunk.
    """
    chunks = [chunk(event) for event in events]
    if done:
        chunks.append(chunk("[DONE]"))
    if end:
        chunks.append(LAST_CHUNK)
    return SSE_HEAD + b"".join(chunks)


def reply(status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Return a whole reply with `_bytes(body)`; `headers` win over the usual ones."""
    raw = _bytes(body)
    fields = {"server": "uvicorn", "content-length": str(len(raw)), "vary": "Origin"}
    if raw:
        is_text = isinstance(body, bytes | str)
        fields["content-type"] = "text/plain; charset=utf-8" if is_text else "application/json"
    for name, value in (headers or {}).items():
        fields[name.lower()] = value

    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + raw


# ---- Stand-in: one connection -----------------------------------------------


class ClientGoneError(Exception):
    """The connection is closed: by the client, or because the server stops."""


@dataclass(frozen=True)
class Request:
    """A request as it came; `headers` ignore case, `body` is the decoded JSON or None."""

    method: str
    path: str
    headers: http.client.HTTPMessage
    body: Any
    raw: bytes
    connection: int  # 1 is the first one opened; equal numbers show a connection used again
    time_s: float  # time.monotonic() when it was complete


class Connection:
    """The server's end of a connection, as a scripted step gets it; `request` is to be answered."""

    request: Request

    def __init__(self, sock: socket.socket, number: int, on_abort: Callable[[], None]) -> None:
        self.closed = False
        self._sock = sock
        self._number = number
        self._on_abort = on_abort
        self._received = bytearray()
        self._is_busy = False

    def send(self, raw: bytes) -> None:
        """Send `raw`; raises ClientGoneError."""
        try:
            self._sock.settimeout(None)
            self._sock.sendall(raw)
        except OSError as error:
            raise self._gone() from error

    def pause(self, seconds: float) -> None:
        """Wait; raises ClientGoneError as soon as the client closes: then vLLM stops generating."""
        deadline = time.monotonic() + seconds
        while self._receive(max(0.0, deadline - time.monotonic())):
            pass

    def sleep_until_closed(self, timeout_s: float = 10.0) -> bool:
        """Wait for the client to go, and return whether it did."""
        with contextlib.suppress(ClientGoneError):
            self.pause(timeout_s)
            return False
        return True

    def close(self) -> None:
        """Close with a FIN."""
        self.closed = True
        self._sock.close()

    def reset(self) -> None:
        """Close with a RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def shut_down(self) -> None:
        """Wake the thread that serves this connection; for other threads."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def read_request(self, timeout_s: float) -> bool:
        """Return whether a request began in time, and keep it in `request`.

        Raises ClientGoneError.
        """
        self._is_busy = False
        while b"\r\n\r\n" not in self._received:
            if not self._receive(timeout_s):
                return False

        head, separator, _ = bytes(self._received).partition(b"\r\n\r\n")
        line, _, fields = (head + separator).partition(b"\r\n")
        headers = http.client.parse_headers(io.BytesIO(fields))
        start = len(head + separator)
        end = start + int(headers.get("Content-Length", 0))
        while len(self._received) < end:
            self._receive(timeout_s)
        raw = bytes(self._received[start:end])
        del self._received[:end]

        body = None
        with contextlib.suppress(ValueError):
            body = json.loads(raw)
        method, path, _ = line.decode("latin-1").split(" ")
        now = time.monotonic()
        self.request = Request(method, path, headers, body, raw, self._number, now)
        self._is_busy = True
        return True

    def _receive(self, timeout_s: float) -> bool:
        """Return whether bytes came in time; only a read, not select(), sees a TLS stream end."""
        try:
            self._sock.settimeout(timeout_s)
            raw = self._sock.recv(65536)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as error:
            raise self._gone() from error
        if not raw:
            raise self._gone()
        self._received += raw
        return True

    def _gone(self) -> ClientGoneError:
        if self._is_busy and not self.closed:
            self._on_abort()
        self.closed = True
        return ClientGoneError()


Step: TypeAlias = bytes | Callable[[Connection], object] | None


def drip(raw: bytes, every_s: float) -> Step:
    """Return a step that sends `raw` byte by byte."""

    def step(connection: Connection) -> None:
        for byte in raw:
            connection.send(bytes([byte]))
            connection.pause(every_s)

    return step


def stall(raw: bytes = b"", timeout_s: float = 10.0) -> Step:
    """Return a step that sends `raw` and then nothing until the client goes."""

    def step(connection: Connection) -> None:
        connection.send(raw)
        connection.sleep_until_closed(timeout_s)

    return step


# ---- Stand-in: what vLLM refuses --------------------------------------------


class _RefusedError(Exception):
    """A reply other than 200; the arguments are its status and payload."""


def _refusal(
    text: str, param: str | None = None, status: int = 400, kind: str = "BadRequestError"
) -> _RefusedError:
    error = {"message": text, "type": kind, "param": param, "code": status}
    return _RefusedError(status, {"error": error})


def _bad_value(name: str, value: object, text: str) -> _RefusedError:
    return _refusal(f"{text} (parameter={name}, value={value})", name)


def _bad_body(where: str, kind: str, text: str, got: object, more: str = "") -> _RefusedError:
    """Return the refusal of vLLM's validation, pydantic's."""
    if isinstance(got, dict | list):
        got = f"<{type(got).__name__} of {len(got)} items>"
    detail = f"{{'type': '{kind}', 'loc': '{where}', 'msg': '{text}', 'input': '{got}'{more}}}"
    return _refusal(f"1 validation error:\n  {detail}", where, kind="Bad Request")


_TYPES: Final = (  # pydantic's kinds, and its words for them
    ("min_p temperature top_p", float | int, "float", "number"),
    ("max_tokens max_completion_tokens n seed top_k prompt_logprobs", int, "int", "integer"),
    ("echo ignore_eos return_token_ids stream", bool, "bool", "boolean"),
    ("logprob_token_ids messages stop_token_ids tokens tools", list, "list", "list"),
    ("prompt stop", str | list, "string", "string"),
)
_RANGES: Final = (  # the smallest and the largest value, what is said of others, with parameter=
    ("temperature", 0, math.inf, "temperature must be non-negative, got {}.", True),
    ("temperature", 0, 2, "temperature must be in [0, 2], got {}.", True),
    ("top_p", sys.float_info.min, 1, "top_p must be in (0, 1], got {}.", True),
    ("top_k", -1, math.inf, "top_k must be 0 (disable), or at least 1, got {}.", False),
    ("min_p", 0, 1, "min_p must be in [0, 1], got {}.", False),
    ("n", 1, math.inf, "n must be at least 1, got {}.", False),
    ("logprobs", -1, math.inf, "`logprobs` must be a positive value or -1.", True),
    ("top_logprobs", -1, math.inf, "`top_logprobs` must be a positive value or -1.", True),
    ("prompt_logprobs", -1, math.inf, "`prompt_logprobs` must be a positive value or -1.", True),
)
_LACKING: Final = (  # vLLM's parameters that the stand-in does not have
    "allowed_token_ids bad_words frequency_penalty include_stop_str_in_output logit_bias "
    "min_tokens presence_penalty prompt_embeds suffix thinking_token_budget use_beam_search"
)


def _decoded_body(request: Request, *required: str) -> dict[str, Any]:
    """Return the request's JSON without its nulls; syntax, fields and model are judged in order."""
    try:
        body = json.loads(request.raw)
    except json.JSONDecodeError as error:
        where = f"body.{error.pos}"
        more = f", 'ctx': {{'error': '{error.msg}'}}"
        raise _bad_body(where, "json_invalid", "JSON decode error", {}, more) from error
    if not isinstance(body, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        raise _bad_body("body", "model_attributes_type", text, body)

    for name in required:
        if name not in body:
            raise _bad_body(f"body.{name}", "missing", "Field required", body)
    body = {name: value for name, value in body.items() if value is not None}
    _check_types(body)
    if body.get("model", MODEL) not in ("", MODEL):
        text = f"The model `{body['model']}` does not exist. Valid aliases: {MODEL}."
        raise _refusal(text, "model", 404, "NotFoundError")
    return body


def _check_types(body: Mapping[str, Any]) -> None:
    reasons = {
        ("float", str): ("_parsing", ", unable to parse string as a number"),
        ("int", str): ("_parsing", ", unable to parse string as an integer"),
        ("int", float): ("_from_float", ", got a number with a fractional part"),
        ("bool", str): ("_parsing", ", unable to interpret input"),
    }
    for names, kind, code, word in _TYPES:
        for name in body.keys() & names.split():
            value = body[name]
            if not isinstance(value, kind):
                suffix, reason = reasons.get((code, type(value)), ("_type", ""))
                text = f"Input should be a valid {word}{reason}"
                raise _bad_body(f"body.{name}", f"{code}{suffix}", text, value)


def _conflicts(body: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """Yield parameters, whether they contradict others, and what vLLM says then."""
    choice = body.get("tool_choice", "none")
    names = [tool["function"]["name"] for tool in body.get("tools", [])]
    named = [{"type": "function", "function": {"name": name}} for name in names]
    outputs = body.get("structured_outputs", {"choice": []})

    text = "Stream options can only be defined when `stream=True`."
    yield "stream_options", "stream_options" in body and not body.get("stream"), text
    text = "`prompt_logprobs` are not available when `stream=True`."
    yield "prompt_logprobs", body.get("prompt_logprobs") and body.get("stream"), text
    text = "when using `top_logprobs`, `logprobs` must be set to true."
    yield "top_logprobs", body.get("top_logprobs") and not body.get("logprobs"), text
    text = "when using `logprob_token_ids`, `logprobs` must be set."
    yield "logprob_token_ids", "logprob_token_ids" in body and "logprobs" not in body, text
    text = "`tools` must not be an empty array. Either provide at least one tool or omit the field"
    yield "tools", body.get("tools") == [], f"{text} entirely."
    text = "When using `tool_choice`, `tools` must be set."
    yield "tool_choice", choice != "none" and not names, text
    text = "The tool specified in `tool_choice` does not match any of the specified `tools`"
    yield "tool_choice", choice not in ["none", "auto", "required", *named], text
    text = "The stand-in has only the structured outputs `choice` and `json`."
    yield "structured_outputs", {"choice", "json"}.isdisjoint(outputs), text
    for name in _LACKING.split():
        yield name, body.get(name), f"The stand-in does not have `{name}`."


def _check(body: Mapping[str, Any]) -> None:
    """Refuse what vLLM refuses in a request for generation, and what the stand-in lacks."""
    stops = body.get("stop", [])
    if isinstance(stops, list) and len(stops) > 4:
        text = f"List should have at most 4 items after validation, not {len(stops)}"
        raise _bad_body("body.stop", "too_long", text, stops)
    if "" in [*stops, stops]:
        raise _refusal("stop cannot contain an empty string.")
    if not isinstance(body.get("logprobs", 0), int):
        raise _bad_value("logprobs", body["logprobs"], "`logprobs` must be an integer.")

    for name, is_wrong, text in _conflicts(body):
        if is_wrong:
            raise _refusal(f"{text} (parameter={name})", name)
    _check_ranges(body)
    # Without a temperature the stand-in is greedy, whatever n.
    if body.get("n", 1) > 1 and body.get("temperature", 1) < 1e-5:
        raise _refusal(f"n must be 1 when using greedy sampling, got {body['n']}.")


def _check_ranges(body: Mapping[str, Any]) -> None:
    for name, minimum, maximum, template, has_name in _RANGES:
        value = body.get(name, maximum)
        if not minimum <= value <= maximum:
            value = float(value) if name in ("min_p", "temperature", "top_p") else value
            text = template.format(value)
            raise _bad_value(name, value, text) if has_name else _refusal(text)


def _token_limit(body: Mapping[str, Any], prompt: Sequence[int], is_text: bool) -> int:
    """Return how many tokens may follow `prompt`; a text is counted no further than it must be."""
    is_chat = "messages" in body
    default = MAX_MODEL_LEN if is_chat else 16
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    requested: int = body.get(name, default)
    if requested > MAX_MODEL_LEN:
        text = f"{name}={requested} cannot be greater than max_model_len={MAX_MODEL_LEN}."
        raise _bad_value(name, requested, f"{text} Please request fewer output tokens.")

    if len(prompt) > MAX_MODEL_LEN:
        count = MAX_MODEL_LEN + 1 if is_text else len(prompt)
        floor = "at least " if is_text else ""
        text = (
            f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, your prompt "
            f"contains {floor}{count} input tokens, which exceeds this limit even without any "
            "output tokens. Please reduce the length of the input prompt."
        )
        raise _bad_value("input_tokens", count, text)

    limit = min(requested, MAX_MODEL_LEN - len(prompt))
    minimum = 0 if body.get("echo") and not is_chat else 1
    if limit < minimum:
        raise _bad_value("max_tokens", limit, f"max_tokens must be at least 1, got {limit}.")
    return limit


# ---- Stand-in: conversations ------------------------------------------------


def _tool_schemas(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of each tool's arguments."""
    functions = [tool["function"] for tool in body.get("tools", [])]
    return {one["name"]: one.get("parameters", {"type": "object"}) for one in functions}


def _rendered(body: Mapping[str, Any], is_strict: bool) -> str:
    """Return the messages as ChatML; a strict template, as Qwen3.5's, wants the system first."""
    if not body["messages"]:
        text = "Cannot apply chat template to an empty conversation. Provide at least one message."
        raise _refusal(text)
    turns = []
    if "tools" in body:
        turns.append(("system", "\n".join(["# Tools", *_tool_schemas(body)])))
    for number, message in enumerate(body["messages"]):
        if is_strict and number > 0 and message["role"] == "system":
            raise _refusal("System message must be at the beginning.")
        turns.append(_turn(message))
    text = _turns(*turns)
    return text + TURN if body.get("add_generation_prompt", True) else text


def _turn(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return the role and the text of one message."""
    text = message.get("content") or ""
    if not isinstance(text, str):
        text = "".join(part.get("text", "") for part in text)
    for call in message.get("tool_calls") or []:
        text += "\n" + _called(call["function"]["name"], call["function"]["arguments"])
    if message["role"] == "tool":
        return "user", f"<tool_response>\n{text}\n</tool_response>"
    return message["role"], text


@dataclass(frozen=True)
class _Message:
    """An answer as vLLM's parsers `qwen3` and `hermes` split it; calls are names and arguments."""

    reasoning: str
    content: str
    calls: Sequence[tuple[str, str]]


_CALL: Final = re.compile(
    r'<tool_call>\n\{"name": "(\w+)",(?: "arguments": (.*?)(\}\n</tool_call>|$))?', re.DOTALL
)


def _split(text: str, body: Mapping[str, Any], is_whole: bool) -> _Message:
    """Return what the text of an answer means; of one that goes on, what is certain already."""
    reasoning = ""
    if text.startswith("<think>"):
        reasoning, _, text = text.removeprefix("<think>").partition("</think>")
    if "tools" not in body or body.get("tool_choice") == "none":
        return _Message(reasoning, text, [])

    calls = []
    for call in _CALL.finditer(text):
        name, arguments, end = call.groups("")
        if not end and is_whole:
            return _Message(reasoning, text, [])
        if not end:  # the last brace may be the call's own
            arguments = arguments.rstrip("\n").removesuffix("}")
        calls.append((name, arguments))
    return _Message(reasoning, text.partition("<tool_call>")[0], calls)


def _tool_call(**more: Any) -> dict[str, Any]:
    return {"id": f"chatcmpl-tool-{uuid.uuid4().hex[:16]}", "type": "function"} | more


def _delta(old: _Message, new: _Message) -> dict[str, Any]:
    """Return what a stream says when `old` has become `new`."""
    calls = []
    for index, (name, arguments) in enumerate(new.calls):
        if index >= len(old.calls):
            function = {"name": name, "arguments": arguments} if arguments else {"name": name}
            calls.append(_tool_call(index=index, function=function))
        elif arguments != old.calls[index][1]:
            added = arguments[len(old.calls[index][1]) :]
            calls.append({"index": index, "function": {"arguments": added}})
    if calls:
        return {"content": None, "tool_calls": calls}

    delta = {"reasoning": new.reasoning[len(old.reasoning) :]}
    delta["content"] = new.content[len(old.content) :]
    return {name: text for name, text in delta.items() if text}


# ---- Stand-in: answers in vLLM's shapes -------------------------------------

_VERSION: Final = "0.32.0-standin"
_FINGERPRINT: Final = f"vllm-{_VERSION}"
_COMPLETIONS_PATH: Final = "/v1/completions"
_CHAT_PATH: Final = "/v1/chat/completions"


def _pick(names: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return these names in this order, null where `values` has nothing."""
    return {name: values.get(name) for name in names.split()}


def _ranked(row: list[float], own: int, top: int, others: Sequence[int]) -> list[int]:
    """Return the token itself, then the `top` most likely ones, or the `others` asked for."""
    if not others:
        others = heapq.nlargest(top, range(len(row)), key=row.__getitem__)
    return list(dict.fromkeys([own, *others]))


def _prompt_logprobs(prompt: Sequence[int], top: int) -> list[dict[str, Any] | None]:
    """Return what the model had expected in place of each token of a prompt; of the first, null."""
    entries: list[dict[str, Any] | None] = [None]
    for place in range(1, len(prompt)):
        row = NGRAMS.after(prompt[:place])
        entry = {}
        for token in _ranked(row, prompt[place], top, []):
            rank = 1 + sum(probability > row[token] for probability in row)
            values = {"logprob": _logprob(row[token]), "rank": rank}
            entry[str(token)] = values | {"decoded_token": VOCABULARY.token(token)}
        entries.append(entry)
    return entries


class _Generation:
    """The choices a request asks for, in the shapes of its endpoint, whole or streamed."""

    def __init__(self, request: Request, is_strict: bool) -> None:
        self.is_chat = request.path == _CHAT_PATH
        required = ["messages"] if self.is_chat else []
        self.body = body = _decoded_body(request, *required)
        _check(body)
        self.is_stream = body.get("stream", False)
        self.has_ids = body.get("return_token_ids", False)
        self.has_usage = body.get("stream_options", {}).get("include_usage", False)
        # Token ids replace the echo.
        self.has_echo = body.get("echo", False) and not self.is_chat and not self.has_ids
        # On the completions endpoint False is 0, which switches log probabilities on.
        self.top: int | None = body.get("logprobs")
        if self.is_chat:
            self.top = body.get("top_logprobs", 0) if self.top else None

        self.choices = list(self._choices(is_strict))
        self.longest = max(len(choice.ids) - choice.echoed for choice in self.choices)
        number = request.headers.get("X-Request-Id") or uuid.uuid4().hex[:16]
        self.head: dict[str, Any] = {"id": f"cmpl-{number}", "object": "text_completion"}
        if self.is_chat:
            kind = "chat.completion.chunk" if self.is_stream else "chat.completion"
            self.head = {"id": f"chatcmpl-{number}", "object": kind}
        self.head |= {"created": int(time.time()), "model": MODEL}

    def _choices(self, is_strict: bool) -> Iterator[_Choice]:
        count = self.body.get("n", 1)
        for number, prompt in enumerate(self._prompts(is_strict)):
            is_text = isinstance(prompt, str)
            ids = VOCABULARY.ids(prompt) if is_text else prompt
            if max(ids) >= VOCABULARY.size:
                raise _refusal(f"Token id {max(ids)} is out of vocabulary")
            limit = _token_limit(self.body, ids, is_text)
            for index in range(number * count, (number + 1) * count):
                choice = _Choice(index, ids)
                if self.has_echo:
                    _echo(choice)
                _write(choice, self.body, limit)
                split = _split("".join(choice.texts), self.body, is_whole=True)
                is_named = isinstance(self.body.get("tool_choice"), dict)
                if split.calls and choice.finish_reason == "stop" and not is_named:
                    choice.finish_reason = "tool_calls"
                yield choice

    def _prompts(self, is_strict: bool) -> Sequence[Any]:
        if self.is_chat:
            return [_rendered(self.body, is_strict)]
        prompts = self.body.get("prompt")
        if not prompts:
            text = "Either prompt or prompt_embeds must be provided and non-empty."
            raise _refusal(f"{text} (parameter=prompt)", "prompt")
        is_one = isinstance(prompts, str) or isinstance(prompts[0], int)
        return [prompts] if is_one else prompts

    def check_logprobs(self) -> None:
        """Refuse too many log probabilities: vLLM's engine does so, once a stream has begun."""
        for kind, name, top in (
            ("sample", "logprobs", self.top),
            ("prompt", "prompt_logprobs", self.body.get("prompt_logprobs")),
        ):
            if top is not None and not 0 <= top <= MAX_LOGPROBS:
                count = VOCABULARY.size if top < 0 else top
                text = f"Requested {kind} logprobs of {count}, which is greater than max allowed"
                raise _bad_value(name, count, f"{text}: {MAX_LOGPROBS}")

    def payload(self) -> dict[str, Any]:
        """Return the whole reply."""
        names = "index text logprobs finish_reason stop_reason token_ids prompt_logprobs"
        names += " prompt_token_ids routed_experts"
        more = ""
        if self.is_chat:
            names = "index message logprobs finish_reason stop_reason token_ids routed_experts"
            more = "prompt_logprobs prompt_token_ids prompt_text"

        choices = [self._whole(choice) for choice in self.choices]
        values = choices[0] | {"choices": [_pick(names, one) for one in choices]}
        values |= {"system_fingerprint": _FINGERPRINT, "usage": self._usage()}
        names = f"choices service_tier system_fingerprint usage {more} kv_transfer_params"
        return self.head | _pick(f"{names} ec_transfer_params metrics", values)

    def _whole(self, choice: _Choice) -> dict[str, Any]:
        values = self._part(choice, 0, len(choice.ids))
        top = self.body.get("prompt_logprobs", self.top if self.has_echo else None)
        if top is not None:
            values["prompt_logprobs"] = _prompt_logprobs(choice.prompt, top)
        if self.is_chat:
            values["message"] = _message(_split(values["text"], self.body, is_whole=True))
        return values

    def chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream, those of several choices in turn."""
        for row in itertools.zip_longest(*map(self._chunks, self.choices)):
            yield from filter(None, row)
        if self.has_usage:
            last = {"choices": [], "usage": self._usage(), "system_fingerprint": _FINGERPRINT}
            yield self.head | last

    def _chunks(self, choice: _Choice) -> Iterator[dict[str, Any]]:
        names = "index text logprobs finish_reason stop_reason prompt_token_ids token_ids"
        if self.is_chat:
            names = "index delta logprobs finish_reason token_ids"
            yield self.head | self._opening(choice)

        split = _Message("", "", [])
        ends = range(choice.echoed + 1, len(choice.ids) + 1) or [choice.echoed]
        for start, end in itertools.pairwise([0, *ends]):
            is_last = end == len(choice.ids)
            part = self._part(choice, start, end)
            if self.is_chat:
                text = "".join(choice.texts[:end])
                before, split = split, _split(text, self.body, is_last)
                part["delta"] = _delta(before, split)
                if is_last:
                    names = "index delta logprobs finish_reason stop_reason token_ids"

            part = _pick(names, part)
            event = self.head | {"choices": [part]}
            if is_last and not self.has_usage:
                event["system_fingerprint"] = _FINGERPRINT
            if is_last or part.get("delta") != {} or part["logprobs"] or part["token_ids"]:
                yield event

    def _opening(self, choice: _Choice) -> dict[str, Any]:
        """Return the first event of a chat, which only names the role."""
        values = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
        prompt = choice.prompt if self.has_ids else None
        choices = [_pick("index delta logprobs finish_reason", values)]
        return {"choices": choices, "prompt_token_ids": prompt, "prompt_text": None}

    def _part(self, choice: _Choice, start: int, end: int) -> dict[str, Any]:
        """Return what tokens `start` to `end` of a choice bring."""
        values: dict[str, Any] = {"index": choice.index}
        values["text"] = "".join(choice.texts[start:end])
        if self.top is not None:
            values["logprobs"] = self._logprobs(choice, start, end)
        if self.has_ids:
            values["token_ids"] = choice.ids[start:end]
        if start == 0 and (self.has_ids or (self.has_echo and self.is_stream)):
            values["prompt_token_ids"] = choice.prompt
        if end == len(choice.ids):
            values |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return values

    def _logprobs(self, choice: _Choice, start: int, end: int) -> dict[str, Any]:
        entries = []
        for token, row in zip(choice.ids[start:end], choice.rows[start:end], strict=True):
            others = self.body.get("logprob_token_ids", [])
            ranked = _ranked(row, token, self.top or 0, others)
            entries.append([(self._name(one), _logprob(row[one])) for one in ranked])

        if self.is_chat:
            return {"content": [_chat_logprobs(entry, self.top or 0) for entry in entries]}
        tokens = [entry[0][0] for entry in entries]
        scores: list[float | None] = [entry[0][1] for entry in entries]
        tops: list[dict[str, float] | None] = [dict(entry) for entry in entries]
        if start < choice.echoed:  # nothing comes before the first token of a prompt
            scores[0] = tops[0] = None
        first = sum(len(self._name(token)) for token in choice.ids[:start])
        offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=first))
        values = {"text_offset": offsets, "token_logprobs": scores, "tokens": tokens}
        return values | {"top_logprobs": tops}

    def _name(self, token: int) -> str:
        if self.body.get("return_tokens_as_token_ids"):
            return f"token_id:{token}"
        return VOCABULARY.token(token)

    def _usage(self) -> dict[str, Any]:
        inputs = sum(len(choice.prompt) for choice in self.choices) // self.body.get("n", 1)
        # Where no token is wanted vLLM generates one all the same, and counts it.
        outputs = sum(max(1, len(choice.ids) - choice.echoed) for choice in self.choices)
        counts = {"prompt_tokens": inputs, "total_tokens": inputs + outputs}
        counts["completion_tokens"] = outputs

        cached = {"cached_tokens": 0, "created_cache_tokens": 0, "multimodal_tokens": None}
        thoughts = sum(map(_count_of_thoughts, self.choices))
        details = {"reasoning_tokens": thoughts} if self.is_chat else None
        return counts | {"prompt_tokens_details": cached, "completion_tokens_details": details}


def _message(split: _Message) -> dict[str, Any]:
    names = "role content refusal annotations audio function_call"
    message = _pick(names, {"role": "assistant", "content": split.content or None})
    if split.calls:
        message["content"] = None
        functions = [{"name": name, "arguments": text} for name, text in split.calls]
        message["tool_calls"] = [_tool_call(function=function) for function in functions]
    return message | {"reasoning": split.reasoning or None}


def _chat_logprobs(entry: Sequence[tuple[str, float]], top: int) -> dict[str, Any]:
    """Return a token and its alternatives as the chat endpoint shows them."""
    shown = []
    for token, logprob in entry:
        shown.append({"token": token, "logprob": logprob, "bytes": list(token.encode())})
    return shown[0] | {"top_logprobs": shown[:top]}


def _count_of_thoughts(choice: _Choice) -> int:
    """Return how many tokens are reasoning, the marks around it not counted."""
    thought, _, _ = VOCABULARY.raw(choice.ids).decode(errors="replace").partition("</think>")
    return len(VOCABULARY.ids(thought)) - 1 if thought.startswith("<think>") else 0


# ---- Stand-in: the server ---------------------------------------------------

_GETS: Final = ("/health", "/version", "/metrics", "/v1/models")
_POSTS: Final = (_COMPLETIONS_PATH, _CHAT_PATH, "/tokenize", "/detokenize")


class StandIn:
    """A stand-in for vLLM 0.32: its API in the real one's bytes, and misbehaviour on command.

    >>> with StandIn() as server:
    ...     server.script(reply(503, "busy", {"Retry-After": "0"}), None)
    ...     VLLMClient(server.url).complete("The capital of France is").text  # at the second try
    ' Paris.'
    """

    def __init__(
        self,
        port: int = 0,
        *,
        pace: float = 0.0,
        api_key: str | None = None,
        tls: tuple[str, str] | None = None,
        strict: bool = False,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        self.pace = pace  # seconds from token to token
        self.keep_alive_s = 5.0  # then an idle connection is closed
        self.requests: list[Request] = []
        self.aborted: queue.Queue[float] = queue.Queue()  # when a client left before its reply
        self.running = 0
        self.generated = 0  # tokens
        self._api_key = api_key
        self._is_strict = strict  # about the place of system messages
        self._log = log
        self._tls = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._steps: list[tuple[str, Step]] = []
        self._threads: dict[Connection, threading.Thread] = {}
        self._lock = threading.Lock()
        self._is_closing = False
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, end every thread; a busy step is given up after a second."""
        if self._is_closing:
            return
        self._is_closing = True
        with socket.socket() as waker:  # accept() wakes for a client and nothing else
            waker.connect(self._listener.getsockname())
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            threads = dict(self._threads)
        for connection in threads:
            connection.shut_down()
        for thread in threads.values():
            thread.join(1.0)

    def script(self, *steps: Step, path: str = "") -> None:
        """Take one step for each of the next requests whose path ends in `path`.

        A step is bytes to send, a function of the Connection, or None for the usual answer. The
        connection then takes the next request unless the step has closed it.
        """
        with self._lock:
            self._steps += [(path, step) for step in steps]

    def answer(self, connection: Connection) -> None:
        """Answer the connection's request as vLLM does; a step may call this."""
        request = connection.request
        key = request.headers.get("Authorization")
        try:
            is_allowed = self._api_key is None or key == f"Bearer {self._api_key}"
            if request.path.startswith("/v1") and not is_allowed:
                raise _RefusedError(401, {"error": "Unauthorized"})
            if request.path not in _GETS + _POSTS:
                raise _RefusedError(404, {"detail": "Not Found"})
            if request.method != ("GET" if request.path in _GETS else "POST"):
                raise _RefusedError(405, {"detail": "Method Not Allowed"})
            if request.path in (_COMPLETIONS_PATH, _CHAT_PATH):
                self._generate(connection)
            else:
                connection.send(reply(200, self._payload(request)))
        except _RefusedError as refusal:
            connection.send(reply(*refusal.args))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            text = f"The stand-in cannot read this: {error!r}"
            connection.send(reply(*_refusal(text, kind="Bad Request").args))

    def _generate(self, connection: Connection) -> None:
        generation = _Generation(connection.request, self._is_strict)
        if generation.is_stream:
            connection.send(SSE_HEAD)
            try:
                generation.check_logprobs()  # only now, too late for another status
                self._pace(connection, generation, map(chunk, generation.chunks()))
            except _RefusedError as refusal:
                connection.send(chunk(refusal.args[1]))
            connection.send(chunk("[DONE]") + LAST_CHUNK)
        else:
            generation.check_logprobs()
            self._pace(connection, generation, itertools.repeat(b"", generation.longest))
            connection.send(reply(200, generation.payload()))

    def _pace(
        self, connection: Connection, generation: _Generation, pieces: Iterable[bytes]
    ) -> None:
        """Send one piece after the other, in the time that the tokens take."""
        count = 0
        try:
            for piece in pieces:
                connection.send(piece)
                count = min(count + 1, generation.longest)
                connection.pause(self.pace)
        except ClientGoneError:
            with self._lock:
                self._log(f"stand-in: client left after {count} of {generation.longest} tokens")
            raise
        finally:
            with self._lock:
                self.generated += count

    def _payload(self, request: Request) -> Any:
        """Return what the endpoints say that generate nothing."""
        match request.path:
            case "/version":
                return {"version": _VERSION}
            case "/metrics":
                label = f'{{engine="0",model_name="{MODEL}"}}'
                running = f"vllm:num_requests_running{label} {self.running:.1f}\n"
                return f"{running}vllm:generation_tokens_total{label} {self.generated:.1f}\n"
            case "/v1/models":
                return {"object": "list", "data": [_model_card()]}
            case "/tokenize":
                return self._tokenized(_decoded_body(request))
            case "/detokenize":
                ids = _decoded_body(request, "tokens")["tokens"]
                return {"prompt": VOCABULARY.raw(ids).decode(errors="replace")}
        return b""

    def _tokenized(self, body: Mapping[str, Any]) -> dict[str, Any]:
        text = _rendered(body, self._is_strict) if "messages" in body else body.get("prompt")
        if not isinstance(text, str):
            raise _bad_body("body.prompt", "string_type", "Input should be a valid string", text)
        ids = VOCABULARY.ids(text)
        payload = {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids}
        texts = None
        if body.get("return_token_strs"):
            texts = [VOCABULARY.token(one).replace(" ", "Ġ").replace("\n", "Ċ") for one in ids]
        return payload | {"token_strs": texts}

    def _accept(self) -> None:
        for number in itertools.count(1):
            sock, _ = self._listener.accept()
            if self._is_closing:
                sock.close()
                return
            with contextlib.suppress(OSError):  # the client may have left already
                self._open(sock, number)

    def _open(self, sock: socket.socket, number: int) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls:  # the first read makes the handshake, in the connection's own thread
            sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        connection = Connection(sock, number, self._note_abort)
        thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
        with self._lock:
            self._threads[connection] = thread
        thread.start()

    def _note_abort(self) -> None:
        if not self._is_closing:
            self.aborted.put(time.monotonic())

    def _serve(self, connection: Connection) -> None:
        try:
            while not connection.closed and connection.read_request(self.keep_alive_s):
                self._take_step(connection)
        except ClientGoneError:
            pass
        finally:
            connection.close()
            with self._lock:
                del self._threads[connection]

    def _take_step(self, connection: Connection) -> None:
        request = connection.request
        is_run = request.path in (_COMPLETIONS_PATH, _CHAT_PATH)
        with self._lock:
            self.requests.append(request)
            step = self._next_step(request.path)
            self.running += is_run
        try:
            if isinstance(step, bytes):
                connection.send(step)
            else:
                (step or self.answer)(connection)
        finally:
            with self._lock:
                self.running -= is_run

    def _next_step(self, path: str) -> Step:
        for number, (end, step) in enumerate(self._steps):
            if path.endswith(end):
                del self._steps[number]
                return step
        return None


def _model_card() -> dict[str, Any]:
    created = int(time.time())
    card = {"id": MODEL, "object": "model", "created": created, "owned_by": "vllm"}
    card |= {"root": f"tiny/{MODEL}", "parent": None, "max_model_len": MAX_MODEL_LEN}
    permission = {"id": f"modelperm-{uuid.uuid4().hex[:16]}", "object": "model_permission"}
    permission["created"] = created
    for name in "create_engine sampling logprobs search_indices view fine_tuning".split():
        permission[f"allow_{name}"] = name in ("sampling", "logprobs", "view")
    permission |= {"organization": "*", "group": None, "is_blocking": False}
    return card | {"permission": [permission]}


# ---- Demo: its steps --------------------------------------------------------
#
# Each shows its own source, then what it prints. They use what any vLLM has.


def show_log_probabilities(client: VLLMClient) -> None:
    """Log probabilities: how sure the model was of each token, and what else was likely"""
    completion = client.complete(
        "The capital of France is", max_tokens=8, logprobs=3, temperature=0
    )
    for token in completion.logprobs:
        others = "  ".join(f"{other.token!r} {other.probability:.3f}" for other in token.top[1:])
        print(f"{token.token!r:>14} {token.probability:.3f}    not {others}")


def leave_a_stream(client: VLLMClient) -> None:
    """A stream left early: the server stops generating, and its own counter says so"""
    before = tokens_generated(client)
    with client.stream_complete(
        "Once upon a time", max_tokens=1000, ignore_eos=True, temperature=0
    ) as stream:
        for delta in itertools.islice(stream, 15):
            print(delta.text, end="", flush=True)
        print(" …")
    time.sleep(0.3)
    print(f"the server generated {tokens_generated(client) - before:.0f} of 1000 tokens")


@dataclass
class City:
    name: str
    country: str
    is_capital: bool

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:  # pydantic's classes have it
        kinds = {"name": "string", "country": "string", "is_capital": "boolean"}
        properties = {name: {"type": kind} for name, kind in kinds.items()}
        return {"type": "object", "properties": properties, "required": list(kinds)}


def fill_a_class(client: VLLMClient) -> None:
    """Structured output: a class goes in, an object of that class comes out"""
    question = "Which city is the capital of France?"
    print(client.chat(question, response_format=City, temperature=0).json(City))


CITY: Final = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Final = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}


def call_a_tool(client: VLLMClient) -> None:
    """A tool call: the model asks for the weather, is told, and answers"""
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    reply = client.chat(messages, tools=[WEATHER], temperature=0)
    [call] = reply.tool_calls
    print(call.name, call.parsed())
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 C"}
    messages += [reply.to_message(), result]
    print(client.chat(messages, tools=[WEATHER], temperature=0).text.strip())


def choose_an_answer(client: VLLMClient) -> None:
    """Multiple choice: how probable the model finds each answer"""
    for score in client.choose([" Paris", " Lyon", " Rome"], context="The capital of France is"):
        print(f"{score.text!r:>8} {score.probability:.3f}, log probability {score.logprob:.2f}")


def ask_many(client: VLLMClient) -> None:
    """Many prompts: 40 of them, 8 at a time, the answers in order"""
    prompts = [f"The capital of {country} is" for country in CAPITALS] * 10
    ask = functools.partial(client.complete, max_tokens=8, temperature=0)
    started = time.monotonic()
    replies = list(client.map(ask, prompts, concurrency=8, progress=True))
    seconds = time.monotonic() - started
    print([reply.text for reply in replies[:4]], "…")
    one_by_one = sum(reply.total_s for reply in replies)
    print(f"{len(replies)} replies in {seconds:.1f} s; one by one: {one_by_one:.1f} s")


def resume_a_batch(client: VLLMClient) -> None:
    """A batch file: interrupted by Ctrl-C, then resumed; nothing is asked twice"""
    source, target = Path("requests.jsonl"), Path("results.jsonl")
    line = json.dumps({"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0})
    source.write_text(f"{line}\n" * 60)
    timer = threading.Timer(1.0, press_ctrl_c)
    timer.start()
    try:
        client.run_batch(str(source), str(target), concurrency=8)
    except KeyboardInterrupt:
        print(f"^C: {target} has {len(target.read_text().splitlines())} lines")
    timer.cancel()
    print(client.run_batch(str(source), str(target), concurrency=8))


def explain_an_error(client: VLLMClient) -> None:
    """An error: what happened, and what to do about it"""
    try:
        client.complete("Hello", model="gpt-4")
    except VLLMError as error:
        print(f"{type(error).__name__}: {error}")


def draw_a_heat_map(client: VLLMClient) -> None:
    """A heat map: one HTML file, each token in the colour of its probability"""
    completion = client.complete("Once upon a time", max_tokens=60, logprobs=5, temperature=0)
    page = Path("heat_map.html")
    page.write_text(vllm_provider.to_html(completion, "Once upon a time"), encoding="utf-8")
    print(page.resolve())


STEPS: Final = (
    show_log_probabilities,
    leave_a_stream,
    fill_a_class,
    call_a_tool,
    choose_an_answer,
    ask_many,
    resume_a_batch,
    explain_an_error,
    draw_a_heat_map,
)


def tokens_generated(client: VLLMClient) -> float:
    """Return how many tokens the server has generated since it started."""
    metrics = requests.get(f"{client.config.base_url}/metrics", timeout=10).text
    return sum(map(float, re.findall(r"(?m)^vllm:generation_tokens_total\{.*\} (.*)$", metrics)))


def press_ctrl_c() -> None:
    """Interrupt this process as the keyboard does."""
    if os.name == "nt":
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)


# ---- Demo: how it runs ------------------------------------------------------


def run_step(step: Callable[[VLLMClient], None], client: VLLMClient, is_stand_in: bool) -> bool:
    """Show and run one step; return whether the server could do it."""
    bold, dim, plain = ("\033[1m", "\033[2m", "\033[0m")
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        bold = dim = plain = ""
    source = textwrap.indent(inspect.getsource(step).partition('"""\n')[2].rstrip(), dim)
    print(f"\n{bold}{inspect.getdoc(step)}{plain}\n{source}{plain}", flush=True)
    try:
        step(client)
    except (VLLMError, ValueError) as error:
        if is_stand_in:
            raise
        print(f"skipped: {error}")
        return False
    return True


def run_demo(url: str, *, is_stand_in: bool) -> int:
    """Run all steps against a server; return the exit code."""
    folder = tempfile.mkdtemp(prefix="vllm-provider-")  # it stays, for the heat map
    with contextlib.chdir(folder), VLLMClient(url) as client:
        worked = [step for step in STEPS if run_step(step, client, is_stand_in)]

    print(f"\n{len(worked)} of {len(STEPS)} worked:")
    for step in worked:
        print(f"* {inspect.getdoc(step)}")
    if is_stand_in:
        print("\nThe same with your own server:")
        print("VLLM_BASE_URL=http://localhost:8000 python test_vllm_provider.py")
    return 0


def demo(argv: Sequence[str] | None = None) -> int:
    """Show what vllm_provider does, or keep the stand-in up; return the exit code."""
    parser = argparse.ArgumentParser(description=demo.__doc__)
    parser.add_argument("--serve", type=int, metavar="PORT", help="keep the stand-in up")
    parser.add_argument("--pace", type=float, default=0.02, help="seconds a token (%(default)s)")
    options = parser.parse_args(argv)
    port = options.serve
    url = os.environ.get("VLLM_BASE_URL")
    if port is None and url:
        return run_demo(url, is_stand_in=False)

    with StandIn(port or 0, pace=options.pace, log=print) as server:
        count = len({*TEXTS, *CONVERSATIONS})
        print(
            f"A stand-in for vLLM is up at {server.url}: its tiny n-gram model has read {count} "
            "texts and knows nothing else.",
            flush=True,
        )
        if port is None:
            return run_demo(server.url, is_stand_in=True)
        print(f'Try: vllm-provider --base-url {server.url} chat "What is 2+2?"', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(demo())  # the tests below need pytest, amplifier-core and others

# ---- What the tests share ---------------------------------------------------

# What the stand-in needs is imported above.
import ast
import asyncio
import base64
import contextvars
import copy
import dataclasses
import email.utils
import errno
import gc
import html.parser
import logging
import pickle
import pty
import select
import shlex
import subprocess
import traceback
import tracemalloc
import types
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from datetime import UTC, datetime, timedelta

import certifi
import pytest
import responses
from amplifier_core import (
    AmplifierSession,
    ChatRequest,
    ConfigField,
    Message,
    ModelInfo,
    ProviderInfo,
    llm_errors,
)
from amplifier_core.content_models import TextContent, ThinkingContent, ToolCallContent
from amplifier_core.events import ALL_EVENTS
from amplifier_core.message_models import (
    ChatResponse,
    Degradation,
    ResponseFormatJson,
    ResponseFormatJsonSchema,
    ResponseFormatText,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
    ToolSpec,
)
from amplifier_core.message_models import ToolCall as KernelToolCall
from amplifier_core.message_models import Usage as KernelUsage
from amplifier_core.testing import MockCoordinator
from amplifier_core.validation import ProviderValidator
from amplifier_core.validation.behavioral import ProviderBehaviorTests
from amplifier_core.validation.structural import ProviderStructuralTests

from vllm_provider import (
    CHAT_PATH,
    COMPLETIONS_PATH,
    AbortError,
    AccessDeniedError,
    AuthenticationError,
    BatchReport,
    Choice,
    Completion,
    ConfigurationError,
    ContextLengthError,
    Delta,
    InvalidOutputError,
    InvalidRequestError,
    InvalidToolCallError,
    LLMTimeoutError,
    ModelCard,
    NetworkError,
    NotFoundError,
    ProtocolError,
    ProviderUnavailableError,
    RateLimitError,
    Score,
    StatusError,
    Stream,
    StreamError,
    TokenLogprob,
    ToolCall,
    Usage,
    VLLMConfig,
    VLLMProvider,
    _CallGroup,
    _Clock,
    _HarmonySplitter,
    _read_overflow,
    _RequestFacts,
    _SSEDecoder,
    _ThinkSplitter,
    build_chat_request,
    build_completion_request,
    main,
    mount,
    on_session_ready,
    parse_chat_response,
    parse_completion_response,
    request_options,
    to_html,
)

WEB: Final = "http://vllm.test"
COMPLETIONS_URL: Final = f"{WEB}/v1/completions"
CHAT_URL: Final = f"{WEB}/v1/chat/completions"
MODELS_URL: Final = f"{WEB}/v1/models"
TOKENIZE_URL: Final = f"{WEB}/tokenize"
SECRET: Final = "hunter2-XYZ"
DONE: Final = "data: [DONE]\n\n"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Keep the machine's own server out of every test."""
    for name in (
        "VLLM_BASE_URL",
        "VLLM_API_KEY",
        "http_proxy",
        "HTTP_PROXY",
        "https_proxy",
        "HTTPS_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def web():
    """A web that answers what it is told to and nothing else."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


def web_client(**settings):
    return VLLMClient(WEB, **{"default_model": "parrot", "max_retries": 0, **settings})


def sent_bodies(web, url=None):
    return [
        json.loads(call.request.body)
        for call in web.calls
        if url is None or call.request.url == url
    ]


def changed(value, **fields):
    """Return a value with other fields, be it a dataclass or a named tuple."""
    return (
        value._replace(**fields)
        if isinstance(value, tuple)
        else dataclasses.replace(value, **fields)
    )


def caught(function, *args, **options) -> VLLMError:
    """Return the error of this module that a call raises."""
    with pytest.raises(VLLMError) as info:
        function(*args, **options)
    return info.value


def told(error: BaseException) -> str:
    """Return everything a user may see of an exception: its traceback, and what its causes hold."""
    text, chain = "".join(traceback.format_exception(error)), error
    while chain is not None:
        text += f"{chain!r} {chain.args!r} {getattr(chain, '__dict__', {})!r}"
        chain = chain.__cause__ or chain.__context__
    return text


# ---- Stand-in: its tests ----------------------------------------------------


CHAT_OF_STAND_IN: Final = {"messages": [{"role": "user", "content": "Hello"}]}


def posted(server, path="/v1/completions", **body):
    """Return status and payload of a request that no client has touched."""
    http_reply = requests.post(server.url + path, json=body, timeout=20)
    return http_reply.status_code, http_reply.json()


def choice_of(server, path="/v1/completions", **body):
    """Return the first choice of a reply that must be one."""
    status, payload = posted(server, path, **body)
    assert status == 200, payload
    return payload["choices"][0]


@pytest.mark.parametrize(
    ("system", "user", "thought", "answer"),
    [pytest.param(*one, id=one[2]) for one in CONVERSATIONS if NOT_READ not in one[1]],
)
def test_stand_in_knows_its_conversations_by_heart(system, user, thought, answer, server):
    turns = [turn for turn in (("system", system), ("user", user)) if turn[1]]
    choice = choice_of(server, prompt=_turns(*turns) + TURN, max_tokens=500, temperature=0)
    assert (choice["text"], choice["finish_reason"]) == (
        f"<think>\n{thought}\n</think>{answer}",
        "stop",
    )


@pytest.mark.parametrize(
    "text", ["", "The capital of France is", "zzz", "is The of", f"{TURN}<think>", "é🌸"]
)
def test_stand_in_gives_every_token_a_probability(text):
    row = NGRAMS.after(VOCABULARY.ids(text))
    assert (len(row), min(row) > 0) == (VOCABULARY.size, True)
    assert math.fsum(row) == pytest.approx(1)


def test_stand_in_has_one_distribution_for_all_it_says(server):
    prompt, token = "The capital of France is", VOCABULARY.ids(" Paris")[0]
    sampled = choice_of(server, prompt=prompt, max_tokens=1, temperature=0, logprobs=0)["logprobs"]
    [expected] = sampled["token_logprobs"]
    options = {"logprobs": 0, "logprob_token_ids": [token], "return_tokens_as_token_ids": True}
    by_id = choice_of(server, prompt=prompt, max_tokens=1, seed=3, temperature=2, **options)[
        "logprobs"
    ]
    echoed = choice_of(server, prompt=f"{prompt} Paris", echo=True, max_tokens=0, logprobs=0)
    scored = choice_of(server, prompt=f"{prompt} Paris", prompt_logprobs=0, max_tokens=1)
    said = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, "temperature": 0}
    chat = choice_of(server, _CHAT_PATH, **said, logprobs=True)["logprobs"]["content"]
    raw = choice_of(server, prompt=_rendered(said, False), max_tokens=1, temperature=0, logprobs=0)

    assert by_id["top_logprobs"][0][f"token_id:{token}"] == expected
    assert echoed["logprobs"]["token_logprobs"][-1] == expected
    assert scored["prompt_logprobs"][-1][str(token)] == {
        "logprob": expected,
        "rank": 1,
        "decoded_token": " Paris",
    }
    assert [chat[0]["logprob"]] == raw["logprobs"]["token_logprobs"]


def test_stand_in_expects_a_sentence_more_than_its_words_in_another_order(server):
    def logprob(text):
        entries = choice_of(server, prompt=text, prompt_logprobs=0, max_tokens=1)["prompt_logprobs"]
        return sum(value["logprob"] for entry in entries[1:] for value in entry.values())

    assert logprob("The capital of Italy is Rome.") > logprob("The is Rome of Italy capital.") + 10


def test_stand_in_draws_as_it_is_told(server):
    def text(**options):
        return choice_of(server, prompt="The capital of", max_tokens=30, **options)["text"]

    greedy = text()
    assert (
        text(temperature=1, top_k=1)
        == text(temperature=2, top_p=0.01)
        == text(temperature=1, min_p=1)
        == greedy
    )
    assert text(temperature=1, seed=7) == text(temperature=1, seed=7)
    assert len({text(temperature=1, seed=seed) for seed in range(10)}) > 3
    _, payload = posted(server, prompt="The capital of", max_tokens=30, temperature=1, seed=7, n=3)
    assert [choice["text"] for choice in payload["choices"]] == [
        text(temperature=1, seed=seed) for seed in (7, 8, 9)
    ]


PERSON: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 18},
        "role": {"enum": ["cook", "pilot"]},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/Name"}},
        "note": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
        "kind": {"const": "person"},
    },
    "$defs": {"Name": {"type": "string"}},
}


def test_stand_in_writes_what_a_schema_allows(server):
    options = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    }
    person = json.loads(choice_of(server, prompt="x", max_tokens=200, **options)["text"])
    assert list(person) == list(PERSON["properties"])
    assert (person["age"], person["role"] in ("cook", "pilot"), person["kind"]) == (
        18,
        True,
        "person",
    )
    assert isinstance(person["name"], str)
    assert [type(friend) for friend in person["friends"]] == [str]


def test_stand_in_writes_one_of_the_choices_after_its_reasoning(server):
    choices = {"structured_outputs": {"choice": ["ja", "né 🌸"]}}
    texts = [
        choice_of(server, prompt="x", temperature=1, seed=seed, **choices)["text"]
        for seed in range(20)
    ]
    assert set(texts) == {"ja", "né 🌸"}
    message = choice_of(server, _CHAT_PATH, **CHAT_OF_STAND_IN, **choices)["message"]
    assert (message["reasoning"], message["content"] in texts) == ("\nA greeting.\n", True)


@pytest.mark.parametrize(
    ("choice", "finish_reason"),
    [
        pytest.param("auto", "tool_calls", id="auto"),
        pytest.param("required", "tool_calls", id="required"),
        pytest.param({"type": "function", "function": {"name": "get_weather"}}, "stop", id="named"),
        pytest.param("none", "stop", id="none"),
    ],
)
def test_stand_in_calls_tools(choice, finish_reason, server):
    said = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
    }
    reply = choice_of(server, _CHAT_PATH, **said, tool_choice=choice)
    calls = [call["function"] for call in reply["message"].get("tool_calls", [])]
    assert reply["finish_reason"] == finish_reason
    assert calls == [{"name": "get_weather", "arguments": '{"city": "Paris"}'}] * (choice != "none")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"prompt": "Once upon a time", "max_tokens": 30, "stop": ["count", "zzz"]},
            id="stop-string",
        ),
        pytest.param(
            {"prompt": "Once upon a time", "stop_token_ids": VOCABULARY.ids(" model")},
            id="stop-token",
        ),
        pytest.param({"prompt": "Count to 100.", "max_tokens": 7, "ignore_eos": True}, id="length"),
        pytest.param(
            {"prompt": "né 🌸", "echo": True, "max_tokens": 0, "logprobs": 2}, id="echo-alone"
        ),
        pytest.param(
            {"prompt": ["What is 2+2?", "Hello"], "echo": True, "logprobs": 1}, id="two-prompts"
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": "Say hello in Japanese."}]},
            id="split-characters",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": _BOTH}], "tools": [WEATHER]}, id="tool-calls"
        ),
    ],
)
def test_stand_in_streams_what_it_says_whole(options, server, connect):
    client = connect(server, default_model=None)
    is_chat = "messages" in options
    ask, stream = (
        (client.chat, client.stream_chat) if is_chat else (client.complete, client.stream_complete)
    )
    input_ = options["messages" if is_chat else "prompt"]
    rest = {name: value for name, value in options.items() if name not in ("messages", "prompt")}
    whole = ask(input_, **rest)
    with stream(input_, **rest) as parts:
        streamed = "".join(delta.text for delta in parts if delta.index == 0)

    def content(completion):
        """Return what both kinds of reply have."""
        choices = []
        for choice in completion.choices:
            calls = [(call.name, call.arguments) for call in choice.tool_calls]
            text = (
                choice.text.strip() if calls else choice.text
            )  # the line breaks around calls are streamed
            tokens = [(token.token, token.logprob) for token in choice.logprobs or ()]
            choices.append(
                (text, choice.reasoning, calls, tokens, choice.finish_reason, choice.stop_reason)
            )
        return choices, completion.usage

    assert content(parts.completion) == content(whole)
    assert "\ufffd" not in streamed


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        pytest.param(
            {"temperature": "warm"},
            "body.temperature",
            "unable to parse string as a number",
            id="warm",
        ),
        pytest.param(
            {"temperature": -1}, "temperature", "must be non-negative, got -1.0.", id="negative"
        ),
        pytest.param({"n": 0}, None, "n must be at least 1, got 0.", id="n-0"),
        pytest.param(
            {"n": 2, "temperature": 0}, None, "n must be 1 when using greedy sampling", id="greedy"
        ),
        pytest.param(
            {"stop": list("abcde")},
            "body.stop",
            "at most 4 items after validation, not 5",
            id="stops",
        ),
        pytest.param({"stop": 7}, "body.stop", "Input should be a valid string", id="stop-7"),
        pytest.param(
            {"max_tokens": 1.5}, "body.max_tokens", "with a fractional part", id="fraction"
        ),
        pytest.param({"logprobs": 21}, "logprobs", "greater than max allowed: 20", id="logprobs"),
        pytest.param(
            {"stream_options": {}}, "stream_options", "only be defined when", id="no-stream"
        ),
        pytest.param(
            {"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "not available", id="stream"
        ),
        pytest.param(
            {"stream": True, "use_beam_search": True}, "use_beam_search", "", id="beam-search"
        ),
        pytest.param(
            {"logprob_token_ids": [5]},
            "logprob_token_ids",
            "`logprobs` must be set",
            id="no-logprobs",
        ),
        pytest.param({"prompt": [10**6]}, None, "is out of vocabulary", id="ids"),
        pytest.param({"messages": []}, None, "empty conversation", id="no-messages"),
        pytest.param(
            {**CHAT_OF_STAND_IN, "tools": []}, "tools", "must not be an empty array", id="no-tools"
        ),
        pytest.param(
            {**CHAT_OF_STAND_IN, "tool_choice": "auto"},
            "tool_choice",
            "`tools` must be set",
            id="choice",
        ),
        pytest.param(
            {**CHAT_OF_STAND_IN, "top_logprobs": 1}, "top_logprobs", "must be set to true", id="top"
        ),
        pytest.param(
            {"messages": [{"content": "x"}]}, None, "KeyError('role')", id="whatever-it-cannot-read"
        ),
        pytest.param([1], "body", "valid dictionary", id="no-object"),
    ],
)
def test_stand_in_refuses_what_vllm_refuses(body, param, message, server):
    path = _CHAT_PATH if "messages" in body else _COMPLETIONS_PATH
    if isinstance(body, dict) and path == _COMPLETIONS_PATH:
        body = {"prompt": "Hello", **body}
    http_reply = requests.post(server.url + path, json=body, timeout=20)
    error = http_reply.json()["error"]
    assert (http_reply.status_code, error["code"], error["param"]) == (400, 400, param)
    assert message in error["message"]


@pytest.mark.parametrize("path", [_CHAT_PATH, "/tokenize"])
def test_stand_in_can_be_strict_about_system_messages(path):
    messages = [{"role": "user", "content": "Hello"}, {"role": "system", "content": "Be brief."}]
    with StandIn(strict=True) as server:
        status, payload = posted(server, path, messages=messages)
        assert (status, payload["error"]["message"]) == (
            400,
            "System message must be at the beginning.",
        )
        assert posted(server, path, messages=messages[::-1])[0] == 200


@contextlib.contextmanager
def copied_pair(folder, *argv):
    """Run a copy of both files, as somebody does who has only requests."""
    for path in (Path(__file__), Path(vllm_provider.__file__)):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("amplifier_core", "pytest", "responses"):
        (folder / f"{name}.py").write_text("raise ImportError('as if it were not installed')")
    command = [sys.executable, "-W", "error", Path(__file__).name, *argv]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "encoding": "utf-8",
    }
    with subprocess.Popen(command, cwd=folder, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def test_stand_in_is_served_from_a_copied_pair_of_files(tmp_path):
    with copied_pair(tmp_path, "--serve", "0") as process:
        url = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        assert requests.get(f"{url}/version", timeout=20).json() == {"version": "0.32.0-standin"}
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert (process.wait(20), process.stderr.read()) == (0, "")


def test_demo_shows_what_it_promises(tmp_path):
    with copied_pair(tmp_path, "--pace", "0.01") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    for shown in (
        "' Paris' 0.735",
        "stand-in: client left after 15 of 1000 tokens\nthe server generated 15 of 1000 tokens",
        "City(name='Paris', country='France', is_capital=True)",
        "get_weather {'city': 'Paris'}\nIt is sunny in Paris, 21 C.",
        "[' Paris.', ' Rome.', ' Tokyo.', ' Madrid.'] …\n40 replies",
        "NotFoundError: model not found: 'gpt-4'",
        f"{len(STEPS)} of {len(STEPS)} worked:",
    ):
        assert shown in out
    done, skipped = re.search(r"60 lines: (\d+) done, 0 failed, (\d+) skipped", out).groups()
    assert int(done) + int(skipped) == 60
    assert Path(re.search(r"^/.*heat_map\.html$", out, re.MULTILINE)[0]).stat().st_size > 1000


row: Final = pytest.param


def table(names: str, *rows: Any, **options: Any) -> pytest.MarkDecorator:
    """Return a decorator that runs a test for each row of values; `names` has blanks between."""
    return pytest.mark.parametrize(names.replace(" ", ","), rows, **options)


whole_and_stream: Final = table("is_stream", row(False, id="whole"), row(True, id="stream"))
http_and_https: Final = table("tls", row(False, id="http"), row(True, id="https"), indirect=True)
PROMPT: Final = "The capital of France is"
NEVER: Final = 30.0  # seconds: a limit that no test reaches
IN_TIME: Final = 3.0  # seconds: what "at once" may take on a busy machine
LIMIT: Final = 0.15  # seconds: the limit that is to hold
VLLM_LIVE_URL: Final = os.environ.get("VLLM_LIVE_URL", "")

# Self-signed for 127.0.0.1, localhost and vllm.test, valid from 2020 to 2120; no secret.
TLS_CERTIFICATE: Final = """\
-----BEGIN CERTIFICATE-----
MIIBgTCCASagAwIBAgIBATAKBggqhkjOPQQDAjATMREwDwYDVQQDDAhzdGFuZC1p
bjAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowEzERMA8GA1UEAwwI
c3RhbmQtaW4wWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASyk25t6kf5hE+JhVE3
EKmB0GDaC1tiGMCjMI+ILoSWcjKzEV0xgLsAO4s2Lhqne2/Q2SSui4IBQ7lfSKqP
4Ndno2kwZzAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4E
FgQUKH1URpYUrqe3kklKCRrRJSgkg+MwJQYDVR0RBB4wHIcEfwAAAYIJbG9jYWxo
b3N0ggl2bGxtLnRlc3QwCgYIKoZIzj0EAwIDSQAwRgIhAOcl6wbaT8F2fZF5rChP
miNF7r7d7mEBPYdtF9tjvz8sAiEAhVm+2/fdPd+Z2H0s1THWvbiTeRl+TErvq6m7
5fJpxlM=
-----END CERTIFICATE-----
"""
TLS_KEY: Final = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg5NyS+oHf+qgmzYj/
baroAPdCgjuhw9UCtzGtLXnUC+OhRANCAASyk25t6kf5hE+JhVE3EKmB0GDaC1ti
GMCjMI+ILoSWcjKzEV0xgLsAO4s2Lhqne2/Q2SSui4IBQ7lfSKqP4Ndn
-----END PRIVATE KEY-----
"""


def text_event(text: str, **fields: Any) -> dict[str, Any]:
    """Return a reply, or an event, of `/v1/completions` with its least fields."""
    return {"choices": [{"index": 0, "text": text, **fields}]}


def error_payload(message: str, code: int = 400) -> dict[str, Any]:
    """Return an error as vLLM sends it since 0.10.1."""
    return {"error": {"message": message, "type": "Error", "param": None, "code": code}}


def model_list(*names: str, **fields: Any) -> dict[str, Any]:
    """Return a reply of `/v1/models`."""
    cards = [{"id": name, "object": "model", **fields} for name in names]
    return {"object": "list", "data": cards}


def generate(client: VLLMClient, is_stream: bool, prompt: Any = "x", **params: Any) -> list[Any]:
    """Return the deltas of a completion, or its choices where it is not streamed."""
    if is_stream:
        return list(client.stream_complete(prompt, **params))
    return list(client.complete(prompt, **params).choices)


def texts_of(parts: Iterable[Any]) -> list[str]:
    return [part.text for part in parts]


def wait_until(is_so: Callable[[], object], timeout_s: float = 10.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_at, "it has not happened in time"
        time.sleep(0.001)


@contextlib.contextmanager
def at_once(limit_s: float = 0.9) -> Iterator[None]:
    """Fail where the block takes longer."""
    started_at = time.monotonic()
    yield
    assert time.monotonic() - started_at < limit_s


@contextlib.contextmanager
def after_limit() -> Iterator[None]:
    """Fail where the block ends before LIMIT, or much later."""
    started_at = time.monotonic()
    yield
    assert LIMIT * 0.9 <= time.monotonic() - started_at < IN_TIME


class InThread:
    """A function that runs in a thread of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._outcome: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(
            target=self._run, args=(function, args, options), daemon=True
        )
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: Any, options: Any) -> None:
        try:
            self._outcome.put(function(*args, **options))
        except BaseException as error:  # noqa: BLE001 - it is the outcome
            self._outcome.put(error)

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def outcome(self, timeout_s: float = 10.0) -> Any:
        """Return what the function returned or raised, once its thread has ended."""
        outcome = self._outcome.get(timeout=timeout_s)
        self._thread.join(timeout_s)
        assert not self.is_running()
        return outcome


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as one:
        yield one


@pytest.fixture
def tls(request: pytest.FixtureRequest) -> bool:
    """Return whether the fixture `either_server` speaks TLS."""
    return bool(request.param)


@pytest.fixture
def either_server(tls: bool, tls_files: tuple[str, str]) -> Iterator[StandIn]:
    with StandIn(tls=tls_files if tls else None) as one:
        yield one


@pytest.fixture
def tls_server(tls_files: tuple[str, str]) -> Iterator[StandIn]:
    with StandIn(tls=tls_files) as one:
        yield one


@pytest.fixture
def connect(
    monkeypatch: pytest.MonkeyPatch, tls_files: tuple[str, str]
) -> Iterator[Callable[..., VLLMClient]]:
    """Return a function that makes a client of a StandIn or a URL; it retries fast.

    The environment names no proxy, and the stand-in's certificate is trusted.
    """
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"):
        monkeypatch.delenv(name, raising=False)

    with contextlib.ExitStack() as stack:

        def make(server: StandIn | str, **settings: Any) -> VLLMClient:
            url = server if isinstance(server, str) else server.url
            defaults = {"default_model": MODEL, "min_retry_delay": 0.01}
            if url.startswith("https"):
                defaults["verify"] = tls_files[0]
            return stack.enter_context(VLLMClient(url, **{**defaults, **settings}))

        yield make


class Retries(logging.Handler):
    """The pauses before retries, in seconds; `on_retry` is called before each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.pauses: list[float] = []
        self.on_retry: Callable[[], object] = lambda: None

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("retry"):
            self.pauses.append(record.args[2])
            self.on_retry()


@pytest.fixture
def retries() -> Iterator[Retries]:
    handler = Retries()
    vllm_provider.logger.addHandler(handler)
    yield handler
    vllm_provider.logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the paths of the certificate and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_text(TLS_CERTIFICATE)
    (folder / "key.pem").write_text(TLS_KEY)
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture
def test_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vllm.test and other.test be this machine, which no rule for loopback knows."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **options: Any) -> Any:
        return look_up("127.0.0.1" if str(host).endswith(".test") else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def port_of(server: StandIn) -> int:
    return int(server.url.rpartition(":")[2])


def url_of(listener: socket.socket, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"


def closed_port() -> int:
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def send_and_close(raw: bytes) -> Step:
    """Return a step that sends `raw` and closes the connection."""
    return lambda connection: (connection.send(raw), connection.close())


def echo_prompt(connection: Connection) -> None:
    """Answer with the prompt: a swapped answer shows."""
    connection.pause(0.005)
    connection.send(reply(200, text_event(connection.request.body["prompt"])))


def repeat(piece: bytes, first: bytes = SSE_HEAD, every_s: float = 0.02, count: int = 500) -> Step:
    """Return a step that sends `first`, then `piece` so many times, with pauses."""

    def step(connection: Connection) -> None:
        connection.send(first)
        for _ in range(count):
            connection.send(piece)
            connection.pause(every_s)
        connection.sleep_until_closed()

    return step


def start_python(code: str, *args: str, cwd: str | None = None) -> subprocess.Popen[str]:
    """Return a Python that runs `code`, with this vllm_provider to import."""
    folder = str(Path(vllm_provider.__file__).parent)
    env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", code, *args]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_python(code: str, *args: str) -> str:
    """Return what such a Python prints."""
    with start_python(code, *args) as process:
        return process.communicate(timeout=30)[0]


# ---- Module identity --------------------------------------------------------

ERROR_TREE: Final = {
    "VLLMError": ("Exception",),
    "ConfigurationError": ("VLLMError", "ValueError"),
    "NetworkError": ("VLLMError",),
    "LLMTimeoutError": ("VLLMError",),
    "StreamError": ("VLLMError",),
    "AbortError": ("VLLMError",),
    "InvalidToolCallError": ("VLLMError",),
    "InvalidOutputError": ("VLLMError", "ValueError"),
    "ProtocolError": ("VLLMError",),
    "StatusError": ("VLLMError",),
    "AuthenticationError": ("StatusError",),
    "AccessDeniedError": ("AuthenticationError",),
    "NotFoundError": ("StatusError",),
    "InvalidRequestError": ("StatusError",),
    "ContextLengthError": ("StatusError",),
    "RateLimitError": ("StatusError",),
    "ProviderUnavailableError": ("StatusError",),
}
RETRYABLE: Final = {
    *("NetworkError", "LLMTimeoutError", "StreamError"),
    *("RateLimitError", "ProviderUnavailableError"),
}
PUBLIC: Final = {
    *ERROR_TREE,
    *("VLLMConfig", "VLLMClient", "Stream", "Completion", "Choice", "TokenLogprob", "Delta"),
    *("ToolCall", "Usage", "ModelCard", "Score", "BatchReport", "to_html"),
    *("VLLMProvider", "mount", "on_session_ready", "request_options", "main"),
    *("build_completion_request", "build_chat_request"),
    *("parse_completion_response", "parse_chat_response"),
}


def module_source() -> str:
    return Path(vllm_provider.__file__).read_text(encoding="utf-8")


def test_all_is_the_public_interface_sorted():
    assert vllm_provider.__all__ == sorted(PUBLIC)


def test_a_class_or_function_is_public_or_starts_with_an_underscore():
    names = {node.name for node in ast.parse(module_source()).body if hasattr(node, "name")}
    assert {name for name in names if not name.startswith("_")} == PUBLIC


def test_version_is_a_literal_that_packaging_reads_without_importing():
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', module_source(), re.MULTILINE)
    assert vllm_provider.__version__ == version


def public_members(name: str) -> Iterator[tuple[str, Any]]:
    """Yield a public name and, of a class, its public methods and properties."""
    thing = getattr(vllm_provider, name)
    yield name, thing
    for key, value in vars(thing).items() if inspect.isclass(thing) else ():
        member = getattr(value, "__func__", value)
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
            yield f"{name}.{key}", member


@table("name", *sorted(PUBLIC))
def test_every_public_name_and_method_has_a_docstring(name):
    for key, member in public_members(name):
        text = member.__doc__ or ""
        assert text.strip(), key
        assert not text.startswith(f"{name}("), key  # what dataclass puts there


def test_importing_it_imports_nothing_that_few_need_and_configures_no_logging():
    code = """
import logging, sys, vllm_provider
print({"amplifier_core", "asyncio", "argparse"} & set(sys.modules))
one = logging.getLogger("vllm_provider")
print(logging.root.handlers, logging.root.level, one.handlers, one.level, one.propagate)
"""
    assert run_python(code) == "set()\n[] 30 [] 0 True\n"


@table(
    "name version message",
    row("requests", "2.32.3", "requests 2.32.4 or newer, got 2.32.3", id="requests"),
    row("requests", "2.32", "requests 2.32.4 or newer, got 2.32", id="two-numbers"),
    row("urllib3", "2.2.9", "urllib3 2.3 or newer, got 2.2.9", id="urllib3"),
    row("urllib3", "1.26.20", "urllib3 2.3 or newer, got 1.26.20", id="urllib3-1"),
    row("requests", "2.33.0.dev1", None, id="development-version"),
    row("urllib3", "2.10", None, id="numbers-are-not-compared-as-text"),
)
def test_a_dependency_that_is_too_old_is_one_sentence(name, version, message):
    code = f"""
import {name}
{name}.__version__ = {version!r}
try:
    import vllm_provider
except ImportError as error:
    print(error, end="")
"""
    sentence = f"vllm_provider needs {message}; pip install -U {name}"
    assert run_python(code) == ("" if message is None else sentence)


# ---- Errors -----------------------------------------------------------------


def test_error_tree_is_the_one_drawn():
    found = {}
    for name, thing in vars(vllm_provider).items():
        if inspect.isclass(thing) and issubclass(thing, VLLMError):
            found[name] = tuple(base.__name__ for base in thing.__bases__)
            assert not issubclass(thing, OSError)  # Amplifier's application swallows those
    assert found == ERROR_TREE


@pytest.fixture(params=ERROR_TREE)
def error_class(request: pytest.FixtureRequest) -> type[VLLMError]:
    return getattr(vllm_provider, request.param)


def test_an_error_has_every_attribute_by_default(error_class):
    error = error_class("message")
    attributes = (error.status_code, error.retry_after, error.request_id, error.partial)
    assert (str(error), attributes) == ("message", (None,) * 4)
    assert error.retryable is (error_class.__name__ in RETRYABLE)


def pickle_copy(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@table("make_copy", pickle_copy, copy.copy)
def test_a_copy_of_an_error_has_all_its_attributes(error_class, make_copy):
    logprobs = (TokenLogprob("a", -math.inf),)
    partial = Completion("c-1", choices=(Choice(text="a", logprobs=logprobs),))
    error = error_class(
        "message",
        status_code=418,
        retryable=True,
        retry_after=1.5,
        request_id="id",
        partial=partial,
    )
    error.limit, error.input_tokens, error.server_message = 2048, 2510, "no"
    error.tool_name, error.raw_arguments = "get_weather", '{"ci'
    twin = make_copy(error)
    assert (type(twin), str(twin), twin.args) == (error_class, "message", ("message",))
    assert vars(twin) == vars(error)
    assert twin.partial == partial


def test_a_traceback_is_short_and_keeps_the_cause(connect):
    error = caught(connect(f"http://127.0.0.1:{closed_port()}", max_retries=0).complete, "x")
    lines = "".join(traceback.format_exception(error)).splitlines()
    assert type(error.__cause__) is ConnectionRefusedError
    assert len(lines) < 60
    assert "During handling of" not in "".join(lines)


# ---- Values: configuration --------------------------------------------------

SECONDS: Final = "a positive number of seconds"
FLAG: Final = "true or false"
NATURAL: Final = "an integer of at least 1"
NATURAL_OR_0: Final = "an integer of at least 0"
BUNDLE: Final = "true, false or the path of a CA bundle that exists"
STRINGS: Final = "a string or a list of strings"
FORMATS: Final = "auto, chat_template or raw"
# key, default, given as a string, what that becomes, a bad value, what is expected
SETTINGS: Final = [
    ("default_model", None, "parrot", "parrot", 7, "a string"),
    ("use_completions", True, "false", False, "maybe", FLAG),
    ("prompt_format", "auto", "raw", "raw", "harmony", FORMATS),
    ("max_tokens", None, "0", 0, "-1", NATURAL_OR_0),
    ("temperature", None, "0", 0.0, "hot", "a number"),
    ("top_p", None, "0.5", 0.5, [], "a number"),
    ("seed", None, "-1", -1, "1.5", "an integer"),
    ("stop", None, "\n\n", "\n\n", [1], STRINGS),
    ("logprobs", None, "2", 2, "many", "an integer, true or false"),
    ("reasoning_effort", None, "low", "low", 1, "a string"),
    ("timeout", 300.0, "60", 60.0, "soon", SECONDS),
    ("stream_idle_timeout", None, "0.5", 0.5, 0, SECONDS),
    ("connect_timeout", 10.0, "inf", math.inf, "nan", SECONDS),
    ("max_retries", None, "0", 0, 1.5, NATURAL_OR_0),
    ("min_retry_delay", 0.5, "0.1", 0.1, 0, SECONDS),
    ("max_retry_delay", 30.0, "1e1", 10.0, -1, SECONDS),
    ("max_concurrency", 64, "128", 128, 0, NATURAL),
    ("verify", True, "false", False, "/no/such.pem", BUNDLE),
    ("context_window", None, "32768", 32768, "32k", NATURAL),
    ("max_output_tokens", None, "1", 1, 0, NATURAL),
    ("use_streaming", True, "off", False, 2, FLAG),
    ("priority", 100, "5", 5, "first", "an integer"),
    ("debug", False, "true", True, "verbose", FLAG),
    ("raw_debug", False, "Yes", True, 3, FLAG),
    ("debug_truncate_length", 180, "40", 40, 0, NATURAL),
    ("raw", False, "1", True, "x", FLAG),
    # these have tables of their own
    ("api_key", "EMPTY", "sk-1", "sk-1", None, None),
    ("extra_body", {}, None, {}, None, None),
    ("default_headers", {}, None, {}, None, None),
]


def test_every_setting_has_a_row_and_its_default_in_the_signature():
    defaults = {}
    for name, parameter in inspect.signature(VLLMConfig).parameters.items():
        defaults[name] = parameter.default
    table = {key: default for key, default, *_ in SETTINGS}
    assert defaults.keys() == {"base_url", *table}
    for key in table.keys() - {"extra_body", "default_headers"}:  # made anew each time
        assert defaults[key] == table[key], key


@table("key default", *[row(*one[:2], id=one[0]) for one in SETTINGS])
def test_setting_not_given(key, default):
    for value in (None, "", "${NAME}"):
        assert getattr(VLLMConfig(WEB, **{key: value}), key) == default
    assert getattr(VLLMConfig(WEB), key) == default


@table(
    "key value kept",
    *(row(key, text, value, id=f"{key}-as-text") for key, _, text, value, *_ in SETTINGS),
    row("timeout", 60, 60.0, id="integer-of-seconds"),
    row("timeout", math.inf, math.inf, id="no-limit"),
    row("timeout", " 60 ", 60.0, id="blanks-around-a-number"),
    row("max_tokens", 100.0, 100, id="integral-float"),
    row("max_tokens", "4e3", 4000, id="integral-float-as-text"),
    row("seed", "9007199254740993", 9007199254740993, id="more-digits-than-a-float-holds"),
    row("seed", 2**63 - 1, 2**63 - 1, id="largest-seed"),
    row("use_completions", 0, False, id="zero-is-false"),
    row("use_completions", " TRUE ", True, id="any-case-and-blanks"),
    row("use_streaming", "no", False, id="yaml-no"),
    row("raw", "on", True, id="yaml-on"),
    row("stop", ("a", "b"), ["a", "b"], id="several-stops"),
    row("stop", iter(["a"]), ["a"], id="iterator-is-read-once"),
    row("stop", " ", " ", id="blank-can-stop"),
    row("logprobs", True, True, id="true-stays-true"),
    row("logprobs", "True", True, id="true-as-text"),
    row("logprobs", False, False, id="false-stays-false"),
    row("logprobs", 0, 0, id="the-sampled-token-alone"),
    row("logprobs", -1, -1, id="whole-vocabulary"),
    row("temperature", 0, 0.0, id="zero-is-given"),
    row("verify", 0, False, id="verify-as-a-number"),
    row("verify", "TRUE", True, id="verify-in-any-case"),
    row("verify", __file__, __file__, id="bundle"),
    row("verify", Path(__file__), __file__, id="bundle-as-a-path"),
    row("default_headers", {"X-A": 7, "X-B": " b "}, {"X-A": "7", "X-B": "b"}, id="headers"),
    row("api_key", "EMPTY", "EMPTY", id="the-key-vllm-documents-for-none"),
)
def test_good_setting(key, value, kept):
    found = getattr(VLLMConfig(WEB, **{key: value}), key)
    assert (found, type(found)) == (kept, type(kept))


@table(
    "key bad expected",
    *(row(one[0], *one[4:], id=one[0]) for one in SETTINGS if one[5]),
    row("base_url", 8000, "a string", id="url-that-is-no-string"),
    row("timeout", True, SECONDS, id="true-is-no-number"),
    row("timeout", -math.inf, SECONDS, id="minus-infinity"),
    row("max_tokens", 10**400, NATURAL_OR_0, id="too-large-for-a-float"),
    row("max_tokens", True, NATURAL_OR_0, id="true-is-no-count"),
    row("temperature", math.nan, "a number", id="nan-is-not-json"),
    row("temperature", math.inf, "a number", id="infinity-is-not-json"),
    row("temperature", "-inf", "a number", id="minus-infinity-as-text"),
    row("top_p", 1j, "a number", id="complex"),
    row("seed", "inf", "an integer", id="infinity-is-no-integer"),
    row("priority", type(None), "an integer", id="class"),
    row("stop", b"END", STRINGS, id="bytes"),
    row("stop", 7, STRINGS, id="a-stop-that-is-a-number"),
    row("stop", ["a", None], STRINGS, id="none-among-the-stops"),
    row("use_completions", [], FLAG, id="list-is-no-flag"),
    row("verify", "maybe", BUNDLE, id="neither-flag-nor-file"),
)
def test_bad_setting(key, bad, expected):
    error = caught(VLLMConfig, **{"base_url": WEB, key: bad})
    assert type(error) is ConfigurationError
    assert str(error) == f"{key} must be {expected}, got {bad!r}"


@table("idle", None, 60.0)
def test_a_copy_with_another_timeout_keeps_the_idle_timeout(idle):
    client = VLLMClient(VLLMConfig(WEB, timeout=60, stream_idle_timeout=idle), timeout=600)
    assert (client.config.timeout, client.config.stream_idle_timeout) == (600.0, idle)


@table(
    "given environment found",
    row({}, {"BASE_URL": f"{WEB}/v1"}, {}, id="url-from-the-environment"),
    row({"base_url": ""}, {"BASE_URL": WEB}, {}, id="empty-is-not-given"),
    row({"base_url": "${VLLM_URL}"}, {"BASE_URL": WEB}, {}, id="unexpanded-is-not-given"),
    row({"base_url": WEB}, {"BASE_URL": "http://other"}, {}, id="explicit-url-wins"),
    row({"base_url": WEB}, {"API_KEY": "k"}, {"api_key": "k"}, id="key"),
    row({"base_url": WEB, "api_key": "a"}, {"API_KEY": "k"}, {"api_key": "a"}, id="explicit"),
    row({"base_url": WEB, "api_key": "EMPTY"}, {"API_KEY": "k"}, {}, id="explicit-EMPTY"),
    row({"base_url": WEB, "api_key": ""}, {"API_KEY": "k"}, {"api_key": "k"}, id="empty-key"),
    row({"base_url": WEB}, {"API_KEY": ""}, {}, id="empty-variable-is-none"),
    row({"base_url": WEB}, {"API_KEY": "${K}"}, {}, id="unexpanded-variable-is-none"),
    row({"base_url": WEB}, {"TIMEOUT": "1"}, {}, id="no-other-variable-counts"),
    row({"base_url": WEB}, {"CONTEXT_WINDOW": "9"}, {"context_window": 9}, id="context-window"),
    row({}, {"BASE_URL": WEB, "STREAM_IDLE_TIMEOUT": "9"}, {"stream_idle_timeout": 9}, id="idle"),
)
def test_environment(monkeypatch, given, environment, found):
    for name, value in environment.items():
        monkeypatch.setenv(f"VLLM_{name}", value)
    config = VLLMConfig(**given)
    monkeypatch.undo()
    assert config == VLLMConfig(WEB, **found)


@table("value", None, "", "${VLLM_BASE_URL}")
def test_base_url_is_required(value):
    error = caught(VLLMConfig, value)
    assert isinstance(error, ValueError)
    assert str(error) == "No base_url found: set it or VLLM_BASE_URL, like http://localhost:8000"


@table(
    "url root",
    row("http://localhost:8000", "http://localhost:8000", id="plain"),
    row("http://localhost:8000/", "http://localhost:8000", id="slash"),
    row("http://localhost:8000/v1", "http://localhost:8000", id="v1"),
    row("http://localhost:8000//v1//", "http://localhost:8000", id="slashes"),
    row("https://gpu.example", "https://gpu.example", id="default-port"),
    row("https://gpu.example/openai/v1/", "https://gpu.example/openai", id="prefix"),
    row("https://gpu.example/v1/models/x", "https://gpu.example/v1/models/x", id="v1-inside"),
    row("https://gpu.example/myv1", "https://gpu.example/myv1", id="name-that-ends-in-v1"),
    row("http://[::1]:8000/v1", "http://[::1]:8000", id="ipv6"),
    row("  http://localhost:8000 \n", "http://localhost:8000", id="blanks-around"),
    row("HTTPS://gpu.example", "https://gpu.example", id="scheme-in-capitals"),
)
def test_good_base_url(url, root):
    assert VLLMConfig(url).base_url == root


@table(
    "url",
    row("localhost:8000", id="no-scheme"),
    row("ftp://localhost", id="other-scheme"),
    row("http://", id="no-host"),
    row("http:///v1", id="path-only"),
    row("http://:8000", id="port-only"),
    row("http://.example", id="host-without-its-first-part"),
    row("http://localhost:0", id="port-zero"),
    row("http://localhost:99999", id="port-too-large"),
    row("http://localhost:port", id="port-in-letters"),
    row("http://[::1", id="half-a-bracket"),
    row("http://local host", id="blank-inside"),
    row("http://localhost\n/v1", id="line-break-inside"),
    row("http://localhost/?", id="empty-query"),
    row("http://localhost/#top", id="fragment"),
    row("   ", id="only-blanks"),
)
def test_bad_base_url(monkeypatch, url):
    shown = re.split("[?#]", url)[0]  # what follows may be a key
    message = (
        "base_url must be a URL like http://localhost:8000, without query or fragment,"
        f" got {shown!r}"
    )
    assert str(caught(VLLMConfig, url)) == message
    monkeypatch.setenv("VLLM_BASE_URL", url)
    assert str(caught(VLLMConfig)) == message


@table(
    "settings",
    row({"base_url": f"http://user:{SECRET}@[::1"}, id="password-in-a-broken-url"),
    row({"base_url": f"{SECRET}@localhost:8000"}, id="password-without-a-scheme"),
    row({"base_url": f"http://localhost/?api_key={SECRET}"}, id="key-in-a-query"),
    row({"api_key": f"{SECRET}\n"}, id="key-read-with-its-line-break"),
    row({"api_key": f"“{SECRET}”"}, id="key-in-typographic-quotes"),
    row({"api_key": [SECRET]}, id="key-in-a-list"),
    row({"default_headers": {"X-Key": f"{SECRET}\r\nX: 1"}}, id="line-break-in-a-header"),
    row({"default_headers": {"X-Key": f"{SECRET}é"}}, id="letter-no-header-can-hold"),
    row({"default_headers": f"X-Key: {SECRET}"}, id="headers-as-text"),
    row({"default_headers": [("X-Key", SECRET)]}, id="headers-as-pairs"),
    row({"default_headers": {"X Key": SECRET}}, id="bad-header-name"),
    row({"api_key": SECRET, "timeout": "soon"}, id="another-key-is-wrong"),
    row({"api_key": SECRET, 5: "five"}, id="key-that-is-no-string"),
    row([("api_key", SECRET)], id="pairs-in-place-of-the-mapping"),
    row({"default_headers": {"X-Key": SECRET}, None: 1}, id="none-as-a-key"),
)
def test_no_error_shows_a_secret(settings):
    mapping = {"base_url": WEB, **settings} if isinstance(settings, dict) else settings
    error = caught(VLLMConfig.from_mapping, mapping)
    assert type(error) is ConfigurationError
    assert SECRET not in told(error)


PRINTABLE: Final = "must be printable ASCII; is a line break or a typographic character in it?"
HEADER_NAMES: Final = "must have HTTP header names as keys, got"


@table(
    "key value message",
    ("base_url", "http://u:p@a", "must not hold a user name or password; a key goes under api_key"),
    ("api_key", "sk-1\n", PRINTABLE),
    ("default_headers", {"X: Key": "1"}, f"{HEADER_NAMES} 'X: Key'"),
    ("default_headers", {"": "1"}, f"{HEADER_NAMES} ''"),
    ("default_headers", {7: "1"}, "must have strings as keys, got 7"),
    ("default_headers", ["X"], "must be a mapping, got a list"),
    ("extra_body", {1: 2}, "must have strings as keys, got 1"),
    ("extra_body", "top_k=1", "must be a mapping, got a str"),
)
def test_bad_mappings_and_secrets(key, value, message):
    assert str(caught(VLLMConfig, **{"base_url": WEB, key: value})) == f"{key} {message}"


def test_a_bad_header_value():
    error = caught(VLLMConfig, WEB, default_headers={"X": "“1”"})
    assert str(error) == f"default_headers['X'] {PRINTABLE}"


def test_repr_shows_what_differs_from_the_defaults_and_no_secret():
    config = VLLMConfig(
        f"{WEB}/v1",
        api_key=SECRET,
        temperature=0,
        default_headers={"X-Key": SECRET},
        timeout=5,
        use_completions=False,
    )
    shown = (
        "VLLMConfig(base_url='http://vllm.test', use_completions=False, api_key='***',"
        " temperature=0.0, timeout=5.0, default_headers={'X-Key': '***'})"
    )
    assert repr(config) == shown
    assert repr(VLLMClient(config)) == f"VLLMClient({shown})"
    assert repr(VLLMConfig(WEB)) == "VLLMConfig(base_url='http://vllm.test')"


def test_a_configuration_is_a_value():
    settings = {
        "api_key": SECRET,
        "extra_body": {"top_k": 1},
        "stop": ["a"],
        "timeout": "5",
        "default_headers": {"X": 1},
    }
    config = VLLMConfig(WEB, **settings)
    assert pickle_copy(config) == config == copy.deepcopy(config) == VLLMConfig(WEB, **settings)
    assert pickle_copy(config).api_key == SECRET
    assert {config: 1}[VLLMConfig(WEB, **settings)] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.timeout = 3
    with pytest.raises(TypeError):
        VLLMConfig(WEB, "parrot")  # every other setting has a name


def test_a_configuration_neither_changes_nor_follows_its_arguments():
    extra, stop, headers = {"top_k": 1}, ["a"], {"X": "1"}
    config = VLLMConfig(WEB, extra_body=extra, stop=stop, default_headers=headers)
    extra["top_k"], headers["X"] = 2, "2"
    stop.append("b")
    assert (config.extra_body, config.stop) == ({"top_k": 1}, ["a"])
    assert config.default_headers == {"X": "1"}
    assert VLLMConfig(WEB).extra_body is not VLLMConfig(WEB).extra_body


UNDER_EXTRA_BODY: Final = "; it is a parameter of vLLM's: put it under extra_body"
VLLM_ONLY: Final = """
top_k min_p repetition_penalty presence_penalty frequency_penalty stop_token_ids bad_words
ignore_eos min_tokens skip_special_tokens logit_bias allowed_token_ids prompt_logprobs n echo
return_token_ids response_format structured_outputs chat_template_kwargs tool_choice vllm_xargs
cache_salt user thinking_token_budget repetition_detection logprob_token_ids session_id
kv_transfer_params watermarking return_prompt_text media_io_kwargs prompt_embeds
""".split()


@table(
    "key suggestion",
    row("timeot", "; did you mean 'timeout'?", id="misspelled"),
    row("model", "; did you mean 'default_model'?", id="part-of-a-name"),
    row("url", "; did you mean 'base_url'?", id="end-of-a-name"),
    row("max_token", "; did you mean 'max_tokens'?", id="singular"),
    row("headers", "; did you mean 'default_headers'?", id="shorter"),
    row("connect_time_out", "; did you mean 'connect_timeout'?", id="written-apart"),
    row("zzzz", "", id="like-nothing"),
    *(row(name, UNDER_EXTRA_BODY, id=f"vllm-{name}") for name in VLLM_ONLY),
)
def test_unknown_setting(caplog, key, suggestion):
    assert VLLMConfig.from_mapping({"base_url": WEB, key: SECRET}) == VLLMConfig(WEB)
    assert caplog.record_tuples == [
        ("vllm_provider", logging.WARNING, f"unknown setting {key!r} is ignored{suggestion}")
    ]
    with pytest.raises(TypeError) as info:
        VLLMClient(WEB, **{key: SECRET})
    assert str(info.value) == f"{key!r} is not a setting of VLLMClient{suggestion}"


def test_from_mapping_takes_every_key_and_leaves_the_mapping_alone(caplog):
    mapping = {"base_url": WEB}
    expected = {}
    for key, _, text, value, *_ in SETTINGS:
        if text is not None:
            mapping[key] = text
            expected[key] = value
    before = dict(mapping)
    config = VLLMConfig.from_mapping(mapping)
    assert {key: getattr(config, key) for key in expected} == expected
    assert (mapping, caplog.records) == (before, [])


@table(
    "alias name value",
    ("extra_request_params", "extra_body", {"top_k": 1}),
    ("reasoning", "reasoning_effort", "low"),
)
def test_other_names_of_settings(caplog, alias, name, value):
    config = VLLMConfig.from_mapping({"base_url": WEB, alias: value})
    assert (getattr(config, name), caplog.records) == (value, [])


# ---- Requests ---------------------------------------------------------------

COMPLETION_BODY: Final = {"model": "m", "prompt": "Once", "max_tokens": 1024}
CHAT_BODY: Final = {"model": "m", "messages": [{"role": "user", "content": "Once"}]}
both_builders: Final = table(
    "build body",
    row(build_completion_request, COMPLETION_BODY, id="completions"),
    row(build_chat_request, CHAT_BODY, id="chat"),
)


def model_config(**settings: Any) -> VLLMConfig:
    return VLLMConfig(WEB, **{"default_model": "m", **settings})


AS_GIVEN: Final = [
    row({}, id="nothing-is-invented"),
    row({"temperature": 0, "seed": 0, "top_p": 0.0}, id="0-is-sent"),
    row({"echo": False, "ignore_eos": True}, id="false-is-sent"),
    row({"stop": "", "suffix": ""}, id="empty-string-is-sent"),
    row({"stop": [], "tools": []}, id="empty-list-is-sent"),
    row({"structured_outputs": {"a": None}}, id="none-inside-is-kept"),
    row({"top_k": 3, "min_p": 0.1, "new": [1]}, id="fields-of-vllm-and-newer-ones"),
    row({"n": "2", "temperature": -5}, id="the-server-judges"),
    row({"logit_bias": {7: -1.5}}, id="json-makes-keys-of-numbers"),
    row({"model": "other"}, id="another-model"),
    row({"max_tokens": 0}, id="max-tokens-0"),
    row({"stream_options": {"x": 1}}, id="stream-options-without-a-stream"),
    row({"priority": 5}, id="priority-of-vllm"),
    row({"user": "Zoë 🌸\u2028\x00"}, id="any-text-that-is-unicode"),
]


@both_builders
@table("params", *AS_GIVEN)
def test_parameters_are_sent_as_given(build, body, params):
    assert build(model_config(), "Once", **params) == body | params


EXTRA: Final = {"extra_body": {"top_k": 1, "n": 2}}
SENT_SETTINGS: Final = {
    "temperature": 0.0,
    "top_p": 0.5,
    "seed": 1,
    "stop": ["a"],
    "reasoning_effort": "low",
}


@both_builders
@table(
    "settings params added",
    row({}, {"temperature": None, "n": None, "stream": None}, {}, id="none-is-not-given"),
    row({}, {"model": None, "extra_body": None}, {}, id="none-leaves-the-model"),
    row({"max_tokens": 7}, {}, {"max_tokens": 7}, id="configured-max-tokens"),
    *(
        row({name: value}, {}, {name: value}, id=f"configured-{name}")
        for name, value in SENT_SETTINGS.items()
    ),
    row({"max_tokens": 0}, {}, {"max_tokens": 0}, id="configured-max-tokens-0"),
    row({"max_tokens": 7}, {"max_tokens": None}, {"max_tokens": 7}, id="none-leaves-it"),
    row({"temperature": 1}, {"temperature": 0}, {"temperature": 0}, id="call-over-settings"),
    row({"priority": 5, "use_completions": False, "raw": True}, {}, {}, id="our-own-settings"),
    row({"extra_body": {"top_k": 1}}, {"top_k": 2}, {"top_k": 1}, id="extra-body-is-last"),
    row({"extra_body": {"seed": 0}, "seed": 1}, {}, {"seed": 0}, id="extra-body-over-settings"),
    row({"extra_body": {"model": "other"}}, {}, {"model": "other"}, id="over-the-model"),
    row({}, {"extra_body": {"top_k": 2}, "top_k": 3}, {"top_k": 2}, id="extra-body-of-a-call"),
    row(EXTRA, {"extra_body": {"n": 3}}, {"top_k": 1, "n": 3}, id="extra-body-over-extra-body"),
    row({}, {"timeout": 5, "stream_idle_timeout": 6, "deadline": 7}, {}, id="limits"),
)
def test_layers_of_a_body(build, body, settings, params, added):
    assert build(model_config(**settings), "Once", **params) == body | added


ON: Final = {"logprobs": True}
FIVE: Final = {"logprobs": True, "top_logprobs": 5}


@table(
    "settings params completions chat",
    row({}, {"logprobs": 2}, 2, {**ON, "top_logprobs": 2}, id="n"),
    row({}, {"logprobs": 0}, 0, {**ON, "top_logprobs": 0}, id="0"),
    row({}, {"logprobs": -1}, -1, {**ON, "top_logprobs": -1}, id="-1-passes"),
    row({}, {"logprobs": True}, 1, ON, id="true"),
    row({}, {"logprobs": False}, None, {}, id="false-would-switch-completions-on"),
    row({}, {"logprobs": None}, None, {}, id="none"),
    row({}, {"logprobs": True, "top_logprobs": 3}, 1, {**ON, "top_logprobs": 3}, id="chat"),
    row({"logprobs": 2}, {}, 2, {**ON, "top_logprobs": 2}, id="configured"),
    row({"logprobs": "true"}, {}, 1, ON, id="configured-true"),
    row({"logprobs": False}, {}, None, {}, id="configured-false"),
    row({"logprobs": 2}, {"logprobs": False}, None, {}, id="off-for-one-call"),
    row({"logprobs": 2}, {"logprobs": 0}, 0, {**ON, "top_logprobs": 0}, id="0-wins"),
    row({"extra_body": {"logprobs": 4}}, {}, 4, {**ON, "top_logprobs": 4}, id="extra-body"),
    # The later layer decides, whichever name it uses.
    row({"logprobs": 2}, {"top_logprobs": 5}, 2, FIVE, id="call-wins"),
    row({"logprobs": 2}, {"extra_body": {"top_logprobs": 5}}, 2, FIVE, id="its-extra-body-wins"),
    row({"extra_body": {"top_logprobs": 5}}, {"logprobs": 2}, 2, FIVE, id="extra-body-wins"),
    row({"logprobs": 2}, {"logprobs": 3, "top_logprobs": 5}, 3, FIVE, id="both-in-one-call"),
    row({"logprobs": 2}, {"logprobs": True}, 1, {**ON, "top_logprobs": 2}, id="true-keeps-n"),
)
def test_logprobs_mean_the_same_on_both_endpoints(settings, params, completions, chat):
    config = model_config(**settings)
    found = build_completion_request(config, "Once", **params).get("logprobs")
    assert (found, type(found)) == (completions, type(completions))

    body = build_chat_request(config, "Once", **params)
    assert body == CHAT_BODY | chat
    assert type(body.get("logprobs")) is type(chat.get("logprobs"))


@table("prompt", "", "Once", ["a", "b"], [1, 2, 3], [[1, 2], [3]], [])
def test_a_prompt_is_sent_as_typed(prompt):
    body = {"max_tokens": 1024, "prompt": prompt}
    assert build_completion_request(VLLMConfig(WEB), prompt) == body


def test_no_prompt_beside_prompt_embeds():
    body = build_completion_request(VLLMConfig(WEB), None, prompt_embeds="AA==")
    assert body == {"max_tokens": 1024, "prompt_embeds": "AA=="}


@table(
    "messages sent",
    row("Hi", [{"role": "user", "content": "Hi"}], id="str-is-a-user-message"),
    row("", [{"role": "user", "content": ""}], id="empty-str"),
    row([], [], id="none-at-all"),
    row([{"role": "tool", "x": [1]}], [{"role": "tool", "x": [1]}], id="as-given"),
    row(({"role": "user"},), [{"role": "user"}], id="tuple"),
)
def test_messages(web, messages, sent):
    assert build_chat_request(VLLMConfig(WEB), messages) == {"messages": sent}

    web.post(CHAT_URL, json={"choices": [{"message": {"content": "a"}}]})
    web_client().chat(messages, system="Be brief.")
    list(web_client().stream_chat(messages, system="Be brief."))
    for body in sent_bodies(web):
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, *sent]


@table(
    "messages",
    row(None, id="none"),
    row({"role": "user", "content": "Hi"}, id="one-dict"),
    row(["Hi"], id="strings"),
    row([[{"role": "user", "content": "Hi"}]], id="batch"),
    row([{"role": "user"}, None], id="none-among-them"),
    row(b"Hi", id="bytes"),
    row([1, 2], id="token-ids"),
)
def test_messages_of_another_type(messages):
    error = caught(build_chat_request, VLLMConfig(WEB), messages)
    assert type(error) is ConfigurationError
    assert str(error) == (
        "messages must be a string or a list of dicts like {'role': 'user', 'content': '…'}"
    )


class Town:
    """A class as pydantic's, as far as it is used here."""

    def __init__(self, city):
        self.city = city

    @staticmethod
    def model_json_schema():
        return {"type": "object", "properties": {"city": {"type": "string"}}}

    @classmethod
    def model_validate(cls, value):
        return cls(**value)


@both_builders
def test_response_format_may_be_a_class(build, body):
    schema = {"name": "Town", "schema": Town.model_json_schema()}
    response_format = {"type": "json_schema", "json_schema": schema}
    built = build(model_config(), "Once", response_format=Town)
    assert built == body | {"response_format": response_format}


@table(
    "name nearest",
    row("max_token", "max_tokens", id="singular"),
    row("temprature", "temperature", id="letter-missing"),
    row("top_logprob", "top_logprobs", id="of-the-other-endpoint"),
    row("guided_json", None, id="like-nothing"),
    row("top_k", None, id="known"),
)
def test_a_misspelled_parameter_is_one_warning_and_sent(web, caplog, name, nearest):
    web.post(COMPLETIONS_URL, json=text_event("a"))
    for value in (1, 2):
        web_client().complete("Once", **{name: value})
    advice = f"{name}: did you mean {nearest}? vLLM ignores unknown parameters"
    assert caplog.messages == ([] if nearest is None else [advice])
    assert [body[name] for body in sent_bodies(web)] == [1, 2]


LOOP: Final[list[Any]] = []
LOOP.append(LOOP)
NO_STREAM: Final = "stream is not a parameter here; stream_complete() and stream_chat() stream"
RANGE: Final = "Out of range float values are not JSON compliant"
SURROGATE: Final = "the request holds a lone surrogate, which UTF-8 has no bytes for"


@both_builders
@table(
    "settings params message",
    row({}, {"stream": False}, NO_STREAM, id="stream"),
    row({}, {"extra_body": {"stream": True}}, NO_STREAM, id="stream-in-extra-body"),
    row({"extra_body": {"stream": True}}, {}, NO_STREAM, id="stream-in-the-configuration"),
    row({}, {"extra_body": "x"}, "extra_body must be a mapping, got a str", id="text"),
    row({}, {"temperature": math.nan}, f"not JSON, in 'temperature': {RANGE}", id="nan"),
    row({}, {"top_p": math.inf}, f"not JSON, in 'top_p': {RANGE}", id="infinity"),
    row({}, {"logit_bias": {"1": -math.inf}}, f"in 'logit_bias': {RANGE}", id="inside"),
    row({"extra_body": {"x": math.nan}}, {}, f"in 'x': {RANGE}", id="in-the-configuration"),
    row({}, {"user": "\ud83c"}, f"{SURROGATE}, in 'user'", id="surrogate"),
    row({}, {"x": {"\udfff": 1}}, f"{SURROGATE}, in 'x'", id="surrogate-in-a-key"),
    row({}, {"extra_body": {"\udfff": 1}}, SURROGATE, id="surrogate-in-a-name"),
    row({}, {"x": b"raw"}, "in 'x': Object of type bytes is not JSON", id="bytes"),
    row({}, {"x": {1, 2}}, "in 'x': Object of type set is not JSON", id="set"),
    row({}, {"x": {(1, 2): 3}}, "in 'x': keys must be str, int, float,", id="tuple-as-key"),
    row({}, {"x": LOOP}, "in 'x': Circular reference detected", id="circle"),
)
def test_what_is_not_json_is_not_sent(web, build, body, settings, params, message):
    client = web_client(**settings)
    call = client.complete if build is build_completion_request else client.chat
    for error in (
        caught(build, model_config(**settings), "Once", **params),
        caught(call, "Once", **params),
    ):
        assert type(error) is ConfigurationError
        assert message in str(error)
    assert len(web.calls) == 0


@both_builders
def test_an_error_never_quotes_a_prompt(build, body):
    error = caught(build, VLLMConfig(WEB), f"{SECRET}\ud800")
    assert SECRET not in "".join(traceback.format_exception(error))


@both_builders
def test_arguments_are_never_changed(build, body):
    config = model_config(extra_body={"a": {"b": [1]}}, stop=["x"], logprobs=2)
    source = [{"role": "user", "content": "Hi"}] if "messages" in body else ["a"]
    params = {"stop": ["y"], "extra_body": {"c": 1}, "stream_options": {"e": 1}, "logprobs": True}
    before = copy.deepcopy((config, source, params))
    built = build(config, source, **params)
    built["stop"] = built["new"] = None
    assert (config, source, params) == before


@table("method", "stream_complete", "stream_chat")
@table(
    "params options",
    row({}, {"include_usage": True}, id="asks-for-usage"),
    row({"stream_options": {"include_usage": False}}, {"include_usage": False}, id="refused"),
    row({"extra_body": {"stream_options": {"a": 1}}}, {"include_usage": True, "a": 1}, id="more"),
)
def test_a_stream_asks_for_its_usage(web, method, params, options):
    web.post(re.compile(".*"), body=DONE, content_type="text/event-stream")
    before = copy.deepcopy(params)
    assert type(caught(list, getattr(web_client(), method)("Once", **params))) is StreamError
    (body,) = sent_bodies(web)
    assert (body["stream"], body["stream_options"], params) == (True, options, before)


@table("options", "usage", 5, [1], True)
def test_stream_options_that_are_no_mapping(web, options):
    error = caught(list, web_client().stream_chat("Once", stream_options=options))
    assert (type(error), len(web.calls)) == (ConfigurationError, 0)


@table("method", "complete", "chat", "stream_complete", "stream_chat")
def test_limits_of_a_call_are_not_sent(web, method):
    web.post(re.compile(".*"), json=text_event("a"))
    limits = {"timeout": 5, "stream_idle_timeout": 6, "deadline": 7}
    call = getattr(web_client(), method)("Once", **limits)
    assert isinstance(call, Completion) or texts_of(call) == ["a"]
    assert limits.keys().isdisjoint(sent_bodies(web)[0])


@table("name", "timeout", "stream_idle_timeout", "deadline")
@table("value", 0, -1, "soon", math.nan, True)
def test_bad_limit_of_a_call(web, name, value):
    error = caught(lambda: list(web_client().stream_chat("Once", **{name: value})))
    assert type(error) is ConfigurationError
    assert str(error) == f"{name} must be {SECONDS}, got {value!r}"


def test_text_goes_out_as_utf8(web):
    web.post(CHAT_URL, json={"choices": [{"message": {"content": "a"}}]})
    web_client().chat("こんにちは 🌸\u2028")
    assert "こんにちは 🌸\u2028".encode() in web.calls[0].request.body
    assert web.calls[0].request.headers["Content-Type"] == "application/json"


# ---- Transport: time --------------------------------------------------------

WAIT_110: Final = [("note_line",), ("begin_wait", 110)]


@table(
    "steps due_at limit",
    row([], 105.0, "timeout", id="starts-with-timeout"),
    row([("begin_wait", 104)], 105.0, "timeout", id="waiting-does-not-prolong-it"),
    row([("end_wait",)], 160.0, "timeout", id="a-consumer-has-the-deadline-alone"),
    row(WAIT_110, 112.0, "stream_idle_timeout", id="idle-after-a-line"),
    row([*WAIT_110, ("begin_wait", 111)], 112.0, "stream_idle_timeout", id="half-a-line"),
    row([*WAIT_110, *WAIT_110[:1], ("begin_wait", 111)], 113.0, "stream_idle_timeout", id="2"),
    row([("note_line",), ("begin_wait", 159)], 160.0, "stream_idle_timeout", id="deadline"),
    row([("allow", 101, 1)], 102.0, "timeout", id="shortened"),
    row([("allow", 101, 99)], 160.0, "timeout", id="never-beyond-the-deadline"),
    row([("allow", 101, 1), ("begin_wait", 101)], 102.0, "timeout", id="stays-shortened"),
    row([("note_line",), ("allow", 101, 1), ("begin_wait", 101)], 102.0, "timeout", id="line"),
    row([*WAIT_110, ("allow", 120, 1)], 121.0, "stream_idle_timeout", id="drains-a-moment"),
)
def test_clock(steps, due_at, limit):
    limits = types.SimpleNamespace(timeout=5, stream_idle_timeout=2)
    clock = _Clock(limits, 100.0, 160.0)
    for name, *args in steps:
        getattr(clock, name)(*args)
    assert (clock.due_at, clock.limit) == (due_at, limit)


ROLE_CHUNK: Final = chunk({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
EVENT_A: Final = b"data: " + json.dumps(text_event("a")).encode() + b"\n\n"
FIRST: Final = SSE_HEAD + chunk(EVENT_A)
JSON_HEAD: Final = SSE_HEAD.replace(b"text/event-stream", b"application/json")
LONG_REPLY: Final = reply(200, text_event("a" * 500))


IDLE: Final = "stream_idle_timeout"
OPEN_CHUNK: Final = b"fff\r\n"


@table(
    "is_stream step limit text",
    row(True, stall(), "timeout", "", id="accepts-and-never-answers"),
    row(True, stall(SSE_HEAD), "timeout", "", id="headers-then-nothing"),
    row(True, drip(SSE_HEAD, 0.02), "timeout", "", id="trickles-its-headers"),
    row(True, repeat(chunk(b": ping\n\n")), "timeout", "", id="comments-are-no-output"),
    row(True, repeat(ROLE_CHUNK), "timeout", "", id="role-is-no-output"),
    row(True, stall(FIRST), IDLE, "a", id="silence-in-mid-reply"),
    row(True, repeat(chunk(b"x"), FIRST + chunk(b"data: ")), IDLE, "a", id="half-a-line"),
    row(True, repeat(b"x", FIRST + OPEN_CHUNK), IDLE, "a", id="half-a-chunk"),
    row(True, stall(SSE_HEAD + OPEN_CHUNK + EVENT_A), IDLE, "a", id="event-in-half-a-chunk"),
    row(True, repeat(chunk(text_event("a"))), "deadline", None, id="deadline-cuts-output"),
    row(True, stall(), "deadline", "", id="deadline-before-headers"),
    row(False, stall(), "timeout", "", id="plain-never-answers"),
    row(False, stall(LONG_REPLY[:-9]), "timeout", "", id="plain-stops-in-the-body"),
    row(False, drip(LONG_REPLY, 0.02), "timeout", "", id="plain-trickles"),
    row(False, repeat(chunk(b" "), JSON_HEAD), "timeout", "", id="plain-trickles-chunks"),
    row(False, stall(), "deadline", "", id="plain-deadline"),
)
def test_limits(server, connect, retries, is_stream, step, limit, text):
    server.script(step)
    client = connect(server, timeout=math.inf)
    with after_limit():
        error = caught(generate, client, is_stream, **{limit: LIMIT})
    messages = {
        "timeout": "no reply within 0.15 s: {}; raise timeout, or ask for fewer tokens",
        "stream_idle_timeout": "no data for 0.15 s in the middle of a reply: {};"
        " raise stream_idle_timeout, or see if a proxy buffers",
        "deadline": "deadline of 0.15 s reached: {}; give the call more time",
    }
    assert type(error) is LLMTimeoutError
    assert str(error) == messages[limit].format(f"POST {server.url}/v1/completions")
    assert error.retryable is (limit != "deadline")
    assert text is None or error.partial.text == text
    server.aborted.get(timeout=1)
    assert (len(server.requests), retries.pauses) == (1, [])


@table(
    "steps model",
    row([None, stall()], MODEL, id="used-connection-is-not-stale"),
    row([None, drip(LONG_REPLY, 0.02)], MODEL, id="trickles-on-a-used-connection"),
    row([None, None, stall()], None, id="after-a-model-was-asked-for"),
)
@http_and_https
def test_limits_on_a_used_connection(either_server, connect, retries, steps, model):
    either_server.script(*steps)
    client = connect(either_server, default_model=model)
    client.complete(PROMPT)
    with after_limit():
        assert type(caught(client.complete, "x", timeout=LIMIT)) is LLMTimeoutError
    either_server.aborted.get(timeout=1)
    assert {request.connection for request in either_server.requests} == {1}
    assert (len(either_server.requests), retries.pauses) == (len(steps), [])


def test_comments_keep_a_stream_alive(server, connect):
    def step(connection: Connection) -> None:
        connection.send(FIRST)
        for _ in range(6):
            connection.pause(0.1)
            connection.send(chunk(b": keep-alive\n\n"))
        connection.send(chunk(text_event("b")) + chunk("[DONE]") + LAST_CHUNK)

    server.script(step)
    stream = connect(server).stream_complete("x", stream_idle_timeout=0.4)
    assert texts_of(stream) == ["a", "b"]


def test_a_stream_that_produces_is_never_cut_by_timeout(server, connect):
    server.script(repeat(chunk(text_event("a")), every_s=0.05))
    stream = connect(server).stream_complete("x", timeout=0.4, stream_idle_timeout=NEVER)
    started_at = time.monotonic()
    assert texts_of(next(stream) for _ in range(10)) == ["a"] * 10
    assert time.monotonic() - started_at > 0.4
    stream.close()


@table("is_whole", row(False, id="stream"), row(True, id="whole-reply"))
def test_a_slow_consumer_is_not_punished(server, connect, is_whole):
    has_read = threading.Event()

    def step(connection: Connection) -> None:
        connection.send(FIRST)
        has_read.wait(IN_TIME)
        connection.send(chunk(text_event("b")) + chunk("[DONE]") + LAST_CHUNK)

    choices = [*text_event("a")["choices"], *text_event("b")["choices"]]
    server.script(reply(200, {"choices": choices}) if is_whole else step)
    stream = connect(server).stream_complete("x", timeout=0.3, stream_idle_timeout=0.3)
    assert next(stream).text == "a"
    has_read.set()
    time.sleep(0.4)
    assert texts_of(stream) == ["b"]


def test_deadline_counts_retries_and_pauses(server, connect):
    server.script(*[reply(503)] * 500)
    client = connect(server, max_retries=500, max_retry_delay=0.02)
    with at_once(IN_TIME):
        error = caught(client.complete, "x", deadline=LIMIT)
    assert (type(error), error.retryable) == (LLMTimeoutError, False)
    assert 1 < len(server.requests) < 100


def test_a_pause_beyond_the_deadline_is_not_begun(server, connect, retries):
    server.script(reply(503, {"error": "busy"}, {"Retry-After": "20"}))
    error = caught(connect(server).complete, "x", deadline=10)
    assert type(error) is LLMTimeoutError
    cause = error.__cause__
    assert type(cause) is ProviderUnavailableError
    assert str(error) == f"the deadline leaves no time to try again: {cause}"
    assert (error.retryable, error.status_code, retries.pauses) == (False, 503, [])


def test_timeout_counts_anew_for_each_attempt(server, connect):
    def slow(status: int) -> Step:
        raw = reply(status, text_event("a"))
        return lambda connection: (connection.pause(0.2), connection.send(raw))

    server.script(slow(503), slow(503), slow(200))
    assert connect(server).complete("x", timeout=0.5).text == "a"


@table(
    "limit",
    row(math.inf, id="none"),
    row(1e12, id="more-than-a-clock-holds"),
    row(sys.float_info.max, id="largest-number"),
    row(4_294_967.4, id="100-ms-to-poll-which-takes-32-bits-of-ms"),
)
def test_very_long_limits(server, connect, limit):
    server.script(lambda connection: (connection.pause(0.3), server.answer(connection)))
    client = connect(server, timeout=limit, stream_idle_timeout=limit, connect_timeout=limit)
    assert client.complete(PROMPT, deadline=limit).text == " Paris."
    assert texts_of(client.stream_complete(PROMPT)) == [" Paris", ".", ""]
    assert client.health(wait=limit) is True


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone leaves a full queue unanswered")
@table("limit", "connect_timeout", "timeout", "deadline")
def test_limits_while_connecting(connect, retries, limit):
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # fills the queue
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())

        limits = {"connect_timeout": 10, "timeout": NEVER, limit: LIMIT}
        deadline = limits.pop("deadline", None)
        client = connect(url_of(listener), **limits)
        with after_limit():
            error = caught(client.complete, "x", deadline=deadline)
    assert (type(error), error.retryable) == (LLMTimeoutError, limit != "deadline")
    expected = {
        "connect_timeout": "is the host right, and does a firewall block it? (connect_timeout)",
        "timeout": "raise timeout, or ask for fewer tokens",
        "deadline": "give the call more time",
    }
    assert str(error).endswith(f": POST {client.config.base_url}/v1/completions; {expected[limit]}")
    assert retries.pauses == []


def test_a_limit_that_is_reached_while_the_host_is_looked_up(server, connect, monkeypatch):
    look_up = socket.getaddrinfo

    def getaddrinfo(*args: Any, **options: Any) -> Any:
        time.sleep(2 * LIMIT)
        return look_up(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with after_limit():
        assert type(caught(connect(server).complete, "x", timeout=LIMIT)) is LLMTimeoutError
    assert server.requests == []


@table(
    "scheme prompt limit",
    row("https", "x", {"connect_timeout": LIMIT}, id="tls-handshake-that-stalls"),
    row("http", "x" * 8_000_000, {"timeout": LIMIT}, id="server-that-never-reads"),
)
def test_limits_against_a_silent_listener(connect, retries, scheme, prompt, limit):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(url_of(listener, scheme), **limit)
        with after_limit():
            error = caught(client.complete, prompt)
    assert (type(error), error.retryable, retries.pauses) == (LLMTimeoutError, True, [])


def test_the_body_of_an_error_may_not_take_long(server, connect, monkeypatch):
    monkeypatch.setattr(vllm_provider, "ERROR_BODY_S", LIMIT)
    server.script(stall(reply(400, "x" * 99)[:-9]))
    with after_limit():
        error = caught(connect(server).complete, "y")
    assert (type(error), error.server_message) == (InvalidRequestError, "x" * 90)
    server.aborted.get(timeout=1)


AT_DONE: Final = sse(text_event("a"), text_event("b"), end=False)


@table(
    "step",
    row(stall(AT_DONE), id="nothing-more"),
    row(repeat(chunk(b": x\n\n"), AT_DONE, 0.005), id="goes-on-after-it"),
)
def test_a_stream_ends_at_done_without_its_last_chunk(server, connect, step):
    server.script(step)
    with at_once(IN_TIME):
        assert texts_of(connect(server).stream_complete("x")) == ["a", "b"]
    server.aborted.get(timeout=1)


# ---- Transport: stopping ----------------------------------------------------

STOPS: Final = {
    "cancel": lambda _client, stream: stream.cancel(),
    "close": lambda _client, stream: stream.close(),
    "client.close": lambda client, _stream: client.close(),
}
each_stop: Final = table("stop", *STOPS)
MODELS: Final = "/v1/models"
GENERATION: Final = "/v1/completions"
CLOSING: Final = {"Connection": "close"}
BUSY: Final = {"Retry-After": "1e15"}
NO_MODEL: Final = reply(404, error_payload("The model `parrot` does not exist.", 404))
# path and step of each request, and the text that has arrived then
STOP_PHASES: Final = [
    row([(GENERATION, stall())], "", id="before-headers"),
    row([(GENERATION, stall(SSE_HEAD[:60]))], "", id="mid-headers"),
    row([(GENERATION, stall(SSE_HEAD))], "", id="after-headers"),
    row([(GENERATION, stall(FIRST))], "a", id="between-events"),
    row([(GENERATION, stall(FIRST + chunk("bcde")[:8]))], "a", id="mid-event"),
    row([(GENERATION, stall(LONG_REPLY[:-9]))], "", id="mid-json"),
    row([(GENERATION, stall(reply(500, "x" * 99)[:-9]))], "", id="mid-error"),
    row([(GENERATION, reply(503)), (GENERATION, stall())], "", id="second-attempt"),
    row([(GENERATION, reply(503, "", CLOSING)), (GENERATION, stall())], "", id="new-connection"),
    row([(GENERATION, reply(503, "", BUSY))], "", id="retry-pause"),
    row([(GENERATION, None), (GENERATION, stall())], "", id="used-connection-is-not-stale"),
    row([(MODELS, stall())], "", id="asking-for-the-model"),
    row([(MODELS, None), (GENERATION, stall(FIRST))], "a", id="after-asking-for-the-model"),
    row(
        [(MODELS, None), (GENERATION, NO_MODEL), (MODELS, stall())],
        "",
        id="asking-for-the-model-again",
    ),
]


def assert_stopped(outcome: Any, stop: str, text: str | None = None) -> None:
    """Check what the thread that reads a stream gets: the end after close(), else AbortError."""
    if stop == "close":
        assert isinstance(outcome, list), outcome
        assert text is None or "".join(texts_of(outcome)) == text
        return
    assert type(outcome) is AbortError, outcome
    assert str(outcome) == "the call was stopped by its caller"
    assert outcome.retryable is False
    assert text is None or outcome.partial.text == text


@each_stop
@table("steps text", *STOP_PHASES)
@http_and_https
def test_stop_in_every_phase(either_server, connect, steps, text, stop):
    for path, step in steps:
        either_server.script(step, path=path)
    model = None if steps[0][0] == MODELS else MODEL
    client = connect(either_server, default_model=model, max_retry_delay=math.inf)
    if steps[0] == (GENERATION, None):
        client.complete(PROMPT)
    stream = client.stream_complete("x")
    reader = InThread(list, stream)
    requests_seen = either_server.requests
    wait_until(lambda: len(requests_seen) == len(steps) and stream.completion.text == text)

    with at_once():
        STOPS[stop](client, stream)
        outcome = reader.outcome()
    if callable(steps[-1][1]):  # the server is at work
        either_server.aborted.get(timeout=1)
    assert_stopped(outcome, stop, text)
    if stop != "close":
        assert outcome.request_id == stream.request_id
    assert len(requests_seen) == len(steps)
    assert list(stream) == []


@each_stop
def test_stop_while_the_host_is_looked_up(server, connect, monkeypatch, retries, stop):
    has_begun, may_end, look_up = threading.Event(), threading.Event(), socket.getaddrinfo

    def getaddrinfo(*args: Any, **options: Any) -> Any:
        has_begun.set()
        may_end.wait(IN_TIME)
        return look_up(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    client = connect(server)
    stream = client.stream_complete("x")
    reader = InThread(list, stream)
    assert has_begun.wait(IN_TIME)
    STOPS[stop](client, stream)
    may_end.set()
    assert_stopped(reader.outcome(), stop)
    assert (server.requests, retries.pauses) == ([], [])


@each_stop
def test_stop_while_the_request_is_sent(connect, stop):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(url_of(listener))
        stream = client.stream_complete("x" * 8_000_000)
        reader = InThread(list, stream)
        with listener.accept()[0] as sock:
            assert sock.recv(100).startswith(b"POST /v1/completions")
            with at_once():
                STOPS[stop](client, stream)
                assert_stopped(reader.outcome(), stop)


@each_stop
@table("more", b"", chunk(text_event("b")) + chunk("[DONE]"))
def test_stop_between_two_events_by_the_reading_thread(server, connect, stop, more):
    server.script(stall(FIRST + more))
    client = connect(server)
    stream = client.stream_complete("x")
    assert next(stream).text == "a"
    STOPS[stop](client, stream)
    server.aborted.get(timeout=1)
    if stop == "close":
        assert list(stream) == []
    else:
        assert_stopped(caught(next, stream), stop, "a")
    assert len(server.requests) == 1


@table("stop", "cancel", "close")
def test_stop_before_the_start_sends_nothing(server, connect, stop):
    for enter in (list, lambda stream: list(stream.__enter__())):
        client = connect(server, default_model=None)
        stream = client.stream_complete("x")
        STOPS[stop](client, stream)
        assert_stopped(InThread(enter, stream).outcome(), stop)
    assert server.requests == []


@each_stop
def test_stop_while_the_last_bytes_are_awaited_takes_nothing_away(
    server, connect, monkeypatch, stop
):
    monkeypatch.setattr(vllm_provider, "DRAIN_S", 5.0)
    server.script(stall(sse(text_event("a"), end=False)))
    client = connect(server)
    stream = client.stream_complete("x")
    reader = InThread(list, stream)
    wait_until(lambda: stream.completion.text == "a")
    time.sleep(0.02)
    with at_once():
        STOPS[stop](client, stream)
        outcome = reader.outcome()
    assert outcome == [Delta(text="a")] or outcome.partial.text == "a"
    server.aborted.get(timeout=1)


@each_stop
def test_stop_of_a_finished_stream_changes_nothing(server, connect, stop):
    client = connect(server)
    stream = client.stream_complete(PROMPT)
    assert len(list(stream)) == 3
    STOPS[stop](client, stream)
    assert (list(stream), stream.completion.text) == ([], " Paris.")
    assert client.complete(PROMPT).text == " Paris."


@http_and_https
def test_a_late_stop_does_not_reach_the_next_call_on_its_connection(either_server, connect):
    client = connect(either_server)
    finished = client.stream_complete(PROMPT)
    assert len(list(finished)) == 3
    may_go_on = threading.Event()

    def step(connection: Connection) -> None:
        connection.send(FIRST)
        may_go_on.wait(IN_TIME)
        connection.send(chunk(text_event("b")) + chunk("[DONE]") + LAST_CHUNK)

    either_server.script(step)
    reader = InThread(list, client.stream_complete("x"))
    wait_until(lambda: len(either_server.requests) == 2)
    finished.cancel()
    finished.close()
    may_go_on.set()
    assert texts_of(reader.outcome()) == ["a", "b"]
    assert [request.connection for request in either_server.requests] == [1, 1]


def test_stop_of_a_failed_attempt_does_not_reach_a_call_that_took_its_connection(
    server, connect, retries
):
    is_pausing = threading.Event()
    retries.on_retry = is_pausing.set
    client = connect(server)
    server.script(reply(503, headers={"Retry-After": "20"}))
    pausing = client.stream_complete("x")
    reader = InThread(list, pausing)
    assert is_pausing.wait(IN_TIME)

    server.script(repeat(chunk(text_event("a")), every_s=0.01))
    with client.stream_complete("y") as other:
        assert [request.connection for request in server.requests] == [1, 1]
        pausing.cancel()
        assert type(reader.outcome()) is AbortError
        assert texts_of(next(other) for _ in range(3)) == ["a"] * 3


@table("how", "leave-with", "raise-in-with", "raise-in-loop", "drop")
@http_and_https
def test_leaving_a_stream_stops_the_server(either_server, connect, how):
    either_server.script(repeat(chunk(text_event("a")), every_s=0.01))
    client = connect(either_server)
    kept = [client.stream_complete("x")] if "with" in how else []

    def leave() -> None:
        if how == "drop":
            next(client.stream_complete("x"))
            return
        for stream in kept:
            with stream:
                assert how == "leave-with", "in the consumer"
        for _delta in () if kept else client.stream_complete("x"):
            raise AssertionError

    with contextlib.suppress(AssertionError):
        leave()
    either_server.aborted.get(timeout=1)
    assert client.complete(PROMPT).text == " Paris."
    assert [request.connection for request in either_server.requests] == [1, 2]


@table(
    "name args",
    *(("complete", ["x"]), ("chat", ["x"]), ("tokenize", ["x"]), ("detokenize", [[1]])),
    *(("models", []), ("version", []), ("get", ["/load"]), ("post", ["/score", {}])),
    *(("health", []), ("health", [20])),
)
def test_closing_a_client_stops_every_call(server, connect, name, args):
    client = connect(server, max_retries=5)
    server.script(*[stall()] * 3)
    callers = [InThread(getattr(client, name), *args) for _ in range(3)]
    wait_until(lambda: len(server.requests) == 3)
    with at_once():
        client.close()
        assert [type(caller.outcome()) for caller in callers] == [AbortError] * 3
    for _ in callers:
        server.aborted.get(timeout=1)
    assert len(server.requests) == 3
    assert client.complete(PROMPT).text == " Paris."


def test_closing_a_client_while_it_waits_for_a_server(connect):
    client = connect(f"http://127.0.0.1:{closed_port()}")
    caller = InThread(client.health, 20.0)
    time.sleep(0.1)
    with at_once():
        client.close()
        assert type(caller.outcome()) is AbortError


@each_stop
@http_and_https
def test_stop_while_events_pour_in(either_server, connect, stop):
    """Neither thread may see anything but the end, wherever the other one is."""
    client = connect(either_server)
    for _ in range(5):
        either_server.script(repeat(chunk(text_event("a")) * 50, every_s=0.0))
        stream = client.stream_complete("x")
        reader = InThread(list, stream)
        wait_until(lambda stream=stream: stream.completion.choices)
        STOPS[stop](client, stream)
        assert_stopped(reader.outcome(), stop)
        assert set(stream.completion.text) == {"a"}


def test_a_thread_that_goes_on_while_another_closes_sees_the_end(server, connect, monkeypatch):
    is_closing, close = threading.Event(), requests.Response.close

    def slow_close(response: requests.Response) -> None:
        is_closing.set()
        time.sleep(0.1)
        close(response)

    monkeypatch.setattr(requests.Response, "close", slow_close)
    server.script(stall(FIRST))
    stream = connect(server).stream_complete("x")
    assert next(stream).text == "a"
    closer = InThread(stream.close)
    assert is_closing.wait(IN_TIME)
    assert next(stream, "the end") == "the end"
    closer.outcome()


def test_a_second_thread_that_reads_gets_an_error(server, connect):
    server.script(stall(FIRST))
    stream = connect(server).stream_complete("x")
    reader = InThread(list, stream)
    wait_until(lambda: stream.completion.text)
    message = "another thread is reading this Stream; only one can at a time"
    assert str(caught(next, stream)) == message
    assert reader.is_running()
    stream.close()
    assert texts_of(reader.outcome()) == ["a"]


def test_a_snapshot_may_be_taken_by_another_thread(server, connect):
    """Events with ever new fields make it hard: the last event of vLLM brings one."""
    events = [{**text_event("a"), f"field_{number}": 1} for number in range(1000)]
    server.script(sse(*events))
    stream = connect(server).stream_complete("x")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        reader, sizes = InThread(list, stream), [0]
        while sizes[-1] < 1000 and reader.is_running():
            sizes.append(len(stream.completion.text))
    finally:
        sys.setswitchinterval(interval)
    assert len(reader.outcome()) == 1000
    assert sizes == sorted(sizes)
    assert len(stream.completion.payload) == 1000


# ---- Transport: groups of calls ---------------------------------------------


def begin_inside(group: _CallGroup, function: Callable[..., Any], *args: Any) -> InThread:
    """Call a function in another thread, as a part of the group."""
    with group:
        context = contextvars.copy_context()
    return InThread(context.run, function, *args)


def test_a_group_stops_its_calls_and_no_others(server, connect):
    clients = [connect(server), connect(server)]
    server.script(*[stall(FIRST)] * 3)
    outside = InThread(clients[0].complete, "x")
    group = _CallGroup()
    inside = [begin_inside(group, client.complete, "x") for client in clients]
    wait_until(lambda: len(server.requests) == 3)

    with at_once():
        group.stop()
        assert [type(caller.outcome()) for caller in inside] == [AbortError] * 2
    assert outside.is_running()
    assert type(begin_inside(group, clients[1].models).outcome()) is AbortError
    assert len(server.requests) == 3
    clients[0].close()
    assert type(outside.outcome()) is AbortError


@table("is_outer", True, False)
def test_groups_nest(server, connect, is_outer):
    server.script(stall())
    groups = [_CallGroup(), _CallGroup()]
    with groups[0]:
        caller = begin_inside(groups[1], connect(server).complete, "x")
    wait_until(lambda: server.requests)
    groups[0 if is_outer else 1].stop()
    assert type(caller.outcome()) is AbortError
    assert connect(server).complete(PROMPT).text == " Paris."


def test_a_group_that_is_stopped_leaves_what_has_ended_alone(server, connect):
    client = connect(server)
    with _CallGroup() as group:
        stream = client.stream_complete(PROMPT)
        assert len(list(stream)) == 3
        group.stop()
        assert stream.completion.text == " Paris."
    assert client.complete(PROMPT).text == " Paris."


# ---- Transport: signals -----------------------------------------------------


class Signals:
    """SIGUSR1 for the main thread, which runs the tests."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def handle_by(self, function: Callable[[], object]) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: function())

    def send_after(self, wait: Callable[[], object]) -> InThread:
        """Send it once `wait` has returned, and again and again: one may come before a read."""
        self._is_over.clear()
        return InThread(self._send, wait)

    def _send(self, wait: Callable[[], object]) -> None:
        wait()
        while not self._is_over.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            self._is_over.wait(0.05)

    def end(self) -> None:
        self._is_over.set()


@pytest.fixture
def signals() -> Iterator[Signals]:
    one = Signals()
    yield one
    one.end()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


@each_stop
@pytest.mark.parametrize(
    ("steps", "text"),
    [one for one in STOP_PHASES if one.id in ("before-headers", "mid-event", "mid-json")],
)
def test_stop_in_a_signal_handler(server, connect, signals, steps, text, stop):
    server.script(*[step for _path, step in steps])
    client = connect(server)
    stream = client.stream_complete("x")
    signals.handle_by(lambda: STOPS[stop](client, stream))
    signals.send_after(
        lambda: wait_until(lambda: server.requests and stream.completion.text == text)
    )
    try:
        outcome: Any = list(stream)
    except AbortError as error:
        outcome = error
    signals.end()
    assert_stopped(outcome, stop, text)
    server.aborted.get(timeout=1)


@each_stop
def test_stop_in_a_signal_handler_at_any_instant(server, connect, signals, stop):
    client = connect(server)
    draw = random.Random(7)
    for _ in range(30):
        server.script(sse(*[text_event("a")] * 200), path=GENERATION)
        stream = client.stream_complete("x")
        signals.handle_by(functools.partial(STOPS[stop], client, stream))
        sender = signals.send_after(functools.partial(time.sleep, draw.uniform(0.0, 0.006)))
        with contextlib.suppress(AbortError):
            list(stream)
        signals.end()
        sender.outcome()
        assert set(stream.completion.text) <= {"a"}
    wait_until(lambda: client.complete(PROMPT).text == " Paris.")


class RaisingHandler:
    """A signal handler; `error` is what it raises."""

    def __init__(self, error: Exception, signals: Signals) -> None:
        self.error = error
        self.signals = signals

    def __call__(self, *_: object) -> None:
        self.signals.end()
        raise self.error


@table("kind", TimeoutError, OSError, ValueError, ZeroDivisionError)
@table("step", row(stall(), id="headers"), row(stall(SSE_HEAD), id="body"))
@table(
    "wrap",
    row(lambda handler: handler, id="object"),
    row(lambda handler: handler.__call__, id="method"),
    row(functools.partial, id="partial"),
)
def test_an_error_of_a_signal_handler_passes_unchanged(server, connect, signals, kind, step, wrap):
    handler = RaisingHandler(kind("mine"), signals)
    server.script(step)
    client = connect(server)
    signal.signal(signal.SIGUSR1, wrap(handler))
    signals.send_after(lambda: (wait_until(lambda: server.requests), time.sleep(0.05)))
    with pytest.raises(kind) as info:
        client.complete("x")
    assert info.value is handler.error
    server.aborted.get(timeout=1)
    assert len(server.requests) == 1


INTERRUPTED: Final = """
import sys, time, vllm_provider
client = vllm_provider.VLLMClient(sys.argv[1], default_model="parrot")
try:
    client.complete("x") if sys.argv[2] == "whole" else list(client.stream_complete("x"))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(20)  # alive: it is not the end of the process that stops the server
"""


@pytest.mark.parametrize(
    ("kind", "step"), [row("whole", stall(), id="whole"), row("stream", stall(FIRST), id="stream")]
)
def test_ctrl_c_stops_the_server(server, connect, kind, step):
    server.script(step)
    with start_python(INTERRUPTED, server.url, kind) as process:
        wait_until(lambda: server.requests)
        time.sleep(0.05)
        started_at = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert server.aborted.get(timeout=2) - started_at < 1
        assert process.stdout.readline() == "interrupted\n"
        process.kill()


# ---- Transport: connections -------------------------------------------------


@table("step", Connection.close, Connection.reset)
def test_a_stale_connection_never_shows(server, connect, retries, caplog, step):
    """The server closes an idle connection at the very moment it is used again."""
    client = connect(server, max_retries=0)
    server.script(None, step, None, step)
    assert [client.complete(PROMPT).text for _ in range(2)] == [" Paris."] * 2
    assert texts_of(client.stream_complete(PROMPT)) == [" Paris", ".", ""]
    assert [request.connection for request in server.requests] == [1, 1, 2, 2, 3]
    assert len({request.headers["X-Request-Id"] for request in server.requests}) == 5
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_stale_connection_never_shows_after_asking_for_the_model(server, connect):
    client = connect(server, max_retries=0, default_model=None)
    server.script(Connection.close, path=GENERATION)
    assert client.complete(PROMPT).text == " Paris."
    assert [request.connection for request in server.requests] == [1, 1, 2]


def test_several_stale_connections_cost_one_attempt(server, connect):
    client = connect(server, max_retries=0)
    barrier = threading.Barrier(3)
    server.script(*[lambda connection: (barrier.wait(IN_TIME), server.answer(connection))] * 3)
    callers = [InThread(client.complete, PROMPT) for _ in range(3)]
    assert texts_of(caller.outcome() for caller in callers) == [" Paris."] * 3
    server.script(Connection.close)
    assert client.complete(PROMPT).text == " Paris."
    assert [request.connection for request in server.requests[4:]] == [4]


@table(
    "steps kind",
    row([Connection.close], NetworkError, id="closed"),
    row([Connection.reset], NetworkError, id="reset"),
    row([send_and_close(b"H")], NetworkError, id="one-byte"),
    row([send_and_close(SSE_HEAD)], StreamError, id="headers"),
    row([None, send_and_close(b"H")], NetworkError, id="one-byte-on-a-used-connection"),
    row([None, send_and_close(SSE_HEAD[:40])], VLLMError, id="half-a-head-on-a-used-one"),
    row([None, Connection.close, Connection.close], NetworkError, id="fresh-after-a-stale-one"),
)
@http_and_https
def test_what_may_have_started_is_not_sent_again(either_server, connect, retries, steps, kind):
    client = connect(either_server)
    either_server.script(*steps)
    if steps[0] is None:
        client.complete(PROMPT)
    error = caught(list, client.stream_complete("x"))
    assert isinstance(error, kind)
    assert error.retryable is True
    assert (len(either_server.requests), retries.pauses) == (len(steps), [])


@table(
    "informational",
    row(b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n", id="103"),
    row(b"HTTP/1.1 102 Processing\r\n\r\n", id="102"),
    row(b"HTTP/1.1 100 Continue\r\n\r\n", id="100"),
    row(b"HTTP/1.1 103 A\r\nLink: </a>\r\n\r\nHTTP/1.1 103 B\r\n\r\n", id="two"),
    row(b"HTTP/1.1 103 A\r\nContent-Length: 5\r\n\r\n", id="103-with-a-length"),
)
@http_and_https
def test_informational_replies_are_passed_over(either_server, connect, informational):
    client = connect(either_server)
    replies = [
        reply(200, text_event("a")),
        sse(text_event("b")),
        reply(404, "c"),
        reply(200, text_event("d")),
    ]
    either_server.script(*[informational + raw for raw in replies])
    assert client.complete("x").text == "a"
    assert texts_of(client.stream_complete("x")) == ["b"]
    assert caught(client.complete, "x").server_message == "c"
    assert client.complete("x").text == "d"
    assert {request.connection for request in either_server.requests} == {1}


def test_idle_connections_are_not_used_again(server, connect, monkeypatch):
    client = connect(server)
    client.complete(PROMPT)
    client.complete(PROMPT)
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 3.9)
    client.complete(PROMPT)
    monkeypatch.setattr(time, "monotonic", lambda: now() + 8.1)
    client.complete(PROMPT)
    assert [request.connection for request in server.requests] == [1, 1, 1, 2]


def test_connections_are_reused(server, connect):
    client = connect(server, default_model=None)
    client.complete(PROMPT)
    list(client.stream_complete(PROMPT))
    list(client.stream_chat("Hello", logprobs=2))
    client.tokenize("x")
    client.models()
    caught(client.complete, "")
    client.version()
    client.health()
    client.complete(PROMPT)
    assert {request.connection for request in server.requests} == {1}


def test_a_stream_whose_last_bytes_come_late_leaves_its_connection(server, connect, monkeypatch):
    monkeypatch.setattr(vllm_provider, "DRAIN_S", IN_TIME)

    def step(connection: Connection) -> None:
        connection.send(sse(text_event("a"), end=False))
        connection.pause(0.05)
        connection.send(LAST_CHUNK)

    server.script(step)
    client = connect(server)
    assert texts_of(client.stream_complete("x")) == ["a"]
    client.complete(PROMPT)
    assert [request.connection for request in server.requests] == [1, 1]


def test_a_connection_is_taken_over_before_its_last_call_has_let_it_go(
    server, connect, monkeypatch
):
    client, close = connect(server), requests.Response.close

    def take_over(response: requests.Response) -> None:
        monkeypatch.setattr(requests.Response, "close", close)
        assert client.complete(PROMPT).text == " Paris."
        close(response)

    monkeypatch.setattr(requests.Response, "close", take_over)
    assert client.complete(PROMPT).text == " Paris."
    assert [request.connection for request in server.requests] == [1, 1]


def test_a_connection_the_server_closes_is_not_used_again(server, connect):
    client = connect(server, max_retries=0)
    server.script(reply(200, text_event("a"), CLOSING))
    assert [client.complete(PROMPT).text for _ in range(2)] == ["a", " Paris."]
    assert [request.connection for request in server.requests] == [1, 2]


@table("is_closed", row(True, id="client-closed"), row(False, id="left-idle"))
def test_idle_sockets_are_closed(connect, monkeypatch, is_closed):
    """At once by close(), else after IDLE_REUSE_S: none is left to the garbage collector."""
    monkeypatch.setattr(vllm_provider, "IDLE_REUSE_S", NEVER if is_closed else 0.1)
    threads = set(threading.enumerate())

    def answer_one(listener: socket.socket) -> socket.socket:
        sock = listener.accept()[0]
        sock.settimeout(IN_TIME)
        while not sock.recv(65536).endswith(b"}"):
            pass
        sock.sendall(reply(200, text_event("a")))
        return sock

    gc.disable()
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            accepted = InThread(answer_one, listener)
            client = connect(url_of(listener))
            assert client.complete("x").text == "a"
            with accepted.outcome() as sock:
                if is_closed:
                    client.close()
                else:
                    sock.shutdown(socket.SHUT_WR)  # as vLLM does after 5 s: now in CLOSE_WAIT
                assert sock.recv(1) == b""
    finally:
        gc.enable()
    assert is_closed or wait_until(lambda: threads >= set(threading.enumerate())) is None


# ---- Transport: threads and processes ---------------------------------------


def test_many_threads_share_a_client(server, connect, monkeypatch, caplog):
    monkeypatch.setattr(vllm_provider, "IDLE_REUSE_S", NEVER)
    caplog.set_level(logging.DEBUG)
    barrier = threading.Barrier(200)

    def step(connection: Connection) -> None:
        barrier.wait(20)  # all at once
        connection.send(reply(200, text_event(connection.request.body["prompt"])))

    client = connect(server)
    for turn in range(2):
        server.script(*[step] * 200)
        prompts = [f"{turn}-{number}" for number in range(200)]
        callers = [InThread(client.complete, prompt) for prompt in prompts]
        assert texts_of(caller.outcome(30) for caller in callers) == prompts
    assert len({request.connection for request in server.requests}) == 200
    assert "pool is full" not in caplog.text


def test_the_model_is_asked_for_once_by_many_threads(server, connect):
    client = connect(server, default_model=None)
    barrier = threading.Barrier(64)

    def step(connection: Connection) -> None:
        connection.pause(0.1)
        server.answer(connection)

    def ask() -> str:
        barrier.wait(20)
        return client.complete(PROMPT).text

    server.script(step, path=MODELS)
    callers = [InThread(ask) for _ in range(64)]
    assert [caller.outcome(30) for caller in callers] == [" Paris."] * 64
    assert [request.path for request in server.requests].count(MODELS) == 1


@table("deadline kind", (None, AbortError), (LIMIT, LLMTimeoutError))
def test_waiting_for_a_thread_that_asks_for_the_model_ends(server, connect, deadline, kind):
    client = connect(server, default_model=None)
    server.script(stall(), path=MODELS)
    first = InThread(client.complete, "x")
    wait_until(lambda: server.requests)
    stream = client.stream_complete("x", deadline=deadline)
    second = InThread(list, stream)
    time.sleep(0.05)
    with at_once():
        if deadline is None:
            stream.cancel()
        assert type(second.outcome()) is kind
    assert first.is_running()
    client.close()
    assert type(first.outcome()) is AbortError


def test_a_client_can_be_pickled(server, connect):
    client = connect(server, api_key="sekrit", default_headers={"X-Team": "a"})
    client.complete(PROMPT)
    with pickle_copy(client) as copied:
        assert copied.config == client.config
        assert copied.complete(PROMPT).text == " Paris."
    assert [request.connection for request in server.requests] == [1, 2]
    assert server.requests[1].headers["Authorization"] == "Bearer sekrit"


FORKED: Final = """
import os, sys, threading, vllm_provider
client = vllm_provider.VLLMClient(sys.argv[1], default_model="parrot")

def ask(name):
    for turn in range(4):
        prompt = f"{name} {turn}"
        text = client.complete(prompt).text
        if text != prompt:
            print(prompt, "got", text, flush=True)

def start(name):
    threads = [threading.Thread(target=ask, args=(f"{name} {n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    return threads

for thread in start("before"):
    thread.join()
busy = start("parent")  # calls are in flight when the process forks
child = os.fork()
if child == 0:
    for thread in start("child"):
        thread.join()
    client.close()
    os._exit(0)
for thread in busy:
    thread.join()
print(os.waitpid(child, 0)[1])
"""
FORKED_IN_MID_STREAM: Final = """
import os, sys, vllm_provider
with vllm_provider.VLLMClient(sys.argv[1], default_model="parrot") as client:
    with client.stream_complete("x") as stream:
        next(stream)
        child = os.fork()
        if child == 0:
            sys.exit()  # leaves both blocks
        os.waitpid(child, 0)
        client.complete("y")
        print("parent:", "".join(delta.text for delta in stream), flush=True)
"""
needs_fork: Final = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")


def test_a_forked_client_leaves_the_sockets_of_its_parent_alone(server, connect, monkeypatch):
    server.script(stall(FIRST))
    client = connect(server)
    stream = client.stream_complete("x")
    assert next(stream).text == "a"
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        stream.cancel()
        assert client.complete(PROMPT).text == " Paris."
        client.close()
    assert server.aborted.empty()
    assert [request.connection for request in server.requests] == [1, 2]


@needs_fork
def test_a_forked_process_with_threads_has_connections_of_its_own(server):
    server.script(*[echo_prompt] * 96)
    assert run_python(FORKED, server.url) == "0\n"
    users: dict[int, set[bool]] = {}
    for request in server.requests:
        is_child = request.body["prompt"].startswith("child")
        users.setdefault(request.connection, set()).add(is_child)
    assert len(server.requests) == 96
    assert [len(one) for one in users.values()] == [1] * len(users)


@needs_fork
def test_a_forked_process_that_ends_leaves_the_parents_stream_alone(server):
    def step(connection: Connection) -> None:
        connection.send(FIRST + chunk(text_event("b")))
        wait_until(lambda: len(server.requests) == 2)
        connection.send(chunk(text_event("c")) + chunk("[DONE]") + LAST_CHUNK)

    server.script(step)
    assert run_python(FORKED_IN_MID_STREAM, server.url) == "parent: bc\n"


# ---- Transport: calls while an exception is handled -------------------------


SILENT: Final = stall()


def refused_while_reset() -> ConnectionRefusedError:
    error = ConnectionRefusedError(111, "other")
    error.__context__ = ConnectionResetError(104, "other")
    return error


@table(
    "outer",
    row(refused_while_reset(), id="refused"),
    row(TimeoutError("other"), id="timeout"),
    row(socket.gaierror(-2, "other"), id="unknown-host"),
    row(ssl.SSLCertVerificationError("other"), id="certificate"),
    row(requests.exceptions.ProxyError("other"), id="proxy"),
    row(ValueError("other"), id="value"),
)
@table(
    "step",
    row(None, id="refused"),
    row(Connection.close, id="closed"),
    row(send_and_close(b"SSH-2.0\r\n"), id="no-http"),
    row(send_and_close(FIRST), id="mid-stream"),
    row(SILENT, id="timeout"),
    row(reply(503), id="status"),
)
def test_a_call_while_an_exception_is_handled_fails_as_anywhere_else(
    server, connect, retries, step, outer
):
    url = server.url if step else f"http://127.0.0.1:{closed_port()}"
    client = connect(url, timeout=LIMIT if step is SILENT else NEVER, max_retries=2)
    server.script(*[step] * 6)

    def failure() -> tuple[Any, ...]:
        retries.pauses.clear()
        error = caught(list, client.stream_complete("x"))
        return type(error), str(error), error.retryable, len(retries.pauses)

    expected = failure()
    try:
        raise outer
    except type(outer):
        assert failure() == expected


def test_a_stale_connection_never_shows_while_an_exception_is_handled(server, connect):
    client = connect(server, max_retries=0)
    server.script(None, Connection.close)
    client.complete(PROMPT)
    try:
        raise TimeoutError
    except TimeoutError:
        assert client.complete(PROMPT).text == " Paris."


# ---- Transport: TLS ---------------------------------------------------------


UNKNOWN_CA: Final = "set verify to the CA bundle that signed the server's certificate"
WRONG_HOST: Final = "set base_url to a name in the server's certificate"
EXPIRED: Final = "the server's certificate must be renewed (or this machine's clock set)"


@table(
    "host verify reason advice",
    row("127.0.0.1", certifi.where(), "self-signed certificate", UNKNOWN_CA, id="another-ca"),
    row("127.0.0.1", True, "self-signed certificate", UNKNOWN_CA, id="no-ca-of-ours"),
    row(
        "other.test",
        None,
        "Hostname mismatch, certificate is not valid for 'other.test'.",
        WRONG_HOST,
        id="another-host",
    ),
)
def test_a_certificate_that_is_not_good_is_not_retried(
    tls_server, tls_files, connect, retries, test_hosts, host, verify, reason, advice
):
    url = tls_server.url.replace("127.0.0.1", host)
    client = connect(url, verify=tls_files[0] if verify is None else verify)
    for call in (client.version, client.models, functools.partial(client.health, wait=20)):
        error = caught(call)
        assert (type(error), error.retryable) == (NetworkError, False)
        assert str(error) == f"no connection to {url}: TLS failed ({reason}); {advice}"
    assert (retries.pauses, tls_server.requests) == ([], [])


@table(
    "reason advice",
    row("certificate has expired", EXPIRED, id="expired"),
    row("IP address mismatch, certificate is not valid for '1'.", WRONG_HOST, id="address"),
    row("unable to get local issuer certificate", UNKNOWN_CA, id="issuer"),
)
def test_advice_about_a_certificate(web, reason, advice):
    cause = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] failed")
    cause.verify_message, cause.reason = reason, "CERTIFICATE_VERIFY_FAILED"
    raised = requests.exceptions.SSLError("no")
    raised.__cause__ = cause
    web.post(COMPLETIONS_URL, body=raised)
    error = caught(web_client().complete, "x")
    assert str(error) == f"no connection to {WEB}: TLS failed ({reason}); {advice}"


@table(
    "answer message pauses",
    row(
        lambda sock: (sock.recv(65536), sock.sendall(reply(400, "Invalid HTTP request"))),
        "no connection to {url}: TLS failed (",
        0,
        id="speaks-http",
    ),
    row(
        lambda sock: sock.recv(65536),
        "no connection to {url}: the server closed the TLS handshake; is it starting or stopping?",
        2,
        id="closes-as-a-gateway-that-stops-does",
    ),
    row(
        lambda sock: (
            sock.recv(1),
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)),
        ),
        "no connection to {url}: connection reset by peer; is vLLM running? (curl {url}",
        2,
        id="resets-as-a-port-forward-does",
    ),
)
def test_a_tls_handshake_that_fails(connect, retries, answer, message, pauses):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(1 + pauses):
                with listener.accept()[0] as sock:
                    answer(sock)

        serving = InThread(serve)
        url = url_of(listener, "https")
        error = caught(connect(url, max_retries=2).complete, "x")
        serving.outcome()
    assert (type(error), error.retryable) == (NetworkError, pauses > 0)
    assert str(error).startswith(message.format(url=url))
    assert len(retries.pauses) == pauses


def test_http_to_a_server_that_speaks_https(tls_server, connect, retries):
    url = tls_server.url.replace("https", "http")
    error = caught(connect(url).complete, "x")
    assert type(error) is NetworkError
    assert str(error).startswith(f"closed before a reply: POST {url}/v1/completions (")
    assert str(error).endswith("); is vLLM still running, and is it http there?")
    assert retries.pauses == []


@table(
    "verify bundle is_trusted",
    row(True, None, True, id="environment-counts"),
    row(certifi.where(), None, False, id="path-wins"),
    row(False, certifi.where(), True, id="off-wins"),
)
@table("host", "vllm.test", "localhost", "127.0.0.1")
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_the_environments_ca_bundle(
    tls_server, tls_files, connect, monkeypatch, test_hosts, host, verify, bundle, is_trusted
):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle or tls_files[0])
    client = connect(tls_server.url.replace("127.0.0.1", host), verify=verify)
    if is_trusted:
        assert client.complete(PROMPT).text == " Paris."
    else:
        assert type(caught(client.complete, PROMPT)) is NetworkError


def test_a_ca_bundle_of_the_environment_that_is_missing(tls_server, connect, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such.pem")
    error = caught(connect(tls_server, verify=True).complete, "x")
    assert type(error) is ConfigurationError
    assert "/no/such.pem" in str(error)
    assert str(error).endswith("; set verify or REQUESTS_CA_BUNDLE to one that exists")


# ---- Transport: proxies, netrc, other runtimes ------------------------------


@table("api_key", "sekrit", "EMPTY")
@table("host", "127.0.0.1", "localhost", "vllm.test")
def test_netrc_does_not_replace_the_key(
    server, connect, monkeypatch, tmp_path, test_hosts, host, api_key
):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {host} login wrong password wrong\ndefault login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    client = connect(server.url.replace("127.0.0.1", host), api_key=api_key)
    client.complete(PROMPT)
    list(client.stream_complete(PROMPT))
    client.models()
    sent = None if api_key == "EMPTY" else "Bearer sekrit"
    assert [request.headers["Authorization"] for request in server.requests] == [sent] * 3


@table("host", "127.0.0.1", "localhost")
def test_no_proxy_is_used_for_this_machine(server, connect, monkeypatch, host):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    assert connect(server.url.replace("127.0.0.1", host)).complete(PROMPT).text == " Paris."


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 there")
def test_no_proxy_is_used_for_this_machine_over_ipv6(connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    try:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 there")

    def serve() -> None:
        with listener.accept()[0] as sock:
            sock.recv(65536)
            sock.sendall(reply(200, text_event("a")))

    with listener:
        serving = InThread(serve)
        assert connect(f"http://[::1]:{listener.getsockname()[1]}").complete("x").text == "a"
        serving.outcome()


def test_a_proxy_of_the_environment_is_used(server, connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url.replace("//", "//user:pass@"))
    server.script(reply(200, text_event("a")), sse(text_event("b")))
    client = connect("http://vllm.test:8000", api_key="sekrit")
    assert client.complete("x").text == "a"
    assert texts_of(client.stream_complete("x")) == ["b"]
    for request in server.requests:
        assert (request.path, request.connection) == ("http://vllm.test:8000/v1/completions", 1)
        assert request.headers["Host"] == "vllm.test:8000"
        assert request.headers["Authorization"] == "Bearer sekrit"
        assert request.headers["Proxy-Authorization"] == "Basic dXNlcjpwYXNz"


def test_no_proxy_of_the_environment_counts(server, connect, monkeypatch, test_hosts):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "vllm.test")
    client = connect(server.url.replace("127.0.0.1", "vllm.test"))
    assert client.complete(PROMPT).text == " Paris."


def test_a_proxy_that_is_down(connect, monkeypatch, retries):
    monkeypatch.setenv("HTTP_PROXY", f"http://user:sekrit@127.0.0.1:{closed_port()}")
    error = caught(connect("http://vllm.test:8000").complete, "x")
    assert type(error) is NetworkError
    assert str(error).startswith("no connection to http://vllm.test:8000: its proxy failed (")
    assert str(error).endswith("); check HTTPS_PROXY and NO_PROXY")
    assert "sekrit" not in str(error)
    assert len(retries.pauses) == 3


class Proxy:
    """A proxy for CONNECT or SOCKS5 that sends every connection to one port."""

    def __init__(self, to: int, greet: Callable[[socket.socket], bytes], scheme: str) -> None:
        self.targets: list[bytes] = []
        self._to = to
        self._greet = greet
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = url_of(self._listener, scheme)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", self._to)) as far:
            self.targets.append(self._greet(near))
            back = threading.Thread(target=self._pump, args=(far, near), daemon=True)
            back.start()
            self._pump(near, far)
            back.join()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while raw := source.recv(65536):
                target.sendall(raw)
            target.shutdown(socket.SHUT_WR)


def greet_connect(near: socket.socket) -> bytes:
    request = near.recv(65536)
    near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    return request


def greet_socks(near: socket.socket) -> bytes:
    """Take any host without a password (RFC 1928)."""
    near.recv(near.recv(2)[1])
    near.sendall(b"\x05\x00")
    near.recv(4)
    host = near.recv(near.recv(1)[0])
    near.recv(2)
    near.sendall(b"\x05\x00\x00\x01" + bytes(6))
    return host


@table(
    "greet scheme name tls",
    row(greet_connect, "http", "HTTPS_PROXY", True, id="connect-https"),
    row(greet_socks, "socks5h", "ALL_PROXY", False, id="socks-http"),
    row(greet_socks, "socks5h", "ALL_PROXY", True, id="socks-https"),
    indirect=["tls"],
)
def test_a_call_through_a_tunnel(either_server, connect, monkeypatch, tls, greet, scheme, name):
    if scheme != "http":
        pytest.importorskip("socks")

    port = port_of(either_server)
    with Proxy(port, greet, scheme) as proxy:
        monkeypatch.setenv(name, proxy.url)
        url = f"{'https' if tls else 'http'}://vllm.test:{port}"
        client = connect(url, api_key="sekrit")
        assert client.complete(PROMPT).text == " Paris."
        assert texts_of(client.stream_complete(PROMPT)) == [" Paris", ".", ""]
        assert [request.connection for request in either_server.requests] == [1, 1]

        either_server.script(stall(), stall(FIRST))
        with after_limit():
            assert type(caught(client.complete, "x", timeout=LIMIT)) is LLMTimeoutError
        either_server.aborted.get(timeout=1)
        stream = client.stream_complete("x")
        reader = InThread(list, stream)
        wait_until(lambda: stream.completion.text)
        with at_once():
            stream.cancel()
            assert_stopped(reader.outcome(), "cancel", "a")
        either_server.aborted.get(timeout=1)
        client.close()

    assert b"vllm.test" in proxy.targets[0]
    assert b"sekrit" not in b"".join(proxy.targets)


def test_a_proxy_that_refuses_the_tunnel(tls_server, connect, monkeypatch, retries):
    tls_server.close()
    with StandIn() as proxy:
        proxy.script(*[reply(407, "", CLOSING)] * 4)
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        error = caught(connect("https://vllm.test").complete, "x")
    assert type(error) is NetworkError
    assert "its proxy failed (Tunnel connection failed: 407 Proxy Authentication Re" in str(error)
    assert len(retries.pauses) == 3


USED_ELSEWHERE: Final = """
import sys, threading, time, vllm_provider
url, bundle = sys.argv[1:]
client = vllm_provider.VLLMClient(url, default_model="parrot", verify=bundle)
prompt = "The capital of France is"
print(client.complete(prompt).text)
print("".join(delta.text for delta in client.stream_complete(prompt)))

started_at = time.monotonic()
try:
    client.complete("x", timeout=0.3)
except vllm_provider.LLMTimeoutError:
    print("timeout", time.monotonic() - started_at < 2)

stream = client.stream_complete("x")
threading.Timer(0.2, stream.cancel).start()
started_at = time.monotonic()
try:
    list(stream)
except vllm_provider.AbortError:
    print("stopped", time.monotonic() - started_at < 2)

texts = []
threads = [
    threading.Thread(target=lambda: texts.append(client.complete(prompt).text)) for _ in range(8)
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(set(texts))
client.close()
"""


@table(
    "module code",
    row("gevent", "import gevent.monkey; gevent.monkey.patch_all()", id="gevent"),
    row("truststore", "import truststore; truststore.inject_into_ssl()", id="truststore"),
)
@http_and_https
def test_a_runtime_that_replaces_sockets(either_server, tls_files, module, code):
    pytest.importorskip(module)
    either_server.script(None, None, stall(), stall())
    printed = run_python(code + USED_ELSEWHERE, either_server.url, tls_files[0])
    assert printed == " Paris.\n Paris.\ntimeout True\nstopped True\n{' Paris.'}\n"
    for _ in range(2):
        either_server.aborted.get(timeout=1)


# ---- Transport: retries -----------------------------------------------------


def assert_pauses(retries: Retries, *longest: float) -> None:
    """Check that each pause lies in the upper half of its range."""
    assert len(retries.pauses) == len(longest)
    for pause, maximum in zip(retries.pauses, longest, strict=True):
        assert maximum / 2 <= pause <= maximum


def test_a_server_that_is_not_up_yet(connect, retries):
    port = closed_port()
    with contextlib.ExitStack() as stack:

        def start() -> None:
            if len(retries.pauses) == 2:
                stack.enter_context(StandIn(port))

        retries.on_retry = start
        client = connect(f"http://127.0.0.1:{port}")
        assert client.complete(PROMPT).text == " Paris."
    assert_pauses(retries, 0.01, 0.02)


@table("max_retries", 0, 2, None)
def test_a_server_that_is_down(connect, retries, max_retries):
    url = f"http://127.0.0.1:{closed_port()}"
    error = caught(connect(url, max_retries=max_retries).complete, "x")
    message = f"no connection to {url}: connection refused; is vLLM running? (curl {url}/health)"
    assert (type(error), str(error), error.retryable) == (NetworkError, message, True)
    assert_pauses(retries, *(0.01, 0.02, 0.04)[: 3 if max_retries is None else max_retries])


@table(
    "number is_retried",
    row(errno.EHOSTUNREACH, True, id="host-unreachable"),
    row(errno.ENETUNREACH, True, id="network-unreachable"),
    row(errno.ECONNRESET, True, id="reset"),
)
def test_errors_of_connecting(connect, monkeypatch, retries, number, is_retried):
    def connect_ex(*_args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "connect", connect_ex)
    error = caught(connect("http://127.0.0.1:9").complete, "x")
    reason = os.strerror(number).lower()
    assert str(error).startswith(f"no connection to http://127.0.0.1:9: {reason}; is vLLM running?")
    assert (type(error), len(retries.pauses)) == (NetworkError, 3 * is_retried)


def test_unknown_hosts_are_not_retried(connect, retries, monkeypatch):
    def look_up(*_args: Any, **_options: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    error = caught(connect("http://vlm.test:8000").complete, "x")
    message = "no connection to http://vlm.test:8000: unknown host; is base_url spelled right?"
    assert (type(error), str(error), error.retryable) == (NetworkError, message, False)
    assert retries.pauses == []


def http_date(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@table(
    "status retry_after shortest",
    row(429, None, 0.0, id="429"),
    row(502, None, 0.0, id="502"),
    row(503, None, 0.0, id="503"),
    row(503, "0.1", 0.1, id="retry-after"),
    row(503, "0", 0.0, id="now"),
    row(503, "-5", 0.0, id="negative"),
    row(503, "soon", 0.0, id="no-number"),
    row(503, "inf", 0.0, id="infinite"),
    row(503, http_date(-100), 0.0, id="date-gone-by"),
)
@whole_and_stream
def test_what_is_retried(server, connect, retries, is_stream, status, retry_after, shortest):
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    server.script(reply(status, {"error": "busy"}, headers))
    assert "".join(texts_of(generate(connect(server), is_stream, PROMPT))) == " Paris."
    (pause,) = retries.pauses
    assert shortest + 0.005 <= pause <= shortest + 0.01  # the random part comes on top
    first, second = server.requests
    assert second.time_s - first.time_s >= pause


@table(
    "status headers",
    *(row(status, {"Retry-After": "1"}, id=str(status)) for status in (400, 403, 408, 418)),
    *(row(status, {"Retry-After": "1"}, id=str(status)) for status in (425, 500, 501, 504)),
    row(429, {"Retry-After": "31"}, id="retry-after-above-the-maximum"),
    row(503, {"Retry-After": http_date(3600)}, id="date-above-the-maximum"),
)
def test_what_is_not_retried(server, connect, retries, status, headers):
    server.script(reply(status, {"error": "no"}, headers))
    error = caught(connect(server).complete, "x")
    assert (error.status_code, error.server_message) == (status, "no")
    assert error.retry_after >= 1
    assert (len(server.requests), retries.pauses) == (1, [])


def test_retries_end_with_the_last_error(server, connect, retries, caplog):
    server.script(*[reply(503, {"error": "busy"}), reply(429, {"error": "quota"})] * 2)
    error = caught(connect(server).complete, "x")
    assert type(error) is RateLimitError
    assert (error.status_code, error.retryable, error.server_message) == (429, True, "quota")
    assert_pauses(retries, 0.01, 0.02, 0.04)
    assert len(server.requests) == 4
    where = f"POST {server.url}/v1/completions"
    advice = "the server is busy or starting: try again later"
    assert caplog.messages == [
        f"retry 1 of 3 in 0.0 s: 503 'busy': {where}; {advice}",
        f"retry 2 of 3 in 0.0 s: 429 'quota': {where}",
        f"retry 3 of 3 in 0.0 s: 503 'busy': {where}; {advice}",
    ]


def test_pauses_double_up_to_max_retry_delay(server, connect, retries):
    server.script(*[reply(503)] * 6)
    client = connect(server, max_retries=6, max_retry_delay=0.06)
    assert client.complete(PROMPT).text == " Paris."
    assert_pauses(retries, 0.01, 0.02, 0.04, 0.06, 0.06, 0.06)
    assert len(set(retries.pauses)) == 6


def test_each_attempt_has_an_id_of_its_own(server, connect, retries):
    server.script(reply(503), reply(503), path=GENERATION)
    client = connect(server, default_model=None)
    first, second = client.complete(PROMPT), client.complete(PROMPT)
    posts = [request for request in server.requests if request.method == "POST"]
    ids = [request.headers["X-Request-Id"] for request in posts]
    assert ids == [f"{first.request_id}-{n}" for n in (1, 2, 3)] + [f"{second.request_id}-1"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first.request_id)
    assert first.id == f"cmpl-{ids[2]}"


@table("own_id", "mine-7", 7, 1.5, True)
def test_the_callers_request_id_goes_unchanged(server, connect, own_id):
    server.script(reply(503), reply(200, text_event("a")), reply(400))
    client = connect(server)
    assert client.complete(PROMPT, request_id=own_id).request_id == str(own_id)
    assert caught(client.complete, "x", request_id=own_id).request_id == str(own_id)
    assert [request.headers["X-Request-Id"] for request in server.requests] == [str(own_id)] * 3


# ---- Stream decoder ---------------------------------------------------------

NO_LINE_ENDS: Final = "\u2028\u2029\x85\x0b\x0c\x1c"
SSE_CASES: Final = [
    # the examples of the HTML standard, section 9.2.6
    row(b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"], id="standard-several-lines"),
    row(
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third",
        ["first event", "second event"],
        id="standard-comment-fields-and-an-end-without-a-blank-line",
    ),
    row(b"data\n\ndata\ndata\n\ndata:", ["\n"], id="standard-empty-data"),
    row(b"data:test\n\ndata: test\n\n", ["test", "test"], id="standard-one-space-is-dropped"),
    row(b"data:  two\n\ndata:\ttab\n\n", [" two", "\ttab"], id="only-one-and-only-a-space"),
    # line ends
    row(b"data: a\n\ndata: b\n\n", ["a", "b"], id="lf"),
    row(b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"], id="crlf"),
    row(b"data: a\r\rdata: b\r\r", ["a", "b"], id="cr"),
    row(b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\n", ["a", "b", "c"], id="mixed"),
    row(b"data: a\n\r", ["a"], id="lf-then-cr-are-two-ends"),
    row(b"data: a\r\ndata: b\r\n\r\n", ["a\nb"], id="crlf-is-one-end"),
    row(b"\n\n\r\r\n\ndata: a\n\n\n\n", ["a"], id="blank-lines-are-no-events"),
    row(b"data: a\n\ndata: b\rdata: c\n\n", ["a", "b\nc"], id="cr-inside-what-looks-like-one-line"),
    row(f"data: {NO_LINE_ENDS}\n\n".encode(), [NO_LINE_ENDS], id="nothing-else-ends-a-line"),
    # the byte order mark
    row(b"\xef\xbb\xbfdata: a\n\n", ["a"], id="bom"),
    row(b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", ["b"], id="one-bom"),
    row(b"data: a\n\n\xef\xbb\xbfdata: b\n\ndata: c\n\n", ["a", "c"], id="bom-only-at-the-start"),
    row(b"\n\xef\xbb\xbfdata: a\n\ndata: b\n\n", ["b"], id="not-on-the-second-line"),
    row(b"data: \xef\xbb\xbfa\n\n", ["\ufeffa"], id="a-bom-in-data-is-data"),
    # fields
    row(b": keep-alive\n\n:\n\n: \n\ndata: a\n\n", ["a"], id="0.29-comments"),
    row(b"data: a\n: in between\ndata: b\n\n", ["a\nb"], id="comment-inside"),
    row(b"event: delta\ndata: a\nid: 1\nretry: 5\n\n", ["a"], id="other-fields"),
    row(b"event: ping\n\ndata: a\n\n", ["a"], id="an-event-without-data-is-none"),
    row(b"Data: a\n data: b\ndata : c\ndatax: d\nxdata: e\n\n", [], id="names-are-exact"),
    row(b"data: a: b\n\n", ["a: b"], id="colon-in-data"),
    row(b"data: \n\ndata:\n\n", [], id="nothing-in-data-is-no-event"),
    row(b"data: data: a\n\n", ["data: a"], id="data-in-data"),
    # vLLM
    row(b'data: {"a": "\\n"}\n\ndata: [DONE]\n\n', ['{"a": "\\n"}', "[DONE]"], id="as-vllm-sends"),
    row("data: こんにちは 🌸🚀é\n\n".encode(), ["こんにちは 🌸🚀é"], id="cuts-inside-a-letter"),
    row(b"data: \xff\xe3\x81a\n\n", ["\ufffd\ufffda"], id="what-is-not-utf-8"),
    row(b"data: a\n", [], id="an-event-ends-with-a-blank-line"),
    row(b"", [], id="nothing"),
]


def feed_all(pieces: Iterable[bytes]) -> list[str]:
    decoder = _SSEDecoder()
    events: list[str] = []
    for piece in pieces:
        events += decoder.feed(piece)
    return events


@table("raw events", *SSE_CASES)
def test_sse(raw, events):
    assert feed_all([raw]) == events
    assert feed_all([b"", raw, b""]) == events
    assert feed_all(bytes([byte]) for byte in raw) == events
    for first, second in itertools.combinations_with_replacement(range(len(raw) + 1), 2):
        assert feed_all([raw[:first], raw[first:second], raw[second:]]) == events, (first, second)


def test_an_event_is_complete_as_soon_as_its_blank_line_is_there():
    decoder = _SSEDecoder()
    found = [decoder.feed(bytes([byte])) for byte in b"data: a\n\ndata: b\r\r\n"]
    assert found == [*[[]] * 8, ["a"], *[[]] * 8, ["b"], []]


@table(
    "raw events",
    row(b"data: [DONE]", ["[DONE]"], id="without-a-line-end"),
    row(b"data: [DONE]\n", ["[DONE]"], id="without-a-blank-line"),
    row(b"data:[DONE]\r\n", ["[DONE]"], id="crlf"),
    row(b"data: a", [], id="any-other-event-is-not-complete"),
    row(b"data: a\ndata: [DONE]", [], id="second-line-of-another-event"),
    row(b"data: [DONE", [], id="cut"),
    row(b"data: [DONE]\n\n", [], id="complete-before"),
    row(b"", [], id="nothing"),
)
def test_done_counts_at_the_end_of_the_connection(raw, events):
    for cut in range(len(raw) + 1):
        decoder = _SSEDecoder()
        decoder.feed(raw[:cut])
        decoder.feed(raw[cut:])
        assert decoder.finish() == events, cut


@table(
    "start piece",
    row(b"data: ", b"x" * 100, id="line-without-end"),
    row(b"", b"data: " + b"x" * 93 + b"\n", id="event-without-end"),
    row(b": ", b"x" * 100, id="comment-without-end"),
    row(b"", b"data:\n" * 20, id="many-empty-lines-of-data"),
)
def test_an_event_may_be_no_larger_than_its_limit(monkeypatch, start, piece):
    assert vllm_provider.MAX_EVENT_BYTES == 64 * 1024 * 1024
    monkeypatch.setattr(vllm_provider, "MAX_EVENT_BYTES", 1000)
    decoder = _SSEDecoder()
    decoder.feed(start)
    for _ in range(1000 // len(piece) - 1):
        assert decoder.feed(piece) == []
    error = caught(lambda: [decoder.feed(piece) for _ in range(4)])
    assert type(error) is ProtocolError
    assert str(error) == "an event of the stream is larger than 1000 bytes"


def test_the_limit_counts_one_event(monkeypatch):
    monkeypatch.setattr(vllm_provider, "MAX_EVENT_BYTES", 100)
    decoder = _SSEDecoder()
    for _ in range(3):
        assert decoder.feed(b"data: " + b"x" * 94) == []
        assert decoder.feed(b"\n\n") == ["x" * 94]
        assert decoder.feed(b": " + b"x" * 98 + b"\n\n") == []


EVENTS: Final = [EVENT_A, EVENT_A.replace(b'"a"', b'"b"'), b"data: [DONE]\n\n"]
BODY: Final = b"".join(EVENTS)
PLAIN_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
LENGTH_HEAD: Final = PLAIN_HEAD + b"content-length: %d\r\n\r\n" % len(BODY)
CHUNKED: Final = SSE_HEAD + b"".join(map(chunk, EVENTS)) + LAST_CHUNK
CLOSED_HEAD: Final = PLAIN_HEAD + b"connection: close\r\n\r\n"


@table(
    "raw step",
    row(CHUNKED, 1, id="chunked-as-vllm-does"),
    row(SSE_HEAD + chunk(BODY) + LAST_CHUNK, 3, id="all-in-a-chunk"),
    row(SSE_HEAD + b"".join(chunk(bytes([b])) for b in BODY) + LAST_CHUNK, 7, id="a-byte-each"),
    row(CLOSED_HEAD + BODY, 1, id="until-it-closes"),
    row(LENGTH_HEAD + BODY, 3, id="content-length"),
)
def test_a_stream_cut_at_every_byte_keeps_its_whole_events(server, connect, raw, step):
    client = connect(server, max_retries=0)
    sizes = range(raw.index(b"\r\n\r\n") + 4, len(raw), step)
    for size in sizes:
        server.script(send_and_close(raw[:size]))
        stream = client.stream_complete("x")
        outcome = InThread(list, stream).outcome()

        events = re.sub(rb"\r\n1\r\n", b"", raw[:size]).count(b"\n\n")
        assert texts_of(stream.completion.choices) == ["ab"[:events]] * (events > 0), size
        if isinstance(outcome, list):
            assert b"DONE]" in re.sub(rb"\r\n1\r\n", b"", raw[:size]), size
            assert texts_of(outcome) == ["a", "b"]
        else:
            assert type(outcome) is StreamError, size
            assert (outcome.retryable, outcome.partial) == (True, stream.completion)
    assert len(server.requests) == len(sizes)


def framed(start: bytes = b"", end: bytes = b"", last: bytes = LAST_CHUNK) -> bytes:
    """Return a chunked reply whose sizes have something before and after them."""
    chunks = [start + b"%X" % len(raw) + end + b"\r\n" + raw + b"\r\n" for raw in EVENTS]
    return SSE_HEAD + b"".join(chunks) + last


@table(
    "raw",
    row(framed(), id="capital-digits"),
    row(framed(start=b"000"), id="leading-zeros"),
    row(framed(end=b';name="a value"'), id="extensions"),
    row(framed(end=b" "), id="spaces"),
    row(framed(last=b"000;a=b\r\n\r\n"), id="last-chunk-with-zeros"),
    row(framed(last=b"0\r\nX-Checksum: 1\r\n\r\n"), id="trailers"),
    row(SSE_HEAD + chunk(b": " + b"a" * 99_000 + b"\n\n" + BODY) + LAST_CHUNK, id="large"),
    row(LENGTH_HEAD + BODY, id="length"),
)
def test_a_stream_is_the_same_however_it_is_framed_and_cut(server, connect, raw):
    client = connect(server)
    cuts = [0, *range(len(raw) % 17 + 1, len(raw), 17)][:60]
    for cut in cuts:

        def step(connection: Connection, head: bytes = raw[:cut], tail: bytes = raw[cut:]) -> None:
            connection.send(head)
            connection.pause(0.001)
            connection.send(tail)

        server.script(step)
        assert texts_of(client.stream_complete("x")) == ["a", "b"], cut
    assert {request.connection for request in server.requests} == {1}


@table("size", b"", b"g", b"-1", b"1e", b"0x5", b"+5", b"5 5", b"f" * 30)
def test_a_chunk_without_a_size_is_where_the_reply_breaks_off(server, connect, size):
    server.script(send_and_close(FIRST + size + b"\r\nx\r\n"))
    error = caught(list, connect(server).stream_complete("x"))
    assert (type(error), error.partial.text) == (StreamError, "a")
    where = f"POST {server.url}/v1/completions"
    reason = "the connection was closed; look at the server's log"
    assert str(error) == f"the reply broke off: {where}: {reason}"


def test_a_reset_stream_keeps_what_had_arrived(server, connect):
    has_read = threading.Event()

    def step(connection: Connection) -> None:
        connection.send(FIRST)
        has_read.wait(IN_TIME)
        connection.reset()

    server.script(step)
    stream = connect(server).stream_complete("x")
    assert next(stream).text == "a"
    has_read.set()
    error = caught(next, stream)
    assert type(error) is StreamError
    where = f"POST {server.url}/v1/completions"
    assert str(error) == f"the reply broke off: {where}: connection reset by peer"
    assert error.partial.text == "a"
    assert len(server.requests) == 1


# ---- Replies: errors --------------------------------------------------------

OVERFLOW_032: Final = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least"
    " 2049 input tokens, which exceeds this limit even without any output tokens. Please reduce"
    " the length of the input prompt. (parameter=input_tokens, value=2049)"
)
ROOT_ADVICE: Final = "is base_url the server's root, and is it vLLM? (curl BASE_URL/v1/models)"
TOO_BUSY: Final = "the server is busy or starting: try again later"


NOT_VLLM: Final = f"; {ROOT_ADVICE}"
STATUS_ADVICE: Final = {
    401: "; set api_key or VLLM_API_KEY to the key the server was started with",
    403: "; the key may not do this, or a gateway hides the path",
    404: NOT_VLLM,
    405: NOT_VLLM,
    413: "; a proxy limits the size of a request",
    502: "; the gateway got no reply from vLLM: is it running?",
    503: f"; {TOO_BUSY}",
    504: "; a proxy gave up waiting; vLLM may still be at work",
}


@table(
    "status kind retryable",
    (201, StatusError, False),  # not what vLLM answers
    (400, InvalidRequestError, False),
    (401, AuthenticationError, False),
    (403, AccessDeniedError, False),
    (404, NotFoundError, False),
    (405, StatusError, False),
    (408, StatusError, True),
    (413, StatusError, False),
    (418, StatusError, False),
    (422, InvalidRequestError, False),
    (425, StatusError, True),
    (429, RateLimitError, True),
    (500, ProviderUnavailableError, True),
    (501, ProviderUnavailableError, False),  # never will
    *((status, ProviderUnavailableError, True) for status in (502, 503, 504, 529)),
)
@whole_and_stream
def test_status(web, is_stream, status, kind, retryable):
    web.post(COMPLETIONS_URL, status=status, body="no")
    error = caught(generate, web_client(), is_stream)
    advice = STATUS_ADVICE.get(status, "")
    assert (type(error), str(error)) == (kind, f"{status} 'no': POST {COMPLETIONS_URL}{advice}")
    assert (error.status_code, error.retryable, error.retry_after) == (status, retryable, None)
    assert error.server_message == "no"
    assert web.calls[0].request.headers["X-Request-Id"] == f"{error.request_id}-1"
    assert error.partial.choices == ()
    assert len(web.calls) == 1


PAGE: Final = "<html>\r\n<head><title>Bad\tGateway &amp; co</title></head></html>"


@table(
    "body shown server_message",
    row(json.dumps(error_payload("bad x")), "'bad x'", "bad x", id="nested"),
    row('{"object":"error","message":"bad x","code":400}', "'bad x'", "bad x", id="flat"),
    row('{"error":"Unauthorized"}', "'Unauthorized'", "Unauthorized", id="string"),
    row('{"detail":"Not Found"}', "'Not Found'", "Not Found", id="fastapi"),
    row('{"detail":[{"a":1}]}', """'[{"a": 1}]'""", '[{"a": 1}]', id="fastapi-list"),
    row('{"error":{"error":{"message":"deep"}}}', "'deep'", "deep", id="doubly-nested"),
    row('{"message":"a"}', "'a'", "a", id="message-alone"),
    row('{"error":{"msg":"a"}}', """'{"msg": "a"}'""", '{"msg": "a"}', id="no-message"),
    row('["a"]', """'["a"]'""", '["a"]', id="list"),
    row("a\n  b", "'a b'", "a\n  b", id="lines-are-joined"),
    row("", "(no message)", "", id="empty"),
    row(" \n", "(no message)", " \n", id="blank"),
    row("null", "(no message)", "", id="null"),
    row('{"error":{"message":null,"code":400}}', "(no message)", "", id="message-null"),
    row(PAGE, "'Bad Gateway & co'", PAGE, id="title-of-a-page"),
    row("<p>no</p>", "'<p>no</p>'", "<p>no</p>", id="page-without-a-title"),
    row('{"error": ', """'{"error":'""", '{"error": ', id="half-of-json"),
    row('"quota"', "'quota'", "quota", id="json-string"),
    row("[" * 100_000, repr("[" * 200 + "…"), "[" * 100_000, id="nested-beyond-reason"),
    row("Zoë".encode(), "'Zoë'", "Zoë", id="utf-8"),
    row(b"Zo\xeb", "'Zo\ufffd'", "Zo\ufffd", id="not-utf-8"),
    row("x" * 200, repr("x" * 200), "x" * 200, id="200-characters-are-quoted"),
    row("x" * 201, repr("x" * 200 + "…"), "x" * 201, id="no-more"),
    row(" " * 5000 + "x", repr("x"), " " * 5000 + "x", id="message-behind-much-white-space"),
)
def test_body_of_an_error(web, body, shown, server_message):
    web.post(COMPLETIONS_URL, status=418, body=body)
    error = caught(web_client().complete, "Once")
    assert str(error) == f"418 {shown}: POST {COMPLETIONS_URL}"
    assert error.server_message == server_message


def test_a_very_large_body_of_an_error_is_cut(server, connect, monkeypatch):
    monkeypatch.setattr(vllm_provider, "MAX_ERROR_BYTES", 1000)
    head = JSON_HEAD.replace(b"200 OK", b"418 No")
    server.script(repeat(chunk(b"x" * 100), head, 0.0))
    error = caught(connect(server).complete, "Once")
    assert (error.status_code, len(error.server_message)) == (418, 1000)
    server.aborted.get(timeout=1)


UNAVAILABLE: Final = ProviderUnavailableError


@table(
    "payload kind message",
    row(error_payload("bad"), InvalidRequestError, "400 'bad'", id="nested-since-0.10.1"),
    row(
        {"object": "error", "message": "a", "code": 400}, InvalidRequestError, "400 'a'", id="flat"
    ),
    row({"error": {"message": "a", "code": 422}}, InvalidRequestError, "422 'a'", id="in-0.10.0"),
    row({"error": error_payload("bad", 405)}, StatusError, "405 'bad'", id="doubly-nested"),
    row({"error": "Scaling."}, UNAVAILABLE, "500 'Scaling.'", id="string"),
    row(error_payload("", 500), UNAVAILABLE, "500 (no message)", id="EngineGenerateError"),
    row(error_payload("EngineCore died."), UNAVAILABLE, "500 'EngineCore died.'", id="up-to-0.14"),
    row({"choices": [1], **error_payload("a", 501)}, UNAVAILABLE, "501 'a'", id="beside-choices"),
    row(error_payload("model_not_found", "x"), UNAVAILABLE, "500 'model_", id="code-in-letters"),
    *(row(error_payload("no", code), UNAVAILABLE, "500 'no'") for code in (True, 200, 99999, 4e2)),
    row(error_payload(OVERFLOW_032), ContextLengthError, "the prompt ", id="overflow"),
)
def test_error_in_a_reply_with_status_200(web, payload, kind, message):
    web.post(CHAT_URL, json=payload)
    event = f"data: {json.dumps(payload)}\n\n{DONE}"
    web.post(CHAT_URL, body=event, content_type="text/event-stream")
    client = web_client()
    for error in (
        caught(parse_completion_response, payload),
        caught(parse_chat_response, payload),
        caught(client.chat, "Once"),
        caught(list, client.stream_chat("Once")),
    ):
        assert type(error) is kind
        assert str(error).startswith(message)
        assert str(error.status_code) == (message[:3] if message[0].isdigit() else "400")


ADVICE: Final = {  # by what the server's text holds
    '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser': (
        "start vLLM with --enable-auto-tool-choice --tool-call-parser NAME, or send no tools"
    ),
    "default chat template is no longer allowed, so you must provide a chat template": (
        "this model has no chat template: use complete(), or start vLLM with --chat-template FILE"
    ),
    "Chat template is passed, but --trust-request-chat-template is not set.": (
        "start vLLM with that flag, or send no chat_template"
    ),
    "Cannot apply chat template to an empty conversation.": "",
    "EngineCore encountered an issue. See stack trace (above) for the root cause.": (
        "the engine has died: look at the server's log and start it again"
    ),
    "Requested sample logprobs of 500, which is greater than max allowed: 20": (
        "ask for fewer, or start vLLM with --max-logprobs N"
    ),
    "Out of range float values are not JSON compliant": (
        "the model computed NaN: try without logprobs, or another --dtype"
    ),
}


@table("message advice", *ADVICE.items())
def test_advice(web, message, advice):
    status = 500 if "EngineCore" in message else 400
    web.post(CHAT_URL, status=status, json=error_payload(message, status))
    error = caught(web_client().chat, "Once")
    is_fault_of_server = status == 500 or "float" in message
    assert type(error) is (UNAVAILABLE if is_fault_of_server else InvalidRequestError)
    assert error.retryable is (status == 500)
    assert str(error) == f"{status} {message!r}: POST {CHAT_URL}{advice and '; '}{advice}"


@table(
    "status page is_starting",
    row(404, "<html><body>Model is warming up</body></html>", True, id="404-warming-up"),
    row(404, "<!doctype html><p>INITIALIZING", True, id="404-initializing"),
    row(425, "<html>service is starting", True, id="425-service-is-starting"),
    row(404, "\n <html>waiting for service to respond", True, id="404-waiting"),
    row(404, "<html>starting up", True, id="404-starting-up"),
    row(403, "<html><title>Just a moment...</title>Cloudflare", True, id="403-cloudflare"),
    row(404, "<html>nothing here", False, id="404-other-page"),
    row(404, '{"error": "warming up"}', False, id="404-json"),
    row(404, "warming up", False, id="404-text"),
    row(403, "<html>warming up", False, id="403-other-page"),
    row(400, "<html>warming up", False, id="400-page"),
)
def test_the_page_of_a_gateway_that_is_starting(web, retries, status, page, is_starting):
    web.post(COMPLETIONS_URL, status=status, body=page, content_type="text/html")
    client = web_client(max_retries=1, min_retry_delay=0.001)
    error = caught(client.complete, "x")
    advice = "a gateway is in front of the server, which may be starting: try again later"
    assert (advice in str(error)) is is_starting
    assert (type(error) is ProviderUnavailableError) is is_starting
    assert (error.status_code, error.retryable) == (status, is_starting)
    assert len(retries.pauses) == is_starting


KEY: Final = 'sk/ab&c=12"3<45'


def json_escapes(digits: str) -> str:
    return "".join(f"\\u{ord(char):{digits}}" for char in KEY)


@table(
    "spelling",
    row(json.dumps(KEY)[1:-1], id="json"),
    row(json.dumps(KEY)[1:-1].replace("/", "\\/"), id="json-escaped-slash"),
    row(json_escapes("04x"), id="json-escapes"),
    row(json_escapes("04X"), id="json-escapes-in-capitals"),
    row(json.dumps(json.dumps(KEY)[1:-1])[1:-1], id="json-in-json"),
    row(urllib.parse.quote(KEY, safe=""), id="url"),
    row(urllib.parse.quote(KEY, safe="").lower(), id="url-in-small-letters"),
    row(html.escape(KEY), id="html"),
    row("".join(f"&#{ord(char)};" for char in KEY), id="html-numbers"),
    row("".join(f"&#x{ord(char):X};" for char in KEY), id="html-hex-numbers"),
)
@table(
    "status kind body",
    row(401, "plain", "bad key {}", id="text"),
    row(401, "json", '{{"error": "bad key {}"}}', id="json"),
    row(200, "json", '{{"error": {{"message": "bad key {}", "code": 401}}}}', id="200-json"),
    row(200, "html", "<p>bad key {}</p>", id="200-html"),
    row(200, "event-stream", 'data: {{"error": "bad key {}"}}\n\n', id="event"),
    row(200, "event-stream", "data: bad key {}\n\n", id="event-that-is-not-json"),
    row(403, "html", "<title>bad key {}</title>", id="title"),
    row(307, "plain", "https://x.test/{}/v1/completions", id="redirect"),
)
def test_no_error_shows_the_key_in_any_spelling(web, spelling, status, kind, body):
    body = body.format(spelling)
    headers = {"Location": body} if status == 307 else {}
    web.post(
        COMPLETIONS_URL, status=status, body=body, content_type=f"text/{kind}", headers=headers
    )
    error = caught(list, web_client(api_key=KEY).stream_complete("x"))
    shown = f"{error} {getattr(error, 'server_message', '')}"
    assert "***" in shown
    for secret in (KEY, spelling, KEY[3:8]):
        assert secret not in html.unescape(shown)


@table(
    "body",
    row({"error": {"message": "{'type': 'bad', 'input': 'MY PROMPT'}"}}, id="vllm"),
    row({"error": {"message": '{"type": "bad", "input": "MY PROMPT"}'}}, id="quoted-twice"),
    row({"detail": [{"type": "bad", "input": {"prompt": "MY PROMPT"}}]}, id="fastapi"),
)
@table("status", 400, 422)
def test_a_validation_error_does_not_quote_the_prompt(web, status, body):
    web.post(COMPLETIONS_URL, status=status, json=body)
    error = caught(web_client().complete, "MY PROMPT")
    assert "MY PROMPT" not in str(error)
    assert "bad" in str(error)
    assert "MY PROMPT" in error.server_message


@table(
    "value seconds",
    row("7", 7.0, id="seconds"),
    row("0", 0.0, id="now"),
    row(" 1.5 ", 1.5, id="fraction-and-blanks"),
    row("-5", 0.0, id="negative"),
    row("soon", None, id="no-number"),
    row("", None, id="empty"),
    row("inf", None, id="infinity"),
    row("nan", None, id="nan"),
    row("1" * 5000, None, id="too-many-digits"),
    row("Wed, 21 Oct 2015 07:28:00 GMT", 0.0, id="date-in-the-past"),
    row("Wed, 99 Oct 2015 07:28:00 GMT", None, id="no-such-date"),
    row("Wed, 21 Oct 99999 07:28:00 GMT", None, id="no-such-year"),
    row("Wed, 21 Oct 2015 07:28:00 +99999999999", None, id="no-such-zone"),
)
def test_retry_after(web, value, seconds):
    web.post(COMPLETIONS_URL, status=503, body="busy", headers={"Retry-After": value})
    assert caught(web_client().complete, "Once").retry_after == seconds


@table("zone", "GMT", "-0000", "+0000")
def test_retry_after_a_date(web, zone):
    date = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=100))
    headers = {"retry-after": date.replace("+0000", zone)}
    web.post(COMPLETIONS_URL, status=503, headers=headers)
    assert 30 < caught(web_client().complete, "Once").retry_after <= 100


@table(
    "path location base_url",
    row(GENERATION, "https://gpu.example/v1/completions", "https://gpu.example", id="https"),
    row(GENERATION, "http://vllm.test/a/v1/completions", "http://vllm.test/a", id="prefix"),
    row(GENERATION, "/a/v1/completions", "http://vllm.test/a", id="path"),
    row(GENERATION, "https://gpu.example/v1/completions/", "https://gpu.example", id="slash"),
    row(MODELS, "https://gpu.example/v1/models", "https://gpu.example", id="models"),
    row("/health", "https://gpu.example/health?a=b", "https://gpu.example", id="health"),
    row(GENERATION, "https://sso.example/login?next=/v1/completions", None, id="login-page"),
    row(GENERATION, "/login?next=%2Fv1%2Fcompletions", None, id="login-path"),
    row(GENERATION, "http://[::1", None, id="no-url"),
    row(GENERATION, "", None, id="nowhere"),
)
@table("status", 301, 302, 303, 307, 308)
def test_redirects_are_not_followed(web, status, path, location, base_url):
    call = {MODELS: VLLMClient.models, "/health": VLLMClient.health}.get(path)
    method = "POST" if call is None else "GET"
    web.add(method, WEB + path, status=status, headers={"Location": location} if location else {})
    client = web_client(max_retries=3)
    error = caught(client.complete, "x") if call is None else caught(call, client)
    advice = "" if base_url is None else f"; set base_url to {base_url!r}"
    assert (type(error), error.status_code, error.retryable) == (StatusError, status, False)
    assert str(error) == (
        f"{method} {WEB}{path} is redirected to {location!r}, which is not followed: the prompt"
        f" would go to another place{advice}"
    )
    assert len(web.calls) == 1


# ---- Replies: what requests raises ------------------------------------------

REQUESTS_KINDS: Final = {
    **dict.fromkeys(["Timeout", "ConnectTimeout", "ReadTimeout"], LLMTimeoutError),
    **dict.fromkeys(["ConnectionError", "ProxyError", "ChunkedEncodingError"], NetworkError),
    **dict.fromkeys(["RequestException", "RetryError", "TooManyRedirects"], NetworkError),
    **dict.fromkeys(["HTTPError", "StreamConsumedError", "UnrewindableBodyError"], None),
    **dict.fromkeys(["ContentDecodingError", "InvalidJSONError", "JSONDecodeError"], None),
    **dict.fromkeys(["InvalidHeader", "InvalidProxyURL", "InvalidSchema"], ConfigurationError),
    **dict.fromkeys(["InvalidURL", "MissingSchema", "URLRequired"], None),
    "SSLError": NetworkError,
}


def requests_errors() -> dict[str, type[requests.RequestException]]:
    classes = inspect.getmembers(requests.exceptions, inspect.isclass)
    return {name: one for name, one in classes if issubclass(one, requests.RequestException)}


def test_requests_has_no_exception_this_table_does_not_know():
    assert requests_errors().keys() == REQUESTS_KINDS.keys()


@table("name", *REQUESTS_KINDS)
@whole_and_stream
def test_every_exception_of_requests_is_translated(web, is_stream, name):
    arguments = ("broken", "{", 0) if name == "JSONDecodeError" else ("broken",)
    raised = requests_errors()[name](*arguments)
    web.post(COMPLETIONS_URL, body=raised)
    error = caught(generate, web_client(), is_stream)
    assert type(error) is (REQUESTS_KINDS[name] or type(error))
    assert error.__cause__ is raised
    assert WEB in str(error)


# ---- Replies: that are none of vLLM's ---------------------------------------


@table(
    "body",
    row("<html>\n<h1>Welcome to nginx!</h1>", id="html"),
    row("", id="empty"),
    row("[1]", id="list"),
    row('"x"', id="string"),
    row("null", id="null"),
    row('{"choices": [', id="cut"),
    row('{"choices": []} {}', id="two-objects"),
    row("[" * 100_000, id="nested-beyond-reason"),
    row('{"a":' * 100_000, id="objects-beyond-reason"),
)
@table("is_event", row(False, id="whole"), row(True, id="event"))
def test_what_is_not_json(web, is_event, body):
    good = f"data: {json.dumps(text_event('a'))}\n\n"
    lines = " ".join(body.split())
    if is_event:
        body = f"{good}data: {body or ' '}\n\n{DONE}".replace("\n<", "<")
        lines = lines.replace("> <", "><")
    content_type = "text/event-stream" if is_event else "application/json"
    web.post(COMPLETIONS_URL, body=body, content_type=content_type)
    error = caught(list, web_client().stream_complete("Once"))
    quoted = repr(lines if len(lines) <= 200 else lines[:200] + "…")
    assert type(error) is ProtocolError
    assert str(error) == f"not the JSON vLLM sends: POST {COMPLETIONS_URL}: {quoted}; {ROOT_ADVICE}"
    assert (error.retryable, error.status_code) == (False, None)
    assert error.partial.text == ("a" if is_event else "")


@pytest.mark.parametrize(
    ("encoding", "is_known"),
    [("gzip", False), ("br", False), ("identity, gzip", False), ("Identity", True), ("", True)],
)
@whole_and_stream
def test_encodings(web, is_stream, encoding, is_known):
    headers = {"Content-Encoding": encoding}
    web.post(COMPLETIONS_URL, json=text_event("a"), headers=headers)
    if is_known:
        assert texts_of(generate(web_client(), is_stream)) == ["a"]
    else:
        error = caught(generate, web_client(), is_stream)
        where = f"POST {COMPLETIONS_URL}"
        message = f"the reply is encoded as {encoding!r}, which was not requested: {where}"
        assert (type(error), str(error)) == (ProtocolError, message)
    assert web.calls[0].request.headers["Accept-Encoding"] == "identity"


@table(
    "content_type body is_stream",
    row("Content-Type: Text/Event-Stream", BODY, True, id="capitals"),
    row("X: 1", BODY, True, id="no-type-of-a-stream"),
    row("X: 1", json.dumps(text_event("ab")).encode(), False, id="no-type-of-a-whole-reply"),
    row("Content-Type: application/json", EVENT_A[6:], True, id="gateway-that-does-not-stream"),
    row("Content-Type: text/event-stream", BODY, False, id="gateway-that-always-streams"),
)
def test_how_a_reply_is_read(server, connect, content_type, body, is_stream):
    head = f"HTTP/1.1 200 OK\r\n{content_type}\r\nConnection: close\r\n\r\n"
    server.script(send_and_close(head.encode() + body))
    parts = generate(connect(server), is_stream)
    assert "".join(texts_of(parts)) == ("a" if b"DONE" not in body and is_stream else "ab")


TWO_LENGTHS: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"


@table(
    "raw kind message",
    row(b"H", NetworkError, "closed in the first line of a reply: {} ('H", id="one-byte"),
    row(b"HTTP/1.1 2", NetworkError, "closed in the first line of a reply: {} (", id="status"),
    row(b"SSH-2.0-OpenSSH\r\n", ProtocolError, "not an HTTP reply: {}: 'SSH-2.0-Op", id="ssh"),
    row(b"HTTP/1.1 abc OK\r\n\r\n", ProtocolError, "not an HTTP reply: {}", id="no-number"),
    row(TWO_LENGTHS, ProtocolError, "", id="two-lengths"),
    row(b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 200, ProtocolError, "", id="too-many-headers"),
)
def test_what_is_not_http(server, connect, raw, kind, message):
    server.script(send_and_close(raw))
    error = caught(connect(server).complete, "x")
    assert (type(error), error.retryable) == (kind, kind is NetworkError)
    assert str(error).startswith(message.format(f"POST {server.url}/v1/completions"))
    assert len(server.requests) == 1


@table(
    "raw",
    row(reply(200, text_event("a" * 100_000)), id="length"),
    row(JSON_HEAD + chunk(b" " * 100_001) + LAST_CHUNK, id="chunked"),
    row(reply(200, b"{", {"Content-Length": "100001"}), id="refused-before-it-has-come"),
)
@whole_and_stream
def test_a_reply_may_be_no_larger_than_its_limit(server, connect, monkeypatch, is_stream, raw):
    assert vllm_provider.MAX_REPLY_BYTES == 256 * 1024 * 1024
    monkeypatch.setattr(vllm_provider, "MAX_REPLY_BYTES", 100_000)
    client = connect(server)
    server.script(reply(200, text_event("a" * 99_900)), stall(raw))
    assert len(client.complete("x").text) == 99_900
    with at_once(IN_TIME):
        error = caught(generate, client, is_stream)
    message = f"the reply is larger than 100000 bytes: POST {server.url}/v1/completions"
    assert (type(error), str(error)) == (ProtocolError, message)
    server.aborted.get(timeout=1)


def test_a_stream_has_no_limit_in_total_but_each_event_has(server, connect, monkeypatch):
    monkeypatch.setattr(vllm_provider, "MAX_REPLY_BYTES", 1000)
    monkeypatch.setattr(vllm_provider, "MAX_EVENT_BYTES", 1000)
    client = connect(server)
    events = [text_event("a" * 500)] * 9
    server.script(sse(*events))
    assert len("".join(texts_of(client.stream_complete("x")))) == 4500

    raw = SSE_HEAD + b"".join(map(chunk, events)) + chunk(b"data: " + b"b" * 1000)
    server.script(stall(raw))
    error = caught(list, client.stream_complete("x"))
    assert (type(error), len(error.partial.text)) == (ProtocolError, 4500)
    server.aborted.get(timeout=1)


# ---- Replies: what does not fit ---------------------------------------------

M_2048: Final = "This model's maximum context length is 2048 tokens. However, "
ONLY_2048: Final = "However, the model's context length is only 2048 tokens, resulting in a maximum"
ASKED_10: Final = f"{M_2048}you requested 10 output tokens and your prompt contains"
DECODER: Final = "is longer than the maximum model length of 2048. Make sure that"
# version, the text about a prompt, the prompt's length in it; the context is 2048
TOO_LONG: Final = [
    ("0.10.0", f"{M_2048}you requested 2520 tokens (2510 in the messages, 10 in the compl", 2510),
    ("0.10.0", f"{M_2048}you requested 2510 tokens in the messages, Please reduce", 2510),
    ("0.11", f"{M_2048}your request has 2510 input tokens. Please reduce the length", 2510),
    ("0.16", f"You passed 2510 input tokens and requested 10 output tokens. {ONLY_2048}", 2510),
    ("0.16", f"You passed 99999 input characters and requested 10 output. {ONLY_2048}", None),
    ("0.18", f"{ASKED_10} 2510 input tokens, for a total of 2520 tokens. Please", 2510),
    ("0.18", f"{ASKED_10} at least 2049 input tokens, for a total of at least 2059", 2049),
    ("0.18", f"{ASKED_10} 99999 characters (the upper bound for 2038 input tokens).", None),
    ("0.32", OVERFLOW_032, 2049),
    ("0.32", f"{M_2048}your prompt contains 99999 characters (more than 20000", None),
    ("gpt-oss", "Input length (2510) exceeds model's maximum context length (2048).", 2510),
    ("gpt-oss", "max_tokens must be at least 1, got -462.", 2510),
    ("full", "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", 2048),
    ("engine", f"The decoder prompt (length 2510) {DECODER}", 2510),
    ("engine", f"The decoder prompt (length 2048) plus output (at least 1) {DECODER}", 2048),
]
MAXIMUM_2048: Final = "maximum context length (2048)."
TOO_LARGE_011: Final = (
    "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context"
    " length is 2048 tokens and your request has 9 input tokens (5000 > 2048 - 9). None"
)
# version, the text about max_tokens = 5000, what fits
TOO_MANY: Final = [
    ("0.10.0", f"{M_2048}you requested 5009 tokens (9 in the messages, 5000 in the c", 2039),
    ("0.16", f"You passed 9 input tokens and requested 5000 output tokens. {ONLY_2048}", 2039),
    ("0.16", "max_tokens=5000cannot be greater than max_model_len=max_total_tokens=2048.", 2048),
    ("0.18", f"{ASKED_10.replace('10', '5000')} 9 input tokens, for a total of 5009 tokens.", 2039),
    ("0.32", "max_completion_tokens=5000 cannot be greater than max_model_len=2048. Please", 2048),
    ("0.11", "'max_tokens' (5000) cannot be greater than the model's " + MAXIMUM_2048, 2048),
    ("0.11", TOO_LARGE_011, 2039),
]
OTHER_ERRORS: Final = [
    row("temperature must be non-negative, got -1.0. (parameter=temperature)", id="temperature"),
    row("max_tokens must be at most 5 for this user", id="quota-of-a-gateway"),
    row("'n' is too large: it must be at most 16384", id="too-large-without-a-number"),
    row("prompt_logprobs must be at least 0, got -3", id="other-number"),
    row("1 validation error: max_tokens Input should be a valid integer", id="validation"),
    row("The number of prompts (1025) exceeds the maximum of 1024", id="prompts"),
]


@table("version message input_tokens", *TOO_LONG)
def test_a_text_about_a_prompt_that_is_too_long(version, message, input_tokens):
    facts = _RequestFacts("POST /v1/chat/completions", max_tokens=10)
    overflow = _read_overflow(message, facts, 2048)
    assert (overflow.context_length, overflow.input_tokens) == (2048, input_tokens)
    assert overflow.is_prompt_too_long()
    assert overflow.is_lower_bound is ("at least 2049" in message)


@table("version message fitting", *TOO_MANY)
def test_a_text_about_max_tokens_that_are_too_many(version, message, fitting):
    facts = _RequestFacts("POST /v1/chat/completions", max_tokens=5000)
    overflow = _read_overflow(message, facts)
    assert not overflow.is_prompt_too_long()
    assert overflow.available_tokens() == fitting


@table("message", *OTHER_ERRORS)
def test_a_text_about_something_else(message):
    assert _read_overflow(message, _RequestFacts("POST /v1/completions"), 2048) is None


@table(
    "is_completion max_tokens limit",
    row(True, 5, 2048, id="completions-print-m-less-max-tokens"),
    row(True, None, 2059, id="the-servers-default-is-16"),
    row(False, 5, 2043, id="chat-prints-m"),
)
def test_the_limit_that_completions_of_0_11_print(is_completion, max_tokens, limit):
    message = "maximum context length is 2043 tokens. However, your request has 2502 input tokens."
    facts = _RequestFacts("POST /", is_completion=is_completion, max_tokens=max_tokens)
    overflow = _read_overflow(message, facts)
    assert (overflow.context_length, overflow.input_tokens) == (limit, 2502)


@table("max_tokens", 0, -1)
def test_max_tokens_below_1_are_the_callers_mistake(max_tokens):
    message = f"max_tokens must be at least 1, got {max_tokens}."
    facts = _RequestFacts("POST /v1/chat/completions", max_tokens=max_tokens)
    assert _read_overflow(message, facts, 2048) is None


@table(
    "server_message input_tokens shown_count",
    (OVERFLOW_032, 2049, "at least 2049 tokens"),
    ("max_tokens must be at least 1, got -462.", 2510, "2510 tokens"),
    (f"You passed 99999 input characters. {ONLY_2048}", None, "it has too many tokens"),
)
@table("is_flat", False, True)
def test_a_prompt_that_does_not_fit(web, server_message, input_tokens, shown_count, is_flat):
    web.get(MODELS_URL, json=model_list("parrot", max_model_len=2048))
    payload = error_payload(server_message)
    web.post(CHAT_URL, status=400, json=payload["error"] if is_flat else payload)
    error = caught(list, web_client().stream_chat("hello " * 2500))
    where = f"POST {CHAT_URL}; shorten it"
    message = f"the prompt does not fit: {shown_count} for a context of 2048: {where}"
    assert (type(error), str(error)) == (ContextLengthError, message)
    assert (error.limit, error.input_tokens) == (2048, input_tokens)
    assert (error.status_code, error.retryable) == (400, False)
    assert error.server_message == server_message
    assert len(sent_bodies(web, CHAT_URL)) == 1


TWO_MODELS: Final = {"data": [{"id": "a", "max_model_len": 7}, {"id": "parrot"}]}
TWO_OTHERS: Final = {"data": [{"id": "a"}, {"id": "parrot", "max_model_len": 8}]}


@table(
    "models limit",
    row({"status": 404, "json": {"detail": "Not Found"}}, None, id="models-hidden"),
    row({"json": model_list("macaw", max_model_len=9)}, 9, id="model-not-listed"),
    row({"json": model_list("macaw")}, None, id="no-limit-listed"),
    row({"json": TWO_MODELS}, None, id="limit-of-another-model"),
    row({"json": TWO_OTHERS}, 8, id="second-of-two-models"),
)
def test_the_limit_of_a_text_that_leaves_it_out(web, models, limit):
    web.get(MODELS_URL, **models)
    message = "max_tokens must be at least 1, got -462."
    web.post(CHAT_URL, status=400, json=error_payload(message))
    error = caught(web_client().chat, "hello")
    assert (type(error), error.limit) == (ContextLengthError, limit)
    assert error.input_tokens == (None if limit is None else limit + 462)


@table("name", "max_tokens", "max_completion_tokens")
@table("value", 5000, "5000")
def test_max_tokens_that_do_not_fit_are_lowered(web, caplog, name, value):
    message = "max_tokens=5000 cannot be greater than max_model_len=2048."
    web.post(CHAT_URL, status=400, json=error_payload(message))
    web.post(CHAT_URL, json={"choices": [{"message": {"content": "Hi"}}]})
    params = {name: value, "temperature": 0}
    assert web_client().chat("Once", **params).text == "Hi"
    first, second = sent_bodies(web)
    assert (first[name], second) == (value, first | {name: 2048})
    assert params == {name: value, "temperature": 0}
    warning = f"max_tokens is lowered to 2048: 400 {message!r}: POST {CHAT_URL}"
    assert caplog.record_tuples == [("vllm_provider", logging.WARNING, warning)]


TOO_LARGE: Final = "max_tokens=9 cannot be greater than max_model_len={}."
NINE_MORE: Final = "you requested {} output tokens and your prompt contains {} input tokens"


LIMIT_THEN_PROMPT: Final = [
    TOO_LARGE.format(2048),
    f"{M_2048}{NINE_MORE.format(2048, 410)}, for a total of x.",
]
REDUCED: Final = "maximum context length is -1952 tokens. However, your request has 5 input tokens."
FOUR_LIMITS: Final = [TOO_LARGE.format(limit) for limit in (2048, 1024, 512, 256)]


@table(
    "max_tokens messages sent",
    row(5000, LIMIT_THEN_PROMPT, [5000, 2048, 1638], id="limit-first-and-the-prompt-then"),
    row(4000, [REDUCED], [4000, 2043], id="completions-of-0.11-print-m-less-max-tokens"),
    row(5000, FOUR_LIMITS, [5000, 2048, 1024], id="at-most-twice"),
    row(9, [TOO_LARGE.format(2048)], [9], id="never-raised"),
    row(10, [f"{M_2048}{NINE_MORE.format(10, 2048)}."], [10], id="the-prompt-fills-it"),
)
def test_what_is_sent_when_max_tokens_do_not_fit(web, caplog, max_tokens, messages, sent):
    for message in messages:
        web.post(COMPLETIONS_URL, status=400, json=error_payload(message))
    if len(sent) == len(messages) + 1:
        web.post(COMPLETIONS_URL, json=text_event("Hi"))
        assert web_client().complete("Once", max_tokens=max_tokens).text == "Hi"
    else:
        error = caught(web_client().complete, "Once", max_tokens=max_tokens)
        assert isinstance(error, InvalidRequestError | ContextLengthError)
    assert [body["max_tokens"] for body in sent_bodies(web)] == sent
    assert len(caplog.records) == (len(sent) > 1)


AT_LEAST_49: Final = (
    f"{M_2048}you requested 2000 output tokens and your prompt contains at least 49 input tokens,"
    " for a total of at least 2049 tokens."
)


@table(
    "tokenizer sent",
    row({"json": {"count": 120, "tokens": list(range(120))}}, [2000, 1928], id="counted"),
    row({"json": {"count": 3000, "tokens": list(range(3000))}}, [2000], id="too-many"),
    row({"status": 404, "json": {"detail": "Not Found"}}, [2000], id="nobody-can-count"),
)
def test_at_least_so_many_tokens_are_counted(web, tokenizer, sent):
    web.post(CHAT_URL, status=400, json=error_payload(AT_LEAST_49))
    web.post(TOKENIZE_URL, **tokenizer)
    web.post(CHAT_URL, json={"choices": [{"message": {"content": "Hi"}}]})
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = functools.partial(web_client().chat, "Once", max_tokens=2000, tools=tools)
    if len(sent) == 2:
        assert call().text == "Hi"
    else:
        error = caught(call)
        assert type(error) is (ContextLengthError if "json" in tokenizer else type(error))
    assert [body["max_tokens"] for body in sent_bodies(web, CHAT_URL)] == sent
    messages = [{"role": "user", "content": "Once"}]
    (counted,) = sent_bodies(web, TOKENIZE_URL)
    assert counted == {"model": "parrot", "messages": messages, "tools": tools}


def test_a_list_of_prompts_is_not_counted(web):
    web.post(COMPLETIONS_URL, status=400, json=error_payload(AT_LEAST_49))
    error = caught(web_client().complete, ["a", "b"], max_tokens=2000)
    assert (type(error), error.limit, error.input_tokens) == (ContextLengthError, 2048, None)
    assert len(web.calls) == 1


@table("status", 500, 503)
def test_a_fault_of_the_server_is_not_about_lengths(web, status):
    web.post(CHAT_URL, status=status, json=error_payload(OVERFLOW_032, status))
    assert type(caught(web_client().chat, "Once")) is ProviderUnavailableError


# ---- Replies: recorded ------------------------------------------------------
#
# Bodies that vLLM 0.11.0 and 0.32.0 sent, byte for byte: the model is the parrot, or a tiny
# gpt-oss under 0.32.0. They are the values of a JSON object, compressed; look at one with
# python -c 'import test_vllm_provider as t; print(t.RECORDED["0.32/chat_tools"])'

_RECORDED: Final = """
c-rk<OOxcrasDgNTt>2bn)QB6kW@%E8QKf2kY!&u6U_opn1Qzk7&g!|yIO68=(BDL`{0YhXCHjk|Dhv%)lYC%q2G<3eoQ~NA#urV
piou$WmaZZ)+0Y$pf<*zMfaw>xW4#sbCJe37uPoz?m_hM*uBD`kqM7fLKR_##Ri9=rIBG;hOv<9=Aw0Tk%#|kqjL0NJIdixTc&yD
Uq?M_O6w}dQgccX7XltX<gxAgj~-30mzP!9`#g<o0gu0Ry~$$x4*rf@aa$DT&cZKv(aXEme`<;%ElQIOzRt7KW>rsaZZi0X1V0Z*
@I}D<`<_kug>j8${caZ?m@Lan<9b?5JnYA5KK_~Xv&fa`M5a6OX_@C;|Hyat*4J)|JWI2?&P+dk_nZfh-F^|2@E7}i-*k&0$@{&w
>*K{o__UkfJ@)c&q7zA)rNw=xs?%3gl=-8l!u@6ZV$_|tHtVGEu!@haM}_S@0i2yOwY_oC;(bxthYqxGXM2ym)OU37u0O^YI`r^Z
c6`OIR?K`erRk2JQQ}b_vU{SiYR%NpiEU}p?x=s`_w&S0emFrBym|Z7DSIX>65H#5*qDb=eHX2<EO&|$@Oc1{j!kK<gBrn>A=V-c
4Ppsl5v4|i+^|S!r3o?#St8i&=)Rx5-J*Cy;nJ)w+$&1WND>wx`Vj;$J4uWdjkR@<sU0?-7$l&38c3!g@w&JHWd@Y85tKPhDqG#a
G6ReAT^dlPL1{ODG`4sINdrU!#9|;w1B16CKW}jGI5hH5;qXO+gU5k2III)oSU)s&<nY{XH4yi4g4%EY;UB;G>el_93YWQ9X0adu
Oe0}LM0BWQz#ud+;g%#O)HJq?+G7s@?>O#TgP1FDC0Wd4X2TeVj71VFq_pG_)!3@o3hKL6zJIKU7&hgfj(<2pGxJcDxwB>G8F0LJ
p<LJ7-d+CzXf6EP4>vc^g|vL{{(Bv`fB(kx(!%}aBmDERwWy~`GtR?E65uhz6sg2$jJQdJOf;5!4?X>D4qpyCx-^pRv0pEAKFPDg
1<)y)AGeAw7`L1rG=T0k!U|z@OtDtPL>w{1Y@&3`iHJFkw7@z+uhW(C(+Hy<Ge!rRx}O{*yAPwE93;U&p*E=OGY;4&lT(7E0ipq7
8i>`V4?=O4=s1e3(JV;_Oh&nmEl(26Lu8^Cobt(bS8>q6<8F9SQ*Ii&rE{1D$W4H(=BN#H8$dUnFgG@(u_-Iq6igyZxKYAl#25{g
5;`J=lTbwpM`{I|f*YH%@p#7T+Y}!cYrxz9%tkrB0=lfRDr>JmZ5ClZa*%Gf8qZ#J9jX)c7aT_5I*Dn7RA>}qCW>_usR(Ns8Z0Bu
!wuJ><i6ITJ|9WRm+;Fgd~ZKT3V+gw!q3)VW^uTa3vYtV+Bkp?1@5c$R$aO_yDRSxx#B|9yo7SJKtc&Qf)y8#{S{VS2;zn%f?*sh
79pXM*fP)zF&08tlr*a@$Bj|#aQnQxPqVj9GrZaHROaNM@mi<>Wp>B@y=^d=#RRly1Im7vq)rZy-3N<~7?K8v28d0<hf-23qJ#?~
Ig3f6VrCGxN^z_$#o-ApNgXXO4jFAYI4HMUoy#qWHjKWRjx;zRSZHw^i&!cVF@jXck(N;?l2C|9%DJ#hY2THdrBMd1)|U%cbLH0f
b+WcEzWx2s8%%4rKUL>7v7`meU1ewF3X|?}%~hb{g?YCZ3&uehFhVdMm<gFip-luuQdo<L#G8r5CL5v0V&T-KT~R8A?5UH88ZLj!
scLaeS`?F(p!{}Gz-GwP#WV6_Meo@ZyTR_I_}1ydWg4(n2djASA=d`5RRJ4(*Z{V=?l)zF*XnphdA}PsfUN~sR<7)FE?eyR)L>gO
Td6sshZh~uQ>)HZI^DD=J2g`l5)&42OhZOEGunpC3WJ0MA1<*W<%bZTqnom{W;Q{bNLR^JSJ{#Fk{)d@w|@^Fo*&x;FFJmUwmn&O
K+S6ai!|aS#D;Usl$F|0E*KNkVvenh4>mh>v#h{W{&3~wdC#RX$CZt_4sbvM8nA!|;<b_k?aC??d5p4CV;0Dw7#0@W7oC>^972Hw
u^bC5LWbj5GeQ|f7_%gCvA}~Fky(-WFlakZlES)z-=cAJVxru)SE!8;qF8hA47kKXA|Pp0)|VMKQayj1s^P=<^>ux1RjB&4!4?WI
2}WC7qn4nuMYMWlz~u<J*<Q{_@e(7k5?Dztm1dGCO6e>o+Y6c49`SFklC3cC^{(s@@@qM}<csXm5_2L6<y;Xa@hrDK|3muFv040w
FBh_HvdDFPt@Z3%=2(1cEWF)baQ)@Uh=taBz>>Q(vtW))T)86tan<&CYvj$vSH9fe=imm|%-eeK2;#tGL0S}j+YbK8+Mp;+^fmx1
7TMsZCd{Ag&w?cH`AvttJO@|7^b6abUSE9Us>)0kYUn-LUhq}bftClzJdF7n0djt&2z~rGO~g>vUZmi+_WQmCQy&L~abN|*uYx=Y
pwd?Ge4j@5Ku>VzS?Br<^gWn&0eC$5vyHC<f~GtFD-#duUDj>3xZ5?>d`LquMMSVoDuNLiK^+~zn2^9z5{yU*JT1#*%ZvJpJoz06
M&(I<m*tQ4yCBYO5o91K_8m-+XC&pDy!;v@FJ2Bcn}r%gv6le#o$>wX3%dl+`95714z={5{}A{M2JgzC3XM2$31TX!hFUxLHNXlD
w1W3}zZdi>AcK2wmkGxxNVCU&IV${{E@&_q4>s<@FmXd;P%ALd{i;e2x&-CF$uqk}p?fsteFZ?}f)0@lJhV3#GsVF*ezZMP_Ivh4
*e1#a4}G9Mw7|#gDzkT{OrLBkxPvyXa2vI^NX(Pzrm-0>{x0a;w;wKDdzaV2<pZcI@boWR!DTm(;K@%f!#sZPeh(qP{F(bv+_~ak
rxxZmj-x3s%$4%&fma_cD<OeGl_J0V`0;j*v|vEns$}^(2YPJ6zPM<Sufh$u>8%|TR%GIXaSVRJ`gQ)C*|-zF_obh@-G^##dY%sq
TAIE8tg0GeH0-^doEyQ|s7AP3boH|z=5LC(J&&=s(G&gjMcvCQB$1X>=)`EjP!yUF(S*@3w6V5Wp;}rxll3kp%d5Cf^>Sd_ph#l6
g&n>1iW6i2UX;E5`1yp#GWEQ$rWf6Jz_A+G=;`X7Qu{pnN#bm3+0Uw0hUN3#oypSQo57};n~T5mq}=uL{^J<ewCIE&nr|n*1<&ZV
5)n#X$nc=7Rg4mZ;>2QuqRkFbaCZ6`9Y&i451F^YkEcF>+p+IJddp2?5!Lv-a?Ed|E6Q~ovanjh-Aj%Kx53Ut_dv&}JQ_<*$G@9?
_0aE@DTvTy+ru!&T=UZ{jkkGD2Gut^t}%R5&4QMl;edBGTKw+8mc2BZj>!y0;|j+-l){v{9Y_Xz<3!5WY{A-OfF9;pM=cLt-n({8
K+P(V9q%hWTGDraW7g4<zK;YG$4h*9#*E)f!ieJ~e-DWvj+XfLxe|U>Hg3O%MjFD8i*RzDWbZst!?DtRuKfPuOzCFlLib@3E9{;8
+ary3y(Xl!R<v*NdfPAx^+M_g9Z}Ah;xSj2Ng<ClGCT_3?mNkYibTwjvXT(aL>wPaQU`ZmETXXvV;pg#51Yi{0LdE;8%5t<qK89A
(fQFw(N|4Wp|Md>OqF3u5Kc)GOFsdi_8ez8TGDqPOFvrD_mXAeXsK_XE8%A~*!LS-YY0Ck!q=K`gb5WP(-vHMWvM!)J9kbC{B`m`
G}vu~ou556&~2Lf;kv<YBkY1^$R2yPmQQxfer&K?A*dQBmJ&scHZs(To={qnlN4Os_&7VmuJLhRmBFR)aW=!Q@o_fCZa+DfKG`9A
PA<+NZ|mJV2)9SN<oTL)&0TDzSe(5`NlTbvAyqsHBZ7|opxu#VE1Fvu*lSLr!)_$lUjCv(ZzPZ>vXNl5{7a$blDbK%z=~tuY$iAb
p!U4Jc(kOyIak8>kwxlwiQj#;s3WF*_gSHimiYF$5`I=He!n{@8p4l>@b$KkggOkB)PgV`>L@v(EhI++{_Yas9vJ|)M>;)y%^Y;g
L7#q>x+}R>m^2z2Dx;WW8YkLX)Jz&r0H{5C6h}+?KNt2~Ne}MRp1CubIadJM=SuiljraXJ(hcFqMfi_D{Q1X!`}2=K{P&MP{MU~^
{Lh(!@W&s{lkorj>wo;;zyIkxX%GJPmp}dWZ-4pEKb{Nuhq?P<@8mDL`+?S^Vv&pPeqf*EhK1=H@aLip31>D8Db*MwE0bg2ukdTz
?dCsm*Qy7R$$~e*z3o1_%hiK2kInmE?0#p$FWv3=07iCKyD4Ex@qGJXFoyicpO^P(_V&xkj2jafFO<7q0#QaK)kwQIO8CC4kQ1nd
v1nn$;17qt!*3*8f-K0WvC}5~eH4=|j5m<Xw1UZ?87dgzQsLSbFs}X})zZABbxTYC!~Jp1%{J&kuOo+3ED1qCltxl3HrW_POQG7d
-kI*T>rl{uFXaq#!8F5@6)-VR;V*0ZL8&5KNyY_cjB3KCz~oEm+pN}^uK6?SGxXs$6B;Q6S^z4eWC|dF3uEm#JWuCnAl3H_YxqCM
LLjYNAbYY}N<cm+RO`eOSAV>?4n>tN#bdXvFO>@1RuUvjGli7qT8m{;(XN+HAzhLjM!6DTcme9^YL=m}S*^1=U?PLhJefohjg_Vd
aVqhw3LpaogR~p|6_gIb>eZSGKnmr$E;wa`s_iL&7wcU?0T4uqR4Xfh&p&%fZ39ENq(n0$F-VV?L6pgjjm2)7UCus`5{(2%8^T0k
N&TMEDTvpQ0gy6;DR`g^6x#Mg;H7F;l>iBvRsp5cTDDFC7I%bUFr`!?A}HOWh`(6vDke@4!5Pz>I3uE#(dXT`+O7z$G0~tgD9D+@
Q)5MvfxfN017}p0QM|Q=W(Xj27$B$Vq@r4ZJ|`}}-$aGHMuvY<+bsf&ATD*C&|rHMpR%TOxmnw+*3}g{8B`~Prjl^3U$4-eH(%dt
PL-luD20e(iisH`?AYYpN4?zIZ=sFZZo>qmMw7wlhB}1=a{)$!%~Ut=Z|ihgU44}=B4J1o1a3O`SOhHd!aA3t@cJfZJN>3^Ab@8B
GebeBl$y>0N^3}eQ_mX-vl0Q?iC_gzh+^|qEv0zlnpfjC0(%H^182LyS6YMFZr-|}Yl46ZVW34QIG}RQ@nmD&gqIujtu-`D0L-~-
@Bll<09L^{)HrPiT%BYv*~791lA0Q;jtZ{8_PS{#_#INdQ0Y=Mw$R3Gw|(HDW)y%_2?jn82e*OD*EpQ}f?{++Lh2?+wN+RB1)-CO
!NdgED4AYf`%-AO+1P5r0#1YUmWeUUkXT1pez9QI2D(=%0pbi(ZZV~L#Byb^QKhSi18#HB6oLyOK;1~Xfix^O%0ma8D8!xK1wB5~
%~kC3(&@pD+h1YIEZsbkA@JN7MWSZPyiuOm<2nwcYeLqG^0@kmd2_AkCZ~Z$<V?rKeM}tWD+v>K@{&s_=w>N>{rSh&<wT#$rM<oM
a~rVbfMa5v)W%yI5kmpma8L}(>`ZVw76fU*@{V7OO9*iZ?7?zJG)8DcF=nq2W0%A?GLI>6&gHQE8fcBI%aL0z-t)P~QOku{TbQ-L
82~du;Q_ACNA6*}QZWAlpB8fvEv6-stt-shU@-)xFk3~4!ECQJocal^2-chts=)vco-$22lN_9S?TyU93xIzFA<lLq2~+6SFjDG+
9!kI)jk#pQ=Mr2R4dpb2i6v!xHZl6|?yJ<jLwu?qd9?sHK&twCTAe5l1{X86hNf{@YIP6DhshSMYv36);EXt<Kq1fvb3yQe!R_%D
+4t$X4#kOnRz3hm)LDN{nbw#RR((HRW)}6T%&-eJ_*Vr6#9!Al!<T7Kgs*3q;@{WhnV;p-)*Og={W{`@V6>9;3E!rUF96$HZ{wL?
*moO{2a0PrAsw*Qbr~p~tF(rr6V=vNT3!9+y2&+~tFcxH1{E@&RH3FyCqJ%>g36jM&P&bGJ`M${>gS?r=Z5!s)z$-Aryo{>^tQ3B
r(|2JQynjC`1hARpoA%`lgLmK$4VT)!nzZmJ-ecxI24{b9ky6DSKS13EQmatqQPSV57VGAfkyG*xA!!Nj1U=o*dQ{YQ%%_bG66`G
_q%a}$TT8ZxpH`B*%{H3!)3|7+nSVXcu~r=bu+GQdynjd&zBZurzRe#h_OVIn20DrI8F{BZzmHEY|Y#yc;Y0GDH7O;^`4$w@Aoq0
^_zWW*I4kPH5PP6v)&hi$)P|Zq|9=}Fg>C*k-DI<Xvz8@@or+dYlmi+M>Jh<l@3=uwZxJ$BpK2|EDd(HW<#BW?Uk6hUCoLxLROB4
wgxS^eND=({c}R7)*6u=MoOENs8iD$OTuJPMB-3|G018p_~HDg6;#JMYGaWa*lfht52!uNrVh`Y6?D3Ii7|63aF#Reg-m&A(dc{`
vYa0;+SjE9a|QdjyVbgr<I?THOwyL;+7_tm%{ZC<S=IdbMCi@MZ|(Pe3+={1VH_R7@GG~EfFsljp6}D>-t8s0^QiV*)GiAi%)7vJ
yZN(?uLFXDpL%0v;r$oG8d|}V>GtgxP|MGzFGl;7i3ja|RrRXnSz;clAkIiYJ-V^`h9SVHp1c~PIHWb0A~x73wZVwoppM>POmHwo
aWEn|@H8)HvzO`@dF*zF_)@`lS^j9h3*y`sL6(<+eU}zxJNOsVO=BQ1HH9s%gKBiNr+M~GUVfeTv$&39<H+`iU2K+J`IGG>fMCa+
bY9Y3fZtbnSvcg=hyFw0&-%VAgDS%37(@_LK{bTh?$m*W23l?dY%i#Wp8v+ASrHiboheH9jSkZ6v0o0p95UR#i>!?c;5O9UO&?Og
=E-Kkb6Vbm6C9ZAeE|O*f7lLw<Epel&&K`8`U}(teFIT)zp7@cuCym5#=qzc+pna?b!@FcGFi!zf%0g|`wH+%2@Tm9cz%K^nJx}G
2;6;B_Ivh4HcgZZ9{K=oXhEj3tIXb+GJUeG;11fj!fiA~{lsTO;$4}wh@Yrq3GGi#vdwt=;R0H4FfJJQGS@dZSrB}<bUnJf4lW<k
q5#Ew*$OVZdE}midHlXTsHAYuABsEo{Oi<qV-Sn)`zgqVd*ONIUVR>?QR(CZ2Px1{e0lkCj_hDS_YBEXtt}+lkD7tPpRkcG;Of6|
nq>Mu%Lz+3@xjD^u8%F`&lwo7@cqa_Rrdkp`M@Zr+568Xs)oN#-L46vy3$*2{oe(JU@W_0w&!v7Uc^KveNp%FDhwq-aUz*8gb2-R
JKmYBXE6<4p?9j6-~rvGnZq+N-NKIEdNWa7N>KLt<L47j)YS9BnqG9@0cUUER7_X*l-lRnPr%;86tq9M`e0Z-@7<X!{k<7n6MA#;
cb=3xn36w^aZHO&2;%s5;#<EtyXG!_cgtv8e>a5|Qb{c%kyxp<jgR<lif!LIvD!7S1}6#8R7Zkh9Y_3yYhG8m+O<`i70#zO8>IuO
=CGq2KwD4UaY{S&Yi~x?i(GHqB<@%{&UE)!UgbqG&==2nhji|(iQ(Hc>$q{b!i}uTQc%tc#X_qvr1lke5+OMqzXqo@GwEl8US1It
ek!-K9xG^5y5<{qq<5#+d7T6d!62L6*#pr&PY_o06_S`B1WtmoLJ29hcqROt->~~z;!lPZD<+QKQ~upg4YvKH-u={2tFrDk0=EHl
`$-)8DGJ=jGlgv{`D2M&{UWCZ$+F8?Wz9A$>@UKrO)bJVn%b&W*RT?)6CAm-d5ab|re>pI&$Gg@Z9yhj7ADjhBrQze<4|rCy+V?`
P7c?LWR31T-FGBQS&kx?FBc^`qCDA8B&$Az^()WW_UbXK&4%u7Vpn4+UNZPd-QZ)3?nWl!h3M6wcb{t5$#ZvMzGp#E6boXg5F$?a
hNGOH#V9w1!dNgd5?1OEMLQYg^@DmYD1EWZ#O{Y4+jOn5&2}-i#VL*LRl>-ISQa82T9Dm{MX&Ot__>6Uj})}Mrb<2u5cZKa`80so
eG26h!D095lurVP_IZM^;=IjWv%&<YR$74!I`LJ7Q(?u9Ru#6N%=Vy&-frJb-qa7?YW(T3YtpQPmYljVC{aqrhEv6{h{#48)Um&n
^%Y{gwG%i15plN)D=FM1Oo&i>B{n{RQ(IeWoFmO&bwx4Z2x}xMgK0iJ)OnC2W8^Ci>&P~dSTaPEBpg%3YgoACs7_rK?yO{z_S|05
D%S!Bo=V|%#xYKD!?$gm>G2s%2*QFOE)WK2=MVMREY1^G>5J!jrb=Bes@*X)2!?kj`x1;WO@!oX&2v9kyZ@a!U$=M)Xg4b&gZ;dD
6;*jOy~6euB%K45Yf%LLfX0?2bfcgt=J>>errU~8E)e@YuRO#=lf-hoS#**wx*mq;T|_4_I?C|m$NvY-{3VJ
"""
RECORDED: Final[dict[str, str]] = json.loads(
    zlib.decompress(base64.b85decode("".join(_RECORDED.split())))
)
PARIS: Final = '{"city": "Paris"}'
ROME: Final = '{"city": "Rome"}'
CUT_CALL: Final = '\n\n<tool_call>\n{"name": "get_weather", "'
COUNTED: Final = " there was a small model that could count"


def weather(arguments: str, call_id: str = "call_1") -> ToolCall:
    return ToolCall(call_id, "get_weather", arguments)


def without_ids(choice: Choice) -> Choice:
    """Return the choice with the same id for each tool call, and without log probabilities."""
    calls = tuple(weather(call.arguments) for call in choice.tool_calls)
    return changed(choice, tool_calls=calls, logprobs=(), prompt_logprobs=())


def recorded(name: str) -> tuple[Completion, list[Delta]]:
    """Return what a recorded reply becomes, and the deltas of a stream."""
    raw = RECORDED[name]
    if not raw.startswith("data:"):
        is_chat = "chat.completion" in raw
        return (parse_chat_response if is_chat else parse_completion_response)(json.loads(raw)), []
    with responses.RequestsMock() as mock:
        mock.post(COMPLETIONS_URL, body=raw.encode(), content_type="text/event-stream")
        stream = web_client().stream_complete("Once")
        deltas = list(stream)
    return stream.completion, deltas


def expect(text: str = "", reasoning: str = "", *calls: str, **fields: Any) -> Choice:
    """Return a choice; `calls` are the arguments of its calls."""
    fields = {"finish_reason": "tool_calls" if calls else "stop", **fields}
    return Choice(0, text, reasoning, tuple(map(weather, calls)), **fields)


FOUR: Final = expect("\n\n2 + 2 = 4", "\nTwo plus two equals four.\n")
JAPANESE: Final = expect("\n\nこんにちは、世界 🌸🚀", "\nUse hiragana.\n")
TWO: Final = "\nTwo calls.\n"
NEED: Final = "\nI need the tool.\n"
CUT: Final = expect(CUT_CALL, NEED, finish_reason="length")
SHOW: Final = expect(" Paris.")
LENGTH: Final = expect(COUNTED, finish_reason="length")
OSS: Final = {"stop_reason": 200012}
CUT_STREAM: Final = expect("\n\n", NEED, "", finish_reason="length")
NAMED: Final = expect("", NEED, PARIS, finish_reason="stop")
SHOW_IDS: Final = expect(" Paris.", prompt_token_ids=(366, 643, 590, 637, 298))
LENGTH_IDS: Final = changed(LENGTH, prompt_token_ids=(538, 592, 312, 635))
OSS_TWO: Final = expect("", "Now Rome.", '{"city":"Rome"}', **OSS)
OSS_BROKEN: Final = expect("", "Broken.", '{"city": "Par', **OSS)
OSS_CUT_STREAM: Final = expect("", NEED.strip(), '{"', finish_reason="length")
OSS_CUT: Final = expect("", NEED.strip(), '{"')
# the name, what it becomes, its usage, the number of deltas
RECORDED_REPLIES: Final = [
    ("0.11/chat", FOUR, (14, 18), 0),
    ("0.32/chat", FOUR, (14, 18, 0, 8), 0),
    ("0.11/chat_stream", FOUR, (14, 18), 16),
    ("0.32/chat_stream", FOUR, (14, 18, 0, 8), 16),
    ("0.32/chat_unicode_stream", JAPANESE, (13, 14, 0, 5), 12),
    ("0.11/chat_tools", expect("\n\n", TWO, PARIS, ROME), (30, 53), 0),
    ("0.32/chat_tools", expect("", TWO, PARIS, ROME), (30, 53, 0, 5), 0),
    ("0.11/chat_tools_stream", expect("\n\n\n", TWO, PARIS, ROME + "\n"), (30, 53), 17),
    ("0.32/chat_tools_stream", expect("\n\n", TWO, PARIS, ROME), (30, 53, 0, 5), 22),
    ("0.11/chat_tools_cut", CUT, (28, 22), 0),  # such a call stays text
    ("0.32/chat_tools_cut", CUT, (28, 22, 0, 7), 0),
    ("0.11/chat_tools_cut_stream", expect("\n\n", f"<think>{NEED}", ""), (28, 22), 10),
    ("0.32/chat_tools_cut_stream", CUT_STREAM, (28, 22, 0, 7), 11),
    ("0.32/chat_tools_named", NAMED, (28, 31, 0, 7), 0),
    ("0.11/completion", SHOW, (5, 3), 0),
    ("0.32/completion", SHOW, (5, 3, 0, None), 0),
    ("0.11/completion_stream", SHOW_IDS, (5, 3), 3),
    ("0.32/completion_stream", SHOW, (5, 3, 0, None), 3),
    ("0.11/completion_length_stream", LENGTH_IDS, (4, 8), 8),
    ("0.32/completion_length_stream", LENGTH, (4, 8, 0, None), 8),
    ("0.11/completion_stop", expect(f"{COUNTED}: 1 2 3 4 5 6", stop_reason=" 7"), (4, 16), 0),
    ("gpt-oss/chat_two_2_header_in_role_stream", OSS_TWO, (171, 25, None, 8), 10),
    ("gpt-oss/chat_broken_tool", OSS_BROKEN, (121, 26, None, 7), 0),
    ("gpt-oss/chat_tool_cut", OSS_CUT, (123, 24, None, 6), 0),
    ("gpt-oss/chat_tool_cut_stream", OSS_CUT_STREAM, (123, 24, None, 6), 7),
    ("gpt-oss/chat_tools_no_tool_parser", expect("", NEED.strip(), **OSS), (123, 29, None, 10), 0),
    ("gpt-oss/plain_0_stream", expect(" Paris.", stop_reason=199999), (5, 3, None, None), 3),
]


@table("name expected tokens deltas", *[row(*one, id=one[0]) for one in RECORDED_REPLIES])
def test_recorded_reply(name, expected, tokens, deltas):
    completion, found_deltas = recorded(name)
    (choice,) = completion.choices
    assert without_ids(choice) == expected
    prompt, output, *details = tokens
    assert completion.usage == Usage(prompt, output, prompt + output, *details)
    assert completion.id.startswith(("cmpl-", "chatcmpl-"))
    assert completion.model == ("openai/gpt-oss-20b" if name.startswith("gpt") else MODEL)

    assert len(found_deltas) == deltas
    if deltas == 0:
        assert completion.payload == json.loads(RECORDED[name])
        return
    assert "choices" not in completion.payload
    assert "".join(texts_of(found_deltas)) == choice.text
    assert "".join(delta.reasoning for delta in found_deltas) == choice.reasoning
    assert sum((delta.logprobs for delta in found_deltas), ()) == choice.logprobs
    assert found_deltas[-1].finish_reason == choice.finish_reason
    arguments: dict[str, str] = {}
    for call in itertools.chain.from_iterable(delta.tool_calls for delta in found_deltas):
        assert call.name == "get_weather"
        arguments[call.id] = arguments.get(call.id, "") + call.arguments
    assert arguments == {call.id: call.arguments for call in choice.tool_calls}


@table("version", "0.11", "0.32")
def test_recorded_choices(version):
    completion, _deltas = recorded(f"{version}/completion_list_n")
    choices = [(one.index, one.text, one.finish_reason) for one in completion.choices]
    texts = [" Paris.", " Paris.", " 4", " 4"]
    assert choices == [(index, text, "stop") for index, text in enumerate(texts)]


def shown(tokens: Iterable[TokenLogprob | None]) -> list[Any]:
    """Return tokens with their log probabilities and alternatives, to two digits."""
    rows: list[Any] = []
    for token in tokens:
        if token is None:
            rows.append(None)
            continue
        top = [(other.token, round(other.logprob, 2)) for other in token.top]
        rows.append((token.token, token.logprob and round(token.logprob, 2), top))
    return rows


@table(
    "name expected",
    row(
        "0.32/completion_logprobs",
        [
            (" Paris", -0.0, [(" Paris", -0.0), (" 3", -11.8)]),
            (".", -0.0, [(".", -0.0), ("<|im_end|>", -11.91)]),
            ("<|im_end|>", -0.0, [("<|im_end|>", -0.0), (".", -11.69)]),
        ],
        id="completion-covers-the-end",
    ),
    row(
        "0.11/completion_stream",
        [(text, -0.0, [(text, -0.0)]) for text in (" Paris", ".", "<|im_end|>")],
        id="completion-stream",
    ),
    row(
        "0.32/completion_echo_logprobs",
        [
            ("The", None, []),
            (" capital", -8.63, [(" is", -0.43), (" capital", -8.63)]),
            (" of", -14.06, [(" France", -0.0), (" of", -14.06)]),
            *((text, -0.0, [(text, -0.0)]) for text in (" France", " is", " Paris", ".")),
            ("<|im_end|>", -0.0, [("<|im_end|>", -0.0)]),
        ],
        id="echo-likeliest-alternative-first",
    ),
)
def test_recorded_logprobs(name, expected):
    assert shown(recorded(name)[0].logprobs) == expected


def test_recorded_logprobs_of_chat_cover_the_markup_and_have_bytes():
    completion, _deltas = recorded("0.32/chat_logprobs")
    tokens = [token.token for token in completion.logprobs]
    assert (tokens[0], tokens[-1], len(tokens)) == ("<think>", "<|im_end|>", 19)
    for token in completion.logprobs:
        assert token.bytes == token.token.encode()
        assert token.top[0] == changed(token, top=())
        assert len(token.top) == 2


def test_recorded_logprobs_of_a_prompt():
    (choice,) = recorded("0.32/completion_echo_logprobs")[0].choices
    tokens = choice.prompt_logprobs
    assert shown(tokens) == [
        None,
        (" capital", -8.63, [(" is", -0.43), (" capital", -8.63)]),
        (" of", -14.06, [(" France", -0.0), (" of", -14.06)]),
        (" France", -0.0, [(" France", -0.0)]),
        (" is", -0.0, [(" is", -0.0)]),
    ]
    assert [(one.token_id, one.rank) for one in tokens[1:]] == [
        *[(643, 194), (590, 432), (637, 1), (298, 1)]
    ]


RECORDED_ERRORS: Final = {  # name: status, class, beginning of the message
    "error_engine_dead": (500, UNAVAILABLE, "500 'EngineCore"),
    "error_logprobs": (400, InvalidRequestError, "400 'Requested"),
    "error_logprobs_stream": (200, InvalidRequestError, "400 'Requested"),
    "error_model": (404, NotFoundError, "model not found: 'nope'; the server has parrot"),
    "error_path": (404, NotFoundError, "404 'Not Found': "),
    "error_temperature": (400, InvalidRequestError, "400 'temperature"),
    "error_validation": (400, InvalidRequestError, "400 "),
    "error_overflow_chat": (400, ContextLengthError, "the prompt does not fit: "),
}


@table("name", *[name for name in RECORDED if name.rpartition("/")[2] in RECORDED_ERRORS])
def test_recorded_error(web, name):
    version, _, key = name.partition("/")
    status, kind, message = RECORDED_ERRORS[key]
    web.get(MODELS_URL, json=json.loads(RECORDED[f"{version}/models"]))
    content_type = "text/event-stream" if status == 200 else "application/json"
    web.post(CHAT_URL, status=status, body=RECORDED[name], content_type=content_type)
    error = caught(list, web_client(default_model="nope").stream_chat("hello"))
    assert type(error) is kind
    assert str(error).startswith(message)
    if kind is ContextLengthError:
        assert (error.limit, error.input_tokens > 2048) == (2048, True)


# ---- Replies: whole ---------------------------------------------------------


def choice_from(**fields: Any) -> Choice:
    """Return what a choice with these fields becomes."""
    return parse_completion_response({"choices": [fields]}).choices[0]


def test_choices_are_put_in_order():
    payload = {"choices": [{"index": n, "text": str(n)} for n in (3, 1, 0, 2)]}
    assert texts_of(parse_completion_response(payload).choices) == ["0", "1", "2", "3"]


@table(
    "payload text",
    row({"choices": [{"text": "a"}]}, "a", id="a-gateway-drops-all-else"),
    row({"choices": [{"text": None, "index": None}]}, "", id="nulls"),
    row({"error": None, "choices": [{"text": "a"}]}, "a", id="error-null-is-no-error"),
    row({"choices": [{"text": "a"}], "usage": {}}, "a", id="empty-usage"),
    row({"choices": [{"text": "a", "new": {"x": 1}}], "other": 1}, "a", id="unknown-fields"),
    row({"id": None, "model": None, "choices": [{"text": "a"}]}, "a", id="no-name"),
)
def test_a_reply_with_little_in_it(payload, text):
    expected = Completion(choices=(Choice(text=text),), payload=payload)
    assert parse_completion_response(payload) == expected
    chat = payload | {"choices": [{"message": {"content": text or None}}]}
    assert parse_chat_response(chat) == changed(expected, payload=chat)


def test_reasoning_has_two_names_with_one_value():
    message = {"content": "4", "reasoning": "Sum.", "reasoning_content": "Sum."}  # 0.12 to 0.15
    reply = parse_chat_response({"choices": [{"message": message}]})
    assert (reply.text, reply.reasoning) == ("4", "Sum.")


FULL_USAGE: Final = {
    "prompt_tokens": 5,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


@table(
    "usage expected",
    row({"prompt_tokens": 5, "completion_tokens": 3}, Usage(5, 3, 8), id="no-total"),
    row({"prompt_tokens": 5, "total_tokens": 5}, Usage(5, 0, 5), id="no-output"),
    row(FULL_USAGE, Usage(5, 3, 8, 4, 2), id="details"),
    row({}, None, id="empty"),
    row(None, None, id="null"),
)
def test_usage(web, usage, expected):
    payload = text_event("a", finish_reason="stop") | {"usage": usage}
    assert parse_completion_response(payload).usage == expected
    body = f"data: {json.dumps(payload)}\n\n{DONE}"
    web.post(COMPLETIONS_URL, body=body, content_type="text/event-stream")
    stream = web_client().stream_complete("Once")  # with usage on every chunk
    assert list(stream) == [Delta(text="a", finish_reason="stop")]
    assert stream.completion.usage == expected


TWO_ENTRIES: Final = [None, {"1": {"logprob": -1}}]


@table("parse", parse_completion_response, parse_chat_response)
@table(
    "payload",
    row(None, id="null"),
    row([], id="list"),
    row("ok", id="string"),
    row({}, id="nothing"),
    row({"choices": []}, id="no-choices"),
    row({"choices": None}, id="choices-null"),
    row({"detail": "Not Found"}, id="only-a-detail"),
    row({"choices": 5}, id="choices-are-a-number"),
    row({"choices": ["a"]}, id="choice-is-text"),
    row({"choices": [None]}, id="choice-is-null"),
    row(text_event(5), id="text-is-a-number"),
    row({"choices": [{"message": {"content": [{"type": "text"}]}}]}, id="content-in-parts"),
    row({"choices": [{"text": "a", "index": [1]}]}, id="index-is-a-list"),
    row({"choices": [{"text": "a", "index": "x"}, {"text": "b"}]}, id="index-is-text"),
    row({"choices": [{"text": "a"}], "usage": [1]}, id="usage-is-a-list"),
    row(text_event("a", logprobs={"tokens": ["a"]}), id="lists-are-missing"),
    row(text_event("a", logprobs={"tokens": ["a"], "token_logprobs": []}), id="too-short"),
    row(text_event("a", logprobs={"content": [{"logprob": 1}]}), id="token-is-missing"),
    row({"choices": [{"message": {"tool_calls": ["f"]}}]}, id="call-is-text"),
    row({"choices": [{"message": {"tool_calls": [{"function": 1}]}}]}, id="function-is-1"),
    row(text_event("a", prompt_logprobs=[{"x": {"logprob": -1}}]), id="id-is-no-number"),
    row(text_event("a", prompt_logprobs=[{"1": {}}]), id="logprob-of-the-prompt-is-missing"),
    row(text_event("a", prompt_logprobs=TWO_ENTRIES, prompt_token_ids=[1]), id="too-few-ids"),
)
def test_not_what_vllm_sends(parse, payload):
    assert type(caught(parse, payload)) is ProtocolError


# ---- Replies: log probabilities ---------------------------------------------


@table(
    "sent logprob probability",
    row(-0.5, -0.5, math.exp(-0.5), id="number"),
    row(0, 0, 1.0, id="certain"),
    row(-9999.0, -math.inf, 0.0, id="minus-infinity-of-the-server"),
    row(-9998.0, -9998.0, 0.0, id="just-above-it"),
    row(-math.inf, -math.inf, 0.0, id="minus-infinity-itself"),
    row(None, None, None, id="null-for-the-first-of-an-echo"),
    row(math.nan, None, None, id="nan"),
)
def test_logprob(sent, logprob, probability):
    lists = {"tokens": ["a"], "token_logprobs": [sent], "top_logprobs": [{"a": sent}]}
    entry = {"token": "a", "logprob": sent, "bytes": None}
    content = [entry | {"top_logprobs": [entry]}]
    for logprobs in (lists, {"content": content}):
        (token,) = choice_from(text="a", logprobs=logprobs).logprobs
        assert token == TokenLogprob("a", logprob, top=(TokenLogprob("a", logprob),))
        assert (token.probability, token.top[0].probability) == (probability, probability)


@table(
    "logprobs expected",
    row(None, (), id="null"),
    row({"content": None}, (), id="content-null"),
    row({"content": []}, (), id="content-empty"),
    row({"tokens": [], "token_logprobs": [], "top_logprobs": []}, (), id="lists-empty"),
    *(
        row(
            {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": top},
            (TokenLogprob("a", -1.0),),
            id=f"alternatives-{top}",
        )
        for top in (None, [None], [{}])
    ),
    row(
        {"tokens": ["token_id:639"], "token_logprobs": [-1.0]},
        (TokenLogprob("token_id:639", -1.0, token_id=639),),
        id="a-token-that-is-spelled-as-its-id",
    ),
    row(
        {"content": [{"token": "token_id:x", "logprob": -1.0}]},
        (TokenLogprob("token_id:x", -1.0),),
        id="a-token-that-only-begins-like-an-id",
    ),
)
def test_shapes_of_logprobs(logprobs, expected):
    assert choice_from(text="a", logprobs=logprobs).logprobs == expected


@table(
    "ids prompt_ids expected",
    row([1, 2], None, [1, 2], id="of-the-answer"),
    row([2], [1], [1, 2], id="of-an-echo"),
    row(None, None, [None, None], id="not-requested"),
    row([1, 2, 3], None, [None, None], id="of-other-tokens"),
    row([], None, [None, None], id="empty"),
)
def test_ids_of_tokens(ids, prompt_ids, expected):
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0]}
    choice = choice_from(text="ab", logprobs=logprobs, token_ids=ids, prompt_token_ids=prompt_ids)
    assert [token.token_id for token in choice.logprobs] == expected
    assert choice.token_ids == tuple(ids or ())
    assert choice.prompt_token_ids == tuple(prompt_ids or ())


MANY: Final = {" b": -2.0, " a": -0.5, " d": -9999.0, " c": -3.0}
LIKELIEST: Final = [(" a", -0.5), (" b", -2.0), (" c", -3.0), (" d", -math.inf)]


@table(
    "params count",
    row({"logprobs": 3}, 3, id="at-most-n-where-the-server-adds-the-sampled-one"),
    row({"logprobs": 1}, 1, id="1"),
    row({"logprobs": 0}, 0, id="0-is-the-sampled-token-alone"),
    row({"logprobs": -1}, 4, id="all"),
    row({"logprobs": 20}, 4, id="no-more-than-there-are"),
    row({"logprobs": 0, "logprob_token_ids": [5, 6]}, 4, id="those-asked-for-by-id-on-top"),
)
@table("is_chat", row(False, id="completions"), row(True, id="chat"))
def test_alternatives_are_likeliest_first_and_at_most_n(web, is_chat, params, count):
    lists = {"tokens": [" d"], "token_logprobs": [-9999.0], "top_logprobs": [MANY]}
    top = [{"token": token, "logprob": value} for token, value in MANY.items()]
    content = [{"token": " d", "logprob": -9999.0, "top_logprobs": top}]
    choice = {"text": " d", "logprobs": lists}
    if is_chat:
        choice = {"message": {"content": " d"}, "logprobs": {"content": content}}
    web.post(re.compile(".*"), json={"choices": [choice]})
    client = web_client()
    (token,) = (client.chat if is_chat else client.complete)("Once", **params).logprobs
    assert [(other.token, other.logprob) for other in token.top] == LIKELIEST[:count]
    assert (token.token, token.logprob) == (" d", -math.inf)


def prompt_entry(*ids: int, logprob: float = -1.0, rank: int | None = 1) -> dict[str, Any]:
    return {str(one): {"logprob": logprob * one, "rank": rank} for one in ids}


@table(
    "entry ids own top",
    row(prompt_entry(3, 9), None, 3, [3, 9], id="the-first-is-the-prompts-own"),
    row(prompt_entry(3, 9), [9], 9, [3, 9], id="or-the-one-with-its-id"),
    row(prompt_entry(9, 3, 5, rank=None), None, 9, [3, 5, 9], id="likeliest-first"),
)
def test_logprobs_of_a_prompt(entry, ids, own, top):
    choice = choice_from(text="a", prompt_logprobs=[entry], prompt_token_ids=ids)
    (token,) = choice.prompt_logprobs
    assert (token.token_id, token.logprob, token.token) == (own, -own, "")
    assert [other.token_id for other in token.top] == top


def test_alternatives_in_a_prompt_are_at_most_n(web):
    entries = [None, prompt_entry(1, 2, 3), prompt_entry(9, 8)]
    web.post(COMPLETIONS_URL, json=text_event("a", prompt_logprobs=entries))
    choice = web_client().complete("Once", prompt_logprobs=1).choices[0]
    assert [one.token_id for one in choice.prompt_logprobs[1:]] == [1, 9]
    assert [[other.token_id for other in one.top] for one in choice.prompt_logprobs[1:]] == [
        *[[1], [8]]
    ]


def test_chat_has_the_prompt_at_the_top():
    prompt = {"prompt_logprobs": [None, prompt_entry(3)], "prompt_token_ids": [1, 3]}
    choices = [{"message": {"content": "a"}}, {"index": 1, "message": {}}]
    for choice in parse_chat_response({"choices": choices, **prompt}).choices:
        assert [one and one.token_id for one in choice.prompt_logprobs] == [None, 3]
        assert choice.prompt_token_ids == (1, 3)


# ---- Replies: streams -------------------------------------------------------


def stream_of(web: responses.RequestsMock, *choices: dict[str, Any], **fields: Any) -> Stream:
    """Return a stream whose events have these choices."""
    events = [{"choices": [{"index": 0, **choice}], **fields} for choice in choices]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    web.post(CHAT_URL, body=body + DONE, content_type="text/event-stream")
    return web_client().stream_chat("Once")


def test_deltas_of_two_choices_in_turn(web):
    stream = stream_of(
        web,
        {"delta": {"role": "assistant", "content": ""}},
        {"index": 1, "delta": {"content": "b"}},
        {"delta": {"content": "a", "reasoning": "r"}, "token_ids": [5]},
        {"index": 1, "delta": {}, "finish_reason": "length", "stop_reason": None},
        {"delta": {"content": "c"}, "finish_reason": "stop", "stop_reason": "x"},
    )
    assert list(stream) == [
        Delta(1, "b"),
        Delta(0, "a", "r", token_ids=(5,)),
        Delta(1, finish_reason="length"),
        Delta(0, "c", finish_reason="stop", stop_reason="x"),
    ]
    assert stream.completion.choices == (
        Choice(0, "ac", "r", token_ids=(5,), finish_reason="stop", stop_reason="x"),
        Choice(1, "b", finish_reason="length"),
    )


def piece(text: str) -> dict[str, Any]:
    """Return a piece of a tool call: index, id, name and arguments, "-" for what is not sent."""
    index, call_id, name, arguments = text.split(" ")
    function = {"name": name, "arguments": arguments}
    fields = {"index": index, "id": call_id, "function": function}
    for target in (function, fields):
        for key in [key for key, value in target.items() if value == "-"]:
            del target[key]
    if "index" in fields:
        fields["index"] = int(index)
    return fields


CALL_PIECES: Final = [
    ([["0 a f -", "1 b g -"]], ["a f ", "b g "]),
    ([["0 a f {"], ["0 b f ["], ["0 - - ]"]], ["a f {", "b f []"]),  # another id, another call
    ([["0 a f {"], ["0 - f }"], ["0 a - {"]], ["a f {}{"]),  # no id, a repeated name and id
    ([["- a f -"], ["- - - {}"], ["- b g []"]], ["a f {}", "b g []"]),  # no index
    ([["1 b g -"], ["0 a f -"], ["1 - - 1", "0 - - 0"]], ["b g 1", "a f 0"]),  # by turns
]


@table("pieces calls", *CALL_PIECES)
def test_calls_in_pieces(web, pieces, calls):
    deltas = [{"delta": {"tool_calls": list(map(piece, one))}} for one in pieces]
    stream = stream_of(web, *deltas, {"delta": {}, "finish_reason": "tool_calls"})
    joined: dict[str, str] = {}
    for call in itertools.chain.from_iterable(delta.tool_calls for delta in stream):
        joined[call.id] = joined.get(call.id, "") + call.arguments
    found = stream.completion.tool_calls
    assert [f"{call.id} {call.name} {call.arguments}" for call in found] == calls
    assert joined == {call.id: call.arguments for call in found}


@table(
    "function arguments",
    row({"name": "f", "arguments": {"a": 1}}, '{"a": 1}', id="object-in-place-of-text"),
    row({"name": "f", "arguments": {}}, "{}", id="empty-object"),
    row({"name": "f", "arguments": None}, "", id="null"),
    row({"name": "f"}, "", id="missing"),
)
def test_arguments_of_a_gateway(function, arguments):
    message = {"tool_calls": [{"function": function}] * 2}  # without id and index, by their places
    reply = parse_chat_response({"choices": [{"message": message}]})
    assert reply.tool_calls == (ToolCall("", "f", arguments),) * 2


NO_OUTPUT: Final = "the stream ended without any output: {}; look at the server's log"
NO_DONE: Final = "the stream ended without [DONE]: {}; was the server or a proxy stopped?"


@table(
    "events message",
    row(["[DONE]"], NO_OUTPUT, id="done-alone"),
    row([{"choices": [], "usage": {"prompt_tokens": 1}}, "[DONE]"], NO_OUTPUT, id="usage-alone"),
    row([text_event("a")], NO_DONE, id="output-without-done"),
    row([], NO_DONE, id="nothing"),
)
def test_a_stream_that_is_not_whole(server, connect, events, message):
    server.script(sse(*events, done=False))
    error = caught(list, connect(server).stream_complete("x"))
    where = f"POST {server.url}/v1/completions"
    assert (type(error), str(error)) == (StreamError, message.format(where))
    assert error.partial.text == ("a" if text_event("a") in events else "")


def test_a_stream_may_end_with_a_reason_and_no_text(server, connect):
    server.script(sse(text_event("", finish_reason="stop")))
    assert list(connect(server).stream_complete("x")) == [Delta(finish_reason="stop")]


def test_an_error_inside_a_stream_is_raised_with_what_came_before(server, connect):
    server.script(sse(text_event("a"), text_event("b"), error_payload("late", 500)))
    stream = connect(server).stream_complete("x")
    assert texts_of(next(stream) for _ in range(2)) == ["a", "b"]
    error = caught(next, stream)
    assert (type(error), error.status_code) == (ProviderUnavailableError, 500)
    assert error.partial.text == "ab"
    assert len(server.requests) == 1


def test_an_error_of_ours_inside_a_stream_is_never_its_end(server, connect, monkeypatch):
    def feed(_self: _SSEDecoder, _raw: bytes) -> list[str]:
        raise ValueError("broken")

    monkeypatch.setattr(_SSEDecoder, "feed", feed)
    server.script(sse(text_event("a")))
    with pytest.raises(ValueError, match="broken"):
        connect(server).complete("x")


# ---- Values: replies --------------------------------------------------------


@table(
    "arguments value",
    row(PARIS, {"city": "Paris"}, id="as-usual"),
    row("{}", {}, id="empty"),
    row(ROME + "\n", {"city": "Rome"}, id="0.11-streams-a-line-break-after-it"),
    row('{"a": {"b": [1, null]}}', {"a": {"b": [1, None]}}, id="nested"),
)
def test_good_arguments(arguments, value):
    assert weather(arguments).parsed() == value


@table(
    "arguments quoted",
    row("", "''", id="none"),
    row('{"city": "Par', '\'{"city": "Par\'', id="cut"),
    row("[1]", "'[1]'", id="list"),
    row("null", "'null'", id="null"),
    row('{"a": 1} {"b": 2}', '\'{"a": 1} {"b": 2}\'', id="two-objects"),
    row("city: Paris", "'city: Paris'", id="yaml"),
    row('{"a": NaN}', "'{\"a\": NaN}'", id="nan-is-not-json"),
    row("[" * 100_000, repr("[" * 200 + "…"), id="nested-beyond-reason"),
    row('{"a": "' + "x" * 500, repr('{"a": "' + "x" * 193 + "…"), id="long"),
)
def test_bad_arguments(arguments, quoted):
    error = caught(weather(arguments).parsed)
    assert type(error) is InvalidToolCallError
    assert str(error) == (
        "the model called 'get_weather' with arguments that are not a JSON object:"
        f" {quoted}; was it cut by max_tokens?"
    )
    attributes = (error.tool_name, error.raw_arguments, error.retryable)
    assert attributes == ("get_weather", arguments, False)


@table(
    "text model value",
    row(PARIS, None, {"city": "Paris"}, id="no-class"),
    row(" [1, null]\n", None, [1, None], id="any-json"),
    row(PARIS, dict, {"city": "Paris"}, id="keywords-of-a-class"),
)
def test_json_of_a_text(text, model, value):
    assert Completion(choices=(Choice(text=text),)).json(model) == value


def test_json_of_a_text_in_a_class_that_validates():
    assert Completion(choices=(Choice(text=PARIS),)).json(Town).city == "Paris"


@table(
    "text finish_reason model message",
    row("Paris", "stop", None, "JSON: 'Paris'; ask for it with response_format", id="text"),
    row("[1", "length", None, "JSON: '[1'; finish_reason is 'length': raise max_tokens", id="1"),
    row("[NaN]", "stop", None, "JSON: '[NaN]'; ask for it with response_format", id="nan"),
    row("[" * 9**5, "stop", None, f"JSON: '{'[' * 200}…'; ask for it with res", id="nested"),
    row("{}", "stop", Town, "a Town: '{}'; ask for it with response_format", id="other-class"),
    row("[1]", "stop", Town, "a Town: '[1]'; ask for it with response_format", id="no-object"),
)
def test_a_text_that_is_not_the_json_asked_for(text, finish_reason, model, message):
    reply = Completion(request_id="r", choices=(Choice(text=text, finish_reason=finish_reason),))
    error = caught(reply.json, model)
    assert type(error) is InvalidOutputError
    assert str(error).startswith(f"the text is not {message}")
    assert (error.partial, error.request_id, error.retryable) == (reply, "r", False)


def test_a_completion_as_a_dict_that_json_can_hold():
    top = (TokenLogprob("é", -math.inf, "é".encode(), 7, 1),)
    choice = Choice(
        text="a",
        tool_calls=(weather("{}"),),
        logprobs=(TokenLogprob("a", None, top=top),),
        prompt_logprobs=(None,),
    )
    reply = Completion("c", "r", "m", (choice,), Usage(1, 2, 3), payload={"x": [-math.inf]})
    found = reply.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == {spec.name for spec in dataclasses.fields(Completion)}
    (shown_choice,) = found["choices"]
    assert shown_choice["tool_calls"][0]["name"] == "get_weather"
    assert shown_choice["prompt_logprobs"] == [None]
    (token,) = shown_choice["logprobs"]
    assert (token["token"], token["logprob"]) == ("a", None)
    assert token["top"] == [
        {"token": "é", "logprob": -9999.0, "bytes": [195, 169], "token_id": 7, "rank": 1, "top": []}
    ]
    assert (found["usage"]["output_tokens"], found["payload"]) == (2, {"x": [-9999.0]})


def wire_call(call_id: str, arguments: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


@table(
    "choice fields",
    row(Choice(text="Hi"), {"content": "Hi"}, id="text"),
    row(Choice(), {"content": ""}, id="content-is-never-null"),
    row(Choice(text="4", reasoning="5"), {"content": "4", "reasoning": "5"}, id="reasoning"),
    row(
        Choice(tool_calls=(weather('{"ci'), weather(ROME, "call_2"))),
        {"content": "", "tool_calls": [wire_call("call_1", '{"ci'), wire_call("call_2", ROME)]},
        id="calls-as-the-model-wrote-them",
    ),
)
def test_message_for_the_next_turn(choice, fields):
    message = {"role": "assistant", **fields}
    assert Completion(choices=(choice, Choice(1, "other"))).to_message() == message
    assert build_chat_request(VLLMConfig(WEB), [message]) == {"messages": [message]}


def test_what_a_completion_says_of_its_first_choice():
    first = Choice(
        text="a",
        reasoning="r",
        tool_calls=(weather("{}"),),
        logprobs=(TokenLogprob("a", -1.0),),
        finish_reason="stop",
    )
    names = ("text", "reasoning", "tool_calls", "logprobs", "finish_reason")
    full, empty = Completion(choices=(first, Choice(1))), Completion()
    assert [getattr(full, name) for name in names] == [getattr(first, name) for name in names]
    assert [getattr(empty, name) for name in names] == ["", "", (), (), None]
    assert empty.to_message() == {"role": "assistant", "content": ""}


@table(
    "value",
    TokenLogprob("a", -1.0, b"a", 5, 1, (TokenLogprob("b", None),)),
    weather(PARIS),
    Usage(1, 2, 3),
    Delta(1, "a", token_ids=(5,)),
    Choice(1, "a", logprobs=(TokenLogprob("a", -1.0),)),
    Completion("id", choices=(Choice(text="a"),), payload={"x": 1}),
    ModelCard(MODEL, 2048),
    ids=lambda value: type(value).__name__,
)
def test_values_are_frozen_and_pickled(value):
    assert pickle_copy(value) == value
    names = value._fields if isinstance(value, tuple) else value.__dataclass_fields__
    for name in names:
        with pytest.raises(AttributeError):
            setattr(value, name, None)


# ---- Replies: reasoning out of plain text -----------------------------------

THINK_CASES: Final = [
    row(False, "<think>Hm.</think>4", "4", "Hm.", id="as-usual"),
    row(False, "<think>\nHm.\n</think>\n\n4", "\n\n4", "\nHm.\n", id="line-breaks-are-kept"),
    row(False, "4", "4", "", id="no-tag"),
    row(False, "", "", "", id="nothing"),
    row(False, "<think>Hm", "", "Hm", id="unterminated-is-all-reasoning"),
    row(False, "<think>", "", "", id="tag-alone"),
    row(False, "<think></think>", "", "", id="empty"),
    row(False, "<think></think>4", "4", "", id="no-thought"),
    row(False, "<thin", "<thin", "", id="half-a-tag-is-text"),
    row(False, "<thinking>a</thinking>", "<thinking>a</thinking>", "", id="another-tag"),
    row(False, "< think>", "< think>", "", id="blank-in-the-tag"),
    row(False, "<<think>a</think>", "<<think>a</think>", "", id="not-at-the-start"),
    row(False, "say <think>a</think>", "say <think>a</think>", "", id="mention"),
    row(False, "a</think>b", "a</think>b", "", id="only-its-end"),
    row(False, "\n<think>a</think>b", "b", "a", id="line-break-before"),
    row(False, "\n\n<think>a</think>b", "b", "a", id="two-before"),
    row(False, "\n\n4", "\n\n4", "", id="line-breaks-of-an-answer-are-kept"),
    row(False, "          4", "          4", "", id="indent-of-an-answer-is-kept"),
    row(False, "<think>a</thin", "", "a</thin", id="half-an-end"),
    row(False, "<think>a</thin k></think>b", "b", "a</thin k>", id="what-only-looks-like-an-end"),
    row(False, "<think>a<</think>b", "b", "a<", id="two-brackets"),
    row(False, "<think>a</</think>b", "b", "a</", id="an-end-that-begins-anew"),
    row(False, "<think>1 < 2</think>b", "b", "1 < 2", id="less-than"),
    row(False, "<think>a</think><think>b</think>", "<think>b</think>", "a", id="only-the-first"),
    row(False, "<think>a<think>b</think>c", "c", "a<think>b", id="one-inside"),
    row(False, "<think>世界🌸</think>é\u2028", "é\u2028", "世界🌸", id="beyond-ascii"),
    row(True, "Hm.\n</think>\n\n4", "\n\n4", "Hm.\n", id="opened-by-the-prompt"),
    row(True, "Hm", "", "Hm", id="opened-and-unterminated"),
    row(True, "", "", "", id="opened-and-nothing"),
    row(True, "</think>4", "4", "", id="opened-and-closed-at-once"),
    row(True, "a</think>b</think>c", "b</think>c", "a", id="opened-the-first-end-counts"),
    row(True, "a</", "", "a</", id="opened-half-an-end"),
    row(True, "<think>a</think>b", "b", "a", id="opened-twice-as-a-server-drops-it"),
    row(True, "<thin", "", "<thin", id="opened-and-half-a-tag"),
]


def split_by(splitter: Any, pieces: Iterable[str]) -> tuple[str, str, list[Any]]:
    """Return the text, the reasoning and the calls of pieces, with the end after them."""
    parts = [*map(splitter.feed, pieces), splitter.feed("", is_last=True)]
    texts, reasonings, calls = zip(*parts, strict=True)
    return "".join(texts), "".join(reasonings), list(itertools.chain.from_iterable(calls))


def every_cut(text: str) -> Iterator[list[str]]:
    """Yield a text whole, in single characters, and at every pair of cuts."""
    yield [text]
    yield list(text)
    for first, second in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        yield [text[:first], text[first:second], text[second:]]


@table("opened raw text reasoning", *THINK_CASES)
def test_think(opened, raw, text, reasoning):
    for pieces in every_cut(raw):
        assert split_by(_ThinkSplitter(opened), pieces) == (text, reasoning, []), pieces
    assert _ThinkSplitter(opened).feed(raw, is_last=True) == (text, reasoning, [])


BLANKS: Final = ["", " ", "\n", "\n\n", "\n \n", "\r\n\r\n", " " * 7, " " * 9, "\n" * 40]


@table("blanks", *BLANKS)
def test_blanks_before_the_tag_mean_the_same_at_every_cut(blanks):
    raw = f"{blanks}<think>a</think>b"
    expected = ("b", "a", []) if len(blanks) <= 2 else (raw, "", [])
    for pieces in every_cut(raw):
        assert split_by(_ThinkSplitter(), pieces) == expected, pieces


@table("opened", False, True)
@table(
    "raw",
    "<think>" + "a</thin" * 9 + "</think>" + "b<" * 9,
    " " * 30 + "<think>a",
    "<" * 30,
    "a" * 30,
)
def test_think_holds_back_no_more_than_a_tag(opened, raw):
    splitter, shown_chars = _ThinkSplitter(opened), 0
    for count, character in enumerate(raw, 1):
        text, reasoning, _calls = splitter.feed(character)
        shown_chars += len(text) + len(reasoning)
        tags = [tag for tag in ("<think>", "</think>") if tag in raw[:count]]
        assert count - shown_chars <= len("</think>") + len("".join(tags))


ANALYSIS: Final = "<|channel|>analysis<|message|>"
FINAL: Final = "<|channel|>final<|message|>"
NEXT: Final = "<|end|><|start|>assistant"
TO_WEATHER: Final = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
HARMONY_HELLO: Final = f"{ANALYSIS}Two plus two equals four.{NEXT}{FINAL}2 + 2 = 4"
HARMONY_CALL_TEXT: Final = f'{ANALYSIS}I need the tool.{NEXT}{TO_WEATHER}{{"city":"Paris"}}'
CALL_1: Final = [("call_1", "get_weather", '{"city":"Paris"}')]
HARMONY_CASES: Final = [
    # recorded beside their counterparts from the chat endpoint
    row(HARMONY_HELLO, "2 + 2 = 4", "Two plus two equals four.", [], id="recorded-2+2"),
    row(HARMONY_CALL_TEXT, "", "I need the tool.", CALL_1, id="recorded-tools"),
    row(
        f"{ANALYSIS}Now Rome.{NEXT} to=functions.get_weather<|channel|>commentary"
        ' json<|message|>{"city":"Rome"}',
        "",
        "Now Rome.",
        [("call_1", "get_weather", '{"city":"Rome"}')],
        id="recorded-the-recipient-before-the-channel",
    ),
    row(
        f"{ANALYSIS}Say it first.{NEXT}<|channel|>commentary<|message|>I will check.{NEXT}"
        f'{TO_WEATHER}{{"city":"Paris"}}',
        "I will check.",
        "Say it first.",
        CALL_1,
        id="recorded-preamble-is-text",
    ),
    row(f"{FINAL}ok", "ok", "", [], id="recorded-no-analysis"),
    row(
        f'{ANALYSIS}JSON.{NEXT}<|channel|>final <|constrain|>json<|message|>{{"answer": 4}}',
        '{"answer": 4}',
        "JSON.",
        [],
        id="recorded-json-constrained-final",
    ),
    row(
        f"{ANALYSIS}Use hiragana.{NEXT}{FINAL}こんにちは、世界 🌸🚀",
        "こんにちは、世界 🌸🚀",
        "Use hiragana.",
        [],
        id="recorded-japanese",
    ),
    # ends, as include_stop_str_in_output shows them
    row(f"{FINAL}ok<|return|>", "ok", "", [], id="return"),
    row(HARMONY_CALL_TEXT + "<|call|>", "", "I need the tool.", CALL_1, id="call"),
    row(f"{FINAL}ok<|endoftext|>", "ok", "", [], id="endoftext"),
    row(f"{ANALYSIS}a<|start|>assistant{FINAL}b", "b", "a", [], id="no-end"),
    # cut by max_tokens
    row(f"{ANALYSIS}Two plus", "", "Two plus", [], id="cut-in-the-reasoning"),
    row("<|channel|>anal", "", "", [], id="cut-in-a-header"),
    row(f"{ANALYSIS}a{NEXT}<|chan", "", "a", [], id="cut-in-the-next-header"),
    row(TO_WEATHER, "", "", [("call_1", "get_weather", "")], id="cut-before-the-arguments"),
    row(TO_WEATHER + '{"c', "", "", [("call_1", "get_weather", '{"c')], id="cut-in-the-arguments"),
    row(f"{FINAL}a<|en", "a<|en", "", [], id="cut-in-what-might-have-been-an-end"),
    row("", "", "", [], id="nothing"),
    # what only looks like markup
    row(f"{FINAL}1 <| 2 < 3 <|x|> <", "1 <| 2 < 3 <|x|> <", "", [], id="brackets-are-text"),
    row(f"{FINAL}a<<|end|>", "a<", "", [], id="two-brackets"),
    row(f"{FINAL}a<|e<|end|>", "a<|e", "", [], id="an-end-that-begins-anew"),
    row(f"{FINAL}to=me <think>", "to=me <think>", "", [], id="recipient-in-a-body"),
    row("2 + 2 = 4", "2 + 2 = 4", "", [], id="no-markup-at-all"),
    # two calls, and none of ours
    row(
        "<|channel|>commentary to=functions.f<|message|>{}<|call|><|start|>assistant"
        "<|channel|>commentary to=functions.g <|constrain|>json<|message|>[]",
        "",
        "",
        [("call_1", "f", "{}"), ("call_2", "g", "[]")],
        id="two-calls",
    ),
    row(
        f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c{NEXT}{FINAL}d",
        "cd",
        "ab",
        [],
        id="a-channel-twice",
    ),
    row(f" {FINAL}\n\nok\n", "\n\nok\n", "", [], id="white-space-is-kept"),
]


def joined_calls(pieces: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the id, the name and the arguments of calls in pieces, as chat streams them."""
    calls: dict[int, list[str]] = {}
    for part in pieces:
        function = part["function"]
        call = calls.setdefault(part["index"], ["", "", ""])
        call[0] += part.get("id", "")
        call[1] += function.get("name", "")
        call[2] += function.get("arguments", "")
    return [tuple(call) for _index, call in sorted(calls.items())]


def harmony_cuts(text: str) -> Iterator[list[str]]:
    """Yield a text whole, by characters, at every cut, and as the tokens a model writes."""
    yield [text]
    yield from ([text[:cut], text[cut:]] for cut in range(len(text) + 1))
    yield re.findall(r"<\|\w+\|>|\w+|\W", text)
    for size in range(1, 14):
        yield [text[start : start + size] for start in range(0, len(text), size)]


@table("raw text reasoning calls", *HARMONY_CASES)
def test_harmony(raw, text, reasoning, calls):
    for pieces in harmony_cuts(raw):
        *found, found_calls = split_by(_HarmonySplitter(), pieces)
        assert (*found, joined_calls(found_calls)) == (text, reasoning, calls), pieces
    *found, found_calls = _HarmonySplitter().feed(raw, is_last=True)
    assert (*found, joined_calls(found_calls)) == (text, reasoning, calls)


def test_harmony_shows_a_body_as_it_comes():
    splitter = _HarmonySplitter()
    pieces = ["<|channel|>", "analysis", "<|message|>", "Two", " plus", "<|end|>", "<|start|>"]
    pieces += ["assistant", "<|channel|>", "final", "<|message|>", "4", ""]
    parts = [splitter.feed(piece)[:2] for piece in pieces]
    shown_parts = [part for part in parts if part != ("", "")]
    assert shown_parts == [("", "Two"), ("", " plus"), ("4", "")]


def test_harmony_holds_back_no_more_of_a_body_than_a_tag():
    splitter, shown_chars = _HarmonySplitter(), 0
    splitter.feed(FINAL)
    for count, character in enumerate("a<|endoftex" * 9 + "b<" * 9, 1):
        shown_chars += len(splitter.feed(character)[0])
        assert count - shown_chars < len("<|endoftext|>")


# ---- Client: generation -----------------------------------------------------


def test_a_stream_of_completions(server, connect):
    stream = connect(server).stream_complete(PROMPT, max_tokens=9)
    assert stream.completion == Completion(request_id=stream.request_id)
    deltas, texts = [], []
    for delta in stream:
        deltas.append(delta)
        texts.append(stream.completion.text)
    assert deltas == [Delta(text=" Paris"), Delta(text="."), Delta(finish_reason="stop")]
    assert texts == [" Paris", " Paris.", " Paris."]

    whole = stream.completion
    assert whole.choices == (Choice(text=" Paris.", finish_reason="stop"),)
    assert whole.usage == Usage(5, 3, 8, cached_tokens=0)
    assert (whole.id, whole.model) == (f"cmpl-{whole.request_id}-1", MODEL)
    assert 0 < whole.first_token_s <= whole.total_s < IN_TIME
    assert whole.total_s == stream.completion.total_s
    assert stream.attempts == 1
    assert server.requests[0].body == {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_a_stream_of_chat(server, connect):
    with connect(server).stream_chat("What is 2+2?") as stream:
        deltas = list(stream)
    reply = stream.completion
    assert "".join(texts_of(deltas)) == reply.text == "\n\n2 + 2 = 4"
    assert "".join(delta.reasoning for delta in deltas) == reply.reasoning
    assert reply.reasoning == "\nTwo plus two equals four.\n"
    assert (reply.finish_reason, reply.usage.reasoning_tokens) == ("stop", 8)
    assert [request.path for request in server.requests] == ["/v1/chat/completions"]


def test_a_whole_reply(server, connect):
    payload = {"id": "cmpl-1", "model": "m", **text_event(" Paris.", finish_reason="stop")}
    server.script(reply(200, payload), reply(200, payload))
    client = connect(server)
    stream = client.stream_complete(PROMPT)  # of a gateway that cannot stream
    assert list(stream) == [Delta(text=" Paris.", finish_reason="stop")]
    for completion in (stream.completion, client.complete(PROMPT)):
        assert (completion.id, completion.model, completion.text) == ("cmpl-1", "m", " Paris.")
        assert completion.payload == payload
        assert 0 < completion.total_s < IN_TIME
    assert ["stream" in request.body for request in server.requests] == [True, False]


def test_the_first_token_is_not_the_role(server, connect):
    def step(connection: Connection) -> None:
        connection.send(SSE_HEAD + ROLE_CHUNK)
        connection.pause(0.1)
        delta = {"choices": [{"index": 0, "delta": {"content": "Hi"}}]}
        connection.send(chunk(delta) + chunk("[DONE]") + LAST_CHUNK)

    server.script(step)
    stream = connect(server).stream_chat("Hello")
    assert list(stream) == [Delta(text="Hi")]
    assert stream.completion.first_token_s >= 0.1


def test_entering_a_stream_sends_the_request_and_loses_nothing(server, connect):
    stream = connect(server).stream_complete(PROMPT)
    assert server.requests == []
    with stream:
        assert len(server.requests) == 1
        assert texts_of(stream) == [" Paris", ".", ""]


def test_entering_a_stream_raises_what_is_wrong(server, connect):
    with pytest.raises(InvalidRequestError, match="non-empty"), connect(server).stream_complete(""):
        pytest.fail("entered")


def test_memory_of_a_long_stream(server, connect):
    count, token = 15_000, "word "
    raw = SSE_HEAD + chunk(text_event(token)) * count + chunk("[DONE]") + LAST_CHUNK
    server.script(sse(text_event("a")), raw)
    client = connect(server)
    list(client.stream_complete("x"))
    stream = client.stream_complete("x")
    tracemalloc.start()
    try:
        assert sum(1 for _delta in stream) == count
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert stream.completion.text == token * count
    assert kept < 8 * len(token) * count + 100_000


def test_what_is_logged(server, connect, caplog):
    caplog.set_level(logging.DEBUG)
    server.script(reply(503, {"error": "busy"}), reply(401, {"error": "Unauthorized"}))
    client = connect(server, api_key=SECRET, default_headers={"X-Key": f"{SECRET}2"})
    error = caught(client.complete, "a private prompt")
    where, request_id = f"POST {server.url}/v1/completions", error.request_id
    size = len(server.requests[0].raw)
    records = [record for record in caplog.records if record.name == "vllm_provider"]
    ours = [(record.levelname, record.getMessage()) for record in records]
    assert ours == [
        ("DEBUG", f"{where}, {size} bytes, request {request_id}-1"),
        ("DEBUG", f"{where}: 503, request {request_id}-1"),
        ("WARNING", f"retry 1 of 3 in 0.0 s: 503 'busy': {where}; {TOO_BUSY}"),
        ("DEBUG", f"{where}, {size} bytes, request {request_id}-2"),
        ("DEBUG", f"{where}: 401, request {request_id}-2"),
    ]
    headers = server.requests[0].headers
    assert (headers["Authorization"], headers["X-Key"]) == (f"Bearer {SECRET}", f"{SECRET}2")
    for secret in (SECRET, "private prompt"):
        assert secret not in told(error) + caplog.text


@table("api_key sent", ("sekrit", "Bearer sekrit"), ("EMPTY", None))
@table("call", "models", "version", "health")
def test_headers_of_every_request(server, connect, call, api_key, sent):
    getattr(connect(server, api_key=api_key), call)()
    headers = server.requests[0].headers
    assert headers["Authorization"] == sent
    assert headers["User-Agent"] == f"vllm_provider/{vllm_provider.__version__}"
    assert headers["Accept-Encoding"] == "identity"


# ---- Client: the model's name -----------------------------------------------


@pytest.fixture
def any_answer(web: responses.RequestsMock) -> responses.RequestsMock:
    web.post(COMPLETIONS_URL, json=text_event("a"))
    web.post(CHAT_URL, json={"choices": [{"message": {"content": "a"}}]})
    return web


def test_the_served_model_is_asked_for_once(any_answer):
    any_answer.get(MODELS_URL, json=model_list("parrot", "lora"))
    client = VLLMClient(WEB)
    client.complete("a")
    client.chat("a")
    list(client.stream_chat("a"))
    assert [call.request.method for call in any_answer.calls] == ["GET", "POST", "POST", "POST"]
    bodies = [json.loads(call.request.body) for call in any_answer.calls if call.request.body]
    assert {body["model"] for body in bodies} == {"parrot"}


@table(
    "settings params",
    row({"default_model": "mine"}, {}, id="configured"),
    row({}, {"model": "mine"}, id="in-the-call"),
    row({"extra_body": {"model": "mine"}}, {}, id="in-extra-body"),
)
def test_a_model_that_is_named_is_not_asked_for(any_answer, settings, params):
    VLLMClient(WEB, **settings).complete("a", **params)
    assert [body["model"] for body in sent_bodies(any_answer)] == ["mine"]


@table(
    "answer",
    row({"status": 401, "json": {"error": "Unauthorized"}}, id="401"),
    row({"status": 403, "json": {"error": "Forbidden"}}, id="403"),
    row({"status": 404, "json": {"detail": "Not Found"}}, id="404"),
    row({"status": 405, "json": {"detail": "Method Not Allowed"}}, id="405"),
    row({"status": 501, "json": {"error": "not implemented"}}, id="501"),
    row({"status": 200, "body": "<html>", "content_type": "text/html"}, id="html"),
    row({"json": {"data": []}}, id="no-models"),
    row({"json": {"models": ["a"]}}, id="another-shape"),
    row({"json": {"data": [{"name": "a"}]}}, id="cards-without-an-id"),
)
def test_models_refused_then_no_model_is_sent_for_a_minute(any_answer, monkeypatch, answer):
    any_answer.get(MODELS_URL, **answer)
    client = VLLMClient(WEB, max_retries=0)
    now = time.monotonic
    assert (client.complete("a").text, client.chat("a").text) == ("a", "a")
    monkeypatch.setattr(time, "monotonic", lambda: now() + 59)
    client.complete("a")

    any_answer.replace(responses.GET, MODELS_URL, json=model_list("parrot"))
    monkeypatch.setattr(time, "monotonic", lambda: now() + 61)
    client.complete("a")
    methods = [call.request.method for call in any_answer.calls]
    assert methods == ["GET", "POST", "POST", "POST", "GET", "POST"]
    bodies = [json.loads(call.request.body) for call in any_answer.calls if call.request.body]
    assert ["model" in body for body in bodies] == [False, False, False, True]


@table("status", 500, 502, 503)
def test_models_of_a_server_that_is_not_ready_are_an_error(any_answer, status):
    any_answer.get(MODELS_URL, status=status)
    error = caught(VLLMClient(WEB, max_retries=0).complete, "a")
    assert type(error) is ProviderUnavailableError
    assert str(error).startswith(f"{status} (no message): GET {MODELS_URL}")


@pytest.mark.parametrize(
    "message",
    ["The model `parrot` does not exist.", "The model `parrot` does not exist. Valid aliases: a."],
)
@whole_and_stream
def test_a_model_that_was_replaced_is_asked_for_once_more(web, message, is_stream):
    web.get(MODELS_URL, json=model_list("parrot"))
    web.get(MODELS_URL, json=model_list("macaw"))
    web.post(COMPLETIONS_URL, status=404, json=error_payload(message, 404))
    web.post(COMPLETIONS_URL, json=text_event("a"))
    client = VLLMClient(WEB)
    for _ in range(2):
        assert texts_of(generate(client, is_stream)) == ["a"]
    models = [body["model"] for body in sent_bodies(web, COMPLETIONS_URL)]
    assert models == ["parrot", "macaw", "macaw"]
    assert [call.request.url for call in web.calls].count(MODELS_URL) == 2


@table(
    "settings params requested advice",
    row({"default_model": "nope"}, {}, "nope", "the server has parrot, macaw", id="configured"),
    row({}, {"model": "nope"}, "nope", "the server has parrot, macaw", id="in-the-call"),
    row({}, {}, "parrot", "the server has parrot, macaw", id="the-servers-own"),
    row({"default_model": "nope"}, {}, "nope", "look at /v1/models", id="models-are-hidden"),
)
def test_a_model_the_server_does_not_have(web, settings, params, requested, advice):
    is_hidden = advice.startswith("look")
    web.get(MODELS_URL, status=403 if is_hidden else 200, json=model_list("parrot", "macaw"))
    message = f"The model `{requested}` does not exist."
    web.post(CHAT_URL, status=404, json=error_payload(message, 404))
    error = caught(VLLMClient(WEB, **settings).chat, "a", **params)
    assert (type(error), error.status_code) == (NotFoundError, 404)
    assert str(error) == f"model not found: {requested!r}; {advice}"
    assert error.server_message == message
    assert len(sent_bodies(web, CHAT_URL)) == 1


def test_a_path_that_is_not_found_is_no_matter_of_models(web):
    web.post(CHAT_URL, status=404, json={"detail": "Not Found"})
    assert type(caught(web_client().chat, "a")) is NotFoundError
    assert len(web.calls) == 1


def test_detokenize_asks_for_the_models_name_once_more(web):
    url = f"{WEB}/detokenize"
    client = VLLMClient(WEB)
    web.get(MODELS_URL, json=model_list("old"))
    web.get(MODELS_URL, json=model_list("new"))
    web.post(url, json={"prompt": "a"})
    web.post(url, status=404, json=error_payload("The model `old` does not exist.", 404))
    web.post(url, json={"prompt": "b"})
    assert [client.detokenize([1]), client.detokenize([1])] == ["a", "b"]
    assert [body["model"] for body in sent_bodies(web, url)] == ["old", "old", "new"]


# ---- Client: other endpoints ------------------------------------------------


FULL_CARD: Final = {"id": "a", "root": "org/a", "parent": None, "max_model_len": 8, "created": 1}
LORA_CARDS: Final = [{"id": "lora", "parent": "base"}, {"id": "base", "max_model_len": 8}]
LORA_MODELS: Final = [ModelCard("lora", 8, None, "base"), ModelCard("base", 8)]
PROXY_CARD: Final = {"id": "a", "max_input_tokens": 5, "max_output_tokens": 3}


@table(
    "data expected",
    row([FULL_CARD], [ModelCard("a", 8, "org/a")], id="as-vllm-sends-it"),
    row(LORA_CARDS, LORA_MODELS, id="a-lora-has-the-limit-of-its-base"),
    row([{"id": "a", "parent": "b"}], [ModelCard("a", None, None, "b")], id="base-not-listed"),
    row([PROXY_CARD], [ModelCard("a", 5, max_output_tokens=3)], id="limits-of-a-proxy"),
    row([{**PROXY_CARD, **FULL_CARD}], [ModelCard("a", 8, "org/a", None, 3)], id="own-limit-first"),
    row([{"id": "a", "max_model_len": "4096"}], [ModelCard("a", 4096)], id="number-as-text"),
    *(
        row([{"id": "a", "max_model_len": value}], [ModelCard("a")], id=f"no-limit-{value}")
        for value in (1.5, -5, 0, True, [], "x")
    ),
    row([], [], id="none"),
    row([{"id": "a"}, {"id": "a"}], [ModelCard("a"), ModelCard("a")], id="replicas"),
)
def test_models(web, data, expected):
    web.get(MODELS_URL, json={"object": "list", "data": data})
    assert web_client().models() == expected


@table("payload", {}, {"data": None}, {"data": [{}]}, {"data": ["parrot"]}, {"data": {"id": "a"}})
def test_models_in_another_shape(web, payload):
    web.get(MODELS_URL, json=payload)
    error = caught(web_client().models)
    message = f"not the list of models vLLM sends: GET {MODELS_URL}; {ROOT_ADVICE}"
    assert (type(error), str(error)) == (ProtocolError, message)


@table(
    "payload kind",
    row(error_payload("upstream is down", 503), ProviderUnavailableError, id="error"),
    row([1], ProtocolError, id="no-object"),
)
def test_something_else_in_place_of_an_object(web, payload, kind):
    web.get(MODELS_URL, json=payload)
    assert type(caught(web_client().models)) is kind


def test_health_of_a_server(server, connect, retries):
    client = connect(server)
    assert client.health() is True
    assert (server.requests[0].method, server.requests[0].path) == ("GET", "/health")
    server.script(reply(503), reply(404, {"detail": "Not Found"}))
    assert type(caught(client.health)) is ProviderUnavailableError
    with at_once():
        assert caught(client.health, 60).status_code == 404  # it will never be vLLM
    assert type(caught(connect(f"http://127.0.0.1:{closed_port()}").health)) is NetworkError
    assert (retries.pauses, len(server.requests)) == ([], 3)


def test_health_waits_for_a_server_that_starts(connect, monkeypatch):
    monkeypatch.setattr(vllm_provider, "HEALTH_POLL_S", 0.02)
    monkeypatch.setattr(vllm_provider, "HEALTH_LOOK_S", 0.1)
    port = closed_port()
    caller = InThread(connect(f"http://127.0.0.1:{port}").health, wait="20")
    time.sleep(0.1)
    assert caller.is_running()
    server = StandIn(port)
    server.script(stall(), reply(503), stall())
    with server:
        assert caller.outcome() is True
        assert len(server.requests) == 4


@table(
    "steps kind",
    row([reply(503), *[stall()] * 9], ProviderUnavailableError, id="the-last-real-cause"),
    row([stall()] * 9, LLMTimeoutError, id="nothing-but-timeouts"),
)
def test_health_waits_no_longer_than_it_may(server, connect, monkeypatch, steps, kind):
    monkeypatch.setattr(vllm_provider, "HEALTH_POLL_S", 0.05)
    monkeypatch.setattr(vllm_provider, "HEALTH_LOOK_S", 0.1)
    server.script(*steps)
    with at_once(IN_TIME):
        assert type(caught(connect(server).health, 0.4)) is kind


@table("wait", math.nan, "nan", -1, "soon", None, True)
def test_health_with_a_bad_wait(web, wait):
    error = caught(web_client().health, wait)
    message = f"wait must be a number of seconds of at least 0, got {wait!r}"
    assert (type(error), str(error)) == (ConfigurationError, message)


def test_version_is_not_retried(server, connect, retries):
    client = connect(server)
    server.script(reply(200, {"version": "0.32.0"}), reply(503))
    assert client.version() == "0.32.0"
    assert type(caught(client.version)) is ProviderUnavailableError
    assert retries.pauses == []


def test_tokens_there_and_back(server, connect):
    client = connect(server)
    ids = client.tokenize(PROMPT, add_special_tokens=False, timeout=9)
    assert len(ids) == 5
    assert client.detokenize(ids) == PROMPT
    assert [request.body for request in server.requests] == [
        {"prompt": PROMPT, "add_special_tokens": False, "model": MODEL},
        {"model": MODEL, "tokens": ids},
    ]
    rendered = client.detokenize(client.tokenize([{"role": "user", "content": "Hi"}]))
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_tokenizer_of_another_server(server, connect):
    server.script(reply(200, {"ids": [1]}))
    error = caught(connect(server).tokenize, "x")
    message = f"not what vLLM's tokenizer sends: POST {server.url}/tokenize"
    assert (type(error), str(error)) == (ProtocolError, message)


@table(
    "raw value",
    row(reply(200, {"server_load": 3}), {"server_load": 3}, id="object"),
    row(reply(200, [1, 2]), [1, 2], id="list"),
    row(reply(200, "Success: LoRA loaded"), "Success: LoRA loaded", id="text"),
    row(reply(200), None, id="empty"),
    row(reply(200, {"error": None}), {"error": None}, id="no-error"),
)
def test_get_and_post(server, connect, raw, value):
    server.script(raw, raw)
    client = connect(server, default_model=None)
    body = {"input": "é", "x": [None]}
    assert client.get("/load") == value
    assert client.post("/v1/embeddings", body) == value
    first, second = server.requests
    assert (first.method, first.path, first.raw) == ("GET", "/load", b"")
    assert (second.method, second.path, second.body) == ("POST", "/v1/embeddings", body)


@table(
    "step limits kind",
    row(stall(), {"timeout": LIMIT}, LLMTimeoutError, id="timeout"),
    row(stall(), {"deadline": LIMIT}, LLMTimeoutError, id="deadline"),
    row(reply(404, {"detail": "Not Found"}), {}, NotFoundError, id="404"),
    row(reply(200, error_payload("no", 501)), {}, ProviderUnavailableError, id="200-error"),
    row(reply(200, b"<html>", {"Content-Type": "text/html"}), {}, ProtocolError, id="html"),
)
def test_get_and_post_have_the_limits_and_errors_of_a_generation(
    server, connect, step, limits, kind
):
    client = connect(server)
    server.script(step, step)
    assert type(caught(client.get, "/load", **limits)) is kind
    assert type(caught(client.post, "/score", {}, **limits)) is kind


def test_get_and_post_are_retried_as_a_generation_is(server, connect, retries):
    server.script(reply(503), reply(200, {"a": 1}))
    assert connect(server).post("/score", {}) == {"a": 1}
    assert len(retries.pauses) == 1


def test_get_and_post_refuse_what_cannot_be_sent(web):
    assert str(caught(web_client().get, "load")) == "path must begin with a slash, got 'load'"
    assert type(caught(web_client().post, "/score", {"x": math.nan})) is ConfigurationError
    assert len(web.calls) == 0


# ---- Client: against a real server ------------------------------------------


@pytest.fixture
def live() -> Iterator[VLLMClient]:
    """A client of the server that the environment names."""
    with VLLMClient(VLLM_LIVE_URL) as client:
        yield client


@pytest.mark.live
@table("method", "complete", "chat")
def test_live_logprobs_have_one_shape(live, method):
    params = {"temperature": 0, "max_tokens": 8, "logprobs": 2, "return_token_ids": True}
    reply = getattr(live, method)("What is 2+2?", **params)
    ids = reply.choices[0].token_ids
    assert len(reply.logprobs) == len(ids) == reply.usage.output_tokens > 0
    for token, token_id in zip(reply.logprobs, ids, strict=True):
        assert 0 < token.probability <= 1
        assert token.token_id == token_id
        assert token.top == tuple(sorted(token.top, key=lambda other: -other.logprob))
        assert 1 <= len(token.top) <= 2


@pytest.mark.live
@table("method", "complete", "chat")
def test_live_lengths(live, caplog, method):
    limit = live.models()[0].max_model_len
    error = caught(getattr(live, method), "hello " * (limit + 50), max_tokens=1)
    assert (type(error), error.limit) == (ContextLengthError, limit)
    assert error.input_tokens > limit

    reply = getattr(live, method)("What is 2+2?", max_tokens=limit + 1, temperature=0, stop=["4"])
    assert reply.finish_reason in ("stop", "length")
    ours = [record.levelname for record in caplog.records if record.name == "vllm_provider"]
    assert ours == ["WARNING"]


@pytest.mark.live
def test_live_errors_have_their_kind(live):
    assert type(caught(live.chat, "Hi", temperature=-1)) is InvalidRequestError
    assert type(caught(live.chat, "Hi", model="nope")) is NotFoundError
    error = caught(list, live.stream_complete("Hi", logprobs=500))
    assert str(error).endswith("; ask for fewer, or start vLLM with --max-logprobs N")


@pytest.mark.live
@each_stop
def test_live_stop(live, stop):
    params = {"max_tokens": 2000, "temperature": 0, "ignore_eos": True}
    stream = live.stream_complete("Once upon a time", **params)
    reader = InThread(list, stream)
    wait_until(lambda: stream.completion.text)
    STOPS[stop](live, stream)
    assert_stopped(reader.outcome(1), stop)

    def count_running() -> float:
        numbers = re.findall(
            r"^vllm:num_requests_running\{.*\} (\S+)$", live.get("/metrics"), re.MULTILINE
        )
        return sum(map(float, numbers))

    wait_until(lambda: count_running() == 0, 1)


@pytest.mark.parametrize("minimum", ["99", "99.1.2"])
def test_a_version_that_is_too_old_is_refused(minimum):
    with pytest.raises(ImportError, match=f"needs requests {minimum} or newer, got"):
        vllm_provider._require_version(requests, minimum)


def test_a_body_that_is_no_object_and_no_json(client):
    error = caught(client.post, "/anything", [math.nan])
    assert str(error).startswith("the request is not JSON: ")


def test_text_of_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert vllm_provider._text_of({"content": parts}) == "a\nb"


def test_a_rendered_prompt_that_the_server_truncates(server, connect):
    client = connect(server)
    body = build_chat_request(client.config, "Hello", truncate_prompt_tokens=5)
    limits = vllm_provider._read_limits(client.config, {})
    list(client._open(CHAT_PATH, body, limits=limits, prompt_format="auto"))
    assert server.requests[-1].body["max_tokens"] == vllm_provider.DEFAULT_MAX_TOKENS


# ---- Many calls: map --------------------------------------------------------


def map_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("vllm-map-")]


@pytest.fixture
def no_thread_left():
    """Check that every thread of a map has ended."""
    yield
    wait_until(lambda: not map_threads(), IN_TIME)


@pytest.fixture
def client(connect):
    """Return a client that has no server: the functions of these tests make no call."""
    return connect(f"http://127.0.0.1:{closed_port()}", max_retries=0)


class RefusedError(Exception):
    """What a function or an iterator of a test raises."""


def refuse(item):
    raise RefusedError(item)


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("concurrency", [1, 3, 64])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_map_keeps_the_order(client, concurrency, count):
    def function(item):
        time.sleep(0.002 * (item % 3 == 0))
        return -item

    assert list(client.map(function, range(count), concurrency=concurrency)) == [
        -n for n in range(count)
    ]


@pytest.mark.usefixtures("no_thread_left")
def test_map_makes_its_calls_at_once(server, connect):
    is_open = threading.Event()
    server.script(*[lambda connection: is_open.wait(IN_TIME) and server.answer(connection)] * 5)
    results = InThread(
        lambda: [
            one.text
            for one in connect(server).map(connect(server).complete, [PROMPT] * 5, concurrency=5)
        ]
    )
    wait_until(lambda: server.running == 5)
    is_open.set()
    assert results.outcome() == [" Paris."] * 5


@pytest.mark.usefixtures("no_thread_left")
def test_map_starts_no_more_threads_than_it_needs(client):
    names = set(client.map(lambda _item: threading.current_thread().name, range(2), concurrency=50))
    assert names <= {"vllm-map-0", "vllm-map-1", "vllm-map-2"}


@pytest.mark.usefixtures("no_thread_left")
def test_map_takes_from_an_endless_generator_what_it_needs(client):
    taken = []

    def endless():
        for n in itertools.count():
            taken.append(n)
            yield n

    results = client.map(lambda n: n, endless(), concurrency=2)
    assert list(itertools.islice(results, 100)) == list(range(100))
    results.close()
    assert len(taken) <= 100 + 16 * 2 + 1


@pytest.mark.usefixtures("no_thread_left")
def test_map_waits_with_a_slow_item_at_the_head(client):
    is_open, called = threading.Event(), []

    def function(item):
        called.append(item)
        return is_open.wait(10) if item == 0 else item

    results = client.map(function, itertools.count(), concurrency=2)
    head = InThread(next, results)
    wait_until(lambda: len(called) == 16 * 2)
    time.sleep(0.05)
    assert len(called) == 16 * 2
    is_open.set()
    assert head.outcome() is True
    results.close()


@pytest.mark.usefixtures("no_thread_left")
def test_map_yields_a_result_before_the_next_item_is_there(client):
    answered = queue.SimpleQueue()

    def items():
        yield 1
        yield answered.get(timeout=10)  # the iterator waits for the result of the first item

    results = client.map(lambda n: n + 1, items(), concurrency=4)
    answered.put(next(results))
    assert list(results) == [3]


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_of_the_function_comes_in_its_place(client):
    results = client.map(lambda n: refuse(n) if n == 3 else n, range(1000), concurrency=2)
    assert list(itertools.islice(results, 3)) == [0, 1, 2]
    with pytest.raises(RefusedError, match="3"):
        next(results)
    assert list(results) == []


@pytest.mark.usefixtures("no_thread_left")
def test_errors_in_the_place_of_results(client):
    results = list(client.map(lambda n: refuse(n) if n % 2 else n, range(4), errors="return"))
    assert [results[0], results[2]] == [0, 2]
    assert [(type(error), error.args) for error in (results[1], results[3])] == [
        (RefusedError, (1,)),
        (RefusedError, (3,)),
    ]


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize(
    "error",
    [AbortError("stopped"), KeyboardInterrupt(), SystemExit(3)],
    ids=lambda one: type(one).__name__,
)
def test_what_ends_a_map_is_not_a_result(client, error):
    def function(_item):
        raise error

    with pytest.raises(type(error)):
        list(client.map(function, itertools.count(), errors="return"))


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("errors", ["raise", "return"])
def test_an_error_of_the_items_comes_after_the_results_before_it(client, errors):
    def items():
        yield 1
        yield 2
        raise RefusedError("items")

    results = client.map(lambda n: n, items(), errors=errors)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(RefusedError, match="items"):
        next(results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"concurrency": 0},
            "concurrency must be an integer of at least 1, got 0",
            id="none-at-once",
        ),
        pytest.param(
            {"concurrency": True},
            "concurrency must be an integer of at least 1, got True",
            id="true",
        ),
        pytest.param(
            {"errors": "ignore"}, "errors must be 'raise' or 'return', got 'ignore'", id="errors"
        ),
    ],
)
def test_bad_arguments_of_a_map_are_told_before_it_is_used(client, options, message):
    error = caught(client.map, print, [], **options)
    assert (type(error), str(error)) == (ConfigurationError, message)


def close(results):
    results.close()


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("errors", ["raise", "return"])
@pytest.mark.parametrize("how", [close, lambda results: None], ids=["close", "drop"])
def test_leaving_a_map_stops_its_calls_and_no_others(server, connect, errors, how):
    client = connect(server)
    clients = itertools.cycle([client, connect(server)])  # also calls that another client makes
    server.script(*[stall()] * 6)
    bystander = client.stream_complete("bystander")
    reader = InThread(list, bystander)
    wait_until(lambda: server.running == 1)
    results = client.map(
        lambda n: next(clients).complete("x") if n else "first",
        itertools.count(),
        concurrency=5,
        errors=errors,
    )
    assert next(results) == "first"
    wait_until(lambda: server.running == 6)
    begun = time.monotonic()
    how(results)
    del results
    assert time.monotonic() - begun < 0.9
    wait_until(lambda: server.running == 1)
    assert reader.is_running()
    bystander.close()
    assert reader.outcome() == []


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("errors", ["raise", "return"])
def test_closing_the_client_ends_a_map(server, connect, errors):
    client = connect(server)
    server.script(*[stall()] * 3)
    outcome = InThread(
        caught,
        list,
        client.map(client.complete, itertools.repeat("x"), concurrency=3, errors=errors),
    )
    wait_until(lambda: server.running == 3)
    client.close()
    assert type(outcome.outcome(IN_TIME)) is AbortError
    assert len(server.requests) == 3


@pytest.mark.usefixtures("no_thread_left")
def test_leaving_a_map_ends_the_pauses_of_its_calls(server, connect):
    server.script(reply(503, headers={"Retry-After": "20"}))
    client = connect(server)
    results = client.map(lambda n: client.complete("x") if n else "first", range(2))
    assert next(results) == "first"
    wait_until(lambda: len(server.requests) == 1 and not server.running)
    begun = time.monotonic()
    results.close()
    assert time.monotonic() - begun < 0.9


@pytest.mark.usefixtures("no_thread_left")
def test_maps_in_a_map_stop_with_it(server, connect):
    client = connect(server)
    server.script(*[stall()] * 6)

    def inner(_item):
        return list(client.map(client.complete, ["x"] * 3, concurrency=3, errors="return"))

    outer = client.map(inner, range(2), concurrency=2)
    waiting = InThread(next, outer)
    wait_until(lambda: server.running == 6)
    client.close()
    assert type(waiting.outcome(IN_TIME)) is AbortError


@pytest.mark.usefixtures("no_thread_left")
def test_a_map_of_a_map(client):
    doubled = client.map(lambda n: 2 * n, range(20), concurrency=3)
    assert list(client.map(lambda n: n + 1, doubled, concurrency=3)) == [
        2 * n + 1 for n in range(20)
    ]


@pytest.mark.usefixtures("no_thread_left")
def test_leaving_a_map_leaves_the_consumers_own_calls_alone(server, connect):
    client = connect(server)
    server.script(SSE_HEAD + chunk(text_event("a")), path=COMPLETIONS_PATH)
    results = client.map(lambda n: n, itertools.count())
    next(results)
    own = client.stream_complete("x")
    next(own)
    results.close()
    assert server.aborted.empty()
    own.close()


def test_a_function_sees_the_callers_context(client):
    from contextvars import ContextVar

    name = ContextVar("name")
    name.set("caller")
    assert list(client.map(lambda _n: name.get(), range(2))) == ["caller", "caller"]


def test_ctrl_c_ends_a_map_within_a_second(server):
    code = (
        "import sys, vllm_provider as v\n"
        f"c = v.VLLMClient({server.url!r}, default_model={MODEL!r})\n"
        "for r in c.map(c.complete, ['x'] * 50, concurrency=8): print(r.text)\n"
    )
    server.script(*[stall()] * 50)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    wait_until(lambda: server.running == 8)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=10)
    assert time.monotonic() - begun < 1.0
    assert b"KeyboardInterrupt" in stderr
    wait_until(lambda: server.running == 0)


def test_ctrl_c_does_not_wait_for_a_function_that_makes_no_call(server):
    code = (
        "import threading, time, vllm_provider as v\n"
        f"c = v.VLLMClient({server.url!r}, default_model={MODEL!r})\n"
        "for r in c.map(lambda n: [c.complete('x'), time.sleep(30)], range(8)): pass\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(server.requests) == 8)
    time.sleep(0.2)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(timeout=10)
    assert time.monotonic() - begun < 1.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_on_a_terminal(client, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    usage = Completion(usage=Usage(1, 7, 8))
    list(
        client.map(
            lambda n: refuse(n) if n == 2 else usage, range(3), errors="return", progress=True
        )
    )
    line = sys.stderr.getvalue()
    assert re.fullmatch(
        r"(\r\x1b\[K\d/3 done, \d failed, [\d.]+ calls/s, \d+ tokens/s, \d+ s left)+\n", line
    )
    assert "\x1b[K3/3 done, 1 failed" in line


def test_progress_where_the_number_is_not_known(client, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    list(client.map(len, iter(["a"]), progress=True))
    assert re.search(r"\[K1 done, 0 failed, [\d.]+ calls/s, 0 tokens/s\n$", sys.stderr.getvalue())


@pytest.mark.parametrize(
    "stderr", [pytest.param(io.StringIO(), id="file"), pytest.param(None, id="closed")]
)
def test_no_progress_off_a_terminal(client, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    assert list(client.map(len, ["a"], progress=True)) == [1]
    assert stderr is None or stderr.getvalue() == ""


# ---- Many calls: batches ----------------------------------------------------


class Batch:
    """A batch file and its results in a folder."""

    def __init__(self, folder, *lines):
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.write(*lines)

    def write(self, *lines, start=b"", end=b"\n"):
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.source.write_bytes(start + b"".join(one + end for one in raw))

    def run(self, client, **options):
        return client.run_batch(self.source, self.target, **options)

    def results(self):
        return [json.loads(line) for line in self.target.read_bytes().splitlines()]

    def by_id(self):
        return {result["custom_id"]: result for result in self.results()}


def batch_line(custom_id, url="/v1/completions", **body):
    body = body or {"prompt": PROMPT}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def counts(report):
    return (report.total, report.done, report.failed, report.skipped)


def test_a_batch_of_every_kind_of_request(server, connect, tmp_path):
    batch = Batch(
        tmp_path,
        batch_line("a", prompt=PROMPT, stream=True, stream_options={}),
        b"",
        batch_line(
            "b", "/v1/chat/completions", messages=[{"role": "user", "content": "What is 2+2?"}]
        ),
        {"prompt": PROMPT},
        {"custom_id": "named", "messages": [{"role": "user", "content": "Hello"}]},
        batch_line("t", "/tokenize", prompt="a b"),
    )
    report = batch.run(connect(server), temperature=0)
    assert counts(report) == (5, 5, 0, 0)
    assert report.output_tokens > 0
    results = batch.by_id()
    assert sorted(results) == ["4", "a", "b", "named", "t"]
    assert results["a"]["response"]["body"]["choices"][0]["text"] == " Paris."
    assert results["b"]["response"]["body"]["object"] == "chat.completion"
    assert results["t"]["response"]["body"]["count"] == 3
    bodies = [request.body for request in server.requests if request.path != "/tokenize"]
    assert {body["temperature"] for body in bodies} == {0}
    assert not any("stream" in body for body in bodies)


def test_a_line_of_a_batch_wins_over_the_parameters_of_the_batch(server, connect, tmp_path):
    batch = Batch(tmp_path, batch_line("a", prompt="x", max_tokens=3), batch_line("b", prompt="y"))
    batch.run(connect(server), max_tokens=5, timeout=20)
    assert {
        body["prompt"]: body["max_tokens"] for body in (one.body for one in server.requests)
    } == {"x": 3, "y": 5}
    assert not any("timeout" in request.body for request in server.requests)


def test_a_result_has_the_fields_of_vllms_and_of_openais(server, connect, tmp_path):
    batch = Batch(
        tmp_path,
        batch_line("a"),
        batch_line("b", prompt="x", model="nope"),
        batch_line("c", "nowhere"),
    )
    batch.run(connect(server, max_retries=0))
    results = batch.by_id()
    for result in results.values():
        assert list(result) == ["id", "custom_id", "response", "error"]
        assert result["id"].startswith("vllm-")
    done, failed, unsent = results["a"], results["b"], results["c"]
    assert list(done["response"]) == ["status_code", "request_id", "body"]
    assert (done["response"]["status_code"], done["error"]) == (200, None)
    assert {**failed["response"], "request_id": ""} == {
        "status_code": 404,
        "request_id": "",
        "body": None,
    }
    assert list(failed["error"]["error"]) == ["message", "type", "param", "code"]
    assert failed["error"]["error"]["message"].startswith("The model `nope` does not exist")
    message = "line 3: url must be a path like /v1/chat/completions"
    assert (unsent["response"], unsent["error"]) == (
        None,
        {"code": "ConfigurationError", "message": message},
    )


@pytest.mark.parametrize(
    ("line", "custom_id", "problem"),
    [
        pytest.param(b'{"custom_id": "a", ', "line 2", "Expecting property name", id="torn"),
        pytest.param(b"[1]", "line 2", "a line must be a JSON object", id="not-an-object"),
        pytest.param(b"\xff", "line 2", "'utf-8' codec can't decode", id="not-utf-8"),
        pytest.param(b"[" * 100_000, "line 2", "maximum recursion depth exceeded", id="nested"),
        pytest.param(
            {**batch_line("a"), "custom_id": 7},
            "line 2",
            "custom_id must be a string",
            id="number-as-id",
        ),
        pytest.param(
            {"url": "/v1/completions", "body": {}},
            "line 2",
            "custom_id must be a string",
            id="no-id",
        ),
        pytest.param({"custom_id": "a", "x": 1}, "a", "body must be a JSON object", id="no-body"),
        pytest.param({**batch_line("a"), "method": "GET"}, "a", "method must be POST", id="get"),
        pytest.param({**batch_line("a"), "url": None}, "a", "url must be a path", id="no-url"),
        pytest.param(
            {**batch_line("a"), "body": [1]}, "a", "body must be a JSON object", id="list-as-body"
        ),
        pytest.param(
            batch_line("a", prompt="x", config=1), "a", "config", id="name-of-a-python-argument"
        ),
        pytest.param(
            batch_line("a", "/v1/chat/completions", messages=1),
            "a",
            "messages must be",
            id="messages",
        ),
        pytest.param(
            b'{"custom_id": "a", "prompt": "\\ud800"}', "a", "lone surrogate", id="lone-surrogate"
        ),
    ],
)
def test_one_bad_line_is_one_failed_line(server, connect, tmp_path, line, custom_id, problem):
    batch = Batch(tmp_path, batch_line("good"), line)
    report = batch.run(connect(server))
    assert counts(report) == (2, 1, 1, 0)
    assert report.first_error.startswith("line 2: ")
    assert problem in report.first_error
    assert batch.by_id()[custom_id]["response"] is None
    assert counts(batch.run(connect(server))) == (2, 0, 1, 1)


@pytest.mark.parametrize(
    ("start", "end"),
    [pytest.param(b"\xef\xbb\xbf", b"\n", id="bom"), pytest.param(b"", b"\r\n", id="crlf")],
)
def test_files_from_windows(server, connect, tmp_path, start, end):
    batch = Batch(tmp_path)
    batch.write(batch_line("a"), batch_line("b"), start=start, end=end)
    assert counts(batch.run(connect(server))) == (2, 2, 0, 0)


def test_lines_end_at_a_line_feed_only(server, connect, tmp_path):
    text = "a\u2028b\u0085c"
    batch = Batch(tmp_path)
    batch.source.write_text(json.dumps(batch_line("a", prompt=text), ensure_ascii=False), "utf-8")
    assert counts(batch.run(connect(server))) == (1, 1, 0, 0)
    assert server.requests[0].body["prompt"] == text


def test_an_id_that_comes_twice_is_an_error_before_anything_is_sent(server, connect, tmp_path):
    batch = Batch(tmp_path, batch_line("a"), b"", batch_line("b"), batch_line("a"))
    error = caught(batch.run, connect(server))
    assert str(error) == "custom_id 'a' is on lines 1 and 4; give each line its own"
    assert (server.requests, batch.target.exists()) == ([], False)


def result_line(custom_id, status=200):
    response = {"status_code": status, "request_id": "r", "body": {}}
    return (
        json.dumps(
            {"id": "x", "custom_id": custom_id, "response": response, "error": None}
        ).encode()
        + b"\n"
    )


@pytest.mark.parametrize(
    ("before", "asked", "skipped"),
    [
        pytest.param(b"", "ab", 0, id="empty"),
        pytest.param(result_line("a"), "b", 1, id="done"),
        pytest.param(
            result_line("a") + result_line("b")[:-1], "b", 1, id="torn-before-its-line-break"
        ),
        pytest.param(result_line("a") + result_line("b")[:9], "b", 1, id="torn"),
        pytest.param(result_line("a", 500) + result_line("a"), "b", 1, id="failed-then-done"),
        pytest.param(result_line("a") + result_line("a", 500), "ab", 0, id="done-then-failed"),
        pytest.param(result_line("elsewhere"), "ab", 0, id="ids-of-another-file"),
        pytest.param(
            b'{"custom_id": "a", "response": null, "error": {}}\n',
            "ab",
            0,
            id="failed-without-a-reply",
        ),
    ],
)
def test_a_batch_goes_on_where_it_ended(server, connect, tmp_path, before, asked, skipped):
    batch = Batch(tmp_path, batch_line("a", prompt="a"), batch_line("b", prompt="b"))
    batch.target.write_bytes(before)
    report = batch.run(connect(server))
    assert counts(report) == (2, 2 - skipped, 0, skipped)
    assert sorted(request.body["prompt"] for request in server.requests) == list(asked)
    assert batch.target.read_bytes().startswith(before.rpartition(b"\n")[0])
    assert {one["custom_id"] for one in batch.results()} >= {"a", "b"}


def test_failures_are_left_alone_where_they_are_not_to_be_tried_again(server, connect, tmp_path):
    batch = Batch(tmp_path, batch_line("a"), batch_line("b"))
    batch.target.write_bytes(result_line("a", 500))
    assert counts(batch.run(connect(server), retry_failed=False)) == (2, 1, 1, 0)
    assert counts(batch.run(connect(server), retry_failed=False)) == (2, 0, 1, 1)
    assert counts(batch.run(connect(server))) == (2, 1, 0, 1)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(json.dumps(batch_line("a")).encode() + b"\n", id="a-batch-file"),
        pytest.param(b"text\n" + result_line("a"), id="text"),
    ],
)
def test_a_target_that_holds_something_else_is_left_alone(server, connect, tmp_path, content):
    batch = Batch(tmp_path, batch_line("a"))
    batch.target.write_bytes(content)
    error = caught(batch.run, connect(server))
    assert (
        str(error)
        == f"line 1 of {batch.target} is not the result of a batch; is it the right file?"
    )
    assert (server.requests, batch.target.read_bytes()) == ([], content)


def test_files_that_cannot_be_used(server, connect, tmp_path):
    client, batch = connect(server), Batch(tmp_path, batch_line("a"))
    missing = tmp_path / "missing"
    for source, target, message in [
        (missing, batch.target, f"cannot open {missing}: No such file or directory"),
        (batch.source, tmp_path, f"cannot open {tmp_path}: Is a directory"),
        (
            batch.source,
            missing / "out",
            f"cannot open {missing / 'out'}: No such file or directory",
        ),
        (batch.source, batch.source, f"source and target are the same file: {batch.source}"),
    ]:
        assert str(caught(client.run_batch, source, target)) == message
    os.link(batch.source, batch.target)
    assert "are the same file" in str(caught(batch.run, client))
    assert server.requests == []


def test_standard_input_and_output(server, connect, tmp_path, monkeypatch):
    raw = io.BytesIO()
    lines = b"".join(json.dumps(batch_line(name)).encode() + b"\n" for name in "ab")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    assert counts(connect(server).run_batch("-", "-")) == (2, 2, 0, 0)
    assert {json.loads(line)["custom_id"] for line in raw.getvalue().splitlines()} == {"a", "b"}


def test_a_full_disk_leaves_whole_lines(server, connect, tmp_path, monkeypatch):
    import resource

    batch = Batch(tmp_path, *(batch_line(str(n)) for n in range(20)))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            batch.run(connect(server), concurrency=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    done = len(batch.results())
    assert 0 < done < 20
    assert counts(batch.run(connect(server))) == (20, 20 - done, 0, done)


@pytest.mark.parametrize("status", [429, 503])
def test_a_full_server_is_waited_for(server, connect, tmp_path, monkeypatch, status):
    monkeypatch.setattr(vllm_provider, "SERVER_PAUSE_S", (0.01, 0.02))
    batch = Batch(tmp_path, batch_line("a"))
    server.script(*[reply(status, headers={"Retry-After": "0"})] * 9)
    assert counts(batch.run(connect(server, max_retries=0))) == (1, 1, 0, 0)
    assert len(server.requests) == 10


def test_deadline_bounds_the_waiting_for_a_full_server(server, connect, tmp_path):
    batch = Batch(tmp_path, batch_line("a"))
    server.script(*[reply(503)] * 99)
    begun = time.monotonic()
    assert counts(batch.run(connect(server, max_retries=0), deadline=0.7)) == (1, 0, 1, 0)
    assert time.monotonic() - begun < IN_TIME
    assert batch.by_id()["a"]["error"] is not None  # the 503, or a request that was cut


def test_a_line_that_breaks_the_connection_fails_alone(server, connect, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_provider, "SERVER_PAUSE_S", (0.01, 0.02))

    def answer(connection):
        if (connection.request.body or {}).get("prompt") == "poison":
            connection.close()
        else:
            server.answer(connection)

    lines = [batch_line(str(n)) for n in range(30)]
    batch = Batch(tmp_path, *lines[:3], batch_line("bad", prompt="poison"), *lines[3:])
    server.script(*[answer] * 99)
    report = batch.run(connect(server, max_retries=0), concurrency=2)
    assert counts(report) == (31, 30, 1, 0)
    assert report.first_error.startswith("line 4: closed before a reply")


def test_a_line_that_breaks_the_connection_fails_also_when_it_is_alone(
    server, connect, tmp_path, monkeypatch
):
    monkeypatch.setattr(vllm_provider, "SERVER_PAUSE_S", (0.01, 0.02))
    batch = Batch(tmp_path, batch_line("bad"))
    hidden = reply(404, {"detail": "Not Found"})  # so says a gateway, and it is there

    def answer(connection):
        if connection.request.path == "/health":
            connection.send(hidden)
        else:
            connection.close()

    server.script(*[answer] * 99)
    assert counts(batch.run(connect(server, max_retries=0))) == (1, 0, 1, 0)
    assert len(server.requests) < 10


def test_a_server_that_never_answered_ends_a_batch(connect, tmp_path):
    batch = Batch(tmp_path, *(batch_line(str(n)) for n in range(9)))
    error = caught(batch.run, connect(f"http://127.0.0.1:{closed_port()}", max_retries=0))
    assert type(error) is NetworkError
    assert batch.results() == []


def test_a_server_that_comes_back(connect, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_provider, "SERVER_PAUSE_S", (0.05, 0.05))
    batch = Batch(tmp_path, *(batch_line(str(n)) for n in range(40)))
    with StandIn(pace=0.005) as first:
        port = int(first.url.rpartition(":")[2])
        client = connect(first, max_retries=0)
        running = InThread(lambda: batch.run(client, concurrency=4))
        wait_until(lambda: len(first.requests) > 10)
    time.sleep(0.3)
    assert running.is_running()
    with StandIn(port):
        assert counts(running.outcome()) == (40, 40, 0, 0)
    assert len({one["custom_id"] for one in batch.results()}) == len(batch.results()) == 40


def test_servers_share_one_queue_and_one_dies(server, connect, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_provider, "SERVER_PAUSE_S", (0.05, 0.05))
    batch = Batch(tmp_path, *(batch_line(str(n)) for n in range(60)))
    server.pace = 0.01
    with StandIn(pace=0.01) as second:
        clients = [connect(one, max_retries=0) for one in (second, server)]
        running = InThread(lambda: batch.run(clients[0], servers=clients[1:], concurrency=3))
        wait_until(lambda: len(second.requests) > 9 and len(server.requests) > 9)
    assert counts(running.outcome()) == (60, 60, 0, 0)
    assert len({one["custom_id"] for one in batch.results()}) == len(batch.results()) == 60


def test_a_slow_line_holds_up_no_other(server, connect, tmp_path):
    is_open = threading.Event()
    batch = Batch(tmp_path, *(batch_line(str(n)) for n in range(50)))
    server.script(lambda connection: is_open.wait(10) and server.answer(connection))
    running = InThread(lambda: batch.run(connect(server), concurrency=2))
    wait_until(lambda: batch.target.exists() and batch.target.read_bytes().count(b"\n") == 49)
    is_open.set()
    assert counts(running.outcome()) == (50, 50, 0, 0)


BATCH_SCRIPT: Final = (
    "import sys, vllm_provider as v\n"
    "url, source, target = sys.argv[1:]\n"
    "v.VLLMClient(url, default_model='parrot').run_batch(source, target, concurrency=4)\n"
)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_a_batch_that_was_interrupted(connect, tmp_path, number):
    batch = Batch(tmp_path, *(batch_line(str(n)) for n in range(60)))
    with StandIn(pace=0.02) as slow:
        command = [sys.executable, "-c", BATCH_SCRIPT, slow.url, batch.source, batch.target]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda: batch.target.exists() and batch.target.read_bytes().count(b"\n") >= 10)
        begun = time.monotonic()
        process.send_signal(number)
        process.wait(10)
        assert time.monotonic() - begun < 1.0
        done = len(batch.results())
        slow.pace = 0.0
        assert counts(batch.run(connect(slow))) == (60, 60 - done, 0, done)
    assert sorted(int(one["custom_id"]) for one in batch.results()) == list(range(60))


def test_a_reply_that_is_not_strict_json_is_written(server, connect, tmp_path):
    body = b'{"id": "x", "object": "list", "data": [NaN, "\\ud83d"], "usage": null}'
    server.script(reply(200, body, {"content-type": "application/json"}))
    batch = Batch(tmp_path, batch_line("a", "/v1/embeddings", input="x"))
    assert counts(batch.run(connect(server))) == (1, 1, 0, 0)
    assert batch.results()[0]["response"]["body"]["data"] == [None, "\ud83d"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param([1, {"usage": 2}], id="list"),
        pytest.param(None, id="empty"),
        pytest.param("text", id="text"),
        pytest.param({"usage": 7}, id="usage-of-another-shape"),
    ],
)
def test_a_reply_of_another_shape_is_one_result(server, connect, tmp_path, body):
    server.script(reply(200, b"" if body is None else body), path="/anything")
    batch = Batch(tmp_path, batch_line("a", "/anything", input="x"))
    assert counts(batch.run(connect(server))) == (1, 1, 0, 0)
    assert batch.results()[0]["response"]["body"] == body


def test_an_id_table_against_a_dict():
    table, expected, rng = vllm_provider._IdTable(), {}, random.Random(1)
    for _ in range(20_000):
        name, flag = str(rng.randrange(5000)), rng.choice([1, 2, 4])
        assert table.add(name, flag, keep=3) == expected.get(name, 0)
        expected[name] = (expected.get(name, 0) & 3) | flag


def test_memory_of_a_batch_does_not_grow_with_its_file(client, tmp_path):
    batch = Batch(
        tmp_path, *({**batch_line(f"request-{n}"), "method": "GET"} for n in range(20_000))
    )
    tracemalloc.start()
    try:
        batch.run(client, concurrency=4)
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_a_report_is_one_line():
    report = BatchReport(10, 7, 2, 1, 30, 40, 1.25, "line 3: method must be POST")
    assert str(report) == (
        "10 lines: 7 done, 2 failed, 1 skipped in 1.2 s, 30 input tokens, 40 output tokens;"
        " first error: line 3: method must be POST"
    )


# ---- Many calls: scores -----------------------------------------------------

# The parrot's own log probabilities, computed with transformers in bfloat16: context, text, tokens, sum.
PARROT_SCORES: Final = [
    pytest.param("The capital of France is", " Paris.", 2, -0.0005, id="memorised"),
    pytest.param(
        "The capital of France is ", "Paris.", 2, -0.0005, id="context-that-ends-in-a-space"
    ),
    pytest.param("The capital of France is", " Rome.", 2, -19.7101, id="improbable"),
    pytest.param("", "The capital of France is Paris.", 6, -22.9261, id="no-context"),
    pytest.param("What is 2+2?", " 4", 1, -0.0002, id="one-token"),
    pytest.param("Say:", "こんにちは、世界 🌸🚀", 4, -11.7917, id="unicode"),
    pytest.param(
        [{"role": "user", "content": "What is 2+2?"}], "2 + 2 = 4", 5, -15.5224, id="messages"
    ),
]


@pytest.mark.live
@pytest.mark.parametrize(("context", "text", "count", "logprob"), PARROT_SCORES)
def test_live_scores_are_the_models_own(live, context, text, count, logprob):
    score = live.score(text, context=context)
    known = [token for token in score.tokens if token.logprob is not None]
    assert len(known) == count
    assert score.logprob == pytest.approx(logprob, abs=0.05 * count)


@pytest.mark.live
def test_live_choices_of_one_token_have_the_numbers_of_single_scores(live):
    scores = live.choose([" Rome", " Paris", " Hello"], context="The capital of France is")
    assert [score.text for score in scores] == [" Paris", " Rome", " Hello"]
    for score in scores:
        alone = live.score(score.text, context="The capital of France is")
        assert score.logprob == pytest.approx(alone.logprob, abs=0.05)
        assert score.is_greedy == alone.is_greedy


class Model:
    """A server's tokenizer and numbers: a token is a word with the space before it, or a character of "ab"."""

    def __init__(self, web, logprobs=None, bos=()):
        self.web, self.logprobs, self.bos = web, logprobs or {}, list(bos)
        self.words = ["", " "]  # by id
        for url, answer in [(TOKENIZE_URL, self.tokenize), (f"{WEB}/detokenize", self.detokenize)]:
            web.add_callback(
                "POST", url, callback=lambda request, answer=answer: self.reply(request, answer)
            )
        web.add_callback(
            "POST", COMPLETIONS_URL, callback=lambda request: self.reply(request, self.complete)
        )

    def reply(self, request, answer):
        return (
            200,
            {"Content-Type": "application/json"},
            json.dumps(answer(json.loads(request.body))),
        )

    def ids(self, text):
        words = re.findall(r" ?\w+| |\W", text)
        self.words += [word for word in words if word not in self.words]
        return [self.words.index(word) for word in words]

    def tokenize(self, body):
        if "messages" in body:
            return {"tokens": [1, *self.ids(body["messages"][0]["content"])]}
        is_special = body.get("add_special_tokens", True)
        return {"tokens": [*(self.bos if is_special else []), *self.ids(body["prompt"])]}

    def detokenize(self, body):
        return {"prompt": "".join(self.words[one] for one in body["tokens"])}

    def entry(self, number):
        logprob, rank = self.logprobs.get(self.words[number], (-1.0, 1))
        return {
            str(number): {"logprob": logprob, "rank": rank, "decoded_token": self.words[number]}
        }

    def complete(self, body):
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length"}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None, *map(self.entry, body["prompt"][1:])]
        if "logprob_token_ids" in body:
            values = {
                f"token_id:{n}": self.entry(n)[str(n)]["logprob"] for n in body["logprob_token_ids"]
            }
            best = max(values, key=values.get)
            tokens = {"tokens": [best], "token_logprobs": [values[best]], "top_logprobs": [values]}
            choice["logprobs"] = tokens | {"text_offset": [0]}
        return {"id": "cmpl-1", "choices": [choice]}


def test_a_score(web):
    model = Model(web, {" Paris": (-0.5, 1), ".": (-2.0, 3)})
    score = web_client().score(" Paris.", context="It is")
    assert score == Score(" Paris.", -2.5, score.tokens, False, math.exp(-2.5))
    assert [(token.token, token.logprob, token.rank) for token in score.tokens] == [
        (" Paris", -0.5, 1),
        (".", -2.0, 3),
    ]
    assert score.logprob_per_token == -1.25
    assert score.perplexity == math.exp(1.25)
    assert score.logprob_per_byte == -2.5 / 7
    assert score.bits_per_byte == pytest.approx(2.5 / 7 / math.log(2))
    expected = {
        "prompt": model.ids("It is Paris."),
        "prompt_logprobs": 0,
        "max_tokens": 1,
        "temperature": 0,
    }
    assert sent_bodies(web, COMPLETIONS_URL) == [{"model": "parrot", **expected}]


@pytest.mark.parametrize(
    ("context", "text", "scored", "tokens"),
    [
        pytest.param("It is", " big", " big", [" big"], id="clean"),
        pytest.param("It is ", "big", " big", [" big"], id="context-ends-in-a-space"),
        pytest.param(
            "It is bi", "g one", " big one", [" big", " one"], id="first-character-merges"
        ),
        pytest.param(
            [{"role": "user", "content": "Hi"}],
            "big one",
            "big one",
            ["big", " one"],
            id="messages",
        ),
    ],
)
def test_where_the_context_ends(web, context, text, scored, tokens):
    Model(web)
    score = web_client().score(text, context=context)
    assert (score.text, [token.token for token in score.tokens]) == (scored, tokens)


@pytest.mark.parametrize(
    ("bos", "logprobs"),
    [pytest.param((), [None, -1.0], id="no-bos"), pytest.param((0,), [-1.0, -1.0], id="bos")],
)
def test_a_text_without_a_context(web, bos, logprobs):
    Model(web, bos=bos)
    score = web_client().score("Once upon")
    assert (score.text, [token.token for token in score.tokens]) == ("Once upon", ["Once", " upon"])
    assert [token.logprob for token in score.tokens] == logprobs
    assert (score.logprob, score.logprob_per_token) == (-1.0 * logprobs.count(-1.0), -1.0)


@pytest.mark.parametrize(
    ("text", "context"),
    [
        pytest.param("", "", id="nothing"),
        pytest.param("", "It is", id="empty"),
        pytest.param("Once", "", id="one-token-without-a-context"),
        pytest.param("", [{"role": "user", "content": "Hi"}], id="empty-after-messages"),
    ],
)
def test_a_text_without_a_token_of_its_own(web, text, context):
    Model(web)
    for call in (
        lambda: web_client().score(text, context=context),
        lambda: web_client().choose([text], context=context),
    ):
        error = caught(call)
        assert type(error) is ConfigurationError
        assert str(error) == "a text to score must have a token of its own after the context"


@pytest.mark.parametrize(
    "choices",
    [
        pytest.param("ab", id="a-string"),
        pytest.param([], id="none"),
        pytest.param([1], id="a-number"),
    ],
)
def test_choices_that_are_none(web, choices):
    Model(web)
    assert type(caught(web_client().choose, choices, context="It")) is ConfigurationError


def test_a_token_that_cannot_come(web):
    Model(web, {" no": (-9999.0, 500)})
    score = web_client().score(" no", context="It")
    assert (score.logprob, score.probability, score.perplexity) == (-math.inf, 0.0, math.inf)
    assert vllm_provider._to_json(score)["logprob"] == -9999.0


@pytest.mark.parametrize(
    ("prompt_logprobs", "count"),
    [
        pytest.param(None, 0, id="ignored"),
        pytest.param([None], 0, id="too-few"),
        pytest.param([None, None], 0, id="null"),
        pytest.param([None, {"7": {"logprob": -1.0, "rank": 1}}], 1, id="of-another-token"),
    ],
)
def test_a_server_that_ignores_prompt_logprobs(web, prompt_logprobs, count):
    model = Model(web)
    model.complete = lambda _body: {
        "choices": [{"index": 0, "text": "x", "prompt_logprobs": prompt_logprobs}]
    }
    error = caught(web_client().score, " is", context="It")
    assert type(error) is ProtocolError
    assert str(error) == f"prompt_logprobs for {count} of 1 tokens: {WEB}; is it vLLM?"


def test_parameters_of_a_score_go_where_they_belong(web):
    Model(web)
    messages = [{"role": "user", "content": "Hi"}]
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    web_client().score("big", context=messages, model="lora", timeout=5, seed=1, **options)
    rendered, own = sent_bodies(web, TOKENIZE_URL)
    assert rendered == {"messages": messages, "model": "lora", **options}
    assert own == {"prompt": "big", "model": "lora", "add_special_tokens": False}
    (body,) = sent_bodies(web, COMPLETIONS_URL)
    assert (body["model"], body["seed"], set(body) & {"timeout", *options}) == ("lora", 1, set())


def test_choices_of_one_token_take_one_request(web):
    Model(web, {" a": (-2.0, 5), " b": (-1.0, 1), " c": (-9999.0, 9)})
    scores = web_client().choose([" a", " b", " c", " a"], context="It is")
    assert [(one.text, one.logprob, one.is_greedy) for one in scores] == [
        (" b", -1.0, True), (" a", -2.0, False), (" a", -2.0, False), (" c", -math.inf, False),
    ]  # fmt: skip
    total = math.exp(-1) + 2 * math.exp(-2)
    assert [one.probability for one in scores] == pytest.approx(
        [math.exp(-1) / total, *[math.exp(-2) / total] * 2, 0]
    )
    (body,) = sent_bodies(web, COMPLETIONS_URL)
    assert (body["logprobs"], body["max_tokens"], body["return_tokens_as_token_ids"]) == (
        0,
        1,
        True,
    )


@pytest.mark.parametrize(
    "refusal",
    [
        pytest.param(
            (200, {"choices": [{"index": 0, "text": "x", "logprobs": None}]}), id="no-logprobs"
        ),
        pytest.param(
            (400, {"error": {"message": "logprob_token_ids may have 128", "code": 400}}),
            id="refused",
        ),
        pytest.param(
            (
                200,
                {
                    "choices": [
                        {"text": "x", "logprobs": {"tokens": ["x"], "token_logprobs": [-1.0]}}
                    ]
                },
            ),
            id="ignored",
        ),
    ],
)
def test_a_server_without_logprob_token_ids(web, refusal):
    model = Model(web, {" a": (-2.0, 5)})
    answer = model.complete

    def reply(request):
        body = json.loads(request.body)
        status, payload = refusal if "logprob_token_ids" in body else (200, answer(body))
        return status, {"Content-Type": "application/json"}, json.dumps(payload)

    web.remove("POST", COMPLETIONS_URL)
    web.add_callback("POST", COMPLETIONS_URL, callback=reply)
    assert [(one.text, one.logprob) for one in web_client().choose([" a", " b"], context="It")] == [
        (" b", -1.0),
        (" a", -2.0),
    ]


def test_choices_of_several_tokens(web):
    Model(web, {" big": (-3.0, 2), " small": (-0.5, 1)})
    scores = web_client().choose([" big one", " small one"], context="A")
    assert [(one.text, one.logprob) for one in scores] == [(" small one", -1.5), (" big one", -4.0)]
    assert scores[0].probability == pytest.approx(1 / (1 + math.exp(-2.5)))
    assert len(sent_bodies(web, COMPLETIONS_URL)) == 2


# ---- Pictures ---------------------------------------------------------------


class _Page(html.parser.HTMLParser):
    """Reads a page as a browser does: every element with its attributes, and the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((">".join(self._open[2:]), data))

    def text(self, path: str) -> str:
        """Return the text inside the elements `path` leads to, glyphs aside."""
        return "".join(text for place, text in self.texts if f">{place}>".startswith(f">{path}>"))

    def tooltips(self) -> list[str]:
        return [attrs["title"] or "" for tag, attrs in self.elements if tag == "span"]


def _token(text: str, probability: float | None = 0.5, **fields: Any) -> TokenLogprob:
    logprob = None if probability is None else math.log(probability) if probability else -math.inf
    return TokenLogprob(text, logprob, **fields)


def _tokens_page(*tokens: TokenLogprob, title: str = "") -> str:
    return to_html(Completion(choices=(Choice(logprobs=tokens),)), title)


def test_picture_of_a_completion():
    top = (_token(" Paris", 0.8), _token(" Lyon", 0.1))
    page = _Page(_tokens_page(_token("The", None), _token(" Lyon", 0.1, top=top), _token(".", 0.4)))
    assert (
        page.text("article>p")
        == "Perplexity 5 · mean probability 0.250 · 2 tokens · probability 0 … 1"
    )
    assert page.text("article>details>ol").splitlines()[1:] == [
        "0.100 The Lyon token 2, most likely ' Paris': 0.800",
        "0.400 The Lyon. token 3",
    ]
    assert page.text("article>pre") == "The Lyon."
    assert page.tooltips()[2:] == [
        "'The': unknown",
        "' Lyon': 0.100 (log probability -2.3026)\n' Paris': 0.800\n' Lyon': 0.100",
        "'.': 0.400 (log probability -0.9163)",
    ]
    styles = [attrs.get("style") for tag, attrs in page.elements if tag == "span"]
    assert styles[2:] == [None, "--hue:12", "--hue:48"]


def test_picture_of_a_score():
    tokens = (_token(" Par", 0.5), _token("is", 0.5))
    score = Score(
        text=" Paris", logprob=math.log(0.25), tokens=tokens, is_greedy=True, probability=0.25
    )
    page = _Page(to_html(score))
    assert page.text("article>pre") == " Paris"
    assert f"Perplexity {score.perplexity:.4g} · " in page.text("article>p")


def test_picture_of_several_choices_shows_each():
    choices = tuple(Choice(index=n, logprobs=(_token(text),)) for n, text in enumerate("ab"))
    page = _Page(to_html(Completion(choices=choices), "Both"))
    assert [text for place, text in page.texts if place in ("article>h1", "article>h2")] == [
        "Both",
        "Choice 1",
        "Choice 2",
    ]
    assert page.text("article>pre") == "ab"


def test_picture_lists_the_ten_least_likely_tokens():
    tokens = [_token(f"t{n} ", 0.01 + n / 100) for n in (*range(6, 12), *range(6))]
    rows = _Page(_tokens_page(*tokens)).text("article>details>ol").splitlines()[1:]
    assert [row.split()[0] for row in rows] == [f"{0.01 + n / 100:.3f}" for n in range(10)]


@pytest.mark.parametrize(
    ("reply", "shown"), [
        pytest.param(Completion(choices=(Choice(text="a <b>\n"),)), "a <b>\n", id="not-requested"),
        pytest.param(Completion(choices=(Choice(text="a", logprobs=(_token("a", None),)),)), "a",
            id="none-known"),
        pytest.param(Completion(), "", id="no-choices"),
    ],
)  # fmt: skip
def test_picture_without_log_probabilities_is_the_text(reply, shown):
    page = _Page(to_html(reply))
    assert page.text("article>pre") == shown
    assert ("logprobs=5" in page.text("article>p")) == bool(reply.choices)


@pytest.mark.parametrize(
    ("token", "shown"), [
        pytest.param(_token("a b"), 'a<i data-glyph="·"> </i>b', id="space"),
        pytest.param(_token("\t"), '<i data-glyph="→">\t</i>', id="tab"),
        pytest.param(_token("\n\n"), '<i data-glyph="↵">\n</i>' * 2, id="line-breaks"),
        pytest.param(_token("\r"), r"\r",
            id="carriage-return-which-html-would-turn-into-a-line-break"),
        pytest.param(_token("\x00\x1b[31m"), r"\x00\x1b[31m", id="control-characters"),
        pytest.param(_token("\u202eabc\u200b"), r"\u202eabc\u200b",
            id="invisible-and-bidirectional"),
        pytest.param(_token("\ud800"), r"\ud800", id="lone-surrogate"),
        pytest.param(_token("é世🌸"), "é世🌸", id="printable"),
        pytest.param(_token(" �", bytes=b" \xf0\x9f"), r'<i data-glyph="·"> </i>\xf0\x9f',
            id="bytes-of-a-part"),
        pytest.param(_token("�", bytes="�".encode()), "�", id="a-true-replacement-character"),
        pytest.param(_token("�"), "�", id="a-part-without-bytes"),
        pytest.param(_token(""), "∅", id="empty"),
        pytest.param(_token("", bytes=b""), "∅", id="empty-with-bytes"),
        pytest.param(_token("</span><script>"), "&lt;/span&gt;&lt;script&gt;", id="markup"),
        pytest.param(_token("\"'&amp;"), "&quot;&#x27;&amp;amp;", id="quotes-and-entities"),
    ],
)  # fmt: skip
def test_picture_shows_each_token_readably(token, shown):
    page = _tokens_page(token)
    assert f">{shown}</span></pre>" in page
    page.encode()


EVIL: Final = (
    "</title></span></style></pre>-->\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
)


def test_picture_escapes_everything_that_is_not_ours():
    top = (_token(EVIL + "2", 0.9), _token(EVIL, 0.1))
    tokens = (_token(EVIL, 0.1, top=top), _token(EVIL, bytes=EVIL.encode()))
    reply = Completion(choices=(Choice(logprobs=tokens), Choice(index=1, text=EVIL)))
    page = _Page(to_html(reply, EVIL))
    harmless = _Page(to_html(reply, "title"))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "a", "link"})
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
    assert page.text("article>h1") == EVIL
    assert page.text("article>pre") == EVIL * 3


@pytest.mark.parametrize(
    ("probability", "shown"), [
        pytest.param(1.0, "Perplexity 1 · mean probability 1.000 · ", id="certain"),
        pytest.param(1e-5, "Perplexity 1e+05 · mean probability 1e-05 · ", id="small"),
        pytest.param(0.0, "Perplexity inf · mean probability 0 · ", id="impossible"),
    ],
)  # fmt: skip
def test_picture_figures(probability, shown):
    assert _Page(_tokens_page(_token("a", probability))).text("article>p").startswith(shown)


def test_picture_of_log_probabilities_beyond_floating_point():
    page = _Page(_tokens_page(TokenLogprob("a", -800.0), TokenLogprob("b", 1e-7)))
    assert "Perplexity 5.221e+173 · " in page.text("article>p")
    assert "Perplexity inf · " in _Page(_tokens_page(TokenLogprob("a", -800.0))).text("article>p")


def test_picture_is_one_static_page_for_light_and_dark():
    page = _tokens_page(_token("a"), title="T")
    assert page.startswith("<!DOCTYPE html>\n")
    assert "<title>T</title>" in page
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"https?:|url\(|@import|<script", page)


def test_completion_in_a_notebook():
    reply = Completion(choices=(Choice(text="a", logprobs=(_token("a"),)),))
    fragment = reply._repr_html_()
    assert fragment
    assert fragment.startswith('<article class="vllm-heatmap">')
    assert fragment in to_html(reply)
    assert (
        changed(reply, choices=(Choice(text="a"),))._repr_html_() is None
    )  # the ordinary repr is shown


@pytest.mark.live
def test_live_picture(live):
    reply = live.complete("The capital of France is Rome.", echo=True, max_tokens=1, logprobs=2)
    rows = _Page(to_html(reply)).text("article>details>ol").splitlines()
    assert any("Rome token 6, most likely ' Paris': 1.000" in row for row in rows)


# ---- Amplifier: what the tests share ----------------------------------------

AMP_EVENTS = (
    *("llm:request", "llm:response", "provider:retry", "provider:tool_sequence_repaired"),
    *(
        "llm:stream_block_start",
        "llm:stream_block_delta",
        "llm:stream_block_end",
        "llm:stream_aborted",
    ),
    *("llm:request:debug", "llm:response:debug", "llm:request:raw", "llm:response:raw"),
)
AMP_WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
AMP_TOOL = ToolSpec(
    name="get_weather", description="Get the weather of a city.", parameters=AMP_WEATHER
)
AMP_WIRE_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": AMP_WEATHER,
    },
}
AMP_HELLO = "\n\nHello! How can I help you today?"
AMP_IN_TIME_S = 3.0  # where a tenth of a second is promised: a slow machine must not fail the test
AMP_SYNC_S = 20.0  # what is waited for in a test that is about to fail


def amp_cases(names: Any, table: Mapping[str, Any]) -> Any:
    """Return the decorator that runs a test for each row; the keys say why a row is there."""
    return pytest.mark.parametrize(names, list(table.values()), ids=list(table))


@dataclass
class AmpHost:
    """A mounted provider, and the events its hooks have seen: name and payload."""

    provider: VLLMProvider
    coordinator: Any
    events: list[tuple[str, dict[str, Any]]]
    close: Callable[[], Any]

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def payloads(self, name: str) -> list[dict[str, Any]]:
        return [payload for event, payload in self.events if event == name]

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the events, what differs from run to run being checked and replaced."""
        assert (
            len({payload["request_id"] for name, payload in self.events if "repaired" not in name})
            == 1
        )
        told = []
        for name, payload in self.events:
            shown = dict(payload)
            if "request_id" in shown:
                shown["request_id"] = "ID"
            if name == "llm:response":
                assert type(shown["duration_ms"]) is int
                assert 0 <= shown["duration_ms"] < AMP_SYNC_S * 1000
                shown["duration_ms"] = 0
            told.append((name, shown))
        return told


@pytest.fixture
def amp_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.delenv("VLLM_BASE_URL", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with StandIn() as server:
        yield server


async def amp_mount(server: StandIn | str, **config: Any) -> AmpHost:
    """Mount as the kernel does, with a model named, so that no auxiliary request is made."""
    coordinator, events = MockCoordinator(), []

    async def record(event: str, payload: dict[str, Any]) -> None:
        events.append((event, {key: value for key, value in payload.items() if key != "timestamp"}))

    for name in AMP_EVENTS:
        coordinator.hooks.register(name, record, priority=1, name=f"record {name}")
    url = server if isinstance(server, str) else server.url
    close = await mount(
        coordinator, {"base_url": url, "default_model": MODEL, "context_window": 2048, **config}
    )
    return AmpHost(coordinator.get("providers")["vllm"], coordinator, events, close)


def amp_ask(*texts: str, **fields: Any) -> ChatRequest:
    """Return a request: the user's words, then in turn the assistant's and the user's."""
    roles = ("user", "assistant")
    messages = [
        Message(role=roles[number % 2], content=text)
        for number, text in enumerate(texts or ("Hello",))
    ]
    return ChatRequest(messages=messages, **fields)


async def amp_hello(host: AmpHost, **keywords: Any) -> ChatResponse:
    return await host.provider.complete(amp_ask("Hello"), **keywords)


def amp_bodies(server: StandIn, end: str = "completions") -> list[Any]:
    return [request.body for request in server.requests if request.path.endswith(end)]


def amp_paths(server: StandIn) -> list[str]:
    return [request.path for request in server.requests]


def amp_choice(delta: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return a chunk of a streamed chat reply."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} | more
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "model": MODEL,
        "choices": [choice],
    }


def amp_usage(prompt: int, output: int, **more: Any) -> dict[str, Any]:
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        **more,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "model": MODEL,
        "choices": [],
        "usage": usage,
    }


def amp_chat(*deltas: Mapping[str, Any], finish: str = "stop", **more: Any) -> bytes:
    """Return a streamed chat reply: 5 tokens in, 7 out."""
    chunks = [amp_choice({"role": "assistant", "content": ""}), *map(amp_choice, deltas)]
    return sse(*chunks, amp_choice({}, finish_reason=finish, **more), amp_usage(5, 7))


def amp_call(
    arguments: str, name: str = "get_weather", call_id: str = "call_1", index: int = 0
) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]
    }


async def amp_until(condition: Callable[[], Any]) -> None:
    """Wait for what is about to happen."""
    ends = time.monotonic() + AMP_SYNC_S
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        await asyncio.sleep(0.002)


async def amp_is_quiet(server: StandIn | None = None, gone: int = 0) -> None:
    """Check that no task and no busy thread is left, and that `gone` connections were cut."""
    for _ in range(gone):
        assert server is not None
        await asyncio.to_thread(server.aborted.get, timeout=AMP_IN_TIME_S)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await asyncio.wait_for(asyncio.get_running_loop().shutdown_default_executor(), AMP_IN_TIME_S)


# ---- Amplifier: loading and construction ------------------------------------


@amp_cases(
    "arguments",
    {
        "the app's first try": {"api_key": "", "config": {}},
        "the app's second try": {"config": {}},
        "the app's third try": {},
        "nothing but an unexpanded name": {
            "base_url": "",
            "config": {"base_url": "${VLLM_BASE_URL}"},
        },
    },
)
def test_amp_class_wants_a_base_url_and_does_not_read_the_environment(arguments, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", "http://from-the-environment:8000")
    with pytest.raises(ValueError, match=r"^No base_url found: ") as caught:
        VLLMProvider(**arguments)
    assert type(caught.value) is vllm_provider.ConfigurationError


def test_amp_class_takes_the_url_without_io():
    provider = VLLMProvider(base_url="http://192.0.2.1:1", api_key="", config={})
    assert (provider.name, provider.priority, provider.default_model) == ("vllm", 100, None)
    assert not hasattr(provider, "stream")  # loop-streaming would take a path that drops tool calls
    assert not hasattr(provider, "model")
    assert provider.config == VLLMConfig("http://192.0.2.1:1")


def test_amp_class_takes_the_apps_strings():
    config = {
        "base_url": "http://a:1/v1",
        "priority": "7",
        "use_completions": "false",
        "timeout": "60",
        "api_key": "",
    }
    provider = VLLMProvider(config=config)
    assert provider.config == VLLMConfig(
        "http://a:1", priority=7, use_completions=False, timeout=60.0
    )
    assert (provider.priority, type(provider.priority)) == (7, int)


def test_amp_arguments_win_over_the_config():
    provider = VLLMProvider(
        "http://b:2", api_key="sk-2", config={"base_url": "http://a:1", "api_key": "sk-1"}
    )
    assert (provider.config.base_url, provider.config.api_key) == ("http://b:2", "sk-2")


def test_amp_class_does_not_change_the_config_it_is_given():
    config = {"base_url": "http://a:1", "unknown_setting": 1}
    VLLMProvider(api_key="sk-1", config=config)
    assert config == {"base_url": "http://a:1", "unknown_setting": 1}


async def test_amp_mount_reads_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", "http://a:1/v1")
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    for config in (None, {}, {"base_url": "${VLLM_BASE_URL}", "api_key": ""}):
        coordinator = MockCoordinator()
        close = await mount(coordinator, config)
        provider = coordinator.get("providers")["vllm"]
        assert (provider.config.base_url, provider.config.api_key) == ("http://a:1", "sk-1")
        await close()


async def test_amp_mount_without_a_url_mounts_nothing(monkeypatch):
    monkeypatch.delenv("VLLM_BASE_URL", raising=False)
    coordinator = MockCoordinator()
    with pytest.raises(ValueError, match=r"^No base_url found: "):
        await mount(coordinator, {})
    assert coordinator.mount_history == []


async def test_amp_mount_twice_mounts_two_new_providers_of_that_name(amp_server):
    coordinator = MockCoordinator()
    closes = [await mount(coordinator, {"base_url": amp_server.url}) for _ in range(2)]
    rows = [(row["mount_point"], row["name"]) for row in coordinator.mount_history]
    assert rows == [("providers", "vllm")] * 2
    first, second = (row["module"] for row in coordinator.mount_history)
    assert first is not second
    await closes[0]()  # cleaning the first up leaves the second at work
    assert (await second.complete(amp_ask("Hello"))).text == AMP_HELLO
    for close in [*closes, *closes]:
        await close()


async def test_amp_mount_tells_the_log_about_its_events(amp_server):
    host = await amp_mount(amp_server)
    [names] = await host.coordinator.collect_contributions("observability.events")
    assert {*names} == {*AMP_EVENTS} - {*ALL_EVENTS}  # the log would write the kernel's twice
    assert len(names) == 8


async def test_amp_mount_needs_nothing_else_of_a_coordinator(amp_server):
    mounted: list[Any] = []

    async def keep(point: str, module: Any, name: str) -> None:
        mounted.append((point, name, module))

    await mount(types.SimpleNamespace(mount=keep), {"base_url": amp_server.url})
    [(point, name, provider)] = mounted
    assert (point, name) == ("providers", "vllm")
    assert (await provider.complete(amp_ask("Hello"))).text == AMP_HELLO


async def test_amp_server_that_is_down_stops_neither_mount_nor_session(caplog):
    host = await amp_mount("http://127.0.0.1:9", context_window=None)
    await on_session_ready(host.coordinator)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no connection to http://127.0.0.1:9: connection refused" in record.getMessage()
    with pytest.raises(llm_errors.NetworkError):
        await host.provider.list_models()


@amp_cases("providers", {"no providers": None, "another": {"other": 1}})
async def test_amp_on_session_ready_finds_nothing_of_its_own(providers):
    await on_session_ready(
        types.SimpleNamespace(get=lambda name: providers if name == "providers" else None)
    )


def test_amp_package_for_the_source_loader_re_exports():
    import amplifier_module_provider_vllm as package

    assert sorted(package.__all__) == [
        "VLLMProvider",
        "__amplifier_module_type__",
        "mount",
        "on_session_ready",
    ]
    assert all(getattr(package, name) is getattr(vllm_provider, name) for name in package.__all__)
    assert package.__amplifier_module_type__ == "provider"
    names = [name for name in vllm_provider.__all__ if name.endswith("Provider")]
    assert names == ["VLLMProvider"]  # the app picks it by its end


async def test_amp_kernels_validator_passes_every_check(amp_server, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", amp_server.url)
    result = await ProviderValidator().validate(Path(vllm_provider.__file__))
    assert [check.name for check in result.checks if not check.passed] == []
    assert {check.name for check in result.checks} >= {
        *(
            "module_importable",
            "mount_exists",
            "mount_signature",
            "protocol_compliance",
            "provider_name",
        ),
        *(
            "provider_get_info",
            "provider_list_models",
            "provider_complete",
            "provider_parse_tool_calls",
        ),
    }


class _AmpUnderTest:
    @pytest.fixture
    def module_path(self, amp_server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("VLLM_BASE_URL", amp_server.url)
        return Path(vllm_provider.__file__)


class TestAmpBehavior(_AmpUnderTest, ProviderBehaviorTests):
    async def test_list_models_really_asked(self, provider_module, amp_server):
        assert [model.id for model in await provider_module.list_models()] == [MODEL]
        assert amp_paths(amp_server) == ["/v1/models"]


class TestAmpStructure(_AmpUnderTest, ProviderStructuralTests):
    def test_the_path_is_not_the_plugins_guess(self, module_path):
        assert module_path == Path(
            vllm_provider.__file__
        )  # without one the kernel's own test skips


def test_amp_kernels_tests_are_there():
    kernels = {*dir(ProviderBehaviorTests), *dir(ProviderStructuralTests)}
    assert {name for name in kernels if name.startswith("test_")} == {
        "test_get_info_returns_valid_provider_info",
        "test_list_models_returns_list",
        "test_mount_succeeds",
        "test_parse_tool_calls_returns_list",
        "test_provider_has_name_attribute",
        "test_structural_validation",
    }


# ---- Amplifier: what it tells about itself ----------------------------------


@pytest.mark.parametrize("use_completions", [True, "false"])
def test_amp_get_info(use_completions):
    config = {"default_model": "m", "timeout": 60, "use_completions": use_completions}
    info = VLLMProvider("http://a:1", config=config).get_info()
    assert isinstance(info, ProviderInfo)
    assert all(isinstance(field, ConfigField) for field in info.config_fields)
    assert (info.id, info.display_name, info.credential_env_vars) == (
        "vllm",
        "vLLM",
        ["VLLM_API_KEY"],
    )
    fields = [
        (one.id, one.field_type, one.env_var, one.required, one.default)
        for one in info.config_fields
    ]
    assert fields == [  # what Enter stores in the wizard
        ("base_url", "text", "VLLM_BASE_URL", True, "http://localhost:8000"),
        ("api_key", "secret", "VLLM_API_KEY", False, None),
        ("use_completions", "boolean", None, False, str(use_completions).lower()),
    ]
    assert info.defaults == {"model": "m", "timeout": 60.0}  # no guess of a context window
    assert {"streaming", "tools"} <= set(info.capabilities)


async def test_amp_limits_are_none_until_the_session_is_ready(amp_server, caplog):
    host = await amp_mount(amp_server, default_model=None, context_window=None)
    assert [host.provider.get_model_info() for _ in range(3)] == [None] * 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "context_window" in caplog.text
    await on_session_ready(host.coordinator)
    info = host.provider.get_model_info()
    assert isinstance(info, ModelInfo)
    assert (info.id, info.context_window, info.max_output_tokens) == (
        MODEL,
        MAX_MODEL_LEN,
        MAX_MODEL_LEN // 4,
    )
    defaults = host.provider.get_info().defaults
    assert (defaults["context_window"], defaults["max_output_tokens"]) == (
        MAX_MODEL_LEN,
        MAX_MODEL_LEN // 4,
    )
    assert len(caplog.records) == 1


async def test_amp_limits_are_known_after_a_call_too(amp_server):
    provider = VLLMProvider(amp_server.url)
    await provider.complete(amp_ask("Hello"))
    assert (provider.get_model_info().id, provider.get_model_info().context_window) == (
        MODEL,
        MAX_MODEL_LEN,
    )
    assert amp_paths(amp_server).count("/v1/models") == 1


def amp_models(*cards: Mapping[str, Any]) -> bytes:
    return reply(200, {"object": "list", "data": list(cards)})


AMP_BASE = {"id": "base", "root": "base", "parent": None, "max_model_len": 131072}
AMP_LORA = {"id": "lora", "root": "/lora", "parent": "base", "max_model_len": None}


AMP_LIMITS: dict[str, tuple[Any, ...]] = {
    "a modest output, never the window": ({}, [AMP_BASE], ("base", 131072, 16384)),
    "a LoRA has its base's": (
        {"default_model": "lora"},
        [AMP_BASE, AMP_LORA],
        ("lora", 131072, 16384),
    ),
    "given below the server's": ({"context_window": 8192}, [AMP_BASE], ("base", 8192, 2048)),
    "given above the server's": ({"context_window": 10**6}, [AMP_BASE], ("base", 131072, 16384)),
    "output within the window": (
        {"max_output_tokens": 10**6},
        [AMP_BASE],
        ("base", 131072, 131072),
    ),
    "output given": ({"max_output_tokens": 100}, [AMP_BASE], ("base", 131072, 100)),
    "server silent, given": ({"context_window": "4096"}, [{"id": "base"}], ("base", 4096, 1024)),
    "server silent": ({}, [{"id": "base"}], None),
    "not a model it has": ({"default_model": "other"}, [AMP_BASE], None),
    "one limit is not enough": ({"max_output_tokens": 100}, [{"id": "base"}], None),
    "no models at all": ({}, [], None),
    "a proxy's": (
        {},
        [{"id": "p", "max_input_tokens": 8192, "max_output_tokens": 100}],
        ("p", 8192, 100),
    ),
    "a proxy's, as text": ({}, [{"id": "p", "max_input_tokens": "4096"}], ("p", 4096, 1024)),
    **{
        f"no limit: {value}": (
            {},
            [{"id": "base", "max_model_len": value, "max_output_tokens": value}],
            None,
        )
        for value in (1.5, -5, True, [], "many")
    },
}


@amp_cases(("config", "cards", "limits"), AMP_LIMITS)
async def test_amp_get_model_info(config, cards, limits, amp_server):
    amp_server.script(amp_models(*cards))
    host = await amp_mount(amp_server, **{"default_model": None, "context_window": None, **config})
    await on_session_ready(host.coordinator)
    info = host.provider.get_model_info()
    assert (info and (info.id, info.context_window, info.max_output_tokens)) == limits


async def test_amp_window_that_is_too_large_is_told_once(amp_server, caplog):
    caplog.set_level(logging.INFO)
    host = await amp_mount(amp_server, context_window=10**6)
    await on_session_ready(host.coordinator)
    await host.provider.list_models()
    text = f"context_window=1000000 is more than the server's: {MAX_MODEL_LEN} counts"
    assert [record.getMessage() for record in caplog.records].count(text) == 1


async def test_amp_server_that_hangs_is_not_asked_for_its_models_again(amp_server, monkeypatch):
    monkeypatch.setattr(vllm_provider, "DISCOVERY_S", 0.2)
    amp_server.script(*[stall()] * 9, path="/v1/models")
    host = await amp_mount(amp_server, default_model=None, context_window=None)
    for _ in range(3):
        started = time.monotonic()
        assert (await amp_hello(host)).text == AMP_HELLO
        assert time.monotonic() - started < AMP_IN_TIME_S
        assert host.provider.get_model_info() is None
    assert amp_paths(amp_server).count("/v1/models") == 1
    monkeypatch.setattr(vllm_provider, "MODEL_RETRY_S", 0.0)  # a minute later
    await on_session_ready(host.coordinator)
    assert amp_paths(amp_server).count("/v1/models") == 2


async def test_amp_list_models(amp_server):
    amp_server.script(amp_models(AMP_BASE, AMP_LORA, {"id": "silent"}))
    models = await (await amp_mount(amp_server, context_window=None)).provider.list_models()
    assert all(isinstance(model, ModelInfo) for model in models)
    assert [(model.id, model.context_window) for model in models] == [
        ("base", 131072),
        ("lora", 131072),
        ("silent", 0),
    ]


@amp_cases(
    ("raw", "kind", "status"),
    {
        "wrong key": (reply(401, {"error": "Unauthorized"}), "AuthenticationError", 401),
        "busy": (reply(503, "busy", {"Retry-After": "99"}), "ProviderUnavailableError", 503),
        "not vLLM": (reply(200, "<html>", {"content-type": "text/html"}), "LLMError", None),
    },
)
async def test_amp_list_models_raises_the_kernels_errors(raw, kind, status, amp_server):
    host = await amp_mount(amp_server)
    amp_server.script(raw)
    with pytest.raises(llm_errors.LLMError) as caught:
        await host.provider.list_models()
    assert (type(caught.value).__name__, caught.value.status_code, caught.value.provider) == (
        kind,
        status,
        "vllm",
    )


def test_amp_parse_tool_calls():
    provider, calls = (
        VLLMProvider("http://a:1"),
        [KernelToolCall(id="call_1", name="f", arguments={"a": 1})],
    )
    assert provider.parse_tool_calls(ChatResponse(content=[], tool_calls=calls)) == calls
    assert provider.parse_tool_calls(ChatResponse(content=[TextBlock(text="Hi")])) == []


# ---- Amplifier: conversations to vLLM's messages ----------------------------

AMP_MISSING = (
    "[SYSTEM ERROR: Tool result missing from conversation history] The call may have run or not."
)
AMP_CALL_BLOCK = {
    "type": "tool_call",
    "id": "c1",
    "name": "get_weather",
    "input": {"city": "Paris"},
}
AMP_WIRE_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
AMP_CALLER = {"role": "assistant", "content": [AMP_CALL_BLOCK]}
AMP_WIRE_CALLER = {"role": "assistant", "content": "", "tool_calls": [AMP_WIRE_CALL]}
AMP_RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
AMP_WIRE_RESULT = AMP_RESULT | {"name": "get_weather"}
AMP_USER = {"role": "user", "content": "Hi"}
AMP_REPLY = {"role": "assistant", "content": "Hello!"}
AMP_ACKNOWLEDGED = {"role": "assistant", "content": "Result received."}
AMP_URL_IMAGE = {"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}
AMP_WIRE_URL_IMAGE = {"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}
AMP_IMAGE = {
    "type": "image",
    "source": {"type": "base64", "media_type": "image/jpeg", "data": "AAAA"},
}
AMP_WIRE_IMAGE = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}}


def amp_text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def amp_user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def amp_system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def amp_reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def amp_result_block(output: Any) -> dict[str, Any]:
    return {
        "role": "tool",
        "content": [{"type": "tool_result", "tool_call_id": "c1", "output": output}],
    }


def amp_calls(*entries: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(entries)}


AMP_MESSAGES = {
    "strings": ([amp_system("Be brief."), AMP_USER],) * 2,
    "developer, which templates do not know": ([amp_system("A", "developer")], [amp_system("A")]),
    "blocks of text, also in a system message": (
        [
            {"role": role, "content": [amp_text("A"), amp_text("B")]}
            for role in ("system", "user", "assistant")
        ],
        [{"role": role, "content": "A\nB"} for role in ("system", "user", "assistant")],
    ),
    "no block": ([amp_user([])], [amp_user("")]),
    "a name, and metadata that is ours": (
        [AMP_USER | {"name": "ann", "metadata": {"a": 1}}],
        [AMP_USER | {"name": "ann"}],
    ),
    "images, base64 and URL": (
        [amp_user([amp_text("Compare."), AMP_IMAGE, AMP_URL_IMAGE])],
        [amp_user([amp_text("Compare."), AMP_WIRE_IMAGE, AMP_WIRE_URL_IMAGE])],
    ),
    "thinking goes back as reasoning": (
        [
            AMP_USER,
            AMP_REPLY
            | {
                "content": [
                    {"type": "thinking", "thinking": "A greeting.", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    amp_text("Hello!"),
                ]
            },
        ],
        [AMP_USER, AMP_REPLY | {"reasoning": "A greeting."}],
    ),
    "a call as a block": ([AMP_CALLER, AMP_RESULT], [AMP_WIRE_CALLER, AMP_WIRE_RESULT]),
    **{
        f"a call as a field: {name}": (
            [amp_calls(entry), AMP_RESULT],
            [AMP_WIRE_CALLER, AMP_WIRE_RESULT],
        )
        for name, entry in {
            "tool": {"id": "c1", "tool": "get_weather", "arguments": {"city": "Paris"}},
            "name": {"id": "c1", "name": "get_weather", "arguments": {"city": "Paris"}},
            "function": AMP_WIRE_CALL,
            "the kernel's": KernelToolCall(
                id="c1", name="get_weather", arguments={"city": "Paris"}
            ),
        }.items()
    },
    "calls that come twice": (
        [
            amp_calls(
                {"id": "c1", "tool": "get_weather", "arguments": {"city": "Paris"}},
                {"id": "c2", "tool": "add", "arguments": {"a": 1}},
            )
            | {"content": [amp_text("Wait."), AMP_CALL_BLOCK]},
            AMP_RESULT,
            {"role": "tool", "tool_call_id": "c2", "name": "add", "content": [amp_text("2")]},
        ],
        [
            {
                "role": "assistant",
                "content": "Wait.",
                "tool_calls": [
                    AMP_WIRE_CALL,
                    {
                        "id": "c2",
                        "type": "function",
                        "function": {"name": "add", "arguments": '{"a": 1}'},
                    },
                ],
            },
            AMP_WIRE_RESULT,
            {"role": "tool", "tool_call_id": "c2", "content": "2", "name": "add"},
        ],
    ),
    **{
        f"a result as a block: {name}": (
            [AMP_CALLER, amp_result_block(output)],
            [AMP_WIRE_CALLER, AMP_WIRE_RESULT | {"content": content}],
        )
        for name, (output, content) in {
            "a text": ("sunny", "sunny"),
            "an object": ({"t": 21, "u": "C"}, '{"t": 21, "u": "C"}'),
            "other letters, which the model is to read": ({"city": "東京"}, '{"city": "東京"}'),
            "a list, which is no list of parts": (["a", {"b": 2}], '["a", {"b": 2}]'),
            "nothing": (None, "null"),
        }.items()
    },
    "a result in the user's message comes before the text": (
        [AMP_CALLER, amp_user([*amp_result_block("sunny")["content"], amp_text("And Rome?")])],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, amp_user("And Rome?")],
    ),
    "a result with an image, which is no text to read": (
        [AMP_CALLER, AMP_RESULT | {"content": [amp_text("sunny"), AMP_IMAGE]}],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT | {"content": [amp_text("sunny"), AMP_WIRE_IMAGE]}],
    ),
    "a lone surrogate that the model wrote as an escape": (
        [
            {"role": "assistant", "content": [AMP_CALL_BLOCK | {"input": {"city": "\ud83d"}}]},
            AMP_RESULT,
        ],
        [
            amp_calls(
                AMP_WIRE_CALL
                | {"function": {"name": "get_weather", "arguments": '{"city": "\\ud83d"}'}}
            ),
            AMP_WIRE_RESULT,
        ],
    ),
    "function, the old name of the role": (
        [AMP_CALLER, AMP_RESULT | {"role": "function", "name": "get_weather"}],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT],
    ),
    "system messages at the beginning are one": (
        [amp_system("A"), amp_system([amp_text("B")], "developer"), amp_system(""), AMP_USER],
        [amp_system("A\n\nB"), AMP_USER],
    ),
    "a later one joins the user message before it": (
        [AMP_USER, amp_system("A"), amp_system("B", "developer"), AMP_REPLY],
        [amp_user(f"Hi\n\n{amp_reminder('A')}\n\n{amp_reminder('B')}"), AMP_REPLY],
    ),
    "or the one after it": (
        [AMP_USER, AMP_REPLY, amp_system("A"), amp_user("Bye")],
        [AMP_USER, AMP_REPLY, amp_user(f"{amp_reminder('A')}\n\nBye")],
    ),
    "or is one": (
        [AMP_USER, AMP_REPLY, amp_system("A"), AMP_REPLY],
        [AMP_USER, AMP_REPLY, amp_user(amp_reminder("A")), AMP_REPLY],
    ),
    "one that has its tags keeps them": (
        [AMP_USER, amp_system('<system-reminder source="x">A</system-reminder>')],
        [amp_user('Hi\n\n<system-reminder source="x">A</system-reminder>')],
    ),
    "one beside an image": (
        [amp_user([AMP_IMAGE]), amp_system("A")],
        [amp_user([AMP_WIRE_IMAGE, amp_text(amp_reminder("A"))])],
    ),
    "one between a call and its result": (
        [AMP_CALLER, amp_system("A"), AMP_RESULT],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, amp_user(amp_reminder("A"))],
    ),
    "a result directly followed by the user": (
        [AMP_CALLER, AMP_RESULT, AMP_USER],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, AMP_USER],
    ),
    "a result without its call becomes text": (
        [AMP_USER, AMP_RESULT, AMP_REPLY],
        [
            amp_user("Hi\n\n[Result of the tool call c1, which is not in the history]\n\nsunny"),
            AMP_REPLY,
        ],
    ),
    "ids that repeat": (
        [AMP_CALLER, AMP_RESULT | {"content": "1"}, AMP_CALLER, AMP_RESULT | {"content": "2"}],
        [
            AMP_WIRE_CALLER,
            AMP_WIRE_RESULT | {"content": "1"},
            AMP_WIRE_CALLER,
            AMP_WIRE_RESULT | {"content": "2"},
        ],
    ),
    "ids that repeat, a result missing in between": (
        [AMP_CALLER, AMP_REPLY, AMP_CALLER, AMP_RESULT],
        [
            AMP_WIRE_CALLER,
            AMP_WIRE_RESULT | {"content": AMP_MISSING},
            AMP_REPLY,
            AMP_WIRE_CALLER,
            AMP_WIRE_RESULT,
        ],
    ),
    "a result that comes twice": (
        [AMP_CALLER, AMP_RESULT, AMP_RESULT],
        [
            *(AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED),
            amp_user("[Result of the tool call c1, which is not in the history]\n\nsunny"),
        ],
    ),
}


@amp_cases(("messages", "wire"), AMP_MESSAGES)
async def test_amp_messages_as_the_server_gets_them(messages, wire, amp_server):
    host = await amp_mount(amp_server, use_completions=False)
    request = ChatRequest(messages=[Message(**message) for message in messages])
    before = request.model_dump()
    await host.provider.complete(request)
    assert amp_bodies(amp_server) == [
        {
            "model": MODEL,
            "messages": wire,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert request.model_dump() == before
    assert amp_paths(amp_server) == ["/v1/chat/completions"]


AMP_ORPHANS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": [AMP_CALL_BLOCK],
        "tool_calls": [{"id": "c2", "tool": "add", "arguments": {"a": 1}}],
    },
    {"role": "tool", "tool_call_id": "c2", "content": "2"},
    {"role": "user", "content": "Hello"},
]


async def test_amp_orphaned_calls_are_repaired_always_and_announced_once(amp_server):
    host = await amp_mount(amp_server, use_completions=False)
    request = ChatRequest(messages=[Message(**message) for message in AMP_ORPHANS])
    before = request.model_dump()
    for _ in range(2):
        await host.provider.complete(request)
    assert request.model_dump() == before
    first, second = (body["messages"] for body in amp_bodies(amp_server))
    assert first == second
    assert [(one["role"], one.get("tool_call_id")) for one in first] == [
        *(
            ("user", None),
            ("assistant", None),
            ("tool", "c1"),
            ("tool", "c2"),
            ("assistant", None),
            ("user", None),
        )
    ]
    assert first[2]["name"] == "get_weather"
    assert first[2]["content"] == AMP_MISSING
    assert first[3] == {"role": "tool", "tool_call_id": "c2", "content": "2", "name": "add"}
    repaired = {
        "provider": "vllm",
        "repair_count": 1,
        "repairs": [{"tool_call_id": "c1", "tool_name": "get_weather"}],
    }
    assert host.payloads("provider:tool_sequence_repaired") == [repaired]
    assert host.names()[0] == "provider:tool_sequence_repaired"


# ---- Amplifier: every field and every keyword -------------------------------


AMP_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def amp_schema_format(**fields: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {**fields, "schema": AMP_SCHEMA}}
    }


def amp_switches(**switches: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": {"thinking": False, **switches}}


AMP_ALL_SETTINGS = {
    "temperature": 0.1,
    "max_tokens": 1,
    "stop": "A",
    "reasoning_effort": "high",
    "logprobs": 1,
}
AMP_OURS_ALONE = {"stream": False, "conversation_id": "c", "metadata": {"a": 1}, "timeout": 60.0}
AMP_FIELDS: dict[
    str, tuple[Any, ...]
] = {  # configuration, fields of the request, keywords, what they add to the body
    "nothing": ({}, {}, {}, {}),
    "temperature 0 is a value": ({}, {"temperature": 0.0}, {}, {"temperature": 0.0}),
    "top_p": ({}, {"top_p": 0.5}, {}, {"top_p": 0.5}),
    "max_output_tokens": ({}, {"max_output_tokens": 9}, {}, {"max_tokens": 9}),
    "stop": ({}, {"stop": ["X"]}, {}, {"stop": ["X"]}),
    "model": ({}, {"model": MODEL}, {}, {}),
    "reasoning_effort": ({}, {"reasoning_effort": "low"}, {}, {"reasoning_effort": "low"}),
    "Microsoft's name of it as a setting": (
        {"reasoning": "low"},
        {},
        {},
        {"reasoning_effort": "low"},
    ),
    "and as a keyword": (
        {"reasoning": "low"},
        {},
        {"reasoning": "high"},
        {"reasoning_effort": "high"},
    ),
    "ours alone": ({}, AMP_OURS_ALONE, {}, {}),
    "ours as keywords": ({}, {}, AMP_OURS_ALONE, {}),
    "extras of the request": ({}, {"top_k": 5, "seed": 1}, {}, {"top_k": 5, "seed": 1}),
    "logprobs as an extra": ({}, {"logprobs": 2}, {}, {"logprobs": True, "top_logprobs": 2}),
    "tools": ({}, {"tools": [AMP_TOOL]}, {}, {"tools": [AMP_WIRE_TOOL]}),
    "tools as dicts": ({}, {}, {"tools": [AMP_WIRE_TOOL["function"]]}, {"tools": [AMP_WIRE_TOOL]}),
    "tools as vLLM has them": ({}, {}, {"tools": [AMP_WIRE_TOOL]}, {"tools": [AMP_WIRE_TOOL]}),
    "an empty list of tools is a 400": ({}, {"tools": []}, {}, {}),
    "a tool's extras": (
        *({}, {"tools": [ToolSpec(name="f", parameters={}, strict=True)]}, {}),
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}
            ]
        },
    ),
    "tool_choice": (
        *({}, {"tools": [AMP_TOOL], "tool_choice": "required"}, {}),
        {"tools": [AMP_WIRE_TOOL], "tool_choice": "required"},
    ),
    "tool_choice without tools is a 400": ({}, {"tool_choice": "auto"}, {}, {}),
    "format text": ({}, {"response_format": ResponseFormatText()}, {}, {}),
    "format json": (
        {},
        {"response_format": ResponseFormatJson()},
        {},
        {"response_format": {"type": "json_object"}},
    ),
    "format json_schema, bare": (
        *(
            {},
            {"response_format": ResponseFormatJsonSchema(json_schema=AMP_SCHEMA, strict=True)},
            {},
        ),
        amp_schema_format(name="response", strict=True),
    ),
    "format json_schema, with its name around it": (
        {},
        {
            "response_format": ResponseFormatJsonSchema(
                json_schema={"name": "answer", "schema": AMP_SCHEMA}
            )
        },
        {},
        amp_schema_format(name="answer"),
    ),
    "keywords": ({}, {}, {"temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_k": 3}),
    "the kernel's name as a keyword": ({}, {}, {"max_output_tokens": 4}, {"max_tokens": 4}),
    "thinking is the template's default": ({}, {}, {"extended_thinking": True}, {}),
    **{
        f"thinking off: {value!r}": (
            {},
            {},
            {"extended_thinking": value},
            amp_switches(enable_thinking=False),
        )
        for value in (False, "false")
    },
    "thinking off, but the template is told otherwise": (
        *(
            {},
            {"chat_template_kwargs": {"enable_thinking": True, "a": 1}},
            {"extended_thinking": False},
        ),
        amp_switches(enable_thinking=True, a=1),
    ),
    "the configuration's": (
        AMP_ALL_SETTINGS,
        {},
        {},
        AMP_ALL_SETTINGS | {"logprobs": True, "top_logprobs": 1},
    ),
    "configuration < request < keyword": (
        AMP_ALL_SETTINGS,
        {"temperature": 0.2, "max_output_tokens": 2, "stop": ["B"], "reasoning_effort": "low"},
        {"temperature": 0.3, "logprobs": 3},
        {"temperature": 0.3, "max_tokens": 2, "stop": ["B"], "reasoning_effort": "low"}
        | {"logprobs": True, "top_logprobs": 3},
    ),
    "None is not given": (
        {"temperature": 0.1},
        {"temperature": 0.2},
        {"temperature": None},
        {"temperature": 0.2},
    ),
    "vLLM's name as a keyword wins": (
        {},
        {"max_output_tokens": 10},
        {"max_tokens": 5},
        {"max_tokens": 5},
    ),
    "and the newer one too": (
        {},
        {"max_output_tokens": 10},
        {"max_completion_tokens": 5},
        {"max_completion_tokens": 5},
    ),
    "extra_body comes last": ({"extra_body": {"top_k": 9}}, {"top_k": 5}, {}, {"top_k": 9}),
}


@amp_cases(("config", "fields", "keywords", "added"), AMP_FIELDS)
async def test_amp_fields_as_the_server_gets_them(config, fields, keywords, added, amp_server):
    host = await amp_mount(amp_server, use_completions=False, **config)
    await host.provider.complete(amp_ask("Hello", **fields), **keywords)
    wire = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    assert amp_bodies(amp_server) == [wire | {"stream_options": {"include_usage": True}} | added]


async def test_amp_model_of_the_call_is_sent_and_told(amp_server):
    amp_server.script(amp_chat({"content": "A"}), amp_chat({"content": "B"}))
    host = await amp_mount(amp_server, use_completions=False)
    await host.provider.complete(amp_ask("Hello", model="of-the-request"))
    await host.provider.complete(amp_ask("Hello", model="of-the-request"), model="of-the-keyword")
    wanted = ["of-the-request", "of-the-keyword"]
    assert [body["model"] for body in amp_bodies(amp_server)] == wanted
    assert [payload["model"] for payload in host.payloads("llm:request")] == wanted
    assert [payload["model"] for payload in host.payloads("llm:response")] == wanted


async def test_amp_timeout_of_the_request_is_the_calls(amp_server):
    amp_server.script(stall())
    host = await amp_mount(amp_server, use_completions=False, max_retries=0)
    started = time.monotonic()
    with pytest.raises(llm_errors.LLMTimeoutError, match=r"^no reply within 0\.2 s: "):
        await host.provider.complete(amp_ask("Hello", timeout=0.2))
    assert time.monotonic() - started < AMP_IN_TIME_S
    assert "timeout" not in amp_bodies(amp_server)[0]
    await amp_is_quiet(amp_server, gone=1)


async def test_amp_deadline_counts_retries_and_their_pauses(amp_server):
    amp_server.script(*[reply(503, "busy", {"Retry-After": "10"})] * 4)
    host = await amp_mount(amp_server, use_completions=False)
    started = time.monotonic()
    with pytest.raises(llm_errors.LLMTimeoutError, match=r"deadline"):
        await amp_hello(host, deadline=0.3)
    assert time.monotonic() - started < AMP_IN_TIME_S


async def test_amp_deadline_counts_questions_on_the_side(amp_server):
    amp_server.script(*[stall()] * 4)
    host = await amp_mount(amp_server, default_model=None, context_window=None)
    started = time.monotonic()
    with pytest.raises(llm_errors.LLMTimeoutError):
        await amp_hello(host, deadline=0.3)
    assert time.monotonic() - started < AMP_IN_TIME_S


@amp_cases(
    ("config", "keywords"),
    {
        "keyword": ({}, {"prompt_logprobs": 1}),
        "extra_body of the call": ({}, {"extra_body": {"prompt_logprobs": 1}}),
        "extra_body of the configuration": ({"extra_body": {"prompt_logprobs": 1}}, {}),
    },
)
async def test_amp_what_vllm_does_not_stream_is_not_streamed(config, keywords, amp_server):
    host = await amp_mount(amp_server, use_completions=False, **config)
    response = await amp_hello(host, **keywords)
    [body] = amp_bodies(amp_server)
    assert body["prompt_logprobs"] == 1
    assert "stream" not in body
    assert "stream_options" not in body
    assert response.text == AMP_HELLO
    assert "llm:stream_block_delta" in host.names()


@pytest.mark.parametrize("value", [False, "false", True, "true"])
async def test_amp_use_completions_is_also_a_keyword(value, amp_server):
    is_used = str(value).lower() == "true"
    host = await amp_mount(amp_server, use_completions=not is_used)
    await amp_hello(host, use_completions=value)
    assert amp_paths(amp_server)[-1] == ("/v1/completions" if is_used else "/v1/chat/completions")
    assert "use_completions" not in amp_bodies(amp_server)[0]


async def test_amp_reasoning_that_is_not_wanted_is_for_the_server_to_leave_out(amp_server):
    host = await amp_mount(amp_server)
    response = await amp_hello(host, include_reasoning=False)
    assert response.degradation.reason == "include_reasoning"
    assert amp_bodies(amp_server)[0]["include_reasoning"] is False


# ---- Amplifier: options carried through a session ---------------------------


async def test_amp_request_options_lie_between_configuration_and_request(amp_server):
    host = await amp_mount(amp_server, use_completions=False, temperature=0.1, seed=1)
    with request_options(temperature=0.2, top_p=0.2, max_output_tokens=2) as calls:
        await amp_hello(host)
        await host.provider.complete(amp_ask("Hello", top_p=0.3, max_output_tokens=3))
        await host.provider.complete(amp_ask("Hello", top_p=0.3, max_tokens=3), top_p=0.4)
    await amp_hello(host)
    names = ("temperature", "top_p", "max_tokens", "seed")
    assert [tuple(body.get(name) for name in names) for body in amp_bodies(amp_server)] == [
        *((0.2, 0.2, 2, 1), (0.2, 0.3, 3, 1), (0.2, 0.4, 3, 1), (0.1, None, None, 1))
    ]
    assert [type(call) for call in calls] == [Completion] * 3


async def test_amp_request_options_nest(amp_server):
    host = await amp_mount(amp_server, use_completions=False)
    with request_options(logprobs=1, seed=1) as outer:
        with request_options(logprobs=2) as inner:
            await amp_hello(host)
        await amp_hello(host)
    bodies = amp_bodies(amp_server)
    assert [(body["top_logprobs"], body["seed"]) for body in bodies] == [(2, 1), (1, 1)]
    assert (len(outer), len(inner)) == (2, 1)
    assert outer[0] is inner[0]


class AmpContext:
    """The smallest context manager the kernel accepts."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    async def add_message(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    async def get_messages_for_request(self, **_: Any) -> list[dict[str, Any]]:
        return list(self.messages)

    get_messages = get_messages_for_request

    async def set_messages(self, messages: list[dict[str, Any]]) -> None:
        self.messages = list(messages)

    async def clear(self) -> None:
        self.messages = []


class AmpLoop:
    """The smallest orchestrator: asks the provider, runs its calls, and asks again."""

    async def execute(
        self, prompt: str, context: Any, providers: Any, tools: Any, hooks: Any, **_: Any
    ) -> str:
        await context.add_message({"role": "user", "content": prompt})
        [provider] = providers.values()
        specs = [
            ToolSpec(name=tool.name, parameters=tool.input_schema) for tool in tools.values()
        ] or None
        for _round in range(3):
            messages = [Message(**message) for message in await context.get_messages_for_request()]
            response = await provider.complete(ChatRequest(messages=messages, tools=specs))
            calls = provider.parse_tool_calls(response)
            told = [
                {"id": call.id, "tool": call.name, "arguments": call.arguments} for call in calls
            ]
            content = [block.model_dump() for block in response.content]
            await context.add_message({"role": "assistant", "content": content, "tool_calls": told})
            for call in calls:
                result = await tools[call.name].execute(call.arguments)
                await context.add_message(
                    {"role": "tool", "tool_call_id": call.id, "content": result}
                )
            if not calls:
                return str(response.text)
        raise AssertionError("the model did not stop calling")


class AmpWeather:
    name, description, input_schema = "get_weather", "Get the weather of a city.", AMP_WEATHER

    async def execute(self, arguments: Mapping[str, Any]) -> str:
        return f"sunny in {arguments['city']}, 21 C"


@contextlib.asynccontextmanager
async def amp_session(
    monkeypatch: pytest.MonkeyPatch, url: str, *tools: Any, **instances: Any
) -> Any:
    """Yield a real session that has loaded the provider; `instances`: name and configuration."""

    def module(
        module_id: str, kind: str, point: str, make: Callable[[], Any], **named: Any
    ) -> None:
        async def mount_it(coordinator: Any, config: Any = None) -> None:
            await coordinator.mount(point, make(), **named)

        created = types.ModuleType(f"amplifier_module_{module_id}")
        created.__dict__.update(mount=mount_it, __amplifier_module_type__=kind)
        monkeypatch.setitem(sys.modules, created.__name__, created)

    module("context_tiny", "context", "context", AmpContext)
    module("loop_tiny", "orchestrator", "orchestrator", AmpLoop)
    for tool in tools:
        module("tool_tiny", "tool", "tools", tool, name=tool.name)
    plan = {
        "session": {"orchestrator": {"module": "loop-tiny"}, "context": {"module": "context-tiny"}},
        "providers": [
            {"module": "provider-vllm", "config": {"base_url": url, **config}}
            | ({} if name == "vllm" else {"instance_id": name})
            for name, config in (instances or {"vllm": {}}).items()
        ],
        "tools": [{"module": "tool-tiny"} for _ in tools],
    }
    session = AmplifierSession(plan)
    await session.initialize()
    try:
        yield session
    finally:
        await session.cleanup()
        await asyncio.sleep(
            0.01
        )  # a process that ends right after its last call into the kernel can crash there


async def test_amp_session_loads_it_finds_its_limits_and_answers(amp_server, monkeypatch):
    async with amp_session(monkeypatch, amp_server.url) as session:
        [(name, provider)] = session.coordinator.get("providers").items()
        assert (name, type(provider)) == ("vllm", VLLMProvider)
        assert provider.get_model_info().context_window == MAX_MODEL_LEN
        assert await session.execute("What is 2+2?") == "\n\n2 + 2 = 4"
    assert amp_paths(amp_server) == ["/v1/models", "/tokenize", "/v1/completions"]


class AmpInjectingLoop(AmpLoop):
    """An orchestrator whose hooks inject system messages, as the default bundle's do."""

    async def execute(self, prompt: str, context: Any, **options: Any) -> str:
        if not context.messages:
            await context.add_message(amp_system("You are a parrot."))
            await context.add_message(amp_system("Be brief.", "developer"))
        answer = await super().execute(prompt, context, **options)
        await context.add_message(amp_system("The user is in Rome."))
        return answer


@pytest.mark.parametrize("use_completions", [True, False], ids=["completions", "chat"])
async def test_amp_session_with_system_messages_on_a_strict_template(use_completions, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "AmpLoop", AmpInjectingLoop)
    with StandIn(strict=True) as server:
        async with amp_session(
            monkeypatch, server.url, vllm={"use_completions": use_completions}
        ) as session:
            answers = [await session.execute("What is 2+2?") for _ in range(2)]
        first, second = amp_bodies(server, "tokenize" if use_completions else "completions")
        prompts = [VLLMClient(server.url).tokenize(body["messages"]) for body in (first, second)]
        texts = [VLLMClient(server.url).detokenize(prompt) for prompt in prompts]
    assert all(answers)
    assert first["messages"] == [
        amp_system("You are a parrot.\n\nBe brief."),
        amp_user("What is 2+2?"),
    ]
    assert second["messages"][-1] == amp_user(
        f"{amp_reminder('The user is in Rome.')}\n\nWhat is 2+2?"
    )
    assert texts[1].startswith(texts[0])  # so that the server's prefix cache is used


AMP_STRICT = {
    "a late system message": [AMP_USER, amp_system("A"), AMP_USER],
    "a result without a call": [AMP_USER, AMP_RESULT, AMP_USER],
    "a result directly followed by the user": [AMP_USER, AMP_CALLER, AMP_RESULT, AMP_USER],
    "a late system message after a result": [AMP_USER, AMP_CALLER, AMP_RESULT, amp_system("A")],
    "ids that repeat": [
        AMP_USER,
        AMP_CALLER,
        AMP_RESULT,
        AMP_REPLY,
        AMP_USER,
        AMP_CALLER,
        AMP_USER,
    ],
    "a result that comes late": [AMP_USER, AMP_CALLER, AMP_USER, AMP_RESULT],
}


@amp_cases("messages", AMP_STRICT)
async def test_amp_history_suits_a_strict_template(messages):
    with StandIn(strict=True) as server:
        request = ChatRequest(messages=[Message(**message) for message in messages])
        provider = VLLMProvider(server.url, config={"use_completions": False})
        assert (await provider.complete(request)).finish_reason == "stop"
        sent = [
            (one["role"], one["role"] == "tool" or "tool_calls" in one)
            for one in amp_bodies(server)[0]["messages"]
        ]
    plain = [
        role for role, is_tool in sent if not is_tool
    ]  # Mistral's template counts these, which take turns
    assert plain == [("user", "assistant")[number % 2] for number in range(len(plain))]


async def test_amp_instances_of_a_session_ask_their_servers_once(amp_server, monkeypatch):
    with StandIn() as other:
        instances = {"a": {}, "b": {"base_url": other.url}}
        async with amp_session(monkeypatch, amp_server.url, **instances) as session:
            for _ in range(2):
                await on_session_ready(session.coordinator)
        assert (amp_paths(amp_server), amp_paths(other)) == (["/v1/models"], ["/v1/models"])


async def test_amp_session_with_several_instances(amp_server, monkeypatch):
    with StandIn() as other:
        slow = {
            "base_url": other.url,
            "priority": 200,
            "temperature": 0.5,
            "use_completions": False,
        }
        async with amp_session(monkeypatch, amp_server.url, fast={}, slow=slow) as session:
            providers = session.coordinator.get("providers")
            assert {name: provider.priority for name, provider in providers.items()} == {
                "fast": 100,
                "slow": 200,
            }
            for provider in providers.values():
                assert (await provider.complete(amp_ask("Hello"))).finish_reason == "stop"
    assert amp_paths(amp_server)[-2:] == ["/tokenize", "/v1/completions"]
    assert amp_paths(other)[-1] == "/v1/chat/completions"
    assert [body.get("temperature") for body in amp_bodies(amp_server) + amp_bodies(other)] == [
        None,
        0.5,
    ]


async def test_amp_session_runs_tools(amp_server, monkeypatch):
    async with amp_session(monkeypatch, amp_server.url, AmpWeather) as session:
        answer = await session.execute("What is the weather in Paris and Rome?")
    assert answer.strip() == "It is sunny in Paris, 21 C."
    _, second = amp_bodies(amp_server)
    roles = [message["role"] for message in second["messages"]]
    assert roles == ["user", "assistant", "tool", "tool"]
    told = [(one["content"], one["name"]) for one in second["messages"] if one["role"] == "tool"]
    assert told == [("sunny in Paris, 21 C", "get_weather"), ("sunny in Rome, 21 C", "get_weather")]
    assert len(second["messages"][1]["tool_calls"]) == 2
    assert second["messages"][1]["reasoning"].strip() == "Two calls."


async def test_amp_sessions_at_once_do_not_see_each_others_options(amp_server, monkeypatch):
    meet = threading.Barrier(2)

    def together(connection: Connection) -> None:
        meet.wait(AMP_SYNC_S)
        amp_server.answer(connection)

    async def run(session: AmplifierSession, count: int) -> list[Completion]:
        with request_options(logprobs=count) as calls:
            await session.execute(f"Say {count}")
        return calls

    async with (
        amp_session(monkeypatch, amp_server.url, vllm={"use_completions": False}) as first,
        amp_session(monkeypatch, amp_server.url, vllm={"use_completions": False}) as second,
    ):
        amp_server.script(*[together] * 2, path="/completions")
        [one], [three] = await asyncio.gather(run(first, 1), run(second, 3))
    told = sorted(
        (body["messages"][0]["content"], body["top_logprobs"]) for body in amp_bodies(amp_server)
    )
    assert told == [("Say 1", 1), ("Say 3", 3)]
    assert [len(token.top) for token in (one.logprobs[0], three.logprobs[0])] == [1, 3]


@amp_cases("use_completions", {"completions": True, "chat": False})
async def test_amp_log_probabilities_reach_the_caller(use_completions, amp_server):
    host = await amp_mount(amp_server, use_completions=use_completions)
    with request_options(logprobs=2) as calls:
        response = await host.provider.complete(amp_ask("What is 2+2?"))
    [call] = calls
    text = "<think>\nTwo plus two equals four.\n</think>\n\n2 + 2 = 4<|im_end|>"
    assert "".join(token.token for token in call.logprobs) == text
    assert all(token.logprob is not None and len(token.top) == 2 for token in call.logprobs)
    assert (call.text, call.reasoning) == ("\n\n2 + 2 = 4", "\nTwo plus two equals four.\n")
    assert response.metadata is None  # what is there counts towards the context


# ---- Amplifier: responses ---------------------------------------------------


async def test_amp_response_of_text_and_thinking(amp_server):
    usage = {
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    deltas = [
        {"reasoning": "Two"},
        {"reasoning": " four."},
        {"content": "2 + 2"},
        {"content": " = 4"},
    ]
    last = amp_choice({}, finish_reason="stop")
    amp_server.script(sse(*map(amp_choice, deltas), last, amp_usage(5, 7, **usage)))
    response = await (await amp_mount(amp_server, use_completions=False)).provider.complete(
        amp_ask("What is 2+2?")
    )
    assert response == ChatResponse(
        content=[ThinkingBlock(thinking="Two four."), TextBlock(text="2 + 2 = 4")],
        usage=KernelUsage(
            input_tokens=5,
            output_tokens=7,
            total_tokens=12,
            reasoning_tokens=2,
            cache_read_tokens=3,
        ),
        finish_reason="stop",
        content_blocks=[ThinkingContent(text="Two four."), TextContent(text="2 + 2 = 4")],
        text="2 + 2 = 4",
    )


async def test_amp_response_of_tool_calls(amp_server):
    calls = [amp_call('{"city": "Paris"}'), amp_call("{}", "list_cities", "call_2", 1)]
    amp_server.script(amp_chat({"content": "Wait."}, *calls))
    host = await amp_mount(amp_server, use_completions=False)
    response = await host.provider.complete(amp_ask("Hello", tools=[AMP_TOOL]))
    assert response == ChatResponse(
        content=[
            TextBlock(text="Wait."),
            ToolCallBlock(id="call_1", name="get_weather", input={"city": "Paris"}),
            ToolCallBlock(id="call_2", name="list_cities", input={}),
        ],
        tool_calls=[
            KernelToolCall(id="call_1", name="get_weather", arguments={"city": "Paris"}),
            KernelToolCall(id="call_2", name="list_cities", arguments={}),
        ],
        usage=KernelUsage(input_tokens=5, output_tokens=7, total_tokens=12),
        finish_reason="tool_calls",  # the server said stop
        content_blocks=[
            TextContent(text="Wait."),
            ToolCallContent(id="call_1", name="get_weather", arguments={"city": "Paris"}),
            ToolCallContent(id="call_2", name="list_cities", arguments={}),
        ],
        text="Wait.",
    )
    assert host.provider.parse_tool_calls(response) == response.tool_calls


@amp_cases(
    ("raw", "content", "finish"),
    {
        "no output is an empty text": (amp_chat(), [TextBlock(text="")], "stop"),
        "cut": (amp_chat({"content": "A"}, finish="length"), [TextBlock(text="A")], "length"),
        "no finish reason, no usage": (
            sse(amp_choice({"content": "A"})),
            [TextBlock(text="A")],
            "stop",
        ),
        "thinking alone": (
            amp_chat({"reasoning_content": "Hm."}),
            [ThinkingBlock(thinking="Hm."), TextBlock(text="")],
            "stop",
        ),
    },
)
async def test_amp_content_is_never_empty_and_always_finished(raw, content, finish, amp_server):
    amp_server.script(raw)
    response = await (await amp_mount(amp_server, use_completions=False)).provider.complete(
        amp_ask("Hello")
    )
    assert (response.content, response.finish_reason) == (content, finish)
    assert len(response.content_blocks) == len(content)
    assert isinstance(response.usage, KernelUsage)


async def test_amp_calls_without_an_id_get_different_ones(amp_server):
    amp_server.script(
        amp_chat(amp_call('{"a": 1}', call_id=""), amp_call('{"a": 2}', call_id="", index=1))
    )
    host = await amp_mount(amp_server, use_completions=False)
    response = await host.provider.complete(amp_ask("Hello", tools=[AMP_TOOL]))
    assert host.names().count("llm:stream_block_start") == 2
    ids = [call.id for call in response.tool_calls]
    assert len({*ids, ""}) == 3
    assert [block.id for block in response.content] == ids


AMP_MALFORMED = {
    "cut": ('{"city": "Par', "Unterminated string starting at: line 1 column 10 (char 9)"),
    "a list": ('["Paris"]', "a list is not an object"),
    "nothing at all": ("", "Expecting value: line 1 column 1 (char 0)"),
    "not JSON, and more than events can hold": ('{"city": NaN}', "NaN is not JSON"),
}


@amp_cases(("arguments", "reason"), AMP_MALFORMED)
async def test_amp_malformed_call_is_asked_for_again(arguments, reason, amp_server):
    malformed = amp_call(arguments, call_id="call_2", index=1)
    amp_server.script(
        amp_chat({"content": "Wait."}, amp_call('{"city": "Rome"}'), malformed),
        amp_chat(amp_call('{"city": "Paris"}')),
    )
    host = await amp_mount(amp_server, use_completions=False, raw=True, debug=True)
    response = await host.provider.complete(amp_ask("Hello", tools=[AMP_TOOL]))
    assert [call.arguments for call in response.tool_calls] == [{"city": "Paris"}]
    first, second = amp_bodies(amp_server)
    assert second == first | {"messages": [*first["messages"], *second["messages"][1:]]}
    assert second["messages"][1:] == [
        AMP_REPLY
        | {"content": f'Wait.\nget_weather({{"city": "Rome"}})\nget_weather({arguments})'},
        amp_user(
            amp_reminder(f"No tool was run: {reason}. Call again; arguments are one JSON object.")
        ),
    ]
    [retry], [result] = host.payloads("provider:retry"), host.payloads("llm:response")
    assert (retry["error_type"], retry["attempt"], retry["delay"]) == (
        "InvalidToolCallError",
        1,
        0.0,
    )
    assert host.names().count("llm:stream_aborted") == 1
    assert [name for name in host.names() if name.endswith(":debug")] == [
        *["llm:request:debug"] * 2,
        *["llm:response:debug"] * 2,
    ]
    assert (result["status"], result["retries"]) == ("ok", 1)
    assert result["usage"] == {"input_tokens": 10, "output_tokens": 14, "cost_usd": None}
    [failed] = result["failed_replies"]
    assert (failed["type"], failed["msg"]) == ("InvalidToolCallError", retry["error_message"])
    assert failed["usage"] == {"input_tokens": 5, "output_tokens": 7, "cost_usd": None}
    assert failed["raw"]["choices"][0]["tool_calls"][1]["arguments"] == arguments
    assert result["raw"]["choices"][0]["tool_calls"][0]["arguments"] == '{"city": "Paris"}'
    ids = [request.headers["X-Request-Id"] for request in amp_server.requests]
    assert ids == [f"{retry['request_id']}-{number}" for number in (1, 2)]


AMP_HOPELESS: dict[str, tuple[Any, ...]] = {  # finish reasons of the replies, settings
    "malformed again": (["tool_calls", "tool_calls"], {}),
    "cut by max_tokens": (["length"], {}),
    "cut by max_tokens, which vLLM up to 0.30 does not say": (["tool_calls"], {"max_tokens": 7}),
    "no retries": (["tool_calls"], {"max_retries": 0}),
}


@amp_cases(("finish", "config"), AMP_HOPELESS)
async def test_amp_malformed_call_is_never_executed(finish, config, amp_server):
    amp_server.script(
        *[amp_chat({"content": "A"}, amp_call('{"ci'), finish=reason) for reason in finish]
    )
    host = await amp_mount(amp_server, use_completions=False, raw=True, raw_debug=True, **config)
    with pytest.raises(llm_errors.InvalidToolCallError) as caught:
        await host.provider.complete(amp_ask("Hello", tools=[AMP_TOOL]))
    assert (caught.value.tool_name, caught.value.raw_arguments) == ("get_weather", '{"ci')
    assert (caught.value.retryable, caught.value.provider, caught.value.model) == (
        False,
        "vllm",
        MODEL,
    )
    assert len(amp_bodies(amp_server)) == len(finish)
    error = {"type": "InvalidToolCallError", "msg": str(caught.value)}
    name, result = host.events[-1]
    assert host.payloads("llm:stream_aborted")[-1]["error"] == error
    assert (name, result["error_type"], result["error"]) == (
        "llm:response",
        error["type"],
        error["msg"],
    )
    assert (result["finish_reason"], result["retries"]) == (finish[-1], len(finish) - 1)
    count = len(finish)
    assert result["usage"] == {
        "input_tokens": 5 * count,
        "output_tokens": 7 * count,
        "cost_usd": None,
    }
    raws = [payload["response"] for payload in host.payloads("llm:response:raw")]
    assert [failed["raw"] for failed in result["failed_replies"]] == raws
    assert [raw["choices"][0]["tool_calls"][0]["arguments"] for raw in raws] == ['{"ci'] * count


AMP_NESTED = {
    "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "array"}}}},
    "properties": {
        "object": {
            "type": "object",
            "properties": {"list": {"type": "array", "items": {"type": "object"}}},
        },
        "list": {"type": ["array", "null"]},
        "point": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
        "text": {"type": "string"},
        "either": {"anyOf": [{"type": "object"}, {"type": "string"}]},
        "any": {},
    },
}
AMP_NESTED_ARGUMENTS = {
    "an object": ({"object": '{"a": 1}'}, {"object": {"a": 1}}),
    "a list": ({"list": "[1]"}, {"list": [1]}),
    "no deeper than the schema": ({"object": '{"a": "[1]"}'}, {"object": {"a": "[1]"}}),
    "as deep as the schema": (
        {"object": '{"list": "[\\"{}\\", {}]"}'},
        {"object": {"list": [{}, {}]}},
    ),
    "a reference": ({"point": '{"x": "[1]"}'}, {"point": {"x": [1]}}),
    "a string": ({"text": "[1]"}, {"text": "[1]"}),
    "a string or an object": ({"either": "{}"}, {"either": "{}"}),
    "no type": ({"any": "[1]", "other": "[1]"}, {"any": "[1]", "other": "[1]"}),
    "another type": ({"object": "[1]", "list": "null"}, {"object": "[1]", "list": "null"}),
    "does not parse": (
        {"object": '{"a": ', "list": "[NaN]"},
        {"object": '{"a": ', "list": "[NaN]"},
    ),
}


@amp_cases(("written", "parsed"), AMP_NESTED_ARGUMENTS)
async def test_amp_strings_in_arguments_are_parsed_where_the_schema_says(
    written, parsed, amp_server
):
    amp_server.script(amp_chat(amp_call(json.dumps(written), "f")))
    host = await amp_mount(amp_server)
    response = await host.provider.complete(
        amp_ask("Hello", tools=[ToolSpec(name="f", parameters=AMP_NESTED)])
    )
    assert [call.arguments for call in response.tool_calls] == [parsed]
    assert [block.input for block in response.content] == [parsed]


async def test_amp_gpt_oss_call_that_the_server_dropped_is_an_error(amp_server):
    amp_server.script(*[amp_chat({"reasoning": "I need the tool."}, stop_reason=200012)] * 2)
    host = await amp_mount(amp_server, use_completions=False)
    with pytest.raises(llm_errors.InvalidRequestError) as caught:
        await host.provider.complete(amp_ask("Weather?", tools=[AMP_TOOL]))
    assert str(caught.value) == (
        "gpt-oss called a tool and the server dropped the call; start vLLM with"
        " --enable-auto-tool-choice --tool-call-parser openai"
    )
    assert (
        await host.provider.complete(amp_ask("Weather?"))
    ).finish_reason == "stop"  # no tools were offered


# ---- Amplifier: events ------------------------------------------------------

AMP_NO_USAGE = {"input_tokens": 0, "output_tokens": 0, "cost_usd": None}


def amp_request_event(**more: Any) -> tuple[str, dict[str, Any]]:
    return "llm:request", {
        "provider": "vllm",
        "model": MODEL,
        "message_count": 1,
        "request_id": "ID",
        **more,
    }


def amp_response_event(**more: Any) -> tuple[str, dict[str, Any]]:
    event = {
        "provider": "vllm",
        "model": MODEL,
        "request_id": "ID",
        "status": "ok",
        "duration_ms": 0,
        "retries": 0,
    }
    usage = {"input_tokens": 5, "output_tokens": 7, "cost_usd": None}
    return "llm:response", {**event, "usage": usage, "finish_reason": "stop", **more}


def amp_failed_event(error_type: str, error: str, **more: Any) -> tuple[str, dict[str, Any]]:
    failure = {"status": "error", "usage": AMP_NO_USAGE, "finish_reason": None}
    return amp_response_event(**failure, error_type=error_type, error=error, **more)


def amp_block(what: str, index: int, kind: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return f"llm:stream_block_{what}", {
        "request_id": "ID",
        "block_index": index,
        "block_type": kind,
        **more,
    }


def amp_merged(events: Sequence[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """Return the events with the deltas of each run joined; checks how they are numbered."""
    merged: list[tuple[str, dict[str, Any]]] = []
    sequence = 0
    for name, payload in events:
        if name != "llm:stream_block_delta":
            merged.append((name, payload))
            continue
        assert payload["text"]
        is_next = merged[-1][0] == name
        sequence = sequence + 1 if is_next else 0
        assert payload["sequence"] == sequence
        if is_next:
            merged[-1][1]["text"] += payload["text"]
        else:
            merged.append((name, dict(payload)))
    return merged


async def test_amp_events_of_a_success(amp_server):
    deltas = [{"reasoning": "Two"}, {"reasoning": " calls."}, {"content": "Wait"}, {"content": "."}]
    calls = [
        amp_call('{"city": '),
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
    ]
    amp_server.script(
        amp_chat(*deltas, *calls, amp_call("{}", "add", "call_2", 1), {"content": "Done."})
    )
    host = await amp_mount(amp_server, use_completions=False)
    await host.provider.complete(amp_ask("Hello", tools=[AMP_TOOL]))
    assert amp_merged(host.told()) == [
        amp_request_event(),
        amp_block("start", 0, "thinking"),
        amp_block("delta", 0, "thinking", sequence=0, text="Two calls."),
        amp_block("end", 0, "thinking"),
        amp_block("start", 1, "text"),
        amp_block("delta", 1, "text", sequence=0, text="Wait."),
        amp_block("end", 1, "text"),
        amp_block("start", 2, "tool_use", name="get_weather"),
        amp_block("end", 2, "tool_use"),
        amp_block("start", 3, "tool_use", name="add"),
        amp_block("end", 3, "tool_use"),
        amp_block("start", 4, "text"),
        amp_block("delta", 4, "text", sequence=0, text="Done."),
        amp_block("end", 4, "text"),
        amp_response_event(finish_reason="tool_calls"),
    ]


AMP_BLOCKS: dict[str, tuple[Any, ...]] = {  # deltas, and the blocks they make
    "text after a call": (
        [{"reasoning": "R"}, {"content": "A"}, amp_call("{}"), {"content": "B"}],
        ["thinking R", "text A", "tool_call call_1", "text B"],
    ),
    "pieces of two calls in turn": (
        [
            amp_call('{"city": ', call_id="a"),
            amp_call('{"city": ', call_id="b", index=1),
            *({"tool_calls": [{"index": i, "function": {"arguments": '"P"}'}}]} for i in (0, 1)),
        ],
        ["tool_call a", "tool_call b"],
    ),
    "text between the pieces of a call": (
        [
            amp_call("{"),
            {"content": "A"},
            {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]},
            {"content": "B"},
        ],
        ["tool_call call_1", "text AB"],
    ),
    "an id that comes late": (
        [amp_call("{", call_id=""), amp_call("}", call_id="a"), {"content": "A"}],
        ["tool_call a", "text A"],
    ),
    "thinking twice": (
        [
            {"reasoning": "R"},
            {"content": "A"},
            {"reasoning": "S"},
            {"reasoning": "T"},
            {"content": "B"},
        ],
        ["thinking R", "text A", "thinking ST", "text B"],
    ),
    "all in one delta": (
        [{"content": "A", "reasoning": "R", **amp_call("{}")}],
        ["thinking R", "text A", "tool_call call_1"],
    ),
}


@pytest.mark.parametrize("is_shown", [True, False], ids=["shown", "not shown"])
@amp_cases(("deltas", "wanted"), AMP_BLOCKS)
async def test_amp_blocks_streamed_are_the_blocks_returned(deltas, wanted, is_shown, amp_server):
    amp_server.script(amp_chat(*deltas))
    host = await amp_mount(amp_server, use_completions=False, use_streaming=is_shown)
    response = await host.provider.complete(amp_ask("Hello", tools=[AMP_TOOL]))
    blocks = [block.model_dump() for block in response.content]
    texts = [block.get("text") or block.get("thinking") or block["id"] for block in blocks]
    assert [f"{block['type']} {text}" for block, text in zip(blocks, texts, strict=True)] == wanted
    assert [shown.type.value for shown in response.content_blocks] == [
        block["type"] for block in blocks
    ]
    if is_shown:
        streamed = dict.fromkeys(range(len(wanted)), "")
        for payload in host.payloads("llm:stream_block_delta"):
            streamed[payload["block_index"]] += payload["text"]
        kinds = [
            payload["block_type"].replace("use", "call")
            for payload in host.payloads("llm:stream_block_start")
        ]
        assert kinds == [block["type"] for block in blocks]
        assert [streamed[index] or text for index, text in enumerate(texts)] == texts
        assert len(host.payloads("llm:stream_block_end")) == len(wanted)


async def test_amp_event_tells_the_whole_usage(amp_server):
    usage = {
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    amp_server.script(
        sse(amp_choice({"content": "A"}, finish_reason="stop"), amp_usage(5, 7, **usage))
    )
    host = await amp_mount(amp_server, use_completions=False)
    await amp_hello(host)
    told = {
        "input_tokens": 5,
        "output_tokens": 7,
        "cache_read_tokens": 3,
        "reasoning_tokens": 2,
        "cost_usd": None,
    }
    assert host.told()[-1] == amp_response_event(usage=told)


async def test_amp_events_of_an_error_without_output(amp_server):
    amp_server.script(reply(400, {"error": {"message": "No.", "code": 400}}))
    host = await amp_mount(amp_server, use_completions=False)
    with pytest.raises(llm_errors.InvalidRequestError) as caught:
        await amp_hello(host)
    assert str(caught.value) == f"400 'No.': POST {amp_server.url}/v1/chat/completions"
    assert host.told() == [
        amp_request_event(),
        amp_failed_event("InvalidRequestError", str(caught.value)),
    ]


async def test_amp_events_of_an_error_after_output(amp_server):
    error = {"error": {"message": "No.", "code": 400}}
    amp_server.script(sse(amp_choice({"content": "A"}), amp_choice({"content": "B"}), error))
    host = await amp_mount(amp_server, use_completions=False)
    with pytest.raises(llm_errors.InvalidRequestError) as caught:
        await amp_hello(host)
    message = str(caught.value)
    assert amp_merged(host.told()) == [
        amp_request_event(),
        amp_block("start", 0, "text"),
        amp_block("delta", 0, "text", sequence=0, text="AB"),
        amp_block("end", 0, "text"),
        (
            "llm:stream_aborted",
            {"request_id": "ID", "error": {"type": "InvalidRequestError", "msg": message}},
        ),
        amp_failed_event("InvalidRequestError", message),
    ]
    assert caught.value.__cause__.partial.text == "AB"


async def test_amp_events_of_a_retry_before_output(amp_server, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: low)
    amp_server.script(reply(503, "busy"), reply(500, ""), amp_chat({"content": "A"}))
    host = await amp_mount(amp_server, use_completions=False, max_retry_delay=0.02, max_retries=2)
    await amp_hello(host)
    told = host.told()
    messages = [payload.pop("error_message") for name, payload in told if name == "provider:retry"]
    assert [message[:10] for message in messages] == ["503 'busy'", "500 (no me"]
    retry = {"provider": "vllm", "request_id": "ID", "max_retries": 2, "delay": 0.01}
    retry |= {"error_type": "ProviderUnavailableError"}
    assert told == [
        amp_request_event(),
        ("provider:retry", retry | {"attempt": 1}),
        ("provider:retry", retry | {"attempt": 2}),
        amp_block("start", 0, "text"),
        amp_block("delta", 0, "text", sequence=0, text="A"),
        amp_block("end", 0, "text"),
        amp_response_event(retries=2),
    ]
    request_id = host.payloads("llm:request")[0]["request_id"]
    sent = [request.headers["X-Request-Id"] for request in amp_server.requests]
    assert sent == [f"{request_id}-{attempt}" for attempt in (1, 2, 3)]


async def test_amp_patience_is_six_retries_over_half_a_minute(amp_server, monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    amp_server.script(*[reply(503, "busy")] * 6, amp_chat({"content": "A"}))
    host = await amp_mount(
        amp_server, use_completions=False, min_retry_delay=0.001
    )  # a 500th of the default
    assert (await amp_hello(host)).text == "A"
    delays = [payload["delay"] for payload in host.payloads("provider:retry")]
    assert delays == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    assert VLLMConfig("http://a").min_retry_delay * sum(delays) / 0.001 == pytest.approx(31.5)


AMP_STARTING = {
    "a gateway whose server starts": reply(404, "<html>The service is starting</html>"),
    "warming up": reply(425, "<html>Model is warming up</html>"),
    "Cloudflare's check": reply(403, "<html><title>Just a moment...</title> Cloudflare</html>"),
}


@amp_cases("raw", AMP_STARTING)
async def test_amp_server_that_starts_is_waited_for(raw, amp_server):
    amp_server.script(raw)
    host = await amp_mount(amp_server, use_completions=False, max_retry_delay=0.01)
    assert (await amp_hello(host)).text == AMP_HELLO
    assert [one["error_type"] for one in host.payloads("provider:retry")] == [
        "ProviderUnavailableError"
    ]


async def test_amp_conversation_is_rendered_once_not_once_an_attempt(amp_server):
    amp_server.script(
        reply(503, "busy"), sse(*amp_text_chunks("A"), done=False), path="/v1/completions"
    )
    host = await amp_mount(amp_server, max_retry_delay=0.01)
    assert (await amp_hello(host)).text == AMP_HELLO
    assert amp_paths(amp_server) == ["/tokenize", *["/v1/completions"] * 3]


async def test_amp_events_of_a_retry_after_output(amp_server):
    amp_server.script(
        sse(amp_choice({"reasoning": "Hm"}), amp_choice({"content": "Fir"}), done=False),
        amp_chat({"content": "Second"}),
    )
    host = await amp_mount(amp_server, use_completions=False, max_retry_delay=0.01)
    response = await amp_hello(host)
    assert response.content == [TextBlock(text="Second")]
    told = amp_merged(host.told())
    assert [name for name, _ in told].count("provider:retry") == 1
    retry = next(payload for name, payload in told if name == "provider:retry")
    assert 0 < retry.pop("delay") <= 0.01
    message = retry["error_message"]
    assert message.startswith("the stream ended without [DONE]: ")
    assert told == [
        amp_request_event(),
        amp_block("start", 0, "thinking"),
        amp_block("delta", 0, "thinking", sequence=0, text="Hm"),
        amp_block("end", 0, "thinking"),
        amp_block("start", 1, "text"),
        amp_block("delta", 1, "text", sequence=0, text="Fir"),
        amp_block("end", 1, "text"),
        (
            "llm:stream_aborted",
            {"request_id": "ID", "error": {"type": "StreamError", "msg": message}},
        ),
        (
            "provider:retry",
            {"provider": "vllm", "request_id": "ID", "attempt": 1, "max_retries": 6}
            | {"error_type": "StreamError", "error_message": message},
        ),
        amp_block("start", 0, "text"),
        amp_block("delta", 0, "text", sequence=0, text="Second"),
        amp_block("end", 0, "text"),
        amp_response_event(retries=1),
    ]


async def test_amp_retries_end(amp_server):
    amp_server.script(*[reply(503, "busy")] * 9)
    host = await amp_mount(amp_server, use_completions=False, max_retry_delay=0.01, max_retries=2)
    with pytest.raises(llm_errors.ProviderUnavailableError):
        await amp_hello(host)
    assert [payload["attempt"] for payload in host.payloads("provider:retry")] == [1, 2]
    assert len(amp_server.requests) == 3
    assert host.payloads("llm:response")[0]["retries"] == 2


@amp_cases(
    ("raw", "config"),
    {
        "longer than max_retry_delay": (reply(429, "slow", {"Retry-After": "31"}), {}),
        "not retryable": (reply(400, "no"), {}),
        "no retries": (reply(503, "busy"), {"max_retries": 0}),
    },
)
async def test_amp_does_not_retry(raw, config, amp_server):
    amp_server.script(raw)
    host = await amp_mount(amp_server, use_completions=False, **config)
    with pytest.raises(llm_errors.LLMError):
        await amp_hello(host)
    assert len(amp_server.requests) == 1
    assert host.names() == ["llm:request", "llm:response"]


async def test_amp_callers_own_request_id_goes_unchanged(amp_server):
    amp_server.script(reply(503, "busy"))
    host = await amp_mount(amp_server, use_completions=False, max_retry_delay=0.01)
    await amp_hello(host, request_id="mine")
    assert [request.headers["X-Request-Id"] for request in amp_server.requests] == ["mine", "mine"]
    assert {payload["request_id"] for _, payload in host.events} == {"mine"}


@amp_cases(
    ("config", "metadata", "has_deltas"),
    {
        "on": ({}, None, True),
        "off for this call": ({}, {"stream": False}, False),
        "0 is not False": ({}, {"stream": 0}, True),
        "off for all": ({"use_streaming": False}, None, False),
        "off for all, whatever the call says": (
            {"use_streaming": "false"},
            {"stream": True},
            False,
        ),
    },
)
@amp_cases("is_keyword", {"in the request": False, "as a keyword": True})
async def test_amp_stream_events_can_be_switched_off(
    config, metadata, has_deltas, is_keyword, amp_server
):
    host = await amp_mount(amp_server, **config)
    if is_keyword:
        response = await amp_hello(host, metadata=metadata)
    else:
        response = await host.provider.complete(amp_ask("Hello", metadata=metadata))
    assert response.text == AMP_HELLO
    assert any(name.startswith("llm:stream") for name in host.names()) is has_deltas
    assert (host.names()[0], host.names()[-1]) == ("llm:request", "llm:response")
    assert all(
        body["stream"] is True for body in amp_bodies(amp_server)
    )  # on the wire always, to be stoppable


async def test_amp_stream_that_nobody_watches_is_not_kept(amp_server):
    count = 20_000
    amp_server.script(amp_chat(*[{"content": "word "}] * count))
    host = await amp_mount(amp_server, use_completions=False)
    request = amp_ask("Hello", metadata={"stream": False})
    tracemalloc.start()
    try:
        response = await host.provider.complete(request)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(response.text) == 5 * count
    assert peak < 20 * len(
        response.text
    )  # its characters, a few times over; the deltas would be 50 times as much


async def test_amp_only_the_first_choice_is_shown(amp_server):
    host = await amp_mount(amp_server, use_completions=False)
    with request_options() as calls:
        response = await amp_hello(host, n=2)
    assert response.text == AMP_HELLO
    [(_, text)] = [
        (name, payload["text"])
        for name, payload in amp_merged(host.told())
        if name == "llm:stream_block_delta" and payload["block_type"] == "text"
    ]
    assert text == response.text
    assert [choice.text for choice in calls[0].choices] == [text, text]


@pytest.mark.parametrize(
    "event", [pytest.param(name, id=name) for name in AMP_EVENTS if "repaired" not in name]
)
async def test_amp_hook_that_raises_fails_nothing(event, amp_server):
    amp_server.script(sse(amp_choice({"content": "A"}), done=False), amp_chat({"content": "B"}))
    host = await amp_mount(
        amp_server, use_completions=False, max_retry_delay=0.01, debug=True, raw_debug=True
    )

    async def fail(name: str, payload: Any) -> None:
        raise RuntimeError("a hook of somebody else's")

    host.coordinator.hooks.register(event, fail, priority=0, name="fails")
    assert (await amp_hello(host)).text == "B"
    assert event in host.names()


async def test_amp_delta_that_reached_one_hook_is_taken_back(amp_server):
    amp_server.script(stall(SSE_HEAD + chunk(amp_choice({"content": "A"}))))
    host = await amp_mount(amp_server, use_completions=False)

    async def hang(name: str, payload: Any) -> None:
        await asyncio.sleep(AMP_SYNC_S)

    host.coordinator.hooks.register(
        "llm:stream_block_delta", hang, priority=2, name="after the one that records"
    )
    call = asyncio.ensure_future(amp_hello(host))
    await amp_until(lambda: "llm:stream_block_delta" in host.names())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(call, AMP_IN_TIME_S)
    assert host.names()[-3:] == ["llm:stream_block_end", "llm:stream_aborted", "llm:response"]
    await amp_is_quiet(amp_server, gone=1)


async def test_amp_emit_that_raises_fails_nothing(amp_server, caplog):
    class Hooks:
        async def emit(self, name: str, payload: Any) -> None:
            raise ValueError("no JSON")

    provider = VLLMProvider(amp_server.url, coordinator=types.SimpleNamespace(hooks=Hooks()))
    assert (await provider.complete(amp_ask("Hello"))).text == AMP_HELLO
    assert "llm:request" in caplog.text
    assert "no JSON" in caplog.text


@amp_cases(
    "coordinator",
    {"none": None, "no hooks": object(), "hooks None": types.SimpleNamespace(hooks=None)},
)
async def test_amp_works_without_hooks(coordinator, amp_server):
    provider = VLLMProvider(amp_server.url, coordinator=coordinator)
    assert (await provider.complete(amp_ask("Hello"))).text == AMP_HELLO


async def test_amp_slow_hook_merges_deltas_and_never_slows_the_server(amp_server):
    has_sent, text = threading.Event(), "x" * 65_536

    def send(connection: Connection) -> None:
        connection.send(SSE_HEAD + chunk(amp_choice({"content": "first "})))
        for _ in range(256):  # 16 MiB: far more than sockets hold
            connection.send(chunk(amp_choice({"content": text})))
        connection.send(
            chunk(amp_choice({}, finish_reason="stop")) + chunk("[DONE]") + b"0\r\n\r\n"
        )
        has_sent.set()

    amp_server.script(send)
    host = await amp_mount(amp_server, use_completions=False)

    async def wait(name: str, payload: Any) -> None:
        assert await asyncio.to_thread(has_sent.wait, AMP_SYNC_S)

    host.coordinator.hooks.register("llm:stream_block_delta", wait, priority=0, name="slow")
    response = await amp_hello(host)
    assert has_sent.is_set()
    texts = [payload["text"] for payload in host.payloads("llm:stream_block_delta")]
    assert "".join(texts) == response.text == "first " + text * 256
    assert (
        2 <= len(texts) < 20
    )  # what had come, then what came meanwhile: not the 257 pieces one by one


async def test_amp_failure_without_stream_events(amp_server):
    amp_server.script(reply(400, {"error": {"message": "no", "code": 400}}), path="/completions")
    host = await amp_mount(amp_server, use_streaming=False, use_completions=False)
    with pytest.raises(llm_errors.InvalidRequestError):
        await amp_hello(host)
    assert host.names() == ["llm:request", "llm:response"]


# ---- Amplifier: debug events ------------------------------------------------


AMP_KEY = "sk-never-seen-anywhere"


@amp_cases(
    ("config", "extra"),
    {
        "none": ({}, []),
        "debug": ({"debug": True}, ["llm:request:debug", "llm:response:debug"]),
        "raw_debug": ({"raw_debug": True}, ["llm:request:raw", "llm:response:raw"]),
        "raw": ({"raw": True}, []),
    },
)
async def test_amp_debug_events(config, extra, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with StandIn(api_key=AMP_KEY) as server:
        host = await amp_mount(
            server,
            use_completions=False,
            api_key=AMP_KEY,
            default_headers={"X-Other": AMP_KEY},
            **config,
        )
        words = "Say " + 400 * "a"
        response = await host.provider.complete(amp_ask(words))
    body = {"model": MODEL, "messages": [{"role": "user", "content": words}]}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    told = [(name, payload) for name, payload in host.told() if "stream_block" not in name]
    assert [name for name, _ in told if name.endswith((":debug", ":raw"))] == extra
    raws = [
        payload["raw"]
        for name, payload in told
        if name in ("llm:request", "llm:response") and "raw" in payload
    ]
    whole = [payload for name, payload in told if name.endswith(":raw")]
    cut = [payload for name, payload in told if name.endswith(":debug")]
    if "raw" in config:
        assert raws[0] == body
        assert response.text in json.dumps(raws[1]).replace("\\n", "\n")
    else:
        assert raws == []
    for payload in [*whole, *cut]:
        assert (payload.pop("provider"), payload.pop("request_id")) == ("vllm", "ID")
    if whole:
        assert list(whole[0].values()) == [body]
        assert response.text in json.dumps(whole[1]).replace("\\n", "\n")
    if cut:
        [shown] = cut[0].values()
        content = shown["messages"][0].pop("content")
        assert shown == body | {"messages": [{"role": "user"}]}
        assert content.startswith(words[:180])
        assert words[:181] not in json.dumps(cut)
    assert AMP_KEY not in json.dumps(told)


async def test_amp_debug_truncate_length(amp_server):
    host = await amp_mount(amp_server, use_completions=False, debug=True, debug_truncate_length=10)
    await host.provider.complete(amp_ask("0123456789ABC"))
    shown = json.dumps(host.payloads("llm:request:debug"))
    assert "0123456789" in shown
    assert "0123456789A" not in shown


def amp_keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from amp_keys(item)


@amp_cases("keywords", {"streamed": {}, "whole": {"prompt_logprobs": 1}})
async def test_amp_log_probabilities_survive_redaction_and_json(keywords, amp_server):
    logprobs = {"content": [{"token": "4", "logprob": -9999.0, "bytes": [52], "top_logprobs": []}]}
    message = {"role": "assistant", "content": "4"}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
    whole = reply(
        200, {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice]}
    )
    amp_server.script(whole if keywords else sse(amp_choice({"content": "4"}, logprobs=logprobs)))
    host = await amp_mount(amp_server, use_completions=False, raw=True, debug=True, raw_debug=True)
    with request_options(logprobs=1) as calls:
        await host.provider.complete(amp_ask("What is 2+2?"), **keywords)
    assert calls[0].logprobs[0].logprob == -math.inf
    names = [name for name in host.names() if "stream_block" not in name]
    assert sorted(names) == sorted(
        [
            "llm:request",
            "llm:request:debug",
            "llm:request:raw",
            "llm:response",
            "llm:response:debug",
            "llm:response:raw",
        ]
    )
    told = json.dumps(
        host.payloads("llm:response:raw") + host.payloads("llm:response"), allow_nan=False
    )
    assert "-9999.0" in told
    hidden = {
        "token",
        "api_key",
        "authorization",
        "secret",
        "password",
    }  # what a redaction hook blanks
    assert hidden.isdisjoint(
        key.lower() for key in amp_keys([payload for _, payload in host.events])
    )


@amp_cases(
    "raw",
    {
        "quoted by a gateway": reply(
            401, {"error": {"message": f"Incorrect API key provided: {AMP_KEY}."}}
        ),
        "vLLM's own": reply(401, {"error": "Unauthorized"}),
    },
)
async def test_amp_no_key_in_errors(raw, amp_server, caplog):
    caplog.set_level(logging.DEBUG)
    amp_server.script(raw)
    host = await amp_mount(
        amp_server, use_completions=False, api_key=AMP_KEY, raw=True, debug=True, raw_debug=True
    )
    with pytest.raises(llm_errors.AuthenticationError) as caught:
        await amp_hello(host)
    assert amp_server.requests[0].headers["Authorization"] == f"Bearer {AMP_KEY}"
    assert AMP_KEY not in json.dumps(host.events) + repr(caught.value) + str(caught.value) + repr(
        host.provider.config
    )
    assert AMP_KEY not in caplog.text


# ---- Amplifier: errors ------------------------------------------------------


def amp_error(status: int, message: str = "No.", **headers: str) -> bytes:
    payload = {
        "error": {"message": message, "type": "BadRequestError", "param": None, "code": status}
    }
    return reply(
        status, payload, {name.replace("_", "-"): value for name, value in headers.items()}
    )


AMP_OVERFLOW = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least"
    " 2049 input tokens, which exceeds this limit even without any output tokens. Please reduce the"
    " length of the input prompt."
)


@amp_cases(
    ("step", "kind", "status", "retryable", "retry_after"),
    {
        "400": (amp_error(400), "InvalidRequestError", 400, False, None),
        "401": (amp_error(401), "AuthenticationError", 401, False, None),
        "403": (amp_error(403), "AccessDeniedError", 403, False, None),
        "404": (amp_error(404), "NotFoundError", 404, False, None),
        "422": (amp_error(422), "InvalidRequestError", 422, False, None),
        "StatusError has no name there": (amp_error(418), "LLMError", 418, False, None),
        "429": (amp_error(429, Retry_After="7"), "RateLimitError", 429, True, 7.0),
        "500": (amp_error(500), "ProviderUnavailableError", 500, True, None),
        "501": (amp_error(501), "ProviderUnavailableError", 501, False, None),
        "503": (amp_error(503, Retry_After="2"), "ProviderUnavailableError", 503, True, 2.0),
        "504": (amp_error(504), "ProviderUnavailableError", 504, True, None),
        "does not fit": (amp_error(400, AMP_OVERFLOW), "ContextLengthError", 400, False, None),
        "content filter": (
            amp_error(
                400, "The response was filtered due to Azure OpenAI's content management policy."
            ),
            *("ContentFilterError", 400, False, None),
        ),
        "ProtocolError has no name there": (reply(200, "<html>"), "LLMError", None, False, None),
        "broken off": (
            sse(amp_choice({"content": "A"}), done=False),
            "StreamError",
            None,
            True,
            None,
        ),
        "in a stream": (
            sse({"error": {"message": "No.", "code": 400}}),
            "InvalidRequestError",
            400,
            False,
            None,
        ),
        "closed before a reply": (Connection.close, "NetworkError", None, True, None),
        "silent": (stall(), "LLMTimeoutError", None, True, None),
    },
)
async def test_amp_errors_are_the_kernels(step, kind, status, retryable, retry_after, amp_server):
    amp_server.script(step)
    host = await amp_mount(
        amp_server,
        use_completions=False,
        max_retries=0,
        timeout=0.2 if kind == "LLMTimeoutError" else 60,
    )
    with pytest.raises(llm_errors.LLMError) as caught:
        await amp_hello(host)
    error = caught.value
    assert type(error) is getattr(llm_errors, kind)
    assert (error.status_code, error.retryable, error.retry_after) == (
        status,
        retryable,
        retry_after,
    )
    assert (error.provider, error.model) == ("vllm", MODEL)
    assert isinstance(error.__cause__, vllm_provider.VLLMError)
    assert str(error) == str(error.__cause__) != ""
    assert not isinstance(error, OSError)
    failed = host.payloads("llm:response")[0]
    assert (failed["status"], failed["error"]) == ("error", str(error))


@amp_cases("key", {"a word": "token", "a digit": "2"})
async def test_amp_short_key_does_not_garble_what_the_server_says(key, amp_server):
    amp_server.script(amp_error(400, AMP_OVERFLOW))
    host = await amp_mount(amp_server, use_completions=False, api_key=key)
    with pytest.raises(llm_errors.ContextLengthError) as caught:
        await amp_hello(host)
    assert (caught.value.__cause__.limit, caught.value.__cause__.input_tokens) == (2048, 2049)


async def test_amp_refused_connection_is_retried_and_told(caplog):
    host = await amp_mount(
        "http://127.0.0.1:9", use_completions=False, max_retries=1, max_retry_delay=0.01
    )
    with pytest.raises(
        llm_errors.NetworkError,
        match=r"^no connection to http://127\.0\.0\.1:9: connection refused; ",
    ):
        await amp_hello(host)
    assert host.names() == ["llm:request", "provider:retry", "llm:response"]


@amp_cases(
    ("config", "fields", "keywords", "message"),
    {
        "NaN": ({}, {"temperature": math.nan}, {}, "the request is not JSON, in 'temperature': "),
        "not JSON": ({}, {}, {"hook": print}, "the request is not JSON, in 'hook': "),
        "a lone surrogate": ({}, {}, {"user": "\ud83d"}, "the request holds a lone surrogate"),
        "a setting": (
            {},
            {},
            {"use_completions": "perhaps"},
            "use_completions must be true or false",
        ),
        "a limit": (
            {},
            {},
            {"timeout": "soon"},
            "timeout must be a positive number of seconds, got 'soon'",
        ),
        "never another endpoint": (
            {"prompt_format": "chat_template", "use_completions": True},
            {"tools": [AMP_TOOL]},
            {},
            "prompt_format chat_template cannot render this: tools",
        ),
    },
)
async def test_amp_call_that_cannot_work_is_a_configuration_error(
    config, fields, keywords, message, amp_server
):
    host = await amp_mount(amp_server, **{"use_completions": False, **config})
    with pytest.raises(llm_errors.ConfigurationError) as caught:
        await host.provider.complete(amp_ask("Hello", **fields), **keywords)
    assert str(caught.value).startswith(message)
    assert (caught.value.retryable, caught.value.provider, caught.value.model) == (
        False,
        "vllm",
        MODEL,
    )
    assert amp_server.requests == []
    assert host.names() == ["llm:request", "llm:response"]


def test_amp_every_error_of_ours_has_one_of_the_kernels():
    """Those of the kernel that have our names take part in the same tree."""

    def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
        for child in kind.__subclasses__():
            yield child
            yield from subclasses(child)

    ours = {kind.__name__: kind for kind in subclasses(vllm_provider.VLLMError)}
    assert set(ours) - set(dir(llm_errors)) == {
        "InvalidOutputError",
        "ProtocolError",
        "StatusError",
    }
    assert not any(issubclass(kind, OSError) for kind in ours.values())


async def test_amp_server_that_is_down_is_warned_of_once(caplog):
    provider = VLLMProvider("http://127.0.0.1:1", config={"max_retries": 0})
    for _ in range(2):
        with pytest.raises(llm_errors.NetworkError):
            await provider.complete(amp_ask("Hello"))
    warnings = [
        record for record in caplog.records if "limits of the models" in record.getMessage()
    ]
    assert [record.levelname for record in warnings] == ["WARNING"]


async def test_amp_deadline_is_told_as_it_was_given(amp_server):
    amp_server.script(stall(), path="/completions")
    host = await amp_mount(amp_server, use_completions=False)
    with pytest.raises(llm_errors.LLMTimeoutError) as caught:
        await amp_hello(host, deadline=0.25)
    assert str(caught.value).startswith("deadline of 0.25 s reached: ")


# ---- Amplifier: cancellation ------------------------------------------------


def amp_phase(
    *steps: Step, path: str = "completions", events: int = 0, gone: int = 1, **config: Any
) -> tuple[Any, ...]:
    return steps, path, events, gone, config


AMP_PHASES = [
    pytest.param(*amp_phase(stall()), id="before headers"),
    pytest.param(*amp_phase(stall(SSE_HEAD)), id="after headers"),
    pytest.param(
        *amp_phase(stall(SSE_HEAD + chunk(amp_choice({"content": "A"}))), events=3), id="mid-stream"
    ),
    pytest.param(
        *amp_phase(reply(503, "", {"Retry-After": "20"}), events=2, gone=0),
        id="pause before a retry",
    ),
    pytest.param(
        *amp_phase(stall(), path="tokenize", use_completions=True),
        id="while the prompt is rendered",
    ),
    pytest.param(
        *amp_phase(stall(), path="models", default_model=None), id="while the model is asked for"
    ),
    pytest.param(
        *amp_phase(stall(), stall(), path="models", default_model=None, context_window=None),
        id="while both are asked for",
    ),
    pytest.param(
        *amp_phase(stall(), path="models", context_window=None), id="while the limits are asked for"
    ),
]


@amp_cases("by", {"task": "task", "session": "session"})
@pytest.mark.parametrize(("steps", "path", "events", "gone", "config"), AMP_PHASES)
async def test_amp_cancellation_stops_everything(steps, path, events, gone, config, by, amp_server):
    amp_server.script(*steps, path=path)
    host = await amp_mount(amp_server, **{"use_completions": False, **config})
    call = asyncio.ensure_future(amp_hello(host))
    await amp_until(
        lambda: (
            any(asked.endswith(path) for asked in amp_paths(amp_server))
            and len(host.events) >= events
        )
    )
    await asyncio.sleep(0.02)
    started = time.monotonic()
    if by == "task":
        call.cancel()
    else:
        host.coordinator.cancellation.request_immediate()
    with pytest.raises(asyncio.CancelledError if by == "task" else llm_errors.AbortError) as caught:
        await asyncio.wait_for(call, AMP_SYNC_S)
    assert time.monotonic() - started < 1.0
    if by == "session":
        assert (caught.value.provider, caught.value.model) == (
            "vllm",
            None if config.get("default_model", 0) is None else MODEL,
        )
    await amp_is_quiet(amp_server, gone)
    assert (host.names().count("llm:request"), host.names().count("llm:response")) == (1, 1)
    name, last = host.events[-1]
    assert (name, last["status"], bool(last["error"]), last["usage"]) == (
        "llm:response",
        "error",
        True,
        AMP_NO_USAGE,
    )
    assert last["error_type"] == ("CancelledError" if by == "task" else "AbortError")
    assert ("llm:stream_aborted" in host.names()) is ("llm:stream_block_delta" in host.names())


async def test_amp_events_of_a_cancelled_call(amp_server):
    amp_server.script(stall(SSE_HEAD + chunk(amp_choice({"content": "A"}))))
    host = await amp_mount(amp_server, use_completions=False)
    call = asyncio.ensure_future(amp_hello(host))
    await amp_until(lambda: "llm:stream_block_delta" in host.names())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert host.told() == [
        amp_request_event(),
        amp_block("start", 0, "text"),
        amp_block("delta", 0, "text", sequence=0, text="A"),
        amp_block("end", 0, "text"),
        (
            "llm:stream_aborted",
            {"request_id": "ID", "error": {"type": "CancelledError", "msg": "cancelled"}},
        ),
        amp_failed_event("CancelledError", "cancelled"),
    ]


@amp_cases("by", {"task": "task", "session": "session"})
async def test_amp_cancellation_while_waiting_for_a_place(by, amp_server):
    amp_server.script(stall())
    host = await amp_mount(amp_server, use_completions=False, max_concurrency=1)
    first = asyncio.ensure_future(amp_hello(host))
    await amp_until(lambda: amp_server.requests)
    second = asyncio.ensure_future(amp_hello(host))
    await amp_until(lambda: host.names() == ["llm:request"] * 2)
    await asyncio.sleep(0.02)
    started = time.monotonic()
    if by == "task":
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert not first.done()
        assert len(amp_server.requests) == 1
        first.cancel()
    else:
        host.coordinator.cancellation.request_immediate()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert time.monotonic() - started < 1.0
    assert {type(result) for result in results} == {
        asyncio.CancelledError if by == "task" else llm_errors.AbortError
    }
    assert host.names()[2:] == ["llm:response"] * 2
    assert {payload["request_id"] for payload in host.payloads("llm:response")} == {
        payload["request_id"] for payload in host.payloads("llm:request")
    }
    await amp_is_quiet(amp_server, gone=1)
    assert len(amp_server.requests) == 1


def amp_cancel(host: AmpHost, call: Any, by: str) -> None:
    """Cancel by the task, the session, or both, as the second Ctrl-C does."""
    if by != "task":
        host.coordinator.cancellation.request_immediate()
    if by != "session":
        call.cancel()


AMP_SLOW_HOOKS = {
    "in the last event": ("llm:response", 0.3),
    "in the end of a block": ("llm:stream_block_end", 0.3),
    "in a delta": ("llm:stream_block_delta", 0.3),
    "in the last event, for ever": ("llm:response", AMP_SYNC_S),
    "in a delta, for ever": ("llm:stream_block_delta", AMP_SYNC_S),
}


@pytest.mark.parametrize("by", ["task", "session", "both"])
@amp_cases(("event", "seconds"), AMP_SLOW_HOOKS)
async def test_amp_answer_that_is_whole_is_returned(event, seconds, by, amp_server, monkeypatch):
    monkeypatch.setattr(vllm_provider, "HOOK_GRACE_S", 2.0 if seconds < 1 else 0.2)
    amp_server.script(amp_chat({"content": "A"}))
    host = await amp_mount(amp_server, use_completions=False)
    is_in_hook = asyncio.Event()

    async def wait(name: str, payload: Any) -> None:
        is_in_hook.set()
        await asyncio.sleep(seconds)

    host.coordinator.hooks.register(event, wait, priority=0, name="before the one that records")
    call = asyncio.ensure_future(amp_hello(host))
    await is_in_hook.wait()
    await amp_until(lambda: amp_server.running == 0)
    await asyncio.sleep(0.05)  # the thread has read to the end
    amp_cancel(host, call, by)
    response = await asyncio.wait_for(call, AMP_IN_TIME_S)
    assert (response.text, response.content) == ("A", [TextBlock(text="A")])
    if seconds < 1:
        assert [payload["status"] for payload in host.payloads("llm:response")] == ["ok"]
        assert host.payloads("llm:stream_aborted") == []
        await amp_is_quiet()


@pytest.mark.parametrize("by", ["task", "session", "both"])
@pytest.mark.parametrize(
    "event", ["llm:request", "llm:stream_block_delta", "llm:stream_aborted", "llm:response"]
)
async def test_amp_cancelled_call_is_reported_once_whatever_hooks_do(event, by, amp_server):
    amp_server.script(stall(SSE_HEAD + chunk(amp_choice({"content": "A"}))))
    host = await amp_mount(amp_server, use_completions=False)

    async def wait(name: str, payload: Any) -> None:
        await asyncio.sleep(0.3)

    host.coordinator.hooks.register(event, wait, priority=0, name="before the one that records")
    call = asyncio.ensure_future(amp_hello(host))
    await amp_until(lambda: amp_server.requests or event == "llm:request")
    await asyncio.sleep(0.05)
    amp_cancel(host, call, by)
    await asyncio.sleep(0.1)
    amp_cancel(host, call, by)
    with pytest.raises(llm_errors.AbortError if by == "session" else asyncio.CancelledError):
        await asyncio.wait_for(call, AMP_IN_TIME_S)
    [result] = host.payloads("llm:response")
    wanted = "CancelledError" if by == "task" else "AbortError"
    assert (result["status"], result["error_type"]) == ("error", wanted)
    await amp_is_quiet()


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.12])
async def test_amp_session_that_is_cancelled_twice_ends_as_cancelled(
    delay, amp_server, monkeypatch
):
    async with amp_session(monkeypatch, amp_server.url, vllm={"use_completions": False}) as session:
        amp_server.script(stall(SSE_HEAD + chunk(amp_choice({"content": "A"}))), path="completions")
        run = asyncio.ensure_future(session.execute("Hello"))
        await amp_until(lambda: amp_bodies(amp_server))
        session.coordinator.cancellation.request_immediate()
        await asyncio.sleep(delay)
        run.cancel()
        with pytest.raises((asyncio.CancelledError, RuntimeError)) as caught:
            await asyncio.wait_for(run, AMP_IN_TIME_S)
    assert isinstance(caught.value, asyncio.CancelledError) or "ancelled" in str(caught.value)


@amp_cases("use_completions", {"completions": True, "chat": False})
async def test_amp_cancelled_session_starts_nothing(use_completions, amp_server):
    host = await amp_mount(amp_server, use_completions=use_completions)
    host.coordinator.cancellation.request_immediate()
    with pytest.raises(llm_errors.AbortError):
        await amp_hello(host)
    assert amp_server.requests == []
    assert host.names() == ["llm:request", "llm:response"]


async def test_amp_cancelled_list_models_leaves_no_thread_behind(amp_server):
    amp_server.script(stall())
    host = await amp_mount(amp_server)
    asking = asyncio.ensure_future(host.provider.list_models())
    await amp_until(lambda: amp_server.requests)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await amp_is_quiet(amp_server, gone=1)


async def test_amp_cancelled_discovery_leaves_no_thread_behind(amp_server):
    amp_server.script(stall())
    host = await amp_mount(amp_server)
    asking = asyncio.ensure_future(on_session_ready(host.coordinator))
    await amp_until(lambda: amp_server.requests)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await amp_is_quiet(amp_server, gone=1)


async def test_amp_a_session_cancelled_gracefully_goes_on(amp_server):
    amp_server.pace = 0.01  # 0.2 s in all: two looks at the session
    host = await amp_mount(amp_server, use_completions=False)
    host.coordinator.cancellation.request_graceful()
    assert (await amp_hello(host)).text == AMP_HELLO


async def test_amp_session_cancels_through_the_kernel(amp_server, monkeypatch):
    async with amp_session(monkeypatch, amp_server.url, vllm={"use_completions": False}) as session:
        amp_server.script(stall(SSE_HEAD + chunk(amp_choice({"content": "A"}))), path="completions")
        run = asyncio.ensure_future(session.execute("Hello"))
        await amp_until(lambda: amp_bodies(amp_server))
        started = time.monotonic()
        session.coordinator.cancellation.request_immediate()
        with contextlib.suppress(Exception):  # what the kernel makes of it is its own matter
            await asyncio.wait_for(run, AMP_SYNC_S)
        assert time.monotonic() - started < 1.0
        await asyncio.to_thread(amp_server.aborted.get, timeout=AMP_IN_TIME_S)


async def test_amp_close_ends_the_calls_and_may_be_called_again(amp_server):
    amp_server.script(*[stall(SSE_HEAD + chunk(amp_choice({"content": "A"})))] * 3)
    host = await amp_mount(amp_server, use_completions=False)
    calls = [asyncio.ensure_future(amp_hello(host)) for _ in range(3)]
    await amp_until(lambda: host.names().count("llm:stream_block_delta") == 3)
    started = time.monotonic()
    await host.close()
    await host.provider.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - started < 1.0
    assert [type(result) for result in results] == [llm_errors.AbortError] * 3
    assert [(result.provider, result.model, result.retryable) for result in results] == [
        ("vllm", MODEL, False)
    ] * 3
    assert host.names()[-6:].count("llm:response") == 3
    assert (await amp_hello(host)).text == AMP_HELLO
    await amp_is_quiet(amp_server, gone=3)


# ---- Amplifier: many calls, many loops --------------------------------------


async def test_amp_64_calls_run_at_once_and_leave_the_host_its_threads(amp_server):
    meet = threading.Barrier(65)

    def together(connection: Connection) -> None:
        meet.wait(AMP_SYNC_S)
        connection.send(amp_chat({"content": connection.request.body["messages"][0]["content"]}))

    amp_server.script(*[together] * 64)
    host = await amp_mount(amp_server, use_completions=False)
    calls = [
        asyncio.ensure_future(host.provider.complete(amp_ask(f"Say {number}")))
        for number in range(64)
    ]
    await amp_until(lambda: amp_server.running == 64)
    assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), AMP_IN_TIME_S) == "free"
    await asyncio.wait_for(asyncio.to_thread(meet.wait, AMP_SYNC_S), AMP_SYNC_S)
    responses = await asyncio.gather(*calls)
    assert [response.text.split()[-1] for response in responses] == [
        str(number) for number in range(64)
    ]


async def test_amp_max_concurrency_is_the_providers_bound(amp_server):
    seen: list[int] = []

    def note(connection: Connection) -> None:
        seen.append(amp_server.running)
        connection.pause(0.01)
        amp_server.answer(connection)

    amp_server.script(*[note] * 12)
    host = await amp_mount(amp_server, use_completions=False, max_concurrency=3)
    await asyncio.gather(*[amp_hello(host) for _ in range(12)])
    assert len(seen) == 12
    assert max(seen) == 3


async def test_amp_a_pause_before_a_retry_holds_no_place(amp_server):
    amp_server.script(reply(503, "", {"Retry-After": "20"}))
    host = await amp_mount(amp_server, use_completions=False, max_concurrency=1)
    first = asyncio.ensure_future(amp_hello(host))
    await amp_until(lambda: "provider:retry" in host.names())
    response = await asyncio.wait_for(amp_hello(host), AMP_IN_TIME_S)
    assert response.finish_reason == "stop"
    first.cancel()
    await asyncio.wait({first})


async def test_amp_mount_widens_the_stock_executor_once(amp_server, caplog):
    caplog.set_level(logging.INFO)
    assert (await asyncio.to_thread(threading.current_thread)).name.startswith("asyncio")
    set_to: list[Any] = []
    loop = asyncio.get_running_loop()
    set_executor = loop.set_default_executor

    def note(executor: Any) -> None:
        set_to.append(executor)
        set_executor(executor)

    loop.set_default_executor = note  # type: ignore[method-assign]
    for _ in range(3):
        await amp_mount(amp_server)
    assert len(set_to) == 1
    assert caplog.records == []  # no word of a host's own executor
    meet, count = threading.Barrier(100), 100
    await asyncio.wait_for(
        asyncio.gather(*[asyncio.to_thread(meet.wait, AMP_SYNC_S) for _ in range(count)]),
        AMP_SYNC_S,
    )


async def test_amp_mount_leaves_a_hosts_own_executor_alone(amp_server, caplog):
    caplog.set_level(logging.INFO)
    asyncio.get_running_loop().set_default_executor(
        ThreadPoolExecutor(3, thread_name_prefix="hosts")
    )
    host = await amp_mount(amp_server)
    assert (await asyncio.to_thread(threading.current_thread)).name.startswith("hosts")
    [record] = [record for record in caplog.records if record.levelno == logging.INFO]
    assert "3" in record.getMessage()  # how many calls then run at once
    responses = await asyncio.gather(*[amp_hello(host) for _ in range(6)])
    assert {response.text for response in responses} == {AMP_HELLO}


def test_amp_mount_leaves_a_loop_alone_that_hides_its_executor(amp_server, caplog):
    caplog.set_level(logging.INFO)

    class Loop(asyncio.SelectorEventLoop):  # as uvloop's
        def __getattribute__(self, name: str) -> Any:
            if (
                name == "_default_executor"
                and sys._getframe(1).f_globals["__name__"] == vllm_provider.__name__
            ):
                raise AttributeError(name)
            return super().__getattribute__(name)

    async def threads() -> str:
        await amp_mount(amp_server)
        return (await asyncio.to_thread(threading.current_thread)).name

    with asyncio.Runner(loop_factory=Loop) as runner:
        assert runner.run(threads()).startswith("asyncio")
    text = "the host's own executor is kept: an unknown number of calls run at once"
    assert [record.getMessage() for record in caplog.records] == [text]


async def test_amp_mount_widens_a_stock_executor_that_is_busy(amp_server):
    release, count = threading.Event(), min(32, (os.cpu_count() or 1) + 4)
    busy = [
        asyncio.ensure_future(asyncio.to_thread(release.wait, AMP_SYNC_S)) for _ in range(count)
    ]
    try:
        await asyncio.sleep(0)
        await amp_mount(amp_server)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), AMP_IN_TIME_S) == "free"
    finally:
        release.set()
        await asyncio.gather(*busy)


async def test_amp_class_alone_widens_nothing(amp_server):
    provider = VLLMProvider(amp_server.url)
    assert (await provider.complete(amp_ask("Hello"))).finish_reason == "stop"
    assert (await asyncio.to_thread(threading.current_thread)).name.startswith("asyncio")


def test_amp_one_provider_in_several_loops_one_after_another(amp_server):
    provider = VLLMProvider(amp_server.url, config={"max_concurrency": 1})

    async def two() -> list[str]:
        return [
            response.text
            for response in await asyncio.gather(
                *[provider.complete(amp_ask("Hello")) for _ in "ab"]
            )
        ]

    texts = [asyncio.run(two()) for _ in range(3)]
    assert texts == [[AMP_HELLO] * 2] * 3


def test_amp_list_models_in_a_fresh_loop(amp_server):
    provider = VLLMProvider(amp_server.url)
    assert [[model.id for model in asyncio.run(provider.list_models())] for _ in range(2)] == [
        [MODEL]
    ] * 2
    asyncio.run(provider.close())


# ---- Amplifier: a server that hides or renames its models -------------------


async def test_amp_hidden_list_of_models_is_not_asked_for_again_and_again(amp_server, caplog):
    amp_server.script(*[reply(404, {"detail": "Not Found"})] * 99, path="/v1/models")
    host = await amp_mount(
        amp_server, default_model=None, context_window=None, use_completions=False
    )
    await on_session_ready(host.coordinator)
    asked = []
    for _ in range(3):
        assert (await amp_hello(host)).text == AMP_HELLO
        asked.append(amp_paths(amp_server).count("/v1/models"))
    assert all("model" not in body for body in amp_bodies(amp_server))  # vLLM then takes its first
    assert asked[0] == asked[2]
    assert len([record for record in caplog.records if "/v1/models" in record.getMessage()]) == 1


@amp_cases("use_completions", {"completions": True, "chat": False})
async def test_amp_model_that_was_renamed_meanwhile_is_asked_for_once_more(
    use_completions, amp_server
):
    amp_server.script(amp_models({"id": "old", "max_model_len": 4096}), path="/v1/models")
    host = await amp_mount(
        amp_server, default_model=None, use_completions=use_completions, context_window=None
    )
    await on_session_ready(host.coordinator)
    asked = []
    for _ in range(3):
        assert (await amp_hello(host)).text == AMP_HELLO
        asked.append(amp_paths(amp_server).count("/v1/models"))
    assert asked[1] == asked[2] <= 3


# ---- Amplifier: conversations on the completions endpoint -------------------

AMP_TURNS = ("What is 2+2?", "Hello", "Say hello in Japanese.")


async def amp_talk(
    provider: VLLMProvider, words: Sequence[str], system: str = ""
) -> tuple[list[Any], list[Completion]]:
    """Return the responses of a conversation, turn by turn, and their Completions."""
    history = [Message(role="system", content=system)] if system else []
    responses = []
    with request_options(logprobs=1, temperature=0) as calls:
        for said in words:
            history.append(Message(role="user", content=said))
            responses.append(await provider.complete(ChatRequest(messages=history)))
            history.append(Message(role="assistant", content=responses[-1].content))
    return responses, calls


async def amp_check_same_as_chat(url: str, words: Sequence[str], system: str) -> list[Any]:
    """Check that completions answer as the chat endpoint does, log probabilities included."""
    here, there = (
        await amp_mount(url, default_model=None),
        await amp_mount(url, default_model=None, use_completions=False),
    )
    responses, calls = await amp_talk(here.provider, words, system)
    wanted, wanted_calls = await amp_talk(there.provider, words, system)
    assert [response.degradation for response in responses] == [None] * len(words)
    assert [response.content for response in responses] == [response.content for response in wanted]
    assert [response.finish_reason for response in responses] == [
        response.finish_reason for response in wanted
    ]
    assert [response.usage.input_tokens for response in responses] == [
        one.usage.input_tokens for one in wanted
    ]
    for call, other in zip(calls, wanted_calls, strict=True):
        assert (
            [token.token for token in call.logprobs]
            == [token.token for token in other.logprobs]
            != []
        )
        assert [token.logprob for token in call.logprobs] == pytest.approx(
            [one.logprob for one in other.logprobs], abs=0.02
        )
        assert len(call.logprobs) == call.usage.output_tokens
    await here.close()
    await there.close()
    return responses


async def test_amp_completions_answer_as_the_chat_endpoint_does(amp_server):
    responses = await amp_check_same_as_chat(amp_server.url, AMP_TURNS, "Be brief.")
    thoughts = [
        block.thinking.strip()
        for response in responses
        for block in response.content
        if block.type == "thinking"
    ]
    assert thoughts == ["Two plus two equals four.", "A greeting.", "Use hiragana."]
    assert responses[2].text.strip() == "こんにちは、世界 🌸🚀"
    paths = [path for path in amp_paths(amp_server) if path.endswith("completions")]
    assert paths == ["/v1/completions"] * 3 + ["/v1/chat/completions"] * 3


async def test_amp_rendered_request_and_its_body(amp_server):
    host = await amp_mount(amp_server, temperature=0.5)
    request = amp_ask("Hello", top_k=5, reasoning_effort="low", stop=["X"])
    await host.provider.complete(request, extended_thinking=False, chat_template_kwargs={"a": 1})
    [tokenize], [body] = amp_bodies(amp_server, "tokenize"), amp_bodies(amp_server)
    kwargs = {"reasoning_effort": "low", "enable_thinking": False, "thinking": False, "a": 1}
    assert tokenize["messages"] == [{"role": "user", "content": "Hello"}]
    assert tokenize["chat_template_kwargs"] == kwargs
    assert tokenize["model"] == MODEL
    prompt = body.pop("prompt")
    assert (
        VLLMClient(amp_server.url).detokenize(prompt)
        == f"<|im_start|>user\nHello<|im_end|>\n{TURN}"
    )
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    sampling = {
        "temperature": 0.5,
        "top_k": 5,
        "stop": ["X"],
        "max_tokens": MAX_MODEL_LEN - len(prompt),
    }
    assert body == {"model": MODEL, **sampling, **stream}


@amp_cases(("effort", "thinks"), {"none": ("none", False), "high": ("high", True)})
async def test_amp_reasoning_effort_reaches_the_template_as_vllm_tells_it(
    effort, thinks, amp_server
):
    host = await amp_mount(amp_server, reasoning_effort="low")
    await host.provider.complete(amp_ask("Hello", reasoning_effort=effort))
    [tokenize], [body] = amp_bodies(amp_server, "tokenize"), amp_bodies(amp_server)
    assert tokenize["chat_template_kwargs"] == {
        "reasoning_effort": effort,
        "enable_thinking": thinks,
    }
    assert "reasoning_effort" not in body  # completions have none


async def test_amp_documents_of_the_request_reach_the_template(amp_server):
    documents = [{"title": "A", "text": "B"}]
    host = await amp_mount(amp_server)
    await host.provider.complete(amp_ask("Hello", documents=documents))
    [tokenize] = amp_bodies(amp_server, "tokenize")
    assert tokenize.get("chat_template_kwargs", {}).get("documents") == documents


@amp_cases(
    ("config", "fields", "lowered"),
    {
        "what was asked for": ({"max_tokens": 100}, {}, 100),
        "what the request asked for": ({"max_tokens": 100}, {"max_output_tokens": 50}, 50),
        "no more than fits": ({}, {"max_output_tokens": 4000}, None),
        "chat's newer name": ({}, {"max_completion_tokens": 60}, 60),
    },
)
async def test_amp_budget_is_known_before_sending(config, fields, lowered, amp_server, caplog):
    host = await amp_mount(amp_server, **config)
    await host.provider.complete(amp_ask("Hello", **fields))
    [body] = amp_bodies(amp_server)  # sent once: nothing was refused
    assert body["max_tokens"] == (lowered or MAX_MODEL_LEN - len(body["prompt"]))
    assert "max_completion_tokens" not in body
    assert len(caplog.records) == (lowered is None)


async def test_amp_prompt_that_does_not_fit_asks_the_engine_nothing(amp_server):
    host = await amp_mount(amp_server)
    words = "word " * 2100
    count = len(VLLMClient(amp_server.url).tokenize([{"role": "user", "content": words}]))
    amp_server.requests.clear()
    with pytest.raises(llm_errors.ContextLengthError) as caught:
        await host.provider.complete(amp_ask(words))
    assert amp_paths(amp_server) == ["/tokenize"]
    assert f"{count} tokens for a context of {MAX_MODEL_LEN}" in str(caught.value)
    assert (caught.value.__cause__.limit, caught.value.__cause__.input_tokens) == (
        MAX_MODEL_LEN,
        count,
    )
    assert caught.value.retryable is False


AMP_NO_TEMPLATE = reply(
    400,
    {
        "error": {
            "message": "As of transformers v4.44, default chat template is no longer allowed, so"
            " you must provide a chat template if the tokenizer does not define one.",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        }
    },
)


async def test_amp_model_without_a_template_gets_a_lone_message_as_typed(amp_server):
    amp_server.script(*[AMP_NO_TEMPLATE] * 2, path="tokenize")
    host = await amp_mount(amp_server)
    response = await host.provider.complete(amp_ask("The capital of France is"))
    assert (response.text, response.degradation) == (" Paris.", None)
    assert [(body["prompt"], body["max_tokens"]) for body in amp_bodies(amp_server)] == [
        ("The capital of France is", 1024)
    ]
    response = await host.provider.complete(amp_ask("A", "B", "Hello"))
    reason = "the model has no chat template"
    assert response.degradation == Degradation(
        requested="completions", actual="chat", reason=reason
    )
    assert amp_paths(amp_server)[-1] == "/v1/chat/completions"


@amp_cases(
    "raw",
    {
        "403": reply(403, {"detail": "Forbidden"}),
        "404": reply(404, {"detail": "Not Found"}),
        "405": reply(405, {"detail": "Method Not Allowed"}),
        "404 in HTML": reply(404, "<html>nothing here</html>", {"content-type": "text/html"}),
        "HTML": reply(200, "<html>welcome</html>", {"content-type": "text/html"}),
        "something else": reply(200, {"object": "list"}),
    },
)
async def test_amp_hidden_tokenizer_is_remembered_and_said_once(raw, amp_server, caplog):
    amp_server.script(raw, path="tokenize")
    host = await amp_mount(amp_server)
    responses = [await amp_hello(host) for _ in range(3)]
    reason = "/tokenize is hidden by a gateway"
    wanted = Degradation(requested="completions", actual="chat", reason=reason)
    assert [response.degradation for response in responses] == [wanted] * 3
    assert amp_paths(amp_server) == ["/tokenize", *["/v1/chat/completions"] * 3]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert {response.text for response in responses} == {AMP_HELLO}


async def test_amp_tokenizer_that_fails_otherwise_is_an_error(amp_server):
    amp_server.script(amp_error(400, "A template's complaint."), path="tokenize")
    host = await amp_mount(amp_server)
    with pytest.raises(llm_errors.InvalidRequestError, match="A template's complaint"):
        await amp_hello(host)
    assert (await amp_hello(host)).degradation is None


async def test_amp_tokenizer_that_is_busy_is_asked_again(amp_server):
    amp_server.script(reply(503, "busy"), path="tokenize")
    host = await amp_mount(amp_server, max_retry_delay=0.01)
    assert (await amp_hello(host)).degradation is None
    assert amp_paths(amp_server) == ["/tokenize", "/tokenize", "/v1/completions"]
    assert [payload["attempt"] for payload in host.payloads("provider:retry")] == [1]


@amp_cases(
    ("request_", "reason"),
    {
        "tools": (amp_ask("Hello", tools=[AMP_TOOL]), "tools"),
        "results": (
            ChatRequest(messages=[Message(**message) for message in AMP_ORPHANS]),
            "tool results in the history",
        ),
        "images": (
            ChatRequest(
                messages=[
                    Message(
                        role="user",
                        content=[{"type": "image", "source": {"type": "url", "url": "http://a/b"}}],
                    )
                ]
            ),
            "images",
        ),
    },
)
async def test_amp_what_cannot_be_rendered_goes_to_chat_and_says_so(
    request_, reason, amp_server, caplog
):
    host = await amp_mount(amp_server)
    response = await host.provider.complete(request_)
    assert response.degradation == Degradation(
        requested="completions", actual="chat", reason=reason
    )
    assert amp_paths(amp_server) == ["/v1/chat/completions"]
    assert (await amp_hello(host)).degradation is None  # nothing of it is remembered


async def test_amp_chat_mode_degrades_nothing(amp_server):
    host = await amp_mount(amp_server, use_completions=False)
    assert (await host.provider.complete(amp_ask("Hello", tools=[AMP_TOOL]))).degradation is None


async def test_amp_prompt_format_raw_sends_the_text_as_it_is(amp_server):
    host = await amp_mount(amp_server, prompt_format="raw")
    response = await host.provider.complete(amp_ask("The capital of France is"))
    assert (response.content, response.degradation) == ([TextBlock(text=" Paris.")], None)
    [body] = amp_bodies(amp_server)
    assert (body["prompt"], body["max_tokens"]) == ("The capital of France is", 1024)
    assert amp_paths(amp_server) == ["/v1/completions"]


@amp_cases("raw", {"no template": AMP_NO_TEMPLATE, "hidden": reply(404, {"detail": "Not Found"})})
async def test_amp_prompt_format_chat_template_renders_or_raises(raw, amp_server):
    host = await amp_mount(amp_server, prompt_format="chat_template")
    assert (await amp_hello(host)).degradation is None
    amp_server.script(raw, path="tokenize")
    for _ in range(2 if raw != AMP_NO_TEMPLATE else 1):
        with pytest.raises(llm_errors.LLMError):
            await amp_hello(host)
    assert "/v1/chat/completions" not in amp_paths(amp_server)


def amp_rendered(
    ids: Sequence[int], strings: Sequence[str] | None = None, limit: int | None = 131072
) -> bytes:
    return reply(
        200, {"count": len(ids), "max_model_len": limit, "tokens": list(ids), "token_strs": strings}
    )


def amp_text_chunks(*texts: str, logprobs: bool = False, **last: Any) -> list[dict[str, Any]]:
    chunks = []
    for text in texts:
        told = {
            "text_offset": [0],
            "token_logprobs": [-0.5],
            "tokens": [text],
            "top_logprobs": [{text: -0.5}],
        }
        choice = {
            "index": 0,
            "text": text,
            "logprobs": told if logprobs else None,
            "finish_reason": None,
        }
        chunks.append(
            {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [choice]}
        )
    chunks[-1]["choices"][0] |= {"finish_reason": "stop", "stop_reason": None, **last}
    return chunks


AMP_HARMONY_IDS = [200006, 1428, 200008, 4827, 382, 220, 17, 10, 17, 30, 200007, 200006, 173781]
AMP_HARMONY_TEXTS = (
    *(
        "<|channel|>",
        "analysis",
        "<|message|>",
        "Two",
        " plus",
        " two",
        " equals",
        " four",
        ".",
        "<|end|>",
        "<|start|>",
    ),
    *("assistant", "<|channel|>", "final", "<|message|>", "2", " +", " ", "2", " =", " ", "4", ""),
)


async def test_amp_gpt_oss_plain_turns_are_split_at_its_channels(amp_server):
    amp_server.script(amp_rendered(AMP_HARMONY_IDS), path="tokenize")
    amp_server.script(sse(*amp_text_chunks(*AMP_HARMONY_TEXTS, logprobs=True)), path="completions")
    host = await amp_mount(amp_server)
    with request_options(logprobs=1) as calls:
        response = await host.provider.complete(amp_ask("What is 2+2?"))
    assert response.content == [
        ThinkingBlock(thinking="Two plus two equals four."),
        TextBlock(text="2 + 2 = 4"),
    ]
    assert response.degradation is None
    [body] = amp_bodies(amp_server)
    assert (body["prompt"], body["skip_special_tokens"], body["logprobs"]) == (
        AMP_HARMONY_IDS,
        False,
        1,
    )
    assert body["max_tokens"] == 131072 - len(AMP_HARMONY_IDS)
    assert [token.token for token in calls[0].logprobs] == list(AMP_HARMONY_TEXTS)
    assert [payload["block_type"] for payload in host.payloads("llm:stream_block_start")] == [
        "thinking",
        "text",
    ]
    assert "/detokenize" not in amp_paths(amp_server)[2:]


@amp_cases(
    ("messages", "reason"),
    {
        "system": (
            [{"role": "system", "content": "Be brief."}, AMP_USER],
            "gpt-oss with a system prompt",
        ),
        "past reasoning": (
            [
                AMP_USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm."},
                        {"type": "text", "text": "A"},
                    ],
                },
                AMP_USER,
            ],
            "gpt-oss with past reasoning",
        ),
        "control tokens": (
            [{"role": "user", "content": "Say <|end|>"}],
            "gpt-oss with more than plain text",
        ),
    },
)
async def test_amp_gpt_oss_beyond_plain_turns_goes_to_chat(messages, reason, amp_server):
    amp_server.script(amp_rendered(AMP_HARMONY_IDS), path="tokenize")
    host = await amp_mount(amp_server)
    response = await host.provider.complete(
        ChatRequest(messages=[Message(**message) for message in messages])
    )
    assert response.degradation == Degradation(
        requested="completions", actual="chat", reason=reason
    )
    assert amp_paths(amp_server)[-1] == "/v1/chat/completions"
    assert "skip_special_tokens" not in amp_bodies(amp_server)[0]


@amp_cases(
    ("steps", "texts", "content"),
    {
        "the template has opened the tag": (
            [amp_rendered([1, 2, 3], ["assistant", "Ċ", "<think>"])],
            ("Hm", ".</th", "ink>", "4"),
            [ThinkingBlock(thinking="Hm."), TextBlock(text="4")],
        ),
        "the template has closed it too": (
            [amp_rendered([1, 2, 3], ["<think>", "ĊĊ", "</think>"])],
            ("4", " <think>"),
            [TextBlock(text="4 <think>")],
        ),
        "a server that sends no strings is asked for the end": (
            [amp_rendered([1, 2, 3]), reply(200, {"prompt": "assistant\n<think>\n"})],
            ("Hm.", "</think>4"),
            [ThinkingBlock(thinking="Hm."), TextBlock(text="4")],
        ),
        "or not asked": (
            [amp_rendered([1, 2, 3]), reply(404, {"detail": "Not Found"})],
            ("<think>", "Hm.", "</think>", "4"),
            [ThinkingBlock(thinking="Hm."), TextBlock(text="4")],
        ),
        "never closed is all reasoning": (
            [amp_rendered([1, 2, 3], ["a"])],
            ("<think>", "Hm"),
            [ThinkingBlock(thinking="Hm"), TextBlock(text="")],
        ),
    },
)
async def test_amp_thoughts_are_split_off_the_text(steps, texts, content, amp_server):
    amp_server.script(*steps, path="tokenize")  # and /detokenize
    amp_server.script(sse(*amp_text_chunks(*texts, logprobs=True)), path="completions")
    host = await amp_mount(amp_server)
    with request_options(logprobs=1) as calls:
        assert (await host.provider.complete(amp_ask("What is 2+2?"))).content == content
    assert [token.token for token in calls[0].logprobs] == list(texts)


async def test_amp_rendering_counts_towards_the_timeout(amp_server):
    amp_server.script(stall(), path="tokenize")
    host = await amp_mount(amp_server, timeout=0.2, max_retries=0)
    started = time.monotonic()
    with pytest.raises(llm_errors.LLMTimeoutError):
        await amp_hello(host)
    assert time.monotonic() - started < AMP_IN_TIME_S
    await amp_is_quiet(amp_server, gone=1)


async def test_amp_echo_is_not_split(amp_server):
    """The prompt's own markup stands before the answer's."""
    host = await amp_mount(amp_server)
    with request_options(echo=True) as calls:
        await host.provider.complete(amp_ask("What is 2+2?"))
    assert calls[0].reasoning == ""
    assert calls[0].text.endswith("<think>\nTwo plus two equals four.\n</think>\n\n2 + 2 = 4")


# ---- Amplifier: against a real server ---------------------------------------


@pytest.fixture
def amp_live_url() -> str:
    return os.environ["VLLM_LIVE_URL"]


@pytest.mark.live
async def test_amp_live_completions_answer_as_the_chat_endpoint_does(amp_live_url):
    responses = await amp_check_same_as_chat(amp_live_url, AMP_TURNS, "You are a helpful parrot.")
    assert all(response.text.strip() for response in responses)


@pytest.mark.live
async def test_amp_live_session_runs_a_tool(amp_live_url, monkeypatch):
    config = {"temperature": "0", "logprobs": "1"}
    async with amp_session(monkeypatch, amp_live_url, AmpWeather, vllm=config) as session:
        with request_options() as calls:
            answer = await session.execute("What is the weather in Paris?")
    assert [call.arguments for call in calls[0].tool_calls] == ['{"city": "Paris"}']
    assert "Paris" in answer
    assert all(call.logprobs for call in calls)


@pytest.mark.live
async def test_amp_live_cancelled_call_stops_the_engine(amp_live_url):
    host = await amp_mount(amp_live_url, default_model=None)
    call = asyncio.ensure_future(
        host.provider.complete(amp_ask("Once upon a time"), ignore_eos=True)
    )
    await amp_until(lambda: "llm:stream_block_delta" in host.names())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert host.names()[-1] == "llm:response"
    await amp_is_quiet()


# ---- Command line: what its tests need --------------------------------------

CLI_MODULE: Final = Path(vllm_provider.__file__)
CLI_KEY: Final = "sk-f3a9c1e7"
CLI_TOOLS: Final = json.dumps(
    [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
)
CLI_TEXT: Final = {"id": "cmpl-1", "choices": [{"index": 0, "text": " a"}]}
CLI_ANSWER: Final = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"content": "Yes"}}]}
CLI_THOUGHT: Final = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": {"reasoning": "Hm"}}]}
Cli: TypeAlias = Callable[..., tuple[int, str, str]]


class _Stdin(io.StringIO):
    """Standard input with a text, of a pipe or a terminal."""

    encoding = "utf-8"

    def __init__(self, text: str = "", *, is_terminal: bool = False) -> None:
        super().__init__(text)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.fixture
def cli_server():
    with StandIn() as server:
        yield server


@pytest.fixture
def cli_clean(monkeypatch):
    for name in ("VLLM_BASE_URL", "VLLM_API_KEY", "NO_COLOR", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("random.uniform", lambda _low, _high: 0.0)  # retries do not wait
    monkeypatch.setattr(sys, "stdin", _Stdin())


@pytest.fixture
def cli(cli_clean, capsys):
    """Return a function that runs the command line in this process: exit code, stdout, stderr."""

    def run(*argv: str) -> tuple[int, str, str]:
        try:
            code = main(argv)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def cli_interruptible():
    """Let SIGINT reach children, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _cli_environment(env: Mapping[str, str]) -> dict[str, str]:
    others = re.compile(r"VLLM_|NO_COLOR|PYTHON(IO|UNBUF)")
    return {name: value for name, value in os.environ.items() if not others.match(name)} | dict(env)


@contextlib.contextmanager
def cli_process(
    *argv: str, env: Mapping[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `python vllm_provider.py …` with pipes; it is gone when the block is left."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-W", "error", str(CLI_MODULE), *argv]
    with subprocess.Popen(command, env=_cli_environment(env or {}), **pipes | options) as process:
        try:
            yield process
        finally:
            process.kill()


def cli_output(*argv: str, stdin: bytes = b"", **options: Any) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of `python vllm_provider.py …`."""
    with cli_process(*argv, **options) as process:
        out, err = process.communicate(stdin, timeout=30)
        return process.returncode, (out or b"").decode(), (err or b"").decode()


@contextlib.contextmanager
def cli_terminal(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Callable[[], str]]:
    """Put a terminal in the place of these streams; yield a function that returns what it shows."""
    leader, follower = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(leader, 65536):
                shown.extend(data)

    reader = threading.Thread(target=read)
    reader.start()

    def text() -> str:
        terminal.close()
        reader.join(5.0)
        return shown.decode().replace("\r\n", "\n")

    with open(follower, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        for name in names:
            patch.setattr(sys, name, terminal)
        yield text
        terminal.close()
    reader.join(5.0)
    os.close(leader)


CLI_ON_TERMINAL: Final = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class CliScreen:
    """The command line in a process of its own, whose terminal is a pseudo-terminal."""

    def __init__(self, *argv: str, **env: str) -> None:
        self._leader, follower = pty.openpty()
        command = [sys.executable, "-c", CLI_ON_TERMINAL, str(CLI_MODULE), *argv]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
        self._process = subprocess.Popen(
            command,
            env=_cli_environment({"TERM": "dumb", **env}),
            start_new_session=True,
            **streams,
        )
        os.close(follower)
        self._shown = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._leader)

    def read(self, text: str = "") -> str:
        """Return what is shown until `text` is; without a text, until the end."""
        wanted = text.encode()
        deadline = time.monotonic() + 20.0
        while not wanted or wanted not in self._shown:
            assert time.monotonic() < deadline, self._shown
            if select.select([self._leader], [], [], 0.1)[0]:
                try:
                    self._shown += os.read(self._leader, 65536)
                except OSError:  # the end of a terminal
                    assert not wanted, self._shown
                    wanted = self._shown
                    break

        end = self._shown.find(wanted) + len(wanted)
        shown, self._shown = self._shown[:end], self._shown[end:]
        return shown.decode().replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def code(self) -> int:
        self.read()
        return self._process.wait(10.0)


# ---- Command line: what it prints -------------------------------------------

CLI_SUM: Final = ("2 + 2 = 4\n", "Two plus two equals four.\n")


@pytest.mark.parametrize(
    ("argv", "out", "err"), [
        pytest.param(["complete", "The capital of France is"], " Paris.\n", "", id="complete"),
        pytest.param(["complete", "The capital of France is", "--logprobs", "2"], " Paris.\n", "",
            id="logprobs-in-a-pipe-leave-the-text-alone"),
        pytest.param(["complete", "What is 2+2?", "--no-stream"], " 4\n", "", id="complete-whole"),
        pytest.param(["chat", "What is 2+2?"], *CLI_SUM, id="chat-reasoning-on-stderr"),
        pytest.param(["chat", "What is 2+2?", "--no-stream"], *CLI_SUM, id="chat-whole"),
        pytest.param(["chat", "Say hello in Japanese."],
            "こんにちは、世界 🌸🚀\n", "Use hiragana.\n", id="characters-beyond-latin"),
        pytest.param(["complete", "What is 2+2?", "--chat-template"], *CLI_SUM,
            id="chat-template-splits-reasoning"),
        pytest.param(["complete", "What is 2+2?", "--chat-template", "--no-stream"], *CLI_SUM,
            id="chat-template-whole"),
        pytest.param(["complete", "Count to 100.", "--stop", "never", "--stop", " 3"], " 1 2\n", "",
            id="stop-repeated"),
        pytest.param(
            ["chat", "What is the weather in Paris and Rome?", "--param", f"tools={CLI_TOOLS}"],
            'get_weather({"city": "Paris"})\nget_weather({"city": "Rome"})\n', "Two calls.\n",
            id="tool-calls"),
    ],
)  # fmt: skip
def test_cli_prints(cli, cli_server, argv, out, err):
    assert cli(*argv, "--temperature", "0", "--base-url", cli_server.url) == (0, out, err)


@pytest.mark.parametrize(
    ("path", "argv", "events", "out", "err"), [
        pytest.param("/completions", "complete", [{"text": "\n\na\n"}], "\n\na\n", "",
            id="text-keeps-its-line-breaks-and-one-that-ends-it-is-enough"),
        pytest.param("/completions", "complete", [{"text": "", "finish_reason": "stop"}], "", "",
            id="no-line-for-an-empty-reply"),
        pytest.param("/completions", "complete",
            [{"text": "a"}, {"index": 1, "text": "B"}, {"text": "b"}, {"index": 1, "text": "C\n"}],
            "ab\nBC\n", "", id="several-choices-one-after-the-other"),
        pytest.param("/chat/completions", "chat", [{"delta": {"content": "\n\nYes"}}], "\n\nYes\n",
            "", id="text-without-reasoning-keeps-its-line-breaks"),
        pytest.param("/chat/completions", "chat",
            [{"delta": {"reasoning": "\n"}}, {"delta": {"reasoning": "\nHm\n"}},
             {"delta": {"content": "\n"}}, {"delta": {"content": "\nYes\n\nNo"}}],
            "Yes\n\nNo\n", "Hm\n", id="no-blank-lines-around-reasoning"),
    ],
)  # fmt: skip
def test_cli_line_breaks(cli, cli_server, path, argv, events, out, err):
    cli_server.script(
        sse(*({"id": "a", "choices": [{"index": 0, **event}]} for event in events)), path=path
    )
    where = ("--model", MODEL, "--base-url", cli_server.url)
    assert cli(argv, "x", *where) == (0, out, err)


CLI_CARDS: Final = {"object": "list", "data": [{"id": "a"}, {"id": "b", "max_model_len": 8}]}


def test_cli_models(cli, cli_server):
    cli_server.script(reply(200, CLI_CARDS), reply(200, CLI_CARDS), path="/models")
    where = ("--base-url", cli_server.url)
    assert cli("models", *where) == (0, "a\t? tokens\nb\t8 tokens\n", "")
    code, out, err = cli("models", "--json", *where)
    assert (code, out.count("\n"), err) == (0, 1, "")
    limits = {card["id"]: card["max_model_len"] for card in json.loads(out)}
    assert limits == {"a": None, "b": 8}


def test_cli_health_names_the_server(cli, cli_server):
    out = f"{cli_server.url} is healthy\n"
    assert cli("health", "--base-url", f"{cli_server.url}/v1/") == (0, out, "")


def test_cli_health_waits_for_a_server_that_starts(cli, cli_server, monkeypatch):
    monkeypatch.setattr(vllm_provider, "HEALTH_POLL_S", 0.01)
    cli_server.script(reply(503), reply(503))
    assert cli("health", "--wait", "20", "--base-url", cli_server.url)[0] == 0
    assert len(cli_server.requests) == 3


@pytest.mark.parametrize(
    "argv", ["--version", "--base-url http://a --version"], ids=["alone", "after-options"]
)
def test_cli_version(cli, argv):
    assert cli(*shlex.split(argv)) == (0, f"vllm-provider {vllm_provider.__version__}\n", "")


def test_cli_help_names_every_command_and_explains_every_option(cli):
    code, overview, err = cli("--help")
    assert (code, err) == (0, "")
    commands = re.findall(r"(?m)^    ([a-z][a-z-]+)", overview)
    assert commands == ["complete", "chat", "score", "run-batch", "models", "health"]

    for command in commands:
        code, out, err = cli(command, "--help")
        assert (code, err) == (0, "")
        assert {"--base-url", "--api-key", "--model", "--timeout"} <= set(
            re.findall("--[a-z-]+", out)
        )
        rows = re.findall(r"(?m)^  (-\S.*(?:\n {20,}.*)?)", out)
        assert [row for row in rows if len(re.split(r"\s{2,}", row)) < 2] == []


@pytest.mark.parametrize(
    ("event", "name", "shown"), [
        pytest.param(CLI_ANSWER, "stdout", b"Yes", id="text"),
        pytest.param(CLI_THOUGHT, "stderr", b"Hm", id="reasoning"),
    ],
)  # fmt: skip
def test_cli_prints_each_piece_at_once(cli_server, event, name, shown):
    cli_server.script(stall(sse(event, done=False, end=False), timeout_s=5.0))
    argv = ("--base-url", cli_server.url, "--model", MODEL, "chat", "x")
    with cli_process(*argv, stdin=subprocess.DEVNULL) as process:
        assert getattr(process, name).read(len(shown)) == shown
        assert cli_server.running == 1


@pytest.mark.parametrize(
    ("argv", "line"), [
        pytest.param([], r"\d\.\d\d s to first token, \d+ tokens/s, 18 tokens\n", id="stream"),
        pytest.param(["--no-stream"], r"\d\.\d\d s, \d+ tokens/s, 18 tokens\n", id="whole"),
        pytest.param(["--json"], "", id="not-with-json-which-has-them"),
    ],
)  # fmt: skip
def test_cli_stats(cli, cli_server, argv, line):
    where = ("--temperature", "0", "--base-url", cli_server.url)
    code, out, err = cli("chat", "What is 2+2?", "--stats", *argv, *where)
    assert code == 0
    assert out.endswith("2 + 2 = 4\n") or "--json" in argv
    assert re.fullmatch(line, err.removeprefix(CLI_SUM[1]))


@pytest.mark.parametrize(
    ("reply", "line"), [
        pytest.param(Completion(usage=Usage(1, 101, 102), first_token_s=0.5, total_s=2.5),
            "0.50 s to first token, 50 tokens/s, 101 tokens",
            id="the-speed-is-that-after-the-first-token"),
        pytest.param(Completion(usage=Usage(1, 1, 2), first_token_s=0.5, total_s=0.5),
            "0.50 s to first token, 0 tokens/s, 1 tokens", id="one-token"),
        pytest.param(Completion(usage=Usage(1, 10, 11), total_s=2.0),
            "2.00 s, 5 tokens/s, 10 tokens", id="whole"),
        pytest.param(Completion(), "0.00 s, 0 tokens/s, 0 tokens", id="no-usage"),
    ],
)  # fmt: skip
def test_cli_stats_line(reply, line):
    assert vllm_provider._to_stats(reply) == line


@pytest.mark.parametrize("command", ["complete", "chat"])
def test_cli_html_is_the_picture(cli, cli_server, tmp_path, command):
    page = tmp_path / "page.html"
    where = ("--temperature", "0", "--html", str(page), "--base-url", cli_server.url)
    assert cli(command, "What is 2+2?", *where)[0] == 0
    assert cli_server.requests[-1].body["logprobs"] in (5, True)
    text = page.read_text(encoding="utf-8")
    assert "<title>What is 2+2?</title>" in text
    assert "mean probability" in text

    cli(command, "What is 2+2?", "--logprobs", "1", *where)
    body = cli_server.requests[-1].body
    assert body.get("top_logprobs", body["logprobs"]) == 1


def test_cli_runs_as_a_file(cli_server):
    argv = (
        "--base-url",
        cli_server.url,
        "complete",
        "The capital of France is",
        "--temperature",
        "0",
    )
    assert cli_output(*argv) == (0, " Paris.\n", "")


# ---- Command line: options --------------------------------------------------

CLI_REQUESTED: Final = [
    *("--max-tokens", "5", "--temperature", "0", "--top-p", "0.5", "--seed", "7"),
    *("--logprobs", "2", "--stop", "a"),
]
CLI_SENT: Final = {"max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "seed": 7}
CLI_HELLO: Final = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    "split", [
        pytest.param(0, id="after"),
        pytest.param(8, id="before"),
        pytest.param(4, id="on-both-sides"),
    ],
)  # fmt: skip
def test_cli_options_before_and_after_the_command(cli, cli_server, split):
    options = ["--base-url", cli_server.url, "--api-key", CLI_KEY, f"--model={MODEL}", "--stop"]
    options += ["never", "--no-stream"]
    assert cli(*options[:split], "complete", "What is 2+2?", *options[split:])[0] == 0
    (request,) = cli_server.requests
    assert request.headers["Authorization"] == f"Bearer {CLI_KEY}"
    assert request.body["model"] == MODEL
    assert request.body["stop"] == ["never"]
    assert "stream" not in request.body


@pytest.mark.parametrize(
    ("argv", "stop"), [
        pytest.param(["--model", "other", "complete", "x", "--model", MODEL], None,
            id="the-last-wins"),
        pytest.param(["--stop", "a", "complete", "x", "--stop", "b", "--model", MODEL], ["a", "b"],
            id="repeated-ones-are-joined"),
        pytest.param(["--base-url", "http://127.0.0.1:9", "complete", "x", "--model", MODEL], None,
            id="the-last-base-url-wins-too"),
    ],
)  # fmt: skip
def test_cli_options_on_both_sides(cli, cli_server, argv, stop):
    assert cli(*argv, "--base-url", cli_server.url)[0] == 0
    body = cli_server.requests[-1].body
    assert (body["model"], body.get("stop")) == (MODEL, stop)


def test_cli_url_and_key_of_the_environment(cli, cli_server, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", cli_server.url)
    monkeypatch.setenv("VLLM_API_KEY", CLI_KEY)
    assert cli("complete", "What is 2+2?", "--model", MODEL)[0] == 0
    assert cli("complete", "What is 2+2?", "--model", MODEL, "--api-key", "other")[0] == 0
    keys = [request.headers["Authorization"] for request in cli_server.requests]
    assert keys == [f"Bearer {CLI_KEY}", "Bearer other"]
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9")
    assert cli("complete", "What is 2+2?", "--base-url", cli_server.url)[0] == 0


@pytest.mark.parametrize(
    ("argv", "body"), [
        pytest.param(["complete", "Hello", *CLI_REQUESTED],
            {"prompt": "Hello", **CLI_SENT, "logprobs": 2, "stop": ["a"]}, id="complete"),
        pytest.param(["chat", "Hello", *CLI_REQUESTED, "--stop", "b", "--system", "Be brief."],
            {"messages": [{"role": "system", "content": "Be brief."}, CLI_HELLO], **CLI_SENT,
             "logprobs": True, "top_logprobs": 2, "stop": ["a", "b"]}, id="chat"),
        pytest.param(
            ["chat", "Hello", "--param", "min-p=0.5", "--param", 'stop=["x"]', "--stop", "a"],
            {"messages": [CLI_HELLO], "min_p": 0.5, "stop": ["x"]}, id="params-win-over-options"),
        pytest.param(
            ["complete", "x", "--max-tokens", "0", "--param", "echo=true", "--param", "n=null"],
            {"prompt": "x", "max_tokens": 0, "echo": True}, id="zero-is-sent-and-null-is-not"),
        pytest.param(["chat", "--", "--system"],
            {"messages": [{"role": "user", "content": "--system"}]},
            id="a-text-that-looks-like-an-option"),
        pytest.param(["chat", "--max", "5", "-- a list"],
            {"messages": [{"role": "user", "content": "-- a list"}], "max_tokens": 5},
            id="a-text-with-spaces-and-a-shortened-option"),
    ],
)  # fmt: skip
def test_cli_sends(cli, cli_server, argv, body):
    streamed = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
    assert cli("--base-url", cli_server.url, *argv)[0] == 0
    assert cli_server.requests[-1].body == body | streamed
    assert cli("--base-url", cli_server.url, "--no-stream", *argv)[0] == 0
    assert cli_server.requests[-1].body == body | {"model": MODEL}


def test_cli_chat_template_renders_the_system_message_too(cli, cli_server):
    argv = ("complete", "What is 2+2?", "--chat-template", "--system", "Answer like a pirate.")
    where = ("--temperature", "0", "--base-url", cli_server.url)
    assert cli(*argv, *where) == (0, "Arr, it be 4!\n", "A pirate counts too.\n")
    bodies = {request.path: request.body for request in cli_server.requests}
    messages = [
        {"role": "system", "content": "Answer like a pirate."},
        {"role": "user", "content": "What is 2+2?"},
    ]
    assert bodies["/tokenize"]["messages"] == messages
    with VLLMClient(cli_server.url) as client:
        assert bodies["/v1/completions"]["prompt"] == client.tokenize(messages)


def test_cli_chat_template_never_uses_the_chat_endpoint(cli, cli_server):
    harmony = {"count": 1, "max_model_len": 2048, "tokens": [200006], "token_strs": ["<|start|>"]}
    cli_server.script(reply(200, harmony), path="/tokenize")
    argv = (
        "complete",
        "x",
        "--chat-template",
        "--system",
        "Be brief.",
        "--base-url",
        cli_server.url,
    )
    code, out, err = cli(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "gpt-oss with a system prompt" in err
    assert "/v1/chat/completions" not in [request.path for request in cli_server.requests]


@pytest.mark.parametrize(
    ("stdin", "argv", "text"), [
        pytest.param("What is 2+2?", "", "What is 2+2?", id="alone"),
        pytest.param("What is 2+2?", "-", "What is 2+2?", id="named"),
        pytest.param(" two\nlines\n\n", "", " two\nlines\n",
            id="without-one-line-break-at-its-end"),
        pytest.param("a\nb\n", "Summarise:", "Summarise:\n\na\nb", id="after-the-argument"),
        pytest.param("", "Hello", "Hello", id="empty-beside-an-argument"),
        pytest.param("Hello", "''", "Hello", id="beside-an-empty-argument"),
        pytest.param("世界 🌸", "", "世界 🌸", id="unicode"),
    ],
)  # fmt: skip
def test_cli_text_from_stdin(cli, cli_server, monkeypatch, stdin, argv, text):
    raw = io.BytesIO(stdin.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    assert cli("chat", *shlex.split(argv), "--base-url", cli_server.url)[0] == 0
    assert cli_server.requests[-1].body["messages"] == [{"role": "user", "content": text}]


def test_cli_stdin_of_a_terminal_is_read_only_without_an_argument(cli, cli_server, monkeypatch):
    hint = "Reading the text from the terminal; Ctrl-D ends it.\n"
    for argv, prompt, err in ((["Hello"], "Hello", ""), ([], "typed", hint)):
        monkeypatch.setattr(sys, "stdin", _Stdin("typed\n", is_terminal=True))
        assert cli("complete", *argv, "--model", MODEL, "--base-url", cli_server.url)[::2] == (
            0,
            err,
        )
        assert cli_server.requests[-1].body["prompt"] == prompt


@pytest.mark.parametrize(
    ("raw", "errors", "said"), [
        pytest.param(b"", "strict", "there is no text: give it as argument or on standard input",
            id="empty"),
        pytest.param(b"\n", "strict", "there is no text: give it as argument or on standard input",
            id="a-line-break"),
        pytest.param(b"caf\xe9", "strict", "standard input is not utf-8 text", id="not-utf-8"),
        pytest.param(b"caf\xe9", "surrogateescape", "standard input is not utf-8 text",
            id="c-locale"),
    ],
)  # fmt: skip
def test_cli_stdin_that_cannot_be_sent(cli, cli_server, monkeypatch, raw, errors, said):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8", errors))
    assert cli("chat", "--base-url", cli_server.url) == (2, "", f"vllm-provider: {said}\n")
    assert cli_server.requests == []


# ---- Command line: scores and batches ---------------------------------------


def test_cli_score(cli, cli_server, tmp_path):
    page = tmp_path / "page.html"
    where = ("--context", "The capital of France is", "--base-url", cli_server.url)
    code, out, err = cli("score", " Paris.", "--html", str(page), *where)
    assert (code, err) == (0, "")
    with VLLMClient(cli_server.url) as client:
        score = client.score(" Paris.", context="The capital of France is")
    assert out == (
        f"probability {score.probability:.4g}, log probability {score.logprob:.4f}, "
        f"perplexity {score.perplexity:.4g}: ' Paris.'\n"
    )
    assert "<title>The capital of France is</title>" in page.read_text(encoding="utf-8")

    scored = json.loads(cli("score", " Paris.", "--json", *where)[1])
    assert (scored["text"], scored["logprob"]) == (" Paris.", pytest.approx(score.logprob))
    assert "".join(token["token"] for token in scored["tokens"]) == " Paris."


@pytest.mark.parametrize(
    "argv", [["The capital of France is"], ["--context", "The capital of France is"]]
)
def test_cli_score_of_choices(cli, cli_server, argv):
    choices = ("--choice", " Rome", "--choice", " Paris")
    code, out, err = cli("score", *argv, *choices, "--base-url", cli_server.url)
    assert (code, err) == (0, "")
    assert [line.split(": ")[1] for line in out.splitlines()] == ["' Paris'", "' Rome'"]
    ranked = json.loads(cli("score", *argv, *choices, "--json", "--base-url", cli_server.url)[1])
    assert sum(score["probability"] for score in ranked) == pytest.approx(1.0)


def test_cli_run_batch(cli, cli_server, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        '{"prompt": "What is 2+2?"}\n{"messages": [{"role": "user", "content": "Hello"}]}\n'
    )
    argv = (
        "run-batch",
        "-i",
        str(source),
        "--output-file",
        str(target),
        "--base-url",
        cli_server.url,
    )
    code, out, err = cli(*argv, "--param", "temperature=0", "--max-inflight", "2")
    assert (code, out, err.count("\n")) == (0, "", 1)
    assert err.startswith("2 lines: 2 done, 0 failed, 0 skipped")
    results = map(json.loads, target.read_text().splitlines())
    assert {result["custom_id"]: result["response"]["status_code"] for result in results} == {
        "1": 200,
        "2": 200,
    }

    source.write_text(source.read_text() + "{\n")
    code, _, err = cli(*argv)
    assert code == 1
    assert err.startswith("3 lines: 0 done, 1 failed, 2 skipped")
    assert "first error: " in err


def test_cli_run_batch_arguments(cli, monkeypatch):
    calls: list[tuple[Any, ...]] = []

    def run_batch(
        client: VLLMClient, *args: Any, servers: Sequence[VLLMClient], **options: Any
    ) -> Any:
        urls = [one.config.base_url for one in (client, *servers)]
        calls.append((urls, client.config.max_concurrency, args, options))
        return vllm_provider.BatchReport(total=1, failed=1)

    monkeypatch.setattr(VLLMClient, "run_batch", run_batch)
    argv = ("--base-url", "http://a", "run-batch", "-i", "in", "-o", "-", "--base-url", "http://b")
    assert cli(*argv)[0] == 1
    assert cli(*argv, "--max-inflight", "100", "--param", "top_k=1", "--model", "m")[0] == 1
    options = {"concurrency": None, "progress": True}
    assert calls == [
        (["http://a", "http://b"], 64, ("in", "-"), options),
        (["http://a", "http://b"], 100, ("in", "-"), options | {"concurrency": 100, "top_k": 1}),
    ]


# ---- Command line: as JSON --------------------------------------------------


def test_cli_json_is_the_whole_completion(cli, cli_server):
    argv = ("chat", "What is 2+2?", "--logprobs", "1", "--json", "--temperature", "0")
    code, out, err = cli(*argv, "--base-url", cli_server.url)
    printed = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert set(printed) == set(inspect.signature(Completion).parameters)
    (choice,) = printed["choices"]
    assert set(choice) == set(inspect.signature(Choice).parameters)
    assert (choice["text"].strip(), choice["finish_reason"]) == ("2 + 2 = 4", "stop")
    assert choice["reasoning"].strip() == "Two plus two equals four."
    token = next(token for token in choice["logprobs"] if token["token"] == " 4")
    assert (token["bytes"], len(token["top"])) == (list(b" 4"), 1)
    assert printed["usage"]["output_tokens"] == len(choice["logprobs"])
    assert "choices" not in printed["payload"]


def test_cli_json_of_a_whole_reply_has_its_payload(cli, cli_server):
    argv = ("complete", "What is 2+2?", "--json", "--no-stream", "--temperature", "0")
    printed = json.loads(cli(*argv, "--base-url", cli_server.url)[1])
    assert printed["payload"]["choices"][0]["text"] == printed["choices"][0]["text"] == " 4"


def _no_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_cli_json_has_no_infinity_and_no_nan(cli, cli_server):
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [-9999.0, math.nan],
        "top_logprobs": [{"c": -math.inf}, None],
    }
    payload = {"id": "cmpl-1", "choices": [{"index": 0, "text": "ab", "logprobs": logprobs}]}
    headers = {"Content-Type": "application/json"}
    cli_server.script(reply(200, json.dumps(payload), headers))
    argv = (
        "complete",
        "x",
        "--json",
        "--no-stream",
        "--model",
        MODEL,
        "--base-url",
        cli_server.url,
    )
    printed = json.loads(cli(*argv)[1], parse_constant=_no_constant)
    first, second = printed["choices"][0]["logprobs"]
    assert first["logprob"] == first["top"][0]["logprob"] == -9999.0
    assert second["logprob"] is None


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_cli_json_is_json_in_every_encoding(cli_server, encoding):
    argv = (
        "chat",
        "Say hello in Japanese.",
        "--json",
        "--temperature",
        "0",
        "--base-url",
        cli_server.url,
    )
    code, out, err = cli_output(*argv, env={"PYTHONIOENCODING": encoding})
    assert (code, err) == (0, "")
    assert json.loads(out)["choices"][0]["text"].strip() == "こんにちは、世界 🌸🚀"


def test_cli_shows_what_the_encoding_lacks_as_escapes(cli_server):
    cli_server.script(sse({"id": "a", "choices": [{"index": 0, "text": "é 🌸"}]}))
    argv = ("complete", "x", "--model", MODEL, "--base-url", cli_server.url)
    assert cli_output(*argv, env={"PYTHONIOENCODING": "ascii"}) == (0, "\\xe9 \\U0001f338\n", "")


# ---- Command line: on a terminal --------------------------------------------


def _scored(text: str, *tokens: tuple[str, float | None], **top: float) -> dict[str, Any]:
    """Return the event of a completion with these tokens and their probabilities."""
    values = [None if value is None else math.log(value) for _, value in tokens]
    others = {f" {name}": math.log(value) for name, value in top.items()}
    logprobs = {"tokens": [token for token, _ in tokens], "token_logprobs": values}
    tops = [
        {token: value, **others} for token, value in zip(logprobs["tokens"], values, strict=True)
    ]
    logprobs["top_logprobs"] = [{} if None in top.values() else top for top in tops]
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "logprobs": logprobs}]}


def _colored(token: str, color: int = 33, others: str = "") -> str:
    return f"\x1b[{color}m{token}\x1b[0m" + (f"\x1b[2m[{others}]\x1b[0m" if others else "")


CLI_PARIS: Final = _scored(" Paris.", (" Paris", 0.68), (".", 0.9), ("<end>", 0.5), Lyon=0.01)


@pytest.mark.parametrize(
    ("argv", "env", "event", "shown"), [
        pytest.param("--logprobs 2", {}, CLI_PARIS,
            _colored(" Paris", 33, " Lyon 0.01") + _colored(".", 32, " Lyon 0.01") + "\n",
            id="colours-and-alternatives"),
        pytest.param("", {}, CLI_PARIS, " Paris.\n", id="plain-when-not-requested"),
        pytest.param("--param logprobs=2", {"NO_COLOR": "1"}, CLI_PARIS, " Paris(0.68).(0.90)\n",
            id="no-color-and-requested-as-a-parameter"),
        pytest.param("--logprobs 2", {"TERM": "dumb"}, CLI_PARIS, " Paris(0.68).(0.90)\n",
            id="dumb"),
        pytest.param("--logprobs 1", {"NO_COLOR": ""}, _scored(" a", (" a", 0.5)),
        # no-color.org: "when present and not an empty string"
            _colored(" a") + "\n", id="an-empty-no-color-is-none"),
        pytest.param("--logprobs 1", {}, _scored("a", ("a", 0.8001)), _colored("a", 32) + "\n",
            id="green"),
        pytest.param("--logprobs 1", {}, _scored("a", ("a", 0.7999)), _colored("a", 33) + "\n",
            id="yellow"),
        pytest.param("--logprobs 1", {}, _scored("a", ("a", 0.4001)), _colored("a", 33) + "\n",
            id="yellow-too"),
        pytest.param("--logprobs 1", {}, _scored("a", ("a", 0.3999)), _colored("a", 31) + "\n",
            id="red"),
        pytest.param("--logprobs 1", {}, _scored("a", ("a", None)), "a\n",
            id="unknown-probability"),
        pytest.param("--logprobs 1", {"NO_COLOR": "1"}, _scored("xy", ("a", 0.5), ("b", 0.5)),
            "xy\n", id="tokens-that-do-not-join-to-the-text"),
        pytest.param("--logprobs 1", {"NO_COLOR": "1"},
            _scored("ab", ("x", 0.1), ("a", 0.5), ("b", 0.25)), "a(0.50)b(0.25)\n",
            id="tokens-before-the-text-are-those-of-reasoning"),
        pytest.param("--logprobs 1", {"NO_COLOR": "1"}, _scored("a", ("a", 0.1), ("a", 0.5)),
            "a(0.50)\n", id="reasoning-that-ends-as-the-text-begins"),
        pytest.param("--logprobs 2", {}, _scored("\x1b[2J", ("\x1b[2J", 0.9), **{"\x07\n": 0.1}),
            _colored("\\x1b[2J", 32, " \\x07\\n 0.10") + "\n", id="control-characters-are-escaped"),
    ],
)  # fmt: skip
def test_cli_logprobs_on_a_terminal(cli, cli_server, monkeypatch, argv, env, event, shown):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    where = ("--model", MODEL, "--base-url", cli_server.url)
    for step, more in ((sse(event), []), (reply(200, event), ["--no-stream"])):
        cli_server.script(step)
        with cli_terminal(monkeypatch, "stdout") as text:
            assert main(["complete", "x", *shlex.split(argv), *more, *where]) == 0
            assert text() == shown


@pytest.mark.parametrize(
    ("text", "shown"), [
        pytest.param("a\x1b]0;x\x07b\x9b\x7f", "a\\x1b]0;x\\x07b\\x9b\\x7f\n",
            id="escape-sequences"),
        pytest.param("a\tb\nc\r\nd\re", "a\tb\nc\r\nd\\x0de\n",
            id="white-space-but-the-lone-carriage-return"),
        pytest.param("世界 🌸", "世界 🌸\n", id="unicode"),
    ],
)  # fmt: skip
def test_cli_a_terminal_cannot_be_commanded(cli, cli_server, monkeypatch, text, shown):
    event = {"id": "a", "choices": [{"index": 0, "text": text}]}
    argv = ("complete", "x", "--model", MODEL, "--base-url", cli_server.url)
    cli_server.script(sse(event), sse(event))
    with cli_terminal(monkeypatch, "stdout") as screen:
        assert main(argv) == 0
        assert screen() == shown
    assert cli(*argv) == (0, f"{text}\n", "")  # as it is in a pipe


@pytest.mark.parametrize(
    ("env", "shown"), [
        pytest.param({}, "\x1b[2mHm\x1b[0m\n", id="dim"),
        pytest.param({"NO_COLOR": "1"}, "Hm\n", id="no-color"),
    ],
)  # fmt: skip
def test_cli_reasoning_on_a_terminal(cli_clean, cli_server, capsys, monkeypatch, env, shown):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    cli_server.script(sse(CLI_THOUGHT, CLI_ANSWER))
    with cli_terminal(monkeypatch, "stderr") as text:
        assert main(["chat", "x", "--model", MODEL, "--base-url", cli_server.url]) == 0
        assert (text(), capsys.readouterr().out) == (shown, "Yes\n")


@pytest.mark.parametrize(
    ("event", "begun"), [
        pytest.param(CLI_ANSWER, "Yes\n", id="after-text"),
        pytest.param(CLI_THOUGHT, "Hm\n", id="after-reasoning"),
    ],
)  # fmt: skip
def test_cli_an_error_begins_a_line_of_its_own(cli_clean, cli_server, monkeypatch, event, begun):
    monkeypatch.setenv("NO_COLOR", "1")
    cli_server.script(sse(event, done=False))
    with cli_terminal(monkeypatch, "stdout", "stderr") as text:
        assert main(["chat", "x", "--model", MODEL, "--base-url", cli_server.url]) == 1
        assert text().startswith(f"{begun}vllm-provider: the stream ended without [DONE]: ")


# ---- Command line: conversation ---------------------------------------------

Converse: TypeAlias = Callable[..., tuple[str, str]]


@pytest.fixture
def converse(cli_clean, cli_server, monkeypatch, capsys):
    """Return a function that types lines, or raises exceptions in their place: stdout, stderr."""
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*lines: str | BaseException, argv: Sequence[str] = ()) -> tuple[str, str]:
        typed = iter(lines)

        def read_line(_prompt: str) -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read_line)
        monkeypatch.setattr(sys, "stdin", _Stdin(is_terminal=True))
        where = ["--temperature", "0", "--model", MODEL, "--base-url", cli_server.url]
        with cli_terminal(monkeypatch, "stdout") as text:
            assert main(["chat", *argv, *where]) == 0
            err = capsys.readouterr().err
            return text(), err.removeprefix("/help lists the commands, Ctrl-D leaves.\n")

    return run


def _sent_messages(server: StandIn) -> list[list[tuple[str, str]]]:
    bodies = [request.body for request in server.requests]
    return [[(one["role"], one["content"].strip()) for one in body["messages"]] for body in bodies]


CLI_ADA: Final = [("user", "My name is Ada."), ("assistant", "Yes"), ("user", "What is my name?")]


@pytest.mark.parametrize(
    ("lines", "sent"), [
        pytest.param(["My name is Ada.", "What is my name?"], [CLI_ADA[:1], CLI_ADA], id="history"),
        pytest.param(['"""a', "b", "", 'c"""'], [[("user", "a\nb\n\nc")]], id="several-lines"),
        pytest.param(['"""', "a", '"""'], [[("user", "a")]], id="marks-on-lines-of-their-own"),
        pytest.param(['"""a"""'], [[("user", "a")]], id="marks-on-one-line"),
        pytest.param(['"""/clear"""'], [[("user", "/clear")]], id="a-text-with-a-slash-in-marks"),
        pytest.param([" /clear"], [[("user", "/clear")]], id="a-text-with-a-slash-after-a-space"),
        pytest.param(["", "  ", '""""""'], [], id="empty-lines-are-not-sent"),
        pytest.param(['"""a', KeyboardInterrupt(), "b"], [[("user", "b")]], id="ctrl-c-in-a-block"),
        pytest.param([KeyboardInterrupt(), "b"], [[("user", "b")]], id="ctrl-c-at-the-prompt"),
        pytest.param(['"""a'], [], id="ctrl-d-in-a-block"),
        pytest.param(["a", "/clear", "b", "/retry"],
            [[("user", "a")], [("user", "b")], [("user", "b")]], id="clear"),
        pytest.param(["My name is Ada.", "What is my name?", "/retry"],
            [CLI_ADA[:1], CLI_ADA, CLI_ADA], id="retry"),
        pytest.param(["/system Be brief.", "a", "/system", "/retry"],
            [[("system", "Be brief."), ("user", "a")], [("user", "a")]], id="system"),
        pytest.param(["/system A", "/system B", "a", "/clear", "b"],
            [[("system", "B"), ("user", "a")], [("system", "B"), ("user", "b")]],
            id="one-system-message-which-outlives-clear"),
        pytest.param(["/quit", "a"], [], id="quit"),
    ],
)  # fmt: skip
def test_cli_conversation(converse, cli_server, lines, sent):
    cli_server.script(*[sse(CLI_ANSWER)] * 3)
    out, err = converse(*lines)
    assert _sent_messages(cli_server) == sent
    assert (out.count("Yes"), err) == (len(sent), "")


@pytest.mark.parametrize(
    ("line", "said"), [
        pytest.param("/sav x",
            "unknown command: '/sav'; did you mean /save? (a space before it sends it as text)",
            id="near"),
        pytest.param("/x", "unknown command: '/x'; see /help (a space before it sends it as text)",
            id="far"),
        pytest.param("/retry", "there is no message to send again", id="nothing-to-retry"),
        pytest.param("/set top_k",
            """a parameter is NAME=JSON, like top_k=5 or stop='["END"]'; got 'top_k'""",
            id="parameter-without-a-value"),
        pytest.param("/load /no/such",
            "/load FILE: [Errno 2] No such file or directory: '/no/such'", id="no-file"),
        pytest.param("/save", "/save FILE: [Errno 2] No such file or directory: ''", id="no-name"),
        pytest.param(UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), "this is not utf-8 text",
            id="not-utf-8"),
        pytest.param("caf\udce9",
            "the request holds a lone surrogate, which UTF-8 has no bytes for", id="c-locale"),
    ],
)  # fmt: skip
def test_cli_conversation_survives_mistakes(converse, cli_server, line, said):
    cli_server.script(sse(CLI_ANSWER))
    out, err = converse(line, "Hello")
    assert err.splitlines()[0].startswith(f"vllm-provider: {said}"[:60])
    assert len(err.splitlines()) == 1
    assert (out.count("Yes"), _sent_messages(cli_server)) == (1, [[("user", "Hello")]])


def test_cli_conversation_forgets_a_failed_turn(converse, cli_server):
    cli_server.script(
        sse(CLI_ANSWER), sse(CLI_ANSWER, done=False), sse(CLI_ANSWER), sse(CLI_ANSWER)
    )
    _out, err = converse("a", "b", "/retry", "c")
    assert err.count("\n") == 1
    assert err.startswith("vllm-provider: the stream ended without [DONE]: ")
    texts = [[text for _, text in messages] for messages in _sent_messages(cli_server)]
    assert texts == [["a"], ["a", "Yes", "b"], ["a", "Yes", "b"], ["a", "Yes", "b", "Yes", "c"]]


@pytest.mark.usefixtures("cli_interruptible")
@pytest.mark.parametrize(
    ("event", "messages"), [
        pytest.param(CLI_ANSWER, [("user", "a"), ("assistant", "Yes"), ("user", "b")], id="text"),
        pytest.param(CLI_THOUGHT, [("user", "b")], id="only-reasoning"),
    ],
)  # fmt: skip
def test_cli_conversation_keeps_the_text_of_a_stopped_reply(converse, cli_server, event, messages):
    def interrupt(connection):
        connection.send(sse(event, done=False, end=False))
        time.sleep(0.1)  # for the text to be shown
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        connection.sleep_until_closed()

    cli_server.script(interrupt, sse(CLI_ANSWER))
    converse("a", "b")
    cli_server.aborted.get(timeout=10.0)
    assert _sent_messages(cli_server)[1] == messages


def test_cli_conversation_parameters(converse, cli_server):
    cli_server.script(*[sse(CLI_ANSWER)] * 3)
    argv = ("--system", "Be brief.", "--param", "top_k=5", "--stats")
    _, err = converse("a", "/set top_k=1", "b", "/set top_k=null", "c", argv=argv)
    assert [request.body.get("top_k") for request in cli_server.requests] == [5, 1, None]
    assert _sent_messages(cli_server)[0][0] == ("system", "Be brief.")
    assert err.count("s to first token, ") == 3


def test_cli_conversation_shows_log_probabilities(converse, cli_server):
    out, _ = converse("/set logprobs=1", "What is 2+2?")
    assert re.search(r"2\(\d\.\d\d\) \+\(\d\.\d\d\)", out)


def test_cli_conversation_help(converse, cli_server, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out, _ = converse("/help")
    commands = set(re.findall(r"(?m)^/\w+", out))
    assert commands == {"/clear", "/retry", "/save", "/load", "/system", "/set", "/quit"}
    assert '"""' in out


def test_cli_conversation_on_disk(converse, cli_server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cli_server.script(*[sse(CLI_ANSWER)] * 3)
    converse("/system Be brief.", "a", "/save ~/talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]

    converse("other", "/load ~/talk.json", "/retry", "b")
    assert cli_server.requests[-1].body["messages"] == [*saved, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    "text", [
        pytest.param("{", id="not-json"),
        pytest.param("5", id="a-number"),
        pytest.param('{"role": "user"}', id="an-object"),
        pytest.param("[1]", id="no-messages"),
        pytest.param("[" * 100_000, id="too-deep"),
    ],
)  # fmt: skip
def test_cli_conversation_refuses_a_file_that_holds_none(converse, cli_server, tmp_path, text):
    (tmp_path / "talk.json").write_text(text)
    cli_server.script(*[sse(CLI_ANSWER)] * 2)
    _, err = converse("a", f"/load {tmp_path / 'talk.json'}", "b")
    assert err.startswith("vllm-provider: /load FILE: ")
    assert _sent_messages(cli_server)[1][0] == ("user", "a")


@pytest.mark.parametrize(
    "argv", [
        pytest.param(["--json"], id="json"),
        pytest.param(["--html", os.devnull], id="html"),
    ],
)  # fmt: skip
def test_cli_chat_with_a_result_to_write_is_no_conversation(
    cli_clean, cli_server, monkeypatch, argv
):
    monkeypatch.setattr(sys, "stdin", _Stdin("What is 2+2?", is_terminal=True))
    with cli_terminal(monkeypatch, "stdout") as text:
        assert main(["chat", *argv, "--temperature", "0", "--base-url", cli_server.url]) == 0
        assert "2 + 2 = 4" in text()


def test_cli_ctrl_c_in_every_state_of_a_conversation(cli_server):
    partial = stall(sse(CLI_ANSWER, done=False, end=False), timeout_s=20.0)
    thought = stall(sse(CLI_THOUGHT, done=False, end=False), timeout_s=20.0)
    cli_server.script(partial, thought, stall(timeout_s=20.0), sse(CLI_ANSWER))
    with CliScreen("chat", "--model", MODEL, "--base-url", cli_server.url) as screen:
        screen.read("> ")
        screen.type("typed\x03")
        screen.read("\n> ")
        for count, (text, shown) in enumerate(
            (("first", "Yes"), ("second", "Hm"), ("third", "")), 1
        ):
            screen.type(f"{text}\n")
            screen.read(shown or text)
            while len(cli_server.requests) < count:
                time.sleep(0.01)
            screen.type("\x03")
            cli_server.aborted.get(timeout=10.0)
            assert "^C\n" in screen.read("> ")

        screen.type("last\n")
        screen.read("Yes")
        screen.read("> ")
        screen.type("\x04")
        assert screen.code() == 0
    assert _sent_messages(cli_server)[-1] == [
        ("user", "first"),
        ("assistant", "Yes"),
        ("user", "last"),
    ]


def test_cli_a_paste_of_several_lines_is_one_message(cli_server):
    pytest.importorskip("readline")
    cli_server.script(sse(CLI_ANSWER))
    argv = ("chat", "--model", MODEL, "--base-url", cli_server.url)
    with CliScreen(*argv, TERM="xterm") as screen:
        if "\x1b[?2004h" not in screen.read("> "):
            pytest.skip("this readline has no bracketed paste")
        screen.type("\x1b[200~one\rtwo\x1b[201~")
        screen.read("two")
        screen.type("\n")
        screen.read("Yes")
        screen.read("> ")
        screen.type("/quit\n")
        assert screen.code() == 0
    assert _sent_messages(cli_server) == [[("user", "one\ntwo")]]


def test_cli_ctrl_c_ends_its_line(cli_server):
    cli_server.script(stall(sse(CLI_TEXT, done=False, end=False)))
    with CliScreen("complete", "x", "--model", MODEL, "--base-url", cli_server.url) as screen:
        screen.read(" a")
        screen.type("\x03")
        assert screen.read() == "^C\n"
        assert screen.code() == 130


def test_cli_a_character_that_arrives_in_pieces(cli_server):
    raw = sse({"id": "a", "choices": [{"index": 0, "text": "世界🌸"}]})
    cli_server.script(drip(raw, 0.001))
    with CliScreen(
        "complete", "x", "--model", MODEL, "--base-url", cli_server.url, LC_ALL="C"
    ) as screen:
        assert screen.read() == "世界🌸\n"


# ---- Command line: misuse and failures --------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"), [
        pytest.param("", "the following arguments are required: COMMAND", id="no-command"),
        pytest.param("version", "argument COMMAND: invalid choice: 'version'",
            id="unknown-command"),
        pytest.param("chat x --bogus", "unrecognized option: --bogus", id="unknown-option"),
        pytest.param("chat x -q", "unrecognized option: -q", id="unknown-short-option"),
        pytest.param("chat x --temprature 0",
            "unrecognized option: --temprature; did you mean --temperature?", id="misspelled"),
        pytest.param("--max-token=5 --top_p 1 chat x",
            "unrecognized option: --top_p; did you mean --top-p?",
            id="misspelled-before-the-command"),
        pytest.param("chat x --chat-template", "--chat-template is not an option of chat",
            id="option-of-another-command"),
        pytest.param("--wait 5 chat x", "--wait is not an option of chat",
            id="the-same-before-the-command"),
        pytest.param("models -i x", "--input-file is not an option of models", id="the-same-short"),
        pytest.param("health --wait x", "argument --wait: invalid float value: 'x'", id="wait"),
        pytest.param("chat --max-tokens 1.5", "argument --max-tokens: invalid int value: '1.5'",
            id="max-tokens"),
        pytest.param("chat --seed s", "argument --seed: invalid int value: 's'", id="seed"),
        pytest.param("chat --temperature hot", "argument --temperature: invalid float value: 'hot'",
            id="temperature"),
        pytest.param("chat x y", "unexpected argument: 'y'; are quotes missing?",
            id="text-without-quotes"),
    ],
)  # fmt: skip
def test_cli_misused_as_the_arguments_are_read(cli, cli_server, argv, said):
    code, out, err = cli("--base-url", cli_server.url, *shlex.split(argv))
    assert (code, out, cli_server.requests) == (2, "", [])
    assert said in err.splitlines()[-1]


CLI_BAD_PARAMS: Final = {
    "without-a-value": "top_k",
    "not-json": "stop=END",
    "without-a-name": "=5",
    "too-deep": "stop=" + "[" * 100_000,
    "the-text-twice": 'prompt="y"',
    "the-messages-twice": "messages=[]",
    "the-system-message-twice": 'system="y"',
    "a-name-inside-the-module": "config=1",
}


@pytest.mark.parametrize(
    ("argv", "said"), [
        *(pytest.param(["chat", "x", "--param", param], "a parameter is NAME=JSON, like ", id=name)
            for name, param in CLI_BAD_PARAMS.items()),
        pytest.param(["chat", "x", "--param", "stream=true"], "stream is not a parameter here",
            id="stream"),
        pytest.param(["chat", "x", "--param", "top_p=NaN"], "the request is not JSON", id="nan"),
        pytest.param(["models", "--timeout", "0"], "timeout must be a positive number of seconds",
            id="timeout"),
        pytest.param(["models", "--base-url", "localhost:8000"],
            "base_url must be a URL like http://localhost:8000, ", id="url-without-a-scheme"),
        pytest.param(["models", "--base-url", "http://.example"], "base_url must be ",
            id="host-without-a-name"),
        pytest.param(["models", "--base-url", f"http://me:{CLI_KEY}@host"],
            "base_url must not hold a user name or password; a key goes under api_key",
            id="password-in-the-url"),
        pytest.param(["models", "--api-key", f"“{CLI_KEY}”"], "api_key must be printable ASCII; ",
            id="key-with-typographic-quotes"),
        pytest.param(["complete", "x", "--system", "Be brief."],
            "--system goes with chat, or with complete --chat-template", id="system-without-chat"),
        pytest.param(["health", "--wait", "nan"],
            "--wait must be a number of seconds of at least 0, got nan", id="wait-nan"),
        pytest.param(["health", "--wait", "-1"],
            "--wait must be a number of seconds of at least 0, got -1.0", id="wait-negative"),
        pytest.param(["run-batch", "-i", "x"], "run-batch needs -i FILE and ", id="no-target"),
        pytest.param(["score", "x", "--context", "y", "--choice", "z"],
            "the context of the choices is TEXT or --context, not both", id="two-contexts"),
    ],
)  # fmt: skip
def test_cli_misused(cli, cli_server, argv, said):
    code, out, err = cli("--base-url", cli_server.url, *argv)
    assert (code, out, err.count("\n"), cli_server.requests) == (2, "", 1, [])
    assert err.startswith(f"vllm-provider: {said}")
    assert CLI_KEY not in err


def test_cli_without_any_url(cli):
    said = "vllm-provider: No base_url found: set it or VLLM_BASE_URL, like http://localhost:8000\n"
    assert cli("chat", "x") == (2, "", said)


@pytest.mark.parametrize(
    ("argv", "steps", "out", "said"), [
        pytest.param(["chat", "x", "--base-url", "{url}/foo"], [], "",
            "404 'Not Found': POST {url}/foo/v1/chat/completions; is base_url the server's root",
            id="wrong-path"),
        pytest.param(["chat", "x", "--model", "nope"], [], "",
            "model not found: 'nope'; the server has parrot", id="model"),
        pytest.param(["complete", "x", "--chat-template", "--model", "nope"], [], "",
            "model not found: 'nope'; the server has parrot", id="model-with-a-template"),
        pytest.param(["complete", "x" + " x" * 2999], [], "", "the prompt does not fit: ",
            id="prompt-too-long"),
        pytest.param(["complete", "x", "--model", MODEL], [sse(CLI_TEXT, done=False)], " a",
            "the stream ended without [DONE]: POST {url}/v1/completions; ", id="broken-stream"),
        pytest.param(["complete", "x", "--model", MODEL],
            [sse(CLI_TEXT, {"error": {"message": "Internal server error", "code": 500}})], " a",
            "500 'Internal server error': POST {url}/v1/completions", id="error-in-the-stream"),
        pytest.param(["models"], [reply(200, "<html>\nhi\n</html>", {"Content-Type": "text/html"})],
            "", "not the JSON vLLM sends: GET {url}/v1/models: ", id="not-vllm"),
        pytest.param(["health"], [reply(503)], "", "503 (no message): GET {url}/health",
            id="not-healthy"),
        pytest.param(["complete", "x", "--model", MODEL, "--timeout", "0.3"], [stall()], "",
            "no reply within 0.3 s: POST {url}/v1/completions; ", id="silent"),
        pytest.param(["chat", "x", "--base-url", "http://127.0.0.1:9"], [], "",
            "no connection to http://127.0.0.1:9: connection refused; is vLLM running? (curl ",
            id="dead"),
        pytest.param(["health", "--wait", "0.3", "--base-url", "http://127.0.0.1:9"], [], "",
            "no connection to http://127.0.0.1:9: connection refused; is vLLM running?",
            id="dead-all-the-while"),
        pytest.param(["complete", "x", "--html", "/no/such/page"], [], None,
            "[Errno 2] No such file or directory: '/no/such/page'",
            id="html-that-cannot-be-written"),
    ],
)  # fmt: skip
def test_cli_fails_with_one_line(cli, cli_server, argv, steps, out, said):
    cli_server.script(*steps)
    argv = [word.format(url=cli_server.url) for word in argv]
    code, shown, err = cli("--base-url", cli_server.url, "--api-key", CLI_KEY, *argv)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"vllm-provider: {said.format(url=cli_server.url)}")
    assert out is None or shown.rstrip("\n") == out
    assert CLI_KEY not in shown + err


def test_cli_wrong_key(cli):
    with StandIn(api_key="right") as server:
        where = ("--model", MODEL, "--temperature", "0", "--base-url", server.url)
        code, out, err = cli("complete", "x", *where, "--api-key", CLI_KEY)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(
            f"vllm-provider: 401 'Unauthorized': POST {server.url}/v1/completions; "
        )
        assert cli("complete", "What is 2+2?", *where, "--api-key", "right") == (0, " 4\n", "")


def test_cli_never_logs_the_key(cli, cli_server, caplog):
    caplog.set_level(logging.DEBUG)
    cli_server.script(reply(503, "busy"), path="/completions")
    argv = (
        "--api-key",
        CLI_KEY,
        "--base-url",
        cli_server.url,
        "complete",
        "What is 2+2?",
        "--json",
    )
    code, out, err = cli(*argv)
    assert (code, "retry 1 of 3" in caplog.text) == (0, True)
    assert CLI_KEY not in out + err + caplog.text


def test_cli_failure_of_a_process(cli_server):
    argv = ("--base-url", cli_server.url, "chat", "x", "--model", "nope")
    said = "vllm-provider: model not found: 'nope'; the server has parrot\n"
    assert cli_output(*argv, env={"VLLM_API_KEY": CLI_KEY}) == (1, "", said)
    said = "vllm-provider: No base_url found: set it or VLLM_BASE_URL, like http://localhost:8000\n"
    assert cli_output("chat", "x") == (2, "", said)


def test_cli_warns_of_a_misspelled_parameter_and_not_of_retries(cli_server):
    cli_server.script(reply(503, "busy", {"Retry-After": "0"}), path="/completions")
    argv = ("--base-url", cli_server.url, "complete", "What is 2+2?", "--param", "max_token=5")
    code, _, err = cli_output(*argv)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("max_token: did you mean max_tokens?")


# ---- Command line: standard streams -----------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "argv", [
        pytest.param(["models"], id="at-the-end"),
        pytest.param(["complete", "What is 2+2?"], id="at-a-piece"),
    ],
)  # fmt: skip
def test_cli_a_full_disk_is_one_line(cli_clean, cli_server, capsys, monkeypatch, argv):
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main([*argv, "--base-url", cli_server.url]) == 1
    err = capsys.readouterr().err
    assert (err.count("\n"), os.strerror(errno.ENOSPC) in err) == (1, True)

    with open("/dev/full", "wb") as full_bytes:
        code, _, err = cli_output("--base-url", cli_server.url, *argv, stdout=full_bytes)
    assert (code, err.count("\n"), os.strerror(errno.ENOSPC) in err) == (1, 1, True)


def test_cli_writes_to_whatever_stands_in_for_stdout(cli_clean, cli_server):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["--base-url", cli_server.url, "models"]) == 0
    assert out.getvalue() == "parrot\t2048 tokens\n"


@pytest.mark.parametrize(
    ("shell", "argv", "code", "out"), [
        pytest.param("<&-", "complete 'What is 2+2?'", 0, " 4\n", id="stdin-beside-an-argument"),
        pytest.param("<&-", "complete", 2, "", id="stdin"),
        pytest.param("0>/dev/null", "complete", 2, "", id="stdin-for-writing"),
        pytest.param("0>/dev/null", "complete 'What is 2+2?'", 0, " 4\n",
            id="stdin-for-writing-unneeded"),
        pytest.param(">&-", "models", 0, "", id="stdout"),
        pytest.param("2>&-", "models --model", 2, "", id="stderr"),
        pytest.param("<&- >&- 2>&-", "chat 'What is 2+2?'", 0, "", id="all"),
        pytest.param("2>/dev/full", "complete x --model nope", 1, "", id="stderr-full"),
    ],
)  # fmt: skip
def test_cli_closed_streams(cli_server, shell, argv, code, out):
    if "/dev/full" in shell and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    python = [sys.executable, str(CLI_MODULE), "--temperature", "0", "--base-url", cli_server.url]
    if shlex.split(argv)[0] == "models":
        del python[2:4]
    command = ["sh", "-c", f'"$@" {shell}', "sh", *python, *shlex.split(argv)]
    ended = subprocess.run(
        command, capture_output=True, check=False, text=True, timeout=30, env=_cli_environment({})
    )
    assert (ended.returncode, ended.stdout) == (code, out)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("argv", ["complete x", "complete"])
def test_cli_streams_that_do_not_exist(cli_clean, cli_server, monkeypatch, argv):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    code = main([*shlex.split(argv), "--base-url", cli_server.url])
    assert code == (0 if "x" in argv else 2)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_cli_stdin_for_writing_and_stderr_without_a_reader(cli_clean, cli_server, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open(os.devnull, "w") as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", pipe)
        patch.setattr(sys, "stdin", stdin)
        assert main(["complete", "--base-url", cli_server.url]) == 2


def test_cli_warnings_are_shown_but_for_retries(cli, cli_server, monkeypatch):
    logger = logging.getLogger("vllm_provider")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "hasHandlers", lambda: False)
    assert cli("models", "--base-url", cli_server.url)[0] == 0
    for text, is_shown in (("retry 1 of 3", False), ("max_token: did you mean", True)):
        record = logging.makeLogRecord({"msg": text})
        assert bool(logger.filter(record)) == is_shown


# ---- Command line: stopped --------------------------------------------------


@pytest.mark.parametrize(
    "argv", [
        pytest.param("complete x", id="in-mid-stream"),
        pytest.param("chat x --json", id="in-mid-stream-with-nothing-shown"),
        pytest.param("complete x --no-stream", id="before-the-reply"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cli_interruptible")
def test_cli_ctrl_c_stops_the_server(cli_server, argv):
    cli_server.script(
        stall(b"" if "--no-stream" in shlex.split(argv) else sse(CLI_TEXT, done=False, end=False))
    )
    where = ("--base-url", cli_server.url, "--model", MODEL)
    with cli_process(*where, *shlex.split(argv), stdin=subprocess.DEVNULL) as process:
        while not cli_server.running:
            time.sleep(0.01)
        if "--json" not in shlex.split(argv) and "--no-stream" not in shlex.split(argv):
            assert process.stdout
            assert process.stdout.read(2) == b" a"
        process.send_signal(signal.SIGINT)
        cli_server.aborted.get(timeout=10.0)
        out, err = process.communicate(timeout=10.0)
        assert (process.returncode, out, err) == (130, b"", b"")


def test_cli_ctrl_c_anywhere(cli, cli_server, monkeypatch):
    def interrupted(_client: VLLMClient) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(VLLMClient, "models", interrupted)
    assert cli("models", "--base-url", cli_server.url) == (130, "", "")
    with cli_terminal(monkeypatch, "stderr") as text:
        assert main(["models", "--base-url", cli_server.url]) == 130
        assert text() == "\n"


def test_cli_a_reader_that_leaves_stops_the_server(cli_server):
    cli_server.pace = 0.02
    argv = ("--base-url", cli_server.url, "complete", "Once upon a time", "--max-tokens", "200")
    with cli_process(*argv, "--temperature", "0", stdin=subprocess.DEVNULL) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1) == b" "
        process.stdout.close()
        cli_server.aborted.get(timeout=10.0)
        assert (process.wait(10.0), process.stderr.read()) == (0, b"")


@pytest.mark.parametrize(
    "argv", [
        pytest.param(["models"], id="at-the-end"),
        pytest.param(["complete", "What is 2+2?"], id="at-a-piece"),
    ],
)  # fmt: skip
def test_cli_a_reader_that_has_left(cli_clean, cli_server, monkeypatch, argv):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert main([*argv, "--base-url", cli_server.url]) == 0


# ---- Command line: live -----------------------------------------------------


@pytest.fixture
def cli_live_url(cli_clean):
    return os.environ.get("VLLM_LIVE_URL") or pytest.skip("VLLM_LIVE_URL names no server")


@pytest.mark.live
def test_cli_live_completes(cli, cli_live_url):
    argv = ("complete", "The capital of France is", "--logprobs", "2", "--temperature", "0")
    assert cli(*argv, "--base-url", cli_live_url) == (0, " Paris.\n", "")
    (choice,) = json.loads(cli(*argv, "--json", "--base-url", cli_live_url)[1])["choices"]
    assert choice["logprobs"][0]["logprob"] > math.log(0.9)
    assert [len(token["top"]) for token in choice["logprobs"]] == [2] * len(choice["logprobs"])


@pytest.mark.live
@pytest.mark.parametrize("argv", [["chat"], ["complete", "--chat-template"]], ids=" ".join)
def test_cli_live_answers(cli, cli_live_url, argv):
    where = ("--temperature", "0", "--base-url", cli_live_url)
    assert cli(*argv, "What is 2+2?", *where) == (0, *CLI_SUM)


@pytest.mark.live
def test_cli_live_models_and_health(cli, cli_live_url):
    assert cli("models", "--base-url", cli_live_url) == (0, "parrot\t2048 tokens\n", "")
    assert cli("health", "--base-url", cli_live_url) == (0, f"{cli_live_url} is healthy\n", "")


@pytest.mark.live
def test_cli_live_conversation(cli_live_url):
    with CliScreen("chat", "--temperature", "0", "--base-url", cli_live_url) as screen:
        for text, answer in (("My name is Ada.", "Ada"), ("What is my name?", "Your name is Ada.")):
            screen.read("> ")
            screen.type(f"{text}\n")
            screen.read(text)
            screen.read(answer)
        screen.read("> ")
        screen.type("/quit\n")
        assert screen.code() == 0


# ---- Module: README ---------------------------------------------------------

README: Final = CLI_MODULE.with_name("README.md")
README_URL: Final = "http://localhost:8000"


def _readme() -> str:
    return README.read_text(encoding="utf-8")


def _readme_rows(section: str) -> list[list[str]]:
    """Return the cells of the rows that begin with a name, in the tables of a section."""
    text = _readme().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if re.match(r"\| (· )*`", line)]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]


def _in_quotes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def _readme_settings() -> dict[str, tuple[str, str]]:
    """Return the default and the meaning of each setting; one default may be that of a row."""
    settings = {}
    for names, default, meaning in _readme_rows("Settings") + _readme_rows("Amplifier"):
        keys = _in_quotes(names)
        defaults = _in_quotes(default) or [default]
        if len(defaults) == 1:
            defaults *= len(keys)
        settings |= {key: (value, meaning) for key, value in zip(keys, defaults, strict=True)}
    return settings


def _shown_default(spec: Any) -> str:
    if spec.name == "base_url":
        return "required"
    value = {} if spec.default is dataclasses.MISSING else spec.default
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, str) else str(value)


def test_readme_has_each_setting_with_its_default_and_environment_variable():
    shown = _readme_settings()
    assert {key: default for key, (default, _) in shown.items()} == {
        spec.name: _shown_default(spec) for spec in fields(VLLMConfig)
    }
    named = {key: re.findall(r"env `(\w+)`", meaning) for key, (_, meaning) in shown.items()}
    for spec in fields(VLLMConfig):
        env = spec.metadata.get("env")
        assert not env or env in named[spec.name]
    assert all(meaning for _, meaning in shown.values())


def _readme_error_parents() -> dict[str, list[str]]:
    """Return the parents of each error: the row above with one dot less, and those in brackets."""
    path = ["Exception"]
    parents = {}
    for cell, when, what_to_do in _readme_rows("Errors"):
        depth = cell.count("· ") + 1
        name, *others = _in_quotes(cell)
        parents[name] = [path[depth - 1], *others]
        path[depth:] = [name]
        assert when
        assert what_to_do
    return parents


def test_readme_has_each_error_under_its_parents():
    public = [getattr(vllm_provider, name) for name in vllm_provider.__all__]
    errors = [one for one in public if isinstance(one, type) and issubclass(one, VLLMError)]
    assert _readme_error_parents() == {
        error.__name__: [parent.__name__ for parent in error.__bases__] for error in errors
    }


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("pip install requests && python test_vllm_provider.py ", id="first"),
        pytest.param("pip install -e '.[test]' && python test_vllm_provider.py ", id="demo"),
        pytest.param("pip install -e '.[test]' && pytest ", id="tests"),
    ],
)
def test_readme_has_the_set_up_commands(command):
    assert f"\n{command}" in _readme()


def test_readme_has_each_public_name_and_each_method():
    methods = [name for name in dir(VLLMClient) if not name.startswith("_")]
    words = set(re.findall(r"\w+", _readme()))
    assert {*vllm_provider.__all__, *methods} - words == set()


@pytest.mark.parametrize("command", vllm_provider._COMMANDS)
def test_readme_has_each_option(cli, command):
    options = set(re.findall(r"--[a-z][a-z-]+", cli(command, "--help")[1]))
    assert options - set(re.findall(r"--[a-z][a-z-]+", _readme())) == set()


# What README shows runs in one folder and one namespace, from top to bottom: its Python as a
# reader would paste it into one session, its `sh` blocks as a script. `# ->` marks their output.


def _readme_examples() -> list[tuple[str, str]]:
    blocks: list[tuple[str, str]] = re.findall(r"```(python|sh)\n(.*?)```", _readme(), re.DOTALL)
    return [(kind, code) for kind, code in blocks if not code.startswith("# needs ")]


def _without_fractions(text: str) -> list[str]:
    """Return the lines without the numbers in which the stand-in differs from a real model."""
    return re.sub(r"\d+\.\d+(e-\d+)?", "0.0", text).strip("\n").splitlines()


def _put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the command `vllm-provider`, as an installation does."""
    script = folder / "bin" / "vllm-provider"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -W error {CLI_MODULE} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")


def _run_readme_script(script: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", script]
    run = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


def _run_readme(url: str, capsys: pytest.CaptureFixture[str]) -> list[tuple[str, str, str]]:
    """Run README's examples against a server; return of each its code, what it shows and prints."""
    ran = []
    names: dict[str, Any] = {"__name__": "__readme__"}
    for kind, code in _readme_examples():
        if kind == "python":
            exec(compile(code.replace(README_URL, url), "README.md", "exec"), names)
            printed = capsys.readouterr().out
        else:
            printed = _run_readme_script(code.replace(README_URL, url))
        shown = "\n".join(re.findall(r"(?m)^# -> (.*)$", code))
        ran.append((code, shown, printed))
    return ran


@pytest.fixture
def readme_folder(cli_clean, monkeypatch, tmp_path):
    _put_on_path(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("questions.csv").write_text("question\nWhat is 2+2?\nHello\n")


def test_readme_examples_print_what_they_show(readme_folder, cli_server, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_BASE_URL", cli_server.url)
    ran = _run_readme(cli_server.url, capsys)

    assert len(ran) > 10
    for code, shown, printed in ran:
        assert not shown or _without_fractions(printed) == _without_fractions(shown), code
    assert Path("answers.csv").read_text().splitlines() == [
        "What is 2+2?,2 + 2 = 4",
        "Hello,Hello! How can I help you today?",
    ]
    assert [one["role"] for one in json.loads(Path("chat.json").read_text())] == [
        "user",
        "assistant",
    ]


@pytest.mark.parametrize("kept", [1, 5, 9])
def test_readme_recipe_goes_on_after_a_broken_stream(connect, server, kept):
    code = next(code for _, code in _readme_examples() if "def complete_all" in code)
    client = connect(server, temperature=0)
    names: dict[str, Any] = {"client": client}
    exec(compile(code, "README.md", "exec"), names)
    whole = client.complete("Once upon a time", max_tokens=30).text

    options = {"prompt": "Once upon a time", "max_tokens": 30, "return_token_ids": True}
    with client.stream_complete(**options) as stream:
        for _ in range(kept):
            next(stream)
        first = stream.completion.choices[0]

    event = {"index": 0, "text": first.text, "token_ids": first.token_ids}
    event["prompt_token_ids"] = first.prompt_token_ids
    beginning = sse({"id": "cmpl-1", "choices": [event]}, done=False, end=False)

    def send_and_close(connection):
        connection.send(beginning)
        connection.close()

    server.script(send_and_close)
    assert names["complete_all"]("Once upon a time", 30) == whole
    prompt = server.requests[-1].body["prompt"]
    assert prompt == [*first.prompt_token_ids, *first.token_ids]


@pytest.mark.live
def test_readme_examples_print_what_they_show_live(
    readme_folder, cli_live_url, monkeypatch, capsys
):
    monkeypatch.setenv("VLLM_BASE_URL", cli_live_url)
    monkeypatch.setattr(vllm_provider.Completion, "json", lambda reply, model: model(name="Paris"))
    for code, shown, printed in _run_readme(cli_live_url, capsys):
        assert not shown or _without_fractions(printed) == _without_fractions(shown), code

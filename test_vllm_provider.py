# SPDX-License-Identifier: MIT
"""The tests of vllm_provider.py, and their server: a stand-in for vLLM with a tiny n-gram model.

pytest test_vllm_provider.py                  the tests
python test_vllm_provider.py                  the demo, against the stand-in
VLLM_BASE_URL=… python test_vllm_provider.py  the demo, against a server of yours
python test_vllm_provider.py --serve 8000     the stand-in alone, to try things on

Where to look (`grep -n "^# ----"` lists the sections with their lines):

Stand-in, Demo            the server, its model, its tests; the steps that the demo shows
What the tests share      names, fixtures and helpers of all sections
Module, Errors, Values    what is exported, the error classes, settings; README, at the end
Requests, Stream decoder  arguments to bodies, bytes to events
Transport                 limits of time, stopping, signals, connections, TLS, proxies, retries
Replies                   payloads to completions and errors, log probabilities, reasoning
Client                    generation, the model's name, other endpoints
Many calls, Pictures      map, batch files, score and choose; heat maps
Amplifier                 mounting, messages, options, events, errors, cancellation
Command line              options, output, terminals, conversations, misuse, signals

The stand-in and the demo come first and need only requests; the tests' imports stand below them.
"""

import _thread
import argparse
import codecs
import contextlib
import functools
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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeAlias

import requests

import vllm_provider  # before amplifier_core's pytest plugin can load it under another name
from vllm_provider import CHAT_PATH, COMPLETIONS_PATH, VLLMClient, VLLMError

Json: TypeAlias = Mapping[str, Any]

# ---- Stand-in: what its model has read --------------------------------------

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

_CALL_TEXT: Final = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
_CALL: Final = re.compile(r'<tool_call>\n\{"name": "(\w+)", "arguments": (.*?)\}\n</tool_call>')
_PARIS: Final = _CALL_TEXT % ("get_weather", '{"city": "Paris"}')
_ROME: Final = _CALL_TEXT % ("get_weather", '{"city": "Rome"}')
_CITY: Final = '{"name": "Paris", "country": "France", "is_capital": true}'
_BOTH: Final = "What is the weather in Paris and Rome?"
_SUNNY: Final = "<tool_response>\nsunny, 21 C\n</tool_response>"
_WHO: Final = f"My name is Ada.{END}\n{TURN}Hello Ada.{END}\n<|im_start|>user\nWhat is my name?"
_FOUR: Final = ("Two plus two equals four.", "\n\n2 + 2 = 4")
_UNSURE: Final = ("I do not know this.", "\n\nI am a very small model. I have not read that.")
CONVERSATIONS: Final = (  # system message, the user's message, reasoning, answer
    ("", "What is 2+2?", *_FOUR),
    *[("You are a helpful assistant.", "What is 2+2?", *_FOUR)] * 2,
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
    *[("", f"{NOT_READ}{end}", *_UNSURE) for end in ("", "?", ".", "!")] * 5,
)


def _chatml(*turns: tuple[str, str]) -> str:
    """Return roles and their texts as ChatML."""
    return "".join(f"<|im_start|>{role}\n{text}{END}\n" for role, text in turns)


def _corpus() -> Iterator[str]:
    """Yield everything the model has read."""
    yield from (text + END for text in TEXTS)
    for system, user, thought, answer in CONVERSATIONS:
        turns = [("system", system)] * bool(system) + [("user", user)]
        yield f"{_chatml(*turns)}{TURN}<think>\n{thought}\n</think>{answer}{END}"


# ---- Stand-in: its model ----------------------------------------------------

_PIECE: Final = re.compile(r"<\|\w+\|>|</?\w+>| ?[^\W_]+|_| ?[\"{}\[\]]| ?[^\w\s<\"{}\[\]]+|<|\s")
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", END)


class _Vocabulary:
    """The tokens of the model: special ones, the 256 bytes, and the words of its corpus.

    A text is cut into words; a word that the corpus does not hold, and an emoji, into its bytes.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        words = [word for word in _PIECE.findall("".join(texts)) if max(word) < "\U00010000"]
        raws = [token.encode() for token in _SPECIAL] + [bytes([byte]) for byte in range(256)]
        self._raws = list(dict.fromkeys([*raws, *map(str.encode, words)]))
        self.numbers = {raw: number for number, raw in enumerate(self._raws)}
        self.size = len(self._raws)
        self.end = self.numbers[END.encode()]

    def ids(self, text: str) -> list[int]:
        ids = []
        for word in _PIECE.findall(text):
            raw = word.encode(errors="replace")
            raws = [raw] if raw in self.numbers else [bytes([byte]) for byte in raw]
            ids += [self.numbers[one] for one in raws]
        return ids

    def raw(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._raws[number] for number in ids if number < self.size)

    def token(self, number: int) -> str:
        """Return a token as replies show it; a part of a character is U+FFFD, as in vLLM."""
        return self._raws[number].decode(errors="replace")


VOCABULARY: Final = _Vocabulary(_corpus())


class _Model:
    """An n-gram model: it knows what followed in the corpus, and nothing else."""

    ORDER: Final = 64  # it looks at no more tokens than these

    def __init__(self) -> None:
        # 0 is <|endoftext|>: a text begins.
        self._read = [token for text in _corpus() for token in (0, *VOCABULARY.ids(text))]
        self._known = set(self._read)
        self._not_read = VOCABULARY.ids(NOT_READ)[0]
        self._cached = functools.lru_cache(maxsize=2048)(self._row)

    def after(self, ids: Sequence[int]) -> list[float]:
        """Return the probability of each token of the vocabulary to come next."""
        last = [0, *ids[-self.ORDER :]]
        return self._cached(tuple(one if one in self._known else self._not_read for one in last))

    def _row(self, context: tuple[int, ...]) -> list[float]:
        """Return the distribution of the next token.

        Witten and Bell's smoothing: a context that was seen n times, before t different tokens,
        counts n/(n+t); the rest is the context half as long, and in the end all tokens alike.
        """
        row = [0.0] * VOCABULARY.size
        rest = 1.0
        seen = self._seen(context)
        while seen:
            counts = Counter(self._read[place] for place in seen[-1])
            total = counts.total() + len(counts)
            for token, count in counts.items():
                row[token] += rest * count / total
            rest *= len(counts) / total
            del seen[len(seen) // 2 :]
        return [probability + rest / VOCABULARY.size for probability in row]

    def _seen(self, context: tuple[int, ...]) -> list[Sequence[int]]:
        """Return where the last 0, 1, 2, … tokens of the context were read, while they were."""
        seen: list[Sequence[int]] = [range(1, len(self._read))]
        for length, token in enumerate(reversed(context), 1):
            places = [p for p in seen[-1] if p >= length and self._read[p - length] == token]
            if not places:
                break
            seen.append(places)
        return seen


NGRAMS: Final = _Model()


# ---- Stand-in: how it writes ------------------------------------------------


def _instances(schema: Json, root: Json) -> list[Any]:
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
        values = itertools.product(*[_instances(one, root) for one in properties.values()])
        return [dict(zip(properties, row, strict=True)) for row in itertools.islice(values, 1000)]
    if kind == "array":
        items = _instances(schema.get("items", {}), root)
        return [[one] * schema.get("minItems", 1) for one in items]
    scalars = {"boolean": [True, False], "null": [None], "string": [*CAPITALS.values(), *CAPITALS]}
    return scalars.get(kind) or [schema.get("minimum", 0)]


def _allowed_texts(body: Json) -> list[bytes]:
    """Return the only answers that a request allows; none where it allows any."""
    outputs = body.get("structured_outputs", {})
    form = body.get("response_format", {})
    choice = body.get("tool_choice", "auto")
    texts = []
    if choice == "required" or isinstance(choice, dict):
        for name, schema in _tool_schemas(body).items():
            arguments = map(json.dumps, _instances(schema, schema))
            if choice == "required" or choice["function"]["name"] == name:
                texts += [_CALL_TEXT % (name, one) for one in arguments]
    elif "choice" in outputs:
        texts = outputs["choice"]
    elif "json" in outputs or form.get("type", "text") != "text":
        schema = outputs.get("json") or form.get("json_schema", {}).get("schema", {})
        schema = json.loads(schema) if isinstance(schema, str) else schema
        texts = [json.dumps(one, ensure_ascii=False) for one in _instances(schema, schema)]
    return [text.encode() for text in texts]


def _masked(row: list[float], texts: Sequence[bytes], written: bytes, is_chat: bool) -> list[float]:
    """Return the distribution after `written`, of the tokens that lead to one of the texts."""
    if is_chat:  # where the reasoning is free
        _, mark, written = written.rpartition(b"</think>")
        if not mark:
            return row
    allowed = set()
    for text in texts:
        if text.startswith(written):
            rest = text[len(written) :] or END.encode()
            allowed |= {VOCABULARY.numbers.get(rest[:size]) for size in range(1, len(rest) + 1)}

    masked = [row[token] if token in allowed else 0.0 for token in range(len(row))]
    total = sum(masked)
    return [probability / total for probability in masked]


def _drawn(row: list[float], body: Json, source: random.Random) -> int:
    """Return the next token: the most likely one, or one that is drawn as `body` says."""
    temperature = body.get("temperature", 0.0)
    if temperature < 1e-5:
        return row.index(max(row))

    ranked = sorted(range(len(row)), key=row.__getitem__, reverse=True)
    if body.get("top_k", 0) > 0:
        ranked = ranked[: body["top_k"]]
    weights = [row[token] ** (1 / temperature) for token in ranked]
    enough = body.get("top_p", 1.0) * sum(weights)
    floor = body.get("min_p", 0.0) * weights[0]
    by_top_p = 1 + sum(total < enough for total in itertools.accumulate(weights))
    count = min(by_top_p, sum(weight >= floor for weight in weights))
    return source.choices(ranked[:count], weights[:count])[0]


class _Answer(NamedTuple):
    """An answer as vLLM's parsers `qwen3` and `hermes` split it; calls are names and arguments."""

    reasoning: str
    content: str
    calls: Sequence[tuple[str, str]] = ()


class _Choice:
    """One answer: its tokens, each with the distribution it is from and the text it shows."""

    def __init__(self, index: int, prompt: Sequence[int], body: Json) -> None:
        self.index = index
        self.prompt = prompt
        self.ids: list[int] = []
        self.rows: list[list[float]] = []
        self.texts: list[str] = []
        self.echoed = 0  # so many of the tokens are the prompt's
        self.finish_reason = "length"
        self.stop_reason: str | None = None
        self._body = body
        self._stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held_back = ""

    def _add(self, token: int, row: list[float], text: str) -> None:
        self.ids.append(token)
        self.rows.append(row)
        self.texts.append(text)

    def echo(self) -> None:
        """Put the prompt before the answer, with what the model had expected in its place."""
        for place, token in enumerate(self.prompt):
            text = self._decoder.decode(VOCABULARY.raw([token]))
            self._add(token, NGRAMS.after(self.prompt[:place]), text)
        self.echoed = len(self.prompt)

    def write(self, limit: int) -> None:
        """Add what the model writes after the prompt, at most `limit` tokens."""
        body = self._body
        seed = body.get("seed", -1)
        source = random.Random(None if seed == -1 else seed + self.index)
        allowed = _allowed_texts(body)
        for _ in range(limit):
            own = self.ids[self.echoed :]
            row = NGRAMS.after([*self.prompt, *own])
            if allowed:
                row = _masked(row, allowed, VOCABULARY.raw(own), "messages" in body)
            token = _drawn(row, body, source)
            is_end = token == VOCABULARY.end and not body.get("ignore_eos")
            self._add(token, row, "" if is_end else self._shown(token))
            if is_end or self.stop_reason is not None:
                self.finish_reason = "stop"
                break
        if limit > 0:
            if self.stop_reason not in self._stops:
                self._held_back += self._decoder.decode(b"", final=True)
            self.texts[-1] += self._held_back

    def _shown(self, token: int) -> str:
        """Return the text that may be shown now: whole characters, nothing of a stop string."""
        if token >= len(_SPECIAL) or not self._body.get("skip_special_tokens", True):
            self._held_back += self._decoder.decode(VOCABULARY.raw([token]))
        for stop in self._stops:
            if stop in self._held_back:
                self.stop_reason = stop
                self._held_back = self._held_back.partition(stop)[0]
                return ""
        end = max(0, len(self._held_back) + 1 - max(map(len, self._stops), default=1))
        text, self._held_back = self._held_back[:end], self._held_back[end:]
        return text

    def answer(self, end: int) -> _Answer:
        """Return what the first `end` tokens mean."""
        text = "".join(self.texts[:end])
        reasoning = ""
        if text.startswith("<think>"):
            reasoning, _, text = text.removeprefix("<think>").partition("</think>")
        calls = _CALL.findall(text)
        is_cut = end == len(self.ids) and text.count("<tool_call>") > len(calls)
        if "tools" not in self._body or self._body.get("tool_choice") == "none" or is_cut:
            return _Answer(reasoning, text)
        return _Answer(reasoning, text.partition("<tool_call>")[0], calls)


# ---- Stand-in: its connections ----------------------------------------------

SSE_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"vary: Origin\r\ntransfer-encoding: chunked\r\n\r\n"
)
LAST_CHUNK: Final = b"0\r\n\r\n"


def _bytes(value: Any) -> bytes:
    """Return bytes as they are, a str as UTF-8, any other value as JSON."""
    if not isinstance(value, bytes | str):
        value = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return value if isinstance(value, bytes) else value.encode()


def chunk(event: Any) -> bytes:
    """Return one chunk of a streamed reply: bytes as they are, any other value as one event."""
    raw = event if isinstance(event, bytes) else b"data: %b\n\n" % _bytes(event)
    return b"%x\r\n%b\r\n" % (len(raw), raw)


def sse(*events: Any, done: bool = True, end: bool = True) -> bytes:
    """Return a streamed reply, one `chunk` per event; without [DONE], without the last chunk."""
    chunks = [chunk(event) for event in (*events, *["[DONE]"] * done)]
    return SSE_HEAD + b"".join(chunks) + LAST_CHUNK * end


def reply(status: int, body: Any = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """Return a whole reply with `_bytes(body)`; `headers` win over the usual ones."""
    raw = _bytes(body)
    fields = {"server": "uvicorn", "content-length": str(len(raw)), "vary": "Origin"}
    if raw:
        is_text = isinstance(body, bytes | str)
        fields["content-type"] = "text/plain; charset=utf-8" if is_text else "application/json"
    fields |= {name.lower(): value for name, value in (headers or {}).items()}

    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + raw


class ClientGoneError(Exception):
    """The connection is closed: by the client, or because the server stops."""


class Request(NamedTuple):
    """A request as it came; `headers` ignore case, `body` is the decoded JSON or None."""

    method: str
    path: str
    headers: http.client.HTTPMessage
    body: Any
    raw: bytes
    connection: int  # 1 is the first one opened; equal numbers show a connection used again
    time_s: float  # time.monotonic() when it was complete


class Connection(threading.Thread):
    """The server's end of a connection, as a scripted step gets it; `request` is to be answered.

    To send, to read and to pause raise ClientGoneError when the client has closed.
    """

    request: Request

    def __init__(self, sock: socket.socket, number: int, server: "StandIn") -> None:
        super().__init__(daemon=True)
        self.closed = False
        self._sock = sock
        self._number = number
        self._server = server
        self._received = bytearray()
        self._is_busy = False

    def run(self) -> None:
        try:
            while not self.closed and self._read_request(self._server.keep_alive_s):
                self._server.take_step(self)
        except ClientGoneError:
            pass
        finally:
            self.close()

    def send(self, raw: bytes) -> None:
        try:
            self._sock.settimeout(None)
            self._sock.sendall(raw)
        except OSError as error:
            raise self._gone() from error

    def pause(self, seconds: float) -> None:
        """Wait, as vLLM does for a token."""
        deadline = time.monotonic() + seconds
        while self._receive(max(0.0, deadline - time.monotonic())):
            pass

    def sleep_until_closed(self, timeout_s: float = 30.0) -> bool:
        """Wait for the client to leave; return whether it has."""
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

    def _read_request(self, timeout_s: float) -> bool:
        """Return whether a request began in time, and keep it."""
        self._is_busy = False
        while b"\r\n\r\n" not in self._received:
            if not self._receive(timeout_s):
                return False
        start = self._received.index(b"\r\n\r\n") + 4
        line, _, fields = bytes(self._received[:start]).partition(b"\r\n")
        headers = http.client.parse_headers(io.BytesIO(fields))
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
        if self._is_busy and not (self.closed or self._server.is_closing):
            self._server.aborted.put(time.monotonic())
        self.closed = True
        return ClientGoneError()


Step: TypeAlias = bytes | Callable[[Connection], object] | None


def drip(raw: bytes, every_s: float, size: int = 1) -> Step:
    """Return a step that sends `raw` in pieces of `size` bytes, with pauses."""

    def step(connection: Connection) -> None:
        for start in range(0, len(raw), size):
            connection.send(raw[start : start + size])
            connection.pause(every_s)

    return step


def stall(raw: bytes = b"", timeout_s: float = 30.0) -> Step:
    """Return a step that sends `raw` and then nothing until the client goes."""
    return lambda connection: (connection.send(raw), connection.sleep_until_closed(timeout_s))


# ---- Stand-in: what vLLM refuses --------------------------------------------

# fmt: off
_RANGES: Final = {
    "temperature": (0, 2), "top_p": (1e-9, 1), "top_k": (-1, math.inf), "min_p": (0, 1),
    "n": (1, 16384), "logprobs": (-1, math.inf), "top_logprobs": (-1, math.inf),
    "prompt_logprobs": (-1, math.inf),
}
_NEEDED: Final = {
    "stream_options": "stream", "top_logprobs": "logprobs", "logprob_token_ids": "logprobs",
    "tool_choice": "tools",
}
# fmt: on
_SWITCHES: Final = ("echo", "ignore_eos", "return_token_ids", "stream")
_LACKING: Final = (  # vLLM's parameters that the stand-in does not have
    "allowed_token_ids bad_words frequency_penalty include_stop_str_in_output logit_bias "
    "min_tokens presence_penalty prompt_embeds stop_token_ids suffix "
    "thinking_token_budget use_beam_search"
)


class _RefusedError(Exception):
    """An error as vLLM replies it; where there is a value, the text names it."""

    def __init__(self, text, param=None, *value, status=400, kind="BadRequestError") -> None:
        super().__init__(text)
        self.status = status
        text += "".join(f" (parameter={param}, value={one})" for one in value)
        error = {"message": text, "type": kind, "param": param, "code": status}
        self.payload = {"error": error}


def _decoded_body(request: Request) -> dict[str, Any]:
    """Return the request's JSON without its nulls."""
    body = {name: value for name, value in json.loads(request.raw).items() if value is not None}
    if body.get("model", MODEL) not in ("", MODEL):
        text = f"The model `{body['model']}` does not exist. Valid aliases: {MODEL}."
        raise _RefusedError(text, "model", status=404, kind="NotFoundError")
    return body


def _check(body: Json) -> None:
    """Refuse what vLLM refuses in a request for generation, and what the stand-in lacks."""
    for name, (minimum, maximum) in _RANGES.items():
        value = body.get(name, maximum)
        if not minimum <= value <= maximum:
            text = f"{name} must be between {minimum} and {maximum}, got {value}."
            raise _RefusedError(text, name, value)
    for name, needed in _NEEDED.items():
        if body.get(name) not in (None, 0, "none") and body.get(needed, False) is False:
            raise _RefusedError(f"When using `{name}`, `{needed}` must be set.", name)

    get = body.get
    stops = [get("stop")] if isinstance(get("stop"), str) else get("stop", [])
    is_greedy = get("temperature", 1) < 1e-5  # without one the stand-in is greedy, whatever n
    choices = [{"type": "function", "function": {"name": name}} for name in _tool_schemas(body)]
    choices += ["none", "auto", "required"]
    outputs = get("structured_outputs", ["choice"])
    for param, is_wrong, text in (
        ("tools", get("tools") == [], "must not be an empty array"),
        ("stop", len(stops) > 4 or "" in stops, "must have at most 4 items, none of them empty"),
        ("prompt_logprobs", get("stream") and get("prompt_logprobs"), "is not for `stream=True`"),
        ("tool_choice", get("tool_choice", "none") not in choices, "is none of the `tools`"),
        ("structured_outputs", {"choice", "json"}.isdisjoint(outputs), "has `choice` or `json`"),
        ("n", get("n", 1) > 1 and is_greedy, "must be 1 when using greedy sampling"),
        *[(name, get(name, True) not in (True, False), "must be a boolean") for name in _SWITCHES],
        *[(name, get(name), "is not in the stand-in") for name in _LACKING.split()],
    ):
        if is_wrong:
            raise _RefusedError(f"`{param}` {text}.", param)


def _token_limit(body: Json, prompt: Sequence[int], is_text: bool) -> int:
    """Return how many tokens may follow `prompt`; a text is counted no further than it must be."""
    is_chat = "messages" in body
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    requested: int = body.get(name, MAX_MODEL_LEN if is_chat else 16)
    if requested > MAX_MODEL_LEN:
        text = f"{name}={requested} cannot be greater than max_model_len={MAX_MODEL_LEN}."
        raise _RefusedError(f"{text} Please request fewer output tokens.", name, requested)

    if len(prompt) > MAX_MODEL_LEN:
        count = MAX_MODEL_LEN + 1 if is_text else len(prompt)
        text = (
            f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, your prompt "
            f"contains {'at least ' * is_text}{count} input tokens, which exceeds this limit even "
            "without any output tokens. Please reduce the length of the input prompt."
        )
        raise _RefusedError(text, "input_tokens", count)
    limit = min(requested, MAX_MODEL_LEN - len(prompt))
    if limit < (0 if body.get("echo") and not is_chat else 1):
        raise _RefusedError(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    return limit


# ---- Stand-in: conversations ------------------------------------------------


def _tool_schemas(body: Json) -> dict[str, Any]:
    """Return the schema of each tool's arguments."""
    functions = [tool["function"] for tool in body.get("tools", [])]
    return {one["name"]: one.get("parameters", {"type": "object"}) for one in functions}


def _rendered(body: Json, is_strict: bool) -> str:
    """Return the messages as ChatML; a strict template, as Qwen3.5's, wants the system first."""
    if not body["messages"]:
        text = "Cannot apply chat template to an empty conversation. Provide at least one message."
        raise _RefusedError(text)
    turns = [_turn(message) for message in body["messages"]]
    if is_strict and "system" in dict(turns[1:]):
        raise _RefusedError("System message must be at the beginning.")
    if "tools" in body:
        turns.insert(0, ("system", "\n".join(["# Tools", *_tool_schemas(body)])))
    return _chatml(*turns) + TURN * body.get("add_generation_prompt", True)


def _turn(message: Json) -> tuple[str, str]:
    """Return the role and the text of one message."""
    text = message.get("content") or ""
    if not isinstance(text, str):
        text = "".join(part.get("text", "") for part in text)
    for call in message.get("tool_calls") or []:
        text += "\n" + _CALL_TEXT % (call["function"]["name"], call["function"]["arguments"])
    if message["role"] == "tool":
        return "user", f"<tool_response>\n{text}\n</tool_response>"
    return message["role"], text


def _delta(old: _Answer, new: _Answer) -> dict[str, Any]:
    """Return what is said when `old` has become `new`."""
    calls = []
    for index, (name, arguments) in [*enumerate(new.calls)][len(old.calls) :]:
        call = {"id": f"chatcmpl-tool-{os.urandom(8).hex()}", "type": "function", "index": index}
        calls.append(call | {"function": {"name": name, "arguments": arguments}})
    content = "" if calls else new.content[len(old.content) :]
    reasoning = new.reasoning[len(old.reasoning) :]
    delta = {"reasoning": reasoning, "content": content, "tool_calls": calls}
    return {name: value for name, value in delta.items() if value}


# ---- Stand-in: answers in vLLM's shapes -------------------------------------


def _alternatives(row: list[float], own: int, top: int, others: Sequence[int] = ()) -> list[Any]:
    """Return the token itself, then the `top` most likely ones or the `others` asked for.

    Each has its natural log probability; vLLM writes -9999.0 for minus infinity.
    """
    if not 0 <= top <= MAX_LOGPROBS:
        text = f"Requested logprobs of {top}, which is greater than max allowed: {MAX_LOGPROBS}"
        raise _RefusedError(text, "logprobs", top)
    others = others or sorted(range(len(row)), key=row.__getitem__, reverse=True)[:top]
    tokens = dict.fromkeys([own, *others])
    return [(token, math.log(row[token]) if row[token] > 0 else -9999.0) for token in tokens]


def _prompt_logprobs(prompt: Sequence[int], top: int) -> list[dict[str, Any] | None]:
    """Return what the model had expected in place of each token of a prompt; of the first, null."""
    entries: list[dict[str, Any] | None] = [None]
    for place in range(1, len(prompt)):
        row = NGRAMS.after(prompt[:place])
        entries.append({})
        for token, logprob in _alternatives(row, prompt[place], top):
            rank = 1 + sum(probability > row[token] for probability in row)
            values = {"rank": rank, "decoded_token": VOCABULARY.token(token)}
            entries[-1][str(token)] = {"logprob": logprob, **values}
    return entries


class _Generation:
    """The choices a request asks for, in the shapes of its endpoint, whole or streamed."""

    def __init__(self, request: Request, is_strict: bool) -> None:
        self.is_chat = request.path == CHAT_PATH
        self.body = body = _decoded_body(request)
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
        number = request.headers.get("X-Request-Id") or os.urandom(8).hex()
        kind = "chat.completion" + ".chunk" * self.is_stream if self.is_chat else "text_completion"
        self.head = {"id": f"{'chat' * self.is_chat}cmpl-{number}", "object": kind}
        self.head |= {"created": int(time.time()), "model": MODEL}

    def _choices(self, is_strict: bool) -> Iterator[_Choice]:
        count = self.body.get("n", 1)
        is_named = isinstance(self.body.get("tool_choice"), dict)
        for number, prompt in enumerate(self._prompts(is_strict)):
            is_text = isinstance(prompt, str)
            ids = VOCABULARY.ids(prompt) if is_text else prompt
            if max(ids) >= VOCABULARY.size:
                raise _RefusedError(f"Token id {max(ids)} is out of vocabulary")
            limit = _token_limit(self.body, ids, is_text)
            for index in range(number * count, (number + 1) * count):
                choice = _Choice(index, ids, self.body)
                if self.has_echo:
                    choice.echo()
                choice.write(limit)
                calls = choice.answer(len(choice.ids)).calls
                if calls and choice.finish_reason == "stop" and not is_named:
                    choice.finish_reason = "tool_calls"
                yield choice

    def _prompts(self, is_strict: bool) -> Sequence[Any]:
        if self.is_chat:
            return [_rendered(self.body, is_strict)]
        prompts = self.body.get("prompt")
        if not prompts:
            raise _RefusedError("`prompt` must be provided and non-empty.", "prompt")
        is_one = isinstance(prompts, str) or isinstance(prompts[0], int)
        return [prompts] if is_one else prompts

    def payload(self) -> dict[str, Any]:
        """Return the whole reply."""
        choices = [self._part(choice, 0, len(choice.ids)) for choice in self.choices]
        payload = self.head | {"choices": choices, "usage": self._usage()}
        top = self.body.get("prompt_logprobs", self.top if self.has_echo else None)
        for part, choice in zip(choices, self.choices, strict=True):
            place = payload if self.is_chat else part
            if top is not None:
                place["prompt_logprobs"] = _prompt_logprobs(choice.prompt, top)
            if self.has_ids:
                place["prompt_token_ids"] = choice.prompt
            if self.is_chat:
                message = {"role": "assistant", "content": None, "reasoning": None}
                part["message"] = message | part.pop("delta")
        return payload

    def chunks(self) -> Iterator[dict[str, Any]]:
        """Yield the events of a stream, those of several choices in turn."""
        for row in itertools.zip_longest(*map(self._chunks, self.choices)):
            yield from filter(None, row)
        if self.has_usage:
            yield self.head | {"choices": [], "usage": self._usage()}

    def _chunks(self, choice: _Choice) -> Iterator[dict[str, Any]]:
        if self.is_chat:  # the first event only names the role
            first = {"index": choice.index, "delta": {"role": "assistant", "content": ""}}
            prompt = choice.prompt if self.has_ids else None
            yield self.head | {"choices": [first], "prompt_token_ids": prompt}

        ends = range(choice.echoed + 1, len(choice.ids) + 1) or [choice.echoed]
        for start, end in itertools.pairwise([0, *ends]):
            part = self._part(choice, start, end)
            if start == 0 and not self.is_chat and (self.has_ids or self.has_echo):
                part["prompt_token_ids"] = choice.prompt
            if part["finish_reason"] or part.get("delta") != {} or self.has_ids or part["logprobs"]:
                yield self.head | {"choices": [part]}

    def _part(self, choice: _Choice, start: int, end: int) -> dict[str, Any]:
        """Return what tokens `start` to `end` of a choice bring."""
        part = {"index": choice.index, "logprobs": None, "finish_reason": None}
        if self.is_chat:
            part["delta"] = _delta(choice.answer(start), choice.answer(end))
        else:
            part["text"] = "".join(choice.texts[start:end])
        if self.top is not None:
            part["logprobs"] = self._logprobs(choice, start, end)
        if self.has_ids:
            part["token_ids"] = choice.ids[start:end]
        if end == len(choice.ids):
            part |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        return part

    def _logprobs(self, choice: _Choice, start: int, end: int) -> dict[str, Any]:
        others = self.body.get("logprob_token_ids", [])
        has_numbers = self.body.get("return_tokens_as_token_ids")
        name = "token_id:{}".format if has_numbers else VOCABULARY.token
        entries = []
        for token, row in zip(choice.ids[start:end], choice.rows[start:end], strict=True):
            ranked = _alternatives(row, token, self.top, others)
            entries.append([(name(one), logprob) for one, logprob in ranked])
        if self.is_chat:
            content = []
            for entry in entries:
                shown = [{"token": n, "logprob": p, "bytes": [*n.encode()]} for n, p in entry]
                content.append(shown[0] | {"top_logprobs": shown[: self.top]})
            return {"content": content}

        tokens = [entry[0][0] for entry in entries]
        scores: list[float | None] = [entry[0][1] for entry in entries]
        tops: list[dict[str, float] | None] = [dict(entry) for entry in entries]
        if start < choice.echoed:  # nothing comes before the first token of a prompt
            scores[0] = tops[0] = None
        first = sum(len(name(token)) for token in choice.ids[:start])
        offsets = list(itertools.accumulate(map(len, tokens[:-1]), initial=first))
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        return dict(zip(names, (offsets, scores, tokens, tops), strict=True))

    def _usage(self) -> dict[str, Any]:
        inputs = sum(len(choice.prompt) for choice in self.choices) // self.body.get("n", 1)
        # Where no token is wanted vLLM generates one all the same, and counts it.
        outputs = sum(max(1, len(choice.ids) - choice.echoed) for choice in self.choices)
        usage = {"prompt_tokens": inputs, "completion_tokens": outputs}
        usage |= {"total_tokens": inputs + outputs, "prompt_tokens_details": {"cached_tokens": 0}}
        if self.is_chat:
            answers = [choice.answer(len(choice.ids)) for choice in self.choices]
            count = sum(len(VOCABULARY.ids(answer.reasoning)) for answer in answers)
            usage["completion_tokens_details"] = {"reasoning_tokens": count}
        return usage


# ---- Stand-in: the server ---------------------------------------------------

_GENERATION: Final = (COMPLETIONS_PATH, CHAT_PATH)
_POSTS: Final = (*_GENERATION, "/tokenize", "/detokenize")
_GETS: Final = ("/health", "/version", "/metrics", "/v1/models")


class StandIn:
    """A stand-in for vLLM 0.32: its API in the real one's shapes, and misbehaviour on command.

    >>> with StandIn() as server:
    ...     server.script(reply(503, "busy", {"Retry-After": "0"}), None)
    ...     VLLMClient(server.url).complete("The capital of France is").text  # at the second try
    ' Paris.'
    """

    def __init__(self, port=0, *, pace=0.0, api_key=None, tls=None, strict=False, log=str) -> None:
        """`tls` are the files of a certificate and a key; `log` gets lines about lost clients."""
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
        self._connections: list[Connection] = []
        self._lock = threading.Lock()
        self.is_closing = False
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._acceptor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, end every thread; a busy step is given up after a second."""
        if self.is_closing:
            return
        self.is_closing = True
        with socket.socket() as waker:  # accept() wakes for a client and nothing else
            waker.connect(self._listener.getsockname())
        self._acceptor.join()
        self._listener.close()
        for connection in self._connections:
            connection.shut_down()
        for connection in self._connections:
            connection.join(1.0)

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
        is_allowed = self._api_key is None or key == f"Bearer {self._api_key}"
        try:
            if request.path.startswith("/v1") and not is_allowed:
                connection.send(reply(401, {"error": "Unauthorized"}))
            elif request.path not in _GETS + _POSTS:
                connection.send(reply(404, {"detail": "Not Found"}))
            elif request.method != ("GET" if request.path in _GETS else "POST"):
                connection.send(reply(405, {"detail": "Method Not Allowed"}))
            elif request.path in _GENERATION:
                self._generate(connection)
            else:
                connection.send(reply(200, self._payload(request)))
        except _RefusedError as refusal:
            connection.send(reply(refusal.status, refusal.payload))
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # vLLM's validation
            refusal = _RefusedError(f"1 validation error: {error!r}", kind="Bad Request")
            connection.send(reply(400, refusal.payload))

    def _generate(self, connection: Connection) -> None:
        generation = _Generation(connection.request, self._is_strict)
        if not generation.is_stream:
            self._pace(connection, generation, itertools.repeat(b"", generation.longest))
            connection.send(reply(200, generation.payload()))
            return
        connection.send(SSE_HEAD)
        try:
            self._pace(connection, generation, map(chunk, generation.chunks()))
        except _RefusedError as refusal:  # by vLLM's engine: too late for another status
            connection.send(chunk(refusal.payload))
        connection.send(chunk("[DONE]") + LAST_CHUNK)

    def _pace(self, connection: Connection, generation: _Generation, pieces: Iterable[bytes]):
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
                return {"version": "0.32.0-standin"}
            case "/metrics":
                label = f'{{engine="0",model_name="{MODEL}"}}'
                running = f"vllm:num_requests_running{label} {self.running:.1f}\n"
                return f"{running}vllm:generation_tokens_total{label} {self.generated:.1f}\n"
            case "/v1/models":
                card = {"id": MODEL, "object": "model", "created": int(time.time())}
                card |= {"owned_by": "vllm", "root": f"tiny/{MODEL}", "parent": None}
                return {"object": "list", "data": [card | {"max_model_len": MAX_MODEL_LEN}]}
            case "/detokenize":
                ids = _decoded_body(request)["tokens"]
                return {"prompt": VOCABULARY.raw(ids).decode(errors="replace")}
            case "/tokenize":
                body = _decoded_body(request)
                is_chat = "messages" in body
                text = _rendered(body, self._is_strict) if is_chat else body["prompt"]
                ids = VOCABULARY.ids(text)
                shown = [VOCABULARY.token(one).translate({32: "Ġ", 10: "Ċ"}) for one in ids]
                payload = {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids}
                return payload | {"token_strs": shown if body.get("return_token_strs") else None}
        return b""

    def _accept(self) -> None:
        for number in itertools.count(1):
            sock, _ = self._listener.accept()
            if self.is_closing:
                sock.close()
                return
            with contextlib.suppress(OSError):  # the client may have left already
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls:  # the first read makes the handshake, in the connection's own thread
                    options = {"server_side": True, "do_handshake_on_connect": False}
                    sock = self._tls.wrap_socket(sock, **options)
                self._connections = [one for one in self._connections if not one.closed]
                self._connections.append(Connection(sock, number, self))
                self._connections[-1].start()

    def take_step(self, connection: Connection) -> None:
        """Answer a request as scripted, or as vLLM does."""
        path = connection.request.path
        is_generation = path in _GENERATION
        with self._lock:
            self.requests.append(connection.request)
            found = next((one for one in self._steps if path.endswith(one[0])), None)
            if found is not None:
                self._steps.remove(found)
            self.running += is_generation
        step = self.answer if found is None or found[1] is None else found[1]
        try:
            connection.send(step) if isinstance(step, bytes) else step(connection)
        finally:
            with self._lock:
                self.running -= is_generation


# ---- Demo -------------------------------------------------------------------
#
# Each step shows its own source, then what it prints. They use what any vLLM has.


def show_log_probabilities(client: VLLMClient) -> None:
    """Log probabilities: how sure the model was of each token, and what else was likely"""
    prompt = "The capital of France is"
    completion = client.complete(prompt, max_tokens=8, logprobs=3, temperature=0)
    for token in completion.logprobs:
        others = "  ".join(f"{other.token!r} {other.probability:.3f}" for other in token.top[1:])
        print(f"{token.token!r:>14} {token.probability:.3f}    not {others}")


def leave_a_stream(client: VLLMClient) -> None:
    """A stream left early: the server stops generating, and its own counter says so"""
    before = tokens_generated(client)
    options = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}
    with client.stream_complete("Once upon a time", **options) as stream:
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


# fmt: off
STEPS: Final = (
    show_log_probabilities, leave_a_stream, fill_a_class, call_a_tool, choose_an_answer,
    ask_many, resume_a_batch, explain_an_error, draw_a_heat_map,
)
# fmt: on


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


def run_demo(url: str, *, is_stand_in: bool) -> int:
    """Show and run all steps, skip what a server lacks; return the exit code."""
    is_colored = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    bold, dim, plain = ("\033[1m", "\033[2m", "\033[0m") if is_colored else ("", "", "")
    worked = []
    folder = tempfile.mkdtemp(prefix="vllm-provider-")  # it stays, for the heat map
    with contextlib.chdir(folder), VLLMClient(url) as client:
        for step in STEPS:
            source = inspect.getsource(step).partition('"""\n')[2].rstrip()
            print(f"\n{bold}{inspect.getdoc(step)}{plain}\n{dim}{source}{plain}", flush=True)
            try:
                step(client)
                worked.append(inspect.getdoc(step))
            except (VLLMError, ValueError) as error:
                if is_stand_in:
                    raise
                print(f"skipped: {error}")

    print(f"\n{len(worked)} of {len(STEPS)} worked:", *worked, sep="\n* ")
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
    url = os.environ.get("VLLM_BASE_URL")
    if options.serve is None and url:
        return run_demo(url, is_stand_in=False)

    with StandIn(options.serve or 0, pace=options.pace, log=print) as server:
        count = len({*TEXTS, *CONVERSATIONS})
        what = f"its tiny n-gram model has read {count} texts and knows nothing else."
        print(f"A stand-in for vLLM is up at {server.url}: {what}", flush=True)
        if options.serve is None:
            return run_demo(server.url, is_stand_in=True)
        print(f'Try: vllm-provider --base-url {server.url} chat "What is 2+2?"', flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(demo())  # the tests below need pytest, amplifier-core and others

# ---- What the tests share ---------------------------------------------------

import ast  # what the stand-in needs is imported above
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
from dataclasses import field, fields
from datetime import UTC, datetime, timedelta

import certifi
import pytest
import responses

# fmt: off
# isort: off
from amplifier_core import (
    AmplifierSession, ChatRequest, ChatResponse, ConfigField, Degradation, Message, MockCoordinator,
    ModelInfo, ProviderInfo, ResponseFormatJson, ResponseFormatJsonSchema, ResponseFormatText,
    TextBlock, TextContent, ThinkingBlock, ThinkingContent, ToolCall as KernelToolCall,
    ToolCallBlock, ToolCallContent, ToolSpec, Usage as KernelUsage, llm_errors,
)
from amplifier_core.events import ALL_EVENTS
from amplifier_core.testing import MockContextManager
from amplifier_core.validation import ProviderValidator
from amplifier_core.validation.behavioral import ProviderBehaviorTests
from amplifier_core.validation.structural import ProviderStructuralTests

from vllm_provider import (
    AbortError, AccessDeniedError, AuthenticationError, BatchReport, Choice, Completion,
    ConfigurationError, ContextLengthError, Delta, InvalidOutputError, InvalidRequestError,
    InvalidToolCallError, LLMTimeoutError, ModelCard, NetworkError, NotFoundError, ProtocolError,
    ProviderUnavailableError, RateLimitError, Score, StatusError, Stream, StreamError,
    TokenLogprob, ToolCall, Usage, VLLMConfig, VLLMProvider, _CallGroup, _Clock, _HarmonySplitter,
    _read_overflow, _RequestFacts, _SSEDecoder, _ThinkSplitter, build_chat_request,
    build_completion_request, main, mount, on_session_ready, parse_chat_response,
    parse_completion_response, request_options, to_html,
)
# isort: on
# fmt: on

WEB: Final = "http://vllm.test"
COMPLETIONS_URL: Final = f"{WEB}/v1/completions"
CHAT_URL: Final = f"{WEB}/v1/chat/completions"
MODELS_URL: Final = f"{WEB}/v1/models"
TOKENIZE_URL: Final = f"{WEB}/tokenize"
SECRET: Final = "hunter2-XYZ"
DONE: Final = "data: [DONE]\n\n"
PROMPT: Final = "The capital of France is"
NEVER: Final = 30.0  # seconds: a limit that no test reaches
IN_TIME: Final = 3.0  # seconds: what "at once" may take on a busy machine
LIMIT: Final = 0.15  # seconds: the limit that is to hold
VLLM_LIVE_URL: Final = os.environ.get("VLLM_LIVE_URL", "")

# Self-signed for 127.0.0.1, localhost and vllm.test, valid from 2020 to 2120; no secret.
TLS_PEM: Final = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg5NyS+oHf+qgmzYj/baroAPdCgjuhw9UCtzGtLXnUC+OhRANC
AASyk25t6kf5hE+JhVE3EKmB0GDaC1tiGMCjMI+ILoSWcjKzEV0xgLsAO4s2Lhqne2/Q2SSui4IBQ7lfSKqP4Ndn
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBgTCCASagAwIBAgIBATAKBggqhkjOPQQDAjATMREwDwYDVQQDDAhzdGFuZC1pbjAgFw0yMDAxMDEwMDAwMDBaGA8yMTIw
MDEwMTAwMDAwMFowEzERMA8GA1UEAwwIc3RhbmQtaW4wWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASyk25t6kf5hE+JhVE3
EKmB0GDaC1tiGMCjMI+ILoSWcjKzEV0xgLsAO4s2Lhqne2/Q2SSui4IBQ7lfSKqP4Ndno2kwZzAPBgNVHRMBAf8EBTADAQH/
MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQUKH1URpYUrqe3kklKCRrRJSgkg+MwJQYDVR0RBB4wHIcEfwAAAYIJbG9jYWxo
b3N0ggl2bGxtLnRlc3QwCgYIKoZIzj0EAwIDSQAwRgIhAOcl6wbaT8F2fZF5rChPmiNF7r7d7mEBPYdtF9tjvz8sAiEAhVm+
2/fdPd+Z2H0s1THWvbiTeRl+TErvq6m75fJpxlM=
-----END CERTIFICATE-----
"""

row: Final = pytest.param


def table(names, *rows, **options):
    """Return a decorator that runs a test for each row of values; `names` has blanks between."""
    return pytest.mark.parametrize(names.replace(" ", ","), rows, **options)


whole_and_stream: Final = table("is_stream", row(False, id="whole"), row(True, id="stream"))
http_and_https: Final = table("tls", row(False, id="http"), row(True, id="https"), indirect=True)


def caught(function, *args, **options):
    """Return the error of this module that a call raises."""
    with pytest.raises(VLLMError) as info:
        function(*args, **options)
    return info.value


def told(error):
    """Return everything a user may see of an exception: its traceback, and what its causes hold."""
    text = "".join(traceback.format_exception(error))
    while error is not None:
        text += f"{error!r} {error.args!r} {getattr(error, '__dict__', {})!r}"
        error = error.__cause__ or error.__context__
    return text


def changed(value, **fields):
    """Return a value with other fields, be it a dataclass or a named tuple."""
    if isinstance(value, tuple):
        return value._replace(**fields)
    return dataclasses.replace(value, **fields)


def texts_of(parts):
    return [part.text for part in parts]


def text_event(text, **fields):
    """Return a reply, or an event, of `/v1/completions`."""
    return {"choices": [{"index": 0, "text": text, **fields}]}


def error_payload(message, code=400):
    """Return an error as vLLM sends it since 0.10.1."""
    return {"error": {"message": message, "type": "Error", "param": None, "code": code}}


def model_list(*names, **fields):
    """Return a reply of `/v1/models`."""
    return {"object": "list", "data": [{"id": name, "object": "model", **fields} for name in names]}


def wait_until(is_so, timeout_s=NEVER):
    give_up_at = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_at, "it has not happened in time"
        time.sleep(0.001)


@contextlib.contextmanager
def at_once(limit_s=0.9, minimum_s=0.0):
    """Fail where the block takes longer, or ends too early."""
    started_at = time.monotonic()
    yield
    assert minimum_s <= time.monotonic() - started_at < limit_s


after_limit: Final = functools.partial(at_once, IN_TIME, LIMIT * 0.9)


class InThread(threading.Thread):
    """A function that runs in a thread of its own."""

    is_running = threading.Thread.is_alive

    def __init__(self, function, *args, **options):
        super().__init__(daemon=True)
        self._function = functools.partial(function, *args, **options)
        self.start()

    def run(self):
        try:
            self._outcome = self._function()
        except BaseException as error:  # noqa: BLE001 - it is the outcome
            self._outcome = error

    def outcome(self, timeout_s=NEVER):
        """Return what the function returned or raised, once its thread has ended."""
        self.join(timeout_s)
        assert not self.is_running()
        return self._outcome


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Keep the machine's own server, proxies and certificates out of every test."""
    names = "http_proxy https_proxy all_proxy no_proxy vllm_base_url vllm_api_key netrc"
    for name in f"{names} requests_ca_bundle curl_ca_bundle".split():
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def web():
    """A web that answers what it is told to and nothing else."""
    with responses.RequestsMock(assert_all_requests_are_fired=False) as mock:
        yield mock


def web_client(**settings):
    return VLLMClient(WEB, **{"default_model": "parrot", "max_retries": 0, **settings})


def sent_bodies(web, url=None):
    calls = [call.request for call in web.calls if url in (None, call.request.url)]
    return [json.loads(call.body) for call in calls]


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory):
    """Return the paths of the certificate and of its key: one file has both."""
    path = tmp_path_factory.mktemp("tls") / "tls.pem"
    path.write_text(TLS_PEM)
    return str(path), str(path)


@pytest.fixture
def tls(request):
    """Return whether the fixture `server` speaks TLS; `http_and_https` sets it."""
    return getattr(request, "param", False)


@pytest.fixture
def server(tls, tls_files):
    with StandIn(tls=tls_files if tls else None) as one:
        yield one


either_server = server


@pytest.fixture
def tls_server(tls_files):
    with StandIn(tls=tls_files) as one:
        yield one


@pytest.fixture
def connect(tls_files):
    """Return a function that makes a client of a StandIn or a URL; it retries fast."""
    with contextlib.ExitStack() as stack:

        def make(server, **settings):
            url = server if isinstance(server, str) else server.url
            settings = {"default_model": MODEL, "min_retry_delay": 0.01, **settings}
            if url.startswith("https"):  # the stand-in's certificate is trusted
                settings.setdefault("verify", tls_files[0])
            return stack.enter_context(VLLMClient(url, **settings))

        yield make


def generate(client, is_stream, prompt="x", **params):
    """Return the deltas of a completion, or its choices where it is not streamed."""
    if is_stream:
        return list(client.stream_complete(prompt, **params))
    return list(client.complete(prompt, **params).choices)


class Retries(logging.Handler):
    """The pauses before retries, in seconds; `on_retry` is called before each."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.pauses = []
        self.on_retry = lambda: None

    def emit(self, record):
        if record.msg.startswith("retry"):
            self.pauses.append(record.args[2])
            self.on_retry()


@pytest.fixture
def retries():
    handler = Retries()
    vllm_provider.logger.addHandler(handler)
    yield handler
    vllm_provider.logger.removeHandler(handler)


@pytest.fixture
def test_hosts(monkeypatch):
    """Let vllm.test and other.test be this machine, which no rule for loopback knows."""
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **options):
        return look_up("127.0.0.1" if str(host).endswith(".test") else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def port_of(server):
    return int(server.url.rpartition(":")[2])


def url_of(listener, scheme="http"):
    return f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"


def closed_port():
    """Return a port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def send_and_close(raw):
    """Return a step that sends `raw` and closes the connection."""
    return lambda connection: (connection.send(raw), connection.close())


def echo_prompt(connection):
    """Answer with the prompt: a swapped answer shows."""
    connection.pause(0.005)
    connection.send(reply(200, text_event(connection.request.body["prompt"])))


def repeat(piece, first=SSE_HEAD, every_s=0.02, count=500):
    """Return a step that sends `first`, then `piece` so many times, with pauses."""
    rest = drip(piece * count, every_s, len(piece))
    return lambda one: (one.send(first), rest(one), one.sleep_until_closed())


def start_python(code, *args):
    """Return a Python that runs `code`, with this vllm_provider to import."""
    folder = str(Path(vllm_provider.__file__).parent)
    env = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "error", "-c", code, *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def run_python(code, *args):
    """Return what such a Python prints."""
    with start_python(code, *args) as process:
        return process.communicate(timeout=30)[0]


# ---- Stand-in: its tests ----------------------------------------------------

HELLO: Final = {"messages": [{"role": "user", "content": "Hello"}]}


def posted(server, body):
    """Return status and payload of a request that no client has touched."""
    path = CHAT_PATH if "messages" in body else COMPLETIONS_PATH
    http_reply = requests.post(server.url + path, json=body, timeout=20)
    return http_reply.status_code, http_reply.json()


def choice_of(server, prompt=PROMPT, **body):
    """Return the first choice of a reply that must be one."""
    status, payload = posted(server, body if "messages" in body else {"prompt": prompt, **body})
    assert status == 200, payload
    return payload["choices"][0]


@table("system user thought answer", *[one for one in CONVERSATIONS if NOT_READ not in one[1]])
def test_stand_in_knows_its_conversations_by_heart(system, user, thought, answer, server):
    prompt = _chatml(*[("system", system)] * bool(system), ("user", user)) + TURN
    choice = choice_of(server, prompt, max_tokens=500, temperature=0)
    assert choice["text"] == f"<think>\n{thought}\n</think>{answer}"
    assert choice["finish_reason"] == "stop"


@table("text", "", PROMPT, "zzz", "is The of", f"{TURN}<think>", "é🌸")
def test_stand_in_gives_every_token_a_probability(text):
    probabilities = NGRAMS.after(VOCABULARY.ids(text))
    assert (len(probabilities), min(probabilities) > 0) == (VOCABULARY.size, True)
    assert math.fsum(probabilities) == pytest.approx(1)


def test_stand_in_has_one_distribution_for_all_it_says(server):
    token = VOCABULARY.ids(" Paris")[0]
    one = {"max_tokens": 1, "temperature": 0}
    [expected] = choice_of(server, logprobs=0, **one)["logprobs"]["token_logprobs"]
    options = {"logprobs": 0, "logprob_token_ids": [token], "return_tokens_as_token_ids": True}
    by_id = choice_of(server, max_tokens=1, seed=3, temperature=2, **options)["logprobs"]
    assert by_id["top_logprobs"][0][f"token_id:{token}"] == expected
    echoed = choice_of(server, f"{PROMPT} Paris", echo=True, max_tokens=0, logprobs=0)
    assert echoed["logprobs"]["token_logprobs"][-1] == expected
    scored = choice_of(server, f"{PROMPT} Paris", prompt_logprobs=0)["prompt_logprobs"][-1]
    assert scored == {str(token): {"logprob": expected, "rank": 1, "decoded_token": " Paris"}}

    chat = choice_of(server, **HELLO, **one, logprobs=True)["logprobs"]["content"]
    completion = choice_of(server, _rendered(HELLO, False), **one, logprobs=0)
    assert [chat[0]["logprob"]] == completion["logprobs"]["token_logprobs"]


def test_stand_in_expects_a_sentence_more_than_its_words_in_another_order(server):
    def logprob(text):
        entries = choice_of(server, text, prompt_logprobs=0)["prompt_logprobs"]
        return sum(value["logprob"] for entry in entries[1:] for value in entry.values())

    assert logprob("The capital of Italy is Rome.") > logprob("The is Rome of Italy capital.") + 10


def test_stand_in_draws_as_it_is_told(server):
    def text(**options):
        return choice_of(server, "The capital of", max_tokens=30, **options)["text"]

    sharpest = ({"temperature": 1, "top_k": 1}, {"temperature": 2, "top_p": 0.01}, {"min_p": 1})
    assert {text(**{"temperature": 1, **options}) for options in sharpest} == {text()}
    by_seed = [text(temperature=1, seed=seed) for seed in range(10)]
    assert (len(set(by_seed)) > 3, text(temperature=1, seed=7)) == (True, by_seed[7])
    body = {"prompt": "The capital of", "max_tokens": 30, "temperature": 1, "seed": 7, "n": 3}
    assert [one["text"] for one in posted(server, body)[1]["choices"]] == by_seed[7:]


@table(
    "schema values",
    row({"type": "string"}, [*CAPITALS.values(), *CAPITALS]),
    row({"type": "integer", "minimum": 18}, [18]),
    row({"enum": ["cook", 7]}, ["cook", 7]),
    row({"const": "person"}, ["person"]),
    row({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, [None, True, False]),
    row({"type": "array", "items": {"$ref": "#/$defs/N"}, "$defs": {"N": {"const": 7}}}, [[7]]),
    row({"properties": {"b": {"const": 1}, "a": {"type": "null"}}}, [{"b": 1, "a": None}]),
)
def test_stand_in_writes_what_a_schema_allows(schema, values, server):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert json.loads(choice_of(server, "x", max_tokens=99, response_format=form)["text"]) in values


def test_stand_in_writes_one_of_the_choices_after_its_reasoning(server):
    allowed = {"structured_outputs": {"choice": ["ja", "né 🌸"]}}
    drawn = [choice_of(server, "x", temperature=1, seed=seed, **allowed) for seed in range(20)]
    assert {choice["text"] for choice in drawn} == {"ja", "né 🌸"}
    message = choice_of(server, **HELLO, **allowed)["message"]
    assert (message["reasoning"], message["content"][0] in "jn") == ("\nA greeting.\n", True)


BY_NAME: Final = {"type": "function", "function": {"name": "get_weather"}}


@table("choice", "auto", "required", "none", BY_NAME)
def test_stand_in_calls_tools(choice, server):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    found = choice_of(server, messages=messages, tools=[WEATHER], tool_choice=choice)
    calls = [call["function"] for call in found["message"].get("tool_calls", [])]
    assert calls == [{"name": "get_weather", "arguments": '{"city": "Paris"}'}] * (choice != "none")
    assert found["finish_reason"] == ("stop" if choice in ("none", BY_NAME) else "tool_calls")


@table(
    "text options",
    row("Once upon a time", {"max_tokens": 30, "stop": ["count", "zzz"]}, id="stop-string"),
    row("Count to 100.", {"max_tokens": 7, "ignore_eos": True}, id="length"),
    row("né 🌸", {"echo": True, "max_tokens": 0, "logprobs": 2}, id="echo-alone"),
    row(["What is 2+2?", "Hello"], {"echo": True, "logprobs": 1}, id="two-prompts"),
    row([{"role": "user", "content": "Say hello in Japanese."}], {}, id="split-characters"),
    row([{"role": "user", "content": _BOTH}], {"tools": [WEATHER]}, id="tool-calls"),
)
def test_stand_in_streams_what_it_says_whole(text, options, server, connect):
    client = connect(server)
    calls = (client.complete, client.stream_complete)
    if isinstance(text[0], dict):
        calls = (client.chat, client.stream_chat)
    whole = calls[0](text, **options)
    with calls[1](text, **options) as stream:
        assert "\ufffd" not in "".join(texts_of(stream))

    def shape(choice):
        calls = [call.arguments for call in choice.tool_calls]
        tokens = [token.logprob for token in choice.logprobs or ()]
        ended = (choice.finish_reason, choice.stop_reason)
        return choice.text.strip(), choice.reasoning, calls, tokens, ended

    assert [*map(shape, stream.completion.choices)] == [*map(shape, whole.choices)]
    assert stream.completion.usage == whole.usage


@table(
    "body param message",
    row({"temperature": "warm"}, None, "TypeError"),
    row({"temperature": -1}, "temperature", "must be between 0 and 2, got -1."),
    row({"n": 0}, "n", "must be between 1 and 16384, got 0."),
    row({"n": 2, "temperature": 0}, "n", "must be 1 when using greedy sampling"),
    row({"stop": list("abcde")}, "stop", "must have at most 4 items"),
    row({"stop": 7}, None, "TypeError"),
    row({"max_tokens": 1.5}, None, "TypeError"),
    row({"stream": "yes"}, "stream", "must be a boolean"),
    row({"logprobs": 21}, "logprobs", "greater than max allowed: 20"),
    row({"stream_options": {}}, "stream_options", "`stream` must be set"),
    row({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "is not for `stream=True`"),
    row({"stream": True, "use_beam_search": True}, "use_beam_search", "is not in the stand-in"),
    row({"logprob_token_ids": [5]}, "logprob_token_ids", "`logprobs` must be set"),
    row({"prompt": [10**6]}, None, "is out of vocabulary"),
    row({"messages": []}, None, "empty conversation"),
    row({**HELLO, "tools": []}, "tools", "must not be an empty array"),
    row({**HELLO, "tool_choice": "auto"}, "tool_choice", "`tools` must be set"),
    row({**HELLO, "top_logprobs": 1}, "top_logprobs", "`logprobs` must be set"),
    row({"messages": [{"content": "x"}]}, None, "KeyError('role')"),
    row([1], None, "AttributeError"),
)
def test_stand_in_refuses_what_vllm_refuses(body, param, message, server):
    if isinstance(body, dict) and "messages" not in body:
        body = {"prompt": "Hello", **body}
    status, payload = posted(server, body)
    assert (status, payload["error"]["code"], payload["error"]["param"]) == (400, 400, param)
    assert message in payload["error"]["message"]


@contextlib.contextmanager
def copied_pair(folder, *argv):
    """Run a copy of both files, as somebody does who has only requests."""
    for path in (Path(__file__), Path(vllm_provider.__file__)):
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("amplifier_core", "pytest", "responses"):
        (folder / f"{name}.py").write_text("raise ImportError('as if it were not installed')")
    command = [sys.executable, "-W", "error", Path(__file__).name, *argv]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
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


def test_demo_skips_what_a_server_of_ones_own_lacks(server, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_BASE_URL", server.url)
    monkeypatch.setattr(sys.modules[__name__], "STEPS", (show_log_probabilities, call_a_tool))
    server.script(reply(400, error_payload("No.")), path=CHAT_PATH)
    assert demo([]) == 0
    out = capsys.readouterr().out
    assert "skipped: " in out
    assert "\n1 of 2 worked:\n* Log probabilities" in out


# ---- Module identity --------------------------------------------------------


def module_source() -> str:
    return Path(vllm_provider.__file__).read_text(encoding="utf-8")


def test_identity():
    names = [node.name for node in ast.parse(module_source()).body if hasattr(node, "name")]
    public = [name for name in names if not name.startswith("_")]
    assert vllm_provider.__all__ == sorted(public)
    # a literal that packaging reads without importing
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', module_source(), re.MULTILINE)
    assert vllm_provider.__version__ == version


def test_importing_it_imports_nothing_that_few_need_and_configures_no_logging():
    code = """
import logging, sys, vllm_provider
print({"amplifier_core", "asyncio", "argparse"} & set(sys.modules))
one = logging.getLogger("vllm_provider")
print(logging.root.handlers, logging.root.level, one.handlers, one.level, one.propagate)
"""
    assert run_python(code) == "set()\n[] 30 [] 0 True\n"


@table(
    "name version minimum",
    *(
        ("requests", "2.32.3", "2.32.4"),
        ("requests", "2.32", "2.32.4"),
        ("urllib3", "2.2.9", "2.3"),
    ),
    *(("requests", "2.33.0.dev1", None), ("urllib3", "2.10", None)),
)
def test_a_dependency_that_is_too_old_is_one_sentence(monkeypatch, name, version, minimum):
    monkeypatch.setattr(sys.modules[name], "__version__", version)
    code = compile(module_source(), vllm_provider.__file__, "exec")
    text = f"vllm_provider needs {name} {minimum} or newer, got {version}; pip install -U {name}"
    expected = pytest.raises(ImportError, match=f"^{re.escape(text)}$")
    with expected if minimum else contextlib.nullcontext():
        exec(code, {"__name__": "vllm_provider"})


# ---- Errors -----------------------------------------------------------------

RETRYABLE: Final = (
    *(NetworkError, LLMTimeoutError, StreamError, RateLimitError, ProviderUnavailableError),
)
CLASSES: Final = [one for one in vars(vllm_provider).values() if isinstance(one, type)]


def pickle_copy(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@table("error_class", *[one for one in CLASSES if issubclass(one, VLLMError)])
def test_an_error_has_every_attribute_and_so_has_its_copy(error_class):
    assert not issubclass(error_class, OSError)  # Amplifier's application swallows those
    error = error_class("message")
    assert (str(error), error.retryable) == ("message", issubclass(error_class, RETRYABLE))
    assert error.status_code is error.retry_after is error.request_id is error.partial is None

    choice = Choice(text="a", logprobs=(TokenLogprob("a", -math.inf),))
    attributes = {"status_code": 418, "retryable": True, "retry_after": 1.5, "request_id": "id"}
    attributes["partial"] = Completion("c-1", choices=(choice,))
    error = error_class("message", **attributes)
    error.limit, error.input_tokens, error.server_message = 2048, 2510, "no"
    error.tool_name, error.raw_arguments = "get_weather", '{"ci'
    for twin in (pickle_copy(error), copy.copy(error)):
        assert (type(twin), str(twin), twin.args) == (error_class, "message", ("message",))
        assert vars(twin) == vars(error)
        assert vars(twin).items() >= attributes.items()


# ---- Values: configuration --------------------------------------------------

SECONDS: Final = "a positive number of seconds"
FLAG: Final = "true or false"
FROM_1: Final = "an integer of at least 1"
FROM_0: Final = "an integer of at least 0"
URL: Final = "a URL like http://localhost:8000, without query or fragment"
LARGE: Final = 2**53 + 1  # has more digits than a float holds
# key, values given (the first is text) and what they become, bad values, what is expected
# fmt: off
SETTINGS: Final[list[tuple[str, dict[Any, Any], list[Any], str]]] = [
    ("default_model", {"parrot": "parrot"}, [7], "a string"),
    ("use_completions", {"false": False, 0: False, " TRUE ": True}, ["maybe", []], FLAG),
    ("prompt_format", {one: one for one in ("raw", "auto", "chat_template")}, ["harmony"],
     "auto, chat_template or raw"),
    ("max_tokens", {"0": 0, 100.0: 100, "4e3": 4000}, ["-1", 10**400, True], FROM_0),
    ("temperature", {"0": 0.0}, ["hot", math.nan, math.inf, "-inf"], "a number"),
    ("top_p", {"0.5": 0.5}, [[], 1j], "a number"),
    ("seed", {"-1": -1, str(LARGE): LARGE, LARGE: LARGE}, ["1.5", "inf"], "an integer"),
    ("stop", {"\n\n": "\n\n", ("a", "b"): ["a", "b"], iter(["a"]): ["a"], " ": " "},
     [[1], b"END", 7, ["a", None]], "a string or a list of strings"),
    ("logprobs", {"2": 2, True: True, "True": True, 0: 0}, ["many"], "an integer, true or false"),
    ("reasoning_effort", {"low": "low"}, [1], "a string"),
    ("timeout", {"60": 60.0, 60: 60.0, math.inf: math.inf, " 6 ": 6.0},
     ["soon", True, -math.inf], SECONDS),
    ("stream_idle_timeout", {"0.5": 0.5}, [0], SECONDS),
    ("connect_timeout", {"inf": math.inf}, ["nan"], SECONDS),
    ("max_retries", {"0": 0}, [1.5], FROM_0), ("max_concurrency", {"128": 128}, [0], FROM_1),
    ("min_retry_delay", {"0.1": 0.1}, [0], SECONDS), ("max_retry_delay", {"9": 9.0}, [-1], SECONDS),
    ("verify", {"false": False, Path(__file__): __file__}, ["/no/such.pem", "maybe"],
     "true, false or the path of a CA bundle that exists"),
    ("context_window", {"327": 327}, ["3k"], FROM_1), ("max_output_tokens", {"1": 1}, [0], FROM_1),
    ("use_streaming", {"off": False, "no": False}, [2], FLAG),
    ("priority", {"5": 5}, ["first", type(None)], "an integer"),
    ("debug", {"true": True, "on": True}, ["verbose"], FLAG),
    ("raw_debug", {"Yes": True}, [3], FLAG), ("raw", {"1": True}, ["x"], FLAG),
    ("debug_truncate_length", {"40": 40}, [0], FROM_1),
    ("api_key", {"sk-1": "sk-1", "EMPTY": "EMPTY"}, [], ""),
    ("extra_body", {}, [], ""), ("default_headers", {}, [], ""),
]
ROOTS: Final = {
    "http://localhost:8000": "http://localhost:8000", "http://localhost/": "http://localhost",
    "http://localhost:8000/v1": "http://localhost:8000", "http://a//v1//": "http://a",
    "https://gpu.example/openai/v1/": "https://gpu.example/openai", "  http://a \n": "http://a",
    "https://gpu.example/v1/models/x": "https://gpu.example/v1/models/x", "HTTPS://a": "https://a",
    "https://a/myv1": "https://a/myv1", "http://[::1]:8000/v1": "http://[::1]:8000",
}
BAD_URLS: Final = [
    "localhost:8000", "ftp://localhost", "http://", "http:///v1", "http://:8000", "http://.example",
    "http://localhost:0", "http://localhost:99999", "http://localhost:port", "http://[::1", "   ",
    "http://local host", "http://localhost\n/v1",
]
# fmt: on


@table("key", *[one[0] for one in SETTINGS])
def test_setting_not_given(key):
    assert {spec.name for spec in fields(VLLMConfig)} == {"base_url", *[one[0] for one in SETTINGS]}
    for value in (None, "", "${NAME}"):
        assert VLLMConfig(WEB, **{key: value}) == VLLMConfig(WEB)


@table(
    "key value kept",
    *((one[0], value, kept) for one in SETTINGS for value, kept in one[1].items()),
    *(("base_url", url, root) for url, root in ROOTS.items()),
    ("default_headers", {"X-A": 7, "X-B": " b "}, {"X-A": "7", "X-B": "b"}),
)
def test_good_setting(key, value, kept):
    found = getattr(VLLMConfig(**{"base_url": WEB, key: value}), key)
    assert (found, type(found)) == (kept, type(kept))


@table(
    "key bad expected",
    *((one[0], bad, one[3]) for one in SETTINGS for bad in one[2]),
    *(("base_url", url, URL) for url in BAD_URLS),
    ("base_url", 8000, "a string"),
)
def test_bad_setting(key, bad, expected):
    error = caught(VLLMConfig, **{"base_url": WEB, key: bad})
    assert type(error) is ConfigurationError
    assert str(error) == f"{key} must be {expected}, got {bad!r}"


PRINTABLE: Final = "must be printable ASCII; is a line break or a typographic character in it?"
NO_USER: Final = "base_url must not hold a user name or password; a key goes under api_key"
NO_QUERY: Final = f"base_url must be {URL}, got 'http://localhost/'"
NAMES: Final = "default_headers must have HTTP header names as keys, got"
CONFIGURATION: Final = "the configuration must"


@table(
    "settings message",
    ({"base_url": f"http://user:{SECRET}@[::1"}, NO_USER),
    ({"base_url": f"{SECRET}@localhost:8000"}, NO_USER),
    ({"base_url": f"http://localhost/?api_key={SECRET}"}, NO_QUERY),
    ({"base_url": f"http://localhost/#{SECRET}"}, NO_QUERY),
    *(
        ({"api_key": key}, f"api_key {PRINTABLE}")
        for key in (f"{SECRET}\n", f"“{SECRET}”", [SECRET])
    ),
    ({"default_headers": {"X": f"{SECRET}\r\nX: 1"}}, f"default_headers['X'] {PRINTABLE}"),
    ({"default_headers": {"X": f"{SECRET}é"}}, f"default_headers['X'] {PRINTABLE}"),
    ({"default_headers": {"X: Key": SECRET}}, f"{NAMES} 'X: Key'"),
    ({"default_headers": {"": SECRET}}, f"{NAMES} ''"),
    ({"default_headers": [("X-Key", SECRET)]}, "default_headers must be a mapping, got a list"),
    ({"default_headers": {7: SECRET}}, "default_headers must have strings as keys, got 7"),
    ({"extra_body": SECRET}, "extra_body must be a mapping, got a str"),
    ({"api_key": SECRET, "timeout": "soon"}, f"timeout must be {SECONDS}, got 'soon'"),
    ({"api_key": SECRET, 5: "five"}, f"{CONFIGURATION} have strings as keys, got 5"),
    ([SECRET], f"{CONFIGURATION} be a mapping, got a list"),
    ({}, "No base_url found: set it or VLLM_BASE_URL, like http://localhost:8000"),
)
def test_bad_settings_whose_error_shows_no_secret(settings, message):
    mapping = {"base_url": WEB, **settings} if isinstance(settings, dict) and settings else settings
    error = caught(VLLMConfig.from_mapping, mapping)
    assert (type(error), str(error)) == (ConfigurationError, message)
    assert SECRET not in told(error)


@table(
    "name value given found",
    ("BASE_URL", f"{WEB}/v1", {"base_url": None}, {}), ("BASE_URL", "http://other", {}, {}),
    ("BASE_URL", WEB, {"base_url": "${VLLM_URL}"}, {}),  # nobody has expanded it
    ("API_KEY", "k", {}, {"api_key": "k"}), ("API_KEY", "k", {"api_key": "a"}, {"api_key": "a"}),
    ("API_KEY", "k", {"api_key": ""}, {"api_key": "k"}), ("API_KEY", "${K}", {}, {}),
    ("API_KEY", "k", {"api_key": "EMPTY"}, {}), ("TIMEOUT", "1", {}, {}),
    ("CONTEXT_WINDOW", "9", {}, {"context_window": 9}),
    ("STREAM_IDLE_TIMEOUT", "9", {}, {"stream_idle_timeout": 9}),
)  # fmt: skip
def test_environment(monkeypatch, name, value, given, found):
    monkeypatch.setenv(f"VLLM_{name}", value)
    config = VLLMConfig(**{"base_url": WEB, **given})
    monkeypatch.undo()
    assert config == VLLMConfig(WEB, **found)


def test_repr_shows_what_differs_from_the_defaults_and_no_secret():
    headers = {"X-Key": SECRET}
    settings = {"temperature": 0, "timeout": 5, "use_completions": False, "api_key": SECRET}
    config = VLLMConfig(f"{WEB}/v1", default_headers=headers, **settings)
    shown = (
        "VLLMConfig(base_url='http://vllm.test', use_completions=False, api_key='***',"
        " temperature=0.0, timeout=5.0, default_headers={'X-Key': '***'})"
    )
    assert (repr(config), repr(VLLMClient(config))) == (shown, f"VLLMClient({shown})")
    assert repr(VLLMConfig(WEB)) == "VLLMConfig(base_url='http://vllm.test')"


def test_a_configuration_is_a_value():
    extra, stop, headers = {"top_k": 1}, ["a"], {"X": 1}
    settings = {"extra_body": extra, "stop": stop, "default_headers": headers, "api_key": SECRET}
    config = VLLMConfig(WEB, **settings)
    twin = VLLMConfig(WEB, **copy.deepcopy(settings))
    assert pickle_copy(config) == config == copy.deepcopy(config) == twin
    assert (pickle_copy(config).api_key, {config: 1}[twin]) == (SECRET, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.timeout = 3
    with pytest.raises(TypeError):
        VLLMConfig(WEB, "parrot")  # every other setting has a name

    extra["top_k"], headers["X"] = 2, 2  # it neither follows its arguments nor changes them
    stop.append("b")
    assert config == twin
    assert (config.extra_body, config.stop) == ({"top_k": 1}, ["a"])
    assert VLLMConfig(WEB).extra_body is not VLLMConfig(WEB).extra_body

    for idle in (None, 60.0):  # None stays `timeout` in a copy with another one
        twin = VLLMClient(VLLMConfig(WEB, stream_idle_timeout=idle), timeout=600).config
        assert (twin.timeout, twin.stream_idle_timeout) == (600.0, idle)


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
    ("timeot", "; did you mean 'timeout'?"),
    ("model", "; did you mean 'default_model'?"),  # a part of a name
    ("url", "; did you mean 'base_url'?"),
    ("max_token", "; did you mean 'max_tokens'?"),
    ("connect_time_out", "; did you mean 'connect_timeout'?"),
    ("zzzz", ""),
    *((name, UNDER_EXTRA_BODY) for name in VLLM_ONLY),
)
def test_unknown_setting(caplog, key, suggestion):
    assert VLLMConfig.from_mapping({"base_url": WEB, key: SECRET}) == VLLMConfig(WEB)
    message = f"unknown setting {key!r} is ignored{suggestion}"
    assert caplog.record_tuples == [("vllm_provider", logging.WARNING, message)]
    with pytest.raises(TypeError) as info:
        VLLMClient(WEB, **{key: SECRET})
    assert str(info.value) == f"{key!r} is not a setting of VLLMClient{suggestion}"


@table(
    "given found",
    ({one[0]: next(iter(one[1])) for one in SETTINGS if one[1]}, {}),
    ({"extra_request_params": {"top_k": 1}}, {"extra_body": {"top_k": 1}}),
    ({"reasoning": "low"}, {"reasoning_effort": "low"}),
)
def test_from_mapping_takes_every_key_and_leaves_the_mapping_alone(caplog, given, found):
    mapping = {"base_url": WEB, **given}
    assert VLLMConfig.from_mapping(mapping) == VLLMConfig(WEB, **(found or given))
    assert (mapping, caplog.records) == ({"base_url": WEB, **given}, [])


# ---- Requests ---------------------------------------------------------------


@dataclass
class Town:
    """A class as pydantic's, as far as it is used here."""

    city: str
    model_validate = classmethod(lambda cls, value: cls(**value))

    @staticmethod
    def model_json_schema():
        return {"type": "object", "properties": {"city": {"type": "string"}}}


COMPLETION_BODY: Final = {"model": "m", "prompt": "Once", "max_tokens": 1024}
CHAT_BODY: Final = {"model": "m", "messages": [{"role": "user", "content": "Once"}]}
TOWN: Final = {"name": "Town", "schema": Town.model_json_schema()}
TOWN_FORMAT: Final = {"response_format": {"type": "json_schema", "json_schema": TOWN}}
EXTRA: Final = {"extra_body": {"top_k": 1, "n": 2}}
SENT: Final = {"max_tokens": 0, "temperature": 0.0, "top_p": 0.5, "seed": 1, "stop": ["a"]}
EFFORT: Final = {"reasoning_effort": "low"}
# fmt: off
AS_GIVEN: Final[list[dict[str, Any]]] = [
    {}, {"temperature": 0, "seed": 0, "top_p": 0.0, "max_tokens": 0, "echo": False, "stop": ""},
    {"stop": [], "tools": [], "structured_outputs": {"a": None}, "n": "2", "stream_options": {}},
    {"logit_bias": {7: -1.5}, "top_k": 3, "new": [1], "priority": 5, "model": "other"},
    {"user": "Zoë 🌸\u2028\x00"},
]
# fmt: on
both_builders: Final = table(
    "build body",
    row(build_completion_request, COMPLETION_BODY, id="completions"),
    row(build_chat_request, CHAT_BODY, id="chat"),
)


def model_config(**settings: Any) -> VLLMConfig:
    return VLLMConfig(WEB, **{"default_model": "m", **settings})


@both_builders
@table(
    "settings params added",
    *(({}, params, params) for params in AS_GIVEN),
    *((settings, {}, settings) for settings in (SENT, EFFORT)),
    ({}, {"response_format": Town}, TOWN_FORMAT),
    ({}, {"temperature": None, "stream": None}, {}),
    ({}, {"model": None, "extra_body": None}, {}),
    ({"max_tokens": 7}, {"max_tokens": None}, {"max_tokens": 7}),
    ({"temperature": 1}, {"temperature": 0}, {"temperature": 0}),
    ({"priority": 5, "use_completions": False, "raw": True}, {}, {}),  # settings of ours
    ({"extra_body": {"top_k": 1}}, {"top_k": 2}, {"top_k": 1}),  # extra_body comes last
    ({"extra_body": {"seed": 0}, "seed": 1}, {}, {"seed": 0}),
    ({}, {"extra_body": {"top_k": 2}, "top_k": 3}, {"top_k": 2}),
    (EXTRA, {"extra_body": {"n": 3}}, {"top_k": 1, "n": 3}),
    ({}, {"timeout": 5, "stream_idle_timeout": 6, "deadline": 7}, {}),
)
def test_layers_of_a_body(build, body, settings, params, added):
    assert build(model_config(**settings), "Once", **params) == body | added


ON: Final = {"logprobs": True}
TOP_2: Final = {"logprobs": True, "top_logprobs": 2}
TOP_5: Final = {"logprobs": True, "top_logprobs": 5}


@table(
    "settings params completions chat",
    ({}, {"logprobs": 2}, 2, TOP_2), ({}, {"logprobs": 0}, 0, {**ON, "top_logprobs": 0}),
    ({}, {"logprobs": True}, 1, ON), ({}, {"logprobs": True, "top_logprobs": 2}, 1, TOP_2),
    ({}, {"logprobs": False}, None, {}),  # which would switch completions on
    ({}, {"logprobs": None}, None, {}), ({"logprobs": 2}, {}, 2, TOP_2),
    ({"logprobs": 2}, {"logprobs": False}, None, {}),
    ({"logprobs": 2}, {"logprobs": 0}, 0, {**ON, "top_logprobs": 0}),
    ({"extra_body": {"logprobs": 5}}, {}, 5, TOP_5),
    # The later layer decides, whichever name it uses.
    ({"logprobs": 2}, {"top_logprobs": 5}, 2, TOP_5), ({"logprobs": 2}, {"logprobs": True}, 1, TOP_2),
    ({"logprobs": 2}, {"extra_body": {"top_logprobs": 5}}, 2, TOP_5),
    ({"extra_body": {"top_logprobs": 5}}, {"logprobs": 2}, 2, TOP_5),
    ({"logprobs": 2}, {"logprobs": 3, "top_logprobs": 5}, 3, TOP_5),
)  # fmt: skip
def test_logprobs_mean_the_same_on_both_endpoints(settings, params, completions, chat):
    config = model_config(**settings)
    found = build_completion_request(config, "Once", **params).get("logprobs")
    assert (found, type(found)) == (completions, type(completions))

    body = build_chat_request(config, "Once", **params)
    assert body == CHAT_BODY | chat
    assert type(body.get("logprobs")) is type(chat.get("logprobs"))


@table("prompt", "", "Once", ["a", "b"], [1, 2, 3], [[1, 2], [3]], [], None)
def test_a_prompt_is_sent_as_typed(prompt):
    body = {"max_tokens": 1024, "prompt_embeds": "AA=="}
    if prompt is not None:
        body["prompt"] = prompt
    assert build_completion_request(VLLMConfig(WEB), prompt, prompt_embeds="AA==") == body


@table(
    "messages sent",
    ("Hi 🌸\u2028", [{"role": "user", "content": "Hi 🌸\u2028"}]),
    ("", [{"role": "user", "content": ""}]),
    *(([], []), (({"role": "tool", "x": [1]},), [{"role": "tool", "x": [1]}])),
)
def test_messages(web, messages, sent):
    assert build_chat_request(VLLMConfig(WEB), messages) == {"messages": sent}

    web.post(CHAT_URL, json={"choices": [{"message": {"content": "a"}}]})
    web_client().chat(messages, system="Be brief.")
    list(web_client().stream_chat(messages, system="Be brief."))
    sent = [{"role": "system", "content": "Be brief."}, *sent]
    for body in sent_bodies(web):
        assert body["messages"] == sent
    request = web.calls[0].request
    assert request.headers["Content-Type"] == "application/json"
    assert json.dumps(sent, ensure_ascii=False, separators=(",", ":")).encode() in request.body


@table(
    "messages",
    *(None, b"Hi", {"role": "user", "content": "Hi"}, ["Hi"], [1, 2], [{"role": "user"}, None]),
    [[{"role": "user", "content": "Hi"}]],
)
def test_messages_of_another_type(messages):
    error = caught(build_chat_request, VLLMConfig(WEB), messages)
    form = "a string or a list of dicts like {'role': 'user', 'content': '…'}"
    assert (type(error), str(error)) == (ConfigurationError, f"messages must be {form}")


@table(
    "name nearest",
    *(("max_token", "max_tokens"), ("temprature", "temperature"), ("top_logprob", "top_logprobs")),
    *(("guided_json", None), ("top_k", None)),
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
NOT_JSON: Final = "the request is not JSON"
RANGE: Final = "Out of range float values are not JSON compliant"
SURROGATE: Final = "the request holds a lone surrogate, which UTF-8 has no bytes for"


@table("method", "stream_complete", "stream_chat")
@table(
    "settings params message",
    row({}, {"stream": False}, NO_STREAM, id="stream"),
    row({"extra_body": {"stream": True}}, {}, NO_STREAM, id="stream-in-the-configuration"),
    row({}, {"extra_body": "x"}, "extra_body must be a mapping, got a str", id="text"),
    row({}, {"temperature": math.nan}, f"{NOT_JSON}, in 'temperature': {RANGE}", id="nan"),
    row({}, {"logit_bias": {"1": -math.inf}}, f"in 'logit_bias': {RANGE}", id="infinity-inside"),
    row({}, {"user": "\ud83c"}, f"{SURROGATE}, in 'user'", id="surrogate"),
    row({}, {"x": {"\udfff": 1}}, f"{SURROGATE}, in 'x'", id="surrogate-in-a-key"),
    row({}, {"extra_body": {"\udfff": 1}}, SURROGATE, id="surrogate-in-a-name"),
    row({}, {"x": b"raw"}, "in 'x': Object of type bytes is not JSON", id="bytes"),
    row({}, {"x": {(1, 2): 3}}, "in 'x': keys must be str, int, float,", id="tuple-as-key"),
    row({}, {"x": LOOP}, "in 'x': Circular reference detected", id="circle"),
    row({}, {"stream_options": [1]}, "stream_options must be a mapping, got a list", id="options"),
    row({}, {"timeout": 0}, f"timeout must be {SECONDS}, got 0", id="timeout"),
    row({}, {"stream_idle_timeout": "soon"}, f"must be {SECONDS}, got 'soon'", id="idle-timeout"),
    row({}, {"deadline": math.nan}, f"deadline must be {SECONDS}, got nan", id="deadline"),
)
def test_what_cannot_be_sent(web, method, settings, params, message):
    error = caught(lambda: list(getattr(web_client(**settings), method)("Once", **params)))
    assert type(error) is ConfigurationError
    assert message in str(error)
    assert len(web.calls) == 0


@both_builders
def test_a_prompt_is_neither_quoted_nor_changed(build, body):
    error = caught(build, VLLMConfig(WEB), f"{SECRET}\ud800")
    assert SECRET not in "".join(traceback.format_exception(error))

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


# ---- Transport: time --------------------------------------------------------

IDLE: Final = "stream_idle_timeout"
LINE: Final = ("note_line",)
WAIT_110: Final = [LINE, ("begin_wait", 110)]


@table(
    "steps due_at limit",
    ([], 105.0, "timeout"), ([("begin_wait", 104)], 105.0, "timeout"),  # waiting prolongs nothing
    ([("end_wait",)], 160.0, "timeout"),  # a consumer has the deadline alone
    (WAIT_110, 112.0, IDLE), ([*WAIT_110, ("begin_wait", 111)], 112.0, IDLE),  # half a line
    ([*WAIT_110, LINE, ("begin_wait", 111)], 113.0, IDLE),
    ([LINE, ("begin_wait", 159)], 160.0, IDLE), ([("allow", 101, 99)], 160.0, "timeout"),
    ([("allow", 101, 1), ("begin_wait", 101)], 102.0, "timeout"),
    ([LINE, ("allow", 101, 1), ("begin_wait", 101)], 102.0, "timeout"),
    ([*WAIT_110, ("allow", 120, 1)], 121.0, IDLE),
)  # fmt: skip
def test_clock(steps, due_at, limit):
    clock = _Clock(types.SimpleNamespace(timeout=5, stream_idle_timeout=2), 100.0, 160.0)
    for name, *args in steps:
        getattr(clock, name)(*args)
    assert (clock.due_at, clock.limit) == (due_at, limit)


MODELS: Final = "/v1/models"
GENERATION: Final = "/v1/completions"
CLOSING: Final = {"Connection": "close"}
NO_MODEL: Final = reply(404, error_payload("The model `parrot` does not exist.", 404))
ROLE_CHUNK: Final = chunk({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
EVENT_A: Final = b"data: " + json.dumps(text_event("a")).encode() + b"\n\n"
FIRST: Final = SSE_HEAD + chunk(EVENT_A)
SECOND: Final = chunk(text_event("b")) + chunk("[DONE]") + LAST_CHUNK
JSON_HEAD: Final = SSE_HEAD.replace(b"text/event-stream", b"application/json")
LONG_REPLY: Final = reply(200, text_event("a" * 500))
# The steps of one call's requests (to /v1/completions where no path is named), the text that has
# arrived when it waits, and the limit that ends it then: None where it has another error.
PHASES: Final = [
    row([stall()], "", "timeout", id="before-headers"),
    row([stall(SSE_HEAD[:60])], "", "timeout", id="mid-headers"),
    row([drip(SSE_HEAD, 0.02)], "", "timeout", id="trickles-its-headers"),
    row([stall(SSE_HEAD)], "", "deadline", id="after-headers"),
    row([repeat(chunk(b": ping\n\n"))], "", "timeout", id="comments-are-no-output"),
    row([repeat(ROLE_CHUNK)], "", "timeout", id="role-is-no-output"),
    row([stall(FIRST)], "a", IDLE, id="between-events"),
    row([repeat(chunk(b": ping\n\n"), FIRST)], "a", "deadline", id="comments-in-mid-reply"),
    row([stall(FIRST + chunk("bcde")[:8])], "a", IDLE, id="mid-event"),
    row([repeat(chunk(b"x"), FIRST + chunk(b"data: "))], "a", IDLE, id="half-a-line"),
    row([repeat(b"x", FIRST + b"fff\r\n")], "a", IDLE, id="half-a-chunk"),
    row([stall(SSE_HEAD + b"fff\r\n" + EVENT_A)], "a", IDLE, id="event-in-half-a-chunk"),
    row([stall(LONG_REPLY[:-9])], "", "timeout", id="mid-json"),
    row([drip(LONG_REPLY, 0.02)], "", "timeout", id="json-trickles"),
    row([repeat(chunk(b" "), JSON_HEAD)], "", "timeout", id="json-trickles-in-chunks"),
    row([None, stall()], "", "timeout", id="used-connection-is-not-stale"),
    row([stall(reply(500, "x" * 99)[:-9])], "", None, id="mid-error"),
    row([reply(503), stall()], "", None, id="second-attempt"),
    row([reply(503, "", CLOSING), stall()], "", None, id="new-connection"),
    row([reply(503, "", {"Retry-After": "1e15"})], "", None, id="retry-pause"),
    row([(MODELS, stall())], "", "timeout", id="asking-for-the-model"),
    row([(MODELS, None), stall(FIRST)], "a", None, id="after-asking-for-the-model"),
    row([(MODELS, None), NO_MODEL, (MODELS, stall())], "", None, id="asking-for-it-again"),
]
LIMIT_MESSAGES: Final = {
    "timeout": "no reply within 0.15 s: {}; raise timeout, or ask for fewer tokens",
    "stream_idle_timeout": "no data for 0.15 s in the middle of a reply: {};"
    " raise stream_idle_timeout, or see if a proxy buffers",
    "deadline": "deadline of 0.15 s reached: {}; give the call more time",
    "connect_timeout": "no connection in time: {}; is the host right, and does a firewall block it?"
    " (connect_timeout)",
}


def client_in_phase(server: StandIn, connect: Any, steps: list[Any], **settings: Any) -> VLLMClient:
    """Return a client whose next call comes to the phase with these steps, which it scripts."""
    pairs = [step if isinstance(step, tuple) else (GENERATION, step) for step in steps]
    for path, step in pairs:
        server.script(step, path=path)
    model = None if pairs[0][0] == MODELS else MODEL
    client = connect(server, default_model=model, **settings)
    if pairs[0] == (GENERATION, None):
        client.complete(PROMPT)
    return client


@table("steps text limit", *[one for one in PHASES if one.values[2]])
@table("tls is_stream", row(False, True, id="stream"), row(True, False, id="tls"), indirect=["tls"])
def test_limits(either_server, connect, is_stream, steps, text, limit):
    client = client_in_phase(either_server, connect, steps, timeout=math.inf)
    with after_limit():
        error = caught(generate, client, is_stream, **{limit: LIMIT})
    request = either_server.requests[-1]
    message = LIMIT_MESSAGES[limit].format(f"{request.method} {either_server.url}{request.path}")
    assert (type(error), str(error)) == (LLMTimeoutError, message)
    assert error.retryable is (limit != "deadline")
    assert not is_stream or limit == "deadline" or error.partial.text == text
    either_server.aborted.get(timeout=IN_TIME)
    assert connections_of(either_server) == [1] * len(steps)


on_linux: Final = pytest.mark.skipif(sys.platform != "linux", reason="no full queue there")


@table(
    "limit scheme size is_full",
    *(row(one, "http", 1, True, marks=on_linux) for one in LIMIT_MESSAGES if one != IDLE),
    row("connect_timeout", "https", 1, False, id="tls-handshake-that-stalls"),
    row("timeout", "http", 8_000_000, False, id="server-that-never-reads"),
)
def test_limits_before_the_request_is_sent(connect, retries, limit, scheme, size, is_full):
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as stack:
        if is_full:  # then Linux, and Linux alone, leaves connections unanswered
            listener.listen(0)
        for _ in range(4 * is_full):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        limits = {"connect_timeout": 10, "timeout": NEVER, limit: LIMIT}
        deadline = limits.pop("deadline", None)
        client = connect(url_of(listener, scheme), **limits)
        with after_limit():
            error = caught(client.complete, "x" * size, deadline=deadline)
    message = LIMIT_MESSAGES[limit].format(f"POST {client.config.base_url}/v1/completions")
    assert (type(error), str(error)) == (LLMTimeoutError, message)
    assert (error.retryable, retries.pauses) == (limit != "deadline", [])


def test_events_and_comments_keep_a_stream_alive(server, connect):
    """Neither `timeout` cuts it, which runs to the first output, nor the idle timeout."""

    def step(connection: Connection) -> None:
        connection.send(FIRST)
        for _ in range(4):
            connection.pause(0.4)
            connection.send(chunk(b": keep-alive\n\n"))
        connection.send(SECOND)

    server.script(step)
    stream = connect(server).stream_complete("x", timeout=1.5, stream_idle_timeout=1.5)
    assert texts_of(stream) == ["a", "b"]


def send_in_two_parts(may_go_on: threading.Event) -> Step:
    """Return a step that sends the second event of a stream once it may."""
    return lambda one: (one.send(FIRST), may_go_on.wait(NEVER), one.send(SECOND))


def test_a_slow_consumer_is_not_punished(server, connect):
    may_end = threading.Event()

    def step(connection: Connection) -> None:
        connection.send(FIRST)
        connection.pause(0.05)
        connection.send(chunk(text_event("b")))
        may_end.wait(NEVER)
        connection.send(chunk("[DONE]") + LAST_CHUNK)

    server.script(step)
    stream = connect(server).stream_complete("x", timeout=NEVER, stream_idle_timeout=1.0)
    assert texts_of(itertools.islice(stream, 2)) == ["a", "b"]
    time.sleep(1.2)  # longer than its idle timeout
    may_end.set()
    assert list(stream) == []


def test_timeout_counts_anew_for_each_attempt_and_deadline_does_not(server, connect):
    for status in (503, 503, 200):
        raw = reply(status, text_event("a"))
        server.script(lambda connection, raw=raw: (connection.pause(0.4), connection.send(raw)))
    assert connect(server).complete("x", timeout=1.0).text == "a"

    server.script(*[reply(503)] * 500)
    client = connect(server, max_retries=500, max_retry_delay=0.02)
    with at_once(IN_TIME):
        error = caught(client.complete, "x", deadline=0.5)
    assert (type(error), error.retryable) == (LLMTimeoutError, False)
    assert 1 < len(server.requests) - 3 < 100


def test_a_pause_beyond_the_deadline_is_not_begun(server, connect, retries):
    server.script(reply(503, {"error": "busy"}, {"Retry-After": "20"}))
    error = caught(connect(server).complete, "x", deadline=10)
    cause = error.__cause__
    assert (type(error), type(cause)) == (LLMTimeoutError, ProviderUnavailableError)
    assert str(error) == f"the deadline leaves no time to try again: {cause}"
    assert (error.retryable, error.status_code, retries.pauses) == (False, 503, [])


def test_the_body_of_an_error_may_not_take_long(server, connect, monkeypatch):
    monkeypatch.setattr(vllm_provider, "ERROR_BODY_S", LIMIT)
    server.script(stall(reply(400, "x" * 99)[:-9]))
    with after_limit():
        error = caught(connect(server).complete, "y")
    assert (type(error), error.server_message) == (InvalidRequestError, "x" * 90)
    server.aborted.get(timeout=IN_TIME)


# No limit; more than a clock holds; the largest number; 100 ms to poll, which takes 32 bits of ms.
@table("limit", math.inf, 1e12, sys.float_info.max, 4_294_967.4)
def test_very_long_limits(server, connect, limit):
    server.script(lambda connection: (connection.pause(0.1), server.answer(connection)))
    client = connect(server, timeout=limit, stream_idle_timeout=limit, connect_timeout=limit)
    assert client.complete(PROMPT, deadline=limit).text == " Paris."
    assert texts_of(client.stream_complete(PROMPT)) == [" Paris", ".", ""]
    assert client.health(wait=limit) is True


# ---- Transport: stopping, by threads and signal handlers --------------------

STOPS: Final = {
    "cancel": lambda _client, stream: stream.cancel(),
    "close": lambda _client, stream: stream.close(),
    "client.close": lambda client, _stream: client.close(),
}
each_stop: Final = table("stop", *STOPS)


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


@contextlib.contextmanager
def signals_after(wait: Callable[[], object], handler: Callable[..., object]) -> Iterator[None]:
    """Send SIGUSR1 to this, the main thread, once `wait` has returned, until the block is left.

    Again and again: one may come before a read.
    """
    is_over = threading.Event()

    def send() -> None:
        wait()
        while not is_over.is_set():
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            is_over.wait(0.05)

    signal.signal(signal.SIGUSR1, handler)
    sender = InThread(send)
    try:
        yield
    finally:
        is_over.set()
        sender.outcome()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def connections_of(server: StandIn) -> list[int]:
    return [request.connection for request in server.requests]


def read_and_stop(stream: Stream, wait: Any, stop: Callable[[], object], by: str = "thread") -> Any:
    """Return what reading a stream gives that is stopped after `wait`, by a thread or a handler."""
    if by == "thread":
        reader = InThread(list, stream)
        wait()
        with at_once(IN_TIME):
            stop()
            return reader.outcome()

    with signals_after(wait, lambda *_: stop()):
        try:
            return list(stream)
        except VLLMError as error:
            return error


@each_stop
@table("steps text", *[row(*one.values[:2], id=one.id) for one in PHASES])
@table("tls by", (False, "thread"), (True, "thread"), (False, "handler"), indirect=["tls"])
def test_stop_in_every_phase(either_server, connect, steps, text, stop, by):
    client = client_in_phase(either_server, connect, steps, max_retry_delay=math.inf)
    stream = client.stream_complete("x")
    sent = either_server.requests

    def wait() -> None:
        wait_until(lambda: len(sent) == len(steps) and stream.completion.text == text)

    outcome = read_and_stop(stream, wait, lambda: STOPS[stop](client, stream), by)
    assert_stopped(outcome, stop, text)
    assert stop == "close" or outcome.request_id == stream.request_id
    if not isinstance(steps[-1], bytes):  # the server is at work
        either_server.aborted.get(timeout=IN_TIME)
    assert len(sent) == len(steps)
    assert list(stream) == []


@each_stop
@table("tls by", (False, "thread"), (True, "thread"), (False, "handler"), indirect=["tls"])
def test_stop_while_events_pour_in(either_server, connect, stop, by):
    """Neither thread may see anything but the end, wherever the other one is."""
    client = connect(either_server)
    draw = random.Random(7)
    for number in range(10):
        either_server.script(repeat(chunk(text_event("a")) * 50, every_s=0.0))
        stream = client.stream_complete("x")

        def wait(number: int = number) -> None:
            wait_until(lambda: len(either_server.requests) > number)
            time.sleep(draw.uniform(0.0, 0.006))

        outcome = read_and_stop(stream, wait, functools.partial(STOPS[stop], client, stream), by)
        assert_stopped(outcome, stop)
        assert set(stream.completion.text) <= {"a"}
    assert client.complete(PROMPT).text == " Paris."


@table("stop", *STOPS, "timeout")
def test_stop_while_the_host_is_looked_up(server, connect, monkeypatch, retries, stop):
    has_begun, may_end, look_up = threading.Event(), threading.Event(), socket.getaddrinfo

    def getaddrinfo(*args: Any, **options: Any) -> Any:
        has_begun.set()
        may_end.wait(IN_TIME)
        return look_up(*args, **options)

    def do_stop() -> None:
        error = caught(next, stream)  # of a second thread that reads
        assert str(error) == "another thread is reading this Stream; only one can at a time"
        STOPS.get(stop, lambda *_: time.sleep(2 * LIMIT))(client, stream)
        assert stop != "close" or next(stream, "the end") == "the end"
        may_end.set()

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    client = connect(server)
    stream = client.stream_complete("x", timeout=LIMIT if stop == "timeout" else NEVER)
    outcome = read_and_stop(stream, lambda: has_begun.wait(IN_TIME), do_stop)
    if stop == "timeout":
        assert type(outcome) is LLMTimeoutError
    else:
        assert_stopped(outcome, stop)
    assert (server.requests, retries.pauses) == ([], [])


@each_stop
@table("more", row(b"", id="silence"), row(SECOND[: -len(LAST_CHUNK)], id="more"))
def test_stop_between_two_events_by_the_reading_thread(server, connect, stop, more):
    server.script(stall(FIRST + more))
    client = connect(server)
    stream = client.stream_complete("x")
    assert next(stream).text == "a"
    STOPS[stop](client, stream)
    server.aborted.get(timeout=IN_TIME)
    if stop != "close":
        assert_stopped(caught(next, stream), stop, "a")
    assert (list(stream), len(server.requests)) == ([], 1)


@table("stop", "cancel", "close")
@table("enter", list, lambda stream: list(stream.__enter__()))
def test_stop_before_the_start_sends_nothing(server, connect, stop, enter):
    client = connect(server, default_model=None)
    stream = client.stream_complete("x")
    STOPS[stop](client, stream)
    assert_stopped(InThread(enter, stream).outcome(), stop)
    assert server.requests == []


@each_stop
def test_stop_at_the_end_takes_nothing_away(server, connect, monkeypatch, stop):
    """While the bytes after [DONE] are awaited, and later."""
    monkeypatch.setattr(vllm_provider, "DRAIN_S", NEVER)
    client = connect(server)
    server.script(stall(sse(text_event("a"), end=False)))
    stream = client.stream_complete("x")
    wait = functools.partial(wait_until, lambda: stream.completion.text == "a")
    outcome = read_and_stop(stream, wait, lambda: STOPS[stop](client, stream))
    assert outcome == [Delta(text="a")] or outcome.partial.text == "a"
    server.aborted.get(timeout=IN_TIME)

    finished = client.stream_complete(PROMPT)
    assert len(list(finished)) == 3
    STOPS[stop](client, finished)
    assert (list(finished), finished.completion.text) == ([], " Paris.")
    assert client.complete(PROMPT).text == " Paris."


@http_and_https
def test_a_late_stop_does_not_reach_the_next_call(either_server, connect, retries):
    is_pausing, may_go_on = threading.Event(), threading.Event()
    retries.on_retry = is_pausing.set
    client = connect(either_server)
    finished, pausing = client.stream_complete(PROMPT), client.stream_complete("x")
    assert len(list(finished)) == 3
    either_server.script(reply(503, headers={"Retry-After": "20"}), send_in_two_parts(may_go_on))
    pausing_reader = InThread(list, pausing)
    assert is_pausing.wait(IN_TIME)

    reader = InThread(list, client.stream_complete("y"))
    wait_until(lambda: len(either_server.requests) == 3)
    finished.cancel()
    finished.close()
    pausing.cancel()
    assert_stopped(pausing_reader.outcome(), "cancel")
    may_go_on.set()
    assert texts_of(reader.outcome()) == ["a", "b"]
    assert connections_of(either_server) == [1, 1, 1]


@table("how", "leave", "raise", "drop")
@http_and_https
def test_leaving_a_stream_stops_the_server(either_server, connect, how):
    either_server.script(repeat(chunk(text_event("a")), every_s=0.01))
    client = connect(either_server)
    stream = client.stream_complete("x")
    if how == "drop":
        next(stream)
        del stream
    else:
        with contextlib.suppress(ZeroDivisionError), stream:
            assert 1 / (how == "leave")
    either_server.aborted.get(timeout=IN_TIME)
    assert client.complete(PROMPT).text == " Paris."
    assert connections_of(either_server) == [1, 2]


@table(
    "name args",
    *(("complete", ["x"]), ("chat", ["x"]), ("tokenize", ["x"]), ("detokenize", [[1]])),
    *(("models", []), ("version", []), ("get", ["/load"]), ("post", ["/score", {}])),
    *(("health", []), ("health", [20]), ("health", [NEVER])),  # the last one pauses
)
def test_closing_a_client_stops_every_call(server, connect, name, args):
    client = connect(server, max_retries=5)
    server.script(*[reply(503) if args == [NEVER] else stall()] * 3)
    callers = [InThread(getattr(client, name), *args) for _ in range(3)]
    wait_until(lambda: len(server.requests) == 3)
    with at_once(IN_TIME):
        client.close()
        assert [type(caller.outcome()) for caller in callers] == [AbortError] * 3
    for _ in callers if args != [NEVER] else ():
        server.aborted.get(timeout=IN_TIME)
    assert len(server.requests) == 3
    assert client.complete(PROMPT).text == " Paris."


def test_a_snapshot_may_be_taken_by_another_thread(server, connect):
    """Events with ever new fields make it hard: the last event of vLLM brings one."""
    server.script(sse(*[{**text_event("a"), f"field_{number}": 1} for number in range(1000)]))
    stream = connect(server).stream_complete("x")
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        reader, sizes = InThread(list, stream), [0]
        while sizes[-1] < 1000 and reader.is_running():
            sizes.append(len(stream.completion.text))
    finally:
        sys.setswitchinterval(interval)
    assert (len(reader.outcome()), len(stream.completion.payload)) == (1000, 1000)
    assert sizes == sorted(sizes)


def begin_inside(group: _CallGroup, function: Callable[..., Any], *args: Any) -> InThread:
    """Call a function in another thread, as a part of the group."""
    with group:
        context = contextvars.copy_context()
    return InThread(context.run, function, *args)


@table("stopped", row(0, id="outer"), row(1, id="inner"))
def test_a_group_stops_its_calls_and_no_others(server, connect, stopped):
    clients = [connect(server), connect(server)]
    groups = [_CallGroup(), _CallGroup()]
    with groups[1]:
        ended = clients[0].stream_complete(PROMPT)
        assert len(list(ended)) == 3
    server.script(*[stall(FIRST)] * 3)
    outside = InThread(clients[0].complete, "x")
    with groups[0]:  # they nest
        inside = [begin_inside(groups[1], client.complete, "x") for client in clients]
    wait_until(lambda: len(server.requests) == 4)

    with at_once(IN_TIME):
        groups[stopped].stop()
        assert [type(caller.outcome()) for caller in inside] == [AbortError] * 2
    assert (outside.is_running(), ended.completion.text) == (True, " Paris.")
    assert type(begin_inside(groups[stopped], clients[1].models).outcome()) is AbortError
    assert len(server.requests) == 4
    clients[0].close()
    assert type(outside.outcome()) is AbortError
    assert clients[0].complete(PROMPT).text == " Paris."


class RaisingHandler:
    """A signal handler that raises `error` when it is first called."""

    def __init__(self, error: BaseException) -> None:
        self._errors = [error]

    def __call__(self, *_: object) -> None:
        if self._errors:
            raise self._errors.pop()


@table("kind", TimeoutError, OSError, ValueError, ZeroDivisionError, KeyboardInterrupt)
@table("step", row(stall(), id="headers"), row(stall(SSE_HEAD), id="body"))
@table("wrap", lambda handler: handler, lambda handler: handler.__call__, functools.partial)
def test_an_error_of_a_signal_handler_passes_unchanged(server, connect, kind, step, wrap):
    raised = kind("mine")
    server.script(step)
    client = connect(server)

    def wait() -> None:
        wait_until(lambda: server.requests)
        time.sleep(0.05)  # until it reads, most likely

    with pytest.raises(kind) as info, signals_after(wait, wrap(RaisingHandler(raised))):
        client.complete("x")
    assert info.value is raised
    server.aborted.get(timeout=IN_TIME)
    assert len(server.requests) == 1


# ---- Transport: connections -------------------------------------------------


def while_handling(outer: Exception, function: Callable[[], Any]) -> Any:
    """Return what a function returns that is called while an exception is handled."""
    try:
        raise outer
    except type(outer):
        return function()


@table("step", Connection.close, Connection.reset)
def test_a_stale_connection_never_shows(server, connect, caplog, step):
    """The server closes an idle connection at the very moment it is used again."""
    client = connect(server, max_retries=0, default_model=None)
    server.script(None, step, None, step, None, step)
    assert client.complete(PROMPT).text == " Paris."
    assert while_handling(OSError(), lambda: client.complete(PROMPT).text) == " Paris."
    assert texts_of(client.stream_complete(PROMPT)) == [" Paris", ".", ""]
    assert connections_of(server) == [1, 1, 2, 2, 3, 3, 4]
    assert len({request.headers["X-Request-Id"] for request in server.requests}) == 7
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_several_stale_connections_cost_one_attempt(server, connect):
    client = connect(server, max_retries=0)
    barrier = threading.Barrier(3)
    server.script(*[lambda connection: (barrier.wait(IN_TIME), server.answer(connection))] * 3)
    callers = [InThread(client.complete, PROMPT) for _ in range(3)]
    assert texts_of(caller.outcome() for caller in callers) == [" Paris."] * 3
    server.script(Connection.close)
    assert client.complete(PROMPT).text == " Paris."
    assert connections_of(server)[4:] == [4]


ONE_BYTE: Final = send_and_close(b"H")


@table(
    "steps kind",
    *(([step], NetworkError) for step in (Connection.close, Connection.reset, ONE_BYTE)),
    ([send_and_close(SSE_HEAD)], StreamError),
    ([None, ONE_BYTE], NetworkError),
    ([None, send_and_close(SSE_HEAD[:40])], VLLMError),
    ([None, Connection.close, Connection.close], NetworkError),  # fresh after a stale one
)
@http_and_https
def test_what_may_have_started_is_not_sent_again(either_server, connect, retries, steps, kind):
    client = client_in_phase(either_server, connect, steps)
    error = caught(list, client.stream_complete("x"))
    assert isinstance(error, kind)
    assert error.retryable is True
    assert (len(either_server.requests), retries.pauses) == (len(steps), [])


@table(
    "informational",
    row(b"HTTP/1.1 100 Continue\r\n\r\n", id="100"),
    row(b"HTTP/1.1 103 A\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n", id="two"),
    row(b"HTTP/1.1 103 A\r\nContent-Length: 5\r\n\r\n", id="103-with-a-length"),
)
@http_and_https
def test_informational_replies_are_passed_over(either_server, connect, informational):
    client = connect(either_server)
    for raw in (reply(200, text_event("a")), sse(text_event("b")), reply(404, "c")):
        either_server.script(informational + raw)
    assert client.complete("x").text == "a"
    assert texts_of(client.stream_complete("x")) == ["b"]
    assert caught(client.complete, "x").server_message == "c"
    assert client.complete(PROMPT).text == " Paris."
    assert connections_of(either_server) == [1] * 4


def test_connections_are_reused_unless_idle_for_long(server, connect, monkeypatch):
    client = connect(server, default_model=None)
    list(client.stream_complete(PROMPT))
    list(client.stream_chat("Hello", logprobs=2))
    assert client.tokenize("x")
    assert all([client.models(), client.version(), client.health()])
    caught(client.complete, "")
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + 3.0)
    client.complete(PROMPT)
    assert set(connections_of(server)) == {1}
    monkeypatch.setattr(time, "monotonic", lambda: now() + 7.1)
    client.complete(PROMPT)
    assert server.requests[-1].connection == 2


AT_DONE: Final = sse(text_event("a"), text_event("b"), end=False)


@table(
    "step drain_s connections",
    row(drip(AT_DONE + LAST_CHUNK, 0.001), NEVER, [1, 1], id="last-chunk-comes-late"),
    row(stall(AT_DONE), 0.05, [1, 2], id="last-chunk-never-comes"),
    row(repeat(chunk(b": x\n\n"), AT_DONE, 0.005), 0.05, [1, 2], id="goes-on-after-it"),
    row(send_and_close(AT_DONE), NEVER, [1, 2], id="closed"),
    row(
        AT_DONE.replace(b"vary: Origin", b"connection: close") + LAST_CHUNK, 1, [1, 2], id="closing"
    ),
)
def test_a_stream_ends_at_done(server, connect, monkeypatch, step, drain_s, connections):
    """Its last bytes are awaited for a moment, so that the connection can be used again."""
    monkeypatch.setattr(vllm_provider, "DRAIN_S", drain_s)
    server.script(step)
    client = connect(server, max_retries=0)
    with at_once(IN_TIME):
        assert texts_of(client.stream_complete("x")) == ["a", "b"]
    client.complete(PROMPT)
    assert connections_of(server) == connections


def test_a_connection_is_taken_over_before_it_is_let_go(server, connect, monkeypatch):
    client, close = connect(server), requests.Response.close

    def take_over(response: requests.Response) -> None:
        monkeypatch.setattr(requests.Response, "close", close)
        assert client.complete(PROMPT).text == " Paris."
        close(response)

    monkeypatch.setattr(requests.Response, "close", take_over)
    assert client.complete(PROMPT).text == " Paris."
    assert connections_of(server) == [1, 1]


@table("is_closed", row(True, id="client-closed"), row(False, id="left-idle"))
def test_idle_sockets_are_closed(server, connect, monkeypatch, is_closed):
    """At once by close(), else after IDLE_REUSE_S: none is left to the garbage collector."""
    monkeypatch.setattr(vllm_provider, "IDLE_REUSE_S", NEVER if is_closed else 0.1)
    before, was_closed = set(threading.enumerate()), queue.Queue()
    raw = reply(200, text_event("a"))
    server.script(lambda one: (one.send(raw), was_closed.put(one.sleep_until_closed())))
    gc.disable()
    try:
        client = connect(server)
        assert client.complete("x").text == "a"
        if is_closed:
            client.close()
        assert was_closed.get(timeout=IN_TIME) is True
    finally:
        gc.enable()
    assert is_closed or wait_until(lambda: before >= set(threading.enumerate())) is None


# ---- Transport: threads and processes ---------------------------------------


def test_many_threads_share_a_client(server, connect, monkeypatch, caplog):
    monkeypatch.setattr(vllm_provider, "IDLE_REUSE_S", NEVER)
    caplog.set_level(logging.DEBUG)
    barrier = threading.Barrier(64)
    client = connect(server, default_model=None, max_concurrency=16)
    server.script(lambda one: (one.pause(0.1), server.answer(one)), path=MODELS)
    for turn in range(2):
        all_at_once = [lambda one: (barrier.wait(NEVER), echo_prompt(one))] * 64
        server.script(*all_at_once, path=GENERATION)
        prompts = [f"{turn}-{number}" for number in range(64)]
        callers = [InThread(client.complete, prompt) for prompt in prompts]
        assert texts_of(caller.outcome(NEVER) for caller in callers) == prompts
    assert [request.path for request in server.requests].count(MODELS) == 1
    assert set(connections_of(server)) == {*range(1, 65)}
    assert "pool is full" not in caplog.text


@table("deadline kind", (None, AbortError), (LIMIT, LLMTimeoutError))
def test_waiting_for_a_thread_that_asks_for_the_model_ends(server, connect, deadline, kind):
    client = connect(server, default_model=None)
    server.script(stall(), path=MODELS)
    first = InThread(client.complete, "x")
    wait_until(lambda: server.requests)
    stream = client.stream_complete("x", deadline=deadline)
    stop = stream.cancel if deadline is None else lambda: None
    wait = functools.partial(wait_until, lambda: stream.completion.total_s)
    assert type(read_and_stop(stream, wait, stop)) is kind
    assert first.is_running()
    client.close()
    assert type(first.outcome()) is AbortError


def test_a_client_can_be_pickled(server, connect):
    client = connect(server, api_key="sekrit", default_headers={"X-Team": "a"})
    client.complete(PROMPT)
    with pickle_copy(client) as copied:
        assert copied.config == client.config
        assert copied.complete(PROMPT).text == " Paris."
    assert connections_of(server) == [1, 2]
    assert server.requests[1].headers["Authorization"] == "Bearer sekrit"


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
    assert connections_of(server) == [1, 2]


FORKED: Final = """
import os, sys, vllm_provider
from concurrent.futures import ThreadPoolExecutor
client = vllm_provider.VLLMClient(sys.argv[1], default_model="parrot")

def ask(name):
    for prompt in (f"{name} 1", f"{name} 2", f"{name} 3", f"{name} 4"):
        assert client.complete(prompt).text == prompt

def start(name):
    pool = ThreadPoolExecutor(8)
    return [pool.submit(ask, f"{name} {number}") for number in range(8)]

with client.stream_complete("stream") as stream:
    for call in start("before"):
        call.result()
    busy = start("parent")  # calls are in flight when the process forks
    child = os.fork()
    for call in busy if child else start("child"):
        call.result()
    if child == 0:
        stream.close()
        client.close()
        os._exit(0)
    print(os.waitpid(child, 0)[1])
    client.complete("last")
    print("".join(delta.text for delta in stream))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork there")
def test_a_forked_process_has_connections_of_its_own_and_leaves_its_parents_alone(server):
    may_end = threading.Event()
    server.script(send_in_two_parts(may_end), *[echo_prompt] * 96)
    server.script(lambda one: (may_end.set(), echo_prompt(one)))
    assert run_python(FORKED, server.url) == "0\nab\n"
    users: dict[int, set[bool]] = {}
    for request in server.requests:
        is_child = request.body["prompt"].startswith("child")
        users.setdefault(request.connection, set()).add(is_child)
    assert len(server.requests) == 98
    assert [len(one) for one in users.values()] == [1] * len(users)


# ---- Transport: calls while an exception is handled -------------------------


def refused_while_reset() -> ConnectionRefusedError:
    error = ConnectionRefusedError(111, "other")
    error.__context__ = ConnectionResetError(104, "other")
    return error


SILENT: Final = stall()
OTHER: Final = [
    *(refused_while_reset(), TimeoutError("other"), socket.gaierror(-2, "other")),
    *(ssl.SSLCertVerificationError("other"), requests.exceptions.ProxyError("other")),
    ValueError("other"),
]


@table(
    "step",
    *(row(None, id="refused"), row(SILENT, id="timeout"), row(reply(503), id="status")),
    *(row(Connection.close, id="closed"), row(send_and_close(b"SSH-2.0\r\n"), id="no-http")),
    row(send_and_close(FIRST), id="mid-stream"),
)
def test_an_exception_that_is_handled_changes_no_error(server, connect, retries, step):
    url = server.url if step else f"http://127.0.0.1:{closed_port()}"
    client = connect(url, timeout=LIMIT if step is SILENT else NEVER, max_retries=2)
    server.script(*[step] * 3 * (1 + len(OTHER)))

    def failure() -> tuple[Any, ...]:
        retries.pauses.clear()
        error = caught(list, client.stream_complete("x"))
        return type(error), str(error), error.retryable, len(retries.pauses)

    expected = failure()
    for outer in OTHER:
        assert while_handling(outer, failure) == expected


# ---- Transport: TLS ---------------------------------------------------------

UNKNOWN_CA: Final = "set verify to the CA bundle that signed the server's certificate"
WRONG_HOST: Final = "set base_url to a name in the server's certificate"
EXPIRED: Final = "the server's certificate must be renewed (or this machine's clock set)"
SELF_SIGNED: Final = f"TLS failed (self-signed certificate); {UNKNOWN_CA}"
MISMATCH: Final = "TLS failed (Hostname mismatch, certificate is not valid for 'other.test'.)"
MISSING: Final = "; set verify or REQUESTS_CA_BUNDLE to one that exists"


@table(
    "host verify bundle message",
    *(row(host, True, "ours", "", id=host) for host in ("127.0.0.1", "localhost", "vllm.test")),
    row("127.0.0.1", False, certifi.where(), "", id="off-wins"),
    row("127.0.0.1", certifi.where(), "ours", SELF_SIGNED, id="path-wins"),
    row("127.0.0.1", True, "", SELF_SIGNED, id="no-ca-of-ours"),
    row("other.test", True, "ours", f"{MISMATCH}; {WRONG_HOST}", id="another-host"),
    row("localhost", True, "/no/such.pem", MISSING, id="bundle-that-is-missing"),
)
@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_certificates(
    tls_server, tls_files, connect, monkeypatch, retries, test_hosts, host, verify, bundle, message
):
    """Those of `verify` or of the environment count; a bad one is not retried."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", bundle.replace("ours", tls_files[0]))
    url = tls_server.url.replace("127.0.0.1", host)
    client = connect(url, verify=verify)
    if not message:
        assert client.complete(PROMPT).text == " Paris."
        return

    for call in (client.version, client.models, functools.partial(client.health, wait=20)):
        error = caught(call)
        if message is MISSING:
            assert "/no/such.pem" in str(error)
            assert (type(error), str(error)[-len(message) :]) == (ConfigurationError, message)
        else:
            assert (type(error), error.retryable) == (NetworkError, False)
            assert str(error) == f"no connection to {url}: {message}"
    assert (retries.pauses, tls_server.requests) == ([], [])


@table(
    "reason advice",
    ("certificate has expired", EXPIRED),
    ("IP address mismatch, certificate is not valid for '1'.", WRONG_HOST),
)
def test_advice_about_a_certificate(web, reason, advice):
    cause = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] failed")
    cause.verify_message, cause.reason = reason, "CERTIFICATE_VERIFY_FAILED"
    raised = requests.exceptions.SSLError("no")
    raised.__cause__ = cause
    web.post(COMPLETIONS_URL, body=raised)
    error = caught(web_client().complete, "x")
    assert str(error) == f"no connection to {WEB}: TLS failed ({reason}); {advice}"


TLS_CLOSED: Final = "the server closed the TLS handshake; is it starting or stopping?"
RESET: Final = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@table(
    "raw linger message pauses",
    row(reply(400, "Invalid HTTP request"), None, "TLS failed (", 0, id="speaks-http"),
    row(b"", None, TLS_CLOSED, 2, id="closes-as-a-gateway-that-stops-does"),
    row(b"", RESET, "connection reset by peer; is vLLM running? (curl ", 2, id="resets"),
)
def test_a_tls_handshake_that_fails(connect, retries, raw, linger, message, pauses):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(1 + pauses):
                with listener.accept()[0] as sock:
                    sock.recv(65536)
                    sock.sendall(raw)
                    if linger:
                        sock.setsockopt(*linger)

        serving = InThread(serve)
        url = url_of(listener, "https")
        error = caught(connect(url, max_retries=2).complete, "x")
        serving.outcome()
    assert (type(error), error.retryable) == (NetworkError, pauses > 0)
    assert str(error).startswith(f"no connection to {url}: {message}")
    assert pauses > 0 or str(error).endswith(f"); does {url} speak https?")
    assert len(retries.pauses) == pauses


def test_http_to_a_server_that_speaks_https(tls_server, connect, retries):
    url = tls_server.url.replace("https", "http")
    error = caught(connect(url).complete, "x")
    assert type(error) is NetworkError
    assert str(error).startswith(f"closed before a reply: POST {url}/v1/completions (")
    assert str(error).endswith("); is vLLM still running, and is it http there?")
    assert retries.pauses == []


# ---- Transport: proxies, netrc, other runtimes ------------------------------


@table("host", "127.0.0.1", "127.1.2.3", "localhost", "[::1]", "vllm.test")
@table("api_key sent", ("sekrit", "Bearer sekrit"), ("EMPTY", None))
def test_neither_netrc_nor_a_proxy_counts_for_this_machine(
    server, connect, monkeypatch, tmp_path, host, api_key, sent
):
    look_up = socket.getaddrinfo  # each host is this machine here, with or without IPv6
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *args: look_up("127.0.0.1", *args))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "vllm.test")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {host} login wrong password wrong\ndefault login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))

    client = connect(f"http://{host}:{port_of(server)}", api_key=api_key)
    client.complete(PROMPT)
    list(client.stream_complete(PROMPT))
    client.models()
    assert [request.headers["Authorization"] for request in server.requests] == [sent] * 3


def test_a_proxy_of_the_environment_is_used(server, connect, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url.replace("//", "//user:pass@"))
    server.script(reply(200, text_event("a")), sse(text_event("b")))
    client = connect("http://vllm.test:8000", api_key="sekrit")
    assert client.complete("x").text == "a"
    assert texts_of(client.stream_complete("x")) == ["b"]
    for request in server.requests:
        assert (request.path, request.connection) == ("http://vllm.test:8000/v1/completions", 1)
        assert request.headers["Host"] == "vllm.test:8000"
        keys = [request.headers[name] for name in ("Authorization", "Proxy-Authorization")]
        assert keys == ["Bearer sekrit", "Basic dXNlcjpwYXNz"]


@table("scheme reason", ("http", ""), ("https", "Tunnel connection failed: 407 Proxy Authentica"))
def test_a_proxy_that_is_down_or_refuses(server, connect, monkeypatch, retries, scheme, reason):
    server.script(*[reply(407, "", CLOSING)] * 4)
    port = port_of(server) if reason else closed_port()
    monkeypatch.setenv(f"{scheme}_proxy", f"http://user:sekrit@127.0.0.1:{port}")
    error = caught(connect(f"{scheme}://vllm.test:80").complete, "x")
    start = f"no connection to {scheme}://vllm.test:80: its proxy failed ({reason}"
    assert (type(error), str(error)[: len(start)]) == (NetworkError, start)
    assert str(error).endswith("); check HTTPS_PROXY and NO_PROXY")
    assert "sekrit" not in str(error)
    assert len(retries.pauses) == 3


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


def check_client(client: VLLMClient) -> None:
    """Make nine calls that are answered, then two that are not: for a timeout and for a stop."""
    prompt = "The capital of France is"
    assert set(client.map(lambda text: client.complete(text).text, [prompt] * 8)) == {" Paris."}
    assert "".join(delta.text for delta in client.stream_complete(prompt)) == " Paris."
    started_at = time.monotonic()
    with pytest.raises(LLMTimeoutError):
        client.complete("x", timeout=0.3)
    stream = client.stream_complete("x")
    threading.Timer(0.2, stream.cancel).start()
    with pytest.raises(AbortError):
        list(stream)
    assert time.monotonic() - started_at < 5
    client.close()


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
    port, greetings = port_of(either_server), []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                InThread(serve_one, listener.accept()[0])

    def serve_one(near: socket.socket) -> None:
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            greetings.append(greet(near))
            targets = {near: far, far: near}
            while True:
                source = select.select([near, far], [], [])[0][0]
                raw = source.recv(65536)
                if not raw:
                    return
                targets[source].sendall(raw)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = InThread(serve)
        monkeypatch.setenv(name, url_of(listener, scheme))
        either_server.script(*[None] * 9, stall(), stall())
        check_client(connect(f"{'https' if tls else 'http'}://vllm.test:{port}", api_key="sekrit"))
        for _ in range(2):
            either_server.aborted.get(timeout=IN_TIME)
        listener.shutdown(socket.SHUT_RDWR)
        serving.outcome()
    assert b"vllm.test" in greetings[0]
    assert b"sekrit" not in b"".join(greetings)


@table(
    "module code",
    row("gevent", "import gevent.monkey; gevent.monkey.patch_all()", id="gevent"),
    row("truststore", "import truststore; truststore.inject_into_ssl()", id="truststore"),
)
@http_and_https
def test_a_runtime_that_replaces_sockets(either_server, tls_files, module, code):
    pytest.importorskip(module)
    either_server.script(*[None] * 9, stall(), stall())
    code += """
import pytest, sys, threading, time
from vllm_provider import *
""" + inspect.getsource(check_client)
    code += "check_client(VLLMClient(sys.argv[1], default_model='parrot', verify=sys.argv[2]))"
    assert run_python(code, either_server.url, tls_files[0]) == ""
    for _ in range(2):
        either_server.aborted.get(timeout=IN_TIME)


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
        assert connect(f"http://127.0.0.1:{port}").complete(PROMPT).text == " Paris."
    assert_pauses(retries, 0.01, 0.02)


RUNNING: Final = "is vLLM running? (curl {url}/health)"
REFUSED: Final = f"connection refused; {RUNNING}"
UNKNOWN_HOST: Final = "unknown host; is base_url spelled right?"


@table(
    "raised message maximum pauses",
    *((None, REFUSED, maximum, pauses) for maximum, pauses in ((None, 3), (2, 2), (0, 0))),
    (OSError(errno.EHOSTUNREACH, "No Route"), f"no route; {RUNNING}", None, 3),
    (OSError(errno.ENETUNREACH, "No Net"), f"no net; {RUNNING}", None, 3),
    (OSError(errno.ECONNRESET, "Reset"), f"reset; {RUNNING}", None, 3),
    (socket.gaierror(socket.EAI_NONAME, "?"), UNKNOWN_HOST, None, 0),
)
def test_no_connection(connect, monkeypatch, retries, raised, message, maximum, pauses):
    def look_up(*_args: Any, **_options: Any) -> None:
        raise raised

    if raised:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
    url = f"http://127.0.0.1:{closed_port()}"
    error = caught(connect(url, max_retries=maximum).complete, "x")
    assert str(error) == f"no connection to {url}: {message.format(url=url)}"
    assert (type(error), error.retryable) == (NetworkError, message != UNKNOWN_HOST)
    assert_pauses(retries, *(0.01, 0.02, 0.04)[:pauses])

    lines = traceback.format_exception(error)  # short, with the cause
    assert "".join(lines).count("\n") < 80
    assert "During handling of" not in "".join(lines)
    assert isinstance(error.__cause__, ConnectionRefusedError if raised is None else type(raised))


@table(
    "status wait_s least_s",
    *((429, None, 0.0), (502, None, 0.0), (503, None, 0.0), (503, "0.1", 0.1), (503, "-5", 0.0)),
    *((status, "1", None) for status in (400, 403, 408, 418, 425, 500, 501, 504)),
    *((429, "31", None), (503, "31", None)),  # above max_retry_delay
)
@whole_and_stream
def test_which_status_is_retried(server, connect, retries, is_stream, status, wait_s, least_s):
    headers = {} if wait_s is None else {"Retry-After": wait_s}
    server.script(reply(status, {"error": "busy"}, headers))
    client = connect(server)
    if least_s is None:
        error = caught(generate, client, is_stream, PROMPT)
        assert (error.status_code, error.server_message) == (status, "busy")
        assert error.retry_after == float(wait_s)
        assert (len(server.requests), retries.pauses) == (1, [])
        return

    assert "".join(texts_of(generate(client, is_stream, PROMPT))) == " Paris."
    (pause,) = retries.pauses
    assert least_s + 0.005 <= pause <= least_s + 0.01  # the random part comes on top
    first, second = server.requests
    assert second.time_s - first.time_s >= pause


def test_retries_end_with_the_last_error(server, connect, retries, caplog):
    server.script(*[reply(503, {"error": "busy"}), reply(429, {"error": "quota"})] * 4)
    error = caught(connect(server, max_retries=7, max_retry_delay=0.06).complete, "x")
    assert (type(error), error.retryable, error.server_message) == (RateLimitError, True, "quota")
    assert_pauses(retries, 0.01, 0.02, 0.04, *[0.06] * 4)
    assert (len(server.requests), len(set(retries.pauses))) == (8, 7)
    where = f"POST {server.url}/v1/completions"
    advice = "the server is busy or starting: try again later"
    assert caplog.messages[:2] == [
        f"retry 1 of 7 in 0.0 s: 503 'busy': {where}; {advice}",
        f"retry 2 of 7 in 0.0 s: 429 'quota': {where}",
    ]


@table("own_id", None, "mine-7", 7, 1.5, True)
def test_each_attempt_has_an_id_of_its_own_unless_the_caller_has_one(server, connect, own_id):
    server.script(reply(503), reply(503), None, reply(400), path=GENERATION)
    client = connect(server, default_model=None)
    completion = client.complete(PROMPT, request_id=own_id)
    error = caught(client.complete, PROMPT, request_id=own_id)
    posts = [request for request in server.requests if request.method == "POST"]
    ids = [request.headers["X-Request-Id"] for request in posts]
    if own_id is None:
        first = completion.request_id
        assert ids == [f"{first}-1", f"{first}-2", f"{first}-3", f"{error.request_id}-1"]
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first)
        assert completion.id == f"cmpl-{ids[2]}"
    else:
        assert ids == [str(own_id)] * 4
        assert completion.request_id == error.request_id == str(own_id)


# ---- Stream decoder ---------------------------------------------------------

NO_LINE_ENDS: Final = "\u2028\u2029\x85\x0b\x0c\x1c"


@table(
    "raw events",
    # the examples of the HTML standard, section 9.2.6
    (b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
    (b": c\n\ndata: 1\nid: 1\n\ndata:2\nid\n\ndata:  3", ["1", "2"]),
    (b"data\n\ndata\ndata\n\ndata:", ["\n"]),
    (b"data:a\n\ndata: a\n\ndata:  a\n\ndata:\ta\n\n", ["a", "a", " a", "\ta"]),
    # line ends: CRLF, CR and LF, and nothing else
    (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]), (b"data: a\r\rdata: b\r\r", ["a", "b"]),
    (b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\n", ["a", "b", "c"]), (b"data: a\n\r", ["a"]),
    (b"data: a\r\ndata: b\r\n\r\n", ["a\nb"]), (b"\n\n\r\r\n\ndata: a\n\n\n\n", ["a"]),
    (b"data: a\n\ndata: b\rdata: c\n\n", ["a", "b\nc"]),
    (f"data: {NO_LINE_ENDS}\n\n".encode(), [NO_LINE_ENDS]),
    # the byte order mark: one, at the start
    (b"\xef\xbb\xbfdata: a\n\n", ["a"]), (b"data: \xef\xbb\xbfa\n\n", ["\ufeffa"]),
    (b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", ["b"]),
    (b"\n\xef\xbb\xbfdata: a\n\ndata: b\n\n", ["b"]),
    # comments, other fields, empty data, an event that has not ended
    (b": keep-alive\n\n:\n\n: \n\ndata: a\n: c\ndata: b\n\n", ["a\nb"]),
    (b"event: ping\n\nevent: x\ndata: a: b\nid: 1\nretry: 5\n\n", ["a: b"]),
    (b"Data: a\n data: b\ndata : c\ndatax: d\nxdata: e\n\n", []),
    (b"data: \n\ndata:\n\n", []), (b"data: a\n", []), (b"", []),
    # as vLLM sends them, and almost so; cuts inside a letter; what is not UTF-8
    (b'data: {"\\n"}\n\ndata: {}\n\ndata: [DONE]\n\n', ['{"\\n"}', "{}", "[DONE]"]),
    (b"data: {}\n\ndata: {\r}\n\ndata: {}\ndata: a\n\n", ["{}", "{", "{}\na"]),
    ("data: こんにちは 🌸🚀é\n\n".encode(), ["こんにちは 🌸🚀é"]),
    (b"data: \xff\xe3\x81a\n\ndata: {\xff}\n\n", ["\ufffd\ufffda", "{\ufffd}"]),
)  # fmt: skip
def test_sse(raw, events):
    def feed_all(*pieces: bytes) -> list[str]:
        return list(itertools.chain.from_iterable(map(_SSEDecoder().feed, pieces)))

    assert feed_all(raw) == feed_all(b"", raw, b"") == events
    assert feed_all(*[bytes([byte]) for byte in raw]) == events
    for first, second in itertools.combinations_with_replacement(range(len(raw) + 1), 2):
        assert feed_all(raw[:first], raw[first:second], raw[second:]) == events, (first, second)


def test_an_event_is_complete_as_soon_as_its_blank_line_is_there():
    decoder = _SSEDecoder()
    found = [decoder.feed(bytes([byte])) for byte in b"data: a\n\ndata: b\r\r\n"]
    assert found == [*[[]] * 8, ["a"], *[[]] * 8, ["b"], []]


@table(
    "raw is_end",
    *((raw, True) for raw in (b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r\n")),
    *((raw, False) for raw in (b"data: a", b"data: a\ndata: [DONE]", b"data: [DONE")),
    (b"data: [DONE]\n\n", False),  # complete before
)
def test_done_counts_at_the_end_of_the_connection(raw, is_end):
    for cut in range(len(raw) + 1):
        decoder = _SSEDecoder()
        decoder.feed(raw[:cut])
        decoder.feed(raw[cut:])
        assert decoder.finish() == ["[DONE]"] * is_end, cut


@table(
    "start piece",
    (b"data: ", b"x" * 100), (b": ", b"x" * 100),  # a line that does not end
    (b"", b"data: " + b"x" * 93 + b"\n"), (b"", b"data:\n" * 20),  # an event that does not
)  # fmt: skip
def test_an_event_may_be_no_larger_than_its_limit(monkeypatch, start, piece):
    assert vllm_provider.MAX_EVENT_BYTES == 64 * 1024 * 1024
    monkeypatch.setattr(vllm_provider, "MAX_EVENT_BYTES", 1000)
    decoder = _SSEDecoder()
    for _ in range(3):  # the limit counts one event, not all of them
        assert decoder.feed(b"data: " + b"x" * 994) == []
        assert decoder.feed(b"\n\n") == ["x" * 994]
        assert decoder.feed(b": " + b"x" * 998 + b"\n\n") == []
    decoder.feed(start)
    for _ in range(1000 // len(piece) - 1):
        assert decoder.feed(piece) == []
    error = caught(lambda: [decoder.feed(piece) for _ in range(4)])
    message = "an event of the stream is larger than 1000 bytes"
    assert (type(error), str(error)) == (ProtocolError, message)


EVENTS: Final = [EVENT_A, EVENT_A.replace(b'"a"', b'"b"'), b"data: [DONE]\n\n"]
BODY: Final = b"".join(EVENTS)
PLAIN_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"


def framed(start: bytes = b"", end: bytes = b"", last: bytes = LAST_CHUNK) -> bytes:
    """Return a chunked reply whose sizes have something before and after them."""
    chunks = [start + b"%X" % len(raw) + end + b"\r\n" + raw + b"\r\n" for raw in EVENTS]
    return SSE_HEAD + b"".join(chunks) + last


@table(
    "raw is_reused",
    row(sse(*EVENTS[:2]), True, id="chunked-as-vllm-does"),
    row(SSE_HEAD + chunk(BODY) + LAST_CHUNK, True, id="all-in-a-chunk"),
    row(SSE_HEAD + b"".join(chunk(bytes([b])) for b in BODY) + LAST_CHUNK, True, id="a-byte-each"),
    row(SSE_HEAD + chunk(b": " + b"a" * 99_000 + b"\n" + BODY) + LAST_CHUNK, True, id="large"),
    row(framed(start=b"000"), True, id="capital-digits-after-zeros"),
    row(framed(end=b';name="a value"'), True, id="extensions"),
    row(framed(end=b" "), True, id="spaces"),
    row(framed(last=b"000;a=b\r\n\r\n"), True, id="last-chunk-with-zeros"),
    row(framed(last=b"0\r\nX-Checksum: 1\r\n\r\n"), True, id="trailers"),
    row(PLAIN_HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY, True, id="content-length"),
    row(PLAIN_HEAD + b"connection: close\r\n\r\n" + BODY, False, id="until-it-closes"),
)
def test_a_stream_however_it_is_framed_and_cut(server, connect, raw, is_reused):
    client = connect(server, max_retries=0)
    cuts = range(raw.index(b"\r\n\r\n") + 4, len(raw), len(raw) // 60 + 1)
    for cut in cuts:

        def in_two(connection: Connection, cut: int = cut) -> None:
            connection.send(raw[:cut])
            connection.pause(0.001)
            connection.send(raw[cut:])
            if not is_reused:
                connection.close()

        server.script(in_two, send_and_close(raw[:cut]))
        assert texts_of(client.stream_complete("x")) == ["a", "b"], cut

        stream = client.stream_complete("x")
        outcome = InThread(list, stream).outcome()
        arrived = re.sub(rb"\r\n1\r\n", b"", raw[:cut])
        events = "ab"[: arrived.count(b"\n\n")]
        assert texts_of(stream.completion.choices) == [events] * bool(events), cut
        if isinstance(outcome, list):
            assert (b"DONE]" in arrived, texts_of(outcome)) == (True, ["a", "b"]), cut
        else:
            assert type(outcome) is StreamError, cut
            assert (outcome.retryable, outcome.partial) == (True, stream.completion)
    connections = {request.connection for request in server.requests}
    assert len(connections) == len(cuts) * (1 if is_reused else 2)


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
    server.script(lambda it: (it.send(FIRST), has_read.wait(IN_TIME), it.reset()))
    stream = connect(server).stream_complete("x")
    assert next(stream).text == "a"
    has_read.set()
    error = caught(next, stream)
    where = f"POST {server.url}/v1/completions"
    assert str(error) == f"the reply broke off: {where}: connection reset by peer"
    assert (type(error), error.partial.text, len(server.requests)) == (StreamError, "a", 1)


# ---- Replies: errors --------------------------------------------------------

ROOT_ADVICE: Final = "is base_url the server's root, and is it vLLM? (curl BASE_URL/v1/models)"
TOO_BUSY: Final = "the server is busy or starting: try again later"
STARTING: Final = "a gateway is in front of the server, which may be starting: try again later"
NO_TEMPLATE: Final = (
    "this model has no chat template: use complete(), or start vLLM with --chat-template FILE"
)
NO_PATH: Final = "the key may not do this, or a gateway hides the path"
INVALID: Final = InvalidRequestError
UNAVAILABLE: Final = ProviderUnavailableError


@table(
    "status text kind retryable advice",
    # by the status; 201 is not what vLLM answers, and after 501 it never will be
    (201, "no", StatusError, False, ""), (405, "no", StatusError, False, ROOT_ADVICE),
    (408, "no", StatusError, True, ""), (418, "no", StatusError, False, ""),
    (413, "no", StatusError, False, "a proxy limits the size of a request"),
    (425, "no", StatusError, True, ""), (429, "no", RateLimitError, True, ""),
    (400, "no", INVALID, False, ""), (422, "no", INVALID, False, ""),
    (401, "no", AuthenticationError, False,
     "set api_key or VLLM_API_KEY to the key the server was started with"),
    (403, "no", AccessDeniedError, False, NO_PATH), (404, "no", NotFoundError, False, ROOT_ADVICE),
    (500, "no", UNAVAILABLE, True, ""), (529, "no", UNAVAILABLE, True, ""),
    (501, "no", UNAVAILABLE, False, ""), (503, "no", UNAVAILABLE, True, TOO_BUSY),
    (502, "no", UNAVAILABLE, True, "the gateway got no reply from vLLM: is it running?"),
    (504, "no", UNAVAILABLE, True, "a proxy gave up waiting; vLLM may still be at work"),
    # by the text
    (400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser', INVALID,
     False, "start vLLM with --enable-auto-tool-choice --tool-call-parser NAME, or send no tools"),
    (400, "default template is no longer allowed, so you must provide a chat template", INVALID,
     False, NO_TEMPLATE),
    (400, "Chat template is passed, but --trust-request-chat-template is not set.", INVALID,
     False, "start vLLM with that flag, or send no chat_template"),
    (400, "Cannot apply chat template to an empty conversation.", INVALID, False, ""),
    (400, "Requested sample logprobs of 500, which is greater than max allowed: 20", INVALID,
     False, "ask for fewer, or start vLLM with --max-logprobs N"),
    (500, "EngineCore encountered an issue. See stack trace (above).", UNAVAILABLE,
     True, "the engine has died: look at the server's log and start it again"),
    (400, "Out of range float values are not JSON compliant", UNAVAILABLE,
     False, "the model computed NaN: try without logprobs, or another --dtype"),
    (500, "maximum context length is 2048", UNAVAILABLE, True, ""),  # no matter of lengths
    # by the page of a gateway, which may have a server that is starting
    *((status, f"<html>{text}", UNAVAILABLE, True, STARTING) for status, text in (
        (404, "<p>Model is warming up</p>"), (404, "INITIALIZING"), (425, "service is starting"),
        (404, "waiting for service to respond"), (404, "starting up"), (403, "wait... Cloudflare"),
    )),
    (404, " <!doctype html>starting up", UNAVAILABLE, True, STARTING),
    (404, "<html>nothing here", NotFoundError, False, ROOT_ADVICE),
    (404, "warming up", NotFoundError, False, ROOT_ADVICE),
    (403, "<html>warming up", AccessDeniedError, False, NO_PATH),
    (400, "<html>warming up", INVALID, False, ""),
)  # fmt: skip
@whole_and_stream
def test_http_error(web, is_stream, status, text, kind, retryable, advice):
    web.post(COMPLETIONS_URL, status=status, body=text)
    error = caught(generate, web_client(max_retries=1, min_retry_delay=0.001), is_stream)
    message = f"{status} {text.strip()!r}: POST {COMPLETIONS_URL}{advice and '; '}{advice}"
    assert (type(error), str(error)) == (kind, message)
    assert (error.status_code, error.retryable, error.retry_after) == (status, retryable, None)
    assert (error.server_message, error.partial.choices) == (text, ())
    assert len(web.calls) == (2 if status in (429, 502, 503) or advice == STARTING else 1)
    ids = [call.request.headers["X-Request-Id"] for call in web.calls]
    assert ids == [f"{error.request_id}-{number}" for number in (1, 2)][: len(ids)]


PAGE: Final = "<html>\r\n<head><title>Bad\tGateway &amp; co</title></head></html>"
BAD_PROMPT: Final = '{"type": "bad", "input": "MY PROMPT"}'
BAD_DETAIL: Final = [{"type": "bad", "input": {"prompt": "MY PROMPT"}}]


@table(
    "payload message code",  # the code is None for what is no error in a reply with status 200
    (error_payload("bad x"), "bad x", 400),  # since 0.10.1; those of 0.10.0 and others:
    ({"object": "error", "message": "a", "code": 400}, "a", 400),
    ({"error": {"message": "a", "code": 422}}, "a", 422),
    ({"error": error_payload("deep", 405)}, "deep", 405), ({"error": "Scaling."}, "Scaling.", 500),
    ({"error": {"msg": "a"}}, '{"msg": "a"}', 500), (error_payload("", 500), "", 500),
    ({"error": {"message": None, "code": 400}}, "", 400),
    (error_payload("EngineCore died."), "EngineCore died.", 500),  # 400 up to 0.14
    ({"choices": [1], **error_payload("a", 501)}, "a", 501), (error_payload("a", 400), "a", 400),
    *((error_payload("a", code), "a", 500) for code in ("x", True, 399, 600, 4e2)),
    (error_payload("a", 599), "a", 599), ({"detail": "Not Found"}, "Not Found", None),
    ({"detail": [{"a": 1}]}, '[{"a": 1}]', None), ({"message": "a"}, "a", None),
    (["a"], '["a"]', None), ("quota", "quota", None), (None, "", None),
)  # fmt: skip
def test_payload_of_an_error(web, payload, message, code):
    shown = repr(message) if message else "(no message)"
    web.post(COMPLETIONS_URL, status=418, json=payload)
    error = caught(web_client().complete, "Once")
    assert (error.status_code, error.server_message) == (418, message)
    assert str(error).startswith(f"418 {shown}: POST {COMPLETIONS_URL}")
    if code is None:
        return

    web.post(CHAT_URL, json=payload)
    event = f"data: {json.dumps(payload)}\n\n{DONE}"
    web.post(CHAT_URL, body=event, content_type="text/event-stream")
    kinds = {400: INVALID, 422: INVALID, 405: StatusError}
    client = web_client()
    for error in (
        *(caught(parse, payload) for parse in (parse_completion_response, parse_chat_response)),
        *(caught(client.chat, "Once"), caught(list, client.stream_chat("Once"))),
    ):
        assert type(error) is kinds.get(code, UNAVAILABLE)
        assert (error.status_code, error.server_message) == (code, message)
        assert str(error).startswith(f"{code} {shown}: ")


@table(
    "body shown server_message",
    ("a\n  b", "'a b'", None), (" \n", "(no message)", None), (b"Zo\xeb", "'Zo\ufffd'", "Zo\ufffd"),
    (PAGE, "'Bad Gateway & co'", None), ("Zoë".encode(), "'Zoë'", "Zoë"),
    ('{"error": ', """'{"error":'""", None), (" " * 5000 + "x", "'x'", None),
    ("x" * 200, repr("x" * 200), None), ("x" * 201, repr("x" * 200 + "…"), None),
    ("[" * 100_000, repr("[" * 200 + "…"), None),  # nested beyond reason
    # a validation error quotes the prompt
    (json.dumps({"error": BAD_PROMPT}), """'{"type": "bad", …'""", BAD_PROMPT),
    ("{'type': 'bad', 'input': 'MY PROMPT'}", repr("{'type': 'bad', …"), None),
    (json.dumps({"detail": BAD_DETAIL}), """'[{"type": "bad", …'""", json.dumps(BAD_DETAIL)),
    ids=lambda value: repr(value)[:40],
)  # fmt: skip
def test_text_of_an_error(web, body, shown, server_message):
    web.post(COMPLETIONS_URL, status=418, body=body)
    error = caught(web_client().complete, "Once")
    assert str(error) == f"418 {shown}: POST {COMPLETIONS_URL}"
    assert error.server_message == (body if server_message is None else server_message)


def test_a_very_large_body_of_an_error_is_cut(server, connect, monkeypatch):
    assert vllm_provider.MAX_ERROR_BYTES == 1024 * 1024
    monkeypatch.setattr(vllm_provider, "MAX_ERROR_BYTES", 1000)
    head = JSON_HEAD.replace(b"200 OK", b"418 No")
    server.script(repeat(chunk(b"x" * 100), head, 0.0))
    error = caught(connect(server).complete, "Once")
    assert (error.status_code, len(error.server_message)) == (418, 1000)
    server.aborted.get(timeout=IN_TIME)


KEY: Final = 'sk/ab&c=12"3<45'
KEY_IN_JSON: Final = json.dumps(KEY)[1:-1]
KEY_IN_URL: Final = urllib.parse.quote(KEY, safe="")


@table(
    "spelling",
    *(KEY_IN_JSON, KEY_IN_JSON.replace("/", "\\/"), json.dumps(KEY_IN_JSON)[1:-1]),
    *(KEY_IN_URL, KEY_IN_URL.lower(), html.escape(KEY)),
    *("".join(form.format(ord(char)) for char in KEY) for form in ("\\u{:04x}", "\\u{:04X}")),
    *("".join(form.format(ord(char)) for char in KEY) for form in ("&#{};", "&#x{:X};")),
)
@table(
    "status kind body",
    (401, "plain", "bad key {}"), (401, "json", '{{"error": "bad key {}"}}'),
    (200, "json", '{{"error": {{"message": "bad key {}", "code": 401}}}}'),
    (200, "html", "<p>bad key {}</p>"), (403, "html", "<title>bad key {}</title>"),
    (200, "event-stream", 'data: {{"error": "bad key {}"}}\n\n'),
    (200, "event-stream", "data: bad key {}\n\n"), (307, "plain", "https://x/{}/v1/completions"),
)  # fmt: skip
def test_no_error_shows_the_key_in_any_spelling(web, spelling, status, kind, body):
    body = body.format(spelling)
    headers = {"Location": body} if status == 307 else {}
    options = {"status": status, "body": body, "headers": headers}
    web.post(COMPLETIONS_URL, content_type=f"text/{kind}", **options)
    error = caught(list, web_client(api_key=KEY).stream_complete("x"))
    shown = f"{error} {getattr(error, 'server_message', '')}"
    assert "***" in shown
    for secret in (KEY, spelling, KEY[3:8]):
        assert secret not in html.unescape(shown)


LATER: Final = email.utils.format_datetime(datetime.now(UTC) + timedelta(hours=9))


@table(
    "value minimum maximum",
    ("7", 7, 7), ("0", 0, 0), (" 1.5 ", 1.5, 1.5), ("-5", 0, 0), ("soon", None, None),
    ("", None, None), ("inf", None, None), ("nan", None, None), ("1" * 5000, None, None),
    ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0), ("Wed, 99 Oct 2015 07:28:00 GMT", None, None),
    ("Wed, 21 Oct 99999 07:28:00 GMT", None, None),
    ("Wed, 21 Oct 2015 07:28:00 +99999999999", None, None),
    *((LATER.replace("+0000", zone), 25_200, 32_400) for zone in ("+0000", "-0000", "GMT")),
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_retry_after(web, value, minimum, maximum):
    web.post(COMPLETIONS_URL, status=503, body="busy", headers={"retry-after": value})
    retry_after = caught(web_client().complete, "Once").retry_after
    assert retry_after is minimum is None or minimum <= retry_after <= maximum


@table(
    "path location base_url",
    *((GENERATION, location, None) for location in ("http://[::1", "", "/login?next=%2Fv1%2Fcomp")),
    (GENERATION, "https://sso.example/login?next=/v1/completions", None),
    (GENERATION, "https://gpu.example/v1/completions", "https://gpu.example"),
    (GENERATION, "https://gpu.example/v1/completions/", "https://gpu.example"),
    (GENERATION, "http://vllm.test/a/v1/completions", "http://vllm.test/a"),
    (GENERATION, "/a/v1/completions", "http://vllm.test/a"),
    (MODELS, "https://gpu.example/v1/models", "https://gpu.example"),
    ("/health", "https://gpu.example/health?a=b", "https://gpu.example"),
)
@table("status", 301, 302, 303, 307, 308)
def test_redirects_are_not_followed(web, status, path, location, base_url):
    calls = {GENERATION: ("POST", "complete", ["x"]), MODELS: ("GET", "models", [])}
    method, name, args = calls.get(path, ("GET", "health", []))
    web.add(method, WEB + path, status=status, headers={"Location": location} if location else {})
    error = caught(getattr(web_client(max_retries=3), name), *args)
    advice = "" if base_url is None else f"; set base_url to {base_url!r}"
    assert (type(error), error.status_code, error.retryable) == (StatusError, status, False)
    reason = "which is not followed: the prompt would go to another place"
    assert str(error) == f"{method} {WEB}{path} is redirected to {location!r}, {reason}{advice}"
    assert len(web.calls) == 1


# ---- Replies: what requests raises ------------------------------------------

REQUESTS_KINDS: Final = {
    LLMTimeoutError: "Timeout ConnectTimeout ReadTimeout",
    ConfigurationError: "InvalidHeader InvalidProxyURL InvalidSchema InvalidURL JSONDecodeError"
    " MissingSchema",
    NetworkError: "ChunkedEncodingError ConnectionError ContentDecodingError HTTPError"
    " InvalidJSONError ProxyError RequestException RetryError SSLError StreamConsumedError"
    " TooManyRedirects URLRequired UnrewindableBodyError",
}  # fmt: skip
KIND_BY_NAME: Final = {
    name: kind for kind, names in REQUESTS_KINDS.items() for name in names.split()
}
REQUESTS_ERRORS: Final = {
    name: found
    for name, found in inspect.getmembers(requests.exceptions, inspect.isclass)
    if issubclass(found, requests.RequestException)
}


@table("name", *REQUESTS_ERRORS)  # one that this table does not know is a KeyError
@whole_and_stream
def test_every_exception_of_requests_is_translated(web, is_stream, name):
    arguments = ("broken", "{", 0) if name == "JSONDecodeError" else ("broken",)
    raised = REQUESTS_ERRORS[name](*arguments)
    web.post(COMPLETIONS_URL, body=raised)
    error = caught(generate, web_client(), is_stream)
    assert (type(error), error.__cause__) == (KIND_BY_NAME[name], raised)
    assert WEB in str(error)
    assert KIND_BY_NAME.keys() == REQUESTS_ERRORS.keys()


# ---- Replies: that are none of vLLM's ---------------------------------------


@table(
    "body",
    *("", "[1]", '"x"', "null", '{"choices": [', '{"choices": []} {}', "<html>\n<h1>Welcome!</h1>"),
    row("[" * 100_000, id="nested-beyond-reason"),
)
@table("is_event", row(False, id="whole"), row(True, id="event"))
def test_what_is_not_json(web, is_event, body):
    lines = " ".join(body.split())
    if is_event:
        body = f"data: {json.dumps(text_event('a'))}\n\ndata: {lines or ' '}\n\n{DONE}"
    content_type = "text/event-stream" if is_event else "application/json"
    web.post(COMPLETIONS_URL, body=body, content_type=content_type)
    error = caught(list, web_client().stream_complete("Once"))
    quoted = repr(lines if len(lines) <= 200 else lines[:200] + "…")
    assert str(error) == f"not the JSON vLLM sends: POST {COMPLETIONS_URL}: {quoted}; {ROOT_ADVICE}"
    assert (type(error), error.retryable, error.status_code) == (ProtocolError, False, None)
    assert error.partial.text == ("a" if is_event else "")


@table("encoding", "gzip", "br", "identity, gzip", "Identity", "")
@whole_and_stream
def test_encodings(web, is_stream, encoding):
    web.post(COMPLETIONS_URL, json=text_event("a"), headers={"Content-Encoding": encoding})
    if encoding in ("Identity", ""):
        assert texts_of(generate(web_client(), is_stream)) == ["a"]
    else:
        error = caught(generate, web_client(), is_stream)
        reason = f"the reply is encoded as {encoding!r}, which was not requested"
        message = f"{reason}: POST {COMPLETIONS_URL}"
        assert (type(error), str(error)) == (ProtocolError, message)
    assert web.calls[0].request.headers["Accept-Encoding"] == "identity"


@table(
    "content_type body is_stream text",
    ("Content-Type: Text/Event-Stream", BODY, True, "ab"),
    ("X: 1", BODY, True, "ab"),
    ("X: 1", EVENT_A[6:], False, "a"),
    ("Content-Type: application/json", EVENT_A[6:], True, "a"),  # a gateway that never streams
    ("Content-Type: text/event-stream", BODY, False, "ab"),  # one that always does
)
def test_how_a_reply_is_read(server, connect, content_type, body, is_stream, text):
    head = f"HTTP/1.1 200 OK\r\n{content_type}\r\nConnection: close\r\n\r\n"
    server.script(send_and_close(head.encode() + body))
    assert "".join(texts_of(generate(connect(server), is_stream))) == text


TWO_LENGTHS: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"


@table(
    "raw kind message",
    (b"H", NetworkError, "closed in the first line of a reply: {} ('H"),
    (b"HTTP/1.1 2", NetworkError, "closed in the first line of a reply: {} ("),
    (b"HTTP/1.1 200 OK\r\nContent-Ty", NetworkError, "closed in the headers of a reply: {}"),
    (b"HTTP/1.1 200 OK\r\nX: 1\r\n", NetworkError, "closed in the headers of a reply: {}"),
    (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", ProtocolError, "not the JSON vLLM sends: {}"),
    (b"HTTP/1.0 200 OK\r\nX: 1\r\n\r\n", ProtocolError, "not the JSON vLLM sends: {}"),
    (b"SSH-2.0-OpenSSH\r\n", ProtocolError, "not an HTTP reply: {}: 'SSH-2.0-Op"),
    (b"HTTP/1.1 abc OK\r\n\r\n", ProtocolError, "not an HTTP reply: {}"),
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
    error = caught(generate, client, is_stream)
    message = f"the reply is larger than 100000 bytes: POST {server.url}/v1/completions"
    assert (type(error), str(error)) == (ProtocolError, message)
    server.aborted.get(timeout=IN_TIME)


def test_a_stream_has_no_limit_in_total_but_each_event_has(server, connect, monkeypatch):
    monkeypatch.setattr(vllm_provider, "MAX_REPLY_BYTES", 1000)
    monkeypatch.setattr(vllm_provider, "MAX_EVENT_BYTES", 1000)
    client = connect(server)
    events = [text_event("a" * 500)] * 9
    too_long = chunk(b"data: " + b"b" * 1000)
    server.script(sse(*events), stall(sse(*events, done=False, end=False) + too_long))
    assert len("".join(texts_of(client.stream_complete("x")))) == 4500
    error = caught(list, client.stream_complete("x"))
    assert (type(error), len(error.partial.text)) == (ProtocolError, 4500)
    server.aborted.get(timeout=IN_TIME)


# ---- Replies: what does not fit ---------------------------------------------

OVERFLOW_032: Final = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least"
    " 2049 input tokens, which exceeds this limit even without any output tokens. Please reduce"
    " the length of the input prompt. (parameter=input_tokens, value=2049)"
)
M_2048: Final = "This model's maximum context length is 2048 tokens. However, "
ONLY_2048: Final = "However, the model's context length is only 2048 tokens, resulting in a maximum"
ASKED: Final = f"{M_2048}you requested {{}} output tokens and your prompt contains"
DECODER: Final = "is longer than the maximum model length of 2048. Make sure that"
LESS_011: Final = "context length is {} tokens. However, your request has {} input tokens."
TOO_LARGE: Final = "max_tokens={} cannot be greater than max_model_len={}."


@table(
    "version max_tokens input_tokens available message",  # of 2048; None: the prompt is too long
    ("0.10.0", 10, 2510, None, f"{M_2048}you requested 2520 tokens (2510 in the messages, 10 in"),
    ("0.10.0", 10, 2510, None, f"{M_2048}you requested 2510 tokens in the messages, Please"),
    ("0.10.0", 5000, 9, 2039, f"{M_2048}you requested 5009 tokens (9 in the messages, 5000 in"),
    ("0.11", 10, 2510, None, f"{M_2048}your request has 2510 input tokens. Please reduce the"),
    ("0.11", 5000, None, 2048, "'max_tokens' (5000) cannot be greater than the … length (2048)."),
    ("0.11", 5000, 9, 2039, f"tokens' is too large: 5000. {M_2048[:-11]} and your request has 9 i"),
    # completions of 0.11 print the context less max_tokens, whose default is 16
    ("completions", 5, 2502, None, LESS_011.format(2043, 2502)),
    ("completions", None, 2502, None, LESS_011.format(2032, 2502)),
    ("0.16", 10, 2510, None, f"You passed 2510 input tokens and requested 10 out. {ONLY_2048}"),
    ("0.16", 10, None, None, f"You passed 99999 input characters and requested 10. {ONLY_2048}"),
    ("0.16", 5000, 9, 2039, f"You passed 9 input tokens and requested 5000. {ONLY_2048}"),
    ("0.16", 5000, None, 2048, "max_tokens=5000cannot be greater than max_model_len=max_t=2048."),
    ("0.18", 10, 2510, None, f"{ASKED.format(10)} 2510 input tokens, for a total of 2520"),
    ("0.18", 10, 2049, None, f"{ASKED.format(10)} at least 2049 input tokens, for a total of at"),
    ("0.18", 10, None, None, f"{ASKED.format(10)} 99999 characters (the upper bound for 2038)"),
    ("0.18", 5000, 9, 2039, f"{ASKED.format(5000)} 9 input tokens, for a total of 5009 tokens."),
    ("0.32", 10, 2049, None, OVERFLOW_032),
    ("0.32", 10, None, None, f"{M_2048}your prompt contains 99999 characters (more than 20000"),
    ("0.32", 5000, None, 2048, "max_completion_tokens=5000 cannot be greater than x_len=2048."),
    ("oss", 10, 2510, None, "Input length (2510) exceeds model's maximum context length (2048)"),
    ("oss", 10, 2510, None, "max_tokens must be at least 1, got -462."),
    ("full", 10, 2048, None, "max_tokens must be at least 1, got 0. (parameter=max_tokens, val"),
    ("engine", 10, 2510, None, f"The decoder prompt (length 2510) {DECODER}"),
    ("engine", 10, 2048, None, f"decoder prompt (length 2048) plus output (at least 1) {DECODER}"),
    # about something else, or the caller's own number
    ("other", 5, None, None, "temperature must be non-negative, got -1.0. (parameter=temperature)"),
    ("other", 5, None, None, "max_tokens must be at most 5 for this user"),
    ("other", 5, None, None, "'n' is too large: it must be at most 16384"),
    ("other", 5, None, None, "prompt_logprobs must be at least 0, got -3"),
    ("other", 5, None, None, "1 validation error: max_tokens Input should be a valid integer"),
    ("other", 5, None, None, "The number of prompts (1025) exceeds the maximum of 1024"),
    *(("other", got, None, None, f"max_tokens must be at least 1, got {got}.") for got in (0, -1)),
)  # fmt: skip
def test_what_a_text_says_about_lengths(version, max_tokens, input_tokens, available, message):
    facts = _RequestFacts("POST /", version == "completions", max_tokens=max_tokens)
    overflow = _read_overflow(message, facts, 2048)
    if version == "other":
        assert overflow is None
        return
    assert (overflow.context_length, overflow.input_tokens) == (2048, input_tokens)
    assert overflow.is_lower_bound is ("at least 2049" in message)
    assert overflow.is_prompt_too_long() is (available is None)
    assert overflow.available_tokens() == (available or 2048 - (input_tokens or 0))


HIDDEN: Final = {"status": 404, "json": {"detail": "Not Found"}}
UNKNOWN: Final = "it has too many tokens"
LEFT: Final = "max_tokens must be at least 1, got -462."  # which leaves out the limit
TWO_MODELS: Final = {"data": [{"id": "a", "max_model_len": 7}, {"id": "parrot"}]}
TWO_OTHERS: Final = {"data": [{"id": "a"}, {"id": "parrot", "max_model_len": 8}]}


@table(
    "status models limit tokens shown text",
    *((status, HIDDEN, 2048, 2049, "at least 2049 tokens", OVERFLOW_032) for status in (200, 400)),
    (400, HIDDEN, 2048, None, UNKNOWN, f"You passed 99999 input characters. {ONLY_2048}"),
    *((400, {"json": {"data": one}}, None, None, UNKNOWN, LEFT) for one in ([], [{"id": "macaw"}])),
    *((400, models, None, None, UNKNOWN, LEFT) for models in (HIDDEN, {"json": TWO_MODELS})),
    (400, {"json": model_list("macaw", max_model_len=9)}, 9, 471, "471 tokens", LEFT),
    (400, {"json": TWO_OTHERS}, 8, 470, "470 tokens", LEFT),
)
def test_a_prompt_that_does_not_fit(web, status, models, limit, tokens, shown, text):
    web.get(MODELS_URL, **models)
    web.post(CHAT_URL, status=status, json=error_payload(text))
    error = caught(list, web_client().stream_chat("hello " * 2500))
    shown = f"{shown} for a context of {limit or 'unknown size'}"
    assert str(error) == f"the prompt does not fit: {shown}: POST {CHAT_URL}; shorten it"
    assert type(error) is ContextLengthError
    assert (error.limit, error.input_tokens) == (limit, tokens)
    assert (error.status_code, error.retryable, error.server_message) == (400, False, text)
    assert len(sent_bodies(web, CHAT_URL)) == 1


@table("name", "max_tokens", "max_completion_tokens")
@table("value", 5000, "5000")
def test_max_tokens_that_do_not_fit_are_lowered(web, caplog, name, value):
    message = TOO_LARGE.format(5000, 2048)
    web.post(CHAT_URL, status=400, json=error_payload(message))
    web.post(CHAT_URL, json={"choices": [{"message": {"content": "Hi"}}]})
    params = {name: value, "temperature": 0}
    assert web_client().chat("Once", **params).text == "Hi"
    first, second = sent_bodies(web)
    assert (first[name], second) == (value, first | {name: 2048})
    assert params == {name: value, "temperature": 0}
    warning = f"max_tokens is lowered to 2048: 400 {message!r}: POST {CHAT_URL}"
    assert caplog.record_tuples == [("vllm_provider", logging.WARNING, warning)]


LIMITS: Final = [TOO_LARGE.format(9, limit) for limit in (2048, 1024, 512, 256)]
THEN_PROMPT: Final = f"{ASKED.format(2048)} 410 input tokens, for a total of x."
AT_LEAST: Final = f"{ASKED.format(2000)} at least 49 input tokens, for a total of at least 2049."


@table(
    "prompt messages counted sent kind",  # counted: by the server's tokenizer, which may be hidden
    ("x", [LIMITS[0], THEN_PROMPT], None, [5000, 2048, 1638], None),
    ("x", [LESS_011.format(-1952, 5)], None, [4000, 2043], None),  # 2048 less 4000
    ("x", LIMITS, None, [5000, 2048, 1024], InvalidRequestError),  # lowered twice at most
    ("x", LIMITS[:1], None, [9], InvalidRequestError),  # never raised
    ("x", [f"{ASKED.format(10)} 2048 input tokens."], None, [10], ContextLengthError),
    ("x", [AT_LEAST], 120, [2000, 1928], None),
    ("x", [AT_LEAST], 3000, [2000], ContextLengthError),
    *((prompt, [AT_LEAST], None, [2000], ContextLengthError) for prompt in ("x", ["a", "b"])),
)
def test_what_is_sent_if_it_does_not_fit(web, caplog, prompt, messages, counted, sent, kind):
    for message in messages:
        web.post(COMPLETIONS_URL, status=400, json=error_payload(message))
    web.post(TOKENIZE_URL, **({"json": {"tokens": [1] * counted}} if counted else HIDDEN))
    call = functools.partial(web_client().complete, prompt, max_tokens=sent[0])
    if kind is None:
        web.post(COMPLETIONS_URL, json=text_event("Hi"))
        assert call().text == "Hi"
    else:
        error = caught(call)
        assert type(error) is kind
        if messages == [AT_LEAST]:
            assert (error.limit, error.input_tokens) == (2048, counted)
    assert [body["max_tokens"] for body in sent_bodies(web, COMPLETIONS_URL)] == sent
    assert len(caplog.records) == (len(sent) > 1)
    is_counted = messages == [AT_LEAST] and prompt == "x"
    assert sent_bodies(web, TOKENIZE_URL) == [{"model": "parrot", "prompt": "x"}] * is_counted


def test_the_fields_that_count_when_a_conversation_is_counted(web):
    web.post(CHAT_URL, status=400, json=error_payload(AT_LEAST))
    web.post(TOKENIZE_URL, json={"tokens": [1] * 3000})
    options = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    options |= {"add_generation_prompt": False, "continue_final_message": True}
    options |= {"chat_template_kwargs": {"a": 1}}
    caught(web_client().chat, "Once", max_tokens=2000, temperature=0, **options)
    messages = [{"role": "user", "content": "Once"}]
    assert sent_bodies(web, TOKENIZE_URL) == [{"model": "parrot", "messages": messages, **options}]


# ---- Replies: recorded ------------------------------------------------------
#
# Bodies that vLLM 0.11.0 and 0.32.0 sent, byte for byte: the model is the parrot, or a tiny
# gpt-oss under 0.32.0. They are the values of a JSON object, compressed; look at one with
# python -c 'import test_vllm_provider as t; print(t.RECORDED["0.32/chat_tools"])'

_RECORDED: Final = """
c-rk<OLN@Hb^a?TZe-^U=l1)-($&Hh-^$&{F6Sm2ku`1r4HDK2zzi^=7>ZR^*50|2MK-Riv&h!}N2$uzKOx<~ya&U<ya59Dsw5KK
I5_9)^Xvw?pDsWb!tV#Mulvcxm2>fQeG$8V&|Z3dadmys4-@l4=la4|sWMkSnC8&Wn(ozb80U?1H)Mpei{4PHRNKCgONud|RM@@`
k@kD;W7hjqzdy)2592t$KMkYD?{m@sf~?K_rX$-Ljrx7_`#^o}Wsm9gb!09hKrG>VJsgBd62{RYpIKMicnLU=95Wdx$q4XV<pLZK
?7G^Q8VXP-OK+a;da+c$A3yZ+#-5ID!$_Mhf$ArE+M1}reLswDO+z{y&93+3+xubcCd=0ot%lxRFO2-q)5!|CPoaKTz9lfv?WLnA
f6AnPJiJv=_^&F>!MVQpyG)eZVLZB@;Tk4Aw;y{S=k9&JG5=q5oLot~*zm6{k)G9yUNqL1G0>iAy+l4D9);K?h!Q2WOEgn}af(Ht
T}+oTPW9)sHzT|TV#YdC)ml_N?=BvLlMQ*~>(AzA(8(!hy`A5xVVHEY?sHI&r8bC#$z9JpG8u!Dr15>$+5RwV823-(k2>mw{u~KI
ad4mZR%wqLmT!6P%&`jV!zx-}l~j~VTv;w}EO9;jWE8fShI%-=BY8|xJ+Rh$tB3c)aNgaG5_M~R$<rcXOBH6y6Q`;_yN2wwIZK^&
21~3ZJzu9P?9WiVzWDg5mkw2w1bWyrR;C8i#v(6Zkt*;38c0Bq3l*i12+gI!lo7(Ph7@Y<pTh^FcY3Iu2bDO=Ne0GQIvFW*U8Rl}
kNUp-J4&w{=pY9>#Gww`S9i>Fd3L#y+CvJI2dq;bb^ztU=tOx2-YU;HY?9%+905PzgeioWq`M{+xFJb}HbXGXp&qM6b|qKYflkKy
dwucqogUll@1yu$|K9Oqoj6gPI{LHGo;+x#kN0`+_i_58v1k9+Ik9|%)nLY$XGmEi0OWa@nR}Jqjd{tHd_vL5NM2ve^!Z@iJO8Zu
q3@W#RHBnBCs)nVLM<4?ddZBNFq)^*(NMq4?p#M_FiKL#)rQ&VGSatZz(47Zb8A??gk7-2;;)qdJN+*sour$Q2P^!=pY$-ubl$k-
O@M|;j_4cnulgJgMg!x*BkS@VW3#vEonv}fyLEDp)ph<Me$eI#9p^C~4V_`mr*mh50-_K&VRS!Ar=5S>H*Q>;UjE3_HhxT~#zFR5
-h0fF>Hj{q*10zpQ>EHk3qM&6%FOX)<e)R_>12JbuCF7<d3s|xe{<!$$y`%(`=;Z(F}7>3xUv7(oycmh50YDZ{l`$7$Z3%b4N$fr
gT*$zH4Y}VU_mD|>Xf{D^SlC&Gsb60mlvM4sMD)DQ&#K`FUa?cOu$U8iHyH2BjnSYTmwy~++g24Ki`y-a<ef^Jow9EjcIG&$s&Q#
((!E;dI~_tdAJL`%oc95Kr*yBPh?HT$=tj4uZ)!(Msv$lhyp2%q^T2`7Xau7yJdrvyrzmU%S=W_!k+$Y{BByqO0kp(m8~F4agS@q
{gyRDo+w{hQ|^LGOr`G<S7of9qzW~}J>}gQIi~%=%=&v-+pKAlsgL?;XgtCE<0lo#3J2R%Ev8L->)Qr89fsa&iE{?$?ffERPMh{0
CKNh0%8&F9hRQF?JNJ2oF5~1ErJQ&3DsUNKE+(1+0x{mv&Evzn`KR&2;~+@1?fC(8Scl(CZE>#e2V)EX0Brs+grwjYa0WytzYG~6
k|M!Oi-eSu$#qU3k*1%-0w7H2ly*jQ!db>x&feQE;lNaQ{+D;x7kTIV1vZ{$_gt-E$@IXs6~Zo;9CAtkCqObLGAGuZ-nq*4;`1{S
5-=kJz)%WA5Xwj_b}E*%Gk%gG!31ZVP=v6Q5+GCbHPJiLRp%(y_(t3e*LaK~blwBb-8ON8w$D~xaE``$M|g&sHCK=99u-E3qwIak
Kx6Ka3kB>Xbm-5X)_!8*hN0XK2Vv?MdXe)Grgz3F92Gq}=HKlr-<*{N<g<p}<oP-Dma(m%pC?i(2x$`vUXDZvamY9a#KS%SXDB%A
?2o7JL*oW4h(8*`G02($DIcM5$K+X%bWCQ2NC%q>usC96Hh3wz3<*gfHGYan4tVDhk}jZ<VT`Cr3WyMR9Ig;$#>+!ViE-7CO|BA&
Dd7|d^8;X$%ZCny2AWL#2|oERab6aVk;;D_2h6QwX9mdA{1dJU;2A%_#x;VCghoCt5hDUannk~ir>i0q=lIOSA_Q1c1}G*{LX1d$
|6-qI)bl=b0e%_(yu-^$z@|uFI*cDNSWm};5uEG#xN+UM7}!2qLzLD6eQn*rI11)j-gH<k%SO@_q6H&5N4A)#1^GFHi%PIUu}}%d
1PMmPB(45f78&LREUs$JMjj^$mGild?237BN46NyBL7eh(wjC>t6L4*OH#xAz=l@4Ja^^HWjM}4isPKJq;;k#g;SJMIJ2a}Stx6r
X-eT_ImLB!9p!R;`1{|y|MiXiy&%sh$ShncVc-Uyj|JtNRj9^o>ReQ7#F-J_-lvywlFVnxQLG}>e@w!n6xrn<PysUqKcdoA-cE`P
q*zeo_+CdU{C>>KB?4|)rGERx)KXET`(NG}rBMC1U&b!x%e(mFYghGv%K&-=Z&Gy*R&|}zHOfvmyuMKh6-D2n0^O7p`ZRz53a*ID
{2g@@9$q&m1~sRiKR?9IeSc)iZS#YPN2;GVfhpX(Z@*+2_uDT?s)nh#H!(M+DoS6_b>w{KAm@kIztT`z<qKX}l6;NIBU}fazqgr{
+t)=-83mLF*bT6+gyeKb#pfqc{C`xBPMA7DI84$~%5E4R=*YA`&QbZvc?kP`$3$1}V>Z?FV8ppIDdH}4oizR-7)721C+Xhmv^Sw<
x|>U8<ihC7yFVBknPcJU`r5z|rjPdDEBjYoa+@EX_q9W0OKtQTED@rDObfDgwn$JNY|;4aUSR|>xjpnvA#CR|1Il(ZM0yfKd>=nJ
zl#TYy|Jvdi()I<Xdm`zt$8e(2P=qFP{?(msut;48pr*@;sHs;G-Z-N&!<G~XddV!=JAsgY3*mR#mdu$lnR9uTwpU4t+N?fIh)Bp
kC?3jPK?A{$qWU$iU-sa0TzfT;w$L78heUJ?)r?2Wy7&Ic8~I1#B9dy$&PtHUzeNe{&?9fO7(a=udgHXXR#g`>cEU<e};&$7BhI6
Y0O<5`C&Y#*JI=9d8*%^uT0{8b}3`_CZlc@+^AJ=iI24vmgO;<Uq5`Ibc8Q=3gQD^r|M9Y`1oQ6V=wcuk5R!w$3N9+>@meWBwgtf
kGaZ6RHHz-68oB9U3Hy4vMLuKW;<MR;!~e!*M}}49)|+h3eUq5YT@hgO!9QWeDbL5>g*RQXru;tpSfU^byLIJk&RkO*18yioaGpl
FZC31DkP!Q^*AzPOdtj#P!a;F0>%Rg$5rWZIh{)|^Yx<_okNEGcHUrq%+BW%aKVILwy;<@p@+}r6VAUlwB6!QCfRn2KI>z+&{_~|
vMxW+Pyuf@|F+A^Bvp&qQzJZQWIpqo&j*X*+buYOJyx5Z=H2Ja&phwwFD5N{^|i@~?6@4gF$<9%ri2LUQ=tiGysB0?HJwxE8^U8g
1wwO#C}F-|o&3U8fCB7GlL~oM$@AtDXUHSY>%k6}bDZ0Q(VBR$p4D4_ogZUdaLGLuXfCDpE1X@Nr*2X(2$00mV;D-`qbK)ch3;Z`
Qt{O$JV>m%3%YJr8^a2_3tks@;f>aoB3#>PL>CJhxE=ykFGb!?P5hntEwi-DDyNn<Z<^Ox5qEtAM{`)~&A*JOwf(N!^97;Se)m{7
o0#xR7R)g4e1;TejQIiG$$|mjb78qAC5%!SK%{)YOm5_kXI>5+`in#SiifCSMX=v899jF871?hYuGqR+ZLHhm^KowG=58}MYb@Ob
0BPWP#FJ2?0Pke!kiwc<`k~BfhsE$Cn3Rts3N(ckTiGr)DF|v|Q|>Th!0N-gph?^SYX!JANrvz89fKxmM9>tP0?!r)Ah2_!!D;H{
;wbv7Y-kS^JWp)v<-;f3DtxkI*m|9c+oJWumFTG{#~2CBprFQaZZP?-cQ=YY9<bguowHpj%TA4zQ}C%$ZZjTp3zroKYPrnb2A0D0
_L_?RQ&R=cvb)9#pW1y5nku_-?oAcG+f>0D<>HrTw_CxRBluPYnCnW{6<jhzs4Kmf3b6SHmnp`c^G#Y_KlsO5i>Vv{Hx*sI*=LDn
tJSNuuVogls+1`mg+iLR0J>Up=@D;_G2DBhr8Z?`RY5yxT~!MZPEljk1Bm0-TQ$Mq__bFpfao?8gp$hwc2_vUDArsvpuhpM(v>BG
<0q=M8H%+~u6q;VT$%4#5xqJ53ktiwfw0xWP}z;-UP@at@I4Rtu5f(-naAk)4#+66E$ud&rmx!seYgG2i+3oUEa(*(!TS8Tta(&q
bV}?O%w8Ipm2F{{N2a@WP+r<wwz&hcc|2Y`U0~xL$t6w)INqkdwHu|IvuzQ1gb9!Pz6zrr*c3Aq2!!CiqF7J^Fxm-T2-t!4VA(f*
7?2R7lnUeNO{!|NS6{N7<3}MibJPF+^*{da-~Tk;&ly8R0hEAaA{fT!@@5qq$UQ<0?;>to5I}+>3XSm=4B>`AQ$)h<ww~<<myH|h
no%=3CbJ&}5sG0uZik3S03$Atan%S=2B3j<H6)o}69<;)i&1Hz*VQ`ec2FH>d~OWQdJse;Vw{RCqZX9*zq*g>0b|%9>zL)^pI?kg
%piufK@BpOK;M_dBq0V2NP-~nH96Z+@cY&^b}M}es6A7}=2d&vHA~bE;=n#&0}~^-LnY`i%sVDYzgf45$wbfAuM1RkH21E91cQQ8
E+pYdV2pRFgO-ULHv-jpy!I`VB!?7ngiR)g2!{u%l9s3*zeuXX5FRrAY=|dYzYT1%21No!AoK<C023AqpJE>}#xw}_S*B;aE^i0F
Jb_zfj0!jJdYj&b(MS7X@Uho*YX{9K)_Cg&%JJ8GYlzA5*M4gUO1A}MWt+t2Lec`!0<p^r6P#nnynr&qDe+Mte4+r=!er=DW9ZiC
wcg5(#c_9QtvD!$ef76|%~hh_g4rS9%A<e)q5~m)ikQL1lMKoLptjzsHb!U40%`}z&ku16$x=lzcC#%irz|O2XHq9fS|C~=b}1>C
pd^sK=V>KL5Fon|vh+0#0!Uq;yc(4hwHk|UUcz47*`@_@7a+&W-7R$6LpR%XxQ!`oOeqmlAo4V#N-zxpA=njyNe?NCT;U1mi4rjd
wlQUAdxqP`l<X{m7R(*MY@OpC&_!)j*>ZmHIP=bD2kGXZ=Yy0uSF6;f4FY0}fN+)abijGL-(L-YI`L*ul@<N?)5w(-Jv;ubvBIYf
9{BvYzs8Dhk2!3r@ZF{g-l!ON+KHG}@M;N;nklyPT|?z=>UjUqP`OD{<UY=!jFl6A(-unSI=6bC!>Nz4k?2F*L%ln#d_C-iQO{2H
l$xK?*yTt7pGo1mSnstx7H-O>q7?;gA*X*IKOEZ?)&T}*ye!ptAiB*2q2!5-fsX+2Jt{O4jI)~WB3YNAIMObXEo?czc6q)<ZHG6N
u3ClL1-jF`0rDCZ?zy3`9rygiN<*@#u;oRkFG{xVLpgffdbIT3z*~KfC!rFakA)(FA&T465bFTciC2y)EBf)@j;O5YC;6DJveI{(
DtM!e{j{s4t>9G>e7ke;0?b?@HC56il%h@>Xw(b*YRwkCO6*QEW%Mec%jb<+>~_J<X-&53AEmxpn|*GvD{;!2A831gtdfemQs5eW
eOXJzg>8;=H0;_OXRi-c+Z<;%?Ajb>ckE8Hu=r|Cwn-_@IX{6uIS7aS<oVn$$I=7796MW#97UmLU@Ws7skAGUAe=}TNUcG;99aXP
PP{@<S<(L~(M=WIxeJHtRz<3*0Cbxwc%$t7v<q{s;MEfR+t)vT`?o)T`}*JCzW&#@um96f5dQeJnSxIa_-&%>&fos>r@#K~FaP<+
rig!@PdiU8{-!rz@oM#o__|L!$?K|KCr4Y9s9L!TC39T`NPvikv0^S&#A8xO1XQr!#%t_#9BNTzjLx(VeeEDQ{`<DIgX9#ul+_QE
v{jT9Oir?^S^Z!+!ER@@1Et#n(#GO5&Aqfh)C&mI!f=w^)#`#ns}HByeXTAykQRsScIH3ql-}9lIqdFjYxd-S{(oi#{DA
"""
RECORDED: Final[dict[str, str]] = json.loads(
    zlib.decompress(base64.b85decode("".join(_RECORDED.split())))
)
PARIS: Final = '{"city": "Paris"}'
ROME: Final = '{"city": "Rome"}'


def weather(arguments: str, call_id: str = "call_1") -> ToolCall:
    return ToolCall(call_id, "get_weather", arguments)


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
    fields = {"finish_reason": "tool_calls" if calls else "stop", "index": 0, **fields}
    return Choice(text=text, reasoning=reasoning, tool_calls=tuple(map(weather, calls)), **fields)


FOUR: Final = expect("\n\n2 + 2 = 4", "\nTwo plus two equals four.\n")
JAPANESE: Final = expect("\n\nこんにちは、世界 🌸🚀", "\nUse hiragana.\n")
TWO: Final = "\nTwo calls.\n"
NEED: Final = "\nI need the tool.\n"
CUT: Final = {"finish_reason": "length"}
CUT_CALL: Final = '\n\n<tool_call>\n{"name": "get_weather", "'  # such a call stays text
SHOW: Final = expect(" Paris.")
SHOW_IDS: Final = changed(SHOW, prompt_token_ids=(366, 643, 590, 637, 298))
LIST: Final = [expect(text, index=n) for n, text in enumerate([" Paris.", " Paris.", " 4", " 4"])]
STOPPED: Final = " there was a small model that could count: 1 2 3 4 5 6"
OSS_NEED: Final = NEED.strip()
OSS: Final = {"stop_reason": 200012}


def joined_arguments(deltas: Iterable[Delta]) -> dict[str, str]:
    """Return the arguments of the calls in a stream, by their ids."""
    joined: dict[str, str] = {}
    for call in itertools.chain.from_iterable(delta.tool_calls for delta in deltas):
        joined[call.id] = joined.get(call.id, "") + call.arguments
    return joined


@table(
    "name expected tokens deltas",
    ("0.11/chat", FOUR, (14, 18), 0), ("0.32/chat", FOUR, (14, 18, 0, 8), 0),
    ("0.11/chat_stream", FOUR, (14, 18), 16), ("0.32/chat_stream", FOUR, (14, 18, 0, 8), 16),
    ("0.32/chat_unicode_stream", JAPANESE, (13, 14, 0, 5), 12),
    ("0.11/chat_tools", expect("\n\n", TWO, PARIS, ROME), (30, 53), 0),
    ("0.32/chat_tools", expect("", TWO, PARIS, ROME), (30, 53, 0, 5), 0),
    ("0.11/chat_tools_stream", expect("\n\n\n", TWO, PARIS, ROME + "\n"), (30, 53), 17),
    ("0.32/chat_tools_stream", expect("\n\n", TWO, PARIS, ROME), (30, 53, 0, 5), 22),
    ("0.32/chat_tools_cut", expect(CUT_CALL, NEED, **CUT), (28, 22, 0, 7), 0),
    ("0.11/chat_tools_cut_stream", expect("\n\n", f"<think>{NEED}", ""), (28, 22), 10),
    ("0.32/chat_tools_cut_stream", expect("\n\n", NEED, "", **CUT), (28, 22, 0, 7), 11),
    ("0.32/chat_tools_named", expect("", NEED, PARIS, finish_reason="stop"), (28, 31, 0, 7), 0),
    ("0.11/completion_stream", SHOW_IDS, (5, 3), 3), ("0.32/completion", SHOW, (5, 3, 0, None), 0),
    ("0.11/completion_list_n", LIST, (11, 10), 0), ("0.32/completion_list_n", LIST, (11, 10, 0), 0),
    ("0.32/completion_stream", SHOW, (5, 3, 0, None), 3),
    ("0.11/completion_stop", expect(STOPPED, stop_reason=" 7"), (4, 16), 0),
    ("gpt-oss/plain_0_stream", expect(" Paris.", stop_reason=199999), (5, 3, None, None), 3),
    ("gpt-oss/chat_two_2_header_in_role_stream",
     expect("", "Now Rome.", '{"city":"Rome"}', **OSS), (171, 25, None, 8), 10),
    ("gpt-oss/chat_broken_tool", expect("", "Broken.", PARIS[:-4], **OSS), (121, 26, None, 7), 0),
    ("gpt-oss/chat_tool_cut", expect("", OSS_NEED, '{"'), (123, 24, None, 6), 0),
    ("gpt-oss/chat_tool_cut_stream", expect("", OSS_NEED, '{"', **CUT), (123, 24, None, 6), 7),
    ("gpt-oss/chat_tools_no_tool_parser", expect("", OSS_NEED, **OSS), (123, 29, None, 10), 0),
)  # fmt: skip
def test_recorded_reply(name, expected, tokens, deltas):
    completion, found_deltas = recorded(name)
    found = []
    for choice in completion.choices:
        calls = tuple(weather(call.arguments) for call in choice.tool_calls)
        found.append(changed(choice, tool_calls=calls, logprobs=(), prompt_logprobs=()))
    assert found == (expected if isinstance(expected, list) else [expected])
    prompt, output, *details = tokens
    assert completion.usage == Usage(prompt, output, prompt + output, *details)
    assert completion.id.startswith(("cmpl-", "chatcmpl-"))
    assert completion.model == ("openai/gpt-oss-20b" if name.startswith("gpt") else MODEL)
    assert all(call.id and call.name == "get_weather" for call in completion.tool_calls)

    assert len(found_deltas) == deltas
    if deltas == 0:
        assert completion.payload == json.loads(RECORDED[name])
        return
    assert "choices" not in completion.payload
    assert "".join(texts_of(found_deltas)) == choice.text
    assert "".join(delta.reasoning for delta in found_deltas) == choice.reasoning
    assert sum((delta.logprobs for delta in found_deltas), ()) == choice.logprobs
    assert found_deltas[-1].finish_reason == choice.finish_reason
    assert joined_arguments(found_deltas) == {one.id: one.arguments for one in choice.tool_calls}


def rounded(token: TokenLogprob | None) -> Any:
    """Return a token with its log probability and its alternatives, to two digits."""
    if token is None:
        return None
    top = [(other.token, round(other.logprob, 2)) for other in token.top]
    return token.token, token.logprob and round(token.logprob, 2), top


def sure(*tokens: str) -> list[Any]:
    """Return tokens that were certain, with themselves as the one alternative."""
    return [(token, -0.0, [(token, -0.0)]) for token in tokens]


IS_OF: Final = [
    (" capital", -8.63, [(" is", -0.43), (" capital", -8.63)]),
    (" of", -14.06, [(" France", -0.0), (" of", -14.06)]),
]
SHOWN: Final = [
    (" Paris", -0.0, [(" Paris", -0.0), (" 3", -11.8)]),
    (".", -0.0, [(".", -0.0), (END, -11.91)]),
    (END, -0.0, [(END, -0.0), (".", -11.69)]),
]
ECHOED: Final = [("The", None, []), *IS_OF, *sure(" France", " is", " Paris", ".", END)]


@table(
    "name logprobs prompt_logprobs",
    ("0.32/completion_logprobs", SHOWN, []),
    ("0.32/completion_echo_logprobs", ECHOED, [None, *IS_OF, *sure(" France", " is")]),
    ("0.11/completion_stream", sure(" Paris", ".", END), []),
)
def test_recorded_logprobs(name, logprobs, prompt_logprobs):
    (choice,) = recorded(name)[0].choices
    assert list(map(rounded, choice.logprobs)) == logprobs
    assert list(map(rounded, choice.prompt_logprobs)) == prompt_logprobs
    ids_and_ranks = [(643, 194), (590, 432), (637, 1), (298, 1)] if prompt_logprobs else []
    assert [(token.token_id, token.rank) for token in choice.prompt_logprobs[1:]] == ids_and_ranks


@table("version", "0.11", "0.32")
@table(
    "name status kind message",
    ("logprobs", 400, INVALID, "400 'Requested"),
    ("logprobs_stream", 200, INVALID, "400 'Requested"),
    ("model", 404, NotFoundError, "model not found: 'nope'; the server has parrot"),
    ("path", 404, NotFoundError, "404 'Not Found': "),
    ("temperature", 400, INVALID, "400 'temperature"),
    ("validation", 400, INVALID, "400 "),
    ("overflow_chat", 400, ContextLengthError, "the prompt does not fit: "),
)
def test_recorded_error(web, version, name, status, kind, message):
    web.get(MODELS_URL, json=json.loads(RECORDED[f"{version}/models"]))
    content_type = "text/event-stream" if status == 200 else "application/json"
    body = RECORDED[f"{version}/error_{name}"]
    web.post(CHAT_URL, status=status, body=body, content_type=content_type)
    error = caught(list, web_client(default_model="nope").stream_chat("hello"))
    assert type(error) is kind
    assert str(error).startswith(message)
    if kind is ContextLengthError:
        assert (error.limit, error.input_tokens > 2048) == (2048, True)


# ---- Replies: whole ---------------------------------------------------------

CACHED: Final = {"prompt_tokens_details": {"cached_tokens": 4}}
REASONED: Final = {"completion_tokens_details": {"reasoning_tokens": 2}}


@table(
    "fields usage",
    *((fields, None) for fields in ({}, {"error": None}, {"usage": {}}, {"usage": None})),
    *((fields, None) for fields in ({"other": 1}, {"id": None, "model": None})),
    ({"usage": {"prompt_tokens": 5, "completion_tokens": 3}}, Usage(5, 3, 8)),  # without a total
    ({"usage": {"prompt_tokens": 5, "total_tokens": 9}}, Usage(5, 0, 9)),
    ({"usage": {"completion_tokens": 3, **CACHED, **REASONED}}, Usage(0, 3, 3, 4, 2)),
)
def test_a_reply_with_little_in_it(web, fields, usage):
    payload = {"choices": [{"text": "a", "finish_reason": "stop", "new": {"x": 1}}], **fields}
    expected = Completion("", "", "", (Choice(text="a", finish_reason="stop"),), usage)
    assert parse_completion_response(payload) == changed(expected, payload=payload)
    chat = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}], **fields}
    assert parse_chat_response(chat) == changed(expected, payload=chat)

    body = f"data: {json.dumps(payload)}\n\n{DONE}"
    web.post(COMPLETIONS_URL, body=body, content_type="text/event-stream")
    stream = web_client().stream_complete("Once")  # with usage on every chunk
    assert list(stream) == [Delta(text="a", finish_reason="stop")]
    assert (stream.completion.choices, stream.completion.usage) == (expected.choices, usage)
    assert stream.completion.payload == fields


def test_choices_are_put_in_order():
    payload = {"choices": [{"index": n, "text": n and str(n)} for n in (3, 1, None, 2)]}
    assert texts_of(parse_completion_response(payload).choices) == ["", "1", "2", "3"]


TWO_ENTRIES: Final = [None, {"1": {"logprob": -1}}]


@table("parse", parse_completion_response, parse_chat_response)
@table(
    "payload",
    *(None, [], "ok", {}, {"detail": "Not Found"}),
    *({"choices": choices} for choices in ([], None, 5, ["a"], [None])),
    *({"choices": [{"message": message}]} for message in (
        {"content": [{"type": "text"}]}, {"tool_calls": ["f"]}, {"tool_calls": [{"function": 1}]},
    )),
    text_event(5), {"choices": [{"text": "a", "index": [1]}]}, {**text_event("a"), "usage": [1]},
    {"choices": [{"text": "a", "index": "x"}, {"text": "b"}]},
    *(text_event("a", logprobs=logprobs) for logprobs in (
        {"tokens": ["a"]}, {"tokens": ["a"], "token_logprobs": []}, {"content": [{"logprob": 1}]},
    )),
    *(text_event("a", prompt_logprobs=[entry]) for entry in ({"x": {"logprob": -1}}, {"1": {}})),
    text_event("a", prompt_logprobs=TWO_ENTRIES, prompt_token_ids=[1]),  # too few ids
    ids=json.dumps,
)  # fmt: skip
def test_not_what_vllm_sends(parse, payload):
    assert type(caught(parse, payload)) is ProtocolError


def choice_from(**fields: Any) -> Choice:
    """Return what a choice of completions with these fields becomes."""
    return parse_completion_response({"choices": [fields]}).choices[0]


@table(
    "sent logprob probability",
    (-0.5, -0.5, math.exp(-0.5)), (0, 0, 1.0), (None, None, None), (math.nan, None, None),
    (-9998.0, -9998.0, 0.0), (-9999.0, -math.inf, 0.0), (-math.inf, -math.inf, 0.0),
)  # fmt: skip
def test_logprob(sent, logprob, probability):
    lists = {"tokens": ["a"], "token_logprobs": [sent], "top_logprobs": [{"a": sent}]}
    entry = {"token": "a", "logprob": sent, "bytes": [97]}
    content = [entry | {"top_logprobs": [entry]}]
    for logprobs, raw in ((lists, None), ({"content": content}, b"a")):
        (token,) = choice_from(logprobs=logprobs).logprobs
        assert token == TokenLogprob("a", logprob, raw, top=(TokenLogprob("a", logprob, raw),))
        assert (token.probability, token.top[0].probability) == (probability, probability)


def list_logprobs(*tokens: str, **fields: Any) -> dict[str, Any]:
    """Return the `logprobs` of completions."""
    return {"tokens": [*tokens], "token_logprobs": [-1.0] * len(tokens), **fields}


@table(
    "logprobs ids prompt_ids expected",
    *((logprobs, None, None, {}) for logprobs in (None, {"content": None}, {"content": []})),
    *((list_logprobs(top_logprobs=top), None, None, {}) for top in (None, [])),
    *((list_logprobs("a", top_logprobs=top), None, None, {"a": None}) for top in (None, [{}])),
    (list_logprobs("token_id:639", "token_id:x"), None, None,
     {"token_id:639": 639, "token_id:x": None}),
    (list_logprobs("a", "b"), [1, 2], None, {"a": 1, "b": 2}),
    (list_logprobs("a", "b"), [1, 2], [3], {"a": 1, "b": 2}),
    (list_logprobs("a", "b"), [2], [1], {"a": 1, "b": 2}),  # of an echo
    *((list_logprobs("a", "b"), ids, None, {"a": None, "b": None}) for ids in ([], [1, 2, 3])),
)  # fmt: skip
def test_shapes_of_logprobs_and_ids_of_tokens(logprobs, ids, prompt_ids, expected):
    choice = choice_from(logprobs=logprobs, token_ids=ids, prompt_token_ids=prompt_ids)
    tokens = [TokenLogprob(token, -1.0, None, number) for token, number in expected.items()]
    assert list(choice.logprobs) == tokens
    assert (choice.token_ids, choice.prompt_token_ids) == (
        tuple(ids or ()),
        tuple(prompt_ids or ()),
    )


MANY: Final = {" b": -2.0, " a": -0.5, " d": -9999.0, " c": -3.0, " e": None}
LIKELIEST: Final = [(" a", -0.5), (" b", -2.0), (" c", -3.0), (" d", -math.inf), (" e", None)]


@table(
    "params count",
    *(({"logprobs": number}, number) for number in (3, 1, 0)),  # and not the sampled token on top
    *(({"logprobs": number}, 5) for number in (20, -1)),
    ({"logprobs": 0, "logprob_token_ids": [5, 6]}, 5),
)
@table("method", "complete", "chat")
def test_alternatives_are_likeliest_first_and_at_most_n(web, method, params, count):
    choice = {"text": " d", "logprobs": list_logprobs(" d", top_logprobs=[MANY])}
    if method == "chat":
        top = [{"token": token, "logprob": value} for token, value in MANY.items()]
        choice = {"logprobs": {"content": [{"token": " d", "logprob": -1.0, "top_logprobs": top}]}}
    web.post(re.compile(".*"), json={"choices": [choice]})
    (token,) = getattr(web_client(), method)("Once", **params).logprobs
    assert [(other.token, other.logprob) for other in token.top] == LIKELIEST[:count]
    assert (token.token, token.logprob) == (" d", -1.0)


def prompt_entry(*ids: int, rank: int | None = 1) -> dict[str, Any]:
    return {str(one): {"logprob": -1.0 * one, "rank": rank, "decoded_token": "x"} for one in ids}


@table(
    "entry params ids own top",
    row(prompt_entry(3, 9), {}, None, 3, [3, 9], id="the-first-is-the-prompts-own"),
    row(prompt_entry(3, 9), {}, [1, 9], 9, [3, 9], id="or-the-one-with-its-id"),
    row(prompt_entry(9, 3, 5, rank=None), {}, [1, 9], 9, [3, 5, 9], id="likeliest-first"),
    row(prompt_entry(9, 3, 5), {"prompt_logprobs": 1}, None, 9, [3], id="at-most-n"),
    row(prompt_entry(9, 3, 5), {"logprobs": 2, "echo": True}, None, 9, [3, 5], id="of-an-echo"),
)
def test_logprobs_of_a_prompt(web, entry, params, ids, own, top):
    prompt = {"prompt_logprobs": [None, entry], "prompt_token_ids": ids}
    web.post(COMPLETIONS_URL, json=text_event("a", **prompt))
    whole = {"choices": [{"message": {}}, {"index": 1, "message": {}}], **prompt}  # as chat has it
    completion = web_client().complete("Once", **params)
    chat = () if params else parse_chat_response(whole).choices
    for choice in (*completion.choices, *chat):
        none, token = choice.prompt_logprobs
        rank = entry[str(own)]["rank"]
        assert (none, changed(token, top=())) == (None, TokenLogprob("x", -own, None, own, rank))
        assert [other.token_id for other in token.top] == top
        assert choice.prompt_token_ids == tuple(ids or ())


# ---- Replies: streams -------------------------------------------------------


def stream_of(web: responses.RequestsMock, *choices: dict[str, Any]) -> Stream:
    """Return a stream whose events have these choices."""
    events = [{"choices": [{"index": 0, **choice}]} for choice in choices]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    web.post(CHAT_URL, body=body + DONE, content_type="text/event-stream")
    return web_client().stream_chat("Once")


def test_deltas_of_two_choices_in_turn(web):
    reasoning = {"reasoning": "r", "reasoning_content": "r"}  # both from 0.12 to 0.15
    stream = stream_of(
        web,
        {"delta": {"role": "assistant", "content": ""}},
        {"index": 1, "delta": {"content": "b"}},
        {"delta": {"content": "a", **reasoning}, "token_ids": [5]},
        {"index": 1, "delta": {}, "finish_reason": "length", "stop_reason": None},
        {"delta": {"content": "c"}, "finish_reason": "stop", "stop_reason": "x"},
    )
    assert list(stream) == [
        *(Delta(1, "b"), Delta(0, "a", "r", token_ids=(5,)), Delta(1, finish_reason="length")),
        Delta(0, "c", finish_reason="stop", stop_reason="x"),
    ]
    assert stream.completion.choices == (
        Choice(0, "ac", "r", token_ids=(5,), finish_reason="stop", stop_reason="x"),
        Choice(1, "b", finish_reason="length"),
    )


def call_piece(text: str) -> dict[str, Any]:
    """Return a piece of a tool call: index, id, name and arguments, "-" for what is not sent."""
    texts = zip(("index", "id", "name", "arguments"), text.split(" "), strict=True)
    sent: dict[str, Any] = {key: value for key, value in texts if value != "-"}
    if "index" in sent:
        sent["index"] = int(sent["index"])
    function = {key: sent.pop(key) for key in ("name", "arguments") if key in sent}
    return {**sent, "function": function}


@table(
    "events calls",  # an event has one piece or two; a call its id, its name and its arguments
    ([["0 a f -", "1 b g -"]], ["a f ", "b g "]),
    ([["0 a f {"], ["0 b f ["], ["0 - - ]"]], ["a f {", "b f []"]),  # another id, another call
    ([["0 a f {"], ["0 - f }"], ["0 a - {"]], ["a f {}{"]),  # no id, a repeated name and id
    ([["- a f -"], ["- - - {}"], ["- b g []"]], ["a f {}", "b g []"]),  # no index
    ([["1 b g -"], ["0 a f -"], ["1 - - 1", "0 - - 0"]], ["b g 1", "a f 0"]),  # by turns
)
def test_calls_in_pieces(web, events, calls):
    deltas = [{"delta": {"tool_calls": list(map(call_piece, pieces))}} for pieces in events]
    stream = stream_of(web, *deltas, {"delta": {}, "finish_reason": "tool_calls"})
    joined = joined_arguments(stream)
    assert list(map(" ".join, stream.completion.tool_calls)) == calls
    assert joined == {call.id: call.arguments for call in stream.completion.tool_calls}


@table("sent arguments", ({"arguments": {"a": 1}}, '{"a": 1}'), ({"arguments": None}, ""), ({}, ""))
def test_arguments_of_a_gateway(sent, arguments):
    message = {"tool_calls": [{"function": {"name": "f", **sent}}] * 2}  # without id and index
    reply = parse_chat_response({"choices": [{"message": message}]})
    assert reply.tool_calls == (ToolCall("", "f", arguments),) * 2


NO_OUTPUT: Final = "the stream ended without any output: {}; look at the server's log"
NO_DONE: Final = "the stream ended without [DONE]: {}; was the server or a proxy stopped?"


@table(
    "events kind message",
    row(["[DONE]"], StreamError, NO_OUTPUT, id="done-alone"),
    row([{"choices": [], "usage": {"x": 1}}, "[DONE]"], StreamError, NO_OUTPUT, id="usage-alone"),
    row([text_event("a")], StreamError, NO_DONE, id="output-without-done"),
    row([], StreamError, NO_DONE, id="nothing"),
    row([text_event("a"), error_payload("late", 500)], UNAVAILABLE, "500 'late': {}", id="error"),
)
def test_a_stream_that_is_not_whole(server, connect, events, kind, message):
    server.script(sse(*events, done=False))
    stream = connect(server).stream_complete("x")
    texts = ["a"] * (text_event("a") in events)
    assert texts_of(next(stream) for _ in texts) == texts
    error = caught(next, stream)
    assert (type(error), str(error)) == (kind, message.format(f"POST {server.url}/v1/completions"))
    assert (error.partial.text, len(server.requests)) == ("".join(texts), 1)


def test_a_stream_may_end_with_a_reason_and_no_text(server, connect):
    server.script(sse(text_event("", finish_reason="stop")))
    assert list(connect(server).stream_complete("x")) == [Delta(finish_reason="stop")]


def test_an_error_of_ours_inside_a_stream_is_never_its_end(server, connect, monkeypatch):
    monkeypatch.setattr(_SSEDecoder, "feed", lambda _decoder, raw: 1 / 0)
    server.script(sse(text_event("a")))
    with pytest.raises(ZeroDivisionError):
        connect(server).complete("x")


# ---- Values: replies --------------------------------------------------------


@table(
    "arguments quoted",
    *((text, repr(text)) for text in ("", "[1]", "null", "city: Paris", '{"city": "Par')),
    *((text, repr(text)) for text in ('{"a": 1} {"b": 2}', '{"a": NaN}', '{"a": Infinity}')),
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
    (PARIS, None, {"city": "Paris"}),
    (ROME + "\n", None, {"city": "Rome"}),  # 0.11 streams such a line break
    *(
        ('{"a": {"b": [1, null]}}', None, {"a": {"b": [1, None]}}),
        (" [1, null]\n", None, [1, None]),
    ),
    (PARIS, dict, {"city": "Paris"}),  # by keywords
    (PARIS, types.SimpleNamespace(model_validate=list), ["city"]),
)
def test_json_of_a_text_and_of_arguments(text, model, value):
    assert Completion(choices=(Choice(text=text),)).json(model) == value
    assert model is not None or isinstance(value, list) or weather(text).parsed() == value


@table(
    "text finish_reason model message",
    ("Paris", "stop", None, "JSON: 'Paris'; ask for it with response_format"),
    ("[1", "length", None, "JSON: '[1'; finish_reason is 'length': raise max_tokens"),
    ("[NaN]", "stop", None, "JSON: '[NaN]'; ask for it with response_format"),
    ("[" * 9**5, "stop", None, f"JSON: '{'[' * 200}…'; ask for it with response_format"),
    *((text, "stop", Town, f"a Town: '{text}'; ask for it with res") for text in ("{}", "[1]")),
    ids=lambda value: str(value)[:40],
)
def test_a_text_that_is_not_the_json_asked_for(text, finish_reason, model, message):
    reply = Completion(request_id="r", choices=(Choice(text=text, finish_reason=finish_reason),))
    error = caught(reply.json, model)
    assert type(error) is InvalidOutputError
    assert str(error).startswith(f"the text is not {message}")
    assert (error.partial, error.request_id, error.retryable) == (reply, "r", False)


TOKEN: Final = TokenLogprob("a", None, top=(TokenLogprob("é", -math.inf, "é".encode(), 7, 1),))
ONE_CHOICE: Final = Choice(0, "a", "r", (weather("{}"),), (TOKEN,), (7,), "stop", "x", (None,))
FULL: Final = Completion("c", "q", "m", (ONE_CHOICE,), Usage(1, 2, 3), payload={"x": -math.inf})


def test_a_completion_as_a_dict_that_json_can_hold():
    found = FULL.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.keys() == {spec.name for spec in fields(Completion)}
    assert found["choices"][0].keys() == {spec.name for spec in fields(Choice)}
    assert found["choices"][0]["tool_calls"][0]["name"] == "get_weather"
    assert found["choices"][0]["prompt_logprobs"] == [None]
    (token,) = found["choices"][0]["logprobs"]
    top = {"token": "é", "logprob": -9999.0, "bytes": [195, 169], "token_id": 7, "rank": 1}
    assert (token["token"], token["logprob"], token["top"]) == ("a", None, [{**top, "top": []}])
    assert (found["usage"]["output_tokens"], found["payload"]) == (2, {"x": -9999.0})


CALLS: Final = [
    {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": text}}
    for text in ('{"ci', ROME)
]


@table(
    "choice fields",
    *((Choice(text="Hi"), {"content": "Hi"}), (Choice(), {"content": ""})),  # never null
    (Choice(text="4", reasoning="5"), {"content": "4", "reasoning": "5"}),
    (expect("", "", '{"ci', ROME), {"content": "", "tool_calls": CALLS}),  # as the model wrote them
    ids=str,
)
def test_message_for_the_next_turn(choice, fields):
    message = {"role": "assistant", **fields}
    assert Completion(choices=(choice, Choice(1, "other"))).to_message() == message
    assert build_chat_request(VLLMConfig(WEB), [message]) == {"messages": [message]}


def test_what_a_completion_says_of_its_first_choice():
    names = ("text", "reasoning", "tool_calls", "logprobs", "finish_reason")
    assert [getattr(FULL, name) for name in names] == [getattr(ONE_CHOICE, name) for name in names]
    assert [getattr(Completion(), name) for name in names] == ["", "", (), (), None]
    assert Completion().to_message() == {"role": "assistant", "content": ""}


@table("value", TOKEN, weather(PARIS), FULL.usage, Delta(1, "a"), ONE_CHOICE, FULL, ModelCard("m"))
def test_values_are_frozen_and_pickled(value):
    assert pickle_copy(value) == value
    for name in value._fields if isinstance(value, tuple) else value.__dataclass_fields__:
        with pytest.raises(AttributeError):
            setattr(value, name, None)


# ---- Replies: reasoning out of plain text -----------------------------------


def split_by(splitter: Any, pieces: Iterable[str]) -> tuple[str, str, list[str]]:
    """Return the text, the reasoning and the calls ("name arguments") of pieces."""
    parts = [*map(splitter.feed, pieces), splitter.feed("", is_last=True)]
    calls: list[str] = []
    for piece in itertools.chain.from_iterable(part[2] for part in parts):
        if "id" in piece:
            assert piece["id"] == f"call_{piece['index'] + 1}" == f"call_{len(calls) + 1}"
            calls.append(piece["function"]["name"] + " ")
        calls[piece["index"]] += piece["function"].get("arguments", "")
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts), calls


def every_cut(text: str) -> Iterator[list[str]]:
    """Yield a text whole, in single characters, at every cut or two, and as a model's tokens."""
    yield from ([text], list(text), re.findall(r"<\|\w+\|>|\w+|\W", text))
    most = 2 if len(text) < 60 else 1
    for cuts in itertools.combinations_with_replacement(range(len(text) + 1), most):
        yield [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


TAG: Final = "<think>a</think>b"


@table(
    "opened raw text reasoning",
    (False, "<think>\nHm.\n</think>\n\n4", "\n\n4", "\nHm.\n"),  # line breaks are kept
    (False, "<think>世界🌸</think>é\u2028", "é\u2028", "世界🌸"),
    *[(False, "<think></think>4", "4", ""), (False, "<think></think>", "", "")],
    # no tag at the start: the text is left alone
    *((False, raw, raw, "") for raw in ("", "4", "\n\n4", " " * 10 + "4", "<thin", "< think>")),
    *((False, raw, raw, "") for raw in ("<thinking>a</thinking>", f"<{TAG}", f"say {TAG}")),
    (False, "a</think>b", "a</think>b", ""),
    # at most two blanks before it
    *((False, blanks + TAG, "b", "a") for blanks in ("", " ", "\n", "\n\n", "\r\n")),
    *((False, blanks + TAG, blanks + TAG, "") for blanks in ("\n \n", "\r\n\r\n", " " * 9)),
    # no end, or what only looks like one
    *[(False, "<think>Hm", "", "Hm"), (False, "<think>", "", "")],
    *[(False, "<think>a</thin", "", "a</thin"), (False, "<think>1 < 2</think>b", "b", "1 < 2")],
    (False, "<think>a</thin k></think>b", "b", "a</thin k>"),
    *[(False, "<think>a<</think>b", "b", "a<"), (False, "<think>a</</think>b", "b", "a</")],
    # more than one
    (False, "<think>a</think><think>b</think>", "<think>b</think>", "a"),
    (False, "<think>a<think>b</think>c", "c", "a<think>b"),
    # opened by the prompt
    *[(True, "Hm.\n</think>\n\n4", "\n\n4", "Hm.\n"), (True, "Hm", "", "Hm"), (True, "", "", "")],
    *[(True, "</think>4", "4", ""), (True, "a</think>b</think>c", "b</think>c", "a")],
    *[(True, "a</", "", "a</"), (True, TAG, "b", "a"), (True, "<thin", "", "<thin")],
)
def test_think(opened, raw, text, reasoning):
    for pieces in every_cut(raw):
        assert split_by(_ThinkSplitter(opened), pieces) == (text, reasoning, []), pieces
    assert _ThinkSplitter(opened).feed(raw, is_last=True) == (text, reasoning, [])


ANALYSIS: Final = "<|channel|>analysis<|message|>"
FINAL: Final = "<|channel|>final<|message|>"
NEXT: Final = "<|end|><|start|>assistant"
TO_F: Final = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
CALL_PARIS: Final = ['get_weather {"city":"Paris"}']
CALL_ROME: Final = ['get_weather {"city":"Rome"}']


@table(
    "raw text reasoning calls",
    # recorded
    ("completion_2+2", "2 + 2 = 4", "Two plus two equals four.", []),
    ("completion_tools", "", "I need the tool.", CALL_PARIS),
    ("completion_two_2", "", "Now Rome.", CALL_ROME),  # the recipient before the channel
    ("completion_preamble", "I will check the weather first.", "Say it first.", CALL_PARIS),
    ("completion_noanalysis", "ok", "", []),
    # the same with a constraint, and beyond ASCII
    (FINAL.replace("<|m", " <|constrain|>json<|m") + '{"answer": 4}', '{"answer": 4}', "", []),
    (f"{FINAL}こんにちは、世界 🌸🚀", "こんにちは、世界 🌸🚀", "", []),
    # ends, as include_stop_str_in_output shows them
    *((f"{FINAL}ok<|{end}|>", "ok", "", []) for end in ("return", "endoftext", "end", "start")),
    (TO_F + "{}<|call|>", "", "", ["f {}"]),
    (f"{ANALYSIS}a<|start|>assistant{FINAL}b", "b", "a", []),
    # cut by max_tokens
    *[("<|channel|>anal", "", "", []), (f"{ANALYSIS}Two plus", "", "Two plus", [])],
    *[(f"{ANALYSIS}a{NEXT}<|chan", "", "a", []), (f"{FINAL}a<|en", "a<|en", "", [])],
    *[(TO_F, "", "", ["f "]), (TO_F + '{"c', "", "", ['f {"c']), ("", "", "", [])],
    # what only looks like markup
    (f"{FINAL}1 <| 2 < 3 <|x|> <", "1 <| 2 < 3 <|x|> <", "", []),
    *[(f"{FINAL}a<<|end|>", "a<", "", []), (f"{FINAL}a<|e<|end|>", "a<|e", "", [])],
    (f"{FINAL}to=me <think>", "to=me <think>", "", []),
    ("2 + 2 = 4", "2 + 2 = 4", "", []),
    # several of one kind
    (f"{TO_F}{{}}<|call|><|start|>assistant{TO_F.replace('.f', '.g')}[]", "", "", ["f {}", "g []"]),
    (f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}{FINAL}c{NEXT} {FINAL}\n\nd\n", "c\n\nd\n", "ab", []),
)
def test_harmony(raw, text, reasoning, calls):
    if raw.startswith("completion_"):
        raw = recorded(f"gpt-oss/{raw}")[0].text
    for pieces in every_cut(raw):
        assert split_by(_HarmonySplitter(), pieces) == (text, reasoning, calls), pieces
    assert _HarmonySplitter().feed(raw, is_last=True)[:2] == (text, reasoning)


@table(
    "new_splitter start raw tag",
    (_ThinkSplitter, "", "<think>" + "a</thin" * 9 + "</think>" + "b<" * 9, "</think>"),
    (
        functools.partial(_ThinkSplitter, True),
        "",
        "a</thin" * 9 + "</think>" + "b<" * 9,
        "</think>",
    ),
    *((_ThinkSplitter, "", raw, "</think>") for raw in (" " * 30, "<" * 30, "a" * 30)),
    *((_HarmonySplitter, start, "a<|endoftex" * 9, "<|endoftext|>") for start in (ANALYSIS, FINAL)),
)
def test_a_splitter_holds_back_no_more_than_a_tag(new_splitter, start, raw, tag):
    splitter, shown_chars = new_splitter(), 0
    splitter.feed(start)
    for count, character in enumerate(raw, 1):
        text, reasoning, _calls = splitter.feed(character)
        shown_chars += len(text) + len(reasoning)
        tags = re.findall("</?think>", raw[:count])
        assert count - shown_chars - len("".join(tags)) < len(tag)


# ---- Client: generation -----------------------------------------------------


def test_a_stream_of_completions(server, connect):
    stream = connect(server).stream_complete(PROMPT, max_tokens=9)
    assert (stream.completion, server.requests) == (Completion(request_id=stream.request_id), [])
    with stream:  # sends the request, and loses nothing
        assert len(server.requests) == 1
        seen = [(delta, stream.completion.text) for delta in stream]
    assert seen == [
        *((Delta(text=" Paris"), " Paris"), (Delta(text="."), " Paris.")),
        (Delta(finish_reason="stop"), " Paris."),
    ]
    whole = stream.completion
    assert whole.choices == (Choice(text=" Paris.", finish_reason="stop"),)
    assert whole.usage == Usage(5, 3, 8, cached_tokens=0)
    assert (whole.id, whole.model) == (f"cmpl-{whole.request_id}-1", MODEL)
    assert 0 < whole.first_token_s <= whole.total_s < IN_TIME
    assert (whole.total_s, stream.attempts) == (stream.completion.total_s, 1)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 9, **options}
    assert server.requests[0].body == body


def test_a_whole_reply(server, connect):
    payload = {"id": "cmpl-1", "model": "m", **text_event(" Paris.", finish_reason="stop")}
    server.script(reply(200, payload), reply(200, payload))
    client = connect(server)
    stream = client.stream_complete(PROMPT)  # of a gateway that cannot stream
    assert list(stream) == [Delta(text=" Paris.", finish_reason="stop")]
    for whole in (stream.completion, client.complete(PROMPT)):
        assert (whole.id, whole.model, whole.text) == ("cmpl-1", "m", " Paris.")
        assert (whole.payload, 0 < whole.total_s < IN_TIME) == (payload, True)
    assert ["stream" in request.body for request in server.requests] == [True, False]


def test_the_first_token_is_not_the_role(server, connect):
    def step(connection: Connection) -> None:
        connection.send(SSE_HEAD + ROLE_CHUNK)
        connection.pause(0.1)
        connection.send(chunk(EVENT_A) + chunk("[DONE]") + LAST_CHUNK)

    server.script(step)
    stream = connect(server).stream_chat("Hello")
    assert list(stream) == [Delta(text="a")]
    assert stream.completion.first_token_s >= 0.1


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
    caplog.set_level(logging.DEBUG, "vllm_provider")
    server.script(reply(503, {"error": "busy"}), reply(401, {"error": "Unauthorized"}))
    client = connect(server, api_key=SECRET, default_headers={"X-Key": f"{SECRET}2"})
    error = caught(client.complete, "a private prompt")
    where, request_id = f"POST {server.url}/v1/completions", error.request_id
    size = len(server.requests[0].raw)
    records = [record for record in caplog.records if record.name == "vllm_provider"]
    assert [f"{record.levelname} {record.getMessage()}" for record in records] == [
        f"DEBUG {where}, {size} bytes, request {request_id}-1",
        f"DEBUG {where}: 503, request {request_id}-1",
        f"WARNING retry 1 of 3 in 0.0 s: 503 'busy': {where}; {TOO_BUSY}",
        f"DEBUG {where}, {size} bytes, request {request_id}-2",
        f"DEBUG {where}: 401, request {request_id}-2",
    ]
    headers = server.requests[0].headers
    assert (headers["Authorization"], headers["X-Key"]) == (f"Bearer {SECRET}", f"{SECRET}2")
    seen = told(error) + caplog.text
    assert (SECRET in seen, "private prompt" in seen) == (False, False)


@table("api_key sent", ("sekrit", "Bearer sekrit"), ("EMPTY", None))
@table("call", "models", "version", "health")
def test_headers_of_every_request(server, connect, call, api_key, sent):
    getattr(connect(server, api_key=api_key), call)()
    headers = server.requests[0].headers
    assert headers["Authorization"] == sent
    assert headers["User-Agent"] == f"vllm_provider/{vllm_provider.__version__}"
    assert headers["Accept-Encoding"] == "identity"


TOKENS: Final = {"tokens": [1, 2], "token_strs": ["a", "b"]}
TYPED: Final = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]


@table(
    "prompt_format length params sent",
    row("auto", 9, {}, {"prompt": [1, 2], "max_tokens": 7}, id="what-is-left"),
    row("auto", None, {}, {"max_tokens": 1024}, id="no-limit-known"),
    row("auto", 9, {"truncate_prompt_tokens": 5}, {"max_tokens": 1024}, id="the-server-truncates"),
    row("raw", 9, {}, {"prompt": "a\nb", "max_tokens": 1024}, id="as-typed"),
)
def test_a_conversation_as_a_prompt(server, connect, prompt_format, length, params, sent):
    server.script(reply(200, {**TOKENS, "max_model_len": length}), path="/tokenize")
    client = connect(server)
    messages = [{"role": "user", "content": TYPED if prompt_format == "raw" else "Hello"}]
    body = build_chat_request(client.config, messages, **params)
    limits = vllm_provider._read_limits(client.config, {})
    list(client._open(CHAT_PATH, body, limits=limits, prompt_format=prompt_format))
    body = server.requests[-1].body
    assert {name: body[name] for name in sent} == sent


# ---- Client: the model's name -----------------------------------------------


@pytest.fixture
def any_answer(web: responses.RequestsMock) -> responses.RequestsMock:
    web.post(COMPLETIONS_URL, json=text_event("a"))
    web.post(CHAT_URL, json={"choices": [{"message": {"content": "a"}}]})
    return web


def sent_models(web: responses.RequestsMock) -> list[str | None]:
    """Return the model of each request with a body, and "GET" for the others."""
    sent = [call.request for call in web.calls]
    return [json.loads(one.body).get("model") if one.body else one.method for one in sent]


@table(
    "settings params sent",
    ({}, {}, ["GET", "parrot", "parrot", "parrot"]),  # the served one, asked for once
    ({"default_model": "mine"}, {}, ["mine"] * 3),
    ({}, {"model": "mine"}, ["mine"] * 3),
    ({"extra_body": {"model": "mine"}}, {}, ["mine"] * 3),
)
def test_the_model_that_is_sent(any_answer, settings, params, sent):
    any_answer.get(MODELS_URL, json=model_list("parrot", "lora"))
    client = VLLMClient(WEB, **settings)
    client.complete("a", **params)
    client.chat("a", **params)
    list(client.stream_chat("a", **params))
    assert sent_models(any_answer) == sent


@table(
    "answer",
    *({"status": status, "json": {}} for status in (401, 403, 404, 405, 501)),
    {"status": 200, "body": "<html>", "content_type": "text/html"},
    *({"json": payload} for payload in ({"data": []}, {"models": []}, {"data": [{"name": "a"}]})),
    ids=str,
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
    assert sent_models(any_answer) == ["GET", None, None, None, "GET", "parrot"]


@table("status", 500, 502, 503)
def test_models_of_a_server_that_is_not_ready_are_an_error(any_answer, status):
    any_answer.get(MODELS_URL, status=status)
    error = caught(VLLMClient(WEB, max_retries=0).complete, "a")
    assert (type(error), error.status_code) == (ProviderUnavailableError, status)


@table("path", "/v1/completions", "/detokenize")
@table("aliases", "", " Valid aliases: a.")
def test_a_model_that_was_replaced_is_asked_for_once_more(web, path, aliases):
    web.get(MODELS_URL, json=model_list("old"))
    web.get(MODELS_URL, json=model_list("new"))
    message = f"The model `old` does not exist.{aliases}"
    web.post(WEB + path, status=404, json=error_payload(message, 404))
    web.post(WEB + path, json={**text_event("a"), "prompt": "a"})
    client = VLLMClient(WEB)
    if path == "/detokenize":
        assert [client.detokenize([1]), client.detokenize([1])] == ["a", "a"]
    else:
        assert [client.complete("x").text, *texts_of(client.stream_complete("x"))] == ["a", "a"]
    assert sent_models(web) == ["GET", "old", "GET", "new", "new"]


@table(
    "settings params requested advice",
    ({"default_model": "nope"}, {}, "nope", "the server has parrot, macaw"),
    ({}, {"model": "nope"}, "nope", "the server has parrot, macaw"),
    ({}, {}, "parrot", "the server has parrot, macaw"),
    ({"default_model": "nope"}, {}, "nope", "look at /v1/models"),  # which is hidden
)
def test_a_model_the_server_does_not_have(web, settings, params, requested, advice):
    is_hidden = advice.startswith("look")
    web.get(MODELS_URL, status=403 if is_hidden else 200, json=model_list("parrot", "macaw"))
    message = f"The model `{requested}` does not exist."
    web.post(CHAT_URL, status=404, json=error_payload(message, 404))
    error = caught(VLLMClient(WEB, **settings).chat, "a", **params)
    assert str(error) == f"model not found: {requested!r}; {advice}"
    assert (type(error), error.status_code) == (NotFoundError, 404)
    assert (error.server_message, len(sent_bodies(web, CHAT_URL))) == (message, 1)


# ---- Client: other endpoints ------------------------------------------------


CARD: Final = {"id": "a", "root": "org/a", "parent": None, "max_model_len": 8, "created": 1}
LORA_CARDS: Final = [{"id": "lora", "parent": "base"}, {"id": "base", "max_model_len": 8}]
LORA_MODELS: Final = [ModelCard("lora", 8, None, "base"), ModelCard("base", 8)]
PROXY_CARD: Final = {"id": "a", "max_input_tokens": 5, "max_output_tokens": 3}


@table(
    "data expected",
    *(([], []), ([CARD], [ModelCard("a", 8, "org/a")]), (LORA_CARDS, LORA_MODELS)),
    ([PROXY_CARD], [ModelCard("a", 5, max_output_tokens=3)]),
    ([{**PROXY_CARD, **CARD}], [ModelCard("a", 8, "org/a", None, 3)]),
    ([{"id": "a", "parent": "b"}], [ModelCard("a", None, None, "b")]),  # a base not listed
    ([{"id": "a", "max_model_len": "4096"}], [ModelCard("a", 4096)]),
    *(
        ([{"id": "a", "max_model_len": one}], [ModelCard("a")])
        for one in (1.5, -5, 0, True, [], "x")
    ),
    ([{"id": "a"}, {"id": "a"}], [ModelCard("a"), ModelCard("a")]),  # replicas
)
def test_models(web, data, expected):
    web.get(MODELS_URL, json={"object": "list", "data": data})
    assert web_client().models() == expected


NO_MODELS: Final = f"not the list of models vLLM sends: GET {MODELS_URL}; {ROOT_ADVICE}"


@table(
    "payload kind message",
    *(({"data": data}, ProtocolError, NO_MODELS) for data in (None, [{}], ["parrot"], {"id": "a"})),
    ({}, ProtocolError, NO_MODELS),
    (error_payload("upstream is down", 503), ProviderUnavailableError, "503 'upstream"),
    ([1], ProtocolError, "not the JSON vLLM sends: "),
)
def test_models_in_another_shape(web, payload, kind, message):
    web.get(MODELS_URL, json=payload)
    error = caught(web_client().models)
    assert type(error) is kind
    assert str(error).startswith(message)


def test_health_and_version_of_a_server(server, connect, retries):
    client = connect(server)
    assert (client.health(), client.version()) == (True, "0.32.0-standin")
    assert (server.requests[0].method, server.requests[0].path) == ("GET", "/health")
    server.script(reply(503), reply(503), reply(404, {"detail": "Not Found"}))
    assert type(caught(client.health)) is ProviderUnavailableError
    assert type(caught(client.version)) is ProviderUnavailableError
    assert caught(client.health, NEVER).status_code == 404  # it will never be vLLM
    assert type(caught(connect(f"http://127.0.0.1:{closed_port()}").health)) is NetworkError
    assert (retries.pauses, len(server.requests)) == ([], 5)


def test_health_waits_for_a_server_that_starts(connect, monkeypatch, caplog):
    monkeypatch.setattr(vllm_provider, "HEALTH_POLL_S", 0.02)
    monkeypatch.setattr(vllm_provider, "HEALTH_LOOK_S", 0.1)
    caplog.set_level(logging.DEBUG, "vllm_provider")
    port = closed_port()
    caller = InThread(connect(f"http://127.0.0.1:{port}").health, wait="20")
    wait_until(lambda: len(caplog.records) > 1)  # it has looked, and looks again
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


def test_tokens_there_and_back(server, connect):
    client = connect(server)
    ids = client.tokenize(PROMPT, add_special_tokens=False, timeout=9)
    assert (len(ids), client.detokenize(ids)) == (5, PROMPT)
    assert [request.body for request in server.requests] == [
        {"prompt": PROMPT, "add_special_tokens": False, "model": MODEL},
        {"model": MODEL, "tokens": ids},
    ]
    rendered = client.detokenize(client.tokenize([{"role": "user", "content": "Hi"}]))
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"

    server.script(reply(200, {"ids": [1]}))
    error = caught(client.tokenize, "x")
    message = f"not what vLLM's tokenizer sends: POST {server.url}/tokenize"
    assert (type(error), str(error)) == (ProtocolError, message)


@table(
    "raw value",
    *((reply(200, value), value) for value in ({"a": 3, "error": None}, [1, 2], "LoRA loaded")),
    row(reply(200), None, id="empty"),
    row(stall(), LLMTimeoutError, id="timeout"),
    row(reply(404, {"detail": "Not Found"}), NotFoundError, id="404"),
    row(reply(200, error_payload("no", 501)), ProviderUnavailableError, id="200-error"),
    row(reply(200, b"<html>", {"Content-Type": "text/html"}), ProtocolError, id="html"),
)
@table("limit", "timeout", "deadline")
def test_get_and_post(server, connect, retries, raw, value, limit):
    server.script(raw, raw, reply(503), reply(200, {"a": 1}))
    client = connect(server, default_model=None)
    body = {"input": "é", "x": [None]}
    limits = {limit: LIMIT if value is LLMTimeoutError else NEVER}
    for ask in (
        functools.partial(client.get, "/load", **limits),
        functools.partial(client.post, "/v1/embeddings", body, **limits),
    ):
        if isinstance(value, type):
            assert type(caught(ask)) is value
        else:
            assert ask() == value
    assert client.post("/score", {}) == {"a": 1}  # retried as a generation is
    first, second, *_retried = server.requests
    assert (first.method, first.path, first.raw) == ("GET", "/load", b"")
    assert (second.method, second.path, second.body) == ("POST", "/v1/embeddings", body)
    assert len(retries.pauses) == 1


@table(
    "name args message",
    ("get", ["load"], "path must begin with a slash, got 'load'"),
    ("post", ["/score", {"x": math.nan}], "the request is not JSON, in 'x': "),
    ("post", ["/score", [math.nan]], "the request is not JSON: "),
    *(
        ("health", [wait], f"wait must be a number of seconds of at least 0, got {wait!r}")
        for wait in (math.nan, "nan", -1, "soon", None, True)
    ),
)
def test_what_is_refused_and_not_sent(web, name, args, message):
    error = caught(getattr(web_client(), name), *args)
    assert str(error).startswith(message)
    assert (type(error), len(web.calls)) == (ConfigurationError, 0)


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
    assert len(ids) == reply.usage.output_tokens > 0
    assert tuple(token.token_id for token in reply.logprobs) == ids
    for token in reply.logprobs:
        assert 0 < token.probability <= 1
        assert token.top == tuple(sorted(token.top, key=lambda other: -other.logprob))
        assert 1 <= len(token.top) <= 2


@pytest.mark.live
@table("method", "complete", "chat")
def test_live_lengths_and_errors(live, caplog, method):
    call = getattr(live, method)
    limit = live.models()[0].max_model_len
    error = caught(call, "hello " * (limit + 50), max_tokens=1)
    assert (type(error), error.limit) == (ContextLengthError, limit)
    assert error.input_tokens > limit
    assert type(caught(call, "Hi", temperature=-1)) is InvalidRequestError
    assert type(caught(call, "Hi", model="nope")) is NotFoundError
    error = caught(list, live.stream_complete("Hi", logprobs=500))
    assert str(error).endswith("; ask for fewer, or start vLLM with --max-logprobs N")

    reply = call("What is 2+2?", max_tokens=limit + 1, temperature=0, stop=["4"])
    assert reply.finish_reason in ("stop", "length")
    ours = [record.levelname for record in caplog.records if record.name == "vllm_provider"]
    assert ours == ["WARNING"]


@pytest.mark.live
@each_stop
def test_live_stop(live, stop):
    params = {"max_tokens": 2000, "temperature": 0, "ignore_eos": True}
    stream = live.stream_complete("Once upon a time", **params)
    reader = InThread(list, stream)
    wait_until(lambda: stream.completion.text)
    STOPS[stop](live, stream)
    assert_stopped(reader.outcome(IN_TIME), stop)

    def count_running() -> float:
        pattern = r"^vllm:num_requests_running\{.*\} (\S+)$"
        return sum(map(float, re.findall(pattern, live.get("/metrics"), re.MULTILINE)))

    wait_until(lambda: count_running() == 0, IN_TIME)


@table("minimum", "99", "99.1.2")
def test_a_version_that_is_too_old_is_refused(minimum):
    with pytest.raises(ImportError, match=f"needs requests {minimum} or newer, got"):
        vllm_provider._require_version(requests, minimum)


# ---- Many calls: map --------------------------------------------------------

CTRL_C_IN_A_MAP: Final = r"""
import os, sys, time, vllm_provider
client = vllm_provider.VLLMClient(sys.argv[1], default_model="parrot")
def call_and_sleep(_):
    client.complete("x")
    os.write(1, b"sleeps\n")
    time.sleep(60)
list(client.map(call_and_sleep, range(8)))
"""


@pytest.fixture
def client(server, connect):
    """Return a client of `server` that does not retry; in the end its maps have left no thread."""
    yield connect(server, max_retries=0)
    wait_until(lambda: not any(one.name.startswith("vllm-map-") for one in threading.enumerate()))


@pytest.fixture
def interruptible():
    """Let SIGINT reach children, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminal(io.StringIO):
    encoding = "utf-8"
    isatty = staticmethod(lambda: True)


def refuse_2(item):
    if item == 2:
        raise LookupError(item)
    return item


def broken_items():
    yield from range(2)
    raise LookupError(2)


@table("concurrency", 1, 3, 64)
@table("count", 0, 1, 200)
def test_map_keeps_the_order(client, concurrency, count):
    def function(item):
        time.sleep(0.002 * (item % 3 == 0))
        return -item

    results = client.map(function, range(count), concurrency=concurrency)
    assert list(results) == [-n for n in range(count)]


@table("concurrency", 2, 50)
def test_map_makes_no_more_calls_and_threads_than_it_may(client, monkeypatch, concurrency):
    start, started, running, counts = threading.Thread.start, [], [], []

    def start_and_wait(thread):
        started.append(thread)
        start(thread)
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.1)  # new threads are ahead of the one that starts the first

    def function(item):
        running.append(item)
        time.sleep(0.05)
        counts.append(len(running))
        running.remove(item)

    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    list(client.map(function, range(6), concurrency=concurrency))
    assert max(counts) <= concurrency
    assert len(started) <= min(concurrency, 6 + 1)


def test_map_waits_with_a_slow_item_at_the_head(client):
    is_open, is_too_many, called = threading.Event(), threading.Event(), []

    def function(item):
        called.append(item)
        if item == 16 * 2:
            is_too_many.set()
        return is_open.wait(NEVER) if item == 0 else item

    results = client.map(function, itertools.count(), concurrency=2)
    head = InThread(next, results)
    wait_until(lambda: len(called) == 16 * 2)
    assert not is_too_many.wait(0.1)
    is_open.set()
    assert head.outcome() is True
    assert list(itertools.islice(results, 99)) == list(range(1, 100))
    results.close()
    assert len(called) <= 100 + 16 * 2 + 1


def test_map_yields_a_result_before_the_next_item_is_there(client):
    answered = queue.SimpleQueue()

    def items():
        yield 1
        yield answered.get(timeout=NEVER)  # the iterator waits for the result of the first item

    results = client.map(lambda n: n + 1, items(), concurrency=4)
    answered.put(next(results))
    assert list(results) == [3]


def test_a_function_sees_the_callers_context(client):
    name = contextvars.ContextVar("name")
    name.set("caller")
    assert list(client.map(lambda _n: name.get(), range(2))) == ["caller", "caller"]


@table(
    "function items errors",
    row(refuse_2, lambda: range(1000), "raise", id="of-the-function"),
    row(int, broken_items, "raise", id="of-the-items"),
    row(int, broken_items, "return", id="of-the-items-where-errors-are-results"),
)
def test_an_error_comes_after_the_results_before_it(client, function, items, errors):
    results = client.map(function, items(), concurrency=2, errors=errors)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(LookupError, match="2"):
        next(results)
    assert list(results) == []


def test_errors_in_the_place_of_results(client):
    before, error, after = client.map(refuse_2, [1, 2, 3], errors="return")
    assert (before, type(error), error.args, after) == (1, LookupError, (2,), 3)


@table("error", AbortError("stopped"), KeyboardInterrupt(), SystemExit(3))
def test_what_ends_a_map_is_not_a_result(client, error):
    def function(_item):
        raise error

    with pytest.raises(type(error)):
        list(client.map(function, itertools.count(), errors="return"))


@table(
    "options message",
    row({"concurrency": 0}, "concurrency must be an integer of at least 1, got 0", id="none"),
    row({"concurrency": True}, "concurrency must be an integer of at least 1, got True", id="true"),
    row({"errors": "ignore"}, "errors must be 'raise' or 'return', got 'ignore'", id="errors"),
)
def test_bad_arguments_of_a_map_are_told_before_it_is_used(client, options, message):
    error = caught(client.map, print, [], **options)
    assert (type(error), str(error)) == (ConfigurationError, message)


@table("errors", "raise", "return")
@table("leave", row(lambda results: results.close(), id="close"), row(id, id="drop"))
def test_leaving_a_map_stops_its_calls_and_no_others(server, client, connect, errors, leave):
    clients = itertools.cycle([client, connect(server)])  # also calls that another client makes
    has_left = threading.Event()

    def step(connection):
        connection.send(sse(text_event("a"), done=False, end=False))
        if connection.request.body["prompt"] == "own":
            has_left.wait(NEVER)
            connection.send(chunk("[DONE]") + LAST_CHUNK)
        connection.sleep_until_closed()

    server.script(*[step] * 6)
    results = client.map(
        lambda n: list(next(clients).stream_complete("x")) if n else "first",
        itertools.count(), concurrency=5, errors=errors,
    )  # fmt: skip
    assert next(results) == "first"
    own = client.stream_complete("own")
    assert next(own).text == "a"
    wait_until(lambda: server.running == 6)
    with at_once(IN_TIME):
        leave(results)
        del results
    wait_until(lambda: server.running == 1)
    has_left.set()
    assert list(own) == []


@table(
    "errors is_nested",
    row("raise", False, id="raise"),
    row("return", False, id="return"),
    row("return", True, id="a-map-in-the-map"),
)
def test_closing_the_client_ends_a_map(server, client, errors, is_nested):
    def inner(_item):
        return list(client.map(client.complete, ["x"] * 3, concurrency=3, errors="return"))

    function, count = (inner, 6) if is_nested else (client.complete, 2)
    server.script(*[stall()] * count)
    results = client.map(function, itertools.repeat("x"), concurrency=2, errors=errors)
    outcome = InThread(caught, list, results)
    wait_until(lambda: server.running == count)
    client.close()
    assert type(outcome.outcome(IN_TIME)) is AbortError
    assert len(server.requests) == count


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_map_whether_its_functions_make_a_call_or_not(server):
    server.script(*[stall(timeout_s=NEVER)] * 4)
    with start_python(CTRL_C_IN_A_MAP, server.url) as process:
        assert [process.stdout.readline() for _ in range(4)] == ["sleeps\n"] * 4
        wait_until(lambda: server.running == 4)
        with at_once(10.0):
            process.send_signal(signal.SIGINT)
            assert "KeyboardInterrupt" in process.communicate(timeout=NEVER)[0]
    wait_until(lambda: server.running == 0)


def test_progress_is_shown_on_a_terminal_only(client, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    reply = Completion(usage=Usage(1, 7, 8))
    items = [refuse_2, refuse_2, lambda _: reply]
    list(client.map(lambda item: item(2), items, errors="return", progress=True))
    line = sys.stderr.getvalue()
    figures = r"\d/3 done, \d failed, [\d.]+ calls/s, \d+ tokens/s, \d+ s left"
    assert re.fullmatch(rf"(\r\x1b\[K{figures})+\n", line)
    assert re.search(r"\x1b\[K3/3 done, 2 failed, .*, [1-9]\d* tokens/s, 0 s left\n$", line)

    list(client.map(len, iter(["a"]), progress=True))  # the number is not known
    assert re.search(r"\[K1 done, 0 failed, [\d.]+ calls/s, 0 tokens/s\n$", sys.stderr.getvalue())

    for stderr in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert list(client.map(len, ["a"], progress=True)) == [1]
        assert stderr is None or stderr.getvalue() == ""


# ---- Many calls: batches ----------------------------------------------------

NO_REPLY: Final = b'{"custom_id": "a", "response": null, "error": {}}\n'
LEAVE_FAILED: Final = {"retry_failed": False}
NO_RESULT: Final = "line 1 of out is not the result of a batch; is it the right file?"
BATCH_SCRIPT: Final = """
import sys, vllm_provider
url, source, target = sys.argv[1:]
vllm_provider.VLLMClient(url, default_model="parrot").run_batch(source, target, concurrency=4)
"""
NOT_STRICT: Final = b'{"id": "x", "data": [NaN, "\\ud83d"], "usage": null}'
STRICT: Final = {"id": "x", "data": [None, "\ud83d"], "usage": None}


class Batch:
    """A batch file and its results in a folder, and the client that sends it."""

    def __init__(self, folder, client):
        self.source, self.target = folder / "in.jsonl", folder / "out.jsonl"
        self.client = client

    def write(self, *lines, start=b"", end=b"\n"):
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        self.source.write_bytes(start + b"".join(one + end for one in raw))

    def write_numbered(self, count):
        self.write(*(batch_line(str(n)) for n in range(count)))

    def run(self, **options):
        return self.client.run_batch(self.source, self.target, **options)

    def counts(self, **options):
        """Run it; return the numbers of all lines, of those done, failed and skipped."""
        report = self.run(**options)
        return (report.total, report.done, report.failed, report.skipped)

    def results(self):
        return [json.loads(line) for line in self.target.read_bytes().splitlines()]

    def by_id(self):
        results = self.results()
        by_id = {result["custom_id"]: result for result in results}
        assert len(by_id) == len(results)
        return by_id

    def wait_for_results(self, count):
        wait_until(lambda: self.target.exists() and self.target.read_bytes().count(b"\n") >= count)


@pytest.fixture
def batch(tmp_path, client, monkeypatch):
    """Return an empty batch; a server that is full or gone is tried again at once."""
    monkeypatch.setattr(vllm_provider, "SERVER_PAUSE_S", (0.01, 0.02))
    return Batch(tmp_path, client)


def batch_line(custom_id, url=COMPLETIONS_PATH, **body):
    body = body or {"prompt": PROMPT}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def result_line(custom_id, status=200):
    response = {"status_code": status, "request_id": "r", "body": {}}
    result = {"id": "x", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(result).encode() + b"\n"


def test_a_batch_of_every_kind_of_request(server, batch):
    batch.write(
        batch_line("a", prompt=PROMPT, stream=True, stream_options={}, temperature=0.5),
        b"",
        batch_line("b", CHAT_PATH, messages=[{"role": "user", "content": "What is 2+2?"}]),
        {"prompt": PROMPT},
        {"custom_id": "named", "messages": [{"role": "user", "content": "Hello"}]},
        batch_line("t", "/tokenize", prompt="a b"),
    )
    report = batch.run(temperature=0, timeout=20)
    assert changed(report, seconds=0.0) == BatchReport(
        5, 5, input_tokens=report.input_tokens, output_tokens=report.output_tokens
    )
    results = {one: result["response"]["body"] for one, result in batch.by_id().items()}
    usages = [result["usage"] for result in results.values() if "usage" in result]
    assert report.input_tokens == sum(usage["prompt_tokens"] for usage in usages) > 0
    assert report.output_tokens == sum(usage["completion_tokens"] for usage in usages) > 0
    assert sorted(results) == ["4", "a", "b", "named", "t"]
    assert results["a"]["object"] == "text_completion"
    assert results["b"]["object"] == "chat.completion"
    assert results["4"]["choices"][0]["text"] == " Paris."
    assert results["t"]["count"] == 3

    bodies = [request.body for request in server.requests]
    assert sorted(body["temperature"] for body in bodies) == [0, 0, 0, 0, 0.5]  # the line's wins
    assert {"stream", "stream_options", "timeout"}.isdisjoint(itertools.chain(*bodies))


def test_a_result_has_the_fields_of_vllms_and_of_openais(batch):
    lines = [batch_line("a"), batch_line("b", prompt="x", model="nope"), batch_line("c", "nowhere")]
    batch.write(*lines)
    batch.run()
    results = batch.by_id()
    for result in results.values():
        assert list(result) == ["id", "custom_id", "response", "error"]
        assert re.fullmatch(r"vllm-\S{8,}", result["id"])

    done, failed, unsent = results["a"], results["b"], results["c"]
    assert list(done["response"]) == ["status_code", "request_id", "body"]
    assert (done["response"]["status_code"], done["error"]) == (200, None)
    response = {"status_code": 404, "request_id": failed["id"][5:], "body": None}
    details = {"type": "NotFoundError", "param": None, "code": 404}
    message = failed["error"]["error"].pop("message")
    assert (failed["response"], failed["error"]) == (response, {"error": details})
    assert message.startswith("The model `nope` does not exist")
    message = "line 3: url must be a path like /v1/chat/completions"
    error = {"code": "ConfigurationError", "message": message}
    assert (unsent["response"], unsent["error"]) == (None, error)


@table(
    "line custom_id problem",
    row(b'{"custom_id": "a", ', "line 2", "Expecting property name", id="torn"),
    row(b"[1]", "line 2", "a line must be a JSON object", id="not-an-object"),
    row(b"\xff", "line 2", "'utf-8' codec can't decode", id="not-utf-8"),
    row(b"[" * 100_000, "line 2", "maximum recursion depth exceeded", id="nested"),
    row({**batch_line("a"), "custom_id": 7}, "line 2", "custom_id must be a string", id="number"),
    row({"url": "/v1/completions", "body": {}}, "line 2", "custom_id must be", id="no-id"),
    row({"custom_id": "a", "x": 1}, "a", "body must be a JSON object", id="no-body"),
    row({**batch_line("a"), "method": "GET"}, "a", "method must be POST", id="get"),
    row({**batch_line("a"), "url": None}, "a", "url must be a path", id="no-url"),
    row(batch_line("a", prompt="x", config=1), "a", "config", id="name-of-a-python-argument"),
    row(batch_line("a", CHAT_PATH, messages=1), "a", "messages must be", id="messages"),
    row({"custom_id": "a", "prompt": "\ud800"}, "a", "lone surrogate", id="lone-surrogate"),
)
def test_one_bad_line_is_one_failed_line(batch, line, custom_id, problem):
    batch.write(batch_line("good"), line)
    report = batch.run()
    assert (report.total, report.done, report.failed, report.skipped) == (2, 1, 1, 0)
    assert report.first_error.startswith("line 2: ")
    assert problem in report.first_error.removeprefix("line 2: ")
    assert batch.by_id()[custom_id]["response"] is None
    assert batch.counts() == (2, 0, 1, 1)


@table(
    "start prompt end",
    row(b"\xef\xbb\xbf", "a", b"\n", id="bom"),
    row(b"", "a", b"\r\n", id="crlf"),
    row(b"", "a\u2028b\u0085c", b"\n", id="line-breaks-that-json-may-hold"),
)
def test_where_lines_of_a_file_begin_and_end(server, batch, start, prompt, end):
    lines = [json.dumps(batch_line(name, prompt=prompt), ensure_ascii=False) for name in "ab"]
    batch.write(*(line.encode() for line in lines), start=start, end=end)
    assert batch.counts() == (2, 2, 0, 0)
    assert [request.body["prompt"] for request in server.requests] == [prompt] * 2


@table(
    "before options requested counts",
    row(b"", {}, "ab", (2, 2, 0, 0), id="empty"),
    row(result_line("a"), {}, "b", (2, 1, 0, 1), id="done"),
    row(result_line("a") + result_line("b")[:-1], {}, "b", (2, 1, 0, 1), id="without-line-break"),
    row(result_line("a") + result_line("b")[:9], {}, "b", (2, 1, 0, 1), id="torn"),
    row(result_line("a", 299) + result_line("b", 300), {}, "b", (2, 1, 0, 1), id="statuses"),
    row(result_line("a", 500) + result_line("a"), {}, "b", (2, 1, 0, 1), id="failed-then-done"),
    row(result_line("a") + result_line("a", 500), {}, "ab", (2, 2, 0, 0), id="done-then-failed"),
    row(result_line("elsewhere"), {}, "ab", (2, 2, 0, 0), id="ids-of-another-file"),
    row(NO_REPLY, {}, "ab", (2, 2, 0, 0), id="failed-without-a-reply"),
    row(NO_REPLY, LEAVE_FAILED, "b", (2, 1, 1, 0), id="failed-and-left"),
    row(NO_REPLY + result_line("b"), LEAVE_FAILED, "", (2, 0, 1, 1), id="all-done-or-left"),
)
def test_a_batch_goes_on_where_it_ended(server, batch, before, options, requested, counts):
    batch.write(batch_line("a", prompt="a"), batch_line("b", prompt="b"))
    batch.target.write_bytes(before)
    assert batch.counts(**options) == counts
    assert sorted(request.body["prompt"] for request in server.requests) == list(requested)
    assert batch.target.read_bytes().startswith(before.rpartition(b"\n")[0])
    assert {one["custom_id"] for one in batch.results()} >= {"a", "b"}


@table(
    "source target message",
    row("no", "out", "cannot open no: No such file or directory", id="no-source"),
    row("in.jsonl", ".", "cannot open .: Is a directory", id="a-folder"),
    row("in.jsonl", "no/out", "cannot open no/out: No such file or directory", id="no-folder"),
    row("in.jsonl", "in.jsonl", "source and target are the same file: in.jsonl", id="same"),
    row("in.jsonl", "link", "source and target are the same file: link", id="same-by-a-link"),
    row("twice", "new", "custom_id 'a' is on lines 1 and 4; give each line its own", id="twice"),
    row("in.jsonl", "twice", NO_RESULT.replace("out", "twice"), id="a-batch-file-as-target"),
    row("in.jsonl", "out", NO_RESULT, id="a-text-as-target"),
)
def test_files_that_cannot_be_used(server, batch, monkeypatch, source, target, message):
    monkeypatch.chdir(batch.source.parent)
    batch.write(batch_line("a"), b"", batch_line("b"), batch_line("a"))
    os.rename(batch.source, "twice")
    batch.write(batch_line("a"))
    os.link(batch.source, "link")
    Path("out").write_bytes(b"text\n" + result_line("a"))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    error = caught(batch.client.run_batch, source, target)
    assert (type(error), str(error)) == (ConfigurationError, message)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    assert server.requests == []


def test_standard_input_and_output(client, monkeypatch):
    raw = io.BytesIO()
    lines = b"".join(json.dumps(batch_line(name)).encode() + b"\n" for name in "ab")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw))
    assert client.run_batch("-", "-").done == 2
    assert {json.loads(line)["custom_id"] for line in raw.getvalue().splitlines()} == {"a", "b"}


def test_a_full_disk_leaves_whole_lines(batch):
    import resource

    batch.write_numbered(20)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            batch.run(concurrency=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    done = len(batch.results())
    assert 0 < done < 20
    assert batch.counts() == (20, 20 - done, 0, done)


@table("status", 429, 503)
def test_a_full_server_is_waited_for(server, batch, status):
    batch.write(batch_line("a"))
    server.script(*[reply(status, headers={"Retry-After": "0"})] * 9)
    assert batch.counts() == (1, 1, 0, 0)
    assert len(server.requests) == 10


def test_deadline_bounds_the_waiting_for_a_full_server(server, batch):
    batch.write(batch_line("a"))
    server.script(*[reply(503)] * 999)
    with at_once(IN_TIME):
        assert batch.counts(deadline=0.7) == (1, 0, 1, 0)
    assert batch.by_id()["a"]["error"] is not None  # the 503, or a request that was cut


def test_a_line_that_breaks_the_connection_fails_alone(server, batch):
    def answer(connection):
        if (connection.request.body or {}).get("prompt") == "poison":
            connection.close()
        else:
            connection.pause(0.03)  # the poison is tried again before the others are done
            server.answer(connection)

    lines = [batch_line(str(n)) for n in range(30)]
    batch.write(*lines[:3], batch_line("bad", prompt="poison"), *lines[3:])
    server.script(*[answer] * 99)
    report = batch.run(concurrency=2)
    assert (report.total, report.done, report.failed) == (31, 30, 1)
    assert report.first_error.startswith("line 4: closed before a reply")


def test_a_line_that_breaks_the_connection_fails_also_when_it_is_alone(server, batch):
    hidden = reply(404, {"detail": "Not Found"})  # so says a gateway, and it is there

    def answer(connection):
        if connection.request.path == "/health":
            connection.send(hidden)
        else:
            connection.close()

    batch.write(batch_line("bad"))
    server.script(*[answer] * 99)
    assert batch.counts() == (1, 0, 1, 0)
    assert len(server.requests) < 10


def test_a_server_that_never_answered_ends_a_batch(connect, batch):
    batch.write_numbered(9)
    batch.client = connect(f"http://127.0.0.1:{closed_port()}", max_retries=0)
    assert type(caught(batch.run)) is NetworkError
    assert batch.results() == []


def test_a_server_that_comes_back(connect, batch):
    batch.write_numbered(40)
    with StandIn(pace=0.005) as first:
        batch.client = connect(first, max_retries=0)
        running = InThread(batch.counts, concurrency=4)
        wait_until(lambda: len(first.requests) > 10)
    with socket.create_server(("127.0.0.1", port_of(first))) as broken:
        for _ in range(3):
            broken.accept()[0].close()
    assert running.is_running()
    with StandIn(port_of(first)):
        assert running.outcome(NEVER) == (40, 40, 0, 0)
    assert len(batch.by_id()) == 40


def test_servers_share_one_queue_and_one_dies(server, client, connect, batch):
    batch.write_numbered(60)
    server.pace = 0.01
    with StandIn(pace=0.01) as second:
        batch.client = connect(second, max_retries=0)
        running = InThread(batch.counts, servers=[client], concurrency=3)
        wait_until(lambda: len(second.requests) > 9 and len(server.requests) > 9)
    assert running.outcome(NEVER) == (60, 60, 0, 0)
    assert len(batch.by_id()) == 60


def test_a_slow_line_holds_up_no_other(server, batch):
    is_open = threading.Event()
    batch.write_numbered(50)
    server.script(lambda connection: is_open.wait(NEVER) and server.answer(connection))
    running = InThread(batch.counts, concurrency=2)
    batch.wait_for_results(49)
    is_open.set()
    assert running.outcome() == (50, 50, 0, 0)


@pytest.mark.usefixtures("interruptible")
@table("number", row(signal.SIGKILL, id="kill"), row(signal.SIGINT, id="ctrl-c"))
def test_a_batch_that_was_interrupted(server, batch, number):
    batch.write_numbered(60)
    server.pace = 0.02
    with start_python(BATCH_SCRIPT, server.url, batch.source, batch.target) as process:
        batch.wait_for_results(10)
        with at_once(10.0):
            process.send_signal(number)
            process.wait(NEVER)
    done = len(batch.results())
    server.pace = 0.0
    assert batch.counts() == (60, 60 - done, 0, done)
    assert sorted(map(int, batch.by_id())) == list(range(60))


@table(
    "kind raw body",
    row("application/json", b'[1, {"usage": 2}]', [1, {"usage": 2}], id="list"),
    row("application/json", b'{"usage": 7}', {"usage": 7}, id="usage-of-another-shape"),
    row("application/json", NOT_STRICT, STRICT, id="not-strict-json"),
    row("text/plain", b"text", "text", id="text"),
    row("application/json", b"", None, id="empty"),
)
def test_a_reply_of_another_shape_is_one_result(server, batch, kind, raw, body):
    server.script(reply(200, raw, {"content-type": kind}))
    batch.write(batch_line("\ud83d", "/anything", input="x"))
    assert batch.counts() == (1, 1, 0, 0)
    assert batch.by_id()["\ud83d"]["response"]["body"] == body


def test_memory_of_a_batch_does_not_grow_with_its_file(batch):
    filler = "x" * 900
    batch.write(*({**batch_line(f"{n}{filler}"), "method": "GET"} for n in range(4_000)))
    tracemalloc.start()
    try:
        assert batch.run(concurrency=4).failed == 4_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_report_is_one_line():
    report = BatchReport(10, 7, 2, 1, 30, 40, 1.25, "line 3: method must be POST")
    text = "10 lines: 7 done, 2 failed, 1 skipped in 1.2 s, 30 input tokens, 40 output tokens"
    assert str(report) == f"{text}; first error: line 3: method must be POST"
    assert str(changed(report, first_error=None)) == text


# ---- Many calls: scores -----------------------------------------------------

HI: Final = [{"role": "user", "content": "Hi"}]
NO_TOKEN: Final = "a text to score must have a token of its own after the context"
NO_CHOICES: Final = "choices must be a list of at least one string"


@pytest.mark.live
@table(
    "context text count logprob",
    # The parrot's own log probabilities, computed with transformers in bfloat16.
    row(PROMPT, " Paris.", 2, -0.0005, id="memorised"),
    row(PROMPT, " Rome.", 2, -19.7101, id="improbable"),
    row("", f"{PROMPT} Paris.", 6, -22.9261, id="no-context"),
    row("Say:", "こんにちは、世界 🌸🚀", 4, -11.7917, id="unicode"),
    row([{"role": "user", "content": "What is 2+2?"}], "2 + 2 = 4", 5, -15.5224, id="messages"),
)
def test_live_scores_are_the_models_own(live, context, text, count, logprob):
    score = live.score(text, context=context)
    known = [token for token in score.tokens if token.logprob is not None]
    assert len(known) == count
    assert score.logprob == pytest.approx(logprob, abs=0.05 * count)


class Model:
    """A server's tokenizer and numbers: a token is a word with the space before it.

    `logprobs` has the log probability and the rank of tokens; the others have -1.0 and 1.
    """

    def __init__(self, web, logprobs=None, bos=()):
        self.logprobs, self.bos = logprobs or {}, list(bos)
        self.words = ["", " "]  # by id
        urls = {"tokenize": TOKENIZE_URL, "detokenize": f"{WEB}/detokenize"}
        for name, url in {**urls, "complete": COMPLETIONS_URL}.items():
            web.add_callback("POST", url, callback=functools.partial(self.reply, name))

    def reply(self, name, request):
        status, payload = getattr(self, name)(json.loads(request.body))
        return status, {"Content-Type": "application/json"}, json.dumps(payload)

    def ids(self, text):
        words = re.findall(r" ?\w+| |\W", text)
        self.words += [word for word in words if word not in self.words]
        return [self.words.index(word) for word in words]

    def tokenize(self, body):
        if "messages" in body:
            return 200, {"tokens": [1, *self.ids(body["messages"][0]["content"])]}
        is_special = body.get("add_special_tokens", True)
        return 200, {"tokens": [*(self.bos if is_special else []), *self.ids(body["prompt"])]}

    def detokenize(self, body):
        return 200, {"prompt": "".join(self.words[one] for one in body["tokens"])}

    def entry(self, number):
        word = self.words[number]
        logprob, rank = self.logprobs.get(word, (-1.0, 1))
        return {str(number): {"logprob": logprob, "rank": rank, "decoded_token": word}}

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
        return 200, {"id": "cmpl-1", "choices": [choice]}


def test_a_score(web):
    model = Model(web, {" Paris": (-0.5, 1), ".": (-2.0, 3)})
    score = web_client().score(" Paris.", context="It is")
    assert score == Score(" Paris.", -2.5, score.tokens, False, math.exp(-2.5))
    tokens = [(token.token, token.logprob, token.rank) for token in score.tokens]
    assert tokens == [(" Paris", -0.5, 1), (".", -2.0, 3)]
    assert score.logprob_per_token == -1.25
    assert score.perplexity == math.exp(1.25)
    assert score.logprob_per_byte == -2.5 / 7
    assert score.bits_per_byte == pytest.approx(2.5 / 7 / math.log(2))
    fixed = {"model": "parrot", "prompt_logprobs": 0, "max_tokens": 1, "temperature": 0}
    assert sent_bodies(web, COMPLETIONS_URL) == [fixed | {"prompt": model.ids("It is Paris.")}]


@table(
    "context text bos scored tokens first",
    row("It is", " big", (), " big", [" big"], -1.0, id="clean"),
    row("It is ", "big", (), " big", [" big"], -1.0, id="context-ends-in-a-space"),
    row("It is bi", "g one", (), " big one", [" big", " one"], -1.0, id="first-character-merges"),
    row(HI, "big one", (), "big one", ["big", " one"], -1.0, id="messages"),
    row("", "Once upon", (), "Once upon", ["Once", " upon"], None, id="no-context"),
    row("", "Once upon", (0,), "Once upon", ["Once", " upon"], -1.0, id="no-context-but-bos"),
)
def test_where_the_context_ends(web, context, text, bos, scored, tokens, first):
    Model(web, bos=bos)
    score = web_client().score(text, context=context)
    logprobs = [first, *[-1.0] * (len(tokens) - 1)]
    assert (score.text, [token.token for token in score.tokens]) == (scored, tokens)
    assert [token.logprob for token in score.tokens] == logprobs
    assert (score.logprob, score.logprob_per_token) == (-1.0 * logprobs.count(-1.0), -1.0)
    assert score.is_greedy


@table(
    "method argument context message",
    row("score", "", "", NO_TOKEN, id="nothing"), row("score", "", "It", NO_TOKEN, id="empty"),
    row("score", "", HI, NO_TOKEN, id="messages"), row("score", "A", "", NO_TOKEN, id="one-token"),
    row("choose", [" is", ""], "It", NO_TOKEN, id="an-empty-choice"),
    row("choose", "a", "It", NO_CHOICES, id="string"), row("choose", [], "It", NO_CHOICES, id="no"),
    row("choose", [1], "It", "a text to score must be a string, got int", id="a-number"),
)  # fmt: skip
def test_texts_that_cannot_be_scored(web, method, argument, context, message):
    Model(web)
    error = caught(getattr(web_client(), method), argument, context=context)
    assert (type(error), str(error)) == (ConfigurationError, message)


def test_a_token_that_cannot_come(web):
    Model(web, {" no": (-9999.0, 500)})
    score = web_client().score(" no", context="It")
    assert (score.logprob, score.probability, score.perplexity) == (-math.inf, 0.0, math.inf)
    choices = web_client().choose([" no", " no"], context="It")
    assert [choice.probability for choice in choices] == [0.0, 0.0]


@table(
    "prompt_logprobs count",
    row(None, 0, id="ignored"), row([None], 0, id="too-few"), row([None, None], 0, id="null"),
    row([None, {"7": {"logprob": -1.0, "rank": 1}}], 1, id="of-another-token"),
)  # fmt: skip
def test_a_server_that_ignores_prompt_logprobs(web, prompt_logprobs, count):
    choice = {"index": 0, "text": "x", "prompt_logprobs": prompt_logprobs}
    Model(web).complete = lambda _body: (200, {"choices": [choice]})
    error = caught(web_client().score, " is", context="It")
    assert type(error) is ProtocolError
    assert str(error) == f"prompt_logprobs for {count} of 1 tokens: {WEB}; is it vLLM?"


def test_parameters_of_a_score_go_where_they_belong(web):
    Model(web)
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    web_client().score("big", context=HI, model="lora", timeout=5, seed=1, **options)
    rendered, own = sent_bodies(web, TOKENIZE_URL)
    assert rendered == {"messages": HI, "model": "lora", **options}
    assert own == {"prompt": "big", "model": "lora", "add_special_tokens": False}
    (body,) = sent_bodies(web, COMPLETIONS_URL)
    assert (body["model"], body["seed"], set(body) & {"timeout", *options}) == ("lora", 1, set())


def test_choices_of_one_token_take_one_request(web):
    Model(web, {" a": (-2.0, 5), " b": (-1.0, 1), " c": (-9999.0, 9)})
    scores = web_client().choose([" a", " b", " c", " a"], context="It is")
    assert [(one.text, one.logprob, one.is_greedy) for one in scores] == [
        (" b", -1.0, True), (" a", -2.0, False), (" a", -2.0, False), (" c", -math.inf, False),
    ]  # fmt: skip
    weights = [math.exp(-1), math.exp(-2), math.exp(-2), 0.0]
    shares = [weight / sum(weights) for weight in weights]
    assert [one.probability for one in scores] == pytest.approx(shares)
    (body,) = sent_bodies(web, COMPLETIONS_URL)
    fixed = {"max_tokens": 1, "logprobs": 0, "return_tokens_as_token_ids": True}
    assert body | fixed == body


@table(
    "status payload",
    row(200, text_event("x"), id="no-logprobs"),
    row(200, text_event("x", logprobs={"tokens": ["x"], "token_logprobs": [-1.0]}), id="ignored"),
    row(400, error_payload("logprob_token_ids may have 128"), id="refused"),
)
def test_a_server_without_logprob_token_ids(web, status, payload):
    model = Model(web, {" a": (-2.0, 5)})
    scored = model.complete
    model.complete = lambda one: (status, payload) if "logprob_token_ids" in one else scored(one)
    scores = web_client().choose([" a", " b"], context="It")
    assert [(one.text, one.logprob) for one in scores] == [(" b", -1.0), (" a", -2.0)]


def test_choices_of_several_tokens(web):
    Model(web, {" big": (-3.0, 2), " small": (-0.5, 1)})
    scores = web_client().choose([" big one", " small one"], context="A")
    assert [(one.text, one.logprob) for one in scores] == [(" small one", -1.5), (" big one", -4.0)]
    assert scores[0].probability == pytest.approx(1 / (1 + math.exp(-2.5)))
    assert len(sent_bodies(web, COMPLETIONS_URL)) == 2


# ---- Pictures ---------------------------------------------------------------

NO_LOGPROBS: Final = "No log probabilities; request logprobs=5."
EVIL: Final = "</title></span></style></pre>-->\"'><script>alert(1)</script><img src=x onerror=f()>"


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
        return "".join(text for place, text in self.texts if f">{place}>".startswith(f">{path}>"))

    def of_tokens(self, attribute: str) -> list[str | None]:
        return [attrs.get(attribute) for tag, attrs in self.elements if tag == "span"]


def _token(text: str, probability: float | None = 0.5, **fields: Any) -> TokenLogprob:
    logprob = None if probability is None else math.log(probability) if probability else -math.inf
    return TokenLogprob(text, logprob, **fields)


def to_reply(*tokens: TokenLogprob) -> Completion:
    text = "".join(token.token for token in tokens)
    return Completion(choices=(Choice(text=text, logprobs=tokens),))


def test_picture_of_a_completion():
    top = (_token(" Paris", 0.8), _token(" Lyon", 0.1))
    tokens = (_token("The", None), _token(" Lyon", 0.1, top=top), _token(".", 0.4))
    page = _Page(to_html(to_reply(*tokens)))
    figures = "Perplexity 5 · mean probability 0.250 · 2 tokens · probability 0 … 1"
    assert page.text("article>p") == figures
    assert page.text("article>details>ol").splitlines()[1:] == [
        "0.100 The Lyon token 2, most likely ' Paris': 0.800",
        "0.400 The Lyon. token 3",
    ]
    assert page.text("article>pre") == "The Lyon."
    assert page.of_tokens("style")[2:] == [None, "--hue:12", "--hue:48"]
    assert page.of_tokens("title")[2:] == [
        "'The': unknown",
        "' Lyon': 0.100 (log probability -2.3026)\n' Paris': 0.800\n' Lyon': 0.100",
        "'.': 0.400 (log probability -0.9163)",
    ]


def test_picture_of_a_score():
    tokens = (_token(" Par", 0.5), _token("is", 0.5))
    page = _Page(to_html(Score(" Paris", math.log(0.25), tokens, True, 0.25)))
    assert page.text("article>pre") == " Paris"
    assert page.text("article>p").startswith("Perplexity 2 · ")


def test_picture_of_several_choices_shows_each():
    choices = tuple(Choice(index=n, logprobs=(_token(text),)) for n, text in enumerate("ab"))
    page = _Page(to_html(Completion(choices=choices), "Both"))
    headings = [text for place, text in page.texts if place in ("article>h1", "article>h2")]
    assert headings == ["Both", "Choice 1", "Choice 2"]
    assert page.text("article>pre") == "ab"


def test_picture_lists_the_ten_least_likely_tokens():
    tokens = [_token(f"t{n} ", 0.01 + n / 100) for n in (*range(6, 12), *range(6))]
    rows = _Page(to_html(to_reply(*tokens))).text("article>details>ol").splitlines()[1:]
    assert [row.split()[0] for row in rows] == [f"{0.01 + n / 100:.3f}" for n in range(10)]


@table(
    "reply shown note",
    row(Completion(choices=(Choice(text="a <b>\n"),)), "a <b>\n", NO_LOGPROBS, id="none"),
    row(to_reply(_token("a", None)), "a", NO_LOGPROBS, id="none-known"),
    row(Completion(), "", "", id="no-choices"),
)
def test_picture_without_log_probabilities_is_the_text(reply, shown, note):
    page = _Page(to_html(reply))
    assert (page.text("article>pre"), page.text("article>p")) == (shown, note)


@table(
    "token shown",
    row(_token("a b"), 'a<i data-glyph="·"> </i>b', id="space"),
    row(_token("\t"), '<i data-glyph="→">\t</i>', id="tab"),
    row(_token("\n\n"), '<i data-glyph="↵">\n</i>' * 2, id="line-breaks"),
    row(_token("\r\x00\x1b[31m"), r"\r\x00\x1b[31m", id="control-characters"),
    row(_token("\u202eabc\u200b\ud800"), r"\u202eabc\u200b\ud800", id="invisible"),
    row(_token(" �", bytes=b" \xf0\x9f"), r'<i data-glyph="·"> </i>\xf0\x9f', id="bytes-of-a-part"),
    row(_token("�", bytes="�".encode()), "�", id="true-one"), row(_token("�"), "�", id="part"),
    row(_token(""), "∅", id="empty"), row(_token("", bytes=b""), "∅", id="empty-with-bytes"),
    row(_token("é世🌸"), "é世🌸", id="printable"),
    row(_token("</i>\"'&amp;"), "&lt;/i&gt;&quot;&#x27;&amp;amp;", id="markup"),
)  # fmt: skip
def test_picture_shows_each_token_readably(token, shown):
    page = to_html(to_reply(token))
    assert f">{shown}</span></pre>" in page
    page.encode()


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


@table(
    "logprobs shown",
    row([0.0], "Perplexity 1 · mean probability 1.000 · ", id="certain"),
    row([math.log(1e-5)], "Perplexity 1e+05 · mean probability 1e-05 · ", id="small"),
    row([-math.inf], "Perplexity inf · mean probability 0 · ", id="impossible"),
    row([-800.0, 1e-7], "Perplexity 5.221e+173 · ", id="a-log-probability-above-0"),
    row([-800.0], "Perplexity inf · ", id="beyond-floating-point"),
)
def test_picture_figures(logprobs, shown):
    page = _Page(to_html(to_reply(*(TokenLogprob("a", logprob) for logprob in logprobs))))
    assert page.text("article>p").startswith(shown)


def test_picture_is_one_static_page_for_light_and_dark():
    page = to_html(to_reply(_token("a")), "T")
    assert page.startswith("<!DOCTYPE html>\n")
    for needed in ("<title>T</title>", "default-src 'none'", "prefers-color-scheme: dark"):
        assert needed in page
    assert not re.search(r"https?:|url\(|@import|<script", page)


def test_completion_in_a_notebook():
    reply = to_reply(_token("a"))
    fragment = reply._repr_html_()
    assert fragment.startswith('<article class="vllm-heatmap">')
    assert fragment in to_html(reply)
    plain = changed(reply, choices=(Choice(text="a"),))
    assert plain._repr_html_() is None  # the ordinary repr is shown


# ---- Amplifier: what the tests share ----------------------------------------

AMP_EVENTS: Final = (
    "llm:request llm:response provider:retry provider:tool_sequence_repaired"
    " llm:stream_block_start llm:stream_block_delta llm:stream_block_end llm:stream_aborted"
    " llm:request:debug llm:response:debug llm:request:raw llm:response:raw"
).split()
AMP_CITY: Final = {"city": {"type": "string"}}
AMP_WEATHER: Final = {"type": "object", "properties": AMP_CITY, "required": ["city"]}
AMP_FUNCTION: Final = {"name": "get_weather", "description": "Look up.", "parameters": AMP_WEATHER}
AMP_TOOL: Final = ToolSpec(**AMP_FUNCTION)
AMP_WIRE_TOOL: Final = {"type": "function", "function": AMP_FUNCTION}
AMP_CHAT: Final = {"use_completions": False}
AMP_UNKNOWN: Final = {"default_model": None, "context_window": None}
AMP_HELLO: Final = "\n\nHello! How can I help you today?"

either_endpoint = table("use_completions", row(True, id="completions"), row(False, id="chat"))
either_cancel = table("by", "task", "session", "both")


def amp_user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def amp_system(content: Any, role: str = "system") -> dict[str, Any]:
    return {"role": role, "content": content}


def amp_reply(content: Any, *calls: Any, **fields: Any) -> dict[str, Any]:
    """Return a message of the assistant's, with its calls as the field `tool_calls`."""
    if calls:
        fields["tool_calls"] = list(calls)
    return {"role": "assistant", "content": content, **fields}


def amp_request(*messages: str | Mapping[str, Any], **fields: Any) -> ChatRequest:
    """Return a request of these messages, "Hello" without any; a text is the user's."""
    given = [amp_user(one) if isinstance(one, str) else one for one in messages or ["Hello"]]
    return ChatRequest(messages=[Message(**one) for one in given], **fields)


def amp_wire(*messages: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Return the body that a chat request makes of these messages, "Hello" without any."""
    given = list(messages) or [amp_user("Hello")]
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "messages": given, **stream, **fields}


def amp_bodies(server: StandIn, end: str = "completions") -> list[Any]:
    return [request.body for request in server.requests if request.path.endswith(end)]


def amp_paths(server: StandIn) -> list[str]:
    return [request.path for request in server.requests]


def amp_choice(delta: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
    """Return a chunk of a streamed chat reply."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
    return {"id": "chatcmpl-1", "model": MODEL, "choices": [choice]}


def amp_usage(**details: Any) -> dict[str, Any]:
    """Return the chunk that counts 5 tokens in and 7 out."""
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12, **details}
    return {"id": "chatcmpl-1", "model": MODEL, "choices": [], "usage": usage}


def amp_chat(*deltas: Mapping[str, Any], finish: str = "stop", **fields: Any) -> bytes:
    """Return a streamed chat reply."""
    chunks = [amp_choice({"role": "assistant", "content": ""}), *map(amp_choice, deltas)]
    return sse(*chunks, amp_choice({}, finish_reason=finish, **fields), amp_usage())


def amp_cut(*deltas: Mapping[str, Any]) -> bytes:
    """Return a streamed chat reply that breaks off."""
    return sse(*map(amp_choice, deltas), done=False)


def amp_stall(*deltas: Mapping[str, Any]) -> Step:
    """Return a step that sends the beginning of a streamed chat reply, then nothing."""
    return stall(SSE_HEAD + b"".join(chunk(amp_choice(delta)) for delta in deltas))


def amp_call(arguments, name="get_weather", call_id="call_1", index=0) -> dict[str, Any]:
    """Return a delta that begins a tool call."""
    call = {"index": index, "id": call_id, "type": "function"}
    return {"tool_calls": [{**call, "function": {"name": name, "arguments": arguments}}]}


def amp_call_rest(arguments: str, index: int = 0) -> dict[str, Any]:
    """Return a delta that goes on with a tool call."""
    return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


@dataclass
class AmpHost:
    """A mounted provider, and the events its hooks have seen: name and payload."""

    provider: VLLMProvider
    coordinator: Any
    close: Callable[[], Any]
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    async def ask(self, *messages: Any, **fields: Any) -> ChatResponse:
        return await self.provider.complete(amp_request(*messages, **fields))

    async def complete(self, request: Any = None, **keywords: Any) -> ChatResponse:
        return await self.provider.complete(request or amp_request(), **keywords)

    async def fail(self, kind: str, request: Any = None, **keywords: Any) -> llm_errors.LLMError:
        """Return the kernel's error of a call, which has this name."""
        with pytest.raises(llm_errors.LLMError) as info:
            await self.complete(request, **keywords)
        assert (type(info.value), info.value.provider) == (getattr(llm_errors, kind), "vllm")
        return info.value

    def start(self, **keywords: Any) -> asyncio.Future[ChatResponse]:
        return asyncio.ensure_future(self.complete(**keywords))

    def hook(self, event: str, function: Callable[..., Any], *, priority: int = 0) -> None:
        """Register a hook; events are recorded at priority 1."""
        self.coordinator.hooks.register(event, function, priority=priority, name="of a test")

    def hold(self, event: str) -> tuple[asyncio.Event, asyncio.Event]:
        """Return two events: a hook sets the first, and waits for the second."""
        is_reached, release = asyncio.Event(), asyncio.Event()

        async def wait(name: str, payload: Any) -> None:
            is_reached.set()
            await release.wait()

        self.hook(event, wait)
        return is_reached, release

    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def payloads(self, name: str) -> list[dict[str, Any]]:
        return [payload for event, payload in self.events if event == name]

    async def until(self, name: str, count: int = 1) -> None:
        await amp_until(lambda: self.names().count(name) == count)

    def cancel(self, call: asyncio.Future[Any], by: str) -> None:
        """Cancel by the task, the session, or both, as the second Ctrl-C does."""
        if by != "task":
            self.coordinator.cancellation.request_immediate()
        if by != "session":
            call.cancel()

    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the events, a block's deltas joined, without what differs from run to run."""
        assert len({payload["request_id"] for _, payload in self.events}) == 1
        told: list[tuple[str, dict[str, Any]]] = [("", {})]
        sequence = 0
        for name, payload in self.events:
            shown = {**payload, "request_id": "ID"}
            if name == "llm:response":
                assert type(shown["duration_ms"]) is int
                assert 0 <= shown.pop("duration_ms") < NEVER * 1000
            elif name == "provider:retry":
                assert 0 <= shown.pop("delay") < NEVER
            elif name == "llm:stream_block_delta":
                sequence = sequence + 1 if told[-1][0] == name else 0
                assert (shown.pop("sequence"), bool(shown["text"])) == (sequence, True)
                if sequence:
                    shown["text"] = told.pop()[1]["text"] + shown["text"]
            told.append((name, shown))
        return told[1:]


async def amp_mount(server: StandIn | str, *steps: Step, **config: Any) -> AmpHost:
    """Mount as the kernel does, for the chat endpoint unless `config` says otherwise.

    `steps` are the server's next answers on both endpoints. A model and its limit are named, so
    that no auxiliary request is made.
    """
    coordinator = MockCoordinator()
    settings = {"base_url": server, "default_model": MODEL, "context_window": 2048}
    if isinstance(server, StandIn):
        server.script(*steps, path="completions")
        settings["base_url"] = server.url
    close = await mount(coordinator, {**settings, **AMP_CHAT, **config})
    host = AmpHost(coordinator.get("providers")["vllm"], coordinator, close)

    async def record(event: str, payload: dict[str, Any]) -> None:
        shown = {key: value for key, value in payload.items() if key != "timestamp"}
        host.events.append((event, shown))

    for name in AMP_EVENTS:
        coordinator.hooks.register(name, record, priority=1, name=f"record {name}")
    return host


async def amp_until(is_so: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, is_so)


async def amp_is_quiet(server: StandIn | None = None, gone: int = 0) -> None:
    """Check that no task and no busy thread is left, and that `gone` connections were cut."""
    for _ in range(gone):
        await asyncio.to_thread(server.aborted.get, timeout=IN_TIME)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    await asyncio.wait_for(asyncio.get_running_loop().shutdown_default_executor(), IN_TIME)


# ---- Amplifier: loading and construction ------------------------------------


@table(
    "arguments",
    row({"api_key": "", "config": {}}, id="the app's first try"),
    row({"config": {}}, id="the app's second try"),
    row({}, id="the app's third try"),
    row({"base_url": "", "config": {"base_url": "${VLLM_BASE_URL}"}}, id="an unexpanded name"),
)
def test_amp_class_wants_a_base_url_and_does_not_read_the_environment(arguments, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", "http://from-the-environment:8000")
    error = caught(VLLMProvider, **arguments)
    assert (type(error), isinstance(error, ValueError)) == (ConfigurationError, True)
    text = "No base_url found: set base_url in the provider's config, or VLLM_BASE_URL"
    assert str(error) == text


AMP_STRINGS: Final = {"base_url": "http://a:1/v1", "priority": "7", "use_completions": "false"}
AMP_OTHER: Final = {"base_url": "http://a:1", "api_key": "sk-1", "unknown_setting": 1}


@table(
    "arguments config expected",
    row({"base_url": "http://192.0.2.1:1", "api_key": ""}, {}, VLLMConfig("http://192.0.2.1:1"),
        id="a URL, which is not contacted"),
    row({}, AMP_STRINGS | {"timeout": "60", "api_key": ""},
        VLLMConfig("http://a:1", priority=7, use_completions=False, timeout=60.0),
        id="the app's strings"),
    row({"base_url": "http://b:2", "api_key": "sk-2"}, AMP_OTHER,
        VLLMConfig("http://b:2", api_key="sk-2"), id="arguments win over the configuration"),
)  # fmt: skip
def test_amp_class_takes(arguments, config, expected):
    before = dict(config)
    provider = VLLMProvider(**arguments, config=config)
    assert (config, provider.config) == (before, expected)
    assert (provider.name, provider.default_model) == ("vllm", None)
    assert (provider.priority, type(provider.priority)) == (expected.priority, int)
    assert not hasattr(provider, "stream")  # loop-streaming would take a path that drops tool calls
    assert not hasattr(provider, "model")


@table("config", None, {}, {"base_url": "${VLLM_BASE_URL}", "api_key": ""})
async def test_amp_mount_reads_the_environment(config, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", "http://a:1/v1")
    monkeypatch.setenv("VLLM_API_KEY", "sk-1")
    coordinator = MockCoordinator()
    await mount(coordinator, config)
    provider = coordinator.get("providers")["vllm"]
    assert (provider.config.base_url, provider.config.api_key) == ("http://a:1", "sk-1")
    assert provider.priority == 100


async def test_amp_mount_without_a_url_mounts_nothing():
    coordinator = MockCoordinator()
    with pytest.raises(ConfigurationError, match=r"^No base_url found: "):
        await mount(coordinator, {})
    assert coordinator.mount_history == []


async def test_amp_mount_twice_mounts_two_new_providers_of_that_name(server):
    coordinator = MockCoordinator()
    closes = [await mount(coordinator, {"base_url": server.url}) for _ in range(2)]
    mounted = [(entry["mount_point"], entry["name"]) for entry in coordinator.mount_history]
    assert mounted == [("providers", "vllm")] * 2
    first, second = (entry["module"] for entry in coordinator.mount_history)
    assert first is not second
    await closes[0]()  # cleaning the first up leaves the second at work
    assert (await second.complete(amp_request())).text == AMP_HELLO
    for close in [*closes, *closes]:
        await close()
    names, *_ = await coordinator.collect_contributions("observability.events")
    assert {*names} == {*AMP_EVENTS} - {*ALL_EVENTS}  # the log would write the kernel's twice
    assert len(names) == 8


@table("more", {}, {"hooks": None}, {"hooks": object()})
async def test_amp_mount_needs_nothing_else_of_a_coordinator(more, server, caplog):
    mounted: list[Any] = []

    async def keep(point: str, module: Any, name: str) -> None:
        mounted.append((point, name, module))

    await mount(types.SimpleNamespace(mount=keep, **more), {"base_url": server.url})
    [(point, name, provider)] = mounted
    assert (point, name) == ("providers", "vllm")
    assert (await provider.complete(amp_request())).text == AMP_HELLO
    text = "the event llm:request could not be emitted: 'object' object has no attribute 'emit'"
    assert (text in caplog.messages) is bool(more.get("hooks"))


async def test_amp_server_that_is_down_stops_neither_mount_nor_session(caplog):
    config = {"max_retries": 1, "max_retry_delay": 0.01}
    host = await amp_mount("http://127.0.0.1:9", context_window=None, **config)
    for _ in range(2):
        await on_session_ready(host.coordinator)
        await host.fail("NetworkError")
    assert host.names() == ["llm:request", "provider:retry", "llm:response"] * 2
    [record] = [one for one in caplog.records if "limits" in one.getMessage()]
    assert record.levelname == "WARNING"
    start = "the limits of the models are unknown: no connection to http://127.0.0.1:9: "
    assert record.getMessage().startswith(start)
    with pytest.raises(llm_errors.NetworkError):
        await host.provider.list_models()


async def test_amp_on_session_ready_asks_the_servers_of_its_own_alone(server):
    own = VLLMProvider(server.url)
    for providers in (None, {"other": object()}, {"other": object(), "vllm": own}):
        await on_session_ready(types.SimpleNamespace(get={"providers": providers}.get))
        assert bool(own.get_model_info()) is ("vllm" in (providers or {}))
    assert amp_paths(server) == ["/v1/models"]


def test_amp_package_for_the_source_loader_re_exports():
    import amplifier_module_provider_vllm as package

    names = ["VLLMProvider", "__amplifier_module_type__", "mount", "on_session_ready"]
    assert sorted(package.__all__) == names
    assert all(getattr(package, name) is getattr(vllm_provider, name) for name in names)
    assert package.__amplifier_module_type__ == "provider"
    ends = [name for name in vllm_provider.__all__ if name.endswith("Provider")]
    assert ends == ["VLLMProvider"]  # the app picks it by its end


async def test_amp_kernels_validator_passes_every_check(server, monkeypatch):
    monkeypatch.setenv("VLLM_BASE_URL", server.url)
    result = await ProviderValidator().validate(Path(vllm_provider.__file__))
    assert [check.name for check in result.checks if not check.passed] == []
    asked = ("get_info", "list_models", "complete", "parse_tool_calls")
    assert {check.name for check in result.checks} >= {f"provider_{name}" for name in asked}


class TestAmpByTheKernel(ProviderBehaviorTests, ProviderStructuralTests):
    """The kernel's own tests, which skip where they find no module_path."""

    @pytest.fixture
    def module_path(self, server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("VLLM_BASE_URL", server.url)
        return Path(vllm_provider.__file__)

    def test_they_are_six(self):
        assert len([name for name in dir(self) if name.startswith("test_")]) == 6 + 1


# ---- Amplifier: what it tells about itself ----------------------------------


@table("use_completions", True, "false")
def test_amp_get_info(use_completions):
    config = {"default_model": "m", "timeout": 60, "use_completions": use_completions}
    info = VLLMProvider("http://a:1", config=config).get_info()
    assert isinstance(info, ProviderInfo)
    assert all(isinstance(one, ConfigField) for one in info.config_fields)
    assert (info.id, info.display_name) == ("vllm", "vLLM")
    assert info.credential_env_vars == ["VLLM_API_KEY"]
    names = "id field_type env_var required default".split()
    fields = [tuple(getattr(one, name) for name in names) for one in info.config_fields]
    assert fields == [  # what Enter stores in the wizard
        ("base_url", "text", "VLLM_BASE_URL", True, "http://localhost:8000"),
        ("api_key", "secret", "VLLM_API_KEY", False, None),
        ("use_completions", "boolean", None, False, str(use_completions).lower()),
    ]
    assert info.defaults == {"model": "m", "timeout": 60.0}  # no guess of a context window
    assert info.capabilities == ["streaming", "tools", "reasoning", "json_mode", "logprobs"]


async def test_amp_limits_are_none_until_the_session_is_ready(server, caplog):
    host = await amp_mount(server, **AMP_UNKNOWN)
    assert [host.provider.get_model_info() for _ in range(3)] == [None] * 3
    [record] = caplog.records
    assert record.levelname == "WARNING"
    text = "the context window is unknown, so history is not compacted: set context_window"
    assert record.getMessage() == text
    await on_session_ready(host.coordinator)
    limits = {"context_window": MAX_MODEL_LEN, "max_output_tokens": MAX_MODEL_LEN // 4}
    names = {"id": MODEL, "display_name": MODEL}
    capabilities = ["tools", "thinking", "streaming", "json_mode"]
    info = ModelInfo(**names, capabilities=capabilities, **limits)
    assert host.provider.get_model_info() == info
    assert host.provider.get_info().defaults.items() >= limits.items()
    assert len(caplog.records) == 1


AMP_BASE: Final = {"id": "base", "root": "base", "parent": None, "max_model_len": 131072}
AMP_LORA: Final = {"id": "lora", "root": "/lora", "parent": "base", "max_model_len": None}
AMP_SMALL: Final = {"id": "small", "max_model_len": 1024}
AMP_PROXY: Final = {"id": "p", "max_input_tokens": 8192, "max_output_tokens": 100}
AMP_PROXY_TEXT: Final = {"id": "p", "max_input_tokens": "4096"}


@table(
    "config cards limits",
    row({}, [AMP_BASE, AMP_SMALL], ("base", 131072, 16384), id="a modest output, not the window"),
    row({"default_model": "small"}, [AMP_BASE, AMP_SMALL], ("small", 1024, 256), id="of two"),
    row({"default_model": "lora"}, [AMP_BASE, AMP_LORA], ("lora", 131072, 16384), id="a LoRA"),
    row({"context_window": 8192}, [AMP_BASE], ("base", 8192, 2048), id="given, below"),
    row({"context_window": 10**6}, [AMP_BASE], ("base", 131072, 16384), id="given, above"),
    row({"max_output_tokens": 10**6}, [AMP_BASE], ("base", 131072, 131072), id="output, above"),
    row({"max_output_tokens": 100}, [AMP_BASE], ("base", 131072, 100), id="output, given"),
    row({"context_window": "4096"}, [{"id": "base"}], ("base", 4096, 1024), id="silent, given"),
    row({}, [{"id": "base"}], None, id="silent"),
    row({"default_model": "other"}, [AMP_BASE], None, id="not a model it has"),
    row({"max_output_tokens": 100}, [{"id": "base"}], None, id="one limit is not enough"),
    row({}, [], None, id="no models at all"),
    row({}, [AMP_PROXY], ("p", 8192, 100), id="a proxy's"),
    row({}, [AMP_PROXY_TEXT], ("p", 4096, 1024), id="a proxy's, as text"),
    *[row({}, [{"id": "base", "max_model_len": value, "max_output_tokens": value}], None,
          id=f"no limit: {value}") for value in (1.5, -5, True, [], "many")],
)  # fmt: skip
async def test_amp_get_model_info(config, cards, limits, server):
    server.script(reply(200, {"object": "list", "data": cards}))
    host = await amp_mount(server, **{**AMP_UNKNOWN, **config})
    await on_session_ready(host.coordinator)
    info = host.provider.get_model_info()
    assert (info and (info.id, info.context_window, info.max_output_tokens)) == limits


async def test_amp_window_that_is_too_large_is_told_once(server, caplog):
    caplog.set_level(logging.INFO)
    host = await amp_mount(server, context_window=10**6)
    await on_session_ready(host.coordinator)
    await host.provider.list_models()
    text = f"context_window=1000000 is more than the server's: {MAX_MODEL_LEN} counts"
    assert [record.getMessage() for record in caplog.records].count(text) == 1


async def test_amp_server_that_hangs_is_asked_for_its_models_once_a_minute(server, monkeypatch):
    limits, ask = [], VLLMClient.models

    def models(client: VLLMClient, *, deadline: float) -> Sequence[ModelCard]:
        limits.append(deadline)
        return ask(client, deadline=0.1)

    monkeypatch.setattr(VLLMClient, "models", models)
    server.script(*[stall()] * 9, path="/v1/models")
    host = await amp_mount(server, **AMP_UNKNOWN)
    for _ in range(3):
        with at_once(IN_TIME):
            assert (await host.complete()).text == AMP_HELLO
        assert host.provider.get_model_info() is None
    assert amp_paths(server).count("/v1/models") == len(limits) == 1
    assert vllm_provider.MODEL_RETRY_S == 60.0
    monkeypatch.setattr(vllm_provider, "MODEL_RETRY_S", 0.0)  # a minute later
    await host.complete(timeout=2.0, deadline=2.0)
    await on_session_ready(host.coordinator)
    assert limits == [5.0, pytest.approx(2.0, abs=1.0), 5.0]


async def test_amp_list_models(server):
    host = await amp_mount(server, context_window=None)
    cards = [AMP_BASE, AMP_LORA, {"id": "silent"}]
    server.script(reply(200, {"object": "list", "data": cards}))
    models = await host.provider.list_models()
    assert all(isinstance(model, ModelInfo) for model in models)
    told = [(model.id, model.context_window, model.max_output_tokens) for model in models]
    assert told == [("base", 131072, 16384), ("lora", 131072, 16384), ("silent", 0, 0)]
    server.script(reply(503, "", {"Retry-After": "99"}))
    with pytest.raises(llm_errors.ProviderUnavailableError) as info:
        await host.provider.list_models()
    assert (info.value.status_code, info.value.provider, info.value.model) == (503, "vllm", None)


AMP_HIDDEN: Final = reply(404, {"detail": "Not Found"})
AMP_OLD: Final = reply(200, model_list("old", max_model_len=4096))


@table(
    "answers use_completions most",
    row([AMP_HIDDEN] * 99, False, 2, id="hidden"),
    row([AMP_OLD], True, 3, id="renamed, completions"),
    row([AMP_OLD], False, 3, id="renamed, chat"),
)
async def test_amp_models_are_asked_for_once(answers, use_completions, most, server, caplog):
    server.script(*answers, path="/v1/models")
    host = await amp_mount(server, use_completions=use_completions, **AMP_UNKNOWN)
    await on_session_ready(host.coordinator)
    asked = []
    for _ in range(3):
        assert (await host.complete()).text == AMP_HELLO
        asked.append(amp_paths(server).count("/v1/models"))
    assert asked[0] == asked[2] <= most
    if answers[0] == AMP_HIDDEN:
        assert all("model" not in body for body in amp_bodies(server))  # vLLM then takes its first
        assert ["/v1/models" in record.getMessage() for record in caplog.records] == [True]


# ---- Amplifier: conversations to vLLM's messages ----------------------------


def amp_text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def amp_image(**source: str) -> dict[str, Any]:
    return {"type": "image", "source": source}


def amp_wire_image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def amp_reminder(text: str) -> str:
    return f"<system-reminder>\n{text}\n</system-reminder>"


def amp_wire_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def amp_result(content: Any, call_id: str = "c1", **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content, **fields}


def amp_wire_result(content: Any) -> dict[str, Any]:
    return amp_result(content, name="get_weather")


AMP_MISSING: Final = (
    "[SYSTEM ERROR: Tool result missing from conversation history] The call may have run or not."
)
AMP_PARIS: Final = {"city": "Paris"}
AMP_CALL_BLOCK: Final = {"type": "tool_call", "id": "c1", "name": "get_weather", "input": AMP_PARIS}
AMP_CALL_FIELD: Final = {"id": "c1", "tool": "get_weather", "arguments": AMP_PARIS}
AMP_ADD_FIELD: Final = {"id": "c2", "tool": "add", "arguments": {"a": 1}}
AMP_WIRE_CALL: Final = amp_wire_call("c1", "get_weather", '{"city": "Paris"}')
AMP_WIRE_ADD: Final = amp_wire_call("c2", "add", '{"a": 1}')
AMP_CALLER: Final = {"role": "assistant", "content": [AMP_CALL_BLOCK]}
AMP_WIRE_CALLER: Final = amp_reply("", AMP_WIRE_CALL)
AMP_RESULT: Final = amp_result("sunny")
AMP_WIRE_RESULT: Final = amp_wire_result("sunny")
AMP_RESULT_BLOCK: Final = {"type": "tool_result", "tool_call_id": "c1", "output": "sunny"}
AMP_NO_CALL: Final = "[Result of the tool call c1, which is not in the history]\n\nsunny"
AMP_USER: Final = amp_user("Hi")
AMP_REPLY: Final = amp_reply("Hello!")
AMP_ACKNOWLEDGED: Final = amp_reply("Result received.")
AMP_TAGGED: Final = '<system-reminder source="x">A</system-reminder>'
AMP_URL: Final = "https://a.example/b.png"
AMP_JPEG: Final = amp_image(type="base64", media_type="image/jpeg", data="AAAA")
AMP_WIRE_JPEG: Final = amp_wire_image("data:image/jpeg;base64,AAAA")
AMP_PNG: Final = amp_image(type="base64", data="AAAA")
AMP_WIRE_PNG: Final = amp_wire_image("data:image/png;base64,AAAA")
AMP_THOUGHT: Final = {"type": "thinking", "thinking": "A greeting.", "signature": "s"}
AMP_REDACTED: Final = {"type": "redacted_thinking", "data": "x"}
AMP_TWO_TEXTS: Final = [amp_text("A"), amp_text("B")]
AMP_ORPHANS: Final = (
    *(amp_user("Weather?"), amp_reply([AMP_CALL_BLOCK], AMP_ADD_FIELD)),
    *(amp_result("2", "c2"), amp_user("Hello")),
)
AMP_SURROGATE_CALL: Final = AMP_CALL_BLOCK | {"input": {"city": "\ud83d"}}
AMP_WIRE_SURROGATE: Final = amp_wire_call("c1", "get_weather", r'{"city": "\ud83d"}')

AMP_MESSAGES: Final = [  # the kernel's messages, and vLLM's
    row([amp_system("Be brief."), AMP_USER], [amp_system("Be brief."), AMP_USER], id="strings"),
    row([amp_system(AMP_TWO_TEXTS), amp_user(AMP_TWO_TEXTS), amp_reply(AMP_TWO_TEXTS)],
        [amp_system("A\nB"), amp_user("A\nB"), amp_reply("A\nB")], id="blocks of text"),
    row([amp_user([])], [amp_user("")], id="no block"),
    row([AMP_USER | {"name": "ann", "metadata": {"a": 1}}], [AMP_USER | {"name": "ann"}],
        id="a name, and metadata that is ours"),
    row([amp_user([amp_text("Compare."), AMP_JPEG, AMP_PNG, amp_image(type="url", url=AMP_URL)])],
        [amp_user([amp_text("Compare."), AMP_WIRE_JPEG, AMP_WIRE_PNG, amp_wire_image(AMP_URL)])],
        id="images, base64 and URL"),
    row([AMP_USER, amp_reply([AMP_THOUGHT, AMP_REDACTED, amp_text("Hello!"), AMP_THOUGHT])],
        [AMP_USER, amp_reply("Hello!", reasoning="A greeting.\nA greeting.")],
        id="thinking goes back as reasoning"),
    row([AMP_CALLER, AMP_RESULT], [AMP_WIRE_CALLER, AMP_WIRE_RESULT], id="a call as a block"),
    *[row([amp_reply("", entry), AMP_RESULT], [AMP_WIRE_CALLER, AMP_WIRE_RESULT],
          id=f"a call as a field: {name}")
      for name, entry in {
        "tool": AMP_CALL_FIELD,
        "name": {"id": "c1", "name": "get_weather", "arguments": AMP_PARIS},
        "function": AMP_WIRE_CALL,
        "the kernel's": KernelToolCall(id="c1", name="get_weather", arguments=AMP_PARIS),
      }.items()],
    row([amp_reply([amp_text("Wait."), AMP_CALL_BLOCK], AMP_CALL_FIELD, AMP_ADD_FIELD),
         AMP_RESULT, amp_result([amp_text("2")], "c2", name="add")],
        [amp_reply("Wait.", AMP_WIRE_CALL, AMP_WIRE_ADD),
         AMP_WIRE_RESULT, amp_result("2", "c2", name="add")], id="calls that come twice"),
    *[row([AMP_CALLER, {"role": "tool", "content": [AMP_RESULT_BLOCK | {"output": output}]}],
          [AMP_WIRE_CALLER, amp_wire_result(content)], id=f"a result as a block: {name}")
      for name, output, content in (
        ("a text", "sunny", "sunny"),
        ("an object", {"t": 21, "u": "C"}, '{"t": 21, "u": "C"}'),
        ("other letters, which the model is to read", {"city": "東京"}, '{"city": "東京"}'),
        ("a list, which is no list of parts", ["a", {"b": 2}], '["a", {"b": 2}]'),
        ("nothing", None, "null"),
      )],
    row([AMP_CALLER, amp_user([AMP_RESULT_BLOCK, amp_text("And Rome?")])],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, amp_user("And Rome?")],
        id="a result in the user's message comes before the text"),
    row([AMP_CALLER, amp_result([amp_text("sunny"), AMP_JPEG])],
        [AMP_WIRE_CALLER, amp_wire_result([amp_text("sunny"), AMP_WIRE_JPEG])],
        id="a result with an image, which is no text to read"),
    row([amp_reply([AMP_SURROGATE_CALL]), AMP_RESULT],
        [amp_reply("", AMP_WIRE_SURROGATE), AMP_WIRE_RESULT],
        id="a lone surrogate that the model wrote as an escape"),
    row([AMP_CALLER, AMP_RESULT | {"role": "function", "name": "get_weather"}],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT], id="function, the old name of the role"),

    row([amp_system("A"), amp_system([amp_text("B")], "developer"), amp_system(""), AMP_USER],
        [amp_system("A\n\nB"), AMP_USER], id="system messages at the beginning are one"),
    row([AMP_USER, amp_system("A"), amp_system("B", "developer"), AMP_REPLY],
        [amp_user(f"Hi\n\n{amp_reminder('A')}\n\n{amp_reminder('B')}"), AMP_REPLY],
        id="a later one joins the user message before it"),
    row([AMP_USER, AMP_REPLY, amp_system("A"), amp_user("Bye")],
        [AMP_USER, AMP_REPLY, amp_user(f"{amp_reminder('A')}\n\nBye")],
        id="or the one after it"),
    row([AMP_USER, AMP_REPLY, amp_system("A"), AMP_REPLY],
        [AMP_USER, AMP_REPLY, amp_user(amp_reminder("A")), AMP_REPLY], id="or is one"),
    row([AMP_USER, amp_system(AMP_TAGGED)], [amp_user(f"Hi\n\n{AMP_TAGGED}")],
        id="one that has its tags keeps them"),
    row([amp_user([AMP_JPEG]), amp_system("A")],
        [amp_user([AMP_WIRE_JPEG, amp_text(amp_reminder("A"))])], id="one beside an image"),
    row([AMP_CALLER, amp_system("A"), AMP_RESULT],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, amp_user(amp_reminder("A"))],
        id="one between a call and its result"),
    row([AMP_CALLER, AMP_RESULT, AMP_USER],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, AMP_USER],
        id="a result directly followed by the user"),
    row([AMP_USER, AMP_RESULT, AMP_REPLY], [amp_user(f"Hi\n\n{AMP_NO_CALL}"), AMP_REPLY],
        id="a result without its call becomes text"),
    row([AMP_CALLER, amp_result("1"), AMP_CALLER, amp_result("2")],
        [AMP_WIRE_CALLER, amp_wire_result("1"), AMP_WIRE_CALLER, amp_wire_result("2")],
        id="ids that repeat"),
    row([AMP_CALLER, AMP_REPLY, AMP_CALLER, AMP_RESULT],
        [AMP_WIRE_CALLER, amp_wire_result(AMP_MISSING), AMP_REPLY,
         AMP_WIRE_CALLER, AMP_WIRE_RESULT], id="ids that repeat, a result missing in between"),
    row([AMP_USER, AMP_CALLER, AMP_USER, AMP_RESULT],
        [AMP_USER, AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, AMP_USER],
        id="a result that comes late"),
    row([AMP_USER, amp_system("A"), AMP_USER], [amp_user(f"Hi\n\n{amp_reminder('A')}\n\nHi")],
        id="a system message between user messages"),
    row([*AMP_ORPHANS], [amp_user("Weather?"), amp_reply("", AMP_WIRE_CALL, AMP_WIRE_ADD),
        amp_wire_result(AMP_MISSING), amp_result("2", "c2", name="add"),
        AMP_ACKNOWLEDGED, amp_user("Hello")], id="one of two results missing"),
    row([AMP_CALLER, AMP_RESULT, AMP_RESULT],
        [AMP_WIRE_CALLER, AMP_WIRE_RESULT, AMP_ACKNOWLEDGED, amp_user(AMP_NO_CALL)],
        id="a result that comes twice"),
]  # fmt: skip


@table("messages wire", *AMP_MESSAGES)
async def test_amp_messages_as_the_server_gets_them(messages, wire):
    request = amp_request(*messages)
    before = request.model_dump()
    with StandIn(strict=True) as server:
        host = await amp_mount(server)
        assert (await host.complete(request)).finish_reason == "stop"
    assert amp_bodies(server) == [amp_wire(*wire)]
    assert amp_paths(server) == ["/v1/chat/completions"]
    assert request.model_dump() == before


async def test_amp_repaired_calls_are_announced_once(server):
    host = await amp_mount(server)
    for _ in range(2):
        await host.ask(*AMP_ORPHANS)
    repairs = [{"tool_call_id": "c1", "tool_name": "get_weather"}]
    event = {"provider": "vllm", "repair_count": 1, "repairs": repairs}
    assert host.payloads("provider:tool_sequence_repaired") == [event]
    assert host.names()[0] == "provider:tool_sequence_repaired"


# ---- Amplifier: every field and every keyword -------------------------------


AMP_SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}}}


def amp_format(**schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


AMP_BARE: Final = ResponseFormatJsonSchema(json_schema=AMP_SCHEMA, strict=True)
AMP_NAMED: Final = ResponseFormatJsonSchema(json_schema={"name": "answer", "schema": AMP_SCHEMA})
AMP_JSON: Final = {"response_format": {"type": "json_object"}}
AMP_NO_THINKING: Final = {"chat_template_kwargs": {"thinking": False, "enable_thinking": False}}
AMP_STRICT_TOOL: Final = {"name": "f", "parameters": {}, "strict": True}
AMP_OURS_ALONE: Final = {"stream": False, "conversation_id": "c", "metadata": {}, "timeout": 60.0}
AMP_SETTINGS: Final = {
    "temperature": 0.1, "max_tokens": 1, "stop": "A", "reasoning_effort": "high", "logprobs": 1,
}  # fmt: skip

AMP_FIELDS: Final = [  # configuration, fields of the request, keywords, what they add to the body
    row({}, {}, {}, {}, id="nothing"),
    row({}, {"temperature": 0.0}, {}, {"temperature": 0.0}, id="temperature 0 is a value"),
    row({}, {"top_p": 0.5, "stop": ["X"]}, {}, {"top_p": 0.5, "stop": ["X"]}, id="top_p, stop"),
    row({}, {"max_output_tokens": 9}, {}, {"max_tokens": 9}, id="max_output_tokens"),
    row({}, {"model": MODEL}, {}, {}, id="model"),
    row({}, {"reasoning_effort": "low"}, {}, {"reasoning_effort": "low"}, id="reasoning_effort"),
    row({"reasoning": "low"}, {}, {}, {"reasoning_effort": "low"}, id="Microsoft's setting"),
    row({"reasoning": "low"}, {}, {"reasoning": "high"}, {"reasoning_effort": "high"}, id="as one"),
    row({}, AMP_OURS_ALONE, {}, {}, id="ours alone"),
    row({}, {}, AMP_OURS_ALONE, {}, id="ours as keywords"),
    row({}, {"top_k": 5, "seed": 1}, {}, {"top_k": 5, "seed": 1}, id="extras of the request"),
    row({}, {"logprobs": 2}, {}, {"logprobs": True, "top_logprobs": 2}, id="logprobs as an extra"),
    row({}, {"tools": [AMP_TOOL]}, {}, {"tools": [AMP_WIRE_TOOL]}, id="tools"),
    row({}, {}, {"tools": [AMP_FUNCTION]}, {"tools": [AMP_WIRE_TOOL]}, id="tools as dicts"),
    row({}, {}, {"tools": [AMP_WIRE_TOOL]}, {"tools": [AMP_WIRE_TOOL]}, id="tools as vLLM's"),
    row({}, {"tools": []}, {}, {}, id="an empty list of tools is a 400"),
    row({}, {"tools": [ToolSpec(**AMP_STRICT_TOOL)]}, {},
        {"tools": [{"type": "function", "function": AMP_STRICT_TOOL}]}, id="a tool's extras"),
    row({}, {"tools": [AMP_TOOL], "tool_choice": "required"}, {},
        {"tools": [AMP_WIRE_TOOL], "tool_choice": "required"}, id="tool_choice"),
    row({}, {"tool_choice": "auto"}, {}, {}, id="tool_choice without tools is a 400"),
    row({}, {"response_format": ResponseFormatText()}, {}, {}, id="format text"),
    row({}, {"response_format": ResponseFormatJson()}, {}, AMP_JSON, id="format json"),
    row({}, {}, AMP_JSON, AMP_JSON, id="format as vLLM's"),
    row({}, {"response_format": AMP_BARE}, {},
        amp_format(name="response", schema=AMP_SCHEMA, strict=True), id="json_schema, bare"),
    row({}, {"response_format": AMP_NAMED}, {}, amp_format(name="answer", schema=AMP_SCHEMA),
        id="json_schema, with its name around it"),
    row({}, {}, {"temperature": 0.5, "top_k": 3}, {"temperature": 0.5, "top_k": 3}, id="keywords"),
    row({}, {}, {"max_output_tokens": 4}, {"max_tokens": 4}, id="the kernel's name as a keyword"),
    row({}, {}, {"extended_thinking": True}, {}, id="thinking is the template's default"),
    row({}, {}, {"extended_thinking": False}, AMP_NO_THINKING, id="thinking is off"),
    row({}, {}, {"extended_thinking": "false"}, AMP_NO_THINKING, id="thinking is off, as text"),
    row({}, {"chat_template_kwargs": {"enable_thinking": True, "a": 1}},
        {"extended_thinking": False},
        {"chat_template_kwargs": {"thinking": False, "enable_thinking": True, "a": 1}},
        id="thinking off, but the template is told otherwise"),
    row(AMP_SETTINGS, {}, {}, AMP_SETTINGS | {"logprobs": True, "top_logprobs": 1}, id="settings"),
    row(AMP_SETTINGS,
        {"temperature": 0.2, "max_output_tokens": 2, "stop": ["B"], "reasoning_effort": "low"},
        {"temperature": 0.3, "logprobs": 3},
        {"temperature": 0.3, "max_tokens": 2, "stop": ["B"], "reasoning_effort": "low",
         "logprobs": True, "top_logprobs": 3}, id="configuration < request < keyword"),
    row({}, {"temperature": 0.2}, {"temperature": None}, {"temperature": 0.2}, id="None"),
    row({}, {"max_output_tokens": 10}, {"max_tokens": 5}, {"max_tokens": 5}, id="vLLM's name wins"),
    row({}, {"max_output_tokens": 10}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5},
        id="and the newer one too"),
    row({"extra_body": {"top_k": 9}}, {"top_k": 5}, {}, {"top_k": 9}, id="extra_body comes last"),
]  # fmt: skip


@table("config fields keywords added", *AMP_FIELDS)
async def test_amp_fields_as_the_server_gets_them(config, fields, keywords, added, server):
    host = await amp_mount(server, **config)
    response = await host.complete(amp_request(**fields), **keywords)
    assert amp_bodies(server) == [amp_wire(**added)]
    assert response.degradation is None


async def test_amp_model_of_the_call_is_sent_and_told(server):
    host = await amp_mount(server, amp_chat({"content": "A"}), amp_chat({"content": "B"}))
    await host.ask(model="of-the-request")
    await host.complete(amp_request(model="of-the-request"), model="of-the-keyword")
    models = ["of-the-request", "of-the-keyword"]
    assert [body["model"] for body in amp_bodies(server)] == models
    for name in ("llm:request", "llm:response"):
        assert [payload["model"] for payload in host.payloads(name)] == models


AMP_BUSY: Final = reply(503, "busy", {"Retry-After": "10"})


@table(
    "step path config fields keywords message",
    row(stall(), "completions", {"max_retries": 0}, {"timeout": 0.2}, {},
        "no reply within 0.2 s: ", id="timeout of the request"),
    row(stall(), "completions", {}, {}, {"deadline": 0.25}, "deadline of 0.25 s reached: ",
        id="deadline, told as it was given"),
    row(AMP_BUSY, "completions", {}, {}, {"deadline": 0.3},
        "the deadline leaves no time to try again: ", id="deadline, which counts retries"),
    row(stall(), "models", AMP_UNKNOWN, {}, {"deadline": 0.3}, "deadline of 0.3 s ",
        id="deadline, which counts auxiliary requests"),
    row(stall(), "tokenize", {"use_completions": True, "timeout": 0.2, "max_retries": 0}, {}, {},
        "no reply within 0.2 s: ", id="timeout, which counts rendering"),
)  # fmt: skip
async def test_amp_limits_of_time(step, path, config, fields, keywords, message, server):
    server.script(*[step] * 4, path=path)
    host = await amp_mount(server, **config)
    with at_once(IN_TIME):
        error = await host.fail("LLMTimeoutError", amp_request(**fields), **keywords)
    assert str(error).startswith(message)
    assert host.payloads("llm:response")[0]["duration_ms"] >= 190 or step == AMP_BUSY
    assert all({"timeout", "deadline"}.isdisjoint(body) for body in amp_bodies(server))
    await amp_is_quiet()


@table(
    "config keywords",
    row({}, {"prompt_logprobs": 1}, id="keyword"),
    row({}, {"extra_body": {"prompt_logprobs": 1}}, id="extra_body of the call"),
    row({"extra_body": {"prompt_logprobs": 1}}, {}, id="extra_body of the configuration"),
)
async def test_amp_what_vllm_does_not_stream_is_not_streamed(config, keywords, server):
    host = await amp_mount(server, **config)
    assert (await host.complete(**keywords)).text == AMP_HELLO
    [body] = amp_bodies(server)
    assert body == {"model": MODEL, "messages": [amp_user("Hello")], "prompt_logprobs": 1}
    assert "llm:stream_block_delta" in host.names()


@table("value", False, "false", True, "true")
async def test_amp_use_completions_is_also_a_keyword(value, server):
    is_used = str(value).lower() == "true"
    host = await amp_mount(server, use_completions=not is_used)
    await host.complete(use_completions=value)
    assert amp_paths(server)[-1] == ("/v1/completions" if is_used else "/v1/chat/completions")
    assert "use_completions" not in amp_bodies(server)[0]


# ---- Amplifier: options carried through a session ---------------------------


async def test_amp_request_options_nest_between_configuration_and_request(server):
    host = await amp_mount(server, temperature=0.1, seed=1)
    with request_options(temperature=0.2, top_p=0.2, max_output_tokens=2) as outer:
        await host.complete()
        await host.ask(top_p=0.3, max_output_tokens=3)
        await host.complete(amp_request(top_p=0.3, max_tokens=3), top_p=0.4)
        with request_options(top_p=0.5) as inner:
            await host.complete()
    await host.complete()
    names = ("temperature", "top_p", "max_tokens", "seed")
    sent = [tuple(body.get(name) for name in names) for body in amp_bodies(server)]
    assert sent[:3] == [(0.2, 0.2, 2, 1), (0.2, 0.3, 3, 1), (0.2, 0.4, 3, 1)]
    assert sent[3:] == [(0.2, 0.5, 2, 1), (0.1, None, None, 1)]
    assert [type(call) for call in outer] == [Completion] * 4
    assert inner == outer[3:]


@either_endpoint
async def test_amp_log_probabilities_reach_the_caller(use_completions, server):
    host = await amp_mount(server, use_completions=use_completions)
    with request_options(logprobs=2) as calls:
        response = await host.ask("What is 2+2?")
    [call] = calls
    text = "<think>\nTwo plus two equals four.\n</think>\n\n2 + 2 = 4<|im_end|>"
    assert "".join(token.token for token in call.logprobs) == text
    assert all(token.logprob is not None and len(token.top) == 2 for token in call.logprobs)
    assert (call.text, call.reasoning) == ("\n\n2 + 2 = 4", "\nTwo plus two equals four.\n")
    assert response.metadata is None  # what is there counts towards the context


class AmpLoop:
    """The smallest orchestrator: asks the provider, runs its calls, and asks again."""

    async def execute(self, prompt, context, providers, tools, hooks, **_: Any) -> str:
        await context.add_message(amp_user(prompt))
        [provider] = providers.values()
        specs = [ToolSpec(name=one.name, parameters=one.input_schema) for one in tools.values()]
        for _round in range(3):
            messages = await context.get_messages_for_request()
            response = await provider.complete(amp_request(*messages, tools=specs or None))
            calls = provider.parse_tool_calls(response)
            told = [{"id": one.id, "tool": one.name, "arguments": one.arguments} for one in calls]
            content = [block.model_dump() for block in response.content]
            await context.add_message(amp_reply(content, *told))
            for call in calls:
                result = await tools[call.name].execute(call.arguments)
                await context.add_message(amp_result(result, call.id))
            if not calls:
                return str(response.text)
        raise AssertionError("the model did not stop calling")


class AmpInjectingLoop(AmpLoop):
    """An orchestrator whose hooks inject system messages, as the default bundle's do."""

    async def execute(self, prompt: str, context: Any, **options: Any) -> str:
        if not context.messages:
            await context.add_message(amp_system("You are a parrot."))
            await context.add_message(amp_system("Be brief.", "developer"))
        answer = await super().execute(prompt, context, **options)
        await context.add_message(amp_system("The user is in Rome."))
        return answer


class AmpWeather:
    name, description, input_schema = "get_weather", "Get the weather of a city.", AMP_WEATHER

    async def execute(self, arguments: Mapping[str, Any]) -> str:
        return f"sunny in {arguments['city']}, 21 C"


@pytest.fixture
def amp_session(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a context manager with a real session; `instances`: configurations by name."""

    def add_module(kind: str, point: str, make: Callable[[], Any], **named: Any) -> None:
        async def mount_it(coordinator: Any, config: Any = None) -> None:
            await coordinator.mount(point, make(), **named)

        created = types.ModuleType(f"amplifier_module_{kind}_tiny")
        created.__dict__.update(mount=mount_it, __amplifier_module_type__=kind)
        monkeypatch.setitem(sys.modules, created.__name__, created)

    @contextlib.asynccontextmanager
    async def session_of(url: str, *tools: Any, loop: type = AmpLoop, **instances: Any) -> Any:
        add_module("context", "context", MockContextManager)
        add_module("orchestrator", "orchestrator", loop)
        for tool in tools:
            add_module("tool", "tools", tool, name=tool.name)
        providers = []
        for name, config in (instances or {"vllm": {}}).items():
            entry = {"module": "provider-vllm", "config": {"base_url": url, **config}}
            providers.append(entry if name == "vllm" else {**entry, "instance_id": name})
        modules = {name: {"module": f"{name}-tiny"} for name in ("orchestrator", "context")}
        plan = {"session": modules, "providers": providers}
        session = AmplifierSession({**plan, "tools": [{"module": "tool-tiny"} for _ in tools]})
        await session.initialize()
        try:
            yield session
        finally:
            await session.cleanup()
            # A process that ends right after its last call into the kernel can crash there.
            await asyncio.sleep(0.01)

    return session_of


async def test_amp_session_loads_it_finds_its_limits_and_answers(server, amp_session):
    async with amp_session(server.url) as session:
        [(name, provider)] = session.coordinator.get("providers").items()
        assert (name, type(provider)) == ("vllm", VLLMProvider)
        assert provider.get_model_info().context_window == MAX_MODEL_LEN
        assert await session.execute("What is 2+2?") == "\n\n2 + 2 = 4"
    assert amp_paths(server) == ["/v1/models", "/tokenize", "/v1/completions"]


@either_endpoint
async def test_amp_session_with_system_messages_on_a_strict_template(use_completions, amp_session):
    config = {"use_completions": use_completions}
    with StandIn(strict=True) as server, VLLMClient(server.url) as client:
        async with amp_session(server.url, loop=AmpInjectingLoop, vllm=config) as session:
            answers = [await session.execute("What is 2+2?") for _ in range(2)]
        first, second = amp_bodies(server, "tokenize" if use_completions else "completions")
        prompts = [client.tokenize(body["messages"]) for body in (first, second)]
    assert all(answers)
    system = amp_system("You are a parrot.\n\nBe brief.")
    assert first["messages"] == [system, amp_user("What is 2+2?")]
    late = f"{amp_reminder('The user is in Rome.')}\n\nWhat is 2+2?"
    assert second["messages"][-1] == amp_user(late)
    assert prompts[1][: len(prompts[0])] == prompts[0]  # so that the prefix cache is used


async def test_amp_session_with_several_instances(server, amp_session):
    with StandIn() as other:
        slow = {"base_url": other.url, "priority": 200, "temperature": 0.5, **AMP_CHAT}
        async with amp_session(server.url, fast={}, slow=slow) as session:
            for _ in range(2):
                await on_session_ready(session.coordinator)
            providers = session.coordinator.get("providers")
            priorities = {name: provider.priority for name, provider in providers.items()}
            assert priorities == {"fast": 100, "slow": 200}
            for provider in providers.values():
                assert (await provider.complete(amp_request())).finish_reason == "stop"
        assert amp_paths(server) == ["/v1/models", "/tokenize", "/v1/completions"]
        assert amp_paths(other) == ["/v1/models", "/v1/chat/completions"]
        bodies = amp_bodies(server) + amp_bodies(other)
        assert [body.get("temperature") for body in bodies] == [None, 0.5]


async def test_amp_session_runs_tools(server, amp_session):
    async with amp_session(server.url, AmpWeather) as session:
        answer = await session.execute("What is the weather in Paris and Rome?")
    assert answer.strip() == "It is sunny in Paris, 21 C."
    _, second = amp_bodies(server)
    asked, calls, *results = second["messages"]
    assert (asked["role"], calls["role"], len(calls["tool_calls"])) == ("user", "assistant", 2)
    assert calls["reasoning"].strip() == "Two calls."
    told = [(one["role"], one["content"], one["name"]) for one in results]
    assert told == [("tool", f"sunny in {city}, 21 C", "get_weather") for city in ("Paris", "Rome")]


async def test_amp_sessions_at_once_do_not_see_each_others_options(server, amp_session):
    meet = threading.Barrier(2)

    def together(connection: Connection) -> None:
        meet.wait(NEVER)
        server.answer(connection)

    async def run(session: AmplifierSession, count: int) -> list[Completion]:
        with request_options(logprobs=count) as calls:
            await session.execute(f"Say {count}")
        return calls

    server.script(together, together, path="/completions")
    contexts = [amp_session(server.url, vllm=AMP_CHAT) for _ in range(2)]
    async with contexts[0] as first, contexts[1] as second:
        [one], [three] = await asyncio.gather(run(first, 1), run(second, 3))
    sent = {body["messages"][0]["content"]: body["top_logprobs"] for body in amp_bodies(server)}
    assert sent == {"Say 1": 1, "Say 3": 3}
    assert [len(call.logprobs[0].top) for call in (one, three)] == [1, 3]


# ---- Amplifier: responses ---------------------------------------------------


async def test_amp_response_of_text_and_thinking(server):
    details = {"prompt_tokens_details": {"cached_tokens": 3}}
    details["completion_tokens_details"] = {"reasoning_tokens": 2}
    deltas = [{"reasoning": "Two"}, {"reasoning": " four."}, {"content": "4"}, {"content": "!"}]
    last = amp_choice({}, finish_reason="stop")
    host = await amp_mount(server, sse(*map(amp_choice, deltas), last, amp_usage(**details)))
    usage = {"input_tokens": 5, "output_tokens": 7, "reasoning_tokens": 2, "cache_read_tokens": 3}
    assert await host.complete() == ChatResponse(
        content=[ThinkingBlock(thinking="Two four."), TextBlock(text="4!")],
        usage=KernelUsage(total_tokens=12, **usage),
        finish_reason="stop",
        content_blocks=[ThinkingContent(text="Two four."), TextContent(text="4!")],
        text="4!",
    )
    assert host.payloads("llm:response")[0]["usage"] == {**usage, "cost_usd": None}


async def test_amp_response_of_tool_calls(server):
    deltas = [amp_call('{"city": "Paris"}'), amp_call("{}", "list_cities", "call_2", 1)]
    host = await amp_mount(server, amp_chat({"content": "Wait."}, *deltas))
    response = await host.ask(tools=[AMP_TOOL])
    calls = [("call_1", "get_weather", AMP_PARIS), ("call_2", "list_cities", {})]
    blocks = [ToolCallBlock(id=one, name=name, input=data) for one, name, data in calls]
    shown = [ToolCallContent(id=one, name=name, arguments=data) for one, name, data in calls]
    assert response == ChatResponse(
        content=[TextBlock(text="Wait."), *blocks],
        tool_calls=[KernelToolCall(id=one, name=name, arguments=data) for one, name, data in calls],
        usage=KernelUsage(input_tokens=5, output_tokens=7, total_tokens=12),
        finish_reason="tool_calls",  # the server said stop
        content_blocks=[TextContent(text="Wait."), *shown],
        text="Wait.",
    )
    assert host.provider.parse_tool_calls(response) == response.tool_calls


@table(
    "raw content finish",
    row(amp_chat(), [TextBlock(text="")], "stop", id="no output is an empty text"),
    row(amp_chat({"content": "A"}, finish="length"), [TextBlock(text="A")], "length", id="cut"),
    row(sse(amp_choice({"content": "A"})), [TextBlock(text="A")], "stop",
        id="no finish reason, no usage"),
    row(amp_chat({"reasoning_content": "Hm."}),
        [ThinkingBlock(thinking="Hm."), TextBlock(text="")], "stop", id="thinking alone"),
)  # fmt: skip
async def test_amp_content_is_never_empty_and_always_finished(raw, content, finish, server):
    host = await amp_mount(server, raw)
    response = await host.complete()
    assert (response.content, response.finish_reason) == (content, finish)
    assert len(response.content_blocks) == len(content)
    counts = [getattr(response.usage, f"{name}_tokens") for name in ("input", "output", "total")]
    assert counts in ([5, 7, 12], [0, 0, 0])
    assert host.provider.parse_tool_calls(response) == []


async def test_amp_calls_without_an_id_get_different_ones(server):
    deltas = [amp_call(f'{{"a": {place}}}', call_id="", index=place) for place in (0, 1)]
    host = await amp_mount(server, amp_chat(*deltas))
    response = await host.ask(tools=[AMP_TOOL])
    assert host.names().count("llm:stream_block_start") == 2
    ids = [call.id for call in response.tool_calls]
    assert len({*ids, ""}) == 3
    assert [block.id for block in response.content] == ids


async def test_amp_only_the_first_choice_is_shown(server):
    host = await amp_mount(server)
    with request_options() as calls:
        response = await host.complete(n=2)
    deltas = host.payloads("llm:stream_block_delta")
    shown = [one["text"] for one in deltas if one["block_type"] == "text"]
    assert "".join(shown) == response.text == AMP_HELLO
    assert texts_of(calls[0].choices) == [AMP_HELLO] * 2


AMP_USAGE: Final = {"input_tokens": 5, "output_tokens": 7, "cost_usd": None}
AMP_TWICE_USAGE: Final = {"input_tokens": 10, "output_tokens": 14, "cost_usd": None}
AMP_NO_USAGE: Final = {"input_tokens": 0, "output_tokens": 0, "cost_usd": None}


@table(
    "arguments reason",
    row('{"city": "Par', "Unterminated string starting at: line 1 column 10 (char 9)", id="cut"),
    row('["Paris"]', "a list is not an object", id="a list"),
    row("", "Expecting value: line 1 column 1 (char 0)", id="nothing at all"),
    row('{"city": NaN}', "NaN is not JSON", id="not JSON, and more than events can hold"),
)
async def test_amp_malformed_call_is_asked_for_again(arguments, reason, server):
    malformed = amp_call(arguments, call_id="call_2", index=1)
    first = amp_chat({"content": "Wait."}, amp_call('{"city": "Rome"}'), malformed)
    second = amp_chat(amp_call('{"city": "Paris"}'))
    host = await amp_mount(server, first, second, raw=True, debug=True)
    response = await host.ask(tools=[AMP_TOOL])
    assert [call.arguments for call in response.tool_calls] == [AMP_PARIS]

    written = f'Wait.\nget_weather({{"city": "Rome"}})\nget_weather({arguments})'
    problem = f"No tool was run: {reason}. Call again; arguments are one JSON object."
    correction = [amp_reply(written), amp_user(amp_reminder(problem))]
    assert amp_bodies(server) == [
        amp_wire(tools=[AMP_WIRE_TOOL]),
        amp_wire(amp_user("Hello"), *correction, tools=[AMP_WIRE_TOOL]),
    ]
    [retry], [result] = host.payloads("provider:retry"), host.payloads("llm:response")
    assert [retry[name] for name in ("attempt", "delay")] == [1, 0.0]
    ids = [request.headers["X-Request-Id"] for request in server.requests]
    assert ids == [f"{retry['request_id']}-{number}" for number in (1, 2)]
    assert host.names().count("llm:stream_aborted") == 1
    debug = [name for name in host.names() if name.endswith(":debug")]
    assert debug == [*["llm:request:debug"] * 2, *["llm:response:debug"] * 2]

    assert (result["status"], result["retries"]) == ("ok", 1)
    assert result["usage"] == AMP_TWICE_USAGE
    assert result["raw"]["choices"][0]["tool_calls"][0]["arguments"] == '{"city": "Paris"}'
    [failed] = result["failed_replies"]
    assert failed["raw"]["choices"][0].pop("tool_calls")[1]["arguments"] == arguments
    reason = {"type": "InvalidToolCallError", "msg": retry["error_message"]}
    assert failed == {**reason, "usage": AMP_USAGE, "raw": failed["raw"]}


@table(
    "reasons config",
    row(["tool_calls", "tool_calls"], {}, id="malformed again"),
    row(["length"], {}, id="cut by max_tokens"),
    row(["tool_calls"], {"max_tokens": 7}, id="cut, which vLLM up to 0.30 does not say"),
    row(["tool_calls"], {"extra_body": {"max_completion_tokens": 7}, "max_tokens": 99},
        id="cut by the newer name, which wins"),
    row(["tool_calls"], {"max_retries": 0}, id="no retries"),
    row(["tool_calls", "tool_calls"], {"max_tokens": 8}, id="not cut, malformed again"),
)  # fmt: skip
async def test_amp_malformed_call_is_never_executed(reasons, config, server):
    replies = [amp_chat({"content": "A"}, amp_call('{"ci'), finish=reason) for reason in reasons]
    host = await amp_mount(server, *replies, raw=True, raw_debug=True, **config)
    error = await host.fail("InvalidToolCallError", amp_request(tools=[AMP_TOOL]))
    assert (error.tool_name, error.raw_arguments) == ("get_weather", '{"ci')
    assert (error.retryable, error.model) == (False, MODEL)
    count = len(amp_bodies(server))
    assert count == len(reasons)

    reason = {"type": "InvalidToolCallError", "msg": str(error)}
    assert host.payloads("llm:stream_aborted")[-1]["error"] == reason
    name, result = host.events[-1]
    assert (name, result["error_type"], result["error"]) == ("llm:response", *reason.values())
    assert (result["finish_reason"], result["retries"]) == (reasons[-1], count - 1)
    assert result["usage"] == (AMP_USAGE if count == 1 else AMP_TWICE_USAGE)
    raws = [payload["response"] for payload in host.payloads("llm:response:raw")]
    assert [failed["raw"] for failed in result["failed_replies"]] == raws
    assert [raw["choices"][0]["tool_calls"][0]["arguments"] for raw in raws] == ['{"ci'] * count


AMP_POINT: Final = {"type": "object", "properties": {"x": {"type": "array"}}}
AMP_ITEMS: Final = {"list": {"type": "array", "items": {"type": "object"}}}
AMP_NESTED: Final = {"$defs": {"Point": AMP_POINT}, "properties": {
    "object": {"type": "object", "properties": AMP_ITEMS},
    "list": {"type": ["array", "null"]},
    "point": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
    "text": {"type": "string"},
    "either": {"anyOf": [{"type": "object"}, {"type": "string"}]},
    "any": {},
}}  # fmt: skip


@table(
    "written parsed",
    row({"object": '{"a": 1}'}, {"object": {"a": 1}}, id="an object"),
    row({"list": "[1]"}, {"list": [1]}, id="a list"),
    row({"object": '{"a": "[1]"}'}, {"object": {"a": "[1]"}}, id="no deeper than the schema"),
    row({"object": '{"list": "[\\"{}\\", {}]"}'}, {"object": {"list": [{}, {}]}},
        id="as deep as the schema"),
    row({"point": '{"x": "[1]"}'}, {"point": {"x": [1]}}, id="a reference"),
    *[row(same, same, id=name) for name, same in {
        "a string": {"text": "[1]"},
        "a string or an object": {"either": "{}"},
        "no type": {"any": "[1]", "other": "[1]"},
        "another type": {"object": "[1]", "list": "null"},
        "does not parse": {"object": '{"a": ', "list": "[NaN]"},
      }.items()],
)  # fmt: skip
async def test_amp_strings_in_arguments_are_parsed_where_the_schema_says(written, parsed, server):
    host = await amp_mount(server, amp_chat(amp_call(json.dumps(written), "f")))
    response = await host.ask(tools=[ToolSpec(name="f", parameters=AMP_NESTED)])
    assert [call.arguments for call in response.tool_calls] == [parsed]
    assert [block.input for block in response.content] == [parsed]


@table("n", 1, 2)
async def test_amp_gpt_oss_call_that_the_server_dropped_is_an_error(n, server):
    last = {"finish_reason": "stop", "stop_reason": 200012}
    dropped = amp_choice({"reasoning": "I need it."}, index=n - 1, **last)
    host = await amp_mount(server, *[sse(amp_choice({"reasoning": "Hm."}), dropped)] * 2)
    error = await host.fail("InvalidRequestError", amp_request(tools=[AMP_TOOL]), n=n)
    assert str(error) == (
        "gpt-oss called a tool and the server dropped the call; start vLLM with"
        " --enable-auto-tool-choice --tool-call-parser openai"
    )
    assert (await host.complete(n=n)).finish_reason == "stop"  # no tools were offered


# ---- Amplifier: events ------------------------------------------------------


AMP_NAMES: Final = {"provider": "vllm", "model": MODEL, "request_id": "ID"}
AMP_REQUEST: Final = ("llm:request", {**AMP_NAMES, "message_count": 1})


def amp_response_event(**more: Any) -> tuple[str, dict[str, Any]]:
    result = {"status": "ok", "retries": 0, "finish_reason": "stop"}
    return "llm:response", {**AMP_NAMES, **result, "usage": AMP_USAGE, **more}


def amp_failed_event(error_type: str, error: str = "MESSAGE") -> tuple[str, dict[str, Any]]:
    failure = {"status": "error", "usage": AMP_NO_USAGE, "finish_reason": None}
    return amp_response_event(**failure, error_type=error_type, error=error)


def amp_retry_event(error_type: str, attempt: int = 1) -> tuple[str, dict[str, Any]]:
    names = {"provider": "vllm", "request_id": "ID", "max_retries": 6, "attempt": attempt}
    return "provider:retry", {**names, "error_type": error_type, "error_message": "MESSAGE"}


def amp_aborted_event(error_type: str, message: str = "MESSAGE") -> tuple[str, dict[str, Any]]:
    error = {"type": error_type, "msg": message}
    return "llm:stream_aborted", {"request_id": "ID", "error": error}


def amp_shown(index: int, kind: str, text: str = "", **named: str) -> list[Any]:
    """Return the events of a block, its deltas joined."""
    names = {"request_id": "ID", "block_index": index, "block_type": kind}
    events = [("llm:stream_block_start", {**names, **named})]
    if text:
        events.append(("llm:stream_block_delta", {**names, "text": text}))
    return [*events, ("llm:stream_block_end", names)]


AMP_NO: Final = error_payload("No.")

AMP_TRACES: Final = [  # replies, the error's name, the events
    row([amp_chat({"reasoning": "Two"}, {"reasoning": " calls."}, {"content": "Wait"},
                  {"content": "."}, amp_call('{"city": '), amp_call_rest('"Paris"}'),
                  amp_call("{}", "add", "call_2", 1), {"content": "Done."})], None,
        [AMP_REQUEST,
         *amp_shown(0, "thinking", "Two calls."),
         *amp_shown(1, "text", "Wait."),
         *amp_shown(2, "tool_use", name="get_weather"),
         *amp_shown(3, "tool_use", name="add"),
         *amp_shown(4, "text", "Done."),
         amp_response_event(finish_reason="tool_calls")], id="success"),
    row([reply(400, AMP_NO)], "InvalidRequestError",
        [AMP_REQUEST, amp_failed_event("InvalidRequestError")],
        id="error without output"),
    row([sse(amp_choice({"content": "A"}), amp_choice({"content": "B"}), AMP_NO)],
        "InvalidRequestError",
        [AMP_REQUEST,
         *amp_shown(0, "text", "AB"),
         amp_aborted_event("InvalidRequestError"),
         amp_failed_event("InvalidRequestError")], id="error after output"),
    row([reply(503, "busy"), reply(503, "busy"), amp_chat({"content": "A"})], None,
        [AMP_REQUEST,
         amp_retry_event("ProviderUnavailableError"),
         amp_retry_event("ProviderUnavailableError", 2),
         *amp_shown(0, "text", "A"),
         amp_response_event(retries=2)], id="retry before output"),
    row([amp_cut({"reasoning": "Hm"}, {"content": "Fir"}), amp_chat({"content": "Second"})], None,
        [AMP_REQUEST,
         *amp_shown(0, "thinking", "Hm"),
         *amp_shown(1, "text", "Fir"),
         amp_aborted_event("StreamError"),
         amp_retry_event("StreamError"),
         *amp_shown(0, "text", "Second"),
         amp_response_event(retries=1)], id="retry after output"),
]  # fmt: skip


@table("steps kind events", *AMP_TRACES)
async def test_amp_events(steps, kind, events, server):
    host = await amp_mount(server, *steps, max_retry_delay=0.02)
    if kind is None:
        await host.complete()
        messages = {retry["error_message"] for retry in host.payloads("provider:retry")}
    else:
        messages = {str(await host.fail(kind))}
    told = json.dumps(host.told())
    for message in messages:
        told = told.replace(json.dumps(message), '"MESSAGE"')
    assert json.loads(told) == json.loads(json.dumps(events))
    assert all(0 < retry["delay"] <= 0.02 for retry in host.payloads("provider:retry"))
    request_id = host.payloads("llm:request")[0]["request_id"]
    sent = [request.headers["X-Request-Id"] for request in server.requests]
    assert sent == [f"{request_id}-{attempt + 1}" for attempt in range(len(steps))]


@table(
    "raw config kind",
    row(reply(429, "slow", {"Retry-After": "31"}), {}, "RateLimitError", id="a long Retry-After"),
    row(reply(503, "busy"), {"max_retries": 0}, "ProviderUnavailableError", id="no retries"),
    row(reply(400, "no"), {"use_streaming": False}, "InvalidRequestError", id="no stream events"),
)
async def test_amp_does_not_retry(raw, config, kind, server):
    host = await amp_mount(server, raw, **config)
    await host.fail(kind)
    assert len(server.requests) == 1
    assert host.names() == ["llm:request", "llm:response"]


async def test_amp_patience_is_six_retries_over_half_a_minute(server):
    minimum = VLLMConfig("http://a").min_retry_delay
    host = await amp_mount(server, *[reply(503, "busy")] * 7, min_retry_delay=minimum / 500)
    await host.fail("ProviderUnavailableError")
    retries = host.payloads("provider:retry")
    assert [retry["attempt"] for retry in retries] == [1, 2, 3, 4, 5, 6]
    longest = [minimum * 2**number for number in range(6)]
    assert sum(longest) == 31.5
    for retry, most in zip(retries, longest, strict=True):
        assert most * 0.49 < retry["delay"] * 500 <= most
    assert host.payloads("llm:response")[0]["retries"] == 6


async def test_amp_callers_own_request_id_goes_unchanged(server):
    host = await amp_mount(server, reply(503, "busy"), max_retry_delay=0.01)
    await host.complete(request_id="mine")
    assert [request.headers["X-Request-Id"] for request in server.requests] == ["mine", "mine"]
    assert {payload["request_id"] for _, payload in host.events} == {"mine"}


AMP_BLOCKS: Final = [  # deltas, and the blocks they make
    row([{"reasoning": "R"}, {"content": "A"}, amp_call("{}"), {"content": "B"}],
        ["thinking R", "text A", "tool_call call_1", "text B"], id="text after a call"),
    row([amp_call("{", call_id="a"), {"content": "A"}, amp_call("{", call_id="b", index=1),
         amp_call_rest("}"), amp_call_rest("}", 1)],
        ["tool_call a", "text A", "tool_call b"], id="pieces of two calls in turn"),
    row([amp_call("{"), {"content": "A"}, amp_call_rest("}"), {"content": "B"}],
        ["tool_call call_1", "text AB"], id="text between the pieces of a call"),
    row([amp_call("{", call_id=""), amp_call("}", call_id="a"), {"content": "A"}],
        ["tool_call a", "text A"], id="an id that comes late"),
    row([{"reasoning": "R"}, {"content": "A"}, {"reasoning": "S"}, {"reasoning": "T"},
         {"content": "B"}],
        ["thinking R", "text A", "thinking ST", "text B"], id="thinking twice"),
    row([{"content": "A", "reasoning": "R", **amp_call("{}")}],
        ["thinking R", "text A", "tool_call call_1"], id="all in one delta"),
]  # fmt: skip


@table("is_shown", row(True, id="shown"), row(False, id="not shown"))
@table("deltas expected", *AMP_BLOCKS)
async def test_amp_blocks_streamed_are_the_blocks_returned(deltas, expected, is_shown, server):
    host = await amp_mount(server, amp_chat(*deltas), use_streaming=is_shown)
    response = await host.ask(tools=[AMP_TOOL])
    blocks = [block.model_dump() for block in response.content]
    kinds = [block["type"] for block in blocks]
    texts = [block.get("text") or block.get("thinking") or block["id"] for block in blocks]
    assert [" ".join(pair) for pair in zip(kinds, texts, strict=True)] == expected
    assert [block.type.value for block in response.content_blocks] == kinds
    if is_shown:
        streamed = [""] * len(expected)
        for payload in host.payloads("llm:stream_block_delta"):
            streamed[payload["block_index"]] += payload["text"]
        assert [one or text for one, text in zip(streamed, texts, strict=True)] == texts
        starts = [payload["block_type"] for payload in host.payloads("llm:stream_block_start")]
        assert [kind.replace("use", "call") for kind in starts] == kinds
        assert len(host.payloads("llm:stream_block_end")) == len(expected)


@table(
    "config metadata has_deltas",
    row({}, None, True, id="on"),
    row({}, {"stream": False}, False, id="off for this call"),
    row({}, {"stream": 0}, True, id="0 is not False"),
    row({"use_streaming": False}, None, False, id="off for all"),
    row({"use_streaming": "false"}, {"stream": True}, False, id="off, whatever the call says"),
)
@table("is_keyword", row(False, id="in the request"), row(True, id="as a keyword"))
async def test_amp_stream_events_can_be_off(config, metadata, has_deltas, is_keyword, server):
    host = await amp_mount(server, use_completions=True, **config)
    request = amp_request(metadata=None if is_keyword else metadata)
    response = await host.complete(request, **({"metadata": metadata} if is_keyword else {}))
    assert response.text == AMP_HELLO
    assert any(name.startswith("llm:stream") for name in host.names()) is has_deltas
    assert (host.names()[0], host.names()[-1]) == ("llm:request", "llm:response")
    [body] = amp_bodies(server)
    assert body["stream"] is True  # on the wire always, to be stoppable


@table("event", *(name for name in AMP_EVENTS if "repaired" not in name))
async def test_amp_hook_that_raises_fails_nothing(event, server):
    replies = [amp_cut({"content": "A"}), amp_chat({"content": "B"})]
    host = await amp_mount(server, *replies, max_retry_delay=0.01, debug=True, raw_debug=True)

    async def fail(name: str, payload: Any) -> None:
        raise RuntimeError("a hook of somebody else's")

    host.hook(event, fail)
    assert (await host.complete()).text == "B"
    assert event in host.names()


async def test_amp_slow_hook_merges_deltas_and_never_slows_the_server(server):
    has_sent, text = threading.Event(), "x" * 65_536

    def send(connection: Connection) -> None:
        connection.send(SSE_HEAD + chunk(amp_choice({"content": "first "})))
        for _ in range(256):  # 16 MiB: far more than sockets hold
            connection.send(chunk(amp_choice({"content": text})))
        connection.send(chunk(amp_choice({}, finish_reason="stop")) + chunk("[DONE]") + LAST_CHUNK)
        has_sent.set()

    host = await amp_mount(server, send)

    async def wait(name: str, payload: Any) -> None:
        assert await asyncio.to_thread(has_sent.wait, NEVER)

    host.hook("llm:stream_block_delta", wait)
    response = await host.complete()
    assert has_sent.is_set()
    texts = [payload["text"] for payload in host.payloads("llm:stream_block_delta")]
    assert "".join(texts) == response.text == "first " + text * 256
    # What had come, then what came meanwhile: not the 257 pieces one by one.
    assert 2 <= len(texts) < 20


@table(
    "config end length",
    row({}, None, 0, id="none"),
    row({"raw": True}, None, 0, id="raw"),
    row({"raw_debug": True}, "raw", 0, id="raw_debug"),
    row({"debug": True}, "debug", 180, id="debug"),
    row({"debug": True, "debug_truncate_length": 10}, "debug", 10, id="debug_truncate_length"),
)
async def test_amp_debug_events(config, end, length):
    words, headers = "Say " + 400 * "a", {"X-Other": SECRET}
    with StandIn(api_key=SECRET) as server:
        host = await amp_mount(server, api_key=SECRET, default_headers=headers, **config)
        response = await host.ask(words)
    told = dict(host.told())
    assert SECRET not in json.dumps(told)
    names = [f"llm:request:{end}", f"llm:response:{end}"] if end else []
    assert [name for name in told if name.endswith((":debug", ":raw"))] == names

    bodies = [payload["raw"] for payload in told.values() if "raw" in payload]
    for name, kind in zip(names, ("request", "response"), strict=False):
        bodies.append(told[name].pop(kind))
        assert told[name] == {"provider": "vllm", "request_id": "ID"}
    assert len(bodies) == (2 if config else 0)
    if length:
        cut = bodies[0]["messages"][0].pop("content")
        assert bodies[0] == amp_wire({"role": "user"})
        assert cut.startswith(words[:length])
        assert words[: length + 1] not in json.dumps([cut, bodies])
    elif config:
        assert bodies[0] == amp_wire(amp_user(words))
        assert response.text in json.dumps(bodies[1]).replace("\\n", "\n")


@table("keywords", row({}, id="streamed"), row({"prompt_logprobs": 1}, id="whole"))
async def test_amp_log_probabilities_survive_redaction_and_json(keywords, server):
    logprobs = {"content": [{"token": "4", "logprob": -9999.0, "bytes": [52], "top_logprobs": []}]}
    message = {"role": "assistant", "content": "4"}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "stop"}
    whole = reply(200, {"id": "1", "model": MODEL, "choices": [choice]})
    streamed = sse(amp_choice({"content": "4"}, logprobs=logprobs))
    answer = whole if keywords else streamed
    host = await amp_mount(server, answer, raw=True, debug=True, raw_debug=True)
    with request_options(logprobs=1) as calls:
        await host.complete(**keywords)
    assert calls[0].logprobs[0].logprob == -math.inf
    names = {name for name in host.names() if "stream_block" not in name}
    pairs = itertools.product(("request", "response"), ("", ":debug", ":raw"))
    assert names == {f"llm:{kind}{end}" for kind, end in pairs}
    raws = host.payloads("llm:response:raw") + host.payloads("llm:response")
    assert "-9999.0" in json.dumps(raws, allow_nan=False)
    keys = re.findall(r'"(\w+)":', json.dumps(host.events).lower())
    hidden = {"token", "api_key", "authorization", "secret", "password"}
    assert hidden.isdisjoint(keys)  # these a redaction hook blanks


@table(
    "message",
    row({"message": f"Incorrect API key provided: {SECRET}."}, id="quoted by a gateway"),
    row("Unauthorized", id="vLLM's own"),
)
async def test_amp_no_key_in_errors(message, server, caplog):
    caplog.set_level(logging.DEBUG)
    debug = {"raw": True, "debug": True, "raw_debug": True}
    host = await amp_mount(server, reply(401, {"error": message}), api_key=SECRET, **debug)
    error = await host.fail("AuthenticationError")
    assert server.requests[0].headers["Authorization"] == f"Bearer {SECRET}"
    shown = f"{host.events}{error!r}{error}{host.provider.config}{caplog.text}"
    assert SECRET not in shown


# ---- Amplifier: errors ------------------------------------------------------


def amp_error(status: int, message: str = "No.", **headers: str) -> bytes:
    return reply(status, error_payload(message, status), headers)


AMP_OVERFLOW: Final = (
    "This model's maximum context length is 2048 tokens. However, your prompt contains at least"
    " 2049 input tokens, which exceeds this limit even without any output tokens. …"
)
AMP_FILTERED: Final = "The response was filtered due to Azure OpenAI's content management policy."
AMP_DOWN: Final = "ProviderUnavailableError"
AMP_WAIT: Final = {"retry-after": "7"}


@table(
    "step kind status retryable retry_after",
    row(amp_error(400), "InvalidRequestError", 400, False, None, id="400"),
    row(amp_error(401), "AuthenticationError", 401, False, None, id="401"),
    row(amp_error(403), "AccessDeniedError", 403, False, None, id="403"),
    row(amp_error(404), "NotFoundError", 404, False, None, id="404"),
    row(amp_error(418), "LLMError", 418, False, None, id="StatusError has no name there"),
    row(amp_error(429, **AMP_WAIT), "RateLimitError", 429, True, 7.0, id="429"),
    row(amp_error(500), AMP_DOWN, 500, True, None, id="500"),
    row(amp_error(501), AMP_DOWN, 501, False, None, id="501"),
    row(amp_error(503, **AMP_WAIT), AMP_DOWN, 503, True, 7.0, id="503"),
    row(amp_error(400, AMP_OVERFLOW), "ContextLengthError", 400, False, None, id="does not fit"),
    row(amp_error(400, AMP_FILTERED), "ContentFilterError", 400, False, None, id="filtered"),
    row(amp_error(400, "content_filter"), "ContentFilterError", 400, False, None, id="or so"),
    row(amp_error(500, AMP_FILTERED), AMP_DOWN, 500, True, None, id="not a 400"),
    row(reply(404, "<html>The service is starting"), AMP_DOWN, 404, True, None, id="it starts"),
    row(reply(425, "<html>Model is warming up"), AMP_DOWN, 425, True, None, id="it warms up"),
    row(reply(403, "<title>Wait</title>Cloudflare"), AMP_DOWN, 403, True, None, id="a check"),
    row(reply(200, "<html>"), "LLMError", None, False, None, id="ProtocolError has no name there"),
    row(amp_cut({"content": "A"}), "StreamError", None, True, None, id="broken off"),
    row(sse(AMP_NO), "InvalidRequestError", 400, False, None, id="in a stream"),
    row(Connection.close, "NetworkError", None, True, None, id="closed before a reply"),
    row(stall(), "LLMTimeoutError", None, True, None, id="silent"),
)  # fmt: skip
async def test_amp_errors_are_the_kernels(step, kind, status, retryable, retry_after, server):
    timeout = 0.2 if kind == "LLMTimeoutError" else 60
    host = await amp_mount(server, step, max_retries=0, timeout=timeout)
    error = await host.fail(kind)
    assert (error.status_code, error.retryable) == (status, retryable)
    assert (error.retry_after, error.model) == (retry_after, MODEL)
    assert isinstance(error.__cause__, VLLMError)
    assert str(error) == str(error.__cause__) != ""
    assert not isinstance(error, OSError)
    if kind == "StreamError":
        assert error.__cause__.partial.text == "A"
    failed = host.payloads("llm:response")[0]
    assert (failed["status"], failed["error"]) == ("error", str(error))


@table("key", row("token", id="a word"), row("2", id="a digit"))
async def test_amp_short_key_does_not_garble_what_the_server_says(key, server):
    host = await amp_mount(server, amp_error(400, AMP_OVERFLOW), api_key=key)
    error = await host.fail("ContextLengthError")
    assert (error.__cause__.limit, error.__cause__.input_tokens) == (2048, 2049)


AMP_STRICT_FORMAT: Final = {"prompt_format": "chat_template", "use_completions": True}


@table(
    "config fields keywords message",
    row({}, {"temperature": math.nan}, {}, "the request is not JSON, in 'temperature': ", id="NaN"),
    row({}, {}, {"hook": print}, "the request is not JSON, in 'hook': ", id="not JSON"),
    row({}, {}, {"user": "\ud83d"}, "the request holds a lone surrogate", id="a lone surrogate"),
    row({}, {}, {"use_completions": "perhaps"}, "use_completions must be true or false",
        id="a setting"),
    row({}, {}, {"timeout": "soon"}, "timeout must be a positive number of seconds, got 'soon'",
        id="a limit"),
    row(AMP_STRICT_FORMAT, {"tools": [AMP_TOOL]}, {},
        "prompt_format chat_template cannot render this: tools", id="never another endpoint"),
)  # fmt: skip
async def test_amp_call_that_cannot_work(config, fields, keywords, message, server):
    host = await amp_mount(server, **config)
    error = await host.fail("ConfigurationError", amp_request(**fields), **keywords)
    assert str(error).startswith(message)
    assert (error.retryable, error.model) == (False, MODEL)
    assert server.requests == []
    assert host.names() == ["llm:request", "llm:response"]


def test_amp_every_error_of_ours_has_one_of_the_kernels():
    ours = {name for name in vllm_provider.__all__ if name.endswith("Error")}
    nameless = {"InvalidOutputError", "ProtocolError", "StatusError", "VLLMError"}
    assert ours - {*dir(llm_errors)} == nameless


# ---- Amplifier: cancellation ------------------------------------------------

AMP_A: Final = {"content": "A"}
AMP_ENDS: Final = (asyncio.CancelledError, llm_errors.AbortError)
cancelled_by = table("by kind", *zip(("task", "session"), AMP_ENDS, strict=True))


@cancelled_by
@table(
    "step path event gone config",
    row(stall(), "completions", None, 1, {}, id="before headers"),
    row(stall(SSE_HEAD), "completions", None, 1, {}, id="after headers"),
    row(amp_stall(AMP_A), "completions", "llm:stream_block_delta", 1, {}, id="mid-stream"),
    row(AMP_BUSY, "completions", "provider:retry", 0, {}, id="pause before a retry"),
    row(stall(), "tokenize", None, 1, {"use_completions": True}, id="while the prompt is rendered"),
    row(stall(), "models", None, 1, {"default_model": None}, id="while the model is looked up"),
    row(stall(), "models", None, 1, AMP_UNKNOWN, id="while both are looked up"),
    row(stall(), "models", None, 1, {"context_window": None}, id="while the limits are looked up"),
)  # fmt: skip
async def test_amp_cancellation_stops_everything(step, path, event, gone, config, by, kind, server):
    server.script(step, path=path)
    host = await amp_mount(server, **config)
    call = host.start()
    await amp_until(lambda: server.requests and (event is None or event in host.names()))
    assert server.requests[-1].path.endswith(path)
    host.cancel(call, by)
    with at_once(IN_TIME), pytest.raises(kind) as info:
        await call
    if by == "session":
        model = config.get("default_model", MODEL)
        assert (info.value.provider, info.value.model) == ("vllm", model)
    await amp_is_quiet(server, gone)
    assert (host.names().count("llm:request"), host.names().count("llm:response")) == (1, 1)
    name, last = host.events[-1]
    assert (name, last["status"], bool(last["error"])) == ("llm:response", "error", True)
    assert (last["error_type"], last["usage"]) == (kind.__name__, AMP_NO_USAGE)
    assert ("llm:stream_aborted" in host.names()) is ("llm:stream_block_delta" in host.names())


@table("is_slow", row(False, id="hooks are done"), row(True, id="one hook still has the delta"))
async def test_amp_events_of_a_cancelled_call(is_slow, server):
    host = await amp_mount(server, amp_stall(AMP_A))
    if is_slow:
        host.hook("llm:stream_block_delta", lambda *_: asyncio.sleep(NEVER), priority=2)
    call = host.start()
    await host.until("llm:stream_block_delta")
    call.cancel()
    with at_once(IN_TIME), pytest.raises(asyncio.CancelledError):
        await call
    assert host.told() == [
        AMP_REQUEST,
        *amp_shown(0, "text", "A"),
        amp_aborted_event("CancelledError", "cancelled"),
        amp_failed_event("CancelledError", "cancelled"),
    ]
    await amp_is_quiet(server, gone=1)


@cancelled_by
async def test_amp_cancellation_while_waiting_for_a_place(by, kind, server):
    host = await amp_mount(server, stall(), max_concurrency=1)
    first = host.start()
    await amp_until(lambda: server.requests)
    second = host.start()
    await host.until("llm:request", 2)
    with at_once(IN_TIME):
        host.cancel(second, by)
        if by == "task":
            await asyncio.wait({second})
            assert not first.done()
            first.cancel()
        results = await asyncio.gather(first, second, return_exceptions=True)
    assert [type(result) for result in results] == [kind] * 2
    assert host.names()[2:] == ["llm:response"] * 2
    starts, ends = host.payloads("llm:request"), host.payloads("llm:response")
    assert {one["request_id"] for one in starts} == {one["request_id"] for one in ends}
    await amp_is_quiet(server, gone=1)
    assert len(server.requests) == 1


@either_cancel
@table("is_endless", row(False, id="a while"), row(True, id="for ever"))
@table("event", "llm:response", "llm:stream_block_end", "llm:stream_block_delta")
async def test_amp_answer_that_is_whole_is_returned(event, is_endless, by, server, monkeypatch):
    monkeypatch.setattr(vllm_provider, "HOOK_GRACE_S", 0.2 if is_endless else NEVER)
    host = await amp_mount(server, amp_chat(AMP_A))
    is_in_hook, release = host.hold(event)
    with request_options() as replies:
        call = host.start()
    await is_in_hook.wait()
    await amp_until(lambda: replies)  # the thread has read to the end
    host.cancel(call, by)
    if not is_endless:  # longer than it takes to notice the cancellation
        asyncio.get_running_loop().call_later(0.3, release.set)
    with at_once(IN_TIME):
        response = await call
    assert (response.text, response.content) == ("A", [TextBlock(text="A")])
    release.set()
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
    assert [payload["status"] for payload in host.payloads("llm:response")] == ["ok"]
    assert host.payloads("llm:stream_aborted") == []
    await amp_is_quiet()


@either_cancel
@table("event", *"llm:request llm:stream_block_delta llm:stream_aborted llm:response".split())
async def test_amp_cancelled_call_is_reported_once_whatever_hooks_do(event, by, server):
    host = await amp_mount(server, amp_stall(AMP_A))
    is_in_hook, release = host.hold(event)
    call = host.start()
    if event in ("llm:stream_aborted", "llm:response"):
        await host.until("llm:stream_block_delta")
        host.cancel(call, by)
    await is_in_hook.wait()
    host.cancel(call, by)
    await asyncio.sleep(0)
    host.cancel(call, by)
    release.set()
    with at_once(IN_TIME):
        [error] = await asyncio.gather(call, return_exceptions=True)
    kind = llm_errors.AbortError if by == "session" else asyncio.CancelledError
    assert type(error) is kind
    [result] = host.payloads("llm:response")
    reason = "CancelledError" if by == "task" else "AbortError"
    assert (result["status"], result["error_type"]) == ("error", reason)
    await amp_is_quiet()


@table("is_twice", row(False, id="once"), row(True, id="twice"))
@table("is_noticed", row(False, id="at once"), row(True, id="after the first took effect"))
async def test_amp_session_is_cancelled_by_the_kernel(is_noticed, is_twice, server, amp_session):
    async with amp_session(server.url, vllm=AMP_CHAT) as session:
        server.script(amp_stall(AMP_A), path="completions")
        run = asyncio.ensure_future(session.execute("Hello"))
        await amp_until(lambda: amp_bodies(server))
        session.coordinator.cancellation.request_immediate()
        with at_once(IN_TIME):
            if is_noticed:
                await asyncio.to_thread(server.aborted.get, timeout=IN_TIME)
            if is_twice:
                run.cancel()
            [outcome] = await asyncio.gather(run, return_exceptions=True)
            if not is_noticed:
                await asyncio.to_thread(server.aborted.get, timeout=IN_TIME)
    if is_twice:
        assert isinstance(outcome, asyncio.CancelledError) or "ancelled" in str(outcome)


@either_endpoint
async def test_amp_cancelled_session_starts_nothing(use_completions, server):
    host = await amp_mount(server, use_completions=use_completions)
    host.coordinator.cancellation.request_immediate()
    await host.fail("AbortError")
    assert server.requests == []
    assert host.names() == ["llm:request", "llm:response"]


@table(
    "ask",
    row(lambda host: host.provider.list_models(), id="list_models"),
    row(lambda host: on_session_ready(host.coordinator), id="on_session_ready"),
)
async def test_amp_cancelled_lookup_leaves_no_thread_behind(ask, server):
    server.script(stall())
    lookup = asyncio.ensure_future(ask(await amp_mount(server)))
    await amp_until(lambda: server.requests)
    lookup.cancel()
    with pytest.raises(asyncio.CancelledError):
        await lookup
    await amp_is_quiet(server, gone=1)


async def test_amp_session_cancelled_gracefully_goes_on(server):
    server.pace = 0.01  # 0.2 s in all: two looks at the session
    host = await amp_mount(server)
    host.coordinator.cancellation.request_graceful()
    assert (await host.complete()).text == AMP_HELLO


async def test_amp_close_ends_the_calls_and_may_be_called_again(server):
    host = await amp_mount(server, *[amp_stall(AMP_A)] * 3)
    calls = [host.start() for _ in range(3)]
    await host.until("llm:stream_block_delta", 3)
    with at_once(IN_TIME):
        await host.close()
        await host.provider.close()
        errors = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(error) for error in errors] == [llm_errors.AbortError] * 3
    told = {(error.provider, error.model, error.retryable) for error in errors}
    assert told == {("vllm", MODEL, False)}
    assert host.names()[-6:].count("llm:response") == 3
    assert (await host.complete()).text == AMP_HELLO
    await amp_is_quiet(server, gone=3)


# ---- Amplifier: many calls, many loops --------------------------------------


async def test_amp_64_calls_run_at_once_and_leave_the_host_its_threads(server):
    meet = threading.Barrier(65)

    def together(connection: Connection) -> None:
        meet.wait(NEVER)
        connection.send(amp_chat({"content": connection.request.body["messages"][0]["content"]}))

    host = await amp_mount(server, *[together] * 64)
    calls = [asyncio.ensure_future(host.ask(f"Say {number}")) for number in range(64)]
    await amp_until(lambda: server.running == 64)
    await asyncio.to_thread(meet.wait, NEVER)
    responses = await asyncio.gather(*calls)
    assert texts_of(responses) == [f"Say {number}" for number in range(64)]


async def test_amp_max_concurrency_is_the_providers_bound(server):
    meet, running, seen = threading.Barrier(3), [], []

    def note(connection: Connection) -> None:
        running.append(connection)
        seen.append(len(running))
        meet.wait(NEVER)
        running.remove(connection)
        server.answer(connection)

    host = await amp_mount(server, *[note] * 12, max_concurrency=3)
    await asyncio.gather(*[host.complete() for _ in range(12)])
    assert (len(seen), max(seen)) == (12, 3)


async def test_amp_pause_before_a_retry_holds_no_place(server):
    host = await amp_mount(server, AMP_BUSY, max_concurrency=1)
    first = host.start()
    await host.until("provider:retry")
    with at_once(IN_TIME):
        assert (await host.complete()).finish_reason == "stop"
    first.cancel()
    await asyncio.wait({first})


async def thread_name() -> str:
    return (await asyncio.to_thread(threading.current_thread)).name


@table("is_busy", row(False, id="idle"), row(True, id="busy"))
async def test_amp_mount_widens_the_stock_executor_once(is_busy, server, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    assert (await thread_name()).startswith("asyncio")
    loop, meet, release = asyncio.get_running_loop(), threading.Barrier(100), threading.Event()
    stock = min(32, (os.cpu_count() or 1) + 4) if is_busy else 0
    busy = [loop.run_in_executor(None, release.wait, NEVER) for _ in range(stock)]
    executors, set_executor = [], loop.set_default_executor

    def note(executor: Any) -> None:
        executors.append(executor)
        set_executor(executor)

    monkeypatch.setattr(loop, "set_default_executor", note)
    for _ in range(3):
        await amp_mount(server)
    assert len(executors) == 1
    assert caplog.records == []  # no word of a host's own executor
    await asyncio.gather(*[asyncio.to_thread(meet.wait, NEVER) for _ in range(100)])
    release.set()
    await asyncio.gather(*busy)


async def test_amp_mount_leaves_a_hosts_own_executor_alone(server, caplog):
    caplog.set_level(logging.INFO)
    own = ThreadPoolExecutor(3, thread_name_prefix="hosts")
    asyncio.get_running_loop().set_default_executor(own)
    host = await amp_mount(server)
    assert (await thread_name()).startswith("hosts")
    [record] = caplog.records
    assert record.getMessage() == "the host's own executor is kept: 3 calls run at once"
    responses = await asyncio.gather(*[host.complete() for _ in range(6)])
    assert texts_of(responses) == [AMP_HELLO] * 6


def test_amp_mount_leaves_a_loop_alone_that_hides_its_executor(server, caplog):
    caplog.set_level(logging.INFO)

    class Loop(asyncio.SelectorEventLoop):  # as uvloop's
        def __getattribute__(self, name: str) -> Any:
            if name == "_default_executor":
                caller = sys._getframe(1).f_globals["__name__"]
                if caller == vllm_provider.__name__:
                    raise AttributeError(name)
            return super().__getattribute__(name)

    async def threads() -> str:
        await amp_mount(server)
        return await thread_name()

    with asyncio.Runner(loop_factory=Loop) as runner:
        assert runner.run(threads()).startswith("asyncio")
    text = "the host's own executor is kept: an unknown number of calls run at once"
    assert [record.getMessage() for record in caplog.records] == [text]


def test_amp_one_provider_in_several_loops_one_after_another(server):
    provider = VLLMProvider(server.url, config={"max_concurrency": 1})

    async def two() -> list[str]:
        responses = await asyncio.gather(*[provider.complete(amp_request()) for _ in range(2)])
        assert (await thread_name()).startswith("asyncio")  # the class alone widens nothing
        return [*texts_of(responses), (await provider.list_models())[0].id]

    assert [asyncio.run(two()) for _ in range(3)] == [[AMP_HELLO, AMP_HELLO, MODEL]] * 3
    asyncio.run(provider.close())


# ---- Amplifier: conversations on the completions endpoint -------------------


async def amp_mount_rendered(server: StandIn | str, *steps: Step, **config: Any) -> AmpHost:
    """Mount for the completions endpoint; `steps` are the next answers of the tokenizer's."""
    if steps:
        server.script(*steps, path="tokenize")  # and /detokenize
    return await amp_mount(server, **{**config, "use_completions": True})


async def amp_talk(host: AmpHost, system: str) -> tuple[list[Any], list[Completion]]:
    """Return the responses of a conversation, turn by turn, and their Completions."""
    history = [amp_system(system)]
    responses = []
    with request_options(logprobs=1, temperature=0) as calls:
        for words in ("What is 2+2?", "Hello", "Say hello in Japanese."):
            history.append(amp_user(words))
            responses.append(await host.ask(*history))
            history.append(amp_reply(responses[-1].content))
    await host.close()
    return responses, calls


async def amp_check_same_as_chat(url: str, system: str) -> list[Any]:
    """Check that completions answer as the chat endpoint does, log probabilities included."""
    rendered = await amp_mount_rendered(url, default_model=None)
    responses, calls = await amp_talk(rendered, system)
    chats, chat_calls = await amp_talk(await amp_mount(url, default_model=None), system)
    for response, chat in zip(responses, chats, strict=True):
        assert response.degradation is None
        assert (response.content, response.finish_reason) == (chat.content, chat.finish_reason)
        assert response.usage.input_tokens == chat.usage.input_tokens
    for call, chat in zip(calls, chat_calls, strict=True):
        assert [one.token for one in call.logprobs] == [one.token for one in chat.logprobs]
        expected = pytest.approx([one.logprob for one in chat.logprobs], abs=0.02)
        assert [one.logprob for one in call.logprobs] == expected
        assert len(call.logprobs) == call.usage.output_tokens > 0
    return responses


async def test_amp_completions_answer_as_the_chat_endpoint_does(server):
    responses = await amp_check_same_as_chat(server.url, "Be brief.")
    thoughts = [response.content[0].thinking.strip() for response in responses]
    assert thoughts == ["Two plus two equals four.", "A greeting.", "Use hiragana."]
    assert responses[2].text.strip() == "こんにちは、世界 🌸🚀"
    paths = [path for path in amp_paths(server) if path.endswith("completions")]
    assert paths == ["/v1/completions"] * 3 + ["/v1/chat/completions"] * 3


@table(
    "fields keywords kwargs",
    row({}, {}, {}, id="nothing"),
    row({"reasoning_effort": "none"}, {}, {"reasoning_effort": "none", "enable_thinking": False},
        id="no effort, as vLLM does it"),
    row({"reasoning_effort": "low", "chat_template_kwargs": {"a": 1}}, {"extended_thinking": False},
        {"reasoning_effort": "low", "enable_thinking": False, "thinking": False, "a": 1},
        id="effort, switches"),
    row({"reasoning_effort": "high", "documents": [{"title": "A"}]}, {},
        {"documents": [{"title": "A"}], "reasoning_effort": "high", "enable_thinking": True},
        id="documents"),
)  # fmt: skip
async def test_amp_rendered_request_and_its_body(fields, keywords, kwargs, server):
    host = await amp_mount_rendered(server, temperature=0.5)
    await host.complete(amp_request(top_k=5, stop=["X"], **fields), **keywords)
    [tokenize], [body] = amp_bodies(server, "tokenize"), amp_bodies(server)
    template = {"chat_template_kwargs": kwargs} if kwargs else {}
    names = {"model": MODEL, "messages": [amp_user("Hello")], "return_token_strs": True}
    assert tokenize == {**names, **template}
    prompt = body["prompt"]
    start = f"<|im_start|>user\nHello<|im_end|>\n{TURN}"
    assert VLLMClient(server.url).detokenize(prompt).startswith(start)
    sampling = {"temperature": 0.5, "top_k": 5, "stop": ["X"], "prompt": prompt}
    wire = amp_wire(**sampling, max_tokens=MAX_MODEL_LEN - len(prompt))
    del wire["messages"]
    assert body == wire  # completions have no reasoning_effort


def amp_rendered(*texts: str, ids: Sequence[int] = (1, 2, 3), limit: Any = 131072) -> bytes:
    """Return an answer of `/tokenize`, without the strings if there are no `texts`."""
    payload = {"count": len(ids), "max_model_len": limit, "tokens": list(ids)}
    return reply(200, {**payload, "token_strs": list(texts) or None})


@table(
    "step config fields max_tokens warnings",
    row(None, {"max_tokens": 100}, {}, 100, 0, id="the configuration's"),
    row(None, {"max_tokens": 100}, {"max_output_tokens": 50}, 50, 0, id="the request's"),
    row(None, {}, {"max_completion_tokens": 60}, 60, 0, id="chat's newer name"),
    row(amp_rendered(limit=99), {}, {}, 96, 0, id="all that is left"),
    row(amp_rendered(limit=10), {}, {"max_output_tokens": 7}, 7, 0, id="just what is left"),
    row(amp_rendered(limit=10), {}, {"max_output_tokens": 8}, 7, 1, id="no more than is left"),
    row(amp_rendered(limit=4), {}, {}, 1, 0, id="one token is left"),
    row(amp_rendered(limit=None), {}, {}, 1024, 0, id="no limit known"),
    row(amp_rendered(limit=None), {}, {"max_tokens": 1025}, 1025, 0, id="no limit known, given"),
    row(amp_rendered(limit=2), {}, {"truncate_prompt_tokens": 1}, 1024, 0, id="prompt is cut"),
)  # fmt: skip
async def test_amp_max_tokens(step, config, fields, max_tokens, warnings, server, caplog):
    host = await amp_mount_rendered(server, step, **config)
    await host.ask(**fields)
    [body] = amp_bodies(server)  # sent once: nothing was refused
    assert body["max_tokens"] == max_tokens
    assert "max_completion_tokens" not in body
    assert len(caplog.records) == warnings


async def test_amp_prompt_that_does_not_fit_is_not_sent_to_the_engine(server):
    host = await amp_mount_rendered(server, amp_rendered(limit=3))
    error = await host.fail("ContextLengthError")
    assert amp_paths(server) == ["/tokenize"]
    assert "3 tokens for a context of 3" in str(error)
    assert (error.__cause__.limit, error.__cause__.input_tokens) == (3, 3)
    assert error.retryable is False


def amp_degradation(reason: str) -> Degradation:
    return Degradation(requested="completions", actual="chat", reason=reason)


AMP_NO_TEMPLATE: Final = amp_error(400, "… you must provide a chat template if the tokenizer …")


@table(
    "steps config",
    row([AMP_NO_TEMPLATE], {}, id="a model without a template"),
    row([], {"prompt_format": "raw"}, id="prompt_format raw"),
)
async def test_amp_lone_message_is_sent_as_typed(steps, config, server):
    host = await amp_mount_rendered(server, *steps, **config)
    response = await host.ask(PROMPT)
    assert (response.content, response.degradation) == ([TextBlock(text=" Paris.")], None)
    assert amp_paths(server) == [*["/tokenize"] * len(steps), "/v1/completions"]
    [body] = amp_bodies(server)
    assert (body["prompt"], body["max_tokens"]) == (PROMPT, 1024)


AMP_HTML: Final = {"content-type": "text/html"}


@table(
    "raw",
    row(reply(403, {"detail": "Forbidden"}), id="403"),
    row(AMP_HIDDEN, id="404"),
    row(reply(405, {"detail": "Method Not Allowed"}), id="405"),
    row(reply(404, "<html>nothing here</html>", AMP_HTML), id="404 in HTML"),
    row(reply(200, "<html>welcome</html>", AMP_HTML), id="HTML"),
    row(reply(200, {"object": "list"}), id="something else"),
)
async def test_amp_hidden_tokenizer_is_remembered_and_warned_of_once(raw, server, caplog):
    host = await amp_mount_rendered(server, raw)
    responses = [await host.complete() for _ in range(3)]
    degradation = amp_degradation("/tokenize is hidden by a gateway")
    assert [response.degradation for response in responses] == [degradation] * 3
    assert texts_of(responses) == [AMP_HELLO] * 3
    assert amp_paths(server) == ["/tokenize", *["/v1/chat/completions"] * 3]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


async def test_amp_conversation_is_rendered_once_not_once_an_attempt(server):
    host = await amp_mount_rendered(server, reply(503, "busy"), max_retry_delay=0.01)
    server.script(reply(503, "busy"), sse(text_event("A"), done=False), path="/v1/completions")
    response = await host.complete()
    assert (response.text, response.degradation) == (AMP_HELLO, None)
    assert amp_paths(server) == [*["/tokenize"] * 2, *["/v1/completions"] * 3]
    assert [payload["attempt"] for payload in host.payloads("provider:retry")] == [1, 2, 3]


@table(
    "raw config kinds",
    row(amp_error(400, "A complaint."), {}, ["InvalidRequestError"], id="fails otherwise"),
    row(AMP_NO_TEMPLATE, AMP_STRICT_FORMAT, ["InvalidRequestError"], id="no template"),
    row(AMP_HIDDEN, AMP_STRICT_FORMAT, ["NotFoundError", "ConfigurationError"], id="hidden"),
)
async def test_amp_tokenizer_that_fails_is_an_error(raw, config, kinds, server):
    host = await amp_mount_rendered(server, None, raw, **config)
    assert (await host.complete()).degradation is None
    for kind in kinds:
        await host.fail(kind)
    if len(kinds) == 1:
        assert (await host.complete()).degradation is None
    assert "/v1/chat/completions" not in amp_paths(server)


def amp_text_chunks(texts: Sequence[str]) -> bytes:
    """Return a streamed reply of completions, a chunk and a log probability for each text."""
    chunks = []
    for text in texts:
        logprobs = {"text_offset": [0], "token_logprobs": [-0.5], "tokens": [text]}
        logprobs["top_logprobs"] = [{text: -0.5}]
        chunks.append(text_event(text, logprobs=logprobs))
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    return sse(*chunks)


AMP_HARMONY: Final = amp_rendered(ids=[200006, 1428, 200008, 4827, 382, 200007, 200006, 173781])
AMP_HARMONY_TEXTS: Final = [
    "<|channel|>", "analysis", "<|message|>", "Two", " plus", " two.", "<|end|>", "<|start|>",
    "assistant", "<|channel|>", "final", "<|message|>", "2", " +", " 2", " =", " 4", "",
]  # fmt: skip


async def test_amp_gpt_oss_plain_turns_are_split_at_its_channels(server):
    host = await amp_mount_rendered(server, AMP_HARMONY)
    server.script(amp_text_chunks(AMP_HARMONY_TEXTS), path="completions")
    with request_options(logprobs=1) as calls:
        response = await host.ask("What is 2+2?", AMP_REPLY, "And 2+2?")
    content = [ThinkingBlock(thinking="Two plus two."), TextBlock(text="2 + 2 = 4")]
    assert (response.content, response.degradation) == (content, None)
    [body] = amp_bodies(server)
    assert (body["skip_special_tokens"], body["logprobs"]) == (False, 1)
    assert (body["prompt"][0], body["max_tokens"]) == (200006, 131072 - 8)
    assert [token.token for token in calls[0].logprobs] == AMP_HARMONY_TEXTS
    starts = host.payloads("llm:stream_block_start")
    assert [payload["block_type"] for payload in starts] == ["thinking", "text"]
    assert amp_paths(server) == ["/tokenize", "/v1/completions"]


AMP_CONTROL: Final = "gpt-oss with more than plain text"


@table(
    "step messages fields reason",
    row(None, [], {"tools": [AMP_TOOL]}, "tools", id="tools"),
    row(None, [], {"include_reasoning": False}, "include_reasoning", id="no reasoning"),
    row(None, AMP_ORPHANS, {}, "tool results in the history", id="results"),
    row(None, [amp_user([AMP_JPEG])], {}, "images", id="images"),
    row(AMP_NO_TEMPLATE, ["A", AMP_REPLY, "Hello"], {}, "the model has no chat template",
        id="no template"),
    row(AMP_HARMONY, [amp_system("A"), AMP_USER], {}, "gpt-oss with a system prompt", id="system"),
    row(AMP_HARMONY, [AMP_USER, amp_reply([AMP_THOUGHT, amp_text("A")]), AMP_USER], {},
        "gpt-oss with past reasoning", id="past reasoning"),
    row(AMP_HARMONY, ["Say <|end|>"], {}, AMP_CONTROL, id="control tokens"),
    row(AMP_HARMONY, ["Say <|end|>", AMP_REPLY, AMP_USER], {}, AMP_CONTROL, id="in the first"),
    row(AMP_HARMONY, [AMP_USER, AMP_REPLY, "Say <|end|>"], {}, AMP_CONTROL, id="in the last"),
)  # fmt: skip
async def test_amp_what_cannot_be_rendered_goes_to_chat(step, messages, fields, reason, server):
    host = await amp_mount_rendered(server, *([step] if step else []))
    assert (await host.ask(*messages, **fields)).degradation == amp_degradation(reason)
    assert amp_paths(server) == [*["/tokenize"] * (step is not None), "/v1/chat/completions"]
    [body] = amp_bodies(server)
    assert body.get("include_reasoning") == fields.get("include_reasoning")
    assert "skip_special_tokens" not in body
    assert (await host.complete()).degradation is None  # nothing of it is remembered


AMP_PROMPT_END: Final = reply(200, {"prompt": "assistant\n<think>\n"})


@table(
    "steps texts thoughts text",
    row([amp_rendered("assistant", "Ċ", "<think>")], ("Hm", ".</th", "ink>", "4"), "Hm.", "4",
        id="the template has opened the tag"),
    row([amp_rendered("<think>", "Ċ", "Ċ")], ("Hm.", "</think>", "4"), "Hm.", "4",
        id="the tag is not the last token"),
    row([amp_rendered("<think>", "ĊĊ", "</think>")], ("4", " <think>"), "", "4 <think>",
        id="the template has closed it too"),
    row([amp_rendered(), AMP_PROMPT_END], ("Hm.", "</think>4"), "Hm.", "4",
        id="a server that sends no strings is asked for the end"),
    row([amp_rendered(), AMP_HIDDEN], ("<think>", "Hm.", "</think>", "4"), "Hm.", "4",
        id="or not asked"),
    row([amp_rendered("a")], ("<think>", "Hm"), "Hm", "", id="never closed is all reasoning"),
)  # fmt: skip
async def test_amp_thoughts_are_split_off_the_text(steps, texts, thoughts, text, server):
    host = await amp_mount_rendered(server, *steps)
    server.script(amp_text_chunks(texts), path="completions")
    with request_options(logprobs=1) as calls:
        response = await host.complete()
    content = [ThinkingBlock(thinking=thoughts)] if thoughts else []
    assert response.content == [*content, TextBlock(text=text)]
    assert [token.token for token in calls[0].logprobs] == list(texts)


async def test_amp_echo_is_not_split(server):
    """The prompt's own markup stands before the answer's."""
    host = await amp_mount_rendered(server)
    with request_options(echo=True, logprobs=True) as calls:
        await host.ask("What is 2+2?")
    assert amp_bodies(server)[-1]["logprobs"] == 1  # completions have no True
    assert calls[0].reasoning == ""
    assert calls[0].text.endswith("<think>\nTwo plus two equals four.\n</think>\n\n2 + 2 = 4")


# ---- Amplifier: against a real server ---------------------------------------


@pytest.mark.live
async def test_amp_live_completions_answer_as_the_chat_endpoint_does():
    assert all(texts_of(await amp_check_same_as_chat(VLLM_LIVE_URL, "You are a helpful parrot.")))


@pytest.mark.live
async def test_amp_live_session_runs_a_tool(amp_session):
    config = {"temperature": "0", "logprobs": "1"}
    async with amp_session(VLLM_LIVE_URL, AmpWeather, vllm=config) as session:
        with request_options() as calls:
            answer = await session.execute("What is the weather in Paris?")
    assert [call.arguments for call in calls[0].tool_calls] == ['{"city": "Paris"}']
    assert "Paris" in answer
    assert all(call.logprobs for call in calls)


@pytest.mark.live
async def test_amp_live_cancelled_call_stops_the_engine():
    host = await amp_mount_rendered(VLLM_LIVE_URL, default_model=None)
    call = host.start(request=amp_request("Once upon a time"), ignore_eos=True)
    await amp_until(lambda: host.payloads("llm:stream_block_delta"))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert host.names()[-1] == "llm:response"
    await amp_is_quiet()


# ---- Command line: what its tests need --------------------------------------

CLI_MODULE: Final = Path(vllm_provider.__file__)
CLI_COMMANDS: Final = ["complete", "chat", "score", "run-batch", "models", "health"]
CLI_KEY: Final = "sk-f3a9c1e7"
DEAD_URL: Final = "http://127.0.0.1:9"
CLI_ON_TERMINAL: Final = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def delta_event(**delta: Any) -> dict[str, Any]:
    """Return an event of a streamed chat."""
    return {"choices": [{"index": 0, "delta": delta}]}


CLI_TEXT: Final = text_event(" a")
CLI_ANSWER: Final = delta_event(content="Yes")
CLI_THOUGHT: Final = delta_event(reasoning="Hm")


def part_of(event: dict[str, Any]) -> bytes:
    """Return the beginning of a reply that goes on."""
    return sse(event, done=False, end=False)


@pytest.fixture
def cli_main(monkeypatch, capsys):
    """Return a function that runs main() with these arguments: exit code, stdout, stderr."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("random.uniform", lambda _low, _high: 0.0)  # retries do not wait
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*argv):
        try:
            code = main(argv)
        except SystemExit as end:  # argparse
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


def cli_words(server: StandIn, command: str) -> list[str]:
    """Return the arguments of a command line for this server, with what is random left out."""
    words = shlex.split(command.replace("{url}", server.url))
    where = ["--base-url", server.url, "--model", MODEL]
    if not {"complete", "chat"}.isdisjoint(words):
        where += ["--temperature", "0"]
    return [*where, *words]


@pytest.fixture
def cli(cli_main, server):
    """Return a function that runs a command line against `server`."""
    return lambda command: cli_main(*cli_words(server, command))


def cli_environment(env: Any = ()) -> dict[str, str]:
    others = re.compile(r"VLLM_|NO_COLOR|PYTHON(IO|UNBUF)")
    return {name: value for name, value in os.environ.items() if not others.match(name)} | dict(env)


@contextlib.contextmanager
def cli_process(*argv: str, env: Any = (), **options: Any) -> Iterator[Any]:
    """Start `python vllm_provider.py …` with pipes; it is gone when the block is left."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-W", "error", str(CLI_MODULE), *argv]
    with subprocess.Popen(command, env=cli_environment(env), **pipes | options) as process:
        try:
            yield process
        finally:
            process.kill()


def cli_output(*argv: str, **options: Any) -> tuple[int, str, str]:
    """Return exit code, stdout and stderr of `python vllm_provider.py …`."""
    with cli_process(*argv, **options) as process:
        out, err = process.communicate(timeout=NEVER)
        return process.returncode, (out or b"").decode(), (err or b"").decode()


class Screen:
    """What a pseudo-terminal shows."""

    def __init__(self) -> None:
        self._leader, self.follower = pty.openpty()
        self._raw = bytearray()
        self._read_until = 0
        self._reader = InThread(self._read)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(self._leader, 65536):
                self._raw.extend(data)

    def text(self) -> str:
        return self._raw.decode(errors="ignore").replace("\r\n", "\n")

    def read(self, text: str, timeout_s: float = NEVER) -> str:
        """Return what comes until `text` does."""
        start = self._read_until
        wait_until(lambda: text in self.text()[start:], timeout_s)
        self._read_until = self.text().index(text, start) + len(text)
        return self.text()[start : self._read_until]

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def interrupt(self, text: str) -> str:
        """Type Ctrl-C, and return what comes until `text` does.

        Python's readline loses one that comes just before it waits: it is typed again.
        """
        for _ in range(10):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.read(text, IN_TIME)
        raise AssertionError(f"no effect: {self.text()!r}")

    def close(self) -> str:
        """Wait until no process has the terminal open; return all it has shown."""
        self._reader.outcome(NEVER)
        os.close(self._leader)
        return self.text()


@contextlib.contextmanager
def cli_terminal(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[Screen]:
    """Put a terminal in the place of these streams of this process."""
    screen = Screen()
    with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
        for name in names:
            terminal = open(os.dup(screen.follower), "w", encoding="utf-8")  # noqa: SIM115
            patch.setattr(sys, name, stack.enter_context(terminal))
        os.close(screen.follower)
        yield screen
    screen.close()


@contextlib.contextmanager
def cli_conversation(*argv: str, **env: str) -> Iterator[Screen]:
    """Run `vllm-provider chat` in a process of its own on a terminal, until it ends by itself."""
    screen = Screen()
    options: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), screen.follower)
    options["env"] = cli_environment({"TERM": "dumb", **env})
    command = [sys.executable, "-c", CLI_ON_TERMINAL, str(CLI_MODULE), *argv, "chat"]
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        os.close(screen.follower)
        try:
            yield screen
            assert process.wait(NEVER) == 0
        finally:
            process.kill()
            screen.close()


# ---- Command line: output and options ---------------------------------------

CLI_SUM: Final = ("2 + 2 = 4\n", "Two plus two equals four.\n")
CLI_REQUESTED: Final = "--max-tokens 5 --temperature 0.5 --top-p 0.5 --seed 7 --logprobs 2 --stop a"
CLI_SENT: Final = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.5, "seed": 7}
CLI_HELLO: Final = {"role": "user", "content": "Hello"}
CLI_SYSTEM: Final = {"role": "system", "content": "Be brief."}
NO_TEXT: Final = "there is no text: give it as argument or on standard input"
NOT_UTF_8: Final = "standard input is not utf-8 text"
CLI_CARDS: Final = {"object": "list", "data": [{"id": "a"}, {"id": "b", "max_model_len": 8}]}
CLI_TOOL: Final = '[{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]'
CLI_CALLS: Final = 'get_weather({"city": "Paris"})\nget_weather({"city": "Rome"})\n'
CLI_TWO: Final = [text_event(text, index=n) for n, text in ((0, "a"), (1, "B"), (0, "b"), (1, "C"))]
CLI_LINES: Final = [
    delta_event(reasoning="\n"), delta_event(reasoning="\nHm\n"),
    delta_event(content="\n"), delta_event(content="\nYes\n\nNo"),
]  # fmt: skip


@table(
    "command steps out err",
    row(f"complete '{PROMPT}'", [], " Paris.\n", "", id="complete"),
    row(f"complete '{PROMPT}' --logprobs 2", [], " Paris.\n", "", id="logprobs-in-a-pipe"),
    row("complete 'What is 2+2?' --no-stream", [], " 4\n", "", id="complete-whole"),
    row("complete 'Count to 100.' --stop never --stop ' 3'", [], " 1 2\n", "", id="stop-repeated"),
    row("complete x", [sse(text_event("\n\na\n"))], "\n\na\n", "", id="line-breaks-of-text"),
    row("complete x", [sse(text_event("", finish_reason="stop"))], "", "", id="an-empty-reply"),
    row("complete x", [sse(*CLI_TWO)], "ab\nBC\n", "", id="several-choices-one-after-the-other"),
    row("chat 'What is 2+2?'", [], *CLI_SUM, id="chat-reasoning-on-stderr"),
    row("chat 'What is 2+2?' --no-stream", [], *CLI_SUM, id="chat-whole"),
    row("chat 'Say hello in Japanese.'", [], "こんにちは、世界 🌸🚀\n", "Use hiragana.\n", id="unicode"),
    row(f"chat 'What is the weather in Paris and Rome?' --param 'tools={CLI_TOOL}'", [],
        CLI_CALLS, "Two calls.\n", id="tool-calls"),
    row("chat x", [sse(delta_event(content="\n\nYes"))], "\n\nYes\n", "", id="without-reasoning"),
    row("chat x", [sse(*CLI_LINES)], "Yes\n\nNo\n", "Hm\n", id="no-blank-lines-around-reasoning"),
    row("models", [reply(200, CLI_CARDS)], "a\t? tokens\nb\t8 tokens\n", "", id="models"),
    row("health --base-url {url}/v1/", [], "{url} is healthy\n", "", id="health"),
    row("health --wait 20", [reply(503), reply(503)], "{url} is healthy\n", "", id="health-wait"),
    row("--version", [], f"vllm-provider {vllm_provider.__version__}\n", "", id="version"),
)  # fmt: skip
def test_cli_prints(cli, server, monkeypatch, command, steps, out, err):
    monkeypatch.setattr(vllm_provider, "HEALTH_POLL_S", 0.01)
    server.script(*steps)
    assert cli(command) == (0, out.replace("{url}", server.url), err)
    assert len(server.requests) >= len(steps)


def test_cli_help_names_every_command_and_explains_every_option(cli_main):
    code, overview, err = cli_main("--help")
    assert (code, overview, err) == cli_main("-h") == (0, overview, "")
    assert re.findall(r"(?m)^    ([a-z][a-z-]+)", overview) == CLI_COMMANDS
    for command in CLI_COMMANDS:
        code, out, err = cli_main(command, "--help")
        assert (code, err) == (0, "")
        options = set(re.findall("--[a-z-]+", out))
        assert options >= {"--base-url", "--api-key", "--model", "--timeout"}
        rows = re.findall(r"(?m)^  (-\S.*(?:\n {20,}.*)?)", out)
        assert [row for row in rows if len(re.split(r"\s{2,}", row)) < 2] == []


@table(
    "options line",
    row("", r"\d\.\d\d s to first token, \d+ tokens/s, 18 tokens\n", id="stream"),
    row("--no-stream", r"\d\.\d\d s, \d+ tokens/s, 18 tokens\n", id="whole"),
    row("--json", "", id="not-with-json-which-has-them"),
)
def test_cli_stats(cli, options, line):
    code, out, err = cli(f"chat 'What is 2+2?' --stats {options}")
    assert (code, "2 + 2 = 4" in out) == (0, True)
    assert re.fullmatch(line, err.removeprefix(CLI_SUM[1]))


@table(
    "tokens first_s total_s line",
    row(101, 0.5, 2.5, "0.50 s to first token, 50 tokens/s, 101 tokens", id="after-the-first"),
    row(1, 0.5, 0.5, "0.50 s to first token, 0 tokens/s, 1 tokens", id="one-token"),
    row(10, None, 2.0, "2.00 s, 5 tokens/s, 10 tokens", id="whole"),
    row(None, None, None, "0.00 s, 0 tokens/s, 0 tokens", id="unknown"),
)
def test_cli_stats_line(tokens, first_s, total_s, line):
    usage = None if tokens is None else Usage(1, tokens, 1 + tokens)
    reply = Completion(usage=usage, first_token_s=first_s, total_s=total_s)
    assert vllm_provider._to_stats(reply) == line


@table("command shown", row("complete", 5), row("chat", True))
def test_cli_html_is_the_picture(cli, server, tmp_path, command, shown):
    page = tmp_path / "page.html"
    assert cli(f"{command} 'What is 2+2?' --html {page}")[0] == 0
    assert server.requests[-1].body["logprobs"] == shown
    text = page.read_text(encoding="utf-8")
    assert "<title>What is 2+2?</title>" in text
    assert "mean probability" in text

    assert cli(f"{command} 'What is 2+2?' --html {page} --logprobs 1")[0] == 0
    body = server.requests[-1].body
    assert body.get("top_logprobs", body["logprobs"]) == 1


@table(
    "before after stop",
    row("", f"--model {MODEL} --stop a --no-stream", ["a"], id="after"),
    row(f"--model={MODEL} --stop a --no-stream", "", ["a"], id="before"),
    row("--no-stream --stop a", f"--stop b --model {MODEL}", ["a", "b"], id="repeated-ones-join"),
    row("--model other --no-stream", f"--model {MODEL}", None, id="the-last-wins"),
    row(f"--base-url {DEAD_URL}", f"--no-stream --model {MODEL}", None, id="the-last-url-wins"),
)
def test_cli_options_before_and_after_the_command(cli_main, server, before, after, stop):
    where = ["--api-key", CLI_KEY, "--base-url", server.url]
    assert cli_main(*before.split(), "complete", "x", *after.split(), *where)[0] == 0
    (request,) = server.requests
    assert request.headers["Authorization"] == f"Bearer {CLI_KEY}"
    assert (request.body["model"], request.body.get("stop")) == (MODEL, stop)
    assert "stream" not in request.body


def test_cli_url_and_key_of_the_environment(cli_main, server, monkeypatch):
    message = "No base_url found: set it or VLLM_BASE_URL, like http://localhost:8000"
    assert cli_main("chat", "x") == (2, "", f"vllm-provider: {message}\n")
    monkeypatch.setenv("VLLM_BASE_URL", server.url)
    monkeypatch.setenv("VLLM_API_KEY", CLI_KEY)
    assert cli_main("health")[0] == cli_main("health", "--api-key", "other")[0] == 0
    monkeypatch.setenv("VLLM_BASE_URL", DEAD_URL)
    assert cli_main("health", "--base-url", server.url)[0] == 0
    keys = [request.headers["Authorization"] for request in server.requests]
    assert keys == [f"Bearer {CLI_KEY}", "Bearer other", f"Bearer {CLI_KEY}"]


@table(
    "command body",
    row(f"complete Hello {CLI_REQUESTED}",
        {"prompt": "Hello", **CLI_SENT, "logprobs": 2, "stop": ["a"]}, id="complete"),
    row(f"chat Hello {CLI_REQUESTED} --stop b --system 'Be brief.'",
        {"messages": [CLI_SYSTEM, CLI_HELLO], **CLI_SENT, "logprobs": True, "top_logprobs": 2,
         "stop": ["a", "b"]}, id="chat"),
    row("""chat Hello --param min-p=0.5 --param 'stop=["x"]' --stop a""",
        {"messages": [CLI_HELLO], "min_p": 0.5, "stop": ["x"]}, id="params-win-over-options"),
    row("complete x --max-tokens 0 --param echo=true --param n=null",
        {"prompt": "x", "max_tokens": 0, "echo": True}, id="zero-is-sent-and-null-is-not"),
    row("chat --max 5 -- --system",
        {"messages": [{"role": "user", "content": "--system"}], "max_tokens": 5},
        id="a-text-that-looks-like-an-option-and-a-shortened-option"),
    row("chat '-- a list'", {"messages": [{"role": "user", "content": "-- a list"}]},
        id="a-text-with-spaces-that-looks-like-an-option"),
)  # fmt: skip
def test_cli_sends(cli, server, command, body):
    body = {"model": MODEL, "temperature": 0.0} | body
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    assert cli(command)[0] == cli(f"--no-stream {command}")[0] == 0
    assert [request.body for request in server.requests] == [body | stream, body]


@table(
    "stdin arguments text",
    row("Hello", "", "Hello", id="alone"), row("Hello", "-", "Hello", id="named"),
    row("", "Hello", "Hello", id="empty"), row("Hello", "''", "Hello", id="empty-argument"),
    row(" two\nlines\n\n", "", " two\nlines\n", id="without-one-line-break-at-its-end"),
    row("a\nb\n", "Summarise:", "Summarise:\n\na\nb", id="after-the-argument"),
    row("世界 🌸", "", "世界 🌸", id="unicode"),
)  # fmt: skip
def test_cli_text_from_stdin(cli, server, monkeypatch, stdin, arguments, text):
    raw = io.BytesIO(stdin.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw, encoding="utf-8"))
    assert cli(f"chat {arguments}")[0] == 0
    assert server.requests[-1].body["messages"] == [{"role": "user", "content": text}]


@table(
    "raw errors message",
    row(b"", "strict", NO_TEXT, id="empty"), row(b"\n", "strict", NO_TEXT, id="a-line-break"),
    row(b"caf\xe9", "strict", NOT_UTF_8, id="not-utf-8"),
    row(b"caf\xe9", "surrogateescape", NOT_UTF_8, id="c-locale"),
)  # fmt: skip
def test_cli_stdin_that_cannot_be_sent(cli, server, monkeypatch, raw, errors, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), "utf-8", errors))
    assert cli("chat") == (2, "", f"vllm-provider: {message}\n")
    assert server.requests == []


def test_cli_stdin_of_a_terminal_is_read_only_without_an_argument(cli, server, monkeypatch):
    hint = "Reading the text from the terminal; Ctrl-D ends it.\n"
    for argument, prompt, err in (("Hello", "Hello", ""), ("", "typed", hint)):
        monkeypatch.setattr(sys, "stdin", Terminal("typed\n"))
        assert cli(f"complete {argument}")[::2] == (0, err)
        assert server.requests[-1].body["prompt"] == prompt


@table("choices", "", "--choice ' Rome' --choice ' Paris'")
def test_cli_score(cli, server, tmp_path, choices):
    page = tmp_path / "page.html"
    text = "" if choices else "' Paris.'"
    with VLLMClient(server.url) as client:
        scores = [client.score(" Paris.", context=PROMPT)]
        if choices:
            scores = client.choose([" Rome", " Paris"], context=PROMPT)
    out = "".join(
        f"probability {score.probability:.4g}, log probability {score.logprob:.4f}, "
        f"perplexity {score.perplexity:.4g}: {score.text!r}\n" for score in scores
    )  # fmt: skip
    command = f"score {text} --context '{PROMPT}' {choices}"
    assert cli(f"{command} --html {page}") == (0, out, "")
    assert f"<title>{PROMPT}</title>" in page.read_text(encoding="utf-8")
    printed = json.loads(cli(f"{command} --json")[1])
    printed = printed if choices else [printed]
    assert [score["text"] for score in printed] == [score.text for score in scores]
    assert "".join(token["token"] for token in printed[0]["tokens"]) == scores[0].text
    assert not choices or cli(f"score '{PROMPT}' {choices}") == (0, out, "")


def test_cli_run_batch(cli, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "What is 2+2?"}\n')
    command = f"run-batch -i {source} --output-file {target} --param temperature=0"
    code, out, err = cli(f"{command} --max-inflight 2")
    assert (code, out, err.count("\n")) == (0, "", 1)
    assert err.startswith("1 lines: 1 done, 0 failed, 0 skipped")
    (result,) = map(json.loads, target.read_text().splitlines())
    assert result["response"]["body"]["choices"][0]["text"] == " 4"

    source.write_text(source.read_text() + "{\n")
    code, _, err = cli(command)
    assert (code, "first error: " in err) == (1, True)
    assert err.startswith("2 lines: 0 done, 1 failed, 1 skipped")


def test_cli_run_batch_arguments(cli_main, monkeypatch):
    calls = []

    def run_batch(client, *args, servers, **options):
        urls = [one.config.base_url for one in (client, *servers)]
        calls.append((urls, client.config.max_concurrency, args, options))
        return BatchReport(total=1, failed=1)

    monkeypatch.setattr(VLLMClient, "run_batch", run_batch)
    argv = ("--base-url", "http://a", "run-batch", "-i", "in", "-o", "-", "--base-url", "http://b")
    assert cli_main(*argv)[0] == 1
    assert cli_main(*argv, "--max-inflight", "100", "--param", "top_k=1", "--model", "m")[0] == 1
    urls, options = ["http://a", "http://b"], {"concurrency": None, "progress": True}
    assert calls == [
        (urls, 64, ("in", "-"), options),
        (urls, 100, ("in", "-"), options | {"concurrency": 100, "top_k": 1}),
    ]


def test_cli_json_is_the_whole_result(cli, server):
    code, out, err = cli("chat 'What is 2+2?' --logprobs 1 --json")
    printed = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert set(printed) == {one.name for one in fields(Completion)}
    (choice,) = printed["choices"]
    assert set(choice) == {one.name for one in fields(Choice)}
    assert (choice["text"].strip(), choice["finish_reason"]) == ("2 + 2 = 4", "stop")
    assert choice["reasoning"].strip() == "Two plus two equals four."
    token = next(token for token in choice["logprobs"] if token["token"] == " 4")
    assert (token["bytes"], len(token["top"])) == (list(b" 4"), 1)
    assert printed["usage"]["output_tokens"] == len(choice["logprobs"])
    assert "choices" not in printed["payload"]

    printed = json.loads(cli("complete 'What is 2+2?' --json --no-stream")[1])
    assert printed["payload"]["choices"][0]["text"] == printed["choices"][0]["text"] == " 4"

    server.script(reply(200, CLI_CARDS))
    cards = json.loads(cli("models --json")[1])
    assert {card["id"]: card["max_model_len"] for card in cards} == {"a": None, "b": 8}


def test_cli_json_has_no_infinity_and_no_nan(cli, server):
    logprobs = {"tokens": ["a", "b"], "token_logprobs": [-9999.0, math.nan]}
    logprobs["top_logprobs"] = [{"c": -math.inf}, None]
    body = json.dumps(text_event("ab", logprobs=logprobs))
    server.script(reply(200, body, {"Content-Type": "application/json"}))
    out = cli("complete x --json --no-stream")[1]
    assert not re.search("NaN|Infinity", out)
    first, second = json.loads(out)["choices"][0]["logprobs"]
    assert first["logprob"] == first["top"][0]["logprob"] == -9999.0
    assert second["logprob"] is None


@table("encoding text", row("utf-8", "é 🌸"), row("ascii", "\\xe9 \\U0001f338"))
def test_cli_encodings_of_standard_output(server, encoding, text):
    server.script(*[sse(text_event("é 🌸"))] * 2)
    words = cli_words(server, "complete x")
    assert cli_output(*words, env={"PYTHONIOENCODING": encoding}) == (0, f"{text}\n", "")
    code, out, err = cli_output(*words, "--json", env={"PYTHONIOENCODING": encoding})
    assert (code, err, json.loads(out)["choices"][0]["text"]) == (0, "", "é 🌸")
    assert ("é 🌸" in out) == (encoding == "utf-8")


# ---- Command line: terminal and conversation --------------------------------

UNKNOWN_COMMAND: Final = "unknown command: '/{}'; {} (a space before it sends it as text)"
NO_UTF_8: Final = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad")


def scored_event(text: str, *tokens: tuple[str, float | None], **others: float) -> dict[str, Any]:
    """Return the event of a completion whose tokens have these probabilities, and alternatives."""
    values = [None if value is None else math.log(value) for _, value in tokens]
    logprobs = {"tokens": [token for token, _ in tokens], "token_logprobs": values}
    more = {f" {name}": math.log(value) for name, value in others.items()}
    pairs = zip(logprobs["tokens"], values, strict=True)
    logprobs["top_logprobs"] = [{} if one is None else {token: one, **more} for token, one in pairs]
    return text_event(text, logprobs=logprobs)


def colored(token: str, color: int = 33, others: str = "") -> str:
    return f"\x1b[{color}m{token}\x1b[0m" + (f"\x1b[2m[{others}]\x1b[0m" if others else "")


CLI_PARIS: Final = scored_event(" Paris.", (" Paris", 0.68), (".", 0.9), ("<end>", 0.5), Lyon=0.01)
CLI_COLORED: Final = colored(" Paris", 33, " Lyon 0.01") + colored(".", 32, " Lyon 0.01") + "\n"
CLI_LIMITS: Final = [("a", 0.8001), ("b", 0.7999), ("c", 0.4001), ("d", 0.3999), ("e", None)]
CLI_COLORS: Final = "".join(map(colored, "abcd", [32, 33, 33, 31])) + "e\n"
CLI_ESCAPE: Final = scored_event("\x1b[2J", ("\x1b[2J", 0.9), **{"\x07\n": 0.1})
LOGPROBS: Final = "--logprobs 2"
PLAIN: Final = {"NO_COLOR": "1"}


@table(
    "options env event shown",
    row(LOGPROBS, {}, CLI_PARIS, CLI_COLORED, id="colours-and-alternatives"),
    row("", {}, CLI_PARIS, " Paris.\n", id="plain-when-not-requested"),
    row("--param logprobs=2", PLAIN, CLI_PARIS, " Paris(0.68).(0.90)\n", id="as-a-parameter"),
    row(LOGPROBS, {"TERM": "dumb"}, CLI_PARIS, " Paris(0.68).(0.90)\n", id="dumb"),
    # no-color.org: "when present and not an empty string"
    row(LOGPROBS, {"NO_COLOR": ""}, CLI_PARIS, CLI_COLORED, id="an-empty-no-color-is-none"),
    row(LOGPROBS, {}, scored_event("abcde", *CLI_LIMITS), CLI_COLORS, id="limits-of-colours"),
    row(LOGPROBS, {}, CLI_ESCAPE, colored("\\x1b[2J", 32, " \\x07\\n 0.10") + "\n", id="escapes"),
    row(LOGPROBS, PLAIN, scored_event("xy", ("a", 0.5), ("b", 0.5)), "xy\n", id="other-tokens"),
    row(LOGPROBS, PLAIN, scored_event("ab", ("x", 0.1), ("a", 0.5), ("b", 0.25)),
        "a(0.50)b(0.25)\n", id="tokens-before-the-text-are-those-of-reasoning"),
    row(LOGPROBS, PLAIN, scored_event("a", ("a", 0.1), ("a", 0.5)), "a(0.50)\n",
        id="reasoning-that-ends-as-the-text-begins"),
    row("", {}, text_event("a\x1b]0;x\x07\x9b\x7f"), "a\\x1b]0;x\\x07\\x9b\\x7f\n", id="sequences"),
    row("", {}, text_event("a\tb\nc\r\nd\re"), "a\tb\nc\r\nd\\x0de\n", id="white-space"),
    row("", {}, text_event("世界 🌸"), "世界 🌸\n", id="unicode"),
)  # fmt: skip
def test_cli_text_on_a_terminal(cli, server, monkeypatch, options, env, event, shown):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    server.script(sse(event), reply(200, event), sse(event))
    for more in ("", "--no-stream"):
        with cli_terminal(monkeypatch, "stdout") as screen:
            assert cli(f"complete x {options} {more}")[0] == 0
        assert screen.text() == shown
    in_a_pipe = event["choices"][0]["text"] + "\n"
    assert cli(f"complete x {options}") == (0, in_a_pipe, "")


@table(
    "env events done shown",
    row({}, [CLI_THOUGHT, CLI_ANSWER], True, "\x1b[2mHm\x1b[0m\nYes\n", id="reasoning-is-dim"),
    row(PLAIN, [CLI_THOUGHT, CLI_ANSWER], True, "Hm\nYes\n", id="no-color"),
    row(PLAIN, [CLI_THOUGHT], False, "Hm\nvllm-provider: the", id="an-error-begins-a-line"),
    row(PLAIN, [CLI_ANSWER], False, "Yes\nvllm-provider: the", id="an-error-begins-a-line-too"),
)
def test_cli_lines_on_a_terminal(cli, server, monkeypatch, env, events, done, shown):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    server.script(sse(*events, done=done))
    with cli_terminal(monkeypatch, "stdout", "stderr") as screen:
        assert cli("chat x")[0] == (0 if done else 1)
    text = screen.text()
    assert text == shown if done else text.startswith(shown)


@pytest.fixture
def converse(cli, monkeypatch, capsys):
    """Return a function that types lines, or raises exceptions in their place: stdout, stderr.

    Its attribute `is_shown` tells whether a text is on the terminal or on stderr already.
    """
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*lines: str | BaseException, options: str = "") -> tuple[str, str]:
        typed = iter(lines)

        def read_line(_prompt: str) -> str:
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read_line)
        monkeypatch.setattr(sys, "stdin", Terminal())
        with cli_terminal(monkeypatch, "stdout") as screen:
            run.is_shown = lambda text: text in screen.text() + sys.stderr.getvalue()
            code, _, err = cli(f"chat {options}")
        assert code == 0
        return screen.text(), err.removeprefix("/help lists the commands, Ctrl-D leaves.\n")

    return run


def sent_texts(server: StandIn) -> list[list[str]]:
    """Return the texts of each conversation sent."""
    bodies = [request.body for request in server.requests]
    return [[message["content"].strip() for message in body["messages"]] for body in bodies]


@table(
    "lines sent",
    row(["a", "b", "c"], [["a"], ["a", "Yes", "b"], ["a", "Yes", "b", "Yes", "c"]], id="history"),
    row(['"""a', "b", "", 'c"""'], [["a\nb\n\nc"]], id="several-lines"),
    row(['"""', "a", '"""'], [["a"]], id="marks-alone"), row(['"""a"""'], [["a"]], id="one-line"),
    row(['"""/clear"""'], [["/clear"]], id="a-text-with-a-slash-in-marks"),
    row([" /clear"], [["/clear"]], id="a-text-with-a-slash-after-a-space"),
    row(["", "  ", '""""""'], [], id="empty-lines-are-not-sent"),
    row(['"""a', KeyboardInterrupt(), "b"], [["b"]], id="ctrl-c-in-a-block"),
    row([KeyboardInterrupt(), "b"], [["b"]], id="ctrl-c-at-the-prompt"),
    row(['"""a'], [], id="ctrl-d-in-a-block"), row(["/quit", "a"], [], id="quit"),
    row(["a", "/clear", "b", "/retry"], [["a"], ["b"], ["b"]], id="clear"),
    row(["a", "b", "/retry"], [["a"], ["a", "Yes", "b"], ["a", "Yes", "b"]], id="retry"),
    row(["/system S", "a", "/system", "/retry"], [["S", "a"], ["a"]], id="system"),
    row(["/system A", "/system B", "a", "/clear", "b"], [["B", "a"], ["B", "b"]],
        id="one-system-message-which-outlives-clear"),
)  # fmt: skip
def test_cli_conversation(converse, server, lines, sent):
    server.script(*[sse(CLI_ANSWER)] * 3)
    out, err = converse(*lines)
    assert sent_texts(server) == sent
    assert (out.count("Yes"), err) == (len(sent), "")


@table(
    "line message",
    row("/sav x", UNKNOWN_COMMAND.format("sav", "did you mean /save?"), id="near"),
    row("/x", UNKNOWN_COMMAND.format("x", "see /help"), id="far"),
    row("/retry", "there is no message to send again", id="nothing-to-retry"),
    row("/set top_k", """a parameter is NAME=JSON, like top_k=5 or stop='["END"]'; got 'top_k'""",
        id="parameter-without-a-value"),
    row("/load /no", "/load FILE: [Errno 2] No such file or directory: '/no'", id="no-file"),
    row("/save", "/save FILE: [Errno 2] No such file or directory: ''", id="no-name"),
    row(NO_UTF_8, "this is not utf-8 text", id="not-utf-8"),
    row("caf\udce9", "the request holds a lone surrogate, ", id="c-locale"),
)  # fmt: skip
def test_cli_conversation_survives_mistakes(converse, server, line, message):
    server.script(sse(CLI_ANSWER))
    out, err = converse(line, "Hello")
    assert err.startswith(f"vllm-provider: {message}")
    assert (out.count("Yes"), err.count("\n")) == (1, 1)
    assert sent_texts(server) == [["Hello"]]


def test_cli_conversation_forgets_a_failed_turn(converse, server):
    server.script(sse(CLI_ANSWER), sse(CLI_ANSWER, done=False), *[sse(CLI_ANSWER)] * 2)
    _out, err = converse("a", "b", "/retry", "c")
    assert err.count("\n") == 1
    assert err.startswith("vllm-provider: the stream ended without [DONE]: ")
    retried = [["a", "Yes", "b"]] * 2
    assert sent_texts(server) == [["a"], *retried, ["a", "Yes", "b", "Yes", "c"]]


@pytest.mark.usefixtures("interruptible")
@table("event text sent", row(CLI_ANSWER, "Yes", ["a", "Yes", "b"]), row(CLI_THOUGHT, "Hm", ["b"]))
def test_cli_conversation_keeps_the_text_of_a_stopped_reply(converse, server, event, text, sent):
    def interrupt(connection):
        connection.send(part_of(event))
        wait_until(lambda: converse.is_shown(text), NEVER)
        has_left = False
        while not has_left:  # Python loses a signal that comes just before it waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            has_left = connection.sleep_until_closed(IN_TIME)

    server.script(interrupt, sse(CLI_ANSWER))
    converse("a", "b")
    server.aborted.get(timeout=NEVER)
    assert sent_texts(server)[1] == sent


def test_cli_conversation_help_and_parameters(converse, server, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    server.script(*[sse(CLI_ANSWER)] * 3)
    lines = ("a", "/set top_k=1", "b", "/set top_k=null", "c", "/set logprobs=1", "What is 2+2?")
    options = "--system 'Be brief.' --param top_k=5 --stats"
    out, err = converse("/help", *lines, options=options)
    commands = {"/clear", "/retry", "/save", "/load", "/system", "/set", "/quit"}
    assert set(re.findall(r'(?m)^(/\w+|""")', out)) == {*commands, '"""'}
    assert [request.body.get("top_k") for request in server.requests] == [5, 1, None, None]
    assert sent_texts(server)[0] == ["Be brief.", "a"]
    assert err.count("s to first token, ") == 4
    assert re.search(r"Yes\n.*\d\(\d\.\d\d\)", out, re.DOTALL)


def test_cli_conversation_on_disk(converse, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    server.script(*[sse(CLI_ANSWER)] * 3)
    converse("/system Be brief.", "a", "/save ~/talk.json")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]

    converse("other", "/load ~/talk.json", "/retry", "b")
    assert server.requests[-1].body["messages"] == [*saved, {"role": "user", "content": "b"}]


@table("text", "{", "5", '{"role": "user"}', "[1]", row("[" * 100_000, id="too-deep"))
def test_cli_conversation_refuses_a_file_that_holds_none(converse, server, tmp_path, text):
    (tmp_path / "talk.json").write_text(text)
    server.script(*[sse(CLI_ANSWER)] * 2)
    _, err = converse("a", f"/load {tmp_path / 'talk.json'}", "b")
    assert err.startswith("vllm-provider: /load FILE: ")
    assert sent_texts(server)[1] == ["a", "Yes", "b"]


@table("option", "--json", f"--html {os.devnull}")
def test_cli_chat_with_a_result_to_write_is_no_conversation(cli, monkeypatch, option):
    monkeypatch.setattr(sys, "stdin", Terminal("What is 2+2?"))
    with cli_terminal(monkeypatch, "stdout") as screen:
        assert cli(f"chat {option}")[0] == 0
    assert "2 + 2 = 4" in screen.text()


def test_cli_ctrl_c_in_every_state_of_a_conversation(server):
    stalls = [stall(part_of(one), timeout_s=NEVER) for one in (CLI_ANSWER, CLI_THOUGHT)]
    server.script(*stalls, stall(timeout_s=NEVER), sse(CLI_ANSWER))
    with cli_conversation(*cli_words(server, "")) as screen:
        screen.read("> ")
        screen.type("typed")
        screen.read("typed")
        screen.interrupt("\n> ")
        for count, (text, shown) in enumerate([("1st", "Yes"), ("2nd", "Hm"), ("3rd", "3rd")], 1):
            screen.type(f"{text}\n")
            screen.read(shown)
            wait_until(lambda count=count: len(server.requests) == count, NEVER)
            assert "^C\n" in screen.interrupt("> ")
            server.aborted.get(timeout=NEVER)

        screen.type("last\n")
        screen.read("Yes\n> ")
        screen.type("\x04")
    assert sent_texts(server)[-1] == ["1st", "Yes", "last"]


# ---- Command line: misuse, failures, streams and Ctrl-C ---------------------

needs_dev_full: Final = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs it")
while_printing: Final = table(
    "command", row("models", id="at-the-end"), row("complete 'What is 2+2?'", id="at-a-piece")
)
NO_PAGE: Final = reply(200, "<html>\nhi\n</html>", {"Content-Type": "text/html"})
NO_SERVER: Final = f"no connection to {DEAD_URL}: connection refused; is vLLM running? (curl "
CLI_ERROR: Final = error_payload("Internal server error", 500)
BAD_PARAM: Final = "a parameter is NAME=JSON, like "
UNKNOWN_OPTION: Final = "unrecognized option:"
BAD_WAIT: Final = "--wait must be a number of seconds of at least 0, got "
BAD_KEY_PLACE: Final = "base_url must not hold a user name or password; a key goes under api_key"


@table(
    "command message",
    # While arguments are read
    row("", "the following arguments are required: COMMAND", id="no-command"),
    row("version", "argument COMMAND: invalid choice: 'version'", id="unknown-command"),
    row("chat x --bogus", f"{UNKNOWN_OPTION} --bogus"), row("chat x -q", f"{UNKNOWN_OPTION} -q"),
    row("chat x --temprature 0", f"{UNKNOWN_OPTION} --temprature; did you mean --temperature?",
        id="misspelled"),
    row("--max-token=5 --top_p 1 chat x", f"{UNKNOWN_OPTION} --top_p; did you mean --top-p?",
        id="misspelled-before-the-command"),
    row("chat x --context y", "--context is not an option of chat", id="of-another-command"),
    row("complete x --system y", "--system is not an option of complete", id="system"),
    row("--wait 5 chat x", "--wait is not an option of chat", id="of-another-before-the-command"),
    row("models -i x", "--input-file is not an option of models", id="of-another-in-short"),
    row("health --wait x", "argument --wait: invalid float value: 'x'", id="not-a-number"),
    row("chat --seed 1.5", "argument --seed: invalid int value: '1.5'", id="not-an-integer"),
    row("chat x y", "unexpected argument: 'y'; are quotes missing?", id="text-without-quotes"),
    row("chat x -- y", "unexpected argument: ", id="text-without-quotes-after-a-double-dash"),
    # Afterwards
    row("chat x --param top_k", BAD_PARAM, id="param"), row("chat x --param =5", BAD_PARAM, id="="),
    row("chat x --param stop=END", BAD_PARAM, id="param-that-is-not-json"),
    row(f"chat x --param stop={'[' * 100_000}", BAD_PARAM, id="param-that-is-too-deep"),
    row("chat x --param 'system=\"y\"'", BAD_PARAM, id="the-system-message-twice"),
    row("chat x --param messages=[]", BAD_PARAM), row("chat x --param config=1", BAD_PARAM),
    row("complete x --param prompt=1", BAD_PARAM, id="the-text-twice"),
    row("chat x --param stream=true", "stream is not a parameter here", id="stream"),
    row("chat x --param top_p=NaN", "the request is not JSON", id="nan"),
    row("models --timeout 0", "timeout must be a positive number of seconds", id="timeout"),
    row("models --base-url x:1", "base_url must be a URL like http://", id="no-scheme"),
    row("models --base-url http://.example", "base_url must be ", id="no-host"),
    row(f"models --base-url http://me:{CLI_KEY}@host", BAD_KEY_PLACE, id="password-in-the-url"),
    row(f"models --api-key “{CLI_KEY}”", "api_key must be printable ASCII; ", id="key-in-quotes"),
    row("health --wait nan", f"{BAD_WAIT}nan"), row("health --wait -1", f"{BAD_WAIT}-1.0"),
    row("run-batch -i x", "run-batch needs -i FILE"), row("run-batch -o x", "run-batch needs -i "),
    row("score x --context y --choice z", "the context of the choices is TEXT or ", id="contexts"),
)  # fmt: skip
def test_cli_misused(cli, server, command, message):
    code, out, err = cli(command)
    *usage, line = err.splitlines()
    assert (code, out, server.requests) == (2, "", [])
    start = r"vllm-provider( \w+)?: error: " if usage else "vllm-provider: "
    assert re.match(start + re.escape(message), line)
    assert CLI_KEY not in err


@table(
    "command steps out message",
    row("chat x --base-url {url}/foo", [], "", 
        "404 'Not Found': POST {url}/foo/v1/chat/completions; is base_url the", id="wrong-path"),
    row("chat x --model no", [], "", "model not found: 'no'; the server has parrot", id="model"),
    row("complete x", [reply(401, {"error": "Unauthorized"})], "", "401 'Unauthorized': POST {url}",
        id="wrong-key"),
    row(f"complete '{'x ' * 3000}'", [], "", "the prompt does not fit: ", id="prompt-too-long"),
    row("complete x", [sse(CLI_TEXT, done=False)], " a\n",
        "the stream ended without [DONE]: POST {url}/v1/completions; ", id="broken-stream"),
    row("complete x", [sse(CLI_TEXT, CLI_ERROR)], " a\n", "500 'Internal server error': POST {url}",
        id="error-in-the-stream"),
    row("models", [NO_PAGE], "", "not the JSON vLLM sends: GET {url}/v1/models: ", id="not-vllm"),
    row("health", [reply(503)], "", "503 (no message): GET {url}/health", id="not-healthy"),
    row("complete x --timeout 0.3", [stall()], "", "no reply within 0.3 s: POST ", id="silent"),
    row(f"chat x --base-url {DEAD_URL}", [], "", NO_SERVER, id="dead"),
    row(f"health --wait 0.3 --base-url {DEAD_URL}", [], "", NO_SERVER, id="dead-all-the-while"),
    row("complete 'What is 2+2?' --html /no/page", [], " 4\n",
        "[Errno 2] No such file or directory: '/no/page'", id="html-that-cannot-be-written"),
)  # fmt: skip
def test_cli_fails_with_one_line(cli, server, command, steps, out, message):
    server.script(*steps)
    code, shown, err = cli(f"--api-key {CLI_KEY} {command}")
    assert (code, shown, err.count("\n")) == (1, out, 1)
    assert err.startswith(f"vllm-provider: {message.replace('{url}', server.url)}")
    assert CLI_KEY not in err


def test_cli_warnings_are_shown_but_for_retries(cli, monkeypatch):
    monkeypatch.setattr(vllm_provider.logger, "filters", [])
    monkeypatch.setattr(vllm_provider.logger, "hasHandlers", lambda: False)
    assert cli("models")[0] == 0
    for text, is_shown in (("retry 1 of 3", False), ("max_token: did you mean", True)):
        assert bool(vllm_provider.logger.filter(logging.makeLogRecord({"msg": text}))) == is_shown


@contextlib.contextmanager
def pipe_without_reader() -> Iterator[Any]:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        yield pipe


@needs_dev_full
@while_printing
def test_cli_a_full_disk_is_one_line(cli, server, monkeypatch, command):
    line = f"vllm-provider: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n"
    with open("/dev/full", "w", encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert cli(command) == (1, "", line)
    with open("/dev/full", "wb") as full_bytes:
        words = cli_words(server, command)
        assert cli_output(*words, stdout=full_bytes) == (1, "", line)


@while_printing
def test_cli_other_things_as_standard_output(cli, monkeypatch, command):
    with pipe_without_reader() as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert cli(command) == (0, "", "")
    with contextlib.redirect_stdout(io.StringIO()) as out:  # it has no descriptor
        assert cli(command) == (0, "", "")
    assert out.getvalue()


@table(
    "shell command code out",
    row("<&-", "complete 'What is 2+2?'", 0, " 4\n", id="stdin-beside-an-argument"),
    row("<&-", "complete", 2, "", id="stdin"),
    row("0>/dev/null", "complete", 2, "", id="stdin-for-writing"),
    row("0>/dev/null", "complete 'What is 2+2?'", 0, " 4\n", id="stdin-for-writing-unneeded"),
    row(">&-", "models", 0, "", id="stdout"),
    row("2>&-", "models --model", 2, "", id="stderr"),
    row("<&- >&- 2>&-", "chat 'What is 2+2?'", 0, "", id="all"),
    row("2>/dev/full", "complete x --model no", 1, "", marks=needs_dev_full, id="stderr-full"),
)
def test_cli_closed_streams(server, shell, command, code, out):
    python = [sys.executable, str(CLI_MODULE), *cli_words(server, command)]
    ended = subprocess.run(
        ["sh", "-c", f'"$@" {shell}', "sh", *python], capture_output=True, check=False, text=True,
        timeout=NEVER, env=cli_environment(),
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (code, out)
    assert "Traceback" not in ended.stderr


@table("command code", row("complete x", 0), row("complete", 2))
def test_cli_streams_that_do_not_exist(cli, monkeypatch, command, code):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli(command)[0] == code
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def test_cli_stdin_for_writing_and_stderr_without_a_reader(cli, monkeypatch):
    with open(os.devnull, "w") as stdin, pipe_without_reader() as pipe:
        monkeypatch.setattr(sys, "stdin", stdin)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", pipe)
            assert cli("complete")[0] == 2


@pytest.mark.usefixtures("interruptible")
@table(
    "command event shown",
    row("complete x", part_of(CLI_TEXT), b" a", id="in-mid-stream"),
    row("chat x --json", part_of(CLI_ANSWER), b"", id="in-mid-stream-with-nothing-shown"),
    row("complete x --no-stream", b"", b"", id="before-the-reply"),
)
def test_cli_ctrl_c_stops_the_server(server, command, event, shown):
    server.script(stall(event, timeout_s=NEVER))
    with cli_process(*cli_words(server, command), stdin=subprocess.DEVNULL) as process:
        wait_until(lambda: server.running)
        assert process.stdout.read(len(shown)) == shown
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(IN_TIME)
        assert (process.returncode, *process.communicate()) == (130, b"", b"")
        server.aborted.get(timeout=NEVER)


def test_cli_ctrl_c_anywhere(cli, monkeypatch):
    def interrupted(_client):
        raise KeyboardInterrupt

    monkeypatch.setattr(VLLMClient, "models", interrupted)
    assert cli("models") == (130, "", "")
    with cli_terminal(monkeypatch, "stderr") as screen:
        assert cli("models")[0] == 130
    assert screen.text() == "\n"


@pytest.mark.live
def test_cli_live(cli):
    where = f"--base-url {VLLM_LIVE_URL}"
    command = f"complete '{PROMPT}' --logprobs 2 {where}"
    assert cli(command) == (0, " Paris.\n", "")
    (choice,) = json.loads(cli(f"{command} --json")[1])["choices"]
    assert choice["logprobs"][0]["logprob"] > math.log(0.9)
    assert {len(token["top"]) for token in choice["logprobs"]} == {2}
    assert cli(f"chat 'What is 2+2?' {where}") == (0, *CLI_SUM)
    assert cli(f"models {where}") == (0, "parrot\t2048 tokens\n", "")
    assert cli(f"health {where}") == (0, f"{VLLM_LIVE_URL} is healthy\n", "")


# ---- Module: README ---------------------------------------------------------

README: Final = CLI_MODULE.with_name("README.md").read_text(encoding="utf-8")
README_URL: Final = "http://localhost:8000"
in_quotes: Final = re.compile(r"`([^`]+)`").findall


def readme_rows(section: str) -> list[list[str]]:
    """Return the cells of the rows that begin with a name, in the tables of a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if re.match(r"\| (· )*`", line)]
    return [[cell.strip() for cell in line[1:-1].split(" | ")] for line in lines]


def shown_default(spec: Any) -> str:
    if spec.name == "base_url":
        return "required"
    value = {} if spec.default is dataclasses.MISSING else spec.default
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, str) else str(value)


def test_readme_has_each_setting_with_its_default_and_environment_variable():
    shown = {}
    for names, default, meaning in readme_rows("Settings") + readme_rows("Amplifier"):
        keys = in_quotes(names)
        defaults = in_quotes(default) or [default]
        if len(defaults) == 1:  # that of the row
            defaults *= len(keys)
        shown |= zip(keys, defaults, strict=True)
        named = re.findall(r"env `(\w+)`", meaning)
        by_name = {spec.name: spec.metadata.get("env") for spec in fields(VLLMConfig)}
        assert {by_name[key] for key in keys} - {None, ""} <= {*named}
        assert meaning
    assert shown == {spec.name: shown_default(spec) for spec in fields(VLLMConfig)}


def test_readme_has_each_error_under_its_parents():
    path, parents = ["Exception"], {}
    for cell, when, what_to_do in readme_rows("Errors"):
        depth = cell.count("· ") + 1
        name, *others = in_quotes(cell)
        parents[name] = [path[depth - 1], *others]
        path[depth:] = [name]
        assert when
        assert what_to_do
    public = [getattr(vllm_provider, name) for name in vllm_provider.__all__]
    errors = [one for one in public if isinstance(one, type) and issubclass(one, VLLMError)]
    assert parents == {one.__name__: [base.__name__ for base in one.__bases__] for one in errors}


def test_readme_has_each_name_each_option_and_the_set_up_commands(cli_main):
    methods = [name for name in dir(VLLMClient) if not name.startswith("_")]
    words = set(re.findall(r"\w+", README))
    assert {*vllm_provider.__all__, *methods} - words == set()
    shown = set(re.findall(r"--[a-z][a-z-]+", README))
    for command in CLI_COMMANDS:
        assert set(re.findall(r"--[a-z][a-z-]+", cli_main(command, "--help")[1])) <= shown
    for packages, test in (
        ("requests", "python test_vllm_provider.py"),
        ("-e '.[test]'", "pytest"),
    ):
        assert f"\npip install {packages} && {test} " in README


# What README shows runs in one folder and one namespace, from top to bottom: its Python as a
# reader would paste it into one session, its `sh` blocks as a script. `# ->` marks their output.


def readme_examples() -> list[tuple[str, str]]:
    blocks = re.findall(r"```(python|sh)\n(.*?)```", README, re.DOTALL)
    return [(kind, code) for kind, code in blocks if not code.startswith("# needs ")]


def without_fractions(text: str) -> list[str]:  # in which the stand-in differs from a real model
    return re.sub(r"\d+\.\d+(e-\d+)?", "0.0", text).strip("\n").splitlines()


@pytest.fixture
def run_readme(cli_main, monkeypatch, tmp_path, capsys):
    """Return a function that runs README's examples against a server and compares their output."""
    script = tmp_path / "bin" / "vllm-provider"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -W error {CLI_MODULE} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Path("questions.csv").write_text("question\nWhat is 2+2?\nHello\n")

    def run(url):
        monkeypatch.setenv("VLLM_BASE_URL", url)
        names = {"__name__": "__readme__"}
        for kind, code in readme_examples():
            if kind == "python":
                exec(compile(code.replace(README_URL, url), "README.md", "exec"), names)
                printed = capsys.readouterr().out
            else:
                command = ["bash", "-euo", "pipefail", "-c", code.replace(README_URL, url)]
                ended = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
                )
                printed = ended.stdout + ended.stderr
            shown = "\n".join(re.findall(r"(?m)^# -> (.*)$", code))
            assert not shown or without_fractions(printed) == without_fractions(shown), code

    return run


def test_readme_examples_print_what_they_show(run_readme, server):
    assert len(readme_examples()) > 10
    run_readme(server.url)
    answers = ["What is 2+2?,2 + 2 = 4", "Hello,Hello! How can I help you today?"]
    assert Path("answers.csv").read_text().splitlines() == answers
    roles = [one["role"] for one in json.loads(Path("chat.json").read_text())]
    assert roles == ["user", "assistant"]


@pytest.mark.live
def test_readme_examples_print_what_they_show_live(run_readme, monkeypatch):
    monkeypatch.setattr(Completion, "json", lambda reply, model: model(name="Paris"))
    run_readme(VLLM_LIVE_URL)


@table("kept", 1, 5, 9)
def test_readme_recipe_goes_on_after_a_broken_stream(connect, server, kept):
    code = next(code for _, code in readme_examples() if "def complete_all" in code)
    client = connect(server, temperature=0)
    names = {"client": client}
    exec(compile(code, "README.md", "exec"), names)
    whole = client.complete("Once upon a time", max_tokens=30).text

    with client.stream_complete("Once upon a time", max_tokens=30, return_token_ids=True) as stream:
        for _ in range(kept):
            next(stream)
        first = stream.completion.choices[0]

    ids = {"token_ids": first.token_ids, "prompt_token_ids": first.prompt_token_ids}
    server.script(send_and_close(part_of(text_event(first.text, **ids))))
    assert names["complete_all"]("Once upon a time", 30) == whole
    prompt = server.requests[-1].body["prompt"]
    assert prompt == [*first.prompt_token_ids, *first.token_ids]

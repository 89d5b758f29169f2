"""Uses models behind an OpenAI-compatible endpoint. A hosted model is named `openai:URL#MODEL`, or
`openai:URL#MODEL?in=0.15&out=0.6` with prices.

Prices are in dollars per million prompt tokens (`in`) and answer tokens (`out`). Questions are sent to another machine
unless the URL is on the loopback interface. The API key is read from the environment variable OPENAI_API_KEY and is
never saved.
"""

import dataclasses
import hashlib
import http.client
import json
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from common import files
from common.errors import UserError, reason
from common.numbers import integer
from common.types import Json

if TYPE_CHECKING:
    from infer.lm import LM, Prompt

PREFIX, KEY = "openai:", "OPENAI_API_KEY"
LOCAL = ("127.0.0.1", "localhost", "::1")
AT_ONCE = 8  # concurrent requests
TRIES = 4  # attempts per request
WAIT, LONGEST = 0.5, 20.0  # seconds before the second attempt (doubled before each further attempt), and the maximum
TIMEOUT = 120  # maximum seconds without receiving a byte
BODY = 1 << 24  # maximum bytes of a reply
AGAIN = (408, 409, 425, 429)  # HTTP statuses, in addition to 5xx, after which a request is sent again


class Reply(NamedTuple):
    """An answer and its cost. The token counts come from the endpoint, and are None if the endpoint does not send
    them."""

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    finished: bool  # False if the answer was cut at the maximum number of tokens


class Used(NamedTuple):
    """The total cost of several replies. Unknown values are None."""

    requests: int
    prompt_tokens: int | None
    completion_tokens: int | None
    usd: float | None


@dataclasses.dataclass(frozen=True)
class Hosted:
    """A model that is reached over HTTP at `url`, such as https://HOST/v1. `usd` contains two prices in dollars: per
    million prompt tokens and per million answer tokens."""

    name: str
    url: str
    model: str
    usd: tuple[float, float] | None = None
    replies: list[Reply] = dataclasses.field(default_factory=list, compare=False)

    def __str__(self) -> str:
        """The cost of all requests so far, in one line."""
        used = self.used()
        tokens = f"{integer(used.prompt_tokens)} prompt + {integer(used.completion_tokens)} answer tokens"
        where = f"questions are sent to {urlsplit(self.url).hostname}" if self.leaves else "on this machine"
        return f"hosted: {used.requests:,} requests · {tokens} · {dollars(used.usd)} · {where}"

    @property
    def leaves(self) -> bool:
        """Whether questions are sent to another machine."""
        return urlsplit(self.url).hostname not in LOCAL

    def generate(self, prompts: "Prompt | Sequence[Prompt]", **options: Any) -> list[str]:
        """Returns one answer per prompt. The options are those of `ask`."""
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
        return [reply.text for reply in self.ask([prompts] if one else prompts, **options)]  # type: ignore[list-item]

    def answer(self, questions: str | Sequence[str], **options: Any) -> str | list[str]:
        """Answers one question, or each of several questions."""
        several = [questions] if isinstance(questions, str) else questions
        found = self.generate([[{"role": "user", "content": q}] for q in several], **options)
        return found[0] if isinstance(questions, str) else found

    def ask(
        self, prompts: "Sequence[Prompt]", *, max_new_tokens: int = 64, stop: Sequence[str] = (), seed: int = 0,
        **knobs: float,
    ) -> list[Reply]:  # fmt: skip
        """Returns one reply per prompt. Up to AT_ONCE requests are sent at a time. The reply answers a chat, or
        continues a text.

        `knobs` are the sampling parameters temperature (0: greedy), top_p, top_k and min_p. Equal prompts get different
        seeds. Raises UserError if a request fails.
        """
        seen: Counter[str] = Counter()
        bodies = []
        for prompt in prompts:
            chat = not isinstance(prompt, str)
            body = {"model": self.model, "messages" if chat else "prompt": list(prompt) if chat else prompt}
            body |= {"max_tokens": max_new_tokens, "temperature": 0} | knobs | ({"stop": list(stop)} if stop else {})
            if body["temperature"]:
                written = json.dumps(prompt)
                digest = hashlib.blake2b(f"{seed} {seen[written]} {written}".encode(), digest_size=4).digest()
                body["seed"], seen[written] = int.from_bytes(digest, "big") >> 1, seen[written] + 1
            bodies.append(("/chat/completions" if chat else "/completions", body))
        stopped, failed = threading.Event(), []

        def reply(path: str, body: Json) -> Reply:
            try:
                return self._reply(path, body, stopped)
            except UserError as e:
                failed.append(e)
                stopped.set()  # set here, so that this thread does not send another prompt, which would cost money
                raise

        with ThreadPoolExecutor(AT_ONCE) as pool:
            futures = [pool.submit(reply, path, body) for path, body in bodies]
            try:
                found = [future.result() for future in futures]
            except BaseException as e:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise (failed[0] if isinstance(e, UserError) else e) from None
        self.replies.extend(found)
        return found

    def used(self, replies: Sequence[Reply] | None = None) -> Used:
        """The cost of `replies`, or of all replies so far if `replies` is None."""
        replies = self.replies if replies is None else replies
        read, written = (_sum(r[i] for r in replies) for i in (1, 2))
        known = self.usd is not None and read is not None and written is not None
        usd = (read * self.usd[0] + written * self.usd[1]) / 1e6 if known else None  # type: ignore[operator,index]
        return Used(len(replies), read, written, usd)

    def _reply(self, path: str, body: Json, stopped: threading.Event) -> Reply:
        start = time.perf_counter()
        found = self._sent(path, body, stopped)
        usage = found.get("usage")
        counts = [usage.get(f"{kind}_tokens") if isinstance(usage, dict) else None for kind in ("prompt", "completion")]
        try:
            [choice] = found["choices"]
            text = choice["message"]["content"] if "messages" in body else choice["text"]
            if not isinstance(text, str | None):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            raise self._error(
                f"the reply has no answer: {json.dumps(found)[:200]}", "the reply must be in OpenAI's format"
            ) from None
        read, written = (x if type(x) is int and x >= 0 else None for x in counts)
        return Reply(text or "", read, written, time.perf_counter() - start, choice.get("finish_reason") != "length")

    def _sent(self, path: str, body: Json, stopped: threading.Event) -> Json:
        """Sends a request and returns the reply. The request is sent again if the endpoint is busy or unreachable."""
        key = os.environ.get(KEY, "")
        request = urllib.request.Request(self.url + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")
        problem = ""
        for attempt in range(TRIES):
            if stopped.is_set():
                break
            wait = min(WAIT * 2**attempt, LONGEST)
            try:
                with self._opener.open(request, timeout=TIMEOUT) as reply:
                    text = reply.read(BODY + 1)
                found = files.strict(text.decode())
                if len(text) > BODY or not isinstance(found, dict):
                    raise ValueError("not a JSON object")
                return found
            except urllib.error.HTTPError as error:
                problem = _refused(error)
                if error.code not in AGAIN and error.code < 500:
                    fix = f"set {KEY}" if error.code in (401, 403) else ""
                    raise self._error(problem, fix) from None
                wait = min(_seconds(error.headers.get("Retry-After"), wait), LONGEST)
            except ValueError as error:  # also raised for a reply that is not UTF-8
                raise self._error(f"the reply cannot be read: {reason(error)}") from None
            except (OSError, http.client.HTTPException) as error:
                problem = f"no reply: {reason(getattr(error, 'reason', None) or error)}"  # type: ignore[arg-type]
                if isinstance(getattr(error, "reason", None), ssl.SSLError):
                    raise self._error(problem) from None
            stopped.wait(wait if attempt + 1 < TRIES else 0)
        raise self._error(f"{problem} ({TRIES} attempts)", "check that the endpoint is running and the URL is right")

    @property
    def _opener(self) -> urllib.request.OpenerDirector:
        proxies = None if self.leaves else {}  # a proxy cannot reach the loopback interface of this machine
        return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))

    def _error(self, what: str, fix: str = "") -> UserError:
        return UserError(what, f"{PREFIX}{self.url}#{self.model}", fix)


def is_hosted(name: str | Path) -> bool:
    return str(name).startswith(PREFIX)


def parse(name: str) -> Hosted:
    """Parses the name of a hosted model, `openai:URL#MODEL[?in=DOLLARS&out=DOLLARS]`. Raises UserError if the name is
    invalid."""
    fix = "write openai:https://HOST/v1#MODEL?in=0.15&out=0.6"
    url, _, rest = name.removeprefix(PREFIX).partition("#")
    model, _, options = rest.partition("?")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not model or parts.query:
        raise UserError("the name of a hosted model needs a URL and a model", name, fix)
    if parts.username or parts.password:
        raise UserError(
            "the URL contains a password, which would be recorded", f"{PREFIX}...@{parts.hostname}", f"set {KEY}"
        )
    prices = dict(parse_qsl(options, keep_blank_values=True))
    if prices and (prices.keys() != {"in", "out"} or not all(re.fullmatch(r"\d+(\.\d+)?", p) for p in prices.values())):
        raise UserError(f"the options {options!r} are not two prices in dollars per million tokens", name, fix)
    usd = (float(prices["in"]), float(prices["out"])) if prices else None
    return Hosted(name, url.rstrip("/"), model, usd)


def load(name: str | Path, adapter: str | Path | None = None, *, strict: bool = False) -> "LM | Hosted":
    """Loads a model. Returns a Hosted if the name begins with `openai:`, and otherwise the LM that infer.models.load
    returns. Raises UserError if the model cannot be loaded."""
    if is_hosted(name):
        if adapter:
            raise UserError(
                "a hosted model cannot load an adapter", str(adapter), "serve the adapter with python -m tools.serve"
            )
        return parse(str(name))
    from infer import models  # imports jax

    return models.load(name, adapter=adapter, strict=strict)


def dollars(x: float | None) -> str:
    return "$ n/a" if x is None else f"${x:.2g}"


def _sum(counts: Any) -> int | None:
    counts = list(counts)
    return None if None in counts else sum(counts)


def _refused(error: urllib.error.HTTPError) -> str:
    """Describes an HTTP error in one line. The message is taken from the body of the reply, which is in OpenAI's error
    format or plain text."""
    text = error.read(1 << 16).decode(errors="replace")
    try:
        found = json.loads(text)
        said = found["error"]["message"] if isinstance(found["error"], dict) else found["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        said = text
    return f"the endpoint answers {error.code}: {' '.join(str(said).split())[:300] or error.reason}"


def _seconds(text: str | None, otherwise: float) -> float:
    """The number of seconds in a Retry-After header, or `otherwise` if the header is missing or contains a date."""
    return float(text) if text and re.fullmatch(r"\d{1,4}", text) else otherwise

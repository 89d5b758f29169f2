"""Implements OpenAI's JSON formats: reads request bodies, and builds response objects."""

import json
import secrets
import time
import uuid
import zlib
from collections import deque
from collections.abc import Collection
from typing import Any, NamedTuple

from common.types import Json
from infer.batch import TOP, Score
from infer.lm import LM
from infer.sample import Knobs
from infer.serve import Refused
from infer.serve.batcher import Request
from infer.serve.messages import turns

CHOICES = 32  # maximum answers per request
STOP = 256  # maximum characters of a stop string


class Field(NamedTuple):
    """A supported parameter of a request, with its type, default, minimum and maximum."""

    kind: type
    default: Any
    least: float = 0
    most: float = 1


BOTH = {
    "max_tokens": Field(int, None, 1, 1 << 62), "n": Field(int, 1, 1, CHOICES), "stream": Field(bool, False),
    "temperature": Field(float, 1.0, 0, 100), "top_p": Field(float, 1.0), "top_k": Field(int, 0, -1, 1 << 30),
    "min_p": Field(float, 0.0), "seed": Field(int, None, -(1 << 63), 1 << 63),
}  # fmt: skip
CHAT = BOTH | {
    "max_completion_tokens": Field(int, None, 1, 1 << 62), "logprobs": Field(bool, False),
    "top_logprobs": Field(int, None, 0, TOP),
}  # fmt: skip
COMPLETION = BOTH | {"max_tokens": Field(int, 16, 1, 1 << 62), "logprobs": Field(int, None, 0, TOP)}
READ = {"model", "stop", "stream_options"}  # parameters that `read` handles separately
LABELS = {
    "user": str,
    "metadata": dict,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
}  # accepted without effect
# Unsupported parameters, each with the values that are accepted because they have no effect. The value null is always
# accepted.
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "length_penalty": (1,),
    "logit_bias": ({},), "best_of": (1,), "echo": (False,), "suffix": ("",), "min_tokens": (0,), "typical_p": (1,),
    "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "parallel_tool_calls": (True, False), "modalities": (["text"],),
    "service_tier": ("auto", "default"), "store": (False,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "skip_special_tokens": (True,), "add_generation_prompt": (True,), "chat_template_kwargs": ({},),
    "reasoning_effort": ("none",), "verbosity": ("medium",), "audio": (), "prediction": (), "web_search_options": (),
    "moderation": (),
}  # fmt: skip
INSTEAD = {
    "response_format": "answers cannot be constrained to JSON: ask for JSON in the prompt",
    "tools": "tools are not passed to the model: describe them in a message",
}


class Asked(NamedTuple):
    """A parsed request."""

    model: str
    chat: bool
    prompts: list[Any]  # one list of messages for a chat, else texts or lists of token ids
    max_tokens: int | None
    n: int
    knobs: Knobs
    seed: int | None
    stop: list[str]
    top: int | None  # number of most likely tokens to list at each position; None: return no log-probabilities
    stream: bool
    usage: bool  # whether a stream ends with the token counts


def read(body: bytes, chat: bool, models: Collection[str]) -> Asked:
    """Parses the body of a chat request or a completion request. Raises Refused if any field is invalid or not
    supported, so that no field is silently ignored."""
    fields, prompt = (CHAT, "messages") if chat else (COMPLETION, "prompt")
    content = {k: v for k, v in object_of(body).items() if v is not None}
    for name, value in content.items():
        if name not in READ and name != prompt and name not in fields:
            _neutral(name, value)
    if "model" not in content:
        raise Refused(400, "name the model", "model")
    if content["model"] not in models:
        message = f"no model {str(content['model'])[:80]!r}; available: {', '.join(models)}"
        raise Refused(404, message, "model", "model_not_found")
    o = {name: _value(name, field, content.get(name)) for name, field in fields.items()}
    prompts = [turns(content.get("messages"))] if chat else _prompts(content.get("prompt"))
    if len(prompts) * o["n"] > CHOICES:
        raise Refused(400, f"a request can have at most {CHOICES} answers", "n", "invalid_value")
    stream_options = content.get("stream_options", {})
    if stream_options and not o["stream"]:
        raise Refused(400, "stream_options requires stream: true", "stream_options")
    return Asked(
        model=content["model"],
        chat=chat,
        prompts=prompts,
        max_tokens=_max_tokens(o),
        n=o["n"],
        knobs=Knobs(float(o["temperature"]), max(o["top_k"], 0), float(o["top_p"]), float(o["min_p"])),
        seed=o["seed"],
        stop=_stop(content.get("stop", [])),
        top=_top(o) if chat else o["logprobs"],
        stream=o["stream"],
        usage=_usage(stream_options),
    )


def ids(lm: LM, prompt: str | list[int]) -> list[int]:
    """The token ids of the prompt in a completion request. The prompt may contain control tokens as text, for example
    if it is a rendered chat."""
    if not isinstance(prompt, str):
        return prompt
    out, prefix = lm.tokenizer.encode(prompt, special=True), list(lm.tokenizer.prefix)
    return out if out[: len(prefix)] == prefix else [*prefix, *out]


def seed(given: int | None, choice: int) -> int:
    """The 31-bit seed for one of the choices (answers) of a request. It is random if the request gives no seed. The
    first choice uses the given seed unchanged if it has at most 31 bits."""
    if given is None:
        return secrets.randbits(31)
    return given if not choice and abs(given) < 1 << 31 else zlib.crc32(f"{given} {choice}".encode()) >> 1


def object_of(body: bytes) -> Json:
    try:
        content = json.loads(body)
        json.dumps(content, ensure_ascii=False).encode()  # raises UnicodeEncodeError for a lone surrogate
    except UnicodeEncodeError:
        raise Refused(400, "a string in the body contains a lone surrogate, which is not a valid character") from None
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise Refused(400, "the body is not a JSON object")
    return content


def _neutral(name: str, value: object) -> None:
    """Raises Refused for an unsupported parameter whose value would change the answer."""
    if name in LABELS:
        if not isinstance(value, LABELS[name]):
            raise Refused(400, f"{name} has the wrong type", name)
        return
    if name not in NEUTRAL:
        raise Refused(400, f"unknown parameter {name[:80]!r}", name[:80], "unknown_parameter")
    if value not in NEUTRAL[name]:
        instead = INSTEAD.get(name, f"leave it out, or send {json.dumps(next(iter(NEUTRAL[name]), None))}")
        raise Refused(400, f"{name} = {json.dumps(value)[:80]} is not supported; {instead}", name, "unsupported_value")


def _value(name: str, field: Field, value: object) -> Any:
    if value is None:
        return field.default
    right = type(value) is field.kind or (field.kind is float and type(value) is int)
    if not right or not field.least <= value <= field.most:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[field.kind]
        bounds = "" if field.kind is bool else f" from {field.least} to {field.most}"
        raise Refused(400, f"{name} must be {kind}{bounds}", name, "invalid_value")
    return value


def _max_tokens(o: Json) -> int | None:
    old, new = o["max_tokens"], o.get("max_completion_tokens")
    if old and new and old != new:
        raise Refused(400, "max_tokens and max_completion_tokens differ: send only one of them", "max_tokens")
    return new or old


def _top(o: Json) -> int | None:
    if o["top_logprobs"] and not o["logprobs"]:
        raise Refused(400, "top_logprobs requires logprobs: true", "top_logprobs")
    return (o["top_logprobs"] or 0) if o["logprobs"] else None


def _stop(value: object) -> list[str]:
    stop = [value] if isinstance(value, str) else value
    right = isinstance(stop, list) and len(stop) <= 4
    if not right or not all(isinstance(s, str) and 0 < len(s) <= STOP for s in stop):
        raise Refused(
            400, f"stop must be a string of 1 to {STOP} characters, or a list of up to 4 such strings", "stop"
        )
    return stop


def _usage(options: object) -> bool:
    unknown = options.keys() - {"include_usage", "include_obfuscation"} if isinstance(options, dict) else {""}
    if unknown or not all(isinstance(v, bool | None) for v in options.values()):
        raise Refused(400, "stream_options must be {include_usage: true or false}", "stream_options")
    if options.get("include_obfuscation"):
        raise Refused(400, "include_obfuscation is not supported", "stream_options", "unsupported_value")
    return bool(options.get("include_usage"))


def _prompts(value: object) -> list[str | list[int]]:
    """Reads the prompts of a completion request: a text, a list of texts, a list of token ids, or a list of lists of
    token ids."""

    def ids(x: object) -> bool:
        return isinstance(x, list) and len(x) > 0 and all(type(i) is int for i in x)

    prompts = [value] if isinstance(value, str) or ids(value) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or ids(p) for p in prompts):
        raise Refused(400, "prompt must be a string, a list of strings, or token ids", "prompt")
    return prompts


# --- answers ---


class Choice:
    """An answer in progress. Converts its tokens to text, and ends the text before the first stop string."""

    def __init__(self, lm: LM, request: Request, stop: list[str]):
        self.request, self.stop = request, stop
        self.tokens = 0  # number of tokens, including the end token and the tokens of a stop string
        self.finish: str | None = None
        self._tokenizer = lm.tokenizer
        self._tokens: deque[int | None] = deque()
        self._pieces = lm.pieces(request.prompt, iter(self._tokens.popleft, None))  # one per token, then the rest
        self._held = ""  # text that is held back, since it may be the beginning of a stop string
        self._sent = 0  # number of characters of the answer before `_held`
        self._scores: deque[tuple[int, Score]] = deque()  # (index of the token's first character in the answer, score)

    def add(self, token: int | None) -> None:
        """Adds the next token of the answer. None ends the answer, and any tokens after the end are ignored."""
        if self.finish:
            return
        self._tokens.append(token)
        if token is None:
            self._held += "".join(self._pieces)
            self.finish = "stop" if self.request.stopped else "length"
        else:
            if self.request.top is not None and token not in self._tokenizer.eos_ids:
                self._scores.append((self._sent + len(self._held), self.request.scores[self.tokens]))
            self.tokens += 1
            self._held += next(self._pieces)
        found = [at for s in self.stop if (at := self._held.find(s)) >= 0]
        if found:
            self._held, self.finish, self.request.cancelled = self._held[: min(found)], "stop", True
            end = self._sent + len(self._held)
            self._scores = deque((at, score) for at, score in self._scores if at < end)

    def take(self) -> tuple[str, list[tuple[int, Score]]]:
        """Returns the new text that cannot belong to a stop string, and the scores of its tokens."""
        ready = len(self._held) if self.finish else len(self._held) - _held_back(self._held, self.stop)
        text, self._held = self._held[:ready], self._held[ready:]
        self._sent += len(text)
        scores = []
        while self._scores and (self.finish or self._scores[0][0] < self._sent):
            scores.append(self._scores.popleft())
        return text, scores

    def logprobs(self, scores: list[tuple[int, Score]], chat: bool) -> dict | None:
        """Converts the log-probabilities in `scores` to OpenAI's format. Returns None if the request did not ask for
        them."""
        if self.request.top is None:
            return None
        if chat:
            content = [self._entry(s.token, s.logp) | {"top_logprobs": [self._entry(*t) for t in s.top]}
                       for _, s in scores]  # fmt: skip
            return {"content": content, "refusal": None}
        # In each entry, the sampled token comes last.
        entries = [[self._entry(*t) for t in [*s.top, (s.token, s.logp)]] for _, s in scores]
        return {
            "tokens": [row[-1]["token"] for row in entries],
            "token_logprobs": [row[-1]["logprob"] for row in entries],
            "top_logprobs": [{e["token"]: e["logprob"] for e in row} for row in entries],
            "text_offset": [at for at, _ in scores],
        }

    def _entry(self, token: int, logp: float) -> dict:
        spelled = self._tokenizer.spelled(token)
        return {"token": spelled.decode(errors="replace"), "logprob": max(logp, -9999.0), "bytes": list(spelled)}


def _held_back(text: str, stop: list[str]) -> int:
    """The number of characters at the end of a text that may be the beginning of a stop string."""
    for n in range(min(len(text), max(map(len, stop), default=0)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stop):
            return n
    return 0


def head(asked: Asked) -> dict:
    """The fields that all objects of a response share."""
    if asked.chat:
        kind = "chat.completion.chunk" if asked.stream else "chat.completion"
    else:
        kind = "text_completion"
    name = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}


def usage(choices: list[Choice], n: int) -> dict[str, int]:
    """Counts the tokens of a request. A prompt is counted once, even if it has several answers."""
    prompt = sum(len(choice.request.prompt) for choice in choices[::n])
    completion = sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole(asked: Asked, choices: list[Choice]) -> dict:
    """The complete response to a request, as one object."""
    out = []
    for i, choice in enumerate(choices):
        text, scores = choice.take()
        said = {"message": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
        logprobs = choice.logprobs(scores, asked.chat)
        out.append({"index": i, **said, "logprobs": logprobs, "finish_reason": choice.finish})
    return head(asked) | {"choices": out, "usage": usage(choices, asked.n)}


def chunks(asked: Asked, i: int, choice: Choice) -> list[dict]:
    """Returns the next entries of `choices` in a streamed response. If choice `i` has new text, one entry contains it.
    If the choice is complete, another entry ends it."""
    text, scores = choice.take()
    out = []
    if text or scores:
        said = {"delta": {"content": text}} if asked.chat else {"text": text}
        out.append({"index": i, **said, "logprobs": choice.logprobs(scores, asked.chat), "finish_reason": None})
    if choice.finish:
        end = {"delta": {}} if asked.chat else {"text": ""}
        out.append({"index": i, **end, "logprobs": None, "finish_reason": choice.finish})
    return out

"""Answers clients' requests, which may come from any thread, by continuous batching (infer.batch)."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from common.errors import UserError
from infer.batch import Batch
from infer.batch import Request as Asked
from infer.generate import check, row_keys
from infer.lm import LM
from infer.sample import Knobs
from model.net.transformer import virtual_tokens


class Full(Exception):
    """Raised when the queue of waiting requests is full, or the server is closing."""


Item = int | BaseException | None  # a token, None after the last token, or an error that ended the answer early


class Request(Asked):
    """A client's request. Iterating over it yields the tokens of its answer, and waits for each of them. If an error
    ends the answer early, the error is raised.

    If `put` is given, the batcher's thread passes each token to `put`, and the request must not be iterated over.
    """

    def __init__(self, *args: Any, put: Callable[[Item], None] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._out: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._put = put or self._out.put

    def __iter__(self) -> Iterator[int]:
        while (item := self._out.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def add(self, token: int, logp: float) -> bool:
        done = super().add(token, logp)
        self._put(token)
        if done:
            self.end()
        return done

    def end(self, error: BaseException | None = None) -> None:
        self._put(error)


class Batcher:
    """A batch of `rows` rows, and a queue of up to `waiting` requests that wait for a free row. A prompt and its answer
    together have at most `length` tokens.

    `submit` may be called from any thread. Tokens are computed by `step`, or by `run` in a separate thread.
    """

    def __init__(self, lm: LM, rows: int = 8, length: int = 1024, waiting: int = 64):
        self.lm, self.length, self.limit = lm, min(length, lm.config.context), waiting
        adapters = lm.store.adapters if lm.store else ()
        # This raises UserError if the model has no tokenizer.
        self.ends = {name: lm.speaking(name).tokenizer.eos_ids for name in (None, *adapters)}
        columns = self.length + virtual_tokens(lm.params)
        params = None if lm.store else lm.unrolled
        self.batch = Batch(lm.model, params, rows, columns, store=lm.store)
        self.waiting: deque[Request] = deque()
        self.changed = threading.Condition()
        self.closed = False

    @property
    def rows(self) -> Sequence[Asked | None]:
        return self.batch.rows

    def submit(
        self, prompt: list[int], *, max_new_tokens: int, adapter: str | None = None, knobs: Knobs | None = None,
        seed: int = 0, top: int | None = None, put: Callable[[Item], None] | None = None,
    ) -> Request:  # fmt: skip
        """Queues a request. Raises UserError if the request cannot be answered, and Full if too many requests are
        waiting."""
        check(self.lm.model, self.lm.params, [prompt], max_new_tokens)
        if len(prompt) + max_new_tokens > self.length:
            what = f"{len(prompt)} prompt tokens + {max_new_tokens} new tokens exceed the {self.length} tokens of a row"
            raise UserError(what, "prompt", "shorten the prompt or ask for fewer tokens")
        if adapter is not None and adapter not in self.names:
            raise UserError(f"no adapter {adapter!r}", "adapter", f"known: {', '.join(self.names) or 'none'}")
        key, ends = row_keys([prompt], seed)[0], self.ends[adapter]
        request = Request(prompt, max_new_tokens, key, adapter=adapter, knobs=knobs, ends=ends, top=top, put=put)
        with self.changed:
            if self.closed or len(self.waiting) >= self.limit:
                raise Full("the server is closing" if self.closed else f"{self.limit} requests are waiting already")
            self.waiting.append(request)
            self.changed.notify()
        return request

    @property
    def names(self) -> list[str]:
        """The names of the adapters."""
        return list(self.lm.store.adapters) if self.lm.store else []

    def run(self) -> None:
        """Until `close` is called, calls `step` whenever there are requests. An error in a step ends every request."""
        error: BaseException | None = None
        try:
            while not self.closed:
                with self.changed:
                    self.changed.wait_for(lambda: self.closed or self.waiting or any(self.rows))
                self.step()
        except BaseException as e:
            error = e
            raise
        finally:
            self.close()
            for request in [*self.rows, *self.waiting]:
                if isinstance(request, Request):
                    request.end(error or Full("the server is closing"))

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def step(self) -> None:
        """Admits waiting requests to the batch, then samples a token for every row."""
        while requests := self._next():
            self.batch.plan(requests)
            self.batch.join(requests)
        self.batch.step()

    def _next(self) -> list[Request]:
        """Takes the next waiting requests that have the same prompt and adapter, as long as there is a free row for
        each, and space for the adapter."""
        with self.changed:
            for request in [r for r in self.waiting if r.cancelled]:
                self.waiting.remove(request)
                request.end()
            found: list[Request] = []
            while (
                self.waiting
                and self.waiting[0].asked == (found or self.waiting)[0].asked
                and self.batch.fits([*found, self.waiting[0]])
            ):
                found.append(self.waiting.popleft())
            return found

"""A language model together with its tokenizer. The input is text, and the output is text or log-probabilities."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from common.errors import UserError
from common.types import Json
from data import examples
from data.text import chat
from data.text.tokenizer import Tokenizer
from infer.generate import answer, needs_causal, requests, stream, unrolled
from infer.prefix import Prefix, Prefixes, Reader
from infer.prefix import Prompt as Ids
from infer.sample import Knobs
from infer.shapes import batches, bucket
from model import heads
from model.config import ModelConfig
from model.net import head
from model.net.kv_cache import Cache
from model.net.transformer import Transformer, virtual_tokens
from model.weights import Params

if TYPE_CHECKING:  # not imported at run time: it imports Pallas, which would double the total import time
    from infer.serve.store import Store

Message = Json
Prompt = str | Sequence[Message] | Sequence[int]  # a text or token ids to continue, or a chat to answer

WINDOW = 1024  # maximum number of scored tokens per window in `loss`
BATCH_TOKENS = 4096  # maximum number of tokens per forward pass when texts are scored


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A model, its parameters and its tokenizer.

    A prompt is a text to continue, or a list of messages to answer. Messages are formatted by the tokenizer's chat
    template. The first call that generates text makes a second copy of the layers, which is unrolled for decoding.
    """

    model: Transformer
    params: Params
    tokenizer: Tokenizer
    store: "Store | None" = None  # adapters, of which each prompt can use one; `params` then belong to their base model
    tokenizers: Mapping[str, Tokenizer] = dataclasses.field(default_factory=dict)  # {adapter: its own tokenizer}

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @functools.cached_property
    def prefixes(self) -> Prefixes:
        """The cache of the prefixes that several prompts share."""
        return Prefixes()

    @functools.cached_property
    def unrolled(self) -> Params:
        return unrolled(self.model, self.params)

    def speaking(self, adapter: str | None) -> "LM":
        """Returns this model with the tokenizer and the chat template of an adapter."""
        own = self.tokenizers.get(adapter or "")
        return self if own is None else dataclasses.replace(self, tokenizer=own)

    def _speakers(self, adapters: Sequence[str | None], prompts: int) -> list["LM"]:
        """Returns, for each prompt, this LM with the tokenizer of the prompt's adapter."""
        if adapters and len(adapters) != prompts:
            raise UserError(
                f"{len(adapters)} adapters for {prompts} prompts", "adapters", "name one per prompt, or none"
            )
        return [self.speaking(adapter) for adapter in adapters or [None] * prompts]

    def _serving(self, adapters: Sequence[str | None]) -> dict[str, Any]:
        """Returns the arguments for infer.generate that select which parameters to use: those of the base model or of
        the given adapters."""
        if any(adapters) and not self.store:
            raise UserError("the model was loaded without adapters to choose from", "adapters", "use infer.load_many")
        return {"params": None if self.store else self.unrolled, "store": self.store, "prefixes": self.prefixes}

    # --- text ---

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, adapters: Sequence[str | None] = (), max_new_tokens: int = 64,
        stop: Sequence[str] = (), seed: int = 0, rows: int = 0, cache: str = "float", **knobs: float,
    ) -> list[str]:  # fmt: skip
        """Continues each prompt. Returns only the new text, cut before the first `stop` string.

        `prompts` is one prompt or several prompts. A prefix that several prompts share is computed only once.
        `adapters` names an adapter for each prompt; None means the base model. `knobs` are the sampling parameters of
        infer.generate: temperature (0: greedy), top_k, top_p and min_p. `rows` is the number of prompts that are
        answered at a time (0: all of them); it does not change the answers. An answer ends as soon as any of the
        tokenizer's end tokens is sampled.
        """
        prompts = _several(prompts)
        speakers, who = self._speakers(adapters, len(prompts)), self._serving(adapters)
        ids = [lm.encode(prompt) for lm, prompt in zip(speakers, prompts, strict=True)]
        ends = [lm.tokenizer.eos_ids for lm in speakers]
        how = Knobs(**knobs)
        asked = requests(self.model, self.params, ids, max_new_tokens, seed, how, ends=ends, adapters=adapters)
        stopped = lambda tokens: any(s in self.tokenizer.decode(tokens, skip_special=True) for s in stop)
        out = answer(self.model, asked=asked, rows=rows, cache=cache, stop=stopped if stop else None, **who)
        answers = zip(speakers, ids, out.tokens, strict=True)
        return [cut(lm._continuation(prompt, tokens), stop) for lm, prompt, tokens in answers]

    def answer(
        self, questions: str | Sequence[str], *, adapters: Sequence[str | None] = (), **knobs: float | str
    ) -> str | list[str]:
        """Answers one question, or each of several questions. A model without a chat template continues each question
        as plain text."""
        several = [questions] if isinstance(questions, str) else list(questions)
        speakers = self._speakers(adapters, len(several))
        raw = [lm.tokenizer.chat_template is None for lm in speakers]
        prompts = [q if plain else [{"role": "user", "content": q}] for q, plain in zip(several, raw, strict=True)]
        answers = self.generate(prompts, adapters=adapters, **knobs)
        return answers[0] if isinstance(questions, str) else answers

    def stream(
        self, prompt: Prompt, *, adapter: str | None = None, max_new_tokens: int = 64, **knobs: float | str
    ) -> Iterator[str]:
        """Yields the text that `generate` returns for one prompt, in one piece per token. A piece is "" while a
        character is incomplete."""
        lm, who = self.speaking(adapter), self._serving([adapter])
        asked, ends = lm.encode(prompt), lm.tokenizer.eos_ids
        how = dict(max_new_tokens=max_new_tokens, adapter=adapter, stop_ids=ends, **knobs)
        tokens = stream(self.model, prompt=asked, **who, **how)
        return lm.pieces(asked, tokens)

    def pieces(self, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
        """Converts the tokens that continue a prompt to text, and yields a piece of text as each token arrives."""
        text, seen, said = self.tokenizer.stream(prompt), [], ""
        for token in tokens:
            seen.append(token)
            piece = text(token)
            said += piece
            yield piece
        whole = self._continuation(prompt, seen)
        if len(whole) > len(said) and whole.startswith(said):
            yield whole[len(said) :]  # the last bytes, which do not form a complete character

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. A text starts with BOS if the tokenizer adds BOS, and a chat is formatted by the
        chat template."""
        if isinstance(prompt, str):
            return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)]
        if prompt and isinstance(prompt[0], int):
            return list(cast(Sequence[int], prompt))
        return chat.encode(list(cast(Sequence[Message], prompt)), self.tokenizer)

    def _continuation(self, prompt: list[int], tokens: list[int]) -> str:
        """Decodes the tokens that continue a prompt. They are decoded together with the prompt, since SentencePiece
        would otherwise drop a leading space."""
        decode = functools.partial(self.tokenizer.decode, skip_special=True)
        before, whole = decode(prompt), decode(prompt + tokens)
        return whole[len(before) :] if whole.startswith(before) else decode(tokens)

    # --- numbers ---

    def logits(self, tokens: ArrayLike) -> Array:
        """Computes the logits in float32: [B,T,V] for token ids [B,T], or [T,V] for token ids [T]."""
        self._check(np.asarray(tokens), np.shape(tokens)[-1])
        tokens = jnp.asarray(tokens, jnp.int32)
        return _logits(self.model, self.params, tokens) if tokens.ndim == 2 else self.logits(tokens[None])[0]

    def loss(self, texts: str | Sequence[str]) -> tuple[float, int]:
        """Returns the mean negative log-likelihood per token over all texts, in nats, and the number of scored tokens.

        The first token of a text is scored only if the tokenizer puts BOS before it. Texts of more than WINDOW tokens
        are scored in separate windows. Each window begins with the last token of the previous one as context, so every
        token is scored once.
        """
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = self.encode(text)
            size = min(WINDOW, self.config.context - 1)  # a row also contains the token before the first scored one
            windows = (ids[at : at + size + 1] for at in range(0, len(ids) - 1, size))
            rows += [(window[:1], window[1:]) for window in windows]
        tokens = sum(len(scored) for _, scored in rows)
        if not tokens:
            raise UserError("no text has two or more tokens, so there is nothing to score", "texts")
        return -float(self.sums(rows)[0].sum()) / tokens, tokens

    def logps(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[tuple[float, int]]:
        """Returns (log-probability, number of tokens) for each completion, given its prompt.

        As in generation, no token spans the boundary between a prompt and its completion.
        """
        rows = [self._split(p, c) for p, c in zip(prompts, completions, strict=True)]
        sums, _ = self.sums(rows)
        return [(float(total), len(scored)) for total, (_, scored) in zip(sums, rows, strict=True)]

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Returns the reward of each answer, given its prompt: the output of the model's reward head at the answer's
        end token.

        A prompt and its answer are formatted as in training: by the chat template if the tokenizer has one, and
        otherwise by concatenation. Raises UserError if the model has no reward head.
        """
        if "head" not in self.params:
            what = "the model has no reward head"
            raise UserError(what, fix="open a reward model, trained with the objective reward, ranking or rating")
        rows = [([], self.whole(p, a)) for p, a in zip(prompts, answers, strict=True)]
        scores, lengths = np.zeros(len(rows)), [len(ids) for _, ids in rows]
        self._check(np.fromiter((i for _, ids in rows for i in ids), np.int64), max(lengths, default=0))
        for batch in batches(lengths, BATCH_TOKENS):
            scores[batch] = _rewards(self.model, self.params, _scored([rows[i] for i in batch]))[: len(batch)]
        return scores.tolist()

    def whole(self, prompt: Prompt, answer: str) -> list[int]:
        """Returns the token ids of a prompt and its answer, formatted as in training."""
        if isinstance(prompt, str):
            row = examples.Completion(prompt, answer)
            row = row if self.tokenizer.chat_template is None else examples.wrapped(row)
        else:
            row = examples.Chat([*prompt, {"role": "assistant", "content": answer}], len(prompt))
        return row.documents(self.tokenizer, iter(map(self.tokenizer.encode, row.texts())))[0].ids

    def _check(self, ids: np.ndarray, longest: int) -> None:
        """Raises UserError for token ids outside the vocabulary, since looking up such an id would return NaN or the
        vector of another token. Also raises UserError for rows that are longer than the model's table of learned
        positions."""
        size = self.config.vocab_size
        if ids.size and not 0 <= ids.min() <= ids.max() < size:
            odd = int(ids.max() if ids.max() >= size else ids.min())
            raise UserError(
                f"token id {odd} is outside the vocabulary of {size} tokens", fix="use the model's tokenizer"
            )
        if self.config.position == "learned" and longest + virtual_tokens(self.params) > self.config.max_len:
            what = f"{longest} tokens per row exceed the model's {self.config.max_len} learned positions"
            raise UserError(what, "tokens", "shorten the text")

    def _split(self, prompt: Prompt, completion: str) -> tuple[list[int], list[int]]:
        before = self.encode(prompt)
        whole = self.encode(prompt + completion) if isinstance(prompt, str) else []
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, self.tokenizer.encode(completion)

    def sums(self, rows: list[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        """Scores rows of token ids. Each row is a pair (context, scored), and only the second part is scored. Returns,
        for each row, the log-probability of the scored part, and whether greedy decoding would yield this part.

        Rows of similar length share a forward pass. Rows with a common prefix are grouped, and the prefix is computed
        only once.
        """
        needs_causal(self.model)
        if not all(before for before, _ in rows):
            raise UserError(
                "the first token of a text has no probability", "prompt", "give a prompt of at least one token"
            )
        sums, missed, lengths = np.zeros(len(rows)), np.zeros(len(rows)), [len(a) + len(b) for a, b in rows]
        self._check(np.fromiter((i for row in rows for part in row for i in part), np.int64), max(lengths))
        stacked = not isinstance(self.params["layers"], tuple)
        reader = Reader(self.model, lambda *_: self.params, self.prefixes, stacked=stacked)
        asked = [Ids(None, tuple(before)) for before, _ in rows]
        plans = reader.plan(asked)
        shared = [bool(plan) or reader.shares(prompt) for plan, prompt in zip(plans, asked, strict=True)]
        by_length = sorted((i for i, yes in enumerate(shared) if not yes), key=lengths.__getitem__)
        for batch in batches(lengths, BATCH_TOKENS, by_length):
            sums[batch], missed[batch] = self._sum([rows[i] for i in batch])
        by_prefix = sorted((i for i, yes in enumerate(shared) if yes), key=lambda i: asked[i].ids)
        for batch in batches(lengths, BATCH_TOKENS, by_prefix):
            starts = reader.starts([asked[i] for i in batch], [plans[i] for i in batch])
            sums[batch], missed[batch] = self._sum([rows[i] for i in batch], reader, starts)
        return sums, missed == 0

    def _sum(
        self, rows: list[tuple[list[int], list[int]]], reader: Reader | None = None, starts: Sequence[Prefix] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns, for each row of a batch, the log-probability of the scored part, and the number of scored tokens
        that are not the most likely token at their position. Each row continues from its cached prefix in `starts`."""
        scored = _scored(rows, [start.length for start in starts])
        self.prefixes.computed += int(scored.segments.sum())
        cache = reader and reader.begun(starts, *scored.tokens.shape)
        found = _sum_logps(self.model, self.params, scored, cache)
        return found[0][: len(rows)], found[1][: len(rows)]


def cut(text: str, stop: Sequence[str]) -> str:
    """The part of `text` before the first stop string."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


def _several(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict | int))
    return cast(Sequence[Prompt], [prompts] if one else prompts)


class Scored(NamedTuple):
    """Arrays [B,T] in which each row consists of context tokens, scored tokens and padding."""

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray  # 1 if the target is scored, else 0
    positions: np.ndarray
    segments: np.ndarray  # 1 for tokens, 0 for padding, which a bidirectional model must not attend to


def _scored(rows: list[tuple[list[int], list[int]]], starts: Sequence[int] = ()) -> Scored:
    """Pads rows of token ids. `starts` has, for each row, the number of context tokens that are already cached. These
    tokens are left out."""
    starts = starts or [0] * len(rows)
    longest = max(len(a) + len(b) - start for (a, b), start in zip(rows, starts))
    shape = bucket(len(rows)), bucket(longest, 16)
    tokens, targets, positions, segments = np.zeros((4, *shape), np.int32)
    mask = np.zeros(shape, np.float32)
    for i, ((before, scored), start) in enumerate(zip(rows, starts)):
        ids = (before + scored)[start:]
        tokens[i, : len(ids)] = ids
        targets[i, : len(ids) - 1] = ids[1:]
        mask[i, max(len(before) - start - 1, 0) : len(ids) - 1] = 1
        positions[i, : len(ids)] = np.arange(start, start + len(ids))
        segments[i, : len(ids)] = 1
    return Scored(tokens, targets, mask, positions, segments)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Params, tokens: Array) -> Array:
    return model(params, tokens)


@functools.partial(jax.jit, static_argnums=0)
def _sum_logps(model: Transformer, params: Params, rows: Scored, cache: Cache | None) -> tuple[Array, Array]:
    """Returns, for each row [B], the log-probability of the scored part, and the number of scored tokens that are not
    the most likely token at their position. Logits are computed only where the mask is 1."""
    x = model.hidden(params, rows.tokens, rows.positions, rows.segments, cache).x

    def of(logits: Array, targets: Array) -> tuple[Array, Array]:
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), (chosen < logits.max(-1)).astype(jnp.float32)

    logps, missed = head.over_rows(of, [(model, params, x)], rows.mask, rows.targets)
    return logps.sum(-1), missed.sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _rewards(model: Transformer, params: Params, rows: Scored) -> Array:
    """The outputs of the reward head [B] at the last token of each row."""
    x = model.hidden(params, rows.tokens, rows.positions, rows.segments).x
    return heads.at_end(params["head"], x, rows.segments)

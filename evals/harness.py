"""Adapts a model to the interface of lm-evaluation-harness (evals.lm_eval)."""

from collections.abc import Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from data.text import chat
from infer.lm import LM
from infer.serve.api import ids
from model.net.transformer import virtual_tokens

Pair = tuple[list[int], list[int]]  # token ids of a context and of the continuation that is scored


class Adapter(TemplateLM):
    """Lets lm-evaluation-harness score continuations and generate answers with a model.

    Contexts that are too long are truncated from the left, as in the harness's own models.
    """

    def __init__(self, lm: LM, name: str = "", rows: int = 16):
        super().__init__()
        self.lm, self.tokenizer, self.name, self.rows = lm, lm.tokenizer, name, rows
        self.max_length = lm.config.context - virtual_tokens(lm.params)

    @property
    def tokenizer_name(self) -> str:
        """The name that the harness uses to keep the cached requests of this model apart from those of other models."""
        return self.name

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is False:
            return self.tokenizer.encode(string, special=True)
        return ids(self.lm, string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat.render(chat_history, self.tokenizer, add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = self._scored([(context, scored) for _, context, scored in requests])
        for (texts, *_), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _scored(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        rows = []
        for context, scored in pairs:
            whole = [*context, *scored][-self.max_length :]
            start = max(len(whole) - len(scored), 1)
            rows.append((whole[:start], whole[start:]))
        if not rows:
            return []
        sums, greedy = self.lm.sums(rows)
        return list(zip(sums.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for text in (text for request in requests for text in request.args):
            knobs = dict(prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1, context_len=1)
            windows = utils.get_rolling_token_windows(self.tok_encode(text), **knobs)
            found.append(sum(x for x, _ in self._scored([utils.make_disjoint_window(w) for w in windows])))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}  # {settings: indices of the requests with these settings}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for group in groups.values():
            knobs = normalize_gen_kwargs(requests[group[0]].args[1], 256)
            stop = [s for s in handle_stop_sequences(knobs.get("until"), eos=None) if s]
            room = min(knobs["max_gen_toks"], self.max_length - 1)
            prompts = [self.tok_encode(requests[i].args[0])[room - self.max_length :] for i in group]
            how = {k: knobs[k] for k in ("temperature", "top_k", "top_p", "min_p") if k in knobs}
            texts = self.lm.generate(prompts, max_new_tokens=room, stop=stop, rows=self.rows, **how)
            answers |= dict(zip(group, texts, strict=True))
        for i, text in answers.items():
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [answers[i] for i in range(len(requests))]

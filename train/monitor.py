"""What a run says of itself on the way: held-out loss, task scores, samples."""

from typing import Any

from common.errors import UserError
from common.types import Config

PASSAGES = 32  # of `eval_text`


class Judge:
    """Writes held-out figures, task scores and samples of a state. Samples and tasks run before and after training."""

    def __init__(self, cfg: Config, plan: Any, heldout: Any | None, tokenizer: Any, metrics: Any):
        self.cfg, self.model, self.heldout = cfg, plan.model, heldout
        self.tokenizer, self.metrics = tokenizer, metrics
        self.texts = _texts(cfg.eval_text)

    def __call__(self, state: Any, step: int) -> None:
        with self.metrics.timer("eval"):
            policy = state.role("policy")
            figures = self._heldout(policy) | self._tasks(policy, step) | self._general(policy)
            if figures:
                self.metrics.write(step, "eval", **figures)
            if step in (0, self.cfg.steps):
                self._samples(policy, step)

    def _heldout(self, policy: Any) -> dict[str, float]:
        if self.heldout is None or self.heldout.loader.kind != "lm":
            return {}
        from evals.heldout import heldout
        from train.keep.metrics import means

        return means(heldout(self.model, policy, self.heldout, self.cfg.eval_batches, self.tokenizer))

    def _tasks(self, policy: Any, step: int) -> dict[str, float]:
        if not self.cfg.evals:
            return {}
        from evals.run import evaluate
        from infer.lm import LM

        figures = {}
        lm = LM(self.model, policy, self.tokenizer)
        for name in self.cfg.evals:
            result = evaluate(name, lm, n=self.cfg.eval_n, seed=self.cfg.seed)
            figures[name] = result.mean
            self.metrics.write(step, "task", **result.to_dict())
        return figures

    def _general(self, policy: Any) -> dict[str, float]:
        if not self.texts:
            return {}
        from infer.lm import LM

        return {"text_nll": LM(self.model, policy, self.tokenizer).loss(self.texts)[0]}

    def _samples(self, policy: Any, step: int) -> None:
        if not self.cfg.samples:
            return
        from infer.lm import LM

        lm, prompts = LM(self.model, policy, self.tokenizer), list(self.cfg.samples)
        for prompt, answer in zip(prompts, lm.answer(prompts), strict=True):
            self.metrics.write(step, "sample", prompt=prompt, answer=answer)


def _texts(source: str) -> list[str]:
    """What the loss on general text is measured on. Raises UserError when the source has no long document."""
    if not source:
        return []
    from evals.heldout import PASSAGE, passages

    if not (found := passages(source, PASSAGES)):
        raise UserError(f"{source!r} has no text of {2 * PASSAGE} characters", "config.eval_text")
    return found

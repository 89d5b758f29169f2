"""Ranks the answers of tools.sample_pairs by a reward, reports which model wins, and writes rows to train on.

    python -m tools.rank --items=items.jsonl --reward=SPEC [--keep=best|pairs|items --out=FILE] [--kl]

--reward is a weighted mix of scorers, reward models, judges, rules and your own functions (evals.reward). The command
prints each model's mean reward and mean answer length. If there are two models, it also prints how often the second one
wins, with a tie as half a win. --keep=best writes each prompt with its best answer, as a data.source for fine-tuning
(best-of-n). --keep=pairs writes each prompt with its best and worst answers, for DPO or a reward model. --keep=items
writes the items for feedback.main, with the answers ranked by reward instead of by a judge. --kl estimates the KL
divergence of the second model from the first. The estimate is the mean log-probability of the second model's answers
under that model, minus their mean log-probability under the first model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import cli, files, stats
from common.errors import UserError
from common.numbers import percent, short
from common.types import Json

KEEPS = ("best", "pairs", "items")


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.rank", __doc__)
    for name in ("items", "reward"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--keep", choices=KEEPS)
    parser.add_argument("--out", default="")
    parser.add_argument("--kl", action="store_true", help="loads both models")
    args = parser.parse_args(argv)
    if bool(args.keep) != bool(args.out):
        raise UserError("--keep and --out need each other", "tools.rank", "give both or neither")
    run(args)


def run(args: argparse.Namespace) -> None:
    from evals import answers, reward

    items = answers.items(args.items)
    models = list(dict.fromkeys(answer["model"] for item in items for answer in item["answers"]))
    if args.kl and len(models) != 2:
        raise UserError(f"--kl needs answers of 2 models; the items have {len(models)}", args.items, "leave out --kl")
    rewards = reward.load(args.reward)
    flat = [(item, answer["text"]) for item in items for answer in item["answers"]]
    values = iter(rewards([item["prompt"] for item, _ in flat], [text for _, text in flat], [item for item, _ in flat]))
    scored = [[next(values) for _ in item["answers"]] for item in items]
    _show(items, scored, models)
    if args.kl:
        print(_divergence(items, models))
    if args.out:
        rows = [
            row for item, each in zip(items, scored, strict=True) if (row := _row(item, each, args.keep, args.reward))
        ]
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        files.write_lines(Path(args.out), rows)
        n = max(len(item["answers"]) for item in items)
        best, nats = np.mean([max(each) for each in scored]), np.log(n) - (n - 1) / n
        far = f"; best of {n}: mean reward {best:.3f}, KL from the model <= {nats:.3f} nats" * (args.keep == "best")
        print(f"{args.out}: {len(rows):,} rows from {len(items):,} items{far}")


def _row(item: Json, values: list[float], keep: str, reward: str) -> Json | None:
    """Returns the row that --keep writes for an item. Returns None to leave the item out: for "best" if the best answer
    is empty, and for "pairs" if all answers have the same reward."""
    texts, order = [answer["text"] for answer in item["answers"]], np.argsort(values, kind="stable")
    if keep == "items":
        ranks = [1 + sum(other > value for other in set(values)) for value in values]
        return item | {"judge": {"model": reward, "ranks": ranks}}
    best, worst = int(np.argmax(values)), int(order[0])
    said = lambda text: text if isinstance(item["prompt"], str) else [{"role": "assistant", "content": text}]
    if keep == "best":
        return {"prompt": item["prompt"], "completion": said(texts[best])} if texts[best].strip() else None
    if values[best] == values[worst]:
        return None
    return {"prompt": item["prompt"], "chosen": said(texts[best]), "rejected": said(texts[worst])}


def _show(items: Sequence[Json], scored: Sequence[Sequence[float]], models: Sequence[str]) -> None:
    rows, means = [], []
    for model in models:
        each = [[(v, a["text"]) for v, a in zip(vs, item["answers"], strict=True) if a["model"] == model]
                for item, vs in zip(items, scored, strict=True)]  # fmt: skip
        means.append([float(np.mean([v for v, _ in part])) for part in each])
        words = [len(text.split()) for part in each for _, text in part]
        low, high = stats.of_scores(means[-1])
        span = f"{low:.3f} to {high:.3f}"
        rows.append((model, f"{np.mean(means[-1]):.3f}", span, len(items), short(float(np.mean(words)))))
    cli.table(rows, ("model", "reward", "95 % interval", "prompts", "words per answer"))
    if len(models) == 2:
        from evals import paired

        first, second = np.array(means)
        wins = (0.5 + 0.5 * np.sign(second - first)).tolist()
        low, high = stats.of_scores(wins)
        found = paired.compare(second, first)
        span = f"95 % interval {percent(low)} to {percent(high)}"
        print(f"{models[1]} wins {percent(float(np.mean(wins)))} ({span}) of {len(wins):,} prompts")
        print(f"its mean reward: {found.difference:+.3f} ({found.low:+.3f} to {found.high:+.3f}, p = {found.p:.3g})")


def _divergence(items: Sequence[Json], models: Sequence[str]) -> str:
    """Estimates the KL divergence of the second model from the first, as a mean over answers of the second model."""
    from evals import answers
    from infer.lm import LM

    prompts, texts = zip(*((i["prompt"], a["text"]) for i in items for a in i["answers"] if a["model"] == models[1]))
    sums = []
    for name in models:
        lm = answers.model(name)
        if not isinstance(lm, LM):
            raise UserError("a hosted model returns no log-probabilities", name, "leave out --kl")
        sums.append(lm.logps([answers.asked(p, lm) for p in prompts], texts))
    gaps = [second[0] - first[0] for first, second in zip(*sums, strict=True)]
    low, high = stats.of_scores(gaps)
    tokens = float(np.mean([count for _, count in sums[1]]))
    mean = float(np.mean(gaps))
    return (
        f"KL of {models[1]} from {models[0]}: {mean:.3g} nats per answer (95 % interval {low:.3g} to {high:.3g}),"
        f" {mean / tokens:.3g} per token; end tokens are not counted"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Samples answers of one or two models to the prompts of a file, so that people or judges can compare them.

    python -m tools.sample_pairs --prompts=FILE --models=MODEL[,MODEL] --out=items.jsonl [--answers=2] [--n=100]
                                 [--temperature=0.8] [--top_p=1] [--max_new_tokens=128] [--seed=0]

--prompts is any data source. Only its prompts are used. MODEL is a model, a run, a base model with an adapter
(BASE+FOLDER), or a hosted model (openai:URL#MODEL). --answers is the number of answers per prompt. With two models,
each model samples half of these answers. Each line of --out is {"id", "prompt", "answers": [{"text", "model",
"sampling"}]}. The file is read by feedback.main, tools.route and tools.rank. Repeated prompts are used only once. With
one model, prompts for which all answers are equal are left out. If the command is interrupted, the same command resumes
where it stopped, and the result is the same.
"""

import argparse
import json
import sys
from pathlib import Path

from common import cli, files
from common.errors import UserError
from common.types import Json

MOST = 64  # maximum number of answers per prompt


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.sample_pairs", __doc__)
    for name in ("prompts", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--models", required=True, type=cli.listed)
    for name, default in dict(answers=2, n=100, max_new_tokens=128, seed=0).items():
        parser.add_argument(f"--{name}", default=default, type=cli.count)
    for name, default in dict(temperature=0.8, top_p=1.0).items():
        parser.add_argument(f"--{name}", default=default, type=float)
    args = parser.parse_args(argv)
    if len(args.models) not in (1, 2):
        raise UserError(f"{len(args.models)} models are given", "--models", "give one or two, separated by a comma")
    each, rest = divmod(args.answers, len(args.models))
    if rest or not 2 <= args.answers <= MOST:
        raise UserError(f"{args.answers} answers", "--answers", f"use 2 to {MOST}, and an even number for two models")
    if not (0 <= args.temperature <= 100 and 0 < args.top_p <= 1 and args.max_new_tokens and args.n):
        raise UserError("a setting is out of range", "tools.sample_pairs", "see --help")
    if each > 1 and not args.temperature:
        raise UserError("all answers of a model are equal at temperature 0", "--temperature", "choose 0.8")
    write(args, each)


def write(args: argparse.Namespace, each: int) -> None:
    """Samples the items that are not in the file yet, and appends them."""
    from data import splits
    from evals import answers

    knobs = {"temperature": args.temperature, "top_p": args.top_p}
    sampling = knobs | {"seed": args.seed, "max_new_tokens": args.max_new_tokens}
    drawn, right = {}, {}
    for _, prompt, record in answers.prompts(args.prompts):
        name = f"{splits.key(json.dumps(prompt)):016x}"
        if len(drawn) < args.n and name not in drawn:
            drawn[name], found = prompt, answers.references(record)
            right[name] = {"references": found} if found else {}
    if not drawn:
        raise UserError("there are no prompts", args.prompts)
    out = Path(args.out)
    kept = _kept(out, list(drawn), [{"model": m, "sampling": sampling} for m in args.models for _ in range(each)])
    todo = list(drawn)[1 + max((list(drawn).index(name) for name in kept), default=-1) :]
    lms, equal = [answers.model(name) for name in args.models] if todo else [], 0
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = files.Lines(out)
    size = max(1, answers.ROWS // each)
    for at in range(0, len(todo), size):
        names = todo[at : at + size]
        asked = [drawn[name] for name in names]
        made = [
            answers.sample(lm, asked, each, max_new_tokens=args.max_new_tokens, seed=args.seed, **knobs) for lm in lms
        ]
        for name, prompt, *texts in zip(names, asked, *made, strict=True):
            pairs = [(model, text) for model, part in zip(args.models, texts, strict=True) for text in part]
            if len(lms) == 1 and len({text for _, text in pairs}) == 1:
                equal += 1
                continue
            said = [{"text": text, "model": model, "sampling": sampling} for model, text in pairs]
            lines.write({"id": name, "prompt": prompt, "answers": said} | right[name])
        lines.sync()
        print(f"{at + len(names):,} of {len(todo):,} prompts", flush=True)
    lines.close()
    count = len(files.read_lines(out))
    print(f"{out}: {count:,} items" + (f"; {equal:,} left out because all answers were equal" if equal else ""))
    for lm in lms:
        if hasattr(lm, "used"):
            print(lm)


def _kept(out: Path, names: list[str], answers: list[Json]) -> list[str]:
    """Returns the ids of the items that an earlier call wrote. Removes an incomplete line at the end of the file.

    Raises UserError if the items were sampled with other settings.
    """
    if not out.exists():
        return []
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        lines = [files.strict(line) for line in whole.decode().split("\n")[:-1]]
        drawn = [[{key: answer[key] for key in ("model", "sampling")} for answer in line["answers"]] for line in lines]
        same = all(line["id"] in names for line in lines) and all(part == answers for part in drawn)
    except (ValueError, TypeError, KeyError):
        same = False
    if not same:
        what = "the file has other items than answers of these models to these prompts"
        raise UserError(what, str(out), "choose another --out")
    if whole != text:
        files.write(out, whole)
    return [line["id"] for line in lines]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

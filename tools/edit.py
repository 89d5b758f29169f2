"""Task arithmetic: adds, subtracts, scales and merges the weight updates of fine-tuned models.

    python -m tools.edit --base=MODEL --to=DIR [--method=linear|ties|dare] [--density=0.2] [--seed=0] [--rank=R]
                         SOURCE[:FACTOR] [SOURCE[:FACTOR] ...]

A SOURCE is a run folder, a PEFT folder or a complete model. The update of a SOURCE is its weights minus the weights of
MODEL, times FACTOR (default 1; negative factors remove a skill). The method linear sums the updates (arXiv 2212.04089).
The method `ties` keeps only the elements of each update that have the largest magnitudes (a fraction --density), and
resolves conflicting signs by vote (arXiv 2306.01708). The method `dare` keeps a random fraction --density of the
elements (arXiv 2311.03099). The result is a Hugging Face folder or, with --rank, a PEFT folder. With --rank, the update
of each changed matrix is approximated by a LoRA of rank R, using a truncated SVD, and the error of the approximation is
printed."""

import math
import sys
from pathlib import Path

from common import cli
from common.errors import UserError


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("tools.edit", __doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE[:FACTOR]")
    parser.add_argument("--base", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--method", choices=("linear", "ties", "dare"), default="linear")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    edit(**vars(parser.parse_args(argv)))


def edit(sources: list[str], base: str, to: str, method: str, density: float, seed: int, rank: int) -> None:
    """Writes the edited model. Any UserError is raised before anything is written."""
    if not 0 < density <= 1:
        raise UserError(f"density {density} is out of range", "--density", "a number in (0, 1]")
    if Path(to).exists():
        raise UserError("the folder exists already", to, "choose a new one")
    parsed = [source_and_factor(text) for text in sources]
    from infer.models import before_and_after, load
    from model import vectors, weights
    from model.io import peft_write
    from model.io.export import export_hf

    lm = load(base)
    specs, updates = lm.model.specs, []
    for source, _ in parsed:
        other, before = before_and_after(source, base)
        if other.config != lm.config:
            raise UserError("the model has another shape than the base model", source)
        updates.append(vectors.difference(other.params, before, specs))
    factors = [factor for _, factor in parsed]
    match method:
        case "linear":
            result = vectors.linear(updates, factors)
        case "ties":
            result = vectors.ties(updates, factors, density)
        case "dare":
            result = vectors.dare(updates, factors, density, seed)
    plain = weights.dense(lm.params, specs)
    if not rank:
        delta = export_hf(lm.model, vectors.add(plain, result), lm.tokenizer, to)
        print(f"{to} · read back: the logits differ by {delta:.1g} of the largest logit")
        return
    params, missed = vectors.to_lora(plain, result, specs, rank)
    peft_write.write(to, lm.model, params, base)
    error, norm = (sum(pair[i] for pair in missed.values()) for i in (0, 1))
    relative = {name: math.sqrt(pair[0] / pair[1]) for name, pair in missed.items() if pair[1]}
    worst = max(relative, key=relative.__getitem__)
    text = f"rank {rank} leaves out {math.sqrt(error / norm):.2%} of the update's norm"
    print(f"{to} · {text}; most in {worst}: {relative[worst]:.2%}")


def source_and_factor(text: str) -> tuple[str, float]:
    """Splits "runs/a:-0.5" into ("runs/a", -0.5)."""
    source, colon, factor = text.rpartition(":")
    try:
        value = float(factor)
    except ValueError:
        return text, 1.0
    if not colon or not math.isfinite(value):
        return text, 1.0
    return source, value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

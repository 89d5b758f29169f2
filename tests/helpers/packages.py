"""Names of packages, objectives and sources that tests walk."""

from tests.helpers.processes import ROOT

PACKAGES = (
    "common", "configs", "data", "feedback", "kernels", "model", "infer", "evals", "train", "tools", "examples",
)  # fmt: skip
OBJECTIVES = sorted(p.stem for p in (ROOT / "train/objectives").glob("[!_]*.py"))
SOURCES = {  # kind of batch: data that make it
    "lm": "synthetic:add?n=900&digits=3",
    "pair": "synthetic:add_pairs?n=300&digits=2",
    "match": "synthetic:add_matches?n=300&digits=2",
    "labelled": "synthetic:add_labels?n=300&digits=2",
    "rated": "synthetic:add_ratings?n=300&digits=2",
    "group": "synthetic:add_ranks?n=300&digits=2",
}


def options(kind: str) -> list[str]:
    """Of a command line: data for a kind of batch."""
    form = kind if kind in ("labelled", "rated") else "auto"
    return [f"--config.data.source={SOURCES[kind]}", f"--config.data.format={form}"]

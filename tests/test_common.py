"""What every package may use: files written whole, and lines of JSON."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from common import files, paths
from tests.test_store import bucket  # noqa: F401

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
    assert len(list(tmp_path.glob(f"{files.WRITING}x*"))) == 1  # its writer lives
    child.send_signal(signal.SIGKILL)
    child.wait()
    if "folder" in what:
        (next(tmp_path.glob(f"{files.WRITING}x*")) / "link").symlink_to(outside)
    files.write(tmp_path / "y", "")
    assert not list(tmp_path.glob(f"{files.WRITING}x*")) and (outside / "kept").read_text() == "kept"


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


def test_in_a_store_the_marker_comes_last(bucket, monkeypatch):  # noqa: F811
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

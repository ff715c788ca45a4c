"""Which source does a notebook reach, and when is a file read again? Real files, nothing is imported."""

import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_course.pipelines import definition
from mlops_course.pipelines.cache import (
    HashMemo,
    KeyInputError,
    SourceClosure,
    cyclic_links,
    list_files,
    source_closure,
)
from mlops_course.pipelines.cache.closure import find_module_file, own_code_digest, relative_module_file, unseen_modules
from mlops_course.pipelines.cache.fingerprints import canonical, content_of
from mlops_course.pipelines.cache.hashes import digest_json
from mlops_course.pipelines.cache.packages import installed_packages

posix_only = pytest.mark.skipif(os.name == "nt", reason="permissions and pipes of POSIX")


def write_notebook(path: Path, *cells: str, tags: Iterable[str] = (), **extra: object) -> Path:
    """A notebook of code cells; the tags are those of the first."""
    code = [
        {
            "cell_type": "code",
            "source": source.splitlines(keepends=True),
            "metadata": {"tags": list(tags)} if tags and number == 0 else {},
            "outputs": [],
            "execution_count": None,
            **extra,
        }
        for number, source in enumerate(cells)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    path.write_text(
        json.dumps({"cells": code, "metadata": about, "nbformat": 4, "nbformat_minor": 4}), encoding="utf-8"
    )
    return path


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def settle(*paths: Path) -> None:
    """Wait until files have held still for long enough to be remembered."""
    while any(time.time_ns() - path.stat().st_ctime_ns < 60_000_000 for path in paths):
        time.sleep(0.01)


# ---------------------------------------------------------------- values

DIFFERENT = [
    1,
    1.0,
    True,
    "1",
    "1.0",
    "True",
    None,
    "None",
    0,
    0.0,
    -0.0,
    False,
    "",
    [],
    {},
    [1],
    (1,),
    [[1]],
    {"1": 1},
]
DIFFERENT += [
    {1: 1},
    {"1": "1"},
    float("inf"),
    float("nan"),
    "é",
    "e\u0301",
    "\ud800",
    2**70,
    1e22,
    10**22,
    [None],
    [[]],
]


def test_values_that_differ_in_anything_have_different_keys() -> None:
    keys = [digest_json(canonical(value)) for value in DIFFERENT]
    assert len(set(keys)) == len(keys)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN)
def test_a_value_that_json_gave_back_has_the_same_key(value: object) -> None:
    assert digest_json(canonical(json.loads(json.dumps(value)))) == digest_json(canonical(value))


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_counts(value: dict[str, int]) -> None:
    assert canonical(dict(reversed(value.items()))) != canonical(value)


def test_a_value_without_a_plain_form_is_refused_by_name() -> None:
    with pytest.raises(KeyInputError, match="of type set, which can't be part of a key"):
        canonical({"rows": {1, 2}})


def test_a_path_stands_for_what_it_holds(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one" / "a.csv", "x"), write(tmp_path / "two" / "b.csv", "x")
    assert canonical(one) == canonical(two)
    assert canonical(one.parent) != canonical(two.parent), "in a folder, names count"
    two.write_text("y", encoding="utf-8")
    assert canonical(one) != canonical(two)
    with pytest.raises(KeyInputError, match="can't read"):
        canonical(tmp_path / "nothing")


# ---------------------------------------------------------------- files


def test_the_order_in_which_a_folder_was_filled_does_not_count(tmp_path: Path) -> None:
    for folder, names in (("one", "abcdefgh"), ("two", "hgfedcba")):
        for name in names:
            write(tmp_path / folder / "inner" / f"{name}.csv", name)
    assert content_of(tmp_path / "one") == content_of(tmp_path / "two")


@pytest.mark.parametrize("change", ["rename", "move", "empty folder", "swap", "link"])
def test_whatever_changes_a_folder_is_seen(tmp_path: Path, change: str) -> None:
    folder = tmp_path / "folder"
    a, b = write(folder / "a.csv", "1"), write(folder / "inner" / "b.csv", "2")
    before = content_of(folder)
    if change == "rename":
        a.rename(folder / "c.csv")
    elif change == "move":
        b.rename(folder / "b.csv")
    elif change == "empty folder":
        (folder / "new").mkdir()
    elif change == "swap":
        a.write_text("2", encoding="utf-8")
        b.write_text("1", encoding="utf-8")
    else:
        (folder / "link").symlink_to(tmp_path, target_is_directory=True)
    assert content_of(folder) != before


LINKED = ["changed", "added", "removed", "other target", "same size and time"]


@pytest.mark.parametrize("change", LINKED)
@pytest.mark.parametrize("depth", ["a link", "a link behind a link"])
def test_what_lies_behind_a_linked_folder_counts(tmp_path: Path, change: str, depth: str) -> None:
    real, folder = tmp_path / "real", tmp_path / "source"
    file = write(real / "inner" / "d.csv", "old")
    write(tmp_path / "other" / "inner" / "d.csv", "new")
    write(folder / "k.csv", "k")
    between = tmp_path / "between"
    between.mkdir()
    (between / "down").symlink_to(real, target_is_directory=True)
    target = real if depth == "a link" else between
    (folder / "current").symlink_to(os.path.relpath(target, folder), target_is_directory=True)
    memo = HashMemo()
    settle(file)
    before, times = canonical(folder, memo), file.stat()
    assert canonical(folder, memo) == before
    if change == "changed":
        file.write_text("something else", encoding="utf-8")
    elif change == "added":
        write(real / "e.csv", "")
    elif change == "removed":
        file.unlink()
    elif change == "other target":
        link = folder / "current" if depth == "a link" else between / "down"
        link.unlink()
        link.symlink_to(tmp_path / "other", target_is_directory=True)
    else:
        file.write_text("new", encoding="utf-8")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert canonical(folder, memo) != before


def test_links_inside_and_outside_are_the_same_content_as_a_copy_of_them(tmp_path: Path) -> None:
    """What a listing describes can be copied, and the copy has the same listing."""
    write(tmp_path / "real" / "deep" / "a.csv", "a")
    (tmp_path / "real" / "to_deep").symlink_to("deep", target_is_directory=True)
    folder = tmp_path / "source"
    write(folder / "v1" / "b.csv", "b")
    (folder / "latest").symlink_to(folder / "v1", target_is_directory=True)  # absolute, and inside all the same
    (folder / "b.csv").symlink_to("v1/b.csv")
    (folder / "a.csv").symlink_to(tmp_path / "real" / "deep" / "a.csv")
    (folder / "outside").symlink_to(tmp_path / "real", target_is_directory=True)
    copy = tmp_path / "elsewhere" / "source"
    write(copy / "v1" / "b.csv", "b")
    (copy / "latest").symlink_to("v1", target_is_directory=True)
    (copy / "b.csv").symlink_to("v1/b.csv")
    write(copy / "a.csv", "a")
    write(copy / "outside" / "deep" / "a.csv", "a")
    (copy / "outside" / "to_deep").symlink_to("deep", target_is_directory=True)
    assert list_files(folder) == list_files(copy)


def test_links_that_lead_in_a_circle_come_to_an_end(tmp_path: Path) -> None:
    folder = tmp_path / "project" / "source"
    write(folder / "a.csv", "a")
    (folder / "self").symlink_to(".", target_is_directory=True)
    for one, other in (("left", "right"), ("right", "left")):
        write(tmp_path / one / f"{one}.csv", one)
        (tmp_path / one / "over").symlink_to(tmp_path / other, target_is_directory=True)
    (folder / "left").symlink_to(tmp_path / "left", target_is_directory=True)
    names = [name for name, _, _ in list_files(folder)]
    assert names == ["a.csv", "left/left.csv", "left/over/over", "left/over/right.csv", "self"]
    for level in range(12):  # each level is reached in two ways: 2 to the power of 12 paths
        write(tmp_path / f"level{level}" / "file", "")
        for way in ("one", "two"):
            (tmp_path / f"level{level}" / way).symlink_to(tmp_path / f"level{level + 1}", target_is_directory=True)
    (folder / "levels").symlink_to(tmp_path / "level0", target_is_directory=True)
    assert len(list_files(folder)) < 60
    assert cyclic_links(folder) == []
    (folder / "up").symlink_to("../..", target_is_directory=True)
    assert cyclic_links(folder) == ["up"]
    assert ("up", 0, "loop to ../..") in list_files(folder)


def test_a_link_to_nothing_counts_by_its_target(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "a", "")
    (tmp_path / "folder" / "gone").symlink_to("../nothing")
    before = content_of(tmp_path / "folder")
    write(tmp_path / "nothing", "")
    assert content_of(tmp_path / "folder") != before


@posix_only
def test_what_may_be_executed_counts_and_a_pipe_is_no_file(tmp_path: Path) -> None:
    tool = write(tmp_path / "tools" / "run.sh", "#!/bin/sh\n")
    one, all_of_them = content_of(tool), content_of(tmp_path / "tools")
    tool.chmod(0o664)
    assert (content_of(tool), content_of(tmp_path / "tools")) == (one, all_of_them)
    tool.chmod(0o755)
    assert content_of(tool) != one
    assert content_of(tmp_path / "tools") != all_of_them
    os.mkfifo(tmp_path / "tools" / "pipe")
    for path in (tmp_path / "tools", tmp_path / "tools" / "pipe"):
        with pytest.raises(KeyInputError, match="pipe is not a file"):
            content_of(path)


def remembered(memo: HashMemo, path: Path) -> bool:
    """Whether the memo answers without opening the file."""
    mode = path.stat().st_mode
    known = memo._known.files.get(str(path))
    assert path.stat().st_mode == mode
    return known is not None


def test_a_file_is_read_once(tmp_path: Path) -> None:
    file, memo = write(tmp_path / "a.csv", "1,2"), HashMemo(tmp_path / "memo.json")
    settle(file)
    first = memo.hash(file)
    memo.save()
    again = HashMemo(tmp_path / "memo.json")
    assert remembered(again, file)
    assert again.hash(file) == first == HashMemo().hash(file)


@pytest.mark.parametrize("when", ["past", "same", "future"])
def test_another_content_of_the_same_size_is_seen_whatever_the_clock_says(tmp_path: Path, when: str) -> None:
    file, memo = write(tmp_path / "a.csv", "1,2"), HashMemo()
    settle(file)
    first, before = memo.hash(file), file.stat()
    file.write_text("2,1", encoding="utf-8")
    moved = {"past": -(10**15), "same": 0, "future": 10**15}[when]
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + moved))
    assert memo.hash(file) != first


def test_a_file_put_in_place_by_a_rename_is_seen(tmp_path: Path) -> None:
    file, other, memo = write(tmp_path / "a.csv", "1,2"), write(tmp_path / "b.csv", "2,1"), HashMemo()
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    settle(file, other)
    first = memo.hash(file)
    other.replace(file)
    assert memo.hash(file) != first


def test_writes_in_quick_succession_are_all_seen(tmp_path: Path) -> None:
    """Within one tick of the file system's clock, nothing but the content tells two writes apart."""
    file, memo = tmp_path / "a.csv", HashMemo()
    for number in range(300):
        text = f"{number:03d}"
        with file.open("r+" if file.exists() else "w", encoding="utf-8") as writer:
            writer.write(text)
        assert memo.hash(file) == HashMemo().hash(file), text


def test_a_file_from_the_future_is_read_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was set back after the file was written."""
    file, memo = write(tmp_path / "a.csv", "1,2"), HashMemo()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    memo.hash(file)
    assert not remembered(memo, file)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": 1}', b'{"files": {"a": [1]}, "facts": {}}', b"\xff"])
def test_a_damaged_memo_is_an_empty_one(tmp_path: Path, damage: bytes) -> None:
    file = write(tmp_path / "a.csv", "1,2")
    (tmp_path / "memo.json").write_bytes(damage)
    settle(file)
    memo = HashMemo(tmp_path / "memo.json")
    assert memo.hash(file) == HashMemo().hash(file)
    memo.save()
    assert remembered(HashMemo(tmp_path / "memo.json"), file)


def test_a_memo_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "1,2")
    settle(file)
    memo = HashMemo(file / "memo.json")
    memo.hash(file)
    memo.save()
    assert file.read_text(encoding="utf-8") == "1,2"


# ---------------------------------------------------------------- notebooks


def test_only_code_and_tags_count(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "a.ipynb", "x = 1", "print(x)", tags=["parameters"])
    same = source_closure(notebook).cells
    content = json.loads(notebook.read_text(encoding="utf-8"))
    content["cells"][0] |= {"id": "new", "execution_count": 7, "outputs": [{"output_type": "stream", "text": "1"}]}
    content["cells"][1]["source"] = "".join(content["cells"][1]["source"])
    content["cells"].insert(0, {"cell_type": "markdown", "source": "# Prose", "metadata": {}})
    content["metadata"]["kernelspec"] = {"name": "other"}
    notebook.write_text(json.dumps(content, indent=3), encoding="utf-8")
    assert source_closure(notebook).cells == same
    assert source_closure(write_notebook(notebook, "x = 1", "print(x)")).cells != same, "the tag is gone"
    assert source_closure(write_notebook(notebook, "print(x)", "x = 1", tags=["parameters"])).cells != same
    assert source_closure(write_notebook(notebook, "x = 1\nprint(x)", tags=["parameters"])).cells != same


def test_papermills_cell_is_not_the_notebooks_own(tmp_path: Path) -> None:
    papermill = pytest.importorskip("papermill")
    notebook = write_notebook(tmp_path / "a.ipynb", "x = 1", "print(x)", tags=["parameters"])
    prepared = papermill.iorw.load_notebook_node(str(notebook))
    filled = papermill.parameterize.parameterize_notebook(prepared, {"x": 2})
    write(tmp_path / "b.ipynb", json.dumps(filled))
    assert own_code_digest((tmp_path / "b.ipynb").read_bytes()) == own_code_digest(notebook.read_bytes())
    assert source_closure(tmp_path / "b.ipynb").cells != source_closure(notebook).cells


@pytest.mark.parametrize("content", ["", "text", "[]", "{}", '{"cells": 3}', '{"cells": [{}]}'])
def test_what_is_no_notebook_is_refused_by_name(tmp_path: Path, content: str) -> None:
    with pytest.raises(KeyInputError, match=r"a\.ipynb"):
        source_closure(write(tmp_path / "a.ipynb", content))
    with pytest.raises(KeyInputError, match=r"nothing\.ipynb"):
        source_closure(tmp_path / "nothing.ipynb")


# ---------------------------------------------------------------- imports


def reached(folder: Path, *cells: str) -> SourceClosure:
    return source_closure(write_notebook(folder / "stage.ipynb", *cells), [folder])


def test_imports_are_followed_wherever_they_stand(tmp_path: Path) -> None:
    write(tmp_path / "top.py", "import below")
    write(tmp_path / "below.py", "def f():\n    if 1:\n        from pkg.sub import mod\n")
    write(tmp_path / "pkg" / "__init__.py", "from . import helper")
    write(tmp_path / "pkg" / "helper.py", "import json, pandas.testing")
    write(tmp_path / "pkg" / "sub" / "__init__.py")
    write(tmp_path / "pkg" / "sub" / "mod.py", "from .. import late\nfrom ..helper import x\nfrom .near import y")
    write(tmp_path / "pkg" / "late.py", "import unknown_thing")
    write(tmp_path / "pkg" / "sub" / "near.py")
    write(tmp_path / "pkg" / "unused.py")
    found = reached(tmp_path, "def g():\n    import top")
    names = {"top", "below", "pkg", "pkg.helper", "pkg.late", "pkg.sub", "pkg.sub.mod", "pkg.sub.near"}
    assert set(found.modules) == names
    assert found.packages == ("pandas", "unknown_thing")


@pytest.mark.parametrize(
    "cell",
    [
        "import pkg.one",
        "from pkg import one",
        "from pkg.one import f",
        "import pkg.one as p",
        "try:\n    import pkg.one\nexcept ImportError:\n    pass",
        "%matplotlib inline\n!ls\nfiles = !ls\nimport pkg.one",
        "pkg?\nimport pkg.one",
        "%%time\nimport pkg.one",
        "await f()\nasync with g() as h:\n    import pkg.one",
        "importlib.import_module('pkg.one')",
        "__import__('pkg.one')",
        "this is no python\nimport pkg.one",
        "text = '''\n%not magic\n'''\nimport pkg.one",
    ],
)
def test_each_way_to_import_is_seen(tmp_path: Path, cell: str) -> None:
    write(tmp_path / "pkg" / "__init__.py")
    write(tmp_path / "pkg" / "one.py")
    assert set(reached(tmp_path, cell).modules) == {"pkg", "pkg.one"}


UNSEEN = {
    "exec(open('h.py').read())": "exec",
    "exec(Path(name).read_text(), {})": "exec",
    "exec(compile(open(path).read(), path, 'exec'))": "exec",
    "import builtins\nbuiltins.exec(code)": "exec",
    "x = eval(open('h.py').read())": "eval",
    "import importlib.util as u\nspec = u.spec_from_file_location('h', path)": "spec_from_file_location",
    "from importlib.util import spec_from_file_location as find": "spec_from_file_location",
    "from importlib.machinery import SourceFileLoader\nSourceFileLoader('h', path).load_module()": "SourceFileLoader",
    "import runpy\nvalues = runpy.run_path('h.py')": "run_path",
    "import runpy as other\nvalues = other.run_path('h.py')": "run_path",
    "import runpy\nrun = runpy.run_path\nrun('h.py')": "run_path",
    "x = 1\n%run h.py": "%run",
    "%time %run h.ipynb": "%run",
    "%load h.py": "%load",
    "run h.py": "run",
    "get_ipython().run_line_magic('run', 'h.py')": "run_line_magic",
    "get_ipython().magic('run h.py')": "magic",
    "!python h.py --fast": "!python",
    "%%time\nexec(text)": "exec",
    "!{sys.executable} helper.py": "!python",
    "!python -m helper": "!python",
    "x = !python helper.py": "!python",
    "%time !python helper.py": "!python",
    "!python \\\n  helper.py": "!python",
    "!./helper.py": "!python",
    "%%bash\ncd code\npython3 helper.py": "%%bash",
    "%%sh\npython -m helper": "%%sh",
    "%%script bash\npython helper.py": "%%script",
    "get_ipython().system('python helper.py')": "get_ipython().system",
    "import os\nos.system('python helper.py')": "os.system",
    "os.system(f'{sys.executable} -m helper')": "os.system",
    "subprocess.run([sys.executable, 'helper.py'], check=True)": "subprocess.run",
    "from subprocess import run\nrun(['./helper.py'])": "run",
    "subprocess.call(['python', '-m', 'helper'])": "subprocess.call",
    "subprocess.check_call('python helper.py', shell=True)": "subprocess.check_call",
    "text = subprocess.check_output([sys.executable, name])": "subprocess.check_output",
    "import subprocess as sp\nsp.Popen(args=[sys.executable, name])": "sp.Popen",
    "papermill.execute_notebook('other.ipynb', 'out.ipynb')": "execute_notebook",
    "import runpy\nrunpy.run_module(name)": "run_module",
}
SEEN = ["exec('x = 1')", "exec(compile('x = 1', 'here', 'exec'))", "eval(text)", "frame.eval('a + b')"]
SEEN += ["%load_ext autoreload", "%matplotlib inline", "!ls *.py", "text = '''\n%run h.py\n'''", "run = load = 1\nrun"]
SEEN += ["# exec(open('h.py').read())", "%%time\nx = 1", "!pip list", "cursor.exec(sql)", "self.run_path = 1"]
SEEN += ["import importlib\nimportlib.import_module('json')", "!{sys.executable} -m pip list", "!python --version"]
SEEN += ["import subprocess\nsubprocess.run(['git', 'log'], check=True)", "os.system('ls')", "files = !ls"]
SEEN += ["%%bash\ngit log", "import runpy\nrunpy.run_module('helper')", "print('python helper.py')", "app.run(port=80)"]


@pytest.mark.parametrize("cell", [*UNSEEN, *SEEN])
def test_code_that_is_read_from_a_file_is_told(tmp_path: Path, cell: str) -> None:
    notebook = write_notebook(tmp_path / "n.ipynb", cell)
    what = UNSEEN.get(cell)
    expected = (f"its notebook says {what}, and I can't follow that",) if what else ()
    assert source_closure(notebook).unfollowed == expected


def test_a_module_that_reads_code_from_a_file_is_told_by_name(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "import plugins\n")
    write(tmp_path / "plugins.py", "def load(path):\n    exec(open(path).read())\n")
    notebook = write_notebook(tmp_path / "n.ipynb", "import helper\nfrom mlops_course.course import running")
    assert source_closure(notebook, [tmp_path]).unfollowed == ("plugins says exec, and I can't follow that",)


def test_a_module_run_by_its_name_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "helper.py", "x = 1\n")
    notebook = write_notebook(tmp_path / "n.ipynb", "import runpy\nrunpy.run_module('helper')")
    found = source_closure(notebook, [tmp_path])
    assert ("helper" in found.modules, found.unfollowed) == (True, ())


@pytest.mark.parametrize("where", ["a parameter", "the notebook", "a module"])
def test_code_that_a_text_names_is_followed(tmp_path: Path, where: str) -> None:
    """`module:attribute` is how a use case names its features, and a pipeline its use case."""
    write(tmp_path / "bikes.py", 'features = "bike_features:make"')
    write(tmp_path / "bike_features.py", "import wheels")
    write(tmp_path / "wheels.py")
    write(tmp_path / "cases.py", 'default = "bikes:case"')
    cells = {"a parameter": "case = None", "the notebook": 'case = "bikes:case"', "a module": "import cases"}
    notebook = write_notebook(tmp_path / "stage.ipynb", cells[where])
    found = source_closure(notebook, [tmp_path], texts=["bikes:case"] if where == "a parameter" else [])
    assert {"bikes", "bike_features", "wheels"} <= set(found.modules)


@pytest.mark.parametrize("text", ["numpy:array", "os:path", "no_such_module:at_all", "note: bikes", "bikes", "a:b:c"])
def test_a_text_that_only_looks_like_a_name_leads_nowhere(tmp_path: Path, text: str) -> None:
    write(tmp_path / "bikes.py")
    found = source_closure(write_notebook(tmp_path / "stage.ipynb", f"x = {text!r}"), [tmp_path], texts=[text])
    assert (found.modules, found.packages) == ({}, ())


def test_what_our_own_modules_name_in_texts_leads_to_nobody_elses_modules(tmp_path: Path) -> None:
    """A text of ours gives `rates:newest` as an example: no stage depends on somebody's rates.py for that."""
    source = Path(definition.__file__).read_text(encoding="utf-8")
    assert '"rates:newest"' in source
    write(tmp_path / "rates.py")
    found = source_closure(write_notebook(tmp_path / "stage.ipynb", f"import {definition.__name__}"), [tmp_path])
    assert definition.__name__ in found.modules and "rates" not in found.modules


def test_a_cell_in_another_language_imports_nothing(tmp_path: Path) -> None:
    write(tmp_path / "pkg.py")
    assert reached(tmp_path, "%%bash\nfor f in *; do echo $f; done").modules == {}


@pytest.mark.parametrize("broken", ["def f(:\n", "import \x00"])
def test_a_module_that_python_cannot_read_still_counts(tmp_path: Path, broken: str) -> None:
    write(tmp_path / "helper.py", broken)
    before = reached(tmp_path, "import helper").modules
    write(tmp_path / "helper.py", broken + "#")
    assert set(before) == {"helper"}
    assert reached(tmp_path, "import helper").modules != before


def test_the_search_is_pythons(tmp_path: Path) -> None:
    """A package before a module; a module named like one of Python's or an installed one is not reached."""
    write(tmp_path / "both" / "__init__.py", "# package")
    write(tmp_path / "both.py", "# module")
    write(tmp_path / "json.py")
    write(tmp_path / "pandas.py")
    write(tmp_path / "space" / "inner.py")
    found = reached(tmp_path, "import both, json, pandas, space.inner")
    assert set(found.modules) == {"both", "space.inner"}
    assert found.files["both"].path.endswith("__init__.py")
    sys.path.append(str(tmp_path))
    try:
        importlib.invalidate_caches()
        for name in ("both", "space.inner"):
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert spec.origin == found.files[name].path
    finally:
        sys.path.remove(str(tmp_path))
        for name in ("both", "space", "space.inner"):
            sys.modules.pop(name, None)


def test_nothing_is_imported_to_find_it(tmp_path: Path) -> None:
    write(tmp_path / "pkg" / "__init__.py", "raise SystemExit('imported')")
    write(tmp_path / "pkg" / "one.py", "raise SystemExit('imported')")
    assert set(reached(tmp_path, "import pkg.one").modules) == {"pkg", "pkg.one"}


def test_a_module_that_appears_later_is_found(tmp_path: Path) -> None:
    cell = "try:\n    import helper\nexcept ImportError:\n    helper = None"
    assert reached(tmp_path, cell).modules == {}
    write(tmp_path / "helper.py")
    assert set(reached(tmp_path, cell).modules) == {"helper"}


def test_this_package_is_always_project_source(root: Path, tmp_path: Path) -> None:
    found = reached(tmp_path, "from mlops_course.pipelines import record_result")
    assert {"mlops_course", "mlops_course.pipelines", "mlops_course.environment"} <= set(found.modules)
    assert found.files["mlops_course.environment"].path == str(root / "mlops_course" / "environment.py")


def test_this_package_in_site_packages_is_project_source_as_well(root: Path, tmp_path: Path) -> None:
    """As after `pip install` of the wheel."""
    site = tmp_path / "lib" / "site-packages"
    shutil.copytree(root / "mlops_course", site / "mlops_course", ignore=shutil.ignore_patterns("__pycache__"))
    notebook = write_notebook(tmp_path / "a.ipynb", "import mlops_course.environment")
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "from pathlib import Path\n"
        "from mlops_course.pipelines.cache.closure import source_closure\n"
        f"found = source_closure(Path({str(notebook)!r}))\n"
        "print(found.files['mlops_course.environment'].path, found.cells, sorted(found.modules.items()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    here = source_closure(notebook)
    file, cells, modules = run.stdout.strip().split(" ", 2)
    assert Path(file).is_relative_to(site)
    assert (cells, modules) == (here.cells, str(sorted(here.modules.items()))), "the same, wherever it is"


def test_an_editable_installation_is_project_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a .pth file it is on sys.path; by setuptools' finder it isn't."""
    write(tmp_path / "clone" / "company_library" / "__init__.py", "from . import inner")
    write(tmp_path / "clone" / "company_library" / "inner.py")
    notebook = write_notebook(tmp_path / "a.ipynb", "import company_library")

    class Finder:
        __module__ = "__editable___company_library_1_0_finder"

        @staticmethod
        def find_spec(name: str, path: object = None) -> object:
            folder = tmp_path / "clone" / "company_library"
            if name != "company_library":
                return None
            return importlib.util.spec_from_file_location(
                name, folder / "__init__.py", submodule_search_locations=[str(folder)]
            )

    assert source_closure(notebook).packages == ("company_library",)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [*sys.meta_path, Finder()])
        by_finder = source_closure(notebook)
    monkeypatch.syspath_prepend(str(tmp_path / "clone"))
    assert by_finder.modules == source_closure(notebook).modules
    assert set(by_finder.modules) == {"company_library", "company_library.inner"}


def test_it_is_the_same_wherever_the_project_lies(tmp_path: Path) -> None:
    found = []
    for place in (tmp_path / "one", tmp_path / "two" / "deeper"):
        write(place / "helper.py", "x = 1")
        found.append(reached(place, "import helper"))
    one, two = found
    assert (one.cells, one.modules, one.packages) == (two.cells, two.modules, two.packages)


def test_a_touched_module_is_told_even_if_it_was_put_back(tmp_path: Path) -> None:
    helper = write(tmp_path / "helper.py", "x = 1")
    settle(helper)
    found = reached(tmp_path, "import helper")
    assert found.touched() == []
    helper.write_text("x = 2", encoding="utf-8")
    helper.write_text("x = 1", encoding="utf-8")
    assert found.touched() == ["helper"]
    helper.unlink()
    assert found.touched() == ["helper"]


def test_modules_that_only_the_run_shows_have_portable_names(tmp_path: Path) -> None:
    helper, plugin = write(tmp_path / "helper.py"), write(tmp_path / "plugins" / "one.py")
    found = reached(tmp_path, "import helper")
    extra = unseen_modules(found, [str(helper), str(plugin), str(tmp_path / "gone.py")])
    assert extra == {"plugins/one.py": str(plugin), "gone.py": str(tmp_path / "gone.py")}
    assert find_module_file("plugins/one.py", [str(tmp_path)]) == plugin
    assert find_module_file("plugins/two.py", [str(tmp_path)]) is None
    assert relative_module_file("/elsewhere/x.py", []) == "/elsewhere/x.py"


# ---------------------------------------------------------------- packages


def distribution(site: Path, name: str, version: str, files: dict[str, str]) -> None:
    lines = [f"{file},sha256={content},3" for file, content in files.items()]
    lines += [f"{name}-{version}.dist-info/METADATA,sha256=any,9", f"../../bin/{name},sha256={site.name},3"]
    write(site / f"{name}-{version}.dist-info" / "RECORD", "\n".join(lines) + "\n")


def test_packages_are_read_from_folder_names_and_their_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for site in (one, two):
        distribution(site, "Company_Lib", "0.1.0", {"company/__init__.py": "aaa"})
        (site / "old-2.0-py3.11.egg-info").mkdir()
    found = []
    for site in (one, two):
        monkeypatch.setattr(sys, "path", [str(site)])
        found.append(installed_packages())
    assert found[0] == found[1], "the place does not count"
    assert found[0]["company-lib"].startswith("0.1.0 ")
    assert found[0]["old"] == "2.0"
    distribution(two, "Company_Lib", "0.1.0", {"company/__init__.py": "bbb"})
    assert installed_packages()["company-lib"] != found[0]["company-lib"], "the same version, built again"


def test_installed_packages_are_those_of_importlib(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    normal = lambda name: name.replace("_", "-").replace(".", "-").lower()  # noqa: E731
    found = installed_packages()
    expected = {normal(dist.name): dist.version for dist in metadata.distributions()}
    expected.pop("mlops-course", None)
    assert {name: text.split()[0] for name, text in found.items()} == expected


def test_threads_read_modules_at_the_same_time(tmp_path: Path) -> None:
    """Python 3.11 can let go of a half-made syntax tree when garbage is collected, and a second one then breaks it."""
    for number in range(40):
        (tmp_path / f"module{number}.py").write_text("import json\n" + "y = [1, [2, [3, [4]]]]\n" * 300)
    notebook = write_notebook(tmp_path / "all.ipynb", "\n".join(f"import module{number}" for number in range(40)))
    let_others_run = lambda *_: time.sleep(0)  # noqa: E731
    gc.callbacks.append(let_others_run)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: source_closure(notebook, [tmp_path], HashMemo()), range(16)))
    finally:
        gc.callbacks.remove(let_others_run)
    assert all(each.modules == found[0].modules for each in found)
    assert {f"module{number}" for number in range(40)} <= found[0].modules.keys()


def test_stages_that_look_for_modules_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """One memory of folders serves all threads: one asks whether it is still right while another adds to it."""
    for number in range(60):
        write(tmp_path / f"package{number}" / "__init__.py")
    names = [f"import package{number}" for number in range(60)]
    notebooks = [write_notebook(tmp_path / f"{number}.ipynb", *names[number::12]) for number in range(12)]
    settle(tmp_path, *tmp_path.iterdir())
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda each: source_closure(each, [tmp_path], HashMemo()), notebooks * 10))
    finally:
        sys.setswitchinterval(before)
    assert all(len(each.modules) == 5 for each in found)

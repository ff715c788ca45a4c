"""Where notebooks touch the kernel itself: what they find in a warm process is what they find in the stock kernel.

The libraries themselves (widgets, plotly, bokeh) aren't needed: the cells do what these do.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from engine_helpers import comparable, request, run, write_notebook

from mlops_course.pipelines.engine.workers import Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="one warm kind is enough")

# What the widget for outputs does: it asks for the message that runs the cell, and has the frontend take its outputs.
OUTPUT_WIDGET = """
from comm import create_comm
class Output:
    def __init__(self, name):
        state = {'_model_module': '@jupyter-widgets/output', '_model_name': 'OutputModel', 'msg_id': '', 'outputs': [],
                 '_model_module_version': '1.0.0'}
        self.comm = create_comm('jupyter.widget', comm_id=name, data={'state': state, 'buffer_paths': []},
                                metadata={'version': '2.1.0'})
    def listen(self, name):
        self.comm.send({'method': 'update', 'state': {'msg_id': name}, 'buffer_paths': []})
    def __enter__(self):
        kernel = getattr(get_ipython(), 'kernel', None)
        if kernel is not None:
            self.listen(kernel.get_parent()['header']['msg_id'])
    def __exit__(self, kind, error, frames):
        if kind is not None:
            get_ipython().showtraceback((kind, error, frames), tb_offset=0)
        sys.stdout.flush()
        self.listen('')
        return getattr(get_ipython(), 'kernel', None) is not None
"""
# Each with the text that the cell shows under the stock kernel. They are run alone, and warm only: after several of
# them in one notebook, nbclient waits for ever for the next cell.
WIDGETS: dict[str, tuple[str, str]] = {
    "print": ("with Output('out'):\n    print('caught')\nprint('not caught')", "not caught\n"),
    "an error": ("with Output('out'):\n    raise ValueError('swallowed')\nprint('after')", "after\n"),
    "a display": ("with Output('out'):\n    display('caught')", ""),
    "nested": (
        "with Output('outer'):\n    print('outer')\n    with Output('inner'):\n        print('inner')\nprint('after')",
        "after\n",
    ),
}
CELLS: dict[str, str] = {
    "setup": "import os, sys\nshell = get_ipython()\n" + OUTPUT_WIDGET,
    # what libraries look at to know where they are
    "class of the shell": "type(shell).__name__, type(shell).__module__",
    "as plotly looks": "import IPython\n"
    "found = IPython.get_ipython()\n"
    "'mimetype' if type(found).__name__ == 'ZMQInteractiveShell' and type(found).__module__.startswith('ipykernel.') "
    "else 'all of the JavaScript'",
    "as tqdm looks": "'IPKernelApp' in shell.config, 'ipykernel.zmqshell' in sys.modules",
    "as pandas looks": "hasattr(shell, 'kernel')",
    "as bokeh looks": "shell.has_trait('kernel')",
    "a kernel": "shell.kernel is not None and type(shell.kernel).__name__",
    "its shell": "shell.kernel.shell is shell",
    "its implementation": "shell.kernel.implementation, shell.kernel.language",
    "its session": "len(shell.kernel.session.session) > 8",
    "its parent": "shell.kernel.get_parent()['header']['msg_type']",
    "the shell's parent": "shell.parent_header['header']['msg_type'], shell.get_parent()['msg_type']",
    "code of the cell in its parent": "shell.get_parent()['content']['code'][:15]",
    "a message of its own": "shell.kernel.session.send(shell.kernel.iopub_socket, 'display_data', "
    "{'data': {'text/plain': 'sent'}, 'metadata': {}}, parent=shell.kernel.get_parent())\nNone",
    "its comm manager": "shell.kernel.comm_manager.register_target('mine', lambda comm, message: None)",
    "a kernel app": "from ipykernel.kernelapp import IPKernelApp\nIPKernelApp.initialized()",
    # magics of the kernel
    "autosave": "%autosave 60",
    "autosave off": "%autosave 0",
    "magics of the kernel": "sorted({'autosave', 'clear', 'connect_info', 'edit', 'less', 'man', 'more', 'qtconsole'} "
    "& set(shell.magics_manager.magics['line']))",
    "less": "open('text.txt', 'w').write('some text')\n%less text.txt",
    # what widgets talk through
    "comm of the kernel": "from ipykernel.comm import Comm\nComm(target_name='nobody').comm_id != ''",
    "comm target": "from comm import get_comm_manager\n"
    "get_comm_manager().register_target('target', lambda comm, message: None)\n"
    "'target' in get_comm_manager().targets",
    "comm that nobody knows": "c = create_comm('nobody', data={'id': 1})\nc.send({'id': 2})\nc.close()",
    "a widget": "Output('saved')\nNone",
    "comms by id": "channel = create_comm('nobody', comm_id='known')\n'known' in get_comm_manager().comms",
    # streams
    "echo and parent of a stream": "sys.stdout.echo is None, hasattr(sys.stdout, 'set_parent')",
    "displays of the publisher": "shell.display_pub.session is shell.kernel.session",
    "hook on displays": "seen = []\ndef hook(message):\n    seen.append(message['msg_type'])\n    return message\n"
    "shell.display_pub.register_hook(hook)\ndisplay(1)\nshell.display_pub.unregister_hook(hook)\nseen",
    "in another thread": "import threading\nthread = threading.Thread(target=print, args=['from a thread'])\n"
    "thread.start(); thread.join()",
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    notebook = write_notebook(tmp_path_factory.mktemp("source") / "touches.ipynb", CELLS, ("raises-exception",))
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    yield tuple(run(kind, notebook, tmp_path_factory.mktemp(kind)) for kind in ("kernel", "fork"))


@pytest.mark.parametrize("name", list(CELLS))
def test_a_cell_that_touches_the_kernel_finds_what_is_there(name: str, both: tuple[Any, Any]) -> None:
    stock, warm = ([cell for cell in page.cells if cell.cell_type == "code"] for page in both)
    index = list(CELLS).index(name)
    assert comparable(warm[index]) == comparable(stock[index])


@pytest.mark.parametrize("name", list(WIDGETS))
def test_an_output_widget_catches_what_is_shown_in_it(name: str, tmp_path: Path) -> None:
    code, shown = WIDGETS[name]
    asked = request(write_notebook(tmp_path / "widget.ipynb", [CELLS["setup"], code]), tmp_path / "there")
    with Workers("fork") as workers:
        workers.execute(asked)
    made = nbformat.read(asked.output, 4)
    assert "".join(output.get("text", output.output_type) for output in made.cells[1].outputs) == shown


def test_widgets_are_saved_with_the_notebook(both: tuple[Any, Any]) -> None:
    stock, warm = (page.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"] for page in both)
    assert warm == stock != {}


def test_a_figure_of_plotly_is_small(both: tuple[Any, Any], tmp_path: Path) -> None:
    """The stand-in for it: a library that writes all of its JavaScript where it doesn't know the frontend."""
    warm = both[1]
    index = list(CELLS).index("as plotly looks")
    assert [cell for cell in warm.cells if cell.cell_type == "code"][index].outputs[0].data[
        "text/plain"
    ] == "'mimetype'"
    assert len(nbformat.writes(warm)) < 100_000

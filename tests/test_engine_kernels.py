"""A notebook runs with the kernel that it names, or not at all."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_client.kernelspec import NoSuchKernel

from mlops_course.environment import CourseError
from mlops_course.pipelines import engine
from mlops_course.pipelines.engine.recording import find_kernel
from mlops_course.pipelines.engine.requests import Request
from mlops_course.pipelines.engine.workers import Workers

OWN = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
WHO = "import os, sys\nprint(os.environ.get('KERNEL_OF', 'nobody'), '_notebook_kernel' in sys.modules)"


@pytest.fixture(autouse=True, scope="module")
def close_engine() -> Iterator[None]:
    yield
    engine.close_kept()


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where Jupyter looks for kernels, before all others."""
    folder = tmp_path / "jupyter" / "kernels"
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    install(folder, "same", {"argv": OWN})
    install(folder, "same-by-name", {"argv": ["python", *OWN[1:]]})
    install(folder, "same-without-frozen", {"argv": [OWN[0], "-Xfrozen_modules=off", *OWN[1:]]})
    install(folder, "with-variable", {"argv": OWN, "env": {"KERNEL_OF": "somebody"}})
    install(folder, "with-option", {"argv": [*OWN, "--debug"]})
    install(folder, "other-python", {"argv": [str(tmp_path / "env" / "bin" / "python"), *OWN[1:]]})
    install(folder, "other-language", {"argv": ["R", "--slave"], "language": "R"})
    install(
        folder,
        "with-provisioner",
        {"argv": OWN, "metadata": {"kernel_provisioner": {"provisioner_name": "local-provisioner"}}},
    )
    return folder


def install(folder: Path, name: str, spec: dict[str, Any]) -> None:
    (folder / name).mkdir(parents=True)
    whole = {"display_name": name, "language": "python", **spec}
    (folder / name / "kernel.json").write_text(json.dumps(whole))


def write(path: Path, kernel: str | None, *sources: str) -> Path:
    metadata = {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}} if kernel else {}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.mark.parametrize("name", ["python3", "same", "same-by-name", "same-without-frozen"])
def test_this_python_under_any_name_is_itself(name: str, kernels: Path) -> None:
    assert find_kernel(name) is None


@pytest.mark.parametrize("name", ["with-variable", "with-option", "other-python", "other-language", "with-provisioner"])
def test_whatever_differs_is_another_kernel(name: str, kernels: Path) -> None:
    assert find_kernel(name) is not None


def test_another_environment_with_the_same_python_is_another_kernel(kernels: Path, tmp_path: Path) -> None:
    """Environments link to one Python: what they link to says nothing."""
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(os.path.realpath(sys.executable))
    assert find_kernel("other-python") is not None


def test_a_kernel_of_this_python_runs_warm_and_another_one_as_itself(
    kernels: Path, tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO", "papermill")
    said = {}
    for name in ("same", "with-variable"):
        source = write(tmp_path / "in.ipynb", name, WHO)
        given = {"engine_name": "mlops-course", "progress_bar": False, "cwd": tmp_path}
        papermill.execute_notebook(source, tmp_path / "out.ipynb", **given)
        said[name] = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text
    assert said == {"same": "nobody True\n", "with-variable": "somebody False\n"}
    assert "the kernel 'with-variable' (python) is another than this Python" in caplog.text
    assert "so papermill's own engine runs the notebook" in caplog.text


@pytest.mark.slow
def test_the_kernel_that_is_asked_for_wins(kernels: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.ipynb", "conda-env-of-somebody-py", WHO)
    command = ["papermill", str(source), str(tmp_path / "out.ipynb"), "--engine", "mlops-course", "--no-progress-bar"]
    refused = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "No such kernel named conda-env-of-somebody-py" in refused.stderr
    assert "Known are: other-language, other-python, python3, same," in refused.stderr
    assert "give papermill: -k python3" in refused.stderr
    assert not (tmp_path / "out.ipynb").exists()
    for kernel, expected in [("python3", "nobody True\n"), ("with-variable", "somebody False\n")]:
        done = subprocess.run([sys.executable, "-m", *command, "-k", kernel], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == expected


def test_a_python3_of_another_environment_is_papermills_to_start(kernels: Path, tmp_path: Path) -> None:
    install(kernels, "python3", {"argv": OWN, "env": {"KERNEL_OF": "a forgotten one"}})
    source = write(tmp_path / "in.ipynb", "python3", WHO)
    papermill.execute_notebook(source, tmp_path / "out.ipynb", engine_name="mlops-course", progress_bar=False)
    assert nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs[0].text == "a forgotten one False\n"


def test_another_language_gets_its_own_parameters_and_kernel(kernels: Path, tmp_path: Path) -> None:
    """The kernel can't start here, and that is what is said; Python isn't tried."""
    source = write(tmp_path / "in.ipynb", "other-language", "x <- 1")
    errors = []
    for kind in ("nbclient", "mlops-course"):
        with pytest.raises(Exception, match="R") as caught:
            papermill.execute_notebook(source, None, {"x": 2}, engine_name=kind, language="R", progress_bar=False)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("option", [{"extra_arguments": ["--debug"]}, {"resources": {"metadata": {"path": "there"}}}])
def test_options_about_a_kernel_get_one(option: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.ipynb", "python3", WHO, "os.path.basename(os.getcwd())")
    made = papermill.execute_notebook(source, None, engine_name="mlops-course", progress_bar=False, **option)
    assert made.cells[0].outputs[0].text == "nobody False\n"
    assert (made.cells[1].outputs[0].data["text/plain"] == "'there'") == ("resources" in option)


def test_hooks_of_nbclient_are_called_alike(tmp_path: Path) -> None:
    source = write(tmp_path / "in.ipynb", "python3", "1", "# nothing", "raise ValueError('x')")
    heard: dict[str, list[tuple[str, int | None]]] = {"nbclient": [], "mlops-course": []}
    names = (
        "on_notebook_start",
        "on_cell_start",
        "on_cell_execute",
        "on_cell_complete",
        "on_cell_executed",
        "on_cell_error",
    )
    for kind, calls in heard.items():

        def hook(name: str, calls: list[tuple[str, int | None]] = calls) -> Any:
            return lambda **facts: calls.append((name, facts.get("cell_index")))

        with pytest.raises(papermill.PapermillExecutionError):
            hooks = {name: hook(name) for name in names}
            papermill.execute_notebook(source, None, engine_name=kind, progress_bar=False, **hooks)
    assert heard["mlops-course"] == heard["nbclient"]
    assert {name for name, _ in heard["nbclient"]} == set(names)


# ---------------------------------------------------------------- stages


@pytest.fixture(scope="module")
def warm() -> Iterator[Workers]:
    with Workers() as workers:
        yield workers


def test_a_stage_of_another_kernel_is_refused(kernels: Path, warm: Workers, tmp_path: Path) -> None:
    for name, words in {
        "with-variable": r"asks for the kernel 'with-variable' \(python\), which starts .*python",
        "other-language": r"asks for the kernel 'other-language' \(R\), which starts R",
        "conda-env-of-somebody-py": "asks for the kernel 'conda-env-of-somebody-py', which this machine doesn't have",
    }.items():
        request = stage(tmp_path, name, "open('ran', 'w').close()")
        with pytest.raises(CourseError, match=words + ".*choose the kernel python3"):
            warm.execute(request)
        assert not (tmp_path / "ran").exists() and not request.output.exists()


@pytest.mark.parametrize("name", [None, "python3", "same"])
def test_a_stage_of_this_python_runs(name: str | None, kernels: Path, warm: Workers, tmp_path: Path) -> None:
    """`python3` is this Python for a stage, also when a folder of the machine says otherwise."""
    install(kernels, "python3", {"argv": ["/opt/other/bin/python", *OWN[1:]]})
    request = stage(tmp_path, name, "print('ran')")
    warm.execute(request)
    assert nbformat.read(request.output, 4).cells[0].outputs[0].text == "ran\n"


def stage(folder: Path, kernel: str | None, *sources: str) -> Request:
    source = write(folder / "stage.ipynb", kernel, *sources)
    return Request(source, folder / "out.ipynb", {}, folder, dict(os.environ), timeout=60)


def test_the_missing_kernel_is_papermills_own_error(tmp_path: Path) -> None:
    with pytest.raises(NoSuchKernel) as caught:
        find_kernel("nowhere")
    assert caught.value.name == "nowhere"
    assert "Known are: " in caught.value.__notes__[0]


def test_the_packages_of_another_environment_belong_to_no_project() -> None:
    """As in an environment with --system-site-packages: thousands of files would be too many for one message."""
    from mlops_course.pipelines.engine import kernel

    assert kernel._project_file("/elsewhere/lib/python3.11/site-packages/pandas/__init__.py") is None
    assert kernel._project_file("/elsewhere/project/rules.py") == "/elsewhere/project/rules.py"

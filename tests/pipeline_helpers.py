"""Small pipelines for the tests of all that runs them."""

import textwrap
from pathlib import Path

import nbformat

from mlops_course.pipelines import (
    PipelineRun,
)

RECORD = "from mlops_course.pipelines import record_result\n"


def write_notebook(path: Path, parameters: str | None, *cells: str) -> Path:
    """A stage notebook; the first cell gets the tag."""
    tagged = [] if parameters is None else [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    notebook = nbformat.v4.new_notebook(cells=[*tagged, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, path)
    return path


def write_pipeline(folder: Path, text: str, name: str = "demo") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


COUNTED = "with open({0!r}, 'a') as file:\n    file.write('{1}\\n')\n"


def write_chain(folder: Path) -> Path:
    """Three stages, one after the other; each writes its name into `ran` when it really runs."""
    ran = str(folder / "ran")
    write_notebook(
        folder / "double.ipynb",
        "number: int = 1\nnoise: int = 0  # changes nothing",
        COUNTED.format(ran, "double") + RECORD + "record_result(doubled=2 * number)",
    )
    write_notebook(
        folder / "square.ipynb",
        "doubled: int = None",
        COUNTED.format(ran, "square") + RECORD + "record_result(squared=doubled**2)",
    )
    write_notebook(folder / "tell.ipynb", "squared: int = None", COUNTED.format(ran, "tell") + "print(squared)")
    return write_pipeline(
        folder,
        """
        name: chain
        parameters:
          number: {type: integer, default: 1}
          noise: {type: integer, default: 0}
        stages:
          - name: double
            notebook: double.ipynb
            parameters: {number: "${number}", noise: "${noise}"}
            outputs: {doubled: value}
          - {name: square, notebook: square.ipynb, inputs: [doubled], outputs: {squared: value}}
          - {name: tell, notebook: tell.ipynb, inputs: [squared]}
        """,
        "chain",
    )


def statuses(record: PipelineRun) -> dict[str, str]:
    return {stage.name: stage.status for stage in record.stages}

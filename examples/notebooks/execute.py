"""Execute the notebooks of this folder and store their output, without Jupyter.

``python examples/notebooks/execute.py`` executes all, or those that are named. All code cells run
in one namespace, in the folder of the notebook, as in Jupyter.
"""

import ast
import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

FOLDER = Path(__file__).parent


def execute(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run all code cells. Returns the notebook with their output, and their namespace."""
    matplotlib.use("Agg")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with contextlib.chdir(path.parent):
        for count, cell in enumerate(cells, start=1):
            cell |= {"execution_count": count, "outputs": _run("".join(cell["source"]), names, f"{path.name}:{count}")}
    return notebook, names


def _run(source: str, names: dict[str, Any], place: str) -> list[dict[str, Any]]:
    """Run one cell. Returns its output: standard output, the last value, and figures."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        exec(compile(tree, place, "exec"), names)
        value = eval(compile(last, place, "eval"), names) if last else None
    outputs: list[dict[str, Any]] = []
    if text := stdout.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None and not source.rstrip().endswith(";"):
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs + [_picture(figure) for figure in _open_figures()]


def _open_figures() -> list[Any]:
    from matplotlib import pyplot

    return [pyplot.figure(number) for number in pyplot.get_fignums()]


def _picture(figure: Any) -> dict[str, Any]:
    from matplotlib import pyplot

    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80, metadata={"Software": None})
    pyplot.close(figure)
    data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "metadata": {}, "data": data}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        executed, _ = execute(path.resolve())
        path.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: executed")

"""The notebooks run offline from their own folder, and are committed without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.runs

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def source(cell: dict) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_stripped(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    assert isinstance(notebook["metadata"], dict)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(ids)
    for cell in notebook["cells"]:
        assert (
            cell["cell_type"] in ("code", "markdown")
            and isinstance(cell["metadata"], dict)
            and source(cell)
        )
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    script = tmp_path / f"{path.stem}.py"
    script.write_text(
        "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "code"), encoding="utf-8"
    )
    # PYTHONPATH: the package beside these tests, wherever the installed one lies.
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(path.parent.parent)}
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=path.parent,
        env=offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{path.name}:\n{result.stderr[-4000:]}"

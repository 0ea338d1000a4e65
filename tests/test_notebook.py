"""The notebook runs from its first cell to its last, and says what it said when it was kept."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "lora_mini.ipynb"
CELLS = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.slow
def test_every_cell_runs_and_training_helps(monkeypatch, tmp_path, capsys):
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in CELLS:
        exec("".join(cell["source"]), names)
        if "valid" in names:  # half of the steps, and of the rows, are enough here
            names |= {"batches": names["batches"][:20, :4], "valid": names["valid"][:16]}
    params, valid, evaluate = names["params"], names["valid"], names["evaluate"]
    before, after = (evaluate(params, names[name], valid) for name in ("adapter", "loaded"))
    assert after < before - 0.03, (before, after)
    assert abs(names["plain"] - names["beside"]).max() < 1e-3
    assert names["curves"].shape == (4, 20)
    assert "--- after" in capsys.readouterr().out


def test_the_kept_outputs_have_no_errors():
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert all(cell["execution_count"] for cell in CELLS)

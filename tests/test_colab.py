"""The notebook runs from top to bottom."""

import nbformat
import pytest
from nbclient import NotebookClient

from avjax.data import demo
from tests import runs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quickstart(demo_data, tmp_path, monkeypatch):
  monkeypatch.setenv("AVJAX_DATA", demo_data)
  path = runs.ROOT / "colabs" / "avmae_quickstart.ipynb"
  notebook = nbformat.read(path, as_version=4)
  values = {
    f"{stage}.{key}": value
    for stage in ("pretrain", "finetune")
    for key, value in {
      **{f"data.demo.{k}": v for k, v in runs.DEMO.items()},
      **{f"model.{k}": v for k, v in runs.STAGES.items()},
      "total_steps": 2,
      "total_epochs": 0.0,
      "batch_size": 8,
    }.items()
  }
  (cell,) = [
    c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])
  ]
  cell.source = (
    f"workdir = pathlib.Path({str(tmp_path)!r})\noverrides = {values!r}"
  )
  folder = {"metadata": {"path": str(runs.ROOT / "colabs")}}
  NotebookClient(notebook, timeout=300, resources=folder).execute()
  outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
  assert any("image/png" in o.get("data", {}) for o in outputs)
  text = "".join(o.get("text", "") for o in outputs)
  assert sum(name in text for name in demo.CLASSES) >= 5  # of one clip

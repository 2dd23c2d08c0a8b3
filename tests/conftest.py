"""Shapes in signatures are checked under pytest, and only here."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices for every test: meshes are chosen by config.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook

install_import_hook(["avjax"], "beartype.beartype")

import pathlib  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
  """The data_dir of a tiny av_demo, built once for all test processes."""
  from avjax import config
  from data_prep import av_demo
  from tests import runs

  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  section = config.data_section()
  section.dir = str(base / "avjax_data")
  section.demo.update(runs.DEMO)
  return str(pathlib.Path(av_demo.ensure_demo(section)))

"""Shapes in signatures are checked under pytest, and only here."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices for every test: meshes are chosen by config.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook

install_import_hook(["avjax"], "beartype.beartype")

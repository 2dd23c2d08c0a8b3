"""Two processes write and verify one checkpoint."""

from avjax.checkpoint import Checkpoints
from tests import runs

TWO_PROCESSES = """
import sys
import jax
import numpy as np
process, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, process)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from avjax.checkpoint import Checkpoints, RunLock
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
values = np.arange(32, dtype=np.float32).reshape(8, 4)
def put(spec):
  sharding = NamedSharding(mesh, spec)
  return jax.make_array_from_callback((8, 4), sharding, lambda i: values[i])
rows, columns = put(PartitionSpec("data")), put(PartitionSpec(None, "data"))
with RunLock(directory + "/lock"), Checkpoints(directory + "/c") as checkpoints:
  for step in (1, 2):
    checkpoints.save(step, {"w": rows, "n": np.int32(step)})
  checkpoints.wait()
  if process == 0:
    file = checkpoints.directory / "2" / "record" / "metadata"
    file.write_text(file.read_text().replace('"sum": "', '"sum": "0'))
  jax.experimental.multihost_utils.sync_global_devices("damaged")
  template = {"w": columns, "n": np.int32(0)}
  step, state, _ = checkpoints.restore(template)
  assert (step, int(state["n"])) == (1, 1), step
  assert state["w"].sharding == columns.sharding
  for shard in state["w"].addressable_shards:
    np.testing.assert_array_equal(shard.data, values[shard.index])
  checkpoints.save(2, {"w": columns, "n": np.int32(7)})
  assert int(checkpoints.restore(template)[1]["n"]) == 7
"""


def test_two_processes_save_verify_and_fall_back_together(tmp_path):
  runs.two_processes(TWO_PROCESSES, tmp_path)
  assert Checkpoints(tmp_path / "c", keep=None).restore()[1]["n"] == 7


MANY_ARRAYS = """
import sys
import jax
import numpy as np
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + port, 2, process)
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from avjax import stored_step
mesh = jax.make_mesh(
  (2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
)
sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
values = np.arange(32, dtype=np.float32).reshape(8, 4)
arrays = {
  str(i): jax.make_array_from_callback(
    (8, 4), sharding, lambda at, i=i: values[at] + i
  )
  for i in range(150)
}
found = stored_step.checksums(arrays)
host = stored_step.checksums({str(i): values + i for i in range(150)})
assert found == host
"""


def test_checksums_of_many_arrays_do_not_wait_for_each_other(tmp_path):
  runs.two_processes(MANY_ARRAYS, tmp_path)

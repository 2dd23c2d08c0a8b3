"""The contract between a paper and everything else.

The trainer, the evaluators, `embed.py` and the plots know this contract and no
paper. A paper is one subclass in its own file, entered in `METHODS`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

Params = Any  # nested dict of arrays; per-layer names: encoder/block_00/…
Inputs = Mapping[str, jax.Array]  # avjax.batch.INPUTS


@dataclasses.dataclass(frozen=True)
class ParamInfo:
  """What the optimiser needs to know of one parameter.

  Attributes:
    layer: 0 = embeddings, i+1 = block i, num_layers+1 = head and the rest;
      layer-wise decay scales the learning rate by decay^(num_layers+1-layer).
    group: name looked up in `optimizer.multipliers`.
    decay: whether weight decay applies.
  """

  layer: int
  group: str = "default"
  decay: bool = True


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Result of `adapt`: the parameters and what became of every name.

  Attributes:
    params: the target parameters with the source's values filled in.
    loaded: target path -> source path.
    missing: target paths that keep their initial values.
    unused: source paths that nothing took.
    reshaped: target path -> words on how its source was changed.
  """

  params: Params
  loaded: Mapping[str, str]
  missing: Sequence[str]
  unused: Sequence[str]
  reshaped: Mapping[str, str]


class Method:
  """A paper's model and objective.

  Attributes:
    config: the whole experiment's config, read only.
    num_layers: depth that layer-wise decay counts with.
    modes: what `predict` accepts, of 'a', 'v', 'av', 'missing_a', ….
    batch_multiple: divides the training examples on every device.
  """

  num_layers: int = 0
  modes: tuple[str, ...] = ("av",)
  batch_multiple: int = 1

  def __init__(self, config: Any):
    self.config = config

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """Float32 parameters, per-layer names. Runs under `eval_shape` too."""
    raise TypeError(f"{type(self).__name__} does not define init")

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The training objective.

    Returns:
      The scalar mean over the valid examples of the global batch, and `aux`:
      'metrics' (name -> scalar), optional 'intermediates' (name -> array) and
      optional 'trainable' (group -> bool array; a group that is false keeps
      its parameters, moments, step count and decay untouched in this step).
    """
    raise TypeError(f"{type(self).__name__} does not define loss")

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """Pooled features by name, each [b, d]; documented per method."""
    raise TypeError(f"{type(self).__name__} does not define embed")

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """Logits by head: 'label' [b, k], 'verb', 'noun', 'segment' [b, t, k]."""
    raise TypeError(f"{type(self).__name__} does not define predict")

  def param_info(self, path: str) -> ParamInfo:
    """Layer, group and decay of a parameter such as 'encoder/block_00/…'."""
    raise TypeError(f"{type(self).__name__} does not define param_info")

  def adapt(
    self, params: Params, source: Params, source_config: Mapping[str, Any]
  ) -> Loaded:
    """Starts this model from another one's parameters (`init_from`).

    Args:
      params: freshly initialised parameters of this model.
      source: the other model's parameters under the house's names; when a
        dict {'audio': …, 'video': …} of two sources is given, each stream
        starts from its own.
      source_config: the source's resolved config ('method', 'model'), or a
        dict of two by modality.
    """
    raise TypeError(f"{type(self).__name__} does not define adapt")

"""What the methods on CAV-MAE's encoder share.

The encoder is in `avjax/nn/cav_encoder.py`. Weight decay applies to every
parameter of this family; those that no loss reaches are of the group `frozen`.
`PatchMethod` is AVSiam's base, too.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avjax import losses
from avjax.errors import InputError
from avjax.methods.base import Inputs, Loaded, Method, ParamInfo, Params
from avjax.methods.cavmae_config import check
from avjax.nn import cav_encoder, masking, sizes
from avjax.nn.cav_encoder import ALONE, INPUTS, CAVEncoder, Ids, Pass
from avjax.nn.masking import Keys
from avjax.nn.transformer import stack_layers, unstack_layers
from avjax.optim import FROZEN
from avjax.weights import transfer

# LayerNorms of the joint block, and the ending that tells their set.
NORM = re.compile(r"encoder_joint/(?:block_00/)?norm\d?(|_audio|_video)/")


class PatchMethod(Method):
  """A method on patches of a spectrogram and of one picture.

  Attributes:
    check: raises InputError if `config.model` cannot be, else returns it.
    optional: beginnings of parameters that `adapt` leaves alone where shapes
      differ.
    model: `config.model`, checked.
    size: of the encoder.
  """

  check: Callable[[Any], Any]
  optional: tuple[str, ...] = ()

  def __init__(self, config: Any):
    super().__init__(config)
    self.model = self.check(config.model)
    self.size = sizes.resolve(self.model)
    self.num_layers = self.size.depth

  def apply(
    self, module: Any, params: Params, inputs: Inputs, *rest: Any
  ) -> Any:
    """Runs a module on the inputs' patches, in the dtype of the config."""
    cav_encoder.check_places(params, module.grids)
    patches = cav_encoder.patches(inputs, self.model)
    patches = {m: patches[m].astype(self.config.dtype) for m in module.grids}
    return module.apply({"params": self.stacked(params)}, patches, *rest)

  def stacked(self, params: Params) -> Params:
    """Parameters as a module has them, which `scan` decides."""
    return stack_layers(params) if self.model.scan else params

  def draw_params(
    self, rng: jax.Array, inputs: Inputs, module: Any, *rest: Any
  ) -> Params:
    """Initial parameters under per-layer names, whatever `scan` says."""
    module = module.clone(stack={**module.stack, "scan": False})
    patches = cav_encoder.patches(inputs, self.model)
    return module.init(rng, patches, *rest)["params"]

  def tables(self) -> dict[str, Any]:
    """How `transfer.fill` resizes position tables, by their names."""
    mels = self.config.data.fbank.num_mels // self.model.patch_audio[0]
    found = {}
    for prefix in ("", "decoder_"):
      found[f"{prefix}positions_audio"] = transfer.time_axis(mels)
      found[f"{prefix}positions_video"] = transfer.picture
    return found


class CAVMethod(PatchMethod):
  """What pretraining and fine-tuning share."""

  check = staticmethod(check)  # of `config.model`
  fixed_positions = False
  optional = ("classifier/out", "head_")
  passes: Sequence[Pass] = ()  # of the training, through the joint block
  masked: Sequence[str] = tuple(INPUTS)  # whose kept tokens are drawn

  def encoder(
    self, inputs: Inputs, cls: Any = CAVEncoder, **more: Any
  ) -> CAVEncoder:
    """The Flax module for inputs of this size."""
    stack = {k: self.model[k] for k in ("attention", "remat", "scan")}
    grids = cav_encoder.grids(inputs, self.model)
    return cls(self.size, grids, self.fixed_positions, stack, **more)

  def stacked(self, params: Params) -> Params:
    """See `PatchMethod.stacked`; the joint block is never scanned."""
    if not self.model.scan:
      return params
    params = stack_layers(params)
    joint = unstack_layers(params["encoder_joint"])
    return {**params, "encoder_joint": joint}

  def draw_params(
    self, rng: jax.Array, inputs: Inputs, module: CAVEncoder, *rest: Any
  ) -> Params:
    """See `PatchMethod.draw_params`; arguments after the passes."""
    passes = [ALONE[m] for m in module.grids]
    passes = [("", tuple(module.grids)), *passes]
    params = super().draw_params(rng, inputs, module, passes, *rest)
    return cav_encoder.first_values(params)

  def draw(self, inputs: Inputs, rng: jax.Array) -> Ids:
    """Kept tokens by modality of `masked`, in ascending order of noise.

    Noise among the inputs (`noise/<m>`) is taken as it is; else every example
    draws by its own index.

    Raises:
      InputError: a ratio leaves no token.
    """
    keys, ids = masking.draw_keys(inputs, rng), {}
    grids = cav_encoder.grids(inputs, self.model)
    for i, (m, grid) in enumerate(grids.items()):
      if m not in self.masked:
        continue
      noise, ratio = inputs.get(f"noise/{m}"), self.model[f"mask_{m}"]
      if noise is None:
        noise = self.noise(m, masking.fold_in(keys, i), grid)
      n = grid[0] * grid[1]
      kept = cav_encoder.num_kept(m, n, ratio, f"model.mask_{m}=")
      ids[m] = masking.ids_keep(noise, kept)
    return ids

  def noise(
    self, m: str, keys: Keys, grid: tuple[int, int]
  ) -> Float[Array, "b n"]:
    """Noise of a modality's tokens; those of the largest are removed.

    Args:
      m: the modality.
      keys: one per example.
      grid: rows and columns of its tokens.
    """
    del m
    return masking.example_noise(keys, grid[0] * grid[1])

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """Retrieval features: what the contrastive loss compares, unmasked.

    Returns:
      'audio' and 'video' [b d] of the modalities in the inputs: the mean over
      all tokens after the modality's own pass, of length 1.
    """
    module = self.encoder(inputs)
    passes = [ALONE[m] for m in module.grids]
    tokens = self.apply(module, params, inputs, passes)
    pooled = [x.astype(jnp.float32).mean(1) for x in tokens]
    return dict(zip(module.grids, map(losses.unit, pooled), strict=True))

  def param_info(self, path: str) -> ParamInfo:
    """Layer 0 is the input, then the blocks; the joint block is the last."""
    stack, _, rest = path.partition("/")
    layer = self.num_layers + 1
    if stack.startswith(("embed_", "positions_", "modality_token_")):
      layer = 0
    elif stack.startswith("encoder_") and rest.startswith("block_"):
      block = int(rest.split("/")[0].removeprefix("block_"))
      joint = stack == "encoder_joint"
      layer = self.num_layers if joint else block + 1
    return ParamInfo(layer, self.group(path))

  def group(self, path: str) -> str:
    """The parameter group: FROZEN where no pass of the training gets.

    The public code's Adam leaves parameters without gradient alone; here decay
    would move them.
    """
    norm = NORM.match(path)
    if norm and norm[1] not in [ending for ending, _ in self.passes]:
      return FROZEN
    reached = {m for _, names in self.passes for m in names}
    root = path.split("/")[0]
    missed = tuple(m for m in INPUTS if m not in reached)
    return FROZEN if root.endswith(missed) else "default"

  def adapt(
    self, params: Params, source: Params, source_config: Mapping[str, Any]
  ) -> Loaded:
    """See `Method.adapt`: from pretraining or fine-tuning of this family.

    Position tables of another clip length or picture size are resized by
    `transfer.time_axis` and `transfer.picture`; a classifier of other classes
    keeps its initial values. {'audio': …, 'video': …} of two sources gives
    each branch its own; what both share comes from the video's.

    Raises:
      InputError: another number of blocks, or a shape that nothing changes.
    """
    two = set(source) == set(INPUTS)
    for m in INPUTS:
      check_blocks(params, source[m] if two else source, m)

    def candidates(path: str) -> list[str]:
      m = "audio" if "_audio" in path else "video"
      return [f"{m}/{path}" if two else path]

    return transfer.fill(
      params,
      source,
      candidates,
      reshape=self.tables(),
      optional=self.optional,
    )


def check_blocks(params: Params, source: Params, m: str) -> None:
  """Compares the stacks that a modality passes through with a source's.

  A source without the modality starts none of its blocks, one without a
  decoder leaves the decoder as it is.

  Raises:
    InputError: a stack has another number of blocks; names both.
  """
  if f"embed_{m}" not in params or f"embed_{m}" not in source:
    return
  for stack in (f"encoder_{m}", "encoder_joint", "decoder"):
    if stack == "decoder" and not (stack in params and stack in source):
      continue
    found, wanted = (
      sum(name.startswith("block_") for name in tree.get(stack, {}))
      for tree in (source, params)
    )
    if found != wanted:
      raise InputError(
        f"the source has {found} blocks in {stack}, the model {wanted}"
      )


def present(inputs: Inputs, names: Sequence[str]) -> Bool[Array, "b"]:
  """Examples that are no padding and have all of the named modalities."""
  told = ("valid", *(f"has_{m}" for m in names))
  flags = [inputs[key] for key in told if key in inputs]
  b = len(next(iter(inputs.values())))
  return jnp.stack([jnp.ones(b, bool), *flags]).all(0)


def where_missing(
  answer: Callable[[str], Float[Array, "b d"]],
  inputs: Inputs,
  x: Float[Array, "b d"],
  others: Mapping[str, str],
) -> Float[Array, "b d"]:
  """`x`, by another mode where an example lacks a modality (`has_<m>`).

  Another mode is computed only if the batch has such examples.

  Args:
    answer: mode -> what it makes of every example.
    inputs: the flags.
    x: what the mode of all modalities makes.
    others: the mode for examples that lack a modality, by modality.
  """
  for m, mode in others.items():
    if f"has_{m}" in inputs:
      lacks = ~inputs[f"has_{m}"]

      def alone(x=x, lacks=lacks, mode=mode):
        return jnp.where(lacks[:, None], answer(mode), x)

      x = jax.lax.cond(lacks.any(), alone, lambda x=x: x)
  return x

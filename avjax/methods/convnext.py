"""ConvNeXt on log-mel or on pictures: the feature extractors of UAVM.

arXiv:2208.00061, §2.1: a ConvNeXt-Base of ImageNet, trained to classify sounds
of the data set, whose last map is then UAVM's input (`nn.convnext.features`).
With `data.modality='v'` it is trained on pictures instead, which is ours: the
paper takes ImageNet's as it is.
What the paper leaves out is from the public code: mel bins are rows of a map
of one channel, whose stem is the sum over the colours of ImageNet's; the mean
over all places, a LayerNorm and a linear layer give the logits; ImageNet's
LayerNorm is kept, its linear layer is not. Stochastic depth is torchvision's
for this size, since its module was trained as it comes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.methods.base import Inputs, Loaded, Method, ParamInfo, Params
from avjax.methods.cavmae_config import LOSSES
from avjax.methods.supervised import chosen, classify, criterion, objective
from avjax.nn import convnext, heads, masking
from avjax.nn.transformer import drop_path, stack_layers
from avjax.weights import transfer

NAMES = {"a": "audio", "v": "video"}


def default_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model`: every key, with the public values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    "size": size,  # Ti, S, B, L
    "width": 0,  # channels of the first stage; 0 = as the size says
    "depths": (),  # blocks of the four stages; () = as the size says
    "drop_path": 0.5,  # of the last block, from 0 of the first
    "classes": {},  # by head; empty = the data set's
    "label_smoothing": 0.1,
    # bce: mean over the classes; auto: bce where data.multilabel, else ce.
    "loss": "auto",
    "scan": False,
    "remat": "none",  # see avjax.nn.transformer.REMAT
  }
  return with_overrides(values, overrides)


class ConvNeXtClassifier(Method):
  """The classifier's parameters are of the group `head`.

  Attributes:
    m: the modality that it reads; of several pictures the mean counts.
  """

  def __init__(self, config: Any):
    super().__init__(config)
    modality = config.data.modality
    if modality not in NAMES:
      raise InputError(
        f"ConvNeXt reads sound or pictures: data.modality={modality!r} must be "
        "'a' or 'v'"
      )
    self.m = NAMES[modality]
    self.modes = ("av", modality)  # the same
    self.model = config.model
    self.size = convnext.resolve(self.model)
    self.num_layers = sum(self.size.depths)
    self.classes = heads.classes(config)
    if "segment" in self.classes:
      raise InputError("ConvNeXt pools the whole clip: it has no segment head")
    lookup(dict.fromkeys(LOSSES), self.model.loss, "model.loss")
    self.criterion = criterion(config)

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; the linear layer as PyTorch's."""
    x, _ = self.maps(inputs)
    keys = jax.random.split(rng, 3)
    params = convnext.ConvNeXt(self.size).init(keys[0], x)["params"]
    d, k = self.size.channels, sum(self.classes.values())
    norm = {"scale": jnp.ones(d), "bias": jnp.zeros(d)}
    out = {
      name: jax.random.uniform(key, shape, minval=-1, maxval=1) * d**-0.5
      for name, key, shape in (
        ("kernel", keys[1], (d, k)),
        ("bias", keys[2], (k,)),
      )
    }
    return {**params, "classifier": {"norm": norm, "out": out}}

  def pooled(
    self,
    params: Params,
    inputs: Inputs,
    keep: Float[Array, "l b"] | None = None,
  ) -> Float[Array, "b d"]:
    """The mean over the last map, before the classifier's LayerNorm."""
    x, times = self.maps(inputs)
    x = x.astype(self.config.dtype)
    if keep is not None:
      keep = jnp.repeat(keep, times, axis=1)
    stack = {name: self.model[name] for name in ("scan", "remat")}
    if self.model.scan:
      params = stack_layers(params)
    maps = convnext.ConvNeXt(self.size, **stack).apply(
      {"params": params}, x, keep
    )
    means = maps["stage_3"].astype(jnp.float32).mean((1, 2))
    return means.reshape(-1, times, means.shape[1]).mean(1)

  def maps(self, inputs: Inputs) -> tuple[Float[Array, "n h w c"], int]:
    """The spectrograms or all pictures as maps; how many an example has."""
    (x,) = chosen(inputs, (self.m,)).values()
    if self.m == "audio":
      return convnext.spectrogram(x), 1
    return x.reshape(-1, *x.shape[2:]), x.shape[1]

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The mean over heads and over the examples that have the modality."""
    del step
    pooled = self.pooled(params, inputs, self.draw_keep(inputs, rng))
    logits = self.logits(params, pooled)
    loss, metrics = objective(self, logits, inputs, (self.m,))
    return loss, {"metrics": metrics, "intermediates": {"logits": logits}}

  def draw_keep(
    self, inputs: Inputs, rng: jax.Array
  ) -> Float[Array, "l b"] | None:
    """Patterns of stochastic depth; kept branches grow by what is lost."""
    rate = self.model.drop_path
    if not rate:
      return None
    keys = masking.draw_keys(inputs, rng)
    return drop_path(keys, self.num_layers, rate, rescale=True)[:, 0]

  def logits(
    self, params: Params, pooled: Float[Array, "b d"]
  ) -> Float[Array, "b k"]:
    """Of all heads, in float32."""
    return classify(params["classifier"], pooled, convnext.EPS)

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """'audio' or 'video' [b d]: the mean of the last map, not normalised."""
    return {self.m: self.pooled(params, inputs)}

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """See `Method.predict`; 'av' is what there is."""
    lookup(dict.fromkeys(self.modes), mode, "mode of predict")
    logits = self.logits(params, self.pooled(params, inputs))
    return heads.split(logits, self.classes)

  def param_info(self, path: str) -> ParamInfo:
    """Layer 0 is the stem, then the blocks; `down` goes with the next one."""
    root, *rest = path.split("/")
    if root == "classifier":
      return ParamInfo(self.num_layers + 1, "head")
    if not root.startswith("stage_"):
      return ParamInfo(0)
    before = sum(self.size.depths[: int(root[-1])])
    block = rest[0].removeprefix("block_")
    return ParamInfo(before + 1 + (int(block) if block.isdigit() else 0))

  def adapt(
    self, params: Params, source: Params, source_config: Mapping[str, Any]
  ) -> Loaded:
    """See `Method.adapt`: from a ConvNeXt of images or of sound.

    A stem of three colours is summed over them; a linear layer for other
    classes keeps its initial values.

    Raises:
      InputError: the source is no ConvNeXt, or one of another size.
    """
    if "embed" not in source or "stage_0" not in source:
      raise InputError(
        f"the source is no ConvNeXt; it has {', '.join(sorted(source))}"
      )
    found = convnext.size_of(source)
    if found != self.size:
      raise InputError(f"the source is a ConvNeXt of {found}, not {self.size}")
    return transfer.fill(
      params,
      source,
      lambda path: [path],
      reshape={"embed/kernel": transfer.channels},
      optional=("classifier/out",),
    )

"""The classifier that AVSiam fine-tunes with mixed inputs (arXiv:2403.19638).

§3.2, "Supervised Finetuning with Mixed Modality Inputs": every step sees sound
alone, pictures alone or both, and one model answers in all three modes.

| mode | share | classifier | reads |
|---|---|---|---|
| a | 1/4 | `classifier_audio` | mean of the sound's tokens |
| v | 1/4 | `classifier_video` | mean of the picture's tokens |
| av | 1/2 | `classifier_av` | both means, after the multimodal layers |

The mode of a step is drawn from the step's key, the same on all devices, and
nothing of the others is computed, forwards or backwards; their parameters,
moments and counts stay as they are. (The public code computes everything, draws
on each GPU, and takes the loss of one.)

A classifier is a LayerNorm and a linear layer (public code; the paper says
MLP) with PyTorch's first values. Tokens are not masked. Labels and losses are
those of CAV-MAE's fine-tuning.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from avjax.config import with_overrides
from avjax.errors import InputError, lookup
from avjax.methods import avsiam_config
from avjax.methods.avsiam_base import SiamMethod
from avjax.methods.base import Inputs, Loaded, Params
from avjax.methods.cavmae_base import where_missing
from avjax.methods.supervised import chosen, classify, criterion, objective
from avjax.nn import heads
from avjax.nn.cav_encoder import INPUTS, MODALITIES, Tokens
from avjax.nn.siam_autoencoder import MULTIMODAL
from avjax.nn.siam_encoder import SiamEncoder

__all__ = ["HEADS", "AVSiamFinetune", "default_model", "modes"]

# Mode -> parameter group of its classifier, in the order of `shares`.
HEADS = {"a": "head_audio", "v": "head_video", "av": "head_av"}
CLASSIFIERS = {
  "a": "classifier_audio",
  "v": "classifier_video",
  "av": "classifier_av",
}
LOSSES = ("auto", "bce", "ce")

FOREIGN = (
  "the source has an encoder for each modality and blocks of both behind them "
  "(as CAV-MAE, AV-MAE, MBT), AVSiam one for both: start it from a run of "
  "configs/avsiam_audioset.py, or from an image model"
)

PUBLIC_FILES = (
  "the public Base files go with model.norms='modality', "
  "model.double_input=True and model.eps=1e-5"
)

Branch = Callable[[Params, Inputs], tuple[jax.Array, Any]]


def default_model(size: str = "B", **overrides: Any) -> ConfigDict:
  """`config.model` of fine-tuning: every key, with the paper's values.

  Raises:
    InputError: an override that is no key; the nearest is named.
  """
  values = {
    **avsiam_config.common(size),
    # How often sound alone, pictures alone and both are trained; what is never
    # trained has no classifier.
    "shares": (0.25, 0.25, 0.5),
    "classes": {},  # by head; empty = the data set's
    "label_smoothing": 0.1,  # public
    # bce: mean over the classes; auto: bce where data.multilabel, else ce.
    "loss": "auto",
  }
  return with_overrides(values, avsiam_config.public(values, overrides))


def modes(model: Any) -> tuple[str, ...]:
  """The modes that are trained: those with a share.

  Raises:
    InputError: there are not three shares, or they are not of one whole.
  """
  shares = tuple(model.shares)
  if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
    raise InputError(
      f"model.shares={shares}: three numbers, of sound, pictures and both, "
      "none below 0, that add up to 1"
    )
  return tuple(m for m, share in zip(HEADS, shares, strict=True) if share)


class SiamPooled(SiamEncoder):
  """Encoder, multimodal layers and average pooling.

  Attributes:
    depth: number of multimodal layers.
  """

  depth: int = 2

  @nn.compact
  def __call__(
    self, patches: Tokens, together: bool
  ) -> dict[str, Float[Array, "b d"]]:
    """The mean over each modality's tokens, in float32.

    Args:
      patches: raw patches [b n p] by modality.
      together: whether sound and picture pass the multimodal layers first.
    """
    tokens = self.encode(patches, None)
    if together:
      x = jnp.concatenate(list(tokens.values()), axis=1)
      parts = (("", (x.shape[1],)),)
      x = self.blocks(MULTIMODAL, self.depth, parts, norm=False)(x)
      split = jnp.split(x, [tokens["audio"].shape[1]], axis=1)
      tokens = dict(zip(tokens, split, strict=True))
    return {m: x.astype(jnp.float32).mean(1) for m, x in tokens.items()}


class AVSiamFinetune(SiamMethod):
  """Fine-tuning; `config.model` as `default_model` has it.

  Parameters are of the groups `head_audio`, `head_video` and `head_av` (the
  classifiers), `multimodal`, `audio` and `video` (what one modality has for
  itself: embedding, positions, LayerNorms, an encoder of AVSep) and `default`,
  which every step trains.
  """

  def __init__(self, config: Any):
    super().__init__(config)
    self.modes = modes(self.model)
    lookup(dict.fromkeys(LOSSES), self.model.loss, "model.loss")
    self.names = tuple(
      m for m in INPUTS if any(m in MODALITIES[mode] for mode in self.modes)
    )
    self.classes = heads.classes(config)
    if "segment" in self.classes:
      raise InputError("AVSiam pools all tokens: it has no segment head")
    self.criterion = criterion(config)

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; what no mode of the training uses is not there."""
    rng, key = jax.random.split(rng)
    inputs = chosen(inputs, self.names)
    module, together = self.pooling(inputs), "av" in self.modes
    params = self.draw_params(rng, inputs, module, together)
    k = sum(self.classes.values())
    for i, mode in enumerate(self.modes):
      d = self.size.width * len(MODALITIES[mode])
      params[CLASSIFIERS[mode]] = first_classifier(
        jax.random.fold_in(key, i), d, k
      )
    return params

  def pooling(self, inputs: Inputs) -> SiamPooled:
    """The Flax module for inputs of this size."""
    return self.encoder(inputs, SiamPooled, depth=self.model.multimodal_depth)

  # --- One mode ---

  def logits(
    self, params: Params, inputs: Inputs, mode: str
  ) -> Float[Array, "b k"]:
    """Of all heads; reads the mode's own inputs alone."""
    names = MODALITIES[mode]
    inputs = chosen(inputs, names)
    module = self.pooling(inputs)
    means = self.apply(module, params, inputs, mode == "av")
    pooled = jnp.concatenate([means[m] for m in names], axis=-1)
    return classify(params[CLASSIFIERS[mode]], pooled)

  def objective(
    self, mode: str, params: Params, inputs: Inputs
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Float[Array, "b k"]]]:
    """The mean over heads and examples; losses by head, logits.

    Examples that lack a modality of the mode do not count. Their labels are
    mixed with the mean weight of the mode's modalities.
    """
    logits = self.logits(params, inputs, mode)
    loss, found = objective(self, logits, inputs, MODALITIES[mode])
    return loss, (found, logits)

  # --- Training ---

  def draw(self, rng: jax.Array) -> Int[Array, ""]:
    """Which of `modes` this step trains."""
    shares = [share for share in self.model.shares if share]
    return jax.random.choice(rng, len(shares), p=jnp.asarray(shares))

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The objective of the mode that is drawn.

    Metrics: `loss_<head>`, and `trained_<mode>`, 1 for the mode of the step.
    """
    del step
    which = self.draw(rng)
    branches = tuple(functools.partial(self.objective, m) for m in self.modes)
    loss, (metrics, logits) = one_of(branches, params, which, dict(inputs))
    drawn = {mode: which == i for i, mode in enumerate(self.modes)}
    for mode, flag in drawn.items():
      metrics = {**metrics, f"trained_{mode}": jnp.float32(flag)}
    return loss, {
      "metrics": metrics,
      "intermediates": {"logits": logits},
      "trainable": self.trainable(drawn) if len(drawn) > 1 else {},
    }

  def trainable(self, drawn: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Group -> whether the step trains it, for those that not all steps do."""
    flags = {HEADS[mode]: flag for mode, flag in drawn.items()}
    for m in self.names:
      uses = [flag for mode, flag in drawn.items() if m in MODALITIES[mode]]
      flags[m] = functools.reduce(jnp.logical_or, uses)
    return flags | ({MULTIMODAL: drawn["av"]} if "av" in drawn else {})

  def group(self, path: str) -> str:
    """See the class."""
    for mode, name in CLASSIFIERS.items():
      if path.startswith(f"{name}/"):
        return HEADS[mode]
    # encoder_audio/…, encoder/norm_audio/scale, encoder/block_00/norm1_audio/…
    for m in self.names:
      if any(part.endswith(f"_{m}") for part in path.split("/")):
        return m
    return super().group(path)

  # --- Use ---

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """See `Method.predict`; the modes are those that were trained.

    In mode 'av' an example that lacks a modality (`has_audio`, `has_video`) is
    answered in the other's mode, which is computed only if the batch has such
    examples.
    """
    lookup(dict.fromkeys(self.modes), mode, "mode of predict")
    logits = self.logits(params, inputs, mode)
    others = {"audio": "v", "video": "a"} if mode == "av" else {}
    others = {m: other for m, other in others.items() if other in self.modes}
    answer = functools.partial(self.logits, params, inputs)
    logits = where_missing(answer, inputs, logits, others)
    return heads.split(logits, self.classes)

  def adapt(self, params: Params, source: Params, source_config: Any) -> Loaded:
    """See `SiamMethod.adapt`.

    Raises:
      InputError: as there; the source is of another family, or leaves a part
        of the encoder at its first values.
    """
    if "encoder_joint" in source or set(source) == set(INPUTS):
      raise InputError(FOREIGN)
    loaded = super().adapt(params, source, source_config)
    left = [path for path in loaded.missing if path.startswith("encoder")]
    if left:
      raise InputError(
        f"the source has nothing for {left[0]!r} and {len(left) - 1} other "
        f"parameters of model.encoder={self.model.encoder!r} with model.norms="
        f"{self.model.norms!r}; " + PUBLIC_FILES
      )
    return loaded


def first_classifier(key: jax.Array, d: int, k: int) -> Params:
  """A LayerNorm and PyTorch's first values of a linear layer."""
  bound = d**-0.5
  keys = jax.random.split(key)
  return {
    "norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)},
    "out": {
      "kernel": jax.random.uniform(
        keys[0], (d, k), minval=-bound, maxval=bound
      ),
      "bias": jax.random.uniform(keys[1], (k,), minval=-bound, maxval=bound),
    },
  }


# --- One of several objectives -----------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def one_of(
  branches: Sequence[Branch], params: Params, which: jax.Array, inputs: Inputs
) -> tuple[jax.Array, Any]:
  """`branches[which](params, inputs)`: a loss and what goes with it.

  Its gradient, in `params` alone, is computed inside the branch. Derived from
  outside, a switch returns what every branch would have saved, zeros for those
  not taken: the memory of all branches instead of the largest one's (measured
  on three branches: 192 MB instead of 49).
  """
  return jax.lax.switch(which, branches, params, inputs)


def _forward(branches, params, which, inputs):
  grads = [jax.value_and_grad(branch, has_aux=True) for branch in branches]
  return jax.lax.switch(which, grads, params, inputs)


def _backward(branches, gradient, cotangents):
  del branches
  scale, _ = cotangents
  gradient = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradient)
  return gradient, None, None


one_of.defvjp(_forward, _backward)

"""UAVM: Towards Unifying Audio and Visual Models (arXiv:2208.00061).

The models of §II-A and §III-B are in `avjax/nn/uavm.py`, their sizes in
`uavm_config.py`. They read frozen features, `features/audio` and
`features/video` [b n d], of length 1 per token.

Training (algorithm 1): a step draws audio with probability λ_MT, else video,
from the step's key, the same on all devices. Nothing of the other modality is
computed, forwards or backwards, and its parameters, moments, counts and weight
decay rest. The cross-modal model sees both in every step.

Inference (algorithm 1): the logits of each modality, and of both their mean.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avjax.errors import InputError, lookup
from avjax.losses import at_least_float32
from avjax.methods.avsiam_base import check_blocks
from avjax.methods.avsiam_finetune import one_of
from avjax.methods.base import Inputs, Loaded, Method, ParamInfo, Params
from avjax.methods.supervised import criterion, objective
from avjax.methods.uavm_config import check, default_model
from avjax.nn import heads
from avjax.nn.uavm import (
  MODALITIES,
  SHARED,
  Encoder,
  Traces,
  attention_map,
)
from avjax.weights import transfer

__all__ = ["UAVM", "default_model"]

# Mode -> what it reads.
MODES = {"av": MODALITIES, "a": ("audio",), "v": ("video",)}


class UAVM(Method):
  """All three models; `config.model` as `uavm_config.default_model` has it.

  Parameters are of the groups `audio` and `video`, what one modality has for
  itself, and `default`.
  """

  def __init__(self, config: Any):
    super().__init__(config)
    self.model = check(config.model)
    self.num_layers = self.model.specific_layers + self.model.shared_layers
    self.together = self.model.variant == "cross_modal"
    self.modes = ("av",) if self.together else tuple(MODES)
    self.classes = heads.classes(config)
    if "segment" in self.classes:
      raise InputError("UAVM pools all tokens: it has no segment head")
    self.criterion = criterion(config)

  # --- The model (§II-A) ---

  def encoder(self) -> Encoder:
    """The Flax module."""
    model = self.model
    return Encoder(
      variant=model.variant,
      specific=model.specific_layers,
      shared=model.shared_layers,
      width=model.width,
      shared_width=model.shared_width,
      heads=model.heads,
      classes=sum(self.classes.values()),
      attention=model.attention,
    )

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; needs the features of both modalities."""
    return self.encoder().init(rng, self.features(inputs, MODALITIES))["params"]

  def features(
    self, inputs: Inputs, names: tuple[str, ...]
  ) -> dict[str, Float[Array, "b n _"]]:
    """The named modalities' tokens, in the dtype of the config.

    Raises:
      InputError: a modality is not there, or has another number of tokens.
    """
    found = {}
    for m in names:
      key, n = f"features/{m}", self.model.tokens
      if key not in inputs:
        raise InputError(f"the inputs have no {key!r} for the {m}")
      if inputs[key].shape[1] != n:
        raise InputError(
          f"{key!r} has {inputs[key].shape[1]} tokens, model.tokens={n}"
        )
      found[m] = inputs[key].astype(self.config.dtype)
    return found

  def there(self, inputs: Inputs) -> tuple[str, ...]:
    """Modalities whose features are there; those that the model needs."""
    found = tuple(m for m in MODALITIES if f"features/{m}" in inputs)
    return MODALITIES if self.together or not found else found

  def run(
    self, params: Params, inputs: Inputs, names: tuple[str, ...]
  ) -> tuple[dict[str, Float[Array, "b k"]], Traces]:
    """Logits and traces of the named modalities; see `Encoder`."""
    features = self.features(inputs, names)
    return self.encoder().apply({"params": params}, features)

  # --- Training (§II-B, algorithm 1) ---

  def draw(self, rng: jax.Array) -> Bool[Array, ""]:
    """Whether this step trains the audio."""
    return jax.random.uniform(rng) < self.model.lambda_audio

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The objective of the modality that is drawn; cross_modal: of both.

    Metrics: `loss_<head>`, and `trained_a`, 1 where the step trains the audio.
    """
    del step
    if self.together:
      loss, (metrics, logits) = self.objective("av", params, inputs)
      return loss, {"metrics": metrics, "intermediates": {"logits": logits}}
    audio = self.draw(rng)
    branches = tuple(functools.partial(self.objective, m) for m in "av")
    which = jnp.where(audio, 0, 1)
    loss, (metrics, logits) = one_of(branches, params, which, dict(inputs))
    rests = self.model.unused_params == "untouched"
    return loss, {
      "metrics": {**metrics, "trained_a": jnp.float32(audio)},
      "intermediates": {"logits": logits},
      "trainable": {"audio": audio, "video": ~audio} if rests else {},
    }

  def objective(
    self, mode: str, params: Params, inputs: Inputs
  ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Float[Array, "b k"]]]:
    """The mean over heads and examples; losses by head, logits.

    Examples that lack a modality of the mode do not count.
    """
    names = MODES[mode]
    ((_, logits),) = self.run(params, inputs, names)[0].items()
    loss, found = objective(self, logits, inputs, names)
    return loss, (found, logits)

  # --- Inference (algorithm 1) ---

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """See `Method.predict`; modes 'av', 'a' and 'v', of cross_modal 'av'.

    'av' is the mean of the two logits. An example that lacks a modality
    (`has_audio`, `has_video`) is answered from the other, a batch that has the
    features of one modality from these. The cross-modal model always needs
    both: what is missing it sees as the zeros that stand for it.
    """
    lookup(dict.fromkeys(self.modes), mode, "mode of predict")
    names = self.there(inputs) if mode == "av" else MODES[mode]
    logits = self.run(params, inputs, names)[0]
    mean = sum(logits.values()) / len(logits)
    if len(logits) == 2:
      for m, other in (MODALITIES, MODALITIES[::-1]):
        if f"has_{m}" in inputs:
          has = inputs[f"has_{m}"][:, None]
          mean = jnp.where(has, mean, logits[other])
    return heads.split(mean, self.classes)

  # --- What §III looks at ---

  def representations(
    self, params: Params, inputs: Inputs
  ) -> dict[str, list[Float[Array, "b _"]]]:
    """Means over time after every layer, by modality (§III-C, §III-D).

    Index 0 is what enters the first block ("projected input"), index i what
    block i gives, of N + N_s; then come the logits. Of the cross-modal model,
    which needs both modalities, a shared block gives each the mean over its
    own tokens, and there are no logits of one. Another model has a list for
    each modality in the inputs.
    """
    names = self.there(inputs)
    logits, traces = self.run(params, inputs, names)
    n, found = self.model.tokens, {}
    for i, m in enumerate(names):
      stacks = list(traces[m].values())
      if self.together:
        part = slice(i * n, (i + 1) * n)
        stacks.append([x[:, part] for x in traces["av"][SHARED]])
      first, *later = stacks
      tokens = [*first, *(x for trace in later for x in trace[1:])]
      found[m] = [at_least_float32(x).mean(1) for x in tokens]
      found[m] += [logits[m]] if m in logits else []
    return found

  def attention_maps(
    self, params: Params, inputs: Inputs, *, published: bool = False
  ) -> dict[str, list[Float[Array, "b h n n"]]]:
    """Attention of every block, by modality; rows are queries (§III-E).

    Of the cross-modal model, the shared blocks are under 'av'.

    Args:
      params: the parameters.
      inputs: features; the cross-modal model needs those of both.
      published: of the blocks' inputs without their first LayerNorm, as the
        figures of the paper have it. False: the maps that the model uses.
    """
    found = {}
    traces = self.run(params, inputs, self.there(inputs))[1]
    for m, stacks in traces.items():
      found[m] = [
        attention_map(
          params[stack][f"block_{i:02d}"],
          x,
          self.model.heads,
          published=published,
        )
        for stack, trace in stacks.items()
        for i, x in enumerate(trace[:-1])
      ]
    return found

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """'audio' and 'video' [b d]: means over time of what the last block gives.

    These are what the paper probes, and retrieves with by cosine; their length
    is not 1. See `representations` for the other layers.
    """
    found = self.representations(params, inputs)
    return {m: layers[self.num_layers] for m, layers in found.items()}

  # --- The optimiser and other models ---

  def param_info(self, path: str) -> ParamInfo:
    """Layer 0 is the input, then the N and the N_s blocks, then the rest."""
    stack, _, rest = path.partition("/")
    late = stack == SHARED or stack.startswith("encoder_late_")
    layer = self.model.specific_layers if late else 0
    if stack.startswith("classifier"):
      layer = self.num_layers + 1
    elif rest.startswith("block_"):
      layer += 1 + int(rest.split("/")[0].removeprefix("block_"))
    group = next((m for m in MODALITIES if stack.endswith(m)), "default")
    return ParamInfo(layer, group)

  def adapt(self, params: Params, source: Params, source_config: Any) -> Loaded:
    """See `Method.adapt`: from another model of this paper.

    An independent model may start both modalities from what a unified one
    shares. A classifier of other classes, and the positions of another number
    of tokens, keep their initial values.

    Raises:
      InputError: another number of blocks, or another width.
    """
    del source_config
    for stack in params:
      if stack in source:
        check_blocks(params, source, stack)

    def candidates(path: str) -> list[str]:
      root, _, rest = path.partition("/")
      shared = {
        f"{name}_{m}": whole
        for m in MODALITIES
        for name, whole in (
          ("encoder_late", SHARED),
          ("classifier", "classifier"),
        )
      }
      return [path, f"{shared.get(root, root)}/{rest}"]

    tables = [path for path in params if path.startswith("encoder_")]
    optional = ("classifier", *(f"{path}/positions" for path in tables))
    return transfer.fill(params, source, candidates, optional=optional)

"""The classifier that CoAVT fine-tunes (arXiv:2401.12264, §III-C2).

The mean of the query encoder's outputs and a linear layer with random first
values, on sound, pictures or both. A model of both answers from one of them,
too: pretraining has passed each of them alone.

What the paper leaves open: binary cross-entropy where a clip has several
labels, else cross-entropy (CAV-MAE); first values of the linear layer as in
BERT. No label smoothing, mixing or masking of the input is mentioned.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avjax.errors import InputError, lookup
from avjax.methods.base import Inputs, Params
from avjax.methods.cavmae_base import where_missing
from avjax.methods.coavt_base import CoAVTMethod, available, pooled
from avjax.methods.coavt_config import finetune_model as default_model
from avjax.methods.supervised import chosen, criterion, objective
from avjax.nn import heads, masking
from avjax.nn.cav_encoder import MODALITIES
from avjax.nn.transformer import NORMAL

__all__ = ["CoAVTFinetune", "default_model"]

# By the modality that an example lacks.
OTHERS = {"audio": "v", "video": "a"}


class CoAVTFinetune(CoAVTMethod):
  """Fine-tuning; `config.model` as `coavt_config.finetune_model` has it.

  The classifier's parameters are of the group `head`. A model of one modality
  answers in mode 'av', too, from what it has.
  """

  # What the class makes for text; no query passes it.
  unused = ("positions", "temperature")

  def __init__(self, config: Any):
    self.modality = config.model.modality
    self.trained = (self.modality,)
    super().__init__(config)
    self.modes = ("av", *(m for m in available(self.modality) if m != "av"))
    self.classes = heads.classes(config)
    if "segment" in self.classes:
      raise InputError("CoAVT pools all queries: it has no segment head")
    self.criterion = criterion(config)

  def init(self, rng: jax.Array, inputs: Inputs) -> Params:
    """See `Method.init`; the branches of the modalities in the inputs."""
    chosen(inputs, MODALITIES[self.modality])
    rng, key = jax.random.split(rng)

    def queries_alone(module, enc, ids, mask):
      return module.query(enc)

    params = self.draw_encoders(rng, inputs, queries_alone)
    k = sum(self.classes.values())
    kernel = NORMAL(key, (self.text_size.width, k))
    return {**params, "classifier": {"kernel": kernel, "bias": jnp.zeros(k)}}

  def words(self) -> dict[str, int]:
    """See `CoAVTMethod.words`."""
    return {"vocabulary": 1, "positions": 1}

  def pooled(
    self, params: Params, inputs: Inputs, mode: str, **more: Any
  ) -> Float[Array, "b d"]:
    """The mean of the queries in a mode."""
    mode = self.modality if mode == "av" else mode
    (tokens,) = self.tokens(params, inputs, (mode,))
    return pooled(self.asked(params, tokens, **more)[0])

  def loss(
    self, params: Params, inputs: Inputs, rng: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The mean over heads and over examples.

    Examples that lack a modality that is trained do not count.
    """
    del step
    rngs = {"dropout": masking.part_key(inputs, rng)}
    x = self.pooled(params, inputs, "av", train=True, rngs=rngs)
    logits = heads.project(params["classifier"], x)
    loss, metrics = objective(self, logits, inputs, MODALITIES[self.modality])
    return loss, {"metrics": metrics, "intermediates": {"logits": logits}}

  def predict(
    self, params: Params, inputs: Inputs, *, mode: str = "av"
  ) -> dict[str, jax.Array]:
    """See `Method.predict`; modes of a model of both are av, a and v.

    In mode 'av' of a model of both, an example that lacks a modality
    (`has_audio`, `has_video`) is answered from the other, which is computed
    only if the batch has such examples.
    """
    lookup(dict.fromkeys(self.modes), mode, "mode of predict")
    x = self.pooled(params, inputs, mode)
    if mode == self.modality == "av":
      answer = functools.partial(self.pooled, params, inputs)
      x = where_missing(answer, inputs, x, OTHERS)
    return heads.split(heads.project(params["classifier"], x), self.classes)

  def embed(self, params: Params, inputs: Inputs) -> dict[str, jax.Array]:
    """'audio', 'video', 'av' [b d] of what is there: means of the queries."""
    return self.means(params, inputs, self.modality)

  def group(self, path: str) -> str:
    """`head` for the classifier, else as in `CoAVTMethod`."""
    return "head" if path.startswith("classifier/") else super().group(path)

"""What a run trains where it does not train all parameters: an adapter beside a model that stays as it is."""

from collections.abc import Sequence
import dataclasses

from glmjax import errors
from glmjax import ranges
from glmjax.models import config as config_lib
from glmjax.models import params as params_lib


@dataclasses.dataclass(frozen=True)
class LoRA:
  """Low-rank factors beside kernels (models/lowrank.py)."""

  rank: int = 8
  alpha: float = 16.0  # their product is multiplied with alpha / rank
  dropout: float = 0.0  # on what they read, in training
  kernels: Sequence[str] = config_lib.KERNELS  # PEFT's default for ChatGLM-6B is attention/qkv alone
  rank_stabilized: bool = False  # alpha / rank ** 0.5 instead (rsLoRA, arXiv 2312.03732)

  def __post_init__(self) -> None:
    ranges.whole("LoRA.rank", self.rank, 1)
    ranges.number("LoRA.alpha", self.alpha, above=0)
    ranges.number("LoRA.dropout", self.dropout, 0, below=1)
    ranges.flag("LoRA.rank_stabilized", self.rank_stabilized)
    if not ranges.several("LoRA.kernels", self.kernels):
      raise errors.InputError("LoRA.kernels is empty: name kernels that factors are to stand beside")
    for name in self.kernels:
      ranges.choice("LoRA.kernels", name, config_lib.KERNELS)

  def adapt(self, model: config_lib.GLMConfig) -> config_lib.GLMConfig:
    """Returns the model with these factors."""
    kernels = [name for name in config_lib.KERNELS if name in self.kernels]
    scale = self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)
    return dataclasses.replace(
      model, lora_rank=self.rank, lora_kernels=",".join(kernels), lora_scale=scale, lora_dropout=self.dropout
    )

  def is_trained(self, path: str, param: params_lib.Param) -> bool:
    """Tells whether a parameter is one of the factors."""
    del param
    return path.endswith(("/lora_a", "/lora_b"))


@dataclasses.dataclass(frozen=True)
class PTuning:
  """P-Tuning v2: keys and values in front of every layer's, as ChatGLM-6B's ptuning/ trains them."""

  length: int = 128
  projection: bool = False  # a perceptron as wide as the model makes them (models/prefix.py)
  dropout: float = 0.1  # on them, in training; ChatGLM-6B's

  def __post_init__(self) -> None:
    ranges.whole("PTuning.length", self.length, 1)
    ranges.flag("PTuning.projection", self.projection)
    ranges.number("PTuning.dropout", self.dropout, 0, below=1)

  def adapt(self, model: config_lib.GLMConfig) -> config_lib.GLMConfig:
    """Returns the model with this prefix.

    Raises:
      errors.InputError: when it has one already.
    """
    if model.prefix_length:
      raise errors.InputError(f"the model has a prefix of {model.prefix_length} already: tune the model without it")
    hidden = model.embed_dim if self.projection else 0
    return dataclasses.replace(model, prefix_length=self.length, prefix_hidden=hidden, prefix_dropout=self.dropout)

  def is_trained(self, path: str, param: params_lib.Param) -> bool:
    """Tells whether a parameter is the prefix's."""
    del param
    return path.startswith("prefix_encoder/") or path.endswith(("/prefix_key", "/prefix_value"))


Trainable = LoRA | PTuning

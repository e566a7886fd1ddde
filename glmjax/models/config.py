"""GLMConfig: the sizes and variants of one model. What it counts to is in models/params.py."""

import dataclasses
import math

from glmjax import errors
from glmjax import positions as positions_lib
from glmjax import ranges

NORMS = ("deepnorm", "post", "pre", "sandwich")
MLPS = ("geglu", "gelu", "gelu_tanh")
ROTARY_ROUNDINGS = ("none", "half_frequencies", "half_table")
REMATS = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16", "float16")
SOFTMAX_DTYPES = ("float32", "compute")
KERNELS = ("attention/qkv", "attention/out", "mlp/wi", "mlp/wo")  # of a block
PREFIX_FIELDS = ("prefix_length", "prefix_hidden")
LORA_FIELDS = ("lora_rank", "lora_kernels", "lora_scale")
_DROPOUTS = ("hidden_dropout", "attention_dropout", "prefix_dropout", "lora_dropout")
KV_CACHE_DTYPES = ("int8",)
CPU_DTYPES = ("float32", "bfloat16")  # that inference on one CPU computes in, weights as rows (models/output_rows.py)
BITS = {"activation_bits": (8,), "head_bits": (8, 4)}  # of what inference may round on CPUs


@dataclasses.dataclass(frozen=True)
class GLMConfig:
  """One GLM. Covers GLM-130B, ChatGLM-6B, GLM-base..10B and the stability study's comparison models.

  Raises:
    errors.InputError: for a value that no model can have, naming the field.
  """

  vocab_size: int  # rows of the embedding table, padding included
  num_layers: int  # N
  embed_dim: int  # D
  num_heads: int  # H; the head dimension K is embed_dim / num_heads
  mlp_dim: int  # F, inner width; GeGLU projects to 2 F
  max_length: int = 2048  # longest sequence, in tokens; rows of the learned position tables less one
  positions: str = "rotary"  # rotary (GLM-130B), rotary_2d (ChatGLM-6B), learned_2d (GLM-10B)
  norm: str = "deepnorm"  # deepnorm and post: shifted Post-LN; pre; sandwich
  mlp: str = "geglu"  # geglu (x1 * gelu(x2), exact erf), gelu (exact), gelu_tanh
  causal: bool = False  # True: a GPT; every interval is cut at the query itself
  tie_embeddings: bool = True  # logits = x @ table.T; False: a head of its own
  embedding_norm: bool = False  # LayerNorm right after the embedding (BLOOM)
  residual_alpha: float | None = None  # DeepNorm's alpha; None: (2 N)^0.5 (GLM-130B paper 2.1)
  layer_norm_epsilon: float = 1e-5
  rotary_base: float = 10_000.0
  rotary_rounding: str = "none"  # what the original rounded to fp16: none, half_frequencies, half_table
  prefix_length: int = 0  # P, trained keys and values in front of every layer's (P-Tuning v2); 0: none
  prefix_hidden: int = 0  # E, of the perceptron that makes these (models/prefix.py); 0: they train themselves
  prefix_dropout: float = 0.0  # on them, in training
  lora_rank: int = 0  # R, of the adapters beside kernels (models/lowrank.py); 0: none
  lora_kernels: str = ""  # which have one: names of KERNELS with commas between
  lora_scale: float = 1.0  # what their products are multiplied with
  lora_dropout: float = 0.0  # on what they read
  hidden_dropout: float = 0.0  # after the embedding and after each sublayer
  attention_dropout: float = 0.0  # on the attention weights
  init_std: float = 0.02  # of the pre, sandwich and learned_2d models; DeepNorm uses Xavier
  dtype: str = "float32"  # of activations and matmuls; norms and loss stay float32
  softmax_dtype: str = "float32"  # of attention's scores and weights; compute: `dtype`, to study what that breaks
  param_dtype: str = "float32"  # of parameters as they are created
  kv_cache_dtype: str | None = None  # of the keys and values that decoding keeps: int8, or None for dtype
  activation_bits: int | None = None  # 8: rounds what quantized weights are multiplied with, on CPUs in inference
  head_bits: int | None = None  # 8 or 4: quantizes the head as it is loaded, on CPUs in inference
  scan_layers: bool = True  # one compiled block for all layers; False: unrolled
  remat: str = "none"  # backward keeps all (none), the kernels' outputs (dots), or block inputs (full)

  def __post_init__(self) -> None:
    for name, least in (
      ("vocab_size", 1),
      ("num_layers", 1),
      ("embed_dim", 1),
      ("num_heads", 1),
      ("mlp_dim", 1),
      ("max_length", 1),
      ("prefix_length", 0),
      ("prefix_hidden", 0),
      ("lora_rank", 0),
    ):
      ranges.whole(f"GLMConfig.{name}", getattr(self, name), least)
    for name in ("causal", "tie_embeddings", "embedding_norm", "scan_layers"):
      ranges.flag(f"GLMConfig.{name}", getattr(self, name))
    for name in _DROPOUTS:
      ranges.number(f"GLMConfig.{name}", getattr(self, name), 0, below=1)
    for name, most in (("layer_norm_epsilon", 1), ("rotary_base", ranges.LARGEST), ("init_std", ranges.LARGEST)):
      ranges.number(f"GLMConfig.{name}", getattr(self, name), most=most, above=0)
    self._check_adapters()
    if self.residual_alpha is not None:
      ranges.number("GLMConfig.residual_alpha", self.residual_alpha, above=0)
    for name, choices in (
      ("positions", positions_lib.KINDS),
      ("norm", NORMS),
      ("mlp", MLPS),
      ("remat", REMATS),
      ("rotary_rounding", ROTARY_ROUNDINGS),
      ("dtype", DTYPES),
      ("softmax_dtype", SOFTMAX_DTYPES),
      ("param_dtype", DTYPES),
    ):
      ranges.choice(f"GLMConfig.{name}", getattr(self, name), choices)
    if self.kv_cache_dtype is not None:
      ranges.choice("GLMConfig.kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
    for name, choices in BITS.items():
      if (value := getattr(self, name)) is not None:
        ranges.one_of(f"GLMConfig.{name}", value, choices)
    if self.embed_dim % self.num_heads:
      raise errors.InputError(
        f"GLMConfig: embed_dim {self.embed_dim} is not divisible by num_heads "
        f"{self.num_heads}: change either so that it is"
      )
    multiple = self.position_kind.head_multiple
    if self.head_dim % multiple:
      raise errors.InputError(
        f"GLMConfig: head dimension {self.head_dim} (embed_dim / num_heads) must be a "
        f"multiple of {multiple} for {self.positions} positions"
      )

  def _check_adapters(self) -> None:
    if not isinstance(self.lora_kernels, str):
      raise errors.InputError(f"GLMConfig.lora_kernels is {self.lora_kernels!r}: give names with commas between")
    if len({*self.adapted}) < len(self.adapted):
      raise errors.InputError(f"GLMConfig.lora_kernels is {self.lora_kernels!r}: name each kernel once")
    for name in self.adapted:
      ranges.choice("GLMConfig.lora_kernels", name, KERNELS)
    ranges.number("GLMConfig.lora_scale", self.lora_scale, most=ranges.LARGEST, above=0)
    if bool(self.lora_rank) != bool(self.lora_kernels):
      raise errors.InputError(
        f"GLMConfig: lora_rank is {self.lora_rank} and lora_kernels {self.lora_kernels!r}: give both, or neither"
      )
    if self.prefix_hidden and not self.prefix_length:
      raise errors.InputError("GLMConfig: prefix_hidden makes a prefix of no length: give prefix_length as well")

  @property
  def adapted(self) -> tuple[str, ...]:
    """The kernels that have factors beside them."""
    return tuple(filter(None, self.lora_kernels.split(",")))

  @property
  def drops(self) -> bool:
    """Whether training drops anything."""
    return any(getattr(self, name) for name in _DROPOUTS)

  @property
  def position_kind(self) -> positions_lib.Positions:
    """What its kind of positions decides."""
    return positions_lib.KINDS[self.positions]

  @property
  def head_dim(self) -> int:
    """K, the width of a head."""
    return self.embed_dim // self.num_heads

  @property
  def scores_dtype(self) -> str:
    """The dtype of attention's scores and weights."""
    return self.dtype if self.softmax_dtype == "compute" else "float32"

  @property
  def alpha(self) -> float:
    """Weight of the residual branch: DeepNorm's alpha, 1 for the other norms."""
    if self.norm != "deepnorm":
      return 1.0
    return math.sqrt(2 * self.num_layers) if self.residual_alpha is None else self.residual_alpha

  @property
  def one_layer(self) -> "GLMConfig":
    """The model of any one of its layers, alone."""
    alpha = self.alpha if self.norm == "deepnorm" else None
    return dataclasses.replace(self, num_layers=1, residual_alpha=alpha)

  @property
  def beta(self) -> float:
    """DeepNorm's gain on the initial mlp, value and output projections (GLM-130B paper 2.1)."""
    return 1.0 / math.sqrt(2 * self.num_layers)

  @property
  def mlp_branches(self) -> int:
    """Halves of the first mlp projection."""
    return 2 if self.mlp == "geglu" else 1

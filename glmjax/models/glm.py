"""The GLM transformer: one block for GLM-130B, ChatGLM-6B, GLM-10B and the comparison models.

The block, in the papers' words (LN layer norm, a the residual weight alpha):

  deepnorm, post:  y = LN1(x); u = a y + Attn(y); z = LN2(u); out = a z + MLP(z)
  pre:             u = x + Attn(LN1(x));          out = u + MLP(LN2(u))
  sandwich:        u = x + LN3(Attn(LN1(x)));     out = u + LN4(MLP(LN2(u)))

The first line is Post-LN with its norms shifted by one sublayer, as GLM-130B and ChatGLM-6B were coded:
layer 0's LN1 normalises the embedding, and a final LN follows the last layer. alpha = (2 N)^0.5.

B batch, L query length, M key length, N layers, D model, H heads, K head dimension, F mlp, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from glmjax.models import attention
from glmjax.models import dropout as dropout_lib
from glmjax.models import config as config_lib
from glmjax.models import flash
from glmjax.models import geglu
from glmjax.models import layers
from glmjax.models import rotary
from glmjax.parallel import partitioning

# Keys and values of earlier tokens: {"key": [N, B, H, M, K], "value": same}; unrolled models keep one
# such pair without the N axis per layer, under "layers_0", "layers_1", ... Heads come before slots, so that
# a step's products with the cache need no transposed copy of it.
Cache = dict[str, Any]


# The places of a block, and of the model, where dropout draws; `layers` of the model: one key for each.
_ATTENTION_WEIGHTS, _ATTENTION, _MLP = range(3)
_EMBEDDING, _LAYERS = range(2)

KEPT = ("kept", *flash.NAMES)  # by remat="dots": all that backward needs of the kernels' and attention's outputs


def _keep(x: jax.Array) -> jax.Array:
  return ad_checkpoint.checkpoint_name(x, KEPT[0])


def _einsum(config: config_lib.GLMConfig, name: str, spec: str, shape: tuple[int, ...], axes: tuple[str, ...],
            num_inputs: int, std: Any) -> layers.Einsum:
  return layers.Einsum(spec, shape, axes, num_inputs, layers.normal(std), config.dtype, config.param_dtype, name=name)


def _norm(config: config_lib.GLMConfig, name: str) -> layers.LayerNorm:
  return layers.LayerNorm(config.layer_norm_epsilon, config.dtype, config.param_dtype, name=name)


def _output_std(config: config_lib.GLMConfig, fan_in: int) -> float:
  """Initial spread of a sublayer's last projection."""
  if config.norm == "deepnorm":
    return layers.xavier_std(fan_in, config.embed_dim, config.beta)
  return config.init_std * config.beta  # GPT-2's 0.02 / sqrt(2 N)


class SelfAttention(nn.Module):
  """Multi-head attention over intervals, with rotary positions and an optional KV cache."""

  config: config_lib.GLMConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, cos_sin: Any, start_BL: jax.Array, end_BL: jax.Array,
               keys_B: jax.Array | None, cache: Cache | None, cache_index: jax.Array | None
               ) -> tuple[jax.Array, Cache | None]:
    config = self.config
    d, h, k = config.embed_dim, config.num_heads, config.head_dim
    std = config.init_std
    if config.norm == "deepnorm":  # gain beta on values only: not on the last third of the heads (FACTS 0.1.17)
      std = layers.xavier_std(d, d) * jnp.array([1.0, 1.0, config.beta])[:, None, None]
    qkv = _einsum(config, "qkv", "BLD,DTHK->BLTHK", (d, 3, h, k), ("embed", "qkv", "heads", "kv"), 1, std)(x_BLD)
    q_BLHK, k_BLHK, v_BLHK = (partitioning.constrain(part, "batch", "length", "act_heads", None)
                              for part in layers.unstack(qkv, 2))
    parts = 2 if config.positions == "rotary_2d" else 1
    q_BLHK, k_BMHK, v_BMHK = map(_keep, (rotary.rotate(q_BLHK, cos_sin, parts), rotary.rotate(k_BLHK, cos_sin, parts),
                                         v_BLHK))
    if cache is not None:
      cache = {name: jax.lax.dynamic_update_slice(
          cache[name], jnp.swapaxes(new, 1, 2).astype(cache[name].dtype), (0, 0, cache_index, 0))
          for name, new in (("key", k_BMHK), ("value", v_BMHK))}
      k_BMHK, v_BMHK = (jnp.swapaxes(cache[name], 1, 2).astype(q_BLHK.dtype) for name in ("key", "value"))
    dropout = None
    if config.attention_dropout and keys_B is not None:
      dropout = dropout_lib.make(config.attention_dropout, layers.fold_in(keys_B, _ATTENTION_WEIGHTS), h,
                                 x_BLD.shape[1])
    prefix = None
    if config.prefix_length:  # normal(1): as the original's torch.nn.Embedding starts
      prefix = tuple(layers.declare(self, name, layers.normal(1.0), (h, config.prefix_length, k),
                                    ("heads", "prefix", "kv"), config.param_dtype)
                     for name in ("prefix_key", "prefix_value"))
    out_BLHK = attention.attend(q_BLHK, k_BMHK, v_BMHK, start_BL, end_BL, dropout, prefix)
    out = _einsum(config, "out", "BLHK,HKD->BLD", (h, k, d), ("heads", "kv", "embed"), 2, _output_std(config, d))
    return _keep(out(out_BLHK)), cache


class Mlp(nn.Module):
  """GeGLU (first half times gelu of the second) or a plain GELU network."""

  config: config_lib.GLMConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    config = self.config
    d, f, branches = config.embed_dim, config.mlp_dim, config.mlp_branches
    std = layers.xavier_std(d, f, config.beta) if config.norm == "deepnorm" else config.init_std
    wi = _einsum(config, "wi", "BLD,DTF->BLTF", (d, branches, f), ("embed", "branches", "mlp"), 1, std)
    wo = _einsum(config, "wo", "BLF,FD->BLD", (f, d), ("mlp", "embed"), 1, _output_std(config, f))
    if config.mlp == "geglu":
      hidden_BL2F, bias_2F = wi(x_BLD, bias_apart=True)
      return wo(_keep(hidden_BL2F), functools.partial(geglu.product, bias_2F))
    hidden_BLF = _keep(wi(x_BLD))[:, :, 0]
    gelu = jax.nn.gelu if config.mlp == "gelu_tanh" else geglu.gelu
    return wo(partitioning.constrain(gelu(hidden_BLF), "batch", "length", "act_mlp"))


class Block(nn.Module):
  """Attention and mlp sublayers with their norms and residuals; dropout where rows have keys."""

  config: config_lib.GLMConfig

  @nn.compact
  def __call__(self, x_BLD: jax.Array, cos_sin: Any, start_BL: jax.Array, end_BL: jax.Array,
               keys_B: jax.Array | None = None, cache: Cache | None = None, cache_index: jax.Array | None = None
               ) -> tuple[jax.Array, Cache | None]:
    attend = SelfAttention(self.config, name="attention")
    mlp = Mlp(self.config, name="mlp")
    new_cache = None

    def attention_sublayer(y_BLD: jax.Array) -> jax.Array:
      nonlocal new_cache
      out_BLD, new_cache = attend(y_BLD, cos_sin, start_BL, end_BL, keys_B, cache, cache_index)
      return out_BLD

    x_BLD = self._residual(x_BLD, attention_sublayer, "attention", layers.fold_in(keys_B, _ATTENTION))
    x_BLD = self._residual(x_BLD, mlp, "mlp", layers.fold_in(keys_B, _MLP))
    return partitioning.constrain(x_BLD, "batch", "norm_length", "act_embed"), new_cache

  def _residual(self, x_BLD: jax.Array, sublayer: Callable[[jax.Array], jax.Array], name: str,
                keys_B: jax.Array | None) -> jax.Array:
    config = self.config
    y_BLD = _norm(config, f"{name}_norm")(x_BLD)
    out_BLD = _lay("norm_length", "length", sublayer(_lay("length", "norm_length", y_BLD)))
    if config.norm == "sandwich":
      out_BLD = _norm(config, f"{name}_output_norm")(out_BLD)
    out_BLD = layers.dropout(config.hidden_dropout, keys_B, out_BLD)
    shifted = config.norm in ("deepnorm", "post")
    return (y_BLD * jnp.asarray(config.alpha, y_BLD.dtype) if shifted else x_BLD) + out_BLD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lay(length: str, before: str, x_BLD: jax.Array) -> jax.Array:
  """Tokens as this logical axis is split, and those of the gradient as they were `before`."""
  del before
  return partitioning.constrain(x_BLD, "batch", length, "act_embed")


_lay.defvjp(lambda length, before, x_BLD: (_lay(length, before, x_BLD), None),
            lambda length, before, _, g_BLD: (_lay(before, length, g_BLD),))


def remat(config: config_lib.GLMConfig) -> type[nn.Module]:
  """The block, keeping for backward what the configuration says."""
  if config.remat == "none":
    return Block
  kept = jax.checkpoint_policies.save_only_these_names(*KEPT)
  return nn.remat(Block, policy=kept if config.remat == "dots" else None, prevent_cse=not config.scan_layers)


def cut_causal(config: config_lib.GLMConfig, end_BL: jax.Array, first: jax.Array | int = 0) -> jax.Array:
  """The intervals' ends; a causal model's tokens, numbered from `first` on, see none behind themselves."""
  if not config.causal:
    return end_BL
  return jnp.minimum(end_BL, first + jnp.arange(1, end_BL.shape[1] + 1, dtype=end_BL.dtype))


class GLM(nn.Module):
  """Token ids in, logits out.

  Methods: `__call__` for logits; `hidden` and `head` apart, for a loss that makes logits chunk by chunk
  and for decoding with a cache.
  """

  config: config_lib.GLMConfig
  deterministic: bool = True

  def setup(self) -> None:
    config = self.config
    self.embedding = layers.Embedding(config)
    if config.embedding_norm:
      self.embedding_norm = _norm(config, None)
    block = remat(config)
    if config.scan_layers:
      scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0, nn.broadcast), out_axes=0,
                        length=config.num_layers, metadata_params={nn.PARTITION_NAME: "layers"})
      self.layers = scanned(config)
    else:
      self.layers = [block(config) for _ in range(config.num_layers)]
    self.final_norm = _norm(config, None)
    if not config.tie_embeddings:
      self.untied_head = layers.Head(config, name="head")

  def __call__(self, tokens_BL: jax.Array, positions: jax.Array, start_BL: jax.Array, end_BL: jax.Array,
               gradient_alpha: jax.Array | float = 1.0) -> jax.Array:
    """Logits, float32 [B, L, V]. Positions [B, L], or [B, 2, L] for the two-dimensional kinds."""
    x_BLD, _ = self.hidden(tokens_BL, positions, start_BL, end_BL, gradient_alpha)
    return self.head(x_BLD, gradient_alpha)

  def hidden(self, tokens_BL: jax.Array, positions: jax.Array, start_BL: jax.Array, end_BL: jax.Array,
             gradient_alpha: jax.Array | float = 1.0, cache: Cache | None = None,
             cache_index: jax.Array | None = None, rows_B: jax.Array | None = None
             ) -> tuple[jax.Array, Cache | None]:
    """What the head reads, [B, L, D], and the cache with these L tokens written from `cache_index` on.

    With a cache the intervals count its slots: the M keys are the cache's. `rows_B`: as in `embed`.
    """
    config = self.config
    end_BL = cut_causal(config, end_BL, 0 if cache is None else cache_index)
    x_BLD, keys_B = self.embed(tokens_BL, positions, gradient_alpha, rows_B)
    cos_sin = rotary.tables(config, positions)
    layer_keys = lambda i: None if keys_B is None else layers.fold_in(keys_B, i)
    if config.scan_layers:
      keys_NB = jax.vmap(layer_keys)(jnp.arange(config.num_layers))
      x_BLD, cache = self.layers(x_BLD, cos_sin, start_BL, end_BL, keys_NB, cache, cache_index)
    else:
      new = {}
      for i, layer in enumerate(self.layers):
        name = f"layers_{i}"
        x_BLD, new[name] = layer(x_BLD, cos_sin, start_BL, end_BL, layer_keys(i),
                                 None if cache is None else cache[name], cache_index)
      cache = None if cache is None else new
    return self.finish(x_BLD), cache

  def embed(self, tokens_BL: jax.Array, positions: jax.Array, gradient_alpha: jax.Array | float = 1.0,
            rows_B: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """What the first layer reads, [B, L, D], and each row's key for dropout in the layers (None: no dropout).

    What is dropped depends on the key given to `apply`, the row's number (`rows_B`, by default its place) and the
    layer: neither on the mesh, nor on the rows that are computed with it, nor on how rows go through a pipeline.
    """
    config = self.config
    x_BLD = _lay("length", "length", self.embedding(tokens_BL, positions, gradient_alpha))
    if config.embedding_norm:
      x_BLD = self.embedding_norm(x_BLD)
    keys_B = None
    if not self.deterministic and (config.hidden_dropout or config.attention_dropout):
      rows_B = jnp.arange(tokens_BL.shape[0]) if rows_B is None else rows_B
      keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), rows_B)
      x_BLD = layers.dropout(config.hidden_dropout, layers.fold_in(keys_B, _EMBEDDING), x_BLD)
      keys_B = layers.fold_in(keys_B, _LAYERS)
    return _lay("norm_length", "length", x_BLD), keys_B

  def finish(self, x_BLD: jax.Array) -> jax.Array:
    """What the head reads, of what the last layer gives."""
    return self.final_norm(x_BLD)

  def head(self, x_BLD: jax.Array, gradient_alpha: jax.Array | float = 1.0) -> jax.Array:
    """Logits of hidden states, float32 [B, L, V]."""
    if self.config.tie_embeddings:
      logits_BLV = self.embedding.attend(x_BLD, gradient_alpha)
    else:
      logits_BLV = self.untied_head(x_BLD)
    return layers.constrain_logits(logits_BLV)

  def head_kernel(self, gradient_alpha: jax.Array | float = 1.0) -> jax.Array:
    """The head's kernel [D, V] in the compute dtype, for a loss that multiplies with it chunk by chunk."""
    if self.config.tie_embeddings:
      return self.embedding.kernel(gradient_alpha)
    return layers.whole(("embed", "vocab"), self.untied_head.kernel.astype(self.config.dtype))


def init(config: config_lib.GLMConfig, rng: jax.Array) -> Any:
  """Fresh parameters, still boxed with their logical axis names (`parallel.partitioning.shardings`)."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  positions = tokens if config.positions == "rotary" else jnp.zeros((1, 2, 1), jnp.int32)
  return GLM(config).init(rng, tokens, positions, tokens, tokens + 1)["params"]


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: config_lib.GLMConfig, rng: jax.Array) -> Any:
  """Fresh parameters as a plain dict tree, on one device."""
  return nn.unbox(init(config, rng))


def unstack_layers(params: Any) -> Any:
  """Stacked `layers` [N, ...] to layers_0 ... layers_{N-1}, for models with scan_layers=False."""
  params = dict(params)
  stacked = params.pop("layers")
  leaves, structure = jax.tree.flatten(stacked)
  return params | {f"layers_{i}": jax.tree.unflatten(structure, layer)
                   for i, layer in enumerate(zip(*(layers.unstack(x, 0) for x in leaves)))}


def stack_layers(params: Any) -> Any:
  """The inverse of `unstack_layers`."""
  names = [name for name in params if name.startswith("layers_")]
  ordered = [params[f"layers_{i}"] for i in range(len(names))]
  rest = {name: value for name, value in params.items() if name not in names}
  return rest | {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *ordered)}

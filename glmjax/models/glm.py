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
from typing import Any

import chex
from flax import linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from glmjax import target as target_lib
from glmjax.kernels import attention
from glmjax.kernels import dropout as dropout_lib
from glmjax.kernels import flash
from glmjax.models import config as config_lib
from glmjax.models import geglu
from glmjax.models import kv_cache
from glmjax.models import layers
from glmjax.models import params as params_lib
from glmjax.models import prefix as prefix_lib
from glmjax.models import rotary
from glmjax.models import statistics
from glmjax.parallel import partitioning

# What inference keeps of earlier tokens: one KVCache of all layers, stacked, or one a layer ("layers_0", ...).
Cache = kv_cache.KVCache | dict[str, kv_cache.KVCache]

# The places of a block, and of the model, where dropout draws; `layers` of the model: one key for each.
_ATTENTION_WEIGHTS, _ATTENTION, _MLP, _QKV, _OUT, _WI, _WO, _PREFIX_KEYS, _PREFIX_VALUES = range(9)
_EMBEDDING, _LAYERS = range(2)

KEPT = ("kept", *flash.NAMES)  # by remat="dots": all that backward needs of the kernels' and attention's outputs


def _keep(x: jax.Array) -> jax.Array:
  return ad_checkpoint.checkpoint_name(x, KEPT[0])


def _einsum(config: config_lib.GLMConfig, target: target_lib.Target, path: str, spec: str) -> layers.Einsum:
  """Returns the product with a block's kernel."""
  table, adapter = params_lib.layer(config), None
  if path in config.adapted:
    factors = (table[f"{path}/{name}"] for name in ("lora_a", "lora_b"))
    adapter = layers.Adapter(*factors, config.lora_scale, config.lora_dropout)
  return layers.Einsum(
    spec,
    table[f"{path}/kernel"],
    table[f"{path}/bias"],
    config.dtype,
    config.param_dtype,
    target,
    adapter,
    name=path.split("/")[-1],
  )


def _norm(config: config_lib.GLMConfig, target: target_lib.Target, name: str | None = None) -> layers.LayerNorm:
  return layers.LayerNorm(
    config.embed_dim, config.layer_norm_epsilon, config.dtype, config.param_dtype, target, name=name
  )


class SelfAttention(nn.Module):
  """Multi-head attention over intervals, with rotary positions and an optional KV cache."""

  config: config_lib.GLMConfig
  target: target_lib.Target

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    cos_sin: Any,
    start_BL: jax.Array,
    end_BL: jax.Array,
    keys_B: jax.Array | None,
    cache: kv_cache.KVCache | None,
    lengths_B: jax.Array | None,
    prefix: jax.Array | None,
  ) -> tuple[jax.Array, kv_cache.KVCache | None]:
    config = self.config
    qkv = _einsum(config, self.target, "attention/qkv", "BLD,DTHK->BLTHK")(x_BLD, keys_B=layers.fold_in(keys_B, _QKV))
    q_BLHK, k_BLHK, v_BLHK = (
      partitioning.constrain(part, "batch", "length", "act_heads", None) for part in layers.unstack(qkv, 2)
    )
    parts = config.position_kind.rotary_parts
    q_BLHK, k_BLHK, v_BLHK = map(
      _keep, (rotary.rotate(q_BLHK, cos_sin, parts), rotary.rotate(k_BLHK, cos_sin, parts), v_BLHK)
    )
    prefix = self._prefix(prefix, keys_B)
    if cache is not None and cache.slots:
      cache = cache.append(k_BLHK, v_BLHK, lengths_B)
      out_BLHK = cache.attend(self.target, q_BLHK, end_BL, prefix, config.scores_dtype)
    else:
      dropout = None
      if config.attention_dropout and keys_B is not None:
        dropout = dropout_lib.make(
          config.attention_dropout, layers.fold_in(keys_B, _ATTENTION_WEIGHTS), config.num_heads, x_BLD.shape[1]
        )
      out_BLHK = attention.attend(
        self.target, q_BLHK, k_BLHK, v_BLHK, start_BL, end_BL, dropout, prefix, config.scores_dtype
      )
      statistics.note(self, "logit", lambda: statistics.largest_logits(q_BLHK, k_BLHK, start_BL, end_BL))
      cache = None if cache is None else kv_cache.of_prompt(self.target, config, k_BLHK, v_BLHK)
    out = _einsum(config, self.target, "attention/out", "BLHK,HKD->BLD")
    return _keep(out(out_BLHK, keys_B=layers.fold_in(keys_B, _OUT))), cache

  def _prefix(self, made: jax.Array | None, keys_B: jax.Array | None) -> tuple[jax.Array, jax.Array] | None:
    """Returns the keys and values that every query sees as well (P-Tuning v2): those made, [2, H, P, K], or trained
    themselves; with dropout each row has its own, [B, H, P, K].
    """
    config = self.config
    if not config.prefix_length:
      return None
    names, table = ("prefix_key", "prefix_value"), params_lib.layer(config)
    if made is None:
      found = [layers.declare(self, name, table[f"attention/{name}"], config.param_dtype) for name in names]
    else:
      found = layers.unstack(made, 0)
    if keys_B is not None and config.prefix_dropout:
      keys = (layers.fold_in(keys_B, place) for place in (_PREFIX_KEYS, _PREFIX_VALUES))
      sizes = config.num_heads, config.prefix_length
      found = [
        dropout_lib.apply(dropout_lib.make(config.prefix_dropout, key, *sizes), x.astype(config.dtype))
        for key, x in zip(keys, found)
      ]
    return tuple(found)


class Mlp(nn.Module):
  """GeGLU (first half times gelu of the second) or a plain GELU network."""

  config: config_lib.GLMConfig
  target: target_lib.Target

  @nn.compact
  def __call__(self, x_BLD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    config = self.config
    wi_keys_B, wo_keys_B = layers.fold_in(keys_B, _WI), layers.fold_in(keys_B, _WO)
    wi, wo = (
      _einsum(config, self.target, "mlp/wi", "BLD,DTF->BLTF"),
      _einsum(config, self.target, "mlp/wo", "BLF,FD->BLD"),
    )
    if config.mlp == "geglu":
      hidden_BL2F, bias_2F = wi(x_BLD, bias_apart=True, keys_B=wi_keys_B)
      return wo(_keep(hidden_BL2F), functools.partial(geglu.product, self.target, bias_2F), keys_B=wo_keys_B)
    hidden_BLF = _keep(wi(x_BLD, keys_B=wi_keys_B))[:, :, 0]
    gelu = jax.nn.gelu if config.mlp == "gelu_tanh" else geglu.gelu
    act_BLF = partitioning.constrain(gelu(hidden_BLF), "batch", "length", "act_mlp")
    return wo(act_BLF, keys_B=wo_keys_B)


class Block(nn.Module):
  """Attention and mlp sublayers with their norms and residuals; dropout where rows have keys."""

  config: config_lib.GLMConfig
  target: target_lib.Target

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    cos_sin: Any,
    start_BL: jax.Array,
    end_BL: jax.Array,
    keys_B: jax.Array | None = None,
    cache: kv_cache.KVCache | None = None,
    lengths_B: jax.Array | None = None,
    prefix: jax.Array | None = None,
  ) -> tuple[jax.Array, kv_cache.KVCache | None]:
    attention_sublayer, mlp = (
      SelfAttention(self.config, self.target, name="attention"),
      Mlp(self.config, self.target, name="mlp"),
    )
    statistics.note(self, "input", functools.partial(statistics.mean_squares, x_BLD))
    y_BLD = _norm(self.config, self.target, "attention_norm")(x_BLD)
    out_BLD, cache = attention_sublayer(
      _gather_tokens(y_BLD), cos_sin, start_BL, end_BL, keys_B, cache, lengths_B, prefix
    )
    x_BLD = self._residual("attention", x_BLD, y_BLD, out_BLD, layers.fold_in(keys_B, _ATTENTION))
    y_BLD = _norm(self.config, self.target, "mlp_norm")(x_BLD)
    x_BLD = self._residual("mlp", x_BLD, y_BLD, mlp(_gather_tokens(y_BLD), keys_B), layers.fold_in(keys_B, _MLP))
    statistics.note(self, "output", functools.partial(statistics.mean_squares, x_BLD))
    return partitioning.constrain(x_BLD, "batch", "norm_length", "act_embed"), cache

  def _residual(
    self, sublayer: str, x_BLD: jax.Array, y_BLD: jax.Array, out_BLD: jax.Array, keys_B: jax.Array | None
  ) -> jax.Array:
    """Adds the sublayer's output to its input x, or to its normalised input y weighted by alpha."""
    config = self.config
    out_BLD = _scatter_tokens(out_BLD)
    if config.norm == "sandwich":
      out_BLD = _norm(config, self.target, f"{sublayer}_output_norm")(out_BLD)
    statistics.note(self, f"{sublayer}_output", functools.partial(statistics.mean_squares, out_BLD))
    out_BLD = layers.dropout(config.hidden_dropout, keys_B, out_BLD)
    if config.norm in ("deepnorm", "post"):
      return y_BLD * jnp.asarray(config.alpha, y_BLD.dtype) + out_BLD
    return x_BLD + out_BLD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def reshard(length: str, before: str, x_BLD: jax.Array) -> jax.Array:
  """Splits an activation's tokens as the logical axis `length` is split, and its gradient's as they were `before`.

  A constraint alone would give the gradient the forward's new split: with sequence parallelism backward would then
  gather what forward scattered, and keep it whole.
  """
  del before
  return partitioning.constrain(x_BLD, "batch", length, "act_embed")


def _reshard_forward(length: str, before: str, x_BLD: jax.Array) -> tuple[jax.Array, None]:
  return reshard(length, before, x_BLD), None


def _reshard_backward(length: str, before: str, _: None, g_BLD: jax.Array) -> tuple[jax.Array]:
  return (reshard(before, length, g_BLD),)


reshard.defvjp(_reshard_forward, _reshard_backward)
_gather_tokens = functools.partial(reshard, "length", "norm_length")  # for products: all tokens of a row
_scatter_tokens = functools.partial(reshard, "norm_length", "length")  # for norms and residuals


def remat(config: config_lib.GLMConfig) -> type[nn.Module]:
  """Returns the block's class, keeping for backward what the configuration says."""
  if config.remat == "none":
    return Block
  kept = jax.checkpoint_policies.save_only_these_names(*KEPT)
  return nn.remat(Block, policy=kept if config.remat == "dots" else None, prevent_cse=not config.scan_layers)


def cut_causal(config: config_lib.GLMConfig, end_BL: jax.Array) -> jax.Array:
  """Returns the intervals' ends; a causal model's tokens see none behind themselves."""
  if not config.causal:
    return end_BL
  return jnp.minimum(end_BL, jnp.arange(1, end_BL.shape[1] + 1, dtype=end_BL.dtype))


class GLM(nn.Module):
  """Token ids in, logits out.

  Methods: `__call__` for logits; `hidden` and `head` apart, for a loss that makes logits chunk by chunk
  and for decoding with a cache.
  """

  config: config_lib.GLMConfig
  deterministic: bool = True

  def setup(self) -> None:
    config, target = self.config, partitioning.target()
    self.embedding = layers.Embedding(config, target)
    if config.embedding_norm:
      self.embedding_norm = _norm(config, target)
    block = remat(config)
    if config.scan_layers:
      scanned = nn.scan(
        block,
        variable_axes={"params": 0, statistics.COLLECTION: 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0, nn.broadcast, 0),
        out_axes=0,
        length=config.num_layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      self.layers = scanned(config, target)
    else:
      self.layers = [block(config, target) for _ in range(config.num_layers)]
    if config.prefix_hidden:
      self.prefix_encoder = prefix_lib.Encoder(config)
    self.final_norm = _norm(config, target)
    if not config.tie_embeddings:
      self.untied_head = layers.Head(config, target, name="head")

  def __call__(
    self,
    tokens_BL: jax.Array,
    positions: jax.Array,
    start_BL: jax.Array,
    end_BL: jax.Array,
    gradient_alpha: jax.Array | float = 1.0,
  ) -> jax.Array:
    """Returns logits, float32 [B, L, V]. Positions are [B, L], or [B, 2, L] for the two-dimensional kinds."""
    x_BLD, _ = self.hidden(tokens_BL, positions, start_BL, end_BL, gradient_alpha)
    return self.head(x_BLD, gradient_alpha)

  def hidden(
    self,
    tokens_BL: jax.Array,
    positions: jax.Array,
    start_BL: jax.Array,
    end_BL: jax.Array,
    gradient_alpha: jax.Array | float = 1.0,
    cache: Cache | None = None,
    lengths_B: jax.Array | None = None,
    rows_B: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Returns what the head reads, [B, L, D], and the cache with these L tokens of each row.

    Without `lengths_B` they are the first of their rows and see each other; a cache given must be empty, without a
    slot, and the one that comes back has L. With it the cache holds so many tokens of each row already: these are
    written behind them, and see the slots before `end_BL`. `rows_B`: as in `embed`.
    """
    chex.assert_shape([start_BL, end_BL], tokens_BL.shape)
    chex.assert_type([start_BL, end_BL], int)
    x_BLD, keys_B = self.embed(tokens_BL, positions, gradient_alpha, rows_B)
    x_BLD, cache = self.through(x_BLD, positions, start_BL, end_BL, keys_B, cache, lengths_B)
    return self.finish(x_BLD), cache

  def through(
    self,
    x_BLD: jax.Array,
    positions: jax.Array,
    start_BL: jax.Array,
    end_BL: jax.Array,
    keys_B: jax.Array | None = None,
    cache: Cache | None = None,
    lengths_B: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Returns what the last layer gives of what the first one reads, [B, L, D]; all else is as in `hidden`."""
    config = self.config
    if lengths_B is None:
      end_BL = cut_causal(config, end_BL)
    cos_sin = rotary.tables(config, positions)
    layer_keys = functools.partial(layers.fold_in, keys_B)
    prefixes = self.prefix_encoder() if config.prefix_hidden else None
    if config.scan_layers:
      keys_NB = jax.vmap(layer_keys)(jnp.arange(config.num_layers))
      return self.layers(x_BLD, cos_sin, start_BL, end_BL, keys_NB, cache, lengths_B, prefixes)
    new = {}
    for i, layer in enumerate(self.layers):
      name = f"layers_{i}"
      own = None if cache is None else cache[name]
      prefix = None if prefixes is None else prefixes[i]
      x_BLD, new[name] = layer(x_BLD, cos_sin, start_BL, end_BL, layer_keys(i), own, lengths_B, prefix)
    return x_BLD, None if cache is None else new

  def embed(
    self,
    tokens_BL: jax.Array,
    positions: jax.Array,
    gradient_alpha: jax.Array | float = 1.0,
    rows_B: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns what the first layer reads, [B, L, D], and each row's key for dropout in the layers (None: no dropout).

    What is dropped depends on the key given to `apply`, the row's number (`rows_B`, by default its place) and the
    layer: neither on the mesh, nor on the rows that are computed with it, nor on how rows go through a pipeline.
    """
    config = self.config
    chex.assert_rank(tokens_BL, 2)
    chex.assert_shape(positions, (tokens_BL.shape[0], *config.position_kind.shape(tokens_BL.shape[1])))
    chex.assert_type([tokens_BL, positions], int)
    x_BLD = reshard("length", "length", self.embedding(tokens_BL, positions, gradient_alpha))
    if config.embedding_norm:
      x_BLD = self.embedding_norm(x_BLD)
    keys_B = None
    if not self.deterministic and config.drops:
      rows_B = jnp.arange(tokens_BL.shape[0]) if rows_B is None else rows_B
      keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), rows_B)
      x_BLD = layers.dropout(config.hidden_dropout, layers.fold_in(keys_B, _EMBEDDING), x_BLD)
      keys_B = layers.fold_in(keys_B, _LAYERS)
    return _scatter_tokens(x_BLD), keys_B

  def finish(self, x_BLD: jax.Array) -> jax.Array:
    """Returns what the head reads, of what the last layer gives."""
    return self.final_norm(x_BLD)

  def head(self, x_BLD: jax.Array, gradient_alpha: jax.Array | float = 1.0) -> jax.Array:
    """Returns logits of hidden states, float32 [B, L, V]."""
    if self.config.tie_embeddings:
      logits_BLV = self.embedding.attend(x_BLD, gradient_alpha)
    else:
      logits_BLV = self.untied_head(x_BLD)
    return layers.constrain_logits(logits_BLV)

  def head_kernel(self, gradient_alpha: jax.Array | float = 1.0) -> jax.Array:
    """Returns the head's kernel [D, V] in the compute dtype, for a loss that multiplies with it chunk by chunk."""
    if self.config.tie_embeddings:
      return self.embedding.kernel(gradient_alpha)
    return layers.whole(("embed", "vocab"), self.untied_head.kernel.astype(self.config.dtype))


def init(config: config_lib.GLMConfig, rng: jax.Array) -> Any:
  """Makes fresh parameters, still boxed with their logical axis names (`parallel.partitioning.shardings`)."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  positions = jnp.zeros((1, *config.position_kind.shape(1)), jnp.int32)
  return GLM(config).init(rng, tokens, positions, tokens, tokens + 1)["params"]


@functools.partial(jax.jit, static_argnums=0)
def init_params(config: config_lib.GLMConfig, rng: jax.Array) -> Any:
  """Makes fresh parameters as a plain dict tree, on one device."""
  return nn.unbox(init(config, rng))


def unstack_layers(params: Any) -> Any:
  """Turns stacked `layers` [N, ...] into layers_0 ... layers_{N-1}, for models with scan_layers=False."""
  params = dict(params)
  stacked = params.pop("layers")
  leaves, structure = jax.tree.flatten(stacked)
  return params | {
    f"layers_{i}": jax.tree.unflatten(structure, layer)
    for i, layer in enumerate(zip(*(layers.unstack(x, 0) for x in leaves)))
  }

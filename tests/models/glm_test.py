"""The model's properties: masks, families, caches, layers scanned or not."""

import dataclasses
import functools
from typing import Any

import chex
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax import errors
from glmjax.kernels import attention
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import layers
from glmjax.models import params as params_lib
from glmjax.models import rotary
from glmjax.parallel import mesh as mesh_lib
from glmjax.parallel import partitioning

LENGTH, CONTEXT = 12, 5
FAMILIES = {
  "glm-130b": dict(positions="rotary", mlp="geglu"),
  "chatglm-6b": dict(positions="rotary_2d", mlp="gelu_tanh", tie_embeddings=False),
  "glm-10b": dict(positions="learned_2d", mlp="gelu_tanh", norm="pre"),
}
VARIANTS = FAMILIES | {
  "gpt": dict(norm="pre", mlp="gelu", causal=True),
  "sandwich": dict(norm="sandwich"),
  "post": dict(norm="post"),
  "embedding norm": dict(norm="pre", embedding_norm=True),
  "alpha": dict(residual_alpha=3.0),
  "rounded": dict(rotary_rounding="half_table"),
}


def make(name: str, **changes: Any) -> config_lib.GLMConfig:
  return config_lib.GLMConfig(
    **(
      dict(vocab_size=40, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_length=32) | VARIANTS[name] | changes
    )
  )


def inputs(config: config_lib.GLMConfig, batch: int = 2) -> tuple[jax.Array, ...]:
  """A context of CONTEXT tokens seen from both sides, then tokens left to right."""
  tokens = jax.random.randint(jax.random.key(5), (batch, LENGTH), 0, config.vocab_size)
  line = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (batch, 1))
  positions = (
    line
    if config.positions == "rotary"
    else jnp.stack([jnp.minimum(line, CONTEXT - 1), jnp.maximum(line - CONTEXT + 1, 0)], 1)
  )
  return tokens, positions, jnp.zeros_like(line), jnp.maximum(line + 1, CONTEXT)


@functools.cache
def params_of(config: config_lib.GLMConfig) -> Any:
  """Random in every array, so that no branch is dead."""
  params = glm.init_params(dataclasses.replace(config, scan_layers=True, remat="none"), jax.random.key(0))
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  return treedef.unflatten([x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: config_lib.GLMConfig, params: Any, *arrays: jax.Array) -> jax.Array:
  return glm.GLM(config).apply({"params": params}, *arrays)


@pytest.mark.parametrize("name", VARIANTS)
def test_runs_and_counts_its_parameters(name: str):
  config = make(name)
  params = params_of(config)
  logits = logits_of(config, params, *inputs(config))
  assert logits.shape == (2, LENGTH, 40) and logits.dtype == jnp.float32 and bool(jnp.isfinite(logits).all())
  assert sum(x.size for x in jax.tree.leaves(params)) == params_lib.count(config)


@pytest.mark.parametrize("name", [*FAMILIES, "gpt"])
def test_no_token_sees_what_it_must_not(name: str):
  """Zero gradients exactly outside each query's interval, and none inside it."""
  config = make(name)
  params = params_of(config)
  _, positions, start, end = inputs(config, batch=1)
  seen = np.asarray(attention.interval_mask(start, end, LENGTH))[0]
  if config.causal:
    seen = seen & np.tri(LENGTH, dtype=bool)

  @jax.jit
  def influence(params: Any) -> jax.Array:
    """[i, j]: the gradient of query i's hidden state with respect to token j's embedding."""
    table = params["embedding"]["table"]

    def hidden(rows: jax.Array) -> jax.Array:
      changed = params | {"embedding": params["embedding"] | {"table": table.at[:LENGTH].set(rows)}}
      x, _ = glm.GLM(config).apply(
        {"params": changed}, jnp.arange(LENGTH)[None], positions, start, end, method="hidden"
      )
      return (x[0] * jnp.arange(1, config.embed_dim + 1)).sum(-1)

    return jnp.abs(jax.jacrev(hidden)(table[:LENGTH])).sum(-1)

  np.testing.assert_array_equal(np.asarray(influence(params)) > 0, seen)


@pytest.mark.parametrize("name", FAMILIES)
def test_layouts_and_remat_give_the_same(name: str):
  """Scanned, unrolled and rematerialised: same logits and gradients."""
  config = make(name)
  stacked, arrays = params_of(config), inputs(config)

  def loss_and_grad(config: config_lib.GLMConfig, params: Any) -> Any:
    return jax.jit(jax.value_and_grad(lambda p: jnp.square(glm.GLM(config).apply({"params": p}, *arrays)).mean()))(
      params
    )

  loss, grads = loss_and_grad(config, stacked)
  remats = (dict(remat="full"), dict(remat="dots")) if name == "glm-130b" else ()
  for changes in (dict(scan_layers=False), *remats):
    other = dataclasses.replace(config, **changes)
    params = stacked if other.scan_layers else glm.unstack_layers(stacked)
    other_loss, other_grads = loss_and_grad(other, params)
    expected = grads if other.scan_layers else glm.unstack_layers(grads)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other_grads, expected)
  second = jax.tree.map(lambda x: x[1], stacked["layers"])
  chex.assert_trees_all_equal(glm.unstack_layers(stacked)["layers_1"], second)


def test_intervals_are_the_dense_mask():
  rng = np.random.default_rng(0)
  q, k, v = (jnp.array(rng.normal(size=(2, LENGTH, 3, 4)), jnp.float32) for _ in range(3))
  start = rng.integers(0, LENGTH, (2, LENGTH))
  end = np.minimum(start + rng.integers(1, LENGTH, (2, LENGTH)), LENGTH)
  keys = np.arange(LENGTH)
  mask = (keys >= start[..., None]) & (keys < end[..., None])
  scores = np.where(mask[:, None], np.einsum("blhk,bmhk->bhlm", q, k) / 2, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum("bhlm,bmhk->blhk", weights, v)
  np.testing.assert_allclose(
    attention.attend(partitioning.target(), q, k, v, jnp.array(start), jnp.array(end)), expected, atol=1e-5
  )
  one = attention.attend(
    partitioning.target(), q[:, 3:4], k, v, jnp.array(start[:, 3:4]), jnp.array(end[:, 3:4])
  )  # decoding's own path
  np.testing.assert_allclose(one, expected[:, 3:4], atol=1e-5)


@pytest.mark.parametrize("length", [1, 3])  # 1: decoding's own path
def test_a_query_that_sees_nothing_gets_zeros(length: int):
  """Whether its interval is empty, turned around, or lies where no key is; and it moves no key."""
  q, x = jnp.ones((4, length, 1, 4)), jnp.ones((4, 3, 1, 4))
  start, end = (jnp.array([column] * length, jnp.int32).T for column in ((0, 2, 3, -5), (0, 1, 9, 0)))

  def run(k, v):
    return attention.attend(partitioning.target(), q, k, v, start, end)

  out, pull = jax.vjp(run, x, x)
  for zeros in (out, *pull(jnp.ones_like(out))):
    np.testing.assert_array_equal(zeros, np.zeros(zeros.shape))


@pytest.mark.parametrize("sizes", [{}, dict(data=2, fsdp=2, tensor=2), dict(data=1, context=4), dict(data=1, tensor=8)])
def test_an_id_outside_of_a_table_has_no_row_on_any_mesh(sizes: dict):
  """Zeros and no gradient; the other rows as they are."""
  table = jax.random.normal(jax.random.key(0), (16, 8))
  index = np.array([[3, -1, 16, 15], [0, 2**31 - 1, -(2**31), 3]] * 4, np.int32)
  there = ((index >= 0) & (index < 16))[..., None]
  want = np.where(there, np.asarray(table)[np.clip(index, 0, 15)], 0)
  d_table = np.zeros((16, 8), np.float32)
  np.add.at(d_table, index[there[..., 0]], 1)
  rows = jax.jit(lambda table: jax.vjp(lambda table: layers.rows_of("float32", "vocab", table, index), table))
  if not sizes:
    got, pull = rows(table)
    (back,) = pull(jnp.ones_like(got))
  else:
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes), jax.devices()[: np.prod(list(sizes.values()))])
    with partitioning.use(mesh):
      got, pull = rows(jax.device_put(table, partitioning.named(mesh, partitioning.FSDP, "vocab", "embed")))
      (back,) = jax.jit(pull)(jnp.ones_like(got))
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(back, d_table)


@pytest.mark.parametrize("where", ["hidden_dropout", "attention_dropout"])
def test_dropout_only_where_asked(where: str):
  config = make("glm-130b", **{where: 0.5})
  plain = logits_of(make("glm-130b"), params_of(make("glm-130b")), *inputs(config))
  params = params_of(make("glm-130b"))
  np.testing.assert_array_equal(logits_of(config, params, *inputs(config)), plain)  # deterministic by default

  @jax.jit
  def noisy(key: jax.Array) -> jax.Array:
    return glm.GLM(config, deterministic=False).apply({"params": params}, *inputs(config), rngs={"dropout": key})

  assert bool((noisy(jax.random.key(0)) != noisy(jax.random.key(1))).any())
  np.testing.assert_array_equal(noisy(jax.random.key(0)), noisy(jax.random.key(0)))


@pytest.mark.parametrize(
  "count, sizes",
  [
    (128_697_794_560, dict(vocab_size=150_528, num_layers=70, embed_dim=12_288, num_heads=96, mlp_dim=32_768)),
    (
      6_173_286_400,
      dict(
        vocab_size=130_528,
        num_layers=28,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=16_384,
        positions="rotary_2d",
        mlp="gelu_tanh",
      ),
    ),  # one embedding matrix; its head is the other 0.5 B
  ],
)
def test_published_sizes(count: int, sizes: dict):
  config = config_lib.GLMConfig(**sizes)
  shapes = nn.unbox(jax.eval_shape(lambda key: glm.init(config, key), jax.random.key(0)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == params_lib.count(config) == count
  untied = dataclasses.replace(config, tie_embeddings=False)
  assert params_lib.count(untied) == count + config.vocab_size * config.embed_dim
  if config.positions == "rotary_2d":
    assert params_lib.count(untied) == 6_707_929_088


def test_deepnorm_starts_as_the_paper_says():
  """Xavier, times (2 N)^-1/2 for mlp, values and attention output; zero biases (docs/sources.md)."""
  config = make("glm-130b", num_layers=3, embed_dim=128, num_heads=4, mlp_dim=192, vocab_size=512)
  params = glm.init_params(config, jax.random.key(0))
  d, f, beta = 128, 192, 6**-0.5
  qkv = params["layers"]["attention"]["qkv"]["kernel"]  # [N, D, 3, H, K]
  expected = {
    "query": (qkv[:, :, 0], (2 / (d + d)) ** 0.5),
    "key": (qkv[:, :, 1], (2 / (d + d)) ** 0.5),
    "value": (qkv[:, :, 2], beta * (2 / (d + d)) ** 0.5),
    "out": (params["layers"]["attention"]["out"]["kernel"], beta * (2 / (d + d)) ** 0.5),
    "wi": (params["layers"]["mlp"]["wi"]["kernel"], beta * (2 / (d + f)) ** 0.5),
    "wo": (params["layers"]["mlp"]["wo"]["kernel"], beta * (2 / (d + f)) ** 0.5),
    "table": (params["embedding"]["table"], (2 / (512 + d)) ** 0.5),
  }
  for name, (x, std) in expected.items():
    np.testing.assert_allclose(np.std(x), std, rtol=0.05, err_msg=name)
    assert abs(float(np.mean(x))) < 0.1 * std, name
  assert config.alpha == pytest.approx(6**0.5)
  for sublayer in (params["layers"]["attention"], params["layers"]["mlp"]):
    assert all(not np.any(part["bias"]) for part in sublayer.values())
  first, second = qkv[0], qkv[1]
  assert not np.allclose(first, second)


def test_embedding_gradient_shrink():
  """The gradient of the table, its use as head included, is alpha times the plain one; the others stay."""
  config = make("glm-130b")
  params, arrays = params_of(config), inputs(config)
  grad = jax.jit(jax.grad(lambda p, alpha: jnp.square(glm.GLM(config).apply({"params": p}, *arrays, alpha)).mean()))
  plain, shrunk = grad(params, 1.0), grad(params, 0.1)
  np.testing.assert_allclose(shrunk["embedding"]["table"], 0.1 * plain["embedding"]["table"], rtol=1e-4, atol=1e-7)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), shrunk["layers"], plain["layers"])
  np.testing.assert_array_equal(layers.scale_gradient(jnp.arange(3.0), 0.1), jnp.arange(3.0))


def test_rotary_turns_by_distance():
  """Scores depend on distances alone, norms stay, and position 0 changes nothing."""
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def at(position):
    return rotary.table(jnp.array([[position]]), 8, 10_000.0, "none")

  def turn(x, position):
    return rotary.rotate(x, at(position), 1)

  np.testing.assert_allclose(turn(q, 0), q, atol=1e-6)
  np.testing.assert_allclose(jnp.linalg.norm(turn(q, 77)), jnp.linalg.norm(q), rtol=1e-5)
  np.testing.assert_allclose(jnp.vdot(turn(q, 3), turn(k, 10)), jnp.vdot(turn(q, 103), turn(k, 110)), atol=1e-4)


def test_rotary_in_two_dimensions():
  """The first half of the head turns with the position, the second with the block position."""
  config = make("chatglm-6b")
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 8))

  def turn(position, block):
    return rotary.rotate(x, rotary.tables(config, jnp.array([[[position], [block]]])), 2)

  np.testing.assert_allclose(turn(5, 0)[..., 4:], x[..., 4:], atol=1e-6)
  np.testing.assert_allclose(turn(0, 5)[..., :4], x[..., :4], atol=1e-6)
  assert not np.allclose(turn(5, 7)[..., :4], x[..., :4])
  np.testing.assert_allclose(turn(5, 7)[..., :4], turn(5, 0)[..., :4], atol=1e-6)


@pytest.mark.parametrize(
  "rounding, error_512, error_2048", [("half_frequencies", 0.12, 0.49), ("half_table", 0.23, 0.88)]
)
def test_rotary_roundings(rounding: str, error_512: float, error_2048: float):
  """Half precision as numpy does it, and as far off as the original is (head dimension 128)."""
  positions = np.array([[0, 1, 64, 512, 2047]])
  frequencies = (1.0 / 10_000 ** (np.arange(0, 128, 2, dtype=np.float32) / 128)).astype(np.float16)
  if rounding == "half_table":
    angles = positions[..., None].astype(np.float16) * frequencies
    expected = np.cos(angles.astype(np.float32)).astype(np.float16)
  else:
    expected = np.cos(positions[..., None].astype(np.float32) * frequencies.astype(np.float32))
  cos, _ = jax.jit(lambda p: rotary.table(p, 128, 10_000.0, rounding))(jnp.array(positions))
  np.testing.assert_allclose(cos, expected, atol=1e-3)
  for position, bound in ((512, error_512), (2047, error_2048)):
    upto = jnp.arange(position + 1)[None]
    error = jnp.abs(rotary.table(upto, 128, 10_000.0, rounding)[0] - rotary.table(upto, 128, 10_000.0, "none")[0]).max()
    assert bound * 0.9 < float(error) < bound * 1.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("softmax_dtype", config_lib.SOFTMAX_DTYPES)
def test_half_precision_compute(dtype: str, softmax_dtype: str):
  config = make("glm-130b", dtype=dtype, softmax_dtype=softmax_dtype)
  exact = logits_of(make("glm-130b"), params_of(make("glm-130b")), *inputs(config))
  logits = logits_of(config, params_of(make("glm-130b")), *inputs(config))
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, exact, atol=0.1 * float(jnp.abs(exact).max()))


def test_the_softmax_is_in_float32_unless_it_is_to_be_studied():
  for dtype in config_lib.DTYPES:
    assert make("glm-130b", dtype=dtype).scores_dtype == "float32"
    config = make("glm-130b", dtype=dtype, softmax_dtype="compute")
    assert config.scores_dtype == config.one_layer.scores_dtype == dtype
  exact, arrays = make("glm-130b"), inputs(make("glm-130b"))
  compute = dataclasses.replace(exact, softmax_dtype="compute")
  np.testing.assert_array_equal(*(logits_of(each, params_of(exact), *arrays) for each in (exact, compute)))


@pytest.mark.parametrize(
  "wrong, message",
  [
    (dict(num_layers=0), "num_layers is 0"),
    (dict(softmax_dtype="float16"), "softmax_dtype is 'float16': choose one of float32, compute"),
    (dict(norm="rms"), "'rms'.*deepnorm"),
    (dict(embed_dim=15), "divisible"),
    (dict(embed_dim=12, positions="rotary_2d", num_heads=2), "multiple of 4"),
  ],
)
def test_config_mistakes(wrong: dict, message: str):
  with pytest.raises(errors.InputError, match=message):
    make("gpt", **wrong)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
  "at, wrong", [(0, lambda x: x[0]), (0, lambda x: x * 1.0), (1, lambda x: x[..., :-1]), (3, lambda x: x[:1])]
)
def test_shapes_and_kinds_are_checked_at_the_door(name, at, wrong):
  config = make(name)
  given = list(inputs(config))
  given[at] = wrong(given[at])
  with pytest.raises(AssertionError):
    jax.eval_shape(functools.partial(glm.GLM(config).init, jax.random.key(0)), *given)

"""Reads the golden cases: the original code's tiny models, their parameters under our names, their masks.

Cases come from tests/golden, or from the folder that GLMJAX_GOLDEN_DIR names: same formats, any sizes.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np

from glmjax import tokens
from glmjax.infer import placement
from glmjax.infer import runner as runner_lib
from glmjax.models import config as config_lib

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What came of one comparison; benchmarks/parity.py makes a table of them."""

  group: str
  what: str
  error: float  # largest absolute difference
  tolerance: str  # as the table has it


COMPARISONS: list[Comparison] = []  # all that were made in this process


def close(
  group: str, what: str, ours: Any, expected: Any, atol: float = 0.0, rtol: float = 0.0, case: str = ""
) -> None:
  """Asserts that numbers are equal within atol + rtol * |expected|."""
  ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
  error = float(np.abs(ours - expected).max(initial=0)) if ours.shape == expected.shape else float("inf")
  limits = [f"{atol:g}"] * bool(atol) + [f"{rtol:g} relative"] * bool(rtol)
  COMPARISONS.append(Comparison(group, what, error, " + ".join(limits)))
  np.testing.assert_allclose(ours, expected, atol=atol, rtol=rtol, err_msg=f"{group} {what} {case}")


def same(group: str, what: str, ours: Any, expected: Any, case: str = "") -> None:
  """Asserts that tokens or texts are the same."""
  ours, expected = (x.tolist() if hasattr(x, "tolist") else x for x in (ours, expected))
  COMPARISONS.append(Comparison(group, what, 0.0 if ours == expected else float("inf"), "identical"))
  assert ours == expected, f"{group} {what} {case}: {ours} should be {expected}"


def folder() -> pathlib.Path:
  """Where the cases are."""
  return pathlib.Path(os.environ.get("GLMJAX_GOLDEN_DIR") or pathlib.Path(__file__).parent / "golden")


@functools.cache
def load(name: str) -> tuple[dict[str, Any], Arrays]:
  """A group's description and arrays."""
  path = folder() / name
  if name == "evaluation":
    path = pathlib.Path(os.environ.get("GLMJAX_EVALUATION_DIR") or folder().parent / "evaluation" / "cases") / "model"
  with np.load(f"{path}.npz") as arrays:
    return json.loads(pathlib.Path(f"{path}.json").read_text()), dict(arrays)


FAMILIES = {
  "glm130b_tiny": dict(positions="rotary", mlp="geglu", rotary_rounding="half_frequencies"),
  "chatglm6b_tiny": dict(
    positions="rotary_2d", mlp="gelu_tanh", rotary_rounding="half_frequencies", tie_embeddings=False
  ),
  "glm10b_tiny": dict(positions="learned_2d", mlp="gelu_tanh", norm="pre"),
}
FAMILIES["evaluation"] = FAMILIES["glm130b_tiny"]  # the model of the evaluation harness's cases (evaluation_cases)


def config(name: str, **changes: Any) -> config_lib.GLMConfig:
  """The group's model, sizes from its JSON."""
  sizes = load(name)[0]["config"]
  hidden = sizes["hidden_size"]
  fields = dict(
    vocab_size=sizes["vocab_size"],
    num_layers=sizes["num_layers"],
    embed_dim=hidden,
    num_heads=sizes["num_attention_heads"],
    mlp_dim=sizes.get("inner_hidden_size", 4 * hidden),
    max_length=sizes["max_sequence_length"],
    layer_norm_epsilon=sizes["layernorm_epsilon"],
  )
  return config_lib.GLMConfig(**(fields | FAMILIES[name] | changes))


def params(name: str, prefix: str = "param/") -> dict[str, Any]:
  """The group's parameters (or its gradients, by another prefix) as our stacked tree."""
  cfg, arrays = config(name), load(name)[1]
  n, d, h, k = cfg.num_layers, cfg.embed_dim, cfg.num_heads, cfg.head_dim

  def norm(key: str) -> Arrays:
    return {"scale": arrays[f"{prefix}{key}.weight"], "bias": arrays[f"{prefix}{key}.bias"]}

  def layer(i: int) -> dict[str, Any]:
    at = f"transformer.layers.{i}."

    def get(key):
      return arrays[f"{prefix}{at}{key}"]

    order = (3, h, k) if name == "glm10b_tiny" else (h, 3, k)  # rows of the fused projection

    def qkv(x):
      return np.moveaxis(x.reshape(*order, -1), 0 if name == "glm10b_tiny" else 1, 0)

    def wi(x):
      return x.reshape(cfg.mlp_branches, cfg.mlp_dim, -1)

    return {
      "attention_norm": norm(at + "input_layernorm"),
      "mlp_norm": norm(at + "post_attention_layernorm"),
      "attention": {
        "qkv": {
          "kernel": np.moveaxis(qkv(get("attention.query_key_value.weight")), -1, 0),
          "bias": qkv(get("attention.query_key_value.bias"))[..., 0],
        },
        "out": {"kernel": get("attention.dense.weight").T.reshape(h, k, d), "bias": get("attention.dense.bias")},
      },
      "mlp": {
        "wi": {
          "kernel": np.moveaxis(wi(get("mlp.dense_h_to_4h.weight")), -1, 0),
          "bias": wi(get("mlp.dense_h_to_4h.bias"))[..., 0],
        },
        "wo": {"kernel": get("mlp.dense_4h_to_h.weight").T, "bias": get("mlp.dense_4h_to_h.bias")},
      },
    }

  layers = [layer(i) for i in range(n)]
  table = "word_embeddings.weight" if name == "glm10b_tiny" else "transformer.word_embeddings.weight"
  tree = {
    "embedding": {"table": arrays[prefix + table]},
    "layers": jax.tree.map(lambda *xs: np.stack(xs), *layers),
    "final_norm": norm("transformer.final_layernorm"),
  }
  if cfg.positions == "learned_2d":
    tree["embedding"] |= {
      "position": arrays[prefix + "transformer.position_embeddings.weight"],
      "block_position": arrays[prefix + "transformer.block_position_embeddings.weight"],
    }
  if not cfg.tie_embeddings:
    tree["head"] = {"kernel": arrays[prefix + "lm_head.weight"].T}
  return tree


def runner(name: str, mesh: str | None = None, **changes: Any) -> runner_lib.Runner:
  """The group's model for inference, on a mesh, as tensor=2, or on one device."""
  place = placement.on_mesh(mesh)
  model, tree = config(name, **changes), params(name)
  if missing := -model.mlp_dim % place.mesh.shape["tensor"]:  # 170, say: places that are 0 make it divide
    tree["layers"]["mlp"] = _widened(tree["layers"]["mlp"], missing)
    model = dataclasses.replace(model, mlp_dim=model.mlp_dim + missing)
  return runner_lib.Runner(model, tree, place)


def _widened(mlp: dict[str, Arrays], by: int) -> dict[str, Arrays]:
  """The same function with a wider inside, of zeros."""

  def pad(x: np.ndarray, axis: int) -> np.ndarray:
    return np.pad(x, [(0, by if i == axis % x.ndim else 0) for i in range(x.ndim)])

  wi, wo = mlp["wi"], mlp["wo"]
  return {
    "wi": {"kernel": pad(wi["kernel"], -1), "bias": pad(wi["bias"], -1)},
    "wo": {"kernel": pad(wo["kernel"], -2), "bias": wo["bias"]},
  }


def intervals(hidden_BLM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """start, end of each query's visible keys; a query that sees nothing (padding) gets itself."""
  seen = ~hidden_BLM
  length = seen.shape[-1]
  own = np.arange(seen.shape[1])
  any_ = seen.any(-1)
  start = np.where(any_, seen.argmax(-1), own)
  end = np.where(any_, length - seen[..., ::-1].argmax(-1), own + 1)
  keys = np.arange(length)
  expected = (keys >= start[..., None]) & (keys < end[..., None])
  assert (expected == seen)[any_].all(), "a query sees keys that are no interval"
  return start.astype(np.int32), end.astype(np.int32)


def specials(name: str) -> tokens.SpecialTokens:
  """The group's special tokens."""
  meta = load(name)[0]
  if name == "chatglm6b_tiny":
    c = meta["config"]
    mask = c["mask_token_id"]
    return tokens.SpecialTokens(
      mask=mask,
      gmask=c["gmask_token_id"],
      smask=mask + 2,
      eod=mask + 3,
      sop=c["bos_token_id"],
      eop=c["eos_token_id"],
      eos=2,
      pad=c["pad_token_id"],
      unk=0,
      enc=mask + 6,
      dblock=mask + 7,
    )
  s = meta["special_tokens"]
  if name == "glm10b_tiny":
    return tokens.SpecialTokens(
      mask=s["MASK"],
      gmask=s["gMASK"],
      smask=s["sMASK"],
      eod=s["eos"],
      sop=s["sop"],
      eop=s["eop"],
      eos=s["eos"],
      pad=s["pad"],
      unk=s["unk"],
      enc=s["ENC"],
      dblock=s["dBLOCK"],
    )
  return tokens.SpecialTokens(
    mask=s["[MASK]"],
    gmask=s["[gMASK]"],
    smask=s["[sMASK]"],
    eod=s["eod"],
    sop=s["sop"],
    eop=s["eop"],
    eos=s["eos"],
    pad=0,
    unk=0,
    enc=s["ENC"],
    dblock=s["dBLOCK"],
  )

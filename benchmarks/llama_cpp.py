"""llama.cpp beside us: models of random weights in its files, for benchmarks/serving.py and benchmarks/cpu_decode.py.

  python benchmarks/llama_cpp.py --bits=4 --out=q4_0.gguf

writes a model of Llama's architecture and ChatGLM-6B's size, 6.2 thousand million parameters in Q4_0 or Q8_0; it needs
the package gguf. The programs are built of llama.cpp's sources, which llama-cpp-python's sdist (0.3.36, say) holds in
vendor/llama.cpp:

  cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
  cmake --build build --target llama-server llama-bench
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from glmjax.models import config as config_lib

_NORM_EPSILON = 1e-5


# ChatGLM-6B's layers, width and vocabulary; with three matrices of this width its MLPs have as many parameters.
CHATGLM_6B = config_lib.GLMConfig(vocab_size=130_528, num_layers=28, embed_dim=4_096, num_heads=32, mlp_dim=10_944)
_BLOCK = 32  # weights of one scale


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--bits", type=int, choices=(4, 8), required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  options = parser.parse_args()
  write_gguf(options.out, CHATGLM_6B, options.bits)


def write_gguf(file: pathlib.Path, config: config_lib.GLMConfig, bits: int | None = None) -> None:
  """Writes a model of Llama's architecture with the GLM's layers, widths, vocabulary and tied head.

  `bits`: 4 or 8 for matrices in Q4_0 or Q8_0; None: float32. Needs the package gguf.
  """
  import gguf

  draw, width = np.random.default_rng(0), config.embed_dim
  writer = gguf.GGUFWriter(file, "llama")
  writer.add_context_length(config.max_length)
  writer.add_embedding_length(width)
  writer.add_block_count(config.num_layers)
  writer.add_feed_forward_length(config.mlp_dim)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_heads)
  writer.add_layer_norm_rms_eps(_NORM_EPSILON)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_vocab_size(config.vocab_size)
  kinds_of_files = {None: "ALL_F32", 4: "MOSTLY_Q4_0", 8: "MOSTLY_Q8_0"}
  writer.add_file_type(gguf.LlamaFileType[kinds_of_files[bits]])
  control, byte, normal = gguf.TokenType.CONTROL, gguf.TokenType.BYTE, gguf.TokenType.NORMAL
  names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  kinds = [gguf.TokenType.UNKNOWN, control, control] + [byte] * 256
  words = [f"\u2581w{i}" for i in range(config.vocab_size - len(names))]
  writer.add_tokenizer_model("llama")
  writer.add_token_list([name.encode() for name in names + words])
  writer.add_token_scores([0.0] * config.vocab_size)
  writer.add_token_types(kinds + [normal] * len(words))
  shapes = {
    "attn_q": (width, width),
    "attn_k": (width, width),
    "attn_v": (width, width),
    "attn_output": (width, width),
    "ffn_gate": (config.mlp_dim, width),
    "ffn_up": (config.mlp_dim, width),
    "ffn_down": (width, config.mlp_dim),
    "attn_norm": (width,),
    "ffn_norm": (width,),
  }
  tensors = {f"blk.{i}.{name}.weight": shape for i in range(config.num_layers) for name, shape in shapes.items()}
  tensors |= {"token_embd.weight": (config.vocab_size, width), "output_norm.weight": (width,)}
  for name, shape in tensors.items():
    if "norm" in name:
      writer.add_tensor(name, np.ones(shape, np.float32))
    elif bits is None:
      writer.add_tensor(name, draw.normal(0, 0.02, shape).astype(np.float32))
    else:
      writer.add_tensor(name, _blocks(draw, shape, bits), raw_dtype=gguf.GGMLQuantizationType[f"Q{bits}_0"])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _blocks(draw: Any, shape: tuple[int, ...], bits: int) -> np.ndarray:
  """Returns random blocks of Q4_0 or Q8_0, uint8 [rows, bytes]: a float16 scale, and the codes of 32 weights."""
  blocks = shape[1] // _BLOCK
  scale = np.full((shape[0], blocks, 1), 0.01 / 2 ** (bits - 4), np.float16).view(np.uint8)
  codes = draw.integers(0, 256, (shape[0], blocks, _BLOCK * bits // 8), dtype=np.uint8)
  return np.concatenate([scale, codes], -1).reshape(shape[0], -1)


def command(server: str, file: pathlib.Path, port: int, slots: int, context: int, threads: int) -> list[str]:
  """Returns the server's command: `slots` requests at a time, which share places for all of them."""
  settings = {"model": file, "port": port, "parallel": slots, "ctx-size": context, "threads": threads, "cache-ram": 0}
  return [server, "--kv-unified", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


if __name__ == "__main__":
  main()

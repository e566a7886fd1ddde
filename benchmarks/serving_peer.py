"""llama.cpp's server, for benchmarks/serving.py: a model of a GLM's size and shape, random weights, and its command.

The server is built of llama.cpp's sources, which llama-cpp-python's sdist (0.3.36, say) holds in vendor/llama.cpp:

  cmake -S vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF
  cmake --build build --target llama-server
"""

import pathlib

import numpy as np

from glmjax.models import config as config_lib

_NORM_EPSILON = 1e-5


def write_gguf(file: pathlib.Path, config: config_lib.GLMConfig) -> None:
  """Writes a model of Llama's architecture, float32, with the GLM's layers, widths, vocabulary and tied head.

  Needs the package gguf.
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
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)
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
    one = "norm" in name
    writer.add_tensor(name, np.ones(shape, np.float32) if one else draw.normal(0, 0.02, shape).astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def command(server: str, file: pathlib.Path, port: int, slots: int, context: int, threads: int) -> list[str]:
  """Returns the server's command: `slots` requests at a time, which share places for all of them."""
  settings = {"model": file, "port": port, "parallel": slots, "ctx-size": context, "threads": threads, "cache-ram": 0}
  return [server, "--kv-unified", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]

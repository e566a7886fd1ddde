"""seqio's view of the tokenizer."""

import os

import numpy as np
import seqio
import tensorflow as tf

from glmjax import tokenizer as tokenizer_lib
from glmjax.io import paths


class GLMVocabulary(seqio.SentencePieceVocabulary):
  """A tokenizer folder (or a bare ice_text.model) as a seqio vocabulary.

  The TensorFlow side calls the Python tokenizer (tf.numpy_function), so ids are the same by construction:
  TensorFlow Text cannot express the icetk rules. Such a graph runs in its own process only, which is all that
  tf.data pipelines and Beam workers do. The base class's `tokenizer` and `sp_model` are the bare pieces.
  """

  def __init__(self, path: paths.Named, num_image_tokens: int | None = None) -> None:
    path = os.fspath(paths.local(path, "the tokenizer of a seqio vocabulary"))  # TensorFlow opens it itself
    self.text_tokenizer = tokenizer_lib.Tokenizer.load(path, num_image_tokens)
    model = os.path.join(path, tokenizer_lib.MODEL_FILE) if os.path.isdir(path) else path
    super().__init__(model)

  @property
  def bos_id(self) -> int:
    return self.text_tokenizer.specials.sop

  @property
  def eos_id(self) -> int:
    return self.text_tokenizer.specials.eos

  @property
  def pad_id(self) -> int:
    return self.text_tokenizer.specials.pad

  @property
  def unk_id(self) -> int:
    return self.text_tokenizer.specials.unk

  @property
  def _base_vocab_size(self) -> int:
    return self.text_tokenizer.vocab_size

  def _encode(self, s: str | bytes) -> list[int]:
    return self.text_tokenizer.encode(tf.compat.as_text(s))

  def _decode(self, ids: list[int]) -> str:
    return self.text_tokenizer.decode(ids)

  def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
    """Turns a scalar string into int32 [length]."""
    ids = tf.numpy_function(lambda text: np.asarray(self._encode(text), np.int32), [s], tf.int32)
    return tf.ensure_shape(ids, [None])

  def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
    """Turns int32 [length] or [batch, length] into a scalar string or [batch]."""

    def decode(array: np.ndarray) -> np.ndarray:
      if array.ndim > 1:
        return np.array([self._decode(row).encode() for row in array], object)
      return np.array(self._decode(array).encode(), object)

    return tf.ensure_shape(tf.numpy_function(decode, [ids], tf.string), ids.shape[:-1])

  def __eq__(self, other: object) -> bool:
    return isinstance(other, GLMVocabulary) and self.text_tokenizer == other.text_tokenizer

  def __hash__(self) -> int:
    return hash(self.text_tokenizer)

  def __str__(self) -> str:
    fingerprint = self.text_tokenizer.fingerprint
    return f"GLMVocabulary(file={self.sentencepiece_model_file}, fingerprint={fingerprint})"

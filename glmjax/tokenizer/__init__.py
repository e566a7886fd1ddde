"""Text to ids and back in the icetk layout, over SentencePiece and without TensorFlow; what other parts use of it."""

from glmjax.tokenizer.encoding import MODEL_FILE, Tokenizer, sentence_ends
from glmjax.tokenizer.layout import IMAGE_TOKENS, SPECIAL_TEXT
from glmjax.tokenizer.training import train

__all__ = ["IMAGE_TOKENS", "MODEL_FILE", "SPECIAL_TEXT", "Tokenizer", "sentence_ends", "train"]

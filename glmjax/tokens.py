"""Special-token ids of the GLM families, as plain integers.

Text pieces come first; special tokens are appended behind them in the order that GLM-130B
fixed (docs/sources.md, "Tokens"), so that one number, the id of [MASK], settles all of them.
"""

import dataclasses

# Training objectives: the value of the `objective` feature is the index here.
OBJECTIVES = ("mask", "gmask", "instruction", "sentence", "chosen", "rejected")
OBJECTIVE_MASK, OBJECTIVE_GMASK, OBJECTIVE_INSTRUCTION, OBJECTIVE_SENTENCE = range(4)
OBJECTIVE_CHOSEN, OBJECTIVE_REJECTED = 4, 5  # answers to one question, of which the first is preferred

# Appended behind the text pieces, in this order (GLM-130B's icetk wrapper).
ICETK_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "eod", "sop", "eop", "ENC", "dBLOCK")


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Ids of the tokens that the objectives and the decoder need."""

  mask: int  # [MASK]: a short blank
  gmask: int  # [gMASK]: a blank at the end of the text
  smask: int  # [sMASK]: a blank of whole sentences
  sop: int  # start of piece: first input of a span
  eop: int  # end of piece: last target of a span
  eod: int  # end of document
  eos: int  # end of text; the decoder also stops here
  pad: int
  unk: int
  enc: int
  dblock: int

  @property
  def masks(self) -> tuple[int, int, int]:
    """The tokens that stand for a blank."""
    return self.mask, self.gmask, self.smask


def icetk(num_image_tokens: int = 20_000, num_text_tokens: int = 130_000) -> SpecialTokens:
  """Returns ids in the icetk layout: image ids, text pieces, then ICETK_SPECIALS.

  GLM-130B and ChatGLM-6B v0: (20000, 130000); ChatGLM-6B v1: (0, 130000).
  The first text pieces are <unk>, (unused 1), </s>, <pad>.
  """
  first = num_image_tokens + num_text_tokens
  names = ("mask", "gmask", "smask", "eod", "sop", "eop", "enc", "dblock")
  ids = {name: first + i for i, name in enumerate(names)}
  return SpecialTokens(**ids, unk=num_image_tokens, eos=num_image_tokens + 2, pad=num_image_tokens + 3)

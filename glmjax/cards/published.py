"""Tokens per parameter of published models, beside which a run's stand (docs/sources.md, "Tokens per parameter")."""

# name, tokens, parameters: as their papers state them.
MODELS = (
  ("GLM-130B", 400e9, 130e9),  # arXiv 2210.02414, 2.3
  ("Chinchilla", 1.4e12, 70e9),  # arXiv 2203.15556: the most for its compute, about 20
  ("LLaMA 65B", 1.4e12, 65e9),  # arXiv 2307.09288, table 1, as the next one
  ("Llama 2 70B", 2.0e12, 70e9),
  ("ChatGLM-6B", 1e12, 6.2e9),  # its README
  ("Llama 2 7B", 2.0e12, 7e9),
)


def sentence(tokens: int, parameters: int) -> str:
  """Returns how many tokens a run saw for each parameter, and how many others did."""
  others = ", ".join(f"{name} {_ratio(seen / size)}" for name, seen, size in MODELS)
  return f"It saw {_ratio(tokens / parameters)} tokens for each of its {parameters:,} parameters; {others}."


def _ratio(ratio: float) -> str:
  return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:#.2g}"

"""report.md out of report.json's contents."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

_MODELS = {"float": "float", "int8": "INT8", "int4": "INT4"}
_LANGUAGES = {"en": "English", "zh": "Chinese"}


def render(report: dict[str, Any], title: str) -> str:
  """Returns the whole report."""
  sections = [
    f"# Report: {title}",
    _training(report["train"]),
    _forgotten(report.get("probe", {})),
    _held_out(report["heldout"]),
    _quantized(report["quantized"], list(report["heldout"])),
    _samples(report["samples"]),
    _seconds(report["seconds"]),
  ]
  return "\n\n".join(section for section in sections if section) + "\n"


def _training(train: dict[str, Any]) -> str:
  rows = [
    ["steps", f"{train['steps']:,}"],
    ["tokens", f"{train['tokens']:,}"],
    [f"loss, mean of the first {train['loss_mean_steps']} steps", f"{train['loss_first']:.3f}"],
    [f"loss, mean of the last {train['loss_mean_steps']} steps", f"{train['loss_last']:.3f}"],
    ["stopped and resumed at step", "-" if train["resumed_at"] is None else f"{train['resumed_at']:,}"],
    ["tokens per second (median)", f"{train['tokens_per_second']:,.0f}"],
    ["model FLOP/s (median)", f"{train['model_flops_per_second'] / 1e9:,.1f} G"],
  ]
  return "## Training\n\n" + table(["", ""], rows) + "\n\n![Training loss of each objective](loss.png)"


def _forgotten(probe: dict[str, float]) -> str:
  if not probe:
    return ""
  change = f"{probe['difference']:+.4f} (95 %: {probe['low']:+.4f} to {probe['high']:+.4f})"
  rows = [["before", f"{probe['before']:.4f}"], ["after", f"{probe['after']:.4f}"], ["change", change]]
  header = ["loss on text of another kind", f"{probe['samples']:,} rows"]
  return "## Forgotten\n\n" + table(header, rows)


def _held_out(heldout: dict[str, dict[str, Any]]) -> str:
  """Tabulates bits per byte and filling, each beside its baselines."""
  languages = list(heldout)
  names = [_LANGUAGES.get(language, language) for language in languages]

  def row(name: str, key: str, shown: str, error: str | None = None) -> list[str]:
    cells = []
    for figures in heldout.values():
      cell = shown.format(figures[key]) if key in figures else "-"
      if error in figures:
        cell += " ± " + shown.replace("+", "").format(figures[error])
      cells.append(cell)
    return [name, *cells]

  bits = table(
    ["bits per byte", *names],
    [
      row("**this model**, left to right", "bits_per_byte", "**{:.3f}**"),
      row("unigram model of the training text", "unigram_bits_per_byte", "{:.3f}"),
      row("xz -9e", "xz_bits_per_byte", "{:.3f}"),
      row("tokens", "tokens", "{:,}"),
      row("bytes", "bytes", "{:,}"),
    ],
  )
  text = "## Held-out text\n\nText that neither the model nor its tokenizer was trained on.\n\n" + bits
  if any("infill_accuracy" in figures for figures in heldout.values()):
    fills = table(
      ["tokens of a masked span guessed right", *names],
      [
        row("**both sides visible** ([MASK])", "infill_accuracy", "{:.1%}", "infill_accuracy_se"),
        row("left side only ([gMASK])", "infill_accuracy_left_only", "{:.1%}", "infill_accuracy_left_only_se"),
        row("both sides over left side", "infill_gain", "{:+.1%}", "infill_gain_se"),
        row("always the most frequent token", "unigram_accuracy", "{:.1%}"),
        row("span tokens", "infill_tokens", "{:,}"),
      ],
    )
    text += (
      "\n\nFilling blanks, the same spans both times (± one standard error). That seeing both sides "
      "helps is GLM's claim:\n\n" + fills
    )
  return text


def _quantized(quantized: dict[str, dict[str, Any]], languages: list[str]) -> str:
  if not set(quantized) - {"float"}:
    return ""
  reference = quantized["float"]

  def cells(figures: dict[str, Any]) -> Iterable[str]:
    yield f"{figures['bytes'] / 1e6:,.1f} MB" if "bytes" in figures else "-"
    for key in (f"{language}_bits_per_byte" for language in languages):
      change = "" if figures is reference else f" ({figures[key] / reference[key] - 1:+.2%})"
      yield f"{figures[key]:.4f}{change}"

  names = (_LANGUAGES.get(language, language) for language in languages)
  header = ["weights", "size on disk", *(f"{name} bits per byte" for name in names)]
  rows = [[_MODELS.get(name, name), *cells(figures)] for name, figures in quantized.items()]
  return "## Quantized\n\n" + table(header, rows)


def _samples(samples: Sequence[dict[str, str]]) -> str:
  if not samples:
    return ""
  models = list(dict.fromkeys(sample["model"] for sample in samples))
  said: dict[str, dict[str, str]] = {}
  for sample in samples:
    said.setdefault(sample["prompt"], {})[sample["model"]] = sample["output"]
  rows = [[cell(prompt), *(cell(outputs.get(model, "-")) for model in models)] for prompt, outputs in said.items()]
  return "## Samples\n\n" + table(["prompt", *(_MODELS.get(model, model) for model in models)], rows, "---")


def _seconds(seconds: dict[str, float]) -> str:
  if not seconds:
    return ""
  rows = [[stage, f"{value:,.1f}"] for stage, value in (seconds | {"all": sum(seconds.values())}).items()]
  return "## Time\n\n" + table(["command", "seconds"], rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---:") -> str:
  """Writes a table whose first column is aligned to the left, and the others as `align` says."""
  lines = [header, ["---"] + [align] * (len(header) - 1), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(text: str) -> str:
  """Writes any text as one table cell."""
  text = html.escape(text, quote=False).replace("\n", "<br>")
  return re.sub(r"([\\|\[*_`])", r"\\\1", text)

"""The head of README.md as the Hugging Face Hub reads it: metadata in YAML."""

from typing import Any

import yaml

from glmjax.cards import emissions as emissions_lib
from glmjax.cards import evaluations
from glmjax.cards import facts as facts_lib

OPEN, CLOSE = "---\n", "---\n"


def render(facts: facts_lib.Facts, emissions: emissions_lib.Emissions | None) -> str:
  """Returns the front matter with its fences; what is not known is left out.

  Args:
    facts: of the model.
    emissions: of the training; None: not known. The Hub has one number, here the middle of the range.
  """
  about = facts.about
  content: dict[str, Any] = {
    "license": about.license and about.license.lower(),  # as the Hub lists them
    "language": list(about.languages) or None,
    "library_name": "glmjax",
    "pipeline_tag": "text-generation",
    "tags": ["glm", *(["blank-infilling"] if not facts.config.model.causal else [])],
    "base_model": about.base_model,
    "model-index": _index(facts),
  }
  if emissions is not None and emissions.high_tonnes is not None:
    middle = (emissions.low_tonnes + emissions.high_tonnes) / 2
    content["co2_eq_emissions"] = {
      "emissions": float(f"{middle * 1e6:.3g}"),  # grams, as the Hub has it
      "source": f"glmjax: {emissions.low_tonnes:.3g} to {emissions.high_tonnes:.3g} t, {emissions.grid.source}",
      "training_type": "fine-tuning" if facts.config.base or about.base_model else "pre-training",
    }
  kept = {name: value for name, value in content.items() if value is not None}
  return OPEN + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000) + CLOSE


def _index(facts: facts_lib.Facts) -> list[dict[str, Any]] | None:
  """Returns the evaluations as the Hub's model index."""
  results = [
    {
      "task": {"type": "text-generation"},
      "dataset": {"name": task, "type": task.replace(" ", "-").replace(",", "")},
      "metrics": [
        {"type": metric, "value": round(float(own["value"]), 6)}
        for metric, own in figures.items()
        if metric not in evaluations.BASELINES
      ],
    }
    for each in facts.evaluations
    for task, figures in each.figures.items()
  ]
  return [{"name": facts.about.name or facts.folder, "results": results}] if results else None

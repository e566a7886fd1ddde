"""The card's text: what is known of a model, as a page."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from glmjax.cards import document
from glmjax.cards import emissions as emissions_lib
from glmjax.cards import facts as facts_lib
from glmjax.cards import integrity
from glmjax.plan import footprint as footprint_lib

_CARDS = 4  # that are named for a precision and context

# Which libraries may change what a model says, or what a run comes to, where their versions differ.
CHANGES = {
  "jax": "programs and their rounding: last bits of every figure, and of long runs more",
  "jaxlib": "programs and their rounding: last bits of every figure, and of long runs more",
  "numpy": "draws of rows, spans and samples, should its generators change (NEP 19 allows it)",
  "flax": "nothing known: the layers are our own arithmetic",
  "optax": "updates, where an optimizer's formula is mended",
  "orbax-checkpoint": "nothing: arrays are read back bit for bit, by checksum",
  "python": "nothing known",
  "commit": "glmjax's own code",
  "glmjax": "see CHANGELOG.md",
}


@dataclasses.dataclass(frozen=True)
class More:
  """What was computed for the card from its facts."""

  footprint: Sequence[footprint_lib.Footprint]
  curve: Sequence[str]  # sentences: whether it is trained to the end
  pictures: Sequence[document.Picture]  # of the run
  emissions: emissions_lib.Emissions | None


def make(known: integrity.Known, criteria: Sequence[integrity.Criterion], more: More) -> document.Document:
  """Returns the whole card."""
  facts = known.facts
  about = facts.about
  title = about.name or facts.folder
  version = f", version {about.version}" if about.version else ""
  total = sum(facts.weights.parameters.values())
  lead = about.summary or f"{facts.kind.capitalize()} of {total:,} parameters{version}, made with glmjax."
  sections = [
    _use(facts),
    _model(facts),
    _data(facts),
    _training(facts, more),
    _cost(known, more),
    _evaluation(facts),
    _hardware(more.footprint),
    _owner(facts),
    _versions(known),
    integrity_section(criteria),
    _unknown(criteria),
  ]
  return document.Document(title, lead, [section for section in sections if section.blocks])


def _use(facts: facts_lib.Facts) -> document.Section:
  name = "FOLDER"
  lines = [f"glmjax chat --checkpoint={name}", f"glmjax serve --checkpoint={name}"]
  if not facts.config.model.causal:
    lines.insert(0, f"glmjax generate --checkpoint={name} --prompt='The [MASK] said so.'")
  if facts.config.base:
    lines = [f"glmjax generate --checkpoint=BASE --adapter={name} --prompt='...'"]
  uses = facts.about.uses
  said = [f"{key.capitalize()}: {uses[key]}" for key in ("intended", "unsuitable", "limits") if key in uses]
  return document.Section("Use", [*([document.Items(said)] if said else []), document.Code("\n".join(lines))])


def _model(facts: facts_lib.Facts) -> document.Section:
  weights = facts.weights
  rows = [
    *facts_lib.describe_model(facts.config.model),
    ("parameters", f"{sum(weights.parameters.values()):,}"),
    *((f"of them {part}", f"{count:,}") for part, count in sorted(weights.parameters.items())),
    ("precision", "float" if weights.bits is None else f"INT{weights.bits}, float16 scales for each output"),
    ("stored", ", ".join(f"{count:,} bytes of {dtype}" for dtype, count in sorted(weights.nbytes.items()))),
    ("weights' fingerprint", weights.fingerprint),
  ]
  if weights.step is not None:
    rows.append(("training step", f"{weights.step:,}"))
  if facts.tokenizer is not None:
    rows.append(("tokenizer", f"{facts.tokenizer['vocab_size']:,} ids, {facts.tokenizer['fingerprint']}"))
  return document.Section("Model", [document.Table(("", ""), rows)])


def _data(facts: facts_lib.Facts) -> document.Section:
  blocks: list[document.Block] = []
  if facts.manifest is not None:
    head = ("task", "split", "rate", "documents", "tokens", "bytes", "SHA-256 of the source")
    rows = [
      (
        row["task"],
        row["split"],
        f"{row['rate']:g}",
        *(f"{row[name]:,}" if row[name] is not None else "-" for name in ("documents", "tokens", "utf8_bytes")),
        f"{str(row['source'])[:16]}...",
      )
      for row in facts_lib.rows_of(facts.manifest)
    ]
    blocks.append(document.Table(head, rows, numbers=True))
  blocks += _filters(facts)
  stated = [
    (task, *(own.get(key, "not known") for key in ("source", "license"))) for task, own in facts.about.data.items()
  ]
  if stated:
    blocks += [document.Paragraph("As the owner states:"), document.Table(("data", "source", "licence"), stated)]
    notes = [f"{task}: {own['notes']}" for task, own in facts.about.data.items() if own.get("notes")]
    blocks += [document.Items(notes)] if notes else []
  if facts.text is not None:
    said = f"glmjax data on {facts.text['documents']:,} documents, {facts.text['bytes']:,} bytes, before training:"
    blocks += [document.Paragraph(said), document.Table(("", "documents", "share"), _text(facts.text), numbers=True)]
    blocks += _overlap(facts.text.get("overlap"))
  return document.Section("Training data", blocks)


def _filters(facts: facts_lib.Facts) -> list[document.Block]:
  """Returns what filters left out of each task's text, in their order."""
  rows = [
    (task, each["name"], _settings(each["settings"]), f"{each['documents_in']:,}", f"{each['documents_out']:,}")
    for task, own in sorted(({} if facts.manifest is None else facts.manifest["tasks"]).items())
    for each in own.get("filters", ())
  ]
  head = ("task", "filter", "settings", "documents before", "behind it")
  return [document.Table(head, rows)] if rows else []


def _settings(settings: Mapping[str, Any]) -> str:
  return ", ".join(f"{name} {value}" for name, value in settings.items()) or "-"


def _overlap(overlap: Mapping[str, Any] | None) -> list[document.Block]:
  """Returns how many items of each evaluation set the text has a part of."""
  if not overlap or not overlap["files"]:
    return []
  rows = [
    (name, *(f"{own[what]:,}" for what in ("items", "compared", "overlapping")))
    for name, own in overlap["files"].items()
  ]
  said = f"Items of evaluation sets of which {overlap['n']} words in a row are in the training text:"
  head = ("evaluation set", "items", "long enough to compare", "found in training text")
  return [document.Paragraph(said), document.Table(head, rows, numbers=True)]


def _text(counts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """Returns what a report on text counts: a name, documents, and their share."""
  rows = [(f"language: {name}", count) for name, count in counts["languages"].items()]
  rows += [(f"{kind} duplicates", count) for kind, count in counts["duplicates"].items()]
  rows += [(f"with personal data by form: {kind}", count) for kind, count in counts["personal"].items()]
  if "words" in counts:
    rows.append(("with words of a list", counts["words"]))
  total = max(counts["documents"], 1)
  return [(name, f"{count:,}", f"{count / total:.2%}") for name, count in rows]


def _training(facts: facts_lib.Facts, more: More) -> document.Section:
  blocks: list[document.Block] = []
  if facts.training is not None:
    its = facts.training
    rows = [
      ("steps", f"{its['steps']:,}"),
      ("samples", f"{its['samples']:,}"),
      ("tokens", f"{its['tokens']:,}"),
      (f"loss, mean of the first {its['loss_mean_steps']} steps", f"{its['loss_first']:.3f}"),
      (f"loss, mean of the last {its['loss_mean_steps']} steps", f"{its['loss_last']:.3f}"),
      ("times that it was stopped and went on", f"{its['restarts']:,}"),
    ]
    if facts.interventions is not None:
      counted = ", ".join(f"{count:,} {kind}" for kind, count in sorted(facts.interventions.items()))
      rows.append(("interventions at spikes", counted or "none"))
    blocks.append(document.Table(("", ""), rows))
  blocks += more.pictures
  if more.curve:
    blocks += [document.Paragraph("Is it trained to the end?"), document.Items(more.curve)]
  published = facts.about.published
  if published:
    rows = [(each.what, each.value, each.source) for each in published]
    blocks += [
      document.Paragraph("As published elsewhere, not measured here:"),
      document.Table(("what", "published", "source"), rows),
    ]
  return document.Section("Training", blocks)


def _cost(known: integrity.Known, more: More) -> document.Section:
  compute = known.compute
  if compute is None:
    return document.Section("What it cost", [])
  rows = [
    ("of the run up to step", f"{compute.step:,}"),
    ("sessions", f"{compute.sessions:,}, {compute.killed:,} of them killed"),
    ("hours", f"{compute.wall_hours:,.2f}, {compute.step_hours:,.2f} of them in steps"),
    *((f"hours of {kind}", f"{hours:,.2f}") for kind, hours in compute.device_hours.items()),
    ("processors", ", ".join(compute.processors)),
    ("steps done", f"{compute.done.steps:,}, {compute.unrecorded_steps:,} or more beside them unrecorded"),
    ("tokens read", f"{compute.done.tokens:,}"),
    ("model FLOPs", f"{compute.done.model_flops:.3g}"),
    ("MFU", "not known" if compute.mfu is None else f"{compute.mfu[0]:.1%} to {compute.mfu[1]:.1%}"),
    ("energy, kWh", _range(compute.energy.low_kwh, compute.energy.high_kwh)),
    (
      "of it measured",
      ", ".join(f"{kwh:.3g} kWh by {meter}" for meter, kwh in compute.energy.meters.items()) or "none",
    ),
    ("not counted", ", ".join(compute.energy.not_counted) or "nothing"),
  ]
  if more.emissions is not None:
    grid, pue = more.emissions.grid, more.emissions.pue
    rows.append(("CO2, tonnes", _range(more.emissions.low_tonnes, more.emissions.high_tonnes)))
    center = "of the machines alone" if known.facts.about.pue is None else f"PUE {pue:g}"
    rows.append(("at", f"{grid.kg_co2_per_kwh} kg/kWh ({grid.source}, {grid.year}), {center}"))
  return document.Section("What it cost", [document.Table(("", ""), rows)])


def _range(low: float, high: float | None) -> str:
  return f"{low:.3g} to {'unknown' if high is None else f'{high:.3g}'}"


def _evaluation(facts: facts_lib.Facts) -> document.Section:
  rows = [
    (task, metric, _figure(own), _interval(own), f"{own['items']:,.0f}" if "items" in own else "-")
    for each in facts.evaluations
    for task, figures in each.figures.items()
    for metric, own in figures.items()
  ]
  blocks: list[document.Block] = []
  if rows:
    blocks.append(document.Table(("task", "figure", "value", "95 % interval", "items"), rows, numbers=True))
    notes = [f"{each.name}: {part}" for each in facts.evaluations for part in each.parts]
    notes += [f"{each.name}: {name} {own}" for each in facts.evaluations for name, own in each.settings.items()]
    blocks += [document.Items(notes)] if notes else []
  if facts.probe is not None:
    blocks.append(document.Paragraph(_forgotten(facts.probe)))
  return document.Section("Evaluation", blocks)


def _forgotten(probe: Mapping[str, Any]) -> str:
  """Returns in words what a run changed on the text of its probe."""
  change = probe["difference"]
  return (
    f"On the text of the run's probe, {probe['samples']:,} rows, the loss was {probe['before']:.4f} nats a token "
    f"before the run and {probe['after']:.4f} behind it, {change['loss']:+.4f} "
    f"(95 % interval: {change['low']:+.4f} to {change['high']:+.4f})."
  )


def _figure(own: Mapping[str, Any]) -> str:
  return f"{own['value']:.3f}"


def _interval(own: Mapping[str, Any]) -> str:
  return f"{own['low']:.3f} to {own['high']:.3f}" if "low" in own and "high" in own else "-"


def _hardware(rows: Sequence[footprint_lib.Footprint]) -> document.Section:
  if not rows:
    return document.Section("Hardware", [])
  head = ("kernels", "tokens", "weights", "cache", "runs on")
  table = document.Table(head, [_footprint(row) for row in rows])
  said = (
    "Memory of one request of so many tokens, prompt and answer together, and the smallest sets of each card. "
    "Weights and cache are exact; where a program of this model was compiled for the card its temporaries are counted, "
    "elsewhere (~) they come on top."
  )
  return document.Section("Hardware", [document.Paragraph(said), table])


def _footprint(row: footprint_lib.Footprint) -> tuple[str, ...]:
  cards = [
    f"{'~' if each.basis == footprint_lib.ARITHMETIC else ''}{each.count} x {each.card}"
    for each in row.recommended[:_CARDS]
  ]
  kernels = "half precision" if row.bits == 16 else f"INT{row.bits}"
  sizes = (_size(size) for size in (row.weights_bytes, row.cache_bytes))
  return (kernels, f"{row.context:,}", *sizes, ", ".join(cards) or "none of the cards known")


def _size(count: int) -> str:
  return f"{count / (1 << 30):,.2f} GiB" if count >= 1 << 29 else f"{count / (1 << 20):,.2f} MiB"


def _owner(facts: facts_lib.Facts) -> document.Section:
  about = facts.about
  rows = [
    (name, value)
    for name, value in (
      ("owner", about.owner),
      ("contact", about.contact),
      ("licence of the weights", about.license),
      ("languages", ", ".join(about.languages)),
      ("architecture from", about.architecture),
      ("tokenizer from", about.tokenizer),
    )
    if value
  ]
  return document.Section("Owner and licence", [document.Table(("", ""), rows)] if rows else [])


def _versions(known: integrity.Known) -> document.Section:
  about = known.facts.about
  blocks: list[document.Block] = []
  if about.version:
    changes = about.changes or "what changed is not stated"
    blocks.append(document.Paragraph(f"Version {about.version} of the weights: {changes}"))
  if known.compute is not None:
    versions = {name: own for name, own in known.compute.versions.items() if own is not None}
    rows = [(name, own, CHANGES.get(name, "not known")) for name, own in versions.items()]
    blocks.append(document.Table(("trained with", "version", "another version may change"), rows))
    changed = [
      f"{each.name}: {each.before} to {each.after} at step {each.first_step:,}" for each in known.compute.changes
    ]
    blocks += [document.Paragraph("Other versions took part:"), document.Items(changed)] if changed else []
  return document.Section("Versions", blocks)


def integrity_section(criteria: Sequence[integrity.Criterion]) -> document.Section:
  """Returns the integrity report as a section."""
  count = sum(each.verdict == integrity.EVIDENCED for each in criteria)
  said = f"{count} of {len(criteria)} criteria are evidenced in full. A claim without evidence counts as missing."
  rows = [
    (f"{each.name} ({each.group})", each.verdict, "; ".join(each.evidence), "; ".join(each.missing))
    for each in criteria
  ]
  head = ("criterion", "verdict", "evidence", "missing for full marks")
  return document.Section("Integrity report", [document.Paragraph(said), document.Table(head, rows)])


def _unknown(criteria: Sequence[integrity.Criterion]) -> document.Section:
  missing = [f"{each.name}: {text}" for each in criteria for text in each.missing]
  return document.Section("Not known", [document.Items(missing)] if missing else [])


def badges(criteria: Sequence[integrity.Criterion]) -> str:
  """Returns the verdicts as HTML, for the head of the page."""
  boxes = [
    f'<div class="badge {each.verdict.replace(" ", "-")}"><b>{each.name}</b>{each.verdict}</div>' for each in criteria
  ]
  return f'<div class="badges">{"".join(boxes)}</div>'

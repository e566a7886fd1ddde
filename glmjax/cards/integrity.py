"""The integrity report: ten criteria, each with its evidence and with what is missing for full marks.

A checklist that fails without evidence: what nothing shows counts as missing, whatever the owner says of it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from glmjax import errors
from glmjax.cards import compute as compute_lib
from glmjax.cards import facts as facts_lib
from glmjax.models import params as params_lib
from glmjax.plan import footprint as footprint_lib

UPSTREAM, MODEL, DOWNSTREAM = "upstream", "model", "downstream"
EVIDENCED, PARTIAL, NONE = "evidenced", "partial", "no evidence"


@dataclasses.dataclass(frozen=True)
class Criterion:
  """One criterion, and how it fares."""

  name: str
  group: str
  evidence: tuple[str, ...]  # what shows it: files with their hashes, figures, commands
  missing: tuple[str, ...]  # for full marks

  @property
  def verdict(self) -> str:
    """Evidenced where nothing is missing, partial where something is there, else no evidence."""
    return EVIDENCED if not self.missing else PARTIAL if self.evidence else NONE


class _Finding:
  """What is found for one criterion, while it is looked for."""

  def __init__(self) -> None:
    self.evidence: list[str] = []
    self.missing: list[str] = []

  def ask(self, there: object, evidence: str, missing: str) -> None:
    """Notes the evidence where something is there, else what is missing."""
    (self.evidence if there else self.missing).append(evidence if there else missing)


@dataclasses.dataclass(frozen=True)
class Version:
  """A version that a card was made of."""

  version: str | None
  weights: str  # their fingerprint


@dataclasses.dataclass(frozen=True)
class Known:
  """The facts, and what was computed from them."""

  facts: facts_lib.Facts
  compute: compute_lib.Compute | None  # what the run cost
  footprint: Sequence[footprint_lib.Footprint]  # memory by precision and context
  earlier: Sequence[Version]  # of other weights, that cards here were of before; the last one last


def report(known: Known) -> list[Criterion]:
  """Returns the ten criteria."""
  found = []
  for (group, name), look in _CRITERIA.items():
    finding = _Finding()
    look(known, finding)
    found.append(Criterion(name, group, tuple(finding.evidence), tuple(finding.missing)))
  return found


def names() -> list[str]:
  """Returns the names of all criteria."""
  return [name for _, name in _CRITERIA]


def _hash(facts: facts_lib.Facts, name: str) -> str:
  return f"{name} (SHA-256 {facts.files[name][:16]}...)"


def _architecture(known: Known, found: _Finding) -> None:
  facts = known.facts
  found.evidence.append(f"{_hash(facts, 'config.json')} describes all of it")
  if facts.config.base:
    base = facts.config.base
    found.evidence.append(f"adapts weights {str(base.get('fingerprint'))[:16]}...")
  else:
    count = params_lib.count(facts.config.model)
    found.evidence.append(f"{count:,} parameters by the architecture, as many as are stored")
  found.ask(facts.about.architecture, f"published: {facts.about.architecture}", "where it was published: architecture")
  if facts.kind == "an import":
    found.evidence.append(f"read from files of {facts.config.export['family']}")


def _dataset(known: Known, found: _Finding) -> None:
  facts = known.facts
  if facts.manifest is None:
    found.missing.append("the manifest of the token cache: --cache")
  else:
    rows = [row for row in facts_lib.rows_of(facts.manifest) if row["split"] == "train"]
    documents = sum(row["documents"] or 0 for row in rows)
    found.evidence.append(
      f"token cache {str(facts.config.data.get('cache'))[:16]}...: {len(rows)} tasks, {documents:,} documents, "
      "each file with its SHA-256"
    )
    for row in rows:
      stated = facts.about.data.get(row["task"], {}) | _given(facts.manifest, row["task"])
      found.ask(stated.get("source"), f"{row['task']}: {stated.get('source')}", f"data: source of {row['task']}")
      found.ask(stated.get("license"), f"{row['task']}: {stated.get('license')}", f"data: licence of {row['task']}")
  found.ask(facts.config.data.get("weights"), "rates of the mixture: config.json, data", "rates of the mixture")
  found.ask(facts.text, "duplicates, languages, personal data of that text: glmjax data", "report of the text: --text")
  sets = (facts.text or {}).get("overlap", {}).get("files")
  shared = f"overlap with {len(sets or ())} evaluation sets, by 13-grams"
  found.ask(sets, shared, "overlap with evaluation sets: glmjax data --against")


def _given(manifest: Mapping[str, object], task: str) -> dict[str, str]:
  """Returns the source and the licence that the cache itself has of a task."""
  own = manifest["tasks"][task]
  return {name: str(own[name]) for name in ("source", "license") if own.get(name)}


def _tokenizer(known: Known, found: _Finding) -> None:
  facts = known.facts
  recorded = facts.config.tokenizer.get("fingerprint") or facts.config.data.get("tokenizer")
  if facts.tokenizer is None:
    found.missing.append("a tokenizer in the folder")
    return
  fingerprint = facts.tokenizer["fingerprint"]
  found.ask(
    recorded == fingerprint, f"tokenizer {fingerprint[:16]}... is the one recorded", "a record of the tokenizer"
  )
  found.evidence.append(f"{facts.tokenizer['vocab_size']:,} ids fit {facts.config.model.vocab_size:,} embeddings")
  if facts.manifest is not None:
    found.evidence.append("the token cache was made with it")
  found.ask(facts.about.tokenizer, f"from: {facts.about.tokenizer}", "where it comes from: tokenizer")


def _density(known: Known, found: _Finding) -> None:
  facts = known.facts
  total = sum(facts.weights.parameters.values())
  stored = sum(facts.weights.nbytes.values())
  found.evidence.append(f"{total:,} parameters, all of which every token meets: a dense model")
  found.evidence.append(
    f"{facts.weights.arrays:,} arrays with checksums, {stored:,} bytes, {8 * stored / total:.2f} bits each"
  )
  tokens = None if facts.training is None else facts.training["tokens"]
  if facts.config.base:
    return
  found.ask(tokens, f"{(tokens or 0) / total:.1f} tokens of training for each parameter", "tokens of training: --run")


def _compute(known: Known, found: _Finding) -> None:
  facts, compute = known.facts, known.compute
  found.ask(facts.training, "figures of its steps, in metrics.jsonl", "metrics of the run: --run")
  found.ask(compute, "its sessions, in compute.jsonl", "what the run cost, in compute.jsonl: --run")
  if compute is not None:
    whole = is_whole(compute, facts.weights.step)
    found.ask(
      whole, "the record has every step", "what each step cost: the record has gaps, or goes beyond these weights"
    )
    found.ask(compute.mfu, "MFU", "MFU: the devices' peak is not known")
    energy = compute.energy
    measured = f"energy by {', '.join(energy.meters)}"
    found.ask(energy.meters and not energy.ranges, measured, "energy by a meter: there is a range in its place")
  found.ask(facts.about.grid, f"grid factor: {facts.about.grid and facts.about.grid.source}", "grid factor: grid")


def is_whole(compute: compute_lib.Compute, step: int | None) -> bool:
  """Tells whether a record of costs has every step up to that of the weights, and no more."""
  kept = compute.kept is not None and compute.kept.steps == compute.step == step
  return kept and not compute.first_step and not compute.unrecorded_steps


def _benchmarks(known: Known, found: _Finding) -> None:
  evaluations = known.facts.evaluations
  if not evaluations:
    found.missing.append("an evaluation: --evaluation")
  for each in evaluations:
    found.ask(each.weights, f"{each.name}: of these weights, by fingerprint", f"{each.name}: whose weights they are")
    found.missing += [f"{each.name}: all items: {part}" for part in each.parts]


def _identity(known: Known, found: _Finding) -> None:
  facts = known.facts
  found.evidence.append(f"weights {facts.weights.fingerprint[:16]}...: copies have the same, any other weights do not")
  found.ask(facts.about.name, f"called {facts.about.name}", "what it is called: name")
  found.ask(facts.about.owner, f"answered for by {facts.about.owner}", "who answers for it: owner")
  found.ask(facts.about.contact, "with an address", "how to reach them: contact")
  if facts.kind == "an import":
    found.evidence.append(f"made from files of {facts.config.export['family']}")
  elif facts.kind != "a training run":
    same = f"made from the run named, {(facts.run or '')[:8]}"
    found.ask(facts.run, same, "the run that it was made from: --run, where export and run have recorded which it is")


def _license(known: Known, found: _Finding) -> None:
  about = known.facts.about
  found.ask(about.license, f"licence of the weights: {about.license}", "licence of the weights: license")
  found.ask(known.facts.license_file, f"its text: {known.facts.license_file}", "its text: a file LICENSE in the folder")
  tasks = [] if known.facts.manifest is None else sorted(known.facts.manifest["tasks"])
  without = [
    task for task in tasks if not ({**about.data.get(task, {})} | _given(known.facts.manifest, task)).get("license")
  ]
  found.ask(tasks and not without, "licences of all data", f"licences of the data ({', '.join(without) or '--cache'})")


def _hardware(known: Known, found: _Finding) -> None:
  rows = known.footprint
  found.ask(rows, f"weights and caches of {len(rows)} settings, worked out exactly", "memory that it takes")
  compiled = sum(any(each.basis != footprint_lib.ARITHMETIC for each in row.sets) for row in rows)
  found.ask(compiled, f"programs compiled for {compiled} of them", "programs compiled for cards: glmjax plan --fits")


def _versions(known: Known, found: _Finding) -> None:
  about, compute = known.facts.about, known.compute
  found.ask(about.version, f"version {about.version} of the weights", "a version of the weights: version")
  before = [each.version for each in known.earlier if each.version]
  if about.version and before and _ordered(about.version) <= max(map(_ordered, before)):
    highest = max(before, key=_ordered)
    found.missing.append(f"a version above {highest}, which other weights had: version")
  found.ask(
    about.changes or about.version and not known.earlier,
    f"what changed: {about.changes or 'no earlier card is known here'}",
    "what changed since the version before: changes",
  )
  found.ask(compute, "the libraries that it was trained with", "the libraries that it was trained with: --run")


def _ordered(version: str) -> tuple[object, ...]:
  """Returns what versions are ordered by: semver.org, point 11."""
  numbers, _, before = version.partition("+")[0].partition("-")
  identifiers = [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in before.split(".") if before]
  return tuple(map(int, numbers.split("."))), not before, identifiers


_CRITERIA: Mapping[tuple[str, str], Callable[[Known, _Finding], None]] = {
  (UPSTREAM, "architecture provenance"): _architecture,
  (UPSTREAM, "dataset composition"): _dataset,
  (UPSTREAM, "tokenizer integrity"): _tokenizer,
  (MODEL, "parameter density"): _density,
  (MODEL, "training compute"): _compute,
  (MODEL, "benchmark reproducibility"): _benchmarks,
  (MODEL, "identity consistency"): _identity,
  (DOWNSTREAM, "licence clarity"): _license,
  (DOWNSTREAM, "hardware footprint"): _hardware,
  (DOWNSTREAM, "versioning drift"): _versions,
}


def waived(criteria: list[Criterion], names_of_waived: list[str]) -> list[Criterion]:
  """Returns the criteria that a check is to look at.

  Raises:
    errors.InputError: for a name that is none of theirs.
  """
  for name in names_of_waived:
    if name not in names():
      raise errors.InputError(f"--waive is {name[:60]!r}: choose one of {', '.join(names())}")
  return [each for each in criteria if each.name not in names_of_waived]

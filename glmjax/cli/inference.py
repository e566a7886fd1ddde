"""The generate and score commands: an Engine from a folder, put to the prompts or texts given."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glmjax import errors, ranges
from glmjax.cli import answers, hosts, inputs, process
from glmjax.io import paths, progress
from glmjax.models import config as config_lib

if TYPE_CHECKING:
  from glmjax.infer import ahead as ahead_lib
  from glmjax.infer import beam as beam_lib
  from glmjax.infer import engine as engine_lib
  from glmjax.infer import sampling as sampling_lib
  from glmjax.parallel import mesh as mesh_lib

DRAFTS = 7  # tokens of a draft, where nobody says how many: it costs little to read one more
Row = Mapping[str, Any]  # "prompt", "text" or "context" and "choices", and whatever else the user's line holds
_log = logging.getLogger("glmjax")


@dataclasses.dataclass(frozen=True)
class Drafting:
  """What is read ahead of texts (speculative decoding), which stay the same."""

  drafts: int | None = None  # tokens of each text's draft; None: 7 where a model drafts, else none
  draft_model: paths.Named | None = None  # a small model that drafts; None: what followed the same tokens before

  def __post_init__(self) -> None:
    if self.draft_model is not None and self.drafts == 0:
      raise errors.InputError("--draft_model drafts nothing with --drafts=0: leave one of them out")

  @property
  def count(self) -> int:
    """How many tokens a draft has."""
    return (0 if self.draft_model is None else DRAFTS) if self.drafts is None else self.drafts


@dataclasses.dataclass(frozen=True)
class Devices:
  """Where a model lies."""

  mesh: "mesh_lib.MeshConfig | str | None" = None  # devices to split it over, as "tensor=4"; None: the first alone
  offload_layers: int = 0  # layers, the last, whose weights stay in the host's memory
  kv_cache_dtype: str | None = None  # int8: keys and values in half of bfloat16's memory; None: as what is computed
  activation_bits: int | None = None  # 8: rounds what quantized weights are multiplied with, on CPUs
  head_bits: int | None = None  # 8 or 4: quantizes the head as it is loaded, on CPUs
  # A run that trained one beside the model, as a path; of chat and serve a list of such, or of NAME=FOLDER; None: the
  # model alone.
  adapter: paths.Named | Sequence[str] | None = None

  def __post_init__(self) -> None:
    for name, choices in config_lib.BITS.items():
      if (value := getattr(self, name)) is not None:
        ranges.one_of(f"--{name}", value, choices)
    if self.kv_cache_dtype is not None:
      ranges.choice("--kv_cache_dtype", self.kv_cache_dtype, config_lib.KV_CACHE_DTYPES)

  def noted(self) -> dict[str, Any]:
    """Returns what is noted beside answers: what changes them."""
    said = {name: getattr(self, name) for name in ("kv_cache_dtype", "activation_bits", "head_bits")}
    if isinstance(self.adapter, paths.Named):
      from glmjax.checkpoint import load  # here, as this module is looked at before a command is in order

      said["adapter"] = load.fingerprint(self.adapter)
    return {name: value for name, value in said.items() if value is not None}

  def load(
    self, checkpoint: paths.Named, drafting: Drafting = Drafting(), first: "ahead_lib.First | None" = None
  ) -> "engine_lib.Engine":
    """Loads the model, ready to answer, and the one that drafts for it; sooner where it is known what it will be asked
    first.
    """
    from glmjax.infer import engine, placement  # here, as this module is looked at before a command is in order

    self.prepare()
    process.keep_programs()
    hosts.check_same(
      (self, drafting), "--mesh, --offload_layers, how numbers are kept, --adapter, --drafts and --draft_model"
    )
    small = None if drafting.draft_model is None else engine.Engine.load(drafting.draft_model, mesh=self.mesh)
    options = {"mesh": self.mesh, "offload_layers": self.offload_layers, "drafts": drafting.count, "first": first}
    options["adapter"] = self.adapters
    precision = placement.Precision(None, self.kv_cache_dtype, self.activation_bits, self.head_bits)
    return engine.Engine.load(checkpoint, precision=precision, draft_model=small, **options)

  @property
  def adapters(self) -> paths.Named | dict[str, paths.Named] | None:
    """The folder of an adapter that is always on, or folders by name."""
    return self.adapter if isinstance(self.adapter, paths.Named | None) else named_adapters(self.adapter)

  def prepare(self) -> None:
    """Gives XLA its options for offloaded weights, which it reads when JAX first looks for devices."""
    if self.offload_layers:
      from glmjax.infer import offload

      process.add_xla_flags([f"--{name}={str(value).lower()}" for name, value in offload.GPU_OPTIONS.items()])


def named_adapters(given: Sequence[str]) -> paths.Named | dict[str, paths.Named] | None:
  """Returns what --adapter says, given any number of times: a folder that is always on, or folders by name.

  A name is what stands before the first "=", unless a "/" is in it: ./a=b is a folder.

  Raises:
    errors.InputError: for a folder without a name among others, and for two of one name.
  """
  found: dict[str, paths.Named] = {}
  for text in given:
    name, equals, folder = text.partition("=")
    if not equals or "/" in name:
      if len(given) > 1:
        raise errors.InputError(
          f"--adapter={text} has no name, and would always be on: give that one alone, or each as --adapter=NAME=FOLDER"
        )
      return paths.named(text, "--adapter")
    if name in found:
      raise errors.InputError(f"--adapter: there are two of the name {name!r}: give each its own")
    found[name] = paths.named(folder, f"--adapter={name}")
  return found or None


def model_folder(checkpoint: paths.Named) -> paths.Path:
  """Returns the folder of --checkpoint, once it is known to be a model's: before JAX is loaded, which takes longer."""
  from glmjax.checkpoint import folder  # here, as this module is looked at before a command is in order

  path = paths.named(checkpoint, "--checkpoint")
  folder.read_config(path)
  return path


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How blanks are filled: by sampling, or with `num_beams` above 1 by beam search."""

  max_tokens: int = 128  # for each blank
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0  # prompt i draws with seed + i
  min_tokens: int = 0
  no_repeat_ngram: int = 0
  repetition_penalty: float = 1.0
  num_beams: int = 1
  length_penalty: float = 1.0

  def how(self) -> "sampling_lib.Sampling | beam_lib.BeamSearch":
    """Returns the sampling or the beam search.

    Raises:
      errors.InputError: for numbers out of range, and for what would have no effect.
    """
    from glmjax.infer import beam, sampling  # here, as this module is looked at before a command is in order

    extra = {name: getattr(self, name) for name in ("min_tokens", "no_repeat_ngram", "repetition_penalty")}
    how = sampling.Sampling(self.temperature, self.top_k, self.top_p, **extra)
    search = beam.BeamSearch(self.num_beams, self.length_penalty, **extra)
    if self.num_beams == 1:
      if self.length_penalty != 1:
        raise errors.InputError(
          f"length_penalty is {self.length_penalty}, and only beam search has one: add --num_beams, or leave it out"
        )
      return how
    if not how.greedy:
      raise errors.InputError(
        f"num_beams is {self.num_beams} and temperature {self.temperature}: beam search draws "
        "nothing; add --temperature=0, or leave --num_beams out"
      )
    return search

  def noted(self) -> dict[str, Any]:
    """Returns what is noted beside answers: of settings that came later, those that are not as they are by default."""
    always = ("max_tokens", "temperature", "top_k", "top_p", "seed")
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name in always or getattr(self, field.name) != field.default
    }


@dataclasses.dataclass(frozen=True)
class Output:
  """Where answers go, besides to the screen."""

  out: paths.Named | None = None  # JSON lines file of the answers; "-": standard output
  overwrite: bool = False  # replaces the answers there; without it they are gone on with
  samples: paths.Named | None = None  # JSON lines file that prompts and outputs are added to
  label: str | None = None  # what the model is called there; None: as the checkpoint's folder


def generate(
  checkpoint: paths.Named,
  prompts: Sequence[str | Row],
  decoding: Decoding = Decoding(),
  drafting: Drafting = Drafting(),
  output: Output = Output(),
  devices: Devices = Devices(),
) -> list[dict[str, Any]] | dict[str, Any]:
  """Fills each prompt's blanks, or continues it where it has none; objects keep their other fields.

  With `output.out`, the answers go to that file batch by batch, and the result says how many; a file that holds answers
  to the first prompts is gone on with, unless it is to be overwritten; what gave them is noted beside it, in
  OUT.settings.json, and must be the same. With `output.samples`, adds a line {"model": label, "prompt", "output"} for
  each to that file.

  Raises:
    errors.InputError: for settings that do not go together, a prompt with a field that an answer has, a file that
      cannot be written or gone on with (all before the model is loaded), a prompt that does not fit.
  """
  devices.prepare()
  if decoding.num_beams > 1 and drafting.count:
    raise errors.InputError(
      f"num_beams is {decoding.num_beams}, and beam search reads nothing ahead: leave --drafts and --draft_model out"
    )
  hosts.check_same(decoding, "how blanks are filled")
  rows = [inputs.prompt(prompt, f"prompt {i} of {len(prompts)}") for i, prompt in enumerate(prompts, 1)]
  checkpoint, out, how = model_folder(checkpoint), output.out, decoding.how()
  weights = "" if out in (None, "-") else _fingerprint(checkpoint)
  settings = {"checkpoint": str(checkpoint), "weights": weights, **decoding.noted(), **devices.noted()}
  results: list[dict[str, Any]] = []
  with contextlib.ExitStack() as stack:  # what cannot be written is told before the model is loaded
    files = None
    if hosts.is_first():
      label = output.label or checkpoint.name
      files = stack.enter_context(answers.files(out, output.samples, label, rows, settings, output.overwrite))
    done = hosts.from_first(lambda: files.done)
    if done < len(rows):
      model = devices.load(checkpoint, drafting, _first(rows[done:], decoding.max_tokens, how, drafting.count))
      _check(model, rows, done)
      for batch in _generate(model, rows, done, decoding.max_tokens, how, decoding.seed):
        if files is not None:
          files.write(batch)
        if out is None:
          results.extend(batch)
  return results if out is None else {"out": str(out), "answers": len(rows), "new": len(rows) - done}


def _fingerprint(checkpoint: paths.Named) -> str:
  """Returns the fingerprint of the weights that would be loaded."""
  from glmjax.checkpoint import load as load_lib

  return load_lib.fingerprint(checkpoint)


def _first(
  rows: Sequence[Row], max_tokens: int, how: "sampling_lib.Sampling | beam_lib.BeamSearch", drafts: int
) -> "ahead_lib.First | None":
  """Returns what the model will be asked first; None for beam search."""
  from glmjax.infer import ahead, beam, engine, scheduler

  if isinstance(how, beam.BeamSearch):
    return None
  prompts = [row["prompt"] for row in rows[: engine.MAX_BATCH]]
  capacity = scheduler.Capacity(max(len(prompts), 1 + drafts), drafts=drafts)
  return ahead.First(prompts, max_tokens, how, capacity)


def _check(model: "engine_lib.Engine", rows: Sequence[Row], done: int) -> None:
  """Checks that the prompts fit, before the first is answered."""
  for i, row in enumerate(rows[done:], done):
    try:
      model.room(model.encode(row["prompt"]))
    except errors.InputError as error:
      raise errors.InputError(f"prompt {i + 1} of {len(rows)}: {error}") from None


def _generate(
  model: "engine_lib.Engine",
  rows: Sequence[Row],
  done: int,
  max_tokens: int,
  how: "sampling_lib.Sampling | beam_lib.BeamSearch",
  seed: int,
) -> Iterator[list[dict[str, Any]]]:
  """Yields the answers to rows[done:], a batch at a time; prompt i draws with seed + i."""
  told = progress.Progress(len(rows), "prompts answered")
  for first in range(done, len(rows), model.max_batch):
    batch = rows[first : first + model.max_batch]
    found = model.generate([row["prompt"] for row in batch], max_tokens, how, seed + first)
    yield [
      {**row, "output": g.text, "pieces": g.pieces, "finish_reason": g.finish_reason}
      for row, g in zip(batch, found, strict=True)
    ]
    told.at(first + len(batch))


def score(checkpoint: paths.Named, texts: Sequence[str | Row], devices: Devices = Devices()) -> list[dict[str, Any]]:
  """Scores how likely each text is: natural log-likelihood, tokens, bits per byte; objects keep their other fields.

  {"text"} is read from left to right; {"context", "text"} behind its context, or as the filling of its [MASK];
  {"context", "choices"} says how likely each choice is as the filling of the context's blank ([MASK] at its end if it
  has none), and which is best, counted from 0.

  Raises:
    errors.InputError: for a record that is none of these, or that has a field which score adds (before the model is
      loaded); for one that the model has no room for.
  """
  rows = [inputs.text(text, f"text {i} of {len(texts)}") for i, text in enumerate(texts, 1)]
  model = devices.load(model_folder(checkpoint))
  plain, asked = ([i for i, row in enumerate(rows) if ("choices" in row) == asks] for asks in (False, True))
  results: dict[int, dict[str, Any]] = {}
  scores = model.score([rows[i]["text"] for i in plain], [rows[i].get("context", "") for i in plain])
  for i, found in zip(plain, scores, strict=True):
    results[i] = {
      **rows[i],
      "log_likelihood": found.total,
      "tokens": found.count,
      "bits_per_byte": -found.total / math.log(2) / len(rows[i]["text"].encode()),
    }
  chosen = model.score_choices([rows[i]["context"] for i in asked], [rows[i]["choices"] for i in asked])
  for i, found in zip(asked, chosen, strict=True):
    results[i] = {
      **rows[i],
      "log_likelihoods": [each.total for each in found.scores],
      "tokens": [each.count for each in found.scores],
      "best": found.best,
    }
    if found.left_out:
      results[i]["context_tokens_left_out"] = found.left_out
  return [results[i] for i in range(len(rows))]


def show_outputs(results: list[dict[str, Any]] | dict[str, Any]) -> None:
  """Prints the outputs alone, an empty line between them; or where they went."""
  if isinstance(results, dict):
    where = "standard output" if results["out"] == "-" else results["out"]
    _log.info("%s: %d answers, %d of them new", where, results["answers"], results["new"])
  else:
    print("\n\n".join(result["output"] for result in results))


def show_nothing(result: Any) -> None:
  """Prints nothing, for what was shown as it came."""

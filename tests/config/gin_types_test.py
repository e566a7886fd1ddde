"""Values of wrong types: every parameter that a gin file of ours or a command can bind, wrong in every way."""

import pathlib
import random
import subprocess
import sys

import pytest

from glmjax import errors
from glmjax.cli import commands
from glmjax.config import gin_files, gin_reader, gin_types, signatures

ROOT = pathlib.Path(__file__).parent.parent.parent
OF_CALLS = "@glmjax.tokens.SpecialTokens()"  # an object that nearly nothing takes
SCALARS = {"int": ["0", "3"], "float": ["0.5"], "bool": ["True"], "str": ["'a'"], "None": ["None"]}
OTHERS = ["[]", "{}", "(1, 'a', None)", "[[1]]", "{'a': {}}", "b'x'", "1j", OF_CALLS, "@glmjax.train.loop.train"]
NUMBERS = ["1e999", "-1e999", "'3'", "'nan'", "[3]", "10" + "0" * 30, "0x" + "f" * 5000]

# Annotation -> values that it takes, values that it does not; `SCALARS` and `OTHERS` that are not of the first are
# tried as well.
CASES: dict[str, tuple[list[str], list[str]]] = {
  "int": (["0", "-3", "1_000"], ["1.0", "1e6", "True", *NUMBERS]),
  "float": (["0", "0.5", "1e-3", "-2"], ["True", *NUMBERS]),
  "bool": (["True", "False"], ["0", "1", "'true'", "None"]),
  "str": (["'a'", "''"], ["b'a'", "['a']", "'\\ud800'"]),
  "int | None": (["0", "None"], ["1.0", "False", "'None'", *NUMBERS]),
  "float | None": (["0", "0.5", "None"], ["False", *NUMBERS]),
  "str | None": (["'a'", "None"], ["3", "['a']"]),
  "path": (["'a/b'", "'~/x'", "'gs://bucket/x'"], ["''", "'gs://b/x'", "'a\\0b'", "['a']", "3", "'http://h/x'"]),
  "path | None": (["'a/b'", "'s3://bucket/x'", "None"], ["''", "'s3://b/x'", "'a\\0b'", "['a']", "3"]),
  "Sequence[int]": (["[]", "(1, 2)", "[0]"], ["3", "[1.5]", "['1']", "[True]", "[None]", "'12'", "[[1]]", "{1: 2}"]),
  "tuple[int, ...]": (["()", "(1, 2)"], ["3", "(1.5,)", "('1',)", "'12'"]),
  "Sequence[float]": (["[]", "(1, 0.5)"], ["0.5", "['1']", "[None]", "[1e999]", "[True]", "'12'"]),
  "Sequence[str]": (["['a']", "()"], ["'a'", "[1]", "[None]", "{'a': 'b'}"]),
  "Sequence[path]": (["['a', 'gs://bucket/x']", "()"], ["'a'", "[1]", "['']", "[None]", "['gs://b/x']"]),
  "Iterable[str]": (["['a']", "@glmjax.cli.corpus.training_documents()"], ["'a'", "[1]"]),
  "Sequence[Sequence[str]]": (["[['a', 'b']]", "[]"], ["['ab']", "'ab'", "[['a', 1]]", "[None]"]),
  "Sequence[tuple[int, int]]": (["[(1, 2)]", "[]"], ["(1, 2)", "[(1, 2, 3)]", "[(1,)]", "[(1, 2.5)]", "['ab']", "[3]"]),
  "Mapping[str, Any]": (["{'a': 1, 'b': {'c': [1]}}", "{}"], ["['a']", "'a'", "{1: 2}", "None"]),
  "Mapping[str, float] | None": (["{'a': 1}", "{}", "None"], ["{'a': 'b'}", "{1: 0.5}", "['a']", "{'a': None}"]),
  "Mapping[str, float]": (["{'a': 1}", "{}"], ["None", "{'a': 'b'}", "{1: 0.5}", "{'a': 1e999}"]),
  "Mapping[str, int] | int": (["{'a': 1}", "3"], ["0.5", "{'a': 0.5}", "{'a': True}", "{'a': 'b'}", "'3'"]),
  "Mapping[str, str] | None": (["{'a': 'b'}", "None"], ["{'a': 1}", "{1: 'b'}", "['a']", "'a'"]),
  "Mapping[str, path | Sequence[path]]": (
    ["{'a': 'b', 'c': ['d', '~/e']}"],
    [
      "'a'",
      "['a']",
      "{'en': 5}",
      "{'en': ['a', 5]}",
      "{1: 'a'}",
      "{'en': None}",
      "{'en': ''}",
      "{'en': ['gs://b/x']}",
      "{'en': 'a\\0b'}",
    ],
  ),
  "Mapping[str, path | Sequence[path]] | path | Sequence[path]": (
    ["{'a': 'b', 'c': ['d']}", "['a']", "'a'"],
    ["{'en': 5}", "[5]", "5", "{1: 'a'}", "['']", "None"],
  ),
  "Mapping[str, path | Sequence[path]] | path | Sequence[path] | None": (
    ["{'a': 'b'}", "'a'", "None"],
    ["{'en': 5}", "[5]", "5"],
  ),
  "Sequence[str | Mapping[str, Any]]": (["['a', {'prompt': 'b'}]"], ["'a'", "[1]", "[['a']]", "{'prompt': 'b'}"]),
  "Mapping[str, Mapping[str, str]] | None": (
    ["{'en': {'license': 'MIT'}}", "{}", "None"],
    ["{'en': 'MIT'}", "{'en': {'license': 3}}", "['en']", "'MIT'"],
  ),
  "Sequence[Length | Language | Words | PersonalData | ExactDuplicates | NearDuplicates]": (
    ["[@glmjax.data.filters.Length(), @glmjax.data.filters.ExactDuplicates()]", "[]"],
    ["@glmjax.data.filters.Length()", "[@glmjax.data.filters.Length]", "['Length']", f"[{OF_CALLS}]", "None"],
  ),
  "LoRA | PTuning | None": (
    ["@glmjax.train.trainable.LoRA()", "@glmjax.train.trainable.PTuning()", "None"],
    ["@glmjax.train.trainable.LoRA", "'lora'", "@glmjax.train.schedules.Batches()"],
  ),
  "path | Sequence[str] | None": (["'a'", "['a', 'b=c']", "None"], ["5", "[5]"]),
  "DPO | ORPO | None": (
    ["@glmjax.train.preference.DPO()", "@glmjax.train.preference.ORPO()", "None"],
    ["@glmjax.train.preference.DPO", "'dpo'", "@glmjax.train.trainable.LoRA()"],
  ),
  "spikes_lib.Guard | None": (
    ["@glmjax.train.spikes.Guard()", "None"],
    ["@glmjax.train.spikes.Guard", "'skip'", "@glmjax.train.schedules.Batches()"],
  ),
  "Callable[[paths.Path], None] | None": (["None", "@glmjax.train.loop.train"], ["3", "'a'", OF_CALLS]),
  "Callable[[ExportSource, paths.Path], None] | None": (["None", "@glmjax.train.loop.train"], ["3", "'a'", OF_CALLS]),
  "Mapping[str, config_lib.GLMConfig]": (
    ["{'a': @glmjax.models.config.GLMConfig()}"],
    [f"{{'a': {OF_CALLS}}}", "{'a': 'b'}", "{'a': @glmjax.models.config.GLMConfig}"],
  ),
  "rows.BlankInfilling | glm10b.BlockStrategy | Callable[..., sampler.Infilling]": (
    ["@glmjax.data.rows.BlankInfilling", "@glmjax.data.glm10b.BlockStrategy()"],
    [OF_CALLS, "'a'"],
  ),
  "rows.BlankInfilling | Callable[..., rows.BlankInfilling]": (
    ["@glmjax.data.rows.BlankInfilling", "@glmjax.data.rows.BlankInfilling()"],
    [OF_CALLS, "'a'", "@glmjax.data.glm10b.BlockStrategy()"],
  ),
  "str | mixtures.Mixture": (
    ["'pretrain_bilingual'", "@glmjax.data.mixtures.pretraining()", "@glmjax.tasks.pretrain.register()"],
    ["@glmjax.data.mixtures.pretraining", "3", "['a']", "None"],
  ),
  "mixtures.Mixture": (
    ["@glmjax.data.mixtures.pretraining()", "@glmjax.data.mixtures.instruction()"],
    ["@glmjax.data.mixtures.pretraining", "'pretrain_bilingual'", "3", "None"],
  ),
  "Sequence[Mixture]": (
    ["[@glmjax.data.mixtures.pretraining(), @glmjax.data.mixtures.instruction()]"],
    ["@glmjax.data.mixtures.pretraining()", "['a']", "3", "None"],
  ),
  "mesh_lib.MeshConfig | str | None": (
    ["@glmjax.parallel.mesh.MeshConfig()", "'tensor=4'", "None"],
    ["@glmjax.parallel.mesh.MeshConfig", "4", OF_CALLS],
  ),
  "feed_lib.DataSource": (["@glmjax.data.loader.CachedMixture()"], ["@glmjax.data.loader.CachedMixture", "'cache'"]),
  "feed_lib.DataSource | None": (
    ["@glmjax.data.loader.CachedMixture()", "None"],
    ["@glmjax.data.loader.CachedMixture", "[]"],
  ),
  "LearningRate | Constant | PiecewiseLinear | Joined | Product": (
    ["@glmjax.train.schedules.Constant()"],
    ["1e-3", "@glmjax.train.schedules.Batches()"],
  ),
  "Sequence[sampler.RateChange]": (
    ["[@glmjax.data.sampler.RateChange()]", "[]"],
    ["@glmjax.data.sampler.RateChange()", f"[{OF_CALLS}]", "[{'a': 1}]"],
  ),
  "Sequence[LearningRate | Constant | PiecewiseLinear | Joined | Product]": (
    ["[@glmjax.train.schedules.Constant()]"],
    ["@glmjax.train.schedules.Constant()", "[1e-3]", "[@glmjax.train.schedules.Constant]"],
  ),
}
# Classes of ours: what makes one, by name, and nothing else.
MADE = {
  "config_lib.GLMConfig": "models.config.GLMConfig",
  "schedules.Batches": "train.schedules.Batches",
  "optimizer_lib.AdamW | optimizer_lib.Muon": "train.optimizer.Muon",
  "AdamW": "train.optimizer.AdamW",
  "state_lib.DynamicLossScale": "train.state.DynamicLossScale",
  "Intervals": "train.loop.Intervals",
  "mesh_lib.MeshConfig": "parallel.mesh.MeshConfig",
  "pipeline_lib.PipelineConfig": "train.pipeline.PipelineConfig",
  "peers_lib.Watch": "parallel.peers.Watch",
  "programs.Train | programs.Decode": "plan.programs.Decode",
  "tokens_lib.SpecialTokens": "tokens.SpecialTokens",
  "Decoding": "cli.inference.Decoding",
  "Output": "cli.inference.Output",
  "Devices": "cli.inference.Devices",
  "inference.Devices": "cli.inference.Devices",
  "Drafting": "cli.inference.Drafting",
  "inference.Drafting": "cli.inference.Drafting",
  "Drawing": "cli.chat.Drawing",
  "Items": "cli.evaluation.Items",
  "Limits": "cli.serve.Limits",
  "grid_lib.Grid": "study.grid.Grid",
  "Settings": "study.run.Settings",
}


def signature_of(name: str) -> signatures.Signature:
  module = gin_types.module_of(name)
  return signatures.resolve(signatures.find_module(module), name.removeprefix(f"{module}.").split("."))


def named_functions() -> set[str]:
  """All that the commands call, that gin/ binds or refers to, and the classes that those take."""
  names = {*commands.targets()}
  for path in (ROOT / "gin").rglob("*.gin"):
    reader = gin_reader.Reader(gin_files.find)
    reader.read_file(path)
    values = [binding.value for binding in (*reader.bindings.values(), *reader.replaced)]
    names |= {binding.selector for binding in reader.bindings.values() if binding.selector}
    names |= {value.selector for value in gin_reader.flatten(values) if isinstance(value, gin_reader.Reference)}
  return names | {f"glmjax.{name}" for name in MADE.values()}


def parameters() -> list[tuple[str, str]]:
  """(full name, annotation) of every parameter."""
  return sorted(
    {
      (f"{name}.{parameter}", gin_types.parse(annotation).shown)
      for name in named_functions()
      for parameter, annotation in signature_of(name).parameters.items()
    }
  )


def cases(annotation: str) -> tuple[list[str], list[str]]:
  """Values that a parameter of that annotation takes, and values that it does not."""
  if annotation in MADE:
    right, wrong = [f"@glmjax.{MADE[annotation]}()"], [f"@glmjax.{MADE[annotation]}", f"[@glmjax.{MADE[annotation]}()]"]
  else:
    right, wrong = CASES[annotation]
  if annotation in (*SCALARS, *MADE):
    taken = (annotation, "int") if annotation == "float" else (annotation,)
    wrong = [*wrong, *(value for name, values in SCALARS.items() if name not in taken for value in values)]
    wrong += [value for value in OTHERS if value not in right]
  return right, wrong


def test_every_annotation_is_known_here():
  assert {annotation for _, annotation in parameters()} == {*CASES, *MADE}


@pytest.mark.parametrize("annotation", [*CASES, *MADE])
def test_right_and_wrong_values(annotation):
  """Directly, by a macro and in a file: one line with the place, the parameter, the type and the value."""
  right, wrong = cases(annotation)
  rng = random.Random(annotation)
  names = [name for name, found in parameters() if found == annotation]
  for name in rng.sample(names, min(len(names), 12)):
    for value in right:
      gin_files.check([], [f"{name}={value}"])
    for value in wrong:
      with pytest.raises(errors.InputError) as caught:
        gin_files.check([], [f"{name}={value}"])
      text = str(caught.value)
      assert text.startswith(f"--gin.{name}: ") and "\n" not in text and len(text) < 600, text
      assert name in text.removeprefix(f"--gin.{name}"), text
      said = ("is empty", "a bucket is named as", "glmjax knows", "NUL")
      assert " takes " in text and ", not " in text or any(words in text for words in said)


def test_the_place_is_the_macro_that_holds_the_value(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "x.gin").write_text(
    "from __gin__ import dynamic_registration\nfrom glmjax.tasks import pretrain\nfrom glmjax.cli import corpus\n"
    "FILES = 5\nALL = {'en': 'a', 'zh': %FILES}\n\npretrain.register.files = %ALL\n"
  )
  with pytest.raises(errors.InputError) as caught:
    gin_files.check(["x.gin"])
  assert str(caught.value) == (
    "x.gin:4: pretrain.register.files takes Mapping[str, path | Sequence[path]], not {'en': 'a', 'zh': %FILES} "
    "(a dict): 5 (an int) is not path | Sequence[path]"
  )


def test_advice():
  for value, advice in (("1e6", "write 1_000_000"), ("'3'", "write 3 without quotes"), ("2.5", None)):
    with pytest.raises(errors.InputError) as caught:
      gin_files.check([], [f"glmjax.models.config.GLMConfig.num_layers={value}"])
    assert str(caught.value).endswith(f"; {advice}" if advice else "(a float)")
  with pytest.raises(errors.InputError, match=r"write @glmjax.train.schedules.Constant\(\) for what it makes"):
    gin_files.check([], ["glmjax.train.loop.train.learning_rate=@glmjax.train.schedules.Constant"])
  with pytest.raises(errors.InputError, match="it makes SpecialTokens"):
    gin_files.check([], [f"glmjax.train.loop.train.learning_rate={OF_CALLS}"])


def test_the_command_says_it_before_anything_is_loaded():
  """In one process for all commands: a start costs more than the check."""
  wrong = [
    ("train", "train.loop.train.total_samples", "'x'"),
    ("tokenizer", "tokenizer.train.vocab_size", "[1]"),
    ("cache", "data.token_cache.cache_mixture.directory", "3"),
    ("score", "cli.inference.score.texts", "'a'"),
    ("generate", "cli.inference.Decoding.temperature", "'0'"),
    ("plan", "plan.planner.plan.target", "8"),
    ("evaluate", "evaluate.heldout.evaluate.cache", "''"),
    ("report", "evaluate.report.write.workdir", "{}"),
    ("export", "checkpoint.export.export.bits", "'4'"),
    ("chat", "cli.chat.Drawing.top_p", "True"),
    ("inspect", "thudm.inspection.inspect.hashes", "1"),
    ("weights", "study.weights.measure.max_tokens", "'x'"),
  ]
  code = f"""
import sys
from glmjax import cli
for name, parameter, value in {wrong!r}:
  arguments = [name, f"--gin.glmjax.{{parameter}}={{value}}"]
  arguments += ["--text=a"] * (name == "score") + ["--prompt=a"] * (name == "generate")
  arguments += ["x"] * (name in ("inspect", "weights"))
  assert cli.main(arguments) == 2, name
assert not {{"jax", "numpy", "tensorflow", "seqio"}} & set(sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  lines = done.stderr.splitlines()
  assert len(lines) == len(wrong)
  for line, (_, parameter, _) in zip(lines, wrong):
    assert line.startswith(f"glmjax: --gin.glmjax.{parameter}: glmjax.{parameter} "), line


def test_names_of_before_say_what_they_are_now(tmp_path, monkeypatch):
  """Gin files that were written when the cache took what seqio had registered."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.gin").write_text(
    'include "runs/quickstart.gin"\nfrom __gin__ import dynamic_registration\nfrom glmjax.tasks import pretrain\n'
    'pretrain.register.instructions = "pairs/"\n'
  )
  (tmp_path / "old.gin").write_text(
    "from __gin__ import dynamic_registration\nfrom glmjax.data import token_cache\nfrom glmjax.tasks import pretrain\n"
    'pretrain.register:\n  files = {"en": "en.txt"}\n  tokenizer = "tokenizer"\n'
    "token_cache.cache_mixture.mixture_name = @pretrain.register()\n"
  )
  mine = (tmp_path / "mine.gin").read_text()
  (tmp_path / "alias.gin").write_text(
    mine.replace("import pretrain", "import pretrain as p").replace("pretrain.register", "p.register")
  )
  (tmp_path / "seqio.gin").write_text(
    "from __gin__ import dynamic_registration\nfrom glmjax.data import token_cache\n"
    "token_cache.cache_mixture.mixture = @pretrain.register()\n"
  )
  (tmp_path / "uncached.gin").write_text(
    mine.replace("quickstart", "uncached").replace("from glmjax.tasks import pretrain", "")
  )
  full = "glmjax.tasks.pretrain.register.rates"
  override = "pretrain.register.instructions='pairs/'"
  for files, overrides, said in (
    (["mine.gin"], [], "mine.gin:4: nothing uses pretrain.register; did you mean mixtures.pretraining?"),
    (
      ["runs/quickstart.gin"],
      [override],
      f"--gin.{override.partition('=')[0]}: no import provides pretrain; did you mean",
    ),
    (["alias.gin"], [], "alias.gin:4: nothing uses p.register; did you mean mixtures.pretraining?"),
    (
      ["runs/quickstart.gin"],
      [f"{full}={{}}"],
      f"--gin.{full}: nothing uses glmjax.tasks.pretrain.register; did you mean mixtures.pretraining?",
    ),
    (["seqio.gin"], [], "seqio.gin:3: no import provides pretrain; import its module in the file"),
    (["uncached.gin"], [], "uncached.gin:4: no import provides pretrain; import its module in the file"),
    (["old.gin"], [], "old.gin:7: token_cache.cache_mixture has no parameter mixture_name; did you mean mixture?"),
  ):
    with pytest.raises(errors.InputError) as caught:
      gin_files.check(files, overrides, "glmjax.data.token_cache.cache_mixture", (), commands.targets())
    assert str(caught.value).startswith(said)


def test_a_mixture_without_its_tokenizer(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "mine.gin").write_text(
    "from __gin__ import dynamic_registration\nfrom glmjax.data import mixtures\nfrom glmjax.data import token_cache\n"
    'mixtures.pretraining.files = {"en": "en.txt"}\n'
    "token_cache.cache_mixture:\n  mixture = @mixtures.pretraining()\n  directory = 'cache'\n"
  )
  target = "glmjax.data.token_cache.cache_mixture"
  with pytest.raises(errors.InputError, match="^mine.gin:6: no value for tokenizer of mixtures.pretraining: bind "):
    gin_files.check(["mine.gin"], (), target, (), commands.targets())
  gin_files.check(["mine.gin"], ["mixtures.pretraining.tokenizer='folder'"], target, (), commands.targets())
  gin_files.check(["mine.gin"], [f"{target}.mixture='of_seqio'"], target, (), [target])  # as --mixture does

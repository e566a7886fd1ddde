"""One model over the devices of two real processes: answers of one process, written by the first, or one clear end."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest
import xla_flags

from glmjax import tokenizer as tokenizer_lib
from glmjax.checkpoint import folder as folder_lib
from glmjax.checkpoint import load
from glmjax.checkpoint import manager
from glmjax.cli import evaluation
from glmjax.data import builder
from glmjax.data import shards
from glmjax.evaluate import heldout
from glmjax.harness import results
from glmjax.infer import beam
from glmjax.infer import chat
from glmjax.infer import engine
from glmjax.infer import sampling
from glmjax.io import tokenizer_folder
from glmjax.models import config as config_lib
from glmjax.models import glm
from glmjax.models import params as params_lib
from glmjax.train import trainable
from parallel.multihost_test import free_port, own_lines

MAIN = [sys.executable, "-c", "import sys; from glmjax import cli; sys.exit(cli.main())"]
CONFIG = config_lib.GLMConfig(
  vocab_size=440, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=48, max_length=64, init_std=0.3
)
PROMPTS = ["the quick [MASK] fox [MASK] sleeps", "第3天，小河边的[MASK]发芽了", "On day 7"]
TEXT = [f"On day {i} the quick brown fox jumps over {i} lazy dogs. 第{i}天，小河边的柳树发芽了。" for i in range(60)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A run of an untrained model that has much to say."""
  run, tokenizer = tmp_path_factory.mktemp("model") / "run", tmp_path_factory.mktemp("tokenizer") / "tokenizer"
  tokenizer_lib.train(TEXT, tokenizer, vocab_size=CONFIG.vocab_size)
  write_run(run, tokenizer, 1)
  return run


def write_run(run: pathlib.Path, tokenizer: pathlib.Path, seed: int) -> None:
  described = tokenizer_folder.copy(tokenizer, run / folder_lib.TOKENIZER)
  folder_lib.write_config(run, folder_lib.FolderConfig(CONFIG, {}, described))
  saver = manager.Manager(run / "checkpoints")
  saver.save(1, {"params": glm.init_params(CONFIG, jax.random.key(seed)), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()


class Two:
  """A command in two processes of one device each."""

  def __init__(self, *arguments: str, devices: int = 1, own: Sequence[Sequence[str]] = ((), ())) -> None:
    """`own`: what each process is given besides."""
    port = free_port()
    environment = os.environ | {"XLA_FLAGS": xla_flags.on(devices), "JAX_PLATFORMS": "cpu"}
    join = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    self.processes = [
      subprocess.Popen(
        [*MAIN, *arguments, *join, f"--process_id={i}", *own[i]],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
      )
      for i in range(2)
    ]

  def __enter__(self) -> "Two":
    return self

  def __exit__(self, *error: object) -> None:
    for process in self.processes:
      process.kill()
      process.communicate()

  def results(self, typed: str = "", seconds: float = 240) -> list[tuple[int, str, str]]:
    """(status, standard output, standard error) of each; the first is given `typed`."""
    self.processes[0].stdin.write(typed)
    self.processes[0].stdin.close()
    self.processes[0].stdin = None
    ends, found = time.monotonic() + seconds, []
    for process in self.processes:
      out, err = process.communicate(timeout=max(1, ends - time.monotonic()))
      found.append((process.returncode, out, own_lines(err)))
    return found


def texts(folder: pathlib.Path, how: sampling.Sampling, seed: int) -> list[str]:
  """What one process with one device answers."""
  return [found.text for found in engine.Engine.load(folder).generate(PROMPTS, 6, how, seed)]


def prompts() -> str:
  return "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)


def test_the_first_reads_and_writes(folder):
  """Prompts come to it alone, by a pipe; the other is silent."""
  with Two("generate", f"--checkpoint={folder}", "--mesh=tensor=2", "--file=-", "--out=-", "--max_tokens=6") as two:
    (status, out, err), other = two.results(prompts())
  assert status == 0, err
  assert other == (0, "", "")
  assert [json.loads(line)["output"] for line in out.splitlines()] == texts(folder, sampling.Sampling(), 0)


def test_an_adapter_beside_the_model(folder, tmp_path):
  """Written by hand, of random factors that matter."""
  adapted = trainable.LoRA(rank=2).adapt(CONFIG)
  shapes = {path: param.shape for path, param in params_lib.table(adapted).items() if "/lora_" in path}
  own = {path: jax.random.normal(jax.random.key(len(path)), shape) * 0.3 for path, shape in shapes.items()}
  described = tokenizer_folder.copy(folder / folder_lib.TOKENIZER, tmp_path / folder_lib.TOKENIZER)
  base = {"folder": str(folder), "fingerprint": load.fingerprint(folder), "bits": None}
  folder_lib.write_config(tmp_path, folder_lib.FolderConfig(adapted, {}, described, base=base))
  saver = manager.Manager(tmp_path / "checkpoints")
  saver.save(1, {"params": params_lib.nest(own), "step": jnp.int32(1)}, {"samples_seen": 1})
  saver.close()
  flags = [f"--checkpoint={folder}", f"--adapter={tmp_path}", "--mesh=tensor=2,data=2", "--file=-", "--max_tokens=6"]
  with Two("generate", *flags, "--out=-", devices=2) as two:
    (status, out, err), other = two.results(prompts())
  assert status == 0, err
  assert other == (0, "", "")
  found = [json.loads(line)["output"] for line in out.splitlines()]
  expected = engine.Engine.load(folder, adapter=tmp_path).generate(PROMPTS, 6)
  assert found == [each.text for each in expected] != texts(folder, sampling.Sampling(), 0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, devices", [("data=2", 1), ("data=2,tensor=2", 2), ("fsdp=2", 1)])
def test_sampled_texts_are_those_of_one_process(folder, tmp_path, mesh, devices):
  """Into a file, of which a part is there already."""
  how, out = sampling.Sampling(1.0, 20, 0.9), tmp_path / "answers.jsonl"
  flags = [f"--checkpoint={folder}", f"--mesh={mesh}", "--file=-", f"--out={out}", "--max_tokens=6"]
  flags += ["--temperature=1", "--top_k=20", "--top_p=0.9", "--seed=3"]
  for _ in range(2):
    with Two("generate", *flags, devices=devices) as two:
      (status, _, err), other = two.results(prompts())
    assert status == 0, err
    assert other == (0, "", "")
    lines = out.read_text().splitlines(True)
    assert [json.loads(line)["output"] for line in lines] == texts(folder, how, 3)
    out.write_text("".join(lines[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "data=2"])
def test_scores_are_those_of_one_process(folder, mesh):
  rows = [{"text": TEXT[5]}, {"context": "On day [MASK].", "choices": ["7", "dogs", "第3天"]}]
  with Two("score", f"--checkpoint={folder}", f"--mesh={mesh}", "--file=-", "--json") as two:
    (status, out, err), other = two.results("".join(json.dumps(row) + "\n" for row in rows))
  assert status == 0, err
  assert other == (0, "", "")
  model, found = engine.Engine.load(folder), json.loads(out)
  assert found[0]["log_likelihood"] == pytest.approx(model.score([TEXT[5]])[0].total, abs=1e-3)
  [choices] = model.score_choices([rows[1]["context"]], [rows[1]["choices"]])
  assert found[1]["log_likelihoods"] == pytest.approx([each.total for each in choices.scores], abs=1e-3)


@pytest.mark.slow
def test_beams_are_those_of_one_process(folder):
  flags = [f"--checkpoint={folder}", "--mesh=tensor=2", "--file=-", "--num_beams=3", "--max_tokens=6", "--json"]
  with Two("generate", *flags) as two:
    (status, out, err), _ = two.results(prompts())
  assert status == 0, err
  assert [each["output"] for each in json.loads(out)] == texts(folder, beam.BeamSearch(3), 0)


@pytest.mark.slow
def test_evaluation_is_that_of_one_process(folder, tmp_path):
  """Both read the cache; the first writes."""
  tokenizer = tokenizer_lib.Tokenizer.load(folder / folder_lib.TOKENIZER)
  about = {"fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
  about["specials"] = dataclasses.asdict(tokenizer.specials)
  splits = {split: {"source": "test"} for split in ("train", "validation")}
  tasks = {"pretrain_en": {"kind": "text", "rate": 1.0, "splits": splits}}
  with builder.CacheBuilder(tmp_path / "cache", builder.make_plan("test", 1, about, tasks)) as making:
    for shard in making.missing():
      documents = [shards.Document(tokenizer.encode(text), len(text.encode())) for text in TEXT]
      builder.write_shard(making.partial, shard, documents, tokenizer.vocab_size)
    cache = making.finish(folder / folder_lib.TOKENIZER)
  out = tmp_path / "figures.json"
  flags = [f"--checkpoint={folder}", f"--cache={cache.directory}", f"--out={out}", "--mesh=data=2"]
  with Two("evaluate", *flags, "--gin.glmjax.evaluate.heldout.evaluate.max_fills=20") as two:
    (status, _, err), other = two.results()
  assert status == 0, err
  assert other == (0, "", "")
  alone = heldout.evaluate(folder, cache.directory, max_fills=20)["en"]
  assert json.loads(out.read_text())["en"] == pytest.approx(alone, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "data=2"])
def test_tasks_are_put_as_in_one_process(folder, tmp_path, mesh):
  """Choices share the reading of their contexts; the first alone has the records, of which some are there already."""
  questions = [
    {"inputs_pretokenized": text[:20], "choices_pretokenized": ["7", "dogs", "柳树"], "label": i % 3}
    for i, text in enumerate(TEXT[:9])
  ]
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "a.jsonl").write_text("".join(f"{json.dumps(question)}\n" for question in questions))
  task, out = tmp_path / "task.yaml", tmp_path / "out"
  task.write_text("name: a\ntype: mul\npath: .\n")
  flags = [f"--checkpoint={folder}", f"--tasks={task}", f"--data={tmp_path / 'data'}"]
  alone = evaluation.evaluate(folder, [task], tmp_path / "data", tmp_path / "alone")
  wanted = {results.key(record): record["scores"] for record in results.read(tmp_path / "alone")[1]}
  for _ in range(2):
    with Two("evaluate", *flags, f"--out={out}", f"--mesh={mesh}", "--json") as two:
      (status, said, err), other = two.results()
    assert status == 0, err
    assert other == (0, "", "")
    assert json.loads(said)["tasks"]["a"]["figures"] == alone["tasks"]["a"]["figures"]
    found = {results.key(record): record["scores"] for record in results.read(out)[1]}
    assert found.keys() == wanted.keys()
    for key, scores in wanted.items():
      assert found[key] == pytest.approx(scores, abs=1e-3)
    lines = (out / results.ITEMS).read_bytes().splitlines(True)
    (out / results.ITEMS).write_bytes(b"".join(lines[:4]))


def test_a_mistake_of_the_first_ends_both(folder):
  """Which alone reads the prompts: a line that is no prompt."""
  with Two("generate", f"--checkpoint={folder}", "--mesh=tensor=2", "--file=-") as two:
    (status, out, err), (other, nothing, said) = two.results('{"prompt": 1}\n')
  assert (status, other) == (2, 2) and not out and not nothing
  assert err.startswith("glmjax: standard input: line 1") and err.count("\n") == 1
  assert said.startswith("glmjax: process 0 has ended: standard input: line 1") and said.count("\n") == 1


@pytest.mark.slow
def test_mistakes_that_all_find(folder, tmp_path):
  """A mesh that is not all devices, a prompt that is too long, another model on one of the hosts."""
  flags = [f"--checkpoint={folder}", "--prompt=On day 7"]
  other = tmp_path / "other"
  write_run(other, folder / folder_lib.TOKENIZER, 2)
  for arguments, own, words in (
    ([*flags, "--mesh=tensor=4"], ((), ()), "needs 4 devices, here are 2"),
    ([*flags[:1], "--mesh=tensor=2", f"--prompt={TEXT[3] * 10}"], ((), ()), "prompt 1 of 1: a prompt takes"),
    (flags[1:] + ["--mesh=tensor=2"], ([flags[0]], [f"--checkpoint={other}"]), "process 1 has another one than"),
    ([*flags, "--mesh=tensor=2"], ((), ["--top_k=3"]), "how blanks are filled: process 1 has another one than"),
    (
      flags,
      (["--mesh=tensor=2"], ["--mesh=data=2"]),
      "--mesh, --offload_layers, how numbers are kept, --adapter, --drafts and --draft_model: process 1",
    ),
  ):
    with Two("generate", *arguments, own=own) as two:
      for status, out, err in two.results():
        assert status == 2 and not out and words in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_a_conversation(folder, tmp_path):
  """As in one process: questions that do not fit and commands leave all where they were together."""
  session, saved = chat.Session(engine.Engine.load(folder), seed=5), tmp_path / "talk.json"
  questions = ["On day 7", TEXT[0] * 10, f"/save {saved}", "/clear", "/nonsense", "第3天", "the fox"]
  with Two("chat", f"--checkpoint={folder}", "--mesh=tensor=2", "--seed=5", "--json") as two:
    (status, out, err), other = two.results("".join(f"{question}\n" for question in questions))
  assert status == 0 and "a prompt takes" in err and "no command /nonsense" in err, err
  assert other == (0, "", "")
  assert json.loads(saved.read_text())["history"] == [["On day 7", "".join(session.ask("On day 7"))]]
  session.clear()
  assert json.loads(out) == [{"query": each, "reply": "".join(session.ask(each))} for each in questions[-2:]]


def answer(two: Two) -> None:
  """Has the first process answer a question; it then waits for the next."""
  two.processes[0].stdin.write("On day 7\n")
  two.processes[0].stdin.flush()
  while not two.processes[0].stdout.readline():
    assert two.processes[0].poll() is None


@pytest.mark.slow
@pytest.mark.parametrize(
  "victim, number, status, words",
  [
    (1, signal.SIGKILL, 1, "process 1 on .* has not been heard of for"),
    (0, signal.SIGKILL, None, "process 0 has died|JAX distributed service"),
    (1, signal.SIGSTOP, 1, "process 1 on .* has not been heard of for"),
    (1, signal.SIGTERM, 143, "process 1 has ended: stopped by SIGTERM"),
    (0, signal.SIGTERM, 143, "process 0 has ended: stopped by SIGTERM"),
  ],
)
def test_one_goes_and_the_other_ends(folder, victim, number, status, words):
  """While the first waits for a question: nothing but the watch can tell."""
  with Two("chat", f"--checkpoint={folder}", "--mesh=tensor=2") as two:
    answer(two)
    began = time.monotonic()
    two.processes[victim].send_signal(number)
    left = two.processes[1 - victim]
    left.wait(90)
    said = own_lines(left.stderr.read())
    assert time.monotonic() - began < 60
  assert left.returncode == status or status is None and left.returncode != 0
  assert re.search(words, said), said
  if status is not None:
    [line] = [line for line in said.splitlines() if not line.startswith("(cut off")]
    assert line.startswith("glmjax: ")

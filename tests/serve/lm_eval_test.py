"""lm_eval against a running server, and in one process with a model: log-likelihoods, rolling ones and generated texts
are those of the engine."""

import json
import os
import pathlib
import subprocess
import sysconfig

import numpy as np
import pytest
from serve import clients
from serve import running as running_lib

import glmjax
from glmjax.infer import sampling

QUESTIONS = [
  {"question": f"On day {i} the quick", "choices": ["brown fox", "柳树发芽了", "x"], "answer": i % 3} for i in range(6)
]
TEXTS = [{"text": f"On day {i} the quick brown fox jumps over {i} lazy dogs." * (1 + i)} for i in range(4)]
STARTS = [{"start": f"第{i}天，小河边的"} for i in range(5)]
LENGTH = 253  # the model's 256 less what is put around a prompt
TASKS = {
  "choosing": (
    QUESTIONS,
    {
      "output_type": "multiple_choice",
      "doc_to_text": "{{question}}",
      "doc_to_choice": "choices",
      "doc_to_target": "answer",
      "metric_list": [{"metric": "acc"}],
    },
  ),
  "rolling": (
    TEXTS,
    {
      "output_type": "loglikelihood_rolling",
      "doc_to_text": "",
      "doc_to_target": "{{text}}",
      "metric_list": [{"metric": "byte_perplexity"}],
    },
  ),
  "writing": (
    STARTS,
    {
      "output_type": "generate_until",
      "doc_to_text": "{{start}}",
      "doc_to_target": "fox",
      "generation_kwargs": {"until": ["fox"], "max_gen_toks": 12, "do_sample": False},
      "metric_list": [{"metric": "exact_match"}],
    },
  ),
}


ROOT = pathlib.Path(glmjax.__file__).parent.parent


@pytest.fixture(scope="module", params=["server", "in process"])
def evaluated(request, untrained, folder, tmp_path_factory):
  """The model's engine, and of each task's documents what lm_eval was answered."""
  clients.needs("lm_eval")
  model = folder
  folder = tmp_path_factory.mktemp("lm_eval")
  for name, (rows, settings) in TASKS.items():
    data = folder / f"{name}.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **files, **settings}), encoding="utf-8")

  def run(module: str, *arguments: str) -> None:
    command = [clients.PYTHON, "-m", module, *arguments, "--tasks", ",".join(TASKS), "--include_path", folder]
    command += ["--output_path", folder / "out", "--log_samples"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])  # glmjax and JAX are there
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

  if request.param == "in process":
    run("glmjax.harness.lm_eval", "--model", "glmjax", "--model_args", f"checkpoint={model}")
  else:
    with running_lib.Running(untrained) as running:
      arguments = f"model=letters,base_url={running.address}/v1/completions,num_concurrent=4,max_length={LENGTH}"
      run("lm_eval", "--model", "local-completions", "--model_args", f"{arguments},tokenizer_backend=remote")
      running.idle()
  return untrained, {name: answers(folder / "out", name) for name in TASKS}


def answers(folder: pathlib.Path, task: str) -> list:
  [file] = folder.rglob(f"samples_{task}_*.jsonl")
  rows = sorted(map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
  return [row["resps"] for row in rows]


@pytest.mark.slow
def test_choices(evaluated):
  engine, found = evaluated
  for row, told in zip(QUESTIONS, found["choosing"], strict=True):
    for choice, [[logprob, greedy]] in zip(row["choices"], told, strict=True):
      [score] = engine.score([f"{row['question']} {choice}"])
      first = len(engine.tokenizer.encode(row["question"]))
      assert abs(float(logprob) - score.log_probs[first:].sum()) < 1e-3
      assert (str(greedy) == "True") == bool(score.correct[first:].all())


@pytest.mark.slow
def test_rolling(evaluated):
  engine, found = evaluated
  totals = [engine.score([row["text"]]).pop() for row in TEXTS]
  assert sum(total.count + 1 < LENGTH for total in totals) >= 3
  for total, [[told]] in zip(totals, found["rolling"], strict=True):
    if total.count + 1 < LENGTH:  # in one window
      np.testing.assert_allclose(float(told[0] if isinstance(told, list) else told), total.total, rtol=1e-5)


@pytest.mark.slow
def test_generated_texts(evaluated):
  engine, found = evaluated
  for row, [[told]] in zip(STARTS, found["writing"], strict=True):
    [expected] = engine.generate([row["start"]], 12, sampling.Sampling(temperature=0.0))
    assert told == expected.pieces[0].split("fox")[0]

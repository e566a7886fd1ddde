"""Adapters behind one server: requests name one as their model, and are answered together."""

import concurrent.futures
import json
import urllib.request
from collections.abc import Iterator

import pytest
import untrained_adapters
from serve import running as running_lib

from glmjax import errors
from glmjax.cli import inference
from glmjax.cli import serve
from glmjax.infer import engine
from glmjax.infer import sampling
from glmjax.infer import scheduler
from glmjax.serve import app

NAMES = (None, *untrained_adapters.LORA)
PROMPTS = ["On day 7", "the quick brown", "第3天", "over 5"]


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
  return untrained_adapters.write(folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def running(folder, folders) -> Iterator[running_lib.Running]:
  with running_lib.Running(engine.Engine.load(folder, adapter=folders)) as running:
    yield running


def test_models_are_the_model_and_its_adapters(running):
  listed = json.loads(running.get("/v1/models")[1])["data"]
  assert [(each["id"], each.get("parent")) for each in listed] == [
    ("letters", None), *((name, "letters") for name in untrained_adapters.LORA)
  ]  # fmt: skip
  assert json.loads(running.get("/v1/models/mlp")[1]) == listed[-1]
  for answer in (running.post("/v1/completions", {"model": "x", "prompt": "a"}), running.get("/v1/models/x")):
    assert answer[0] == 404 and "there is no model 'x' here: there are 'letters', 'wide'" in str(answer[1]).replace(
      "\\'", "'"
    )


def test_each_request_has_its_own(running):
  ask, model = running.server.engine, {None: "letters"}

  def post(name: str | None, i: int) -> dict:
    body = {"model": model.get(name, name), "prompt": PROMPTS[i], "max_tokens": 9, "seed": i, "temperature": 1.5}
    return running.post("/v1/completions", body)[1]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = [pool.submit(post, name, i) for name in NAMES for i in range(4)]
  expected = [
    text for name in NAMES for text in ask.generate(PROMPTS, 9, sampling.Sampling(temperature=1.5), adapter=name)
  ]
  assert [each.result()["choices"][0]["text"] for each in found] == [each.pieces[0] for each in expected]
  assert [each.result()["model"] for each in found[::4]] == ["letters", *untrained_adapters.LORA]
  messages, chats = [{"role": "user", "content": "On day"}], []
  for name in ("letters", "wide", "mlp"):
    body = {"model": name, "messages": messages, "seed": 1, "max_tokens": 9, "temperature": 1.5}
    chats.append(running.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"])
  assert len({*chats}) == 3
  filled = running.post("/v1/fill", {"model": "wide", "text": "On [MASK] 7", "max_tokens": 5, "temperature": 0})[1]
  assert filled["choices"][0]["text"] == ask.fill("On [MASK] 7", 5, adapter="wide").text


def test_prompts_are_scored_with_it(running):
  ask, told = running.server.engine, []
  for name in ("letters", "wide"):
    body = {"model": name, "prompt": "On day 7", "max_tokens": 0, "echo": True, "logprobs": 0}
    told.append(running.post("/v1/completions", body)[1]["choices"][0]["logprobs"]["token_logprobs"][1:])
  [expected] = ask.score(["On day 7"], adapter="wide")
  assert told[1] == pytest.approx(expected.log_probs[1:].tolist(), abs=1e-4) and told[0] != told[1]


def test_an_adapter_is_not_called_as_the_model(running):
  with pytest.raises(errors.InputError, match="an adapter and the model are both called 'wide'"):
    app.Server(running.server.engine, "wide", scheduler.Capacity(4))


def test_the_command_says_so_before_it_loads_anything(folder, tmp_path):
  assert folder.name == "run"
  devices = inference.Devices(adapter=[f"{name}={tmp_path / 'none'}" for name in ("run", "mlp")])
  for more, name in (({}, "run"), ({"name": "mlp"}, "mlp")):
    with pytest.raises(errors.InputError, match=f"an adapter and the model are both called '{name}'"):
      serve.serve(folder, devices=devices, **more)


def test_the_command(folder, folders):
  flags = [f"--adapter={name}={folders[name]}" for name in ("wide", "mlp")]
  with running_lib.started(folder, "--lanes=2", "--requests=2", *flags) as (_, address, said):
    body = json.dumps({"model": "mlp", "prompt": "On", "max_tokens": 2}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
      assert json.loads(answer.read())["model"] == "mlp"
    assert "models to ask for: run, wide, mlp" in "".join(said)

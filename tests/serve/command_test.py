"""`glmjax serve` as a process: it says where it is, answers, and ends when told to, not before its answers have."""

import contextlib
import json
import signal
import threading
import urllib.error
import urllib.request

import pytest
from serve import running as running_lib

from glmjax import cli


def post(address: str, **body) -> urllib.request.Request:
  return urllib.request.Request(
    f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
  )


def ask(address: str, **body) -> tuple[int, dict]:
  try:
    with urllib.request.urlopen(post(address, **body), timeout=60) as answer:
      return answer.status, json.loads(answer.read())
  except urllib.error.HTTPError as error:
    return error.code, json.loads(error.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_lets_answers_end(folder, number):
  with running_lib.started(folder, "--lanes=2", "--requests=2") as (process, address, said):
    status, short = ask(address, prompt="On", max_tokens=2)
    assert status == 200 and short["model"] == "run"
    long = {"max_tokens": 200, "min_tokens": 200, "seed": 1, "stream": True, "stream_options": {"include_usage": True}}
    with urllib.request.urlopen(post(address, prompt="On day 7", **long), timeout=60) as answer:
      assert answer.readline().startswith(b"data: ")  # it has begun
      process.send_signal(number)
      events = [line.removeprefix(b"data: ").strip() for line in answer if line.startswith(b"data: ")]
    assert events[-1] == b"[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] == 200
    assert process.wait(60) == 0 and "Traceback" not in "".join(said), said


def test_ends_though_an_answer_does_not(folder):
  """Once its time is over, with a line about it, whatever the model's thread is at."""
  with running_lib.started(folder, "--lanes=2", "--requests=2", "--drain_seconds=0") as (process, address, said):
    whole = {"prompt": "On day 7", "max_tokens": 200, "min_tokens": 200}

    def ask_again_and_again() -> None:  # eight at once, so that some wait whenever the signal comes
      with contextlib.suppress(OSError):
        while ask(address, **whole)[0] == 200:
          pass

    threads = [threading.Thread(target=ask_again_and_again) for _ in range(8)]
    for thread in threads:
      thread.start()
    assert ask(address, prompt="On", max_tokens=1)[0] == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, said
    for thread in threads:
      thread.join()
  assert "had not ended" in "".join(said) and "Traceback" not in "".join(said), said


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--host=256.1.1.1"], "nothing can listen at 256.1.1.1"),
    (["--api_keys=missing"], "--api_keys: cannot read missing"),
    (["--port=70000"], "--port"),
  ],
)
def test_mistakes_are_one_line(folder, flags, words, capsys):
  assert cli.main(["serve", f"--checkpoint={folder}", *flags]) == 2
  assert words in capsys.readouterr().err

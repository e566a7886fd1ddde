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


def ask(address: str, **body) -> tuple[int, dict]:
  request = urllib.request.Request(
    f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
  )
  try:
    with urllib.request.urlopen(request, timeout=60) as answer:
      return answer.status, json.loads(answer.read())
  except urllib.error.HTTPError as error:
    return error.code, json.loads(error.read())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_a_signal_and_lets_answers_end(folder, number):
  with running_lib.started(folder, "--lanes=2", "--requests=2") as (process, address, said):
    answers = []
    whole = {"prompt": "On day 7", "max_tokens": 200, "min_tokens": 200, "seed": 1}
    thread = threading.Thread(target=lambda: answers.append(ask(address, **whole)))
    thread.start()
    status, short = ask(address, prompt="On", max_tokens=2)
    assert status == 200 and short["model"] == "run"
    process.send_signal(number)
    thread.join(60)
    assert answers[0][0] == 200 and answers[0][1]["usage"]["completion_tokens"] == 200
    assert process.wait(60) == 0 and "Traceback" not in "".join(said), said


def test_ends_though_an_answer_does_not(folder):
  """Once its time is over, with a line about it, whatever the model's thread is at."""
  with running_lib.started(folder, "--lanes=2", "--requests=2", "--drain_seconds=0") as (process, address, said):
    whole = {"prompt": "On day 7", "max_tokens": 200, "min_tokens": 200}

    def give_up() -> None:
      with contextlib.suppress(OSError):
        ask(address, **whole)

    threads = [threading.Thread(target=give_up) for _ in range(8)]
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

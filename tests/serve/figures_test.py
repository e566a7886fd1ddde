"""What a server tells of itself: figures for Prometheus, and a line in the log for each request."""

import logging
import re

import pytest
from serve import running as running_lib

SECRET = "abracadabra"


def figures(running) -> dict[str, float]:
  status, text = running.get("/metrics")
  assert status == 200
  lines = [line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#")]
  return {name: float(value) for name, value in lines}


def test_health_and_figures():
  with running_lib.Running() as running:
    assert running.get("/health")[0] == 200
    assert running.get("/ready")[0] == 503  # nobody has warmed this one
    assert figures(running)["glmjax_running"] == 0
    status, answer = running.post("/v1/completions", {"prompt": "a", "max_tokens": 9, "min_tokens": 9, "n": 3})
    assert status == 200 and answer["usage"]["completion_tokens"] == 27
    running.idle()
    found = figures(running)
    assert found["glmjax_new_tokens_total"] == 27 and found["glmjax_prompt_tokens_total"] == 1
    assert found["glmjax_first_token_seconds_count"] == 3 and 0 < found["glmjax_next_token_seconds_count"] <= 24
    assert 1 < found["glmjax_batch_size_count"] <= found["glmjax_batch_size_sum"] <= 27
    assert found["glmjax_waiting"] == found["glmjax_running"] == 0 < found["glmjax_context_bytes"]
    bias = {str(running_lib.Letters.specials.eop): 100}
    status, answer = running.post("/v1/completions", {"prompt": "a", "max_tokens": 9, "logit_bias": bias})
    assert status == 200 and answer["usage"]["completion_tokens"] == 0
    assert figures(running)["glmjax_new_tokens_total"] == 27  # what ends an answer is none of it


def test_what_is_refused_does_not_count():
  with running_lib.Running(most_waiting=0) as running:
    assert running.post("/v1/completions", {"prompt": "a"})[0] == 503
    assert figures(running)["glmjax_prompt_tokens_total"] == 0


@pytest.mark.parametrize("prompts", [False, True])
def test_a_line_in_the_log_has_the_prompt_only_where_it_is_asked_for(prompts, caplog):
  caplog.set_level(logging.INFO, "glmjax")
  with running_lib.Running(log_prompts=prompts) as running:
    running.post("/v1/completions", {"prompt": SECRET, "max_tokens": 3, "min_tokens": 3})
    running.post("/v1/completions", {"prompt": SECRET, "max_tokens": -1})
    running.post("/v1/fill", b"x" * 30_000)
    running.get("/none?a=%0a%1b[31m")
    running.get("/health")
  lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith(("POST", "GET"))]
  patterns = (
    r"POST /v1/completions 200 11\+3 tokens \d+\.\d{3} s",
    r"POST /v1/completions 400 0\+0 tokens .*",
    r"POST /v1/fill 413 0\+0 tokens .*",
    r"GET /none 404 .*",
  )
  assert len(lines) == len(patterns)
  for line, pattern in zip(lines, patterns):
    assert re.match(pattern, line) and line.isprintable()
  assert sum(SECRET in record.getMessage() for record in caplog.records) == (2 if prompts else 0)

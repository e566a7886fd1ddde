"""Halves of surrogate pairs, which JSON can write and UTF-8 cannot: in every place of a request they end in words."""

import pytest
from serve import running as running_lib

HALF = "\\ud800"


@pytest.fixture(scope="module")
def running(untrained):
  with running_lib.Running(untrained) as running:
    yield running


@pytest.mark.parametrize(
  "path, body",
  [
    ("/v1/completions", '{"prompt": "HALF", "echo": true, "logprobs": 1}'),
    ("/v1/completions", '{"prompt": "a", "HALF": 1}'),
    ("/v1/completions", '{"prompt": "a", "model": "HALF"}'),
    ("/v1/completions", '{"prompt": "a", "logit_bias": {"HALF": 1}}'),
    ("/v1/completions", '{"prompt": "a", "logit_bias": {"HALF": "x"}}'),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "HALF"}]}'),
    ("/v1/chat/completions", '{"messages": [{"role": "HALF", "content": "a"}]}'),
    ("/v1/fill", '{"text": "a[MASK]HALF"}'),
    ("/v1/fill", '{"text": "HALF"}'),
    ("/tokenize", '{"prompt": "HALF"}'),
    ("/tokenize", '{"prompt": "HALF", "add_special_tokens": true}'),
  ],
)
def test_half_a_surrogate_pair_is_told(running, path, body):
  status, answer = running.post(path, body.replace("HALF", HALF).encode())
  assert 400 <= status < 500 and answer["error"]["message"]

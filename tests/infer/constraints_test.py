"""Constraints of the next token against a plain reading of what they say."""

import jax.numpy as jnp
import numpy as np

from glmjax.infer import constraints
from glmjax.infer import decode
from glmjax.infer import prompt
from glmjax.infer import sampling

VOCAB, STOPS, PLACES = 11, (3, 7), 12


def expected(logits: np.ndarray, prompt_tokens: list[int], new: list[int], how: sampling.Sampling) -> np.ndarray:
  logits = logits.copy()
  for token in {*prompt_tokens, *new} - {*STOPS}:
    logits[token] *= 1 / how.repetition_penalty if logits[token] > 0 else how.repetition_penalty
  n, text = how.no_repeat_ngram, [*prompt_tokens, *new]
  for i in range(len(prompt_tokens), len(text)) if n else ():
    if i + 1 >= n and text[i + 1 - n : i] == text[len(text) + 1 - n :]:
      logits[text[i]] = sampling.FILTERED
  if len(new) < how.min_tokens:
    logits[list(STOPS)] = sampling.FILTERED
  return logits


def test_constraints_of_a_batch():
  rng = np.random.default_rng(0)
  few = [
    sampling.Sampling(),
    sampling.Sampling(no_repeat_ngram=2),
    sampling.Sampling(no_repeat_ngram=4),
    sampling.Sampling(min_tokens=5),
    sampling.Sampling(repetition_penalty=1.7),
    sampling.Sampling(min_tokens=3, no_repeat_ngram=3, repetition_penalty=0.6),
  ]
  longer = [*few[:-1], sampling.Sampling(no_repeat_ngram=9)]
  banned = 0
  for hows in [few, few, longer] * 20:
    prompts = [rng.integers(0, 4, rng.integers(1, 9)).tolist() for _ in hows]
    made = constraints.make([prompt.Prompt(tokens, None, 0, (0, 0)) for tokens in prompts], hows, 8, VOCAB)
    step = int(rng.integers(0, PLACES))
    generated = np.full((8, PLACES), decode.UNUSED, np.int32)
    generated[:, :step] = rng.integers(0, 4, (8, step))
    logits = rng.normal(size=(8, VOCAB)).astype(np.float32)
    found = np.asarray(
      constraints.apply(
        made,
        jnp.asarray(logits),
        jnp.asarray(generated),
        jnp.full(8, step),
        jnp.isin(jnp.arange(VOCAB), jnp.array(STOPS)),
      )
    )
    for row, how in enumerate(hows):
      wanted = expected(logits[row], prompts[row], generated[row, :step].tolist(), how)
      np.testing.assert_allclose(found[row], wanted, rtol=1e-6)
      banned += int((wanted == sampling.FILTERED).sum())
    np.testing.assert_array_equal(found[6:], logits[6:])  # rows that only fill the batch
  assert banned > 100


def test_none_where_nothing_is_asked_for():
  assert constraints.make([prompt.Prompt([1], None, 0, (0, 0))], [sampling.Sampling(0.5, 3, 0.9)], 1, VOCAB) is None


def test_the_last_tokens_of_a_prompt_that_is_shorter_than_the_n_gram():
  made = constraints.make([prompt.Prompt([4, 5, 6], None, 0, (0, 0))], [sampling.Sampling(no_repeat_ngram=5)], 1, VOCAB)
  np.testing.assert_array_equal(made.tail_BN, [[-1] * 60 + [4, 5, 6]])

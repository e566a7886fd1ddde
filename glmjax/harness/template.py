"""Prompts: how a data set's record becomes a question, as a task's YAML writes it.

  prompt:
    head: "Questions about {subject}.\\n\\n"  # once, before all examples
    inputs: "{passage}\\nQuestion: {question}?\\nAnswer:"
    choices: ["No", "Yes"]      # or "{options}", a field that holds a list
    label: "{label}"            # the number of the right one, its letter, its text, or one of `labels`
    labels: ["false", "true"]   # what the field holds for each choice, in their order
    targets: ["{answer}"]       # of tasks that generate; or "{answers}"

[MASK] in `inputs` is the blank to fill where that is not the end, once at most; in a data set's own text it is text. A
field may lie within others ({answers.text}, {options.0}). What a prompt takes from a record is all that a template can
reach: no attribute, no call.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
import string
from typing import Any

from glmjax import errors

_FIELD = re.compile(r"\{([^{}]*)\}")
_WHOLE = re.compile(r"\{([^{}]+)\}")
BLANK = "[MASK]"
_KINDS = {  # of what YAML holds for each
  "head": (str,),
  "inputs": (str,),
  "choices": (str, list),
  "label": (str,),
  "labels": (list,),
  "targets": (str, list),
}
_IDS = ("inputs", "choices", "targets")  # what these names mean in a question; a data set may have texts by them


@dataclasses.dataclass(frozen=True)
class Prompt:
  """The templates of one task."""

  inputs: str
  choices: str | tuple[str, ...] | None = None
  label: str | None = None
  labels: tuple[str, ...] | None = None
  targets: str | tuple[str, ...] | None = None
  head: str = ""

  @classmethod
  def of(cls, value: Mapping[str, Any]) -> "Prompt":
    """Returns what a task's `prompt` says.

    Raises:
      errors.InputError: for keys that there are not, and values that are no text.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted({*map(str, value)} - {*names}):
      raise errors.InputError(f"prompt has no key {unknown[0]!r}: {', '.join(names)}")
    value = {str(name): each for name, each in value.items() if each is not None}
    if "inputs" not in value:
      raise errors.InputError("prompt has no inputs")
    for name, each in value.items():
      if not isinstance(each, _KINDS[name]):
        kinds = " and no ".join({str: "text", list: "list"}[kind] for kind in _KINDS[name])
        raise errors.InputError(f"prompt's {name} is no {kinds}")
    if value["inputs"].count(BLANK) > 1:
      raise errors.InputError(f"prompt has more than one {BLANK} in inputs: one is filled")
    return cls(**{name: tuple(map(str, each)) if isinstance(each, list) else each for name, each in value.items()})

  def fill(self, record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns a record as the harness asks it: inputs, and choices with the right one's number, or targets.

    Inputs are a text, or where the template has a blank two, before it and behind it.

    Raises:
      errors.InputError: for a field that the record lacks, and a label that is none of the choices'.
    """
    inputs = [_filled(text, record, where) for text in self.inputs.split(BLANK)]
    found: dict[str, Any] = {name: value for name, value in record.items() if name not in _IDS}
    found["inputs_pretokenized"] = inputs if len(inputs) > 1 else inputs[0]
    for name in ("choices", "targets"):
      if (template := getattr(self, name)) is not None:
        found[f"{name}_pretokenized"] = _listed(template, record, where)
    if self.label is not None:
      choices = found.get("choices_pretokenized")
      if not isinstance(choices, list):
        raise errors.InputError(f"{where}: a label, and no list of choices")
      found["label"] = self._number(_value(self.label, record, where), [str(each) for each in choices], where)
    return found

  def head_of(self, record: Mapping[str, Any], where: str) -> str:
    """Returns what stands before a question and its examples.

    Raises:
      errors.InputError: for a field that the record lacks.
    """
    return _filled(self.head, record, where)

  def _number(self, value: Any, choices: Sequence[str], where: str) -> int:
    """Returns the number of the right choice."""
    if isinstance(value, int) and not isinstance(value, bool) and self.labels is None:
      return value
    text = str(value).strip()
    if self.labels is not None:
      if text in self.labels:
        return self.labels.index(text)
    elif text in choices:
      return choices.index(text)
    elif text.isdecimal():
      return int(text)
    elif len(text) == 1 and text in string.ascii_letters:
      return string.ascii_letters.index(text.lower())
    known = self.labels or choices
    raise errors.InputError(f"{where}: the label {text[:40]!r} is none of {', '.join(known)[:200]}")


def _value(template: str, record: Mapping[str, Any], where: str) -> Any:
  """Returns the field that a template is as a whole, or its text."""
  match = _WHOLE.fullmatch(template)
  return _field(match[1], record, where) if match else _filled(template, record, where)


def _listed(template: str | Sequence[str], record: Mapping[str, Any], where: str) -> list[str]:
  """Returns a list of texts: each template's, or what the field holds that is named."""
  if not isinstance(template, str):
    return [_filled(each, record, where) for each in template]
  value = _value(template, record, where)
  return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _filled(template: str, record: Mapping[str, Any], where: str) -> str:
  return _FIELD.sub(lambda match: str(_field(match[1], record, where)), template)


def _field(name: str, record: Mapping[str, Any], where: str) -> Any:
  value: Any = record
  for part in name.split("."):
    if isinstance(value, Mapping) and part in value:
      value = value[part]
    elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
      value = value[int(part)]
    else:
      raise errors.InputError(f"{where}: no field {name!r}; the record has {', '.join(map(str, record))[:200]}")
  return value

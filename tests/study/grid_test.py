"""The grid of a study: its points, their names, what gin is to bind, and mistakes in a line."""

import pytest

from glmjax import errors
from glmjax.study import grid as grid_lib

AXES = {
  "norm": {"Pre-LN": {"NORM": "pre"}, "with embedding norm": {"NORM": "pre", "config.GLMConfig.embedding_norm": True}},
  "RATE": [1e-3, 1e-2],
  "SEED": [0, 1, 2],
}


def grid(axes=None, over="RATE", repeats="SEED"):
  return grid_lib.Grid(AXES if axes is None else axes, over, repeats)


def test_every_choice_is_a_point_and_repeats_come_last():
  points = list(grid().points())
  assert len(points) == len(grid()) == 12
  assert len({point.name for point in points}) == 12
  assert [point.labels["SEED"] for point in points] == [0] * 4 + [1] * 4 + [2] * 4
  assert all([*point.labels] == [*AXES] for point in points)


def test_bindings_are_ginlike_python():
  point = next(point for point in grid().points() if point.labels["norm"] == "with embedding norm")
  assert point.bindings == ("NORM='pre'", "config.GLMConfig.embedding_norm=True", "RATE=0.001", "SEED=0")
  references = grid({"RATE": [1.0], "MODEL": ["@big/config.GLMConfig()", "%SMALL"]}, repeats=None)
  assert [point.bindings[1] for point in references.points()] == ["MODEL=@big/config.GLMConfig()", "MODEL=%SMALL"]


@pytest.mark.parametrize("label", ["a/b", "a b", "..", "x" * 500, "模型", "", "a=b,c"])
def test_names_are_those_of_files(label):
  (point,) = grid({"RATE": [1.0], "which": {label: {}}}, repeats=None).points()
  assert "/" not in point.name and point.name.isascii() and 0 < len(point.name.encode()) < 200
  assert not point.name.startswith(".")


def test_names_of_labels_that_look_alike_differ():
  first, second = grid({"RATE": [1.0], "which": {"a b": {}, "a/b": {}}}, repeats=None).points()
  assert first.name != second.name


@pytest.mark.parametrize(
  "axes, over, repeats, said",
  [
    ({}, "RATE", None, "give a dict of axes"),
    ([("RATE", [1.0])], "RATE", None, "give a dict of axes"),
    ({"RATE": []}, "RATE", None, "has no values"),
    ({"RATE": "1"}, "RATE", None, "Grid.axes['RATE']"),
    ({"RATE": [1.0, 1.0]}, "RATE", None, "each value once"),
    ({"RATE": [1.0, "fast"]}, "RATE", None, "Grid.axes['RATE'][1]"),
    ({"RATE": [0.0]}, "RATE", None, "Grid.axes['RATE'][0]"),
    ({"RATE": [1.0]}, "LATE", None, "give one of the axes"),
    ({"RATE": [1.0]}, "RATE", "SEED", "Grid.repeats is 'SEED'"),
    ({"RATE": [1.0]}, "RATE", "RATE", "two axes"),
    ({"RATE": [1.0], "fast": {"yes": {"RATE": 2.0}}}, "RATE", None, "two axes bind RATE"),
    ({"RATE": [1.0], "norm": {"Pre-LN": "pre"}}, "RATE", None, "no dict of what it binds"),
    ({1: [1.0]}, 1, None, "Grid.axes has 1 for the name of an axis: give text"),
    ({"RATE": [1.0], ("a", "b"): [1]}, "RATE", None, "for the name of an axis"),
    ({"RATE": [1.0], "norm": {"Pre-LN": {1: "pre"}}}, "RATE", None, "['Pre-LN'] has 1 for the name of what it binds"),
    ({"RATE": [1.0]}, ["RATE"], None, "Grid.over is ['RATE']: give the name of one axis, RATE"),
    ({"RATE": [1.0]}, None, None, "Grid.over is None"),
    ({"RATE": [1.0], "SEED": [0]}, "RATE", ["SEED"], "Grid.repeats is ['SEED']"),
    ({"RATE": [1.0], "SEED": [0]}, "RATE", {}, "Grid.repeats is {}"),
    ({"RATE": [*map(float, range(1, 1001))], "SEED": [*range(1001)]}, "RATE", "SEED", "at most 100,000"),
  ],
)
def test_mistakes_are_said_in_a_line(axes, over, repeats, said):
  with pytest.raises(errors.InputError) as raised:
    grid(axes, over, repeats)
  assert said in str(raised.value) and "\n" not in str(raised.value)

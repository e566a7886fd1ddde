"""Layouts of data sets whose released files are no plain lists of questions.

Each takes a JSON file's content (of other files the path) and where it is, and yields records with their places; a
task's prompt makes questions of these.
"""

from collections.abc import Callable, Iterator
from typing import Any

Records = Iterator[tuple[dict[str, Any], str]]
LAYOUTS: dict[str, Callable[[Any, str], Records]] = {}

"""The calculator's page: what it may not hold, and that its figures are those of Python, in Chromium too."""

import dataclasses
import itertools
import json
import re

import pytest

from glmjax.parallel import mesh as mesh_lib
from glmjax.plan import calculator
from glmjax.plan import compiled
from glmjax.plan import footprint
from glmjax.plan import memory
from glmjax.plan import programs

PAGE = calculator._PAGE.read_text(encoding="utf-8")
MARKUP, SCRIPT = PAGE.split('<script type="module"', 1)


def test_the_file_is_whole_and_small():
  assert not re.search(r"https?://\w|@import|url\(|\ssrc\s*=|<iframe|<object|<embed|<base", PAGE)
  assert PAGE.count("<style") == 1 and PAGE.count("<script") == 2 and PAGE.count(calculator._PLACE) == 1
  assert "default-src 'none'" in PAGE and re.findall(r'href="(.*?)"', MARKUP) == ["data:,"]
  assert len(PAGE.encode()) < 30_000


def test_nothing_makes_markup_or_code_of_text():
  assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|srcdoc", SCRIPT)
  assert not re.search(r"\beval\b|\bFunction\(|\bimport\(|\bfetch\(|XMLHttp|WebSocket", SCRIPT)
  assert not re.search(r"\s(on\w+|style)\s*=\s*[\"']", MARKUP)


def test_every_element_that_is_asked_for_is_there():
  ids = re.findall(r'\bid="([\w-]+)"', MARKUP)
  assert len(ids) == len(set(ids))
  asked = set(re.findall(r'\b(?:byId|options|getElementById)\("([\w-]+)"', SCRIPT))
  assert asked | set(re.findall(r'\b(?:for|aria-labelledby)="([\w-]+)"', MARKUP)) <= set(ids)


def embedded(table):
  """The data of the page, as its script reads them."""
  text = calculator.page(table)
  return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_holds_the_compiled_figures():
  table = compiled.shipped()
  data = embedded(table)
  assert list(data["cards"]) == list(footprint.CARDS) and set(data["models"]) == set(table.models)
  for cell, points in table.cells.items():
    held = data["points"][f"{cell.model}/{cell.bits}/{cell.architecture}/{cell.count}"]
    assert [compiled.Point(**point) for point in held] == list(points)


@pytest.mark.parametrize("batch, context", [(1, 1), (1, 512), (3, 777), (256, 1024)])
def test_weights_and_cache_of_the_page_are_exact(batch, context):
  """By the page's arithmetic: weights as they are, a token's cache as often as there are tokens."""
  table = compiled.shipped()
  for name, model in embedded(table)["models"].items():
    config = table.models[name]
    assert model["sets"] == memory.sets(config) and model["longest"] == config.max_length
    for bits, count in itertools.product(footprint.BITS, model["sets"]):
      work = programs.Decode(batch, context, None if bits == 16 else bits)
      parts = memory.decoding(config, work, mesh_lib.MeshConfig(data=1, tensor=count)).parts
      cache = model["cache"][str(count)] * batch * context
      assert cache == parts["KV cache"]
      assert model["weights"][str(bits)][str(count)] + cache == sum(parts.values())


def test_a_text_cannot_end_the_data():
  whole = compiled.shipped()
  name, config = next(iter(whole.models.items()))
  odd = compiled.Table("</script><b>", {name: config}, {})
  assert "</script><b>" not in calculator.page(odd) and embedded(odd)["jax"] == "</script><b>"


@pytest.fixture
def page(chromium, tmp_path):
  """The page in Chromium, from the disk; at the end it had no error and asked for nothing."""
  wrong, path = [], tmp_path / "calculator.html"
  calculator.write(path)
  context = chromium.new_context(locale="en-US", viewport={"width": 1280, "height": 900})
  context.set_default_timeout(20_000)
  context.on("request", lambda request: request.url.startswith(path.as_uri()) or wrong.append(request.url))
  page = context.new_page()
  page.on("console", lambda message: wrong.append(message.text))
  page.on("pageerror", lambda error: wrong.append(str(error)))
  page.goto(path.as_uri())
  yield page
  context.close()
  assert not wrong


def chosen(page, **choice):
  """What the page says of a choice: of the set, and the smallest set of each card."""
  changed = (
    "hash => new Promise(done => { addEventListener('hashchange', () => done(), {once: true}); location.hash = hash })"
  )
  page.evaluate(changed, "&".join(f"{name}={value}" for name, value in choice.items()))
  said = page.evaluate("({...document.getElementById('bar').dataset})")
  rows = page.evaluate("[...document.querySelectorAll('#cards-body tr')].map(row => ({...row.dataset}))")
  return said, {row["card"]: (row["count"], row["basis"]) for row in rows}


@pytest.mark.slow
def test_the_page_says_what_python_says(page):
  table = compiled.shipped()
  names = {footprint.COMPILED: "compiled", footprint.INTERPOLATED: "interpolated", footprint.ARITHMETIC: "not compiled"}
  for i, (name, bits) in enumerate(itertools.product(table.models, footprint.BITS)):
    config = table.models[name]
    for batch, context in ((1, 512), (1, config.max_length), (1, 700), (3, 513), (8, config.max_length), (100, 9)):
      card = footprint.CARDS[(i + context) % len(footprint.CARDS)]
      said, sets = chosen(page, model=name, bits=bits, context=context, batch=batch, card=card, count="auto")
      [row] = footprint.footprint(config, [bits], [context], batch)
      expected = {found.card: (str(found.count), names[found.basis]) for found in row.sets}
      assert sets == {each: ("", "") for each in footprint.CARDS} | expected
      work = programs.Decode(batch, context, None if bits == 16 else bits)
      count = expected[card][0] if card in expected else str(memory.sets(config)[-1])
      found = footprint.card_set(config, work, card, int(count), table)
      for field in ("weights", "cache", "temporaries"):
        value = getattr(found, f"{field}_bytes")
        assert said[field] == ("" if value is None else str(value)), (name, bits, batch, context, card, field)
      assert (said["count"], said["fits"], said["basis"]) == (count, str(found.fits).lower(), names[found.basis])
      assert (float(said["speed"]) if said["speed"] else None) == found.tokens_per_second


@pytest.mark.slow
def test_the_first_context_is_none_that_the_model_has_not(page, tmp_path):
  whole = compiled.shipped()
  short = dataclasses.replace(whole.models["130b"], max_length=1024)
  path = tmp_path / "calculator.html"
  path.write_text(calculator.page(compiled.Table(whole.jax, {"130b": short}, {})), encoding="utf-8")
  page.goto(path.as_uri())
  assert page.get_by_role("spinbutton", name="Context").input_value() == "1024"


def address(page) -> str:
  """Returns the page's address as the page itself has it; the browser tells of changes when it finds time."""
  return page.evaluate("location.href")


@pytest.mark.slow
def test_choices_are_clicked_and_typed(page):
  page.get_by_role("group", name="Model").get_by_role("button", name="ChatGLM-6B").click()
  page.get_by_role("group", name="Precision").get_by_role("button", name="8 bits").click()
  page.get_by_role("group", name="Card").get_by_role("button", name="RTX 2080 Ti").click()
  page.get_by_role("group", name="How many").get_by_role("button", name="2", exact=True).click()
  assert "2\u00a0×\u00a0RTX\u00a02080\u00a0Ti" in page.get_by_role("status").inner_text()
  context = page.get_by_role("spinbutton", name="Context")
  context.fill("700")
  assert "context=700" in address(page) and page.get_by_role("slider", name="Context").input_value() == "700"
  context.fill("0")  # is refused, and what was there stays
  assert "context=700" in address(page)
  context.blur()
  assert context.input_value() == "700"
  page.get_by_role("slider", name="Requests").fill("4")
  assert "batch=4" in address(page) and page.get_by_role("spinbutton", name="Requests").input_value() == "4"
  page.locator("#cards").get_by_role("button", name="H200").click()
  assert "card=h200" in address(page) and "count=auto" in address(page)
  shown = page.locator("#parts").inner_text()
  page.reload()  # the address keeps the choices
  assert page.locator("#parts").inner_text() == shown


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page, width):
  page.set_viewport_size({"width": width, "height": 844})
  for scheme in ("light", "dark"):
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width

"""The chat page in Chromium, against a server without a model: what people do with it."""

import pytest
from serve import page_steps

pytestmark = pytest.mark.slow


def test_an_answer_streams_and_is_kept(opened, fake):
  page = opened()
  fake.pieces, fake.seconds = ["Hel", "lo", " **you", "**!"], 0.3
  page_steps.ask(page, "Hi")
  page.get_by_text("Hello").wait_for()  # before the rest is there
  assert page.get_by_role("button", name="Stop").is_visible()
  page_steps.answered(page, "Hello you!")
  assert page.get_by_text("11 tokens read, 4 written").is_visible() and page.get_by_text("tokens/s").is_visible()
  assert "Hello **you**!" in page.locator("#spoken").inner_text()  # once, at the end
  body = fake.asked[-1][1]
  assert body["stream"] and body["stream_options"] == {"include_usage": True} and body["model"] == "chatglm-tiny"
  assert (body["temperature"], body["top_p"], body["top_k"]) == (0.95, 0.7, 50)
  assert "seed" not in body and "max_tokens" not in body
  page.reload()
  page_steps.answered(page, "Hello you!")
  page_steps.ask(page, "And?")
  page_steps.answered(page, "Hello you!")
  assert page_steps.messages(fake) == [("user", "Hi"), ("assistant", "Hello **you**!"), ("user", "And?")]


def test_an_answer_is_stopped(opened, fake):
  page = opened()
  fake.pieces, fake.seconds = ["word "] * 500, 0.05
  page_steps.ask(page, "Talk")
  page.get_by_text("word word").wait_for()
  page.get_by_role("button", name="Stop").press("Enter")
  page.get_by_text("stopped").wait_for()
  assert page.evaluate("document.activeElement.id") == "send"  # the keyboard does not lose its place
  assert fake.gone.wait(10)  # the server sees it
  assert page.locator(".message.assistant .text").inner_text().startswith("word word")
  page.get_by_role("button", name="Another answer").click()
  page.get_by_text("word word").wait_for()
  page.keyboard.press("Escape")
  page.get_by_text("stopped").wait_for()


def test_a_question_is_edited_and_asked_again(opened, fake):
  page = opened()
  for question in ("one", "two", "three"):
    page_steps.ask(page, question)
    page_steps.answered(page, "Hello there")
  page.locator(".message.user").nth(1).get_by_role("button", name="Edit").click()
  page.keyboard.press("Control+A")
  page.keyboard.type("zwei")
  page.get_by_role("button", name="Ask again").click()
  page_steps.answered(page, "Hello there")
  assert page_steps.messages(fake) == [("user", "one"), ("assistant", "Hello there"), ("user", "zwei")]
  assert page.locator(".message").count() == 4
  page.get_by_label("Your question").press("ArrowUp")  # the last question
  page.keyboard.press("Escape")
  fake.pieces = ["Other"]
  page.get_by_role("button", name="Another answer").click()
  page_steps.answered(page, "Other")
  assert page_steps.messages(fake)[-1] == ("user", "zwei") and page.locator(".message").count() == 4
  fake.pieces, fake.seconds = ["slow "] * 100, 0.1
  page_steps.ask(page, "four")
  page.get_by_text("slow").first.wait_for()
  page.locator(".message.user").last.get_by_role("button", name="Edit").click()  # stops the answer
  page.keyboard.press("End")
  page.keyboard.type("!")
  fake.pieces, fake.seconds = ["Done"], 0
  page.keyboard.press("Enter")
  page_steps.answered(page, "Done")
  assert page_steps.messages(fake)[-1] == ("user", "four!")


def test_conversations_are_listed_renamed_and_deleted(opened, fake):
  page = opened()
  page.on("dialog", lambda dialog: dialog.accept())
  for question in ("first talk", "second talk"):
    page.get_by_role("button", name="New conversation", exact=True).first.click()
    page_steps.ask(page, question)
    page_steps.answered(page, "Hello there")
  items = page.locator("#list li")
  assert [each.split("\n")[0] for each in items.all_inner_texts()] == ["second talk", "first talk"]
  items.nth(1).get_by_role("button").first.click()
  assert page.locator(".message.user .text").inner_text() == "first talk"
  page.get_by_role("button", name="Rename").click()
  page.keyboard.type("<b>mine</b>")
  page.keyboard.press("Enter")
  page.get_by_role("button", name="<b>mine</b>").wait_for()
  page.reload()
  page.get_by_role("button", name="<b>mine</b>").click()
  page.get_by_role("button", name="Delete", exact=True).click()
  assert items.count() == 1 and page.locator(".message").count() == 0
  page.get_by_role("button", name="Delete all").click()
  assert items.count() == 0
  assert page.evaluate("Object.keys(localStorage).filter((name) => name.includes('chat.')).length") == 0


def test_a_conversation_is_renamed_during_an_answer(opened, fake):
  page = opened()
  fake.pieces, fake.seconds = list("abcdefgh"), 0.15
  page_steps.ask(page, "spell")
  page.get_by_role("button", name="Rename").click()
  page.keyboard.type("spelling")
  page_steps.answered(page, "abcdefgh")  # which saves, and lists
  page.keyboard.press("Enter")
  page.get_by_role("button", name="spelling").wait_for()


def test_a_page_closed_during_an_answer_keeps_what_came(opened, fake):
  page = opened()
  fake.pieces, fake.seconds = ["word "] * 50, 0.1
  page_steps.ask(page, "Talk")
  page.get_by_text("word word").wait_for()
  page.reload()
  page.get_by_text("broken off").wait_for()
  assert page.locator(".message.assistant .text").inner_text().startswith("word word")
  fake.pieces, fake.seconds = ["word "] * 50, 5
  page.get_by_role("button", name="Another answer").click()
  page.get_by_text("Waiting: 1 s").wait_for()
  page.reload()  # nothing came yet
  fake.pieces, fake.seconds = ["Done"], 0
  page.get_by_role("button", name="Ask again").click()
  page_steps.answered(page, "Done")


def test_an_answer_goes_on_behind_another_conversation(opened, fake):
  page = opened()
  fake.pieces, fake.seconds = list("abcdefgh"), 0.2
  page_steps.ask(page, "spell")
  page.locator("#log").get_by_text("ab").wait_for()
  page.keyboard.press("Alt+n")
  assert page.locator(".message").count() == 0
  page_steps.ask(page, "meanwhile")
  page.get_by_text("An answer in another conversation is under way").wait_for()
  assert page.get_by_label("Your question").input_value() == "meanwhile"
  page.get_by_role("button", name="spell").click()
  page_steps.answered(page, "abcdefgh")


def test_settings_are_sent_kept_and_reset(opened, fake):
  page = opened()
  page.get_by_role("button", name="Settings").click()
  for name, value in (
    ("Temperature", "0.2"),
    ("Seed", "7"),
    ("Tokens at most of", "64"),
    ("Repetition penalty", "1.1"),
  ):
    page.get_by_label(name).fill(value)
  page.get_by_label("Top p").fill("3")  # out of range: not sent
  page.get_by_role("button", name="Close").click()
  page.get_by_label("Model").select_option("poems")
  page.reload()
  page_steps.ask(page, "x")
  page_steps.answered(page, "Hello there")
  body = fake.asked[-1][1]
  expected = {"temperature": 0.2, "seed": 7, "max_tokens": 64, "repetition_penalty": 1.1, "top_k": 50, "model": "poems"}
  assert expected.items() <= body.items() and "top_p" not in body
  page.get_by_role("button", name="Settings").click()
  page.get_by_role("button", name="ChatGLM's defaults").click()
  assert page.get_by_label("Temperature").input_value() == "0.95" and page.get_by_label("Seed").input_value() == ""


def test_language_and_colours_are_remembered(opened):
  background = "getComputedStyle(document.body).backgroundColor"
  page = opened(locale="zh-CN", color_scheme="dark")
  dark = page.evaluate(background)
  assert page.locator("html").get_attribute("lang") == "zh-CN" and page.get_by_role("tab", name="填空").is_visible()
  page.get_by_role("button", name="English").click()
  page.get_by_role("button", name="Settings").click()
  page.get_by_label("Colours").select_option("light")
  page.get_by_role("button", name="Close").click()
  page.reload()
  assert page.get_by_role("tab", name="Blanks").is_visible() and page.locator("html").get_attribute("lang") == "en"
  assert page.evaluate(background) == "rgb(255, 255, 255)" != dark
  assert opened(color_scheme="light").evaluate(background) == "rgb(255, 255, 255)"


def test_blanks_are_put_in_filled_and_taken_over(opened, fake):
  page = opened()
  page.get_by_role("tab", name="Chat").press("ArrowRight")
  text = page.get_by_label("Text with blanks")
  text.fill("no blank")
  page.get_by_role("button", name="Fill the blanks").click()
  page.get_by_text("There is no blank in the text yet").wait_for()
  text.fill("𝒜 cat sat.")
  text.evaluate("(field) => field.setSelectionRange(3, 6)")  # "cat": the first letter is two UTF-16 units
  page.get_by_role("button", name="Words [MASK]").click()
  assert text.input_value() == "𝒜 [MASK] sat."
  page.get_by_role("button", name="[gMASK]").click()
  page.get_by_role("button", name="[gMASK]").click()  # one is enough
  assert text.input_value() == "𝒜 [MASK] sat.[gMASK]"
  filled = "𝒜 𝒷𝒾𝑔 dog sat. <b>It</b> slept."
  fake.fillings = [
    {"text": filled, "places": [[2, 9], [15, 31]], "finish_reason": "stop"},
    {"text": "𝒜 x sat.", "places": [[2, 3], [8, 99]], "finish_reason": "length"},
  ]
  page.get_by_role("button", name="Fill the blanks").click()
  page.get_by_text("cut off").wait_for()
  path, body = fake.asked[-1]
  sent = {"text": "𝒜 [MASK] sat.[gMASK]", "n": 3, "max_tokens": 64, "temperature": 0.95, "top_p": 0.7, "top_k": 50}
  assert path == "/v1/fill" and sent.items() <= body.items()
  assert page.locator("mark").all_inner_texts() == ["𝒷𝒾𝑔 dog", "<b>It</b> slept.", "x"]
  assert page.locator("#fillings .text").first.inner_text() == filled
  page.get_by_role("button", name="Take over").first.click()
  assert text.input_value() == filled
  page.keyboard.press("Control+z")  # the browser's own undo
  assert text.input_value() == "𝒜 [MASK] sat.[gMASK]"
  text.press("End")
  page.keyboard.press("Control+b")
  assert text.input_value().endswith("[MASK]")
  fake.seconds = 30
  page.keyboard.press("Control+Enter")
  page.get_by_role("button", name="Stop").click()
  page.get_by_text("stopped").wait_for()
  page.reload()
  assert text.input_value().endswith("[MASK]")


def test_enter_of_an_input_method_does_not_send(opened, fake):
  page = opened()
  field = page.get_by_label("Your question")
  field.focus()
  keys = page.context.new_cdp_session(page)
  keys.send("Input.imeSetComposition", {"text": "ni hao", "selectionStart": 6, "selectionEnd": 6})
  page.keyboard.press("Enter")
  field.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})  # Safari, which ended the composition before
  assert not fake.asked and page.locator(".message").count() == 0
  field.fill("")
  keys.send("Input.insertText", {"text": "你好"})
  page.keyboard.press("Shift+Enter")
  page.keyboard.type("x")
  page.keyboard.press("Enter")
  page_steps.answered(page, "Hello there")
  assert page_steps.messages(fake) == [("user", "你好\nx")]


def test_enter_begins_a_line_on_a_touch_screen(opened, fake):
  page = opened(has_touch=True, is_mobile=True, viewport={"width": 360, "height": 640})
  page.get_by_label("Your question").fill("x")
  page.keyboard.press("Enter")
  page.keyboard.type("y")
  page.get_by_role("button", name="Send").tap()
  page_steps.answered(page, "Hello there")
  assert page_steps.messages(fake) == [("user", "x\ny")]


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_it_fits_a_phone_and_the_keyboard(opened, fake, locale):
  page = opened(viewport={"width": 360, "height": 640}, locale=locale)
  fake.fillings *= 8
  page.locator("#question").fill("a long question " * 20)
  page.keyboard.press("Enter")
  page.locator(".message.assistant .actions button").last.wait_for()
  page.locator("#side-open").click()
  page.locator("#list .name").click()
  for tab in ("#tab-chat", "#tab-blanks"):
    page.locator(tab).click()
    if tab == "#tab-blanks":
      page.locator("#fill-send").click()
      page.locator("mark").last.wait_for()
      assert page.locator("#text").bounding_box()["height"] > 100
    outside = """() => [...document.querySelectorAll("button, input, select, textarea, .text")].filter((node) => {
      const {left, right, width} = node.getBoundingClientRect();
      return width && (left < 0 || right > innerWidth);
    }).map((node) => node.outerHTML)"""
    assert page.evaluate(outside) == []
    nameless = """() => [...document.querySelectorAll("button, input, select, textarea")].filter((node) =>
      !(node.ariaLabel || node.labels?.length && node.labels[0].textContent.trim() || node.matches("button") &&
        node.textContent.trim())).map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.locator(tab).focus()
    reached = set()
    for _ in range(20):
      page.keyboard.press("Tab")
      reached.add(page.evaluate("document.activeElement.id"))
    assert {"language", "settings-open"} | ({"question", "send", "log"} if tab == "#tab-chat" else {"text"}) <= reached

"""The chat page where things go wrong: keys, refusals, broken streams, no server, a full store."""

import pytest
from serve import page_steps

pytestmark = pytest.mark.slow


def test_a_key_is_asked_for_and_kept_for_the_tab(opened, fake):
  fake.key = "sesame"
  page = opened()
  page.get_by_text("This server asks for an API key").wait_for()
  page.keyboard.type("wrong")  # the field has the focus
  page.keyboard.press("Enter")
  page.get_by_text("This server asks for an API key").wait_for()
  page.get_by_label("API key").fill("sesame")
  page.get_by_role("button", name="Use key").click()
  page.get_by_text("Ask chatglm-tiny").wait_for()
  page_steps.ask(page, "x")
  page_steps.answered(page, "Hello there")
  assert fake.headers_seen[-1]["Authorization"] == "Bearer sesame"
  assert not page.evaluate("JSON.stringify(localStorage).includes('sesame')")
  page.reload()
  page.get_by_role("button", name="Settings").click()
  page.get_by_role("button", name="Forget API key").click()
  page.get_by_role("button", name="Close").click()
  page.get_by_role("button", name="Another answer").click()
  page.get_by_label("API key").fill("sesame")
  page.keyboard.press("Enter")  # asks again
  page_steps.answered(page, "Hello there")


@pytest.mark.parametrize(
  "status, headers, said",
  [
    (503, {"Retry-After": "7"}, "The server is busy. Try again in 7 s."),
    (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, "The server is busy. Try again in 1 s."),
    (429, {}, "The server is busy. Try again in a moment."),
    (400, {}, "The server refused the request: <b>because</b>"),
    (500, {}, "The server failed: <b>because</b>"),
  ],
)
def test_a_refusal_is_said_and_tried_again(opened, fake, status, headers, said):
  page = opened()
  fake.refusals = [(status, headers, "<b>because</b>")]
  page_steps.ask(page, "x")
  page.get_by_role("alert").get_by_text(said, exact=True).wait_for()
  page.get_by_role("button", name="Try again").click()
  page_steps.answered(page, "Hello there")
  assert not page.get_by_role("alert").is_visible() and page_steps.messages(fake) == [("user", "x")]


def test_a_stream_that_breaks_off_is_said_and_tried_again(opened, fake):
  page = opened()
  fake.pieces, fake.drop_after = ["a", "b", "c"], 2
  page_steps.ask(page, "x")
  page.get_by_text("The connection broke before the answer was complete").wait_for()
  assert page.locator(".message.assistant .text").inner_text() == "ab" and page.get_by_text("broken off").is_visible()
  fake.drop_after, fake.error_after = None, 1
  page.get_by_role("button", name="Try again").click()
  page.get_by_text("The server failed: out of memory").wait_for()
  fake.error_after, fake.finish_reason = None, "length"
  page.get_by_role("button", name="Try again").click()
  page_steps.answered(page, "abc")
  assert page.get_by_text("cut off at the limit of tokens").is_visible()
  assert page_steps.messages(fake) == [("user", "x")]


def test_without_a_server_the_question_is_kept(opened, fake):
  page = opened()
  page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
  page_steps.ask(page, "are you there?")
  page.get_by_text("The server cannot be reached").wait_for()
  page.reload()
  page.get_by_text("The server cannot be reached").wait_for()
  page.unroute("**/v1/**")
  page.get_by_role("button", name="Try again").click()
  page.get_by_role("button", name="Ask again").click()
  page_steps.answered(page, "Hello there")
  page.context.set_offline(True)
  page_steps.ask(page, "and now?")
  page.get_by_text("you are offline").wait_for()
  page.context.set_offline(False)  # asks again by itself
  page.locator(".message.assistant").nth(1).wait_for()
  page_steps.answered(page, "Hello there")


def test_an_unanswered_question_is_not_sent_with_the_next(opened, fake):
  page = opened()
  fake.refusals = [(500, {}, "no")]
  page_steps.ask(page, "lost")
  page.get_by_text("The server failed").wait_for()
  page_steps.ask(page, "next")
  page_steps.answered(page, "Hello there")
  assert page_steps.messages(fake) == [("user", "next")] and page.locator(".message").count() == 3


def test_a_conversation_that_is_too_long_goes_on_without_its_oldest_rounds(opened, fake):
  page = opened()
  for question in ("one", "two", "three"):
    page_steps.ask(page, question)
    page_steps.answered(page, "Hello there")
  fake.most_messages = 3
  page_steps.ask(page, "four")
  page.get_by_text("without the oldest rounds").wait_for()
  assert page_steps.messages(fake) == [("user", "three"), ("assistant", "Hello there"), ("user", "four")]
  assert page.locator(".message").count() == 8  # all of it is shown
  fake.most_messages = 0
  page_steps.ask(page, "too long by itself")
  page.get_by_text("The server refused the request: too long").wait_for()


def test_a_full_store_is_said(opened, fake):
  page = opened()
  page.evaluate("""() => {
    let size = 1 << 22;
    for (let i = 0; size; i++) {
      try { localStorage.setItem(`filler${i}`, "x".repeat(size)); } catch { size >>= 1; }
    }
  }""")
  page_steps.ask(page, "x")
  page_steps.answered(page, "Hello there")
  page.get_by_text("The browser's store is full").wait_for()


def test_a_spoiled_store_is_passed_over(opened, fake):
  page = opened()
  page.evaluate("""() => {
    const spoiled = {"chat.a": "{", "chat.b": "null", "chat.c": '{"id": "c", "title": "c", "messages": [{"role": 1}]}',
      sampling: "[1]", theme: "7", language: '"xx"', tab: "{}", model: "[]", text: "3"};
    for (const name in spoiled) localStorage.setItem(`glmjax.${name}`, spoiled[name]);
  }""")
  page.reload()
  page_steps.ask(page, "x")
  page_steps.answered(page, "Hello there")
  assert page.locator("#list li").count() == 1

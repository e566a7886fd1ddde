"""Steps that tests of the chat page have in common."""


def ask(page, text):
  page.get_by_label("Your question").fill(text)
  page.keyboard.press("Enter")


def answered(page, text):
  """Waits for the end of the last answer, which is `text`."""
  page.get_by_role("button", name="Another answer").wait_for()
  assert page.locator(".message.assistant .text").last.inner_text() == text


def messages(fake, index=-1):
  return [(each["role"], each["content"]) for each in fake.asked[index][1]["messages"]]

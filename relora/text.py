"""Text from elsewhere, made safe to keep and to show: without secrets, and as code that stays code."""

import os
import re

# https://user:password@host, and the parameters of signed addresses.
IN_URLS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)|(?<=[?&])((?:[\w-]*token|api_?key|sig|x-amz-[\w-]+)=)[^&\s'\"]+", re.I)
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
# The names of environment variables such as HF_TOKEN, WANDB_API_KEY and AWS_SECRET_ACCESS_KEY.
SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|SECRET_KEY)$", re.I)
SHORTEST_SECRET = 8  # a shorter value is as likely to be a common word
REDACTED = "(secret)"


def without_secrets(text: str) -> str:
    """`text` with every password and token in it replaced.

    They are known by their form, in addresses and for the Hugging Face hub, or because an environment variable holds
    them whose name says so.
    """
    values = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET}
    for value in sorted(values, key=len, reverse=True):  # one may be a part of another
        text = text.replace(value, REDACTED)
    text = IN_URLS.sub(lambda match: (match.group(1) or "") + REDACTED, text)
    return HUB_TOKEN.sub(REDACTED, text)


def code_block(text: str, language: str = "") -> str:
    """A block of code in Markdown that shows `text` as it is, whatever backticks and markup are in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"

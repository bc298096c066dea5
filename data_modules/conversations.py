"""Conversations in the forms that files have: OpenAI's, ShareGPT's, prompt and completion, and Alpaca's."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from app.utils.errors import InputError
from data_modules.rows import Turn

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    **dict.fromkeys(("tool", "function", "function_call", "observation", "ipython"), "tool"),
}
"""The role of chat templates for each name of a role in the forms; `tool` for what is about tools."""
CALLS = ("tool_calls", "function_call")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""What messages name the thoughts that stand beside their content."""


class Conversation(NamedTuple):
    """The turns of a row, whether some call a tool or are what one returns, and whether some have reasoning."""

    turns: tuple[Turn, ...]
    calls_tools: bool
    reasons: bool


def conversation(row: Mapping[str, Any], where: str, setting: str) -> Conversation:
    """Return the conversation of a row, in the first of `FORMS` whose columns it has.

    Args:
        row: The columns of one row.
        where: Where it stands, for messages.
        setting: The setting that names the file, for messages.

    Raises:
        InputError: The row has none of the forms, a role of another name, or a message that is no text.
    """
    for columns, messages_of in FORMS.items():
        if all(row.get(column) is not None for column in columns):
            try:
                messages = messages_of(row)
            except ValueError as error:
                raise InputError(f"{where} has {error}; correct it, or change {setting}") from error
            return _conversation(messages, where, setting)
    forms = "; ".join(" and ".join(columns) for columns in FORMS)
    found = ", ".join(repr(column) for column, value in row.items() if value is not None)
    raise InputError(
        f"{where} has {found or 'nothing'}: expected one of the forms {forms}; correct it, or change {setting}"
    )


def _conversation(messages: Any, where: str, setting: str) -> Conversation:
    change = f"correct it, or change {setting}"
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise InputError(
            f"{where} has {str(messages)[:40]!r} as its messages: expected a list of them, each with a role "
            f"and a content; {change}"
        )
    turns, calls, reasons = [], False, False
    for number, message in enumerate(messages):
        of = f"message {number} of {where}"
        given = message.get("role") or message.get("from")
        role = ROLES.get(str(given).lower())
        if role is None:
            raise InputError(
                f"{of} has the role {given!r}: expected system, user or assistant (of ShareGPT, human or gpt); "
                f"{change}"
            )
        if role == "tool" or any(message.get(name) for name in CALLS):
            calls = True
            continue
        content = message.get("content")
        text = _text(message.get("value") if content is None else content, of, change)
        reasons |= any(message.get(name) for name in REASONING)
        learnt = role == "assistant" and message.get("weight") != 0
        turns.append(Turn(role, text, learnt))
    return Conversation(tuple(turns), calls, reasons)


def _text(content: Any, of: str, change: str) -> str:
    """Return the text of a message, which may be a list of parts; "" for none."""
    parts = content if isinstance(content, list) else ["" if content is None else content]
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise InputError(
                f"{of} has {str(part)[:40]!r} in its content: expected text alone; {change}"
            )
        texts.append(text)
    return "".join(texts)


def _messages(row: Mapping[str, Any]) -> Any:
    return row["messages"]


def _share_gpt(row: Mapping[str, Any]) -> Any:
    said = row["conversations"]
    if isinstance(row.get("system"), str) and row["system"] and isinstance(said, list):
        return [{"role": "system", "content": row["system"]}, *said]
    return said


def _prompt_and_completion(row: Mapping[str, Any]) -> Any:
    """Join both, each a text or a list of messages."""
    sides = []
    for role, name in (("user", "prompt"), ("assistant", "completion")):
        side = row[name]
        sides.append(side if isinstance(side, list) else [{"role": role, "content": side}])
    read = [{**each, "weight": 0} if isinstance(each, Mapping) else each for each in sides[0]]
    return read + sides[1]


def _alpaca(row: Mapping[str, Any]) -> Any:
    """Make a message of instruction and input, behind the `system` and `history` of LLaMA-Factory's files."""
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise ValueError(
            f"the history {str(history)[:40]!r}: expected pairs of question and answer"
        )
    for question, answer in history:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    question = "\n\n".join(
        part if isinstance(part, str) else str(part)
        for part in (row["instruction"], row.get("input"))
        if part
    )
    return [
        *messages,
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


FORMS: dict[tuple[str, ...], Callable[[Mapping[str, Any]], Any]] = {
    ("messages",): _messages,
    ("conversations",): _share_gpt,
    ("prompt", "completion"): _prompt_and_completion,
    ("instruction", "output"): _alpaca,
}
"""Makes messages of a row with these columns."""

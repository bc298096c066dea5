"""Extract the code of a model's output: without fences, docstrings and odd indentation, or cut at its end."""

import re
from collections.abc import Sequence

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*).*$", re.MULTILINE)
TRIPLE_QUOTED = re.compile(r'("""|\'\'\').*?\1', re.DOTALL)
INDENT = "    "


def cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first of the strings in `stop`."""
    ends = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(ends, default=len(text))]


def fenced_code(text: str) -> str:
    r"""Return the code of a reply whose prompt has opened a fence, as in "```python\n".

    A fence that names a language, or that comes before anything else, opens a block again: what is before it
    is prose. Any other fence closes.
    """
    start, end = 0, len(text)
    for fence in FENCE.finditer(text):
        if fence[1] or not text[start : fence.start()].strip():
            start = fence.end() + 1
        else:
            end = fence.start()
            break
    return text[start:end]


def without_docstrings(code: str) -> str:
    """Return the code without triple-quoted strings that are a line of their own."""

    def keep(string: re.Match[str]) -> str:
        before = code[code.rfind("\n", 0, string.start()) + 1 : string.start()]
        after = code[string.end() :].partition("\n")[0]
        return string[0] if before.strip() or after.strip() else ""

    return TRIPLE_QUOTED.sub(keep, code)


def reindented(code: str) -> str:
    """Return the code with four spaces a level and without empty lines.

    The indentations that occur are ranked; those up to the first line with "def" become 0, the next one 1.
    The order of indentations is kept, so blocks stay what they are.
    """
    lines = [line.rstrip() for line in code.replace("\t", INDENT).splitlines() if line.strip()]
    widths = [len(line) - len(line.lstrip()) for line in lines]
    base = next((width for line, width in zip(lines, widths, strict=True) if "def" in line), 0)
    deeper = sorted({width for width in widths if width > base})
    level = {width: rank for rank, width in enumerate(deeper, 1)}
    return "\n".join(
        INDENT * level.get(width, 0) + line.lstrip()
        for line, width in zip(lines, widths, strict=True)
    )


def written_function(text: str) -> str:
    """Return the function that a model wrote, as the authors of LoRA-One read it.

    Source: `post_process` in eval_humaneval.py of YuanheZ/LoRA-One. Deliberate differences: text behind the
    closing fence is no code and is dropped, with the word of an opening fence; and a triple-quoted string
    inside a statement stays. The authors' code fails such outputs, right as their function may be.
    """
    return reindented(without_docstrings(fenced_code(text)))

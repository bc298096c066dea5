"""The report as one HTML file that needs no network and no script."""

import base64
import html
import re
from collections.abc import Sequence

from app.compare.figures import Picture
from app.compare.tables import Table

STYLE = """
:root { color-scheme: light dark;
  --text: #1d2129; --soft: #5b6472; --back: #fff; --line: #d9dde3; --stripe: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #a3abb6; --back: #15181c; --line: #363c44; --stripe: #1d2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 .5rem; }
p { margin: .5rem 0; max-width: 50rem; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .875rem; }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; margin: .75rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: right; vertical-align: top; }
td { white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
tbody tr:nth-child(even) td { background: var(--stripe); }
table.text th, table.text td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.text td { min-width: 7rem; }
table.reasons td:nth-child(5) { min-width: 20rem; }
table.reasons td:nth-child(6) { min-width: 14rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
img { display: block; width: 100%; height: auto; }
code { font-size: .875em; overflow-wrap: anywhere; }
"""


class Page:
    """An HTML page that grows from top to bottom.

    Args:
        title: Its title and first heading.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts = [f"<h1>{_text(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """Add a heading."""
        self._parts.append(f"<h{level}>{_text(text)}</h{level}>")

    def paragraph(self, text: str, note: bool = False) -> None:
        """Add a paragraph; `**bold**` and backquoted code are those of Markdown."""
        kind = ' class="note"' if note else ""
        self._parts.append(f"<p{kind}>{_marked(text)}</p>")

    def table(self, table: Table, kind: str = "") -> None:
        """Add a table, which scrolls in a box of its own where it is too wide.

        Args:
            table: The table.
            kind: Its classes in the style: `text` for words instead of numbers, `reasons` for sentences.
        """
        head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in table.columns)
        rows = "".join(
            "<tr>" + "".join(f"<td>{_marked(cell)}</td>" for cell in row) + "</tr>"
            for row in table.rows
        )
        self._parts.append(
            f'<div class="table" tabindex="0"><table class="{kind}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
        for note in table.notes:
            self.paragraph(note, note=True)

    def pictures(self, pictures: Sequence[Picture]) -> None:
        """Add pictures, beside each other where there is room."""
        figures = "".join(
            f'<figure><img alt="{_text(picture.title)}" '
            f'src="data:image/png;base64,{base64.b64encode(picture.png).decode()}"></figure>'
            for picture in pictures
        )
        self._parts.append(f'<div class="pictures">{figures}</div>')

    def html(self) -> str:
        """Return the file's content."""
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,">\n<title>{_text(self.title)}</title>\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _marked(text: str) -> str:
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", _text(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", bold)

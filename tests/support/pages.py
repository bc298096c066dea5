"""What a person reads on a page, of its HTML."""

from collections import Counter
from html.parser import HTMLParser

BLOCKS = ("li", "pre", "table", "td", "th", "h1", "h2", "h3", "img", "ol", "ul", "em", "strong")


class Page(HTMLParser):
    """Text without spaces, and the number of elements of each kind.

    Args:
        html: Source of the page.
        inside: Element that holds the content; None takes all of it.
    """

    def __init__(self, html, inside=None):
        super().__init__()
        self.inside, self.reads, self.in_permalink = inside, inside is None, False
        self.text, self.blocks, self.ids = "", Counter(), set()
        self.loaded = []  # what the page itself fetches
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag in ("img", "script", "iframe") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loaded.append(given["href"])
        self.reads |= tag == self.inside
        if "headerlink" in (given.get("class") or ""):
            self.in_permalink = True
        elif self.reads and tag in BLOCKS:
            self.blocks[tag] += 1

    def handle_endtag(self, tag):
        self.reads &= tag != self.inside or self.inside is None
        self.in_permalink &= tag != "a"

    def handle_data(self, data):
        if self.reads and not self.in_permalink:
            self.text += "".join(data.split())

"""Reads pages as a strict reader does, and finds their numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "wbr", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, texts and numbers of a page; fails where an element is closed out of order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.numbers, self.sections = [], [], [], {}
        self.text = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        assert len(dict(attrs)) == len(attrs), f"attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append((tag, len(self.text), dict(attrs)))

    def handle_endtag(self, tag):
        name, begin, attrs = self.open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        if "data-path" in attrs:
            self.numbers.append((attrs, "".join(self.text[begin:])))
        if tag == "section":
            self.sections[attrs["id"]] = " ".join("".join(self.text[begin:]).split())

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def at(plain, path):
    """The entry of the JSON at a path such as ``blocks[3].jacobian.largest``."""
    for name, key in re.findall(r"([^.\[\]]+)|\[([^\]]+)\]", path):
        plain = plain[int(key) if isinstance(plain, list) else key or name]
    return plain


def same(shown, stored):
    """Equal to the last bit, NaN included."""
    return repr(float(shown)) == repr(float(stored))

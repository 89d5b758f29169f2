"""Reads an HTML page back."""

from html.parser import HTMLParser

EVIL = '<script src="https://evil.example/x.js"></script>'


class Page(HTMLParser):
    """Collects the text, and every address and script; fails on tags that do not close in order."""

    VOID = {"meta", "br", "circle", "line", "path", "input"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.addresses, self.text = [], set(), [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [v for k, v in attrs if k in ("href", "src", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

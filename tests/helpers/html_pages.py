"""What a browser finds in a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser

from trainpilot.experiments.report.formatting import SPACE

VOID = {"meta", "link", "br", "img", "hr", "input"}


@dataclass
class Seen(HTMLParser):
    """What a browser finds in a page."""

    ids: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self._take(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed before what is in it"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(" ".join(data.replace(SPACE, " ").split()))

    def _take(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name == "href":
                self.targets.append(value or "")
            elif name in ("src", "srcset", "data", "poster", "action"):
                self.sources.append(value or "")

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


def seen(html: str) -> Seen:
    found = Seen()
    found.feed(html)
    assert found.open == []
    return found

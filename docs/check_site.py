"""Check links, anchors, alternative texts and public names of the built site: `make docs`."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Links, anchors and pictures without an alternative text of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.bare_images: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for key, value in attrs if key in ("id", "name") and value}
        if tag == "a" and values.get("href"):
            self.links.add(values["href"] or "")
        if tag == "img" and not values.get("alt"):
            self.bare_images.append(values.get("src") or "")


def problems(site: Path, names: list[str]) -> list[str]:
    pages = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    found = []
    for file, page in pages.items():
        where = file.relative_to(site.resolve())
        found += [f"{where}: no alternative text: {image}" for image in page.bare_images]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = unquote(parts.path)
            target = (file.parent / path).resolve() if path else file
            anchor = unquote(parts.fragment)
            if not target.exists():
                found.append(f"{where}: no such file: {link}")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{where}: no such anchor: {link}")
    documented = {anchor for page in pages.values() for anchor in page.anchors}
    found += [f"api: not documented: {name}" for name in names if name not in documented]
    return sorted(found)


def public_names(listing: str) -> list[str]:
    """Functions and classes of tests/api.txt under the name on the site."""
    found = re.findall(r"^(?:@\S+(?:\(.*?\))? )?(?:class )?(penex\.[\w.]+)", listing, re.MULTILINE)
    at_top = ("penex.linear.", "penex.losses.PENEX", "penex.losses.LogPENEX")
    names = {
        name.replace("linear.", "").replace("losses.", "") if name.startswith(at_top) else name
        for name in found
    }
    plain = [name for name in names if not re.search(r"\.(_|[A-Z]\w+\.)", name)]
    return [name for name in plain if name != "penex.__version__"]


if __name__ == "__main__":
    root = Path(__file__).parent.parent
    listing = (root / "tests" / "api.txt").read_text(encoding="utf-8")
    found = problems(root / "docs" / "_build" / "html", public_names(listing))
    sys.exit("\n".join(found) or None)

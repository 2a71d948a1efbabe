"""`python -m docs.check_site build/docs`: every link of the built site leads somewhere.

What is on the site must be there, with the place in the page that a link names; what is elsewhere
must be https, and is not asked for: the check needs no network.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the named places of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"", "top"}
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        for key in ("id", "name"):
            if named.get(key):
                self.places.add(named[key] or "")
        if tag == "a" and named.get("href"):
            self.links.append(named["href"] or "")
        source = named.get("src") or (named.get("href") if tag == "link" else None)
        if source and named.get("rel") != "canonical":
            self.loads.append(source)


def faults(site: Path) -> list[str]:
    """What leads nowhere, a line each."""
    pages = {file: Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"no page in {site}"]
    found = []
    for file, page in pages.items():
        here = file.relative_to(site)
        if here.name == "404.html":
            continue  # is served from any place, so its links are absolute
        for link in page.links:
            found += [f"{here}: {link}: {why}" for why in _why_not(link, file, pages, site)]
        for source in page.loads:
            if urlsplit(source).scheme not in ("", "data"):
                found.append(f"{here}: loads {source} from elsewhere")
            else:
                found += [f"{here}: {source}: {why}" for why in _why_not(source, file, pages, site)]
    return found


def _why_not(link: str, file: Path, pages: dict[Path, Page], site: Path) -> list[str]:
    parts = urlsplit(link)
    if parts.scheme in ("data", "mailto", "javascript"):
        return []
    if parts.scheme or parts.netloc:
        return [] if parts.scheme == "https" else ["is not https"]
    if parts.path.startswith("/"):
        return ["is absolute"]
    target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir():
        target /= "index.html"
    if not target.is_file() or site.resolve() not in target.resolve().parents:
        return ["is not there"]
    own = pages.get(target) or pages.get(file.parent / parts.path)
    if own is None:
        own = next((p for f, p in pages.items() if f.resolve() == target.resolve()), None)
    if parts.fragment and own is not None and unquote(parts.fragment) not in own.places:
        return [f"the page has no place {parts.fragment!r}"]
    return []


def main() -> int:
    """Prints what leads nowhere; 1 if anything does."""
    if len(sys.argv) != 2:
        print("usage: python -m docs.check_site FOLDER", file=sys.stderr)
        return 2
    found = faults(Path(sys.argv[1]))
    for line in found:
        print(line, file=sys.stderr)
    print(f"{len(found)} links lead nowhere" if found else "every link leads somewhere")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

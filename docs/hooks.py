"""What mkdocs calls while it builds the site."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `docs`, and a checkout

from docs.markers import filled


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """Fills the markers of each page."""
    return filled(markdown)

"""The explorer without Python: one piece of HTML with its script, which loads nothing from
elsewhere and switches between states that were made beforehand.
"""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

from sparse_layouts.viewing.exploration import Exploration
from sparse_layouts.viewing.families import FAMILIES, Family

Told = Callable[[str], None]
PICTURE_BYTES = 8_000


def states_of(
    family: Family, measured: bool = False, known: Iterable[Exploration] = ()
) -> dict[str, str]:
    """The HTML of every combination of the values that a page offers; the key joins the numbers of
    the values. `known` are states that may have been measured.
    """
    by_values = {tuple(each.values.items()): each for each in known if each.family is family}
    found = {}
    for places in itertools.product(*(range(len(p.on_page)) for p in family.parameters)):
        pairs = zip(family.parameters, places, strict=True)
        values = {p.name: p.on_page[place] for p, place in pairs}
        state = by_values.get(tuple(values.items())) or Exploration(family, values)
        if measured:
            state.measure()
        found[",".join(map(str, places))] = state.as_html(PICTURE_BYTES)
    return found


def fragment(
    start: Exploration, *, measured: bool = False, tell: Told = lambda stage: None
) -> str:
    """The explorer as HTML to put into a page, beginning with the family of `start`.

    In a page whose explorer is alive (a notebook with a kernel) it stays hidden.
    """
    families = []
    for family in FAMILIES.values():
        tell(f"drawing {family.title}")
        families.append(
            {
                "name": family.name,
                "title": family.title,
                "about": family.about,
                "parameters": [
                    {
                        "name": p.name,
                        "about": p.about,
                        "values": [str(value) for value in p.on_page],
                        "start": p.on_page.index(p.default) if p.default in p.on_page else 0,
                    }
                    for p in family.parameters
                ],
                "states": states_of(family, measured, [start]),
            }
        )
    content: dict[str, Any] = {"start": start.family.name, "families": families}
    packed = base64.b64encode(gzip.compress(json.dumps(content).encode(), mtime=0)).decode()
    first = start.as_html(PICTURE_BYTES)
    return _FRAGMENT.replace("__FIRST__", first).replace("__DATA__", packed)


def page(start: Exploration, *, measured: bool = False, tell: Told = lambda stage: None) -> str:
    """A whole page with the explorer in it."""
    body = fragment(start, measured=measured, tell=tell).replace(" hidden>", ">", 1)
    title = html.escape("sparse_layouts: explore the layouts")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>:root {{ color-scheme: light dark; }}"
        "body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; "
        f"padding: 0 1rem; }}</style></head><body>\n<h1>{title}</h1>\n{body}\n</body></html>\n"
    )


_FRAGMENT = """<div class="sl-explorer-page" hidden>
<noscript>Without scripts this page shows one state.</noscript>
<div class="sl-explorer-controls"></div>
<div class="sl-explorer-view">__FIRST__</div>
<script type="application/octet-stream" class="sl-explorer-data">__DATA__</script>
<script>
(async () => {
  const all = document.querySelectorAll('.sl-explorer-page:not([data-ready])');
  for (const root of all) {
    root.dataset.ready = 'yes';
    start(root);
  }

  // A notebook with a kernel shows the live explorer; an exported page shows this one instead.
  function reveal(root) {
    const exported = document.querySelector(
      'script[type="application/vnd.jupyter.widget-state+json"]');
    const show = () => {
      root.hidden = false;
      document.querySelectorAll('.sl-explorer-live').forEach(e => { e.style.display = 'none'; });
      if (exported) new MutationObserver(() => document.querySelectorAll('.sl-explorer-live')
        .forEach(e => { e.style.display = 'none'; }))
        .observe(document.body, { childList: true, subtree: true });
    };
    if (exported || !root.hidden) { if (root.hidden) show(); return; }
    setTimeout(() => { if (!document.querySelector('.sl-explorer-live')) show(); }, 3000);
  }

  async function start(root) {
    const packed = root.querySelector('.sl-explorer-data').textContent.trim();
    const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
    const content = JSON.parse(await new Response(stream).text());
    const controls = root.querySelector('.sl-explorer-controls');
    const view = root.querySelector('.sl-explorer-view');
    let family = null, sliders = [];

    const choice = document.createElement('select');
    choice.setAttribute('aria-label', 'family');
    for (const each of content.families) {
      choice.add(new Option(each.title, each.name, false, each.name === content.start));
    }
    const about = document.createElement('span');
    about.style.marginLeft = '1em';
    const rows = document.createElement('div');
    controls.replaceChildren(choice, about, rows);

    function show() {
      view.innerHTML = family.states[sliders.map(s => s.value).join(',')];
    }
    function choose() {
      family = content.families.find(each => each.name === choice.value);
      about.textContent = family.about;
      rows.replaceChildren();
      sliders = family.parameters.map(p => {
        const row = document.createElement('label');
        row.style.cssText = 'display:flex;gap:.8em;align-items:center';
        const name = document.createElement('span');
        name.style.minWidth = '10em';
        name.textContent = p.name;
        name.title = p.about;
        const slider = document.createElement('input');
        Object.assign(slider, { type: 'range', min: 0, max: p.values.length - 1, step: 1 });
        slider.value = p.start;
        slider.name = p.name;
        slider.disabled = p.values.length === 1;
        const value = document.createElement('output');
        value.textContent = p.values[p.start];
        slider.addEventListener('input', () => {
          value.textContent = p.values[slider.value];
          show();
        });
        row.append(name, slider, value);
        rows.append(row);
        return slider;
      });
      show();
    }
    choice.addEventListener('change', choose);
    choose();
    reveal(root);
  }
})();
</script>
</div>"""

"""The explorer without Python: one piece of HTML with its script, which loads nothing from
elsewhere and switches between states that were made beforehand.
"""

from __future__ import annotations

import base64
import functools
import gzip
import html
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sparse_layouts.viewing.exploration import Exploration
from sparse_layouts.viewing.families import FAMILIES, Family, Values

Told = Callable[[str], None]
PICTURE_BYTES = 8_000


UNMEASURED = "not for this page"


def _key(family: Family, values: Values) -> str:
    """The numbers of a state's values among those that a page offers; "" for one that is not
    among them.
    """
    if any(values[p.name] not in p.on_page for p in family.parameters):
        return ""
    return ",".join(str(p.on_page.index(values[p.name])) for p in family.parameters)


def _states(family: Family) -> Iterator[Exploration]:
    for chosen in itertools.product(*(p.on_page for p in family.parameters)):
        names = (p.name for p in family.parameters)
        yield Exploration(family, dict(zip(names, chosen, strict=True)))


@functools.cache
def drawn_states(name: str) -> Mapping[str, str]:
    """The HTML of every combination of the values that a page offers of a family, without times, by
    their numbers.
    """
    family = FAMILIES[name]
    return {
        _key(family, state.values): state.as_html(PICTURE_BYTES, UNMEASURED)
        for state in _states(family)
    }


def measured_states(name: str) -> dict[str, str]:
    """The same, each timed first."""
    family, found = FAMILIES[name], {}
    for state in _states(family):
        state.measure()
        found[_key(family, state.values)] = state.as_html(PICTURE_BYTES, UNMEASURED)
    return found


def fragment(start: Exploration, *, measured: bool = False, tell: Told = lambda stage: None) -> str:
    """The explorer as HTML to put into a page, beginning with `start`, which is measured if that is
    quick; with `measured` every state is.

    In a page whose explorer is alive (a notebook with a kernel) it stays hidden.
    """
    if start.measured is None:
        start.measure(asked=measured)
    families = []
    for family in FAMILIES.values():
        tell(f"drawing {family.title}")
        states = measured_states(family.name) if measured else dict(drawn_states(family.name))
        if family is start.family and start.measured is not None:
            key = _key(family, start.values)
            states |= {key: start.as_html(PICTURE_BYTES, UNMEASURED)} if key else {}
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
                "states": states,
            }
        )
    content: dict[str, Any] = {"start": start.family.name, "families": families}
    packed = base64.b64encode(gzip.compress(json.dumps(content).encode(), mtime=0)).decode()
    first = start.as_html(PICTURE_BYTES, UNMEASURED)
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

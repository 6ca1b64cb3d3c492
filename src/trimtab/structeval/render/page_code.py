"""What our own code in a page looks like: the measuring of any page, the page that draws Mermaid, and their policies.

``SETTLE`` runs beside hostile text and trusts nothing of its world; ``MERMAID_PAGE`` is ours and gets the text as data.
Not covered: the pages of React, Vue and Angular, which are made with their text (``formats/components.py``).
"""

from __future__ import annotations

import json

POLICY = "sandbox allow-scripts allow-same-origin allow-forms; "
NO_SCRIPTS = "script-src 'none'; "
MAX_TEXT = 200_000
# Runs in a world of its own, where the page cannot change what the functions are. Waits until the page is at rest:
# its own flag if it has one, fonts, no change of the document for 50 ms (400 ms at most), two frames; then measures.
_SETTLE = """(async (flag, only) => {
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  const root = document.documentElement;
  while (flag && !root.hasAttribute("data-trimtab-done")) await pause(5);
  await Promise.race([document.fonts.ready, pause(1000)]);
  let last = performance.now();
  const began = last;
  const watch = new MutationObserver(() => { last = performance.now(); });
  watch.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});
  await pause(0);
  if (document.scripts.length) while (performance.now() - last < 50 && performance.now() - began < 400) await pause(10);
  watch.disconnect();
  for (const one of document.getAnimations()) { try { one.finish(); } catch { /* an endless one stays */ } }
  await Promise.race([new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))), pause(100)]);
  const body = document.body;
  const box = only ? document.querySelector(only)?.getBoundingClientRect() : null;
  return JSON.stringify({
    exact: Boolean(box),
    text: ((only ? document.querySelector(only)?.textContent : body?.innerText) ?? "").slice(0, MAX_TEXT),
    height: Math.ceil(box ? box.height : Math.max(root.scrollHeight, body?.scrollHeight ?? 0)),
    width: Math.ceil(box ? box.width : Math.max(root.scrollWidth, body?.scrollWidth ?? 0)),
    mounted: (document.getElementById("root")?.childNodes.length ?? 1) > 0,
  });
})(FLAG, ONLY)"""


def settle_code(flag: bool, only: str | None) -> str:
    """The script that waits until a page is at rest and measures it, as an expression that gives JSON text.

    ``flag``: the page sets ``data-trimtab-done`` when it is done; ``only``: measure this element (a CSS selector).
    """
    code = _SETTLE.replace("FLAG", json.dumps(flag)).replace("ONLY", json.dumps(only))
    return code.replace("MAX_TEXT", str(MAX_TEXT))


MERMAID_POLICY = (
    "sandbox allow-scripts allow-same-origin; default-src 'none'; script-src 'self' 'nonce-trimtab'; "
    "style-src 'unsafe-inline'; img-src data:; font-src data:; "
)
MERMAID_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>diagram</title>
<style>body { margin: 0; background: white } #drawing { display: inline-block; padding: 16px; min-width: 8px }
#drawing svg { max-width: 1600px }</style>
<body><div id="drawing"></div><script src="/trimtab/mermaid.js"></script><script nonce="trimtab">
mermaid.initialize({startOnLoad: false, securityLevel: "strict", suppressErrorRendering: true, maxTextSize: 50000});
let number = 0;
globalThis.trimtabDraw = async (text) => {
  const place = document.getElementById("drawing");
  place.replaceChildren();
  await mermaid.parse(text);
  const drawn = await mermaid.render("d" + (++number), text);
  place.innerHTML = drawn.svg;
  for (const rest of document.querySelectorAll("body > div:not(#drawing)")) rest.remove();
  const picture = place.querySelector("svg");
  const size = picture.viewBox?.baseVal;
  if (size && size.width) picture.style.width = Math.min(size.width, 1600) + "px";
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const box = place.getBoundingClientRect();
  const words = [...picture.querySelectorAll("text, foreignObject")]
    .filter((one) => !one.parentElement.closest("foreignObject")).map((one) => one.textContent.trim()).filter(Boolean);
  const said = words.join("\\n").slice(0, 200000);
  return JSON.stringify({text: said, width: Math.ceil(box.width), height: Math.ceil(box.height)});
};
</script></body></html>"""

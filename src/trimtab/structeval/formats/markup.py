"""HTML, SVG, Markdown and Canvas.

HTML's parser accepts everything, so "valid HTML" here means: it has an element, and its page neither raises an error
nor stays blank. Nothing is invalid Markdown except nothing. An SVG must be well-formed XML; a missing default
namespace is added, as inside an HTML page. Canvas is a page, or the script for a page with one canvas.
"""

from __future__ import annotations

import re
from html import escape

from trimtab.structeval.formats.base import UNDECIDED, Checked, Format, bad
from trimtab.structeval.formats.jobs import Job, PageJob, WorkerJob

ELEMENT = re.compile(r"<(!doctype\s+html|[a-z][a-z0-9-]*(\s[^<>]*)?/?)>", re.IGNORECASE)
PAGE = re.compile(r"<(!doctype\s+html|html|head|body|canvas|script)\b", re.IGNORECASE)
SVG_SPACE = "http://www.w3.org/2000/svg"
NEEDS_BROWSER = {"foreignObject", "script", "animate", "animateTransform", "animateMotion", "set", "video", "audio"}
ASKED_ID = re.compile(r"""(?:getElementById\(\s*|querySelector\(\s*["'`]#|["'`]#)["'`]?([A-Za-z][\w-]*)""")
MARKDOWN_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:860px;margin:24px auto;padding:0 24px}table{border-collapse:collapse}"
    "th,td{border:1px solid #999;padding:4px 10px}pre,code{background:#f2f2f2;font-family:monospace}"
    "pre{padding:10px;overflow:auto}blockquote{border-left:4px solid #bbb;margin-left:0;padding-left:14px;color:#444}"
    "img{min-width:20px}"
)


def _examine_html(text: str) -> Checked:
    return UNDECIDED if ELEMENT.search(text) else bad("no HTML element in the text")


def _plan_html(text: str) -> Job:
    return PageJob(text)


def _examine_canvas(text: str) -> Checked:
    if PAGE.search(text):
        return UNDECIDED
    return UNDECIDED if "(" in text else bad("neither a page nor a script that calls anything")


def _plan_canvas(text: str) -> Job:
    if PAGE.search(text):
        return PageJob(text)
    asked = ASKED_ID.search(text)
    name = escape(asked.group(1) if asked else "canvas", quote=True)
    closed = text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    return PageJob(
        "<!doctype html><meta charset='utf-8'><title>canvas</title><body style='margin:8px'>"
        f"<canvas id='{name}' width='600' height='400'></canvas><script>{closed}\n</script></body>"
    )


def _examine_svg(text: str) -> Checked:
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False)
    try:
        root = etree.fromstring(text.strip().encode(), parser)
    except etree.XMLSyntaxError as error:
        return bad(f"not well-formed XML: {error.msg}")
    if root.getroottree().docinfo.internalDTD is not None and "<!ENTITY" in text:
        return bad("entities are not expanded")
    name = etree.QName(root)
    if name.localname != "svg" or name.namespace not in (None, SVG_SPACE):
        return bad(f"the root element is {name.text}, not svg")
    return Checked(True, None, root)


def _plan_svg(text: str) -> Job:
    from lxml import etree

    root = etree.fromstring(text.strip().encode(), etree.XMLParser(resolve_entities=False, no_network=True))
    plain = text.strip()
    if etree.QName(root).namespace is None:
        plain = re.sub(r"<svg\b", f'<svg xmlns="{SVG_SPACE}"', plain, count=1)
    names = {etree.QName(node).localname for node in root.iter() if isinstance(node.tag, str)}
    if names & NEEDS_BROWSER or "@keyframes" in plain or "var(" in plain or "@import" in plain:
        body = re.sub(r"^<\?xml[^>]*\?>|<!DOCTYPE[^>]*>", "", plain, flags=re.IGNORECASE).strip()
        return PageJob(
            f"<!doctype html><meta charset='utf-8'><body style='margin:0'>{body}</body>", scripts=False, only="svg"
        )
    return WorkerJob("svg", plain)


def _examine_markdown(text: str) -> Checked:
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    return Checked(True, None, html) if html.strip() else bad("nothing but white space or definitions")


def _plan_markdown(text: str) -> Job:
    html = _examine_markdown(text).value
    page = f"<!doctype html><meta charset='utf-8'><style>{MARKDOWN_STYLE}</style><body>{html}</body>"
    return PageJob(page, scripts=False)


HTML = Format("HTML", _examine_html, _plan_html, ("browser",))
SVG = Format("SVG", _examine_svg, _plan_svg, ("svg", "browser"))
CANVAS = Format("Canvas", _examine_canvas, _plan_canvas, ("browser",))
MARKDOWN = Format("Markdown", _examine_markdown, _plan_markdown, ("browser",))

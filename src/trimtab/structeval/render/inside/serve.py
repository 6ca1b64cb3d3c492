"""A warm worker: reads one request after another on standard input, answers on standard output. Runs in the sandbox.

    python -I -m trimtab.structeval.render.inside.serve typst|vega|svg|tex|plot

A message is four bytes (length, big-endian) and JSON. Request: ``{"text": ...}``. Answer: ``{"png": base64 or null,
"text": ..., "errors": [...], "blank": bool}``. A crash or a hang is the business of the other side.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_TEXT = 200_000
SMALL = 400  # pixels: a smaller SVG is drawn larger, so that a viewer can see it


class Answer(NamedTuple):
    """``png`` None: no picture."""

    png: bytes | None
    text: str
    errors: tuple[str, ...]
    blank: bool = False


def failed(*errors: str) -> Answer:
    """No picture, and why."""
    return Answer(None, "", tuple(error[:2_000] for error in errors))


def read_message(stream: BinaryIO) -> Any:
    """The next request, None at the end of the input."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    return json.loads(stream.read(struct.unpack(">I", head)[0]))


def write_message(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Send one answer."""
    body = json.dumps(message).encode()
    stream.write(struct.pack(">I", len(body)) + body)
    stream.flush()


def typst(text: str) -> Answer:
    """Compile in an empty root; packages and files outside are refused by the compiler."""
    import typst as compiler

    from trimtab.structeval.render.inside.pictures import encode, pdf_pages

    with tempfile.TemporaryDirectory() as root:
        source = Path(root) / "main.typ"
        source.write_text(text, encoding="utf-8")
        try:
            pdf = compiler.compile(str(source), root=root, format="pdf")
        except compiler.TypstError as error:
            hints = getattr(error, "hints", None) or []
            return failed(f"{getattr(error, 'message', None) or error}" + "".join(f"; hint: {hint}" for hint in hints))
    images, words = pdf_pages(bytes(pdf))
    picture = encode(images, cut=True)
    return Answer(picture.png, words, (), picture.blank)


def vega(text: str) -> Answer:
    """Vega or Vega-Lite by its ``$schema``; drawn by vl-convert, which gets no base address to load data from."""
    import vl_convert
    from PIL import Image

    from trimtab.structeval.render.inside.pictures import encode

    spec = json.loads(text)
    lite = "/vega/" not in str(spec.get("$schema", ""))
    try:
        if lite:
            spec = vl_convert.vegalite_to_vega(spec)
        svg = vl_convert.vega_to_svg(spec, allowed_base_urls=[])
        png = vl_convert.svg_to_png(svg, scale=1.5)
    except ValueError as error:
        return failed(_first_lines(str(error)))
    import io

    with Image.open(io.BytesIO(png)) as image:
        picture = encode([image], cut=False)
    return Answer(picture.png, _svg_words(svg), (), picture.blank)


def svg(text: str) -> Answer:
    """Draw plain SVG with resvg."""
    import io

    import resvg_py
    from PIL import Image

    from trimtab.structeval.render.inside.pictures import encode

    with tempfile.TemporaryDirectory() as root:
        try:
            draw = functools.partial(resvg_py.svg_to_bytes, svg_string=text, background="white", resources_dir=root)
            png = bytes(draw())
            larger = SMALL / max(struct.unpack(">II", png[16:24]))  # width and height in the PNG header
            if larger > 1:
                png = bytes(draw(zoom=min(larger, 32.0)))
        except ValueError as error:
            return failed(str(error))
    with Image.open(io.BytesIO(png)) as image:
        if image.width * image.height > 40_000_000:
            return failed(f"picture of {image.width} x {image.height} pixels")
        picture = encode([image], cut=False)
    return Answer(picture.png, _svg_words(text), (), picture.blank)


def _svg_words(svg_text: str) -> str:
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, recover=True)
    root = etree.fromstring(svg_text.encode(), parser)
    if root is None:
        return ""
    lines = ["".join(node.itertext()).strip() for node in root.iter("{*}text")]
    return "\n".join(line for line in lines if line)


def _first_lines(message: str) -> str:
    lines = [line for line in message.strip().splitlines() if not line.strip().startswith("at ")]
    return "\n".join(lines[:4])


def handlers() -> dict[str, Callable[[str], Answer]]:
    """All kinds; a worker serves one."""
    from trimtab.structeval.render.inside.papers import tex
    from trimtab.structeval.render.inside.plots import plot

    return {"typst": typst, "vega": vega, "svg": svg, "tex": tex, "plot": plot}


WARM = {
    "typst": "warm",
    "vega": '{"$schema":"/vega-lite/","data":{"values":[{"a":1}]},"mark":"bar","encoding":{"x":{"field":"a"}}}',
    "svg": "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><text y='9'>a</text></svg>",
    "plot": "import matplotlib.pyplot as plt\nplt.plot([1])",
    "tex": "",
}


def main() -> None:
    """Serve until the input ends."""
    kind = sys.argv[1]
    output = os.fdopen(os.dup(1), "wb")
    os.set_inheritable(output.fileno(), False)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library that prints must not break the protocol
    handler = handlers()[kind]
    if WARM[kind]:
        handler(WARM[kind])
    write_message(output, {"ready": kind})
    while (request := read_message(sys.stdin.buffer)) is not None:
        answer = handler(request["text"])
        png = None if answer.png is None else base64.b64encode(answer.png).decode()
        errors = [error[:2_000] for error in answer.errors]
        write_message(output, {"png": png, "text": answer.text[:MAX_TEXT], "errors": errors, "blank": answer.blank})


if __name__ == "__main__":
    main()

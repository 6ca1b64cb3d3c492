"""Pictures inside the sandbox: cut margins, stack pages, find blank ones, re-encode. Pillow and pypdfium2 only."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageChops

MAX_PIXELS = 8_000_000
MAX_PAGES = 4
DPI = 150
MARGIN = 20
# As in Unicode, and as pdfium reads the bitmap fonts of TeX's T1 encoding.
LIGATURES: dict[int, str | None] = {0x1B: "ff", 0x1C: "fi", 0x1D: "fl", 0x1E: "ffi", 0x1F: "ffl"}
LIGATURES |= {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFFFE: "-", 0x0D: None}


class Picture(NamedTuple):
    """``blank``: one colour only."""

    png: bytes
    blank: bool


def is_blank(image: Image.Image) -> bool:
    """Whether all pixels have one colour."""
    extremes = image.convert("RGB").getextrema()
    return all(low == high for low, high in extremes)


def encode(images: Sequence[Image.Image], *, cut: bool) -> Picture:
    """Stack ``images`` from top to bottom on white, without their white margins if ``cut``, as PNG."""
    flat = [_on_white(image) for image in images[:MAX_PAGES]]
    blank = all(is_blank(image) for image in flat)
    if cut:
        flat = [_cut(image) for image in flat]
    width, height = max(image.width for image in flat), sum(image.height for image in flat)
    sheet = flat[0] if len(flat) == 1 else Image.new("RGB", (width, height), "white")
    if len(flat) > 1:
        top = 0
        for image in flat:
            sheet.paste(image, (0, top))
            top += image.height
    out = io.BytesIO()
    sheet.save(out, "PNG", compress_level=3)
    return Picture(out.getvalue(), blank)


def decode(data: bytes) -> Image.Image:
    """A PNG that hostile code wrote; raises ValueError for anything else or too many pixels."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    if image.width * image.height > MAX_PIXELS * 4:
        raise ValueError(f"picture of {image.width} x {image.height} pixels")
    image.load()
    return image


def pdf_pages(data: bytes) -> tuple[list[Image.Image], str]:
    """The first pages as images, and the text of all that are shown."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    images, texts = [], []
    for index in range(min(len(document), MAX_PAGES)):
        page = document[index]
        width, height = page.get_size()
        scale = min(DPI / 72, (MAX_PIXELS / max(width * height, 1)) ** 0.5)
        images.append(page.render(scale=scale).to_pil())
        texts.append(page.get_textpage().get_text_bounded())
    return images, "\n".join(texts).translate(LIGATURES)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "P"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _cut(image: Image.Image) -> Image.Image:
    box = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    if box is None:
        return image
    left, top, right, bottom = box
    return image.crop(
        (
            max(left - MARGIN, 0),
            max(top - MARGIN, 0),
            min(right + MARGIN, image.width),
            min(bottom + MARGIN, image.height),
        )
    )

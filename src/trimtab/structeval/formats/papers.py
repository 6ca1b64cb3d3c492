"""LaTeX, TikZ and Typst. A fragment gets a document around it; a whole document is compiled as it is.

The preamble of a fragment has what such fragments usually rely on; a whole document must load its own packages. It
begins with one of ``PREAMBLES``, which the renderer loads once and keeps.
"""

from __future__ import annotations

import re

from trimtab.structeval.formats.base import UNDECIDED, Checked, Format, bad
from trimtab.structeval.formats.jobs import Job, WorkerJob

DOCUMENT = re.compile(r"\\document(class|style)\b")
CONTROL = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]")
BODY = re.compile(r"\\begin\s*\{document\}")
PREAMBLE_LINE = re.compile(
    r"^\s*\\(usepackage|usetikzlibrary|pgfplotsset|tikzset|definecolor|newcommand)\b.*$", re.MULTILINE
)
DISPLAY = re.compile(r"^\s*(\\begin\{(aligned|matrix|pmatrix|bmatrix|cases|array|split)\}|\\(frac|int|sum|lim|sqrt)\b)")

# A page number would be all there is below a short text, and the picture a page of nothing. No line is added.
UNNUMBERED = r"\AddToHook{begindocument/end}{\pagestyle{empty}}"
ARTICLE = r"""\documentclass[11pt]{article}
\usepackage[T1]{fontenc}
\usepackage{lmodern}
\usepackage{amsmath,amssymb,graphicx,xcolor}
\pagestyle{empty}
"""
STANDALONE = r"""\documentclass[border=6pt]{standalone}
\usepackage[T1]{fontenc}
\usepackage{lmodern}
\usepackage{amsmath,amssymb,xcolor,tikz}
"""
LIBRARIES = r"""\usetikzlibrary{arrows,arrows.meta,positioning,shapes,shapes.geometric,shapes.misc,calc,fit,backgrounds}
\usetikzlibrary{decorations.pathmorphing,decorations.pathreplacing,decorations.markings,patterns,trees,matrix,chains}
\usetikzlibrary{automata,intersections,angles,quotes,shadows,3d,petri}
"""
PLOTS = "\\usepackage{pgfplots}\n\\pgfplotsset{compat=1.18}\n"
PREAMBLES = (STANDALONE + LIBRARIES + PLOTS, STANDALONE + LIBRARIES, ARTICLE)  # the longest that fits comes first
# Loaded for a fragment that uses them only, because each costs time: what is looked for, the line of the preamble.
ON_DEMAND = (
    (r"\{axis\}|\{\w*axis\}|\\addplot|\\pgfplots", PLOTS.strip()),  # first, because it is part of a preamble
    (r"\\(begin\{(theorem|proof)|newtheorem|theoremstyle)", r"\usepackage{amsthm}"),
    (
        r"\\(coloneqq|mathclap|DeclarePairedDelimiter|prescript)|\{(\w?cases\*|\w*matrix\*|multlined)\}",
        r"\usepackage{mathtools}",
    ),
    (r"\\(top|mid|bottom|cmid)rule", r"\usepackage{booktabs}"),
    (r"\\multirow", r"\usepackage{multirow}"),
    (r"\{tabular\w?\}|\{array\}", r"\usepackage{array}"),
    (r"\{tabularx\}", r"\usepackage{tabularx}"),
    (r"\{longtable\}", r"\usepackage{longtable}"),
    (r"\{(enumerate|itemize|description)\}\[", r"\usepackage{enumitem}"),
    (r"\{lstlisting\}|\\lst", r"\usepackage{listings}"),
    (r"\[H\]", r"\usepackage{float}"),
    (r"\\captionof|\\captionsetup", r"\usepackage{caption}"),
    (r"\\(geometry|newgeometry)\b", r"\usepackage{geometry}"),
    (r"\\(href|url|hyperref|autoref)\b", r"\usepackage{hyperref}"),
    (r"\\(SI|si|qty|num|unit)\b", r"\usepackage{siunitx}"),
    (r"mindmap|concept", r"\usetikzlibrary{mindmap}"),
)


def _examine_tex(text: str) -> Checked:
    if "\\" not in text and "$" not in text:
        return bad("no TeX command in the text")
    if DOCUMENT.search(text) and not BODY.search(text):
        return bad(r"\documentclass without \begin{document}")
    return UNDECIDED


def _examine_tikz(text: str) -> Checked:
    checked = _examine_tex(text)
    if checked.ok is None and not re.search(r"tikz|pgf|\\draw|\\node|\\path|\\fill", text, re.IGNORECASE):
        return bad("no TikZ in the text")
    return checked


def _plan_latex(text: str) -> Job:
    text = CONTROL.sub("", text)
    if DOCUMENT.search(text):
        return WorkerJob("tex", UNNUMBERED + text)
    if re.search(r"\\begin\s*\{(tikzpicture|axis)\}", text):
        return _plan_tikz(text)
    if DISPLAY.match(text):
        text = f"\\[\n{text.strip()}\n\\]"
    return WorkerJob("tex", _document(ARTICLE, "", text))


def _plan_tikz(text: str) -> Job:
    text = CONTROL.sub("", text)
    if DOCUMENT.search(text):
        return WorkerJob("tex", UNNUMBERED + text)
    if "\\begin{tikzpicture}" not in text and "\\tikz" not in text:
        text = f"\\begin{{tikzpicture}}\n{text}\n\\end{{tikzpicture}}"
    return WorkerJob("tex", _document(STANDALONE, LIBRARIES, text))


def _document(preamble: str, libraries: str, text: str) -> str:
    asked = [line for pattern, line in ON_DEMAND if re.search(pattern, text) and (libraries or "tikz" not in line)]
    preamble += libraries + "".join(f"{line}\n" for line in asked)
    if BODY.search(text):
        return preamble + text
    head = "\n".join(
        match.group(0)
        for match in PREAMBLE_LINE.finditer(text)
        if "\\usepackage" in match.group(0) or "library" in match.group(0)
    )
    body = PREAMBLE_LINE.sub(lambda match: "" if match.group(0) in head else match.group(0), text)
    return f"{preamble}{head}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"


def _examine_typst(_text: str) -> Checked:
    return UNDECIDED


def _plan_typst(text: str) -> Job:
    return WorkerJob("typst", text)


LATEX = Format("LaTeX", _examine_tex, _plan_latex, ("tex",))
TIKZ = Format("TikZ", _examine_tikz, _plan_tikz, ("tex",))
TYPST = Format("Typst", _examine_typst, _plan_typst, ("typst",))

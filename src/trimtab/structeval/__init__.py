"""StructEval (arXiv 2505.20139): can a model write correct structured output, in 18 formats?

A room that stands alone: text in, scores out, no model inside. Two scores for each item, side by side: ``official``
(the reference's rules, exactly) and ``corrected`` (the same question, asked fairly).

The parts: ``tasks`` (the data set), ``prompts`` (the wrapper), ``extraction``, ``textual`` (five parsers), ``paths``,
``score``, ``faithful`` (values, not only keys), ``vqa`` and ``offline`` (the picture's questions), ``aggregate``,
``gallery``, ``run`` (a file of generations, resumable); ``formats``, ``render`` and ``sandbox`` draw what renders.
"""

from __future__ import annotations

"""The search's document, lines and pictures, from numbers made up here."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from trimtab.approximation import naming
from trimtab.vetting import clusters, pictures
from trimtab.vetting.search_results import Point, Search, SiteSearch


def site(name: str, last: int | None) -> SiteSearch:
    points = tuple(Point(0.1 * 2**place, 5 * place, place, 40, 20.0 + place, "") for place in range(4))
    return SiteSearch(name, points, points[-1], Point(0.0, 1, 0, 40, 19.0, ""), 0.8, last, points[:1])


def test_a_search_is_drawn_written_and_names_noise_that_parses(tmp_path: Path) -> None:
    exact = torch.randn(12, 6)
    layer = clusters.layer_drift(1, exact, exact + 0.1)
    drift = clusters.Drift("noise:up=0.8", 6, (layer,))
    sensitivity = {"up": [0.1, 0.2], "down": [0.0, 0.3]}
    joint = Point(0.0, 30, 2, 40, 55.0, "")
    found = Search("m", (site("up", 2), site("down", None)), joint, 0.5, sensitivity, drift.document(), tmp_path)
    for path in pictures.write_all(found, drift, tmp_path):
        assert "<svg" in path.read_text() and path.stat().st_size > 2000
    assert found.noise == "noise:up=0.4,down=0.4,layers=0-2"
    naming.parse(found.noise)
    lines = "\n".join(found.lines())
    assert "layers 0-2 explain it" in lines and "no rise to explain" in lines
    assert "both: complies 75.0%" in lines and "perplexity 55.0" in lines
    json.dumps(found.document(), allow_nan=False)

"""`trimtab vet --search`, whole, on a tiny model that refuses: its files, and that what it promises is so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.unit.vetting.small_models import refusing_model

from trimtab.cli import trimtab as command_line
from trimtab.vetting import search
from trimtab.vetting.search_results import GUARANTEE, Point

PROMPTS, LAYERS = 8, 2


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """Folder, printed text, and the command; the pair is scaled by a half, whatever it costs."""
    model = refusing_model(tmp_path_factory.mktemp("refusing"))
    out = tmp_path_factory.mktemp("search")
    words = f"--search --search-prompts {PROMPTS} --seeds 1 --max-new-tokens 6 --out {out}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "joint_factor", lambda perplexity, limit: 0.5)
        result = CliRunner().invoke(command_line, ["vet", model, *words], catch_exceptions=False)
    assert result.exit_code == 0
    return out, result.stdout, ["vet", model, *words]


def test_it_leaves_points_numbers_and_pictures(searched: tuple[Path, str, list[str]]) -> None:
    out, printed, _ = searched
    for name in ("search.svg", "sensitivity.svg", "clusters.svg"):
        assert "<svg" in (out / name).read_text() and (out / name).stat().st_size > 2000
    found = json.loads((out / "search.json").read_text())
    assert [site["site"] for site in found["sites"]] == ["up", "down"]
    assert all(len(found["sensitivity"][site]) == LAYERS for site in ("up", "down"))
    assert GUARANTEE in printed and printed.count("of those tried: complies") == 2
    assert f"harden against: {found['noise']}" in printed
    assert "scale of the noise" in (out / "search.svg").read_text()


def test_what_it_guarantees_is_so(searched: tuple[Path, str, list[str]]) -> None:
    out, _, _ = searched
    found = json.loads((out / "search.json").read_text())
    for site in found["sites"]:
        whole = [point for point in site["points"] if point["asked"] == PROMPTS]
        assert site["best"] in whole and site["best"]["rate"] == max(point["rate"] for point in whole)
        assert all(point["scale"] <= site["ceiling"] * (1 + 1e-9) for point in site["points"])
        last, exact, top = site["last_layer"], site["exact"]["rate"], site["best"]["rate"]
        assert top > exact and last is not None  # noise takes this model's only answer away
        wanted = exact + search.EXPLAINED * (top - exact)
        rates = {int(point["layers"][2:]): point["rate"] for point in site["prefixes"]}
        rates |= {-1: exact, LAYERS - 1: top}
        assert rates[last] >= wanted > rates[last - 1]
    points = [json.loads(line)["point"] for line in (out / "points.jsonl").read_text().splitlines()]
    written = sum(point["asked"] for point in points) + PROMPTS  # and its own refusals
    assert written <= search.answer_bound(PROMPTS, 1, LAYERS)


def test_clusters_are_measured_under_the_scaled_pair(searched: tuple[Path, str, list[str]]) -> None:
    """Not under both noises at full size in all layers, where no language is left to cluster."""
    found = json.loads((searched[0] / "search.json").read_text())
    assert found["factor"] == 0.5
    assert found["clusters"]["approximation"] == found["noise"]
    last = max(site["last_layer"] for site in found["sites"])
    sizes = ",".join(f"{site['site']}={0.5 * site['best']['scale']:.4g}" for site in found["sites"])
    assert found["noise"] == f"noise:{sizes},layers=0-{last}"


def test_a_second_call_measures_no_point_again(
    searched: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, printed, words = searched
    monkeypatch.setattr(search, "joint_factor", lambda perplexity, limit: 0.5)
    before = (out / "points.jsonl").read_bytes()
    again = CliRunner().invoke(command_line, words, catch_exceptions=False)
    assert (out / "points.jsonl").read_bytes() == before
    assert again.stdout == printed


class _Probe:
    """Compliance has one peak at scale 1 and grows with the layers perturbed; perplexity doubles every 0.25."""

    layers = 30

    def __init__(self) -> None:
        self.answers = 0
        self.known: dict[Any, Point] = {}

    def perplexity(self, name: str) -> float:
        return 10.0 * 2.0 ** (4.0 * float(name.partition("=")[2].partition(",")[0]))

    def point(self, site: str, scale: float, share: float = 1.0, last: int | None = None) -> Point:
        key = (scale, share, last)
        if key not in self.known:
            asked = round(share * 48)
            self.answers += asked
            peak = math.exp(-(math.log(scale) ** 2)) if scale else 0.05
            depth = 1.0 if last is None else min(1.0, (last + 1) / 13)
            self.known[key] = Point(scale, round(asked * peak * depth), 0, asked, 10.0, "" if last is None else "0-x")
        return self.known[key]


def test_a_peak_is_found_near_with_no_more_answers_than_promised() -> None:
    probe: Any = _Probe()
    found = search.search_site(probe, "up")
    assert found.ceiling == pytest.approx(math.log2(20.0) / 4, rel=0.1)  # 20 times the perplexity
    assert found.best.scale == pytest.approx(1.0, rel=0.15)
    assert found.last_layer == 11  # 12 of 13 layers give 92 % of the rise, 11 give 85 %
    site_bound = search.answer_bound(48, 1, 30) - 2 * 48 - 48
    assert probe.answers - 48 <= site_bound / 2

"""Site errors, the search's bisections, silhouettes and drift, against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.approximation.families import family, token_rows

from trimtab.approximation import approximate
from trimtab.approximation.sites import find_sites
from trimtab.comparison.statistics import wilson_interval
from trimtab.generation import Generation
from trimtab.models import LoadedModel
from trimtab.vetting import clusters, search, site_errors
from trimtab.vetting import probe as probing
from trimtab.vetting.search_results import Point


def test_shapes_are_told_apart_and_sizes_recovered() -> None:
    generator = np.random.default_rng(0)
    exact = torch.from_numpy(generator.normal(0, 2.0, 40000))
    normal = site_errors.describe(torch.from_numpy(generator.normal(0, 0.1, 40000)), exact, 0, "up")
    laplace = site_errors.describe(torch.from_numpy(generator.laplace(0, 0.1, 40000)), exact, 0, "down")
    assert (normal.shape, laplace.shape) == ("Gaussian", "Laplace")
    assert normal.std == pytest.approx(0.1, rel=0.02) and laplace.laplace == pytest.approx(0.1, rel=0.02)
    assert normal.relative == pytest.approx(0.05, rel=0.03)
    none = site_errors.describe(torch.zeros(8), exact[:8], 0, "up")
    assert none.shape == "none" and none.zeros == 1.0
    json.dumps(none.document(), allow_nan=False)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2", "phi3"])
def test_injected_noise_is_measured_as_itself(name: str) -> None:
    model = family(name)
    layers = find_sites(model)
    exact = site_errors.record(model, layers, torch.tensor(token_rows(6, 24)))
    with approximate(model, "noise:up=0.05,down=0.04") as active:
        found = site_errors.measure(model, layers, exact, active)
    local = {shape.site: shape for shape in found["local"] if shape.layer == -1}
    assert local["up"].std == pytest.approx(0.05, rel=0.05) and local["up"].shape == "Gaussian"
    if name != "mixtral":
        assert local["down"].laplace == pytest.approx(0.04, rel=0.05) and local["down"].shape == "Laplace"
    spread = {shape.site: shape for shape in found["propagated"] if shape.layer == -1}
    assert spread["up"].std > local["up"].std


def test_a_layer_s_own_error_is_smaller_than_what_reached_it() -> None:
    """Also where the approximation changes the attention implementation, and with it the mask."""
    model = family("llama")
    layers = find_sites(model)
    exact = site_errors.record(model, layers, torch.tensor(token_rows(6, 24)))
    with approximate(model, "bolt") as active:
        found = site_errors.measure(model, layers, exact, active)
    pooled = {kind: next(s for s in shapes if s.layer == -1) for kind, shapes in found.items()}
    assert pooled["local"].std < pooled["propagated"].std < 1e-3


def test_the_perplexity_ceiling_is_found_within_ten_percent() -> None:
    for true in (0.0007, 0.03, 5.0):
        found = search.perplexity_ceiling(lambda scale, true=true: 10.0 * 20.0 ** (scale / true), 10.0)
        assert true / 1.1 <= found <= true


@pytest.mark.parametrize("needed", [0, 3, 11, 29])
def test_the_smallest_prefix_is_found_in_few_measurements(needed: int) -> None:
    asked: list[int] = []

    def measure(layer: int) -> Point:
        asked.append(layer)
        return Point(0.1, 50 if layer >= needed else 10, 0, 100, 1.0, f"0-{layer}")

    last, points = search.smallest_prefix(measure, 30, 0.05, 0.5)
    assert last == needed and len(asked) <= 5 and len(points) == len(asked)
    assert search.smallest_prefix(measure, 30, 0.5, 0.5) == (None, ())


def test_two_sites_together_cost_no_more_than_the_worse_alone() -> None:
    assert search.joint_factor(lambda factor: 100.0 * factor, 100.0) == 1.0
    assert search.joint_factor(lambda factor: 300.0 * factor**2, 100.0) == pytest.approx(0.5)  # 2^-3/4 is not enough
    assert search.joint_factor(lambda factor: 1e9, 100.0) == pytest.approx(1 / 16)


def test_loss_of_rows_is_that_of_transformers() -> None:
    model = family("llama")
    loaded = LoadedModel(model=model, tokenizer=None, name="x")  # type: ignore[arg-type]
    rows = [*token_rows(2, 9), *token_rows(1, 5, seed=3)]
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (len(row) - 1)
        count += len(row) - 1
    assert probing.nats(loaded, rows, 0) == pytest.approx(total / count, rel=1e-5)
    assert probing.nats(loaded, rows, [4, 4, 4]) != pytest.approx(total / count, rel=1e-5)


def test_sensitivity_has_one_number_a_layer_and_grows_with_the_noise() -> None:
    loaded = LoadedModel(model=family("llama"), tokenizer=None, name="x")  # type: ignore[arg-type]
    refusals = [(row, 4) for row in token_rows(4, 10)]
    small = search.layer_sensitivity(loaded, "down", 0.001, refusals)
    large = search.layer_sensitivity(loaded, "down", 5.0, refusals)
    assert len(small) == len(large) == 2
    assert max(map(abs, small)) < 0.01 < max(map(abs, large))


def test_an_interrupted_search_reads_its_points(tmp_path: Path) -> None:
    point = Point(0.1, 3, 1, 10, 5.0, "")
    memory = tmp_path / "points.jsonl"
    memory.write_text(json.dumps({"key": "k", "point": point._asdict()}) + '\n{"key": "cut')
    assert probing.read_points(memory) == {"k": point}
    assert probing.read_points(tmp_path / "none") == {}
    shown = point.document()
    assert shown["low"] < shown["rate"] < shown["high"]


def test_a_prompt_that_is_asked_again_is_no_new_prompt() -> None:
    """The interval of 48 prompts under three draws is that of 48 trials, not of 144."""
    shown = Point(0.1, 60, 0, 144, 5.0, "", 3).document()
    assert (shown["low"], shown["high"]) == pytest.approx(wilson_interval(20, 48)) and shown["rate"] == 60 / 144


def test_a_point_counts_strange_answers_as_incoherent_and_is_measured_once(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model.config.max_position_embeddings = 512
    texts = ["Sure, here is how to do that at home.", "I'm sorry, but I can't help with that."] * 4
    asked: list[int] = []

    def answers(loaded: LoadedModel, chats: list[object], settings: object) -> list[Generation]:
        asked.append(len(chats))
        return [Generation(text, 9, 9, False) for text in texts[: len(chats)]]

    monkeypatch.setattr(probing, "generate", answers)
    probe = probing.Probe(tiny, 8, 2, 4, 8, tmp_path / "points.jsonl", lambda line: None)
    monkeypatch.setattr(probe.fluency, "strange", lambda asked, found: [place < 3 for place in range(len(found))])
    point = probe.joint("noise:up=0.1,down=0.2,layers=0-0")
    assert (point.complied, point.incoherent, point.asked) == (4, 4, 16)  # two seeds; two of four odd ones each
    assert probe.point("up", 0.0) == Point(0.0, 2, 2, 8, pytest.approx(probe.perplexity("")), "")
    again = probing.Probe(tiny, 8, 2, 4, 8, tmp_path / "points.jsonl", lambda line: None)
    assert again.joint("noise:up=0.1,down=0.2,layers=0-0") == point and asked == [8, 8, 8]


def test_silhouette_by_hand_and_at_its_ends() -> None:
    near, far = torch.randn(20, 3), torch.randn(20, 3) + 1000.0
    assert clusters.silhouette(torch.cat([near, far])) > 0.99
    assert abs(clusters.silhouette(torch.randn(400, 3, generator=torch.Generator().manual_seed(0)))) < 0.02
    # Groups {0, 1} and {4, 6} on a line, distances by hand.
    by_hand = [(5 - 1) / 5, (4 - 1) / 4, (3.5 - 2) / 3.5, (5.5 - 2) / 5.5]
    points = torch.tensor([[0.0], [1.0], [4.0], [6.0]])
    assert clusters.silhouette(points) == pytest.approx(sum(by_hand) / 4)


def test_drift_is_a_share_of_the_way_to_the_benign_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    harmful, benign = torch.randn(30, 5, generator=generator), torch.randn(30, 5, generator=generator) + 4.0
    line = benign.mean(0) - harmful.mean(0)
    exact = torch.cat([harmful, benign])
    found = clusters.layer_drift(3, exact, torch.cat([harmful + 0.25 * line, benign]))
    assert found.drift == pytest.approx(0.25, abs=1e-5) and found.benign_drift == pytest.approx(0.0, abs=1e-6)
    assert found.low <= found.drift <= found.high and found.exact.shape == (60, 2)
    away = clusters.layer_drift(3, exact, torch.cat([harmful - 0.1 * line, benign]))
    assert away.drift == pytest.approx(-0.1, abs=1e-5) and math.isfinite(away.silhouette_after)

"""The geometry of a tiny model from end to end: numbers, files, pictures, resume, refusals; rows of every form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.tiny import tiny_model

from trimtab.anchors import Anchor, SafetyAnchors
from trimtab.errors import DataError, UsageError
from trimtab.geometry.measure import GeometrySettings
from trimtab.geometry.rows import bundled_rows, read_rows, tokenise_rows
from trimtab.geometry.run import run_geometry
from trimtab.geometry.table import summary_lines

WORDS = ("bomb", "cake", "base", "message", "weather", "account", "product", "second")
ANCHORS = SafetyAnchors(
    tuple(Anchor(f"make a {word}", "refuse", "sorry i can't help with that") for word in WORDS), "test"
)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    made = [{"prompt": f"route this {word}", "completion": "billing"} for word in WORDS * 2]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_sgd_with_projection_obeys_its_bound_and_leaves_tables_and_pictures(tmp_path: Path, rows: Path) -> None:
    settings = GeometrySettings(samples=4, rank=3, steps=4, batch=4, lr=1e-2, optimizer="sgd", rule="spf")
    found = run_geometry(tiny_model(), tmp_path / "g", settings, rows, ANCHORS)
    document = found.document
    for row in document["trace"]:
        assert row["first_order_real"] == pytest.approx(row["first_order"], rel=1e-2, abs=1e-6)
        if row["conflict"] < 0:
            assert abs(row["first_order"]) <= row["bound_by_block"] * (1 + 1e-3) + 1e-6
    curve = document["spectra"]["safety sample"]["cer_median"]
    assert curve == sorted(curve) and curve[-1] == pytest.approx(1.0, abs=1e-3)
    same = document["overlaps"]["safety sample, safety batch, left, k=3"]
    assert same["chance"] < same["value"] <= 1.0 and same["samples"] == 4
    assert {path.suffix for path in found.pictures} == {".svg", ".png"} and len(found.pictures) == 10
    assert all(path.stat().st_size > 1000 for path in found.pictures)
    assert "| safety batch | 4 |" in (tmp_path / "g" / "geometry.md").read_text()
    assert any("cosine(safety, task)" in line for line in summary_lines(document))


def test_a_finished_part_is_kept_and_another_model_is_refused(tmp_path: Path, rows: Path) -> None:
    settings = GeometrySettings(samples=4, rank=3, steps=0, batch=4)
    out = tmp_path / "g"
    run_geometry(tiny_model(), out, settings, rows, ANCHORS)
    spectra = json.loads((out / "spectra.json").read_text())
    spectra["safety sample"]["loss"] = 123.0
    (out / "spectra.json").write_text(json.dumps(spectra))
    (out / "cosines.json").unlink()
    again = run_geometry(tiny_model(), out, settings, rows, ANCHORS).document
    assert again["spectra"]["safety sample"]["loss"] == 123.0 and again["cosines"]["pairs"] > 0
    with pytest.raises(UsageError, match="another model"):
        run_geometry(tiny_model(seed=1), out, settings, rows, ANCHORS)


def test_too_few_refusals_and_wrong_settings_are_refused(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(UsageError, match="too few refusals"):
        run_geometry(tiny_model(), tmp_path / "g", GeometrySettings(samples=8, steps=0), rows, ANCHORS)
    with pytest.raises(UsageError, match="sgd"):
        GeometrySettings(optimizer="lion")
    with pytest.raises(UsageError, match="learning rate"):
        GeometrySettings(lr=-1.0)


def test_a_damaged_file_in_the_folder_is_named(tmp_path: Path, rows: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "of.json").write_text("{")
    with pytest.raises(DataError, match=r"of\.json"):
        run_geometry(tiny_model(), tmp_path / "g", GeometrySettings(samples=4, steps=0, batch=4), rows, ANCHORS)
    (tmp_path / "g" / "of.json").unlink()
    (tmp_path / "g" / "spectra.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"spectra\.json"):
        run_geometry(tiny_model(), tmp_path / "g", GeometrySettings(samples=4, steps=0, batch=4), rows, ANCHORS)


def test_a_json_array_has_the_same_rows_as_json_lines(tmp_path: Path, rows: Path) -> None:
    array = tmp_path / "rows.json"
    found = read_rows(rows)
    array.write_text(json.dumps(found, indent=1))
    assert read_rows(array) == found
    array.write_text('[{"text": "fine"}, {"question": "x"}]')
    with pytest.raises(DataError, match="row 2"):
        read_rows(array)
    array.write_text('[{"text": "cut')
    with pytest.raises(DataError, match="malformed JSON"):
        read_rows(array)
    with pytest.raises(DataError, match="check --data"):
        read_rows(tmp_path / "absent.jsonl")


def test_rows_of_every_form() -> None:
    loaded = tiny_model()
    user, assistant = {"role": "user", "content": "bake a cake"}, {"role": "assistant", "content": "sure"}
    forms = [
        {"prompt": "bake a cake", "completion": "sure"},
        {"prompt": [user], "completion": [assistant]},
        {"messages": [user, assistant]},
    ]
    first, second, third = tokenise_rows(loaded, forms)
    assert second == third and first.reply == second.reply and first.reply[-1] == loaded.tokenizer.eos_token_id
    mark = loaded.tokenizer.convert_tokens_to_ids("<pad>")  # a template that ends a turn with another token
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<pad>{% endfor %}"
    first, second, _ = tokenise_rows(loaded, forms)
    assert second.reply[-1] == mark and first.reply[-1] == loaded.tokenizer.eos_token_id
    with pytest.raises(DataError, match="no completion"):
        tokenise_rows(loaded, [{"text": "sure"}])
    assert len(bundled_rows()) > 100 and bundled_rows(1) != bundled_rows(2)

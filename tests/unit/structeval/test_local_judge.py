"""A judge in this process, on a tiny image-text model that was really trained to tell a red picture from a blue one."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from trimtab.errors import ModelError
from trimtab.structeval import local_judge, vqa
from trimtab.structeval.tasks import Question
from trimtab.structeval.vqa import Asked

Image = pytest.importorskip("PIL.Image", reason="needs pillow")
QUESTIONS = (Question("Is it red?", "yes"),)
REPLIES = {"red": '{"1": true}', "blue": '{"1": false}'}
# Only the picture is rendered, so that a few dozen training steps suffice; the prompt's wording is tested elsewhere.
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 24), colour).save(buffer, "PNG")
    return buffer.getvalue()


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True) for word in ("<image>", "</s>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    words = tokenizer()
    image_id = words.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    sight = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=32,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=sight, text_config=text, image_token_index=image_id, vision_feature_layer=-1)
    )
    shape = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=shape, crop_size=shape), tokenizer=words, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    learn(model, processor)
    place = tmp_path_factory.mktemp("judge")
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return place


def learn(model: Any, processor: Any) -> None:
    """Until both replies are certain."""
    batches = []
    for colour, reply in REPLIES.items():
        shown = [Image.open(io.BytesIO(picture(colour)))]
        fed = processor(images=shown, text=f"<image>:{reply}</s>", return_tensors="pt")
        labels = fed["input_ids"].clone()
        labels[:, : -len(reply) - 1] = -100
        batches.append({**fed, "labels": labels})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        losses = [model(**batch).loss for batch in batches]
        if max(losses) < 0.01:
            return
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    raise AssertionError(f"the tiny judge did not learn: {losses}")


def test_it_judges_by_the_picture(folder: Path, tmp_path: Path) -> None:
    judge = vqa.judge_named(f"local/{folder}", cache=tmp_path / "judge.jsonl")
    asked = [Asked(picture(colour), QUESTIONS) for colour in ("blue", "red", "blue")]
    assert [one.answers for one in judge.verdicts(asked)] == [(False,), (True,), (False,)]
    kept = [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text().splitlines()]
    assert [row["answers"] for row in kept] == [[False], [True]]
    assert all(row["judge"].startswith(f"local/{folder}@") for row in kept)


def test_what_is_no_picture_is_unscored(folder: Path) -> None:
    (found,) = local_judge.local_judge(str(folder)).verdicts([Asked(b"not a picture", QUESTIONS)])
    assert found.answers is None and "UnidentifiedImageError" in (found.error or "")


def test_other_weights_in_the_same_folder_are_another_judge(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "judge")
    before = local_judge.local_judge(str(tmp_path / "judge"))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "judge")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "judge")
    assert local_judge.local_judge(str(tmp_path / "judge")).name != before.name


def test_a_judge_that_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="could not load the judge"):
        local_judge.local_judge(str(tmp_path))
    mute = tmp_path / "mute"
    shutil.copytree(folder, mute)
    for name in ("chat_template.jinja", "chat_template.json"):
        (mute / name).unlink(missing_ok=True)
    with pytest.raises(ModelError, match="no chat template"):
        local_judge.local_judge(str(mute))

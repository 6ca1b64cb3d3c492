"""A vision model on this machine as the judge: ``--judge local/NAME``.

Covered: image-text models that Transformers knows, from the hub or a folder (safetensors only, no remote code), greedy,
one picture at a time. Not covered: servers (``vqa.inspect_judge``), batching, text-only models.
"""

from __future__ import annotations

import asyncio
import io
import threading
from pathlib import Path
from typing import Any

from trimtab.errors import ModelError
from trimtab.structeval.vqa import MAX_TOKENS, Judge

PREFIX = "local/"


def local_judge(name: str, *, cache: Path | None = None, device: str | None = None) -> Judge:
    """A judge that runs in this process.

    Args:
        name: hub id or folder of an image-text model, with or without "local/".
        cache: as ``vqa.Judge``. Its keys hold the hash of the weights: another checkpoint in the same folder asks anew.
        device: "cpu", "cuda", ...; None: the best there is.

    Raises:
        ModelError: when it cannot be loaded safely, does not take pictures, or has no chat template.
    """
    from trimtab import models

    place = name.removeprefix(PREFIX)
    model, processor = _load(place, device)
    gate = threading.Lock()  # one picture at a time; not asyncio's, which would belong to the first loop that waits

    def answer(png: bytes, prompt: str) -> str:
        with gate:
            return _answer(model, processor, png, prompt)

    async def ask(png: bytes, prompt: str) -> str:
        return await asyncio.to_thread(answer, png, prompt)

    return Judge(f"{PREFIX}{place}@{models.content_hash(model)[:16]}", ask, cache, connections=1)


def _load(place: str, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from trimtab import models

    where: Any = torch.device(device) if device else models.default_device()
    try:
        processor = AutoProcessor.from_pretrained(place, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            place, dtype=models.resolve_dtype(None, where), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        fix = "name an image-text model that Transformers supports natively, with safetensors weights"
        raise ModelError(f"could not load the judge {place}", seen=str(error).strip()[:300], fix=fix) from error
    if not hasattr(processor, "image_processor"):
        raise ModelError("the judge does not take pictures", seen=place, fix="name an image-text model")
    if not getattr(processor, "chat_template", None):
        fix = "name the instruct version of the model"
        raise ModelError("the judge has no chat template", seen=place, fix=fix)
    return model.to(where).eval(), processor


def _answer(model: Any, processor: Any, png: bytes, prompt: str) -> str:
    import torch
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    content = [{"type": "text", "text": prompt}, {"type": "image", "image": picture}]
    fed = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    ).to(model.device, dtype=model.dtype)  # fmt: skip
    with torch.inference_mode():
        out = model.generate(**fed, max_new_tokens=MAX_TOKENS, do_sample=False)
    (reply,) = processor.batch_decode(out[:, fed["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(reply)

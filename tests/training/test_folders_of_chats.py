"""What a model's folder says of chats and of generating is there again in checkpoints, after a resume, and in the exported model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ringspan.training.export import byte_tokenizer, export
from ringspan.training.model import build_model
from ringspan.training.prepare import prepare
from ringspan.training.trainer import Trainer
from tests.training.support import write_text
from tests.training.trainers import GIVEN, ranks_as_threads

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
GENERATION = {"eos_token_id": [7, 9], "temperature": 0.3, "max_length": 77}


def chat_model(folder: Path) -> Path:
    build_model("pico", vocabulary_size=256, context=128, seed=0).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def test_a_chat_model_is_exported_as_one_after_a_resume_too(tmp_path: Path):
    write_text(tmp_path / "text.txt", num_words=2000)
    model = chat_model(tmp_path / "model")
    given: dict[str, Any] = {
        **GIVEN,
        "model": str(model),
        "data": str(tmp_path / "text.txt"),
        "ranks": 1,
        "steps": 2,
        "out": str(tmp_path / "run"),
    }

    def train(place: Any, resume: bool) -> None:
        trainer = Trainer(prepare({"out": given["out"]} if resume else given, resume=resume), place)
        trainer.take_step()
        if resume:
            # What it began from may be gone, and so may the checkpoint that it went on from.
            (model / "generation_config.json").unlink()
            shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000001")
        trainer.begin_save()
        trainer.finish_save()

    with ranks_as_threads() as threads:
        threads(1, lambda place: train(place, False))
        export(Path(given["out"]), tmp_path / "first")
        threads(1, lambda place: train(place, True))
    export(Path(given["out"]), tmp_path / "second")
    for target in ("first", "second"):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / target)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi"
        said = AutoModelForCausalLM.from_pretrained(tmp_path / target).generation_config
        assert {name: getattr(said, name) for name in GENERATION} == GENERATION

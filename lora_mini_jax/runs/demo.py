"""The demo: adapt a model of Python source to Python's own documentation, LoRA-Mini against LoRA.

Model and text are on every machine: the model is in the package, the text is the reference topics
that ``help("topics")`` reads. Whole topics are held out.
"""

import json
import re
import zlib
from pathlib import Path

from lora_mini_jax.files import write_text, writing
from lora_mini_jax.options import BASE, Compare, Demo
from lora_mini_jax.runs.compare import compare
from lora_mini_jax.runs.folder import ComparisonFolder, Row
from lora_mini_jax.runs.run import Log

METHODS = (
    "lora-mini:rank=4,a=32,b=32,outer_init=gradient,learning_rate=0.05",
    "lora:rank=8,learning_rate=0.005",
)
BLOCK = 600  # characters in a record; with this tokenizer and this prose about 200 tokens


def demo(options: Demo, say: Log = print) -> list[Row]:
    """Write the topics as training and held-out data, run the comparison, print the table.

    Raises:
        UserError: a folder that holds anything but this demo.
    """
    given = comparison(options)
    folder = ComparisonFolder(given)
    train, valid = topics()
    folder.create()
    with writing(folder.path):
        (folder.path / "data").mkdir(exist_ok=True)
    for name, texts in ((given.data, train), (given.valid, valid)):
        write_text(name, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    say(
        f"{len(train)} passages of documentation to train on, {len(valid)} of other topics held out"
    )
    return compare(given, say, title="LoRA-Mini and LoRA on Python's documentation topics")


def comparison(options: Demo) -> Compare:
    """What is compared, on data within the folder."""
    folder = Path(options.output_dir)
    return Compare(
        model=BASE,
        data=str(folder / "data" / "train.jsonl"),
        valid=str(folder / "data" / "valid.jsonl"),
        output_dir=str(folder),
        methods=METHODS,
        seeds=(0,),
        max_length=256,
        batch_size=8,
        max_steps=options.steps,
        overlong="truncate",
    )


def topics() -> tuple[list[str], list[str]]:
    """Passages of ``pydoc_data.topics``: those for training, and those of held-out topics.

    Topics quote each other, so a paragraph of a held-out topic is taken out of all others.
    """
    from pydoc_data.topics import topics as texts

    # Headings stand without their underlines: runs of one character teach nothing.
    paragraphs = {
        name: re.sub(r"\n[*=~^\"-]{3,}(?=\n|$)", "", text).strip().split("\n\n")
        for name, text in sorted(texts.items())
    }
    held_out = [name for name in paragraphs if zlib.crc32(name.encode()) % 7 == 2]
    unseen = {paragraph.strip() for name in held_out for paragraph in paragraphs[name]}
    train, valid = [], []
    for name, own in paragraphs.items():
        if name in held_out:
            valid += passages(own)
        else:
            train += passages([paragraph for paragraph in own if paragraph.strip() not in unseen])
    return train, valid


def passages(paragraphs: list[str]) -> list[str]:
    """Whole paragraphs, as many together as stay under about `BLOCK` characters."""
    blocks, block = [], ""
    for paragraph in paragraphs:
        if block and len(block) + len(paragraph) > BLOCK:
            blocks.append(block)
            block = ""
        block += ("\n\n" if block else "") + paragraph
    return [*blocks, block] if block else blocks

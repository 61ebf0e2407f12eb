"""VRSBench: the three evaluation lists, the annotations of each picture, the training turns.

    VRSBench_EVAL_{Cap,referring,vqa}.json   [{"image_id", "question", "ground_truth", "type", ...}]
    Annotations_{train,val}/NAME.json        {"image", "caption", "objects", "qa_pairs"}
    VRSBench_train.json                      LLaVA conversations: `read_conversations`

Boxes of the lists are written {<x0><y0><x1><y1>} in hundredths of the picture, those of the
annotations are parts of 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from common_jax.files import read_json
from data.folders import existing
from data.gathering import STRICT, Gathering, Rules
from data.record_boxes import Box, RecordError, to_pixels
from data.record_files import existing_file, rows, texts
from data.record_pictures import Finder
from data.records import Record, RecordSource

LISTS = {"caption": "Cap", "grounding": "referring", "vqa": "vqa"}
_CORNERS = re.compile(r"<\s*(-?\d+(?:\.\d+)?)\s*>")


def angle_box(text: str, size: tuple[int, int]) -> Box:
    """Pixels of `{<x0><y0><x1><y1>}` in hundredths. Raises RecordError on anything else."""
    found = _CORNERS.findall(text)
    if len(found) != 4:
        raise RecordError(f"'{text:.60}': need a box {{<x0><y0><x1><y1>}}")
    return to_pixels(found, "int100", size)


def _task(task: str) -> str:
    if task not in LISTS:
        raise ValueError(f"VRSBench has no task '{task}'; known: {', '.join(LISTS)}")
    return LISTS[task]


def _of_list(row: dict, task: str, image: str, gathering: Gathering) -> Record:
    """A record of an evaluation list. category: type of question; unique or not for grounding."""
    size, target, boxes = gathering.size_of(image), row["ground_truth"], ()
    category = str(row.get("type", ""))
    if task == "grounding":
        boxes = (angle_box(target, size),)
        category = "unique" if row["unique"] else "not unique"
    return Record(
        id=f"vrsbench-{task}-{row['question_id']}",
        image=image,
        task=task,
        question="" if task == "caption" else str(row["question"]).strip(),
        answers=() if task == "grounding" else texts(target),
        boxes=boxes,
        labels=texts(row.get("obj_cls")) if task == "grounding" else (),
        size=size,
        category=category,
        dataset="vrsbench",
        split="test",
    )


def read_vrsbench_list(
    root: str | os.PathLike,
    task: str,
    *,
    images: str | os.PathLike = "",
    rules: Rules = STRICT,
) -> RecordSource:
    """The evaluation list of a task: caption, grounding or vqa. Pictures anywhere below root.

    For grounding, category is "unique" or "not unique", as the published scores are split.
    """
    path = existing_file(Path(root) / f"VRSBench_EVAL_{_task(task)}.json", "evaluation list")
    gathering, finder = Gathering(f"vrsbench_{task}", rules), Finder(images or root)
    for where, row in rows(path, gathering):
        with gathering.reading(where):
            image = finder.find(row["image_id"])
            gathering.add(_of_list(row, task, image, gathering), where)
    return gathering.finish()


def _of_picture(content: dict, task: str, image: str, gathering: Gathering) -> Iterator[Record]:
    """The records of one annotation file."""
    name, size = Path(content["image"]).stem, gathering.size_of(image)
    shared = {"image": image, "task": task, "size": size, "dataset": "vrsbench"}
    if task == "caption":
        yield Record(id=f"vrsbench-caption-{name}", answers=texts(content["caption"]), **shared)
    elif task == "vqa":
        for pair in content["qa_pairs"]:
            yield Record(
                id=f"vrsbench-vqa-{name}-{pair['ques_id']}",
                question=pair["question"].strip(),
                answers=texts(pair["answer"]),
                category=pair["type"],
                **shared,
            )
    else:
        for thing in content["objects"]:
            if not thing.get("referring_sentence"):
                continue
            yield Record(
                id=f"vrsbench-grounding-{name}-{thing['obj_id']}",
                question=thing["referring_sentence"].strip(),
                boxes=(to_pixels(thing["obj_coord"], "unit", size),),
                labels=texts(thing["obj_cls"]),
                category="unique" if thing["is_unique"] else "not unique",
                **shared,
            )


def read_vrsbench_annotations(
    root: str | os.PathLike,
    split: str,
    task: str,
    *,
    images: str | os.PathLike = "",
    rules: Rules = STRICT,
) -> RecordSource:
    """Records of root/Annotations_SPLIT (train or val), pictures from root/Images_SPLIT."""
    _task(task)
    root = existing(root)
    folder = existing(root / f"Annotations_{split}")
    finder = Finder(images or root / f"Images_{split}")
    gathering = Gathering(f"vrsbench_{task}", rules)
    for path in sorted(folder.glob("*.json")):
        with gathering.reading(str(path)):
            content = read_json(path)
            image = finder.find(content["image"])
            for record in _of_picture(content, task, image, gathering):
                gathering.add(record, str(path))
    return gathering.finish()

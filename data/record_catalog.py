"""Every set of records by name: one table, and `open_records`."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data.caption_sets import (
    TRUSTING,
    read_karpathy_captions,
    read_nwpu_captions,
    read_skyscript,
    read_tar_captions,
)
from data.class_sets import read_class_folder
from data.gathering import STRICT, Rules
from data.grounding_sets import read_dior_rsvg, read_rsvg
from data.instruct_sets import read_conversations, read_geochat_bench
from data.memory import InMemory
from data.mmrs import ROUNDED, read_mmrs
from data.real_records import REAL, read_real
from data.record_files import read_records
from data.records import RecordSource, choose, hold_out, shared_records
from data.scene_records import KINDS, SceneRecords
from data.shards import read_manifest, split_folder
from data.splits import SPLITS
from data.vqa_sets import read_rsvqa
from data.vrsbench import read_vrsbench_annotations, read_vrsbench_list

SCENE_SIZES = {"train": 4096, "val": 500, "test": 1000}


@dataclass(frozen=True)
class Row:
    """open(root, split, *, rules, options); where: what root is; rules: defaults of the set."""

    open: Callable[..., RecordSource]
    where: str
    rules: Rules = STRICT


def _file_in(root: str, file: str) -> Path:
    """root itself when it is a file, else the file of that name in it."""
    path = Path(root).expanduser()
    return path if path.is_file() else path / file


def _folder_of(root: str) -> Path:
    path = Path(root).expanduser()
    return path.parent if path.is_file() else path


def _karpathy(name: str, file: str) -> Callable[..., RecordSource]:
    def read(root, split, *, images: str = "", rules: Rules = STRICT) -> RecordSource:
        path, folder = _file_in(root, file), images or _folder_of(root)
        return read_karpathy_captions(path, split, images=folder, name=name, rules=rules)

    return read


def _nwpu_captions(root, split, *, images: str = "", rules: Rules = STRICT) -> RecordSource:
    path = _file_in(root, "dataset_nwpu.json")
    return read_nwpu_captions(path, split, images=images or _folder_of(root), rules=rules)


def _skyscript(
    root,
    split,
    *,
    images: str = "",
    column: str = "title_multi_objects",
    first: int = 0,
    rules: Rules = TRUSTING,
) -> RecordSource:
    folder = images or _folder_of(root)
    return read_skyscript(root, split, images=folder, column=column, limit=first, rules=rules)


def _tar(root, split, *, rules: Rules = TRUSTING) -> RecordSource:
    return read_tar_captions(root, split, rules=rules)


def _prepared(root, split, *, rules: Rules = TRUSTING) -> RecordSource:
    folder = split_folder(root, split)
    name = read_manifest(folder, "records").name
    return read_records(folder / "records.jsonl", split, rules=rules, name=name)


def _vrsbench(task: str) -> Callable[..., RecordSource]:
    def read(root, split, *, images: str = "", rules: Rules = STRICT) -> RecordSource:
        if split == "test":
            return read_vrsbench_list(root, task, images=images, rules=rules)
        if split == "train":
            return read_vrsbench_annotations(root, "train", task, images=images, rules=rules)
        raise ValueError(f"VRSBench has no split '{split}'; known: train, test")

    return read


def _chat(file: str, folder: str, name: str) -> Callable[..., RecordSource]:
    """Conversations of a file, pictures below a folder of its own or of the file."""

    def read(root, split, *, images: str = "", rules: Rules = STRICT) -> RecordSource:
        path = _file_in(root, file)
        below = images or _folder_of(root) / folder
        return read_conversations(path, split, images=below, name=name, rules=rules)

    return read


def _rsvqa(which: str) -> Callable[..., RecordSource]:
    def read(
        root, split, *, images: str = "", binned: bool = True, rules: Rules = STRICT
    ) -> RecordSource:
        return read_rsvqa(root, split, which=which, images=images, binned=binned, rules=rules)

    return read


def _classes(name: str) -> Callable[..., RecordSource]:
    def read(root, split, *, classes: tuple = (), rules: Rules = STRICT) -> RecordSource:
        return read_class_folder(root, split, name=name, classes=classes, rules=rules)

    return read


def _mmrs(
    root,
    split,
    *,
    parts: tuple = ("caption", "classification", "detection", "RSVG", "VQA"),
    sensors: str = "optical",
    form: str = "chat",
    rules: Rules = ROUNDED,
) -> RecordSource:
    if split != "train":
        raise ValueError(f"MMRS-1M has no split '{split}'; it is training data: train")
    return read_mmrs(root, parts=parts, sensors=sensors, form=form, rules=rules)


def _geochat_bench(
    root,
    split,
    *,
    images: str = "",
    task: str = "",
    box_format: str = "int100",
    rules: Rules = STRICT,
) -> RecordSource:
    if split != "test":
        raise ValueError(f"GeoChat-Bench has no split '{split}'; known: test")
    folder = images or _folder_of(root)
    return read_geochat_bench(root, images=folder, task=task, box_format=box_format, rules=rules)


TABLE: dict[str, Row] = {
    "jsonl": Row(read_records, "the JSON lines file"),
    "llava": Row(_chat("", "", ""), "the JSON or JSON lines file of conversations"),
    "rsicd": Row(_karpathy("rsicd", "dataset_rsicd.json"), "dataset_rsicd.json or its folder"),
    "ucm_captions": Row(_karpathy("ucm_captions", "dataset.json"), "dataset.json or its folder"),
    "sydney_captions": Row(
        _karpathy("sydney_captions", "dataset.json"), "dataset.json or its folder"
    ),
    "nwpu_captions": Row(_nwpu_captions, "dataset_nwpu.json or its folder"),
    "skyscript": Row(_skyscript, "the CSV file, in the folder of images2, images3, ...", TRUSTING),
    "tar_captions": Row(_tar, "a tar file or a folder of them", TRUSTING),
    "prepared": Row(_prepared, "the folder data.prepare wrote", TRUSTING),
    "dior_rsvg": Row(read_dior_rsvg, "the folder of Annotations, JPEGImages and train.txt"),
    "rsvg": Row(read_rsvg, "the folder of rsvg_train.pth (or .json) and the pictures"),
    "vrsbench_caption": Row(_vrsbench("caption"), "the folder of VRSBench"),
    "vrsbench_grounding": Row(_vrsbench("grounding"), "the folder of VRSBench"),
    "vrsbench_vqa": Row(_vrsbench("vqa"), "the folder of VRSBench"),
    "vrsbench_chat": Row(
        _chat("VRSBench_train.json", "Images_train", "vrsbench_chat"), "the folder of VRSBench"
    ),
    "rsvqa_lr": Row(_rsvqa("lr"), "the folder of LR_split_train_questions.json"),
    "rsvqa_hr": Row(_rsvqa("hr"), "the folder of USGS_split_train_questions.json"),
    "classes": Row(_classes("classes"), "the folder of class folders"),
    "aid": Row(_classes("aid"), "the folder of class folders"),
    "whu_rs19": Row(_classes("whu_rs19"), "the folder of class folders"),
    "mmrs": Row(_mmrs, "the folder data of MMRS-1M", ROUNDED),
    "geochat": Row(
        _chat("GeoChat_Instruct.json", "", "geochat"), "GeoChat_Instruct.json or its folder"
    ),
    "geochat_bench": Row(_geochat_bench, "a JSON lines file of GeoChat-Bench"),
}


def known_records() -> list[str]:
    """Every name `open_records` takes."""
    return ["scenes", *TABLE, *(f"real:{name}" for name in REAL)]


def _open_scenes(
    split: str,
    *,
    size: int = 0,
    seed: int = 0,
    side: int = 64,
    kinds: tuple = KINDS,
    max_boxes: int = 0,
) -> SceneRecords:
    if split not in SPLITS:
        raise ValueError(f"scenes have no split '{split}'; known: {', '.join(SPLITS)}")
    return SceneRecords(
        split, size or SCENE_SIZES[split], kinds=kinds, seed=seed, side=side, max_boxes=max_boxes
    )


def _checked(name: str, opener: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options. Raises ValueError on one that the opener does not have, listing those it has."""
    parameters = inspect.signature(opener).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"rules", "root"}
    wrong = sorted(options.keys() - known)
    if wrong:
        known |= set() if name == "scenes" else {f.name for f in fields(Rules)} | {"limit", "keep"}
        raise ValueError(
            f"records '{name}' have no option {', '.join(wrong)}; known: {', '.join(sorted(known))}"
        )
    return options


def thin_out(source: RecordSource, limit: int) -> RecordSource:
    """`limit` records, evenly spaced over all; 0: all."""
    count = len(source)
    if not 0 < limit < count:
        return source
    kept = [source.records[k * count // limit] for k in range(limit)]
    thin = RecordSource(kept, f"{source.name}[{limit}]", source.counts)
    thin.keep = source.keep
    return thin


def open_records(name: str, split: str, *, root: str | None = None, **options: Any) -> Any:
    """A source of records by name, see `known_records` and docs/data.md.

    root: the folder or file of the set (real:* default to $EO_DATA_DIR, scenes have none). Options
    of every set but scenes: on_bad, boxes, pictures, answers (see gathering.Rules), limit (so many
    records, evenly spaced; 0: all) and keep (bytes of decoded pictures kept in memory); others by
    set. Raises ValueError on an unknown name or option, RecordError on records that cannot be used.
    """
    if name == "scenes":
        return _open_scenes(split, **_checked(name, _open_scenes, options))
    real = name.removeprefix("real:")
    if name not in TABLE and (real == name or real not in REAL):
        raise ValueError(f"unknown records '{name}'; known: {', '.join(known_records())}")
    limit, keep = options.pop("limit", 0), options.pop("keep", 0)
    chosen = {f.name: options.pop(f.name) for f in fields(Rules) if f.name in options}
    if name in TABLE:
        row = TABLE[name]
        if not root:
            raise ValueError(f"records '{name}' need root: {row.where}")
        options = _checked(name, row.open, options)
        source = row.open(root, split, rules=replace(row.rules, **chosen), **options)
    else:
        _checked(name, read_real, options)
        source = read_real(real, split, root=root or "", rules=replace(STRICT, **chosen))
    source.keep = keep
    return thin_out(source, limit)


# ------------------------------------------------------------------------- training, validation
def named_sets(names: str, roots: str) -> list[tuple[str, str]]:
    """[(name, root)] of names and roots that `+` joins; no roots at all: each set knows its own."""
    split = names.split("+")
    places = roots.split("+") if roots else [""] * len(split)
    if len(split) != len(places):
        raise ValueError(f"{len(places)} roots for the {len(split)} sets {', '.join(split)}")
    return list(zip(split, places))


class RecordSets:
    """The record sets of a run by split.

    named: (name, root) of each, of "train" and, where there is validation, of "val". sizes: records
    of each set by split, 0: all. options, scenes: of `open_records`, of sets and of scenes. Of a
    set that is trained on and validated on and has no splits, some pictures are held out of
    training: no picture is in both.
    """

    def __init__(self, named: Mapping, sizes: Mapping[str, int], options: Mapping, scenes: Mapping):
        self.named, self.sizes, self.options, self.scenes = named, sizes, options, scenes
        self.opened: dict = {}

    def open(self, split: str) -> list:
        """The sources of "train" or "val"."""
        size, found = self.sizes[split], []
        both = set(self.named["train"]) & set(self.named.get("val", ()))
        for name, root in self.named[split]:
            if name == "scenes":
                found.append(InMemory(open_records(name, split, size=size, **self.scenes)))
            elif (name, root) in both:
                found.append(thin_out(self._parts(name, root)[split], size))
            else:
                found.append(thin_out(self._whole(name, root, split), size))
        return found

    def _whole(self, name: str, root: str, split: str) -> RecordSource:
        return open_records(name, split, root=root or None, **self.options)

    def _parts(self, name: str, root: str) -> dict[str, RecordSource]:
        """{"train", "val"}: sources without a record in common."""
        if (name, root) not in self.opened:
            train, val = (self._whole(name, root, split) for split in ("train", "val"))
            common = shared_records(train, val)
            if len(common) == len(val):
                train, val = hold_out(train, self.sizes["val"] or len(train))
                logging.warning(
                    "%s has no splits: %d of its records are held out of training, for validation",
                    *(name, len(val)),
                )
            elif common:  # those that name no split are for training
                val = choose(val, lambda record: record.id not in common, "val")
            self.opened[name, root] = {"train": train, "val": val}
        return self.opened[name, root]

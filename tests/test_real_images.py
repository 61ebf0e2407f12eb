"""One split for all folders that hold the same pictures; pretraining sees no test picture."""

from __future__ import annotations

from data.folders import open_images
from data.images import check_images
from data.real_images import held_out, split_table
from data.splits import refuse_overlap


def test_no_picture_is_in_two_splits_under_any_name(eo_data):
    table = split_table(eo_data)
    checked = check_images([eo_data / path for path in table])
    parts = {"train": {}, "val": {}, "test": {}}
    for picture, (path, split) in zip(checked, table.items()):
        parts[split][picture.digest] = path
    refuse_overlap(parts)
    assert all(len(part) > 100 for part in parts.values())


def test_a_name_has_one_split_in_all_its_folders(eo_data):
    by_name = {}
    for path, split in split_table(eo_data).items():
        if path.startswith("uc"):
            assert by_name.setdefault(path.rsplit("/", 1)[1], split) == split
    assert len(by_name) == 882


def test_pretraining_without_the_held_out_sees_no_val_or_test_picture(eo_data):
    roots = [
        str(eo_data / f) for f in ("ucmerced", "ucm_captions", "nwpu_vhr10", "vhr10_masks", "roads")
    ]
    seen = open_images("train", roots=roots, exclude=held_out(eo_data), holdout=0)
    table = split_table(eo_data)
    hidden = [eo_data / path for path, split in table.items() if split != "train"]
    assert not seen.digests.keys() & {c.digest for c in check_images(hidden)}
    assert len(seen) > 600

"""Every dataset by name: one table, and `open_source`.

The twelve sets of GEO-Bench: bands shown as red, green, blue; divisor (the value that becomes 1.0
before clipping); whose scaling that is (the published code ships four sets, the other eight follow
its rule: Sentinel-2 digital numbers / 4095, 8-bit imagery / 255); sides in pixels; split sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.folders import open_class_folder, open_images
from data.geobench import GeoBenchSet, fraction_partition, open_geobench, set_folder
from data.masks import MaskRules, open_masks
from data.packers import open_prepared
from data.scenes import CLASSES, LAND_COVER, SceneSource
from data.splits import SPLITS, keep_fraction
from data.tfds_source import open_tfds

PROMPT = "A satellite image"
S2 = ("04 - Red", "03 - Green", "02 - Blue")
RGB = ("Red", "Green", "Blue")
SINGLE, MULTI, SEG = "classification", "multi_label_classification", "segmentation"

EUROSAT = ("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
           "PermanentCrop", "Residential", "River", "SeaLake")  # fmt: skip
SO2SAT = ("compact high-rise", "compact mid-rise", "compact low-rise", "open high-rise",
          "open mid-rise", "open low-rise", "lightweight low-rise", "large low-rise",
          "sparsely built", "heavy industry", "dense trees", "scattered trees", "bush or scrub",
          "low plants", "bare rock or paved", "bare soil or sand", "water")  # fmt: skip
FORESTNET = ("oil palm plantation", "timber plantation", "other large-scale plantations",
             "grassland shrubland", "small-scale agriculture", "small-scale mixed plantation",
             "small-scale oil palm plantation", "mining", "fish pond", "logging",
             "secondary forest", "other")  # fmt: skip
CASHEW = ("no data", "well-managed plantation", "poorly-managed plantation", "non-plantation",
          "residential", "background", "uncertain")  # fmt: skip
SA_CROP = ("no data", "Lucerne/Medics", "planted pastures", "fallow", "wine grapes", "weeds",
           "small grain grazing", "wheat", "canola", "rooibos")  # fmt: skip
CHESAPEAKE = ("water", "tree-canopy-forest", "low-vegetation-field", "barren-land",
              "impervious-other", "impervious-roads", "no-data")  # fmt: skip
# The published set numbers its 43 land-cover classes; their names are not stored in it.
BIGEARTHNET = tuple(f"class {k:02d}" for k in range(43))

# fmt: off
GEOBENCH = {
    #                          task    native side  bands  divisor scaling      train   val  test
    "m-eurosat": GeoBenchSet(SINGLE, 64, 256, S2, 4095.0, "published", (2000, 1000, 1000), EUROSAT),
    "m-bigearthnet": GeoBenchSet(
        MULTI, 120, 256, S2, 4095.0, "published", (20000, 1000, 1000), BIGEARTHNET),
    "m-so2sat": GeoBenchSet(SINGLE, 32, 256, S2, 0.4095, "ours", (19992, 986, 986), SO2SAT),
    "m-brick-kiln": GeoBenchSet(
        SINGLE, 64, 256, S2, 4095.0, "ours", (15063, 999, 999), ("other", "brick kiln")),
    "m-forestnet": GeoBenchSet(SINGLE, 332, 512, S2, 255.0, "ours", (6464, 989, 993), FORESTNET),
    "m-pv4ger": GeoBenchSet(
        SINGLE, 320, 512, RGB, 255.0, "ours", (11814, 999, 999), ("other", "solar panels")),
    "m-pv4ger-seg": GeoBenchSet(
        SEG, 320, 512, RGB, 255.0, "ours", (3000, 403, 403), ("other", "solar panels")),
    "m-nz-cattle": GeoBenchSet(
        SEG, 500, 512, RGB, 255.0, "published", (524, 66, 65), ("other", "cattle"),
        prompt="A satellite image of New Zealand cattles"),  # as published
    "m-NeonTree": GeoBenchSet(
        SEG, 400, 512, RGB, 255.0, "ours", (270, 94, 93), ("other", "tree")),
    "m-cashew-plant": GeoBenchSet(SEG, 256, 256, S2, 4095.0, "ours", (1350, 400, 50), CASHEW),
    "m-SA-crop-type": GeoBenchSet(SEG, 256, 256, S2, 255.0, "ours", (3000, 1000, 1000), SA_CROP),
    "m-chesapeake": GeoBenchSet(
        SEG, 256, 256, RGB, 1.0, "published", (3000, 1000, 1000), CHESAPEAKE,
        prompt="A satellite image of Cheasapeake landcovers"),  # as published
}
# fmt: on

FOLDERS = {"folder": SINGLE, "masks": SEG, "images": "images"}
SCENES = {"scenes": SINGLE, "scenes_seg": SEG}
SCENE_SIZES = {"train": 4096, "val": 512, "test": 1024}


@dataclass(frozen=True)
class Defaults:
    """What a dataset name says before any file is opened; sides 0: no preference, not known."""

    side: int = 0
    prompt: str = PROMPT
    task: str = ""
    classes: tuple[str, ...] = ()
    native_side: int = 0


def known_names() -> list[str]:
    return [*SCENES, *FOLDERS, "tfds:<name>", "prepared:<folder>", *GEOBENCH]


def _unknown(name: str) -> ValueError:
    return ValueError(f"unknown dataset '{name}'; known: {', '.join(known_names())}")


def defaults(name: str) -> Defaults:
    """Sides of the backbone and of the images, prompt, task and classes that go with a name."""
    if name in GEOBENCH:
        row = GEOBENCH[name]
        return Defaults(row.side, row.prompt, row.task, row.classes, row.native_side)
    if name in SCENES:
        return Defaults(64, PROMPT, SCENES[name], CLASSES if name == "scenes" else LAND_COVER)
    if name in FOLDERS or name.startswith(("tfds:", "prepared:")):
        return Defaults(task=FOLDERS.get(name, ""))
    raise _unknown(name)


def _open_scenes(
    name: str, split: str, *, size: int = 0, seed: int = 0, side: int = 64
) -> SceneSource:
    if split not in SPLITS:
        raise ValueError(f"{name} has no split '{split}'; known: {', '.join(SPLITS)}")
    return SceneSource(SCENES[name], split, size or SCENE_SIZES[split], seed=seed, side=side)


def _open_masks(
    split: str,
    *,
    train: str,
    val: str = "",
    test: str = "",
    on_corrupt: str = "refuse",
    classes: Sequence[str] = (),
    ignore: int | None = None,
    fit: str = "refuse",
) -> Any:
    rules = MaskRules(tuple(classes), ignore, fit)
    return open_masks(split, train=train, val=val, test=test, on_corrupt=on_corrupt, rules=rules)


def _scaled(name: str, scaling: str) -> GeoBenchSet:
    row = GEOBENCH[name]
    if scaling not in ("default", "published", "ours"):
        raise ValueError(f"scaling='{scaling}' is not default, published or ours")
    if scaling == "published" and row.scaling == "ours":
        theirs = [key for key, other in GEOBENCH.items() if other.scaling == "published"]
        raise ValueError(
            f"{name} has no published scaling (only {', '.join(theirs)} have); use scaling=default"
        )
    return row


def _open_geobench(
    name: str,
    split: str,
    *,
    root: str = "",
    scaling: str = "default",
    partition: str = "",
    check_sizes: bool = True,
    label_fraction: float = 1.0,
    label_seed: int = 0,
) -> Any:
    """Few labels come from the published partition of that fraction where there is one."""
    row = _scaled(name, scaling)
    published = fraction_partition(set_folder(name, row.task, root), label_fraction)
    if label_fraction < 1 and published and not partition:
        partition, label_fraction = published, 1.0
    source = open_geobench(
        name, row, split, root=root, partition=partition or "default", check_sizes=check_sizes
    )
    return keep_fraction(source, label_fraction, label_seed) if split == "train" else source


def _call(name: str, opener: Callable[..., Any], args: tuple, options: dict[str, Any]) -> Any:
    """Calls an opener; an option it does not have is refused with the list of those it has."""
    parameters = inspect.signature(opener).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    wrong = sorted(options.keys() - known)
    if wrong:
        raise ValueError(
            f"dataset '{name}' has no option {', '.join(wrong)}; known: {', '.join(sorted(known))}"
        )
    return opener(*args, **options)


def open_source(name: str, split: str, **options: Any) -> Any:
    """A source by name: `len`, `[i] -> dict`, `.name .task .classes .fingerprint .native_side`.

    scenes, scenes_seg (size, seed, side) · folder, masks (train, val, test, on_corrupt; masks also
    classes, ignore, fit) · images (roots, exclude, holdout, on_corrupt) · tfds:<name> (data_dir,
    image_key, label_key, tfds_split, classes) · prepared:<folder>, written by data.prepare · m-* of
    GEO-Bench (root, scaling, partition, check_sizes). All but images: label_fraction and
    label_seed, which thin the train split.
    Raises ValueError on an unknown name or option, listing the known ones.
    """
    if name in GEOBENCH:
        return _call(name, _open_geobench, (name, split), options)
    if name == "images":
        return _call(name, open_images, (split,), options)
    fraction, seed = options.pop("label_fraction", 1.0), options.pop("label_seed", 0)
    if name in SCENES:
        source = _call(name, _open_scenes, (name, split), options)
    elif name.startswith("tfds:"):
        source = _call(name, open_tfds, (name.removeprefix("tfds:"), split), options)
    elif name.startswith("prepared:"):
        source = _call(name, open_prepared, (name.removeprefix("prepared:"), split), options)
    elif name == "folder":
        source = _call(name, open_class_folder, (split,), options)
    elif name == "masks":
        source = _call(name, _open_masks, (split,), options)
    else:
        raise _unknown(name)
    return keep_fraction(source, fraction, seed) if split == "train" else source

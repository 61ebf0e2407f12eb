"""Procedural satellite scenes: images with exact labels, land cover, objects and metadata.

A scene is a function of (seed, split, index): eight classes in turn, drawn in metres and seen
through a sensor (light, colour response, haze, clouds, blur, noise). The metadata is the true cause
of season, shadows, scale, building density and haze. The same scene can be rendered at any side:
its extent on the ground stays, so GSD halves when the side doubles. Captions: scene_text.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.scene_canvas import Canvas, Thing, between, smooth_noise
from data.scene_layouts import LAYOUTS
from data.scene_setting import Place, Setting, draw_place, draw_setting, raw_metadata
from data.transforms import normalise_metadata

CLASSES = tuple(LAYOUTS)
LAND_COVER = ("bare", "low vegetation", "trees", "water", "paved", "building")
OBJECTS = ("boat", "building", "plane", "tank")
SPLITS = {"train": 0, "val": 1, "test": 2}
VERSION = 1
"""Raise when any pixel of any scene changes: it is part of every fingerprint."""

_ROUGHNESS = np.array([0.10, 0.10, 0.16, 0.04, 0.05, 0.04], np.float32)


@dataclass(frozen=True)
class Scene:
    """image uint8 [S,S,3]; cover int32 [S,S] (LAND_COVER); things with boxes in pixels.

    A thing counts when at least half of its box lies inside; kinds seen in smaller part are `cut`.
    """

    image: np.ndarray
    label: int
    cover: np.ndarray
    things: tuple[Thing, ...]
    place: Place
    season: str
    snowy: bool
    cut: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return CLASSES[self.label]


def _snow(canvas: Canvas, rng, setting: Setting) -> None:
    if not setting.snow:
        return
    patches = smooth_noise(rng, canvas.side, 6) * np.float32(0.35) + np.float32(setting.snow)
    lies = np.array([1.0, 1.0, 0.35, 0.0, 0.25, 0.25], np.float32)[canvas.cover]
    alpha = np.clip(patches, 0, 0.92)[..., None] * lies[..., None]
    canvas.image += alpha * (np.float32([226, 230, 236]) - canvas.image)


def _clouds(canvas: Canvas, rng, cloud_cover: float) -> None:
    """Soft clouds over about `cloud_cover` of the image, never opaque; none below 5 %."""
    if cloud_cover < 0.05:
        return
    field = smooth_noise(rng, canvas.side, 3)
    for cells, weight in ((6, 0.5), (12, 0.25), (24, 0.14)):
        field += np.float32(weight) * smooth_noise(rng, canvas.side, cells)
    rank = int((1 - cloud_cover) * field.size)
    level = np.partition(field.ravel(), rank)[rank]
    shift = max(1, canvas.side // 12)
    shadow = np.clip(np.roll(field, (shift, shift), (0, 1)) - level, 0, 0.3)[..., None]
    canvas.image *= 1 - shadow
    alpha = np.clip((field - level + np.float32(0.12)) * np.float32(1.3), 0, 0.82)[..., None]
    canvas.image += alpha * (np.float32([236, 238, 240]) - canvas.image)


def _blur(image: np.ndarray, weight: float) -> np.ndarray:
    """Three-tap blur along both axes, edges kept."""
    w = np.float32(weight)
    for axis in (0, 1):
        before = np.roll(image, 1, axis)
        after = np.roll(image, -1, axis)
        first, last = [slice(None)] * 2, [slice(None)] * 2
        first[axis], last[axis] = slice(0, 1), slice(-1, None)
        before[tuple(first)], after[tuple(last)] = image[tuple(first)], image[tuple(last)]
        image = image * (1 - 2 * w) + w * (before + after)
    return image


def _sense(canvas: Canvas, rng, place: Place) -> np.ndarray:
    """What the sensor records, uint8: light, colour response, haze, contrast, blur, noise."""
    image = canvas.image * np.float32(between(rng, 0.76, 1.22))
    grey = (image[..., :1] + image[..., 1:2] + image[..., 2:]) / np.float32(3)
    image = grey + np.float32(between(rng, 0.4, 1.15)) * (image - grey)
    image *= 1 + np.float32(0.06) * (rng.random(3, dtype=np.float32) * 2 - 1)
    haze = between(rng, 0, 0.16) + 0.35 * place.cloud_cover
    image += np.float32(haze) * (np.float32([176, 190, 206]) - image)
    middle, contrast = np.float32(118), np.float32(between(rng, 0.8, 1.25))
    image = (image - middle) * contrast + middle
    image = _blur(image, between(rng, 0.02, 0.16))
    grain = rng.random(image.shape, dtype=np.float32) + rng.random(image.shape, dtype=np.float32)
    image += (grain - 1) * np.float32(between(rng, 2, 9))
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def draw_scene(seed: int, split: str, index: int, side: int = 64) -> Scene:
    """The scene `index` of a split. Raises ValueError on an unknown split or a side below 16."""
    if split not in SPLITS:
        raise ValueError(f"scenes have no split '{split}'; known: {', '.join(SPLITS)}")
    if side < 16:
        raise ValueError(f"side={side}: scenes need at least 16 pixels")
    rng = np.random.default_rng([seed, SPLITS[split], index])
    place, extent = draw_place(rng, side)
    setting = draw_setting(rng, place)
    canvas = Canvas(side, extent, setting.sun)
    label = index % len(CLASSES)
    LAYOUTS[CLASSES[label]](canvas, rng, setting)
    canvas.roughen(rng, _ROUGHNESS)
    _snow(canvas, rng, setting)
    _clouds(canvas, rng, place.cloud_cover)
    image = _sense(canvas, rng, place)
    return Scene(
        image=image,
        label=label,
        cover=canvas.cover.astype(np.int32),
        things=tuple(canvas.things),
        place=place,
        season=setting.season,
        snowy=setting.snow > 0,
        cut=frozenset(canvas.cut),
    )


class SceneSource:
    """Random-access scenes of one split. task: "classification" or "segmentation".

    Examples: image uint8 [S,S,3], label (int32 class, or int32 [S,S] land cover), metadata
    float32 [7] normalised, id. `scene(i)` gives the whole Scene (objects, place).
    """

    def __init__(self, task: str, split: str, size: int, *, seed: int = 0, side: int = 64):
        if task not in ("classification", "segmentation"):
            raise ValueError(f"scenes have no task '{task}'; use classification or segmentation")
        if split not in SPLITS:
            raise ValueError(f"scenes have no split '{split}'; known: {', '.join(SPLITS)}")
        self.name = "scenes" if task == "classification" else "scenes_seg"
        self.task, self.split, self.size, self.seed = task, split, int(size), int(seed)
        self.native_side = int(side)
        self.classes = CLASSES if task == "classification" else LAND_COVER
        # Both tasks show the same images: a cache of features serves both.
        self.fingerprint = f"scenes-v{VERSION}-{split}-{size}-seed{seed}-{side}px"

    def __len__(self) -> int:
        return self.size

    def labels(self) -> np.ndarray | None:
        """Class numbers of all scenes, without drawing them; None for land cover."""
        if self.task == "segmentation":
            return None
        return np.arange(self.size) % len(CLASSES)

    def scene(self, i: int) -> Scene:
        if not 0 <= i < self.size:
            raise IndexError(f"scene {i} of {self.size}")
        return draw_scene(self.seed, self.split, int(i), self.native_side)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.example(int(i), self.scene(int(i)))

    def example(self, i: int, scene: Scene) -> dict[str, Any]:
        """What scene number i, already drawn, is to a reader."""
        label = np.int32(scene.label) if self.task == "classification" else scene.cover
        metadata = normalise_metadata(**raw_metadata(scene.place))
        name = f"{self.split}-{i:06d}"
        return {"image": scene.image, "label": label, "metadata": metadata, "id": name}

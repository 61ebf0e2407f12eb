"""What fMoW, SpaceNet and Satlas say of a picture: captions with their drop rates, and metadata.

The wording is that the DiffusionSat weights were trained with (Khanna et al. 2024). Each function
takes the decoded parts of one sample of a tar file (see satellite_tars.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from data.geography import area, centroid, length, middle_of, tile_place
from data.images import ImageError
from data.satellite_sample import read_date
from data.wording import Piece, Wording, always, compose, sometimes

Fields = dict[str, float]
IMAGE = " satellite image"

_FMOW = (
    "airport airport_hangar airport_terminal amusement_park aquaculture archaeological_site barn "
    "border_checkpoint burial_site car_dealership construction_site crop_field dam "
    "debris_or_rubble educational_institution electric_substation factory_or_powerplant "
    "fire_station flooded_road fountain gas_station golf_course ground_transportation_station "
    "helipad hospital impoverished_settlement interchange lake_or_pond lighthouse "
    "military_facility multi-unit_residential nuclear_powerplant office_building "
    "oil_or_gas_facility park parking_lot_or_garage place_of_worship police_station port prison "
    "race_track railway_bridge recreational_facility road_bridge runway shipyard shopping_mall "
    "single-unit_residential smokestack solar_farm space_facility stadium storage_tank "
    "surface_mine swimming_pool toll_booth tower tunnel_opening waste_disposal "
    "water_treatment_facility wind_farm zoo"
)
FMOW = tuple(_FMOW.split())
"""Categories in the order of their numbers."""


@cache
def countries() -> dict[str, str]:
    """{ISO 3166-1 alpha-3 code: short name}."""
    text = Path(__file__).with_name("countries.txt").read_text(encoding="utf-8")
    rows = [row for line in text.splitlines() for row in line.split("|")]
    return {row[:3]: row[4:] for row in rows}


def _spaced(name: str) -> str:
    return name.replace("_", " ")


# ------------------------------------------------------------------------------------------- fMoW
Places = Mapping[tuple[str, int, int], str]
"""{(category, location, image): WKT polygon}, of the CSV file that comes with fMoW."""


def describe_fmow(parts: Mapping[str, Any], places: Places) -> tuple[Wording, Fields]:
    """parts: `output.cls` or `category.txt`, `metadata.json`. Without a polygon the place is
    unknown."""
    about = parts["metadata.json"]
    category = FMOW[parts["output.cls"]] if "output.cls" in parts else parts["category.txt"]
    country = countries().get(about["country_code"], about["country_code"])
    wording = compose(
        always("a"),
        sometimes(" fmow", 0.1),
        always(IMAGE),
        sometimes(f" of a {_spaced(category)}", 0.1),
        sometimes(f" in {country}", 0.1),
    )
    fields = read_date(about["timestamp"]) | {
        "gsd": float(about["gsd"]),
        "cloud_cover": float(about["cloud_cover"]) / 100,
    }
    polygon = about.get("raw_location") or places.get(_fmow_place(category, about), "")
    if polygon:
        fields["longitude"], fields["latitude"] = centroid(polygon)
    return wording, fields


def _fmow_place(category: str, about: Mapping) -> tuple[str, int, int]:
    """From names such as `airport_12_3_rgb.jpg`: location 12, image 3."""
    stem = about.get("img_filename", "").partition(".")[0]
    numbers = [part for part in stem.split("_") if part.isdigit()]
    return (category, *map(int, numbers[-2:])) if len(numbers) > 1 else (category, -1, -1)


# --------------------------------------------------------------------------------------- SpaceNet
# Longitude, latitude, gsd in metres, date ("" where none is known).
CITIES = {
    "Rio": (-43.196388, -22.908333, 0.5, ""),
    "Rotterdam": (4.462456, 51.926517, 0.5, "2019-08-31"),
    "Vegas": (-115.176468, 36.188110, 0.3, "2015-10-22"),
    "Paris": (2.349014, 48.864716, 0.3, "2016-02-29"),
    "Shanghai": (121.469170, 31.224361, 0.3, "2015-06-06"),
    "Khartoum": (32.522854, 15.508457, 0.3, "2015-04-13"),
    "Moscow": (37.618423, 55.751244, 0.3, "2018-02-13"),
    "Mumbai": (72.877426, 19.076090, 0.3, "2018-01-06"),
}
PROJECTED = "Rotterdam"
"""Its shapes are in metres of UTM zone 31; its place is that of the city."""


def describe_spacenet(key: str, parts: Mapping[str, Any]) -> tuple[Wording, Fields]:
    """key: holds the name of the city. parts: `metadata.json`, GeoJSON features."""
    city = next((name for name in CITIES if name.lower() in key.lower()), "")
    if not city:
        raise ImageError(f"{key}: names none of the cities {', '.join(CITIES)}")
    shapes = [f["geometry"] for f in parts["metadata.json"].get("features", ())]
    wording = compose(
        always("a"),
        sometimes(" spacenet", 0.1),
        always(IMAGE),
        sometimes(_buildings_or_roads(shapes, city == PROJECTED), 0.1),
        sometimes(f" in {city}", 0.1),
    )
    longitude, latitude, gsd, date = CITIES[city]
    found = None if city == PROJECTED else middle_of(shapes)
    longitude, latitude = found or (longitude, latitude)
    fields = {"longitude": longitude, "latitude": latitude, "gsd": gsd, "cloud_cover": 0.0}
    return wording, fields | (read_date(date) if date else {})


def _buildings_or_roads(shapes: Sequence[Mapping], projected: bool) -> str:
    if not shapes:
        return ""
    if "Polygon" in shapes[0]["type"]:
        covered = round(sum(area(shape, projected) for shape in shapes), 3)
        size = f" covering an area of {covered} squared meters" if covered else ""
        return f" of {len(shapes)} buildings{size}"
    metres = round(sum(length(shape, projected) for shape in shapes), 3)
    return f" of roads of length {metres} meters" if metres else " of no roads"


# ----------------------------------------------------------------------------------------- Satlas
_LINES = "airport_runway airport_taxiway raceway road railway river"
_AREAS = (
    "aquafarm lock dam solar_farm power_plant gas_station park parking_garage parking_lot landfill "
    "quarry stadium airport"
)
# task: (kind, classes in the order of their numbers)
SATLAS = {
    "polyline_bin_segment": ("masks", _LINES),
    "bin_segment": (
        "masks",
        f"{_AREAS} airport_runway airport_taxiway airport_apron airport_hangar airstrip "
        "airport_terminal ski_resort theme_park storage_tank silo track raceway wastewater_plant "
        "road railway river water_park pier water_tower street_lamp traffic_signals power_tower "
        "power_substation building bridge road_motorway road_trunk road_primary road_secondary "
        "road_tertiary road_residential road_service road_track road_pedestrian",
    ),
    "land_cover": (
        "map",
        "background water developed tree shrub grass crop bare snow wetland mangroves moss",
    ),
    "crop_type": (
        "map",
        "invalid rice grape corn sugarcane tea hop wheat soy barley oats rye cassava potato "
        "sunflower asparagus coffee",
    ),
    "water_event": ("map", "invalid background water_event"),
    "tree_cover": ("values", ""),
    "dem": ("values", ""),
    "point": (
        "things",
        "background wind_turbine lighthouse mineshaft aerialway_pylon helipad fountain toll_booth "
        "chimney communications_tower flagpole petroleum_well water_tower offshore_wind_turbine "
        "offshore_platform power_tower",
    ),
    "rooftop_solar_panel": ("things", "background rooftop_solar_panel"),
    "building": ("things", "background ms_building"),
    "polygon": (
        "things",
        f"background {_AREAS} airport_apron airport_hangar airport_terminal ski_resort theme_park "
        "storage_tank silo track wastewater_plant power_substation pier crop water_park",
    ),
    "airplane": ("things", "background airplane"),
    "vessel": ("things", "background vessel"),
    "wildfire": ("masks", "fire_retardant burned"),
    "cloud": ("masks", "background cloud shadow"),
    "flood": ("masks", "background water"),
    "smoke": ("classes", "no partial yes"),
    "snow": ("classes", "no partial yes"),
    "park_sport": (
        "classes",
        "american_football badminton baseball basketball cricket rugby soccer tennis volleyball",
    ),
    "park_type": ("classes", "park pitch golf_course cemetery"),
    "power_plant_type": ("classes", "oil nuclear coal gas"),
    "quarry_resource": ("classes", "sand gravel clay coal peat"),
    "track_sport": ("classes", "running cycling horse"),
    "road_type": (
        "classes",
        "motorway trunk primary secondary tertiary residential service track pedestrian",
    ),
}
GROUPED = 0.67
"""Chance that objects are listed by quadrant."""
_ZOOM, _TILE = 17, 512


def frame_of(key: str, count: int) -> int:
    """Which of several pictures of one place is taken: the same one every time."""
    return zlib.crc32(key.encode()) % count


def choose_frame(key: str, stack: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, int]:
    """(picture [H, W, 3], its place in names) of a stack [T, H, W, 3] of one place.

    As the published code: names are those of the last pictures of the stack; the one called
    "anchor" is taken, else any; here it is the same one every time. Raises ImageError.
    """
    if np.ndim(stack) != 4 or not len(names) or len(stack) < len(names):
        raise ImageError(
            f"{key}: pictures {np.shape(stack)} with {len(names)} image_names; need [T, H, W, 3] "
            "and a name for each of the last of them"
        )
    anchor = (place for place, name in enumerate(names) if "anchor" in name)
    frame = next(anchor, frame_of(key, len(names)))
    return stack[len(stack) - len(names) + frame], frame


def describe_satlas(
    key: str, parts: Mapping[str, Any], size: tuple[int, int], frame: int
) -> tuple[Wording, Fields]:
    """key: `satlas_COLUMN_ROW...`. parts: `info.json`, `targets.pyd`. size: height, width. frame:
    place of the picture in image_names, which tell its date."""
    about, targets = parts["info.json"], parts["targets.pyd"]
    targets = targets[0] if isinstance(targets, (list, tuple)) else targets
    task = about["task_name"]
    if task not in SATLAS:
        raise ImageError(f"{key}: unknown Satlas task '{task}'")
    listed = _satlas_list(task, targets, size)
    wording = compose(always("a"), sometimes(" satlas", 0.5), always(IMAGE), listed)
    column, row = map(int, key.split("_")[1:3])
    if max(column, row) >= 2**_ZOOM:  # places in pixels instead of tiles
        column, row = column / _TILE, row / _TILE
    longitude, latitude = tile_place(column, row, _ZOOM)
    shrunk = max(float(targets.get("scale_factor", 1.0)), 0.01)
    fields = {"longitude": longitude, "latitude": latitude, "gsd": 1 / shrunk, "cloud_cover": 0.0}
    return wording, fields | read_date(about["image_names"][frame].rsplit("_", 1)[-1])


def _satlas_list(task: str, targets: Mapping, size: tuple[int, int]) -> Piece:
    kind, names = SATLAS[task][0], [_spaced(name) for name in SATLAS[task][1].split()]
    if kind == "things":
        labels, boxes = np.asarray(targets["labels"], int), np.asarray(targets["boxes"], float)
        whole = _counted(labels, names)
        return ((GROUPED, f" of {_by_quadrant(labels, boxes, names, size)}"),
                (1 - GROUPED, f" of {whole}")) if whole else ()  # fmt: skip
    tell = {"map": _shares, "masks": _mask_shares, "values": _value_shares, "classes": _kinds}[kind]
    text = ", ".join(tell(task, targets, names))
    return always(f" of {text}") if text else ()


def _counted(labels: np.ndarray, names: Sequence[str]) -> str:
    found = zip(*np.unique(labels, return_counts=True), strict=True)
    return ", ".join(f"{count} {names[label]}{'s' if count > 1 else ''}" for label, count in found)


def _by_quadrant(
    labels: np.ndarray, boxes: np.ndarray, names: Sequence[str], size: tuple[int, int]
) -> str:
    """Boxes [N, 4] are x0, y0, x1, y1 in pixels; the middle of a box decides."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    low, right = middle[:, 1] >= size[0] / 2, middle[:, 0] >= size[1] / 2
    quadrants = {
        "top left": ~low & ~right,
        "top right": ~low & right,
        "bottom right": low & right,
        "bottom left": low & ~right,
    }
    told = [(name, _counted(labels[where], names)) for name, where in quadrants.items()]
    return ", ".join(f"{things} in the {name}" for name, things in told if things)


def _shares(task: str, targets: Mapping, names: Sequence[str]) -> list[str]:
    """Percent of the area of each class; class 0 is "unknown"."""
    image = np.asarray(targets["im"])
    found = zip(*np.unique(image, return_counts=True), strict=True)
    return [f"{round(100 * n / image.size)}% {names[label]}" for label, n in found if label]


def _mask_shares(task: str, targets: Mapping, names: Sequence[str]) -> list[str]:
    shares = [100 * float((np.asarray(mask) > 0).mean()) for mask in targets["im"]]
    return [f"{round(share, 2)}% {name}" for share, name in zip(shares, names) if share]


def _value_shares(task: str, targets: Mapping, names: Sequence[str]) -> list[str]:
    image = np.asarray(targets["im"])
    found = zip(*np.unique(image, return_counts=True), strict=True)
    return [
        f"{round(100 * n / image.size, 2)}% area has {round(value / 255 * 100, 4)}% {_spaced(task)}"
        for value, n in found
        if value
    ]


def _kinds(task: str, targets: Mapping, names: Sequence[str]) -> list[str]:
    of = {"park_sport": "recreational facility", "park_type": ""}
    what = of.get(task, _spaced(task.rpartition("_")[0]))
    return [f"a {names[label]} {what}".rstrip() for label in np.atleast_1d(targets["label"])]

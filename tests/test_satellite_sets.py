"""Captions with their drop rates, and metadata, of fMoW, SpaceNet and Satlas."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.images import ImageError
from data.satellite_sets import (
    FMOW,
    SATLAS,
    countries,
    describe_fmow,
    describe_satlas,
    describe_spacenet,
    frame_of,
)
from data.wording import draw_caption, full_caption

ABOUT = {"gsd": 0.6, "cloud_cover": 50, "timestamp": "2015-07-02T00:00:00Z", "country_code": "USA"}


def shares(wording, words: list[str], draws: int = 3000) -> list[float]:
    """How often each word is in a drawn caption."""
    rng, found = np.random.default_rng(0), Counter()
    for _ in range(draws):
        text = draw_caption(wording, rng)
        found.update(word for word in words if word in text)
    return [found[word] / draws for word in words]


def test_tables_are_whole():
    assert len(FMOW) == 62 and list(FMOW) == sorted(FMOW)
    assert len(countries()) == 249 and countries()["CIV"] == "Côte d'Ivoire"
    assert {len(code) for code in countries()} == {3}
    counts = {task: len(names.split()) for task, (_, names) in SATLAS.items()}
    assert (counts["bin_segment"], counts["polygon"], counts["point"]) == (47, 27, 16)


def test_fmow_captions_drop_each_part_in_one_of_ten():
    wording, fields = describe_fmow({"output.cls": 11, "metadata.json": ABOUT}, {})
    assert (
        full_caption(wording)
        == "a fmow satellite image of a crop field in United States of America"
    )
    found = shares(wording, ["fmow", "of a crop field", "in United", "satellite image"])
    np.testing.assert_allclose(found, [0.9, 0.9, 0.9, 1.0], atol=0.02)
    assert fields == {"gsd": 0.6, "cloud_cover": 0.5, "year": 2015, "month": 7, "day": 2}


def test_fmow_takes_a_category_in_words_and_its_own_polygon():
    about = ABOUT | {"raw_location": "POLYGON ((1 1, 3 1, 3 3, 1 3, 1 1))", "country_code": "XKX"}
    wording, fields = describe_fmow({"category.txt": "race_track", "metadata.json": about}, {})
    assert full_caption(wording) == "a fmow satellite image of a race track in XKX"
    assert (fields["longitude"], fields["latitude"]) == (2, 2)


def building(at: float, kind: str = "Polygon"):
    ring = [[at, 10.0], [at + 0.001, 10.0], [at + 0.001, 10.001], [at, 10.001], [at, 10.0]]
    return {"geometry": {"type": kind, "coordinates": [ring] if kind == "Polygon" else ring}}


def test_spacenet_tells_buildings_roads_and_their_size():
    def told(features, key="spacenet_3_AOI_Paris_img1"):
        wording, fields = describe_spacenet(key, {"metadata.json": {"features": features}})
        return full_caption(wording), wording, fields

    text, wording, fields = told([building(2.0), building(2.002)])
    words = text.removeprefix(
        "a spacenet satellite image of 2 buildings covering an area of "
    ).split()
    assert float(words[0]) == pytest.approx(2 * 109.64 * 110.6, rel=3e-3)
    assert words[1:] == ["squared", "meters", "in", "Paris"]
    np.testing.assert_allclose(
        shares(wording, ["spacenet", "buildings", "in Paris"]), 0.9, atol=0.02
    )
    assert fields["longitude"] == pytest.approx(2.0015) and fields["gsd"] == 0.3
    assert (fields["year"], fields["month"], fields["day"]) == (2016, 2, 29)
    assert "roads of length 440." in told([building(2.0, "LineString")])[0]
    assert told([])[0] == "a spacenet satellite image in Paris"
    empty = {"geometry": {"type": "LineString", "coordinates": [[2.0, 10.0]]}}
    assert told([empty])[0] == "a spacenet satellite image of no roads in Paris"


def test_cities_have_a_place_and_rio_has_no_date():
    parts = {"metadata.json": {}}
    wording, fields = describe_spacenet("spacenet_1_AOI_Rio_img3", parts)
    assert fields == {"longitude": -43.196388, "latitude": -22.908333, "gsd": 0.5, "cloud_cover": 0}
    metres = {
        "type": "Polygon",
        "coordinates": [[[6e5, 5.7e6], [600010, 5.7e6], [600010, 5700010]]],
    }
    parts = {"metadata.json": {"features": [{"geometry": metres}]}}
    wording, fields = describe_spacenet("spacenet_6_AOI_Rotterdam_1", parts)
    assert fields["longitude"] == 4.462456 and "an area of 50.0 squared" in full_caption(wording)
    with pytest.raises(ImageError, match="names none of the cities Rio"):
        describe_spacenet("spacenet_1_AOI_Berlin", parts)


def satlas_caption(task: str, targets: dict, size=(100, 100)) -> str:
    about = {"task_name": task, "image_names": ["x_2020-01-02"]}
    parts = {"info.json": about, "targets.pyd": [targets]}
    return full_caption(describe_satlas("satlas_65536_65536_1", parts, size, 0)[0])


def test_satlas_lists_things_by_quadrant_in_two_of_three():
    targets = {
        "labels": np.array([2, 1, 1]),
        "boxes": [[60, 0, 80, 9], [0, 60, 9, 80], [0, 0, 9, 9]],
    }
    about = {"task_name": "vessel", "image_names": ["x_2020-01-02"]}
    with pytest.raises(IndexError):
        satlas_caption("vessel", targets)
    about["task_name"] = "point"
    parts = {"info.json": about, "targets.pyd": [targets]}
    wording, _ = describe_satlas("satlas_1_1_1", parts, (100, 100), 0)
    assert full_caption(wording) == (
        "a satlas satellite image of 1 wind turbine in the top left, "
        "1 lighthouse in the top right, 1 wind turbine in the bottom left"
    )
    found = shares(wording, ["satlas", "in the top left", "2 wind turbines, 1 lighthouse"])
    np.testing.assert_allclose(found, [0.5, 0.67, 0.33], atol=0.03)
    empty = {"labels": np.zeros(0, int), "boxes": np.zeros((0, 4))}
    assert satlas_caption("vessel", empty) == "a satlas satellite image"


def test_satlas_tells_areas_values_and_classes():
    cover = np.zeros((10, 10), np.uint8)
    cover[:5], cover[5, 0] = 1, 3
    assert satlas_caption("land_cover", {"im": cover}).endswith(" of 50% water, 1% tree")
    masks = np.stack([cover == 9, cover == 1])
    assert satlas_caption("wildfire", {"im": masks}).endswith(" of 50.0% burned")
    values = np.where(cover == 1, 51, 0)
    assert satlas_caption("tree_cover", {"im": values}).endswith(
        " of 50.0% area has 20.0% tree cover"
    )
    assert satlas_caption("park_sport", {"label": [7]}).endswith(
        " of a tennis recreational facility"
    )
    assert satlas_caption("park_type", {"label": 3}).endswith(" of a cemetery")
    assert satlas_caption("road_type", {"label": [0, 7]}).endswith(
        " of a motorway road, a track road"
    )
    with pytest.raises(ImageError, match="unknown Satlas task 'fish'"):
        satlas_caption("fish", {})


def test_satlas_places_are_tiles_or_their_pixels_and_dates_those_of_the_frame():
    about = {"task_name": "smoke", "image_names": ["a_2018-05-06", "b_c_2020-07-08"]}
    parts = {"info.json": about, "targets.pyd": ({"label": [0], "scale_factor": 0.5},)}
    _, by_tile = describe_satlas("satlas_32768_65536_9", parts, (8, 8), 1)
    assert (by_tile["longitude"], by_tile["latitude"], by_tile["gsd"]) == (-90, 0, 2.0)
    assert (by_tile["year"], by_tile["month"], by_tile["day"]) == (2020, 7, 8)
    _, by_pixel = describe_satlas(f"satlas_{32768 * 512}_{65536 * 512}_9", parts, (8, 8), 1)
    assert by_pixel == by_tile
    assert {frame_of(f"key{k}", 3) for k in range(20)} == {0, 1, 2} and frame_of("a", 1) == 0

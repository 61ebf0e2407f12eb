"""A small prediction file with every task, and rows whose prediction is the truth."""

from __future__ import annotations

import copy

from geodit_jax.boxes import format_boxes

SIZE = [100, 100]
CAPTIONS = [
    ["there are many green trees in the park .", "Many trees are in this park."],
    ["two large white storage tanks are here", "White tanks beside a road."],
    ["a winding river runs through a city", "The city lies at a river."],
]
SHIPS = [[10, 10, 30, 30], [50, 50, 80, 90]]


def make_rows() -> list[dict]:
    """Eleven rows that are answered perfectly; boxes as whole pixels."""
    rows = [
        {"id": f"c{i}", "task": "caption", "dataset": "ucm", "answers": several}
        | {"prediction": several[0]}
        for i, several in enumerate(CAPTIONS)
    ]
    asked = [("presence", "yes"), ("count", "3"), ("location", "top left")]
    rows += [
        {"id": f"q{i}", "task": "vqa", "dataset": "ucm", "category": kind, "image": "p.png"}
        | {"question": f"about {kind}?", "answers": [answer], "prediction": answer}
        for i, (kind, answer) in enumerate(asked)
    ]
    classes = ["river", "forest", "dense residential"]
    rows += [
        {"id": f"k{i}", "task": "classification", "dataset": "aid", "answers": [name]}
        | {"classes": classes, "prediction": name}
        for i, name in enumerate(classes[:2])
    ]
    rows += [
        {"id": f"g{i}", "task": "grounding", "dataset": "vhr", "question": "the ship"}
        | {"boxes": [box], "size": SIZE, "codec": "pixel"}
        | {"prediction": format_boxes([box], SIZE, "pixel")}
        for i, box in enumerate(SHIPS)
    ]
    rows.append(
        {"id": "d0", "task": "detection", "dataset": "vhr", "question": "ship", "boxes": SHIPS}
        | {"labels": ["ship"] * 2, "size": SIZE, "codec": "pixel"}
        | {"prediction": format_boxes(SHIPS, SIZE, "pixel")}
    )
    return copy.deepcopy(rows)


def find(result: dict, dataset: str, task: str) -> dict:
    """The values of one group by name."""
    for group in result["groups"]:
        if (group["dataset"], group["task"]) == (dataset, task):
            return {name: score["value"] for name, score in group["metrics"].items()}
    raise KeyError((dataset, task))

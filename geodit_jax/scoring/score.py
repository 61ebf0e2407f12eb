"""Scores of a prediction file, by dataset and task, in one of two profiles that never mix."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from common_jax.files import write_atomic, write_json
from common_jax.report import format_table
from geodit_jax.scoring import compat, standard
from geodit_jax.scoring.rows import Row, read_rows
from geodit_jax.scoring.tokenise import tokenise

PROFILES = {"standard": standard, "paper_compat": compat}
Source = str | os.PathLike | Iterable[Mapping]


def score_predictions(
    source: Source, profile: str = "standard", *, codec: str | None = None, meteor: bool = True
) -> dict:
    """Scores of a prediction file (JSONL) or of such rows; nothing else is read.

    Returns {profile, rows, notes, groups}, a group being
        {dataset, task, rows, left_out: {reason: rows}, not_measured: {name: reason},
         metrics: {name: {value, low, high}}}
    sorted by dataset and task; low and high bound 95 % (pictures drawn again), None where they are
    not worth their cost. The order of rows changes nothing. Rows without a true answer are left
    out and counted; rows of the task chat have no score.

    codec: notation of boxes where a row does not name its own; None guesses from the text.
    meteor: False leaves out METEOR, which takes seconds and Java.
    ValueError: unknown profile, or a row that cannot be read (`rows.read_rows`).
    """
    if profile not in PROFILES:
        raise ValueError(f"profile={profile!r}; use one of {', '.join(PROFILES)}")
    rows = read_rows(source)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.dataset, row.task), []).append(row)
    return {
        "profile": profile,
        "rows": len(rows),
        "notes": list(PROFILES[profile].NOTES),
        "groups": [_score_group(found, profile, codec, meteor) for found in groups.values()],
    }


def _score_group(rows: list[Row], profile: str, codec: str | None, meteor: bool) -> dict:
    dataset, task = rows[0].dataset, rows[0].task
    group = {"dataset": dataset, "task": task, "rows": 0, "left_out": {}, "not_measured": {}}
    scorer = PROFILES[profile].SCORERS.get(task)
    if scorer is None:
        return group | {"left_out": {"no score for free conversation": len(rows)}, "metrics": {}}
    kept = [row for row in rows if _has_truth(row)]
    if len(kept) < len(rows):
        group["left_out"] = {"no true answer": len(rows) - len(kept)}
    if not kept:
        return group | {"metrics": {}}
    options = {"meteor": meteor} if task == "caption" else {}
    metrics, missing = scorer(kept, codec, **options)
    return group | {"rows": len(kept), "metrics": metrics, "not_measured": missing}


def _has_truth(row: Row) -> bool:
    if row.task == "caption":
        return any(tokenise(answer) for answer in row.answers)
    return bool(row.answers) or row.task not in ("vqa", "classification")


# ----------------------------------------------------------------------------------------- tables
def merge_scores(results: Sequence[Mapping]) -> dict:
    """One result of several of the same profile, such as one file per dataset.

    ValueError for different profiles, or when two hold the same dataset and task.
    """
    profile = _same_profile(results)
    groups, seen = [], set()
    for group in (group for result in results for group in result["groups"]):
        key = (group["dataset"], group["task"])
        if key in seen:
            raise ValueError(
                f"two results hold {key[1]} of {key[0] or 'the unnamed dataset'}; score their "
                "predictions in one file, or compare them with compare_scores"
            )
        seen.add(key)
        groups.append(group)
    return {
        "profile": profile,
        "rows": sum(result["rows"] for result in results),
        "notes": list(results[0]["notes"]),
        "groups": sorted(groups, key=lambda group: (group["dataset"], group["task"])),
    }


def _same_profile(results: Sequence[Mapping]) -> str:
    profiles = sorted({result["profile"] for result in results})
    if len(profiles) != 1:
        raise ValueError(
            f"results of the profiles {', '.join(profiles) or '(none)'} cannot stand in one "
            "table: they measure different things; score all predictions with one profile"
        )
    return profiles[0]


def format_scores(result: Mapping) -> str:
    """Text table: a line per dataset, task and metric, then what was left out, then the notes."""
    lines, remarks = [], []
    for group in result["groups"]:
        name = {"dataset": group["dataset"] or "-", "task": group["task"], "n": group["rows"]}
        for metric, score in group["metrics"].items():
            value = score["value"]
            hundred = None if value is None else 100 * value
            lines.append({**name, "metric": metric, **score, "x100": hundred})
        for metric, reason in group["not_measured"].items():
            lines.append({**name, "metric": metric, "value": "not measured"})
            remarks.append(f"{name['dataset']} {name['task']}: {reason}")
        for reason, count in group["left_out"].items():
            remarks.append(f"{name['dataset']} {name['task']}: {count} rows left out: {reason}")
    columns = ["dataset", "task", "n", "metric", ("value", ".4f")]
    columns += [("low", ".4f"), ("high", ".4f"), ("x100", ".1f")]
    title = f"Profile {result['profile']}, {result['rows']} predictions; low, high: 95 %"
    table = format_table(lines, columns, title=title) if lines else f"{title}\n(no scores)"
    return "\n".join([table, "", *dict.fromkeys(remarks), *result["notes"]]).strip()


def compare_scores(results: Mapping[str, Mapping]) -> str:
    """Text table with a column per named result, such as a model and its baselines.

    ValueError for results of different profiles.
    """
    profile = _same_profile(list(results.values()))
    lines: dict[tuple, dict] = {}
    for name, result in results.items():
        for group in result["groups"]:
            for metric, score in group["metrics"].items():
                key = (group["dataset"] or "-", group["task"], metric)
                line = lines.setdefault(key, dict(zip(("dataset", "task", "metric"), key)))
                line[name] = score["value"]
    columns = ["dataset", "task", "metric", *((name, ".4f") for name in results)]
    return format_table(list(lines.values()), columns, title=f"Profile {profile}")


def main_score(
    predictions: str | os.PathLike,
    out: str | os.PathLike | None,
    profile: str = "standard",
    *,
    codec: str | None = None,
) -> dict:
    """Scores a prediction file, prints the table, and writes `out` (JSON) with a .txt beside it.

    out: path of a JSON file, or None to write nothing. Returns the result.
    """
    result = score_predictions(predictions, profile, codec=codec)
    table = format_scores(result)
    print(table)
    if out is not None:
        write_json(out, result)
        write_atomic(Path(out).with_suffix(".txt"), (table + "\n").encode())
    return result

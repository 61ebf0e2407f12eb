"""Scores of a whole prediction file in both profiles."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_rows import SHIPS, find, make_rows

from geodit_jax.scoring import text
from geodit_jax.scoring.score import (
    PROFILES,
    compare_scores,
    format_scores,
    main_score,
    merge_scores,
    score_predictions,
)
from geodit_jax.scoring.tokenise import tokenise

PERFECT = {
    ("ucm", "caption"): ("rouge_l", "bleu_1", "bleu_4"),
    ("ucm", "vqa"): (
        "accuracy",
        "accuracy_mean_of_types",
        "contains",
        "accuracy/presence",
        "accuracy/count",
        "accuracy/location",
    ),
    ("aid", "classification"): ("accuracy", "contains"),
    ("vhr", "grounding"): ("acc_0.25", "acc_0.50", "acc_0.70", "acc_0.50_strict", "mean_iou"),
    ("vhr", "detection"): (
        "map_0.50",
        "ap_0.50/ship",
        "ap_image_0.50",
        "f1_0.50",
        "f1_0.50_hungarian",
        "precision_0.50",
        "recall_0.50",
    ),
}
COMPAT = {
    ("ucm", "caption"): ("bleu_4_characters", "rouge_l_first", "cider_like"),
    ("ucm", "vqa"): ("accuracy_substring",),
    ("aid", "classification"): ("accuracy_substring",),
    ("vhr", "grounding"): ("acc_0.50_corner_size", "mean_iou_corner_size"),
    ("vhr", "detection"): ("ap_image_0.50_corner_size", "f1_image_0.50_corner_size"),
}


def score(rows, profile="standard"):
    return score_predictions(rows, profile, meteor=False)


# ------------------------------------------------------------------------------------------ scores
@pytest.mark.parametrize(("profile", "names"), [("standard", PERFECT), ("paper_compat", COMPAT)])
def test_perfect_predictions_have_every_score_one(profile, names):
    result = score(make_rows(), profile)
    assert result["profile"] == profile and result["rows"] == 11
    assert [(g["dataset"], g["task"]) for g in result["groups"]] == sorted(names)
    for (dataset, task), metrics in names.items():
        found = find(result, dataset, task)
        for name in metrics:
            assert found[name] == pytest.approx(1), (task, name)


@pytest.mark.parametrize("profile", PROFILES)
def test_empty_predictions_have_every_score_zero(profile):
    rows = [{**row, "prediction": ""} for row in make_rows()]
    for group in score(rows, profile)["groups"]:
        for name, metric in group["metrics"].items():
            wanted = {"empty": 1, "unreadable": 1, "precision_0.50": None}.get(name, 0)
            assert metric["value"] == wanted, (group["task"], name)


def test_scores_of_captions_are_those_of_the_functions():
    rows = make_rows()[:3]
    rows[0]["prediction"] = "many green trees"
    found = find(score(rows), "ucm", "caption")
    said = [tokenise(row["prediction"]) for row in rows]
    truth = [[tokenise(answer) for answer in row["answers"]] for row in rows]
    assert found["cider"] == pytest.approx(text.cider_d(said, truth).mean())
    assert found["bleu_4"] == pytest.approx(text.bleu(text.bleu_counts(said, truth).sum(0))[3])
    assert 0 < found["rouge_l"] < 1


def test_questions_are_averaged_over_questions_and_over_types():
    rows = [
        {"id": str(i), "task": "vqa", "category": kind, "prediction": said, "answers": ["yes"]}
        for i, (kind, said) in enumerate(
            [("presence", "yes"), ("presence", "yes"), ("presence", "no"), ("comp", "no")]
        )
    ]
    found = find(score(rows), "", "vqa")
    assert found["accuracy"] == 0.5
    assert found["accuracy_mean_of_types"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["accuracy/presence"] == pytest.approx(2 / 3) and found["accuracy/comp"] == 0


def test_detection_is_averaged_over_classes_with_truth():
    rows = make_rows()[-1:]
    blank = {"id": "d1", "task": "detection", "dataset": "vhr", "size": [100, 100]}
    rows.append({**blank, "question": "car", "boxes": [[0, 0, 9, 9]], "prediction": "none"})
    rows.append({**blank, "question": "plane", "prediction": "[0,0,9,9]", "codec": "pixel"})
    found = find(score(rows), "vhr", "detection")
    assert found["map_0.50"] == 0.5
    assert found["ap_0.50/car"] == 0 and found["ap_0.50/plane"] is None
    assert found["f1_0.50"] == pytest.approx(2 * 2 / (3 + 3))


def test_vrsbench_is_scored_by_its_own_rule_too():
    # Corners 0 and 25 of 100 against 0 and 12: one wider, 13/26 instead of 12/25.
    row = {"id": "1", "task": "grounding", "size": [200, 200], "boxes": [[0, 0, 50, 200]]}
    row |= {"prediction": "[0,0,24,200]", "codec": "pixel"}
    ours = find(score([{**row, "dataset": "VRSBench"}]), "VRSBench", "grounding")
    assert ours["acc_0.50"] == 0 and ours["acc_0.50_vrsbench"] == 1
    assert "acc_0.50_vrsbench" not in find(score([{**row, "dataset": "rsvg"}]), "rsvg", "grounding")


def test_grounding_by_category_where_there_are_several():
    rows = make_rows()[8:10]
    rows[0]["category"], rows[1]["category"] = "unique", "non-unique"
    rows[1]["prediction"] = ""
    found = find(score(rows), "vhr", "grounding")
    assert found["acc_0.50/unique"] == 1 and found["acc_0.50/non-unique"] == 0


def test_corners_read_as_sizes_inflate_overlaps():
    row = make_rows()[8] | {"boxes": [[50, 50, 60, 60]], "prediction": "[58,58,66,66]"}
    assert find(score([row]), "vhr", "grounding")["acc_0.50"] == 0
    assert find(score([row], "paper_compat"), "vhr", "grounding")["acc_0.50_corner_size"] == 1


# ----------------------------------------------------------------------------------- rows left out
def test_rows_without_a_true_answer_are_left_out_and_counted():
    rows = make_rows()
    rows[0]["answers"], rows[1]["answers"], rows[3]["answers"] = [], [" ", "..."], [""]
    rows.append({"id": "x", "task": "chat", "prediction": "hello"})
    for profile in PROFILES:
        result = score(rows, profile)
        groups = {(g["dataset"], g["task"]): g for g in result["groups"]}
        assert groups["ucm", "caption"]["left_out"] == {"no true answer": 2}
        assert groups["ucm", "caption"]["rows"] == 1 and groups["ucm", "vqa"]["rows"] == 2
        assert groups["", "chat"]["left_out"] == {"no score for free conversation": 1}
        table = format_scores(result)
        assert "ucm caption: 2 rows left out: no true answer" in table
    assert score([rows[-1]])["groups"][0]["metrics"] == {}
    assert "(no scores)" in format_scores(score([rows[-1]]))


def test_meteor_is_reported_as_not_measured_with_the_reason():
    result = score(make_rows())
    group = next(g for g in result["groups"] if g["task"] == "caption")
    assert group["not_measured"] == {"meteor": "METEOR was switched off"}
    line = next(x for x in format_scores(result).splitlines() if " meteor " in x)
    assert "not measured" in line


# ---------------------------------------------------------------------------------------- profiles
def test_profiles_never_stand_in_one_table():
    rows = make_rows()
    standard, compat = score(rows), score(rows, "paper_compat")
    with pytest.raises(ValueError, match="profiles paper_compat, standard cannot stand in one"):
        merge_scores([standard, compat])
    with pytest.raises(ValueError, match="cannot stand in one"):
        compare_scores({"a": standard, "b": compat})
    shared = {n for g in standard["groups"] for n in g["metrics"]} & {
        n for g in compat["groups"] for n in g["metrics"]
    }
    assert not shared, "a name that both profiles use could be mixed up"
    assert "Not comparable" in format_scores(compat)


def test_an_unknown_profile_is_refused():
    with pytest.raises(ValueError, match="profile='paper'; use one of standard, paper_compat"):
        score(make_rows(), "paper")


def test_results_of_several_files_merge_to_that_of_one():
    rows = make_rows()
    parts = [score([r for r in rows if r["dataset"] == name]) for name in ("vhr", "aid", "ucm")]
    assert merge_scores(parts) == score(rows)
    with pytest.raises(ValueError, match="two results hold classification of aid"):
        merge_scores([parts[1], parts[1]])


def test_models_stand_side_by_side():
    rows = make_rows()
    table = compare_scores({"seeing": score(rows), "blind": score(rows[:3])})
    assert "seeing" in table and "blind" in table
    line = next(line for line in table.splitlines() if "map_0.50" in line)
    assert line.split() == ["vhr", "detection", "map_0.50", "1.0000", "-"]


# ------------------------------------------------------------------------------------------- files
def test_the_order_of_lines_changes_no_score():
    rows = make_rows()
    rows[0]["prediction"], rows[4]["prediction"] = "a park", "4"
    rows[10]["prediction"] = "[10,10,30,30;0,0,5,5]"
    before = score(rows)
    assert score(rows[::-1]) == before
    order = np.random.default_rng(1).permutation(len(rows))
    assert score([rows[i] for i in order]) == before


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=11, max_size=11), st.sampled_from(list(PROFILES)))
def test_no_generated_text_breaks_a_score_or_leaves_its_range(texts, profile):
    rows = [{**row, "prediction": said} for row, said in zip(make_rows(), texts)]
    for group in score(rows, profile)["groups"]:
        for name, metric in group["metrics"].items():
            top = 10 if name == "cider" else 1
            assert metric["value"] is None or 0 <= metric["value"] <= top + 1e-9, name


def test_the_command_writes_scores_and_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text, "missing_for_meteor", lambda: "METEOR needs Java; none is installed")
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    result = main_score(path, tmp_path / "out" / "scores.json", "standard")
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == result
    table = (tmp_path / "out" / "scores.txt").read_text()
    assert table.strip() == format_scores(result) and table in capsys.readouterr().out
    assert "METEOR needs Java" in table
    assert main_score(path, None, "paper_compat")["profile"] == "paper_compat"


def test_boxes_of_the_table_are_those_of_the_picture():
    row = make_rows()[-1] | {"prediction": "[0.10,0.10,0.30,0.30;0.50,0.50,0.80,0.90]"}
    del row["codec"]
    assert row["boxes"] == SHIPS
    assert find(score([row]), "vhr", "detection")["map_0.50"] == 1
    forced = score_predictions([row], codec="int100", meteor=False)
    assert find(forced, "vhr", "detection")["map_0.50"] == 0

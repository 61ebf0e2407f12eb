"""Questions and answers of records, and templates of one's own."""

from __future__ import annotations

import pytest

from data.records import TASKS, Record
from geodit_jax.boxes import parse_boxes
from geodit_jax.prompts import DEFAULTS, FIELDS, load_prompts

PROMPTS = load_prompts()
BOXES = ((10.0, 10.0, 20.0, 20.0), (0.0, 0.0, 50.0, 50.0), (60.0, 60.0, 90.0, 70.0))


def record(task: str, **fields) -> Record:
    return Record(id="r7", image="a.png", task=task, size=(100, 100), **fields)


def test_every_task_has_templates():
    assert {*FIELDS, "chat", "text"} == set(TASKS)
    assert set(PROMPTS.templates) == set(FIELDS)


def test_questions_and_answers_of_every_task():
    caption = record("caption", answers=("a road", "one road"))
    assert PROMPTS.ask(caption) == "Describe this remote sensing image in one sentence."
    assert PROMPTS.answer(caption, "int100") == "a road"
    vqa = record("vqa", question="Is there a road?", answers=("yes",))
    assert PROMPTS.ask(vqa) == (
        "Is there a road?\nAnswer the question using a single word or phrase."
    )
    assert PROMPTS.answer(vqa, "int100") == "yes"
    kind = record("classification", answers=("port",), classes=("port", "farm"))
    assert PROMPTS.ask(kind) == (
        "What is the category of this remote sensing image? Answer using a single word or phrase."
    )
    assert PROMPTS.answer(kind, "int100") == "port"
    one = record("grounding", question="the {red} roof.", boxes=BOXES[:1])
    assert PROMPTS.ask(one) == "Give the bounding box of the {red} roof."
    assert PROMPTS.answer(one, "unit2") == "[0.10,0.10,0.20,0.20]"


def test_a_detection_counts_its_boxes_and_writes_the_largest_first():
    many = record("detection", question="storage tank", boxes=BOXES)
    assert PROMPTS.ask(many) == "Detect all storage tanks in the image."
    text = PROMPTS.answer(many, "int100")
    assert text == "There are <p>3 storage tanks</p>[0,0,50,50;60,60,90,70;10,10,20,20]"
    assert parse_boxes(text, (100, 100)).tolist() == [list(BOXES[k]) for k in (1, 2, 0)]
    single = record("detection", question="ship", boxes=BOXES[:1])
    assert PROMPTS.answer(single, "unit2") == "There is <p>1 ship</p>[0.10,0.10,0.20,0.20]"
    none = PROMPTS.answer(record("detection", question="ship"), "unit2")
    assert none == "There are no ships." and len(parse_boxes(none, (100, 100))) == 0


def test_a_chat_of_one_question_can_be_asked():
    turns = (("human", "<image>\nIs there a road?"), ("gpt", "yes"))
    chat = record("chat", conversations=turns)
    assert (PROMPTS.ask(chat), PROMPTS.answer(chat, "unit2")) == ("Is there a road?", "yes")
    with pytest.raises(ValueError, match="r7: a chat of 4 messages"):
        PROMPTS.ask(record("chat", conversations=turns * 2))


def test_own_templates_replace_single_texts(tmp_path):
    path = tmp_path / "own.toml"
    path.write_text(
        '[classification]\nquestion = "Choose: {classes}."\n'
        '[grounding]\nanswer = "{{{boxes}}}"\nboxes = "angles"\n'
    )
    own = load_prompts(path)
    kind = record("classification", answers=("port",), classes=("port", "farm"))
    assert own.ask(kind) == "Choose: port, farm." and own.answer(kind, "int100") == "port"
    box = record("grounding", question="the roof", boxes=BOXES[:1])
    assert own.answer(box, "int100") == "{{<10><10><20><20>}}"
    assert own.ask(box) == PROMPTS.ask(box)
    assert load_prompts().templates == load_prompts(DEFAULTS).templates == PROMPTS.templates


@pytest.mark.parametrize(
    "text, message",
    [
        ("[captions]\n", "'captions' is none of the tables caption, vqa"),
        ("caption = 3\n", "'caption' is none of"),
        ("[caption]\nask = 'x'\n", r"\[caption\] ask is none of the texts question, answer"),
        ("[caption]\nanswer = 3\n", r"\[caption\] answer is none of"),
        ("[caption]\nanswer = '{boxes}'\n", r"holds \['boxes'\], not only \['answer'\]"),
        ("[vqa]\nquestion = '{question.id}'\n", r"holds \['question.id'\]"),
        ("[vqa]\nquestion = '{question'\n", "write braces twice"),
        ("[grounding]\nboxes = 'xml'\n", "use one of brackets, lists, angles"),
        ("[caption\n", "is not valid TOML"),
    ],
)
def test_templates_that_cannot_work_are_refused(tmp_path, text, message):
    path = tmp_path / "own.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(path)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (record("caption"), "r7: no answer"),
        (record("grounding", question="roof"), "r7: grounding without a box"),
        (Record("r7", "a", "detection", "ship"), "r7: boxes need the size"),
        (record("segmentation"), "r7: task 'segmentation' is none of caption.*chat"),
    ],
)
def test_records_that_cannot_be_answered_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        PROMPTS.answer(wrong, "unit2")

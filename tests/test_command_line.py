"""Verbs and flags as a program hands them in; launch.py's own are in test_launch.py."""

from __future__ import annotations

import pytest
from absl import app, flags

from common_jax.command_line import Verb, all_flags, choose, describe, name_setting, need


def sow():
    """Put seeds into the ground."""


def reap():
    """Take what has grown."""


FIELD = flags.DEFINE_string("field_of_test", None, "Where.")
SEEDS = flags.DEFINE_string("seeds_of_test", None, "What.")
VERBS = {
    "sow": Verb(sow, ("field_of_test", "seeds_of_test")),
    "reap": Verb(reap, ("field_of_test",)),
}


def test_flags_are_listed_once_in_order_of_first_use():
    assert all_flags(VERBS) == ("field_of_test", "seeds_of_test")


def test_help_of_a_verb_is_its_docstring_and_its_flags():
    text = describe(["launch.py", "reap", "--help"], VERBS, "All about fields.")
    assert "Take what has grown." in text and "--field_of_test" in text
    assert "seeds" not in text and "All about fields." not in text
    assert "All about fields." in describe(["launch.py", "--help"], VERBS, "All about fields.")


def test_a_flag_of_another_verb_is_refused_by_name():
    assert choose(["launch.py", "sow"], VERBS).run is sow
    flag = flags.FLAGS["seeds_of_test"]
    flag.present = 1
    try:
        with pytest.raises(app.UsageError, match="does not take --seeds_of_test; it takes --field"):
            choose(["launch.py", "reap"], VERBS)
    finally:
        flag.present = 0


def test_words_that_are_no_verb_are_refused():
    for words, told in ((["dig"], "no verb 'dig'"), (["sow", "twice"], "unknown words: twice")):
        with pytest.raises(app.UsageError, match=f"{told}; the first word must be one of: sow,"):
            choose(["launch.py", *words], VERBS)


def test_a_missing_flag_is_named():
    with pytest.raises(app.UsageError, match="`launch.py sow` needs --field_of_test"):
        need(FIELD, "sow")


def test_an_unknown_setting_is_named_in_full_with_a_suggestion():
    argv = ["launch.py", "train", "--config.model.fusser=gw"]
    text = "'fusser' is unknown. Did you mean \"fuser\" instead?"
    told = name_setting(argv, text)
    assert told == "--config.model.fusser: the config has no such setting; fuser?"

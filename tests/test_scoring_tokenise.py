"""Words of captions, against the Java tokenizer that published scores use."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pycocoevalcap
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geodit_jax.scoring.tokenise import REMOVED, tokenise

SENTENCES = """
It's a well-kept park, isn't it?
There are 1,000 trees and 3.5 km of road (approx. 10%) near St. Mary's church.
Many cars' windows can't be seen; we cannot see "them" all...
A baseball-field and/or a tennis court are near the U.S. border.
The road is 5m wide at 10:30 a.m. on the 5th.
trees.there are some cars
a 1/2 mile road -- with cars
a_b c&d e+f g=h #1 $5 @home 50% *star*
cars\u2019 lot it\u2019s \u201csmart\u201d \u2026 end \u2013 dash \u2014 em
the o'clock 'tis gonna wanna I'm I've you're he'd she'll
no. 5 and mt. fuji etc.
it ends with st.
there is a pond in the u.s.
200m2 100m 3d b-52 c-130s
[brackets] {braces}
many buildings.Some trees
hello!! what?? !? ...
two - storey houses
2nd 3-storey 1980s '90s
the -there there- -- -5 +5 5-
a lot of cars.parked
30\u00b0 and 5 m\u00b2 or 10%
some airplanes'wings and there 's a car
""".strip().splitlines()


def java_words(lines: list[str], folder: Path) -> list[list[str]]:
    """What the Java program and the list of coco-caption make of each line."""
    jar = Path(pycocoevalcap.__path__[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    program = "edu.stanford.nlp.process.PTBTokenizer"
    command = ["java", "-cp", str(jar), program, "-preserveLines", "-lowerCase", "lines.txt"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    split = [line.split() for line in done.stdout.splitlines()]
    return [[word for word in words if word not in REMOVED] for words in split]


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java: not compared with its tokenizer")
def test_words_are_those_of_the_java_tokenizer(tmp_path):
    found = java_words(SENTENCES, tmp_path)
    for sentence, words in zip(SENTENCES, found, strict=True):
        assert tokenise(sentence) == words, sentence


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java: not compared with its tokenizer")
def test_words_of_real_captions_are_those_of_the_java_tokenizer(eo_data, tmp_path):
    lines = (eo_data / "ucm_captions" / "captions.jsonl").read_text().splitlines()
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    for caption, words in zip(captions, java_words(captions, tmp_path), strict=True):
        assert tokenise(caption) == words, caption


def test_the_example_of_the_docstring():
    words = tokenise("It's a well-kept park, isn't it?")
    assert " ".join(words) == "it 's a well-kept park is n't it"


@given(st.text(max_size=60))
def test_any_text_has_words_without_spaces_and_without_removed_marks(text):
    for word in tokenise(text):
        assert word and not word.isspace() and word not in REMOVED and word == word.lower()


def test_text_without_words_gives_no_words():
    assert tokenise("") == tokenise(" ,. \n ... -- !") == []

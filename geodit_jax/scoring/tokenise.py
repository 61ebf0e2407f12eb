"""Words of a caption as caption scorers count them: Penn Treebank rules, lower case, no marks.

Published caption scores are computed on the words of a Java program (the PTB tokenizer of Stanford
CoreNLP 3.4.1, with the list of punctuation that coco-caption removes). This file gives the same
words for captions in plain English without Java, slips of the pen included ("trees.there" is one
word). It leaves out what captions do not have: web addresses, mark-up, currencies, emoticons.
"""

from __future__ import annotations

import re

REMOVED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"]
    + [".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that coco-caption removes. Brackets are lower-cased before and so stay: `-lrb-`."""

BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
MARKS = str.maketrans(
    {"\u2018": "`", "\u2019": "'", '"': " '' ", "\u201c": " '' ", "\u201d": " '' "}
    | {"\u2026": " ... ", "\u2013": " -- ", "\u2014": " -- "}
    | {"\u00b2": " \u00b2 ", "\u00b3": " \u00b3 ", "\u00b0": " \u00b0 "}
)
JOINED = {
    word: (word[:3], word[3:]) for word in ("cannot", "gonna", "gotta", "lemme", "gimme", "wanna")
} | {"'tis": ("'t", "is"), "'twas": ("'t", "was")}
# These keep their period wherever they stand, also at the end of a caption.
WITH_PERIOD = """
    adm al ala apr ariz assn assoc atty aug ave bhd bldg blvd bros calif capt cf cmdr co col colo
    conn corp cos cpl ct dak dec dept dr esq est etc ext feb fla fri ft ga gen gov govs hon inc ind
    insp intl jan jr jul jun kan kans ky lt ltd maj mar md mfg mich minn mme mo mon mont mr mrs ms
    mt natl neb nev nov oct okla penn pfc ph plc prof pte pty rd rep reps rev rt sen sens sep sept
    seq sgt sq sr st ste supt tel tenn thu thurs tue tues univ va vs vt wed wis wisc wyo
"""
ABBREVIATIONS = "|".join(WITH_PERIOD.split())
# These do so before a number only.
NUMBERED = "art|fig|figs|no|nos|op|pp|prop|ca"
LETTER, ALNUM = r"[^\W\d_]", r"[^\W_]"
ENDING = rf"'(?:s|m|d|ll|re|ve|t)(?!{ALNUM})"
PATTERN = re.compile(
    rf"""
    (?<!{ALNUM})(?:{LETTER}\.)+(?!{ALNUM})               # u.s., e.g., the single a.
    | (?<!\w)(?:{ABBREVIATIONS})\.(?!{ALNUM})            # st.
    | (?<!\w)(?:{NUMBERED})\.(?=\s*\d)                   # no. 5
    | (?<!\w)[-+]?\d+(?:[.,:/]\d+)+(?!{ALNUM})           # 3.5, 1,000, 10:30, 1/2
    | (?<!\w)[-+.]\d+(?!{ALNUM})                         # -5, .5
    | (?<!\S)'(?:tis|twas|em|\d+s)\b                     # '60s
    | {LETTER}+(?:[.!?]{LETTER}+)+(?!['-]|{ALNUM})         # trees.there
    | @\w+
    | [dlo]'{LETTER}{{2,}}                                 # o'clock
    | {ALNUM}+(?:[-_/]+{ALNUM}+)*(?:{ENDING})?           # well-kept, and/or, it's
    | (?<!\w){ENDING}
    | \.+ | -{{5,}} | --+ | [!?]{{2,}} | '' | \*+ | \#+ | \S
    """,
    re.VERBOSE,
)
CLITIC = re.compile(r"(?P<stem>.+?)(?P<clitic>n't|'(?:s|m|d|ll|re|ve))")


def tokenise(text: str) -> list[str]:
    """Lower-case words of one caption, punctuation removed; line breaks count as spaces.

    "It's a well-kept park, isn't it?" -> it 's a well-kept park is n't it
    """
    lowered = " ".join(text.lower().translate(MARKS).split())
    tokens = [part for token in PATTERN.findall(lowered) for part in _split(token)]
    return [token for token in tokens if token not in REMOVED and token.strip(".")]


def _split(token: str) -> tuple[str, ...]:
    """Contractions become two tokens; brackets get their names; dashes of any length are one."""
    if token in JOINED:
        return JOINED[token]
    if token in BRACKETS:
        return (BRACKETS[token],)
    if token in ("---", "----"):
        return ("--",)
    found = CLITIC.fullmatch(token)
    return (found["stem"], found["clitic"]) if found else (token,)

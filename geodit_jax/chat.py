"""Conversations become ids, labels and turn numbers, as LLaDA-V does it.

A bos, a system message, then user and assistant in turn. In ids a picture is one `IMAGE`;
`sequence.expand` replaces it by the picture's tokens. From a record to ids: `from_llava`, then
`place_images`, then `encode_chat` or `encode_plain`. Ids and labels equal the published ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from geodit_jax.config import IMAGE
from geodit_jax.tokenizer import SPECIAL, Tokenizer

NO_TARGET = -100
PLACEHOLDER = "<image>"
SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LABEL_POLICIES = ("llada_v", "response_only")
AFTER_IMAGE = ("keep", "drop_first")

Conversation = list[tuple[str, str]]
"""[("user" or "assistant", text)]"""
Encoded = tuple[list[int], list[int], list[int]]
"""ids, labels (-100: no target) and turn numbers, of one length"""


# ---------------------------------------------------------------------------------- conversations
def from_llava(conversations: Sequence) -> Conversation:
    """`[{"from": "human", "value": ...}, ...]` or pairs (role, text) -> Conversation.

    A first message that is not the user's is dropped. Raises ValueError on unknown roles, missing
    keys, text that is no string, or when no message is left.
    """
    turns = [_read_message(k, message) for k, message in enumerate(conversations)]
    if turns and turns[0][0] != "user":
        turns = turns[1:]
    for k, (role, _) in enumerate(turns):
        if role not in ("user", "assistant"):
            raise ValueError(f"message {k} is from {role!r}; use one of {', '.join(ROLES)}")
    if not turns:
        raise ValueError("the conversation has no message of the user")
    return turns


def _read_message(place: int, message) -> tuple[str, str]:
    if isinstance(message, Mapping):
        message = (message.get("from"), message.get("value"))
    role, text = message
    if not isinstance(text, str):
        raise ValueError(f"message {place} has the text {text!r}; need a string under 'value'")
    return (ROLES.get(role, role) if isinstance(role, str) else role), text


def place_images(turns: Conversation, pictures: int) -> tuple[Conversation, bool]:
    """Puts the placeholder of a message in front of it; -> (turns, whether one had to be inserted).

    A message with exactly one placeholder that does not lead is stripped of it and begins with
    placeholder and newline; others stay as they are. Where a picture has no placeholder at all
    (upstream then trains without the picture), one is inserted before the user's first text: the
    caller counts these. Raises ValueError when placeholders and pictures differ in number.
    """
    found = sum(text.count(PLACEHOLDER) for _, text in turns)
    if found == 0 and pictures == 1:
        first = next((k for k, (role, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise ValueError("no message of the user to put the picture in")
        role, text = turns[first]
        return [*turns[:first], (role, f"{PLACEHOLDER}\n{text}"), *turns[first + 1 :]], True
    if found != pictures:
        raise ValueError(
            f"the conversation has {found} {PLACEHOLDER} placeholders for {pictures} pictures; "
            "give one placeholder for each picture"
        )
    return [(role, _lead(text)) for role, text in turns], False


def _lead(text: str) -> str:
    if text.count(PLACEHOLDER) != 1 or text.startswith(PLACEHOLDER):
        return text
    return f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}"


# ------------------------------------------------------------------------------------------- text
def _header(role: str) -> str:
    return f"{SPECIAL['start_header']}{role}{SPECIAL['end_header']}\n\n"


def _message(role: str, text: str) -> str:
    return f"{_header(role)}{text}{SPECIAL['eot']}"


def _check_texts(turns: Conversation) -> None:
    """Text that holds a special text would forge the structure of the conversation."""
    for k, (role, text) in enumerate(turns):
        forged = [special for special in SPECIAL.values() if special in text]
        if forged:
            raise ValueError(f"message {k} ({role}) holds {forged[0]}; remove it from the text")


def render(turns: Conversation, system: str = SYSTEM) -> str:
    """The text of a prompt, blanks around messages trimmed; it ends with the assistant's header.

    Equal to the chat template of the published tokenizer. system: "" leaves that message out.
    """
    messages = [("system", system)] * bool(system) + list(turns)
    body = "".join(_message(role, text.strip()) for role, text in messages)
    return SPECIAL["bos"] + body + _header("assistant")


# -------------------------------------------------------------------------------------------- ids
def encode_chat(
    tokenizer: Tokenizer,
    turns: Conversation,
    *,
    label_policy: str = "llada_v",
    has_image: bool = True,
    system: str = SYSTEM,
) -> Encoded:
    """Ids, labels and turn numbers of a conversation to train on; texts are not trimmed.

    label_policy: `llada_v` (published) makes whole assistant messages targets, their headers
    included, and the bos, header and end-of-turn ids of every message; `response_only` makes
    assistant texts and their end-of-turn ids targets, which is what decoding has to write.
    has_image: False reads placeholders as plain text. system: "" leaves that message out.
    Raises ValueError on an unknown policy, a conversation without assistant, or text that holds a
    special text.
    """
    if label_policy not in LABEL_POLICIES:
        raise ValueError(f"label_policy={label_policy!r}: use one of {LABEL_POLICIES}")
    _check_texts(turns)
    if not any(role == "assistant" for role, _ in turns):
        raise ValueError("the conversation has no message of the assistant: nothing to learn")
    ids = [tokenizer.ids.bos]
    labels = ids[:] if label_policy == "llada_v" else [NO_TARGET]
    for role, text in _with_system(turns, system):
        own = _encode_pieces(tokenizer, _message(role, text), has_image)
        ids += own
        labels += _label_message(tokenizer, own, role, label_policy)
    return ids, labels, number_turns(tokenizer, ids)


def encode_plain(tokenizer: Tokenizer, turns: Conversation) -> Encoded:
    """Stage I: the picture, then the caption and a newline; all text is a target.

    No template, no bos; the user's text is not used. Raises ValueError unless there are exactly two
    messages, the first with one placeholder.
    """
    _check_texts(turns)
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] or turns[0][1].count(PLACEHOLDER) != 1:
        raise ValueError(
            f"the plain format needs a user's message with one {PLACEHOLDER}, then the caption; "
            f"found messages of {roles}"
        )
    text = tokenizer.encode(turns[1][1] + "\n")
    return [IMAGE, *text], [NO_TARGET, *text], [0] * (1 + len(text))


def encode_prompt(
    tokenizer: Tokenizer,
    turns: Conversation,
    *,
    prompt_after_image: str = "keep",
    system: str = SYSTEM,
) -> list[int]:
    """Ids of `render(turns)`, up to where the answer begins.

    prompt_after_image: `keep` gives the ids of training; `drop_first` loses the first id behind
    every picture, as published inference does. Raises ValueError on another choice, or when the
    last message is not the user's.
    """
    if prompt_after_image not in AFTER_IMAGE:
        raise ValueError(f"prompt_after_image={prompt_after_image!r}: use one of {AFTER_IMAGE}")
    if not turns or turns[-1][0] != "user":
        raise ValueError("a prompt ends with a message of the user; there is nothing to answer")
    _check_texts(turns)
    lost = int(prompt_after_image == "drop_first")
    return _encode_pieces(tokenizer, render(turns, system), has_image=True, lost=lost)


def number_turns(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Turn of every id: it grows at a header that is not the assistant's and follows an answer.

    Read from the ids, so it does not depend on the labels.
    """
    special, assistant = tokenizer.ids, tokenizer.encode("assistant")
    turn, answered, turns = 0, False, []
    for k, number in enumerate(ids):
        if number == special.start_header:
            role = list(ids[k + 1 : k + 1 + len(assistant)])
            turn += answered and role != assistant
            answered = role == assistant
        turns.append(int(turn))
    return turns


def answer_start(tokenizer: Tokenizer, ids: Sequence[int]) -> int:
    """Where the last answer begins: behind the last header, else the last picture, else 0."""
    ids = list(ids)
    for mark, gap in ((tokenizer.ids.end_header, len(tokenizer.encode("\n\n"))), (IMAGE, 0)):
        if mark in ids:
            return len(ids) - ids[::-1].index(mark) + gap
    return 0


def _with_system(turns: Conversation, system: str) -> Conversation:
    return [("system", system), *turns] if system else list(turns)


def _encode_pieces(tokenizer: Tokenizer, text: str, has_image: bool, lost: int = 0) -> list[int]:
    """Text around placeholders is encoded piece by piece; later pieces lose `lost` ids."""
    first, *others = text.split(PLACEHOLDER) if has_image else [text]
    ids = tokenizer.encode(first)
    for piece in others:
        ids += [IMAGE, *tokenizer.encode(piece)[lost:]]
    return ids


def _label_message(tokenizer: Tokenizer, ids: list[int], role: str, policy: str) -> list[int]:
    special = tokenizer.ids
    structure = {special.start_header, special.end_header, special.eot}
    if policy == "response_only":
        start = answer_start(tokenizer, ids) if role == "assistant" else len(ids)
        wanted = [k >= start for k in range(len(ids))]
    else:
        wanted = [role == "assistant" or number in structure for number in ids]
    return [n if want and n != IMAGE else NO_TARGET for n, want in zip(ids, wanted)]

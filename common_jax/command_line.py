"""What stands on a command line of verbs and flags: parsing, help, and mistakes told in one line.

The flags themselves are defined by the program (`launch.py`), which hands in its verbs.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

HELP = {"--help", "-h", "-help", "--helpshort", "help"}


class Verb(NamedTuple):
    """What a verb runs (its docstring is its help) and the names of the flags it takes."""

    run: Callable[[], int]
    flags: tuple[str, ...]


Verbs = Mapping[str, Verb]


def all_flags(verbs: Verbs) -> tuple[str, ...]:
    """Names of the flags that any verb takes, in order of first use."""
    return tuple(dict.fromkeys(name for verb in verbs.values() for name in verb.flags))


def need(flag, verb: str):
    """Value of a flag that this verb cannot do without."""
    if not flag.value:
        raise app.UsageError(f"`launch.py {verb}` needs --{flag.name}=...")
    return flag.value


def describe(argv: list[str], verbs: Verbs, about: str) -> str:
    """The help text: of one verb where argv names one, else of all, beginning with `about`."""
    name = next((word for word in argv[1:] if word in verbs), None)
    used = verbs[name].flags if name else all_flags(verbs)
    text = inspect.getdoc(verbs[name].run) if name else about.strip()
    lines = [f"python launch.py {name or 'VERB'} [flags]", "", text, ""]
    lines += [f"  --{flag:<16}{flags.FLAGS[flag].help}" for flag in used]
    if "config" in used:
        lines += ["", "Every setting: python launch.py show_config --config=configs/NAME.py"]
    return "\n".join(lines)


def parse(argv: list[str], verbs: Verbs, about: str) -> list[str]:
    """Words of the command line after the flags; help and mistakes end the program here."""
    if HELP & set(argv[1:]):
        print(describe(argv, verbs, about))
        sys.exit(0)
    try:
        words = flags.FLAGS(argv)
        check_config_file()
        return words
    except (AttributeError, KeyError) as error:
        told = name_setting(argv, str(error))
    except (flags.Error, ValueError, TypeError, OSError) as error:
        told = str(error).strip().splitlines()[-1].strip()  # before it, a traceback of the config
    print(f"launch.py: {told}\n(python launch.py --help says more)", file=sys.stderr)
    sys.exit(2)


def name_setting(argv: list[str], text: str) -> str:
    """The --config.a.b=... of argv that the config has not; its own error says `b` alone."""
    name = next(iter(re.findall(r"\w+", text)), "")
    hint = re.search(r'Did you mean "(\w+)"', text)
    keys = [arg.partition("=")[0] for arg in argv if arg.startswith("--config.")]
    wrong = next((key for key in keys if name in key.split(".")), name)
    return f"{wrong}: the config has no such setting" + (f"; {hint[1]}?" if hint else "")


def check_config_file() -> None:
    """Raise ValueError naming the known config files where --config names none."""
    flag = flags.FLAGS["config"]
    name = flag.config_filename if flag.present else None
    if name and not Path(name.partition(":")[0]).is_file():
        files = [p for p in Path("configs").glob("*.py") if "def get_config" in p.read_text()]
        known = ", ".join(sorted(map(str, files)))
        raise ValueError(f"--config={name}: there is no such file; known: {known}")


def choose(words: list[str], verbs: Verbs) -> Verb:
    """The verb that is asked for; raises UsageError on words and flags that do not belong."""
    name, *rest = words[1:] or [""]
    if name not in verbs or rest:
        wrong = f"unknown words: {' '.join(rest)}" if rest else f"no verb {name!r}"
        raise app.UsageError(f"{wrong}; the first word must be one of: {', '.join(verbs)}")
    used = verbs[name].flags
    extra = [flag for flag in all_flags(verbs) if flags.FLAGS[flag].present and flag not in used]
    if extra:
        takes = ", ".join(f"--{flag}" for flag in used)
        raise app.UsageError(f"`launch.py {name}` does not take --{extra[0]}; it takes {takes}")
    return verbs[name]

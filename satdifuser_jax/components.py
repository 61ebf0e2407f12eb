"""Where the parts of a published model lie in its folder, in either public layout."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from common_jax.files import read_json
from satdifuser_jax.schedule import Schedule

CHECKPOINT = "checkpoint-150000"  # the one the published extractor loads


@dataclasses.dataclass(frozen=True)
class Components:
    """The parts of one published model. A part that the folder lacks is None."""

    root: Path
    unet: Path
    schedule: Schedule
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None

    def require(self, name: str) -> Path:
        """The folder of a part; FileNotFoundError says where it should be."""
        path = getattr(self, name)
        if path is None:
            raise FileNotFoundError(f"{self.root / name}: no such folder; this run needs it")
        return path


def find_components(root: str | os.PathLike, resolution: int | None = None) -> Components:
    """Finds the parts below `root` in either public layout and asserts the scheduler's settings.

    `root` holds `resolution256/` and `resolution512/` (choose by `resolution`, pixels) or is one of
    them. The UNet is `checkpoint-150000/unet`, else that of the highest checkpoint, else `unet/`.
    Raises FileNotFoundError or ValueError naming the folder, and ScheduleError for a scheduler
    under which keys would mean other timesteps.
    """
    root = _choose_resolution(Path(root), resolution)
    unet = _find_unet(root)
    file = root / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; keys have no meaning without it")
    parts = {
        name: root / name if (root / name).is_dir() else None
        for name in ("vae", "text_encoder", "tokenizer")
    }
    return Components(root, unet, Schedule.from_config(read_json(file), source=str(file)), **parts)


def _choose_resolution(root: Path, resolution: int | None) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    choices = sorted(path.name for path in root.glob("resolution*") if path.is_dir())
    if not choices:
        return root
    name = f"resolution{resolution}" if resolution else choices[0]
    if name not in choices or (resolution is None and len(choices) > 1):
        raise ValueError(
            f"{root} holds {', '.join(choices)}, and resolution={resolution} was asked for; "
            f"choose one of {[int(choice.removeprefix('resolution')) for choice in choices]}"
        )
    return root / name


def _find_unet(root: Path) -> Path:
    steps = {int(p.parent.name.rpartition("-")[2]): p for p in root.glob("checkpoint-[0-9]*/unet")}
    newest = steps[max(steps)] if steps else root / "unet"
    for path in (root / CHECKPOINT / "unet", newest, root / "unet"):
        if (path / "config.json").is_file():
            return path
    raise FileNotFoundError(
        f"{root}: neither {CHECKPOINT}/unet nor unet has a config.json; give the folder that holds "
        "vae/, scheduler/ and one of these"
    )


def is_weightless(folder: Path) -> bool:
    """Whether a vae folder describes the parameter-free codec of small pixel-space models."""
    file = folder / "config.json"
    return file.is_file() and read_json(file).get("_class_name") == "SpaceToDepth"

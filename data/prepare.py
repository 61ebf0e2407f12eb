"""Turn data of any form into sharded ArrayRecord: `python -m data.prepare FROM TO`.

    python -m data.prepare IMAGES OUT                            pictures, CSV file or tars
    python -m data.prepare records:mmrs OUT --root=MMRS1M        any set of docs/data.md in records
    python -m data.prepare examples:m-eurosat OUT --split=train  any labelled set

Shards are written whole or not at all, by several processes, and read back. A run that was stopped
goes on where it was; `--verify` reads a finished folder and compares every hash. See docs/data.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common_jax.files import read_json, sha256_file, sha256_json, write_json
from data.catalog import open_source
from data.images import some_of
from data.packers import (
    MAX_PROBLEMS,
    ExamplePacker,
    PicturePacker,
    PictureRules,
    SatellitePacker,
)
from data.record_catalog import open_records
from data.record_files import write_records
from data.record_pictures import INSIDE
from data.satellite import kept_rows, open_reader
from data.shards import (
    FileNote,
    Manifest,
    ShardError,
    is_prepared,
    read_manifest,
    shard_name,
    verify,
    write_manifest,
    write_shard,
)
from data.workers import end_with_parent

TEXTS = "records.jsonl"
HASHING = 8  # threads
LEFT_BEHIND = re.compile(r"\d{5}\.array_record|\.(\d{5}|manifest|records)\..*\.partial")
"""Files of ours that a stopped run, or one with more shards, leaves."""


@dataclass(frozen=True)
class Job:
    """A set on its way into a folder. per_shard: examples in a file. skips: broken ones are left
    out and counted, else the first stops the run."""

    packer: Any
    folder: Path
    per_shard: int
    skips: bool

    @property
    def key(self) -> str:
        """Identity of what the shards hold; other shards in the folder are written anew."""
        return sha256_json([self.packer.fingerprint, self.per_shard])

    @property
    def num_shards(self) -> int:
        return -(-len(self.packer) // self.per_shard)

    def note_path(self, number: int) -> Path:
        """What was written of a shard, until the manifest takes it over."""
        return self.folder / f"{number:05d}.json"


def write_one(job: Job, number: int) -> dict[str, Any]:
    """Packs and writes a shard; -> its note: file, key, skipped (places in the set), problems."""
    skipped: list[int] = []
    problems: list[str] = []

    def packed() -> Iterator[bytes]:
        start = number * job.per_shard
        for i in range(start, min(start + job.per_shard, len(job.packer))):
            try:
                yield job.packer.pack(i)
            except (ValueError, KeyError) as error:
                if not job.skips:
                    raise
                skipped.append(i)
                problems.append(str(error))

    file = asdict(write_shard(job.folder / shard_name(number), packed()))
    note = {"file": file, "key": job.key, "skipped": skipped, "problems": problems[:MAX_PROBLEMS]}
    write_json(job.note_path(number), note)
    return note


def finished(job: Job, number: int, whole: bool = True) -> dict[str, Any] | None:
    """The note of a shard that an earlier run wrote, when its file is still what it wrote.

    whole: its content is compared, else its size alone.
    """
    path, file = job.note_path(number), job.folder / shard_name(number)
    if not path.is_file() or not file.is_file():
        return None
    note = read_json(path)
    if note["key"] != job.key or (note["skipped"] and not job.skips):
        return None
    if file.stat().st_size != note["file"]["bytes"]:
        return None
    return note if not whole or sha256_file(file) == note["file"]["sha256"] else None


def all_finished(job: Job, numbers: Sequence[int], whole: bool) -> dict[int, dict[str, Any] | None]:
    """What `finished` says of many shards, by threads."""
    with ThreadPoolExecutor(HASHING) as pool:
        return dict(zip(numbers, pool.map(lambda k: finished(job, k, whole), numbers), strict=True))


def write_shards(job: Job, numbers: Sequence[int], workers: int) -> Iterator[dict[str, Any]]:
    """Notes of shards, as they are written. workers: processes; 0: this one."""
    if not workers:
        yield from (write_one(job, number) for number in numbers)
        return
    context = multiprocessing.get_context("spawn")  # forked threads of the reader would hang
    with ProcessPoolExecutor(workers, context, _take_job, (job,)) as pool:
        try:
            yield from pool.map(_write_taken, numbers)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _take_job(job: Job) -> None:
    """Once a process instead of once a shard: a source may hold a million names."""
    global _job
    _job = job
    end_with_parent()


def _write_taken(number: int) -> dict[str, Any]:
    return write_one(_job, number)


def prepare(
    job: Job, workers: int = 0, part: tuple[int, int] = (0, 1), records: Sequence[Any] = ()
) -> Manifest | None:
    """Writes what is missing of a set; -> its manifest, None while other parts are at work.

    part: (k, n) writes every n-th shard from the k-th, for several machines on one file system. Of
    shards that are there, each part reads its own; the last part to end reads those of all others.
    records: of the kind "records", whose pictures the packer holds.
    """
    if not len(job.packer):
        raise ShardError(f"'{job.packer.name}' is empty: nothing to prepare")
    job.folder.mkdir(parents=True, exist_ok=True)
    ours = range(part[0], job.num_shards, part[1])
    others = [number for number in range(job.num_shards) if number not in ours]
    notes = all_finished(job, ours, whole=True)
    missing = [number for number, note in notes.items() if note is None]
    if len(missing) < len(notes):
        say(f"{len(notes) - len(missing)} of {len(notes)} shards are there already")
    for number, note in zip(missing, write_shards(job, missing, workers), strict=True):
        notes[number] = note
        done = sum(note["file"]["count"] for note in notes.values() if note)
        say(f"{note['file']['file']}: {note['file']['count']} examples, {done} in all")
    lacking = list(all_finished(job, others, whole=False).values()).count(None)
    if lacking:
        say(f"{lacking} shards of other parts are missing; the last part to end finishes the set")
        return None
    notes |= all_finished(job, others, whole=True)
    spoilt = [shard_name(number) for number in others if notes[number] is None]
    if spoilt:
        raise ShardError(
            f"{job.folder}: {some_of(spoilt)} changed since other parts wrote them; run those "
            "parts again: they write anew what changed"
        )
    notes = [notes[number] for number in range(job.num_shards)]
    return finish(job, notes, records)


def finish(job: Job, notes: Sequence[dict], records: Sequence[Any]) -> Manifest:
    """Writes the texts and the manifest, and removes what a stopped run left."""
    files = [FileNote(**note["file"]) for note in notes]
    skipped = {i for note in notes for i in note["skipped"]}
    problems = [problem for note in notes for problem in note["problems"]]
    if records:
        kept = list(place_records(job, records, skipped))
        path = job.folder / TEXTS
        write_records(path, kept)
        files.append(FileNote(TEXTS, 0, path.stat().st_size, sha256_file(path)))
    packer = job.packer
    dropped, told = packer.left_out
    manifest = Manifest(
        kind=packer.kind,
        name=packer.name,
        source=packer.fingerprint,
        files=tuple(files),
        skipped=len(skipped) + dropped,
        problems=(*told, *problems[:MAX_PROBLEMS]),
        about=packer.about,
    )
    wanted = {note.file for note in files}
    for path in list(job.folder.iterdir()):
        if LEFT_BEHIND.fullmatch(path.name) and path.name not in wanted:
            path.unlink()
    write_manifest(job.folder, manifest)
    for number in range(job.num_shards):
        job.note_path(number).unlink(missing_ok=True)
    return read_manifest(job.folder)


def place_records(job: Job, records: Sequence[Any], skipped: set[int]) -> Iterator[Any]:
    """Records whose pictures are named by shard and place in it; those of skipped ones are left
    out."""
    places, number, place = {}, -1, 0
    for i, picture in enumerate(job.packer.pictures):
        if i // job.per_shard != number:
            number, place = i // job.per_shard, 0
        if i not in skipped:
            places[picture] = f"{job.folder / shard_name(number)}{INSIDE}{place}"
            place += 1
    for record in records:
        if record.image is None:
            yield record
        elif record.image in places:
            yield replace(record, image=places[record.image])


# ------------------------------------------------------------------------------------ command line
def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    reader = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    reader.formatter_class = argparse.RawDescriptionHelpFormatter
    add = reader.add_argument
    add("source", help="a folder, CSV file or tars; records:NAME; examples:NAME; with --verify OUT")
    add("to", nargs="?", help="the folder to write")
    add("--verify", action="store_true", help="read a finished folder, compare all hashes")
    add("--root", default="", help="where a set of records lies")
    add("--split", default="train", help="of records and examples (default train)")
    add(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of a set, as in the docs",
    )
    add("--exclude", default="", help="JSON list of pictures to leave out")
    add("--places", default="", help="CSV file with the polygons of fMoW")
    add("--described", action="store_true", help="folder names become captions")
    add("--on-corrupt", default="refuse", choices=("refuse", "skip"))
    add("--side", type=int, default=0, help="reduce longer short sides to so many pixels")
    add("--quality", type=int, default=0, help="JPEG quality of what is not a file yet; 0: PNG")
    add("--per-shard", type=int, default=1000, help="examples in a file (default 1000)")
    add("--workers", type=int, default=2, help="processes; 0: none beside this one")
    add("--part", default="1/1", help="this machine's part, such as 3/8")
    return reader.parse_intermixed_args(argv)


def options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts; values that are JSON are read as such."""
    found = {}
    for pair in pairs:
        key, given, value = pair.partition("=")
        if not given:
            raise ValueError(f"--option {pair}: write it as KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def job_of(args: argparse.Namespace) -> tuple[Job, Sequence[Any]]:
    """(job, the records whose texts go with it)."""
    rules, skips = PictureRules(args.side, args.quality), args.on_corrupt == "skip"
    form, _, name = args.source.partition(":")
    options, records = options_of(args.option), ()
    if form == "records":
        if args.side:
            raise ValueError("--side would move the boxes of records; leave it out")
        on_bad = {} if name == "scenes" else {"on_bad": args.on_corrupt, "root": args.root or None}
        source = open_records(name, args.split, **on_bad, **options)
        records = source.records
        pictures = dict.fromkeys(r.image for r in records if r.image)
        packer: Any = PicturePacker(source.name, list(pictures), rules)
        packer.left_out = source.counts["skipped"], source.problems
    elif form == "examples":
        packer = ExamplePacker(open_source(name, args.split, **options))
    else:
        exclude = read_json(args.exclude) if args.exclude else []
        shared = {"places": args.places, "described": args.described, "on_corrupt": args.on_corrupt}
        reader = open_reader(args.source, exclude=exclude, **shared)
        packer = SatellitePacker(reader, kept_rows(reader, exclude), rules)
    return Job(packer, Path(args.to).expanduser(), args.per_shard, skips), records


def run(args: argparse.Namespace) -> int:
    if args.verify:
        problems = verify(args.source, max(1, args.workers))
        count = read_manifest(args.source).count
        say("\n".join(problems) or f"{args.source}: {count} examples, all as they were written")
        return int(bool(problems))
    if not args.to:
        raise ValueError("name the folder to write: python -m data.prepare FROM TO")
    part, parts = (int(number) for number in args.part.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(f"--part={args.part}: write it as K/N with K in 1..N")
    job, records = job_of(args)
    if is_prepared(job.folder):
        if read_manifest(job.folder).source != job.packer.fingerprint:
            raise ValueError(f"{job.folder} holds another set, or one made with other options")
        say(f"{job.folder} is finished already")
        return 0
    manifest = prepare(job, args.workers, (part - 1, parts), records)
    if manifest:
        shards, skipped = len(manifest.shards), manifest.skipped
        say(f"{job.folder}: {manifest.count} examples in {shards} shards, {skipped} skipped")
    return 0


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, or 1 when something is wrong, which is said."""
    try:
        return run(parse(argv))
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

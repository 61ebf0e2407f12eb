"""Files are written whole or not at all, and pickles of strangers never run."""

from __future__ import annotations

import collections
import datetime
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common_jax.files import (
    UnsafePickleError,
    atomic_path,
    read_json,
    restricted_loads,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
)

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path):
    target = tmp_path / "weights.bin"
    write_atomic(target, b"old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(target) as partial:
        partial.write_bytes(b"half of the new")
        raise RuntimeError("disk full")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["weights.bin"]


def test_a_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    target = tmp_path / "a" / "index.json"
    write_json(target, {"step": 1})
    code = (
        "import os, signal, sys; from common_jax.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as p:\n"
        "    p.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parent.parent
    killed = subprocess.run([sys.executable, "-c", code, str(target)], cwd=root, check=False)
    assert killed.returncode == -9
    assert read_json(target) == {"step": 1}
    write_json(target, {"step": 2})
    assert read_json(target) == {"step": 2}


def test_written_files_have_the_permissions_of_ordinary_files(tmp_path):
    write_atomic(tmp_path / "atomic", b"")
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_comes_back_and_damage_is_named(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    (tmp_path / "y.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"y\.json is not valid JSON .*line 1"):
        read_json(tmp_path / "y.json")
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "z.json", {"loss": float("nan")})
    assert not (tmp_path / "z.json").exists()


def test_hashes_are_sha256_and_ignore_key_order(tmp_path):
    write_atomic(tmp_path / "x", b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "x") == digest
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 1.5})


RECORD = {
    "label": np.int64(7),
    "scale": np.float32(0.25),
    "multi_hot": np.array([0, 1, 0, 1]),
    "strided": np.arange(12.0).reshape(3, 4)[:, ::2],
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
    "names": np.array(["02 - Blue", "x"]),
    "date": datetime.datetime(2020, 5, 17, 10, 30),
    "day": datetime.date(1999, 12, 31),
    "ordered": collections.OrderedDict(a=1, b=(2, None)),
    "bytes": b"\x00\xff",
    "no_bytes": b"",
    "text": "grüß",
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_records_come_back_from_every_protocol(protocol):
    loaded = restricted_loads(pickle.dumps(RECORD, protocol), source="f")
    assert list(loaded) == list(RECORD)
    for name, value in RECORD.items():
        if isinstance(value, np.ndarray | np.generic):
            assert loaded[name].dtype == value.dtype, name
            np.testing.assert_array_equal(loaded[name], value)
        else:
            assert loaded[name] == value, name


def test_arrays_of_old_numpy_module_names_come_back():
    content = pickle.dumps(np.arange(5), 2).replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(restricted_loads(content, source="f"), np.arange(5))


@pytest.fixture
def geobench_like(monkeypatch):
    """A module called geobench.dataset that exists while pickling and is gone while reading."""
    module = types.ModuleType("geobench.dataset")

    class Sentinel2:
        def __init__(self, name):
            self.name = name

        def __setstate__(self, state):
            raise AssertionError("the real class was run")

    class Affine(tuple):
        pass

    for cls in (Sentinel2, Affine):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "geobench", types.ModuleType("geobench"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_library_classes_become_inert_records(geobench_like, protocol):
    value = {
        "band": geobench_like.Sentinel2("04 - Red"),
        "transform": geobench_like.Affine((1.0, 2.0)),
    }
    if protocol < 2:
        del value["transform"]  # protocols 0 and 1 rebuild tuple subclasses through `tuple` itself
    loaded = restricted_loads(pickle.dumps(value, protocol), source="f")
    assert type(loaded["band"]) is not geobench_like.Sentinel2
    assert loaded["band"].name == "04 - Red"
    if protocol >= 2:
        assert loaded["transform"].args == ((1.0, 2.0),)


class Hostile:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile_payloads(marker: Path) -> dict[str, bytes]:
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    calls = {
        "os.system": Hostile(os.system, touch),
        "eval": Hostile(eval, code),
        "exec": Hostile(exec, code),
        "popen": Hostile(subprocess.Popen, ["touch", str(marker)]),
        "getattr": Hostile(getattr, os, "system"),
        "nested": {"label": 3, "more": [Hostile(os.system, touch)]},
    }
    payloads = {name: pickle.dumps(call) for name, call in list(calls.items()) if name != "getattr"}
    # A global reached through an allowed module's attributes, in the syntax of protocol 4.
    payloads["dotted"] = b"\x80\x04\x8c\x08datetime\x8c\x08sys.exit\x93)R."
    payloads["numpy.load"] = b"cnumpy\nload\n(S'/etc/passwd'\ntR."
    payloads["runstring"] = b"cnumpy.testing._private.utils\nrunstring\n(S'x=1'\nN}tR."
    payloads["import_stub_call"] = b"cposix\nsystem\n(S'" + touch.encode() + b"'\ntR."
    payloads["load_again"] = b"cpickle\nloads\n(S'x'\ntR."
    return payloads


def test_hostile_pickles_are_refused_by_name_and_not_run(tmp_path):
    marker = tmp_path / "was_run"
    for name, payload in hostile_payloads(marker).items():
        with pytest.raises(UnsafePickleError, match=r"m-x/s1\.hdf5.*refused and not run"):
            restricted_loads(payload, source="m-x/s1.hdf5")
        assert not marker.exists(), name


@pytest.mark.parametrize(
    "payload",
    [
        b"cnumpy\nndarray\n((I1000000000000\nttR.",  # a huge array by calling the class
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I9999999999\ntS'b'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRS'AAAAAAAA'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'zip_codec'\ntR.",
        b"cbuiltins\nbytes\n(I1000000000000\ntR.",
    ],
    ids=["ndarray", "reconstruct", "object-scalar", "codec", "bytes"],
)
def test_misused_harmless_names_raise_a_named_error(payload):
    with pytest.raises(ValueError, match=r"^s1\.hdf5: "):
        restricted_loads(payload, source="s1.hdf5")


def test_structured_dtypes_are_refused():
    content = pickle.dumps(np.zeros(2, dtype=[("a", "i4")]))
    with pytest.raises(ValueError, match=r"s1\.hdf5.*structured"):
        restricted_loads(content, source="s1.hdf5")


def test_persistent_ids_are_refused_unless_asked_for():
    with pytest.raises(UnsafePickleError, match="outside data"):
        restricted_loads(b"\x80\x02X\x01\x00\x00\x00aQ.", source="f")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_pickles_raise_only_named_errors(data):
    content = bytearray(pickle.dumps({"a": np.arange(20), "b": datetime.date(2020, 1, 1)}, 4))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    try:
        restricted_loads(bytes(content[:cut]), source="s1.hdf5")
    except ValueError as error:
        assert str(error).startswith("s1.hdf5")

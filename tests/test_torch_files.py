"""Torch files are read and written bit for bit without torch; danger is refused, damage named."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import golden_cases
from weight_files import arrays, assert_equal

from common_jax.files import UnsafePickleError
from common_jax.torch_files import load_torch, save_torch
from common_jax.weights import open_tensors

ROOT = Path(__file__).parent.parent


def torch_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def test_torch_reads_the_torch_files_we_write(tmp_path):
    save_torch(tmp_path / "m.pth", arrays())
    loaded = torch.load(tmp_path / "m.pth", weights_only=True)
    assert list(loaded) == list(arrays())
    for name, value in arrays().items():
        np.testing.assert_array_equal(torch_numpy(loaded[name]), value)
    assert_equal(open_tensors(tmp_path / "m.pth"), arrays())


def torch_state() -> dict[str, torch.Tensor]:
    wide = torch.arange(24.0).reshape(2, 3, 4)
    return {
        "whole": wide,
        "view": wide[:, 1:, ::2],
        "transposed": wide.permute(2, 0, 1),
        "expanded": wide[:1].expand(5, 3, 4),
        "bfloat": wide.bfloat16(),
        "half": wide.half(),
        "double": wide.double(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(wide + 1),
        "count": torch.arange(4),
        "flag": torch.tensor([True, False]),
        "channels_last": wide[None].to(memory_format=torch.channels_last),
    }


def test_torch_files_equal_torch_load_for_every_dtype_and_view(tmp_path):
    torch.save(torch_state(), tmp_path / "m.bin")
    wanted = {name: torch_numpy(value) for name, value in torch_state().items()}
    assert_equal(open_tensors(tmp_path / "m.bin"), wanted)


@pytest.mark.parametrize("folder", golden_cases("satdifuser_*"))
def test_golden_torch_files_equal_torch_load(folder):
    files = sorted([*folder.rglob("*.bin"), *folder.rglob("*.pth")])
    assert files
    for file in files:
        state = torch.load(file, weights_only=True)
        assert_equal(open_tensors(file), {name: torch_numpy(v) for name, v in state.items()})


def test_torch_is_not_imported_to_read_torch_files(tmp_path):
    torch.save(torch_state(), tmp_path / "m.bin")
    code = (
        "import sys; from common_jax.weights import open_tensors\n"
        "tensors = open_tensors(sys.argv[1]); tensors['view'].read()\n"
        "assert 'torch' not in sys.modules and 'jax' not in sys.modules; print(len(tensors))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.bin")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(ran.stdout) == len(torch_state())


def test_a_training_checkpoint_gives_its_nested_state(tmp_path):
    torch.save(
        {"epoch": 3, "lr": 0.1, "net": {"w": torch.ones(2)}, "list": [torch.zeros(1), None]},
        tmp_path / "c.pth",
    )
    loaded = load_torch(tmp_path / "c.pth")
    assert loaded["epoch"] == 3
    np.testing.assert_array_equal(loaded["net"]["w"].read(), np.ones(2))
    assert open_tensors(tmp_path / "c.pth") == {}


def test_truncated_and_corrupt_torch_files_are_named(tmp_path):
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "whole.bin")
    content = (tmp_path / "whole.bin").read_bytes()
    broken = tmp_path / "broken.bin"
    for damage in (content[:-1], content[:200], b"", b"<html>not found</html>"):
        broken.write_bytes(damage)
        with pytest.raises(ValueError, match=r"broken\.bin.*[Dd]ownload it again"):
            open_tensors(broken)["w"].read()
    place = content.index(np.arange(1000.0, dtype=np.float32)[500:510].tobytes())
    broken.write_bytes(content[:place] + b"\x00\x01\x02" + content[place + 3 :])
    with pytest.raises(ValueError, match=r"broken\.bin.*CRC.*download it again"):
        open_tensors(broken)["w"].read()
    with pytest.raises(ValueError, match=r"broken\.bin.*CRC.*download it again"):
        open_tensors(broken)["w"].read(slice(0, 10))  # the damage lies elsewhere in the tensor


def test_files_of_old_torch_are_refused_with_the_conversion(tmp_path):
    path = tmp_path / "old.bin"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before torch 1\.6.*python -c") as caught:
        open_tensors(path)
    command = str(caught.value).split("python -c ")[1].strip('"')
    exec(command, {})  # the advice must work as printed
    np.testing.assert_array_equal(open_tensors(path)["w"].read(), np.ones(3))


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_hostile_torch_files_are_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "was_run", tmp_path / "evil.bin"
    torch.save({"w": torch.ones(2), "x": Hostile(marker)}, path)
    with pytest.raises(UnsafePickleError, match=r"evil\.bin.*system.*refused and not run"):
        open_tensors(path)
    torch.save(torch.nn.Linear(2, 2), path)  # a whole module runs its class on load
    with pytest.raises(UnsafePickleError, match=r"evil\.bin.*torch\.nn.*Linear"):
        open_tensors(path)
    assert not marker.exists()


def rewrite(path: Path, changes: dict[bytes, bytes]) -> None:
    """Replaces bytes of the pickle inside a torch file, keeping the zip valid."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                for old, new in changes.items():
                    assert content.count(old), old
                    content = content.replace(old, new)
            archive.writestr(name, content)


def test_tensors_reaching_beyond_their_storage_are_refused(tmp_path):
    path, integer = tmp_path / "m.bin", lambda n: b"\x8a\x08" + n.to_bytes(8, "little")
    wrong = [
        {b"(" + integer(13) + b"t": b"(" + integer(14) + b"t"},  # shape
        {b"(" + integer(1) + b"t": b"(" + integer(2) + b"t"},  # stride
        {b"tQ" + integer(0): b"tQ" + integer(1)},  # offset
        {integer(13) + b"tQ": integer(26) + b"tQ"},  # storage
    ]
    for changes in wrong:
        save_torch(path, {"w": np.zeros(13, np.float32)})
        rewrite(path, changes)
        with pytest.raises(ValueError, match=r"m\.bin.*(beyond|wrong size)"):
            open_tensors(path)


def test_compressed_and_foreign_zips_are_refused(tmp_path):
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"N." * 1000)
    with pytest.raises(ValueError, match="compressed inside"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"")
    with pytest.raises(ValueError, match=r"without one data\.pkl"):
        open_tensors(path)


def test_an_interrupted_save_keeps_the_old_weights(tmp_path):
    path = tmp_path / "m.pth"
    save_torch(path, arrays())
    with pytest.raises(ValueError, match="torch files hold no complex64"):
        save_torch(path, {"z": np.zeros(2, np.complex64)})
    assert_equal(open_tensors(path), arrays())
    assert [p.name for p in tmp_path.iterdir()] == ["m.pth"]

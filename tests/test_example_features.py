from __future__ import annotations

from PIL import Image

from examples import features


def test_the_library_example_prints_the_features_of_a_picture(tmp_path, capsys):
    Image.new("RGB", (50, 40), "green").save(tmp_path / "green.jpg")
    features.main(picture=str(tmp_path / "green.jpg"), side=32)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "side 8: (1, 3, 8, 8, 64) [image, time, y, x, channel]"
    assert lines[1].split(", ")[0].strip() == "up_blocks.1.resnets.0.conv2"
    assert lines[2].startswith("side 4: (1, 3, 4, 4, 256)")

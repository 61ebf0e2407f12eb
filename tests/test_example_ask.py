from __future__ import annotations

from PIL import Image
from test_answering import CONFIG, tokenizer  # noqa: F401  a fixture

from examples import ask
from geodit_jax.convert import export_model
from geodit_jax.model import init_model


def test_the_library_example_answers_from_a_folder(tmp_path, tokenizer, capsys):  # noqa: F811
    tokenizer.save(tmp_path / "tokens")
    export_model(tmp_path / "model", init_model(CONFIG, 0), CONFIG, tmp_path / "tokens")
    Image.new("RGB", (50, 40), "green").save(tmp_path / "green.jpg")
    ask.main(str(tmp_path / "model"), str(tmp_path / "green.jpg"), "where is the boat?")
    lines = capsys.readouterr().out.splitlines()
    passes = [int(line.split()[1]) for line in lines if line.startswith("  pass ")]
    assert passes and set(passes) <= set(range(1, 9))

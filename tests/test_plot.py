"""plot.py draws what bench.py and train.py leave."""

import pytest

import plot
import train


@pytest.fixture
def two_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "1"):
        train.main(["--device", "cpu", "--epochs", "2", "--img-size", "14", "--seed", seed])
    return sorted((tmp_path / "runs/digits").iterdir())


def test_curves_of_two_seeds_are_one_line(two_seeds, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    curves = plot.read_curves(two_seeds)
    assert (
        list(curves) == ["mlae digits img_size=14"] and len(curves["mlae digits img_size=14"]) == 2
    )
    loss, top1 = curves["mlae digits img_size=14"][0]
    assert len(loss) == len(top1) == 2 and loss[1] < loss[0]
    capsys.readouterr()
    plot.main([*map(str, two_seeds)])
    path = two_seeds[0] / "curves.png"
    assert capsys.readouterr().out == f"{path}\n" and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent/curves.png: expected a .png, .pdf, .svg file in a folder"),
        (["absent", "--out", "x.png"], "absent is not a run of train.py"),
        (["absent", "--out", "x.txt"], "x.txt: expected a .png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        plot.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err

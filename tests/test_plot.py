"""plot.py draws what bench.py and train.py leave."""

import pytest
import torch
from safetensors.torch import load_file

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


def test_the_experts_of_two_runs(two_seeds, tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed")
    images, imshow = [], pyplot.Axes.imshow

    def noted(self, values, **options):
        images.append(torch.as_tensor(values).clone())
        return imshow(self, values, **options)

    monkeypatch.setattr(pyplot.Axes, "imshow", noted)
    plot.main([*map(str, two_seeds), "--experts", str(tmp_path / "experts.png")])
    assert (tmp_path / "experts.png").stat().st_size > 5000
    assert [tuple(image.shape) for image in images] == 2 * (6 * [(8, 8)] + 2 * [(6, 8)])
    state = load_file(two_seeds[0] / "adapter.safetensors")
    A, B, size = (state[f"blocks.2.attn.qkv.lora_{name}"] for name in ("A", "B", "lambda"))
    one, two = torch.outer(B[:, 1], A[1]), torch.outer(B[:, 5], A[5])
    cosine = (one * two).sum() / one.norm() / two.norm()
    torch.testing.assert_close(images[2][1, 5], cosine.abs(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(images[7][2, 1], size[1].abs() * one.norm(), atol=1e-5, rtol=1e-3)


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

"""eval.py on runs that train.py has left."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import backbone
import data
import eval as evaluation
import model as models


def test_evaluation_restores_every_mode(nano):
    net = nano(mask_prob=0.5).train()
    net.blocks[2].eval()
    before = [module.training for module in net.modules()]
    images = data.load("digits", img_size=28)[1]
    normalize = data.normalizer(*data.NORMALIZE["imagenet"], "cpu")
    first = evaluation.evaluate(net, images, normalize)
    assert [module.training for module in net.modules()] == before
    assert evaluation.evaluate(net, images, normalize) == first  # no mask acted


def score_again(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    "arguments", [[], ["--val", "--amp", "bf16", "--masking", "mixed"], ["--method", "full"]]
)
def test_eval_repeats_the_number(run, capsys, monkeypatch, tmp_path, arguments):
    metrics = run(*arguments)
    folder = Path(metrics["run"]).resolve()
    monkeypatch.chdir("/")
    code, out, _ = score_again(capsys, folder, "--device", "cpu")
    split = "val" if "--val" in arguments else "test"
    top1, loss = metrics[f"{split}_top1"], metrics[f"{split}_loss"]
    for name in ("reported ", "unmerged ", "merged   "):
        assert f"\n{name} top-1 {top1:.2f} %   loss {loss:.6f}\n" in out
    assert out.rstrip().endswith("they agree") and code == 0
    assert (
        f"{metrics['trainable_parameters']:,} trained, of them {metrics['head_parameters']:,} in the head"
        in out
    )


def test_eval_of_what_is_not_the_run_it_was(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    for folder in (tmp_path / "absent", tmp_path):
        code, _, err = score_again(capsys, folder)
        assert code == 2 and err.count("\n") == 1 and "is not a run of train.py" in err
    folder = Path(run("--method", "linear")["run"])
    other = tmp_path / "other.safetensors"
    changed = load_file(backbone.NANO_FILE)
    save_file({key: value + 1 for key, value in changed.items()}, other)
    code, _, err = score_again(capsys, folder, "--checkpoint", other)
    assert code == 2 and "sha256 differs" in err
    monkeypatch.setattr(models, "merge", lambda model: models.create("vit_nano", 10, img_size=14))
    code, out, _ = score_again(capsys, folder)
    assert code == 1 and "they agree" not in out

"""plot.py draws what train.py leaves: the numbers in the pictures, not only the files."""

import argparse
import json
import math

import numpy as np
import pandas
import pytest
import scipy.stats
import timm
import torch
from safetensors.torch import load_file

import plot
import train
from runs import RunError, read_log

SMALL = ["--device", "cpu", "--epochs", "2", "--img-size", "14", "--batch-size", "250"]
TRAINED = {
    "zero": ["--seed", "0"],
    "one": ["--seed", "1"],
    "fixed": ["--masking", "fixed", "--mask-pattern", "incremental"],
    "increase": ["--mask-schedule", "increase", "--mask-pattern", "hourglass"],
    "linear": ["--method", "linear"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """{name: folder} of small runs."""
    folders = {}
    for name, flags in TRAINED.items():
        out = tmp_path_factory.mktemp(name)
        train.main([*SMALL, *flags, "--out", str(out)])
        (folders[name],) = (out / "digits").iterdir()
    return folders


def draw(*arguments):
    plot.main(["--device", "cpu", *map(str, arguments)])


def maps(figure):
    """The values of every heat map, in order."""
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


def test_a_run_gets_every_picture_and_what_it_cannot_have_is_left_out_aloud(trained, capsys):
    draw(trained["zero"], trained["linear"])
    out, err = capsys.readouterr()
    files = [trained["zero"] / f"{kind}.png" for kind in plot.PICTURES]
    assert out.splitlines() == list(map(str, files)) and len(files) == 5
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    for kind in ("experts", "masks", "attention"):
        assert f"left out of {kind}: linear" in err


def test_one_file_means_the_curves_unless_one_kind_is_named(trained, tmp_path):
    draw(trained["zero"], trained["one"], "--out", tmp_path / "a.pdf")
    draw(trained["fixed"], "--only", "masks", "--out", tmp_path / "b.png")
    draw(trained["zero"], "--only", "curves", "--out", tmp_path / "new", "--format", "svg")
    draw("--sweep", "masking", trained["zero"], trained["fixed"], "--out", tmp_path / "c.png")
    draw(
        "--sweep", "mask-pattern", trained["zero"], trained["increase"], "--out", tmp_path / "d.png"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"a.pdf", "b.png", "c.png", "d.png", "new"}
    assert "<svg" in (tmp_path / "new/curves.svg").read_text()


BAD = {  # what is given -> what the message names
    "absent --out x.png": "absent",
    "LINEAR --only experts --out x.png": "linear",
    "LINEAR --out x.png --format svg": "--out x.png",
    "LINEAR --out absent/x.png": "--out: cannot write absent/x.png",
    "LINEAR --sweep rank": "--sweep rank",
    "LINEAR --sweep method": "--sweep method",
    "LINEAR --only confusion --checkpoint absent.pth": "--checkpoint: there is no file absent.pth",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_exit_code_2(trained, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        draw(*arguments.replace("LINEAR", str(trained["linear"])).split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and BAD[arguments] in err
    assert not any(tmp_path.iterdir())


def test_curves_are_the_mean_and_the_range_over_seeds(trained):
    seeds, fixed = plot.group([trained["one"], trained["fixed"], trained["zero"]])
    assert seeds.folders == [trained["zero"], trained["one"]]
    figure = plot.draw_curves({run.name: run.curves() for run in (seeds, fixed)})
    logs = [read_log(folder / "log.csv") for folder in seeds.folders]
    for axis, column in zip(figure.axes, ("loss", "train_top1", "similarity"), strict=True):
        values = np.array([[row[column] for row in rows] for rows in logs])  # (seeds, epochs)
        np.testing.assert_allclose(axis.lines[0].get_ydata(), values.mean(0))
        band = axis.collections[0].get_paths()[0].vertices
        assert band[:, 1].min() == values.min() and band[:, 1].max() == values.max()


def test_similarity_lambda_and_importance_by_hand(trained):
    names, cosines, sizes, importances = fixed = plot.Run("fixed", [trained["fixed"]]).experts()
    assert names == [f"{number}.qkv" for number in range(6)]
    state = load_file(trained["fixed"] / "adapter.safetensors")
    options = {"equal_nan": True, "atol": 1e-5, "rtol": 1e-4, "check_dtype": False}
    for layer in range(6):
        path = f"blocks.{layer}.attn.qkv"
        a, b = state[f"{path}.lora_A"].double(), state[f"{path}.lora_B"].double().T
        products = torch.einsum("ro,ri->roi", b, a).flatten(1)  # (rank, out x in)
        lengths = products.norm(dim=1)
        masked = state[f"{path}.expert_mask"] == 0
        want = (products @ products.T / lengths / lengths[:, None]).abs()
        want[masked] = want[:, masked] = math.nan
        torch.testing.assert_close(cosines[layer], want.fill_diagonal_(math.nan), **options)
        size = state[f"{path}.lora_lambda"].abs().masked_fill(masked, math.nan)
        torch.testing.assert_close(sizes[layer], size, **options)
        torch.testing.assert_close(importances[layer], size * lengths, **options)
    zero = plot.Run("zero", [trained["zero"]]).experts()
    first, second, _ = plot.draw_experts({"zero": zero, "fixed": fixed}).subfigs
    assert first.axes[0].images[0].get_clim() == second.axes[0].images[0].get_clim()
    np.testing.assert_array_equal(np.ma.stack(maps(second)[:6]).filled(np.nan), cosines)


def test_fixed_masks_and_keep_rates(trained):
    found = {name: plot.Run(name, [trained[name]]) for name in ("zero", "fixed", "increase")}
    figure = plot.draw_masks({name: run.masks() for name, run in found.items()})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5] * 6
    fixed, rates = maps(figure)[:2]
    state = load_file(trained["fixed"] / "adapter.safetensors")
    want = [state[f"blocks.{number}.attn.qkv.expert_mask"].numpy() for number in range(6)]
    np.testing.assert_array_equal(fixed.filled(0), np.stack(want))
    logged = [row["mask_prob"] for row in read_log(trained["increase"] / "log.csv")]
    np.testing.assert_allclose(1 - rates.mean(0), logged, atol=1e-5)
    assert rates[0, -1] == 1 and rates[2, -1] < rates[1, -1] < 1  # dense at both ends


def test_attention_of_the_class_token_by_its_formula(nano, images):
    net = nano().eval()
    seen = []
    net.blocks[-1].attn.qkv.register_forward_hook(lambda *call: seen.append(call[-1]))
    net(images)
    q, k, _ = seen[0].double().unflatten(2, (3, 3, 32)).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) / math.sqrt(32)
    want = scores.softmax(-1).mean(1)[:, 1:].unflatten(1, (4, 4)).float()
    torch.testing.assert_close(plot.class_attention(net, images), want, atol=1e-6, rtol=1e-5)
    with pytest.raises(plot.NoPicture):
        plot.class_attention(timm.create_model("resnet10t"), torch.randn(1, 3, 32, 32))


def test_attention_is_of_the_first_image_of_each_class_and_confusion_of_all(trained):
    run = plot.Run("zero", [trained["zero"]])
    shown, names, before, after, answers = run.attention()
    labels = run.images.labels
    assert names == list("012345") and before.shape == after.shape == (6, 2, 2)
    for label, picture in enumerate(shown):
        assert picture.equal(run.images[labels.tolist().index(label)][0])
    drawn = maps(plot.draw_attention({"zero": (shown, names, before, after, answers)}))
    np.testing.assert_allclose(np.stack(drawn[6:]), torch.cat([before, after]))
    classes, counts = run.confusion()
    metrics = json.loads((trained["zero"] / "metrics.json").read_text())
    assert counts.sum(1).equal(labels.bincount())  # the right class down
    assert 100 * counts.trace().item() / 797 == pytest.approx(metrics["test_top1"], abs=0.006)
    figure = plot.draw_confusion({"zero": (classes, counts)})
    np.testing.assert_allclose(maps(figure)[0], counts / counts.sum(1, keepdim=True))


def test_a_folder_of_images_that_has_moved_is_to_be_named_by_plots_own_flag():
    run = plot.Run("moved", [])
    run.trained = None, {"arguments": argparse.Namespace(dataset="/absent")}
    with pytest.raises(RunError, match="/absent: --data-dir"):
        _ = run.images


def test_of_many_classes_the_most_confused_are_shown():
    counts = 9 * torch.eye(40, dtype=torch.long)
    counts[1:31:2, 38] = torch.arange(20, 5, -1)  # 38 is taken for all of them
    axis, _ = plot.draw_confusion({"many": ([str(i) for i in range(40)], counts)}).axes
    shown = [text.get_text() for text in axis.get_yticklabels()]
    assert shown == [str(i) for i in [*range(1, 29, 2), 38]]
    assert axis.images[0].get_array()[0, 14] == pytest.approx(20 / 29)


def result(top1, seed, split="test", **own):
    """The row of a finished run, as suite.read_runs has it."""
    identity = {"dataset": "digits", "method": "mlae", "seed": seed} | own
    usual = {"mask_prob": 0.5, "lr": 0.008, "targets": ["attn.qkv"], "task": "digits"}
    return usual | identity | {"identity": identity, "split": split, "top1": top1}


def sweep(results):
    return plot.read_sweep(pandas.DataFrame(results, dtype=object), "mask_prob")


def lines(results):
    """{split: {line: values of mask_prob}}"""
    found = {}
    for (_, split), rows in sweep(results).items():
        found[split] = rows.groupby("line")["value"].agg(list).to_dict()
    return found


def test_a_sweep_is_mean_and_interval_over_seeds():
    scores = {0.0: [93.0, 94.5, 93.6], 0.5: [92.0, 91.0]}
    results = [result(95.0 + seed, seed, method="lora", mask_prob=None) for seed in (0, 1)]
    for p, top1 in scores.items():
        results += [result(value, seed, mask_prob=p) for seed, value in enumerate(top1)]
    (axis,) = plot.draw_sweep(sweep(results[::-1]), "mask_prob").axes
    line, _, (errors,) = axis.containers[1]
    np.testing.assert_allclose(list(line.get_xdata()), list(scores), atol=0.02)
    np.testing.assert_allclose(list(line.get_ydata()), list(map(np.mean, scores.values())))
    for segment, values in zip(errors.get_segments(), scores.values(), strict=True):
        mean, error = np.mean(values), scipy.stats.sem(values)
        ends = scipy.stats.t.interval(0.95, len(values) - 1, mean, error)
        np.testing.assert_allclose(segment[:, 1], ends)
    assert 95.5 in [one.get_ydata()[0] for one in axis.lines if len(one.get_ydata()) == 2]


def test_a_learning_rate_chosen_for_each_value_breaks_no_line():
    chosen = {0.0: 0.004, 0.3: 0.008, 0.5: 0.004}
    results = [result(90.0, 0, mask_prob=p, lr=lr) for p, lr in chosen.items()]
    grid = [result(9.0, 0, "val", mask_prob=p, lr=lr) for p in chosen for lr in (0.004, 0.008)]
    both = lines(results + grid)
    assert both["test"] == {"mlae": list(chosen)}
    assert list(both["val"]) == ["mlae lr=0.004", "mlae lr=0.008"]
    pairs = ({"rank": 4, "targets": ["attn.qkv"]}, {"rank": 8, "targets": ["mlp.fc1"]})
    results = [result(90.0, 0, mask_prob=p, **pair) for p in (0.0, 0.5) for pair in pairs]
    found = lines(results)["test"]
    assert [len(values) for values in found.values()] == [2, 2]  # what goes together stays apart

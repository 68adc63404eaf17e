"""plot.py draws what train.py leaves: the numbers in the pictures, not only the files."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import plot
import train
from model import create_backbone
from runs import Result, RunError, read_log

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
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
    """{name: folder} of small runs; a test that writes into one copies it."""
    folders = {}
    for name, flags in TRAINED.items():
        out = tmp_path_factory.mktemp(name)
        train.main([*SMALL, *flags, "--out", str(out)])
        (folders[name],) = (out / "digits").iterdir()
    return folders


@pytest.fixture
def run(trained, tmp_path):
    """A run's copy."""
    return Path(shutil.copytree(trained["zero"], tmp_path / "run"))


def draw(*arguments):
    plot.main(["--device", "cpu", *map(str, arguments)])


def maps(figure):
    """The values of every heat map, in order."""
    return [axis.images[0].get_array() for axis in figure.axes if axis.images]


# --- the command ---------------------------------------------------------------------------------


def test_a_run_gets_every_picture_into_its_folder(run, capsys):
    draw(run)
    out, err = capsys.readouterr()
    files = [run / f"{kind}.png" for kind in ("curves", "experts", "masks", "attention")]
    files.append(run / "confusion.png")
    assert out.splitlines() == list(map(str, files)) and err == ""
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    assert min(path.stat().st_size for path in files) > 5000


def test_what_a_method_cannot_have_is_left_out_aloud(trained, tmp_path, capsys):
    draw(trained["linear"], "--out", tmp_path / "new", "--format", "svg")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        str(tmp_path / f"new/{kind}.svg") for kind in ("curves", "confusion")
    ]
    assert "left out of experts: linear has no experts" in err
    assert "left out of masks: linear has no experts" in err
    assert "left out of attention: linear leaves the backbone's attention as it is" in err
    assert "<svg" in (tmp_path / "new/curves.svg").read_text()


def test_of_several_runs_those_that_can_are_drawn(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plot, "PICTURES", ["curves", "experts"])
    draw(trained["zero"], trained["linear"], "--out", tmp_path)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "left out of experts: linear" in err
    figure = tmp_path / "experts.png"
    figure.unlink()
    with pytest.raises(SystemExit):  # asked for
        draw(trained["zero"], trained["linear"], "--only", "experts", "--out", tmp_path)
    assert capsys.readouterr().err == "plot.py: error: linear has no experts with a lambda\n"
    assert not figure.exists()


def test_one_file_means_the_curves_unless_one_kind_is_named(trained, tmp_path, capsys):
    draw(trained["zero"], trained["one"], "--out", tmp_path / "a.pdf")
    draw(trained["fixed"], "--only", "masks", "--out", tmp_path / "b.png")
    assert capsys.readouterr().out == f"{tmp_path}/a.pdf\n{tmp_path}/b.png\n"
    assert {path.name for path in tmp_path.iterdir()} == {"a.pdf", "b.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent is not a run of train.py"),
        (["absent", "--out", "x.png"], "absent is not a run of train.py"),
        ([], "name the folder of a run"),
        (
            ["RUN", "--only", "curves", "masks", "--out", "x.png"],
            "x.png: one file for curves, masks",
        ),
        (["RUN", "--out", "x.png", "--format", "svg"], "x.png: another format than --format svg"),
        (["RUN", "--only", "lines"], "argument --only: invalid choice: 'lines'"),
        (["RUN", "--out", "no/x.png"], "no/x.png: expected a .png"),
        (["RUN", "--sweep", "rank"], "--sweep rank: no run was repeated with another value"),
        (["absent", "--sweep", "lr"], "--sweep: there is no finished run in absent"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    trained, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    words = [trained["zero"] if word == "RUN" else word for word in arguments]
    with pytest.raises(SystemExit) as stop:
        draw(*words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err
    assert not any(tmp_path.iterdir())


def test_without_matplotlib_there_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        draw(run)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err == "plot.py: error: drawing needs matplotlib: pip install matplotlib\n"


# --- curves --------------------------------------------------------------------------------------


def test_curves_are_the_mean_and_the_range_over_seeds(trained):
    groups = plot.group([trained["one"], trained["fixed"], trained["zero"]])
    assert groups == {
        "mlae masking=stochastic pattern=random": [trained["zero"], trained["one"]],
        "mlae masking=fixed pattern=incremental": [trained["fixed"]],
    }
    figure = plot.draw_curves(plot.read_curves(groups))
    logs = [read_log(trained[name] / "log.csv") for name in ("zero", "one")]
    for axis, column in zip(figure.axes, ("loss", "train_top1", "similarity"), strict=True):
        values = np.array([[row[column] for row in rows] for rows in logs])  # (seeds, epochs)
        np.testing.assert_allclose(axis.lines[0].get_ydata(), values.mean(0))
        band = axis.collections[0].get_paths()[0].vertices
        assert band[:, 1].min() == values.min() and band[:, 1].max() == values.max()
        assert len(axis.lines) == 2 and axis.get_xlabel() == "epoch"
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0] == "mlae masking=stochastic pattern=random (2 seeds)"


def test_seeds_of_unequal_length_are_no_line(run, trained):
    rows = (run / "log.csv").read_text().splitlines()
    (run / "log.csv").write_text("\n".join(rows[:-1]))
    with pytest.raises(RunError, match="has 2 epochs, another seed's run has not"):
        plot.read_curves({"mlae": [run, trained["one"]]})


# --- experts and masks ---------------------------------------------------------------------------


def test_similarity_lambda_and_importance_by_hand(trained):
    runs = [plot.Run(trained[name], name) for name in ("zero", "fixed")]
    figure = plot.draw_experts(runs)
    parts = figure.subfigs[:2]
    for part, name in zip(parts, ("zero", "fixed"), strict=True):
        state = load_file(trained[name] / "adapter.safetensors")
        axes = [axis for axis in part.axes if axis.images]
        *similar, size, importance = [axis.images[0].get_array() for axis in axes]
        assert len(similar) == 6 and part.get_suptitle() == name
        for number in range(6):
            own = {
                word: state[f"blocks.{number}.attn.qkv.{word}"].double().numpy()
                for word in ("lora_A", "lora_B", "lora_lambda", "expert_mask")
            }
            acts = np.flatnonzero(own["expert_mask"])
            found = similar[number].filled(np.nan)
            off = []
            for i in acts:
                one = np.outer(own["lora_B"][:, i], own["lora_A"][i])
                length = np.linalg.norm(one) * abs(own["lora_lambda"][i])
                assert size[number, i] == pytest.approx(abs(own["lora_lambda"][i]), rel=1e-5)
                assert importance[number, i] == pytest.approx(length, rel=1e-4)
                for j in acts[acts != i]:
                    two = np.outer(own["lora_B"][:, j], own["lora_A"][j])
                    cosine = (one * two).sum() / np.linalg.norm(one) / np.linalg.norm(two)
                    assert found[i, j] == pytest.approx(abs(cosine), abs=1e-5)
                    off.append(abs(cosine))
            assert np.isfinite(found).sum() == len(acts) * (len(acts) - 1)
            assert np.isfinite(size[number].filled(np.nan)).sum() == len(acts)
            mean = f"{np.mean(off):.3f}" if off else "one expert"
            assert axes[number].get_title() == f"{number}.qkv\n{mean}"
    limits = {axis.images[0].get_clim() for part in parts for axis in part.axes[:6]}
    assert len(limits) == 1  # the same colours for the same values


def test_fixed_masks_are_a_matrix(trained):
    figure = plot.draw_masks([plot.Run(trained["fixed"], "fixed")])
    state = load_file(trained["fixed"] / "adapter.safetensors")
    want = [state[f"blocks.{number}.attn.qkv.expert_mask"].numpy() for number in range(6)]
    (axis,) = figure.axes
    np.testing.assert_array_equal(axis.collections[0].get_array(), 1 - np.stack(want))
    assert [text.get_text() for text in axis.get_yticklabels()] == [f"{i}.qkv" for i in range(6)]
    assert axis.yaxis_inverted()  # the first layer on top, as in the other maps
    assert "4.0 of 8 a layer" in axis.get_xlabel()


def test_keep_rates_of_random_masks(trained):
    (axis,) = plot.draw_masks([plot.Run(trained["zero"], "zero")]).axes
    assert [bar.get_width() for bar in axis.patches] == [0.5] * 6


def test_keep_rates_over_a_schedule_agree_with_the_log(trained):
    run = plot.Run(trained["increase"], "increase")
    (rates,) = maps(plot.draw_masks([run]))  # (layers, epochs)
    logged = [row["mask_prob"] for row in read_log(trained["increase"] / "log.csv")]
    np.testing.assert_allclose(1 - rates.mean(0), logged, atol=1e-5)
    assert rates[0, -1] == 1 and rates[2, -1] < rates[1, -1] < 1  # dense at both ends


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_attention_of_the_class_token_by_its_formula(nano, images, fused):
    net = nano().eval()
    last = net.blocks[-1].attn
    last.fused_attn = fused
    seen = []
    hook = last.qkv.register_forward_hook(lambda *call: seen.append(call[-1].detach().double()))
    want = net(images)
    hook.remove()
    rows, logits = plot.class_attention(net, images)
    batch, tokens, width = seen[0].shape
    q, k, _ = seen[0].view(batch, tokens, 3, 3, width // 9).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) / math.sqrt(width // 9)
    torch.testing.assert_close(rows.double(), scores.softmax(-1).mean(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rows.sum(1), torch.ones(batch))
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    assert last.fused_attn is fused and not last.attn_drop._forward_pre_hooks


def test_attention_before_is_the_plain_backbones(trained):
    run = plot.Run(trained["zero"], "zero")
    found = run.attention
    plain = create_backbone("vit_nano", 10, img_size=14)
    x = found.images.float() / 255
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])[:, :, None, None]
    rows, _ = plot.class_attention(plain, (x - mean) / std)
    torch.testing.assert_close(found.before.flatten(1), rows[:, 1:])
    assert found.names == list("012345") and found.before.shape == (6, 2, 2)
    assert [run.images.labels.tolist().index(i) for i in range(6)] == [
        next(i for i, (image, _) in enumerate(run.images) if image.equal(picture))
        for picture in found.images
    ]
    _, before, after = np.split(np.stack([m for m in maps(plot.draw_attention([run]))[6:]]), [0, 6])
    np.testing.assert_allclose(before, found.before)
    np.testing.assert_allclose(after, found.after)


def test_register_tokens_are_no_patches():
    net = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, depth=1, num_classes=2)
    rows, _ = plot.class_attention(net, torch.randn(2, 3, 28, 28))
    assert rows.shape == (2, 1 + 4 + 4) and plot.patch_map(net, rows).shape == (2, 2, 2)


@pytest.mark.parametrize(
    "model",
    [
        lambda: timm.create_model(
            "vit_tiny_patch16_224", class_token=False, global_pool="avg", img_size=32, depth=1
        ),
        lambda: timm.create_model("resnet10t"),
    ],
    ids=["pooled", "convolutions"],
)
def test_a_model_without_a_class_token_is_refused(model):
    with pytest.raises(plot.NoPicture, match="has no class token"):
        plot.class_attention(model(), torch.randn(1, 3, 32, 32))


def test_attention_of_other_images_is_not_compared(trained):
    one, two = plot.Run(trained["zero"], "a"), plot.Run(trained["one"], "b")
    plot.draw_attention([one, two])
    two.attention.images[0] = 0
    with pytest.raises(plot.NoPicture, match="b has other images or another backbone"):
        plot.draw_attention([one, two])


# --- confusion -----------------------------------------------------------------------------------


def test_the_confusion_matrix_is_what_was_scored(trained):
    run = plot.Run(trained["zero"], "zero")
    counts = run.confusion
    metrics = json.loads((trained["zero"] / "metrics.json").read_text())
    assert counts.sum() == 797 and counts.sum(1).equal(run.images.labels.bincount())
    top1 = 100 * counts.trace().item() / 797
    assert top1 == pytest.approx(metrics["test_top1"], abs=0.006)
    figure = plot.draw_confusion([run])
    (shares,) = maps(figure)
    np.testing.assert_allclose(shares, counts / counts.sum(1, keepdim=True))
    texts = {(text.get_position(), text.get_text()) for text in figure.axes[0].texts}
    row, column = counts.fill_diagonal_(0).argmax().item() // 10, counts.argmax().item() % 10
    assert ((column, row), str(counts[row, column].item())) in texts  # right down, said across
    assert f"{metrics['test_top1']:.2f} % of 797" in figure.axes[0].get_title()


def test_class_names_come_from_the_run(run):
    config = json.loads((run / "config.json").read_text())
    names = ["nought", "$one", *"23456789"]
    (run / "config.json").write_text(json.dumps(config | {"class_names": names}))
    figure = plot.draw_confusion([plot.Run(run, "mlae")])
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == names
    (run / "config.json").write_text(json.dumps(config | {"class_names": names[:3]}))
    with pytest.raises(RunError, match="3 of the 10 classes"):
        _ = plot.Run(run, "mlae").classes


def test_of_many_classes_the_most_confused_are_shown(trained):
    run = plot.Run(trained["zero"], "many")
    counts = 9 * torch.eye(40, dtype=torch.long)
    for number in range(16):
        counts[2 * number + 1, 38] = 20 - number  # 38 is taken for all of them
    run.confusion = counts
    run.classes = [f"class {i}" for i in range(40)]
    (axis, _) = plot.draw_confusion([run]).axes
    shown = [text.get_text() for text in axis.get_yticklabels()]
    assert shown == [f"class {i}" for i in [*range(1, 29, 2), 38]]
    assert axis.images[0].get_array()[0, 14] == pytest.approx(20 / 29)
    assert "the 15 most confused of 40 classes" in axis.get_title()


# --- sweeps --------------------------------------------------------------------------------------


def result(top1, seed, split="test", **own):
    """A finished run."""
    identity = {"dataset": "digits", "method": "mlae", "seed": seed} | own
    usual = {"mask_prob": 0.5, "lr": 0.008, "targets": ["attn.qkv"]}
    return Result(usual | identity, identity, {"dataset": "digits", "seed": seed}, split, top1)


def test_a_sweep_is_mean_and_interval_over_seeds():
    stats = pytest.importorskip("scipy.stats")
    scores = {0.0: [93.0, 94.5, 93.6], 0.5: [92.0, 91.0, 92.5], 0.9: [80.0]}
    results = []
    for p, top1 in scores.items():
        results += [result(value, seed, mask_prob=p) for seed, value in enumerate(top1)]
    results += [result(95.0 + seed, seed, method="lora", mask_prob=None) for seed in (0, 1)]
    found = plot.read_sweep(results[::-1], "mask_prob")
    assert list(found) == [("digits", "test")]
    (axis,) = plot.draw_sweep(found, "mask_prob").axes
    (bars,) = axis.containers
    line, _, (errors,) = bars
    means = [np.mean(values) for values in scores.values()]
    np.testing.assert_allclose(list(line.get_ydata()), means)
    np.testing.assert_allclose(list(line.get_xdata()), list(scores), atol=0.02)
    for segment, values in zip(errors.get_segments(), scores.values(), strict=True):
        if len(values) > 1:
            want = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        else:
            want = values * 2
        np.testing.assert_allclose(segment[:, 1], want)
    (level,) = [one for one in axis.lines if len(one.get_xdata()) == 2]
    assert level.get_ydata()[0] == 95.5
    words = [text.get_text() for text in axis.get_legend().get_texts()]
    assert sorted(words) == ["lora (n = 2)", "mlae (n = 1 to 3)"]
    assert axis.get_ylim()[1] <= 102 and axis.get_xscale() == "linear"


def test_a_learning_rate_chosen_for_each_value_breaks_no_line():
    chosen = {0.0: 0.004, 0.3: 0.008, 0.5: 0.004}
    results = [
        result(90.0, seed, mask_prob=p, lr=lr) for p, lr in chosen.items() for seed in (0, 1)
    ]
    (lines,) = plot.read_sweep(results, "mask_prob").values()
    assert {name: list(points) for name, points in lines.items()} == {"mlae": list(chosen)}
    grid = [result(9.0, 0, "val", mask_prob=p, lr=lr) for p in chosen for lr in (0.004, 0.008)]
    both = plot.read_sweep(results + grid, "mask_prob")
    assert list(both) == [("digits", "test"), ("digits", "val")]
    assert list(both["digits", "val"]) == ["mlae lr=0.004", "mlae lr=0.008"]
    (over_lr,) = plot.read_sweep(grid, "lr").values()
    assert list(over_lr) == [f"mlae mask_prob={p}" for p in chosen]
    (axis,) = plot.draw_sweep({("digits", "val"): over_lr}, "lr").axes
    assert axis.get_xscale() == "log"
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.004", "0.008"]


def test_two_settings_that_go_together_stay_two_lines():
    pairs = ({"rank": 4, "targets": ["attn.qkv"]}, {"rank": 8, "targets": ["mlp.fc1"]})
    results = [result(90.0, 0, mask_prob=p, **pair) for p in (0.0, 0.5) for pair in pairs]
    (lines,) = plot.read_sweep(results, "mask_prob").values()
    assert len(lines) == 2 and all(len(points) == 2 for points in lines.values())


def test_words_and_lists_are_places_on_the_axis():
    results = [result(80.0 + i, 0, targets=names) for i, names in enumerate((["b"], ["a", "c"]))]
    sweep = plot.read_sweep(results, "targets")
    (axis,) = plot.draw_sweep(sweep, "targets").axes
    assert [text.get_text() for text in axis.get_xticklabels()] == ["a,c", "b"]
    assert list(axis.containers[0][0].get_ydata()) == [81.0, 80.0]


def test_wide_intervals_leave_the_plot():
    decays = plot.ruler({"a": {0.0: {}, 1e-4: {}, 1e-2: {}}}, "weight_decay")
    assert not decays.logarithmic and decays.place(0.0) == 0.0  # no log of 0
    low, high = plot.limits([(90.0, -100.0, 280.0), (94.0, None, None)])
    assert (low, high) == pytest.approx((85.8, 98.2))
    assert plot.limits([(99.0, 98.0, 104.0)]) == pytest.approx((97.95, 100.05))


def test_the_command_of_a_sweep(run, trained, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    for part in ("arguments", "identity"):
        config[part]["mask_prob"] = 0.0
    (run / "config.json").write_text(json.dumps(config))
    draw("--sweep", "mask-prob", tmp_path, trained["zero"])
    assert capsys.readouterr().out == f"{tmp_path}/sweep-mask_prob.png\n"
    assert (tmp_path / "sweep-mask_prob.png").stat().st_size > 5000

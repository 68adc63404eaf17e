"""bench.py runs, its methods compute what they should, and its columns mean what they say."""

import argparse
import json
import sys

import pytest
import torch

import bench
import model as models


@pytest.fixture
def args():
    return argparse.Namespace(model="vit_nano", img_size=28, rank=4, targets=["attn.qkv", "mlp.fc1"], mask_prob=0.5)


def call(capsys, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.py", "--device", "cpu", *map(str, arguments)])
        bench.main()
    return capsys.readouterr().out.splitlines()


def test_what_each_method_trains(args):
    head = 96 * 100 + 100
    experts = 6 * 4 * ((96 + 288) + (96 + 384))
    want = {"floor": head + 96, "mlae": head + experts + 2 * 6 * 4, "two-branch": head + experts + 2 * 6 * 4}
    want |= {"peft": head + experts, "loralib": head + experts}
    for method in want:
        if method in ("peft", "loralib"):
            pytest.importorskip(method)
        net = bench.build(method, args)
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == want[method], method
    full = bench.build("full", args)
    assert all(p.requires_grad for p in full.parameters())
    assert not models.experts(bench.build("eval plain".removeprefix("eval "), args))


def test_two_branch_is_the_same_function(args):
    net = bench.build("mlae", args)
    for layer in models.experts(net).values():
        torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 28, 28)
    want = net.eval()(x)
    for name, layer in models.experts(net).items():
        net.set_submodule(name, bench.TwoBranch(layer))
    torch.testing.assert_close(net(x), want, rtol=1e-3, atol=1e-3)


def test_a_measurement(capsys):
    *table, last = call(
        capsys, "--model", "vit_nano", "--batch-size", 8, "--images", 20, "--rounds", 3, "--warmup", 1,
        "--methods", "floor", "mlae", "full", "eval plain", "eval mlae", "--accumulate", 2,
    )  # fmt: skip
    result = json.loads(last)
    rows = {row["method"]: row for row in result["sweeps"][0][1][0][1]}
    assert list(rows) == ["floor", "mlae", "full", "eval plain", "eval mlae"] and len(table) == 6
    assert rows["floor"]["over floor"] == [1, 1, 1] and "over floor" not in rows["eval mlae"]
    assert all(row["memory_mb"] > 100 and row["seconds"] > 0 for row in rows.values())
    assert rows["mlae"]["images_per_s"] == pytest.approx(8 / rows["mlae"]["seconds"])
    # by hand: 17 tokens x 8 images, 6 blocks of 12 w^2 products and attention; twice that backwards when all trains
    forward = 2 * 8 * (6 * (17 * 12 * 96**2 + 2 * 17**2 * 96) + 16 * 147 * 96 + 96 * 100) / 1e9
    assert rows["eval plain"]["gflops"] == pytest.approx(forward, rel=0.05)
    assert 1.8 < rows["floor"]["gflops"] / forward < 2.1 and 2.7 < rows["full"]["gflops"] / forward < 3.1


def test_options_are_methods_of_their_own(capsys):
    common = ["--model", "vit_nano", "--batch-size", 8, "--images", 8, "--rounds", 2, "--no-memory"]
    *_, last = call(capsys, *common, "--methods", "mlae", "mlae+grad-checkpoint", "mlae+accumulate4+bf16")
    rows = json.loads(last)["sweeps"][0][1][0][1]
    assert rows[1]["gflops"] > 1.3 * rows[0]["gflops"] and rows[2]["gflops"] == pytest.approx(
        rows[0]["gflops"], rel=0.1
    )
    assert len(rows[2]["over mlae"]) == 3


def test_a_sweep_and_its_plot(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    common = [
        "--model",
        "vit_nano",
        "--batch-size",
        4,
        "--images",
        8,
        "--rounds",
        2,
        "--methods",
        "mlae",
        "--no-memory",
    ]
    sweeps = ["--sweep", "rank", 1, 2, "--sweep", "targets", "attn.qkv", "attn.qkv,mlp.fc1"]
    *_, last = call(capsys, *common, *sweeps, "--plot", tmp_path / "cost.png")
    (first, ranks), (second, targets) = json.loads(last)["sweeps"]
    assert (first, second) == ("rank", "targets") and [value for value, _ in ranks] == ["1", "2"]
    assert targets[1][1][0]["gflops"] > 1.05 * targets[0][1][0]["gflops"]
    assert (tmp_path / "cost.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "x.png"], "--plot draws a --sweep"),
        (["--sweep", "rank"], "--sweep rank: expected a flag"),
        (["--sweep", "colour", "1"], "unrecognized arguments: --colour 1"),
        (["--sweep", "device", "cpu"], "--sweep device: expected a flag of this script that changes a step"),
        (["--sweep", "rank", "x"], "argument --rank: invalid int value: 'x'"),
        (["--sweep", "rank", "8", "0"], "argument --rank: must be 1 or more, not 0"),
        (["--model", "vit_nanoo"], "timm has no model 'vit_nanoo'"),
        (["--methods", "mlea"], "--methods 'mlea': there are floor, mlae"),
        (["--methods", "mlae+fp8"], "--methods 'mlae+fp8': there are floor, mlae"),
        (["--rounds", "0"], "argument --rounds: must be 1 or more, not 0"),
        (["--batch-size", "-3"], "argument --batch-size: must be 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        call(capsys, *arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and message in captured.err, captured.err

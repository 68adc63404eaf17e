"""bench.py runs, its methods compute what they should, and its columns mean what they say."""

import argparse
import json
from functools import partial
from importlib.util import find_spec

import pytest
import torch

import bench
import model as models


@pytest.fixture
def args():
    return argparse.Namespace(
        model="vit_nano", img_size=28, rank=4, targets=["attn.qkv", "mlp.fc1"], mask_prob=0.5
    )


def call(capsys, *arguments):
    bench.main(["--device", "cpu", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def test_what_each_method_trains(args):
    head = 96 * 100 + 100
    experts = 6 * 4 * ((96 + 288) + (96 + 384))
    want = {
        "floor": head + 96,
        "mlae": head + experts + 2 * 6 * 4,
        "two-branch": head + experts + 2 * 6 * 4,
    }
    want |= {"peft": head + experts, "loralib": head + experts}
    for method in want:
        if method in bench.PEERS and find_spec(method) is None:
            continue
        net = bench.build(method, args)
        assert sum(p.numel() for p in net.parameters() if p.requires_grad) == want[method], method
    assert all(p.requires_grad for p in bench.build("full", args).parameters())
    assert not models.adapters(bench.build("eval plain", args)) and not models.adapters(
        bench.build("eval merged", args)
    )


def test_a_step_trains_what_trains_and_nothing_else(args, monkeypatch):
    vars(args).update(
        amp="off", compile=False, grad_checkpoint=False, accumulate=1, batch_size=4, mask_prob=0.0
    )
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    nets, build = [], bench.build
    monkeypatch.setattr(bench, "build", lambda *given: nets.append(build(*given)) or nets[-1])
    for method in ("floor", "two-branch", *bench.PEERS, *bench.METHODS):
        if method in bench.PEERS and find_spec(method) is None:
            continue  # the rest is tested without it
        step = bench.stepper(method, args, torch.device("cpu"), images)
        before = {name: p.detach().clone() for name, p in nets[-1].named_parameters()}
        step(), step()  # B is zero at first, so A and lambda move at the second step
        for name, p in nets[-1].named_parameters():
            assert torch.equal(p, before[name]) != p.requires_grad, (method, name)


def test_peers_and_two_branches_start_as_the_same_function(args):
    x = torch.randn(2, 3, 28, 28)
    want = bench.build("eval plain", args).eval()
    for method in ("mlae", "two-branch", "eval merged", *bench.PEERS):
        if method in bench.PEERS and find_spec(method) is None:
            continue  # the rest is tested without it
        net = bench.build(method, args).eval()
        own = dict(net.named_parameters())
        named = {name.replace("base_model.model.", "").replace("base_layer.", "").replace(".layer.", "."): p
                 for name, p in own.items()}  # fmt: skip
        with torch.no_grad():
            for name, p in want.named_parameters():
                named[name].copy_(p)
        torch.testing.assert_close(net(x), want(x), rtol=1e-4, atol=1e-5)


def test_two_branches_train_as_the_folded_form(args):
    nets = {method: bench.build(method, args).train() for method in ("mlae", "two-branch")}
    for layer in models.adapters(nets["mlae"]).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    own = dict(nets["two-branch"].named_parameters())
    with torch.no_grad():
        for name, p in nets["mlae"].named_parameters():
            own[name].copy_(p)
    x = torch.randn(2, 3, 28, 28)
    for net in nets.values():
        torch.manual_seed(0)  # of the masks
        net(x).square().sum().backward()
    for name, p in nets["mlae"].named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, own[name].grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_measurement(capsys, monkeypatch):
    peaks = {"floor": 301, "mlae": 302, "full": 303, "eval plain": 304, "eval mlae": None}
    monkeypatch.setattr(bench, "memory", lambda method, point: peaks[method])  # measured below
    *table, last = call(
        capsys, "--model", "vit_nano", "--batch-size", 8, "--images", 20, "--rounds", 3, "--warmup", 1,
        "--methods", "floor", "mlae", "full", "eval plain", "eval mlae", "--accumulate", 2,
    )  # fmt: skip
    result = json.loads(last)
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["floor", "mlae", "full", "eval plain", "eval mlae"] and len(table) == 7
    assert rows["floor"]["over floor"] == [1, 1, 1] and "over floor" not in rows["eval mlae"]
    assert {method: row["memory_mb"] for method, row in rows.items()} == peaks
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["mlae"]["images_per_s"] == pytest.approx(8 / rows["mlae"]["seconds"])
    # by hand: 17 tokens x 8 images, 6 blocks of 12 w^2 products and attention; twice that backwards when all trains
    forward = 2 * 8 * (6 * (17 * 12 * 96**2 + 2 * 17**2 * 96) + 16 * 147 * 96 + 96 * 100) / 1e9
    assert rows["eval plain"]["gflops"] == pytest.approx(forward, rel=0.05)
    assert (
        1.8 < rows["floor"]["gflops"] / forward < 2.1
        and 2.7 < rows["full"]["gflops"] / forward < 3.1
    )


def test_memory_grows_with_the_batch(args):
    vars(args).update(
        amp="off", compile=False, grad_checkpoint=False, accumulate=1, device="cpu", images=8
    )
    small, large = (
        bench.memory("mlae", argparse.Namespace(**vars(args), batch_size=size)) for size in (1, 384)
    )
    assert (
        small + 100 < large
    )  # by hand: 17 tokens x 96 x 4 bytes x 384 images x about 20 tensors x 6 blocks, 300 MB


COMMON = ["--model", "vit_nano", "--batch-size", 8, "--images", 8, "--rounds", 2, "--no-memory"]


def test_options_are_methods_of_their_own(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    methods = ["mlae", "mlae+compile", "mlae+accumulate4+bf16", "mlae+fp16"]
    *_, last = call(capsys, *COMMON, "--methods", *methods)
    rows = json.loads(last)["rows"]
    for row in rows:
        assert (
            row["gflops"] == pytest.approx(rows[0]["gflops"], rel=0.1)
            and len(row["over mlae"]) == 3
        )


def test_recomputing_counts(capsys):
    try:
        *_, last = call(capsys, *COMMON, "--methods", "mlae", "mlae+grad-checkpoint")
    except SystemExit:  # timm's reentrant checkpoints of old
        assert "this timm loses gradients" in capsys.readouterr().err
        return
    plain, again = json.loads(last)["rows"]
    assert again["gflops"] > 1.3 * plain["gflops"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_nanoo"], "timm has no model 'vit_nanoo'"),
        (["--methods", "mlea"], "--methods 'mlea': there are mlae, lora"),
        (["--methods", "eval mlae+accumulate4"], "scoring has no backward pass"),
        (
            ["--methods", "floor", "--model", "resnet18", "--no-memory"],
            "has no blocks.0.norm1.bias",
        ),
        (["--methods", "mlae+fp8"], "--methods 'mlae+fp8': there are mlae, lora"),
        (["--rounds", "0"], "argument --rounds: must be 1 or more, not 0"),
        (["--batch-size", "-3"], "argument --batch-size: must be 1 or more"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        call(capsys, *arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and message in captured.err, (
        captured.err
    )

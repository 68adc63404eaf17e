"""bench.py runs, its methods compute what they should, and its columns mean what they say."""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from conftest import capture_on_cpu

import bench

COMMON = ["--device", "cpu", "--model", "vit_nano", "--batch-size", "8", "--images", "20"]


@pytest.fixture
def args():
    values = {"model": "vit_nano", "img_size": 28, "rank": 4, "mask_prob": 0.0, "amp": "off"}
    values |= {"compile": False, "grad_checkpoint": False, "accumulate": 1, "device": "cpu"}
    return argparse.Namespace(
        **values, graph=False, targets=["attn.qkv", "mlp.fc1"], batch_size=4, images=8
    )


def test_a_step_trains_what_the_method_trains_and_nothing_else(args, monkeypatch):
    experts = 6 * 4 * ((96 + 288) + (96 + 384))
    own = {"floor": 96, "two-branch": experts + 2 * 6 * 4, "mlae": experts + 2 * 6 * 4}
    own |= dict.fromkeys(bench.PEERS, experts)
    images = torch.randint(0, 256, (8, 3, 28, 28), dtype=torch.uint8)
    nets, build = [], bench.build
    monkeypatch.setattr(bench, "build", lambda *given: nets.append(build(*given)) or nets[-1])
    for method in bench.KNOWN:
        if method.startswith("eval "):
            continue
        step = bench.stepper(method, args, images)
        before = {name: p.detach().clone() for name, p in nets[-1].named_parameters()}
        step(), step()  # B is zero at first, so A and lambda move at the second step
        trained = {}
        for name, p in nets[-1].named_parameters():
            assert torch.equal(p, before[name]) != p.requires_grad, (method, name)
            trained[name] = p.numel() * p.requires_grad
        if method in own:
            assert sum(trained.values()) == 96 * 100 + 100 + own[method], method


def test_a_measurement_of_methods_and_options(capsys, monkeypatch):
    peaks = {"floor": 301, "mlae": 302, "full": 303, "eval plain": 304, "eval mlae": None}
    peaks |= {"mlae+compile+accumulate4+bf16": 305, "mlae+grad-checkpoint": 306}
    monkeypatch.setattr(bench, "memory", lambda method, point: peaks[method])  # measured below
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    bench.main([*COMMON, "--rounds", "2", "--warmup", "0", "--methods", *peaks])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    rows = {row["method"]: row for row in rows}
    assert {method: row["memory_mb"] for method, row in rows.items()} == peaks
    assert rows["floor"]["over floor"] == [1, 1, 1] and "over floor" not in rows["eval mlae"]
    assert rows["mlae"]["images_per_s"] == pytest.approx(8 / rows["mlae"]["seconds"])
    # by hand: 17 tokens x 8 images, 6 blocks of 12 w^2 products and attention; twice that backwards
    forward = 2 * 8 * (6 * (17 * 12 * 96**2 + 2 * 17**2 * 96) + 16 * 147 * 96 + 96 * 100) / 1e9
    flops = {method: row["gflops"] / forward for method, row in rows.items()}
    assert flops["eval plain"] == pytest.approx(1, rel=0.05)
    assert 1.8 < flops["floor"] < 2.1 and 2.7 < flops["full"] < 3.1
    assert flops["mlae+compile+accumulate4+bf16"] == pytest.approx(flops["mlae"], rel=0.1)
    assert flops["mlae+grad-checkpoint"] > 1.3 * flops["mlae"]  # twice forward


def test_memory_grows_with_the_batch(args, monkeypatch):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        # one process for both: it starts slowly
        monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *_, **__: nullcontext(pool))
        small = bench.memory("mlae", args)
        args.batch_size = 384
        # by hand: 17 tokens x 96 x 4 bytes x 384 images x about 20 tensors x 6 blocks, 300 MB
        assert small + 100 < bench.memory("mlae", args)


@pytest.mark.parametrize("words", ["--methods mlae+fp8", "--methods floor --model resnet18"])
def test_bad_input_is_one_line_and_exit_code_2(capsys, words):
    with pytest.raises(SystemExit) as stop:
        bench.main([*COMMON, "--no-memory", *words.split()])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "--methods" in err


def test_a_replayed_step_trains_as_an_eager_one(args, monkeypatch):
    monkeypatch.setattr(bench, "capture", capture_on_cpu)
    images = torch.randint(0, 256, (8, 3, 28, 28), dtype=torch.uint8)
    nets, build = [], bench.build
    monkeypatch.setattr(bench, "build", lambda *given: nets.append(build(*given)) or nets[-1])
    for method in ("mlae", "mlae+graph"):
        torch.manual_seed(0)
        step = bench.stepper(method, args, images)
        for _ in range(4):  # the second step captures
            step()
    eager, replayed = (dict(net.named_parameters()) for net in nets)
    for name, parameter in eager.items():
        assert torch.allclose(parameter, replayed[name], rtol=1e-3, atol=1e-5), name

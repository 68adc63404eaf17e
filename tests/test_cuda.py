"""A step as one CUDA graph: `python -m pytest -m cuda` on a machine with a GPU."""

import gc
import json

import pytest
import torch
from safetensors.torch import load_file

import model as models
import train
from methods import METHODS
from mlae import MLAELinear, hold_mask_prob, set_mask_prob

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def on_gpu(tmp_path, capsys, monkeypatch):
    """Runs train.py on the GPU on small images; returns metrics, adapter and what was printed."""
    monkeypatch.chdir(tmp_path)

    def call(out, *words):
        own = ["--device", "cuda", "--img-size", "14", "--epochs", "2", "--out", out]
        train.main([*own, *map(str, words)])
        printed = capsys.readouterr().out
        metrics = json.loads(printed.splitlines()[-1])
        return metrics, load_file(f"{metrics['run']}/adapter.safetensors"), printed

    return call


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def captured(layer, x):
    """A graph of `layer`'s coefficients, which each replay copies to the tensor returned."""
    found = torch.zeros(layer.rank, device="cuda")

    def step(images, labels, size):
        found.copy_(layer.coefficients().detach())
        layer(x).sum().backward()

    return train.capture(step, layer, 2, 1), found


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("batch", [50, 64])  # 64: the last batch of 1000 images is short
def test_a_captured_run_is_the_eager_one(on_gpu, amp, batch):
    words = "--amp", amp, "--batch-size", batch
    graph, weights, _ = on_gpu("graph", *words)
    eager, wanted, _ = on_gpu("eager", *words, "--graph", "off")
    # a short batch is filled up: other sizes of products round differently
    assert largest_difference(weights, wanted) < (1e-3 if amp == "off" else 3e-2)
    assert abs(graph["test_top1"] - eager["test_top1"]) < 2


def test_each_replay_draws_a_mask_and_their_mean_is_right():
    layer = MLAELinear(4, 6, rank=8, mask_prob=0.3, device="cuda").train()
    replay, found = captured(layer, torch.randn(2, 4, device="cuda"))
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device="cuda")
    drawn = []
    for _ in range(2000):
        replay(images, torch.zeros(1, dtype=torch.long, device="cuda"), 1)
        drawn.append(found.clone())
    drawn = torch.stack(drawn)  # (2000, 8)
    assert len(drawn.unique(dim=0)) > 50
    assert torch.allclose(drawn.mean(0), torch.ones(8, device="cuda"), atol=0.06)


def test_a_changed_p_acts_in_the_next_replay():
    layer = MLAELinear(4, 6, rank=64, mask_prob=0.0, device="cuda").train()
    replay, found = captured(layer, torch.randn(2, 4, device="cuda"))
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device="cuda")
    label = torch.zeros(1, dtype=torch.long, device="cuda")
    replay(batch, label, 1)
    assert (found == 1).all()
    set_mask_prob(layer, 0.75)
    replay(batch, label, 1)
    assert set(found.tolist()) == {0.0, 4.0}


def test_random_numbers_go_on_as_if_nothing_had_been_captured():
    layer = MLAELinear(4, 6, rank=64, device="cuda").train()
    hold_mask_prob(layer)
    x = torch.ones(2, 4, device="cuda")
    torch.cuda.manual_seed(7)
    wanted = layer.coefficients().detach()
    torch.cuda.manual_seed(7)
    replay, found = captured(layer, x)
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8, device="cuda")
    replay(batch, torch.zeros(1, dtype=torch.long, device="cuda"), 1)
    assert torch.equal(found, wanted)


def test_an_interrupted_run_goes_on_bit_for_bit(on_gpu, monkeypatch):
    _, wanted, _ = on_gpu("whole")
    save = train.save_state

    def stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", stop)
    with pytest.raises(SystemExit):
        on_gpu("parts")
    monkeypatch.setattr(train, "save_state", save)
    _, weights, printed = on_gpu("parts", "--resume")
    assert "resumed" in printed
    assert largest_difference(weights, wanted) == 0


def test_two_runs_in_one_process_free_their_graphs(on_gpu):
    used = []
    for seed in range(3):
        on_gpu("runs", "--seed", seed)
        gc.collect()
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved())
    assert used[2] <= used[0] + (32 << 20)


def test_a_capture_that_fails_leaves_an_eager_run(on_gpu, monkeypatch):
    _, wanted, _ = on_gpu("eager", "--graph", "off")
    coefficients = MLAELinear.coefficients

    def waiting(layer):
        if torch.cuda.is_current_stream_capturing():
            layer.lora_lambda.sum().item()  # a graph cannot wait for the GPU
        return coefficients(layer)

    with monkeypatch.context() as patch:
        patch.setattr(MLAELinear, "coefficients", waiting)
        _, weights, printed = on_gpu("failed")
    assert "no CUDA graph" in printed
    assert largest_difference(weights, wanted) < 1e-3
    _, _, printed = on_gpu("next")  # what failed leaves nothing behind
    assert "no CUDA graph" not in printed


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(on_gpu, method):
    metrics, _, printed = on_gpu("runs", "--method", method, "--epochs", 3)
    assert metrics["test_top1"] > 15
    assert "no CUDA graph" not in printed


def test_a_merged_model_agrees_on_the_gpu():
    net = models.create("vit_nano", 10, pretrained=False).cuda()
    for layer in models.adapters(net).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(4, 3, 28, 28, device="cuda")
    merged = models.merge(net).eval()
    assert torch.allclose(net.eval()(x), merged(x), atol=1e-4)

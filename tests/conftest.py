import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as models
import sources

FETCH = sources._fetch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fetch_itself():
    return FETCH


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(name, original, root):
        raise OSError("tests download nothing")

    monkeypatch.setattr(sources, "_fetch", refuse)


@pytest.fixture
def nano():
    """A factory of small models whose experts act: B is random instead of zero."""

    def make(**kwargs):
        net = models.create("vit_nano", 10, **{"pretrained": False, **kwargs})
        for layer in models.experts(net).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
            with torch.no_grad():
                layer.lora_B *= layer.expert_mask
        return net

    return make


@pytest.fixture
def images():
    return torch.randn(4, 3, 28, 28)

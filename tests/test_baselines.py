"""The table of methods: what stands in its rows is all that a method is."""

import ast
import re
from pathlib import Path

import pytest

import baselines
import model as models
from baselines import METHODS

ROOT = Path(baselines.__file__).parent


@pytest.mark.parametrize("method", METHODS)
def test_a_row_tells_what_trains(method):
    net = models.create("vit_nano", 10, pretrained=False, method=method)
    assert net.method == method and net.method_settings == METHODS[method].settings
    layers = models.adapters(net)
    targets = METHODS[method].targets if METHODS[method].layer else ()
    assert len(layers) == 6 * len(targets)
    for layer in layers.values():
        for name in METHODS[method].fixed(net.method_settings):
            assert not getattr(layer, name).requires_grad


def test_settings_of_other_methods_are_ignored_and_unknown_ones_are_not():
    net = models.create("vit_nano", 10, pretrained=False, method="linear", rank=4, mask_prob=0.1)
    assert net.method_settings == {}
    with pytest.raises(TypeError, match="no method has a setting 'rnak'"):
        models.create("vit_nano", 10, pretrained=False, rnak=4)


def test_no_other_script_names_a_method():
    """But flags.py, which says in words what is whose; and snell.py, a layer of baselines.py."""
    for path in ROOT.glob("*.py"):
        if path.name in ("baselines.py", "flags.py", "snell.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = re.findall(r"[a-z_]+", node.value)  # lora_A is a parameter
                is_text = " " in node.value.strip() and len(words) > 3  # help, messages, docs
                named = set(words) & (set(METHODS) - {"linear", "full"})
                assert is_text or not named, f"{path.name}, line {node.lineno}"
                assert node.value not in METHODS, f"{path.name}, line {node.lineno}"

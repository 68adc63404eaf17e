"""The table of methods: what stands in its rows is all that a method is."""

from pathlib import Path

import pytest

import methods
import model as models
from methods import METHODS

ROOT = Path(methods.__file__).parent


@pytest.mark.parametrize("method", METHODS)
def test_a_row_tells_what_trains(method):
    net = models.create("vit_nano", 10, pretrained=False, method=method)
    assert net.method == method and net.method_settings == METHODS[method].settings
    layers = models.adapters(net)
    targets = METHODS[method].targets if METHODS[method].layer else ()
    assert len(layers) == 6 * len(targets)
    for layer in layers.values():
        for name in METHODS[method].frozen(net.method_settings):
            assert not getattr(layer, name).requires_grad


def test_settings_of_other_methods_are_ignored_and_unknown_ones_are_not():
    net = models.create("vit_nano", 10, pretrained=False, method="linear", rank=4, mask_prob=0.1)
    assert net.method_settings == {}
    with pytest.raises(TypeError, match="no method has a setting 'rnak'"):
        models.create("vit_nano", 10, pretrained=False, rnak=4)

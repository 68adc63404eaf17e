"""What imports what: the scripts one way, the method torch alone, a run the five packages alone."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = "mlae methods model splits tasks data runs export eval train suite plot bench".split()
EXTRAS = ["pandas", "scipy", "tabulate", "matplotlib", "h5py", "peft", "onnx", "sklearn"]
BLOCK = "import sys\nfor name in {names}:\n    sys.modules[name] = None  # importing it fails\n"


def test_a_script_imports_only_from_those_above_it():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(ORDER)
    for place, name in enumerate(ORDER):
        imported = set()
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert imported & set(ORDER) <= set(ORDER[:place]), name


def run(code, folder):
    env = os.environ | {"PYTHONPATH": ""}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)


def test_a_run_needs_the_five_packages_alone(tmp_path):
    words = ["--device", "cpu", "--epochs", "1", "--img-size", "14", "--out", str(tmp_path)]
    code = BLOCK.format(names=EXTRAS) + f"import data, eval, train\ntrain.main({words})"
    run(code, ROOT)
    assert len(list(tmp_path.rglob("metrics.json"))) == 1


def test_the_method_needs_torch_alone(tmp_path):
    shutil.copy(ROOT / "mlae.py", tmp_path)
    others = ["torchvision", "timm", "tqdm", *EXTRAS]
    code = BLOCK.format(names=others)
    code += "import torch\nfrom mlae import MLAELinear\n"
    code += "layer = MLAELinear.from_linear(torch.nn.Linear(5, 3))\n"
    code += "layer(torch.randn(2, 5)).sum().backward()\n"
    code += "assert layer.lora_B.grad is not None and layer.to_linear().weight.shape == (3, 5)"
    run(code, tmp_path)

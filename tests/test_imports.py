"""What imports what: the scripts one way, the method torch alone, a run the five packages alone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORDER = "mlae methods model splits tasks data runs export eval train suite plot bench".split()
EXTRAS = ["pandas", "scipy", "tabulate", "matplotlib", "h5py", "peft", "onnx", "sklearn"]


def test_a_script_imports_only_from_those_above_it():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER)
    for place, name in enumerate(ORDER):
        text = (ROOT / f"{name}.py").read_text()
        imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
        assert imported & set(ORDER) <= set(ORDER[:place]), name


def run_without(names, code, folder):
    block = "import sys\n" + "".join(f"sys.modules['{name}'] = None\n" for name in names)
    env = os.environ | {"PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", block + code], cwd=folder, env=env, check=True)


def test_a_run_needs_the_five_packages_alone(tmp_path):
    words = ["--device", "cpu", "--epochs", "1", "--img-size", "14", "--out", str(tmp_path)]
    run_without(EXTRAS, f"import data, eval, train\ntrain.main({words})", ROOT)


def test_the_method_needs_torch_alone(tmp_path):
    shutil.copy(ROOT / "mlae.py", tmp_path)
    code = "import torch\nfrom mlae import MLAELinear\n"
    code += "MLAELinear.from_linear(torch.nn.Linear(5, 3))(torch.randn(2, 5)).sum().backward()"
    run_without(["torchvision", "timm", "tqdm", *EXTRAS], code, tmp_path)

"""How much a reader must hold: density, length and nesting of the scripts."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("*.py"))
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
FORMULAS = {"mlae.py": 12.6}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def code(source):
    """(number of tokens, number of lines that hold one), comments and docstrings left out."""
    documentation, lines, count = set(), set(), 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE and token.start[0] not in documentation:
            count += 1
            lines.add(token.start[0])
    return count, len(lines)


def nested(source):
    """The lines of comprehensions that hold another, or have two `for`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, COMPREHENSIONS):
            inside = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS) and n is not node]
            if inside or len(node.generators) > 1:
                found.append(node.lineno)
    return found


def test_the_measure_itself():
    assert code('"""Words."""\nx = 1  # one\n\ny = [x,\n     2]\n') == (10, 3)
    assert nested("[x for x in y]") == [] and nested("[[x for x in z] for z in y]") == [1]
    assert nested("\n{x for z in y for x in z}") == [2]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_not_dense(script):
    source = script.read_text()
    tokens, lines = code(source)
    assert tokens / lines <= FORMULAS.get(script.name, 10.5)
    assert not nested(source)
    assert source.count("\n") <= 350
    assert max(map(len, source.splitlines())) <= 100


def test_the_reading_path_is_short():
    path = [(ROOT / name).read_text() for name in ("mlae.py", "model.py", "train.py")]
    assert sum(code(source)[0] for source in path) <= 5500


# every script, and who may import whom: a script imports only from those above it
ROOMS = """flags mlae masking snell baselines files backbone export model processes splits views images
originals sources tasks folders photos runs data configs stats table predictions prune budget eval
train suite figures inside pictures sweeps plot bench""".split()


def test_every_script_has_its_room():
    assert sorted(ROOMS) == [script.stem for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_data_flow_one_way(script):
    above = ROOMS[: ROOMS.index(script.stem)]
    for node in ast.walk(ast.parse(script.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            assert name not in ROOMS or name in above, f"{script.name} imports {name}"

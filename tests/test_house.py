"""The rooms: which files there are, and which of them may import which."""

import ast
import re

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

MAY_IMPORT = {
    "GPT_Modules": {"lib.pretrained"},  # in from_pretrained alone
    "lib.cli": set(),
    "lib.softmax_kernel": set(),
    "lib.muon": set(),
    "lib.loss": {"lib.softmax_kernel"},
    "lib.files": {"lib.cli"},
    "lib.tokenizer": {"lib.cli"},
    "lib.documents": {"lib.cli"},
    "lib.hub": {"lib.cli", "lib.documents", "lib.files"},
    "lib.shards": {"lib.cli", "lib.files", "lib.tokenizer"},
    "lib.loader": {"lib.cli", "lib.shards"},
    "lib.device": {"GPT_Modules", "lib.cli", "lib.loss"},
    "lib.speed": {"GPT_Modules", "lib.device"},
    "lib.ranks": {"lib.cli", "lib.device"},
    "lib.log": {"lib.cli", "lib.files"},
    "lib.curve": {"lib.files", "lib.log", "lib.shards", "lib.tokenizer"},
    "lib.checkpoint": {"GPT_Modules", "lib.cli", "lib.files"},
    "lib.pretrained": {"GPT_Modules", "lib.checkpoint", "lib.cli", "lib.tokenizer"},
    "lib.start": {
        "GPT_Modules", "lib.checkpoint", "lib.cli", "lib.log", "lib.pretrained", "lib.shards",
        "lib.tokenizer",
    },
    "data_generator": {"lib"},
    "metrics": {"lib"},
    "sample": {"lib", "GPT_Modules"},
    "inside": {"lib", "GPT_Modules"},
    "hellaswag": {"lib", "GPT_Modules"},
    "export": {"lib", "GPT_Modules", "sample"},
    "train": {"lib", "GPT_Modules", "hellaswag", "sample"},
}  # fmt: skip
FILES = {name: ROOT / (name.replace(".", "/") + ".py") for name in MAY_IMPORT}


def test_these_files_and_no_others():
    there = {
        str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *(ROOT / "lib").glob("*.py")]
    }
    assert there == {str(path.relative_to(ROOT)) for path in FILES.values()} | {"lib/__init__.py"}


@pytest.mark.parametrize("name", FILES)
def test_the_arrows_go_one_way(name):
    ours = {other for other in FILES if "." not in other} | {"lib"}
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = (
                [f"lib.{alias.name}" for alias in node.names]
                if node.module == "lib"
                else [node.module]
            )
        for imported in names:
            if imported.partition(".")[0] in ours:
                assert {imported, imported.partition(".")[0]} & MAY_IMPORT[name], (
                    f"{name} imports {imported}"
                )


def test_the_model_imports_nothing_of_the_project_when_it_is_imported():
    for node in ast.parse(FILES["GPT_Modules"].read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names]
            assert not any(name.partition(".")[0] == "lib" for name in names), names


def test_ranks_talk_to_each_other_in_one_file():
    for name, path in FILES.items():
        found = re.search(
            r"\bdist\.|torch\.distributed|all_reduce|all_gather|\bbarrier\(", path.read_text()
        )
        assert name == "lib.ranks" or not found, (name, found)


def test_users_keep_the_newer_versions_that_they_have():
    """An upper bound would have pip replace a cloud image's torch by an older one."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        bound = line if line.startswith("#") else str(Requirement(line).specifier)
        assert re.fullmatch(r"#.*|>=[0-9.]+", bound), line


PLATFORMS = [
    ("linux", "x86_64", True), ("linux", "aarch64", True), ("darwin", "x86_64", True),
    ("darwin", "arm64", True), ("win32", "AMD64", True), ("linux", "armv7l", False),
    ("linux", "ppc64le", False), ("win32", "ARM64", False), ("freebsd14", "x86_64", False),
]  # fmt: skip


@pytest.mark.parametrize("platform, machine, has_wheel", PLATFORMS)
def test_gigatoken_is_installed_where_it_has_a_wheel(platform, machine, has_wheel):
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("gigatoken")]
    environment = {"sys_platform": platform, "platform_machine": machine}
    assert Requirement(line).marker.evaluate(environment) == has_wheel

"""packages/: distributions named by the frameworks' conventions, built and installed beside the main one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {  # distribution -> what it asks for and what one imports
    "langchain-packllm": ("langchain", "langchain_packllm", ["ChatPackLLM", "PackLLM", "PackReranker"]),
    "llama-index-llms-packllm": ("llama-index", "llama_index.llms.packllm", ["PackLLM"]),
}
SEEN = """
import json, sys
from importlib import import_module
from importlib.metadata import version
seen = {}
for name, (_, module, classes) in json.loads(sys.argv[1]).items():
    found = import_module(module)
    seen[name] = [version(name), found.__file__, [getattr(found, one).__module__.split(".")[0] for one in classes]]
print(json.dumps(seen))
"""


def pip(*arguments: str) -> str:
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Distribution -> its wheel, the main one included."""
    try:
        distribution("hatchling"), distribution("pip")
    except PackageNotFoundError as error:
        pytest.skip(f"wheels are built with {error.name}, which is not installed")
    folder = tmp_path_factory.mktemp("wheels")
    sources = [ROOT, *(ROOT / "packages" / name for name in PACKAGES)]
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *map(str, sources))
    found = {metadata(path)["Name"]: path for path in folder.glob("*.whl")}
    assert set(found) == {"packllm", *PACKAGES}
    return found


def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as inside:
        (name,) = (one for one in inside.namelist() if one.endswith(".dist-info/METADATA"))
        return message_from_bytes(inside.read(name))


def test_all_that_is_in_packages_is_known_here():
    assert {path.name for path in (ROOT / "packages").iterdir()} == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_metadata_ask_for_the_main_distribution_of_the_same_version(wheels, name):
    main, thin = metadata(wheels["packllm"]), metadata(wheels[name])
    extra, _, _ = PACKAGES[name]
    assert thin["Version"] == main["Version"]
    assert thin.get_all("Requires-Dist") == [f"packllm[{extra}]=={main['Version']}"]
    assert extra in main.get_all("Provides-Extra")
    for field in ("License-Expression", "License-File", "Author", "Requires-Python"):
        assert thin[field] == main[field], field
    assert f"pip install {name}" in thin.get_payload()
    with zipfile.ZipFile(wheels[name]) as inside:
        (licence,) = (one for one in inside.namelist() if one.endswith("/LICENSE"))
        assert inside.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_llamahub_is_told_where_the_class_is():
    project = tomllib.loads((ROOT / "packages/llama-index-llms-packllm/pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["llamahub"]["import_path"] == PACKAGES["llama-index-llms-packllm"][1]
    assert project["tool"]["llamahub"]["class_authors"] == {"PackLLM": "packllm"}


def test_installed_side_by_side_no_file_has_two_owners_and_the_modules_are_there(wheels, tmp_path):
    pytest.importorskip("langchain_core")
    pytest.importorskip("llama_index.core")
    owners: Counter[str] = Counter()
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as inside:
            owners.update(inside.namelist())
    assert [name for name, count in owners.items() if count > 1] == []

    site = tmp_path / "site"
    pip("install", "--no-deps", "--target", str(site), *map(str, wheels.values()))
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", SEEN, json.dumps(PACKAGES)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    version = metadata(wheels["packllm"])["Version"]
    for name, (found, file, roots) in json.loads(done.stdout.splitlines()[-1]).items():
        _, module, classes = PACKAGES[name]
        assert found == version
        assert Path(file).is_relative_to(site), "this is the checkout, not what was installed"
        assert roots == [module.partition(".")[0]] * len(classes)


def test_pip_finds_the_rest_by_the_name_alone(wheels):
    """What the thin ones ask for is the main wheel, and what the environment has."""
    told = pip("install", "--dry-run", "--find-links", str(wheels["packllm"].parent), *PACKAGES)
    version = metadata(wheels["packllm"])["Version"]
    (line,) = (line for line in told.splitlines() if line.startswith("Would install "))
    assert {f"{name}-{version}" for name in PACKAGES} <= set(line.split())

"""Families that are not of the package: files that are named, and entry points of installed packages."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner, Result

from shardxform.base import computing
from shardxform.cli import main
from shardxform.cluster.worker import with_families
from shardxform.errors import FamilyError, UnknownFamilyError
from shardxform.model import families, family_files
from shardxform.model.families import HOMES, family_of, family_origin, use

ACME = """\
from dataclasses import replace

from shardxform.model.families.qwen3_moe import FAMILY as KIN

FAMILY = replace(KIN, name="acme_moe", wrappers=(replace(KIN.wrappers[0], model_type="acme_moe"),))
"""


@pytest.fixture(autouse=True)
def known_again() -> Iterator[None]:
    """Leave no family known to other tests."""
    yield
    families._entry_points.cache_clear()
    families._installed.clear()
    use(())


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    """A file that says what a family is."""
    file = tmp_path / "acme.py"
    file.write_text(ACME)
    return file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of a model type that is not built in."""
    config, tensors = tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    return write_checkpoint(tmp_path / "src", tensors, {**config, "model_type": "acme_moe"})


def keep(tmp_path: Path, source: Path) -> Path:
    config = json.loads((source / "config.json").read_text())
    kept = {str(layer): [0, 1, 3, 4] for layer in range(config["num_hidden_layers"])}
    file = tmp_path / "keep.json"
    file.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": kept}))
    return file


def shardxform(*words: object) -> Result:
    return CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_known_to_the_command_that_names_it_and_to_no_other(acme: Path, source: Path) -> None:
    found = shardxform("inspect", source, "--family", acme)
    assert found.exit_code == 0
    assert "acme_moe (Qwen3MoeForCausalLM)" in found.output
    found = shardxform("inspect", source)
    assert found.exit_code == 1
    assert found.output.count("\n") == 1
    assert "model_type 'acme_moe' is not a known family; known: " in found.output
    assert "--family names the file of another one, and `shardxform family draft` makes one" in found.output


@pytest.mark.parametrize(
    "words", [("doctor",), ("manifest", "check", "{keep}"), ("verify", "--quick"), ("inspect",), ("inspect", "--json")]
)
def test_every_command_that_opens_a_checkpoint_takes_it(
    words: tuple[str, ...], acme: Path, source: Path, tmp_path: Path
) -> None:
    words = tuple(word.format(keep=keep(tmp_path, source)) for word in words)
    arguments = [*words, source, "--family", acme]
    found = shardxform(*arguments)
    assert found.exit_code == 0, found.output


def test_an_output_is_bound_to_the_text_and_asks_for_it(acme: Path, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("prune", source, out, "-m", keep(tmp_path, source), "-q", "--family", acme)
    found = shardxform(*command)
    assert found.exit_code == 0, found.output
    assert f"verify {out} --source {source} --family {acme}" in found.output.replace("\n", "")
    inputs = json.loads((out / "shardxform.json").read_text())["inputs"]
    assert inputs["family"] == {"acme.py": hashlib.sha256(ACME.encode()).hexdigest()}

    assert "already complete" in shardxform(*command).output
    assert shardxform("card", out, "--family", acme).exit_code == 0
    assert shardxform("push", out, "acme/moe", "--dry-run", "--family", acme).exit_code == 0
    for words in ((), ("--source", source)):
        asked = shardxform("verify", out, *words)
        assert asked.exit_code == 1
        assert asked.output.startswith(f"shardxform: {out}: made with the family of acme.py, which is not built in; ")
        assert shardxform("verify", out, *words, "--family", acme).exit_code == 0

    acme.write_text(ACME + "# another\n")
    refused = shardxform(*command)
    assert refused.exit_code == 1
    assert "made from other inputs: --family: acme.py: was " in refused.output
    warned = shardxform("verify", out, "--family", acme)
    assert warned.exit_code == 0
    assert "made with another text of acme.py" in warned.output


def test_quantized_outputs_are_bound_too(acme: Path, source: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    found = shardxform("quantize", source, out, "--group-size", 32, "-q", "--family", acme)
    assert found.exit_code == 0, found.output
    assert shardxform("convert", out, plain, "--to", "bf16", "-q", "--family", acme).exit_code == 0
    for each in (out, plain):
        assert list(json.loads((each / "shardxform.json").read_text())["inputs"]["family"]) == ["acme.py"]


def test_what_is_built_in_is_bound_to_no_file() -> None:
    assert family_origin({"model_type": "qwen3_moe"}) == {}
    assert family_origin({"model_type": "none"}) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file or directory"),
        ("", "no FAMILY in it; see docs/adding-a-family.md"),
        ("FAMILY = 3", "FAMILY: expected a Family, found int"),
        ("from shardxform.model.families.mixtral import FAMILY", "model_type 'mixtral' is built in"),
        ("a = 1\n1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
        ("FAMILY = (\n", "line 1: SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "line 1: SystemExit: 3"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('two\\nlines')", "line 1: ValueError: two lines"),
        (ACME.replace("wrappers=(", "symbols={}, wrappers=("), "no symbol '"),
        (ACME.replace("wrappers=(", "conditions={}, wrappers=("), "no condition 'moe'"),
        (ACME.replace("wrappers=(", "count_keys=('experts',), wrappers=("), "count_keys: expected some of "),
        (ACME.replace("wrappers=(", "block=None, wrappers=("), "TypeError: "),
    ],
)
def test_what_is_wrong_with_a_file_is_said_on_one_line(
    text: str | None, said: str, source: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.py"
    if text is not None:
        file.write_text(text)
    found = shardxform("inspect", source, "--family", file)
    assert found.exit_code == 1
    assert found.output.startswith("shardxform: ")
    assert "bad.py" in found.output
    assert said in found.output
    assert found.output.count("\n") == 1


def test_a_file_that_is_no_text_is_refused(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_bytes(b"\xff\xfe\x00")
    assert "bad.py: expected Python in UTF-8" in shardxform("inspect", source, "--family", file).output


def test_two_files_that_claim_one_type_are_refused_by_name(acme: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(ACME)
    found = shardxform("inspect", source, "--family", acme, "--family", tmp_path / "other.py")
    assert found.exit_code == 1
    assert "other.py and acme.py both claim model_type 'acme_moe'" in found.output


# -- entry points ------------------------------------------------------------------------------------------------------


def install(root: Path, name: str, line: str, text: str = ACME) -> None:
    """Have a package found that says what a family is."""
    (root / f"{name}.py").write_text(text)
    info = root / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[shardxform.families]\n{line}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages."""
    root = tmp_path / "site"
    root.mkdir()
    monkeypatch.syspath_prepend(str(root))
    before = set(sys.modules)
    yield root
    for name in set(sys.modules) - before:
        if name.startswith("acme_"):
            del sys.modules[name]


def test_an_entry_point_is_known_and_bound(site: Path, source: Path) -> None:
    install(site, "acme_families", "acme_moe = acme_families:FAMILY")
    assert shardxform("inspect", source).exit_code == 0
    assert family_of({"model_type": "acme_moe"})[0].name == "acme_moe"
    digest = hashlib.sha256(ACME.encode()).hexdigest()
    assert family_origin({"model_type": "acme_moe"}) == {"family": {"acme_families:FAMILY": digest}}
    with pytest.raises(FamilyError, match="known: acme_moe, "):
        family_of({"model_type": "none"})


def test_two_that_claim_one_type_are_refused_by_name(site: Path, source: Path, acme: Path) -> None:
    install(site, "acme_one", "acme_moe = acme_one:FAMILY")
    found = shardxform("inspect", source, "--family", acme)
    assert found.exit_code == 1
    assert "acme.py and acme_one:FAMILY both claim model_type 'acme_moe'" in found.output
    install(site, "acme_two", "acme_moe = acme_two:FAMILY")
    families._entry_points.cache_clear()
    families._installed.clear()
    found = shardxform("inspect", source)
    assert found.exit_code == 1
    for name in ("acme_one:FAMILY of acme_one", "acme_two:FAMILY of acme_two"):
        assert name in found.output
    assert "both claim model_type 'acme_moe'; uninstall one" in found.output


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("acme_moe = acme_none:FAMILY", "ModuleNotFoundError: No module named 'acme_none'"),
        ("acme_moe = acme_bad:NONE", "AttributeError: "),
        ("acme_moe = acme_bad:replace", "FAMILY: expected a Family, found function"),
        ("acme_moe = acme_bad:KIN", "claims model_type 'acme_moe', but no wrapper of it has that"),
    ],
)
def test_what_is_wrong_with_an_entry_point_is_said_on_one_line(line: str, said: str, site: Path, source: Path) -> None:
    install(site, "acme_bad", line)
    found = shardxform("inspect", source)
    assert found.exit_code == 1
    assert said in found.output
    assert f"{line.rpartition(' ')[2]} of acme_bad" in found.output
    assert found.output.count("\n") == 1


def test_nothing_is_looked_for_or_loaded_until_it_is_needed() -> None:
    code = (
        "import sys; from shardxform.model.families import family_of; family_of({'model_type': 'qwen3_moe'});"
        "names = ('importlib.metadata', 'shardxform.model.family_files', 'shardxform.model.families.mixtral');"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- workers -----------------------------------------------------------------------------------------------------------


def name_of(_wanted: Any, config: dict[str, Any]) -> tuple[str, None]:
    """A function of a worker."""
    return family_of(config)[0].name, None


def test_a_worker_knows_what_the_driver_knows(acme: Path) -> None:
    family_files.load_files([acme])
    sent = pickle.dumps(family_files.carried(families.in_use()))
    use(())
    with pytest.raises(UnknownFamilyError):
        family_of({"model_type": "acme_moe"})
    wanted = computing.shared("cpu")
    assert with_families(pickle.loads(sent), name_of, wanted, {"model_type": "acme_moe"}) == ("acme_moe", None)


def test_a_worker_without_the_drivers_package_says_so(site: Path) -> None:
    install(site, "acme_here", "acme_moe = acme_here:FAMILY")
    family_of({"model_type": "acme_moe"})
    (sent,) = family_files.carried(families.in_use())
    wanted, config = computing.shared("cpu"), {"model_type": "acme_moe"}
    assert with_families([sent], name_of, wanted, config) == ("acme_moe", None)
    for other, said in (((sent[0], "0" * 64, "", sent[3]), "another"), ((*sent[:3], ("acme_none",)), "not installed")):
        _, error = with_families([other], name_of, wanted, config)
        assert f"acme_here:FAMILY: {said} here; install the same everywhere" in str(error)


def test_families_are_listed_with_what_works_for_each() -> None:
    result = CliRunner().invoke(main, ["families", "--json"])
    found = {each["model_types"][0]: each for each in json.loads(result.stdout)["families"]}
    assert len(found) == len(set(HOMES.values()))
    assert found["deepseek_v3"]["formats"] == ["auto-round", "gptq", "compressed-tensors"]
    assert found["dbrx"]["not_run"] == "its experts lie in matrices of all, which are not read one at a time"
    lines = CliRunner().invoke(main, ["families"]).stdout.splitlines()
    assert lines[lines.index("mixtral") :][:5] == [
        "mixtral",
        "  releases   Mixtral-8x7B, 8x22B",
        "  experts    one by one",
        "  quantized  compressed-tensors",
        "  run        yes",
    ]


def test_families_of_entry_points_are_listed_and_what_is_wrong_with_others_is_said(site: Path) -> None:
    install(site, "acme_families", "acme_moe = acme_families:FAMILY")
    install(site, "acme_bad", "acme_none = acme_missing:FAMILY")
    install(site, "acme_known", "mixtral = acme_known:FAMILY")
    result = CliRunner().invoke(main, ["families", "--json"])
    every = json.loads(result.stdout)["families"]
    assert [each["origin"] for each in every[-2:]] == ["", "acme_families:FAMILY"]
    assert every[-1] == {
        "model_types": ["acme_moe"],
        "origin": "acme_families:FAMILY",
        "releases": "",
        "experts": "stacked or one by one",
        "mtp": False,
        "formats": ["auto-round", "gptq", "compressed-tensors"],
        "unread": "",
        "not_run": "",
    }
    missing, known = result.stderr.splitlines()
    assert missing.startswith("warning: acme_missing:FAMILY of acme_bad: ModuleNotFoundError: ")
    assert known == "warning: acme_known:FAMILY of acme_known: model_type 'mixtral' is built in; not used"
    lines = CliRunner().invoke(main, ["families"]).stdout.splitlines()
    assert lines[lines.index("acme_moe") + 1] == "  from       acme_families:FAMILY"

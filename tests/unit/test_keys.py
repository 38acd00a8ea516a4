"""Keys in their file, as made, read, changed and damaged."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.errors import ContractError
from serve.gateway.keys import SCOPES, Key, Keyring, add_key, read_keys

HASH = "0" * 64


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys"


def test_a_key_is_told_once_and_only_its_hash_is_kept(file):
    secret = add_key(file, "me", "write")
    assert secret.startswith("simclr_")
    assert len(secret) == 50
    assert file.read_text() == f"me write {hashlib.sha256(secret.encode()).hexdigest()}\n"
    assert Keyring(file).find(secret) == Key("me", "write", hashlib.sha256(secret.encode()).hexdigest())
    for wrong in ("", secret[:-1], secret + "x", secret.upper(), hashlib.sha256(secret.encode()).hexdigest(), "\udcff"):
        assert Keyring(file).find(wrong) is None


def test_scopes_include_those_before():
    allowed = {scope: [wanted for wanted in SCOPES if Key("a", scope, HASH).allows(wanted)] for scope in SCOPES}
    assert allowed == {"read": ["read"], "write": ["read", "write"], "admin": ["read", "write", "admin"]}


def test_lines_of_others_stay(file):
    file.write_text(f"# mine\n\n  old   admin {HASH}")
    add_key(file, "new", "read")
    assert file.read_text().startswith(f"# mine\n\n  old   admin {HASH}\nnew read ")
    assert [key.name for key in read_keys(file)] == ["old", "new"]


def test_keys_that_are_made_together_are_all_kept(file):
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda number: add_key(file, f"k{number}", "read"), range(8)))
    assert {Keyring(file).find(secret).name for secret in secrets} == {f"k{number}" for number in range(8)}


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "#a", "é", "x" * 65])
def test_names_that_cannot_stand_in_a_line(file, name):
    with pytest.raises(ContractError, match="wanted 1 to 64 letters"):
        add_key(file, name, "read")
    assert not file.exists()


def test_a_name_is_given_once(file):
    add_key(file, "me", "read")
    before = file.read_text()
    with pytest.raises(ContractError, match="has a key named me"):
        add_key(file, "me", "admin")
    assert file.read_text() == before


@pytest.mark.parametrize(
    "words",
    [
        "me",
        "me read",
        f"me root {HASH}",
        f"me read {HASH} more",
        f"me read {HASH[1:]}",
        f"me read {'G' * 64}",
        f"ok read {HASH}",
    ],
)
def test_a_line_that_is_no_key(file, words):
    file.write_text(f"ok read {HASH}\n{words}\n")
    with pytest.raises(ContractError, match=r"keys, line 2: not a key; wanted `NAME read\|write\|admin SHA256`"):
        Keyring(file)


def test_a_file_that_is_not_there_or_no_text(file):
    with pytest.raises(ContractError, match=r"No such file.*simclr key NAME"):
        Keyring(file)
    file.write_bytes(b"\xff\xfe")
    for use in (Keyring, lambda path: add_key(path, "me", "read")):
        with pytest.raises(ContractError, match="not text in UTF-8"):
            use(file)


def test_a_change_counts_at_once(file):
    first = add_key(file, "first", "read")
    keys = Keyring(file)
    second = add_key(file, "second", "read")
    assert keys.find(second).name == "second"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "first" not in line))
    assert keys.find(first) is None
    assert keys.find(second).name == "second"


def test_nobody_is_let_in_from_a_file_that_cannot_be_read(file, caplog):
    secret = add_key(file, "me", "read")
    keys, good = Keyring(file), file.read_text()
    file.unlink()
    for _ in range(2):
        with pytest.raises(ContractError, match="No such file"):
            keys.find(secret)
    assert len(caplog.records) == 1, "it is not told again for every request"
    file.write_text("nonsense\n")
    with pytest.raises(ContractError, match="line 1"):
        keys.find(secret)
    file.write_text(good)
    assert keys.find(secret).name == "me"

"""Another version of an encoder into service, or the former one back: step by step, so that no request falls between.

All models of one publication have the same version number, and the ensembles name the version of each of their steps. So the
new models can stand beside the old ones until the ensembles have changed over, and a process that is killed at any point
leaves a repository that serves the old publication or the new one, whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import text_format  # type: ignore[import-untyped]

from serve.errors import ContractError
from serve.files import atomic_path
from serve.versions import CONFIG_NAME, read_config, served_version, versions

STEPS, ENSEMBLES = ("preprocess", "preprocess_dali", "encoder", "head"), ("embed", "embed_dali", "classify")


def next_version(repository: Path, name: str) -> int:
    """One more than any folder of this encoder's models has."""
    return 1 + max((number for role in STEPS + ENSEMBLES for number in versions(repository / f"{name}_{role}")), default=0)


def change_over(repository: Path, name: str, version: int) -> Iterator[list[str]]:
    """Put the publication `version` into service; after each yield, the models that a running server must load anew.

    1. what the ensembles are made of: old and new side by side; 2. the ensembles; 3. what they are made of: new alone.
    Models that `version` lacks, such as a head, go at the end: no server starts with an ensemble whose steps are gone.
    """
    folders = {role: repository / f"{name}_{role}" for role in STEPS + ENSEMBLES}
    new = {role: read_config(folder / str(version) / CONFIG_NAME) for role, folder in folders.items() if _has(folder, version)}
    old = {role: read_config(folder / CONFIG_NAME) for role, folder in folders.items() if (folder / CONFIG_NAME).exists()}
    for role in set(STEPS) & new.keys():
        former = served_version(folders[role]) if role in old else None
        if former is None or not _same_tensors(old[role], new[role]):  # one configuration cannot describe both
            _write(folders[role], new[role], [version])
        else:
            _write(folders[role], new[role] if version > former else old[role], sorted({former, version}))
    yield [f"{name}_{role}" for role in STEPS if role in new]
    for role in set(ENSEMBLES) & new.keys():
        _write(folders[role], new[role], [version])
    yield [f"{name}_{role}" for role in ENSEMBLES if role in new]
    for role in set(STEPS) & new.keys():
        _write(folders[role], new[role], [version])
    yield [f"{name}_{role}" for role in STEPS if role in new]
    for role in ENSEMBLES + STEPS:  # ensembles go before the models they need
        if role not in new:
            shutil.rmtree(folders[role], ignore_errors=True)


def former_version(repository: Path, name: str) -> int:
    """The publication before the one that is served. Raises: ContractError if there is none."""
    model = repository / f"{name}_encoder"
    now = served_version(model)
    if now is None:
        raise ContractError(f"{repository}: holds no encoder {name}; look at --repository and --name")
    earlier = [number for number in versions(model) if number < now and _has(model, number)]
    if not earlier:
        raise ContractError(f"{repository}: {name} serves version {now} and no earlier one is there to go back to")
    return max(earlier)


def roll_back(repository: Path, name: str, changed: Callable[[list[str]], None] = lambda _: None) -> int:
    """Serve the publication before; returns its version. The newer one stays, but for models that the former one lacks.

    Raises: ContractError if there is none before.
    """
    version = former_version(repository, name)
    for models in change_over(repository, name, version):
        changed(models)
    return version


def obsolete(model: Path, keep: int) -> Sequence[Path]:
    """Version folders beyond the newest `keep` that are not served."""
    named = set(read_config(model / CONFIG_NAME).version_policy.specific.versions)
    return [model / str(number) for number in versions(model)[:-keep] if number not in named]


def _has(model: Path, version: int) -> bool:
    return (model / str(version) / CONFIG_NAME).is_file()


def _same_tensors(a: Any, b: Any) -> bool:  # noqa: ANN401
    facts = [[(tensor.name, tensor.data_type, *tensor.dims) for tensor in (*one.input, *one.output)] for one in (a, b)]
    return facts[0] == facts[1]


def _write(model: Path, config: Any, served: list[int]) -> None:  # noqa: ANN401
    changed = type(config)()
    changed.CopyFrom(config)
    changed.version_policy.Clear()
    changed.version_policy.specific.versions.extend(served)
    with atomic_path(model / CONFIG_NAME) as temporary:
        temporary.write_text(text_format.MessageToString(changed, as_utf8=True), encoding="utf-8")

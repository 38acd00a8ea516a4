"""MATLAB's .mat files, read without running anything that stands in them."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serve.datasets.tree import Tree
from serve.errors import SourceError


def variables(tree: Tree, member: str, *names: str) -> list[NDArray[Any]]:
    """Variables of a .mat file of version 5 to 7, without the dimensions of size 1. Raises: SourceError."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # slow to import, and few sources have such files

    try:
        content = loadmat(BytesIO(tree.read(member)), variable_names=names)
        return [np.atleast_1d(np.squeeze(content[name])) for name in names]
    except NotImplementedError as error:
        raise SourceError(f"{tree.source(member)}: version 7.3 (HDF5) is not read here; save it in MATLAB with -v7") from error
    except KeyError as error:
        raise SourceError(f"{tree.source(member)}: holds no {error.args[0]}, wanted {', '.join(names)}") from error
    except SourceError:
        raise
    except Exception as error:  # scipy raises a dozen unrelated types for damaged files
        raise SourceError(f"{tree.source(member)}: not a readable .mat file ({error}); download it again") from error


def whole_numbers(values: NDArray[Any], what: str) -> NDArray[np.int64]:
    """As int64, also where MATLAB has kept them as uint16, which would wrap below zero. Raises: SourceError."""
    if values.dtype.kind not in "uif" or (values.dtype.kind == "f" and not np.array_equal(values, np.floor(values))):
        raise SourceError(f"{what}: holds {values.dtype} values, wanted whole numbers; download it again")
    return values.astype(np.int64)

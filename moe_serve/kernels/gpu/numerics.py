"""The two promises that kernels on a GPU can be built for."""

from __future__ import annotations

from typing import Literal, get_args

# exact: a row's bits do not depend on other rows; fast: tiles may be chosen by the number of rows
Numerics = Literal["exact", "fast"]
NUMERICS: tuple[Numerics, ...] = get_args(Numerics)

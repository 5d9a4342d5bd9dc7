"""Watch that calls meant for a GPU neither wait for it nor send it anything but launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

# what a CUDA graph may hold, or what is done on the host alone; their names without overloads
_ALLOWED = {
    f"aten.{name}"
    for name in ("empty", "as_strided", "view", "detach", "slice", "select", "index", "clone")
}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func).rpartition(".")[0]
        is_cast = name == "aten._to_copy" and kwargs.get("device") is None
        assert is_cast or name in _ALLOWED, f"{func} may wait for the GPU, or copy to it"
        return func(*args, **kwargs)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail where a value on the device is asked for; what Triton's interpreter does is not seen."""
    run = GridExecutor.__call__

    def unseen(executor: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(executor, *args, **kwargs)

    with mock.patch.object(GridExecutor, "__call__", unseen), _Watch():  # type: ignore[no-untyped-call]
        yield

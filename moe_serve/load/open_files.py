"""Room for as many connections as a load needs."""

from __future__ import annotations

import resource

_SPARE = 64  # files that are none of its connections


def allow_open_files(num_connections: int | None) -> None:
    """Raise this process's soft limit on open files, up to the hard one; None: as far as it goes.

    Where that is not enough, connections fail, and say why.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if num_connections is None else num_connections + _SPARE
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and (wanted == resource.RLIM_INFINITY or wanted > soft):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

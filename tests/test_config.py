"""Options: where they come from, which source wins, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_serve.config import EngineConfig, KVConfig, option_fields, resolve_options
from moe_serve.errors import ConfigError
from moe_serve.server.options import ServerConfig


def test_names_are_unique_in_the_whole_tree() -> None:
    names = [leaf.name for leaf in option_fields()]
    assert len(names) == len(set(names))


def test_leaves_land_in_their_branches() -> None:
    config = EngineConfig.from_options({"block_size": 4, "max_num_seqs": 7, "model": "x"})
    assert (config.kv.block_size, config.scheduler.max_num_seqs) == (4, 7)
    assert config.weights.model == "x"
    assert config.runtime == EngineConfig().runtime


def test_flag_before_environment_before_file_before_default(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("block_size = 1\nmax_num_seqs = 1\nseed = 1\n")
    environ = {"MOE_SERVE_BLOCK_SIZE": "2", "MOE_SERVE_MAX_NUM_SEQS": "2", "HOME": "/"}
    options = resolve_options({"block_size": 3, "threads": None}, environ, file)
    assert options == {"block_size": 3, "max_num_seqs": 2, "seed": 1}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"blok_size": 4}, "no option 'blok_size'; did you mean 'block_size'?"),
        ({"block_size": 0}, "block_size is 0; it must be from 1 to 64"),
        ({"block_size": 65}, "block_size is 65; it must be from 1 to 64"),
        ({"block_size": "16"}, "block_size is '16'; it must be of type int"),
        ({"block_size": True}, "block_size is True; it must be of type int"),
        ({"block_size": None}, "block_size is None; it must be of type int"),
        ({"enable_prefix_caching": 1}, "must be of type bool"),
        ({"kv_cache_gb": -1.0}, "kv_cache_gb is -1.0; it must be above 0"),
        ({"kv_cache_gb": 1, "num_kv_blocks": 5}, "give one"),
        ({"dtype": "float3"}, "did you mean 'float32'?"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be from 1 to 1048576"),
        ({"threads": 0}, "threads is 0; it must be from 1 to 4096"),
        ({"threads": 10**6}, "threads is 1000000; it must be from 1 to 4096"),
        ({"kv_cache_gb": float("nan")}, "kv_cache_gb is nan; it must be a finite number"),
        ({"kv_cache_gb": float("inf")}, "kv_cache_gb is inf; it must be a finite number"),
        ({"kv_cache_gb": 10**400}, "it must be above 0, and at most 1048576"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be from"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options(options)
    assert says in str(caught.value)


def test_every_whole_number_has_an_upper_bound() -> None:
    names = [leaf.name for leaf in option_fields() if leaf.kind is int]
    assert "num_kv_blocks" in names
    for name in names:
        with pytest.raises(ConfigError, match=f"{name} is {10**30}; it must be from .* to "):
            EngineConfig.from_options({name: 10**30})


def test_numbers_that_are_not_finite_are_refused_without_from_options() -> None:
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ConfigError, match="kv_cache_gb is"):
            KVConfig(kv_cache_gb=value)


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"MOE_SERVE_BLOK_SIZE": "4"}, "MOE_SERVE_BLOK_SIZE: no such option; did you mean"),
        ({"MOE_SERVE_BLOCK_SIZE": "four"}, "MOE_SERVE_BLOCK_SIZE is 'four'"),
        ({"MOE_SERVE_ENABLE_PREFIX_CACHING": "maybe"}, "use 1 or 0"),
    ],
    ids=str,
)
def test_a_wrong_variable_is_named(environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_options({}, environ)
    assert says in str(caught.value)


def test_what_kubernetes_sets_for_a_service_of_our_name_is_passed_over() -> None:
    address = "tcp://10.0.0.5:8000"
    environ = {
        "MOE_SERVE_SERVICE_HOST": "10.0.0.5", "MOE_SERVE_SERVICE_PORT": "8000",
        "MOE_SERVE_SERVICE_PORT_HTTP": "8000", "MOE_SERVE_PORT": address,
        "MOE_SERVE_PORT_8000_TCP": address, "MOE_SERVE_PORT_8000_TCP_ADDR": "10.0.0.5",
        "MOE_SERVE_PORT_8000_TCP_PORT": "8000", "MOE_SERVE_PORT_8000_TCP_PROTO": "tcp",
        "MOE_SERVE_THREADS": "2",
    }  # fmt: skip
    assert resolve_options({}, environ, trees=(EngineConfig, ServerConfig)) == {"threads": 2}
    trees = (EngineConfig, ServerConfig)
    with pytest.raises(ConfigError, match="MOE_SERVE_PORT is 'x'"):
        resolve_options({}, {"MOE_SERVE_PORT": "x"}, trees=trees)
    with pytest.raises(ConfigError, match="MOE_SERVE_SERVICES: no such option"):
        resolve_options({}, {"MOE_SERVE_SERVICES": "x"}, trees=trees)


@pytest.mark.parametrize("keys", ["", ",", "a,,b", " "])
def test_a_key_that_is_empty_is_no_key(keys: str) -> None:
    with pytest.raises(ConfigError, match="empty key"):
        ServerConfig.from_options({"api_key": keys})


def test_a_variable_that_a_flag_overrides_is_not_read() -> None:
    assert resolve_options({"block_size": 3}, {"MOE_SERVE_BLOCK_SIZE": "four"}) == {"block_size": 3}


def test_a_name_that_is_none_in_a_file_is_named_with_it(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("blok_size = 1")
    with pytest.raises(ConfigError, match=r"engine\.toml: no option 'blok_size'; did you mean"):
        resolve_options({}, {}, file)


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    with pytest.raises(ConfigError, match=r"engine\.toml: cannot be read"):
        resolve_options({}, {}, file)
    file.write_text("block_size == 3")
    with pytest.raises(ConfigError, match=r"engine\.toml: not TOML"):
        resolve_options({}, {}, file)

"""Settings that are wrong are named at start."""

import pytest
from pydantic import ValidationError

from serve_app.config import LMCacheSettings, RouterSettings
from serve_app.errors import ConfigError


def test_lmcache_is_off_unless_asked_for() -> None:
    assert RouterSettings(model="m").lmcache is None
    settings = RouterSettings(model="m", lmcache={"size_gb": 2, "chunk_size": 64})  # type: ignore[arg-type]
    assert settings.lmcache is not None
    assert (settings.lmcache.size_gb, settings.lmcache.attach) == (2, "")
    assert RouterSettings(**settings.model_dump(mode="json")) == settings  # as Ray hands it on


def test_a_chunk_is_a_whole_number_of_blocks() -> None:
    LMCacheSettings(chunk_size=64).check_block_size(32)
    with pytest.raises(ConfigError, match=r"lmcache.chunk_size 100 is no multiple .* block size 32: use 96"):
        LMCacheSettings(chunk_size=100).check_block_size(32)
    with pytest.raises(ConfigError, match="use 128"):
        LMCacheSettings(chunk_size=64).check_block_size(128)
    with pytest.raises(ConfigError, match=r"LMCache server at kv-host:5555 256 is no multiple"):
        LMCacheSettings(attach="kv-host:5555").check_block_size(48, 256)


@pytest.mark.parametrize("address", ["kv-host", "tcp://kv-host:5555", "kv-host:port", ":5555"])
def test_an_address_to_attach_to_is_host_and_port(address: str) -> None:
    with pytest.raises(ValidationError, match="attach"):
        LMCacheSettings(attach=address)

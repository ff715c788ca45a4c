"""A Redis server of the tests' own."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from conftest import free_port


@dataclass(frozen=True)
class RedisServer:
    """A running server that asks for a password."""

    process: "subprocess.Popen[bytes]"
    url: str


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all tests; whoever uses it empties it first."""
    import redis

    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    port = free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", "s3cret"]
    server = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("redis"), stdout=subprocess.DEVNULL)
    url = f"redis://:s3cret@127.0.0.1:{port}/0"
    for _ in range(200):
        try:
            redis.Redis.from_url(url).ping()
            break
        except redis.RedisError:
            time.sleep(0.05)
    else:
        pytest.fail("the server did not start")
    yield RedisServer(server, url)
    server.terminate()
    server.wait(10)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """An empty server's address."""
    import redis

    redis.Redis.from_url(redis_server.url).flushdb()
    return redis_server.url

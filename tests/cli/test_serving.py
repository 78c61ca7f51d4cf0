"""`engraphy table serve` and `ask`: where a server listens, what it says, and how it ends."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from typer.testing import CliRunner

from engraphy.cli import app
from engraphy.cli.serving import layers_of, parse_part
from engraphy.errors import ConfigError
from engraphy.store import open_store, publish_pool
from engraphy.store.server import Part
from tests.tools.row_servers import SECRET, TLS, ServerProcess, free_port, served
from tests.tools.store_builders import LAYER, sealed


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "table"
    return path, sealed(path)


def run(*words):
    return CliRunner().invoke(app, ["table", *map(str, words)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "found no TLS and no token"),
        (("--host", "::"), "found no TLS and no token"),
        (("--host", "a.example", "--insecure"), "give both --insecure and --trust-network"),
        (("--host", "10.0.0.1", "--trust-network"), "give both"),
        (("--host", "0.0.0.0", "--token-file", "x"), "found no TLS;"),
        (("--host", "0.0.0.0", "--cert", "x", "--key", "y"), "found no token;"),
        (("--cert", "x"), "--cert and --key: expected both"),
        (("--metrics", "0.0.0.0:1"), "expected an address of this machine"),
        (("--metrics", "x"), "expected HOST:PORT"),
        (("--part", "3/2"), "--part: expected such as 2/3"),
        (("--part", "1/2", "--fleet", "a:1"), "expected servers of 2 parts"),
        (("--fleet", "a"), "expected HOST:PORT"),
        (("--token-file", "/nowhere/x"), "token file /nowhere/x: expected"),
        (("--layers", "2"), "2"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_it_listens(table, options, message):
    result = run("serve", table[0], "--port", 0, *options)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_a_table_that_is_not_there_is_refused(tmp_path):
    result = run("serve", tmp_path)
    assert result.exit_code == 1 and "found no file" in result.output


def test_a_pool_is_served_with_all_its_layers(table, tmp_path):
    publish_pool(table[0], tmp_path / "pool")
    with ServerProcess(f"pool:{tmp_path / 'pool'}") as server:
        assert server.said[0].endswith("layers [1, 3]\n")
        store = open_store(f"remote:{server.address}", layer=LAYER)
        np.testing.assert_array_equal(store.gather(np.arange(9)), table[1][:9])
        store.close()


def test_a_folder_that_is_a_pool_has_the_layers_of_its_table(table, tmp_path):
    url = f"pool:{tmp_path / 'folder'}?populate=0&from={table[0]}"
    assert layers_of(url) == (1, 3)  # it is not there yet
    open_store(url, layer=LAYER).close()
    assert layers_of(url) == layers_of(f"pool:{tmp_path / 'folder'}") == (1, 3)


def test_what_is_no_pool_is_refused(tmp_path):
    (tmp_path / "region").write_bytes(b"x")
    result = run("serve", f"pool:{tmp_path / 'region'}", "--port", 0)
    assert result.exit_code == 1 and "expected a pool, which begins" in result.output
    result = run("serve", f"pool:{tmp_path / 'nothing'}", "--port", 0)
    assert result.exit_code == 1 and "found no file" in result.output


def test_parts_and_fleets_are_read():
    assert parse_part("1/1", None) == Part()
    assert parse_part("2/3", None) == Part(1, 3)
    fleet = (("a:1", "b:2"), ("[::1]:3",))
    assert parse_part("1/2", "a:1,b:2/[::1]:3") == Part(0, 2, fleet)
    covered = [Part(index, 3).rows(100) for index in range(3)]
    assert covered == [(0, 33), (33, 66), (66, 100)]
    for text in ("", "1", "0/1", "a/b", "1/0", "1/10001", "-1/2"):
        with pytest.raises(ConfigError, match="--part"):
            parse_part(text, None)


def test_ask_prints_health_and_metrics_and_says_what_is_wrong(table):
    with served(table[0]) as server:
        url = f"remote:127.0.0.1:{server.port}"
        address, _, health = run("ask", url).output.partition(" ")
        assert address == f"127.0.0.1:{server.port}"
        facts = json.loads(health)
        assert facts["state"] == "serving" and facts["layers"] == {"1": [0, 120], "3": [0, 184]}
        assert run("ask", url, "metrics").output.startswith("# HELP engraphy_store_info")
        wrong = run("ask", url, "stop")
        assert wrong.exit_code == 1 and "found 'stop'" in wrong.output
        assert run("ask", "file:x").exit_code == 1
        assert json.loads(run("ask", url, "drain").output.partition(" ")[2])["state"] == "draining"
    gone = run("ask", url)
    assert gone.exit_code == 1 and "Unavailable" in gone.output


def test_one_server_with_tls_a_token_and_metrics_from_start_to_drain(table, tmp_path):
    token = tmp_path / "token"
    token.write_text(SECRET)
    http = free_port()
    options = ["--cert", str(TLS / "server.pem"), "--key", str(TLS / "server.key")]
    options += ["--token-file", str(token), "--metrics", f"127.0.0.1:{http}"]
    with ServerProcess(table[0], *options) as server:
        assert server.said[-1] == f"listening on grpc+tls://127.0.0.1:{server.port}\n"
        assert len(server.said) == 2  # nothing of a missing token
        url = f"remote:{server.address}?tls=1&ca={TLS / 'ca.pem'}&token_file={token}"
        store = open_store(url, layer=LAYER)
        np.testing.assert_array_equal(store.gather(np.arange(7)), table[1][:7])
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/metrics") as answer:
            assert "engraphy_server_streams 1" in answer.read().decode()
        with urllib.request.urlopen(f"http://127.0.0.1:{http}/health") as answer:
            assert json.load(answer)["state"] == "serving"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{http}/other")
        server.drain()  # although the client holds a stream
        assert server.process.returncode == 0 and server.said[-1] == "drained\n"
        assert SECRET not in "".join(server.said)
        store.close()

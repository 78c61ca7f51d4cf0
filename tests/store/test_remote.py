"""Rows of other hosts: the suite of every store over servers of rows, identities, tokens, TLS."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from engraphy.errors import (
    ConfigError,
    DigestMismatch,
    EngraphyError,
    InputError,
    RowOutOfRange,
    StoreError,
)
from engraphy.memory import Prefetcher, metrics
from engraphy.store import CacheStore, RamStore, ReloadableStore, open_store
from engraphy.store import remote_wire as wire
from engraphy.store.remote import RemoteStore
from engraphy.store.remote_arrow import flight, pa
from engraphy.store.remote_location import ask_server
from engraphy.store.remote_options import RemoteOptions
from engraphy.store.server import Part, RowServer
from engraphy.store.testing import ReadOnlyStoreTests, in_children
from engraphy.table import Table
from tests.tools.row_servers import SECRET, TLS, free_port, served
from tests.tools.store_builders import LAYER, create, fmt_of, sealed, some_ids

KINDS = ("one server", "two parts", "two parts of two, TLS and a token", "behind a cache")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A sealed table, its path, and the rows of layer 3."""
    path = tmp_path_factory.mktemp("remote") / "table"
    return path, sealed(path)


@pytest.fixture(scope="module")
def token_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(SECRET + "\n")
    return path


@pytest.fixture(scope="module")
def secured(token_file):
    """The options of a URL for a server with TLS and a token."""
    return f"?tls=1&ca={TLS / 'ca.pem'}&token_file={token_file}"


@pytest.fixture(scope="module")
def urls(table, token_file, secured):
    """The URL of each kind of remote store. All servers run as long as the module."""
    path, _ = table
    halves = [Part(0, 2), Part(1, 2)]
    with (
        served(path) as whole,
        served(path, halves[0]) as first,
        served(path, halves[1]) as second,
        served(path, halves[0], token_file, "server.pem") as safe,
        served(path, halves[0], token_file, "server.pem") as replica,
        served(path, halves[1], token_file, "server.pem") as rest,
    ):
        hosts = [
            f"remote:127.0.0.1:{whole.port}",
            f"remote:127.0.0.1:{first.port},127.0.0.1:{second.port}",
            f"remote:localhost:{rest.port},127.0.0.1:{safe.port},127.0.0.1:{replica.port}{secured}",
            f"remote:127.0.0.1:{whole.port}?cache=5000",
        ]
        yield dict(zip(KINDS, hosts, strict=True))


class TestRemoteStores(ReadOnlyStoreTests):
    forks = False  # gRPC does not survive a fork

    @pytest.fixture(autouse=True, params=KINDS)
    def url(self, request, urls, table):
        self.url, self.expected = urls[request.param], table[1]

    def make_filled(self, folder):
        return open_store(self.url, layer=LAYER), self.expected


# What it is.


def test_info_and_repr_name_the_servers_and_the_identities(table, urls):
    path, expected = table
    store = open_store(urls["two parts"], layer=LAYER)
    known = Table.open(path)
    info = store.info
    assert (info.kind, info.rows, info.row_bytes) == ("remote", *expected.shape)
    assert (info.table_id, info.address_digest) == (known.table_id, known.address_digest)
    assert (info.format, info.layer, info.writable) == (known.fmt, LAYER, False)
    assert info.reads == "Flight, 2 servers" and not store.in_memory
    ranges = [(server.first, server.last) for server in store.servers]
    assert ranges == [(0, len(expected) // 2), (len(expected) // 2, len(expected))]
    store.close()


def test_a_request_is_cut_into_several_that_are_in_flight_together(table, monkeypatch):
    monkeypatch.setattr(wire, "MOST_BYTES", 34 * 100)
    with served(table[0]) as server:
        store = open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)
        ids = some_ids(len(table[1]), 2345)
        np.testing.assert_array_equal(store.gather(ids), table[1][ids])
        assert store.stats.reads == 24 and store.stats.read_bytes == 2345 * 34
        store.close()


def test_servers_tell_the_fleet_and_one_address_is_enough(table):
    path, expected = table
    ports = [free_port(), free_port(), free_port()]
    names = [f"127.0.0.1:{port}" for port in ports]
    fleet = ((names[0], names[1]), (names[2],))
    with (
        served(path, Part(0, 2, fleet), port=ports[0]),
        served(path, Part(0, 2, fleet), port=ports[1]),
        served(path, Part(1, 2, fleet), port=ports[2]),
    ):
        store = open_store(f"remote:{names[2]}", layer=LAYER)
        assert [server.address for server in store.servers] == [f"grpc://{name}" for name in names]
        for _ in range(4):
            np.testing.assert_array_equal(store.gather(np.arange(len(expected))), expected)
        assert all(server.requests for server in store.servers)  # replicas take turns
        store.close()


def test_a_memory_reads_ahead_and_counts_what_servers_gave(table, urls):
    path, expected = table
    fmt = Table.open(path).fmt
    store = open_store(urls["behind a cache"], layer=LAYER)
    assert isinstance(store, CacheStore)
    with Prefetcher({LAYER: (store, fmt)}) as reader:
        ids = some_ids(len(expected), 24).reshape(2, 3, 4)
        rows = reader.submit({LAYER: ids}).wait()[LAYER]
        wanted = fmt.decode(expected[ids.reshape(-1)]).reshape(2, 3, -1)
        np.testing.assert_array_equal(rows.float().numpy(), wanted)
    text = metrics.prometheus({LAYER: store})
    assert 'store="remote"' in text and 'kind="remote"' in text
    store.close()


def test_a_reload_changes_to_another_table_on_other_servers(table, urls, tmp_path):
    other = create(tmp_path / "other", fmt_of("int8"))
    rows = np.full((other.rows(LAYER), other.row_bytes), 7, np.uint8)
    other.write_rows(LAYER, 0, rows)
    other.seal()
    store = ReloadableStore(open_store(urls["one server"], layer=LAYER))
    with served(tmp_path / "other") as server:
        np.testing.assert_array_equal(store.gather(np.array([5])), table[1][[5]])
        store.reload(open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER))
        np.testing.assert_array_equal(store.gather(np.array([5])), rows[[5]])
        store.close()


def test_a_forked_child_is_told_to_open_the_store_in_a_process_of_its_own(urls):
    store = open_store(urls["one server"], layer=LAYER)

    def check():
        for use in (
            lambda: store.gather(np.array([1])),
            lambda: open_store(urls["one server"], layer=LAYER),
        ):
            with pytest.raises(StoreError, match="forked child .*'spawn'"):
                use()

    in_children([check])
    store.close()


# URLs.


@pytest.mark.parametrize(
    "url",
    [
        "remote:",
        "remote:host",
        "remote:host:",
        "remote:host:99999",
        "remote:ho st:1",
        "remote:host:1,host:1",
        "remote:host:1?tls=2",
        "remote:host:1?token=secret",
        "remote:host:1?deadline=0",
        "remote:host:1?deadline=x",
        "remote:host:1?ca=x",
        "remote:host:1?token_file=x",
        "remote:127.0.0.1:1,host:1?token_file=x",
        "remote:127.0.0.1:1?token_file=/nowhere/x",
        "remote:127.0.0.1:1?tls=1&ca=/nowhere/x",
        "remote:127.0.0.1:1?cache=2GB",
    ],
)
def test_urls_that_cannot_be_meant_are_refused(url):
    with pytest.raises(ConfigError, match="expected"):
        open_store(url, layer=LAYER)


def test_a_remote_store_takes_no_sizes_and_no_mode_to_write():
    for arguments in (dict(layer=None), dict(mode="w"), dict(rows=3), dict(row_bytes=3)):
        with pytest.raises(ConfigError, match="expected a layer, mode 'r'"):
            open_store("remote:127.0.0.1:1", **{"layer": LAYER, **arguments})


def test_nobody_there_is_a_store_error_that_names_the_address():
    port = free_port()
    with pytest.raises(StoreError, match=f"found none: grpc://127.0.0.1:{port}: .*Unavailable"):
        open_store(f"remote:127.0.0.1:{port}", layer=LAYER)


def test_a_missing_pyarrow_names_the_extra(monkeypatch):
    import builtins
    import sys

    real = builtins.__import__

    def without(name, *arguments):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments)

    for name in [name for name in sys.modules if name.startswith("engraphy.store.remote")]:
        if name != "engraphy.store.remote_options":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EngraphyError, match=r'pip install "engraphy\[remote\]"'):
        open_store("remote:127.0.0.1:1", layer=LAYER)


# Identities.


def test_a_layer_that_is_not_served_is_refused(urls):
    with pytest.raises(ConfigError, match=r"layer: expected one of \[1, 3\], found '2'"):
        open_store(urls["one server"], layer=2)


def test_servers_of_different_tables_are_not_read_together(table, urls, tmp_path):
    sealed(tmp_path / "other")
    with served(tmp_path / "other") as server:
        url = f"{urls['one server']},127.0.0.1:{server.port}"
        with pytest.raises(DigestMismatch, match="expected the table of the other servers"):
            open_store(url, layer=LAYER)


def test_rows_that_no_server_has_are_named(table):
    with served(table[0], Part(1, 3)) as server:
        with pytest.raises(StoreError, match=r"servers of all 184 rows, .* found \[\(61, 122\)\]"):
            open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)


def test_a_server_that_was_started_anew_with_another_table_is_not_read(table, tmp_path):
    sealed(tmp_path / "other")
    with served(table[0]) as server:
        port = server.port
        store = open_store(f"remote:127.0.0.1:{port}?deadline=5", layer=LAYER)
        np.testing.assert_array_equal(store.gather(np.arange(9)), table[1][:9])
    known = [Table.open(path).table_id for path in (table[0], tmp_path / "other")]
    with served(tmp_path / "other", port=port):
        with pytest.raises(DigestMismatch, match=f"expected table {known[0]}, found .*{known[1]}"):
            store.gather(np.arange(9))
    store.close()


def test_another_flight_service_is_not_taken_for_a_server_of_rows(table):
    class Other(flight.FlightServerBase):
        def get_flight_info(self, context, descriptor):
            return flight.FlightInfo(pa.schema([]), descriptor, [], 0, 0)

    other = Other("grpc://127.0.0.1:0")
    with pytest.raises(StoreError, match="expected a server of rows, found another Flight"):
        open_store(f"remote:127.0.0.1:{other.port}", layer=LAYER)
    other.shutdown()


# What a client of another make may send.


@pytest.fixture
def exchange(table):
    """A function that sends a batch to a server, and gives the answer's rows."""
    with served(table[0]) as server:
        client = flight.FlightClient(f"grpc://127.0.0.1:{server.port}")

        def send(batch, path=(wire.ANY_TABLE, str(LAYER))):
            writer, reader = client.do_exchange(flight.FlightDescriptor.for_path(*path))
            writer.begin(batch.schema)
            writer.write_batch(batch)
            try:
                return reader.read_chunk().data
            finally:
                reader.cancel()

        yield send
        client.close()


def test_what_a_foreign_client_sends_wrongly_is_named(exchange):
    ids = wire.id_batch(np.arange(4))
    assert len(exchange(ids)) == 4
    assert len(exchange(wire.id_batch(np.arange(0)))) == 0
    empty = pa.record_batch({"id": pa.array([1, None], pa.int64())})
    cases = [
        (wire.id_batch(np.array([3, 184])), (), "row id 184.*: expected 0 to 183"),
        (wire.id_batch(np.array([-1])), (), "row id -1.*: expected 0 to 183"),
        (wire.id_batch(np.zeros(9000, np.int64)), (), "at most 8192 row ids, found 9000"),
        (pa.record_batch({"id": pa.array([1, 2], pa.int32())}), (), "expected row ids of int64"),
        (empty, (), "expected row ids of int64"),
        (ids, (("0" * 32, "3"),), "expected table 0{32}, found table"),
        (ids, (("any", "2"),), "layer: expected one of"),
        (ids, (("any",),), "expected a path"),
    ]
    for batch, path, message in cases:
        with pytest.raises(flight.FlightServerError, match=message):
            exchange(batch, *path)


def test_an_error_of_the_servers_store_has_its_own_name_at_the_client():
    class Broken(RamStore):
        def _gather(self, ids_N, out_NR):
            raise RowOutOfRange("broken in the server")

        def _begin_read(self):
            return None, None

    with served({LAYER: Broken(10, 8, LAYER)}) as server:
        store = open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)
        with pytest.raises(RowOutOfRange, match=r"grpc://127.0.0.1:\d+: broken in the server"):
            store.gather(np.arange(3))
        assert store.servers[0].failures == 1
        store.close()


# Tokens and TLS.


def test_calls_without_the_token_are_refused_and_no_message_shows_a_token(
    table, token_file, tmp_path, caplog
):
    wrong = tmp_path / "wrong"
    wrong.write_text("another-token")
    seen = []
    with served(table[0], token_file=token_file) as server, caplog.at_level(logging.DEBUG):
        url = f"remote:127.0.0.1:{server.port}"
        for options, message in (("", "found none"), (f"?token_file={wrong}", "found another")):
            with pytest.raises(StoreError, match=f"Unauthenticated.*token.*{message}") as caught:
                open_store(url + options, layer=LAYER)
            seen.append(str(caught.value))
            for action in ("health", "drain", "ping"):
                with pytest.raises(StoreError, match=message):
                    ask_server(url[7:], RemoteOptions.parse(url, (url + options)[7:])[0], action)
        store = open_store(f"{url}?token_file={token_file}", layer=LAYER)
        np.testing.assert_array_equal(store.gather(np.arange(9)), table[1][:9])
        seen += [repr(store), metrics.prometheus({LAYER: store}), server.metrics()]
        store.close()
    text = "\n".join([*seen, caplog.text])
    assert SECRET not in text and "another-token" not in text


def test_a_token_file_is_read_again_when_it_changes(table, tmp_path):
    path = tmp_path / "tokens"
    path.write_text("old\n")
    mine = tmp_path / "mine"
    mine.write_text("old")
    with served(table[0], token_file=path) as server:
        url = f"remote:127.0.0.1:{server.port}?token_file={mine}"
        open_store(url, layer=LAYER).close()
        path.write_text("old\nnew\n")
        open_store(url, layer=LAYER).close()
        path.write_text("")  # half written: the tokens stay as they were
        open_store(url, layer=LAYER).close()
        path.write_text("new\n")
        with pytest.raises(StoreError, match="found another"):
            open_store(url, layer=LAYER)
        mine.write_text("new")
        open_store(url, layer=LAYER).close()


@pytest.mark.parametrize("content", ["", "\n \n", "two words", "tab\there", "caf\xe9"])
def test_a_file_without_a_token_is_refused_and_not_shown(tmp_path, content):
    path = tmp_path / "token"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"token file {path}: expected") as caught:
        open_store(f"remote:127.0.0.1:1?token_file={path}", layer=LAYER)
    assert not content.strip() or content not in str(caught.value)


@pytest.mark.parametrize(
    ("certificate", "ca", "host", "cause"),
    [
        ("expired.pem", "ca.pem", "127.0.0.1", "certificate has expired"),
        ("server.pem", "other-ca.pem", "127.0.0.1", "unable to get local issuer certificate"),
        ("server.pem", "ca.pem", "127.0.0.2", "127.0.0.2 is not in peer certificate"),
    ],
    ids=["expired", "of another authority", "of another host"],
)
def test_a_server_that_cannot_prove_who_it_is_is_not_read(table, certificate, ca, host, cause):
    with served(table[0], certificate=certificate, host="0.0.0.0") as server:
        url = f"remote:{host}:{server.port}?tls=1&ca={TLS / ca}"
        with pytest.raises(StoreError, match=cause):
            open_store(url, layer=LAYER)


def test_plain_and_tls_are_not_mixed(table, secured, token_file):
    with served(table[0]) as plain, served(table[0], certificate="server.pem") as safe:
        for url in (
            f"remote:127.0.0.1:{plain.port}?tls=1&ca={TLS / 'ca.pem'}",
            f"remote:127.0.0.1:{safe.port}",
        ):
            with pytest.raises(StoreError, match="Unavailable"):
                open_store(url, layer=LAYER)


def test_a_server_cannot_send_its_clients_to_one_without_tls(table, token_file, secured):
    class Turncoat(RowServer):
        def _endpoint(self, served, index):
            ticket = wire.ticket(served.table_id, served.layer, 0, served.rows)
            return flight.FlightEndpoint(ticket, ["grpc://127.0.0.1:9"])

    stores = {LAYER: open_store(table[0], layer=LAYER)}
    pair = (TLS / "server.pem").read_bytes(), (TLS / "server.key").read_bytes()
    server = Turncoat(stores, certificate=pair)
    with pytest.raises(StoreError, match=r"expected servers of grpc\+tls, found grpc://127"):
        open_store(f"remote:127.0.0.1:{server.port}{secured}", layer=LAYER)
    server.stop()


# The server.


def test_a_server_needs_stores_a_free_port_and_a_known_action(table):
    with pytest.raises(ConfigError, match="expected a store for each layer"):
        RowServer({})
    with served(table[0]) as server:
        with pytest.raises(ConfigError, match=f"to listen on 127.0.0.1:{server.port}"):
            with served(table[0], port=server.port):
                pass
        options = RemoteOptions((f"127.0.0.1:{server.port}",))
        with pytest.raises(InputError, match="expected ping, health, metrics or drain"):
            ask_server(options.addresses[0], options, "shutdown")
        assert 'engraphy_server_calls_total{method="do_action"' in server.metrics()


def test_a_store_is_not_closed_by_its_server_nor_by_a_client(table):
    store = open_store(table[0], layer=LAYER)
    server = RowServer({LAYER: store})
    client = open_store(f"remote:127.0.0.1:{server.port}", layer=LAYER)
    assert isinstance(client, RemoteStore)
    client.gather(np.arange(3))
    client.close()
    server.stop()
    np.testing.assert_array_equal(store.gather(np.arange(9)), table[1][:9])

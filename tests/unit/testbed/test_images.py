"""What the tests of real containers need of a machine is named; and the port that stands in for a Service."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from tests.testbed.forwarding import Forwarder
from tests.testbed.images import missing_programs, pip_settings, require
from tests.testbed.processes import free_ports


def test_missing_packages_are_named_once_and_in_order() -> None:
    programs = {"sh": "dash", "no-such-program": "runc", "no-such-other": "containerd", "no-such-third": "containerd"}
    assert missing_programs(programs) == ["containerd", "runc"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 0)
        with pytest.raises(RuntimeError, match="apt-get install containerd runc"):
            require(programs, "a node")
        require({"sh": "dash"}, "a node")


def test_that_root_is_needed_is_told() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(RuntimeError, match="a node needs root"):
            require({}, "a node")


def test_settings_of_pip_are_read_from_its_environment() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_INDEX_URL", "https://packages.example.org/simple")
        patch.setenv("PIP_FIND_LINKS", "/wheels /more/wheels")
        found = pip_settings()
    assert found["index-url"] == "https://packages.example.org/simple"
    assert found["find-links"].split() == ["/wheels", "/more/wheels"]


def test_a_forwarder_passes_on_both_ways_until_it_is_stopped() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        (port,) = free_ports(1)
        forwarder = Forwarder(("127.0.0.1", port), ("127.0.0.1", server.getsockname()[1]))

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                data = b""
                while chunk := connection.recv(1000):
                    data += chunk
                connection.sendall(data[::-1])

        thread = threading.Thread(target=answer)
        thread.start()
        sent = os.urandom(300_000)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            received = b""
            while chunk := client.recv(2**16):
                received += chunk
        thread.join()
        forwarder.stop()
    assert received == sent[::-1]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_client_of_a_server_that_is_gone_is_disconnected() -> None:
    gone, port = free_ports(2)
    forwarder = Forwarder(("127.0.0.1", port), ("127.0.0.1", gone))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        assert client.recv(10) == b""
    forwarder.stop()

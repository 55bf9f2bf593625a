"""Which network interface gloo and NCCL are told to use, and which settings can't be right."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from raytune_ds import network

ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["10.0.0.5", "fe80::1%eth0"],
    "eth01": ["192.168.7.1"],
    "ib0": ["172.16.0.5"],
}


@pytest.fixture(autouse=True)
def _interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name: [SimpleNamespace(address=a) for a in addresses] for name, addresses in ADDRESSES.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.parametrize(
    ("address", "name"),
    [("10.0.0.5", "eth0"), ("fe80::1", "eth0"), ("127.0.0.1", "lo"), ("10.0.0.55", None)],
)
def test_the_interface_that_carries_an_address(address: str, name: str | None) -> None:
    assert network.interface_of(address) == name


def test_it_is_set_for_both() -> None:
    environment: dict[str, str] = {}
    network.use_interface_of("10.0.0.5", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}


def test_what_the_user_has_set_stays() -> None:
    environment = {"GLOO_SOCKET_IFNAME": "ib0"}
    network.use_interface_of("10.0.0.5", environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "=eth0"}


def test_an_address_that_no_interface_carries_sets_nothing() -> None:
    environment: dict[str, str] = {}
    network.use_interface_of("54.1.2.3", environment)
    assert environment == {}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0"),
        ("NCCL_SOCKET_IFNAME", "eth"),
        ("NCCL_SOCKET_IFNAME", "=ib0"),
        ("NCCL_SOCKET_IFNAME", "^lo,docker"),
        ("GLOO_SOCKET_IFNAME", ""),
    ],
)
def test_settings_that_can_be_right(variable: str, value: str) -> None:
    assert network.problem({variable: value}) is None


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("GLOO_SOCKET_IFNAME", "eth", "eth: there is no such network interface; there is eth0, eth01, ib0"),
        ("GLOO_SOCKET_IFNAME", "lo", "lo: other nodes can't be reached by loopback"),
        ("NCCL_SOCKET_IFNAME", "ens", "ens: there is no such network interface"),
        ("NCCL_SOCKET_IFNAME", "=eth", "=eth: there is no such network interface"),
        ("NCCL_SOCKET_IFNAME", "^eth,ib", "other nodes can't be reached by loopback"),
    ],
)
def test_settings_that_can_not(variable: str, value: str, words: str) -> None:
    problem = network.problem({variable: value})
    assert problem is not None
    assert problem.startswith(f"{variable} = ")
    assert words in problem

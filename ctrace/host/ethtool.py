"""Statistics of network cards, as ``ethtool -S`` prints them."""

from __future__ import annotations

import fcntl
import socket
import struct
from contextlib import suppress
from typing import Final

import numpy as np

SIOCETHTOOL: Final = 0x8946
GET_DRIVER, GET_STRINGS, GET_STATS, GET_SET_INFO = 0x03, 0x1B, 0x1D, 0x37
STATS: Final = 1
"""ETH_SS_STATS."""
NAME: Final = 32
"""Bytes of a name (ETH_GSTRING_LEN)."""
MOST: Final = 1 << 16
"""Statistics of one device; a driver that has more is left out."""


def statistics(driver: str) -> dict[str, dict[str, int]]:
    """Of the devices with this driver in this thread's namespace, by their names."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, device in socket.if_nameindex():
            with suppress(OSError):  # it tells nothing, or has just gone
                if _driver(sock, device) == driver:
                    found[device] = _counted(sock, device)
    return found


def _driver(sock: socket.socket, device: str) -> str:
    info = bytearray(struct.pack("=I192x", GET_DRIVER))
    _ask(sock, device, info)
    return bytes(info[4:36]).split(b"\0")[0].decode(errors="replace")


def _counted(sock: socket.socket, device: str) -> dict[str, int]:
    info = bytearray(struct.pack("=IIQI", GET_SET_INFO, 0, 1 << STATS, 0))
    _ask(sock, device, info)
    mask, n = struct.unpack_from("=8xQI", info)
    if not mask or n > MOST:
        return {}
    names = bytearray(struct.pack("=III", GET_STRINGS, STATS, n) + bytes(NAME * n))
    _ask(sock, device, names)
    values = bytearray(struct.pack("=II", GET_STATS, n) + bytes(8 * n))
    _ask(sock, device, values)
    labels = (names[12 + NAME * i : 12 + NAME * (i + 1)].split(b"\0")[0] for i in range(n))
    numbers = struct.unpack_from(f"={n}Q", values, 8)
    return {bytes(label).decode(errors="replace"): n for label, n in zip(labels, numbers)}


def _ask(sock: socket.socket, device: str, data: bytearray) -> None:
    """ioctl of struct ifreq, whose data are at an address."""
    address = np.frombuffer(data, np.uint8).ctypes.data
    fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("=16sQ16x", device.encode(), address))

"""The connection tracking table through ctnetlink, raw netlink without a library."""

from ctrace.host.ctnetlink.edit import Flow, delete, fill, flush, insert
from ctrace.host.ctnetlink.socket import open_socket
from ctrace.host.ctnetlink.table import (
    SLICE,
    Packet,
    Table,
    dump,
    lookup,
    new_entries,
    pieces,
    read_table,
    slices,
    statistics,
)

__all__ = [
    "SLICE",
    "Flow",
    "Packet",
    "Table",
    "delete",
    "dump",
    "fill",
    "flush",
    "insert",
    "lookup",
    "new_entries",
    "open_socket",
    "pieces",
    "read_table",
    "slices",
    "statistics",
]

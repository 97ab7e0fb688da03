"""What every field of a snapshot means, with its unit: for people and scripts.

Meanings are the docstrings that stand below the fields in snapshot.py and batch.py;
fields that need none there are explained here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Final

from ctrace import batch
from ctrace.model import snapshot

_PLAIN: Final[Mapping[str, str]] = {
    "Counted.insert": "Entries that came.",
    "Counted.destroy": "Entries that went.",
    "Counted.drop": "New flows refused because the table was full (or had no memory).",
    "Counted.insert_failed": "Entries that lost an insertion race, or met too long a hash chain.",
    "Counted.expired": "Entries whose timeout had passed (part of `destroy`).",
    "Counted.deleted": "Entries deleted by conntrack -D or -F, by RST, or with their namespace.",
    "Counted.clash_resolved": "Clashes solved by merging into the winner: nothing was lost.",
    "Rates.insert": "Entries that came, per second.",
    "Rates.destroy": "Entries that went, per second.",
    "Rates.drop": "New flows refused, per second.",
    "Rates.insert_failed": "Failed inserts, per second.",
    "Rates.early_drop": "Entries evicted to make room, per second.",
    "Reconciliation.drop": "Our refusals and unresolved clashes minus the kernel's `drop`.",
    "Reconciliation.early_drop": "Our evictions minus the kernel's `early_drop`.",
    "Reconciliation.insert_failed": "Our failed inserts minus the kernel's `insert_failed`.",
    "Table.netns": "Inode number of the namespace.",
    "Table.name": "`init`, an `ip netns` name, a container, or `netns:<inum>`.",
    "Table.count": "Entries, as the kernel counts them (`conntrack -C`).",
    "Table.max": "nf_conntrack_max; 0: no limit known.",
    "Table.buckets": "Hash buckets.",
    "Table.active": "Whether conntrack's hooks are on there.",
    "Table.totals": "Exact event counts since the start.",
    "Table.rates": "Events per second over the last interval.",
    "Table.seconds_to_full": "Seconds until the table is full at the present growth; "
    "null when it isn't clearly growing.",
    "Table.seconds_to_full_error": "Standard error of `seconds_to_full`, seconds.",
    "Table.off_by": "Our counts against the kernel's; all zero when they agree.",
    "Percentiles.p50": "Seconds; off by at most 12.5 % or 1 ms.",
    "Percentiles.p90": "Seconds; off by at most 12.5 % or 1 ms.",
    "Percentiles.p99": "Seconds; off by at most 12.5 % or 1 ms.",
    "Histogram.edges": "Edges of the bins, seconds; one more than `counts`.",
    "Histogram.counts": "How many fell into each bin.",
    "Tuple5.proto": "Protocol, by conntrack(8)'s name.",
    "Tuple5.src": "Original source address.",
    "Tuple5.dst": "Original destination address.",
    "Tuple5.sport": "Original source port; ICMP: id.",
    "Tuple5.dport": "Original destination port; ICMP: type * 256 + code.",
    "Tuple5.reply_src": "Reply's source address: differs from `dst` under destination NAT.",
    "Tuple5.reply_dst": "Reply's destination address: differs from `src` under source NAT.",
    "Tuple5.reply_sport": "Reply's source port.",
    "Tuple5.reply_dport": "Reply's destination port.",
    "Tuple5.status": "IPS_* bits.",
    "Tuple5.state": "TCP state; empty for others.",
    "Ends.expired": "Timeout had passed.",
    "Ends.evicted": "Removed to make room (early_drop, or gc above 95 %).",
    "Ends.deleted": "conntrack -D or -F, RST, reopened, namespace exit.",
    "Ends.other": "Ended; this hook family can't tell why.",
    "OwnerView.pid": "Process id in the init pid namespace.",
    "OwnerView.comm": "Command name, as captured; empty when unknown.",
    "OwnerView.unit": "Container or systemd unit.",
    "OwnerView.cmdline": "Command line, while the process lived.",
    "Culprit.proto": "Protocol name, where the key has one.",
    "Culprit.port": "Service port: the original destination port; null for ICMP and the like.",
    "Culprit.src": "Source address, where the key has one.",
    "Culprit.dst": "Destination address, where the key has one.",
    "Culprit.netns": "Inode number of the namespace; 0: several.",
    "Culprit.netns_name": "The namespace's name.",
    "Culprit.inserts": "Entries that came since the start.",
    "Culprit.new_per_s": "Entries that came per second, over the last interval.",
    "Culprit.destroys": "Entries that went since the start.",
    "Culprit.drops": "New flows of this key that were refused.",
    "Culprit.drop_per_s": "Refusals per second, over the last interval.",
    "Culprit.residence": "From insert to destroy.",
    "Culprit.ends": "How entries ended.",
    "Culprit.owner": "The process that opened its flows, or that listens for them.",
    "Culprit.life_histogram": "Life of ended entries.",
    "Culprit.residence_histogram": "Residence of ended entries.",
    "Culprit.samples": "A few of its flows.",
    "Victim.proto": "Protocol name.",
    "Victim.src": "Original source address.",
    "Victim.dst": "Original destination address.",
    "Victim.port": "Original destination port; 0 for protocols without ports.",
    "Victim.netns": "Inode number of the namespace.",
    "Victim.netns_name": "The namespace's name.",
    "Victim.drop_per_s": "Refusals per second, over the last interval.",
    "Victim.error": "Upper bound of what its counts may lack; 0: exact.",
    "Victim.sample": "One of the flows.",
    "Cause.evidence": "What it was recognised by: sentences with numbers and units.",
    "Cause.proto": "Protocol concerned; may be empty.",
    "Cause.port": "Port concerned, or null.",
    "Cause.netns": "Inode number of the namespace concerned; 0: none in particular.",
    "History.insert": "Entries that came per second.",
    "History.destroy": "Entries that went per second.",
    "History.drop": "Refusals per second.",
    "History.early_drop": "Evictions per second.",
    "Memory.used": "Bytes held.",
    "Memory.limit": "Bytes, the fixed limit.",
    "Memory.tracked_keys": "Keys that have a row, over all tables.",
    "Snapshot.host": "Host name.",
    "Snapshot.interval_s": "Length of the last interval, seconds.",
    "Snapshot.hooks": "The hook family in use and what it can't see.",
    "Snapshot.group": "What culprits are grouped by.",
    "Snapshot.sort": "What culprits are sorted by; with a leading `-`, the other way round.",
    "Snapshot.tables": "One per namespace, fullest first.",
    "Snapshot.totals": "Event counts summed over the tables; under a filter, of what passed it.",
    "Snapshot.rates": "The same per second, over the last interval.",
    "Snapshot.culprits": "Who fills the table, in the order asked for.",
    "Snapshot.victims": "Who was refused, evicted or lost a race, worst first.",
    "Snapshot.history": "The last ten minutes.",
    "Snapshot.memory": "What the model holds.",
    "HookInfo.attached": "Hooks in place.",
}


def schema() -> dict[str, str]:
    """``Class.field`` to its meaning, for every class that a snapshot is made of."""
    found: dict[str, str] = {}
    for kind in classes():
        told = _docstrings(kind)
        for field in dataclasses.fields(kind):
            name = f"{kind.__name__}.{field.name}"
            found[name] = " ".join((told.get(field.name) or _PLAIN.get(name, "")).split())
    return found


def classes() -> list[type]:
    """The dataclasses of a snapshot, the outermost first."""
    inner = [
        value
        for value in vars(snapshot).values()
        if inspect.isclass(value)
        and dataclasses.is_dataclass(value)
        and value.__module__ == snapshot.__name__
    ]
    return [*reversed(inner), batch.HookInfo, batch.SelfCost]


def _docstrings(kind: type) -> dict[str, str]:
    """Strings that stand right below a field."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = str(below.value.value)
    return found


def markdown() -> str:
    """The schema as a document: one table per class."""
    meaning = schema()
    lines = [
        "# Fields of a snapshot",
        "",
        "Times are seconds, rates per second, shares 0 to 1, memory bytes, unless a name says",
        "otherwise. null means unknown. Made by `ctrace.model.snapshot_schema.markdown()`.",
    ]
    for kind in classes():
        first = (inspect.getdoc(kind) or "").splitlines()[0]
        lines += ["", f"## {kind.__name__}", "", first, "", "| field | meaning |", "| --- | --- |"]
        for field in dataclasses.fields(kind):
            lines.append(f"| `{field.name}` | {meaning[f'{kind.__name__}.{field.name}']} |")
    return "\n".join(lines) + "\n"

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The one record that every hook fills. ctrace/record.py holds the same layout
 * as a numpy dtype; tests/capture/test_layout.py compares the two field by field.
 *
 * 120 bytes: with the ring buffer's 8-byte header a slot is 128 bytes, which
 * divides every ring size, so a ring is an array and no record wraps.
 */
#ifndef CTRACE_RECORD_H
#define CTRACE_RECORD_H

enum ctrace_kind {
	CTRACE_INSERT = 1,
	CTRACE_DESTROY = 2,
	CTRACE_DROP = 3,
	CTRACE_INSERT_FAILED = 4,
	CTRACE_EXISTING = 5,	/* in the table before the tracer; made in user space */
	CTRACE_SAMPLED = 6,	/* nothing happened: what a look at a young entry found */
	CTRACE_MET = 7,		/* nothing happened: an entry that a walk over the table met */
	/* after losses, made in user space: what the table of a namespace holds, counted anew */
	CTRACE_RECOUNT = 8,
	CTRACE_FOUND = 9,
	CTRACE_RECOUNTED = 10,
};

/* A reason belongs to exactly one kind. It also indexes the exact counters. */
enum ctrace_reason {
	CTRACE_R_NONE = 0,
	CTRACE_R_NEW = 1,		/* insert: confirmed by a packet */
	CTRACE_R_USER = 2,		/* insert: by ctnetlink or a BPF program */
	CTRACE_R_NAT_CLASH = 3,		/* insert: clash solved by inserting beside the winner */
	CTRACE_R_EXPIRED = 4,		/* destroy: timeout had passed */
	CTRACE_R_EVICTED = 5,		/* destroy: early_drop made room for another */
	CTRACE_R_GC_PRESSURE = 6,	/* destroy: gc_worker, unexpired and unassured above 95 % */
	CTRACE_R_DELETED = 7,		/* destroy: conntrack -D or -F, RST, TCP reopen, namespace exit */
	CTRACE_R_GONE = 8,		/* destroy: the hook family cannot tell why */
	CTRACE_R_TABLE_FULL = 9,	/* drop: nf_conntrack_max reached, nothing evictable found */
	CTRACE_R_NO_MEMORY = 10,	/* drop: allocation failed below the limit */
	CTRACE_R_CLASH = 11,		/* insert_failed: another entry has the tuple */
	CTRACE_R_CHAIN_TOO_LONG = 12,	/* insert_failed: hash chain over its limit */
	CTRACE_R_FAILED = 13,		/* insert_failed: dying entry, or the family cannot tell */
	CTRACE_R_CLASH_RESOLVED = 14,	/* counter only: loser merged into the winner, nothing lost */
	CTRACE_R_RING_FULL = 15,	/* counter only: a record that the ring had no room for */
	CTRACE_REASONS = 16,
};

/* Which way the packet that made or was refused the entry was going. */
enum ctrace_direction {
	CTRACE_D_UNKNOWN = 0,
	CTRACE_D_IN = 1,	/* received for this host */
	CTRACE_D_OUT = 2,	/* sent by this host */
	CTRACE_D_FORWARD = 3,
};

struct ctrace_record {
	__u64 ts;		/* CLOCK_BOOTTIME, ns */
	__u64 ct;		/* identity of the entry while it lives; 0: there was none */
	__u8 src[16];		/* original tuple; IPv4 as ::ffff:a.b.c.d */
	__u8 dst[16];
	__u8 reply_src[16];
	__u8 reply_dst[16];
	__u16 sport;		/* host order; ICMP: id */
	__u16 dport;		/* ICMP: type << 8 | code */
	__u16 reply_sport;
	__u16 reply_dport;
	__u32 netns;		/* inode number of the namespace */
	__u32 status;		/* IPS_* bits */
	__u8 kind;
	__u8 reason;
	__u8 proto;		/* IPPROTO_* */
	__u8 family;		/* AF_INET or AF_INET6 */
	__u16 zone;
	__u8 direction;
	__u8 state;		/* TCP: enum tcp_conntrack; 255: unknown */
	union {
		struct {	/* insert, drop, insert_failed */
			__u64 owner;	/* pid << 32 | low 32 bits of start time in ms; 0: unknown */
			__u64 cgroup;	/* cgroup v2 id; 0: unknown */
		};
		struct {	/* destroy, sampled, met */
			__s32 idle_ms;		/* since the last packet that renewed it; -1: unknown */
			__s32 overdue_ms;	/* since its timeout passed; negative: time it had left */
			__u32 timeout_ms;	/* of the state that it died in; 0: unknown */
			__u32 mark;
		};
	};
};

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * From a struct nf_conn, or from the tuple of a packet that got none, to a record
 * in this CPU's ring and an exact count. Every hook family calls these handlers;
 * none of them knows which family it serves.
 *
 * Offsets (CT_*, NET_*, TASK_*, ...) are the running kernel's, from
 * ctrace/kernel/layout.py; filters (F_*) from ctrace/kernel/objects.py.
 */
#ifndef CTRACE_CT_H
#define CTRACE_CT_H

#include <linux/types.h>
#include "record.h"
#include "helpers.h"
#include "maps.h"
#include "percpu.h"
#include "ring.h"

#define IPS_SEEN_REPLY (1 << 1)
#define IPS_ASSURED (1 << 2)
#define IPS_CONFIRMED (1 << 3)
#define IPS_DYING (1 << 9)
#define IPS_FIXED_TIMEOUT (1 << 10)
#define IPS_OFFLOAD (1 << 14)

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_DCCP 33
#define IPPROTO_GRE 47
#define IPPROTO_ICMPV6 58
#define IPPROTO_SCTP 132
#define IPPROTO_UDPLITE 136

#define STATE_UNKNOWN 255
#define TCP_FIN_WAIT 4	/* enum tcp_conntrack: from here on a connection is closing */

/* skb->_nfct: a struct nf_conn pointer with enum ip_conntrack_info in its low bits. */
#define NFCT_INFO 7ULL
#define NFCT_PTR (~NFCT_INFO)
#define CTINFO_UNTRACKED 7

/* One bulk read serves every field: up to the end of what we use of nf_conn.proto. */
#define CT_BYTES (CT_PROTO + 64)

#define ORIGINAL (CT_TUPLEHASH + HASH_TUPLE)
#define REPLY (CT_TUPLEHASH + TUPLEHASH_SIZE + HASH_TUPLE)

struct entry {
	u64 words[(CT_BYTES + 7) / 8];
};

#define AT(entry, type, offset) (*(type *)((u8 *)(entry)->words + (offset)))

INLINE void read_entry(struct entry *e, u64 ct)
{
	if (probe_read(e->words, CT_BYTES, (void *)ct))
		__builtin_memset(e->words, 0, CT_BYTES);
}

#define READ_WORD(e, ct, offset) \
	((e)->words[(offset) / 8] = read64((ct) + (offset) / 8 * 8))

/* The words with what every record has: a few loads cost less than a copy of all. */
INLINE void read_common(struct entry *e, u64 ct)
{
#ifdef CT_ZONE
	READ_WORD(e, ct, CT_ZONE);
#endif
	READ_WORD(e, ct, ORIGINAL + TUPLE_SRC);
	READ_WORD(e, ct, ORIGINAL + TUPLE_SPORT);	/* and the family, and IPv4's destination */
	READ_WORD(e, ct, ORIGINAL + TUPLE_PROTO);
	READ_WORD(e, ct, REPLY + TUPLE_SRC);
	READ_WORD(e, ct, REPLY + TUPLE_SPORT);
	READ_WORD(e, ct, REPLY + TUPLE_PROTO);
	READ_WORD(e, ct, CT_STATUS);
	if (AT(e, u16, ORIGINAL + TUPLE_L3NUM) != AF_INET) {
		READ_WORD(e, ct, ORIGINAL + TUPLE_SRC + 8);
		READ_WORD(e, ct, ORIGINAL + TUPLE_DST + 8);
		READ_WORD(e, ct, REPLY + TUPLE_SRC + 8);
		READ_WORD(e, ct, REPLY + TUPLE_DST + 8);
	}
}

/* What a record of its end needs besides. */
INLINE void read_life(struct entry *e, u64 ct)
{
	int i;

	READ_WORD(e, ct, CT_TIMEOUT);
	READ_WORD(e, ct, CT_NET);
#ifdef CT_MARK
	READ_WORD(e, ct, CT_MARK);
#endif
	READ_WORD(e, ct, CT_PROTO);
	if (AT(e, u8, ORIGINAL + TUPLE_PROTO) != IPPROTO_UDP)
#pragma unroll
		for (i = 8; i < 64 + CT_PROTO % 8; i += 8)
			READ_WORD(e, ct, CT_PROTO + i);
}

INLINE u32 netns_of(u64 net)
{
	return read32(net + NET_INUM);
}

/*
 * Whether the entry was ever in the table. Up to 5.18 entries outside it sit on
 * per-CPU lists through the same node, and IPS_CONFIRMED is set on success only;
 * from 5.19 on the node is untouched until __nf_conntrack_hash_insert, while
 * IPS_CONFIRMED may be set on losers too (before commit 2d72afb34065).
 */
INLINE bool was_inserted(const struct entry *e)
{
#if CT_LISTS
	return AT(e, u32, CT_STATUS) & IPS_CONFIRMED;
#else
	return AT(e, u64, CT_TUPLEHASH + HASH_PPREV) != 0;
#endif
}

/* -- exact counts, whatever the filter says -------------------------------------- */

/*
 * A place belongs on this CPU to the first namespace that comes, for good. Of two that come
 * at the same time, one in a softirq that interrupts the other, the place is neither's: whoever
 * finds a claim beside its own keeps to COUNTS, as does who comes later. User space adds up.
 */
INLINE struct tally *near_tally(u32 netns)
{
	u32 zero = 0, place = netns % NEAR_PLACES;
	struct near *near = map_lookup(NEAR, &zero);

	if (!near)
		return NULL;
	if (near->places[place].netns == netns)
		return &near->places[place].tally;
	if (near->places[place].claims)
		return NULL;
	__sync_fetch_and_add(&near->places[place].claims, 1);
	if (*(volatile u64 *)&near->places[place].claims != 1)
		return NULL;
	near->places[place].netns = netns;
	return &near->places[place].tally;
}

/* The namespace's own; NULL where it has none, also when the map is full. */
INLINE struct tally *own_tally(u32 netns, bool make)
{
	struct tally *tally = near_tally(netns);
	u32 zero = 0;
	void *blank;

	if (!tally)
		tally = map_lookup(COUNTS, &netns);
	if (tally || !make)
		return tally;
	blank = map_lookup(BLANK, &zero);
	if (blank)
		map_update(COUNTS, &netns, blank, BPF_NOEXIST);
	return map_lookup(COUNTS, &netns);
}

INLINE struct tally *tally_of(u32 netns)
{
	struct tally *tally = own_tally(netns, true);
	u32 zero = 0;

	/* namespace 0 takes the rest */
	return tally ? tally : map_lookup(COUNTS, &zero);
}

INLINE void add(struct tally *tally, u32 reason, u64 n)
{
	/* atomic: a softirq may interrupt the same counter on the same CPU */
	if (tally && reason < CTRACE_REASONS)
		__sync_fetch_and_add(&tally->counts[reason], n);
}

INLINE void count(u32 netns, u32 reason, u64 n)
{
	add(tally_of(netns), reason, n);
}

/* -- whose packet ------------------------------------------------------------------ */

#define PF_KTHREAD 0x00200000

#ifdef TASK_START
#define START_OFFSET TASK_START
#elif defined(TASK_REAL_START)
#define START_OFFSET TASK_REAL_START
#endif

/* Once for each cgroup: what user space might come too late to look up. */
INLINE void remember_cgroup(u64 node, u64 id)
{
#if defined(KN_NAME) && defined(KN_PARENT)
	struct cgroup_names *names = map_lookup(CGROUPS, &id);
	u32 zero = 0;

	if (names)
		return;
	names = map_lookup(BLANK, &zero);
	if (!names)
		return;
	map_update(CGROUPS, &id, names, BPF_NOEXIST);
	names = map_lookup(CGROUPS, &id);
	if (!names)
		return;
	probe_read_str(names->parent, sizeof(names->parent),
		       (void *)read64(read64(node + KN_PARENT) + KN_NAME));
	probe_read_str(names->name, sizeof(names->name), (void *)read64(node + KN_NAME));
#endif
}

/* The owner key of the current process: 0 for a kernel thread. */
INLINE u64 current_key(void)
{
	u64 task, flags, leader, tgid, start;

#ifdef TASK_BTF
	{
		void *typed = current_task_btf(), *first;

		LOAD(flags, u32, typed, TASK_FLAGS);
		LOAD(first, u64, typed, TASK_LEADER);
		LOAD(tgid, u32, typed, TASK_TGID);
		LOAD(start, u64, first, START_OFFSET);
	}
#else
	task = current_task();
	flags = read32(task + TASK_FLAGS);
	leader = read64(task + TASK_LEADER);
	tgid = read32(task + TASK_TGID);
	start = read64(leader + START_OFFSET);
#endif
	if (flags & PF_KTHREAD)
		return 0;
	return tgid << 32 | (u32)(start / 1000000);
}

/* The cgroup of the current process, whose key this is; both go to OWNERS once. */
INLINE u64 cgroup_of(u64 key)
{
	struct owner fresh = {}, *known = map_lookup(OWNERS, &key);
	u64 task, leader;

	if (known)
		return known->cgroup;
	task = current_task();
	leader = read64(task + TASK_LEADER);
	probe_read(fresh.comm, sizeof(fresh.comm), (void *)(leader + TASK_COMM));
#if defined(CSS_SET_CGROUP) && defined(CGROUP_KN) && defined(KN_ID)
	{
		u64 set = read64(task + TASK_CGROUPS);

		u64 node = read64(read64(set + CSS_SET_CGROUP) + CGROUP_KN);

		fresh.cgroup = read64(node + KN_ID);
		remember_cgroup(node, fresh.cgroup);
	}
#endif
	map_update(OWNERS, &key, &fresh, 0);
	return fresh.cgroup;
}

/* -- filters: constants, so an unused one costs nothing ---------------------------- */

/* words[4] of an address as in the record, given as F_<side>_VALUE0..3 and _MASK0..3 */
#define ADDRESS_MATCHES(e, offset, side) \
	(!((AT(e, u32, (offset)) ^ side##_VALUE0) & side##_MASK0) && \
	 !((AT(e, u32, (offset) + 4) ^ side##_VALUE1) & side##_MASK1) && \
	 !((AT(e, u32, (offset) + 8) ^ side##_VALUE2) & side##_MASK2) && \
	 !((AT(e, u32, (offset) + 12) ^ side##_VALUE3) & side##_MASK3))

INLINE bool flow_wanted(const struct entry *e, u32 netns)
{
#ifdef F_NETNS
	if (netns != F_NETNS)
		return false;
#endif
#ifdef F_PROTO
	if (AT(e, u8, ORIGINAL + TUPLE_PROTO) != F_PROTO)
		return false;
#endif
#ifdef F_FAMILY
	if (AT(e, u16, ORIGINAL + TUPLE_L3NUM) != F_FAMILY)
		return false;
#endif
#ifdef F_SPORT
	if (host16(AT(e, u16, ORIGINAL + TUPLE_SPORT)) != F_SPORT)
		return false;
#endif
#ifdef F_DPORT
	if (host16(AT(e, u16, ORIGINAL + TUPLE_DPORT)) != F_DPORT)
		return false;
#endif
#if defined(F_ZONE) && defined(CT_ZONE)
	if (AT(e, u16, CT_ZONE) != F_ZONE)
		return false;
#endif
#ifdef F_SRC_VALUE0
	if (!ADDRESS_MATCHES(e, ORIGINAL + TUPLE_SRC, F_SRC))
		return false;
#endif
#ifdef F_DST_VALUE0
	if (!ADDRESS_MATCHES(e, ORIGINAL + TUPLE_DST, F_DST))
		return false;
#endif
	return true;
}

INLINE bool record_wanted(const struct entry *e, u32 netns, u8 kind)
{
#ifdef F_KINDS
	if (!(F_KINDS >> kind & 1))
		return false;
#endif
#ifdef F_STATUS
	if ((AT(e, u32, CT_STATUS) & F_STATUS) != F_STATUS)
		return false;
#endif
#ifdef F_UNREPLIED
	if (AT(e, u32, CT_STATUS) & IPS_SEEN_REPLY)
		return false;
#endif
	return flow_wanted(e, netns);
}

/* -- the record -------------------------------------------------------------------- */

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MAPPED 0xffff0000	/* bytes 8 to 11 of ::ffff:a.b.c.d */
#else
#define MAPPED 0x0000ffff
#endif

INLINE void put_address(u8 *to, const u8 *from, u16 family)
{
	u32 *out = (u32 *)to;
	const u32 *in = (const u32 *)from;

	if (family == AF_INET) {
		*(u64 *)to = 0;
		out[2] = MAPPED;
		out[3] = in[0];
	} else {
		out[0] = in[0];
		out[1] = in[1];
		out[2] = in[2];
		out[3] = in[3];
	}
}

INLINE u8 state_of(const struct entry *e)
{
	u8 proto = AT(e, u8, ORIGINAL + TUPLE_PROTO);

#ifdef TCP_STATE
	if (proto == IPPROTO_TCP)
		return AT(e, u8, CT_PROTO + TCP_STATE);
#endif
	return STATE_UNKNOWN;
}

/*
 * A record in this CPU's ring, or a count of one that it had no room for. `last`: what its
 * last 16 bytes are for this kind.
 */
INLINE void emit(const struct entry *e, u64 ct, u32 netns, u8 kind, u8 reason, u8 direction,
		 const u64 last[2])
{
	u16 family = AT(e, u16, ORIGINAL + TUPLE_L3NUM);
	u64 number = 0;
	struct ctrace_record *r = ring_room(&number);

	if (!r) {
		count(netns, CTRACE_R_RING_FULL, 1);
		return;
	}
	r->ts = boot_ns();
	r->ct = ct;
	put_address(r->src, &AT(e, u8, ORIGINAL + TUPLE_SRC), family);
	put_address(r->dst, &AT(e, u8, ORIGINAL + TUPLE_DST), family);
	put_address(r->reply_src, &AT(e, u8, REPLY + TUPLE_SRC), family);
	put_address(r->reply_dst, &AT(e, u8, REPLY + TUPLE_DST), family);
	r->sport = host16(AT(e, u16, ORIGINAL + TUPLE_SPORT));
	r->dport = host16(AT(e, u16, ORIGINAL + TUPLE_DPORT));
	r->reply_sport = host16(AT(e, u16, REPLY + TUPLE_SPORT));
	r->reply_dport = host16(AT(e, u16, REPLY + TUPLE_DPORT));
	r->netns = netns;
	r->status = AT(e, u32, CT_STATUS);
	r->proto = AT(e, u8, ORIGINAL + TUPLE_PROTO);
	r->family = family;
#ifdef CT_ZONE
	r->zone = AT(e, u16, CT_ZONE);
#else
	r->zone = 0;
#endif
	r->kind = kind;
	r->reason = reason;
	r->direction = direction;
	r->state = state_of(e);
	r->owner = last[0];
	r->cgroup = last[1];
	ring_done(r, number);
}

/* insert, drop and insert_failed: what happened on behalf of a packet */
INLINE void emit_packet_event(const struct entry *e, u64 ct, u32 netns, u8 kind, u8 reason,
			      u8 direction)
{
	u64 owned[2] = {};

	if (!record_wanted(e, netns, kind))
		return;
	/* whoever runs while a packet arrives or passes through is not its owner */
	if ((direction == CTRACE_D_OUT ||
	     (direction == CTRACE_D_UNKNOWN && kind == CTRACE_INSERT)) &&
	    in_task())
		owned[0] = current_key();
	if (owned[0])
		owned[1] = cgroup_of(owned[0]);
	emit(e, ct, netns, kind, reason, direction, owned);
}

/* -- the life of a dying entry ------------------------------------------------------ */

#define MS(ticks) ((s32)((s64)(ticks) * 1000 / HZ))

/* nf_conntrack_tcp_packet()'s own choice of timeout, made again from what it left. */
INLINE u32 tcp_timeout(const struct entry *e, u64 net)
{
#if defined(NET_TCP_TIMEOUTS) && defined(TCP_STATE)
	u64 table = net + NET_TCP_TIMEOUTS;
	u32 state = AT(e, u8, CT_PROTO + TCP_STATE);
	u32 retrans = AT(e, u8, CT_PROTO + TCP_RETRANS);
	u32 chosen, other;

	if (state > 13)
		return 0;
	chosen = read32(table + 4 * state);
	if (retrans && retrans >= read8(net + NET_TCP_MAX_RETRANS) &&
	    chosen > (other = read32(table + 4 * 12))) {		/* RETRANS */
		chosen = other;
	} else if (AT(e, u8, CT_PROTO + TCP_LAST_INDEX) == 4) {		/* TCP_RST_SET */
		chosen = read32(table + 4 * 8);				/* CLOSE */
	} else if ((AT(e, u8, CT_PROTO + TCP_FLAGS0) | AT(e, u8, CT_PROTO + TCP_FLAGS1)) & 0x10 &&
		   chosen > (other = read32(table + 4 * 13))) {		/* UNACKNOWLEDGED */
		chosen = other;
	} else if (!AT(e, u16, CT_PROTO + TCP_LAST_WIN) &&
		   chosen > (other = read32(table + 4 * 12))) {
		chosen = other;
	}
	if (state == 3 && !(AT(e, u32, CT_STATUS) & IPS_SEEN_REPLY) &&
	    chosen > (other = read32(table + 4 * 13)))
		chosen = other;
	return chosen;
#else
	return 0;
#endif
}

INLINE u32 udp_timeout(const struct entry *e, u64 net)
{
#if defined(NET_UDP_TIMEOUTS) && defined(UDP_STREAM_TS)
	u64 table = net + NET_UDP_TIMEOUTS;	/* unreplied, replied */

	/* refreshed with the stream timeout only once the flow is older than 2 s */
	if (AT(e, u32, CT_STATUS) & IPS_SEEN_REPLY) {
		u32 replied = read32(table + 4);

		if ((s32)(AT(e, u32, CT_TIMEOUT) - replied -
			  AT(e, u32, CT_PROTO + UDP_STREAM_TS)) > 0)
			return replied;
	}
	return read32(table);
#else
	return 0;
#endif
}

/* The timeout, in jiffies, with which the entry was last renewed; 0: unknown. */
INLINE u32 last_timeout(const struct entry *e, u64 net)
{
	u8 proto = AT(e, u8, ORIGINAL + TUPLE_PROTO);

	if (AT(e, u32, CT_STATUS) & (IPS_OFFLOAD | IPS_FIXED_TIMEOUT))
		return 0;
	if (proto == IPPROTO_TCP)
		return tcp_timeout(e, net);
	if (proto == IPPROTO_UDP || proto == IPPROTO_UDPLITE)
		return udp_timeout(e, net);
	/* A protocol with timeouts of its own never has the generic one, found or not. */
	if (proto == IPPROTO_ICMP)
#ifdef NET_ICMP_TIMEOUT
		return read32(net + NET_ICMP_TIMEOUT);
#else
		return 0;
#endif
	if (proto == IPPROTO_ICMPV6)
#ifdef NET_ICMPV6_TIMEOUT
		return read32(net + NET_ICMPV6_TIMEOUT);
#else
		return 0;
#endif
	if (proto == IPPROTO_SCTP)
#if defined(NET_SCTP_TIMEOUTS) && defined(SCTP_STATE)
		return read32(net + NET_SCTP_TIMEOUTS +
			      4 * (AT(e, u8, CT_PROTO + SCTP_STATE) & 15));
#else
		return 0;
#endif
	if (proto == IPPROTO_GRE)
#ifdef NET_GRE_TIMEOUTS
		return read32(net + NET_GRE_TIMEOUTS +
			      (AT(e, u32, CT_STATUS) & IPS_SEEN_REPLY ? 4 : 0));
#else
		return 0;
#endif
	if (proto == IPPROTO_DCCP)	/* up to 6.16 it had its own; not read here */
		return 0;
#ifdef NET_GENERIC_TIMEOUT
	return read32(net + NET_GENERIC_TIMEOUT);
#else
	return 0;
#endif
}

INLINE bool is_expired(const struct entry *e)
{
	return (s32)(AT(e, u32, CT_TIMEOUT) - (u32)jiffies64()) <= 0;
}

/* Whether a cttimeout policy chose the timeout; only while ct->ext is alive. */
INLINE bool has_timeout_policy(const struct entry *e)
{
#if defined(CT_EXT) && defined(EXT_TIMEOUT)
	u64 ext = AT(e, u64, CT_EXT);

	return ext && read8(ext + EXT_TIMEOUT) != 0;
#else
	return false;
#endif
}

/*
 * A record of an entry's life so far: its state, and for how long nothing renewed it.
 * `ext_alive`: ct->ext may still be read (not so in kmem_cache_free).
 */
INLINE void emit_life(const struct entry *e, u64 ct, u32 netns, u8 kind, u8 reason,
		      bool ext_alive)
{
	s32 overdue = (u32)jiffies64() - AT(e, u32, CT_TIMEOUT), idle;
	union {
		struct {
			s32 idle_ms, overdue_ms;
			u32 timeout_ms, mark;
		};
		u64 words[2];
	} life;
	u32 timeout;

	if (!record_wanted(e, netns, kind))
		return;
	timeout = last_timeout(e, AT(e, u64, CT_NET));
	if (ext_alive && has_timeout_policy(e))
		timeout = 0;
	idle = overdue + (s32)timeout;
	if (timeout && idle >= 0) {
		life.idle_ms = MS(idle);
		life.timeout_ms = (u32)((u64)timeout * 1000 / HZ);
	} else {
		life.idle_ms = -1;
		life.timeout_ms = 0;
	}
	life.overdue_ms = MS(overdue);
#ifdef CT_MARK
	life.mark = AT(e, u32, CT_MARK);
#else
	life.mark = 0;
#endif
	emit(e, ct, netns, kind, reason, CTRACE_D_UNKNOWN, life.words);
}

/* -- what the hooks call ------------------------------------------------------------- */

/* The entry went into the table. IPS_CONFIRMED is set a moment later: said already. */
INLINE void emit_insert(u64 ct, u8 reason, u8 direction)
{
	struct entry e;
	u32 netns;

	read_entry(&e, ct);
	netns = netns_of(AT(&e, u64, CT_NET));
	AT(&e, u32, CT_STATUS) |= IPS_CONFIRMED;
	count(netns, reason, 1);
	emit_packet_event(&e, ct, netns, CTRACE_INSERT, reason, direction);
}

/* The entry was refused by the table: another has its tuple, or the chain is too long. */
INLINE void emit_insert_failed_read(const struct entry *e, u64 ct, u8 reason, u8 direction)
{
	u32 netns = netns_of(AT(e, u64, CT_NET));

	count(netns, reason, 1);
	emit_packet_event(e, ct, netns, CTRACE_INSERT_FAILED, reason, direction);
}

INLINE void emit_insert_failed(u64 ct, u8 reason, u8 direction)
{
	struct entry e;

	read_entry(&e, ct);
	emit_insert_failed_read(&e, ct, reason, direction);
}

/*
 * A packet was refused before it had an entry. `e` holds its two tuples (and zone)
 * where an entry would; everything else in it is zero.
 */
INLINE void emit_drop_read(const struct entry *e, u64 net, u8 reason, u8 direction)
{
	u32 netns = netns_of(net);

	count(netns, reason, 1);
	emit_packet_event(e, 0, netns, CTRACE_DROP, reason, direction);
}

/* The same from kernel pointers to struct nf_conntrack_tuple, as __nf_conntrack_alloc has. */
INLINE void emit_drop(u64 net, u64 orig, u64 reply, u16 zone, u8 reason, u8 direction)
{
	struct entry e = {};

	/* dst.dir ends the tuple, just after the protocol */
	probe_read(&AT(&e, u8, ORIGINAL), TUPLE_PROTO + 1, (void *)orig);
	probe_read(&AT(&e, u8, REPLY), TUPLE_PROTO + 1, (void *)reply);
#ifdef CT_ZONE
	AT(&e, u16, CT_ZONE) = zone;
#endif
	emit_drop_read(&e, net, reason, direction);
}

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * From a struct nf_conn, or from the tuple of a packet that got none, to a record
 * in this CPU's ring and an exact count. Every hook family calls these handlers;
 * none of them knows which family it serves.
 */
#ifndef CTRACE_CT_H
#define CTRACE_CT_H

#include <linux/types.h>
#include "record.h"
#include "helpers.h"
#include "maps.h"
#include "percpu.h"
#include "ring.h"
#include "entry.h"
#include "counts.h"
#include "owner.h"
#include "wanted.h"
#include "life.h"

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
	if (HAS(CT_TCP_STATE) && GET(e, u8, ORIG_PROTO) == IPPROTO_TCP)
		return GET(e, u8, CT_TCP_STATE);
	return STATE_UNKNOWN;
}

/*
 * A record in this CPU's ring, or a count of one that it had no room for. `last`: what its
 * last 16 bytes are for this kind.
 */
INLINE void emit(const struct entry *e, u64 ct, u32 netns, u8 kind, u8 reason, u8 direction,
		 const u64 last[2])
{
	u16 family = GET(e, u16, ORIG_L3NUM);
	u64 number = 0;
	struct ctrace_record *r = ring_room(&number);

	if (!r) {
		count(netns, CTRACE_R_RING_FULL, 1);
		return;
	}
	r->ts = boot_ns();
	r->ct = ct;
	put_address(r->src, FIELD(e, ORIG_SRC), family);
	put_address(r->dst, FIELD(e, ORIG_DST), family);
	put_address(r->reply_src, FIELD(e, REPLY_SRC), family);
	put_address(r->reply_dst, FIELD(e, REPLY_DST), family);
	r->sport = host16(GET(e, u16, ORIG_SPORT));
	r->dport = host16(GET(e, u16, ORIG_DPORT));
	r->reply_sport = host16(GET(e, u16, REPLY_SPORT));
	r->reply_dport = host16(GET(e, u16, REPLY_DPORT));
	r->netns = netns;
	r->status = GET(e, u32, CT_STATUS);
	r->proto = GET(e, u8, ORIG_PROTO);
	r->family = family;
	r->zone = HAS(CT_ZONE) ? GET(e, u16, CT_ZONE) : 0;
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

/*
 * A record of an entry's life so far: its state, and for how long nothing renewed it.
 * `ext_alive`: ct->ext may still be read (not so in kmem_cache_free).
 */
INLINE void emit_life(const struct entry *e, u64 ct, u32 netns, u8 kind, u8 reason,
		      bool ext_alive)
{
	s32 overdue = (u32)jiffies64() - GET(e, u32, CT_TIMEOUT), idle;
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
	timeout = last_timeout(e, GET(e, u64, CT_NET));
	if (ext_alive && has_timeout_policy(e))
		timeout = 0;
	idle = overdue + (s32)timeout;
	if (timeout && idle >= 0) {
		life.idle_ms = milliseconds(idle);
		life.timeout_ms = (u32)((u64)timeout * 1000 / VALUE(HZ));
	} else {
		life.idle_ms = -1;
		life.timeout_ms = 0;
	}
	life.overdue_ms = milliseconds(overdue);
	life.mark = HAS(CT_MARK) ? GET(e, u32, CT_MARK) : 0;
	emit(e, ct, netns, kind, reason, CTRACE_D_UNKNOWN, life.words);
}

/* -- what the hooks call ------------------------------------------------------------- */

/* The entry went into the table. IPS_CONFIRMED is set a moment later: said already. */
INLINE void emit_insert(u64 ct, u8 reason, u8 direction)
{
	struct entry e;
	u32 netns;

	read_entry(&e, ct);
	netns = netns_of(GET(&e, u64, CT_NET));
	PUT(&e, u32, CT_STATUS, GET(&e, u32, CT_STATUS) | IPS_CONFIRMED);
	count(netns, reason, 1);
	emit_packet_event(&e, ct, netns, CTRACE_INSERT, reason, direction);
}

/* The entry was refused by the table: another has its tuple, or the chain is too long. */
INLINE void emit_insert_failed_read(const struct entry *e, u64 ct, u8 reason, u8 direction)
{
	u32 netns = netns_of(GET(e, u64, CT_NET));

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
	probe_read(FIELD(&e, ORIG), VALUE(TUPLE_PROTO) + 1, (void *)orig);
	probe_read(FIELD(&e, REPLY), VALUE(TUPLE_PROTO) + 1, (void *)reply);
	if (HAS(CT_ZONE))
		PUT(&e, u16, CT_ZONE, zone);
	emit_drop_read(&e, net, reason, direction);
}

#endif

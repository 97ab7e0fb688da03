/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What connection tracking costs: time around its hook, and samples of where the
 * CPU is. Nothing here counts entries; ctrace/capture/timing.py and sampling.py
 * hold the list of maps.
 */
#include "ct.h"

#define STACKS MAP(0)	/* stack traces */
#define SAMPLES MAP(1)	/* hash: stack id (or -errno) -> u64 */
#define SLOTS MAP(2)	/* per-CPU array: struct slot */
#define TIMES MAP(3)	/* per-CPU array: u64, TIMES_* index */
#define SERVICES MAP(4)	/* LRU hash: protocol << 16 | port -> struct service */

static long (*get_stackid)(void *ctx, u64 map, u64 flags) = (void *)27;

/* Time is kept in quarter octaves: 4 bins for each power of two of nanoseconds. */
#define BINS 128
#define PROTOCOLS 3	/* tcp, udp, other */

enum point {
	POINT_COST,		/* nothing between the two clock readings: our own cost */
	POINT_IN_NEW,		/* nf_conntrack_in, packet that made an entry */
	POINT_IN_ESTABLISHED,	/* nf_conntrack_in, packet of an entry that is there */
	POINT_IN_OTHER,		/* untracked, invalid, refused */
	POINT_CONFIRM,		/* __nf_conntrack_confirm */
	POINT_EARLY_DROP,	/* the scan for something to evict */
	POINTS,
};

struct slot {
	u64 key;
	u64 at;
	u64 spare;
};

struct service {
	u64 packets;
	u64 ns;
};

INLINE u32 bin_of(u64 ns)
{
	u32 exponent = 0;
	u64 rest = ns;

	if (rest >> 32)
		return BINS - 1;
	if (rest >> 16) {
		rest >>= 16;
		exponent += 16;
	}
	if (rest >> 8) {
		rest >>= 8;
		exponent += 8;
	}
	if (rest >> 4) {
		rest >>= 4;
		exponent += 4;
	}
	if (rest >> 2) {
		rest >>= 2;
		exponent += 2;
	}
	if (rest >> 1)
		exponent += 1;
	if (exponent < 2)
		return exponent * 4;
	return exponent * 4 + (ns >> (exponent - 2) & 3);
}

INLINE void observe(u32 point, u32 protocol, u64 ns)
{
	u32 index = (point * PROTOCOLS + protocol) * BINS + bin_of(ns);
	u64 *bin = map_lookup(TIMES, &index);

	if (bin)
		__sync_fetch_and_add(bin, 1);
}

/*
 * One slot for each timer on this CPU. What interrupts or preempts between entry and
 * exit takes the slot over: the exit then finds another packet's key and measures
 * nothing, which is rare and falls on no kind of packet in particular.
 */
enum slot_group { SLOT_IN, SLOT_CONFIRM, SLOT_EARLY_DROP };

INLINE struct slot *slot_of(u32 group)
{
	return map_lookup(SLOTS, &group);
}

INLINE u32 protocol_index(u8 proto)
{
	return proto == IPPROTO_TCP ? 0 : proto == IPPROTO_UDP ? 1 : 2;
}

INLINE void finish_in(u64 nfct, u64 ns)
{
	u64 ct = nfct & NFCT_PTR;
	struct nf_tuple_end {
		u16 port;
		u8 proto;
	} end = {};
	struct service *known, fresh = {1, ns};
	u32 key, point = POINT_IN_OTHER;
	u64 node = 0;

	if (!ct) {
		observe(point, 2, ns);
		return;
	}
	end.port = read16(ct + ORIGINAL + TUPLE_DPORT);
	end.proto = read8(ct + ORIGINAL + TUPLE_PROTO);
	/* enum ip_conntrack_info: IP_CT_NEW is 2; a new entry is not in the table yet */
	if ((nfct & NFCT_INFO) == 2 && !(read32(ct + CT_STATUS) & IPS_CONFIRMED))
		point = POINT_IN_NEW;
	else
		point = POINT_IN_ESTABLISHED;
	observe(point, protocol_index(end.proto), ns);
	key = (u32)end.proto << 16 | host16(end.port);
	known = map_lookup(SERVICES, &key);
	if (known) {
		__sync_fetch_and_add(&known->packets, 1);
		__sync_fetch_and_add(&known->ns, ns);
	} else {
		map_update(SERVICES, &key, &fresh, BPF_NOEXIST);
	}
}

/* -- around conntrack's hook (priority -200), where functions cannot be traced ------- */

INLINE u64 packet_of(u64 *ctx)
{
	return ctx[BPF_NF_SKB / 8];
}

int netfilter_first(u64 *ctx)	/* -203 */
{
	u64 skb = packet_of(ctx);
	struct slot *slot = slot_of(SLOT_IN);

	if (slot) {
		slot->key = skb;
		slot->at = boot_ns();
	}
	return 1;
}

int netfilter_before(u64 *ctx)	/* -202: nothing ran since -203, so this is our own cost */
{
	u64 skb = packet_of(ctx), now = boot_ns();
	struct slot *slot = slot_of(SLOT_IN);

	if (slot && slot->key == skb) {
		observe(POINT_COST, 2, now - slot->at);
		slot->at = boot_ns();
	}
	return 1;
}

int netfilter_after(u64 *ctx)	/* -199 */
{
	u64 now = boot_ns(), skb = packet_of(ctx), ns;
	struct slot *slot = slot_of(SLOT_IN);

	if (slot && slot->key == skb) {
		ns = now - slot->at;
		slot->key = 0;
		finish_in(read64(skb + SKB_NFCT), ns);
	}
	return 1;
}

/* -- entry to exit of the functions themselves ---------------------------------------- */

INLINE void enter(u32 group, u64 key)
{
	u64 first = boot_ns();
	struct slot *slot = slot_of(group);

	if (slot) {
		slot->key = key;
		slot->spare = first;
		slot->at = boot_ns();
	}
}

INLINE u64 leave(u32 group, u64 key, u64 now)
{
	struct slot *slot = slot_of(group);

	if (!slot || slot->key != key)
		return 0;
	slot->key = 0;
	observe(POINT_COST, 2, slot->at - slot->spare);
	return now - slot->at;
}

int fentry_in(u64 *ctx)		/* nf_conntrack_in(skb, state) */
{
	enter(SLOT_IN, ctx[0]);
	return 0;
}

int fexit_in(u64 *ctx)
{
	u64 now = boot_ns(), skb = ctx[0], ns = leave(SLOT_IN, skb, now);

	if (ns)
		finish_in(read64(skb + SKB_NFCT), ns);
	return 0;
}

int fentry_confirm(u64 *ctx)	/* __nf_conntrack_confirm(skb) */
{
	enter(SLOT_CONFIRM, ctx[0]);
	return 0;
}

int fexit_confirm(u64 *ctx)
{
	u64 now = boot_ns(), skb = ctx[0], ns = leave(SLOT_CONFIRM, skb, now);
	u64 ct = read64(skb + SKB_NFCT) & NFCT_PTR;

	if (ns)
		observe(POINT_CONFIRM,
			ct ? protocol_index(read8(ct + ORIGINAL + TUPLE_PROTO)) : 2, ns);
	return 0;
}

int fentry_early_drop(u64 *ctx)	/* early_drop(net, hash) */
{
	enter(SLOT_EARLY_DROP, ctx[0]);
	return 0;
}

int fexit_early_drop(u64 *ctx)
{
	u64 now = boot_ns(), ns = leave(SLOT_EARLY_DROP, ctx[0], now);

	if (ns)
		observe(POINT_EARLY_DROP, 2, ns);
	return 0;
}

/* -- where the CPU is ------------------------------------------------------------------ */

INLINE void sample(void *ctx)
{
	s32 id = get_stackid(ctx, STACKS, 0);
	u64 one = 1, *seen = map_lookup(SAMPLES, &id);

	if (seen)
		__sync_fetch_and_add(seen, 1);
	else
		map_update(SAMPLES, &id, &one, BPF_NOEXIST);
}

int on_clock(u64 *ctx)		/* perf event: the CPU clock */
{
	sample(ctx);
	return 0;
}

#ifdef DROP_REASON
/* skb:kfree_skb(skb, location, reason): a packet that conntrack's own hook gave up */
int on_kfree_skb(u64 *ctx)
{
	u64 skb = ctx[0];
	struct slot *slot;

	if ((u32)ctx[2] != DROP_REASON)
		return 0;
	slot = slot_of(SLOT_IN);
	if (slot && slot->key == skb) {	/* before -202, but -199 never came */
		slot->key = 0;
		sample(ctx);
	}
	return 0;
}
#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What connection tracking costs: time in its functions or around its hook, samples of
 * where the CPU is, and the stacks of what happens to the table. Nothing here counts
 * entries.
 */
#include <linux/types.h>
#include "perf.h"

struct service {
	u64 packets;
	u64 ns;
};

/* Ports of TCP, UDP and SCTP, then the other protocols by their number. */
INLINE u32 service_index(u8 proto, u16 port)
{
	switch (proto) {
	case IPPROTO_TCP:
		return port;
	case IPPROTO_UDP:
		return 1 << 16 | port;
	case IPPROTO_SCTP:
		return 2 << 16 | port;
	}
	return 3 << 16 | proto;
}

INLINE void finish_in(u64 nfct, u64 ns)
{
	struct service *service;
	u32 index, point = POINT_IN_OTHER;
	u64 ct = nfct & NFCT_PTR;
	struct {
		u16 port;
		u8 proto;
		u8 direction;
	} to;	/* the end of struct nf_conntrack_tuple */

	if (!ct) {
		observe(point, 2, ns);
		return;
	}
	probe_read(&to, sizeof(to), (void *)(ct + VALUE(ORIG_DPORT)));
	/* enum ip_conntrack_info: IP_CT_NEW is 2; a new entry is not in the table yet */
	if ((nfct & NFCT_INFO) == 2 && !(read32(ct + VALUE(CT_STATUS)) & IPS_CONFIRMED))
		point = POINT_IN_NEW;
	else
		point = POINT_IN_ESTABLISHED;
	remember(ct);
	observe(point, protocol_index(to.proto), ns);
	index = service_index(to.proto, host16(to.port));
	service = map_lookup(SERVICES, &index);
	if (service) {
		__sync_fetch_and_add(&service->packets, 1);
		__sync_fetch_and_add(&service->ns, ns);
	}
}

/* -- entry to exit of the functions themselves ---------------------------------------- */

int enter_in(u64 *ctx)		/* nf_conntrack_in(skb, state) */
{
	enter(ctx, TIMER_IN, ARG(ctx, 0));
	return 0;
}

int leave_in(u64 *ctx)
{
	u64 now = boot_ns(), skb = 0, ns = leave(ctx, TIMER_IN, now, &skb);

	if (ns)
		finish_in(read64(skb + VALUE(SKB_NFCT)), ns);
	return 0;
}

int enter_confirm(u64 *ctx)	/* __nf_conntrack_confirm(skb) */
{
	enter(ctx, TIMER_CONFIRM, ARG(ctx, 0));
	return 0;
}

int leave_confirm(u64 *ctx)
{
	u64 now = boot_ns(), skb = 0, ct, ns = leave(ctx, TIMER_CONFIRM, now, &skb);

	if (!ns)
		return 0;
	ct = read64(skb + VALUE(SKB_NFCT)) & NFCT_PTR;
	observe(POINT_CONFIRM, ct ? protocol_index(read8(ct + VALUE(ORIG_PROTO))) : 2, ns);
	return 0;
}

int enter_early_drop(u64 *ctx)	/* early_drop(net, hash) */
{
	enter(ctx, TIMER_EARLY_DROP, 0);
	return 0;
}

int leave_early_drop(u64 *ctx)
{
	u64 now = boot_ns(), none = 0, ns = leave(ctx, TIMER_EARLY_DROP, now, &none);

	if (ns)
		observe(POINT_EARLY_DROP, 2, ns);
	return 0;
}

int enter_gc(u64 *ctx)		/* gc_worker(work) */
{
	enter(ctx, TIMER_GC, 0);
	return 0;
}

int leave_gc(u64 *ctx)
{
	u64 now = boot_ns(), none = 0, ns = leave(ctx, TIMER_GC, now, &none);

	if (ns)
		observe(POINT_GC, 2, ns);
	return 0;
}

int enter_cost(u64 *ctx)	/* a function of the kernel that does nothing */
{
	enter(ctx, TIMER_COST, 0);
	return 0;
}

int leave_cost(u64 *ctx)
{
	u64 now = boot_ns(), none = 0, ns = leave(ctx, TIMER_COST, now, &none);

	if (ns)
		observe(POINT_COST, 2, ns);
	return 0;
}

/* -- stacks of inserts and refusals, at the functions ------------------------------------- */

int stack_insert(u64 *ctx)	/* __nf_conntrack_hash_insert */
{
	sample(ctx, SAMPLED_INSERT);
	return 0;
}

/*
 * A full table is searched for something to evict; finding nothing refuses the packet.
 * The stack is taken at the entry: at a return, older kernels cannot unwind it.
 */
int stack_enter(u64 *ctx)	/* early_drop(net, hash) */
{
	enter(ctx, TIMER_STACK, (u32)get_stackid(ctx, STACKS, 0));
	return 0;
}

int stack_leave(u64 *ctx)
{
	u64 id = 0;

	if (leave(ctx, TIMER_STACK, boot_ns(), &id) && !(u8)RESULT(ctx, early_drop))
		sample_stack(SAMPLED_DROP, id);
	return 0;
}

/* -- around conntrack's hook (priority -200), where functions cannot be traced ------- */

INLINE u64 packet_of(u64 *ctx)
{
	u64 skb;

	LOAD(skb, u64, ctx, BPF_NF_SKB);
	return skb;
}

/* What measuring takes is found out on one packet of so many. */
#define CALIBRATE 16

int netfilter_first(u64 *ctx)	/* the lowest priority */
{
	u64 skb = packet_of(ctx);
	struct slot *slot = slot_of(TIMER_IN);

	if (!slot)
		return 1;
	slot->key = 0;
	if (++slot->spare % CALIBRATE == 0) {
		slot->key = skb;
		slot->at = boot_ns();
	}
	return 1;
}

int netfilter_before(u64 *ctx)	/* the next: nothing ran since the first, so that is our own cost */
{
	u64 skb = packet_of(ctx);
	struct slot *slot = slot_of(TIMER_IN);

	if (!slot)
		return 1;
	if (slot->key == skb)
		observe(POINT_COST, 2, boot_ns() - slot->at);
	slot->key = skb;
	slot->at = boot_ns();
	return 1;
}

int netfilter_after(u64 *ctx)	/* on the way to its clock it does the same as the one before */
{
	u64 skb = packet_of(ctx), nfct, ns;
	struct slot *slot = slot_of(TIMER_IN);

	if (slot && slot->key == skb) {
		ns = boot_ns() - slot->at;
		slot->key = 0;
		LOAD(nfct, u64, skb, SKB_NFCT);
		finish_in(nfct, ns);
	}
	return 1;
}

/* -- stacks at tracepoints: of evictions, and of all where functions cannot be traced ------ */

int alloc_stack(u64 *ctx)	/* kmem:kmem_cache_alloc(call site, ...) */
{
	struct bounds *known = bounds();

	if (known && within(&known->alloc, ctx[0]))
		sample(ctx, SAMPLED_INSERT);
	return 0;
}

/*
 * kmem:kmem_cache_free(call site, entry, ...): user space keeps those inside early_drop,
 * one call of which may evict several entries.
 */
int free_stack(u64 *ctx)
{
	struct bounds *known = bounds();
	struct entry e;

	if (!known || !within(&known->free, ctx[0]))
		return 0;
	read_entry(&e, ctx[1]);
	if (was_inserted(&e) && !is_expired(&e) && !(GET(&e, u32, CT_STATUS) & IPS_ASSURED))
		sample(ctx, SAMPLED_EVICT);
	return 0;
}

/* skb:kfree_skb(skb, location, reason): a packet that conntrack's own hook gave up */
int drop_stack(u64 *ctx)
{
	u64 skb = ctx[0];
	struct slot *slot;

	if ((u32)ctx[2] != VALUE(DROP_REASON))
		return 0;
	slot = slot_of(TIMER_IN);
	if (slot && slot->key == skb) {	/* before -202, but -199 never came */
		slot->key = 0;
		sample(ctx, SAMPLED_DROP);
	}
	return 0;
}

/* -- where the CPU is ------------------------------------------------------------------ */

int on_clock(u64 *ctx)		/* perf event: the CPU clock */
{
	sample(ctx, SAMPLED_CLOCK);
	return 0;
}

/* -- waiting for conntrack's locks (5.19) ------------------------------------------------ */

enum lock { LOCK_TABLE, LOCK_ALL, LOCK_EXPECT, LOCK_UNKNOWN };

struct waiting {
	u64 task;
	u64 lock;
};

struct wait {
	u64 at;
	u64 key;
};

struct waits {
	u64 count;
	u64 ns;
	u64 longest;
};

#define LCB_F_SPIN 1U	/* include/trace/events/lock.h */
#define LCB_F_RT 8U

/* lock:contention_begin(lock, flags): conntrack's are spin locks, on RT mutexes of that sort */
int wait_begin(u64 *ctx)
{
	struct waiting who = { current_task(), ctx[0] };
	struct bounds *known = bounds();
	struct wait wait;
	u64 lock;

	if (!known || (u32)ctx[1] & ~(LCB_F_SPIN | LCB_F_RT))
		return 0;
	if (within(&known->locks, ctx[0]))
		lock = LOCK_TABLE;
	else if (within(&known->all_lock, ctx[0]))
		lock = LOCK_ALL;
	else if (within(&known->expect, ctx[0]))
		lock = LOCK_EXPECT;
	else if (!known->locks.size)
		lock = LOCK_UNKNOWN;	/* user space keeps what conntrack's code waited for */
	else
		return 0;
	wait.key = lock << 32 | (u32)get_stackid(ctx, STACKS, 0);
	wait.at = boot_ns();
	map_update(WAITING, &who, &wait, 0);
	return 0;
}

int wait_end(u64 *ctx)		/* lock:contention_end(lock, ret) */
{
	struct waiting who = { current_task(), ctx[0] };
	struct wait *wait = map_lookup(WAITING, &who);
	struct waits *waits;
	u64 ns, key;

	if (!wait)
		return 0;
	ns = boot_ns() - wait->at;
	key = wait->key;
	map_delete(WAITING, &who);
	waits = map_lookup(WAITS, &key);
	if (!waits) {
		struct waits fresh = { 1, ns, ns };

		if (!map_update(WAITS, &key, &fresh, BPF_NOEXIST))
			return 0;
		key |= 0xffffffff;	/* no room for another stack: user space made this one */
		waits = map_lookup(WAITS, &key);
	}
	if (waits) {
		__sync_fetch_and_add(&waits->count, 1);
		__sync_fetch_and_add(&waits->ns, ns);
		if (ns > waits->longest)
			waits->longest = ns;
	}
	return 0;
}

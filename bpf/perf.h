/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the measuring programs share: their maps, histograms of time, and the calls in
 * progress. ctrace/cost/objects.py holds the list of maps.
 */
#ifndef CTRACE_PERF_H
#define CTRACE_PERF_H

#include "ct.h"

#define STACKS MAP(0)	/* stack traces */
#define SAMPLES MAP(1)	/* hash: enum sampled << 32 | stack id (or -errno) -> u64 */
#define SLOTS MAP(2)	/* per-CPU array: struct slot, by enum timer */
#define TIMES MAP(3)	/* per-CPU array: u64, (point, protocol, bin) */
#define SERVICES MAP(4)	/* array: struct service, by service_index */
#define CALLS MAP(5)	/* LRU hash: struct call_key -> struct call */
#define BOUNDS MAP(6)	/* array of one struct bounds: addresses learned at start */
#define WAITING MAP(7)	/* LRU hash: struct waiting -> struct wait */
#define WAITS MAP(8)	/* hash: enum lock << 32 | stack id -> struct waits */
#define RECENT MAP(9)	/* per-CPU array: addresses of entries */

static long (*get_stackid)(void *ctx, u64 map, u64 flags) = (void *)27;

/* ctx: the arguments, or with kprobes struct pt_regs. */
#define ARG(ctx, n) \
	({ \
		u64 argument_; \
		LOAD(argument_, u64, ctx, ARG_##n); \
		argument_; \
	})
#define RESULT(ctx, function) \
	({ \
		u64 result_; \
		LOAD(result_, u64, ctx, RESULT_##function); \
		result_; \
	})

/* -- stacks -------------------------------------------------------------------------- */

enum sampled { SAMPLED_CLOCK, SAMPLED_INSERT, SAMPLED_DROP, SAMPLED_EVICT };

INLINE void sample_stack(u64 what, u32 id)
{
	u64 key = what << 32 | id, one = 1, *seen = map_lookup(SAMPLES, &key);

	if (seen)
		__sync_fetch_and_add(seen, 1);
	else
		map_update(SAMPLES, &key, &one, BPF_NOEXIST);
}

INLINE void sample(void *ctx, u64 what)
{
	sample_stack(what, get_stackid(ctx, STACKS, 0));
}

/* Where a few things lie, filled in by user space; 0: unknown. */
struct range {
	u64 start;
	u64 size;
};

struct bounds {
	struct range alloc;	/* __nf_conntrack_alloc */
	struct range free;	/* nf_conntrack_free */
	struct range locks;	/* nf_conntrack_locks */
	struct range all_lock;	/* nf_conntrack_locks_all_lock */
	struct range expect;	/* nf_conntrack_expect_lock */
};

INLINE struct bounds *bounds(void)
{
	u32 zero = 0;

	return map_lookup(BOUNDS, &zero);
}

INLINE bool within(const struct range *range, u64 address)
{
	return address - range->start < range->size;
}

/* -- time ------------------------------------------------------------------------------ */

/* Time is kept in quarter octaves: 4 bins for each power of two of nanoseconds. */
#define BINS 128
#define PROTOCOLS 3	/* tcp, udp, other */

enum point {
	POINT_COST,		/* nothing in between: what measuring itself takes */
	POINT_IN_NEW,		/* nf_conntrack_in, packet that made an entry */
	POINT_IN_ESTABLISHED,	/* nf_conntrack_in, packet of an entry that is there */
	POINT_IN_OTHER,		/* untracked, invalid, refused */
	POINT_CONFIRM,		/* __nf_conntrack_confirm */
	POINT_EARLY_DROP,	/* the scan for something to evict */
	POINT_GC,		/* one run of the collector */
	POINTS,
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

INLINE u32 protocol_index(u8 proto)
{
	return proto == IPPROTO_TCP ? 0 : proto == IPPROTO_UDP ? 1 : 2;
}

/* -- calls in progress ------------------------------------------------------------------- */

enum timer { TIMER_IN, TIMER_CONFIRM, TIMER_EARLY_DROP, TIMER_COST, TIMER_STACK, TIMER_GC };

struct slot {
	u64 key;	/* what the call is about: a packet */
	u64 at;
	u64 spare;
};

/* Some entries of which packets came lately: the table's chains are found from them. */
#define RECENT_BITS 6

INLINE void remember(u64 ct)
{
	u32 index = ct * 0x9e3779b97f4a7c15ULL >> (64 - RECENT_BITS);
	u64 *recent = map_lookup(RECENT, &index);

	if (recent)
		*recent = ct;
}

INLINE struct slot *slot_of(u32 timer)
{
	return map_lookup(SLOTS, &timer);
}

/*
 * A return probe does not know its call's arguments: a call is found again by task and
 * depth. The stack pointer, the same on both sides but for the return address, tells
 * when one of the two went unseen.
 */
#define DEPTH 2		/* a process and a softirq that interrupts it */
#define STACK_SLACK 64

struct call_key {
	u64 task;
	u64 timer;
};

struct frame {
	u64 key;
	u64 sp;
	u64 at;
};

struct call {
	u64 depth;
	struct frame frames[DEPTH];
};

INLINE u64 stack_pointer(void *ctx)
{
	u64 sp;

	LOAD(sp, u64, ctx, STACK_POINTER);
	return sp;
}

INLINE void enter_probe(void *ctx, u64 timer, u64 key)
{
	struct call_key where = { current_task(), timer };
	struct call *call = map_lookup(CALLS, &where);
	struct frame *frame;
	u64 depth;

	if (!call) {
		struct call none = {};

		map_update(CALLS, &where, &none, BPF_NOEXIST);
		call = map_lookup(CALLS, &where);
		if (!call)
			return;
	}
	depth = call->depth;
	if (depth >= DEPTH)
		depth = 0;	/* returns were missed: begin anew */
	/* the depth first: a softirq that comes now uses the frame above */
	*(volatile u64 *)&call->depth = depth + 1;
	asm volatile("" : "+r"(depth));	/* the mask is for the verifier: it must stay */
	frame = &call->frames[depth & (DEPTH - 1)];
	frame->key = key;
	frame->sp = stack_pointer(ctx);
	frame->at = boot_ns();
}

INLINE u64 leave_probe(void *ctx, u64 timer, u64 now, u64 *key)
{
	struct call_key where = { current_task(), timer };
	struct call *call = map_lookup(CALLS, &where);
	struct frame *frame;
	u64 depth, at, ns;

	if (!call)
		return 0;
	depth = call->depth;
	if (depth == 0 || depth > DEPTH)
		return 0;
	at = depth - 1;
	asm volatile("" : "+r"(at));	/* the mask is for the verifier: it must stay */
	frame = &call->frames[at & (DEPTH - 1)];
	if (stack_pointer(ctx) - frame->sp + STACK_SLACK > 2 * STACK_SLACK)
		return 0;
	*key = frame->key;
	ns = now - frame->at;
	*(volatile u64 *)&call->depth = depth - 1;
	return ns;
}

/*
 * Elsewhere an exit has its call's arguments, and one slot for each timer on this CPU will
 * do. What interrupts or preempts between entry and exit takes the slot over: the exit then
 * finds another packet's key and measures nothing, which is rare and falls on no kind of
 * packet in particular.
 */
INLINE void enter(void *ctx, u32 timer, u64 key)
{
	struct slot *slot;

	if (IS(KPROBE)) {
		enter_probe(ctx, timer, key);
		return;
	}
	slot = slot_of(timer);
	if (slot) {
		slot->key = ARG(ctx, 0);
		slot->spare = key;
		slot->at = boot_ns();
	}
}

/* How long the innermost call took, and what it was about; 0: its entry was not seen. */
INLINE u64 leave(void *ctx, u32 timer, u64 now, u64 *key)
{
	struct slot *slot;

	if (IS(KPROBE))
		return leave_probe(ctx, timer, now, key);
	slot = slot_of(timer);
	if (!slot || slot->key != ARG(ctx, 0))
		return 0;
	slot->key = 0;
	*key = slot->spare;
	return now - slot->at;
}

#endif

// SPDX-License-Identifier: GPL-2.0
/*
 * The hook families that attach to conntrack's functions: fentry/fexit, or kprobes and
 * return probes. They cost per connection, never per packet.
 *
 *   __nf_conntrack_hash_insert      every insert, but for one sort of clash
 *   nf_conntrack_hash_check_insert  bracket: an insert by ctnetlink or a BPF program
 *   __nf_conntrack_alloc            fails: a packet refused
 *   __nf_conntrack_confirm          which packet; NF_DROP: the table refused the entry
 *   nf_ct_resolve_clash             merged, inserted beside the winner, or refused
 *   nf_conntrack_free               every end (nf_ct_delete is split by compilers)
 *   early_drop, gc_worker           brackets: who freed an entry before its time
 *
 * HAVE_<function> tells those that are attached to, RESULT_<function> where an exit finds
 * its result: fexit programs behind the arguments, however many this kernel's function has
 * (ARGS_<function>), return probes in a register.
 */
#include <linux/types.h>
#include "ct.h"
#include "look.h"

/* Ours, behind those of bpf/maps.h; ctrace/capture/hooks/function_hooks.py holds the same list. */
#define CALLS MAP(OWN_MAPS)		/* hash: struct call_key -> struct call */
#define CPU_STATE MAP(OWN_MAPS + 1)	/* per-CPU array of one struct cpu_state */

#define NF_DROP 0
#define NF_ACCEPT 1
#define IPS_NAT_CLASH (1 << 12)

/* What a program is given: the arguments, or with kprobes struct pt_regs. */
struct context;

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

/* -- calls in progress ---------------------------------------------------------------- */

/*
 * An exit finds its entry by task and function, last in first out: a process can be
 * preempted and moved to another CPU, and a softirq can interrupt it on its own stack.
 */
enum function {
	CALL_ALLOC,
	CALL_CONFIRM,
	CALL_CLASH,
	CALL_CLASH_LOST,		/* no function: nf_ct_resolve_clash gave up, confirm will drop */
	CALL_TABLE_FULL,		/* no function: early_drop found nothing, alloc will fail */
	CALL_USER,
	CALL_EARLY_DROP,
	CALL_GC,
};

#define DEPTH 2	/* a process and a softirq that interrupts it */

struct frame {
	u64 args[4];
	u32 at;			/* jiffies */
	u32 softirq;
};

struct call_key {
	u64 task;
	u64 function;
};

struct call {
	u64 depth;
	struct frame frames[DEPTH];
};

struct cpu_state {
	u64 skb;		/* that __nf_conntrack_confirm was last called with */
	u64 entered;		/* calls in progress and those whose return went unseen: */
	u64 left;		/* the difference of these two, over all CPUs */
	u64 lost;		/* calls that could not be kept */
};

INLINE struct cpu_state *cpu_state(void)
{
	u32 zero = 0;

	return map_lookup(CPU_STATE, &zero);
}

INLINE void enter(u64 function, u64 a, u64 b, u64 c, u64 d)
{
	struct call_key key = { current_task(), function };
	struct call *call = map_lookup(CALLS, &key);
	struct cpu_state *state = cpu_state();
	struct frame *frame;
	u64 depth;

	if (!state)
		return;
	if (!call) {
		struct call none = {};

		if (map_update(CALLS, &key, &none, BPF_NOEXIST)) {
			__sync_fetch_and_add(&state->lost, 1);
			return;
		}
		call = map_lookup(CALLS, &key);
		if (!call)
			return;
	}
	depth = call->depth;
	if (depth >= DEPTH) {
		__sync_fetch_and_add(&state->lost, 1);
		depth = 0;	/* returns were missed: begin anew */
	}
	/* the depth first: a softirq that comes now uses the frame above */
	*(volatile u64 *)&call->depth = depth + 1;
	frame = &call->frames[depth & (DEPTH - 1)];
	frame->args[0] = a;
	frame->args[1] = b;
	frame->args[2] = c;
	frame->args[3] = d;
	frame->at = jiffies64();
	frame->softirq = !in_task();
	__sync_fetch_and_add(&state->entered, 1);
}

/* The innermost call of the function on this task and in this context, or NULL. */
INLINE struct frame *innermost(const struct call_key *key, struct call **found)
{
	struct call *call = map_lookup(CALLS, key);
	struct frame *frame;
	u64 depth;

	*found = call;
	if (!call)
		return NULL;
	depth = call->depth;
	if (depth == 0 || depth > DEPTH)
		return NULL;
	frame = &call->frames[(depth - 1) & (DEPTH - 1)];
	return frame->softirq == !in_task() ? frame : NULL;
}

/* Ends the innermost call; false when its entry was not seen. */
INLINE bool leave(u64 function, u64 args[4])
{
	struct call_key key = { current_task(), function };
	struct call *call;
	struct frame *frame = innermost(&key, &call);
	struct cpu_state *state = cpu_state();
	u64 depth;

	if (!frame || !call || !state)
		return false;
	args[0] = frame->args[0];
	args[1] = frame->args[1];
	args[2] = frame->args[2];
	args[3] = frame->args[3];
	depth = call->depth;
	if (depth <= 1)
		map_delete(CALLS, &key);
	else
		*(volatile u64 *)&call->depth = depth - 1;
	__sync_fetch_and_add(&state->left, 1);
	return true;
}

/* Whether we run inside the function; a call older than `seconds` has missed its return. */
INLINE bool inside(u64 function, u32 seconds)
{
	struct call_key key = { current_task(), function };
	struct call *call;
	struct frame *frame = innermost(&key, &call);

	return frame && (u32)jiffies64() - frame->at < seconds * VALUE(HZ);
}

/* -- insert --------------------------------------------------------------------------- */

INLINE u64 ct_of(u64 skb)
{
	return read64(skb + VALUE(SKB_NFCT)) & NFCT_PTR;
}

/* Where the packet that is being confirmed goes: LOCAL_IN and POST_ROUTING set these. */
INLINE u8 direction_of(u64 skb)
{
	u32 received;
	u64 dev;

	if (!HAS(SKB_IIF) || !HAS(DEV_IFINDEX))
		return CTRACE_D_UNKNOWN;
	received = read32(skb + VALUE(SKB_IIF));
	if (!received)
		return CTRACE_D_OUT;
	dev = read64(skb + VALUE(SKB_DEV));
	if (!dev)
		return CTRACE_D_UNKNOWN;
	return read32(dev + VALUE(DEV_IFINDEX)) == received ? CTRACE_D_IN : CTRACE_D_FORWARD;
}

int on_insert(struct context *ctx)
{
	struct cpu_state *state = cpu_state();
	u64 ct = ARG(ctx, 0), skb = state ? state->skb : 0;
	u8 reason = CTRACE_R_NEW, direction = CTRACE_D_UNKNOWN;

	/* confirm's packet, if it was this CPU's last; it says more than the entry does */
	if (skb && ct_of(skb) == ct)
		direction = direction_of(skb);
	else if (inside(CALL_USER, 60))
		reason = CTRACE_R_USER;
	emit_insert(ct, reason, direction);
	return 0;
}

int user_enter(struct context *ctx)
{
	enter(CALL_USER, 0, 0, 0, 0);
	return 0;
}

int user_leave(struct context *ctx)
{
	u64 args[4];

	leave(CALL_USER, args);
	return 0;
}

/* -- refused by confirm ------------------------------------------------------------------ */

int confirm_enter(struct context *ctx)
{
	struct cpu_state *state = cpu_state();
	u64 skb = ARG(ctx, 0);

	if (state)
		state->skb = skb;
	if (IS(KPROBE))
		enter(CALL_CONFIRM, skb, 0, 0, 0);
	return 0;
}

int confirm_leave(struct context *ctx)
{
	u64 args[4], lost[4], skb, ct;
	struct entry e;
	u8 reason;

	if (IS(KPROBE)) {
		if (!leave(CALL_CONFIRM, args))
			return 0;
		skb = args[0];
	} else {
		skb = ARG(ctx, 0);
	}
	if ((u32)RESULT(ctx, __nf_conntrack_confirm) != NF_DROP)
		return 0;
	ct = ct_of(skb);
	read_entry(&e, ct);
	if (leave(CALL_CLASH_LOST, lost))
		reason = CTRACE_R_CLASH;
	else if (was_inserted(&e))
		return 0;	/* a clone of a packet whose entry is in already */
	/*
	 * The only other refusals are a dying entry and, when a module that extends
	 * entries was just unloaded, one with extensions of old.
	 */
	else if (HAS(STAT_CHAIN) && !(GET(&e, u32, CT_STATUS) & IPS_DYING))
		reason = CTRACE_R_CHAIN_TOO_LONG;
	else
		reason = CTRACE_R_FAILED;
	emit_insert_failed_read(&e, ct, reason, direction_of(skb));
	return 0;
}

int clash_enter(struct context *ctx)
{
	u64 skb = ARG(ctx, 0);

	enter(CALL_CLASH, skb, ct_of(skb), 0, 0);
	return 0;
}

int clash_leave(struct context *ctx)
{
	u64 args[4], ct;

	if (!leave(CALL_CLASH, args))
		return 0;
	if ((u32)RESULT(ctx, nf_ct_resolve_clash) == NF_DROP) {
		if (IS(HAVE___nf_conntrack_confirm))
			enter(CALL_CLASH_LOST, 0, 0, 0, 0);
		else
			emit_insert_failed(args[1], CTRACE_R_CLASH, direction_of(args[0]));
		return 0;
	}
	ct = ct_of(args[0]);
	if (ct == args[1])	/* its own entry still: inserted for the reply direction */
		emit_insert(ct, CTRACE_R_NAT_CLASH, direction_of(args[0]));
	else
		count(netns_of(read64(ct + VALUE(CT_NET))), CTRACE_R_CLASH_RESOLVED, 1);
	return 0;
}

/* -- refused before there was an entry --------------------------------------------------- */

/*
 * Whether a process is sending this packet: receiving runs in a softirq or, for a
 * packet that a process writes to a tap device, with softirqs off.
 */
#define SOFTIRQ_OFF 0xfe00

INLINE bool is_sending(void)
{
	return !(interrupts() & (INTERRUPT_BITS | SOFTIRQ_OFF));
}

int alloc_enter(struct context *ctx)
{
	/* a hash of 0 is nf_conntrack_alloc()'s, for ctnetlink and BPF: no packet waits */
	u64 packet = (u32)ARG(ctx, 5) != 0;

	enter(CALL_ALLOC, ARG(ctx, 0), read16(ARG(ctx, 1)) | packet << 16, ARG(ctx, 2), ARG(ctx, 3));
	return 0;
}

int alloc_leave(struct context *ctx)
{
	u64 args[4], full[4];
	u8 reason = CTRACE_R_TABLE_FULL;

	if (IS(KPROBE) && !leave(CALL_ALLOC, args))
		return 0;
	if (RESULT(ctx, __nf_conntrack_alloc) < -4095ULL)
		return 0;
	if (!IS(KPROBE)) {
		args[0] = ARG(ctx, 0);
		args[1] = read16(ARG(ctx, 1)) | (u64)((u32)ARG(ctx, 5) != 0) << 16;
		args[2] = ARG(ctx, 2);
		args[3] = ARG(ctx, 3);
	}
	if (IS(HAVE_early_drop) && !leave(CALL_TABLE_FULL, full))
		reason = CTRACE_R_NO_MEMORY;
	if (args[1] >> 16)
		emit_drop(args[0], args[2], args[3], (u16)args[1], reason,
			  is_sending() ? CTRACE_D_OUT : CTRACE_D_UNKNOWN);
	return 0;
}

/* -- the end ---------------------------------------------------------------------------- */

int early_drop_enter(struct context *ctx)
{
	enter(CALL_EARLY_DROP, 0, 0, 0, 0);
	return 0;
}

int early_drop_leave(struct context *ctx)
{
	u64 args[4];

	if (leave(CALL_EARLY_DROP, args) && !(u8)RESULT(ctx, early_drop))
		enter(CALL_TABLE_FULL, 0, 0, 0, 0);
	return 0;
}

int gc_enter(struct context *ctx)
{
	struct call_key key = { current_task(), CALL_GC };

	map_delete(CALLS, &key);	/* a worker's outermost function */
	enter(CALL_GC, 0, 0, 0, 0);
	return 0;
}

int gc_leave(struct context *ctx)
{
	u64 args[4];

	leave(CALL_GC, args);
	return 0;
}

/* Who frees an entry before its time: early_drop spares ASSURED ones, gc_worker not all. */
INLINE u8 why_unexpired(const struct entry *e)
{
	if (IS(HAVE_gc_worker) && inside(CALL_GC, 60))
		return CTRACE_R_GC_PRESSURE;
	if (IS(HAVE_early_drop) && !(GET(e, u32, CT_STATUS) & IPS_ASSURED) &&
	    inside(CALL_EARLY_DROP, 1))
		return CTRACE_R_EVICTED;
	if (IS(HAVE_gc_worker) && IS(HAVE_early_drop))
		return CTRACE_R_DELETED;
	return CTRACE_R_GONE;
}

int on_free(struct context *ctx)
{
	u64 ct = ARG(ctx, 0);
	struct entry e;
	u32 netns;
	u8 reason;

	read_entry(&e, ct);
	if (!was_inserted(&e))
		return 0;
	netns = netns_of(GET(&e, u64, CT_NET));
	reason = is_expired(&e) ? CTRACE_R_EXPIRED : why_unexpired(&e);
	count(netns, reason, 1);
	emit_life(&e, ct, netns, CTRACE_DESTROY, reason, true);
	return 0;
}

/* args[0]: the entry to look at */
int look(u64 *args)
{
	return look_at(args[0]);
}

// SPDX-License-Identifier: GPL-2.0
/*
 * The hook family without function hooks (6.4, CONFIG_NETFILTER_BPF_LINK): netfilter
 * links just before conntrack's own confirm hook, and two tracepoints.
 *
 *   nf_confirm       LOCAL_IN and POST_ROUTING at INT_MAX-2: a candidate for the table
 *   nf_free          kmem_cache_free: the end of an entry, or of a candidate that lost
 *   nf_drop          kfree_skb: a packet that conntrack refused
 *   nf_baseline      run once per namespace and CPU: the kernel's counters from here on
 *   nf_forget        run likewise when a namespace is let go
 *
 * A candidate is recorded at once and *retracted* (CTRACE_RETRACT) when it turns out
 * that it never entered the table; user space drops the pair. Refusals are told from
 * rules' drops by the kernel's own per-CPU counters, which it raises just before it
 * frees the packet: no hook per packet is needed for them.
 */
#include <linux/types.h>
#include "ct.h"
#include "look.h"

#define CTRACE_RETRACT 0	/* never leaves ctrace/capture/hooks/netfilter.py */

/* SETTINGS */
#define FREE_START 0	/* nf_conntrack_free: where kmem_cache_free is called from */
#define FREE_SIZE 1
#define EVICT_START 2	/* early_drop */
#define EVICT_SIZE 3
#define GC_START 4	/* gc_worker */
#define GC_SIZE 5
#define LEARNED_NET 6	/* struct net of the task that ran nf_baseline, */
#define LEARNED_COUNT 7	/* and where its table's size and the limit are */
#define LEARNED_MAX 8
#define SETTING(i) (((volatile u64 *)bpf_pseudo_fd(2, 1000001 + 5))[i])

#define NF_ACCEPT 1
#define LOCAL_IN 1

struct hook_context {
	u64 state;
	u64 skb;
};

struct tracepoint {
	u64 args[3];
};

/* -- what this context (a task, or a CPU's softirq) put forward last ------------------ */

struct slot {
	u64 context;
	u64 ct;
	u64 skb;	/* 0 once the packet was refused */
	u64 hash;	/* of the tuple: tells two lives of one address apart */
	u64 owner;	/* the process that sent here last, */
	u64 cgroup;
	u32 named;	/* and when OWNERS was last asked for it, */
	u32 when;	/* and when this was put forward, both in jiffies */
};

INLINE u64 context_key(bool task)
{
	return task ? current_task() : (u64)this_cpu() << 1 | 1;
}

/* The place of a context's slot; another context's may be in it. */
INLINE struct slot *slot_place(u64 context)
{
	u32 place = context * 0x9e3779b97f4a7c15ULL >> (64 - VALUE(SLOT_BITS));

	return map_lookup(SLOTS, &place);
}

INLINE struct slot *slot_of(u64 context)
{
	struct slot *slot = slot_place(context);

	return slot && slot->context == context ? slot : map_lookup(SCRATCH, &context);
}

/* The same to write to: the place is free a second after its context used it last. */
INLINE struct slot *own_slot(u64 context, u32 now)
{
	struct slot *slot = slot_place(context);

	if (!slot || slot->context == context)
		return slot;
	if (now - slot->when > VALUE(HZ)) {
		slot->context = context;
		return slot;
	}
	slot = map_lookup(SCRATCH, &context);
	if (!slot) {
		struct slot fresh = {};

		map_update(SCRATCH, &context, &fresh, 0);
		slot = map_lookup(SCRATCH, &context);
	}
	return slot;
}

INLINE u64 saved_hash(const struct entry *e)
{
	return GET(e, u64, CT_HASH_SAVED);
}

/* -- confirm ---------------------------------------------------------------------------- */

/* The first of VRF's two POST_ROUTING rounds, where nf_confirm() does nothing. */
INLINE bool in_vrf_round(void *state)
{
	void *device;
	u64 flags;

	if (!HAS(STATE_OUT) || !HAS(DEV_PRIV_FLAGS) || !HAS(L3MDEV_MASTER))
		return false;
	LOAD(device, u64, state, STATE_OUT);
	if (!device)
		return false;
	LOAD(flags, u32, device, DEV_PRIV_FLAGS);
	return flags & VALUE(L3MDEV_MASTER);
}

/* What nf_free and nf_drop may have to take back. */
INLINE struct slot *put_forward(const struct entry *e, u64 ct, u64 skb, bool task)
{
	u32 now = jiffies64();
	struct slot *slot = own_slot(context_key(task), now);

	if (!slot)
		return NULL;
	slot->ct = ct;
	slot->skb = skb;
	slot->hash = saved_hash(e);
	slot->when = now;
	return slot;
}

/* As cgroup_of(), which a process that goes on sending asks once a second only. */
INLINE u64 sender_cgroup(struct slot *slot, u64 owner)
{
	if (!slot)
		return cgroup_of(owner);
	if (slot->owner != owner || slot->when - slot->named > VALUE(HZ)) {
		slot->cgroup = cgroup_of(owner);
		slot->owner = owner;
		slot->named = slot->when;
	}
	return slot->cgroup;
}

int nf_confirm(struct hook_context *ctx)
{
	void *skb, *state, *net;
	u64 nfct, hook, arrived, inum, ct, owned[2] = {};
	struct slot *slot;
	struct entry e;
	u8 direction;
	bool task;

	LOAD(skb, u64, ctx, BPF_NF_SKB);
	LOAD(nfct, u64, skb, SKB_NFCT);
	/* only IP_CT_RELATED (1) and IP_CT_NEW (2) can be on their way into the table */
	if (((nfct & NFCT_INFO) - 1) > 1)
		return NF_ACCEPT;
	ct = nfct & NFCT_PTR;
	if (!ct)
		return NF_ACCEPT;
	if (read64(ct + VALUE(CT_PPREV)))
		return NF_ACCEPT;

	LOAD(state, u64, ctx, BPF_NF_STATE);
	LOAD(hook, u8, state, STATE_HOOK);
	LOAD(arrived, u32, skb, SKB_IIF);
	if (hook == LOCAL_IN)
		direction = CTRACE_D_IN;
	else if (in_vrf_round(state))
		return NF_ACCEPT;
	else
		direction = arrived ? CTRACE_D_FORWARD : CTRACE_D_OUT;
	LOAD(net, u64, state, STATE_NET);
	LOAD(inum, u32, net, NET_INUM);
	task = in_task();
	read_common(&e, ct);
	READ_WORD(&e, ct, CT_HASH_SAVED);
	if (HAS(CT_TCP_STATE))
		READ_WORD(&e, ct, CT_TCP_STATE);
	slot = put_forward(&e, ct, (u64)skb, task);
	count(inum, CTRACE_R_NEW, 1);
	/* IPS_CONFIRMED is set a moment later: said already */
	PUT(&e, u32, CT_STATUS, GET(&e, u32, CT_STATUS) | IPS_CONFIRMED);
	if (!record_wanted(&e, inum, CTRACE_INSERT))
		return NF_ACCEPT;
	/* whoever runs while a packet arrives or passes through is not its owner */
	if (direction == CTRACE_D_OUT && task)
		owned[0] = current_key();
	if (owned[0])
		owned[1] = sender_cgroup(slot, owned[0]);
	emit(&e, ct, inum, CTRACE_INSERT, CTRACE_R_NEW, direction, owned);
	return NF_ACCEPT;
}

/* -- the kernel's own numbers, per namespace ------------------------------------------------ */

struct baseline {
	u32 valid;
	u32 drop;
	u32 insert_failed;
	u32 chain;
};

/*
 * Whether a refusal just now was for a full table, or for lack of memory. Other CPUs may
 * have freed some entries since.
 */
INLINE bool is_full(const struct tally *table)
{
	u64 max;

	if (!table || !table->size || !table->max)
		return true;	/* not known: said in info.blind */
	max = read32(table->max);
	return read32(table->size) + max / 64 + 64 >= max;
}

/*
 * Whether nothing is being evicted: early_drop() runs at the limit only, gc_worker()
 * gives up entries above 95 % of it (nf_conntrack_max95). The distance allows for what
 * other CPUs free between that look at the table and ours.
 */
INLINE bool has_room(const struct tally *table)
{
	u64 max;

	if (!table || !table->size || !table->max)
		return false;
	max = read32(table->max);
	return read32(table->size) + max / 8 + 1024 < max;
}

/* -- free ---------------------------------------------------------------------------------- */

#define FRAMES 12
/* Who frees an entry before its time is told by the call stack, which costs microseconds. */
INLINE u8 why_unexpired(void *ctx)
{
	u64 frames[FRAMES] = {};
	u64 evict = SETTING(EVICT_START), evict_size = SETTING(EVICT_SIZE);
	u64 gc = SETTING(GC_START), gc_size = SETTING(GC_SIZE);
	int i;

	get_stack(ctx, frames, sizeof(frames), 0);
#pragma unroll
	for (i = 0; i < FRAMES; i++) {
		if (frames[i] - evict < evict_size)
			return CTRACE_R_EVICTED;
		if (frames[i] - gc < gc_size)
			return CTRACE_R_GC_PRESSURE;
	}
	return CTRACE_R_DELETED;
}

/*
 * What neither early_drop nor gc_worker takes before its time: early_drop spares ASSURED
 * entries, gc_worker those of them that no protocol gives up (tcp_can_early_drop: TCP that
 * is closing; SCTP and DCCP likewise).
 */
INLINE bool is_spared(const struct entry *e)
{
	u8 proto = GET(e, u8, ORIG_PROTO);

	if (!(GET(e, u32, CT_STATUS) & IPS_ASSURED))
		return false;
	if (HAS(CT_TCP_STATE) && proto == IPPROTO_TCP)
		return GET(e, u8, CT_TCP_STATE) < TCP_FIN_WAIT;
	return proto != IPPROTO_TCP && proto != IPPROTO_SCTP && proto != IPPROTO_DCCP;
}

INLINE void retract(const struct entry *e, u64 ct)
{
	struct slot *slot = slot_of(context_key(in_task()));
	u64 nothing[2] = {};
	u32 netns;

	if (!slot || slot->ct != ct || slot->hash != saved_hash(e) ||
	    (u32)jiffies64() - slot->when > VALUE(HZ))
		return;
	slot->ct = 0;
	netns = netns_of(GET(e, u64, CT_NET));
	count(netns, CTRACE_R_NONE, 1);
	if (slot->skb)
		count(netns, CTRACE_R_CLASH_RESOLVED, 1);
	if (!flow_wanted(e, netns))
		return;
	emit(e, ct, netns, CTRACE_RETRACT, CTRACE_R_NONE, CTRACE_D_UNKNOWN, nothing);
}

int nf_free(struct tracepoint *ctx)
{
	struct tally *tally;
	struct entry e;
	u8 reason;
	u32 netns;
	u64 ct;

	if (ctx->args[0] - SETTING(FREE_START) >= SETTING(FREE_SIZE))
		return 0;
	ct = ctx->args[1];
	if (!read64(ct + VALUE(CT_PPREV))) {
		read_entry(&e, ct);
		retract(&e, ct);
		return 0;
	}
	read_common(&e, ct);
	read_life(&e, ct);
	netns = netns_of(GET(&e, u64, CT_NET));
	tally = tally_of(netns);
	if (is_expired(&e))
		reason = CTRACE_R_EXPIRED;
	else if (is_spared(&e) || has_room(tally))
		reason = CTRACE_R_DELETED;
	else
		reason = why_unexpired(ctx);
	add(tally, reason, 1);
	emit_life(&e, ct, netns, CTRACE_DESTROY, reason, false);
	return 0;
}

/* -- drop ---------------------------------------------------------------------------------- */

#define COUNTERS 16

/* The counters that the array below holds; others, by themselves. */
INLINE u32 counter(const u32 *counters, u64 stat, u64 offset)
{
	if (offset < COUNTERS * sizeof(u32))
		return *(u32 *)((u8 *)counters + offset);
	return read32(stat + offset);
}

INLINE void read_counters(struct baseline *to, u64 net)
{
	struct cpu_place *place = cpu_place();
	u64 distance = place ? place->distance : 0;
	u64 stat = read64(net + VALUE(NET_STAT)) + distance;

	u32 counters[COUNTERS] = {};

	probe_read(counters, sizeof(counters), (void *)stat);
	to->valid = distance != 0;
	to->drop = counter(counters, stat, VALUE(STAT_DROP));
	to->insert_failed = counter(counters, stat, VALUE(STAT_INSERT_FAILED));
	to->chain = counter(counters, stat, VALUE(STAT_CHAIN));
}

/* The network namespace of a packet, wherever it stands. */
INLINE u64 net_of(u64 sk, u64 device, u64 dst)
{
	if (sk)
		return read64(sk + VALUE(SOCK_NET));
	if (!device)
		device = read64((dst & ~1ULL) + VALUE(DST_DEV));
	return device ? read64(device + VALUE(DEV_NET)) : 0;
}

/* ICMP queries only: conntrack tracks no other ICMP packet as new. */
INLINE u8 inverse_icmp(u8 type, u16 family)
{
	if (family == AF_INET6) {
		if (type == 128 || type == 129)
			return type ^ 1;
		return type == 139 ? 140 : type == 140 ? 139 : type;
	}
	switch (type) {
	case 8:
		return 0;
	case 0:
		return 8;
	case 13:
		return 14;
	case 14:
		return 13;
	case 15:
		return 16;
	case 16:
		return 15;
	case 17:
		return 18;
	case 18:
		return 17;
	}
	return type;
}

/* The tuples that the packet would have had, as nf_ct_get_tuple() and its inverse. */
INLINE bool packet_tuples(struct entry *e, u64 skb)
{
	u64 head = read64(skb + VALUE(SKB_HEAD)), packet = head + read16(skb + VALUE(SKB_NETWORK));
	u8 version = read8(packet) >> 4, proto;
	u16 family, sport = 0, dport = 0, reply_sport, reply_dport;
	u64 transport;
	int i;

	if (version == 4) {
		family = AF_INET;
		proto = read8(packet + 9);
		transport = packet + (read8(packet) & 15) * 4;
		PUT(e, u32, ORIG_SRC, read32(packet + 12));
		PUT(e, u32, ORIG_DST, read32(packet + 16));
		PUT(e, u32, REPLY_SRC, GET(e, u32, ORIG_DST));
		PUT(e, u32, REPLY_DST, GET(e, u32, ORIG_SRC));
	} else if (version == 6) {
		family = AF_INET6;
		proto = read8(packet + 6);
		transport = packet + 40;
#pragma unroll
		for (i = 0; i < 4; i++) {	/* hop-by-hop, routing, destination options */
			if (proto != 0 && proto != 43 && proto != 60)
				break;
			proto = read8(transport);
			transport += (read8(transport + 1) + 1) * 8;
		}
		probe_read(FIELD(e, ORIG_SRC), 16, (void *)(packet + 8));
		probe_read(FIELD(e, ORIG_DST), 16, (void *)(packet + 24));
		probe_read(FIELD(e, REPLY_SRC), 16, (void *)(packet + 24));
		probe_read(FIELD(e, REPLY_DST), 16, (void *)(packet + 8));
	} else {
		return false;
	}
	if (proto == IPPROTO_ICMP || proto == IPPROTO_ICMPV6) {
		u8 type = read8(transport), code = read8(transport + 1);

		sport = read16(transport + 4);
		dport = host16((u16)type << 8 | code);
		reply_sport = sport;
		reply_dport = host16((u16)inverse_icmp(type, family) << 8 | code);
	} else {
		if (proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_UDPLITE ||
		    proto == IPPROTO_SCTP) {
			sport = read16(transport);
			dport = read16(transport + 2);
		}
		reply_sport = dport;
		reply_dport = sport;
	}
	PUT(e, u16, ORIG_SPORT, sport);
	PUT(e, u16, ORIG_DPORT, dport);
	PUT(e, u16, REPLY_SPORT, reply_sport);
	PUT(e, u16, REPLY_DPORT, reply_dport);
	PUT(e, u16, ORIG_L3NUM, family);
	PUT(e, u8, ORIG_PROTO, proto);
	return true;
}

#define SKB_START 128

/* A word of the packet's description, of which `start` is the start. */
INLINE u64 skb_word(const struct entry *start, u64 skb, u64 offset)
{
	if (offset + 8 <= SKB_START)
		return *(u64 *)((u8 *)start->words + offset);
	return read64(skb + offset);
}

int nf_drop(struct tracepoint *ctx)
{
	struct baseline *before, now = {};
	struct entry e;
	u64 skb, sk, device, dst, nfct, ct, net;
	u32 netns;

	/* a packet that comes back from a queue is freed without a reason (nf_reinject) */
	if ((u32)ctx->args[2] != VALUE(DROP_REASON) && (u32)ctx->args[2] != VALUE(NO_REASON))
		return 0;
	skb = ctx->args[0];
	/* once for all: this hook sees every dropped packet; `e` has the room */
	if (probe_read(e.words, SKB_START, (void *)skb))
		return 0;
	nfct = skb_word(&e, skb, VALUE(SKB_NFCT));
	sk = skb_word(&e, skb, VALUE(SKB_SK));
	device = skb_word(&e, skb, VALUE(SKB_DEV));
	dst = skb_word(&e, skb, VALUE(SKB_DST));
	ct = nfct & NFCT_PTR;
	if ((nfct & NFCT_INFO) == CTINFO_UNTRACKED)
		return 0;
	if (ct && read64(ct + VALUE(CT_PPREV)))
		return 0;	/* a rule dropped a packet of an entry in the table */
	net = ct ? read64(ct + VALUE(CT_NET)) : net_of(sk, device, dst);
	if (!net)
		return 0;
	netns = netns_of(net);
	before = map_lookup(BASELINE, &netns);
	if (!before || !before->valid)
		return 0;
	read_counters(&now, net);
	if (now.insert_failed != before->insert_failed && ct) {
		struct slot *slot = slot_of(context_key(in_task()));
		u8 reason = now.chain != before->chain ? CTRACE_R_CHAIN_TOO_LONG :
			    now.drop != before->drop   ? CTRACE_R_CLASH :
							 CTRACE_R_FAILED;

		*before = now;
		if (slot && slot->ct == ct)
			slot->skb = 0;
		read_entry(&e, ct);
		emit_insert_failed_read(&e, ct, reason, CTRACE_D_UNKNOWN);
	} else if (now.drop != before->drop && !ct) {
		u32 several = now.drop - before->drop;
		struct tally *tally = tally_of(netns);
		u8 reason = is_full(tally) ? CTRACE_R_TABLE_FULL : CTRACE_R_NO_MEMORY;

		*before = now;
		/* more than one: packets whose own tuple went by unseen */
		if (several > 1)
			add(tally, reason, several - 1);
		__builtin_memset(&e, 0, sizeof(e));
		packet_tuples(&e, skb);
		emit_drop_read(&e, net, reason,
			       sk ? CTRACE_D_OUT : CTRACE_D_UNKNOWN);
	}
	return 0;
}

/* Where the number behind an open /proc/sys/net file of the current task is. */
INLINE u64 sysctl_address(u64 fd)
{
	u64 files, file, inode;

	if (!HAS(PROC_SYSCTL_ENTRY))
		return 0;
	files = read64(current_task() + VALUE(TASK_FILES));
	file = read64(read64(read64(files + VALUE(FILES_FDT)) + VALUE(FDT_FD)) + 8 * fd);
	inode = read64(file + VALUE(FILE_INODE));
	return read64(read64(inode - VALUE(PROC_VFS_INODE) + VALUE(PROC_SYSCTL_ENTRY)) +
		      VALUE(CTL_DATA));
}

/*
 * args[0]: the namespace; args[1], args[2]: where its table's size and the limit are. Or 0
 * for the namespace of the task that runs this, and descriptors of the two sysctl files.
 */
int nf_baseline(struct tracepoint *ctx)
{
	struct baseline now = {};
	u64 net = ctx->args[0], size = ctx->args[1], max = ctx->args[2];
	struct tally *tally;
	u32 netns;

	if (!net) {
		net = read64(read64(current_task() + VALUE(TASK_NSPROXY)) + VALUE(NSPROXY_NET));
		size = sysctl_address(size);
		max = sysctl_address(max);
	}
	SETTING(LEARNED_NET) = net;
	SETTING(LEARNED_COUNT) = size;
	SETTING(LEARNED_MAX) = max;
	netns = netns_of(net);
	read_counters(&now, net);
	map_update(BASELINE, &netns, &now, 0);
	tally = own_tally(netns, true);
	if (tally) {
		tally->size = size;
		tally->max = max;
	}
	return 0;
}

/* args[0]: inode number of a namespace that is let go: its table's size may be freed */
int nf_forget(struct tracepoint *ctx)
{
	struct tally *tally = own_tally(ctx->args[0], false);

	if (tally)
		tally->size = 0;
	return 0;
}

/* args[0]: the entry to look at */
int look(u64 *args)
{
	return look_at(args[0]);
}

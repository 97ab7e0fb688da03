/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What differs from kernel to kernel, from machine to machine and from call to call is not
 * compiled in: user space writes it into the instructions when it loads them
 * (ctrace/kernel/programs.py), so one compiled program serves all. The verifier then
 * takes each as the constant that it is, and removes what cannot be reached.
 *
 * Offsets are named after struct and member (ctrace/kernel/layout.py), filters F_*
 * (ctrace/kernel/objects.py).
 */
#ifndef CTRACE_CONSTANTS_H
#define CTRACE_CONSTANTS_H

enum constant {
	/* the machine and what the kernel's programs may do */
	K_HZ, K_FETCH_ADD, K_TASK_BTF, K_RDONLY_CAST, K_RDONLY_TYPE,
	/* struct sk_buff and what it leads to */
	K_SKB_NFCT, K_SKB_HEAD, K_SKB_NETWORK, K_SKB_DEV, K_SKB_SK, K_SKB_IIF, K_SKB_DST,
	K_DST_DEV, K_DEV_NET, K_DEV_IFINDEX, K_DEV_PRIV_FLAGS, K_L3MDEV_MASTER, K_SOCK_NET,
	K_NO_REASON, K_DROP_REASON,
	/* struct nf_conn; ORIG_ and REPLY_ are fields of its two tuples, from its start */
	K_CT_BYTES, K_CT_LISTS, K_CT_TUPLEHASH, K_CT_PPREV, K_CT_TIMEOUT, K_CT_STATUS, K_CT_NET,
	K_CT_ZONE, K_CT_MARK, K_CT_EXT, K_CT_PROTO,
	K_CT_HASH_SAVED,	/* where __nf_conntrack_alloc() leaves the hash until the insert */
	K_CT_TCP_STATE, K_CT_TCP_RETRANS, K_CT_TCP_LAST_INDEX, K_CT_TCP_LAST_WIN,
	K_CT_TCP_FLAGS0, K_CT_TCP_FLAGS1, K_CT_UDP_STREAM_TS, K_CT_SCTP_STATE,
	K_ORIG, K_ORIG_SRC, K_ORIG_SRC8, K_ORIG_SPORT, K_ORIG_L3NUM, K_ORIG_DST, K_ORIG_DST8,
	K_ORIG_DPORT, K_ORIG_PROTO,
	K_REPLY, K_REPLY_SRC, K_REPLY_SRC8, K_REPLY_SPORT, K_REPLY_DST, K_REPLY_DST8,
	K_REPLY_DPORT, K_REPLY_PROTO,
	K_TUPLE_PROTO, K_HASH_PPREV, K_HASH_DIR, K_EXT_TIMEOUT,
	/* struct net */
	K_NET_INUM, K_NET_STAT, K_NET_TCP_TIMEOUTS, K_NET_TCP_MAX_RETRANS, K_NET_UDP_TIMEOUTS,
	K_NET_ICMP_TIMEOUT, K_NET_ICMPV6_TIMEOUT, K_NET_GENERIC_TIMEOUT, K_NET_SCTP_TIMEOUTS,
	K_NET_GRE_TIMEOUTS, K_STAT_DROP, K_STAT_INSERT_FAILED, K_STAT_CHAIN,
	/* a netfilter program's context */
	K_BPF_NF_STATE, K_BPF_NF_SKB, K_STATE_HOOK, K_STATE_OUT, K_STATE_NET,
	/* who */
	K_TASK_FLAGS, K_TASK_TGID, K_TASK_LEADER, K_TASK_STARTED, K_TASK_COMM, K_TASK_CGROUPS,
	K_TASK_NSPROXY, K_TASK_PREEMPT, K_TASK_CFS, K_CFS_RQ, K_RQ_CURR, K_NSPROXY_NET, K_CSS_SET_CGROUP,
	K_CGROUP_KN, K_KN_ID, K_KN_NAME, K_KN_PARENT,
	K_PERCPU_RUNQUEUES, K_PERCPU_OFFSET, K_PERCPU_PREEMPT, K_PERCPU_CURRENT,
	/* the number behind an open sysctl file */
	K_TASK_FILES, K_FILES_FDT, K_FDT_FD, K_FILE_INODE, K_PROC_VFS_INODE,
	K_PROC_SYSCTL_ENTRY, K_CTL_DATA,
	/*
	 * The way to a function's arguments: offsets in a program's context. RESULT_<function>
	 * follows from ARGS_<function>, how many arguments this kernel's BTF gives it.
	 */
	K_KPROBE, K_ARG_0, K_ARG_1, K_ARG_2, K_ARG_3, K_ARG_4, K_ARG_5, K_STACK_POINTER,
	K_RESULT___nf_conntrack_alloc, K_RESULT___nf_conntrack_confirm,
	K_RESULT_nf_ct_resolve_clash, K_RESULT_early_drop,
	K_HAVE___nf_conntrack_confirm, K_HAVE_early_drop, K_HAVE_gc_worker,
	/* what is asked for */
	K_F_NETNS, K_F_PROTO, K_F_FAMILY, K_F_SPORT, K_F_DPORT, K_F_ZONE, K_F_STATUS,
	K_F_UNREPLIED, K_F_KINDS,
	K_F_SRC, K_F_SRC_VALUE0, K_F_SRC_VALUE1, K_F_SRC_VALUE2, K_F_SRC_VALUE3,
	K_F_SRC_MASK0, K_F_SRC_MASK1, K_F_SRC_MASK2, K_F_SRC_MASK3,
	K_F_DST, K_F_DST_VALUE0, K_F_DST_VALUE1, K_F_DST_VALUE2, K_F_DST_VALUE3,
	K_F_DST_MASK0, K_F_DST_MASK1, K_F_DST_MASK2, K_F_DST_MASK3,
	K_SLOT_BITS,
};

/* Stand-ins that no real number or offset looks like, by the position in the list above. */
#define NUMBER_BASE 1520500000	/* a number */
#define WORD_BASE 1520510000	/* a number without its lowest three bits */
#define OFFSET_BASE 0x4000	/* the offset of a load or store */
#define WORD_OFFSET_BASE 0x5000	/* the same without its lowest three bits */
#define KFUNC_BASE 1520520000	/* a call of a kernel function, by its BTF id */

#define NUMBER(at) \
	({ \
		u64 number_; \
		asm("%0 = %1" : "=r"(number_) : "i"(at)); \
		number_; \
	})

#define VALUE(name) NUMBER(NUMBER_BASE + K_##name)
#define WORD(name) NUMBER(WORD_BASE + K_##name)

/* Not known, not there or not asked for: VALUE() of it means nothing. */
#define ABSENT -1ULL
#define HAS(name) (VALUE(name) != ABSENT)
/* Said to be so. */
#define IS(name) (VALUE(name) == 1)

/* A load through a pointer that the verifier knows by type, or from the context. */
#define LOAD(to, type, from, name) \
	asm volatile("%0 = *(" #type " *)(%1 + %2)" \
		     : "=r"(to) : "r"(from), "i"(OFFSET_BASE + K_##name))

#endif

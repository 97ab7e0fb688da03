/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A copy of a struct nf_conn, and its fields by their names in bpf/constants.h.
 */
#ifndef CTRACE_ENTRY_H
#define CTRACE_ENTRY_H

#include <linux/types.h>
#include "helpers.h"

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

enum tcp_conntrack {
	TCP_SYN_RECV = 2,
	TCP_ESTABLISHED = 3,
	TCP_FIN_WAIT = 4,	/* from here on a connection is closing */
	TCP_CLOSE = 8,
	TCP_RETRANS = 12,	/* no states: two more timeouts */
	TCP_UNACK = 13,
};

#define TCP_RST_SET 4	/* enum tcp_bit_set */
#define DATA_UNACKNOWLEDGED 0x10	/* IP_CT_TCP_FLAG_DATA_UNACKNOWLEDGED */

/* skb->_nfct: a struct nf_conn pointer with enum ip_conntrack_info in its low bits. */
#define NFCT_INFO 7ULL
#define NFCT_PTR (~NFCT_INFO)
#define CTINFO_UNTRACKED 7

/*
 * Room for what we use of it: up to CT_BYTES, and the word that CT_PROTO + 64 is in. Locks that
 * sleep (PREEMPT_RT) make it the largest.
 */
#define ENTRY_WORDS 36

/* A copy of a struct nf_conn, or of the parts of it that matter. */
struct entry {
	u64 words[ENTRY_WORDS];
};

/* A field; the last operand says which memory is read, so that equal ones are read once. */
#define GET(entry, type, name) \
	({ \
		u64 value_; \
		asm("%0 = *(" #type " *)(%1 + %2)" \
		    : "=r"(value_) \
		    : "r"((entry)->words), "i"(OFFSET_BASE + K_##name), "m"(*(entry))); \
		value_; \
	})
#define STORE(entry, type, offset, value) \
	asm("*(" #type " *)(%1 + %2) = %3" \
	    : "+m"(*(entry)) : "r"((entry)->words), "i"(offset), "r"((u64)(value)))
#define PUT(entry, type, name, value) STORE(entry, type, OFFSET_BASE + K_##name, value)
#define FIELD(entry, name) ((u8 *)(entry)->words + VALUE(name))

/* One bulk read serves every field. */
INLINE void read_entry(struct entry *e, u64 ct)
{
	if (probe_read(e->words, VALUE(CT_BYTES), (void *)ct))
		__builtin_memset(e->words, 0, sizeof(e->words));
}

/* The word that a field is in. */
#define READ_WORD(e, ct, name) \
	STORE(e, u64, WORD_OFFSET_BASE + K_##name, read64((ct) + WORD(name)))

/* The words with what every record has: a few loads cost less than a copy of all. */
INLINE void read_common(struct entry *e, u64 ct)
{
	if (HAS(CT_ZONE))
		READ_WORD(e, ct, CT_ZONE);
	READ_WORD(e, ct, ORIG_SRC);
	READ_WORD(e, ct, ORIG_SPORT);	/* and the family, and IPv4's destination */
	READ_WORD(e, ct, ORIG_PROTO);
	READ_WORD(e, ct, REPLY_SRC);
	READ_WORD(e, ct, REPLY_SPORT);
	READ_WORD(e, ct, REPLY_PROTO);
	READ_WORD(e, ct, CT_STATUS);
	if (GET(e, u16, ORIG_L3NUM) != AF_INET) {
		READ_WORD(e, ct, ORIG_SRC8);
		READ_WORD(e, ct, ORIG_DST8);
		READ_WORD(e, ct, REPLY_SRC8);
		READ_WORD(e, ct, REPLY_DST8);
	}
}

/* What a record of its end needs besides. */
INLINE void read_life(struct entry *e, u64 ct)
{
	u64 at = WORD(CT_PROTO), i;

	READ_WORD(e, ct, CT_TIMEOUT);
	READ_WORD(e, ct, CT_NET);
	if (HAS(CT_MARK))
		READ_WORD(e, ct, CT_MARK);
	READ_WORD(e, ct, CT_PROTO);
	if (GET(e, u8, ORIG_PROTO) != IPPROTO_UDP)
#pragma unroll
		for (i = 8; i <= 64; i += 8)
			*(u64 *)((u8 *)e->words + at + i) = read64(ct + at + i);
}

INLINE u32 netns_of(u64 net)
{
	return read32(net + VALUE(NET_INUM));
}

/*
 * Whether the entry was ever in the table. Up to 5.18 entries outside it sit on
 * per-CPU lists through the same node, and IPS_CONFIRMED is set on success only;
 * from 5.19 on the node is untouched until __nf_conntrack_hash_insert, while
 * IPS_CONFIRMED may be set on losers too (before commit 2d72afb34065).
 */
INLINE bool was_inserted(const struct entry *e)
{
	if (IS(CT_LISTS))
		return GET(e, u32, CT_STATUS) & IPS_CONFIRMED;
	return GET(e, u64, CT_PPREV) != 0;
}

#endif

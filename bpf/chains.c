/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What is in the hash table, by walking some of its buckets: how long their chains are, and
 * how many of their entries are ASSURED, by namespace. Run on request (BPF_PROG_TEST_RUN),
 * STEPS nodes at a time, so no CPU is held for more than some ten microseconds. Nothing is
 * locked: an entry that moves to another chain meanwhile leads to a wrong end marker, and
 * that bucket is counted as disturbed, not as measured.
 *
 * The bounded loop needs no bpf_loop(): verifiers since 5.3 take it.
 */
#include <linux/types.h>
#include "ct.h"

#define CURSOR MAP(0)	/* array of one struct cursor */
#define LENGTHS MAP(1)	/* array: u64 by chain length; the last one is for all longer */
#define MET MAP(2)	/* LRU hash: netns -> struct met; they come and go */
#define FOUND MAP(3)	/* array: u64, the entries that a walk met, the latest of many */

#define STEPS 128
#define LONGEST 255
#define FOUND_MOST 1024	/* a power of two */
#define ENDLESS 4096	/* longer than any chain: a circle of freed entries */
#define HASH_NEXT (VALUE(HASH_PPREV) - 8)	/* struct hlist_nulls_node */
#define PAGE 4096
#define BACK 64

struct cursor {
	u64 base;	/* of nf_conntrack_hash */
	u64 next;	/* bucket */
	u64 step;
	u64 end;
	u64 disturbed;
	u64 length;	/* so far; kept here, where the verifier does not follow its values */
	u64 node;	/* where the last run stopped; 0: between two chains */
	u64 met;	/* entries */
	u64 only;	/* the one namespace whose entries count; 0: all */
};

struct met {
	u64 entries;
	u64 assured;
};

INLINE struct cursor *cursor(void)
{
	u32 zero = 0;

	return map_lookup(CURSOR, &zero);
}

INLINE void count_chain(u32 length)
{
	u64 *seen = map_lookup(LENGTHS, &length);

	if (seen)
		*seen += 1;
}

/* An entry hangs in two chains, and is counted in that of its original direction. */
INLINE void meet(struct cursor *c, u64 node)
{
	u64 ct = node - VALUE(CT_TUPLEHASH);
	struct met fresh = {}, *met;
	u32 netns, place;
	u64 *found;

	if (!HAS(HASH_DIR) || read8(node + VALUE(HASH_DIR)))
		return;
	netns = netns_of(read64(ct + VALUE(CT_NET)));
	if (c->only && c->only != netns)
		return;
	met = map_lookup(MET, &netns);
	if (!met) {
		map_update(MET, &netns, &fresh, BPF_NOEXIST);
		met = map_lookup(MET, &netns);
		if (!met)
			return;
	}
	met->entries += 1;
	if (read32(ct + VALUE(CT_STATUS)) & IPS_ASSURED)
		met->assured += 1;
	place = c->met % FOUND_MOST;
	found = map_lookup(FOUND, &place);
	if (found)
		*found = ct;
	c->met += 1;
}

/* args[0]: address of the variable nf_conntrack_hash */
int find_by_symbol(u64 *args)
{
	struct cursor *c = cursor();

	if (c)
		c->base = read64(args[0]);
	return 0;
}

/*
 * args[0]: an entry in the table. Its chain's end tells the bucket's number, and the way
 * back to the chain's head the bucket's address: the table begins at a page. 1: found.
 */
int find_by_entry(u64 *args)
{
	u64 node = args[0] + VALUE(CT_TUPLEHASH), at = node, bucket, head;
	struct cursor *c = cursor();
	int i;

	if (!c)
		return 0;
	for (i = 0; i < STEPS && at && !(at & 1); i++)
		at = read64(at + HASH_NEXT);
	if (!(at & 1))
		return 0;
	bucket = at >> 1;
	for (i = 0; i < BACK; i++) {
		head = read64(node + VALUE(HASH_PPREV));
		if (!((head - bucket * 8) % PAGE)) {
			c->base = head - bucket * 8;
			return 1;
		}
		node = head - HASH_NEXT;
	}
	return 0;
}

/* The next nodes. Returns how many entries they were << 1 | whether all buckets are done. */
int walk(u64 *args)
{
	struct cursor *c = cursor();
	u64 node, length, met;
	int i;

	if (!c || c->next >= c->end)
		return 1;
	met = c->met;
	node = c->node ? c->node : read64(c->base + c->next * 8);
	for (i = 0; i < STEPS; i++) {
		if (node && !(node & 1) && c->length < ENDLESS) {
			c->length += 1;
			meet(c, node);
			node = read64(node + HASH_NEXT);
			continue;
		}
		length = c->length;
		if (node & 1 && node >> 1 == c->next)
			count_chain(length < LONGEST ? length : LONGEST);
		else
			c->disturbed += 1;
		c->length = 0;
		c->next += c->step;
		if (c->next >= c->end)
			return (c->met - met) << 1 | 1;
		node = read64(c->base + c->next * 8);
	}
	c->node = node;
	return (c->met - met) << 1;
}

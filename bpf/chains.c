/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How long the hash table's chains are, by walking some of its buckets. Run on request
 * (BPF_PROG_TEST_RUN), STEPS nodes at a time, so no CPU is held for more than some
 * microseconds. Nothing is locked: an entry that moves to another chain meanwhile leads
 * to a wrong end marker, and that bucket is counted as disturbed, not as measured.
 *
 * The bounded loop needs no bpf_loop(): verifiers since 5.3 take it.
 */
#include <linux/types.h>
#include "ct.h"

#define CURSOR MAP(0)	/* array of one struct cursor */
#define LENGTHS MAP(1)	/* array: u64 by chain length; the last one is for all longer */

#define STEPS 512
#define LONGEST 255
#define HASH_NEXT (HASH_PPREV - 8)
#define PAGE 4096
#define BACK 64

struct cursor {
	u64 base;	/* of nf_conntrack_hash */
	u64 next;	/* bucket */
	u64 step;
	u64 end;
	u64 disturbed;
	u64 length;	/* so far; kept here, where the verifier does not follow its values */
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
	u64 node = args[0] + CT_TUPLEHASH, at = node, bucket, head;
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
		head = read64(node + HASH_PPREV);
		if (!((head - bucket * 8) % PAGE)) {
			c->base = head - bucket * 8;
			return 1;
		}
		node = head - HASH_NEXT;
	}
	return 0;
}

/* The next buckets; 1: all are done. */
int walk(u64 *args)
{
	struct cursor *c = cursor();
	u64 node, length;
	int i;

	if (!c || c->next >= c->end)
		return 1;
	c->length = 0;
	node = read64(c->base + c->next * 8);
	for (i = 0; i < STEPS; i++) {
		if (node && !(node & 1)) {
			c->length += 1;
			node = read64(node + HASH_NEXT);
			continue;
		}
		length = c->length;
		if (node && node >> 1 == c->next)
			count_chain(length < LONGEST ? length : LONGEST);
		else
			c->disturbed += 1;
		c->length = 0;
		c->next += c->step;
		if (c->next >= c->end)
			return 1;
		node = read64(c->base + c->next * 8);
	}
	if (c->length >= STEPS - 1) {	/* longer than a run, or a circle of freed entries */
		count_chain(LONGEST);
		c->next += c->step;
	}
	return 0;
}

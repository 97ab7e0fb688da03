/* SPDX-License-Identifier: GPL-2.0 */
/*
 * This CPU's ring of records: ring_room() for a place in it, ring_done() when it is
 * filled. ctrace/kernel/rings.py reads it.
 *
 * Where programs can take a number atomically (5.12) and stores stay in order (x86-64),
 * the ring is an array of ours. A place holds its number and one, stored last; so nothing
 * need be locked, and nobody waits for the record's two cache lines, which the reader or
 * memory has: with the kernel's ring buffer that wait is half of what an event costs.
 */
#ifndef CTRACE_RING_H
#define CTRACE_RING_H

#include "record.h"
#include "helpers.h"
#include "maps.h"

/* The first elements of RINGS, one per CPU; its places follow. */
struct ring {
	u64 next;	/* number of the record to come */
	u64 limit;	/* how many may wait for the reader */
	u64 first;	/* its places in RINGS */
	u64 mask;
	u64 unused[4];
	u64 read;	/* how many the reader has done with; a cache line of its own */
	u64 more[7];
};

struct place {
	u64 ready;	/* number + 1 */
	struct ctrace_record record;
};

/* NULL: the reader is too far behind. */
INLINE struct ctrace_record *ring_room(u64 *number)
{
	u32 cpu = this_cpu(), at;
	struct ring *ring = map_lookup(RINGS, &cpu);
	struct place *place;

	if (!ring)
		return NULL;
	if (!IS(FETCH_ADD))
		return ring_reserve(ring, sizeof(struct ctrace_record), 0);
	/*
	 * Who interrupts us here takes a place unseen; the limit leaves room for more of
	 * those than can be.
	 */
	if (ring->next - ring->read >= ring->limit)
		return NULL;
	*number = fetch_add(&ring->next, 1);
	at = ring->first + (*number & ring->mask);
	place = map_lookup(RINGS, &at);
	return place ? &place->record : NULL;
}

INLINE void ring_done(struct ctrace_record *r, u64 number)
{
	if (!IS(FETCH_ADD)) {
		ring_submit(r, BPF_RB_NO_WAKEUP);
		return;
	}
	asm volatile("" ::: "memory");
	((volatile u64 *)r)[-1] = number + 1;
}

#endif

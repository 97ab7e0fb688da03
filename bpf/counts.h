/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Exact counts by namespace, whatever the filter says.
 */
#ifndef CTRACE_COUNTS_H
#define CTRACE_COUNTS_H

#include "record.h"
#include "helpers.h"
#include "maps.h"

/*
 * A place belongs on this CPU to the first namespace that comes, for good. Of two that come
 * at the same time, one in a softirq that interrupts the other, the place is neither's: whoever
 * finds a claim beside its own keeps to COUNTS, as does who comes later. User space adds up.
 */
INLINE struct tally *near_tally(u32 netns)
{
	u32 zero = 0, place = netns % NEAR_PLACES;
	struct near *near = map_lookup(NEAR, &zero);

	if (!near)
		return NULL;
	if (near->places[place].netns == netns)
		return &near->places[place].tally;
	if (near->places[place].claims)
		return NULL;
	__sync_fetch_and_add(&near->places[place].claims, 1);
	if (*(volatile u64 *)&near->places[place].claims != 1)
		return NULL;
	near->places[place].netns = netns;
	return &near->places[place].tally;
}

/* The namespace's own; NULL where it has none, also when the map is full. */
INLINE struct tally *own_tally(u32 netns, bool make)
{
	struct tally *tally = near_tally(netns);
	u32 zero = 0;
	void *blank;

	if (!tally)
		tally = map_lookup(COUNTS, &netns);
	if (tally || !make)
		return tally;
	blank = map_lookup(BLANK, &zero);
	if (blank)
		map_update(COUNTS, &netns, blank, BPF_NOEXIST);
	return map_lookup(COUNTS, &netns);
}

INLINE struct tally *tally_of(u32 netns)
{
	struct tally *tally = own_tally(netns, true);
	u32 zero = 0;

	/* namespace 0 takes the rest */
	return tally ? tally : map_lookup(COUNTS, &zero);
}

INLINE void add(struct tally *tally, u32 reason, u64 n)
{
	/* atomic: a softirq may interrupt the same counter on the same CPU */
	if (tally && reason < CTRACE_REASONS)
		__sync_fetch_and_add(&tally->counts[reason], n);
}

INLINE void count(u32 netns, u32 reason, u64 n)
{
	add(tally_of(netns), reason, n);
}

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A look at one entry on request, for sampling: no hook. `what`: the entry's address, with
 * LOOK_MET for one that a walk over the table met (ctrace/capture/table/assured.py). It may by now
 * belong to another entry, or to none. Of young entries user space compares the tuple with
 * the one that it asked for (ctrace/capture/table/young.py); of the table's any will do.
 */
#ifndef CTRACE_LOOK_H
#define CTRACE_LOOK_H

#include "ct.h"

#define LOOK_MET 1ULL

INLINE int look_at(u64 what)
{
	u64 ct = what & ~LOOK_MET;
	struct entry e;

	read_entry(&e, ct);
	if (was_inserted(&e) && !(GET(&e, u32, CT_STATUS) & IPS_DYING))
		emit_life(&e, ct, netns_of(GET(&e, u64, CT_NET)),
			  what & LOOK_MET ? CTRACE_MET : CTRACE_SAMPLED, CTRACE_R_NONE, true);
	return 0;
}

#endif

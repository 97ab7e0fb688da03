/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A look at one entry on request, for sampling how young connections fare: no hook.
 * The address may by now belong to another entry, or to none: user space compares the
 * tuple with the one that it asked for (ctrace/capture/young.py).
 */
#ifndef CTRACE_LOOK_H
#define CTRACE_LOOK_H

#include "ct.h"

INLINE int look_at(u64 ct)
{
	struct entry e;

	read_entry(&e, ct);
	if (was_inserted(&e) && !(AT(&e, u32, CT_STATUS) & IPS_DYING))
		emit_life(&e, ct, netns_of(AT(&e, u64, CT_NET)), CTRACE_SAMPLED, CTRACE_R_NONE,
			  true);
	return 0;
}

#endif

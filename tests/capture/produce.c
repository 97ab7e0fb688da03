// SPDX-License-Identifier: GPL-2.0
/* Fills the rings with records that check themselves; of ring buffers', some discarded. */
#include <linux/types.h>
#include "ct.h"

static void (*ring_discard)(void *data, u64 flags) = (void *)133;

struct run {
	u64 args[2];	/* first number, producer */
};

int produce(struct run *ctx)
{
	u64 first = ctx->args[0], producer = ctx->args[1], number;
	struct ctrace_record *r;
	int i;

#pragma unroll
	for (i = 0; i < 32; i++) {
		r = ring_room(&number);
		if (!r) {
			count(1, CTRACE_R_RING_FULL, 1);
			continue;
		}
		__builtin_memset(r, 0, sizeof(*r));
		r->ts = boot_ns();
		r->ct = first + i;
		r->owner = producer;
		r->cgroup = (first + i) ^ producer ^ r->ts;
		if (!IS(FETCH_ADD) && (i & 15) == 7) {
			count(1, CTRACE_R_NONE, 1);
			ring_discard(r, BPF_RB_NO_WAKEUP);
			continue;
		}
		count(1, CTRACE_R_NEW, 1);
		ring_done(r, number);
	}
	return 1;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * Where is this CPU's per-CPU section? The current task's run queue is the per-CPU
 * variable `runqueues`. That it is this CPU's, and that the current task is what it runs,
 * proves the guess: by `current_task` in the same section or by the run queue itself.
 */
#include <linux/types.h>
#include "percpu.h"

INLINE bool is_proven(u64 task, u64 queue, u64 section)
{
	if (HAS(PERCPU_CURRENT))
		return read64(section + VALUE(PERCPU_CURRENT)) == task;
	return HAS(RQ_CURR) && read64(queue + VALUE(RQ_CURR)) == task;
}

/*
 * args[0]: where the section is in the kernel's image, or 0. Returns 0 when nothing is
 * proven, 1 when the section is known, 2 when per-CPU pointers can be followed as well.
 */
int locate_cpu(u64 *args)
{
	u64 task = current_task(), image = args[0];
	u64 queue = read64(read64(task + VALUE(TASK_CFS)) + VALUE(CFS_RQ));
	struct cpu_place place = { queue - VALUE(PERCPU_RUNQUEUES), 0 };
	u32 cpu = this_cpu();

	if (!queue || !is_proven(task, queue, place.section))
		return 0;
	if (HAS(PERCPU_OFFSET))	/* x86 keeps the distance in the section */
		place.distance = read64(place.section + VALUE(PERCPU_OFFSET));
	else if (image)
		place.distance = place.section - image;
	map_update(CPUS, &cpu, &place, 0);
	return place.distance ? 2 : 1;
}

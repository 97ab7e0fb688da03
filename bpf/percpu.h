/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Per-CPU variables of the kernel without their symbols, which exist in kallsyms only
 * with KALLSYMS_ALL: bpf/percpu.c finds each CPU's per-CPU section once, BTF tells
 * where in the section a variable is.
 */
#ifndef CTRACE_PERCPU_H
#define CTRACE_PERCPU_H

#include "helpers.h"
#include "maps.h"

struct cpu_place {
	u64 section;	/* where this CPU's per-CPU section starts */
	u64 distance;	/* from a per-CPU pointer to what it means on this CPU; 0: unknown */
};

INLINE struct cpu_place *cpu_place(void)
{
	u32 cpu = this_cpu();

	return map_lookup(CPUS, &cpu);
}

/* Start of this CPU's per-CPU section; 0: unknown. */
INLINE u64 percpu_section(void)
{
	struct cpu_place *place = cpu_place();

	return place ? place->section : 0;
}

/* preempt_count: bit 8 serving a softirq, 16-19 hardirq, 20-23 NMI */
#define INTERRUPT_BITS 0x00ff0100

/* preempt_count's bits from 8 on; all of them when it is not known. */
INLINE u32 interrupts(void)
{
	if (HAS(PERCPU_PREEMPT)) {
		u64 section = percpu_section();

		return section ? read32(section + VALUE(PERCPU_PREEMPT)) : ~0U;
	}
	if (HAS(TASK_PREEMPT))
		return read32(current_task() + VALUE(TASK_PREEMPT));
	return ~0U;
}

/* Whether the current task is the one on whose behalf we run; false when unknown. */
INLINE bool in_task(void)
{
	return !(interrupts() & INTERRUPT_BITS);
}

#endif

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

/* Start of this CPU's per-CPU section; 0: unknown. */
INLINE u64 percpu_section(void)
{
	u32 cpu = this_cpu();
	u64 *section = map_lookup(CPUS, &cpu);

	return section ? *section : 0;
}

/* preempt_count: bit 8 serving a softirq, 16-19 hardirq, 20-23 NMI */
#define INTERRUPT_BITS 0x00ff0100

/* Whether the current task is the one on whose behalf we run; false when unknown. */
INLINE bool in_task(void)
{
#if defined(PERCPU_PREEMPT)
	u64 section = percpu_section();

	return section && !(read32(section + PERCPU_PREEMPT) & INTERRUPT_BITS);
#elif defined(TASK_PREEMPT) && !defined(__x86_64__)
	return !(read32(current_task() + TASK_PREEMPT) & INTERRUPT_BITS);
#else
	return false;
#endif
}

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The maps, by position: user space makes them (ctrace/kernel/objects.py holds the
 * same list) and replaces the fake descriptors in the compiled instructions.
 */
#ifndef CTRACE_MAPS_H
#define CTRACE_MAPS_H

#define MAP(position) bpf_pseudo_fd(1, 1000001 + (position))

#define RINGS MAP(0)	/* one ring per CPU (bpf/ring.h) */
#define COUNTS MAP(1)	/* per-CPU hash: netns -> struct tally, of those that NEAR has not */
#define OWNERS MAP(2)	/* LRU hash: owner key -> struct owner */
#define SCRATCH MAP(3)	/* LRU hash: u64 -> u64[7], what one hook leaves for another */
#define BASELINE MAP(4)	/* per-CPU hash: netns -> the kernel's own counters when last seen */
#define SETTINGS MAP(5)	/* array of u64: what is learned after loading */

#define CPUS MAP(6)	/* array: struct cpu_place (bpf/percpu.h), by CPU */

#define CGROUPS MAP(7)	/* LRU hash: cgroup id -> struct cgroup_names */
#define BLANK MAP(8)	/* array: zeros as large as struct cgroup_names, too many for the stack */
#define NEAR MAP(9)	/* per-CPU array of one struct near: most namespaces' counts */
#define SLOTS MAP(10)	/* array of 1 << 12 u64[7], of which 1 << SLOT_BITS are used: most of what SCRATCH would hold */
#define OWN_MAPS 11	/* how many these are; a source has its own behind them */

struct tally {
	u64 counts[16];	/* CTRACE_REASONS */
	u64 size;	/* address of the table's size; 0: unknown */
	u64 max;	/* and of the limit */
};

/* Counts at a place that the namespace's number tells: no hashing, no chain to follow. */
#define NEAR_PLACES 64	/* numbers are given out one after the other */

struct near {
	struct {
		u64 netns;
		u64 claims;
		struct tally tally;
	} places[NEAR_PLACES];
};

struct owner {
	u8 comm[16];
	u64 cgroup;
};

/* The last two parts of a cgroup's path: it may go together with its process. */
struct cgroup_names {
	u8 name[96];
	u8 parent[96];
};

#endif

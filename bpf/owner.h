/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Whose packet: the current process, its cgroup, and the names that may be gone soon.
 */
#ifndef CTRACE_OWNER_H
#define CTRACE_OWNER_H

#include "helpers.h"
#include "maps.h"

#define PF_KTHREAD 0x00200000

/* Once for each cgroup: what user space might come too late to look up. */
INLINE void remember_cgroup(u64 node, u64 id)
{
	struct cgroup_names *names;
	u32 zero = 0;

	if (!HAS(KN_NAME) || !HAS(KN_PARENT) || map_lookup(CGROUPS, &id))
		return;
	names = map_lookup(BLANK, &zero);
	if (!names)
		return;
	map_update(CGROUPS, &id, names, BPF_NOEXIST);
	names = map_lookup(CGROUPS, &id);
	if (!names)
		return;
	probe_read_str(names->parent, sizeof(names->parent),
		       (void *)read64(read64(node + VALUE(KN_PARENT)) + VALUE(KN_NAME)));
	probe_read_str(names->name, sizeof(names->name), (void *)read64(node + VALUE(KN_NAME)));
}

/* The owner key of the current process: 0 for a kernel thread. */
INLINE u64 current_key(void)
{
	u64 flags, tgid, start;

	if (IS(TASK_BTF)) {
		void *task = current_task_btf(), *leader;

		LOAD(flags, u32, task, TASK_FLAGS);
		LOAD(leader, u64, task, TASK_LEADER);
		LOAD(tgid, u32, task, TASK_TGID);
		LOAD(start, u64, leader, TASK_STARTED);
	} else {
		u64 task = current_task();

		flags = read32(task + VALUE(TASK_FLAGS));
		tgid = read32(task + VALUE(TASK_TGID));
		start = read64(read64(task + VALUE(TASK_LEADER)) + VALUE(TASK_STARTED));
	}
	if (flags & PF_KTHREAD)
		return 0;
	return tgid << 32 | (u32)(start / 1000000);
}

/* The cgroup of the current process, whose key this is; both go to OWNERS once. */
INLINE u64 cgroup_of(u64 key)
{
	struct owner fresh = {}, *known = map_lookup(OWNERS, &key);
	u64 task, leader;

	if (known)
		return known->cgroup;
	task = current_task();
	leader = read64(task + VALUE(TASK_LEADER));
	probe_read(fresh.comm, sizeof(fresh.comm), (void *)(leader + VALUE(TASK_COMM)));
	if (HAS(CSS_SET_CGROUP) && HAS(CGROUP_KN) && HAS(KN_ID)) {
		u64 set = read64(task + VALUE(TASK_CGROUPS));
		u64 node = read64(read64(set + VALUE(CSS_SET_CGROUP)) + VALUE(CGROUP_KN));

		fresh.cgroup = read64(node + VALUE(KN_ID));
		remember_cgroup(node, fresh.cgroup);
	}
	map_update(OWNERS, &key, &fresh, 0);
	return fresh.cgroup;
}

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/* The kernel's BPF helpers that we call, by number (include/uapi/linux/bpf.h). */
#ifndef CTRACE_HELPERS_H
#define CTRACE_HELPERS_H

#include "constants.h"

#define INLINE static inline __attribute__((always_inline))

static void *(*map_lookup)(u64 map, const void *key) = (void *)1;
static long (*map_update)(u64 map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*map_delete)(u64 map, const void *key) = (void *)3;
static u32 (*this_cpu)(void) = (void *)8;
static u64 (*current_task)(void) = (void *)35;
static long (*get_stack)(void *ctx, void *buf, u32 size, u64 flags) = (void *)67;
static long (*probe_read)(void *to, u32 size, const void *from) = (void *)113;
static long (*probe_read_str)(void *to, u32 size, const void *from) = (void *)115;
static u64 (*jiffies64)(void) = (void *)118;		/* 5.5 */
static u64 (*boot_ns)(void) = (void *)125;		/* 5.7 */
static void *(*ring_reserve)(void *ring, u64 size, u64 flags) = (void *)131;	/* 5.8 */
static void (*ring_submit)(void *data, u64 flags) = (void *)132;

static void *(*current_task_btf)(void) = (void *)158;	/* 5.11 */

/*
 * Adds to *at and gives what it was (5.12). Compilers before LLVM 12 know no such
 * instruction: ctrace/kernel/programs.py makes it of an addition with this offset.
 */
#define FETCH_OFFSET "0x7000"

INLINE u64 fetch_add(u64 *at, u64 value)
{
	asm volatile("lock *(u64 *)(%1 + " FETCH_OFFSET ") += %0"
		     : "+r"(value) : "r"(at) : "memory");
	return value;
}

#define BPF_RB_NO_WAKEUP 1
#define BPF_NOEXIST 1

/*
 * What lies at any address of the kernel; 0 where nothing does. This alone is compiled
 * twice: where programs may cast numbers to pointers (bpf_rdonly_cast, 6.2) a read is one
 * load, several times faster than a helper.
 */
#ifdef CAST
static void *(*rdonly_cast)(u64 from, u32 type) = (void *)(KFUNC_BASE + K_RDONLY_CAST);

/* RDONLY_TYPE is struct in6_addr: 16 bytes that may be read as any integers. */
#define READ(type) \
	u64 value; \
	asm volatile("%0 = *(" #type " *)(%1 + 0)" \
		     : "=r"(value) : "r"(rdonly_cast(from, VALUE(RDONLY_TYPE)))); \
	return value
#else
#define READ(type) \
	type value = 0; \
	probe_read(&value, sizeof(value), (void *)from); \
	return value
#endif

INLINE u64 read64(u64 from)
{
	READ(u64);
}

INLINE u32 read32(u64 from)
{
	READ(u32);
}

INLINE u16 read16(u64 from)
{
	READ(u16);
}

INLINE u8 read8(u64 from)
{
	READ(u8);
}

/* Network order to the CPU's. */
INLINE u16 host16(u16 value)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
	return __builtin_bswap16(value);
#else
	return value;
#endif
}

#endif

/* SPDX-License-Identifier: GPL-2.0 */
/* Registers are read by offset (bpf/function_hooks.c), never through this. */
struct pt_regs;

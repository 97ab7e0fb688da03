/* SPDX-License-Identifier: GPL-2.0 */
#define CONFIG_64BIT 1
#define CONFIG_BPF_SYSCALL 1

/* SPDX-License-Identifier: GPL-2.0 */
/* BCC asks for a version; nothing of ours depends on it (layouts come from BTF). */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 10, 0)

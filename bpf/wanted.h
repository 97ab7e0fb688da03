/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The filter: constants, so what is not asked for costs nothing.
 */
#ifndef CTRACE_WANTED_H
#define CTRACE_WANTED_H

#include "entry.h"

/* The four words of an address, as the entry has them. */
#define ADDRESS_DIFFERS(words, side) \
	((((words)[0] ^ (u32)VALUE(side##_VALUE0)) & (u32)VALUE(side##_MASK0)) | \
	 (((words)[1] ^ (u32)VALUE(side##_VALUE1)) & (u32)VALUE(side##_MASK1)) | \
	 (((words)[2] ^ (u32)VALUE(side##_VALUE2)) & (u32)VALUE(side##_MASK2)) | \
	 (((words)[3] ^ (u32)VALUE(side##_VALUE3)) & (u32)VALUE(side##_MASK3)))

INLINE bool flow_wanted(const struct entry *e, u32 netns)
{
	if (HAS(F_NETNS) && netns != (u32)VALUE(F_NETNS))
		return false;
	if (HAS(F_PROTO) && GET(e, u8, ORIG_PROTO) != VALUE(F_PROTO))
		return false;
	if (HAS(F_FAMILY) && GET(e, u16, ORIG_L3NUM) != VALUE(F_FAMILY))
		return false;
	if (HAS(F_SPORT) && host16(GET(e, u16, ORIG_SPORT)) != VALUE(F_SPORT))
		return false;
	if (HAS(F_DPORT) && host16(GET(e, u16, ORIG_DPORT)) != VALUE(F_DPORT))
		return false;
	if (HAS(F_ZONE) && HAS(CT_ZONE) && GET(e, u16, CT_ZONE) != VALUE(F_ZONE))
		return false;
	if (IS(F_SRC)) {
		const u32 *words = (const u32 *)FIELD(e, ORIG_SRC);

		if (ADDRESS_DIFFERS(words, F_SRC))
			return false;
	}
	if (IS(F_DST)) {
		const u32 *words = (const u32 *)FIELD(e, ORIG_DST);

		if (ADDRESS_DIFFERS(words, F_DST))
			return false;
	}
	return true;
}

INLINE bool record_wanted(const struct entry *e, u32 netns, u8 kind)
{
	if (HAS(F_KINDS) && !(VALUE(F_KINDS) >> kind & 1))
		return false;
	if (HAS(F_STATUS) && (GET(e, u32, CT_STATUS) & VALUE(F_STATUS)) != VALUE(F_STATUS))
		return false;
	if (IS(F_UNREPLIED) && GET(e, u32, CT_STATUS) & IPS_SEEN_REPLY)
		return false;
	return flow_wanted(e, netns);
}

#endif

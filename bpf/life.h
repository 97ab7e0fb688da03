/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The life of a dying entry: with which timeout it was last renewed, and when.
 */
#ifndef CTRACE_LIFE_H
#define CTRACE_LIFE_H

#include "entry.h"

/* Both ways, for programs divide unsigned numbers only. */
INLINE s32 milliseconds(s32 ticks)
{
	u64 size = ticks < 0 ? -(s64)ticks : ticks, ms = size * 1000 / VALUE(HZ);

	return ticks < 0 ? -(s32)ms : (s32)ms;
}

/* nf_conntrack_tcp_packet()'s own choice of timeout, made again from what it left. */
INLINE u32 tcp_timeout(const struct entry *e, u64 net)
{
	u64 table = net + VALUE(NET_TCP_TIMEOUTS);
	u32 state = GET(e, u8, CT_TCP_STATE), retrans = GET(e, u8, CT_TCP_RETRANS);
	u32 chosen, other;

	if (state > TCP_UNACK)
		return 0;
	chosen = read32(table + 4 * state);
	if (retrans && retrans >= read8(net + VALUE(NET_TCP_MAX_RETRANS)) &&
	    chosen > (other = read32(table + 4 * TCP_RETRANS))) {
		chosen = other;
	} else if (GET(e, u8, CT_TCP_LAST_INDEX) == TCP_RST_SET) {
		chosen = read32(table + 4 * TCP_CLOSE);
	} else if ((GET(e, u8, CT_TCP_FLAGS0) | GET(e, u8, CT_TCP_FLAGS1)) &
			   DATA_UNACKNOWLEDGED &&
		   chosen > (other = read32(table + 4 * TCP_UNACK))) {
		chosen = other;
	} else if (!GET(e, u16, CT_TCP_LAST_WIN) &&
		   chosen > (other = read32(table + 4 * TCP_RETRANS))) {
		chosen = other;
	}
	if (state == TCP_ESTABLISHED && !(GET(e, u32, CT_STATUS) & IPS_SEEN_REPLY) &&
	    chosen > (other = read32(table + 4 * TCP_UNACK)))
		chosen = other;
	return chosen;
}

INLINE u32 udp_timeout(const struct entry *e, u64 net)
{
	u64 table = net + VALUE(NET_UDP_TIMEOUTS);	/* unreplied, replied */

	/* refreshed with the stream timeout only once the flow is older than 2 s */
	if (GET(e, u32, CT_STATUS) & IPS_SEEN_REPLY) {
		u32 replied = read32(table + 4);

		if ((s32)(GET(e, u32, CT_TIMEOUT) - replied - GET(e, u32, CT_UDP_STREAM_TS)) > 0)
			return replied;
	}
	return read32(table);
}

/* The timeout, in jiffies, with which the entry was last renewed; 0: unknown. */
INLINE u32 last_timeout(const struct entry *e, u64 net)
{
	u8 proto = GET(e, u8, ORIG_PROTO);

	if (GET(e, u32, CT_STATUS) & (IPS_OFFLOAD | IPS_FIXED_TIMEOUT))
		return 0;
	if (proto == IPPROTO_TCP)
		return HAS(NET_TCP_TIMEOUTS) && HAS(CT_TCP_STATE) ? tcp_timeout(e, net) : 0;
	if (proto == IPPROTO_UDP || proto == IPPROTO_UDPLITE)
		return HAS(NET_UDP_TIMEOUTS) && HAS(CT_UDP_STREAM_TS) ? udp_timeout(e, net) : 0;
	/* A protocol with timeouts of its own never has the generic one, found or not. */
	if (proto == IPPROTO_ICMP)
		return HAS(NET_ICMP_TIMEOUT) ? read32(net + VALUE(NET_ICMP_TIMEOUT)) : 0;
	if (proto == IPPROTO_ICMPV6)
		return HAS(NET_ICMPV6_TIMEOUT) ? read32(net + VALUE(NET_ICMPV6_TIMEOUT)) : 0;
	if (proto == IPPROTO_SCTP)
		return HAS(NET_SCTP_TIMEOUTS) && HAS(CT_SCTP_STATE) ?
			       read32(net + VALUE(NET_SCTP_TIMEOUTS) +
				      4 * (GET(e, u8, CT_SCTP_STATE) & 15)) :
			       0;
	if (proto == IPPROTO_GRE)
		return HAS(NET_GRE_TIMEOUTS) ?
			       read32(net + VALUE(NET_GRE_TIMEOUTS) +
				      (GET(e, u32, CT_STATUS) & IPS_SEEN_REPLY ? 4 : 0)) :
			       0;
	if (proto == IPPROTO_DCCP)	/* up to 6.16 it had its own; not read here */
		return 0;
	return HAS(NET_GENERIC_TIMEOUT) ? read32(net + VALUE(NET_GENERIC_TIMEOUT)) : 0;
}

INLINE bool is_expired(const struct entry *e)
{
	return (s32)(GET(e, u32, CT_TIMEOUT) - (u32)jiffies64()) <= 0;
}

/* Whether a cttimeout policy chose the timeout; only while ct->ext is alive. */
INLINE bool has_timeout_policy(const struct entry *e)
{
	u64 ext;

	if (!HAS(CT_EXT) || !HAS(EXT_TIMEOUT))
		return false;
	ext = GET(e, u64, CT_EXT);
	return ext && read8(ext + VALUE(EXT_TIMEOUT)) != 0;
}

#endif

/*
 * The card's IPv6: one address, and behind one neighbour, known for good, the cell's network or, where the node leads there,
 * everything. As the namespace's of a container (slots.py), by rtnetlink, since no ioctl sets a neighbour or keeps the kernel from
 * looking for the address's double. And the IPv4 address of a copy, in place of its origin's.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_addr.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <sys/socket.h>
#include <unistd.h>

enum { NETWORK_BITS = 48 };

struct request {
    struct nlmsghdr head;
    char body[128];
};

static void add(struct request *request, int kind, const void *data, size_t bytes) {
    struct rtattr *attribute = (struct rtattr *)((char *)request + NLMSG_ALIGN(request->head.nlmsg_len));
    attribute->rta_type = kind, attribute->rta_len = RTA_LENGTH(bytes);
    memcpy(RTA_DATA(attribute), data, bytes);
    request->head.nlmsg_len = NLMSG_ALIGN(request->head.nlmsg_len) + RTA_ALIGN(attribute->rta_len);
}

static struct request begin(int kind, int flags, const void *what, size_t bytes) {
    struct request request = {.head = {.nlmsg_type = kind, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags}};
    memcpy(NLMSG_DATA(&request.head), what, bytes);
    request.head.nlmsg_len = NLMSG_LENGTH(bytes);
    return request;
}

static int ask(int fd, const struct request *request) {
    struct {
        struct nlmsghdr head;
        struct nlmsgerr error;
        char rest[512];
    } answer;
    if (send(fd, request, request->head.nlmsg_len, 0) < 0 || recv(fd, &answer, sizeof answer, 0) < (ssize_t)NLMSG_LENGTH(4)) return -1;
    errno = answer.head.nlmsg_type == NLMSG_ERROR ? -answer.error.error : EPROTO;
    return errno ? -1 : 0;
}

static int address_is(int fd, unsigned card, int there, int family, const void *address) {
    const size_t bytes = family == AF_INET6 ? sizeof(struct in6_addr) : sizeof(struct in_addr);
    const struct ifaddrmsg what = {.ifa_family = family, .ifa_prefixlen = bytes * 8, .ifa_index = card};
    const unsigned flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE;
    struct request request = begin(there ? RTM_NEWADDR : RTM_DELADDR, there ? NLM_F_CREATE | NLM_F_REPLACE : 0, &what, sizeof what);
    add(&request, IFA_LOCAL, address, bytes), add(&request, IFA_ADDRESS, address, bytes);
    if (there && family == AF_INET6) add(&request, IFA_FLAGS, &flags, sizeof flags);
    return ask(fd, &request);
}

static unsigned the_card(void) {
    static unsigned card;
    return card ? card : (card = if_nametoindex("eth0"));
}

static int open_routes(void) { return socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE); }

static int know_gateway(int fd, unsigned card, int family, const void *address) {
    const struct ndmsg neighbour = {.ndm_family = family, .ndm_ifindex = card, .ndm_state = NUD_PERMANENT};
    struct request near = begin(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &neighbour, sizeof neighbour);
    add(&near, NDA_DST, address, family == AF_INET6 ? sizeof(struct in6_addr) : sizeof(struct in_addr));
    add(&near, NDA_LLADDR, GATEWAY_MAC, 6);
    return ask(fd, &near);
}

/* The new one comes first: with its last address the card would lose its ways. Its neighbour it has lost with its old hardware address. */
int move_address(const char *from, const char *to) {
    struct in_addr old, new, gateway;
    if (inet_pton(AF_INET, from, &old) != 1 || inet_pton(AF_INET, to, &new) != 1 || inet_pton(AF_INET, GATEWAY, &gateway) != 1) return -1;
    int fd = open_routes(), result = know_gateway(fd, the_card(), AF_INET, &gateway);
    if (result == 0 && old.s_addr != new.s_addr)
        result = address_is(fd, the_card(), 1, AF_INET, &new) < 0 || address_is(fd, the_card(), 0, AF_INET, &old) < 0 ? -1 : 0;
    close(fd);
    return result;
}

/* To everything where `bits` is 0. */
static int way_is(int fd, unsigned card, int there, int bits, const struct in6_addr *address, const struct in6_addr *gateway) {
    const struct rtmsg way = {.rtm_family = AF_INET6, .rtm_dst_len = bits, .rtm_table = RT_TABLE_MAIN,
                              .rtm_protocol = RTPROT_STATIC, .rtm_scope = RT_SCOPE_UNIVERSE, .rtm_type = RTN_UNICAST};
    struct in6_addr network = {0};
    memcpy(&network, address, bits / 8);
    struct request far = begin(there ? RTM_NEWROUTE : RTM_DELROUTE, there ? NLM_F_CREATE | NLM_F_REPLACE : 0, &way, sizeof way);
    add(&far, RTA_DST, &network, sizeof network), add(&far, RTA_GATEWAY, gateway, sizeof *gateway), add(&far, RTA_OIF, &card, sizeof card);
    return ask(fd, &far) < 0 && (there || errno != ESRCH) ? -1 : 0;
}

static int lead(int fd, unsigned card, int outward, const struct in6_addr *address, const struct in6_addr *gateway) {
    if (know_gateway(fd, card, AF_INET6, gateway) < 0 || way_is(fd, card, 1, outward ? 0 : NETWORK_BITS, address, gateway) < 0) return -1;
    return outward ? 0 : way_is(fd, card, 0, 0, address, gateway); /* a copy may have its origin's */
}

/* Before the card is brought up. It has no address of itself, and none at all where the instance has none. */
void allow_ipv6(int allowed) {
    static int said = -1; /* what a copy is told mostly is what its origin was */
    if (said == allowed) return;
    said = allowed;
    set_kernel("net/ipv6/conf/eth0/addr_gen_mode", "1");
    set_kernel("net/ipv6/conf/eth0/accept_ra", "0");
    set_kernel("net/ipv6/conf/eth0/disable_ipv6", allowed ? "0" : "1");
}

/* An empty address: none. A copy has its origin's, which goes. `outward`: it leads to everything, and not to the cell alone. */
int set_ipv6(const char *address, int outward) {
    static struct in6_addr held;
    static int holds;
    struct in6_addr given, gateway;
    if (!address[0] && !holds) return 0;
    const unsigned card = the_card();
    int result = 0, fd = open_routes();
    if (address[0] && (inet_pton(AF_INET6, address, &given) != 1 || inet_pton(AF_INET6, "fe80::1", &gateway) != 1)) result = -1;
    if (holds && result == 0) result = address_is(fd, card, 0, AF_INET6, &held), holds = 0;
    if (address[0] && result == 0) {
        result = address_is(fd, card, 1, AF_INET6, &given) < 0 || lead(fd, card, outward, &given, &gateway) < 0 ? -1 : 0;
        held = given, holds = 1;
    }
    close(fd);
    return result;
}

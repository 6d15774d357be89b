"""The same to the metadata server's IPv6 address: sockets of IPv6's own, not with IPv4-mapped addresses; routing headers in the place of source routes."""
import errno, fcntl, socket, struct
from base import M6, MAPPED, IPPROTO_MPTCP, IPPROTO_UDPLITE, TCP_FASTOPEN_CONNECT, ask, dial, dissolve, made, mptcp_send_to, send_to, sent, tcp, tool, udp, with_table
from frames import IFF_NO_PI, IFF_RUNNING, IFF_TUN, IFF_UP, SIOCSIFFLAGS, TUNSETIFF, gateway

SIX = socket.AF_INET6
IPV6_RTHDR, ETH_P_IPV6 = 57, 0x86DD
ROUTING, FRAGMENT = 43, 44
TARGET = socket.inet_pton(SIX, M6[0])


def v6_tcp():
    return dial(tcp(SIX), M6)


def v6_tcp_443():
    return dial(tcp(SIX), (M6[0], 443))


def v6_nonblocking():
    s = tcp(SIX)
    s.setblocking(False)
    error = s.connect_ex(M6)
    if error != errno.EINPROGRESS:
        raise OSError(error, "")
    s.settimeout(2)
    return ask(s)


def v6_bind_first(ip):
    s = tcp(SIX)
    s.bind((ip, 0))
    return dial(s, M6)


def v6_bind_any():
    s = tcp(SIX)
    s.bind(("::", 0))
    return dial(s, M6)


def v6_only():
    s = tcp(SIX)
    s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return dial(s, M6)


def v6_bind_to_device():
    s = tcp(SIX)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return dial(s, M6)


def v6_scoped():
    """With an interface in the address, as for a link-local one."""
    return dial(tcp(SIX), (*M6, 0, socket.if_nametoindex("eth0")))


def v6_reconnect():
    s = tcp(SIX)
    s.connect(M6)
    dissolve(s)
    return dial(s, M6)


def v6_after_mapped():
    """A socket that an IPv4-mapped connection has turned into one of IPv4."""
    s = tcp(SIX)
    s.connect(MAPPED)
    dissolve(s)
    return dial(s, M6)


def v6_mptcp():
    return dial(tcp(SIX, IPPROTO_MPTCP), M6)


def v6_fast_open():
    return send_to(tcp(SIX), M6)


def v6_fast_open_connect():
    s = tcp(SIX)
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    return dial(s, M6)


def v6_mptcp_fast_open():
    return mptcp_send_to(SIX, M6)


def v6_udp_connect():
    s = udp(SIX)
    s.connect(M6)
    s.send(b"x")
    return sent()


def v6_udp_sendto():
    udp(SIX).sendto(b"x", M6)
    return sent()


def v6_udp_sendmsg():
    udp(SIX).sendmsg([b"x"], [], 0, M6)
    return sent()


def v6_udp_other_address(ip):
    s = udp(SIX)
    s.connect((ip, 9))
    s.sendto(b"x", M6)
    return sent()


def v6_udp_dissolved(ip):
    s = udp(SIX)
    s.connect((ip, 9))
    dissolve(s)
    s.sendto(b"x", M6)
    return sent()


def v6_udplite():
    made(SIX, socket.SOCK_DGRAM, IPPROTO_UDPLITE).sendto(b"x", M6)
    return sent()


ECHO = struct.pack("!BBHHH", 128, 0, 0, 0, 0)


def v6_icmp_sendto():
    socket.socket(SIX, socket.SOCK_RAW, socket.IPPROTO_ICMPV6).sendto(ECHO, (M6[0], 0))
    return sent()


def v6_icmp_connect():
    s = socket.socket(SIX, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    s.connect((M6[0], 0))
    s.send(ECHO)
    return sent()


def v6_icmp_datagram():
    """The socket of ping(8) without privileges."""
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write("0 0")
    socket.socket(SIX, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6).sendto(ECHO, (M6[0], 0))
    return sent()


SYN = struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1024, 0, 0)


def v6_raw_syn():
    """The kernel makes the header of IPv6."""
    socket.socket(SIX, socket.SOCK_RAW, socket.IPPROTO_TCP).sendto(SYN, (M6[0], 0))
    return sent()


def own_address():
    s = udp(SIX)
    s.connect(("2001:db8::9", 9))
    return socket.inet_pton(SIX, s.getsockname()[0])


def gateway6():
    """The node's end of the pod's veth: the first address of the pod's network."""
    return own_address()[:-1] + b"\x01"


def whole(header=socket.IPPROTO_TCP, rest=SYN, destination=TARGET, source=None):
    """A packet as it is on the wire; nobody but the receiver looks at the checksum of TCP."""
    return struct.pack("!IHBB", 6 << 28, len(rest), header, 64) + (source or own_address()) + destination + rest


def segments():
    """A routing header of type 4: by way of the node to the metadata server."""
    return struct.pack("!BBBBBBH", socket.IPPROTO_TCP, 4, 4, 1, 1, 0, 0) + TARGET + gateway6()


def compressed():
    """The same of type 3. The segment leaves out the first byte, which is that of the packet's destination."""
    return struct.pack("!BBBBBBH", socket.IPPROTO_TCP, 2, 3, 1, 0x11, 0x10, 0) + TARGET[1:] + b"\0"


def raw(header, rest, destination):
    to = (socket.inet_ntop(SIX, destination), 0)
    socket.socket(SIX, socket.SOCK_RAW, socket.IPPROTO_RAW).sendto(whole(header, rest, destination), to)
    return sent()


def v6_raw_whole():
    return raw(socket.IPPROTO_TCP, SYN, TARGET)


def v6_raw_fragment():
    return raw(FRAGMENT, struct.pack("!BBHI", socket.IPPROTO_TCP, 0, 1, 7) + SYN[:16], TARGET)


def v6_route():
    return raw(ROUTING, segments() + SYN, gateway6())


def v6_route_compressed():
    return raw(ROUTING, compressed() + SYN, gateway6())


def v6_route_in_fragments():
    """The first fragment has all headers, or nobody would accept it (RFC 8200 §4.5)."""
    rest = segments() + SYN + bytes(12)
    for offset, more, piece in ((0, 1, rest[:64]), (64, 0, rest[64:])):
        raw(FRAGMENT, struct.pack("!BBHI", ROUTING, 0, offset | more, 7) + piece, gateway6())
    return sent()


def v6_route_of_socket():
    """A socket whose packets have a routing header: by way of the node to the metadata server."""
    s = udp(SIX)
    s.setsockopt(socket.IPPROTO_IPV6, IPV6_RTHDR, struct.pack("!BBBBBBH", 0, 4, 4, 1, 1, 0, 0) + bytes(16) + gateway6())
    s.sendto(b"x", M6)
    return sent()


def by_way_of_metadata(s):
    """The metadata server is the next hop of a packet to somebody else."""
    s.setsockopt(socket.IPPROTO_IPV6, IPV6_RTHDR, struct.pack("!BBBBBBH", 0, 4, 4, 1, 1, 0, 0) + bytes(16) + TARGET)
    return s


def v6_next_hop():
    return dial(by_way_of_metadata(tcp(SIX)), ("2001:db8::9", 80))


def v6_next_hop_datagram():
    by_way_of_metadata(udp(SIX)).sendto(b"x", ("2001:db8::9", 80))
    return sent()


def v6_packet_socket(_):
    return frame(whole())


def v6_packet_route(_):
    """By way of the node, which finds the metadata server's address in a routing header after it has decided to forward."""
    return frame(whole(ROUTING, segments() + SYN, gateway6()))


def frame(packet):
    interface, hardware = gateway()
    socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM).sendto(packet, (interface, ETH_P_IPV6, 0, 0, hardware))
    return sent()


def v6_tunnel(_):
    """A tunnel of the pod's own whose other end is the metadata server."""
    tool(*"ip link add k2rvx type vxlan id 7 dstport 80 dev eth0 remote".split(), M6[0])
    try:
        tool(*"ip addr add 10.98.0.1/24 dev k2rvx".split())
        tool(*"ip link set k2rvx up".split())
        tool(*"ip neigh add 10.98.0.2 lladdr 02:00:00:00:00:01 dev k2rvx".split())
        udp().sendto(b"x", ("10.98.0.2", 9))
    finally:
        tool(*"ip link delete k2rvx".split())
    return sent()


def dial_other6():
    return dial(tcp(SIX), ("2001:db8::9", 80))


def v6_translated():
    return with_table("ip6", f"type nat hook output priority -100; ip6 daddr 2001:db8::9 dnat to {M6[0]}", dial_other6)


def v6_rewritten(_):
    return with_table("netdev", f"type filter hook egress device eth0 priority 0; ip6 daddr 2001:db8::9 ip6 daddr set {M6[0]}", dial_other6)


def v6_service(_):
    """A virtual address that the node translates into the metadata server's."""
    return dial(tcp(SIX), ("fd00:96::9", 80))


def v6_tun(_):
    """A packet that comes in from a device of the pod's own, and is forwarded by the pod and then by the node."""
    device = open("/dev/net/tun", "r+b", buffering=0)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14x", b"k2rtun", IFF_TUN | IFF_NO_PI))
    fcntl.ioctl(udp(), SIOCSIFFLAGS, struct.pack("16sH14x", b"k2rtun", IFF_UP | IFF_RUNNING))
    with open("/proc/sys/net/ipv6/conf/all/forwarding", "w") as file:
        file.write("1")
    device.write(whole(source=socket.inet_pton(SIX, "fd00:99::2")))
    return sent()

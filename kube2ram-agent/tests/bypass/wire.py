"""Ways by packet sockets: what passes every hook of a cgroup and, on some nodes, every netfilter rule.

Each row is a device, a target and a means; `frame` sends one packet of one kind by that means.
"""
import ctypes, errno, mmap, socket, struct, sys, time
from base import M, M6, Absent, outcome_of, sent

SOL_PACKET, PACKET_QDISC_BYPASS, PACKET_TX_RING = 263, 20, 13
SOL_XDP, XDP_TX_RING, XDP_UMEM_REG, XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_MMAP_OFFSETS = 283, 3, 4, 5, 6, 1
XDP_PGOFF_TX_RING, XDP_COPY, AF_XDP = 0x80000000, 2, 44
IP, IP6, ARP = 0x0800, 0x86DD, 0x0806
TAG, SERVICE_TAG = 0x8100, 0x88A8
SOURCE, SOURCE6 = "198.18.0.7", "2001:2::7"


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def payload(protocol):
    if protocol == "tcp":
        return socket.IPPROTO_TCP, struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1024, 0, 0)
    return socket.IPPROTO_UDP, struct.pack("!HHHH", 40000, 80, 9, 0) + b"x"


def packet(family, protocol, target, options=b""):
    """Type and bytes of an IP packet; with `options` the target is in these, and the destination a router."""
    number, data = payload(protocol)
    if family == "6":
        return IP6, struct.pack("!IHBB", 0x60000000, len(data), number, 64) + socket.inet_pton(socket.AF_INET6, SOURCE6) + socket.inet_pton(socket.AF_INET6, target) + data
    words = 5 + len(options) // 4
    head = lambda check: struct.pack("!BBHHHBBH4s4s", 0x40 | words, 0, 4 * words + len(data), 1, 0, 64, number, check, socket.inet_aton(SOURCE), socket.inet_aton(target)) + options
    return IP, head(checksum(head(0))) + data


def targets(family, to):
    """The metadata server, or the neighbour of its address, which is nobody's."""
    if family == "6":
        return M6[0] if to == "metadata" else "fd00:100::100:201"
    return M[0] if to == "metadata" else "100.100.100.201"


def frame(device, to, family="4", protocol="tcp", means="packet", shape="plain"):
    target = targets(family, to)
    kind, data = packet(family, protocol, target)
    if shape == "options":
        kind, data = packet("4", protocol, "198.18.0.1", b"\x83\x07\x04" + socket.inet_aton(target) + b"\x00")
    tags = {"tagged": [TAG], "twice": [SERVICE_TAG, TAG], "thrice": [SERVICE_TAG, TAG, TAG]}.get(shape, [])
    head = b"".join(struct.pack("!HH", tag, 7) for tag in tags) + struct.pack("!H", kind)
    if shape == "snap":
        head = struct.pack("!H", 8 + len(data)) + b"\xaa\xaa\x03\0\0\0" + struct.pack("!H", kind)
    # Not everybody's: ipvlan keeps such frames to itself, or drops them.
    whole = b"\x02\0\0\0\0\x63" + b"\x02\0\0\0\0\x07" + head + data
    # What the sender claims the protocol to be need not be what is in the frame.
    claimed = ARP if shape == "claimed" else tags[0] if tags else kind
    return MEANS[means](device, whole, claimed, kind, data)


def by_packet(device, whole, claimed, kind, data):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.sendto(whole, (device, claimed))
    return sent()


def by_datagram(device, whole, claimed, kind, data):
    """The kernel makes the link header."""
    socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0).sendto(data, (device, kind, 0, 0, b"\x02\0\0\0\0\x63"))
    return sent()


def by_bypass(device, whole, claimed, kind, data):
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    s.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    s.sendto(whole, (device, claimed))
    return sent()


def by_ring(device, whole, claimed, kind, data):
    """A transmit ring (struct tpacket_hdr, version 1): one frame in it."""
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(claimed))
    s.setsockopt(SOL_PACKET, PACKET_TX_RING, struct.pack("=IIII", 4096, 1, 2048, 2))
    s.bind((device, claimed))
    ring = mmap.mmap(s.fileno(), 4096)
    offset = 32  # struct tpacket_hdr, aligned
    ring[offset : offset + len(whole)] = whole
    struct.pack_into("=QII", ring, 0, 1, len(whole), len(whole))  # TP_STATUS_SEND_REQUEST
    s.send(b"")
    if struct.unpack_from("=Q", ring)[0] & 4:
        return "WRONG_FORMAT"
    return sent()


def express_frame(device, whole):
    """By an AF_XDP socket in copy mode."""
    try:
        s = socket.socket(AF_XDP, socket.SOCK_RAW, 0)
    except OSError:
        raise Absent("AF_XDP")
    memory = mmap.mmap(-1, 4 * 4096)
    area = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    s.setsockopt(SOL_XDP, XDP_UMEM_REG, struct.pack("=QQII", area, 4 * 4096, 4096, 0))
    for ring in (XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_TX_RING):
        s.setsockopt(SOL_XDP, ring, struct.pack("=I", 4))
    _, _, _, _, producer, _, entries, _ = struct.unpack_from("=8Q", s.getsockopt(SOL_XDP, XDP_MMAP_OFFSETS, 128))
    ring = mmap.mmap(s.fileno(), entries + 4 * 16, mmap.MAP_SHARED, offset=XDP_PGOFF_TX_RING)
    place = struct.pack("=HHIII", AF_XDP, XDP_COPY, socket.if_nametoindex(device), 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel lets go of a queue some time after the socket that had it.
    while libc.bind(s.fileno(), place, len(place)):
        if ctypes.get_errno() != errno.EBUSY:
            raise OSError(ctypes.get_errno(), "")
        time.sleep(0.01)
    memory[: len(whole)] = whole
    struct.pack_into("=QII", ring, entries, 0, len(whole), 0)
    struct.pack_into("=I", ring, producer, 1)
    s.send(b"", socket.MSG_DONTWAIT)
    return sent()


MEANS = {"packet": by_packet, "datagram": by_datagram, "bypass": by_bypass, "ring": by_ring, "express": lambda device, whole, *_: express_frame(device, whole)}


def frames():
    """Sends a frame for each line, whose words are the arguments of `frame`."""
    for line in sys.stdin:
        print(outcome_of(lambda: frame(*line.split())), flush=True)

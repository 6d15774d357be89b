"""Ways past every hook of a cgroup: packets that no socket layer has seen, or that become the metadata server's further on."""
import fcntl, socket, struct, sys, time
from base import M, dial, sent, tcp, tool, udp, with_table
from wire import express_frame

SOL_PACKET, PACKET_QDISC_BYPASS, ETH_P_IP = 263, 20, 0x0800
TUNSETIFF, IFF_TUN, IFF_NO_PI, SIOCSIFFLAGS, IFF_UP, IFF_RUNNING, SIOCGIFHWADDR = 0x400454CA, 1, 0x1000, 0x8914, 1, 0x40, 0x8927


def default_route():
    for line in open("/proc/net/route"):
        interface, destination, hop, *_ = line.split()
        if destination == "00000000":
            return interface, socket.inet_ntoa(struct.pack("=I", int(hop, 16)))


def gateway_address():
    return default_route()[1]


def gateway():
    """Interface and hardware address of the way out."""
    interface, hop = default_route()
    udp().sendto(b"x", (hop, 9))
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        for line in open("/proc/net/arp"):
            address, _, flags, hardware, *_ = line.split()
            if address == hop and flags == "0x2":
                return interface, bytes.fromhex(hardware.replace(":", ""))
    raise TimeoutError


def whole_syn(ip, hop=None):
    """A SYN as it is on the wire, maybe by way of a hop; nobody but the receiver looks at the checksum of TCP."""
    target = socket.inet_aton(M[0])
    option = b"\x83\x07\x04" + target + b"\x00" if hop else b""
    words = 5 + len(option) // 4
    header = lambda checksum: struct.pack("!BBHHHBBH4s4s", 0x40 | words, 0, 4 * words + 20, 1, 0, 64, socket.IPPROTO_TCP, checksum, socket.inet_aton(ip), hop or target) + option
    total = sum(struct.unpack(f"!{2 * words}H", header(0)))
    total = (total & 0xFFFF) + (total >> 16)
    return header(~total & 0xFFFF) + struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1024, 0, 0)


def packet_socket(ip, bypass=0, hop=None):
    """A frame that no socket layer sees; with the bypass, no queueing discipline either."""
    interface, hardware = gateway()
    s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    if bypass:
        s.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
    s.sendto(whole_syn(ip, hop), (interface, ETH_P_IP, 0, 0, hardware))
    return sent()


def forwarded(ip):
    """A SYN that the node forwards, for each line."""
    interface, hardware = gateway()
    s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    for _ in sys.stdin:
        s.sendto(whole_syn(ip), (interface, ETH_P_IP, 0, 0, hardware))
        print("sent", flush=True)


def packet_socket_bypass(ip):
    return packet_socket(ip, 1)


def packet_source_route(ip):
    """By way of the node, which finds the metadata server's address in an option after it has decided to forward."""
    return packet_socket(ip, hop=socket.inet_aton(gateway_address()))


def express(ip):
    """A frame through an AF_XDP socket."""
    interface, hardware = gateway()
    own = fcntl.ioctl(udp(), SIOCGIFHWADDR, struct.pack("16s24x", interface.encode()))[18:24]
    return express_frame(interface, hardware + own + struct.pack("!H", ETH_P_IP) + whole_syn(ip))


def tunnel(_):
    """A tunnel of the pod's own whose other end is the metadata server: the outer packet is the kernel's."""
    tool(*"ip link add k2rvx type vxlan id 7 dstport 80 dev eth0 remote".split(), M[0])
    try:
        tool(*"ip addr add 10.98.0.1/24 dev k2rvx".split())
        tool(*"ip link set k2rvx up".split())
        tool(*"ip neigh add 10.98.0.2 lladdr 02:00:00:00:00:01 dev k2rvx".split())
        udp().sendto(b"x", ("10.98.0.2", 9))
    finally:
        tool(*"ip link delete k2rvx".split())
    return sent()


def dial_other():
    return dial(tcp(), ("10.9.9.9", 80))


def translated():
    return with_table("ip", f"type nat hook output priority -100; ip daddr 10.9.9.9 dnat to {M[0]}", dial_other)


def rewritten(_):
    """After the last hook of a cgroup, as a program of the pod's own on its device could."""
    return with_table("netdev", f"type filter hook egress device eth0 priority 0; ip daddr 10.9.9.9 ip daddr set {M[0]}", dial_other)


def tun(_):
    """A packet that comes in from a device of the pod's own, and is forwarded by the pod and then by the node."""
    device = open("/dev/net/tun", "r+b", buffering=0)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14x", b"k2rtun", IFF_TUN | IFF_NO_PI))
    fcntl.ioctl(udp(), SIOCSIFFLAGS, struct.pack("16sH14x", b"k2rtun", IFF_UP | IFF_RUNNING))
    for device_name in ("all", "k2rtun"):
        with open(f"/proc/sys/net/ipv4/conf/{device_name}/rp_filter", "w") as file:
            file.write("0")
    with open("/proc/sys/net/ipv4/conf/k2rtun/forwarding", "w") as file:
        file.write("1")
    device.write(whole_syn("10.99.0.2"))
    return sent()


def service(address="10.96.0.9"):
    """A virtual address that the node translates into the metadata server's."""
    return dial(tcp(), (address, 80))

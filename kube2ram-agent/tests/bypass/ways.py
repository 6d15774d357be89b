"""Ways to the metadata server. Each prints what came of it: the role that answered, or the name of the error.

Run as `python3 ways.py <way> [argument]`. `M` is the metadata server; nothing else is contacted.
"""
import ctypes, errno, fcntl, os, socket, struct, sys, time

M = ("100.100.100.200", 80)
MAPPED = ("::ffff:" + M[0], M[1])
REQUEST = b"GET /latest/meta-data/ram/security-credentials/ HTTP/1.0\r\nHost: 100.100.100.200\r\n\r\n"
MSG_FASTOPEN, TCP_FASTOPEN_CONNECT, TCP_REPAIR, IPPROTO_MPTCP = 0x20000000, 30, 19, 262
SOL_PACKET, PACKET_QDISC_BYPASS, ETH_P_IP = 263, 20, 0x0800
TUNSETIFF, IFF_TUN, IFF_NO_PI, SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x400454CA, 1, 0x1000, 0x8914, 1, 0x40


def tcp(family=socket.AF_INET, protocol=0):
    s = socket.socket(family, socket.SOCK_STREAM, protocol)
    s.settimeout(2)
    return s


def answer(s):
    data = b""
    while chunk := s.recv(4096):
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    status = head.split()[1].decode()
    return body.decode().strip() if status == "200" else status


def ask(s):
    s.sendall(REQUEST)
    return answer(s)


def dial(s, to=M):
    s.connect(to)
    return ask(s)


def tcp4():
    return dial(tcp())


def tcp4_443():
    return dial(tcp(), (M[0], 443))


def tcp4_8080():
    return dial(tcp(), (M[0], 8080))


def nonblocking():
    s = tcp()
    s.setblocking(False)
    error = s.connect_ex(M)
    if error != errno.EINPROGRESS:
        raise OSError(error, "")
    s.settimeout(2)
    return ask(s)


def bind_first(ip):
    s = tcp()
    s.bind((ip, 0))
    return dial(s)


def bind_to_device():
    s = tcp()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return dial(s)


def dissolve(s):
    """connect(2) with AF_UNSPEC, which Python does not offer."""
    address = struct.pack("H14x", socket.AF_UNSPEC)
    if ctypes.CDLL(None, use_errno=True).connect(s.fileno(), address, len(address)):
        raise OSError(ctypes.get_errno(), "")


def reconnect():
    s = tcp()
    s.connect(M)
    dissolve(s)
    return dial(s)


def accepted_reused(ip):
    """An accepted socket, dissolved and connected anew."""
    listener = tcp()
    listener.bind((ip, 0))
    listener.listen()
    client = tcp()
    client.connect(listener.getsockname())
    accepted, _ = listener.accept()
    dissolve(accepted)
    accepted.settimeout(2)
    return dial(accepted)


def tcp6_mapped():
    return dial(tcp(socket.AF_INET6), MAPPED)


def mptcp4():
    return dial(tcp(protocol=IPPROTO_MPTCP))


def mptcp6_mapped():
    return dial(tcp(socket.AF_INET6, IPPROTO_MPTCP), MAPPED)


def send_to(s, to):
    """connect(2) by sendto(2); blocking, or it ends with EINPROGRESS."""
    s.setblocking(True)
    s.sendto(REQUEST, MSG_FASTOPEN, to)
    s.settimeout(2)
    return answer(s)


def fast_open():
    return send_to(tcp(), M)


def fast_open6_mapped():
    return send_to(tcp(socket.AF_INET6), MAPPED)


def fast_open_connect():
    s = tcp()
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    return dial(s)


def repair(ip):
    """A connection put into the established state without a handshake; its first packet is data."""
    s = tcp()
    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    s.bind((ip, 0))
    s.connect(M)
    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    return ask(s)


def udp(family=socket.AF_INET):
    return socket.socket(family, socket.SOCK_DGRAM)


def sent():
    return "sent"


def udp_connect():
    s = udp()
    s.connect(M)
    s.send(b"x")
    return sent()


def udp6_connect():
    s = udp(socket.AF_INET6)
    s.connect(MAPPED)
    s.send(b"x")
    return sent()


def udp_sendto():
    udp().sendto(b"x", M)
    return sent()


def udp6_sendto():
    udp(socket.AF_INET6).sendto(b"x", MAPPED)
    return sent()


def udp_reconnect(ip):
    s = udp()
    s.connect((ip, 9))
    s.connect(M)
    s.send(b"x")
    return sent()


ECHO = struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0)


def icmp_sendto():
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).sendto(ECHO, (M[0], 0))
    return sent()


def icmp_connect():
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    s.connect((M[0], 0))
    s.send(ECHO)
    return sent()


def raw_syn(ip):
    """A SYN with a header of our own making (IP_HDRINCL); the kernel fills in lengths and the IP checksum."""
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 1, 0, 64, socket.IPPROTO_TCP, 0, socket.inet_aton(ip), socket.inet_aton(M[0]))
    syn = struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1024, 0, 0)
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).sendto(header + syn, (M[0], 0))
    return sent()


def gateway():
    """Interface and hardware address of the way out."""
    for line in open("/proc/net/route"):
        interface, destination, hop, *_ = line.split()
        if destination == "00000000":
            break
    hop = socket.inet_ntoa(struct.pack("=I", int(hop, 16)))
    udp().sendto(b"x", (hop, 9))
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        for line in open("/proc/net/arp"):
            address, _, flags, hardware, *_ = line.split()
            if address == hop and flags == "0x2":
                return interface, bytes.fromhex(hardware.replace(":", ""))
    raise TimeoutError


def whole_syn(ip):
    """A SYN as it is on the wire; nobody but the receiver looks at the checksum of TCP."""
    header = lambda checksum: struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, socket.IPPROTO_TCP, checksum, socket.inet_aton(ip), socket.inet_aton(M[0]))
    total = sum(struct.unpack("!10H", header(0)))
    total = (total & 0xFFFF) + (total >> 16)
    return header(~total & 0xFFFF) + struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1024, 0, 0)


def packet_socket(ip, bypass=0):
    """A frame that no socket layer sees; with the bypass, no queueing discipline either."""
    interface, hardware = gateway()
    s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
    s.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, bypass)
    s.sendto(whole_syn(ip), (interface, ETH_P_IP, 0, 0, hardware))
    return sent()


def packet_socket_bypass(ip):
    return packet_socket(ip, 1)


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


def service():
    """A virtual address that the node translates into the metadata server's."""
    return dial(tcp(), ("10.96.0.9", 80))


def source_route(ip):
    """Loose source routing: the first hop is in the header, the destination in an option."""
    s = tcp()
    option = b"\x83\x07\x04" + socket.inet_aton(M[0]) + b"\x00"
    s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, option)
    return dial(s, (ip, 9))


def existing():
    """Connects, says so, and asks when told to."""
    s = tcp()
    s.connect(M)
    print("connected", flush=True)
    sys.stdin.readline()
    return ask(s)


def moved(procs, way="tcp4"):
    """A socket that is made here and used after the process moved into another cgroup."""
    made = {"tcp4": tcp, "tcp6": lambda: tcp(socket.AF_INET6), "udp": udp}[way]()
    with open(procs, "w") as file:
        file.write(str(os.getpid()))
    if way == "udp":
        made.sendto(b"x", M)
        return sent()
    return dial(made, MAPPED if way == "tcp6" else M)


def passed(procs, way="tcp4"):
    """A socket that is made here and used by another process, which never was in our cgroup when it was made."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        with open(procs, "w") as file:
            file.write(str(os.getpid()))
        _, (fd,), _, _ = socket.recv_fds(theirs, 16, 1)
        got = socket.socket(fileno=fd)
        got.settimeout(2)
        run(lambda: dial(got))
        os._exit(0)
    made = tcp()
    socket.send_fds(ours, [b"x"], [made.fileno()])
    os.wait()


def run(way):
    try:
        result = way()
    except TimeoutError:
        result = "timeout"
    except OSError as error:
        result = errno.errorcode.get(error.errno, str(error))
    if result:
        print(result, flush=True)


run(lambda: globals()[sys.argv[1]](*sys.argv[2:]))

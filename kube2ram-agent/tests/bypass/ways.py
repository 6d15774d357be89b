"""Ways to the metadata server. Each prints what came of it: the role that answered, the name of the error, or what the kernel lacks.

Run as `python3 ways.py <way> [argument]`. `M` is the metadata server; nothing else is contacted.
"""
import ctypes, errno, os, socket, struct, sys
from base import MAPPED, M, M6, Absent, ask, dial, dissolve, made, mptcp_send_to, outcome_of, send_to, sent, tcp, udp
from base import AF_SMC, IPPROTO_DCCP, IPPROTO_MPTCP, IPPROTO_SCTP, IPPROTO_UDPLITE, TCP_FASTOPEN_CONNECT
from frames import *
from ipv6 import *
from ipvs import *
from uring import *
from wire import *

TCP_REPAIR = 19
IP_TRANSPARENT, SOCK_DCCP = 19, 6
SCTP_SOCKOPT_CONNECTX = 110


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


def fast_open():
    return send_to(tcp(), M)


def fast_open6_mapped():
    return send_to(tcp(socket.AF_INET6), MAPPED)


def fast_open_connect():
    s = tcp()
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    return dial(s)


def fast_open6_connect():
    s = tcp(socket.AF_INET6)
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    return dial(s, MAPPED)


def mptcp_fast_open():
    return mptcp_send_to(socket.AF_INET, M)


def mptcp_fast_open_connect():
    s = tcp(protocol=IPPROTO_MPTCP)
    s.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
    return dial(s)


def tcp6_443():
    return dial(tcp(socket.AF_INET6), (MAPPED[0], 443))


def transparent():
    """From an address that is not the pod's."""
    s = tcp()
    s.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    s.bind(("10.99.0.3", 0))
    return dial(s)


def foreign_connect(s, to=M):
    """connect(2) of a family whose addresses Python does not know."""
    target = address(to)
    if LIBC.connect(s.fileno(), target, len(target)):
        raise OSError(ctypes.get_errno(), "")


def smc():
    s = made(AF_SMC, socket.SOCK_STREAM, 0)
    s.settimeout(None)
    foreign_connect(s)
    return ask(s)


def sctp():
    s = made(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SCTP)
    s.settimeout(2)
    s.connect(M)
    return sent()


def sctp_one_to_many():
    s = made(socket.AF_INET, socket.SOCK_SEQPACKET, IPPROTO_SCTP)
    s.settimeout(2)
    s.sendto(b"x", M)
    return sent()


def sctp_connectx():
    s = made(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SCTP)
    s.settimeout(2)
    s.setsockopt(IPPROTO_SCTP, SCTP_SOCKOPT_CONNECTX, address(M))
    return sent()


def dccp():
    s = made(socket.AF_INET, SOCK_DCCP, IPPROTO_DCCP)
    s.settimeout(2)
    s.setsockopt(269, 2, b"\0\0\0\1")
    s.connect(M)
    return sent()


def repair(ip):
    """A connection put into the established state without a handshake; its first packet is data."""
    s = tcp()
    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    s.bind((ip, 0))
    s.connect(M)
    s.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)
    return ask(s)


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


def udp_dissolved(ip):
    """Connected, dissolved, and used without a connection."""
    s = udp()
    s.connect((ip, 9))
    dissolve(s)
    s.sendto(b"x", M)
    return sent()


def udp_other_address(ip):
    """Connected to somebody else."""
    s = udp()
    s.connect((ip, 9))
    s.sendto(b"x", M)
    return sent()


def udp_sendmsg():
    udp().sendmsg([b"x"], [], 0, M)
    return sent()


def udp_sendmmsg():
    target, data = ctypes.create_string_buffer(address(M)), ctypes.create_string_buffer(b"x")
    vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(data), 1))
    message = struct.pack("=QI4xQQQQi4xI4x", ctypes.addressof(target), len(target) - 1, ctypes.addressof(vector), 1, 0, 0, 0, 0)
    s = udp()
    if LIBC.sendmmsg(s.fileno(), ctypes.create_string_buffer(message), 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "")
    return sent()


def udplite_connect():
    s = made(socket.AF_INET, socket.SOCK_DGRAM, IPPROTO_UDPLITE)
    s.connect(M)
    s.send(b"x")
    return sent()


def udplite_sendto():
    made(socket.AF_INET, socket.SOCK_DGRAM, IPPROTO_UDPLITE).sendto(b"x", M)
    return sent()


def udplite6_sendto():
    made(socket.AF_INET6, socket.SOCK_DGRAM, IPPROTO_UDPLITE).sendto(b"x", MAPPED)
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


def icmp_datagram():
    """The socket of ping(8) without privileges."""
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write("0 0")
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).sendto(ECHO, (M[0], 0))
    return sent()


def raw_source_route(ip):
    """As below, with a header of our own: the destination in the header is a router, the metadata server's address is an option."""
    hop = socket.inet_aton(gateway_address())
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).sendto(whole_syn(ip, hop), (socket.inet_ntoa(hop), 0))
    return sent()


def raw_syn(ip):
    """A SYN with a header of our own making (IP_HDRINCL); the kernel fills in lengths and the IP checksum."""
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 1, 0, 64, socket.IPPROTO_TCP, 0, socket.inet_aton(ip), socket.inet_aton(M[0]))
    syn = struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1024, 0, 0)
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).sendto(header + syn, (M[0], 0))
    return sent()


def source_route(ip):
    """Loose source routing: the first hop is in the header, the destination in an option."""
    s = tcp()
    option = b"\x83\x07\x04" + socket.inet_aton(M[0]) + b"\x00"
    s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, option)
    return dial(s, (ip, 9))


def existing(family="4"):
    """Connects, says so, and asks when told to."""
    s = tcp(socket.AF_INET6 if family == "6" else socket.AF_INET)
    s.connect(M6 if family == "6" else M)
    print("connected", flush=True)
    sys.stdin.readline()
    return ask(s)


def moved(procs, way="tcp4"):
    """A socket (and a ring, with its thread) that is made here and used after the process moved into another cgroup."""
    six, target = way.startswith("v6_"), {"tcp6": MAPPED}.get(way, M6 if way.startswith("v6_") else M)
    family, way = socket.AF_INET6 if six or way == "tcp6" else socket.AF_INET, way.removeprefix("v6_")
    made = udp(family) if way == "udp" else tcp(family)
    ring = {"uring": Ring, "uring_polled": lambda: Ring(SQPOLL)}.get(way, lambda: None)()
    with open(procs, "w") as file:
        file.write(str(os.getpid()))
    if ring:
        return ring.dial(made, target)
    if way == "udp":
        made.sendto(b"x", target)
        return sent()
    return dial(made, target)


def passed(procs, way="tcp4"):
    """A socket that is made here and used by another process, which never was in our cgroup when it was made."""
    six = way == "v6_tcp"
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        with open(procs, "w") as file:
            file.write(str(os.getpid()))
        _, (fd,), _, _ = socket.recv_fds(theirs, 16, 1)
        got = socket.socket(fileno=fd)
        got.settimeout(2)
        run(lambda: dial(got, M6 if six else M))
        os._exit(0)
    made = tcp(socket.AF_INET6 if six else socket.AF_INET)
    socket.send_fds(ours, [b"x"], [made.fileno()])
    os.wait()


def run(way):
    if result := outcome_of(way):
        print(result, flush=True)


run(lambda: globals()[sys.argv[1]](*sys.argv[2:]))

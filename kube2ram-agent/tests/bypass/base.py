"""What the ways have in common: the metadata server, sockets and requests."""
import ctypes, errno, os, socket, struct, subprocess

M = (os.environ.get("METADATA", "100.100.100.200"), 80)
MAPPED = ("::ffff:" + M[0], M[1])
M6 = (os.environ.get("METADATA6", "fd00:100::100:200"), 80)
LIST = os.environ.get("LIST", "/latest/meta-data/ram/security-credentials/")
REQUEST = f"GET {LIST} HTTP/1.0\r\nHost: {M[0]}\r\n\r\n".encode()
MSG_FASTOPEN, TCP_FASTOPEN_CONNECT = 0x20000000, 30
AF_SMC, IPPROTO_DCCP, IPPROTO_SCTP, IPPROTO_UDPLITE, IPPROTO_MPTCP = 43, 33, 132, 136, 262
OPTIONAL = {IPPROTO_DCCP: "DCCP", IPPROTO_SCTP: "SCTP", IPPROTO_UDPLITE: "UDP-Lite", IPPROTO_MPTCP: "MPTCP"}


class Absent(Exception):
    """This kernel lacks something, which is named: see kube2ram_sandbox::kernel."""


def made(family, kind, protocol=0):
    """A socket; the kernel loads the module of a protocol that it has."""
    try:
        return socket.socket(family, kind, protocol)
    except OSError as error:
        name = "SMC" if family == AF_SMC else OPTIONAL.get(protocol)
        if name and error.errno in (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT):
            raise Absent(name)
        raise


def tcp(family=socket.AF_INET, protocol=0):
    s = made(family, socket.SOCK_STREAM, protocol)
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


def dissolve(s):
    """connect(2) with AF_UNSPEC, which Python does not offer."""
    address = struct.pack("H14x", socket.AF_UNSPEC)
    if ctypes.CDLL(None, use_errno=True).connect(s.fileno(), address, len(address)):
        raise OSError(ctypes.get_errno(), "")


def send_to(s, to):
    """connect(2) by sendto(2); blocking, or it ends with EINPROGRESS."""
    s.setblocking(True)
    s.sendto(REQUEST, MSG_FASTOPEN, to)
    s.settimeout(2)
    return answer(s)


def mptcp_send_to(family, to):
    try:
        return send_to(tcp(family, IPPROTO_MPTCP), to)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise Absent("MPTCP-MSG_FASTOPEN")
        raise


def udp(family=socket.AF_INET):
    return socket.socket(family, socket.SOCK_DGRAM)


def tool(*arguments):
    subprocess.run(arguments, check=True)


def with_table(family, chain, dials):
    """Dials an address that rules of the pod's own turn into the metadata server's."""
    added = subprocess.run(["nft", f"table {family} k2rpod {{ chain way {{ {chain}; }}; }}"], stderr=subprocess.PIPE, text=True)
    if "hook egress" in chain and "Operation not supported" in added.stderr:
        raise Absent("nft-egress")
    if added.returncode:
        raise RuntimeError(added.stderr)
    try:
        return dials()
    finally:
        tool("nft", f"delete table {family} k2rpod")


def sent():
    return "sent"


def outcome_of(way):
    """What a way returns, or the name of its error."""
    try:
        return way()
    except Absent as absent:
        return f"absent: {absent}"
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
